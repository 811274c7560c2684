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
cores, nothing far ahead of Adam: with so few channels a second-order step costs up to twice one of SGD-m.

Seconds: what a run took is in its record, but a machine that was busy at one method and idle at the next says nothing
about the two. So the picture's seconds are made of what a step costs, measured apart: all methods in turn in one
process, 20 steps at a time, over the first refresh period (with its early refreshes) and over later ones, each in units
of the same periods of SGD-m; times the step of SGD-m when it was least disturbed. No compilation is in either.

What is done is kept, line by line, and not done again: a trial, an epoch of a run, the timing. A run that was
interrupted goes on from its last whole epoch, and one that is asked for more epochs from its end. Whoever changes a
setting runs only what depends on it.

    make classify                                     (says beforehand how long it will take; needs NATGRAD_DATA)
    make classify ARGS="--epochs 0"                   (the trials alone)
    make classify ARGS="--epochs 0 --kl-clip 0"       (the same without the clip; the table shows both)
    make classify ARGS="--channels 32 --only TENGraD K-FAC"
    make classify ARGS="--smoke"                      (seconds, on the digits of scikit-learn)
"""

import gzip
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

import natgrad_jax as ng


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share; what is tried for each stands in `METHODS`.

    Attributes:
        output: folder of the records, of the states from which runs go on, and of the picture.
        only: names of the methods; all if empty.
        channels: of the convolutions; 128 in the paper.
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
        smoke: a tiny net on the digits, to see that everything runs.
        data: a folder with the files of Fashion-MNIST, as they were published, in fashion_mnist/; without it the
            digits of scikit-learn, enlarged, whose figures compare with nothing.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    channels: int = 16
    units: int | None = None
    epochs: int = 3
    batch: int = 128
    subset: int = 12_000
    trial_epochs: int = 1
    refresh_every: int = 100
    statistics_every: int = 20
    weight_decay: float = 1e-3
    kl_clip: float = 1e-2
    seed: int = 0
    rounds: int = 1
    smoke: bool = False
    data: Path | None = Path(os.environ["NATGRAD_DATA"]) if os.environ.get("NATGRAD_DATA") else None


class Setting(NamedTuple):
    """What is tuned: the learning rate and, for a second-order method, the damping."""

    rate: Any
    damping: Any = 0.0

    def __str__(self) -> str:
        return f"{self.rate:g}" + (f", {self.damping:g}" if self.damping else "")


Make = Callable[[Setting, ng.Layers, Config], optax.GradientTransformation]


class Entry(NamedTuple):
    """A method: how its optimizer is made, the settings that are tried, whether it is of second order."""

    make: Make
    tried: tuple[Setting, ...]
    natural: bool = True


def natural(method: Callable[..., optax.GradientTransformation], *statistics: str) -> Make:
    """A method of this package; `statistics` are its keywords for periods of what it averages."""

    def make(setting: Setting, layers: ng.Layers, config: Config) -> optax.GradientTransformation:
        return method(
            setting.rate,
            layers,
            damping=setting.damping,
            momentum=0.9,
            weight_decay=config.weight_decay or None,
            kl_clip=config.kl_clip or None,
            refresh_every=config.refresh_every,
            **dict.fromkeys(statistics, config.statistics_every),
        )

    return make


def sgd(setting: Setting, layers: ng.Layers, config: Config) -> optax.GradientTransformation:
    """SGD with the momentum and the weight decay in the places where the second-order methods have them."""
    del layers
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.trace(0.9), optax.scale_by_learning_rate(setting.rate))


def adam(setting: Setting, layers: ng.Layers, config: Config) -> optax.GradientTransformation:
    """Adam with decoupled weight decay."""
    del layers
    return optax.adamw(setting.rate, weight_decay=config.weight_decay)


def rates(*values: float) -> tuple[Setting, ...]:
    """Settings of a first-order method."""
    return tuple(map(Setting, values))


GRID = tuple(Setting(*pair) for pair in product((3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.3)))
"""The paper ran TENGraD and K-FAC at (0.003, 0.1), EKFAC at (0.001, 0.03), SGD-m at 0.03, all for ten epochs."""
METHODS = {
    "TENGraD": Entry(natural(ng.tengrad), GRID),
    "K-FAC": Entry(natural(ng.kfac, "statistics_every"), GRID),
    "EKFAC": Entry(natural(ng.ekfac, "statistics_every", "rescale_every"), GRID),
    "SGD-m": Entry(sgd, rates(1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2, 1e-1, 2e-1), natural=False),
    "Adam": Entry(adam, rates(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2), natural=False),
}
BASELINE = "SGD-m"


class Net(nn.Module):
    """The paper's convnet."""

    channels: int
    units: int

    @nn.compact
    def __call__(self, x):
        """Images [N, 28, 28, 1] -> logits [N, 10]."""
        for _ in range(3):
            x = nn.relu(nn.Conv(self.channels, (3, 3), **uniform(9 * x.shape[-1]))(x))
        x = x[:, :27, :27].reshape(-1, 9, 3, 9, 3, self.channels).max((2, 4))  # on a CPU faster than `nn.max_pool`
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.units, **uniform(x.shape[-1]))(x))
        return nn.Dense(10, **uniform(self.units))(x)


