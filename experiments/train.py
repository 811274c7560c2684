"""Which method trains an autoencoder or a convnet best, per epoch and per second, and do they land on published curves?

Autoencoders (`make autoencoder`, MNIST unless `--problem` says otherwise): batches of 1000, a constant rate, and for
most second-order methods a pass over the data that fills the statistics, not counted. Runs called "authors" have the
settings of the authors' demonstrations of TNT and K-BFGS; what they logged stands beside. Classifiers (`make classify`,
Fashion-MNIST by the convnet of TENGraD): batches of 128, the same periods, decay and clip for all. Every method has the
best setting among the trials of `make tune`, else the usual one of `methods`. Runs of a seed have the same start and
batches. Seconds are those of a step, all methods in turn over the first refresh period and over later ones, in units of
SGD-m's, times the step of SGD-m when it was least disturbed. Every epoch is kept, and a run goes on where it stopped.

Expected: "authors" near what was logged, the best of ours as low as tuned Adam after ten epochs in half of its seconds,
off the plateau of the curves in a fifth of Adam's steps; on the convnet TENGraD level with K-FAC and EKFAC per epoch.

    make autoencoder ARGS="--estimate"                      (says how long it will take, and stops)
    make autoencoder ARGS="--only 'TNT (authors)' --epochs 3"
    make autoencoder ARGS="--problem curves --seeds 0 1 2"  (50 epochs)
    make classify ARGS="--channels 32 --only TENGraD K-FAC --refresh-every 10"
    make classify ARGS="--problem cifar10"                  (a ResNet, for a GPU; batch norm, random crops, mirrored)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from experiments import figures, tune
from experiments.data import Data, blank
from experiments.figures import spread
from experiments.methods import ALL, BASELINE, KL_CLIP, METHODS, PERIODS, STATISTICS_EVERY, WEIGHT_DECAY
from experiments.problems import Choice
from experiments.records import (
    Records,
    State,
    by_seed,
    chosen,
    finite,
    keep,
    kept,
    machine,
    save,
    saved,
    state_path,
)
from experiments.running import Pace, Runner, Setting, known_pace, timed


class Logged(NamedTuple):
    """What the authors of TNT or K-BFGS ran on MNIST.

    Attributes:
        method: its name in `methods`.
        setting: theirs, in our units.
        losses: {epoch: training loss} as they logged it.
        cost: of an epoch, over SGD-m's.
    """

    method: str
    setting: Setting
    losses: Mapping[int, float]
    cost: float | None = None


AUTHORS = {
    "SGD-m (authors)": Logged("SGD-m", Setting(3e-3), {1: 197.6, 3: 184.5, 5: 169.5, 10: 125.7}, 1.0),
    "Adam (authors)": Logged("Adam of TNT", Setting(1e-4, 1e-4), {1: 208.7, 3: 196.7, 5: 187.7, 10: 113.9}, 1.17),
    "Shampoo (authors)": Logged("Shampoo", Setting(3e-4, 3e-4), {1: 433.5, 3: 211.3, 5: 188.0, 10: 110.3}, 1.96),
    "K-FAC (TNT authors)": Logged("K-FAC", Setting(3e-3, 0.3), {1: 504.4, 3: 202.1, 5: 136.5, 10: 84.7}, 2.02),
    "K-FAC (K-BFGS authors)": Logged("K-FAC", Setting(0.1, 3.0), {1: 183.2, 3: 99.7, 5: 74.0, 10: 61.6}),
    "K-BFGS (authors)": Logged("K-BFGS", Setting(0.3, 0.3), {1: 169.0, 3: 85.2, 5: 68.0, 10: 59.8, 20: 56.3, 50: 53.8}),
    "TNT (authors)": Logged("TNT", Setting(1e-4, 0.1), {1: 191.2, 3: 148.1, 5: 105.5, 10: 75.9}, 2.28),
}
EPOCHS = {"curves": 50, "fashion": 3, "cifar10": 3}
"""The last epoch, where it is not the tenth."""
ADAM = "Adam"
"""The run that others are to overtake."""
PLATEAUS = {"curves": 130.0}
"""A loss that is only reached when the plateau is left: the best constant image has 134.3."""
ROUNDS = 1
"""Refresh periods after the first that are timed."""


@dataclass(frozen=True)
class Config(Choice):
    """The numbers that all runs share.

    Attributes:
        epochs: passes over the data; by default 10, for curves 50, for a classifier 3.
        refresh_every: steps between refreshes on a classifier.
        seeds: each of initial parameters, the order of the data and the labels drawn.
        estimate: only measure what a step costs, and say how long the runs will take.
    """

    epochs: int | None = None
    refresh_every: int = PERIODS["classifier"]
    seeds: tuple[int, ...] = (0,)
    estimate: bool = False

    @property
    def last(self) -> int:
        """The last epoch."""
        return EPOCHS.get(self.problem, 10) if self.epochs is None else self.epochs

    @property
    def is_classifier(self) -> bool:
        """Whether the problem is one of classification."""
        return self.what.kind == "classifier"

    def path(self, suffix: str = "") -> Path:
        """Where the epochs of runs are kept, or with "_paces" the costs of steps."""
        return self.output / f"{'classify' if self.is_classifier else 'autoencoder'}{suffix}.jsonl"

    def cost_key(self, data: Data) -> dict[str, Any]:
        """What the cost of a step depends on."""
        periods = {"periods": [self.refresh_every, STATISTICS_EVERY]} if self.is_classifier else {}
        return self.what.key(data) | periods

    def shared(self, name: str) -> dict[str, Any]:
        """What the runs of a method on a classifier have, beside problem and setting; its clip is 0 if it has none."""
        if not self.is_classifier:
            return {}
        periods = {"periods": [self.refresh_every, STATISTICS_EVERY]}
        return periods | {"weight_decay": WEIGHT_DECAY, "kl_clip": KL_CLIP if ALL[name].clips else 0.0}


class Run(NamedTuple):
    """A run of the comparison, of every seed.

    Attributes:
        name: for people.
        method: its name in `methods`.
        setting: its own.
        logged: by the authors, if it is at their settings.
    """

    name: str
    method: str
    setting: Setting
    logged: Logged | None = None


def wanted(data: Data, config: Config) -> list[Run]:
    """The runs that are asked for; a `ValueError` if a name is unknown, or no epoch is asked for."""
    if config.last < 1:
        raise ValueError(f"`epochs` is {config.epochs}, expected 1 or more; `estimate` says how long they take.")
    found = [Run(name, each.method, each.setting, each) for name, each in AUTHORS.items() if config.problem == "mnist"]
    for name, method in METHODS.items():
        best = tune.best(config.output / "tune.jsonl", name, config.what.key(data))
        found.append(Run(name, name, best or method.ranges[config.what.kind].usual))
    names = chosen((run.name for run in found), config.only)
    return [run for run in found if run.name in names]


def identity(run: Run, seed: int, data: Data, config: Config) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for how long it is."""
    key = {"name": run.method, **run.setting._asdict(), **config.what.key(data), "images": len(data.train.labels)}
    return key | config.shared(run.method) | {"seed": seed}


