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

from collections.abc import Callable
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
from natgrad_jax.layers.views import Modes
from natgrad_jax.linalg import Factor
from natgrad_jax.roots import ROOTS, Root, inverse_root, whole
from natgrad_jax.steps import divide_by_rms, graft
from natgrad_jax.tensor_transform import Statistics, cut_in_modes, lift_tensors
from natgrad_jax.transform import Schedule

Accumulate = Literal["average", "sum"]
ACCUMULATES = get_args(Accumulate)
Graft = Literal["sgd", "rmsprop", "adam"]
GRAFTS = get_args(Graft)


class ShampooState(NamedTuple):
    """The averages or sums of all H_i together, and the P_i that `apply` reads."""

    factors: Average
    roots: tuple[Factor, ...]


def shampoo_block(
    decay: Scalar,
    exponent: float | None = None,
    root: Root = "eigh",
    accumulate: Accumulate = "average",
    coupled: bool = False,
    max_factor_dim: int = 8192,
) -> Method:
    """Shampoo of one tensor.

    Args:
        decay: weight of the old value in the averages.
        exponent: of every mode, positive; None for 1 / (2k), or 1 / 2 if coupled.
        root: "eigh" or "newton".
        accumulate: "average" or "sum".
        coupled: whether each factor is of the gradient whitened by the others.
        max_factor_dim: a mode longer than this keeps only the diagonal of its factor.

    Returns:
        The four functions.
    """

    def init(layer):
        return ShampooState(modes.empty(layer, max_factor_dim), modes.identities(layer, max_factor_dim))

    def observe(layer, state, evidence):
        found = modes.contractions(layer, state.factors, evidence, whiten=state.roots if coupled else None)
        if accumulate == "average":
            return state._replace(factors=averages.update(state.factors, found, decay))  # 1
        return state._replace(
            factors=Average(jax.tree.map(jnp.add, state.factors.total, found), jnp.ones_like(state.factors.weight))
        )

    def refresh(layer, state, damping):
        power = exponent or (1 / 2 if coupled else 1 / (2 * len(layer.shape)))
        means = averages.mean(state.factors)
        return state._replace(roots=tuple(inverse_root(mean, damping, power, root) for mean in means))  # 2

    def apply(layer, state, gradient, damping):
        del layer, damping
        return modes.product(gradient, state.roots)  # 3

    return Method(init, observe, refresh, apply)


