"""K-FAC is the dense block exactly where the theory says so, and visibly not elsewhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from one_layer import kfac_block
from reference import assert_differs, assert_equal, damped, kron, normal, random_params
from watching import (
    AT_ONCE,
    evidence_of,
    factors,
    factors_of,
    first_step,
    implied_blocks,
    mlp,
    operator,
    pairs,
    rows_of,
    watched,
)

import natgrad_jax as ng

EXACT = kfac_block(0.0, "exact")
"""The damping added to the eigenvalues of A (x) G, so that its operator shows the block."""
PI = kfac_block(0.0)

with_losses = pytest.mark.parametrize(
    "loss", ["squared_error", "softmax_cross_entropy", "sigmoid_binary_cross_entropy"]
)


# Unshared layers ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_c18_holds_over_two_unequal_batches_that_are_averaged_by_their_size():
    net = mlp("linear")
    name, layer = "layer_b", net.layers["layer_b"]
    batches = [
        evidence_of(net.model, net.likelihood, net.params, net.x[part], net.y[part])[1][name]
        for part in (slice(3), slice(3, 7))
    ]

    @partial(jax.jit, static_argnums=0)
    def inverse(decay):
        state = kfac_block(0.0, "exact").init(layer)
        for weight, evidence in zip((0.0, decay), batches, strict=True):
            state = kfac_block(weight, "exact").observe(layer, state, evidence)
        state = EXACT.refresh(layer, state, 1.0)
        return reference.operator(partial(EXACT.apply, layer, state, damping=1.0), layer.shape)

    assert_equal(inverse(3 / 7), np.linalg.inv(damped(net.blocks[name], 1.0)))
    assert reference.error(inverse(0.9), np.linalg.inv(damped(net.blocks[name], 1.0))) > 0.05


@pytest.mark.usefixtures("x64")
def test_c9_kfac_is_the_empirical_fisher_of_one_example():
    one, seven = mlp("tanh", "softmax_cross_entropy", examples=1), mlp("tanh", "softmax_cross_entropy")
    for net, says in ((one, assert_equal), (seven, assert_differs)):
        name = "layer_b"
        expected = reference.example_gradients(net.model, net.params, (name,), "softmax_cross_entropy", net.x, net.y)
        labelled = watched(net.model, net.params, net.x, "softmax_cross_entropy", labels="true")
        says(kron(*factors(labelled.layers, labelled.evidence)[name]), reference.second_moment(expected[name]))


def test_c21_kfac_is_the_block_where_inputs_and_cotangents_are_independent(dtype):
    some, others = normal(7, 4, dtype=dtype), normal(9, 3, seed=1, dtype=dtype)
    layer, evidence = pairs(jnp.repeat(some, 9, axis=0), jnp.tile(others, (7, 1)))
    block = reference.second_moment(np.einsum("ni,mo->nmio", some, others).reshape(63, 4, 3))
    assert_equal(operator(EXACT, layer, evidence, 1.0), np.linalg.inv(damped(block, 1.0)))


@pytest.mark.usefixtures("x64")
def test_c21_fails_where_they_are_not():
    inputs = normal(63, 4)
    cotangents = inputs[:, :3] * normal(63, 1, seed=1)
    layer, evidence = pairs(inputs, cotangents)
    found = kron(*factors_of(layer, evidence))
    assert_differs(found, reference.second_moment(np.einsum("ni,no->nio", inputs, cotangents)))


@pytest.mark.usefixtures("x64")
def test_c22_kfac_is_not_the_block_of_a_layer_with_one_output():
    inputs, cotangents = normal(20, 4), normal(20, 1, seed=1) * jnp.abs(normal(20, 1, seed=2)) ** 2
    layer, evidence = pairs(inputs, cotangents)
    found = kron(*factors_of(layer, evidence))
    assert_differs(found, reference.second_moment(np.einsum("ni,no->nio", inputs, cotangents)))


# Shared layers --------------------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """Two linear layers; `reduce` takes the mean over positions between them."""

    reduce: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        return nn.Dense(3, name="head")(x.mean(1) if self.reduce else x)


@pytest.mark.slow
def test_c23_expand_is_the_block_of_a_deep_linear_net_with_a_loss_per_position(dtype):
    x = normal(6, 4, 5, dtype=dtype)
    net = watched(Sequences(), random_params(Sequences(), x, dtype=dtype), x, "squared_error")
    found = implied_blocks(EXACT, net)
    for name in net.layers:
        assert_equal(found[name], net.blocks[name])


@pytest.mark.usefixtures("x64")
def test_c23_expand_fails_where_positions_are_averaged_before_the_loss():
    x = normal(6, 4, 5)
    model = Sequences(reduce=True)
    net = watched(model, random_params(model, x), x, "squared_error")
    found = implied_blocks(EXACT, net)
    assert_differs(found["first"], net.blocks["first"])
    assert_equal(found["head"], net.blocks["head"])


class Pixels(nn.Module):
    """A convolution, and a layer of every pixel by itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (1, 1), name="head")(nn.tanh(nn.Conv(4, (2, 2), padding="VALID", name="first")(x)))