def compiled(name: str, data: Data, config: Config) -> Runner:
    """A method on the problem, for all settings and seeds."""
    what, method = config.what, ALL[name]
    make = method.make(what.kind, config.refresh_every)
    return Runner(make, method.ranges[what.kind].usual, what.task(data), method.labels)


def train(run: Run, seed: int, runners: Callable[[str], Runner], data: Data, config: Config) -> Records:
    """One run of one seed, from where it stopped if it did: a record for the start and for every epoch."""
    path, key, what = config.path(), identity(run, seed, data, config), config.what
    rows = {row["epoch"]: row for row in kept(path, key)}
    if len(rows) > config.last:
        return [rows[epoch] for epoch in range(config.last + 1)]
    runner, place = runners(run.method), state_path(path, key)
    runner.begin(run.setting, seed)
    state, steps = saved(place), len(data.train.labels) // what.batch

    def record(epoch: int, seconds: float, losses: list[float | None]) -> dict[str, Any]:
        own = {"epoch": epoch, "seconds": round(seconds, 2), "batch_losses": losses}
        return {**key, **machine(), **own, **what.measured(runner.variables, data)}

    if state and runner.restore(state.leaves, state.rows[-1]["epoch"] * steps):
        done = state.rows
        keep(path, (row for row in done if row["epoch"] not in rows))
    else:
        if ALL[run.method].warms(what.kind):
            runner.warm(what.stream(data.train, seed, 0))
        done: Records = [record(0, 0.0, [])]
        keep(path, done)
    for epoch in track(range(len(done), config.last + 1), description=f"{run.name}, seed {seed}: epochs"):
        losses, seconds = runner.run(what.stream(data.train, seed, epoch - 1))
        parts = [finite(part.mean(), 5) for part in np.array_split(losses, min(10, len(losses)))]
        done.append(record(epoch, done[-1]["seconds"] + seconds, parts))
        save(place, State(jax.tree.leaves(runner.carry), done))
        keep(path, done[-1:])
    return done[: config.last + 1]


