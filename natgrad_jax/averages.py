"""Moving averages that carry their weight, and second moments of rows and of gradients.

An average is a weighted sum and the sum of the weights, so that it is unbiased from the first value on: no zeros and
no identity leak into it. `decay` is everywhere the weight of the OLD value.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.base import Array, Scalar
from natgrad_jax.linalg import Diagonal, Factor, einsum, matmul


class Average(NamedTuple):
    """A moving average: total [S, ...], an array or a tree of them, and weight [S]. Empty where the weight is 0."""

    total: Any
    weight: Array


def empty(stack: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Average:
    """An average of nothing yet.

    Args:
        stack: S.
        shape: shape of one value.
        dtype: of the values and the weight.

    Returns:
        An average of weight 0.
    """
    return Average(jnp.zeros(stack + shape, dtype), jnp.zeros(stack, dtype))


def update(average: Average, value: Any, decay: Scalar) -> Average:
    """The average with one more value.

    With decay = k / (k + 1) for k = 0, 1, ... it is the running mean.

    >>> mean(update(empty((), (), "float32"), jnp.array(3.0), decay=0.95))
    Array(3., dtype=float32)

    Args:
        average: so far.
        value: [S, ...], or a tree as in the average.
        decay: weight of the old value, in [0, 1).

    Returns:
        The new average.
    """

    def mix(old, new):
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    return Average(jax.tree.map(mix, average.total, value), mix(average.weight, 1.0))


def mean(average: Average) -> Any:
    """The value of an average [S, ...]: total over weight; zeros where it is empty."""
    weight = jnp.where(average.weight > 0, average.weight, 1)
    return jax.tree.map(
        lambda leaf: leaf / jnp.reshape(weight, weight.shape + (1,) * (leaf.ndim - weight.ndim)), average.total
    )


def second_moment(rows: Array, weights: Array | None = None, full: bool = True) -> Factor:
    """Sum over rows of the outer product of a row with itself.

    Args:
        rows: [..., R, n].
        weights: of the rows, [..., R] or broadcastable to it.
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [..., n, n], or a `Diagonal` [..., n].
    """
    weighted = rows if weights is None else rows * weights[..., None]
    if not full:
        return Diagonal(jnp.sum(weighted * rows, axis=-2))
    return einsum("...ri,...rj->...ij", weighted, rows)


def paired_moments(inputs: Array, cotangents: Array, full: tuple[bool, bool] = (True, True)) -> tuple[Factor, Factor]:
    """Sum over examples and positions of |g|^2 a a^T and of |a|^2 g g^T, averaged over draws.

    Those of `gradient_moments` without the products of different positions of one example: the same at one position.

    Args:
        inputs: rows a [S, N, T, I].
        cotangents: rows g [S, K, N, T, O].
        full: for either side, whether to form the matrix, or only its diagonal.

    Returns:
        [S, I, I] and [S, O, O], or `Diagonal`s.
    """
    (rows, columns), stack = (inputs.shape[-1], cotangents.shape[-1]), inputs.shape[:-3]
    of_inputs = jnp.mean(jnp.sum(cotangents**2, axis=-1), axis=-3)  # [S, N, T]
    of_cotangents = jnp.sum(inputs**2, axis=-1)[..., None, :, :] / cotangents.shape[-4]  # [S, 1, N, T]
    of_cotangents = jnp.broadcast_to(of_cotangents, cotangents.shape[:-1])
    return (
        second_moment(inputs.reshape(*stack, -1, rows), of_inputs.reshape(*stack, -1), full[0]),
        second_moment(cotangents.reshape(*stack, -1, columns), of_cotangents.reshape(*stack, -1), full[1]),
    )


def gradient_moments(
    inputs: Array, cotangents: Array, full: tuple[bool, bool] = (True, True), most: int = 1 << 22
) -> tuple[Factor, Factor]:
    """Sum over examples of D D^T and of D^T D, D = sum_t a g^T the gradient of one, averaged over draws.

    Either D is formed, or the Gram matrices of the positions, D D^T = A^T (G G^T) A with A [T, I] and G [T, O] the rows
    of an example: whichever takes fewer flops. Many positions of few channels make the first 20 times faster, few of
    many the second 16 times (measured with T, I, O of 784, 10, 16 and of 16, 2305, 256).

    Args:
        inputs: rows a [S, N, T, I].
        cotangents: rows g [S, K, N, T, O].
        full: for either side, whether to form the matrix, or only its diagonal.
        most: how many entries may exist at a time beside the rows; examples beyond it take turns.

    Returns:
        [S, I, I] and [S, O, O], or `Diagonal`s.
    """
    draws, _, positions, columns = cotangents.shape[-4:]
    rows = inputs.shape[-1]
    if positions == 1:
        return paired_moments(inputs, cotangents, full)
    by_gradients = draws * rows * columns * (positions + rows + columns)
    by_positions = 2 * positions**2 * (rows + draws * columns) + positions * (rows**2 + draws * columns**2)
    if by_gradients <= by_positions:
        moments, entries = _moments_by_gradients, draws * rows * columns
    else:
        moments, entries = _moments_by_positions, 2 * positions**2 + positions * (rows + draws * columns)
    sums = sum_over_examples(partial(moments, full=full), inputs, cotangents, entries * prod(inputs.shape[:-3]), most)
    return jax.tree.map(lambda leaf: leaf / draws, sums)


def sum_over_examples(
    function: Callable[[Array, Array], Any], inputs: Array, cotangents: Array, entries: int, most: int
) -> Any:
    """The sum over examples of a function of their rows, so many examples at a time as there is room for.

    Args:
        function: a [n, S, T, I], g [n, K, S, T, O] -> the sum over these n examples.
        inputs: rows a [S, N, T, I].
        cotangents: rows g [S, K, N, T, O].
        entries: how many numbers the function makes of one example.
        most: how many of them may exist at a time.

    Returns:
        The sum over all N examples.
    """
    rows = jnp.moveaxis(inputs, -3, 0)
    columns = jnp.moveaxis(cotangents, (-3, -4), (0, 1))
    examples = len(rows)
    chunk = max(1, min(examples, most // max(1, entries)))
    while examples % chunk:
        chunk -= 1
    if chunk == examples:
        return function(rows, columns)
    split = [values.reshape((-1, chunk) + values.shape[1:]) for values in (rows, columns)]
    shapes = jax.eval_shape(function, *(values[0] for values in split))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.scan(lambda sums, pair: (jax.tree.map(jnp.add, sums, function(*pair)), None), start, split)[0]


def _moments_by_gradients(rows: Array, columns: Array, full: tuple[bool, bool]) -> tuple[Factor, Factor]:
    """Of a [n, S, T, I] and g [n, K, S, T, O], by way of D [n, K, S, I, O]."""
    gradients = einsum("n...ti,nk...to->nk...io", rows, columns)
    if full[0]:
        of_inputs = einsum("nk...io,nk...jo->...ij", gradients, gradients)
    else:
        of_inputs = Diagonal(jnp.sum(gradients**2, axis=(0, 1, -1)))
    if full[1]:
        return of_inputs, einsum("nk...io,nk...ip->...op", gradients, gradients)
    return of_inputs, Diagonal(jnp.sum(gradients**2, axis=(0, 1, -2)))


def _moments_by_positions(rows: Array, columns: Array, full: tuple[bool, bool]) -> tuple[Factor, Factor]:
    """Of a [n, S, T, I] and g [n, K, S, T, O], by way of the Gram matrices of the positions [n, S, T, T]."""
    weighted = matmul(einsum("nk...to,nk...so->n...ts", columns, columns), rows)
    if full[0]:
        of_inputs = einsum("n...ti,n...tj->...ij", weighted, rows)
    else:
        of_inputs = Diagonal(jnp.sum(weighted * rows, axis=(0, -2)))
    weighted = matmul(einsum("n...ti,n...si->n...ts", rows, rows)[:, None], columns)
    if full[1]:
        return of_inputs, einsum("nk...to,nk...tp->...op", weighted, columns)
    return of_inputs, Diagonal(jnp.sum(weighted * columns, axis=(0, 1, -2)))
