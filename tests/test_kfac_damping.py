"""How damping enters K-FAC: what is inverted, in which order, and what becomes of it at both ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kfac_block
from reference import assert_differs, assert_equal, damped, error, kron, normal
from watching import factors_of, operator, pairs, prepared, summed

from natgrad_jax.blocks.kronecker import split_damping

KFAC = {split: kfac_block(0.0, split) for split in ("pi", "even", "exact")}


def correlated(inputs=4, outputs=3, examples=20, stack=(), dtype="float64"):
    """A layer whose inputs and cotangents are neither white nor independent; the mean eigenvalue of A (x) G is 1."""
    a = normal(*stack, examples, inputs, dtype=dtype) @ (jnp.eye(inputs) + normal(inputs, inputs, seed=1)).astype(dtype)
    g = normal(*stack, examples, outputs, seed=2, dtype=dtype) @ normal(outputs, outputs, seed=3, dtype=dtype)
    g = g * (1 + jnp.abs(a[..., :1]))
    return pairs(3 * a / jnp.sqrt(jnp.mean(a**2)), g / jnp.sqrt(jnp.mean(g**2)) / 3)


def inverse(block):
    return np.linalg.inv(np.asarray(block, np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["pi", "even"])
def test_c1_the_update_is_the_inverse_of_a_times_the_gradient_times_the_inverse_of_g(dtype, split):
    layer, evidence = correlated(4, 4, dtype=dtype)
    a, g = factors_of(layer, evidence)
    x, y = split_damping(a, g, 0.3, split)
    found = operator(KFAC[split], layer, evidence, 0.3)
    assert_equal(found, kron(inverse(damped(a, x)), inverse(damped(g, y))))
    assert_differs(found, kron(inverse(damped(g, y)), inverse(damped(a, x))))


@pytest.mark.usefixtures("x64")
def test_c1_the_factors_of_a_layer_that_is_not_square_cannot_be_exchanged():
    layer, evidence = correlated(4, 3)
    state = prepared(KFAC["pi"], layer, evidence, 0.3)
    exchanged = state._replace(operator=type(state.operator)(*reversed(state.operator)))
    assert KFAC["pi"].apply(layer, state, jnp.ones((4, 3)), 0.3).shape == (4, 3)
    with pytest.raises(TypeError):
        KFAC["pi"].apply(layer, exchanged, jnp.ones((4, 3)), 0.3)


@pytest.mark.slow
def test_c49_pi_damping_is_the_even_damping_of_factors_of_unit_mean_diagonal(dtype):
    layer, evidence = correlated(dtype=dtype)
    a, g = factors_of(layer, evidence)
    mean_a, mean_g = np.trace(a) / 4, np.trace(g) / 3
    strength = np.sqrt(0.3 / (mean_a * mean_g))
    normalised = mean_a * mean_g * kron(damped(a / mean_a, strength), damped(g / mean_g, strength))
    assert_equal(operator(KFAC["pi"], layer, evidence, 0.3), inverse(normalised))
    assert_differs(operator(KFAC["even"], layer, evidence, 0.3), inverse(normalised))


@pytest.mark.slow
def test_c50_pi_makes_the_traces_of_the_cross_terms_equal(dtype):
    a, g = factors_of(*correlated(dtype=dtype))

    def cross_terms(split):
        x, y = split_damping(a, g, 0.3, split)
        assert_equal(x * y, 0.3)
        return np.trace(a) * 3 * y, 4 * np.trace(g) * x

    assert_equal(*cross_terms("pi"))
    assert_differs(*cross_terms("even"))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["pi", "even"])
def test_c52_damping_split_over_the_factors_exceeds_exact_damping(dtype, split):
    layer, evidence = correlated(dtype=dtype)
    divided = inverse(operator(KFAC[split], layer, evidence, 0.3))
    exact = inverse(operator(KFAC["exact"], layer, evidence, 0.3))
    least = np.linalg.eigvalsh(divided - exact)[0] / np.linalg.norm(exact)
    assert least >= {"float64": -1e-9, "float32": -1e-4}[dtype]
    assert_differs(divided, exact)
    assert np.linalg.eigvalsh(exact - divided)[0] / np.linalg.norm(exact) < -0.1


def test_c53_the_exactly_damped_step_is_the_dense_solve(dtype):
    layer, evidence = correlated(dtype=dtype)
    a, g = factors_of(layer, evidence)
    gate = {"float64": 1e-9, "float32": 1e-4}[dtype]  # the condition of the damped block times the rounding
    assert_equal(operator(KFAC["exact"], layer, evidence, 1e-2), inverse(damped(kron(a, g), 1e-2)), gate)
    assert_differs(operator(KFAC["pi"], layer, evidence, 1e-2), inverse(damped(kron(a, g), 1e-2)))


@pytest.mark.parametrize(
    ("split", "damping", "gate"),
    [("exact", 1e4, 3e-3), ("exact", 1e6, 2e-4), ("pi", 1e6, 6e-2), ("even", 1e6, 6e-2)],
)
def test_c54_large_damping_gives_the_gradient_over_the_damping(dtype, split, damping, gate):
    layer, evidence = correlated(dtype=dtype)
    assert error(damping * operator(KFAC[split], layer, evidence, damping), np.eye(12)) < gate
    assert_differs(1e-2 * operator(KFAC[split], layer, evidence, 1e-2), np.eye(12))


def alignments(apply, gradient):
    """Cosine of gradient and update, of every copy in a stack."""
    update = apply(gradient)
    product = jnp.sum(gradient * update, axis=(-2, -1))
    return product / jnp.linalg.norm(gradient, axis=(-2, -1)) / jnp.linalg.norm(update, axis=(-2, -1))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("split", KFAC)
@pytest.mark.parametrize("examples", [1, 40])
def test_c55_every_update_descends(split, examples):
    layer, evidence = correlated(6, 5, examples, stack=(50,), dtype="float32")

    @jax.jit
    def cosines(damping):
        state = prepared(KFAC[split], layer, evidence, damping)
        gradients = normal(50, 6, 5, seed=7, dtype="float32"), summed(layer, evidence)[:, 0]
        return [alignments(partial(KFAC[split].apply, layer, state, damping=damping), g) for g in gradients]

    for damping in (1e-8, 1e-3, 1.0, 1e4):
        assert jnp.min(jnp.stack(cosines(damping))) > 0


@pytest.mark.usefixtures("x64")
def test_c55_fails_where_the_factors_are_not_positive_definite():
    a, g = normal(50, 6, 6), normal(50, 5, 5, seed=1)
    assert jnp.min(alignments(lambda gradient: a @ gradient @ g, normal(50, 6, 5, seed=7))) < -0.1


# Wide sides -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("split", ["pi", "exact"])
def test_a_side_that_is_too_wide_keeps_the_diagonal_of_its_factor(split):
    layer, evidence = correlated(4, 3)
    a, g = factors_of(layer, evidence)
    diagonal = np.diag(np.diag(a))
    found = operator(kfac_block(0.0, split, max_factor_dim=3), layer, evidence, 0.3)
    if split == "exact":
        expected, full = inverse(damped(kron(diagonal, g), 0.3)), inverse(damped(kron(a, g), 0.3))
    else:
        x, y = split_damping(a, g, 0.3, split)
        expected, full = (kron(inverse(damped(side, x)), inverse(damped(g, y))) for side in (diagonal, a))
    assert_equal(found, expected)
    assert_differs(found, full)
