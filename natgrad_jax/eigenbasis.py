"""A pair of orthogonal bases for the two sides of a weight matrix, and what is measured in it.

Coordinates of a matrix X [S, I, O] in the basis (U, V) are U^T X V. A side that is `None` keeps its own coordinates.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from natgrad_jax.base import Array, Scalar
from natgrad_jax.linalg import einsum, floored, matmul, transpose


class Basis(NamedTuple):
    """Orthogonal columns: inputs U [S, I, I] and outputs V [S, O, O]."""

    inputs: Array
    outputs: Array


def identity(stack: tuple[int, ...], shape: tuple[int, int], dtype: str) -> Basis:
    """The basis in which every matrix has its own coordinates.

    Args:
        stack: S.
        shape: (I, O).
        dtype: of the basis.

    Returns:
        Identity matrices, in buffers of their own.
    """
    rows, columns = shape
    return Basis(
        jnp.zeros(stack + (rows, rows), dtype) + jnp.eye(rows, dtype=dtype),
        jnp.zeros(stack + (columns, columns), dtype) + jnp.eye(columns, dtype=dtype),
    )


def into(basis: Basis, matrix: Array) -> Array:
    """Coordinates U^T X V of X [S, I, O]."""
    return matmul(matmul(transpose(basis.inputs), matrix), basis.outputs)


def out_of(basis: Basis, coordinates: Array) -> Array:
    """The matrix U C V^T with coordinates C [S, I, O]."""
    return matmul(matmul(basis.inputs, coordinates), transpose(basis.outputs))


def damped_solve(basis: Basis, scale: Array, gradient: Array, damping: Scalar) -> Array:
    """(Q diag(scale) Q^T + damping I)^-1 applied to a gradient, Q = U (x) V.

    Args:
        basis: U and V.
        scale: second moments in the basis [S, I, O], not negative.
        gradient: [S, I, O].
        damping: strength in the units of `scale`, floored relative to its largest entry.

    Returns:
        [S, I, O].
    """
    strength = floored(damping, jnp.max(scale, axis=(-2, -1), keepdims=True))
    return out_of(basis, into(basis, gradient) / (scale + strength))


def example_moments(inputs: Array, cotangents: Array, most: int = 1 << 22) -> Array:
    """Sum over examples of the entrywise squared gradient of each, averaged over draws.

    The square of the sum over positions, not the sum of the squares: cross terms of positions belong to it.

    Args:
        inputs: rows a [S, N, T, I], in any basis.
        cotangents: rows g [S, K, N, T, O], in any basis.
        most: how many entries of per-example gradients may exist at a time; examples beyond it take turns.

    Returns:
        sum_n mean_k (sum_t a g^T)^2, [S, I, O].
    """
    draws, examples, positions = cotangents.shape[-4:-1]
    if positions == 1:
        return einsum("...ni,...kno->...io", inputs[..., 0, :] ** 2, cotangents[..., 0, :] ** 2) / draws

    def some(rows, columns):
        gradients = einsum("n...ti,nk...to->nk...io", rows, columns)
        return jnp.sum(gradients**2, axis=(0, 1)) / draws

    rows = jnp.moveaxis(inputs, -3, 0)
    columns = jnp.moveaxis(cotangents, (-3, -4), (0, 1))
    one = draws * inputs.shape[-1] * cotangents.shape[-1] * max(1, inputs[..., 0, 0, 0].size)
    chunk = max(1, min(examples, most // one))
    while examples % chunk:
        chunk -= 1
    if chunk == examples:
        return some(rows, columns)

    def step(total, pair):
        return total + some(*pair), None

    split = (rows.reshape((-1, chunk) + rows.shape[1:]), columns.reshape((-1, chunk) + columns.shape[1:]))
    shape = inputs.shape[:-3] + (inputs.shape[-1], cotangents.shape[-1])
    return lax.scan(step, jnp.zeros(shape, jnp.result_type(rows, columns)), split)[0]
