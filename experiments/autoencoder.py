"""Do the methods land on the curves that the authors of TNT and K-BFGS logged, and where do they land at their best?

Their MNIST autoencoder, 784-1000-500-250-30-250-500-1000-784 with ReLU and a linear code, 60,000 images, batches of
1000, weights and biases uniform in +-1/sqrt(fan in) at the start, binary cross-entropy summed over pixels, a constant
learning rate, no weight decay; for the second-order methods a pass over the data at the first parameters fills the
statistics. All runs have the same initial parameters and the same batches in the same order. Those called "authors"
have the settings of the authors' demonstrations, which were run on other batches and another draw of the start; what
they logged stands beside ours in the table. The settings of the others had the lowest training loss after two epochs of

    Adam (learning rate)       1e-3 2e-3 [4e-3]
    K-FAC (and damping)        (0.1, 1: diverges) (0.3, 3: diverges) (0.03, 1), all behind that of the
                               authors of K-BFGS, (0.1, 3), which therefore stands for K-FAC
    EKFAC                      (0.1, 3) [0.03, 1]
    TNT, in the units above    (1e-4, 0.03) (3e-4, 0.1): both diverge; (3e-4, 0.3), behind the authors' own (1e-4, 0.1),
                               which therefore stands for TNT
    MBF                        (1e-5, 1e-2) (3e-5, 3e-2) [1e-4, 0.1]; (3e-6, 1e-3) (3e-5, 1e-2) (1e-4, 1e-3) (1e-4,
                               3e-2) (3e-4, 1e-3) diverge; with sampled labels (3e-3, 1) (1e-3, 0.1) [3e-4, 0.1]
    Shampoo, grafted (rate)    1e-4 [3e-4] 1e-3; not grafted (5e-4, 3e-4), and (1e-3, 3e-4) (3e-3, 1e-3): diverge
    SOAP (rate)                1e-3 [5e-3] 1e-2 2e-2 3e-2
    K-BFGS                     [0.3, 0.3], the authors' own, also for K-BFGS(L); (0.2, 0.2) (0.3, 1); (0.3, 0.1) (0.5,
                               0.5) (1, 0.3) (1, 1) (3, 3) diverge

and "adaptive" has nothing tuned: learning rate, momentum and damping come from the quadratic model of the loss.

Expected: "authors" near what was logged (SGD-m 120 to 130 after ten epochs, TNT below 80, Shampoo near 110, K-FAC of
the authors of K-BFGS near 62, K-BFGS near 60). Found: SGD-m, Adam, both K-FACs and K-BFGS end within a unit of their
logs; TNT and Shampoo leave the plateau half an epoch later, and end at 80 and 119 beside 76 and 110. Below all that was
logged are K-FAC adaptive and SOAP, 57 after ten epochs; Shampoo at the length of Adam's steps is there sooner, but does
not settle at a constant rate. MBF is as good as SGD-m with sampled labels, and worse with the true ones.

Units: the authors of TNT take statistics of the gradient of the mean loss, without the batch size; that is our
`scale="batch"`, and its damping enters each mode by itself, `split="per_mode"`. Momentum stands in front of every
second-order direction. Their Adam squares the smoothed gradient, and is spelled out below. The K-FAC of the authors of
K-BFGS has a learning rate of 1 beside an average of gradients, which is 0.1 beside a heavy ball of 0.9.

Runs are kept in a file, line by line, and what is in it is not run again. What a step costs is measured apart: all
methods in turn in one process, some refresh periods each, so that a busy machine slows all alike.

    make autoencoder                                                (some 40 minutes on two cores; needs NATGRAD_DATA)
    make autoencoder ARGS="--only 'TNT (authors)' --epochs 3"
    make autoencoder ARGS="--trials TNT:0.3:1.0 TNT:0.1:1.0"        (other settings: method, learning rate, damping)
"""

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

Make = Callable[[ng.Layers], optax.GradientTransformation]
OFTEN = {"statistics_every": 1, "refresh_every": 20}
"""As in the experiments of TNT."""


class Entry(NamedTuple):
    """A run of the comparison.

    Attributes:
        make: layers -> optimizer.
        warm: whether a pass over the data fills the statistics first.
        logged: {epoch: training loss} of the authors.
        cost: of an epoch, over SGD-m's, as the authors logged it.
        labels: those of the curvature, as `ng.linen.capture` takes them.
    """

    make: Make
    warm: bool = False
    logged: Mapping[int, float] = {}
    cost: float | None = None
    labels: Literal["sampled", "true"] = "sampled"


