"""K-FAC: the Fisher block of a layer as one Kronecker product, F ~ A (x) G.

    1  A <- EMA(sum_t a a^T, mean over examples),  G <- EMA(mean of g g^T)     observe
    2  x, y <- split of the damping, x y = damping                             refresh
    3  A^ <- (A + x I)^-1,  G^ <- (G + y I)^-1                                 refresh
    4  direction <- A^ dW G^                                                   apply

With `sharing="reduce"` positions are pooled first (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636):

    1' A <- EMA(E[(sum_t a) (sum_t a)^T]),  G <- EMA(E[(mean_t g) (mean_t g)^T])   observe

With `split="exact"` the damping goes to the eigenvalues of the product instead:

    3' A = U diag(s) U^T,  G = V diag(r) V^T                                   refresh
    4' direction <- U [(U^T dW V) / (s r^T + damping)] V^T                     apply

Martens and Grosse (2015), https://arxiv.org/abs/1503.05671, sections 3 and 6.3; for convolutions Grosse and Martens
(2016), https://arxiv.org/abs/1602.01407. Exact for linear networks with squared error, for one example, and wherever a
and g are independent. Not here: the block-tridiagonal variant; the quadratic-model step size.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from natgrad_jax import checks, factors, inverses
from natgrad_jax.base import Array, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.factors import Pair
from natgrad_jax.inverses import Eigen, Inverses
from natgrad_jax.layers import SHARINGS, Sharing
from natgrad_jax.transform import Schedule, lift

Split = Literal["pi", "even", "exact"]
SPLITS = ("pi", "even", "exact")


class KFACState(NamedTuple):
    """The averages of A [S, I, I] and G [S, O, O], and what `apply` reads of them."""

    pair: Pair
    inverse: Inverses | Eigen  # Eigen if split="exact"


def kfac_block(decay: Scalar, split: Split = "pi", max_factor_dim: int = 8192, sharing: Sharing = "expand") -> Method:
    """K-FAC of one layer.

    Args:
        decay: weight of the old value in the averages.
        split: how the damping enters: "pi", "even" or "exact".
        max_factor_dim: a side wider than this keeps only the diagonal of its factor.
        sharing: "expand" or "reduce".

    Returns:
        The four functions.
    """

    def init(layer):
        return KFACState(factors.empty(layer, max_factor_dim), inverses.identity(layer, max_factor_dim, split))

    def observe(layer, state, evidence):
        return state._replace(pair=factors.observe(layer, state.pair, evidence, decay, sharing))  # 1, 1'

    def refresh(layer, state, damping):
        del layer
        return state._replace(inverse=inverses.inverted(*factors.means(state.pair), damping, split))  # 2, 3, 3'

    def apply(layer, state, gradient, damping):
        del layer
        return inverses.solve(state.inverse, gradient, damping)  # 4, 4'

    return Method(init, observe, refresh, apply)


def scale_by_kfac(
    layers: Layers,
    *,
    damping: Damping,
    split: Split = "pi",
    sharing: Sharing = "expand",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The K-FAC direction, A^-1 dW G^-1 for every layer.

    Args:
        layers: from `capture.layers`.
        damping: strength in the units of F, the Fisher block of one example; its schedule, if a function.
        split: "pi" (Martens and Grosse), "even" (both sides alike), or "exact" (added to the eigenvalues of the
            product; needs eigendecompositions, and a changed damping then acts at once, not at the next refresh).
        sharing: how the factors see positions that share the weights. "expand": each by itself, as where each has a
            loss; "reduce": inputs summed and cotangents averaged within an example, as where the model does so.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics.
        refresh_every: steps between inversions.
        early_refresh: whether to invert at every statistics step until the first period is over.
        max_factor_dim: a side wider than this (a vocabulary, say) keeps only the diagonal of its factor.

    Returns:
        A transformation; `update` needs `curvature`.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if `split` or `sharing` is unknown or a number out of its range.
    """
    checks.choice("split", split, SPLITS)
    checks.choice("sharing", sharing, SHARINGS)
    return lift(
        lambda decay: kfac_block(decay, split, max_factor_dim, sharing),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, early_refresh=early_refresh),
    )


def kfac(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers,
    *,
    damping: Damping = 0.03,
    split: Split = "pi",
    sharing: Sharing = "expand",
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
    """K-FAC with heavy-ball momentum and decoupled weight decay.

    Damping 0.03, decay 0.95, momentum 0.9, inverses every 100 steps and weight decay added to the preconditioned
    gradient are the K-FAC baseline in the experiments of the TENGraD authors
    (https://github.com/saeedsoori/k-fac). Theirs takes statistics every 20 steps, here twice as often, and clips
    the step: `kl_clip=1e-2` on its command line.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: from `capture.layers`.
        damping: see `scale_by_kfac`; or `adaptive_damping(...)`.
        split: see `scale_by_kfac`.
        sharing: see `scale_by_kfac`.
        decay: see `scale_by_kfac`.
        statistics_every: see `scale_by_kfac`.
        refresh_every: see `scale_by_kfac`.
        early_refresh: see `scale_by_kfac`.
        max_factor_dim: see `scale_by_kfac`.
        kl_clip: bound of `clip_by_kl` on how far a step may move the model; None for none.
        momentum: weight of the old direction, or "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature`.
    """
    direction = scale_by_kfac(
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