def cost(names: set[str], data: Data, config: Config) -> Pace:
    """What a step of each method costs, measured unless it is in the file."""
    key, what = config.cost_key(data) | {"rounds": ROUNDS}, config.what
    if known := known_pace(config.path("_paces"), key, {*names, BASELINE}):
        return known
    some = data.train.first((40 if config.is_classifier else 10) * what.batch)
    runners = {name: compiled(name, data, config) for name in ALL if name in {*names, BASELINE}}
    period = config.refresh_every if config.is_classifier else PERIODS["autoencoder"]
    pace = timed(runners, list(what.stream(some, 0, 0)), period, ROUNDS, BASELINE)
    keep(config.path("_paces"), [{**key, **machine(), **pace._asdict()}])
    return pace


def plan(runs: list[Run], pace: Pace, data: Data, config: Config) -> str:
    """How long the epochs that are left will take, on a machine with nothing else to do."""
    per_epoch, left = len(data.train.labels) // config.what.batch, {}
    for run in runs:
        for seed in config.seeds:
            key = identity(run, seed, data, config)
            epochs = config.last - max(0, len(kept(config.path(), key)) - 1)
            left[str(key)] = epochs, epochs * pace.seconds(run.method, per_epoch, 0)
    epochs, seconds = np.sum([*left.values()], axis=0)
    costs = ", ".join(f"{name} {cost:.2f}" for name, cost in pace.later.items() if name != BASELINE)
    return (
        f"{config.what.title}: a step of {BASELINE} takes {1000 * pace.idle:.0f} ms; so many times as long take "
        f"{costs}.\nLeft: {epochs:.0f} epochs in all, {seconds / 60:.1f} minutes of steps on an idle machine."
    )


class Found(NamedTuple):
    """All that was found: the runs, the records of each by seed (none of an estimate), and the cost of steps."""

    runs: list[Run]
    records: dict[str, list[Records]]
    pace: Pace

    def numbers(self, run: Run, entry: str, last: int) -> np.ndarray:
        """An entry of the records of a run [seeds, last + 1]; infinite where it has diverged."""
        return by_seed(self.records[run.name], entry)[:, : last + 1]

    def clock(self, run: Run, epochs: Iterable[float]) -> np.ndarray:
        """Seconds after so many epochs, by the cost of a step."""
        first = self.records[run.name][0][0]
        per_epoch, period = first["images"] // first["batch"], first.get("periods", [PERIODS["autoencoder"]])[0]
        return np.array([self.pace.seconds(run.method, epoch * per_epoch, period) for epoch in epochs])


def run(config: Config, report: Callable[[str], None] = lambda line: None) -> Found:
    """The timing and the runs, but for what is in the files; `report` gets beforehand what it will take."""
    data = config.what.data(config.data)
    runs, runners = wanted(data, config), lru_cache(maxsize=1)(lambda name: compiled(name, data, config))
    pace = cost({run.method for run in runs}, data, config)
    report(plan(runs, pace, data, config))
    if config.estimate:
        return Found(runs, {}, pace)
    ordered = sorted(runs, key=lambda run: [*ALL].index(run.method))  # the runs of a method share what is compiled
    found = {run.name: [train(run, seed, runners, data, config) for seed in config.seeds] for run in ordered}
    return Found(runs, found, pace)


