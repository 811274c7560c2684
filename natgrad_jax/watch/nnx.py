"""Watching a Flax NNX model.

The model is split into its graph, its parameters and the rest of its state, and watched as the pure function that
merging these and calling the copy is. What the call writes (batch statistics, counts of random streams) goes back into
the user's model once, as its own call would have it; nothing else of the model is touched.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from natgrad_jax.base import Array, Layers
from natgrad_jax.losses import Likelihood
from natgrad_jax.watch.common import Evaluation
from natgrad_jax.watch.doors import Inputs, Labels, Model, Watch, asked, called


def capture(
    model: nnx.Module | type[nnx.Module],
    likelihood: Likelihood,
    *,
    call: Callable[..., Any] | None = None,
    wrt: Any = nnx.Param,
    labels: Labels = "sampled",
    draws: int = 1,
    objective: Callable[[Any, Any, Array | None], Array] | None = None,
    readout: Callable[[Any], Array] | None = None,
    exclude: Iterable[str] = (),
    microbatches: int = 1,
    verify: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> "Capture":
    """Watch an NNX model: its layers, and for each batch loss, gradient and curvature from one forward pass.

    The other arguments are those of `ng.linen.capture`.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> watched = capture(model, ng.losses.softmax_cross_entropy, labels="true")
    >>> print(watched.layers(model, jnp.ones((8, 4))))
    parameter  shape   kind   factors  state  in sample space
    kernel     (4, 3)  dense  (5, 3)   272 B  512 B
    bias       (3,)
    (factors: sizes of the two sides, bias included; state: a pair of float32 factors and their inverses)
    (in sample space: 8 examples, with the inverse of their kernel, as TENGraD has it)
    Every parameter is covered.

    Args:
        model: the model, or its class; it is given again at each call, since an NNX model changes.
        likelihood: one of `losses`.
        call: what is called with the model and the inputs instead of the model itself, such as a method of it.
        wrt: which of its Variables are parameters, an NNX filter; give the same to `nnx.Optimizer`.
        labels: whose cotangents measure curvature.
        draws: label samples per example, averaged.
        objective: what is differentiated instead of the likelihood.
        readout: which array of the outputs the likelihood reads.
        exclude: layers (by name or the name of a parent) to treat as unknown.
        microbatches: into how many pieces a batch is cut.
        verify: whether `layers` compares what it found with autodiff.
        axis_name: of the axis over which a batch is spread by hand, as `ng.linen.capture` takes it.

    Returns:
        A `Capture`, with `layers` and `value_and_grad`.

    Raises:
        TypeError: if `model` is no NNX model, or `likelihood` of another type.
        ValueError: if `labels` or `draws` is unknown.
    """
    kind = model if isinstance(model, type) else type(model)
    if not issubclass(kind, nnx.Module):
        raise TypeError(
            f"`model` is of class {kind.__name__}; expected a flax.nnx.Module, such as nnx.Linear(4, 3, rngs=...). "
            "For linen use `ng.linen.capture`, for a function `ng.capture`."
        )
    watch = asked(likelihood, labels, draws, objective, readout, exclude, microbatches, verify, axis_name)
    return Capture(call or _call, wrt, watch)


@dataclass(frozen=True)
class Capture:
    """A watched model; made by `capture`."""

    call: Callable[..., Any]
    wrt: Any
    watch: Watch

    def layers(self, model: nnx.Module, *args: Any, **kwargs: Any) -> Layers:
        """The layers that the model has on such inputs; the model is left as it is.

        Args:
            model: the model.
            *args: a batch of inputs as the model is called with; shapes suffice.
            **kwargs: further arguments of the call.

        Returns:
            The layers and the remaining parameters; `print` it.
        """
        return self.watch.layers(self._model(model), Inputs(*args, **kwargs))

    def value_and_grad(
        self,
        model: nnx.Module,
        inputs: Any,
        targets: Any,
        *,
        key: Array | None = None,
        weights: Array | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        """Loss, gradient, lazy curvature and outputs of one batch; the state of the model moves as in its own call.

        Args:
            model: the model.
            inputs: what it is called with; a tuple stands for several positional arguments, `ng.Inputs` for any.
            targets: labels of the batch, as the likelihood wants them.
            key: for drawing labels; a new one for each step.
            weights: of the examples [N] or of their positions [N, T]; zeros mask.
            **kwargs: further arguments of the call.

        Returns:
            An `Evaluation`, whose `grad` is an `nnx.State` of the parameters, for `nnx.Optimizer.update`.

        Raises:
            TypeError: if the model does not return what the likelihood can read.
            ValueError: if targets, weights or key do not fit.
        """
        out = self.watch.evaluate(self._model(model), called(inputs, kwargs), targets, key, weights)
        nnx.update(model, out.updated["state"])
        return out

    def _model(self, model: nnx.Module) -> Model:
        """The model as a function of its parameters and its other state."""
        if not isinstance(model, nnx.Module):
            raise TypeError(f"`model` is a {type(model).__name__}; expected the flax.nnx.Module that is trained.")
        graph, params, rest = nnx.split(model, self.wrt, ...)

        def function(params, state, given):
            args, kwargs = given
            copy = nnx.merge(graph, params, state["state"], copy=True)
            outputs = self.call(copy, *args, **kwargs)
            _, _, rest = nnx.split(copy, self.wrt, ...)
            return outputs, {"state": rest}

        name = type(model).__name__
        return Model(function, params, {"state": rest}, name, root=name)


def _call(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)
