"""The methods of the comparisons: how each is made on an autoencoder and on a classifier, and what of it is tuned.

Tuned are a learning rate and a damping, around the settings of the authors (K-FAC, TNT, K-BFGS) or the best of a few
trials: a factor of 10 to 30 in the rate, of 10 in the damping. The rest is fixed here. On the autoencoders it is what
the authors of TNT and of K-BFGS have: a constant rate, no weight decay (but for K-BFGS), momentum in front of every
second-order direction, statistics of every step with a decay of 0.9, a refresh at every 20th, but for what is below. On
the classifiers it is what the authors of TENGraD have, and shared by all.

Units: a damping is in those of the Fisher matrix of one example, but for TNT. Its authors take statistics of the
gradient of the mean loss, without the batch size; that is our `scale="batch"`, and its damping enters each mode by
itself, `split="per_mode"`. The K-FAC of the authors of K-BFGS has a learning rate of 1 beside an average of gradients,
which is 0.1 beside a heavy ball of 0.9; our K-BFGS has the average. The damping of Shampoo and SOAP is in the units of
a root of the gradient's second moment; when Shampoo is grafted its learning rate is Adam's.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np
import optax

import natgrad_jax as ng
from experiments.running import Labels, Make, Numbers

Kind = Literal["autoencoder", "classifier"]
OFTEN: Mapping[str, Any] = {"statistics_every": 1, "refresh_every": 20}
"""As in the experiments of TNT."""
STATISTICS_EVERY, REFRESH_EVERY, WEIGHT_DECAY, KL_CLIP = 20, 100, 1e-3, 1e-2
"""What all methods share on a classifier, as far as they have it."""


class Range(NamedTuple):
    """What is tried of a learning rate and a damping: from the least to the most; without these it stays as usual."""

    usual: tuple[float, float] = (0.0, 0.0)
    rates: tuple[float, float] | None = None
    dampings: tuple[float, float] | None = None

    def tried(self, name: str, budget: int) -> tuple[Numbers, ...]:
        """The usual numbers, and so many drawn log-uniformly to three digits, one in each stratum, by a name's seed."""
        if self.rates is None:
            return ({},)
        rng, columns = np.random.default_rng([0, crc32(name.encode())]), []
        for low, high in (self.rates, self.dampings or 2 * self.usual[1:]):
            places = (rng.permutation(budget) + rng.random(budget)) / budget if low < high else np.zeros(budget)
            columns.append([float(f"{number:.3g}") for number in low * (high / (low or 1.0)) ** places])
        pairs = dict.fromkeys((self.usual, *sorted(zip(*columns, strict=True))))
        return tuple({"rate": rate, "damping": damping} for rate, damping in pairs)


class Method(NamedTuple):
    """A method of the comparisons.

    Attributes:
        of: its name in the package; or of a baseline, rate, damping, weight decay -> the optimizer.
        ranges: what is tuned; if that is `NOTHING` it has the layers and its options alone.
        reconstructs, classifies, both: its options on an autoencoder, on a classifier, on both.
        in_front: whether on an autoencoder the momentum stands in front of the direction.
        warm: whether a pass over the data fills the statistics of a run on an autoencoder.
        clips: whether `KL_CLIP` is for it.
        has_own_periods: whether the periods that the others share are not for it.
    """

    of: str | Callable[..., Any]
    ranges: Mapping[Kind, Range]
    reconstructs: Mapping[str, Any] = {}
    classifies: Mapping[str, Any] = {}
    both: Mapping[str, Any] = {}
    in_front: bool = False
    labels: Labels = "sampled"
    warm: bool = False
    clips: bool = False
    has_own_periods: bool = False

    def make(self, kind: Kind, refresh_every: int = REFRESH_EVERY) -> Make:
        """How it is made on problems of a kind; on a classifier with that period."""
        decay, of = WEIGHT_DECAY if kind == "classifier" else 0.0, self.of
        if callable(of):
            return lambda numbers, layers: of(numbers["rate"], numbers["damping"], decay)
        options = {**self.both, **(self.reconstructs if kind == "autoencoder" else self.classifies)}
        if self.ranges is NOTHING:
            return lambda numbers, layers: getattr(ng, of)(layers=layers, **options)
        if kind == "autoencoder" and self.in_front:
            direction = getattr(ng, f"scale_by_{of}")
            return lambda numbers, layers: optax.chain(
                optax.trace(0.9),
                direction(layers, damping=numbers["damping"], **options),
                optax.scale_by_learning_rate(numbers["rate"]),
            )
        given: dict[str, Any] = {"kl_clip": None}
        if kind == "classifier":
            given |= {"momentum": 0.9, "weight_decay": decay, "kl_clip": KL_CLIP if self.clips else None}
            given |= {} if self.has_own_periods else periods(getattr(ng, of), STATISTICS_EVERY, refresh_every)
        options = given | options
        return lambda numbers, layers: getattr(ng, of)(numbers["rate"], layers, damping=numbers["damping"], **options)


