"""A traced function, run again with records and probes at some of its products.

What is watched is written out, equation by equation, and so are the bodies that it stands in: `jit`, `checkpoint` with
its policy, `scan`, `cond`, `shard_map`. Everything between runs as it was traced, custom derivatives, effects and all.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from natgrad_jax.algebra.trees import differs, own
from natgrad_jax.base import Array
from natgrad_jax.program.liveness import INLINE, REMAT, SHARDS, body_of
from natgrad_jax.program.products import Path, Product
from natgrad_jax.program.shards import crossing, manual_axes

Records = dict[Path, Array]
"""{path of a product: its other operand}; a scan around it puts its turns in front."""


def replay(
    program: ClosedJaxpr, products: Sequence[Product], values: Sequence[Array], probes: Mapping[Path, Array]
) -> tuple[list[Array], Records]:
    """Run a traced function.

    Args:
        program: the traced function.
        products: what to record.
        values: the inputs.
        probes: what is added to the results of these products.

    Returns:
        The outputs, and what the parameters of the products were multiplied with.
    """
    watched = {product.path: product for product in products}
    return _Replay(watched, dict(probes)).run(program.jaxpr, program.consts, values, ())


class _Replay:
    """One run, inside of so many scans."""

    def __init__(self, watched: Mapping[Path, Product], probes: Mapping[Path, Array], depth: int = 0):
        self.watched, self.probes, self.depth = watched, probes, depth
        self.inside = {path[:depth] for path in watched for depth in range(1, len(path))}

    def run(
        self, program: Jaxpr, consts: Sequence[Any], values: Sequence[Any], path: Path
    ) -> tuple[list[Array], Records]:
        """Run one program."""
        known: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
        known |= dict(zip(program.invars, values, strict=True))
        records: Records = {}

        def read(v):
            return v.val if isinstance(v, Literal) else known[v]

        for place, equations in self.pieces(program, path):
            if place is None:
                known |= _as_traced(program, equations, known)
                continue
            (equation,) = equations
            inputs = [read(v) for v in equation.invars]
            if place in self.watched:
                product = self.watched[place]
                outputs = list(_as_traced(program, equations, known).values())
                shift = product.primitive == "add"  # of which only the cotangent counts
                records[place] = jnp.zeros((), product.dtype) if shift else inputs[1 - product.side]
                outputs = [outputs[0] + self.probes[place]] if place in self.probes else outputs
            else:
                outputs, found = self.enter(equation, inputs, place)
                records |= found
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in program.outvars], records

    def pieces(self, program: Jaxpr, path: Path) -> list[tuple[Path | None, list[Any]]]:
        """The equations in order: each that is watched or entered by itself, with its path; the others in runs."""
        found: list[tuple[Path | None, list[Any]]] = []
        for number, equation in enumerate(program.eqns):
            place = (*path, number)
            if place in self.watched or place in self.inside:
                found.append((place, [equation]))
            elif found and found[-1][0] is None:
                found[-1][1].append(equation)
            else:
                found.append((None, [equation]))
        return found

    def under(self, path: Path) -> dict[Path, Array]:
        """The probes inside of an equation."""
        return {place: probe for place, probe in self.probes.items() if place[: len(path)] == path}

    def enter(self, equation: Any, inputs: list[Any], path: Path) -> tuple[list[Array], Records]:
        """Run an equation in whose body something is watched."""
        name, options = equation.primitive.name, equation.params
        if name in INLINE:
            return self.run(body_of(equation), _consts(equation), inputs, path)
        if name in REMAT:
            return self.remat(equation, inputs, path)
        if name in SHARDS:
            return self.shards(equation, inputs, path)
        return self.scan(options, inputs, path) if name == "scan" else self.branches(options, inputs, path)

    def remat(self, equation: Any, inputs: list[Any], path: Path) -> tuple[list[Array], Records]:
        """A checkpoint with its policy."""

        def body(inputs, probes):
            replayed = _Replay(self.watched, probes, self.depth)
            return replayed.run(body_of(equation), _consts(equation), inputs, path)

        options = {name: equation.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(body, **options)(inputs, self.under(path))

    def scan(self, options: Mapping[str, Any], inputs: list[Any], path: Path) -> tuple[list[Array], Records]:
        """A scan; records and probes have its turns in front."""
        body, consts, carries = options["jaxpr"], options["num_consts"], options["num_carry"]
        shared, carry, scanned = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]

        def turn(carry, given):
            scanned, probes = given
            replayed = _Replay(self.watched, probes, self.depth + 1)
            outputs, records = replayed.run(body.jaxpr, body.consts, [*shared, *carry, *scanned], path)
            return outputs[:carries], (outputs[carries:], records)

        how = {name: options[name] for name in ("length", "reverse", "unroll")}
        carry, (outputs, records) = jax.lax.scan(turn, carry, (scanned, self.under(path)), **how)
        return [*carry, *outputs], records

    def shards(self, equation: Any, inputs: list[Any], path: Path) -> tuple[list[Array], Records]:
        """A `shard_map`; probes go in cut as the examples are, records come out put together."""
        options, depth = equation.params, self.depth
        watched = {place: product for place, product in self.watched.items() if place[: len(path)] == path}
        adding = {place: crossing(watched[place], watched[place].examples_out, path, depth) for place in watched}
        reading = {place: crossing(watched[place], watched[place].examples, path, depth) for place in watched}
        reading |= {place: crossing(one, None, path, depth) for place, one in watched.items() if one.primitive == "add"}
        probes = {place: adding[place].opened(probe) for place, probe in self.under(path).items()}

        def body(inputs, probes):
            probes = {place: adding[place].closed(probe) for place, probe in probes.items()}
            outputs, records = _Replay(self.watched, probes, depth).run(body_of(equation), (), inputs, path)
            return outputs, {place: reading[place].opened(record) for place, record in records.items()}

        outputs, records = jax.shard_map(
            body,
            mesh=options["mesh"],
            in_specs=(list(options["in_specs"]), {place: adding[place].spec for place in probes}),
            out_specs=(list(options["out_specs"]), {place: way.spec for place, way in reading.items()}),
            axis_names=set(manual_axes(equation) or ()),
            check_vma=options["check_vma"],
        )(inputs, probes)
        return outputs, {place: reading[place].closed(record) for place, record in records.items()}

    def branches(self, options: Mapping[str, Any], inputs: list[Any], path: Path) -> tuple[list[Array], Records]:
        """A choice; what the other branches would have recorded is zero."""
        index, *operands = inputs
        bodies = [
            lambda *operands, branch=branch, number=number: self.run(
                branch.jaxpr, branch.consts, operands, (*path, number)
            )
            for number, branch in enumerate(options["branches"])
        ]
        differing: dict[Path, set[str]] = {}

        def recorded(body, *operands):
            records = body(*operands)[1]
            differing.update({place: differs(record) for place, record in records.items()})
            return records

        shapes = [jax.eval_shape(partial(recorded, body), *operands) for body in bodies]
        every = {place: shape for found in shapes for place, shape in found.items()}

        def zeros(place):
            nothing = jnp.zeros(every[place].shape, every[place].dtype)
            return own(nothing, tuple(differing[place])) if differing[place] else nothing

        def filled(body):
            def run(*operands):
                outputs, records = body(*operands)
                return outputs, {place: records[place] if place in records else zeros(place) for place in every}

            return run

        return jax.lax.switch(index, [filled(body) for body in bodies], *operands)


def _consts(equation: Any) -> Sequence[Any]:
    """The constants of the body of a `jit` or `checkpoint`."""
    found = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(found, "consts", ())


def _as_traced(program: Jaxpr, equations: Sequence[Any], known: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values that some equations give, run as they are."""
    made = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(v for equation in equations for v in equation.invars if not isinstance(v, Literal))
    inputs = [v for v in read if v not in made]
    outputs = [v for equation in equations for v in equation.outvars]
    effects = frozenset().union(*(equation.effects for equation in equations))
    origin = program.debug_info and program.debug_info._replace(arg_names=None, result_paths=None)
    piece = Jaxpr((), inputs, outputs, list(equations), effects, origin)
    values = jaxpr_as_fun(ClosedJaxpr(piece, ()))(*[known[v] for v in inputs])
    return dict(zip(outputs, values, strict=True))
