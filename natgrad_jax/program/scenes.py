"""One program as it is followed: what is known of its values, and in which order an axis holds the examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, Literal

from natgrad_jax.algebra.arranged import Shape
from natgrad_jax.program.axes import Lookup, options_of
from natgrad_jax.program.facts import Fact, Parameter
from natgrad_jax.program.liveness import live
from natgrad_jax.program.products import Origin, Path, Product, Spread

_SHUFFLES = (
    *("gather", "scatter", "scatter-add", "sort", "dynamic_update_slice", "pad"),
    *("while", "custom_jvp_call", "custom_vjp_call", "shard_map"),
)
"""What may change the order of the entries of an axis. A cut that leaves an axis its length leaves it as it is."""


class Turns(NamedTuple):
    """How often a scan turns: in the program, and with twice as many examples."""

    length: int
    twin: int


@dataclass
class Scene:
    """One program, its twin with twice as many examples, and what is known of its values.

    Attributes:
        program: the program.
        twin: the twin; None where there is none.
        wanted: of each output, whether it is.
        path: of the equation that it is the body of.
        turns: of the scans around it.
        examples: N.
        facts: of values that are parameters or results of products.
        alone: whether there is no twin at all: the function takes no other number of examples. Then the axis of the
            examples is the one of N entries, if there is one such axis.
        segments: (how many times as many the twin has, how many there are) of the parts of examples.
        orders: (outer, inner) of values whose grown axis holds outer * N * inner entries.
        origins: of values that came in from the program around, which they are there.
    """

    program: Jaxpr
    twin: Jaxpr | None
    wanted: Sequence[bool]
    path: Path
    turns: tuple[Turns, ...]
    examples: int
    alone: bool = False
    facts: dict[Any, Fact] = field(default_factory=dict)
    segments: tuple[tuple[int, int], ...] = ()
    orders: dict[Any, tuple[int, int]] = field(default_factory=dict)
    origins: dict[Any, Origin | None] = field(default_factory=dict)

    def __post_init__(self):
        if self.twin is not None and not _alike(self.program, self.twin):
            self.twin = None
        self.live, self.needed = live(self.program, self.wanted)
        read = [
            v for equation, there in zip(self.program.eqns, self.live, strict=True) if there for v in equation.invars
        ]
        self.readers = Counter(v for v in [*read, *self.program.outvars] if not isinstance(v, Literal))

    def begin(self, facts: Sequence[Fact | None], orders: Sequence[tuple[int, int] | None]) -> None:
        """What is known of the inputs."""
        self.facts |= {v: fact for v, fact in zip(self.program.invars, facts, strict=True) if fact is not None}
        self.orders |= {v: order for v, order in zip(self.program.invars, orders, strict=True) if order is not None}

    def end(self) -> tuple[list[Fact | None], list[tuple[int, int] | None]]:
        """What is known of the outputs."""
        return [self.fact(v) for v in self.program.outvars], [self.order(v) for v in self.program.outvars]

    def equations(self) -> list[tuple[Path, Any, Any]]:
        """(path, equation, its twin) of those that a wanted output depends on."""
        twins = self.twin.eqns if self.twin is not None else [None] * len(self.program.eqns)
        numbered = enumerate(zip(self.program.eqns, twins, self.live, strict=True))
        return [((*self.path, number), equation, twin) for number, (equation, twin, there) in numbered if there]

    def fact(self, value: Any) -> Fact | None:
        """What is known of a value."""
        return None if isinstance(value, Literal) else self.facts.get(value)

    def order(self, value: Any) -> tuple[int, int] | None:
        """(outer, inner) of a value."""
        return None if isinstance(value, Literal) else self.orders.get(value)

    def origin(self, value: Any) -> Origin | None:
        """The value, told from all others of all programs; None of a number."""
        if isinstance(value, Literal):
            return None
        return self.origins.get(value) or (self.path, value)

    def is_read_once(self, value: Any) -> bool:
        """Whether nothing but one equation reads a value."""
        return self.readers[value] == 1

    def spread(self, value: Any, twin: Any) -> Spread | None:
        """Where the examples are in a value, the turns of the scans in front of its axes."""
        sizes = (*(turns.length for turns in self.turns), *value.aval.shape)
        if self.alone:
            return Spread(sizes.index(self.examples)) if sizes.count(self.examples) == 1 else None
        if twin is None:
            return None
        other = (*(turns.twin for turns in self.turns), *twin.aval.shape)
        for times, parts in self.segments:
            if (axis := grown(sizes, other, times)) is not None and sizes[axis] == parts:
                return Spread(axis, segments=parts)
        axis = grown(sizes, other)
        if axis is None:
            return None
        if sizes[axis] == self.examples:
            return Spread(axis)
        order = self.order(value) if axis >= len(self.turns) else None
        return None if order is None else Spread(axis, *order)

    def product(self, path: Path, equation: Any, twin: Any, side: int, fact: Parameter, options: Any) -> Product:
        """An equation that multiplies a parameter, its operand on that side, with the other operand."""
        other, out, front = equation.invars[1 - side], equation.outvars[0], tuple(turns.length for turns in self.turns)
        return Product(
            path=path,
            primitive=equation.primitive.name,
            options=options,
            side=side,
            kernel=fact.arrangement,
            levels=fact.levels,
            other=(*front, *other.aval.shape),
            output=(*front, *out.aval.shape),
            dtype=out.aval.dtype,
            examples=self.spread(other, twin and twin.invars[1 - side]),
            examples_out=self.spread(out, twin and twin.outvars[0]),
            reads=self.origin(other),
        )

    def keep_orders(self, equation: Any, twin: Any) -> None:
        """Follow the order of the examples through an equation."""
        if twin is None:
            return
        for v, other in zip(equation.outvars, twin.outvars, strict=True):
            axis = grown(v.aval.shape, other.aval.shape)
            if axis is None or v.aval.shape[axis] == self.examples:
                continue
            if (order := self._order_after(equation, twin, v.aval.shape, axis)) is not None:
                self.orders[v] = order

    def _order_after(self, equation: Any, twin: Any, sizes: Shape, axis: int) -> tuple[int, int] | None:
        """(outer, inner) of a result of this shape that has grown along an axis."""
        name, spreads = equation.primitive.name, []
        for v, other in zip(equation.invars, twin.invars, strict=True):
            where = grown(v.aval.shape, other.aval.shape) if hasattr(v.aval, "shape") else None
            if where is not None:
                order = (1, 1) if v.aval.shape[where] == self.examples else self.order(v)
                spreads.append((v.aval.shape, where, order))
        if not spreads or any(order is None for _, _, order in spreads):
            return None
        if name == "reshape":
            before, where, order = spreads[0]
            turned = equation.params["dimensions"] or range(len(before))
            before, where = tuple(before[place] for place in turned), list(turned).index(where)
            return _reshaped(before, where, order, sizes, axis, self.examples)
        inner = {order[1] for _, _, order in spreads}
        if name == "concatenate" and equation.params["dimension"] == axis:
            whole = len(spreads) == len(equation.invars) and len(inner) == 1
            return (sum(order[0] for _, _, order in spreads), *inner) if whole else None
        if name == "gather" and isinstance(options_of(equation, 0), Lookup) and len(spreads) == 1:
            return spreads[0][2]  # of the places that are read
        orders = {order for before, where, order in spreads if before[where] == sizes[axis]}
        return orders.pop() if len(orders) == 1 and name not in _SHUFFLES else None


def grown(sizes: Shape, twin: Shape, times: int = 2) -> int | None:
    """The one axis that has so many times as many entries in the twin; None if there is none, or more than one."""
    if len(sizes) != len(twin):
        return None
    axes = [axis for axis, (size, other) in enumerate(zip(sizes, twin, strict=True)) if size != other]
    return axes[0] if len(axes) == 1 and twin[axes[0]] == times * sizes[axes[0]] else None


def _reshaped(
    before: Shape, old: int, order: tuple[int, int], after: Shape, new: int, examples: int
) -> tuple[int, int] | None:
    """(outer, inner) of the axis of the examples after a reshape, in which the entries keep their order."""
    outer, inner = prod(before[:old]) * order[0], order[1] * prod(before[old + 1 :])
    left, right = prod(after[:new]), prod(after[new + 1 :])
    if outer % left or inner % right or (outer // left) * examples * (inner // right) != after[new]:
        return None
    return outer // left, inner // right


def _alike(program: Jaxpr, twin: Jaxpr) -> bool:
    """Whether two programs have the same equations, whatever the sizes."""
    names = [[equation.primitive.name for equation in each.eqns] for each in (program, twin)]
    return names[0] == names[1]
