"""Products with the Jacobian of a batch, of which nothing is kept: its rows are the gradients of the examples.

    kernel    J J^T      of some parameters, from the gradients of some examples at a time
    project   J v        one pass of forward mode
    back      J^T w      one pullback

Row (k, n) is the gradient of example n for the cotangent of draw k, over sqrt(K W). What the kernel takes beside itself
is what two chunks of gradients take; those of one chunk are formed once more for every other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.stacks import einsum
from natgrad_jax.base import Array, Layer
from natgrad_jax.watch.problem import Forward
from natgrad_jax.watch.scaled import along


@dataclass(frozen=True, eq=False, repr=False)
class Space:
    """A batch as the rows of J, R = K N of them.

    Attributes:
        forward: the watched model on the batch, by `jacobian="examples"`.
        params: where.
        outputs: parameters -> those outputs that have a cotangent.
        pullback: cotangents of these -> the gradient.
        seeds: cotangents of each draw [K, ...].
        root: sqrt(K W).
    """

    forward: Forward
    params: Tree
    outputs: Callable[[Tree], list[Array]]
    pullback: Callable[[list[Array]], Tree]
    seeds: Sequence[Array]
    root: Array

    @property
    def draws(self) -> int:
        """K."""
        return self.seeds[0].shape[0]

    @property
    def examples(self) -> int:
        """N."""
        return self.forward.examples

    def project(self, direction: Tree) -> Array:
        """J v [R] of a tree like the parameters; leaves that a mask took away are zero."""
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        direction = addresses.replace(zeros, addresses.flatten(direction))
        _, tangents = along(self.forward, self.outputs, self.params, direction)
        found = sum(
            jnp.sum(seed * tangent, axis=range(2, seed.ndim))
            for seed, tangent in zip(self.seeds, tangents, strict=True)
            if seed.shape[1:2] == (self.examples,)
        )
        return jnp.asarray(found / self.root).reshape(-1)

    def back(self, weights: Array) -> Tree:
        """J^T w, a tree like the parameters, of w [R]."""
        weights = (weights / self.root).reshape(self.draws, -1)

        def weighted(seed):
            if seed.shape[1:2] != (self.examples,):
                return seed[0]
            return jnp.tensordot(jnp.ones(self.draws, seed.dtype), _times(seed, weights), axes=1)

        return self.pullback([weighted(seed) for seed in self.seeds])

    def chunks(self, most: int) -> np.ndarray:
        """The places of the examples, at most so many at a time [chunks, n]; the last chunk is filled up with -1."""
        return chunked(self.examples, most)

    def rows(self, blocks: Sequence[Layer], places: Array) -> list[Array]:
        """Some rows of J by the parameters of some blocks, [n, K, entries] of each array; zeros at places below 0."""
        each = self.forward.each
        assert each is not None, "of `jacobian=examples`"
        found = each(self.params, blocks, self.seeds, jnp.maximum(places, 0)).values()
        there = (places >= 0)[:, None, None]
        return [jnp.where(there, leaf.reshape(len(places), self.draws, -1) / self.root, 0) for leaf in found]

    def kernel(self, blocks: Sequence[Layer], workspace: int) -> Array:
        """J J^T [R, R] of the parameters of some blocks.

        Args:
            blocks: whose columns of J count.
            workspace: bytes that the gradients of two chunks of examples may take, at least one example each.

        Returns:
            The kernel.
        """
        whole = products(self, self, blocks, workspace)
        return whole.reshape(self.draws * self.examples, -1)


@dataclass(frozen=True, eq=False, repr=False)
class Spaces:
    """The batches of several terms as the rows of one J: all examples for each draw, zeros where a term has fewer.

    Attributes:
        parts: the batch of each term, a `Space` or what is asked like one.
        roots: of their weights, by which their rows are multiplied.
    """

    parts: Sequence[Any]
    roots: Sequence[Array]

    @property
    def draws(self) -> int:
        """K, of the term that has most."""
        return max(part.draws for part in self.parts)

    @property
    def examples(self) -> int:
        """N of all terms."""
        return sum(part.examples for part in self.parts)

    @property
    def root(self) -> Array:
        """A number of the dtype of the rows."""
        return self.parts[0].root

    def project(self, direction: Tree) -> Array:
        """J v [R] of a tree like the parameters."""
        found = []
        for part, root in zip(self.parts, self.roots, strict=True):
            mine = root * part.project(direction).reshape(part.draws, part.examples)
            found.append(jnp.pad(mine, ((0, self.draws - part.draws), (0, 0))))
        return jnp.concatenate(found, axis=1).reshape(-1)

    def back(self, weights: Array) -> Tree:
        """J^T w, a tree like the parameters, of w [R]."""
        ends = list(accumulate(part.examples for part in self.parts))[:-1]
        shares = jnp.split(weights.reshape(self.draws, -1), ends, axis=1)
        found = [
            part.back((root * share[: part.draws]).reshape(-1))
            for part, root, share in zip(self.parts, self.roots, shares, strict=True)
        ]
        return jax.tree.map(lambda first, *others: sum(others, first), *found)

    def kernel(self, blocks: Sequence[Layer], workspace: int) -> Array:
        """J J^T [R, R] of the parameters of some blocks; see `Space.kernel`."""
        pairs: dict[tuple[int, int], Array] = {}
        for (i, one), (j, other) in combinations_with_replacement(enumerate(self.parts), 2):
            found = self.roots[i] * self.roots[j] * products(one, other, blocks, workspace)
            room = [(0, self.draws - one.draws), (0, 0), (0, self.draws - other.draws), (0, 0)]
            pairs[i, j] = jnp.pad(found, room)
            pairs[j, i] = jnp.transpose(pairs[i, j], (2, 3, 0, 1))
        places = range(len(self.parts))
        lines = [jnp.concatenate([pairs[i, j] for j in places], axis=3) for i in places]
        return jnp.concatenate(lines, axis=1).reshape(self.draws * self.examples, -1)


def products(one: Any, other: Any, blocks: Sequence[Layer], workspace: int) -> Array:
    """The products of the rows of two spaces [K, N, K', N'], some examples of each at a time.

    Args:
        one: a `Space`, or what has its `draws`, `examples`, `root`, `chunks` and `rows`.
        other: another, or the same, of which half of the products are formed.
        blocks: whose columns of J count.
        workspace: bytes that the gradients of two chunks of examples may take, at least one example each.

    Returns:
        The products.
    """
    columns = sum(prod(leaf.shape) for block in blocks for leaf in block.leaves)
    same, draws = one is other, max(one.draws, other.draws)
    most = max(1, workspace // max(2 * draws * columns * one.root.dtype.itemsize, 1))
    lines, cells = one.chunks(most), other.chunks(most)

    def line(first):
        mine = one.rows(blocks, jnp.asarray(lines)[first])

        def block(second):
            theirs = other.rows(blocks, jnp.asarray(cells)[second])
            return jnp.asarray(sum(einsum("nkp,mlp->nkml", a, b) for a, b in zip(mine, theirs, strict=True)))

        def cell(second):
            if not same:
                return block(second)
            skipped = jnp.zeros((lines.shape[1], one.draws, cells.shape[1], other.draws), mine[0].dtype)
            return lax.cond(second >= first, block, lambda _: skipped, second)

        return lax.map(cell, jnp.arange(len(cells)))

    found = lax.map(
        line, jnp.arange(len(lines))
    )  # [chunks, chunks', n, k, m, l]; of one space those above the diagonal
    whole = jnp.transpose(found, (3, 0, 2, 5, 1, 4)).reshape(one.draws, lines.size, other.draws, cells.size)
    here, there = (np.flatnonzero(places >= 0) for places in (lines, cells))
    whole = whole[:, here][..., there]
    if not same:
        return whole
    number = here // lines.shape[1]  # of the chunk of each example
    return jnp.where((number[:, None] <= number)[None, :, None, :], whole, jnp.transpose(whole, (2, 3, 0, 1)))


def chunked(count: int, most: int) -> np.ndarray:
    """The numbers below a count, at most so many in a line [lines, n]; the last line is filled up with -1."""
    size = min(count, most)
    places = np.arange(-(-count // size) * size).reshape(-1, size)
    return np.where(places < count, places, -1)


def _times(seed: Array, weights: Array) -> Array:
    return seed * weights.reshape(*weights.shape, *(1,) * (seed.ndim - 2)).astype(seed.dtype)
