"""The experiment on physics-informed nets: its equations have their solutions, its runs their records."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from experiments import pde, pinn
from experiments.tables import markdown

EXACT = {
    "poisson 2d": lambda x: jnp.prod(jnp.sin(jnp.pi * x)),
    "poisson 5d": lambda x: jnp.sum(jnp.cos(jnp.pi * x)),
    "heat 4+1d": lambda x: jnp.exp(-x[0]) * jnp.sum(jnp.sin(2 * x[1:])),
}


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


def test_points_of_the_edge_are_on_it_and_those_of_an_evolution_not_at_its_end():
    for equation in pde.EQUATIONS.values():
        points = pde.edge(equation, 40, np.random.default_rng(0))
        low, high = np.array(equation.low), np.array(equation.high)
        assert np.all(np.any((points == low) | (points == high), axis=1))
        assert not equation.is_evolution or not np.any(points[:, 0] == high[0])
        assert not equation.is_evolution or np.sum(points[:, 0] == low[0]) >= 20


def records():
    """Runs of two methods on two equations, one of them lost."""
    found = []
    for equation, errors in {"poisson 2d": (1e-6, 1e-2), "heat 4+1d": (1e-3, None)}.items():
        for method, error in zip(("TENGraD, joint", "Adam"), errors, strict=True):
            key = {"equation": equation, "method": method, "trial": False, "setting": 1.0, "seed": 0}
            found.append(key | {"steps": [0, 5], "seconds": [0.0, 1.0], "errors": [1.0, error]})
    return found


def test_the_table_has_the_errors_and_the_ratio():
    console = Console(width=200, record=True)
    found = pinn.table(records(), 8.0)
    console.print(found)
    text = console.export_text()
    assert "1.0e-06 (5)" in text and "10000.0" in text and "ratio" in markdown(found)


def test_the_picture_has_a_column_for_every_equation():
    figure = pinn.picture(records())
    assert len(figure.axes) == 4 and {line.get_label() for line in figure.axes[0].lines} == {"TENGraD, joint", "Adam"}
    plt.close(figure)


@pytest.mark.slow
def test_a_run_gives_a_record_for_every_trial_and_seed(tmp_path):
    config = pinn.Config(tmp_path, 0.01, 0.01, 1, 0.02, ("poisson 2d",), ("Adam", "L-BFGS"))
    pinn.main(config)
    found = pinn.kept(tmp_path / "pinn.jsonl")
    assert [record["trial"] for record in found] == 2 * [True, True, True, False]
    assert all(record["errors"][-1] is not None and record["steps"][-1] > 0 for record in found)
    assert (tmp_path / "pinn.png").exists() and "| Adam |" in (tmp_path / "pinn.md").read_text()
    pinn.main(config)
    assert len(pinn.kept(tmp_path / "pinn.jsonl")) == len(found)
