"""Watching a Flax NNX model.

The model is split into its graph, its parameters and the rest of its state, and watched as the pure function that
merging these and calling the copy is. What the call writes (batch statistics, counts of random streams) goes back into
the user's model once, as its own call would have it; nothing else of the model is touched.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.errors import TraceContextError

from natgrad_jax.base import Array, Layers
from natgrad_jax.losses import Likelihood
from natgrad_jax.watch.doors import Inputs, JacobianOf, Labels, Model, Watch, asked, called
from natgrad_jax.watch.problem import Evaluation
from natgrad_jax.watch.segments import Segments


def capture(
    model: Any,
    likelihood: Likelihood,
    *,
    call: Callable[..., Any] | None = None,
    wrt: Any = nnx.Param,
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
    Curvature by the labels of the batch (labels="true"), the empirical Fisher matrix.

    Args:
        model: the model, or its class, or a tuple of it and what else `call` needs, such as its nnx.Rngs; it is given
            again at each call, since an NNX model changes.
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
        jacobian: "rows", or "examples" to watch one example at a time, as `ng.linen.capture` takes it.
        segments: whose the parts of a batch are, such as the nodes of graphs, as `ng.linen.capture` takes it.
        product_stride: of which examples products with F are, as `ng.linen.capture` takes it.

    Returns:
        A `Capture`, with `layers` and `value_and_grad`.

    Raises:
        TypeError: if `model` is no NNX model or has Variables that NNX does not differentiate (hijax), or `likelihood`
            is of another type.
        ValueError: if `labels` or `draws` is unknown.
    """
    if not (isinstance(model, type) and issubclass(model, nnx.Module)):
        _check(model)
        if call is None and not callable(model):
            raise TypeError(
                f"`model` is a {type(model).__name__}, which cannot be called; expected `call=`, a function of it and "
                "the inputs, such as `call=lambda both, x: both[0](x, both[1])`."
            )
    how = (microbatches, verify, axis_name, jacobian, segments, product_stride)
    watch = asked(likelihood, labels, draws, objective, readout, exclude, *how)
    return Capture(call or _call, wrt, watch)


@dataclass(frozen=True)
class Capture:
    """A watched model; made by `capture`."""

    call: Callable[..., Any]
    wrt: Any
    watch: Watch

    def layers(self, model: Any, *args: Any, **kwargs: Any) -> Layers:
        """The layers that the model has on such inputs; the model is left as it is.

        Args:
            model: the model.
            *args: a batch of inputs as the model is called with; shapes suffice.
            **kwargs: further arguments of the call.

        Returns:
            The layers and the remaining parameters; `print` it.
        """
        bound = self._bound(model, Inputs(*args, **kwargs))
        return self.watch.layers(bound.model, bound.inputs)

    def value_and_grad(
        self,
        model: Any,
        inputs: Any,
        targets: Any,
        *,
        key: Array | None = None,
        weights: Array | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        """Loss, gradient, lazy curvature and outputs of one batch; the state of the model moves as in its own call.

        Parameters stay, also where a call writes them (`nnx.WeightNorm`, `nnx.SpectralNorm`).

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
        bound = self._bound(model, called(inputs, kwargs))
        out = self.watch.evaluate(bound.model, bound.inputs, targets, key, weights)
        nnx.update(bound.objects, out.updated["state"])
        return out

    def copied(self, model: Any) -> Any:
        """The model as it is now, which `value_and_grad` does not move: for terms of one call of it."""
        _check(model)
        return nnx.clone(model)

    def _bound(self, model: Any, given: Inputs) -> "_Bound":
        """The model, and the objects of NNX among its inputs, as a function of parameters and other state."""
        _check(model)
        name = type(model).__name__
        if self.call is _call and not callable(model):
            raise TypeError(
                f"`model` is a {name}, which cannot be called; expected the flax.nnx.Module itself. Of a state of it "
                "`nnx.merge(graph, state)` makes one."
            )
        objects: list[Any] = []
        inputs = Inputs()
        inputs.args, inputs.kwargs = jax.tree.map(
            lambda leaf: _Place.of(leaf, objects), (given.args, given.kwargs), is_leaf=_is_object
        )
        graph, params, rest = nnx.split((model, objects), self._is_parameter, ...)

        def function(params, state, given):
            copy, others = nnx.merge(graph, nnx.State({_MODEL: params}), state["state"], copy=True)
            args, kwargs = jax.tree.map(lambda leaf: _Place.filled(leaf, others), given, is_leaf=_Place.stands)
            try:
                outputs = self.call(copy, *args, **kwargs)
            except TraceContextError as error:
                raise ValueError(
                    f"Calling {name} changes an object of NNX that it was not called with: {error}. Expected that "
                    "`call` uses the model it is given, not one from outside; pass others, such as nnx.Rngs, as inputs."
                ) from error
            _, _, rest = nnx.split((copy, others), self._is_parameter, ...)
            return outputs, {"state": rest}

        rest = jax.tree.map(lambda leaf: leaf, rest)  # else it moves with the model, and what is lazy sees that
        own = params.get(_MODEL, nnx.State({}))
        return _Bound(Model(function, own, {"state": rest}, name, root=name), inputs, (model, objects))

    def _is_parameter(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether a Variable of the model and the objects beside it is a parameter of the model."""
        return path[0] == _MODEL and nnx.filterlib.to_predicate(self.wrt)(path[1:], value)


_MODEL = 0
"""The place of the model in front of the objects that are passed beside it."""


class _Bound(NamedTuple):
    """A model as a function, what it is called with, and the objects whose state moves."""

    model: Model
    inputs: Inputs
    objects: Any


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Place:
    """Where an object of NNX stood among the inputs: its arrays are state, not inputs."""

    number: int

    @staticmethod
    def of(leaf: Any, objects: list[Any]) -> Any:
        """The place of an object, which goes to the others; anything else as it is."""
        if not _is_object(leaf):
            return leaf
        objects.append(leaf)
        return _Place(len(objects) - 1)

    @staticmethod
    def stands(leaf: Any) -> bool:
        """Whether it is a place."""
        return isinstance(leaf, _Place)

    @staticmethod
    def filled(leaf: Any, objects: list[Any]) -> Any:
        """The object of a place; anything else as it is."""
        return objects[leaf.number] if isinstance(leaf, _Place) else leaf


def _is_object(leaf: Any) -> bool:
    return isinstance(leaf, (nnx.Pytree, nnx.Variable))


def _check(model: Any) -> None:
    """Refuse what is no model, and Variables that cannot be differentiated."""
    name, objects = type(model).__name__, jax.tree.leaves(model, is_leaf=_is_object)
    if not any(map(_is_object, objects)):
        raise TypeError(
            f"`model` is of class {name}; expected a flax.nnx.Module, such as nnx.Linear(4, 3, rngs=...). "
            "For linen use `ng.linen.capture`, for a function `ng.capture`."
        )
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Variable)):
        for setting in ("hijax", "ref"):
            if variable.get_metadata().get(setting):
                raise TypeError(
                    f"The Variable '{'/'.join(map(str, path))}' of {name} was made with `{setting}=True`; NNX does not "
                    "differentiate such Variables yet. Expected ordinary ones: make the model without that setting."
                )


def _call(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)
