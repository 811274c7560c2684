"""Algebra of tensors by their modes: contractions, and products with one factor for each mode.

A tensor X [S, n_1, ..., n_k] has k modes. Its unfolding X_(i) is the matrix [S, n_i, all others].
"""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.stacks import Diagonal, Factor, Truncated, diagonal, einsum
from natgrad_jax.algebra.truncated import Moment, by_products, of_rows, product_along
from natgrad_jax.base import Array

_LETTERS = "abcdefghijklmnopqrstuvwxy"


def contraction(tensor: Array, mode: int, count: int, full: bool = True, rank: int | None = None) -> Factor | Moment:
    """X_(i) X_(i)^T.

    Args:
        tensor: [S, n_1, ..., n_k].
        mode: i, from 0.
        count: k.
        full: whether to form the matrix, or only its diagonal.
        rank: vectors that it is wanted for; None for the matrix itself.

    Returns:
        [S, n_i, n_i], or a `Diagonal` [S, n_i]; its products where they take fewer flops.
    """
    sizes = tensor.shape[-count:]
    if by_products(prod(sizes) // max(1, sizes[mode]), sizes[mode], rank):
        moved = jnp.moveaxis(tensor, mode - count, -1)
        return of_rows(moved.reshape(*tensor.shape[:-count], -1, sizes[mode]))
    letters = _LETTERS[:count]
    if not full:
        return Diagonal(jnp.sum(tensor**2, axis=[axis - count for axis in range(count) if axis != mode]))
    other = letters.replace(letters[mode], "z")
    return einsum(f"...{letters},...{other}->...{letters[mode]}z", tensor, tensor)


def product(tensor: Array, factors: Sequence[Factor | None]) -> Array:
    """The tensor times a matrix in every mode, X_(i) -> M_i^T X_(i).

    Args:
        tensor: [S, n_1, ..., n_k].
        factors: of each mode a matrix M_i [S, n_i, m_i], a diagonal or truncated one, or None for the identity.

    Returns:
        [S, m_1, ..., m_k].
    """
    count = len(factors)
    letters = _LETTERS[:count]
    for mode, factor in enumerate(factors):
        if isinstance(factor, Diagonal):
            entries = factor.entries
            shape = entries.shape[:-1] + (1,) * mode + entries.shape[-1:] + (1,) * (count - 1 - mode)
            tensor = tensor * entries.reshape(shape)
        elif isinstance(factor, Truncated):
            tensor = product_along(tensor, factor, mode - count)
        elif factor is not None:
            found = letters.replace(letters[mode], "z")
            tensor = einsum(f"...{letters},...{letters[mode]}z->...{found}", tensor, factor)
    return tensor


def partial_trace(factor: Factor, sizes: tuple[int, ...], mode: int, full: bool) -> Factor:
    """Of a second moment of tensors as vectors, that of one of their modes.

    Args:
        factor: [S, n, n], n the product of the sizes.
        sizes: of the modes.
        mode: which one, from 0.
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [S, n_i, n_i], or a `Diagonal` [S, n_i].
    """
    stack = diagonal(factor).shape[:-1]
    if isinstance(factor, Diagonal) or not full:
        others = [axis - len(sizes) for axis in range(len(sizes)) if axis != mode]
        return Diagonal(jnp.sum(diagonal(factor).reshape(stack + sizes), axis=others))
    assert isinstance(factor, jax.Array), "formed from rows"
    letters = _LETTERS[: len(sizes)]
    other = letters.replace(letters[mode], "z")
    return einsum(f"...{letters}{other}->...{letters[mode]}z", factor.reshape(stack + sizes + sizes))
