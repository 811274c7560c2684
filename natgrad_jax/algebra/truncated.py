"""A basis of r vectors and a mean for the rest: what a wide side keeps in the place of a matrix or its eigenvectors.

A symmetric M [S, n, n] is seen as U diag(s) U^T + m (I - U U^T), with r orthonormal columns U near its leading
eigenvectors, s what M has along them, and m the mean of what it has elsewhere, so that the trace is that of M. With
the eigenvectors themselves the error is that of the eigenvalues left out from their mean, hence at most the dropped
tail; with r = n - 1 there is none.

A moving average is kept in this form, too, and no n x n array is ever needed of it. With one more moment B, known by
its products alone,

    1  M <- decay (the old average) + (1 - decay) B          products with it
    2  Q <- orthonormal columns of M U                       one step of block iteration, from the old vectors
    3  s, W <- eigenvalues and eigenvectors of Q^T M Q       r x r
    4  U <- Q W,  m <- (tr M - sum s) / (n - r)

Coordinates of a tensor in such bases are r for each mode, and one "rest" for all that the mode has besides: a weight
or a second moment of the rest is one number, the last of r + 1.

Halko, Martinsson and Tropp (2011), https://arxiv.org/abs/0909.4061, of a matrix that moves; for K-FAC's factors Puiu
(2022), https://arxiv.org/abs/2206.15397, which draws its vectors afresh and drops the rest.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra import stacks
from natgrad_jax.algebra.stacks import (
    Diagonal,
    Factor,
    Truncated,
    eigh,
    floored,
    matmul,
    orthonormal,
    scaled,
    times,
    trace,
    transpose,
)
from natgrad_jax.base import WIDEST, Array, Scalar

Rank = int | float
_LEAST, _SHARE = 32, 1 / 8


class Kept(NamedTuple):
    """What a side keeps of its factor, by its size.

    Attributes:
        most: a side wider than this keeps the diagonal; None for `WIDEST`.
        rank: vectors of the others: a number, a share of the size, "auto" for an eighth of it, 32 at least, or None
            for the whole factor.
    """

    most: int | None = None
    rank: Rank | str | None = None

    def diagonal(self, size: int) -> bool:
        """Whether a side of a size keeps the diagonal alone."""
        return size > (WIDEST if self.most is None else self.most)

    def vectors(self, size: int) -> int | None:
        """How many vectors a side of a size keeps; None for the whole factor."""
        if self.rank is None:
            return None
        if isinstance(self.rank, str):
            rank = max(_LEAST, round(_SHARE * size))
        else:
            rank = max(1, round(self.rank * size)) if self.rank < 1 else int(self.rank)
        return rank if rank < size else None


class Moment(NamedTuple):
    """A positive semidefinite matrix that is known by its products with [S, n, m], and its trace [S]."""

    times: Callable[[Array], Array]
    trace: Array

    def over(self, count: Scalar) -> "Moment":
        """The moment divided by a number."""
        return Moment(lambda matrix: self.times(matrix) / count, self.trace / count)


def of_rows(rows: Array, weights: Array | None = None) -> Moment:
    """The sum over rows [S, R, n] of the outer product of a row with itself, weighted by [..., R]."""
    weighted = rows if weights is None else rows * weights[..., None]
    return Moment(
        lambda matrix: matmul(transpose(weighted), matmul(rows, matrix)), jnp.sum(weighted * rows, axis=(-2, -1))
    )


def by_products(rows: int, size: int, rank: int | None) -> bool:
    """Whether the two products of an update take fewer flops from so many rows [rows, size] than from their moment."""
    return rank is not None and 4 * rank * rows < size * (rows + 2 * rank)


def identity(stack: tuple[int, ...], size: int, dtype: str, kept: Kept) -> Factor:
    """An identity matrix for each entry of a stack in the form that its side keeps, in a buffer of its own.

    Args:
        stack: S.
        size: n.
        dtype: of the entries.
        kept: what a side keeps.

    Returns:
        [S, n, n]; a `Diagonal` [S, n], or `Truncated`.
    """
    if kept.diagonal(size) or (rank := kept.vectors(size)) is None:
        return stacks.identity(stack, size, dtype, full=not kept.diagonal(size))
    return start(stack, size, rank, dtype)


def form(factor: Factor) -> tuple[bool, int | None]:
    """In what form a moment is wanted for an average: whether more than a diagonal, and for how many vectors."""
    if isinstance(factor, Truncated):
        return True, factor.vectors.shape[-1]
    return not isinstance(factor, Diagonal), None


def start(stack: tuple[int, ...], size: int, rank: int, dtype: str) -> Truncated:
    """Vectors to begin with, one of 1 along them and besides: the identity.

    The vectors are drawn, always the same: axes would stay axes where rows are zero there.

    Args:
        stack: S.
        size: n.
        rank: r.
        dtype: of the entries.

    Returns:
        [S, n, n], truncated.
    """
    drawn = jax.random.normal(jax.random.key(0), (size, rank), dtype) / size**0.5
    ones = jnp.ones(stack, dtype)
    return Truncated(jnp.broadcast_to(drawn, (*stack, size, rank)) * 1, jnp.ones((*stack, rank), dtype), ones)


def combined(old: Truncated, new: Factor | Moment, weights: tuple[Scalar, Scalar]) -> Truncated:
    """A weighted sum of an old average and one more moment.

    Args:
        old: the average so far.
        new: B [S, n, n], or its products.
        weights: of both, at least 0.

    Returns:
        The sum, truncated to as many vectors as the old one has.
    """
    moment = new if isinstance(new, Moment) else Moment(lambda matrix: times(new, matrix), trace(new))
    size, rank = old.vectors.shape[-2:]
    before, after = weights

    def product(matrix):  # 1
        return before * times(old, matrix) + after * moment.times(matrix)

    basis = orthonormal(product(old.vectors))  # 2
    inner = matmul(transpose(basis), product(basis))
    values, turned = eigh((inner + transpose(inner)) / 2)  # 3
    assert turned is not None, "of a matrix"
    left = before * trace(old) + after * moment.trace - jnp.sum(values, axis=-1)
    rest = jnp.maximum(left, 0) / (size - rank)
    dtype = old.values.dtype
    return Truncated(*(leaf.astype(dtype) for leaf in (matmul(basis, turned), values, rest)))  # 4


def emptied(factor: Truncated) -> Truncated:
    """The matrix of zeros, with the same vectors."""
    return scaled(factor, jnp.zeros_like(factor.rest))


def has_rest(side: Array | None) -> bool:
    """Whether the columns [S, n, r] of a side leave a rest."""
    return side is not None and side.shape[-1] < side.shape[-2]


def counts(side: Array | None, size: int) -> tuple[int, int]:
    """How many coordinates a side of some size has in a basis: single ones, and those that are one rest."""
    return (size, 0) if side is None else (side.shape[-1], size - side.shape[-1])


def coordinates(side: Array | None, size: int) -> int:
    """The number of entries that a weight or a second moment has along a side."""
    single, rest = counts(side, size)
    return single + (rest > 0)


def sums(scale: Array, sides: Sequence[Array | None], sizes: Sequence[int], axes: Sequence[int]) -> Array:
    """The sum of a scale [..., n_1, ..., n_k] along some modes, the rest of each counted as often as it is there.

    Args:
        scale: one entry for each coordinate of `coordinates`.
        sides: of all modes.
        sizes: of all modes.
        axes: the modes to sum over, from 0.

    Returns:
        The sum, with these axes kept at one entry.
    """
    for axis in axes:
        single, rest = counts(sides[axis], sizes[axis])
        place = axis - len(sizes)
        often = jnp.array([1] * single + [rest] * (rest > 0), scale.dtype)
        often = often.reshape((1,) * (scale.ndim + place) + (-1,) + (1,) * (-1 - place))
        scale = jnp.sum(scale * often, axis=place, keepdims=True)
    return scale


def filtered(tensor: Array, sides: Sequence[Array | None], weights: Array) -> Array:
    """A tensor with each of its coordinates multiplied by a weight.

    Args:
        tensor: [S, n_1, ..., n_k].
        sides: of each mode the columns [S, n_i, r_i], or None for its own coordinates.
        weights: one for each of `coordinates`, [S, r_1 or r_1 + 1, ...].

    Returns:
        [S, n_1, ..., n_k].
    """
    return _by_parts(tensor, sides, weights, 0)


def _by_parts(tensor: Array, sides: Sequence[Array | None], weights: Array, mode: int) -> Array:
    """The modes from one on: what lies along the columns of the mode, and the rest."""
    if mode == len(sides):
        return tensor * weights
    side, axis = sides[mode], mode - len(sides)
    if side is None:
        return _by_parts(tensor, sides, weights, mode + 1)
    seen, single = along(tensor, side, axis), side.shape[-1]
    of_single = lax.slice_in_dim(weights, 0, single, axis=axis)
    found = along(_by_parts(seen, sides, of_single, mode + 1), transpose(side), axis)
    if not has_rest(side):
        return found
    of_rest = lax.slice_in_dim(weights, single, single + 1, axis=axis)
    rest = tensor - along(seen, transpose(side), axis)
    return found + _by_parts(rest, sides, of_rest, mode + 1)


def squares(tensor: Array, sides: Sequence[Array | None]) -> Array:
    """The squared coordinates of a tensor; of the rest of a mode their mean.

    Args:
        tensor: [..., n_1, ..., n_k].
        sides: of each mode the columns [S, n_i, r_i], or None for its own coordinates.

    Returns:
        [..., r_1 or r_1 + 1, ...].
    """
    return _squares(tensor, sides, 0)


def _squares(tensor: Array, sides: Sequence[Array | None], mode: int) -> Array:
    if mode == len(sides):
        return tensor**2
    side, axis = sides[mode], mode - len(sides)
    if side is None:
        return _squares(tensor, sides, mode + 1)
    seen = along(tensor, side, axis)
    found = _squares(seen, sides, mode + 1)
    if not has_rest(side):
        return found
    rest = _squares(tensor - along(seen, transpose(side), axis), sides, mode + 1)
    size, rank = side.shape[-2:]
    return jnp.concatenate([found, jnp.sum(rest, axis=axis, keepdims=True) / (size - rank)], axis=axis)


def along(tensor: Array, side: Array, axis: int) -> Array:
    """A tensor [..., n_1, ..., n_k] times a matrix [S, n_i, m] in the mode of a negative axis."""
    moved = jnp.moveaxis(tensor, axis, -1)
    if moved.ndim == side.ndim - 1:  # a vector
        return matmul(moved[..., None, :], side)[..., 0, :]
    lead = side.shape[:-2] + (1,) * (moved.ndim - side.ndim)
    return jnp.moveaxis(matmul(moved, side.reshape(lead + side.shape[-2:])), -1, axis)


def product_along(tensor: Array, factor: Truncated, axis: int) -> Array:
    """A tensor [S, ..., n_1, ..., n_k] times a truncated matrix in the mode of a negative axis."""

    def there(values):  # [S, r] -> [S, 1, ..., r, ..., 1]
        lead = values.shape[:-1] + (1,) * (tensor.ndim - values.ndim)
        return jnp.moveaxis(values.reshape(lead + values.shape[-1:]), -1, axis)

    above = along(tensor, factor.vectors, axis) * there(factor.values - factor.rest[..., None])
    return there(factor.rest[..., None]) * tensor + along(above, transpose(factor.vectors), axis)


def turn(old: Array, new: Array) -> Array:
    """What carries second moments from one basis to another, as the diagonal of a matrix is.

    Args:
        old: columns [S, n, r].
        new: columns [S, n, r].

    Returns:
        [S, r or r + 1, r or r + 1]: the squared entries of the rotation, with rows and columns that keep the sums where
        there is a rest. A scale s of the old basis is `s @ turn` in the new one.
    """
    shared = matmul(transpose(old), new) ** 2
    if not has_rest(old):
        return shared
    size, rank = old.shape[-2:]
    into = jnp.maximum(1 - jnp.sum(shared, axis=-2), 0)  # of a new column, what the old rest has
    out = jnp.maximum(1 - jnp.sum(shared, axis=-1), 0)  # of an old column, what the new rest has
    corner = 1 - jnp.sum(out, axis=-1) / (size - rank)
    right = jnp.concatenate([out / (size - rank), jnp.maximum(corner, 0)[..., None]], axis=-1)
    return jnp.concatenate([jnp.concatenate([shared, into[..., None, :]], axis=-2), right[..., None]], axis=-1)


def damped_solve(sides: Sequence[Array | None], scale: Array, tensor: Array, damping: Scalar) -> Array:
    """(Q diag(scale) Q^T + damping I)^-1 applied to a tensor, Q the Kronecker product of the bases of its modes.

    Args:
        sides: of each mode.
        scale: second moments, one for each of `coordinates`, not negative.
        tensor: [S, n_1, ..., n_k].
        damping: strength in the units of `scale`, [] or [S], floored relative to its largest entry.

    Returns:
        [S, n_1, ..., n_k].
    """
    axes = tuple(range(-len(sides), 0))
    strength = floored(jnp.asarray(damping, scale.dtype), jnp.max(scale, axis=axes))
    return filtered(tensor, sides, 1 / (scale + jnp.expand_dims(strength, axes)))
