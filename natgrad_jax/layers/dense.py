"""Dense layers: y = x kernel + bias, the weights shared by all axes of x between the examples and the last.

The weight matrix [I, O] is the kernel with the bias as its last row; a row of inputs is x with a 1 behind it.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from natgrad_jax.base import Array, Kind, Layer, Use
from natgrad_jax.layers.arrays import assembled, taken_apart


def _to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    leaves = assembled(layer, leaves)
    kernel = leaves["kernel"].astype(layer.dtype)
    if not layer.has_bias:
        return kernel
    bias, axes = leaves["bias"].astype(layer.dtype), kernel.shape[:-2]
    # As vectors: the one memory behind the other, a quarter of the code of an edge between matrices.
    return jnp.concatenate([kernel.reshape(*axes, -1), bias], axis=-1).reshape(*axes, -1, kernel.shape[-1])


def _from_matrix(layer: Layer, matrix: Array) -> dict[str, Array]:
    if not layer.has_bias:
        return taken_apart(layer, {"kernel": matrix})
    return taken_apart(layer, {"kernel": matrix[..., :-1, :], "bias": matrix[..., -1, :]})


def _rows(layer: Layer, values: Array, leading: int) -> Array:
    """[leading axes, N, ..., C] -> [leading axes, N, T, C]."""
    return values.reshape(values.shape[: leading + 1] + (-1, values.shape[-1])).astype(layer.dtype)


def with_ones(layer: Layer, use: Use, rows: Array) -> Array:
    """Rows of inputs, with the 1 of the bias behind each if the layer has one; a 0 where it is not added."""
    if not layer.has_bias or use.transposed:
        return rows
    return jnp.concatenate([rows, jnp.full_like(rows[..., :1], use.biased)], axis=-1)


def input_rows(layer: Layer, use: Use, inputs: Array) -> Array:
    """Rows a [S, N, T, I] of inputs [S, N, ..., channels], the ones of the bias behind them."""
    return with_ones(layer, use, _rows(layer, inputs, leading=len(layer.stack)))


def output_rows(layer: Layer, use: Use, cotangents: Array) -> Array:
    """Rows g [S, K, N, T, O] of cotangents [K, S, N, ..., O]."""
    del use
    return jnp.moveaxis(_rows(layer, cotangents, leading=1 + len(layer.stack)), 0, -4)


ROWS = Kind(
    _to_matrix,
    _from_matrix,
    input_rows=lambda layer, use, rows: rows.astype(layer.dtype),
    output_rows=lambda layer, use, rows: jnp.moveaxis(rows, 0, -4).astype(layer.dtype),
)
"""A use of a layer of any kind, whose evidence is rows already: a [S, N, T, I] and g [K, S, N, T, O]."""
DENSE = Kind(_to_matrix, _from_matrix, input_rows, output_rows)
