"""TEKFAC: the best diagonal there is in TKFAC's basis, and the damping that follows the curvature of convolutions."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from methods_table import SETTINGS, measured, task
from one_layer import State, ekfac_block, tekfac_block, tkfac_block
from reference import assert_differs, assert_equal, damped, diagonal_in, error, errors, kron, normal, recomposed
from watching import (
    basis_and_scale,
    captured_fisher,
    factors,
    factors_of,
    implied_block,
    mlp,
    operator,
    pairs,
    prepared,
    random_layers,
    state_of,
    summed,
)

import natgrad_jax as ng
from natgrad_jax.algebra import averages
from natgrad_jax.algebra.averages import Average
from natgrad_jax.blocks.kronecker import Traces
from natgrad_jax.layers.rows import to_matrix

TEKFAC, TKFAC, EKFAC = tekfac_block(0.0), tkfac_block(0.0, "exact"), ekfac_block(0.0)


# Where it is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1), (1, 4)])
def test_c22_tekfac_is_the_block_of_a_layer_with_one_output_or_one_input(dtype, sizes):
    one = normal(20, 1, seed=1, dtype=dtype) * jnp.abs(normal(20, 1, seed=2, dtype=dtype)) ** 2
    a, g = (normal(20, 4, dtype=dtype), one) if sizes == (4, 1) else (one, normal(20, 4, dtype=dtype))
    layer, evidence = pairs(a, g)
    block = reference.second_moment(jnp.einsum("ni,no->nio", a, g))
    assert_equal(implied_block(TEKFAC, layer, evidence), block)
    assert_differs(implied_block(EKFAC, layer, evidence), block)


def test_c21_tekfac_is_the_block_where_inputs_and_cotangents_are_independent(dtype):
    some, others = normal(7, 4, dtype=dtype), normal(9, 3, seed=1, dtype=dtype)
    independent = jnp.repeat(some, 9, axis=0), jnp.tile(others, (7, 1))
    correlated = normal(63, 4, dtype=dtype), normal(63, 4, dtype=dtype)[:, :3]
    for (a, g), says in ((independent, assert_equal), (correlated, assert_differs)):
        layer, evidence = pairs(a, g)
        says(implied_block(TEKFAC, layer, evidence), reference.second_moment(jnp.einsum("ni,no->nio", a, g)))


# The scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c32_the_scale_is_the_diagonal_of_the_block_in_the_basis_and_keeps_its_trace(dtype):
    net = mlp("tanh", "softmax_cross_entropy", dtype=dtype)
    for name, layer in net.layers.items():
        q, scale = basis_and_scale(state_of(TEKFAC, layer, net.evidence[name], 1.0))
        assert_equal(scale, diagonal_in(q, net.blocks[name]))
        assert_equal(np.sum(scale), np.trace(net.blocks[name]))
        if name == "layer_b":
            assert_differs(diagonal_in(q, kron(*factors(net.layers, net.evidence)[name])), scale)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(3, 5, 4), (7, 3, 79)])
def test_c33_tekfac_is_never_further_from_the_block_than_tkfac(sizes):
    layer, evidence, blocks = random_layers(*sizes, copies=200)
    q, scale = basis_and_scale(state_of(TEKFAC, layer, evidence, 1.0))
    of_tkfac = errors(implied_block(TKFAC, layer, evidence), blocks)
    assert np.all(errors(recomposed(q, scale), blocks) <= of_tkfac * (1 + 1e-9))
    assert np.any(errors(recomposed(q, scale), blocks) < 0.9 * of_tkfac)
    in_another_basis = recomposed(np.swapaxes(q, 1, 2), scale)
    assert not np.all(errors(in_another_basis, blocks) <= of_tkfac * (1 + 1e-9))


@pytest.mark.slow
def test_c40_with_the_factors_of_kfac_in_the_place_of_the_traces_it_is_ekfac(dtype):
    layer, evidence, _ = random_layers(6, 4, 50, copies=1, dtype=dtype)
    damping, gradient = 30.0, normal(1, 6, 4, seed=9, dtype=dtype)
    a, g = factors_of(layer, evidence)

    @jax.jit
    def updates(evidence, a, g):
        theirs = EKFAC.apply(layer, prepared(EKFAC, layer, evidence, damping), gradient, damping)
        own = prepared(TEKFAC, layer, evidence, damping)
        exchanged = TEKFAC.refresh(layer, own._replace(statistics=Average(Traces(a, g), jnp.ones(1, dtype))), damping)
        exchanged = TEKFAC.rescale(layer, exchanged, evidence)
        return theirs, *(TEKFAC.apply(layer, state, gradient, damping) for state in (exchanged, own))

    theirs, exchanged, own = updates(evidence, a, g)
    assert_equal(exchanged, theirs, {"float64": None, "float32": 1e-4}[dtype])  # damping / largest of the scale
    assert error(own, theirs) > 0.05


@pytest.mark.usefixtures("x64")
def test_c41_after_a_refresh_the_scale_is_the_diagonal_in_the_new_basis_of_the_batch_at_hand():
    layer, first, _ = random_layers(6, 4, 200, copies=1)
    a, g = normal(1, 50, 6, seed=5), normal(1, 50, 4, seed=6)
    _, second = pairs(a, g * (1 + a[..., :4] ** 2))
    method = tekfac_block(0.5)

    @jax.jit
    def steps(first, second):
        old = prepared(method, layer, first, 1.0)
        new = method.refresh(layer, method.observe(layer, old, second), 1.0)
        kept = new._replace(operator=new.operator._replace(scale=old.operator.scale))  # over the change of the basis
        return [method.rescale(layer, state, second) for state in (new, kept)]

    state, kept = steps(first, second)
    q, scale = basis_and_scale(state)
    assert_equal(scale, diagonal_in(q, captured_fisher(layer, second)))
    assert_differs(scale, diagonal_in(np.swapaxes(q, 1, 2), captured_fisher(layer, second)))
    assert_differs(basis_and_scale(kept)[1], scale)


@pytest.mark.usefixtures("x64")
def test_the_minibatch_scale_starts_at_the_eigenvalues_of_tkfac():
    layer, evidence, _ = random_layers(6, 4, 50, copies=1)
    method = tekfac_block(0.5, "minibatch")
    q, scale = basis_and_scale(state_of(method, layer, evidence, 1.0))
    start = diagonal_in(q, implied_block(TKFAC, layer, evidence))
    coordinates = np.einsum("spk,sp->sk", q, np.reshape(summed(layer, evidence), (1, -1)))
    assert_equal(scale, 0.5 * start + 0.5 * coordinates**2 / 50)
    assert_differs(scale, start)


# Damping --------------------------------------------------------------------------------------------------------------


def test_c53_the_damped_step_is_the_dense_solve(dtype):
    net = mlp("tanh", "softmax_cross_entropy", dtype=dtype)
    layer, evidence = net.layers["layer_b"], net.evidence["layer_b"]
    block = recomposed(*basis_and_scale(state_of(TEKFAC, layer, evidence, 1e-2)))
    gate = {"float64": 1e-9, "float32": 1e-4}[dtype]  # the condition of the damped block times the rounding
    assert_equal(operator(TEKFAC, layer, evidence, 1e-2), np.linalg.inv(damped(block, 1e-2)), gate)
    assert_differs(operator(TEKFAC, layer, evidence, 1e-2), np.linalg.inv(damped(block, 2e-2)))


@cache
def first_step(where, rule):
    """A compiled first step: damping -> updates and gradients as matrices, and the state of every layer."""
    (gradient, evidence), layers = measured(where), task(where).layers
    tx = ng.scale_by_tekfac(layers, damping_rule=rule, **SETTINGS)

    def matrices(tree):
        return {
            name: to_matrix(layer, {leaf.role: reference.take(tree, leaf.address) for leaf in layer.leaves})
            for name, layer in layers.items()
        }

    @jax.jit
    def step(damping):
        updates, state = tx.update(gradient, tx.init(gradient), curvature=evidence, damping=damping)
        return matrices(updates), matrices(gradient), {name: State((), state.operators[name].value) for name in layers}

    return step


def solved(state, gradient, strengths):
    """(Q diag(scale) Q^T + x I)^-1 of the gradient, dense, with one strength x for each copy of a stack."""
    block = recomposed(*basis_and_scale(state)).astype(np.float64)
    added = np.reshape(strengths, (*np.shape(strengths), 1, 1)) * np.eye(block.shape[-1])
    return np.linalg.solve(block + added, np.reshape(gradient, (*block.shape[:-1], 1))).reshape(gradient.shape)


@pytest.mark.full
@pytest.mark.parametrize("floor", ["low", "between", "high"])
def test_a_convolution_is_damped_by_its_mean_eigenvalue_and_a_dense_layer_by_the_largest_of_them(floor):
    step = first_step("convnet", "mean_eigenvalue")
    _, gradients, states = step(1e-5)
    means = {name: np.mean(averages.mean(state.operator.scale), axis=(-2, -1)) for name, state in states.items()}
    smallest, *_, largest = sorted(np.concatenate([np.ravel(means[name]) for name in ("Conv_0", "Conv_1")]))
    assert largest > 1.2 * smallest
    damping = {"low": 1e-5, "between": np.sqrt(smallest * largest), "high": 30 * largest}[floor]
    updates, gradients, states = step(float(damping))
    strengths = {name: np.maximum(mean, damping) for name, mean in means.items()}
    strengths["Dense_0"] = max(largest, damping)
    gate = 1e-4  # the condition of the damped block times the rounding
    for name in updates:
        assert_equal(updates[name], solved(states[name], gradients[name], strengths[name]), gate)
    if floor == "low":
        for name in updates:
            assert_differs(updates[name], solved(states[name], gradients[name], damping))
        assert_differs(updates["Dense_0"], solved(states["Dense_0"], gradients["Dense_0"], means["Dense_0"]))


@pytest.mark.full
@pytest.mark.parametrize(("where", "rule"), [("convnet", "scalar"), ("mlp", "mean_eigenvalue")])
def test_the_scalar_rule_and_a_model_without_convolutions_have_the_damping_itself(where, rule):
    updates, gradients, states = first_step(where, rule)(1e-3)
    gate = 1e-3  # the condition of the damped block times the rounding
    for name in updates:
        assert_equal(updates[name], solved(states[name], gradients[name], 1e-3), gate)
        assert_differs(updates[name], solved(states[name], gradients[name], 3e-3))
