"""Physics-informed nets: what error is left after the same seconds, by natural gradients, Adam, SOAP and L-BFGS?

Poisson in two and five dimensions, the heat equation in four, Burgers' in one (`experiments/pde.py`); a net with tanh,
new points at every step, double precision, an error that is relative, in L2, at 2,000 other points. L-BFGS stays on its
first points, since its memory is of one loss. Every method has as many trials of its setting as every other, of the
same seconds, with the first seed; then it runs from every seed at the setting that left the least error. Seconds are
those of the processor, of all threads, so that a busy machine slows nobody; compilation and the measuring of the error
are not in them.

Points that stay fit themselves: of 500 in five dimensions TENGraD leaves an error of 5e-3, of new ones 2e-4.

Expected: TENGraD of one block with a search along its direction, and SPRING, leave less than a tenth of the error of
Adam and of L-BFGS.

    make pinn                                        (two hours on two cores)
    make pinn ARGS="--seconds 5 --seeds 1 --equations 'poisson 2d'"
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

import natgrad_jax as ng
from experiments import figures, pde, study
from experiments.figures import ends, markdown
from experiments.records import Records
from experiments.study import Entry, cosine, grid

EXACT: dict[str, Any] = {"blocks": "joint", "refresh_every": 1}
OFTEN: dict[str, Any] = {"statistics_every": 1, "refresh_every": 5, "early_refresh": False}
RATES, DAMPINGS = (1e-3, 5e-3, 2e-2), (1e-4, 1e-6, 1e-8)


def tengrad(momentum: Any) -> Callable[[study.Numbers, Any], Any]:
    """The exact direction with a search along it."""
    return lambda numbers, layers: ng.tengrad("search", layers, damping=numbers["damping"], momentum=momentum, **EXACT)


def kfac(numbers: study.Numbers, layers: Any) -> optax.GradientTransformation:
    """K-FAC with a damping that adapts itself, from the number that is tried."""
    tx: Any = ng.kfac("quadratic", layers, damping=ng.adaptive_damping(1.0, least=1e-12), **OFTEN)
    return tx._replace(init=lambda params: tx.init(params)._replace(damping=jnp.float32(numbers["damping"])))


def soap(numbers: study.Numbers, layers: Any) -> optax.GradientTransformation:
    """SOAP with a rate that falls like a cosine."""
    return ng.soap(cosine(numbers["rate"], numbers["horizon"]), layers, statistics="gradient", damping=1e-16)


METHODS = {
    "TENGraD, joint": Entry(tengrad(None), grid(damping=DAMPINGS), look=5, stretch=5),
    "SPRING": Entry(tengrad("spring"), grid(damping=DAMPINGS), look=5, stretch=5),
    "K-FAC": Entry(kfac, grid(damping=(1.0, 1e-2, 1e-4)), look=10, stretch=10),
    "SOAP": Entry(soap, grid(rate=RATES), look=50, stretch=50),
    "Adam": Entry(
        lambda numbers, layers: optax.adam(cosine(numbers["rate"], numbers["horizon"])),
        grid(rate=RATES),
        labels=None,
        look=100,
        stretch=100,
    ),
    "L-BFGS": Entry(
        lambda numbers, layers: optax.lbfgs(memory_size=int(numbers["memory"])),
        grid(memory=(10, 30, 100)),
        labels=None,
        look=20,
        stretch=20,
        is_static=True,
        stays=True,
    ),
}
OTHERS = ("Adam", "L-BFGS")


@dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
        output: folder of records, table and picture.
        seconds: of the processor, of a run.
        trial: seconds of a trial.
        seeds: runs of a method from as many nets and points.
        scale: of the numbers of points.
        equations: which.
        methods: which.
    """

    output: Path = Path("results")
    seconds: float = 60.0
    trial: float = 20.0
    seeds: int = 3
    scale: float = 1.0
    equations: tuple[pde.Name, ...] = pde.NAMES
    methods: tuple[str, ...] = tuple(METHODS)


def case(name: pde.Name, config: Config) -> study.Case:
    """An equation."""
    equation = pde.EQUATIONS[name]
    task = pde.Task(equation, pde.points(equation, 0, config.scale))
    return study.Case(
        {"problem": name}, task, lambda seed: pde.stream(equation, seed, config.scale), pde.error(equation)
    )


def run(config: Config) -> Records:
    """All trials and runs, in double precision."""
    with jax.enable_x64(True):
        cases = [case(name, config) for name in config.equations]
        limits = study.Limits(10**9, 1, config.seconds, clock=time.process_time)
        entries, key = {name: METHODS[name] for name in config.methods}, study.key(config, "seconds", "trial", "scale")
        path, trial = config.output / "pinn.jsonl", limits._replace(seconds=config.trial)
        return study.run(path, key, cases, entries, limits, range(config.seeds), trial)


def table(rows: Records) -> Table:
    """The error that is left, its median over the seeds, and how many times less ours is than that of the others."""
    problems, names = ([*dict.fromkeys(row[entry] for row in rows)] for entry in ("problem", "name"))
    errors, cells = {}, {}
    for problem in problems:
        for name in names:
            those = [row for row in rows if (row["problem"], row["name"]) == (problem, name)]
            errors[problem, name] = np.median(ends(those)) if those else np.inf
            steps = np.median([row["steps"][-1] for row in those]) if those else 0
            cells[problem, name] = f"{errors[problem, name]:.1e} ({steps:.0f})" if those else "-"
    ratios = []
    for problem in problems:
        least = [
            min((errors[problem, name] for name in names if (name in OTHERS) is others), default=np.inf)
            for others in (True, False)
        ]
        ratio = np.divide(least[0], least[1])
        ratios.append(f"{ratio:.1f}" if np.isfinite(ratio) else "-")
    lines = [(name, *(cells[problem, name] for problem in problems)) for name in names]
    return figures.table(
        f"Relative L2 error after {rows[0]['config']['seconds']:g} processor seconds",
        ("method", *problems),
        [*lines, ("ratio", *ratios)],
        "Median over the seeds, in brackets the steps. Last line: the least of Adam and L-BFGS over the least "
        "of the others.",
    )


def picture(rows: Records) -> Figure:
    """Errors against seconds and steps."""
    return figures.curves(rows, "relative L2 error", seconds="processor seconds")


def main(config: Config) -> None:
    """Run, print, draw."""
    rows = run(config)
    (config.output / "pinn.md").write_text(markdown(table(rows)) + "\n")
    figures.present([table(rows)], picture(rows), config.output / "pinn.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
