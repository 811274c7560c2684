"""EKFAC: K-FAC's eigenbasis, with the second moments measured in it.

    1  A <- EMA(sum_t a a^T, mean over examples),  G <- EMA(mean of g g^T)     observe
    2  A = U diag(.) U^T,  G = V diag(.) V^T                                   refresh
    3  scale <- empty: it belongs to the basis it was measured in              refresh
    4  scale <- EMA(E[(U^T D V)^2])                                            rescale, after every refresh
    5  direction <- U [(U^T dW V) / (scale + damping)] V^T                     apply

With `estimator="minibatch"` (EKFAC-ra in the paper) lines 3 and 4 are

    3' scale <- the Kronecker eigenvalues, diag(U^T A U) diag(V^T G V)^T       refresh
    4' scale <- EMA((U^T (sum_n D_n) V)^2 / W)                                 rescale

and with `split="pi"` or "even" line 5 divides by scale + x r^T + s y^T + x y, the damping of a product; see
`rotated.solve`.

With `refresh="qr"` lines 2 and 3 are, after a first refresh by eigendecompositions,

    2" U, V <- one step of orthogonal iteration from the old U, V              refresh
    3" scale <- its entries in the order of the new columns                    refresh

George, Laurent, Bouthillier, Ballas and Vincent (2018), https://arxiv.org/abs/1806.03884. The scale is the best
diagonal there is in this basis, so the Frobenius error is at most K-FAC's. The paper's own experiments took the true
labels (`capture(..., labels="true")`). Not here: the spatially uncorrelated variant for convolutions.
"""

from dataclasses import dataclass
from typing import Annotated

from natgrad_jax.around.adaptive import Damping
from natgrad_jax.base import Method, Scalar
from natgrad_jax.blocks import kronecker, rotated
from natgrad_jax.layers.rows import Sharing
from natgrad_jax.settings import Completed, Rescaled, direction, optimizer


@dataclass(frozen=True, kw_only=True)
class EKFAC(Rescaled):
    """The EKFAC direction, U [(U^T dW V) / (scale + damping)] V^T for every layer.

    Directions that the last batches did not show are divided by the damping alone. So do not take it too small with
    small batches. A side wider than `max_factor_dim` keeps its own coordinates.
    """

    sharing: Annotated[
        Sharing,
        'how the factors of the basis see positions that share the weights, as in `scale_by_kfac`: "expand" where each '
        'has a loss, "reduce" where the model pools them. The scale is of the gradients of examples either way.',
    ] = "expand"

    def method(self, decay: Scalar, scale_decay: Scalar) -> Method:
        """The functions of one layer."""
        kept = self.kept

        def init(layer):
            return kronecker.empty(layer, kept), rotated.identity(layer, kept, self.split)

        def observe(layer, pair, evidence):
            return kronecker.observe(layer, pair, evidence, decay, self.sharing)  # 1

        def refresh(layer, pair, operator, damping):
            del layer, damping
            return rotated.refreshed(*kronecker.means(pair), operator, self.estimator, self.refresh)  # 2, 3

        def rescale(layer, operator, evidence):
            return rotated.rescaled(layer, operator, evidence, self.estimator, scale_decay)  # 4

        def apply(layer, operator, gradient, damping):
            del layer
            return rotated.solve(operator, gradient, damping, self.split)  # 5

        def follow(layer, pair, operator):
            del layer
            return rotated.followed(*kronecker.means(pair), operator)

        def turned(layer, pair, operator):
            del layer
            return rotated.turn(*kronecker.means(pair), operator)

        follows = None if self.split == "exact" else follow
        parts = rotated.gradual(kronecker.means)
        return Method(init, observe, refresh, apply, rescale, follows, turned=turned, gradual=parts)


@dataclass(frozen=True, kw_only=True)
class EKFACOptimizer(Completed, EKFAC):
    """EKFAC with heavy-ball momentum and decoupled weight decay.

    The paper's tables of settings are not public; the defaults are those of `kfac`, so that the two can be compared.
    """

    damping: Damping = 0.03


scale_by_ekfac = direction(EKFAC)
ekfac = optimizer(EKFACOptimizer)
