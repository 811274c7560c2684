"""What becomes of every method with its defaults: with a learning rate alone, and with none at all?

The digits of 8x8 pixels that scikit-learn ships, by a convnet and by dense layers with tanh. Every complete optimizer
is given a learning rate from 0.001 to 1 and nothing else, once with its own `kl_clip` and once with none; then methods
without a learning rate train with batches from 32 images to all of them, beside K-FAC and Adam with rates that fall to
zero like a cosine. "elsewhere" are forty steps with a learning rate alone of an autoencoder, a transformer on letters
and a ResNet with batch normalisation. Losses are those of all the images after the last step, or of what the other two
are measured on; "over": above the loss at the start, or not finite.

Expected: with the clip no cell diverges, and the best cell of a row is as good as without. Without a learning rate
large batches are far ahead, since the steps become Newton's, and small ones do not blow up.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from rich.table import Table

import natgrad_jax as ng
from experiments import figures, problems, study, text
from experiments.data import digits, endless
from experiments.figures import ends
from experiments.nets import Convnet, Perceptron, ResNet
from experiments.records import Records
from experiments.running import Task
from experiments.study import Entry, Limits, Numbers, cosine

NETS: Mapping[str, nn.Module] = {
    "convnet": Convnet((16, 32), (2, 2), (64,)),
    "dense": Perceptron((64, 64, 64), 10),
}
CODE_OF_30 = Perceptron((250, 30, 250), linear=1)
METHODS = ("kfac", "ekfac", "tkfac", "tekfac", "tengrad", "tnt", "mbf", "kbfgs", "shampoo", "soap")
RATES, BATCH, BATCHES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0), 128, (32, 64, 256, 1797)
OVER = '"over": above the loss at the start, or not finite'


def entry(name: str, tried: tuple[Numbers, ...] = ({},), **options: Any) -> Entry:
    """A method of the package, with the rates that are tried or with none."""
    return study.natural(getattr(ng, name), tried, "true" if name == "kbfgs" else "sampled", **options)


def with_rates() -> dict[str, Entry]:
    """The rows of the first table: the rates are trials, and all of them are shown."""
    tried = study.grid(learning_rate=RATES)
    rows = {"optax.adam": Entry(lambda numbers, layers: optax.adam(numbers["learning_rate"]), tried)}
    for name in METHODS:
        rows |= {name: entry(name, tried), f"{name}, kl_clip=None": entry(name, tried, kl_clip=None)}
    return rows


def without() -> dict[str, Entry]:
    """The rows of the second table; a rate is the peak of a cosine. That of K-BFGS is part of what it learns from."""
    rows = {
        "optax.adam, 0.01": Entry(lambda numbers, layers: optax.adam(cosine(0.01, numbers["horizon"]))),
        "kfac, 0.1": Entry(lambda numbers, layers: ng.kfac(cosine(0.1, numbers["horizon"]), layers)),
    }
    return rows | {f"{name}, no rate": entry(name) for name in METHODS if name != "kbfgs"}


def case(net: str, batch: int) -> Callable[[], study.Case]:
    """How a net with batches of a size is made."""
    return partial(problems.on_digits, NETS[net], {"problem": net, "batch": batch}, batch)


def resnet() -> study.Case:
    """A ResNet of 8 layers on the digits in colour; its loss is that of 512 of them, normalised by their moments."""
    images = digits(32, 3).train
    task, few = Task(ResNet(8, 8), problems.CLASSES, images.first(BATCH), {"train": True}), images.first(512)

    @jax.jit
    def loss(variables):
        outputs, _ = task.model.apply(variables, few.images, train=True, mutable=["batch_stats"])
        return problems.CLASSES(outputs, few.labels)

    return study.Case({"problem": "resnet"}, task, partial(endless, images, BATCH), lambda found: float(loss(found)))


def table(rows: Records, title: str) -> Table:
    """Final losses: of one run, or the median of several with the worst in brackets."""

    def column(row: dict[str, Any]) -> str:
        return "".join(f"{rate:g}" for rate in row["numbers"].values()) or str(row["batch"])

    headings = ["net", "optimizer"]
    return figures.pivot(rows, ["problem", "name"], column, cell, title=title, headings=headings, caption=OVER)


def cell(rows: Records) -> str:
    """A cell of the table."""
    start, last = min(row["losses"][0] for row in rows), ends(rows)

    def text(loss: float) -> str:
        return f"{loss:.2g}" if loss <= start else "over"

    return text(last[0]) if len(last) == 1 else f"{text(float(np.median(last)))} ({text(last.max())})"


WITH_RATES = study.Study(
    "defaults",
    "With a learning rate alone",
    {net: case(net, BATCH) for net in NETS},
    with_rates(),
    Limits(200, 200),
    partial(table, title=f"With a learning rate alone: 200 steps, batches of {BATCH}"),
    config={"rates": [*RATES]},
    seeds=(),
)
WITHOUT = study.Study(
    "defaults",
    "Without a learning rate",
    {f"{net}, {batch}": case(net, batch) for net in NETS for batch in BATCHES},
    without(),
    Limits(200, 200),
    partial(table, title="Without a learning rate: 200 steps, by the size of the batch"),
    seeds=range(5),
)

ELSEWHERE = WITH_RATES._replace(
    name="defaults_elsewhere",
    title="With a learning rate alone, elsewhere",
    cases={
        "autoencoder": partial(problems.on_digits, CODE_OF_30, {"problem": "autoencoder"}, BATCH, 28),
        "transformer": partial(text.case, 16, 32, 32),
        "resnet": resnet,
    },
    entries={name: one for name, one in with_rates().items() if "None" not in name},
    limits=Limits(40, 40),
    table=partial(table, title="With a learning rate alone: 40 steps"),
    command='make defaults ARGS="--problems autoencoder transformer resnet"',
)

if __name__ == "__main__":
    study.main(WITH_RATES, WITHOUT, ELSEWHERE)
