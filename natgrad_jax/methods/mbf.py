"""MBF, mini-block Fisher: small dense blocks on the diagonal of the empirical Fisher matrix.

    1  F_b <- EMA(mean of v v^T over the vectors v of the gradient that share block b)     observe
    2  P_b <- (F_b + damping I)^-1                                                         refresh
    3  direction <- P_b w for every such vector w of what comes in                         apply

A convolution has a block for each pair of channels, over the window; 10^5 of 9 x 9 are inverted in one call. In a
dense layer, its bias one more input, the vectors are the weights that leave an input, and all share one O x O block.
From one gradient G [I, O] the direction of dW is then dW (G^T G / I + damping 1)^-1, one side of a Kronecker product.
Biases of convolutions and parameters of norms have the diagonal, the smallest of mini-blocks, or the rule of the
authors' code,

    4  m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 m o m,  direction <- m / (1e-8 + sqrt(v / (1 - 0.999^t)))

at step t = 1, 2, ..., which looks like Adam but squares the mean of the gradients and corrects only v.

Bahamou, Goldfarb, Ren (2023), https://arxiv.org/abs/2202.04124. Its experiments take the gradient of the mean loss of
a batch, with the true labels, and so does `statistics="gradient"`: damping and learning rate then go with the size W of
the batch. Of the curvature of sampled or true labels the blocks are those of one example; then

    learning rate a, damping d, weight decay e of the mean gradient  =  a W, d W, e / W,

exactly for true labels, and but for line 4, which knows no damping and would be W times too long.

In the authors' code the vectors of a dense layer come from a row-major O x I matrix that is read as I x O, which is
another partition of its entries; `dense="literal"` repeats that. Not here: their Woodbury variant over a window of past
gradients.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, averages, checks
from natgrad_jax.addresses import Tree
from natgrad_jax.averages import Average, second_moment
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import Damping
from natgrad_jax.layers.views import axes, sources, view
from natgrad_jax.linalg import Diagonal, Factor, damped_inverse
from natgrad_jax.modes import draws, identities, product
from natgrad_jax.steps import of_gradient
from natgrad_jax.tensor_transform import Statistics, lift_tensors
from natgrad_jax.transform import Schedule

Dense = Literal["fan_out", "fan_in", "literal"]
DENSE = get_args(Dense)
Vectors = Literal["diagonal", "smoothed_rms"]
VECTORS = get_args(Vectors)


class MBFState(NamedTuple):
    """The averages of the blocks [S, n, n], and their inverses; of vectors, diagonals [S, n]."""

    blocks: Average
    inverses: Factor


def mbf_block(decay: Scalar, max_factor_dim: int = 8192) -> Method:
    """MBF of vectors that share a block: tensors [S, J, n] of J vectors each.

    Args:
        decay: weight of the old value in the averages.
        max_factor_dim: a block larger than this keeps only its diagonal.

    Returns:
        The four functions.
    """

    def init(layer):
        most = 0 if _is_vector(layer.geometry.source) else max_factor_dim
        _, identity = identities(layer, most)
        empty = Average(jax.tree.map(jnp.zeros_like, identity), jnp.zeros(layer.stack, layer.dtype))
        return MBFState(empty, identity)

    def observe(layer, state, evidence):
        gradient, weight = draws(layer, evidence)
        vectors = gradient.reshape(*layer.stack, -1, layer.shape[-1])
        moment = second_moment(vectors, full=not isinstance(state.blocks.total, Diagonal))
        mean = jax.tree.map(lambda leaf: leaf / (weight * layer.shape[0]), moment)
        return state._replace(blocks=averages.update(state.blocks, mean, decay))  # 1

    def refresh(layer, state, damping):
        del layer
        strength = jnp.asarray(damping, state.blocks.weight.dtype)
        return state._replace(inverses=damped_inverse(averages.mean(state.blocks), strength))  # 2

    def apply(layer, state, gradient, damping):
        del layer, damping
        return product(gradient, (None, state.inverses))  # 3

    return Method(init, observe, refresh, apply)


def _see(source: Layer, dense: Dense, shared: bool) -> Layer:
    """The vectors of a source as a tensor [S, blocks, J, n]."""
    window, others = axes(source)
    if window:
        return view(source, (1, prod(window), *others), (2, 3, 0, 1), stacked=2)
    if _is_vector(source):
        return view(source, (1, prod(source.shape)))
    rows, columns = others
    count, size = (columns, rows) if dense == "fan_in" else (rows, columns)
    order = (0, 1) if dense == "fan_out" else (1, 0)
    joined = (count, size) if shared else (count, 1, size)
    return view(source, others, order, joined=joined, stacked=0 if shared else 1)


def _is_vector(source: Layer) -> bool:
    return source.kind == "parameter" and len(source.shape) < 2


def _smoothed_rms() -> optax.GradientTransformationExtraArgs:
    """Line 4, of the gradient itself whatever stands in front."""
    rms = optax.scale_by_rms(0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
    return of_gradient(optax.chain(optax.ema(0.9, debias=False), rms))


def scale_by_mbf(
    layers: Layers | None = None,
    *,
    damping: Damping,
    dense: Dense = "fan_out",
    shared: bool = True,
    vectors: Vectors = "diagonal",
    statistics: Statistics = "gradient",
    decay: ScalarOrSchedule = 0.9,
    statistics_every: int | Array = 10,
    refresh_every: int | Array = 100,
    early_refresh: bool = True,
    max_factor_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The mini-block direction, (F_b + damping I)^-1 for every block of every parameter array.

    Args:
        layers: from `capture.layers`; without them the shapes of the parameter arrays are all that is known: a dense
            kernel does not know its bias, which is a vector by itself, and every array of three axes or more is the
            kernel of a convolution, also one of dense layers in a scan.
        damping: strength in the units of the statistics; its schedule, if a function.
        dense: the vectors of a dense layer: "fan_out", the weights that leave an input; "fan_in", those that enter an
            output; "literal", the partition of the authors' code.
        shared: whether the vectors of a dense layer share one block, their average, or have one each: then O x O
            numbers for each input.
        vectors: parameters without a block: "diagonal", or "smoothed_rms", line 4 above, each of whose steps is about
            as long as the learning rate, which must then be small.
        statistics: "gradient": from the gradient itself, in its units squared; "curvature": from the labels of the
            capture, sampled or true, in the units of F, the Fisher block of one example.
        decay: weight of the old value in the averages.
        statistics_every: steps between statistics.
        refresh_every: steps between inversions.
        early_refresh: whether to refresh at every statistics step until the first period is over.
        max_factor_dim: a block larger than this keeps only its diagonal.

    Returns:
        A transformation; `update` needs `curvature` only if the statistics are of it. Its extra argument `gradient` is
        the gradient where something stands in front of the direction.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if a word is unknown or a number out of its range.
    """
    checks.choice("dense", dense, DENSE)
    checks.choice("vectors", vectors, VECTORS)
    whole = ("dense",)
    blocks = lift_tensors(
        lambda decay: mbf_block(decay, max_factor_dim),
        lambda source: _see(source, dense, shared),
        layers,
        damping=damping,
        decay=decay,
        schedule=Schedule(statistics_every, refresh_every, early_refresh=early_refresh),
        statistics=statistics,
        whole=whole,
    )
    if vectors == "diagonal":
        return blocks

    def route(params: Tree) -> Tree:
        found = {
            leaf.address
            for source in sources(layers, params, whole=whole)
            if _is_vector(source)
            for leaf in source.leaves
        }
        names = {address: "vectors" if address in found else "blocks" for address in addresses.flatten(params)}
        return addresses.replace(params, names)

    return optax.partition({"blocks": blocks, "vectors": _smoothed_rms()}, route)


