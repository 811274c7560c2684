"""Arrays whose entries are those of others, each once: moved, cut into other axes, reversed, put side by side.

A parameter reaches its product after transpositions and reshapes; four kernels may be joined to one. What has been done
is kept as numbers: every axis of what comes out is a list of atoms, and an atom (size, stride) is an axis of the flat
source. Two ways to the same arrangement are one value, so that arrangements can be compared, hashed and pickled.

    source (2, 6), reshaped to (2, 3, 2), transposed to (3, 2, 2): axes ((3, 2),), ((2, 6),), ((2, 1),)
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from natgrad_jax.base import Array

Shape = tuple[int, ...]


class Atom(NamedTuple):
    """An axis of the flat source: how many entries, how far apart, and whether they are read from the last on."""

    size: int
    stride: int
    reverse: bool = False


class Cut(NamedTuple):
    """Where an axis of the flat source has been cut: which of its entries are there.

    Attributes:
        start: the first of them.
        size: how many; 1 also where the axis has gone, as one entry of it was taken.
        stride: how far apart they are in the source.
        whole: how many the axis has.
    """

    start: int
    size: int
    stride: int
    whole: int


class Arranged(NamedTuple):
    """One array, arranged: where it stands in the tree, of which atoms each axis is made, and where it has been cut."""

    address: str
    axes: tuple[tuple[Atom, ...], ...]
    cuts: tuple[Cut, ...] = ()


class Joined(NamedTuple):
    """Arranged arrays side by side along an axis."""

    parts: tuple[Arranged, ...]
    axis: int


Arrangement = Arranged | Joined


def source(address: str, shape: Sequence[int]) -> Arranged:
    """An array as it is."""
    strides = np.cumprod([1, *shape[:0:-1]])[::-1].tolist() if len(shape) else []
    return Arranged(
        address, tuple(merged_atoms(Atom(size, stride)) for size, stride in zip(shape, strides, strict=True))
    )


def addresses(arrangement: Arrangement) -> tuple[str, ...]:
    """Of the arrays that are in it, in order."""
    return tuple(part.address for part in parts(arrangement))


def parts(arrangement: Arrangement) -> tuple[Arranged, ...]:
    """The arrays that are in it, in order."""
    return arrangement.parts if isinstance(arrangement, Joined) else (arrangement,)


def shape(arrangement: Arrangement) -> Shape:
    """Of what comes out."""
    if isinstance(arrangement, Joined):
        sizes = [shape(part) for part in arrangement.parts]
        total = sum(size[arrangement.axis] for size in sizes)
        return (*sizes[0][: arrangement.axis], total, *sizes[0][arrangement.axis + 1 :])
    return tuple(prod(atom.size for atom in axis) for axis in arrangement.axes)


def transposed(arrangement: Arrangement, order: Sequence[int]) -> Arrangement:
    """With its axes in another order."""
    if isinstance(arrangement, Joined):
        moved = tuple(part._replace(axes=_taken(part.axes, order)) for part in arrangement.parts)
        return Joined(moved, list(order).index(arrangement.axis))
    return arrangement._replace(axes=_taken(arrangement.axes, order))


def flipped(arrangement: Arranged, axes: Sequence[int]) -> Arranged | None:
    """With some axes read from the last entry on; None where an axis is of several atoms."""
    if any(len(arrangement.axes[axis]) > 1 for axis in axes):
        return None
    turned = [
        tuple(atom._replace(reverse=not atom.reverse) for atom in axis) if index in axes else axis
        for index, axis in enumerate(arrangement.axes)
    ]
    return arrangement._replace(axes=tuple(turned))


def joined(arrangements: Sequence[Arrangement], axis: int) -> Joined | None:
    """Side by side along an axis; None where they are joined along two, or an array comes twice."""
    found: list[Arranged] = []
    for arrangement in arrangements:
        if isinstance(arrangement, Joined) and arrangement.axis != axis:
            return None
        found.extend(parts(arrangement))
    if len({part.address for part in found}) < len(found):
        return None
    return Joined(tuple(found), axis)


def reshaped(arrangement: Arrangement, sizes: Sequence[int]) -> Arrangement | None:
    """In another shape; None where that cannot be said in atoms.

    >>> wide = transposed(source("w", (2, 6)), (1, 0))
    >>> [[(atom.size, atom.stride) for atom in axis] for axis in reshaped(wide, (3, 4)).axes]
    [[(3, 2)], [(2, 1), (2, 6)]]
    """
    if isinstance(arrangement, Joined):
        return _reshaped_jointly(arrangement, tuple(sizes))
    atoms = [atom for axis in arrangement.axes for atom in axis]
    axes = _regrouped(atoms, sizes)
    return None if axes is None else arrangement._replace(axes=axes)


def _regrouped(atoms: Sequence[Atom], sizes: Sequence[int]) -> tuple[tuple[Atom, ...], ...] | None:
    """A row of atoms, cut into axes of these sizes; None where an axis would begin within an atom's entries."""
    if 0 in sizes:
        return None
    rest, axes = list(atoms), []
    for size in sizes:
        axis, missing = [], size
        while missing > 1:
            atom = rest.pop(0)
            if atom.size > missing and atom.size % missing == 0:
                inner = atom.size // missing
                rest.insert(0, Atom(inner, atom.stride, atom.reverse))
                atom = Atom(missing, atom.stride * inner, atom.reverse)
            if missing % atom.size:
                return None
            axis.append(atom)
            missing //= atom.size
        axes.append(merged_atoms(*axis))
    return tuple(axes)


