"""What has weight zero counts for nothing, whatever stands there: labels, targets, inputs; and what a weight may be."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from methods_table import ALL_NAMES, build, contents, of_the_lifting, settings_of, task
from reference import assert_differs, assert_equal, normal
from watching import LIKELIHOODS, factors

import natgrad_jax as ng

KEPT, ALL = 6, 8
WEIGHTS = jnp.array([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.0, 0.0])
DISTRIBUTIONS = "softmax of distributions"


class Net(nn.Module):
    """Two dense layers behind a normalisation that zeros would make 0 / 0."""

    @nn.compact
    def __call__(self, x):
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return nn.Dense(4, name="head")(nn.tanh(nn.Dense(5, name="first")(x)))


def likelihood_of(name):
    return LIKELIHOODS["softmax_cross_entropy" if name == DISTRIBUTIONS else name]


def targets_of(name):
    return {
        "softmax_cross_entropy": jnp.arange(ALL) % 4,
        DISTRIBUTIONS: jax.nn.softmax(jnp.asarray(normal(ALL, 4, seed=4, dtype="float32"))),
        "sigmoid_binary_cross_entropy": (jnp.arange(ALL * 4) % 3 == 0).reshape(ALL, 4).astype(jnp.float32),
        "squared_error": jnp.asarray(normal(ALL, 4, seed=5, dtype="float32")),
        "poisson": (jnp.arange(ALL * 4) % 5).reshape(ALL, 4).astype(jnp.float32),
    }[name]


X = jnp.asarray(normal(ALL, 3, seed=6, dtype="float32"))
PARAMS = Net().init(jax.random.key(0), X)["params"]
WHOLE, REAL = [-100, -1, 255], [jnp.nan, jnp.inf, -jnp.inf, -100.0, 1e30]
GARBAGE = {name: WHOLE if name == "softmax_cross_entropy" else REAL for name in [*LIKELIHOODS, DISTRIBUTIONS]}


@cache
def measured(name, labels):
    """Everything that a batch says, as a function of inputs, targets and weights."""
    capture = ng.linen.capture(Net(), likelihood_of(name), labels=labels)
    layers = capture.layers({"params": PARAMS}, X)
    elsewhere = jax.tree.map(lambda leaf: 1.1 * leaf, PARAMS)

    @jax.jit
    def everything(x, y, weights):
        out = capture.value_and_grad({"params": PARAMS}, x, y, key=jax.random.key(1), weights=weights)
        along = out.curvature.along(elsewhere)
        evidence = out.curvature()
        slopes = [found.slopes[:, :KEPT] for found in evidence.values() if found.slopes is not None]
        moved = factors(layers, out.curvature(elsewhere))
        of_batch = out.value, out.grad, factors(layers, evidence), moved, evidence["first"].count, slopes
        return of_batch, jnp.sum(along**2), out.curvature.value(elsewhere)

    return everything


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["exact", "true", "forward"])
@pytest.mark.parametrize("name", GARBAGE)
def test_examples_of_weight_zero_count_for_nothing_whatever_stands_there(name, labels):
    everything, y = measured(name, labels), targets_of(name)
    expected = everything(X[:KEPT], y[:KEPT], WEIGHTS[:KEPT])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(expected))
    for garbage in GARBAGE[name]:
        jax.tree.map(assert_equal, everything(X, y.at[KEPT:].set(garbage), WEIGHTS), expected)
    for garbage in (jnp.nan, jnp.inf, 1e30, 0.0):  # at zero the model itself is not finite
        if garbage:
            jax.tree.map(assert_equal, everything(X.at[KEPT:, 1].set(garbage), y, WEIGHTS), expected)
            jax.tree.map(assert_equal, everything(X.at[KEPT].set(garbage), y.at[KEPT:].set(1), WEIGHTS), expected)
    value = everything(X, y.at[KEPT:].set(GARBAGE[name][0]), WEIGHTS.at[KEPT:].set(1))[0][0]
    assert not np.allclose(value, expected[0][0])  # the control: the same garbage with a weight


@pytest.mark.full
@pytest.mark.parametrize("name", GARBAGE)
def test_drawn_labels_of_examples_of_weight_zero_are_harmless(name):
    everything, y = measured(name, "sampled"), targets_of(name)
    found = everything(X.at[KEPT:].set(jnp.nan), y.at[KEPT:].set(GARBAGE[name][0]), WEIGHTS)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    jax.tree.map(assert_equal, found, everything(X, y, WEIGHTS))


@pytest.mark.full
def test_finite_inputs_of_examples_without_a_weight_are_what_the_model_sees():
    capture = ng.linen.capture(Net(), ng.losses.squared_error)
    y = targets_of("squared_error")
    out = capture.value_and_grad({"params": PARAMS}, X, y, key=jax.random.key(1), weights=WEIGHTS)
    assert_equal(out.outputs, Net().apply({"params": PARAMS}, X))


class PerPosition(nn.Module):
    """Sequences [N, T, C], every position by itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.tanh(nn.Dense(5, name="first")(x)))


