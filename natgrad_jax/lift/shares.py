"""The devices of a mesh share a refresh: each does some of the layers, and all get what it found.

    1  copies <- the layers, each copy of a stack by itself
    2  shares <- the dearest copy first, each to the device that has the least to do          by n^3 of its matrices
    3  found <- every device refreshes its share, those of one signature as one stack         no collective
    4  results <- one all-gather of what all found, as one vector for each dtype

Where the state is cut by layer, one whose stack the devices divide, as that of a scan, needs neither 2 nor 4: each
device does its part of the stack, and has it afterwards. Nothing is sent.

Devices whose shares are alike run one program; the others choose theirs by their place in the mesh.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from natgrad_jax.algebra.devices import Devices
from natgrad_jax.base import Array, Layer
from natgrad_jax.lift.grouping import alike, cost, joined, map_layers

Function = Callable[[Layer, Any, Any], Any]
"""A refresh of a layer: layer, statistics, operator -> anything whose arrays lead with the axes S."""


class Copy(NamedTuple):
    """One copy of a layer: its name, and its place along the first axis of the stack; None of a layer without."""

    name: str
    place: int | None


class Group(NamedTuple):
    """Copies of one signature: one of them as a layer, what its refresh takes, and all."""

    layer: Layer
    cost: int
    copies: tuple[Copy, ...]


class Shares(NamedTuple):
    """Who refreshes what.

    Attributes:
        cut: the layers of which every device does an equal part of the stack.
        groups: the copies of the others.
        chosen: of each device and each group the places of its copies among those of the group.
        loads: of each device the cubes of the sides of its matrices, summed; those of the stacks included.
    """

    cut: tuple[Layer, ...]
    groups: tuple[Group, ...]
    chosen: tuple[tuple[tuple[int, ...], ...], ...]
    loads: tuple[int, ...]


def shares(layers: Sequence[Layer], pairs: Mapping[str, tuple[Any, Any]], devices: int, cut: bool = False) -> Shares:
    """Lines 1 and 2.

    Args:
        layers: with the same method.
        pairs: {name: statistics, operator}; shapes suffice.
        devices: how many share them.
        cut: whether each has its part of the stacks that they divide.

    Returns:
        The shares.
    """
    apart = tuple(layer for layer in layers if cut and layer.stack and layer.stack[0] % devices == 0)
    found: dict[Any, Group] = {}
    for layer in layers:
        if layer in apart:
            continue
        one = replace(layer, stack=layer.stack[1:])
        places: Sequence[int | None] = range(layer.stack[0]) if layer.stack else (None,)
        shapes = jax.eval_shape(lambda pair, place=places[0]: _copy(pair, place), pairs[layer.name])
        group = found.setdefault(alike(one, *shapes), Group(one, cost(one, shapes), ()))
        more = tuple(Copy(layer.name, place) for place in places)
        found[alike(one, *shapes)] = group._replace(copies=group.copies + more)
    groups = tuple(found.values())
    own = sum(cost(layer, pairs[layer.name]) // devices for layer in apart)
    loads, chosen = [own] * devices, [[[] for _ in groups] for _ in range(devices)]
    for number in sorted(range(len(groups)), key=lambda number: -groups[number].cost):  # 2
        for place in range(len(groups[number].copies)):
            least = loads.index(min(loads))
            loads[least] += groups[number].cost
            chosen[least][number].append(place)
    return Shares(apart, groups, tuple(tuple(map(tuple, each)) for each in chosen), tuple(loads))


def map_shared(
    function: Function,
    layers: Sequence[Layer],
    statistics: Mapping[str, Any],
    operators: Mapping[str, Any],
    by: Devices,
) -> dict[str, Any]:
    """As `grouping.map_layers`, by several devices.

    Args:
        function: it sees some copies of a layer at a time, in any order.
        layers: the layers.
        statistics: {name: statistics}.
        operators: {name: operator}.
        by: the devices.

    Returns:
        {name: what the function gives}, in the order of `layers`.
    """
    pairs = {layer.name: (statistics[layer.name], operators[layer.name]) for layer in layers}
    found = shares(layers, pairs, by.count, by.cut)
    parts = [replace(layer, stack=(layer.stack[0] // by.count, *layer.stack[1:])) for layer in found.cut]
    cut = {layer.name for layer in parts}

    def on_one_device(apart, everywhere):
        inputs = ({name: pair[part] for name, pair in apart.items()} for part in (0, 1))
        return map_layers(function, parts, *inputs), _gathered(function, found, everywhere, by.axes)

    apart, everywhere = PartitionSpec(by.axes), PartitionSpec()
    run = by.each(on_one_device, (apart, everywhere), (apart, everywhere))
    results = run(*({n: pair for n, pair in pairs.items() if (n in cut) is there} for there in (True, False)))
    merged = results[0] | results[1]
    return {layer.name: merged[layer.name] for layer in layers}


class _Leaf(NamedTuple):
    """An array that a function gives: its shape and dtype; which of the given arrays it is, None if it is new."""

    shape: tuple[int, ...]
    dtype: Any
    given: int | None


def _gathered(
    function: Function, found: Shares, pairs: Mapping[str, tuple[Any, Any]], axes: tuple[str, ...]
) -> dict[str, Any]:
    """Lines 3 and 4, on one device."""
    if not found.groups:
        return {}
    of_groups = [[_copy(pairs[copy.name], copy.place) for copy in group.copies] for group in found.groups]
    stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies) for copies in of_groups]
    told = [_told(function, group.layer, copies[0]) for group, copies in zip(found.groups, of_groups, strict=True)]
    counts = [tuple(map(len, each)) for each in found.chosen]
    programs = sorted(set(counts))
    lengths = {dtype: max(_length(told, each, dtype) for each in programs) for dtype in _dtypes(told)}
    widest = [max(each[number] for each in counts) for number in range(len(found.groups))]
    tables = [
        jnp.array([[*each[number], *[0] * (width - len(each[number]))] for each in found.chosen], jnp.int32)
        for number, width in enumerate(widest)
    ]

    def of(counts):
        def run(stacks, places):
            news = []
            for group, stack, place, count in zip(found.groups, stacks, places, counts, strict=True):
                if count:
                    mine = jax.tree.map(lambda leaf, at=place[:count]: leaf[at], stack)
                    news.append(jax.tree.leaves(function(joined([group.layer] * count), *mine)))
                else:
                    news.append([])
            return {dtype: _vector(told, news, dtype, length) for dtype, length in lengths.items()}

        return run

    here = jax.lax.axis_index(axes)
    which = jnp.array([programs.index(each) for each in counts])[here]
    vectors = jax.lax.switch(which, [of(each) for each in programs], stacks, [table[here] for table in tables])  # 3
    everything = {dtype: jax.lax.all_gather(vector, axes) for dtype, vector in vectors.items()}  # 4
    return _unpacked(found, of_groups, told, everything)


def _told(function: Function, layer: Layer, pair: tuple[Any, Any]) -> tuple[list[_Leaf], Any]:
    """What the function gives of one copy: its arrays, and their tree."""
    origins: list[int | None] = []

    def traced(pair):
        given = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(pair))}
        new = function(layer, *pair)
        origins[:] = [given.get(id(leaf)) for leaf in jax.tree.leaves(new)]
        return new

    leaves, tree = jax.tree.flatten(jax.eval_shape(traced, pair))
    return [_Leaf(leaf.shape, leaf.dtype, given) for leaf, given in zip(leaves, origins, strict=True)], tree


def _dtypes(told: Sequence[tuple[list[_Leaf], Any]]) -> list[Any]:
    return sorted({leaf.dtype for leaves, _ in told for leaf in leaves if leaf.given is None}, key=str)


def _length(told: Sequence[tuple[list[_Leaf], Any]], counts: Sequence[int], dtype: Any) -> int:
    """How many new numbers of a dtype a device finds that has so many copies of each group."""
    new = [sum(prod(leaf.shape) for leaf in leaves if leaf.given is None and leaf.dtype == dtype) for leaves, _ in told]
    return sum(count * size for count, size in zip(counts, new, strict=True))


def _vector(told: Sequence[tuple[list[_Leaf], Any]], news: Sequence[list[Array]], dtype: Any, length: int) -> Array:
    """What a device found, of one dtype: group by group, array by array, copy by copy; zeros behind."""
    parts = [
        jnp.ravel(array)
        for (leaves, _), arrays in zip(told, news, strict=True)
        for leaf, array in zip(leaves, arrays, strict=False)  # none of a group of which there is no copy here
        if leaf.given is None and leaf.dtype == dtype
    ]
    found = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)
    return jnp.pad(found, (0, length - found.size))


def _unpacked(
    found: Shares,
    of_groups: Sequence[Sequence[tuple[Any, Any]]],
    told: Sequence[tuple[list[_Leaf], Any]],
    everything: Mapping[Any, Array],
) -> dict[str, Any]:
    """{name: result} from what every device found [devices, length] of each dtype."""
    copies: dict[Copy, Any] = {}
    for device, chosen in enumerate(found.chosen):
        offsets = dict.fromkeys(everything, 0)
        for group, pairs, (leaves, tree), places in zip(found.groups, of_groups, told, chosen, strict=True):
            arrays = []
            for leaf in leaves:
                if leaf.given is not None:
                    arrays.append([jax.tree.leaves(pairs[place])[leaf.given] for place in places])
                    continue
                start, size = offsets[leaf.dtype], prod(leaf.shape)
                offsets[leaf.dtype] = end = start + len(places) * size
                arrays.append(list(everything[leaf.dtype][device, start:end].reshape(len(places), *leaf.shape)))
            for number, place in enumerate(places):
                copies[group.copies[place]] = tree.unflatten([array[number] for array in arrays])
    results: dict[str, list[Any]] = {}
    for group in found.groups:
        for copy in group.copies:
            results.setdefault(copy.name, []).append(copies[copy])
    stacked = {copy.name for copy in copies if copy.place is not None}
    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if name in stacked else each[0]
        for name, each in results.items()
    }


def _copy(pair: Any, place: int | None) -> Any:
    """The arrays of one copy."""
    return pair if place is None else jax.tree.map(lambda leaf: leaf[place], pair)
