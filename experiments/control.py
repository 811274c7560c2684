"""Which ways of choosing the step survive a small, noisy batch?

K-FAC on the 1,797 digits of 8x8 pixels that scikit-learn ships: an autoencoder with a code of 8 numbers, and a
classifier with one hidden layer. The step is a learning rate, with or without the KL clip or the length of Adam's step;
or what the quadratic model of the loss says; or the damping adapts itself. Every run has the same number of steps, so
that the columns of the table differ in noise and not in steps. Learning rates, where they are given, fall to zero like
a cosine. What a control leaves open was chosen for each batch size by the lowest final loss with a seed that is not
reported, from the numbers in `CONTROLS`; the median of three other seeds is reported. Losses are those of all the
images, above the least possible.

Expected: with all the images the quadratic model wins, with 16 it loses, as steps that are best for 16 images are too
long for the others, and a damping that is tested on the 16 images that the step was made for falls too far.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.table import Table

import natgrad_jax as ng
from experiments import digits, figures, study
from experiments.figures import ends
from experiments.nets import Perceptron
from experiments.records import Records

KFAC: dict[str, Any] = {"statistics_every": 2, "refresh_every": 10}


class Control(NamedTuple):
    """A way of choosing the step.

    Attributes:
        make: the layers, the learning rate as a schedule, and one number for each of the others -> the optimizer.
        tried: of which the best are taken; "rate" is the first learning rate.
        style: colour and dashes of its line.
    """

    make: Callable[..., Any]
    tried: tuple[study.Numbers, ...]
    style: tuple[str, str]


RATES, DAMPINGS = (0.03, 0.1, 0.3, 1.0), (0.01, 0.1, 1.0)
MORE, grid = (1e-4, 1e-3, *DAMPINGS), study.grid
MODEL: dict[str, Any] = {"learning_rate": "quadratic", **KFAC}
BOTH: dict[str, Any] = {"momentum": "quadratic", **MODEL}


def given(layers: Any, rate: Any, damping: Any) -> Any:
    """A given rate."""
    return ng.kfac(rate, layers, damping=damping, kl_clip=None, **KFAC)


def clipped(layers: Any, rate: Any, damping: Any, bound: Any) -> Any:
    """A given rate, and a step shortened by the KL clip."""
    return ng.kfac(rate, layers, damping=damping, kl_clip=bound, **KFAC)


def grafted(layers: Any, rate: Any, damping: Any) -> Any:
    """The direction is K-FAC's, the length of every array of parameters Adam's."""
    direction = ng.graft(ng.scale_by_kfac(layers, damping=damping, **KFAC), optax.scale_by_adam())
    return optax.chain(direction, optax.trace(0.9), optax.scale_by_learning_rate(rate))


def of_model(layers: Any, rate: Any, damping: Any, momentum: Any) -> Any:
    """The learning rate comes from the model."""
    del rate
    return ng.kfac(layers=layers, damping=damping, momentum=momentum, **MODEL)


def adaptive(layers: Any, rate: Any, least: Any) -> Any:
    """Everything comes from the model; the damping stays above a bound."""
    del rate
    return ng.kfac(layers=layers, damping=replace(ng.adaptive_damping(), least=least), **BOTH)


CONTROLS = {
    "learning rate": Control(given, grid(rate=RATES, damping=DAMPINGS), ("#17375e", "-")),
    "learning rate, KL clip": Control(
        clipped, grid(rate=RATES[1:], damping=DAMPINGS, bound=(1e-3, 1e-2)), ("#3f8fd2", "-")
    ),
    "learning rate, Adam's length": Control(
        grafted, grid(rate=(0.003, 0.01, 0.03, 0.1), damping=DAMPINGS), ("#4da167", "-")
    ),
    "quadratic rate": Control(of_model, grid(damping=MORE, momentum=(0.0,)), ("#f0a202", "-")),
    "quadratic rate, momentum 0.9": Control(of_model, grid(damping=MORE, momentum=(0.9,)), ("#f0a202", ":")),
    "quadratic rate and momentum": Control(
        lambda layers, rate, damping: ng.kfac(layers=layers, damping=damping, **BOTH),
        grid(damping=MORE),
        ("#d95f02", "-"),
    ),
    "adaptive damping, learning rate": Control(
        lambda layers, rate, momentum: ng.kfac(rate, layers, damping=ng.adaptive_damping(), momentum=momentum, **KFAC),
        grid(rate=RATES[1:], momentum=(0.0, 0.9)),
        ("#a05fb4", ":"),
    ),
    "everything adaptive": Control(adaptive, grid(least=(1e-8,)), ("#b2182b", ":")),
    "everything adaptive, bounded": Control(adaptive, grid(least=MORE), ("#b2182b", "-")),
    "nothing said": Control(lambda layers, rate: ng.kfac(layers=layers, **KFAC), ({},), ("#000000", "-")),
}
LEAST = 1e-6
"""Losses below it are rounding in float32."""


@dataclass(frozen=True)
class Config:
    """The numbers that all controls share.

    Attributes:
        output: folder of the records and of the picture.
        steps: of every run.
        measurements: how often in a run the loss of all the images is measured; they divide the steps.
        batches: sizes, from the smallest to the largest.
        seeds: of the runs that are reported: initial parameters, order of the images and labels drawn from the model.
        tuning_seed: of the runs that choose among what is tried.
        autoencoder_widths: outputs of its hidden layers; the code is the one in the middle.
        classifier_widths: outputs of its hidden layers.
        controls: which of `CONTROLS`.
    """

    output: Path = Path("results")
    steps: int = 300
    measurements: int = 30
    batches: tuple[int, ...] = (16, 128, 1797)
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seed: int = 0
    autoencoder_widths: tuple[int, ...] = (32, 8, 32)
    classifier_widths: tuple[int, ...] = (32,)
    controls: tuple[str, ...] = tuple(CONTROLS)


def cases(config: Config) -> list[study.Case]:
    """The two problems, with batches of every size."""
    images, widths = digits.images(), config.autoencoder_widths
    dense = Perceptron(widths, linear=len(widths) // 2)
    problems = {
        "autoencoder": (dense, digits.rows(images)),
        "classifier": (Perceptron(config.classifier_widths, 10), images),
    }
    return [
        digits.case({"problem": name, "batch": batch}, *problem, batch)
        for name, problem in problems.items()
        for batch in config.batches
    ]


def entry(name: str, stretch: int) -> study.Entry:
    """A control."""
    control = CONTROLS[name]

    def make(numbers: study.Numbers, layers: Any) -> Any:
        others = {name: number for name, number in numbers.items() if name not in ("rate", "horizon")}
        return control.make(layers, study.cosine(numbers.get("rate", 0.0), numbers["horizon"]), **others)

    return study.Entry(make, control.tried, stretch=stretch)


def run(config: Config) -> Records:
    """Train every problem with every control and batch size."""
    look = config.steps // config.measurements
    entries, limits = {name: entry(name, look) for name in config.controls}, study.Limits(config.steps, look)
    names = ("steps", "measurements", "tuning_seed", "autoencoder_widths", "classifier_widths")
    key = study.key(config, *names)
    path = config.output / "control.jsonl"
    return study.run(path, key, cases(config), entries, limits, config.seeds, trial_seed=config.tuning_seed)


def of(rows: Records, **entries: Any) -> Records:
    """The rows with these entries."""
    return [row for row in rows if entries.items() <= row.items()]


def values(rows: Records, entry: str) -> list[Any]:
    """The different values of an entry."""
    return list(dict.fromkeys(row[entry] for row in rows))


def table(rows: Records) -> Table:
    """The final losses, and what was chosen."""
    batches, lines = sorted(values(rows, "batch")), []
    for problem in values(rows, "problem"):
        for name in values(rows, "name"):
            cells = (cell(of(rows, problem=problem, name=name, batch=batch)) for batch in batches)
            lines.append((problem, name, *cells))
    return figures.table(
        "K-FAC on digits: the loss of all the images after the same number of steps",
        ("problem", "the step comes from", *(f"batches of {batch}" for batch in batches)),
        lines,
        "In nats per image above the least possible, median of the seeds. In brackets what was chosen for each "
        "batch size, of: rate, damping or its least, clip, momentum. Diverged: no lower than at the start.",
        names=2,
    )


def cell(rows: Records) -> str:
    """The final loss and what was chosen, of the seeds of one control."""
    final, start = np.median(ends(rows)), np.median([row["losses"][0] for row in rows])
    tried = CONTROLS[rows[0]["name"]].tried
    chosen = ", ".join(f"{v:g}" for name, v in rows[0]["numbers"].items() if len({each[name] for each in tried}) > 1)
    told = (f"<{LEAST:.0e}" if final < LEAST else f"{final:.2g}") if final < start else "diverged"
    return told + (f" [dim]({chosen})[/dim]" if chosen else "")


def picture(rows: Records) -> Figure:
    """Final loss against the size of the batch, and loss against steps with the smallest; a row for each problem."""
    problems, batches = values(rows, "problem"), sorted(values(rows, "batch"))
    figure, axes = figures.panels(len(problems), 2, figsize=(11, 8))
    for (left, right), problem in zip(axes, problems, strict=True):
        some = of(rows, problem=problem)
        start = float(np.median([row["losses"][0] for row in some]))
        least, most = max(LEAST, 0.6 * ends(some).min()), 3 * start
        for name in values(some, "name"):
            own = [of(some, name=name, batch=batch) for batch in batches]
            colour, dashes = CONTROLS[name].style
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
            finals = np.clip([ends(group) for group in own], least, most)
            left.plot(batches, np.median(finals, axis=1), **style, marker="o", markersize=4, label=name)
            left.vlines(batches, finals.min(axis=1), finals.max(axis=1), color=colour, linewidth=1, alpha=0.6)
            run = figures.middle(own[0])
            losses = [most if loss is None else loss for loss in run["losses"]]
            right.plot(run["steps"], np.clip(losses, least, most), **style)
        for axis in (left, right):
            axis.axhline(start, color="grey", linewidth=0.8, linestyle="--", zorder=0)
            axis.set(yscale="log", ylim=(least, most))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1000 * least else (1,)))
            figures.plain(axis.yaxis, "")
        left.set(xscale="log", xlabel="images in a batch", ylabel="loss of all images, above the least possible")
        left.set_xticks(batches, [str(batch) for batch in batches])
        left.minorticks_off()
        left.set_title(f"{problem}: where it ends", loc="left", fontweight="bold")
        right.set_xlabel("steps")
        right.set_title(f"{problem}: batches of {batches[0]}", loc="left", fontweight="bold")
        note = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "color": "grey"}
        left.annotate("start; above it: diverged", (0.99, start), **note)
    figures.clean(axes.flat)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(config: Config) -> None:
    """Train, print the table, write the picture."""
    rows = run(config)
    figures.present([table(rows)], picture(rows), config.output / "control.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
