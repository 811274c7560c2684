"""Lift a method that learns from its own step to a complete optimizer.

    1  statistics <- observe(statistics, curvature()),  operator <- start(operator)            on a statistics step
    2  step <- -learning_rate apply(operator, what comes in), shortened to the bound            on every step
    3  both <- learn(both, the batch here, the batch at params + step)                          on a statistics step

The learning rate has to be inside, since line 3 measures the batch once more where the step leads. A layer whose
statistics come out not finite at either end is as before the step, and counted in `state.metrics`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.algebra import averages, trees
from natgrad_jax.algebra.branches import when
from natgrad_jax.base import Array, Evidence, Layer, Layers, Method, Operator, Scalar, ScalarOrSchedule, Statistics
from natgrad_jax.blocks.diagonal import diagonal
from natgrad_jax.blocks.norm import norm
from natgrad_jax.layers.parameter import widest
from natgrad_jax.lift import evidence as evidences
from natgrad_jax.lift import guards, restored
from natgrad_jax.lift.lift import from_matrices, to_matrices
from natgrad_jax.lift.requests import Observe
from natgrad_jax.lift.state import Dated, NaturalGradientState, at_step, counted, due, is_warm, kept_finite

Others = Literal["diagonal", "gradient"]
"""Parameters of no known layer: a diagonal Fisher block each, or no preconditioning."""


class Strengths(NamedTuple):
    """The settings of a step: weight of the old value in averages, and damping []."""

    decay: Scalar
    damping: Array


class End(NamedTuple):
    """One end of a step: the weight matrix [S, I, O] there, and what the batch says."""

    weights: Array
    evidence: Evidence


class Skips(NamedTuple):
    """How many copies of a layer skipped an update of what belongs to their inputs, and to their outputs, int32."""

    inputs: Array | int
    outputs: Array | int


class StepMethod(NamedTuple):
    """A method of ONE layer (with all copies of its stack), as pure functions.

    init: layer                                                         -> statistics, operator
    start: layer, statistics, operator, evidence, strengths             -> operator            made by a first batch
    apply: layer, operator, matrix, strengths                           -> direction [S, I, O]
    learn: layer, statistics, operator, end, other end, strengths       -> statistics, operator, skips
    observe: layer, statistics, evidence, decay                         -> statistics
    averages: whether there is anything that a pass over data before training could fill
    """

    init: Callable[[Layer], tuple[Statistics, Operator]]
    start: Callable[[Layer, Statistics, Operator, Evidence, Strengths], Operator]
    apply: Callable[[Layer, Operator, Array, Strengths], Array]
    learn: Callable[[Layer, Statistics, Operator, End, End, Strengths], tuple[Statistics, Operator, Skips]]
    observe: Callable[[Layer, Statistics, Evidence, Scalar], Statistics]
    averages: bool = True


class StepMetrics(NamedTuple):
    """Counters since the start, int32, summed over layers (each copy of a stack), and the damping of the last step.

    Attributes:
        statistics: steps with statistics.
        rejected_statistics: layers whose statistics were not finite; they stayed as they were before the step.
        skipped_inputs: updates skipped of what belongs to the inputs of a layer.
        skipped_outputs: the same for its outputs.
        damping: the damping used, float32.
    """

    statistics: Array
    rejected_statistics: Array
    skipped_inputs: Array
    skipped_outputs: Array
    damping: Array


def lift_stepping(
    method: StepMethod,
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    damping: ScalarOrSchedule,
    decay: ScalarOrSchedule,
    statistics_every: int | Array = 1,
    others: Others = "diagonal",
    kl_clip: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lift a method that learns from its own step.

    Args:
        method: of one layer.
        learning_rate: step size, or its schedule.
        layers: of the model, from `capture.layers`.
        damping: strength, or its schedule.
        decay: weight of the old value in the averages, or its schedule.
        statistics_every: steps between statistics.
        others: what is done with parameters of no known layer.
        kl_clip: the largest product of a step with what comes in, times the learning rate; None for none.

    Returns:
        A transformation from momentum to the step; its `update` needs `params` and, as `curvature`, the `out.curvature`
        of `value_and_grad` itself.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if a number is out of its range or a word unknown.
    """
    checks.layers(layers)
    checks.number("learning_rate", learning_rate, least=0, schedule=True)
    checks.number("damping", damping, least=0, schedule=True)
    checks.number("decay", decay, least=0, below=1, schedule=True)
    checks.period("statistics_every", statistics_every)
    rest = _MEASURED if others == "diagonal" else dict.fromkeys(_MEASURED, _UNTOUCHED)

    def method_of(layer):
        return rest.get(layer.kind, method)

    def init(params):
        statistics, operators = {}, {}
        for layer in evidences.present(layers, params):
            statistics[layer.name], value = method_of(layer).init(layer)
            operators[layer.name] = Dated(value, jnp.full(layer.stack, -1, jnp.int32))
        count, *counters = (jnp.zeros((), jnp.int32) for _ in range(5))
        metrics = StepMetrics(*counters, damping=jnp.zeros((), jnp.float32))
        return NaturalGradientState(count, statistics, operators, metrics)

    def update(updates, state, params: Any = None, *, curvature: Any = None, request=None, **extra):
        del extra
        restored.check(state, init, updates)
        blocks = evidences.present(layers, updates)
        if request is not None:
            return updates, _answer(request, method_of, blocks, state, curvature, at_step(decay, state.count))
        evidence_of = evidences.lazy(curvature, blocks, gradient=updates)
        _check(curvature, params)
        count = state.count
        strengths = Strengths(at_step(decay, count), jnp.asarray(at_step(damping, count), widest(blocks)))
        rate, matrices = at_step(learning_rate, count), to_matrices(blocks, updates)

        def stepped(operators):  # 2
            found = {}
            for layer in blocks:
                direction = method_of(layer).apply(layer, operators[layer.name].value, matrices[layer.name], strengths)
                found[layer.name] = -rate * direction
            step = from_matrices(blocks, found, updates)
            if kl_clip is None:
                return step
            return trees.scaled(step, trees.within(-rate * trees.dot(updates, step), kl_clip))

        def measured(state):
            evidence, old = evidence_of(), _paired(blocks, state)
            seen = {
                layer.name: _seen(method_of(layer), layer, evidence[layer.name], strengths, state) for layer in blocks
            }  # 1
            held = evidences.is_empty(evidence)
            good, _ = kept_finite(blocks, seen, old, held=held)
            found = stepped({name: operator for name, (_, operator) in good.items()})
            there = optax.apply_updates(params, found)
            again = evidences.lazy(partial(curvature, there), blocks)()
            ends = _ends(blocks, params, evidence), _ends(blocks, there, again)
            return found, _learned(method_of, blocks, seen, ends, strengths, state, held)  # 3

        found, state = when(
            due(count, statistics_every), measured, state, otherwise=lambda state: (stepped(state.operators), state)
        )
        metrics = state.metrics._replace(damping=strengths.damping.astype(jnp.float32))
        return found, state._replace(count=jnp.asarray(optax.safe_increment(count)), metrics=metrics)

    return optax.GradientTransformationExtraArgs(init, update)


