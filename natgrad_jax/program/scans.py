"""What of parameters comes into the turns of a `scan`, and what comes out of them again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from natgrad_jax.program.entrywise import why_not
from natgrad_jax.program.facts import Fact, Parameter
from natgrad_jax.program.liveness import passed_on
from natgrad_jax.program.products import Level


class Entered(NamedTuple):
    """A scan, from inside.

    Attributes:
        facts: what is known of the inputs of a turn.
        refused: (what is not followed, why).
        kept: of each output what is known without a turn: what is carried through all turns as it came.
    """

    facts: list[Fact | None]
    refused: list[tuple[Parameter, str]]
    kept: list[Parameter | None]


def entered(equation: Any, inputs: Sequence[Fact | None]) -> Entered:
    """The turns share a constant, also one that is carried from turn to turn; of a scanned input each has an entry.

    Args:
        equation: the scan.
        inputs: what is known of its inputs.

    Returns:
        What its body begins with.
    """
    options = equation.params
    consts, scanned = options["num_consts"], options["num_consts"] + options["num_carry"]
    passed = passed_on(options["jaxpr"].jaxpr)
    inside: list[Fact | None] = []
    refused = []
    for place, fact in enumerate(inputs):
        inside.append(None)
        if not isinstance(fact, Parameter):
            continue
        if consts <= place < scanned and passed[place - consts] != place:
            refused.append((fact, "carried through a scan"))
        elif fact.axes is not None or fact.made:
            refused.append((fact, why_not(fact) or "repeated along an axis before a scan"))
        else:
            inside[-1] = fact._replace(levels=(*fact.levels, Level(options["length"], place >= scanned)))
    kept: list[Parameter | None] = [None] * len(passed)
    for place in range(consts, scanned):
        fact = inputs[place]
        if isinstance(fact, Parameter) and passed[place - consts] == place:
            kept[place - consts] = fact
    return Entered(inside, refused, kept)


def stacked(fact: Fact | None) -> Parameter | None:
    """What a scan returns of a parameter of which each turn has an entry; None where it repeats or changes it."""
    if not isinstance(fact, Parameter) or not fact.levels[-1].stacked or fact.axes is not None or fact.made:
        return None
    return fact._replace(levels=fact.levels[:-1])
