"""Which learning rate and damping are best for each method on a problem, if all have the same number of trials?

A trial is a short run from the same start on the same batches; the setting with the least training loss at its end is
the best. Every method tries its usual setting, of its authors or of earlier trials, and as many more within the ranges
of `methods`, drawn log-uniformly, one in each stratum. What is done is kept, line by line, and not done again. `make
autoencoder` and `make classify` run every method at the best that is kept here.

Expected: with six trials every method within a tenth of its best loss, but for those whose stable settings are a narrow
diagonal (of K-FAC and its relatives the step is the learning rate over the damping), where half the trials diverge.

    make tune                                                       (MNIST; some 40 minutes on two cores)
    make tune ARGS="--problem curves --budget 6 --epochs 10"
    make tune ARGS="--problem fashion --images 25600 --epochs 1"    (the convnet of `make classify`)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.progress import track
from rich.table import Table

from experiments import figures
from experiments.data import Data
from experiments.methods import METHODS
from experiments.problems import Choice
from experiments.records import Records, chosen, keep, kept, machine, numbers
from experiments.running import Runner, Setting


@dataclass(frozen=True)
class Config(Choice):
    """The numbers that all methods share.

    Attributes:
        budget: trials of every method beside its usual setting.
        epochs: passes of a trial.
        images: only the first so many for training; all if None.
    """

    budget: int = 6
    epochs: int = 2
    images: int | None = None


def best(path: Path, name: str, key: Mapping[str, Any]) -> Setting | None:
    """The setting of the trial with the least loss, among those with most epochs; None if there is none."""
    known = kept(path, {"name": name, **key})
    most = max((record["epochs"] for record in known), default=0)
    whole = [record for record in known if record["epochs"] == most and record["loss"] is not None]
    if not whole:
        return None
    record = min(whole, key=lambda record: record["loss"])
    return Setting(record["rate"], record["damping"])


def trial(setting: Setting, runner: Runner, is_warm: bool, data: Data, config: Config) -> dict[str, Any]:
    """A short run of a method that is compiled: what its record has, the loss None if it diverged."""
    seconds, losses, what = 0.0, np.zeros(1), config.what
    runner.begin(setting)
    if is_warm:
        runner.warm(what.stream(data.train, 0, 0))
    for epoch in range(config.epochs):
        losses, took = runner.run(what.stream(data.train, 0, epoch))
        seconds += took
        if not np.isfinite(losses[-1]):
            return {"loss": None, "seconds": round(seconds, 2)}
    return {"loss": what.measured(runner.variables, data)["train_loss"], "seconds": round(seconds, 2)}


def run(config: Config) -> Records:
    """Every trial that is not in the file yet; the records of all. A `ValueError` if there is no method of a name."""
    names, what = chosen(METHODS, config.only), config.what
    data = what.data(config.data)
    data = data._replace(train=data.train.first(config.images or len(data.train.labels)))
    key = what.key(data) | {"images": len(data.train.labels), "seed": 0, "epochs": config.epochs}
    path, records = config.output / "tune.jsonl", []
    for name in names:
        method, within = METHODS[name], METHODS[name].ranges[what.kind]
        settings = dict.fromkeys((within.usual, *within.drawn(config.budget, (0, crc32(name.encode())))))
        runner = cache(lambda m=method, usual=within.usual: Runner(m.make(what.kind), usual, what.task(data), m.labels))
        for setting in track(settings, description=f"{name}: trials"):
            own: dict[str, Any] = {"name": name, **setting._asdict(), **key}
            if not (known := kept(path, own)):
                known = [own | machine() | trial(setting, runner(), method.warms(what.kind), data, config)]
                keep(path, known)
            records.append(known[-1])
    return records


def table(records: Records, title: str) -> Table:
    """The best setting of every method, and how the others did."""
    rows = []
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        losses = numbers(own, "loss")
        setting = starred(own[int(np.argmin(losses))], own) if METHODS[name].tuned else "its own"
        least, median = (f"{loss:.5g}" if np.isfinite(loss) else "-" for loss in (losses.min(), np.median(losses)))
        counts = f"{np.isinf(losses).sum()}", f"{len(own)}"
        rows.append((name, setting if np.isfinite(losses.min()) else "-", least, median, *counts))
    title = f"Training loss after {records[0]['epochs']} epoch(s) of {records[0]['images']} images; {title}"
    headings = ("method", "best", "loss", "median loss", "diverged", "trials")
    return figures.table(title, headings, rows, "best: learning rate, damping; *: at an edge of what was tried.")


def starred(record: Mapping[str, Any], records: Records) -> str:
    """The setting of a trial; with a star if a number of it is the least or the largest that was tried."""
    edges = []
    for number in ("rate", "damping"):
        values = [other[number] for other in records]
        edges.append(min(values) < max(values) and record[number] in (min(values), max(values)))
    return f"{Setting(record['rate'], record['damping'])}{'*' if any(edges) else ''}"


def picture(records: Records, title: str) -> Figure:
    """Loss against learning rate, a panel for each tuned method; the color is the damping, a cross a diverged trial."""
    names = [name for name in dict.fromkeys(record["name"] for record in records) if METHODS[name].tuned]
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure, axes = figures.panels(rows, columns, figsize=(0.6 + 2.5 * columns, 0.8 + 2.1 * rows), sharey=True)
    highest = max(record["loss"] or 0.0 for record in records)
    for axis, name in zip(axes.flat, names, strict=False):
        own = [record for record in records if record["name"] == name]
        rates, dampings, losses = (numbers(own, entry) for entry in ("rate", "damping", "loss"))
        depth = np.log(dampings / dampings.min()) if dampings.min() < dampings.max() else np.zeros(len(own))
        good = np.isfinite(losses)
        for these, heights, marker in ((good, losses, "o"), (~good, np.full(len(own), highest), "x")):
            shades = {"c": depth[these], "cmap": "viridis", "vmin": 0, "vmax": max(depth.max(), 1)}
            axis.scatter(rates[these], heights[these], 36, marker=marker, **shades)
        if good.any():
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black"}
            axis.plot(rates[np.argmin(losses)], losses.min(), "o", **ring)
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.set(xscale="log", yscale="log")
        for scale, ticks in ((axis.xaxis, (1, 3)), (axis.yaxis, (1, 2, 3, 5, 7))):
            scale.set_major_locator(LogLocator(subs=ticks))
            figures.plain(scale, "")
        axis.tick_params(which="both", labelsize=8)
    figures.clean(axes.flat, which="both")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    label = "learning rate (violet to yellow: small to large damping; cross: diverged; ring: best)"
    figure.supxlabel(label, fontsize=10)
    figure.supylabel("training loss of a trial", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def main(config: Config) -> None:
    """Run, print the table, write the picture."""
    records, title = run(config), config.what.title
    path = config.output / f"tune_{config.problem}.png"
    figures.present([table(records, title)], picture(records, title), path)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=figures.question(__doc__)))
