"""Watching a Flax linen model, without touching it.

An interceptor sows the input of each known layer into one private collection and adds a probe, a zero of a second
private collection, to its output. Both are ordinary variables, so `nn.remat`, `nn.jit` and shared modules work as they
are; `nn.scan` and `nn.vmap` work if `COLLECTIONS` are among their `variable_axes`:

    nn.scan(Block, variable_axes={"params": 0, **dict.fromkeys(ng.linen.COLLECTIONS, 0)}, ...)

A module called twice has one record per call, numbered by the records that its own scope already holds: tracing a
scanned body twice does not shift the numbers.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from natgrad_jax.base import Array, Layers
from natgrad_jax.capture import common
from natgrad_jax.capture.common import Evaluation, Forward, Problem
from natgrad_jax.capture.sightings import Path, Sighting, classify, kind_of, name_of, sight
from natgrad_jax.losses import Likelihood

COLLECTIONS = ("natgrad_inputs", "natgrad_probes")
"""The private collections; name them in the `variable_axes` of `nn.scan` and `nn.vmap`."""

_INPUTS, _PROBES = COLLECTIONS


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
        parameter  shape   kind   factors  state  in sample space
        kernel     (4, 3)  dense  (5, 3)   272 B  512 B
        bias       (3,)
        (factors: sizes of the two sides, bias included; state: a pair of float32 factors and their inverses)
        (in sample space: 8 examples, with the inverse of their kernel, as TENGraD has it)
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
            **apply_kwargs: further arguments of `model.apply`: `rngs`, `method`, `train`, ...; `mutable` names
                collections to write beside those in `variables`.

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

        def apply(collections, args, options, *, watch, mutable=()):
            with nn.intercept_methods(watch):
                return self.model.apply(collections, *args, mutable=[*written, _INPUTS, *mutable], **options)

        sightings: dict[Path, Sighting] = {}
        watch_all = _watch(lambda path, module, x: sight(sightings, self.exclude, path, module, x))
        traced = ({"params": params, **others}, args, options)
        outputs, mutated = _shapes(lambda *traced: apply(*traced, watch=watch_all, mutable=[_PROBES]), traced)
        examples = _examples(jax.eval_shape(self.problem.readout, outputs))
        calls = _by_path(mutated.get(_INPUTS, {}))
        found = classify(params, sightings, calls, examples, self.exclude)
        paths = {name_of(path, sighting): path for path, sighting in sightings.items()}
        paths = {name: paths[name] for name in found}
        outputs_of = _by_path(mutated.get(_PROBES, {}))
        outlines = {name: outputs_of[path] for name, path in paths.items()}
        layers = common.sized(found, outlines, examples, self.problem.rows_of(outputs))
        probes = jax.tree.map(lambda outline: jnp.zeros(outline.shape, outline.dtype), outlines)
        watched = frozenset(paths.values())
        watch_known = _watch(lambda path, module, x: path in watched)

        def run(params, probes):
            flat = {(*paths[name], f"call{i}"): x for name, calls in probes.items() for i, x in enumerate(calls)}
            collections = {"params": params, **others} | ({_PROBES: unflatten_dict(flat)} if flat else {})
            outputs, mutated = apply(collections, args, options, watch=watch_known)
            updated = {name: value for name, value in mutated.items() if name != _INPUTS}
            seen = _by_path(mutated.get(_INPUTS, {}))
            return outputs, ({name: seen[path] for name, path in paths.items()}, updated)

        return Forward(run, probes, layers, examples)


def _watch(wanted: Callable[[Path, nn.Module, Array], bool]) -> Callable[..., Any]:
    """An interceptor: record the input and probe the output of every call that is wanted."""

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or kind_of(module) is None:
            return next_function(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        if not wanted(module.path, module, x):
            return next_function(*args, **kwargs)
        call = next(name for number in count() if not module.has_variable(_INPUTS, name := f"call{number}"))
        if not module.sow(_INPUTS, call, x, reduce_fn=lambda _, x: x):  # in a transform that does not carry _INPUTS
            return next_function(*args, **kwargs)
        return module.perturb(call, next_function(*args, **kwargs), _PROBES)

    return interceptor


def _shapes(function: Callable[..., Any], arguments: Any) -> Any:
    """`jax.eval_shape` that leaves what is no array (flags, functions) in the arguments as it is."""
    leaves, structure = jax.tree.flatten(arguments)
    arrays = {index: leaf for index, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def call(arrays):
        return function(*jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.eval_shape(call, arrays)


def _by_path(collection: Any) -> dict[Path, tuple[Any, ...]]:
    """The records of a private collection: {path of the module: one entry per call}."""
    flat = flatten_dict(collection)
    found = defaultdict(list)
    for *path, call in sorted(flat, key=lambda address: int(address[-1].removeprefix("call"))):
        found[tuple(path)].append(flat[(*path, call)])
    return {path: tuple(calls) for path, calls in found.items()}


def _examples(read: Any) -> int:
    """N: the length of the first axis of what the likelihood reads."""
    shape = getattr(read, "shape", ())
    return shape[0] if shape else 1


def _names(mutable: Any) -> list[str]:
    """The collections that the caller wants written."""
    if mutable is True:
        raise TypeError("`mutable` is True; expected the names of the collections to write, such as ['intermediates'].")
    return [mutable] if isinstance(mutable, str) else list(mutable or ())
