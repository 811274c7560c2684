"""Which equations of a program its outputs depend on."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

INLINE = ("jit", "pjit", "closed_call", "core_call")
"""Equations that stand for the equations of their body, no more."""
SHARDS = ("shard_map",)
"""Equations whose body each device runs on its parts of the inputs."""
REMAT = ("checkpoint", "remat", "remat2")


def body_of(equation: Any) -> Jaxpr:
    """The program inside of a `jit`, `checkpoint` or `shard_map`."""
    found = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(found, "jaxpr", found)


def live(program: Jaxpr, wanted: Sequence[bool]) -> tuple[list[bool], set[Any]]:
    """What the wanted outputs depend on.

    Args:
        program: the program.
        wanted: of each output, whether it is wanted.

    Returns:
        Of each equation, whether it is needed; and the values that are.
    """
    needed = {v for v, want in zip(program.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    flags = [False] * len(program.eqns)
    for number in reversed(range(len(program.eqns))):
        equation = program.eqns[number]
        outputs = [v in needed for v in equation.outvars]
        if not any(outputs):
            continue
        flags[number] = True
        inputs = _needed_inputs(equation, outputs)
        needed |= {v for v, need in zip(equation.invars, inputs, strict=True) if need and not isinstance(v, Literal)}
    return flags, needed


def live_inputs(program: Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Of each input, whether the wanted outputs depend on it."""
    needed = live(program, wanted)[1]
    return [v in needed for v in program.invars]


def live_outputs(equation: Any, wanted: Sequence[bool]) -> list[bool]:
    """Of each output of the body of a scan, whether it is needed: a carry for its own next turns, too."""
    options = equation.params
    body, carries, consts = options["jaxpr"].jaxpr, options["num_carry"], options["num_consts"]
    wanted = list(wanted)
    while True:
        read = live_inputs(body, wanted)[consts : consts + carries]
        carried = [want or need for want, need in zip(wanted[:carries], read, strict=True)]
        if carried == wanted[:carries]:
            return wanted
        wanted[:carries] = carried


def passed_on(program: Jaxpr) -> list[int | None]:
    """Of each output, the place of the input that it is, out of a `jit` or `checkpoint` as well; None of others."""
    places = {v: place for place, v in enumerate(program.invars)}
    for equation in program.eqns:
        if equation.primitive.name in (*INLINE, *REMAT):
            for v, place in zip(equation.outvars, passed_on(body_of(equation)), strict=True):
                given = None if place is None else equation.invars[place]
                if given is not None and not isinstance(given, Literal) and given in places:
                    places[v] = places[given]
    return [None if isinstance(v, Literal) else places.get(v) for v in program.outvars]


def _needed_inputs(equation: Any, wanted: Sequence[bool]) -> list[bool]:
    """Of each input of an equation, whether its wanted outputs depend on it."""
    name = equation.primitive.name
    if name in (*INLINE, *REMAT, *SHARDS):
        return live_inputs(body_of(equation), wanted)
    if name == "cond":
        branches = [live_inputs(branch.jaxpr, wanted) for branch in equation.params["branches"]]
        return [True, *(any(column) for column in zip(*branches, strict=True))]
    if name == "scan":
        outputs = live_outputs(equation, wanted)
        inputs = live_inputs(equation.params["jaxpr"].jaxpr, outputs)
        consts, carries = equation.params["num_consts"], equation.params["num_carry"]
        inputs[consts : consts + carries] = outputs[:carries]
        return inputs
    return [True] * len(equation.invars)
