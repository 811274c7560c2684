"""Lift a method that needs shapes and a gradient: parameter arrays as tensors, with or without layers and curvature.

    1  blocks <- the parameter arrays, seen as tensors                              `layers.views`
    2  evidence <- of "curvature": the summed gradients of its labels, of every array; or of "gradient": the update
       that comes in, or the extra argument `gradient` where something stands in front
    3  all else is `transform.lift`

Without `layers` every array of the parameter tree is a block by itself; with them convolutions, groups and stacks of
layers are known for what they are, and a method may keep kernel and bias together.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.addresses import Tree
from natgrad_jax.base import Array, Evidence, Layer, Layers, Method, ScalarOrSchedule
from natgrad_jax.damping import Damping
from natgrad_jax.layers import from_matrix, to_matrix
from natgrad_jax.layers.views import MODES, Modes, in_modes, merged, sources, view
from natgrad_jax.transform import Schedule, lift

Statistics = Literal["curvature", "gradient"]
STATISTICS = get_args(Statistics)
Scale = Literal["example", "batch"]
SCALES = get_args(Scale)


def lift_tensors(
    method: Callable[..., Method],
    see: Callable[[Layer], Layer],
    layers: Layers | None,
    *,
    damping: Damping,
    decay: ScalarOrSchedule,
    schedule: Schedule,
    statistics: Statistics,
    scale: Scale = "example",
    whole: tuple[str, ...] = (),
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
        whole: kinds of layer whose arrays stay together.

    Returns:
        A transformation. Its `update` needs the extra argument `curvature` for statistics of the curvature, and takes
        `gradient`: what the statistics are made of if not of the curvature, the update itself by default.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if a word is unknown or a number out of its range.
    """
    if not (layers is None or isinstance(layers, Layers)):
        raise TypeError(f"`layers` is {layers!r}; expected what `capture.layers(variables, x)` returns, or None.")
    checks.choice("statistics", statistics, STATISTICS)
    checks.choice("scale", scale, SCALES)

    def blocks_of(tree: Tree) -> Layers:
        return Layers(tuple(map(see, sources(layers, tree, whole=whole))))

    def lifted(blocks: Layers) -> optax.GradientTransformationExtraArgs:
        return lift(method, blocks, damping=damping, decay=decay, schedule=schedule)

    lifted(Layers(()))  # settings are refused now, not when there are parameters

    def init(params):
        return lifted(blocks_of(params)).init(params)

    def update(updates, state, params=None, *, curvature=None, gradient=None, **extra):
        blocks = blocks_of(updates)
        here = checks.present(blocks, updates)
        if statistics == "gradient":
            if gradient is None and extra.get("warm_start") is not None:
                raise ValueError(
                    'The statistics are of the gradient (`statistics="gradient"`), but the stream of the warm start '
                    "gives evidence alone; let it give what `capture.value_and_grad` returned, or gradients."
                )
            evidence = _of_gradient(here, updates if gradient is None else gradient)
        else:
            evidence = _of_curvature(here, layers, curvature, scale)
        return lifted(blocks).update(updates, state, params, curvature=evidence, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def cut_in_modes(kernels: Modes, merge: int | None, block_size: int | None) -> Callable[[Layer], Layer]:
    """How an array is seen in modes of more than one entry, the short ones joined and the long ones cut.

    Args:
        kernels: the modes of a kernel, as `layers.views.in_modes` takes them.
        merge: neighbouring modes are joined while their product is at most this; None to join none.
        block_size: modes longer than this are cut into blocks; None to cut none.

    Returns:
        The `see` of `lift_tensors`.

    Raises:
        ValueError: if the word is unknown or a number out of its range.
    """
    checks.choice("kernels", kernels, MODES)
    for name, value in (("merge", merge), ("block_size", block_size)):
        if value is not None:
            checks.number(name, value, least=1)
    return lambda source: view(source, merged(in_modes(source, kernels), merge), block=block_size)


def _of_gradient(blocks: tuple[Layer, ...], gradient: Tree) -> dict[str, Evidence]:
    """The evidence of one gradient: one draw, of total weight 1."""
    leaves = addresses.flatten(gradient)
    shapes = {address: tuple(leaf.shape) for address, leaf in leaves.items()}
    _fits(blocks, shapes, "`gradient`", "Pass the gradient of the very parameters that are updated.")
    evidence = {}
    for block in blocks:
        parts = {leaf.role: leaves[leaf.address] for leaf in block.leaves}
        tensor = jnp.expand_dims(to_matrix(block, parts), len(block.stack))
        evidence[block.name] = Evidence(gradient=tensor, count=jnp.ones((), block.dtype))
    return evidence


def _of_curvature(
    blocks: tuple[Layer, ...], layers: Layers | None, curvature: Any, scale: Scale
) -> Callable[[], Mapping[str, Evidence]]:
    """The evidence of the curvature, as tensors, when it is called."""
    if curvature is None:
        raise ValueError(
            "`curvature` is missing: call `tx.update(grads, state, params, curvature=out.curvature)`, where `out` is "
            'what `capture.value_and_grad` returned, or take the statistics from the gradient, `statistics="gradient"`.'
        )
    if layers is None:
        layers = getattr(curvature, "layers", None)
    if layers is None:
        raise TypeError(
            f"`curvature` is of type {type(curvature).__name__}, which does not say what layers it is of; pass the "
            "`out.curvature` of `capture.value_and_grad` itself, or build the transformation with `layers`."
        )
    shapes = {leaf.address: leaf.shape for layer in layers.blocks for leaf in layer.leaves}
    _fits(blocks, shapes, "`curvature`", "Capture the model whose parameters are updated.")
    needed = {leaf.address for block in blocks for leaf in block.leaves}
    known = tuple(layer for layer in layers.blocks if any(leaf.address in needed for leaf in layer.leaves))
    evidence_of = checks.lazy_evidence(curvature, known)

    def found():
        draws, origins, all_evidence = {}, {}, evidence_of()
        for layer in known:
            evidence = all_evidence[layer.name]
            if evidence.gradient is None or evidence.count is None:
                raise ValueError(
                    f"The evidence for {layer.name!r} has no `gradient` or no `count`; take it from "
                    '`capture.value_and_grad`, with other `labels` than "forward".'
                )
            arrays = jax.vmap(lambda matrix, layer=layer: from_matrix(layer, matrix), in_axes=len(layer.stack))
            parts = arrays(evidence.gradient)
            for leaf in layer.leaves:
                draws[leaf.address], origins[leaf.address] = parts[leaf.role], evidence
        return {block.name: _as_tensor(block, draws, origins[block.leaves[0].address], scale) for block in blocks}

    return found


def _fits(blocks: tuple[Layer, ...], shapes: Mapping[str, tuple[int, ...]], name: str, advice: str) -> None:
    """Refuse what is of other parameters than the blocks; `shapes` says by address what it is of."""
    for block in blocks:
        for leaf in block.leaves:
            if shapes.get(leaf.address) != leaf.shape:
                there = shapes.get(leaf.address, "none of that name")
                raise ValueError(f"Parameter {leaf.address!r} has shape {leaf.shape}; {name} has {there}. {advice}")


def _as_tensor(block: Layer, draws: Mapping[str, Array], origin: Evidence, scale: Scale) -> Evidence:
    """The evidence of one block, from the gradients [K, ...] of its arrays and the evidence they come from."""
    parts = {leaf.role: draws[leaf.address] for leaf in block.leaves}
    tensor = jax.vmap(lambda parts: to_matrix(block, parts), out_axes=len(block.stack))(parts)
    count = jnp.asarray(origin.count)
    return origin._replace(gradient=tensor, count=count if scale == "example" else count**2)
