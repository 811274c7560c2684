"""Weights of examples and positions: masked is absent, doubled is twice there, and batches add by their weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from reference import assert_differs, assert_equal, kron, normal, random_params
from watching import LIKELIHOODS, captured_fisher, evidence_of, factors, mlp

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")
LENGTHS = (4, 2, 3, 1, 4, 2)
THERE = np.arange(4) < np.array(LENGTHS)[:, None]
MASK = THERE.astype(np.float64)


class PerPosition(nn.Module):
    """Sequences [N, T, C], every position by itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(4, name="first")(x)))


@pytest.fixture(scope="module")
def sequences():
    """A model of sequences with inputs and labels, the positions behind the end of a sequence full of numbers."""
    with jax.enable_x64(True):
        model, x = PerPosition(), normal(6, 4, 5)
        yield model, random_params(model, x), x, reference.targets("softmax_cross_entropy", (6, 4, 3))


@pytest.mark.slow
def test_c7_factors_of_a_masked_batch_are_those_of_the_ragged_data(sequences):
    model, params, x, y = sequences
    args = model, ng.losses.softmax_cross_entropy, params
    layers, masked = evidence_of(*args, x, y, weights=jnp.asarray(MASK))
    _, ragged = evidence_of(*args, x[THERE][:, None], y[THERE][:, None])  # every position an example of its own
    _, padded = evidence_of(*args, x, y)
    masked, ragged, padded = (factors(layers, evidence) for evidence in (masked, ragged, padded))
    for name in layers:
        (inputs, outputs), (expected_inputs, expected_outputs) = masked[name], ragged[name]
        assert_equal(outputs, expected_outputs)
        assert_equal(inputs * 6 / sum(LENGTHS), expected_inputs)  # A sums the positions of an example
        assert_differs(padded[name][0] / 4, expected_inputs)
        assert_differs(outputs * sum(LENGTHS) / 24, expected_outputs)


@pytest.mark.slow
def test_a_boolean_mask_is_one_of_zeros_and_ones(sequences):
    model, params, x, y = sequences
    args = model, ng.losses.softmax_cross_entropy, params, x, y
    layers, boolean = evidence_of(*args, weights=jnp.asarray(THERE))
    _, numbers = evidence_of(*args, weights=jnp.asarray(MASK))
    _, nothing = evidence_of(*args, weights=jnp.ones_like(THERE))
    boolean, numbers, nothing = (factors(layers, evidence) for evidence in (boolean, numbers, nothing))
    for name in layers:
        for found, expected in zip(boolean[name], numbers[name], strict=True):
            assert_equal(found, expected)
        assert_differs(nothing[name][0], numbers[name][0])


def test_c7_loss_and_gradient_of_a_masked_batch_are_those_of_the_ragged_data(sequences):
    model, params, x, y = sequences
    loss = "softmax_cross_entropy"
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="true")

    @jax.jit
    def captured(params, weights):
        out = capture.value_and_grad({"params": params}, x, y, weights=weights)
        return out.value, out.grad

    @jax.jit
    @jax.value_and_grad
    def ragged(params):
        ends = [(x[n, :length], y[n, :length]) for n, length in enumerate(LENGTHS)]
        return sum(len(x) * reference.mean_loss(loss, model.apply({"params": params}, x), y) for x, y in ends) / 6

    (value, gradient), (expected, of_ragged) = captured(params, jnp.asarray(MASK)), ragged(params)
    assert_equal(value, expected)
    for name in ("first", "head"):
        assert_equal(gradient[name]["kernel"], of_ragged[name]["kernel"])
    assert_differs(captured(params, jnp.ones((6, 4)))[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [np.array([1.0, 0.0, 2.0, 0.5, 0.0, 9.0]), MASK], ids=["[N]", "[N, T]"])
def test_evidence_of_weighted_examples_or_positions_is_the_weighted_dense_block(sequences, weights):
    model, params, x, y = sequences
    weights = jnp.asarray(weights)
    layers, evidence = evidence_of(model, ng.losses.softmax_cross_entropy, params, x, y, weights=weights)
    expected = reference.fisher_blocks(model, params, ("first",), "softmax_cross_entropy", x, y, weights)["first"]
    assert_equal(captured_fisher(layers["first"], evidence["first"]), expected)
    plain = reference.fisher_blocks(model, params, ("first",), "softmax_cross_entropy", x, y)["first"]
    assert_differs(plain, expected)


@pytest.mark.full
def test_an_example_of_weight_two_counts_as_two_examples():
    net = mlp("tanh", "softmax_cross_entropy")
    args = net.model, ng.losses.softmax_cross_entropy, net.params
    weights = jnp.ones(7).at[3].set(2).at[5].set(0)
    layers, weighted = evidence_of(*args, net.x, net.y, labels="true", weights=weights)
    rows = np.array([0, 1, 2, 3, 3, 4, 6])
    _, repeated = evidence_of(*args, net.x[rows], net.y[rows], labels="true")
    for name, layer in layers.items():
        assert_equal(captured_fisher(layer, weighted[name]), captured_fisher(layer, repeated[name]))
    _, plain = evidence_of(*args, net.x, net.y, labels="true")
    weighted, repeated, plain = (factors(layers, evidence) for evidence in (weighted, repeated, plain))
    for name in layers:
        for ours, theirs in zip(weighted[name], repeated[name], strict=True):
            assert_equal(ours, theirs)
    assert_differs(plain["layer_b"][0], repeated["layer_b"][0])


def test_c5_factors_do_not_depend_on_the_order_of_the_batch():
    net = mlp("tanh", "softmax_cross_entropy")
    order = np.array([3, 1, 6, 0, 2, 5, 4])
    likelihood = LIKELIHOODS["softmax_cross_entropy"]
    _, shuffled = evidence_of(net.model, likelihood, net.params, net.x[order], net.y[order])
    shuffled, straight = factors(net.layers, shuffled), factors(net.layers, net.evidence)
    for name in net.layers:
        for ours, theirs in zip(shuffled[name], straight[name], strict=True):
            assert_equal(ours, theirs)


def test_c6_factors_of_two_unequal_batches_add_by_their_size_and_products_do_not():
    net = mlp("tanh", "softmax_cross_entropy")
    args = net.model, ng.losses.softmax_cross_entropy, net.params
    layers, first = evidence_of(*args, net.x[:3], net.y[:3])
    _, second = evidence_of(*args, net.x[3:], net.y[3:])
    first, second, both = (factors(layers, evidence) for evidence in (first, second, net.evidence))
    for name in layers:
        (a1, g1), (a2, g2), (a, g) = first[name], second[name], both[name]
        assert_equal((3 * a1 + 4 * a2) / 7, a)
        assert_equal((3 * g1 + 4 * g2) / 7, g)
    (a1, g1), (a2, g2), (a, g) = first["layer_b"], second["layer_b"], both["layer_b"]
    assert_differs((3 * kron(a1, g1) + 4 * kron(a2, g2)) / 7, kron(a, g))
    assert_differs((a1 + a2) / 2, a)
