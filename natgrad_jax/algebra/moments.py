"""Second moments of rows, and of the gradients that are sums of their products.

Rows a [S, N, T, I] may be one-hot; rows g [S, K, N, T, O] are arrays. The gradient of one example is D = sum_t a g^T.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra import rows as of_rows
from natgrad_jax.algebra import truncated
from natgrad_jax.algebra.eigenbasis import rotated
from natgrad_jax.algebra.rows import OneHot, Rows
from natgrad_jax.algebra.stacks import Diagonal, Factor, einsum, matmul, transpose
from natgrad_jax.algebra.truncated import by_products, has_rest
from natgrad_jax.base import Array


def second_moment(rows: Rows, weights: Array | None = None, full: bool = True, rank: int | None = None) -> Any:
    """Sum over rows of the outer product of a row with itself.

    Args:
        rows: [..., R, n].
        weights: of the rows, [..., R] or broadcastable to it.
        full: whether to form the matrix, or only its diagonal.
        rank: vectors that it is wanted for; None for the matrix itself.

    Returns:
        [..., n, n], or a `Diagonal` [..., n]; its products where they take fewer flops.
    """
    if isinstance(rows, OneHot):
        squares = rows.values**2 if weights is None else rows.values**2 * weights
        return _diagonal(of_rows.spread(rows, squares[..., None], axes=1)[..., 0], full)
    if by_products(rows.shape[-2], rows.shape[-1], rank):
        return truncated.of_rows(rows, weights)
    weighted = rows if weights is None else rows * weights[..., None]
    if not full:
        return Diagonal(jnp.sum(weighted * rows, axis=-2))
    return einsum("...ri,...rj->...ij", weighted, rows)


def pooled_moment(rows: Rows, weights: Array, full: bool = True) -> Factor:
    """Sum over examples of w (sum_t a) (sum_t a)^T.

    Args:
        rows: [S, N, T, n].
        weights: w [N].
        full: whether to form the matrix, or only its diagonal.

    Returns:
        [S, n, n], or a `Diagonal` [S, n].
    """
    ones = jnp.ones((*rows.shape[:-1], 1), rows.dtype)[..., None, :, :, :] * jnp.sqrt(weights)[:, None, None]
    return gradient_moments(rows, ones, (full, False))[0]


def paired_moments(inputs: Rows, cotangents: Array, full: tuple[bool, bool] = (True, True)) -> tuple[Factor, Factor]:
    """Sum over examples and positions of |g|^2 a a^T and of |a|^2 g g^T, averaged over draws.

    Those of `gradient_moments` without the products of different positions of one example: the same at one position.

    Args:
        inputs: rows a [S, N, T, I].
        cotangents: rows g [S, K, N, T, O].
        full: for either side, whether to form the matrix, or only its diagonal.

    Returns:
        [S, I, I] and [S, O, O], or `Diagonal`s.
    """
    columns, stack = cotangents.shape[-1], inputs.shape[:-3]
    of_inputs = jnp.mean(jnp.sum(cotangents**2, axis=-1), axis=-3)  # [S, N, T]
    of_cotangents = of_rows.lengths(inputs)[..., None, :, :] / cotangents.shape[-4]  # [S, 1, N, T]
    of_cotangents = jnp.broadcast_to(of_cotangents, cotangents.shape[:-1])
    return (
        second_moment(
            of_rows.over_leading(inputs, (*stack, prod(inputs.shape[-3:-1]))), of_inputs.reshape(*stack, -1), full[0]
        ),
        second_moment(cotangents.reshape(*stack, -1, columns), of_cotangents.reshape(*stack, -1), full[1]),
    )


def gradient_moments(
    inputs: Rows, cotangents: Array, full: tuple[bool, bool] = (True, True), most: int = 1 << 22
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
    width = inputs.shape[-1]
    if positions == 1:
        return paired_moments(inputs, cotangents, full)
    by_gradients = draws * width * columns * (positions + width + columns)
    by_positions = 2 * positions**2 * (width + draws * columns) + positions * (width**2 + draws * columns**2)
    if by_gradients <= by_positions and not isinstance(inputs, OneHot):
        moments, entries = _moments_by_gradients, draws * width * columns
    else:
        kept = 1 if isinstance(inputs, OneHot) else width
        moments, entries = _moments_by_positions, 2 * positions**2 + positions * (kept + draws * columns)
    sums = sum_over_examples(partial(moments, full=full), inputs, cotangents, entries * prod(inputs.shape[:-3]), most)
    return jax.tree.map(lambda leaf: leaf / draws, sums)


def example_moments(inputs: Rows, cotangents: Array, most: int = 1 << 22) -> Array:
    """Sum over examples of the entrywise squared gradient of each, averaged over draws.

    The square of the sum over positions, not the sum of the squares: cross terms of positions belong to it.

    Args:
        inputs: rows a [S, N, T, I], in any basis.
        cotangents: rows g [S, K, N, T, O], in any basis.
        most: how many entries of per-example gradients may exist at a time; examples beyond it take turns.

    Returns:
        sum_n mean_k (sum_t a g^T)^2, [S, I, O].
    """
    draws, _, positions, columns = cotangents.shape[-4:]
    one_hot = isinstance(inputs, OneHot)
    if positions == 1 and not one_hot:
        return einsum("...ni,...kno->...io", inputs[..., 0, :] ** 2, cotangents[..., 0, :] ** 2) / draws

    def squares(rows, columns):
        return jnp.sum(einsum("n...ti,nk...to->nk...io", rows, columns) ** 2, axis=(0, 1))

    def one_hot_squares(rows, columns):  # D^2 has h_t (sum of the h_s at the same place) in the place of t
        beside = einsum("n...ts,nk...so->nk...to", of_rows.products(rows, rows), columns)
        return of_rows.spread(_stack_first(rows), jnp.moveaxis(jnp.sum(columns * beside, axis=1), 0, -3), axes=2)

    entries = positions * (positions + 2 * draws * columns) if one_hot else draws * inputs.shape[-1] * columns
    function = one_hot_squares if one_hot else squares
    return sum_over_examples(function, inputs, cotangents, entries * prod(inputs.shape[:-3]), most) / draws


def moments_in(sides: tuple[Array | None, Array | None], inputs: Rows, cotangents: Array, most: int = 1 << 22) -> Array:
    """`example_moments` in the coordinates of two sides; of the rest of a side their mean.

    Args:
        sides: columns U [S, I, r] and V [S, O, q], or None for the own coordinates.
        inputs: rows a [S, N, T, I].
        cotangents: rows g [S, K, N, T, O].
        most: as `example_moments` takes it.

    Returns:
        sum_n mean_k (U^T D V)^2, [S, r or r + 1, q or q + 1].
    """
    positions = cotangents.shape[-2]
    own, other = _parts(inputs, sides[0], positions), _parts(cotangents, sides[1], positions)
    rows = [[example_moments(a, g, most) for g, _ in other] for a, _ in own]
    found = []
    for line, (_, left_out) in zip(rows, own, strict=True):
        line = [
            square if rest is None else jnp.sum(square, axis=-1, keepdims=True) / rest
            for square, (_, rest) in zip(line, other, strict=True)
        ]
        joined = jnp.concatenate(line, axis=-1) if len(line) > 1 else line[0]
        found.append(joined if left_out is None else jnp.sum(joined, axis=-2, keepdims=True) / left_out)
    return jnp.concatenate(found, axis=-2) if len(found) > 1 else found[0]


def _parts(rows: Any, side: Array | None, positions: int) -> list[tuple[Any, int | None]]:
    """Rows along the columns of a side and, apart, what they leave, with the number of its directions.

    With one position the square of the rest is a product of lengths: then its root of mean square is one coordinate
    more, and nothing is apart.
    """
    if side is None:
        return [(rows, None)]
    seen = rotated(rows, side)
    if not has_rest(side):
        return [(seen, None)]
    rest, count = rows - rotated(seen, transpose(side)), side.shape[-2] - side.shape[-1]
    if positions == 1:
        length = jnp.sqrt(jnp.sum(rest**2, axis=-1, keepdims=True) / count)
        return [(jnp.concatenate([seen, length], axis=-1), None)]
    return [(seen, None), (rest, count)]


def sum_over_examples(
    function: Callable[[Any, Array], Any], inputs: Rows, cotangents: Array, entries: int, most: int
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
    pair = of_rows.examples_first(inputs), jnp.moveaxis(cotangents, (-3, -4), (0, 1))
    examples = len(pair[1])
    chunk = max(1, min(examples, most // max(1, entries)))
    while examples % chunk:
        chunk -= 1
    if chunk == examples:
        return function(*pair)
    split = jax.tree.map(lambda values: values.reshape((-1, chunk) + values.shape[1:]), pair)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda values: values[0], split))
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


def _moments_by_positions(rows: Rows, columns: Array, full: tuple[bool, bool]) -> tuple[Factor, Factor]:
    """Of a [n, S, T, I] and g [n, K, S, T, O], by way of the Gram matrices of the positions [n, S, T, T]."""
    of_columns = einsum("nk...to,nk...so->n...ts", columns, columns)
    if isinstance(rows, OneHot):
        of_inputs = _placed(rows, of_columns, full[0])
    elif full[0]:
        of_inputs = einsum("n...ti,n...tj->...ij", matmul(of_columns, rows), rows)
    else:
        of_inputs = Diagonal(jnp.sum(matmul(of_columns, rows) * rows, axis=(0, -2)))
    weighted = matmul(of_rows.products(rows, rows)[:, None], columns)
    if full[1]:
        return of_inputs, einsum("nk...to,nk...tp->...op", weighted, columns)
    return of_inputs, Diagonal(jnp.sum(weighted * columns, axis=(0, 1, -2)))


def _placed(rows: OneHot, weights: Array, full: bool) -> Factor:
    """The sum over examples and pairs of positions of w_ts a_t a_s^T, of one-hot a [n, S, T, I] and w [n, S, T, T]."""
    if not full:
        squares = jnp.sum(weights * of_rows.products(rows, rows), axis=-1)
        return Diagonal(of_rows.spread(_stack_first(rows), jnp.moveaxis(squares, 0, -2)[..., None], axes=2)[..., 0])
    first, weights = _stack_first(rows), jnp.moveaxis(weights, 0, -3)
    stack = first.index.shape[:-2]

    def one(index, values, weights):
        empty = jnp.zeros((rows.size, rows.size), weights.dtype)
        return empty.at[index[:, :, None], index[:, None, :]].add(weights * values[:, :, None] * values[:, None, :])

    flat = [leaf.reshape(-1, *leaf.shape[len(stack) :]) for leaf in (first.index, first.values, weights)]
    return jax.vmap(one)(*flat).reshape(*stack, rows.size, rows.size)


def _stack_first(rows: OneHot) -> OneHot:
    """[n, S, T, I] -> [S, n, T, I]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -2), rows)


def _diagonal(entries: Array, full: bool) -> Factor:
    """A diagonal matrix, written out or not."""
    if not full:
        return Diagonal(entries)
    there = jnp.broadcast_to(jnp.eye(entries.shape[-1], dtype=bool), (*entries.shape, entries.shape[-1]))
    return jnp.where(there, entries[..., None], 0)
