"""Patches of a convolution in pieces of a batch: the same sums, with the rows of one piece at a time."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from one_layer import ekfac_block, tekfac_block
from reference import assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.layers import pieces
from natgrad_jax.layers.rows import input_moment

SMALL = 12 * 36 * 10
"""Entries of the rows of ten examples of the layers here, or fewer."""


def watched(groups=1, weights=None, examples=24, dtype="float64"):
    """A convolution over 6 x 6 pixels of 4 channels, and its evidence."""
    model = nn.Conv(4, (3, 1), feature_group_count=groups, param_dtype=dtype)
    x, y = normal(examples, 6, 6, 4, dtype=dtype), normal(examples, 6, 6, 4, seed=1, dtype=dtype)
    variables = model.init(jax.random.key(0), x)
    capture = ng.linen.capture(model, ng.losses.squared_error)
    layers = capture.layers(variables, x)
    out = jax.jit(lambda v: capture.value_and_grad(v, x, y, key=jax.random.key(1), weights=weights).curvature())
    (layer,), (evidence,) = layers.known, [out(variables)[name] for name in layers]
    return layer, evidence


def all_of(layer, evidence):
    """What statistics and scales are made of."""

    def found(evidence):
        ways = [(full, sharing) for full in (True, False) for sharing in ("expand", "reduce")]
        sums = [input_moment(layer, evidence, *way) for way in ways]
        states = [block(0.0).prepared(layer, evidence, 1.0) for block in (ekfac_block, tekfac_block)]
        return sums, [(state.statistics, state.operator.scale.total) for state in states]

    return jax.jit(found)(evidence)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "weighted"), [(1, False), (2, True)])
def test_the_sums_over_pieces_are_those_over_the_batch(monkeypatch, groups, weighted):
    weights = jnp.arange(24.0) / 10 if weighted else None
    layer, evidence = watched(groups, weights)
    assert pieces.examples_at_a_time(layer, evidence, SMALL) in (8, 6, 4)
    whole = all_of(layer, evidence)
    monkeypatch.setattr(pieces.summed, "__defaults__", (SMALL, False))
    monkeypatch.setattr(pieces.examples_at_a_time, "__defaults__", (SMALL,))
    again, others = watched(groups, weights)
    assert again == layer
    for one, other in zip(jax.tree.leaves(evidence.gradient), jax.tree.leaves(others.gradient), strict=True):
        assert_equal(other, one)  # the gradient is a product of rows, too
    for one, other in zip(jax.tree.leaves(all_of(layer, evidence)), jax.tree.leaves(whole), strict=True):
        assert_equal(one, other)


def test_the_patches_of_a_piece_are_all_that_is_there_at_a_time():
    layer, evidence = watched(examples=64, dtype="float32")

    def scratch(most):
        sums = jax.jit(lambda e: pieces.summed(lambda part: input_moment(layer, part, True), layer, e, most))
        return sums.lower(evidence).compile().memory_analysis().temp_size_in_bytes

    assert scratch(SMALL) < 0.4 * scratch(1 << 30)