_NO_SKIPS = Skips(0, 0)


def _averaged(block: Callable[[Scalar], Method]) -> StepMethod:
    """A block that learns nothing from a step: its statistics, applied as they are."""
    return StepMethod(
        init=block(0.0).init,
        start=lambda layer, statistics, operator, evidence, strengths: averages.mean(statistics),
        apply=lambda layer, operator, matrix, strengths: block(0.0).apply(layer, operator, matrix, strengths.damping),
        learn=lambda layer, statistics, operator, here, there, strengths: (statistics, operator, _NO_SKIPS),
        observe=lambda layer, statistics, evidence, decay: block(decay).observe(layer, statistics, evidence),
    )


_MEASURED = {"parameter": _averaged(diagonal), "norm": _averaged(norm)}
_UNTOUCHED = StepMethod(
    init=lambda layer: ((), ()),
    start=lambda layer, statistics, operator, evidence, strengths: operator,
    apply=lambda layer, operator, matrix, strengths: matrix,
    learn=lambda layer, statistics, operator, here, there, strengths: (statistics, operator, _NO_SKIPS),
    observe=lambda layer, statistics, evidence, decay: statistics,
)


def _paired(blocks: tuple[Layer, ...], state: NaturalGradientState) -> dict[str, tuple[Statistics, Dated]]:
    return {layer.name: (state.statistics[layer.name], state.operators[layer.name]) for layer in blocks}


