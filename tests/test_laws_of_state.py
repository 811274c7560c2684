"""Laws of what goes in and out of every method: types, settings, counters, warm starts, guards; with controls."""

import chex
import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
import tasks
from methods_table import build, direction, measured, scanned, start, wrapped
from sklearn.datasets import load_digits
from tasks import task
from test_laws import (
    ANY,
    blockwise,
    fails,
    few_optimizers,
    lifting_method,
    on_one_layer,
)

import natgrad_jax as ng

both_frameworks = tasks.both_frameworks
pytestmark = pytest.mark.whole


def abstract_update(where, tx, **extra):
    """Shapes of the updates and of the new state, for the gradient and evidence of a problem."""
    gradient, evidence = measured(where)
    state = jax.eval_shape(tx.init, task(where).params)
    return state, *jax.eval_shape(lambda g, s, e: tx.update(g, s, curvature=e, **extra), gradient, state, evidence)


# --- types ------------------------------------------------------------------------------------------------------------


def keeps_types(where, tx):
    """The state keeps structure, shapes and dtypes; factors are float32; updates have the dtype of the parameters."""
    before, updates, after = abstract_update(where, tx)
    assert table.shapes(before) == table.shapes(after)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(after))
    assert table.shapes(updates) == table.shapes(task(where).params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    ["mlp", "mlp bfloat16", *(pytest.param(n, marks=pytest.mark.full) for n in ("convnet", "convnet bfloat16"))],
)
@lifting_method
def test_an_update_changes_no_shape_and_no_dtype(method, where):
    keeps_types(where, direction(method, where))


@pytest.mark.parametrize("what", ["state", "updates"])
def test_half_precision_in_the_state_or_double_in_the_updates_fails_the_law_of_types(what):
    def update(inner, updates, state, params, **extra):
        found, state = inner(updates, state, params, **extra)
        if what == "state":
            return found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found), state

    fails(keeps_types, "mlp bfloat16", wrapped(direction(ANY, "mlp bfloat16"), update))


@pytest.mark.slow
@lifting_method
def test_a_bfloat16_model_is_met_by_finite_directions_of_descent(method):
    gradient, evidence = measured("mlp bfloat16")
    tx = direction(method, "mlp bfloat16")
    updates, _ = jax.jit(tx.update)(gradient, tx.init(gradient), curvature=evidence)
    assert jnp.all(blockwise(task("mlp bfloat16"), gradient, updates) > 0)


# --- the contract -----------------------------------------------------------------------------------------------------


def swallows_unknown_keywords(tx):
    abstract_update("mlp", tx, value=0.0, some_other_argument="ignored")


def needs_no_parameters(tx):
    abstract_update("mlp", tx)
    abstract_update("mlp", tx, params=None)


@lifting_method
def test_an_unknown_keyword_is_swallowed(method):
    swallows_unknown_keywords(direction(method))


def test_a_strict_signature_fails_the_law_of_keywords():
    def update(inner, updates, state, params, curvature):
        return inner(updates, state, params, curvature=curvature)

    fails(swallows_unknown_keywords, wrapped(direction(ANY), update))


@pytest.mark.slow
@lifting_method
def test_parameters_are_not_needed(method):
    needs_no_parameters(direction(method))


def test_weight_decay_inside_fails_the_law_of_parameters():
    fails(needs_no_parameters, optax.chain(direction(ANY), optax.add_decayed_weights(0.1)))


def names_the_missing_layer(tx):
    gradient, evidence = measured("mlp")
    some = {name: one for name, one in evidence.items() if name != "Dense_1"}
    for curvature in (some, lambda: some):
        with pytest.raises(ValueError, match=r"(?s)no evidence for.*'Dense_1'.*it has.*'Dense_0'.*'Dense_2'"):
            jax.eval_shape(lambda gradient, c=curvature: tx.update(gradient, tx.init(gradient), curvature=c), gradient)


@lifting_method
def test_a_layer_without_evidence_is_named(method):
    names_the_missing_layer(direction(method))


def test_filling_in_for_a_missing_layer_fails_the_law_of_names():
    def update(inner, updates, state, params, curvature=None, **extra):
        return inner(updates, state, params, curvature=measured("mlp")[1], **extra)

    with pytest.raises(pytest.fail.Exception):
        names_the_missing_layer(wrapped(direction(ANY), update))


# --- training ---------------------------------------------------------------------------------------------------------


