"""Arrays on a mesh with `Explicit` axes, taken to where the compiler spreads the work, and back.

JAX types such an array with its sharding, and refuses what has no rule for it: sums over a sharded axis in a product,
the Cholesky factor of a sharded stack. Where the same axes are `Auto`, the compiler decides. `jax.sharding.auto_axes`
does that for a function whose results are known beforehand. Here the way in and the way out are apart, since the
curvature of a batch is asked for later.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard

Mesh = AbstractMesh | jax.sharding.Mesh
"""A mesh; outside of `jit` the one that has the devices."""


def explicit(*trees: Any) -> Mesh | None:
    """The mesh with `Explicit` axes that some arrays are on.

    Args:
        *trees: of arrays; what is none counts for nothing.

    Returns:
        The mesh of the first such array; None if there is none.
    """
    for leaf in jax.tree.leaves(trees):
        mesh = _mesh_of(leaf)
        if mesh is not None and mesh.explicit_axes:
            return mesh
    return None


@contextmanager
def within(mesh: Mesh) -> Generator[None]:
    """A region where the `Explicit` axes of a mesh are `Auto`."""
    kinds = (AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
    automatic = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=tuple(kinds))
    with jax.sharding.use_abstract_mesh(automatic):
        yield


def is_within(mesh: Mesh) -> bool:
    """Whether this is the region of a mesh."""
    return set(mesh.explicit_axes) <= set(jax.sharding.get_abstract_mesh().auto_axes)


def entered(tree: Any) -> Any:
    """The arrays of a tree as they are typed in the region; each stays where it is."""

    def one(leaf):
        mesh = _mesh_of(leaf)
        return reshard(leaf, PartitionSpec()) if mesh is not None and mesh.explicit_axes else leaf

    return jax.tree.map(one, tree)


def left(tree: Any, mesh: Mesh, like: Any = None, spec_of: Callable[[Any], PartitionSpec] | None = None) -> Any:
    """The arrays of a tree as they are typed outside of the region.

    Args:
        tree: what was found in the region.
        mesh: the mesh.
        like: a tree from outside; an array of the same path, shape and rank goes where that one is.
        spec_of: array -> where another goes; on every device if None.

    Returns:
        The tree on the mesh.
    """
    known = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        if _mesh_of(leaf) is not None:
            known[path] = leaf.shape, jax.typeof(leaf).sharding.spec

    def one(path, leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        shape, spec = known.get(path, (None, None))
        if shape != leaf.shape:
            spec = PartitionSpec() if spec_of is None else spec_of(leaf)
        move = reshard if isinstance(leaf, jax.core.Tracer) else jax.device_put
        return move(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def _mesh_of(leaf: Any) -> Mesh | None:
    """The mesh that the type of an array names; None where it names none."""
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    return None if mesh.empty else mesh
