"""What the capture of the package says about small models, beside what the definitions say."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from flax import linen as nn
from one_layer import State, Walk

import natgrad_jax as ng
from natgrad_jax.algebra import averages
from natgrad_jax.base import Leaf
from natgrad_jax.layers.rows import gradient_matrix, input_moment, input_rows, output_moment, output_rows

LIKELIHOODS = {
    "squared_error": ng.losses.squared_error,
    "softmax_cross_entropy": ng.losses.softmax_cross_entropy,
    "sigmoid_binary_cross_entropy": ng.losses.sigmoid_binary_cross_entropy,
    "poisson": ng.losses.poisson,
}
ACTIVATIONS = {"linear": reference.linear, "tanh": nn.tanh}


class Watched(NamedTuple):
    """A model on one batch: what the package captured, and the dense Fisher block of every layer."""

    model: nn.Module
    likelihood: ng.losses.Likelihood
    params: Any
    x: Any
    y: Any
    layers: ng.Layers
    evidence: dict[str, ng.Evidence]
    blocks: dict[str, Any]


@cache
def _capture(model, likelihood, labels, draws):
    """A capture and its jitted evidence, compiled once for all tests that ask for the same."""
    capture = ng.linen.capture(model, likelihood, labels=labels, draws=draws)

    @jax.jit
    def evidence(params, x, y, key, weights):
        return capture.value_and_grad({"params": params}, x, y, key=key, weights=weights).curvature()

    return capture, evidence


def evidence_of(model, likelihood, params, x, y, *, labels="exact", draws=1, weights=None, seed=0):
    """The layers of a model, and its evidence on one batch."""
    capture, evidence = _capture(model, likelihood, labels, draws)
    return capture.layers({"params": params}, x), evidence(params, x, y, jax.random.key(seed), weights)


def watched(model, params, x, loss, *, labels="exact", weights=None) -> Watched:
    """Capture and definition side by side."""
    shape = jax.eval_shape(lambda params, x: model.apply({"params": params}, x), params, x).shape
    y = reference.targets(loss, shape, dtype=str(x.dtype))
    layers, evidence = evidence_of(model, LIKELIHOODS[loss], params, x, y, labels=labels, weights=weights)
    blocks = reference.fisher_blocks(model, params, tuple(layers), loss, x, y, weights)
    return Watched(model, LIKELIHOODS[loss], params, x, y, layers, evidence, blocks)


@cache
def mlp(activation="tanh", loss="squared_error", *, examples=7, copies=1, use_bias=True, dtype="float64") -> Watched:
    """The reference net 5-4-3-3 on random inputs; `copies` of each."""
    model = reference.MLP(activation=ACTIVATIONS[activation], use_bias=use_bias)
    x = reference.normal(examples, 5, seed=2, dtype=dtype).repeat(copies, axis=0)
    return watched(model, reference.random_params(model, x, dtype=dtype), x, loss)


@partial(jax.jit, static_argnums=0)
def factors(layers: ng.Layers, evidence):
    """A and G of every layer, {name: (A, G)}."""
    return {
        name: (input_moment(layer, evidence[name]), output_moment(layer, evidence[name]))
        for name, layer in layers.items()
    }


def factors_of(layer: ng.Layer, evidence: ng.Evidence):
    """A and G of one layer."""
    return factors(ng.Layers((layer,)), {layer.name: evidence})[layer.name]


@partial(jax.jit, static_argnums=0)
def rows_of(layer, evidence):
    """Rows a [S, N, T, I] and g [S, K, N, T, O]."""
    return input_rows(layer, evidence), output_rows(layer, evidence)


def gradients(layer: ng.Layer, evidence: ng.Evidence):
    """D of every draw and example, the sum over positions of a g^T: [S, K, N, I, O]."""
    rows, columns = (np.asarray(x, np.float64) for x in rows_of(layer, evidence))
    return np.einsum("...nti,...knto->...knio", rows, columns)


def summed(layer: ng.Layer, evidence: ng.Evidence):
    """The gradient summed over the examples, as a matrix for each draw, [S, K, I, O]."""
    return gradient_matrix(layer, evidence)


def captured_fisher(layer: ng.Layer, evidence: ng.Evidence):
    """E[vec(D) vec(D)^T] of what was captured, [S, I O, I O]."""
    vectors = gradients(layer, evidence)
    vectors = vectors.reshape(vectors.shape[:-2] + (-1,))
    return np.einsum("...knp,...knq->...pq", vectors, vectors) / (vectors.shape[-3] * float(evidence.count))


# Methods --------------------------------------------------------------------------------------------------------------


def prepared(walk: Walk, layer: ng.Layer, evidence: ng.Evidence, damping) -> State:
    """The state of a method after its first batch."""
    return walk.prepared(layer, evidence, damping)


state_of = jax.jit(prepared, static_argnums=(0, 1))
"""The same, compiled."""


def basis_and_scale(state):
    """Q = U (x) V [S, I O, I O], and the scale in it [S, I O]."""
    q = np.einsum(
        "...ik,...ol->...iokl", np.asarray(state.operator.basis.inputs), np.asarray(state.operator.basis.outputs)
    )
    scale = np.asarray(averages.mean(state.operator.scale))
    size = scale.shape[-2] * scale.shape[-1]
    return q.reshape(scale.shape[:-2] + (size, size)), scale.reshape(scale.shape[:-2] + (size,))


@partial(jax.jit, static_argnums=(0, 1))
def operators(walk: Walk, layers: ng.Layers, evidence, damping):
    """What a method multiplies the gradient of each layer with after its first batch: {name: [S, I O, I O]}."""

    def of_layer(name, layer):
        state = walk.prepared(layer, evidence[name], damping[name])
        apply = partial(walk.apply, layer, state, damping=damping[name])
        return reference.operator(apply, layer.shape, layer.stack, layer.dtype)

    return {name: of_layer(name, layer) for name, layer in layers.items()}


def operator(walk: Walk, layer: ng.Layer, evidence: ng.Evidence, damping):
    """The same of one layer."""
    return operators(walk, ng.Layers((layer,)), {layer.name: evidence}, {layer.name: damping})[layer.name]


def implied_blocks(walk: Walk, net: Watched):
    """The Fisher block that a method stands for, {name: [I O, I O]}: the inverse of its operator, less the damping."""
    damping = {name: float(np.trace(block)) / len(block) for name, block in net.blocks.items()}
    found = operators(walk, net.layers, net.evidence, damping)
    return {
        name: reference.damped(np.linalg.inv(np.asarray(operator, np.float64)), -damping[name]).astype(operator.dtype)
        for name, operator in found.items()
    }


def implied_block(walk: Walk, layer: ng.Layer, evidence: ng.Evidence, damping=1.0):
    """The block that a method of one layer stands for, [S, I O, I O]."""
    found = np.asarray(operator(walk, layer, evidence, damping))
    block = np.linalg.inv(found.astype(np.float64)) - damping * np.eye(found.shape[-1])
    return block.astype(found.dtype)


AT_ONCE = {"statistics_every": 1, "refresh_every": 1, "momentum": None}
"""Settings of a complete optimizer whose steps depend on nothing but the batch."""


def first_step(optimizer, model, likelihood, params, x, *, labels="exact"):
    """The first step of an optimizer, given as a function of the layers: parameters, inputs, targets -> parameters."""
    capture = ng.linen.capture(model, likelihood, labels=labels)
    tx = optimizer(capture.layers({"params": params}, x))

    @jax.jit
    def step(params, x, y):
        out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(0))
        updates, _ = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
        return optax.apply_updates(params, updates)

    return step


def pairs(inputs, cotangents):
    """A layer without bias and its evidence from rows a [S, N, I] and g [S, N, O]."""
    numbers = jnp if isinstance(inputs, jax.core.Tracer) else np  # NumPy compiles nothing
    inputs, cotangents = numbers.asarray(inputs), numbers.asarray(cotangents)
    shape = inputs.shape[-1], cotangents.shape[-1]
    leaf = Leaf("kernel", "pairs/kernel", (*inputs.shape[:-2], *shape))
    layer = ng.Layer("pairs", "dense", shape, (leaf,), inputs.shape[:-2], str(inputs.dtype))
    gradient = numbers.einsum("...ni,...no->...io", inputs, cotangents)[None]
    count = numbers.asarray(inputs.shape[-2], inputs.dtype)
    evidence = ng.Evidence((inputs,), (cotangents[None],), {"kernel": gradient}, None, count)
    return layer, jax.tree.map(jnp.asarray, evidence)


def random_layers(inputs, outputs, examples, copies=100, dtype="float64"):
    """Layers whose inputs and cotangents depend on each other, and the empirical Fisher block of each."""

    def normal(*shape, seed=0):
        return np.random.default_rng(seed).normal(size=shape)

    a = normal(copies, examples, inputs) @ normal(copies, inputs, inputs, seed=1)
    g = a @ normal(copies, inputs, outputs, seed=2) + normal(copies, examples, outputs, seed=3)
    layer, evidence = pairs(a.astype(dtype), g.astype(dtype))
    return layer, evidence, captured_fisher(layer, evidence)
