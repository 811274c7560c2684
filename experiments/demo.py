"""Does a natural gradient reach Adam's final loss sooner, in steps and in seconds, on small real problems?

Two problems on the 1,797 digits of 8x8 pixels that scikit-learn ships, a fifth of them kept for testing: a
convolutional classifier, and an autoencoder with a code of 12 numbers, a narrow deep net as in the first K-FAC paper.

Expected: on the autoencoder K-FAC and its relatives reach Adam's final loss in less than half of its steps, K-FAC and
TKFAC in some half of its seconds, EKFAC and TEKFAC, whose steps are dearer, in more. "Adaptive" is K-FAC with learning
rate, momentum and damping from the quadratic model, and nothing tuned. On the classifier it ends far below Adam; on
the autoencoder it is soon down and then stays at what the noise of a third of the data allows, since nothing makes its
steps decay. The others of the family gain little or nothing over Adam on the classifier, where its step is the
cheapest. SOAP, and Shampoo at the length of Adam's steps, end below Adam on both; TENGraD, TNT and MBF do not. Only the
training loss is compared: everything here overfits, as the test column says.

Every method has the same initial parameters, the same batches in the same order and, but for the adaptive one, a linear
warm-up and a cosine decay of the learning rate to zero. On the autoencoder Adam trains for twice the steps, about as
many seconds as the others. Its gradient comes through the same capture, whose curvature it never asks for. Compilation,
and measuring the loss of the whole training set, are outside the clock.

The settings were chosen by the lowest final training loss, with one seed, on these very problems; near ties went to the
better test result, and settings next to one that diverges were passed over. K-FAC and EKFAC had more trials than Adam,
having more to choose. TKFAC has the settings of K-FAC and TEKFAC those of EKFAC. What was tried, choices in brackets:

    classifier   Adam    rate 0.02 0.03 0.05 0.08 0.12; with b2 = 0.99 [0.05] 0.08; seven rates at batches of 128
                 K-FAC   rate and damping [0.1, 0.15] (0.1, 0.3) (0.2, 0.6) (0.05, 0.1); (0.07, 0.1) lower, but
                         (0.05, 0.05) diverges; damping falling from 1 to 0.1, three ways; 28 at batches of 128
                 EKFAC   [0.05, falling from 1 to 0.1 in 40 steps] (0.1, the same in 120 steps) (0.1, 0.3); (0.05, 0.1)
                         lower, but (0.03, 0.05) and (0.07, 0.1) diverge; 21 at batches of 128
    autoencoder  Adam    rate 0.005 0.01 0.02 0.03 0.04 0.06; 0.01 0.02 0.03 with b2 = 0.99 and, [at 0.02], 0.95;
                         b1 = 0.95; narrower nets and batches of 256 for all three methods
                 K-FAC   rate [0.1] 0.15 0.2; damping falling from 3 to 0.03, 0.01, [0.003], 0.001, in 300 steps of
                         600; periods (2, 10) and [(5, 20)]
                 EKFAC   rate 0.05 [0.07] 0.1 0.2 0.3 0.5; damping falling from 3 to 0.3, 0.1, 0.05, 0.04, 0.03,
                         [0.02], 0.01 (diverges); decay 0.95 [0.98]; both estimators; refreshes every 10 20 [50] 100;
                         no momentum

The others had fewer trials. Classifier: TENGraD (rate, damping, refreshes every 5 or 20) (0.05, 0.1) [0.05, falling
from 1 to 0.1 in 40 steps, 5] (0.1, the same), stuck at (0.1, 0.15) and at (0.1, 0.3, 5); TNT (rate, damping) (0.05,
0.1) (0.1, 0.3) [0.03, 0.03]; MBF (0.001, 0.01) [0.003, 0.01] (0.01, 0.01: diverges); Shampoo's rate [0.003] 0.005 0.01
0.03 (diverges); SOAP's [0.01] 0.02 0.05. Shampoo at 0.01 and SOAP at 0.05 end lower still, but leap up to 0.1 halfway
through. Autoencoder, damping falling from 3: TENGraD [0.1 to 0.3] 0.3 to 1, 0.03 to 0.1, 0.1 to 0.03 with kl_clip 0.01,
while 0.1 to 0.1, 0.05 to 0.01 and 0.2 to 0.03 diverge; TNT [0.1 to 0.03] 0.05 to 0.01 (0.1 to 0.01 or 0.003 diverges);
MBF (0.01, 0.3) [0.003, 0.1], stuck at (0.001, 0.01) (0.003, 0.03) (0.01, 0.1); Shampoo [0.003] 0.005 0.01 (stuck); SOAP
0.01 [0.02] 0.03. K-BFGS, (rate, damping): classifier (0.3, 0.03) (1, 0.3) (1, 0.1) (2, 0.3) (2, 0.1) (2, 0.03:
diverges) [3, 0.1] (4, 0.3) (8, 0.3: leaps up); autoencoder (0.3, 0.3) (1, 0.3) (1, 0.03: diverges) (2, 0.3) (3, 0.3)
[4, 0.3] (6, 0.3: lower) (8, 0.3: diverges) (8, 1), and damping falling from 3 to 0.03 and from 0.3 to 0.1.
"""

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
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from scipy.special import xlogy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import natgrad_jax as ng


