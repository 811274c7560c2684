"""TNT: a Kronecker factor for each mode of a parameter array, all of one mean eigenvalue; how its damping enters."""

from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from one_layer import tnt_block
from reference import assert_differs, assert_equal, damped, error, normal, random_params
from tensors import kron, moments, solved, traces, units
from watching import evidence_of, prepared, watched

import natgrad_jax as ng
from natgrad_jax.layers.parameter import parameter
from natgrad_jax.layers.views import view

TNT, PER_MODE, RAW = tnt_block(0.0), tnt_block(0.0, "per_mode"), tnt_block(0.0, normalise=False)
SIZES = [(7,), (4, 6), (4, 3, 5), (2, 3, 2, 4)]
by_modes = pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(sizes, "float64") for sizes in SIZES] + [(SIZES[2], "float32")],
    ids=lambda case: case if isinstance(case, str) else f"{len(case)} modes",
)


# The package ----------------------------------------------------------------------------------------------------------


def tensors(draws, total=1.0):
    """A tensor and its evidence: draws [K, n_1, ..., n_k] of the gradient summed over examples of this total weight."""
    layer = view(parameter("tensor", draws.shape[1:], str(draws.dtype)), draws.shape[1:])
    return layer, ng.Evidence(gradient={"value": draws}, count=jnp.asarray(total, draws.dtype))


@partial(jax.jit, static_argnums=(0, 1))
def _run(method, layer, evidence, momentum, damping):
    state = prepared(method, layer, evidence, damping)
    return state, method.apply(layer, state, momentum, damping)


def run(method, draws, momentum, damping, total=1.0):
    """The state after one batch of draws, and the direction of a tensor."""
    return _run(method, *tensors(draws, total), momentum, damping)


def direction(method, draws, momentum, damping, total=1.0):
    return run(method, draws, momentum, damping, total)[1]


def example(sizes=(4, 3, 5), dtype="float64", draws=20):
    """Draws, a tensor to be preconditioned, and the mean eigenvalue of the product of the U_i."""
    gradients, momentum = normal(draws, *sizes, dtype=dtype), normal(*sizes, seed=1, dtype=dtype)
    return gradients, momentum, float(np.mean(np.square(gradients, dtype=np.float64)))


def inverse(factor):
    return np.linalg.inv(np.asarray(factor, np.float64))


# Factors and directions -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c68_all_traces_are_one_and_all_normalised_factors_have_one_mean_eigenvalue(dtype):
    draws, momentum, size = example(dtype=dtype)
    damping = size * 1e-3
    state, _ = run(TNT, draws, momentum, damping)
    expected = moments(draws)
    for found, factor in zip(state.statistics.total, expected, strict=True):
        assert_equal(found, factor)
        assert_equal(jnp.trace(found), np.mean(np.sum(np.asarray(draws, np.float64) ** 2, axis=(1, 2, 3))))
    gate = {"float64": None, "float32": 1e-4}[dtype]  # read off inverses
    found = [(inverse(p) - damping ** (1 / 3) * np.eye(len(p))).astype(dtype) for p in state.operator]
    for factor in found:
        assert_equal(np.trace(factor) / len(factor), size ** (1 / 3), gate)
    assert_equal(kron(found), kron(expected) / np.trace(expected[0]) ** 2, gate)
    means = [np.trace(factor) / len(factor) for factor in expected]
    assert_differs(np.array(means[1:]), np.array(means[:-1]))
    assert_differs(kron(expected) / np.trace(expected[0]), kron(found))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@by_modes
def test_c69_the_direction_is_the_dense_solve_with_the_kronecker_product(dtype, sizes):
    draws, momentum, size = example(sizes, dtype)
    found = direction(TNT, draws, momentum, 0.3 * size)
    root = (0.3 * size) ** (1 / len(sizes))
    assert_equal(found, solved(units(moments(draws)), root, momentum))
    if len(sizes) > 1:
        assert_differs(solved(moments(draws), root, momentum), found)
    else:
        assert_differs(solved(moments(draws), 2 * root, momentum), found)


@pytest.mark.usefixtures("x64")
def test_per_mode_is_the_damping_itself_in_every_mode():
    draws, momentum, size = example()
    damping = 0.3 * size ** (1 / 3)
    found = direction(PER_MODE, draws, momentum, damping)
    assert_equal(found, solved(units(moments(draws)), damping, momentum))
    assert_equal(found, direction(TNT, draws, momentum, damping**3))
    assert_differs(direction(TNT, draws, momentum, damping), found)


