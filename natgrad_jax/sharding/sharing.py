"""The devices of a mesh share the refreshes of an optimizer, and the sums over the examples of a batch."""

from dataclasses import replace
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import optax

from natgrad_jax import checks, report
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.lift.meshes import on_any_mesh
from natgrad_jax.sharding.places import axes_of

Policy = Literal["replicated", "layer", "examples"]
Captured = TypeVar("Captured")


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
            stack, and keeps it; others are gathered. "examples", for TENGraD and SPRING: the rows of a batch stay on
            the devices of their examples, which exchange them once in a refresh, as `exchange` says, and then have the
            kernel and solve with it alike. Other methods refresh as by "replicated".
        axis: the axis of the mesh, or several, along which the devices share; all of them if None.

    Returns:
        The optimizer. Its `update` belongs under `jax.jit`.

    Raises:
        TypeError: if `tx` is no transformation, or `mesh` is no mesh.
        ValueError: if the mesh has no such axis, or the policy is unknown; at `init`, if nothing in `tx` has layers.
    """
    checks.transformation("tx", tx)
    axes = axes_of(mesh, axis)
    checks.choice("policy", policy, get_args(Policy))
    devices, inner = Devices(mesh, axes, policy == "layer", policy == "examples"), optax.with_extra_args_support(tx)

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


def share_gradients(capture: Captured, mesh: jax.sharding.Mesh, axis: str | tuple[str, ...] | None = None) -> Captured:
    """Let each device of a mesh sum the gradients of some copies of a scanned layer, instead of all of them.

    It goes with `share_refreshes(tx, mesh, "layer")`, by which each device makes the direction of the same copies. A
    step then scatters the gradient and gathers the direction, which sends as many bytes as to sum the gradient. The
    gradient is the same, in other places.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    >>> watched = share_gradients(watched, mesh)

    Args:
        capture: of a function or of a model.
        mesh: the devices, each of which has some of the examples.
        axis: the axis of the mesh, or several, over which the examples are spread; all of them if None.

    Returns:
        A capture. Scanned layers whose copies and examples the devices divide have the gradient from their rows, so
        that the cotangents of all copies exist at a time. The gradients of other parameters are as before.

    Raises:
        TypeError: if `capture` is none of one model, or `mesh` is no mesh.
        ValueError: if the mesh has no such axis, or the capture takes the batch in pieces or has an `axis_name`.
    """
    devices, watch = Devices(mesh, axes_of(mesh, axis), cut=True), getattr(capture, "watch", None)
    if watch is None:
        raise TypeError(
            f"`capture` is {checks.shown(capture)}; expected what `ng.capture`, `ng.linen.capture` or `ng.nnx.capture` "
            "returns."
        )
    if watch.microbatches > 1 or watch.axis_name:
        raise ValueError(
            f"The capture has `microbatches={watch.microbatches}` and `axis_name={watch.axis_name!r}`; a gradient is "
            "shared of a batch that is evaluated at once, and under `jax.jit`: leave both out."
        )
    problem = replace(watch.problem, devices=None if devices.count == 1 else devices)
    return replace(cast(Any, capture), watch=replace(watch, problem=problem))
