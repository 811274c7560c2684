"""Does a natural gradient reach Adam's final loss sooner, in steps and in seconds, on small real problems?

Two problems on the 1,797 digits of 8x8 pixels that scikit-learn ships: a small convolutional classifier, and an
autoencoder with a code of 12 numbers. Every method has the same initial parameters, the same batches in the same order
and, but for the adaptive one, a linear warm-up and a cosine decay of the learning rate to zero. On the autoencoder Adam
trains for twice the steps, about as many seconds as the others.

Expected: on the autoencoder K-FAC and its relatives reach Adam's final loss in less than half of its steps. "Adaptive",
K-FAC with everything from the quadratic model, ends far below Adam on the classifier. The nets are small, so that most
of the time is compilation, which is not in the seconds of the table. Losses are those of the training set.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import optax
from matplotlib.figure import Figure

import natgrad_jax as ng
from experiments import digits, figures, study
from experiments.methods import ADAPTIVE
from experiments.nets import Convnet, Perceptron
from experiments.records import Records
from experiments.study import Entry, Limits


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
CONV, CODE = 100, 200
"""Steps on the classifier and on the autoencoder."""
OF_KFAC = Setting(CONV, 0.1, KFAC | {"damping": 0.15}), Setting(CODE, 0.1, KFAC | {"damping": falling(3, 0.003, 100)})
OF_EKFAC = (
    Setting(CONV, 0.05, EKFAC | {"damping": falling(1, 0.1, 20)}),
    Setting(CODE, 0.07, EKFAC | {"damping": falling(3, 0.02, 100)}),
)
OF_TENGRAD = (
    Setting(CONV, 0.05, TENGRAD | {"damping": falling(1, 0.1, 20)}),
    Setting(CODE, 0.1, TENGRAD | {"damping": falling(3, 0.3, 100)}),
)
OF_TNT = Setting(CONV, 0.03, KFAC | {"damping": 0.03}), Setting(CODE, 0.1, KFAC | {"damping": falling(3, 0.1, 100)})
OF_MBF = Setting(CONV, 0.003, KFAC | {"damping": 0.01}), Setting(CODE, 0.003, KFAC | {"damping": 0.1})
METHODS: dict[str, Any] = {
    "Adam": (optax.adam, Setting(CONV, 0.05, {"b2": 0.99}), Setting(2 * CODE, 0.02, {"b2": 0.95})),
    "K-FAC": (ng.kfac, *OF_KFAC),
    "TKFAC": (ng.tkfac, *OF_KFAC),
    "EKFAC": (ng.ekfac, *OF_EKFAC),
    "TEKFAC": (ng.tekfac, *OF_EKFAC),
    "TENGraD": (ng.tengrad, *OF_TENGRAD),
    "TNT": (ng.tnt, *OF_TNT),
    "MBF": (ng.mbf, *OF_MBF),
    "Shampoo": (ng.shampoo, Setting(CONV, 0.003, SHAMPOO), Setting(CODE, 0.003, SHAMPOO)),
    "SOAP": (ng.soap, Setting(CONV, 0.02), Setting(CODE, 0.03)),
    "K-BFGS": (ng.kbfgs, Setting(CONV, 3.0, {"damping": 0.1}), Setting(CODE, 4.0, {"damping": 0.3})),
    "adaptive": (ng.kfac, Setting(CONV, 0.0, ADAPTIVE), Setting(CODE, 0.0, ADAPTIVE)),
}
"""{name: function, its settings on the classifier and on the autoencoder}."""
BASELINE = "Adam"
WARMUP, LOOKS = 0.05, 25
"""Share of the steps in which a rate rises to its peak, and how often in a run the loss is measured."""
CHANNELS, WIDTHS = 16, (64, 12, 64)


def classifier() -> study.Case:
    """A convolution and a dense layer."""
    return digits.case(Convnet((CHANNELS,), (2,)), digits.images(), 599, {"problem": "classifier"})


def autoencoder() -> study.Case:
    """A code of 12 numbers."""
    net = Perceptron(WIDTHS, linear=len(WIDTHS) // 2)
    return digits.case(net, digits.rows(digits.images()), 599, {"problem": "autoencoder"})


def entry(name: str, problem: str) -> Entry:
    """A method at its setting on a problem."""
    method, *settings = METHODS[name]
    setting: Setting = settings[problem == "autoencoder"]

    def make(numbers: Any, layers: Any) -> Any:
        rate = study.cosine(setting.rate, numbers["horizon"], WARMUP)
        if name == BASELINE:
            return method(rate, **setting.options)
        given = {"learning_rate": rate, "kl_clip": None} if name != "adaptive" else {}  # as long as the rate says
        return method(layers=layers, **given, **setting.options)

    labels: Any = {BASELINE: None, "K-BFGS": "true"}.get(name, "sampled")
    return Entry(make, labels=labels, steps=setting.steps, look=setting.steps // LOOKS)


def entries(case: study.Case) -> dict[str, Entry]:
    """Every method on a problem."""
    return {name: entry(name, case.fields["problem"]) for name in METHODS}


def picture(rows: Records) -> Figure:
    """Losses against seconds and steps."""
    levels = {row["problem"]: row["losses"][-1] for row in rows if row["name"] == BASELINE}
    return figures.curves(rows, f"training loss (dotted: {BASELINE}'s)", across="linear", levels=levels)


STUDY = study.Study(
    "demo",
    "Every method on two small problems",
    {"classifier": classifier, "autoencoder": autoencoder},
    entries,
    Limits(CODE, 1),
    partial(
        figures.outcome,
        title="Digits: for every method the same initial parameters and batches",
        rivals=(BASELINE,),
        note="Losses in nats per image, the autoencoder's above the entropy of the pixels, the least possible.",
    ),
    picture,
    {"warmup": WARMUP, "classifier_steps": CONV},
    compiler={"xla_cpu_use_fusion_emitters": False},  # compiles in half of the time; a step is as fast
)

if __name__ == "__main__":
    study.main(STUDY)
