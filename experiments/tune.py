"""Which learning rate and damping are best for each method on a problem, if all have the same number of trials?

A trial is a short run from the same start on the same batches; the setting with the least training loss at its end is
the best. Every method tries its usual setting, of its authors or of earlier trials, and as many more within the ranges
of `methods`. By default each number is drawn log-uniformly, in strata: of six learning rates one lies in each sixth of
the range, and so do the dampings, in another order. As a grid, the numbers stand at equal ratios, ends included; six
are then three learning rates by two dampings, or six learning rates where there is no damping. What is not tuned,
"adaptive", has one trial.

Expected: with six trials every method within a tenth of its best loss, but for those whose stable settings are a narrow
diagonal (of K-FAC and its relatives the step is the learning rate over the damping), where half the trials diverge.

What is done is kept, line by line, and not done again; whoever raises the budget pays for all trials, since the strata
move, unless a setting is the same. `make autoencoder` and `make classify` run every method at the best that is kept
here. The trials with most epochs count, of any budget. In the table * marks a best number at an edge of what was tried:
try beyond it.

A trial on a classifier has the model, batches and options of a run of `make classify` with the same `--channels`,
`--units` and `--depth`; periods, weight decay and clip are `methods.Shared()`, the defaults there.

    make tune                                                       (MNIST; some 40 minutes on two cores)
    make tune ARGS="--problem curves --budget 6 --epochs 10"
    make tune ARGS="--only K-FAC --rates 0.1 0.3 --dampings 3 10"   (these settings, in place of drawn ones)
    make tune ARGS="--problem fashion --images 25600 --epochs 1"    (the convnet of `make classify`)
    make tune ARGS="--smoke"                                        (seconds)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

from experiments.data import Data, folder
from experiments.methods import METHODS, Kind, Range
from experiments.problems import Name, Problem, Reconstructed, Reconstruction, problem, reconstruction
from experiments.records import Records, keep, kept, machine
from experiments.training import Runner, Setting, Task, shown


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share.

    Attributes:
        output: folder of the records.
        only: names of the methods; all if empty.
        problem: an autoencoder, or a problem of classification.
        budget: trials of every method beside its usual setting.
        epochs: passes of a trial.
        how: the settings are drawn, or a grid.
        rates: learning rates to be tried instead, each with each of the dampings.
        dampings: for these; the usual one if empty.
        batch: examples in a step; by default 1000 on an autoencoder, 128 on a classifier.
        images: only the first so many for training; all if None.
        seed: of the settings, of the initial parameters, the order of the data and the labels drawn.
        channels: of a classifier's convolutions, of the first ones if there are more later.
        units: of its hidden dense layer on Fashion-MNIST; None for 500 at 128 channels, and 128 at fewer.
        depth: of the ResNet on CIFAR-10.
        smoke: a tiny net on enlarged digits, to see that everything runs.
        data: a folder with the files as they were published; without it they are downloaded. See `data`.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    problem: Reconstructed | Name = "mnist"
    budget: int = 6
    epochs: int = 2
    how: Literal["drawn", "grid"] = "drawn"
    rates: tuple[float, ...] = ()
    dampings: tuple[float, ...] = ()
    batch: int | None = None
    images: int | None = None
    seed: int = 0
    channels: int = 16
    units: int | None = None
    depth: int = 20
    smoke: bool = False
    data: Path | None = field(default_factory=folder)

    @property
    def kind(self) -> Kind:
        """Of the problem."""
        return "autoencoder" if self.problem in get_args(Reconstructed) else "classifier"


def chosen(config: Config) -> Problem | Reconstruction:
    """The problem of a configuration."""
    if config.kind == "autoencoder":
        return reconstruction(config.problem, config.smoke)  # type: ignore[bad-argument-type]
    name = "digits" if config.smoke else config.problem
    return problem(name, config.channels, config.units, config.depth)  # type: ignore[bad-argument-type]


def settings(found: Range, budget: int, how: str, seed: Iterable[int]) -> list[Setting]:
    """The settings of so many trials within a range; one if nothing is tuned.

    Args:
        found: the range.
        budget: how many.
        how: "drawn" or "grid".
        seed: of what is drawn.

    Returns:
        Settings, to three digits.
    """
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
    found = METHODS[name].ranges[config.kind]
    if config.rates:
        return [Setting(*pair) for pair in product(config.rates, config.dampings or (found.usual.damping,))]
    within = settings(found, config.budget, config.how, (config.seed, crc32(name.encode())))
    return list(dict.fromkeys((found.usual, *within)))


def group(what: Problem | Reconstruction, data: Data, batch: int) -> dict[str, Any]:
    """What tells the trials on a problem from those on any other."""
    return {"data": data.name, **what.fields, "batch": batch}


def best(path: Path, name: str, key: Mapping[str, Any]) -> Setting | None:
    """The setting of the trial with the least loss, among those with most epochs; None if there is none.

    Args:
        path: of the records of trials.
        name: of the method.
        key: of `group`.

    Returns:
        The setting.
    """
    known = kept(path, {"name": name, **key})
    most = max((record["epochs"] for record in known), default=0)
    whole = [record for record in known if record["epochs"] == most and record["loss"] is not None]
    if not whole:
        return None
    record = min(whole, key=lambda record: record["loss"])
    return Setting(record["rate"], record["damping"])


Trial = Callable[[Setting], dict[str, Any]]


def trials(name: str, what: Problem | Reconstruction, data: Data, batch: int, config: Config) -> Trial:
    """A method, compiled: setting -> what the record of a trial has, its loss None if it diverged."""
    method = METHODS[name]
    task = Task(what.net, what.likelihood, data.train.first(batch), config.seed, {"train": True})
    usual = method.ranges[config.kind].usual
    runner = Runner(method.make(config.kind), usual, task, method.labels)

    def run(setting: Setting) -> dict[str, Any]:
        seconds, losses = 0.0, np.zeros(1)
        runner.begin(setting)
        if method.warm and config.kind == "autoencoder":
            runner.warm(what.stream(data.train, batch, config.seed, 0))
        for epoch in range(config.epochs):
            losses, took = runner.run(what.stream(data.train, batch, config.seed, epoch))
            seconds += took
            if not np.isfinite(losses[-1]):
                break
        loss = what.measured(runner.variables, data)["train_loss"] if np.isfinite(losses[-1]) else None
        return {"loss": loss, "seconds": round(seconds, 2)}

    return run


def run(config: Config) -> Records:
    """Every trial that is not in the file yet.

    Args:
        config: the numbers.

    Returns:
        The records of all trials of the methods.

    Raises:
        ValueError: if there is no method of a name.
    """
    if unknown := set(config.only) - set(METHODS):
        raise ValueError(f"There is no {sorted(unknown)}; there are {list(METHODS)}.")
    names, what = [name for name in METHODS if not config.only or name in config.only], chosen(config)
    whole = what.load(None if config.smoke else config.data)
    data = whole._replace(train=whole.train.first(config.images or len(whole.train.labels)))
    batch = config.batch or (1000 if config.kind == "autoencoder" else 128)
    key = group(what, data, batch) | {"images": len(data.train.labels), "seed": config.seed, "epochs": config.epochs}
    path, records = config.output / "tune.jsonl", []
    for name in names:
        compiled = cache(lambda name=name: trials(name, what, data, batch, config))
        wanted = tried(name, config)
        with shown(name, 0, len(wanted), "trial") as say:
            for count, setting in enumerate(wanted, 1):
                own: dict[str, Any] = {"name": name, **setting._asdict(), **key}
                if not (known := kept(path, own)):
                    known = [own | machine() | compiled()(setting)]
                    keep(path, known)
                records.append(record := known[-1])
                steps = config.epochs * (len(data.train.labels) // batch)
                say(count, float(record["loss"] or np.nan), record["seconds"] / steps)
    return records


def table(records: Records, title: str) -> Table:
    """The best setting of every method, and how the others did."""
    result = Table(
        title=f"Training loss after {records[0]['epochs']} epoch(s) of {records[0]['images']} images; {title}",
        caption="best: learning rate, damping; *: at an edge of what was tried.",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("best", "loss", "median loss", "diverged", "trials"):
        result.add_column(heading, justify="right")
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        losses = np.array([np.inf if record["loss"] is None else record["loss"] for record in own])
        record = own[int(np.argmin(losses))]
        setting = starred(record, own) if METHODS[name].tuned else "its own"
        least, median = (f"{loss:.5g}" if np.isfinite(loss) else "-" for loss in (losses.min(), np.median(losses)))
        numbers = (least, median, f"{np.isinf(losses).sum()}", f"{len(own)}")
        result.add_row(name, setting if np.isfinite(losses.min()) else "-", *numbers)
    return result


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
    options: dict[str, Any] = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=(0.6 + 2.5 * columns, 0.8 + 2.1 * rows), **options)
    highest = max(record["loss"] or 0.0 for record in records)
    for axis, name in zip(axes.flat, names, strict=False):
        own = [record for record in records if record["name"] == name]
        rates, dampings = (np.array([record[entry] for record in own]) for entry in ("rate", "damping"))
        losses = np.array([record["loss"] for record in own], float)
        depth = np.log(dampings / dampings.min()) if dampings.min() < dampings.max() else np.zeros(len(own))
        good = np.isfinite(losses)
        for these, heights, marker in ((good, losses, "o"), (~good, np.full(len(own), highest), "x")):
            shades = {"c": depth[these], "cmap": "viridis", "vmin": 0, "vmax": max(depth.max(), 1)}
            axis.scatter(rates[these], heights[these], 36, marker=marker, **shades)
        if good.any():
            best = np.nanargmin(losses)
            axis.plot(rates[best], losses[best], "o", markersize=11, markerfacecolor="none", markeredgecolor="black")
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.set(xscale="log", yscale="log")
        for scale, ticks in ((axis.xaxis, (1, 3)), (axis.yaxis, (1, 2, 3, 5, 7))):
            scale.set_major_locator(LogLocator(subs=ticks))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("")
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.2, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel(
        "learning rate (violet to yellow: small to large damping; cross: diverged; ring: best)", fontsize=10
    )
    figure.supylabel("training loss of a trial", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def small(config: Config) -> Config:
    """A tiny net on the digits, two methods, three trials of an epoch, in a folder of its own."""
    only = config.only or ("SGD-m", "K-BFGS")
    return replace(config, output=config.output / "smoke", only=only, channels=2, budget=2, epochs=1, batch=300)


def main(config: Config) -> None:
    """Run, print the table."""
    config, console = small(config) if config.smoke else config, Console(width=160)
    records, title = run(config), chosen(config).title
    console.print(table(records, title))
    path = config.output / f"tune_{config.problem}.png"
    picture(records, title).savefig(path, dpi=110)
    console.print(f"Picture: {path}; records: {config.output / 'tune.jsonl'}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