def test_the_sum_over_a_batch_is_divided_by_its_weight(dtype):
    draws, momentum, size = example(dtype=dtype)
    expected = solved(units([factor / 5 for factor in moments(draws)]), (0.1 * size) ** (1 / 3), momentum)
    assert_equal(direction(TNT, draws, momentum, 0.1 * size, total=5.0), expected)
    assert_differs(direction(TNT, draws, momentum, 0.1 * size), expected)


def root_of(size, seed):
    """A symmetric square root of a random covariance."""
    values, vectors = np.linalg.eigh(np.cov(np.random.default_rng(seed).normal(size=(size, 4 * size))))
    return (vectors * np.sqrt(values)) @ vectors.T


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4)], ids=["2 modes", "3 modes"])
def test_c70_a_tensor_normal_covariance_is_found_exactly_and_solved_exactly_without_damping(dtype, sizes):
    root = kron([root_of(size, seed) for seed, size in enumerate(sizes)])
    count = len(root)
    draws = jnp.asarray((root * np.sqrt(count)).T.reshape(count, *sizes), dtype)  # their second moment is root root^T
    covariance, momentum = root @ root.T, normal(*sizes, seed=1, dtype=dtype)
    gate = {"float64": None, "float32": 1e-4}[dtype]  # undamped
    state, found = run(TNT, draws, momentum, 0.0)
    assert_equal(found, np.linalg.solve(covariance, np.ravel(momentum)).reshape(sizes), gate)
    implied = kron([inverse(p) for p in state.operator]).astype(dtype)
    assert_equal(implied, covariance, gate)
    mixed = draws[:, ::-1] + draws  # another covariance, of no Kronecker product
    mixed = mixed * normal(count, *(1 for _ in sizes), dtype=dtype)
    flat = np.asarray(mixed, np.float64).reshape(count, -1)
    state, _ = run(TNT, mixed, momentum, 1e-6)
    assert_differs(kron([inverse(p) for p in state.operator]), flat.T @ flat / count)


def test_c71_a_vector_is_solved_with_the_moving_average_of_the_outer_products(dtype):
    batches, momentum = normal(2, 3, 6, dtype=dtype), normal(6, seed=1, dtype=dtype)
    method, layer = tnt_block(0.6), tensors(batches[0])[0]

    @jax.jit
    def after_both(batches, momentum):
        state = method.init(layer)
        for draws in batches:
            state = method.observe(layer, state, tensors(draws)[1])
        return method.apply(layer, method.refresh(layer, state, 0.2), momentum, 0.2)

    found = after_both(batches, momentum)
    former, latter = (moments(draws)[0] for draws in batches)
    assert_equal(found, np.linalg.solve(damped((0.6 * former + latter) / 1.6, 0.2), np.asarray(momentum, np.float64)))
    assert_differs(np.linalg.solve(damped(latter, 0.2), np.asarray(momentum, np.float64)), found)


# Damping --------------------------------------------------------------------------------------------------------------


def test_c73_the_total_damping_of_a_matrix_is_the_pi_damping_of_kfac(dtype):
    draws, momentum, size = example((4, 6), dtype)
    left, right = moments(draws)
    right = right / np.trace(right)  # so that the product is the block
    damping = 0.1 * size
    pi = np.sqrt((np.trace(left) / 4) / (np.trace(right) / 6))
    expected = solved((left, right), (pi * np.sqrt(damping), np.sqrt(damping) / pi), momentum)
    found = direction(TNT, draws, momentum, damping)
    assert_equal(found, expected)
    assert_differs(solved((left, right), np.sqrt(damping), momentum), found)


def test_c73_the_total_damping_of_a_tensor_is_split_by_the_mean_eigenvalues_of_its_factors(dtype):
    draws, momentum, size = example(dtype=dtype)
    first, second, third = moments(draws)
    factors = 3 * first, second / np.trace(first), third / np.trace(first) / 3  # any scales of this product
    means = np.array([np.trace(factor) / len(factor) for factor in factors])
    damping = 0.1 * size
    expected = solved(factors, damping ** (1 / 3) * means / np.prod(means) ** (1 / 3), momentum)
    found = direction(TNT, draws, momentum, damping)
    assert_equal(found, expected)
    assert_differs(solved(factors, damping ** (1 / 3), momentum), found)


def test_c74_a_loss_seven_times_as_large_gives_a_seventh_of_the_direction(dtype):
    draws, momentum, size = example(dtype=dtype)
    found, expected = direction(TNT, draws, momentum, 0.1 * size), partial(direction, TNT, 7 * draws, 7 * momentum)
    assert_equal(found, 7 * np.asarray(expected(0.1 * size * 49), np.float64))
    assert_differs(7 * np.asarray(expected(0.1 * size)), found)