def _reshaped_jointly(arrangement: Joined, sizes: Shape) -> Joined | None:
    """Only where the axis along which they are joined stays as it is."""
    old, axis = shape(arrangement), arrangement.axis
    places = [i for i, size in enumerate(sizes) if size == old[axis] and prod(sizes[:i]) == prod(old[:axis])]
    if not places:
        return None
    new = places[0]
    found: list[Arranged] = []
    for part in arrangement.parts:
        moved = reshaped(part, (*sizes[:new], shape(part)[axis], *sizes[new + 1 :]))
        if not isinstance(moved, Arranged):
            return None
        found.append(moved)
    return Joined(tuple(found), new)


def build(arrangement: Arrangement, arrays: Mapping[str, Array]) -> Array:
    """What comes out.

    Args:
        arrangement: of whole arrays.
        arrays: by address.

    Returns:
        The arranged array.
    """
    if isinstance(arrangement, Joined):
        return jnp.concatenate([build(part, arrays) for part in arrangement.parts], axis=arrangement.axis)
    array, (flat, order) = arrays[arrangement.address], _order(arrangement)
    atoms = array.reshape([flat[index].size for index in order])
    turned = [place for place, index in enumerate(order) if flat[index].reverse]
    atoms = jnp.flip(atoms, turned) if turned else atoms
    return atoms.transpose(np.argsort(order)).reshape(shape(arrangement))


def take_apart(arrangement: Arrangement, array: Array, shapes: Mapping[str, Shape]) -> dict[str, Array]:
    """The inverse of `build`.

    Args:
        arrangement: of whole arrays.
        array: what came out.
        shapes: of the arrays, by address.

    Returns:
        The arrays by address.
    """
    if isinstance(arrangement, Joined):
        cuts = list(accumulate(shape(part)[arrangement.axis] for part in arrangement.parts))[:-1]
        pieces = jnp.split(array, cuts, axis=arrangement.axis)
        found = zip(arrangement.parts, pieces, strict=True)
        return {part.address: take_apart(part, piece, shapes)[part.address] for part, piece in found}
    flat, order = _order(arrangement)
    atoms = array.reshape([atom.size for atom in flat]).transpose(order)
    turned = [place for place, index in enumerate(order) if flat[index].reverse]
    atoms = jnp.flip(atoms, turned) if turned else atoms
    return {arrangement.address: atoms.reshape(shapes[arrangement.address])}


def is_as_it_is(arrangement: Arrangement, shape: Shape) -> bool:
    """Whether it is one array of this shape, nothing moved."""
    return arrangement == source(addresses(arrangement)[0], shape)


def _taken(axes: tuple[tuple[Atom, ...], ...], order: Sequence[int]) -> tuple[tuple[Atom, ...], ...]:
    return tuple(axes[index] for index in order)


def _order(arrangement: Arranged) -> tuple[list[Atom], list[int]]:
    """Its atoms as they come out, and their places in the order of the source."""
    flat = [atom for axis in arrangement.axes for atom in axis]
    return flat, sorted(range(len(flat)), key=lambda index: -flat[index].stride)


def merged_atoms(*atoms: Atom) -> tuple[Atom, ...]:
    """Neighbours that follow one another in the source as one; those of one entry gone."""
    found: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        last = found[-1] if found else None
        if last and not (last.reverse or atom.reverse) and last.stride == atom.stride * atom.size:
            found[-1] = Atom(last.size * atom.size, atom.stride)
        else:
            found.append(atom)
    return tuple(found)
