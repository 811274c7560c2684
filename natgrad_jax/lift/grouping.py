"""One function over many layers: equal shapes are stacked and done as one.

Ten layers of one shape become one layer with a stack of ten, so that compilation and accelerators see one batched
factorisation instead of ten. The states at rest stay per layer, readable by name.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.base import Layer, Operator, Statistics


def alike(layer: Layer, statistics: Statistics, operator: Operator) -> Hashable:
    """What two layers must share to be done as one; shapes suffice."""
    leaves, structure = jax.tree.flatten((statistics, operator))
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return (layer.kind, layer.shape, layer.stack, layer.window, layer.one_hot, layer.dtype, structure, shapes)


def joined(layers: Sequence[Layer]) -> Layer:
    """Layers that are alike as one, with a stack axis more."""
    first = layers[0]
    return replace(first, name="", leaves=(), geometry=None, uses=(), stack=(len(layers), *first.stack))


def cost(layer: Layer, pair: tuple[Statistics, Operator]) -> int:
    """What a refresh of a layer takes, in units of a factorisation: the cubes of the sides of its matrices.

    Args:
        layer: with its stack.
        pair: statistics and operator, or their shapes; without statistics the matrices of the operator count.

    Returns:
        The sum over copies; n m min(n, m) for a matrix that is not square, n for a diagonal.
    """
    lead = len(layer.stack)
    for tree in pair:
        sides = [leaf.shape[lead:] for leaf in jax.tree.leaves(tree) if leaf.ndim > lead]
        if sides:
            each = sum(prod(side[-2:]) * min(side[-2:]) if len(side) > 1 else side[0] for side in sides)
            return prod(layer.stack) * each
    return 1


def map_layers(
    function: Callable[[Layer, Statistics, Operator], Any],
    layers: Sequence[Layer],
    statistics: Mapping[str, Statistics],
    operators: Mapping[str, Operator],
) -> dict[str, Any]:
    """Apply `function(layer, statistics, operator)` to every layer, layers of one signature in one call.

    Args:
        function: it sees a leading stack axis more where layers were joined.
        layers: the layers.
        statistics: {name: statistics}.
        operators: {name: operator}.

    Returns:
        {name: what the function gives}, in the order of `layers`.
    """
    groups: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(alike(layer, statistics[layer.name], operators[layer.name]), []).append(layer)
    results = {}
    for group in groups.values():
        if len(group) == 1:
            (layer,) = group
            results[layer.name] = function(layer, statistics[layer.name], operators[layer.name])
            continue
        pairs = [(statistics[layer.name], operators[layer.name]) for layer in group]
        found = function(joined(group), *jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs))
        for index, layer in enumerate(group):
            results[layer.name] = jax.tree.map(lambda leaf, index=index: leaf[index], found)
    return {layer.name: results[layer.name] for layer in layers}
