"""Inverse roots of damped positive semidefinite matrices: (M + damping I)^-exponent, on stacks.

By eigendecomposition, of any exponent; or, for 1 / p, by the coupled Newton iteration of Guo and Higham (2006), which
is matrix products alone and so runs well where eigendecompositions do not:

    1  a <- M + damping I,  z <- (1 + p) / (2 |a|),  m <- z a,  x <- z^(1/p) I
    2  t <- (1 + 1/p) I - m / p,  x <- x t,  m <- t^p m               until m is the identity
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.base import Array, Scalar
from natgrad_jax.linalg import Diagonal, Factor, eigh, floored, matmul, transpose

Root = Literal["eigh", "newton"]
ROOTS = get_args(Root)
_CLOSE, _ITERATIONS, _GROWTH, _FAR = 1e-6, 100, 1.2, 0.1


def inverse_root(factor: Factor, damping: Scalar, exponent: float, root: Root = "eigh") -> Factor:
    """(factor + damping I)^-exponent.

    Args:
        factor: positive semidefinite [S, n, n].
        damping: strength [] or [S], in the units of the factor; floored relative to its largest eigenvalue.
        exponent: positive; 1 / p with a whole p if the root is found by "newton".
        root: "eigh" or "newton".

    Returns:
        Of the kind of `factor`. NaN where "newton" does not converge.
    """
    damping = jnp.asarray(damping, jax.tree.leaves(factor)[0].dtype)
    if isinstance(factor, Diagonal):
        strength = floored(damping, jnp.max(factor.entries, axis=-1, initial=0))
        return Diagonal((factor.entries + strength[..., None]) ** -exponent)
    if root == "newton":
        strength = floored(damping, jnp.linalg.norm(factor, axis=(-2, -1)))
        damped = factor + strength[..., None, None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)
        return _newton(damped, whole(exponent))
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
    """Of one matrix [n, n]: until the error is small or grows; if it has grown, the root before that."""
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def error(found):
        return jnp.max(jnp.abs(found - identity))

    def goes_on(carry):
        count, _, _, _, now, before = carry
        return (now > _CLOSE) & (count < _ITERATIONS) & (now < _GROWTH * before)

    def step(carry):  # 2
        count, x, m, _, now, _ = carry
        t = (1 + 1 / power) * identity - m / power
        m = matmul(_power(t, power), m)
        return count + 1, matmul(x, t), m, x, error(m), now

    z = (1 + power) / (2 * jnp.linalg.norm(matrix))  # 1
    x, m = z ** (1 / power) * identity, z * matrix
    carry = (0, x, m, x, error(m), jnp.asarray(jnp.inf, matrix.dtype))
    _, x, _, x_before, now, before = lax.while_loop(goes_on, step, carry)
    grown = ~(now < before)
    residual = jnp.where(grown, before, now)
    return jnp.where(residual < _FAR, jnp.where(grown, x_before, x), jnp.nan)


def _power(matrix: Array, power: int) -> Array:
    """A whole power by squaring, at full precision."""
    if power == 1:
        return matrix
    half = _power(matrix, power // 2)
    square = matmul(half, half)
    return matmul(square, matrix) if power % 2 else square
