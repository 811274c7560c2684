"""SOAP: Adam in Shampoo's eigenbasis.

    1  H_i <- EMA(G_(i) G_(i)^T) for every mode i                                      observe
    2  Q_i <- eigenvectors of H_i, by one step of orthogonal iteration from the old    refresh
    3  V <- its entries in the order of the new columns                                refresh
    4  V <- EMA((G x_1 Q_1^T ... x_k Q_k^T)^2)                                         rescale
    5  direction <- [(M x_i Q_i^T) / sqrt(V + damping)] x_i Q_i                        apply

M is the momentum that comes in, G the gradient itself. A vector keeps its own coordinates, and is Adam's; elsewhere the
damping is at least what rounding leaves in null directions. With `refresh="eigh"`, and in the first refresh, the
eigenvectors are made afresh, and V is carried over as the diagonal of a matrix is:

    3' V <- V x_i ((Q_i'^T Q_i) entrywise squared), Q_i' the new basis                 refresh

Vyas et al. (2024), https://arxiv.org/abs/2409.11321, whose code refreshes after the step instead of before it, hence
skips the first step, and adds its eps behind the root.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from natgrad_jax import averages, checks, modes
from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.eigenbasis import iterated
from natgrad_jax.layers.views import Modes
from natgrad_jax.linalg import Diagonal, eigh, matmul, transpose
from natgrad_jax.scales import REFRESHES, Refresh
from natgrad_jax.tensor_transform import Statistics, cut_in_modes, lift_tensors
from natgrad_jax.transform import Schedule

_NOISE = 100  # of what was turned, roots of V below this many eps of the largest are rounding; so is what they divide


class SOAPState(NamedTuple):
    """The averages of all H_i together, the Q_i [S, n_i, n_i] or None, and the average of V [S, n_1, ..., n_k]."""

    factors: Average
    basis: tuple[Array | None, ...]
    scale: Average


def soap_block(decay: Scalar, refresh_by: Refresh = "qr", max_factor_dim: int = 8192) -> Method:
    """SOAP of one tensor.

    Args:
        decay: weight of the old value in the averages.
        refresh_by: "qr" or "eigh".
        max_factor_dim: a mode longer than this keeps its own coordinates.

    Returns:
        The five functions.
    """

    def init(layer):
        most = max_factor_dim if len(layer.shape) > 1 else 0
        identities = modes.identities(layer, most)
        basis = tuple(None if isinstance(side, Diagonal) else side for side in identities)
        return SOAPState(modes.empty(layer, most), basis, averages.empty(layer.stack, layer.shape, layer.dtype))

    def observe(layer, state, evidence):
        found = modes.contractions(layer, state.factors, evidence)
        return state._replace(factors=averages.update(state.factors, found, decay))  # 1

    def refresh(layer, state, damping):
        del layer, damping
        factors = averages.mean(state.factors)

        def afresh():
            basis = tuple(eigh(factor)[1] for factor in factors)  # 2
            turns = [_turn(old, new) for old, new in zip(state.basis, basis, strict=True)]
            return basis, modes.product(state.scale.total, turns)  # 3'

        def moved():
            basis, total = [], state.scale.total
            for mode, (side, factor) in enumerate(zip(state.basis, factors, strict=True)):
                found, order = iterated(side, factor)  # 2
                basis.append(found)
                total = total if order is None else modes.reordered(total, mode, len(factors), order)  # 3
            return tuple(basis), total

        if refresh_by == "eigh":
            basis, total = afresh()
        else:
            basis, total = lax.cond(jnp.all(state.scale.weight > 0), moved, afresh)
        return state._replace(basis=basis, scale=state.scale._replace(total=total))

    def rescale(layer, state, evidence):
        gradient, weight = modes.draws(layer, evidence)
        seen = modes.product(gradient, (None, *state.basis))
        square = jnp.sum(seen**2, axis=len(layer.stack)) / weight
        return state._replace(scale=averages.update(state.scale, square, decay))  # 4

    def apply(layer, state, gradient, damping):
        del layer
        scale = averages.mean(state.scale)
        precision = jnp.finfo(scale.dtype)
        floor = precision.tiny  # of zeros the direction is zero
        if any(side is not None for side in state.basis):
            largest = jnp.max(scale, axis=range(-len(state.basis), 0), keepdims=True)
            floor = jnp.maximum(floor, (_NOISE * precision.eps) ** 2 * largest)
        seen = modes.product(gradient, state.basis) / jnp.sqrt(scale + jnp.maximum(damping, floor))
        return modes.product(seen, [side if side is None else transpose(side) for side in state.basis])  # 5

    return Method(init, observe, refresh, apply, rescale)


def _turn(old: Array | None, new: Array | None) -> Array | None:
    """The squared entries of Q^T Q', which carry a diagonal from the basis Q to Q'."""
    return None if old is None or new is None else matmul(transpose(old), new) ** 2


def scale_by_soap(
    layers: Layers | None = None,
    *,
    damping: Damping = 1e-16,
    refresh: Refresh = "qr",
    kernels: Modes = "flatten_spatial",
    merge: int | None = None,
    block_size: int | None = None,
    statistics: Statistics = "gradient",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 1,
    refresh_every: int | Array = 10,
    rescale_every: int | Array = 1,
    early_refresh: bool = False,
    max_factor_dim: int = 10_000,
) -> optax.GradientTransformationExtraArgs:
    """The SOAP direction: what comes in, over the root of the gradient's second moments, in the eigenbasis of Shampoo.

    Args:
        layers: from `capture.layers`; without them the shapes of the parameter arrays are all that is known: groups of
            a convolution then share their bases, and the stack of a scanned layer is a mode like others.
        damping: added to the second moments under the root, in the units of the squared gradient; its schedule, if a
            function.
        refresh: how the eigenvectors are found. "qr": by one step of orthogonal iteration from the old ones, after a
            first refresh by "eigh"; "eigh": afresh.
        kernels: the modes of a convolution's kernel: "flatten_spatial", (window, C, O); "matrix", (window C, O); "all",
            each of its axes. Without `layers`, of any array of three axes or more. Modes of one entry do not count.
        merge: neighbouring modes are joined while their product is at most this; None to join none. What has but one
            mode left is a vector.
        block_size: modes longer than this are cut into blocks, each with a basis of its own; None to cut none.
        statistics: "gradient": from the gradient itself; "curvature": from the labels of the capture, of the gradient
            of their mean loss, which costs a backward pass each `rescale_every`. Where drawn labels have no gradient,
            that of the true ones is divided by the root of the damping alone: 1e-16 is then far too small.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics.
        refresh_every: steps between refreshes of the basis.
        rescale_every: steps between measurements in the basis; there is one after every refresh in any case. Of more
            than one step, they ask for a larger damping, too.
        early_refresh: whether to refresh at every statistics step until the first period is over.
        max_factor_dim: a mode longer than this keeps its own coordinates.

    Returns:
        A transformation; `update` needs `curvature` only if the statistics are of it. Its extra argument `gradient` is
        the gradient where something stands in front of the direction.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if a word is unknown or a number out of its range.
    """
    checks.choice("refresh", refresh, REFRESHES)
    return lift_tensors(
        lambda decay: soap_block(decay, refresh, max_factor_dim),
        cut_in_modes(kernels, merge, block_size),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, rescale_every, early_refresh),
        statistics=statistics,
        scale="batch",
    )


def soap(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers | None = None,
    *,
    damping: Damping = 1e-16,
    refresh: Refresh = "qr",
    kernels: Modes = "flatten_spatial",
    merge: int | None = None,
    block_size: int | None = None,
    statistics: Statistics = "gradient",
    decay: ScalarOrSchedule = 0.95,
    statistics_every: int | Array = 1,
    refresh_every: int | Array = 10,
    rescale_every: int | Array = 1,
    early_refresh: bool = False,
    max_factor_dim: int = 10_000,
    momentum: Scalar | Quadratic | None = 0.95,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: the bias-corrected average of the gradient, its direction, decoupled weight decay, the learning rate.

    Decay, momentum and period are those of the paper's code, which has a learning rate of 3e-3 and a weight decay of
    0.01. As with Adam, and unlike with the methods that divide by a curvature, every coordinate moves by about the
    learning rate; it does so from the first step on, hence a warm-up.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: see `scale_by_soap`.
        damping: see `scale_by_soap`; or `adaptive_damping(...)`.
        refresh: see `scale_by_soap`.
        kernels: see `scale_by_soap`.
        merge: see `scale_by_soap`.
        block_size: see `scale_by_soap`.
        statistics: see `scale_by_soap`.
        decay: see `scale_by_soap`.
        statistics_every: see `scale_by_soap`.
        refresh_every: see `scale_by_soap`.
        rescale_every: see `scale_by_soap`.
        early_refresh: see `scale_by_soap`.
        max_factor_dim: see `scale_by_soap`.
        momentum: weight of the old value in the average of the gradient, or, behind the direction, "quadratic"; None
            for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature` only if the statistics are of it.
    """
    direction = scale_by_soap(
        layers,
        damping=damping,
        refresh=refresh,
        kernels=kernels,
        merge=merge,
        block_size=block_size,
        statistics=statistics,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        rescale_every=rescale_every,
        early_refresh=early_refresh,
        max_factor_dim=max_factor_dim,
    )
    return complete(direction, learning_rate, damping, None, momentum, weight_decay, weight_decay_mask, optax.ema)
