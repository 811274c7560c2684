"""The problems of the experiments: data, a net, a loss, and how well the net does.

fashion, cifar10    the convnet of TENGraD; a ResNet-20, with random crops and mirrored images
mnist, curves       the autoencoders of Hinton and Salakhutdinov with ReLU, as Goldfarb's group has them; binary
                    cross-entropy summed over pixels
faces               the same, with half the squared error, summed over pixels
digits              any net on the 1,797 digits of scikit-learn, for short studies
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich import print as say
from scipy.special import entr

import natgrad_jax as ng
from experiments import data
from experiments.courses import Case, Entry
from experiments.data import Data, Part, digits, endless, folder
from experiments.methods import METHODS, Kind, Method
from experiments.nets import Convnet, ResNet, autoencoder
from experiments.running import Numbers, Task

CLASSES, PIXELS = ng.losses.softmax_cross_entropy, ng.losses.sigmoid_binary_cross_entropy


class Problem(NamedTuple):
    """Data and a net: a classifier of images, or an autoencoder of rows of pixels, over which its loss is a sum.

    Attributes:
        load: folder -> data.
        epoch: steps that see all images.
        title: of the net, for people.
        instead: size and channels of the digits that stand in if the data cannot be downloaded.
        crops: whether it is trained on random crops and mirrored images.
    """

    name: str
    kind: Kind
    load: Callable[[Path | None], Data]
    epoch: int
    net: nn.Module
    likelihood: ng.losses.Likelihood
    batch: int
    title: str
    instead: tuple[int, ...] = (28,)
    crops: bool = False

    def data(self, given: Path | None) -> Data:
        """The data, or the digits if they cannot be downloaded; of an autoencoder the images are the labels."""
        try:
            found = self.load(given)
        except ConnectionError as error:
            say(f"[bold]{error}[/bold] Going on with the digits in their place, as the records will say.")
            found = digits(*self.instead)
        if self.kind == "classifier":
            return found
        return Data(found.name, found.train.mirrored(), found.test.mirrored())

    def case(self, looked_at: int | None = None) -> Case:
        """What is trained on what; the loss is that of all images, or for frequent looks of some to train on."""
        found = self.data(folder())
        if looked_at is None:
            return self._on(found, partial(self.measured, data=found))
        stride = max(1, len(found.train.labels) // looked_at)
        few = Part(*(array[::stride] for array in found.train))
        return self._on(found, self._task(found).measured(few))

    def case_of_errors(self) -> Case:
        """The same of a classifier, where the loss that is looked at is its test error in %."""
        found = self.data(folder())
        return self._on(found, lambda variables: 100 * (1 - self.means(variables, found.test)[1]))

    def _task(self, found: Data) -> Task:
        return Task(self.net, self.likelihood, found.train.first(self.batch), {"train": True})

    def _on(self, found: Data, loss: Callable[[Any], Any]) -> Case:
        fields = {"problem": self.name, "data": found.name}
        return Case(fields, self._task(found), partial(endless, found.train, self.batch, moved=self.crops), loss)

    def measured(self, variables: Mapping[str, Any], data: Data) -> dict[str, float]:
        """Losses in nats an image, and of a classifier the shares of the images that it has right."""
        found: dict[str, float] = {}
        for loss, share, part in (("losses", "train_accuracy", data.train), ("test_loss", "test_accuracy", data.test)):
            found[loss], right = self.means(variables, part)
            found |= {share: right} if self.kind == "classifier" else {}
        return found

    def means(self, variables: Mapping[str, Any], part: Part, size: int = 2000) -> np.ndarray:
        """The loss of some images, and the share of them that is right."""
        pieces = [[array[first : first + size] for array in part] for first in range(0, len(part.labels), size)]
        return np.sum([_sums(variables, *piece, self.net, self.likelihood) for piece in pieces], 0) / len(part.labels)


@partial(jax.jit, static_argnames=("net", "likelihood"))
def _sums(variables, x, y, net, likelihood):
    outputs = net.apply(variables, x)
    right = jnp.sum(jnp.argmax(outputs, axis=-1) == y) if y.ndim == 1 else 0
    return likelihood(outputs, y) * len(y), right


def reconstruction(name: str, load: Callable[[Path | None], Data], images: int, *widths: int) -> Problem:
    """An autoencoder of rows of pixels, by the widths of its encoder."""
    pixels, *hidden = widths
    title = f"The autoencoder {'-'.join(map(str, widths))}-..."
    likelihood = ng.losses.squared_error if name == "faces" else PIXELS
    net, size = autoencoder(tuple(hidden)), int(pixels**0.5)
    return Problem(name, "autoencoder", load, images // 1000, net, likelihood, 1000, title, (size,))


def convnet(channels: int) -> Problem:
    """The convnet of TENGraD, with as many channels; 128 in the paper."""
    net = Convnet((channels,) * 3, (1, 1, 1), (500 if channels == 128 else 128,), window=3, uniform=True)
    title = f"3C1F, {channels} channels"
    return Problem("fashion", "classifier", data.fashion_mnist, 60_000 // 128, net, CLASSES, 128, title)


MNIST = reconstruction("mnist", data.mnist, 60_000, 784, 1000, 500, 250, 30)
CURVES = reconstruction("curves", lambda given: data.curves(), 20_000, 784, 400, 200, 100, 50, 25, 6)
FACES = reconstruction("faces", data.faces, 10_000, 625, 2000, 1000, 500, 30)
CIFAR10 = Problem(
    *("cifar10", "classifier", data.cifar10, 50_000 // 128, ResNet(20, 16), CLASSES, 128, "ResNet-20, 16 channels"),
    instead=(32, 3),
    crops=True,
)


def all_digits(size: int = 8) -> Part:
    """Images and labels, those for testing among them."""
    found = digits(size)
    return Part(*map(np.concatenate, zip(found.train, found.test, strict=True)))


def entropy(rows: np.ndarray) -> float:
    """Mean entropy of an image in nats: the least binary cross-entropy that any reconstruction of grey pixels has."""
    return float(np.mean(np.sum(entr(rows) + entr(1 - rows), axis=-1)))


def on_digits(net: nn.Module, fields: Mapping[str, Any], batch: int, size: int = 8) -> Case:
    """A net on the digits: a classifier, or an "autoencoder", whose loss is that above the entropy of its pixels."""
    is_classifier = fields["problem"] != "autoencoder"
    whole = all_digits(size) if is_classifier else all_digits(size).mirrored()
    batch = min(batch, len(whole.labels))
    task = Task(net, CLASSES if is_classifier else PIXELS, whole.first(batch))
    floor, loss = 0.0 if is_classifier else entropy(whole.images), task.measured(jax.device_put(whole))
    return Case(fields, task, partial(endless, whole, batch), lambda variables: loss(variables) - floor)


def entry(method: Method, problem: Problem, tried: tuple[Numbers, ...]) -> Entry:
    """A method on a problem."""
    is_warm = method.warm and problem.kind == "autoencoder"
    return Entry(method.make(problem.kind), tried, method.labels, warm=problem.epoch * is_warm)


def entries(problem: Problem, budget: int) -> dict[str, Entry]:
    """Every method on a problem, at its usual numbers and at so many others."""
    return {name: entry(own, problem, own.ranges[problem.kind].tried(name, budget)) for name, own in METHODS.items()}
