"""Refuse settings that do not fit, before any work and in the words of the user.

Everything here happens while a function is built or traced; what only the device can know is counted in the metrics of
the state.
"""

import inspect
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from natgrad_jax import addresses
from natgrad_jax.base import Layers


def number(
    name: str,
    value: Any,
    *,
    least: float,
    below: float = np.inf,
    schedule: bool = False,
) -> None:
    """Refuse a setting that is known now and is no number within its range; traced values pass.

    Args:
        name: of the setting, for the message.
        value: what the user gave.
        least: the smallest value allowed.
        below: the value must be smaller than this.
        schedule: whether a function of the step count is allowed, too.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    bounds = f"a finite number of at least {least:g}" + (f" and below {below:g}" if np.isfinite(below) else "")
    or_schedule = ", or a function of the step count" * schedule
    if callable(value):
        if not schedule:
            raise TypeError(f"`{name}` is a function; expected {bounds}. It takes no schedule.")
        if not _takes_one(value):
            raise TypeError(
                f"`{name}` is {shown(value)}, which is no function of one argument; expected {bounds}{or_schedule}."
            )
        return
    if isinstance(value, jax.core.Tracer):
        return
    if not _is_number(value):
        raise TypeError(f"`{name}` is {shown(value)}; expected {bounds}{or_schedule}.")
    if not least <= float(value) < below:
        raise ValueError(f"`{name}` is {value}; expected {bounds}.{_of_rounding(value)}")


def _of_rounding(value: Any) -> str:
    """What to do where a number is one of bfloat16, as Optax makes them for such parameters."""
    if np.asarray(value).dtype.name != "bfloat16":
        return ""
    return (
        " It is in bfloat16, which rounds 0.999 to 1. `optax.inject_hyperparams` gives numbers the dtype of the "
        "parameters unless told another: `inject_hyperparams(f, hyperparam_dtype=jnp.float32)`."
    )


def period(name: str, value: Any) -> None:
    """Refuse what is no positive whole number of steps; traced values pass.

    Args:
        name: of the setting, for the message.
        value: what the user gave.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not whole, or less than 1.
    """
    expected = "a whole number of steps, at least 1"
    if isinstance(value, jax.core.Tracer):
        return
    if callable(value):
        raise TypeError(f"`{name}` is a function; expected {expected}. It takes no schedule.")
    if not _is_number(value):
        raise TypeError(f"`{name}` is {value!r}; expected {expected}.")
    if not (np.isfinite(float(value)) and float(value) >= 1 and float(value) == round(float(value))):
        raise ValueError(f"`{name}` is {value}; expected {expected}.")


def size(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number that is known now: sizes fix the shapes of a state.

    Args:
        name: of the setting, for the message.
        value: what the user gave.
        least: the smallest value allowed.

    Raises:
        TypeError: if it is no number, or known on the device only.
        ValueError: if it is not whole, or too small.
    """
    static(name, value, "the shapes of the state")
    if not _is_number(value):
        raise TypeError(f"`{name}` is {value!r}; expected a whole number of at least {least}.")
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` is {value}; expected a whole number of at least {least}.")


def rank(name: str, value: Any) -> None:
    """Refuse what is neither a number of vectors nor a share that is known now.

    Args:
        name: of the setting, for the message.
        value: what the user gave.

    Raises:
        TypeError: if it is no number, or known on the device only.
        ValueError: if it is no whole number from 1 on and no share between 0 and 1.
    """
    static(name, value, "the shapes of the state")
    expected = 'a whole number of vectors, at least 1, a share between 0 and 1, "auto" or None'
    if not _is_number(value):
        raise TypeError(f"`{name}` is {value!r}; expected {expected}.")
    whole = isinstance(value, (int, np.integer))
    if not (value >= 1 if whole else 0 < value < 1):
        raise ValueError(f"`{name}` is {value}; expected {expected}.")


def static(name: str, value: Any, what: str) -> None:
    """Refuse a number that `optax.inject_hyperparams` or `jax.jit` has made an array of.

    Args:
        name: of the setting, for the message.
        value: what the user gave.
        what: what the setting fixes.

    Raises:
        TypeError: if it is an array.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` is an array; it fixes {what}, so it has to be a number of Python. Under "
            f"`optax.inject_hyperparams` name it: `inject_hyperparams(f, static_args={name!r})`."
        )


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Args:
        name: of the setting, for the message.
        value: what the user gave.

    Raises:
        TypeError: if it is something else.
    """
    static(name, value, "what is computed")
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` is {value!r}; expected True or False.")


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a word that is none of those that are known.

    Args:
        name: of the setting, for the message.
        value: what the user gave.
        choices: the words.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def layers(value: Any, *, optional: bool = False) -> None:
    """Refuse what is no `Layers`.

    Args:
        value: what the user gave as `layers`.
        optional: whether None is allowed.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, Layers) and not (optional and value is None):
        expected = "what `capture.layers(variables, x)` returns" + ", or None" * optional
        raise TypeError(f"`layers` is {shown(value)}; expected {expected}.")


