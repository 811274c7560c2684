"""Lift a method of one layer to an Optax transformation of the parameter tree: schedules, routing, dtype, metrics.

    1  on a statistics step:   state <- observe(state, curvature())         inside a cond
    2  on a refresh step:      state <- refresh(state, damping)             inside a cond, layers of one shape together
    3  on a rescaling step:    state <- rescale(state, curvature())         inside a cond; only methods that have it
    4  on every step:          update <- apply(state, gradient, damping)

A step that is due for none of 1-3 computes nothing of them: the curvature is called inside the branch. What comes out
not finite is dropped layer by layer, the previous value kept, and the event counted in `state.metrics`; nothing is
ever read back by the host.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.base import Array, Evidence, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.damping import AdaptiveDamping, Damping
from natgrad_jax.diagonal import diagonal
from natgrad_jax.grouping import map_states
from natgrad_jax.layers import from_matrix, to_matrix
from natgrad_jax.linalg import keep_finite

States = dict[str, Any]
Period = int | Array
Strengths = Callable[[Mapping[str, Layer], States, Array], Mapping[str, Array]]
"""Known layers, their states, damping -> the damping [] or [S] of those layers that have another one."""


class Metrics(NamedTuple):
    """Counters since the start, int32, and the damping of the last step; read them off the device when you like.

    Attributes:
        statistics: steps with statistics.
        refreshes: steps with a refresh.
        rejected_statistics: layers (each copy of a stack) whose statistics were not finite and were dropped, summed
            over steps.
        rejected_refreshes: the same for refreshes and rescalings.
        damping: the damping used, float32.
    """

    statistics: Array
    refreshes: Array
    rejected_statistics: Array
    rejected_refreshes: Array
    damping: Array


class NaturalGradientState(NamedTuple):
    """State of a lifted method.

    Attributes:
        count: steps done, int32.
        layers: the method's state of each layer by name, `state.layers["encoder/Dense_0"]`.
        metrics: counters; `Metrics`, or those of a method that counts something else.
    """

    count: Array
    layers: States
    metrics: Any


class Schedule(NamedTuple):
    """When what is due; periods in steps, ints or traced ints.

    Attributes:
        statistics_every: steps between statistics.
        refresh_every: steps between refreshes.
        rescale_every: steps between rescalings; they also follow every refresh. Ignored by methods without one.
        early_refresh: whether to refresh at every statistics step until the first refresh period is over.
        keep_warm_start: whether the first step leaves the statistics of a warm start as they are.
        as_one: whether statistics and refreshes are of one date, so that a refresh which fails takes the statistics of
            its step back; for methods that apply both.
    """

    statistics_every: Period
    refresh_every: Period
    rescale_every: Period = 1
    early_refresh: bool = False
    keep_warm_start: bool = False
    as_one: bool = False


def lift(
    method: Callable[..., Method],
    layers: Layers,
    *,
    damping: Damping,
    decay: ScalarOrSchedule,
    schedule: Schedule,
    strengths: Strengths | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lift a method of one layer to a transformation of the parameter tree.

    Args:
        method: decay -> Method.
        layers: the layers of the model, from `capture.layers`.
        damping: strength in the units of F (one example), or its schedule; if it is adaptive, only
            `control.controlled` knows it, and gives it to `update` as the extra argument `damping`.
        decay: weight of the old value in the averages, or its schedule.
        schedule: the periods.
        strengths: a rule by which `apply` is given another damping for some layers, where that of one layer depends
            on the states of others; None for the same damping everywhere.

    Returns:
        A transformation whose `update` needs the extra argument `curvature`: the one that `capture.value_and_grad`
        returns, or a mapping {name: Evidence}. Parameters of no known layer get a diagonal block. Unknown extra
        arguments are ignored, `params` may be None.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if a number is out of its range.
    """
    if not isinstance(layers, Layers):
        raise TypeError(f"`layers` is {layers!r}; expected what `capture.layers(variables, x)` returns.")
    if not isinstance(damping, AdaptiveDamping):
        checks.number("damping", damping, least=0)
    checks.number("decay", decay, least=0, below=1)
    for name in ("statistics_every", "refresh_every", "rescale_every"):
        checks.number(name, getattr(schedule, name), least=1)

    def methods(decay: Scalar) -> Callable[[Layer], Method]:
        known, rest = method(decay), diagonal(decay)
        return lambda layer: rest if layer.kind == "parameter" else known

    def init(params):
        at = methods(0.0)
        states = {layer.name: at(layer).init(layer) for layer in checks.present(layers, params)}
        zero = (jnp.zeros((), jnp.int32) for _ in range(5))
        return NaturalGradientState(next(zero), states, Metrics(*zero, damping=jnp.zeros((), jnp.float32)))

    def update(updates, state, params=None, *, curvature=None, warm_start=None, damping: Any = damping, **extra):
        del params, extra
        if isinstance(damping, AdaptiveDamping) and warm_start is None:
            raise ValueError(
                "The damping is adaptive, which takes the whole step to see: use the complete optimizer, as "
                "`ng.kfac(..., damping=ng.adaptive_damping())`, or wrap the direction in `ng.controlled(...)`."
            )
        blocks = checks.present(layers, updates)
        evidence_of = checks.lazy_evidence(curvature, blocks)
        if warm_start is not None:
            at = methods(warm_start / (warm_start + 1))
            return updates, _observe_all(at, blocks, evidence_of(), state)
        at = methods(at_step(decay, state.count))
        strength = jnp.asarray(at_step(damping, state.count), jnp.float32 if not _is_wide(blocks) else jnp.float64)
        state = _advance(at, blocks, schedule, strength, evidence_of, state)
        known = {layer.name: layer for layer in blocks if layer.kind != "parameter"}
        special = strengths(known, state.layers, strength) if strengths else {}
        found = {
            layer.name: at(layer).apply(layer, state.layers[layer.name], matrix, special.get(layer.name, strength))  # 4
            for layer, matrix in zip(blocks, to_matrices(blocks, updates).values(), strict=True)
        }
        metrics = state.metrics._replace(damping=strength.astype(jnp.float32))
        return from_matrices(blocks, found, updates), state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)), metrics=metrics
        )

    return optax.GradientTransformationExtraArgs(init, update)


