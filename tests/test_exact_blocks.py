"""Where every method of the K-FAC family is the dense block, and where none is. A new one adds a row to `METHODS`."""

import pytest
from one_layer import ekfac_block, kfac_block, tekfac_block, tkfac_block
from reference import assert_differs, assert_equal, kron
from watching import factors, implied_blocks, mlp

from natgrad_jax.base import Method

METHODS = {
    "kfac": kfac_block(0.0, "exact"),
    "ekfac": ekfac_block(0.0),
    "tkfac": tkfac_block(0.0, "exact"),
    "tekfac": tekfac_block(0.0),
}
"""With the damping added to eigenvalues, so that the operator of a method shows its block."""

with_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
with_losses = pytest.mark.parametrize(
    "loss", ["squared_error", "softmax_cross_entropy", "sigmoid_binary_cross_entropy"]
)


@pytest.mark.slow
@with_methods
@pytest.mark.parametrize("use_bias", [True, False])
def test_c18_the_block_of_a_deep_linear_net_with_squared_error(method: Method, use_bias, dtype):
    net = mlp("linear", use_bias=use_bias, dtype=dtype)
    found = implied_blocks(method, net)
    for name in net.layers:
        assert_equal(found[name], net.blocks[name])


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
def test_c18_the_product_of_its_factors_is_that_block(use_bias, dtype):
    net = mlp("linear", use_bias=use_bias, dtype=dtype)
    for name, pair in factors(net.layers, net.evidence).items():
        assert_equal(kron(*pair).astype(dtype), net.blocks[name])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_methods
@pytest.mark.parametrize(("activation", "loss"), [("linear", "softmax_cross_entropy"), ("tanh", "squared_error")])
def test_c18_fails_with_another_loss_or_an_activation(method: Method, activation, loss):
    net = mlp(activation, loss)
    assert_differs(implied_blocks(method, net)["layer_b"], net.blocks["layer_b"])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_methods
@with_losses
@pytest.mark.parametrize("copies", [1, 7])
def test_c19_and_c20_the_block_of_one_example_also_if_it_is_repeated(method: Method, loss, copies):
    net = mlp("tanh", loss, examples=1, copies=copies)
    found = implied_blocks(method, net)
    for name in net.layers:
        assert_equal(found[name], net.blocks[name])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_methods
@with_losses
def test_c19_and_c20_fail_with_seven_different_examples(method: Method, loss):
    net = mlp("tanh", loss)
    assert_differs(implied_blocks(method, net)["layer_b"], net.blocks["layer_b"])
