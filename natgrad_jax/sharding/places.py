"""The state of an optimizer over the devices of a mesh: where each array goes, and how many bytes a device has."""

from collections.abc import Callable
from math import prod
from typing import Any, Literal, get_args

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from natgrad_jax import addresses, checks, report
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.blocks import rings

Policy = Literal["replicated", "layer", "factor", "parameter", "examples"]


def state_specs(
    tx: optax.GradientTransformation,
    params: Tree,
    mesh: Mesh,
    policy: Policy = "factor",
    axis: str | tuple[str, ...] | None = None,
) -> Any:
    """Where each array of the state of an optimizer goes.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> params, mesh = {"w": jnp.ones((8, 4))}, jax.make_mesh((1,), ("data",))
    >>> watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    >>> tx = ng.kfac(0.1, watched.layers(params, jnp.ones((8, 8))))
    >>> shardings = state_specs(tx, params, mesh)
    >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    >>> bytes_per_device(state) == bytes_per_device(jax.eval_shape(tx.init, params), shardings)
    True

    Args:
        tx: an optimizer, or a chain with one in it.
        params: the parameters; shapes suffice.
        mesh: the devices, with axes of any type.
        policy: of statistics and operators. "replicated": every device has all. "layer": of a scanned layer each
            device has some copies whole, those that it refreshes if refreshes are shared; other layers are on every
            device. "factor": each array is cut along its first axis that the devices divide evenly: the stack of a
            scanned layer, else the rows of its factor. One that they do not divide is on every device. "parameter": as
            "factor", but only along the axes of the mesh along which the parameters of that layer are cut, as by FSDP
            or tensor parallelism. "examples": the rows that TENGraD keeps of a batch are cut along its examples, all
            else is on every device. Arrays of the shape of a parameter, as momentum has them, go where that is.
        axis: the axis of the mesh, or several, along which arrays are cut; all of them if None.

    Returns:
        A tree of `NamedSharding`, of the structure of `tx.init(params)`: for `jax.device_put`, `jax.jit` and
        `jax.lax.with_sharding_constraint`.

    Raises:
        TypeError: if `tx` is no transformation, or `mesh` is no mesh.
        ValueError: if the policy is unknown, or the mesh has no such axis.
    """
    checks.transformation("tx", tx)
    names = axes_of(mesh, axis)
    checks.choice("policy", policy, get_args(Policy))
    where = _where(params, mesh)
    used = _axes_used(params, mesh)

    def of_layer(name, stack, tree):
        """Where the arrays of a layer go."""
        along = names if policy != "parameter" else tuple(each for each in names if each in used(name))
        devices = prod(mesh.shape[each] for each in along)

        def cut(leaf):
            place = axis_cut(leaf.shape, stack, policy, devices) if along else None
            if place is None:
                return NamedSharding(mesh, PartitionSpec())
            return NamedSharding(mesh, PartitionSpec(*(None,) * place, along if len(along) > 1 else along[0]))

        def cut_rows(node):
            if policy == "examples" and rings.are_rows(node):
                return rings.placed(node, Devices(mesh, names, rows=True))
            return jax.tree.map(cut, node)

        return jax.tree.map(cut_rows, tree, is_leaf=rings.are_rows)

    def of_node(path, node):
        if not report.has_layers(node):
            return where(path, node)
        elsewhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), node)
        stacks = {name: operator.date.ndim for name, operator in node.operators.items()}
        cut = ({name: of_layer(name, stacks[name], tree) for name, tree in part.items()} for part in node[1:3])
        statistics, operators = cut
        return elsewhere._replace(statistics=statistics, operators=operators)

    shapes = jax.eval_shape(tx.init, params)
    return jax.tree_util.tree_map_with_path(of_node, shapes, is_leaf=report.has_layers)


def bytes_per_device(tree: Any, shardings: Any = None) -> int:
    """How many bytes of some arrays each device has.

    Args:
        tree: arrays, such as a state; or their shapes, as `jax.eval_shape(tx.init, params)` gives them.
        shardings: where they go, as `state_specs` says; None for where the arrays are.

    Returns:
        Bytes on one device.

    Raises:
        ValueError: if there are shapes, and `shardings` does not say where they go.
    """
    leaves = jax.tree.leaves(tree)
    given = [getattr(leaf, "sharding", None) for leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    places = [sharding for sharding in given if sharding is not None]
    if len(places) != len(leaves):
        raise ValueError(
            f"`tree` has {len(leaves)} arrays, and it is known of {len(places)} where they go; "
            "pass arrays, or shapes with `shardings=ng.sharding.state_specs(tx, params, mesh)`."
        )
    pairs = zip(leaves, places, strict=True)
    return sum(prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)


def axis_cut(shape: tuple[int, ...], stack: int, policy: Policy, devices: int) -> int | None:
    """Along which axis an array of a layer is cut.

    Args:
        shape: of the array.
        stack: how many axes S has.
        policy: as `state_specs` takes it.
        devices: how many share the array.

    Returns:
        The first axis that they divide, of those that the policy allows; None if there is none.
    """
    allowed = shape[: {"replicated": 0, "examples": 0, "layer": min(1, stack)}.get(policy)]
    return next((place for place, size in enumerate(allowed) if size and size % devices == 0), None)


def axes_of(mesh: Any, axis: str | tuple[str, ...] | None, kinds: Any = Mesh) -> tuple[str, ...]:
    """The axes of a mesh that were asked for; all of them if None. `kinds` is what counts as a mesh.

    Raises:
        TypeError: if `mesh` is no mesh.
        ValueError: if the mesh has no such axis.
    """
    if not isinstance(mesh, kinds):
        raise TypeError(f"`mesh` is {checks.shown(mesh)}; expected a `jax.sharding.Mesh`, as `jax.make_mesh` makes it.")
    names = mesh.axis_names if axis is None else tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not names or set(names) - set(mesh.axis_names):
        raise ValueError(
            f"`axis` is {axis!r}; expected an axis of the mesh, or several: {list(mesh.axis_names)}; None for all."
        )
    return names


def _axes_used(params: Tree, mesh: Mesh) -> Callable[[str], set[str]]:
    """Name of a layer -> the axes of the mesh along which a parameter of it is cut."""
    known: dict[str, set[str]] = {}
    for address, leaf in addresses.flatten(params).items():
        sharding = getattr(leaf, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
        known[address] = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}

    def used(name):
        inside = (axes for address, axes in known.items() if f"{address}/".startswith(f"{name}/"))
        return set().union(*inside) & set(mesh.axis_names)

    return used


def _where(params: Tree, mesh: Mesh) -> Callable[[Any, Any], NamedSharding]:
    """Path and array of a state -> where the parameter of that path is, of the same shape; else on every device."""
    known = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and set(sharding.mesh.axis_names) <= set(mesh.axis_names):
            known[path] = leaf.shape, sharding.spec

    def where(path, leaf):
        for start in range(len(path)):
            if path[start:] in known:
                shape, spec = known[path[start:]]
                return NamedSharding(mesh, spec if shape == leaf.shape else PartitionSpec())
        return NamedSharding(mesh, PartitionSpec())

    return where