def found_in(config: Config) -> Found | None:
    """What a folder has of a problem: of each run every seed that is at the last epoch; None if there is none.

    Runs are at the settings that are wanted; on a classifier, where these have none, at the last one that has any. If
    there are runs, and not what their steps cost, it is a `ValueError`.
    """
    rows = kept(config.path(), {**config.what.fields, "batch": config.what.batch})
    rows = [row for row in rows if row["name"] in ALL and config.shared(row["name"]).items() <= row.items()]
    if not rows:
        return None
    data, seen = blank(rows), {}
    for row in rows:
        if (row["data"], row["images"]) == (data.name, len(data.train.labels)) and row["epoch"] <= config.last:
            seeds = seen.setdefault((row["name"], Setting(row["rate"], row["damping"])), {})
            seeds.setdefault(row["seed"], {})[row["epoch"]] = row
    whole = {
        key: ended
        for key, seeds in seen.items()
        if (ended := [[*epochs.values()] for _, epochs in sorted(seeds.items()) if len(epochs) > config.last])
    }
    runs, records = [], {}
    for run in wanted(data, config):
        others = [key for key in whole if key[0] == run.method and config.is_classifier]
        key = (run.method, run.setting)
        key = key if key in whole else (others or [key])[-1]
        if key in whole:
            runs.append(run._replace(setting=key[1]))
            records[run.name] = whole[key]
    if not runs:
        return None
    pace = known_pace(config.path("_paces"), config.cost_key(data), {run.method for run in runs})
    if pace is None:
        known = f"runs of {config.what.title} on {config.problem} and not what their steps cost"
        raise ValueError(f"{config.output} has {known}; run the same with `--estimate`, which measures it.")
    return Found(runs, records, pace)


def table(found: Found, config: Config) -> Table:
    """Losses after some epochs, and what a step costs."""
    return (of_classifiers if config.is_classifier else of_autoencoders)(found, config)


def shown_epochs(config: Config, *some: int) -> list[int]:
    """The epochs that are in the table."""
    return sorted({epoch for epoch in (*some, config.last) if epoch <= config.last})


def named(run: Run) -> str:
    """The setting of a run, for people."""
    return str(run.setting) if ALL[run.method].tuned else "its own"


def of_classifiers(found: Found, config: Config) -> Table:
    """Loss and accuracy after some epochs, and what a step costs."""
    rows, epochs = [], shown_epochs(config, 1, 2, 3, 5, 10, 20)
    for run in found.runs:
        losses, right = (found.numbers(run, entry, config.last) for entry in ("train_loss", "test_accuracy"))
        between = "  " if len(losses) == 1 else "\n"
        cells = (spread(losses[:, epoch], 4) + between + spread(100 * right[:, epoch], 2) for epoch in epochs)
        seconds = found.clock(run, [config.last])[0]
        rows.append((run.name, named(run), *cells, f"{found.pace.later[run.method]:.2f}", f"{seconds:.0f}"))
    return figures.table(
        f"Training loss, and test accuracy in %; {config.what.title}",
        ("method", "rate, damping", *(f"epoch {epoch}" for epoch in epochs), "a step / SGD-m's", "s"),
        rows,
        "In square brackets the range over seeds. A step over SGD-m's: all methods in turn in one process, "
        "after the first refresh period. The seconds are of all epochs at that cost.",
    )


def of_autoencoders(found: Found, config: Config) -> Table:
    """Losses beside what the authors logged, what a step costs, and how soon Adam is overtaken."""
    rows, epochs, plateau = [], shown_epochs(config, 1, 3, 5, 10, 20, 50), PLATEAUS.get(config.problem)
    for run in found.runs:
        losses, logged = found.numbers(run, "train_loss", config.last), run.logged.losses if run.logged else {}
        cells = [spread(losses[:, each], 1) + (f" ({logged[each]:.1f})" if each in logged else "") for each in epochs]
        cells.append(spread(found.numbers(run, "test_loss", config.last)[:, -1], 1))
        took = f" ({run.logged.cost:.2f})" if run.logged and run.logged.cost else ""
        cells += [f"{found.pace.later[run.method]:.2f}" + took, f"{found.clock(run, [config.last])[0]:.0f}"]
        epoch, part = overtaken(found, run, config.last)
        cells.append(f"{epoch:.0f} ({part:.2f})" if np.isfinite(epoch) else "-")
        rows.append((run.name, named(run), f"{len(losses)}", *cells, *([left(found, run, plateau)] if plateau else [])))
    last = [f"below {plateau:g}: steps (of Adam's)"] if plateau else []
    headings = ("test", "a step / SGD-m's", "s", "Adam's last", *last)
    return figures.table(
        f"Training loss, nats an image; {config.what.title}",
        ("run", "rate, damping", "seeds", *(f"epoch {epoch}" for epoch in epochs), *headings),
        rows,
        "In round brackets what the authors logged, in square ones the range over seeds. A step over SGD-m's: "
        "all methods in turn in one process. s: of all epochs at that cost. Adam's last: the first epoch at the end of "
        "which the loss is no more than tuned Adam's last, and at which share of all its seconds.",
    )


