"""Derivatives of a model in float16 that do not vanish on their way: what is passed through it is scaled.

    1  c <- derivatives of the loss by the outputs, in float32
    2  s <- the power of two that brings sum |c| below 256 and max |c| below 1
    3  gradient, cotangents <- pullback(s c) / s
    4  J v <- J(s v) / s, with the power of two that brings |v| below 1

Of a mean over a thousand examples these derivatives are 1e-3 at the start and 1e-8 at the end, where float16 has no
number but zero below 6e-8. A pullback is linear and a power of two exact, so that nothing else changes. The sum bounds
what a layer can make of them: 256 times its largest activation, where float16 ends at 65,504. The largest leaves room
for a model whose outputs move by up to 65,504 times what its parameters do. A loss scale that is found by trial
(Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740) has to be kept and may overflow; this has no state.

A model may compute in float16 and give its outputs in float32, so that the program is asked, not the outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.base import Array
from natgrad_jax.program import derivative
from natgrad_jax.watch.problem import Forward

_LARGEST_SUM = 256.0
_EXPONENTS = (-100, 100)  # both powers are numbers in float32

Pullback = Callable[[Any], tuple[Any, Any]]
"""Cotangents of the outputs -> gradient, cotangents of the probes."""


def precise(outputs: Any) -> Any:
    """Outputs, those in float16 as float32: where the derivatives of a loss are to be taken."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_half(leaf) else leaf, outputs)


def scaled(pullback: Pullback, outputs: list[Array]) -> Pullback:
    """The pullback of a model with parts in float16, scaled on the way.

    Args:
        pullback: cotangents of the outputs -> gradient, cotangents of the probes.
        outputs: as the model gives them.

    Returns:
        The same function of cotangents of the `precise` outputs; its cotangents of the probes are in float32.
    """

    def pulled(derivatives):
        sizes = [jnp.abs(leaf.astype(_wide(leaf))) for leaf in derivatives]
        largest = jnp.stack([jnp.max(leaf, initial=0) for leaf in sizes]).max()
        scale = _power(jnp.maximum(sum(map(jnp.sum, sizes)) / _LARGEST_SUM, largest))  # 2
        seeds = [(scale * leaf).astype(own.dtype) for leaf, own in zip(derivatives, outputs, strict=True)]
        gradient, cotangents = pullback(seeds)
        gradient = jax.tree.map(lambda leaf: (leaf.astype(_wide(leaf)) / scale).astype(leaf.dtype), gradient)
        return gradient, jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)) / scale, cotangents)  # 3

    return pulled


def along(forward: Forward, function: Callable[[Any], Any], where: Any, direction: Any) -> tuple[Any, Any]:
    """The value of a function of the parameters of a model, and its derivative along a direction.

    Args:
        forward: the model.
        function: parameters -> arrays.
        where: the parameters.
        direction: a tree like them.

    Returns:
        The value, and J times the direction; in float32 where the model computes in float16.
    """
    if not forward.half:
        return derivative.along(function, where, direction, by_reverse=forward.by_reverse)
    square = sum(jnp.sum(jnp.square(jnp.abs(leaf.astype(_wide(leaf))))) for leaf in jax.tree.leaves(direction))
    scale = _power(jnp.sqrt(square))
    direction = jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), direction)
    value, tangents = derivative.along(function, where, direction, by_reverse=forward.by_reverse)
    return value, jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)) / scale, tangents)  # 4


def _power(size: Any) -> Array:
    """The power of two that brings a number below 1; 1 where it is none."""
    size = jnp.asarray(size, jnp.float32)
    sound = jnp.isfinite(size) & (size > 0)
    return 2.0 ** jnp.clip(jnp.floor(-jnp.log2(jnp.where(sound, size, 1))), *_EXPONENTS)


def _is_half(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jnp.float16


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)