def heavy_ball_before(direction: Any, rate: float) -> optax.GradientTransformation:
    """Momentum in front of a direction whose statistics are of the curvature."""
    return optax.chain(optax.trace(0.9), direction, optax.scale_by_learning_rate(rate))


def kfac(rate: float, damping: float) -> Make:
    """K-FAC with the root of the damping on both factors, as all these authors have it."""
    make = partial(ng.scale_by_kfac, damping=damping, split="even", decay=0.9, **OFTEN)
    return lambda layers: heavy_ball_before(make(layers), rate)


def ekfac(rate: float, damping: float) -> Make:
    """EKFAC in the same place; its basis by orthogonal iteration."""
    make = partial(ng.scale_by_ekfac, damping=damping, split="even", decay=0.9, rescale_every=5, refresh="qr", **OFTEN)
    return lambda layers: heavy_ball_before(make(layers), rate)


def tnt(rate: float, damping: float) -> Make:
    """TNT as its authors run it: in the scale of the mean gradient of a batch, the damping in each mode by itself."""
    return lambda layers: ng.tnt(rate, layers, damping=damping, scale="batch", split="per_mode", **OFTEN)


def mbf(rate: float, damping: float) -> Make:
    """MBF with the periods of its authors."""
    return lambda layers: ng.mbf(rate, layers, damping=damping, statistics_every=2, refresh_every=25)


def mbf_of_fisher(rate: float, damping: float) -> Make:
    """MBF of the Fisher matrix, from sampled labels, in the scale of one example."""
    make = partial(ng.mbf, damping=damping, statistics="curvature", statistics_every=2, refresh_every=25)
    return lambda layers: make(rate, layers)


def shampoo(rate: float, damping: float) -> Make:
    """Shampoo as the baseline of TNT: refreshed at every 20th step, from the start."""
    return lambda layers: ng.shampoo(rate, layers, damping=damping, early_refresh=False, **OFTEN)


def grafted(rate: float, damping: float) -> Make:
    """Shampoo at the length of Adam's steps, otherwise as it is mostly run today."""
    make = partial(ng.shampoo, damping=damping, decay=0.99, graft_to="adam", graft_decay=0.99, **OFTEN)
    return lambda layers: make(rate, layers)


def soap(rate: float, damping: float) -> Make:
    """SOAP at its own periods."""
    return lambda layers: ng.soap(rate, layers, damping=damping)


def kbfgs(rate: float, damping: float, **options: Any) -> Make:
    """K-BFGS as its authors run it, but for the rate and the damping."""
    return lambda layers: ng.kbfgs(rate, layers, damping=damping, weight_decay=1e-5, **options)


def adam(rate: float, eps: float) -> Make:
    """Adam."""
    return lambda layers: optax.adam(rate, eps=eps)