def overtaken(found: Found, run: Run, epochs: int) -> tuple[float, float]:
    """When a run is as low as tuned Adam at its end: the epoch, and the share of Adam's seconds; infinite if never."""
    adam = next((other for other in found.runs if other.name == ADAM), None)
    if adam is None:
        return np.inf, np.inf
    level = np.median(found.numbers(adam, "train_loss", epochs), axis=0)[-1]
    reached = np.flatnonzero(np.median(found.numbers(run, "train_loss", epochs), axis=0) <= level)
    if not len(reached):
        return np.inf, np.inf
    return reached[0], found.clock(run, reached[:1])[0] / found.clock(adam, [epochs])[0]


def left(found: Found, run: Run, level: float) -> str:
    """After how many steps the loss of the batches is below a level, and the share of those of tuned Adam."""
    first = found.records[run.name][0][0]
    adam, own = (epochs_below(found.records.get(name, []), level) for name in (ADAM, run.name))
    if np.isinf(own):
        return "-"
    return f"{own * (first['images'] // first['batch']):.0f}" + (f" ({own / adam:.2f})" if adam else "")


def epochs_below(seeds: list[Records], level: float) -> float:
    """Epochs until a stretch of batches has a mean loss below a level, the median over seeds; 0 without any seed."""
    found = []
    for rows in seeds:
        parts = [(row["epoch"] - 1, np.array(row["batch_losses"], float)) for row in rows[1:]]
        ends = np.concatenate([before + (np.arange(len(part)) + 1) / len(part) for before, part in parts])
        below = np.concatenate([part for _, part in parts]) < level
        found.append(ends[np.argmax(below)] if below.any() else np.inf)
    return float(np.median(found)) if found else 0.0


def picture(found: Found, config: Config) -> Figure:
    """Losses against seconds and epochs, and of a classifier the test errors, every seed thin, the middle one thick.

    Of an autoencoder the runs of the authors, with dots at what they logged, and the tuned ones have panels of their
    own.
    """
    rows, authors = [], "settings of the authors (dots: their logs)"
    for run in found.runs:
        epochs = [*range(1, config.last + 1)]
        shared = {"name": run.name, "steps": epochs, "seconds": found.clock(run, epochs)}
        for records in found.records[run.name]:
            losses = [record["train_loss"] for record in records[1:]]
            rows.append(shared | {"problem": authors if run.logged else "training loss", "losses": losses})
            if config.is_classifier:
                errors = [100 * (1 - record["test_accuracy"]) for record in records[1:]]
                rows.append(shared | {"problem": "test error, %", "losses": errors})
    units = ("seconds on the idle machine (see the experiment)", "epochs")
    figure = figures.curves(rows, config.what.title, across="linear", units=units)
    for axis in figure.axes:
        figures.plain(axis.yaxis)
    for index, log in enumerate(run.logged for run in found.runs if run.logged):
        dots = [(epoch, loss) for epoch, loss in log.losses.items() if epoch <= config.last]
        figure.axes[1].plot(*zip(*dots, strict=True), "o", color=f"C{index % 10}", markersize=5)
    return figure


def main(config: Config) -> None:
    """Say what it takes, run, print the table, write the picture."""
    found = run(config, print)
    if not config.estimate:
        path = config.path(f"_{config.what.stem}").with_suffix(".png")
        figures.present([table(found, config)], picture(found, config), path, 180)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=figures.question(__doc__)))
