"""In float16 the gradient of a loss that is nearly zero is not zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import normal

import natgrad_jax as ng

X, Y = normal(256, 4, dtype="float32"), jnp.arange(256) % 3
PARAMS = {"first": normal(4, 5, dtype="float32"), "last": normal(5, 3, seed=1, dtype="float32")}


def model(dtype):
    """A dense net of this dtype, whose class has a margin so that the derivatives of the loss are small."""

    def outputs(params, x, margin):
        first, last = (params[name].astype(dtype) for name in ("first", "last"))
        return jnp.tanh(x.astype(dtype) @ first) @ last + margin.astype(dtype)

    return outputs


def gradient(dtype, margin, **settings):
    capture = ng.capture(model(dtype), ng.losses.softmax_cross_entropy, labels="true", verify=False, **settings)

    @jax.jit
    def both():
        out = capture.value_and_grad(PARAMS, (X, margin * jax.nn.one_hot(Y, 3)), Y)
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
    "settings", [{}, pytest.param({"microbatches": 4}, marks=pytest.mark.full)], ids=["whole", "in pieces"]
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
