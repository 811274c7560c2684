"""TNT: the gradient as a tensor-normal variable, whose covariance is one Kronecker factor for each mode.

    1  H_i <- EMA(G_(i) G_(i)^T / W) for every mode i, G the gradient of sampled labels, summed          observe
    2  t <- tr H_1 ( = tr H_i),  c <- (t / n)^(1/k),  n = n_1 ... n_k                                    refresh
    3  U_i <- H_i / (c^(k-1) n / n_i), so that the mean eigenvalue of every U_i is c                     refresh
    4  P_i <- (U_i + e I)^-1,  e = damping^(1/k)                                                         refresh
    5  direction <- dW x_1 P_1 ... x_k P_k                                                               apply

G_(i) is the unfolding [n_i, all other modes] of a tensor of k modes, x_i the product with a matrix in mode i; `modes`
has both. With `split="per_mode"` e is the damping itself, as in the authors' code: a total of damping^k, which differs
between kernels and biases. With `normalise=False` lines 3 and 5 are

    3' U_i <- H_i
    5' direction <- t^(k-1) dW x_1 P_1 ... x_k P_k

Ren and Goldfarb (2021), https://arxiv.org/abs/2106.02925. The product of the U_i is the covariance itself where that is
a Kronecker product. Every parameter array is a tensor by itself: a dense kernel has the modes (I, O), that of a
convolution (window, C, O), and a bias or a norm's parameters one. In expectation the H_i are partial traces of F;
adding e to factors of equal mean eigenvalue is the pi damping of K-FAC, for k factors.

The paper's experiments take the gradient of the batch's MEAN loss and never multiply by its size W, which is F / W in
the place of F (`scale="batch"`). With one learning rate a, damping e in each mode and weight decay d this is

    a, e, d  of the scale of a batch  =  a W, e W^(1/k), d / W  of the scale of an example,

and with `split="total"` the damping itself is multiplied by W, whatever k is.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.modes import product
from natgrad_jax.algebra.stacks import Factor, damped_inverse, per_stack, trace
from natgrad_jax.algebra.truncated import Kept
from natgrad_jax.around.adaptive import Damping
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.blocks import tensor
from natgrad_jax.layers.views import Modes, in_modes, view
from natgrad_jax.lift.evidence import Scale
from natgrad_jax.settings import Completed, OfTensors, Transformation, direction_of_tensors, optimizer_of_tensors

Split = Literal["total", "per_mode"]


@dataclass(frozen=True, kw_only=True)
class TNT(OfTensors):
    """The TNT direction, dW x_1 P_1 ... x_k P_k for every parameter array."""

    split: Annotated[
        Split,
        '"total": the k-th root of the damping in each of k modes; "per_mode": the damping itself in each, as in the '
        "authors' code, in units of the k-th root of F.",
    ] = "total"
    kernels: Annotated[
        Modes,
        "the modes of a convolution's kernel, or of any array of three axes or more that is of no known layer: "
        '"flatten_spatial", (window, C, O); "matrix", (window C, O), as in K-FAC; "all", each of its axes.',
    ] = "flatten_spatial"
    scale: Annotated[
        Scale,
        '"example": the statistics, and the damping, are in the units of F; "batch": of F / W, as in the paper\'s '
        "experiments. Statistics of the gradient have its own units, whatever this says: those of a batch.",
    ] = "example"
    estimator: Annotated[
        tensor.Estimator,
        '"minibatch": from the gradient summed over the batch; "per_example": from the gradient of each example, which '
        "has the same mean, less noise, and the cost of TKFAC's factors, and needs `layers`.",
    ] = "minibatch"
    normalise: Annotated[
        bool, "whether the factors are brought to equal mean eigenvalues before they are damped, as in the paper."
    ] = True
    decay: ScalarOrSchedule = 0.9

    @property
    def units(self) -> Scale:
        """Of statistics of the curvature."""
        return self.scale

    def see(self, source: Layer) -> Layer:
        """An array in its modes."""
        return view(source, in_modes(source, self.kernels))

    def lifted(self, layers: Layers | None) -> Transformation:
        """The direction for the layers of a model, or for arrays of any model."""
        if self.estimator == "per_example" and (layers is None or self.statistics == "gradient"):
            raise ValueError(
                "`estimator` is 'per_example', which takes the gradients of the examples from the activations of known "
                'layers: pass the `layers` of the model, with `statistics="curvature"`, or take "minibatch".'
            )
        return super().lifted(layers)

    def method(self, decay: Scalar) -> Method:
        """The functions of one tensor."""

        def init(layer):
            kept = Kept(self.max_factor_dim)
            return tensor.empty(layer, kept), tensor.identities(layer, kept)

        def observe(layer, factors, evidence):
            found = tensor.contractions(layer, factors, evidence, estimator=self.estimator)
            return averages.update(factors, found, decay)  # 1

        def refresh(layer, factors, operator, damping):
            del operator
            means, count = averages.mean(factors), len(layer.shape)
            strength = jnp.asarray(damping, layer.dtype) ** (1 if self.split == "per_mode" else 1 / count)
            total = trace(means[0])  # 2
            scales = _scales(total, layer.shape) if self.normalise else [jnp.ones_like(total)] * count
            units = [_times(factor, scale) for factor, scale in zip(means, scales, strict=True)]  # 3
            first, *others = (damped_inverse(unit, strength) for unit in units)  # 4
            first = first if self.normalise else _times(first, total ** (count - 1))  # of 5'
            return (first, *others)

        def apply(layer, operator, gradient, damping):
            del layer, damping
            return product(gradient, operator)  # 5

        return Method(init, observe, refresh, apply, holds=True)


def _scales(total: Array, sizes: tuple[int, ...]) -> list[Array]:
    """n_i / (c^(k-1) n) [S] of each mode; 1 where the trace is zero."""
    whole, count = prod(sizes), len(sizes)
    mean = (jnp.where(total > 0, total, whole) / whole) ** (1 / count)
    return [jnp.where(total > 0, size / (mean ** (count - 1) * whole), 1) for size in sizes]


def _times(factor: Factor, scale: Array) -> Factor:
    return jax.tree.map(lambda leaf: leaf * per_stack(scale, leaf), factor)


@dataclass(frozen=True, kw_only=True)
class TNTOptimizer(Completed, TNT):
    """TNT as in its paper's experiments: heavy-ball momentum in FRONT of the direction, decoupled weight decay behind.

    Decay, momentum and periods are those of the paper's convolutional nets; its autoencoders took statistics at every
    step and refreshed every 20. The damping is ours: theirs, 0.01 in each mode on the scale of a batch of 128, is a
    total of 1e-4 for a convolution, of 0.01 for a dense kernel and of 1 for a bias in the units of F. The bound of the
    clip is by `experiments/defaults.py`: 1e-3 left the best rates 1.6 and 4 times above those without a clip.
    """

    damping: Damping = 0.03
    kl_clip: Scalar | None = 1e-2  # tighter ones cost it its best rates
    smoothing = staticmethod(optax.trace)


scale_by_tnt = direction_of_tensors(TNT)
tnt = optimizer_of_tensors(TNTOptimizer)
