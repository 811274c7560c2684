"""Grafting takes the length of a direction from another optimizer, whose learning rate is then the one to use.

    1  u <- direction of the gradient g,  m <- update of the other for g
    2  u <- |m| / |u| u                                       each parameter by itself, or all as one vector

And the rule that most is grafted from: the gradient over the root of its average square.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.algebra.trees import bias_corrected, dot, scaled
from natgrad_jax.base import Array, Scalar
from natgrad_jax.lift.requests import answered


class GraftState(NamedTuple):
    """State of `graft`: those of the direction and of the other optimizer."""

    direction: Any
    length: Any


def graft(
    direction: optax.GradientTransformation,
    length: optax.GradientTransformation,
    *,
    per: Literal["parameter", "model"] = "parameter",
) -> optax.GradientTransformationExtraArgs:
    """Give a direction the length of another optimizer's update.

    A learning rate tuned for the other optimizer, Adam for instance, carries over. The Shampoo of Anil, Gupta, Koren,
    Regan and Singer (2020), https://arxiv.org/abs/2002.09018, does so for each parameter array.

    >>> tx = graft(optax.scale(4.0), optax.sgd(1.0))
    >>> updates, _ = tx.update({"a": jnp.array([3.0, 4.0])}, tx.init({"a": jnp.zeros(2)}))
    >>> print(updates["a"])
    [3. 4.]

    Args:
        direction: a `scale_by_*` transformation.
        length: any transformation, for instance `optax.scale_by_adam()`; the sign of its update does not matter.
        per: whether each "parameter" array takes its own length, or the whole "model" one.

    Returns:
        The direction at the other's length; zero where the direction is zero.

    Raises:
        ValueError: if `per` is unknown.
    """
    checks.transformation("direction", direction)
    checks.transformation("length", length)
    checks.choice("per", per, ("parameter", "model"))
    first, second = optax.with_extra_args_support(direction), optax.with_extra_args_support(length)

    def init(params):
        return GraftState(first.init(params), second.init(params))

    def update(updates, state, params=None, **extra):
        if extra.get("request") is not None:
            return answered(first, updates, state, params, extra)
        found, one = first.update(updates, state.direction, params, **extra)  # 1
        model, other = second.update(updates, state.length, params, **extra)
        if per == "model":
            found = _at_length(found, dot(model, model))  # 2
        else:
            found = jax.tree.map(lambda u, m: _at_length(u, dot(m, m)), found, model)  # 2
        return found, GraftState(one, other)

    return optax.GradientTransformationExtraArgs(init, update)


def of_gradient(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation of the gradient itself, the extra argument `gradient`, whatever stands in front.

    Args:
        tx: the transformation.

    Returns:
        The same, of the leaves of `gradient` in the place of those of the updates, where `update` is given it.
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, *, gradient=None, **extra):
        return inner.update(_seen(updates, gradient), state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _seen(updates: Any, gradient: Any) -> Any:
    """The gradient where there is one, its leaves in a tree that a mask may have thinned; else the updates."""
    return updates if gradient is None else addresses.replace(updates, addresses.flatten(gradient))


class RMSState(NamedTuple):
    """State of `divide_by_rms`: the averages of the squares, and the steps done, int32."""

    count: Array
    squares: Any


def divide_by_rms(decay: Scalar, *, debias: bool, eps: Scalar = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Divide by the root of the average square of the gradient itself, the extra argument `gradient`.

    Without that argument this is RMSprop, or, debiased, Adam without momentum; with it a momentum may stand in front,
    which then enters the numerator only.

    Args:
        decay: weight of the old value in the average.
        debias: whether the average is divided by the sum of its weights.
        eps: added to the root.

    Returns:
        A transformation.
    """

    def init(params):
        return RMSState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, *, gradient=None, **extra):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        squares = optax.tree.update_moment_per_elem_norm(_seen(updates, gradient), state.squares, decay, 2)
        fair = bias_corrected(squares, decay, count) if debias else squares
        found = jax.tree.map(lambda u, s: u / (jnp.sqrt(s) + eps), updates, fair)
        return found, RMSState(count, squares)

    return optax.GradientTransformationExtraArgs(init, update)


def _at_length(tree: Any, square: Array) -> Any:
    """A tree whose squared norm is as given, in the direction of `tree`."""
    own = dot(tree, tree)
    return scaled(tree, jnp.sqrt(square / jnp.where(own > 0, own, 1)))
