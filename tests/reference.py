"""The definitions that the package is compared with: dense Fisher blocks in float64, by automatic differentiation.

Written from the definitions alone; nothing of natgrad_jax is imported here. The parameters of one layer are a matrix
[I, O], the rows of its kernel and then its bias; `vec` of a matrix is row-major, so that a Kronecker block is A (x) G
with A of the inputs and G of the outputs. A block is in the scale of one example:

    F = sum_n J_n^T H_n J_n / W

with J_n the Jacobian of the outputs of example n by the matrix of the layer and H_n the Hessian of its loss.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.flatten_util import ravel_pytree

GATES = {"float64": 1e-9, "float32": 2e-5}
"""Relative errors that count as equal: those of rounding, with a margin."""

CONTROL = 0.1
"""The least relative error that a negative control must have."""


# Comparison -----------------------------------------------------------------------------------------------------------


def error(found, expected) -> float:
    """Relative error in the Frobenius norm, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_equal(found, expected, gate: float | None = None):
    """Equal up to the rounding of the dtype of what was found, or up to a gate with a reason."""
    gate = GATES[str(found.dtype)] if gate is None else gate
    assert error(found, expected) <= gate


def assert_differs(found, expected):
    """A negative control: not even nearly equal."""
    assert error(found, expected) > CONTROL


def wide(tree):
    """The floating-point leaves of a tree in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# Models and data ------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Dense layers with an activation between them; names in an order that is not the order of the calls."""

    widths: tuple[int, ...] = (4, 3, 3)
    activation: Callable[[Any], Any] = nn.tanh
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for index, width in enumerate(self.widths):
            x = self.activation(x) if index else x
            x = nn.Dense(width, use_bias=self.use_bias, name=f"layer_{'bca'[index]}")(x)
        return x


def linear(x):
    """No activation."""
    return x


