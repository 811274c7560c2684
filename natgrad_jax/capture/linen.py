"""Watching a Flax linen model, without touching it.

An interceptor sows the input of each known layer into one private collection and adds a probe, a zero of a second
private collection, to its output. Both are ordinary variables, so `nn.remat`, `nn.jit` and shared modules work as they
are; `nn.scan` and `nn.vmap` work if `COLLECTIONS` are among their `variable_axes`:

    nn.scan(Block, variable_axes={"params": 0, **dict.fromkeys(ng.linen.COLLECTIONS, 0)}, ...)

A module called twice has one record per call, numbered by the records that its own scope already holds: tracing a
scanned body twice does not shift the numbers.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from natgrad_jax import addresses
from natgrad_jax.base import Array, Layer, Layers, Leaf
from natgrad_jax.capture import common
from natgrad_jax.capture.common import Evaluation, Forward, Problem, Tree
from natgrad_jax.layers import ConvGeometry
from natgrad_jax.losses import Likelihood

COLLECTIONS = ("natgrad_inputs", "natgrad_probes")
"""The private collections; name them in the `variable_axes` of `nn.scan` and `nn.vmap`."""

_INPUTS, _PROBES = COLLECTIONS
_CALLS = "calls"


def capture(
    model: nn.Module,
    likelihood: Likelihood,
    *,
    labels: Literal["sampled", "exact", "true", "forward"] = "sampled",
    draws: int = 1,
    objective: Callable[[Any, Any, Array | None], Array] | None = None,
    readout: Callable[[Any], Array] | None = None,
    exclude: Iterable[str] = (),
) -> "Capture":
    """Watch a linen model: its layers, and for each batch loss, gradient and curvature from one forward pass.

    Args:
        model: the model; it is not changed.
        likelihood: one of `losses`: what the outputs say about the targets, and the source of labels.
        labels: whose cotangents measure curvature. "sampled": labels drawn from the model, the Fisher matrix by
            Monte Carlo. "exact": every column of the root of the output Hessian, the Fisher matrix without sampling
            noise, at as many pullbacks as one example has outputs. "true": the labels of the batch, the empirical
            Fisher matrix; if there are neither weights nor an `objective`, without a second pullback. "forward": the
            identity, no pullback at all.
        draws: label samples per example, averaged.
        objective: what is differentiated instead of the likelihood: outputs, targets, weights -> scalar mean loss.
        readout: which array of the model's output the likelihood reads, if the model returns more than one.
        exclude: layers (by name or the name of a parent) to treat as unknown.

    Returns:
        A `Capture`, with `layers` and `value_and_grad`.

    Raises:
        TypeError: if `model` or `likelihood` is of another type.
        ValueError: if `labels` or `draws` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is {model!r}; expected a flax.linen.Module instance, such as nn.Dense(10).")
    problem = Problem(likelihood, labels, draws, objective, readout or (lambda outputs: outputs))
    return Capture(model, problem, (exclude,) if isinstance(exclude, str) else tuple(exclude))


