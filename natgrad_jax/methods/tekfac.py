"""TEKFAC: TKFAC's eigenbasis, with the second moments measured in it.

    1  P <- EMA(E[D D^T]),  Q <- EMA(E[D^T D]),  D the gradient of one example, one weight for both   observe
    2  P = U diag(.) U^T,  Q = V diag(.) V^T                                                          refresh
    3  Theta <- empty: it belongs to the basis it was measured in                                     refresh
    4  Theta <- EMA(E[(U^T D V)^2])                                          rescale, after every refresh
    5  x <- strength of the damping of each layer                                                     apply
    6  direction <- U [(U^T dW V) / (Theta + x)] V^T                                                  apply

P and Q are the paper's delta Phi and delta Psi, undivided: their eigenvectors are the same, and no delta multiplies
Theta, which is measured. `estimator` and `refresh` are those of EKFAC. Line 5 is

    5  x <- max(mean of Theta, damping) for a convolution, for a dense layer the largest x of the convolutions of the
       model; x <- damping in a model without convolutions, and everywhere with `damping_rule="scalar"`

Gao and others (2020), https://arxiv.org/abs/2011.13609. Its line 5 is max(tr Theta, nu) / dim Theta; we read dim Theta
as the number of entries and the maximum as what replaces the damping of dense layers, and tie the floor nu / dim Theta,
of which no value is public, to the damping. The Frobenius error is at most TKFAC's. There is no such order between
TKFAC and K-FAC, nor between TEKFAC and EKFAC: of random layers nearly all are better approximated, but not all.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from natgrad_jax import averages, checks, factors, scales
from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.eigenbasis import Basis, standard
from natgrad_jax.layers import PAIRINGS, Pairing
from natgrad_jax.modes import identities
from natgrad_jax.scales import ESTIMATORS, REFRESHES, SPLITS, Estimator, Refresh, Split
from natgrad_jax.transform import Schedule, lift

DampingRule = Literal["mean_eigenvalue", "scalar"]
DAMPING_RULES = ("mean_eigenvalue", "scalar")


class TEKFACState(NamedTuple):
    """The average of P [S, I, I] and Q [S, O, O] together, the basis (U, V), and the average of Theta [S, I, O]."""

    traces: Average
    basis: Basis
    scale: Average


def tekfac_block(
    decay: Scalar,
    estimator: Estimator = "per_example",
    max_factor_dim: int = 8192,
    sharing: Pairing = "example",
    refresh_by: Refresh = "eigh",
    split: Split = "exact",
) -> Method:
    """TEKFAC of one layer.

    Args:
        decay: weight of the old value in the averages.
        estimator: "per_example" or "minibatch".
        max_factor_dim: a side wider than this keeps its own coordinates.
        sharing: "example", "expand" or "reduce".
        refresh_by: "eigh" or "qr".
        split: "exact", "pi" or "even".

    Returns:
        The five functions.
    """

    def init(layer):
        traces = factors.empty_traces(layer, max_factor_dim)
        basis = standard(*identities(layer, max_factor_dim))
        return TEKFACState(traces, basis, averages.empty(layer.stack, layer.shape, layer.dtype))

    def observe(layer, state, evidence):
        return state._replace(traces=factors.observe_traces(layer, state.traces, evidence, decay, sharing))  # 1

    def refresh(layer, state, damping):
        del layer, damping
        pair = factors.trace_restricted(state.traces)  # P and Q over one number: the same eigenvectors
        basis, scale = scales.refreshed(*pair, state.basis, state.scale, estimator, refresh_by)  # 2, 3
        return state._replace(basis=basis, scale=scale)

    def rescale(layer, state, evidence):
        value = scales.measured(layer, state.basis, evidence, estimator)
        return state._replace(scale=averages.update(state.scale, value, decay))  # 4

    def apply(layer, state, gradient, damping):
        del layer
        scale, pair = averages.mean(state.scale), factors.trace_restricted(state.traces)
        return scales.solve(state.basis, scale, pair, gradient, damping, split)  # 6

    return Method(init, observe, refresh, apply, rescale)


def mean_eigenvalues(layers: Mapping[str, Layer], states: Mapping[str, Any], damping: Array) -> dict[str, Array]:
    """Line 5: the strength of each layer of a model with convolutions.

    Args:
        layers: the known layers of the model.
        states: {name: TEKFACState}.
        damping: the floor.

    Returns:
        {name: max(mean of Theta, damping)}, [S] for convolutions, the largest of them for other layers; nothing where
        there are no convolutions.
    """
    found = {
        name: jnp.maximum(jnp.mean(averages.mean(states[name].scale), axis=(-2, -1)), damping)
        for name, layer in layers.items()
        if layer.kind == "conv"
    }
    if not found:
        return {}
    largest = jnp.max(jnp.stack([jnp.max(strength) for strength in found.values()]))
    return {name: found.get(name, largest) for name in layers}


def scale_by_tekfac(
    layers: Layers,
    *,
    damping: Damping,
    damping_rule: DampingRule = "mean_eigenvalue",
    split: Split = "exact",
    estimator: Estimator = "per_example",
    sharing: Pairing = "example",
    refresh: Refresh = "eigh",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    rescale_every: int | Array = 10,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The TEKFAC direction, U [(U^T dW V) / (Theta + damping)] V^T for every layer.

    Args:
        layers: from `capture.layers`.
        damping: strength in the units of F, the Fisher block of one example; its schedule, if a function.
        damping_rule: "mean_eigenvalue": in a model with convolutions the damping is only the floor of a strength that
            follows the curvature (the paper's rule as we read it); "scalar": the damping itself, as in EKFAC.
        split: how the strength enters, as in `scale_by_ekfac`: "exact" (the paper's), "pi" or "even".
        estimator: of Theta, as in `scale_by_ekfac`: "per_example" (the paper's) or "minibatch".
        sharing: how the factors of the basis see positions that share the weights, as in `scale_by_tkfac`; Theta is
            measured from the gradients of examples either way.
        refresh: how the eigenvectors are found, as in `scale_by_ekfac`: "eigh" afresh, "qr" from the old ones.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics for P and Q (the paper's T_FIM).
        refresh_every: steps between eigendecompositions (its T_EIG).
        rescale_every: steps between measurements of Theta (its T_RE); there is one after every refresh in any case.
        early_refresh: whether to refresh at every statistics step until the first period is over.
        max_factor_dim: a side wider than this (a vocabulary, say) keeps its own coordinates.

    Returns:
        A transformation; `update` needs `curvature`.

    Raises:
        TypeError: if `layers` is no `Layers`.
        ValueError: if one of the words is unknown or a number out of its range.
    """
    checks.choice("damping_rule", damping_rule, DAMPING_RULES)
    checks.choice("split", split, SPLITS)
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.choice("sharing", sharing, PAIRINGS)
    checks.choice("refresh", refresh, REFRESHES)
    return lift(
        lambda decay: tekfac_block(decay, estimator, max_factor_dim, sharing, refresh, split),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, rescale_every, early_refresh),
        strengths=mean_eigenvalues if damping_rule == "mean_eigenvalue" else None,
    )


