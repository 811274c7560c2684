"""Who is first at a deep autoencoder: Adam, tuned, or a natural gradient that chooses its own steps?

The digits of scikit-learn up-sampled to 28 x 28 by linear interpolation; the autoencoder of the papers with tanh,
784-1000-500-250-30-250-500-1000-784; batches of 500; the loss of the whole set above the entropy of the pixels. Nothing
is tuned for ours but how often the statistics are taken. Adam has the best of six learning rates, each constant and
with a cosine decay, chosen with the first seed. If kfac-jax can be imported (its release wants jax <= 0.9.1), it runs
too: its own adaptive mode at the best of three initial dampings tried beforehand (1, 3, 10), inverses every 5 steps.

Expected: a gap of 2 nats in a twentieth of Adam's steps and a fifth of its seconds, and in half of the seconds of
kfac-jax, whose steps are of the same kind.

    make race                                       (some 25 minutes, most of them Adam's)
    make race ARGS="--seeds 1 --methods K-FAC"
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from rich.table import Table

import natgrad_jax as ng
from experiments import digits, figures, study
from experiments.methods import ADAPTIVE
from experiments.nets import Perceptron
from experiments.records import Records
from experiments.running import Peer, has_peer

SELDOM: dict[str, Any] = {
    "statistics_every": 10,
    "refresh_every": 20,
    "rescale_every": 10,
    "decay": 0.3,
    "refresh": "qr",
}
METHODS = {
    "K-FAC": partial(ng.kfac, **ADAPTIVE | {"split": "even"}),
    "TKFAC": partial(ng.tkfac, **ADAPTIVE | {"split": "pi"}),
    "EKFAC": partial(ng.ekfac, **ADAPTIVE | {"split": "pi"} | SELDOM),
    "TEKFAC": partial(ng.tekfac, **ADAPTIVE | {"split": "pi"} | SELDOM),
}
"""The damping enters as that of two factors, by the better of "even" and "pi"; statistics are as frequent as pays."""
ADAM, PEER = "Adam", "kfac-jax"


@dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
        output: folder of the records and of the picture.
        seeds: runs from as many initial parameters and orders of the data.
        methods: which to run beside Adam; those of ours, and kfac-jax where it can be imported.
        batch: images in a step.
        levels: gaps whose first time is told; a run ends at the last.
        steps: most steps of a natural gradient.
        adam_steps: most steps of Adam, and the horizon of its cosine.
        adam_rates: its learning rates.
        peer_damping: initial damping of kfac-jax.
        widths: outputs of the hidden layers.
    """

    output: Path = Path("results")
    seeds: int = 5
    methods: tuple[str, ...] = (*METHODS, PEER)
    batch: int = 500
    levels: tuple[float, ...] = (30.0, 10.0, 5.0, 2.0)
    steps: int = 250
    adam_steps: int = 2000
    adam_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
    peer_damping: float = 3.0
    widths: tuple[int, ...] = (1000, 500, 250, 30, 250, 500, 1000)


def adam(numbers: study.Numbers, layers: Any) -> optax.GradientTransformation:
    """Adam at a rate that is constant (`falls` is 0) or falls like a cosine (1)."""
    del layers
    falls, fall = numbers["falls"], study.cosine(1.0, numbers["horizon"])
    return optax.adam(lambda count: numbers["rate"] * (1 - falls + falls * fall(count)))


def entries(config: Config) -> dict[str, study.Entry]:
    """Adam at its rates, ours, and kfac-jax."""
    tried = study.grid(rate=config.adam_rates, falls=(0, 1))
    found = {ADAM: study.Entry(adam, tried, None, config.adam_steps, look=20)}
    for name, make in METHODS.items():
        found[name] = study.Entry(lambda numbers, layers, make=make: make(layers=layers))
    if has_peer():
        options: Any = {"adaptive": True, "damping": config.peer_damping, "inverse_update_period": 5}
        found[PEER] = study.Entry(None, peer=lambda task: Peer(task, **options))
    return {name: entry for name, entry in found.items() if name == ADAM or name in config.methods}


def run(config: Config) -> Records:
    """Tune Adam, then all optimizers in turn from every seed."""
    case = digits.case(
        {"problem": "autoencoder"}, Perceptron(config.widths), digits.rows(digits.images(28)), config.batch
    )
    limits = study.Limits(config.steps, 5, level=min(config.levels))
    names = ("batch", "levels", "steps", "adam_steps", "adam_rates", "peer_damping", "widths")
    key = study.key(config, *names)
    return study.run(config.output / "race.jsonl", key, [case], entries(config), limits, range(config.seeds))


def table(rows: Records, config: Config) -> Table:
    """When each level was reached, the median over the seeds, and the last level beside Adam and kfac-jax."""
    target, names = min(config.levels), [*dict.fromkeys(row["name"] for row in rows)]
    runs, rivals = {name: [row for row in rows if row["name"] == name] for name in names}, []
    lines, rivals = [], [name for name in names if name in (ADAM, PEER)]
    for name in names:
        pace = np.median([1000 * row["seconds"][-1] / row["steps"][-1] for row in runs[name]])
        cells = [f"{pace:.0f}"]
        for level in config.levels:
            steps, seconds = np.median([study.reached(row, level) for row in runs[name]], axis=0)
            cells.append(f"{steps:.0f} / {seconds:.1f} s" if np.isfinite(steps) else "-")
        for rival in rivals:
            mine, theirs = (np.array([study.reached(row, target)[1] for row in runs[n]]) for n in (name, rival))
            late = ~np.isfinite(theirs)  # a rival that did not get there: the time that it had
            ratios = mine / np.where(late, [row["seconds"][-1] for row in runs[rival]], theirs)
            told = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
            cells.append(("<" if np.any(late) else "") + told if np.all(np.isfinite(mine)) else "-")
        lines.append((named(runs[name][0]), *cells))
    return figures.table(
        f"Steps and seconds to a gap, median of {config.seeds} runs",
        ("optimizer", "ms / step", *(f"{level:g}" for level in config.levels), *(f"x {rival}" for rival in rivals)),
        lines,
        "Gap: loss above the entropy of the pixels, nats an image. Seconds of training alone, in turn in one "
        f"process. The last columns are ratios of seconds to a gap of {target:g}, their range over the runs in "
        "brackets; < if the rival did not get there in its steps.",
    )


def named(row: dict[str, Any]) -> str:
    """The method of a row, Adam with its rate."""
    rate, falls = (row["numbers"].get(name) for name in ("rate", "falls"))
    return row["name"] if rate is None else f"{row['name']}, {rate:g}{', cosine' if falls else ''}"


def main(config: Config) -> None:
    """Race, print the table, write the picture."""
    rows = run(config)
    levels = {"autoencoder": min(config.levels)}
    picture = figures.curves(rows, "training loss above its floor, nats an image", levels=levels)
    figures.present([table(rows, config)], picture, config.output / "race.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
