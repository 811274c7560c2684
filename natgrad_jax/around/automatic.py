"""A complete optimizer without a learning rate: length, averaging and damping from what the next batch says.

A step that is the best for a batch fits that batch, so its own batch always approves of it. The next batch does not
know it, and the slope there along the last step costs nothing: its gradient g is at the end of that step.

    1  s <- EMA(s_t d^T F d - g^T d) / EMA(d^T F d)          the share of the last steps d that was right, in [0.01, 1]
    2  damping <- 0.95 damping if s > 0.5,  damping / 0.95 if s < 0.1,  1.1 damping if L > 1.75 least L
                                                      L <- 0.95 L + 0.05 h, least L <- min(1.001 least L, L)
    3  gain <- gain / 0.9 if s > 0.9,  0.9 gain if s < 0.7                                      in [0.05, 1]
    4  m <- (1 - gain) m + gain g
    5  u <- -direction of m at the damping
    6  d <- -(g^T u) / (u^T (F + damping I) u) u             the minimiser along u of the model of this batch
       with F of a part of the batch: u^T F u is at least (g^T u)^2 / 2 (h - least h)
    7  step <- s d;  the first: d, or a fourth of it, and so on down to a 256th, until it lowers the loss of its batch
    8  if the loss is not finite or four times the last, and this batch says that the last step raised it by more than
       ten times what was foretold: step <- -(the last step), damping <- 2 damping

Line 1 is exact for a quadratic loss with the matrix F: its gradient along d is g^T d = s_t d^T F d + (slope before the
step), and the share that minimises along d is -(slope before the step) / d^T F d. With all the data in a batch s stays
near 1, the gain goes to 1 and the damping to 0: Newton's steps. With few data the averaging lengthens until the
directions hold beyond their batch. The averages of line 1 forget by 0.9 per step. Numbers by measurement, on the digits
at batches of 32 to 1797; see `experiments/defaults.py`.

The loss L enters line 2 for small batches. Where the damping has fallen too far, s is between its bounds and moves
nothing. A classifier on batches of 16 without it: at 0.10 after 100 steps, at 5 after 240 (one of eight seeds; with it
0.04 after 300, and the median as before). Its least grows by 0.1 % per step, so that harder data are not held against
it for ever.

Where F is of a part of the batch (`product_stride`), it may lack the examples that g comes from, and is far too small
along u. A loss with this slope that never falls below its least has at least the curvature of line 6. A GRU on 128
sequences without that bound, F of 32: at a loss of 0.007 the model foretold a fall of 4.5, and the loss rose to 2.6.

No batch has judged anything before the first step, so that its own does. On the curves of `make race` the first steps
without that led from a loss of 543 to up to 23,000.

Not here: the test of later steps on their own batches; see `control`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.algebra import trees
from natgrad_jax.algebra.branches import when
from natgrad_jax.around.model import (
    Model,
    change_by,
    change_of_penalty,
    check,
    minimiser,
    model_of,
    penalty,
    ratio_of,
    says,
    shortened,
)
from natgrad_jax.base import Array, ScalarOrSchedule
from natgrad_jax.lift import guards
from natgrad_jax.lift.requests import answered
from natgrad_jax.lift.restored import like_parameters
from natgrad_jax.lift.state import at_step

FIRST_DAMPING = 0.1
_FORGET, _LEAST_SHARE, _LEAST_GAIN = 0.9, 0.01, 0.05
_OF_LOSS, _HIGH, _GROWTH = 0.95, 0.75, 0.001
_DAMPINGS = (1e-8, 1e8)


class Step(NamedTuple):
    """The last step.

    Attributes:
        tree: the step, a tree like the parameters; its share of d is that of the state.
        bent: d^T F d.
        foretold: the change of the loss that the model of its batch foretold; 0 if no step was made.
        value: the loss of its batch, at its start.
    """

    tree: Any
    bent: Array
    foretold: Array
    value: Array


class Losses(NamedTuple):
    """The losses so far.

    Attributes:
        first: the size of the first one, in whose rounding a rise says nothing.
        level: their average L.
        least: the least L, growing by 0.1 % per step; infinite before the first.
    """

    first: Array
    level: Array
    least: Array

    def with_one(self, value: Array, known: Array) -> "Losses":
        """With one more, if it is known."""
        is_first = ~jnp.isfinite(self.least)
        level = jnp.where(is_first, value, _OF_LOSS * self.level + (1 - _OF_LOSS) * value)
        least = jnp.where(is_first, level, jnp.minimum(self.least + _GROWTH * jnp.abs(self.least), level))
        new = Losses(jnp.where(is_first, jnp.abs(value), self.first), level, least)
        return trees.select(known, Losses(*_narrow(*new)), self)

    def are_high(self) -> Array:
        """Whether the average is far above its least."""
        margin = _HIGH * jnp.abs(self.least) + 10 * jnp.finfo(jnp.float32).eps * self.first
        return self.level - self.least > margin  # not before the first: inf - inf


class AutomaticState(NamedTuple):
    """State of `automatic`.

    Attributes:
        count: steps done, int32.
        damping: of the last step.
        learning_rate: of the last step, its length over that of the direction.
        momentum: of the last step, 1 - gain: the weight of the old average of the gradient.
        ratio: of the last test, the change of the loss over the change foretold; NaN before the first test.
        rejected: steps that were taken back, int32.
        share: s of the last step.
        sums: of line 1, its numerator and its denominator.
        average: m, a tree like the parameters.
        last: the last step.
        losses: the losses of the batches so far.
        direction: state of the direction.
    """

    count: Array
    damping: Array
    learning_rate: Array
    momentum: Array
    ratio: Array
    rejected: Array
    share: Array
    sums: tuple[Array, Array]
    average: Any
    last: Step
    losses: Losses
    direction: Any


def automatic(
    direction: optax.GradientTransformationExtraArgs,
    *,
    damping: ScalarOrSchedule | None = None,
    l2: ScalarOrSchedule | None = None,
    l2_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A complete optimizer that chooses length, averaging and damping of its steps by itself.

    Args:
        direction: a `scale_by_*` transformation; its own damping is ignored.
        damping: strength in the units of F, or its schedule; None to start at 0.1 and adapt.
        l2: strength of l2 / 2 |theta|^2 in the objective; None for none.
        l2_mask: which parameters it holds for, as `optax.add_decayed_weights` takes it.

    Returns:
        A transformation; `update` needs `params` and, as `curvature`, the `out.curvature` of `value_and_grad` itself.
        What changes the gradient in front of it (clipping, say) changes the direction alone, if `update` is given the
        gradient as its extra argument `gradient`.

    Raises:
        ValueError: if a number is out of its range.
    """
    checks.transformation("direction", direction)
    if damping is not None:
        checks.number("damping", damping, least=0, schedule=True)
    penalty_of = None if l2 is None else penalty(l2_mask)

    def init(params):
        def number(value=0.0):  # each its own buffer, or the state could not be donated
            return jnp.full((), value, jnp.float32)

        def zeros():
            return jax.tree.map(jnp.zeros_like, params)

        return AutomaticState(
            count=jnp.zeros((), jnp.int32),
            damping=number(FIRST_DAMPING),
            learning_rate=number(),
            momentum=number(),
            ratio=number(jnp.nan),
            rejected=jnp.zeros((), jnp.int32),
            share=number(1.0),
            sums=(number(), number()),
            average=zeros(),
            last=Step(zeros(), number(), number(), number()),
            losses=Losses(number(), number(), number(jnp.inf)),
            direction=direction.init(params),
        )

    def update(updates, state, params=None, *, curvature: Any = None, gradient: Any = None, **extra):
        seen = slope = updates if gradient is None else gradient
        if extra.get("request") is not None:
            return answered(direction, updates, state, params, extra | {"curvature": curvature, "gradient": seen})
        check(curvature, params)
        like_parameters(updates, params)
        penalised, l2_now = None, 0.0
        if penalty_of is not None and l2 is not None:
            l2_now = at_step(l2, state.count)
            penalised = partial(penalty_of, strength=l2_now)
            pull = penalised(params)
            slope, updates = (trees.add(tree, pull, 1.0) for tree in (slope, updates))
        value = jnp.asarray(curvature.value(), jnp.float32)
        heard = says(curvature)
        state = _judged(state, slope, value, heard)  # 1
        state = _adapted(state, damping)  # 2, 3
        ratio, bad = _tested(state, curvature, params, value, penalised, heard)
        state = state._replace(average=_averaged(state, updates, heard))  # 4

        def forward():
            strength = state.damping + l2_now
            given = extra | {"curvature": curvature, "damping": strength, "gradient": seen}
            found, inner = direction.update(state.average, state.direction, params, **given)
            u = jax.tree.map(jnp.negative, found)  # 5
            model = _bounded(model_of(curvature, (u,), slope, penalised), curvature, value, penalised, params)
            weight = minimiser(model, state.damping, jnp.zeros(2), (True, False))[0]  # 6
            whole = state.share * weight
            first = partial(_of_first, curvature, params, u, whole, value, penalised)
            part = when(state.count == 0, lambda _: first(), jnp.ones_like(whole))
            rate, bent = part * whole, (part * weight) ** 2 * model.curvature[0, 0]
            foretold = rate * model.slope[0] + rate**2 * model.curvature[0, 0] / 2
            sound = guards.finite((foretold, bent, u), 0)
            known = heard & sound
            rate, bent, foretold = (jnp.where(known, number, 0) for number in (rate, bent, foretold))
            step = jax.tree.map(lambda leaf: jnp.where(known, rate * leaf, 0).astype(leaf.dtype), u)  # 7
            made = Step(step, *_narrow(bent, foretold, value))
            return step, state._replace(learning_rate=rate.astype(jnp.float32), last=made, direction=inner)

        def back():
            zeros = jax.tree.map(jnp.zeros_like, state.last.tree)
            made = Step(zeros, *_narrow(0.0, 0.0, state.last.value))
            step = jax.tree.map(jnp.negative, state.last.tree)
            damping = jnp.clip(2 * state.damping, *_DAMPINGS)
            return step, state._replace(
                damping=damping, learning_rate=jnp.zeros((), jnp.float32), last=made, rejected=state.rejected + 1
            )

        step, state = when(~bad, lambda _: forward(), None, otherwise=lambda _: back())  # 8
        return step, state._replace(count=jnp.asarray(optax.safe_increment(state.count)), ratio=ratio)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_first(
    curvature: Any, params: Any, u: Any, rate: Array, value: Array, penalised: Callable[[Any], Any] | None
) -> Array:
    """The share of the first step that lowers the loss of its batch: nothing else is known yet."""
    made = curvature, params, trees.scaled(u, rate), value, penalised
    falls = change_by(*made) <= 0
    return when(~falls, lambda _: shortened(*made), jnp.ones_like(value)).astype(rate.dtype)


