"""The KL clip bounds how far a step moves the model, grafting gives it another's length; neither turns it."""

from functools import cache

import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
from flax import linen as nn
from methods_table import NAMES, direction, measured, of_the_lifting, task, update_of
from reference import normal

import natgrad_jax as ng

every_method = of_the_lifting(NAMES, ("kfac pi",))


def length(rate, gradient, updates):
    """rate^2 <g, u>."""
    return rate**2 * float(optax.tree.vdot(gradient, updates))


def updated(tx):
    gradient, evidence = measured("mlp")
    updates, state = update_of(tx)(gradient, tx.init(gradient), curvature=evidence)
    return gradient, updates, state


@cache
def _first_clipped(tx):
    """The first step of a direction that is clipped, compiled once for all bounds."""

    @jax.jit
    def first(bound, gradient, evidence):
        clipped = ng.clip_by_kl(tx, 0.5, bound)
        return clipped.update(gradient, clipped.init(gradient), curvature=evidence)

    return first


def clipped_to(bound, tx):
    """Updates and state of the first step of a direction that is clipped."""
    return _first_clipped(tx)(bound, *measured("mlp"))


@pytest.mark.slow
@every_method
def test_a_long_step_is_cut_to_the_bound_and_keeps_its_direction(method):
    plain = direction(method)
    gradient, free, _ = updated(plain)
    bound = 0.25 * length(0.5, gradient, free)
    clipped, state = clipped_to(bound, plain)
    np.testing.assert_allclose(state.clip_factor**2 * length(0.5, gradient, free), bound, rtol=1e-5)
    jax.tree.map(lambda c, f: np.testing.assert_allclose(c, 0.5 * f, rtol=1e-5), clipped, free)
    np.testing.assert_allclose(state.clip_factor, 0.5, rtol=1e-5)
    assert length(0.5, gradient, free) > 2 * bound  # the control: without the clip


@pytest.mark.slow
@every_method
def test_a_short_step_is_left_as_it_is(method):
    plain = direction(method)
    gradient, free, _ = updated(plain)
    kept, state = clipped_to(2 * length(0.5, gradient, free), plain)
    jax.tree.map(lambda k, f: np.testing.assert_allclose(k, f, rtol=1e-5), kept, free)  # two compilations
    assert state.clip_factor == 1


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_a_clipped_step_diverges_by_half_the_bound_less_the_damping_where_kfac_is_exact():
    model, x, y = nn.Dense(3), normal(40, 4), normal(40, 3, seed=1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0), x)["params"])
    capture = ng.linen.capture(model, ng.losses.squared_error, labels="exact")
    direction = ng.scale_by_kfac(capture.layers({"params": params}, x), damping=1e-3, split="exact")

    @jax.jit
    def first(bound):
        out = capture.value_and_grad({"params": params}, x, y)
        tx = ng.clip_by_kl(direction, 0.5, bound)
        return tx.update(out.grad, tx.init(params), params, curvature=out.curvature)

    def divergence(bound):
        """KL between the Gaussians around the outputs before and after the step, and what damping makes of it."""
        updates, state = first(bound)
        assert state.clip_factor < 1 or bound > 1
        moved = model.apply({"params": jax.tree.map(lambda p, u: p - 0.5 * u, params, updates)}, x)
        square = jnp.mean(jnp.sum((moved - model.apply({"params": params}, x)) ** 2, axis=-1))
        return square / 2, 1e-3 * 0.5**2 * optax.tree.vdot(updates, updates) / 2

    kl, damped = divergence(1e-2)
    np.testing.assert_allclose(kl + damped, 1e-2 / 2, rtol=1e-9)
    assert kl < 1e-2 / 2
    assert divergence(1e3)[0] > 1e-2 / 2  # the control: a bound too wide to matter


@pytest.mark.full
def test_the_clip_follows_a_schedule_of_the_learning_rate():
    plain = direction("kfac pi")
    gradient, free, _ = updated(plain)
    bound = 0.25 * length(0.5, gradient, free)
    tx = ng.clip_by_kl(plain, lambda count: 0.5 / (1 + count), bound)
    state = tx.init(gradient)
    scales = []
    for _ in range(3):
        _, state = update_of(tx)(gradient, state, curvature=measured("mlp")[1])
        scales.append(float(state.clip_factor))
    np.testing.assert_allclose(scales[0], 0.5, rtol=1e-5)
    assert scales[0] < scales[1]
    assert scales[2] == 1


