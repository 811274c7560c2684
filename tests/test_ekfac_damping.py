"""How damping enters an eigenbasis if it is split over two factors that the scale does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import ekfac_block, kfac_block, tekfac_block, tkfac_block
from reference import assert_differs, assert_equal, damped, diagonal_in, error, kron, normal, partial_traces, recomposed
from watching import (
    basis_and_scale,
    captured_fisher,
    factors_of,
    operator,
    pairs,
    prepared,
    random_layers,
    state_of,
    summed,
)

BLOCKS = {"ekfac": ekfac_block, "tekfac": tekfac_block}
SPLITS = ("pi", "even")
with_methods = pytest.mark.parametrize("method", BLOCKS)
with_splits = pytest.mark.parametrize("split", SPLITS)


def strengths(inputs, outputs, damping, split):
    """The definition of the rules: x for the factor of the inputs, y for that of the outputs."""
    mean_inputs, mean_outputs = (np.trace(side) / len(side) for side in (inputs, outputs))
    pi = (mean_inputs / mean_outputs) ** 0.5 if split == "pi" else 1.0
    return damping**0.5 * pi, damping**0.5 / pi


def traces(method, layer, evidence):
    """The traces of the pair that a method takes its basis from, for every copy of a stack."""
    if method == "ekfac":
        return list(zip(*(np.trace(side, axis1=1, axis2=2) for side in factors_of(layer, evidence)), strict=True))
    roots = np.trace(captured_fisher(layer, evidence), axis1=1, axis2=2) ** 0.5
    return list(zip(roots, roots, strict=True))


def like_a_product(block, shape, damping, split, sizes):
    """A block, and what damping adds to the product of two factors of these traces that has its partial traces."""
    p, q = (side / size for side, size in zip(partial_traces(block, shape), sizes[::-1], strict=True))
    x, y = strengths(p, q, damping, split)
    return block + y * kron(p, np.eye(shape[1])) + x * kron(np.eye(shape[0]), q) + x * y * np.eye(len(block))


def uneven(dtype="float64"):
    """A stack of two layers whose sides are of different sizes, and dampings around their mean eigenvalues."""
    layer, evidence, blocks = random_layers(8, 2, 40, copies=2, dtype=dtype)
    return layer, evidence, np.array([0.1, 2.0]) * np.trace(blocks, axis1=1, axis2=2) / 16


@pytest.mark.slow
@with_splits
@with_methods
def test_c53_the_damped_step_is_the_dense_solve_with_the_cross_terms_of_a_product(method, split, dtype):
    layer, evidence, damping = uneven(dtype)
    sizes, method = traces(method, layer, evidence), BLOCKS[method](0.0, split=split)
    blocks = recomposed(*basis_and_scale(state_of(method, layer, evidence, damping)))
    found = operator(method, layer, evidence, jnp.asarray(damping, dtype))

    def solved(split):
        each = zip(np.asarray(blocks, np.float64), damping, sizes, strict=True)
        return np.stack([np.linalg.inv(like_a_product(block, layer.shape, x, split, s)) for block, x, s in each])

    assert_equal(found, solved(split))
    plain = [np.linalg.inv(damped(block, x)) for block, x in zip(blocks, damping, strict=True)]
    assert_differs(found, np.stack(plain))  # without the cross terms
    assert_differs(found, solved({"pi": "even", "even": "pi"}[split]))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_methods
def test_the_split_that_is_not_given_adds_the_damping_to_the_scale(method):
    layer, evidence, damping = uneven()
    blocks = recomposed(*basis_and_scale(state_of(BLOCKS[method](0.0), layer, evidence, damping)))
    expected = np.stack([np.linalg.inv(damped(block, x)) for block, x in zip(blocks, damping, strict=True)])
    assert_equal(operator(BLOCKS[method](0.0), layer, evidence, damping), expected)
    assert_equal(operator(BLOCKS[method](0.0, split="exact"), layer, evidence, damping), expected)


# Where the scale is a product -----------------------------------------------------------------------------------------


def products(inputs=1.0, dtype="float64"):
    """A layer and the evidence of one example, of independent rows, and of rows that depend on each other."""
    some, others = normal(7, 4, dtype=dtype), normal(9, 3, seed=1, dtype=dtype)
    one = pairs(inputs * some[:1], others[:1])
    independent = pairs(inputs * jnp.repeat(some, 9, axis=0), jnp.tile(others, (7, 1)))
    correlated = pairs(inputs * normal(63, 4, dtype=dtype), normal(63, 4, dtype=dtype)[:, :3] ** 3)
    return one, independent, correlated


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_splits
@pytest.mark.parametrize("inputs", [1.0, 6.0])
def test_ekfac_is_kfac_with_the_same_split_where_the_scale_is_a_product_whatever_the_units_of_a_and_g(inputs, split):
    *equal, correlated = products(inputs)
    for (layer, evidence), says in ((equal[0], assert_equal), (equal[1], assert_equal), (correlated, assert_differs)):
        found = operator(ekfac_block(0.0, split=split), layer, evidence, 0.5)
        says(found, operator(kfac_block(0.0, split), layer, evidence, 0.5))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@with_splits
def test_tekfac_is_tkfac_with_the_same_split_where_the_scale_is_a_product(split):
    *equal, correlated = products(6.0)
    for (layer, evidence), says in ((equal[0], assert_equal), (equal[1], assert_equal), (correlated, assert_differs)):
        found = operator(tekfac_block(0.0, split=split), layer, evidence, 0.5)
        says(found, operator(tkfac_block(0.0, split), layer, evidence, 0.5))


# Both ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_splits
@with_methods
def test_c54_large_damping_gives_the_gradient_over_the_damping(method, split):
    (layer, evidence, damping), method = uneven(), BLOCKS[method](0.0, split=split)

    def distance(times):
        found = operator(method, layer, evidence, times * damping)
        return error(found * (times * damping)[:, None, None], np.stack([np.eye(16)] * 2))

    near, far = distance(1e4), distance(1e8)
    assert far < 1e-2
    assert far < 1.5e-2 * near  # only with the root of the damping
    assert distance(1e-2) > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@with_splits
@pytest.mark.parametrize("damping", [1e-30, 0.25])
def test_a_scale_of_zero_gives_the_gradient_over_the_damping(split, damping):
    layer, evidence = pairs(jnp.zeros((6, 5)), normal(6, 3))
    found = operator(ekfac_block(0.0, split=split), layer, evidence, damping)
    assert_equal(found, np.eye(15) / damping)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@with_splits
@pytest.mark.parametrize("examples", [1, 40])
def test_c55_every_update_descends(split, examples):
    layer, evidence, _ = random_layers(6, 5, examples, copies=30, dtype="float32")
    method = ekfac_block(0.0, split=split)

    @jax.jit
    def alignments(damping):
        state = prepared(method, layer, evidence, damping)
        gradients = normal(30, 6, 5, seed=7, dtype="float32"), summed(layer, evidence)[:, 0]
        return [jnp.sum(g * method.apply(layer, state, g, damping), axis=(1, 2)) for g in gradients]

    for damping in (1e-8, 1e-3, 1.0, 1e4):
        assert jnp.min(jnp.stack(alignments(damping))) > 0


# Wide sides -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@with_splits
@with_methods
def test_a_side_that_is_too_wide_is_damped_in_its_own_coordinates(method, split):
    layer, evidence, _ = random_layers(6, 4, 50, copies=1)
    block = captured_fisher(layer, evidence)[0]
    damping = np.trace(block) / len(block)
    (sizes,) = traces(method, layer, evidence)
    p, q = partial_traces(block, layer.shape)
    sides = {"ekfac": factors_of(layer, evidence)[1][0], "tekfac": q}
    vectors = kron(np.eye(6), np.linalg.eigh(sides[method])[1])
    expected = recomposed(vectors, diagonal_in(vectors, block))
    found = operator(BLOCKS[method](0.0, max_factor_dim=5, split=split), layer, evidence, damping)[0]
    assert_equal(found, np.linalg.inv(like_a_product(expected, layer.shape, damping, split, sizes)))
    both = kron(np.linalg.eigh(p)[1], np.linalg.eigh(q)[1])  # the control: both sides in their eigenvectors
    rotated = recomposed(both, diagonal_in(both, block))
    assert_differs(found, np.linalg.inv(like_a_product(rotated, layer.shape, damping, split, sizes)))
