"""Second moments of the gradients of examples, E[D D^T] and E[D^T D], against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import assert_differs, assert_equal, kron, normal, random_params
from watching import gradients, rows_of, watched

from natgrad_jax.algebra.moments import gradient_moments, paired_moments
from natgrad_jax.base import Evidence, Layer
from natgrad_jax.layers.rows import partial_traces

pytestmark = pytest.mark.usefixtures("x64")
SIZES = {"by gradients": (9, 4, 3), "by positions": (2, 7, 6), "one position": (1, 4, 3)}  # T, I, O


def rows(positions, inputs, outputs, stack=(2,), draws=3, examples=6):
    """Rows a [S, N, T, I] and g [S, K, N, T, O]."""
    return normal(*stack, examples, positions, inputs), normal(*stack, draws, examples, positions, outputs, seed=1)


def by_definition(a, g):
    d = np.einsum("snti,sknto->sknio", a, g)
    return np.einsum("sknio,sknjo->sij", d, d) / g.shape[1], np.einsum("sknio,sknip->sop", d, d) / g.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 200, 1 << 22])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_both_orders_give_the_moments_however_many_examples_are_taken_at_a_time(sizes, most):
    a, g = rows(*sizes)
    expected = by_definition(a, g)
    moments = jax.jit(gradient_moments, static_argnums=(2, 3))
    for found, whole in zip(moments(a, g, (True, True), most), expected, strict=True):
        assert_equal(found, whole)
    for found, whole in zip(moments(a, g, (False, False), most), expected, strict=True):
        assert_equal(found.entries, np.diagonal(whole, axis1=1, axis2=2))
    for found, whole in zip(paired_moments(a, g), expected, strict=True):
        (assert_equal if sizes[0] == 1 else assert_differs)(found, whole)


@pytest.mark.parametrize(("sizes", "gradients_there"), [((9, 4, 3), True), ((2, 7, 6), False)])
def test_gradients_of_examples_are_formed_only_where_that_is_cheaper(sizes, gradients_there):
    a, g = rows(*sizes, stack=())
    text = str(jax.make_jaxpr(gradient_moments)(a, g))
    assert (f"f64[6,3,{sizes[1]},{sizes[2]}]" in text) == gradients_there


def test_paired_moments_have_no_products_of_different_positions():
    a, g = rows(3, 4, 2)
    apart = (a.reshape(2, 18, 1, 4), g.reshape(2, 3, 18, 1, 2))  # every position an example of its own
    for found, expected in zip(paired_moments(a, g), by_definition(*apart), strict=True):
        assert_equal(found, expected)
    for found, expected in zip(paired_moments(a, g, (False, False)), by_definition(*apart), strict=True):
        assert_equal(found.entries, np.diagonal(expected, axis1=1, axis2=2))


class Pixels(nn.Module):
    """Two convolutions, their positions mixed by the second."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(2, (2, 2), name="last")(nn.tanh(nn.Conv(3, (2, 2), name="first")(x)))


def pixels(**capture):
    x = normal(3, 3, 3, 2)
    net = watched(Pixels(), random_params(Pixels(), x), x, "squared_error", **capture)
    return net.layers["first"], net.evidence["first"], net.blocks["first"]


@pytest.mark.full
@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 3.0)])
def test_c37_they_are_the_partial_traces_of_the_block_also_with_weights(weights):
    layer, evidence, block = pixels(weights=None if weights is None else jnp.asarray(weights))
    four = np.reshape(block, (*layer.shape, *layer.shape))
    expected = np.einsum("iojo->ij", four), np.einsum("ioip->op", four)
    for found, trace in zip(partial_traces(layer, evidence), expected, strict=True):
        assert_equal(found, trace)
    for sharing in ("expand", "reduce"):
        assert_differs(partial_traces(layer, evidence, sharing=sharing)[0], expected[0])


@pytest.mark.full
def test_pooled_ones_are_those_of_the_product_of_a_sum_and_a_mean():
    layer, evidence, _ = pixels()
    a, g = (np.asarray(x) for x in rows_of(layer, evidence))
    pooled = np.einsum("ni,kno->knio", a.sum(-2), g.mean(-2))
    inputs, outputs = partial_traces(layer, evidence, sharing="reduce")
    assert_equal(inputs, np.einsum("knio,knjo->ij", pooled, pooled) / (3 * len(g)))
    assert_equal(outputs, np.einsum("knio,knip->op", pooled, pooled) / (3 * len(g)))
    true = gradients(layer, evidence)
    assert_differs(inputs, np.einsum("knio,knjo->ij", true, true) / (3 * len(g)))


@pytest.mark.full
@pytest.mark.parametrize("sharing", ["example", "expand", "reduce"])
def test_where_g_is_the_identity_they_are_those_of_a_and_the_identity(sharing):
    layer = Layer("one", "dense", (4, 3), (), (2,), "float64")
    a = normal(2, 5, 3, 4)
    evidence = Evidence((a,), None, None, None, None)
    summed = a.sum(-2, keepdims=True) if sharing == "reduce" else a
    moment = np.einsum("snti,sntj->sij", summed, summed) / 5
    inputs, outputs = partial_traces(layer, evidence, sharing=sharing)
    expected = np.stack([kron(one, np.eye(3)).reshape(4, 3, 4, 3) for one in moment])
    assert_equal(inputs, np.einsum("siojo->sij", expected))
    assert_equal(outputs, np.einsum("sioip->sop", expected))
    assert_differs(inputs, moment)
    diagonals = partial_traces(layer, evidence, (False, False), sharing)
    for diagonal, whole in zip(diagonals, (inputs, outputs), strict=True):
        assert_equal(diagonal.entries, np.diagonal(whole, axis1=1, axis2=2))
