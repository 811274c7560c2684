"""The evidence of a batch: for which blocks it is needed, checked, and adapted to how a method sees the parameters."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import addresses, checks
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra import trees
from natgrad_jax.base import UNSEEN, Array, Evidence, Layer, Layers, Leaf
from natgrad_jax.layers import KINDS
from natgrad_jax.layers.joint import is_joint
from natgrad_jax.layers.norm import only
from natgrad_jax.layers.rows import input_rows, output_rows

Scale = Literal["example", "batch"]
"""Units of statistics of tensors: those of F, or of the squared mean gradient of a batch, F / W."""
_ADVICE = "Capture the model that the `layers` of the transformation were found in."


def present(layers: Layers, tree: Any) -> tuple[Layer, ...]:
    """The blocks whose parameters a tree has; those that a mask took away are left out.

    Args:
        layers: of the model.
        tree: parameters or gradients, possibly masked; a tree without leaves stands for any.

    Returns:
        The blocks.

    Raises:
        TypeError: if a parameter is no array of real numbers.
        ValueError: if the tree is not of the model that the layers were found in.
    """
    leaves, hidden = addresses.flatten(tree), addresses.masked(tree)
    if not leaves and not hidden:  # a placeholder for the parameters, as `optax.tree.map_params` makes
        return layers.blocks
    checks.arrays(tree)
    if set(leaves) == {""} and not any(leaf.address == "" for layer in layers.blocks for leaf in layer.leaves):
        raise ValueError(
            f"The parameters are one array of shape {tuple(leaves[''].shape)} without a name; expected the tree "
            "`variables['params']`. Curvature needs to know the layers: take `optax.flatten` away."
        )

    def is_hidden(leaf):  # a mask may hide a whole module by one node
        return any(not entry or f"{leaf.address}/".startswith(f"{entry}/") for entry in hidden)

    blocks = tuple(_seen_of(layer, is_hidden) for layer in layers.blocks if not all(map(is_hidden, layer.leaves)))
    for layer in blocks:
        for leaf in layer.leaves:
            if is_hidden(leaf):
                raise ValueError(
                    f"A mask hides {leaf.address!r} but not the other parameters of layer {layer.name!r}, which are "
                    "preconditioned together; mask all of them or none."
                )
            if leaf.address not in leaves:
                raise ValueError(
                    f"Layer {layer.name!r} has the parameter {leaf.address!r}, which the tree of parameters lacks; "
                    f"it has {sorted(leaves)}. Build the transformation with the `layers` of this very model."
                )
            if jnp.issubdtype(jnp.result_type(leaves[leaf.address]), jnp.complexfloating):
                raise TypeError(
                    f"The parameter {leaf.address!r} is complex, and has no curvature here. Give it to another "
                    "optimizer (`optax.partition`), or keep its real and its imaginary part as two parameters."
                )
            if not jnp.issubdtype(jnp.result_type(leaves[leaf.address]), jnp.floating):
                raise TypeError(
                    f"The parameter {leaf.address!r} is of dtype {leaves[leaf.address].dtype}; expected floating-point "
                    "numbers. Give it to another optimizer (`optax.partition`), or keep it outside of the parameters."
                )
            if tuple(leaves[leaf.address].shape) != leaf.shape:
                raise ValueError(
                    f"Parameter {leaf.address!r} has shape {tuple(leaves[leaf.address].shape)}; expected {leaf.shape}, "
                    "as in the `layers`. Build the transformation with the `layers` of this very model."
                )
    known = {leaf.address for layer in layers.blocks for leaf in layer.leaves}
    if unknown := sorted(set(leaves) - known):
        raise ValueError(
            f"The `layers` do not have the parameters {unknown}; they have {sorted(known)}. "
            "Build the transformation with the `layers` of this very model."
        )
    return blocks


def _seen_of(layer: Layer, is_hidden: Callable[[Leaf], bool]) -> Layer:
    """A norm without the arrays that a mask hides: it has a block of the others. Other layers as they are."""
    leaves = tuple(leaf for leaf in layer.leaves if not is_hidden(leaf))
    return only(layer, leaves) if layer.kind == "norm" and len(leaves) < len(layer.leaves) else layer


def lazy(
    curvature: Any,
    layers: tuple[Layer, ...],
    *,
    optional: bool = False,
    gradient: Any = None,
    partly: bool = False,
) -> Callable[[], Mapping[str, Evidence]]:
    """A function that gives the evidence of every block, its names and shapes compared to the layers.

    Args:
        curvature: a callable, or {name: Evidence}.
        layers: those that need evidence.
        optional: whether there may be none, if the function is not called.
        gradient: of which the axes of `shard_map` that it differs along are compared; None for no comparison.
        partly: whether layers that the batch does not use, as of tasks that take turns, may be left out.

    Returns:
        The function; it raises ValueError if the evidence is of other layers or shapes.

    Raises:
        TypeError: if the curvature is neither.
        ValueError: if there is no curvature.
    """
    if curvature is None and not optional:
        raise ValueError(
            "`curvature` is missing: call `tx.update(grads, state, params, curvature=out.curvature)`, "
            "where `out` is what `capture.value_and_grad` returned. What drops it on the way, as "
            "`TrainState.apply_gradients` of Flax, is overridden or wrapped: see docs/wrappers.md."
        )
    if not (curvature is None or callable(curvature) or isinstance(curvature, Mapping)):
        raise TypeError(
            f"`curvature` is of type {type(curvature).__name__}; expected `out.curvature`, where `out` is what "
            "`capture.value_and_grad` returned, or a mapping {name: Evidence}."
        )

    def evidence_of():
        evidence = curvature() if callable(curvature) else curvature
        assert curvature is not None, "not called without one"
        if not isinstance(evidence, Mapping):
            raise TypeError(
                f"`curvature()` gave {checks.shown(evidence)}; expected a mapping {{name: Evidence}}, as that of "
                "`out.curvature`."
            )
        evidence = dict(evidence) | _of_parameters(layers, evidence, getattr(curvature, "layers", None))
        idle = _unused(layers, evidence, getattr(curvature, "layers", None))
        missing = [layer.name for layer in layers if layer.name not in evidence and layer.name not in idle]
        if missing:
            raise ValueError(f"`curvature` has no evidence for {missing}; it has {sorted(evidence)}. {_ADVICE}")
        unused = [layer.name for layer in layers if layer.is_known and layer.name in idle]
        if unused and not partly:
            raise ValueError(
                f"The batch does not use the layers {unused}, of which this method needs evidence at every step. Give "
                "it batches that use all, or each task an optimizer of its own (`optax.partition`)."
            )
        found = {layer.name: evidence[layer.name] for layer in layers if not partly or layer.name not in idle}
        for layer in layers:
            if layer.name in found:
                _check(layer, found[layer.name])
        if gradient is not None and (axes := trees.differs(evidence) - trees.differs(gradient)):
            raise ValueError(
                f"The gradient is the same on all replicas of {sorted(axes)}, but `curvature` is that of the examples "
                "of each, with which they would drift apart. Let the capture join both: "
                f"`capture(..., axis_name={min(axes)!r})`."
            )
        return found

    return evidence_of


def _of_parameters(
    layers: tuple[Layer, ...], evidence: Mapping[str, Evidence], there: Layers | None
) -> dict[str, Evidence]:
    """The evidence of single parameters that are part of a layer of the batch: its gradient is all that is needed."""
    wider = () if there is None else (layer for layer in there.blocks if layer.kind != "parameter")
    owners = {leaf.address: (layer, leaf) for layer in wider for leaf in layer.leaves}
    found = {}
    for layer in layers:
        if layer.kind != "parameter" or layer.leaves[0].address not in owners:
            continue
        owner, leaf = owners[layer.leaves[0].address]
        origin = evidence[owner.name]
        gradient = None if origin.gradient is None else {"value": origin.gradient[leaf.role]}
        found[layer.name] = Evidence(gradient=gradient, weights=origin.weights, count=origin.count)
    return found


def _unused(layers: tuple[Layer, ...], evidence: Mapping[str, Evidence], there: Layers | None) -> list[str]:
    """The names of the blocks that the call which the evidence is of did not use, every array of them.

    One with the gradients of examples has evidence all the same: they are zero.
    """
    unseen = set() if there is None else {layer.name for layer in there.rest if layer.note == UNSEEN}
    idle = [layer.name for layer in layers if all(leaf.address in unseen for leaf in layer.leaves)]
    return [name for name in idle if getattr(evidence.get(name), "examples", None) is None]


def _check(layer: Layer, evidence: Evidence) -> None:
    """Refuse what is no evidence, or one whose shapes are not those of the layer."""
    if is_joint(layer):  # its members were compared one by one
        return
    if not isinstance(evidence, Evidence):
        raise TypeError(
            f"`curvature` has for {layer.name!r} a {type(evidence).__name__}; expected `Evidence`, as "
            "`out.curvature()` gives it."
        )
    gradient = evidence.gradient
    if not KINDS[layer.kind].input_rows and (gradient is None or evidence.count is None):
        raise ValueError(f"The evidence for {layer.name!r}, a parameter of no layer, needs `gradient` and `count`.")
    if layer.kind == "norm" and evidence.examples is None:
        raise ValueError(
            f"The evidence for the norm {layer.name!r} needs `examples`, the gradients of the examples. {_ADVICE}"
        )
    has_rows = KINDS[layer.kind].input_rows is not None
    for name, rows, side in (("inputs", input_rows, 0), ("cotangents", output_rows, 1)):
        if not has_rows or getattr(evidence, name) is None:
            continue
        size = layer.shape[side]
        try:
            shape = jax.eval_shape(lambda evidence, rows=rows: rows(layer, evidence), evidence).shape
        except (IndexError, TypeError, ValueError) as error:
            found = [leaf.shape for leaf in jax.tree.leaves(getattr(evidence, name))]
            raise ValueError(
                f"The evidence for layer {layer.name!r} has {name} of shapes {found}, of which its rows cannot be "
                f"made: its products were others where the `layers` were found. {_ADVICE} Those of `ng.terms` go with "
                "its own curvature."
            ) from error
        if shape[-1] != size or shape[: len(layer.stack)] != layer.stack:
            raise ValueError(
                f"The evidence for layer {layer.name!r} has {name} whose rows have shape {shape}; expected "
                f"{size} entries in each row and the stack {layer.stack} in front. {_ADVICE}"
            )
    for leaf in layer.leaves if gradient is not None else ():
        found = gradient.get(leaf.role) if isinstance(gradient, Mapping) else None
        if found is None or found.shape[1:] != leaf.shape:
            there = "none of that name" if found is None else f"shape {found.shape}"
            raise ValueError(
                f"The evidence for {layer.name!r} has a gradient with {there} for {leaf.role!r}; expected "
                f"{leaf.shape} behind the draws. {_ADVICE}"
            )


class Known(NamedTuple):
    """Evidence with what `out.curvature` says of it: the layers that it is of, and whose cotangents it has."""

    evidence: Mapping[str, Evidence]
    layers: Layers
    labels: str

    def __call__(self) -> Mapping[str, Evidence]:
        """The evidence."""
        return self.evidence


def of_gradient(blocks: tuple[Layer, ...], gradient: Tree) -> dict[str, Evidence]:
    """The evidence of one gradient: one draw, of total weight 1.

    Args:
        blocks: tensors.
        gradient: a tree like the parameters.

    Returns:
        {name: Evidence}.

    Raises:
        ValueError: if the gradient is of other parameters.
    """
    leaves = addresses.flatten(gradient)
    shapes = {address: tuple(leaf.shape) for address, leaf in leaves.items()}
    _same(blocks, shapes, "`gradient`", "Pass the gradient of the very parameters that are updated.")
    return {
        block.name: Evidence(
            gradient={leaf.role: leaves[leaf.address][None] for leaf in block.leaves}, count=jnp.ones((), block.dtype)
        )
        for block in blocks
    }


def of_curvature(
    blocks: tuple[Layer, ...], layers: Layers | None, curvature: Any, scale: Scale
) -> Callable[[], Mapping[str, Evidence]]:
    """The evidence of a curvature for tensors, when it is called.

    Args:
        blocks: tensors.
        layers: of the model; None for those that the curvature says it is of.
        curvature: as `lazy` takes it.
        scale: units of the statistics.

    Returns:
        A function that gives {name: Evidence}.

    Raises:
        TypeError: if nobody knows the layers.
        ValueError: if there is no curvature, or it is of other parameters.
    """
    if curvature is None:
        raise ValueError(
            "`curvature` is missing: call `tx.update(grads, state, params, curvature=out.curvature)`, where `out` is "
            'what `capture.value_and_grad` returned, or take the statistics from the gradient, `statistics="gradient"`.'
        )
    layers = getattr(curvature, "layers", None) if layers is None else layers
    if layers is None:
        raise TypeError(
            f"`curvature` is of type {type(curvature).__name__}, which does not say what layers it is of; pass the "
            "`out.curvature` of `capture.value_and_grad` itself, or build the transformation with `layers`."
        )
    owner = {leaf.address: (layer, leaf) for layer in layers.blocks for leaf in layer.leaves}
    shapes = {address: leaf.shape for address, (_, leaf) in owner.items()}
    _same(blocks, shapes, "`curvature`", "Capture the model whose parameters are updated.")
    needed = {owner[leaf.address][0].name for block in blocks for leaf in block.leaves}
    evidence_of = lazy(curvature, tuple(layer for layer in layers.blocks if layer.name in needed))

    def found():
        evidence = evidence_of()
        return {block.name: _seen(block, owner, evidence, scale) for block in blocks}

    return found


def _seen(
    block: Layer, owner: Mapping[str, tuple[Layer, Any]], evidence: Mapping[str, Evidence], scale: Scale
) -> Evidence:
    """The evidence of one tensor: that of the layer which its arrays are of, with their gradients."""
    layer = owner[block.leaves[0].address][0]
    origin = evidence[layer.name]
    if origin.gradient is None or origin.count is None:
        raise ValueError(
            f"The evidence for {layer.name!r} has no `gradient` or no `count`; take it from "
            '`capture.value_and_grad`, with other `labels` than "forward".'
        )
    gradient = {leaf.role: origin.gradient[owner[leaf.address][1].role] for leaf in block.leaves}
    count = jnp.asarray(origin.count)
    return origin._replace(gradient=gradient, count=count if scale == "example" else count**2)


def _same(blocks: tuple[Layer, ...], shapes: Mapping[str, tuple[int, ...]], name: str, advice: str) -> None:
    """Refuse what is of other parameters than the blocks; `shapes` says by address what it is of."""
    for block in blocks:
        for leaf in block.leaves:
            if shapes.get(leaf.address) != leaf.shape:
                there = shapes.get(leaf.address, "none of that name")
                raise ValueError(f"Parameter {leaf.address!r} has shape {leaf.shape}; {name} has {there}. {advice}")


def is_empty(evidence: Mapping[str, Evidence]) -> Array | bool:
    """Whether a batch has weight zero, all of it masked: it says nothing, and is no value of an average."""
    evidence = dict(evidence)  # of a joint block itself a mapping
    found = jax.tree.leaves(evidence, is_leaf=lambda item: isinstance(item, Evidence))
    counts = [each.count for each in found if each.count is not None]
    return jnp.asarray(counts[0]) <= 0 if counts else False


def is_evidence(item: Any) -> bool:
    """Whether something is {name: Evidence}."""
    return isinstance(item, Mapping) and all(isinstance(value, Evidence) for value in item.values())
