"""Who is first at a deep autoencoder: Adam, tuned, or a natural gradient that chooses its own steps?

The digits of scikit-learn up-sampled to 28 x 28 by linear interpolation; the autoencoder of the papers with tanh,
784-1000-500-250-30-250-500-1000-784; batches of 500; the loss of the whole set above the entropy of the pixels. Nothing
is tuned for ours but how often the statistics are taken, and whether the damping is split "even" or by "pi". Adam has
the best of six learning rates, each constant and with a cosine decay, chosen with the first seed. Ours take products
with F of every fourth image. If kfac-jax can be imported (its release wants jax <= 0.9.1), it runs too: its own
adaptive mode at the best of three initial dampings tried beforehand (1, 3, 10), inverses every 5 steps.

"mnist" is a race to where tuned Adam ends after ten epochs, "curves" one off the plateau. MNIST has the statistics of
the first race, every 5 steps; the curves have them every 2. "fashion" is a race of the convnet of `make classify` to
92 % of the test images right, by methods with nothing tuned: SOAP has the rate that its authors published. Adam has
three epochs, its rate tuned. "cifar10" is one epoch of a ResNet-20 with batch norm, to where Adam ends at the best of
three rates by runs of 60 steps.

Expected: a gap of 2 nats in a twentieth of Adam's steps and a fifth of its seconds, and in half of the seconds of
kfac-jax, whose steps are of the same kind.

    make race                                       (some 25 minutes, most of them Adam's)
    make race ARGS="--seeds 1 --methods Adam K-FAC"
    make race ARGS="--problems mnist curves fashion cifar10"
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax

import natgrad_jax as ng
from experiments import figures, problems, study
from experiments.autoencoder import PLATEAU
from experiments.methods import ADAPTIVE
from experiments.nets import Perceptron
from experiments.problems import Problem
from experiments.running import Peer, has_peer
from experiments.study import Case, Entry, Limits, Numbers

ADAM, PEER = "Adam", "kfac-jax"
LEVELS, BATCH, WIDTHS = [30.0, 10.0, 5.0, 2.0], 500, [1000, 500, 250, 30, 250, 500, 1000]
PUBLISHED = 3e-3
"""The learning rate of SOAP's authors."""
RATES = [2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3]
SELDOM = {"statistics_every": 10, "refresh_every": 20, "rescale_every": 10, "decay": 0.3, "refresh": "qr"}
CONFIG: dict[str, Any] = {"batch": BATCH, "levels": LEVELS, "widths": WIDTHS, "product_stride": 4}
CONFIG |= {"adam_steps": 2000, "adam_rates": RATES, "peer_damping": 3.0}


def adam(numbers: Numbers, layers: Any) -> optax.GradientTransformation:
    """Adam at a rate that is constant (`falls` is 0) or falls like a cosine (1)."""
    falls, fall = numbers["falls"], study.cosine(1.0, numbers["horizon"])
    return optax.adam(lambda count: numbers["rate"] * (1 - falls + falls * fall(count)))


ours = partial(study.natural, product_stride=CONFIG["product_stride"], **ADAPTIVE)
peer = partial(Peer, initial_damping=CONFIG["peer_damping"], inverse_update_period=5)
STUDY = study.Study(
    "race",
    "The race by steps that choose themselves",
    {"autoencoder": partial(problems.on_digits, Perceptron(tuple(WIDTHS)), {"problem": "autoencoder"}, BATCH, 28)},
    {
        ADAM: Entry(adam, study.grid(rate=RATES, falls=(0, 1)), None, CONFIG["adam_steps"], look=20),
        "K-FAC": ours(ng.kfac, split="even"),
        "TKFAC": ours(ng.tkfac, split="pi"),
        "EKFAC": ours(ng.ekfac, split="even", **SELDOM),
        "TEKFAC": ours(ng.tekfac, split="pi", **SELDOM),
        **({PEER: Entry(None, peer=peer)} if has_peer() else {}),
    },
    Limits(250, 5, level=min(LEVELS)),
    partial(
        figures.outcome,
        title="Steps and seconds to a gap",
        rivals=(ADAM, PEER),
        levels=LEVELS,
        note="Gap: loss above the entropy of the pixels, nats an image.",
    ),
    partial(figures.curves, label="training loss above its floor, nats an image", levels=LEVELS),
    CONFIG,
    seeds=range(5),
)