def tekfac(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers,
    *,
    damping: Damping = 0.03,
    damping_rule: DampingRule = "mean_eigenvalue",
    split: Split = "exact",
    estimator: Estimator = "per_example",
    sharing: Pairing = "example",
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
    """TEKFAC with heavy-ball momentum and decoupled weight decay.

    The paper's table of settings is not public: the defaults are those of `ekfac`, so that the two can be compared.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: from `capture.layers`.
        damping: see `scale_by_tekfac`; or `adaptive_damping(...)`.
        damping_rule: see `scale_by_tekfac`.
        split: see `scale_by_tekfac`.
        estimator: see `scale_by_tekfac`.
        sharing: see `scale_by_tekfac`.
        refresh: see `scale_by_tekfac`.
        decay: see `scale_by_tekfac`.
        statistics_every: see `scale_by_tekfac`.
        refresh_every: see `scale_by_tekfac`.
        rescale_every: see `scale_by_tekfac`.
        early_refresh: see `scale_by_tekfac`.
        max_factor_dim: see `scale_by_tekfac`.
        kl_clip: bound of `clip_by_kl` on how far a step may move the model; None for none.
        momentum: weight of the old direction, or "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature`.
    """
    direction = scale_by_tekfac(
        layers,
        damping=damping,
        damping_rule=damping_rule,
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
