"""Which method trains a deep autoencoder best, per epoch and per second, and do they land on published curves?

The autoencoders of the papers (`problems`), batches of 1000, a constant learning rate, and for most second-order
methods a pass over the data that fills the statistics, not counted. Every method has the best of its trials (`make
tune`). Runs called "authors", on MNIST, have the settings of the authors of TNT and K-BFGS; what they logged is beside.

Expected: "authors" near what was logged, the best of ours as low as tuned Adam after ten epochs in half of its seconds,
off the plateau of the curves in a fifth of Adam's steps.

    make autoencoder ARGS="--estimate"                          (says how long it will take, and stops)
    make autoencoder ARGS="--problems curves --seeds 3"         (50 epochs)
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments import figures, problems, study
from experiments.figures import reached, seconds, series, setting, spread
from experiments.methods import ALL, BASELINE
from experiments.problems import Problem
from experiments.records import Records, grouped


class Logged(NamedTuple):
    """What the authors ran on MNIST: {epoch: training loss}, and what an epoch cost over SGD-m's."""

    method: str = ""
    rate: float = 0.0
    damping: float = 0.0
    losses: Mapping[int, float] = {}
    cost: float | None = None


AUTHORS = {
    "SGD-m (authors)": Logged("SGD-m", 3e-3, 0.0, {1: 197.6, 3: 184.5, 5: 169.5, 10: 125.7}, 1.0),
    "Adam (authors)": Logged("Adam of TNT", 1e-4, 1e-4, {1: 208.7, 3: 196.7, 5: 187.7, 10: 113.9}, 1.17),
    "Shampoo (authors)": Logged("Shampoo", 3e-4, 3e-4, {1: 433.5, 3: 211.3, 5: 188.0, 10: 110.3}, 1.96),
    "K-FAC (TNT authors)": Logged("K-FAC", 3e-3, 0.3, {1: 504.4, 3: 202.1, 5: 136.5, 10: 84.7}, 2.02),
    "K-FAC (K-BFGS authors)": Logged("K-FAC", 0.1, 3.0, {1: 183.2, 3: 99.7, 5: 74.0, 10: 61.6}),
    "K-BFGS (authors)": Logged("K-BFGS", 0.3, 0.3, {1: 169.0, 3: 85.2, 5: 68.0, 10: 59.8, 20: 56.3, 50: 53.8}),
    "TNT (authors)": Logged("TNT", 1e-4, 0.1, {1: 191.2, 3: 148.1, 5: 105.5, 10: 75.9}, 2.28),
}
ADAM, PLATEAU = "Adam", 130.0
"""The run that others are to overtake, and a loss on the curves below their plateau: the best constant has 134.3."""


def of_authors() -> dict[str, study.Entry]:
    """The runs at the settings of the authors."""
    tried = {name: ({"rate": log.rate, "damping": log.damping},) for name, log in AUTHORS.items()}
    return {name: problems.entry(ALL[log.method], problems.MNIST, tried[name]) for name, log in AUTHORS.items()}


def table(rows: Records, problem: Problem) -> Table:
    """Losses beside what the authors logged, what a step costs, and how soon Adam is overtaken."""
    runs, epochs, lines = grouped(rows), figures.epochs_of(rows, 1, 3, 5, 10, 20, 50), []
    costs, plateau = figures.costs(runs, BASELINE), PLATEAU if problem.name == "curves" else None
    for name, own in runs.items():
        losses, test, log = series(own), series(own, "test_loss"), AUTHORS.get(name, Logged())
        logged = {each: f" ({loss:.1f})" for each, loss in log.losses.items()}
        cells = [spread(losses[:, each], 1) + logged.get(each, "") for each in epochs]
        cells += [spread(test[:, -1], 1), costs[name] + (f" ({log.cost:.2f})" if log.cost else "")]
        epoch, share = overtaken(runs, name)
        cells += [f"{seconds(own)[-1]:.0f}", f"{epoch:.0f} ({share:.2f})" if np.isfinite(epoch) else "-"]
        if plateau:
            steps, adams = (steps_below(runs.get(each, []), plateau) for each in (name, ADAM))
            cells.append("-" if np.isinf(steps) else f"{steps:.0f}" + (f" ({steps / adams:.2f})" if adams else ""))
        lines.append((name, setting(own[0]["numbers"]), f"{len(own)}", *cells))
    last = [f"below {plateau:g}: steps (of Adam's)"] if plateau else []
    headings = ("test", "a step / SGD-m's", "s", "Adam's last", *last)
    return figures.table(
        f"Training loss, nats an image; {problem.title}",
        ("run", "rate, damping", "seeds", *(f"epoch {epoch}" for epoch in epochs), *headings),
        lines,
        "In round brackets what the authors logged, in square ones the range over seeds. A step over SGD-m's: "
        "all methods in turn in one process. s: of all epochs at that cost. Adam's last: the first epoch at the end of "
        "which the loss is no more than tuned Adam's last, and at which share of all its seconds.",
    )


