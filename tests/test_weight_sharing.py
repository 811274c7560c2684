"""Positions that share the weights: taken each by itself (expand), or pooled within an example (reduce)."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from one_layer import ekfac_block, kfac_block
from reference import assert_differs, assert_equal, kron, normal, random_params
from watching import captured_fisher, evidence_of, gradients, implied_blocks, prepared, rows_of, watched

import natgrad_jax as ng
from natgrad_jax.algebra import averages
from natgrad_jax.layers.rows import input_moment, output_moment

EXPAND, REDUCE = (kfac_block(0.0, "exact", sharing=sharing) for sharing in ("expand", "reduce"))


class Sequences(nn.Module):
    """Two linear layers; `reduce` takes the mean over positions behind the second."""

    reduce: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="last")(nn.Dense(4, name="first")(x))
        return x.mean(1) if self.reduce else x


def net_of(model, *shape, dtype="float64", **capture):
    x = normal(*shape, dtype=dtype)
    return watched(model, random_params(model, x, dtype=dtype), x, "squared_error", **capture)


@pytest.mark.slow
def test_c23_reduce_is_the_block_of_a_deep_linear_net_whose_positions_are_averaged_before_the_loss(dtype):
    net = net_of(Sequences(), 6, 4, 5, dtype=dtype)
    found = implied_blocks(REDUCE, net)
    for name in net.layers:
        assert_equal(found[name], net.blocks[name])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("method", "reduce"), [(EXPAND, True), (REDUCE, False)], ids=["expand", "reduce"])
def test_c23_either_sharing_fails_in_the_setting_of_the_other(method, reduce):
    net = net_of(Sequences(reduce), 6, 4, 5)
    found = implied_blocks(method, net)
    for name in net.layers:
        assert_differs(found[name], net.blocks[name])


class LinearCNN(nn.Module):
    """Two convolutions, and the sum over positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2, 2), padding="VALID", name="first")(x)
        return nn.Conv(2, (2, 2), padding="VALID", name="last")(x).sum((1, 2))


@pytest.mark.full
def test_c23_reduce_is_the_block_of_the_last_convolution_before_a_sum_and_not_of_the_first(dtype):
    net = net_of(LinearCNN(), 5, 5, 4, 2, dtype=dtype)
    found = implied_blocks(REDUCE, net)
    assert_equal(found["last"], net.blocks["last"])
    assert_differs(found["first"], net.blocks["first"])
    assert_differs(implied_blocks(EXPAND, net)["last"], net.blocks["last"])


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_positions_without_weight_are_not_pooled():
    model, x = Sequences(reduce=False), normal(4, 3, 5)
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    params, y = random_params(model, x), normal(4, 3, 3, seed=1)
    layers, evidence = evidence_of(model, ng.losses.squared_error, params, x, y, weights=jnp.asarray(mask))
    layer, evidence = layers["first"], evidence["first"]
    a, g = (np.asarray(rows) for rows in rows_of(layer, evidence))
    pooled = np.einsum("nti,nt->ni", a, mask)
    averaged = np.einsum("knto,nt->kno", g, mask) / np.maximum(mask.sum(1), 1)[:, None]
    inputs, outputs = (of(layer, evidence, sharing="reduce") for of in (input_moment, output_moment))
    assert_equal(inputs, pooled.T @ pooled / 3)
    assert_equal(outputs, np.einsum("kno,knp->op", averaged, averaged) / (3 * len(g)))
    of_everything = g.mean(2)
    assert_differs(np.einsum("kno,knp->op", of_everything, of_everything) / (3 * len(g)), outputs)
    diagonals = [of(layer, evidence, full=False, sharing="reduce") for of in (input_moment, output_moment)]
    for diagonal, moment in zip(diagonals, (inputs, outputs), strict=True):
        assert_equal(diagonal.entries, np.diag(moment))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_weights_of_examples_enter_pooled_factors_as_often_as_they_say():
    model, x, y = Sequences(), 2 * normal(3, 4, 5), jnp.array([0, 1, 2])
    params, weights = random_params(model, x), jnp.array([3.0, 0.0, 1.0])
    args, rows = (model, ng.losses.softmax_cross_entropy, params), np.array([0, 0, 0, 2])
    layers, weighted = evidence_of(*args, x, y, weights=weights)
    batches = weighted, evidence_of(*args, x[rows], y[rows])[1], evidence_of(*args, x, y)[1]
    weighted, repeated, plain = (
        [of(layers["first"], evidence["first"], sharing="reduce") for of in (input_moment, output_moment)]
        for evidence in batches
    )
    for found, expected in zip(weighted, repeated, strict=True):
        assert_equal(found, expected)
    assert_differs(kron(*plain), kron(*repeated))


class Pixels(nn.Module):
    """Two convolutions, a function of every pixel between them, and the mean over positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (2, 2), name="first")(x))
        return nn.Conv(2, (2, 2), name="last")(x).mean((1, 2))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_ekfac_takes_its_basis_from_pooled_factors_and_its_scale_from_the_gradients_of_examples():
    net = net_of(Pixels(), 4, 3, 3, 2)
    layer, evidence = net.layers["first"], net.evidence["first"]
    state = prepared(ekfac_block(0.0, sharing="reduce"), layer, evidence, 1.0)
    for side, of in zip(state.operator.basis, (input_moment, output_moment), strict=True):
        turned = side.T @ of(layer, evidence, sharing="reduce") @ side
        assert_equal(turned, np.diag(np.diag(turned)))
        turned = side.T @ of(layer, evidence) @ side
        assert np.linalg.norm(turned - np.diag(np.diag(turned))) > 0.05 * np.linalg.norm(turned)
    q, scale = kron(*state.operator.basis), averages.mean(state.operator.scale).ravel()
    assert_equal(captured_fisher(layer, evidence), net.blocks["first"])
    assert_equal(scale, np.einsum("pk,pq,qk->k", q, net.blocks["first"], q))
    rows, columns = rows_of(layer, evidence)
    pooled = np.einsum("ni,kno->knio", rows.sum(-2), columns.mean(-2))
    assert pooled.shape == gradients(layer, evidence).shape
    in_basis = np.einsum("ia,knio,ob->knab", state.operator.basis.inputs, pooled, state.operator.basis.outputs)
    assert_differs(np.mean(in_basis**2, axis=(0, 1)).ravel(), scale)