def to_level(
    problem: Problem, level: float | None, unit: str, make: Callable[[], Case], label: str, across: str, **fields: Any
) -> study.Study:
    """Some entries beside Adam, to a loss, or what else is looked at, on one of the papers' data; None for Adam's."""
    goal: Any = {"levels": (level,) if level else (), "rivals": (ADAM,)}
    where = f"{level:g} {unit}" if level else "Adam's error"
    return study.Study(
        f"race_{problem.name}",
        f"The race to {where}: {problem.name}",
        {problem.name: make},
        table=partial(figures.outcome, title=f"Steps and seconds, {problem.title}", **goal),
        picture=partial(figures.curves, label=label, across=across, **goal),
        command=f'make race ARGS="--problems {problem.name}"',
        **fields,
    )


def reconstructing(problem: Problem, rate: float, steps: int, level: float, **often: Any) -> study.Study:
    """Ours beside Adam at its best constant rate by `make autoencoder`, to a loss."""
    options: dict[str, Any] = {**ADAPTIVE, "split": "even", **often}
    entries = {
        ADAM: Entry(adam, ({"rate": rate, "falls": 0},), None, steps, look=10),
        "K-FAC": ours(ng.kfac, **options),
        "K-FAC, all products": study.natural(ng.kfac, **options),
        "K-FAC, nothing said": study.natural(ng.kfac),
    }
    return to_level(
        *(problem, level, "nats", partial(problem.case, 5000), "training loss, nats an image", "log"),
        entries=entries,
        limits=Limits(steps, 2, level=level),
        config={"batch": problem.batch, "level": level, "product_stride": CONFIG["product_stride"], **often},
        seeds=range(3),
    )


def classifying(problem: Problem, level: float | None, epochs: int, **fields: Any) -> study.Study:
    """Some entries beside Adam for so many epochs, to a test error."""
    return to_level(
        *(problem, level, "% wrong", problem.case_of_errors, "test error, %", "linear"),
        limits=Limits(epochs * problem.epoch, problem.epoch // 4, level=level or 0.0),
        config={"batch": problem.batch, "level": level},
        **fields,
    )


MNIST = reconstructing(problems.MNIST, 2.01e-3, 600, 89.4)
"""To where Adam ends after ten epochs."""
CURVES = reconstructing(problems.CURVES, 8.23e-3, 300, PLATEAU, statistics_every=2, refresh_every=2, decay=0.7)
"""Off the plateau. With statistics every 5 steps it takes 22 steps and not 18, in the median of six seeds."""
FASHION = classifying(
    *(problems.convnet(16), 8.0, 3),
    entries={
        ADAM: Entry(adam, study.grid(rate=(5e-3,), falls=(1,)), None),
        "K-FAC, nothing said, averaged": Entry(lambda _, layers: ng.averaged(ng.kfac(layers=layers))),
        "SOAP as published, averaged": Entry(lambda _, layers: ng.averaged(ng.soap(PUBLISHED, layers))),
    },
    seeds=range(3),
)
"""To 92 % right."""
CIFAR10 = classifying(
    *(problems.CIFAR10, None, 1),
    entries={
        ADAM: Entry(adam, study.grid(rate=(1e-3, 3e-3, 1e-2), falls=(1,)), None),
        "K-FAC, nothing said": study.natural(ng.kfac),
        "SOAP as published": Entry(lambda _, layers: ng.soap(PUBLISHED, layers)),
    },
    trial=Limits(60, 60),
)
"""Without an average, whose batch norm would need moments of its own."""

if __name__ == "__main__":
    study.main(STUDY, MNIST, CURVES, FASHION, CIFAR10, problems=("autoencoder",))