def _seen(
    method: StepMethod, layer: Layer, evidence: Evidence, strengths: Strengths, state: NaturalGradientState
) -> tuple[Statistics, Dated]:
    """Line 1 of one layer; statistics that were observed before the first step serve it as they are."""
    statistics, operator = state.statistics[layer.name], state.operators[layer.name]
    new = method.observe(layer, statistics, evidence, strengths.decay)
    statistics = guards.choose(~is_warm(state), new, statistics)
    value = method.start(layer, statistics, operator.value, evidence, strengths)
    return statistics, Dated(value, jnp.broadcast_to(state.count, layer.stack))


def _ends(blocks: tuple[Layer, ...], tree: Any, evidence: Mapping[str, Evidence]) -> dict[str, End]:
    return {name: End(weights, evidence[name]) for name, weights in to_matrices(blocks, tree).items()}


def _learned(
    method_of: Callable[[Layer], StepMethod],
    blocks: tuple[Layer, ...],
    seen: Mapping[str, tuple[Statistics, Dated]],
    ends: tuple[Mapping[str, End], Mapping[str, End]],
    strengths: Strengths,
    state: NaturalGradientState,
    held: Array | bool,
) -> NaturalGradientState:
    """Line 3; a block that is not finite goes back to before line 1, and all if they are held."""
    new, skips = {}, Skips(*jnp.zeros(2, jnp.int32))
    for layer in blocks:
        (statistics, operator), (here, there) = seen[layer.name], (end[layer.name] for end in ends)
        statistics, value, more = method_of(layer).learn(layer, statistics, operator.value, here, there, strengths)
        new[layer.name] = statistics, operator._replace(value=value)
        skips = jax.tree.map(jnp.add, skips, more)
    if held is not False:
        skips = jax.tree.map(lambda number: jnp.where(held, 0, number), skips)
    kept, rejected = kept_finite(blocks, new, _paired(blocks, state), held=held)
    state = counted(state, {name: statistics for name, (statistics, _) in kept.items()}, rejected, held=held)
    metrics = state.metrics
    return state._replace(
        operators={name: operator for name, (_, operator) in kept.items()},
        metrics=metrics._replace(
            skipped_inputs=metrics.skipped_inputs + skips.inputs,
            skipped_outputs=metrics.skipped_outputs + skips.outputs,
        ),
    )


def _answer(
    request: Any,
    method_of: Callable[[Layer], StepMethod],
    blocks: tuple[Layer, ...],
    state: NaturalGradientState,
    curvature: Any,
    decay: Scalar,
) -> NaturalGradientState:
    """The state after a request."""
    if not isinstance(request, Observe):
        raise ValueError(
            "The operators of this method were learned from the steps that were taken and cannot be made of its "
            "statistics; keep them in the checkpoint."
        )
    decay = decay if request.decay is None else request.decay
    if not all(method_of(layer).averages for layer in blocks):
        raise ValueError(
            'There are no statistics to observe: this method averages none. With `hessian_action="average"` it does; '
            "or drop the warm start."
        )
    evidence, new = evidences.lazy(curvature, blocks)(), {}
    for layer in blocks:
        old = state.statistics[layer.name]
        new[layer.name] = method_of(layer).observe(layer, old, evidence[layer.name], decay)
    return counted(state, *kept_finite(blocks, new, state.statistics))


def _check(curvature: Any, params: Any) -> None:
    """Refuse what cannot be measured again where the step leads, or does not change along it as a loss does."""
    if params is None:
        raise ValueError(
            "`params` is None, but this method measures the batch again where its step leads: "
            "`tx.update(grads, state, params, curvature=out.curvature)`."
        )
    if isinstance(curvature, Mapping):
        raise TypeError(
            f"`curvature` is a {type(curvature).__name__} of evidence, which cannot be measured again at the new "
            "parameters; pass `out.curvature` itself, where `out` is what `capture.value_and_grad` returned."
        )
    labels = getattr(curvature, "labels", "true")
    if labels not in ("true", "sampled"):
        raise ValueError(
            f'The evidence is of `labels="{labels}"`, whose cotangents are not the gradient of any loss; this method '
            'needs their change along the step. Capture with `labels="true"`, or "sampled".'
        )
