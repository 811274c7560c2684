"""Least squares on small tables with all data at once: joint TENGraD and K-FAC with no setting, beside tuned Adam.

Tables of the UCI repository, from the folder uci/ in NATGRAD_DATA, and the diabetes of scikit-learn, which needs no
download; inputs and targets are standardised. A net with one hidden layer of tanh learns the whole table, of a long one
2,000 rows, in float32. All run for the same seconds of the processor; Adam's rate falls like a cosine, and is chosen by
trials. The loss is half the mean squared error, where 0.5 is that of the mean.

Seen: steps by the quadratic model are where Adam ends in a tenth of its time, and then at a minimum: on concrete all
eigenvalues of the Hessian are positive there, and 1,500 steps of BFGS in double precision lower the loss by 2e-6 of it.

    make regression
    make regression ARGS="--seconds 5 --tables diabetes"
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich import print as say
from rich.table import Table
from sklearn.datasets import load_diabetes

import natgrad_jax as ng
from experiments import figures, study
from experiments.data import Part, folder
from experiments.figures import ends
from experiments.nets import Perceptron
from experiments.records import Records
from experiments.running import Task
from experiments.study import Entry, cosine, grid

Name = Literal["concrete", "energy", "power-plant", "wine-quality-red", "yacht", "diabetes"]
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FULL: dict[str, Any] = {"statistics_every": 1, "refresh_every": 5}


def ours(make: Callable[[Any], Any]) -> Entry:
    """A method that chooses its steps by itself."""
    return Entry(lambda numbers, layers: make(layers), labels="exact", look=10, stretch=10)


METHODS = {
    "TENGraD, joint": ours(lambda layers: ng.tengrad("quadratic", layers, blocks="joint", refresh_every=1)),
    "K-FAC, quadratic": ours(lambda layers: ng.kfac("quadratic", layers, **FULL)),
    "K-FAC, nothing said": ours(lambda layers: ng.kfac(layers=layers)),
    "Adam": Entry(
        lambda numbers, layers: optax.adam(cosine(numbers["rate"], numbers["horizon"])),
        grid(rate=RATES),
        labels=None,
        look=100,
        stretch=100,
    ),
}


@dataclass(frozen=True)
class Config:
    """Every number of the study.

    Attributes:
        output: folder of records, table and picture.
        seconds: of the processor, of a run.
        trial: seconds of a trial.
        seeds: runs of a method from as many nets.
        width: of the hidden layer.
        rows: of a table at most, drawn at random: one block of all layers has a kernel of rows x rows.
        tables: which.
    """

    output: Path = Path("results")
    seconds: float = 20.0
    trial: float = 10.0
    seeds: int = 3
    width: int = 32
    rows: int = 2000
    tables: tuple[Name, ...] = ("concrete", "energy", "power-plant", "diabetes")


def table_of(name: Name, most: int) -> Part:
    """Inputs [N, D] and the last column as target [N, 1], standardised; a `FileNotFoundError` if it is not there."""
    if name == "diabetes":
        bunch: Any = load_diabetes()
        x, y = bunch.data, bunch.target
    else:
        given = folder()
        path = Path() if given is None else given / "uci" / name / "data.txt"
        if not path.is_file():
            raise FileNotFoundError(f"There is no uci/{name}/data.txt in the folder that NATGRAD_DATA names.")
        numbers = np.loadtxt(path)
        x, y = numbers[:, :-1], numbers[:, -1]
    chosen = np.random.default_rng(0).permutation(len(x))[:most]
    x, y = x[chosen], y[chosen]
    x, y = (np.float32((part - part.mean(0)) / part.std(0)) for part in (x, y[:, None]))
    return Part(x, y)


def case(name: Name, config: Config) -> study.Case:
    """A net on a table."""
    table = table_of(name, config.rows)
    net, whole = Perceptron((config.width,), 1), jax.device_put(table)
    loss = jax.jit(partial(_loss, net))
    task = Task(net, ng.losses.squared_error, table)
    return study.Case(
        {"problem": name}, task, lambda seed: repeat(whole), lambda variables: float(loss(variables, *whole))
    )


def _loss(net: Any, variables: Any, x: Any, y: Any) -> Any:
    return 0.5 * jnp.mean((net.apply(variables, x) - y) ** 2)


def run(config: Config) -> Records:
    """All trials and runs; tables that are not there are named and left out."""
    cases = []
    for name in config.tables:
        try:
            cases.append(case(name, config))
        except FileNotFoundError as error:
            say(f"[yellow]{name} is left out.[/yellow] {error}")
    limits = study.Limits(10**9, 1, config.seconds, clock=time.process_time)
    key, path = study.key(config, "seconds", "trial", "width", "rows"), config.output / "regression.jsonl"
    return study.run(path, key, cases, METHODS, limits, range(config.seeds), limits._replace(seconds=config.trial))


def table(rows: Records) -> Table:
    """The loss that is left, its median over the seeds."""
    problems, names = ([*dict.fromkeys(row[entry] for row in rows)] for entry in ("problem", "name"))

    def cell(problem: str, name: str) -> str:
        those = [row for row in rows if (row["problem"], row["name"]) == (problem, name)]
        return f"{np.median(ends(those)):.2g} ({np.median([row['steps'][-1] for row in those]):.0f})"

    return figures.table(
        f"Loss on the whole table after {rows[0]['config']['seconds']:g} processor seconds",
        ("method", *problems),
        [(name, *(cell(problem, name) for problem in problems)) for name in names],
        "Half the mean squared error of standardised targets, median over the seeds, in brackets the steps.",
    )


def picture(rows: Records) -> Figure:
    """Losses against seconds and steps."""
    return figures.curves(rows, "loss on the whole table", seconds="processor seconds")


def main(config: Config) -> None:
    """Run, print, draw."""
    rows = run(config)
    (config.output / "regression.md").write_text(figures.markdown(table(rows)) + "\n")
    figures.present([table(rows)], picture(rows), config.output / "regression.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
