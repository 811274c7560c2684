"""Algebra of trees of arrays as vectors."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.branches import chosen, varying
from natgrad_jax.base import Array, Scalar


def dot(one: Any, other: Any) -> Array:
    """The dot product of two trees, in float32 at least; all vectors of a dtype as one, since each sum is compiled."""
    found, vectors = jnp.zeros(()), {}
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        a, b = a.astype(dtype), b.astype(dtype)
        if a.ndim < 2:
            vectors.setdefault(jnp.promote_types(dtype, b.dtype), []).append((a.ravel(), b.ravel()))
        else:
            found += jnp.sum(a * b)
    for pairs in vectors.values():
        a, b = (jnp.concatenate(side) for side in zip(*pairs, strict=True))
        found += jnp.sum(a * b)
    return found


def dots(trees: Any, other: Any) -> Array:
    """The dot products of some trees with another, a vector."""
    return jnp.stack([dot(tree, other) for tree in trees])


def gram(trees: Any, others: Any = None) -> Array:
    """The products of every tree with every other, a matrix."""
    return jnp.stack([dots(others or trees, tree) for tree in trees])


def bias_corrected(tree: Any, decay: Scalar, count: Array) -> Any:
    """Averages that began at zero, over the sum of their weights, 1 - decay^count.

    The same as `optax.tree.bias_correction`, which raises under strict promotion.
    """
    wide = jnp.result_type(float)
    weight = 1 - jnp.asarray(decay, wide) ** count.astype(wide)
    return jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), tree)


def add(tree: Any, other: Any, weight: Scalar) -> Any:
    """Tree + weight other, in the dtypes of the tree."""
    return jax.tree.map(lambda a, b: (a + weight * b).astype(a.dtype), tree, other)


def scaled(tree: Any, weight: Scalar) -> Any:
    """Weight tree, in the dtypes of the tree."""
    return jax.tree.map(lambda leaf: (weight * leaf).astype(leaf.dtype), tree)


def select(condition: Array, tree: Any, other: Any) -> Any:
    """One tree or the other."""
    return chosen(condition, tree, other)


def within(square: Array, bound: Scalar) -> Array:
    """The factor in (0, 1] that brings a squared length down to a bound; 1 where the square is not positive."""
    return jnp.where(square > bound, jnp.sqrt(bound / jnp.where(square > 0, square, 1)), 1)


def differs(tree: Any) -> set[str]:
    """The axes of a `jax.shard_map` along which a tree differs, as far as JAX keeps count of it."""
    found: set[str] = set()
    for leaf in jax.tree.leaves(tree):
        found |= varying(jax.typeof(leaf))
    return found


def own(tree: Any, axis: str | tuple[str, ...]) -> Any:
    """A tree as each replica's own, so that what is differentiated by it is of that replica alone.

    Under `shard_map` derivatives by what is equal on all replicas are summed over them unasked.
    """
    always = jax.lax.axis_index(axis) >= 0
    return jax.tree.map(lambda leaf: jnp.where(always, leaf, leaf), tree)
