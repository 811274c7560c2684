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

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra import averages
from natgrad_jax.algebra.modes import product
from natgrad_jax.algebra.moments import second_moment
from natgrad_jax.algebra.stacks import Diagonal, damped_inverse
from natgrad_jax.algebra.truncated import Kept
from natgrad_jax.around.adaptive import Damping
from natgrad_jax.around.graft import divide_by_rms, of_gradient
from natgrad_jax.base import Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.blocks import tensor
from natgrad_jax.layers.views import axes, sources, view
from natgrad_jax.lift.tensors import Statistics
from natgrad_jax.settings import Completed, OfTensors, Transformation, direction_of_tensors, optimizer_of_tensors

Dense = Literal["fan_out", "fan_in", "literal"]
Vectors = Literal["diagonal", "smoothed_rms"]


@dataclass(frozen=True, kw_only=True)
class MBF(OfTensors):
    """The mini-block direction, (F_b + damping I)^-1 for every block of every parameter array.

    Without layers a dense kernel and its bias are separate arrays, and every array of three axes or more counts as the
    kernel of a convolution.
    """

    dense: Annotated[
        Dense,
        'the vectors of a dense layer: "fan_out", the weights that leave an input; "fan_in", those that enter an '
        'output; "literal", the partition of the authors\' code. The shorter ones are cheaper.',
    ] = "fan_out"
    shared: Annotated[
        bool,
        "whether the vectors of a dense layer share one block, their average, or have one each: then O x O numbers for "
        "each input.",
    ] = True
    vectors: Annotated[
        Vectors,
        'parameters without a block: "diagonal", or "smoothed_rms", the rule of the authors\' code (line 4), each of '
        "whose steps is about as long as the learning rate, which must then be small.",
    ] = "diagonal"
    statistics: Statistics = "gradient"
    decay: ScalarOrSchedule = 0.9

    def see(self, source: Layer) -> Layer:
        """The vectors of a source as a tensor [S, blocks, J, n]."""
        window, others = axes(source)
        if window:
            return view(source, (1, prod(window), *others), (2, 3, 0, 1), stacked=2)
        if _is_vector(source):
            return view(source, (1, prod(source.shape)))
        rows, columns = others
        count, size = (columns, rows) if self.dense == "fan_in" else (rows, columns)
        order = (0, 1) if self.dense == "fan_out" else (1, 0)
        joined = (count, size) if self.shared else (count, 1, size)
        return view(source, others, order, joined=joined, stacked=0 if self.shared else 1)

    def whole(self, layer: Layer) -> bool:
        """Whether the bias of a layer is one more input: of all but convolutions."""
        return layer.is_known and not layer.window

    def lifted(self, layers: Layers | None) -> Transformation:
        """The direction for the layers of a model, or for arrays of any model."""
        blocks = super().lifted(layers)
        if self.vectors == "diagonal":
            return blocks

        def route(params: Tree) -> Tree:
            vectors = [source for source in sources(layers, params, whole=self.whole) if _is_vector(source)]
            found = {leaf.address for source in vectors for leaf in source.leaves}
            names = {address: "vectors" if address in found else "blocks" for address in addresses.flatten(params)}
            return addresses.replace(params, names)

        return optax.partition({"blocks": blocks, "vectors": _smoothed_rms()}, route)

    def method(self, decay: Scalar) -> Method:
        """The functions of vectors that share a block: tensors [S, J, n] of J vectors each."""

        def init(layer):
            _, identity = tensor.identities(
                layer, Kept(0 if _is_vector(layer.geometry.source) else self.max_factor_dim)
            )
            return averages.of_zeros(identity, layer.stack, layer.dtype), identity

        def observe(layer, blocks, evidence):
            gradient, weight = tensor.draws(layer, evidence)
            vectors = gradient.reshape(*layer.stack, -1, layer.shape[-1])
            moment = second_moment(vectors, full=not isinstance(blocks.total, Diagonal))
            mean = jax.tree.map(lambda leaf: leaf / (weight * layer.shape[0]), moment)
            return averages.update(blocks, mean, decay)  # 1

        def refresh(layer, blocks, operator, damping):
            del layer, operator
            return damped_inverse(averages.mean(blocks), jnp.asarray(damping, blocks.weight.dtype))  # 2

        def apply(layer, operator, gradient, damping):
            del layer, damping
            return product(gradient, (None, operator))  # 3

        return Method(init, observe, refresh, apply)


def _is_vector(source: Layer) -> bool:
    return not source.is_known and len(source.shape) < 2


def _smoothed_rms() -> optax.GradientTransformationExtraArgs:
    """Line 4, of the gradient itself whatever stands in front."""
    return of_gradient(optax.chain(optax.ema(0.9, debias=False), divide_by_rms(0.999, debias=True)))


@dataclass(frozen=True, kw_only=True)
class MBFOptimizer(Completed, MBF):
    """MBF as in its authors' experiments: heavy-ball momentum in FRONT of the direction, decoupled weight decay behind.

    The statistics are of the gradient without momentum. Decay, momentum and periods are those of the experiments'
    convolutional nets; their autoencoders took statistics every 2 steps and refreshed every 25. The tuned dampings are
    not public; 1e-3 is from the middle of the grid, for batches of 1000.
    """

    damping: Damping = 1e-3
    smoothing = staticmethod(optax.trace)


scale_by_mbf = direction_of_tensors(MBF)
mbf = optimizer_of_tensors(MBFOptimizer)