def _bounded(model: Model, curvature: Any, value: Array, penalised: Callable[[Any], Any] | None, params: Any) -> Model:
    """The model with at least the curvature that a loss above its least has; as it is if F is of the whole batch."""
    least = getattr(curvature, "floor", None)
    if least is None:
        return model
    above = value - least
    if penalised is not None:
        above = above + trees.dot(penalised(params), params) / 2
    bent = jnp.where(above > 0, model.slope[0] ** 2 / jnp.where(above > 0, 2 * above, 1), 0)
    bent = jnp.where(jnp.isfinite(bent), bent, 0).astype(model.curvature.dtype)
    return model._replace(curvature=model.curvature.at[0, 0].max(bent))


def _judged(state: AutomaticState, slope: Any, value: Array, heard: Array) -> AutomaticState:
    """Line 1; a step of which nothing finite is known counts for nothing."""
    last, share = state.last, state.share
    end = trees.dot(slope, last.tree) / share
    known = heard & (last.foretold != 0) & jnp.isfinite(end) & jnp.isfinite(value)
    new = jnp.where(known, share * last.bent - end, 0), jnp.where(known, last.bent, 0)
    over, under = (jnp.where(known, _FORGET, 1) * old + one for old, one in zip(state.sums, new, strict=True))
    share = jnp.where(under > 0, jnp.clip(over / jnp.where(under > 0, under, 1), _LEAST_SHARE, 1), 1)
    share, over, under = _narrow(share, over, under)
    losses = state.losses.with_one(value, heard & jnp.isfinite(value))
    return state._replace(share=share, sums=(over, under), losses=losses)


