"""Views: parameter arrays as stacks of tensors, for methods that need shapes and a gradient, and no activations.

A view takes the matrix of a layer, or the array of a parameter, apart into modes: axes of which each has a factor of
its own. Some axes may become a stack, each entry of which is a block by itself; large modes may be cut into blocks.

    matrix [S, ...] -> split -> order -> joined -> the first to the stack -> modes cut -> tensor [S, ..., n_1, ..., n_k]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Literal, NamedTuple

import jax.numpy as jnp

from natgrad_jax.addresses import Tree, flatten
from natgrad_jax.algebra.arranged import Arranged, Joined, parts, shape
from natgrad_jax.base import Array, Kind, Layer, Layers, Leaf
from natgrad_jax.layers.parameter import dtype_of, parameter

Modes = Literal["flatten_spatial", "matrix", "all"]
"""The modes of a kernel [*window, C, O]: (window, C, O), (window C, O), or each of its axes."""


@dataclass(frozen=True)
class View:
    """How the matrix of a layer is seen.

    Attributes:
        source: the layer whose matrix it is: of one parameter array, or of all arrays of the layer together.
        split: sizes that the axes behind S are split or joined into.
        order: the order in which these come.
        joined: sizes that they are read as in that order; their own if None.
        stacked: how many of these, from the first on, are stack axes; the others are modes.
        block: the largest size of a mode; longer ones are cut into equal blocks, filled up with zeros.
    """

    source: Layer
    split: tuple[int, ...]
    order: tuple[int, ...]
    joined: tuple[int, ...] | None = None
    stacked: int = 0
    block: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the stacked axes and of the modes, uncut."""
        return self.joined or self._ordered

    @property
    def _ordered(self) -> tuple[int, ...]:
        return tuple(self.split[axis] for axis in self.order)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Into how many blocks each mode is cut."""
        return tuple(1 if self.block is None else -(-size // self.block) for size in self.sizes[self.stacked :])

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes of the modes, cut."""
        return tuple(-(-size // cut) for size, cut in zip(self.sizes[self.stacked :], self.cuts, strict=True))

    @property
    def stack(self) -> tuple[int, ...]:
        """The stack axes that the view adds behind those of the layer."""
        return self.sizes[: self.stacked] + ((prod(self.cuts),) if prod(self.cuts) > 1 else ())


def view(
    source: Layer,
    split: Sequence[int],
    order: Sequence[int] | None = None,
    *,
    joined: tuple[int, ...] | None = None,
    stacked: int = 0,
    block: int | None = None,
) -> Layer:
    """A layer of kind "tensor": what a view makes of a source; the arguments are those of `View`."""
    found = View(source, tuple(split), tuple(range(len(split)) if order is None else order), joined, stacked, block)
    return Layer(
        source.name, "tensor", found.modes, source.leaves, source.stack + found.stack, source.dtype, geometry=found
    )


def as_tensor(view: View, matrix: Array) -> Array:
    """The tensor [S, ..., n_1, ..., n_k] of a matrix [S, ...]."""
    lead = len(view.source.stack)
    front = matrix.shape[:lead]
    matrix = matrix.reshape(front + view.split)
    matrix = matrix.transpose(*range(lead), *(lead + axis for axis in view.order)).reshape(front + view.sizes)
    if prod(view.cuts) == 1:
        return matrix
    lead += view.stacked
    gaps = [cut * size - old for cut, size, old in _modes(view)]
    matrix = jnp.pad(matrix, [(0, 0)] * lead + [(0, gap) for gap in gaps])
    matrix = matrix.reshape(matrix.shape[:lead] + tuple(chain(*zip(view.cuts, view.modes, strict=True))))
    count = len(view.modes)
    axes = [lead + 2 * mode for mode in range(count)] + [lead + 2 * mode + 1 for mode in range(count)]
    return matrix.transpose(*range(lead), *axes).reshape(matrix.shape[:lead] + (-1,) + view.modes)


def as_matrix(view: View, tensor: Array) -> Array:
    """The inverse of `as_tensor`."""
    lead = len(view.source.stack)
    front = tensor.shape[:lead]
    if prod(view.cuts) > 1:
        outer, count = lead + view.stacked, len(view.modes)
        tensor = tensor.reshape(tensor.shape[:outer] + view.cuts + view.modes)
        pairs = chain(*((outer + mode, outer + count + mode) for mode in range(count)))
        tensor = tensor.transpose(*range(outer), *pairs)
        tensor = tensor.reshape(tensor.shape[:outer] + tuple(cut * size for cut, size, _ in _modes(view)))
        tensor = tensor[(slice(None),) * outer + tuple(slice(old) for _, _, old in _modes(view))]
    back = [view.order.index(axis) for axis in range(len(view.order))]
    tensor = tensor.reshape(front + view._ordered).transpose(*range(lead), *(lead + axis for axis in back))
    return tensor.reshape(front + view.source.shape)


def _modes(view: View) -> list[tuple[int, int, int]]:
    """Of each mode: the number of blocks, their size, and the size of the whole."""
    return list(zip(view.cuts, view.modes, view.sizes[view.stacked :], strict=True))


def sources(layers: Layers | None, tree: Tree, *, whole: Callable[[Layer], bool] | None = None) -> tuple[Layer, ...]:
    """The parameter arrays of a model, each as a layer by itself.

    Args:
        layers: the layers of the model; without them every leaf of the tree is an array of no known layer.
        tree: the parameters, or a tree like them.
        whole: which layers stay together, kernel and bias in one matrix; None for none.

    Returns:
        Layers that have one parameter array, named by its address, or are whole. An array of a layer, or of a norm, has
        the copies of that as its stack. The geometry of a bias, or of one of several side by side, is its `Place`.
    """
    if layers is None:
        return tuple(parameter(address, leaf.shape, dtype_of(leaf)) for address, leaf in flatten(tree).items())
    return tuple(chain(*(_parts(layer, whole is not None and whole(layer)) for layer in layers.blocks)))


class Place(NamedTuple):
    """Where an array stands that has no rows of its own: the layer, and the first of its columns in the matrix."""

    layer: Layer
    first: int


def _parts(layer: Layer, whole: bool) -> list[Layer]:
    if layer.kind == "norm":
        return [_copies(layer, leaf, layer.geometry or (), dict(layer.arrays).get(leaf.role)) for leaf in layer.leaves]
    if whole or not layer.is_known:
        return [layer]
    found, made_of = [], {part.address: (role, part) for role, each in layer.arrays for part in parts(each)}
    joined = {role: each for role, each in layer.arrays if isinstance(each, Joined)}
    for leaf in layer.leaves:
        role, part = made_of.get(leaf.address, (leaf.role, None))
        if role == "bias" or role in joined:
            sizes = leaf.shape if part is None else shape(part)
            one = _copies(layer, leaf, sizes[: layer.module_axes], part)
            place = _place(layer, role, leaf.address, joined[role]) if role in joined else Place(layer, 0)
            found.append(replace(one, shape=(prod(one.shape),) if role == "bias" else one.shape, geometry=place))
        else:
            sizes = (layer.shape[0] - layer.has_bias, layer.shape[1])
            kernel = tuple(pair for pair in layer.arrays if pair[0] == role)
            found.append(replace(layer, name=leaf.address, leaves=(leaf,), shape=sizes, arrays=kernel))
    return found


def _place(layer: Layer, role: str, address: str, arrangement: Joined) -> Place | None:
    """That of one of several arrays side by side in a dense layer; None where they share no rows, or it is another."""
    if layer.kind != "dense" or arrangement.axis != layer.module_axes + (role != "bias"):
        return None
    names = [part.address for part in arrangement.parts]
    before = arrangement.parts[: names.index(address)]
    return Place(layer, sum(shape(part)[arrangement.axis] for part in before))


def _copies(layer: Layer, leaf: Leaf, stack: tuple[int, ...], part: Arranged | None) -> Layer:
    """An array by itself, that of each copy of its layer; moved as its layer needs it."""
    sizes = leaf.shape if part is None else shape(part)
    alone = parameter(leaf.address, leaf.shape, layer.dtype)
    return replace(alone, shape=sizes[len(stack) :], stack=stack, arrays=() if part is None else (("value", part),))


def kind(kinds: Mapping[str, Kind]) -> Kind:
    """The kind of tensors, whose sources are of these kinds."""

    def to_matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
        source = layer.geometry.source
        return as_tensor(layer.geometry, kinds[source.kind].to_matrix(source, leaves))

    def from_matrix(layer: Layer, tensor: Array) -> dict[str, Array]:
        source = layer.geometry.source
        return kinds[source.kind].from_matrix(source, as_matrix(layer.geometry, tensor))

    return Kind(to_matrix, from_matrix)


def axes(source: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a source: those of a window over positions, and inputs and outputs, or one of them, or none.

    Args:
        source: from `sources`.

    Returns:
        Sizes of the window, empty but for convolutions and arrays of three axes or more; sizes of the others.
    """
    if window := source.window:
        return window, (source.shape[0] // prod(window), source.shape[1])
    return source.shape[:-2], source.shape[-2:]


def merged(sizes: Sequence[int], most: int | None) -> tuple[int, ...]:
    """Modes without those of one entry, neighbours joined while their product is at most a number.

    >>> merged((3, 3, 1, 64, 128), 1024)
    (576, 128)

    Args:
        sizes: of the modes.
        most: the largest product; None to join none.

    Returns:
        Sizes, of one mode at least.
    """
    found: list[int] = []
    for size in (size for size in sizes if size > 1):
        if most is not None and found and found[-1] * size <= most:
            found[-1] *= size
        else:
            found.append(size)
    return tuple(found) or (1,)


def in_modes(source: Layer, modes: Modes) -> tuple[int, ...]:
    """The split of a source into modes.

    Args:
        source: from `sources`.
        modes: "flatten_spatial", "matrix" or "all".

    Returns:
        Sizes; (1,) of a scalar.
    """
    window, others = axes(source)
    if modes == "matrix" and window:
        return (prod(window) * others[0], others[1])
    if modes == "flatten_spatial" and window:
        return (prod(window), *others)
    return (window + others) or (1,)
