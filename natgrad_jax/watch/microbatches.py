"""A batch in pieces, evaluated one after the other in the memory of one.

    1  loss, gradient <- weighted means over the pieces                       a scan, once per step
    2  evidence <- that of the pieces, joined along the examples              where the curvature is called
    3  J v, loss elsewhere <- the same of the pieces                          where they are asked for

Nothing of a piece is kept beyond line 1, so line 2 evaluates each once more. What comes out is the `Evaluation` of the
whole batch: every method and every controlled step works on it as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.stacks import HIGHEST
from natgrad_jax.base import Array, Evidence, Layers
from natgrad_jax.losses import total_weight
from natgrad_jax.watch import common
from natgrad_jax.watch.problem import Evaluation, Forward, Problem, no_argument

ForwardOf = Callable[[Any, Mapping[str, Any], Array], Forward]


@dataclass(frozen=True, eq=False, repr=False)
class Pieces:
    """The curvature of a batch in pieces; asked like `common.Curvature`."""

    _problem: Problem
    _of_piece: Callable[[Any, Tree, Any], Any]
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
        scale = jnp.sqrt(counts / jnp.maximum(jnp.sum(counts), 1e-30))  # each is divided by the root of its own count
        return _flat(found * scale.reshape(-1, *(1,) * (found.ndim - 1)).astype(found.dtype))

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
        return jax.tree.map(lambda numbers: jnp.sum(numbers * counts) / jnp.maximum(jnp.sum(counts), 1e-30), found)

    def _mapped(self, function: Callable[[common.Curvature], Any]) -> Any:
        """A function of the curvature of every piece, at the parameters of this step."""
        return jax.lax.map(lambda piece: function(self._of_piece(self._params, *piece)[0].curvature), self._pieces)


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
        others: the other collections of the model; what a piece writes the next one finds.
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
    pieces = (*split, keys, jnp.arange(count))

    def of_piece(others, params, args, targets, weights, key, number):
        forward = forward_of(args, others, number)
        return common.evaluate(problem, forward, params, targets, weights, key), forward.layers

    seen = []  # the layers are static: the trace of the scan leaves them here

    def step(others, piece):
        found, layers = of_piece(others, params, *piece)
        seen.append(layers)
        weight = total_weight(piece[2], examples // count)
        written = {name: found.updated.get(name, value) for name, value in others.items()}
        kept = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), written, others)
        return kept, (found.value, found.grad, weight, found.outputs, _without(found.updated, others))

    updated, (values, grads, totals, outputs, written) = jax.lax.scan(step, dict(others), pieces)
    shares = totals / jnp.maximum(jnp.sum(totals), 1e-30)
    value = jnp.sum(values * shares)
    grad = jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, axes=1, precision=HIGHEST), grads)
    layers = replace(seen[-1], examples=examples)
    curvature = Pieces(problem, partial(of_piece, others), pieces, params, value, jnp.sum(totals), layers)
    last = jax.tree.map(lambda leaf: leaf[-1], written)
    return Evaluation(value, grad, curvature, jax.tree.map(_flat, outputs), updated | last)


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
