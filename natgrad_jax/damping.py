"""How one damping strength is split over the two factors of a Kronecker pair.

F + damping I is no Kronecker product; (A + x I) (x) (G + y I) with x y = damping is one. The rules differ in the
ratio of x and y. `split="exact"` needs no rule: it adds the damping to the eigenvalues of the product itself.
"""

from typing import Literal

import jax.numpy as jnp

from natgrad_jax.base import Array, Scalar
from natgrad_jax.linalg import Factor, mean_diagonal

Split = Literal["pi", "even", "exact"]
SPLITS = ("pi", "even", "exact")


def split_damping(inputs: Factor, outputs: Factor, damping: Scalar, split: str) -> tuple[Array, Array]:
    """Strengths x, y with x y = damping for the factors A and G.

    "pi": x / y = (tr A / I) / (tr G / O), which equalises the traces of the two cross terms in the product
    (Martens and Grosse 2015, section 6.3); "even": x = y. A factor of trace 0 makes "pi" even.

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        damping: strength in the units of A (x) G.
        split: "pi" or "even".

    Returns:
        x [S] in the units of A and y [S] in the units of G.
    """
    mean_inputs, mean_outputs = mean_diagonal(inputs), mean_diagonal(outputs)
    root = jnp.sqrt(jnp.asarray(damping, mean_inputs.dtype))
    both = (mean_inputs > 0) & (mean_outputs > 0)
    ratio = jnp.where(both, mean_inputs, 1) / jnp.where(both, mean_outputs, 1)
    pi = jnp.sqrt(ratio) if split == "pi" else jnp.ones_like(ratio)
    return root * pi, root / pi
