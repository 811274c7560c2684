"""Products entry by entry: the scale of a norm, and the shift that is added behind it.

    y * scale + shift            both over all positions, each entry for a channel
    y * (v * scale) + shift      v without examples, as the deviations of batch normalisation are: a factor

A parameter is a scale where what it is multiplied with has the examples. It has one axis of channels, or none.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from natgrad_jax.algebra.arranged import reshaped, shape
from natgrad_jax.program.facts import Fact, Parameter, Scaled, moved
from natgrad_jax.program.products import Entrywise, Path, Product
from natgrad_jax.program.scenes import Scene

SCALES = {"mul": (0, 1), "div": (0,)}
"""{primitive: the operands that a scale can be}."""
SUMS = ("add", "add_any")
FACTOR = "a factor entry by entry, not of a product"
ADDED = "added, not as the bias of a product"


def why_not(fact: Parameter) -> str | None:
    """Why a parameter is none of a product of rows, after what was done with it entry by entry; None of nothing."""
    return (ADDED if fact.made[0] is None else FACTOR) if fact.made else None


def constant_added(equation: Any, fact: Parameter, place: int) -> Parameter | None:
    """A parameter with a number added, as in (1 + scale); None of another sum."""
    return fact._replace(made=(*fact.made, None)) if isinstance(equation.invars[1 - place], Literal) else None


def scaled(scene: Scene, path: Path, equation: Any, twin: Any, place: int) -> tuple[Product | None, Fact] | None:
    """A product entry by entry.

    Args:
        scene: the program that it is in.
        path: of the equation.
        equation: the product.
        twin: the same with twice as many examples.
        place: which operand is the parameter.

    Returns:
        The product, and what its result is; no product but a parameter with a factor where there are no examples.
        None of what is no scale.
    """
    given, out = scene.fact(equation.invars[place]), equation.outvars[0].aval
    assert isinstance(given, Parameter), "the side is that of a parameter"
    fact = _in_place(given, equation.invars[place].aval.shape)
    if fact is None or not _fits(fact, out) or isinstance(equation.invars[1 - place], Literal):
        return None
    product = _product(scene, path, equation, twin, (place, fact), Entrywise(fact.axes or (), _factors(fact)))
    if product.examples_out is not None:
        return product, Scaled(path, fact)
    if _is_without_examples(scene, equation.outvars[0], twin and twin.outvars[0]):
        return None, fact._replace(made=(*fact.made, product))
    return None


def shifted(scene: Scene, path: Path, equation: Any, twin: Any, place: int) -> Product | None:
    """The sum of what has been scaled with a shift of the same channels; None of another sum."""
    added, value = scene.fact(equation.invars[place]), scene.fact(equation.invars[1 - place])
    if not (isinstance(added, Parameter) and isinstance(value, Scaled)) or added.made:
        return None
    fact, like = _in_place(added, equation.invars[place].aval.shape), value.like
    if fact is None or not _fits(fact, equation.outvars[0].aval):
        return None
    if (fact.axes, fact.levels, shape(fact.arrangement)) != (like.axes, like.levels, shape(like.arrangement)):
        return None
    options = Entrywise(fact.axes or (), scale=value.path)
    product = _product(scene, path, equation, twin, (place, fact), options)
    return product._replace(primitive="add") if product.examples_out is not None else None


def after(equation: Any, inputs: Sequence[Fact | None]) -> Fact | None:
    """What has been scaled, after an equation without parameters that moves it or multiplies it; None of another."""
    places = [place for place, fact in enumerate(inputs) if isinstance(fact, Scaled)]
    if len(places) != 1 or len(equation.outvars) != 1:
        return None
    fact = inputs[places[0]]
    assert isinstance(fact, Scaled), "found as one"
    if len(inputs) == 1:
        return moved(fact, equation)
    if places[0] not in SCALES.get(equation.primitive.name, ()) or not _fits(fact.like, equation.outvars[0].aval):
        return None
    return fact


def _in_place(fact: Parameter, sizes: Sequence[int]) -> Parameter | None:
    """A parameter whose axes of more than one entry, one at most, are said to stand where they do in a value."""
    if fact.axes is None:
        axes = tuple(axis for axis, size in enumerate(sizes) if size > 1)
    else:
        given = shape(fact.arrangement)[fact.hidden :]
        axes = tuple(axis for axis, size in zip(fact.axes, given, strict=True) if size > 1)
    if len(axes) > 1:
        return None
    hidden = shape(fact.arrangement)[: fact.hidden]
    whole = reshaped(fact.arrangement, (*hidden, *(sizes[axis] for axis in axes)))
    return None if whole is None else fact._replace(arrangement=whole, axes=axes)


def _fits(fact: Parameter, out: Any) -> bool:
    """Whether a result has the channels of a parameter where it has them."""
    sizes = shape(fact.arrangement)[fact.hidden :]
    there = all(out.shape[axis] == size for axis, size in zip(fact.axes or (), sizes, strict=True))
    return there and jnp.issubdtype(out.dtype, jnp.floating)


def _factors(fact: Parameter) -> tuple[Product, ...]:
    return tuple(product for product in fact.made if product is not None)


def _product(
    scene: Scene, path: Path, equation: Any, twin: Any, side: tuple[int, Parameter], options: Entrywise
) -> Product:
    """The examples are looked for in the result alone, where the channels are none of them."""
    place, fact = side
    found = scene.product(path, equation, twin, place, fact, options)
    spread = found.examples_out
    if spread is not None and spread.axis - len(scene.turns) in options.axes:
        spread = None
    return found._replace(examples=spread, examples_out=spread)


def _is_without_examples(scene: Scene, value: Any, twin: Any) -> bool:
    """Whether a value is known to be of no example in particular."""
    sizes = (*(turns.length for turns in scene.turns), *value.aval.shape)
    if scene.alone:
        return scene.examples not in sizes
    return twin is not None and (*(turns.twin for turns in scene.turns), *twin.aval.shape) == sizes