def to_matrices(blocks: tuple[Layer, ...], tree: Any) -> dict[str, Array]:
    """The leaves of a tree as one matrix [S, I, O] for each block, {name: matrix}."""
    leaves = addresses.flatten(tree)
    return {
        layer.name: to_matrix(layer, {leaf.role: leaves[leaf.address] for leaf in layer.leaves}) for layer in blocks
    }


def from_matrices(blocks: tuple[Layer, ...], matrices: Mapping[str, Array], tree: Any) -> Any:
    """A tree like the given one, in its dtypes, with leaves from the matrices of the blocks."""
    leaves = addresses.flatten(tree)
    for layer in blocks:
        found = from_matrix(layer, matrices[layer.name])
        for leaf in layer.leaves:
            leaves[leaf.address] = found[leaf.role].astype(leaves[leaf.address].dtype)
    return addresses.replace(tree, leaves)


def _advance(
    at: Callable[[Layer], Method],
    blocks: tuple[Layer, ...],
    schedule: Schedule,
    damping: Array,
    evidence_of: Callable[[], Mapping[str, Evidence]],
    state: NaturalGradientState,
) -> NaturalGradientState:
    """Lines 1-3 of one step."""
    count = state.count
    statistics_due = _due(count, schedule.statistics_every)
    refresh_due = _due(count, schedule.refresh_every)
    if schedule.keep_warm_start:
        statistics_due = _both((count > 0) | (state.metrics.statistics == 0), statistics_due)
    if schedule.early_refresh:
        refresh_due = _either(refresh_due, _both(count < schedule.refresh_every, statistics_due))

    def observe(state, evidence=None):
        return _observe_all(at, blocks, evidence_of() if evidence is None else evidence, state)  # 1

    former = state.layers

    def refresh(state):
        return _refresh_all(at, blocks, damping, state, former if schedule.as_one else state.layers)  # 2

    if not any(at(layer).rescale for layer in blocks):
        return _when(refresh_due, refresh, _when(statistics_due, observe, state))

    rescale_due = _either(_due(count, schedule.rescale_every), refresh_due)

    def with_evidence(state):
        evidence = evidence_of()
        state = _when(statistics_due, lambda state: observe(state, evidence), state)
        former = state.layers
        state = _when(refresh_due, refresh, state)
        return _when(rescale_due, lambda state: _rescale_all(at, blocks, evidence, state, former), state)  # 3

    return _when(_either(statistics_due, rescale_due), with_evidence, state)


