"""A pullback in float16 whose cotangents do not vanish: the scale of the loss, chosen for each batch.

    1  c <- derivatives of the loss by the outputs, in float32
    2  s <- the power of two that brings sum |c| below 256
    3  gradient, cotangents <- pullback(s c) / s

Of a mean over a thousand examples these derivatives are 1e-3 at the start and 1e-8 at the end, where float16 has no
number but zero below 6e-8. A pullback is linear and a power of two exact, so that nothing else changes. The sum bounds
what a layer can make of them: 256 times its largest activation, where float16 ends at 65,504. A loss scale that is
found by trial (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740) has to be kept and may overflow; this has
no state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.base import Array

_LARGEST = 256.0
_EXPONENTS = (-100, 100)  # both powers are numbers in float32


def precise(outputs: list[Array]) -> list[Array]:
    """Outputs, those in float16 as float32: where the derivatives of a loss are to be taken."""
    return [leaf.astype(jnp.float32) if leaf.dtype == jnp.float16 else leaf for leaf in outputs]


def pulled(
    pullback: Callable[[list[Array]], tuple[Any, Any]], derivatives: list[Array], outputs: list[Array]
) -> tuple[Any, Any]:
    """The pullback of the derivatives of a loss, scaled on the way where outputs are in float16.

    Args:
        pullback: cotangents of the outputs -> gradient, cotangents of the probes.
        derivatives: those of the loss by `precise` outputs.
        outputs: as the model gives them.

    Returns:
        What the pullback gives; its cotangents in float32 if they were scaled.
    """
    if not any(leaf.dtype == jnp.float16 for leaf in outputs):
        return pullback(derivatives)
    total = jnp.asarray(sum(jnp.sum(jnp.abs(leaf)) for leaf in derivatives), jnp.float32)  # 1
    sound = jnp.isfinite(total) & (total > 0)
    exponent = jnp.floor(jnp.log2(_LARGEST / jnp.where(sound, total, _LARGEST)))
    scale = 2.0 ** jnp.clip(exponent, *_EXPONENTS)  # 2
    seeds = [(scale * leaf).astype(own.dtype) for leaf, own in zip(derivatives, outputs, strict=True)]
    gradient, cotangents = pullback(seeds)

    def over(leaf):
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) / scale

    return jax.tree.map(lambda leaf: over(leaf).astype(leaf.dtype), gradient), jax.tree.map(over, cotangents)  # 3
