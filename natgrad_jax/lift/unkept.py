"""The exact natural gradient of the batch at hand, in sample space, of which nothing is kept.

    1  K <- J J^T: of the layers from their rows, of other parameters from the gradients of some examples at a time
    2  direction <- (g - J^T (K + damping I)^-1 J g) / damping

J is never in memory, nor in the state; J v is a pass of forward mode, J^T w a pullback. It is for `refresh_every=1`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.algebra import stacks
from natgrad_jax.base import Array, Layers, ScalarOrSchedule
from natgrad_jax.blocks import samples
from natgrad_jax.lift import evidence as evidences
from natgrad_jax.lift.state import at_step


class UnkeptState(NamedTuple):
    """State of `unkept`.

    Attributes:
        count: steps done, int32.
        damping: of the last step.
        fallbacks: how often the kernel was factorised by its eigenvalues, int32.
        rejected: steps of no direction, since the kernel was not finite or the batch empty, int32.
    """

    count: Array
    damping: Array
    fallbacks: Array
    rejected: Array


def unkept(layers: Layers, damping: ScalarOrSchedule | None, workspace: int) -> optax.GradientTransformationExtraArgs:
    """The direction (F + damping I)^-1 g of the batch that comes with it.

    Args:
        layers: of a capture with `jacobian="examples"`.
        damping: strength in the units of F, or its schedule; None if it comes with `update`.
        workspace: bytes that what is formed on the way to the kernel may take.

    Returns:
        A transformation, whose `update` needs the `curvature` of `value_and_grad` itself.

    Raises:
        ValueError: if the layers are of another capture.
    """
    checks.layers(layers)
    if layers.jacobian != "examples":
        raise ValueError(
            "`kept=False` forms the gradients of the examples when they are needed, which takes a model that is "
            'watched one example at a time: capture with `jacobian="examples"`.'
        )

    def init(params):
        del params
        zero = (jnp.zeros((), jnp.int32) for _ in range(3))
        return UnkeptState(next(zero), jnp.zeros((), jnp.float32), next(zero), next(zero))

    def update(updates, state, params=None, *, curvature: Any = None, request=None, damping: Any = damping, **extra):
        del params, extra
        if request is not None:
            return updates, state
        if not hasattr(curvature, "space"):
            raise TypeError(
                f"`curvature` is of type {type(curvature).__name__}; `kept=False` takes products with the Jacobian "
                "from `out.curvature` itself, of captures without `axis_name`."
            )
        there = evidences.present(layers, updates)
        space, evidence = curvature.space(), curvature()
        kernel = jnp.zeros((space.draws * space.examples,) * 2, space.root.dtype)
        for layer in (layer for layer in there if layer.is_known):  # 1
            like = samples.empty(layer, space.examples, space.draws, "example")
            found = samples.observed(layer, like, evidence[layer.name], "example", workspace)
            one = samples.kernel(found, workspace).astype(kernel.dtype)
            kernel += jnp.sum(one, axis=range(one.ndim - 2))
        if rest := [layer for layer in there if not layer.is_known]:
            kernel += space.kernel(rest, workspace).astype(kernel.dtype)
        strength = jnp.asarray(at_step(damping, state.count), kernel.dtype)
        floor = stacks.floored(strength, stacks.frobenius(kernel))
        factor, failed = stacks.cholesky_or_eigh(kernel, floor)
        weights = stacks.cholesky_solve(factor, space.project(updates).astype(kernel.dtype))
        shown = addresses.flatten(space.back(weights))  # 2
        leaves = addresses.flatten(updates)
        sound = jnp.all(jnp.isfinite(weights)) & (curvature.count > 0)
        direction = {
            name: jnp.where(sound, (leaf - shown[name]) / floor.astype(leaf.dtype), 0).astype(leaf.dtype)
            for name, leaf in leaves.items()
        }
        return addresses.replace(updates, direction), UnkeptState(
            jnp.asarray(optax.safe_increment(state.count)),
            strength.astype(jnp.float32),
            state.fallbacks + failed.astype(jnp.int32),
            state.rejected + (~sound).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init, update)
