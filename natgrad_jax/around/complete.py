"""The complete optimizer around a direction."""

from collections.abc import Callable
from typing import Any

import optax

from natgrad_jax.around.adaptive import AdaptiveDamping, Damping
from natgrad_jax.around.automatic import automatic
from natgrad_jax.around.clip import clip_by_kl
from natgrad_jax.around.control import Length, Quadratic, controlled
from natgrad_jax.around.search import searched
from natgrad_jax.base import Scalar, ScalarOrSchedule
from natgrad_jax.lift.requests import chained


def complete(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule | Length | None,
    damping: Damping,
    kl_clip: Scalar | None,
    momentum: Scalar | Quadratic | None,
    weight_decay: ScalarOrSchedule | None,
    weight_decay_mask: Any | Callable[[Any], Any] | None,
    smoothing: Callable[[Scalar], optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A direction, shortened or not, then weight decay, then heavy-ball momentum, then the learning rate.

    Without a learning rate `automatic` takes the place of all that. If learning rate or momentum are "quadratic" or the
    damping adapts itself, `control.controlled` does. The weight decay is then an l2 penalty of the objective.

    Args:
        direction: a `scale_by_*` transformation.
        learning_rate: step size, its schedule, "quadratic" or "search"; None to find it while training.
        damping: of the direction.
        kl_clip: bound of `clip_by_kl`; None for none.
        momentum: weight of the old direction in the buffer, or "quadratic"; None for no buffer.
        weight_decay: strength; None for none.
        weight_decay_mask: which parameters decay.
        smoothing: weight of the old value -> the momentum in front of the direction, of the gradient, instead of the
            one behind it.

    Returns:
        The chain.

    Raises:
        ValueError: if a controlled step is to be clipped as well.
    """
    if learning_rate is None:
        fixed = None if isinstance(damping, AdaptiveDamping) else damping
        return automatic(direction, damping=fixed, l2=weight_decay, l2_mask=weight_decay_mask)
    if learning_rate == "search":
        return _by_search(direction, damping, kl_clip, momentum, weight_decay, weight_decay_mask)
    words = isinstance(learning_rate, str) or isinstance(momentum, str)
    if words or isinstance(damping, AdaptiveDamping):
        if kl_clip is not None:
            raise ValueError(
                f"`kl_clip` is {kl_clip}, but the length of the step comes from the quadratic model, or the damping "
                "adapts to it; drop one of them."
            )
        return controlled(
            direction, learning_rate, damping=damping, momentum=momentum, l2=weight_decay, l2_mask=weight_decay_mask
        )
    if kl_clip is not None:
        direction = clip_by_kl(direction, learning_rate, kl_clip)
    if smoothing is not None and momentum is not None:
        direction, momentum = behind(smoothing(momentum), direction), None
    parts: list[optax.GradientTransformation] = [direction]
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
    if momentum is not None:
        parts.append(optax.trace(momentum))
    return chained(*parts, optax.scale_by_learning_rate(learning_rate), direction=direction)


def _by_search(
    direction: optax.GradientTransformationExtraArgs,
    damping: Damping,
    kl_clip: Scalar | None,
    momentum: Scalar | Quadratic | None,
    weight_decay: ScalarOrSchedule | None,
    weight_decay_mask: Any | Callable[[Any], Any] | None,
) -> optax.GradientTransformationExtraArgs:
    """A direction whose length is searched, with a heavy ball in front of the search if there is one."""
    if kl_clip is not None:
        raise ValueError(f"`kl_clip` is {kl_clip}, but the length of the step is found by search; drop one of them.")
    if isinstance(damping, AdaptiveDamping) or isinstance(momentum, str):
        word = "damping" if isinstance(damping, AdaptiveDamping) else "momentum"
        raise ValueError(
            f'`{word}` comes from the quadratic model, which `learning_rate="search"` does not have; give it a number, '
            'or take `learning_rate="quadratic"`.'
        )
    if momentum is not None:
        direction = chained(direction, optax.trace(momentum), direction=direction)
    return searched(direction, damping=damping, l2=weight_decay, l2_mask=weight_decay_mask)


def behind(
    first: optax.GradientTransformation, direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """A direction of what another transformation makes of the gradient, whose statistics are of the gradient itself.

    Args:
        first: what stands in front, `optax.trace(0.9)` say.
        direction: a `scale_by_*` transformation.

    Returns:
        The two in a chain; the direction gets the gradient as the extra argument `gradient`, if it is not there yet.
    """
    both = chained(first, direction, direction=direction)

    def update(updates, state, params=None, *, gradient=None, **extra):
        if extra.get("request") is None and gradient is None:
            gradient = updates
        return both.update(updates, state, params, gradient=gradient, **extra)

    return optax.GradientTransformationExtraArgs(both.init, update)
