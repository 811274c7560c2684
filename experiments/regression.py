"""Least squares on small tables with all data at once: joint TENGraD and K-FAC with no setting, beside tuned Adam.

Tables of the UCI repository, from the folder uci/ in NATGRAD_DATA, and the diabetes of scikit-learn, standardised. A
net with one hidden layer of tanh learns the whole table, of a long one 2,000 rows drawn at random, in float32. All run
for the same seconds of the processor. The loss is half the mean squared error, where 0.5 is that of the mean.

Seen: steps by the quadratic model are where Adam ends in a tenth of its time, and then at a minimum: on concrete all
eigenvalues of the Hessian are positive there, and 1,500 steps of BFGS in double precision lower the loss by 2e-6 of it.

    make regression
    make regression ARGS="--seconds 5 --problems diabetes"
"""

import time
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale

import natgrad_jax as ng
from experiments import figures, study
from experiments.data import Part, folder
from experiments.nets import Perceptron
from experiments.running import Task

CONFIG = {"width": 32, "rows": 2000}
"""Units of the hidden layer, and rows of a table at most: one block of all layers has a kernel of rows x rows."""


def table_of(name: str, most: int) -> Part:
    """Inputs [N, D] and the last column as target [N, 1], standardised; a `FileNotFoundError` if it is not there."""
    if name == "diabetes":
        bunch: Any = load_diabetes()
        numbers = np.column_stack((bunch.data, bunch.target))
    else:
        path = (folder() or Path("NATGRAD_DATA")) / "uci" / name / "data.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. NATGRAD_DATA names a folder with it; or ask for others.")
        numbers = np.loadtxt(path)
    chosen = np.random.default_rng(0).permutation(len(numbers))[:most]
    numbers = np.asarray(scale(numbers[chosen]), np.float32)
    return Part(numbers[:, :-1], numbers[:, -1:])


def case(name: str, width: int = CONFIG["width"]) -> study.Case:
    """A net on a table."""
    whole = jax.device_put(table_of(name, CONFIG["rows"]))
    task = Task(Perceptron((width,), 1), ng.losses.squared_error, whole)
    return study.Case({"problem": name}, task, lambda seed: repeat(whole), task.measured(whole))


SECONDS = study.Limits(10**9, 1, 20.0, clock=time.process_time)
full = partial(study.natural, labels="exact", stretch=10)
STUDY = study.Study(
    "regression",
    "Least squares",
    {name: partial(case, name) for name in ("concrete", "energy", "power-plant", "diabetes")},
    {
        "TENGraD, joint": full(ng.tengrad, learning_rate="quadratic", blocks="joint", refresh_every=1),
        "K-FAC, quadratic": full(ng.kfac, learning_rate="quadratic", statistics_every=1, refresh_every=5),
        "K-FAC, nothing said": full(ng.kfac),
        "Adam": study.adam(study.grid(rate=(1e-3, 3e-3, 1e-2, 3e-2)), stretch=100),
    },
    SECONDS,
    partial(
        figures.last,
        title="Loss on the whole table after {seconds:g} processor seconds",
        caption="Half the mean squared error of standardised targets, median over the seeds, in brackets the steps.",
    ),
    partial(figures.curves, label="loss on the whole table", units=("processor seconds", "steps")),
    CONFIG,
    seeds=range(3),
    trial=SECONDS._replace(seconds=10.0),
)

if __name__ == "__main__":
    study.main(STUDY)