def transformation(name: str, value: Any) -> None:
    """Refuse what is no Optax transformation.

    Args:
        name: of the argument, for the message.
        value: what the user gave.

    Raises:
        TypeError: if it is something else.
    """
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"`{name}` is {shown(value)}; expected an Optax transformation, such as `ng.scale_by_kfac(layers, "
            "damping=0.1)`."
        )


def function(name: str, value: Any, expected: str, takes: int) -> None:
    """Refuse what is neither None nor a function of so many arguments.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
        expected: in words.
        takes: number of its arguments.

    Raises:
        TypeError: if it is something else.
    """
    if value is None:
        return
    if not callable(value):
        raise TypeError(f"`{name}` is {shown(value)}; expected {expected}, or None.")
    try:
        inspect.signature(value).bind(*range(takes))
    except TypeError as error:
        raise TypeError(f"`{name}`: {error}; expected {expected}.") from None
    except ValueError:  # a builtin does not say
        pass


def arrays(tree: Any) -> None:
    """Refuse a tree that is neither of parameters nor of their gradient, since not all its leaves are arrays.

    Args:
        tree: what the user gave; shapes suffice.

    Raises:
        TypeError: if a leaf is something else.
    """
    for address, leaf in addresses.flatten(tree).items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            found = f"has an object of type {type(leaf).__name__} at {address!r}"
            raise TypeError(
                f"The tree of parameters {found if address else f'is of type {type(leaf).__name__}'}; expected arrays "
                "alone: the parameters in `tx.init(params)`, their gradient in `tx.update(out.grad, ...)`."
            )


def array(name: str, value: Any, expected: str) -> None:
    """Refuse what is no array of numbers and cannot be made one.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
        expected: in words.

    Raises:
        TypeError: if it is None, words, complex, or a tree.
    """
    kind = getattr(value, "dtype", None)
    try:
        kind = np.asarray(value).dtype if kind is None else kind
    except ValueError:  # a list of lists of several lengths
        kind = np.dtype(object)
    if getattr(kind, "kind", "V") in "OUSMmVc":
        found = f"an array of {kind}" if getattr(kind, "kind", "") == "c" else shown(value)
        raise TypeError(f"`{name}` is {found}; expected {expected}.")


def key(value: Any) -> None:
    """Refuse what is neither None nor a key of JAX.

    Args:
        value: what the user gave as `key`.

    Raises:
        TypeError: if it is something else.
    """
    kind = getattr(value, "dtype", None)
    typed = kind is not None and jax.dtypes.issubdtype(kind, jax.dtypes.prng_key)
    one = value is None or (typed and value.ndim == 0) or (kind == np.uint32 and value.ndim == 1)
    if typed and not one:
        raise TypeError(f"`key` has {value.size} keys, of shape {value.shape}; expected one, a new one at each step.")
    if not one:
        raise TypeError(f"`key` is {shown(value)}; expected a key, `jax.random.key(seed)`, a new one at each step.")


def shown(value: Any) -> str:
    """A value as it is written, a function by its name, or what it is if that is long."""
    if callable(value) and hasattr(value, "__name__") and not isinstance(value, type):
        return f"the function {value.__name__}"
    written = repr(value)
    return written if len(written) <= _LONG and "\n" not in written else f"of type {type(value).__name__}"


_LONG = 80


def _takes_one(function: Any) -> bool:
    """Whether a function can be called with one argument, as far as Python knows."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return True
    try:
        signature.bind(0)
    except TypeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, (str, bool, np.bool_)) or value is None or np.ndim(value) != 0:
        return False
    dtype = np.asarray(value).dtype
    return np.issubdtype(dtype, np.number) or dtype.name in ("bfloat16", "float16")
