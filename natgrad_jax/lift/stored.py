"""Statistics and operators kept in a narrower dtype between steps; every computation stays in that of the layer.

    1  widen what is kept of a layer, do what the method does, narrow what comes out
    2  before a refresh add u |M| to the diagonal of every matrix M among the statistics     u = eps / 2 of the dtype

Line 2 is by how much rounding can have moved the eigenvalues of M, in its Frobenius norm: what was positive
semidefinite stays so, and no factorisation fails of it. What has one number for a copy, as weights, is not narrowed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.stacks import frobenius, plus_identity
from natgrad_jax.base import Gradual, Layer, Method


def stored(method: Method, dtype: str) -> Method:
    """A method whose statistics and operators are kept in a dtype.

    Args:
        method: of one layer.
        dtype: "bfloat16", "float16" or "float32".

    Returns:
        The same method otherwise.
    """

    def narrow(layer: Layer, tree: Any) -> Any:
        def cast(leaf):
            return leaf.astype(dtype) if leaf.ndim > len(layer.stack) and leaf.dtype == layer.dtype else leaf

        return jax.tree.map(cast, tree)

    def kept(function: Callable[..., Any], values: int) -> Any:
        """Line 1, of a function of a layer, this many kept values, and others."""

        def done(layer, *arguments):
            wide = (_wide(layer, each) for each in arguments[:values])
            return narrow(layer, function(layer, *wide, *arguments[values:]))

        return done

    def init(layer):
        return narrow(layer, method.init(layer))

    def refresh(layer, statistics, operator, damping):
        return method.refresh(layer, _lifted(layer, statistics, dtype), operator, damping)  # 2

    def apply(layer, operator, gradient, damping):
        return method.apply(layer, _wide(layer, operator), gradient, damping)

    def turned(layer, statistics, operator):
        return method.turned and method.turned(layer, _wide(layer, statistics), _wide(layer, operator))

    def widened(of: Gradual) -> Gradual:
        """The parts of a refresh; what is underway stays in the dtype of the layer."""

        def values(layer, statistics, operator):
            return _lifted(layer, _wide(layer, statistics), dtype), _wide(layer, operator)

        def begin(layer, statistics, operator, *others):
            return of.begin(layer, *values(layer, statistics, operator), *others)

        def proceed(layer, statistics, operator, *others):
            return of.proceed(layer, *values(layer, statistics, operator), *others)

        def end(layer, statistics, operator, work):
            return narrow(layer, of.end(layer, *values(layer, statistics, operator), work))

        return Gradual(begin, proceed, end)

    others = {"rescale": 1, "follow": 2, "measure": 1, "couple": 2}
    found = {name: kept(getattr(method, name), values) for name, values in others.items() if getattr(method, name)}
    found |= {"turned": method.turned and turned, "gradual": method.gradual and widened(method.gradual)}
    return method._replace(init=init, observe=kept(method.observe, 1), refresh=kept(refresh, 2), apply=apply, **found)


def _wide(layer: Layer, tree: Any) -> Any:
    """What is kept, in the dtype of the layer."""

    def cast(leaf):
        return leaf.astype(layer.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _lifted(layer: Layer, tree: Any, dtype: str) -> Any:
    """Statistics whose matrices are positive semidefinite whatever rounding has done to them."""
    unit = float(jnp.finfo(dtype).eps) / 2

    def lift(leaf):
        square = leaf.ndim == len(layer.stack) + 2 and leaf.shape[-1] == leaf.shape[-2]
        return plus_identity(leaf, unit * frobenius(leaf)) if square else leaf

    return jax.tree.map(lift, tree)
