"""What is known of a value while a program is followed: that it is a parameter, or the result of a product of one."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from natgrad_jax.algebra.arranged import (
    Arranged,
    Arrangement,
    Atom,
    Shape,
    flipped,
    joined,
    reshaped,
    shape,
    source,
    transposed,
)
from natgrad_jax.algebra.cuts import sliced
from natgrad_jax.program.products import Level, Path, Product


class Parameter(NamedTuple):
    """A parameter, arranged, as a value.

    Attributes:
        arrangement: with the stacked levels in front.
        levels: the scans that it has come into.
        axes: at which axes of the value those of the arrangement stand; along the others it is repeated. None if the
            value has its axes and no others.
        made: what it has been multiplied with, entry by entry, without examples; None for a number that was added.
    """

    arrangement: Arrangement
    levels: tuple[Level, ...] = ()
    axes: tuple[int, ...] | None = None
    made: tuple[Product | None, ...] = ()

    @property
    def hidden(self) -> int:
        """How many axes of the arrangement a value inside of its scans does not have."""
        return sum(level.stacked for level in self.levels)


class Result(NamedTuple):
    """The result of a product, arranged; nothing else has been made of it.

    Attributes:
        path: of the product.
        axes: its axes in the terms of the result as it came out, as that of an array "" of its shape.
    """

    path: Path
    arrangement: Arranged


class Scaled(NamedTuple):
    """What a scale has been multiplied with, arranged; nothing has been added.

    Attributes:
        path: of the product with the scale.
        like: the scale, as it stands in the value.
    """

    path: Path
    like: Parameter


Whole = Parameter | Result
Fact = Whole | Scaled


def result(path: Path, sizes: Shape) -> Result:
    """A product's result as it comes out."""
    return Result(path, source("", sizes))


_SAME = (
    "convert_element_type",
    "copy",
    "sharding_constraint",
    "optimization_barrier",
    "reduce_precision",
    "pvary",  # of a `shard_map`: the same on all replicas, from here on as each one's own
    "pcast",
)


def moved(fact: Fact, equation: Any) -> Fact | None:
    """A fact after an equation that moves entries and does nothing else; None if it is no such equation."""
    name, options = equation.primitive.name, equation.params
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if isinstance(fact, Scaled):
        like = moved(fact.like, equation)
        return fact._replace(like=like) if isinstance(like, Parameter) else None
    if name in _SAME:
        return fact if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating) else None
    if isinstance(fact, Parameter) and fact.axes is not None:
        return _moved_spread(fact, name, options, before, after)
    if name == "reshape" and options["dimensions"] is not None:  # transposed before
        return _reshaped(_transposed(fact, options["dimensions"]), after)
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(fact, after)
    if name == "transpose":
        return _transposed(fact, options["permutation"])
    if name == "rev":
        return _flipped(fact, options["dimensions"])
    if name == "broadcast_in_dim":
        if prod(before) == prod(after) and list(options["broadcast_dimensions"]) == sorted(
            options["broadcast_dimensions"]
        ):
            return _reshaped(fact, after)
        if isinstance(fact, Parameter):
            return _spread(fact, options["broadcast_dimensions"], before, after)
    return None


def pieces(fact: Parameter, equation: Any) -> list[Parameter | None] | None:
    """What an equation leaves of a parameter that it cuts, for each of its results; None if it cuts none.

    A piece is None where the place of its entries in the whole cannot be said.
    """
    name, options, sizes = equation.primitive.name, equation.params, equation.invars[0].aval.shape
    starts = [0] * len(sizes)
    if name == "slice" and all(step == 1 for step in options["strides"] or ()):
        return [_piece(fact, options["start_indices"], equation.outvars[0].aval.shape)]
    if name == "dynamic_slice" and all(isinstance(v, Literal) for v in equation.invars[1:]):
        wanted = options["slice_sizes"]
        given = [int(v.val) for v in equation.invars[1:]]
        starts = [min(max(start, 0), size - want) for start, size, want in zip(given, sizes, wanted, strict=True)]
        return [_piece(fact, starts, wanted)]
    if name != "split":
        return None
    found: list[Parameter | None] = []
    for v in equation.outvars:
        found.append(_piece(fact, starts, v.aval.shape))
        starts[options["axis"]] += v.aval.shape[options["axis"]]
    return found


def _piece(fact: Parameter, starts: Sequence[int], sizes: Sequence[int]) -> Parameter | None:
    whole: Arranged | None = fact.arrangement if fact.axes is None and isinstance(fact.arrangement, Arranged) else None
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        whole = whole and sliced(whole, fact.hidden + axis, int(start), int(size))
    return None if whole is None else fact._replace(arrangement=whole)


def side_by_side(facts: Sequence[Fact | None], axis: int) -> Parameter | None:
    """Parameters joined along an axis; None where something else is among them."""
    found = [fact for fact in facts if isinstance(fact, Parameter) and fact.axes is None and not fact.made]
    if len(found) < len(facts) or len({fact.levels for fact in found}) > 1:
        return None
    whole = joined([fact.arrangement for fact in found], found[0].hidden + axis)
    return None if whole is None else Parameter(whole, found[0].levels)


