"""What else a transformation can be asked for than an update.

Optax has one way into a transformation that stands in a chain, a mask or a partition: `update`. So a request travels
as its extra argument `request`, and what answers it, a lifted method, changes its own state and passes the updates on.
Whatever holds a direction hands a request to it by `answered`, and does nothing else.
"""

from typing import Any, NamedTuple

import optax

from natgrad_jax.base import Scalar


class Observe(NamedTuple):
    """Move the statistics by one batch.

    Attributes:
        decay: weight of the old statistics; None for that of the method.
    """

    decay: Scalar | None = None


class Refresh(NamedTuple):
    """Make the operators afresh from the statistics; those of no date are rebuilt."""


Request = Observe | Refresh


def answered(direction: optax.GradientTransformation, updates: Any, state: Any, params: Any, extra: Any) -> Any:
    """The updates as they are, and the state with that of the direction after the request in `extra`."""
    _, inner = optax.with_extra_args_support(direction).update(updates, state.direction, params, **extra)
    return updates, state._replace(direction=inner)


def chained(
    *parts: optax.GradientTransformation, direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of some parts, one of which is the direction that requests are for.

    Args:
        *parts: as `optax.chain` takes them.
        direction: one of them.

    Returns:
        The chain.
    """
    whole, index = optax.chain(*parts), parts.index(direction)

    def update(updates, state, params=None, **extra):
        if extra.get("request") is None:
            return whole.update(updates, state, params, **extra)
        inner = optax.with_extra_args_support(direction).update(updates, state[index], params, **extra)[1]
        return updates, (*state[:index], inner, *state[index + 1 :])

    return optax.GradientTransformationExtraArgs(whole.init, update)