def mbf(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers | None = None,
    *,
    damping: Damping = 1e-3,
    dense: Dense = "fan_out",
    shared: bool = True,
    vectors: Vectors = "diagonal",
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
    """MBF as in its authors' experiments: heavy-ball momentum in FRONT of the direction, decoupled weight decay behind.

    The statistics are of the gradient without momentum. Decay, momentum and periods are those of the experiments'
    convolutional nets; their autoencoders took statistics every 2 steps and refreshed every 25. The tuned dampings are
    not public; 1e-3 is from the middle of the grid, for batches of 1000.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, or None.
        layers: see `scale_by_mbf`.
        damping: see `scale_by_mbf`; or `adaptive_damping(...)`.
        dense: see `scale_by_mbf`.
        shared: see `scale_by_mbf`.
        vectors: see `scale_by_mbf`.
        statistics: see `scale_by_mbf`.
        decay: see `scale_by_mbf`.
        statistics_every: see `scale_by_mbf`.
        refresh_every: see `scale_by_mbf`.
        early_refresh: see `scale_by_mbf`.
        max_factor_dim: see `scale_by_mbf`.
        momentum: weight of the old gradient in the buffer, or, behind the direction, "quadratic"; None for none.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature` only if the statistics are of it.
    """
    direction = scale_by_mbf(
        layers,
        damping=damping,
        dense=dense,
        shared=shared,
        vectors=vectors,
        statistics=statistics,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        early_refresh=early_refresh,
        max_factor_dim=max_factor_dim,
    )
    return complete(direction, learning_rate, damping, None, momentum, weight_decay, weight_decay_mask, optax.trace)
