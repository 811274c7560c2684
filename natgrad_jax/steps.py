"""What follows a direction: how long it should be.

The KL clip shortens a direction that would move the model too far:

    1  u <- direction of the gradient g
    2  nu <- min(1, sqrt(bound / (learning_rate^2 <g, u>)))
    3  u <- nu u

With u = (F + damping I)^-1 g the product <g, u> is u^T (F + damping I) u, so the step learning_rate * nu * u changes
the distribution of the model by a KL divergence of at most bound / 2: to second order, and as far as the method's F is
the Fisher matrix.

Grafting takes the length from another optimizer, whose learning rate is then the one to use:

    1  u <- direction of the gradient g,  m <- update of the other for g
    2  u <- |m| / |u| u                                       each parameter by itself, or all as one vector

Not here: the length that minimises the quadratic model of the loss; see `control`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.base import Array, Scalar, ScalarOrSchedule
from natgrad_jax.linalg import HIGHEST
from natgrad_jax.transform import at_step


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

    As in the K-FAC of the TENGraD authors and, under the name of norm constraint, in kfac-jax: before momentum, with
    <g, u> over all parameters. Where <g, u> is not positive there is no divergence to bound, and nothing is clipped.

    Args:
        direction: a `scale_by_*` transformation; it must see the gradient itself.
        learning_rate: the step size that the direction is multiplied by later, or its schedule.
        bound: the largest (learning_rate nu)^2 <g, u>, twice the KL divergence of an example; 1e-3 to 1e-2 is common.

    Returns:
        The direction, shortened.

    Raises:
        ValueError: if the bound is a negative number.
    """
    checks.number("bound", bound, least=0)

    def init(params):
        return ClipState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), direction.init(params))

    def update(updates, state, params=None, **extra):
        found, inner = direction.update(updates, state.direction, params, **extra)  # 1
        product = at_step(learning_rate, state.count) ** 2 * dot(updates, found)
        scale = jnp.where(product > bound, jnp.sqrt(bound / jnp.where(product > 0, product, 1)), 1)  # 2
        count = jnp.asarray(optax.safe_increment(state.count))
        shortened = jax.tree.map(lambda u: (scale * u).astype(u.dtype), found)  # 3
        return shortened, ClipState(count, scale.astype(jnp.float32), inner)

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
        fair = optax.tree.bias_correction(squares, decay, count) if debias else squares
        found = jax.tree.map(lambda u, s: u / (jnp.sqrt(s) + eps), updates, fair)
        return found, RMSState(count, squares)

    return optax.GradientTransformationExtraArgs(init, update)


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

    As in the Shampoo of Anil, Gupta, Koren, Regan and Singer (2020), https://arxiv.org/abs/2002.09018, where the length
    of each parameter array is that of a diagonal method: settings tuned for Adam carry over.

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
    checks.choice("per", per, ("parameter", "model"))
    first, second = optax.with_extra_args_support(direction), optax.with_extra_args_support(length)

    def init(params):
        return GraftState(first.init(params), second.init(params))

    def update(updates, state, params=None, **extra):
        found, one = first.update(updates, state.direction, params, **extra)  # 1
        model, other = second.update(updates, state.length, params, **extra)
        if per == "model":
            found = _at_length(found, dot(model, model))  # 2
        else:
            found = jax.tree.map(lambda u, m: _at_length(u, dot(m, m)), found, model)  # 2
        return found, GraftState(one, other)

    return optax.GradientTransformationExtraArgs(init, update)


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

    minimises u^T F u / 2 - gradient^T u + damping / 2 |u - weight u_last|^2: what the batch says nothing about is kept
    from the steps before, and only that. Goldshlager, Abrahamsen and Lin (2024), https://arxiv.org/abs/2401.10190, for
    whom the weight is 0.99 beside a bound on the length of the step; with weight 0 it is the direction itself.

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
    checks.number("damping", damping, least=0)
    checks.number("weight", weight, least=0, below=1)
    inner = optax.with_extra_args_support(direction)

    def init(params):
        return SpringState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(updates, state, params=None, *, gradient=None, warm_start=None, **extra):
        if warm_start is not None:
            found, one = inner.update(
                updates, state.direction, params, gradient=gradient, warm_start=warm_start, **extra
            )
            return found, state._replace(direction=one)
        strength = extra.get("damping", damping)
        pull = weight * (strength(state.count) if callable(strength) else strength)
        pulled = jax.tree.map(lambda g, u: (g + pull * u).astype(g.dtype), updates, state.last)
        gradient = updates if gradient is None else gradient
        found, one = inner.update(pulled, state.direction, params, gradient=gradient, **extra)
        return found, SpringState(jnp.asarray(optax.safe_increment(state.count)), found, one)

    return optax.GradientTransformationExtraArgs(init, update)


def _at_length(tree: Any, square: Array) -> Any:
    """A tree whose squared norm is as given, in the direction of `tree`."""
    own = dot(tree, tree)
    scale = jnp.sqrt(square / jnp.where(own > 0, own, 1))
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), tree)


def dot(one: Any, other: Any) -> Array:
    """The dot product of two trees, in float32 at least."""

    def of_leaves(a, b):
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.vdot(a.astype(dtype), b.astype(dtype), precision=HIGHEST)

    return sum(jax.tree.leaves(jax.tree.map(of_leaves, one, other)), jnp.zeros(()))