@pytest.mark.full
@pytest.mark.parametrize("garbage", ["inputs", "labels"])
def test_positions_of_weight_zero_count_for_nothing_whatever_stands_there(garbage):
    x, y = jnp.asarray(normal(6, 5, 3, dtype="float32")), jnp.arange(30).reshape(6, 5) % 4
    weights = (jnp.arange(5) < jnp.array([5, 3, 1, 4, 0, 2])[:, None]).astype(jnp.float32)
    model = PerPosition()
    variables = model.init(jax.random.key(0), x)
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="exact")
    layers = capture.layers(variables, x)

    @jax.jit
    def measure(x, y):
        out = capture.value_and_grad(variables, x, y, weights=weights)
        return out.value, out.grad, factors(layers, out.curvature())

    hidden = weights == 0
    expected = measure(x, y)
    if garbage == "inputs":
        found = measure(jnp.where(hidden[..., None], jnp.nan, x), y)
    else:
        found = measure(x, jnp.where(hidden, -100, y))
    jax.tree.map(assert_equal, found, expected)
    assert not np.isfinite(measure(x.at[0, 0].set(jnp.nan), y)[0])  # a position that has a weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "squared_error", "poisson"])
def test_weights_of_outputs_weigh_the_terms_of_the_loss_and_mask_missing_targets(name):
    y, there = targets_of(name), jnp.asarray(np.random.default_rng(0).uniform(size=(ALL, 4)) > 0.3)
    weights = jnp.where(there, 1.5, 0.0)
    missing = jnp.where(there, y, jnp.nan)
    everything = measured(name, "exact")
    (value, grad, *_), products, _ = everything(X, missing, weights)

    def loss(params):
        terms = likelihood_of(name).terms(Net().apply({"params": params}, X), y)
        return jnp.sum(terms * weights) / jnp.sum(jnp.max(weights, axis=1))

    assert_equal(value, loss(PARAMS))
    jax.tree.map(assert_equal, grad, jax.grad(loss)(PARAMS))
    direction = jax.tree.map(lambda leaf: 1.1 * leaf, PARAMS)
    z, tangent = jax.jvp(lambda params: Net().apply({"params": params}, X), (PARAMS,), (direction,))
    curved = jax.jvp(jax.grad(lambda z: jnp.sum(likelihood_of(name).terms(z, y) * weights)), (z,), (tangent,))[1]
    assert_equal(products, jnp.vdot(tangent, curved) / jnp.sum(jnp.max(weights, axis=1)))
    assert_differs(value, everything(X, y, weights.at[:].set(1))[0][0])


def test_weights_of_outputs_where_the_outputs_are_one_label_are_refused():
    y = targets_of("softmax_cross_entropy")
    capture = ng.linen.capture(Net(), ng.losses.softmax_cross_entropy)
    with pytest.raises(ValueError, match=r"`weights` of shape \(8, 4\) do not fit .* expected leading axes"):
        capture.value_and_grad({"params": PARAMS}, X, y, key=jax.random.key(0), weights=jnp.ones((ALL, 4)))
    with pytest.raises(ValueError, match=r"`weights` have shape \(8, 4\)"):
        ng.losses.softmax_cross_entropy(jnp.zeros((ALL, 4)), y, jnp.ones((ALL, 4)))


def test_a_negative_weight_has_its_sign_in_the_loss_and_its_size_in_the_curvature():
    everything, y = measured("softmax_cross_entropy", "exact"), targets_of("softmax_cross_entropy")
    signed = WEIGHTS * jnp.array([1, -1, 1, 1, -1, 1, 1, 1])

    @jax.jit
    def loss(params):
        logits = Net().apply({"params": params}, X)
        return jnp.sum(signed * optax.softmax_cross_entropy_with_integer_labels(logits, y)) / jnp.sum(WEIGHTS)

    (value, grad, *found), *products = everything(X, y, signed)
    (plain, _, *expected), *_ = everything(X, y, WEIGHTS)
    assert_equal(value, loss(PARAMS))
    jax.tree.map(assert_equal, grad, jax.grad(loss)(PARAMS))
    jax.tree.map(assert_equal, found, expected)
    assert_equal(products[0], everything(X, y, WEIGHTS)[1])
    assert_differs(value, plain)


