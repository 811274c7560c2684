"""Do natural gradients help a small transformer on text, if all have the same number of trials?

The works of Shakespeare in one megabyte, letter by letter; two layers of attention and dense layers, normalised in
front, the table of letters not tied to the head. The loss is that of a letter the training does not see, in nats;
trained is the mean over the letters of a passage, so that damping and clip are of a letter. (With the sum and the same
settings EKFAC and TNT blow up: the damping is then 64 times too small.) Every method has as many trials, short runs
from the same start on the same batches: its usual setting and others drawn within a range. The one with the least loss
at its end then trains for longer. Rates fall like a cosine. Statistics are of every fifth step, refreshes of every
twentieth. Beside them K-FAC with nothing said.

    make text                                    (NATGRAD_DATA names a folder with tinyshakespeare/input.txt)
    make text ARGS="--methods Adam K-FAC --budget 6"
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

import natgrad_jax as ng
from experiments import figures, study
from experiments.data import Part, folder, shakespeare
from experiments.methods import Range, Setting, tuned
from experiments.nets import Transformer
from experiments.records import Records
from experiments.running import Labels, Task
from experiments.tune import settings

LIKELIHOOD = ng.losses.softmax_cross_entropy.reduced("mean")
SHARED: dict[str, Any] = {"statistics_every": 5, "refresh_every": 20, "kl_clip": 0.01}


class Method(NamedTuple):
    """A method: rate, damping, layers -> optimizer; the range of its settings, None if it has none; its labels."""

    make: Callable[[Any, Any, Any], Any]
    range: Range | None
    labels: Labels | None = "sampled"


def ours(method: Callable[..., Any]) -> Method:
    """A method of the family of K-FAC."""
    natural = tuned((0.1, 0.1), (0.02, 0.5), (0.03, 1.0))
    return Method(lambda rate, damping, layers: method(rate, layers, damping=damping, **SHARED), natural)


def soap(rate: Any, damping: Any, layers: Any) -> Any:
    """SOAP as its authors have it."""
    return ng.soap(rate, layers, statistics="gradient", momentum=0.95, damping=damping)


METHODS = {
    "Adam": Method(lambda rate, damping, layers: optax.adam(rate), tuned((3e-3,), (5e-4, 2e-2)), None),
    "SOAP": Method(soap, tuned((3e-3, 1e-16), (5e-4, 2e-2))),
    "K-FAC": ours(ng.kfac),
    "EKFAC": ours(ng.ekfac),
    "TNT": ours(ng.tnt),
    "K-FAC, nothing said": Method(lambda rate, damping, layers: ng.kfac(layers=layers), None),
}


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share.

    Attributes:
        output: folder of the records and of the picture.
        methods: names of `METHODS`.
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
    methods: tuple[str, ...] = tuple(METHODS)
    budget: int = 3
    trial: int = 100
    steps: int = 500
    every: int = 25
    batch: int = 16
    context: int = 64
    width: int = 64
    seed: int = 0
    data: Path | None = field(default_factory=folder)


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


def passages(letters: np.ndarray, config: Config, seed: int) -> Iterator[Part]:
    """Batches of passages from anywhere, for ever, each with the letters that follow.

    Args:
        letters: of a text.
        config: the numbers.
        seed: of the places.

    Yields:
        Letters [N, T] and the next ones.
    """
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(len(letters) - config.context, size=(config.batch, 1))
        found = letters[starts + np.arange(config.context + 1)]
        yield Part(found[:, :-1], found[:, 1:])


def case(config: Config) -> study.Case:
    """The transformer on the text."""
    corpus = text(config)
    net, measured = Transformer(2, config.width, 4, corpus.letters), passages(corpus.test, config, 1)
    held = [next(measured) for _ in range(16)]
    task = Task(net, LIKELIHOOD, next(passages(corpus.train, config, 0)), config.seed)
    of_batch = jax.jit(task.loss)

    def loss(variables: Any) -> float:
        return float(np.mean([of_batch(variables, *part) for part in held]))

    return study.Case({"problem": "text"}, task, lambda seed: passages(corpus.train, config, seed + 2), loss)


def entry(name: str, config: Config) -> study.Entry:
    """A method at its usual setting and others."""
    method = METHODS[name]
    if method.range is None:
        return study.Entry(lambda numbers, layers: method.make(None, None, layers), labels=method.labels)
    drawn = settings(method.range, config.budget, "drawn", (config.seed, crc32(name.encode())))
    tried = tuple(setting._asdict() for setting in dict.fromkeys((method.range.usual, *drawn)))

    def made(numbers: study.Numbers, layers: Any) -> Any:
        return method.make(study.cosine(numbers["rate"], numbers["horizon"]), numbers["damping"], layers)

    return study.Entry(made, tried, method.labels)


def run(config: Config) -> Records:
    """The trials of all methods, then their runs in turn; a `ValueError` if there is no method of a name."""
    if unknown := set(config.methods) - set(METHODS):
        raise ValueError(f"There is no {sorted(unknown)}; there are {list(METHODS)}.")
    key = study.key(config, "budget", "trial", "steps", "every", "batch", "context", "width", "seed")
    limits, seed = study.Limits(config.steps, config.every), config.seed
    trial, entries = limits._replace(steps=config.trial), {name: entry(name, config) for name in config.methods}
    return study.run(config.output / "text.jsonl", key, [case(config)], entries, limits, (seed,), trial, seed)


def table(rows: Records) -> Table:
    """Where every method ends, and when it is where the first one ends."""
    lines, first = [], rows[0]["losses"][-1]
    for row in rows:
        setting, end = Setting(**row["numbers"]) if row["numbers"] else "none", figures.ends([row])[0]
        steps, seconds = study.reached(row, first)
        soon = (f"{steps}", f"{seconds:.1f}") if np.isfinite(steps) else ("-", "-")
        lines.append((row["name"], str(setting), f"{end:.3f}", f"{row['seconds'][-1]:.1f}", *soon))
    title = f"Loss of letters not trained on after {rows[0]['steps'][-1]} steps, in nats"
    headings = ("method", "learning rate, damping", "loss", "seconds", f"as {rows[0]['name']}: steps", "seconds")
    return figures.table(title, headings, lines)


def picture(rows: Records) -> Figure:
    """Losses against seconds and steps."""
    label = "loss of letters not trained on, nats"
    return figures.curves(rows, label, across="linear", up="linear")


def main(config: Config) -> None:
    """Train, print the table, write the picture."""
    rows = run(config)
    figures.present([table(rows)], picture(rows), config.output / "text.png", 120)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
