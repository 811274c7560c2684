"""TKFAC: one Kronecker product with the trace of the block, F ~ delta Phi (x) Psi with tr Phi = tr Psi = 1.

    1  P <- EMA(E[D D^T]),  Q <- EMA(E[D^T D]),  D the gradient of one example, one weight for both   observe
    2  delta <- tr P  ( = tr Q = tr F),  X <- P / sqrt(delta),  Y <- Q / sqrt(delta)                  refresh
    3  x, y <- strengths of the damping                                                               refresh
    4  X^ <- (X + x I)^-1,  Y^ <- (Y + y I)^-1                                                        refresh
    5  direction <- X^ dW Y^                                                                          apply

P and Q are the partial traces of F. They are delta Phi and delta Psi of the paper, undivided: averaged so, and with one
weight, they give the TKFAC of the averaged F, and delta need not be kept beside its matrices. X = sqrt(delta) Phi and Y
= sqrt(delta) Psi are what the paper damps. In a layer without shared weights P = E[|g|^2 a a^T] and Q = E[|a|^2 g g^T]:
K-FAC's factors, every example weighted by what the other side says about it. With `split="exact"` line 4 is the
eigendecomposition of X and Y, and the damping is added to the products of their eigenvalues.

Gao, Liu, Huang, Wang, Wang, Xu and Yu (2021), https://arxiv.org/abs/2011.10741. Exact where K-FAC is, and for a layer
with one input or one output. Two things are ours. For convolutions the paper assumes that different positions do not
correlate; `sharing="expand"` does, the default "example" keeps the trace of F as it is. And the paper's damping of
convolutions is not public: "mean_eigenvalue" is a STAND-IN for it, made after the rules that the same authors published
for TEKFAC and LNGD, max(trace, nu) / dimension, with the floor nu / dimension tied to the root of the damping.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from natgrad_jax import checks, factors, inverses
from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.inverses import Eigen, Inverses
from natgrad_jax.layers import PAIRINGS, Pairing
from natgrad_jax.transform import Schedule, lift

Split = Literal["even", "pi", "mean_eigenvalue", "exact"]
SPLITS = ("even", "pi", "mean_eigenvalue", "exact")


class TKFACState(NamedTuple):
    """The average of P [S, I, I] and Q [S, O, O] together, a `factors.Traces`, and what `apply` reads."""

    traces: Average
    inverse: Inverses | Eigen  # Eigen if split="exact"


def tkfac_block(
    decay: Scalar, split: Split | None = None, max_factor_dim: int = 8192, sharing: Pairing = "example"
) -> Method:
    """TKFAC of one layer.

    Args:
        decay: weight of the old value in the averages.
        split: how the damping enters; None for the choice by the kind of the layer.
        max_factor_dim: a side wider than this keeps only the diagonal of its factor.
        sharing: "example", "expand" or "reduce".

    Returns:
        The four functions.
    """

    def rule(layer: Layer) -> Split:
        return split or ("mean_eigenvalue" if layer.kind == "conv" else "even")

    def init(layer):
        traces = factors.empty_traces(layer, max_factor_dim)
        return TKFACState(traces, inverses.identity(layer, max_factor_dim, rule(layer)))

    def observe(layer, state, evidence):
        return state._replace(traces=factors.observe_traces(layer, state.traces, evidence, decay, sharing))  # 1

    def refresh(layer, state, damping):
        pair = factors.trace_restricted(state.traces)  # 2
        return state._replace(inverse=inverses.inverted(*pair, damping, rule(layer)))  # 3, 4

    def apply(layer, state, gradient, damping):
        del layer
        return inverses.solve(state.inverse, gradient, damping)  # 5

    return Method(init, observe, refresh, apply)


def scale_by_tkfac(
    layers: Layers,
    *,
    damping: Damping,
    split: Split | None = None,
    sharing: Pairing = "example",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The TKFAC direction, X^-1 dW Y^-1 for every layer.

    Args:
        layers: from `capture.layers`.
        damping: strength in the units of F, the Fisher block of one example; its schedule, if a function.
        split: how the damping enters. "even": its root on both sides (the paper's, for dense layers);
            "mean_eigenvalue": the mean eigenvalue of each side, but never less than that root (a stand-in for the
            paper's rule for convolutions, which is not public); "pi": as in `scale_by_kfac`, here the constant ratio
            O / I of the two; "exact": added to the eigenvalues of the product. None: "mean_eigenvalue" for
            convolutions, else "even".
        sharing: how the factors see positions that share the weights. "example": the gradients of examples as they
            are, which keeps the trace of F; "expand": without the products of different positions; "reduce": with
            inputs summed and cotangents averaged within an example.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics (the paper's T_FIM).
        refresh_every: steps between inversions (its T_INV).
        early_refresh: whether to invert at every statistics step until the first period is over.
        max_factor_dim: a side wider than this (a vocabulary, say) keeps only the diagonal of its factor.

    Returns:
        A transformation; `update` needs `curvature`.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if `split` or `sharing` is unknown or a number out of its range.
    """
    if split is not None:
        checks.choice("split", split, SPLITS)
    checks.choice("sharing", sharing, PAIRINGS)
    return lift(
        lambda decay: tkfac_block(decay, split, max_factor_dim, sharing),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, early_refresh=early_refresh),
    )


def tkfac(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers,
    *,
    damping: Damping = 0.03,
    split: Split | None = None,
    sharing: Pairing = "example",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
    kl_clip: Scalar | None = None,
    momentum: Scalar | Quadratic | None = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TKFAC with heavy-ball momentum and decoupled weight decay.

    The paper's momentum is the same heavy ball behind the preconditioner. Its table of settings is not public: the
    defaults are those of `kfac`, so that the two can be compared.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: from `capture.layers`.
        damping: see `scale_by_tkfac`; or `adaptive_damping(...)`.
        split: see `scale_by_tkfac`.
        sharing: see `scale_by_tkfac`.
        decay: see `scale_by_tkfac`.
        statistics_every: see `scale_by_tkfac`.
        refresh_every: see `scale_by_tkfac`.
        early_refresh: see `scale_by_tkfac`.
        max_factor_dim: see `scale_by_tkfac`.
        kl_clip: bound of `clip_by_kl` on how far a step may move the model; None for none.
        momentum: weight of the old direction, or "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature`.
    """
    direction = scale_by_tkfac(
        layers,
        damping=damping,
        split=split,
        sharing=sharing,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        early_refresh=early_refresh,
        max_factor_dim=max_factor_dim,
    )
    return complete(direction, learning_rate, damping, kl_clip, momentum, weight_decay, weight_decay_mask)
