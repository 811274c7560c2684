"""An eigenbasis refreshed from the old one by a step of orthogonal iteration, and the scale that moves along."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import ekfac_block, tekfac_block
from reference import assert_differs, assert_equal, error, kron, normal, recomposed
from watching import basis_and_scale, pairs, random_layers, state_of

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.eigenbasis import Basis, warm_eigenbasis
from natgrad_jax.algebra.stacks import Diagonal

METHODS = {"ekfac": ekfac_block, "tekfac": tekfac_block}
with_methods = pytest.mark.parametrize("block", METHODS.values(), ids=METHODS)


def factor(size, seed=0, stack=(), dtype="float64"):
    """A matrix with the eigenvalues 1, 2, 4, ..., and its eigenvectors in that order."""
    vectors = jnp.linalg.qr(normal(*stack, size, size, seed=seed, dtype=dtype))[0]
    return (vectors * 2.0 ** jnp.arange(size, dtype=dtype)) @ vectors.swapaxes(-1, -2), vectors


def rotation(size, seed, stack=(), dtype="float64"):
    return jnp.linalg.qr(normal(*stack, size, size, seed=seed, dtype=dtype))[0]


def diagonalised(basis, matrix):
    """What the matrix is if the basis is one of eigenvectors: U diag(U^T M U) U^T."""
    return recomposed(np.asarray(basis), np.einsum("...ia,...ij,...ja->...a", basis, matrix, basis))


@pytest.mark.slow
def test_repeated_steps_with_fixed_factors_converge_to_their_eigenvectors(dtype):
    (a, _), (g, _) = factor(5, dtype=dtype), factor(3, seed=1, dtype=dtype)
    basis, scale = Basis(rotation(5, 2, dtype=dtype), rotation(3, 3, dtype=dtype)), jnp.ones((5, 3), dtype)
    once, _ = warm_eigenbasis(basis, scale, a, g)
    assert_differs(diagonalised(once.inputs, a), a)
    many, _ = jax.lax.fori_loop(0, 60, lambda _, pair: warm_eigenbasis(*pair, a, g), (basis, scale))
    for found, matrix in zip(many, (a, g), strict=True):
        assert_equal(jnp.asarray(diagonalised(found, matrix)).astype(dtype), matrix)
        assert_equal(found.T @ found, np.eye(len(found)))
    quotients = np.diag(many.inputs.T @ a @ many.inputs)
    assert np.all(np.diff(quotients) < 0)


@pytest.mark.usefixtures("x64")
def test_the_scale_moves_with_the_columns_that_a_step_puts_in_order():
    (a, u), (g, v) = factor(5), factor(3, seed=1)  # the smallest eigenvalue first
    scale = normal(5, 3, seed=2) ** 2
    found, moved = jax.jit(warm_eigenbasis)(Basis(u, v), scale, a, g)
    assert_equal(found.inputs, u[:, ::-1])
    assert_equal(found.outputs, v[:, ::-1])
    assert_equal(recomposed(kron(*found), np.ravel(moved)), recomposed(kron(u, v), np.ravel(scale)))
    assert_differs(recomposed(kron(*found), np.ravel(scale)), recomposed(kron(u, v), np.ravel(scale)))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_a_step_keeps_the_sign_of_every_column():
    a, u = factor(6)
    near = jnp.linalg.qr(u[:, ::-1] + 0.01 * normal(6, 6, seed=3))[0] * jnp.array([1, -1, 1, 1, -1, 1])
    found, _ = warm_eigenbasis(Basis(near, None), jnp.ones((6, 2)), a, Diagonal(jnp.ones(2)))
    assert jnp.all(jnp.sum(found.inputs * near, axis=0) > 0.9)
    assert jnp.any(jnp.sum(jnp.linalg.qr(a @ near)[0] * near, axis=0) < -0.9)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_a_side_without_a_basis_stays_so_and_keeps_its_order():
    a, u = factor(4)
    scale = normal(4, 3) ** 2
    found, moved = warm_eigenbasis(Basis(u, None), scale, a, Diagonal(jnp.arange(3.0)))
    assert found.outputs is None
    assert_equal(moved, scale[::-1])
    nothing, same = warm_eigenbasis(Basis(None, None), scale, Diagonal(jnp.arange(4.0)), Diagonal(jnp.arange(3.0)))
    assert nothing == (None, None)
    assert_equal(same, scale)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_stacks_and_vmap_give_what_single_layers_give():
    (a, _), (g, _) = factor(5, stack=(4,)), factor(3, seed=1, stack=(4,))
    basis = Basis(rotation(5, 2, (4,)), rotation(3, 3, (4,)))
    args = basis, normal(4, 5, 3) ** 2, a, g
    singly = [jax.jit(warm_eigenbasis)(*jax.tree.map(lambda leaf, n=n: leaf[n], args)) for n in range(4)]
    for found in (jax.jit(warm_eigenbasis)(*args), jax.jit(jax.vmap(warm_eigenbasis))(*args)):
        jax.tree.map(assert_equal, found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *singly))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_a_factor_without_full_rank_still_gives_an_orthogonal_basis():
    rows = normal(3, 6)
    for moment in (rows.T @ rows, jnp.zeros((6, 6))):
        found, _ = warm_eigenbasis(Basis(rotation(6, 1), None), jnp.ones((6, 2)), moment, Diagonal(jnp.ones(2)))
        assert_equal(found.inputs.T @ found.inputs, np.eye(6))


# In the methods -------------------------------------------------------------------------------------------------------


def batches(stack=(2,)):
    """A layer, and two batches that differ."""
    layer, first, _ = random_layers(5, 4, 40, copies=stack[0])
    a = normal(*stack, 40, 5, seed=8)
    _, second = pairs(a, normal(*stack, 40, 4, seed=9) * (1 + a[..., :1] ** 2))
    return layer, first, second


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@with_methods
@pytest.mark.parametrize("estimator", ["per_example", "minibatch"])
def test_the_first_refresh_is_by_eigendecompositions(block, estimator):
    layer, first, _ = batches()
    found, expected = (state_of(block(0.5, estimator, refresh=by), layer, first, 1.0) for by in ("qr", "eigh"))
    jax.tree.map(assert_equal, found, expected)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@with_methods
def test_later_refreshes_keep_the_scale_and_step_from_the_old_basis(block):
    layer, first, second = batches()
    method = block(0.5, refresh="qr")

    @jax.jit
    def steps(first, second):
        old = method.observe(layer, state_of(method, layer, first, 1.0), second)
        new = method.refresh(layer, old, 1.0)
        return old, new, method.refresh(layer, new, 1.0), block(0.5).refresh(layer, old, 1.0)

    old, new, newer, cold = steps(first, second)
    assert_equal(new.operator.scale.weight, old.operator.scale.weight)
    assert_equal(
        np.sort(np.ravel(averages.mean(new.operator.scale)[0])), np.sort(np.ravel(averages.mean(old.operator.scale)[0]))
    )
    assert jnp.all(cold.operator.scale.weight == 0)
    for state in (new, newer):
        q, _ = basis_and_scale(state)
        assert_equal(np.swapaxes(q, 1, 2) @ q, np.broadcast_to(np.eye(20), (2, 20, 20)))
        assert error(q, basis_and_scale(old)[0]) > 0.1

    def off_diagonal(state):
        moment = state.statistics.total.inputs if block is tekfac_block else state.statistics.inputs.total
        turned = np.einsum("sia,sij,sjb->sab", state.operator.basis.inputs, moment, state.operator.basis.inputs)
        return np.linalg.norm(turned - turned * np.eye(5)) / np.linalg.norm(turned)

    assert off_diagonal(newer) < off_diagonal(new) < off_diagonal(old)
    assert off_diagonal(cold) < 1e-12


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_one_copy_without_a_scale_has_the_whole_stack_start_afresh():
    layer, first, second = batches()
    method = ekfac_block(0.5, refresh="qr")
    old = method.observe(layer, state_of(method, layer, first, 1.0), second)
    scale = jax.tree.map(lambda leaf: leaf.at[1].set(0), old.operator.scale)
    lost = old._replace(operator=old.operator._replace(scale=scale))
    found, expected = (jax.jit(partial(m.refresh, layer))(lost, 1.0) for m in (method, ekfac_block(0.5)))
    jax.tree.map(assert_equal, found.operator.basis, expected.operator.basis)
    assert jnp.all(found.operator.scale.weight == 0)
