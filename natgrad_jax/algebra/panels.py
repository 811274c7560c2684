"""New eigenbases of large sides in parts of equal work, for refreshes that are too long for one step.

Of a side, the basis W is made of an old one U and the moment M by one step of orthogonal iteration, a panel J of
columns at a time:

    1  order of the columns <- by what was measured along them, the largest first
    2  Y <- M U_J                                                            of the panel, with the M of this step
    3  W_J <- orthonormal columns of Y - W W^T Y                             twice, since rounding leaves a part

W is orthogonal whatever M is, also where it changes between the panels. Together they take 10 n^3 flops in products. An
eigendecomposition takes some 20, most of them slower ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra.branches import when
from natgrad_jax.algebra.eigenbasis import moved
from natgrad_jax.algebra.stacks import Factor, eigh, frobenius, matmul, orthonormal, transpose
from natgrad_jax.algebra.sweeps import padded, width
from natgrad_jax.base import Array

Sides = Sequence[Array | None]
"""The bases U [S, n, n] of the modes; None of one in its own coordinates."""


class Panels(NamedTuple):
    """A basis that is being made.

    Attributes:
        vectors: the columns so far, then zeros [S, n, m], m the first multiple of a panel from n on.
        values: diag(W^T M W) of them [S, m].
        order: the old columns that they come from [S, n], int32.
    """

    vectors: Array
    values: Array
    order: Array


def begin(sides: Sides, factors: Sequence[Factor], scale: Array, parts: int) -> tuple[Panels | None, ...]:
    """What the panels of all modes start from.

    Args:
        sides: the old bases.
        factors: M of each mode.
        scale: what was measured in the bases [S, n_1, ..., n_k].
        parts: steps that share the work.

    Returns:
        `Panels` of each mode; None where it has no whole matrix, which is no work.
    """

    def of_mode(axis: int, side: Array | None, factor: Factor) -> Panels | None:
        if side is None or not isinstance(factor, jax.Array):
            return None
        others = tuple(other for other in range(-len(sides), 0) if other != axis)
        order = jnp.argsort(-jnp.sum(scale, axis=others), axis=-1).astype(jnp.int32)  # 1
        *lead, size = side.shape[:-1]
        whole = padded(size, parts)
        return Panels(jnp.zeros((*lead, size, whole), side.dtype), jnp.zeros((*lead, whole), side.dtype), order)

    return tuple(map(of_mode, range(-len(sides), 0), sides, factors))


def proceed(
    work: Sequence[Panels | None], sides: Sides, factors: Sequence[Factor], part: Array, parts: int
) -> tuple[Panels | None, ...]:
    """The next panel of every mode, if there is one left.

    Args:
        work: from `begin`, after the parts before.
        sides: the old bases.
        factors: M of each mode, as of now.
        part: which, int32 [].
        parts: steps that share the work.

    Returns:
        The work after it.
    """

    def of_mode(panels: Panels | None, side: Array | None, factor: Any) -> Panels | None:
        if panels is None or side is None:
            return None
        size = side.shape[-1]
        return when(
            part * width(size, parts) < size,
            lambda panels: _with_panel(panels, side, factor, part * width(size, parts), width(size, parts)),
            panels,
        )

    return tuple(map(of_mode, work, sides, factors))


def _with_panel(panels: Panels, side: Array, moment: Array, start: Array, block: int) -> Panels:
    size, whole = panels.vectors.shape[-2:]
    order = jnp.pad(panels.order, [(0, 0)] * (panels.order.ndim - 1) + [(0, whole - size)])
    order = lax.dynamic_slice_in_dim(order, start, block, axis=-1)
    there = start + jnp.arange(block) < size
    old = jnp.take_along_axis(side, order[..., None, :], axis=-1)
    largest = frobenius(moment)[..., None, None]
    seen = matmul(moment, old) / jnp.where(largest > 0, largest, 1)  # 2
    found = jnp.where(there, seen + 8 * jnp.finfo(side.dtype).eps * old, 0)  # what has no moment stays where it is
    for _ in range(2):
        found -= matmul(panels.vectors, matmul(transpose(panels.vectors), found))
        found = jnp.where(there, orthonormal(found), 0)  # 3
    values = jnp.sum(found * matmul(moment, found), axis=-2)
    return panels._replace(
        vectors=lax.dynamic_update_slice_in_dim(panels.vectors, found, start, axis=-1),
        values=lax.dynamic_update_slice_in_dim(panels.values, values, start, axis=-1),
    )


def end(
    work: Sequence[Panels | None], sides: Sides, factors: Sequence[Factor], scale: Array
) -> tuple[tuple[Array | None, ...], Array]:
    """The new bases after the last part, and what was measured in the old ones in the order of the new columns.

    Args:
        work: of each mode.
        sides: the old bases.
        factors: M of each mode.
        scale: [S, n_1, ..., n_k].

    Returns:
        [S, n, n] of each mode, or what `warm_eigenbasis` makes of one without panels; the scale.
    """
    found: list[Array | None] = []
    for mode, (panels, side, factor) in enumerate(zip(work, sides, factors, strict=True)):
        axis = mode - len(sides)
        if panels is None:
            side, scale = moved(side, factor, scale, axis)
        else:
            side = panels.vectors[..., : panels.order.shape[-1]]
            lead = panels.order.ndim - 1
            order = jnp.expand_dims(panels.order, [lead + other for other in range(len(sides)) if other != mode])
            scale = jnp.take_along_axis(scale, order, axis=axis)
        found.append(side)
    return tuple(found), scale


def values(panels: Panels | None, factor: Factor) -> Array:
    """What M has along the new columns [S, n], not below zero; of a mode without panels its eigenvalues."""
    if panels is None:
        return eigh(factor)[0]
    return jnp.maximum(panels.values[..., : panels.order.shape[-1]], 0)
