"""Wrappers of Optax that take no extra arguments, around an optimizer that needs one."""

from collections.abc import Callable
from typing import Any

import optax

from natgrad_jax import checks


def wrapped(
    wrapper: Callable[[optax.GradientTransformation], Any], tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Pass extra arguments to an optimizer inside a wrapper that drops or refuses them.

    `optax.lookahead`, `optax.contrib.sam` and `optax.contrib.split_real_and_imaginary` refuse `curvature`.
    `optax.MultiSteps(...).gradient_transformation()` in a chain drops it. Here the wrapper sees a transformation
    without extra arguments. The arguments of `update` reach the optimizer directly.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> params = {"w": jnp.ones((4, 3))}
    >>> watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    >>> layers = watched.layers(params, jnp.ones((8, 4)))
    >>> tx = wrapped(lambda inner: optax.lookahead(inner, 5, 0.5), ng.kfac(0.1, layers))
    >>> both = optax.LookaheadParams.init_synced(params)
    >>> out = watched.value_and_grad(params, jnp.ones((8, 4)), jnp.zeros((8, 3)), key=jax.random.key(0))
    >>> updates, state = tx.update(out.grad, tx.init(both), both, curvature=out.curvature)
    >>> optax.apply_updates(both, updates).fast["w"].shape
    (4, 3)

    Args:
        wrapper: a transformation -> the wrapped one, `lambda inner: optax.lookahead(inner, 5, 0.5)`.
        tx: the optimizer, or a direction.

    Returns:
        A transformation with the state of the wrapped one; each extra argument of `update` reaches the optimizer.

    Raises:
        TypeError: if `tx` is no transformation, or `wrapper` does not make one of it.
    """
    checks.transformation("tx", tx)
    if not callable(wrapper):
        raise TypeError(
            f"`wrapper` is {checks.shown(wrapper)}; expected a function, such as "
            "`lambda inner: optax.lookahead(inner, 5, 0.5)`."
        )
    held: dict[str, Any] = {}

    def inner(updates, state, params=None):
        return tx.update(updates, state, params, **held)

    outer = wrapper(optax.GradientTransformation(tx.init, inner))
    checks.transformation("wrapper(tx)", outer)

    def update(updates, state, params=None, **extra):
        held.update(extra)
        try:
            return outer.update(updates, state, params)
        finally:
            held.clear()

    return optax.GradientTransformationExtraArgs(outer.init, update)
