"""Parameters that belong to no known layer: an array as it is, whose gradient is all that is known."""

from dataclasses import replace
from math import prod

import jax.numpy as jnp

from natgrad_jax.base import Array, Kind, Layer, Layers, Leaf
from natgrad_jax.layers.arrays import assembled, taken_apart


def parameter(address: str, shape: tuple[int, ...], dtype: str, note: str = "") -> Layer:
    """One array as a block of its own.

    Args:
        address: of the array.
        shape: of the array.
        dtype: of its curvature.
        note: why it belongs to no layer.

    Returns:
        A layer of kind "parameter".
    """
    shape = tuple(shape)
    return Layer(address, "parameter", shape, (Leaf("value", address, shape),), dtype=dtype, note=note)


def dtype_of(array: Array) -> str:
    """Dtype of the curvature of an array: float32, or float64 for parameters in float64."""
    return "float64" if array.dtype == jnp.float64 else "float32"


def widest(layers: tuple[Layer, ...]) -> str:
    """Dtype of what is common to some layers."""
    return "float64" if any(layer.dtype == "float64" for layer in layers) else "float32"


def with_gradients(layers: Layers) -> Layers:
    """The remaining parameters as blocks like the layers, where the gradients of the examples are there for them.

    Args:
        layers: of the model.

    Returns:
        Of a model that is watched by `jacobian="examples"`, layers without a rest: each array is a column [size, 1] of
        kind "array". The same layers of another.
    """
    if layers.jacobian != "examples":
        return layers
    columns = [replace(layer, kind="array", shape=(prod(layer.shape), 1)) for layer in layers.rest]
    return replace(layers, known=(*layers.known, *columns), rest=())


ARRAY = Kind(
    to_matrix=lambda layer, leaves: leaves["value"].astype(layer.dtype).reshape(layer.shape),
    from_matrix=lambda layer, matrix: {"value": matrix.reshape(layer.leaves[0].shape)},
)
PARAMETER = Kind(
    to_matrix=lambda layer, leaves: (
        assembled(layer, leaves)["value"].astype(layer.dtype).reshape(*layer.stack, *layer.shape)
    ),
    from_matrix=lambda layer, matrix: taken_apart(layer, {"value": matrix}),
)
