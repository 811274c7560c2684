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

from dataclasses import dataclass
from typing import Annotated

from natgrad_jax.around.adaptive import Damping
from natgrad_jax.base import Layer, Method, Scalar
from natgrad_jax.blocks import kronecker
from natgrad_jax.blocks.kronecker import Split
from natgrad_jax.layers.rows import Pairing
from natgrad_jax.settings import Completed, Truncatable, direction, optimizer


@dataclass(frozen=True, kw_only=True)
class TKFAC(Truncatable):
    """The TKFAC direction, the inverse of the Kronecker product that has the partial traces of F, for every layer.

    The paper's T_FIM is `statistics_every`, its T_INV `refresh_every`.
    """

    split: Annotated[
        Split | None,
        'how the damping enters. "even": its root on both sides (the paper\'s, for dense layers); "mean_eigenvalue": '
        "the mean eigenvalue of each side, but never less than that root (a stand-in for the paper's rule for "
        'convolutions, which is not public); "pi": as in `scale_by_kfac`, here the constant ratio O / I of the two; '
        '"exact": added to the eigenvalues of the product, as in `scale_by_kfac`. None: "mean_eigenvalue" for '
        'convolutions, else "even".',
    ] = None
    sharing: Annotated[
        Pairing,
        'how the factors see positions that share the weights. "example": the gradients of examples as they are, which '
        'keeps the trace of F; "expand": without the products of different positions, as in the paper; "reduce": with '
        "inputs summed and cotangents averaged within an example, the cheapest.",
    ] = "example"

    def method(self, decay: Scalar) -> Method:
        """The functions of one layer."""
        kept = self.kept

        def rule(layer: Layer) -> Split:
            return self.split or ("mean_eigenvalue" if layer.window else "even")

        def init(layer):
            return kronecker.empty_traces(layer, kept), kronecker.identity(layer, kept, rule(layer))

        def observe(layer, traces, evidence):
            return kronecker.observe_traces(layer, traces, evidence, decay, self.sharing)  # 1

        def refresh(layer, traces, operator, damping):
            del operator
            pair = kronecker.trace_restricted(traces)  # 2
            return kronecker.inverted(*pair, damping, rule(layer))  # 3, 4

        def apply(layer, operator, gradient, damping):
            del layer
            return kronecker.solve(operator, gradient, damping)  # 5

        return Method(init, observe, refresh, apply, gradual=kronecker.gradual(kronecker.trace_restricted, rule))


@dataclass(frozen=True, kw_only=True)
class TKFACOptimizer(Completed, TKFAC):
    """TKFAC with heavy-ball momentum and decoupled weight decay.

    The paper has the same heavy ball behind the preconditioner. Its table of settings is not public. The defaults are
    those of `kfac`, so that you can compare the two.
    """

    damping: Damping = 0.03


scale_by_tkfac = direction(TKFAC)
tkfac = optimizer(TKFACOptimizer)
