"""What Shampoo is: a polar factor, a pair of partial traces, the fixed point of a coupled pair; and its symmetries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from one_layer import shampoo_block, tkfac_block
from reference import assert_differs, assert_equal, kron, normal
from test_shampoo import SETTINGS, root, run, stream
from watching import captured_fisher, gradients, implied_block, random_layers

import natgrad_jax as ng
from natgrad_jax.algebra import averages
from natgrad_jax.layers.parameter import parameter
from natgrad_jax.layers.views import view


def polar_factors(dtype, **settings):
    """The directions of the first step with hardly any damping, and the polar factors of the gradients."""
    tree = {str(shape): normal(*shape, dtype=dtype) for shape in ((6, 4), (4, 6), (7,))}
    tx = ng.scale_by_shampoo(**{"damping": 0.0, "refresh_every": 1, **settings})
    found = jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])(tree)
    expected = {}
    for name, gradient in tree.items():
        u, _, v = np.linalg.svd(np.asarray(gradient, np.float64).reshape(len(gradient), -1), full_matrices=False)
        expected[name] = (u @ v).reshape(gradient.shape)
    return [(found[name], expected[name]) for name in tree]


@pytest.mark.slow
@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_c47_the_first_step_is_the_polar_factor_of_the_gradient(dtype, root):
    gate = {"float64": 1e-7, "float32": 1e-3}[dtype]  # null vectors, known to eps, count up to (8 eps)^(-1/2) fold
    for found, expected in polar_factors(dtype, root=root):
        assert_equal(found, expected, gate)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("other", [{"exponent": 0.125}, {"damping": 1.0}])
def test_c47_with_another_exponent_or_damping_it_is_not(other):
    for found, expected in polar_factors("float64", **other):
        assert_differs(found, expected)


def tensor_layer(*shape):
    """One array of that shape as a tensor, without blocks."""
    return view(parameter("x", shape, "float64"), shape)


def draws_of(left, right):
    """Gradients [n m, n, m] whose second moment is exactly A (x) B."""
    size = len(left) * len(right)
    white = np.sqrt(size) * np.eye(size).reshape(size, len(left), len(right))
    return jnp.asarray(root(left, 0, -0.5) @ white @ root(right, 0, -0.5))


def two_sides():
    return tuple(np.asarray(normal(9, n, seed=n)).T @ np.asarray(normal(9, n, seed=n)) / 9 for n in (4, 3))


@pytest.mark.usefixtures("x64")
def test_c46_three_coupled_alternations_from_the_identity_recover_the_factors_of_a_product():
    left, right = two_sides()
    layer, evidence = tensor_layer(4, 3), ng.Evidence(gradient={"value": draws_of(left, right)}, count=jnp.ones(()))

    def alternated(coupled):
        method = shampoo_block(0.0, 0.5, coupled=coupled)
        state = method.init(layer)
        for side in (0, 1, 0):
            fresh = method.refresh(layer, method.observe(layer, state, evidence), 1e-13)
            roots = list(state.operator)
            roots[side] = fresh.operator[side]
            state = state._replace(operator=tuple(roots))
        return kron(*(np.linalg.matrix_power(np.linalg.inv(side), 2) for side in state.operator))

    assert_equal(alternated(coupled=True), kron(left, right))
    assert_differs(alternated(coupled=False), kron(left, right))


@pytest.mark.usefixtures("x64")
def test_c46_coupled_averages_tend_to_the_factors_of_a_product():
    left, right = two_sides()
    layer, evidence = tensor_layer(4, 3), ng.Evidence(gradient={"value": draws_of(left, right)}, count=jnp.ones(()))

    @partial(jax.jit, static_argnums=0)
    def limit(coupled):
        method = shampoo_block(0.5, coupled=coupled)

        def step(_, state):
            return method.refresh(layer, method.observe(layer, state, evidence), 1e-13)

        return averages.mean(jax.lax.fori_loop(0, 60, step, method.init(layer)).statistics)

    assert_equal(kron(*limit(True)), kron(left, right))
    assert_differs(kron(*limit(False)), kron(left, right))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_c38_of_gradients_of_examples_the_averages_are_the_partial_traces_of_the_fisher_block_and_those_of_tkfac():
    layer, evidence, _ = random_layers(6, 5, 64, copies=1)
    d = jnp.asarray(gradients(layer, evidence)[0, 0])
    method, tensor = shampoo_block(0.0), tensor_layer(6, 5)
    state = method.observe(tensor, method.init(tensor), ng.Evidence(gradient={"value": d}, count=jnp.ones(())))
    found = averages.mean(state.statistics)
    block = captured_fisher(layer, evidence)[0]
    for ours, theirs in zip(found, reference.partial_traces(block, (6, 5)), strict=True):
        assert_equal(ours, theirs)
    of_tkfac = implied_block(tkfac_block(0.0, "exact"), layer, evidence)[0]
    assert_equal(of_tkfac, kron(*found) / np.trace(found[0]))
    batch = method.observe(
        tensor, method.init(tensor), ng.Evidence(gradient={"value": d.sum(0)[None] / 64}, count=jnp.ones(()))
    )
    for ours, theirs in zip(averages.mean(batch.statistics), found, strict=True):
        assert_differs(ours, theirs)  # of the mean gradient it is another matrix


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def rotated(tree):
    """Both modes of a matrix, inputs and outputs of a kernel, rotated."""
    turned = {}
    for name, leaf in tree.items():
        left, right = (jnp.asarray(rotation(size, size), leaf.dtype) for size in leaf.shape[-2:])
        turned[name] = jnp.einsum("...io,ij,op->...jp", leaf, left, right, precision="highest")
    return turned


@pytest.mark.slow
@pytest.mark.parametrize("coupled", [False, True])
def test_c75_rotated_modes_rotate_the_direction(dtype, coupled):
    data = stream(3, dtype, {"kernel": (2, 1, 3, 4)} if coupled else {"matrix": (4, 6)})
    tx = ng.shampoo(0.5, coupled=coupled, **SETTINGS)
    (found, _), (expected, _) = run(tx, rotated(data)), run(tx, data)
    for name, leaf in rotated(expected).items():
        assert_equal(found[name], leaf)
        assert_differs(expected[name], leaf)


@pytest.mark.usefixtures("x64")
def test_c75_blocks_do_not_rotate():
    data, tx = stream(3, shapes={"matrix": (4, 6)}), ng.shampoo(0.5, block_size=2, **SETTINGS)
    (found, _), (expected, _) = run(tx, rotated(data)), run(tx, data)
    assert_differs(found["matrix"], rotated(expected)["matrix"])
