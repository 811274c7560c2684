"""Changes of the loss below its own rounding: read from slopes, so that a damping neither runs away nor freezes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import natgrad_jax as ng
from natgrad_jax.around import control

N = 64
LOSS = ng.losses.squared_error


def predict(params, x):
    return x @ params["w"] + params["b"]


@jax.custom_vjp
def unchanged(y):
    return y


unchanged.defvjp(lambda y: (y, None), lambda _, g: (g,))


def by_reverse_rule(params, x):
    return unchanged(predict(params, x))


@pytest.fixture(scope="module")
def data():
    """The best parameters of a line but for 5e-5; inputs, and targets around 100, of which it leaves a hundredth."""
    random = np.random.default_rng(0)
    x = random.normal(size=(N, 3))
    y = x @ random.normal(size=(3, 1)) + 100 + 0.01 * random.normal(size=(N, 1))
    best = fitted(x, y)
    params = {"w": best[:3] + 5e-5 * random.normal(size=(3, 1)), "b": best[3]}
    return tuple(jax.tree.map(np.float32, part) for part in (params, x, y))


def fitted(x, y):
    """The least squares, in double precision: slopes and intercept [4, 1]."""
    return np.linalg.lstsq(np.concatenate([x, np.ones((N, 1))], 1).astype(float), y.astype(float), rcond=None)[0]


def half_mean_square(params, x, y):
    """The objective, by numpy in double precision."""
    params, x, y = jax.tree.map(np.float64, (params, x, y))
    return np.mean((predict(params, x) - y) ** 2) / 2


def evaluated(capture, params, x, y):
    return capture.value_and_grad(params, x, y, key=jax.random.key(0))


def test_the_ratio_of_a_change_that_the_loss_cannot_resolve_is_that_of_double_precision(data):
    params, x, y = data
    capture = ng.capture(predict, LOSS, labels="exact")
    tx = ng.kfac("quadratic", capture.layers(params, x), damping=ng.adaptive_damping(1e-3))

    @jax.jit
    def step(params, state):
        out = evaluated(capture, params, x, y)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        there = optax.apply_updates(params, updates)
        return there, state, out.curvature.value(there) - out.value

    there, state, by_values = step(params, tx.init(params))
    change = half_mean_square(there, x, y) - half_mean_square(params, x, y)
    assert change < 0  # the step is a good one
    assert abs(by_values - change) > 0.3 * abs(change)  # the loss in single precision hardly knows
    np.testing.assert_allclose(state.ratio, 1, atol=0.05)  # a quadratic loss is its own model
    assert not state.rejected
    assert state.damping == pytest.approx(0.5e-3)


def test_no_step_of_a_training_to_the_floor_of_the_precision_freezes_it(data):
    params, x, y = data
    capture = ng.capture(predict, LOSS, labels="exact")
    tx = ng.kfac("quadratic", capture.layers(params, x), damping=ng.adaptive_damping(1e-3, every=1))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            out = evaluated(capture, params, x, y)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), state.damping

        return jax.lax.scan(step, (params, tx.init(params)), None, 200)

    (there, _), dampings = train(params)
    best = fitted(x, y)
    least, first = half_mean_square({"w": best[:3], "b": best[3]}, x, y), half_mean_square(params, x, y)
    assert half_mean_square(there, x, y) - least < 1e-3 * (first - least)
    assert dampings.max() < 10  # the curvature is 1; by values alone it is 40


class Known:
    """A curvature whose loss is 1, and changes by so much along a step whose slope at its end is so much."""

    def __init__(self, change, slope):
        self.change, self.slope = change, slope

    def value(self, params=None):
        return jnp.float32(1.0 if params is None else 1.0 + self.change)

    def value_and_slope(self, params, direction):
        return self.value(params), jnp.float32(self.slope)


@pytest.mark.parametrize(
    ("change", "foretold", "slope", "ratio", "taken"),
    [
        (0.0, 0.0, 0.0, 0.5, True),  # at the floor: neither
        (2e-7, -1e-12, 1e-12, 0.5, True),
        (2e-7, -1e-7, 0.0, 0.5, True),  # below half of the digits: by the slopes, -1e-7 at the start
        (-1e-4, -1e-7, 3e-7, -1.0, False),
        (2e-2, -1e-7, -1e-7, -2e5, False),  # by the values
        (-2e-2, -1e-2, 1.0, 2.0, True),
    ],
)
def test_a_small_change_is_read_from_slopes_and_a_large_one_from_values(change, foretold, slope, ratio, taken):
    model = control.Model(jnp.array([foretold, 0.0]), jnp.zeros((2, 2)), jnp.eye(2))
    zeros = {"w": jnp.zeros(1)}
    found, kept = control._tested(Known(change, slope), zeros, jnp.array([1.0, 0.0]), None, model, zeros)
    np.testing.assert_allclose(found, ratio, rtol=1e-4)
    assert kept == taken


WAYS = {
    "plain": lambda: ng.capture(predict, LOSS),
    "a reverse rule alone": lambda: ng.capture(by_reverse_rule, LOSS),
    "microbatches": lambda: ng.capture(predict, LOSS, microbatches=4),
    "examples": lambda: ng.capture(predict, LOSS, jacobian="examples"),
}


def slope_of(capture, params, direction, x, y):
    return evaluated(capture, params, x, y).curvature.value_and_slope(params, direction)


def expected_slope(params, direction, x, y):
    return jax.jvp(lambda params: jnp.mean((predict(params, x) - y) ** 2) / 2, (params,), (direction,))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
def test_the_slope_of_a_curvature_is_the_derivative_of_the_loss(data, way):
    params, x, y = jax.tree.map(np.float64, data)
    direction = {"w": np.ones((3, 1)), "b": np.full(1, -2.0)}
    found = jax.jit(partial(slope_of, WAYS[way]()))(params, direction, x, y)
    np.testing.assert_allclose(found, expected_slope(params, direction, x, y), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_slope_of_terms_is_their_weighted_sum(data):
    params, x, y = jax.tree.map(np.float64, data)
    direction = {"w": np.ones((3, 1)), "b": np.full(1, -2.0)}
    terms = ng.terms({name: ng.capture(predict, LOSS) for name in ("one", "other")}, weights={"other": 3.0})
    parts = {"one": x[:10], "other": x[10:]}, {"one": y[:10], "other": y[10:]}
    found = jax.jit(partial(slope_of, terms))(params, direction, *parts)
    one, other = (np.array(expected_slope(params, direction, parts[0][name], parts[1][name])) for name in parts[0])
    np.testing.assert_allclose(found, one + 3 * other, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["replicas", "explicit"])
def test_the_slope_on_a_mesh_is_that_of_the_whole_batch(data, kind):
    params, x, y = jax.tree.map(jnp.float64, data)
    direction = {"w": jnp.ones((3, 1)), "b": jnp.full(1, -2.0)}
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))
    if kind == "replicas":
        capture, rows = ng.capture(predict, LOSS, axis_name="batch"), PartitionSpec("batch")
        mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
        cut = (PartitionSpec(), PartitionSpec(), rows, rows)
        asked = jax.jit(jax.shard_map(partial(slope_of, capture), mesh=mesh, in_specs=cut, out_specs=PartitionSpec()))
        found = asked(params, direction, x, y)
    else:
        with jax.set_mesh(mesh):
            found = jax.jit(partial(slope_of, ng.capture(predict, LOSS)))(params, direction, x, y)
    np.testing.assert_allclose(found, expected_slope(params, direction, x, y), rtol=1e-12)
