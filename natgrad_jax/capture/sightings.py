"""What a linen model shows when it is traced: its calls of known modules, and which parameters they cover.

A sighting is the static part of a call. A known layer is a sighting whose kernel is a parameter, used as it is, on
inputs that have an example axis; everything else is a parameter of its own, with the reason noted.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from natgrad_jax import addresses
from natgrad_jax.base import Array, Layer, Layers, Leaf
from natgrad_jax.layers import ConvGeometry

Path = tuple[str, ...]
Calls = Mapping[Path, tuple[jax.ShapeDtypeStruct, ...]]


class Sighting(NamedTuple):
    """What the first call of a module shows: static facts only."""

    kind: str
    type_name: str
    geometry: ConvGeometry | None
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module; a subclass that computes something else has none."""
    for kind, known in (("dense", nn.Dense), ("conv", nn.Conv)):
        if isinstance(module, known) and type(module).__call__ is known.__call__:
            return kind
    return None


def name_of(path: Path, sighting: Sighting) -> str:
    """The name of a layer: its address in the parameters; of a model that is itself a layer, its type."""
    return "/".join(path) or sighting.type_name


def _excluded(name: str, exclude: tuple[str, ...]) -> bool:
    return any(name == entry or name.startswith(entry + "/") for entry in exclude)


def sight(sightings: dict[Path, Sighting], exclude: tuple[str, ...], path: Path, module: nn.Module, x: Array) -> bool:
    """Note the static facts of the first call of a module.

    Args:
        sightings: the notes, added to.
        exclude: names of layers or parents to treat as unknown.
        path: of the module.
        module: a module of a known kind.
        x: its input.

    Returns:
        Whether the layer is to be recorded: False if it is excluded.

    Raises:
        TypeError: if it is called with integers.
    """
    kind, type_name = kind_of(module), type(module).__name__
    assert kind is not None, "only known modules are sighted"
    kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
    sighting = Sighting(kind, type_name, None, kernel.shape, x.shape)
    name = name_of(path, sighting)
    excluded = _excluded(name, exclude)
    if not excluded and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Layer {name!r} ({type_name}) is called with {x.dtype} of shape "
            f"{x.shape}; expected floating-point inputs. Convert them with `x.astype(jnp.float32)`; for indices use "
            "nn.Embed."
        )
    if not excluded and isinstance(module, nn.Conv):
        sighting = sighting._replace(geometry=_geometry(name, module))
    sightings.setdefault(path, sighting)
    return not excluded


def _geometry(name: str, module: nn.Conv) -> ConvGeometry:
    """The options of a convolution, or an error that names the one that cannot be handled."""
    for option in ("mask", "conv_general_dilated", "conv_general_dilated_cls"):
        if getattr(module, option) is not None:
            raise ValueError(
                f"Layer {name!r} (Conv) has the option `{option}`, with which its gradient is no product of patches "
                f"and cotangents; expected None. Leave it to a diagonal block: `capture(..., exclude=[{name!r}])`."
            )
    window = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    rank = len(window)

    def each(value):
        return (value or 1,) * rank if value is None or isinstance(value, int) else tuple(value)

    padding = module.padding
    if isinstance(padding, str):
        if padding not in _PADDINGS:
            raise ValueError(
                f"Layer {name!r} (Conv) has padding={padding!r}, which is unknown; expected one of {_PADDINGS}, an int "
                f"or pairs of ints. Leave it to a diagonal block: `capture(..., exclude=[{name!r}])`."
            )
    else:
        sides = (padding,) * rank if isinstance(padding, int) else padding
        padding = tuple((side, side) if isinstance(side, int) else tuple(side) for side in sides)
    dilations = each(module.input_dilation), each(module.kernel_dilation)
    return ConvGeometry(window, each(module.strides), padding, *dilations, module.feature_group_count)


_PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


