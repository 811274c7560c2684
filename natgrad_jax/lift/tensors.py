"""Lift a method that needs shapes and a gradient: parameter arrays as tensors, with or without layers and curvature.

    1  blocks <- the parameter arrays, seen as tensors                              `layers.views`
    2  evidence <- of "curvature": the summed gradients of its labels, of every array; or of "gradient": the update
       that comes in, or the extra argument `gradient` where something stands in front
    3  all else is `lift.lift`

Without `layers` every array of the parameter tree is a block by itself; with them convolutions, groups and stacks of
layers are known for what they are, and a method may keep kernel and bias together.
"""

from collections.abc import Callable
from typing import Literal

import optax

from natgrad_jax import checks
from natgrad_jax.addresses import Tree
from natgrad_jax.base import Layer, Layers, Method, ScalarOrSchedule
from natgrad_jax.layers.views import sources
from natgrad_jax.lift import evidence as evidences
from natgrad_jax.lift.evidence import Scale
from natgrad_jax.lift.lift import lift
from natgrad_jax.lift.requests import Observe, Refresh
from natgrad_jax.lift.state import Schedule

Statistics = Literal["curvature", "gradient"]


def lift_tensors(
    method: Callable[..., Method],
    see: Callable[[Layer], Layer],
    layers: Layers | None,
    *,
    damping: ScalarOrSchedule | None,
    decay: ScalarOrSchedule,
    schedule: Schedule,
    statistics: Statistics,
    scale: Scale = "example",
    whole: Callable[[Layer], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lift a method of one tensor to a transformation of the parameter tree.

    Args:
        method: decay -> Method.
        see: an array, or a layer that is kept whole, as `layers.views.sources` gives them -> its tensor.
        layers: the layers of the model, or None.
        damping: as `lift` takes it.
        decay: as `lift` takes it.
        schedule: as `lift` takes it.
        statistics: "curvature" or "gradient".
        scale: of the statistics of the curvature, "example" for that of F, "batch" for that of the mean gradient of a
            batch, F / W; that of a gradient is its own.
        whole: which layers keep their arrays together; None for none.

    Returns:
        A transformation. Its `update` needs the extra argument `curvature` for statistics of the curvature, and takes
        `gradient`: what the statistics are made of if not of the curvature, the update itself by default.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if a number is out of its range.
    """
    checks.layers(layers, optional=True)

    def blocks_of(tree: Tree) -> Layers:
        return Layers(tuple(map(see, sources(layers, tree, whole=whole))))

    def lifted(blocks: Layers) -> optax.GradientTransformationExtraArgs:
        return lift(method, blocks, damping=damping, decay=decay, schedule=schedule)

    lifted(Layers(()))  # settings are refused now, not when there are parameters

    def init(params):
        return lifted(blocks_of(params)).init(params)

    def update(updates, state, params=None, *, curvature=None, gradient=None, request=None, **extra):
        blocks = blocks_of(updates)
        here = evidences.present(blocks, updates)
        if isinstance(request, Refresh) and curvature is None and gradient is None:
            evidence = None
        elif statistics == "gradient":
            if gradient is None and isinstance(request, Observe):
                raise ValueError(
                    'The statistics are of the gradient (`statistics="gradient"`), but what is observed is evidence '
                    "alone; give what `capture.value_and_grad` returned, or gradients."
                )
            evidence = evidences.of_gradient(here, updates if gradient is None else gradient)
        else:
            evidence = evidences.of_curvature(here, layers, curvature, scale)
        return lifted(blocks).update(updates, state, params, curvature=evidence, request=request, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
