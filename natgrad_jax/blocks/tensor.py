"""What is kept of a tensor: one factor for each of its modes.

A tensor X [S, n_1, ..., n_k] is a parameter array seen by `layers.views`; its unfolding X_(i) is [S, n_i, all others].
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp

from natgrad_jax.algebra import averages, truncated
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.modes import contraction, partial_trace, product
from natgrad_jax.algebra.moments import gradient_moments, second_moment
from natgrad_jax.algebra.rows import OneHot
from natgrad_jax.algebra.stacks import Factor, einsum
from natgrad_jax.algebra.truncated import Kept, Moment, form
from natgrad_jax.base import Array, Evidence, Layer, Scalar
from natgrad_jax.layers.rows import gradient_matrix, input_rows, output_rows, partial_traces, total

Estimator = Literal["minibatch", "per_example"]


def empty(layer: Layer, kept: Kept) -> Average:
    """An average of no contractions yet: one factor for each mode, all under one weight.

    Args:
        layer: of kind "tensor".
        kept: as `identities` takes it.

    Returns:
        An average of weight 0, of a tuple of [S, n_i, n_i], `Diagonal`s, or `Truncated` ones.
    """
    return averages.of_zeros(identities(layer, kept), layer.stack, layer.dtype)


def identities(layer: Layer, kept: Kept) -> tuple[Factor, ...]:
    """Identity matrices in the place of the factors, each in a buffer of its own.

    Args:
        layer: of kind "tensor".
        kept: what a mode keeps.

    Returns:
        For each mode [S, n_i, n_i], a `Diagonal`, or `Truncated`.
    """
    return tuple(truncated.identity(layer.stack, size, layer.dtype, kept) for size in layer.shape)


def contractions(
    layer: Layer,
    average: Average,
    evidence: Evidence,
    *,
    estimator: Estimator = "minibatch",
    whiten: Sequence[Factor] | None = None,
) -> tuple[Any, ...]:
    """The second moments in every mode that one batch shows, averaged over draws.

    "minibatch": G_(i) G_(i)^T / W of the gradient G summed over the batch. "per_example": E[D_(i) D_(i)^T], D the
    gradient of one example; for sampled labels it has the same expectation and less noise. Of a parameter of no known
    layer, and of several arrays that make a kernel other than side by side, there is only the first.

    Args:
        layer: of kind "tensor".
        average: of what is measured, for which modes are full.
        evidence: of the batch.
        estimator: "minibatch" or "per_example".
        whiten: a factor for each mode, by which the gradient is multiplied in all modes but i before mode i is
            measured; the result is then divided by the product of their sizes. None for the gradient as it is.

    Returns:
        For each mode [S, n_i, n_i], or a `Diagonal` [S, n_i]; its products where they take fewer flops.
    """
    forms = [form(factor) for factor in average.total]
    full = [whole for whole, _ in forms]
    source = layer.geometry.source
    if estimator == "per_example" and (source.is_known or source.geometry) and evidence.cotangents is not None:
        return _of_examples(layer, evidence, full)
    gradient, weight = draws(layer, evidence)
    found = []
    for mode, (whole, rank) in enumerate(forms):
        seen = gradient
        if whiten is not None:
            others = [None if other == mode else factor for other, factor in enumerate(whiten)]
            seen = product(gradient, (None, *others)) * (layer.shape[mode] / prod(layer.shape)) ** 0.5
        found.append(contraction(seen, mode + 1, len(full) + 1, whole, rank))  # the draws are a mode in front
    return _over(tuple(found), weight)


def draws(layer: Layer, evidence: Evidence) -> tuple[Array, Array]:
    """The gradients [S, K, n_1, ..., n_k] of an evidence, and what the sum of their squares is divided by, K W."""
    gradient = gradient_matrix(layer, evidence)
    assert evidence.count is not None, "asked for in `lift.evidence`"
    count = jnp.maximum(evidence.count, 1e-30).astype(layer.dtype)
    return gradient, gradient.shape[len(layer.stack)] * count


def _of_examples(layer: Layer, evidence: Evidence, full: Sequence[bool]) -> tuple[Factor, ...]:
    """E[D_(i) D_(i)^T] of an array of a known layer."""
    source, split = layer.geometry.source, layer.geometry.split
    if not source.is_known:
        return _in_place(source, evidence, full)
    inputs, outputs = partial_traces(source, evidence, (any(full[:-1]), full[-1]))
    if len(split) == 2:
        return inputs, outputs
    found = [partial_trace(inputs, split[:-1], mode, whole) for mode, whole in enumerate(full[:-1])]
    return (*found, outputs)


def _in_place(source: Layer, evidence: Evidence, full: Sequence[bool]) -> tuple[Factor, ...]:
    """The same of a bias, or of one of several arrays side by side: from the rows and columns of their layer."""
    layer, first = source.geometry
    inputs, columns = input_rows(layer, evidence), output_rows(layer, evidence)
    assert not isinstance(inputs, OneHot), "a table is one array, without a bias"
    examples = columns.shape[-3]
    if len(source.shape) > 1:
        columns = columns[..., first : first + source.shape[1]]
        found = gradient_moments(inputs[..., : source.shape[0]], columns, (full[0], full[1]))
        return _over(found, jnp.maximum(total(evidence, examples), 1e-30))
    rows = einsum("...nt,...knto->...kno", inputs[..., -1], columns)  # a bias: summed where it is added
    if layer.grouped:  # all outputs in one vector
        rows = jnp.moveaxis(rows, len(layer.stack) - 1, -2)
        rows = rows.reshape(*rows.shape[:-2], -1)
    rows = rows[..., first : first + source.shape[0]]
    moment = second_moment(rows.reshape(*source.stack, -1, source.shape[0]), full=full[0])
    return _over((moment,), rows.shape[-3] * jnp.maximum(total(evidence, examples), 1e-30))


def _over(factors: tuple[Any, ...], count: Scalar) -> tuple[Any, ...]:
    def over(factor):
        if isinstance(factor, Moment):
            return factor.over(count)
        return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), factor)

    return tuple(map(over, factors))
