"""The methods of the comparisons: how each is made on an autoencoder and on a classifier, and what of it is tuned.

A setting is a learning rate and a damping; the rest is fixed here, for a kind of problems. On the autoencoders it is
what the authors of TNT and of K-BFGS have: a constant learning rate, no weight decay (but for K-BFGS), momentum in
front of every second-order direction, statistics of every step with a decay of 0.9, a refresh at every 20th; other
periods stand below. On the classifiers it is what the authors of TENGraD have: periods, decoupled weight decay and a
clip of the step that are shared by all, momentum 0.9 where each method has it.

Units: a damping is in those of the Fisher matrix of one example, but for TNT. Its authors take statistics of the
gradient of the mean loss, without the batch size; that is our `scale="batch"`, and its damping enters each mode by
itself, `split="per_mode"`. The K-FAC of the authors of K-BFGS has a learning rate of 1 beside an average of gradients,
which is 0.1 beside a heavy ball of 0.9; our K-BFGS has the average, and their rates as they are. The damping of
Shampoo and SOAP stands where theirs does, in the units of a root of the gradient's second moment; when Shampoo is
grafted its learning rate is Adam's.

Usual settings, on the autoencoders: those that the authors have, or the best of a few trials of two epochs on MNIST
(Adam 3, EKFAC 2, MBF 11 and with sampled labels 3, grafted Shampoo 3, SOAP 5; of TENGraD 3 of 45 steps; TKFAC and
TEKFAC have those of K-FAC and EKFAC). Of the authors are K-FAC (3 others tried), TNT (3) and K-BFGS (8).

Ranges: a factor of 10 to 30 in the learning rate around the usual setting, and of 10 in the damping. Adam and SGD-m,
SOAP and grafted Shampoo have a learning rate alone; "adaptive" has nothing: learning rate, momentum and damping come
from the quadratic model of the loss.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import optax

import natgrad_jax as ng
from experiments.training import Make, Setting

Kind = Literal["autoencoder", "classifier"]
OFTEN = {"statistics_every": 1, "refresh_every": 20}
"""As in the experiments of TNT."""
PERIOD = 20
"""Of the refreshes on autoencoders, by which they are timed. MBF has 25, and 5 and 10 divide it."""


class Shared(NamedTuple):
    """What all methods share on a classifier.

    Attributes:
        refresh_every: steps between refreshes.
        statistics_every: steps between statistics, for methods that average them.
        weight_decay: strength; 0 for none.
        kl_clip: bound on a step of those that have one; 0 for none.
    """

    refresh_every: int = 100
    statistics_every: int = 20
    weight_decay: float = 1e-3
    kl_clip: float = 1e-2


class Range(NamedTuple):
    """What is tried: between `least` and `most`, where these differ; `usual` is what runs without trials."""

    usual: Setting
    least: Setting
    most: Setting


class Method(NamedTuple):
    """A method of the comparisons.

    Attributes:
        of: its name in the package; None for one of Optax.
        reconstructs: how it is made on an autoencoder.
        classifies: how it is made on a classifier.
        ranges: of its settings.
        labels: those of the curvature, as `ng.linen.capture` takes them.
        warm: whether a pass over the data fills the statistics of a run on an autoencoder.
        clips: whether it can clip its step.
    """

    of: str | None
    reconstructs: Make
    classifies: Callable[[Shared], Make]
    ranges: Mapping[Kind, Range]
    labels: Literal["sampled", "true"] = "sampled"
    warm: bool = False
    clips: bool = False

    def make(self, kind: Kind, shared: Shared = Shared()) -> Make:  # noqa: B008 (a tuple)
        """How it is made on problems of a kind."""
        return self.reconstructs if kind == "autoencoder" else self.classifies(shared)

    @property
    def tuned(self) -> bool:
        """Whether anything of it is."""
        return any(found.least != found.most for found in self.ranges.values())


def behind_momentum(direction: Callable[..., Any], **options: Any) -> Make:
    """Momentum in front of a direction whose statistics are of the curvature."""
    return lambda setting, layers: optax.chain(
        optax.trace(0.9),
        direction(layers, damping=setting.damping, **options),
        optax.scale_by_learning_rate(setting.rate),
    )


def whole(method: Callable[..., Any], **options: Any) -> Make:
    """A complete optimizer of the package, as long as its learning rate says unless a clip is among the options."""
    options = {"kl_clip": None} | options
    return lambda setting, layers: method(setting.rate, layers, damping=setting.damping, **options)


def alike(
    method: Callable[..., Any], *statistics: str, clips: bool = False, refreshes: bool = True, **options: Any
) -> Callable[[Shared], Make]:
    """A complete optimizer as all are on a classifier.

    Args:
        method: of the package.
        *statistics: its keywords for periods of what it averages.
        clips: whether the shared `kl_clip` is for it.
        refreshes: whether it has the keyword `refresh_every`.
        **options: of its own.

    Returns:
        What is shared -> how it is made.
    """

    def make(shared: Shared) -> Make:
        given = {"momentum": 0.9, "weight_decay": shared.weight_decay or None}
        given |= dict.fromkeys(statistics, shared.statistics_every)
        given |= {"kl_clip": shared.kl_clip or None} if clips else {}
        given |= {"refresh_every": shared.refresh_every} if refreshes else {}
        return whole(method, **given | options)

    return make


def adaptive(method: Callable[..., Any], **options: Any) -> Make:
    """A method with everything from the quadratic model, and nothing tuned."""
    often = {"statistics_every": 5, "refresh_every": 5, "decay": 0.5} | options
    make = partial(method, "quadratic", momentum="quadratic", damping=ng.adaptive_damping(), **often)
    return lambda setting, layers: make(layers=layers)


def sgd(shared: Shared) -> Make:
    """SGD with the momentum and the weight decay in the places where the second-order methods have them."""
    decay = optax.add_decayed_weights(shared.weight_decay)
    return lambda setting, layers: optax.chain(decay, optax.trace(0.9), optax.scale_by_learning_rate(setting.rate))


def adam(shared: Shared) -> Make:
    """Adam with decoupled weight decay."""
    return lambda setting, layers: optax.adamw(setting.rate, weight_decay=shared.weight_decay)


def adam_of_tnt(setting: Setting, layers: ng.Layers) -> optax.GradientTransformation:
    """Adam as the authors of TNT have it: with the second moment of the smoothed gradient."""
    del layers
    rms = optax.scale_by_rms(0.999, eps=setting.damping, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(optax.ema(0.9), rms, optax.scale_by_learning_rate(setting.rate))


def tuned(usual: Any, rates: tuple[float, float], dampings: tuple[float, float] | None = None) -> Range:
    """A range; without `dampings` the damping stays what it is."""
    usual = Setting(*usual)
    return Range(usual, *map(Setting, rates, dampings or (usual.damping, usual.damping)))


def ranges(autoencoder: Range, classifier: Range) -> dict[Kind, Range]:
    """Those of a method."""
    return {"autoencoder": autoencoder, "classifier": classifier}


NOTHING = ranges(*2 * (tuned((0.0,), (0.0, 0.0)),))
KRONECKER = ranges(
    tuned((0.1, 3.0), (0.02, 0.4), (1.0, 10.0)),
    tuned((1e-2, 0.1), (3e-3, 3e-2), (0.03, 0.3)),
)
"""Of K-FAC and its relatives. On a classifier the authors of TENGraD have (0.003, 0.1), for EKFAC (0.001, 0.03)."""
EIGENBASIS = KRONECKER | {"autoencoder": tuned((0.03, 1.0), (0.01, 0.2), (0.5, 5.0))}
OF_ONE_BATCH = KRONECKER | {"autoencoder": tuned((0.01, 1.0), (2e-3, 3e-2), (0.3, 3.0))}
"""Of TENGraD: where its batch has no gradients, its step is that of SGD with the learning rate over the damping."""
OF_MOMENTS = ranges(tuned((0.3, 0.3), (0.1, 1.0), (0.2, 2.0)), tuned((0.03, 0.1), (1e-2, 0.3), (0.03, 0.3)))
"""Of K-BFGS; its authors have (0.3, 0.3) on the autoencoder, those of TENGraD (0.01, 0.03) for K-BFGS(L)."""
PER_MODE = {"scale": "batch", "split": "per_mode"}
GRAFTED = {"decay": 0.99, "graft_to": "adam", "graft_decay": 0.99}
ROTATED = {"split": "even", "decay": 0.9, "rescale_every": 5, "refresh": "qr", **OFTEN}
"""The basis of EKFAC and TEKFAC by orthogonal iteration."""
TWO = ("statistics_every", "rescale_every")

METHODS = {
    "SGD-m": Method(
        None,
        lambda setting, layers: optax.sgd(setting.rate, 0.9),
        sgd,
        ranges(tuned((3e-3,), (5e-4, 2e-2)), tuned((3e-2,), (1e-3, 2e-1))),
    ),
    "Adam": Method(
        None,
        lambda setting, layers: optax.adam(setting.rate),
        adam,
        ranges(tuned((4e-3,), (3e-4, 1e-2)), tuned((1e-3,), (1e-4, 2e-2))),
    ),
    "K-FAC": Method(
        "kfac",
        behind_momentum(ng.scale_by_kfac, split="even", decay=0.9, **OFTEN),
        alike(ng.kfac, "statistics_every", clips=True),
        KRONECKER,
        warm=True,
        clips=True,
    ),
    "EKFAC": Method(
        "ekfac",
        behind_momentum(ng.scale_by_ekfac, **ROTATED),
        alike(ng.ekfac, *TWO, clips=True),
        EIGENBASIS,
        warm=True,
        clips=True,
    ),
    "TKFAC": Method(
        "tkfac",
        behind_momentum(ng.scale_by_tkfac, split="even", decay=0.9, **OFTEN),
        alike(ng.tkfac, "statistics_every", clips=True),
        KRONECKER,
        warm=True,
        clips=True,
    ),
    "TEKFAC": Method(
        "tekfac",
        behind_momentum(ng.scale_by_tekfac, **ROTATED),
        alike(ng.tekfac, *TWO, clips=True),
        EIGENBASIS,
        warm=True,
        clips=True,
    ),
    "TENGraD": Method(
        "tengrad",
        behind_momentum(ng.scale_by_tengrad, refresh_every=20),
        alike(ng.tengrad, clips=True),
        OF_ONE_BATCH,
        clips=True,
    ),
    "TNT": Method(
        "tnt",
        whole(ng.tnt, **PER_MODE, **OFTEN),
        alike(ng.tnt, "statistics_every", **PER_MODE),
        ranges(
            tuned((1e-4, 0.1), (3e-5, 5e-4), (0.05, 0.5)),
            tuned((1e-4, 0.01), (3e-5, 1e-3), (3e-3, 0.1)),
        ),
        warm=True,
    ),
    "MBF": Method(
        "mbf",
        whole(ng.mbf, statistics_every=2, refresh_every=25),
        alike(ng.mbf, "statistics_every"),
        ranges(tuned((1e-4, 0.1), (2e-5, 1e-3), (0.05, 1.0)), tuned((1e-2, 0.1), (1e-3, 1e-1), (0.03, 0.3))),
        warm=True,
    ),
    "MBF, sampled labels": Method(
        "mbf",
        whole(ng.mbf, statistics="curvature", statistics_every=2, refresh_every=25),
        alike(ng.mbf, "statistics_every", statistics="curvature"),
        ranges(tuned((3e-4, 0.1), (1e-4, 3e-3), (0.05, 1.0)), tuned((1e-2, 0.1), (1e-3, 1e-1), (0.03, 0.3))),
        warm=True,
    ),
    "Shampoo, grafted": Method(
        "shampoo",
        whole(ng.shampoo, **GRAFTED, **OFTEN),
        alike(ng.shampoo, "statistics_every", **GRAFTED),
        ranges(tuned((3e-4, 1e-8), (5e-5, 2e-3)), tuned((1e-3, 1e-8), (1e-4, 1e-2))),
    ),
    "SOAP": Method(
        "soap",
        whole(ng.soap),
        alike(ng.soap, refreshes=False, momentum=0.95),
        ranges(tuned((5e-3, 1e-16), (5e-4, 2e-2)), tuned((3e-3, 1e-16), (3e-4, 1e-2))),
    ),
    "K-BFGS": Method(
        "kbfgs",
        whole(ng.kbfgs, weight_decay=1e-5),
        alike(ng.kbfgs, "statistics_every", refreshes=False),
        OF_MOMENTS,
        labels="true",
        warm=True,
    ),
    "K-BFGS(L)": Method(
        "kbfgs",
        whole(ng.kbfgs, memory=100, weight_decay=1e-5),
        alike(ng.kbfgs, "statistics_every", refreshes=False, memory=100),
        OF_MOMENTS,
        labels="true",
        warm=True,
    ),
    "K-FAC, adaptive": Method(
        "kfac",
        adaptive(ng.kfac, split="even"),
        lambda shared: adaptive(ng.kfac, weight_decay=shared.weight_decay or None),
        NOTHING,
    ),
    "TNT, adaptive": Method(
        "tnt",
        adaptive(ng.tnt),
        lambda shared: adaptive(ng.tnt, weight_decay=shared.weight_decay or None),
        NOTHING,
    ),
}
"""What is compared, at its best."""
OLDER = {
    "Adam of TNT": METHODS["Adam"]._replace(reconstructs=adam_of_tnt),
    "Shampoo": METHODS["Shampoo, grafted"]._replace(
        reconstructs=whole(ng.shampoo, early_refresh=False, **OFTEN), warm=True
    ),
}
"""What else the authors of TNT ran on the autoencoder: baselines, not compared at their best."""
ALL = METHODS | OLDER
BASELINE = "SGD-m"
