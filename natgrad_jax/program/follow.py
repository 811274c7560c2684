"""Following the parameters of a traced function to what is done with them.

A parameter is USED where it is one operand of a product: `dot_general`, a convolution, `gather`. On its way it may be
moved (transposed, reshaped, cast, reversed, cut, joined with others), through `jit`, `checkpoint`, `scan`, `cond` and
`shard_map`.
What is added to the result of a product over all of its positions is its bias. Everything else is named.

The axis of the examples is found by a second trace with twice as many: it is the one that has grown. Where it holds
more than the examples (two views side by side, positions merged with examples) the order is followed; see `scenes`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from natgrad_jax.algebra.arranged import addresses, source
from natgrad_jax.program import entrywise, facts, scans, shards
from natgrad_jax.program.axes import SIDES, columns_of, options_of
from natgrad_jax.program.facts import Fact, Parameter, Result
from natgrad_jax.program.liveness import INLINE, REMAT, SHARDS, body_of, live_inputs, live_outputs
from natgrad_jax.program.products import Found, Origin, Path, Product
from natgrad_jax.program.scenes import Scene, Turns

_WORDS = {
    **dict.fromkeys(entrywise.SUMS, entrywise.ADDED),
    "mul": entrywise.FACTOR,
    "div": "divided before any product",
    "while": "used inside a while loop",
    "custom_jvp_call": "used inside a custom derivative rule",
    "custom_vjp_call": "used inside a custom derivative rule",
    "slice": "cut with steps before its product",
    "dynamic_slice": "cut at a place that is computed",
}
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
"""Functions with derivative rules of their own: followed inside for the order of the examples alone."""
Facts = Sequence[Fact | None]
Orders = Sequence[tuple[int, int] | None]


def follow(
    program: ClosedJaxpr,
    twin: ClosedJaxpr | None,
    names: Sequence[str | None],
    wanted: Sequence[bool],
    examples: int,
    segments: tuple[tuple[int, int], ...] = (),
) -> Found:
    """What is done with the parameters of a program.

    Args:
        program: the traced function.
        twin: the same, traced with twice as many examples; None where that cannot be.
        names: of each input, the address of the parameter that it is; None for others.
        wanted: of each output, whether it counts: a use that none of these depends on is none.
        examples: N.
        segments: (how many times as many the twin has, how many there are) of the parts of examples.

    Returns:
        The products and the other uses.
    """
    known = [
        None if name is None else Parameter(source(name, v.aval.shape))
        for name, v in zip(names, program.jaxpr.invars, strict=True)
    ]
    follower = _Follower(examples, twin is None, segments)
    other = None if twin is None else twin.jaxpr
    ends, _ = follower.walk(program.jaxpr, other, known, [None] * len(known), wanted, (), ())
    follower.note([fact for fact, want in zip(ends, wanted, strict=True) if want], "returned by the function")
    needed = live_inputs(program.jaxpr, wanted)
    used = frozenset(name for name, need in zip(names, needed, strict=True) if name is not None and need)
    return Found(tuple(follower.products.values()), follower.otherwise, used, twin is None)


class _Follower:
    """One pass over a program, and what it finds."""

    def __init__(self, examples: int, alone: bool, segments: tuple[tuple[int, int], ...]):
        self.examples, self.alone, self.segments = examples, alone, segments
        self.products: dict[Path, Product] = {}
        self.otherwise: dict[str, str] = {}

    def walk(
        self,
        program: Jaxpr,
        twin: Jaxpr | None,
        known: Facts,
        orders: Orders,
        wanted: Sequence[bool],
        path: Path,
        turns: tuple[Turns, ...],
        origins: Sequence[Origin | None] = (),
    ) -> tuple[list[Fact | None], list[tuple[int, int] | None]]:
        """Follow a program: what is known of its inputs -> what is known of its outputs."""
        scene = Scene(program, twin, wanted, path, turns, self.examples, self.alone, segments=self.segments)
        scene.begin(known, orders)
        scene.origins |= dict(zip(program.invars, origins, strict=False))
        for place, equation, other in scene.equations():
            name = equation.primitive.name
            rule = name in _CUSTOM and not any(isinstance(scene.fact(v), Parameter) for v in equation.invars)
            if name in INLINE or name in REMAT or rule:
                self.inline(scene, place, equation, other)
            elif name == "scan":
                self.scan(scene, place, equation, other)
            elif name == "cond":
                self.branches(scene, place, equation, other)
            elif name in SHARDS:
                self.devices(scene, place, equation, other)
            else:
                scene.keep_orders(equation, other)
                self.visit(scene, place, equation, other)
        return scene.end()

    def visit(self, scene: Scene, path: Path, equation: Any, twin: Any) -> None:
        """Follow an equation that has no program inside, or one that is not looked into."""
        inputs = [scene.fact(v) for v in equation.invars]
        given = [place for place, fact in enumerate(inputs) if isinstance(fact, Parameter)]
        if equation.primitive.name == "stop_gradient":
            return
        first = inputs[0] if given == [0] else None
        if isinstance(first, Parameter) and (cut := facts.pieces(first, equation)) is not None:
            self.cut(scene, equation, first, cut)
            return
        learned = self.result(scene, equation, inputs) or (None if given else entrywise.after(equation, inputs))
        if learned is None and given:
            learned = self.parameter(scene, path, equation, twin, inputs, given)
        if isinstance(learned, str):
            self.note(inputs, learned)
        elif learned is not None:
            scene.facts[equation.outvars[0]] = learned

    def cut(self, scene: Scene, equation: Any, whole: Parameter, pieces: Facts) -> None:
        """Keep the pieces of a parameter that are needed."""
        for v, piece in zip(equation.outvars, pieces, strict=True):
            if piece is not None:
                scene.facts[v] = piece
            elif v in scene.needed:
                self.note([whole], "cut before its product in a way that is not followed")

    def note(self, inputs: Facts, reason: str) -> None:
        """Name how parameters enter otherwise."""
        for fact in inputs:
            if isinstance(fact, Parameter):
                self.otherwise |= dict.fromkeys(addresses(fact.arrangement), reason)

    def parameter(
        self, scene: Scene, path: Path, equation: Any, twin: Any, inputs: Facts, given: list[int]
    ) -> Fact | str | None:
        """What becomes of parameters in an equation, or how they enter there."""
        name, fact = equation.primitive.name, inputs[given[0]]
        assert isinstance(fact, Parameter), "given are places of parameters"
        if name == "concatenate" and len(given) == len(inputs):
            whole = facts.side_by_side(inputs, equation.params["dimension"])
            return "joined with others in a way that is not followed" if whole is None else whole
        if len(given) > 1:
            return "multiplied with another parameter" if name in SIDES else _WORDS.get(name, f"goes through `{name}`")
        if given[0] in SIDES.get(name, ()):
            return entrywise.why_not(fact) or self.product(scene, path, equation, twin, given[0])
        if name in entrywise.SUMS or given[0] in entrywise.SCALES.get(name, ()):
            return self.entrywise(scene, path, equation, twin, given[0])
        if len(inputs) == 1 and (after := facts.moved(fact, equation)) is not None:
            return after
        return _WORDS.get(name, entrywise.why_not(fact) or f"goes through `{name}` before any product")

    def entrywise(self, scene: Scene, path: Path, equation: Any, twin: Any, place: int) -> Fact | str | None:
        """Keep a scale, or the shift behind one; or say why it is neither."""
        name, fact = equation.primitive.name, scene.fact(equation.invars[place])
        if name not in entrywise.SUMS:
            found = entrywise.scaled(scene, path, equation, twin, place)
            if found is None:
                return _WORDS[name]
            if found[0] is not None:
                self.products[path] = found[0]
            return found[1]
        assert isinstance(fact, Parameter), "the place of a parameter"
        if (product := entrywise.shifted(scene, path, equation, twin, place)) is not None:
            self.products[path] = product
            return None
        return entrywise.constant_added(equation, fact, place) or _WORDS[name]

    def product(self, scene: Scene, path: Path, equation: Any, twin: Any, side: int) -> Fact | str:
        """Keep a product; or say why it is none."""
        fact, kernel, out = scene.fact(equation.invars[side]), equation.invars[side].aval, equation.outvars[0].aval
        assert isinstance(fact, Parameter), "the side is that of a parameter"
        options = options_of(equation, side)
        if isinstance(options, str):
            return options
        if fact.axes is not None:
            return "repeated along an axis before its product"
        if not (jnp.issubdtype(kernel.dtype, jnp.floating) and jnp.issubdtype(out.dtype, jnp.floating)):
            return f"of dtype {kernel.dtype}, in a product of dtype {out.dtype}"
        self.products[path] = scene.product(path, equation, twin, side, fact, options)
        return facts.result(path, out.shape)

    def result(self, scene: Scene, equation: Any, inputs: Facts) -> Fact | None:
        """What an equation makes of the result of a product: moved, something added, its bias added; None of others."""
        place = next((place for place, fact in enumerate(inputs) if isinstance(fact, Result)), None)
        if place is None or len(equation.outvars) != 1:
            return None
        fact, value = inputs[place], equation.invars[place]
        assert isinstance(fact, Result), "found as one"
        if not scene.is_read_once(value):
            return None
        if len(inputs) == 1:
            return facts.moved(fact, equation)
        if equation.primitive.name not in ("add", "add_any") or value.aval.shape != equation.outvars[0].aval.shape:
            return None
        added = inputs[1 - place]
        return self.with_bias(fact, value, added) if isinstance(added, Parameter) else fact

    def with_bias(self, fact: Result, value: Any, added: Parameter) -> Fact | None:
        """The result with its bias; None if what is added is none."""
        product = self.products[fact.path]
        if product.bias is not None or added.levels != product.levels or added.made:
            return None
        output = product.output[len(product.levels) :]
        found = facts.bias_of(added, fact, value.aval.shape, output, columns_of(product))
        if found is None or set(addresses(found)) & set(addresses(product.kernel)):
            return None
        self.products[fact.path] = product._replace(bias=found)
        return fact

    def inline(self, scene: Scene, path: Path, equation: Any, twin: Any) -> None:
        """Follow the body of a `jit` or `checkpoint` as if it stood there."""
        known = [(scene.fact(v), v) for v in equation.invars]
        inside = [
            fact if isinstance(fact, Parameter) or (fact and scene.is_read_once(v)) else None for fact, v in known
        ]
        orders = [scene.order(v) for v in equation.invars]
        wanted = [v in scene.needed for v in equation.outvars]
        other = body_of(twin) if twin is not None else None
        origins = [None if isinstance(v, Literal) else scene.origin(v) for v in equation.invars]
        found, after = self.walk(body_of(equation), other, inside, orders, wanted, path, scene.turns, origins)
        scene.facts |= {v: fact for v, fact in zip(equation.outvars, found, strict=True) if fact is not None}
        scene.orders |= {v: order for v, order in zip(equation.outvars, after, strict=True) if order is not None}

    def scan(self, scene: Scene, path: Path, equation: Any, twin: Any) -> None:
        """Follow a scan: its turns share a constant; of a scanned input each has an entry."""
        options, inside = equation.params, scans.entered(equation, [scene.fact(v) for v in equation.invars])
        for fact, why in inside.refused:
            self.note([fact], why)
        turns = Turns(options["length"], (equation if twin is None else twin).params["length"])
        other = twin.params["jaxpr"].jaxpr if twin is not None else None
        wanted = live_outputs(equation, [v in scene.needed for v in equation.outvars])
        orders, body = [scene.order(v) for v in equation.invars], options["jaxpr"].jaxpr
        ends, after = self.walk(body, other, inside.facts, orders, wanted, path, (*scene.turns, turns))
        for number, (v, fact, want) in enumerate(zip(equation.outvars, ends, wanted, strict=True)):
            whole = inside.kept[number] if number < options["num_carry"] else scans.stacked(fact)
            if whole is not None:
                scene.facts[v] = whole
            elif want:
                self.note([fact], "returned from a scan")
        scene.orders |= {v: order for v, order in zip(equation.outvars, after, strict=True) if order is not None}

    def branches(self, scene: Scene, path: Path, equation: Any, twin: Any) -> None:
        """Follow the branches of a `cond`: a use in one of them has rows of zeros where another is taken."""
        inputs = [scene.fact(v) for v in equation.invars]
        inside = [fact if isinstance(fact, Parameter) and not fact.made else None for fact in inputs[1:]]
        for fact in inputs[1:]:
            if isinstance(fact, Parameter) and (why := entrywise.why_not(fact)):
                self.note([fact], why)
        orders = [scene.order(v) for v in equation.invars[1:]]
        wanted = [v in scene.needed for v in equation.outvars]
        self.note(inputs[:1], "chooses a branch")
        walked = []
        for number, branch in enumerate(equation.params["branches"]):
            other = twin.params["branches"][number].jaxpr if twin is not None else None
            at = (*path, number)
            walked.append(self.walk(branch.jaxpr, other, inside, orders, wanted, at, scene.turns))
        ends, after = (zip(*each, strict=True) for each in zip(*walked, strict=True))
        for v, want, facts_of_all, orders_of_all in zip(equation.outvars, wanted, ends, after, strict=True):
            if isinstance(facts_of_all[0], Parameter) and len(set(facts_of_all)) == 1:
                scene.facts[v] = facts_of_all[0]
            elif want:
                self.note(facts_of_all, "returned from a branch")
            if len(set(orders_of_all)) == 1 and orders_of_all[0] is not None:
                scene.orders[v] = orders_of_all[0]

    def devices(self, scene: Scene, path: Path, equation: Any, twin: Any) -> None:
        """Follow the body of a `shard_map`: a device has a part of the examples, and whole parameters."""
        wanted = [v in scene.needed for v in equation.outvars]
        shard = shards.entered(scene, path, equation, twin, wanted)
        if isinstance(shard, str):
            self.note([scene.fact(v) for v in equation.invars], shard)
            return
        inside = shards.inside(scene, shard, equation, twin, wanted)
        for fact, why in inside.cut:
            self.note([fact], why)
        device, other = _Follower(self.examples // shard.devices, self.alone, ()), twin and body_of(twin)
        walked = device.walk(body_of(equation), other, inside.facts, inside.orders, wanted, path, scene.turns)
        device.note([fact for fact, want in zip(walked[0], wanted, strict=True) if want], "returned from a shard_map")
        products, refused = shards.wholes(device.products, shard)
        self.products |= products
        self.otherwise |= device.otherwise | refused
        scene.orders |= shards.orders_after(shard, equation, twin, walked[1])