def _adapted(state: AutomaticState, damping: ScalarOrSchedule | None) -> AutomaticState:
    """Lines 2 and 3, from the fourth step on."""
    s = jnp.where(state.count < 3, 0.5, state.share)  # nothing moves
    lower = jnp.where(s > 0.5, 0.95, jnp.where(s < 0.1, 1 / 0.95, 1))
    lower = jnp.where(state.losses.are_high(), 1.1, lower)
    adapted = jnp.clip(state.damping * lower, *_DAMPINGS)
    strength = adapted if damping is None else at_step(damping, state.count)
    s = jnp.where(state.count < 3, 0.8, state.share)
    gain = (1 - state.momentum) * jnp.where(s > 0.9, 1 / 0.9, jnp.where(s < 0.7, 0.9, 1))
    strength, momentum = _narrow(strength, 1 - jnp.clip(gain, _LEAST_GAIN, 1))
    return state._replace(damping=strength, momentum=momentum)


def _averaged(state: AutomaticState, gradient: Any, heard: Array) -> Any:
    """Line 4, also of a step that is taken back, whose gradient points back; not of one that is not finite."""
    gain = jnp.where(heard & jnp.isfinite(trees.dot(gradient, gradient)), 1 - state.momentum, 0)
    moved = jax.tree.map(lambda m, g: (m + gain * (g - m)).astype(m.dtype), state.average, gradient)
    return trees.select(gain > 0, moved, state.average)


def _tested(
    state: AutomaticState,
    curvature: Any,
    params: Any,
    value: Array,
    penalised: Callable[[Any], Any] | None,
    heard: Array,
) -> tuple[Array, Array]:
    """Line 8: the ratio of the last test, and whether the last step is to be taken back.

    A batch whose loss was not finite before the step, either, says nothing of the step.
    """
    last = state.last
    rise = 3 * jnp.abs(last.value) + 10 * jnp.finfo(jnp.float32).eps * state.losses.first
    is_due = heard & (last.foretold != 0) & ~(value - last.value <= rise)

    def test(_):
        start = trees.add(params, last.tree, -1.0)
        before = curvature.value(start)
        change = value - before + change_of_penalty(penalised, trees.add(params, last.tree, -0.5), last.tree)
        bad = jnp.isfinite(before) & ~(change <= 10 * jnp.abs(last.foretold))
        return ratio_of(change, last.foretold), bad

    return when(is_due, test, (state.ratio, jnp.array(False)))


def _narrow(*numbers: Any) -> Iterator[Array]:
    """Numbers in float32."""
    return (jnp.asarray(number, jnp.float32) for number in numbers)
