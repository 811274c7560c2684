"""Statistics and operators in a narrower dtype: half of the bytes, nearly the same steps, no refresh that fails."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from methods_table import SETTINGS, contents, measured, task, trained
from reference import error

import natgrad_jax as ng
from natgrad_jax.lift import stored

METHODS = {"kfac pi": ng.scale_by_kfac, "ekfac": ng.scale_by_ekfac, "shampoo": ng.scale_by_shampoo}
HALF = 2.0**-8
"""Relative rounding of bfloat16."""


def after(make, steps=6, **settings):
    """The last update and state on batches that come round, at the same parameters."""
    tx = make(task("mlp").layers, **SETTINGS | settings)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(measured("mlp", n) for n in range(4)))

    def on(state, t):
        gradient, evidence = jax.tree.map(lambda leaf: leaf[t % 4], batches)
        updates, state = tx.update(gradient, state, curvature=evidence)
        return state, updates

    state, updates = jax.jit(lambda s: lax.scan(on, s, jnp.arange(steps)))(tx.init(task("mlp").variables["params"]))
    return jax.tree.map(lambda leaf: leaf[-1], updates), state


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac pi", *(pytest.param(n, marks=pytest.mark.full) for n in [*METHODS][1:])])
def test_what_is_kept_is_narrow_and_the_direction_that_of_wide_factors_up_to_its_rounding(method):
    found, narrow = after(METHODS[method], factor_dtype="bfloat16")
    whole, wide = after(METHODS[method])
    for leaf, like in zip(jax.tree.leaves(contents(narrow)), jax.tree.leaves(contents(wide)), strict=True):
        assert leaf.shape == like.shape and (leaf.dtype == jnp.bfloat16) == (like.ndim > 0 and like.size > 0)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert one.dtype == jnp.float32
        assert HALF / 100 < error(one, other) < 30 * HALF  # it is rounded, and rounding is magnified by the inverse
    assert narrow.metrics.rejected_refreshes == 0


def test_half_of_the_bytes_are_held():
    layers = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error).layers(
        {"w": jnp.zeros((40, 30))}, jnp.zeros((2, 40))
    )
    wide, narrow = (
        layers.bytes(ng.scale_by_kfac(layers, damping=0.1, factor_dtype=dtype)) for dtype in (None, "bfloat16")
    )
    assert 0.5 < narrow / wide < 0.51


@pytest.mark.full
@pytest.mark.parametrize("guarded", [True, False])
def test_a_factor_of_few_examples_is_still_factorised_without_damping(monkeypatch, guarded):
    if not guarded:
        monkeypatch.setattr(stored, "_lifted", lambda layer, tree, dtype: stored._wide(layer, tree))
    a = jax.random.normal(jax.random.key(0), (3, 40))
    capture = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error)
    params = {"w": jnp.zeros((40, 2))}
    tx = ng.scale_by_kfac(capture.layers(params, a), damping=0.0, factor_dtype="bfloat16")
    out = capture.value_and_grad(params, a, jnp.ones((3, 2)), key=jax.random.key(1))
    _, state = jax.jit(lambda state: tx.update(out.grad, state, curvature=out.curvature))(tx.init(params))
    assert (int(state.metrics.rejected_refreshes) == 0) == guarded


@pytest.mark.full
def test_an_optimizer_with_narrow_factors_learns_and_keeps_its_dtypes():
    problem = task("mlp")
    _, losses = trained(problem, ng.kfac(0.05, problem.layers, damping=0.1, factor_dtype="bfloat16", rank=3))
    assert losses[-1] < 0.8 * losses[0]