def uniform(fan_in: int) -> dict[str, Any]:
    """The initializers of a layer: weights and biases uniform in +-1/sqrt(fan in)."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return {"kernel_init": draw, "bias_init": draw}


LIKELIHOOD = ng.losses.softmax_cross_entropy


class Part(NamedTuple):
    """Images [N, 28, 28, 1] with pixels in [0, 1], and their labels [N]."""

    images: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> "Part":
        """So many of them."""
        return Part(self.images[:count], self.labels[:count])


class Data(NamedTuple):
    """What is trained on and what is tested on."""

    name: str
    train: Part
    test: Part


def load(config: Config) -> Data:
    """Fashion-MNIST, or the digits of scikit-learn enlarged to its size."""
    if config.data is None:
        digits: Any = load_digits()
        pixels = np.clip(zoom(digits.images / 16, (1, 3.5, 3.5), order=1), 0, 1).astype(np.float32)[..., None]
        labels = digits.target.astype(np.int32)
        return Data("digits", Part(pixels[:1500], labels[:1500]), Part(pixels[1500:], labels[1500:]))
    parts = []
    for part in ("train", "t10k"):
        images = idx(config.data / "fashion_mnist" / f"{part}-images-idx3-ubyte.gz", 3)
        labels = idx(config.data / "fashion_mnist" / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{config.data / 'fashion_mnist'} has {len(images)} images and {len(labels)} labels in its files "
                f"{part}-*; they are not of one data set. Fetch both again."
            )
        parts.append(Part((images / np.float32(255)).astype(np.float32)[..., None], labels.astype(np.int32)))
    return Data("fashion", *parts)


def idx(path: Path, axes: int) -> np.ndarray:
    """The array of bytes in a gzipped IDX file.

    Args:
        path: of the file.
        axes: of the array.

    Returns:
        The array, uint8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not whole.
    """
    remedy = "NATGRAD_DATA, or --data, names a folder with the published files of Fashion-MNIST in fashion_mnist/"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {remedy}.")
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); fetch it again: {remedy}.") from error
    start = 4 * (axes + 1)
    shape = np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">i4").astype(int)
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) - start != np.prod(shape):
        raise ValueError(
            f"{path} holds {len(content)} bytes, which are no IDX file of {axes} axes; fetch it again: {remedy}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def batches(part: Part, size: int, seed: int, epoch: int) -> Iterator[Part]:
    """The batches of an epoch, in an order of its own.

    Args:
        part: images and labels.
        size: of a batch; what is left over is dropped.
        seed: of the orders.
        epoch: from 0.

    Yields:
        A batch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(part.labels))
    for first in range(0, len(order) - size + 1, size):
        chosen = order[first : first + size]
        yield Part(part.images[chosen], part.labels[chosen])


