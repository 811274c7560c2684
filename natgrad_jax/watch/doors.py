"""What all doors have in common: linen, NNX, plain functions.

A door says which function of parameters, state and inputs a model is. Here it is watched: its layers, verified, and
for each batch loss, gradient and curvature.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax

from natgrad_jax import checks
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra import meshes, trees
from natgrad_jax.base import Array, Layers
from natgrad_jax.losses import Likelihood
from natgrad_jax.watch import common
from natgrad_jax.watch.examples import watch_examples
from natgrad_jax.watch.meshes import evaluated
from natgrad_jax.watch.microbatches import in_pieces
from natgrad_jax.watch.problem import Evaluation, Forward, Problem
from natgrad_jax.watch.recognise import Exceptions
from natgrad_jax.watch.replicas import Axis, Replicas, averaged, bound, refuse_unsaid, share_of
from natgrad_jax.watch.segments import Segments
from natgrad_jax.watch.strides import every
from natgrad_jax.watch.traced import Function, watch
from natgrad_jax.watch.verify import UNKNOWN, verdict

Labels = Literal["sampled", "exact", "true", "forward"]
JacobianOf = Literal["rows", "examples"]


class Inputs:
    """What a model is called with, where one array or a tuple of positional ones will not do.

    `capture.value_and_grad(params, ng.Inputs(x, key=k), y)` calls the model with `(x, key=k)`, whatever the names are.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs


class Model(NamedTuple):
    """What a door makes of a model.

    Attributes:
        function: parameters, state, (args, kwargs) -> outputs, what was written.
        params: the parameters.
        state: {name: what it reads beside them}; what is written under the same name is read by the next piece.
        name: in words.
        root: the name of a layer whose kernel stands at the top; "" for its address.
    """

    function: Function
    params: Tree
    state: Mapping[str, Any]
    name: str
    root: str = ""


