"""What becomes of every method with its defaults: with a learning rate alone, and with none at all?

The digits of 8x8 pixels that scikit-learn ships, by a convnet and by dense layers with tanh. Every complete optimizer
is given a learning rate from 0.001 to 1 and nothing else, once with its own `kl_clip` and once with none; then methods
without a learning rate train with batches from 32 images to all of them, beside K-FAC and Adam with rates that fall to
zero like a cosine. Losses are those of all the images after the last step; "over": above the loss at the start, or not
finite.

Expected: with the clip no cell diverges, and the best cell of a row is as good as without. Without a learning rate
large batches are far ahead, since the steps become Newton's, and small ones do not blow up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optax
import tyro
from flax import linen as nn
from rich.table import Table

import natgrad_jax as ng
from experiments import digits, figures, study
from experiments.figures import ends
from experiments.nets import Convnet, Perceptron
from experiments.records import Records

NETS: Mapping[str, nn.Module] = {
    "convnet": Convnet((16, 32), (2, 2), (64,)),
    "dense": Perceptron((64, 64, 64), 10),
}
METHODS = ("kfac", "ekfac", "tkfac", "tekfac", "tengrad", "tnt", "mbf", "kbfgs", "shampoo", "soap")


@dataclass(frozen=True)
class Config:
    """The numbers that all runs share.

    Attributes:
        output: folder of the records.
        nets: which of `NETS`.
        methods: which of the complete optimizers.
        rates: learning rates that are given.
        steps: of every run.
        batch: images in a batch where the rate is given.
        batches: images in a batch where none is.
        seeds: how many runs without a rate, of which the median and the worst are told.
    """

    output: Path = Path("results")
    nets: tuple[str, ...] = tuple(NETS)
    methods: tuple[str, ...] = METHODS
    rates: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    steps: int = 200
    batch: int = 128
    batches: tuple[int, ...] = (32, 64, 256, 1797)
    seeds: int = 5


def with_rates(config: Config) -> dict[str, study.Entry]:
    """The rows of the first table: the rates are trials, and all of them are shown."""
    tried = study.grid(rate=config.rates)
    rows = {"optax.adam": study.Entry(lambda numbers, layers: optax.adam(numbers["rate"]), tried)}
    for name in config.methods:
        for told, options in ((name, {}), (f"{name}, kl_clip=None", {"kl_clip": None})):
            rows[told] = _entry(name, tried, options)
    return rows


def without(config: Config) -> dict[str, study.Entry]:
    """The rows of the second table; the rate is the peak of a cosine."""

    def falling(rate: float, numbers: study.Numbers) -> optax.Schedule:
        return study.cosine(rate, numbers["horizon"])

    rows = {
        "optax.adam, 0.01": study.Entry(lambda numbers, layers: optax.adam(falling(0.01, numbers))),
        "kfac, 0.1": study.Entry(lambda numbers, layers: ng.kfac(falling(0.1, numbers), layers)),
    }
    for name in config.methods:
        if name != "kbfgs":  # whose rate is part of what it learns from
            rows[f"{name}, no rate"] = _entry(name, ({},), {})
    return rows


def _entry(name: str, tried: tuple[study.Numbers, ...], options: Mapping[str, Any]) -> study.Entry:
    def make(numbers: study.Numbers, layers: Any) -> Any:
        rate = {"learning_rate": numbers["rate"]} if "rate" in numbers else {}
        return getattr(ng, name)(layers=layers, **rate, **options)

    return study.Entry(make, tried, "true" if name == "kbfgs" else "sampled")


def run(config: Config) -> tuple[Records, Records]:
    """The rows of both tables; those of the first are trials, which have a row for every rate."""
    images, limits = digits.images(), study.Limits(config.steps, config.steps)
    path, key = config.output / "defaults.jsonl", study.key(config, "steps")

    def case(net: str, batch: int) -> study.Case:
        return digits.case({"problem": net, "batch": batch}, NETS[net], images, batch)

    cases = [case(net, config.batch) for net in config.nets]
    first = study.run(path, study.key(config, "steps", "rates"), cases, with_rates(config), limits, ())
    cases = [case(net, batch) for net in config.nets for batch in config.batches]
    return first, study.run(path, key, cases, without(config), limits, range(config.seeds))


def table(rows: Records, column: str, title: str) -> Table:
    """Final losses: of one run, or the median of several with the worst in brackets."""
    cells: dict[tuple[str, str], dict[str, Records]] = {}
    for row in rows:
        heading = f"{row['numbers'][column]:g}" if column in row["numbers"] else str(row[column])
        cells.setdefault((row["problem"], row["name"]), {}).setdefault(heading, []).append(row)
    headings = list(dict.fromkeys(heading for group in cells.values() for heading in group))
    lines = [(*names, *(cell(group[heading]) for heading in headings)) for names, group in cells.items()]
    caption = '"over": above the loss at the start, or not finite'
    return figures.table(title, ("net", "optimizer", *headings), lines, caption, names=2)


def cell(rows: Records) -> str:
    """A cell of the table."""
    start, last = min(row["losses"][0] for row in rows), ends(rows)

    def told(loss: float) -> str:
        return f"{loss:.2g}" if loss <= start else "over"

    return told(last[0]) if len(last) == 1 else f"{told(float(np.median(last)))} ({told(last.max())})"


def main(config: Config) -> None:
    """Train, and print both tables."""
    first, second = run(config)
    titles = f"With a learning rate alone: {config.steps} steps, batches of {config.batch}", "Without a learning rate"
    title = f"{titles[1]}: {config.steps} steps, by the size of the batch"
    tables = table(first, "rate", titles[0]), table(second, "batch", title)
    figures.present(tables, None, config.output, 120)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
