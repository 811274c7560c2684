"""Which method trains the convnet of TENGraD best, per epoch and per second?

The net is the one of TENGraD's paper for Fashion-MNIST, "3C1F": three convolutions of 3x3 with padding and ReLU, a max
pool of 3, a dense layer with ReLU and one of logits. The paper's has 128 channels and 500 units and is work for a GPU;
with 16 or 32 channels it has 128 units. 60,000 images with pixels in [0, 1], batches of 128, weights and biases uniform
in +-1/sqrt(fan in) at the start, a constant learning rate, momentum 0.9. As in the paper all is refreshed at every
100th step; statistics that are averaged, and the scales of EKFAC and TEKFAC, are taken at every 20th. The weight decay
is decoupled and the same for all. `kl_clip` holds for all methods that have it, or for none. How each method is made
stands in `methods`; "adaptive" and SOAP keep periods of their own.

Every method has the best setting among the trials of `make tune` on the same problem, net and batch, an equal number
for each; where there are none, the usual setting of `methods`. Periods, decay and clip of the trials are the defaults
here; they choose also where a run has others. All runs of a seed have the same initial parameters and the same batches
in the same order. Losses and accuracies are of all images, without the weight decay, measured outside the clock. With
several seeds the table has medians and ranges, the picture lines and bands.

Expected: per epoch TENGraD at least level with K-FAC and EKFAC, and all of them ahead of SGD-m; per second, on two CPU
cores, nothing far ahead of Adam: with so few channels a second-order step costs up to twice one of SGD-m. What was
found stands in `results/report.md` beside this file. There, every method had nine trials: those of SGD-m, Adam, K-FAC,
EKFAC and TENGraD a grid around the settings of TENGraD's paper, those of the others the usual setting and `--budget 8`.

Seconds: what a run took is in its record, but a machine that was busy at one method and idle at the next says nothing
about the two. So the picture's seconds are made of what a step costs, measured apart: all methods in turn in one
process, 20 steps at a time, over the first refresh period (with its early refreshes) and over later ones, each in units
of the same periods of SGD-m; times the step of SGD-m when it was least disturbed. No compilation is in either.

Every epoch is kept, line by line, and a run that was interrupted, or is asked for more epochs, goes on from its last
whole one. Whoever changes a setting runs only what depends on it.

    make tune ARGS="--problem fashion --images 25600 --epochs 1 --budget 8"    (first the trials)
    make classify                                     (says beforehand how long it will take)
    make classify ARGS=--estimate                     (says so, and no more)
    make classify ARGS="--channels 32 --only TENGraD K-FAC --seeds 0 1 2"
    make classify ARGS="--only TENGraD --refresh-every 10"
    make classify ARGS="--problem cifar10 --depth 32" (a ResNet, for a GPU; batch norm, random crops, mirrored)
    make classify ARGS="--problem digits --epochs 30" (a small convnet, on what scikit-learn brings along)
    make classify ARGS="--smoke"                      (a minute, on the digits)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import tune
from experiments.data import Data, folder, told
from experiments.methods import BASELINE, METHODS, Shared
from experiments.problems import Name, Problem, problem
from experiments.records import Records, kept
from experiments.tables import by_seed, spread
from experiments.training import Pace, Runner, Runners, Setting, Task, known_pace, paced, resumable


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share.

    Attributes:
        output: folder of the records, of the states from which runs go on, and of the picture; of the trials, too.
        only: names of the methods; all if empty.
        problem: Fashion-MNIST with the net of the paper; CIFAR-10 with a ResNet; the digits with a small convnet.
        depth: of the ResNet.
        channels: of the convolutions, of the first ones if there are more later; 128 in the paper.
        units: of the hidden dense layer; None for 500 at 128 channels, as in the paper, and 128 at fewer.
        epochs: passes over the data.
        batch: images in a step.
        refresh_every: steps between refreshes.
        statistics_every: steps between statistics, for methods that average them.
        weight_decay: strength, for all methods; 0 for none.
        kl_clip: bound on a step, for all methods that have one; 0 for none.
        seeds: each of initial parameters, the order of the data and the labels drawn.
        rounds: how many refresh periods after the first are timed, at least one.
        estimate: only measure what a step costs, and say how long the runs will take.
        smoke: a tiny net on the digits, enlarged to the size of the images, to see that everything runs.
        data: a folder with the files as they were published; without it they are downloaded. See `data`.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    problem: Name = "fashion"
    depth: int = 20
    channels: int = 16
    units: int | None = None
    epochs: int = 3
    batch: int = 128
    refresh_every: int = Shared().refresh_every
    statistics_every: int = Shared().statistics_every
    weight_decay: float = Shared().weight_decay
    kl_clip: float = Shared().kl_clip
    seeds: tuple[int, ...] = (0,)
    rounds: int = 1
    estimate: bool = False
    smoke: bool = False
    data: Path | None = field(default_factory=folder)

    @property
    def shared(self) -> Shared:
        """What goes into every method."""
        return Shared(self.refresh_every, self.statistics_every, self.weight_decay, self.kl_clip)


def chosen(config: Config) -> Problem:
    """The problem of a configuration."""
    return problem(config.problem, config.channels, config.units, config.depth)


def load(config: Config) -> Data:
    """The data of the problem, or for a smoke test the digits in the size of its images."""
    return chosen(config).enlarged_digits() if config.smoke else chosen(config).load(config.data)


def wanted(data: Data, config: Config) -> dict[str, Setting]:
    """What is to be run.

    Args:
        data: of the problem.
        config: the numbers.

    Returns:
        Name of a method -> its setting.

    Raises:
        ValueError: if a name is unknown, or there is no epoch to be run.
    """
    if unknown := set(config.only) - set(METHODS):
        raise ValueError(f"There is no {sorted(unknown)}; there are {list(METHODS)}.")
    if config.epochs < 1:
        raise ValueError(f"`epochs` is {config.epochs}, expected 1 or more; `estimate` says how long they take.")
    path, key = config.output / "tune.jsonl", tune.group(chosen(config), data, config.batch)
    names = [name for name in METHODS if not config.only or name in config.only]
    return {name: tune.best(path, name, key) or METHODS[name].ranges["classifier"].usual for name in names}


def identity(name: str, setting: Setting, seed: int, data: Data, config: Config) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for how long it is."""
    return {
        "name": name,
        **setting._asdict(),
        "data": data.name,
        "images": len(data.train.labels),
        **chosen(config).fields,
        **common(config),
        "kl_clip": clip(name, config),
        "seed": seed,
    }