@pytest.mark.slow
def test_c20_kfac_is_the_block_of_convolutions_of_constant_images(dtype):
    x = jnp.ones((3, 4, 3, 2), dtype) * normal(2, dtype=dtype)
    net = watched(Pixels(), random_params(Pixels(), x, dtype=dtype), x, "squared_error")
    found = implied_blocks(EXACT, net)
    for name in net.layers:
        assert_equal(found[name], net.blocks[name])


@pytest.mark.usefixtures("x64")
def test_c20_fails_with_images_that_are_not_constant():
    x = normal(3, 4, 3, 2)
    net = watched(Pixels(), random_params(Pixels(), x), x, "squared_error")
    assert_differs(implied_blocks(EXACT, net)["first"], net.blocks["first"])


class Grouped(nn.Module):
    """One convolution of two groups, three channels in and two out each."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x)


@pytest.mark.slow
def test_c25_a_grouped_convolution_has_one_input_factor_per_group(dtype):
    scales = jnp.asarray([1, 1, 1, 2, 2, 2], dtype)  # the groups see different data
    x = normal(2, 5, 4, 6, dtype=dtype) * scales
    net = watched(Grouped(), random_params(Grouped(), x, dtype=dtype), x, "squared_error")
    inputs, outputs = factors(net.layers, net.evidence)["grouped"]
    rows, columns = net.layers["grouped"].shape
    dense = np.reshape(net.blocks["grouped"], (rows, 2, columns, rows, 2, columns))
    averaged = np.mean(inputs, axis=0)
    for group in range(2):
        block = dense[:, group, :, :, group, :].reshape(rows * columns, rows * columns)
        assert_equal(kron(inputs[group], outputs[group]).astype(dtype), block)
        assert_differs(kron(averaged, outputs[group]), block)


@pytest.mark.usefixtures("x64")
def test_c26_every_placement_of_the_scale_of_a_convolution_gives_one_block():
    x = normal(5, 3, 4, 2)
    net = watched(Pixels(), random_params(Pixels(), x), x, "softmax_cross_entropy")
    name, layer, evidence = "first", net.layers["first"], net.evidence["first"]
    found = kron(*factors(net.layers, net.evidence)[name])
    rows, columns = (np.asarray(x) for x in rows_of(layer, evidence))
    examples, positions = rows.shape[:2]
    draws = columns.shape[0]
    a = np.einsum("nti,ntj->ij", rows, rows)
    g = np.einsum("knto,kntp->op", columns, columns) / draws
    both_means = kron(a / (examples * positions), g / (examples * positions))
    assert_equal(found, kron(a / examples, g / (examples * positions)))
    assert_equal(found, positions * both_means)
    assert_equal(found, kron(a / examples, g / examples) / positions)
    assert_equal(found, kron(a / examples / positions**2, g / examples * positions))
    assert_differs(found, both_means)


class Halves(nn.Module):
    """One layer on both halves of the input, its outputs side by side."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(3, name="shared")
        return jnp.concatenate([shared(half) for half in jnp.split(x, 2, axis=-1)], axis=-1)


