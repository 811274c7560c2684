"""What is not finite is dropped, one copy of a layer at a time."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.stacks import per_stack
from natgrad_jax.base import Array

State = TypeVar("State")


def finite(state: State, axes: int, *, by_diagonal: bool) -> Array:
    """Whether a copy is finite throughout.

    Args:
        state: arrays that lead with `axes` stack axes.
        axes: number of stack axes.
        by_diagonal: whether the diagonal of a square matrix tells for the whole. It does for factors: an entry of a
            second moment that is not finite comes from a row whose own square is not, and a factorisation that fails
            is NaN throughout. That saves a pass over the largest arrays. (Of a scale that happens to be square, an
            entry that overflows by itself off the diagonal is not seen.)

    Returns:
        Booleans [S].
    """
    good = jnp.array(True)
    for leaf in jax.tree.leaves(state):
        if by_diagonal and leaf.ndim == axes + 2 and leaf.shape[-1] == leaf.shape[-2]:
            leaf = jnp.diagonal(leaf, axis1=-2, axis2=-1)
        good = good & jnp.all(jnp.isfinite(leaf), axis=tuple(range(axes, leaf.ndim)))
    return good


def choose(good: Array, new: State, old: State) -> State:
    """The new copies where `good` [S], or [] for all, the old ones elsewhere."""
    return jax.tree.map(lambda fresh, former: jnp.where(per_stack(good, fresh), fresh, former), new, old)
