"""Lift a method of one layer to an Optax transformation of the parameter tree: schedules, routing, dtype, metrics.

    1-3  statistics, operators <- what the schedule says is due                                  `advance`
    4    update <- apply(operator, gradient, damping)                                            on every step

A step that is due for none of 1-3 computes nothing of them. Nothing is ever read back by the host.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.blocks.diagonal import diagonal
from natgrad_jax.blocks.norm import norm
from natgrad_jax.layers.parameter import widest
from natgrad_jax.layers.rows import from_matrix, to_matrix
from natgrad_jax.lift import evidence as evidences
from natgrad_jax.lift import gradual, restored
from natgrad_jax.lift.advance import advance, answer
from natgrad_jax.lift.meshes import on_any_mesh
from natgrad_jax.lift.requests import Observe, Request
from natgrad_jax.lift.state import (
    Block,
    Dated,
    Metrics,
    NaturalGradientState,
    Schedule,
    at_step,
    layers_of,
)
from natgrad_jax.lift.turns import turns

Strengths = Callable[[Mapping[str, Layer], Mapping[str, Any], Array], Mapping[str, Array]]
"""Known layers, their operators, damping -> the damping [] or [S] of those layers that have another one."""


def lift(
    method: Callable[..., Method],
    layers: Layers,
    *,
    damping: ScalarOrSchedule | None,
    decay: ScalarOrSchedule | tuple[ScalarOrSchedule, ...],
    schedule: Schedule,
    strengths: Strengths | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lift a method of one layer to a transformation of the parameter tree.

    Args:
        method: decay -> Method; of several decays, if there are several.
        layers: the layers of the model, from `capture.layers`.
        damping: strength in the units of F (one example), or its schedule; None if whoever holds the direction gives
            it to `update`, as the extra argument `damping`.
        decay: weight of the old value in the averages, or its schedule; or a tuple of such, of which the first is that
            of the statistics.
        schedule: the periods.
        strengths: a rule by which `apply` is given another damping for some layers, where that of one layer depends
            on the operators of others; None for the same damping everywhere.

    Returns:
        A transformation whose `update` needs the extra argument `curvature`: the one that `capture.value_and_grad`
        returns, or a mapping {name: Evidence}. Parameters of no known layer get a diagonal block. Another extra
        argument is `shared_by`, the `Devices` that share refreshes and sums over examples; unknown ones are ignored,
        `params` may be None.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if a number is out of its range.
    """
    checks.layers(layers)
    decays = decay if isinstance(decay, tuple) else (decay,)
    if damping is not None:
        checks.number("damping", damping, least=0, schedule=True)
    for each in decays:
        checks.number("decay", each, least=0, below=1, schedule=True)
    for name in ("statistics_every", "refresh_every", "rescale_every"):
        checks.period(name, getattr(schedule, name))
    if schedule.rolling:
        for name in ("statistics_every", "refresh_every"):
            checks.static(name, getattr(schedule, name), "which layers take turns (`rolling`)")

    def blocks_of(tree: Any, decays: tuple[Scalar, ...], devices: Devices | None = None) -> tuple[Block, ...]:
        known, others = method(*decays), {"parameter": diagonal(decays[0]), "norm": norm(decays[0])}
        there = (replace(layer, devices=devices) for layer in evidences.present(layers, tree))
        return tuple(Block(layer, others.get(layer.kind, known)) for layer in there)

    def at_rest(blocks: tuple[Block, ...]) -> dict[str, gradual.Underway]:
        if not schedule.rolling:
            return {}
        order = turns(blocks, schedule)
        return gradual.at_rest(order.gradual, order.period)

    def init(params):
        statistics, operators, blocks = {}, {}, blocks_of(params, (0.0,) * len(decays))
        underway = at_rest(blocks)
        for layer, method in blocks:
            statistics[layer.name], value = method.init(layer)
            operators[layer.name] = Dated(value, jnp.full(layer.stack, -1, jnp.int32), underway.get(layer.name))
        zero = (jnp.zeros((), jnp.int32) for _ in range(6))
        return NaturalGradientState(
            next(zero), statistics, operators, Metrics(*zero, damping=jnp.zeros((), jnp.float32))
        )

    def update(
        updates, state, params=None, *, curvature=None, request=None, damping: Any = damping, shared_by=None, **extra
    ):
        del params, extra
        restored.check(state, init, updates)
        count = state.count
        decays_now = tuple(at_step(each, count) for each in decays)
        if request is not None:
            blocks = blocks_of(updates, _asked(request, decays_now), shared_by)
            optional = not isinstance(request, Observe)
            evidence_of = evidences.lazy(curvature, layers_of(blocks), optional=optional, partly=True)
            rule = state.metrics.damping if damping is None else damping
            strength_at = partial(_strength, rule, blocks)
            known = None if curvature is None else evidence_of
            state, underway = gradual.taken_out(state)
            state = answer(request, blocks, known, strength_at, state, shared_by)
            underway = gradual.dropped(underway) if optional else underway
            return updates, gradual.put_back(state, at_rest(blocks) | underway)
        if damping is None:
            raise ValueError(
                "The damping is adaptive, which takes the whole step to see: use the complete optimizer, as "
                "`ng.kfac(..., damping=ng.adaptive_damping())`, or wrap the direction in `ng.controlled(...)`."
            )
        blocks = blocks_of(updates, decays_now, shared_by)
        strength = _strength(damping, blocks, count)
        evidence_of = evidences.lazy(curvature, layers_of(blocks), gradient=updates, partly=True)
        state = advance(blocks, schedule, strength, evidence_of, state, shared_by)
        operators = {name: operator.value for name, operator in state.operators.items()}
        known = {layer.name: layer for layer, _ in blocks if layer.is_known}
        special = strengths(known, operators, strength) if strengths else {}
        matrices, found = to_matrices(layers_of(blocks), updates), {}
        for layer, method in blocks:
            name = layer.name
            own = jnp.asarray(special.get(name, strength), layer.dtype)
            found[name] = method.apply(layer, operators[name], matrices[name], own)  # 4
        metrics = state.metrics._replace(damping=strength.astype(jnp.float32))
        return from_matrices(layers_of(blocks), found, updates), state._replace(
            count=jnp.asarray(optax.safe_increment(count)), metrics=metrics
        )

    return on_any_mesh(optax.GradientTransformationExtraArgs(init, update))


