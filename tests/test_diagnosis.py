"""`diagnose` tells of each layer what a dense eigendecomposition of its block tells, and names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from methods_table import ALL_NAMES, RATE, build, evaluate, settings_of, task

import natgrad_jax as ng


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


def causes_of(problem):
    """What is wrong with the layers of a problem, by its parameters, inputs, damping and factor of the step."""

    def optimizer(damping):
        return ng.scale_by_kfac(problem.layers, damping=damping, statistics_every=1, refresh_every=1)

    @jax.jit
    def step(params, state, x, damping):
        return _step(problem._replace(x=x), optimizer(damping), params, state, 0)

    def found(params=problem.params, x=problem.x, damping=0.1, factor=1.0, around=lambda state: state):
        state = optimizer(damping).init(params)
        for _ in range(3):
            updates, state = step(params, state, x, jnp.float32(damping))
        updates = jax.tree.map(lambda leaf: np.float32(factor) * leaf, jax.device_get(updates))
        return ng.diagnose(around(state), problem.layers, params=params, updates=updates).causes

    return found


def test_what_is_wrong_is_named():
    plain = task("mlp")
    causes = causes_of(plain)
    assert causes(factor=1e-2)["Dense_0"] == ""
    assert "no gradient reaches it" in causes_of(_problem(Dead(), plain.x))()["dead"]
    assert causes(damping=1e4)["Dense_0"].endswith("as in gradient descent: lower it")
    automatic = ng.kfac(layers=plain.layers).init(plain.params)
    adapting = causes(damping=1e4, around=lambda state: automatic._replace(direction=state))
    assert adapting["Dense_0"].endswith("lower it; without a setting the steps adapt it, and `damping=` fixes it")
    params, x = plain.params, np.asarray(plain.x)
    small = {**params["Dense_0"], "kernel": params["Dense_0"]["kernel"] / 1e12}
    assert "are huge" in causes({**params, "Dense_0": small}, 1e12 * x, 1e8)["Dense_0"]
    assert "float32 cannot tell" in causes(x=x * np.float32([1, *[1e-5] * 4]), damping=1e-12)["Dense_0"]
    assert "longer than its parameters" in causes(factor=1e3)["Dense_2"]
    state = ng.scale_by_kfac(plain.layers, damping=0.1).init(params)
    assert "nothing was observed yet" in ng.diagnose(state, plain.layers).causes["Dense_0"]


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
