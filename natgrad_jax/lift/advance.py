"""What changes the state of a lifted method: a step, or a request.

    1  on a statistics step:   statistics <- observe(statistics, curvature())        inside a cond
    2  on a refresh step:      operator <- measure(operator, curvature())            inside a cond; methods that have it
                               operator <- refresh(statistics, operator, damping)    equal shapes at once
    3  on a rescaling step:    operator <- rescale(operator, curvature())            inside a cond; methods that have it

The curvature is called inside the branch, once for all lines. What comes out not finite is dropped layer by layer,
and counted. A batch of weight zero changes neither statistics nor what is measured of it,
and one that does not use a layer, since tasks take turns, changes nothing of that layer's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax.numpy as jnp

from natgrad_jax.algebra.branches import when
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.base import Array, Evidence, Layer
from natgrad_jax.layers.joint import is_joint
from natgrad_jax.lift import gradual
from natgrad_jax.lift.evidence import is_empty
from natgrad_jax.lift.grouping import map_layers
from natgrad_jax.lift.requests import Observe, Request
from natgrad_jax.lift.shares import map_shared
from natgrad_jax.lift.state import (
    Block,
    Dated,
    NaturalGradientState,
    Schedule,
    counted,
    due,
    is_warm,
    kept_finite,
    layers_of,
)
from natgrad_jax.lift.turns import Turns, in_turn, turns

EvidenceOf = Callable[[], Mapping[str, Evidence]]


def advance(
    blocks: tuple[Block, ...],
    schedule: Schedule,
    damping: Array,
    evidence_of: EvidenceOf,
    state: NaturalGradientState,
    shared_by: Devices | None = None,
) -> NaturalGradientState:
    """Lines 1-3 of one step, and what rolling refreshes have a part of at each.

    Args:
        blocks: the layers with their methods.
        schedule: when what is due.
        damping: of the step.
        evidence_of: gives the evidence of the batch.
        state: before the step.
        shared_by: the devices that share a refresh; None if each does all of it.

    Returns:
        The state with what was due; the step is not counted yet.
    """
    order = turns(blocks, schedule) if schedule.rolling else None
    if order is None or not order.gradual:
        return _advanced(blocks, schedule, damping, evidence_of, state, order, shared_by)
    state, underway = gradual.taken_out(state)
    gradual.check(order.gradual, underway)
    state, underway = gradual.proceeded(order.gradual, order.period, damping, state, underway)
    new = _advanced(blocks, schedule, damping, evidence_of, state, order, shared_by)
    return gradual.put_back(new, gradual.still_valid(underway, state.operators, new.operators))


def _advanced(
    blocks: tuple[Block, ...],
    schedule: Schedule,
    damping: Array,
    evidence_of: EvidenceOf,
    state: NaturalGradientState,
    order: Turns | None,
    shared_by: Devices | None,
) -> NaturalGradientState:
    """Lines 1-3 of one step; the order is that of rolling refreshes, None of others."""
    count = state.count
    statistics_due = due(count, schedule.statistics_every)
    refresh_due = due(count, schedule.refresh_every)
    early = _both(count < schedule.refresh_every, statistics_due) if schedule.early_refresh else False
    refresh_due = _either(refresh_due, early)

    def observe(state, evidence):
        held = is_empty(evidence)
        if any(block.method.holds for block in blocks):
            held = is_warm(state) | held
        return _followed(blocks, _observed(blocks, evidence, state, held=held))  # 1

    def refresh_of(blocks, state, evidence=None):
        measured = state if evidence is None else _measured(blocks, evidence, state)
        held = evidence is not None and is_empty(evidence)
        used = blocks if evidence is None else _used(blocks, evidence)
        return _refreshed(used, damping, measured, count, state.operators, held, schedule.tolerance, shared_by)  # 2

    refresh = partial(refresh_of, blocks)
    if order is not None:
        groups = order.due(count, _either(count == 0, early))
        refresh_due = groups[0] < groups[1]

        def refresh(state, evidence=None):
            return in_turn(order, groups, partial(refresh_of, evidence=evidence), state)

    operators, both = ("operators", "metrics"), ("statistics", "operators", "metrics")
    of_batch = both if any(block.method.follow for block in blocks) else ("statistics", "metrics")
    if not any(block.method.rescale or block.method.measure for block in blocks):
        state = _when(statistics_due, lambda state: observe(state, evidence_of()), state, of_batch)
        return _when(refresh_due, refresh, state, operators)

    rescales = any(block.method.rescale for block in blocks)
    own_due = due(count, schedule.rescale_every)
    rescale_due = _either(own_due, refresh_due) if rescales else refresh_due

    def with_evidence(state):
        evidence = evidence_of()
        state = _when(statistics_due, lambda state: observe(state, evidence), state, of_batch)
        former = state.operators
        state = _when(refresh_due, lambda state: refresh(state, evidence), state, operators)
        if not rescales:
            return state
        everywhere = own_due if schedule.rolling else True
        return _when(
            rescale_due, lambda state: _rescaled(blocks, evidence, state, former, everywhere), state, operators
        )  # 3

    return _when(_either(statistics_due, rescale_due), with_evidence, state, both)


def _when(
    predicate: bool | Array,
    function: Callable[[NaturalGradientState], NaturalGradientState],
    state: NaturalGradientState,
    fields: Sequence[str],
) -> NaturalGradientState:
    """`when` of a function that changes these fields alone: XLA copies what a branch hands through."""

    def changed(part):
        new = function(state._replace(**part))
        return {name: getattr(new, name) for name in fields}

    return state._replace(**when(predicate, changed, {name: getattr(state, name) for name in fields}))


def _observed(
    blocks: tuple[Block, ...], evidence: Mapping[str, Evidence], state: NaturalGradientState, held: Array | bool = False
) -> NaturalGradientState:
    """Line 1; a layer whose statistics are not finite keeps its own, and all keep theirs where they are held."""
    new = dict(state.statistics)
    for layer, method in _used(blocks, evidence):
        name, statistics = layer.name, state.statistics[layer.name]
        if method.couple is None:
            new[name] = method.observe(layer, statistics, evidence[name])
        else:
            new[name] = method.couple(layer, statistics, state.operators[name].value, evidence[name])
    return counted(state, *kept_finite(layers_of(blocks), new, state.statistics, held=held), held=held)


def _used(blocks: tuple[Block, ...], evidence: Mapping[str, Evidence]) -> list[Block]:
    """The blocks that the batch says something of; those of tasks whose turn it is not keep what they have."""
    return [block for block in blocks if block.layer.name in evidence]


def _followed(blocks: Sequence[Block], state: NaturalGradientState) -> NaturalGradientState:
    """What operators have of the statistics for nothing."""
    operators = dict(state.operators)
    for layer, method in blocks:
        if method.follow is not None:
            old = operators[layer.name]
            value = method.follow(layer, state.statistics[layer.name], old.value)
            operators[layer.name] = old._replace(value=value)
    return state._replace(operators=operators)


def _measured(
    blocks: tuple[Block, ...], evidence: Mapping[str, Evidence], state: NaturalGradientState
) -> NaturalGradientState:
    """What operators are made of that no average holds."""
    operators = dict(state.operators)
    for layer, method in _used(blocks, evidence):
        if method.measure is not None:
            old = operators[layer.name]
            operators[layer.name] = old._replace(value=method.measure(layer, old.value, evidence[layer.name]))
    return state._replace(operators=operators)


def _refreshed(
    blocks: Sequence[Block],
    damping: Array,
    state: NaturalGradientState,
    date_now: Array,
    former: Mapping[str, Dated],
    held: Array | bool = False,
    tolerance: float | None = None,
    shared_by: Devices | None = None,
) -> NaturalGradientState:
    """Line 2; a layer whose refresh is not finite goes back to its former operator, and all where they are held.

    With a tolerance, layers of one signature keep their bases where none of them has turned by more; where devices
    share the refresh, none of those that one device has.
    """
    method_of = {layer.name: method for layer, method in blocks}
    known = [layer for layer, _ in blocks if layer.is_known]
    values = {name: operator.value for name, operator in state.operators.items()}
    kept: dict[str, Array] = {}
    if known:
        method = method_of[known[0].name]  # one for all of them

        def refresh(layer, statistics, operator):
            def afresh():
                return method.refresh(layer, statistics, operator, damping.astype(layer.dtype))

            if tolerance is None or method.turned is None:
                return afresh(), None
            stays = jnp.all(method.turned(layer, statistics, operator) <= tolerance)
            return when(~stays, lambda _: afresh(), operator), jnp.broadcast_to(stays, layer.stack)

        lifted = map_layers
        if shared_by is not None and not any(map(is_joint, known)):
            solved_by_all = shared_by.rows and method.measure is not None  # the kernel is on every device
            lifted = lifted if solved_by_all else partial(map_shared, by=shared_by)
        found = lifted(refresh, known, state.statistics, values)
        values |= {name: value for name, (value, _) in found.items()}
        kept = {name: stays for name, (_, stays) in found.items() if stays is not None}
    fresh = dict(state.operators)
    for layer, _ in blocks:
        date, old = _dated(layer, date_now), state.operators[layer.name].date
        date = jnp.where(kept[layer.name], old, date) if layer.name in kept else date
        fresh[layer.name] = Dated(values[layer.name], date)
    fresh = _followed(blocks, state._replace(operators=fresh)).operators
    state = _kept_operators(blocks, fresh, former, state, held)
    counts = int(bool(known) or len(blocks) == len(state.operators))  # a turn without layers is none
    done = counts if held is False else jnp.where(held, 0, counts)
    skipped = sum((jnp.sum(stays, dtype=jnp.int32) for stays in kept.values()), state.metrics.skipped_refreshes)
    return state._replace(
        metrics=state.metrics._replace(refreshes=state.metrics.refreshes + done, skipped_refreshes=skipped)
    )


def _rescaled(
    blocks: tuple[Block, ...],
    evidence: Mapping[str, Evidence],
    state: NaturalGradientState,
    former: Mapping[str, Dated],
    everywhere: bool | Array = True,
) -> NaturalGradientState:
    """Line 3; a layer without a finite scale goes back to before the refresh: a new basis is of no use without one.

    Where it is not due everywhere, those layers have it that this step has refreshed.
    """
    fresh, rescaled = dict(state.operators), []
    for layer, method in _used(blocks, evidence):
        if method.rescale is not None:
            old, rescale = state.operators[layer.name], method.rescale
            needed = _either(everywhere, jnp.any(old.date == state.count))
            value = when(
                needed,
                lambda value, layer=layer, rescale=rescale: rescale(layer, value, evidence[layer.name]),
                old.value,
            )
            fresh[layer.name] = old._replace(value=value)
            rescaled.append(Block(layer, method))
    return _kept_operators(rescaled, fresh, former, state, is_empty(evidence))


def _kept_operators(
    blocks: Sequence[Block],
    fresh: Mapping[str, Dated],
    former: Mapping[str, Dated],
    state: NaturalGradientState,
    held: Array | bool = False,
) -> NaturalGradientState:
    operators, rejected = kept_finite(layers_of(blocks), fresh, former, held=held)
    rejected = rejected if held is False else jnp.where(held, 0, rejected)
    rejected += state.metrics.rejected_refreshes
    metrics = state.metrics._replace(rejected_refreshes=rejected)
    return state._replace(operators={**state.operators, **operators}, metrics=metrics)


def answer(
    request: Request,
    blocks: tuple[Block, ...],
    evidence_of: EvidenceOf | None,
    strength_at: Callable[[Array], Array],
    state: NaturalGradientState,
    shared_by: Devices | None = None,
) -> NaturalGradientState:
    """The state after a request; what is underway has been taken out.

    Args:
        request: what is asked for.
        blocks: the layers with their methods.
        evidence_of: gives the evidence of a batch; None if there is none.
        strength_at: the damping at a step.
        state: before.
        shared_by: as `advance` takes it.

    Returns:
        The state with other statistics, or with other operators.

    Raises:
        ValueError: if the operators cannot be made of what there is.
    """
    if isinstance(request, Observe):
        assert evidence_of is not None, "asked for by `lift`"
        evidence = evidence_of()
        return _observed(blocks, evidence, state, held=is_empty(evidence))
    missing = sorted(set(state.operators) - {block.layer.name for block in blocks})
    if missing:
        raise ValueError(f"The layers of {missing} are not known without the parameters: pass `params`.")
    measuring = [layer.name for layer, method in blocks if method.rescale or method.measure]
    if measuring and evidence_of is None:
        raise ValueError(
            f"The operators of {measuring} hold what a batch measured, which the statistics do not have: "
            "keep the operators in the checkpoint, or give a batch, `ng.refresh(tx, state, out.curvature)`."
        )
    operators, date = dict(state.operators), state.count
    for layer, method in blocks:
        old = operators[layer.name]
        if old.value is None:  # rebuilt as of the date of the last refresh
            operators[layer.name] = old._replace(value=method.init(layer)[1])
            date = jnp.maximum(jnp.max(jnp.stack([jnp.max(each.date) for each in operators.values()])), 0)
    former = state._replace(operators=operators)
    evidence = evidence_of() if measuring and evidence_of else {}
    state = _measured(blocks, evidence, former) if evidence else former
    state = _refreshed(blocks, strength_at(date), state, date, former.operators, shared_by=shared_by)
    return _rescaled(blocks, evidence, state, former.operators) if evidence else state


def _dated(layer: Layer, date: Array) -> Array:
    return jnp.broadcast_to(date.astype(jnp.int32), layer.stack)


def _either(one: bool | Array, other: bool | Array) -> bool | Array:
    return True if one is True or other is True else jnp.logical_or(one, other)


def _both(one: bool | Array, other: bool | Array) -> bool | Array:
    return one if other is True else jnp.logical_and(one, other)
