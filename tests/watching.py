"""What the capture of the package says about small models, beside what the definitions say."""

from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import reference
from flax import linen as nn

import natgrad_jax as ng
from natgrad_jax.layers import input_rows, output_rows

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
    params: Any
    x: Any
    y: Any
    layers: ng.Layers
    evidence: dict[str, ng.Evidence]
    blocks: dict[str, Any]


def evidence_of(model, likelihood, params, x, y, *, labels="exact", draws=1, weights=None, seed=0):
    """The layers of a model, and its evidence on one batch."""
    capture = ng.linen.capture(model, likelihood, labels=labels, draws=draws)

    @jax.jit
    def evidence(params, x, y, weights):
        out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(seed), weights=weights)
        return out.curvature()

    return capture.layers({"params": params}, x), evidence(params, x, y, weights)


def watched(model, params, x, loss, *, labels="exact", weights=None) -> Watched:
    """Capture and definition side by side."""
    shape = jax.eval_shape(lambda params, x: model.apply({"params": params}, x), params, x).shape
    y = reference.targets(loss, shape, dtype=str(x.dtype))
    layers, evidence = evidence_of(model, LIKELIHOODS[loss], params, x, y, labels=labels, weights=weights)
    blocks = reference.fisher_blocks(model, params, tuple(layers), loss, x, y, weights)
    return Watched(model, params, x, y, layers, evidence, blocks)


@cache
def mlp(activation="tanh", loss="squared_error", *, examples=7, copies=1, use_bias=True, dtype="float64") -> Watched:
    """The reference net 5-4-3-3 on random inputs; `copies` of each."""
    model = reference.MLP(activation=ACTIVATIONS[activation], use_bias=use_bias)
    x = reference.normal(examples, 5, seed=2, dtype=dtype).repeat(copies, axis=0)
    return watched(model, reference.random_params(model, x, dtype=dtype), x, loss)


def kron(inputs, outputs):
    """A (x) G, in float64."""
    return np.kron(np.asarray(inputs, np.float64), np.asarray(outputs, np.float64))


def gradients(layer: ng.Layer, evidence: ng.Evidence):
    """D of every draw and example, the sum over positions of a g^T: [S, K, N, I, O]."""
    rows, columns = jax.jit(lambda evidence: (input_rows(layer, evidence), output_rows(layer, evidence)))(evidence)
    return np.einsum("...nti,...knto->...knio", np.asarray(rows, np.float64), np.asarray(columns, np.float64))


def captured_fisher(layer: ng.Layer, evidence: ng.Evidence):
    """E[vec(D) vec(D)^T] of what was captured, [S, I O, I O]."""
    vectors = gradients(layer, evidence)
    vectors = vectors.reshape(vectors.shape[:-2] + (-1,))
    return np.einsum("...knp,...knq->...pq", vectors, vectors) / (vectors.shape[-3] * float(evidence.count))
