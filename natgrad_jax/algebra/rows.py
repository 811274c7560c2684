"""Rows: stacks of vectors [S, N, T, n], as arrays or one-hot, and what is asked of them.

A one-hot row has one entry that is not zero, as the input of a table of embeddings has. Written out, the rows of a
vocabulary would fill the memory; here they are two numbers each. Everything that the package does with rows of inputs
is a function of this file or of `moments`, so no one else asks how they are kept.
"""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
from flax import struct

from natgrad_jax.algebra.stacks import einsum
from natgrad_jax.base import Array


@struct.dataclass
class OneHot:
    """Rows [..., size], each with one entry.

    Attributes:
        index: where the entry is, integers [...].
        values: the entries, [...].
        size: n.
    """

    index: Array
    values: Array
    size: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rows as an array."""
        return (*self.index.shape, self.size)

    @property
    def ndim(self) -> int:
        """Number of axes of the rows as an array."""
        return self.index.ndim + 1

    @property
    def dtype(self) -> jnp.dtype:
        """That of the entries."""
        return self.values.dtype


Rows = Array | OneHot
"""Vectors [..., n]."""


def written_out(rows: Rows) -> Array:
    """The rows as an array [..., n]."""
    if isinstance(rows, OneHot):
        return jax.nn.one_hot(rows.index, rows.size, dtype=rows.dtype) * rows.values[..., None]
    return rows


def over_leading(rows: Rows, shape: tuple[int, ...]) -> Rows:
    """The rows [..., n] with their other axes in another shape."""
    if isinstance(rows, OneHot):
        return OneHot(rows.index.reshape(shape), rows.values.reshape(shape), rows.size)
    return rows.reshape(*shape, rows.shape[-1])


def examples_first(rows: Rows) -> Rows:
    """[S, N, T, n] -> [N, S, T, n]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -2 if isinstance(rows, OneHot) else -3, 0), rows)


def joined(rows: Sequence[Rows]) -> Rows:
    """Rows [S, N, T_i, n] one after the other, [S, N, T, n]."""
    if len(rows) == 1:
        return rows[0]
    axis = -1 if isinstance(rows[0], OneHot) else -2
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *rows)


def scaled(rows: Rows, weights: Array) -> Rows:
    """Each row times its weight [..., N, T], or what broadcasts to it."""
    if isinstance(rows, OneHot):
        return OneHot(rows.index, rows.values * weights, rows.size)
    return rows * weights[..., None]


def lengths(rows: Rows) -> Array:
    """Squared norms of the rows, [...]."""
    return rows.values**2 if isinstance(rows, OneHot) else jnp.sum(rows**2, axis=-1)


def spread(rows: OneHot, columns: Array, axes: int) -> Array:
    """The sum of e_index times a column: [S, *axes, m] -> [S, n, m], by addition in place instead of a product.

    Args:
        rows: [S, *axes, n]; only their places count.
        columns: [S, *axes, m].
        axes: how many axes are summed over.

    Returns:
        [S, n, m].
    """
    stack = rows.index.shape[: rows.index.ndim - axes]
    index, flat = (
        rows.index.reshape(-1, *rows.index.shape[len(stack) :]),
        columns.reshape(-1, *columns.shape[len(stack) :]),
    )

    def one(index, columns):
        empty = jnp.zeros((rows.size, columns.shape[-1]), columns.dtype)
        return empty.at[index.reshape(-1)].add(columns.reshape(-1, columns.shape[-1]))

    return jax.vmap(one)(index, flat).reshape(*stack, rows.size, columns.shape[-1])


def total(rows: Rows, weights: Array) -> Array:
    """The weighted sum of the rows over examples and positions: [S, N, T, n], [N, T] -> [S, n]."""
    if isinstance(rows, OneHot):
        return spread(rows, (rows.values * weights)[..., None], axes=2)[..., 0]
    return einsum("nt,...nti->...i", weights, rows)


def times(rows: Rows, matrix: Array) -> Array:
    """Rows times a matrix for each copy: [S, N, T, n], [S, n, m] -> [S, N, T, m]."""
    if isinstance(rows, OneHot):
        lead, flat = rows.index.shape, rows.index.reshape(*rows.index.shape[:-2], -1, 1)
        return jnp.take_along_axis(matrix, flat, axis=-2).reshape(*lead, -1) * rows.values[..., None]
    return einsum("...nti,...io->...nto", rows, matrix)


def pulled(rows: Rows, columns: Array) -> Array:
    """The sum over examples and positions of a g^T: [S, N, T, n], [S, N, T, m] -> [S, n, m]."""
    if isinstance(rows, OneHot):
        return spread(rows, columns * rows.values[..., None], axes=2)
    return einsum("...nti,...nto->...io", rows, columns)


def products(rows: Rows, others: Rows) -> Array:
    """The products of every row with every other: [..., T, n], [..., U, n] -> [..., T, U]."""
    if isinstance(rows, OneHot):
        assert isinstance(others, OneHot), "rows of one layer are kept alike"
        same = rows.index[..., :, None] == others.index[..., None, :]
        return jnp.where(same, rows.values[..., :, None] * others.values[..., None, :], 0)
    return einsum("...ti,...ui->...tu", rows, others)


def products_across(rows: Rows, others: Rows) -> Array:
    """The products of the rows of one example with those of all: [S, T, n], [S, N, U, n] -> [S, T, N, U]."""
    if isinstance(rows, OneHot):
        flat = products(rows, over_leading(others, (*others.shape[:-3], prod(others.shape[-3:-1]))))
        return flat.reshape(*flat.shape[:-1], *others.shape[-3:-1])
    return einsum("...ti,...nui->...tnu", rows, others)
