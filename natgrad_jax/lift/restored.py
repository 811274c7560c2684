"""Whether state and gradient are what a transformation could have: what tells those of another model or settings."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from natgrad_jax import addresses, checks


def check(state: Any, init: Callable[[Any], Any], updates: Any) -> None:
    """Refuse a state of other leaves or shapes, before anything is computed of it.

    Args:
        state: as it was given; None in the place of operators that a checkpoint left out.
        init: of the transformation.
        updates: the gradient, a tree like the parameters.

    Raises:
        TypeError: if the gradient is no tree of arrays.
        ValueError: with the name of the first leaf that does not fit.
    """
    checks.arrays(updates)
    expected = jax.eval_shape(init, updates)
    if not isinstance(state, type(expected)):
        raise ValueError(
            f"The state is of type {type(state).__name__}; expected {type(expected).__name__}, as `tx.init(params)` "
            "makes it."
        )
    found = _named(state)
    left_out = tuple(name for name, leaf in found.items() if leaf is None)
    for name, leaf in _named(expected).items():
        if leaf is None or name.startswith(left_out):
            continue
        if name not in found:
            raise ValueError(f"The state has no `{name}`, of shape {tuple(leaf.shape)} here; {_ADVICE}")
        if tuple(found[name].shape) != tuple(leaf.shape):
            shapes = tuple(found[name].shape), tuple(leaf.shape)
            raise ValueError(f"The state has `{name}` of shape {shapes[0]}; expected {shapes[1]}: {_ADVICE}")
    if unknown := [name for name in found if name not in _named(expected) and found[name] is not None]:
        raise ValueError(f"The state has `{unknown[0]}`, which is not of this transformation: {_ADVICE}")


def like_parameters(updates: Any, params: Any) -> None:
    """Refuse a gradient that has other arrays than the parameters.

    Args:
        updates: the gradient.
        params: the parameters; None if they are not known, which refuses nothing.

    Raises:
        TypeError: if the gradient is no tree of arrays.
        ValueError: with the names of the arrays that differ.
    """
    if params is None:
        return
    checks.arrays(updates)
    found, expected = addresses.flatten(updates).keys(), addresses.flatten(params).keys()
    hidden = tuple(f"{entry}/" for entry in addresses.masked(updates) | addresses.masked(params))
    apart = [
        sorted(name for name in one if not f"{name}/".startswith(hidden))
        for one in (found - expected, expected - found)
    ]
    if any(apart):
        has = f"has {apart[0][:4]}, which the parameters have not" if apart[0] else f"has no {apart[1][:4]}"
        raise ValueError(
            f"`updates` {has}; expected the gradient, a tree like the parameters: "
            "`tx.update(out.grad, state, params, curvature=out.curvature)`."
        )


def with_gradients_checked(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """A transformation that refuses what is no gradient of its parameters, before it does anything."""

    def update(updates, state, params=None, **extra):
        if extra.get("request") is None:
            like_parameters(updates, params)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


_ADVICE = (
    "it was made for a model of another width, by another method or with other settings. Build the transformation as "
    "the one that the checkpoint is of, or begin with `tx.init(params)`."
)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {jax.tree_util.keystr(path).removeprefix("."): leaf for path, leaf in leaves}
