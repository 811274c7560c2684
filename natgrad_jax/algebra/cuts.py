"""Parts of arranged arrays: a slice of an axis, and where in the whole array it stands.

A kernel may hold several, side by side: those of queries, keys and values, or of the gates of a cell. What is used of
it is a BLOCK: along every axis some neighbouring entries. Of an axis of which a single entry is taken, as of layers
that are kept in one array, the whole has an axis in front.

    source (2, 6), of its axes (2,) and (6,) the entries 3, 4, 5 of the second: a block (2, 3) of (2, 6) from (0, 3) on
"""

from typing import NamedTuple

from natgrad_jax.algebra.arranged import Arranged, Atom, Cut, Shape, merged_atoms, shape


class Block(NamedTuple):
    """A part of an array.

    Attributes:
        starts: along each axis, the first entry.
        sizes: along each axis, how many.
    """

    starts: Shape
    sizes: Shape

    def turned(self) -> "Block":
        """The same of the transposed array."""
        return Block(*((*axes[:-2], axes[-1], axes[-2]) for axes in self))

    def is_apart(self, other: "Block", axes: int) -> bool:
        """Whether two have no entry in common along one of the first axes."""
        mine, theirs = (list(zip(*block, strict=True))[:axes] for block in (self, other))
        return any(
            start + size <= begin or begin + length <= start
            for (start, size), (begin, length) in zip(mine, theirs, strict=True)
        )


def sliced(arrangement: Arranged, axis: int, start: int, size: int) -> Arranged | None:
    """The entries of an axis from one on.

    Args:
        arrangement: of an array.
        axis: which axis of it.
        start: the first entry.
        size: how many.

    Returns:
        The arrangement of these; None where that cannot be said in atoms.
    """
    atoms, cuts = list(arrangement.axes[axis]), arrangement.cuts
    left: list[Atom] = []
    while atoms and (start, size) != (0, _length(atoms)):
        first = atoms.pop(0)
        inner = _length(atoms)
        last = start + size - 1
        if first.reverse or not (start // inner == last // inner or start % inner == size % inner == 0):
            return None
        begin, count = start // inner, last // inner - start // inner + 1
        found = _cut(cuts, first, begin, count)
        if found is None:
            return None
        left, cuts = ([*left, Atom(count, first.stride)] if count > 1 else left), found
        start, size = start - begin * inner, size - (count - 1) * inner
        if count > 1:
            break
    axes = (*arrangement.axes[:axis], merged_atoms(*left, *atoms), *arrangement.axes[axis + 1 :])
    return Arranged(arrangement.address, axes, cuts)


def whole(arrangement: Arranged) -> tuple[Arranged, Block] | None:
    """The whole array that a part is of, arranged alike.

    Args:
        arrangement: of a part of an array.

    Returns:
        The arrangement of all of it, the axes of which a single entry was taken in front; which block of that the part
        is. None where an axis would not be one of neighbouring entries.

    >>> from natgrad_jax.algebra.arranged import source
    >>> found, block = whole(sliced(source("w", (2, 6)), 1, 3, 3))
    >>> found == source("w", (2, 6)), block
    (True, Block(starts=(0, 3), sizes=(2, 3)))
    """
    axes, starts = list(arrangement.axes), [0] * len(arrangement.axes)
    front: list[Cut] = []
    for cut in arrangement.cuts:
        if cut.size == 1:
            front.append(cut)
            continue
        places = [place for place, atoms in enumerate(axes) if atoms and _ends(atoms[0], cut)]
        if len(places) != 1 or cut.whole * cut.stride % axes[places[0]][0].stride:
            return None
        (place,) = places
        first, *rest = axes[place]
        if cut.start * cut.stride % first.stride:
            return None
        starts[place] = cut.start * cut.stride // first.stride * _length(rest)
        axes[place] = (Atom(cut.whole * cut.stride // first.stride, first.stride), *rest)
    front.sort(key=lambda cut: -cut.stride)
    ahead = tuple((Atom(cut.whole, cut.stride),) for cut in front)
    merged = tuple(merged_atoms(*atoms) for atoms in axes)
    sizes = (*(1 for _ in front), *shape(arrangement))
    return Arranged(arrangement.address, ahead + merged), Block((*(cut.start for cut in front), *starts), sizes)


def _length(atoms: list[Atom] | tuple[Atom, ...]) -> int:
    return shape(Arranged("", (tuple(atoms),)))[0]


def _ends(atom: Atom, cut: Cut) -> bool:
    """Whether an atom is the outermost piece of what a cut has left: both end at the same place of the source."""
    return not atom.reverse and atom.size * atom.stride == cut.size * cut.stride


def _cut(cuts: tuple[Cut, ...], atom: Atom, start: int, size: int) -> tuple[Cut, ...] | None:
    """The cuts, with that of an atom; of one that is cut already, in the terms of the whole."""
    for place, cut in enumerate(cuts):
        if cut.size > 1 and _ends(atom, cut):
            if cut.start * cut.stride % atom.stride or cut.whole * cut.stride % atom.stride:
                return None
            begin, length = cut.start * cut.stride // atom.stride, cut.whole * cut.stride // atom.stride
            return (*cuts[:place], Cut(begin + start, size, atom.stride, length), *cuts[place + 1 :])
    return (*cuts, Cut(start, size, atom.stride, atom.size))
