"""Do the methods land on the curves that the authors of TNT and K-BFGS logged, and where do they land at their best?

The autoencoders of Goldfarb's group on MNIST, and on sets like CURVES and FACES (`problems` has their nets and losses):
batches of 1000, weights and biases uniform in +-1/sqrt(fan in) at the start, a constant learning rate. For most
second-order methods a pass over the data at the first parameters fills the statistics; it counts neither as an epoch
nor in the seconds. All runs of a seed have the same initial parameters and the same batches in the same order. How each
method is made stands in `methods`.

There are two sets of runs. Those called "authors", on MNIST, have the settings of the authors' demonstrations, which
were run on other batches and another draw of the start; what they logged stands beside ours in the table. Those called
"tuned" have the best setting among the trials of `make tune` on the same problem, an equal number for every method;
where there are none, the usual setting of `methods`. "Adaptive" has nothing tuned. With several seeds the table has
medians and ranges, the picture lines and bands.

Expected: "authors" near what was logged (SGD-m 120 to 130 after ten epochs, TNT below 80, Shampoo near 110, K-FAC of
the authors of K-BFGS near 62, K-BFGS near 60); the best of ours as low as tuned Adam after ten epochs in half of its
seconds; on the curves, off the plateau at 134 nats, the loss of the best constant image, in a fifth of Adam's steps.
What was found stands in `results/report.md` beside this file.

Seconds: as in `classify`, those of the picture are made of what a step costs beside SGD-m's, all methods in turn in
one process, and of the step of SGD-m when it was least disturbed. What a run took on the machine as it was is in its
record.

Every epoch is kept, line by line, and a run that was interrupted goes on from its last whole one.

    make autoencoder                                        (says beforehand how long it will take)
    make autoencoder ARGS="--estimate"                      (says so and stops)
    make autoencoder ARGS="--runs authors --only 'TNT (authors)' --epochs 3"
    make autoencoder ARGS="--runs tuned --only Adam SGD-m SOAP --seeds 0 1 2"
    make autoencoder ARGS="--problem curves"                (50 epochs)
    make autoencoder ARGS="--smoke"                         (half a minute)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import tune
from experiments.data import Data, folder, told
from experiments.methods import ALL, BASELINE, METHODS, PERIOD
from experiments.problems import Reconstructed, Reconstruction, reconstruction
from experiments.records import Records, kept
from experiments.tables import by_seed, spread
from experiments.training import Pace, Runner, Setting, Task, by_epoch, known_pace, paced, resumable


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
EPOCHS = {"mnist": 10, "curves": 50, "faces": 10}
ADAM = "Adam"
"""The run that others are to overtake."""
PLATEAUS = {"curves": 130.0}
"""A loss that is only reached when the plateau is left: the best constant image has 134.3."""
ESTIMATE = "`make autoencoder ARGS=--estimate`, with --problem"


@dataclass(frozen=True)
class Config:
    """The numbers that all runs share.

    Attributes:
        output: folder of the records, of the states from which runs go on, and of the picture; of the trials, too.
        only: names of the runs; all if empty.
        problem: MNIST, curves like those of CURVES, or faces like those of FACES.
        runs: at the settings of the authors (MNIST alone), tuned, or both.
        epochs: passes over the data; by default 10, for curves 50.
        batch: images in a step.
        seeds: each of initial parameters, the order of the data and the labels drawn.
        rounds: how many refresh periods after the first are timed, at least one.
        estimate: only measure what a step costs, and say how long the runs will take.
        smoke: a tiny net on enlarged digits, to see that everything runs.
        data: a folder with the files as they were published; without it they are downloaded. See `data`.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    problem: Reconstructed = "mnist"
    runs: Literal["authors", "tuned", "both"] = "both"
    epochs: int | None = None
    batch: int = 1000
    seeds: tuple[int, ...] = (0,)
    rounds: int = 1
    estimate: bool = False
    smoke: bool = False
    data: Path | None = field(default_factory=folder)

    @property
    def last(self) -> int:
        """The last epoch."""
        return EPOCHS[self.problem] if self.epochs is None else self.epochs


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


def chosen(config: Config) -> Reconstruction:
    """The problem of a configuration."""
    return reconstruction(config.problem, config.smoke)


