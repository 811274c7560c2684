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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp

from natgrad_jax.algebra import averages
from natgrad_jax.around.adaptive import Damping
from natgrad_jax.base import Array, Layer, Method, Scalar
from natgrad_jax.blocks import kronecker, rotated
from natgrad_jax.blocks.rotated import Rotated
from natgrad_jax.layers.rows import Pairing
from natgrad_jax.lift.lift import Strengths
from natgrad_jax.settings import Completed, Rescaled, direction, optimizer

DampingRule = Literal["mean_eigenvalue", "scalar"]


@dataclass(frozen=True, kw_only=True)
class TEKFAC(Rescaled):
    """The TEKFAC direction, U [(U^T dW V) / (Theta + damping)] V^T for every layer.

    The paper's T_FIM is `statistics_every`, its T_EIG `refresh_every`, its T_RE `rescale_every`; Theta is the
    scale, its estimator "per_example". A side wider than `max_factor_dim` keeps its own coordinates.
    """

    damping_rule: Annotated[
        DampingRule,
        '"mean_eigenvalue": in a model with convolutions the damping is only the floor of a strength that follows the '
        'curvature (the paper\'s rule as we read it); "scalar": the damping itself, as in EKFAC, for one that is tuned '
        "or adapts itself.",
    ] = "mean_eigenvalue"
    sharing: Annotated[
        Pairing,
        "how the factors of the basis see positions that share the weights, as in `scale_by_tkfac`. Theta is of the "
        "gradients of examples either way.",
    ] = "example"

    @property
    def strengths(self) -> Strengths | None:
        """Line 5, if the damping is not the strength itself."""
        return mean_eigenvalues if self.damping_rule == "mean_eigenvalue" else None

    def method(self, decay: Scalar, scale_decay: Scalar) -> Method:
        """The functions of one layer."""
        kept = self.kept

        def init(layer):
            return kronecker.empty_traces(layer, kept), rotated.identity(layer, kept, self.split)

        def observe(layer, traces, evidence):
            return kronecker.observe_traces(layer, traces, evidence, decay, self.sharing)  # 1

        def refresh(layer, traces, operator, damping):
            del layer, damping
            pair = kronecker.trace_restricted(traces)  # P and Q over one number: the same eigenvectors
            return rotated.refreshed(*pair, operator, self.estimator, self.refresh)  # 2, 3

        def rescale(layer, operator, evidence):
            return rotated.rescaled(layer, operator, evidence, self.estimator, scale_decay)  # 4

        def apply(layer, operator, gradient, damping):
            del layer
            return rotated.solve(operator, gradient, damping, self.split)  # 6

        def follow(layer, traces, operator):
            del layer
            return rotated.followed(*kronecker.trace_restricted(traces), operator)

        def turned(layer, traces, operator):
            del layer
            return rotated.turn(*kronecker.trace_restricted(traces), operator)

        follows = None if self.split == "exact" else follow
        parts = rotated.gradual(kronecker.trace_restricted)
        return Method(init, observe, refresh, apply, rescale, follows, turned=turned, gradual=parts)


def mean_eigenvalues(layers: Mapping[str, Layer], operators: Mapping[str, Rotated], damping: Array) -> dict[str, Array]:
    """Line 5: the strength of each layer of a model with convolutions.

    Args:
        layers: the known layers of the model.
        operators: {name: operator}.
        damping: the floor.

    Returns:
        {name: max(mean of Theta, damping)}, [S] for convolutions, the largest of them for other layers; nothing where
        there are no convolutions.
    """
    found = {
        name: jnp.maximum(jnp.mean(averages.mean(operators[name].scale), axis=(-2, -1)), damping)
        for name, layer in layers.items()
        if layer.window
    }
    if not found:
        return {}
    largest = jnp.max(jnp.stack([jnp.max(strength) for strength in found.values()]))
    return {name: found.get(name, largest) for name in layers}


@dataclass(frozen=True, kw_only=True)
class TEKFACOptimizer(Completed, TEKFAC):
    """TEKFAC with heavy-ball momentum and decoupled weight decay.

    The paper's table of settings is not public: the defaults are those of `ekfac`, so that the two can be compared.
    """

    damping: Damping = 0.03


scale_by_tekfac = direction(TEKFAC)
tekfac = optimizer(TEKFACOptimizer)
