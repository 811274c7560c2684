"""One forward pass, two pullbacks: what the watching of a model has in common, whatever the framework.

    1  outputs, pullback <- vjp of the forward pass in (parameters, probes)      once per step
    2  gradient <- pullback(derivative of the objective)                         once per step
    3  g, gradient <- pullback(seed)                                             where the curvature is called

A probe is a zero added to the output of a layer: its cotangent is the layer's g. The residuals of the pullback exist
for line 2 anyway, so a `lax.cond` branch that closes over it gets line 3 for one backward pass, and a step that skips
the branch pays nothing. A seed stands for one draw of labels: its outer product with itself is, in expectation, the
Hessian of the likelihood by the outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.base import Array, Evidence, Layer, Layers
from natgrad_jax.layers import KINDS
from natgrad_jax.layers.pieces import is_spread
from natgrad_jax.layers.rows import row_gradient
from natgrad_jax.losses import Likelihood, example_weights, present, spread, total_weight, wide
from natgrad_jax.watch.norms import Batch, gradients_of_examples
from natgrad_jax.watch.problem import Evaluation, Forward, Problem, no_argument
from natgrad_jax.watch.reading import Reading, parts_of
from natgrad_jax.watch.scaled import along, precise, scaled
from natgrad_jax.watch.segments import by_example, weights_of
from natgrad_jax.watch.space import Space
from natgrad_jax.watch.strides import floor


@dataclass(frozen=True, eq=False, repr=False)
class Curvature:
    """The curvature of one batch, computed where it is called.

    `curvature()` is the evidence at the parameters of this step, {layer: Evidence}; call it inside a `lax.cond`
    branch and the other branch pays nothing. `curvature(params)` is the evidence of the same batch, with the same
    labels drawn, at other parameters.
    """

    _problem: Problem
    _forward: Forward
    _params: Tree
    _passed: "_Pass"
    _batch: "_Batch"
    _value: Array
    _ordinary: tuple[Tree, Tree] | None
    _few: Callable[[], Forward] | None = None

    dtype = no_argument

    @property
    def layers(self) -> Layers:
        """The layers that the evidence is of."""
        return self._forward.layers

    @property
    def labels(self) -> str:
        """Whose cotangents the evidence has: "sampled", "exact", "true" or "forward"."""
        return self._problem.label

    @property
    def count(self) -> Array:
        """W, the total weight of the examples."""
        return total_weight(self._batch.weights, self._forward.examples)

    @property
    def floor(self) -> Array | None:
        """What the loss cannot fall below, where products are of a part of the batch; None elsewhere, or if unknown."""
        return floor(self._problem, self._batch.weights)

    def __call__(self, params: Tree | None = None) -> dict[str, Evidence]:
        """The evidence of the batch.

        Args:
            params: where; the parameters of this step if None, and for every leaf that a mask took away.

        Returns:
            {name: Evidence} for every known layer and every remaining parameter.

        Raises:
            ValueError: if the parameters are of another model.
        """
        passed = self._passed if params is None else _run(self._forward, self._at(params))
        if self._problem.labels == "forward":
            return self._forward_only(passed)
        seeds, slopes = self._seeds(passed)
        if self._ordinary is not None and params is None:
            ordinary = jax.tree.map(lambda x: x[None] * self._forward.examples, self._ordinary)
            return self._evidence(passed, *ordinary, slopes=slopes, seeds=seeds, pulled_outside=True)
        return self._evidence(passed, *_pull_each(passed.pullback, seeds), slopes=slopes, seeds=seeds)

    def along(self, direction: Tree) -> Array:
        """J times a direction at the outputs of the batch, with R^T of the likelihood applied.

        The dot product of two such vectors is u^T F v, in the scale of F, with the exact Hessian of the likelihood
        (weights included), whatever `labels` is. Of a capture with a `product_stride` it is that of some examples.

        Args:
            direction: a tree like the parameters; it is zero where a mask took leaves away.

        Returns:
            An array of the shape of the outputs that the likelihood reads.
        """
        problem, (forward, weights) = self._problem, self._of_products()
        direction = addresses.replace(jax.tree.map(jnp.zeros_like, self._params), self._known(direction))

        def outputs_at(params):
            return problem.read(forward.run(params, forward.probes)[0])

        outputs, tangent = along(forward, outputs_at, self._params, direction)
        outputs, tangent = present(wide(outputs), weights), present(wide(tangent), weights)
        count = total_weight(weights, forward.examples).astype(outputs.dtype)
        scale = self._root_weights(outputs, weights) / jnp.sqrt(jnp.where(count > 0, count, 1))
        return scale * problem.likelihood.root_transpose(outputs, tangent)

    def _of_products(self) -> tuple[Forward, Array | None]:
        """The watched model on the examples that products are of, and their weights."""
        weights = self._batch.weights
        if self._few is None:
            return self._forward, weights
        weights = None if weights is None else weights[:: self._problem.product_stride]
        return _harmless(self._few(), weights), weights

    def space(self) -> Space:
        """The batch as the rows of the Jacobian, of which nothing is kept; of a capture with `jacobian="examples"`."""
        seeds, _ = self._seeds(self._passed)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(self._params))
        root = jnp.sqrt(len(jax.tree.leaves(seeds)[0]) * jnp.where(self.count > 0, self.count, 1).astype(dtype))

        def outputs(params):
            return addresses.parted(self._forward.run(params, self._forward.probes)[0], _sort)[0]["float"]

        return Space(self._forward, self._params, outputs, lambda g: self._passed.pullback(g)[0], seeds, root)

    def _root_weights(self, outputs: Array, weights: Array | None) -> Array:
        """The roots of the weights and of a position's share of the loss, as they go with the outputs."""
        share = jnp.asarray(self._problem.likelihood.share(outputs) ** 0.5, outputs.dtype)
        if weights is None:
            return share
        return share * jnp.sqrt(jnp.abs(spread(weights, outputs.ndim))).astype(outputs.dtype)

    def _at(self, params: Tree) -> Tree:
        """Other parameters, those of this step where a mask took leaves away."""
        return addresses.replace(self._params, self._known(params))

    def _known(self, tree: Tree) -> dict[str, Array]:
        """The leaves of a tree like the parameters, by address; those of another tree are refused."""
        leaves, own = addresses.flatten(tree), addresses.flatten(self._params)
        if unknown := sorted(leaves.keys() - own):
            raise ValueError(
                f"`out.curvature` is asked about {unknown}, which are no parameters of the model; it has "
                f'{sorted(own)}. Expected a tree like the parameters, `variables["params"]` of linen.'
            )
        return leaves

    def value(self, params: Tree | None = None) -> Array:
        """The objective on the same batch at other parameters, a scalar.

        Args:
            params: where; the parameters of this step if None, and for every leaf that a mask took away.

        Returns:
            The mean loss; that of the step is not computed again.
        """
        if params is None:
            return self._value
        outputs = self._forward.run(self._at(params), self._forward.probes)[0]
        return self._problem.value(precise(outputs), self._batch.targets, self._batch.weights)

    def value_and_slope(self, params: Tree, direction: Tree) -> tuple[Array, Array]:
        """The objective on the same batch at other parameters, and its derivative along a direction there.

        Args:
            params: where.
            direction: a tree like them.

        Returns:
            Two scalars.
        """
        return along(self._forward, self.value, params, direction)

    def _seeds(self, passed: "_Pass") -> tuple[Any, Array]:
        """Cotangents of the outputs, one for each draw: [K, *outputs], the weights by their square roots; slopes."""
        outputs, back = jax.vjp(lambda floats: self._problem.read(passed.whole(floats)), precise(passed.floats))
        read, weights = present(wide(outputs), self._batch.weights), self._batch.weights
        scale = self._root_weights(read, weights)
        if self._problem.labels == "exact":
            seeds = self._exact_seeds(read)
        else:
            likelihood = self._problem.likelihood
            seeds = jax.vmap(lambda targets: _score(likelihood, read, present(targets, weights)))(self._targets())
        seeds = jax.vmap(lambda seed: scale * seed)(seeds)
        slopes = jnp.sum(seeds**2, axis=range(2, seeds.ndim))
        return jax.vmap(lambda seed: back(seed.astype(outputs.dtype))[0])(seeds), slopes

    def _targets(self) -> Array:
        """The targets of each draw [K, ...]: the true ones, or labels drawn at the parameters of this step."""
        if self._problem.labels == "true":
            return jnp.asarray(self._batch.targets)[None]
        outputs = present(wide(self._problem.read(self._passed.outputs)), self._batch.weights)
        assert self._batch.key is not None, "checked in `evaluate`"
        keys = jax.random.split(self._batch.key, self._problem.draws)
        return jax.vmap(lambda key: self._problem.likelihood.sample(key, outputs))(keys)

    def _exact_seeds(self, outputs: Array) -> Array:
        """The columns of R, of every position by itself, each example with a random sign.

        There are as many as one example has outputs, scaled so that their MEAN square is H. The signs leave the
        curvature of an example as it is; they make the summed gradient unbiased for what is estimated from it.
        """
        columns = outputs[0].size
        units = jnp.eye(columns, dtype=outputs.dtype).reshape((columns, 1) + outputs.shape[1:]) * columns**0.5
        key = jax.random.key(0) if self._batch.key is None else self._batch.key
        signs = jax.random.rademacher(key, (columns, outputs.shape[0]), outputs.dtype)
        vectors = units * spread(signs, units.ndim)
        return jax.vmap(lambda vector: self._problem.likelihood.root(outputs, vector))(vectors)

    def _evidence(
        self,
        passed: "_Pass",
        gradients: Tree,
        cotangents: Tree | None,
        *,
        slopes: Array | None = None,
        seeds: Sequence[Array] = (),
        pulled_outside: bool = False,
    ) -> dict[str, Evidence]:
        """The evidence of every block; the leaves of `gradients` lead with K."""
        each = self._each(passed, seeds)
        weights = None if self._batch.weights is None else jnp.abs(self._batch.weights)
        leaves = addresses.flatten(gradients)
        count = total_weight(weights, self._forward.examples)
        there = None if weights is None else example_weights(weights)
        evidence = {}
        for layer in self._forward.layers.blocks:
            gradient = {leaf.role: leaves[leaf.address] for leaf in layer.leaves}
            if not layer.is_known:
                own = {leaf.role: each[leaf.address] for leaf in layer.leaves} if each else None
                if layer.kind == "norm":
                    assert cotangents is not None, "there are no norms without"
                    batch = Batch(self._forward.examples, there, self._forward.segments)
                    touches, records = self._forward.norms[layer.name], passed.inputs[layer.name]
                    own = gradients_of_examples(layer, touches, records, cotangents[layer.name], batch)
                evidence[layer.name] = Evidence(None, None, gradient, weights, count, slopes, own)
                continue
            uses = self._forward.calls[layer.name]
            calls = tuple(self._read(use.inputs, x) for use, x in zip(uses, passed.inputs[layer.name], strict=True))
            calls = _there(calls, there, layer.module_axes)
            parts = [(use, parts_of(call.outputs)) for use, call in zip(layer.uses, uses, strict=True)]
            own = weights_of(parts, self._forward.segments, self._forward.examples, weights)
            if cotangents is None:
                evidence[layer.name] = Evidence(calls, weights=own, count=count)
                continue
            seen = tuple(self._read(use.outputs, g, 1) for use, g in zip(uses, cotangents[layer.name], strict=True))
            seen = _there(seen, there, 1 + layer.module_axes)
            found = Evidence(calls, seen, gradient, own, count, slopes)
            evidence[layer.name] = found if pulled_outside else _from_rows(layer, found)
        return evidence

    def _each(self, passed: "_Pass", seeds: Sequence[Array]) -> dict[str, Array]:
        """The gradients of the examples by the remaining parameters, {address: [K, N, *shape]}."""
        rest, each = self._forward.layers.rest, self._forward.each
        if each is None or not rest or not len(seeds):
            return {}
        return {name: jnp.swapaxes(leaf, 0, 1) for name, leaf in each(passed.params, rest, seeds).items()}

    def _read(self, reading: Callable[..., Array], array: Array, front: int = 0) -> Array:
        """An array of the program as evidence has it, the rows of parts as those of their examples."""
        found = reading(array, front)
        if not (parts := parts_of(reading)):
            return found
        assert isinstance(reading, Reading), "others have none"
        return by_example(found, self._forward.segments[parts], self._forward.examples, front + reading.place)

    def _forward_only(self, passed: "_Pass") -> dict[str, Evidence]:
        """The evidence with g = identity: no pullback; the Fisher block of a remaining parameter is then I."""
        count = total_weight(self._batch.weights, self._forward.examples)
        ones = jax.tree.map(lambda leaf: jnp.full((1, *leaf.shape), count, leaf.dtype) ** 0.5, self._params)
        return self._evidence(passed, ones, None)