@tasks.kept
def digits():
    """The digits that scikit-learn ships, five batches of 300, and an MLP 64-32-10."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x[:1500] / 16, jnp.float32).reshape(5, 300, 64), jnp.asarray(y[:1500]).reshape(5, 300)
    return tasks.watched(tasks.MLP(width=32, hidden=1, outputs=10), x, y, jax.random.key(0))


@tasks.kept
def learning(method, **more):
    """Fifteen steps on the digits: losses, at a learning rate that is traced, so that the control compiles nothing."""
    problem, row = digits(), table.row(method)
    settings = {"kl_clip": None, "refresh_every": 5, "statistics_every": 1} | row.learning

    @jax.jit
    def run(params, rate):
        tx = row.optimizer(layers=problem.layers, **settings | {"learning_rate": rate} | more)

        def train(carry, t):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), t)
            out = problem.evaluate(params, problem.x[t % 5], problem.y[t % 5], key=key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), out.value

        return jax.lax.scan(train, (params, tx.init(params)), jnp.arange(15))[1]

    return run


def learns(method, rate, **more):
    """Three passes over 1,500 real digits bring the loss below a third of where it started."""
    losses = learning(method, **more)(digits().params, rate)
    assert losses[-1] < losses[0] / 3


@pytest.mark.slow
@few_optimizers
def test_the_loss_falls_on_real_digits(method):
    learns(method, table.row(method).learning["learning_rate"])


@pytest.mark.slow
def test_a_learning_rate_of_nearly_zero_does_not_learn():
    fails(learns, ANY, 1e-4)


# --- settings ---------------------------------------------------------------------------------------------------------


def equals_its_constants(tx, method):
    """Settings given as schedules of a constant value give the steps that the constants give."""
    (params, state), _ = scanned("dense", tx)
    (expected, expected_state), _ = scanned("dense", direction(method, "dense"))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(state.metrics, expected_state.metrics)


@pytest.mark.slow
@few_optimizers
def test_constant_schedules_and_traced_periods_equal_numbers(method):
    periods = {name: jnp.int32(table.SETTINGS[name]) for name in ("statistics_every", "refresh_every")}
    constants = {name: lambda count, name=name: table.SETTINGS[name] for name in ("damping", "decay")}
    equals_its_constants(build(method, "dense", **constants, **periods), method)


@pytest.mark.slow
def test_a_schedule_of_another_value_fails_the_law_of_constants():
    fails(equals_its_constants, build(ANY, "dense", decay=optax.linear_schedule(0.9, 0.5, 10)), ANY)


def follows_its_schedule(tx, schedule):
    _, record = scanned("dense", tx)
    np.testing.assert_allclose(record.metrics.damping, schedule(jnp.arange(10)), rtol=1e-6)


@pytest.mark.slow
def test_the_damping_of_each_step_is_that_of_its_schedule():
    schedule = optax.exponential_decay(0.1, 1, 0.7)
    follows_its_schedule(build(ANY, "dense", damping=schedule), schedule)


@pytest.mark.slow
def test_a_schedule_read_once_fails_the_law_of_schedules():
    schedule = optax.exponential_decay(0.1, 1, 0.7)
    fails(follows_its_schedule, build(ANY, "dense", damping=lambda count: schedule(0)), schedule)


# --- counters (C17) ---------------------------------------------------------------------------------------------------


def expected_steps(steps, statistics, refresh, rescale, early):
    """The steps of statistics, refreshes and rescalings, by the rule in words."""
    observed = [t for t in range(steps) if t % statistics == 0]
    refreshed = [t for t in range(steps) if t % refresh == 0 or (early and t < refresh and t in observed)]
    return observed, refreshed, [t for t in range(steps) if t % rescale == 0 or t in refreshed]


def keeps_its_calendar(method, early, wrap=lambda tx: tx):
    """Statistics, refreshes and rescalings fall on exactly the steps that the periods name; periods may be traced."""
    problem, rescales = task("dense"), table.row(method).rescales

    @jax.jit
    def run(statistics, refresh, rescale):
        periods = {"statistics_every": statistics, "refresh_every": refresh, "early_refresh": early}
        tx = wrap(build(method, "dense", **periods, **({"rescale_every": rescale} if rescales else {})))

        def one(carry, t):
            (params, state), record = table.step(problem, tx, carry, t)
            scale = jax.tree.leaves(list(state.operators.values())[-1].value.scale)[0] if rescales else jnp.zeros(())
            return (params, state), (record.metrics.statistics, record.metrics.refreshes, scale)

        return jax.lax.scan(one, start(problem, tx), jnp.arange(14))[1]

    for periods in ((3, 6, 4), (2, 5, 1)):
        if not table.row(method).apart:
            periods = (periods[1], *periods[1:])
        statistics, refreshes, scale = run(*map(jnp.int32, periods))
        observed, refreshed, rescaled = expected_steps(14, *periods, early)
        assert [t for t in range(14) if np.diff(statistics, prepend=0)[t]] == observed
        assert [t for t in range(14) if np.diff(refreshes, prepend=0)[t]] == refreshed
        moved = np.any(np.diff(scale, axis=0, prepend=0), axis=tuple(range(1, scale.ndim)))
        assert not rescales or [t for t in range(14) if moved[t]] == rescaled


@pytest.mark.slow
@pytest.mark.parametrize("early", [pytest.param(False, marks=pytest.mark.full), True])
@lifting_method
def test_everything_happens_at_its_step(method, early):
    keeps_its_calendar(method, early)


@pytest.mark.slow
def test_a_count_that_starts_late_fails_the_law_of_the_calendar():
    def init(inner, params):
        return inner(params)._replace(count=jnp.int32(1))

    fails(keeps_its_calendar, ANY, False, lambda tx: wrapped(tx, init=init))


# --- warm start -------------------------------------------------------------------------------------------------------


def starts_with_the_mean(warm_start, tx, where="mlp"):
    """After a pass, the statistics are the mean of what the batches say one by one, and nothing else has moved."""
    params = task(where).params
    stream = [measured(where, t)[1] for t in range(3)]
    state = warm_start(tx, tx.init(params), stream, params)
    singles = [warm_start(tx, tx.init(params), [evidence], params).statistics for evidence in stream]
    chex.assert_trees_all_close(state.statistics, jax.tree.map(lambda *x: sum(x) / 3, *singles), rtol=1e-5, atol=1e-7)
    assert state.count == 0
    assert any(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.statistics, singles[0])), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [row.name for row in table.METHODS + table.COMPLETE if row.averages])
def test_a_warm_start_is_the_running_mean_of_the_pass(method):
    starts_with_the_mean(ng.warm_start, direction(method))


@pytest.mark.slow
def test_a_moving_average_instead_of_the_running_mean_fails_the_law_of_the_warm_start():
    def moving(tx, state, stream, params):
        update = jax.jit(lambda state, evidence: tx.update(params, state, curvature=evidence)[1])
        for evidence in stream:
            state = update(state._replace(count=jnp.int32(1)), evidence)
        return state._replace(count=jnp.int32(0))

    fails(starts_with_the_mean, moving, direction(ANY, "dense", statistics_every=1, refresh_every=100), "dense")


@pytest.mark.slow
def test_a_warm_start_inside_a_chain_moves_no_other_state():
    params = task("mlp").params
    tx = optax.chain(optax.trace(0.9), direction(ANY), optax.scale_by_schedule(lambda count: 0.1), optax.ema(0.9))
    cold = tx.init(params)
    warm = ng.warm_start(tx, cold, [measured("mlp", t)[1] for t in range(2)], params)
    assert jax.tree.structure(warm) == jax.tree.structure(cold)
    chex.assert_trees_all_equal([*warm[:1], *warm[2:]], [*cold[:1], *cold[2:]])
    assert warm[1].metrics.statistics == 2
    alone = ng.warm_start(
        direction(ANY), direction(ANY).init(params), [measured("mlp", t)[1] for t in range(2)], params
    )
    chex.assert_trees_all_equal(warm[1], alone)


# --- guards -----------------------------------------------------------------------------------------------------------


def poison(tree):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tree)


def copies_in(state):
    """How many copies the statistics of a layer are of: each has a number of its own, the weight of an average say."""
    return min((leaf.size for leaf in jax.tree.leaves(state)), default=0)


def survives_poison(where, tx):
    """A batch that is not finite leaves what was learned as it was, and is counted; the next step is fine."""
    gradient, evidence = measured(where)
    update = jax.jit(tx.update)
    _, good = update(gradient, tx.init(gradient), curvature=evidence)
    copies = sum(copies_in(state) for state in good.statistics.values())
    for bad_gradient in (gradient, poison(gradient)):
        _, bad = update(bad_gradient, good, curvature=poison(evidence))
        chex.assert_trees_all_close(table.contents(bad), table.contents(good), rtol=1e-4, atol=1e-6)
        assert bad.metrics.rejected_statistics - good.metrics.rejected_statistics == copies
        assert bad.metrics.statistics == good.metrics.statistics + 1
    updates, after = update(gradient, bad, curvature=evidence)
    assert jnp.all(blockwise(task(where), gradient, updates) > 0)
    assert after.metrics.rejected_statistics == bad.metrics.rejected_statistics


@pytest.mark.slow
@on_one_layer
@lifting_method
def test_a_batch_that_is_not_finite_leaves_the_previous_factors_and_is_counted(method, where):
    survives_poison(where, direction(method, where, statistics_every=1, refresh_every=1))


@pytest.mark.slow
def test_a_method_without_a_guard_does_not_survive():
    def update(inner, updates, state, params, curvature=None, **extra):
        found, state = inner(updates, state, params, curvature=curvature, **extra)
        seen = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(curvature))
        return found, state._replace(statistics=jax.tree.map(lambda leaf: leaf + 0 * seen, state.statistics))

    fails(survives_poison, "dense", wrapped(direction(ANY, "dense", statistics_every=1, refresh_every=1), update))


def guards_layer_by_layer(tx):
    gradient, evidence = measured("mlp")
    update = jax.jit(tx.update)
    _, one = update(gradient, tx.init(gradient), curvature=evidence)
    _, other = update(gradient, tx.init(gradient), curvature={**evidence, "Dense_1": poison(evidence["Dense_1"])})
    assert other.metrics.rejected_statistics == 1
    ours, theirs = ((state.statistics["Dense_0"], state.operators["Dense_0"]) for state in (other, one))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_bad_layer_does_not_keep_the_others_from_learning():
    guards_layer_by_layer(direction(ANY))
