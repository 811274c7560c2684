"""The Kronecker pair of a layer, averaged: A of its inputs and G of its outputs, or the partial traces of F."""

from typing import NamedTuple

import jax.numpy as jnp

from natgrad_jax import averages, modes
from natgrad_jax.averages import Average
from natgrad_jax.base import Evidence, Layer, Scalar
from natgrad_jax.layers import Pairing, Sharing, input_moment, output_moment, partial_traces
from natgrad_jax.linalg import Diagonal, Factor, trace


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
    return Pair(*(Average(side, jnp.zeros(layer.stack, layer.dtype)) for side in modes.empty(layer, most).total))


def observe(layer: Layer, pair: Pair, evidence: Evidence, decay: Scalar, sharing: Sharing = "expand") -> Pair:
    """The pair with one more batch.

    A is the sum over positions and the mean over examples, G the mean over positions and examples, so that A (x) G
    is the block of one example.

    Args:
        layer: the layer.
        pair: so far.
        evidence: of the batch.
        decay: weight of the old value.
        sharing: "expand", or "reduce" for positions that are pooled before they are squared.

    Returns:
        The new pair.
    """
    full_inputs, full_outputs = (not isinstance(side.total, Diagonal) for side in pair)
    return Pair(
        averages.update(pair.inputs, input_moment(layer, evidence, full_inputs, sharing), decay),
        averages.update(pair.outputs, output_moment(layer, evidence, full_outputs, sharing), decay),
    )


def means(pair: Pair) -> tuple[Factor, Factor]:
    """A and G."""
    return averages.mean(pair.inputs), averages.mean(pair.outputs)


class Traces(NamedTuple):
    """The partial traces of F: E[D D^T] [S, I, I] and E[D^T D] [S, O, O]; of a side too wide, the diagonal."""

    inputs: Factor
    outputs: Factor


def empty_traces(layer: Layer, most: int) -> Average:
    """An average of no `Traces` yet: both under one weight, so that they stay partial traces of one matrix.

    Args:
        layer: the layer.
        most: the largest size of a side of which the whole factor is kept.

    Returns:
        An average of weight 0.
    """
    average = modes.empty(layer, most)
    return average._replace(total=Traces(*average.total))


def observe_traces(layer: Layer, traces: Average, evidence: Evidence, decay: Scalar, sharing: Pairing) -> Average:
    """The partial traces with one more batch.

    Args:
        layer: the layer.
        traces: so far.
        evidence: of the batch.
        decay: weight of the old value.
        sharing: as `layers.partial_traces` takes it.

    Returns:
        The new average.
    """
    inputs, outputs = (not isinstance(side, Diagonal) for side in traces.total)
    found = partial_traces(layer, evidence, (inputs, outputs), sharing)
    return averages.update(traces, Traces(*found), decay)


def trace_restricted(traces: Average) -> Traces:
    """The Kronecker pair that has the partial traces of F, hence its trace, up to the factor tr F that both share.

    Args:
        traces: the average.

    Returns:
        E[D D^T] and E[D^T D], each over the root of delta = tr F; zeros where that is zero.
    """
    means = averages.mean(traces)
    return averages.mean(Average(means, jnp.sqrt(trace(means.inputs))))