@dataclass(frozen=True)
class Capture:
    """A watched model; made by `capture`."""

    model: nn.Module
    problem: Problem
    exclude: tuple[str, ...] = ()

    def layers(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Layers:
        """The layers that the model calls on such inputs; nothing is computed.

        >>> import natgrad_jax as ng
        >>> model = nn.Dense(3)
        >>> x = jnp.ones((8, 4))
        >>> watched = capture(model, ng.losses.softmax_cross_entropy)
        >>> print(watched.layers(model.init(jax.random.key(0), x), x))
        parameter     shape   kind   factors  state
        Dense/kernel  (4, 3)  dense  (5, 3)   272 B
        Dense/bias    (3,)
        (factors: sizes of the two sides, bias included; state: a pair of float32 factors and their inverses)
        Every parameter is covered.

        Args:
            variables: of the model, "params" among them; shapes suffice.
            *args: a batch of inputs as the model is called with; shapes suffice.
            **kwargs: further arguments of `model.apply`, such as `train`, `rngs`, `method`.

        Returns:
            The layers and the remaining parameters; `print` it.

        Raises:
            TypeError: if a layer is called with integers.
            ValueError: if a layer has an option that cannot be handled.
        """
        layers = self._forward(variables, args, kwargs).layers
        if not layers.known:
            warnings.warn(
                f"{type(self.model).__name__} has no layer that natgrad_jax knows (Dense, Conv): every parameter gets "
                f"a diagonal Fisher block: {', '.join(layer.name for layer in layers.rest)}.",
                stacklevel=2,
            )
        return layers

    def value_and_grad(
        self,
        variables: Mapping[str, Any],
        inputs: Any,
        targets: Any,
        *,
        key: Array | None = None,
        weights: Array | None = None,
        **apply_kwargs: Any,
    ) -> Evaluation:
        """Loss, gradient, lazy curvature, outputs and written collections of one batch.

        Args:
            variables: of the model, "params" among them. The other collections may be written; see `updated`.
            inputs: what the model is called with; a tuple stands for several positional arguments.
            targets: labels of the batch, as the likelihood wants them.
            key: for drawing labels; a new one for each step.
            weights: of the examples [N] or of their positions [N, T]; zeros mask.
            **apply_kwargs: further arguments of `model.apply`: `rngs`, `method`, `mutable`, `train`, ...

        Returns:
            An `Evaluation`.

        Raises:
            TypeError: if the model does not return what the likelihood can read, or a layer is called with integers.
            ValueError: if targets, weights or key do not fit, or a layer has an option that cannot be handled.
        """
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        forward = self._forward(variables, args, apply_kwargs)
        return common.evaluate(self.problem, forward, variables["params"], targets, weights, key)

    def _forward(self, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward:
        """Trace the model once, for its layers and the shapes of its probes."""
        if "params" not in variables:
            raise ValueError(
                f'`variables` has the collections {sorted(variables)} but no "params"; pass what `model.init` returned.'
            )
        params = variables["params"]
        others = {name: value for name, value in variables.items() if name not in ("params", *COLLECTIONS)}
        options = {name: value for name, value in kwargs.items() if name != "mutable"}
        written = [*others, *_names(kwargs.get("mutable", ()))]

        def apply(params, probes, watch, mutable):
            with nn.intercept_methods(watch):
                collections = {"params": params, **others, **probes}
                return self.model.apply(collections, *args, mutable=[*written, _INPUTS, *mutable], **options)

        sightings: dict[Path, _Sighting] = {}
        watch_all = _watch(lambda path, module, x: _sight(sightings, self.exclude, path, module, x))
        outputs, mutated = jax.eval_shape(lambda params: apply(params, {}, watch_all, [_PROBES]), params)
        examples = _examples(jax.eval_shape(self.problem.readout, outputs))
        inputs: dict[Path, Any] = dict(flatten_dict(mutated.get(_INPUTS, {})))
        layers = _classify(params, sightings, inputs, examples, self.exclude)
        paths = {_name(path, sighting): path for path, sighting in sightings.items()}
        shapes: dict[Path, Any] = dict(flatten_dict(mutated.get(_PROBES, {})))
        calls = {name: range(len(inputs[(*paths[name], _CALLS)])) for name in layers}
        outlines = {name: tuple(shapes[(*paths[name], f"call{i}")] for i in calls[name]) for name in layers}
        probes = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), outlines)
        watched = {paths[name] for name in layers}
        watch_known = _watch(lambda path, module, x: path in watched)

        def run(params, probes):
            flat = {(*paths[name], f"call{i}"): x for name, calls in probes.items() for i, x in enumerate(calls)}
            nested = {_PROBES: unflatten_dict(flat)} if flat else {}
            outputs, mutated = apply(params, nested, watch_known, [])
            updated = {name: value for name, value in mutated.items() if name != _INPUTS}
            seen = flatten_dict(mutated.get(_INPUTS, {}))
            return outputs, ({name: seen[(*paths[name], _CALLS)] for name in layers}, updated)

        return Forward(run, probes, layers, examples)


Path = tuple[str, ...]


class _Sighting(NamedTuple):
    """What the first call of a module shows: static facts only."""

    kind: str
    type_name: str
    geometry: ConvGeometry | None
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]


def _watch(wanted: Callable[[Path, nn.Module, Array], bool]) -> Callable[..., Any]:
    """An interceptor: record the input and probe the output of every call that is wanted."""

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or _kind(module) is None:
            return next_function(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        if not wanted(module.path, module, x):
            return next_function(*args, **kwargs)
        call = len(module.get_variable(_INPUTS, _CALLS, ()))
        if not module.sow(_INPUTS, _CALLS, x):  # inside a transform that does not carry the collections
            return next_function(*args, **kwargs)
        return module.perturb(f"call{call}", next_function(*args, **kwargs), _PROBES)

    return interceptor


def _kind(module: nn.Module) -> str | None:
    """The kind of a module; a subclass that computes something else has none."""
    for kind, known in (("dense", nn.Dense), ("conv", nn.Conv)):
        if isinstance(module, known) and type(module).__call__ is known.__call__:
            return kind
    return None


def _name(path: Path, sighting: _Sighting) -> str:
    """The name of a layer: its address in the parameters; of a model that is itself a layer, its type."""
    return "/".join(path) or sighting.type_name


def _excluded(name: str, exclude: tuple[str, ...]) -> bool:
    return any(name == entry or name.startswith(entry + "/") for entry in exclude)


def _sight(sightings: dict[Path, _Sighting], exclude: tuple[str, ...], path: Path, module: nn.Module, x: Array) -> bool:
    """Note the static facts of a call; False if the layer is excluded."""
    kind = _kind(module)
    assert kind is not None
    name = "/".join(path) or type(module).__name__
    kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
    geometry = None
    if not _excluded(name, exclude):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"Layer {name!r} ({type(module).__name__}) is called with {x.dtype} of shape {x.shape}; expected "
                "floating-point inputs. Convert them with `x.astype(jnp.float32)`; for indices use nn.Embed."
            )
        geometry = _geometry(name, module) if isinstance(module, nn.Conv) else None
    sightings.setdefault(path, _Sighting(kind, type(module).__name__, geometry, kernel.shape, x.shape))
    return not _excluded(name, exclude)


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


