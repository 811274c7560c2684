"""Layers and evidence of several terms as those of one, its examples side by side: see `terms`.

A layer of all terms has one use, of kind "rows": its evidence is the rows a and g themselves, [S, N, T, I] and
[K, S, N, T, O], the positions and draws of a term filled up with zeros to those of the one that has most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra import arranged
from natgrad_jax.algebra.rows import written_out
from natgrad_jax.algebra.stacks import einsum
from natgrad_jax.base import UNSEEN, Array, Evidence, Layer, Layers, Use
from natgrad_jax.layers.parameter import parameter
from natgrad_jax.layers.rows import from_matrix, paired_rows
from natgrad_jax.losses import example_weights

SEVERAL = "not the same layer in all terms of the loss"


class Part(NamedTuple):
    """What one term says: its layers, their evidence, and by what its cotangents are multiplied."""

    layers: Layers
    evidence: Mapping[str, Evidence]
    root: Array


def joined_layers(terms: Mapping[str, Layers]) -> Layers:
    """The layers of several terms.

    Args:
        terms: {name: the layers of a term}.

    Returns:
        Layers with the examples of all: known is what every term that sees its parameters knows as the same layer.

    Raises:
        ValueError: if a term has no cotangents.
    """
    if forward := sorted(name for name, part in terms.items() if part.labels == "forward"):
        raise ValueError(
            f'The terms {forward} have `labels="forward"`, which looks at inputs alone; terms are joined by their '
            'cotangents. Capture them with `labels="sampled"`, "exact" or "true".'
        )
    parts = list(terms.values())
    known = [
        layer for name in dict.fromkeys(name for part in parts for name in part) if (layer := _common(name, parts))
    ]
    taken = {leaf.address for layer in known for leaf in layer.leaves}
    rest = {}
    for part in parts:
        for layer in part.blocks:
            for leaf in layer.leaves:
                if leaf.address in taken:
                    continue
                note = SEVERAL if layer.is_known else layer.note
                seen = rest.get(leaf.address)
                if seen is None or seen.note == UNSEEN:
                    rest[leaf.address] = parameter(leaf.address, leaf.shape, layer.dtype, note)
    labels = {part.labels for part in parts}
    return Layers(
        tuple(known),
        tuple(rest.values()),
        sum(part.examples for part in parts),
        max(part.draws for part in parts),
        tuple(dict.fromkeys(name for part in parts for name in part.mixed)),
        labels.pop() if len(labels) == 1 else "",
        "examples" if all(part.jacobian == "examples" for part in parts) else "rows",
    )


def _common(name: str, parts: Sequence[Layers]) -> Layer | None:
    """A layer as all terms see it that see its parameters; None if they do not agree."""
    found = [part[name] for part in parts if name in part]
    whole = max(found, key=lambda layer: (layer.has_bias, not layer.arrays))
    addresses = {leaf.address for leaf in whole.leaves}
    alike = []
    for part in parts:
        mine = _seen_as(part[name], whole, part.draws) if name in part else None
        seen = {leaf.address for layer in part.rest if layer.note != UNSEEN for leaf in layer.leaves}
        if seen & addresses or (name in part and (mine is None or mine.grouped)):
            return None
        others = {leaf.address for layer in part.known if layer.name != name for leaf in layer.leaves}
        if others & addresses:
            return None
        alike += [mine] if mine else []
    use = Use("rows", None, max(layer.positions for layer in alike))
    return replace(whole, uses=(use,), one_hot=False)


def _seen_as(layer: Layer, whole: Layer, draws: int) -> Layer | None:
    """A layer of a term with the matrix that all terms have of it, with or without the bias; None if it has another.

    A residual may read a matrix the other way round alone, as the derivative of a last layer does: its uses are turned.
    """
    if _kernel(layer) == _kernel(whole):
        return layer
    stack = len(layer.stack)
    turned = arranged.transposed(_matrix(layer), (*range(stack), stack + 1, stack))
    if layer.kind != "dense" or layer.has_bias or _kernel(whole) != (*_kernel(layer)[:3], *layer.shape[::-1], turned):
        return None
    uses = []
    for use in layer.uses:
        positions = use.positions // max(draws, 1) if use.transposed else use.positions * max(draws, 1)
        part = use.part and use.part.turned()
        uses.append(use._replace(transposed=not use.transposed, positions=positions, part=part))
    arrays = tuple(pair for pair in whole.arrays if pair[0] != "bias")
    return replace(layer, shape=layer.shape[::-1], arrays=arrays, uses=tuple(uses))


def _kernel(layer: Layer) -> tuple[Any, ...]:
    """What two views of a layer have to agree on, with or without a bias."""
    leaves = tuple(leaf for leaf in layer.leaves if not leaf.role.startswith("bias"))
    sizes = layer.shape[0] - layer.has_bias, layer.shape[1]
    return (layer.kind, layer.geometry), leaves, layer.stack, *sizes, _matrix(layer)


def _matrix(layer: Layer) -> arranged.Arrangement:
    """The kernel of a layer, made of its arrays."""
    main = layer.leaves[0]
    return layer.arrays[0][1] if layer.arrays else arranged.source(main.address, main.shape)


def joined_evidence(layers: Layers, parts: Mapping[str, Part], total: Array) -> dict[str, Evidence]:
    """The evidence of several terms.

    Args:
        layers: of all terms, of `joined_layers`.
        parts: what each says.
        total: W.

    Returns:
        {name: Evidence} of every block.
    """
    found = {}
    for layer in layers.blocks:
        of_block = _rows if layer.is_known else _array
        said = [of_block(layer, part, layers) for part in parts.values()]
        found[layer.name] = _side_by_side(layer, said, total)
    return found


def _side_by_side(layer: Layer, said: Sequence[Evidence], total: Array) -> Evidence:
    """Evidence of the same block, joined along the examples; it is the same arrays or none of all."""

    def along(axis, *leaves):
        return jnp.concatenate(leaves, axis=axis)

    def joined(field, axis):
        values = [getattr(each, field) for each in said]
        if any(value is None for value in values):
            return None
        return jax.tree.map(lambda *leaves: along(axis, *leaves), *values)

    axes = len(layer.stack)
    return Evidence(
        joined("inputs", axes),
        joined("cotangents", axes + 1),
        jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *(each.gradient for each in said)),
        joined("weights", 0),
        total,
        joined("slopes", 1),
        joined("examples", 1),
    )


def _rows(layer: Layer, part: Part, layers: Layers) -> Evidence:
    """What a term says of a layer, as rows; zeros where it does not see it."""
    (use,), draws, examples = layer.uses, layers.draws, _examples(part)
    rows, columns = layer.shape
    weights, slopes = _of_examples(part, layers)
    if layer.name not in part.layers:
        a = jnp.zeros((*layer.stack, examples, use.positions, rows), layer.dtype)
        g = jnp.zeros((draws, *layer.stack, examples, use.positions, columns), layer.dtype)
        zeros = {leaf.role: jnp.zeros((draws, *leaf.shape), layer.dtype) for leaf in layer.leaves}
        return Evidence((a,), (g,), zeros, weights, None, slopes)
    mine, said = _seen_as(part.layers[layer.name], layer, part.layers.draws), part.evidence[layer.name]
    assert mine is not None, "a layer of all terms"
    a, g = paired_rows(mine, said)
    a = written_out(a)
    room = use.positions - a.shape[-2]
    a = _padded(a, {-2: room, -1: rows - a.shape[-1]})
    g = _draws(_padded(g, {-2: room}), -4, part, draws)
    gradient = {leaf.role: jnp.zeros((draws, *leaf.shape), layer.dtype) for leaf in layer.leaves}
    own = said.gradient or {}
    gradient |= {role: _draws(leaf.astype(layer.dtype), 0, part, draws) for role, leaf in own.items()}
    return Evidence((a,), (jnp.moveaxis(g, -4, 0),), gradient, weights, None, slopes)


def _array(layer: Layer, part: Part, layers: Layers) -> Evidence:
    """What a term says of a parameter of no layer, also where that term knows it as part of one."""
    address, draws = layer.leaves[0].address, layers.draws
    owner, leaf = next((each, leaf) for each in part.layers.blocks for leaf in each.leaves if leaf.address == address)
    said = part.evidence[owner.name]
    assert said.gradient is not None, "evidence of a pullback"
    gradient = {"value": _draws(said.gradient[leaf.role].astype(layer.dtype), 0, part, draws)}
    weights, slopes = _of_examples(part, layers)
    examples = None
    if layers.jacobian == "examples":
        each = said.examples[leaf.role] if said.examples else _from_rows(owner, said, leaf.role)
        examples = {"value": _draws(each.astype(layer.dtype), 0, part, draws)}
    return Evidence(None, None, gradient, weights, None, slopes, examples)


def _from_rows(layer: Layer, evidence: Evidence, role: str) -> Array:
    """The gradients of the examples by one array of a layer, [K, N, *shape]."""
    a, g = paired_rows(layer, evidence)
    matrices = einsum("...nti,...knto->kn...io", written_out(a), g)
    return jax.vmap(jax.vmap(lambda matrix: from_matrix(layer, matrix)[role]))(matrices)


def _draws(values: Array, axis: int, part: Part, draws: int) -> Array:
    """Values of the cotangents of a term, in its weight, filled up to as many draws with the same mean square."""
    own = values.shape[axis]
    scaled = values * (part.root * (draws / own) ** 0.5).astype(values.dtype)
    return _padded(scaled, {axis: draws - own})


def _of_examples(part: Part, layers: Layers) -> tuple[Array, Array | None]:
    """The weights of the examples of a term [N], and its slopes [K, N]."""
    one = next(iter(part.evidence.values()))
    weights = jnp.ones(_examples(part)) if one.weights is None else example_weights(one.weights)
    if one.slopes is None:
        return weights, None
    slopes = one.slopes * part.root.astype(one.slopes.dtype)  # once: that of a weight is divided by its root later
    return weights, _padded(slopes, {0: layers.draws - slopes.shape[0]})


def _examples(part: Part) -> int:
    """N of a term."""
    return next(each.slopes.shape[1] for each in part.evidence.values() if each.slopes is not None)


def _padded(array: Array, room: Mapping[int, int]) -> Array:
    """An array with zeros behind, so many along each axis."""
    widths = [(0, 0)] * array.ndim
    for axis, size in room.items():
        widths[axis] = (0, size)
    return jnp.pad(array, widths)
