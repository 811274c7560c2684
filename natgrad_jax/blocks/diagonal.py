"""The diagonal Fisher block, for parameters that belong to no known layer.

    1  d <- EMA(g o g / W), g the gradient summed over the examples, labels sampled     observe
    2  direction <- gradient / (d + damping)                                            apply

For sampled labels the gradients of the examples are independent with mean zero, so that (sum_n g_n)^2 / W is an
unbiased estimate of E[g_n^2], without per-example gradients. Same units and same damping as every other block: one
learning rate fits all. Not here: what to do instead (`optax.partition` routes such parameters elsewhere).
"""

import jax.numpy as jnp

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.stacks import floored
from natgrad_jax.base import Method, Scalar
from natgrad_jax.layers.rows import gradient_matrix


def diagonal(decay: Scalar) -> Method:
    """The diagonal Fisher block of one parameter.

    Args:
        decay: weight of the old value in the moving average.

    Returns:
        The functions: statistics are the average of d, the operator is d itself, which follows it.
    """

    def init(layer):
        return averages.empty((), layer.shape, layer.dtype), jnp.zeros(layer.shape, layer.dtype)

    def observe(layer, statistics, evidence):
        square = jnp.mean(gradient_matrix(layer, evidence) ** 2, axis=0) / jnp.maximum(evidence.count, 1e-30)
        return averages.update(statistics, square, decay)  # 1

    def refresh(layer, statistics, operator, damping):
        del layer, statistics, damping
        return operator

    def apply(layer, operator, gradient, damping):
        del layer
        return gradient / (operator + floored(damping, jnp.max(operator, initial=0.0)))  # 2

    def follow(layer, statistics, operator):
        del layer, operator
        return averages.mean(statistics)

    return Method(init, observe, refresh, apply, follow=follow)
