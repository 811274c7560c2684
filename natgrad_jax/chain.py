"""What stands around a direction: the complete optimizer, and statistics before training."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.addresses import Tree
from natgrad_jax.base import Evidence, Layers, Scalar, ScalarOrSchedule
from natgrad_jax.control import Quadratic, controlled
from natgrad_jax.damping import AdaptiveDamping, Damping
from natgrad_jax.steps import clip_by_kl
from natgrad_jax.transform import NaturalGradientState


def complete(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule | Quadratic,
    damping: Damping,
    kl_clip: Scalar | None,
    momentum: Scalar | Quadratic | None,
    weight_decay: ScalarOrSchedule | None,
    weight_decay_mask: Any | Callable[[Any], Any] | None,
    smoothing: Callable[[Scalar], optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A direction, shortened or not, then weight decay, then heavy-ball momentum, then the learning rate.

    If learning rate or momentum are "quadratic" or the damping adapts itself, `control.controlled` takes their place,
    and the weight decay is an l2 penalty of the objective, which that models.

    Args:
        direction: a `scale_by_*` transformation.
        learning_rate: step size, its schedule, or "quadratic".
        damping: of the direction.
        kl_clip: bound of `steps.clip_by_kl`; None for none.
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
    words = isinstance(learning_rate, str) or isinstance(momentum, str)
    if words or isinstance(damping, AdaptiveDamping):
        if kl_clip is not None:
            raise ValueError(
                f"`kl_clip` is {kl_clip}, but the length of the step comes from the quadratic model, or the damping "
                "adapts to it; leave one of them away."
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
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


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
    both = optax.chain(first, direction)

    def update(updates, state, params=None, *, gradient=None, warm_start=None, **extra):
        if warm_start is None and gradient is None:
            gradient = updates
        return both.update(updates, state, params, gradient=gradient, warm_start=warm_start, **extra)

    return optax.GradientTransformationExtraArgs(both.init, update)


def warm_start(
    tx: optax.GradientTransformationExtraArgs,
    state: Any,
    evidence_stream: Iterable[Any],
    params: Tree | None = None,
) -> Any:
    """Fill the statistics with the running mean over a pass of data, before training.

    Nothing but statistics changes: no step is counted, and no other part of a chain moves. The average so made counts
    as one full old value afterwards. As in the experiments of Goldfarb, Ren and Bahamou.

    Args:
        tx: a lifted method, or a chain with one in it.
        state: its state.
        evidence_stream: for each batch what `capture.value_and_grad` returned; or, with `params`, the evidence alone:
            `out.curvature`, or {name: Evidence}, which a jitted function can return; or the gradient alone, for
            methods whose statistics are of it.
        params: the parameters; needed if the stream gives evidence alone.

    Returns:
        The state of `tx` with warm statistics.

    Raises:
        ValueError: if the stream gives evidence alone and `params` is None, or the state has no lifted method.
    """

    def is_ours(node):
        return isinstance(node, NaturalGradientState)

    if not any(is_ours(node) for node in jax.tree.leaves(state, is_leaf=is_ours)):
        raise ValueError(
            f"`state` of type {type(state).__name__} holds no natural-gradient method; expected `tx.init(params)`."
        )

    @partial(jax.jit, static_argnames="layers")
    def observe(state, updates, gradient, evidence, done, layers):
        curvature = evidence if layers is None else _Known(evidence, layers)
        _, new = tx.update(updates, state, params, curvature=curvature, gradient=gradient, warm_start=done)
        return jax.tree.map(lambda old, new: new if is_ours(old) else old, state, new, is_leaf=is_ours)

    for done, item in enumerate(evidence_stream):
        curvature = getattr(item, "curvature", item)
        layers = getattr(curvature, "layers", None)
        evidence = curvature() if callable(curvature) else curvature
        gradient = getattr(item, "grad", None)
        if not _is_evidence(evidence):
            gradient, evidence, layers = item, None, None
        like = params if gradient is None else gradient
        if like is None:
            raise ValueError(
                "`params` is None, but the stream gives evidence without gradients; pass `params=variables['params']`."
            )
        state = observe(state, jax.tree.map(jnp.zeros_like, like), gradient, evidence, jnp.asarray(float(done)), layers)
    return state


class _Known(NamedTuple):
    """Evidence and the layers that it is of, as `out.curvature` has them, for a transformation without `layers`."""

    evidence: Mapping[str, Evidence]
    layers: Layers

    def __call__(self) -> Mapping[str, Evidence]:
        return self.evidence


def _is_evidence(item: Any) -> bool:
    return isinstance(item, Mapping) and all(isinstance(value, Evidence) for value in item.values())
