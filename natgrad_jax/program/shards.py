"""Programs that every device runs on its own part of the inputs: the bodies of `jax.shard_map`.

    N examples over d devices     inside an axis of the examples has N / d entries, and (N / d) * inner of several
    a parameter                   is followed where each device has all of it
    a product                     has the shapes of all devices together; its arrays are cut where the examples are

In an axis of outer * N * inner entries the part of a device is no block of neighbours. So such an axis is two while it
goes in and out, [outer, N * inner], of which the second is cut.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from natgrad_jax.algebra.arranged import Shape, addresses
from natgrad_jax.algebra.trees import varying
from natgrad_jax.base import Array
from natgrad_jax.program.facts import Fact, Parameter
from natgrad_jax.program.liveness import body_of, live_inputs
from natgrad_jax.program.products import Entrywise, Path, Product, Split, Spread
from natgrad_jax.program.scenes import Scene, grown

WORD = "used inside a shard_map"


class Shard(NamedTuple):
    """One `shard_map` as it is followed.

    Attributes:
        split: over which axes of its mesh the examples are cut.
        devices: d, how many parts there are.
        manual: the axes that it takes.
        checked: whether JAX keeps count of what differs along these.
        depth: how many scans are around it.
    """

    split: Split
    devices: int
    manual: frozenset[str]
    checked: bool
    depth: int


class Inside(NamedTuple):
    """What is known of the inputs of a body.

    Attributes:
        facts: of each, what it is.
        orders: of each, (outer, inner).
        cut: the parameters of which a device has a part, each with the reason.
    """

    facts: list[Fact | None]
    orders: list[tuple[int, int] | None]
    cut: list[tuple[Parameter, str]]


def manual_axes(equation: Any) -> frozenset[str] | None:
    """The axes of the mesh that a `shard_map` takes; None where its equation does not say."""
    return equation.params.get("newly_manual_axes", equation.params.get("manual_axes"))


def entered(scene: Scene, path: Path, equation: Any, twin: Any, wanted: Sequence[bool]) -> Shard | str:
    """How a `shard_map` cuts the examples, or why its body is not followed.

    Args:
        scene: the program that it is in.
        path: of the equation.
        equation: the `shard_map`.
        twin: the same with twice as many examples.
        wanted: of each output, whether it is.

    Returns:
        The `shard_map` as it is followed, or a sentence.
    """
    options, manual = equation.params, manual_axes(equation)
    if manual is None or not {"mesh", "in_specs", "out_specs", "check_vma"} <= options.keys():
        return WORD
    cuts: set[tuple[str, ...]] = set()
    for v, other, spec, need in _inputs(equation, twin, wanted):
        axis = _axis(scene, v, other)
        if not need or axis is None:
            continue
        spread = scene.spread(v, other)
        cuts.add(axes_at(spec, axis))
        if axes_at(spec, axis) and (spread is None or spread.outer > 1):
            return f"{WORD}, over whose devices an axis is cut that holds more than the examples in their order"
    if len(cuts) > 1:
        return f"{WORD}, of whose inputs some have the examples cut over other devices than others"
    (axes,) = cuts or {()}
    sizes = options["mesh"].shape
    devices = prod(sizes[axis] for axis in axes)
    if scene.examples % devices:
        return f"{WORD}, which cuts an example over devices"
    others = sorted(axis for axis in manual if axis not in axes and sizes[axis] > 1)
    if others and not options["check_vma"]:
        return f"{WORD} with `check_vma=False`, so that nothing tells what differs along {others}"
    return Shard(Split(path, axes), devices, frozenset(manual), options["check_vma"], len(scene.turns))


def inside(scene: Scene, shard: Shard, equation: Any, twin: Any, wanted: Sequence[bool]) -> Inside:
    """What is known of the inputs of the body.

    Args:
        scene: the program that the `shard_map` is in.
        shard: as it is followed.
        equation: the `shard_map`.
        twin: the same with twice as many examples.
        wanted: of each output, whether it is.

    Returns:
        The facts and orders, and the parameters that are cut.
    """
    found = Inside([], [], [])
    for v, other, spec, need in _inputs(equation, twin, wanted):
        fact, axes = scene.fact(v), [name for axis in range(len(spec)) for name in axes_at(spec, axis)]
        if isinstance(fact, Parameter) and axes and need:
            found.cut.append((fact, f"cut over {', '.join(axes)} inside a shard_map, so that no device has all of it"))
        found.facts.append(fact if isinstance(fact, Parameter) and not axes else None)
        axis = _axis(scene, v, other)
        found.orders.append(scene.order(v) if axis is not None and axes_at(spec, axis) == shard.split.axes else None)
    return found


def orders_after(
    shard: Shard, equation: Any, twin: Any, orders: Sequence[tuple[int, int] | None]
) -> dict[Any, tuple[int, int]]:
    """(outer, inner) of the results, from those of the outputs of the body."""
    found = {}
    for place, (v, spec, order) in enumerate(zip(equation.outvars, equation.params["out_specs"], orders, strict=True)):
        axis = None if twin is None else grown(v.aval.shape, twin.outvars[place].aval.shape)
        if order is None or axis is None or axes_at(spec, axis) != shard.split.axes:
            continue
        if order[0] == 1 or shard.devices == 1:
            found[v] = order
    return found


def wholes(products: Mapping[Path, Product], shard: Shard) -> tuple[dict[Path, Product], dict[str, str]]:
    """The products of the body with the shapes of all devices together; {address: why one of its products is none}."""
    found: dict[Path, Product] = {}
    refused: dict[str, str] = {}
    for path, product in products.items():
        one = _whole(product, shard)
        if isinstance(one, Product):
            found[path] = one
        else:
            arrays = [product.kernel] if product.bias is None else [product.kernel, product.bias]
            refused |= {address: one for array in arrays for address in addresses(array)}
    return found, refused


def _whole(product: Product, shard: Shard) -> Product | str:
    options = product.options
    if product.examples is None or product.examples_out is None:
        return f"{WORD}, where its input of shape {product.other} has no axis of the examples of a device"
    if min(product.examples.axis, product.examples_out.axis) < shard.depth and shard.split.axes:
        return f"{WORD}, with the examples cut over devices and in the turns of a scan around it"
    if not _differs_along(product, shard, shard.split.axes):
        return f"{WORD}, where its input does not differ along {list(shard.split.axes)} alone"
    if isinstance(options, Entrywise):
        if not all(_differs_along(factor, shard, ()) for factor in options.factors):
            return f"{WORD}, with a factor that is not known to be the same on all devices"
        factors = tuple(factor._replace(splits=(*factor.splits, shard.split)) for factor in options.factors)
        options = options._replace(factors=factors)
    turns = [level.length for level in product.levels]
    lengths = _enlarged(turns, product.examples_out.axis, shard.devices)
    return product._replace(
        options=options,
        levels=tuple(level._replace(length=size) for level, size in zip(product.levels, lengths, strict=True)),
        other=_enlarged(product.other, product.examples.axis, shard.devices),
        output=_enlarged(product.output, product.examples_out.axis, shard.devices),
        splits=(*product.splits, shard.split),
    )


def _differs_along(product: Product, shard: Shard, axes: Sequence[str]) -> bool:
    """Whether what is recorded of a product differs along these axes of the `shard_map` and no others."""
    if product.primitive == "add" or product.reads is None:  # of a shift nothing is recorded
        return product.primitive == "add" or not axes
    if not shard.checked:
        return bool(axes) or shard.devices == 1
    return varying(product.reads[1].aval) & shard.manual == set(axes)


def _enlarged(sizes: Sequence[int], axis: int, times: int) -> Shape:
    return tuple(size * times if place == axis else size for place, size in enumerate(sizes))


def _inputs(equation: Any, twin: Any, wanted: Sequence[bool]) -> list[tuple[Any, Any, Any, bool]]:
    """(value, its twin, its specification, whether a wanted output depends on it) of each input."""
    others = [None] * len(equation.invars) if twin is None else twin.invars
    needed = live_inputs(body_of(equation), wanted)
    return list(zip(equation.invars, others, equation.params["in_specs"], needed, strict=True))


def _axis(scene: Scene, value: Any, twin: Any) -> int | None:
    """The axis of a value that has the examples, in whatever order; None where none has, or a scan around it."""
    if isinstance(value, Literal):
        return None
    if twin is not None:
        return grown(value.aval.shape, twin.aval.shape)
    spread = scene.spread(value, None)
    return None if spread is None or spread.axis < len(scene.turns) else spread.axis - len(scene.turns)


def axes_at(spec: Any, axis: int) -> tuple[str, ...]:
    """The axes of the mesh over which a specification cuts an axis."""
    entry = spec[axis] if axis < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


# Arrays going in and out ---


class Crossing(NamedTuple):
    """How an array of a product goes in or out of a `shard_map`.

    Attributes:
        axis: of the examples, without those of the scans around; None of an array that is not cut.
        outer: how many times the examples stand in that axis.
        spec: the specification of the array, that axis as two.
    """

    axis: int | None
    outer: int
    spec: PartitionSpec

    def opened(self, array: Array) -> Array:
        """The axis as two."""
        if self.axis is None:
            return array
        size = array.shape[self.axis] // self.outer
        return array.reshape(*array.shape[: self.axis], self.outer, size, *array.shape[self.axis + 1 :])

    def closed(self, array: Array) -> Array:
        """The two as one."""
        if self.axis is None:
            return array
        size = array.shape[self.axis] * array.shape[self.axis + 1]
        return array.reshape(*array.shape[: self.axis], size, *array.shape[self.axis + 2 :])


def crossing(product: Product, spread: Spread | None, path: Path, depth: int) -> Crossing:
    """How an array of a product goes in or out.

    Args:
        product: whose array it is.
        spread: where the examples are in it.
        path: of the `shard_map`.
        depth: how many scans are around that.

    Returns:
        The way; that of an array which all devices have alike where the examples are not cut.
    """
    axes = next((split.axes for split in product.splits if split.path == path), ())
    if spread is None or not axes:
        return Crossing(None, 1, PartitionSpec())
    axis = spread.axis - depth
    return Crossing(axis, spread.outer, PartitionSpec(*[None] * (axis + 1), axes))
