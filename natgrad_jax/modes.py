"""Algebra of tensors by their modes: contractions, and products with one factor for each mode.

A tensor X [S, n_1, ..., n_k] has k modes. Its unfolding X_(i) is the matrix [S, n_i, all others].
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from natgrad_jax.averages import Average, second_moment
from natgrad_jax.base import Array, Evidence, Layer, Scalar
from natgrad_jax.layers import partial_traces, total
from natgrad_jax.linalg import Diagonal, Factor, diagonal, einsum

Estimator = Literal["minibatch", "per_example"]
ESTIMATORS = get_args(Estimator)

_LETTERS = "abcdefghijklmnopqrstuvwxy"


def empty(layer: Layer, most: int) -> Average:
    """An average of no contractions yet: one factor for each mode, all under one weight.

    Args:
        layer: of kind "tensor".
        most: the largest size of a mode of which the whole factor is kept.

    Returns:
        An average of weight 0, of a tuple of [S, n_i, n_i], or `Diagonal`s.
    """
    zeros = jax.tree.map(jnp.zeros_like, identities(layer, most))
    return Average(zeros, jnp.zeros(layer.stack, layer.dtype))


def identities(layer: Layer, most: int) -> tuple[Factor, ...]:
    """Identity matrices in the place of the factors, or their diagonals; each in a buffer of its own."""

    def factor(size):
        if size <= most:
            return jnp.zeros((*layer.stack, size, size), layer.dtype) + jnp.eye(size, dtype=layer.dtype)
        return Diagonal(jnp.ones((*layer.stack, size), layer.dtype))

    return tuple(map(factor, layer.shape))


def contractions(
    layer: Layer,
    average: Average,
    evidence: Evidence,
    *,
    estimator: Estimator = "minibatch",
    whiten: Sequence[Factor] | None = None,
) -> tuple[Factor, ...]:
    """The second moments in every mode that one batch shows, averaged over draws.

    "minibatch": G_(i) G_(i)^T / W of the gradient G summed over the batch. "per_example": E[D_(i) D_(i)^T], D the
    gradient of one example; for sampled labels it has the same expectation and less noise. Of a parameter of no known
    layer there is only the first.

    Args:
        layer: of kind "tensor".
        average: of what is measured, for which modes are full.
        evidence: of the batch.
        estimator: "minibatch" or "per_example".
        whiten: a factor for each mode, by which the gradient is multiplied in all modes but i before mode i is
            measured; the result is then divided by the product of their sizes. None for the gradient as it is.

    Returns:
        For each mode [S, n_i, n_i], or a `Diagonal` [S, n_i].
    """
    full = [not isinstance(factor, Diagonal) for factor in average.total]
    if estimator == "per_example" and evidence.cotangents is not None:
        return _of_examples(layer, evidence, evidence.cotangents, full)
    gradient, weight = draws(layer, evidence)
    found = []
    for mode, form in enumerate(full):
        seen = gradient
        if whiten is not None:
            others = [None if other == mode else factor for other, factor in enumerate(whiten)]
            seen = product(gradient, (None, *others)) * (layer.shape[mode] / prod(layer.shape)) ** 0.5
        found.append(contraction(seen, mode + 1, len(full) + 1, form))  # the draws are a mode in front
    return _over(tuple(found), weight)


def draws(layer: Layer, evidence: Evidence) -> tuple[Array, Array]:
    """The gradients [S, K, n_1, ..., n_k] of an evidence, and what the sum of their squares is divided by, K W."""
    assert evidence.gradient is not None and evidence.count is not None, "checked in `checks.lazy_evidence`"
    count = jnp.maximum(evidence.count, 1e-30).astype(layer.dtype)
    return evidence.gradient, evidence.gradient.shape[len(layer.stack)] * count


def _of_examples(
    layer: Layer, evidence: Evidence, cotangents: tuple[Array, ...] | Array, full: Sequence[bool]
) -> tuple[Factor, ...]:
    """E[D_(i) D_(i)^T] of an array of a known layer."""
    source, split = layer.geometry.source, layer.geometry.split
    if source.kind == "parameter":  # a bias: its gradient is the sum of the cotangents of an example
        lead = 1 + len(source.stack)
        calls = cotangents if isinstance(cotangents, tuple) else (cotangents,)
        sums = [jnp.sum(g.reshape(g.shape[: lead + 1] + (-1, g.shape[-1])), axis=-2) for g in calls]
        rows = jnp.moveaxis(sum(sums[1:], sums[0]), 0, -3).astype(layer.dtype)  # [S, K, N, O]
        count, examples = rows.shape[-3:-1]
        moment = second_moment(rows.reshape(*source.stack, count * examples, -1), full=full[0])
        return _over((moment,), count * jnp.maximum(total(evidence, examples), 1e-30))
    inputs, outputs = partial_traces(source, evidence, (any(full[:-1]), full[-1]))
    if len(split) == 2:
        return inputs, outputs
    found = [_partial_trace(inputs, split[:-1], mode, whole) for mode, whole in enumerate(full[:-1])]
    return (*found, outputs)


def _partial_trace(factor: Factor, sizes: tuple[int, ...], mode: int, full: bool) -> Factor:
    """Of a second moment of tensors as vectors, that of one of their modes."""
    stack = diagonal(factor).shape[:-1]
    if isinstance(factor, Diagonal) or not full:
        others = [axis - len(sizes) for axis in range(len(sizes)) if axis != mode]
        return Diagonal(jnp.sum(diagonal(factor).reshape(stack + sizes), axis=others))
    letters = _LETTERS[: len(sizes)]
    other = letters.replace(letters[mode], "z")
    return einsum(f"...{letters}{other}->...{letters[mode]}z", factor.reshape(stack + sizes + sizes))


def _over(factors: tuple[Factor, ...], count: Scalar) -> tuple[Factor, ...]:
    return tuple(jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), factor) for factor in factors)


def contraction(tensor: Array, mode: int, count: int, full: bool = True) -> Factor:
    """X_(i) X_(i)^T.

    Args:
        tensor: [S, n_1, ..., n_k].
        mode: i, from 0.
        count: k.
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [S, n_i, n_i], or a `Diagonal` [S, n_i].
    """
    letters = _LETTERS[:count]
    if not full:
        return Diagonal(jnp.sum(tensor**2, axis=[axis - count for axis in range(count) if axis != mode]))
    other = letters.replace(letters[mode], "z")
    return einsum(f"...{letters},...{other}->...{letters[mode]}z", tensor, tensor)


def product(tensor: Array, factors: Sequence[Factor | None]) -> Array:
    """The tensor times a matrix in every mode, X_(i) -> M_i^T X_(i).

    Args:
        tensor: [S, n_1, ..., n_k].
        factors: of each mode a matrix M_i [S, n_i, m_i], its diagonal, or None for the identity.

    Returns:
        [S, m_1, ..., m_k].
    """
    count = len(factors)
    letters = _LETTERS[:count]
    for mode, factor in enumerate(factors):
        if isinstance(factor, Diagonal):
            entries = factor.entries
            shape = entries.shape[:-1] + (1,) * mode + entries.shape[-1:] + (1,) * (count - 1 - mode)
            tensor = tensor * entries.reshape(shape)
        elif factor is not None:
            found = letters.replace(letters[mode], "z")
            tensor = einsum(f"...{letters},...{letters[mode]}z->...{found}", tensor, factor)
    return tensor


def reordered(tensor: Array, mode: int, count: int, order: Array) -> Array:
    """The tensor [S, n_1, ..., n_k] with the entries along mode i, of k, in an order [S, n_i]."""
    order = order.reshape(order.shape[:-1] + (1,) * mode + order.shape[-1:] + (1,) * (count - 1 - mode))
    return jnp.take_along_axis(tensor, order, axis=mode - count)
