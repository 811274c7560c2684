"""Does TENGraD train the convnet of its paper better, per epoch and per second, than K-FAC, EKFAC, SGD-m and Adam?

TENGraD inverts the Fisher block of one batch exactly, in the space of its examples; K-FAC and EKFAC average their
approximations over batches. The net is the paper's for Fashion-MNIST, "3C1F": three convolutions of 3x3 with padding
and ReLU, a max pool of 3, a dense layer with ReLU and one of logits. The paper's has 128 channels and 500 units and is
work for a GPU; with 16 or 32 channels it has 128 units. 60,000 images with pixels in [0, 1], batches of 128, weights
and biases uniform in +-1/sqrt(fan in) at the start, a constant learning rate, momentum 0.9. As in the paper all is
refreshed at every 100th step, and the statistics of K-FAC and EKFAC (and the scale of EKFAC) are taken at every 20th.
The weight decay is decoupled and the same for all. `kl_clip` holds for all second-order methods or for none.

All methods have the same number of trials: nine, of a learning rate, and for the second-order methods of three rates
with three dampings around those of the paper, each on the first images of the training set from the same start. The
setting with the least loss of these images at the end is the one that runs. The runs have the same initial parameters
and the same batches in the same order. Losses and accuracies are of all images, without the weight decay, measured
outside the clock.

Expected: per epoch TENGraD at least level with K-FAC and EKFAC, and all of them ahead of SGD-m; per second, on two CPU
cores, nothing far ahead of Adam: with so few channels a second-order step costs up to twice one of SGD-m. Found, with
one seed and three epochs: K-FAC ahead per epoch at 16 channels and level with Adam at 32; per second Adam, nothing far
ahead of it. TENGraD's step costs next to nothing more than SGD-m's; it is level with Adam and EKFAC after an epoch and
then stays behind, at the rate that the trials chose, since the Fisher matrix of one batch of 128 serves for 100 steps.
That of every tenth step ("TENGraD, 10") did no better. SGD-m, at 32 channels, fell to chance in the first epoch at
either of its two best rates. (The trials at 32 channels were of 12,800 images: `--subset 12800`.)

Seconds: what a run took is in its record, but a machine that was busy at one method and idle at the next says nothing
about the two. So the picture's seconds are made of what a step costs, measured apart: all methods in turn in one
process, 20 steps at a time, over the first refresh period (with its early refreshes) and over later ones, each in units
of the same periods of SGD-m; times the step of SGD-m when it was least disturbed. No compilation is in either.

What is done is kept, line by line, and not done again: a trial, an epoch of a run, the timing. A run that was
interrupted goes on from its last whole epoch, and one that is asked for more epochs from its end. Whoever changes a
setting runs only what depends on it.

    make classify                                     (says beforehand how long it will take)
    make classify ARGS="--epochs 0"                   (the trials alone)
    make classify ARGS="--epochs 0 --kl-clip 0"       (the same without the clip; the table shows both)
    make classify ARGS="--channels 32 --only TENGraD K-FAC"
    make classify ARGS="--problem cifar10 --depth 32" (a ResNet, for a GPU; batch norm, random crops, mirrored)
    make classify ARGS="--problem digits --epochs 30" (a small convnet, on what scikit-learn brings along)
    make classify ARGS="--smoke"                      (a minute, on the digits)
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.progress import track

from experiments import methods
from experiments.data import Data, Part, folder
from experiments.methods import BASELINE, Shared
from experiments.problems import Name, Problem, problem
from experiments.records import Records, finite, keep, kept
from experiments.report import runs_picture, runs_table, trials_table
from experiments.training import Make, Pace, Runner, Runners, Setting, Task, paced, resumable


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share; what is tried for each stands in `METHODS`.

    Attributes:
        output: folder of the records, of the states from which runs go on, and of the picture.
        only: names of the methods; all if empty.
        problem: Fashion-MNIST with the net of the paper; CIFAR-10 with a ResNet; the digits with a small convnet.
        depth: of the ResNet.
        channels: of the convolutions, of the first ones if there are more later; 128 in the paper.
        units: of the hidden dense layer; None for 500 at 128 channels, as in the paper, and 128 at fewer.
        epochs: passes over the data; 0 for the trials alone.
        batch: images in a step.
        subset: training images of a trial.
        trial_epochs: passes of a trial over them.
        refresh_every: steps between refreshes.
        statistics_every: steps between statistics, for methods that average them.
        weight_decay: strength, for all methods; 0 for none.
        kl_clip: bound on a step, for all second-order methods; 0 for none.
        seed: of the initial parameters, the order of the data and the labels drawn.
        rounds: how many refresh periods after the first are timed, at least one.
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
    subset: int = 25_600
    trial_epochs: int = 1
    refresh_every: int = 100
    statistics_every: int = 20
    weight_decay: float = 1e-3
    kl_clip: float = 1e-2
    seed: int = 0
    rounds: int = 1
    smoke: bool = False
    data: Path | None = field(default_factory=folder)


class Entry(NamedTuple):
    """A method: config -> how its optimizer is made, the settings that are tried, whether its step can be clipped."""

    make: Callable[[Config], Make]
    tried: tuple[Setting, ...]
    natural: bool = True


def entry(name: str, tried: tuple[Setting, ...], refresh_every: int | None = None) -> Entry:
    """A method of the registry; `refresh_every`, if it has a period of its own."""

    def make(config: Config) -> Make:
        period = refresh_every or config.refresh_every
        shared = Shared(period, config.statistics_every, config.weight_decay, config.kl_clip)
        return methods.METHODS[name].make("classifier", shared)

    return Entry(make, tried, methods.METHODS[name].clips)


def rates(*values: float) -> tuple[Setting, ...]:
    """Settings of a first-order method."""
    return tuple(map(Setting, values))


GRID = tuple(Setting(*pair) for pair in product((3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.3)))
"""The paper ran TENGraD and K-FAC at (0.003, 0.1), EKFAC at (0.001, 0.03), SGD-m at 0.03, all for ten epochs."""
METHODS = {
    "TENGraD": entry("TENGraD", GRID),
    "TENGraD, 10": entry("TENGraD", GRID, refresh_every=10),
    "K-FAC": entry("K-FAC", GRID),
    "EKFAC": entry("EKFAC", GRID),
    "SGD-m": entry("SGD-m", rates(1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2, 1e-1, 2e-1)),
    "Adam": entry("Adam", rates(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)),
}


def chosen(config: Config) -> Problem:
    """The problem of a configuration."""
    return problem(config.problem, config.channels, config.units, config.depth)


def load(config: Config) -> Data:
    """The data of the problem, or for a smoke test the digits in the size of its images."""
    return chosen(config).enlarged_digits() if config.smoke else chosen(config).load(config.data)


def compiled(name: str, data: Data, config: Config) -> Runner:
    """A method on the problem."""
    entry, batch = METHODS[name], data.train.first(config.batch)
    task = Task(chosen(config).net, chosen(config).likelihood, batch, config.seed, {"train": True})
    return Runner(entry.make(config), entry.tried[0], task)


def identity(name: str, setting: Setting, images: int, data: Data, config: Config) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for how long it is."""
    kl_clip = config.kl_clip if METHODS[name].natural else 0.0
    return {
        "name": name,
        **setting._asdict(),
        "data": data.name,
        "images": images,
        **chosen(config).fields,
        "batch": config.batch,
        "periods": [config.refresh_every, config.statistics_every],
        "weight_decay": config.weight_decay,
        "kl_clip": kl_clip,
        "seed": config.seed,
    }


