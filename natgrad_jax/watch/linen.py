"""Watching a Flax linen model, without touching it.

The model is traced as the function that `model.apply` is, and watched by what it does with its parameters: whatever
modules they are in, and whatever transformation (`nn.remat`, `nn.jit`, `nn.scan`, `nn.vmap`, `nn.RNN`, ...) is around.
A layer has the name of the module that holds its kernel. Collections other than "params" are written as `model.apply`
would write them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from natgrad_jax import checks
from natgrad_jax.base import Array, Layers
from natgrad_jax.losses import Likelihood
from natgrad_jax.watch.doors import Inputs, JacobianOf, Labels, Model, Watch, asked, called
from natgrad_jax.watch.problem import Evaluation
from natgrad_jax.watch.segments import Segments


def capture(
    model: nn.Module,
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
    """Watch a linen model: its layers, and for each batch loss, gradient and curvature from one forward pass.

    Args:
        model: the model; it is not changed.
        likelihood: one of `losses`: what the outputs say about the targets, and the source of labels.
        labels: whose cotangents measure curvature. "sampled": labels drawn from the model, the Fisher matrix by
            Monte Carlo. "exact": every column of the root of the output Hessian, the Fisher matrix without sampling
            noise, at as many pullbacks as one example has outputs. "true": the labels of the batch, the empirical
            Fisher matrix; if there are neither weights nor an `objective`, without a second pullback. "forward": the
            identity, no pullback at all. None: "exact" where an example has one output, which costs one pullback as
            well, else "sampled"; `print(layers)` says which.
        draws: label samples per example, averaged.
        objective: what is differentiated instead of the likelihood: outputs, targets, weights -> scalar mean loss.
        readout: which array of the model's output the likelihood reads, if the model returns more than one.
        exclude: layers (by name or the name of a parent) to treat as unknown.
        microbatches: into how many pieces a batch is cut, which are evaluated one after the other: gradient, statistics
            and steps are those of the whole batch, in the memory that the activations of a piece take. A step with
            statistics costs a forward pass more. Positional inputs, targets and weights are cut along their first axis;
            keyword arguments serve every piece as they are, `rngs` folded with its number. Batch normalisation has the
            moments of a piece, as in any accumulation.
        verify: whether `layers` compares what it found with autodiff, at perturbed parameters and for random cotangents
            of the outputs: one compiled pass. A layer whose products do not explain its gradient gets diagonal blocks.
        axis_name: of the axis of `jax.pmap` or `jax.shard_map` over which a batch is spread by hand. Loss, gradient and
            curvature are then those of the batch of all replicas, the same on each, and labels are drawn independently;
            do not average the gradient again. `outputs` and `updated` stay those of the replica. `layers` is called
            outside, on a batch of the size of all. Not for `jax.jit` with a sharded batch, which needs no name. ()
            where each replica is a training by itself: it has to be said where JAX keeps no count of what they share.
        jacobian: "rows": the gradients of the examples are those of the rows of the layers. "examples": the model is
            watched one example at a time. For TENGraD every parameter then counts, also of no known layer, and for all
            methods derivatives by the inputs (the residual of a differential equation) are uses of the layers: primal,
            tangents and cotangents. Refused by `layers` where outputs depend on other examples (batch normalisation).
        segments: for examples that are graphs, or sequences end to end: the positional inputs -> integers [M], for each
            of the M nodes (or steps) the example that it belongs to, or a tuple of such for nodes and edges. Others
            than 0 to N - 1 belong to none, as what fills a batch up. Outputs have the N examples in front. Methods then
            see N times the rows, which is meant for small graphs.
        product_stride: k, for steps that choose themselves (no learning rate, "quadratic", an adaptive damping) on
            large batches: products with F are of every k-th example. Martens and Grosse (2015), section 8, have a
            fourth of a batch. Gradient, statistics and tests stay those of the whole one. Positional inputs lead with
            the examples. Batch normalisation has the moments of these examples then, and dropout another mask.

    Returns:
        A `Capture`, with `layers` and `value_and_grad`.

    Raises:
        TypeError: if `model` or `likelihood` is of another type.
        ValueError: if `labels` or `draws` is unknown.
    """
    if not isinstance(model, nn.Module):
        what = repr(model) if isinstance(model, type) else type(model).__name__
        advice = ""
        if isinstance(model, nnx.Module):
            advice = " For Flax NNX use `ng.nnx.capture`."
        elif isinstance(getattr(model, "module", None), nn.Module):
            advice = " It has one: pass that, its `module`, and its parameters as `{'params': ...}`."
        raise TypeError(f"`model` is {what}; expected a flax.linen.Module instance, such as nn.Dense(10).{advice}")
    how = (microbatches, verify, axis_name, jacobian, segments, product_stride)
    watch = asked(likelihood, labels, draws, objective, readout, exclude, *how)
    return Capture(model, watch)


@dataclass(frozen=True)
class Capture:
    """A watched model; made by `capture`."""

    model: nn.Module
    watch: Watch

    def layers(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Layers:
        """The layers that the model has on such inputs.

        >>> import jax, jax.numpy as jnp, natgrad_jax as ng
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
        Curvature by labels drawn from the model (labels="sampled"), noisy and without bias.

        Args:
            variables: of the model, "params" among them; shapes suffice.
            *args: a batch of inputs as the model is called with; shapes suffice.
            **kwargs: further arguments of `model.apply`, such as `train`, `rngs`, `method`.

        Returns:
            The layers and the remaining parameters; `print` it.

        Raises:
            TypeError: if the model returns what JAX does not know.
            ValueError: if there are no parameters, or `exclude` excludes nothing.
        """
        return self.watch.layers(*self._called(variables, Inputs(*args, **kwargs)))

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
            inputs: what the model is called with; a tuple stands for several positional arguments, `ng.Inputs` for any.
            targets: labels of the batch, as the likelihood wants them.
            key: for drawing labels; a new one for each step.
            weights: of the examples [N] or of their positions [N, T]; zeros mask.
            **apply_kwargs: further arguments of `model.apply`: `rngs`, `method`, `train`, ...; `mutable` names
                collections to write beside those in `variables`.

        Returns:
            An `Evaluation`.

        Raises:
            TypeError: if the model does not return what the likelihood can read.
            ValueError: if targets, weights or key do not fit.
        """
        return self.watch.evaluate(*self._called(variables, called(inputs, apply_kwargs)), targets, key, weights)

    def _called(self, variables: Mapping[str, Any], inputs: Inputs) -> tuple[Model, Inputs]:
        """The model as a function of its parameters and its other collections, and what that is called with."""
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"`variables` is {checks.shown(variables)}; expected the mapping that `model.init` returned, and the "
                "inputs behind it."
            )
        if "params" not in variables:
            raise ValueError(
                f'`variables` has the collections {sorted(variables)} but no "params"; pass what `model.init` returned.'
            )
        if not jax.tree.leaves(variables["params"]):
            raise ValueError('`variables["params"]` has no arrays; pass what `model.init` returned.')
        others = {name: value for name, value in variables.items() if name != "params"}
        options = dict(inputs.kwargs)
        written = [*others, *_names(options.pop("mutable", ()))]

        def function(params, others, given):
            args, options = given
            return self.model.apply({"params": params, **others}, *args, mutable=written, **options)

        name = type(self.model).__name__
        model = Model(function, variables["params"], others, name, root=name)
        return model, Inputs(*inputs.args, **options)


def _names(mutable: Any) -> list[str]:
    """The collections that the caller wants written."""
    if mutable is True:
        raise TypeError("`mutable` is True; expected the names of the collections to write, such as ['intermediates'].")
    return [mutable] if isinstance(mutable, str) else list(mutable or ())