def bias_of(fact: Parameter, value: Result, sizes: Shape, output: Shape, columns: Sequence[int]) -> Arrangement | None:
    """The parameter that is added to the result of a product, if it is the same at all positions and has all columns.

    Args:
        fact: what is added.
        value: what it is added to.
        sizes: the shape of both.
        output: shape of the result as it came out.
        columns: those axes of it that the parameter of the product has.

    Returns:
        [stacked levels, one axis for each column axis of more than one entry], or None.
    """
    strides = [prod(output[axis + 1 :]) for axis in range(len(output))]
    spans = [(strides[axis], strides[axis] * output[axis]) for axis in columns if output[axis] > 1]
    given = shape(fact.arrangement)[fact.hidden :]
    axes = range(len(given)) if fact.axes is None else fact.axes
    there = {axis: place for place, axis in enumerate(axes) if given[place] > 1}
    pieces: list[tuple[int, tuple[Atom, ...]]] = []
    for axis, atoms in enumerate(value.arrangement.axes):
        if sizes[axis] == 1:
            continue
        inside = [any(lo <= atom.stride < hi and atom.stride * atom.size <= hi for lo, hi in spans) for atom in atoms]
        if axis not in there:
            if any(inside) or not all(_outside(atom, spans) for atom in atoms):
                return None
        elif all(inside) and not any(atom.reverse for atom in atoms):
            pieces.append((there[axis], atoms))
        else:
            return None
    if prod(atom.size for _, atoms in pieces for atom in atoms) != prod(output[axis] for axis in columns):
        return None
    return _in_order(fact, pieces)


def _outside(atom: Atom, spans: Sequence[tuple[int, int]]) -> bool:
    return all(atom.stride * atom.size <= lo or atom.stride >= hi for lo, hi in spans)


def _in_order(fact: Parameter, pieces: Sequence[tuple[int, tuple[Atom, ...]]]) -> Arrangement | None:
    """The axes of a bias in the order of the result, cut where the result's are."""
    hidden, whole = fact.hidden, fact.arrangement
    order = [*range(hidden), *(hidden + place for place, _ in pieces)]
    dropped = [axis for axis in range(len(shape(whole))) if axis not in order]
    whole = transposed(whole, order + dropped)
    cut = [atom for _, atoms in pieces for atom in atoms]
    whole = reshaped(whole, (*shape(whole)[:hidden], *(atom.size for atom in cut)))
    if whole is None:
        return None
    ranks = sorted(range(len(cut)), key=lambda place: -cut[place].stride)
    return transposed(whole, [*range(hidden), *(hidden + place for place in ranks)])


def _with(fact: Whole, arrangement: Arrangement | None) -> Whole | None:
    if isinstance(fact, Result):
        return fact._replace(arrangement=arrangement) if isinstance(arrangement, Arranged) else None
    return None if arrangement is None else fact._replace(arrangement=arrangement)


def _hidden(fact: Whole) -> tuple[int, Shape]:
    hidden = fact.hidden if isinstance(fact, Parameter) else 0
    return hidden, shape(fact.arrangement)[:hidden]


def _reshaped(fact: Whole | None, sizes: Shape) -> Whole | None:
    return fact and _with(fact, reshaped(fact.arrangement, (*_hidden(fact)[1], *sizes)))


def _transposed(fact: Whole, order: Sequence[int]) -> Whole | None:
    hidden = _hidden(fact)[0]
    return _with(fact, transposed(fact.arrangement, [*range(hidden), *(hidden + axis for axis in order)]))


def _flipped(fact: Whole, axes: Sequence[int]) -> Whole | None:
    if not isinstance(fact.arrangement, Arranged):
        return None
    hidden = _hidden(fact)[0]
    return _with(fact, flipped(fact.arrangement, [hidden + axis for axis in axes]))


def _spread(fact: Parameter, dimensions: Sequence[int], before: Shape, after: Shape) -> Parameter | None:
    """A parameter repeated along new axes, and along its own of one entry."""
    kept = [axis for axis, size in enumerate(before) if size == after[dimensions[axis]]]
    whole = reshaped(fact.arrangement, (*_hidden(fact)[1], *(before[axis] for axis in kept)))
    axes = tuple(dimensions[axis] for axis in kept)
    return None if whole is None else fact._replace(arrangement=whole, axes=axes)


def _moved_spread(fact: Parameter, name: str, options: dict, before: Shape, after: Shape) -> Parameter | None:
    """A repeated parameter after a transposition, or after a reshape that adds or takes axes of one entry."""
    assert fact.axes is not None, "repeated"
    if name == "transpose":
        places = {axis: place for place, axis in enumerate(options["permutation"])}
        return fact._replace(axes=tuple(places[axis] for axis in fact.axes))
    if name == "broadcast_in_dim":
        wide = options["broadcast_dimensions"]
        if any(before[axis] != after[wide[axis]] for axis in fact.axes):
            return None
        return fact._replace(axes=tuple(wide[axis] for axis in fact.axes))
    if name in ("reshape", "squeeze", "expand_dims"):
        old = [axis for axis, size in enumerate(before) if size > 1]
        new = [axis for axis, size in enumerate(after) if size > 1]
        if [before[axis] for axis in old] == [after[axis] for axis in new] and all(axis in old for axis in fact.axes):
            return fact._replace(axes=tuple(new[old.index(axis)] for axis in fact.axes))
    return None
