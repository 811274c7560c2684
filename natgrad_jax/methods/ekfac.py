"""EKFAC: K-FAC's eigenbasis, with the second moments measured in it.

    1  A <- EMA(sum_t a a^T, mean over examples),  G <- EMA(mean of g g^T)     observe
    2  A = U diag(.) U^T,  G = V diag(.) V^T                                   refresh
    3  scale <- empty: it belongs to the basis it was measured in              refresh
    4  scale <- EMA(E[(U^T D V)^2])                                            rescale, after every refresh
    5  direction <- U [(U^T dW V) / (scale + damping)] V^T                     apply

With `estimator="minibatch"` (EKFAC-ra in the paper) lines 3 and 4 are

    3' scale <- the Kronecker eigenvalues, diag(U^T A U) diag(V^T G V)^T       refresh
    4' scale <- EMA((U^T (sum_n D_n) V)^2 / W)                                 rescale

and with `split="pi"` or "even" line 5 divides by scale + x r^T + s y^T + x y, the damping of a product; see `scales`.

With `refresh="qr"` lines 2 and 3 are, after a first refresh by eigendecompositions,

    2" U, V <- one step of orthogonal iteration from the old U, V              refresh
    3" scale <- its entries in the order of the new columns                    refresh

George, Laurent, Bouthillier, Ballas and Vincent (2018), https://arxiv.org/abs/1806.03884. The scale is the best
diagonal there is in this basis, so the Frobenius error is at most K-FAC's. The paper's own experiments took the true
labels (`capture(..., labels="true")`). Not here: the spatially uncorrelated variant for convolutions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from natgrad_jax import averages, checks, factors, scales
from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.eigenbasis import Basis, standard
from natgrad_jax.factors import Pair
from natgrad_jax.layers import SHARINGS, Sharing
from natgrad_jax.modes import identities
from natgrad_jax.scales import ESTIMATORS, REFRESHES, SPLITS, Estimator, Refresh, Split
from natgrad_jax.transform import Schedule, lift


class EKFACState(NamedTuple):
    """The averages of A and G, the basis (U, V), and the average of the scale [S, I, O] in it."""

    pair: Pair
    basis: Basis
    scale: Average


def ekfac_block(
    decay: Scalar,
    estimator: Estimator = "per_example",
    max_factor_dim: int = 8192,
    sharing: Sharing = "expand",
    refresh_by: Refresh = "eigh",
    split: Split = "exact",
) -> Method:
    """EKFAC of one layer.

    Args:
        decay: weight of the old value in the averages.
        estimator: "per_example" or "minibatch".
        max_factor_dim: a side wider than this keeps its own coordinates.
        sharing: "expand" or "reduce".
        refresh_by: "eigh" or "qr".
        split: "exact", "pi" or "even".

    Returns:
        The five functions.
    """

    def init(layer):
        pair, basis = factors.empty(layer, max_factor_dim), standard(*identities(layer, max_factor_dim))
        return EKFACState(pair, basis, averages.empty(layer.stack, layer.shape, layer.dtype))

    def observe(layer, state, evidence):
        return state._replace(pair=factors.observe(layer, state.pair, evidence, decay, sharing))  # 1

    def refresh(layer, state, damping):
        del layer, damping
        pair = factors.means(state.pair)
        basis, scale = scales.refreshed(*pair, state.basis, state.scale, estimator, refresh_by)  # 2, 3
        return state._replace(basis=basis, scale=scale)

    def rescale(layer, state, evidence):
        value = scales.measured(layer, state.basis, evidence, estimator)
        return state._replace(scale=averages.update(state.scale, value, decay))  # 4

    def apply(layer, state, gradient, damping):
        del layer
        scale, pair = averages.mean(state.scale), factors.means(state.pair)
        return scales.solve(state.basis, scale, pair, gradient, damping, split)  # 5

    return Method(init, observe, refresh, apply, rescale)


def scale_by_ekfac(
    layers: Layers,
    *,
    damping: Damping,
    split: Split = "exact",
    estimator: Estimator = "per_example",
    sharing: Sharing = "expand",
    refresh: Refresh = "eigh",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    rescale_every: int | Array = 10,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The EKFAC direction, U [(U^T dW V) / (scale + damping)] V^T for every layer.

    Args:
        layers: from `capture.layers`.
        damping: strength in the units of F, the Fisher block of one example; its schedule, if a function. Directions
            that the last batches did not show are divided by it alone: with small batches it must not be too small.
        split: how the damping enters: "exact" (the paper's): added to the scale; "pi" or "even": as in `scale_by_kfac`,
            with the cross terms that the damping of two factors has. They hold back the directions that one side
            says little about, and train deep autoencoders in fewer steps.
        estimator: of the scale. "per_example": the mean square of each example's gradient; "minibatch": the square of
            the batch's gradient, cheaper and noisier (EKFAC-ra), unbiased for sampled labels only.
        sharing: how the factors of the basis see positions that share the weights, as in `scale_by_kfac`; the scale is
            measured from the gradients of examples either way.
        refresh: how the eigenvectors are found. "eigh": afresh; "qr": by one step of orthogonal iteration from the old
            ones, which is cheaper, after a first refresh by "eigh"; the scale is then kept, not begun anew.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics for A and G.
        refresh_every: steps between eigendecompositions.
        rescale_every: steps between measurements of the scale; there is one after every refresh in any case.
        early_refresh: whether to refresh at every statistics step until the first period is over.
        max_factor_dim: a side wider than this (a vocabulary, say) keeps its own coordinates.

    Returns:
        A transformation; `update` needs `curvature`.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if `estimator`, `sharing` or `refresh` is unknown or a number out of its range.
    """
    checks.choice("split", split, SPLITS)
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.choice("sharing", sharing, SHARINGS)
    checks.choice("refresh", refresh, REFRESHES)
    return lift(
        lambda decay: ekfac_block(decay, estimator, max_factor_dim, sharing, refresh, split),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, rescale_every, early_refresh),
    )


def ekfac(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers,
    *,
    damping: Damping = 0.03,
    split: Split = "exact",
    estimator: Estimator = "per_example",
    sharing: Sharing = "expand",
    refresh: Refresh = "eigh",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    rescale_every: int | Array = 10,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
    kl_clip: Scalar | None = None,
    momentum: Scalar | Quadratic | None = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC with heavy-ball momentum and decoupled weight decay.

    The paper's tables of settings are not public; the defaults are those of `kfac`, so that the two can be compared.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: from `capture.layers`.
        damping: see `scale_by_ekfac`; or `adaptive_damping(...)`.
        split: see `scale_by_ekfac`.
        estimator: see `scale_by_ekfac`.
        sharing: see `scale_by_ekfac`.
        refresh: see `scale_by_ekfac`.
        decay: see `scale_by_ekfac`.
        statistics_every: see `scale_by_ekfac`.
        refresh_every: see `scale_by_ekfac`.
        rescale_every: see `scale_by_ekfac`.
        early_refresh: see `scale_by_ekfac`.
        max_factor_dim: see `scale_by_ekfac`.
        kl_clip: bound of `clip_by_kl` on how far a step may move the model; None for none.
        momentum: weight of the old direction, or "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature`.
    """
    direction = scale_by_ekfac(
        layers,
        damping=damping,
        split=split,
        estimator=estimator,
        sharing=sharing,
        refresh=refresh,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        rescale_every=rescale_every,
        early_refresh=early_refresh,
        max_factor_dim=max_factor_dim,
    )
    return complete(direction, learning_rate, damping, kl_clip, momentum, weight_decay, weight_decay_mask)