def adam_of_the_authors(layers: ng.Layers) -> optax.GradientTransformation:
    """Adam with the second moment of the smoothed gradient."""
    del layers
    rms = optax.scale_by_rms(0.999, eps=1e-4, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(optax.ema(0.9), rms, optax.scale_by_learning_rate(1e-4))


def adaptive(method: Callable[..., optax.GradientTransformation], **options: Any) -> Make:
    """A method with everything from the quadratic model, and nothing tuned."""
    often = {"statistics_every": 5, "refresh_every": 5, "decay": 0.5} | options
    make = partial(method, "quadratic", momentum="quadratic", damping=ng.adaptive_damping(), **often)
    return lambda layers: make(layers=layers)


FAMILIES = {
    "SGD-m": lambda rate, damping: lambda layers: optax.sgd(rate, 0.9),
    "Adam": adam,
    "K-FAC": kfac,
    "EKFAC": ekfac,
    "TNT": tnt,
    "MBF": mbf,
    "MBF, sampled labels": mbf_of_fisher,
    "Shampoo": shampoo,
    "Shampoo, grafted": grafted,
    "SOAP": soap,
    "K-BFGS": kbfgs,
    "K-BFGS(L)": partial(kbfgs, memory=100),
}
"""(learning rate, damping) -> optimizer; Adam's damping is its eps."""
WARM = ("K-FAC", "EKFAC", "TNT", "MBF", "MBF, sampled labels", "Shampoo", "K-BFGS", "K-BFGS(L)")
TRUE_LABELS = ("K-BFGS", "K-BFGS(L)")


def at_best(name: str, rate: float, damping: float) -> Entry:
    """A method at the settings found best."""
    labels = "true" if name in TRUE_LABELS else "sampled"
    return Entry(FAMILIES[name](rate, damping), name in WARM, labels=labels)


ENTRIES = {
    "SGD-m (authors)": Entry(
        lambda layers: optax.sgd(3e-3, 0.9), logged={1: 197.6, 3: 184.5, 5: 169.5, 10: 125.7}, cost=1.0
    ),
    "Adam (authors)": Entry(adam_of_the_authors, logged={1: 208.7, 3: 196.7, 5: 187.7, 10: 113.9}, cost=1.17),
    "Shampoo (authors)": Entry(shampoo(3e-4, 3e-4), True, {1: 433.5, 3: 211.3, 5: 188.0, 10: 110.3}, 1.96),
    "K-FAC (TNT authors)": Entry(kfac(3e-3, 0.3), True, {1: 504.4, 3: 202.1, 5: 136.5, 10: 84.7}, 2.02),
    "K-FAC (K-BFGS authors)": Entry(kfac(0.1, 3.0), True, {1: 183.2, 3: 99.7, 5: 74.0, 10: 61.6}),
    "K-BFGS (authors)": Entry(
        kbfgs(0.3, 0.3), True, {1: 169.0, 3: 85.2, 5: 68.0, 10: 59.8, 20: 56.3, 50: 53.8}, labels="true"
    ),
    "TNT (authors)": Entry(tnt(1e-4, 0.1), True, {1: 191.2, 3: 148.1, 5: 105.5, 10: 75.9}, 2.28),
    "Adam": at_best("Adam", 4e-3, 1e-8),
    "EKFAC": at_best("EKFAC", 0.03, 1.0),
    "MBF": at_best("MBF", 1e-4, 0.1),
    "MBF, sampled labels": at_best("MBF, sampled labels", 3e-4, 0.1),
    "Shampoo, grafted": at_best("Shampoo, grafted", 3e-4, 1e-8),
    "SOAP": at_best("SOAP", 5e-3, 1e-16),
    "K-BFGS(L)": at_best("K-BFGS(L)", 0.3, 0.3),
    "K-FAC, adaptive": Entry(adaptive(ng.kfac, split="even")),
    "TNT, adaptive": Entry(adaptive(ng.tnt)),
}


@dataclass(frozen=True)
class Config:
    """The numbers that all runs share; those of each stand in `ENTRIES`.

    Attributes:
        output: folder of the records and the picture.
        only: names of the runs; all if empty.
        trials: settings to run instead, each "method:learning rate:damping".
        epochs: passes over the data.
        batch: images in a step.
        seed: of the initial parameters, the order of the data and the labels drawn.
        rounds: how often each method is timed; 0 to time none.
        data: a folder with the files of MNIST, as they were published, in mnist/; without it the digits of
            scikit-learn, enlarged, whose figures compare with nothing.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    trials: tuple[str, ...] = ()
    epochs: int = 10
    batch: int = 1000
    seed: int = 0
    rounds: int = 3
    data: Path | None = Path(os.environ["NATGRAD_DATA"]) if os.environ.get("NATGRAD_DATA") else None


class Autoencoder(nn.Module):
    """The autoencoder of the papers: ReLU, a linear code, logits of the pixels."""

    widths: tuple[int, ...] = (1000, 500, 250, 30, 250, 500, 1000)

    @nn.compact
    def __call__(self, x):
        """Images [N, 784] -> logits of the pixels [N, 784]."""
        widths = (*self.widths, x.shape[-1])
        for index, width in enumerate(widths):
            bound = x.shape[-1] ** -0.5
            x = nn.Dense(width, kernel_init=uniform(bound), bias_init=uniform(bound))(x)
            x = x if index in (len(self.widths) // 2, len(self.widths)) else nn.relu(x)
        return x


def uniform(bound: float) -> Callable[..., jax.Array]:
    """An initializer: uniform between -bound and bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


MODEL = Autoencoder()
LIKELIHOOD = ng.losses.sigmoid_binary_cross_entropy


class Images(NamedTuple):
    """Rows of pixels in [0, 1], for training and for testing."""

    train: np.ndarray
    test: np.ndarray


def images(config: Config) -> Images:
    """MNIST, or the digits of scikit-learn enlarged to its size."""
    if config.data is None:
        digits: Any = load_digits()
        pixels = np.clip(zoom(digits.images / 16, (1, 3.5, 3.5), order=1), 0, 1).reshape(len(digits.images), -1)
        return Images(pixels[:1500].astype(np.float32), pixels[1500:].astype(np.float32))
    parts = []
    for part in ("train", "t10k"):
        path = config.data / "mnist" / f"{part}-images-idx3-ubyte.gz"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; NATGRAD_DATA, or --data, names a folder with MNIST in mnist/.")
        with gzip.open(path) as file:
            parts.append(np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784).astype(np.float32) / 255)
    return Images(*parts)


