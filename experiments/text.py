"""Do natural gradients help a small transformer on text, if all have the same number of trials?

Shakespeare letter by letter; two layers of attention and dense layers. The loss is that of a letter the training does
not see, in nats; trained is the mean over the letters of a passage, so that damping and clip are of a letter. (With the
sum and the same settings EKFAC and TNT blow up: the damping is then 64 times too small.) Trials are short runs at the
usual setting and at others within a range; the best then trains for longer. Rates fall like a cosine.

    make text                                    (NATGRAD_DATA names a folder with tinyshakespeare/input.txt)
    make text ARGS="--methods Adam K-FAC"
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np

import natgrad_jax as ng
from experiments import figures, study
from experiments.data import Part, folder, shakespeare
from experiments.methods import Range
from experiments.nets import Transformer
from experiments.running import Task

LIKELIHOOD = ng.losses.softmax_cross_entropy.reduced("mean")
SHARED: dict[str, Any] = {"statistics_every": 5, "refresh_every": 20, "kl_clip": 0.01}
OF_ADAM, OF_SOAP = Range((3e-3, 0.0), (5e-4, 2e-2)), Range((3e-3, 1e-16), (5e-4, 2e-2))
NATURAL = Range((0.1, 0.1), (0.02, 0.5), (0.03, 1.0))
EVERY, BUDGET = 25, 3
"""Steps from one measured loss to the next, and trials beside the usual setting."""
SIZES = {"batch": 16, "context": 64, "width": 64}
"""Passages in a step, letters of a passage, width of the net; its dense layers have four times as many units."""


def passages(letters: np.ndarray, seed: int, batch: int, context: int) -> Iterator[Part]:
    """Batches of passages from anywhere, for ever: letters [N, T], and the ones that follow."""
    random = np.random.default_rng(seed)

    def drawn() -> Part:
        starts = random.integers(len(letters) - context, size=(batch, 1))
        found = letters[starts + np.arange(context + 1)]
        return Part(found[:, :-1], found[:, 1:])

    return (drawn() for _ in count())


def case(batch: int, context: int, width: int) -> study.Case:
    """The transformer on the text, whose last tenth is for measuring."""
    letters, found = np.unique(np.frombuffer(shakespeare(folder()), np.uint8), return_inverse=True)
    train, test = np.split(found.astype(np.int32), [len(found) * 9 // 10])
    stream, measured = partial(passages, batch=batch, context=context), passages(test, 1, batch, context)
    held = [next(measured) for _ in range(16)]
    task = Task(Transformer(2, width, 4, len(letters)), LIKELIHOOD, next(stream(train, 0)))
    return study.Case({"problem": "text"}, task, lambda seed: stream(train, seed + 2), task.measured(*held))


STUDY = study.Study(
    "text",
    "A transformer on letters",
    {"text": partial(case, **SIZES)},
    {
        "Adam": study.adam(OF_ADAM.tried("Adam", BUDGET)),
        "SOAP": study.natural(ng.soap, OF_SOAP.tried("SOAP", BUDGET), statistics="gradient", momentum=0.95),
        "K-FAC": study.natural(ng.kfac, NATURAL.tried("K-FAC", BUDGET), **SHARED),
        "EKFAC": study.natural(ng.ekfac, NATURAL.tried("EKFAC", BUDGET), **SHARED),
        "TNT": study.natural(ng.tnt, NATURAL.tried("TNT", BUDGET), **SHARED),
        "K-FAC, nothing said": study.natural(ng.kfac),
    },
    study.Limits(500, EVERY),
    partial(figures.outcome, title="Loss of letters not trained on, in nats", rivals=("Adam",)),
    partial(figures.curves, label="loss of letters not trained on, nats", across="linear", up="linear"),
    {"budget": BUDGET, "every": EVERY, "seed": 0} | SIZES,
    trial=study.Limits(100, EVERY),
)

if __name__ == "__main__":
    study.main(STUDY)
