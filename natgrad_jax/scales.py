"""Second moments measured in an eigenbasis: the diagonal that stands in the place of the Kronecker eigenvalues."""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax

from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Evidence, Layer, Scalar
from natgrad_jax.damping import split_damping
from natgrad_jax.eigenbasis import (
    Basis,
    damped_solve,
    eigenbasis,
    example_moments,
    into,
    mean_squares,
    rotated,
    warm_eigenbasis,
)
from natgrad_jax.layers import input_moment, input_rows, output_rows, total
from natgrad_jax.linalg import Diagonal, Factor, trace

Estimator = Literal["per_example", "minibatch"]
ESTIMATORS = ("per_example", "minibatch")
Refresh = Literal["eigh", "qr"]
REFRESHES = ("eigh", "qr")
Split = Literal["exact", "pi", "even"]
SPLITS = get_args(Split)


def refreshed(
    inputs: Factor, outputs: Factor, basis: Basis, scale: Average, estimator: Estimator, refresh: Refresh
) -> tuple[Basis, Average]:
    """The basis of a Kronecker pair, and what the scale starts from in it.

    Of eigenvectors made afresh ("eigh") the scale is empty, or for "minibatch" the Kronecker eigenvalues, diag(U^T A U)
    diag(V^T G V)^T. A step from the old basis ("qr") keeps the scale, which moves with the columns; the first refresh
    is one by "eigh", of all copies of a stack if one of them has no scale yet.

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        basis: the old one.
        scale: the average of the scale in the old basis.
        estimator: "per_example" or "minibatch".
        refresh: "eigh" or "qr".

    Returns:
        The new basis, and the average of the scale in it.
    """

    def cold():
        found, eigenvalues = eigenbasis(inputs, outputs)
        if estimator == "minibatch":
            return found, Average(eigenvalues, jnp.ones_like(scale.weight))
        return found, Average(jnp.zeros_like(scale.total), jnp.zeros_like(scale.weight))

    def warm():
        found, moved = warm_eigenbasis(basis, scale.total, inputs, outputs)
        return found, scale._replace(total=moved)

    if refresh == "eigh":
        return cold()
    return lax.cond(jnp.all(scale.weight > 0), warm, cold)


def measured(layer: Layer, basis: Basis, evidence: Evidence, estimator: Estimator) -> Array:
    """The second moments in a basis that one batch shows.

    "per_example": E[(U^T D V)^2], D = sum_t a g^T the gradient of one example, whatever its positions do.
    "minibatch": (U^T (sum_n D_n) V)^2 / W, averaged over draws; unbiased for sampled labels only.

    Args:
        layer: the layer.
        basis: U and V.
        evidence: of the batch.
        estimator: "per_example" or "minibatch".

    Returns:
        [S, I, O].
    """
    return _minibatch(layer, basis, evidence) if estimator == "minibatch" else _per_example(layer, basis, evidence)


def solve(
    basis: Basis, scale: Array, pair: tuple[Factor, Factor], gradient: Array, damping: Scalar, split: Split
) -> Array:
    """The gradient over the damped scale, in a basis.

    "exact" divides by scale + damping. The other splits damp as a Kronecker product is damped, (s + x)(r + y) in the
    place of s r: they divide by scale + x r + y s + x y, where s and r are the sums of the scale over its columns and
    over its rows, in the units of A and of G. Where the scale is the product of the eigenvalues of A and G, that is
    the damping of the pair.

    Args:
        basis: U and V.
        scale: second moments in the basis [S, I, O], not negative.
        pair: A [S, I, I] and G [S, O, O], for their traces.
        gradient: [S, I, O].
        damping: strength in the units of the scale, [] or [S].
        split: "exact", "pi" or "even".

    Returns:
        [S, I, O].
    """
    if split == "exact":
        return damped_solve(basis, scale, gradient, damping)
    tops = [jnp.where(trace(side) > 0, trace(side), 1)[..., None] for side in pair]
    rows, columns = jnp.sum(scale, axis=-1) / tops[1], jnp.sum(scale, axis=-2) / tops[0]
    x, y = split_damping(Diagonal(rows), Diagonal(columns), damping, split)
    cross = x[..., None, None] * columns[..., None, :] + y[..., None, None] * rows[..., :, None]
    return damped_solve(basis, scale + cross, gradient, x * y)


def _per_example(layer: Layer, basis: Basis, evidence: Evidence) -> Array:
    if evidence.cotangents is None:  # g = identity: F = A (x) I
        moment = input_moment(layer, evidence, full=basis.inputs is not None)
        return jnp.broadcast_to(mean_squares(basis.inputs, moment)[..., None], (*layer.stack, *layer.shape))
    rows = rotated(input_rows(layer, evidence), basis.inputs)
    columns = rotated(output_rows(layer, evidence), basis.outputs)
    return example_moments(rows, columns) / total(evidence, rows.shape[-3])


def _minibatch(layer: Layer, basis: Basis, evidence: Evidence) -> Array:
    if evidence.gradient is None or evidence.count is None:
        raise ValueError(
            f"The evidence for layer {layer.name!r} has no `gradient` or no `count`, which the estimator 'minibatch' "
            'needs; take the evidence from `capture.value_and_grad`, with other `labels` than "forward".'
        )
    return jnp.mean(into(basis, evidence.gradient) ** 2, axis=-3) / evidence.count