def to_matrices(layers: tuple[Layer, ...], tree: Any) -> dict[str, Array]:
    """The leaves of a tree as one matrix [S, I, O] for each layer, {name: matrix}."""
    leaves = addresses.flatten(tree)
    if layers and not leaves:
        raise ValueError(
            f"`updates` is of type {type(tree).__name__} and has no arrays; expected the gradient, a tree like the "
            "parameters: `tx.update(out.grad, state, params, curvature=out.curvature)`."
        )
    return {
        layer.name: to_matrix(layer, {leaf.role: leaves[leaf.address] for leaf in layer.leaves}) for layer in layers
    }


def from_matrices(layers: tuple[Layer, ...], matrices: Mapping[str, Array], tree: Any) -> Any:
    """A tree like the given one, in its dtypes, with leaves from the matrices of the layers."""
    leaves = addresses.flatten(tree)
    for layer in layers:
        found = from_matrix(layer, matrices[layer.name])
        for leaf in layer.leaves:
            leaves[leaf.address] = found[leaf.role].astype(leaves[leaf.address].dtype)
    return addresses.replace(tree, leaves)


def _asked(request: Request, decays: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """The decays of a request, which may bring one for the statistics."""
    given = request.decay if isinstance(request, Observe) else None
    return decays if given is None else (given, *decays[1:])


def _strength(damping: ScalarOrSchedule, blocks: tuple[Block, ...], count: Array) -> Array:
    """The damping at a step, in the dtype of the widest curvature."""
    return jnp.asarray(at_step(damping, count), widest(layers_of(blocks)))
