"""No untested step of any size: which steps are tested out of their turn, and which are taken back.

    1  test the step if |step| > 2 |the last tested step that was taken|
    2  if the loss is not finite or four times that of the last batch, compare it on this batch with the loss at
       theta - last; if that is finite, and a fourth or less: step <- -last

Line 1 costs nothing where steps keep their length. Line 2 costs nothing but on such a batch, where it takes one
forward pass. What was not tested, or was on a batch that saw nothing of it, can be taken back so by the next batch.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from natgrad_jax.algebra import trees
from natgrad_jax.algebra.branches import when
from natgrad_jax.base import Array

_LONGER, _HIGHER = 2.0, 3.0


class Bounds(NamedTuple):
    """What is known of the steps so far, each float32.

    Attributes:
        length: of the last tested step that was taken.
        value: the loss of the last batch, at the start of its step.
        first: the size of the first loss that was finite and not zero, in whose rounding a rise says nothing.
    """

    length: Array
    value: Array
    first: Array


def unbound() -> Bounds:
    """Before the first step."""
    return Bounds(*(jnp.zeros((), jnp.float32) for _ in Bounds._fields))


def is_unusual(bounds: Bounds, length: Array) -> Array:
    """Line 1; a length that is not finite is unusual."""
    return ~(length <= _LONGER * bounds.length)


def is_to_be_taken_back(bounds: Bounds, curvature: Any, params: Any, last: Any, value: Array, heard: Array) -> Array:
    """Line 2.

    Args:
        bounds: after the last step.
        curvature: of this batch.
        params: at the end of the last step.
        last: the last step; zeros if none was taken.
        value: the loss of this batch.
        heard: whether the batch says anything.

    Returns:
        A boolean.
    """
    least = 10 * jnp.finfo(jnp.float32).eps * bounds.first

    def has_risen(before: Array) -> Array:
        return ~(value - before <= _HIGHER * jnp.abs(before) + least)

    def test(_: Any) -> Array:
        before = curvature.value(trees.add(params, last, -1.0))
        return jnp.isfinite(before) & has_risen(before)

    moved = trees.dot(last, last) > 0
    return when(heard & moved & has_risen(bounds.value), test, jnp.array(False))


def seen(bounds: Bounds, value: Array, heard: Array) -> Bounds:
    """The bounds with the loss of one more batch."""
    narrow = value.astype(jnp.float32)
    first = jnp.where((bounds.first == 0) & heard & jnp.isfinite(narrow), jnp.abs(narrow), bounds.first)
    return bounds._replace(value=jnp.where(heard, narrow, bounds.value), first=first)
