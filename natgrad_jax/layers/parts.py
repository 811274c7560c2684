"""Uses of a part of the matrix of a layer, in the rows of all of it.

The rows of a use have entries for its part, and zeros elsewhere: what its product does not read or give is not of it.
Products of the same input with columns side by side are one product, as if the kernel had not been cut: one row a, and
all columns in one row g. So are products of different copies of a layer, each with its own.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from natgrad_jax.algebra.rows import OneHot, Rows
from natgrad_jax.base import Array, Layer, Use


def placed_inputs(layer: Layer, uses: Sequence[Use], rows: Sequence[Rows]) -> list[Rows]:
    """Rows a of the uses, in those of the layer.

    Args:
        layer: the layer.
        uses: its uses.
        rows: of each use, [S, N, T, I] of its part; of a layer with a bias the 1 behind them.

    Returns:
        Rows [S, N, T, I], those of uses beside others in theirs.
    """
    found: list[Rows] = []
    there: list[tuple[int, ...]] = []
    for use, mine in zip(uses, rows, strict=True):
        if use.part is None:
            found.append(mine)
            continue
        copies = use.part.starts[:-2]
        if not use.beside:
            found.append(_empty(layer, mine))
            there = []
        if copies not in there:  # else it reads what another reads
            found[-1] = _put(layer, use, found[-1], mine)
        there.append(copies)
    return found


def placed_outputs(layer: Layer, uses: Sequence[Use], columns: Sequence[Array]) -> list[Array]:
    """Rows g of the uses, in those of the layer.

    Args:
        layer: the layer.
        uses: its uses.
        columns: of each use, [S, K, N, T, O] of its part.

    Returns:
        Rows [S, K, N, T, O], those of uses beside others in theirs.
    """
    found: list[Array] = []
    for use, mine in zip(uses, columns, strict=True):
        if use.part is None:
            found.append(mine)
            continue
        lead = mine.shape[len(layer.stack) : -1]
        whole = found.pop() if use.beside else jnp.zeros((*layer.stack, *lead, layer.shape[1]), mine.dtype)
        copies, last = _slices(use)[:-2], _slices(use)[-1]
        found.append(whole.at[(*copies, ..., last)].add(mine))
    return found


def _slices(use: Use) -> list[slice]:
    return [slice(start, start + size) for start, size in zip(*use.part, strict=True)]


def _empty(layer: Layer, like: Rows) -> Rows:
    """Rows of zeros for all of the layer."""
    lead = (*layer.stack, *like.shape[len(layer.stack) : -1])
    if isinstance(like, OneHot):
        return OneHot(jnp.zeros(lead, like.index.dtype), jnp.zeros(lead, like.dtype), layer.shape[0])
    return jnp.zeros((*lead, layer.shape[0]), like.dtype)


def _put(layer: Layer, use: Use, whole: Rows, rows: Rows) -> Rows:
    """The rows of a use put where they are in those of the layer."""
    *copies, own, _ = _slices(use)
    where = (*copies, ...)
    if isinstance(whole, OneHot):
        assert isinstance(rows, OneHot), "rows of one use, in those that it began"
        index, values = whole.index.at[where].set(rows.index + own.start), whole.values.at[where].set(rows.values)
        return OneHot(index, values, whole.size)
    assert not isinstance(rows, OneHot), "as above"
    if layer.has_bias:
        whole = whole.at[(*where, -1)].set(rows[..., -1])
        rows = rows[..., :-1]
    return whole.at[(*where, own)].set(rows)