def overtaken(runs: Mapping[str, Records], name: str) -> tuple[float, float]:
    """When a run is as low as tuned Adam at its last epoch: the epoch, and the share of Adam's seconds; or infinite."""
    if ADAM not in runs:
        return np.inf, np.inf
    adam, own = (np.median(series(runs[each]), axis=0) for each in (ADAM, name))
    epoch, taken = reached({"losses": own, "steps": range(len(own)), "seconds": seconds(runs[name])}, adam[-1])
    return epoch, taken / seconds(runs[ADAM])[-1]


def steps_below(runs: Records, level: float) -> float:
    """Steps until a stretch of batches has a mean loss below a level, the median of runs; 0 without any run."""
    found = []
    for run in runs:
        ends = [np.inf]
        for first, last, parts in zip(run["steps"], run["steps"][1:], run["batch_losses"][1:], strict=False):
            stretches = zip(np.linspace(first, last, len(parts) + 1)[1:], parts, strict=True)
            ends += [end for end, loss in stretches if loss is not None and loss < level]
        found.append(min(ends))
    return float(np.median(found)) if found else 0.0


def picture(rows: Records, problem: Problem) -> Figure:
    """Losses against seconds and epochs; the runs of the authors, with dots at what they logged, have other panels."""
    authors = "settings of the authors (dots: their logs)"
    shown = [row | {"problem": authors if row["name"] in AUTHORS else "training loss"} for row in rows]
    figure = figures.of_epochs(shown, problem.title)
    for index, log in enumerate(AUTHORS[name] for name in grouped(rows) if name in AUTHORS):
        dots = [(epoch, loss) for epoch, loss in log.losses.items() if epoch < len(rows[0]["steps"])]
        figure.axes[1].plot(*zip(*dots, strict=True), "o", color=f"C{index % 10}", markersize=5)
    return figure


def of(problem: Problem, data: str, epochs: int, trial: int, entries: Mapping[str, study.Entry]) -> study.Study:
    """All methods on a problem for some epochs, after trials of so many."""
    steps, option = problem.epoch * trial, f' ARGS="--problems {problem.name}"' * (problem.name != "mnist")
    return study.Study(
        f"autoencoder_{problem.name}",
        f"The papers' autoencoder: {data}",
        {problem.name: problem.case},
        entries,
        study.Limits(epochs * problem.epoch, problem.epoch, parts=10),
        partial(table, problem=problem),
        partial(picture, problem=problem),
        {"net": problem.title, "batch": problem.batch},
        trial=study.Limits(steps, steps),
        command=f"make autoencoder{option}",
    )


STUDIES = MNIST, CURVES, FACES = (
    of(problems.MNIST, "mnist", 10, 2, of_authors() | problems.entries(problems.MNIST, 6)),
    of(problems.CURVES, "curves-like", 50, 10, problems.entries(problems.CURVES, 6)),
    of(problems.FACES, "faces-like", 10, 2, problems.entries(problems.FACES, 6)),
)

if __name__ == "__main__":
    study.main(*STUDIES, problems=("mnist",))
