"""A batch spread by hand over the replicas of a `jax.pmap` or `jax.shard_map`, evaluated as one.

    1  loss, gradient <- weighted means over the replicas                      sums over the axis, once per step
    2  evidence <- that of all replicas, joined along the examples             where the curvature is called
    3  J v, loss elsewhere <- those of all replicas                            where they are asked for

What comes out is the `Evaluation` of the whole batch, the same on every replica. So every method, every controlled step
and every wrapper works on it as it is, and so do methods that need rows or the squared gradient of the whole batch, of
which no average over replicas is right. The price: rows travel at a step with statistics, and each replica makes the
statistics of all. Under `jax.jit` with a sharded batch XLA spreads these too, and no axis has a name.

Everything is gathered by sums over the axis, whose results JAX knows to be equal on all replicas.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.addresses import Tree
from natgrad_jax.algebra import trees
from natgrad_jax.base import Array, Evidence, Layers
from natgrad_jax.watch.microbatches import merged
from natgrad_jax.watch.problem import no_argument

Axis = str | tuple[str, ...]
"""The name of an axis that `jax.pmap`, `jax.shard_map` or `jax.vmap` binds, or several."""


@dataclass(frozen=True, eq=False, repr=False)
class Replicas:
    """The curvature of the batch of all replicas; asked like `common.Curvature`."""

    _local: Any
    _axis: Axis
    _count: Array
    _value: Array
    layers: Layers

    @property
    def labels(self) -> str:
        """Whose cotangents the evidence has."""
        return self._local.labels

    @property
    def count(self) -> Array:
        """W, the total weight of the examples of all replicas."""
        return self._count

    dtype = no_argument

    @property
    def floor(self) -> Array | None:
        """What the loss cannot fall below; see `common.Curvature.floor`."""
        least = self._local.floor
        return None if least is None else jax.lax.pmin(trees.own(least, self._axis), self._axis)

    def __call__(self, params: Tree | None = None) -> dict[str, Evidence]:
        """The evidence of all replicas at the parameters of this step, or at others."""
        found = self._local(None if params is None else trees.own(params, self._axis))
        return {layer.name: self._joined(found[layer.name], layer.module_axes) for layer in self.layers.blocks}

    def along(self, direction: Tree) -> Array:
        """J times a direction at the outputs of all replicas; see `common.Curvature.along`."""
        found = self._local.along(trees.own(direction, self._axis))
        share = jnp.sqrt(share_of(self._local.count, self._axis))  # each has its own count
        return self._gathered(found * share.astype(found.dtype), 0)

    def value(self, params: Tree | None = None) -> Array:
        """The objective on the whole batch at other parameters, a scalar."""
        if params is None:
            return self._value
        return averaged(self._local.value(trees.own(params, self._axis)), self._local.count, self._axis)

    def value_and_slope(self, params: Tree, direction: Tree) -> tuple[Array, Array]:
        """The objective on the whole batch at other parameters, and its derivative along a direction there."""
        found = self._local.value_and_slope(*trees.own((params, direction), self._axis))
        return averaged(found, self._local.count, self._axis)

    def _joined(self, evidence: Evidence, axes: int) -> Evidence:
        """The evidence of all replicas; a layer has `axes` axes of S."""

        def along(values, axis):
            return jax.tree.map(lambda leaf: self._gathered(leaf, axis), values)

        return Evidence(
            along(evidence.inputs, axes),
            along(evidence.cotangents, 1 + axes),
            jax.tree.map(lambda leaf: jax.lax.psum(leaf, self._axis), evidence.gradient),
            along(evidence.weights, 0),
            None if evidence.count is None else self._count.astype(evidence.count.dtype),
            along(evidence.slopes, 1),
            along(evidence.examples, 1),
        )

    def _gathered(self, leaf: Array, axis: int) -> Array:
        """[..., N at `axis`, ...] of every replica -> [..., replicas N, ...]."""
        here = jnp.arange(jax.lax.psum(1, self._axis)) == jax.lax.axis_index(self._axis)
        placed = jnp.where(here.reshape(-1, *(1,) * leaf.ndim), leaf[None], jnp.zeros((), leaf.dtype))
        return merged(jax.lax.psum(placed, self._axis), axis)


def averaged(tree: Any, count: Array, axis: Axis) -> Any:
    """The mean over replicas, weighted by their counts; zero where these are."""
    share = share_of(count, axis)
    return jax.tree.map(lambda leaf: jax.lax.psum(leaf * share.astype(leaf.dtype), axis), tree)


def share_of(count: Array, axis: Axis) -> Array:
    """A replica's count over that of all, in double precision where there is one; zero where that is."""
    count = trees.own(jnp.asarray(count, float), axis)
    total = jax.lax.psum(count, axis)
    return count / jnp.where(total > 0, total, 1)


def refuse_unsaid() -> None:
    """Refuse replicas of which nobody said whether they share a batch.

    Where `jax.shard_map` checks what differs along its axes, the types of gradient and evidence tell, and `lift`
    compares them; `jax.pmap`, and `shard_map` without that check, keep no count of it.

    Raises:
        ValueError: inside of either.
    """
    unsaid = [
        axis for axis in jax.sharding.get_abstract_mesh().manual_axes if not trees.differs(jax.lax.axis_index(axis))
    ]
    if unsaid:
        names = unsaid[0] if len(unsaid) == 1 else tuple(unsaid)
        raise ValueError(
            f"The replicas of the axis {names!r} (of `jax.pmap`, or of `jax.shard_map` with `check_vma=False`) each "
            "have examples of their own, and `axis_name` does not say whether these are one batch. If they are: "
            '`jax.pmap(step, axis_name="batch")` and `capture(..., axis_name="batch")`, or else the replicas drift '
            "apart. If each replica is a training by itself: `capture(..., axis_name=())`."
        )


def bound(axis: Axis) -> int:
    """How many replicas an axis has.

    Args:
        axis: its name.

    Returns:
        Their number.

    Raises:
        ValueError: if it is bound nowhere around the call.
    """
    try:
        return jax.lax.psum(1, axis)
    except NameError as error:
        raise ValueError(
            f"`axis_name` is {axis!r}, but no such axis is bound here ({error}). Call `value_and_grad` inside of "
            f"`jax.pmap(step, axis_name={axis!r})` or of `jax.shard_map` over a mesh with that axis; elsewhere leave "
            "`axis_name` out."
        ) from None
