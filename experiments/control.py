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

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import natgrad_jax as ng
from experiments import figures, problems, study
from experiments.figures import ends
from experiments.methods import QUADRATIC
from experiments.nets import Perceptron
from experiments.records import Records, grouped
from experiments.study import Limits, grid

RATES, DAMPINGS = (0.03, 0.1, 0.3, 1.0), (0.01, 0.1, 1.0)
MORE = (1e-4, 1e-3, *DAMPINGS)
STEPS, LOOKS, BATCHES, CODE, HIDDEN = 300, 30, (16, 128, 1797), (32, 8, 32), (32,)
LEAST = 1e-6
"""Losses below it are rounding in float32."""
NOTHING = "nothing said"


def grafted(layers: Any, learning_rate: Any, **options: Any) -> Any:
    """The direction is K-FAC's, the length of every array of parameters Adam's."""
    direction = ng.graft(ng.scale_by_kfac(layers, **options), optax.scale_by_adam())
    return optax.chain(direction, optax.trace(0.9), optax.scale_by_learning_rate(learning_rate))


def bounded(least: Any, **options: Any) -> Any:
    """K-FAC with a damping that adapts itself above a bound."""
    return ng.kfac(damping=replace(ng.adaptive_damping(), least=least), **options)


control = partial(study.natural, stretch=STEPS // LOOKS, statistics_every=2, refresh_every=10)
of_model = partial(control, learning_rate="quadratic")
adaptive = partial(control, bounded, **QUADRATIC)
CONTROLS = {
    "learning rate": control(ng.kfac, grid(rate=RATES, damping=DAMPINGS), kl_clip=None),
    "learning rate, KL clip": control(
        lambda bound, **options: ng.kfac(kl_clip=bound, **options),
        grid(rate=RATES[1:], damping=DAMPINGS, bound=(1e-3, 1e-2)),
    ),
    "learning rate, Adam's length": control(grafted, grid(rate=(0.003, 0.01, 0.03, 0.1), damping=DAMPINGS)),
    "quadratic rate": of_model(ng.kfac, grid(damping=MORE, momentum=(0.0,))),
    "quadratic rate, momentum 0.9": of_model(ng.kfac, grid(damping=MORE, momentum=(0.9,))),
    "quadratic rate and momentum": of_model(ng.kfac, grid(damping=MORE), momentum="quadratic"),
    "adaptive damping, learning rate": control(
        ng.kfac, grid(rate=RATES[1:], momentum=(0.0, 0.9)), damping=ng.adaptive_damping()
    ),
    "everything adaptive": adaptive(grid(least=(1e-8,))),
    "everything adaptive, bounded": adaptive(grid(least=MORE)),
    NOTHING: study.natural(ng.kfac, stretch=STEPS // LOOKS),
    f"{NOTHING}, averaged": study.natural(
        lambda layers: ng.averaged(ng.kfac(layers=layers), 0.95), stretch=STEPS // LOOKS
    ),
}
NETS = {"autoencoder": Perceptron(CODE, linear=len(CODE) // 2), "classifier": Perceptron(HIDDEN, 10)}
CASES = {
    f"{name}, {size}": partial(problems.on_digits, net, {"problem": name, "batch": size}, size)
    for name, net in NETS.items()
    for size in BATCHES
}


def table(rows: Records) -> Table:
    """The final losses, and what was chosen."""
    return figures.pivot(
        rows,
        ["problem", "name"],
        lambda row: f"batches of {row['batch']}",
        cell,
        title="K-FAC on digits: the loss of all the images after the same number of steps",
        headings=["problem", "the step comes from"],
        caption="In nats per image above the least possible, median of the seeds. In brackets what was chosen for each "
        "batch size, of: rate, damping or its least, clip, momentum. Diverged: no lower than at the start.",
    )


def cell(rows: Records) -> str:
    """The final loss and what was chosen, of the seeds of one control."""
    final, start = np.median(ends(rows)), np.median([row["losses"][0] for row in rows])
    tried = CONTROLS[rows[0]["name"]].tried
    best = ", ".join(f"{v:g}" for name, v in rows[0]["numbers"].items() if len({each[name] for each in tried}) > 1)
    text = (f"<{LEAST:.0e}" if final < LEAST else f"{final:.2g}") if final < start else "diverged"
    return text + (f" ({best})" if best else "")


def picture(rows: Records) -> Figure:
    """Where every control ends against the size of the batch, a panel for each problem: medians, and the seeds."""
    panels = grouped(rows, "problem")
    figure, axes = figures.panels(1, len(panels), figsize=(5.5 * len(panels), 5.5))
    for axis, (problem, some) in zip(axes[0], panels.items(), strict=True):
        start = float(np.median([row["losses"][0] for row in some]))
        for index, (name, runs) in enumerate(grouped(some).items()):
            found = {size: np.clip(ends(own), LEAST, 3 * start) for size, own in grouped(runs, "batch").items()}
            line: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.4}
            if name.startswith(NOTHING):
                line = {"color": "black", "linewidth": 2, "linestyle": "-" if name == NOTHING else ":"}
            axis.plot([*found], [*map(np.median, found.values())], marker="o", markersize=4, label=name, **line)
            axis.vlines([*found], [*map(np.min, found.values())], [*map(np.max, found.values())], alpha=0.5, **line)
        axis.axhline(start, color="grey", linewidth=0.8, linestyle="--", zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="loss of all images, above the least")
        axis.set_xticks(BATCHES, map(str, BATCHES))
        axis.minorticks_off()
        axis.set_title(f"{problem} (dashed: the start; above it: diverged)", loc="left", fontsize=10)
    figures.clean(axes.flat)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


STUDY = study.Study(
    "control",
    "Which ways of choosing the step survive a small batch",
    CASES,
    CONTROLS,
    Limits(STEPS, STEPS // LOOKS),
    table,
    picture,
    {"measurements": LOOKS, "tuning_seed": 0, "autoencoder_widths": [*CODE], "classifier_widths": [*HIDDEN]},
    seeds=(1, 2, 3),
)

if __name__ == "__main__":
    study.main(STUDY)
