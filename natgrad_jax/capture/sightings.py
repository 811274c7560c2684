"""What a model shows when it is traced: calls of modules of known kinds, and which parameters they cover.

A sighting is the static part of a call. A known layer is one or more sightings whose main array is a parameter, used as
it is, on inputs that have an example axis; everything else is a parameter of its own, with the reason noted. Nothing
here knows a framework: how modules are met is told by `linen`, what they are by the kinds of `layers`.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from natgrad_jax import addresses
from natgrad_jax.base import Layer, Layers, Leaf, Use
from natgrad_jax.layers import KINDS
from natgrad_jax.layers.parameter import dtype_of, parameter

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Sighting(NamedTuple):
    """What one call of a module shows: static facts only.

    Attributes:
        kind: key into `layers.KINDS`.
        type_name: class of the module.
        geometry: what the kind makes of the call.
        obstacle: why it can make nothing of it; empty if it can.
        main: shape of the main array, as the module has it.
        inputs: shape of what is recorded of the input, as the module has it.
        transposed: whether the call uses the array the other way round.
    """

    kind: str
    type_name: str
    geometry: Any
    obstacle: str
    main: Shape
    inputs: Shape
    transposed: bool = False


Sightings = dict[Path, dict[str, Sighting]]
"""{path of the module: {name of the call: sighting}}, in the order of the calls."""


def sight(kind: str, module: Any, main: Shape, inputs: Any, transposed: bool = False) -> Sighting:
    """The static facts of a call.

    Args:
        kind: key into `layers.KINDS`.
        module: whose options are read.
        main: shape of the main array.
        inputs: its input, or the shape and dtype of it.
        transposed: whether the call uses the array the other way round.

    Returns:
        The sighting.
    """
    found = None if transposed else KINDS[kind].recognise(module, tuple(inputs.shape))
    geometry, obstacle = (None, found) if isinstance(found, str) else (found, "")
    return Sighting(kind, type(module).__name__, geometry, obstacle, tuple(main), (), transposed)


def name_of(path: Path, calls: Mapping[str, Sighting]) -> str:
    """The name of a layer: its address in the parameters; of a model that is itself a layer, its type."""
    return "/".join(path) or next(iter(calls.values())).type_name


def is_excluded(name: str, exclude: tuple[str, ...]) -> bool:
    """Whether the name of a layer, or that of a parent, is among those to treat as unknown."""
    return any(name == entry or name.startswith(entry + "/") for entry in exclude)


def classify(
    params: Any,
    sightings: Sightings,
    recorded: Mapping[Path, Mapping[str, Any]],
    outputs: Mapping[Path, Mapping[str, Any]],
    examples: int,
    exclude: tuple[str, ...],
) -> Layers:
    """Every parameter of a model, as part of a known layer or as a block of its own.

    Args:
        params: the parameters.
        sightings: of all calls of modules of known kinds.
        recorded: what is kept of the input of each call that a record reached, shapes suffice.
        outputs: the output of each of these calls, shapes suffice.
        examples: N.
        exclude: names of layers or parents to treat as unknown.

    Returns:
        The layers and the remaining parameters.

    Raises:
        ValueError: if a name in `exclude` excludes nothing.
    """
    leaves = addresses.flatten(params)
    known, notes, taken = [], {}, set()
    for path, calls in sightings.items():
        name, kind = name_of(path, calls), KINDS[next(iter(calls.values())).kind]
        prefix = "".join(f"{part}/" for part in path)
        roles = {role: address for role in kind.roles if (address := _leaf(leaves, prefix + role))}
        main = leaves.get(roles.get(kind.roles[0], ""))
        if is_excluded(name, exclude):
            note = "excluded"
        else:
            note = _obstacle(calls, main, recorded.get(path, {}), examples)
        if note:
            notes |= dict.fromkeys(roles.values(), note)
            continue
        known.append(_layer(name, calls, roles, leaves, outputs[path], examples))
        taken |= set(roles.values())
    _check_exclude(exclude, [name_of(*item) for item in sightings.items()], leaves)
    rest = tuple(
        parameter(address, leaf.shape, dtype_of(leaf), notes.get(address, ""))
        for address, leaf in leaves.items()
        if address not in taken
    )
    return Layers(tuple(known), rest)


def _obstacle(calls: Mapping[str, Sighting], main: Any, recorded: Mapping[str, Any], examples: int) -> str:
    """Why a layer that was seen, with this parameter as its main array, cannot be preconditioned; empty if it can."""
    first = next(iter(calls.values()))
    what = KINDS[first.kind].roles[0]
    for call in calls.values():
        if call.obstacle:
            return call.obstacle
        if call.transposed:
            return f"its {what} is used transposed as well (`attend`)"
    if main is None:
        return f"its {what} is no parameter"
    axes = len(main.shape) - len(first.main)
    if axes < 0 or main.shape[axes:] != first.main:
        return f"its {what} of shape {main.shape} is used with shape {first.main}"
    if not recorded:
        return "inside a transform (nn.scan, nn.vmap, WeightNorm) that does not carry ng.linen.COLLECTIONS"
    for name, x in recorded.items():
        call, kind = calls[name], KINDS[first.kind]
        stack = main.shape[:axes] + kind.outline(call.geometry, call.main).stack
        if len(x.shape) - len(call.inputs) != axes or x.shape[: len(stack)] != stack:
            return f"its inputs of shape {x.shape} and its {what} of shape {main.shape} are stacked differently"
        lead = len(stack)
        if len(x.shape) < lead + 1 + kind.floating or x.shape[lead] % examples or not x.shape[lead]:
            return f"its input of shape {x.shape} has no axis of the {examples} examples"
    return ""


def _layer(
    name: str,
    calls: Mapping[str, Sighting],
    roles: Mapping[str, str],
    leaves: Mapping[str, Any],
    outputs: Mapping[str, Any],
    examples: int,
) -> Layer:
    """The noun of a layer that was seen."""
    first = next(iter(calls.values()))
    kind = KINDS[first.kind]
    main = leaves[roles[kind.roles[0]]]
    outline = kind.outline(first.geometry, first.main)
    rows, columns = outline.shape
    arrays = main.shape[: len(main.shape) - len(first.main)] + outline.stack
    stack = arrays + ((outline.groups,) if outline.groups > 1 else ())
    uses = []
    for call, output in outputs.items():
        positions = prod(output.shape) // (prod(stack) * columns * examples)
        uses.append(Use(first.kind, calls[call].geometry, positions))
    return Layer(
        name=name,
        kind=first.kind,
        shape=(rows + ("bias" in roles), columns),
        leaves=tuple(Leaf(role, address, leaves[address].shape) for role, address in roles.items()),
        stack=stack,
        dtype=dtype_of(main),
        geometry=first.geometry,
        grouped=outline.groups > 1,
        window=outline.window,
        one_hot=kind.one_hot,
        uses=tuple(uses),
    )


def _leaf(leaves: Mapping[str, Any], address: str) -> str | None:
    """The address of a parameter array, also where a box of metadata stands around it."""
    return next((found for found in leaves if found == address or found.startswith(address + "/")), None)


def _check_exclude(exclude: tuple[str, ...], layers: list[str], leaves: Mapping[str, Any]) -> None:
    """Refuse a name that excludes nothing."""
    for entry in exclude:
        if not any(is_excluded(name, (entry,)) for name in [*layers, *leaves]):
            raise ValueError(f"`exclude` names {entry!r}, which the model does not have; it has {layers}.")
