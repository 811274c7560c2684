"""Which ways of choosing the step survive a small, noisy batch?

K-FAC on the 1,797 digits of 8x8 pixels that scikit-learn ships: an autoencoder with a code of 8 numbers, and a
classifier with one hidden layer. The step is a learning rate, with or without the KL clip or the length of Adam's step;
or what the quadratic model of the loss says; or the damping adapts itself. The model is that of the batch: with all the
images it is the model of the loss, with 16 of them it is minimised, and tested, on what those 16 say.

Expected: with all the images the quadratic model wins, with 16 it loses, as steps that are best for 16 images are too
long for the others, and a damping that is tested on the 16 images that the step was made for falls too far.

Found: half of that. Of all the images the model wins on the autoencoder, but on the classifier the others come as far.
With 16 a learning rate from the model is still the best on the autoencoder, where an image has 64 outputs and so says
much of the curvature, and within a factor of two of the best on the classifier. It is the damping that 16 images spoil:
everything adaptive diverges on the classifier, and does not if the damping may not fall below 0.1. A momentum of 0.9
beside a rate from the model, and an adaptive damping beside a rate that is given, are spoiled by small batches on both
problems. The second would be no trust region in any batch: the model is right about short steps at every damping.

Every run has the same number of steps, so that the columns of the table differ in noise and not in steps; a run with
larger batches sees more images. Learning rates, where they are given, fall to zero like a cosine; momentum is 0.9 where
it is not said. What a control leaves open was chosen for each batch size by the lowest final loss with a seed that is
not reported, from the numbers in `CONTROLS`; the median of three other seeds is reported. Losses are those of all the
images, above the least possible.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.special import xlogy
from sklearn.datasets import load_digits

import natgrad_jax as ng

KFAC: dict[str, Any] = {"statistics_every": 2, "refresh_every": 10}
Optimizer = optax.GradientTransformationExtraArgs


def given(layers: ng.Layers, rate: optax.Schedule, damping: jax.Array, bound: jax.Array) -> Optimizer:
    """The learning rate is given, and the step shortened by the KL clip; an infinite bound shortens none."""
    return ng.kfac(rate, layers, damping=damping, kl_clip=bound, **KFAC)


def grafted(layers: ng.Layers, rate: optax.Schedule, damping: jax.Array) -> Optimizer:
    """The direction is K-FAC's, the length of every array of parameters Adam's."""
    direction = ng.graft(ng.scale_by_kfac(layers, damping=damping, **KFAC), optax.scale_by_adam())
    return optax.chain(direction, optax.trace(0.9), optax.scale_by_learning_rate(rate))


def model_rate(layers: ng.Layers, rate: optax.Schedule, damping: jax.Array, momentum: jax.Array) -> Optimizer:
    """The learning rate comes from the model."""
    del rate
    return ng.kfac("quadratic", layers, damping=damping, momentum=momentum, **KFAC)


def model_both(layers: ng.Layers, rate: optax.Schedule, damping: jax.Array) -> Optimizer:
    """Learning rate and momentum come from the model."""
    del rate
    return ng.kfac("quadratic", layers, damping=damping, momentum="quadratic", **KFAC)


def adaptive(layers: ng.Layers, rate: optax.Schedule, momentum: jax.Array) -> Optimizer:
    """The damping adapts itself to steps of a given learning rate."""
    return ng.kfac(rate, layers, damping=ng.adaptive_damping(), momentum=momentum, **KFAC)


def everything(layers: ng.Layers, rate: optax.Schedule, least: Any) -> Optimizer:
    """Learning rate, momentum and damping come from the model; the damping stays above a bound."""
    del rate
    rule = replace(ng.adaptive_damping(), least=least)
    return ng.kfac("quadratic", layers, damping=rule, momentum="quadratic", **KFAC)


def nothing(layers: ng.Layers, rate: optax.Schedule) -> Optimizer:
    """Nothing is said: length, averaging and damping come from what the next batch says."""
    del rate
    return ng.kfac(layers=layers, **KFAC)


class Control(NamedTuple):
    """A way of choosing the step.

    Attributes:
        make: the layers, the learning rate as a schedule, and one number for each of the others -> the optimizer.
        tried: {name: numbers}, of which the best are taken; "rate" is the first learning rate.
        style: colour and dashes of its line.
    """

    make: Callable[..., Optimizer]
    tried: Mapping[str, tuple[float, ...]]
    style: tuple[str, str]


RATES, DAMPINGS = (0.03, 0.1, 0.3, 1.0), (0.01, 0.1, 1.0)
CONTROLS = {
    "learning rate": Control(given, {"rate": RATES, "damping": DAMPINGS, "bound": (np.inf,)}, ("#17375e", "-")),
    "learning rate, KL clip": Control(
        given, {"rate": RATES[1:], "damping": DAMPINGS, "bound": (1e-3, 1e-2)}, ("#3f8fd2", "-")
    ),
    "learning rate, Adam's length": Control(
        grafted, {"rate": (0.003, 0.01, 0.03, 0.1), "damping": DAMPINGS}, ("#4da167", "-")
    ),
    "quadratic rate": Control(model_rate, {"damping": (1e-4, 1e-3, *DAMPINGS), "momentum": (0.0,)}, ("#f0a202", "-")),
    "quadratic rate, momentum 0.9": Control(
        model_rate, {"damping": (1e-4, 1e-3, *DAMPINGS), "momentum": (0.9,)}, ("#f0a202", ":")
    ),
    "quadratic rate and momentum": Control(model_both, {"damping": (1e-4, 1e-3, *DAMPINGS)}, ("#d95f02", "-")),
    "adaptive damping, learning rate": Control(adaptive, {"rate": RATES[1:], "momentum": (0.0, 0.9)}, ("#a05fb4", ":")),
    "everything adaptive": Control(everything, {"least": (1e-8,)}, ("#b2182b", ":")),
    "everything adaptive, bounded": Control(everything, {"least": (1e-4, 1e-3, *DAMPINGS)}, ("#b2182b", "-")),
    "nothing said": Control(nothing, {}, ("#000000", "-")),
}
LEAST = 1e-6
"""Losses below it are rounding in float32."""


@dataclass(frozen=True)
class Config:
    """The numbers that all controls share.

    Attributes:
        output: folder of the picture.
        steps: of every run.
        measurements: how often in a run the loss of all the images is measured; they divide the steps.
        batches: sizes, from the smallest to the largest.
        seeds: of the runs that are reported: initial parameters, order of the images and labels drawn from the model.
        tuning_seed: of the runs that choose among what is tried.
        autoencoder_widths: outputs of its hidden layers; the code is the one in the middle.
        classifier_widths: outputs of its hidden layers.
        controls: which of `CONTROLS`.
        jobs: how many are compiled and run at a time.
    """

    output: Path = Path("results")
    steps: int = 300
    measurements: int = 30
    batches: tuple[int, ...] = (16, 128, 1797)
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seed: int = 0
    autoencoder_widths: tuple[int, ...] = (32, 8, 32)
    classifier_widths: tuple[int, ...] = (32,)
    controls: tuple[str, ...] = tuple(CONTROLS)
    jobs: int = 2


class Net(nn.Module):
    """Dense layers with tanh between them, but none after the layer `linear`."""

    widths: tuple[int, ...]
    linear: int | None = None

    @nn.compact
    def __call__(self, x):
        """Inputs [N, I] -> outputs [N, O]."""
        for index, width in enumerate(self.widths):
            x = nn.Dense(width)(x)
            x = x if index in (self.linear, len(self.widths) - 1) else nn.tanh(x)
        return x


class Problem(NamedTuple):
    """What is trained on what, and the least that its loss can be."""

    name: str
    model: nn.Module
    likelihood: ng.losses.Likelihood
    inputs: np.ndarray
    targets: np.ndarray
    floor: float


class Record(NamedTuple):
    """What became of one control with one batch size.

    Attributes:
        problem: its name.
        control: its name.
        batch: its size.
        chosen: {name: number} of what was tried.
        losses: of all the images above the floor, [seeds, 1 + measurements]; not finite counts as infinite.
    """

    problem: str
    control: str
    batch: int
    chosen: dict[str, float]
    losses: np.ndarray

    @property
    def final(self) -> float:
        """The median of the last losses."""
        return float(np.median(self.losses[:, -1]))

    @property
    def diverged(self) -> bool:
        """Whether the median ends no lower than it began."""
        return not self.final < np.median(self.losses[:, 0])


Report = Callable[[str], None]


def run(config: Config, report: Report = lambda done: None) -> list[Record]:
    """Train every problem with every control and batch size.

    What differs in numbers alone is compiled once.

    Args:
        config: the numbers.
        report: called after each control with one batch size of one problem.

    Returns:
        The records, in the order of problems, controls and batch sizes.
    """
    makes = list(dict.fromkeys(CONTROLS[name].make for name in config.controls))

    def of_make(problem, make, batch):
        trained, records = training(problem, make, batch, config), []
        for name in config.controls:
            if CONTROLS[name].make is make:
                records.append(tuned(problem, name, batch, trained, config))
                report(f"{problem.name}, batches of {batch}: {name}")
        return records

    cases = list(product(problems(config), makes, config.batches))
    with ThreadPoolExecutor(config.jobs) as pool:
        records = [record for some in pool.map(lambda case: of_make(*case), cases) for record in some]
    return sorted(records, key=lambda record: (record.problem, config.controls.index(record.control), record.batch))


def problems(config: Config) -> list[Problem]:
    """The two problems."""
    digits: Any = load_digits()
    images = (digits.data / 16).astype(np.float32)
    widths = config.autoencoder_widths
    return [
        Problem(
            "autoencoder",
            Net((*widths, images.shape[-1]), len(widths) // 2),
            ng.losses.sigmoid_binary_cross_entropy,
            images,
            images,
            float(-np.mean(np.sum(xlogy(images, images) + xlogy(1 - images, 1 - images), axis=-1))),
        ),
        Problem(
            "classifier",
            Net((*config.classifier_widths, 10)),
            ng.losses.softmax_cross_entropy,
            images,
            digits.target.astype(np.int32),
            0.0,
        ),
    ]


Trained = Callable[[int, Mapping[str, float]], np.ndarray]


def training(problem: Problem, make: Callable[..., Optimizer], batch: int, config: Config) -> Trained:
    """A function of a seed and of the numbers of an optimizer that gives the losses of a run, compiled once."""
    capture = ng.linen.capture(problem.model, problem.likelihood)
    inputs, targets = jnp.asarray(problem.inputs), jnp.asarray(problem.targets)
    like = jax.eval_shape(problem.model.init, jax.random.key(0), inputs[:1])
    layers = capture.layers(like, inputs[:1])

    def loss(params):
        outputs: Any = problem.model.apply({"params": params}, inputs)
        return problem.likelihood(outputs, targets) - problem.floor

    @jax.jit
    def losses(order, key, numbers):
        numbers = dict(numbers)
        rate = optax.cosine_decay_schedule(numbers.pop("rate", 0.0), config.steps)
        tx = make(layers, rate, **numbers)
        start, key = jax.random.split(key)
        params = problem.model.init(start, inputs[:1])["params"]

        def step(carry, now):
            params, state = carry
            chosen, key = now
            out = capture.value_and_grad({"params": params}, inputs[chosen], targets[chosen], key=key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), None

        def piece(carry, now):
            carry, _ = jax.lax.scan(step, carry, now)
            return carry, loss(carry[0])

        keys = jax.random.split(key, order.shape[:2])
        _, found = jax.lax.scan(piece, (params, tx.init(params)), (order, keys))
        return jnp.append(loss(params), found)

    def trained(seed, numbers):
        found = losses(orders(problem, batch, seed, config), jax.random.key(seed), numbers)
        return np.nan_to_num(np.asarray(found), nan=np.inf, posinf=np.inf)

    return trained


def orders(problem: Problem, batch: int, seed: int, config: Config) -> np.ndarray:
    """The images of every step, [measurements, steps between them, batch]: each epoch in a new order."""
    random, size = np.random.default_rng(seed), len(problem.inputs)
    batches: list[np.ndarray] = []
    while len(batches) < config.steps:
        order = random.permutation(size)
        batches.extend(order[end - batch : end] for end in range(batch, size + 1, batch))
    return np.reshape(batches[: config.steps], (config.measurements, -1, batch))


def tuned(problem: Problem, control: str, batch: int, trained: Trained, config: Config) -> Record:
    """The runs of one control with the best of what is tried."""
    tried = CONTROLS[control].tried
    choices = [dict(zip(tried, numbers, strict=True)) for numbers in product(*tried.values())]
    chosen = choices[0]
    if len(choices) > 1:
        chosen = min(choices, key=lambda numbers: trained(config.tuning_seed, numbers)[-1])
    return Record(problem.name, control, batch, chosen, np.stack([trained(seed, chosen) for seed in config.seeds]))


def table(records: list[Record]) -> Table:
    """The final losses, and what was chosen."""
    result = Table(
        title="K-FAC on digits: the loss of all the images after the same number of steps",
        caption="In nats per image above the least possible, median of the seeds. In brackets what was chosen for each "
        "batch size, of: rate, damping or its least, clip, momentum. Diverged: no lower than at the start.",
        caption_justify="left",
    )
    batches = sorted({record.batch for record in records})
    for name in ("problem", "the step comes from"):
        result.add_column(name, no_wrap=True)
    for batch in batches:
        result.add_column(f"batches of {batch}")
    found = {(record.problem, record.control, record.batch): record for record in records}
    rows = list(dict.fromkeys((record.problem, record.control) for record in records))
    for index, (problem, control) in enumerate(rows):
        if index and problem != rows[index - 1][0]:
            result.add_section()
        result.add_row(problem, control, *(_cell(found[problem, control, batch]) for batch in batches))
    return result


def _cell(record: Record) -> str:
    """The final loss and what was chosen."""
    tried = CONTROLS[record.control].tried
    chosen = ", ".join(f"{number:g}" for name, number in record.chosen.items() if len(tried[name]) > 1)
    final = f"<{LEAST:.0e}" if record.final < LEAST else f"{record.final:.2g}"
    return ("diverged" if record.diverged else final) + (f" [dim]({chosen})[/dim]" if chosen else "")


def picture(records: list[Record]) -> Figure:
    """Final loss against the size of the batch, and loss against steps with the smallest; a row for each problem."""
    names = list(dict.fromkeys(record.problem for record in records))
    batches = sorted({record.batch for record in records})
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 8), layout="constrained", squeeze=False)
    for row, name in zip(axes, names, strict=True):
        some = [record for record in records if record.problem == name]
        start = float(np.median([record.losses[0, 0] for record in some]))
        least = max(LEAST, 0.6 * min(record.final for record in some))
        most = 3 * start
        for control in dict.fromkeys(record.control for record in some):
            own = [record for record in some if record.control == control]
            colour, dashes = CONTROLS[control].style
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
            finals = [np.clip(record.losses[:, -1], least, most) for record in own]
            row[0].plot(batches, np.median(finals, axis=1), **style, marker="o", markersize=4, label=control)
            row[0].vlines(batches, np.min(finals, axis=1), np.max(finals, axis=1), color=colour, linewidth=1, alpha=0.6)
            curve = np.clip(np.median(own[0].losses, axis=0), least, most)
            row[1].plot(np.linspace(0, 100, len(curve)), curve, **style)
        for axis in row:
            axis.axhline(start, color="grey", linewidth=0.8, linestyle="--", zorder=0)
            axis.set(yscale="log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set(xscale="log", ylim=(least, most))
        row[0].set_xticks(batches, [str(batch) for batch in batches])
        row[0].minorticks_off()
        row[0].set(xlabel="images in a batch", ylabel="loss of all images, above the least possible")
        row[0].set_title(f"{name}: where it ends", loc="left", fontweight="bold")
        row[1].set(xlabel="steps done, in percent", xlim=(0, 100), ylim=(None, most))
        row[1].set_title(f"{name}: batches of {batches[0]}", loc="left", fontweight="bold")
        for axis in row:
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.yaxis.set_minor_formatter(NullFormatter())
        note = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "color": "grey"}
        row[0].annotate("start; above it: diverged", (0.99, start), **note)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(config: Config) -> None:
    """Train with progress shown, print the table, write the picture."""
    console = Console()
    with Progress(console=console) as progress:
        total = len(problems(config)) * len(config.controls) * len(config.batches)
        task = progress.add_task("compiling", total=total)
        records = run(config, lambda done: progress.update(task, advance=1, description=done))
    console.print(table(records))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "control.png"
    picture(records).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