@pytest.mark.slow
def test_c27_a_layer_called_twice_is_a_layer_with_two_positions(dtype):
    x = normal(1, 8, dtype=dtype)
    net = watched(Halves(), random_params(Halves(), x, dtype=dtype), x, "squared_error")
    assert_equal(implied_blocks(EXACT, net)["shared"], net.blocks["shared"])
    inputs, outputs = factors(net.layers, net.evidence)["shared"]
    merely_summed = kron(inputs, 2 * outputs)
    assert_differs(merely_summed, net.blocks["shared"])


# Steps ----------------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """Linear regression."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="only")(x)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["pi", "even", "exact"])
def test_c29_one_undamped_step_of_linear_regression_is_least_squares(dtype, split):
    x, y = normal(30, 5, dtype=dtype), normal(30, 3, seed=1, dtype=dtype)
    start = random_params(Affine(), x, dtype=dtype)
    kfac = partial(ng.kfac, 1.0, damping=0.0, split=split, **AT_ONCE, kl_clip=None)
    found = first_step(kfac, Affine(), ng.losses.squared_error, start, x)(start, x, y)
    rows = np.concatenate([np.asarray(x, np.float64), np.ones((30, 1))], axis=1)
    expected = np.linalg.lstsq(rows, np.asarray(y, np.float64))[0]
    gate = 1e-4 if dtype == "float32" else None  # the floor of the damping, 1e-6, times the condition of the factors
    assert_equal(reference.matrix(found["only"]), expected, gate)
    assert_differs(reference.matrix(start["only"]), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_c30_an_undamped_step_moves_the_function_alike_in_all_affine_coordinates_of_the_inputs():
    model, x, y = reference.MLP(), normal(40, 5), normal(40, 3, seed=1)
    params = random_params(model, x)
    turn, shift = jnp.eye(5) + 0.5 * normal(5, 5, seed=3), normal(5, seed=4)
    kernel = jnp.linalg.solve(turn, params["layer_b"]["kernel"])
    compensated = {"kernel": kernel, "bias": params["layer_b"]["bias"] - shift @ kernel}

    def movements(optimizer):
        step = first_step(optimizer, model, ng.losses.squared_error, params, x)
        for start, inputs in ((params, x), ({**params, "layer_b": compensated}, x @ turn + shift)):
            moved = step(start, inputs, y)
            yield model.apply({"params": moved}, inputs) - model.apply({"params": start}, inputs)

    assert_equal(*movements(partial(ng.kfac, 0.3, damping=0.0, **AT_ONCE, kl_clip=None)))
    assert_differs(*movements(lambda layers: optax.with_extra_args_support(optax.sgd(0.3))))


@pytest.mark.usefixtures("x64")
def test_c10_an_undamped_step_does_not_depend_on_the_scale_of_the_loss_unless_labels_are_the_true_ones():
    model, x, y = Affine(), normal(30, 5), normal(30, 3, seed=1)
    params = random_params(model, x)
    gradient = normal(6 * 3, seed=2)

    def direction(labels, scale):
        layers, evidence = evidence_of(model, ng.losses.gaussian(1 / scale), params, x, y, labels=labels)
        return operator(PI, layers["only"], evidence["only"], 0.0) @ (scale * gradient)

    assert_equal(direction("exact", 17.0), direction("exact", 1.0))
    assert_equal(direction("true", 17.0), direction("true", 1.0) / 17)
    assert_differs(direction("true", 17.0), direction("true", 1.0))
