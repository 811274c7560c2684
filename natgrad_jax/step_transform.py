"""Lift a method that learns from its own step to a complete optimizer.

    1  state <- observe(state, curvature())                                on a statistics step
    2  step <- -learning_rate apply(state, what comes in)                  on every step
    3  state <- learn(state, the batch here, the batch at params + step)   on a statistics step

The learning rate has to be inside, since line 3 measures the batch once more where the step leads. A layer whose
statistics come out not finite at either end is as before the step, and counted in `state.metrics`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.base import Array, Evidence, Layer, Layers, Scalar, ScalarOrSchedule
from natgrad_jax.diagonal import diagonal
from natgrad_jax.transform import NaturalGradientState, at_step, counted, from_matrices, kept_finite, to_matrices

Others = Literal["diagonal", "gradient"]
"""Parameters of no known layer: a diagonal Fisher block each, or no preconditioning."""
OTHERS = get_args(Others)


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

    init: layer                                      -> state
    warm: layer, state, evidence, decay              -> state       statistics of a warm start
    observe: layer, state, evidence, strengths       -> state
    apply: layer, state, matrix, strengths                  -> direction [S, I, O]
    learn: layer, state, end, other end, strengths   -> state, skips
    """

    init: Callable[[Layer], Any]
    warm: Callable[[Layer, Any, Evidence, Scalar], Any]
    observe: Callable[[Layer, Any, Evidence, Strengths], Any]
    apply: Callable[[Layer, Any, Array, Strengths], Array]
    learn: Callable[[Layer, Any, End, End, Strengths], tuple[Any, Skips]]


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


States = Mapping[str, Any]


