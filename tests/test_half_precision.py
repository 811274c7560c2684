"""In float16 the gradient of a loss that is nearly zero is not zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import normal

import natgrad_jax as ng

KEY = jax.random.key(0)
X, Y = normal(256, 4, dtype="float32"), jnp.arange(256) % 3
PARAMS = {"first": normal(4, 5, dtype="float32"), "last": normal(5, 3, seed=1, dtype="float32")}


def model(dtype, given=None):
    """A dense net of this dtype, whose class has a margin so that the derivatives of the loss are small."""

    def outputs(params, x, margin):
        first, last = (params[name].astype(dtype) for name in ("first", "last"))
        found = jnp.tanh(x.astype(dtype) @ first) @ last + margin.astype(dtype)
        return found if given is None else found.astype(given)

    return outputs


def gradient(dtype, margin, given=None, weights=None, **settings):
    capture = ng.capture(model(dtype, given), ng.losses.softmax_cross_entropy, labels="true", verify=False, **settings)

    @jax.jit
    def both():
        out = capture.value_and_grad(PARAMS, (X, margin * jax.nn.one_hot(Y, 3)), Y, weights=weights)
        rows = [ravel_pytree(each.gradient)[0] for each in out.curvature().values()]
        return ravel_pytree(out.grad)[0], jnp.concatenate(rows)

    return both()


def plain(dtype, margin):
    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(model(dtype)(params, X, margin * jax.nn.one_hot(Y, 3)))[jnp.arange(256), Y])

    return ravel_pytree(jax.grad(loss)(PARAMS))[0]


def error(found, true):
    return float(jnp.linalg.norm(found - true) / jnp.linalg.norm(true))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"given": jnp.float32, "weights": jnp.ones(256)},
        pytest.param({"microbatches": 4}, marks=pytest.mark.full),
    ],
    ids=["whole", "outputs in float32, weights", "in pieces"],
)
@pytest.mark.parametrize("margin", [0.0, 16.0])
def test_the_gradient_is_that_of_float32(margin, settings):
    (found, ours), (true, theirs) = (gradient(dtype, margin, **settings) for dtype in (jnp.float16, jnp.float32))
    assert found.dtype == jnp.float32
    assert max(error(found, true), error(ours, theirs)) < 0.02
    assert (error(plain(jnp.float16, margin), true) > 0.5) == (margin == 16)  # what autodiff makes of it


def test_a_loss_that_is_zero_or_not_finite_stays_so():
    assert np.all(np.isfinite(gradient(jnp.float16, 60.0)[0]))
    assert not np.any(np.isfinite(gradient(jnp.float16, jnp.nan)[0]))


def objective(outputs, targets, weights):
    return jnp.mean(jnp.take_along_axis(-jax.nn.log_softmax(outputs), targets[:, None], 1))


def test_the_loss_and_its_slope_elsewhere_are_those_of_the_step():
    def asked(dtype):
        capture = ng.capture(
            model(dtype, dtype), ng.losses.softmax_cross_entropy, objective=objective, labels="exact", verify=False
        )
        direction = jax.tree.map(lambda leaf: 1e-9 * leaf, PARAMS)

        @jax.jit
        def found():
            out = capture.value_and_grad(PARAMS, (X, jax.nn.one_hot(Y, 3)), Y)
            curvature, there = out.curvature, jax.tree.map(lambda leaf: 1 * leaf, PARAMS)
            slope = curvature.value_and_slope(there, direction)[1]
            return out.value, curvature.value(there), slope, curvature.along(direction)

        return found()

    value, elsewhere, slope, moved = asked(jnp.float16)
    assert value == elsewhere
    _, _, true, along = asked(jnp.float32)
    assert max(error(slope, true), error(moved, along)) < 0.02  # as numbers of float16 the direction is zero


def test_the_exact_direction_in_sample_space_sees_a_small_gradient():
    x, y, w = X[:6], 1e-9 * normal(6, 1, dtype="float32"), {"w": jnp.zeros((4, 1))}
    capture = ng.capture(
        lambda p, x: x.astype(jnp.float16) @ p["w"].astype(jnp.float16),
        ng.losses.squared_error,
        jacobian="examples",
        verify=False,
    )
    tx = ng.scale_by_tengrad(capture.layers(w, x), damping=0.1, blocks="joint", kept=False, refresh_every=1)

    @jax.jit
    def direction():
        out = capture.value_and_grad(w, x, y)
        return tx.update(out.grad, tx.init(w), w, curvature=out.curvature)[0]["w"]

    assert error(direction(), -jnp.linalg.solve(x.T @ x / 6 + 0.1 * jnp.eye(4), x.T @ y / 6)) < 0.02


def test_nothing_that_float16_holds_overflows_since_it_is_scaled():
    def outputs(params, x):
        return 1e4 * (x.astype(jnp.float16) @ params["w"].astype(jnp.float16))

    capture = ng.capture(outputs, ng.losses.squared_error, verify=False)

    @jax.jit
    def evidence(w):
        return capture.value_and_grad({"w": w}, jnp.ones((2, 2)), jnp.zeros((2, 1)), key=KEY).curvature()

    assert np.all(np.isfinite(ravel_pytree([each.gradient for each in evidence(jnp.zeros((2, 1))).values()])[0]))
