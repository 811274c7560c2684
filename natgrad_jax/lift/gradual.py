"""Layers whose refresh is too long for one step have a part of it at each.

    1  work <- begin(statistics, operator, damping)                  at the step after one where a refresh is due
    2  work <- proceed(statistics, operator, work, part)             at every step, a part
    3  operator <- end(statistics, operator, work)                   with the last part, where the next refresh is due

So there is a new operator as often as without, of statistics that are up to a period older, and no step has more than
its share of the work. What was not begun, as behind a checkpoint without operators, is not ended either. Nor is what
was begun from an operator that a whole refresh has replaced since: the new one is of later statistics, and its columns
are in another order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.branches import when
from natgrad_jax.base import Array, Gradual, Layer, Statistics
from natgrad_jax.lift import guards
from natgrad_jax.lift.grouping import map_layers
from natgrad_jax.lift.state import Block, Dated, NaturalGradientState

_NEVER = -(2**30)


class Underway(NamedTuple):
    """An operator that is being made.

    Attributes:
        work: what the method has so far, a tree of arrays [S, ...].
        begun: the count of the step that began it, int32 [S].
    """

    work: Any
    begun: Array


def at_rest(blocks: Sequence[Block], parts: int) -> dict[str, Underway]:
    """Where nothing was begun yet.

    Args:
        blocks: layers, and methods with a refresh in parts.
        parts: of a refresh.

    Returns:
        Zeros of each layer.
    """
    found = {}
    for layer, method in blocks:

        def begun(layer=layer, method=method):
            statistics, operator = method.init(layer)
            return _gradual(method).begin(layer, statistics, operator, jnp.zeros((), layer.dtype), parts)

        work = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(begun))
        found[layer.name] = Underway(work, jnp.full(layer.stack, _NEVER, jnp.int32))
    return found


def taken_out(state: NaturalGradientState) -> tuple[NaturalGradientState, dict[str, Underway]]:
    """A state without what is being made, and that."""
    underway = {name: old.underway for name, old in state.operators.items() if old.underway is not None}
    operators = {name: old._replace(underway=None) for name, old in state.operators.items()}
    return state._replace(operators=operators), underway


def check(blocks: Sequence[Block], underway: Mapping[str, Underway]) -> None:
    """Refuse a state that was made without rolling refreshes.

    Args:
        blocks: the layers whose refresh is in parts.
        underway: what the state has of them.

    Raises:
        ValueError: with the name of the first layer that has nothing.
    """
    if missing := [block.layer.name for block in blocks if block.layer.name not in underway]:
        raise ValueError(
            f"The state has no `operators[{missing[0]!r}].underway`: it was made without `rolling`, or by "
            "`ng.without_operators`. `state = ng.refresh(tx, state, out.curvature, params=params)` adds it."
        )


def put_back(state: NaturalGradientState, underway: Mapping[str, Underway]) -> NaturalGradientState:
    """The state with what is being made."""
    operators = {name: old._replace(underway=underway.get(name)) for name, old in state.operators.items()}
    return state._replace(operators=operators)


def dropped(underway: Mapping[str, Underway]) -> dict[str, Underway]:
    """What is being made as if it had not been begun."""
    return {name: each._replace(begun=jnp.full_like(each.begun, _NEVER)) for name, each in underway.items()}


def still_valid(
    underway: Mapping[str, Underway], before: Mapping[str, Dated], after: Mapping[str, Dated]
) -> dict[str, Underway]:
    """What is being made, as if not begun where whole refreshes have replaced the operator that it was begun from.

    Args:
        underway: of some layers.
        before: the operators before these refreshes.
        after: those after them.

    Returns:
        The same with other dates.
    """

    def of_layer(name: str, each: Underway) -> Underway:
        return each._replace(begun=jnp.where(after[name].date == before[name].date, each.begun, _NEVER))

    return {name: of_layer(name, each) for name, each in underway.items()}


def proceeded(
    blocks: Sequence[Block],
    parts: int,
    damping: Array,
    state: NaturalGradientState,
    underway: Mapping[str, Underway],
) -> tuple[NaturalGradientState, dict[str, Underway]]:
    """Lines 1-3 of one step; layers of one signature at once.

    Args:
        blocks: layers, and methods with a refresh in parts.
        parts: of a refresh, one for each step of a period.
        damping: of the step.
        state: before the step.
        underway: of these layers.

    Returns:
        The state, with new operators behind a last part, those that are not finite dropped and counted; and what is
        underway.
    """
    count, part = state.count, (state.count - 1) % parts
    layers, (gradual, *_) = [layer for layer, _ in blocks], [_gradual(method) for _, method in blocks]

    def proceed(layer: Layer, statistics: Statistics, pair: tuple[Dated, Underway]) -> Any:
        dated, (work, begun) = pair
        old, strength = dated.value, damping.astype(layer.dtype)
        work = when(part == 0, lambda _: gradual.begin(layer, statistics, old, strength, parts), work)  # 1
        begun = jnp.where(part == 0, count, begun)
        going = jnp.all(begun == count - part)
        work = when(going, lambda work: gradual.proceed(layer, statistics, old, work, part, parts), work)  # 2

        def ended(dated):
            new = gradual.end(layer, statistics, dated.value, work)  # 3
            good = jnp.broadcast_to(guards.finite(new, len(layer.stack)), layer.stack)
            date = jnp.broadcast_to(count, layer.stack)
            return guards.choose(good, Dated(new, date), dated), ~good

        ends = going & (part == parts - 1)
        dated, rejected = when(ends, ended, dated, lambda dated: (dated, jnp.zeros(layer.stack, bool)))
        return dated, Underway(work, begun), rejected, jnp.broadcast_to(ends, layer.stack)

    pairs = {layer.name: (state.operators[layer.name], underway[layer.name]) for layer in layers}
    found = map_layers(proceed, layers, state.statistics, pairs)
    metrics = state.metrics
    rejected = sum(jnp.sum(each[2], dtype=jnp.int32) for each in found.values())
    done = jnp.any(jnp.stack([jnp.any(each[3]) for each in found.values()]))
    state = state._replace(
        operators={**state.operators, **{name: each[0] for name, each in found.items()}},
        metrics=metrics._replace(
            refreshes=metrics.refreshes + done, rejected_refreshes=metrics.rejected_refreshes + rejected
        ),
    )
    return state, {name: each[1] for name, each in found.items()}


def _gradual(method: Any) -> Gradual:
    assert method.gradual is not None, "chosen by `turns`"
    return method.gradual