class Runner:
    """One method on the net, compiled once for all settings."""

    def __init__(self, entry: Entry, data: Data, config: Config):
        """Compile."""
        self._key, model = jax.random.key(config.seed), net(config)
        self._params = model.init(self._key, data.train.images[:1])["params"]
        capture = ng.linen.capture(model, LIKELIHOOD)
        batch = data.train.first(config.batch)
        layers = capture.layers({"params": self._params}, batch.images)

        def optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
            return optax.with_extra_args_support(entry.make(setting, layers, config))

        @partial(jax.jit, donate_argnums=0)
        def step(carry, x, y, key, setting):
            params, state = carry
            out = capture.value_and_grad({"params": params}, x, y, key=key)
            updates, state = optimizer(setting).update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), out.value

        self._init = lambda setting, params: optimizer(setting).init(params)
        self.begin(entry.tried[0])
        self._step = step.lower(self.carry, *batch, self._key, self._setting).compile()

    def begin(self, setting: Setting) -> None:
        """Go back to the start, with a setting."""
        params = jax.tree.map(jnp.array, self._params)
        self.carry: tuple[Any, Any] = params, self._init(setting, params)
        self.steps, self._setting = 0, Setting(*(jnp.float32(number) for number in setting))

    def restore(self, leaves: list[np.ndarray], steps: int) -> bool:
        """Go on from what was saved of `carry`; false if that is of another shape."""
        own, structure = jax.tree.flatten(self.carry)
        if [(leaf.shape, leaf.dtype) for leaf in own] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
            return False
        self.carry, self.steps = jax.tree.unflatten(structure, map(jnp.array, leaves)), steps
        return True

    def run(self, stream: Iterable[Part]) -> tuple[np.ndarray, float]:
        """A step for every batch; the losses of the batches, and the seconds that the steps took together."""
        losses, before = [], time.perf_counter()
        for x, y in stream:
            key = jax.random.fold_in(self._key, self.steps)
            self.carry, loss = self._step(self.carry, x, y, key, self._setting)
            losses.append(loss)
            self.steps += 1
        jax.block_until_ready(self.carry)
        return np.array(losses), time.perf_counter() - before


def net(config: Config) -> Net:
    """The net of a configuration."""
    return Net(config.channels, config.units or (500 if config.channels == 128 else 128))


class Score(NamedTuple):
    """Mean loss in nats an image, and the share of the images that are told right."""

    loss: float
    accuracy: float


def score(params: Any, part: Part, config: Config, size: int = 2000) -> Score:
    """The score of all images."""
    sums = np.zeros(2)
    for first in range(0, len(part.labels), size):
        sums += np.array(_sums(params, *(array[first : first + size] for array in part), net(config)))
    loss, right = sums / len(part.labels)
    return Score(float(loss), float(right))


@partial(jax.jit, static_argnames="model")
def _sums(params, x, y, model):
    logits = model.apply({"params": params}, x)
    return LIKELIHOOD(logits, y) * len(y), jnp.sum(jnp.argmax(logits, axis=-1) == y)


def identity(name: str, setting: Setting, images: int, data: Data, config: Config) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for how long it is."""
    kl_clip = config.kl_clip if METHODS[name].natural else 0.0
    return {
        "name": name,
        **setting._asdict(),
        "data": data.name,
        "images": images,
        "channels": config.channels,
        "units": net(config).units,
        "batch": config.batch,
        "periods": [config.refresh_every, config.statistics_every],
        "weight_decay": config.weight_decay,
        "kl_clip": kl_clip,
        "seed": config.seed,
    }


Records = list[dict[str, Any]]


def kept(path: Path, key: Mapping[str, Any]) -> Records:
    """The records of a file that have these entries."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if key.items() <= record.items()]


