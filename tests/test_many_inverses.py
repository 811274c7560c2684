"""The inverses of many small matrices, by sweeps over all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax
from reference import assert_differs, assert_equal, normal
from test_grouping import lapack_calls
from test_mbf import AT_ONCE, DAMPING

import natgrad_jax as ng
from natgrad_jax.algebra import stacks as linalg

LAPACK = 'custom_call_target="lapack'
"""How a library call shows in compiled text."""


def positive_definite(count, size, condition=10.0, seed=0):
    """Matrices [count, n, n] with eigenvalues between 1 / condition and 1."""
    vectors = np.linalg.qr(np.asarray(normal(count, size, size, seed=seed)))[0]
    values = condition ** -np.linspace(0, 1, size)
    found = np.einsum("sik,k,sjk->sij", vectors, values, vectors)
    return (found + found.swapaxes(1, 2)) / 2


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_sweeps_invert_matrices_of_every_size():
    stacks = [positive_definite(100, size, seed=size) for size in range(1, 17)]

    def inverses(stacks):
        return [linalg.inverse(stack) for stack in stacks]

    run = jax.jit(inverses).lower(stacks).compile()
    assert LAPACK not in run.as_text()
    for found, stack in zip(run(stacks), stacks, strict=True):
        assert_equal(found, np.linalg.inv(stack))


@pytest.mark.parametrize("shape", [(64, 17, 17), (63, 16, 16)])
def test_larger_matrices_and_fewer_are_left_to_the_library(shape):
    assert lapack_calls(linalg.inverse, jnp.ones(shape))


def largest_error(found, expected):
    """Over the copies."""
    return np.max(np.linalg.norm(found - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_sweeps_are_as_accurate_as_cholesky_in_single_precision(condition):
    given = positive_definite(500, 9, condition).astype(np.float32)
    expected = np.linalg.inv(given.astype(np.float64))
    by_cholesky = np.stack([
        scipy.linalg.cho_solve((scipy.linalg.cholesky(m), False), np.eye(9, dtype="float32")) for m in given
    ])
    error_of_cholesky = largest_error(by_cholesky, expected)
    found = jax.jit(linalg.inverse)(given)
    assert largest_error(np.asarray(found), expected) < 2 * error_of_cholesky
    assert error_of_cholesky > condition * 1e-9  # or there were nothing to compare


def good_and_bad():
    """Matrices [150, n, n] of which every third is positive definite, beside matrices of rank two, zero, ..."""
    good = positive_definite(150, 5)
    bad = [
        np.zeros((5, 5)),
        -good[1],
        np.full((5, 5), np.nan),
        good[2].copy(),
        good[3] - 0.5 * np.eye(5),
        good[4].copy(),
    ]
    bad[3][2, 2] = 0.0
    bad[5][4, 4] = np.nan
    is_bad = np.arange(150) % 3 > 0
    given = good.copy()
    given[is_bad] = np.resize(bad, (100, 5, 5))
    return given, is_bad


@pytest.mark.slow
@pytest.mark.parametrize("around", ["nothing", "vmap", "cond"])
def test_sweeps_give_nan_exactly_where_a_matrix_is_not_positive_definite(dtype, around):
    given, is_bad = good_and_bad()
    function = {
        "nothing": linalg.inverse,
        "vmap": lambda stack: jax.vmap(linalg.inverse)(jnp.stack([stack, stack[::-1]]))[0],
        "cond": lambda stack: lax.cond(stack[0, 0, 0] > 0, linalg.inverse, lambda stack: stack, stack),
    }[around]
    assert not lapack_calls(function, jnp.asarray(given, dtype))
    found = jax.jit(function)(jnp.asarray(given, dtype))
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(is_bad[:, None, None], (150, 5, 5)))
    assert_equal(found[~is_bad], np.linalg.inv(given[~is_bad]))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_single_matrices_under_vmap_are_inverted_like_stacks():
    given = positive_definite(70, 4)
    one_by_one, together = jax.jit(jax.vmap(linalg.inverse))(given), jax.jit(linalg.inverse)(given)
    assert_equal(one_by_one, together)
    assert_differs(one_by_one, together[::-1])


@pytest.mark.full
def test_a_hundred_thousand_blocks_are_inverted_without_a_call_of_lapack():
    kernel = normal(3, 3, 250, 400, dtype="float32")
    tx = ng.scale_by_mbf(**AT_ONCE)

    def first(kernel):
        return tx.update({"kernel": kernel}, tx.init({"kernel": kernel}))[0]["kernel"]

    run = jax.jit(first).lower(kernel).compile()
    assert LAPACK not in run.as_text()
    assert lapack_calls(first, kernel[..., :7, :9])  # so few are left to the library
    g = np.asarray(kernel, np.float64).reshape(9, -1).T
    expected = np.linalg.solve(np.einsum("bi,bj->bij", g, g) + DAMPING * np.eye(9), g[..., None])[..., 0]
    assert_equal(run(kernel).reshape(9, -1).T, expected)