class Setting(NamedTuple):
    """How a method trains: its steps, the peak of its learning rate if any, further keywords of the optimizer."""

    steps: int
    learning_rate: float | None
    options: Mapping[str, Any] = {}


class Entry(NamedTuple):
    """A method of the comparison: how its optimizer is made, its setting on each problem, the labels it looks at."""

    make: Callable[..., optax.GradientTransformation]
    classifier: Setting
    autoencoder: Setting
    labels: Literal["sampled", "true"] = "sampled"


def adam(learning_rate: optax.Schedule, layers: ng.Layers, **options: Any) -> optax.GradientTransformation:
    """The baseline, called like the others."""
    del layers
    return optax.adam(learning_rate, **options)


def adaptive(learning_rate: optax.Schedule, layers: ng.Layers, **options: Any) -> optax.GradientTransformation:
    """K-FAC with all that can be had from the quadratic model."""
    del learning_rate
    return ng.kfac("quadratic", layers, momentum="quadratic", damping=ng.adaptive_damping(), **options)


def falling(start: float, end: float, steps: int) -> optax.Schedule:
    """A geometric decay that stays at its end."""
    return optax.exponential_decay(start, steps, end / start, end_value=end)


KFAC = {"statistics_every": 5, "refresh_every": 20}
EKFAC = {"statistics_every": 5, "refresh_every": 50, "rescale_every": 5, "decay": 0.98}
KFAC_SETTINGS = (
    Setting(300, 0.1, KFAC | {"damping": 0.15}),
    Setting(1000, 0.1, KFAC | {"damping": falling(3, 0.003, 500)}),
)
EKFAC_SETTINGS = (
    Setting(300, 0.05, EKFAC | {"damping": falling(1, 0.1, 40)}),
    Setting(1000, 0.07, EKFAC | {"damping": falling(3, 0.02, 500)}),
)
SHAMPOO = KFAC | {"damping": 1e-8, "graft_to": "adam", "decay": 0.95, "graft_decay": 0.99}
OFTEN = {"statistics_every": 5, "refresh_every": 5, "decay": 0.5}
METHODS = {
    "Adam": Entry(adam, Setting(300, 0.05, {"b2": 0.99}), Setting(2000, 0.02, {"b2": 0.95})),
    "K-FAC": Entry(ng.kfac, *KFAC_SETTINGS),
    "TKFAC": Entry(ng.tkfac, *KFAC_SETTINGS),
    "EKFAC": Entry(ng.ekfac, *EKFAC_SETTINGS),
    "TEKFAC": Entry(ng.tekfac, *EKFAC_SETTINGS),
    "TENGraD": Entry(
        ng.tengrad,
        Setting(300, 0.05, {"refresh_every": 5, "damping": falling(1, 0.1, 40)}),
        Setting(1000, 0.1, {"refresh_every": 5, "damping": falling(3, 0.3, 500)}),
    ),
    "TNT": Entry(
        ng.tnt,
        Setting(300, 0.03, KFAC | {"damping": 0.03}),
        Setting(1000, 0.1, KFAC | {"damping": falling(3, 0.03, 500)}),
    ),
    "MBF": Entry(ng.mbf, Setting(300, 0.003, KFAC | {"damping": 0.01}), Setting(1000, 0.003, KFAC | {"damping": 0.1})),
    "Shampoo": Entry(ng.shampoo, Setting(300, 0.003, SHAMPOO), Setting(1000, 0.003, SHAMPOO)),
    "SOAP": Entry(ng.soap, Setting(300, 0.01), Setting(1000, 0.02)),
    "K-BFGS": Entry(ng.kbfgs, Setting(300, 3.0, {"damping": 0.1}), Setting(1000, 4.0, {"damping": 0.3}), labels="true"),
    "adaptive": Entry(adaptive, Setting(150, None, OFTEN), Setting(300, None, OFTEN)),
}
BASELINE = "Adam"


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share; those of each method stand in `METHODS`.

    Attributes:
        output: folder of the picture.
        seed: of the split, the initial parameters and the order of the data.
        test_fraction: share of the images kept for testing.
        classifier_batch: images per step of the classifier.
        classifier_channels: outputs of its convolutions.
        autoencoder_batch: images per step of the autoencoder.
        autoencoder_widths: outputs of its hidden layers; the code is the one in the middle.
        warmup: share of the steps in which the learning rate rises to its peak; it then falls to 0 like a cosine.
        measurements: how often in a run the loss of the whole training set is measured.
        smoke: whether to stop after a few steps, to see that everything runs.
    """

    output: Path = Path("results")
    seed: int = 0
    test_fraction: float = 0.2
    classifier_batch: int = 256
    classifier_channels: tuple[int, ...] = (16, 32, 64)
    autoencoder_batch: int = 479
    autoencoder_widths: tuple[int, ...] = (256, 128, 64, 12, 64, 128, 256)
    warmup: float = 0.05
    measurements: int = 50
    smoke: bool = False


class Classifier(nn.Module):
    """Convolutions of 3x3, of stride 2 from the second on, and a dense layer of logits."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        """Images [N, 64] -> logits [N, 10]."""
        x = x.reshape(-1, 8, 8, 1)
        for index, channels in enumerate(self.channels):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=2 if index else 1)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Autoencoder(nn.Module):
    """Dense layers with tanh, a linear code in the middle, logits of the pixels at the end."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        """Images [N, 64] -> logits of the pixels [N, 64]."""
        pixels = x.shape[-1]
        for index, width in enumerate(self.widths):
            x = nn.Dense(width)(x)
            x = x if index == len(self.widths) // 2 else nn.tanh(x)
        return nn.Dense(pixels)(x)


class Part(NamedTuple):
    """Inputs, targets, and the least that the loss on them can be."""

    inputs: np.ndarray
    targets: np.ndarray
    floor: float


class Problem(NamedTuple):
    """What is trained on what."""

    name: str
    model: nn.Module
    likelihood: ng.losses.Likelihood
    train: Part
    test: Part
    batch: int


class Training(NamedTuple):
    """All that a step changes."""

    params: Any
    opt_state: Any
    key: jax.Array


class Record(NamedTuple):
    """One run: the loss above its floor after so many steps and seconds, and what became of it."""

    problem: str
    method: str
    steps: np.ndarray
    seconds: np.ndarray
    losses: np.ndarray
    test: str
    compile_seconds: float


class Status(NamedTuple):
    """Where a run stands."""

    problem: str
    method: str
    step: int
    steps: int
    epoch: float
    loss: float
    step_seconds: float


Report = Callable[[Status], None]


def run(config: Config, report: Report = lambda status: None) -> list[Record]:
    """Train every model with every method, from the same parameters on the same batches.

    Args:
        config: the numbers.
        report: called at each measurement.

    Returns:
        The records, problem by problem.
    """
    records = []
    for problem in problems(config):
        for method, entry in METHODS.items():
            setting: Setting = getattr(entry, problem.name)
            if config.smoke:
                setting = setting._replace(steps=10)
            records.append(train(problem, method, setting, config, report))
    return records


def problems(config: Config) -> list[Problem]:
    """The two problems, on one split of the digits."""
    digits: Any = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=config.test_fraction, random_state=config.seed, stratify=labels)
    x, x_test, y, y_test = split
    return [
        Problem(
            "classifier",
            Classifier(config.classifier_channels),
            ng.losses.softmax_cross_entropy,
            Part(x, y, 0.0),
            Part(x_test, y_test, 0.0),
            config.classifier_batch,
        ),
        Problem(
            "autoencoder",
            Autoencoder(config.autoencoder_widths),
            ng.losses.sigmoid_binary_cross_entropy,
            Part(x, x, entropy(x)),
            Part(x_test, x_test, entropy(x_test)),
            config.autoencoder_batch,
        ),
    ]


def entropy(images: np.ndarray) -> float:
    """Mean entropy of an image in nats: the least binary cross-entropy that any reconstruction of grey pixels has."""
    return float(-np.mean(np.sum(xlogy(images, images) + xlogy(1 - images, 1 - images), axis=-1)))


def train(problem: Problem, method: str, setting: Setting, config: Config, report: Report) -> Record:
    """One run of one method on one problem."""
    capture = ng.linen.capture(problem.model, problem.likelihood, labels=METHODS[method].labels)
    start, key = jax.random.split(jax.random.key(config.seed))
    params = problem.model.init(start, problem.train.inputs[:1])["params"]
    layers = capture.layers({"params": params}, problem.train.inputs[: problem.batch])
    warmup = round(config.warmup * setting.steps)
    rate = optax.warmup_cosine_decay_schedule(0.0, setting.learning_rate or 0.0, warmup, setting.steps)
    make = METHODS[method].make
    unclipped = {} if method in ("Adam", "adaptive") else {"kl_clip": None}  # steps as long as the rate says
    tx = optax.with_extra_args_support(make(rate, layers, **unclipped, **setting.options))

    @partial(jax.jit, donate_argnums=0)
    def step(training, inputs, targets):
        key, draw = jax.random.split(training.key)
        out = capture.value_and_grad({"params": training.params}, inputs, targets, key=draw)
        updates, opt_state = tx.update(out.grad, training.opt_state, training.params, curvature=out.curvature)
        return Training(optax.apply_updates(training.params, updates), opt_state, key)

    @jax.jit
    def outputs(params, inputs):
        return problem.model.apply({"params": params}, inputs)

    def loss(params, part):
        return float(problem.likelihood(outputs(params, part.inputs), part.targets)) - part.floor

    training = Training(params, tx.init(params), key)
    losses = [loss(params, problem.train)]
    began = time.perf_counter()
    jax.block_until_ready(step(jax.tree.map(jnp.copy, training), *next(batches(problem, config.seed))))
    compile_seconds = time.perf_counter() - began

    steps, seconds = [0], [0.0]
    every = max(1, setting.steps // config.measurements)
    stream = batches(problem, config.seed)
    while steps[-1] < setting.steps:
        more = min(every, setting.steps - steps[-1])
        began = time.perf_counter()
        for _ in range(more):
            training = step(training, *next(stream))
        jax.block_until_ready(training)
        seconds.append(seconds[-1] + time.perf_counter() - began)
        steps.append(steps[-1] + more)
        losses.append(loss(training.params, problem.train))
        epoch = steps[-1] * problem.batch / len(problem.train.inputs)
        pace = seconds[-1] / steps[-1]
        report(Status(problem.name, method, steps[-1], setting.steps, epoch, losses[-1], pace))

    if problem.name == "classifier":
        guesses = np.argmax(outputs(training.params, problem.test.inputs), axis=-1)
        test = f"{np.mean(guesses == problem.test.targets):.1%}"
    else:
        test = f"{loss(training.params, problem.test):.2f}"
    return Record(problem.name, method, np.array(steps), np.array(seconds), np.array(losses), test, compile_seconds)


def batches(problem: Problem, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches for ever, each epoch in a new order; the same for every method.

    Args:
        problem: whose training data.
        seed: of the orders.

    Yields:
        Inputs and targets.
    """
    random = np.random.default_rng(seed)
    inputs, targets, _ = problem.train
    while True:
        order = random.permutation(len(inputs))
        for chosen in np.split(order, range(problem.batch, len(order), problem.batch)):
            if len(chosen) == problem.batch:
                yield inputs[chosen], targets[chosen]


