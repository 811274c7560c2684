"""Who is first at a deep autoencoder: Adam, tuned, or a natural gradient that chooses its own steps?

The 1,797 digits of scikit-learn, 8 x 8 pixels, up-sampled to 28 x 28 by linear interpolation; the autoencoder of the
papers, 784-1000-500-250-30-250-500-1000-784 with tanh; batches of 500; the loss of the whole set above the entropy of
the pixels, 282.95 nats an image, the least possible. Nothing is tuned for ours but the two words "quadratic" and
`ng.adaptive_damping()` and how often the statistics are taken: learning rate, momentum and damping come from the
quadratic model of the loss at every step. Adam has the best of six learning rates, each constant and with a cosine
decay. If kfac-jax can be imported (its release wants jax <= 0.9.1), it runs too: its own adaptive mode at the best of
three initial dampings tried beforehand (1, 3, 10), inverses every 5 steps.

Expected: a gap of 2 nats in a twentieth of Adam's steps and a fifth of its seconds, and in half of the seconds of
kfac-jax, whose steps are of the same kind. Found: K-FAC and TKFAC do so but for a little; EKFAC and TEKFAC, which need
no fewer steps here and have dearer ones, take some seven tenths of the seconds of kfac-jax.

The optimizers of a seed run in turn in one process, a few steps each, so that a busy machine slows all alike. Neither
compilation nor the measuring of the loss is in the seconds. Adam's rate is chosen with the first seed.

    make race                                       (some 25 minutes, most of them Adam's)
    make race ARGS="--seeds 1 --methods K-FAC"
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from scipy.special import xlogy
from sklearn.datasets import load_digits

import natgrad_jax as ng

ADAPTIVE = {"momentum": "quadratic", "damping": ng.adaptive_damping()}
OFTEN = ADAPTIVE | {"statistics_every": 5, "refresh_every": 5, "decay": 0.5}
SELDOM = ADAPTIVE | {"statistics_every": 10, "refresh_every": 20, "rescale_every": 10, "decay": 0.3, "refresh": "qr"}
METHODS = {
    "K-FAC": partial(ng.kfac, "quadratic", split="even", **OFTEN),
    "TKFAC": partial(ng.tkfac, "quadratic", split="pi", **OFTEN),
    "EKFAC": partial(ng.ekfac, "quadratic", split="pi", **SELDOM),
    "TEKFAC": partial(ng.tekfac, "quadratic", split="pi", **SELDOM),
}
"""The damping enters as that of two factors, by the better of "even" and "pi"; statistics are as frequent as pays."""
PEER = "kfac-jax"


@dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
        output: folder of the picture.
        seeds: runs from as many initial parameters and orders of the data.
        methods: which to run beside Adam; those of ours, and kfac-jax where it can be imported.
        batch: images in a step.
        levels: gaps whose first time is told; a run ends at the last.
        steps: most steps of a natural gradient.
        adam_steps: most steps of Adam, and the horizon of its cosine.
        adam_rates: its learning rates.
        peer_damping: initial damping of kfac-jax.
    """

    output: Path = Path("results")
    seeds: int = 5
    methods: tuple[str, ...] = (*METHODS, PEER)
    batch: int = 500
    levels: tuple[float, ...] = (30.0, 10.0, 5.0, 2.0)
    steps: int = 250
    adam_steps: int = 2000
    adam_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
    peer_damping: float = 3.0


class Autoencoder(nn.Module):
    """The autoencoder of the papers with tanh, and logits of the pixels at the end."""

    widths: tuple[int, ...] = (1000, 500, 250, 30, 250, 500, 1000)

    @nn.compact
    def __call__(self, x):
        """Images [N, 784] -> logits of the pixels [N, 784]."""
        pixels = x.shape[-1]
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(pixels)(x)


class Record(NamedTuple):
    """One run: the gap after so many steps and seconds."""

    name: str
    seed: int
    steps: list[int]
    seconds: list[float]
    gaps: list[float]

    def reached(self, level: float) -> int | None:
        """Where in the lists a gap is first reached; None if never."""
        return next((index for index, gap in enumerate(self.gaps) if gap <= level), None)


def images() -> tuple[np.ndarray, float]:
    """The digits [1797, 784], and the entropy of their pixels in nats an image."""
    digits: Any = load_digits()
    pixels = np.clip(zoom(digits.images / 16, (1, 3.5, 3.5), order=1), 0, 1).reshape(len(digits.images), -1)
    entropy = -np.mean(np.sum(xlogy(pixels, pixels) + xlogy(1 - pixels, 1 - pixels), axis=-1))
    return pixels.astype(np.float32), float(entropy)


