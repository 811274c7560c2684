"""`diagnose` tells of each layer what a dense eigendecomposition of its block tells, and names what is wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from methods_table import ALL_NAMES, RATE, build, evaluate, settings_of, task

import natgrad_jax as ng
from natgrad_jax.around.clip import ClipState


def after(tx, problem=None, steps=3, **changed):
    """Parameters, updates and state after some steps."""
    problem = problem or task("mlp")
    params = changed.get("params", problem.variables["params"])
    state, updates = tx.init(params), None
    step = jax.jit(lambda params, state, t: _step(problem, tx, params, state, t))
    for t in range(steps):
        updates, state = step(params, state, t)
    return params, updates, state


def _step(problem, tx, params, state, t):
    out = evaluate(problem, params, t)
    return tx.update(out.grad, state, params, curvature=out.curvature)


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL_NAMES)
def test_every_state_has_a_table_and_the_same_as_numbers(method):
    every = {k: v for k, v in {"statistics_every": 1, "refresh_every": 1}.items() if k in settings_of(method)}
    params, updates, state = after(optax.chain(optax.identity(), build(method, **every)))
    found = ng.diagnose(state, task("mlp").layers, params=params, updates=updates)
    table = str(found)
    assert all(isinstance(number, float) for number in found.values())
    assert found.cause == ""
    for name, cause in found.causes.items():
        assert name in table and cause in table
        assert found[f"{name}/age"] == 0 and found[f"{name}/rejected"] == 0
    steps = [number for name, number in found.items() if name.endswith("/step")]
    assert len(steps) >= 3 and min(steps) > 0  # biases that start at zero have none
    assert found["count"] == 3 and "damping" in table


@pytest.mark.full
def test_eigenvalues_are_those_of_the_kronecker_product():
    _, _, state = after(ng.scale_by_kfac(task("mlp").layers, damping=0.03, statistics_every=1))
    found = ng.diagnose(state, task("mlp").layers)
    pair = state.statistics["Dense_1"]
    a, g = (np.asarray(side.total / side.weight, np.float64) for side in pair)
    block = np.linalg.eigvalsh(np.kron(a, g))
    np.testing.assert_allclose(found["Dense_1/largest"], block[-1], rtol=1e-5)
    np.testing.assert_allclose(found["Dense_1/smallest"], max(block[0], 0), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found["Dense_1/damping_share"], 0.03 / (0.03 + block.mean()), rtol=1e-5)
    np.testing.assert_allclose(found["Dense_1/condition"], (block[-1] + 0.03) / (max(block[0], 0) + 0.03), rtol=1e-5)


@pytest.mark.full
def test_ages_and_weights_follow_the_schedule():
    tx = ng.scale_by_kfac(task("mlp").layers, damping=0.1, decay=0.5, refresh_every=4, early_refresh=False)
    _, _, state = after(tx, steps=3)
    found = ng.diagnose(state, task("mlp").layers)
    assert found["Dense_0/age"] == 2
    every = 1 - 0.5 ** found["statistics"]
    np.testing.assert_allclose(found["Dense_0/weight"], every)


class Dead(nn.Module):
    """A layer behind which every unit is off."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(4, name="dead", bias_init=nn.initializers.constant(-1e3))(x)))


def _problem(model, x):
    variables = model.init(jax.random.key(0), x[0])
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)
    plain = task("mlp")
    layers = capture.layers(variables, x[0])
    return plain._replace(capture=capture, variables=variables, layers=layers, x=x)


def diagnosis_of(problem):
    """What is said of a problem, by its parameters, inputs, damping, factor of its step, what is around its state."""

    def optimizer(damping):
        return ng.scale_by_kfac(problem.layers, damping=damping, statistics_every=1, refresh_every=1)

    @jax.jit
    def step(params, state, x, damping):
        return _step(problem._replace(x=x), optimizer(damping), params, state, 0)

    def found(params=problem.params, x=problem.x, damping=0.1, factor=1e-2, around=_bare, box=_bare, steps=3):
        state = optimizer(damping).init(params)
        for _ in range(steps):
            updates, state = step(params, state, x, jnp.float32(damping))
        given = {}
        if steps and factor is not None:
            updates = jax.tree.map(lambda leaf: np.float32(factor) * leaf, jax.device_get(updates))
            given = {"params": box(params), "updates": box(updates)}
        return ng.diagnose(box(around(state)), problem.layers, **given)

    return found