def baselines(records: list[Record]) -> dict[str, float]:
    """The final loss of the baseline on each problem."""
    return {record.problem: record.losses[-1] for record in records if record.method == BASELINE}


def table(records: list[Record]) -> Table:
    """What the runs came to."""
    result = Table(
        title="Digits: for every method the same initial parameters and batches",
        caption="Losses in nats per image, the autoencoder's above the entropy of the pixels, the least possible. "
        "Test: correct answers of the classifier, loss of the autoencoder. Compilation is not counted in the other "
        "seconds, nor is the measuring of losses.",
        caption_justify="left",
    )
    result.add_column("problem", no_wrap=True)
    result.add_column("method", no_wrap=True)
    for name in ("train loss", "test", "steps", "ms / step", f"s until {BASELINE}'s loss", "s to compile"):
        result.add_column(name, justify="right")
    targets = baselines(records)
    for index, record in enumerate(records):
        if index and record.problem != records[index - 1].problem:
            result.add_section()
        reached = record.losses <= targets[record.problem]
        result.add_row(
            record.problem,
            record.method,
            f"{record.losses[-1]:.2g}",
            record.test,
            f"{record.steps[-1]}",
            f"{1000 * record.seconds[-1] / record.steps[-1]:.1f}",
            f"{record.seconds[np.argmax(reached)]:.1f}" if reached.any() else "-",
            f"{record.compile_seconds:.1f}",
        )
    return result


