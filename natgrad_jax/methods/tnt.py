"""TNT: the gradient as a tensor-normal variable, whose covariance is one Kronecker factor for each mode.

    1  H_i <- EMA(G_(i) G_(i)^T / W) for every mode i, G the gradient of sampled labels, summed          observe
    2  t <- tr H_1 ( = tr H_i),  c <- (t / n)^(1/k),  n = n_1 ... n_k                                    refresh
    3  U_i <- H_i / (c^(k-1) n / n_i), so that the mean eigenvalue of every U_i is c                     refresh
    4  P_i <- (U_i + e I)^-1,  e = damping^(1/k)                                                         refresh
    5  direction <- dW x_1 P_1 ... x_k P_k                                                               apply

G_(i) is the unfolding [n_i, all other modes] of a tensor of k modes, x_i the product with a matrix in mode i; `modes`
has both. With `split="per_mode"` e is the damping itself, as in the authors' code: a total of damping^k, which differs
between kernels and biases. With `normalise=False` lines 3 and 5 are

    3' U_i <- H_i
    5' direction <- t^(k-1) dW x_1 P_1 ... x_k P_k

Ren and Goldfarb (2021), https://arxiv.org/abs/2106.02925. The product of the U_i is the covariance itself where that is
a Kronecker product. Every parameter array is a tensor by itself: a dense kernel has the modes (I, O), that of a
convolution (window, C, O), and a bias or a norm's parameters one. In expectation the H_i are partial traces of F;
adding e to factors of equal mean eigenvalue is the pi damping of K-FAC, for k factors.

The paper's experiments take the gradient of the batch's MEAN loss and never multiply by its size W, which is F / W in
the place of F (`scale="batch"`). With one learning rate a, damping e in each mode and weight decay d this is

    a, e, d  of the scale of a batch  =  a W, e W^(1/k), d / W  of the scale of an example,

and with `split="total"` the damping itself is multiplied by W, whatever k is.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages, checks, modes
from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.layers.views import MODES, Modes, in_modes, view
from natgrad_jax.linalg import Factor, damped_inverse, trace
from natgrad_jax.tensor_transform import Scale, Statistics, lift_tensors
from natgrad_jax.transform import Schedule

Split = Literal["total", "per_mode"]
SPLITS = get_args(Split)


class TNTState(NamedTuple):
    """The average of all H_i together, and the P_i that `apply` reads; t^(k-1) of line 5' is within the first."""

    factors: Average
    inverses: tuple[Factor, ...]


def tnt_block(
    decay: Scalar,
    split: Split = "total",
    estimator: modes.Estimator = "minibatch",
    normalise: bool = True,
    max_factor_dim: int = 8192,
) -> Method:
    """TNT of one tensor.

    Args:
        decay: weight of the old value in the averages.
        split: "total" or "per_mode".
        estimator: "minibatch" or "per_example".
        normalise: whether the factors are brought to equal mean eigenvalues.
        max_factor_dim: a mode longer than this keeps only the diagonal of its factor.

    Returns:
        The four functions.
    """

    def init(layer):
        return TNTState(modes.empty(layer, max_factor_dim), modes.identities(layer, max_factor_dim))

    def observe(layer, state, evidence):
        found = modes.contractions(layer, state.factors, evidence, estimator=estimator)
        return state._replace(factors=averages.update(state.factors, found, decay))  # 1

    def refresh(layer, state, damping):
        factors, count = averages.mean(state.factors), len(layer.shape)
        strength = jnp.asarray(damping, layer.dtype) ** (1 if split == "per_mode" else 1 / count)
        total = trace(factors[0])  # 2
        scales = _scales(total, layer.shape) if normalise else [jnp.ones_like(total)] * count
        units = [_times(factor, scale) for factor, scale in zip(factors, scales, strict=True)]  # 3
        first, *others = (damped_inverse(unit, strength) for unit in units)  # 4
        first = first if normalise else _times(first, total ** (count - 1))
        return state._replace(inverses=(first, *others))

    def apply(layer, state, gradient, damping):
        del layer, damping
        return modes.product(gradient, state.inverses)  # 5

    return Method(init, observe, refresh, apply)


def _scales(total: Array, sizes: tuple[int, ...]) -> list[Array]:
    """n_i / (c^(k-1) n) [S] of each mode; 1 where the trace is zero."""
    whole, count = prod(sizes), len(sizes)
    mean = (jnp.where(total > 0, total, whole) / whole) ** (1 / count)
    return [jnp.where(total > 0, size / (mean ** (count - 1) * whole), 1) for size in sizes]


def _times(factor: Factor, scale: Array) -> Factor:
    return jax.tree.map(lambda leaf: leaf * scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim)), factor)


