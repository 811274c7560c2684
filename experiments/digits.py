"""The small problems on the 1,797 digits of scikit-learn: classifiers and autoencoders of short studies."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy.special import xlogy
from sklearn.model_selection import train_test_split

import natgrad_jax as ng
from experiments.data import Part, digits
from experiments.running import Task
from experiments.study import Case

CLASSES, PIXELS = ng.losses.softmax_cross_entropy, ng.losses.sigmoid_binary_cross_entropy


def entropy(images: np.ndarray) -> float:
    """Mean entropy of an image in nats: the least binary cross-entropy that any reconstruction of grey pixels has."""
    return float(-np.mean(np.sum(xlogy(images, images) + xlogy(1 - images, 1 - images), axis=-1)))


def images(size: int = 8) -> Part:
    """All images and labels."""
    data = digits(size)
    return Part(*(np.concatenate(pair) for pair in zip(data.train, data.test, strict=True)))


def rows(part: Part) -> Part:
    """Images, flat, as inputs and as what is to come out."""
    flat = part.images.reshape(len(part.images), -1)
    return Part(flat, flat)


def endless(part: Part, batch: int, seed: int) -> Iterator[Part]:
    """Batches for ever, each epoch in a new order; what an epoch leaves over is dropped.

    Args:
        part: images and labels.
        batch: images in a batch; all of them if there are fewer.
        seed: of the orders.

    Yields:
        A batch.
    """
    random, batch = np.random.default_rng(seed), min(batch, len(part.labels))
    while True:
        order = random.permutation(len(part.labels))
        for first in range(0, len(order) - batch + 1, batch):
            chosen = order[first : first + batch]
            yield Part(part.images[chosen], part.labels[chosen])


def case(fields: Mapping[str, Any], net: nn.Module, train: Part, batch: int, test: Part | None = None) -> Case:
    """A net on the digits, and `test` for the end; an autoencoder's loss is that above the entropy of its pixels."""
    is_classifier = train.labels.ndim == 1
    task = Task(net, CLASSES if is_classifier else PIXELS, train.first(batch))
    loss = jax.jit(partial(_loss, net, task.likelihood))
    whole, floor = jax.device_put(train), 0.0 if is_classifier else entropy(train.images)

    def told(variables: Any) -> str:
        assert test is not None
        if is_classifier:
            logits: Any = net.apply(variables, test.images)
            return f"{float(jnp.mean(jnp.argmax(logits, axis=-1) == test.labels)):.1%}"
        return f"{float(loss(variables, *test)) - entropy(test.images):.2f}"

    def above(variables: Any) -> float:
        return float(loss(variables, *whole)) - floor

    return Case(fields, task, partial(endless, train, batch), above, told if test else None)


def _loss(net, likelihood, variables, x, y):
    return likelihood(net.apply(variables, x), y)


def split(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    """The images for training, and a share of every class for testing."""
    options: Any = {"test_size": share, "random_state": seed, "stratify": part.labels}
    x, x_test, y, y_test = train_test_split(part.images, part.labels, **options)
    return Part(x, y), Part(x_test, y_test)
