"""Residuals of differential equations as people write them: exact directions and factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet
from jax.flatten_util import ravel_pytree
from reference import assert_differs, assert_equal, normal
from watching import factors

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")
DAMPING = 1e-2


def net(params, x):
    """Points [..., 2] -> values [...]."""
    for name in "ab":
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    return (x @ params["c"]["w"] + params["c"]["b"])[..., 0]


def params():
    sizes = {"a": (2, 4), "b": (4, 3), "c": (3, 1)}
    return {
        name: {"w": normal(*size, seed=seed), "b": 0.3 * normal(size[1], seed=seed + 9)}
        for seed, (name, size) in enumerate(sizes.items())
    }


def by_gradient(params, x):
    """u_x + u_y + u^2, by `vmap` of `grad`."""
    gradient = jax.vmap(jax.grad(net, argnums=1), (None, 0))(params, x)
    return jnp.sum(gradient, -1, keepdims=True) + net(params, x)[:, None] ** 2


def by_hessian(params, x):
    """The Laplacian, as the trace of the Hessian."""
    return jnp.trace(jax.vmap(jax.hessian(net, argnums=1), (None, 0))(params, x), axis1=-2, axis2=-1)[:, None]


def by_two_tangents(params, x):
    """The Laplacian, `jvp` of `jvp` along every axis."""

    def one(x):
        def second(v):
            return jax.jvp(lambda y: jax.jvp(lambda z: net(params, z), (y,), (v,))[1], (x,), (v,))[1]

        return jnp.sum(jax.vmap(second)(jnp.eye(2)))

    return jax.vmap(one)(x)[:, None]


def by_two_gradients(params, x):
    """u_xx - u_y, `grad` of an entry of `grad`, as for a heat equation."""

    def one(x):
        first = jax.grad(lambda y: net(params, y))
        return jax.grad(lambda y: first(y)[0])(x)[0] - first(x)[1]

    return jax.vmap(one)(x)[:, None]


def by_series(params, x):
    """The Laplacian by Taylor series, `jet`."""

    def one(x):
        return sum(jet.jet(lambda y: net(params, y), (x,), ((v, jnp.zeros_like(v)),))[1][1] for v in jnp.eye(2))

    return jax.vmap(one)(x)[:, None]


def by_forward_laplacian(params, x, add=None):
    """The Laplacian, propagated forwards beside value and gradient; `add` is added to what the products give."""
    value, slopes, bent = x[:, None], jnp.tile(jnp.eye(2), (len(x), 1, 1)), jnp.zeros((len(x), 1, 2))
    for name in "ab":
        parts = [part @ params[name]["w"] for part in (value, slopes, bent)]
        if add is not None:
            parts = [part + more for part, more in zip(parts, jnp.split(add[name], [1, 3], axis=1), strict=True)]
        out = jnp.tanh(parts[0] + params[name]["b"])
        first, second = 1 - out**2, -2 * out * (1 - out**2)
        bent = first * parts[2] + second * jnp.sum(parts[1] ** 2, axis=1, keepdims=True)
        value, slopes = out, first * parts[1]
    return (bent @ params["c"]["w"])[:, 0]


RESIDUALS = (by_gradient, by_hessian, by_two_tangents, by_two_gradients, by_series, by_forward_laplacian)
FEW = (by_gradient, by_two_tangents)


def gauss_newton(residual, params, x, y):
    """The damped Gauss-Newton direction of the mean of half the squared errors, from a dense Jacobian."""
    flat, tree = ravel_pytree(params)

    def errors(flat):
        return (residual(tree(flat), x) - y).reshape(-1) / len(x) ** 0.5

    jacobian, error = jax.jacrev(errors)(flat), errors(flat)
    return np.linalg.solve(jacobian.T @ jacobian + DAMPING * np.eye(flat.size), jacobian.T @ error)


def tengrad(residual, params, x, y, jacobian):
    """Its joint direction."""
    capture = ng.capture(residual, ng.losses.squared_error, labels="exact", jacobian=jacobian)
    tx = ng.scale_by_tengrad(capture.layers(params, x), damping=DAMPING, blocks="joint")

    @jax.jit
    def direction(params):
        out = capture.value_and_grad(params, x, y)
        return tx.update(out.grad, tx.init(params), curvature=out.curvature)[0]

    return ravel_pytree(direction(params))[0]


@pytest.mark.full
@pytest.mark.parametrize(
    "residual", [pytest.param(f, id=f.__name__, marks=() if f in FEW else pytest.mark.full) for f in RESIDUALS]
)
def test_tengrad_of_a_residual_is_the_damped_gauss_newton_direction(residual):
    x, y = normal(5, 2), normal(5, 1, seed=3)
    assert_equal(tengrad(residual, params(), x, y, "examples"), gauss_newton(residual, params(), x, y), 1e-8)


@pytest.mark.full
def test_rows_of_the_batch_are_not_enough_for_a_residual():
    x, y = normal(5, 2), normal(5, 1, seed=3)
    found = tengrad(by_gradient, params(), x, y, "rows")
    assert_differs(found, gauss_newton(by_gradient, params(), x, y))


def test_factors_of_kfac_are_those_of_primal_tangents_and_laplacian_as_shared_positions():
    x, y, p = normal(5, 2), normal(5, 1, seed=3), params()
    capture = ng.capture(by_forward_laplacian, ng.losses.squared_error, jacobian="examples")
    layers = capture.layers(p, x)
    moments = factors(layers, jax.jit(lambda p: capture.value_and_grad(p, x, y).curvature())(p))
    zeros = {"a": np.zeros((5, 4, 4)), "b": np.zeros((5, 4, 3))}
    cotangents = jax.jit(jax.grad(lambda add: jnp.sum(by_forward_laplacian(p, x, add))))(zeros)
    rows = np.concatenate([np.asarray(x)[:, None], np.tile(np.eye(2), (5, 1, 1)), np.zeros((5, 1, 2))], axis=1)
    first = np.eye(4)[:, :1]  # the bias is added to the values alone
    rows = np.concatenate([rows, np.tile(first, (5, 1, 1))], axis=-1).reshape(20, 3)
    assert_equal(moments["a"][0], rows.T @ rows / 5)
    everywhere = np.concatenate([rows[:, :-1], np.ones((20, 1))], axis=1)
    assert_differs(moments["a"][0], everywhere.T @ everywhere / 5)
    for name, found in cotangents.items():
        found = np.asarray(found).reshape(20, -1)
        assert_equal(moments[name][1], found.T @ found / 20)


@pytest.mark.full
def test_a_layer_knows_to_which_of_its_products_its_bias_is_added():
    def apply(p, x):
        first, second = x @ p["w"] + p["b"], jnp.tanh(x) @ p["w"]
        return first * second

    p, x, y = {"w": normal(3, 2), "b": normal(2, seed=1)}, normal(4, 3, seed=2), normal(4, 2, seed=3)
    layers = ng.capture(apply, ng.losses.squared_error).layers(p, x)
    assert [use.biased for use in layers["w"].uses] == [True, False]
    assert layers["w"].shape == (4, 2) and not layers.rest
    assert_equal(tengrad(apply, p, x, y, "rows"), gauss_newton(apply, p, x, y), 1e-8)
