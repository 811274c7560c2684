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

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import optax

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.branches import either
from natgrad_jax.algebra.eigenbasis import columns, moved
from natgrad_jax.algebra.eigenbasis import turned as off_diagonal
from natgrad_jax.algebra.modes import product
from natgrad_jax.algebra.stacks import eigh
from natgrad_jax.algebra.trees import bias_corrected
from natgrad_jax.algebra.truncated import coordinates, filtered, squares, turn
from natgrad_jax.around.adaptive import Damping
from natgrad_jax.around.control import Quadratic
from natgrad_jax.base import Array, Method, Scalar
from natgrad_jax.blocks import rotated, tensor
from natgrad_jax.blocks.rotated import Refresh
from natgrad_jax.lift.state import Period, Schedule
from natgrad_jax.lift.tensors import Statistics
from natgrad_jax.settings import (
    Completed,
    OfCutTensors,
    Size,
    Steps,
    Tolerance,
    direction_of_tensors,
    optimizer_of_tensors,
)

_WIDEST = 10_000
_NOISE = 100  # roots of V below this many eps of the largest are rounding, and so is the gradient that they divide


class Turned(NamedTuple):
    """The Q_i [S, n_i, n_i], fewer columns, or None, and the average of V [S, n_1, ..., n_k] in them."""

    basis: tuple[Array | None, ...]
    scale: Average


@dataclass(frozen=True, kw_only=True)
class SOAP(OfCutTensors):
    """The SOAP direction: what comes in, over the root of the gradient's second moments, in the eigenbasis of Shampoo.

    The damping is added to the second moments under the root, in the units of the squared gradient. With statistics of
    the curvature each `rescale_every` costs a backward pass. Where drawn labels have no gradient, the gradient of the
    true ones is divided by the root of the damping alone: 1e-16 is then far too small. An array of one mode is a
    vector.
    """

    refresh: Annotated[
        Refresh,
        'how the eigenvectors are found. "qr": by one step of orthogonal iteration from the old ones, after a first '
        'refresh by "eigh"; "eigh": afresh.',
    ] = "qr"
    rescale_every: Annotated[
        Period,
        "steps between measurements in the basis; there is one after every refresh in any case. Of more than one step, "
        "they ask for a larger damping, too.",
        Steps(),
    ] = 1
    refresh_tolerance: Tolerance = None
    damping: Damping = 1e-16
    statistics: Statistics = "gradient"
    statistics_every: Period = 1
    refresh_every: Period = 10
    early_refresh: bool = False
    max_factor_dim: Annotated[
        int | None, "a mode longer than this keeps its own coordinates; None for 10,000.", Size(0)
    ] = None

    @property
    def schedule(self) -> Schedule:
        """The periods."""
        return Schedule(
            *(self.statistics_every, self.refresh_every, self.rescale_every, self.early_refresh),
            rolling=self.rolling,
            tolerance=self.refresh_tolerance,
        )

    def method(self, decay: Scalar) -> Method:
        """The functions of one tensor."""

        def init(layer):
            most = _WIDEST if self.max_factor_dim is None else self.max_factor_dim
            kept = self.kept._replace(most=most if len(layer.shape) > 1 else 0)
            basis = tuple(map(columns, tensor.identities(layer, kept)))
            shape = tuple(map(coordinates, basis, layer.shape))
            return tensor.empty(layer, kept), Turned(basis, averages.empty(layer.stack, shape, layer.dtype))

        def observe(layer, factors, evidence):
            return averages.update(factors, tensor.contractions(layer, factors, evidence), decay)  # 1

        def refresh(layer, factors, operator, damping):
            del layer, damping
            means, (old, scale) = averages.mean(factors), operator

            def afresh(means, old, scale):
                basis = tuple(eigh(factor)[1] for factor in means)  # 2
                turns = [None if new is None else turn(before, new) for before, new in zip(old, basis, strict=True)]
                return basis, product(scale.total, turns)  # 3'

            def step(means, old, scale):
                basis, total = [], scale.total
                for mode, (side, factor) in enumerate(zip(old, means, strict=True)):
                    found, total = moved(side, factor, total, mode - len(means))  # 2, 3
                    basis.append(found)
                return tuple(basis), total

            if self.refresh == "eigh":
                basis, total = afresh(means, old, scale)
            else:
                basis, total = either(jnp.all(scale.weight > 0), step, afresh, means, old, scale)
            return Turned(basis, scale._replace(total=total))

        def rescale(layer, operator, evidence):
            gradient, weight = tensor.draws(layer, evidence)
            square = jnp.sum(squares(gradient, operator.basis), axis=len(layer.stack)) / weight
            return operator._replace(scale=averages.update(operator.scale, square, decay))  # 4

        def apply(layer, operator, gradient, damping):
            del layer
            scale, basis = averages.mean(operator.scale), operator.basis
            precision = jnp.finfo(scale.dtype)
            floor = precision.tiny  # of zeros the direction is zero
            if any(side is not None for side in basis):
                largest = jnp.max(scale, axis=range(-len(basis), 0), keepdims=True)
                floor = jnp.maximum(floor, (_NOISE * precision.eps) ** 2 * largest)
            return filtered(gradient, basis, 1 / jnp.sqrt(scale + jnp.maximum(damping, floor)))  # 5

        def turned(layer, factors, operator):
            del layer
            means = averages.mean(factors)
            found = [off_diagonal(*each) for each in zip(operator.basis, means, strict=True)]
            return jnp.where(operator.scale.weight > 0, jnp.max(jnp.stack(found), axis=0), 1)

        parts = rotated.gradual(averages.mean, tuple)
        return Method(init, observe, refresh, apply, rescale, turned=turned, gradual=parts)


def _smoothed(decay: Scalar) -> optax.GradientTransformation:
    """The average of the gradients, its bias corrected."""
    average = optax.ema(decay, debias=False)

    def update(updates, state, params=None):
        updates, state = average.update(updates, state, params)
        return bias_corrected(updates, decay, optax.tree.get(state, "count")), state

    return optax.GradientTransformation(average.init, update)


@dataclass(frozen=True, kw_only=True)
class SOAPOptimizer(Completed, SOAP):
    """SOAP: the bias-corrected average of the gradient, its direction, decoupled weight decay, the learning rate.

    Decay, momentum and period are those of the paper's code, which has a learning rate of 3e-3 and a weight decay of
    0.01. As with Adam, every coordinate moves by about the learning rate, unlike with methods that divide by a
    curvature. So do the first steps: use a warm-up.
    """

    momentum: Scalar | Quadratic | None = 0.95
    kl_clip: Scalar | None = 1e-2  # its directions are divided by a root: no divergence, and longer
    smoothing = staticmethod(_smoothed)


scale_by_soap = direction_of_tensors(SOAP)
soap = optimizer_of_tensors(SOAPOptimizer)