class _Pass(NamedTuple):
    """A forward pass and its pullback: cotangents of the `precise` outputs -> (gradient, cotangents of the probes).

    Outputs that are no floating-point numbers have no cotangents: `floats` are the others, and `whole` puts these among
    them again.
    """

    outputs: Any
    floats: list[Array]
    whole: Callable[[list[Array]], Any]
    pullback: Callable[[list[Array]], tuple[Tree, Tree]]
    inputs: dict[str, tuple[Array, ...]]
    updated: Mapping[str, Any]
    params: Tree


class _Batch(NamedTuple):
    """What goes with the inputs of a batch."""

    targets: Any
    weights: Array | None
    key: Array | None


def evaluate(
    problem: Problem,
    forward: Forward,
    params: Tree,
    targets: Any,
    weights: Array | None,
    key: Array | None,
    share: Callable[[Array], Array] | None = None,
    few: Callable[[], Forward] | None = None,
) -> Evaluation:
    """Loss, gradient and lazy curvature of one batch, from one forward pass.

    Args:
        problem: what is asked.
        forward: the watched model on the batch.
        params: the parameters.
        targets: the labels of the batch.
        weights: of examples or positions, or None.
        key: for drawing labels.
        share: W -> by what the gradient is multiplied, where the batch is a part of one; None for nothing.
        few: makes the watched model on the examples that products with F are of; None where these are all.

    Returns:
        The evaluation.

    Raises:
        ValueError: if targets, weights or key do not fit.
    """
    problem = replace(problem, labels=forward.layers.labels or problem.labels)
    weights = None if weights is None else wide(jnp.asarray(weights))
    forward = _harmless(forward, weights)
    passed = _run(forward, params)  # 1
    _check(problem, passed.outputs, targets, weights, key)
    value, seed = jax.value_and_grad(lambda floats: problem.value(passed.whole(floats), targets, weights))(
        precise(passed.floats)
    )
    if share is not None:  # before the pullback, which may lead to the other parts
        of_batch = share(total_weight(weights, forward.examples))
        seed = jax.tree.map(lambda leaf: leaf * of_batch.astype(leaf.dtype), seed)
    ordinary = passed.pullback(seed)  # 2
    grad, _ = ordinary
    alike = problem.labels == "true" and problem.likelihood.share(problem.read(passed.outputs)) == 1
    reusable = alike and problem.objective is None and weights is None and share is None
    batch = _Batch(targets, weights, key)
    curvature = Curvature(problem, forward, params, passed, batch, value, ordinary if reusable else None, few)
    if problem.devices is not None:
        grad = _scattered(curvature, problem.devices, *ordinary)
    return Evaluation(value, grad, curvature, passed.outputs, passed.updated)