def batches(data: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches for ever, every epoch in a new order.

    Args:
        data: rows.
        size: of a batch; what an epoch leaves over is dropped.
        seed: of the orders.

    Yields:
        Rows of a batch.
    """
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(data))
        for first in range(0, len(data) - size + 1, size):
            yield data[order[first : first + size]]


MODEL = Autoencoder()


def outputs(params: Any, inputs: Any) -> Any:
    """The model's outputs, without any capture."""
    return MODEL.apply({"params": params}, inputs)


LIKELIHOOD = ng.losses.sigmoid_binary_cross_entropy
Advance = Callable[[np.ndarray, jax.Array], Any]
"""Batch, key -> the new parameters: one step, whatever else it keeps."""


def ours(make: Callable[..., Any], params: Any, batch: np.ndarray) -> Advance:
    """A transformation of Optax, made from the layers of the model, in one jitted step with donated state."""
    capture = ng.linen.capture(MODEL, LIKELIHOOD)
    tx = optax.with_extra_args_support(make(capture.layers({"params": params}, batch)))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, key):
        out = capture.value_and_grad({"params": params}, x, x, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    carry = params, tx.init(params)
    compiled = step.lower(*carry, batch, jax.random.key(0)).compile()

    def advance(x, key):
        nonlocal carry
        carry = compiled(*carry, x, key)
        return carry[0]

    return advance


def peer(damping: float, params: Any, batch: np.ndarray) -> Advance:
    """kfac-jax in its adaptive mode."""
    kfac_jax = importlib.import_module("kfac_jax")

    def loss(params, batch):
        logits = outputs(params, batch[0])
        kfac_jax.register_multi_bernoulli_predictive_distribution(logits, batch[1])
        return LIKELIHOOD(logits, batch[1])

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        inverse_update_period=5,
        num_burnin_steps=0,
        multi_device=False,
    )

    def begin():
        fresh = jax.tree.map(jnp.array, params)
        return fresh, optimizer.init(fresh, jax.random.key(0), (batch, batch))

    (params_now, state), count = begin(), 0

    def advance(x, key):
        nonlocal params_now, state, count
        params_now, state, _ = optimizer.step(params_now, state, key, batch=(x, x), global_step_int=count)
        count += 1
        return params_now

    for x in [batch] * 6:  # every branch compiled
        advance(x, jax.random.key(0))
    (params_now, state), count = begin(), 0
    return advance


class Runner:
    """One optimizer from one start: it advances, looks at its clock and at its loss."""

    def __init__(self, name: str, config: Config, seed: int, build: Callable[[Any, np.ndarray], Advance]):
        """Compile."""
        data, floor = images()
        self._key = jax.random.key(seed)
        params = MODEL.init(self._key, data[:1])["params"]
        whole = jax.jit(lambda params: LIKELIHOOD(outputs(params, data), jnp.asarray(data)))
        self._gap = lambda params: float(whole(params)) - floor
        self._stream = batches(data, config.batch, seed)
        self.record = Record(name, seed, [0], [0.0], [self._gap(params)])
        self._advance = build(jax.tree.map(jnp.array, params), data[: config.batch])
        self._config = config
        self._most, self._block = (config.adam_steps, 20) if name.startswith("Adam") else (config.steps, 5)

    @property
    def ended(self) -> bool:
        """Whether the last level is reached, the steps are spent, or the loss is lost."""
        _, _, steps, _, gaps = self.record
        return steps[-1] >= self._most or not min(self._config.levels) < gaps[-1] < np.inf

    def block(self) -> None:
        """A few steps, and a look at the loss outside the clock."""
        _, _, steps, seconds, gaps = self.record
        before = time.perf_counter()
        params = None
        for count in range(steps[-1], steps[-1] + self._block):
            params = self._advance(next(self._stream), jax.random.fold_in(self._key, count))
        jax.block_until_ready(params)
        seconds.append(seconds[-1] + time.perf_counter() - before)
        steps.append(steps[-1] + self._block)
        gaps.append(self._gap(params))


def adam(rate: float, cosine: bool, config: Config) -> Callable[[Any, np.ndarray], Advance]:
    """Adam at one learning rate."""
    schedule = optax.cosine_decay_schedule(rate, config.adam_steps) if cosine else rate
    return partial(ours, lambda layers: optax.adam(schedule))


def tuned(config: Config) -> tuple[float, bool]:
    """The rate of Adam, and whether it decays, that reaches the last level first, or else comes closest to it."""
    choices = [(rate, cosine) for rate in config.adam_rates for cosine in (False, True)]
    merits, best = {}, (config.adam_steps, np.inf)
    for rate, cosine in track(choices, description="tuning Adam"):
        runner = Runner("Adam", config, 0, adam(rate, cosine, config))
        while not runner.ended and runner.record.steps[-1] < best[0]:
            runner.block()
        gap = runner.record.gaps[-1]
        merits[rate, cosine] = (runner.record.steps[-1], gap if np.isfinite(gap) else np.inf)
        best = min(best, merits[rate, cosine]) if gap <= min(config.levels) else best
    return min(choices, key=lambda choice: merits[choice])


