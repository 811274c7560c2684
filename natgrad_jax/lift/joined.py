"""Directions of all layers as one block, and of what is added to the gradient: lifted methods, lifted once more."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optax

from natgrad_jax import addresses
from natgrad_jax.base import Layers
from natgrad_jax.layers.joint import Groups, check_groups, joint, joint_evidence
from natgrad_jax.lift import evidence as evidences


def of_joint_blocks(
    layers: Layers,
    lifted: Callable[[Layers], optax.GradientTransformationExtraArgs],
    groups: Groups | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A lifted method of the blocks that those known layers make whose parameters are there.

    Args:
        layers: of the model.
        lifted: the method for layers, of which some are joint blocks.
        groups: which layers each block has; None for one block of all.

    Returns:
        The transformation.

    Raises:
        ValueError: if a group names what is no known layer.
    """
    if groups is not None:
        check_groups(layers, groups)
    lifted(joint(layers, groups))  # settings are refused now, not when there are parameters

    def found_in(tree: Any) -> Layers:
        there = evidences.present(layers, tree)
        known, rest = (tuple(layer for layer in part if layer in there) for part in (layers.known, layers.rest))
        return replace(layers, known=known, rest=rest)

    def init(params):
        return lifted(joint(found_in(params), groups)).init(params)

    def update(updates, state, params=None, *, curvature=None, **extra):
        found = found_in(updates)
        blocks = joint(found, groups)
        if curvature is not None or extra.get("request") is None:
            curvature = joint_evidence(blocks, evidences.lazy(curvature, found.blocks))
        return lifted(blocks).update(updates, state, params, curvature=curvature, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def of_what_is_added(
    layers: Layers, direction: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Give a direction with a target of its own only what was added to the gradient of the known layers.

    That is exactly zero, a penalty, or the pull of `spring`: whoever adds something passes the gradient itself on as
    the extra argument `gradient`.
    """

    def update(updates, state, params=None, *, curvature=None, gradient=None, **extra):
        if (labels := getattr(curvature, "labels", "true")) != "true":
            raise ValueError(
                f'`target="ief"` is of the empirical Fisher, but the curvature has labels={labels!r}; capture with '
                '`labels="true"`.'
            )
        if extra.get("request") is None:
            leaves, raw = addresses.flatten(updates), addresses.flatten(updates if gradient is None else gradient)
            known = [leaf.address for layer in layers.known for leaf in layer.leaves if leaf.address in leaves]
            updates = addresses.replace(updates, leaves | {name: leaves[name] - raw[name] for name in known})
        return direction.update(updates, state, params, curvature=curvature, **extra)

    return optax.GradientTransformationExtraArgs(direction.init, update)
