"""Lift a method of one layer to an Optax transformation of the parameter tree: schedules, routing, dtype, metrics.

    1  on a statistics step:   state <- observe(state, curvature())         inside a cond
    2  on a refresh step:      state <- refresh(state, damping)             inside a cond, layers of one shape together
    3  on a rescaling step:    state <- rescale(state, curvature())         inside a cond; only methods that have it
    4  on every step:          update <- apply(state, gradient, damping)

A step that is due for none of 1-3 computes nothing of them: the curvature is called inside the branch. What comes out
not finite is dropped layer by layer, the previous value kept, and the event counted in `state.metrics`; nothing is
ever read back by the host.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgrad_jax import addresses
from natgrad_jax.base import Array, Evidence, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.diagonal import diagonal
from natgrad_jax.grouping import map_states
from natgrad_jax.layers import from_matrix, input_rows, to_matrix
from natgrad_jax.linalg import keep_finite

Tree = Any
States = dict[str, Any]
Period = int | Array


class Metrics(NamedTuple):
    """Counters since the start, int32, and the damping of the last step; read them off the device when you like.

    Attributes:
        statistics: steps with statistics.
        refreshes: steps with a refresh.
        rejected_statistics: layers whose statistics were not finite and were dropped, summed over steps.
        rejected_refreshes: layers whose refresh or rescaling was not finite and was dropped, summed over steps.
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
        metrics: counters.
    """

    count: Array
    layers: States
    metrics: Metrics


class Schedule(NamedTuple):
    """When what is due; periods in steps, ints or traced ints.

    Attributes:
        statistics_every: steps between statistics.
        refresh_every: steps between refreshes.
        rescale_every: steps between rescalings; they also follow every refresh. Ignored by methods without one.
        early_refresh: whether to refresh at every statistics step until the first refresh period is over.
    """

    statistics_every: Period
    refresh_every: Period
    rescale_every: Period = 1
    early_refresh: bool = False


def lift(
    method: Callable[..., Method],
    layers: Layers,
    *,
    damping: ScalarOrSchedule,
    decay: ScalarOrSchedule,
    schedule: Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Lift a method of one layer to a transformation of the parameter tree.

    Args:
        method: decay -> Method.
        layers: the layers of the model, from `capture.layers`.
        damping: strength in the units of F (one example), or its schedule.
        decay: weight of the old value in the averages, or its schedule.
        schedule: the periods.

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
    _check_number("damping", damping, 0.0, np.inf)
    _check_number("decay", decay, 0.0, 1.0)
    for name in ("statistics_every", "refresh_every", "rescale_every"):
        _check_number(name, getattr(schedule, name), 1, np.inf)

    def methods(decay: Scalar) -> Callable[[Layer], Method]:
        known, rest = method(decay), diagonal(decay)
        return lambda layer: rest if layer.kind == "parameter" else known

    def init(params):
        at = methods(0.0)
        states = {layer.name: at(layer).init(layer) for layer in _present(layers, params)}
        zero = (jnp.zeros((), jnp.int32) for _ in range(5))
        return NaturalGradientState(next(zero), states, Metrics(*zero, damping=jnp.zeros((), jnp.float32)))

    def update(updates, state, params=None, *, curvature=None, warm_start=None, **extra):
        del params, extra
        blocks = _present(layers, updates, state.layers)
        evidence_of = _checked(curvature, blocks)
        if warm_start is not None:
            at = methods(warm_start / (warm_start + 1))
            return updates, _observe_all(at, blocks, evidence_of(), state)
        at = methods(_at(decay, state.count))
        strength = jnp.asarray(_at(damping, state.count), jnp.float32 if not _is_wide(blocks) else jnp.float64)
        state = _advance(at, blocks, schedule, strength, evidence_of, state)
        leaves = addresses.flatten(updates)
        for layer in blocks:
            parts = {leaf.role: leaves[leaf.address] for leaf in layer.leaves}
            direction = at(layer).apply(layer, state.layers[layer.name], to_matrix(layer, parts), strength)  # 4
            found = from_matrix(layer, direction)
            for leaf in layer.leaves:
                leaves[leaf.address] = found[leaf.role].astype(parts[leaf.role].dtype)
        metrics = state.metrics._replace(damping=strength.astype(jnp.float32))
        return addresses.replace(updates, leaves), state._replace(
            count=optax.safe_increment(state.count), metrics=metrics
        )

    return optax.GradientTransformationExtraArgs(init, update)


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
    if schedule.early_refresh:
        refresh_due = _either(refresh_due, _both(count < schedule.refresh_every, statistics_due))

    def observe(state, evidence=None):
        return _observe_all(at, blocks, evidence_of() if evidence is None else evidence, state)  # 1

    def refresh(state):
        return _refresh_all(at, blocks, damping, state)  # 2

    if not any(at(layer).rescale for layer in blocks):
        return _when(refresh_due, refresh, _when(statistics_due, observe, state))

    rescale_due = _either(_due(count, schedule.rescale_every), refresh_due)

    def with_evidence(state):
        evidence = evidence_of()
        state = _when(statistics_due, lambda state: observe(state, evidence), state)
        state = _when(refresh_due, refresh, state)
        return _when(rescale_due, lambda state: _rescale_all(at, blocks, evidence, state), state)  # 3

    return _when(_either(statistics_due, rescale_due), with_evidence, state)


def _observe_all(
    at: Callable[[Layer], Method],
    blocks: tuple[Layer, ...],
    evidence: Mapping[str, Evidence],
    state: NaturalGradientState,
) -> NaturalGradientState:
    states, rejected = {}, jnp.zeros((), jnp.int32)
    for layer in blocks:
        old = state.layers[layer.name]
        new = at(layer).observe(layer, old, evidence[layer.name])
        states[layer.name], bad = keep_finite(new, old, len(layer.stack))
        rejected += bad
    metrics = state.metrics
    metrics = metrics._replace(
        statistics=metrics.statistics + 1, rejected_statistics=metrics.rejected_statistics + rejected
    )
    return state._replace(layers=states, metrics=metrics)


def _refresh_all(
    at: Callable[[Layer], Method], blocks: tuple[Layer, ...], damping: Array, state: NaturalGradientState
) -> NaturalGradientState:
    fresh = map_states(
        lambda layer, old, damping: at(layer).refresh(layer, old, damping), blocks, state.layers, damping
    )
    state = _keep_finite_refreshes(blocks, fresh, state)
    return state._replace(metrics=state.metrics._replace(refreshes=state.metrics.refreshes + 1))


def _rescale_all(
    at: Callable[[Layer], Method],
    blocks: tuple[Layer, ...],
    evidence: Mapping[str, Evidence],
    state: NaturalGradientState,
) -> NaturalGradientState:
    fresh = {}
    for layer in blocks:
        rescale = at(layer).rescale
        old = state.layers[layer.name]
        fresh[layer.name] = rescale(layer, old, evidence[layer.name]) if rescale else old
    return _keep_finite_refreshes(blocks, fresh, state)


def _keep_finite_refreshes(
    blocks: tuple[Layer, ...], fresh: States, state: NaturalGradientState
) -> NaturalGradientState:
    states, rejected = {}, state.metrics.rejected_refreshes
    for layer in blocks:
        states[layer.name], bad = keep_finite(fresh[layer.name], state.layers[layer.name], len(layer.stack))
        rejected += bad
    return state._replace(layers=states, metrics=state.metrics._replace(rejected_refreshes=rejected))


def _at(value: ScalarOrSchedule, count: Array) -> Scalar:
    """A setting at a step."""
    return value(count) if callable(value) else value


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


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuse a setting that is known now and out of its range; traced values and schedules pass."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    if not least <= np.asarray(value).item() <= most:
        bounds = (
            f"a number from {least:g} to {most:g}" if np.isfinite(most) else f"a finite number of at least {least:g}"
        )
        raise ValueError(f"`{name}` is {value}; expected {bounds}.")
    if not np.isfinite(np.asarray(value).item()):
        raise ValueError(f"`{name}` is {value}; expected a finite number.")


def _present(layers: Layers, tree: Tree, states: States | None = None) -> tuple[Layer, ...]:
    """The blocks whose parameters the tree has; those that a mask took away are left out.

    Raises:
        ValueError: if the tree is not the one of the model that the layers were found in.
    """
    leaves, hidden = addresses.flatten(tree), addresses.masked(tree)
    if not leaves and not hidden:  # a placeholder for the parameters, as `optax.tree.map_params` makes
        return tuple(layer for layer in layers.blocks if states is None or layer.name in states)
    blocks = []
    for layer in layers.blocks:
        visible = [leaf for leaf in layer.leaves if leaf.address not in hidden]
        if not visible:
            continue
        for leaf in layer.leaves:
            if leaf.address not in leaves:
                raise ValueError(
                    f"Layer {layer.name!r} has the parameter {leaf.address!r}, which the tree of parameters or gradients "
                    f"lacks; it has {sorted(leaves)}. Was the transformation built with the `layers` of another model? "
                    "A mask must hide all parameters of a layer or none."
                )
            if tuple(leaves[leaf.address].shape) != leaf.shape:
                raise ValueError(
                    f"Parameter {leaf.address!r} has shape {tuple(leaves[leaf.address].shape)}, but {leaf.shape} in the "
                    "`layers` that the transformation was built with: they are of another model."
                )
        blocks.append(layer)
    unknown = set(leaves) - {leaf.address for layer in layers.blocks for leaf in layer.leaves}
    if unknown:
        raise ValueError(
            f"The parameters {sorted(unknown)} are not in the `layers` that the transformation was built with; it "
            "knows "
            f"{sorted(leaf.address for layer in layers.blocks for leaf in layer.leaves)}. Build it with this model's layers."
        )
    return tuple(blocks)


def _checked(curvature: Any, blocks: tuple[Layer, ...]) -> Callable[[], Mapping[str, Evidence]]:
    """The evidence, lazily, with names and shapes compared to the layers.

    Raises:
        ValueError: at once if there is no curvature; when called, if it is of other layers or shapes.
    """
    if curvature is None:
        raise ValueError(
            "`curvature` is missing: call `tx.update(grads, state, params, curvature=out.curvature)`, where `out` is what "
            "`capture.value_and_grad` returned."
        )

    def evidence_of():
        evidence = curvature() if callable(curvature) else curvature
        missing = [layer.name for layer in blocks if layer.name not in evidence]
        if missing:
            raise ValueError(
                f"`curvature` has no evidence for layers {missing}; it has {sorted(evidence)}. "
                "Capture with the `layers` that the transformation was built with."
            )
        return {layer.name: _fitting(layer, evidence[layer.name]) for layer in blocks}

    return evidence_of


def _fitting(layer: Layer, evidence: Evidence) -> Evidence:
    """The evidence of a layer, if its shapes are those of the layer."""
    if layer.kind == "parameter" and (evidence.gradient is None or evidence.count is None):
        raise ValueError(f"The evidence for parameter {layer.name!r} needs `gradient` and `count`; it has {evidence}.")
    if evidence.gradient is not None:
        shape = evidence.gradient.shape
        axes = len(layer.stack)
        if shape[:axes] + shape[axes + 1 :] != layer.stack + layer.shape:
            raise ValueError(
                f"The evidence for layer {layer.name!r} has a gradient of shape {shape}; expected the draws and "
                f"{layer.stack + layer.shape}. Is it of another model?"
            )
    if evidence.inputs is not None and layer.kind != "parameter":
        rows = jax.eval_shape(lambda evidence: input_rows(layer, evidence), evidence)
        if rows.shape[-1] != layer.shape[0]:
            raise ValueError(
                f"The evidence for layer {layer.name!r} has inputs of {rows.shape[-1]} entries (bias included); expected "
                f"{layer.shape[0]}. Is it of another model?"
            )
    return evidence


def complete(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule,
    momentum: ScalarOrSchedule | None,
    weight_decay: ScalarOrSchedule | None,
    weight_decay_mask: Any | Callable[[Any], Any] | None,
) -> optax.GradientTransformationExtraArgs:
    """A direction, then weight decay, then heavy-ball momentum, then the learning rate.

    Args:
        direction: a `scale_by_*` transformation.
        learning_rate: step size, or its schedule.
        momentum: weight of the old direction in the buffer; None for no buffer.
        weight_decay: strength; None for none.
        weight_decay_mask: which parameters decay.

    Returns:
        The chain.
    """
    parts = [direction]
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
    if momentum is not None:
        parts.append(optax.trace(momentum))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def warm_start(
    tx: optax.GradientTransformationExtraArgs,
    state: Any,
    evidence_stream: Iterable[Any],
    params: Tree | None = None,
) -> Any:
    """Fill the statistics with the running mean over a pass of data, before training.

    Nothing but statistics changes: no step is counted, and no other part of a chain moves. The average so made counts
    as one full old value afterwards. As in the experiments of Goldfarb, Ren and Bahamou.

    Args:
        tx: a lifted method, or a chain with one in it.
        state: its state.
        evidence_stream: for each batch what `capture.value_and_grad` returned; or, with `params`, the evidence alone:
            `out.curvature`, or {name: Evidence}, which a jitted function can return.
        params: the parameters; needed if the stream gives evidence alone.

    Returns:
        The state of `tx` with warm statistics.

    Raises:
        ValueError: if the stream gives evidence alone and `params` is None, or the state has no lifted method.
    """

    def is_ours(node):
        return isinstance(node, NaturalGradientState)

    if not any(is_ours(node) for node in jax.tree.leaves(state, is_leaf=is_ours)):
        raise ValueError(
            f"`state` of type {type(state).__name__} holds no natural-gradient method; expected `tx.init(params)`."
        )

    @jax.jit
    def observe(state, updates, evidence, done):
        _, new = tx.update(updates, state, params, curvature=evidence, warm_start=done)
        return jax.tree.map(lambda old, new: new if is_ours(old) else old, state, new, is_leaf=is_ours)

    for done, item in enumerate(evidence_stream):
        like = getattr(item, "grad", params)
        if like is None:
            raise ValueError(
                "`params` is None, but the stream gives evidence without gradients; pass `params=variables['params']`."
            )
        evidence = getattr(item, "curvature", item)
        evidence = evidence() if callable(evidence) else evidence
        state = observe(state, jax.tree.map(jnp.zeros_like, like), evidence, jnp.asarray(done, jnp.float32))
    return state
