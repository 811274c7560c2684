"""Several layers as one block of the curvature, with the products of their gradients in it.

The matrix of such a block is a mapping {layer: its matrix [S, I, O]}, and so is its evidence. Its arrays play the part
of their own addresses. It has no stack: the copies of a stacked layer are in the block like any other parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from natgrad_jax.base import Evidence, Layer, Layers, Leaf

NAME = "joint"


def joint(layers: Layers) -> Layers:
    """The known layers as one block.

    Args:
        layers: of the model.

    Returns:
        Layers of which one is known, called "joint"; the remaining parameters stay as they are.
    """
    if not layers.known:
        return layers
    leaves = tuple(Leaf(leaf.address, leaf.address, leaf.shape) for layer in layers.known for leaf in layer.leaves)
    size = sum(prod(leaf.shape) for leaf in leaves)
    dtype = "float64" if any(layer.dtype == "float64" for layer in layers.known) else "float32"
    block = Layer(NAME, "joint", (size,), leaves, dtype=dtype, geometry=layers.known)
    return replace(layers, known=(block,))


def members(layer: Layer) -> tuple[Layer, ...]:
    """The layers that are in a block; the layer itself if it is none of several."""
    return layer.geometry if layer.kind == "joint" else (layer,)


def joint_evidence(layers: Layers, evidence_of: Callable[[], Mapping[str, Evidence]]) -> Callable[[], dict[str, Any]]:
    """The evidence for `joint(layers)`, when it is called.

    Args:
        layers: of the model, before they were joined.
        evidence_of: gives {name: Evidence} of all of them.

    Returns:
        A function that gives {"joint": {name: Evidence}}, and the evidence of the remaining parameters.
    """

    def found():
        evidence = evidence_of()
        apart = {layer.name: evidence[layer.name] for layer in layers.rest}
        return apart | ({NAME: {layer.name: evidence[layer.name] for layer in layers.known}} if layers.known else {})

    return found