def random_params(model: nn.Module, x, seed: int = 0, dtype: str = "float64"):
    """Parameters 0.5 N(0, 1)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * draw.normal(size=leaf.shape), dtype), shapes)


def normal(*shape: int, seed: int = 0, dtype: str = "float64"):
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def targets(loss: str, shape: tuple[int, ...], seed: int = 1, dtype: str = "float64"):
    """Targets that fit outputs of this shape."""
    draw = np.random.default_rng(seed)
    if loss == "softmax_cross_entropy":
        return jnp.asarray(draw.integers(shape[-1], size=shape[:-1]), jnp.int32)
    if loss == "sigmoid_binary_cross_entropy":
        return jnp.asarray(draw.integers(2, size=shape), dtype)
    if loss == "poisson":
        return jnp.asarray(draw.poisson(2.0, size=shape), dtype)
    return jnp.asarray(draw.normal(size=shape), dtype)


# Losses of one example ------------------------------------------------------------------------------------------------


def _cross_entropy(z, y):
    if jnp.issubdtype(y.dtype, jnp.integer):
        y = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
    return jax.nn.logsumexp(z, axis=-1) * jnp.sum(y, axis=-1) - jnp.sum(y * z, axis=-1)


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "squared_error": lambda z, y: 0.5 * (z - y) ** 2,
    "softmax_cross_entropy": _cross_entropy,
    "sigmoid_binary_cross_entropy": lambda z, y: -y * jax.nn.log_sigmoid(z) - (1 - y) * jax.nn.log_sigmoid(-z),
    "poisson": lambda z, y: jnp.exp(z) - y * z,
}
"""Outputs z, targets y -> terms of the negative log-likelihood; their sum is the loss of an example."""


def mean_loss(loss: str, z, y):
    """Sum over outputs and positions, mean over examples."""
    return jnp.sum(LOSSES[loss](z, y)) / z.shape[0]


# One layer as a matrix ------------------------------------------------------------------------------------------------


def take(params, name: str):
    """The arrays of the layer at an address such as "encoder/Dense_0"."""
    for key in name.split("/"):
        params = params[key]
    return params


def put(params, name: str, leaves):
    """The parameters with the arrays of one layer exchanged."""
    key, _, rest = name.partition("/")
    return {**params, key: put(params[key], rest, leaves) if rest else leaves}


def matrix(leaves: Mapping[str, Any]):
    """The arrays of a layer as a matrix [I, O]: rows of the kernel, then the bias."""
    rows = leaves["kernel"].reshape(-1, leaves["kernel"].shape[-1])
    return jnp.concatenate([rows, leaves["bias"][None]]) if "bias" in leaves else rows


def arrays(weights, like: Mapping[str, Any]):
    """The inverse of `matrix`."""
    rows = weights[:-1] if "bias" in like else weights
    leaves = {"kernel": rows.reshape(like["kernel"].shape)}
    return leaves | {"bias": weights[-1]} if "bias" in like else leaves


# Dense curvature ------------------------------------------------------------------------------------------------------


def _apply(model: nn.Module):
    return lambda params, x: model.apply({"params": params}, x)


def _in_layer(model, params, name):
    """The matrix of one layer, and the outputs of one example as a function of it."""
    leaves = take(params, name)

    def outputs(weights, x):
        return _apply(model)(put(params, name, arrays(weights, leaves)), x[None])[0]

    return matrix(leaves), outputs


def _in_everything(model, params):
    """All parameters in one vector, and the outputs of one example as a function of it."""
    vector, unravel = ravel_pytree(params)
    return vector, lambda vector, x: _apply(model)(unravel(vector), x[None])[0]


def _spread(weights, terms):
    """Weights of examples or positions with trailing axes, as the terms of a loss have them."""
    return 1.0 if weights is None else weights.reshape(weights.shape + (1,) * (terms.ndim - weights.ndim))


def total(weights, examples: int):
    """W: an example counts as much as its heaviest position."""
    return examples if weights is None else jnp.sum(jnp.max(weights.reshape(examples, -1), axis=1))


def _hessians(model, params, loss, x, y, weights):
    """Hessian of the loss of every example by its outputs, [N, C, C]."""
    outputs = jax.vmap(lambda x: _apply(model)(params, x[None])[0])(x)

    def of_example(z, y, w):
        terms = LOSSES[loss](z[None], y[None])
        return jnp.sum(_spread(w[None], terms) * terms)

    weights = jnp.ones(len(outputs)) if weights is None else weights
    count = outputs[0].size
    return jax.vmap(jax.hessian(of_example))(outputs, y, weights).reshape(-1, count, count)


def _curvature(start, outputs, hessians, x, weights):
    jacobians = jax.vmap(jax.jacrev(outputs), (None, 0))(start, x)
    jacobians = jacobians.reshape(len(x), -1, start.size)
    return jnp.einsum("nap,nab,nbq->pq", jacobians, hessians, jacobians) / total(weights, len(x))


@partial(jax.jit, static_argnames=("model", "names", "loss"))
def fisher_blocks(model, params, names: tuple[str, ...], loss: str, x, y, weights=None):
    """F of each layer, {name: [I O, I O]}; the generalized Gauss-Newton block is the same matrix."""
    params, x, y = wide((params, x, y))
    hessians = _hessians(model, params, loss, x, y, weights)
    return {name: _curvature(*_in_layer(model, params, name), hessians, x, weights) for name in names}


@partial(jax.jit, static_argnames=("model", "loss"))
def fisher(model, params, loss: str, x, y, weights=None):
    """F of all parameters, in the order of `ravel_pytree`."""
    params, x, y = wide((params, x, y))
    hessians = _hessians(model, params, loss, x, y, weights)
    return _curvature(*_in_everything(model, params), hessians, x, weights)


@partial(jax.jit, static_argnames=("model", "names", "loss"))
def example_gradients(model, params, names: tuple[str, ...], loss: str, x, y):
    """D_n of each layer, the gradient of the loss of each example, {name: [N, I, O]}."""
    params, x, y = wide((params, x, y))

    def of_layer(name):
        weights, outputs = _in_layer(model, params, name)
        gradient = jax.grad(lambda weights, x, y: jnp.sum(LOSSES[loss](outputs(weights, x)[None], y[None])))
        return jax.vmap(gradient, (None, 0, 0))(weights, x, y)

    return {name: of_layer(name) for name in names}


def second_moment(gradients):
    """E[vec(D) vec(D)^T] of gradients [N, I, O]: the empirical Fisher block if they are those of the true labels."""
    rows = np.asarray(gradients, np.float64).reshape(len(gradients), -1)
    return rows.T @ rows / len(rows)


# Linear algebra -------------------------------------------------------------------------------------------------------


def operator(function: Callable[[Any], Any], shape: tuple[int, int], stack: tuple[int, ...] = (), dtype="float64"):
    """The matrices [S, I O, I O] of a linear function of matrices [S, I, O]."""
    size = shape[0] * shape[1]
    units = jnp.eye(size, dtype=dtype).reshape(size, *(1,) * len(stack), *shape)
    images = jax.vmap(function)(jnp.broadcast_to(units, (size, *stack, *shape)))
    return jnp.moveaxis(images.reshape(size, *stack, size), 0, -1)


def damped(block, damping: float):
    """F + damping I."""
    return np.asarray(block, np.float64) + damping * np.eye(len(block))


def kron(inputs, outputs):
    """A (x) G."""
    return np.kron(np.asarray(inputs, np.float64), np.asarray(outputs, np.float64))


def diagonal_in(q, block):
    """diag(Q^T F Q)."""
    return np.einsum("...pk,...pq,...qk->...k", q, block, q)


def recomposed(q, scale):
    """Q diag(s) Q^T."""
    return np.einsum("...pk,...k,...qk->...pq", q, scale, q)


def partial_traces(block, shape: tuple[int, int]):
    """The traces of a block [I O, I O] over the outputs, [I, I], and over the inputs, [O, O]."""
    four = np.reshape(block, (*np.shape(block)[:-2], *shape, *shape))
    return np.einsum("...iojo->...ij", four), np.einsum("...ioip->...op", four)


def rearranged(block, shape: tuple[int, int]):
    """Van Loan's arrangement [I I, O O], in which A (x) G is the rank-one matrix vec(A) vec(G)^T."""
    four = np.reshape(block, (*np.shape(block)[:-2], *shape, *shape))
    return np.moveaxis(four, -2, -3).reshape(*four.shape[:-4], shape[0] ** 2, shape[1] ** 2)


def best_kronecker_error(block, shape: tuple[int, int]):
    """The least relative error that a Kronecker product can have, of every copy."""
    values = np.linalg.svd(rearranged(block, shape), compute_uv=False)
    return np.sqrt(np.sum(values[..., 1:] ** 2, axis=-1) / np.sum(values**2, axis=-1))


def errors(approximations, blocks):
    """Relative error of every copy."""
    return np.linalg.norm(approximations - blocks, axis=(1, 2)) / np.linalg.norm(blocks, axis=(1, 2))
