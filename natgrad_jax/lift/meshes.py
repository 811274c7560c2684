"""A transformation on arrays of a mesh with `Explicit` axes: done where they are `Auto`."""

from typing import Any

import optax

from natgrad_jax.algebra.meshes import entered, explicit, left, within


def on_any_mesh(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, on a mesh with `Explicit` axes as well.

    Args:
        tx: a transformation.

    Returns:
        It, with a state that is on the mesh of the parameters from the start: every array of which they do not say
        more is on every device. Updates are where the parameters are, where the gradient is if these are not given; the
        state stays where it was.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params):
        state, mesh = inner.init(params), explicit(params)
        return state if mesh is None else left(state, mesh, state)

    def update(updates, state, params=None, **extra: Any):
        mesh = explicit(updates, params)
        if mesh is None:
            return inner.update(updates, state, params, **extra)
        with within(mesh):
            given, inside, at, more = entered((updates, state, params, extra))
            found, new = inner.update(given, inside, at, **more)
        return left(found, mesh, updates if params is None else params), left(new, mesh, state)

    return optax.GradientTransformationExtraArgs(init, update)
