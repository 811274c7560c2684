"""A pair of orthogonal bases for the two sides of a weight matrix, and what is measured in it.

Coordinates of a matrix X [S, I, O] in the basis (U, V) are U^T X V. A side that is `None` keeps its own coordinates.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from natgrad_jax.base import Array, Scalar
from natgrad_jax.linalg import Diagonal, Factor, eigh, einsum, floored, matmul, transpose


class Basis(NamedTuple):
    """Orthogonal columns: inputs U [S, I, I] and outputs V [S, O, O]; None for the identity."""

    inputs: Array | None
    outputs: Array | None


def standard(inputs: Factor, outputs: Factor) -> Basis:
    """The basis that changes nothing, of the shapes that `eigenbasis` would give for these factors.

    Args:
        inputs: an identity matrix [S, I, I] or its diagonal.
        outputs: an identity matrix [S, O, O] or its diagonal.

    Returns:
        The matrices themselves, and None for a diagonal.
    """
    return Basis(*(None if isinstance(side, Diagonal) else side for side in (inputs, outputs)))


def eigenbasis(inputs: Factor, outputs: Factor) -> tuple[Basis, Array]:
    """The eigenvectors of a Kronecker pair, and its eigenvalues.

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].

    Returns:
        (U, V), and the products of the eigenvalues of A and G [S, I, O].
    """
    (s, u), (r, v) = eigh(inputs), eigh(outputs)
    return Basis(u, v), s[..., :, None] * r[..., None, :]


def rotated(rows: Array, side: Array | None) -> Array:
    """Rows [S, ..., n] in the coordinates of one side [S, n, n] of a basis."""
    if side is None:
        return rows
    return matmul(rows, side.reshape(side.shape[:-2] + (1,) * (rows.ndim - side.ndim) + side.shape[-2:]))


def into(basis: Basis, matrix: Array) -> Array:
    """Coordinates U^T X V of X [S, ..., I, O]."""
    return transpose(rotated(transpose(rotated(matrix, basis.outputs)), basis.inputs))


def out_of(basis: Basis, coordinates: Array) -> Array:
    """The matrix U C V^T with coordinates C [S, ..., I, O]."""
    return into(Basis(*(side if side is None else transpose(side) for side in basis)), coordinates)


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


def mean_squares(side: Array | None, moment: Factor) -> Array:
    """diag(U^T M U) [S, n]: the mean squares of rows with the second moment M, along the columns of a side."""
    if isinstance(moment, Diagonal):
        return moment.entries
    if side is None:
        return jnp.diagonal(moment, axis1=-2, axis2=-1)
    return jnp.sum(side * matmul(moment, side), axis=-2)


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
