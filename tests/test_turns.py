"""Rolling refreshes: every layer on a schedule of its own, and none of the steps has all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_table import inner_jaxprs, measured, task

import natgrad_jax as ng
from natgrad_jax.base import Layers
from natgrad_jax.lift.grouping import cost
from natgrad_jax.lift.state import Block, Schedule
from natgrad_jax.lift.turns import Turns, turns
from natgrad_jax.methods.ekfac import EKFAC
from natgrad_jax.methods.kfac import KFAC

STEPS = 9
PERIODS = {"statistics_every": 2, "refresh_every": 6, "early_refresh": False}
METHODS = {
    "kfac": (KFAC(damping=0.1, rolling=True, **PERIODS), KFAC.method, (0.95,)),
    "ekfac": (EKFAC(damping=0.1, rolling=True, rescale_every=4, **PERIODS), EKFAC.method, (0.95, 0.95)),
}


def data():
    """The gradients and the evidence of four batches, which come round."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(measured("mlp", t) for t in range(4)))


def rolled(settings, steps=STEPS, start=0, state=None):
    """Updates and the dates of the operators of each step, and the last state."""
    tx, batches = settings.lifted(task("mlp").layers), data()

    def step(state, t):
        gradient, evidence = jax.tree.map(lambda leaf: leaf[t % 4], batches)
        updates, state = tx.update(gradient, state, curvature=evidence)
        return state, (updates, {name: operator.date for name, operator in state.operators.items()})

    state = tx.init(task("mlp").variables["params"]) if state is None else state
    return jax.jit(lambda state: jax.lax.scan(step, state, start + jnp.arange(steps)))(state)


def explicit(method, layers: Layers, refreshed, rescaled):
    """Updates of a walk over each layer by itself, which is refreshed and rescaled at the steps that are told."""
    batches = data()

    def step(states, told):
        t, fresh, again = told
        gradient, evidence = jax.tree.map(lambda leaf: leaf[t % 4], batches)
        new, updates = {}, {}
        for name, layer in layers.items():
            statistics, operator = states[name]
            seen = method.observe(layer, statistics, evidence[name])
            statistics = jax.tree.map(partial(jnp.where, t % 2 == 0), seen, statistics)
            made = method.refresh(layer, statistics, operator, jnp.float32(0.1))
            operator = jax.tree.map(partial(jnp.where, fresh[name]), made, operator)
            if method.rescale:
                scaled = method.rescale(layer, operator, evidence[name])
                operator = jax.tree.map(partial(jnp.where, fresh[name] | again), scaled, operator)
            new[name] = statistics, operator
            matrix = jnp.concatenate([gradient[name]["kernel"], gradient[name]["bias"][None]])
            found = method.apply(layer, operator, matrix, jnp.float32(0.1))
            updates[name] = {"kernel": found[:-1], "bias": found[-1]}
        return new, updates

    told = jnp.arange(STEPS), refreshed, rescaled
    states = {name: method.init(layer) for name, layer in layers.items()}
    return jax.jit(lambda states: jax.lax.scan(step, states, told)[1])(states)


