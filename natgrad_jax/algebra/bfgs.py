"""BFGS of inverses, on stacks [..., n, n]: the update, the dampings of a pair, limited memory.

A pair (s, y) says that a symmetric matrix maps s to y. The update of the inverse H is, with r = 1 / s^T y,

    1  H <- (I - r s y^T) H (I - r y s^T) + r s s^T                     afterwards H y = s

It keeps H positive definite where s^T y > 0, and is skipped where s^T y is not above a bound, or overflows. A pair of
an indefinite matrix is bent first, so that s^T y is of the size that H, or the identity, would give it:

    2  s <- phi s + (1 - phi) H y    where s^T y < m y^T H y            Powell's damping of H: then equal
    3  y <- phi y + (1 - phi) s      where s^T y < m s^T s              the same of the matrix, with I in its place
    4  y <- y + m s                                                     Levenberg and Marquardt

From m = 1 on the identity does not itself keep to line 3, which then turns y round and is singular at s^T y = s^T s;
there the least multiple of s that does is added to y.

Limited memory keeps the last p pairs instead of H. Its product is the compact form of Byrd, Nocedal and Schnabel
(1994): with the pairs as rows of S and Y, R the upper triangle of S Y^T and Q = R^-1 S,

    5  H = I + Q^T (diag(R) + Y Y^T) Q - Q^T Y - Y^T Q

A pair times a number is the same pair, and pairs are kept with s^T y = 1. Then R has ones on its diagonal, where pairs
that are not there yet have them as well; so an empty memory needs no other code than a full one.
"""

from typing import NamedTuple

import jax.numpy as jnp

from natgrad_jax.algebra.stacks import all_finite, einsum, matmul, plus_identity, transpose, triangular_inverse
from natgrad_jax.base import Array, Scalar


class Pairs(NamedTuple):
    """The last p pairs, old to new, as rows [..., p, n] with s^T y = 1; zeros where there is none yet."""

    s: Array
    y: Array


Inverse = Array | Pairs
"""An inverse H [..., n, n], or the pairs that it is made of, from I."""


def no_pairs(stack: tuple[int, ...], most: int, size: int, dtype: str) -> Pairs:
    """An empty memory, whose H is the identity.

    Args:
        stack: leading axes.
        most: p, how many pairs it will hold.
        size: n.
        dtype: of the pairs.

    Returns:
        Pairs in buffers of their own.
    """
    return Pairs(*(jnp.zeros((*stack, most, size), dtype) for _ in range(2)))


def times(rows: Array, inverse: Inverse) -> Array:
    """Rows H.

    Args:
        rows: [..., m, n].
        inverse: H, or its pairs.

    Returns:
        [..., m, n].
    """
    if not isinstance(inverse, Pairs):
        return matmul(rows, inverse)
    s, y = inverse
    one = jnp.ones((), s.dtype)
    upper = plus_identity(jnp.triu(matmul(s, transpose(y)), 1), one)
    q = matmul(transpose(triangular_inverse(transpose(upper))), s)
    middle = plus_identity(matmul(y, transpose(y)), one)
    in_q, in_y = matmul(rows, transpose(q)), matmul(rows, transpose(y))
    return rows + matmul(matmul(in_q, middle) - in_y, q) - matmul(in_q, y)  # 5


def image(inverse: Inverse, vector: Array) -> Array:
    """H v of vectors [..., n]."""
    return times(vector[..., None, :], inverse)[..., 0, :]


def updated(inverse: Inverse, s: Array, y: Array, bound: Scalar = 0.0) -> tuple[Inverse, Array]:
    """The inverse with one more pair.

    Args:
        inverse: H, or its pairs.
        s: [..., n].
        y: [..., n].
        bound: what s^T y has to be above, at least 0: [] or [...].

    Returns:
        The new inverse, and where the pair was skipped, bool [...].
    """
    product = dot(s, y)
    taken = product > bound
    unit = jnp.where(taken, 1 / jnp.sqrt(jnp.where(taken, product, 1)), 0)[..., None]
    s, y = unit * s, unit * y
    if isinstance(inverse, Pairs):
        taken &= jnp.all(jnp.isfinite(s) & jnp.isfinite(y), axis=-1)
        return Pairs(_appended(inverse.s, s, taken), _appended(inverse.y, y, taken)), ~taken
    hy = image(inverse, y)
    cross = s[..., :, None] * hy[..., None, :]
    square = s[..., :, None] * s[..., None, :]
    new = inverse + (1 + dot(y, hy))[..., None, None] * square - (cross + transpose(cross))  # 1
    taken &= all_finite(new, (-2, -1))
    return jnp.where(taken[..., None, None], new, inverse), ~taken


def _appended(rows: Array, row: Array, taken: Array) -> Array:
    """Rows without the oldest and with one more, where it is taken."""
    more = jnp.concatenate([rows[..., 1:, :], row[..., None, :]], axis=-2)
    return jnp.where(taken[..., None, None], more, rows)


def powell(s: Array, y: Array, hy: Array, least: Scalar = 0.2) -> Array:
    """Powell's damping of H, line 2.

    Args:
        s: [..., n].
        y: [..., n].
        hy: H y.
        least: m, below 1: [] or [...].

    Returns:
        s, bent where it must be.
    """
    curved, product = dot(y, hy), dot(s, y)
    phi = _share(product < least * curved, (1 - least) * curved, curved - product)
    return phi * s + (1 - phi) * hy


def powell_of_identity(s: Array, y: Array, least: Scalar) -> Array:
    """Powell's damping of the matrix with the identity in its place, line 3; for m >= 1 a multiple of s added.

    Args:
        s: [..., n].
        y: [..., n].
        least: m: [] or [...].

    Returns:
        y, bent where it must be.
    """
    length, product = dot(s, s), dot(s, y)
    fires = product < least * length
    phi = _share(fires & (least < 1), (1 - least) * length, length - product)
    lacking = jnp.where(fires, least - product / jnp.where(fires, length, 1), 0)[..., None]
    return phi * y + jnp.where(jnp.asarray(least < 1)[..., None], 1 - phi, lacking) * s


def levenberg(s: Array, y: Array, least: Scalar) -> Array:
    """The damping of Levenberg and Marquardt, line 4."""
    return y + jnp.asarray(least)[..., None] * s


def dot(one: Array, other: Array) -> Array:
    """Products of vectors [..., n] -> [...]."""
    return einsum("...n,...n->...", one, other)


def _share(fires: Array, part: Array, whole: Array) -> Array:
    """Part / whole [..., 1] where a rule fires, else 1."""
    return jnp.where(fires, part / jnp.where(fires, whole, 1), 1)[..., None]
