"""Which axes of a product are which: copies, inputs, outputs, examples and positions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from natgrad_jax.algebra.arranged import Shape
from natgrad_jax.program.products import Product

SIDES = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}
"""{primitive: the operands that a parameter can be}."""


class Contraction(NamedTuple):
    """Axes of a `dot_general` without those of levels: of the kernel, of what it is multiplied with, of the result.

    Attributes:
        batch: pairs of axes (kernel, other), each entry of which has a matrix of its own.
        contracted: pairs of axes (kernel, other) that are summed over.
        free: axes of the kernel that the result has.
        columns: axes of the result that the kernel has: those of the batch, then its free ones.
    """

    batch: tuple[tuple[int, int], ...]
    contracted: tuple[tuple[int, int], ...]
    free: tuple[int, ...]
    columns: tuple[int, ...]


class Convolution(NamedTuple):
    """Options of a convolution; layouts as in `lax.ConvDimensionNumbers`: (batch, channels, *spatial)."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]


class Lookup(NamedTuple):
    """Options of a `gather` that reads whole entries of a table along one axis."""

    axis: int
    columns: tuple[int, ...]
    clip: bool


def options_of(equation: Any, side: int) -> Contraction | Convolution | Lookup | str:
    """What a layer has to know of an equation.

    Args:
        equation: of a traced function.
        side: which operand is the parameter.

    Returns:
        The options, or why it is no product of rows.
    """
    options = equation.params
    kernel, other = equation.invars[side].aval.shape, equation.invars[1 - side].aval.shape
    if equation.primitive.name == "dot_general":
        return _contraction(options["dimension_numbers"], side, len(kernel), len(other))
    if equation.primitive.name == "gather":
        return _lookup(options, kernel)
    if options["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    layout = options["dimension_numbers"]
    return Convolution(
        tuple(options["window_strides"]),
        tuple((int(low), int(high)) for low, high in options["padding"]),
        tuple(options["lhs_dilation"]),
        tuple(options["rhs_dilation"]),
        options["feature_group_count"],
        tuple(layout.lhs_spec),
        tuple(layout.rhs_spec),
        tuple(layout.out_spec),
    )


def columns_of(product: Product) -> tuple[int, ...]:
    """Axes of the result, without those of levels, that the kernel has."""
    if isinstance(product.options, Convolution):
        return (product.options.outputs[1],)
    return product.options.columns


def _contraction(numbers: Any, side: int, rank: int, rank_of_other: int) -> Contraction:
    contracted, batch = (tuple(zip(pair[side], pair[1 - side], strict=True)) for pair in numbers)
    bound = {axis for axis, _ in contracted + batch}
    free = tuple(axis for axis in range(rank) if axis not in bound)
    first = len(batch) if side == 0 else len(batch) + rank_of_other - len(contracted) - len(batch)
    columns = (*range(len(batch)), *range(first, first + len(free)))
    return Contraction(batch, contracted, free, columns)


def _lookup(options: Any, kernel: Shape) -> Lookup | str:
    numbers, sizes = options["dimension_numbers"], options["slice_sizes"]
    if len(numbers.start_index_map) != 1 or tuple(numbers.collapsed_slice_dims) != tuple(numbers.start_index_map):
        return "cut (`gather`) before its product"
    axis = numbers.start_index_map[0]
    whole = all(size == length for place, (size, length) in enumerate(zip(sizes, kernel, strict=True)) if place != axis)
    if not whole or getattr(numbers, "operand_batching_dims", ()):
        return "cut (`gather`) before its product"
    clip = "clip" in str(options["mode"]).lower()
    return Lookup(axis, tuple(numbers.offset_dims), clip)


def without(axes: int, some: Sequence[int]) -> tuple[int, ...]:
    """The axes that are not among some."""
    return tuple(axis for axis in range(axes) if axis not in some)
