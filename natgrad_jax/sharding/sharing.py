"""The devices of a mesh share the refreshes of an optimizer."""

from typing import Any, Literal, get_args

import jax
import optax

from natgrad_jax import checks, report
from natgrad_jax.lift.meshes import on_any_mesh
from natgrad_jax.lift.shares import Devices
from natgrad_jax.sharding.places import axes_of

Policy = Literal["replicated", "layer"]


def share_refreshes(
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    policy: Policy = "replicated",
    axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Let each device of a mesh refresh some of the layers, instead of all of them.

    The layers go to the devices by the cubes of the sides of their matrices, the copies of a stack one by one, so that
    all have as much to do. No device waits for another while it solves. Updates and state are those of `tx`.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> params, mesh = {"w": jnp.ones((8, 4))}, jax.make_mesh((1,), ("data",))
    >>> watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    >>> tx = ng.kfac(0.1, watched.layers(params, jnp.ones((8, 8))))
    >>> tx = share_refreshes(tx, mesh)

    Args:
        tx: an optimizer or a direction of this package, or a chain with one in it. One that has no refresh, as K-BFGS,
            stays as it is.
        mesh: the devices, with axes of any type; the batch should be on it.
        policy: where the results go, as the state does by `state_specs`. "replicated": they are gathered once, at the
            end of the refresh. "layer": of a scanned layer whose stack the devices divide each has its part of the
            stack, and keeps it; others are gathered.
        axis: the axis of the mesh, or several, along which the devices share; all of them if None.

    Returns:
        The optimizer. Its `update` belongs under `jax.jit`.

    Raises:
        TypeError: if `mesh` is no mesh.
        ValueError: if the mesh has no such axis, or the policy is unknown; at `init`, if nothing in `tx` has layers.
    """
    axes = axes_of(mesh, axis)
    checks.choice("policy", policy, get_args(Policy))
    devices, inner = Devices(mesh, axes, policy == "layer"), optax.with_extra_args_support(tx)

    def init(params):
        state = inner.init(params)
        if not any(map(report.has_layers, jax.tree.leaves(state, is_leaf=report.has_layers))):
            raise ValueError(
                "`tx` has no state by layer, so there are no refreshes to share; expected an optimizer of this "
                "package, such as `ng.kfac(0.1, layers)`, or a chain with one in it."
            )
        return state

    def update(updates, state, params=None, **extra: Any):
        shared = None if devices.count == 1 else devices
        return inner.update(updates, state, params, shared_by=shared, **extra)

    return on_any_mesh(optax.GradientTransformationExtraArgs(init, update))