def wanted(data: Data, config: Config) -> list[Run]:
    """What is to be run.

    Args:
        data: of the problem.
        config: the numbers.

    Returns:
        The runs.

    Raises:
        ValueError: if a name is unknown, or nothing is left.
    """
    found: list[Run] = []
    if config.runs != "tuned" and config.problem == "mnist":
        found += [Run(name, logged.method, logged.setting, logged) for name, logged in AUTHORS.items()]
    if config.runs != "authors":
        key = tune.group(chosen(config), data, config.batch)
        for name, method in METHODS.items():
            best = tune.best(config.output / "tune.jsonl", name, key)
            found.append(Run(name, name, best or method.ranges["autoencoder"].usual))
    if unknown := set(config.only) - {run.name for run in found}:
        raise ValueError(f"There is no {sorted(unknown)}; there are {[run.name for run in found]}.")
    if not found:
        raise ValueError(f"No author logged a run of {config.problem}; expected runs='tuned', or problem='mnist'.")
    return [run for run in found if not config.only or run.name in config.only]


def identity(run: Run, seed: int, data: Data, config: Config) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for how long it is."""
    size = {"images": len(data.train.labels), "seed": seed}
    return {"name": run.method, **run.setting._asdict(), **tune.group(chosen(config), data, config.batch), **size}


def compiled(name: str, data: Data, config: Config) -> Runner:
    """A method on the problem, for all settings and seeds."""
    what, method = chosen(config), ALL[name]
    task = Task(what.net, what.likelihood, data.train.first(config.batch))
    return Runner(method.make("autoencoder"), method.ranges["autoencoder"].usual, task, method.labels)


def train(run: Run, seed: int, runners: Callable[[str], Runner], data: Data, config: Config) -> Records:
    """One run of one seed, from where it stopped if it did.

    Args:
        run: what.
        seed: its seed.
        runners: method -> runner.
        data: of training and testing.
        config: the numbers.

    Returns:
        A record for the start and for every epoch.
    """
    what = chosen(config)

    def start() -> Runner:
        runner = runners(run.method)
        runner.begin(run.setting, seed)
        return runner

    def epoch(count: int) -> Iterator[Any]:
        return iter(what.stream(data.train, config.batch, seed, count))

    return resumable(
        records_path(config),
        identity(run, seed, data, config),
        start,
        epoch,
        lambda runner: what.measured(runner.variables, data),
        epochs=config.last,
        steps=steps(data, config),
        prepare=lambda runner: runner.warm(epoch(0)) if ALL[run.method].warm else None,
    )


def steps(data: Data, config: Config) -> int:
    """Of an epoch."""
    return len(data.train.labels) // config.batch


def records_path(config: Config) -> Path:
    """Where the epochs of runs are kept."""
    return config.output / "autoencoder.jsonl"


def paces_path(config: Config) -> Path:
    """Where the costs of steps are kept."""
    return config.output / "autoencoder_paces.jsonl"


def cost(names: set[str], data: Data, config: Config) -> Pace:
    """What a step of each method costs, measured unless it is in the file."""
    key = tune.group(chosen(config), data, config.batch) | {"rounds": config.rounds}
    return paced(
        paces_path(config),
        key,
        lambda: {name: compiled(name, data, config) for name in ALL if name in {*names, BASELINE}},
        names,
        lambda: list(chosen(config).stream(data.train.first(10 * config.batch), config.batch, 0, 0)),
        period=PERIOD,
        rounds=config.rounds,
        baseline=BASELINE,
    )


def plan(runs: list[Run], pace: Pace, data: Data, config: Config) -> str:
    """How long what is left to do will take, on a machine with nothing else to do."""
    per_epoch, images = steps(data, config), len(data.train.labels) + len(data.test.labels)
    measuring = 0.4 * pace.idle * images / config.batch  # a forward pass
    epochs, seconds, counted = 0, 0.0, set[str]()
    for run in runs:
        for seed in config.seeds:
            key = identity(run, seed, data, config)
            known = len({record["epoch"] for record in kept(records_path(config), key)})
            if str(key) in counted or known > config.last:
                continue
            counted.add(str(key))
            left = config.last - max(known - 1, 0)
            epochs += left
            seconds += pace.seconds(run.method, left * per_epoch, 0) + left * measuring
            if not known and ALL[run.method].warm:
                seconds += pace.seconds(run.method, per_epoch, 0)
    costs = ", ".join(f"{name} {cost:.2f}" for name, cost in pace.later.items() if name != BASELINE)
    return (
        f"{chosen(config).title}: a step of {BASELINE} takes {1000 * pace.idle:.0f} ms; so many times as long take "
        f"{costs}.\nLeft: {epochs} epochs in all, {seconds / 60:.1f} minutes on an idle machine."
    )


class Found(NamedTuple):
    """All that was found: the runs, the records of each by seed (none of an estimate), and the cost of steps."""

    runs: list[Run]
    records: dict[str, list[Records]]
    pace: Pace

    def of(self, wanted: Callable[[Run], bool]) -> "Found":
        """Some of the runs."""
        return self._replace(runs=[run for run in self.runs if wanted(run)])

    def losses(self, run: Run, epochs: int) -> np.ndarray:
        """Training losses [seeds, epochs + 1] of a run; infinite where it has diverged."""
        return by_seed(self.records[run.name], "train_loss")[:, : epochs + 1]


def run(config: Config, report: Callable[[str], None] = lambda line: None) -> Found:
    """The timing and the runs, but for what is in the files.

    Args:
        config: the numbers.
        report: told what it will take.

    Returns:
        What was found.
    """
    data = chosen(config).load(None if config.smoke else config.data)
    runs, runners = wanted(data, config), lru_cache(maxsize=1)(lambda name: compiled(name, data, config))
    config.output.mkdir(parents=True, exist_ok=True)
    pace = cost({run.method for run in runs}, data, config)
    report(plan(runs, pace, data, config))
    if config.estimate:
        return Found(runs, {}, pace)
    for run in sorted(runs, key=lambda run: list(ALL).index(run.method)):  # the runs of a method share what is compiled
        for seed in config.seeds:
            train(run, seed, runners, data, config)
    records = {run.name: [train(run, seed, runners, data, config) for seed in config.seeds] for run in runs}
    return Found(runs, records, pace)


def found_in(folder: Path, problem: Reconstructed) -> Found | None:
    """What a folder has of a problem: every seed of every run that is at its last epoch; None if there is none.

    Args:
        folder: of the records, of the trials, too.
        problem: which.

    Returns:
        What was found.

    Raises:
        ValueError: if there are runs, and not what their steps cost.
    """
    config = Config(output=folder, problem=problem)
    rows = kept(records_path(config), {"problem": problem, "batch": config.batch})
    if not rows:
        return None
    data = told(rows)
    records: dict[str, list[Records]] = {}
    runs, seeds = wanted(data, config), sorted({row["seed"] for row in rows})
    for run in runs:
        keys = (identity(run, seed, data, config).items() for seed in seeds)
        known = (by_epoch(row for row in rows if key <= row.items()) for key in keys)
        if whole := [list(epochs.values())[: config.last + 1] for epochs in known if len(epochs) > config.last]:
            records[run.name] = whole
    if not records:
        return None
    runs = [run for run in runs if run.name in records]
    key = tune.group(chosen(config), data, config.batch)
    pace = known_pace(paces_path(config), key, {run.method for run in runs})
    if pace is None:
        raise ValueError(f"{folder} has runs of {problem} and not what their steps cost; run {ESTIMATE} {problem}.")
    return Found(runs, records, pace)


def table(found: Found, config: Config) -> Table:
    """Losses after some epochs beside what the authors logged, what a step costs, and how soon Adam is overtaken."""
    result = Table(
        title=f"Training loss, nats an image; {chosen(config).title}",
        caption="In round brackets what the authors logged, in square ones the range over seeds. A step over SGD-m's: "
        "all methods in turn in one process. s: of all epochs at that cost. Adam's last: the first epoch at the end of "
        "which the loss is no more than tuned Adam's last, and at which share of all its seconds.",
        caption_justify="left",
    )
    epochs = sorted({epoch for epoch in (1, 3, 5, 10, 20, 50, config.last) if epoch <= config.last})
    plateau = PLATEAUS.get(config.problem)
    result.add_column("run", no_wrap=True)
    for heading in ("rate, damping", "seeds", *(f"epoch {epoch}" for epoch in epochs), "test", "a step / SGD-m's"):
        result.add_column(heading, justify="right")
    for heading in ("s", "Adam's last", *([f"below {plateau:g}: steps (of Adam's)"] if plateau else [])):
        result.add_column(heading, justify="right")
    for run in found.runs:
        losses, cells = found.losses(run, config.last), []
        for after in epochs:
            logged = run.logged.losses.get(after) if run.logged else None
            cells.append(spread(losses[:, after], 1) + (f" ({logged:.1f})" if logged else ""))
        epoch, part = overtaken(found, run, config.last)
        took = f"{found.pace.later[run.method]:.2f}"
        took += f" ({run.logged.cost:.2f})" if run.logged and run.logged.cost else ""
        result.add_row(
            run.name,
            str(run.setting) if ALL[run.method].tuned else "its own",
            f"{len(losses)}",
            *cells,
            spread(by_seed(found.records[run.name], "test_loss")[:, config.last], 1),
            took,
            f"{clock(found, run, config.last)[-1]:.0f}",
            f"{epoch:.0f} ({part:.2f})" if np.isfinite(epoch) else "-",
            *([left(found, run, plateau)] if plateau else []),
        )
    return result


def overtaken(found: Found, run: Run, epochs: int) -> tuple[float, float]:
    """When a run is as low as tuned Adam at its end: the epoch, and the share of Adam's seconds; infinite if never."""
    adam = next((other for other in found.runs if other.name == ADAM), None)
    if adam is None:
        return np.inf, np.inf
    level = np.median(found.losses(adam, epochs), axis=0)[-1]
    reached = np.flatnonzero(np.median(found.losses(run, epochs), axis=0) <= level)
    if not len(reached):
        return np.inf, np.inf
    return reached[0], clock(found, run, epochs)[reached[0]] / clock(found, adam, epochs)[-1]


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


