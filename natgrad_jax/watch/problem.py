"""What is asked of a model, the watched model, and what one batch gives: the nouns of watching."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

from natgrad_jax import checks
from natgrad_jax.addresses import Tree
from natgrad_jax.base import Array, Evidence, Layers
from natgrad_jax.losses import LIKELIHOODS, Likelihood
from natgrad_jax.watch.reading import Call

LABELS = ("sampled", "exact", "true", "forward")


class Evaluation(NamedTuple):
    """What one batch gives.

    Attributes:
        value: the mean loss, a scalar.
        grad: its gradient by the parameters, of the structure of `variables["params"]`.
        curvature: lazy; see `common.Curvature`.
        outputs: what the model returned.
        updated: collections that the model wrote (batch statistics).
    """

    value: Array
    grad: Tree
    curvature: "LazyCurvature"
    outputs: Any
    updated: Mapping[str, Any]


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

    def along(self, direction: Tree) -> Array:
        """J times a direction at the outputs of the batch, with R^T of the likelihood applied."""
        ...

    def value(self, params: Tree | None = None) -> Array:
        """The objective on the same batch, at the parameters of this step or at others."""
        ...


class Forward(NamedTuple):
    """A watched model on one batch.

    Attributes:
        run: parameters, probes -> outputs, ({layer: inputs of each call}, updated collections).
        probes: {layer: zeros of the shape of the output of each call}.
        layers: the layers that it reports.
        examples: N.
        calls: {layer: how each of its uses is read}.
        masked: weights -> `run` on the batch, its examples of weight zero made harmless; None if it reads no inputs.
        by_reverse: whether a part of it can be differentiated by reverse mode only.
    """

    run: Callable[[Tree, Tree], tuple[Any, tuple[dict[str, tuple[Array, ...]], Mapping[str, Any]]]]
    probes: dict[str, tuple[Array, ...]]
    layers: Layers
    examples: int
    calls: Mapping[str, tuple[Call, ...]]
    masked: Callable[[Array], Callable[..., Any]] | None = None
    by_reverse: bool = False


@dataclass(frozen=True)
class Problem:
    """What is asked of a model: the source of labels, what is differentiated, and how curvature is measured."""

    likelihood: Likelihood
    labels: str = "sampled"
    draws: int = 1
    objective: Callable[[Any, Any, Array | None], Array] | None = None
    readout: Callable[[Any], Array] = lambda outputs: outputs

    def __post_init__(self):
        if not isinstance(self.likelihood, Likelihood):
            known = ", ".join(f"ng.losses.{likelihood.name.split('(')[0]}" for likelihood in LIKELIHOODS)
            raise TypeError(
                f"`likelihood` is {self.likelihood!r}; expected one of {known}, or a `losses.Likelihood`. "
                "A loss that is no negative log-likelihood goes into `objective`."
            )
        checks.choice("labels", self.labels, LABELS)
        if not (isinstance(self.draws, int) and self.draws >= 1):
            raise ValueError(f"`draws` is {self.draws!r}; expected a positive int, the number of label samples.")
        if self.draws > 1 and self.labels != "sampled":
            raise ValueError(
                f'`draws` is {self.draws}, but only `labels="sampled"` draws; `labels` is {self.labels!r}.'
            )

    def value(self, outputs: Any, targets: Any, weights: Array | None) -> Array:
        """The scalar that is differentiated."""
        if self.objective is not None:
            return self.objective(outputs, targets, weights)
        return self.likelihood(self.readout(outputs), targets, weights)

    def rows_of(self, read: Any) -> int:
        """K, how many cotangents each example has, from the shape that the likelihood reads; 0 if g is the identity."""
        if self.labels == "exact":  # whether the likelihood can read the outputs is asked when it has to
            return prod(getattr(read, "shape", ())[1:])
        return 0 if self.labels == "forward" else self.draws