def classify(
    params: Any,
    sightings: Mapping[Path, Sighting],
    calls: Calls,
    examples: int,
    exclude: tuple[str, ...],
) -> Layers:
    """Every parameter of a model, as part of a known layer or as a block of its own.

    Args:
        params: the parameters.
        sightings: of all known modules that were called.
        calls: shapes of the recorded inputs of each call.
        examples: N.
        exclude: names of layers or parents to treat as unknown.

    Returns:
        The layers and the remaining parameters.
    """
    leaves = addresses.flatten(params)
    known, notes, taken = [], {}, set()
    for path, sighting in sightings.items():
        name = name_of(path, sighting)
        prefix = "".join(f"{part}/" for part in path)
        roles = {role: address for role in ("kernel", "bias") if (address := _leaf(leaves, prefix + role))}
        if _excluded(name, exclude):
            note = "excluded"
        else:
            note = _obstacle(sighting, leaves.get(roles.get("kernel", "")), calls.get(path, ()), examples)
        if note:
            notes |= dict.fromkeys(roles.values(), note)
            continue
        known.append(_layer(name, sighting, roles, leaves))
        taken |= set(roles.values())
    _check_exclude(exclude, [name_of(*item) for item in sightings.items()], leaves)
    rest = tuple(
        _parameter(address, leaf, notes.get(address, "")) for address, leaf in leaves.items() if address not in taken
    )
    return Layers(tuple(known), rest)


def _obstacle(sighting: Sighting, kernel: Any, calls: tuple[jax.ShapeDtypeStruct, ...], examples: int) -> str:
    """Why a layer that was seen, with this parameter as its kernel, cannot be preconditioned; empty if it can."""
    if kernel is None:
        return "its kernel is no parameter"
    shape = kernel.shape
    axes = len(shape) - len(sighting.kernel)
    if axes < 0 or shape[axes:] != sighting.kernel:
        return f"its kernel of shape {shape} is used with shape {sighting.kernel}"
    if not calls:
        return "inside a transform (nn.scan, nn.vmap, WeightNorm) that does not carry ng.linen.COLLECTIONS"
    for call in calls:
        if len(call.shape) - len(sighting.inputs) != axes or call.shape[:axes] != shape[:axes]:
            return f"its inputs of shape {call.shape} and its kernel of shape {shape} are stacked differently"
        if len(call.shape) < axes + 2 or call.shape[axes] % examples or not call.shape[axes]:
            return f"its input of shape {call.shape} has no axis of the {examples} examples"
    return ""


def _layer(name: str, sighting: Sighting, roles: Mapping[str, str], leaves: Mapping[str, Any]) -> Layer:
    """The noun of a layer that was seen."""
    kernel = leaves[roles["kernel"]]
    groups = sighting.geometry.groups if sighting.geometry else 1
    stack = kernel.shape[: len(kernel.shape) - len(sighting.kernel)] + ((groups,) if groups > 1 else ())
    return Layer(
        name=name,
        kind=sighting.kind,
        shape=(prod(sighting.kernel[:-1]) + ("bias" in roles), sighting.kernel[-1] // groups),
        leaves=tuple(Leaf(role, address, leaves[address].shape) for role, address in roles.items()),
        stack=stack,
        dtype=_dtype(kernel),
        geometry=sighting.geometry,
        grouped=groups > 1,
    )


def _parameter(address: str, leaf: Any, note: str) -> Layer:
    """The noun of a parameter that belongs to no known layer."""
    leaves = (Leaf("value", address, tuple(leaf.shape)),)
    return Layer(address, "parameter", tuple(leaf.shape), leaves, dtype=_dtype(leaf), note=note)


def _dtype(leaf: Any) -> str:
    """Dtype of the curvature: float32, or float64 for parameters in float64."""
    return "float64" if leaf.dtype == jnp.float64 else "float32"


def _leaf(leaves: Mapping[str, Any], address: str) -> str | None:
    """The address of a parameter array, also where a box of metadata stands around it."""
    return next((found for found in leaves if found == address or found.startswith(address + "/")), None)


def _check_exclude(exclude: tuple[str, ...], layers: list[str], leaves: Mapping[str, Any]) -> None:
    """Refuse a name that excludes nothing."""
    for entry in exclude:
        if not any(_excluded(name, (entry,)) for name in [*layers, *leaves]):
            raise ValueError(f"`exclude` names {entry!r}, which the model does not have; it has {layers}.")
