"""Products with F on a part of the batch: every k-th example, in the place of all.

Length, momentum and test of a step that chooses itself need two or three numbers of F. A part of the batch gives these
to a few per cent, and a product with F is as dear as two thirds of a gradient. Every k-th example, not the first N / k:
of a batch that is sharded over devices each keeps its share.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.base import Array
from natgrad_jax.watch.problem import Problem


def every(stride: int, args: Any, keywords: Mapping[str, Any], examples: int) -> Any:
    """Every k-th example of the inputs.

    Args:
        stride: k.
        args: positional inputs, trees of arrays that lead with the examples.
        keywords: the others, which have no examples and stay whole.
        examples: N.

    Returns:
        The same trees, whose arrays lead with ceil(N / k) examples.

    Raises:
        ValueError: if an array does not lead with the examples, or one of a keyword does.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(args)]
    if any(shape[:1] != (examples,) for shape in shapes):
        raise ValueError(
            f"`product_stride` is {stride}, but the inputs have the shapes {shapes}; expected that all lead with the "
            f"{examples} examples. Give what has no examples as a keyword."
        )
    having = [name for name, tree in keywords.items() if name != "rngs" and _leads(tree, examples)]
    if having or not shapes:
        raise ValueError(
            f"`product_stride` is {stride}, but of the inputs the keywords {having or sorted(keywords)} lead with the "
            f"{examples} examples; expected that keywords have none. Give these by position: `ng.Inputs(x, mask)`."
        )
    return jax.tree.map(lambda leaf: leaf[::stride], args)


def floor(problem: Problem, weights: Array | None) -> Array | None:
    """What the loss of a batch cannot fall below, of a capture with a `product_stride`.

    Args:
        problem: what is asked.
        weights: of examples or positions, or None.

    Returns:
        0 of a likelihood that is never negative, minus infinity where a weight is; None if nothing is known.
    """
    if problem.product_stride == 1 or problem.objective is not None or not problem.likelihood.is_positive:
        return None
    return jnp.zeros(()) if weights is None else jnp.where(jnp.any(jnp.asarray(weights) < 0), -jnp.inf, 0.0)


def _leads(tree: Any, examples: int) -> bool:
    """Whether an array of a tree leads with so many examples; of one example nothing is left out."""
    return examples > 1 and any(getattr(leaf, "shape", ())[:1] == (examples,) for leaf in jax.tree.leaves(tree))
