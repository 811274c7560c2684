"""Does a natural gradient reach Adam's final loss sooner, in steps and in seconds, on small real problems?

The 1,797 digits of 8x8 pixels that scikit-learn ships: a small convolutional classifier, and an autoencoder with a code
of 12 numbers. Every method has the same initial parameters and batches and, but for the adaptive one, a linear warm-up
and a cosine decay of the rate to zero. On the autoencoder Adam has twice the steps, about as many seconds as others.

Expected: on the autoencoder K-FAC and its relatives reach Adam's final loss in less than half of its steps. "Adaptive",
K-FAC with everything from the quadratic model, ends far below Adam on the classifier. Most of the time is compilation,
which is not in the seconds of the table. Losses are those of the training set.
"""

from functools import partial
from typing import Any

import optax

import natgrad_jax as ng
from experiments import figures, problems, study
from experiments.methods import ADAPTIVE
from experiments.nets import Convnet, Perceptron
from experiments.study import Entry, Limits


def falling(start: float, end: float, steps: int) -> optax.Schedule:
    """A geometric decay that stays at its end."""
    return optax.exponential_decay(start, steps, end / start, end_value=end)


KFAC: dict[str, Any] = {"statistics_every": 5, "refresh_every": 20}
EKFAC: dict[str, Any] = {"statistics_every": 5, "refresh_every": 50, "rescale_every": 5, "decay": 0.98}
OFTEN: dict[str, Any] = {"refresh_every": 5}
SHAMPOO = KFAC | {"damping": 1e-8, "graft_to": "adam", "decay": 0.95, "graft_decay": 0.99}
STEPS = {"classifier": 100, "autoencoder": 200}
OF_KFAC = (0.1, KFAC | {"damping": 0.15}), (0.1, KFAC | {"damping": falling(3, 0.003, 100)})
OF_EKFAC = (0.05, EKFAC | {"damping": falling(1, 0.1, 20)}), (0.07, EKFAC | {"damping": falling(3, 0.02, 100)})
OF_TENGRAD = (0.05, OFTEN | {"damping": falling(1, 0.1, 20)}), (0.1, OFTEN | {"damping": falling(3, 0.3, 100)})
METHODS: dict[str, Any] = {
    "Adam": (optax.adam, (0.05, {"b2": 0.99}), (0.02, {"b2": 0.95})),
    "K-FAC": (ng.kfac, *OF_KFAC),
    "TKFAC": (ng.tkfac, *OF_KFAC),
    "EKFAC": (ng.ekfac, *OF_EKFAC),
    "TEKFAC": (ng.tekfac, *OF_EKFAC),
    "TENGraD": (ng.tengrad, *OF_TENGRAD),
    "TNT": (ng.tnt, (0.03, KFAC | {"damping": 0.03}), (0.1, KFAC | {"damping": falling(3, 0.1, 100)})),
    "MBF": (ng.mbf, (0.003, KFAC | {"damping": 0.01}), (0.003, KFAC | {"damping": 0.1})),
    "Shampoo": (ng.shampoo, (0.003, SHAMPOO), (0.003, SHAMPOO)),
    "SOAP": (ng.soap, (0.02, {}), (0.03, {})),
    "K-BFGS": (ng.kbfgs, (3.0, {"damping": 0.1}), (4.0, {"damping": 0.3})),
    "adaptive": (ng.kfac, (0.0, ADAPTIVE), (0.0, ADAPTIVE)),
}
"""{name: function, peak of the rate and other keywords on the classifier, and on the autoencoder}."""
BASELINE = "Adam"
WARMUP, LOOKS = 0.05, 25
"""Share of the steps in which a rate rises to its peak, and how often in a run the loss is measured."""


NETS = {"classifier": Convnet((16,), (2,)), "autoencoder": Perceptron((64, 12, 64), linear=1)}


def entry(name: str, case: study.Case) -> Entry:
    """A method at its setting on a problem."""
    problem = case.fields["problem"]
    method, *settings = METHODS[name]
    peak, options = settings[problem == "autoencoder"]

    def make(numbers: Any, layers: Any) -> Any:
        rate = study.cosine(peak, numbers["horizon"], WARMUP)
        if name == BASELINE:
            return method(rate, **options)
        given = {"learning_rate": rate, "kl_clip": None} if name != "adaptive" else {}  # as long as the rate says
        return method(layers=layers, **given, **options)

    labels: Any = {BASELINE: None, "K-BFGS": "true"}.get(name, "sampled")
    steps = STEPS[problem] * (2 if (name, problem) == (BASELINE, "autoencoder") else 1)
    return Entry(make, labels=labels, steps=steps, look=steps // LOOKS)


STUDY = study.Study(
    "demo",
    "Every method on two small problems",
    {name: partial(problems.on_digits, net, {"problem": name}, 599) for name, net in NETS.items()},
    {name: partial(entry, name) for name in METHODS},
    Limits(STEPS["autoencoder"], 1),
    partial(
        figures.outcome,
        title="Digits: for every method the same initial parameters and batches",
        rivals=(BASELINE,),
        note="Losses in nats per image, the autoencoder's above the entropy of the pixels, the least possible.",
    ),
    partial(figures.curves, label=f"training loss (dotted: {BASELINE}'s)", across="linear", rivals=(BASELINE,)),
    {"warmup": WARMUP, "classifier_steps": STEPS["classifier"]},
    compiler={"xla_cpu_use_fusion_emitters": False},  # compiles in half of the time; a step is as fast
)

if __name__ == "__main__":
    study.main(STUDY)
