"""The KL clip shortens a direction that would move the model too far.

    1  u <- direction of the gradient g
    2  nu <- min(1, sqrt(bound / (learning_rate^2 <g, u>)))
    3  u <- nu u

With u = (F + damping I)^-1 g the product <g, u> is u^T (F + damping I) u, so the step learning_rate * nu * u changes
the distribution of the model by a KL divergence of at most bound / 2: to second order, and as far as the method's F is
the Fisher matrix. Not here: the length that minimises the quadratic model of the loss; see `control`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.algebra.trees import dot, scaled, within
from natgrad_jax.base import Array, Scalar, ScalarOrSchedule
from natgrad_jax.lift.requests import answered
from natgrad_jax.lift.state import at_step


class ClipState(NamedTuple):
    """State of `clip_by_kl`.

    Attributes:
        count: steps done, int32.
        clip_factor: nu of the last step, float32; 1 where nothing was clipped.
        direction: state of the direction.
    """

    count: Array
    clip_factor: Array
    direction: Any


def clip_by_kl(
    direction: optax.GradientTransformationExtraArgs, learning_rate: ScalarOrSchedule, bound: Scalar
) -> optax.GradientTransformationExtraArgs:
    """Shorten a direction so that a step along it moves the model's distribution by at most a given amount.

    The TENGraD authors' K-FAC does so, and kfac-jax as its norm constraint. It acts before the momentum, with <g, u>
    over all parameters. Where <g, u> is not positive there is no divergence to bound, and nothing is clipped.

    Args:
        direction: a `scale_by_*` transformation; it must see the gradient itself.
        learning_rate: the step size that the direction is multiplied by later, or its schedule.
        bound: the largest (learning_rate nu)^2 <g, u>, twice the KL divergence of an example; 1e-3 to 1e-2 is common.

    Returns:
        The direction, shortened.

    Raises:
        ValueError: if the bound is a negative number.
    """
    checks.transformation("direction", direction)
    checks.number("bound", bound, least=0)

    def init(params):
        return ClipState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), direction.init(params))

    def update(updates, state, params=None, **extra):
        if extra.get("request") is not None:
            return answered(direction, updates, state, params, extra)
        found, inner = direction.update(updates, state.direction, params, **extra)  # 1
        product = at_step(learning_rate, state.count) ** 2 * dot(updates, found)
        scale = within(product, bound)  # 2
        count = jnp.asarray(optax.safe_increment(state.count))
        return scaled(found, scale), ClipState(count, scale.astype(jnp.float32), inner)  # 3

    return optax.GradientTransformationExtraArgs(init, update)
