"""What a keyword can be, said once by the field of a class of settings.

    decay: Annotated[ScalarOrSchedule, "weight of the old value in the averages.", Number(below=1)] = 0.95

is its type, what it is and how to choose it, what it has to be, and its default. A word is checked by its `Literal`, a
flag by `bool`; None is allowed where the type says so. What fixes the shapes of a state is a `Size`, and never a number
by default, since `optax.inject_hyperparams` makes an array of every number. A class that changes a default alone
repeats the field without the words, `decay: ScalarOrSchedule = 0.9`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np

from natgrad_jax import checks
from natgrad_jax.around.adaptive import AdaptiveDamping, refuse_uncalled


class Number(NamedTuple):
    """A number from `least` to below `below`; its schedule, where that is said."""

    least: float = 0.0
    below: float = np.inf
    schedule: bool = False

    def check(self, name: str, value: Any) -> None:
        """Refuse what it is not."""
        checks.number(name, value, least=self.least, below=self.below, schedule=self.schedule)


class Steps(NamedTuple):
    """A whole number of steps."""

    def check(self, name: str, value: Any) -> None:
        """Refuse what it is not."""
        checks.period(name, value)


class Size(NamedTuple):
    """A whole number that fixes the shapes of a state."""

    least: int = 1

    def check(self, name: str, value: Any) -> None:
        """Refuse what it is not."""
        checks.size(name, value, least=self.least)


class Vectors(NamedTuple):
    """A number of vectors, at least 1, or a share below 1."""

    def check(self, name: str, value: Any) -> None:
        """Refuse what it is not."""
        checks.rank(name, value)


class Fixed(NamedTuple):
    """A number that fixes what is computed, hence one of Python."""

    number: Number

    def check(self, name: str, value: Any) -> None:
        """Refuse what it is not."""
        checks.static(name, value, "what is computed")
        self.number.check(name, value)


class Groups(NamedTuple):
    """A mapping from names of groups to names."""

    def check(self, name: str, value: Any) -> None:
        """Refuse what it is not."""
        if not isinstance(value, Mapping) or any(
            isinstance(names, str) or not isinstance(names, Collection) or not names for names in value.values()
        ):
            raise TypeError(
                f'`{name}` is {value!r}; expected one of its words, or a mapping like {{"encoder": ("Dense_0", '
                '"Dense_1")}.'
            )


class Mask(NamedTuple):
    """A tree of booleans, or a function of the parameters that makes one."""

    def check(self, name: str, value: Any) -> None:
        """Refuse a word, and what a schedule of the step count has become."""
        if isinstance(value, str):
            raise TypeError(
                f"`{name}` is {value!r}; expected a tree of booleans like the parameters, or a function of these."
            )
        if isinstance(value, (bool, np.bool_, jax.Array)):
            raise TypeError(
                f"`{name}` is {value!r}; expected a tree of booleans like the parameters, or a function of these. "
                "`optax.inject_hyperparams` takes a function for a schedule and calls it with the step count: name it "
                f"among the `static_args`: `inject_hyperparams(f, static_args={name!r})`."
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that are checked when they are given."""

    def __post_init__(self):
        for name, hint in hints_of(type(self)).items():
            _check(name, getattr(self, name), hint)


@cache
def hints_of(settings: type) -> dict[str, Any]:
    """{keyword: its type with all that is said of it}, of the last class that says anything."""
    found = {}
    for owner in reversed(settings.__mro__):
        for name, hint in get_type_hints(owner, include_extras=True).items() if owner is not object else ():
            if get_origin(hint) is Annotated or name not in found:
                found[name] = hint
    return {each.name: found[each.name] for each in fields(settings)}


def _check(name: str, value: Any, hint: Any) -> None:
    """Refuse what a keyword must not be."""
    of, *said = get_args(hint)
    parts = parts_of(of)
    if (value is None and NoneType in parts) or isinstance(value, AdaptiveDamping):
        return
    refuse_uncalled(name, value)
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    if words and (isinstance(value, str) or len(said) == 1):
        checks.choice(name, value, words)
    elif of is bool:
        checks.flag(name, value)
    for each in said:
        if hasattr(each, "check") and not (words and isinstance(value, str)):
            each.check(name, value)


def parts_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself if it is none."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
