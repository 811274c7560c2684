"""Laws over drawn statistics: dampings over twelve decades, ill-conditioned rows of any scale, every option.

One compiled function serves all draws of a method and a shape, and the draws are the same in every run.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_table import measured, row, task
from one_layer import (
    ekfac_block,
    kfac_block,
    shampoo_block,
    tekfac_block,
    tengrad_block,
    tkfac_block,
    tnt_block,
)
from watching import pairs

import natgrad_jax as ng
from natgrad_jax.layers.parameter import parameter
from natgrad_jax.layers.views import view

hypothesis = pytest.importorskip("hypothesis")
given, strategies = hypothesis.given, hypothesis.strategies

cheap = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
EPS = float(np.finfo(np.float32).eps)
EXAMPLES = 8
SHAPES = ((4, 3), (1, 6))

BLOCKS = {
    "kfac pi": partial(kfac_block, split="pi"),
    "kfac even": partial(kfac_block, split="even"),
    "kfac exact": partial(kfac_block, split="exact"),
    "ekfac per_example": ekfac_block,
    "ekfac minibatch": partial(ekfac_block, estimator="minibatch"),
    "ekfac pi": partial(ekfac_block, split="pi"),
    "tkfac": tkfac_block,
    "tkfac exact": partial(tkfac_block, split="exact"),
    "tekfac": tekfac_block,
    "tnt": tnt_block,
    "shampoo": shampoo_block,
    "tengrad": lambda decay: tengrad_block(EXAMPLES, 1),
}
ALWAYS = ("kfac pi", "ekfac per_example", "tengrad")
METHODS = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in BLOCKS]

damping = strategies.floats(-10, 2).map(lambda power: 10.0**power)
spread = strategies.floats(0, 8)
"""Decades between the longest and the shortest column of the rows; twice as many between eigenvalues."""
scale = strategies.floats(-4, 4).map(lambda power: 10.0**power)
seed = strategies.integers(0, 2**16)


def rows(seed, size, decades, scale):
    """Rows [N, size] in float32, their columns mixed, over so many decades."""
    draw = np.random.default_rng(seed)
    mixed = np.linalg.qr(draw.normal(size=(size, size)))[0]
    return (scale * draw.normal(size=(EXAMPLES, size)) * np.logspace(0, -decades, size) @ mixed).astype(np.float32)


@cache
def direction_of(method):
    """rows a, rows g, gradient, damping -> the direction; compiled once for each shape."""

    @jax.jit
    def found(a, g, gradient, damping):
        layer, evidence = pairs(a, g)
        if method in ("tnt", "shampoo"):  # which see an array and its gradient
            layer = view(parameter("array", gradient.shape, "float32"), gradient.shape)
            evidence = ng.Evidence(gradient={"value": evidence.gradient["kernel"]}, count=evidence.count)
        block = BLOCKS[method](0.0)
        return block.apply(layer, block.prepared(layer, evidence, damping), gradient, damping)

    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@cheap
@given(seed, spread, spread, scale, scale, damping, strategies.sampled_from(SHAPES))
def test_every_direction_is_finite_and_downhill(method, seed, wide_a, wide_g, scale_a, scale_g, damping, shape):
    a, g = rows(seed, shape[0], wide_a, scale_a), rows(seed + 1, shape[1], wide_g, scale_g)
    gradient = (a.T @ g / EXAMPLES).astype(np.float32)
    direction = np.asarray(direction_of(method)(a, g, gradient, jnp.float32(damping)), np.float64)
    assert np.isfinite(direction).all()
    assert np.sum(direction * gradient) > 0


def damped(factor, strength):
    """A factor with its damping, which has a floor of 8 eps of the Frobenius norm."""
    floor = 8 * EPS * np.linalg.norm(factor)
    return factor + max(strength, floor) * np.eye(len(factor))


@cheap
@given(seed, spread, spread, scale, scale, damping, strategies.sampled_from(SHAPES))
def test_the_error_of_kfac_is_bounded_by_the_condition_of_what_is_inverted(
    seed, wide_a, wide_g, scale_a, scale_g, damping, shape
):
    a, g = rows(seed, shape[0], wide_a, scale_a), rows(seed + 1, shape[1], wide_g, scale_g)
    gradient = rows(seed + 2, shape[1], 0, 1.0)[: shape[0]]
    found = direction_of("kfac pi")(a, g, gradient, jnp.float32(damping))
    left, right = (each.astype(np.float64).T @ each.astype(np.float64) / EXAMPLES for each in (a, g))
    ratio = np.sqrt((np.trace(left) / shape[0]) / (np.trace(right) / shape[1]))
    left, right = damped(left, ratio * np.sqrt(damping)), damped(right, np.sqrt(damping) / ratio)
    exact = np.linalg.solve(left, gradient) @ np.linalg.inv(right)
    bound = 20 * EPS * (np.linalg.cond(left) + np.linalg.cond(right))
    assert np.linalg.norm(found - exact) <= bound * np.linalg.norm(exact)


@cache
def step_of(method):
    """damping, scale of the inputs and of the cotangents -> gradient and update of a whole net; one compilation."""
    layers, (gradient, evidence) = task("mlp").layers, measured("mlp")

    @jax.jit
    def found(damping, inputs, cotangents):
        def scaled(tree, by):
            return jax.tree.map(lambda leaf: by * leaf, tree)

        there = {
            name: each._replace(
                inputs=scaled(each.inputs, inputs),
                cotangents=scaled(each.cotangents, cotangents),
                gradient=scaled(each.gradient, inputs * cotangents),
            )
            for name, each in evidence.items()
        }
        tx = row(method).scale_by(layers, damping=damping)
        updates, state = tx.update(gradient, tx.init(gradient), curvature=there)
        return gradient, updates, state.metrics

    return found


@pytest.mark.full
@pytest.mark.parametrize("method", ["kfac pi", pytest.param("tnt", marks=pytest.mark.full)])
@cheap
@given(damping, scale, scale)
def test_the_update_of_a_net_is_finite_and_downhill_at_every_damping(method, damping, inputs, cotangents):
    gradient, updates, metrics = step_of(method)(*jnp.float32([damping, inputs, cotangents]))
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (gradient, updates)]
    assert np.isfinite(flat[1]).all() and np.dot(*map(np.float64, flat)) > 0
    assert metrics.rejected_refreshes == 0
