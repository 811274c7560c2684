"""Products with F on a part of the batch: every k-th example, in the place of all.

Length, momentum and test of a step that chooses itself need two or three numbers of F. A part of the batch gives these
to a few per cent, and a product with F is as dear as two thirds of a gradient. Every k-th example, not the first N / k:
of a batch that is sharded over devices each keeps its share.
"""

from typing import Any

import jax
import jax.numpy as jnp


def every(stride: int, args: Any, examples: int) -> Any:
    """Every k-th example of the inputs.

    Args:
        stride: k.
        args: positional inputs, trees of arrays that lead with the examples.
        examples: N.

    Returns:
        The same trees, whose arrays lead with ceil(N / k) examples.

    Raises:
        ValueError: if an array does not lead with the examples.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(args)]
    if any(shape[:1] != (examples,) for shape in shapes):
        raise ValueError(
            f"`product_stride` is {stride}, but the inputs have the shapes {shapes}; expected that all lead with the "
            f"{examples} examples. Give what has no examples as a keyword."
        )
    return jax.tree.map(lambda leaf: leaf[::stride], args)
