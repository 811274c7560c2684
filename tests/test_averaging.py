"""An average of the parameters beside the optimizer: against its definition, through chains, requests and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_jax as ng

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3, jnp.bfloat16)}


def gradients(steps):
    random = np.random.default_rng(0)
    return [
        jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), PARAMS) for _ in range(steps)
    ]


def walked(tx, steps=30):
    """The parameters after every step, and the last state; one jitted, donated step."""
    step = jax.jit(tx.update, donate_argnums=1)
    params, state, path = PARAMS, tx.init(PARAMS), []
    for gradient in gradients(steps):
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_it_is_the_mean_of_the_first_steps_and_forgets_by_the_decay_from_then_on(decay):
    path, state = walked(ng.averaged(optax.adam(0.1), decay))
    expected = np.zeros((2, 3))
    for k, params in enumerate(path, 1):
        xi = min(1 - 1 / k, decay)
        expected = xi * expected + (1 - xi) * np.asarray(params["w"], float)
    found = ng.averaged_params(state)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)
    assert found["b"].dtype == jnp.float32
    if decay == 0.99:
        np.testing.assert_allclose(found["w"], np.mean([params["w"] for params in path], axis=0), rtol=1e-5)


def test_the_steps_stay_what_they_are():
    (*_, ours), _ = walked(ng.averaged(optax.adam(0.1)))
    (*_, theirs), _ = walked(optax.adam(0.1))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_before_the_first_step_it_is_the_start_in_buffers_of_its_own():
    state = ng.averaged(optax.sgd(0.1)).init(PARAMS)
    found = ng.averaged_params(state)
    np.testing.assert_array_equal(found["w"], PARAMS["w"])
    assert found["w"].unsafe_buffer_pointer() != PARAMS["w"].unsafe_buffer_pointer()


@pytest.mark.full
def test_it_is_found_in_a_chain_and_answers_requests():
    watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    params, x, y = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros((8, 3))
    tx = optax.chain(ng.averaged(ng.kfac(layers=watched.layers(params, x))), optax.identity())
    state = tx.init(params)
    curvature = watched.value_and_grad(params, x, y, key=jax.random.key(0)).curvature
    seen = ng.observe(tx, state, curvature, params)
    counts = [leaf for leaf in jax.tree.leaves(seen) if not np.array_equal(leaf, 0)]
    assert len(counts) > len([leaf for leaf in jax.tree.leaves(state) if not np.array_equal(leaf, 0)])
    np.testing.assert_array_equal(ng.averaged_params(seen)["w"], params["w"])


def test_a_model_of_nnx_is_evaluated_with_its_average():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ng.averaged(optax.sgd(0.5), 0.5), wrt=nnx.Param)
    path = []
    for _ in range(4):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
        path.append(np.asarray(model.kernel[...]))
    expected = path[0]
    for kernel in path[1:]:
        expected = (expected + kernel) / 2
    average = nnx.clone(model)
    nnx.update(average, ng.averaged_params(optimizer.opt_state))
    np.testing.assert_allclose(average.kernel[...], expected, rtol=1e-6)
    assert not np.allclose(average.kernel[...], model.kernel[...])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ng.averaged(optax.sgd(0.1), 1.0),
            "`decay` is 1.0; expected a finite number of at least 0 and below 1",
        ),
        (
            lambda: ng.averaged_params(optax.sgd(0.1).init(PARAMS)),
            r"has 0 averages of parameters; .* `ng.averaged\(tx\)`",
        ),
        (lambda: ng.averaged_params(2 * (ng.averaged(optax.sgd(0.1)).init(PARAMS),)), "has 2 averages"),
        (
            lambda: ng.averaged(optax.sgd(0.1)).update(PARAMS, ng.averaged(optax.sgd(0.1)).init(PARAMS)),
            "`params` is None",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
