"""The Kronecker pair of a layer: A of its inputs and G of its outputs, averaged."""

from typing import NamedTuple

import jax.numpy as jnp

from natgrad_jax import averages
from natgrad_jax.averages import Average
from natgrad_jax.base import Evidence, Layer, Scalar
from natgrad_jax.layers import input_moment, output_moment
from natgrad_jax.linalg import Diagonal, Factor


class Pair(NamedTuple):
    """Averages of A [S, I, I] and G [S, O, O]; of a side that is too wide, of its diagonal."""

    inputs: Average
    outputs: Average


def empty(layer: Layer, most: int) -> Pair:
    """A pair of nothing yet.

    Args:
        layer: the layer.
        most: the largest size of a side of which the whole factor is kept.

    Returns:
        Averages of weight 0.
    """

    def side(size):
        if size <= most:
            return averages.empty(layer.stack, (size, size), layer.dtype)
        average = averages.empty(layer.stack, (size,), layer.dtype)
        return average._replace(total=Diagonal(average.total))

    return Pair(*map(side, layer.shape))


def identities(layer: Layer, most: int) -> tuple[Factor, Factor]:
    """Identity matrices in the place of A and G, or their diagonals; each in a buffer of its own."""

    def side(size):
        if size <= most:
            return jnp.zeros((*layer.stack, size, size), layer.dtype) + jnp.eye(size, dtype=layer.dtype)
        return Diagonal(jnp.ones((*layer.stack, size), layer.dtype))

    rows, columns = layer.shape
    return side(rows), side(columns)


def observe(layer: Layer, pair: Pair, evidence: Evidence, decay: Scalar) -> Pair:
    """The pair with one more batch.

    A is the sum over positions and the mean over examples, G the mean over positions and examples, so that A (x) G
    is the block of one example.

    Args:
        layer: the layer.
        pair: so far.
        evidence: of the batch.
        decay: weight of the old value.

    Returns:
        The new pair.
    """
    full_inputs, full_outputs = (not isinstance(side.total, Diagonal) for side in pair)
    return Pair(
        averages.update(pair.inputs, input_moment(layer, evidence, full_inputs), decay),
        averages.update(pair.outputs, output_moment(layer, evidence, full_outputs), decay),
    )


def means(pair: Pair) -> tuple[Factor, Factor]:
    """A and G."""
    return averages.mean(pair.inputs), averages.mean(pair.outputs)
