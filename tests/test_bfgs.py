"""BFGS of inverses by its definition in numpy and double precision; what dampings of a pair promise; limited memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GATES, assert_differs, assert_equal, error, normal

from natgrad_jax.algebra import bfgs

LEAST, SECOND = 0.2, 0.3**0.5
update, memory = jax.jit(bfgs.updated), jax.jit(bfgs.times)


def by_definition(inverse, s, y):
    """(I - r s y^T) H (I - r y s^T) + r s s^T."""
    rate = 1 / (s @ y)
    left = np.eye(len(s)) - rate * np.outer(s, y)
    return left @ inverse @ left.T + rate * np.outer(s, s)


def wide(*values):
    return [np.asarray(value, np.float64) for value in values]


def positive(size, seed=0):
    """A positive definite matrix of eigenvalues between about 0.3 and 3."""
    rows = np.random.default_rng(seed).normal(size=(4 * size, size))
    return rows.T @ rows / (4 * size) + 0.1 * np.eye(size)


def conjugate(matrix):
    """Pairs of a matrix along its eigenvectors."""
    s = np.linalg.eigh(matrix)[1].T
    return s, s @ matrix


# The update -----------------------------------------------------------------------------------------------------------


def test_the_update_is_its_definition_on_every_copy_of_a_stack(dtype):
    inverse = jnp.asarray(np.stack([positive(5, seed) for seed in range(6)]).reshape(2, 3, 5, 5), dtype)
    s, y = normal(2, 3, 5, dtype=dtype), normal(2, 3, 5, seed=1, dtype=dtype)
    y = y * jnp.sign(bfgs.dot(s, y))[..., None]
    found, skipped = update(inverse, s, y)
    assert not jnp.any(skipped)
    for index in np.ndindex(2, 3):
        expected = by_definition(*wide(inverse[index], s[index], y[index]))
        assert_equal(found[index], expected, 100 * GATES[dtype])  # some of the s^T y are small beside |s| |y|


@jax.jit
def damped(s, y):
    """Pairs after both dampings, where they were skipped, and the inverse after each."""

    def one(inverse, pair):
        s, y = pair
        s = bfgs.powell(s, y, bfgs.image(inverse, y), LEAST)
        y = bfgs.powell_of_identity(s, y, SECOND)
        inverse, skipped = bfgs.updated(inverse, s, y)
        return inverse, (s, y, skipped, inverse)

    return jax.lax.scan(one, jnp.eye(s.shape[-1], dtype=s.dtype), (s, y))[1]


def test_c85_five_hundred_damped_updates_keep_the_secant_and_stay_positive_definite(dtype):
    s, y, skipped, inverses = damped(normal(500, 6, dtype=dtype), normal(500, 6, seed=1, dtype=dtype))
    assert not jnp.any(skipped)
    found, expected = np.einsum("kij,kj->ki", *wide(inverses, y)), np.asarray(s, np.float64)
    assert np.max(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)) < GATES[dtype]
    values = np.linalg.eigvalsh(*wide(inverses))
    assert np.all(values[:, 0] > 1e-4 * values[:, -1])


def test_c85_without_the_dampings_the_updates_lose_positive_definiteness(dtype):
    inverse, s, y = jnp.eye(6, dtype=dtype), normal(6, dtype=dtype), normal(6, seed=1, dtype=dtype)
    y = -y * jnp.sign(bfgs.dot(s, y))
    assert update(inverse, s, y)[1]  # by the package it is skipped
    assert np.linalg.eigvalsh(by_definition(*wide(inverse, s, y)))[0] < 0


@pytest.mark.slow
def test_a_pair_that_is_not_above_the_bound_or_not_finite_changes_nothing(dtype):
    s, y = jnp.ones((4, 3), dtype), jnp.asarray([[1.0] * 3, [-1.0] * 3, [np.nan] * 3, [np.inf] * 3], dtype)
    inverse = jnp.broadcast_to(jnp.asarray(positive(3), dtype), (4, 3, 3))
    found, skipped = update(inverse, s, y)
    assert skipped.tolist() == [False, True, True, True]
    assert jnp.all(found[1:] == inverse[1:])
    assert_differs(found[0], inverse[0])
    assert update(inverse, s, y, jnp.full(4, 3.0, dtype))[1].all()  # s^T y = 3 is not above 3
    pairs = bfgs.no_pairs((4,), 2, 3, dtype)
    kept, skipped = update(pairs, s, y)
    assert skipped.tolist() == [False, True, True, True]
    assert not jnp.any(kept.s[1:]) and jnp.any(kept.s[0])


# The dampings ---------------------------------------------------------------------------------------------------------


def pairs_and_inverses(dtype, count=500, size=5):
    s, y = normal(count, size, dtype=dtype), normal(count, size, seed=1, dtype=dtype)
    inverse = jnp.asarray(np.stack([positive(size, seed) for seed in range(count)]), dtype)
    return s, y, inverse, bfgs.image(inverse, y)


def meets(s, y, bent, hy):
    """The promise of the first damping; how many pairs it bent."""
    product, curved = np.einsum("kn,kn->k", *wide(bent, y)), np.einsum("kn,kn->k", *wide(y, hy))
    fired = np.einsum("kn,kn->k", *wide(s, y)) < LEAST * curved
    gate = GATES[str(y.dtype)]
    np.testing.assert_allclose(product[fired], LEAST * curved[fired], rtol=gate, atol=gate)
    assert np.all(product[~fired] >= LEAST * curved[~fired])
    assert np.all(np.asarray(bent)[~fired] == np.asarray(s)[~fired])
    return fired.sum()


@pytest.mark.slow
def test_c86_powells_damping_leaves_m_times_y_h_y_and_good_pairs_alone(dtype):
    s, y, _, hy = pairs_and_inverses(dtype)
    assert 100 < meets(s, y, bfgs.powell(s, y, hy, LEAST), hy) < 500


def test_c86_the_other_sign_of_h_y_does_not(dtype):
    s, y, _, hy = pairs_and_inverses(dtype)
    curved, product = bfgs.dot(y, hy), bfgs.dot(s, y)
    phi = jnp.where(product < LEAST * curved, (1 - LEAST) * curved / (curved - product), 1)[:, None]
    with pytest.raises(AssertionError):
        meets(s, y, phi * s - (1 - phi) * hy, hy)


@pytest.mark.slow
@pytest.mark.parametrize("least", [SECOND, 1.0, 3**0.5])
def test_c86_the_second_damping_leaves_m_times_the_length_of_s(dtype, least):
    s, y, _, _ = pairs_and_inverses(dtype)
    bent = bfgs.powell_of_identity(s, y, least)
    length, before = (np.einsum("kn,kn->k", *wide(s, other)) for other in (s, y))
    after, fired, gate = np.einsum("kn,kn->k", *wide(s, bent)), before < least * length, GATES[dtype]
    assert 100 < fired.sum() < 500
    np.testing.assert_allclose(after[fired], least * length[fired], rtol=gate, atol=gate)
    assert np.all(np.asarray(bent)[~fired] == np.asarray(y)[~fired])
    if least < 1:  # a mean of y and s, as in the paper
        phi = ((1 - least) * length / (length - before))[fired, None]
        assert_equal(bent[fired], phi * np.asarray(y)[fired] + (1 - phi) * np.asarray(s)[fired])


def test_c86_the_damping_of_levenberg_and_marquardt_leaves_as_much_after_that_of_powell(dtype):
    s, y, _, hy = pairs_and_inverses(dtype)
    s = bfgs.powell(s, y, hy, LEAST)
    bent = bfgs.levenberg(s, y, SECOND)
    assert_equal(bent, np.asarray(y, np.float64) + SECOND * np.asarray(s, np.float64))
    assert jnp.all(bfgs.dot(s, bent) >= SECOND * bfgs.dot(s, s))


@pytest.mark.slow
@pytest.mark.parametrize("least", [SECOND, 1.0, 2.0])
def test_c86_a_dead_layer_or_a_pair_of_the_identity_divides_by_nothing(dtype, least):
    s = normal(3, 4, dtype=dtype) * jnp.asarray([[1.0], [1.0], [0.0]], dtype)
    y = s * jnp.asarray([[0.0], [1.0], [1.0]], dtype)  # y = 0; s^T y = s^T s; s = y = 0
    assert jnp.all(bfgs.powell(s, y, y, LEAST) == s)
    bent = bfgs.powell_of_identity(s, y, least)
    assert_equal(bent[0], least * np.asarray(s[0], np.float64))
    assert_equal(bent[1], max(least, 1.0) * np.asarray(s[1], np.float64))
    assert jnp.all(bent[2] == 0)
    _, skipped = update(jnp.broadcast_to(jnp.eye(4, dtype=dtype), (3, 4, 4)), s, bent)
    assert skipped.tolist() == [False, False, True]


# The Hessian's action -------------------------------------------------------------------------------------------------


@jax.jit
def learned(inverse, matrix, rows):
    """Updates by pairs (H r, matrix H r), one for every row."""

    def one(inverse, row):
        s = bfgs.image(inverse, row)
        return bfgs.updated(inverse, s, bfgs.image(matrix, s))

    return jax.lax.scan(one, inverse, rows)


def test_c87_the_inverse_is_a_fixed_point_and_what_the_updates_tend_to(dtype):
    exact, rows = positive(5), normal(200, 5, seed=2, dtype=dtype)
    matrix, inverse = jnp.asarray(exact, dtype), np.linalg.inv(exact)
    found, skipped = learned(jnp.asarray(inverse, dtype), matrix, rows)
    assert_equal(found, inverse)
    assert not jnp.any(skipped)
    found, _ = learned(jnp.eye(5, dtype=dtype), matrix, rows)
    assert_equal(found, inverse, {"float64": 1e-6, "float32": 2e-5}[dtype])
    one_row, _ = learned(jnp.eye(5, dtype=dtype), matrix, jnp.broadcast_to(rows[0], (200, 5)))
    assert_differs(one_row, inverse)


# Limited memory -------------------------------------------------------------------------------------------------------


def filled(inverse, s, y):
    """H or its memory after some pairs, and where they were skipped."""
    return jax.lax.scan(lambda inverse, pair: bfgs.updated(inverse, *pair), inverse, (s, y))


def good_pairs(count, size, dtype):
    """Pairs with s^T y > 0, none of them small beside |s| |y|."""
    s = np.random.default_rng(3).normal(size=(count, size))
    y = np.stack([np.zeros(size), *(row @ positive(size, k) for k, row in enumerate(s))])[1:]
    return jnp.asarray(s, dtype), jnp.asarray(y, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_c88_the_compact_form_is_the_recursion_over_the_last_pairs(dtype, count):
    s, y = good_pairs(count, 8, dtype)
    pairs, _ = filled(bfgs.no_pairs((), 5, 8, dtype), s, y)
    expected = np.eye(8)
    for pair in list(zip(*wide(s, y), strict=True))[-5:]:
        expected = by_definition(expected, *pair)
    rows = normal(3, 8, seed=4, dtype=dtype)
    assert_equal(memory(rows, pairs), np.asarray(rows, np.float64) @ expected)
    if count:
        forwards, _ = filled(bfgs.no_pairs((), 5, 8, dtype), s[::-1], y[::-1])
        assert count == 1 or error(memory(rows, forwards), memory(rows, pairs)) > 0.01  # their order matters


@pytest.mark.slow
def test_c88_as_many_conjugate_pairs_as_dimensions_are_the_inverse(dtype):
    exact = positive(6)
    s, y = (jnp.asarray(values, dtype) for values in conjugate(exact))
    pairs, _ = filled(bfgs.no_pairs((), 6, 6, dtype), s, y)
    assert_equal(memory(jnp.eye(6, dtype=dtype), pairs), np.linalg.inv(exact))
    fewer, _ = filled(bfgs.no_pairs((), 5, 6, dtype), s, y)
    assert_differs(memory(jnp.eye(6, dtype=dtype), fewer), np.linalg.inv(exact))


@pytest.mark.full
def test_a_memory_is_filled_copy_by_copy_and_under_vmap(dtype):
    s, y = good_pairs(12, 4, dtype)
    s, y = s.reshape(4, 3, 4), y.reshape(4, 3, 4).at[1, 2].multiply(-1)  # one copy skips its second pair
    stacked, skipped = filled(bfgs.no_pairs((3,), 5, 4, dtype), s, y)
    assert np.argwhere(skipped).tolist() == [[1, 2]]
    mapped = jax.vmap(partial(filled, bfgs.no_pairs((), 5, 4, dtype)), in_axes=1)(s, y)[0]
    rows = normal(3, 2, 4, seed=5, dtype=dtype)
    assert_equal(memory(rows, stacked), np.asarray(jax.vmap(bfgs.times)(rows, mapped), np.float64))
    alone, _ = filled(bfgs.no_pairs((), 5, 4, dtype), s[jnp.array([0, 2, 3]), 2], y[jnp.array([0, 2, 3]), 2])
    assert_equal(memory(rows, stacked)[2], np.asarray(bfgs.times(rows[2], alone), np.float64))


@pytest.mark.full
def test_pairs_of_any_size_are_the_same_pair(dtype):
    s, y = good_pairs(4, 6, dtype)
    scale = jnp.asarray([1e-18, 1.0, 1e12, 1e-9], dtype)[:, None]
    rows = jnp.eye(6, dtype=dtype)
    for empty in (bfgs.no_pairs((), 4, 6, dtype), jnp.eye(6, dtype=dtype)):
        plain, scaled = (memory(rows, filled(empty, *pair)[0]) for pair in ((s, y), (scale * s, scale * y)))
        assert_equal(scaled, np.asarray(plain, np.float64))
