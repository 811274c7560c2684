"""Parts of examples in one axis, such as the nodes of graphs: whose they are, and rows of examples from rows of parts.

A row of a part is a row of its example. As arrays have to be regular every example gets a place for every part of the
batch, zero but for its own, and a weight of zero there: so moments count each part once, and the gradient of an example
is the sum over its parts. That is N times the rows, which is meant for batches of small graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from natgrad_jax.base import Array, Use
from natgrad_jax.losses import example_weights

Segments = Callable[..., Any]
"""What a model is called with, by position -> integers [M], or a tuple of such."""


def found(segments: Segments | None, args: Sequence[Any], examples: int) -> dict[int, Array]:
    """Whose the parts of a batch are.

    Args:
        segments: asked of the capture; None for none.
        args: what the model is called with.
        examples: N.

    Returns:
        {M: the examples [M] that the parts of an axis of M entries belong to}; others than 0 to N - 1 for none.

    Raises:
        TypeError: if they are no integers.
        ValueError: if axes cannot be told by their lengths.
    """
    if segments is None:
        return {}
    given = segments(*args)
    given = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    for ids in given:
        if getattr(ids, "ndim", 0) != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(
                f"`segments` gives {ids!r}; expected integers [M], for each of the M parts in the batch the example "
                "that it belongs to, or a tuple of such."
            )
    lengths = [examples, *(ids.shape[0] for ids in given)]
    if len(set(lengths)) < len(lengths):
        raise ValueError(
            f"There are {examples} examples, and `segments` gives {lengths[1:]} entries: which axis is which cannot be "
            "told where two are of one length. Fill the batch up (as jraph.pad_with_graphs does) to different lengths."
        )
    return {ids.shape[0]: ids for ids in given}


def grown(segments: dict[int, Array]) -> tuple[tuple[int, int], ...]:
    """(how many times as many, how many) parts the second trace has of each axis, told from twice as many examples."""
    return tuple((2 * place + 3, parts) for place, parts in enumerate(segments))


def by_example(array: Array, ids: Array, examples: int, axis: int) -> Array:
    """[..., M, ...] as [..., N, M, ...], zero where a part is not of the example."""
    mine = _mine(ids, examples)
    mine = mine.reshape(*mine.shape, *(1,) * (array.ndim - axis - 1))
    return jnp.where(mine, jnp.expand_dims(array, axis), jnp.zeros((), array.dtype))


def weights_of(
    uses: Sequence[tuple[Use, int]], segments: Mapping[int, Array], examples: int, weights: Array | None
) -> Array | None:
    """The weights of the rows of a layer.

    Args:
        uses: of the layer, each with the M of its parts, 0 if its rows are of whole examples.
        segments: of the batch.
        examples: N.
        weights: of the batch.

    Returns:
        [N, T], zero where a part is not of the example; the weights of the batch where no use has parts.
    """
    if not any(parts for _, parts in uses):
        return weights
    columns = [
        jnp.repeat(_mine(segments[parts], examples), use.positions // parts, axis=1)
        if parts
        else jnp.ones((examples, use.positions), bool)
        for use, parts in uses
        if not use.beside
    ]
    there = jnp.concatenate(columns, axis=1).astype(jnp.float32 if weights is None else weights.dtype)
    return there if weights is None else there * example_weights(weights)[:, None]


def _mine(ids: Array, examples: int) -> Array:
    return jnp.asarray(ids)[None, :] == jnp.arange(examples)[:, None]