def batches(data: np.ndarray, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The batches of an epoch, in an order of its own.

    Args:
        data: rows.
        size: of a batch; what is left over is dropped.
        seed: of the orders.
        epoch: from 0.

    Yields:
        Rows of a batch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    for first in range(0, len(data) - size + 1, size):
        yield data[order[first : first + size]]


class Runner:
    """One optimizer on the autoencoder: compiled, warm if asked for, ready to step."""

    def __init__(self, entry: Entry, data: np.ndarray, config: Config):
        """Compile, and fill the statistics."""
        self._key = jax.random.key(config.seed)
        params = MODEL.init(self._key, data[:1])["params"]
        capture = ng.linen.capture(MODEL, LIKELIHOOD, labels=entry.labels)
        x = data[: config.batch]
        tx = optax.with_extra_args_support(entry.make(capture.layers({"params": params}, x)))

        def evaluate(params, x, key):
            return capture.value_and_grad({"params": params}, x, x, key=key)

        @partial(jax.jit, donate_argnums=0)
        def step(carry, x, key):
            params, state = carry
            out = evaluate(params, x, key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), out.value

        state = tx.init(params)
        if entry.warm:
            seen = jax.jit(lambda params, x, key: Seen((out := evaluate(params, x, key)).grad, out.curvature()))
            stream = enumerate(batches(data, config.batch, config.seed, 0))
            state = ng.warm_start(tx, state, (seen(params, x, self._draw(-1 - i)) for i, x in stream), params)
        self._carry = params, state
        self._step = step.lower(self._carry, x, self._key).compile()
        self.steps, self.seconds = 0, 0.0

    @property
    def params(self) -> Any:
        """Where it stands."""
        return self._carry[0]

    def _draw(self, count: int) -> jax.Array:
        return jax.random.fold_in(self._key, count % 2**31)

    def run(self, stream: Iterator[np.ndarray]) -> float:
        """A step for every batch; the seconds that they took together."""
        before = time.perf_counter()
        for x in stream:
            self._carry, _ = self._step(self._carry, x, self._draw(self.steps))
            self.steps += 1
        jax.block_until_ready(self._carry)
        took = time.perf_counter() - before
        self.seconds += took
        return took


class Seen(NamedTuple):
    """What a warm start reads of one batch."""

    grad: Any
    curvature: Any


def mean_loss(params: Any, data: np.ndarray, size: int = 5000) -> float:
    """The loss of all rows, nats an image."""
    parts = [data[first : first + size] for first in range(0, len(data), size)]
    return float(sum(_loss(params, part) * len(part) for part in parts) / len(data))


@jax.jit
def _loss(params, x):
    outputs: Any = MODEL.apply({"params": params}, x)
    return LIKELIHOOD(outputs, x)


def train(name: str, entry: Entry, data: Images, config: Config) -> dict[str, Any]:
    """One run.

    Args:
        name: for the record.
        entry: what to run.
        data: of training and testing.
        config: the numbers.

    Returns:
        The record, for a line of JSON: losses by epoch, from 0, and the seconds of training before.
    """
    runner = Runner(entry, data.train, config)
    record = {"name": name, "seed": config.seed, "epochs": config.epochs, "images": len(data.train)}
    losses, seconds = [mean_loss(runner.params, data.train)], [0.0]
    for epoch in track(range(config.epochs), description=f"{name:<24}"):
        runner.run(batches(data.train, config.batch, config.seed, epoch))
        losses.append(mean_loss(runner.params, data.train))
        seconds.append(runner.seconds)
        if not np.isfinite(losses[-1]):
            break
    return record | {"losses": losses, "seconds": seconds, "test": mean_loss(runner.params, data.test)}


def timed(entries: Mapping[str, Entry], data: Images, config: Config) -> dict[str, list[float]]:
    """Seconds a step of every method, of every round: all in turn, a refresh period of 20 steps or more at a time."""
    runners = {name: Runner(entry._replace(warm=False), data.train, config) for name, entry in entries.items()}
    paces: dict[str, list[float]] = {name: [] for name in runners}
    for count in track(range(config.rounds + 1), description="timing"):
        for name, runner in runners.items():
            stream = list(batches(data.train, config.batch, config.seed, count))
            period = (stream * (100 // len(stream) + 1))[:100]
            took = runner.run(iter(period)) / len(period)
            if count:  # the first round is one of early refreshes
                paces[name].append(took)
    return paces


def kept(path: Path) -> list[dict[str, Any]]:
    """The records of a file, if there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wanted(config: Config) -> dict[str, Entry]:
    """What is to be run, by name.

    Args:
        config: the numbers.

    Returns:
        {name: entry}.

    Raises:
        ValueError: if a name is unknown, or a trial is not of the form it must have.
    """
    if config.trials:
        found = {}
        for trial in config.trials:
            name, *numbers = trial.split(":")
            if name not in FAMILIES or len(numbers) != 2:
                raise ValueError(f"The trial {trial!r} is none of {sorted(FAMILIES)} with :learning rate:damping.")
            found[trial] = at_best(name, *map(float, numbers))
        return found
    if unknown := set(config.only) - set(ENTRIES):
        raise ValueError(f"There is no {sorted(unknown)}; there are {list(ENTRIES)}.")
    return {name: entry for name, entry in ENTRIES.items() if not config.only or name in config.only}


def run(config: Config) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Every run that is not in the file yet, then the timing.

    Args:
        config: the numbers.

    Returns:
        The records, and the seconds a step of every round.
    """
    data, entries = images(config), wanted(config)
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / ("autoencoder_trials.jsonl" if config.trials else "autoencoder.jsonl")
    key = {"seed": config.seed, "epochs": config.epochs, "images": len(data.train)}
    for name, entry in entries.items():
        if not any(key.items() <= record.items() and record["name"] == name for record in kept(path)):
            with path.open("a") as file:
                file.write(json.dumps(train(name, entry, data, config)) + "\n")
    found = {record["name"]: record for record in kept(path) if key.items() <= record.items()}
    records = [found[name] for name in entries]
    return records, timed(entries, data, config) if config.rounds and not config.trials else {}


def table(records: list[dict[str, Any]], paces: dict[str, list[float]], config: Config) -> Table:
    """Losses after some epochs beside what the authors logged, and what a step costs."""
    result = Table(
        title="Training loss of the autoencoder, nats an image (in brackets: as logged by the authors)",
        caption="A step over SGD-m's: the median of the rounds, all methods in turn in one process.",
        caption_justify="left",
    )
    epochs = [epoch for epoch in (1, 3, 5, 10, 20, 50) if epoch <= config.epochs]
    result.add_column("run", no_wrap=True)
    for heading in (*(f"epoch {epoch}" for epoch in epochs), "test", "s in all", "a step / SGD-m's"):
        result.add_column(heading, justify="right")
    base = paces.get("SGD-m (authors)")
    for record in records:
        entry = ENTRIES.get(record["name"], Entry(lambda layers: optax.identity()))
        cells = []
        for epoch in epochs:
            loss = f"{record['losses'][epoch]:.1f}" if epoch < len(record["losses"]) else "-"
            cells.append(loss + (f" ({entry.logged[epoch]:.1f})" if epoch in entry.logged else ""))
        cost = ""
        if base and record["name"] in paces:
            cost = f"{np.median(np.array(paces[record['name']]) / np.array(base)):.2f}"
            cost += f" ({entry.cost:.2f})" if entry.cost else ""
        result.add_row(record["name"], *cells, f"{record['test']:.1f}", f"{record['seconds'][-1]:.0f}", cost)
    return result


def picture(records: list[dict[str, Any]]) -> Figure:
    """Training loss against epochs: at the authors' settings, beside their points, and at the best found."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for record in records:
        entry = ENTRIES.get(record["name"], Entry(lambda layers: optax.identity()))
        axis = axes[0] if entry.logged else axes[1]
        losses = record["losses"][1:]
        (line,) = axis.plot(range(1, len(losses) + 1), losses, label=record["name"], linewidth=1.8)
        if entry.logged:
            axis.plot(*zip(*entry.logged.items(), strict=True), "o", color=line.get_color(), markersize=5)
    for axis, title in zip(axes, ("settings of the authors (dots: their logs)", "best settings found"), strict=True):
        axis.set(yscale="log", xlabel="epochs")
        axis.set_title(title, loc="left", fontweight="bold")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.2, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("training loss, nats an image")
    return figure


def main(config: Config) -> None:
    """Run, print the table, write the picture."""
    records, paces = run(config)
    console = Console(width=160)
    console.print(table(records, paces, config))
    if not config.trials:
        path = config.output / "autoencoder.png"
        picture(records).savefig(path, dpi=110)
        console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
