"""Moving averages that carry their weight.

An average is a weighted sum and the sum of the weights, so that it is unbiased from the first value on: no zeros and
no identity leak into it. `decay` is everywhere the weight of the OLD value.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra import truncated
from natgrad_jax.algebra.stacks import Truncated, per_stack, scaled
from natgrad_jax.base import Array, Scalar


class Average(NamedTuple):
    """A moving average: total [S, ...], an array or a tree of them, and weight [S]. Empty where the weight is 0.

    A truncated matrix among them stays one: what is added to it is a matrix, or its products.
    """

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

    def zero(leaf):
        return truncated.emptied(leaf) if isinstance(leaf, Truncated) else jnp.zeros_like(leaf)

    return Average(jax.tree.map(zero, like, is_leaf=_is_truncated), jnp.zeros(stack, dtype))


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
    return combined(average, value, (decay, 1 - decay))


def combined(average: Average, value: Any, weights: tuple[Scalar, Scalar]) -> Average:
    """The weighted sum of an average and one more value; `update` with weights that need not sum to one."""

    def mix(old, new):
        if isinstance(old, Truncated):
            return truncated.combined(old, new, weights)
        return (weights[0] * old + weights[1] * new).astype(old.dtype)

    total = jax.tree.map(mix, average.total, value, is_leaf=_is_truncated)
    return Average(total, (weights[0] * average.weight + weights[1]).astype(average.weight.dtype))


def mean(average: Average) -> Any:
    """The value of an average [S, ...]: total over weight; zeros where it is empty."""
    weight = jnp.where(average.weight > 0, average.weight, 1)

    def divided(leaf):
        return scaled(leaf, 1 / weight) if isinstance(leaf, Truncated) else leaf / per_stack(weight, leaf)

    return jax.tree.map(divided, average.total, is_leaf=_is_truncated)


def _is_truncated(node: Any) -> bool:
    return isinstance(node, Truncated)