def scale_by_shampoo(
    layers: Layers | None = None,
    *,
    damping: Damping,
    exponent: float | None = None,
    root: Root = "eigh",
    accumulate: Accumulate = "average",
    coupled: bool = False,
    kernels: Modes = "flatten_spatial",
    merge: int | None = None,
    block_size: int | None = None,
    statistics: Statistics = "gradient",
    decay: ScalarOrSchedule = 0.9,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The Shampoo direction, dW x_1 P_1 ... x_k P_k for every parameter array.

    Args:
        layers: from `capture.layers`; without them the shapes of the parameter arrays are all that is known: groups of
            a convolution, and the stack of a scanned layer, are then modes like others.
        damping: added to the factors, whose units are those of the squared gradient; its schedule, if a function. It
            is never less than 1e-6 of the largest eigenvalue of a factor (float32).
        exponent: of every factor; None for 1 / (2k) of k modes, or 1 / 2 if coupled.
        root: "eigh", by eigendecompositions, or "newton", by matrix products; then 1 / exponent is whole, and a root
            that is not found leaves the last one in its place and is counted in the metrics.
        accumulate: "average" or "sum" over steps.
        coupled: whether each factor is measured on the gradient whitened by the others (KL-Shampoo).
        kernels: the modes of a convolution's kernel: "flatten_spatial", (window, C, O); "matrix", (window C, O); "all",
            each of its axes. Without `layers`, of any array of three axes or more. Modes of one entry do not count.
        merge: neighbouring modes are joined while their product is at most this; None to join none.
        block_size: modes longer than this are cut into blocks, each with factors of its own; None to cut none.
        statistics: "gradient": from the gradient itself; "curvature": from the labels of the capture, of the gradient
            of their mean loss.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics. A first step after a warm start leaves its statistics as they are.
        refresh_every: steps between roots.
        early_refresh: whether to refresh at every statistics step until the first period is over.
        max_factor_dim: a mode longer than this keeps only the diagonal of its factor.

    Returns:
        A transformation; `update` needs `curvature` only if the statistics are of it. Its extra argument `gradient` is
        the gradient where something stands in front of the direction.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if a word is unknown or a number out of its range.
    """
    checks.choice("root", root, ROOTS)
    checks.choice("accumulate", accumulate, ACCUMULATES)
    if exponent is not None:
        checks.number("exponent", exponent, least=1e-3)
    if coupled and accumulate == "sum":
        raise ValueError(
            '`coupled` is True and `accumulate` "sum", but coupled factors fit an average; leave one away.'
        )
    if root == "newton" and exponent is not None:
        whole(exponent)
    return lift_tensors(
        lambda decay: shampoo_block(decay, exponent, root, accumulate, coupled, max_factor_dim),
        cut_in_modes(kernels, merge, block_size),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, early_refresh=early_refresh, keep_warm_start=True),
        statistics=statistics,
        scale="batch",
    )


def shampoo(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers | None = None,
    *,
    damping: Damping = 0.01,
    exponent: float | None = None,
    root: Root = "eigh",
    accumulate: Accumulate = "average",
    coupled: bool = False,
    kernels: Modes = "flatten_spatial",
    merge: int | None = None,
    block_size: int | None = None,
    graft_to: Graft | None = None,
    graft_decay: Scalar = 0.999,
    statistics: Statistics = "gradient",
    decay: ScalarOrSchedule = 0.9,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
    momentum: Scalar | Quadratic | None = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo with heavy-ball momentum in FRONT of the direction and decoupled weight decay behind.

    The defaults are the baseline of the experiments with TNT, for convolutional nets; with its autoencoders it took
    statistics at every step and refreshed every 20, without `early_refresh`. As it is mostly used today:

        shampoo(1e-3, damping=1e-12, decay=0.999, graft_to="adam", merge=1024, block_size=1024, statistics_every=1,
                refresh_every=20)

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: see `scale_by_shampoo`.
        damping: see `scale_by_shampoo`; or `adaptive_damping(...)`.
        exponent: see `scale_by_shampoo`.
        root: see `scale_by_shampoo`.
        accumulate: see `scale_by_shampoo`.
        coupled: see `scale_by_shampoo`.
        kernels: see `scale_by_shampoo`.
        merge: see `scale_by_shampoo`.
        block_size: see `scale_by_shampoo`.
        graft_to: whose length the direction of each parameter array is given: "sgd", that of the momentum, or of the
            gradient without one; "rmsprop", that of the same over the root of the gradient's average square; "adam",
            with that average unbiased. None for its own.
        graft_decay: weight of the old value in that average.
        statistics: see `scale_by_shampoo`.
        decay: see `scale_by_shampoo`.
        statistics_every: see `scale_by_shampoo`.
        refresh_every: see `scale_by_shampoo`.
        early_refresh: see `scale_by_shampoo`.
        max_factor_dim: see `scale_by_shampoo`.
        momentum: weight of the old gradient in the buffer, or, behind the direction, "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature` only if the statistics are of it.

    Raises:
        ValueError: if `graft_to` is unknown.
    """
    direction = scale_by_shampoo(
        layers,
        damping=damping,
        exponent=exponent,
        root=root,
        accumulate=accumulate,
        coupled=coupled,
        kernels=kernels,
        merge=merge,
        block_size=block_size,
        statistics=statistics,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        early_refresh=early_refresh,
        max_factor_dim=max_factor_dim,
    )
    if graft_to is not None:
        checks.choice("graft_to", graft_to, GRAFTS)
        length = optax.identity() if graft_to == "sgd" else divide_by_rms(graft_decay, debias=graft_to == "adam")
        direction = graft(direction, length)
    return complete(direction, learning_rate, damping, None, momentum, weight_decay, weight_decay_mask, optax.trace)