def periods(method: Callable[..., Any], statistics: int, refresh: int) -> dict[str, int]:
    """The keywords for periods that a method of the package has."""
    every = {"statistics_every": statistics, "refresh_every": refresh, "rescale_every": statistics}
    return {name: steps for name, steps in every.items() if name in inspect.signature(method).parameters}


QUADRATIC: dict[str, Any] = {"learning_rate": "quadratic", "momentum": "quadratic"}
ADAPTIVE = QUADRATIC | {"damping": ng.adaptive_damping(), "statistics_every": 5, "refresh_every": 5, "decay": 0.5}


def sgd(rate: Any, damping: Any, decay: float) -> optax.GradientTransformation:
    """SGD with the momentum and the weight decay in the places where the second-order methods have them."""
    return optax.chain(optax.add_decayed_weights(decay), optax.trace(0.9), optax.scale_by_learning_rate(rate))


def adam(rate: Any, damping: Any, decay: float) -> optax.GradientTransformation:
    """Adam with decoupled weight decay."""
    return optax.adamw(rate, weight_decay=decay)


def adam_of_tnt(rate: Any, damping: Any, decay: float) -> optax.GradientTransformation:
    """Adam as the authors of TNT have it: with the second moment of the smoothed gradient."""
    rms = optax.scale_by_rms(0.999, eps=damping, eps_in_sqrt=False, bias_correction=True)
    decayed = optax.add_decayed_weights(decay)
    return optax.chain(optax.ema(0.9), rms, decayed, optax.scale_by_learning_rate(rate))


def ranges(autoencoder: Range, classifier: Range) -> dict[Kind, Range]:
    """Those of a method."""
    return {"autoencoder": autoencoder, "classifier": classifier}


NOTHING = ranges(Range(), Range())
KRONECKER = ranges(Range((0.1, 3.0), (0.02, 0.4), (1.0, 10.0)), Range((1e-2, 0.1), (3e-3, 3e-2), (0.03, 0.3)))
"""Of K-FAC and its relatives. On a classifier the authors of TENGraD have (0.003, 0.1), for EKFAC (0.001, 0.03)."""
EIGENBASIS = KRONECKER | {"autoencoder": Range((0.03, 1.0), (0.01, 0.2), (0.5, 5.0))}
OF_ONE_BATCH = KRONECKER | {"autoencoder": Range((0.01, 1.0), (2e-3, 3e-2), (0.3, 3.0))}
"""Of TENGraD: where its batch has no gradients, its step is that of SGD with the learning rate over the damping."""
OF_MOMENTS = ranges(Range((0.3, 0.3), (0.1, 1.0), (0.2, 2.0)), Range((0.03, 0.1), (1e-2, 0.3), (0.03, 0.3)))
"""Of K-BFGS; its authors have (0.3, 0.3) on the autoencoder, those of TENGraD (0.01, 0.03) for K-BFGS(L)."""
OF_MODES = ranges(Range((1e-4, 0.1), (3e-5, 5e-4), (0.05, 0.5)), Range((1e-4, 0.01), (3e-5, 1e-3), (3e-3, 0.1)))
OF_BLOCKS = ranges(Range((1e-4, 0.1), (2e-5, 1e-3), (0.05, 1.0)), Range((1e-2, 0.1), (1e-3, 1e-1), (0.03, 0.3)))
OF_SAMPLES = OF_BLOCKS | {"autoencoder": Range((3e-4, 0.1), (1e-4, 3e-3), (0.05, 1.0))}
OF_BASES = ranges(Range((5e-3, 1e-16), (5e-4, 2e-2)), Range((3e-3, 1e-16), (3e-4, 1e-2)))
OF_LENGTHS = ranges(Range((3e-4, 1e-8), (5e-5, 2e-3)), Range((1e-3, 1e-8), (1e-4, 1e-2)))

