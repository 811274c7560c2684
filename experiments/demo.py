"""Does a natural gradient reach Adam's final loss sooner, in steps and in seconds, on small real problems?

Two problems on the 1,797 digits of 8x8 pixels that scikit-learn ships, a fifth of them kept for testing: a
convolutional classifier, and an autoencoder with a code of 12 numbers. Every method has the same initial parameters,
the same batches in the same order and, but for the adaptive one, a linear warm-up and a cosine decay of the learning
rate to zero. On the autoencoder Adam trains for twice the steps, about as many seconds as the others.

Expected: on the autoencoder K-FAC and its relatives reach Adam's final loss in less than half of its steps, K-FAC and
TKFAC in some half of its seconds. "Adaptive", K-FAC with everything from the quadratic model, ends far below Adam on
the classifier. Only the training loss is compared: everything here overfits, as the test column says.
How the settings were chosen, and what else was tried, stands on the results page of the documentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import optax
import tyro
from rich.table import Table

import natgrad_jax as ng
from experiments import digits, figures, study
from experiments.methods import ADAPTIVE
from experiments.nets import Convnet, Perceptron
from experiments.records import Records


class Setting(NamedTuple):
    """How a method trains: its steps, the peak of its learning rate, further keywords of the optimizer."""

    steps: int
    rate: float
    options: Mapping[str, Any] = {}


def falling(start: float, end: float, steps: int) -> optax.Schedule:
    """A geometric decay that stays at its end."""
    return optax.exponential_decay(start, steps, end / start, end_value=end)


KFAC: dict[str, Any] = {"statistics_every": 5, "refresh_every": 20}
EKFAC: dict[str, Any] = {"statistics_every": 5, "refresh_every": 50, "rescale_every": 5, "decay": 0.98}
TENGRAD: dict[str, Any] = {"refresh_every": 5}
SHAMPOO = KFAC | {"damping": 1e-8, "graft_to": "adam", "decay": 0.95, "graft_decay": 0.99}
OF_KFAC = Setting(300, 0.1, KFAC | {"damping": 0.15}), Setting(1000, 0.1, KFAC | {"damping": falling(3, 0.003, 500)})
OF_EKFAC = (
    Setting(300, 0.05, EKFAC | {"damping": falling(1, 0.1, 40)}),
    Setting(1000, 0.07, EKFAC | {"damping": falling(3, 0.02, 500)}),
)
OF_TENGRAD = (
    Setting(300, 0.05, TENGRAD | {"damping": falling(1, 0.1, 40)}),
    Setting(1000, 0.1, TENGRAD | {"damping": falling(3, 0.3, 500)}),
)
OF_TNT = Setting(300, 0.03, KFAC | {"damping": 0.03}), Setting(1000, 0.1, KFAC | {"damping": falling(3, 0.03, 500)})
OF_MBF = Setting(300, 0.003, KFAC | {"damping": 0.01}), Setting(1000, 0.003, KFAC | {"damping": 0.1})
METHODS: dict[str, Any] = {
    "Adam": (optax.adam, Setting(300, 0.05, {"b2": 0.99}), Setting(2000, 0.02, {"b2": 0.95})),
    "K-FAC": (ng.kfac, *OF_KFAC),
    "TKFAC": (ng.tkfac, *OF_KFAC),
    "EKFAC": (ng.ekfac, *OF_EKFAC),
    "TEKFAC": (ng.tekfac, *OF_EKFAC),
    "TENGraD": (ng.tengrad, *OF_TENGRAD),
    "TNT": (ng.tnt, *OF_TNT),
    "MBF": (ng.mbf, *OF_MBF),
    "Shampoo": (ng.shampoo, Setting(300, 0.003, SHAMPOO), Setting(1000, 0.003, SHAMPOO)),
    "SOAP": (ng.soap, Setting(300, 0.01), Setting(1000, 0.02)),
    "K-BFGS": (ng.kbfgs, Setting(300, 3.0, {"damping": 0.1}), Setting(1000, 4.0, {"damping": 0.3})),
    "adaptive": (ng.kfac, Setting(150, 0.0, ADAPTIVE), Setting(300, 0.0, ADAPTIVE)),
}
"""{name: function, its settings on the classifier and on the autoencoder}."""
BASELINE = "Adam"


@dataclass(frozen=True)
class Config:
    """The numbers that all methods share; those of each method stand in `METHODS`.

    Attributes:
        output: folder of the records and of the picture.
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


