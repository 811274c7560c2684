"""The examples of a batch in pieces, for rows that would take too much memory all at once.

The rows of a convolution are its patches, as many numbers for each input as its kernel has offsets. What is a sum over
examples is summed over pieces of a batch, so that only the rows of one of them exist at a time.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.base import Evidence, Layer

MOST = 1 << 22
"""How many entries the rows of inputs may have at a time: 16 MB of float32."""


def summed(
    function: Callable[[Evidence], Any], layer: Layer, evidence: Evidence, most: int = MOST, symmetric: bool = False
) -> Any:
    """The sum over examples of a function of the evidence of some of them.

    Args:
        function: what a piece of the evidence gives; it may not divide by a number of examples.
        layer: the layer; only convolutions are done in pieces. Its devices sum over the examples that each has.
        evidence: of the batch.
        most: how many entries the rows of inputs may have at a time.
        symmetric: whether the function gives symmetric matrices [S, n, n], of which devices send a half.

    Returns:
        The sum over all examples; where the devices divide the stack, each has its copies.
    """
    if not is_spread(layer, evidence):
        return _summed_here(function, layer, evidence, most)
    lead = layer.module_axes
    kept = evidence.inputs, evidence.cotangents, evidence.weights

    def of_mine(inputs, cotangents, weights):
        return _summed_here(function, layer, Evidence(inputs, cotangents, None, weights), most)

    return layer.devices.summed(of_mine, kept, (lead, lead + 1, 0), layer.stack, symmetric)


def is_spread(layer: Layer, evidence: Evidence) -> bool:
    """Whether the devices of a layer each have as many of the examples.

    Not of a matrix that is used both ways: the scales of its rows are means over all examples.
    """
    if layer.devices is None or any(use.transposed for use in layer.uses):
        return False
    lead, kept = layer.module_axes, (evidence.inputs, evidence.cotangents, evidence.weights)
    sizes = {
        leaf.shape[axis] for part, axis in zip(kept, (lead, lead + 1, 0), strict=True) for leaf in jax.tree.leaves(part)
    }
    return len(sizes) == 1 and all(isinstance(size, int) and size % layer.devices.mesh.size == 0 for size in sizes)


def _summed_here(function: Callable[[Evidence], Any], layer: Layer, evidence: Evidence, most: int) -> Any:
    """The sum without a device more."""
    size = examples_at_a_time(layer, evidence, most)
    if size is None:
        return function(evidence)
    lead = layer.module_axes
    kept = evidence.inputs, evidence.cotangents, evidence.weights
    leaves, structure = jax.tree.flatten(kept)
    places = [axis for part, axis in zip(kept, (lead, lead + 1, 0), strict=True) for _ in jax.tree.leaves(part)]
    split = [_split(leaf, axis, size) for leaf, axis in zip(leaves, places, strict=True)]

    def of_piece(pieces):
        joined = [jnp.moveaxis(piece, 0, axis) for piece, axis in zip(pieces, places, strict=True)]
        inputs, cotangents, weights = structure.unflatten(joined)
        return function(Evidence(inputs, cotangents, None, weights))

    shapes = jax.eval_shape(of_piece, [piece[0] for piece in split])
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.scan(lambda sums, pieces: (jax.tree.map(jnp.add, sums, of_piece(pieces)), None), start, split)[0]


def examples_at_a_time(layer: Layer, evidence: Evidence, most: int = MOST) -> int | None:
    """How many examples a piece has, a divisor of their number; None where the batch is done at once.

    A symbolic number of examples, as of an exported step, has no divisors that are known: it is done at once.
    """
    inputs = evidence.inputs
    if not (layer.window and isinstance(inputs, tuple)) or any(use.transposed for use in layer.uses):
        return None
    examples = inputs[0].shape[layer.module_axes]
    if not isinstance(examples, int):
        return None
    entries = sum(use.positions for use in layer.uses) * layer.shape[0] * prod(layer.stack)
    size = max(1, min(examples, most // max(1, entries)))
    while examples % size:
        size -= 1
    return None if size >= examples else size


def _split(leaf: Any, axis: int, size: int) -> Any:
    """Examples in front, in pieces: [pieces, size, ...]."""
    moved = jnp.moveaxis(leaf, axis, 0)
    return moved.reshape(-1, size, *moved.shape[1:])
