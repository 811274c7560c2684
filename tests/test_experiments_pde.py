"""The differential equations of the experiments have their solutions, and are a task."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pde

EXACT = {
    "poisson 2d": lambda x: jnp.prod(jnp.sin(jnp.pi * x)),
    "poisson 5d": lambda x: jnp.sum(jnp.cos(jnp.pi * x)),
    "heat 4+1d": lambda x: jnp.exp(-x[0]) * jnp.sum(jnp.sin(2 * x[1:])),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", EXACT)
def test_the_residual_of_a_solution_is_zero_and_the_solution_is_that_of_the_table(name):
    equation = pde.EQUATIONS[name]
    points = np.random.default_rng(0).uniform(equation.low, equation.high, (5, len(equation.low)))

    def residuals(function):
        return jax.vmap(lambda x: equation.residual(function, x))(jnp.asarray(points))

    np.testing.assert_allclose(residuals(EXACT[name]), 0, atol=1e-10)
    np.testing.assert_allclose(equation.solution(points), jax.vmap(EXACT[name])(points), rtol=1e-12)
    assert np.max(np.abs(residuals(lambda x: EXACT[name](0.9 * x)))) > 0.1


def test_the_solution_of_burgers_satisfies_its_equation_and_begins_as_a_sine():
    where, step = np.array([[0.2, 0.3], [0.5, -0.6], [0.9, 0.8]]), 1e-4
    time, place = np.array([[step, 0]]), np.array([[0, step]])

    def u(x):
        return pde.cole_hopf(x, nodes=200)

    slope = (u(where + place) - u(where - place)) / (2 * step)
    bent = (u(where + place) - 2 * u(where) + u(where - place)) / step**2
    change = (u(where + time) - u(where - time)) / (2 * step)
    np.testing.assert_allclose(change + u(where) * slope - pde.VISCOSITY * bent, 0, atol=1e-4)
    assert np.max(np.abs(change + u(where) * slope)) > 1e-4 or np.max(np.abs(bent)) < 1
    x = np.linspace(-1, 1, 7)
    np.testing.assert_allclose(u(np.stack([0 * x, x], axis=1)), -np.sin(np.pi * x), atol=1e-4)


def test_half_of_the_points_lie_near_a_thin_layer_and_the_rest_anywhere():
    equation = pde.EQUATIONS["burgers 1+1d"]
    inside = np.asarray(pde.points(equation, 0)[0]["inside"])
    near = np.abs(inside[:, 1]) < 0.1
    assert 0.4 < np.mean(near) < 0.6  # of uniform ones a tenth
    assert np.all(np.abs(inside[:, 1]) <= 1) and np.all((inside[:, 0] > 0) & (inside[:, 0] < 1))
    uniform = np.asarray(pde.points(equation._replace(layer=None), 0)[0]["inside"])
    assert np.mean(np.abs(uniform[:, 1]) < 0.1) < 0.2


def test_points_of_the_edge_are_on_it_and_those_of_an_evolution_not_at_its_end():
    for equation in pde.EQUATIONS.values():
        points = pde.edge(equation, 40, np.random.default_rng(0))
        low, high = np.array(equation.low), np.array(equation.high)
        assert np.all(np.any((points == low) | (points == high), axis=1))
        assert not equation.is_evolution or not np.any(points[:, 0] == high[0])
        assert not equation.is_evolution or np.sum(points[:, 0] == low[0]) >= 20


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_the_loss_without_a_capture_is_that_of_the_two_terms_and_the_error_of_the_solution_is_one_for_zeros():
    equation = pde.EQUATIONS["poisson 2d"]._replace(widths=(3,))
    task = pde.Task(equation, pde.points(equation, 0, 0.02))
    variables = task.init(jax.random.key(0))
    out = task.capture("sampled").value_and_grad(variables, *task.batch, None)
    value, grad = jax.value_and_grad(lambda params: task.loss({"params": params}, *task.batch)[0])(variables["params"])
    np.testing.assert_allclose(out.value, value)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-9), out.grad, grad)
    zero = jax.tree.map(jnp.zeros_like, variables)
    assert pde.error(equation)(zero) == pytest.approx(1)


def test_the_points_of_a_stream_are_new_at_every_step_and_the_same_for_a_seed():
    equation = pde.EQUATIONS["heat 4+1d"]
    (one, two), again, other = ([*islice(pde.stream(equation, seed, 0.1), 2)] for seed in (0, 0, 1))
    assert not np.any(np.isin(one.images["inside"], two.images["inside"]))
    np.testing.assert_array_equal(again[1].images["inside"], two.images["inside"])
    assert not np.any(np.isin(other[0].images["inside"], one.images["inside"]))