def common(config: Config) -> dict[str, Any]:
    """What all runs of a configuration share, beside the problem."""
    periods = [config.refresh_every, config.statistics_every]
    return {"batch": config.batch, "periods": periods, "weight_decay": config.weight_decay}


def clip(name: str, config: Config) -> float:
    """The clip of a method; 0 if it has none."""
    return config.kl_clip if METHODS[name].clips else 0.0


def compiled(name: str, data: Data, config: Config) -> Runner:
    """A method on the problem, for all settings and seeds."""
    what, method = chosen(config), METHODS[name]
    task = Task(what.net, what.likelihood, data.train.first(config.batch), options={"train": True})
    make = method.make("classifier", config.shared)
    return Runner(make, method.ranges["classifier"].usual, task, method.labels)


def train(name: str, setting: Setting, seed: int, runners: Runners, data: Data, config: Config) -> Records:
    """One run of one seed, from where it stopped if it did.

    Args:
        name: of the method.
        setting: its own.
        seed: its seed.
        runners: name -> runner.
        data: of training and testing.
        config: the numbers.

    Returns:
        A record for the start and for every epoch.
    """
    what = chosen(config)

    def start() -> Runner:
        runner = runners(name)
        runner.begin(setting, seed)
        return runner

    return resumable(
        records_path(config),
        identity(name, setting, seed, data, config),
        start,
        lambda epoch: what.stream(data.train, config.batch, seed, epoch),
        lambda runner: what.measured(runner.variables, data),
        epochs=config.epochs,
        steps=steps(data, config),
    )


def steps(data: Data, config: Config) -> int:
    """Of an epoch."""
    return len(data.train.labels) // config.batch


def records_path(config: Config) -> Path:
    """Where the epochs of runs are kept."""
    return config.output / "classify.jsonl"


def cost(names: Iterable[str], data: Data, config: Config) -> Pace:
    """What a step of each method costs, measured unless it is in the file."""
    return paced(
        paces_path(config),
        pace_key(data, config),
        lambda: {name: compiled(name, data, config) for name in METHODS if name in {*names, BASELINE}},
        names,
        lambda: list(chosen(config).stream(data.train.first(40 * config.batch), config.batch, 0, 0)),
        period=config.refresh_every,
        rounds=config.rounds,
        baseline=BASELINE,
    )


def paces_path(config: Config) -> Path:
    """Where the costs of steps are kept."""
    return config.output / "classify_paces.jsonl"


