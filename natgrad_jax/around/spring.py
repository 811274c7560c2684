"""SPRING: a momentum for directions that see few examples.

It wraps a direction: (F + damping)^-1 (gradient + weight damping last) needs of a method only that it is linear. So it
serves every method, and the state of a layer holds no momentum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import checks
from natgrad_jax.base import Array, Scalar, ScalarOrSchedule
from natgrad_jax.lift.requests import answered


class SpringState(NamedTuple):
    """State of `spring`: steps done, the last direction, and the state of what it is taken from."""

    count: Array
    last: Any
    direction: Any


def spring(
    direction: optax.GradientTransformation, damping: ScalarOrSchedule, weight: Scalar = 0.9
) -> optax.GradientTransformationExtraArgs:
    """SPRING momentum: the damping pulls towards the last direction instead of towards zero.

        u <- (F + damping I)^-1 (gradient + weight damping u)

    minimises u^T F u / 2 - gradient^T u + damping / 2 |u - weight u_last|^2. So the direction keeps from earlier steps
    exactly what the batch says nothing about. With weight 0 it is the direction itself. Goldshlager, Abrahamsen and Lin
    (2024), https://arxiv.org/abs/2401.10190, take 0.99 and bound the length of the step.

    Args:
        direction: a `scale_by_*` transformation that is linear in the gradient.
        damping: that of the direction, in the units of F, or its schedule. Where the direction is given another one by
            its extra argument `damping`, that counts.
        weight: of the last direction, in [0, 1).

    Returns:
        A direction.

    Raises:
        ValueError: if a number is out of its range.
    """
    checks.transformation("direction", direction)
    checks.number("damping", damping, least=0, schedule=True)
    checks.number("weight", weight, least=0, below=1)
    inner = optax.with_extra_args_support(direction)

    def init(params):
        return SpringState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(updates, state, params=None, *, gradient=None, **extra):
        if extra.get("request") is not None:
            return answered(inner, updates, state, params, extra | {"gradient": gradient})
        strength = extra.get("damping", damping)
        pull = weight * (strength(state.count) if callable(strength) else strength)
        pulled = jax.tree.map(lambda g, u: (g + pull * u).astype(g.dtype), updates, state.last)
        gradient = updates if gradient is None else gradient
        found, one = inner.update(pulled, state.direction, params, gradient=gradient, **extra)
        return found, SpringState(jnp.asarray(optax.safe_increment(state.count)), found, one)

    return optax.GradientTransformationExtraArgs(init, update)
