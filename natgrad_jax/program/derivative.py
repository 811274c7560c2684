"""The derivative of a function along a direction, whatever rules its parts define.

By forward mode. Parts that define a reverse rule alone (`jax.custom_vjp`) have no forward one; then by two passes of
reverse mode, as the transpose of the pullback:

    1  value, pullback <- vjp of the function         pullback(seed) = J^T seed
    2  J v <- pullback of the pullback, at v          which is linear in the seed, so that where does not matter

J is then that whose transpose the rule is: of a function that reverses gradients, minus its derivative.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from natgrad_jax.base import Array


def along(
    function: Callable[[Any], Array], where: Any, direction: Any, *, by_reverse: bool = False
) -> tuple[Array, Array]:
    """The value of a function of trees, and its derivative along one.

    Args:
        function: a tree -> an array.
        where: the tree.
        direction: a tree like it.
        by_reverse: whether a part of it has a reverse rule alone.

    Returns:
        The value, and J times the direction.

    Raises:
        TypeError: if a reverse rule cannot itself be differentiated.
    """
    if not by_reverse:
        return jax.jvp(function, (where,), (direction,))
    value, pullback = jax.vjp(function, where)  # 1
    try:
        return value, jax.vjp(lambda seed: pullback(seed)[0], jnp.zeros_like(value))[1](direction)[0]  # 2
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            "The model has a `jax.custom_vjp` whose backward rule cannot be differentiated, so that there are no "
            'products with J for steps that choose themselves ("quadratic", `adaptive_damping`). Give learning rate, '
            f"momentum and damping as numbers, or a rule that JAX can transpose. JAX says: {error}"
        ) from error


def has_reverse_rules(program: Jaxpr) -> bool:
    """Whether a part of a program defines a reverse rule alone (`jax.custom_vjp`)."""
    return any(equation.primitive.name.startswith("custom_vjp_call") for equation in _equations(program))


def has_dtype(program: Jaxpr, dtype: Any) -> bool:
    """Whether anything in a program is of a dtype: what it is given, what it gives, or what is computed between."""
    made = (variable for equation in _equations(program) for variable in equation.outvars)
    return any(getattr(variable.aval, "dtype", None) == dtype for variable in (*program.invars, *made))


def _equations(program: Jaxpr) -> Iterator[Any]:
    """Yields all equations, those of programs inside of them too."""
    for equation in program.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, (ClosedJaxpr, Jaxpr)):
                    yield from _equations(item.jaxpr if isinstance(item, ClosedJaxpr) else item)