def pace_key(data: Data, config: Config) -> dict[str, Any]:
    """What tells costs of steps from all others."""
    periods = [config.refresh_every, config.statistics_every]
    return tune.group(chosen(config), data, config.batch) | {"periods": periods, "rounds": config.rounds}


def plan(settings: dict[str, Setting], pace: Pace, data: Data, config: Config) -> str:
    """How long what is left to do will take, on a machine with nothing else to do."""
    images = len(data.train.labels) + len(data.test.labels)
    measuring = 0.4 * pace.idle * images / config.batch  # a forward pass
    epochs, seconds = 0, 0.0
    for name, setting in settings.items():
        for seed in config.seeds:
            known = kept(records_path(config), identity(name, setting, seed, data, config))
            left = config.epochs - max(len({record["epoch"] for record in known}) - 1, 0)
            if left > 0:
                epochs += left
                seconds += pace.seconds(name, left * steps(data, config), 0) + left * measuring
    costs = ", ".join(f"{name} {pace.later[name]:.2f}" for name in settings if name != BASELINE)
    return (
        f"{chosen(config).title}: a step of {BASELINE} takes {1000 * pace.idle:.0f} ms; so many times as long take "
        f"{costs}.\nLeft: {epochs} epochs in all, {seconds / 60:.1f} minutes on an idle machine."
    )


class Found(NamedTuple):
    """All that was found: settings, the records of each method by seed (none of an estimate), and the cost of steps."""

    settings: dict[str, Setting]
    records: dict[str, list[Records]]
    pace: Pace

    def numbers(self, name: str, entry: str) -> np.ndarray:
        """An entry of the records of a method [seeds, epochs + 1]; infinite where it has diverged."""
        return by_seed(self.records[name], entry)

    def clock(self, name: str, epochs: np.ndarray) -> np.ndarray:
        """Seconds after so many epochs, by the cost of a step."""
        first = self.records[name][0][0]
        per_epoch, period = first["images"] // first["batch"], first["periods"][0]
        return np.array([self.pace.seconds(name, epoch * per_epoch, period) for epoch in epochs])


def run(config: Config, report: Callable[[str], None] = lambda line: None) -> Found:
    """The timing and the runs, but for what is in the files.

    Args:
        config: the numbers.
        report: told what it will take.

    Returns:
        What was found.
    """
    data = load(config)
    settings, runners = wanted(data, config), lru_cache(maxsize=1)(lambda name: compiled(name, data, config))
    config.output.mkdir(parents=True, exist_ok=True)
    pace = cost(settings, data, config)
    report(plan(settings, pace, data, config))
    if config.estimate:
        return Found(settings, {}, pace)
    records = {
        name: [train(name, setting, seed, runners, data, config) for seed in config.seeds]
        for name, setting in settings.items()
    }
    return Found(settings, records, pace)


def found_in(config: Config) -> Found | None:
    """What the records have of a problem: of each method one setting, with every seed that is at the last epoch.

    Args:
        config: the problem, the numbers that all methods share, and the folder.

    Returns:
        Runs at the settings of the trials, and where these have none, at the last one that has any; None without any.

    Raises:
        ValueError: if there are runs, and not what their steps cost.
    """
    runs: dict[tuple[str, Setting], dict[int, dict[int, Any]]] = {}
    for row in kept(records_path(config), {**chosen(config).fields, **common(config)}):
        if row["name"] in METHODS and row["kl_clip"] == clip(row["name"], config) and row["epoch"] <= config.epochs:
            own = runs.setdefault((row["name"], Setting(row["rate"], row["damping"])), {})
            own.setdefault(row["seed"], {})[row["epoch"]] = row
    at_the_end = {
        key: [list(epochs.values()) for epochs in seeds.values() if len(epochs) > config.epochs]
        for key, seeds in runs.items()
    }
    whole = {key: seeds for key, seeds in at_the_end.items() if seeds}
    if not whole:
        return None
    data = told(row for seeds in whole.values() for rows in seeds for row in rows)
    best = wanted(data, config)
    settings = {name: setting for name, setting in whole if setting == best[name] or (name, best[name]) not in whole}
    settings = {name: settings[name] for name in METHODS if name in settings}
    pace = known_pace(paces_path(config), pace_key(data, config), settings)
    if pace is None:
        known = f"runs of {chosen(config).title}"
        raise ValueError(f"{config.output} has {known} and not what their steps cost; `--estimate` measures it.")
    return Found(settings, {name: whole[name, setting] for name, setting in settings.items()}, pace)


