"""How far to go along a direction: the length, of a grid, at which the batch has the least loss.

    1  u <- -direction of g + l2 theta at the damping + l2
    2  h_k <- loss of the batch at theta + length_k u, lengths 2, 1, 1/2, ... in one pass       `curvature.value`
    3  step <- length_k u of the least h_k; none where no h_k is below the loss itself

The search of Mueller and Zeinhofer (2023), https://arxiv.org/abs/2302.13163, and of those after them, on problems whose
directions are exact: where few points say all, its price is small beside that of the direction. It needs no model of
the loss, so it also goes with `spring`, whose direction is that of no quadratic model of the batch.

Not here: a damping that adapts; see `control`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.algebra import trees
from natgrad_jax.around.model import change_of_penalty, check, penalty, says
from natgrad_jax.base import Array, ScalarOrSchedule
from natgrad_jax.lift import guards
from natgrad_jax.lift.requests import answered
from natgrad_jax.lift.state import at_step

LONGEST, LENGTHS = 2.0, 20
"""The first length, and how many there are, each half of the one before."""


class SearchState(NamedTuple):
    """State of `searched`.

    Attributes:
        count: steps done, int32.
        damping: of the last step.
        learning_rate: of the last step, the length that was found; 0 for none.
        rejected: steps that were not taken, since no length lowered the loss or it was not finite, int32.
        direction: state of the direction.
    """

    count: Array
    damping: Array
    learning_rate: Array
    rejected: Array
    direction: Any


def searched(
    direction: optax.GradientTransformationExtraArgs,
    *,
    damping: ScalarOrSchedule,
    l2: ScalarOrSchedule | None = None,
    l2_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A complete optimizer whose learning rate is found by search, on the batch of the step.

    The loss of that batch never rises. Its own batch approves of what the next may not: for small batches take
    `ng.automatic`, or a learning rate.

    Args:
        direction: a `scale_by_*` transformation, or one with a momentum around it.
        damping: strength in the units of F, or its schedule; it goes to the direction, whose own is ignored.
        l2: strength of l2 / 2 |theta|^2 in the objective; None for none.
        l2_mask: which parameters it holds for, as `optax.add_decayed_weights` takes it.

    Returns:
        A transformation; `update` needs `params` and, as `curvature`, the `out.curvature` of `value_and_grad` itself.

    Raises:
        ValueError: if a number is out of its range.
    """
    checks.transformation("direction", direction)
    checks.number("damping", damping, least=0, schedule=True)
    penalty_of = None if l2 is None else penalty(l2_mask)

    def init(params):
        zero = (jnp.zeros((), jnp.float32) for _ in range(2))
        return SearchState(
            jnp.zeros((), jnp.int32), next(zero), next(zero), jnp.zeros((), jnp.int32), direction.init(params)
        )

    def update(updates, state, params=None, *, curvature: Any = None, **extra):
        if extra.get("request") is not None:
            return answered(direction, updates, state, params, extra | {"curvature": curvature})
        check(curvature, params)
        wide = jnp.result_type(jnp.float32, *jax.tree.leaves(updates))
        strength, l2_now = jnp.asarray(at_step(damping, state.count), wide), jnp.zeros((), wide)
        extra, penalised = {"gradient": updates} | extra, None
        if penalty_of is not None and l2 is not None:
            l2_now = jnp.asarray(at_step(l2, state.count), wide)
            penalised = lambda tree: penalty_of(tree, strength=l2_now)  # noqa: E731
            updates = trees.add(updates, penalised(params), 1.0)
        given = extra | {"curvature": curvature, "damping": strength + l2_now}
        found, inner = direction.update(updates, state.direction, params, **given)  # 1
        u = jax.tree.map(jnp.negative, found)

        def change(length):
            step = trees.scaled(u, length)
            rise = curvature.value(trees.add(params, step, 1.0)) - curvature.value()
            return rise + change_of_penalty(penalised, trees.add(params, step, 0.5), step)

        lengths = LONGEST * 0.5 ** jnp.arange(LENGTHS, dtype=wide)
        changes = jax.vmap(change)(lengths)  # 2
        changes = jnp.where(jnp.isfinite(changes), changes, jnp.inf)
        best = jnp.argmin(changes)
        taken = (changes[best] < 0) & guards.finite(u, 0) & says(curvature)
        length = jnp.where(taken, lengths[best], 0)
        step = jax.tree.map(lambda leaf: jnp.where(taken, length * leaf, 0).astype(leaf.dtype), u)  # 3
        return step, SearchState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            damping=strength.astype(jnp.float32),
            learning_rate=length.astype(jnp.float32),
            rejected=state.rejected + (~taken & says(curvature)).astype(jnp.int32),
            direction=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
