"""One product of a parameter, read as a use of a layer: which matrix it is, and how its arrays become rows."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import jax.numpy as jnp

from natgrad_jax.algebra import arranged
from natgrad_jax.algebra.arranged import Arrangement, Shape
from natgrad_jax.base import Array, Use
from natgrad_jax.layers.conv import ConvGeometry
from natgrad_jax.program.axes import Contraction, Convolution, Lookup, without
from natgrad_jax.program.products import Product, Spread

NOWHERE = Spread(-1)
"""Of an array of one example: no axis is that of the examples, all are positions of the one."""


class Reading(NamedTuple):
    """How an array of the program becomes what `Evidence` has: split, put in order, [S, N, ...].

    Attributes:
        split: its axes, that of the examples in three: outer, N, inner.
        order: of these in the result.
        shape: of the result.
        wide: what the result is repeated to, where copies of a layer read the same; None elsewhere.
        parts: how many parts of examples there are in the place of N; 0 for examples.
        place: the axis that these are in the result.
    """

    split: Shape
    order: tuple[int, ...]
    shape: Shape
    wide: Shape | None = None
    parts: int = 0
    place: int = 0

    def __call__(self, array: Array, front: int = 0) -> Array:
        """The array [front axes, ...] as [front axes, S, N, ...]."""
        lead = array.shape[:front]
        array = array.reshape(*lead, *self.split)
        array = array.transpose(*range(front), *(front + axis for axis in self.order))
        array = array.reshape(*lead, *self.shape)
        return array if self.wide is None else jnp.broadcast_to(array, (*lead, *self.wide))


def parts_of(reading: Callable[..., Array]) -> int:
    """How many parts of examples a reading has in the place of N; 0 for examples."""
    return reading.parts if isinstance(reading, Reading) else 0


class Call(NamedTuple):
    """A use of a layer in the program: which product, and how its operand and the cotangent of its result are read."""

    product: Product
    inputs: Callable[..., Array]
    outputs: Callable[..., Array]


class Seen(NamedTuple):
    """What a product says: the matrix of its parameter, and itself as a use.

    Attributes:
        kind: of a layer.
        kernel: the parameter as the kernel of that kind, [stack, ...].
        bias: what is added, [stack, O]; None of nothing.
        stack: sizes of the axes of copies.
        shape: (I, O), without a bias.
        use: the use.
        call: the same in the program.
        window: of a convolution.
        groups: of a convolution.
    """

    kind: str
    kernel: Arrangement
    bias: Arrangement | None
    stack: Shape
    shape: tuple[int, int]
    use: Use
    call: Call
    window: Shape = ()
    groups: int = 1


_ADVICE = (
    "; the function takes {0} examples and no other number, so that no second trace tells: let it read that number off "
    "what it is called with (`x.shape[0]` for {0}, of graphs `num_segments=graphs.n_node.shape[0]`)"
)


def read(product: Product, examples: int, alone: bool = False) -> Seen | str:
    """What a product says of its parameter, or why that is no layer.

    Args:
        product: of a traced function.
        examples: N.
        alone: whether the function takes no other number of examples.

    Returns:
        What it says, or a sentence.
    """
    if product.examples is None or product.examples_out is None:
        why = f"its input of shape {product.other} has no axis of the {examples} examples that could be told"
        return why + (_ADVICE.format(examples) if alone else "")
    if product.examples.segments != product.examples_out.segments:
        return "its product turns parts of examples into others"
    reader = {Contraction: _dense, Convolution: _conv, Lookup: _embed}[type(product.options)]
    return reader(product, examples)


def _dense(product: Product, examples: int) -> Seen | str:
    """A `dot_general`. Axes of the kernel in front of its inputs are copies, of layers or heads, each with a matrix."""
    options, levels = product.options, stack_of(product)
    assert isinstance(options, Contraction), "chosen by type"
    hidden, depth = len(levels), len(product.levels)
    sizes = arranged.shape(product.kernel)
    batch, summed = [axis for axis, _ in options.batch], [axis for axis, _ in options.contracted]
    before = [axis for axis in options.free if axis < min(summed, default=0)]
    heads = before if len(before) < len(options.free) else []
    free = [axis for axis in options.free if axis not in heads]
    copies = tuple(sizes[hidden + axis] for axis in heads)
    shared = (*levels, *(sizes[hidden + axis] for axis in batch))
    stack = (*shared, *copies)
    rows, columns = (prod(sizes[hidden + axis] for axis in axes) for axes in (summed, free))
    order = [*range(hidden), *(hidden + axis for axis in (*batch, *heads, *summed, *free))]
    kernel = arranged.reshaped(arranged.transposed(product.kernel, order), (*stack, rows, columns))
    if kernel is None:
        return "joined with others along several axes"
    of_batch, of_summed = [axis for _, axis in options.batch], [axis for _, axis in options.contracted]
    where, where_out = _axes_of_examples(product, depth)
    if where in of_summed + of_batch or where_out in options.columns:
        return "its products sum over the examples"
    inputs = reading(product, product.other, product.examples, examples, (of_batch, of_summed))
    inputs = _merged(inputs, len(of_summed))
    if copies:
        front, back = inputs.shape[: len(shared)], inputs.shape[len(shared) :]
        inputs = inputs._replace(shape=(*front, *(1 for _ in copies), *back), wide=(*front, *copies, *back))
        inputs = inputs._replace(place=inputs.place + len(copies))
    cut = len(batch) + len(heads)
    last = options.columns[cut:]
    outputs = reading(product, product.output, product.examples_out, examples, (options.columns[:cut], last))
    outputs = _merged(outputs, len(last))
    use = Use("dense", None, _positions(outputs, stack, columns, examples))
    bias = _bias(product, stack, columns)
    return Seen("dense", kernel, bias, stack, (rows, columns), use, Call(product, inputs, outputs))


def _conv(product: Product, examples: int) -> Seen | str:
    options, stack = product.options, stack_of(product)
    assert isinstance(options, Convolution), "chosen by type"
    hidden, depth, groups = len(stack), len(product.levels), options.groups
    out, into, *spatial = options.kernel
    kernel = arranged.transposed(product.kernel, [*range(hidden), *(hidden + axis for axis in (*spatial, into, out))])
    *window, channels, columns = arranged.shape(kernel)[hidden:]
    if 0 in product.output:
        return f"its result of shape {product.output} is empty"
    where, where_out = _axes_of_examples(product, depth)
    if where in options.inputs[1:] or where_out in options.outputs[1:]:
        return "its window moves over the examples"
    geometry = ConvGeometry(
        tuple(window), options.strides, options.padding, options.input_dilation, options.kernel_dilation, groups
    )
    images = (*options.inputs[2:], options.inputs[1])
    results = (*options.outputs[2:], options.outputs[1])
    inputs = reading(product, product.other, product.examples, examples, ((), images))
    outputs = reading(product, product.output, product.examples_out, examples, ((), results))
    use = Use("conv", geometry, _positions(outputs, stack, columns, examples))
    shape, bias = (prod(window) * channels, columns // groups), _bias(product, stack, columns)
    call = Call(product, inputs, outputs)
    return Seen("conv", kernel, bias, stack, shape, use, call, window=tuple(window), groups=groups)


def _embed(product: Product, examples: int) -> Seen | str:
    options, stack = product.options, stack_of(product)
    assert isinstance(options, Lookup), "chosen by type"
    hidden, depth = len(stack), len(product.levels)
    sizes = arranged.shape(product.kernel)[hidden:]
    order = (options.axis, *without(len(sizes), (options.axis,)))
    moved = arranged.transposed(product.kernel, [*range(hidden), *(hidden + axis for axis in order)])
    rows, columns = sizes[options.axis], prod(sizes) // sizes[options.axis]
    kernel = arranged.reshaped(moved, (*stack, rows, columns))
    if kernel is None:
        return "joined with others along several axes"
    if _axes_of_examples(product, depth)[1] in options.columns:
        return "its entries are the examples"
    last = len(product.other) - depth - 1
    inputs = _merged(reading(product, product.other, product.examples, examples, ((), (last,))), 2)
    outputs = reading(product, product.output, product.examples_out, examples, ((), options.columns))
    outputs = _merged(outputs, len(options.columns))
    use = Use("embed", "clip" if options.clip else None, _positions(outputs, stack, columns, examples))
    return Seen("embed", kernel, None, stack, (rows, columns), use, Call(product, inputs, outputs))


def reading(
    product: Product, sizes: Shape, spread: Spread | None, examples: int, columns: tuple[Sequence[int], Sequence[int]]
) -> Reading:
    """How an array is read.

    Args:
        product: whose array it is.
        sizes: of the array, levels in front.
        spread: where the examples are.
        examples: N.
        columns: axes of copies, axes that come last, both counted without levels.

    Returns:
        The reading as [S, N, positions, last axes].
    """
    assert spread is not None, "known of what is read"
    examples = spread.segments or examples
    depth = len(product.levels)
    copies = [axis for axis, level in enumerate(product.levels) if level.stacked] + [
        depth + axis for axis in columns[0]
    ]
    last = [depth + axis for axis in columns[1]]
    split, places, positions, where = [1] if spread == NOWHERE else [], [], [], 0
    for axis, size in enumerate(sizes):
        places.append(len(split))
        if axis == spread.axis:
            where = len(split) + 1
            positions += [len(split), len(split) + 2]
            split += [spread.outer, examples, spread.inner]
            continue
        if axis not in copies and axis not in last:
            positions.append(len(split))
        split.append(size)
    positions = [place for place in positions if split[place] > 1]
    kept = [*(places[axis] for axis in copies), where, *positions, *(places[axis] for axis in last)]
    order = kept + [place for place in range(len(split)) if place not in kept]  # of one entry
    shape = tuple(split[place] for place in kept)
    return Reading(tuple(split), tuple(order), shape, parts=spread.segments, place=len(copies))


def _merged(reading: Reading, count: int) -> Reading:
    """With its last axes as one."""
    cut = len(reading.shape) - count
    return reading._replace(shape=(*reading.shape[:cut], prod(reading.shape[cut:])))


def stack_of(product: Product) -> Shape:
    """The scans in which the parameter has an entry for every turn."""
    return tuple(level.length for level in product.levels if level.stacked)


def _axes_of_examples(product: Product, depth: int) -> tuple[int, int]:
    """Those of the other operand and of the result, without levels; negative ones are levels."""
    assert product.examples is not None and product.examples_out is not None, "asked before"
    return product.examples.axis - depth, product.examples_out.axis - depth


def _bias(product: Product, stack: Shape, columns: int) -> Arrangement | None:
    return None if product.bias is None else arranged.reshaped(product.bias, (*stack, columns))


def _positions(outputs: Reading, stack: Shape, columns: int, examples: int) -> int:
    """T of a use: all parts of a batch, where these are of one example or another."""
    return prod(outputs.shape) // max(prod(stack) * columns * (1 if outputs.parts else examples), 1)
