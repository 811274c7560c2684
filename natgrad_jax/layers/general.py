"""Dense layers over any axes: y = sum over some axes of x kernel + bias, `nn.DenseGeneral`, projections of attention.

The weight matrix [I, O] is the kernel with its contracted axes as one and its features as one, the bias as its last
row. Batch axes have a matrix each: they are stack axes. What is recorded has the contracted axes last, as one, so that
the rows are those of a dense layer.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp

from natgrad_jax.base import Array, Kind, Layer, Outline, Use
from natgrad_jax.layers.dense import input_rows


class GeneralGeometry(NamedTuple):
    """Axes of the input: `batch` have a kernel each, `contracted` are summed over; the kernel has `features` axes."""

    batch: int
    contracted: tuple[int, ...]
    features: int


def _recognise(module: Any, shape: tuple[int, ...]) -> GeneralGeometry | str:
    if getattr(module, "dot_general", None) is not None or getattr(module, "dot_general_cls", None) is not None:
        return "its option `dot_general`: with it the gradient is no product of inputs and cotangents"
    batch, contracted, features = (_tuple(value) for value in (module.batch_dims, module.axis, module.features))
    rank = len(shape)
    contracted = tuple(sorted(axis % rank for axis in contracted))  # as linen and NNX do, whatever the order given
    if {axis % rank for axis in batch} != set(range(len(batch))):
        return f"batch_dims={module.batch_dims}; handled are leading axes in their order"
    if rank - len(batch) - len(contracted) < 1:
        return f"its input of shape {shape} has no axis of examples: all are contracted or of a batch of kernels"
    return GeneralGeometry(len(batch), contracted, len(features))


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _record(geometry: GeneralGeometry, inputs: Array) -> Array:
    """[batch, N, ..., I]."""
    count = len(geometry.contracted)
    moved = jnp.moveaxis(inputs, geometry.contracted, range(-count, 0))
    return moved.reshape(*moved.shape[:-count], prod(moved.shape[-count:]))


def _outline(geometry: GeneralGeometry, shape: tuple[int, ...]) -> Outline:
    split = len(shape) - geometry.features
    return Outline((prod(shape[geometry.batch : split]), prod(shape[split:])), stack=shape[: geometry.batch])


def _to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    kernel = leaves["kernel"].astype(layer.dtype)
    rows, columns = layer.shape
    matrix = kernel.reshape(*layer.stack, rows - layer.has_bias, columns)
    if not layer.has_bias:
        return matrix
    bias = leaves["bias"].astype(layer.dtype).reshape(*layer.stack, 1, columns)
    return jnp.concatenate([matrix, bias], axis=-2)


def _from_matrix(layer: Layer, matrix: Array) -> dict[str, Array]:
    shapes = {leaf.role: leaf.shape for leaf in layer.leaves}
    if not layer.has_bias:
        return {"kernel": matrix.reshape(shapes["kernel"])}
    return {"kernel": matrix[..., :-1, :].reshape(shapes["kernel"]), "bias": matrix[..., -1, :].reshape(shapes["bias"])}


def _output_rows(layer: Layer, use: Use, cotangents: Array) -> Array:
    del use
    lead = 1 + len(layer.stack) + 1
    rows = cotangents.reshape(*cotangents.shape[:lead], -1, layer.shape[-1]).astype(layer.dtype)
    return jnp.moveaxis(rows, 0, -4)


GENERAL = Kind(
    _to_matrix,
    _from_matrix,
    input_rows,
    _output_rows,
    modules=("DenseGeneral",),
    roles=("kernel", "bias"),
    recognise=_recognise,
    record=_record,
    outline=_outline,
)
