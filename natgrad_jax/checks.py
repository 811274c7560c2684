"""Refuse what does not fit, before any work: numbers, parameter trees, evidence.

Everything here happens while a function is traced; what only the device can know is counted in `state.metrics`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from natgrad_jax import addresses
from natgrad_jax.base import Evidence, Layer, Layers
from natgrad_jax.layers import input_rows, output_rows


def number(name: str, value: Any, least: float, below: float = np.inf) -> None:
    """Refuse a setting that is known now and out of its range; traced values and schedules pass.

    Args:
        name: of the setting, for the message.
        value: what the user gave.
        least: the smallest value allowed.
        below: the value must be smaller than this.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    bounds = f"a finite number of at least {least:g}" + (f" and below {below:g}" if np.isfinite(below) else "")
    if isinstance(value, str) or np.ndim(value) != 0 or not np.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(f"`{name}` is {value!r}; expected {bounds}, or a function of the step count.")
    if not least <= float(value) < below:
        raise ValueError(f"`{name}` is {value}; expected {bounds}.")


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a word that is none of those that are known.

    Args:
        name: of the setting, for the message.
        value: what the user gave.
        choices: the words.

    Raises:
        ValueError: if it is none of them.
    """
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def present(layers: Layers, tree: Any) -> tuple[Layer, ...]:
    """The blocks whose parameters a tree has; those that a mask took away are left out.

    Args:
        layers: of the model.
        tree: parameters or gradients, possibly masked; a tree without leaves stands for any.

    Returns:
        The blocks.

    Raises:
        ValueError: if the tree is not of the model that the layers were found in.
    """
    leaves, hidden = addresses.flatten(tree), addresses.masked(tree)
    if not leaves and not hidden:  # a placeholder for the parameters, as `optax.tree.map_params` makes
        return layers.blocks
    if set(leaves) == {""} and not any(leaf.address == "" for layer in layers.blocks for leaf in layer.leaves):
        raise ValueError(
            f"The parameters are one array of shape {tuple(leaves[''].shape)} without a name; expected the tree "
            "`variables['params']`. Curvature needs to know the layers: take `optax.flatten` away."
        )

    def is_hidden(leaf):  # a mask may hide a whole module by one node
        return any(not entry or f"{leaf.address}/".startswith(f"{entry}/") for entry in hidden)

    blocks = tuple(layer for layer in layers.blocks if not all(map(is_hidden, layer.leaves)))
    for layer in blocks:
        for leaf in layer.leaves:
            if is_hidden(leaf):
                raise ValueError(
                    f"A mask hides {leaf.address!r} but not the other parameters of layer {layer.name!r}, which are "
                    "preconditioned together; mask all of them or none."
                )
            if leaf.address not in leaves:
                raise ValueError(
                    f"Layer {layer.name!r} has the parameter {leaf.address!r}, which the tree of parameters lacks; "
                    f"it has {sorted(leaves)}. Build the transformation with the `layers` of this very model."
                )
            if tuple(leaves[leaf.address].shape) != leaf.shape:
                raise ValueError(
                    f"Parameter {leaf.address!r} has shape {tuple(leaves[leaf.address].shape)}; expected {leaf.shape}, "
                    "as in the `layers`. Build the transformation with the `layers` of this very model."
                )
    known = {leaf.address for layer in layers.blocks for leaf in layer.leaves}
    if unknown := sorted(set(leaves) - known):
        raise ValueError(
            f"The `layers` do not have the parameters {unknown}; they have {sorted(known)}. "
            "Build the transformation with the `layers` of this very model."
        )
    return blocks


def lazy_evidence(curvature: Any, blocks: tuple[Layer, ...]) -> Callable[[], Mapping[str, Evidence]]:
    """A function that gives the evidence of every block, its names and shapes compared to the layers.

    Args:
        curvature: a callable, or {name: Evidence}.
        blocks: the blocks that need evidence.

    Returns:
        The function; it raises ValueError if the evidence is of other layers or shapes.

    Raises:
        TypeError: if the curvature is neither.
        ValueError: if there is no curvature.
    """
    if curvature is None:
        raise ValueError(
            "`curvature` is missing: call `tx.update(grads, state, params, curvature=out.curvature)`, "
            "where `out` is what `capture.value_and_grad` returned."
        )
    if not (callable(curvature) or isinstance(curvature, Mapping)):
        raise TypeError(
            f"`curvature` is of type {type(curvature).__name__}; expected `out.curvature`, where `out` is what "
            "`capture.value_and_grad` returned, or a mapping {name: Evidence}."
        )

    def evidence_of():
        evidence = curvature() if callable(curvature) else curvature
        missing = [layer.name for layer in blocks if layer.name not in evidence]
        if missing:
            raise ValueError(
                f"`curvature` has no evidence for {missing}; it has {sorted(evidence)}. "
                "Capture the model that the `layers` of the transformation were found in."
            )
        for layer in blocks:
            _fits(layer, evidence[layer.name])
        return {layer.name: evidence[layer.name] for layer in blocks}

    return evidence_of


def _fits(layer: Layer, evidence: Evidence) -> None:
    """Refuse an evidence whose shapes are not those of the layer."""
    advice = "Capture the model that the `layers` of the transformation were found in."
    if layer.kind == "joint":  # its members were compared one by one
        return
    if layer.kind in ("parameter", "tensor"):
        if evidence.gradient is None or evidence.count is None:
            raise ValueError(f"The evidence for {layer.name!r}, a parameter of no layer, needs `gradient` and `count`.")
    else:
        for name, rows, size in (("inputs", input_rows, layer.shape[0]), ("cotangents", output_rows, layer.shape[1])):
            if getattr(evidence, name) is None:
                continue
            shape = jax.eval_shape(lambda evidence, rows=rows: rows(layer, evidence), evidence).shape
            if shape[-1] != size or shape[: len(layer.stack)] != layer.stack:
                raise ValueError(
                    f"The evidence for layer {layer.name!r} has {name} whose rows have shape {shape}; expected "
                    f"{size} entries in each row and the stack {layer.stack} in front. {advice}"
                )
    if evidence.gradient is not None:
        shape, axes = evidence.gradient.shape, len(layer.stack)
        if shape[:axes] + shape[axes + 1 :] != layer.stack + layer.shape:
            raise ValueError(
                f"The evidence for {layer.name!r} has a gradient of shape {shape}; expected the axes "
                f"{layer.stack + layer.shape} with the draws in place {axes}. {advice}"
            )
