"""The problems of the long experiments: data, a net, a loss, and how well the net does.

fashion     Fashion-MNIST, and the convnet of TENGraD
cifar10     CIFAR-10, and a ResNet: batch norm, random crops, mirrored images
digits      the digits of scikit-learn, and a small convnet: nothing to fetch, seconds an epoch

mnist       the autoencoders of Hinton and Salakhutdinov with ReLU, as Goldfarb's group has them: 784-1000-500-250-30
            on MNIST, mirrored; binary cross-entropy summed over pixels
curves      784-400-200-100-50-25-6 on curves like those of CURVES; the same loss
faces       625-2000-1000-500-30 on faces like those of FACES; half the squared error, summed over pixels
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich import print as say

import natgrad_jax as ng
from experiments.data import (
    Data,
    Part,
    Rows,
    batches,
    cifar10,
    curves,
    digits,
    faces,
    fashion_mnist,
    folder,
    mnist,
    shifted_and_flipped,
)
from experiments.nets import Convnet, ResNet, ThreeConvolutions, autoencoder
from experiments.records import finite
from experiments.running import Task

Kind = Literal["autoencoder", "classifier"]
Name = Literal["mnist", "curves", "faces", "fashion", "cifar10", "digits"]
Load = Callable[[Path | None], Any]


class Problem(NamedTuple):
    """Data and a net.

    Attributes:
        kind: whether it reconstructs rows of pixels, its labels, or tells classes of images.
        load: folder -> data, or rows.
        net: inputs -> outputs.
        likelihood: of the outputs; the loss of an autoencoder is a sum over pixels.
        title: of the net, for people.
        stem: of the names of pictures.
        fields: of a record, that tell the net. No two problems have the same; that of Fashion-MNIST has no "problem".
        crops: whether it is trained on random crops and mirrored images.
    """

    kind: Kind
    load: Load
    net: nn.Module
    likelihood: ng.losses.Likelihood
    title: str
    stem: str
    fields: Mapping[str, Any]
    crops: bool = False

    def data(self, given: Path | None) -> Data:
        """The data; of an autoencoder the images are the labels."""
        found = self.load(given)
        if self.kind == "classifier":
            return found
        rows: Rows = found.rows() if isinstance(found, Data) else found
        return Data(rows.name, *(Part(part, part) for part in (rows.train, rows.test)))

    def stream(self, part: Part, size: int, seed: int, epoch: int) -> Iterable[Part]:
        """The batches of an epoch, counted from 0, in an order of its own."""
        found = batches(part, size, seed, epoch)
        return shifted_and_flipped(found, seed, epoch) if self.crops else found

    def task(self, data: Data, batch: int, seed: int = 0) -> Task:
        """What is trained, by batches of a size."""
        return Task(self.net, self.likelihood, data.train.first(batch), seed, {"train": True})

    def measured(self, variables: Mapping[str, Any], data: Data, size: int = 2000) -> dict[str, Any]:
        """Losses for a record, in nats an image, and of a classifier the shares of the images that are told right."""
        found: dict[str, Any] = {}
        for name, part in (("train", data.train), ("test", data.test)):
            loss, right = 0.0, 0.0
            for first in range(0, len(part.labels), size):
                x, y = (array[first : first + size] for array in part)
                sums = _sums(variables, x, y, self.net, self.likelihood)
                loss, right = loss + float(sums[0]), right + float(sums[1])
            if self.kind == "autoencoder":
                found[f"{name}_loss"] = finite(loss / len(part.labels), 4)
            else:
                found[f"{name}_loss"] = finite(loss / len(part.labels), 5)
                found[f"{name}_accuracy"] = round(right / len(part.labels), 5)
        return found


@partial(jax.jit, static_argnames=("net", "likelihood"))
def _sums(variables, x, y, net, likelihood):
    outputs = net.apply(variables, x)
    right = jnp.sum(jnp.argmax(outputs, axis=-1) == y) if y.ndim == 1 else 0
    return likelihood(outputs, y) * len(y), right


def or_digits(load: Load, size: int, channels: int = 1) -> Load:
    """What loads data, or the digits if they cannot be downloaded; a folder without a file remains an error."""

    def loaded(given: Path | None) -> Any:
        try:
            return load(given)
        except ConnectionError as error:
            say(f"[bold]{error}[/bold] Going on with the digits in their place, as the records will say.")
            return digits(size, channels)

    return loaded


RECONSTRUCTED: Mapping[str, tuple[Load, tuple[int, ...], int]] = {
    "mnist": (or_digits(mnist, 28), (1000, 500, 250, 30), 784),
    "curves": (lambda given: curves(), (400, 200, 100, 50, 25, 6), 784),
    "faces": (or_digits(faces, 25), (2000, 1000, 500, 30), 625),
}
"""{name: images, widths of the encoder, pixels}."""


def reconstruction(name: str, smoke: bool = False) -> Problem:
    """An autoencoder by the name of its data; for a smoke test a tiny one on enlarged digits, with its loss."""
    images, widths, pixels = RECONSTRUCTED[name]
    if smoke:
        images, widths, pixels = (lambda given: digits(28)), (6, 3), 784
    title = f"The autoencoder {pixels}-{'-'.join(map(str, widths))}-..."
    likelihood = ng.losses.squared_error if name == "faces" else ng.losses.sigmoid_binary_cross_entropy
    fields = {"problem": name, "widths": list(widths)}
    return Problem("autoencoder", images, autoencoder(widths), likelihood, title, name, fields)


def classification(name: str, channels: int, units: int | None = None, depth: int = 20, smoke: bool = False) -> Problem:
    """A problem of classification, by the options of `Choice`; in a smoke test its images are the digits, enlarged."""
    fields: dict[str, Any] = {"problem": name, "width": channels}
    if name == "fashion":
        units = units or (500 if channels == 128 else 128)
        net, load, size = ThreeConvolutions(channels, units), or_digits(fashion_mnist, 28), (28, 1)
        title, stem = f"3C1F, {channels} channels", f"{channels}"
        fields = {"channels": channels, "units": units}
    elif name == "digits":
        net, load, size = Convnet((channels, 2 * channels), (1, 2), uniform=True), lambda given: digits(), (8, 1)
        title, stem = f"A small convnet, {channels} channels", f"digits_{channels}"
    else:
        net, load, size = ResNet(depth, channels), or_digits(cifar10, 32, 3), (32, 3)
        title, stem = f"ResNet-{depth}, {channels} channels", f"resnet{depth}_{channels}"
        fields |= {"depth": depth}
    load = (lambda given: digits(*size)) if smoke else load
    likelihood = ng.losses.softmax_cross_entropy
    return Problem("classifier", load, net, likelihood, title, stem, fields, crops=name == "cifar10")


@dataclass(frozen=True)
class Choice:
    """A problem, and where its records are.

    Attributes:
        output: folder of the records, of the states from which runs go on, and of the pictures.
        only: names of the runs; all if empty.
        problem: an autoencoder on "mnist", "curves" or "faces", or a classifier of "fashion", "cifar10" or "digits".
        batch: examples in a step; by default 1000 on an autoencoder, 128 on a classifier.
        channels: of a classifier's convolutions, of the first ones if there are more later; 128 in TENGraD's paper.
        units: of its hidden dense layer on Fashion-MNIST; None for 500 at 128 channels, and 128 at fewer.
        depth: of the ResNet on CIFAR-10.
        smoke: a tiny net on the digits, to see that everything runs.
        data: a folder with the files as they were published; without it they are downloaded.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    problem: Name = "mnist"
    batch: int | None = None
    channels: int = 16
    units: int | None = None
    depth: int = 20
    smoke: bool = False
    data: Path | None = field(default_factory=folder)

    @property
    def what(self) -> Problem:
        """The problem."""
        if self.problem in RECONSTRUCTED:
            return reconstruction(self.problem, self.smoke)
        return classification(self.problem, self.channels, self.units, self.depth, self.smoke)

    @property
    def size(self) -> int:
        """Examples in a step."""
        return self.batch or (1000 if self.what.kind == "autoencoder" else 128)

    def loaded(self) -> Data:
        """The data."""
        return self.what.data(None if self.smoke else self.data)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Those of some names that are wanted, in order; a `ValueError` if one is wanted that is not there."""
        names = list(names)
        if unknown := set(self.only) - set(names):
            raise ValueError(f"There is no {sorted(unknown)}; there are {names}.")
        return [name for name in names if not self.only or name in self.only]
