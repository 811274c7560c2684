"""Several captures as one problem: a loss of several terms, each with its function, batch and likelihood.

    1  loss, gradient <- sum_k weight_k (those of term k)
    2  F <- sum_k weight_k F_k:  the examples of all terms side by side, W = sum_k W_k of them,
       cotangents of term k times sqrt(weight_k W / W_k)

So a method in sample space has all rows in one kernel, and the moments of a relative of K-FAC are those of all rows.
Of a layer every term has the rows that it gives: where it does not see the bias, the row has a zero there.

The heads of one model are terms as well: the same function and batch, and another `readout` and likelihood for each.
Equal parts of the program are computed once under `jax.jit`. An NNX model moves its state once for all terms that are
called with the same inputs, and all of them see it as it was before; a term with inputs of its own is another call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from natgrad_jax import checks
from natgrad_jax.addresses import Tree
from natgrad_jax.base import Array, Evidence, Layers, Scalar
from natgrad_jax.watch.doors import called
from natgrad_jax.watch.joining import Part, joined_evidence, joined_layers
from natgrad_jax.watch.problem import Evaluation, no_argument
from natgrad_jax.watch.space import Spaces


class Capture(Protocol):
    """What `ng.capture`, `ng.linen.capture` and `ng.nnx.capture` make."""

    @property
    def layers(self) -> Callable[..., Layers]:
        """Model, inputs -> the layers."""
        ...

    @property
    def value_and_grad(self) -> Callable[..., Evaluation]:
        """Model, inputs, targets -> loss, gradient and curvature of a batch."""
        ...


def terms(captures: Mapping[str, Capture], weights: Mapping[str, Scalar] | None = None) -> "Terms":
    """A loss of several terms, each with its function, batch and likelihood: one gradient, one curvature.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> def u(params, x):
    ...     return jnp.tanh(x @ params["a"]) @ params["b"]
    >>> def slope(params, x):
    ...     return jax.vmap(jax.grad(lambda params, x: u(params, x)[0], argnums=1), (None, 0))(params, x)
    >>> loss = ng.terms(
    ...     {"inside": ng.capture(slope, ng.losses.squared_error, jacobian="examples"),
    ...      "edge": ng.capture(u, ng.losses.squared_error, jacobian="examples")},
    ...     weights={"edge": 10.0},
    ... )
    >>> params = {"a": jnp.ones((1, 4)), "b": jnp.ones((4, 1))}
    >>> x = {"inside": jnp.linspace(0, 1, 8)[:, None], "edge": jnp.zeros((1, 1))}
    >>> layers = loss.layers(params, x)
    >>> layers.examples
    9
    >>> y = {"inside": jnp.ones((8, 1)), "edge": jnp.zeros((1, 1))}
    >>> losses = jax.jit(lambda params: loss.value_and_grad(params, x, y).losses)(params)
    >>> sorted(losses)
    ['edge', 'inside']

    Args:
        captures: {name of the term: what `capture` of any door made}, all of the same parameters.
        weights: {name: factor of the term in the loss}, positive; 1 where nothing is said.

    Returns:
        `Terms`, with the `layers` and the `value_and_grad` of a capture.

    Raises:
        TypeError: if a term is no capture, or captures or weights have no names.
        ValueError: if there is no term, or a weight of none.
    """
    _check_names("captures", captures, "{name of the term: capture}")
    _check_names("weights", {} if weights is None else weights, "{name of the term: its factor}, or None")
    if not captures:
        raise ValueError("`captures` is empty; expected {name of the term: capture} with at least one.")
    for name, capture in captures.items():
        if not (hasattr(capture, "layers") and hasattr(capture, "value_and_grad")):
            raise TypeError(
                f"The term {name!r} is a {type(capture).__name__}; expected what `ng.capture`, `ng.linen.capture` or "
                "`ng.nnx.capture` made of a function or a model."
            )
    given = dict(weights or {})
    if unknown := sorted(set(given) - set(captures)):
        raise ValueError(f"`weights` has {unknown}, which are no terms; these are {sorted(captures)}.")
    for name, weight in given.items():
        checks.number(f"weights[{name!r}]", weight, least=0)
    return Terms(dict(captures), {name: given.get(name, 1.0) for name in captures})


@dataclass(frozen=True)
class Terms:
    """A loss of several terms; made by `terms`."""

    captures: Mapping[str, Capture]
    weights: Mapping[str, Scalar]

    def layers(self, model: Any, inputs: Any) -> Layers:
        """The layers of all terms.

        Args:
            model: parameters, variables or module, as the captures take them; shapes suffice.
            inputs: {name: what the term is called with}, a tuple for several arguments, `ng.Inputs(x, train=True)`
                for keywords; or what all are called with.

        Returns:
            The layers, with as many examples as all batches have.

        Raises:
            ValueError: if the inputs of a term are missing, or a term has no cotangents (`labels="forward"`).
        """
        inputs = self._by_term("inputs", inputs)
        found = {}
        for name, capture in self.captures.items():
            given = called(inputs[name], {})
            found[name] = capture.layers(model, *given.args, **given.kwargs)
        return joined_layers(found)

    def value_and_grad(
        self,
        model: Any,
        inputs: Any,
        targets: Any,
        *,
        key: Array | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> Evaluation:
        """Loss, gradient, lazy curvature and outputs of one batch for each term.

        Args:
            model: parameters, variables or module, as the captures take them.
            inputs: {name: what the term is called with}, or what all are called with, as `layers` takes them. Terms
                with the same inputs (the same object) are one call of an NNX model.
            targets: {name: labels of the batch of the term}.
            key: for drawing labels; a new one for each step.
            weights: {name: weights of the examples of the term}; for those that have some.

        Returns:
            An `Evaluation`: `losses` has the loss of every term without its weight, `outputs` those of every term.

        Raises:
            TypeError: if the weights have no names.
            ValueError: if inputs or targets of a term are missing, or there are weights of none.
        """
        inputs = self._by_term("inputs", inputs)
        if not isinstance(targets, Mapping) or set(targets) != set(self.captures):
            has = sorted(targets) if isinstance(targets, Mapping) else type(targets).__name__
            raise ValueError(f"`targets` has {has}; expected one entry for each term, {sorted(self.captures)}.")
        weights = {} if weights is None else weights
        _check_names("weights", weights, "{name of the term: weights of its examples}, or None")
        if unknown := sorted(set(weights) - set(self.captures)):
            raise ValueError(f"`weights` has {unknown}, which are no terms; these are {sorted(self.captures)}.")
        found: dict[str, Evaluation] = {}
        calls: list[tuple[Any, Any]] = []  # inputs, and the model as it was before it was called with them
        for number, (name, capture) in enumerate(self.captures.items()):
            own = None if key is None else jax.random.fold_in(key, number)
            copied = getattr(capture, "copied", lambda model: model)
            there = next((copied(before) for given, before in calls if given is inputs[name]), model)
            if there is model:
                calls.append((inputs[name], copied(model)))
            found[name] = capture.value_and_grad(there, inputs[name], targets[name], key=own, weights=weights.get(name))
        value = sum(self.weights[name] * each.value for name, each in found.items())
        grads = [jax.tree.map(lambda leaf, w=self.weights[name]: w * leaf, each.grad) for name, each in found.items()]
        grad = jax.tree.map(lambda first, *others: sum(others, first).astype(first.dtype), *grads)
        updated: dict[str, Any] = {}
        for each in found.values():
            updated |= each.updated
        curvature = TermsCurvature({name: each.curvature for name, each in found.items()}, self.weights)
        losses = {name: each.value for name, each in found.items()}
        outputs = {name: each.outputs for name, each in found.items()}
        return Evaluation(jnp.asarray(value), grad, curvature, outputs, updated, losses)

    def _by_term(self, name: str, given: Any) -> Mapping[str, Any]:
        """What each term is given; the same for all if it is no mapping of the terms."""
        if not isinstance(given, Mapping) or not set(given) & set(self.captures):
            return dict.fromkeys(self.captures, given)
        if missing := sorted(set(self.captures) - set(given)):
            raise ValueError(
                f"`{name}` has {sorted(given)}, without the terms {missing}; expected one entry for each, or what all "
                "are called with."
            )
        return given


def _check_names(name: str, given: Any, expected: str) -> None:
    """Refuse what has no entry for a term by its name."""
    if not isinstance(given, Mapping):
        raise TypeError(f"`{name}` is of type {type(given).__name__}; expected {expected}.")


@dataclass(frozen=True, eq=False, repr=False)
class TermsCurvature:
    """The curvature of several terms; asked like `common.Curvature`."""

    _parts: Mapping[str, Any]
    _weights: Mapping[str, Scalar]

    dtype = no_argument

    @property
    def layers(self) -> Layers:
        """The layers that the evidence is of."""
        return joined_layers({name: part.layers for name, part in self._parts.items()})

    @property
    def labels(self) -> str:
        """Whose cotangents the evidence has; "" where the terms differ."""
        return self.layers.labels

    @property
    def count(self) -> Array:
        """W, the total weight of the examples of all terms."""
        return jnp.sum(jnp.stack([jnp.asarray(part.count) for part in self._parts.values()]))

    @property
    def floor(self) -> Array | None:
        """What the loss cannot fall below, if that is known of all terms; see `common.Curvature.floor`."""
        least = {name: part.floor for name, part in self._parts.items()}
        return None if None in least.values() else self._sum(least)

    def __call__(self, params: Tree | None = None) -> dict[str, Evidence]:
        """The evidence of all terms, at the parameters of this step or at others."""
        total = self.count
        parts = {
            name: Part(part.layers, part(params), _root(self._weights[name], total, part.count))
            for name, part in self._parts.items()
        }
        return joined_evidence(self.layers, parts, total)

    def along(self, direction: Tree) -> dict[str, Array]:
        """J times a direction at the outputs of every term, with R^T of its likelihood and the root of its weight."""
        found = {name: part.along(direction) for name, part in self._parts.items()}
        return {name: leaf * jnp.sqrt(self._weights[name]).astype(leaf.dtype) for name, leaf in found.items()}

    def space(self) -> Spaces:
        """The batches of all terms as the rows of one Jacobian, of which nothing is kept."""
        if plain := sorted(name for name, part in self._parts.items() if not hasattr(part, "space")):
            raise TypeError(
                f"The terms {plain} give no products with the Jacobian, which `kept=False` takes: capture them without "
                "`axis_name`."
            )
        roots = [jnp.sqrt(jnp.asarray(self._weights[name], float)) for name in self._parts]
        return Spaces([part.space() for part in self._parts.values()], roots)

    def value(self, params: Tree | None = None) -> Array:
        """The loss on the same batches, at the parameters of this step or at others."""
        return self._sum({name: part.value(params) for name, part in self._parts.items()})

    def value_and_slope(self, params: Tree, direction: Tree) -> tuple[Array, Array]:
        """The loss on the same batches at other parameters, and its derivative along a direction there."""
        found = {name: part.value_and_slope(params, direction) for name, part in self._parts.items()}
        values, slopes = ({name: pair[at] for name, pair in found.items()} for at in (0, 1))
        return self._sum(values), self._sum(slopes)

    def _sum(self, numbers: Mapping[str, Array]) -> Array:
        """The weighted sum over the terms."""
        return jnp.asarray(sum(self._weights[name] * number for name, number in numbers.items()))


def _root(weight: Scalar, total: Array, count: Array) -> Array:
    """By what the cotangents of a term are multiplied; nothing of a term without examples."""
    total, count = (jnp.asarray(each, float) for each in (total, count))  # in float64 where there is one
    return jnp.sqrt(weight * jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0))