def near(found, expected):
    return all(
        np.allclose(one, other, rtol=2e-4, atol=1e-5)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_values_are_those_of_a_schedule_for_each_layer(method):
    settings, make, decays = METHODS[method]
    state, (updates, dates) = rolled(settings)
    steps = np.arange(STEPS)
    refreshed = {name: date == steps for name, date in dates.items()}
    turns_of = [tuple(np.flatnonzero(there)) for there in refreshed.values()]
    assert all(turn[0] == 0 for turn in turns_of)  # at the start all of them
    assert sorted(turn[1:] for turn in turns_of) == [(2, 8), (4,), (6,)]  # then one at a time, each every six steps
    layers = task("mlp").layers
    expected = explicit(make(settings, *decays), layers, refreshed, steps % 4 == 0)
    assert near(updates, expected)
    at_once = {name: steps % 6 == 0 for name in refreshed}
    assert not near(updates, explicit(make(settings, *decays), layers, at_once, steps % 4 == 0))
    assert state.metrics.refreshes == 3 + 4


@pytest.mark.full
def test_a_state_that_was_put_away_goes_on_with_the_same_turns():
    settings = METHODS["kfac"][0]
    _, (whole, _) = rolled(settings)
    half, _ = rolled(settings, 5)
    _, (rest, _) = rolled(settings, 4, 5, jax.tree.map(jnp.copy, half))
    assert near(rest, jax.tree.map(lambda leaf: leaf[5:], whole))


def factorisations(jaxpr):
    return sum(
        equation.primitive.name in ("cholesky", "eigh") or sum(map(factorisations, inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def test_every_refresh_is_there_once_in_a_branch_of_its_own():
    tx, (gradient, evidence) = METHODS["kfac"][0].lifted(task("mlp").layers), measured("mlp")
    state = tx.init(task("mlp").variables["params"])
    step = jax.make_jaxpr(lambda state: tx.update(gradient, state, curvature=evidence))(state)
    alone = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            assert equation.primitive.name != "cholesky"
            inner = inner_jaxprs(equation)
            if equation.primitive.name == "cond" and 0 < sum(map(factorisations, inner)) <= 2:
                alone.append(sum(map(factorisations, inner)))
            else:
                list(map(walk, inner))

    walk(step.jaxpr)
    assert alone == [2, 2, 2]  # both factors of each of three layers


@pytest.mark.full
def test_the_turns_are_balanced_by_the_cubes_of_the_sides():
    sizes = [(100, 10), (80, 80), (80, 70), (60, 60), (60, 60), (60, 5), (50, 50), (5, 5)]
    layers = [ng.Layer(str(index), "dense", shape, ()) for index, shape in enumerate(sizes)]
    method = KFAC(damping=1.0).method(0.9)
    found = turns([Block(layer, method) for layer in layers], Schedule(1, 3, rolling=True))
    loads = [sum(cost(block.layer, method.init(block.layer)) for block in group) for group in found.groups]
    assert sorted(block.layer.name for group in found.groups for block in group) == [str(n) for n in range(8)]
    assert found.steps == (0, 1, 2) and max(loads) < 1.2 * min(loads)


def test_the_turn_of_a_step_is_looked_up_among_the_turns_not_the_steps():
    order = Turns(((), (), ()), (0, 3, 7), 10**9)
    expected = {0: (0, 1), 3: (1, 2), 7: (2, 3), 8: None, 10**9 - 1: None, 10**9 + 3: (1, 2)}
    for count, turn in expected.items():
        first, last = map(int, order.due(jnp.int32(count), False))
        assert (None if first == last else (first, last)) == turn
    assert tuple(map(int, order.due(jnp.int32(5), True))) == (0, 3)


def test_periods_that_are_not_known_yet_are_refused():
    with pytest.raises(TypeError, match="`refresh_every` is an array; it fixes which layers take turns"):
        ng.scale_by_kfac(task("mlp").layers, damping=0.1, rolling=True, refresh_every=jnp.int32(10))


@pytest.mark.full
def test_bases_that_have_hardly_turned_are_kept_and_counted():
    same = {"statistics_every": 1, "refresh_every": 1, "early_refresh": False, "decay": 0.9}
    layers, (gradient, evidence) = task("mlp").layers, measured("mlp")
    other = jax.tree.map(lambda leaf: leaf[1], data())[1]
    found = {}
    for tolerance in (None, 1e-3, 0.999):
        tx = ng.scale_by_ekfac(layers, damping=0.1, refresh_tolerance=tolerance, **same)

        def step(state, curvature, tx=tx):
            return tx.update(gradient, state, curvature=curvature)

        step, state = jax.jit(step), tx.init(task("mlp").variables["params"])
        counts = []
        for each in (evidence, evidence, other):
            updates, state = step(state, each)
            counts.append(int(state.metrics.skipped_refreshes))
        found[tolerance] = counts, updates, {int(operator.date) for operator in state.operators.values()}
    assert found[None][0] == [0, 0, 0] and found[None][2] == {2}
    assert found[1e-3][0] == [0, 3, 3] and found[1e-3][2] == {2}  # the same batch again, then another
    assert near(found[1e-3][1], found[None][1]) and not near(found[0.999][1], found[None][1])
    assert found[0.999][0] == [0, 3, 6] and found[0.999][2] == {0}
