"""How far to go along a direction: what the quadratic model of the loss says.

    1  g <- gradient + l2 theta                               of the objective h + l2 / 2 |theta|^2
    2  u <- -direction of g at damping + l2,  v <- the last step
    3  B <- V^T (F + l2 I) V,  b <- V^T g,  V = [u, v]        F by exact products on the batch
    4  w <- argmin of b^T w + w^T (B + damping V^T V) w / 2   w = (learning rate, momentum), what is given held fixed
    5  step <- V w
    6  rho <- (h(theta + step) - h(theta)) / (b^T w + w^T B w / 2)        only on tested steps, inside a cond
    7  damping <- less for a good rho, more for a bad one; no step if the loss rose        only on tested steps

Martens and Grosse (2015), https://arxiv.org/abs/1503.05671, sections 6.4-7. Line 6 leaves the damping out of the
model, as both public implementations of that group do. A product with F is one forward-mode pass, `curvature.along`.

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
from natgrad_jax.around.adaptive import AdaptiveDamping, Damping, refuse_uncalled
from natgrad_jax.around.model import Model, change_of_penalty, check, minimiser, model_of, penalty, ratio_of, says
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
        learning_rate: of the last step.
        momentum: of the last step, the weight of the step before it.
        ratio: of the last test, the change of the loss over the change foretold; NaN before the first test.
        rejected: steps that were not taken, since a test found the loss risen or they were not finite, int32.
        calibrating: whether the next step is of the calibration, whose steps are tested each.
        last: the last step that was taken, a tree like the parameters; None without momentum.
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

    def init(params):
        numbers = {"damping": rule.initial if rule else 0, "learning_rate": 0, "momentum": 0, "ratio": jnp.nan}
        return ControlState(
            count=jnp.zeros((), jnp.int32),
            **{name: jnp.full((), number, jnp.float32) for name, number in numbers.items()},
            rejected=jnp.zeros((), jnp.int32),
            calibrating=jnp.array(rule is not None and rule.calibration > 0),
            last=None if momentum is None else jax.tree.map(jnp.zeros_like, params),
            direction=direction.init(params),
        )

    def update(updates, state, params=None, *, curvature: Any = None, **extra):
        if extra.get("request") is not None:
            return answered(direction, updates, state, params, extra | {"curvature": curvature})
        check(curvature, params)
        count, last = state.count, state.last
        if (last is None) != (momentum is None):
            raise ValueError(
                f"`momentum` is {momentum!r}, but the state {'has no' if last is None else 'has a'} last step: it was "
                "made with another `momentum`. Build the optimizer as the one that the checkpoint is of, or begin with "
                "`tx.init(params)`."
            )
        wide = jnp.result_type(jnp.float32, *jax.tree.leaves(updates))
        strength = jnp.asarray(state.damping if rule else at_step(constant, count), wide)
        extra = {"gradient": updates} | extra  # without the penalty, for statistics of the gradient itself
        l2_now, penalised = jnp.zeros((), wide), None
        if penalty_of is not None and l2 is not None:
            l2_now = jnp.asarray(at_step(l2, count), wide)
            penalised = partial(penalty_of, strength=l2_now)
            updates = trees.add(updates, penalised(params), 1.0)  # 1
        found, inner = direction.update(
            updates, state.direction, params, **extra | {"curvature": curvature, "damping": strength + l2_now}
        )
        u = jax.tree.map(jnp.negative, found)  # 2
        model = partial(model_of, curvature, (u,) if last is None else (u, last), updates, penalised)  # 3
        weights = jnp.stack([jnp.asarray(at_step(value, count), wide) for value in given])
        if any(free):
            quadratic = model()
            weights, model = minimiser(quadratic, strength, weights, free), lambda: quadratic  # 4
        step = trees.scaled(u, weights[0])  # 5
        step = step if last is None else trees.add(step, last, weights[1])
        ratio, taken, heard = state.ratio, jnp.array(True), says(curvature)
        calibrating = state.calibrating
        sound = guards.finite(step, 0)
        if rule:
            is_due = rule.is_due(count, state.ratio, calibrating) & heard  # a batch of weight zero tests nothing
            test = partial(_tested, curvature, params, weights, penalised)
            ratio, taken = when(is_due, lambda _: test(model(), step), (ratio, taken))  # 6
            adapted = rule.adapted(strength, state.ratio, ratio, count, calibrating)
            strength = jnp.where(is_due, adapted, strength)  # 7
            calibrating = jnp.where(heard, rule.calibrates(count, ratio, calibrating), calibrating)
        last = None if last is None else trees.select(taken & sound & heard, step, last)
        step = trees.select(taken & sound & heard, step, jax.tree.map(jnp.zeros_like, step))
        return step, ControlState(
            count=jnp.asarray(optax.safe_increment(count)),
            damping=strength.astype(jnp.float32),
            learning_rate=weights[0].astype(jnp.float32),
            momentum=weights[1].astype(jnp.float32),
            ratio=ratio,
            rejected=state.rejected + (~(taken & sound)).astype(jnp.int32),
            calibrating=calibrating,
            last=last,
            direction=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


_NEITHER = 0.5
"""The ratio of a test that says nothing: all stays as it is."""


def _tested(
    curvature: Any, params: Any, weights: Array, penalised: Callable[[Any], Any] | None, model: Model, step: Any
) -> tuple[Array, Array]:
    """Line 6: the change of the loss over the change foretold, and whether the loss has not risen.

    With outputs y and residuals r, the loss is known to a share of eps |y / r|: a hundred times the rounding of its
    mean, if the fit is good. A change of less than half of the digits is therefore read from the slopes at both ends,
    which are small where it is. Their mean is exact for a quadratic loss, and overrates what is of third order in the
    step by a half. After Hager and Zhang (2005), https://doi.org/10.1137/030601880, section 4. Where slopes are
    rounding, too, a test says neither.
    """
    slope = model.slope @ weights
    foretold = slope + weights @ model.curvature @ weights / 2
    value, there = curvature.value(), trees.add(params, step, 1.0)
    value_there, slope_there = curvature.value_and_slope(there, step)
    by_values = value_there - value + change_of_penalty(penalised, trees.add(params, step, 0.5), step)
    by_slopes = (slope + slope_there + change_of_penalty(penalised, there, step)) / 2

    def within(power, change):
        share = jnp.finfo(value.dtype).eps ** power
        return jnp.maximum(jnp.abs(foretold), jnp.abs(change)) <= share * jnp.abs(value)

    change = jnp.where(within(0.5, by_values), by_slopes, by_values)
    lost = within(1.5, change)
    return jnp.where(lost, _NEITHER, ratio_of(change, foretold)), lost | (change <= 0)
