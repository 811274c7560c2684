"""Which learning rate and damping are best for each method on a problem, if all have the same number of trials?

A trial is a short run from the same start on the same batches; the setting with the least training loss at its end is
the best. Every method tries its usual setting, of its authors or of earlier trials, and as many more within the ranges
of `methods`: drawn log-uniformly, one in each stratum, or as a grid at equal ratios, ends included. What is done is
kept, line by line, and not done again. `make autoencoder` and `make classify` run every method at the best that is kept
here; of a classifier the trials have their `--channels`, `--units` and `--depth`, and `methods.Shared()`.

Expected: with six trials every method within a tenth of its best loss, but for those whose stable settings are a narrow
diagonal (of K-FAC and its relatives the step is the learning rate over the damping), where half the trials diverge.

    make tune                                                       (MNIST; some 40 minutes on two cores)
    make tune ARGS="--problem curves --budget 6 --epochs 10"
    make tune ARGS="--only K-FAC --rates 0.1 0.3 --dampings 3 10"   (these settings, in place of drawn ones)
    make tune ARGS="--problem fashion --images 25600 --epochs 1"    (the convnet of `make classify`)
    make tune ARGS="--smoke"                                        (seconds)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.table import Table

from experiments import figures
from experiments.data import Data
from experiments.methods import METHODS, Range
from experiments.problems import Choice, Problem
from experiments.records import Records, keep, kept, machine, numbers
from experiments.running import Runner, Setting, progress


@dataclass(frozen=True)
class Config(Choice):
    """The numbers that all methods share.

    Attributes:
        budget: trials of every method beside its usual setting.
        epochs: passes of a trial.
        how: the settings are drawn, or a grid.
        rates: learning rates to be tried instead, each with each of the dampings.
        dampings: for these; the usual one if empty.
        images: only the first so many for training; all if None.
        seed: of the settings, of the initial parameters, the order of the data and the labels drawn.
    """

    budget: int = 6
    epochs: int = 2
    how: Literal["drawn", "grid"] = "drawn"
    rates: tuple[float, ...] = ()
    dampings: tuple[float, ...] = ()
    images: int | None = None
    seed: int = 0


def settings(found: Range, budget: int, how: str, seed: Iterable[int]) -> list[Setting]:
    """So many settings within a range, to three digits, drawn from a seed or a grid; one if nothing is tuned."""
    ends = [(low, high) for low, high in zip(found.least, found.most, strict=True) if low < high]
    if not ends:
        return [found.usual]
    if how == "grid":
        fewer = max(count for count in range(1, int(budget**0.5) + 1) if budget % count == 0)
        counts = (budget,) if len(ends) == 1 else (budget // fewer, fewer)
        axes = [np.geomspace(*pair, count) for pair, count in zip(ends, counts, strict=True)]
        columns = np.array(list(product(*axes))).T
    else:
        rng = np.random.default_rng(list(seed))
        places = [(rng.permutation(budget) + rng.random(budget)) / budget for _ in ends]
        columns = np.array([low * (high / low) ** place for (low, high), place in zip(ends, places, strict=True)])
    rounded = [[float(f"{number:.3g}") for number in column] for column in columns]
    if len(ends) == 1:
        rounded.append([found.usual.damping] * budget)
    return sorted(map(Setting, *rounded))


def tried(name: str, config: Config) -> list[Setting]:
    """The settings of a method."""
    found = METHODS[name].ranges[config.what.kind]
    if config.rates:
        return [Setting(*pair) for pair in product(config.rates, config.dampings or (found.usual.damping,))]
    within = settings(found, config.budget, config.how, (config.seed, crc32(name.encode())))
    return list(dict.fromkeys((found.usual, *within)))


def group(what: Problem, data: Data, batch: int) -> dict[str, Any]:
    """What tells the trials on a problem from those on any other."""
    return {"data": data.name, **what.fields, "batch": batch}


def best(path: Path, name: str, key: Mapping[str, Any]) -> Setting | None:
    """The setting of the trial with the least loss, among those with most epochs; None if there is none."""
    known = kept(path, {"name": name, **key})
    most = max((record["epochs"] for record in known), default=0)
    whole = [record for record in known if record["epochs"] == most and record["loss"] is not None]
    if not whole:
        return None
    record = min(whole, key=lambda record: record["loss"])
    return Setting(record["rate"], record["damping"])


def trials(name: str, data: Data, config: Config) -> Callable[[Setting], dict[str, Any]]:
    """A method, compiled: setting -> what the record of a trial has, its loss None if it diverged."""
    method, what = METHODS[name], config.what
    task, usual = what.task(data, config.size, config.seed), method.ranges[what.kind].usual
    runner = Runner(method.make(what.kind), usual, task, method.labels)

    def run(setting: Setting) -> dict[str, Any]:
        seconds, losses = 0.0, np.zeros(1)
        runner.begin(setting)
        if method.warms(what.kind):
            runner.warm(what.stream(data.train, config.size, config.seed, 0))
        for epoch in range(config.epochs):
            losses, took = runner.run(what.stream(data.train, config.size, config.seed, epoch))
            seconds += took
            if not np.isfinite(losses[-1]):
                break
        loss = what.measured(runner.variables, data)["train_loss"] if np.isfinite(losses[-1]) else None
        return {"loss": loss, "seconds": round(seconds, 2)}

    return run


def run(config: Config) -> Records:
    """Every trial that is not in the file yet; the records of all. A `ValueError` if there is no method of a name."""
    names, whole = config.chosen(METHODS), config.loaded()
    data = whole._replace(train=whole.train.first(config.images or len(whole.train.labels)))
    key = group(config.what, data, config.size)
    key |= {"images": len(data.train.labels), "seed": config.seed, "epochs": config.epochs}
    path, records = config.output / "tune.jsonl", []
    for name in names:
        compiled, wanted = cache(lambda name=name: trials(name, data, config)), tried(name, config)
        with progress(name, 0, len(wanted), "trial") as say:
            for count, setting in enumerate(wanted, 1):
                own: dict[str, Any] = {"name": name, **setting._asdict(), **key}
                if not (known := kept(path, own)):
                    known = [own | machine() | compiled()(setting)]
                    keep(path, known)
                records.append(record := known[-1])
                steps = config.epochs * (len(data.train.labels) // config.size)
                say(count, float(record["loss"] or np.nan), record["seconds"] / steps)
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
    """Run, print the table; in little with a tiny net, two methods and three trials of an epoch."""
    if config.smoke:
        only = config.only or ("SGD-m", "K-BFGS")
        tiny: Any = {"only": only, "channels": 2, "units": 8, "depth": 8, "budget": 2, "epochs": 1, "batch": 300}
        config = replace(config, output=config.output / "smoke", **tiny)
    records, title = run(config), config.what.title
    path = config.output / f"tune_{config.problem}.png"
    figures.present([table(records, title)], picture(records, title), path)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
