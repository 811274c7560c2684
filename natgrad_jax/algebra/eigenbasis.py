"""A pair of orthogonal bases for the two sides of a weight matrix, and what is measured in it.

Coordinates of a matrix X [S, I, O] in the basis (U, V) are U^T X V. A side that is `None` keeps its own coordinates.
One with fewer columns than rows has a rest: what is measured has one entry more there, the mean of all that is left.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra import truncated
from natgrad_jax.algebra.stacks import (
    Diagonal,
    Factor,
    Truncated,
    diagonal,
    eigh,
    matmul,
    orthonormal,
    times,
    trace,
)
from natgrad_jax.algebra.truncated import along, has_rest
from natgrad_jax.base import Array


class Basis(NamedTuple):
    """Orthogonal columns: inputs U [S, I, I] and outputs V [S, O, O], or fewer of them; None for the identity."""

    inputs: Array | None
    outputs: Array | None


def standard(inputs: Factor, outputs: Factor) -> Basis:
    """The basis that changes nothing, of the shapes that `eigenbasis` would give for these factors.

    Args:
        inputs: an identity matrix [S, I, I], its diagonal, or a truncated one.
        outputs: an identity matrix [S, O, O], its diagonal, or a truncated one.

    Returns:
        The matrices themselves, the vectors of truncated ones, and None for a diagonal.
    """
    return Basis(columns(inputs), columns(outputs))


def columns(factor: Factor) -> Array | None:
    """The columns that an identity stands for: itself, the vectors of a truncated one, None for a diagonal."""
    if isinstance(factor, Diagonal):
        return None
    return factor.vectors if isinstance(factor, Truncated) else factor


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


def warm_eigenbasis(basis: Basis, scale: Array, inputs: Factor, outputs: Factor) -> tuple[Basis, Array]:
    """One step of orthogonal iteration from an old basis towards the eigenvectors of a Kronecker pair.

    Of each side: the columns U in the order of their Rayleigh quotients diag(U^T M U), the largest first, then the
    orthogonal factor of M U, each column with the sign of the one that it comes from. Repeated with a fixed M it
    converges to the eigenvectors, fast where the eigenvalues are far apart. On two CPU cores it takes two thirds of the
    time of an eigendecomposition (256 to 2048 columns, float32). As in SOAP (Vyas et al. 2024,
    https://arxiv.org/abs/2409.11321).

    Args:
        basis: U and V; a side that is None stays so.
        scale: what was measured in the basis [S, I, O].
        inputs: A [S, I, I].
        outputs: G [S, O, O].

    Returns:
        The new basis, and the scale with its entries in the order of the new columns.
    """
    u, scale = moved(basis.inputs, inputs, scale, -2)
    v, scale = moved(basis.outputs, outputs, scale, -1)
    return Basis(u, v), scale


def moved(side: Array | None, moment: Factor, scale: Array, axis: int) -> tuple[Array | None, Array]:
    """One step of orthogonal iteration of one side, and what was measured in it; see `warm_eigenbasis`.

    The vectors of a truncated moment have made their step. They may have turned far since, so that the scale is carried
    over as the diagonal of a matrix is.

    Args:
        side: the old columns [S, n, n] or [S, n, r]; None stays so.
        moment: M [S, n, n].
        scale: [S, ...], one entry for each coordinate.
        axis: that of this side, negative.

    Returns:
        The new columns, and the scale in their order.
    """
    if isinstance(moment, Truncated):
        assert side is not None, "of the same form"
        return moment.vectors, along(scale, truncated.turn(side, moment.vectors), axis)
    side, order = iterated(side, moment)
    if order is not None:
        order = jnp.moveaxis(
            order.reshape(order.shape[:-1] + (1,) * (scale.ndim - order.ndim) + order.shape[-1:]), -1, axis
        )
        scale = jnp.take_along_axis(scale, order, axis=axis)
    return side, scale


def iterated(side: Array | None, moment: Factor) -> tuple[Array | None, Array | None]:
    """One step of orthogonal iteration of one side; see `warm_eigenbasis`.

    Args:
        side: the old columns [S, n, n]; None stays so.
        moment: M [S, n, n].

    Returns:
        The new columns, and the places of the old ones that they come from [S, n].
    """
    if side is None or not isinstance(moment, jax.Array):
        return side, None
    product = matmul(moment, side)
    order = jnp.argsort(-jnp.sum(side * product, axis=-2), axis=-1)
    side, product = (jnp.take_along_axis(matrix, order[..., None, :], axis=-1) for matrix in (side, product))
    found = orthonormal(product)
    agreement = jnp.sum(found * side, axis=-2, keepdims=True)
    return jnp.where(agreement < 0, -found, found), order


def rotated(rows: Any, side: Array | None) -> Any:
    """Rows [S, ..., n] in the coordinates of one side [S, n, n] of a basis."""
    if side is None:
        return rows
    return matmul(rows, side.reshape(side.shape[:-2] + (1,) * (rows.ndim - side.ndim) + side.shape[-2:]))


def turned(side: Array | None, moment: Factor) -> Array:
    """How far columns are from eigenvectors: |M U - U diag(U^T M U)| / |M U|, in Frobenius norms.

    Of whole bases that is the root of the share that the entries off the diagonal of U^T M U have in its square. It
    takes one product; an eigendecomposition takes some twenty.

    Args:
        side: U [S, n, r]; None for the own coordinates, which have not turned.
        moment: M [S, n, n].

    Returns:
        From 0 to 1, [S].
    """
    if side is None:
        return jnp.zeros(diagonal(moment).shape[:-1])
    product = times(moment, side)
    along_them = jnp.sum(side * product, axis=-2, keepdims=True)
    whole, left = jnp.sum(product**2, axis=(-2, -1)), jnp.sum((product - side * along_them) ** 2, axis=(-2, -1))
    return jnp.where(whole > 0, jnp.sqrt(left / jnp.where(whole > 0, whole, 1)), 0)


def mean_squares(side: Array | None, moment: Factor) -> Array:
    """diag(U^T M U) [S, n]: the mean squares of rows with the second moment M, along the columns of a side.

    Args:
        side: columns [S, n, n], or [S, n, r] with a rest; None for the own coordinates.
        moment: M [S, n, n].

    Returns:
        [S, n], or [S, r + 1] with the mean of the rest behind.
    """
    if isinstance(moment, Diagonal) or side is None:
        return diagonal(moment)
    found = jnp.sum(side * times(moment, side), axis=-2)
    if not has_rest(side):
        return found
    rest = (trace(moment) - jnp.sum(found, axis=-1)) / (side.shape[-2] - side.shape[-1])
    return jnp.concatenate([found, jnp.maximum(rest, 0)[..., None]], axis=-1)
