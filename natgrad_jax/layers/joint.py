"""Several layers as one block of the curvature, with the products of their gradients in it.

The matrix of such a block is a mapping {layer: its matrix [S, I, O]}, and so is its evidence. Its arrays play the part
of their own addresses. It has no stack: the copies of a stacked layer are in the block like any other parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from natgrad_jax.base import Array, Evidence, Kind, Layer, Layers, Leaf, Matrix
from natgrad_jax.layers.parameter import widest

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
    block = Layer(NAME, "joint", (size,), leaves, dtype=widest(layers.known), geometry=layers.known)
    return replace(layers, known=(block,))


def is_joint(layer: Layer) -> bool:
    """Whether a layer is a block of several."""
    return layer.kind == NAME


def members(layer: Layer) -> tuple[Layer, ...]:
    """The layers that are in a block; the layer itself if it is none of several."""
    return layer.geometry if is_joint(layer) else (layer,)


def by_member(layer: Layer, values: Any) -> tuple[Any, ...]:
    """What a block has for each of its layers, of a mapping {layer: value}; of a layer by itself the value."""
    return tuple(values[member.name] for member in members(layer)) if is_joint(layer) else (values,)


def from_members(layer: Layer, values: tuple[Any, ...]) -> Any:
    """The inverse of `by_member`."""
    names = (member.name for member in members(layer))
    return dict(zip(names, values, strict=True)) if is_joint(layer) else values[0]


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


def kind(kinds: Mapping[str, Kind]) -> Kind:
    """The kind of joint blocks, whose layers are of these kinds."""

    def to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Matrix:
        return {
            member.name: kinds[member.kind].to_matrix(
                member, {leaf.role: leaves[leaf.address] for leaf in member.leaves}
            )
            for member in members(layer)
        }

    def from_matrix(layer: Layer, matrices: Matrix) -> dict[str, Array]:
        found = {}
        for member in members(layer):
            parts = kinds[member.kind].from_matrix(member, matrices[member.name])
            found |= {leaf.address: parts[leaf.role] for leaf in member.leaves}
        return found

    return Kind(to_matrix, from_matrix)
