"""One function over many layers: equal shapes are stacked and done as one.

Ten layers of one shape become one layer with a stack of ten, so that compilation and accelerators see one batched
factorisation instead of ten. The states at rest stay per layer, readable by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from natgrad_jax.base import Layer, Operator, Statistics


def _signature(layer: Layer, statistics: Statistics, operator: Operator) -> tuple:
    """What two layers must share to be done as one."""
    leaves, structure = jax.tree.flatten((statistics, operator))
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return (layer.kind, layer.shape, layer.stack, layer.window, layer.one_hot, layer.dtype, structure, shapes)


def map_layers(
    function: Callable[[Layer, Statistics, Operator], Operator],
    layers: Sequence[Layer],
    statistics: Mapping[str, Statistics],
    operators: Mapping[str, Operator],
) -> dict[str, Operator]:
    """Apply `function(layer, statistics, operator)` to every layer, layers of one signature in one call.

    Args:
        function: it sees a leading stack axis more where layers were joined.
        layers: the layers.
        statistics: {name: statistics}.
        operators: {name: operator}.

    Returns:
        {name: new operator}, in the order of `layers`.
    """
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_signature(layer, statistics[layer.name], operators[layer.name]), []).append(layer)
    results = {}
    for group in groups.values():
        if len(group) == 1:
            (layer,) = group
            results[layer.name] = function(layer, statistics[layer.name], operators[layer.name])
            continue
        joined = replace(group[0], name="", leaves=(), geometry=None, uses=(), stack=(len(group),) + group[0].stack)
        pairs = [(statistics[layer.name], operators[layer.name]) for layer in group]
        found = function(joined, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs))
        for index, layer in enumerate(group):
            results[layer.name] = jax.tree.map(lambda leaf, index=index: leaf[index], found)
    return {layer.name: results[layer.name] for layer in layers}