def _observe_all(
    at: Callable[[Layer], Method],
    blocks: tuple[Layer, ...],
    evidence: Mapping[str, Evidence],
    state: NaturalGradientState,
) -> NaturalGradientState:
    new = {layer.name: at(layer).observe(layer, state.layers[layer.name], evidence[layer.name]) for layer in blocks}
    return counted(state, *kept_finite(blocks, new, state.layers))


def counted(state: NaturalGradientState, states: States, rejected: Array) -> NaturalGradientState:
    """The state after a step's statistics: those of the layers, and the two counters."""
    metrics = state.metrics
    metrics = metrics._replace(
        statistics=metrics.statistics + 1, rejected_statistics=metrics.rejected_statistics + rejected
    )
    return state._replace(layers=states, metrics=metrics)


def _refresh_all(
    at: Callable[[Layer], Method],
    blocks: tuple[Layer, ...],
    damping: Array,
    state: NaturalGradientState,
    former: States,
) -> NaturalGradientState:
    """Line 2; a layer whose refresh is not finite goes back to its former state."""
    fresh = map_states(
        lambda layer, old, damping: at(layer).refresh(layer, old, damping), blocks, state.layers, damping
    )
    state = _keep_finite_refreshes(blocks, fresh, former, state)
    return state._replace(metrics=state.metrics._replace(refreshes=state.metrics.refreshes + 1))


def _rescale_all(
    at: Callable[[Layer], Method],
    blocks: tuple[Layer, ...],
    evidence: Mapping[str, Evidence],
    state: NaturalGradientState,
    former: States,
) -> NaturalGradientState:
    """Line 3; a layer without a finite scale goes back to before the refresh: a new basis is of no use without one."""
    fresh, former = dict(state.layers), dict(former)
    for layer in blocks:
        if rescale := at(layer).rescale:
            fresh[layer.name] = rescale(layer, state.layers[layer.name], evidence[layer.name])
        else:
            former[layer.name] = fresh[layer.name]
    return _keep_finite_refreshes(blocks, fresh, former, state)


def _keep_finite_refreshes(
    blocks: tuple[Layer, ...], fresh: States, former: States, state: NaturalGradientState
) -> NaturalGradientState:
    states, rejected = kept_finite(blocks, fresh, former)
    rejected += state.metrics.rejected_refreshes
    return state._replace(layers=states, metrics=state.metrics._replace(rejected_refreshes=rejected))


def kept_finite(
    blocks: tuple[Layer, ...], new: Mapping[str, Any], old: Mapping[str, Any], *, by_diagonal: bool = True
) -> tuple[States, Array]:
    """New states where they are finite, old ones elsewhere, and how many copies of layers these are.

    Whether the diagonal of a matrix tells for the whole is `linalg.keep_finite`'s; never of a parameter's own array.
    """
    states, rejected = {}, jnp.zeros((), jnp.int32)
    for layer in blocks:
        whole = not by_diagonal or layer.kind == "parameter"
        states[layer.name], bad = keep_finite(new[layer.name], old[layer.name], len(layer.stack), by_diagonal=not whole)
        rejected += bad
    return states, rejected


def at_step(value: ScalarOrSchedule, count: Array) -> Scalar:
    """A setting at a step: the number, or what its schedule says."""
    return jnp.asarray(value(count)) if callable(value) else value


def _due(count: Array, every: Period) -> bool | Array:
    """Whether something of a period is due; a Python True if it always is."""
    return True if isinstance(every, int) and every == 1 else count % every == 0


def _either(one: bool | Array, other: bool | Array) -> bool | Array:
    return True if one is True or other is True else jnp.logical_or(one, other)


def _both(one: bool | Array, other: bool | Array) -> bool | Array:
    return one if other is True else jnp.logical_and(one, other)


def _when(due: bool | Array, function: Callable[[Any], Any], state: Any) -> Any:
    """The function of the state where due; a branch only if that is not known beforehand."""
    return function(state) if due is True else jax.lax.cond(due, function, lambda state: state, state)


def _is_wide(blocks: tuple[Layer, ...]) -> bool:
    return any(layer.dtype == "float64" for layer in blocks)