def _classify(
    params: Tree,
    sightings: Mapping[Path, _Sighting],
    inputs: Mapping[Path, tuple[jax.ShapeDtypeStruct, ...]],
    examples: int,
    exclude: tuple[str, ...],
) -> Layers:
    """Every parameter of the model, as part of a known layer or as a block of its own."""
    leaves = {address: leaf for address, leaf in addresses.flatten(params).items()}
    known, notes, taken = [], {}, set()
    for path, sighting in sightings.items():
        name = _name(path, sighting)
        prefix = "".join(f"{part}/" for part in path)
        found = {address: role for role in ("kernel", "bias") if (address := _leaf(leaves, prefix + role))}
        if _excluded(name, exclude):
            note = "excluded"
        else:
            note = _obstacle(sighting, leaves, found, inputs.get((*path, _CALLS), ()), examples)
        if note:
            notes |= dict.fromkeys(found, note)
            continue
        known.append(_layer(name, sighting, {role: address for address, role in found.items()}, leaves))
        taken |= set(found)
    _check_exclude(exclude, leaves)
    rest = tuple(
        _parameter(address, leaf, notes.get(address, "")) for address, leaf in leaves.items() if address not in taken
    )
    return Layers(tuple(known), rest)


def _obstacle(
    sighting: _Sighting,
    leaves: Mapping[str, Any],
    found: Mapping[str, str],
    calls: tuple[jax.ShapeDtypeStruct, ...],
    examples: int,
) -> str:
    """Why a layer that was seen cannot be preconditioned; empty if it can."""
    kernels = [address for address, role in found.items() if role == "kernel"]
    if not kernels:
        return "its kernel is no parameter"
    shape = leaves[kernels[0]].shape
    axes = len(shape) - len(sighting.kernel)
    if axes < 0 or shape[axes:] != sighting.kernel:
        return f"its kernel of shape {shape} is used with shape {sighting.kernel}"
    if not calls:
        return "inside nn.scan or nn.vmap whose variable_axes lack ng.linen.COLLECTIONS"
    for call in calls:
        if len(call.shape) - len(sighting.inputs) != axes or call.shape[:axes] != shape[:axes]:
            return f"its inputs of shape {call.shape} and its kernel of shape {shape} are stacked differently"
        if len(call.shape) < axes + 2 or call.shape[axes] % examples or not call.shape[axes]:
            return f"its input of shape {call.shape} has no axis of the {examples} examples"
    return ""


def _layer(name: str, sighting: _Sighting, roles: Mapping[str, str], leaves: Mapping[str, Any]) -> Layer:
    """The noun of a layer that was seen."""
    kernel = leaves[roles["kernel"]]
    groups = sighting.geometry.groups if sighting.geometry else 1
    stack = kernel.shape[: len(kernel.shape) - len(sighting.kernel)] + ((groups,) if groups > 1 else ())
    rows = 1
    for size in sighting.kernel[:-1]:
        rows *= size
    return Layer(
        name=name,
        kind=sighting.kind,
        shape=(rows + ("bias" in roles), sighting.kernel[-1] // groups),
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


def _check_exclude(exclude: tuple[str, ...], leaves: Mapping[str, Any]) -> None:
    names = sorted({address.rpartition("/")[0] for address in leaves})
    for entry in exclude:
        if not any(_excluded(address, (entry,)) for address in leaves) and entry not in ("Dense", "Conv"):
            raise ValueError(f"`exclude` names {entry!r}, which the model does not have; it has {names}.")


def _examples(read: Any) -> int:
    """N: the length of the first axis of what the likelihood reads."""
    shape = getattr(read, "shape", ())
    return shape[0] if shape else 1


def _names(mutable: Any) -> list[str]:
    """The collections that the caller wants written."""
    return [mutable] if isinstance(mutable, str) else list(mutable or ())