def trial(name: str, setting: Setting, runners: Runners, data: Data, config: Config) -> dict[str, Any]:
    """One trial: its record, with the loss of its images at the end."""
    part, runner, seconds = data.train.first(config.subset), runners(name), 0.0
    runner.begin(setting)
    for epoch in range(config.trial_epochs):
        seconds += runner.run(chosen(config).stream(part, config.batch, config.seed, epoch))[1]
    found = chosen(config).score(runner.variables, part)
    return {
        "epochs": config.trial_epochs,
        "loss": finite(found.loss, 5),
        "accuracy": round(found.accuracy, 5),
        "seconds": round(seconds, 2),
    }


def tune(names: list[str], runners: Runners, data: Data, config: Config) -> Records:
    """Every trial that is not in the file yet; the records of all trials of the methods."""
    path, records = trials_path(config), []
    for name in names:
        for setting in track(METHODS[name].tried, description=f"trials of {name:<10}"):
            key = trial_key(name, setting, data, config)
            if not (known := kept(path, key)):
                known = [key | trial(name, setting, runners, data, config)]
                keep(path, known)
            records.append(known[-1])
    return records


def trial_key(name: str, setting: Setting, data: Data, config: Config) -> dict[str, Any]:
    """What tells one trial from all others."""
    images = min(config.subset, len(data.train.labels))
    return identity(name, setting, images, data, config) | {"epochs": config.trial_epochs}


def best(name: str, trials: Records) -> Setting:
    """The setting of the trial with the least loss.

    Args:
        name: of the method.
        trials: records.

    Returns:
        The setting.

    Raises:
        ValueError: if all diverged.
    """
    whole = [record for record in trials if record["name"] == name and record["loss"] is not None]
    if not whole:
        raise ValueError(f"Every trial of {name} diverged; try other settings in METHODS.")
    record = min(whole, key=lambda record: record["loss"])
    return Setting(record["rate"], record["damping"])


def train(name: str, setting: Setting, runners: Runners, data: Data, config: Config) -> Records:
    """One run, from where it stopped if it did.

    Args:
        name: of the method.
        setting: its own.
        runners: name -> runner.
        data: of training and testing.
        config: the numbers.

    Returns:
        A record for the start and for every epoch.
    """
    key, what = identity(name, setting, len(data.train.labels), data, config), chosen(config)

    def start() -> Runner:
        runner = runners(name)
        runner.begin(setting)
        return runner

    return resumable(
        config.output / "classify.jsonl",
        key,
        start,
        lambda epoch: what.stream(data.train, config.batch, config.seed, epoch),
        lambda runner: what.measured(runner.variables, data),
        epochs=config.epochs,
        steps=len(data.train.labels) // config.batch,
    )


