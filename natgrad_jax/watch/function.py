"""Watching any function of parameters and inputs: plain JAX, Haiku, Equinox after `eqx.partition`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from natgrad_jax.addresses import Tree
from natgrad_jax.base import Array, Layers
from natgrad_jax.losses import Likelihood
from natgrad_jax.watch.doors import Inputs, JacobianOf, Labels, Model, Watch, asked, called
from natgrad_jax.watch.problem import Evaluation
from natgrad_jax.watch.segments import Segments


def capture(
    apply: Callable[..., Any],
    likelihood: Likelihood,
    *,
    labels: Labels | None = None,
    draws: int = 1,
    objective: Callable[[Any, Any, Array | None], Array] | None = None,
    readout: Callable[[Any], Array] | None = None,
    exclude: Iterable[str] = (),
    microbatches: int = 1,
    verify: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    jacobian: JacobianOf = "rows",
    segments: Segments | None = None,
    product_stride: int = 1,
) -> "Capture":
    """Watch a function: its layers, and for each batch loss, gradient and curvature from one forward pass.

    The other arguments are those of `ng.linen.capture`.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> def apply(params, x):
    ...     return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]
    >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "v": jnp.ones((3, 2))}
    >>> watched = ng.capture(apply, ng.losses.squared_error)
    >>> layers = watched.layers(params, jnp.ones((8, 4)))
    >>> {name: layer.shape for name, layer in layers.items()}
    {'w': (5, 3), 'v': (3, 2)}

    Args:
        apply: parameters, inputs -> outputs; pure.
        likelihood: one of `losses`.
        labels: whose cotangents measure curvature.
        draws: label samples per example, averaged.
        objective: what is differentiated instead of the likelihood.
        readout: which array of the outputs the likelihood reads.
        exclude: addresses of parameters, or the beginnings of some, to treat as unknown.
        microbatches: into how many pieces a batch is cut.
        verify: whether `layers` compares what it found with autodiff.
        axis_name: of the axis over which a batch is spread by hand, as `ng.linen.capture` takes it.
        jacobian: "rows", or "examples" to watch one example at a time, as `ng.linen.capture` takes it.
        segments: whose the parts of a batch are, such as the nodes of graphs, as `ng.linen.capture` takes it.
        product_stride: of which examples products with F are, as `ng.linen.capture` takes it.

    Returns:
        A `Capture`, with `layers` and `value_and_grad`.

    Raises:
        TypeError: if `apply` is no function, or `likelihood` of another type.
        ValueError: if `labels` or `draws` is unknown.
    """
    if not callable(apply) or hasattr(apply, "apply"):
        raise TypeError(
            f"`apply` is a {type(apply).__name__}; expected a function of parameters and inputs. For a flax module use "
            "`ng.linen.capture(model, ...)` or `ng.nnx.capture(model, ...)`; of a model with an `apply`, pass that."
        )
    how = (microbatches, verify, axis_name, jacobian, segments, product_stride)
    watch = asked(likelihood, labels, draws, objective, readout, exclude, *how)
    return Capture(apply, watch)


@dataclass(frozen=True)
class Capture:
    """A watched function; made by `capture`."""

    apply: Callable[..., Any]
    watch: Watch

    def layers(self, params: Tree, *args: Any, **kwargs: Any) -> Layers:
        """The layers that the function has on such inputs.

        Args:
            params: the parameters, any tree of arrays; shapes suffice.
            *args: a batch of inputs as the function is called with; shapes suffice.
            **kwargs: further arguments of the function.

        Returns:
            The layers and the remaining parameters; `print` it.
        """
        return self.watch.layers(self._model(params), Inputs(*args, **kwargs))

    def value_and_grad(
        self,
        params: Tree,
        inputs: Any,
        targets: Any,
        *,
        key: Array | None = None,
        weights: Array | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        """Loss, gradient, lazy curvature and outputs of one batch.

        Args:
            params: the parameters.
            inputs: what the function is called with; a tuple stands for several positional arguments, `ng.Inputs` for
                any.
            targets: labels of the batch, as the likelihood wants them.
            key: for drawing labels; a new one for each step.
            weights: of the examples [N] or of their positions [N, T]; zeros mask.
            **kwargs: further arguments of the function.

        Returns:
            An `Evaluation`.

        Raises:
            TypeError: if the function does not return what the likelihood can read.
            ValueError: if targets, weights or key do not fit.
        """
        return self.watch.evaluate(self._model(params), called(inputs, kwargs), targets, key, weights)

    def _model(self, params: Tree) -> Model:
        def function(params, state, given):
            del state
            args, kwargs = given
            return self.apply(params, *args, **kwargs), {}

        return Model(function, params, {}, getattr(self.apply, "__name__", type(self.apply).__name__))