def picture(records: list[Record]) -> Figure:
    """Training loss against steps and against seconds, one row for each problem."""
    names = list(dict.fromkeys(record.problem for record in records))
    figure, axes = plt.subplots(len(names), 2, figsize=(10, 7), sharey="row", layout="constrained", squeeze=False)
    targets = baselines(records)
    for row, name in zip(axes, names, strict=True):
        for record in (record for record in records if record.problem == name):
            dash = "--" if list(METHODS).index(record.method) >= 10 else "-"  # there are ten colors
            for axis, position in zip(row, (record.steps, record.seconds), strict=True):
                (line,) = axis.plot(position, record.losses, label=record.method, linewidth=1.8, linestyle=dash)
                axis.plot(position[-1], record.losses[-1], "o", color=line.get_color(), markersize=4)
        for axis, unit in zip(row, ("steps", "seconds of training"), strict=True):
            axis.axhline(targets[name], color="grey", linewidth=0.8, linestyle=":", zorder=0)
            axis.set(yscale="log", xlabel=unit, xlim=(0, None))
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
        note = {"xy": (0.01, targets[name]), "xycoords": ("axes fraction", "data"), "fontsize": 8}
        row[0].annotate(f"{BASELINE}'s final loss", va="bottom", color="grey", **note)
        row[0].set_ylabel("training loss" + ("" if name == "classifier" else " above its floor"))
        row[0].set_title(f"{name} of digits", loc="left", fontweight="bold")
    axes[0, 1].legend(frameon=False)
    return figure


def main(config: Config) -> None:
    """Train with progress shown, print the table, write the picture."""
    console = Console()
    columns = [
        TextColumn("{task.fields[problem]:<12}{task.description:<8}"),
        BarColumn(),
        TextColumn(
            "epoch {task.fields[epoch]:>5.0f}  loss {task.fields[loss]:<8.3g} {task.fields[pace]:>6.1f} ms/step"
        ),
    ]
    with Progress(*columns, console=console) as progress:
        tasks: dict[tuple[str, str], Any] = {}

        def report(status):
            fields = {"epoch": status.epoch, "loss": status.loss, "pace": 1000 * status.step_seconds}
            run_of = (status.problem, status.method)
            if run_of not in tasks:
                tasks[run_of] = progress.add_task(status.method, total=status.steps, problem=status.problem, **fields)
            progress.update(tasks[run_of], completed=status.step, **fields)

        records = run(config, report)
    console.print(table(records))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "demo.png"
    picture(records).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
