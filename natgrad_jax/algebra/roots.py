"""Inverse roots of damped positive semidefinite matrices: (M + damping I)^-exponent, on stacks.

By eigendecomposition, of any exponent; or, for 1 / p, by the coupled Newton iteration of Guo and Higham (2006), which
is matrix products alone and so runs well where eigendecompositions do not:

    1  a <- M + damping I,  z <- (1 + p) / (2 |a|),  m <- z a,  x <- z^(1/p) I
    2  t <- (1 + 1/p) I - m / p,  x <- x t,  m <- t^p m               until m is the identity, up to rounding
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra.stacks import (
    Diagonal,
    Factor,
    Truncated,
    eigh,
    floored,
    frobenius,
    matmul,
    plus_identity,
    transpose,
)
from natgrad_jax.base import Array, Scalar

Root = Literal["eigh", "newton"]
ROOTS = get_args(Root)
_ITERATIONS, _GROWTH, _FAR = 100, 1.2, 0.1


def inverse_root(factor: Factor, damping: Scalar, exponent: float, root: Root = "eigh") -> Factor:
    """(factor + damping I)^-exponent.

    Args:
        factor: positive semidefinite [S, n, n].
        damping: strength [] or [S], in the units of the factor; floored relative to its largest eigenvalue, or, for
            "newton", to its Frobenius norm.
        exponent: positive; 1 / p with a whole p if the root is found by "newton".
        root: "eigh" or "newton".

    Returns:
        Of the kind of `factor`. NaN where "newton" does not converge.
    """
    damping = jnp.asarray(damping, jax.tree.leaves(factor)[0].dtype)
    if isinstance(factor, Diagonal):
        strength = floored(damping, jnp.max(factor.entries, axis=-1, initial=0))
        return Diagonal((factor.entries + strength[..., None]) ** -exponent)
    if isinstance(factor, Truncated):
        values, rest = factor.values, factor.rest
        strength = floored(damping, jnp.maximum(jnp.max(values, axis=-1), rest))
        roots = (values + strength[..., None]) ** -exponent, (rest + strength) ** -exponent
        return Truncated(factor.vectors, *roots)
    if root == "newton":
        strength = floored(damping, frobenius(factor))
        return _newton(plus_identity(factor, strength), whole(exponent))
    values, vectors = eigh(factor)
    strength = floored(damping, jnp.max(values, axis=-1))
    assert vectors is not None, "of a matrix"
    return matmul(vectors * (values + strength[..., None])[..., None, :] ** -exponent, transpose(vectors))


def whole(exponent: float) -> int:
    """The p of an exponent 1 / p.

    Args:
        exponent: positive.

    Returns:
        p.

    Raises:
        ValueError: if p is not whole.
    """
    power = round(1 / exponent)
    if abs(power * exponent - 1) > 1e-6:
        raise ValueError(
            f'`exponent` is {exponent}, but `root="newton"` finds roots of a whole order: 1, 1/2, 1/3, ...'
        )
    return power


def _newton(matrix: Array, power: int) -> Array:
    """The coupled iteration on a stack; each matrix stops by itself."""
    function = partial(_newton_one, power=power)
    for _ in range(matrix.ndim - 2):
        function = jax.vmap(function)
    return function(matrix)


def _newton_one(matrix: Array, power: int) -> Array:
    """Of one matrix [n, n].

    The error is the Frobenius norm |m - I|, which bounds that of every eigenvalue and in exact arithmetic falls from
    step to step (the largest entry does not: of the all-ones matrix it first grows). So the iteration ends where the
    error is that of rounding, or no longer falls and is small; then the root before that is the better one. It has
    failed, and the root is NaN, where an error that is not small grows.
    """
    size, identity = matrix.shape[-1], jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    close = 8 * jnp.finfo(matrix.dtype).eps * size**0.5

    def error(found):
        return jnp.linalg.norm(found - identity)

    def goes_on(carry):
        count, _, _, _, now, before = carry
        falls = (now < before) | ((now > _FAR) & (now < _GROWTH * before))  # a small change may drown in rounding
        return (now > close) & falls & (count < _ITERATIONS)

    def step(carry):  # 2
        count, x, m, _, now, _ = carry
        t = (1 + 1 / power) * identity - m / power
        m = matmul(_power(t, power), m)
        return count + 1, matmul(x, t), m, x, error(m), now

    scale = frobenius(matrix)
    z = (1 + power) / 2  # 1, of the matrix over its norm
    x, m = z ** (1 / power) * identity, z * (matrix / scale)
    carry = (0, x, m, x, error(m), jnp.asarray(jnp.inf, matrix.dtype))
    _, x, _, x_before, now, before = lax.while_loop(goes_on, step, carry)
    fallen = now < before
    found = jnp.where(jnp.where(fallen, now, before) < _FAR, jnp.where(fallen, x, x_before), jnp.nan)
    return found * scale ** (-1 / power)


def _power(matrix: Array, power: int) -> Array:
    """A whole power by squaring, at full precision."""
    if power == 1:
        return matrix
    half = _power(matrix, power // 2)
    square = matmul(half, half)
    return matmul(square, matrix) if power % 2 else square