def run(config: Config) -> list[Record]:
    """Tune Adam, then all optimizers in turn from every seed.

    Args:
        config: the numbers.

    Returns:
        A record for every optimizer and seed.
    """
    rate, cosine = tuned(config)
    builds = {f"Adam, {rate:g}{', cosine' if cosine else ''}": adam(rate, cosine, config)}
    builds |= {name: partial(ours, lambda layers, make=make: make(layers)) for name, make in METHODS.items()}
    if importlib.util.find_spec("kfac_jax"):
        builds[PEER] = partial(peer, config.peer_damping)
    builds = {name: build for name, build in builds.items() if name.startswith("Adam") or name in config.methods}
    records = []
    for seed in track(range(config.seeds), description="racing"):
        runners = [Runner(name, config, seed, build) for name, build in builds.items()]
        while running := [runner for runner in runners if not runner.ended]:
            for runner in running:
                runner.block()
        records.extend(runner.record for runner in runners)
    return records


def first(records: list[Record], level: float) -> tuple[list[float], list[float]]:
    """Steps and seconds at which each run reached a gap; infinite where it did not."""
    found = [(record, record.reached(level)) for record in records]
    steps = [np.inf if index is None else record.steps[index] for record, index in found]
    return steps, [np.inf if index is None else record.seconds[index] for record, index in found]


def table(records: list[Record], config: Config) -> Table:
    """When each level was reached, the median over the seeds, and the last level beside Adam and kfac-jax."""
    target = min(config.levels)
    result = Table(
        title=f"Steps and seconds to a gap, median of {config.seeds} runs",
        caption="Gap: loss above the entropy of the pixels, nats an image. Seconds of training alone, in turn in one "
        f"process. The last columns are ratios of seconds to a gap of {target:g}, their range over the runs in "
        "brackets; < if the rival did not get there in its steps.",
        caption_justify="left",
    )
    names = list(dict.fromkeys(record.name for record in records))
    runs = {name: [record for record in records if record.name == name] for name in names}
    result.add_column("optimizer", no_wrap=True)
    for heading in (
        "ms / step",
        *(f"{level:g}" for level in config.levels),
        *(f"x {n.split(',')[0]}" for n in rivals(names)),
    ):
        result.add_column(heading, justify="right")
    for name in names:
        pace = np.median([1000 * record.seconds[-1] / record.steps[-1] for record in runs[name]])
        cells = [f"{pace:.0f}"]
        for level in config.levels:
            steps, seconds = (np.median(values) for values in first(runs[name], level))
            cells.append(f"{steps:.0f} / {seconds:.1f} s" if np.isfinite(steps) else "-")
        for rival in rivals(names):
            mine, theirs = (np.array(first(runs[n], target)[1]) for n in (name, rival))
            late = ~np.isfinite(theirs)  # a rival that did not get there: the time that it had
            ratios = mine / np.where(late, [record.seconds[-1] for record in runs[rival]], theirs)
            sign = "<" if np.any(late) else ""
            finite = np.all(np.isfinite(mine))
            cells.append(f"{sign}{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})" if finite else "-")
        result.add_row(name, *cells)
    return result


def rivals(names: list[str]) -> list[str]:
    """Those that the others are compared with."""
    return [name for name in names if name.startswith("Adam") or name == PEER]


def picture(records: list[Record], config: Config) -> Figure:
    """The gap against seconds and against steps: every run thin, the middle one of each optimizer thick."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    names = list(dict.fromkeys(record.name for record in records))
    for color, name in zip((f"C{index}" for index in range(10)), names, strict=False):
        runs = sorted((r for r in records if r.name == name), key=lambda r: first([r], min(config.levels))[1])
        for record in runs:
            middle = record is runs[len(runs) // 2]
            style = {"color": color, "linewidth": 2 if middle else 0.6, "alpha": 1 if middle else 0.5}
            label = name if middle else None
            axes[0].plot(record.seconds[1:], record.gaps[1:], label=label, **style)
            axes[1].plot(record.steps[1:], record.gaps[1:], **style)
    for axis, unit in zip(axes, ("seconds of training", "steps"), strict=True):
        axis.axhline(min(config.levels), color="grey", linewidth=0.8, linestyle=":", zorder=0)
        axis.set(xscale="log", yscale="log", xlabel=unit)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("training loss above its floor, nats an image")
    axes[0].set_title("autoencoder of digits, batches of 500", loc="left", fontweight="bold")
    axes[0].legend(frameon=False)
    return figure


def main(config: Config) -> None:
    """Race, print the table, write the picture."""
    records = run(config)
    console = Console(width=160)
    console.print(table(records, config))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "race.png"
    picture(records, config).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
