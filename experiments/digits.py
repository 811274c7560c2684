"""The small problems on the 1,797 digits of scikit-learn: classifiers and autoencoders of short studies."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from scipy.special import xlogy

import natgrad_jax as ng
from experiments.data import Part, digits, endless
from experiments.running import Task
from experiments.study import Case

CLASSES, PIXELS = ng.losses.softmax_cross_entropy, ng.losses.sigmoid_binary_cross_entropy


def entropy(rows: np.ndarray) -> float:
    """Mean entropy of an image in nats: the least binary cross-entropy that any reconstruction of grey pixels has."""
    return float(-np.mean(np.sum(xlogy(rows, rows) + xlogy(1 - rows, 1 - rows), axis=-1)))


def images(size: int = 8) -> Part:
    """All images and labels."""
    data = digits(size)
    return Part(*(np.concatenate(pair) for pair in zip(data.train, data.test, strict=True)))


def case(net: nn.Module, fields: Mapping[str, Any], batch: int, size: int = 8) -> Case:
    """A net on the digits: a classifier, or an "autoencoder", whose loss is that above the entropy of its pixels."""
    is_classifier = fields["problem"] != "autoencoder"
    data = images(size) if is_classifier else images(size).mirrored()
    batch = min(batch, len(data.labels))
    task = Task(net, CLASSES if is_classifier else PIXELS, data.first(batch))
    floor, loss = 0.0 if is_classifier else entropy(data.images), task.measured(jax.device_put(data))
    return Case(fields, task, partial(endless, data, batch), lambda variables: loss(variables) - floor)
