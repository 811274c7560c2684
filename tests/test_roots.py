"""Inverse roots are those of the eigendecomposition, or NaN; one that is not found leaves the last one in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, assert_differs, assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.algebra import roots
from natgrad_jax.algebra.stacks import Diagonal

EPS = {"float64": 2.0**-52, "float32": 2.0**-23}
find = jax.jit(roots.inverse_root, static_argnums=(2, 3))


def by_definition(matrices, damping, exponent):
    """(M + damping I)^-exponent by numpy's eigendecomposition, in float64."""
    values, vectors = np.linalg.eigh(np.asarray(matrices, np.float64))
    powers = (values + np.asarray(damping)[..., None]) ** -exponent
    return np.einsum("...ij,...j,...kj->...ik", vectors, powers, vectors)


def with_spectrum(values, seed=0):
    """A symmetric matrix [n, n] of these eigenvalues, in a random basis, in float64."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return basis * np.asarray(values) @ basis.T


def moments(*stack, size=6, dtype="float64"):
    """Second moments of 8 random rows."""
    rows = normal(*stack, 8, size, dtype=dtype)
    return jnp.einsum("...ri,...rj->...ij", rows, rows) / 8


# Equal to the eigendecomposition --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("power", [1, 2, 4, 6])
def test_c48_the_coupled_newton_root_is_that_of_the_eigendecomposition(dtype, power):
    matrices, damping = moments(2, 3, dtype=dtype), jnp.asarray([[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]], dtype)
    found = find(matrices, damping, 1 / power, "newton")
    assert_equal(found, by_definition(matrices, damping, 1 / power))
    assert_differs(found, by_definition(matrices, damping, 1 / power + 0.5))
    assert_differs(found, by_definition(matrices, 1 + damping, 1 / power))


@pytest.mark.parametrize("root", roots.ROOTS)
def test_the_root_of_a_multiple_is_a_multiple_of_the_root_at_any_size(root):
    matrices, damping = moments(3, dtype="float32"), jnp.asarray([0.01, 0.02, 0.03], "float32")
    expected = by_definition(matrices, damping, 0.5)
    for scale in (1e20, 1e-22, 1e30, 1e-28):
        assert_equal(find(scale * matrices, scale * damping, 0.5, root) * scale**0.5, expected)
        assert_differs(find(scale * matrices, damping, 0.5, root) * scale**0.5, expected)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [1 / 6, 0.3, 0.5, 1.0, 1.7])
def test_by_eigendecomposition_any_exponent_will_do(dtype, exponent):
    matrices, damping = moments(2, 3, dtype=dtype), jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype)
    found = find(matrices, damping, exponent, "eigh")
    assert_equal(found, by_definition(matrices, damping, exponent))
    assert_differs(found, by_definition(matrices, damping, exponent + 0.5))


@pytest.mark.parametrize("root", roots.ROOTS)
def test_the_root_of_a_diagonal_is_a_diagonal_and_that_of_the_matrix(dtype, root):
    entries = jnp.asarray([[0.5, 2.0, 0.0], [1.0, 3.0, 7.0]], dtype)
    found = find(Diagonal(entries), jnp.asarray([0.1, 0.2], dtype), 0.25, root)
    assert isinstance(found, Diagonal)
    matrices = np.stack([np.diag(row) for row in np.asarray(entries)])
    assert_equal(jax.vmap(jnp.diag)(found.entries), by_definition(matrices, [0.1, 0.2], 0.25))


@pytest.mark.slow
@pytest.mark.parametrize("root", roots.ROOTS)
def test_of_a_zero_matrix_there_is_the_damping_alone_and_without_that_nothing_finite(dtype, root):
    zeros = jnp.zeros((2, 4, 4), dtype)
    found = find(zeros, jnp.asarray([0.0, 0.01], dtype), 0.5, root)
    assert_equal(found[1], 10 * np.eye(4))
    assert not np.any(np.isfinite(np.diagonal(found[0])))
    entries = find(Diagonal(zeros[:, 0]), jnp.asarray([0.0, 0.01], dtype), 0.5, root).entries
    assert_equal(entries[1], np.full(4, 10.0))
    assert not np.any(np.isfinite(entries[0]))


@pytest.mark.slow
@pytest.mark.parametrize("root", roots.ROOTS)
@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_matrices_have_roots(dtype, root, size):
    matrix = moments(size=size, dtype=dtype)
    assert_equal(find(matrix, 0.1, 0.25, root), by_definition(matrix, 0.1, 0.25))


# Floors ---------------------------------------------------------------------------------------------------------------


def test_a_damping_below_what_the_precision_can_tell_is_raised_to_it(dtype):
    matrix = jnp.asarray(with_spectrum([0.0, 2.0, 3.0, 4.0]), dtype)
    floor = 8 * EPS[dtype]
    largest, norm = 4.0, np.sqrt(29.0)
    gate = {"float64": 0.1, "float32": 0.1}[dtype]  # the null vector is known to 1 eps of 8
    for root, size in (("eigh", largest), ("newton", norm)):
        found, expected = find(matrix, 0.0, 0.5, root), by_definition(with_spectrum([0, 2, 3, 4]), floor * size, 0.5)
        assert_equal(found, expected, gate)
        assert_differs(by_definition(with_spectrum([0, 2, 3, 4]), floor * size / 8, 0.5), expected)
        assert_equal(find(matrix, 0.0, 0.5, root), find(matrix, floor * size / 100, 0.5, root))
    entries = find(Diagonal(jnp.asarray([0.0, 2.0, 4.0], dtype)), 0.0, 0.5, "eigh").entries
    assert_equal(entries, (np.array([0.0, 2.0, 4.0]) + floor * largest) ** -0.5)


# How the iteration ends -----------------------------------------------------------------------------------------------


def scalar_steps(matrix, power, close):
    """Steps that the iteration takes in exact arithmetic: of m's eigenvalues, until their distance from 1 is small."""
    values = np.linalg.eigvalsh(matrix)
    values, steps = values * (1 + power) / (2 * np.linalg.norm(values)), 0
    while np.linalg.norm(values - 1) > close:
        values, steps = values * (1 + 1 / power - values / power) ** power, steps + 1
    return steps