def test_a_direction_uphill_and_a_zero_gradient_are_not_clipped_and_give_no_nan():
    for factor in (-1.0, 0.0):
        scaled = optax.with_extra_args_support(optax.scale(factor))
        tx = ng.clip_by_kl(scaled, 1.0, 1e-3)
        updates, state = tx.update({"a": jnp.ones(3)}, tx.init({"a": jnp.ones(3)}))
        np.testing.assert_array_equal(updates["a"], factor)
        assert state.clip_factor == 1


def test_the_complete_optimizers_clip_before_the_momentum():
    layers = task("mlp").layers
    gradient, evidence = measured("mlp")
    clipped, plain = (ng.kfac(0.5, layers, damping=0.03, kl_clip=clip) for clip in (1e-4, None))
    short, state = update_of(clipped)(gradient, clipped.init(gradient), curvature=evidence)
    long, _ = update_of(plain)(gradient, plain.init(gradient), curvature=evidence)
    scale = optax.tree.get(state, "clip_factor")
    assert 0 < scale < 1
    jax.tree.map(lambda s, f: np.testing.assert_allclose(s, scale * f, rtol=1e-4), short, long)


def test_warm_start_reaches_through_the_clip():
    gradient, evidence = measured("mlp")
    tx = ng.clip_by_kl(direction("kfac pi"), 0.5, 1e-3)
    state = ng.warm_start(tx, tx.init(gradient), [evidence, evidence], gradient)
    assert state.direction.metrics.statistics == 2
    assert state.count == 0


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match=r"`bound` is -1; expected a finite number of at least 0"):
        ng.clip_by_kl(table.direction("kfac pi"), 0.1, -1)


# --- grafting ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_method
def test_a_grafted_step_has_the_length_of_one_and_the_direction_of_the_other(method):
    plain, other = direction(method), optax.adam(0.1)
    gradient, free, _ = updated(plain)
    lengths, _ = other.update(gradient, other.init(gradient))
    _, grafted, _ = updated(ng.graft(plain, other))

    def same(found, long, length):
        np.testing.assert_allclose(jnp.linalg.norm(found), jnp.linalg.norm(length), rtol=1e-5)
        np.testing.assert_allclose(found / jnp.linalg.norm(found), long / jnp.linalg.norm(long), rtol=1e-4, atol=1e-6)

    jax.tree.map(same, grafted, free, lengths)
    assert not np.allclose(optax.tree.norm(free), optax.tree.norm(lengths), rtol=0.1)  # the control: without grafting


@pytest.mark.full
def test_a_step_grafted_as_a_whole_keeps_the_proportions_of_its_parameters():
    plain, other = direction("kfac pi"), optax.sgd(0.1)
    gradient, free, _ = updated(plain)
    _, whole, _ = updated(ng.graft(plain, other, per="model"))
    np.testing.assert_allclose(optax.tree.norm(whole), 0.1 * optax.tree.norm(gradient), rtol=1e-5)
    scale = optax.tree.norm(whole) / optax.tree.norm(free)
    jax.tree.map(lambda w, f: np.testing.assert_allclose(w, scale * f, rtol=1e-4, atol=1e-7), whole, free)
    _, parts, _ = updated(ng.graft(plain, other))
    scales = [
        jnp.linalg.norm(p) / jnp.linalg.norm(f) for p, f in zip(*map(jax.tree.leaves, (parts, free)), strict=True)
    ]
    assert max(scales) > 1.1 * min(scales)  # the control: each by itself


def test_a_direction_of_zero_stays_zero_and_a_graft_of_unknown_kind_is_refused():
    zero = optax.with_extra_args_support(optax.scale(0.0))
    updates, _ = ng.graft(zero, optax.sgd(1.0)).update(
        {"a": jnp.ones(3)}, ng.graft(zero, optax.sgd(1.0)).init({"a": 0.0})
    )
    np.testing.assert_array_equal(updates["a"], 0)
    with pytest.raises(ValueError, match="`per` is 'layer'; expected one of 'parameter', 'model'"):
        ng.graft(zero, zero, per="layer")


@pytest.mark.full
def test_warm_start_reaches_through_the_graft():
    gradient, evidence = measured("mlp")
    tx = ng.graft(direction("kfac pi"), optax.scale_by_adam())
    state = ng.warm_start(tx, tx.init(gradient), [evidence, evidence], gradient)
    assert state.direction.metrics.statistics == 2
    assert state.length.count == 0
