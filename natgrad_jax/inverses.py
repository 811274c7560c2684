"""What is applied of a Kronecker pair: the inverses of its damped factors, or its eigenbasis."""

from typing import NamedTuple

import jax.numpy as jnp

from natgrad_jax.base import Array, Layer, Scalar
from natgrad_jax.damping import Split, split_damping
from natgrad_jax.eigenbasis import Basis, damped_solve, eigenbasis, standard
from natgrad_jax.linalg import Factor, damped_inverse, sandwich
from natgrad_jax.modes import identities


class Inverses(NamedTuple):
    """A^ [S, I, I] and G^ [S, O, O]."""

    inputs: Factor
    outputs: Factor


class Eigen(NamedTuple):
    """The basis (U, V) and the Kronecker eigenvalues s r^T [S, I, O]."""

    basis: Basis
    scale: Array


def identity(layer: Layer, most: int, split: Split) -> Inverses | Eigen:
    """What changes no gradient, of the shapes that `inverted` gives.

    Args:
        layer: the layer.
        most: the largest size of a side of which the whole factor is kept.
        split: as `inverted` takes it.

    Returns:
        Eigen if the split is "exact", else inverses.
    """
    ones = identities(layer, most)
    if split == "exact":
        return Eigen(standard(*ones), jnp.ones(layer.stack + layer.shape, layer.dtype))
    return Inverses(*ones)


def inverted(inputs: Factor, outputs: Factor, damping: Scalar, split: Split) -> Inverses | Eigen:
    """The inverse of a Kronecker pair, damped by a rule of `split_damping`; its eigenbasis if the split is "exact".

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        damping: strength in the units of A (x) G.
        split: how the damping enters.

    Returns:
        (A + x I)^-1 and (G + y I)^-1; or the eigenvectors and the products of the eigenvalues, without damping.
    """
    if split == "exact":
        return Eigen(*eigenbasis(inputs, outputs))
    x, y = split_damping(inputs, outputs, damping, split)
    return Inverses(damped_inverse(inputs, x), damped_inverse(outputs, y))


def solve(inverse: Inverses | Eigen, gradient: Array, damping: Scalar) -> Array:
    """The inverse applied to a gradient.

    Args:
        inverse: from `inverted`.
        gradient: [S, I, O].
        damping: what is added to the Kronecker eigenvalues; inverses hold theirs.

    Returns:
        [S, I, O].
    """
    if isinstance(inverse, Eigen):
        return damped_solve(inverse.basis, inverse.scale, gradient, damping)
    return sandwich(inverse.inputs, gradient, inverse.outputs)