def steps_of(matrix, power, monkeypatch):
    """The root, and the steps that the package takes to it, told by its products."""
    products = []

    def counted(one, other):
        products.append(None)
        return jnp.matmul(one, other, precision="highest")

    monkeypatch.setattr(roots, "matmul", counted)
    with jax.disable_jit():
        found = roots.inverse_root(matrix, 0.0, 1 / power, "newton")
    return found, len(products) / {1: 2, 2: 3, 4: 4, 6: 5}[power]  # t^p by squaring, and its products with m and x


@pytest.mark.full
@pytest.mark.parametrize("decades", [1, 3, 6])
@pytest.mark.parametrize("power", [1, 2, 4, 6])
def test_no_step_is_wasted_on_what_rounding_keeps_from_falling(dtype, power, decades, monkeypatch):
    exact = with_spectrum(np.logspace(0, -decades, 24))
    floor = 8 * EPS[dtype] * np.linalg.norm(exact)
    exact = exact + floor * np.eye(24)
    found, steps = steps_of(jnp.asarray(exact - floor * np.eye(24), dtype), power, monkeypatch)
    least = scalar_steps(exact, power, 8 * EPS[dtype] * 24**0.5)
    assert least - 2 <= steps <= least + 2
    gate = max(GATES[dtype], 10**decades * EPS[dtype])  # a root is known as well as the smallest eigenvalue
    assert_equal(found, by_definition(exact, 0.0, 1 / power), gate)


@pytest.mark.slow
@pytest.mark.parametrize(("power", "size"), [(2, 4), (4, 4), (4, 9), (6, 9), (6, 16)])
def test_of_a_matrix_of_ones_a_root_is_found_though_the_largest_entry_of_the_error_grows_at_first(dtype, power, size):
    matrix = np.ones((size, size)) + 1e-2 * np.eye(size)
    found = find(jnp.asarray(matrix, dtype), 0.0, 1 / power, "newton")
    floor = 8 * EPS[dtype] * np.linalg.norm(matrix)
    assert_equal(found, by_definition(matrix, floor, 1 / power), {"float64": None, "float32": 1e-4}[dtype])
    m = (1 + power) / (2 * np.linalg.norm(matrix)) * matrix  # the control: that error would stop it
    t = (1 + 1 / power) * np.eye(size) - m / power
    before, now = (np.max(np.abs(x - np.eye(size))) for x in (m, np.linalg.matrix_power(t, power) @ m))
    assert now > 1.2 * before


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("power", [1, 2, 4])
def test_nan_and_negative_matrices_give_nan_and_the_others_of_their_stack_their_roots(dtype, power):
    good = np.asarray(moments(2, size=5), np.float64)
    bad = [np.full((5, 5), np.nan), with_spectrum([1, 1, 1, 1, -0.1]), -good[0]]
    matrices = jnp.asarray(np.stack([good[0], *bad, good[1]]), dtype)
    found = find(matrices, jnp.asarray(1e-2, dtype), 1 / power, "newton")
    assert np.all(np.isnan(found[1:4]))
    assert_equal(found[0], by_definition(good[0], 1e-2, 1 / power))
    assert_equal(found[4], by_definition(good[1], 1e-2, 1 / power))


