"""The Fisher block of a norm: 2 x 2 for each channel, of its scale and its shift; 1 x 1 of a scale alone.

    1  F <- EMA(E[D D^T]), D the gradient of an example by scale and shift of a channel      observe
    2  direction <- (F + damping I)^-1 gradient, for each channel                            apply

D is exact, so that F is the block of the dense Fisher matrix. The inverse of a 2 x 2 matrix costs less to write down at
every step than to keep. Not here: the products of different channels.
"""

import jax.numpy as jnp

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.stacks import floored, trace
from natgrad_jax.base import Array, Method, Scalar
from natgrad_jax.layers.norm import gradients


def norm(decay: Scalar) -> Method:
    """The Fisher block of one norm.

    Args:
        decay: weight of the old value in the moving average.

    Returns:
        The functions: statistics are the average of F [channels, 2, 2], the operator is F itself, which follows it.
    """

    def init(layer):
        shape = (*layer.shape, layer.shape[1])
        return averages.empty((), shape, layer.dtype), jnp.zeros(shape, layer.dtype)

    def observe(layer, statistics, evidence):
        each = gradients(layer, evidence)
        square = jnp.sum(each[..., :, None] * each[..., None, :], axis=(0, 1))  # sums that XLA fuses
        count = jnp.maximum(evidence.count, 1e-30).astype(layer.dtype)
        return averages.update(statistics, square / (len(each) * count), decay)  # 1

    def refresh(layer, statistics, operator, damping):
        del layer, statistics, damping
        return operator

    def apply(layer, operator, gradient, damping):
        del layer
        return _solved(operator, gradient, floored(damping, jnp.max(trace(operator), initial=0.0)))  # 2

    def follow(layer, statistics, operator):
        del layer, operator
        return averages.mean(statistics)

    return Method(init, observe, refresh, apply, follow=follow)


def _solved(block: Array, gradient: Array, damping: Scalar) -> Array:
    """(F + damping I)^-1 g of matrices [channels, 2, 2] or [channels, 1, 1], by elimination.

    What is left of the second row is at least the damping, whatever is lost to rounding: F has no negative eigenvalue.
    """
    first = block[:, 0, 0] + damping
    if gradient.shape[-1] == 1:
        return gradient / first[:, None]
    share = block[:, 0, 1] / first
    left = jnp.maximum(block[:, 1, 1] + damping - share * block[:, 0, 1], damping)
    shift = (gradient[:, 1] - share * gradient[:, 0]) / left
    return jnp.stack([gradient[:, 0] / first - share * shift, shift], axis=-1)
