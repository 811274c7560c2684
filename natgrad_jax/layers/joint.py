"""Several layers as one block of the curvature, with the products of their gradients in it.

The matrix of such a block is a mapping {layer: its matrix [S, I, O]}, and so is its evidence. Its arrays play the part
of their own addresses. It has no stack: the copies of a stacked layer are in the block like any other parameters.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from natgrad_jax.base import Array, Evidence, Kind, Layer, Layers, Leaf, Matrix
from natgrad_jax.layers.parameter import widest

NAME = "joint"
Groups = Mapping[str, Collection[str]]
"""{block: the names of its layers}."""


def joint(layers: Layers, groups: Groups | None = None) -> Layers:
    """The known layers as one block, or as one for each group.

    Args:
        layers: of the model.
        groups: which layers each block has; None for one block of all, called "joint".

    Returns:
        Layers in which a block stands for its members, where the first of them stood. A group none of whose layers is
        there has no block. Layers of no group and the remaining parameters stay as they are.
    """
    block_of = _block_of(layers, groups)
    blocks: dict[str, list[Layer]] = {}
    for layer in layers.known:
        blocks.setdefault(block_of.get(layer.name, layer.name), []).append(layer)
    known = (_block(name, inside) if inside[0].name in block_of else inside[0] for name, inside in blocks.items())
    return replace(layers, known=tuple(known))


def _block_of(layers: Layers, groups: Groups | None) -> dict[str, str]:
    """The name of the block of each layer that is in one."""
    if groups is None:
        return {layer.name: NAME for layer in layers.known}
    return {name: block for block, names in groups.items() for name in names}


def _block(name: str, inside: Sequence[Layer]) -> Layer:
    """Some layers as one block."""
    leaves = tuple(Leaf(leaf.address, leaf.address, leaf.shape) for layer in inside for leaf in layer.leaves)
    size = sum(prod(leaf.shape) for leaf in leaves)
    return Layer(name, NAME, (size,), leaves, dtype=widest(tuple(inside)), geometry=tuple(inside))


def check_groups(layers: Layers, groups: Groups) -> None:
    """Refuse groups of what is no known layer, or of a layer twice.

    Raises:
        ValueError: if a name is that of no known layer, stands in two groups, or is that of a block, too.
    """
    named = [name for names in groups.values() for name in names]
    known = [layer.name for layer in layers.known]
    if strange := [name for name in named if name not in known]:
        raise ValueError(
            f"`blocks` names {', '.join(map(repr, strange))}, which is no layer with rows of examples; expected names "
            f"of these: {', '.join(map(repr, known))}."
        )
    if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise ValueError(f"`blocks` names {', '.join(map(repr, twice))} twice; a layer is in one block.")
    if taken := [block for block in groups if block in known and block not in groups[block]]:
        raise ValueError(
            f"`blocks` calls a block {taken[0]!r}, which is the name of a layer outside of it; take another name."
        )


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


def joint_evidence(blocks: Layers, evidence_of: Callable[[], Mapping[str, Evidence]]) -> Callable[[], dict[str, Any]]:
    """The evidence for joint blocks, when it is called.

    Args:
        blocks: what `joint` gave.
        evidence_of: gives {name: Evidence} of all layers, before they were joined.

    Returns:
        A function that gives {block: {name: Evidence}}, and the evidence of what is in no block.
    """

    def found():
        evidence = evidence_of()
        return {
            layer.name: {one.name: evidence[one.name] for one in members(layer)}
            if is_joint(layer)
            else evidence[layer.name]
            for layer in (*blocks.known, *blocks.rest)
        }

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
