"""Norms: a scale and a shift for each channel, whose Fisher block is 2 x 2 for each of them.

The matrix of such a block is [channels, 2], of a scale alone [channels, 1]; the copies of a stack are channels like any
others. It has no rows: its evidence are the gradients of the examples.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from natgrad_jax.base import Array, Evidence, Kind, Layer, Leaf
from natgrad_jax.layers.arrays import assembled, taken_apart

ROLES = ("scale", "shift")


def only(layer: Layer, leaves: tuple[Leaf, ...]) -> Layer:
    """A norm of which some arrays are not there."""
    roles = [leaf.role for leaf in leaves]
    arrays = tuple(pair for pair in layer.arrays if pair[0] in roles)
    return replace(layer, leaves=leaves, shape=(layer.shape[0], len(leaves)), arrays=arrays)


def gradients(layer: Layer, evidence: Evidence) -> Array:
    """The gradients of the examples of a norm, [K, N, channels, 2]."""
    assert evidence.examples is not None, "asked for in `lift.evidence`"
    there = {leaf.role: evidence.examples[leaf.role] for leaf in layer.leaves}
    return jax.vmap(jax.vmap(lambda leaves: _to_matrix(layer, leaves)))(there)


def _to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    there = assembled(layer, leaves)
    return jnp.stack([there[leaf.role].astype(layer.dtype).reshape(-1) for leaf in layer.leaves], axis=-1)


def _from_matrix(layer: Layer, matrix: Array) -> dict[str, Array]:
    return taken_apart(layer, {leaf.role: matrix[:, place] for place, leaf in enumerate(layer.leaves)})


NORM = Kind(_to_matrix, _from_matrix)