def test_c75_rotations_of_the_modes_rotate_the_direction(dtype):
    draws, momentum, size = example(dtype=dtype)

    def turned(tensor, matrices):
        for mode, matrix in enumerate(matrices):
            tensor = np.moveaxis(
                np.tensordot(np.asarray(tensor, np.float64), matrix, ((mode - 3,), (0,))), -1, mode - 3
            )
        return jnp.asarray(tensor, dtype)

    def both(matrices):
        found = direction(TNT, turned(draws, matrices), turned(momentum, matrices), 0.1 * size)
        return found, turned(direction(TNT, draws, momentum, 0.1 * size), matrices)

    skew = [np.asarray(normal(n, n, seed=n)) for n in (4, 3, 5)]
    assert_equal(*both([np.linalg.qr(matrix)[0] for matrix in skew]))
    assert_differs(*both(skew))


@pytest.mark.usefixtures("x64")
@by_modes
def test_c76_large_damping_gives_the_gradient_over_the_damping(dtype, sizes):
    draws, momentum, size = example(sizes, dtype)
    damping = size * 1e4 ** len(sizes)
    found = direction(TNT, draws, momentum, damping)
    assert error(damping * found, momentum) < 1e-2
    assert jnp.sum(found * momentum) > 0
    assert_differs(size * direction(TNT, draws, momentum, size), momentum)


@pytest.mark.usefixtures("x64")
def test_c77_factors_that_are_not_normalised_give_the_same_direction_without_damping():
    draws, momentum, size = example()
    assert_equal(direction(RAW, draws, momentum, 0.0), direction(TNT, draws, momentum, 0.0))
    factors = moments(draws)
    found = direction(RAW, draws, momentum, size)
    assert_equal(found, np.trace(factors[0]) ** 2 * solved(factors, size ** (1 / 3), momentum))
    assert_differs(direction(TNT, draws, momentum, size), found)


# Borders --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@by_modes
def test_an_array_whose_gradients_are_zero_has_the_damping_alone(dtype, sizes):
    draws, momentum, _ = example(sizes, dtype)
    assert_equal(direction(TNT, jnp.zeros_like(draws), momentum, 0.25), 4 * np.asarray(momentum))
    if (len(sizes), dtype) == (3, "float64"):
        assert jnp.all(direction(RAW, jnp.zeros_like(draws), momentum, 0.25) == 0)  # so says T^(k-1)
    assert_differs(direction(TNT, draws, momentum, 0.25), 4 * np.asarray(momentum))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [4, 0])
def test_a_mode_that_is_too_long_keeps_the_diagonal_of_its_factor(most):
    draws, momentum, size = example()
    factors = moments(draws)
    kept = [factor if len(factor) <= most else np.diag(np.diag(factor)) for factor in factors]
    state, found = run(tnt_block(0.0, max_factor_dim=most), draws, momentum, 0.1 * size)
    assert_equal(found, solved(units(kept), (0.1 * size) ** (1 / 3), momentum))
    assert error(direction(TNT, draws, momentum, 0.1 * size), found) > 0.05
    leaves = jax.tree.leaves(state.statistics.total)
    assert [leaf.ndim for leaf in leaves] == [1 + (n <= most) for n in (4, 3, 5)]


# What the statistics are of -------------------------------------------------------------------------------------------


AT_ONCE = {"statistics_every": 1, "refresh_every": 1}


@partial(jax.jit, static_argnums=(0, 1))
def _statistics(layers, settings, params, evidence):
    tx = ng.scale_by_tnt(layers, damping=1.0, decay=0.0, **AT_ONCE, **dict(settings))
    _, state = tx.update(params, tx.init(params), curvature=evidence)
    return {name: factors.total for name, factors in state.statistics.items()}


def statistics(layers, params, evidence, **settings):
    """The H_i of every parameter array from one batch, {address: (H_1, ..., H_k)}."""
    return _statistics(layers, tuple(settings.items()), params, evidence)


def of_arrays(block, rows, columns, bias=True):
    """The blocks of kernel and bias in the block [I O, I O] of a layer."""
    four = np.reshape(block, (rows + bias, columns) * 2)
    kernel = four[:rows, :, :rows].reshape(rows * columns, -1)
    return (kernel, four[-1, :, -1]) if bias else (kernel,)


class Enumerated(NamedTuple):
    """A batch with all labels that it can have: their probabilities, and the H_i of each."""

    net: Any
    probabilities: np.ndarray
    factors: dict[str, Any]


