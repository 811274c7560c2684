"""Kinds of layer: parameters <-> weight matrix, activations -> rows.

The registry, and the questions that methods ask of a layer whatever its kind. A new kind is one file with a
`base.Kind`, and one line in `KINDS`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from natgrad_jax.averages import second_moment
from natgrad_jax.base import Array, Evidence, Kind, Layer, Scalar
from natgrad_jax.layers.conv import CONV, ConvGeometry
from natgrad_jax.layers.dense import DENSE
from natgrad_jax.linalg import Diagonal, Factor
from natgrad_jax.losses import example_weights

__all__ = [
    "KINDS",
    "ConvGeometry",
    "from_matrix",
    "input_moment",
    "input_rows",
    "output_moment",
    "output_rows",
    "to_matrix",
    "total",
]

_PARAMETER = Kind(
    to_matrix=lambda layer, leaves: leaves["value"].astype(layer.dtype),
    from_matrix=lambda layer, matrix: {"value": matrix},
    input_rows=lambda layer, inputs: inputs,
    output_rows=lambda layer, cotangents: cotangents,
)

KINDS: dict[str, Kind] = {"dense": DENSE, "conv": CONV, "parameter": _PARAMETER}


def to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    """The parameter arrays {role: array} of a layer as one matrix [S, I, O] in the dtype of its curvature."""
    return KINDS[layer.kind].to_matrix(layer, leaves)


def from_matrix(layer: Layer, matrix: Array) -> dict[str, Array]:
    """The inverse of `to_matrix`: {role: array} from [S, I, O]."""
    return KINDS[layer.kind].from_matrix(layer, matrix)


def input_rows(layer: Layer, evidence: Evidence) -> Array:
    """Rows a [S, N, T, I], the ones of the bias included; the calls of a shared layer are further positions."""
    calls = _calls(evidence.inputs)
    return _joined([KINDS[layer.kind].input_rows(layer, call) for call in calls])


def output_rows(layer: Layer, evidence: Evidence) -> Array:
    """Rows g [S, K, N, T, O], aligned with `input_rows`."""
    calls = _calls(evidence.cotangents)
    return _joined([KINDS[layer.kind].output_rows(layer, call) for call in calls])


def input_moment(layer: Layer, evidence: Evidence, full: bool = True) -> Factor:
    """A = sum_{n,t} a a^T / W, weighted: the sum over positions and the mean over examples.

    Args:
        layer: the layer.
        evidence: what a batch says about it.
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [S, I, I], or a `Diagonal` [S, I].
    """
    rows = input_rows(layer, evidence)
    weights = _row_weights(evidence, rows.shape[-2])
    examples, positions = rows.shape[-3:-1]
    flat = rows.reshape(rows.shape[:-3] + (examples * positions, rows.shape[-1]))
    if weights is not None:
        weights = jnp.broadcast_to(weights, (examples, positions)).reshape(-1).astype(flat.dtype)
    return _divided(second_moment(flat, weights, full), total(evidence, examples))


def output_moment(layer: Layer, evidence: Evidence, full: bool = True) -> Factor:
    """G = the mean of g g^T over draws, examples and positions, weighted; I if g is the identity.

    Args:
        layer: the layer.
        evidence: what a batch says about it.
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [S, O, O], or a `Diagonal` [S, O].
    """
    columns = layer.shape[-1]
    if evidence.cotangents is None:
        if not full:
            return Diagonal(jnp.ones((*layer.stack, columns), layer.dtype))
        return jnp.broadcast_to(jnp.eye(columns, dtype=layer.dtype), (*layer.stack, columns, columns))
    rows = output_rows(layer, evidence)
    draws, examples, positions = rows.shape[-4:-1]
    weights = _row_weights(evidence, positions)
    if weights is None:
        count = examples * positions
    else:
        count = jnp.sum(jnp.broadcast_to(weights, (examples, positions)))
    flat = rows.reshape(rows.shape[:-4] + (draws * examples * positions, columns))
    return _divided(second_moment(flat, full=full), draws * count)


def total(evidence: Evidence, examples: int) -> Scalar:
    """W, the total weight of the examples of an evidence that has this many."""
    return examples if evidence.count is None else evidence.count


def _calls(values: tuple[Array, ...] | Array | None) -> tuple[Array, ...]:
    if values is None:
        raise ValueError(
            "This evidence has no activations or no cotangents, which the method needs. "
            'Evidence of `labels="forward"` has no cotangents; capture with `labels="sampled"`.'
        )
    return values if isinstance(values, tuple) else (values,)


def _joined(rows: list[Array]) -> Array:
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-2)


def _row_weights(evidence: Evidence, positions: int) -> Array | None:
    """Weights of the rows, [N, T] or [N, 1]; those of the positions where the layer has the same positions."""
    if evidence.weights is None:
        return None
    weights = evidence.weights.reshape(evidence.weights.shape[0], -1)
    return weights if weights.shape[1] == positions else example_weights(weights)[:, None]


def _divided(moment: Factor, count: Scalar) -> Factor:
    """A moment over its count; of an empty batch, zero."""
    return jax.tree.map(lambda leaf: leaf / jnp.where(count > 0, count, 1).astype(leaf.dtype), moment)
