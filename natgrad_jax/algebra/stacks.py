"""Symmetric algebra on stacks of matrices [..., n, n], and its guards.

Every LAPACK call of the library goes through `_one_at_a_time`. On a CPU, jaxlib spreads a *batched* call over the
thread pool of the program and waits for it there; several such calls inside one `lax.cond` can fill the pool with
waiters and hang for ever. So on a CPU a stack is walked one matrix at a time, also when a user's `vmap` made it;
elsewhere the batched routine runs.

Products are computed at HIGHEST precision: at the default one, accelerators round factors until small eigenvalues
come out negative. A failed factorisation is NaN, never an exception; `lift.guards` then keeps the previous value.
Not differentiable in reverse mode: nothing here is meant to be differentiated through.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra.branches import when
from natgrad_jax.base import Array, Scalar

HIGHEST = lax.Precision.HIGHEST


class Diagonal(NamedTuple):
    """A symmetric matrix of which only the diagonal is kept: entries [..., n]."""

    entries: Array


class Truncated(NamedTuple):
    """A symmetric matrix as a basis of r vectors and a mean for the rest, U diag(s) U^T + m (I - U U^T).

    Attributes:
        vectors: U, orthonormal columns [..., n, r], r < n.
        values: s [..., r].
        rest: m [...], of the n - r directions that U leaves.
    """

    vectors: Array
    values: Array
    rest: Array


Factor = Array | Diagonal | Truncated
"""A symmetric matrix [..., n, n], its diagonal, or a basis of some vectors and a mean for the rest."""

matmul = partial(jnp.matmul, precision=HIGHEST)
einsum = partial(jnp.einsum, precision=HIGHEST)


def transpose(matrix: Array) -> Array:
    """Exchange of the last two axes."""
    return jnp.swapaxes(matrix, -1, -2)


def _one_at_a_time(routine: Callable[..., Any]) -> Callable[..., Any]:
    """Lift a routine of one matrix [n, n] (and more) to stacks [..., n, n]; on a CPU it only sees single matrices."""

    @jax.custom_batching.custom_vmap
    def single(*arrays):
        return routine(*arrays)

    @single.def_vmap
    def stack(size, batched, *arrays):
        arrays = tuple(
            array if there else jnp.broadcast_to(array, (size, *array.shape))
            for array, there in zip(arrays, batched, strict=True)
        )
        result = lax.platform_dependent(
            *arrays, cpu=lambda *arrays: lax.map(lambda each: single(*each), arrays), default=jax.vmap(routine)
        )
        return result, jax.tree.map(lambda _: True, result)

    def lifted(*arrays):
        function = single
        for _ in range(arrays[0].ndim - 2):
            function = jax.vmap(function)
        return function(*arrays)

    return lifted


def _inverse(matrix: Array) -> Array:
    """M^-1 = (L^-1)^T L^-1. By halves it takes 1.7 n^3 flops, mostly in products, not 3.3 n^3."""
    return _gram(_triangular_inverse(_cholesky(matrix)))


def _cholesky(matrix: Array) -> Array:
    return lax.linalg.cholesky(matrix.T, symmetrize_input=False)  # LAPACK has columns first: no array is turned


_SMALL = 512  # below this size one library call beats products of halves


def _halves(size: int) -> int:
    """Where to cut a matrix: near the middle, at a multiple of 64."""
    return (size // 2 + 63) // 64 * 64


def _triangular_inverse(lower: Array) -> Array:
    """L^-1 of a lower triangular L [n, n]."""
    size = lower.shape[-1]
    if size <= _SMALL:
        identity = jnp.eye(size, dtype=lower.dtype).T  # columns first: else XLA turns the identities of others, too
        return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    cut = _halves(size)
    first, last = _triangular_inverse(lower[:cut, :cut]), _triangular_inverse(lower[cut:, cut:])
    below = -matmul(last, matmul(lower[cut:, :cut], first))
    return jnp.block([[first, jnp.zeros((cut, size - cut), lower.dtype)], [below, last]])


def _gram(lower: Array) -> Array:
    """X^T X of a lower triangular X [n, n]."""
    size = lower.shape[-1]
    if size <= _SMALL:
        return matmul(lower.T, lower)
    cut = _halves(size)
    first, below, last = lower[:cut, :cut], lower[cut:, :cut], lower[cut:, cut:]
    corner = matmul(below.T, last)
    return jnp.block([[_gram(first) + matmul(below.T, below), corner], [corner.T, _gram(last)]])


def inverse_flops(size: int) -> float:
    """What the inverse of a positive definite matrix [n, n] takes."""
    return size**3 / 3 + _triangular_flops(size) + _gram_flops(size)


def _triangular_flops(size: int) -> float:
    if size <= _SMALL:
        return float(size**3)
    first, last = _halves(size), size - _halves(size)
    return _triangular_flops(first) + _triangular_flops(last) + 2 * first * last * size


def _gram_flops(size: int) -> float:
    if size <= _SMALL:
        return 2.0 * size**3
    first, last = _halves(size), size - _halves(size)
    return _gram_flops(first) + _gram_flops(last) + 2 * first * last * size


def _eigh(matrix: Array) -> tuple[Array, Array]:
    vectors, values = lax.linalg.eigh(matrix.T, symmetrize_input=False)
    return jnp.maximum(values, 0.0), vectors


def _orthonormal(matrix: Array) -> Array:
    return lax.linalg.qr(matrix, full_matrices=False)[0]


_inverse_by_cholesky = _one_at_a_time(_inverse)

cholesky = _one_at_a_time(_cholesky)
"""The lower triangular L of M = L L^T for a positive definite stack [..., n, n]; NaN where it is not."""


def _solve(lower: Array, vector: Array) -> Array:
    half = lax.linalg.triangular_solve(lower, vector[:, None], left_side=True, lower=True)
    return lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)[:, 0]


cholesky_solve = _one_at_a_time(_solve)
"""(L L^T)^-1 v from L [..., n, n] and v [..., n]. For one vector as cheap as a product with the inverse, and stable."""
triangular_inverse = _one_at_a_time(_triangular_inverse)
"""L^-1 of a stack of lower triangular L [..., n, n]; what stands above their diagonals is not read."""


def inverse(matrix: Array) -> Array:
    """Inverse of a positive definite stack.

    By Cholesky; of many small matrices by sweeps over all of them at once, which call no library and on a CPU take a
    quarter of the time of the batched one (100,000 of 9 x 9).

    Args:
        matrix: [..., n, n].

    Returns:
        [..., n, n]; NaN where it is not positive definite.
    """
    size = matrix.shape[-1]
    if size <= _TINY and matrix.size >= _MANY * size**2:
        return _swept(matrix)
    return _inverse_by_cholesky(matrix)


_TINY, _MANY = 16, 64  # from this many matrices of at most this size, sweeps are faster than the library


def _swept(matrices: Array) -> Array:
    """Gauss-Jordan without pivots, which positive definite matrices do not need; the stack comes last, as vectors."""
    size = matrices.shape[-1]

    def sweep(k, stack):
        here = jnp.arange(size) == k
        pivot = jnp.where(stack[k, k] > 0, stack[k, k], jnp.nan)
        row = jnp.where(here[:, None], 1, stack[k]) / pivot
        column = jnp.where(here[:, None], -1, stack[:, k])
        rest = jnp.where(here[:, None, None] | here[None, :, None], 0, stack)
        return rest - column[:, None] * row[None]

    stack = jnp.moveaxis(matrices.reshape(-1, size, size), 0, -1)
    return jnp.moveaxis(lax.fori_loop(0, size, sweep, stack), -1, 0).reshape(matrices.shape)


orthonormal = _one_at_a_time(_orthonormal)
"""The factor Q of a QR decomposition of a stack [..., n, n]: orthogonal, whatever the rank."""

_triangular_factor = _one_at_a_time(lambda matrix: lax.linalg.qr(matrix, full_matrices=False)[1])
_eigh_stack = _one_at_a_time(_eigh)


def eigh(factor: Factor) -> tuple[Array, Array | None]:
    """Eigenvalues and eigenvectors of a positive semidefinite stack.

    Args:
        factor: [..., n, n].

    Returns:
        Eigenvalues [..., n], clipped at zero, ascending, and eigenvectors [..., n, n] as columns; for a diagonal its
        entries, and None for the identity; of a truncated one its values and the mean of the rest behind them
        [..., r + 1], and its vectors [..., n, r].
    """
    if isinstance(factor, Diagonal):
        return factor.entries, None
    if isinstance(factor, Truncated):
        return jnp.concatenate([factor.values, factor.rest[..., None]], axis=-1), factor.vectors
    return _eigh_stack(factor)


def cholesky_or_eigh(matrix: Array, damping: Array) -> tuple[Array, Array]:
    """A triangular L with L L^T = M + x I of a positive semidefinite M that rounding may have made indefinite.

    Args:
        matrix: M [..., n, n].
        damping: x [...], positive.

    Returns:
        L of Cholesky, or of the eigenvalues, those below zero as zero, where that has failed; and where it has [...].
    """
    found = cholesky(plus_identity(matrix, damping))
    failed = ~jnp.isfinite(jnp.sum(jnp.diagonal(found, axis1=-2, axis2=-1), axis=-1))

    def by_eigenvalues(found):
        usable = jnp.where(failed[..., None, None], matrix, jnp.eye(matrix.shape[-1], dtype=matrix.dtype))
        values, vectors = _eigh_stack(usable)
        root = jnp.swapaxes(vectors * jnp.sqrt(values + damping[..., None])[..., None, :], -1, -2)
        upper = _triangular_factor(root)  # root^T root = upper^T upper
        signs = jnp.where(jnp.diagonal(upper, axis1=-2, axis2=-1) < 0, -1, 1).astype(matrix.dtype)
        return jnp.where(failed[..., None, None], jnp.swapaxes(upper, -1, -2) * signs[..., None, :], found)

    return when(jnp.any(failed), by_eigenvalues, found), failed


def floored(damping: Scalar, size: Array) -> Array:
    """The damping, but never below what the precision can tell from zero.

    In float32 a damping below about 1e-6 of the largest eigenvalue drowns in rounding: the inverse is noise, and
    soon NaN. The floor is 8 eps, which is 1e-6 in float32.

    Args:
        damping: strength, broadcast against `size`.
        size: the largest eigenvalue of what is damped, or a bound of it.

    Returns:
        max(damping, 8 eps size).
    """
    return jnp.maximum(damping, 8 * jnp.finfo(size.dtype).eps * size)


def frobenius(matrix: Array) -> Array:
    """The Frobenius norm of a stack [..., n, n] -> [...], also of entries whose squares overflow or vanish."""
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), initial=0)
    usable = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return usable * jnp.linalg.norm(matrix / usable[..., None, None], axis=(-2, -1))


def plus_identity(matrix: Array, strength: Array) -> Array:
    """M + x I of a stack [..., n, n], x [...] or one for all []."""
    strength = jnp.broadcast_to(strength, matrix.shape[:-2])[..., None, None]
    return jnp.where(jnp.eye(matrix.shape[-1], dtype=bool), matrix + strength, matrix)


def damped_inverse(factor: Factor, damping: Array) -> Factor:
    """(factor + damping I)^-1.

    Args:
        factor: positive semidefinite [..., n, n].
        damping: strengths [...], or one for all [], in the units of `factor`; floored relative to its Frobenius norm.

    Returns:
        Of the kind of `factor`; NaN where the factorisation fails.
    """
    if isinstance(factor, Diagonal):
        strength = floored(damping, jnp.max(factor.entries, axis=-1))
        return Diagonal(1 / (factor.entries + strength[..., None]))
    if isinstance(factor, Truncated):
        strength = floored(damping, jnp.maximum(jnp.max(factor.values, axis=-1), factor.rest))
        return Truncated(factor.vectors, 1 / (factor.values + strength[..., None]), 1 / (factor.rest + strength))
    return inverse(plus_identity(factor, floored(damping, frobenius(factor))))


def times(factor: Factor, matrix: Array) -> Array:
    """The product of a symmetric factor [..., n, n] with a matrix [..., n, m]."""
    if isinstance(factor, Diagonal):
        return factor.entries[..., :, None] * matrix
    if isinstance(factor, Truncated):
        above = (factor.values - factor.rest[..., None])[..., None]
        seen = matmul(transpose(factor.vectors), matrix)
        return factor.rest[..., None, None] * matrix + matmul(factor.vectors, above * seen)
    return matmul(factor, matrix)


def sandwich(left: Factor, matrix: Array, right: Factor) -> Array:
    """Left X right for X [..., I, O]."""
    found = times(left, matrix)
    return matmul(found, right) if isinstance(right, jax.Array) else transpose(times(right, transpose(found)))


def scaled(factor: Any, strength: Array) -> Any:
    """A factor times a number for each matrix [...]; the vectors of a truncated one stay."""
    if isinstance(factor, Truncated):
        return Truncated(factor.vectors, factor.values * strength[..., None], factor.rest * strength)
    return jax.tree.map(lambda leaf: leaf * per_stack(strength, leaf), factor)


def size_of(factor: Factor) -> int:
    """The size n of [..., n, n]."""
    first = jax.tree.leaves(factor)[0]
    return first.shape[-1] if isinstance(factor, Diagonal) else first.shape[-2]


def diagonal(factor: Factor) -> Array:
    """The diagonal [..., n]."""
    if isinstance(factor, Diagonal):
        return factor.entries
    if isinstance(factor, Truncated):
        above = (factor.values - factor.rest[..., None])[..., None, :]
        return factor.rest[..., None] + jnp.sum(factor.vectors**2 * above, axis=-1)
    return jnp.diagonal(factor, axis1=-2, axis2=-1)


def trace(factor: Factor) -> Array:
    """Sum of the diagonal: [..., n, n] -> [...]."""
    if isinstance(factor, Truncated):
        size, rank = factor.vectors.shape[-2:]
        return jnp.sum(factor.values, axis=-1) + (size - rank) * factor.rest
    if isinstance(factor, Diagonal):
        return jnp.sum(factor.entries, axis=-1)
    # Half the compilation of a sum of the diagonal. A zero of its own, or XLA turns that of LAPACK, columns first.
    here = jnp.eye(factor.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(here, factor, -0.0), axis=(-2, -1))


def all_finite(array: Array, axes: tuple[int, ...]) -> Array:
    """Whether an array is finite throughout some of its axes; booleans over the others.

    What is not finite differs from itself by NaN, and one NaN makes a sum NaN. On a CPU such a sum is one call of a
    library: 2 ms to compile for a matrix of 1,000 columns, where the same of booleans takes 100 ms.
    """
    return jnp.isfinite(jnp.sum(array - array, axis=axes))


def mean_diagonal(factor: Factor) -> Array:
    """Trace over dimension: [..., n, n] -> [...]."""
    return trace(factor) / size_of(factor)


def identity(stack: tuple[int, ...], size: int, dtype: str, full: bool = True) -> Factor:
    """An identity matrix for each entry of a stack, in a buffer of its own.

    Args:
        stack: S.
        size: n.
        dtype: of the entries.
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [S, n, n], or a `Diagonal` [S, n].
    """
    if not full:
        return Diagonal(jnp.ones((*stack, size), dtype))
    return plus_identity(jnp.zeros((*stack, size, size), dtype), jnp.ones((), dtype))


def per_stack(values: Array, leaf: Array) -> Array:
    """Values [S], with trailing axes of one entry so that they go with a leaf [S, ...]."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))
