"""Which method trains a convnet best, per epoch and per second?

Fashion-MNIST by the convnet of TENGraD, with fewer channels, and CIFAR-10 by a ResNet, for a GPU: batches of 128, the
same periods, decay and clip for all, a constant rate. Every method has the best of its trials (`make tune`).
Expected: TENGraD level with K-FAC and EKFAC per epoch.

    make classify ARGS="--problems 'fashion, 32 channels' --methods TENGraD K-FAC"
    make classify ARGS="--methods 'TENGraD, every 10th'"        (refreshed so often)
    make classify ARGS="--problems cifar10"
"""

from collections.abc import Mapping
from functools import partial

from matplotlib.figure import Figure
from rich.table import Table

from experiments import figures, problems, study
from experiments.figures import seconds, series, setting, spread
from experiments.methods import BASELINE, KL_CLIP, METHODS, REFRESH_EVERY, STATISTICS_EVERY, WEIGHT_DECAY
from experiments.problems import Problem
from experiments.records import Records, grouped

BUDGET, TRIAL = 8, 200
"""Trials of every method beside its usual numbers, and their steps."""


def table(rows: Records, problem: Problem) -> Table:
    """Loss and accuracy after some epochs, and what a step costs."""
    runs, epochs, lines = grouped(rows), figures.epochs_of(rows, 1, 2, 3, 5, 10, 20), []
    costs = figures.costs(runs, BASELINE)
    for name, own in runs.items():
        losses, right, between = series(own), series(own, "test_accuracy"), "  " if len(own) == 1 else "\n"
        cells = (spread(losses[:, epoch], 4) + between + spread(100 * right[:, epoch], 2) for epoch in epochs)
        lines.append((name, setting(own[0]["numbers"]), *cells, costs[name], f"{seconds(own)[-1]:.0f}"))
    return figures.table(
        f"Training loss, and test accuracy in %; {problem.title}",
        ("method", "rate, damping", *(f"epoch {epoch}" for epoch in epochs), "a step / SGD-m's", "s"),
        lines,
        "In square brackets the range over seeds. A step over SGD-m's: all methods in turn in one process, "
        "after the first refresh period. The seconds are of all epochs at that cost.",
    )


def picture(rows: Records, problem: Problem) -> Figure:
    """Losses and test errors against seconds and epochs, every seed thin, the middle one thick."""
    errors = [row | {"losses": [100 * (1 - right) for right in row["test_accuracy"]]} for row in rows]
    shown = [row | {"problem": "training loss"} for row in rows]
    return figures.of_epochs([*shown, *(row | {"problem": "test error, %"} for row in errors)], problem.title)


def of(problem: Problem, label: str, name: str, entries: Mapping[str, study.Entry]) -> study.Study:
    """All methods on a problem for three epochs."""
    option = f" ARGS=\"--problems '{label}'\"" * (label != "fashion, 16 channels")
    shared = {"periods": [REFRESH_EVERY, STATISTICS_EVERY], "weight_decay": WEIGHT_DECAY, "kl_clip": KL_CLIP}
    return study.Study(
        f"classify_{name}",
        f"{problem.title}: {problem.name}",
        {label: problem.case},
        entries,
        study.Limits(3 * problem.epoch, problem.epoch, parts=10),
        partial(table, problem=problem),
        partial(picture, problem=problem),
        {"net": problem.title, "batch": problem.batch, **shared},
        trial=study.Limits(TRIAL, TRIAL),
        command=f"make classify{option}",
    )


def entries(problem: Problem) -> dict[str, study.Entry]:
    """Every method, and TENGraD with more refreshes."""
    found = problems.entries(problem, BUDGET)
    often = found["TENGraD"]._replace(make=METHODS["TENGraD"].make("classifier", 10))
    return found | {"TENGraD, every 10th": often}


STUDIES = (
    *(of(net := problems.convnet(n), f"fashion, {n} channels", str(n), entries(net)) for n in (16, 32, 128)),
    of(problems.CIFAR10, "cifar10", "resnet20_16", entries(problems.CIFAR10)),
)

if __name__ == "__main__":
    study.main(*STUDIES, problems=("fashion, 16 channels",))