def lift_stepping(
    method: StepMethod,
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    damping: ScalarOrSchedule,
    decay: ScalarOrSchedule,
    statistics_every: int | Array = 1,
    others: Others = "diagonal",
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

    Returns:
        A transformation from momentum to the step; its `update` needs `params` and, as `curvature`, the `out.curvature`
        of `value_and_grad` itself.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if a number is out of its range or a word unknown.
    """
    if not isinstance(layers, Layers):
        raise TypeError(f"`layers` is {layers!r}; expected what `capture.layers(variables, x)` returns.")
    checks.number("learning_rate", learning_rate, least=0)
    checks.number("damping", damping, least=0)
    checks.number("decay", decay, least=0, below=1)
    checks.number("statistics_every", statistics_every, least=1)
    checks.choice("others", others, OTHERS)
    rest = _DIAGONAL if others == "diagonal" else _UNTOUCHED

    def at(layer):
        return rest if layer.kind == "parameter" else method

    def init(params):
        states = {layer.name: at(layer).init(layer) for layer in checks.present(layers, params)}
        count, *counters = (jnp.zeros((), jnp.int32) for _ in range(5))
        return NaturalGradientState(count, states, StepMetrics(*counters, damping=jnp.zeros((), jnp.float32)))

    def update(updates, state, params: Any = None, *, curvature: Any = None, warm_start=None, **extra):
        del extra
        blocks = checks.present(layers, updates)
        evidence_of = checks.lazy_evidence(curvature, blocks)
        if warm_start is not None:
            return updates, _warmed(at, blocks, evidence_of(), state, warm_start / (warm_start + 1))
        _check(curvature, params)
        count = state.count
        wide = jnp.float64 if any(layer.dtype == "float64" for layer in blocks) else jnp.float32
        strengths = Strengths(at_step(decay, count), jnp.asarray(at_step(damping, count), wide))
        rate, matrices = at_step(learning_rate, count), to_matrices(blocks, updates)

        def stepped(states):  # 2
            found = {}
            for layer in blocks:
                direction = at(layer).apply(layer, states[layer.name], matrices[layer.name], strengths)
                found[layer.name] = -rate * direction
            return from_matrices(blocks, found, updates)

        def measured(state):
            evidence = evidence_of()
            is_warm = (count == 0) & (state.metrics.statistics > 0)
            first = strengths._replace(decay=jnp.where(is_warm, 1, strengths.decay))  # that a warm start is kept
            seen = {}
            for layer in blocks:
                name = layer.name
                seen[name] = at(layer).observe(layer, state.layers[name], evidence[name], first)  # 1
            found = stepped(_guarded(blocks, seen, state.layers)[0])
            there = optax.apply_updates(params, found)
            again = checks.lazy_evidence(partial(curvature, there), blocks)()
            here_ends, there_ends = _ends(blocks, params, evidence), _ends(blocks, there, again)
            return found, _learned(at, blocks, seen, here_ends, there_ends, strengths, state)  # 3

        if isinstance(statistics_every, int) and statistics_every == 1:
            found, state = measured(state)
        else:
            due = count % statistics_every == 0
            found, state = jax.lax.cond(due, measured, lambda state: (stepped(state.layers), state), state)
        metrics = state.metrics._replace(damping=strengths.damping.astype(jnp.float32))
        return found, NaturalGradientState(jnp.asarray(optax.safe_increment(count)), state.layers, metrics)

    return optax.GradientTransformationExtraArgs(init, update)


_NO_SKIPS = Skips(0, 0)
_DIAGONAL = StepMethod(
    init=diagonal(0.0).init,
    warm=lambda layer, state, evidence, decay: diagonal(decay).observe(layer, state, evidence),
    observe=lambda layer, state, evidence, strengths: diagonal(strengths.decay).observe(layer, state, evidence),
    apply=lambda layer, state, matrix, strengths: diagonal(0.0).apply(layer, state, matrix, strengths.damping),
    learn=lambda layer, state, here, there, strengths: (state, _NO_SKIPS),
)
_UNTOUCHED = StepMethod(
    init=lambda layer: (),
    warm=lambda layer, state, evidence, decay: (),
    observe=lambda layer, state, evidence, strengths: (),
    apply=lambda layer, state, matrix, strengths: matrix,
    learn=lambda layer, state, here, there, strengths: (state, _NO_SKIPS),
)


def _ends(blocks: tuple[Layer, ...], tree: Any, evidence: Mapping[str, Evidence]) -> dict[str, End]:
    return {name: End(weights, evidence[name]) for name, weights in to_matrices(blocks, tree).items()}


def _learned(
    at: Callable[[Layer], StepMethod],
    blocks: tuple[Layer, ...],
    seen: States,
    here: Mapping[str, End],
    there: Mapping[str, End],
    strengths: Strengths,
    state: NaturalGradientState,
) -> NaturalGradientState:
    """Line 3; a block that is not finite goes back to before line 1."""
    states, skips = {}, Skips(*jnp.zeros(2, jnp.int32))
    for layer in blocks:
        name = layer.name
        states[name], more = at(layer).learn(layer, seen[name], here[name], there[name], strengths)
        skips = jax.tree.map(jnp.add, skips, more)
    state = _counted(blocks, states, state)
    metrics = state.metrics
    return state._replace(
        metrics=metrics._replace(
            skipped_inputs=metrics.skipped_inputs + skips.inputs,
            skipped_outputs=metrics.skipped_outputs + skips.outputs,
        )
    )


def _warmed(
    at: Callable[[Layer], StepMethod],
    blocks: tuple[Layer, ...],
    evidence: Mapping[str, Evidence],
    state: NaturalGradientState,
    decay: Scalar,
) -> NaturalGradientState:
    states = {
        layer.name: at(layer).warm(layer, state.layers[layer.name], evidence[layer.name], decay) for layer in blocks
    }
    return _counted(blocks, states, state)


def _counted(blocks: tuple[Layer, ...], states: States, state: NaturalGradientState) -> NaturalGradientState:
    """The new states where they are finite, and the counters of statistics."""
    return counted(state, *_guarded(blocks, states, state.layers))


_guarded = partial(kept_finite, by_diagonal=False)
"""An inverse that BFGS has updated may overflow anywhere."""


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
