"""Inputs of a batch in which some examples have no weight: these examples made harmless before the model sees them.

A cotangent of zero times an activation that is not finite is not finite. So what is to say nothing must not be infinite
anywhere in the model, and only its inputs are at hand:

    1  a position of weight zero that is no usable number is zero
    2  an example of weight zero with an input that is no usable number is replaced by an example that has a weight

A number is usable if its square is finite in float32. All others stay as they are, since a model may use examples that
the likelihood does not weigh. Whole numbers are taken as they are: no one here knows which of them are tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from natgrad_jax.base import Array
from natgrad_jax.losses import example_weights, spread


def harmless(arrays: Sequence[Any], places: Mapping[int, int], weights: Array, positions: bool) -> list[Any]:
    """The arrays of a batch, with what has no weight replaced where it is no usable number.

    Args:
        arrays: what the model is called with.
        places: {which of them: the axis of its N examples}.
        weights: [N], or [N, ...] of positions or outputs.
        positions: whether the further axes of the weights are positions.

    Returns:
        As many arrays of the same shapes.
    """
    found = list(arrays)
    chosen = {place: axis for place, axis in places.items() if jnp.issubdtype(found[place].dtype, jnp.number)}
    for place, axis in chosen.items():
        if positions and axis == 0 and _is_real(found[place]) and found[place].shape[: weights.ndim] == weights.shape:
            found[place] = _positions_filled(found[place], weights)  # 1
    there = example_weights(weights) > 0
    bad = jnp.zeros(there.shape, bool)
    for place, axis in chosen.items():
        if _is_real(found[place]):
            bad |= ~jnp.all(_usable(found[place]), axis=[i for i in range(found[place].ndim) if i != axis])
    bad, stand_in = bad & ~there, jnp.argmax(there)
    for place, axis in chosen.items():
        found[place] = _replaced(found[place], axis, bad, stand_in, jnp.any(there))  # 2
    return found


def _is_real(values: Any) -> bool:
    return jnp.issubdtype(values.dtype, jnp.floating)


def _usable(values: Array) -> Array:
    return jnp.isfinite(jnp.square(jnp.asarray(values, jnp.float32)))


def _positions_filled(values: Array, weights: Array) -> Array:
    values = jnp.asarray(values)
    there = spread(weights, values.ndim) != 0
    return jnp.where(there | _usable(values), values, jnp.zeros((), values.dtype))


def _replaced(values: Array, axis: int, bad: Array, stand_in: Array, any_there: Array) -> Array:
    """With one example in the place of the bad ones [N]; with zeros if there is none."""
    values = jnp.asarray(values)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    chosen = any_there & (jnp.arange(len(bad)) == stand_in).reshape(shape)
    one = jnp.sum(jnp.where(chosen, values, 0), axis, values.dtype, keepdims=True)  # an index gathers from all devices
    return jnp.where(bad.reshape(shape), one, values)
