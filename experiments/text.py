"""Do natural gradients help a small transformer on text, if all have the same number of trials?

The works of Shakespeare in one megabyte, letter by letter; two layers of attention and dense layers, normalised in
front, the table of letters not tied to the head. The loss is that of a letter the training does not see, in nats;
trained is the mean over the letters of a passage, so that damping and clip are of a letter. (With the sum and the same
settings EKFAC and TNT blow up: the damping is then 64 times too small.) Every method has as many trials, short runs
from the same start on the same batches: its usual setting and others drawn within a range. The one with the least loss
at its end then trains for longer. Rates fall like a cosine. Statistics are of every fifth step, refreshes of every
twentieth. Beside them K-FAC with nothing said.

    make text                                    (NATGRAD_DATA names a folder with tinyshakespeare/input.txt)
    make text ARGS="--methods Adam K-FAC"
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import natgrad_jax as ng
from experiments import figures, study
from experiments.data import Part, folder, shakespeare
from experiments.methods import Range, tuned
from experiments.nets import Transformer
from experiments.running import Labels, Task
from experiments.study import Entry, Limits, Numbers

LIKELIHOOD = ng.losses.softmax_cross_entropy.reduced("mean")
SHARED: dict[str, Any] = {"statistics_every": 5, "refresh_every": 20, "kl_clip": 0.01}
NATURAL = tuned((0.1, 0.1), (0.02, 0.5), (0.03, 1.0))
EVERY, BUDGET = 25, 3
"""Steps from one measured loss to the next, and trials beside the usual setting."""
SIZES = {"batch": 16, "context": 64, "width": 64}
"""Passages in a step, letters of a passage, width of the net; its dense layers have four times as many units."""


def passages(letters: np.ndarray, seed: int, batch: int, context: int) -> Iterator[Part]:
    """Batches of passages from anywhere, for ever, each with the letters that follow.

    Args:
        letters: of a text.
        seed: of the places.
        batch: passages.
        context: letters of a passage.

    Yields:
        Letters [N, T] and the next ones.
    """
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(len(letters) - context, size=(batch, 1))
        found = letters[starts + np.arange(context + 1)]
        yield Part(found[:, :-1], found[:, 1:])


def case(batch: int, context: int, width: int) -> study.Case:
    """The transformer on the text, whose last tenth is for measuring."""
    letters, found = np.unique(np.frombuffer(shakespeare(folder()), np.uint8), return_inverse=True)
    train, test = np.split(found.astype(np.int32), [len(found) * 9 // 10])
    stream, measured = partial(passages, batch=batch, context=context), passages(test, 1, batch, context)
    held = [next(measured) for _ in range(16)]
    task = Task(Transformer(2, width, 4, len(letters)), LIKELIHOOD, next(stream(train, 0)))
    of_batch = jax.jit(task.loss)

    def loss(variables: Any) -> float:
        return float(np.mean([of_batch(variables, *part) for part in held]))

    return study.Case({"problem": "text"}, task, lambda seed: stream(train, seed + 2), loss)


def entry(name: str, make: Callable[[Any, Any, Any], Any], within: Range, labels: Labels | None = "sampled") -> Entry:
    """A method, made of rate, damping and layers, at its usual setting and at others within a range."""

    def made(numbers: Numbers, layers: Any) -> Any:
        return make(study.cosine(numbers["rate"], numbers["horizon"]), numbers["damping"], layers)

    return Entry(made, within.tried(name, BUDGET), labels)


def ours(name: str, method: Callable[..., Any]) -> Entry:
    """A method of the family of K-FAC."""
    return entry(name, lambda rate, damping, layers: method(rate, layers, damping=damping, **SHARED), NATURAL)


def soap(rate: Any, damping: Any, layers: Any) -> Any:
    """SOAP as its authors have it."""
    return ng.soap(rate, layers, statistics="gradient", momentum=0.95, damping=damping)


STUDY = study.Study(
    "text",
    "A transformer on letters",
    {"text": partial(case, **SIZES)},
    {
        "Adam": entry("Adam", lambda rate, damping, layers: optax.adam(rate), tuned((3e-3,), (5e-4, 2e-2)), None),
        "SOAP": entry("SOAP", soap, tuned((3e-3, 1e-16), (5e-4, 2e-2))),
        "K-FAC": ours("K-FAC", ng.kfac),
        "EKFAC": ours("EKFAC", ng.ekfac),
        "TNT": ours("TNT", ng.tnt),
        "K-FAC, nothing said": Entry(lambda numbers, layers: ng.kfac(layers=layers)),
    },
    Limits(500, EVERY),
    partial(figures.outcome, title="Loss of letters not trained on, in nats", rivals=("Adam",)),
    partial(figures.curves, label="loss of letters not trained on, nats", across="linear", up="linear"),
    {"budget": BUDGET, "every": EVERY, "seed": 0} | SIZES,
    trial=Limits(100, EVERY),
)

if __name__ == "__main__":
    study.main(STUDY)
