"""What becomes of every method with its defaults: with a learning rate alone, and with none at all?

The digits of 8x8 pixels that scikit-learn ships, by a convnet and by dense layers with tanh. Every complete optimizer
is given a learning rate from 0.001 to 1 and nothing else, once with its own `kl_clip` and once with none; then methods
without a learning rate (`ng.automatic`) train with batches from 32 images to all of them, beside K-FAC and Adam with
rates that fall to zero like a cosine.

Expected: with the clip no cell diverges, and the best cell of a row is as good as without. Without a learning rate
large batches are far ahead, since the steps become Newton's, and small ones do not blow up.

Found: no learning rate diverged with the clip; at small rates it changes nothing. A large rate can end above what its
best neighbour reaches, so that a rate is still worth choosing. Without one, batches of 64 and more end below both
that are tuned by hand; with batches of 32 K-FAC with its cosine is as good.

Losses are those of all the images after the last step; "over": above the loss at the start, or not finite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import natgrad_jax as ng
from experiments.data import digits
from experiments.nets import StridedConvnet, TanhNet

LIKELIHOOD = ng.losses.softmax_cross_entropy
NETS: Mapping[str, nn.Module] = {"convnet": StridedConvnet((16, 32), 64), "dense": TanhNet((64, 64, 64))}
METHODS = ("kfac", "ekfac", "tkfac", "tekfac", "tengrad", "tnt", "mbf", "kbfgs", "shampoo", "soap")
Make = Callable[[ng.Layers, Any], optax.GradientTransformation]


@dataclass(frozen=True)
class Config:
    """The numbers that all runs share.

    Attributes:
        nets: which of `NETS`.
        methods: which of the complete optimizers.
        rates: learning rates that are given.
        steps: of every run.
        batch: images in a batch where the rate is given.
        batches: images in a batch where none is.
        seeds: how many runs without a rate, of which the median and the worst are told.
    """

    nets: tuple[str, ...] = tuple(NETS)
    methods: tuple[str, ...] = METHODS
    rates: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    steps: int = 200
    batch: int = 128
    batches: tuple[int, ...] = (32, 64, 256, 1797)
    seeds: int = 5


class Record(NamedTuple):
    """The losses of all images at the end of some runs, and the least of those at their starts.

    Attributes:
        net: its name.
        row: the method and what it is given.
        column: learning rate or batch size.
        losses: at the end of each run; infinite where any was not finite.
        start: at the start.
    """

    net: str
    row: str
    column: str
    losses: tuple[float, ...]
    start: float


def with_rates(config: Config) -> dict[str, Make]:
    """{row: how it is made} of the first table."""
    rows: dict[str, Make] = {"optax.adam": lambda layers, rate: optax.adam(rate)}
    for name in config.methods:
        method = getattr(ng, name)
        rows[name] = lambda layers, rate, method=method: method(rate, layers)
        rows[f"{name}, kl_clip=None"] = lambda layers, rate, method=method: method(rate, layers, kl_clip=None)
    return rows


def without(config: Config) -> dict[str, Make]:
    """{row: how it is made} of the second table; the rate is the peak of a cosine."""

    def falling(rate):
        return optax.cosine_decay_schedule(rate, config.steps)

    rows: dict[str, Make] = {
        "optax.adam, 0.01": lambda layers, rate: optax.adam(falling(0.01)),
        "kfac, 0.1": lambda layers, rate: ng.kfac(falling(0.1), layers),
    }
    for name in config.methods:
        if name != "kbfgs":  # whose rate is part of what it learns from
            method = getattr(ng, name)
            rows[f"{name}, no rate"] = lambda layers, rate, method=method: method(layers=layers)
    return rows


def run(config: Config, report: Callable[[str], None] = lambda done: None) -> tuple[list[Record], list[Record]]:
    """Both tables."""
    first, second = [], []
    for net in config.nets:
        for row, make in with_rates(config).items():
            trained = training(net, row, make, config.batch, config)
            first += [_record(net, row, f"{rate:g}", [trained(0, rate)]) for rate in config.rates]
            report(f"{net}: {row}")
        for row, make in without(config).items():
            for batch in config.batches:
                trained = training(net, row, make, batch, config)
                second.append(_record(net, row, str(batch), [trained(seed, 0.0) for seed in range(config.seeds)]))
            report(f"{net}: {row}")
    return first, second


def _record(net: str, row: str, column: str, runs: list[tuple[float, float]]) -> Record:
    return Record(net, row, column, tuple(end for _, end in runs), min(start for start, _ in runs))


def training(net: str, row: str, make: Make, batch: int, config: Config) -> Callable[[int, float], tuple[float, float]]:
    """A function of seed and learning rate that gives the losses at the start and at the end; compiled once."""
    model, images, labels = NETS[net], *_digits()
    capture = ng.linen.capture(model, LIKELIHOOD, labels="true" if "kbfgs" in row else "sampled", verify=False)
    batch = min(batch, len(images))
    layers = capture.layers(jax.eval_shape(model.init, jax.random.key(0), images[:1]), images[:batch])

    @jax.jit
    def losses(order, key, rate):
        start, key = jax.random.split(key)
        params = model.init(start, images[:1])["params"]
        tx = optax.with_extra_args_support(make(layers, rate))

        def step(carry, now):
            params, state = carry
            chosen, key = now
            out = capture.value_and_grad({"params": params}, images[chosen], labels[chosen], key=key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), out.value

        keys = jax.random.split(key, config.steps)
        (after, _), values = jax.lax.scan(step, (params, tx.init(params)), (order, keys))
        outputs: Any = [model.apply({"params": tree}, images) for tree in (params, after)]
        return jnp.stack([LIKELIHOOD(logits, labels) for logits in outputs]), jnp.all(jnp.isfinite(values))

    def trained(seed, rate):
        random = np.random.default_rng(seed)
        epochs = -(-config.steps * batch // (len(images) // batch * batch))
        orders = [random.permutation(len(images))[: len(images) // batch * batch] for _ in range(epochs)]
        order = np.concatenate(orders).reshape(-1, batch)[: config.steps]
        (start, end), sound = jax.device_get(losses(order, jax.random.key(seed), rate))
        return float(start), float(end) if sound and np.isfinite(end) else np.inf

    return trained


def _digits() -> tuple[jax.Array, jax.Array]:
    """All the images and labels."""
    data = digits()
    images, labels = (np.concatenate(parts) for parts in zip(data.train, data.test, strict=True))
    return jnp.asarray(images), jnp.asarray(labels)


def table(records: list[Record], title: str) -> Table:
    """Final losses: of one run, or the median of several with the worst in brackets."""
    result = Table(title=title, caption='"over": above the loss at the start, or not finite', caption_justify="left")
    columns, found = (
        list(dict.fromkeys(record.column for record in records)),
        {(r.net, r.row, r.column): r for r in records},
    )
    for name in ("net", "optimizer", *columns):
        result.add_column(name, no_wrap=True)
    for net, row in dict.fromkeys((record.net, record.row) for record in records):
        result.add_row(net, row, *(_cell(found[net, row, column]) for column in columns))
    return result


def _cell(record: Record) -> str:
    """A cell of the table."""

    def told(loss):
        return f"{loss:.2g}" if loss <= record.start else "over"

    if len(record.losses) == 1:
        return told(record.losses[0])
    return f"{told(float(np.median(record.losses)))} ({told(max(record.losses))})"


def main(config: Config) -> None:
    """Train with progress shown, and print both tables."""
    console = Console(width=max(Console().width, 110))  # that no cell is cut, in a file say
    with Progress(console=console) as progress:
        total = len(config.nets) * (len(with_rates(config)) + len(without(config)))
        task = progress.add_task("compiling", total=total)
        first, second = run(config, lambda done: progress.update(task, advance=1, description=done))
    console.print(table(first, f"With a learning rate alone: {config.steps} steps, batches of {config.batch}"))
    console.print(table(second, f"Without a learning rate: {config.steps} steps, by the size of the batch"))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
