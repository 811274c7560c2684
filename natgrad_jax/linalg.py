"""Symmetric algebra on stacks of matrices [..., n, n], and its guards.

Every LAPACK call of the library goes through `_one_at_a_time`. On a CPU, jaxlib spreads a *batched* call over the
thread pool of the program and waits for it there; several such calls inside one `lax.cond` can fill the pool with
waiters and hang for ever. So on a CPU a stack is walked one matrix at a time, also when a user's `vmap` made it;
elsewhere the batched routine runs.

Products are computed at HIGHEST precision: at the default one, accelerators round factors until small eigenvalues
come out negative. A failed factorisation is NaN, never an exception; `keep_finite` then keeps the previous value.
Not differentiable in reverse mode: nothing here is meant to be differentiated through.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.base import Array, Scalar

HIGHEST = lax.Precision.HIGHEST
State = TypeVar("State")


class Diagonal(NamedTuple):
    """A symmetric matrix of which only the diagonal is kept: entries [..., n]."""

    entries: Array


Factor = Array | Diagonal
"""A symmetric matrix [..., n, n], or its diagonal."""

matmul = partial(jnp.matmul, precision=HIGHEST)
einsum = partial(jnp.einsum, precision=HIGHEST)


def transpose(matrix: Array) -> Array:
    """Exchange of the last two axes."""
    return jnp.swapaxes(matrix, -1, -2)


def _one_at_a_time(routine: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Lift a routine of one matrix [n, n] to stacks [..., n, n]; on a CPU it only ever sees single matrices."""

    @jax.custom_batching.custom_vmap
    def single(matrix):
        return routine(matrix)

    @single.def_vmap
    def stack(size, batched, matrices):
        del size, batched
        result = lax.platform_dependent(matrices, cpu=partial(lax.map, single), default=jax.vmap(routine))
        return result, jax.tree.map(lambda _: True, result)

    def lifted(matrix):
        function = single
        for _ in range(matrix.ndim - 2):
            function = jax.vmap(function)
        return function(matrix)

    return lifted


def _inverse(matrix: Array) -> Array:
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    half = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    return matmul(half.T, half)


def _eigh(matrix: Array) -> tuple[Array, Array]:
    vectors, values = lax.linalg.eigh(matrix, symmetrize_input=False)
    return jnp.maximum(values, 0.0), vectors


inverse = _one_at_a_time(_inverse)
"""Inverse of a positive definite stack [..., n, n] by Cholesky; NaN where it is not positive definite."""

_eigh_stack = _one_at_a_time(_eigh)


def eigh(factor: Factor) -> tuple[Array, Array | None]:
    """Eigenvalues and eigenvectors of a positive semidefinite stack.

    Args:
        factor: [..., n, n].

    Returns:
        Eigenvalues [..., n], clipped at zero, ascending, and eigenvectors [..., n, n] as columns; for a diagonal its
        entries, and None for the identity.
    """
    if isinstance(factor, Diagonal):
        return factor.entries, None
    return _eigh_stack(factor)


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


def damped_inverse(factor: Factor, damping: Array) -> Factor:
    """(factor + damping I)^-1.

    Args:
        factor: positive semidefinite [..., n, n].
        damping: strengths [...], in the units of `factor`; floored relative to its Frobenius norm.

    Returns:
        Of the kind of `factor`; NaN where the factorisation fails.
    """
    if isinstance(factor, Diagonal):
        strength = floored(damping, jnp.max(factor.entries, axis=-1))
        return Diagonal(1 / (factor.entries + strength[..., None]))
    strength = floored(damping, jnp.linalg.norm(factor, axis=(-2, -1)))
    identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return inverse(factor + strength[..., None, None] * identity)


def sandwich(left: Factor, matrix: Array, right: Factor) -> Array:
    """Left X right for X [..., I, O]."""
    found = left.entries[..., :, None] * matrix if isinstance(left, Diagonal) else matmul(left, matrix)
    return found * right.entries[..., None, :] if isinstance(right, Diagonal) else matmul(found, right)


def mean_diagonal(factor: Factor) -> Array:
    """Trace over dimension: [..., n, n] -> [...]."""
    if isinstance(factor, Diagonal):
        return jnp.mean(factor.entries, axis=-1)
    return jnp.trace(factor, axis1=-2, axis2=-1) / factor.shape[-1]


def keep_finite(new: State, old: State, axes: int = 0) -> tuple[State, Array]:
    """New values where they are finite, old ones elsewhere, one copy of the stack at a time.

    Leaves that are one and the same object in `new` and `old` are passed on untouched, so that a `lax.cond` around
    this does not copy them.

    Args:
        new: state whose arrays lead with `axes` stack axes.
        old: the state that it replaces, of the same structure.
        axes: number of stack axes.

    Returns:
        The state, and the int32 number of copies in which the old one was kept.
    """
    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    changed = [fresh for fresh, former in pairs if fresh is not former]
    if not changed:
        return old, jnp.zeros((), jnp.int32)
    good = jnp.array(True)
    for leaf in changed:
        good = good & jnp.all(jnp.isfinite(leaf), axis=tuple(range(axes, leaf.ndim)))
    kept = [
        former
        if fresh is former
        else jnp.where(jnp.reshape(good, good.shape + (1,) * (fresh.ndim - axes)), fresh, former)
        for fresh, former in pairs
    ]
    return jax.tree.unflatten(jax.tree.structure(old), kept), jnp.sum(~good, dtype=jnp.int32)
