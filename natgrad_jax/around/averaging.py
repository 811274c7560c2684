"""Averages of the parameters, which are better to evaluate than the parameters that noisy steps leave behind.

    1  theta <- theta + update
    2  xi <- min(1 - 1 / k, decay)          in step k = 1, 2, ...
    3  average <- xi average + (1 - xi) theta

Of the first 1 / (1 - decay) steps it is the plain mean, so that the start counts for nothing, and nothing is to be
corrected. As in Martens and Grosse (2015), section 13, with 0.99.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.base import Array, Scalar
from natgrad_jax.lift.requests import answered


class AveragedState(NamedTuple):
    """State of `averaged`.

    Attributes:
        count: steps done, int32.
        average: of the parameters, a tree like them, in float32 at least.
        direction: state of the optimizer.
    """

    count: Array
    average: Any
    direction: Any


def averaged(tx: optax.GradientTransformation, decay: Scalar = 0.99) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps an average of the parameters as it goes; its steps stay what they are.

    Train with the parameters, evaluate with those of `averaged_params`. Batch statistics belong to the parameters: for
    a model with BatchNorm take them anew with the average. In NNX:
    `nnx.update(nnx.clone(model), ng.averaged_params(optimizer.opt_state))`, the clone kept in a name.

    >>> import natgrad_jax as ng
    >>> params, tx = {"w": jnp.zeros(2)}, ng.averaged(optax.sgd(1.0))
    >>> state = tx.init(params)
    >>> for gradient in (-1.0, -2.0):
    ...     updates, state = tx.update({"w": jnp.full(2, gradient)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], ng.averaged_params(state)["w"]  # the mean of 1 and 3
    (Array([3., 3.], dtype=float32), Array([2., 2.], dtype=float32))

    Args:
        tx: a complete optimizer, the last of its chain: what it returns is added to the parameters.
        decay: weight of the old average, in [0, 1); the average is over some 1 / (1 - decay) steps.

    Returns:
        The optimizer; `update` needs `params`.

    Raises:
        ValueError: if the decay is out of its range.
    """
    checks.transformation("tx", tx)
    checks.number("decay", decay, least=0, below=1)
    inner = optax.with_extra_args_support(tx)

    def init(params):
        return AveragedState(
            jnp.zeros((), jnp.int32), jax.tree.map(lambda leaf: _wide(jnp.array(leaf)), params), inner.init(params)
        )

    def update(updates, state, params=None, **extra):
        if extra.get("request") is not None:
            return answered(inner, updates, state, params, extra)
        if params is None:
            raise ValueError("`params` is None; an average of them needs them: `tx.update(grads, state, params, ...)`.")
        updates, direction = inner.update(updates, state.direction, params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))
        theta = optax.apply_updates(params, updates)  # 1
        xi = jnp.minimum(1 - 1 / count, decay)  # 2

        def moved(average, leaf):
            return (average + (1 - xi) * (leaf - average)).astype(average.dtype)  # 3

        return updates, AveragedState(count, jax.tree.map(moved, state.average, theta), direction)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(state: Any) -> Any:
    """The averaged parameters in the state of an optimizer, however deep `averaged` stands in it.

    Args:
        state: of `averaged(...)`, or of what wraps it.

    Returns:
        A tree like the parameters, in float32 at least; those of `init` before the first step.

    Raises:
        ValueError: if no average is in the state, or more than one.
    """
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, AveragedState))
    found = [part for part in parts if isinstance(part, AveragedState)]
    if len(found) != 1:
        raise ValueError(
            f"The state has {len(found)} averages of parameters; expected one. It is kept by `ng.averaged(tx)`."
        )
    return addresses.unboxed(found[0].average)


def _wide(leaf: Array) -> Array:
    """In float32 at least, so that a small share of a step is not lost."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
