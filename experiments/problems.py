"""The problems of classification and of reconstruction: data, a net, a loss, and how well the net does.

fashion     Fashion-MNIST, and the convnet of TENGraD
cifar10     CIFAR-10, and a ResNet: batch norm, random crops, mirrored images
digits      the digits of scikit-learn, and a small convnet: nothing to fetch, seconds an epoch

mnist       the autoencoders of Hinton and Salakhutdinov with ReLU, as Goldfarb's group has them: 784-1000-500-250-30
            on MNIST, mirrored; binary cross-entropy summed over pixels
curves      784-400-200-100-50-25-6 on curves like those of CURVES; the same loss
faces       625-2000-1000-500-30 on faces like those of FACES; half the squared error, summed over pixels
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich import print as say

import natgrad_jax as ng
from experiments.data import Data, Part, Rows, cifar10, curves, digits, faces, fashion_mnist, mnist
from experiments.nets import Autoencoder, ResNet, SmallConvnet, ThreeConvolutions
from experiments.records import finite
from experiments.training import batches, shifted_and_flipped

LIKELIHOOD = ng.losses.softmax_cross_entropy
Name = Literal["fashion", "cifar10", "digits"]
Reconstructed = Literal["mnist", "curves", "faces"]


class Problem(NamedTuple):
    """A data set and its net.

    Attributes:
        load: folder -> data.
        size: of an image: pixels of a side, channels.
        net: images [N, H, W, C] -> logits [N, 10].
        title: of the net, for people.
        stem: of the names of pictures.
        fields: of a record, that tell the net. No two problems have the same; that of Fashion-MNIST has no "problem".
        crops: whether it is trained on random crops and mirrored images.
        likelihood: of the outputs.
    """

    load: Callable[[Path | None], Data]
    size: tuple[int, int]
    net: nn.Module
    title: str
    stem: str
    fields: Mapping[str, Any]
    crops: bool = False
    likelihood: ng.losses.Likelihood = LIKELIHOOD

    def enlarged_digits(self) -> Data:
        """The digits of scikit-learn in the size of the images, to see that everything runs."""
        return digits(*self.size)

    def stream(self, part: Part, size: int, seed: int, epoch: int) -> Iterable[Part]:
        """The batches of an epoch, counted from 0, in an order of its own."""
        found = batches(part, size, seed, epoch)
        return shifted_and_flipped(found, seed, epoch) if self.crops else found

    def score(self, variables: Mapping[str, Any], part: Part, size: int = 2000) -> "Score":
        """The score of all images."""
        sums = np.zeros(2)
        for first in range(0, len(part.labels), size):
            sums += np.array(_sums(variables, *(array[first : first + size] for array in part), self.net))
        loss, right = sums / len(part.labels)
        return Score(float(loss), float(right))

    def measured(self, variables: Mapping[str, Any], data: Data) -> dict[str, Any]:
        """Losses and accuracies for a record."""
        train, test = self.score(variables, data.train), self.score(variables, data.test)
        return {
            "train_loss": finite(train.loss, 5),
            "train_accuracy": round(train.accuracy, 5),
            "test_loss": finite(test.loss, 5),
            "test_accuracy": round(test.accuracy, 5),
        }


class Reconstruction(NamedTuple):
    """An autoencoder and its data, whose labels are the images themselves: rows of pixels.

    Attributes:
        images: folder -> images, or rows of their pixels.
        net: rows [N, D] -> outputs [N, D].
        likelihood: of the outputs; the loss is the sum over pixels.
        title: of the net, for people.
        fields: of a record, that tell the net.
    """

    images: Callable[[Path | None], Data | Rows]
    net: nn.Module
    likelihood: ng.losses.Likelihood
    title: str
    fields: Mapping[str, Any]

    def load(self, folder: Path | None) -> Data:
        """The data."""
        found = self.images(folder)
        found = found.rows() if isinstance(found, Data) else found
        return Data(found.name, *(Part(part, part) for part in (found.train, found.test)))

    def stream(self, part: Part, size: int, seed: int, epoch: int) -> Iterable[Part]:
        """The batches of an epoch, counted from 0, in an order of its own."""
        return (Part(rows, rows) for rows in batches(part.images, size, seed, epoch))

    def measured(self, variables: Mapping[str, Any], data: Data, size: int = 2500) -> dict[str, Any]:
        """Losses for a record, in nats an image."""
        found = {}
        for name, part in (("train_loss", data.train.images), ("test_loss", data.test.images)):
            pieces = [part[first : first + size] for first in range(0, len(part), size)]
            losses = (len(piece) * float(_loss(variables, piece, self.net, self.likelihood)) for piece in pieces)
            found[name] = finite(sum(losses) / len(part), 4)
        return found


def or_digits(load: Callable[[Path | None], Any], size: int, channels: int = 1) -> Callable[[Path | None], Any]:
    """How data are loaded, if need be without them: what cannot be downloaded is replaced by the digits, which say so.

    Args:
        load: folder -> data, or rows.
        size: pixels of a side of its images.
        channels: of these.

    Returns:
        Folder -> data. A folder that lacks a file, or has another, remains an error.
    """

    def loaded(folder: Path | None) -> Any:
        try:
            return load(folder)
        except ConnectionError as error:
            say(f"[bold]{error}[/bold] Going on with the digits in their place, as the records will say.")
            return digits(size, channels)

    return loaded


class Score(NamedTuple):
    """Mean loss in nats an image, and the share of the images that are told right."""

    loss: float
    accuracy: float


@partial(jax.jit, static_argnames="model")
def _sums(variables, x, y, model):
    logits = model.apply(variables, x)
    return LIKELIHOOD(logits, y) * len(y), jnp.sum(jnp.argmax(logits, axis=-1) == y)


@partial(jax.jit, static_argnames=("model", "likelihood"))
def _loss(variables, x, model, likelihood):
    return likelihood(model.apply(variables, x), x)


def reconstruction(name: Reconstructed, smoke: bool = False) -> Reconstruction:
    """An autoencoder by the name of its data; for a smoke test a tiny one on enlarged digits, with its loss."""
    images, widths, gaussian = {
        "mnist": (or_digits(mnist, 28), (1000, 500, 250, 30), False),
        "curves": (lambda folder: curves(), (400, 200, 100, 50, 25, 6), False),
        "faces": (or_digits(faces, 25), (2000, 1000, 500, 30), True),
    }[name]
    if smoke:
        images, widths = (lambda folder: digits(28)), (6, 3)
    pixels = 625 if name == "faces" and not smoke else 784
    title = f"The autoencoder {pixels}-{'-'.join(map(str, widths))}-..."
    likelihood = ng.losses.squared_error if gaussian else ng.losses.sigmoid_binary_cross_entropy
    return Reconstruction(images, Autoencoder(widths), likelihood, title, {"problem": name, "widths": list(widths)})


def problem(name: Name, channels: int, units: int | None = None, depth: int = 20) -> Problem:
    """A problem by its name.

    Args:
        name: of the problem.
        channels: of the convolutions, of the first ones if there are more later.
        units: of the hidden dense layer of "fashion"; None for 500 at 128 channels, and 128 at fewer.
        depth: of the ResNet.

    Returns:
        The problem.
    """
    if name == "fashion":
        units = units or (500 if channels == 128 else 128)
        net, told = ThreeConvolutions(channels, units), {"channels": channels, "units": units}
        return Problem(or_digits(fashion_mnist, 28), (28, 1), net, f"3C1F, {channels} channels", f"{channels}", told)
    told = {"problem": name, "width": channels}
    if name == "digits":
        heading = f"A small convnet, {channels} channels"
        return Problem(lambda _: digits(), (8, 1), SmallConvnet(channels), heading, f"digits_{channels}", told)
    heading, stem = f"ResNet-{depth}, {channels} channels", f"resnet{depth}_{channels}"
    return Problem(
        or_digits(cifar10, 32, 3), (32, 3), ResNet(depth, channels), heading, stem, told | {"depth": depth}, crops=True
    )
