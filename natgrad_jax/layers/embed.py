"""Tables of embeddings: y = table[index], a dense layer without a bias on one-hot inputs that are never written out.

A row of inputs is its place, so a vocabulary of 50,000 costs two numbers a row. A of such rows is diagonal: how often
each entry of the vocabulary is seen.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from natgrad_jax.algebra.rows import OneHot
from natgrad_jax.base import Array, Kind, Layer, Use
from natgrad_jax.layers.arrays import assembled, taken_apart
from natgrad_jax.layers.dense import output_rows


def _to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    return assembled(layer, leaves)["embedding"].astype(layer.dtype)


def _from_matrix(layer: Layer, matrix: Array) -> dict[str, Array]:
    return taken_apart(layer, {"embedding": matrix})


def _input_rows(layer: Layer, use: Use, inputs: Array) -> OneHot:
    size = layer.shape[0] if use.part is None else use.part.sizes[-2]
    index = inputs.reshape(*inputs.shape[: len(layer.stack) + 1], -1).astype(jnp.int32)
    if use.geometry == "clip":
        index = jnp.clip(index, 0, size - 1)
    there = (index >= 0) & (index < size)  # what is out of range reads NaN and sends nothing back
    return OneHot(jnp.where(there, index, 0), there.astype(layer.dtype), size)


EMBED = Kind(_to_matrix, _from_matrix, _input_rows, output_rows)
