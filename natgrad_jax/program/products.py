"""The nouns of a traced function: a product of a parameter, and what happens to a parameter otherwise.

An equation has a PATH: its number, behind those of the equations that it stands in, and of the branch in a `cond`.
A LEVEL is a scan around it: its arrays have the turns of the scan as an axis in front, outermost first.
"""

from typing import Any, NamedTuple

from natgrad_jax.algebra.arranged import Arrangement, Shape

Path = tuple[int, ...]
Origin = tuple[Path, Any]
"""A value of a program: the path of that program, and its variable there."""


class Level(NamedTuple):
    """A scan around a product: its length, and whether the parameter has an entry for every turn."""

    length: int
    stacked: bool


class Spread(NamedTuple):
    """Where the examples are in an array.

    Attributes:
        axis: of outer * N * inner entries, the examples in the middle; or of the parts of all examples.
        outer: as above.
        inner: as above.
        segments: how many parts there are, if the axis is one of parts, such as the nodes of graphs; 0 if it is not.
    """

    axis: int
    outer: int = 1
    inner: int = 1
    segments: int = 0


class Split(NamedTuple):
    """Over which axes of the mesh the examples are cut inside of a `shard_map`; none where each device has them all."""

    path: Path
    axes: tuple[str, ...]


class Product(NamedTuple):
    """An equation that multiplies a parameter with something else.

    Attributes:
        path: of the equation.
        primitive: "dot_general", "conv_general_dilated" or "gather"; entry by entry "mul", "div" or "add".
        options: what `axes.options_of` makes of those of the equation; `Entrywise` of the latter.
        side: which operand is the parameter.
        kernel: the parameter as it enters, the stacked levels in front.
        levels: the scans around it.
        other: shape of the other operand, levels in front.
        output: shape of the result, levels in front.
        dtype: of the result.
        examples: where they are in the other operand; None where that is not known.
        examples_out: where they are in the result.
        bias: what is added to the result over all its positions [stacked levels, batch axes, outputs]; None of nothing.
        reads: the other operand, as a value: products with one origin read the same.
        splits: of the `shard_map`s around it, innermost first. The shapes above are those of all devices together.
    """

    path: Path
    primitive: str
    options: Any
    side: int
    kernel: Arrangement
    levels: tuple[Level, ...]
    other: Shape
    output: Shape
    dtype: Any
    examples: Spread | None
    examples_out: Spread | None
    bias: Arrangement | None = None
    reads: Origin | None = None
    splits: tuple[Split, ...] = ()


class Entrywise(NamedTuple):
    """Options of a product entry by entry, or of a sum: a scale or a shift of channels.

    Attributes:
        axes: of the result, without those of levels, where those of the parameter stand.
        factors: products of the parameter, entry by entry, with what has no examples, before this one.
        scale: path of the product that the parameter is added to, if it is a shift; None of a scale.
    """

    axes: tuple[int, ...]
    factors: tuple["Product", ...] = ()
    scale: Path | None = None


class Found(NamedTuple):
    """What is done with the parameters of a traced function.

    Attributes:
        products: in the order of the program.
        otherwise: {address: how it enters, if not by a product alone}.
        used: addresses of the parameters that the watched outputs depend on.
        alone: whether the function takes no other number of examples.
    """

    products: tuple[Product, ...]
    otherwise: dict[str, str]
    used: frozenset[str]
    alone: bool = False