@cache
def enumerated() -> Enumerated:
    """A linear softmax model of three classes on two examples of unequal weight."""
    model, x, weights = reference.MLP(widths=(3,)), normal(2, 4), jnp.array([1.0, 2.0])
    net = watched(model, random_params(model, x), x, "softmax_cross_entropy", weights=weights)
    labels = jnp.array(list(product(range(3), repeat=2)))
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="true")

    @jax.jit
    def of_labels(params, x, labels):
        def one(y, estimator):
            out = capture.value_and_grad({"params": params}, x, y, weights=weights)
            return _statistics(net.layers, (("estimator", estimator),), params, out.curvature())

        return {name: jax.vmap(lambda y: one(y, name))(labels) for name in ("minibatch", "per_example")}  # noqa: B023

    logits = np.asarray(model.apply({"params": net.params}, x), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    probabilities = np.array([shares[0, first] * shares[1, second] for first, second in labels])
    return Enumerated(net, probabilities, of_labels(net.params, x, labels))


def expectations(probabilities, draws):
    """Mean and variance over all labels."""
    draws = np.asarray(draws, np.float64)
    mean = np.tensordot(probabilities, draws, 1)
    return mean, np.tensordot(probabilities, (draws - mean) ** 2, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["minibatch", "per_example"])
def test_c78_the_expectation_over_labels_is_the_partial_trace_of_the_fisher_block(estimator):
    net, probabilities, factors = enumerated()
    blocks = of_arrays(net.blocks["layer_b"], 4, 3)
    for role, block, sizes in zip(("kernel", "bias"), blocks, ((4, 3), (3,)), strict=True):
        for found, expected in zip(factors[estimator][f"layer_b/{role}"], traces(block, sizes), strict=True):
            mean, _ = expectations(probabilities, found)
            assert_equal(mean, expected)
            assert_differs(np.mean(np.asarray(found), axis=0), expected)  # all labels alike


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_gradients_of_examples_have_less_variance_than_that_of_the_batch():
    _, probabilities, factors = enumerated()
    for name, of_batch in factors["minibatch"].items():
        for mini, single in zip(of_batch, factors["per_example"][name], strict=True):
            variances = [expectations(probabilities, draws)[1].sum() for draws in (mini, single)]
            assert variances[1] < 0.9 * variances[0]


class Sharing(nn.Module):
    """A convolution in groups, one that is called twice, and a dense layer at every position."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID", name="grouped")(x))
        shared = nn.Conv(4, (1, 2), name="shared")
        x = shared(nn.tanh(shared(x)))
        return nn.Dense(2, name="last")(x).mean((1, 2))


SHAPES = {"grouped": ((4, 1), 4), "shared": ((2, 4), 4), "last": ((4,), 2)}
"""Of each layer of `Sharing` the sizes of (window, C) or (I,), and O."""


def expected_factors(name, block):
    """The H_i of kernel and bias from a block of a layer of `Sharing`; of groups, one after the other."""
    inputs, columns = SHAPES[name]
    kernel, bias = of_arrays(block, int(np.prod(inputs)), columns)
    if name != "grouped":
        return traces(kernel, (*inputs, columns)), [bias]
    six = kernel.reshape((*inputs, 2, 2) * 2)  # window, C, group, outputs of the group
    groups = [traces(six[:, :, group, :, :, :, group].reshape(8, 8), (*inputs, 2)) for group in range(2)]
    return [np.stack(pair) for pair in zip(*groups, strict=True)], [bias]


@cache
def sharing(labels):
    """`Sharing` on three examples of unequal weight, and the block of each layer by definition."""
    model, x, weights = Sharing(), normal(3, 3, 3, 2), jnp.array([1.0, 3.0, 0.5])
    net = watched(model, random_params(model, x), x, "squared_error", labels=labels, weights=weights)
    if labels == "exact":
        return net, net.blocks
    gradients = reference.example_gradients(model, net.params, tuple(SHAPES), "squared_error", x, net.y)
    vectors = {name: np.asarray(gradient).reshape(3, -1) for name, gradient in gradients.items()}
    return net, {name: (rows.T * weights) @ rows / weights.sum() for name, rows in vectors.items()}


def every_factor(net, blocks, **settings):
    """The H_i of the gradients of examples by the package and by definition, one after the other."""
    found = statistics(net.layers, net.params, net.evidence, **settings)
    for name, block in blocks.items():
        for role, expected in zip(("kernel", "bias"), expected_factors(name, np.asarray(block)), strict=True):
            yield from zip(found[f"{name}/{role}"], expected, strict=True)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("labels", ["true", "exact"])
def test_c78_gradients_of_examples_are_those_of_autodiff_whatever_shares_the_weights(labels):
    net, blocks = sharing(labels)
    for found, expected in every_factor(net, blocks, estimator="per_example"):
        assert_equal(found, expected)
    if labels == "true":
        for found, expected in every_factor(net, blocks):
            assert_differs(found, expected)  # that of the batch


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_modes_that_are_too_long_keep_the_diagonals_of_the_gradients_of_examples():
    net, blocks = sharing("exact")
    for most in (3, 0):
        for factor, expected in every_factor(net, blocks, estimator="per_example", max_factor_dim=most):
            is_whole = expected.shape[-1] <= most
            (values,) = jax.tree.leaves(factor)
            assert_equal(values, expected if is_whole else np.diagonal(expected, axis1=-2, axis2=-1))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["minibatch", "per_example"])
def test_a_batch_in_which_no_example_has_weight_shows_nothing(estimator):
    model, x, y = reference.MLP(widths=(3,)), normal(4, 4), jnp.arange(4) % 3
    args = (model, ng.losses.softmax_cross_entropy, random_params(model, x), x, y)

    @partial(jax.jit, static_argnums=0)
    def update(layers, evidence):
        tx = ng.scale_by_tnt(layers, damping=1.0, decay=0.5, estimator=estimator, **AT_ONCE)
        return tx.update(args[2], tx.init(args[2]), curvature=evidence)[1]

    for weights, is_zero in ((jnp.zeros(4), True), (jnp.array([0.0, 1.0, 0.0, 0.0]), False)):
        state = update(*evidence_of(*args, labels="true", weights=weights))
        assert state.metrics.rejected_statistics == 0
        for factors, weight in (state.statistics[f"layer_b/{role}"] for role in ("kernel", "bias")):
            assert weight == (0 if is_zero else 0.5)
            assert all(jnp.all(factor == 0) == is_zero for factor in factors)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_c38_of_true_labels_the_product_is_that_of_the_second_moments_of_gradients_over_their_trace():
    model, x = reference.MLP(widths=(3,), use_bias=False), normal(6, 4)
    params, y = random_params(model, x), normal(6, 3, seed=3)
    layers, evidence = evidence_of(model, ng.losses.squared_error, params, x, y, labels="true")
    d = np.asarray(reference.example_gradients(model, params, ("layer_b",), "squared_error", x, y)["layer_b"])
    left, right = np.einsum("nio,njo->ij", d, d) / 6, np.einsum("nio,nip->op", d, d) / 6
    tx = ng.scale_by_tnt(layers, damping=1.0, estimator="per_example", **AT_ONCE)
    state = jax.jit(tx.update)(params, tx.init(params), curvature=evidence)[1].operators["layer_b/kernel"]
    found = kron([inverse(p) - np.eye(len(p)) for p in state.value])
    assert_equal(found, kron([left, right]) / np.trace(left))
    batch = d.sum(0)
    assert_differs(kron([batch @ batch.T, batch.T @ batch]) / np.sum(batch**2) / 6, found)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_statistics_of_the_gradient_are_its_own_square_and_ask_for_no_curvature():
    gradient = {"kernel": normal(4, 3), "bias": normal(3, seed=1), "scale": normal(seed=2)}
    tx = ng.scale_by_tnt(damping=0.1, statistics="gradient", decay=0.0, **AT_ONCE)

    def refuse():
        raise AssertionError("the curvature was asked")

    found, state = jax.jit(lambda gradient: tx.update(gradient, tx.init(gradient), curvature=refuse))(gradient)
    for name, array in gradient.items():
        array = np.asarray(array).reshape(array.shape or (1,))
        factors = moments(array[None])
        assert_equal(np.ravel(found[name]), np.ravel(solved(units(factors), 0.1 ** (1 / array.ndim), array)))
        for ours, theirs in zip(state.statistics[name].total, factors, strict=True):
            assert_equal(ours, theirs)
            assert_differs(ours / 3, theirs)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_statistics_of_the_gradient_are_not_those_of_the_labels_that_the_model_would_give():
    net = enumerated().net
    gradient = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=3), net.params)
    own = statistics(net.layers, gradient, net.evidence, statistics="gradient")["layer_b/kernel"][0]
    of_model = statistics(net.layers, gradient, net.evidence)["layer_b/kernel"][0]
    kernel = np.asarray(gradient["layer_b"]["kernel"])
    assert_equal(own, kernel @ kernel.T)
    assert_differs(of_model / np.trace(of_model), own / np.trace(own))