def test_one_negative_eigenvalue_among_many_is_not_overlooked():
    """Spread over the entries of a large matrix, it shows in none of them."""
    matrix = with_spectrum([-0.1, *np.ones(767)]).astype("float32")
    assert np.all(np.isnan(find(jnp.asarray(matrix), 0.0, 1 / 2, "newton")))
    assert np.all(np.isfinite(find(jnp.asarray(matrix), 0.2, 1 / 2, "newton")))  # the control


@pytest.mark.parametrize("power", [1, 2, 4, 6])
def test_a_matrix_too_ill_conditioned_for_its_precision_has_the_root_of_the_floor_and_no_garbage(power):
    exact = with_spectrum(np.logspace(0, -12, 20))
    found = find(jnp.asarray(exact, "float32"), 0.0, 1 / power, "newton")
    floor = 8 * EPS["float32"] * np.linalg.norm(exact)
    assert_equal(found, by_definition(exact, floor, 1 / power), 0.05)  # the smallest eigenvalue is 8 eps
    assert_differs(found, by_definition(exact, floor / 8, 1 / power))


def tampered(state, name, factor):
    """The state with the factors of one block multiplied."""
    factors = state.statistics[name]
    total = jax.tree.map(lambda leaf: factor * leaf, factors.total)
    return state._replace(statistics={**state.statistics, name: factors._replace(total=total)})


@pytest.mark.slow
@pytest.mark.parametrize("root", roots.ROOTS)
def test_a_root_that_is_not_found_leaves_the_last_one_and_is_counted(root):
    gradient = {name: normal(4, 3, seed=seed, dtype="float32") for seed, name in enumerate("ab")}  # of one shape
    tx = ng.scale_by_shampoo(damping=0.1, root=root, statistics_every=100, refresh_every=1)
    update = jax.jit(tx.update)
    _, good = update(gradient, tx.init(gradient))
    for factor, counted in ((-1.0, 1 if root == "newton" else 0), (2.0, 0)):  # by eigh, negative is taken for zero
        _, after = update(gradient, tampered(good, "a", factor))
        assert after.metrics.rejected_refreshes == counted
        same = [
            np.array_equal(x, y) for x, y in zip(after.operators["a"].value, good.operators["a"].value, strict=True)
        ]
        assert same == [counted == 1] * 2
        for ours, theirs in zip(after.operators["b"].value, good.operators["b"].value, strict=True):
            assert_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("root", roots.ROOTS)
def test_without_a_damping_a_block_that_has_seen_no_gradient_keeps_the_identity(root):
    gradient = {"seen": normal(4, 3, dtype="float32"), "unseen": jnp.zeros((4, 3))}
    tx = ng.scale_by_shampoo(damping=0.0, root=root, statistics_every=1, refresh_every=1)
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert state.metrics.rejected_refreshes == 1
    for factor, size in zip(state.operators["unseen"].value, (4, 3), strict=True):
        np.testing.assert_array_equal(factor, np.eye(size))
    assert np.all(np.isfinite(updates["seen"])) and not np.any(updates["unseen"])
    assert_differs(state.operators["seen"].value[1], np.eye(3))


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2, 3, 6, 12])
def test_the_whole_power_of_an_exponent_is_found(power):
    assert roots.whole(1 / power) == power


@pytest.mark.parametrize("exponent", [0.3, 0.7, 2.0])
def test_an_exponent_that_is_no_root_of_whole_order_is_refused_for_newton_alone(exponent):
    with pytest.raises(ValueError, match=rf"`exponent` is {exponent}, but `root=\"newton\"` finds roots of a whole"):
        roots.whole(exponent)
    with pytest.raises(ValueError, match="finds roots of a whole order"):
        ng.scale_by_shampoo(damping=0.1, exponent=exponent, root="newton")
    ng.scale_by_shampoo(damping=0.1, exponent=exponent, root="eigh")
