"""A batch in pieces, evaluated one after the other in the memory of one.

    1  loss, gradient <- weighted means over the pieces                       a scan, once per step
    2  evidence <- that of the pieces, joined along the examples              where the curvature is called
    3  J v, loss elsewhere <- the same of the pieces                          where they are asked for

Nothing of a piece is kept beyond line 1, so line 2 evaluates each once more. What comes out is the `Evaluation` of the
whole batch: every method and every controlled step works on it as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.stacks import HIGHEST
from natgrad_jax.base import Array, Evidence, Layer, Layers
from natgrad_jax.losses import total_weight
from natgrad_jax.watch import common
from natgrad_jax.watch.problem import Evaluation, Forward, Problem, no_argument
from natgrad_jax.watch.space import Space, chunked, products
from natgrad_jax.watch.strides import every, floor

ForwardOf = Callable[[Any, Mapping[str, Any], Array], Forward]


@dataclass(frozen=True, eq=False, repr=False)
class Pieces:
    """The curvature of a batch in pieces; asked like `common.Curvature`."""

    _problem: Problem
    _of_piece: Callable[[Tree, Any], Any]
    _pieces: Any
    _params: Tree
    _value: Array
    count: Array
    layers: Layers

    @property
    def labels(self) -> str:
        """Whose cotangents the evidence has."""
        return self.layers.labels

    dtype = no_argument

    def __call__(self, params: Tree | None = None) -> dict[str, Evidence]:
        """The evidence of the batch at the parameters of this step, or at others."""
        found = self._mapped(lambda curvature: curvature(params))
        return {layer.name: _joined(found[layer.name], layer.module_axes) for layer in self.layers.blocks}

    def along(self, direction: Tree) -> Array:
        """J times a direction at the outputs of the batch; see `common.Curvature.along`."""
        found, counts = self._mapped(lambda curvature: (curvature.along(direction), curvature.count))
        scale = jnp.sqrt(_shares(counts))  # each is divided by the root of its own count
        return _flat(found * scale.reshape(-1, *(1,) * (found.ndim - 1)).astype(found.dtype))

    @property
    def floor(self) -> Array | None:
        """What the loss cannot fall below; see `common.Curvature.floor`."""
        _, _, weights, *_ = self._pieces
        return floor(self._problem, weights)

    def space(self) -> "PiecedSpace":
        """The batch as the rows of the Jacobian, of which nothing is kept; see `common.Curvature.space`."""

        def of(piece):
            found = self._of_piece(self._params, piece)[0].curvature
            return found.space(), found.count

        seen = []  # the numbers of draws and examples are static: the trace of the map leaves them here

        def seeds(piece):
            found, count = of(piece)
            seen.append((found.draws, found.examples))
            return list(found.seeds), count, found.root

        found, counts, roots = jax.lax.map(seeds, self._pieces)
        scales = jnp.sqrt(_shares(counts)).astype(roots.dtype)
        return PiecedSpace(lambda piece: of(piece)[0], self._pieces, found, scales, self._params, *seen[-1])

    def value(self, params: Tree | None = None) -> Array:
        """The objective on the same batch at other parameters, a scalar."""
        if params is None:
            return self._value
        return self._mean(lambda curvature: curvature.value(params))

    def value_and_slope(self, params: Tree, direction: Tree) -> tuple[Array, Array]:
        """The objective on the same batch at other parameters, and its derivative along a direction there."""
        return self._mean(lambda curvature: curvature.value_and_slope(params, direction))

    def _mean(self, function: Callable[[common.Curvature], Any]) -> Any:
        """The mean over the pieces, by their counts."""
        found, counts = self._mapped(lambda curvature: (function(curvature), curvature.count))
        return jax.tree.map(lambda numbers: jnp.sum(numbers * _shares(counts).astype(numbers.dtype)), found)

    def _mapped(self, function: Callable[[common.Curvature], Any]) -> Any:
        """A function of the curvature of every piece, at the parameters of this step."""
        return jax.lax.map(lambda piece: function(self._of_piece(self._params, piece)[0].curvature), self._pieces)


@dataclass(frozen=True, eq=False, repr=False)
class PiecedSpace:
    """A batch in pieces as the rows of J: for each draw the examples of all pieces; asked like `space.Space`.

    Attributes:
        space_of: inputs of a piece -> it as the rows of its own J.
        pieces: inputs of all.
        seeds: cotangents of all [pieces, K, n, ...], so that no outputs are computed for a chunk of gradients.
        scales: sqrt(W of the piece / W) of each, with which its rows are those of the whole.
        params: where.
        draws: K.
        size: n, examples of a piece.
    """

    space_of: Callable[[Any], Space]
    pieces: Any
    seeds: Sequence[Array]
    scales: Array
    params: Tree
    draws: int
    size: int

    @property
    def examples(self) -> int:
        """N of all pieces."""
        return self.size * len(self.scales)

    @property
    def root(self) -> Array:
        """A number of the dtype of the rows."""
        return self.scales[0]

    def project(self, direction: Tree) -> Array:
        """J v [R] of a tree like the parameters."""

        def shown(given):
            piece, scale = given
            return scale * self.space_of(piece).project(direction).reshape(self.draws, self.size)

        return merged(jax.lax.map(shown, (self.pieces, self.scales)), 1).reshape(-1)

    def back(self, weights: Array) -> Tree:
        """J^T w, a tree like the parameters, of w [R]."""
        shares = jnp.moveaxis(weights.reshape(self.draws, len(self.scales), self.size), 1, 0)

        def add(before, given):
            piece, scale, share = given
            found = self.space_of(piece).back(scale * share.reshape(-1))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), before, found), None

        zeros = jax.tree.map(jnp.zeros_like, self.params)
        return jax.lax.scan(add, zeros, (self.pieces, self.scales, shares))[0]

    def chunks(self, most: int) -> np.ndarray:
        """The places of the examples, at most so many of one piece at a time; see `space.Space.chunks`."""
        places, starts = chunked(self.size, most), self.size * np.arange(len(self.scales))
        return np.where(places < 0, -1, places + starts[:, None, None]).reshape(-1, places.shape[1])

    def rows(self, blocks: Sequence[Layer], places: Array) -> list[Array]:
        """The rows of J of a chunk by the parameters of some blocks; see `space.Space.rows`."""
        number = places[0] // self.size
        piece, seeds, scale = jax.tree.map(lambda leaf: leaf[number], (self.pieces, self.seeds, self.scales))
        space = replace(self.space_of(piece), seeds=seeds)
        own = jnp.where(places < 0, -1, places - number * self.size)
        return [scale.astype(leaf.dtype) * leaf for leaf in space.rows(blocks, own)]

    def kernel(self, blocks: Sequence[Layer], workspace: int) -> Array:
        """J J^T [R, R] of the parameters of some blocks; see `space.Space.kernel`."""
        return products(self, self, blocks, workspace).reshape(self.draws * self.examples, -1)


def in_pieces(
    problem: Problem,
    forward_of: ForwardOf,
    params: Tree,
    others: Mapping[str, Any],
    args: Any,
    targets: Any,
    weights: Array | None,
    key: Array | None,
    count: int,
) -> Evaluation:
    """Loss, gradient and lazy curvature of one batch, from one forward pass for each piece.

    Args:
        problem: what is asked.
        forward_of: inputs of a piece, other collections, number of the piece -> the watched model on it.
        params: the parameters.
        others: the other collections of the model; what a piece writes the next one finds. Arrays that pieces write are
            kept as each found them, so that all that is lazy sees the masks of the forward pass of its piece.
        args: inputs; every array leads with the examples.
        targets: labels of the batch.
        weights: of examples or positions, or None.
        key: for drawing labels.
        count: number of pieces.

    Returns:
        The evaluation.

    Raises:
        ValueError: if something does not lead with a multiple of `count` examples.
    """
    cut = (args, targets, weights)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(cut)]
    examples = shapes[0][0] if shapes and shapes[0] else 0
    if any(shape[:1] != (examples,) for shape in shapes) or not examples or examples % count:
        raise ValueError(
            f"`microbatches` is {count}, but inputs, targets and weights have the shapes {shapes}; expected that all "
            f"lead with the examples, a multiple of {count} of them. Give what has no examples as a keyword."
        )
    split = jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, examples // count, *jnp.shape(leaf)[1:])), cut)
    keys = None if key is None else jax.random.split(key, count)
    start, structure = jax.tree.flatten(dict(others))

    def of_piece(params, piece):
        args, targets, weights, key, number, moved = piece
        others = jax.tree.unflatten(structure, [moved.get(place, leaf) for place, leaf in enumerate(start)])
        forward, stride = forward_of(args, others, number), problem.product_stride
        few = None if stride == 1 else lambda: forward_of(every(stride, args, {}, forward.examples), others, number)
        return common.evaluate(problem, forward, params, targets, weights, key, few=few), forward.layers

    seen = []  # the layers are static: the trace of the scan leaves them here

    def step(others, piece):
        found, layers = of_piece(params, (*piece, dict(enumerate(others))))
        seen.append(layers)
        weight = total_weight(piece[2], examples // count)
        before = jax.tree.unflatten(structure, others)
        written = jax.tree.leaves({name: found.updated.get(name, value) for name, value in before.items()})
        moved = {place: old for place, (old, new) in enumerate(zip(others, written, strict=True)) if new is not old}
        kept = [jnp.asarray(new, old.dtype) for new, old in zip(written, others, strict=True)]
        return kept, (found.value, found.grad, weight, found.outputs, _without(found.updated, before), moved)

    given = (*split, keys, jnp.arange(count))
    updated, (values, grads, totals, outputs, written, moved) = jax.lax.scan(step, start, given)
    pieces = (*given, moved)
    shares = _shares(totals)
    value = jnp.sum(values * shares.astype(values.dtype))
    grad = jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, axes=1, precision=HIGHEST), grads)
    layers = replace(seen[-1], examples=examples)
    curvature = Pieces(problem, of_piece, pieces, params, value, jnp.sum(totals), layers)
    last = jax.tree.map(lambda leaf: leaf[-1], written)
    updated = jax.tree.unflatten(structure, updated)
    return Evaluation(value, grad, curvature, jax.tree.map(_flat, outputs), updated | last)


def _shares(counts: Array) -> Array:
    """Counts over their sum, in double precision where there is one: a third in float32 is off by 3e-8."""
    counts = jnp.asarray(counts, float)
    return counts / jnp.maximum(jnp.sum(counts), 1e-30)


def _without(updated: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in updated.items() if name not in others}


def _joined(evidence: Evidence, axes: int) -> Evidence:
    """The evidence of the pieces, along a leading axis, as that of all their examples; a layer has `axes` axes of S."""

    def along(values, axis):
        return jax.tree.map(lambda leaf: merged(leaf, axis), values)

    total = None if evidence.count is None else jnp.sum(evidence.count)
    gradient = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), evidence.gradient)
    return Evidence(
        along(evidence.inputs, axes),
        along(evidence.cotangents, 1 + axes),
        gradient,
        along(evidence.weights, 0),
        total,
        along(evidence.slopes, 1),
        along(evidence.examples, 1),
    )


def merged(leaf: Array, axis: int) -> Array:
    """[pieces, ..., N at `axis`, ...] -> [..., pieces N, ...]."""
    moved = jnp.moveaxis(leaf, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _flat(leaf: Array) -> Array:
    """[pieces, N, ...] -> [pieces N, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:]) if leaf.ndim > 1 else leaf
