"""Steps without a learning rate: each line against its dense definition, what noise does to them, and the way back."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from methods_table import NAMES, of_the_lifting, row, task
from watching import LIKELIHOODS, mlp

import natgrad_jax as ng
from natgrad_jax.around.automatic import _adapted

every_method = of_the_lifting(NAMES)
LOSS = "softmax_cross_entropy"
IDENTITY = optax.with_extra_args_support(optax.identity())
NEWTON = optax.stateless(lambda g, _: {"x": g["x"] / BENT})
BENT = jnp.array([1.0, 4.0, 25.0])


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


class Bowl(NamedTuple):
    """The loss (x - c)^T diag(BENT) (x - c) / 2 of a batch whose minimum is c, as a curvature is asked; 0 at x = c."""

    x: jax.Array
    c: jax.Array

    count = 1.0  # of a curvature; a tuple has another one

    def along(self, direction):
        return jnp.sqrt(BENT) * direction["x"]

    def value(self, params=None):
        return jnp.sum(BENT * ((self.x if params is None else params["x"]) - self.c) ** 2) / 2

    @property
    def gradient(self):
        return {"x": BENT * (self.x - self.c)}


def descent(direction, minima, start=(1.0, -2.0, 3.0), **settings):
    """The distance to zero and the state after each step; the minimum of the batch moves from step to step."""
    tx = ng.automatic(optax.with_extra_args_support(direction), **settings)

    def step(carry, c):
        params, state = carry
        bowl = Bowl(params["x"], c)
        updates, state = tx.update(bowl.gradient, state, params, curvature=bowl)
        params = optax.apply_updates(params, updates)
        return (params, state), (
            jnp.sum(BENT * params["x"] ** 2) / 2,
            state._replace(direction=(), average=(), last=()),
        )

    params = {"x": jnp.array(start)}
    return jax.jit(lambda carry: jax.lax.scan(step, carry, minima))((params, tx.init(params)))


# The equations --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("l2", [None, 0.2])
def test_the_step_is_its_share_of_the_minimiser_of_the_dense_model_and_the_share_what_the_next_gradient_says(l2):
    net, penalty = mlp("tanh", LOSS), l2 or 0.0
    capture = ng.linen.capture(net.model, LIKELIHOODS[LOSS], labels="exact")
    direction = row("kfac pi").scale_by(net.layers, **table.SETTINGS | {"statistics_every": 1, "refresh_every": 1})
    tx = ng.automatic(direction, damping=0.3, l2=l2)

    @jax.jit
    def step(params, state):
        out = capture.value_and_grad({"params": params}, net.x, net.y)
        return out.grad, *tx.update(out.grad, state, params, curvature=out.curvature)

    params, state, over, under, last = net.params, tx.init(net.params), 0.0, 0.0, None
    for _ in range(4):
        theta = flat(params)
        dense = reference.fisher(net.model, params, LOSS, net.x, net.y) + penalty * np.eye(len(theta))
        gradient, updates, state = step(params, state)
        slope = flat(gradient) + penalty * theta
        if last is not None:
            share, whole, bent = last
            over, under = 0.9 * over + share * bent - slope @ whole, 0.9 * under + bent
            np.testing.assert_allclose(state.share, np.clip(over / under, 0.01, 1), rtol=1e-4)
        whole = flat(updates) / float(state.share)
        bent = whole @ dense @ whole
        damped = bent + 0.3 * whole @ whole
        np.testing.assert_allclose(slope @ whole, -damped, rtol=1e-4)  # what minimises along a line has this slope
        last, params = (float(state.share), whole, bent), optax.apply_updates(params, updates)


def test_with_all_the_data_in_a_batch_it_is_newtons_method():
    (_, state), (losses, states) = descent(NEWTON, jnp.zeros((60, 3)))
    np.testing.assert_array_less(states.share[1:] - 1, 1e-4)
    assert np.all(states.share > 0.9) and np.all(states.momentum == 0)
    assert state.damping < 0.01 and losses[-1] < 1e-10 * losses[0] and state.rejected == 0


def test_noise_lengthens_the_averages_and_shortens_the_steps():
    """Beside one who trusts each batch, in the mean over sixteen streams."""
    noise = jax.random.normal(jax.random.key(0), (16, 400, 3))
    _, (losses, states) = jax.vmap(partial(descent, NEWTON))(noise)
    assert np.mean(states.share[:, 100:]) < 0.5 and np.mean(states.momentum[:, 100:]) > 0.8
    greedy = np.mean(np.sum(BENT * noise[:, 200:] ** 2, axis=-1) / 2)
    assert np.mean(losses[:, 200:]) < 0.2 * greedy


def test_a_given_damping_stays():
    _, (_, states) = descent(NEWTON, jnp.zeros((5, 3)), damping=lambda count: 0.1 * (count + 1))
    np.testing.assert_allclose(states.damping, 0.1 * np.arange(1, 6), rtol=1e-6)


# The way back ---------------------------------------------------------------------------------------------------------


class Cliff(NamedTuple):
    """A bowl with a cliff: beyond a distance of `edge` from zero the loss is `high`."""

    bowl: Bowl
    edge: float
    high: float

    count = 1.0
    along = property(lambda self: self.bowl.along)
    gradient = property(lambda self: self.bowl.gradient)

    def value(self, params=None):
        x = self.bowl.x if params is None else params["x"]
        return jnp.where(jnp.sum(x**2) > self.edge**2, self.high, self.bowl.value(params))


@pytest.mark.slow
@pytest.mark.parametrize("high", [np.inf, np.nan, 1e6])
def test_a_step_over_a_cliff_is_taken_back_and_doubles_the_damping(high):
    tx = ng.automatic(IDENTITY)
    params = {"x": jnp.array([1.0, 0.0, 0.0])}
    there = Cliff(Bowl(params["x"], jnp.array([9.0, 0.0, 0.0])), 2.0, high)  # its minimum is beyond
    later = tx.init(params)._replace(count=jnp.int32(1))  # the first step would be made shorter
    updates, state = tx.update(there.gradient, later, params, curvature=there)
    moved = optax.apply_updates(params, updates)
    assert jnp.sum(moved["x"] ** 2) > 4
    fallen = there._replace(bowl=there.bowl._replace(x=moved["x"]))
    updates, after = tx.update(fallen.gradient, state, moved, curvature=fallen)
    np.testing.assert_allclose(optax.apply_updates(moved, updates)["x"], params["x"], atol=1e-6)
    assert after.rejected == 1 and after.learning_rate == 0
    raised = 1.1 if after.losses.are_high() else 1.0  # line 2
    np.testing.assert_allclose(after.damping, 2 * raised * state.damping, rtol=1e-6)
    _, again = tx.update(there.gradient, after, params, curvature=there)
    assert again.rejected == 1 and again.learning_rate > 0  # and goes on


@pytest.mark.parametrize(("edge", "share"), [(20.0, 1.0), (3.5, 0.25), (1.6, 0.0625), (1.001, 0.0)])
def test_the_first_step_is_as_short_as_lowers_the_loss_of_its_batch(edge, share):
    """From 1 towards a minimum at 9, over a cliff; the second one is not tested on its batch."""
    tx, params = ng.automatic(IDENTITY, damping=0.0), {"x": jnp.array([1.0, 0.0, 0.0])}
    cliff = Cliff(Bowl(params["x"], jnp.array([9.0, 0.0, 0.0])), edge, 1e6)
    updates, state = tx.update(cliff.gradient, tx.init(params), params, curvature=cliff)
    np.testing.assert_allclose(updates["x"], [8 * share, 0, 0], atol=1e-5)
    whole = cliff.bowl.gradient["x"][0]  # d^T F d / 8, and minus the slope
    np.testing.assert_allclose(state.last.bent, 8 * share**2 * -whole, rtol=1e-5)
    np.testing.assert_allclose(state.last.foretold, 8 * (share - share**2 / 2) * whole, rtol=1e-5)
    _, second = tx.update(
        cliff.gradient, state._replace(last=state.last._replace(foretold=0.0)), params, curvature=cliff
    )
    assert second.learning_rate * -whole > 7.9


def test_a_batch_that_is_harder_takes_no_step_back():
    """The loss is far above that of the batch before, but not by the step: one test, no way back."""
    tx = ng.automatic(IDENTITY)
    params = {"x": jnp.array([1.0, 0.0, 0.0])}
    bowl = Bowl(params["x"], jnp.array([1.1, 0.0, 0.0]))
    updates, state = tx.update(bowl.gradient, tx.init(params), params, curvature=bowl)
    moved = optax.apply_updates(params, updates)
    hard = Bowl(moved["x"], jnp.array([9.0, 0.0, 0.0]))
    _, after = tx.update(hard.gradient, state, moved, curvature=hard)
    assert after.rejected == 0 and after.ratio > 0


def test_a_rise_within_the_rounding_of_the_first_loss_is_not_tested():
    tx = ng.automatic(IDENTITY)
    params = {"x": jnp.array([1e-3, 0.0, 0.0])}
    bowl = Bowl(params["x"], jnp.zeros(3))
    _, state = tx.update(bowl.gradient, tx.init(params), params, curvature=bowl)
    higher = Bowl(jnp.array([3e-3, 0.0, 0.0]), jnp.zeros(3))  # nine times the loss
    for first, tested in ((state.losses.first, True), (jnp.float32(10.0), False)):
        known = state._replace(losses=state.losses._replace(first=first))
        _, after = tx.update(higher.gradient, known, {"x": higher.x}, curvature=higher)
        assert np.isfinite(after.ratio) == tested


@pytest.mark.parametrize(
    ("values", "high"),
    [
        ([1.0] * 30, False),
        ([1.0] * 10 + [4.0] * 5, False),  # the average is 1.68
        ([1.0] * 10 + [4.0] * 6, True),  # 1.79
        ([1.0] * 10 + [np.nan] * 50, False),
        ([-1.0] * 10 + [2.0] * 5, False),  # the same, 2 lower: a rise of three fourths of the size of the least
        ([-1.0] * 10 + [2.0] * 6, True),
        ([1e8] + [1.0] * 300 + [4.0] * 30, False),  # within the rounding of the first
        ([1.0] * 10 + [2.0] * 100, True),
        ([1.0] * 10 + [2.0] * 900, False),  # it is no longer held against harder data
    ],
)
def test_a_loss_that_stays_far_above_its_least_raises_the_damping(values, high):
    def seen(losses, value):
        return losses.with_one(value, jnp.isfinite(value)), losses

    state = ng.automatic(IDENTITY).init({"x": jnp.zeros(3)})
    losses, _ = jax.lax.scan(seen, state.losses, jnp.array(values, jnp.float32))
    level, least = np.nan, np.inf
    for value in filter(np.isfinite, values):
        level = value if np.isinf(least) else 0.95 * level + 0.05 * value
        least = min(least + 0.001 * abs(least), level)
    np.testing.assert_allclose([losses.level, losses.least], [level, least], rtol=1e-4)
    assert losses.are_high() == high
    state = state._replace(losses=losses, count=jnp.int32(9), share=jnp.float32(0.3))  # a share that moves nothing
    np.testing.assert_allclose(_adapted(state, None).damping, 0.11 if high else 0.1, rtol=1e-6)


@pytest.mark.full
def test_a_batch_of_nan_leaves_the_averages_and_the_parameters_finite():
    tx = ng.automatic(IDENTITY)
    params = {"x": jnp.array([1.0, 0.0, 0.0])}
    good, bad = Bowl(params["x"], jnp.zeros(3)), Bowl(params["x"], jnp.full(3, jnp.nan))
    state = tx.init(params)
    for bowl in (good, bad, good, bad, bad, good):
        here = bowl._replace(x=params["x"])
        updates, state = tx.update(here.gradient, state, params, curvature=here)
        params = optax.apply_updates(params, updates)
        assert np.all(np.isfinite(flat((params, state.average, state.damping, state.share, state.sums))))
    assert Bowl(params["x"], jnp.zeros(3)).value() < good.value()


# In use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.full
@every_method
def test_without_a_learning_rate_the_loss_falls_on_a_real_problem(method):
    problem = task("mlp")
    tx = row(method).optimizer(layers=problem.layers, statistics_every=2, refresh_every=2)
    _, losses = table.trained(problem, tx, 30)
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.2 * losses[0]


@pytest.mark.full
def test_clipping_in_front_leaves_the_length_to_the_model_if_the_gradient_is_given():
    problem = task("mlp")
    params = problem.variables["params"]
    tx = ng.kfac(layers=problem.layers)
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), tx)

    @jax.jit
    def steps(params):
        out = table.evaluate(problem, params, 0)
        given, state = {"curvature": out.curvature, "gradient": out.grad}, clipped.init(params)
        expected, _ = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
        found, _ = clipped.update(out.grad, state, params, **given)
        control, _ = clipped.update(out.grad, state, params, curvature=out.curvature)
        return expected, found, control

    expected, found, control = map(flat, steps(params))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert np.linalg.norm(control) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"momentum": 0.9}, "momentum"), ({"kl_clip": 1e-3}, "kl_clip"), ({"damping": ng.adaptive_damping()}, "damping")],
)
def test_what_is_found_while_training_is_not_given(settings, name):
    with pytest.raises(ValueError, match=rf"`{name}` is .*, but `learning_rate` is None"):
        ng.kfac(layers=task("mlp").layers, **settings)


@pytest.mark.full
def test_a_quadratic_rate_brings_its_momentum_and_its_damping():
    problem = task("mlp")
    implied = ng.kfac("quadratic", problem.layers)
    told = ng.kfac("quadratic", problem.layers, momentum="quadratic", damping=ng.adaptive_damping())
    fixed = ng.kfac("quadratic", problem.layers, damping=0.5, momentum=None)

    @jax.jit
    def steps(params):
        out = table.evaluate(problem, params, 0)
        return [tx.update(out.grad, tx.init(params), params, curvature=out.curvature) for tx in (implied, told, fixed)]

    one, other, (_, state) = steps(problem.variables["params"])
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert state.damping == 0.5 and state.last is None


@pytest.mark.full
def test_diagnose_tells_what_the_steps_have_found():
    problem = task("mlp")
    tx, params = ng.kfac(layers=problem.layers), problem.variables["params"]
    out = table.evaluate(problem, params, 0)
    _, state = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
    numbers = ng.diagnose(state, problem.layers)
    assert numbers["learning_rate"] == state.learning_rate and numbers["rejected_steps"] == 0