# --- logits that are infinite -----------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_class_without_probability_beside_one_hot_targets_is_as_if_it_were_not_there():
    logits = jnp.asarray(normal(5, 4, dtype="float32"))
    masked = jnp.concatenate([logits, jnp.full((5, 1), -jnp.inf)], axis=1)
    labels = jnp.arange(5) % 4
    loss = ng.losses.softmax_cross_entropy
    measure = jax.jit(jax.value_and_grad(loss))
    expected = measure(logits, jax.nn.one_hot(labels, 4))
    for targets in (jax.nn.one_hot(labels, 5), labels):
        value, gradient = measure(masked, targets)
        assert_equal(value, expected[0])
        assert_equal(gradient[:, :4], expected[1])
        assert not gradient[:, 4].any()
    assert np.isinf(loss(masked, jax.nn.one_hot(jnp.full(5, 4), 5)))  # the control: that class asked for
    vector = jnp.asarray(normal(5, 5, seed=1, dtype="float32"))  # of ones the product is rounding alone
    assert_equal(loss.root_transpose(masked, vector)[:, :4], loss.root_transpose(logits, vector[:, :4]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "logit", "target"),
    [
        ("sigmoid_binary_cross_entropy", -jnp.inf, 0.0),
        ("sigmoid_binary_cross_entropy", jnp.inf, 1.0),
        ("poisson", -jnp.inf, 0.0),
    ],
)
def test_what_is_certain_and_true_costs_nothing(name, logit, target):
    outputs, targets = jnp.array([[0.3, logit]]), jnp.array([[1.0, target]])
    value, gradient = jax.value_and_grad(LIKELIHOODS[name])(outputs, targets)
    assert_equal(value, LIKELIHOODS[name](outputs[:, :1], targets[:, :1]))
    assert gradient[0, 1] == 0
    assert not np.isfinite(LIKELIHOODS[name](outputs, 1 - targets))  # the control: certain and wrong


@pytest.mark.full
def test_counts_of_large_rates_have_their_mean_and_variance():
    outputs = jnp.repeat(jnp.array([[5.0, 13.7, 13.9, 22.0, 30.0]]), 40_000, axis=0)
    counts = np.asarray(jax.jit(ng.losses.poisson.sample)(jax.random.key(3), outputs), np.float64)
    rates = np.exp(np.asarray(outputs[0], np.float64))
    np.testing.assert_allclose(counts.mean(0), rates, rtol=1e-3)
    np.testing.assert_allclose(counts.var(0), rates, rtol=0.05)  # of 40,000 draws
    assert np.isnan(ng.losses.poisson.sample(jax.random.key(3), jnp.array([[100.0]]))).all()


# --- a batch that is masked altogether --------------------------------------------------------------------------------


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, ("kfac pi",))
def test_a_batch_of_weight_zero_changes_neither_statistics_nor_what_is_measured_nor_gives_a_step(method):
    problem, every = task("mlp"), {"statistics_every": 1, "refresh_every": 1}
    tx = build(method, **{name: value for name, value in every.items() if name in settings_of(method)})
    params = problem.variables["params"]

    @jax.jit
    def step(state, weights):
        out = problem.capture.value_and_grad(
            {"params": params}, problem.x[0], problem.y[0], key=jax.random.key(0), weights=weights
        )
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return out.value, updates, state

    _, moved, state = step(tx.init(params), jnp.ones(8))
    assert any(bool(leaf.any()) for leaf in jax.tree.leaves(moved))
    value, updates, after = step(state, jnp.zeros(8))
    assert value == 0
    for leaf in jax.tree.leaves(updates):
        assert not leaf.any()
    same = jax.tree.map(np.array_equal, contents(state)[0], contents(after)[0])
    assert all(jax.tree.leaves(same))
    for old, new in zip(*(jax.tree.leaves(contents(each)[1]) for each in (state, after)), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)  # where made again, of the same statistics
    before, now = (optax.tree.get(each, "metrics") for each in (state, after))
    assert now.statistics == before.statistics and now.rejected_statistics == before.rejected_statistics
    _, _, other = step(state, jnp.arange(8.0))  # the control
    assert not all(map(np.array_equal, jax.tree.leaves(contents(state)), jax.tree.leaves(contents(other))))


@pytest.mark.slow
@pytest.mark.parametrize("label", [3, 10_000, -1, -100])
def test_a_label_of_no_class_that_has_a_weight_is_no_number_in_loss_and_gradient(label):
    outputs, labels = np.array([[1.0, 2.0, 0.5], [0.3, 0.1, 0.2]]), np.array([1, label])
    both = jax.value_and_grad(ng.losses.softmax_cross_entropy)

    @jax.jit
    def measured(outputs, labels, weights):
        return both(outputs, labels), both(outputs, labels, weights), both(outputs[:1], labels[:1])

    (loss, gradient), weighted, alone = jax.device_get(measured(outputs, labels, np.array([1.0, 0.0])))
    assert np.isnan(loss) and np.isnan(gradient[1]).all() and np.isfinite(gradient[0]).all()
    assert weighted[0] == alone[0] and np.array_equal(weighted[1][:1], alone[1])
