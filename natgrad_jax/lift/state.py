"""The state of a lifted method, its schedule, and what is asked of both."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import checks
from natgrad_jax.base import Array, Layer, Method, Scalar, ScalarOrSchedule
from natgrad_jax.lift import guards

Period = int | Array


class Metrics(NamedTuple):
    """Counters since the start, int32, and the damping of the last step; read them off the device when you like.

    Attributes:
        statistics: steps with statistics.
        refreshes: steps with a refresh; of rolling ones, groups of layers.
        rejected_statistics: layers (each copy of a stack) whose statistics were not finite and were dropped, summed
            over steps.
        rejected_refreshes: the same for refreshes and rescalings.
        skipped_refreshes: layers (each copy of a stack) that kept a basis which had hardly turned, summed over steps.
        damping: the damping used, float32.
    """

    statistics: Array
    refreshes: Array
    rejected_statistics: Array
    rejected_refreshes: Array
    skipped_refreshes: Array
    damping: Array


class Dated(NamedTuple):
    """What is applied to a layer, and the count of the step that made it.

    Attributes:
        value: the method's operator; None where it was left out of a checkpoint.
        date: int32 [S], each copy by itself; -1 for what `init` made.
        underway: the next one, if it is made in parts: a `gradual.Underway`, or None.
    """

    value: Any
    date: Array
    underway: Any = None


class NaturalGradientState(NamedTuple):
    """State of a lifted method.

    Attributes:
        count: steps done, int32.
        statistics: what is averaged of each layer, by name: `state.statistics["encoder/Dense_0"]`.
        operators: what is applied to each layer, by name: `state.operators["encoder/Dense_0"].value`.
        metrics: counters; `Metrics`, or those of a method that counts something else.
    """

    count: Array
    statistics: dict[str, Any]
    operators: dict[str, Dated]
    metrics: Any


class Schedule(NamedTuple):
    """When what is due; periods in steps, ints or traced numbers.

    Attributes:
        statistics_every: steps between statistics.
        refresh_every: steps between refreshes.
        rescale_every: steps between rescalings; they also follow every refresh. Ignored by methods without one.
        early_refresh: whether to refresh at every statistics step until the first refresh period is over.
        rolling: whether the layers take turns with their refreshes.
        tolerance: a layer whose basis has turned by no more than this keeps it; None to refresh all.
    """

    statistics_every: Period
    refresh_every: Period
    rescale_every: Period = 1
    early_refresh: bool = False
    rolling: bool = False
    tolerance: float | None = None


class Block(NamedTuple):
    """A layer and the method that preconditions it."""

    layer: Layer
    method: Method


def layers_of(blocks: Sequence[Block]) -> tuple[Layer, ...]:
    """The layers of some blocks."""
    return tuple(block.layer for block in blocks)


def is_warm(state: NaturalGradientState) -> Array:
    """Whether this is the first step, and its statistics were observed before it."""
    return (state.count == 0) & (state.metrics.statistics > 0)


def counted(
    state: NaturalGradientState, statistics: dict[str, Any], rejected: Array, held: Array | bool = False
) -> NaturalGradientState:
    """The state after a step's statistics, and the two counters."""
    metrics = state.metrics
    done = jnp.where(held, 0, jnp.array([1, 0], jnp.int32) + jnp.array([0, 1], jnp.int32) * rejected)
    metrics = metrics._replace(
        statistics=metrics.statistics + done[0], rejected_statistics=metrics.rejected_statistics + done[1]
    )
    return state._replace(statistics=state.statistics | statistics, metrics=metrics)


def kept_finite(
    layers: tuple[Layer, ...],
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    *,
    held: Array | bool = False,
) -> tuple[dict[str, Any], Array]:
    """New values where they are finite, old ones elsewhere, and how many copies of layers these are.

    Args:
        layers: the layers.
        new: {name: value}.
        old: the same.
        held: whether the old ones are kept in any case, which is no rejection.

    Returns:
        {name: value}, and the int32 number of copies of which the old one was kept since the new one is not finite.
    """
    found, rejected = {}, jnp.zeros((), jnp.int32)
    finite = guards.finite_each({layer.name: (new[layer.name], len(layer.stack)) for layer in layers})
    for layer in layers:
        name = layer.name
        if not jax.tree.leaves(new[name]):
            found[name] = new[name]
            continue
        good = finite[name]
        found[name] = guards.choose(good if held is False else good & ~held, new[name], old[name])
        rejected += jnp.sum(~good, dtype=jnp.int32)
    return found, rejected


def at_step(value: ScalarOrSchedule, count: Array) -> Scalar:
    """A setting at a step: the number, or what its schedule says; a schedule that gives none is refused."""
    if not callable(value):
        return value
    found = value(count)
    if callable(found):
        raise TypeError(
            f"The schedule {checks.shown(value)} gives a function at a step; expected a number: call it once where the "
            "optimizer is built, as `optax.constant_schedule(0.1)`."
        )
    return jnp.asarray(found)


def due(count: Array, every: Period) -> bool | Array:
    """Whether something of a period is due; a Python True if it always is."""
    if isinstance(every, int):
        return True if every == 1 else count % every == 0
    every = jnp.asarray(every)
    return count % jnp.round(every.astype(jnp.float32)).astype(jnp.int32) == 0
