"""Whose cotangents measure curvature: the exact Hessian's, those of drawn or true labels, none; J times a direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from reference import assert_differs, assert_equal, kron, normal
from watching import LIKELIHOODS, captured_fisher, evidence_of, factors, gradients, mlp, summed, watched

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")
every_loss = pytest.mark.parametrize("loss", reference.LOSSES)


class Texts(nn.Module):
    """Sequences [N, T, C], their positions mixed by a convolution."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.tanh(nn.Conv(2, (3,), padding="CAUSAL", name="mix")(x)))


class Images(nn.Module):
    """Convolutions, one of them in groups, then one dense layer over everything."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (2, 2), strides=2, name="first")(x))
        x = nn.tanh(nn.Conv(4, (2, 2), feature_group_count=2, name="grouped")(x))
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


class Affine(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="only")(x)


# Roots of the Hessian by the outputs ----------------------------------------------------------------------------------


def root_of(likelihood, z):
    """R as a matrix, [C, C] for outputs z [C]."""
    return np.asarray(jax.jit(jax.vmap(lambda unit: likelihood.root(z, unit)))(np.eye(z.size))).T


def hessian_of(loss, z, y):
    return jax.jit(jax.hessian(lambda z: jnp.sum(reference.LOSSES[loss](z, y))))(z)


@pytest.mark.slow
@every_loss
def test_c8_the_root_times_its_transpose_is_the_hessian_by_the_outputs(loss):
    z, y = normal(4, seed=3), reference.targets(loss, (4,))
    root = root_of(LIKELIHOODS[loss], z)
    assert_equal(root @ root.T, hessian_of(loss, z, y))
    assert_differs(root @ root.T, 2 * hessian_of(loss, z, y))
    transposed = jax.vmap(lambda unit: LIKELIHOODS[loss].root_transpose(z, unit))(jnp.eye(4)).T
    np.testing.assert_allclose(transposed, root.T, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "sigmoid_binary_cross_entropy"])
def test_c8_the_hessian_is_the_same_for_soft_targets(loss):
    z, y = normal(4, seed=3), jax.nn.softmax(normal(4, seed=4))
    root = root_of(LIKELIHOODS[loss], z)
    assert_equal(root @ root.T, hessian_of(loss, z, y))


def test_c8_a_root_of_the_softmax_without_its_second_term_fails():
    z, y = normal(4, seed=3), jnp.int32(1)
    assert_differs(jnp.diag(jax.nn.softmax(z)), hessian_of("softmax_cross_entropy", z, y))


def test_c8_the_hessian_of_a_gaussian_is_one_over_its_variance():
    z = normal(4, seed=3)
    root = root_of(ng.losses.gaussian(variance=0.2), z)
    assert_equal(root @ root.T, 5 * np.eye(4))


@pytest.mark.slow
@every_loss
def test_the_value_of_a_likelihood_is_the_mean_over_examples_of_the_sum_over_outputs(loss):
    z, y = normal(5, 2, 4, seed=3), reference.targets(loss, (5, 2, 4))
    assert_equal(LIKELIHOODS[loss](z, y), reference.mean_loss(loss, z, y))
    assert_differs(LIKELIHOODS[loss](z, y), reference.mean_loss(loss, z, y) / 2)


@pytest.mark.full
@every_loss
def test_drawn_labels_have_the_hessian_as_the_second_moment_of_their_score(loss):
    draws = 40_000
    z = normal(3, seed=3)
    labels = LIKELIHOODS[loss].sample(jax.random.key(0), jnp.broadcast_to(z, (draws, 3)))
    scores = jax.vmap(jax.grad(lambda z, y: jnp.sum(LIKELIHOODS[loss].terms(z, y))), (None, 0))(z, labels)
    expected = hessian_of(loss, z, labels[0])
    assert_equal(scores.T @ scores / draws, expected, gate=0.04)  # five standard errors of the fourth moments
    true = scores[0]
    assert_differs(jnp.outer(true, true), expected)


# Exact ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_loss
def test_exact_evidence_is_the_dense_block_of_every_dense_layer(loss):
    net = mlp("tanh", loss)
    for name, layer in net.layers.items():
        assert_equal(captured_fisher(layer, net.evidence[name]), net.blocks[name])


@pytest.mark.full
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "squared_error"])
def test_exact_evidence_is_the_dense_block_where_outputs_are_sequences(loss):
    x = normal(3, 4, 2)
    net = watched(Texts(), reference.random_params(Texts(), x), x, loss)
    for name, layer in net.layers.items():
        assert net.evidence[name].cotangents[0].shape[0] == 4 * 3  # a column for each position and output
        assert_equal(captured_fisher(layer, net.evidence[name]), net.blocks[name])


@pytest.mark.full
def test_exact_evidence_is_the_dense_block_of_convolutions_and_their_groups():
    x = normal(3, 4, 4, 2)
    net = watched(Images(), reference.random_params(Images(), x), x, "softmax_cross_entropy")
    for name in ("first", "head"):
        assert_equal(captured_fisher(net.layers[name], net.evidence[name]), net.blocks[name])
    found = captured_fisher(net.layers["grouped"], net.evidence["grouped"])
    rows, columns = net.layers["grouped"].shape
    dense = net.blocks["grouped"].reshape(rows, 2, columns, rows, 2, columns)  # columns of the kernel: group by group
    for group in range(2):
        assert_equal(found[group], dense[:, group, :, :, group, :].reshape(rows * columns, rows * columns))
    assert_differs(found[0], found[1])


@pytest.mark.full
def test_the_signs_of_exact_columns_leave_the_curvature_and_decorrelate_the_examples():
    net = mlp("tanh", "softmax_cross_entropy")
    layers, other = evidence_of(net.model, ng.losses.softmax_cross_entropy, net.params, net.x, net.y, seed=1)
    layer, ours, theirs = layers["layer_b"], net.evidence["layer_b"], other["layer_b"]
    assert_equal(captured_fisher(layer, ours), captured_fisher(layer, theirs))
    assert_differs(summed(layer, ours), summed(layer, theirs))


# Sampled --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c11_the_sampled_output_factor_tends_to_the_exact_one():
    net = mlp("tanh", "softmax_cross_entropy")
    exact = factors(net.layers, net.evidence)["layer_b"][1]

    def error(draws):
        args = net.model, ng.losses.softmax_cross_entropy, net.params, net.x, net.y
        _, evidence = evidence_of(*args, labels="sampled", draws=draws)
        return np.max(np.abs(factors(net.layers, evidence)["layer_b"][1] - exact)) / np.max(np.abs(exact))

    assert error(3000) < 1.5e-2
    assert error(1) > 0.1


# True -----------------------------------------------------------------------------------------------------------------


def test_true_evidence_holds_the_gradient_of_every_example():
    net = mlp("tanh", "softmax_cross_entropy")
    _, evidence = evidence_of(net.model, ng.losses.softmax_cross_entropy, net.params, net.x, net.y, labels="true")
    expected = reference.example_gradients(
        net.model, net.params, tuple(net.layers), "softmax_cross_entropy", net.x, net.y
    )
    for name, layer in net.layers.items():
        found = gradients(layer, evidence[name])
        assert_equal(found[0], expected[name])
        assert_equal(summed(layer, evidence[name])[0], expected[name].sum(0))
        assert_equal(captured_fisher(layer, evidence[name]), reference.second_moment(expected[name]))
    assert_differs(captured_fisher(layer, evidence[name]), net.blocks[name])


@pytest.mark.full
def test_true_evidence_is_of_the_likelihood_also_where_an_objective_is_differentiated():
    net = mlp("tanh", "squared_error")

    def objective(outputs, targets, weights):
        return jnp.sum(jnp.abs(outputs - targets))

    @jax.jit
    def both(params):
        plain = ng.linen.capture(net.model, ng.losses.squared_error, labels="true")
        other = ng.linen.capture(net.model, ng.losses.squared_error, labels="true", objective=objective)
        outs = [capture.value_and_grad({"params": params}, net.x, net.y) for capture in (plain, other)]
        return [(out.grad, out.curvature()) for out in outs]

    (gradient, evidence), (of_objective, same) = both(net.params)
    for name in net.layers:
        assert_equal(same[name].cotangents[0], evidence[name].cotangents[0])
    expected = jax.grad(lambda params: objective(net.model.apply({"params": params}, net.x), net.y, None))(net.params)
    assert_equal(of_objective["layer_a"]["kernel"], expected["layer_a"]["kernel"])
    assert_differs(of_objective["layer_a"]["kernel"], gradient["layer_a"]["kernel"])


# Forward --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 5)])
def test_c28_forward_evidence_is_the_block_of_one_linear_layer_with_squared_error(shape):
    model, x = Affine(), normal(*shape)
    net = watched(model, reference.random_params(model, x), x, "squared_error", labels="forward")
    inputs, outputs = factors(net.layers, net.evidence)["only"]
    np.testing.assert_array_equal(outputs, np.eye(3))
    assert_equal(kron(inputs, outputs), net.blocks["only"])
    other = watched(model, net.params, x, "poisson", labels="forward")
    assert_differs(kron(inputs, outputs), other.blocks["only"])


# The quadratic form, the value and the evidence elsewhere -------------------------------------------------------------


def flat(tree):
    """A tree in the order of the dense Fisher matrix."""
    return ravel_pytree(tree)[0]


def along(net, loss, directions, weights=None):
    """`curvature.along` for each direction, and J of another `labels`, which must not matter."""
    capture = ng.linen.capture(net.model, LIKELIHOODS[loss], labels="true")

    @jax.jit
    def of(params):
        curvature = capture.value_and_grad({"params": params}, net.x, net.y, weights=weights).curvature
        return [curvature.along(direction).ravel() for direction in directions]

    return of(net.params)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@every_loss
def test_the_dot_product_of_two_vectors_along_is_the_quadratic_form_of_the_fisher(loss, weighted):
    net = mlp("tanh", loss)
    everywhere, elsewhere = (reference.random_params(net.model, net.x, seed=seed) for seed in (5, 6))
    hidden = reference.put(elsewhere, "layer_a", jax.tree.map(jnp.zeros_like, net.params["layer_a"]))
    weights = jnp.asarray([0.0, 3.0, 0.0, 0.0, 0.2, 0.0, 0.0]) if weighted else None

    def forms(dense):
        u, v = flat(everywhere), flat(hidden)
        return jnp.stack([u @ dense @ u, u @ dense @ v, v @ dense @ v])

    u, v = along(net, loss, (everywhere, hidden), weights)
    found = jnp.stack([u @ u, u @ v, v @ v])
    assert_equal(found, forms(reference.fisher(net.model, net.params, loss, net.x, net.y, weights)))
    if weighted:
        assert_differs(found[2], forms(reference.fisher(net.model, net.params, loss, net.x, net.y))[2])


def test_c12_the_quadratic_form_is_twice_the_kullback_leibler_divergence_of_a_small_step():
    net = mlp("tanh", "softmax_cross_entropy")
    direction = jax.tree.map(lambda leaf: 1e-3 * leaf, reference.random_params(net.model, net.x, seed=5))
    (vector,) = along(net, "softmax_cross_entropy", (direction,))

    def divergence(step):
        moved = jax.tree.map(jnp.add, net.params, step)
        before, after = (jax.nn.log_softmax(net.model.apply({"params": p}, net.x)) for p in (net.params, moved))
        return jnp.mean(jnp.sum(jnp.exp(before) * (before - after), axis=-1))

    assert_equal(vector @ vector, 2 * divergence(direction), gate=0.01)  # third order in the step
    assert_differs(vector @ vector, divergence(direction))


@pytest.mark.slow
@every_loss
def test_curvature_value_is_the_objective_on_the_same_batch_at_other_parameters(loss):
    net = mlp("tanh", loss)
    other = jax.tree.map(lambda leaf: -3 * leaf, net.params)
    capture = ng.linen.capture(net.model, LIKELIHOODS[loss], labels="true")

    @jax.jit
    def values(params, other):
        out = capture.value_and_grad({"params": params}, net.x, net.y)
        return out.value, out.curvature.value(params), out.curvature.value(other)

    here, again, there = values(net.params, other)
    assert here == again
    assert_equal(there, reference.mean_loss(loss, net.model.apply({"params": other}, net.x), net.y))
    assert_differs(there, here)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_curvature_at_other_parameters_keeps_the_labels_that_were_drawn(loss):
    net = mlp("tanh", loss)
    other = reference.random_params(net.model, net.x, seed=8)
    capture = ng.linen.capture(net.model, LIKELIHOODS[loss])

    @jax.jit
    def evidence(params, other):
        key = jax.random.key(0)
        out = capture.value_and_grad({"params": params}, net.x, net.y, key=key)
        fresh = capture.value_and_grad({"params": other}, net.x, net.y, key=key)
        return out.outputs, out.curvature(), out.curvature(other), fresh.curvature()

    z, here, there, fresh = evidence(net.params, other)
    score = here["layer_a"].cotangents[0][0]  # the last layer: cotangents of the outputs themselves
    drawn = z - score if loss == "squared_error" else jnp.argmin(score, axis=-1)  # p - onehot < 0 at the label only
    expected = reference.example_gradients(net.model, other, tuple(net.layers), loss, net.x, drawn)
    for name, layer in net.layers.items():
        assert_equal(gradients(layer, there[name])[0], expected[name])
        assert_equal(summed(layer, there[name])[0], expected[name].sum(0))
    if loss == "squared_error":
        assert_differs(gradients(layer, fresh[name])[0], expected[name])


# Convolutions in branches ---------------------------------------------------------------------------------------------


def test_on_a_cpu_the_branch_of_the_evidence_has_no_convolution_for_the_gradient_of_a_kernel():
    model, x = nn.Conv(3, (3, 3)), reference.normal(4, 6, 6, 2, dtype="float32")
    params = reference.random_params(model, x, dtype="float32")
    capture = ng.linen.capture(model, ng.losses.squared_error)

    def convolutions(of_curvature):
        def step(params, due):
            out = capture.value_and_grad({"params": params}, x, jnp.zeros((4, 6, 6, 3)), key=jax.random.key(0))
            zeros = jax.tree.map(jnp.zeros_like, params)
            found = jax.lax.cond(due, lambda: of_curvature(out, params), lambda: zeros)
            return out.grad, found

        return jax.jit(step).lower(params, True).compile().as_text().count(" convolution(")

    def evidence(out, params):
        (evidence,) = out.curvature().values()
        return {role: draws[0] for role, draws in evidence.gradient.items()}

    assert convolutions(lambda out, params: params) == convolutions(evidence) > 0
    pulled = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 3))
    assert convolutions(lambda out, params: pulled(params)) > convolutions(evidence)  # the control


def test_the_root_of_a_gaussian_with_a_predicted_variance_is_that_of_its_fisher_matrix():
    likelihood, z = ng.losses.mean_and_variance, np.asarray(normal(1, 4, seed=3))
    root = np.asarray(root_of(likelihood, z[0]))
    means, deviations = z[0, :2], np.exp(z[0, 2:] / 2)
    nodes, masses = np.polynomial.hermite_e.hermegauss(20)
    grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    mass = np.outer(masses, masses).reshape(-1) / np.sum(masses) ** 2

    def of_targets(z, targets):
        return jnp.sum(likelihood.terms(z, targets))

    scores = jax.jit(jax.vmap(jax.grad(of_targets), (None, 0)))(z[0], means + deviations * grid)
    assert_equal(root @ root.T, np.einsum("ei,ej,e->ij", scores, scores, mass))
    hessian = jax.jit(jax.hessian(of_targets))(z[0], means + 2 * deviations)
    assert_differs(root @ root.T, hessian)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(likelihood.sample, (0, None)))(keys, z)[:, 0]
    assert_equal(np.std(drawn, axis=0), deviations, 0.05)
    assert likelihood.check(z, means[None]) is None and "mean for each target" in likelihood.check(z, z)