def scale_by_tnt(
    layers: Layers | None = None,
    *,
    damping: Damping,
    split: Split = "total",
    kernels: Modes = "flatten_spatial",
    statistics: Statistics = "curvature",
    scale: Scale = "example",
    estimator: modes.Estimator = "minibatch",
    normalise: bool = True,
    decay: ScalarOrSchedule = 0.9,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The TNT direction, dW x_1 P_1 ... x_k P_k for every parameter array.

    Args:
        layers: from `capture.layers`; without them the shapes of the parameter arrays are all that is known: the groups
            of a convolution are then not told apart, and the copies of a scanned layer are a mode.
        damping: strength in the units of F, the Fisher block of one example; its schedule, if a function.
        split: "total": the k-th root of the damping in each of k modes; "per_mode": the damping itself in each, as in
            the authors' code, in units of the k-th root of F.
        kernels: the modes of a convolution's kernel: "flatten_spatial", (window, C, O); "matrix", (window C, O), as in
            K-FAC; "all", each of its axes. The same of any array of three axes or more that is of no known layer.
        statistics: "curvature": from the labels of the capture, sampled by default; "gradient": from the gradient
            itself, true labels and all: `curvature` is then not needed, nor asked if it is there.
        scale: "example": the statistics, and the damping, are in the units of F; "batch": of F / W, as in the paper's
            experiments. Statistics of the gradient have its own units, whatever this says: those of a batch.
        estimator: "minibatch": from the gradient summed over the batch; "per_example": from the gradient of each
            example, which has the same mean, less noise, and the cost of TKFAC's factors, and needs `layers`.
        normalise: whether the factors are brought to equal mean eigenvalues before they are damped.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics. A first step after a warm start leaves its statistics as they are.
        refresh_every: steps between inversions.
        early_refresh: whether to refresh at every statistics step until the first period is over.
        max_factor_dim: a mode longer than this keeps only the diagonal of its factor.

    Returns:
        A transformation; `update` needs `curvature` unless the statistics are of the gradient.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if a word is unknown or a number out of its range, or the estimator lacks what it needs.
    """
    checks.choice("split", split, SPLITS)
    checks.choice("kernels", kernels, MODES)
    checks.choice("estimator", estimator, modes.ESTIMATORS)
    if estimator == "per_example" and (layers is None or statistics == "gradient"):
        raise ValueError(
            "`estimator` is 'per_example', which takes the gradients of the examples from the activations of known "
            'layers: pass the `layers` of the model, with `statistics="curvature"`, or take "minibatch".'
        )
    return lift_tensors(
        lambda decay: tnt_block(decay, split, estimator, normalise, max_factor_dim),
        lambda source: view(source, in_modes(source, kernels)),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, early_refresh=early_refresh, keep_warm_start=True),
        statistics=statistics,
        scale=scale,
    )


def tnt(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers | None = None,
    *,
    damping: Damping = 0.03,
    split: Split = "total",
    kernels: Modes = "flatten_spatial",
    statistics: Statistics = "curvature",
    scale: Scale = "example",
    estimator: modes.Estimator = "minibatch",
    normalise: bool = True,
    decay: ScalarOrSchedule = 0.9,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
    momentum: Scalar | Quadratic | None = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TNT as in its paper's experiments: heavy-ball momentum in FRONT of the direction, decoupled weight decay behind.

    Decay, momentum and periods are those of the paper's convolutional nets; its autoencoders took statistics at every
    step and refreshed every 20. The damping is ours: theirs, 0.01 in each mode on the scale of a batch of 128, is a
    total of 1e-4 for a convolution, of 0.01 for a dense kernel and of 1 for a bias in the units of F.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: see `scale_by_tnt`.
        damping: see `scale_by_tnt`; or `adaptive_damping(...)`.
        split: see `scale_by_tnt`.
        kernels: see `scale_by_tnt`.
        statistics: see `scale_by_tnt`.
        scale: see `scale_by_tnt`.
        estimator: see `scale_by_tnt`.
        normalise: see `scale_by_tnt`.
        decay: see `scale_by_tnt`.
        statistics_every: see `scale_by_tnt`.
        refresh_every: see `scale_by_tnt`.
        early_refresh: see `scale_by_tnt`.
        max_factor_dim: see `scale_by_tnt`.
        momentum: weight of the old gradient in the buffer, or, behind the direction, "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature` unless the statistics are of the gradient.
    """
    direction = scale_by_tnt(
        layers,
        damping=damping,
        split=split,
        kernels=kernels,
        statistics=statistics,
        scale=scale,
        estimator=estimator,
        normalise=normalise,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        early_refresh=early_refresh,
        max_factor_dim=max_factor_dim,
    )
    return complete(direction, learning_rate, damping, None, momentum, weight_decay, weight_decay_mask, optax.trace)
