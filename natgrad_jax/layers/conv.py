"""Convolutions of any spatial rank, as dense layers over patches.

A patch holds what the kernel covers at one output position: kernel offsets in row-major order, channels last, as the
kernel itself is laid out. Groups are independent layers over their own channels, so they are a stack axis: each has
its own factors. Patches are strided slices of the padded input, one for each kernel offset, which is cheaper than a
convolution with an identity kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra.stacks import einsum
from natgrad_jax.base import Array, Evidence, Kind, Layer, Use
from natgrad_jax.layers.arrays import assembled, taken_apart
from natgrad_jax.layers.dense import with_ones
from natgrad_jax.layers.pieces import summed


@dataclass(frozen=True)
class ConvGeometry:
    """The options of a convolution; one entry per spatial axis.

    Attributes:
        window: kernel sizes.
        strides: steps between output positions.
        padding: (low, high) pairs; negative ones cut.
        input_dilation: gaps put between inputs.
        kernel_dilation: gaps put between kernel offsets.
        groups: number of channel groups.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1

    @property
    def reach(self) -> tuple[int, ...]:
        """How far the kernel reaches over the padded input, its gaps included."""
        return tuple((size - 1) * gap + 1 for size, gap in zip(self.window, self.kernel_dilation, strict=True))


def _padded(geometry: ConvGeometry, images: Array) -> Array:
    """[M, *spatial, C] with its padding around it and its gaps inside."""
    gaps = [dilation - 1 for dilation in geometry.input_dilation]
    around = [(low, high, gap) for (low, high), gap in zip(geometry.padding, gaps, strict=True)]
    return lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *around, (0, 0, 0)])


def patches(geometry: ConvGeometry, images: Array) -> Array:
    """What the kernel covers at each output position.

    Args:
        geometry: the options of the convolution.
        images: [M, *spatial, C].

    Returns:
        [M, T, offsets, C], T the output positions in row-major order.
    """
    padded = _padded(geometry, images)
    sizes = zip(padded.shape[1:-1], geometry.reach, geometry.strides, strict=True)
    counts = [max(0, (n - r) // s + 1) for n, r, s in sizes]
    slices = []
    for offset in product(*(range(size) for size in geometry.window)):
        start = [o * d for o, d in zip(offset, geometry.kernel_dilation, strict=True)]
        stop = [o + (n - 1) * s + 1 for o, n, s in zip(start, counts, geometry.strides, strict=True)]
        part = lax.slice(padded, [0, *start, 0], [padded.shape[0], *stop, padded.shape[-1]], [1, *geometry.strides, 1])
        slices.append(part.reshape(part.shape[0], -1, part.shape[-1]))
    return jnp.stack(slices, axis=2)


def _to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    groups = layer.geometry.groups
    leaves = assembled(layer, leaves)
    kernel = leaves["kernel"].astype(layer.dtype)  # [..., *window, C / groups, groups * O]
    lead = layer.module_axes
    matrix = _split(kernel.reshape(kernel.shape[:lead] + (-1, kernel.shape[-1])), groups, lead)
    if not layer.has_bias:
        return matrix
    bias = leaves["bias"].astype(layer.dtype)[..., None, :]
    return jnp.concatenate([matrix, _split(bias, groups, lead)], axis=-2)


def _from_matrix(layer: Layer, matrix: Array) -> dict[str, Array]:
    groups = layer.geometry.groups
    if groups > 1:
        matrix = jnp.moveaxis(matrix, -3, -2)
        matrix = matrix.reshape(matrix.shape[:-2] + (-1,))
    if not layer.has_bias:
        return taken_apart(layer, {"kernel": matrix})
    return taken_apart(layer, {"kernel": matrix[..., :-1, :], "bias": matrix[..., -1, :]})


def _split(values: Array, groups: int, axis: int) -> Array:
    """The last axis split into groups, and the groups moved to `axis`."""
    if groups == 1:
        return values
    values = values.reshape(values.shape[:-1] + (groups, values.shape[-1] // groups))
    return jnp.moveaxis(values, -2, axis)


def _input_rows(layer: Layer, use: Use, inputs: Array) -> Array:
    geometry = use.geometry
    spatial = len(geometry.window)
    lead = layer.module_axes
    front, shape = inputs.shape[: lead + 1], inputs.shape[-spatial - 1 :]
    found = patches(geometry, inputs.reshape((-1, *shape)).astype(layer.dtype))  # [M, T, offsets, C]
    found = _split(found, geometry.groups, 0)  # [groups, M, T, offsets, C / groups]
    offsets, channels = found.shape[-2:]
    rows = found.reshape(found.shape[: found.ndim - 4] + front + (-1, offsets * channels))
    if geometry.groups > 1:
        rows = jnp.moveaxis(rows, 0, lead)
    return with_ones(layer, use, rows)


def _output_rows(layer: Layer, use: Use, cotangents: Array) -> Array:
    groups = use.geometry.groups
    lead = layer.module_axes
    front = cotangents.shape[: 1 + lead + 1]  # K, S without groups, N
    rows = cotangents.reshape(front + (-1, cotangents.shape[-1])).astype(layer.dtype)
    rows = _split(rows, groups, 1 + lead)
    return jnp.moveaxis(rows, 0, -4)


def _gradient(layer: Layer, evidence: Evidence) -> dict[str, Array]:
    """The summed gradient as a product of rows.

    XLA for CPUs optimises convolutions only outside of branches, and evidence is called inside of one, where the
    gradient of a kernel as a convolution took 20 times as long (a net of 16, 32, 64 channels on 8 x 8 pixels).
    """

    def of_piece(part):
        assert isinstance(part.inputs, tuple) and isinstance(part.cotangents, tuple), "both are recorded"
        found = []
        for use, inputs, cotangents in zip(layer.uses, part.inputs, part.cotangents, strict=True):
            rows, columns = _input_rows(layer, use, inputs), _output_rows(layer, use, cotangents)
            found.append(einsum("...nti,...knto->...kio", rows, columns))
        return sum(found[1:], found[0])

    draws = jnp.moveaxis(summed(of_piece, layer, evidence), -3, 0)
    return jax.vmap(lambda matrix: _from_matrix(layer, matrix))(draws)


CONV = Kind(_to_matrix, _from_matrix, _input_rows, _output_rows, gradient=_gradient)
