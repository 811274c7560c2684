"""What methods ask of a layer, whatever its kind: its matrix, its rows, and their moments."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp

from natgrad_jax.algebra import rows as of_rows
from natgrad_jax.algebra.moments import gradient_moments, paired_moments, pooled_moment, second_moment
from natgrad_jax.algebra.rows import OneHot, Rows
from natgrad_jax.algebra.stacks import Diagonal, Factor, einsum, scaled, trace
from natgrad_jax.algebra.truncated import Moment
from natgrad_jax.base import Array, Evidence, Layer, Matrix, Scalar, Use
from natgrad_jax.layers import KINDS
from natgrad_jax.layers.parts import placed_inputs, placed_outputs
from natgrad_jax.layers.pieces import examples_at_a_time, is_spread, summed
from natgrad_jax.losses import example_weights

Sharing = Literal["expand", "reduce"]
"""How factors see the positions that share the weights: each by itself, or pooled within an example."""
Pairing = Literal["example", "expand", "reduce"]
"""The same for the partial traces of F: of examples as they are, position by position, or of pooled positions."""


def to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Matrix:
    """The parameter arrays {role: array} of a layer as one matrix [S, I, O] in the dtype of its curvature."""
    return KINDS[layer.kind].to_matrix(layer, leaves)


def from_matrix(layer: Layer, matrix: Matrix) -> dict[str, Array]:
    """The inverse of `to_matrix`: {role: array} from [S, I, O]."""
    return KINDS[layer.kind].from_matrix(layer, matrix)


def gradient_matrix(layer: Layer, evidence: Evidence) -> Array:
    """The summed gradient of each draw as a matrix, [S, K, I, O], or as the tensor of a layer that is one."""
    if evidence.gradient is None:
        raise ValueError(
            f"The evidence for {layer.name!r} has no `gradient`, which this method measures; take it from "
            '`capture.value_and_grad`, with other `labels` than "forward".'
        )
    return jax.vmap(lambda leaves: to_matrix(layer, leaves), out_axes=len(layer.stack))(dict(evidence.gradient))


def input_rows(layer: Layer, evidence: Evidence) -> Rows:
    """Rows a [S, N, T, I], the ones of the bias included; the uses of a shared layer are further positions."""
    return of_rows.joined(_by_use(layer, evidence, "input_rows"))


def output_rows(layer: Layer, evidence: Evidence) -> Array:
    """Rows g [S, K, N, T, O], aligned with `input_rows`."""
    found = _by_use(layer, evidence, "output_rows")
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-2)


def input_moment(
    layer: Layer, evidence: Evidence, full: bool = True, sharing: Sharing = "expand", rank: int | None = None
) -> Any:
    """A, the weighted mean over examples of sum_t a a^T; of (sum_t a) (sum_t a)^T if positions are pooled.

    Args:
        layer: the layer.
        evidence: what a batch says about it.
        full: whether to form the matrix, or only its diagonal.
        sharing: "expand", or "reduce" for pooled positions.
        rank: vectors that it is wanted for; None for the matrix itself.

    Returns:
        [S, I, I], or a `Diagonal` [S, I]; its products where they take fewer flops.
    """
    if examples_at_a_time(layer, evidence) is not None:
        rank = None  # the matrix of a piece is what is summed
    layer = layer if rank is None else replace(layer, devices=None)  # products are no arrays to send
    found = summed(lambda part: _input_sum(layer, part, full, sharing, rank), layer, evidence, symmetric=True)
    return _divided(found, total(evidence, example_count(layer, evidence)))


def _input_sum(layer: Layer, evidence: Evidence, full: bool, sharing: Sharing, rank: int | None) -> Any:
    """A before it is divided by the weight of the examples."""
    rows = input_rows(layer, evidence)
    examples = rows.shape[-3]
    if sharing == "reduce":
        if isinstance(rows, OneHot):
            weights = jnp.ones(examples) if evidence.weights is None else example_weights(evidence.weights)
            there = of_rows.scaled(rows, _there(rows, evidence))
            return pooled_moment(there, weights.astype(rows.dtype), full)
        rows = _pooled(rows, evidence, mean=False)
    weights, positions = _row_weights(evidence, rows.shape[-2]), rows.shape[-2]
    flat = of_rows.over_leading(rows, (*rows.shape[:-3], examples * positions))
    if weights is not None:
        weights = jnp.broadcast_to(weights, (examples, positions)).reshape(-1).astype(flat.dtype)
    return second_moment(flat, weights, full, rank)


def output_moment(
    layer: Layer, evidence: Evidence, full: bool = True, sharing: Sharing = "expand", rank: int | None = None
) -> Any:
    """G, the weighted mean over draws, examples and positions of g g^T; I if g is the identity.

    If positions are pooled, the mean over draws and examples of (mean_t g) (mean_t g)^T.

    Args:
        layer: the layer.
        evidence: what a batch says about it.
        full: whether to form the matrix, or only its diagonal.
        sharing: "expand", or "reduce" for pooled positions.
        rank: vectors that it is wanted for; None for the matrix itself.

    Returns:
        [S, O, O], or a `Diagonal` [S, O]; its products where they take fewer flops.
    """
    columns = layer.shape[-1]
    if evidence.cotangents is None:
        if not full:
            return Diagonal(jnp.ones((*layer.stack, columns), layer.dtype))
        return jnp.broadcast_to(jnp.eye(columns, dtype=layer.dtype), (*layer.stack, columns, columns))

    def rows_of(part):
        rows = output_rows(layer, part)
        return _pooled(rows, part, mean=True) if sharing == "reduce" else rows

    def of_part(part):
        rows = rows_of(part)
        flat = rows.reshape(rows.shape[:-4] + (prod(rows.shape[-4:-1]), columns))
        return second_moment(flat, full=full, rank=rank)

    draws, examples, positions = jax.eval_shape(rows_of, evidence).shape[-4:-1]
    weights = _row_weights(evidence, positions)
    if weights is None:
        count = examples * positions
    else:
        count = jnp.sum(jnp.broadcast_to(weights, (examples, positions)))
    spread = rank is None and is_spread(layer, evidence)
    found = summed(of_part, layer, evidence, symmetric=True) if spread else of_part(evidence)
    return _divided(found, draws * count)


def input_moment_action(layer: Layer, evidence: Evidence, vector: Array) -> Array:
    """A v from the rows, without forming A, of which `input_moment` says what it is.

    Args:
        layer: the layer.
        evidence: what a batch says about it.
        vector: [S, I].

    Returns:
        [S, I].
    """
    rows = input_rows(layer, evidence)
    weights = _row_weights(evidence, rows.shape[-2])
    along = of_rows.times(rows, vector[..., None]) * (1.0 if weights is None else weights.astype(rows.dtype)[..., None])
    return _divided(of_rows.pulled(rows, along)[..., 0], total(evidence, rows.shape[-3]))


def mean_input(layer: Layer, evidence: Evidence) -> Array:
    """The weighted mean of the rows a over examples and positions, [S, I]."""
    rows = input_rows(layer, evidence)
    weights, count = _spread_weights(evidence, rows)
    return _divided(of_rows.total(rows, weights), count)


def mean_output(layer: Layer, evidence: Evidence) -> Array:
    """The weighted mean over draws, examples and positions of the cotangents of the examples, [S, O].

    These carry the roots of the weights, and get them here once more: of weights of positions that are not 0 or 1 that
    is exact only where the layer has the positions of the weights.
    """
    rows = output_rows(layer, evidence)
    weights, count = _spread_weights(evidence, rows)
    return _divided(einsum("nt,...knto->...o", jnp.sqrt(weights), rows), rows.shape[-4] * count)


def partial_traces(
    layer: Layer, evidence: Evidence, full: tuple[bool, bool] = (True, True), sharing: Pairing = "example"
) -> tuple[Factor, Factor]:
    """The two partial traces of F: E[D D^T] over the outputs, and E[D^T D] over the inputs.

    Args:
        layer: the layer.
        evidence: what a batch says about it.
        full: for either side, whether to form the matrix, or only its diagonal.
        sharing: "example" for the gradients of examples as they are, D = sum_t a g^T; "expand" without the products of
            different positions; "reduce" with pooled ones, D = (sum_t a) (mean_t g)^T.

    Returns:
        [S, I, I] and [S, O, O], or `Diagonal`s.
    """
    if evidence.cotangents is None:  # g = identity: F = A (x) I
        pooled = "reduce" if sharing == "reduce" else "expand"
        inputs = input_moment(layer, evidence, full[0], pooled)
        outputs = output_moment(layer, evidence, full[1], pooled)
        spread = trace(inputs)
        return (
            scaled(inputs, jnp.full_like(spread, layer.shape[-1])),
            scaled(outputs, spread),
        )
    moments = paired_moments if sharing == "expand" else gradient_moments
    found = summed(lambda part: moments(*paired_rows(layer, part, sharing), full), layer, evidence, symmetric=True)
    return _divided(found, total(evidence, example_count(layer, evidence)))


def paired_rows(layer: Layer, evidence: Evidence, sharing: Pairing = "example") -> tuple[Rows, Array]:
    """Rows a and g whose products, summed over the positions, are the gradients of the examples.

    Args:
        layer: the layer.
        evidence: inputs and cotangents of a batch.
        sharing: "reduce" for pooled positions, T = 1: the sum of a beside the mean of g, which is exact where g is the
            same at all of them. One-hot rows cannot be summed: they keep their positions, each beside that mean.

    Returns:
        a [S, N, T, I] and g [S, K, N, T, O].
    """
    rows, columns = input_rows(layer, evidence), output_rows(layer, evidence)
    if sharing != "reduce":
        return rows, columns
    mean = _pooled(columns, evidence, mean=True)
    if isinstance(rows, OneHot):
        return of_rows.scaled(rows, _there(rows, evidence)), jnp.broadcast_to(mean, columns.shape)
    return _pooled(rows, evidence, mean=False), mean


def row_gradient(layer: Layer, evidence: Evidence) -> dict[str, Array]:
    """The gradient that the cotangents of one draw are of: the sum over examples and positions of a g^T.

    Args:
        layer: the layer.
        evidence: inputs and cotangents.

    Returns:
        {role: array}; where the devices divide the stack, each has its copies.
    """

    def of_part(part):
        rows, columns = paired_rows(layer, part)
        return of_rows.pulled(rows, jnp.squeeze(columns, -4))

    return from_matrix(layer, summed(of_part, layer, evidence))


def example_count(layer: Layer, evidence: Evidence) -> int:
    """N of an evidence with inputs."""
    return jax.eval_shape(lambda evidence: input_rows(layer, evidence), evidence).shape[-3]


def total(evidence: Evidence, examples: int) -> Scalar:
    """W, the total weight of the examples of an evidence that has this many."""
    return examples if evidence.count is None else evidence.count


def _by_use(layer: Layer, evidence: Evidence, side: Literal["input_rows", "output_rows"]) -> list[Any]:
    """The rows of every use of a layer, from what was recorded of it."""
    values = evidence.inputs if side == "input_rows" else evidence.cotangents
    if values is None:
        raise ValueError(
            f"The evidence for {layer.name!r} has no activations or no cotangents, which the method needs. "
            'Evidence of `labels="forward"` has no cotangents; capture with `labels="sampled"`.'
        )
    calls = values if isinstance(values, tuple) else (values,)
    uses = layer.uses or (Use(layer.kind, layer.geometry),) * len(calls)
    if len(uses) != len(calls):
        raise ValueError(
            f"The evidence for {layer.name!r} is of {len(calls)} calls; the layer has {len(uses)}. "
            "Capture the model that the `layers` of the transformation were found in."
        )
    if any(use.transposed for use in uses):
        pairs = [_balanced(*_pair(layer, use, evidence, place)) for place, use in enumerate(uses)]
        found: list[Any] = [pair[side == "output_rows"] for pair in pairs]
        if len({type(rows) for rows in found}) > 1:
            found = [of_rows.written_out(rows) for rows in found]
    else:
        found = [getattr(KINDS[use.kind], side)(layer, use, call) for use, call in zip(uses, calls, strict=True)]
    return placed_inputs(layer, uses, found) if side == "input_rows" else placed_outputs(layer, uses, found)


def _pair(layer: Layer, use: Use, evidence: Evidence, place: int) -> tuple[Rows, Array]:
    """Rows a and g of one use; of a transposed one the cotangents are a, and what it reads is g.

    Cotangents have draws, and a has none: each draw of a position is a position of its own, at which g is zero for the
    other draws. The roots of the weights are in g, wherever it comes from.
    """
    kind = KINDS[use.kind]
    assert isinstance(evidence.inputs, tuple) and isinstance(evidence.cotangents, tuple), "recorded of several uses"
    assert kind.input_rows is not None and kind.output_rows is not None, "a use has rows"
    inputs, cotangents = evidence.inputs[place], evidence.cotangents[place]
    if not use.transposed:
        return kind.input_rows(layer, use, inputs), kind.output_rows(layer, use, cotangents)
    rows, columns = kind.output_rows(layer, use, cotangents), kind.input_rows(layer, use, inputs)
    if layer.has_bias:  # which is not added to what is used the other way round
        rows = jnp.concatenate([rows, jnp.zeros_like(rows[..., :1])], axis=-1)
    weights = _row_weights(evidence, rows.shape[-2])
    if weights is not None:
        roots = jnp.sqrt(weights.astype(rows.dtype))[..., None]
        rows, columns = jnp.where(roots > 0, rows / jnp.where(roots > 0, roots, 1), 0), columns * roots
    draws, examples, positions = rows.shape[-4:-1]
    rows = jnp.moveaxis(rows, -4, -2)  # [S, N, T, K, I]
    columns = einsum("kl,...nto->...kntlo", jnp.eye(draws, dtype=columns.dtype), columns)
    rows = rows.reshape(*rows.shape[:-4], examples, positions * draws, rows.shape[-1])
    return rows, columns.reshape(*columns.shape[:-3], positions * draws, columns.shape[-1])


def _balanced(rows: Rows, columns: Array) -> tuple[Rows, Array]:
    """Rows a c and g / c with the same mean square length for each copy, so that the uses of a layer can be joined."""
    mean = jnp.mean(of_rows.lengths(rows), axis=(-2, -1))
    other = jnp.mean(jnp.sum(columns**2, axis=-1), axis=(-3, -2, -1))
    scale = jnp.where((mean > 0) & (other > 0), other / jnp.where(mean > 0, mean, 1), 1) ** 0.25
    return of_rows.scaled(rows, scale[..., None, None]), columns / scale[..., None, None, None, None]


def _row_weights(evidence: Evidence, positions: int) -> Array | None:
    """Weights of the rows, [N, T] or [N, 1]; those of the positions where the layer has the same positions."""
    if evidence.weights is None:
        return None
    weights = evidence.weights.reshape(evidence.weights.shape[0], -1)
    return weights if weights.shape[1] == positions else example_weights(weights)[:, None]


def _spread_weights(evidence: Evidence, rows: Rows) -> tuple[Array, Array]:
    """Weights of the rows [..., N, T, n] as an array [N, T], and their sum."""
    weights = _row_weights(evidence, rows.shape[-2])
    weights = jnp.ones(rows.shape[-3:-1], rows.dtype) if weights is None else weights.astype(rows.dtype)
    weights = jnp.broadcast_to(weights, rows.shape[-3:-1])
    return weights, jnp.sum(weights)


def _there(rows: Rows, evidence: Evidence) -> Array:
    """1 for the positions that have a weight, 0 for the others, [N, T]."""
    weights = _row_weights(evidence, rows.shape[-2])
    there = jnp.ones(rows.shape[-2:-1]) if weights is None else weights > 0
    return jnp.broadcast_to(there, rows.shape[-3:-1]).astype(rows.dtype)


def _pooled(rows: Array, evidence: Evidence, *, mean: bool) -> Array:
    """Sum or mean over those positions of an example that have a weight, [..., N, T, n] -> [..., N, 1, n]."""
    there = _there(rows, evidence)[..., None]
    count = jnp.maximum(jnp.sum(there, axis=-2, keepdims=True), 1) if mean else 1
    return jnp.sum(rows * there, axis=-2, keepdims=True) / count


def _divided(moment: Any, count: Scalar) -> Any:
    """A moment over its count; of an empty batch, zero."""
    if isinstance(moment, Moment):
        return moment.over(jnp.where(count > 0, count, 1).astype(moment.trace.dtype))
    return jax.tree.map(lambda leaf: leaf / jnp.where(count > 0, count, 1).astype(leaf.dtype), moment)