def table(found: Found, config: Config) -> Table:
    """Loss and accuracy after some epochs, and what a step costs."""
    result = Table(
        title=f"Training loss, and test accuracy in %; {chosen(config).title}",
        caption="In square brackets the range over seeds. A step over SGD-m's: all methods in turn in one process, "
        "after the first refresh period. The seconds are of all epochs at that cost.",
        caption_justify="left",
    )
    epochs = sorted({epoch for epoch in (1, 2, 3, 5, 10, 20, config.epochs) if epoch <= config.epochs})
    result.add_column("method", no_wrap=True)
    for heading in ("rate, damping", *(f"epoch {epoch}" for epoch in epochs), "a step / SGD-m's", "s"):
        result.add_column(heading, justify="right")
    for name, setting in found.settings.items():
        losses, accuracies = found.numbers(name, "train_loss"), 100 * found.numbers(name, "test_accuracy")
        between = "  " if len(losses) == 1 else "\n"
        result.add_row(
            name,
            str(setting) if METHODS[name].tuned else "its own",
            *(spread(losses[:, epoch], 4) + between + spread(accuracies[:, epoch], 2) for epoch in epochs),
            f"{found.pace.later[name]:.2f}",
            f"{found.clock(name, np.array([config.epochs]))[0]:.0f}",
        )
    return result


def picture(found: Found, config: Config) -> Figure:
    """Training loss and test accuracy, against epochs and seconds; in thin lines the losses of batches, of a few runs.

    Runs that stay below half of the best accuracy are below the axis, so that the others can be told apart.

    Args:
        found: what was found.
        config: the numbers.

    Returns:
        The picture.
    """
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), sharex="col", sharey="row", layout="constrained")
    colors, reached, epochs = plt.get_cmap("tab20"), [], np.arange(1, config.epochs + 1)
    for name, seeds in found.records.items():
        color = colors(list(METHODS).index(name) % 20)
        losses, accuracies = found.numbers(name, "train_loss")[:, 1:], 100 * found.numbers(name, "test_accuracy")[:, 1:]
        losses = np.where(np.isfinite(losses), losses, np.nan)
        batches = np.array([[row["batch_losses"] for row in rows[1:]] for rows in seeds], float)
        middles = (np.arange(batches[0].size) + 0.5) / batches.shape[-1]
        style = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1.6, "label": name}
        for column, time in enumerate((lambda epochs: epochs, lambda epochs, name=name: found.clock(name, epochs))):
            for axis, numbers in zip(axes[:, column], (losses, accuracies), strict=True):
                axis.plot(time(epochs), np.median(numbers, axis=0), **style)
                band = {"color": color, "alpha": 0.2, "linewidth": 0}
                axis.fill_between(time(epochs), numbers.min(axis=0), numbers.max(axis=0), **band)
            if len(found.records) <= 6:
                lines = {"color": color, "linewidth": 0.8, "alpha": 0.6}
                axes[0, column].plot(time(middles), np.median(batches, axis=0).ravel(), **lines)
        reached.extend(np.median(accuracies, axis=0))
    for axis in axes.flat:
        axis.grid(alpha=0.2, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(yscale="log", ylabel="training loss, nats an image")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("{x:g}")
    above = [accuracy for accuracy in reached if accuracy >= max(reached) / 2]
    lowest = min(above) - 0.1 * (max(above) - min(above)) - 0.1
    axes[1, 0].set(ylabel="test accuracy, %", xlabel="epochs", ylim=(lowest, None))
    axes[1, 1].set(xlabel="seconds on the idle machine (see the experiment)")
    axes[0, 0].set_title(chosen(config).title, loc="left", fontweight="bold")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def small(config: Config) -> Config:
    """A tiny net on the digits, a few methods of two seeds, a few steps, in a folder of its own."""
    return replace(
        config,
        output=config.output / "smoke",
        only=config.only or ("SGD-m", "TENGraD", "K-BFGS"),
        smoke=True,
        depth=8,
        channels=3,
        units=8,
        epochs=1,
        batch=100,
        refresh_every=5,
        statistics_every=2,
        seeds=(0, 1),
    )


def main(config: Config) -> None:
    """Say what it takes, run, print the table, write the picture."""
    config, console = small(config) if config.smoke else config, Console(width=180)
    found = run(config, console.print)
    if config.estimate:
        return
    console.print(table(found, config))
    path = config.output / f"classify_{chosen(config).stem}.png"
    picture(found, config).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
