"""The problems of the long experiments: data, a net, a loss, and how well the net does.

fashion     Fashion-MNIST, and the convnet of TENGraD
cifar10     CIFAR-10, and a ResNet-20: batch norm, random crops, mirrored images

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
from experiments import data
from experiments.data import Data, Part, Rows, batches, digits, folder, shifted_and_flipped
from experiments.nets import ResNet, ThreeConvolutions, autoencoder
from experiments.records import finite
from experiments.running import Task

Kind = Literal["autoencoder", "classifier"]
Name = Literal["mnist", "curves", "faces", "fashion", "cifar10"]
Load = Callable[[Path | None], Any]


class Problem(NamedTuple):
    """Data and a net.

    Attributes:
        kind: whether it reconstructs rows of pixels, its labels, or finds classes of images.
        load: folder -> data, or rows.
        net: inputs -> outputs.
        likelihood: of the outputs; the loss of an autoencoder is a sum over pixels.
        batch: examples in a step.
        title: of the net, for people.
        stem: of the names of pictures.
        fields: of a record, that tell the net. No two problems have the same; that of Fashion-MNIST has no "problem".
        crops: whether it is trained on random crops and mirrored images.
    """

    kind: Kind
    load: Load
    net: nn.Module
    likelihood: ng.losses.Likelihood
    batch: int
    title: str
    stem: str
    fields: Mapping[str, Any]
    crops: bool = False

    def data(self, given: Path | None) -> Data:
        """The data, or the digits if they cannot be downloaded; of an autoencoder the images are the labels."""
        try:
            found = self.load(given)
        except ConnectionError as error:
            say(f"[bold]{error}[/bold] Going on with the digits in their place, as the records will say.")
            found = digits(*{"faces": (25,), "cifar10": (32, 3)}.get(self.fields.get("problem", ""), (28,)))
        if self.kind == "classifier":
            return found
        rows: Rows = found.rows() if isinstance(found, Data) else found
        return Data(rows.name, *(Part(part, part) for part in (rows.train, rows.test)))

    def stream(self, part: Part, seed: int, epoch: int) -> Iterable[Part]:
        """The batches of an epoch, counted from 0, in an order of its own."""
        found = batches(part, self.batch, seed, epoch)
        return shifted_and_flipped(found, seed, epoch) if self.crops else found

    def task(self, data: Data, seed: int = 0) -> Task:
        """What is trained."""
        return Task(self.net, self.likelihood, data.train.first(self.batch), seed, {"train": True})

    def key(self, data: Data) -> dict[str, Any]:
        """What tells its records from those of other problems and data."""
        return {"data": data.name, **self.fields, "batch": self.batch}

    def measured(self, variables: Mapping[str, Any], data: Data, size: int = 2000) -> dict[str, Any]:
        """Losses for a record, in nats an image, and of a classifier the shares of the images that it has right."""
        found: dict[str, Any] = {}
        for name, part in (("train", data.train), ("test", data.test)):
            loss, right = 0.0, 0.0
            for first in range(0, len(part.labels), size):
                x, y = (array[first : first + size] for array in part)
                sums = _sums(variables, x, y, self.net, self.likelihood)
                loss, right = loss + float(sums[0]), right + float(sums[1])
            found[f"{name}_loss"] = finite(loss / len(part.labels), 4 if self.kind == "autoencoder" else 5)
            if self.kind == "classifier":
                found[f"{name}_accuracy"] = round(right / len(part.labels), 5)
        return found


@partial(jax.jit, static_argnames=("net", "likelihood"))
def _sums(variables, x, y, net, likelihood):
    outputs = net.apply(variables, x)
    right = jnp.sum(jnp.argmax(outputs, axis=-1) == y) if y.ndim == 1 else 0
    return likelihood(outputs, y) * len(y), right


RECONSTRUCTED: Mapping[str, tuple[Load, tuple[int, ...], int]] = {
    "mnist": (data.mnist, (1000, 500, 250, 30), 784),
    "curves": (lambda given: data.curves(), (400, 200, 100, 50, 25, 6), 784),
    "faces": (data.faces, (2000, 1000, 500, 30), 625),
}
"""{name: images, widths of the encoder, pixels}."""


def problem(name: str, channels: int = 16) -> Problem:
    """A problem by its name; the first convolutions of a classifier have so many channels."""
    if name in RECONSTRUCTED:
        images, widths, pixels = RECONSTRUCTED[name]
        title = f"The autoencoder {pixels}-{'-'.join(map(str, widths))}-..."
        likelihood = ng.losses.squared_error if name == "faces" else ng.losses.sigmoid_binary_cross_entropy
        fields = {"problem": name, "widths": [*widths]}
        return Problem("autoencoder", images, autoencoder(widths), likelihood, 1000, title, name, fields)
    net, crops = ResNet(20, channels), name == "cifar10"
    fields, stem = {"problem": name, "width": channels, "depth": 20}, f"resnet20_{channels}"
    load, title = data.cifar10, f"ResNet-20, {channels} channels"
    if name == "fashion":
        units = 500 if channels == 128 else 128
        net, load, title = ThreeConvolutions(channels, units), data.fashion_mnist, f"3C1F, {channels} channels"
        fields, stem = {"channels": channels, "units": units}, f"{channels}"
    return Problem("classifier", load, net, ng.losses.softmax_cross_entropy, 128, title, stem, fields, crops)


@dataclass(frozen=True)
class Choice:
    """A problem, and where its records are.

    Attributes:
        output: folder of the records, of the states from which runs go on, and of the pictures.
        only: names of the runs; all if empty.
        problem: an autoencoder on "mnist", "curves" or "faces", or a classifier of "fashion" or "cifar10".
        channels: of a classifier's first convolutions; 128 in TENGraD's paper.
        data: a folder with the files as they were published; without it they are downloaded.
    """

    output: Path = Path("results")
    only: tuple[str, ...] = ()
    problem: Name = "mnist"
    channels: int = 16
    data: Path | None = field(default_factory=folder)

    @property
    def what(self) -> Problem:
        """The problem."""
        return problem(self.problem, self.channels)

    @property
    def option(self) -> str:
        """What a command says of it."""
        size = f" --channels {self.channels}" if self.what.kind == "classifier" else ""
        return "" if self.problem == "mnist" else f"--problem {self.problem}{size}"