FACTORS: Mapping[str, Any] = {"split": "even", "decay": 0.9, **OFTEN}
ROTATED: Mapping[str, Any] = {**FACTORS, "rescale_every": 5, "refresh": "qr"}
"""The basis of EKFAC and TEKFAC by orthogonal iteration."""
SELDOM: Mapping[str, Any] = {"statistics_every": 2, "refresh_every": 25}
OWN_MOMENTS: Mapping[str, Any] = {"labels": "true", "warm": True}
GRAFTED: Mapping[str, Any] = {"decay": 0.99, "graft_to": "adam", "graft_decay": 0.99}
DECAYING: Mapping[str, Any] = {"weight_decay": WEIGHT_DECAY}
FAMILY: Mapping[str, Any] = {"in_front": True, "warm": True, "clips": True}

METHODS = {
    "SGD-m": Method(sgd, ranges(Range((3e-3, 0.0), (5e-4, 2e-2)), Range((3e-2, 0.0), (1e-3, 2e-1)))),
    "Adam": Method(adam, ranges(Range((4e-3, 0.0), (3e-4, 1e-2)), Range((1e-3, 0.0), (1e-4, 2e-2)))),
    "K-FAC": Method("kfac", KRONECKER, FACTORS, **FAMILY),
    "EKFAC": Method("ekfac", EIGENBASIS, ROTATED, **FAMILY),
    "TKFAC": Method("tkfac", KRONECKER, FACTORS, **FAMILY),
    "TEKFAC": Method("tekfac", EIGENBASIS, ROTATED, **FAMILY),
    "TENGraD": Method("tengrad", OF_ONE_BATCH, {"refresh_every": 20}, in_front=True, clips=True),
    "TNT": Method("tnt", OF_MODES, OFTEN, both={"scale": "batch", "split": "per_mode"}, warm=True),
    "MBF": Method("mbf", OF_BLOCKS, SELDOM, warm=True),
    "MBF, sampled labels": Method("mbf", OF_SAMPLES, SELDOM, both={"statistics": "curvature"}, warm=True),
    "Shampoo, grafted": Method("shampoo", OF_LENGTHS, OFTEN, both=GRAFTED),
    "SOAP": Method("soap", OF_BASES, classifies={"momentum": 0.95}, has_own_periods=True),
    "K-BFGS": Method("kbfgs", OF_MOMENTS, {"weight_decay": 1e-5}, **OWN_MOMENTS),
    "K-BFGS(L)": Method("kbfgs", OF_MOMENTS, {"weight_decay": 1e-5}, both={"memory": 100}, **OWN_MOMENTS),
    "K-FAC, adaptive": Method("kfac", NOTHING, {"split": "even"}, DECAYING, ADAPTIVE),
    "K-FAC, nothing said": Method("kfac", NOTHING),
    "TNT, adaptive": Method("tnt", NOTHING, {}, DECAYING, ADAPTIVE),
}
"""What is compared, at its best."""
OLDER = {
    "Adam of TNT": METHODS["Adam"]._replace(of=adam_of_tnt),
    "Shampoo": METHODS["Shampoo, grafted"]._replace(
        reconstructs={"early_refresh": False, **OFTEN}, both={}, classifies=GRAFTED, warm=True
    ),
}
"""What else the authors of TNT ran on the autoencoder: baselines, not compared at their best."""
ALL = METHODS | OLDER
BASELINE = "SGD-m"
