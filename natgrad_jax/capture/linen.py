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
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from natgrad_jax import checks
from natgrad_jax.base import Array, Layers
from natgrad_jax.capture import common
from natgrad_jax.capture.common import Evaluation, Forward, Problem
from natgrad_jax.capture.microbatches import in_pieces
from natgrad_jax.capture.sightings import Path, Sightings, classify, is_excluded, name_of, sight
from natgrad_jax.layers import KINDS
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
    microbatches: int = 1,
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
        microbatches: into how many pieces a batch is cut, which are evaluated one after the other: gradient, statistics
            and steps are those of the whole batch, in the memory that the activations of a piece take. A step with
            statistics costs a forward pass more. Positional inputs, targets and weights are cut along their first axis;
            keyword arguments serve every piece as they are, `rngs` folded with its number. Batch normalisation has the
            moments of a piece, as in any accumulation.

    Returns:
        A `Capture`, with `layers` and `value_and_grad`.

    Raises:
        TypeError: if `model` or `likelihood` is of another type.
        ValueError: if `labels` or `draws` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is {model!r}; expected a flax.linen.Module instance, such as nn.Dense(10).")
    problem = Problem(likelihood, labels, draws, objective, readout or (lambda outputs: outputs))
    checks.size("microbatches", microbatches)
    return Capture(model, problem, (exclude,) if isinstance(exclude, str) else tuple(exclude), microbatches)


@dataclass(frozen=True)
class Capture:
    """A watched model; made by `capture`."""

    model: nn.Module
    problem: Problem
    exclude: tuple[str, ...] = ()
    microbatches: int = 1

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
            known = ", ".join(cls.__name__ for cls in _KNOWN)
            warnings.warn(
                f"{type(self.model).__name__} has no layer that natgrad_jax knows ({known}): every parameter gets "
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
        if self.microbatches == 1:
            forward = self._forward(variables, args, apply_kwargs)
            return common.evaluate(self.problem, forward, variables["params"], targets, weights, key)

        def forward_of(args, others, number):
            options = dict(apply_kwargs)
            if "rngs" in options:
                options["rngs"] = jax.tree.map(lambda rng: jax.random.fold_in(rng, number), options["rngs"])
            return self._forward({"params": variables["params"], **others}, args, options)

        others = {name: value for name, value in variables.items() if name != "params"}
        pieces = (args, targets, weights)
        return in_pieces(self.problem, forward_of, variables["params"], others, *pieces, key, self.microbatches)

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

        sightings: Sightings = {}
        traced = ({"params": params, **others}, args, options)
        watch_all = _watch(lambda path, call, module, x: _sighted(sightings, self.exclude, path, call, module, x))
        outputs, mutated = _shapes(lambda *traced: apply(*traced, watch=watch_all, mutable=[_PROBES]), traced)
        examples = _examples(jax.eval_shape(self.problem.readout, outputs))
        outputs_of = _by_path(mutated.get(_PROBES, {}))
        found = classify(params, sightings, _by_path(mutated.get(_INPUTS, {})), outputs_of, examples, self.exclude)
        layers = replace(found, examples=examples, draws=self.problem.rows_of(outputs))
        paths = {name_of(path, calls): path for path, calls in sightings.items()}
        paths = {name: paths[name] for name in layers}
        probes = {
            name: tuple(jnp.zeros(output.shape, output.dtype) for output in outputs_of[path].values())
            for name, path in paths.items()
        }
        watched = frozenset(paths.values())
        watch_known = _watch(lambda path, call, module, x: _recorded(sightings, watched, path, call, x))

        def run(params, probes):
            flat = {(*paths[name], f"call{i}"): x for name, calls in probes.items() for i, x in enumerate(calls)}
            collections = {"params": params, **others} | ({_PROBES: unflatten_dict(flat)} if flat else {})
            outputs, mutated = apply(collections, args, options, watch=watch_known)
            updated = {name: value for name, value in mutated.items() if name != _INPUTS}
            seen = _by_path(mutated.get(_INPUTS, {}))
            return outputs, ({name: tuple(seen[path].values()) for name, path in paths.items()}, updated)

        return Forward(run, probes, layers, examples)


_KNOWN = {getattr(nn, name): key for key, kind in KINDS.items() for name in kind.modules if hasattr(nn, name)}
"""{class of linen: its kind}."""


def _kind_of(module: nn.Module) -> str | None:
    """The kind of a module; a subclass that computes something else has none."""
    for known, kind in _KNOWN.items():
        if isinstance(module, known) and type(module).__call__ is known.__call__:
            return kind
    return None


def _sighted(
    sightings: Sightings, exclude: tuple[str, ...], path: Path, call: str, module: nn.Module, x: Array | None
) -> Array | None:
    """Note a call, None for the input of one that uses the array transposed; what is recorded of it, if anything is."""
    key = _kind_of(module)
    assert key is not None, "only known modules are watched"
    kind = KINDS[key]
    main = nn.meta.unbox(module.get_variable("params", kind.roles[0]))
    found = sight(key, module, getattr(main, "shape", ()), jnp.zeros(()) if x is None else x, transposed=x is None)
    recorded = None
    if x is not None and not found.obstacle and not is_excluded(name := name_of(path, {call: found}), exclude):
        if kind.floating and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"Layer {name!r} ({found.type_name}) is called with {x.dtype} of shape {x.shape}; expected "
                "floating-point inputs. Convert them with `x.astype(jnp.float32)`; for indices use nn.Embed."
            )
        recorded = kind.record(found.geometry, x)
        found = found._replace(inputs=recorded.shape)
    sightings.setdefault(path, {}).setdefault(call if x is not None else "transposed", found)
    return recorded


def _recorded(sightings: Sightings, watched: frozenset[Path], path: Path, call: str, x: Array | None) -> Array | None:
    """What is recorded of a call that was sighted, if its module is watched."""
    if x is None or path not in watched:
        return None
    sighting = sightings[path][call]
    return KINDS[sighting.kind].record(sighting.geometry, x)


def _watch(see: Callable[[Path, str, nn.Module, Array | None], Array | None]) -> Callable[..., Any]:
    """An interceptor: record what `see` makes of the input of a call, and probe its output, if it makes anything."""

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        if context.method_name not in ("__call__", "attend") or _kind_of(module) is None:
            return next_function(*args, **kwargs)
        if context.method_name == "attend":
            see(module.path, "", module, None)
            return next_function(*args, **kwargs)
        call = next(name for number in count() if not module.has_variable(_INPUTS, name := f"call{number}"))
        recorded = see(module.path, call, module, args[0] if args else kwargs["inputs"])
        if recorded is None:
            return next_function(*args, **kwargs)
        # in a transform that does not carry _INPUTS nothing is recorded
        if not module.sow(_INPUTS, call, recorded, reduce_fn=lambda _, x: x):
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


def _by_path(collection: Any) -> dict[Path, dict[str, Any]]:
    """The records of a private collection: {path of the module: {name of the call: record}}."""
    flat = flatten_dict(collection)
    found = defaultdict(dict)
    for *path, call in sorted(flat, key=lambda address: int(address[-1].removeprefix("call"))):
        found[tuple(path)][call] = flat[(*path, call)]
    return found


def _examples(read: Any) -> int:
    """N: the length of the first axis of what the likelihood reads."""
    shape = getattr(read, "shape", ())
    return shape[0] if shape else 1


def _names(mutable: Any) -> list[str]:
    """The collections that the caller wants written."""
    if mutable is True:
        raise TypeError("`mutable` is True; expected the names of the collections to write, such as ['intermediates'].")
    return [mutable] if isinstance(mutable, str) else list(mutable or ())
