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

from dataclasses import dataclass
from typing import Annotated, Literal

from natgrad_jax.around.adaptive import Damping
from natgrad_jax.base import Method, Scalar
from natgrad_jax.blocks import kronecker
from natgrad_jax.layers.rows import Sharing
from natgrad_jax.settings import Completed, Truncatable, direction, optimizer

Split = Literal["pi", "even", "exact"]


@dataclass(frozen=True, kw_only=True)
class KFAC(Truncatable):
    """The K-FAC direction, A^-1 dW G^-1 for every layer."""

    split: Annotated[
        Split,
        'how the damping enters: "pi" (Martens and Grosse), "even" (both sides alike), or "exact" (added to the '
        "eigenvalues of the product; needs eigendecompositions, and a changed damping then acts at once, not at the "
        "next refresh).",
    ] = "pi"
    sharing: Annotated[
        Sharing,
        'how the factors see positions that share the weights. "expand": each by itself, as where each has a loss; '
        '"reduce": inputs summed and cotangents averaged within an example, as where the model does so.',
    ] = "expand"

    def method(self, decay: Scalar) -> Method:
        """The functions of one layer."""

        def init(layer):
            kept = self.kept
            return kronecker.empty(layer, kept), kronecker.identity(layer, kept, self.split)

        def observe(layer, pair, evidence):
            return kronecker.observe(layer, pair, evidence, decay, self.sharing)  # 1, 1'

        def refresh(layer, pair, operator, damping):
            del layer, operator
            return kronecker.inverted(*kronecker.means(pair), damping, self.split)  # 2, 3, 3'

        def apply(layer, operator, gradient, damping):
            del layer
            return kronecker.solve(operator, gradient, damping)  # 4, 4'

        parts = kronecker.gradual(kronecker.means, lambda layer: self.split)
        return Method(init, observe, refresh, apply, gradual=parts)


@dataclass(frozen=True, kw_only=True)
class KFACOptimizer(Completed, KFAC):
    """K-FAC with heavy-ball momentum and decoupled weight decay.

    Damping 0.03, decay 0.95, momentum 0.9, inverses every 100 steps and weight decay added to the preconditioned
    gradient are the K-FAC baseline in the experiments of the TENGraD authors (https://github.com/saeedsoori/k-fac).
    They take statistics every 20 steps, we every 10. They clip the step with `kl_clip=1e-2`, we with 1e-3.
    """

    damping: Damping = 0.03


scale_by_kfac = direction(KFAC)
kfac = optimizer(KFACOptimizer)