def clock(found: Found, run: Run, epochs: int) -> np.ndarray:
    """Seconds after every epoch from 0, at the cost of a step."""
    first = found.records[run.name][0][0]
    per_epoch = first["images"] // first["batch"]
    return np.array([found.pace.seconds(run.method, epoch * per_epoch, PERIOD) for epoch in range(epochs + 1)])


def picture(found: Found, config: Config) -> Figure:
    """Training loss against epochs and seconds: at the authors' settings, with their points, and tuned."""
    rows = [[run for run in found.runs if bool(run.logged) is logged] for logged in (True, False)]
    titled = zip(rows, ("settings of the authors (dots: their logs)", "tuned"), strict=True)
    groups = [(runs, title) for runs, title in titled if runs]
    options = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(groups), 2, figsize=(12, 4.6 * len(groups)), **options)
    colors = plt.get_cmap("tab20")
    for (runs, title), pair in zip(groups, axes, strict=True):
        for index, run in enumerate(runs):
            color, losses = colors(list(ALL).index(run.method) % 20), found.losses(run, config.last)[:, 1:]
            there = losses[np.isfinite(losses[:, -1])]
            lost = f", {len(losses) - len(there)} of {len(losses)} diverged" if len(there) < len(losses) else ""
            there = there if len(there) else np.where(np.isfinite(losses), losses, np.nan)
            again = run.method in {other.method for other in runs[:index]}
            style = {"color": color, "linestyle": "--" if again else "-"}
            for axis, time in zip(pair, (np.arange(config.last + 1), clock(found, run, config.last)), strict=True):
                axis.plot(time[1:], np.median(there, axis=0), label=run.name + lost, linewidth=1.8, **style)
                axis.fill_between(time[1:], there.min(axis=0), there.max(axis=0), color=color, alpha=0.2, linewidth=0)
            if run.logged:
                dots = [(epoch, loss) for epoch, loss in run.logged.losses.items() if epoch <= config.last]
                pair[0].plot(*zip(*dots, strict=True), "o", color=color, markersize=5)
        pair[0].set(xlabel="epochs", ylabel="training loss, nats an image")
        pair[0].set_title(title, loc="left", fontweight="bold")
        pair[1].set(xlabel="seconds on the idle machine (see the experiment)")
        pair[1].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.set(yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.2, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def small(config: Config) -> Config:
    """A tiny net on the digits, a few runs of two seeds, in a folder of its own."""
    only = config.only or ("SGD-m", "K-BFGS", *(("K-BFGS (authors)",) if config.problem == "mnist" else ()))
    return replace(config, output=config.output / "smoke", only=only, epochs=2, batch=300, seeds=(0, 1))


def main(config: Config) -> None:
    """Say what it takes, run, print the table, write the picture."""
    config, console = small(config) if config.smoke else config, Console(width=180)
    found = run(config, console.print)
    if config.estimate:
        return
    console.print(table(found, config))
    path = config.output / f"autoencoder_{config.problem}.png"
    picture(found, config).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
