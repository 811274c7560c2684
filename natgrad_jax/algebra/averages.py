"""Moving averages that carry their weight.

An average is a weighted sum and the sum of the weights, so that it is unbiased from the first value on: no zeros and
no identity leak into it. `decay` is everywhere the weight of the OLD value.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.stacks import per_stack
from natgrad_jax.base import Array, Scalar


class Average(NamedTuple):
    """A moving average: total [S, ...], an array or a tree of them, and weight [S]. Empty where the weight is 0."""

    total: Any
    weight: Array


def empty(stack: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Average:
    """An average of nothing yet.

    Args:
        stack: S.
        shape: shape of one value.
        dtype: of the values and the weight.

    Returns:
        An average of weight 0.
    """
    return Average(jnp.zeros(stack + shape, dtype), jnp.zeros(stack, dtype))


def of_zeros(like: Any, stack: tuple[int, ...], dtype: str) -> Average:
    """An average of no trees yet, of the structure of this one.

    Args:
        like: a tree of arrays [S, ...].
        stack: S.
        dtype: of the weight.

    Returns:
        An average of weight 0.
    """
    return Average(jax.tree.map(jnp.zeros_like, like), jnp.zeros(stack, dtype))


def update(average: Average, value: Any, decay: Scalar) -> Average:
    """The average with one more value.

    With decay = k / (k + 1) for k = 0, 1, ... it is the running mean.

    >>> mean(update(empty((), (), "float32"), jnp.array(3.0), decay=0.95))
    Array(3., dtype=float32)

    Args:
        average: so far.
        value: [S, ...], or a tree as in the average.
        decay: weight of the old value, in [0, 1).

    Returns:
        The new average.
    """

    def mix(old, new):
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    return Average(jax.tree.map(mix, average.total, value), mix(average.weight, 1.0))


def mean(average: Average) -> Any:
    """The value of an average [S, ...]: total over weight; zeros where it is empty."""
    weight = jnp.where(average.weight > 0, average.weight, 1)
    return jax.tree.map(lambda leaf: leaf / per_stack(weight, leaf), average.total)
