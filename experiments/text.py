"""Do natural gradients help a small transformer on text, if all have the same number of trials?

The works of Shakespeare in one megabyte, letter by letter; two layers of attention and dense layers, normalised in
front, the table of letters not tied to the head. The loss is that of a letter the training does not see, in nats;
trained is the sum over the letters of a passage.

Every method has as many trials, short runs from the same start on the same batches: its usual setting and others drawn
within the ranges of `methods` for classifiers. The one with the least loss at its end then trains for longer. All do
that in turn, some steps each, so that a busy machine slows all alike; neither compilation nor the measuring of the loss
is in the seconds. Statistics are of every fifth step, refreshes of every twentieth; a step is clipped to a change of
the outputs of 0.01 nats a letter, where a method has a clip.

Expected: SOAP, K-FAC, EKFAC and TNT below Adam after as many steps; in seconds less of a lead, since at this size
statistics and refreshes cost as much as a gradient.

    make text                                    (NATGRAD_DATA names a folder with tinyshakespeare/input.txt)
    make text ARGS="--methods Adam K-FAC --budget 6"
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng
from experiments.data import Part, folder, shakespeare
from experiments.methods import METHODS, Shared
from experiments.records import Records, finite, keep, kept, machine
from experiments.training import Runner, Setting, Task
from experiments.tune import settings

LIKELIHOOD = ng.losses.softmax_cross_entropy


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share.

    Attributes:
        output: folder of the records and of the picture.
        methods: names of `methods.METHODS`.
        budget: trials of every method beside its usual setting.
        trial: steps of a trial.
        steps: of the run at the best setting.
        every: steps from one measured loss to the next.
        batch: passages in a step.
        context: letters of a passage.
        width: of the transformer; its dense layers have four times as many units.
        seed: of the settings, the parameters, the passages and the labels drawn.
        data: a folder with tinyshakespeare/input.txt.
    """

    output: Path = Path("results")
    methods: tuple[str, ...] = ("Adam", "SOAP", "K-FAC", "EKFAC", "TNT")
    budget: int = 3
    trial: int = 100
    steps: int = 500
    every: int = 25
    batch: int = 16
    context: int = 64
    width: int = 64
    seed: int = 0
    data: Path | None = field(default_factory=folder)

    @property
    def shared(self) -> Shared:
        """What all methods have alike."""
        return Shared(refresh_every=20, statistics_every=5, weight_decay=0.0, kl_clip=0.01 * self.context)

    @property
    def key(self) -> dict[str, int]:
        """What tells its records from all others."""
        names = ("trial", "steps", "every", "batch", "context", "width", "seed")
        return {name: getattr(self, name) for name in names}


class Transformer(nn.Module):
    """Two layers of causal attention with four heads and of dense layers, each behind a norm and beside a shortcut."""

    letters: int
    width: int

    @nn.compact
    def __call__(self, x):
        """Letters [N, T] -> logits [N, T, letters]."""
        place = self.param("places", nn.initializers.normal(0.02), (x.shape[1], self.width))
        mask: Any = nn.make_causal_mask(x)
        x = nn.Embed(self.letters, self.width)(x) + place
        for _ in range(2):
            h = nn.LayerNorm()(x)
            attended: Any = nn.MultiHeadDotProductAttention(4)(h, mask=mask)
            x = x + attended
            h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(self.letters)(nn.LayerNorm()(x))


class Text(NamedTuple):
    """Letters as numbers from 0: those for training, those for measuring, and how many different ones there are."""

    train: np.ndarray
    test: np.ndarray
    letters: int


def text(config: Config) -> Text:
    """The works; the last tenth is for measuring."""
    letters, found = np.unique(np.frombuffer(shakespeare(config.data), np.uint8), return_inverse=True)
    cut = len(found) * 9 // 10
    return Text(found[:cut].astype(np.int32), found[cut:].astype(np.int32), len(letters))


def passages(letters: np.ndarray, config: Config, seed: int, steps: int) -> Iterator[Part]:
    """So many batches of passages from anywhere, each with the letters that follow.

    Args:
        letters: of a text.
        config: the numbers.
        seed: of the places.
        steps: how many.

    Yields:
        Letters [N, T] and the next ones.
    """
    random = np.random.default_rng(seed)
    for _ in range(steps):
        starts = random.integers(len(letters) - config.context, size=(config.batch, 1))
        places = starts + np.arange(config.context + 1)
        found = letters[np.minimum(places, len(letters) - 1)]
        yield Part(found[:, :-1], found[:, 1:])