def _harmless(forward: Forward, weights: Array | None) -> Forward:
    """The watched model with examples of weight zero made harmless."""
    if weights is None or forward.masked is None or weights.shape[:1] != (forward.examples,):
        return forward
    run, each = forward.masked(weights)
    return forward._replace(run=run, each=each)


def _scattered(curvature: Curvature, devices: Devices, gradient: Tree, cotangents: Tree) -> Tree:
    """The gradient, that of scanned layers from their rows: of these each device sums its copies, and has only them.

    In the loop of a scan the gradient of one copy is summed by all devices; its rows leave the loop unsummed.
    """
    draws = jax.tree.map(lambda leaf: leaf[None], (gradient, cotangents))
    evidence = curvature._evidence(curvature._passed, *draws, pulled_outside=True)
    leaves = addresses.flatten(gradient)
    for layer in curvature.layers.known:
        layer = replace(layer, devices=devices)
        if layer.module_axes and devices.divide(layer.stack) and is_spread(layer, evidence[layer.name]):
            found = row_gradient(layer, evidence[layer.name])
            for leaf in layer.leaves:
                leaves[leaf.address] = found[leaf.role].astype(leaves[leaf.address].dtype)
    return addresses.replace(gradient, leaves)


def evidence_for(
    problem: Problem, forward: Forward, params: Tree, seed_of: Callable[[Array], Array]
) -> dict[str, Evidence]:
    """The evidence that one cotangent of what the likelihood reads gives, whatever the likelihood.

    Args:
        problem: what is asked; its readout is used.
        forward: the watched function.
        params: where.
        seed_of: what the likelihood reads -> the cotangent.

    Returns:
        {name: Evidence} of every block, with one draw; gradients as autodiff has them.
    """
    passed = _run(forward, params)
    read, back = jax.vjp(lambda floats: problem.read(passed.whole(floats)), precise(passed.floats))
    seeds = jax.tree.map(lambda leaf: leaf[None], back(seed_of(read))[0])
    curvature = Curvature(problem, forward, params, passed, _Batch(None, None, None), jnp.zeros(()), None)
    return curvature._evidence(passed, *_pull_each(passed.pullback, seeds), pulled_outside=True)


