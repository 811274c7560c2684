"""The parameter arrays of a layer as the kernel and the bias of its kind, and back."""

from collections.abc import Mapping

from natgrad_jax.algebra.arranged import build, shape, take_apart
from natgrad_jax.base import Array, Layer


def assembled(layer: Layer, leaves: Mapping[str, Array]) -> Mapping[str, Array]:
    """{role: parameter array} as {role of the kind: array}, [S, ...] each."""
    if not layer.arrays:
        return leaves
    by_address = {leaf.address: leaves[leaf.role] for leaf in layer.leaves}
    return {role: build(arrangement, by_address) for role, arrangement in layer.arrays}


def taken_apart(layer: Layer, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `assembled`, each array with the shape of its parameter."""
    shapes = {leaf.address: leaf.shape for leaf in layer.leaves}
    if not layer.arrays:
        return {leaf.role: arrays[leaf.role].reshape(leaf.shape) for leaf in layer.leaves}
    found: dict[str, Array] = {}
    for role, arrangement in layer.arrays:
        found |= take_apart(arrangement, arrays[role].reshape(shape(arrangement)), shapes)
    return {leaf.role: found[leaf.address] for leaf in layer.leaves}