@dataclass(frozen=True)
class Watch:
    """What is asked of a model.

    Attributes:
        problem: the source of labels, what is differentiated, how curvature is measured.
        exclude: layers to treat as unknown.
        microbatches: into how many pieces a batch is cut.
        verify: whether `layers` compares what it found with autodiff.
        axis_name: of the replicas that a batch is spread over by hand; () for none, None where that was not said.
        unexplained: {layer: why} of those that it found to be seen wrongly.
    """

    problem: Problem
    exclude: tuple[str, ...] = ()
    microbatches: int = 1
    verify: bool = True
    axis_name: Axis | None = None
    unexplained: dict[str, str] = field(default_factory=dict, compare=False)

    def layers(self, model: Model, inputs: Inputs) -> Layers:
        """The layers of a model on such inputs.

        Args:
            model: the model; shapes of parameters suffice.
            inputs: a batch; shapes suffice.

        Returns:
            The layers, those that do not explain their gradient left out.
        """
        if mesh := meshes.explicit(model.params, model.state, inputs.args, inputs.kwargs):
            with meshes.within(mesh):
                params, state, args, kwargs = meshes.entered((model.params, model.state, inputs.args, inputs.kwargs))
                return self.layers(model._replace(params=params, state=state), Inputs(*args, **kwargs))
        forward = self._forward(model, inputs.args, inputs.kwargs)
        given = (model.state, inputs.args, inputs.kwargs)
        found = verdict(self.problem, forward, model.params, given) if self.verify else UNKNOWN
        if found.wrong:
            self.unexplained.update(found.wrong)
            warnings.warn(
                f"Not preconditioned as layers, since their products do not explain their gradients: {found.wrong}. "
                "Each parameter of them gets a diagonal Fisher block. Please report the model.",
                stacklevel=3,
            )
            forward = self._forward(model, inputs.args, inputs.kwargs)
        alone = [layer.name for layer in forward.layers.rest if layer.kind == "parameter"]
        if alone and not forward.layers.known:
            warnings.warn(
                f"{model.name} has no layer that natgrad_jax can watch: every parameter gets a diagonal Fisher block: "
                f"{', '.join(alone)}.",
                stacklevel=3,
            )
        return replace(forward.layers, mixed=found.mixed)

    def evaluate(
        self, model: Model, inputs: Inputs, targets: Any, key: Array | None, weights: Array | None
    ) -> Evaluation:
        """Loss, gradient and lazy curvature of one batch.

        Args:
            model: the model.
            inputs: the batch; keyword arguments serve every piece as they are.
            targets: labels of the batch.
            key: for drawing labels.
            weights: of examples or positions.

        Returns:
            The evaluation.
        """
        if self.problem.objective is None or self.problem.labels == "true":
            checks.array("targets", targets, "an array of labels, one for each example")
        if weights is not None:
            checks.array("weights", weights, "an array of real numbers, one for each example or position")
        checks.key(key)
        batch = (inputs.args, inputs.kwargs, targets, key, weights)
        if mesh := meshes.explicit(model.params, model.state, batch):

            def evaluate(params, state, batch):
                args, kwargs, *others = batch
                return self.evaluate(model._replace(params=params, state=state), Inputs(*args, **kwargs), *others)

            return evaluated(mesh, evaluate, model.params, model.state, batch, self.problem.devices)
        if self.axis_name is None:
            refuse_unsaid()
        if not self.axis_name:
            return self._evaluate(model, inputs, targets, key, weights)
        axis, count = self.axis_name, bound(self.axis_name)
        if key is None and self._labels(model, inputs) == "exact":
            key = jax.random.key(0)  # of the signs, which are to be independent
        key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(axis))
        mine = model._replace(params=trees.own(model.params, axis), state=trees.own(model.state, axis))
        found = self._evaluate(mine, inputs, targets, key, weights)
        local = found.curvature
        value = averaged(found.value, local.count, axis)
        if self.microbatches == 1:  # each has its share already
            grad = jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis), found.grad)
        else:
            grad = averaged(found.grad, local.count, axis)
        layers = replace(local.layers, examples=count * local.layers.examples)
        total = jax.lax.psum(trees.own(local.count, axis), axis)
        return found._replace(value=value, grad=grad, curvature=Replicas(local, axis, total, value, layers))

    def _labels(self, model: Model, inputs: Inputs) -> str:
        """Whose cotangents the evidence will have."""
        return self.problem.labels or self._forward(model, inputs.args, inputs.kwargs).layers.labels

    def _evaluate(
        self, model: Model, inputs: Inputs, targets: Any, key: Array | None, weights: Array | None
    ) -> Evaluation:
        """Those of the batch that is here."""
        stride = self.problem.product_stride
        if self.microbatches == 1:
            forward = self._replica(self._forward(model, inputs.args, inputs.kwargs))

            def few():
                args = every(stride, inputs.args, inputs.kwargs, forward.examples)
                return self._replica(self._forward(model, args, inputs.kwargs))

            share = partial(share_of, axis=self.axis_name) if self.axis_name else None
            given = (targets, weights, key, share, few if stride > 1 else None)
            return common.evaluate(self.problem, forward, model.params, *given)

        def forward_of(args, state, number):
            options = dict(inputs.kwargs)
            if "rngs" in options:
                options["rngs"] = jax.tree.map(lambda rng: jax.random.fold_in(rng, number), options["rngs"])
            return self._replica(self._forward(model._replace(state=state), args, options))

        batch = (inputs.args, targets, weights)
        return in_pieces(self.problem, forward_of, model.params, model.state, *batch, key, self.microbatches)

    def _replica(self, forward: Forward) -> Forward:
        """With probes of this replica alone, whose cotangents are then not summed over all."""
        if not self.axis_name:
            return forward
        return forward._replace(probes=trees.own(forward.probes, self.axis_name))

    def _forward(self, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward:
        exceptions = Exceptions(self.exclude, self.unexplained)
        given = (args, dict(kwargs))
        watched = watch_examples if self.problem.jacobian == "examples" else watch
        return watched(model.function, model.params, model.state, given, self.problem, exceptions, model.root)


def asked(
    likelihood: Likelihood,
    labels: Labels | None,
    draws: int,
    objective: Callable[[Any, Any, Array | None], Array] | None,
    readout: Callable[[Any], Array] | None,
    exclude: Iterable[str],
    microbatches: int,
    verify: bool,
    axis_name: Axis | None,
    jacobian: JacobianOf,
    segments: Segments | None = None,
    product_stride: int = 1,
) -> Watch:
    """What is asked of a model, checked; the arguments are those of every `capture`."""
    checks.function("objective", objective, "a function of outputs, targets and weights that gives the mean loss", 3)
    checks.function("readout", readout, "a function of the outputs that gives the array which the likelihood reads", 1)
    readout = readout or (lambda outputs: outputs)
    checks.size("product_stride", product_stride)
    problem = Problem(likelihood, labels, draws, objective, readout, jacobian, segments, product_stride=product_stride)
    whole = microbatches == product_stride == 1 and axis_name is None and jacobian == "rows"
    if segments is not None and not whole:
        raise ValueError(
            "`segments` says whose the parts of a batch are that is whole and here; it goes with none of "
            f"`microbatches` ({microbatches}), `product_stride` ({product_stride}), `axis_name` ({axis_name!r}) and "
            f'`jacobian="examples"` ({jacobian!r}).'
        )
    checks.size("microbatches", microbatches)
    checks.flag("verify", verify)
    if not (axis_name is None or isinstance(axis_name, str) or _are_names(axis_name)):
        raise TypeError(
            f"`axis_name` is {axis_name!r}; expected the name that `jax.pmap(..., axis_name=...)` or the mesh of "
            "`jax.shard_map` gives the axis of the replicas, a tuple of such names, () where each replica is a "
            "training by itself, or None."
        )
    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    excluded = tuple(exclude) if several else (exclude,)
    if not all(isinstance(name, str) for name in excluded):
        raise TypeError(f"`exclude` is {checks.shown(exclude)}; expected names of layers or of their parents.")
    return Watch(problem, excluded, microbatches, verify, axis_name)


def _are_names(names: Any) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) for name in names)


def called(inputs: Any, kwargs: Mapping[str, Any]) -> Inputs:
    """What a model is called with: a tuple stands for positional arguments, a named tuple is one of them."""
    if isinstance(inputs, Inputs):
        return Inputs(*inputs.args, **{**inputs.kwargs, **kwargs})
    return Inputs(*(inputs if type(inputs) is tuple else (inputs,)), **kwargs)