def cost(names: list[str], runners: Runners, data: Data, config: Config) -> Pace:
    """The cost of steps, measured unless it is in the file."""
    key = {"data": data.name, **chosen(config).fields, "batch": config.batch}
    key |= {"periods": [config.refresh_every, config.statistics_every], "rounds": config.rounds}
    path = config.output / "classify_paces.jsonl"

    def started() -> dict[str, Runner]:
        used = {name: runners(name) for name in (*names, BASELINE)}
        for name, runner in used.items():
            tried = METHODS[name].tried
            runner.begin(Setting(min(s.rate for s in tried), max(s.damping for s in tried)))
        return used

    def stream() -> list[Part]:
        return list(chosen(config).stream(data.train.first(40 * config.batch), config.batch, config.seed, 0))

    size = {"period": config.refresh_every, "rounds": config.rounds, "baseline": BASELINE}
    return paced(path, key, started, names, stream, **size)


def plan(names: list[str], pace: Pace, data: Data, config: Config) -> str:
    """How long what is left to do will take, on a machine with nothing else to do."""
    per_trial, period = min(config.subset, len(data.train.labels)), config.refresh_every
    measuring = 0.4 * pace.idle / config.batch  # seconds an image: a forward pass
    trials, seconds = 0, {"trials": 0.0, "runs": 0.0}
    for name in names:
        left = [s for s in METHODS[name].tried if not kept(trials_path(config), trial_key(name, s, data, config))]
        trials += len(left)
        steps = config.trial_epochs * (per_trial // config.batch)
        seconds["trials"] += len(left) * (pace.seconds(name, steps, period) + measuring * per_trial)
        steps = config.epochs * (len(data.train.labels) // config.batch)
        images = (config.epochs + 1) * (len(data.train.labels) + len(data.test.labels))
        seconds["runs"] += (pace.seconds(name, steps, period) + measuring * images) if config.epochs else 0.0
    costs = ", ".join(f"{name} {pace.later[name]:.2f}" for name in names if name != BASELINE)
    return (
        f"{chosen(config).title}: a step of {BASELINE} takes {1000 * pace.idle:.0f} ms; so many times as long take "
        f"{costs}.\n"
        f"Left: {trials} trials, {seconds['trials'] / 60:.1f} minutes on an idle machine; then {len(names)} runs of "
        f"{config.epochs} epochs, {seconds['runs'] / 60:.1f} minutes, less what of them is in the records."
    )


def trials_path(config: Config) -> Path:
    """Where the trials are kept."""
    return config.output / "classify_trials.jsonl"


class Found(NamedTuple):
    """All that was found."""

    trials: Records
    runs: dict[str, Records]
    pace: Pace


def run(config: Config, report: Callable[[str], None] = lambda line: None) -> Found:
    """The timing, the trials and the runs, but for what is in the files.

    Args:
        config: the numbers.
        report: told what it will take.

    Returns:
        Trials, runs and the cost of a step.

    Raises:
        ValueError: if there is no method of a name.
    """
    if unknown := set(config.only) - set(METHODS):
        raise ValueError(f"There is no {sorted(unknown)}; there are {list(METHODS)}.")
    names = [name for name in METHODS if not config.only or name in config.only]
    data = load(config)
    config.output.mkdir(parents=True, exist_ok=True)
    runners = cache(lambda name: compiled(name, data, config))
    pace = cost(names, runners, data, config)
    report(plan(names, pace, data, config))
    trials = tune(names, runners, data, config)
    if not config.epochs:
        return Found(trials, {}, pace)
    return Found(trials, {name: train(name, best(name, trials), runners, data, config) for name in names}, pace)


def comparable(trials: Records, config: Config) -> Records:
    """These trials, and those in the file that differ only in the clip."""
    varied = ("name", "rate", "damping", "kl_clip", "loss", "accuracy", "seconds")
    key = {field: value for field, value in trials[0].items() if field not in varied}
    names = {record["name"] for record in trials}
    return [record for record in kept(trials_path(config), key) if record["name"] in names]


def small(config: Config) -> Config:
    """A tiny net on the digits, a few steps, in a folder of its own."""
    return replace(
        config,
        output=config.output / "smoke",
        smoke=True,
        depth=8,
        channels=3,
        units=8,
        epochs=1,
        batch=100,
        subset=300,
        refresh_every=5,
        statistics_every=2,
    )


def main(config: Config) -> None:
    """Say what it takes, run, print the tables, write the picture."""
    config, console = small(config) if config.smoke else config, Console(width=160)
    found = run(config, console.print)
    console.print(trials_table(comparable(found.trials, config)))
    if found.runs:
        title = chosen(config).title
        console.print(runs_table(found.runs, found.pace, title))
        path = config.output / f"classify_{chosen(config).stem}.png"
        runs_picture(found.runs, found.pace, title, list(METHODS)).savefig(path, dpi=110)
        console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
