"""What is asked of a model, the watched model, and what one batch gives: the nouns of watching."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from natgrad_jax import checks
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.base import Array, Evidence, Layers
from natgrad_jax.losses import LIKELIHOODS, Likelihood
from natgrad_jax.watch.norms import Touch
from natgrad_jax.watch.reading import Call
from natgrad_jax.watch.segments import Segments

LABELS = ("sampled", "exact", "true", "forward")
JACOBIANS = ("rows", "examples")


class Evaluation(NamedTuple):
    """What one batch gives.

    Attributes:
        value: the mean loss, a scalar.
        grad: its gradient by the parameters, of the structure of `variables["params"]`.
        curvature: lazy; see `common.Curvature`.
        outputs: what the model returned.
        updated: collections that the model wrote (batch statistics).
        losses: of `terms`, the loss of each; empty of a model by itself.
    """

    value: Array
    grad: Tree
    curvature: "LazyCurvature"
    outputs: Any
    updated: Mapping[str, Any]
    losses: Mapping[str, Array] = MappingProxyType({})


def _no_argument(_: Any) -> Any:
    raise ValueError(
        "`out.curvature` is a function of the batch and no array, so that it is no argument of a function that JAX "
        "traces. Call `value_and_grad` and `update` within one `jax.jit`, or pass the evidence itself, "
        "`curvature=out.curvature()`."
    )


no_argument = property(_no_argument)
"""As the `dtype` of a curvature: JAX asks for it where one is an argument of `jax.jit`, and gets a sentence."""


class LazyCurvature(Protocol):
    """The curvature of one batch, computed where it is called; see `common.Curvature`."""

    @property
    def layers(self) -> Layers:
        """The layers that the evidence is of."""
        ...

    @property
    def labels(self) -> str:
        """Whose cotangents the evidence has."""
        ...

    @property
    def count(self) -> Array:
        """W, the total weight of the examples."""
        ...

    def __call__(self, params: Tree | None = None) -> dict[str, Evidence]:
        """The evidence of the batch, at the parameters of this step or at others."""
        ...

    def along(self, direction: Tree) -> Any:
        """J times a direction at the outputs of the batch, with R^T of the likelihood applied: arrays of any tree."""
        ...

    def value(self, params: Tree | None = None) -> Array:
        """The objective on the same batch, at the parameters of this step or at others."""
        ...

    def value_and_slope(self, params: Tree, direction: Tree) -> tuple[Array, Array]:
        """The objective on the same batch at other parameters, and its derivative along a direction there."""
        ...


class Forward(NamedTuple):
    """A watched model on one batch.

    Attributes:
        run: parameters, probes -> outputs, ({layer: inputs of each call}, updated collections).
        probes: {layer: zeros of the shape of the output of each call}.
        layers: the layers that it reports.
        examples: N.
        calls: {layer: how each of its uses is read}.
        norms: {norm: its products}.
        masked: weights -> `run` and `each` on the batch, its examples of weight zero made harmless; None if it reads no
            inputs.
        segments: {M: the examples [M] that the parts of an axis of M entries belong to}.
        by_reverse: whether a part of it can be differentiated by reverse mode only.
        half: whether a part of it computes in float16.
        each: of `jacobian="examples"`, parameters, blocks, cotangents of the outputs [K, N, ...] -> the gradients of
            the examples {address: [N, K, *shape]}, of some alone if their places follow; None elsewhere.
        twice: of `jacobian="examples"`, the function in both ways; None elsewhere.
    """

    run: Callable[[Tree, Tree], tuple[Any, tuple[dict[str, tuple[Array, ...]], Mapping[str, Any]]]]
    probes: dict[str, tuple[Array, ...]]
    layers: Layers
    examples: int
    calls: Mapping[str, tuple[Call, ...]]
    masked: Callable[[Array], tuple[Callable[..., Any], Callable[..., Any] | None]] | None = None
    by_reverse: bool = False
    half: bool = False
    each: Callable[..., dict[str, Array]] | None = None
    twice: "Twice | None" = None
    segments: Mapping[int, Array] = MappingProxyType({})
    norms: Mapping[str, tuple[Touch, ...]] = MappingProxyType({})


class Twice(NamedTuple):
    """A function of a batch, and the same of one example at a time.

    Attributes:
        both: parameters, arrays -> what the likelihood reads in either way.
        inputs: the arrays.
        places: which of them have the examples.
    """

    both: Callable[[Tree, Sequence[Any]], tuple[Array, Array]]
    inputs: Sequence[Any]
    places: frozenset[int]


@dataclass(frozen=True)
class Problem:
    """What is asked of a model: the source of labels, what is differentiated, and how curvature is measured."""

    likelihood: Likelihood
    labels: str | None = "sampled"
    draws: int = 1
    objective: Callable[[Any, Any, Array | None], Array] | None = None
    readout: Callable[[Any], Array] = lambda outputs: outputs
    jacobian: str = "rows"
    segments: Segments | None = None
    norms: str = "channels"
    devices: Devices | None = None
    product_stride: int = 1

    def __post_init__(self):
        if not isinstance(self.likelihood, Likelihood):
            known = ", ".join(f"ng.losses.{likelihood.name}" for likelihood in LIKELIHOODS)
            raise TypeError(
                f"`likelihood` is {checks.shown(self.likelihood)}; expected one of {known}, or a `losses.Likelihood`. "
                "A loss that is no negative log-likelihood goes into `objective`."
            )
        if self.labels is not None:
            checks.choice("labels", self.labels, LABELS)
        checks.choice("jacobian", self.jacobian, JACOBIANS)
        if not (isinstance(self.draws, int) and self.draws >= 1):
            raise ValueError(f"`draws` is {self.draws!r}; expected a positive int, the number of label samples.")
        if self.draws > 1 and self.labels not in (None, "sampled"):
            raise ValueError(
                f'`draws` is {self.draws}, but only `labels="sampled"` draws; `labels` is {self.labels!r}.'
            )

    def value(self, outputs: Any, targets: Any, weights: Array | None) -> Array:
        """The scalar that is differentiated."""
        if self.objective is None:
            return self.likelihood(self.read(outputs), targets, weights)
        found = self.objective(outputs, targets, weights)
        if jnp.shape(found):
            raise ValueError(
                f"`objective` gave an array of shape {jnp.shape(found)}; expected the mean loss, a scalar."
            )
        return found

    def read(self, outputs: Any) -> Array:
        """What the likelihood reads of the outputs; a `TypeError` if that is not one array."""
        found = self.readout(outputs)
        if not (hasattr(found, "shape") and jnp.issubdtype(found.dtype, jnp.floating)):
            raise TypeError(
                f"The likelihood reads {type(found).__name__} {jax.tree.map(jnp.shape, found)} from the model; "
                "expected one floating-point array. Choose it by `readout`, for instance "
                "`readout=lambda outputs: outputs[0]`."
            )
        return found

    @property
    def label(self) -> str:
        """Whose cotangents the evidence has, once that is settled."""
        assert self.labels is not None, "settled"
        return self.labels

    def settled(self, read: Any) -> "Problem":
        """With the labels that nobody chose: exact where an example has one number, which costs one pullback as well.

        Args:
            read: what the likelihood reads; its shape suffices.

        Returns:
            The problem, its labels a word.
        """
        if self.labels is not None:
            return self
        one = self.draws == 1 and prod(getattr(read, "shape", (1, 2))[1:]) == 1
        return replace(self, labels="exact" if one else "sampled")

    def rows_of(self, read: Any) -> int:
        """K, how many cotangents each example has, from the shape that the likelihood reads; 0 if g is the identity."""
        if self.labels == "exact":  # whether the likelihood can read the outputs is asked when it has to
            return prod(getattr(read, "shape", ())[1:])
        return 0 if self.labels == "forward" else self.draws