def _run(forward: Forward, params: Tree) -> _Pass:
    static: dict[str, Any] = {}

    def run(params, probes):
        outputs, aux = forward.run(params, probes)
        parts, static["whole"] = addresses.parted(outputs, _sort)
        static["plain"] = parts["plain"]
        return parts["float"], (parts["other"], aux)

    floats, pullback, (others, (inputs, updated)) = jax.vjp(run, params, forward.probes, has_aux=True)
    pullback = scaled(pullback, floats) if forward.half else pullback

    def whole(floats):
        return static["whole"]({"float": floats, "other": others, "plain": static["plain"]})

    return _Pass(whole(floats), floats, whole, pullback, inputs, updated, params)


def _sort(leaf: Any) -> str:
    """Whether a leaf of the outputs has a cotangent, is another array, or is none."""
    if not hasattr(leaf, "dtype"):
        return "plain"
    return "float" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "other"


def _check(problem: Problem, outputs: Any, targets: Any, weights: Array | None, key: Array | None) -> None:
    read = problem.read(outputs)
    if problem.objective is None or problem.labels == "true":
        complaint = problem.likelihood.check(read, jnp.asarray(targets))
        if complaint:
            raise ValueError(f"{problem.likelihood.name}: {complaint}.")
    per_label = weights is not None and weights.ndim == read.ndim > _axes_of_terms(problem.likelihood, read)
    if weights is not None and (per_label or weights.shape != read.shape[: weights.ndim]):
        raise ValueError(
            f"`weights` of shape {weights.shape} do not fit outputs of shape {read.shape}; expected leading axes of "
            f"these, {read.shape[:1]} for examples or more for positions, without the classes of one label."
        )
    if problem.labels == "sampled" and key is None:
        raise ValueError(
            '`key` is None, but `labels="sampled"` draws labels; pass a new `key=jax.random.key(...)` at each step.'
        )


