"""The diagonal Fisher block, for parameters that belong to no known layer.

    1  d <- EMA(g o g / W), g the gradient summed over the examples, labels sampled     observe
    2  direction <- gradient / (d + damping)                                            apply

For sampled labels the gradients of the examples are independent with mean zero, so that (sum_n g_n)^2 / W is an
unbiased estimate of E[g_n^2], without per-example gradients. Same units and same damping as every other block: one
learning rate fits all. Not here: what to do instead (`optax.partition` routes such parameters elsewhere).
"""

from typing import NamedTuple

import jax.numpy as jnp

from natgrad_jax import averages
from natgrad_jax.averages import Average
from natgrad_jax.base import Method, Scalar
from natgrad_jax.linalg import floored


class DiagonalState(NamedTuple):
    """The averaged diagonal d, of the shape of the parameter."""

    diagonal: Average


def diagonal(decay: Scalar) -> Method:
    """The diagonal Fisher block of one parameter.

    Args:
        decay: weight of the old value in the moving average.

    Returns:
        The four functions.
    """

    def init(layer):
        return DiagonalState(averages.empty((), layer.shape, layer.dtype))

    def observe(layer, state, evidence):
        del layer
        square = jnp.mean(evidence.gradient**2, axis=0) / jnp.maximum(evidence.count, 1e-30)
        return DiagonalState(averages.update(state.diagonal, square, decay))  # 1

    def refresh(layer, state, damping):
        del layer, damping
        return state

    def apply(layer, state, gradient, damping):
        del layer
        scale = averages.mean(state.diagonal)
        return gradient / (scale + floored(damping, jnp.max(scale, initial=0.0)))  # 2

    return Method(init, observe, refresh, apply)
