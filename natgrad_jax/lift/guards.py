"""What is not finite is dropped, one copy of a layer at a time."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.branches import chosen
from natgrad_jax.algebra.stacks import all_finite, per_stack
from natgrad_jax.base import Array

State = TypeVar("State")
_SMALL = 4096  # vectors up to this length are filled up to the longest and summed as one: a sum takes 60 ms to compile


def finite(state: State, axes: int) -> Array:
    """Whether a copy is finite throughout.

    Args:
        state: arrays that lead with `axes` stack axes.
        axes: number of stack axes.

    Returns:
        Booleans [S].
    """
    good = jnp.array(True)
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            good = good & all_finite(leaf, tuple(range(axes, leaf.ndim)))
    return good


def finite_each(states: Mapping[str, tuple[Any, int]]) -> dict[str, Array]:
    """Whether copies of some states are finite throughout, the vectors of all states in one sum.

    Args:
        states: {name: state and number of its stack axes}, as `finite` takes them.

    Returns:
        {name: booleans [S]}.
    """
    found, vectors = {}, {}
    for name, (state, axes) in states.items():
        leaves = jax.tree.leaves(state)
        is_small = [not axes and leaf.ndim == 1 and 0 < leaf.size <= _SMALL for leaf in leaves]
        found[name] = finite([leaf for leaf, small in zip(leaves, is_small, strict=True) if not small], axes)
        for leaf in (leaf for leaf, small in zip(leaves, is_small, strict=True) if small):
            vectors.setdefault(leaf.dtype, []).append((name, leaf))
    for pairs in vectors.values():
        longest = max(leaf.size for _, leaf in pairs)
        rows = jnp.stack([jnp.pad(leaf, (0, longest - leaf.size)) for _, leaf in pairs])
        for (name, _), good in zip(pairs, all_finite(rows, (1,)), strict=True):
            found[name] = found[name] & good
    return found


def choose(good: Array, new: State, old: State) -> State:
    """The new copies where `good` [S], or [] for all, the old ones elsewhere."""
    if jnp.ndim(good) == 0:
        return chosen(good, new, old)
    return jax.tree.map(lambda fresh, former: jnp.where(per_stack(good, fresh), fresh, former), new, old)
