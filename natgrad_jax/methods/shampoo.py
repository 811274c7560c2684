"""Shampoo: the gradient divided by a root of its second moment in every mode.

    1  H_i <- EMA(G_(i) G_(i)^T) for every mode i, or their sum       observe
    2  P_i <- (H_i + damping I)^(-1/(2k)), k the number of modes      refresh
    3  direction <- dW x_1 P_1 ... x_k P_k                            apply

With `coupled=True` (KL-Shampoo) every H_i is of the gradient whitened in the other modes, and k of line 2 is 1:

    1' H_i <- EMA(Z_(i) Z_(i)^T n_i / N),  Z = G x_j P_j for j != i,  N = n_1 ... n_k
    2' P_i <- (H_i + damping I)^(-1/2)

Gupta, Koren, Singer (2018), https://arxiv.org/abs/1802.09568: sums, k = 2. The averages, the absolute damping and the
modes (window, C, O) of a convolution are those of a baseline in the experiments of Ren and Goldfarb (2021),
https://arxiv.org/abs/2106.02925. Blocks of long modes, joined short ones, lengths grafted from another optimizer: Anil
et al. (2020), https://arxiv.org/abs/2002.09018. Coupled: Lin et al. (2025), https://arxiv.org/abs/2509.03378. The
statistics are of the gradient of the mean loss of a batch, true labels and all.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp
import optax

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.modes import product
from natgrad_jax.algebra.roots import Root, inverse_root, whole
from natgrad_jax.around.adaptive import Damping
from natgrad_jax.around.graft import divide_by_rms, graft
from natgrad_jax.base import Method, Scalar, ScalarOrSchedule
from natgrad_jax.blocks import tensor
from natgrad_jax.lift.tensors import Statistics
from natgrad_jax.settings import Completed, Fixed, Number, OfCutTensors, direction_of_tensors, optimizer_of_tensors

Accumulate = Literal["average", "sum"]
Graft = Literal["sgd", "rmsprop", "adam"]


@dataclass(frozen=True, kw_only=True)
class Shampoo(OfCutTensors):
    """The Shampoo direction, dW x_1 P_1 ... x_k P_k for every parameter array.

    The damping is added to the factors, in the units of the squared gradient. In float32 it is at least 1e-6 of the
    largest eigenvalue of a factor.
    """

    exponent: Annotated[
        float | None, "of every factor; None for 1 / (2k) of k modes, or 1 / 2 if coupled.", Fixed(Number(least=1e-3))
    ] = None
    root: Annotated[
        Root,
        'how roots are found: "eigh", by eigendecompositions, or "newton", by matrix products, which accelerators like '
        "better; then 1 / exponent is whole, and a root that is not found leaves the last one in its place and is "
        "counted in the metrics.",
    ] = "eigh"
    accumulate: Annotated[
        Accumulate, '"average" or "sum" over steps; a sum, as in the first paper, shortens the steps as they go on.'
    ] = "average"
    coupled: Annotated[
        bool, "whether each factor is of the gradient whitened in the other modes (KL-Shampoo); not with a sum."
    ] = False
    statistics: Statistics = "gradient"
    decay: ScalarOrSchedule = 0.9

    def __post_init__(self):
        super().__post_init__()
        if self.coupled and self.accumulate == "sum":
            raise ValueError(
                '`coupled` is True and `accumulate` "sum", but coupled factors fit an average; drop one of them.'
            )
        if self.root == "newton" and self.exponent is not None:
            whole(self.exponent)

    def method(self, decay: Scalar) -> Method:
        """The functions of one tensor."""

        def init(layer):
            return tensor.empty(layer, self.kept), tensor.identities(layer, self.kept)

        def couple(layer, factors, roots, evidence):
            found = tensor.contractions(layer, factors, evidence, whiten=roots)
            return averages.update(factors, found, decay)  # 1'

        def observe(layer, factors, evidence):
            found = tensor.contractions(layer, factors, evidence)
            if self.accumulate == "average":
                return averages.update(factors, found, decay)  # 1
            total = averages.combined(factors, found, (1, 1)).total
            return Average(total, jnp.ones_like(factors.weight))

        def refresh(layer, factors, roots, damping):
            del roots
            power = self.exponent or (1 / 2 if self.coupled else 1 / (2 * len(layer.shape)))
            return tuple(inverse_root(mean, damping, power, self.root) for mean in averages.mean(factors))  # 2, 2'

        def apply(layer, roots, gradient, damping):
            del layer, damping
            return product(gradient, roots)  # 3

        return Method(init, observe, refresh, apply, couple=couple if self.coupled else None, holds=True)


@dataclass(frozen=True, kw_only=True)
class ShampooOptimizer(Completed, Shampoo):
    """Shampoo with heavy-ball momentum in FRONT of the direction and decoupled weight decay behind.

    The defaults are the baseline of the experiments with TNT, for convolutional nets; with its autoencoders it took
    statistics at every step and refreshed every 20, without `early_refresh`. Most use it today as

        shampoo(1e-3, damping=1e-12, decay=0.999, graft_to="adam", merge=1024, block_size=1024, statistics_every=1,
                refresh_every=20)
    """

    graft_to: Annotated[
        Graft | None,
        'whose length the direction of each parameter array is given: "sgd", that of the momentum, or of the gradient '
        'without one; "rmsprop", that of the same over the root of the gradient\'s average square; "adam", with that '
        "average unbiased: a learning rate that is tuned for Adam then carries over. None for its own.",
    ] = None
    graft_decay: Annotated[Scalar, "weight of the old value in that average.", Number(below=1)] = 0.999
    kl_clip: Scalar | None = 0.1  # its directions are divided by a root: no divergence, and longer
    damping: Damping = 0.01
    smoothing = staticmethod(optax.trace)

    def direction(self, layers):
        """The direction, at another's length if that is asked for."""
        if self.graft_to is None:
            return self.lifted(layers)
        debias = self.graft_to == "adam"
        length = optax.identity() if self.graft_to == "sgd" else divide_by_rms(self.graft_decay, debias=debias)
        return graft(self.lifted(layers), length)


scale_by_shampoo = direction_of_tensors(Shampoo)
shampoo = optimizer_of_tensors(ShampooOptimizer)
