"""One function over many layers: equal shapes are stacked and done as one.

Ten layers of one shape become one layer with a stack of ten, so that compilation and accelerators see one batched
factorisation instead of ten. The states at rest stay per layer, readable by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.base import Layer, Scalar


def _signature(layer: Layer, state: Any) -> tuple:
    """What two layers must share to be done as one."""
    leaves, structure = jax.tree.flatten(state)
    return (
        layer.kind,
        layer.shape,
        layer.stack,
        layer.dtype,
        structure,
        tuple((leaf.shape, leaf.dtype) for leaf in leaves),
    )


def map_states(
    function: Callable[[Layer, Any, Scalar], Any],
    layers: Sequence[Layer],
    states: Mapping[str, Any],
    damping: Scalar,
) -> dict[str, Any]:
    """Apply `function(layer, state, damping)` to every layer, layers of one signature in one call.

    Args:
        function: a `Method.refresh`; it sees a leading stack axis more where layers were joined.
        layers: the layers.
        states: {name: state}.
        damping: passed on.

    Returns:
        {name: new state}, in the order of `layers`.
    """
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_signature(layer, states[layer.name]), []).append(layer)
    results = {}
    for group in groups.values():
        if len(group) == 1:
            (layer,) = group
            results[layer.name] = function(layer, states[layer.name], damping)
            continue
        joined = replace(group[0], name="", leaves=(), geometry=None, stack=(len(group),) + group[0].stack)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(states[layer.name] for layer in group))
        result = function(joined, stacked, damping)
        for index, layer in enumerate(group):
            results[layer.name] = jax.tree.map(
                lambda new, before, old, index=index: old if new is before else new[index],
                result,
                stacked,
                states[layer.name],
            )
    return {layer.name: results[layer.name] for layer in layers}