def keep(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def finite(number: float, digits: int) -> float | None:
    """A number for a line of JSON; None if it is not finite."""
    return round(float(number), digits) if np.isfinite(number) else None


Runners = Callable[[str], Runner]


def trial(name: str, setting: Setting, runners: Runners, data: Data, config: Config) -> dict[str, Any]:
    """One trial: its record, with the loss of its images at the end."""
    part, runner, seconds = data.train.first(config.subset), runners(name), 0.0
    runner.begin(setting)
    for epoch in range(config.trial_epochs):
        seconds += runner.run(batches(part, config.batch, config.seed, epoch))[1]
    found = score(runner.carry[0], part, config)
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
    key = identity(name, setting, len(data.train.labels), data, config)
    path = config.output / "classify.jsonl"
    saved = config.output / "classify_states" / f"{zlib.crc32(json.dumps(key).encode()):08x}.npz"
    rows = {record["epoch"]: record for record in kept(path, key)}
    if len(rows) > config.epochs:
        return [rows[epoch] for epoch in range(config.epochs + 1)]
    runner = runners(name)
    runner.begin(setting)
    done = resume(runner, saved, len(data.train.labels) // config.batch)
    if done:
        keep(path, (row for row in done if row["epoch"] not in rows))
    else:
        start = score(runner.carry[0], data.train, config), score(runner.carry[0], data.test, config)
        done = [key | {"epoch": 0, "seconds": 0.0, "batch_losses": []} | scores(*start)]
        keep(path, done)
    for epoch in track(range(len(done), config.epochs + 1), description=f"{name:<20}"):
        losses, seconds = runner.run(batches(data.train, config.batch, config.seed, epoch - 1))
        params = runner.carry[0]
        row = {
            "epoch": epoch,
            "seconds": round(done[-1]["seconds"] + seconds, 2),
            "batch_losses": [finite(stretch.mean(), 5) for stretch in np.array_split(losses, min(10, len(losses)))],
        }
        done.append(key | row | scores(score(params, data.train, config), score(params, data.test, config)))
        save(runner, saved, done)
        keep(path, done[-1:])
    return done


def scores(train: Score, test: Score) -> dict[str, Any]:
    """Losses and accuracies for a record."""
    return {
        "train_loss": finite(train.loss, 5),
        "train_accuracy": round(train.accuracy, 5),
        "test_loss": finite(test.loss, 5),
        "test_accuracy": round(test.accuracy, 5),
    }


def save(runner: Runner, path: Path, rows: Records) -> None:
    """Write down where a run stands, in the place of where it stood, in one stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        leaves = map(np.asarray, jax.tree.leaves(runner.carry))
        np.savez(file, *leaves, rows=np.array(json.dumps(rows)))
    fresh.replace(path)


def resume(runner: Runner, path: Path, steps: int) -> Records:
    """Go on from what was saved; the records up to there, none if there is nothing to go on from."""
    if not path.exists():
        return []
    with np.load(path) as saved:
        rows = json.loads(str(saved["rows"]))
        leaves = [saved[f"arr_{index}"] for index in range(len(saved.files) - 1)]
    return rows if runner.restore(leaves, rows[-1]["epoch"] * steps) else []


class Pace(NamedTuple):
    """What a step costs, measured in turn.

    Attributes:
        idle: seconds a step of SGD-m where it was least disturbed.
        first: {method: steps of the first refresh period, over those of SGD-m}.
        later: {method: steps of later periods, over those of SGD-m}.
    """

    idle: float
    first: Mapping[str, float]
    later: Mapping[str, float]

    def seconds(self, name: str, steps: float, config: Config) -> float:
        """Of so many steps from the start."""
        early = min(steps, config.refresh_every)
        return self.idle * (early * self.first[name] + (steps - early) * self.later[name])


def paced(names: list[str], runners: Runners, data: Data, config: Config) -> Pace:
    """The cost of steps, measured unless it is in the file."""
    key = {"data": data.name, "channels": config.channels, "units": net(config).units, "batch": config.batch}
    key |= {"periods": [config.refresh_every, config.statistics_every], "rounds": config.rounds}
    path = config.output / "classify_paces.jsonl"
    if known := [record for record in kept(path, key) if {*names, BASELINE} <= set(record["first"])]:
        return Pace(known[-1]["idle"], known[-1]["first"], known[-1]["later"])
    pace = timed(list(dict.fromkeys([*names, BASELINE])), runners, data, config)
    keep(path, [key | pace._asdict()])
    return pace


def timed(names: list[str], runners: Runners, data: Data, config: Config) -> Pace:
    """Some refresh periods of all methods in turn, a fifth of a period at a time."""
    stretch = -(-config.refresh_every // 5)
    stream = list(batches(data.train.first(40 * config.batch), config.batch, config.seed, 0))
    stream = (stream * (stretch // len(stream) + 1))[:stretch]
    for name in names:
        tried = METHODS[name].tried
        runners(name).begin(Setting(min(s.rate for s in tried), max(s.damping for s in tried)))
    found = {name: np.zeros((config.rounds + 1, 5)) for name in names}
    for turn in track(range(5 * (config.rounds + 1)), description="timing"):
        for name in names:
            found[name].flat[turn] = runners(name).run(stream)[1]
    periods = {name: seconds.sum(axis=1) for name, seconds in found.items()}
    ratios = {name: seconds / periods[BASELINE] for name, seconds in periods.items()}
    return Pace(
        round(float(found[BASELINE].min() / stretch), 6),
        {name: round(float(ratio[0]), 3) for name, ratio in ratios.items()},
        {name: round(float(np.median(ratio[1:])), 3) for name, ratio in ratios.items()},
    )


def plan(names: list[str], pace: Pace, data: Data, config: Config) -> str:
    """How long what is left to do will take, on a machine with nothing else to do."""
    per_trial = min(config.subset, len(data.train.labels))
    measuring = 0.4 * pace.idle / config.batch  # seconds an image: a forward pass
    trials, seconds = 0, {"trials": 0.0, "runs": 0.0}
    for name in names:
        left = [s for s in METHODS[name].tried if not kept(trials_path(config), trial_key(name, s, data, config))]
        trials += len(left)
        steps = config.trial_epochs * (per_trial // config.batch)
        seconds["trials"] += len(left) * (pace.seconds(name, steps, config) + measuring * per_trial)
        steps = config.epochs * (len(data.train.labels) // config.batch)
        images = (config.epochs + 1) * (len(data.train.labels) + len(data.test.labels))
        seconds["runs"] += (pace.seconds(name, steps, config) + measuring * images) if config.epochs else 0.0
    costs = ", ".join(f"{name} {pace.later[name]:.2f}" for name in names if name != BASELINE)
    return (
        f"With {config.channels} channels a step of {BASELINE} takes {1000 * pace.idle:.0f} ms; so many times as long "
        f"take {costs}.\n"
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
    runners = cache(lambda name: Runner(METHODS[name], data, config))
    pace = paced(names, runners, data, config)
    report(plan(names, pace, data, config))
    trials = tune(names, runners, data, config)
    if not config.epochs:
        return Found(trials, {}, pace)
    return Found(trials, {name: train(name, best(name, trials), runners, data, config) for name in names}, pace)


def tuning(found: Found, config: Config) -> Table:
    """The best of the trials of every method, with the clip of the configuration and with any other."""
    result = Table(
        title=f"Trials: training loss of {found.trials[0]['images']} images after {config.trial_epochs} epoch(s)",
        caption="best: learning rate, damping; *: at an edge of what was tried.",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("kl_clip", "best", "loss", "accuracy, %", "median loss", "diverged", "trials"):
        result.add_column(heading, justify="right")
    varied = ("name", "rate", "damping", "kl_clip", "loss", "accuracy", "seconds")
    key = {field: value for field, value in found.trials[0].items() if field not in varied}
    groups: dict[tuple[str, float], Records] = {}
    for record in kept(trials_path(config), key):
        if record["name"] in {other["name"] for other in found.trials}:
            groups.setdefault((record["name"], record["kl_clip"]), []).append(record)
    for (name, clip), records in groups.items():
        losses = [np.inf if record["loss"] is None else record["loss"] for record in records]
        record = records[int(np.argmin(losses))]
        edges = [
            number in (min(values), max(values)) and min(values) < max(values)
            for number, values in zip(
                (record["rate"], record["damping"]),
                zip(*((other["rate"], other["damping"]) for other in records), strict=True),
                strict=True,
            )
        ]
        cells = (f"{min(losses):.4f}", f"{100 * record['accuracy']:.2f}", f"{np.median(losses):.4f}")
        setting = f"{Setting(record['rate'], record['damping'])}{'*' if any(edges) else ''}"
        result.add_row(name, f"{clip:g}", setting, *cells, f"{np.isinf(losses).sum()}", f"{len(records)}")
    return result


def table(found: Found, config: Config) -> Table:
    """Loss and accuracy after every epoch, and what an epoch costs."""
    epochs = sorted({epoch for epoch in (1, 2, 3, 5, 10, 20, config.epochs) if epoch <= config.epochs})
    result = Table(
        title=f"Training loss, and test accuracy in %, with {config.channels} channels",
        caption="A step over SGD-m's: all methods in turn in one process, after the first refresh period. The seconds "
        "are of all epochs at that cost.",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("rate, damping", *(f"epoch {epoch}" for epoch in epochs), "a step / SGD-m's", "s"):
        result.add_column(heading, justify="right")
    for name, rows in found.runs.items():
        shown = (rows[epoch] for epoch in epochs)
        cells = (
            f"{np.nan if row['train_loss'] is None else row['train_loss']:.4f}  {100 * row['test_accuracy']:.2f}"
            for row in shown
        )
        seconds = found.pace.seconds(name, config.epochs * (rows[0]["images"] // config.batch), config)
        setting = str(Setting(rows[0]["rate"], rows[0]["damping"]))
        result.add_row(name, setting, *cells, f"{found.pace.later[name]:.2f}", f"{seconds:.0f}")
    return result


def picture(found: Found, config: Config) -> Figure:
    """Training loss and test accuracy, against epochs and against seconds; in thin lines the losses of batches."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained")
    for name, rows in found.runs.items():
        steps = rows[0]["images"] // config.batch
        color = f"C{list(METHODS).index(name)}"
        epochs = np.array([row["epoch"] for row in rows])
        parts = [(row["epoch"] - 1, np.array(row["batch_losses"], float)) for row in rows[1:]]
        middles = np.concatenate([first + (np.arange(len(part)) + 0.5) / len(part) for first, part in parts])
        losses = np.concatenate([part for _, part in parts])
        for column, clock in enumerate((
            lambda epoch: epoch,
            np.vectorize(lambda epoch, name=name, steps=steps: found.pace.seconds(name, epoch * steps, config)),
        )):
            style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.6, "label": name}
            upper, lower = axes[:, column]
            upper.plot(clock(middles), losses, color=color, linewidth=0.8, alpha=0.6)
            upper.plot(clock(epochs[1:]), [row["train_loss"] for row in rows[1:]], **style)
            lower.plot(clock(epochs[1:]), [100 * row["test_accuracy"] for row in rows[1:]], **style)
    for axis in axes.flat:
        axis.grid(alpha=0.2, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(yscale="log", ylabel="training loss, nats an image")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("{x:g}")
    axes[1, 0].set(ylabel="test accuracy, %", xlabel="epochs")
    axes[1, 1].set(xlabel="seconds on the idle machine (see the experiment)")
    axes[0, 0].set_title(f"3C1F, {config.channels} channels", loc="left", fontweight="bold")
    axes[0, 1].legend(frameon=False, fontsize=9)
    return figure


def small(config: Config) -> Config:
    """A tiny net on the digits, a few steps, in a folder of its own."""
    return replace(
        config,
        output=config.output / "smoke",
        channels=3,
        units=8,
        epochs=1,
        batch=100,
        subset=300,
        refresh_every=5,
        statistics_every=2,
        data=None,
    )


def main(config: Config) -> None:
    """Say what it takes, run, print the tables, write the picture."""
    config, console = small(config) if config.smoke else config, Console(width=160)
    found = run(config, console.print)
    console.print(tuning(found, config))
    if found.runs:
        console.print(table(found, config))
        path = config.output / f"classify_{config.channels}.png"
        picture(found, config).savefig(path, dpi=110)
        console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