def _bare(tree):
    return tree


@pytest.fixture(scope="module")
def diagnosed():
    """One compiled step for all that is wrong."""
    return diagnosis_of(task("mlp"))


def test_what_is_wrong_with_a_layer_is_named(diagnosed):
    plain = task("mlp")
    assert set(diagnosed().causes.values()) == {""}
    dead = diagnosis_of(_problem(Dead(), plain.x))()
    assert "no gradient reaches it" in dead.causes["dead"] and dead.causes["head"] == dead.cause == ""
    assert diagnosed(damping=1e4).causes["Dense_0"].endswith("as in gradient descent: lower it")
    params, x = plain.params, np.asarray(plain.x)
    small = {**params["Dense_0"], "kernel": params["Dense_0"]["kernel"] / 1e12}
    assert "are huge" in diagnosed({**params, "Dense_0": small}, 1e12 * x, 1e8).causes["Dense_0"]
    assert "longer than its parameters" in diagnosed(factor=1e3).causes["Dense_2"]
    assert "nothing was observed yet" in diagnosed(steps=0).causes["Dense_0"]


def _within(damping, state):
    """The state of steps of the quadratic model, or that choose themselves, with a direction that has seen batches."""
    layers, params = task("mlp").layers, task("mlp").params
    if damping is None:
        return ng.kfac(layers=layers).init(params)._replace(direction=state)
    around = ng.kfac("quadratic", layers, damping=damping, momentum=None).init(params)
    adapts = float(not isinstance(damping, float))  # what the first batch leaves there
    return around._replace(direction=state, bounds=around.bounds._replace(first=jnp.float32(adapts)))


_MOVES = ("raise `damping`", "lower it")


@pytest.mark.parametrize(
    ("damping", "more", "less"),
    [
        (0.1, *_MOVES),
        (
            ng.adaptive_damping(),
            "raise `damping`; it adapts itself, and `adaptive_damping(least=...)` raises it",
            "lower it; it adapts itself, and `adaptive_damping(most=...)` lowers it",
        ),
        (None, *(f"{said}; without a setting the steps adapt it, and `damping=` fixes it" for said in _MOVES)),
    ],
    ids=["given", "adaptive", "automatic"],
)
def test_a_damping_is_changed_where_it_is_set(diagnosed, damping, more, less):
    around = partial(_within, damping)
    narrow = task("mlp").x * np.float32([1, *[1e-5] * 4])
    said = diagnosed(x=narrow, damping=1e-12, around=around).causes["Dense_0"]
    assert said == f"float32 cannot tell its small eigenvalues from zero: {more}"
    assert diagnosed(damping=1e4, around=around).causes["Dense_0"].endswith(f"as in gradient descent: {less}")


def _saturated():
    params = task("mlp").params
    return {"params": {**params, "Dense_2": {**params["Dense_2"], "bias": jnp.float32([1e4, 0, 0])}}}


def _one_nan(tree):
    """The tree with a NaN in the last layer."""
    return {**tree, "Dense_2": jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), tree["Dense_2"])}


def _of_nan():
    return {"params": _one_nan(task("mlp").params)}


def _from_nan():
    return {"x": task("mlp").x.at[:, 0].set(jnp.nan), "factor": None}


def _clipped(factor):
    return lambda state: ClipState(state.count, jnp.float32(factor), state)


def _momentum(of):
    return lambda state: (state, optax.TraceState(of(jax.tree.map(jnp.zeros_like, task("mlp").params))))