@partial(jax.jit, static_argnums=0)
def _loss(net: Transformer, variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits: Any = net.apply(variables, x)
    return LIKELIHOOD(logits, y)


class Racer:
    """A method on the text: compiled once, measured on the same passages."""

    def __init__(self, name: str, corpus: Text, config: Config):
        """Compile, and stand at the start."""
        self.method, self._corpus, self._config = METHODS[name], corpus, config
        self._net = Transformer(corpus.letters, config.width)
        (batch,) = passages(corpus.train, config, 0, 1)
        usual = self.method.ranges["classifier"].usual
        make = self.method.make("classifier", config.shared)
        self.runner = Runner(make, usual, Task(self._net, LIKELIHOOD, batch, config.seed), self.method.labels)
        self._held = list(passages(corpus.test, config, 1, 16))

    def start(self, setting: Setting, steps: int) -> None:
        """Go back to the start, with a setting and so many batches to come."""
        self.runner.begin(setting)
        self._stream = passages(self._corpus.train, self._config, self._config.seed + 2, steps)

    def run(self, steps: int) -> tuple[float, float]:
        """Some steps: the loss of letters not trained on, and the seconds that the steps took."""
        seconds = self.runner.run(batch for _, batch in zip(range(steps), self._stream, strict=False))[1]
        return self.loss(), seconds

    def loss(self) -> float:
        """The loss of letters not trained on, where it stands."""
        losses = [_loss(self._net, self.runner.variables, *map(jnp.asarray, part)) for part in self._held]
        return float(np.mean(losses)) / self._config.context


def trials(name: str, racer: Racer, config: Config) -> Records:
    """The trials of a method that are not in the file, and those that are."""
    path, found = config.output / "text.jsonl", []
    drawn = settings(racer.method.ranges["classifier"], config.budget, "drawn", (config.seed, crc32(name.encode())))
    for setting in dict.fromkeys((racer.method.ranges["classifier"].usual, *drawn)):
        key = {"kind": "trial", "name": name, **setting._asdict(), **config.key}
        if not (known := kept(path, key)):
            racer.start(setting, config.trial)
            loss, seconds = racer.run(config.trial)
            known = [{**key, **machine(), "loss": finite(loss, 5), "seconds": round(seconds, 2)}]
            keep(path, known)
        found.append(known[-1])
    return found


def run(config: Config) -> Records:
    """The trials of all methods, then their runs in turn.

    Args:
        config: the numbers.

    Returns:
        A record for each method, with its losses and seconds.

    Raises:
        ValueError: if there is no method of a name.
    """
    if unknown := set(config.methods) - set(METHODS):
        raise ValueError(f"There is no {sorted(unknown)}; there are {list(METHODS)}.")
    path, corpus = config.output / "text.jsonl", text(config)
    keys = [{"kind": "run", "name": name, "budget": config.budget, **config.key} for name in config.methods]
    known = [kept(path, key) for key in keys]
    if all(known):
        return [records[-1] for records in known]
    racers = {name: Racer(name, corpus, config) for name in track(config.methods, description="compiling")}
    rows: Records = []
    for key, (name, racer) in zip(keys, racers.items(), strict=True):
        tried = trials(name, racer, config)
        best = min(tried, key=lambda record: np.inf if record["loss"] is None else record["loss"])
        setting = Setting(best["rate"], best["damping"])
        racer.start(setting, config.steps)
        rows.append({**key, **machine(), **setting._asdict(), "losses": [finite(racer.loss(), 5)], "at": [0.0]})
    for _ in track(range(config.steps // config.every), description="training"):
        for row, racer in zip(rows, racers.values(), strict=True):
            loss, seconds = racer.run(config.every)
            row["losses"].append(finite(loss, 5))
            row["at"].append(round(row["at"][-1] + seconds, 3))
    keep(path, rows)
    return rows


def table(rows: Records, config: Config) -> Table:
    """Where every method ends, and when it is where Adam ends."""
    first = rows[0]["losses"][-1]
    result = Table(title=f"Loss of letters not trained on after {config.steps} steps, in nats")
    for heading in ("method", "learning rate, damping", "loss", "seconds", f"as {rows[0]['name']}: steps", "seconds"):
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        losses = np.array([np.inf if loss is None else loss for loss in row["losses"]])
        there = np.flatnonzero(losses <= first)
        soon = (f"{there[0] * config.every}", f"{row['at'][there[0]]:.1f}") if len(there) else ("-", "-")
        setting = Setting(row["rate"], row["damping"])
        result.add_row(row["name"], str(setting), f"{losses[-1]:.3f}", f"{row['at'][-1]:.1f}", *soon)
    return result


def picture(rows: Records, config: Config) -> Figure:
    """Loss against steps and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for row in rows:
        losses = np.array([np.nan if loss is None else loss for loss in row["losses"]])
        axes[0].plot(np.arange(len(losses)) * config.every, losses, label=row["name"])
        axes[1].plot(row["at"], losses, label=row["name"])
    axes[0].set(xlabel="steps", ylabel="loss of letters not trained on, nats")
    axes[1].set(xlabel="seconds of steps, all methods in turn")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    title = f"Two-layer transformer on Shakespeare, every method at the best of {config.budget + 1} trials"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def main(config: Config) -> None:
    """Train, print the table, write the picture."""
    rows = run(config)
    console = Console(width=120)
    console.print(table(rows, config))
    path = config.output / "text.png"
    picture(rows, config).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
