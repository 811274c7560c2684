"""The inverse of a large matrix in parts of equal work, for refreshes that are too long for one step.

It is made in place by block sweeps (Gauss and Jordan), one for each block K of columns of M [S, n, n]:

    1  P <- M_KK^-1,  R <- P M_K*                                                 M_KK = L L^T, of the size of a block
    2  M <- M - M_*K R outside of K,  M_K* <- R,  M_*K <- -M_*K P,  M_KK <- P

The products with P are of two halves, L^-1 M_K* and M_*K L^-T: with P itself its condition would come in, by which the
rest of a matrix of low rank loses its sign. When every block has been swept, M holds its inverse. A positive definite M
needs no pivots. All sweeps together take 2 n^3 flops, nearly all in products; the way by Cholesky takes 1.7 n^3 at
once.
"""

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra.branches import when
from natgrad_jax.algebra.stacks import (
    Factor,
    cholesky,
    damped_inverse,
    floored,
    frobenius,
    matmul,
    plus_identity,
    transpose,
    triangular_inverse,
)
from natgrad_jax.base import Array


def width(size: int, parts: int) -> int:
    """Columns of a block: those of n in at most so many parts."""
    return -(-size // parts)


def padded(size: int, parts: int) -> int:
    """The first multiple of a block from n on."""
    return -(-size // width(size, parts)) * width(size, parts)


def begin(factor: Factor, damping: Array, parts: int) -> Factor:
    """What the sweeps for (factor + damping I)^-1 start from.

    Args:
        factor: positive semidefinite [S, n, n].
        damping: [S], floored as in `damped_inverse`.
        parts: steps that share the work.

    Returns:
        The damped matrix, with an identity behind it that fills the last block [S, m, m]; of a factor in another form,
        which is no work, its inverse.
    """
    if not isinstance(factor, jax.Array):
        return damped_inverse(factor, damping)
    size, whole = factor.shape[-1], padded(factor.shape[-1], parts)
    damped = plus_identity(factor, floored(damping, frobenius(factor)))
    damped = jnp.pad(damped, [(0, 0)] * (factor.ndim - 2) + [(0, whole - size)] * 2)
    behind = jnp.arange(whole) >= size
    return jnp.where(behind[:, None] & jnp.eye(whole, dtype=bool), 1, damped)


def sweep(work: Factor, size: int, part: Array, parts: int) -> Factor:
    """The next sweep, if there is one left.

    Args:
        work: from `begin`, after the sweeps of the parts before.
        size: n.
        part: which, int32 [].
        parts: steps that share the work.

    Returns:
        The work after it; NaN where the matrix is not positive definite.
    """
    if not isinstance(work, jax.Array):
        return work
    block, places = width(size, parts), jnp.arange(work.shape[-1])

    def swept(work: Array) -> Array:
        start = part * block
        here = (places >= start) & (places < start + block)
        identity = (places == start + jnp.arange(block)[:, None]).astype(work.dtype)
        rows = lax.dynamic_slice_in_dim(work, start, block, axis=-2)
        columns = lax.dynamic_slice_in_dim(work, start, block, axis=-1)
        half = triangular_inverse(cholesky(lax.dynamic_slice_in_dim(rows, start, block, axis=-1)))
        rows = matmul(half, jnp.where(here, identity, rows))  # 1
        columns = matmul(jnp.where(here[:, None], -identity.T, columns), transpose(half))
        return jnp.where(here[:, None] | here, 0, work) - matmul(columns, rows)  # 2

    return when(part * block < size, swept, work)


def end(work: Factor, size: int) -> Factor:
    """The inverse [S, n, n], after the last sweep."""
    if not isinstance(work, jax.Array):
        return work
    found = work[..., :size, :size]
    return (found + transpose(found)) / 2