def _axes_of_terms(likelihood: Likelihood, read: Array) -> int:
    """How many axes the terms of the loss have: one less than the outputs where a label has its classes in the last."""
    return jax.eval_shape(lambda z: likelihood.terms(z, likelihood.sample(jax.random.key(0), z)), wide(read)).ndim


def _pull_each(pullback: Callable[[Any], tuple[Tree, Tree]], seeds: Any) -> tuple[Tree, Tree]:
    """The pullback of each seed, stacked: seeds [K, ...] -> results that lead with K."""
    (draws,) = {leaf.shape[0] for leaf in jax.tree.leaves(seeds)}
    if draws > 1:
        return jax.vmap(pullback)(seeds)
    return jax.tree.map(lambda x: x[None], pullback(jax.tree.map(lambda x: x[0], seeds)))


def _from_rows(layer: Layer, evidence: Evidence) -> Evidence:
    """The evidence with its gradient as a product of rows, on a CPU, for kinds whose own gradient is slow there."""
    from_rows = KINDS[layer.kind].gradient
    if from_rows is None or any(use.part is not None for use in layer.uses):
        return evidence

    def as_it_is(evidence):  # in the dtype of the rows, as the other
        return {role: leaf.astype(layer.dtype) for role, leaf in evidence.gradient.items()}

    gradient = jax.lax.platform_dependent(evidence, cpu=partial(from_rows, layer), default=as_it_is)
    return evidence._replace(gradient=gradient)


def _there(values: tuple[Array, ...], weights: Array | None, axis: int) -> tuple[Array, ...]:
    """Arrays with zeros for the examples of weight zero [N], which stand along an axis."""
    return tuple(jnp.moveaxis(present(jnp.moveaxis(leaf, axis, 0), weights), 0, axis) for leaf in values)


def _score(likelihood: Likelihood, outputs: Array, targets: Array) -> Array:
    """Derivative of the summed negative log-likelihood by the outputs."""
    return jax.grad(lambda z: jnp.sum(likelihood.terms(z, targets)))(outputs)
