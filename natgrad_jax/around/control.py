"""How far to go along a direction: what the quadratic model of the loss says.

    1  g <- gradient + l2 theta                               of the objective h + l2 / 2 |theta|^2
    2  u <- -direction of g at damping + l2,  v <- the last step
    3  B <- V^T (F + l2 I) V,  b <- V^T g,  V = [u, v]        F by exact products on the batch
    4  w <- argmin of b^T w + w^T (B + damping V^T V) w / 2   w = (learning rate, momentum), what is given held fixed
    5  step <- V w
    6  rho <- (h(theta + step) - h(theta)) / (b^T w + w^T B w / 2)        only on tested steps, inside a cond
    7  damping <- less for a good rho, more for a bad one                                 only on tested steps
    8  where the loss rose: step <- step / 4, at most four times, until it falls; else no step

With an adaptive damping, unusually long steps are tested out of their turn, and one that the next batch finds ruinous
is taken back; see `bounds`.

Martens and Grosse (2015), https://arxiv.org/abs/1503.05671, sections 6.4-7. Line 6 leaves the damping out of the
model, as both public implementations of that group do. A product with F is one forward-mode pass, `curvature.along`.
Line 8 is ours. Where a bad step was only rejected, the curves of `make race` took 27 steps off the plateau, now 22 (six
seeds), and the digits 75 to a gap of 2, now 60 (three seeds): a rejected step costs a gradient, a shorter one a loss.

Not here: what the direction is; how `adaptive.AdaptiveDamping` moves the damping.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.algebra import trees
from natgrad_jax.algebra.branches import when
from natgrad_jax.around.adaptive import BAD, AdaptiveDamping, Damping, refuse_uncalled
from natgrad_jax.around.bounds import Bounds, is_to_be_taken_back, is_unusual, seen, unbound
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
from natgrad_jax.base import Array, Scalar, ScalarOrSchedule
from natgrad_jax.lift import guards
from natgrad_jax.lift.requests import answered
from natgrad_jax.lift.state import at_step

Quadratic = Literal["quadratic"]
"""In the place of a number: what minimises the quadratic model."""
Length = Literal["quadratic", "search"]
"""In the place of a learning rate: that, or what has the least loss among many."""


class ControlState(NamedTuple):
    """State of `controlled`.

    Attributes:
        count: steps done, int32.
        damping: of the next step if it is adaptive, else of the last.
        learning_rate: of the last step, as short as it was made.
        momentum: of the last step, the weight of the step before it.
        ratio: of the last test, the change of the loss over the change foretold; NaN before the first test.
        rejected: steps that were not taken, since the loss rose however short they were or they were not finite, int32.
        calibrating: whether the next step is of the calibration, whose steps are tested each.
        last: the last step that was taken, a tree like the parameters; None if neither momentum nor an adaptive damping
            needs it.
        bounds: what is known of the steps so far, if the damping is adaptive.
        direction: state of the direction.
    """

    count: Array
    damping: Array
    learning_rate: Array
    momentum: Array
    ratio: Array
    rejected: Array
    calibrating: Array
    last: Any
    bounds: Bounds
    direction: Any


def controlled(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule | Quadratic,
    *,
    damping: Damping,
    momentum: Scalar | Quadratic | None = None,
    l2: ScalarOrSchedule | None = None,
    l2_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A complete optimizer whose learning rate, momentum or damping come from the quadratic model of the loss.

    Args:
        direction: a `scale_by_*` transformation; it must see the gradient itself.
        learning_rate: of the direction; "quadratic" for the minimiser of the model.
        damping: strength in the units of F, its schedule, or `adaptive_damping(...)`; it goes to the direction, whose
            own is ignored.
        momentum: weight of the last step; "quadratic" for the minimiser of the model; None for none.
        l2: strength of l2 / 2 |theta|^2 in the objective; None for none.
        l2_mask: which parameters it holds for, as `optax.add_decayed_weights` takes it.

    Returns:
        A transformation; `update` needs `params` and, as `curvature`, the `out.curvature` of `value_and_grad` itself.

    Raises:
        ValueError: if a word is unknown or a number out of its range.
    """
    checks.transformation("direction", direction)
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum)):
        if isinstance(value, str):
            checks.choice(name, value, ("quadratic",))
    refuse_uncalled("damping", damping)
    rule, constant = (damping, 0.0) if isinstance(damping, AdaptiveDamping) else (None, damping)
    checks.number("damping", constant, least=0, schedule=True)
    free = (isinstance(learning_rate, str), isinstance(momentum, str))
    given = [0.0 if isinstance(value, str) or value is None else value for value in (learning_rate, momentum)]
    penalty_of = None if l2 is None else penalty(l2_mask)
    holds = momentum is not None or rule is not None

    def init(params):
        numbers = {"damping": rule.initial if rule else 0, "learning_rate": 0, "momentum": 0, "ratio": jnp.nan}
        return ControlState(
            count=jnp.zeros((), jnp.int32),
            **{name: jnp.full((), number, jnp.float32) for name, number in numbers.items()},
            rejected=jnp.zeros((), jnp.int32),
            calibrating=jnp.array(rule is not None and rule.calibration > 0),
            last=jax.tree.map(jnp.zeros_like, params) if holds else None,
            bounds=unbound(),
            direction=direction.init(params),
        )

    def update(updates, state, params=None, *, curvature: Any = None, **extra):
        if extra.get("request") is not None:
            return answered(direction, updates, state, params, extra | {"curvature": curvature})
        check(curvature, params)
        count, last = state.count, state.last
        if (last is None) == holds:
            raise ValueError(
                f"`momentum` is {momentum!r}, but the state {'has no' if last is None else 'has a'} last step: it was "
                "made with another `momentum` or `damping`. Build the optimizer as the one that the checkpoint is of, "
                "or begin with `tx.init(params)`."
            )
        wide = jnp.result_type(jnp.float32, *jax.tree.leaves(updates))
        strength = jnp.asarray(state.damping if rule else at_step(constant, count), wide)
        extra = {"gradient": updates} | extra  # without the penalty, for statistics of the gradient itself
        l2_now, penalised, heard = jnp.zeros((), wide), None, says(curvature)
        if penalty_of is not None and l2 is not None:
            l2_now = jnp.asarray(at_step(l2, count), wide)
            penalised = partial(penalty_of, strength=l2_now)
            updates = trees.add(updates, penalised(params), 1.0)  # 1

        def forward():
            found, inner = direction.update(
                updates, state.direction, params, **extra | {"curvature": curvature, "damping": strength + l2_now}
            )
            u = jax.tree.map(jnp.negative, found)  # 2
            model = partial(model_of, curvature, (u,) if momentum is None else (u, last), updates, penalised)  # 3
            weights = jnp.stack([jnp.asarray(at_step(value, count), wide) for value in given])
            if any(free):
                quadratic = model()
                weights, model = minimiser(quadratic, strength, weights, free), lambda: quadratic  # 4
            step = trees.scaled(u, weights[0])  # 5
            step = step if momentum is None else trees.add(step, last, weights[1])
            new, share = state._replace(damping=strength.astype(jnp.float32)), jnp.ones((), wide)
            if rule:
                test = partial(_tested, curvature, params, weights, penalised)
                new, share = _adapted(rule, state, strength, step, heard, lambda: test(model(), step))  # 6-8
                step, weights = trees.scaled(step, share), share * weights
            taken = (share > 0) & guards.finite(step, 0)
            rate, weight = weights.astype(jnp.float32)
            zeros = jax.tree.map(jnp.zeros_like, step)
            return trees.select(taken & heard, step, zeros), new._replace(
                learning_rate=rate,
                momentum=weight,
                rejected=state.rejected + (~taken).astype(jnp.int32),
                last=trees.select(taken & heard, step, last) if holds else None,
                direction=inner,
            )

        def back(rule):
            step = jax.tree.map(lambda leaf, moved: -moved.astype(leaf.dtype), updates, last)
            return step, state._replace(
                damping=rule.raised(strength).astype(jnp.float32),
                **dict.fromkeys(("learning_rate", "momentum"), jnp.zeros((), jnp.float32)),
                ratio=jnp.full((), jnp.nan, jnp.float32),
                rejected=state.rejected + 1,
                last=jax.tree.map(jnp.zeros_like, last),
            )

        if rule is None:
            step, new = forward()
        else:
            value = jnp.asarray(curvature.value())
            ruinous = is_to_be_taken_back(state.bounds, curvature, params, last, value, heard)
            step, new = when(~ruinous, lambda _: forward(), None, otherwise=lambda _: back(rule))
            new = new._replace(bounds=seen(new.bounds, value, heard))
        return step, new._replace(count=jnp.asarray(optax.safe_increment(count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _adapted(
    rule: AdaptiveDamping, state: ControlState, strength: Array, step: Any, heard: Array, test: Callable[[], Any]
) -> tuple[ControlState, Array]:
    """Lines 6 to 8, where they are due: the state with the damping, and the share of the step that is made.

    A good test out of its turn, of a step that is longer than usual, leaves the damping.
    """
    length = jnp.sqrt(trees.dot(step, step)).astype(jnp.float32)
    in_turn = rule.is_due(state.count, state.ratio, state.calibrating)
    is_due = (in_turn | is_unusual(state.bounds, length)) & heard  # a batch of weight zero tests nothing
    ratio, share = when(is_due, lambda _: test(), (state.ratio, jnp.ones(())))  # 6
    adapted = rule.adapted(strength, state.ratio, ratio, state.count, state.calibrating)
    damping = jnp.where(is_due & (in_turn | ~(ratio >= BAD)), adapted, strength)  # 7
    calibrating = jnp.where(
        heard, rule.calibrates(state.count, state.ratio, ratio, state.calibrating), state.calibrating
    )
    known = jnp.where(
        is_due & (share > 0) & jnp.isfinite(length), (share * length).astype(jnp.float32), state.bounds.length
    )
    new = state._replace(damping=damping.astype(jnp.float32), ratio=ratio, calibrating=calibrating)
    return new._replace(bounds=state.bounds._replace(length=known)), share


_NEITHER = 0.5
"""The ratio of a test that says nothing: all stays as it is."""


def _tested(
    curvature: Any, params: Any, weights: Array, penalised: Callable[[Any], Any] | None, model: Model, step: Any
) -> tuple[Array, Array]:
    """Lines 6 and 8: the change of the loss over the change foretold, and the share of the step that is made.

    With outputs y and residuals r, the loss is known to a share of eps |y / r|: a hundred times the rounding of its
    mean, if the fit is good. A change of less than half of the digits is therefore read from the slopes at both ends,
    which are small where it is. Their mean is exact for a quadratic loss, and overrates what is of third order in the
    step by a half. After Hager and Zhang (2005), https://doi.org/10.1137/030601880, section 4. Where slopes are
    rounding, too, a test says neither.
    """
    slope = model.slope @ weights
    foretold = slope + weights @ model.curvature @ weights / 2
    value, there = curvature.value(), trees.add(params, step, 1.0)
    by_values = change_by(curvature, params, step, value, penalised)

    def within(power, change):
        share = jnp.finfo(value.dtype).eps ** power
        return jnp.maximum(jnp.abs(foretold), jnp.abs(change)) <= share * jnp.abs(value)

    def by_slopes(_: Any) -> Array:
        there_too = curvature.value_and_slope(there, step)[1] + change_of_penalty(penalised, there, step)
        return ((slope + there_too) / 2).astype(by_values.dtype)

    is_small = within(0.5, by_values)
    change = when(is_small, by_slopes, by_values)
    lost = within(1.5, change)
    taken = lost | (change <= 0)
    shorter = partial(shortened, curvature, params, step, value, penalised)
    share = when(~taken & ~is_small, lambda _: shorter(), taken.astype(value.dtype))
    return jnp.where(lost, _NEITHER, ratio_of(change, foretold)), share