def cases(config: Config) -> list[study.Case]:
    """The two problems, on one split of the digits."""
    train, test = digits.split(digits.images(), config.test_fraction, config.seed)
    channels, widths = config.classifier_channels, config.autoencoder_widths
    convnet = Convnet(channels, (1,) + (2,) * (len(channels) - 1))
    dense = Perceptron(widths, linear=len(widths) // 2)
    pixels = digits.rows(train), config.autoencoder_batch, digits.rows(test)
    return [
        digits.case({"problem": "classifier"}, convnet, train, config.classifier_batch, test),
        digits.case({"problem": "autoencoder"}, dense, *pixels),
    ]


def entries(case: study.Case, config: Config) -> dict[str, study.Entry]:
    """Every method at its setting on a problem."""

    def entry(name: str) -> study.Entry:
        method, *settings = METHODS[name]
        setting: Any = settings[case.fields["problem"] == "autoencoder"]
        steps, options = 10 if config.smoke else setting.steps, dict(setting.options)

        def make(numbers: Any, layers: Any) -> Any:
            rate = study.cosine(setting.rate, numbers["horizon"], config.warmup)
            if name == BASELINE:
                return method(rate, **options)
            given = {"learning_rate": rate, "kl_clip": None} if name != "adaptive" else {}  # as long as the rate says
            return method(layers=layers, **given, **options)

        look = max(1, steps // config.measurements)
        return study.Entry(make, labels="true" if name == "K-BFGS" else "sampled", steps=steps, look=look)

    return {name: entry(name) for name in METHODS}


def run(config: Config) -> Records:
    """Train every model with every method, in turn, from the same parameters on the same batches."""
    key = study.key(config, "measurements", "warmup", "smoke")
    path, limits = config.output / "demo.jsonl", study.Limits(0, 1)
    path.unlink(missing_ok=True)  # it takes a minute, and its settings stand in this file
    return study.run(path, key, cases(config), lambda case: entries(case, config), limits, (config.seed,))


def table(rows: Records) -> Table:
    """What the runs came to."""
    cells, levels = [], baselines(rows)
    for row in rows:
        seconds = study.reached(row, levels[row["problem"]])[1]
        pace = 1000 * row["seconds"][-1] / row["steps"][-1]
        until = f"{seconds:.1f}" if seconds < float("inf") else "-"
        end = f"{row['losses'][-1] or float('nan'):.2g}"
        counts = f"{row['steps'][-1]}", f"{pace:.1f}", until, f"{row['compile_seconds']:.1f}"
        cells.append((row["problem"], row["name"], end, row["test"], *counts))
    return figures.table(
        "Digits: for every method the same initial parameters and batches",
        ("problem", "method", "train loss", "test", "steps", "ms / step", f"s until {BASELINE}'s loss", "s to compile"),
        cells,
        "Losses in nats per image, the autoencoder's above the entropy of the pixels, the least possible. "
        "Test: correct answers of the classifier, loss of the autoencoder. Seconds are those of training, all methods "
        "in turn: neither compilation nor the measuring of losses is in them.",
        names=2,
    )


def baselines(rows: Records) -> dict[str, float]:
    """The final loss of the baseline on each problem."""
    return {row["problem"]: row["losses"][-1] for row in rows if row["name"] == BASELINE}


def main(config: Config) -> None:
    """Train, print the table, write the picture."""
    rows = run(config)
    picture = figures.curves(rows, f"training loss (dotted: {BASELINE}'s)", across="linear", levels=baselines(rows))
    figures.present([table(rows)], picture, config.output / "demo.png", 120)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
