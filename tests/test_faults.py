"""Faults on purpose: what a batch, its evidence or a factor does wrong costs a step at most, and is counted."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from methods_table import ALL_NAMES, batch_of, lifted, of_the_lifting, row, settings_of, task

import natgrad_jax as ng

PROBLEM = task("mlp")
START = PROBLEM.variables["params"]
ADAPTIVE = "adaptive"
STEPS = 24


@dataclass(frozen=True)
class Faulty:
    """A curvature with the cotangents of one layer times a number."""

    inner: Any
    by: Any

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, params=None):
        evidence = dict(self.inner(params))
        for name in ("Dense_1", "Dense_1/kernel"):
            if name in evidence:
                old = evidence[name]
                cotangents, gradient = jax.tree.map(lambda leaf: leaf * self.by, (old.cotangents, old.gradient))
                evidence[name] = old._replace(cotangents=cotangents, gradient=gradient)
        return evidence


def optimizer(method):
    if method == ADAPTIVE:
        rule = ng.adaptive_damping(initial=2.0, least=2.0)  # eight examples foretell little of the next ones
        return ng.kfac("quadratic", PROBLEM.layers, damping=rule, statistics_every=1)
    every = {k: v for k, v in {"statistics_every": 1, "refresh_every": 1}.items() if k in settings_of(method)}
    settings = {"damping": 0.1, **row(method).learning, **every}
    settings.pop("statistics", None)  # those of the row, which are of the evidence
    return row(method).optimizer(settings.pop("learning_rate"), PROBLEM.layers, **settings)


@cache
def trainer(method):
    """One compiled step: carry, t, a number for each of `SOUND`, which multiplies, selects or is added."""
    tx = optax.apply_if_finite(optimizer(method), max_consecutive_errors=5)

    @jax.jit
    def step(carry, t, inputs, constant, evidence, labels):
        params, state = carry
        x, y, key = batch_of(PROBLEM, t)
        x, y = jnp.where(constant, x[:1], x) * inputs, jnp.where(constant, y[:1], y) + labels
        out = PROBLEM.capture.value_and_grad({"params": params}, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=Faulty(out.curvature, evidence))
        return (optax.apply_updates(params, updates), state), out.value

    return tx, step


SOUND = {"inputs": 1.0, "constant": False, "evidence": 1.0, "labels": 0}
FAULTS = {
    "NaN in a batch": {"inputs": np.nan},
    "Inf in a batch": {"inputs": np.inf},
    "labels of no class": {"labels": 100},
    "a constant batch": {"constant": True},
    "a batch of zeros": {"inputs": 0.0},
    "inputs of 1e30": {"inputs": 1e30},
    "NaN in the evidence of a layer": {"evidence": np.nan},
    "Inf in the evidence of a layer": {"evidence": np.inf},
    "no gradient at a layer": {"evidence": 0.0},
    "evidence of 1e30": {"evidence": 1e30},
}
LOST = ("NaN in a batch", "Inf in a batch", "labels of no class")
COUNTED = ("NaN in the evidence of a layer", "Inf in the evidence of a layer")


def trained(method, fault, params=START, at=(3, 8)):
    """Loss of each step, the last carry; the fault is at the fourth and the ninth step, if nothing else is said."""
    tx, step = trainer(method)
    carry, losses = (params, tx.init(params)), []
    for t in range(STEPS):
        settings = {**SOUND, **(fault if t in at else {})}
        carry, loss = step(carry, t, *(jnp.asarray(settings[name]) for name in SOUND))
        losses.append(float(loss))
    return losses, carry


def all_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree) if leaf.dtype != jnp.int32)


@pytest.mark.full
@of_the_lifting((*ALL_NAMES, ADAPTIVE))
def test_training_goes_on_after_every_fault(method):
    sound, _ = trained(method, {})
    assert np.mean(sound[-8:]) < 0.95 * np.mean(sound[:4])
    for name, fault in FAULTS.items():
        losses, (params, state) = trained(method, fault)
        assert all_finite(params), name
        # each batch comes again every four steps
        assert np.mean(losses[-8:]) < 0.98 * np.mean(sound[:4]), name
        metrics = optax.tree.get(state, "metrics", filtering=lambda _, value: hasattr(value, "rejected_statistics"))
        if name in LOST:
            assert state.total_notfinite == 2, name
        elif name in COUNTED:
            assert metrics.rejected_statistics + getattr(metrics, "rejected_refreshes", 0) >= 2, name


@pytest.mark.slow
@of_the_lifting((*ALL_NAMES, ADAPTIVE))
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(method):
    tx, step = trainer(method)
    carry = START, tx.init(START)
    for t in range(3):
        carry, _ = step(carry, t, *(jnp.asarray(SOUND[name]) for name in SOUND))
    after, _ = step(carry, 3, *(jnp.asarray(number) for number in {**SOUND, "inputs": np.nan}.values()))
    before, now = ((params, state.inner_state) for params, state in (carry, after))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(old, new)
    assert after[1].total_notfinite == 1


@pytest.mark.slow
@of_the_lifting((*ALL_NAMES, ADAPTIVE), ("kfac pi",))
def test_a_dead_layer_stays_and_the_others_learn(method):
    dead = {**START, "Dense_1": jax.tree.map(jnp.zeros_like, START["Dense_1"])}
    dead["Dense_2"] = {**START["Dense_2"], "kernel": jnp.zeros_like(START["Dense_2"]["kernel"])}
    # one example of each batch: three of the four have one label, so that the last bias alone has much to learn
    losses, (params, _) = trained(method, FAULTS["a constant batch"], dead, at=range(STEPS))
    assert not any(leaf.any() for leaf in (*params["Dense_1"].values(), params["Dense_2"]["kernel"]))
    assert all_finite(params) and np.mean(losses[-8:]) < 0.9 * losses[0]


@pytest.mark.full
@of_the_lifting(ALL_NAMES)
def test_a_batch_of_one(method):
    tx = optimizer(method)
    x, y, key = batch_of(PROBLEM, 0)

    @jax.jit
    def step(state, params):
        out = PROBLEM.capture.value_and_grad({"params": params}, x[:1], y[:1], key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state, out.value

    params, state, first = step(tx.init(START), START)
    for _ in range(5):
        params, state, loss = step(state, params)
    assert all_finite((params, state)) and loss < first


@pytest.mark.full
def test_without_a_guard_a_batch_that_is_not_finite_is_lost_as_with_any_optimizer():
    tx = optimizer("kfac pi")
    x, y, key = batch_of(PROBLEM, 0)

    @jax.jit
    def step(state, x):
        out = PROBLEM.capture.value_and_grad({"params": START}, x, y, key=key)
        return tx.update(out.grad, state, START, curvature=out.curvature)

    updates, state = step(tx.init(START), x * jnp.nan)
    assert not all_finite(updates)
    assert all_finite(lifted(state).statistics)  # which are kept, and counted
    assert lifted(state).metrics.rejected_statistics == 3


@pytest.mark.full
@pytest.mark.parametrize("factor", ["singular", "indefinite", "zero", "of 1e30"])
def test_factors_that_are_wrong_keep_the_last_inverse_or_give_a_finite_one(factor):
    tx = ng.scale_by_kfac(PROBLEM.layers, damping=0.1, statistics_every=4, refresh_every=1)
    x, y, key = batch_of(PROBLEM, 0)
    out = PROBLEM.capture.value_and_grad({"params": START}, x, y, key=key)
    update = jax.jit(lambda state, e: tx.update(out.grad, state, START, curvature=e))
    evidence = out.curvature()
    _, state = update(tx.init(START), evidence)
    size = state.statistics["Dense_1"].inputs.total.shape[-1]
    wrong = {"singular": jnp.ones((size, size)), "zero": jnp.zeros((size, size)), "of 1e30": 1e30 * jnp.eye(size)}
    wrong["indefinite"] = jnp.diag(jnp.arange(size) - 3.0)
    pair = state.statistics["Dense_1"]
    pair = pair._replace(inputs=pair.inputs._replace(total=wrong[factor] * pair.inputs.weight))
    before = state.operators["Dense_1"].value
    updates, after = update(state._replace(statistics={**state.statistics, "Dense_1": pair}), evidence)
    assert all_finite((updates, after.operators))
    if factor == "indefinite":
        assert after.metrics.rejected_refreshes == 1 and after.operators["Dense_1"].date == 0
        np.testing.assert_array_equal(after.operators["Dense_1"].value.inputs, before.inputs)
    else:
        assert after.metrics.rejected_refreshes == 0 and after.operators["Dense_1"].date == 1
        assert updates["Dense_1"]["kernel"].any()


@pytest.mark.full
def test_overflow_in_half_precision_costs_the_step():
    problem = task("mlp bfloat16")
    tx = optax.apply_if_finite(ng.kfac(0.05, problem.layers, damping=0.1), max_consecutive_errors=5)
    start = problem.variables["params"]

    @jax.jit
    def step(params, state, scale):
        x, y, key = batch_of(problem, 0)
        there = {**params, "Dense_2": jax.tree.map(lambda leaf: 8 * leaf * scale.astype(leaf.dtype), params["Dense_2"])}
        out = problem.capture.value_and_grad({"params": there}, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state, out.value

    params, state, first = step(start, tx.init(start), jnp.float32(1 / 8))
    params, state, _ = step(params, state, jnp.float32(3e38))
    assert state.total_notfinite == 1
    for _ in range(5):
        params, state, loss = step(params, state, jnp.float32(1 / 8))
    assert all_finite(params) and loss < first


@pytest.mark.full
def test_steps_that_choose_themselves_take_none_of_a_batch_that_is_not_finite_or_has_no_weight():
    rule = ng.adaptive_damping(calibration=2)  # so that later steps are tested in their turn only
    tx = ng.kfac("quadratic", PROBLEM.layers, momentum="quadratic", damping=rule)

    @jax.jit
    def step(carry, t, inputs, weights):
        params, state = carry
        x, y, key = batch_of(PROBLEM, t)
        out = PROBLEM.capture.value_and_grad({"params": params}, x * inputs, y, key=key, weights=weights)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return (optax.apply_updates(params, updates), state), out.value

    carry, losses, ones = (START, tx.init(START)), [], jnp.ones(8)
    faults = {7: (jnp.nan, ones), 10: (jnp.nan, ones), 12: (1.0, 0 * ones), 15: (1.0, 0 * ones)}
    for t in range(24):
        before = carry
        carry, loss = step(carry, t, *faults.get(t, (1.0, ones)))
        losses.append(float(loss))
        if t in faults:
            jax.tree.map(np.testing.assert_array_equal, carry[0], before[0])
            jax.tree.map(np.testing.assert_array_equal, carry[1].last, before[1].last)
        if t in (12, 15):
            assert carry[1].damping == before[1].damping and carry[1].rejected == before[1].rejected
        if t in (7, 10):
            assert carry[1].rejected == before[1].rejected + 1
    assert all_finite(carry[0]) and np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize("method", ["ekfac per_example", pytest.param("soap", marks=pytest.mark.full)])
def test_an_eigendecomposition_that_fails_costs_that_layer_its_refresh(method, monkeypatch):
    sound = jax.lax.linalg.eigh

    def failing(matrix, **settings):  # of the only layer with three outputs
        return [leaf * jnp.where(matrix.shape[-1] == 3, jnp.nan, 1) for leaf in sound(matrix, **settings)]

    monkeypatch.setattr(jax.lax.linalg, "eigh", failing)
    tx = row(method).scale_by(PROBLEM.layers, damping=0.1)
    x, y, key = batch_of(PROBLEM, 0)

    @jax.jit
    def step(state):
        out = PROBLEM.capture.value_and_grad({"params": START}, x, y, key=key)
        return tx.update(out.grad, state, START, curvature=out.curvature)

    updates, state = step(tx.init(START))
    dates = {name: int(jnp.max(operator.date)) for name, operator in lifted(state).operators.items()}
    assert {date for name, date in dates.items() if name.startswith("Dense_2") and "bias" not in name} == {-1}
    assert dates[next(name for name in dates if name.startswith("Dense_0"))] == 0
    assert lifted(state).metrics.rejected_refreshes >= 1
    assert all_finite((updates, state))


LONG = 10_000


@cache
def long_run(method):
    """State of a tiny layer after 10^4 steps on rows drawn at random, their scale wandering, and those rows."""
    layer, decay = nn.Dense(2), 0.95
    watched = ng.linen.capture(layer, ng.losses.squared_error, labels="true")
    variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
    layers = watched.layers(variables, jnp.ones((4, 3)))
    settings = {"statistics_every": 1, "refresh_every": 1, "damping": 1e-3, "decay": decay}
    tx = row(method).scale_by(layers, **{k: v for k, v in settings.items() if k in settings_of(method)})
    params = variables["params"]

    def step(state, t):
        key = jax.random.fold_in(jax.random.key(1), t)
        x = jax.random.normal(key, (4, 3)) * jnp.exp(3 * jnp.sin(t / 300))
        y = jax.random.normal(jax.random.fold_in(key, 1), (4, 2))
        out = watched.value_and_grad(variables, x, y)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]))
        return state, (x, finite)

    state, (rows, finite) = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(LONG)))(tx.init(params))
    return lifted(state), np.asarray(rows, np.float64), bool(finite.all()), decay


@pytest.mark.full
@pytest.mark.parametrize(
    "method",
    [name if name in ("kfac pi", "ekfac qr pi") else pytest.param(name, marks=pytest.mark.full) for name in ALL_NAMES],
)
def test_ten_thousand_random_steps_lose_nothing(method):
    state, rows, finite, decay = long_run(method)
    assert finite and all_finite(state) and state.count == LONG
    assert state.metrics.rejected_statistics == 0 and getattr(state.metrics, "rejected_refreshes", 0) == 0
    if method == "kfac pi":  # the average is that of float64, and its weight is one
        there = np.concatenate([rows, np.ones((LONG, 4, 1))], -1)
        squares = np.einsum("tni,tnj->tij", there, there) / 4
        weights = (1 - decay) * decay ** np.arange(LONG)[::-1]
        kept = state.statistics["Dense"].inputs
        np.testing.assert_allclose(kept.total / kept.weight, np.tensordot(weights, squares, 1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kept.weight, 1, rtol=1e-4)
    if method == "ekfac qr pi":  # ten thousand turns of a basis leave it one
        basis = state.operators["Dense"].value.basis.inputs
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)


VERY_LONG = 100_000


@pytest.mark.full
@pytest.mark.parametrize("method", ["kfac pi", "ekfac per_example"])
def test_a_hundred_thousand_steps_of_which_one_in_a_hundred_is_faulty_end_where_sound_ones_do(method):
    tx, step = trainer(method)
    draw = np.random.default_rng(0)
    hit, which = draw.uniform(size=VERY_LONG) < 0.01, draw.integers(len(FAULTS), size=VERY_LONG)
    kinds = [{**SOUND, **fault} for fault in FAULTS.values()]
    faulty = {k: np.where(hit, np.array([kind[k] for kind in kinds])[which], SOUND[k]) for k in SOUND}

    @jax.jit
    def run(settings):
        def one(carry, each):
            t, *fault = each
            return step(carry, t, *fault)

        return jax.lax.scan(one, (START, tx.init(START)), (jnp.arange(VERY_LONG), *settings))

    ends = {}
    for name, settings in {"sound": {k: np.full(VERY_LONG, v) for k, v in SOUND.items()}, "faulty": faulty}.items():
        (params, state), losses = run([jnp.asarray(settings[k]) for k in SOUND])
        assert all_finite(params), name
        last = np.asarray(losses)[-1000:]
        ends[name] = float(np.mean(last[~hit[-1000:]])), int(state.total_notfinite)
    print(method, int(hit.sum()), "faults", ends)
    assert ends["sound"][1] == 0 < 100 < ends["faulty"][1]  # three of ten kinds make the gradient itself no number
    assert max(loss for loss, _ in ends.values()) < 1e-3  # a thousandth of the loss at the start
