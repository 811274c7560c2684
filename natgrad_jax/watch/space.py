"""Products with the Jacobian of a batch, of which nothing is kept: its rows are the gradients of the examples.

    kernel    J J^T      of some parameters, from the gradients of some examples at a time
    project   J v        one pass of forward mode
    back      J^T w      one pullback

Row (k, n) is the gradient of example n for the cotangent of draw k, over sqrt(K W). What the kernel takes beside itself
is what two chunks of gradients take; those of one chunk are formed once more for every other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.stacks import einsum
from natgrad_jax.base import Array, Layer
from natgrad_jax.program.derivative import along
from natgrad_jax.watch.problem import Forward


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

    def project(self, direction: Tree) -> Array:
        """J v [R] of a tree like the parameters; leaves that a mask took away are zero."""
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        direction = addresses.replace(zeros, addresses.flatten(direction))
        _, tangents = along(cast(Any, self.outputs), self.params, direction, by_reverse=self.forward.by_reverse)
        found = sum(
            jnp.sum(seed * tangent, axis=range(2, seed.ndim))
            for seed, tangent in zip(self.seeds, tangents, strict=True)
            if seed.shape[1:2] == (self.forward.examples,)
        )
        return jnp.asarray(found / self.root).reshape(-1)

    def back(self, weights: Array) -> Tree:
        """J^T w, a tree like the parameters, of w [R]."""
        weights = (weights / self.root).reshape(self.draws, -1)

        def weighted(seed):
            if seed.shape[1:2] != (self.forward.examples,):
                return seed[0]
            return jnp.tensordot(jnp.ones(self.draws, seed.dtype), _times(seed, weights), axes=1)

        return self.pullback([weighted(seed) for seed in self.seeds])

    def kernel(self, blocks: Sequence[Layer], workspace: int) -> Array:
        """J J^T [R, R] of the parameters of some blocks.

        Args:
            blocks: whose columns of J count.
            workspace: bytes that the gradients of two chunks of examples may take, at least one example each.

        Returns:
            The kernel.
        """
        each, examples, draws = self.forward.each, self.forward.examples, self.draws
        assert each is not None, "of `jacobian=examples`"
        size = draws * sum(prod(leaf.shape) for block in blocks for leaf in block.leaves)
        chunk = min(examples, max(1, workspace // max(2 * size * self.root.dtype.itemsize, 1)))
        places = jnp.arange(-(-examples // chunk) * chunk).reshape(-1, chunk)

        def rows(where):
            there = (where < examples)[:, None, None]
            found = each(self.params, blocks, self.seeds, jnp.minimum(where, examples - 1))
            return [jnp.where(there, leaf.reshape(chunk, draws, -1) / self.root, 0) for leaf in found.values()]

        def line(first):
            mine = rows(places[first])

            def block(second):
                theirs = rows(places[second])
                return sum(einsum("nkp,mlp->nkml", a, b) for a, b in zip(mine, theirs, strict=True))

            shape = (chunk, draws, chunk, draws)
            skipped = lambda second: jnp.zeros(shape, mine[0].dtype)  # noqa: E731
            return lax.map(lambda second: lax.cond(second >= first, block, skipped, second), jnp.arange(len(places)))

        found = lax.map(line, jnp.arange(len(places)))  # [chunks, chunks, n, k, m, l], those above the diagonal
        whole = jnp.transpose(found, (3, 0, 2, 5, 1, 4)).reshape(draws, len(places) * chunk, draws, -1)
        whole = whole[:, :examples, :, :examples]
        number = jnp.arange(examples) // chunk
        mirrored = jnp.transpose(whole, (2, 3, 0, 1))
        whole = jnp.where((number[:, None] <= number)[None, :, None, :], whole, mirrored)
        return whole.reshape(draws * examples, draws * examples)


def _times(seed: Array, weights: Array) -> Array:
    return seed * weights.reshape(*weights.shape, *(1,) * (seed.ndim - 2)).astype(seed.dtype)