WHOLE = {
    "saturated outputs": (_saturated, "all curvature is zero", "Dense_0 Dense_1 Dense_2"),
    "parameters": (_of_nan, "not finite: `params` (Dense_2/bias and 1", "Dense_2"),
    "updates": (lambda: {"factor": np.inf}, "not finite: `updates` (Dense_0/bias and 5 more). Restart", "Dense_0"),
    "momentum": (lambda: {"around": _momentum(_one_nan)}, "not finite: `state` (1/trace/Dense_2/bias and 1 more)", ""),
    "finite momentum": (lambda: {"around": _momentum(_bare)}, "", ""),
    "an input": (_from_nan, "9 times the statistics of a layer", "Dense_0 Dense_1 Dense_2"),
    "a clip that holds": (
        lambda: {"around": _clipped(3e-4)},
        "`kl_clip` shortens the steps to 0.0003 of their length",
        "",
    ),
    "a clip of good runs": (lambda: {"around": _clipped(5e-3)}, "", ""),
    "no ratio yet": (lambda: {"around": partial(_within, ng.adaptive_damping())}, "", ""),
    "nothing": (dict, "", ""),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("box", [_bare, lambda tree: jax.tree.map(nnx.Param, tree)], ids=["arrays", "Variables"])
def test_what_is_wrong_with_the_whole_is_named(diagnosed, kind, box):
    changed, cause, layers = WHOLE[kind]
    found = diagnosed(**changed(), box=box)
    assert found.cause.startswith(cause) and (cause or not found.cause)
    assert str(found).splitlines()[-1].endswith(found.cause)
    assert set(layers.split()) <= {name for name, said in found.causes.items() if said}
    assert layers or not any(found.causes.values())


@pytest.mark.full
@pytest.mark.parametrize("drops", [False, True], ids=["chain", "apply_if_finite"])
def test_real_runs_that_went_wrong_are_told_of_within_wrappers(drops):
    plain = task("mlp")

    def around(tx):
        return optax.apply_if_finite(tx, 3) if drops else optax.chain(optax.identity(), tx)

    def run(bad=None, steps=6, **settings):
        tx = around(ng.ekfac(layers=plain.layers, **{"learning_rate": 0.1, "damping": 0.1} | settings))
        step = jax.jit(lambda params, state, x, key: _moved(tx, params, state, x, key))
        params = plain.params
        state = tx.init(params)
        for t in range(steps):
            x = plain.x.at[0, 0].set(jnp.nan) if t == bad else plain.x
            updates, params, state = step(params, state, x, jax.random.key(t))
        return ng.diagnose(state, plain.layers, params=params, updates=updates)

    def _moved(tx, params, state, x, key):
        out = plain.evaluate(params, x[0], plain.y[0], key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return updates, optax.apply_updates(params, updates), state

    assert run().cause == ""
    assert run(kl_clip=1e-10).cause.startswith("`kl_clip` shortens")
    long = run(learning_rate=1e4, damping=1e-6, kl_clip=None, refresh_every=1, statistics_every=1)
    assert long.cause.startswith("all curvature is zero") and all(long.causes.values())
    poisoned = run(bad=1)
    if drops:
        assert poisoned.cause == ""
    else:
        assert poisoned.cause.startswith("not finite: `params`") and "`state` (1/" in poisoned.cause
        assert all(poisoned.causes.values())


@pytest.mark.full
def test_a_layer_whose_refresh_was_not_finite_is_told():
    plain = task("mlp")
    tx = ng.scale_by_kfac(plain.layers, damping=0.1, statistics_every=1, refresh_every=1)
    params, _, state = after(tx)
    indefinite = state.statistics["Dense_0"]
    indefinite = indefinite._replace(inputs=indefinite.inputs._replace(total=-100 * jnp.eye(6)))
    state = state._replace(statistics={**state.statistics, "Dense_0": indefinite})
    _, state = jax.jit(lambda state: _step(plain, tx, params, state, 0))(state)
    found = ng.diagnose(state, plain.layers)
    assert found["Dense_0/rejected"] == 1 and found["Dense_0/age"] == 1 and found["Dense_1/rejected"] == 0
    assert "an older one serves" in found.causes["Dense_0"]
    assert found["rejected_refreshes"] == 1


def test_layers_that_take_turns_are_not_told_of_as_not_finite():
    layers = task("mlp").layers
    tx = ng.scale_by_kfac(layers, damping=0.1, rolling=True, statistics_every=1, refresh_every=6, early_refresh=False)
    found = ng.diagnose(after(tx)[2], layers)
    assert {found[f"{name}/age"] for name in layers} == {0, 2} and not any(found[f"{name}/rejected"] for name in layers)


@pytest.mark.full
def test_a_controlled_step_has_its_own_numbers():
    tx = ng.kfac("quadratic", task("mlp").layers, momentum="quadratic", damping=ng.adaptive_damping())
    _, _, state = after(tx)
    found = ng.diagnose(state, task("mlp").layers)
    assert found["learning_rate"] == state.learning_rate and found["rejected_steps"] == state.rejected


def test_a_state_that_is_not_ours_is_refused():
    with pytest.raises(ValueError, match="has no state of natgrad_jax in it"):
        ng.diagnose(optax.adam(RATE).init(task("mlp").variables["params"]), task("mlp").layers)
