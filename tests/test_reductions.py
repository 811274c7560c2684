"""A mean over positions in the place of their sum: loss, model and Fisher matrix over T, and what that converts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")
N, T, C = 6, 4, 3
DAMPING, CLIP = 0.3, 1e-4

RANDOM = np.random.default_rng(0)
PARAMS = {"kernel": RANDOM.normal(size=(2, C)), "bias": np.zeros(C)}
X = RANDOM.normal(size=(N, T, 2))
TARGETS = {
    "softmax_cross_entropy": np.arange(N * T).reshape(N, T) % C,
    "squared_error": RANDOM.normal(size=(N, T, C)),
    "sigmoid_binary_cross_entropy": RANDOM.integers(0, 2, (N, T, C)).astype(float),
    "poisson": np.arange(N * T * C).reshape(N, T, C) % 4,
}
WEIGHTS = {"none": None, "examples": np.arange(1.0, N + 1), "masked": np.tile([1.0, 1, 0, 1], (N, 1))}

every_likelihood = pytest.mark.parametrize("name", TARGETS)


def model(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def captured(name, reduction, labels="exact"):
    likelihood = getattr(ng.losses, name).reduced(reduction)
    return ng.capture(model, likelihood, labels=labels), TARGETS[name]


def evaluated(name, reduction, labels="exact", weights=None):
    capture, targets = captured(name, reduction, labels)
    params = jax.tree.map(jnp.asarray, PARAMS)
    return capture.value_and_grad(params, X, targets, key=jax.random.key(0), weights=weights)


def over_positions(tree):
    return jax.tree.map(lambda leaf: leaf / T, tree)


def assert_close(found, expected):
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.slow
@every_likelihood
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_gradient_and_products_are_those_of_the_sum_over_the_positions(name, weights):
    total, mean = (evaluated(name, reduction, weights=WEIGHTS[weights]) for reduction in ("sum", "mean"))
    assert_close((mean.value, mean.grad), over_positions((total.value, total.grad)))
    u, v = (mean.curvature.along(PARAMS), mean.curvature.along(mean.grad))
    of_sum = (total.curvature.along(PARAMS), total.curvature.along(mean.grad))
    assert_close(jnp.vdot(u, v), jnp.vdot(*of_sum) / T)


@pytest.mark.slow
@every_likelihood
def test_the_mean_is_that_of_the_terms(name):
    likelihood, outputs = getattr(ng.losses, name), model(PARAMS, X)
    terms = likelihood.terms(outputs, TARGETS[name])
    assert_close(likelihood.reduced("mean")(outputs, TARGETS[name]), jnp.sum(terms) / (N * T))


@pytest.mark.full
@pytest.mark.parametrize("labels", ["exact", "sampled", "true"])
def test_the_fisher_matrix_is_that_of_the_sum_over_the_positions(labels):
    of_sum, of_mean = (block(labels, reduction) for reduction in ("sum", "mean"))
    assert_close(of_mean, over_positions(of_sum))


def block(labels, reduction):
    """The second moment of the rows of TENGraD, which are the gradients of the examples: the Fisher block."""
    out = evaluated("softmax_cross_entropy", reduction, labels)
    (layer,) = out.curvature.layers.blocks
    evidence = out.curvature()[layer.name]
    (a,), (g,) = evidence.inputs, evidence.cotangents
    a = jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1))], -1)
    rows = jnp.einsum("nti,kntj->knij", a, g).reshape(len(g) * N, -1)
    return rows.T @ rows / len(rows)


@pytest.mark.full
@pytest.mark.parametrize("method", ["kfac", "ekfac", "tengrad"])
def test_with_damping_and_clip_per_position_the_steps_are_those_of_the_sum(method):
    assert_close(step(method, "mean", DAMPING / T, CLIP / T), step(method, "sum", DAMPING, CLIP))


@pytest.mark.full
def test_with_the_same_damping_and_clip_they_are_not():
    for settings in ((DAMPING, CLIP / T), (DAMPING / T, CLIP)):
        with pytest.raises(AssertionError):
            assert_close(step("kfac", "mean", *settings), step("kfac", "sum", DAMPING, CLIP))


def step(method, reduction, damping, clip):
    capture, targets = captured("softmax_cross_entropy", reduction, "sampled")
    tx = getattr(ng, method)(0.1, capture.layers(PARAMS, X), damping=damping, kl_clip=clip)
    params = jax.tree.map(jnp.asarray, PARAMS)
    out = capture.value_and_grad(params, X, targets, key=jax.random.key(0))
    updates, _ = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
    return optax.apply_updates(params, updates)


@pytest.mark.full
def test_the_batch_is_the_mean_of_its_pieces_masks_and_all():
    likelihood, outputs = ng.losses.softmax_cross_entropy.reduced("mean"), model(PARAMS, X)
    weights = (jnp.arange(N * T).reshape(N, T) % 3 > 0).astype(float)
    whole = likelihood(outputs, TARGETS["softmax_cross_entropy"], weights)
    pieces = [
        likelihood(outputs[some], TARGETS["softmax_cross_entropy"][some], weights[some])
        for some in (slice(0, 2), slice(2, 6))
    ]
    assert_close(whole, (2 * pieces[0] + 4 * pieces[1]) / 6)


def test_an_example_without_positions_is_its_own_mean():
    likelihood = ng.losses.squared_error
    assert_close(likelihood.reduced("mean")(X[:, 0], X[:, 1]), likelihood(X[:, 0], X[:, 1]))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="`reduction` is 'average'"):
        ng.losses.squared_error.reduced("average")
