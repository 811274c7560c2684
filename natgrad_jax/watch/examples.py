"""Watching a function one example at a time: `jacobian="examples"`.

    1  program <- the function traced on ONE example; which inputs have the examples, a trace on twice as many says
    2  run     <- the program with records and probes, lifted over the examples by `vmap`
    3  each    <- the pullback of single examples, lifted likewise, for parameters that belong to no layer

In the program of one example nothing is mixed, so that all axes of a product are positions of that example, and what
does not depend on the inputs (the direction of a tangent, the seed of a gradient) is there for each of them: the uses
of a layer in a residual of derivatives are its primal, its tangents and its cotangents. Whether the function IS one of
single examples is not taken on trust: `verify.verdict` compares both on numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.base import Array, Layer
from natgrad_jax.program.axes import Convolution
from natgrad_jax.program.derivative import has_dtype, has_reverse_rules
from natgrad_jax.program.follow import follow
from natgrad_jax.program.products import Found, Product, Spread
from natgrad_jax.program.replay import replay
from natgrad_jax.program.scenes import grown
from natgrad_jax.watch.masks import harmless
from natgrad_jax.watch.problem import Forward, Problem, Twice
from natgrad_jax.watch.reading import NOWHERE, Call
from natgrad_jax.watch.recognise import Exceptions, recognise
from natgrad_jax.watch.traced import Function, Traced, checked, is_array, twin_of

WORKSPACE = 2**28
"""Bytes that the gradients of single examples may take beside those that are kept."""


class Lifted(NamedTuple):
    """A reading of one example, lifted: [front axes, N, ...] -> [front axes, S, N, ...]; S has `stack` axes."""

    reading: Callable[..., Array]
    stack: int

    def __call__(self, array: Array, front: int = 0) -> Array:
        """The array as `Evidence` has it."""
        lead = array.shape[: front + 1]
        found = self.reading(array, front + 1)
        place = front + 1 + self.stack
        found = found.reshape(*lead, *found.shape[front + 1 : place], *found.shape[place + 1 :])
        return jnp.moveaxis(found, front, front + self.stack)


class One(NamedTuple):
    """The function of one example.

    Attributes:
        program: its trace; parameters, then what else it reads.
        rebuilt: outputs of the program -> outputs, what was written.
        outputs: of each output of the program the axis of the example; None where it has none.
    """

    program: ClosedJaxpr
    rebuilt: Callable[[Sequence[Array]], tuple[Any, Mapping[str, Any]]]
    outputs: tuple[int | None, ...]


def watch_examples(
    function: Function, params: Tree, state: Any, inputs: Any, problem: Problem, exceptions: Exceptions, root: str
) -> Forward:
    """The same as `traced.watch`, of a function that is one of single examples.

    Args:
        function: parameters, state, inputs -> outputs, what was written.
        params: the parameters; shapes suffice.
        state: what it reads beside them and has no examples.
        inputs: what it is called with.
        problem: what is asked.
        exceptions: what is not to be a layer.
        root: the name of a layer whose kernel stands at the top; "" for its address.

    Returns:
        The watched function on these inputs.

    Raises:
        ValueError: if it cannot be called with one example.
    """
    leaves = addresses.flatten(params)
    whole = Traced(function, problem.read, (params, state, inputs))
    program = whole.program(whole.arrays)
    examples, before = whole.examples(program), len(leaves)
    fixed = before + sum(is_array(leaf) for leaf in jax.tree.leaves(state))
    twin, places = twin_of(function, problem.read, (params, state, inputs), examples, fixed)
    problem = problem.settled(whole.read)
    one, found = _of_one(function, problem, (params, state, inputs), whole, places, twin is not None, leaves)
    layers, calls, _ = recognise(leaves, found, 1, problem.rows_of(whole.read), exceptions, root)
    layers = replace(layers, examples=examples, labels=problem.label, jacobian="examples")
    run = _Run(one, calls, examples, {place - before: axis for place, axis in places.items()})
    arrays = whole.arrays[before:]
    probes = {
        name: tuple(jnp.zeros((examples, *call.product.output), call.product.dtype) for call in uses)
        for name, uses in calls.items()
    }
    lifted = {
        layer.name: tuple(_lifted(call, layer.module_axes) for call in calls[layer.name]) for layer in layers.known
    }

    def masked(weights):
        positions = 1 < weights.ndim < len(getattr(whole.read, "shape", ()))
        others = harmless(whole.arrays, places, weights, positions)[before:]
        return partial(run.batch, others), partial(run.gradients, others)

    def both(params, others):
        outputs = whole.rebuilt(jaxpr_as_fun(program)(*jax.tree.leaves(params), *others))[0]
        return problem.read(outputs), problem.read(run.batch(others, params, probes)[0])

    return Forward(
        partial(run.batch, arrays),
        probes,
        layers,
        examples,
        lifted,
        masked,
        by_reverse=has_reverse_rules(one.program.jaxpr),
        half=has_dtype(one.program.jaxpr, jnp.float16),
        each=partial(run.gradients, arrays),
        twice=Twice(both, arrays, frozenset(run.places)),
    )


@dataclass(frozen=True)
class _Run:
    """The function of one example, lifted.

    Attributes:
        one: the function of one example.
        calls: {layer: its uses in it}.
        examples: N.
        places: {which arrays of the inputs have the examples: along which axis}.
    """

    one: One
    calls: Mapping[str, tuple[Call, ...]]
    examples: int
    places: Mapping[int, int]

    def batch(self, others: Sequence[Any], params: Tree, probes: Tree) -> tuple[Any, Any]:
        """Line 2: outputs, ({layer: inputs of each use}, what was written) of a batch."""
        products = [call.product for uses in self.calls.values() for call in uses]
        moving, still = self._parted(others)

        def single(moving, probes):
            given = {
                call.product.path: probe
                for name, uses in self.calls.items()
                for call, probe in zip(uses, probes[name], strict=True)
            }
            values = [*jax.tree.leaves(params), *_together(moving, still)]
            outputs, records = replay(self.one.program, products, values, given)
            seen = {name: tuple(records[c.product.path] for c in uses) for name, uses in self.calls.items()}
            return outputs, seen

        outputs, seen = jax.vmap(single, axis_size=self.examples)(moving, probes)
        outputs, updated = self.one.rebuilt(_batched(self.one, outputs))
        return outputs, (seen, updated)

    def gradients(
        self,
        others: Sequence[Any],
        params: Tree,
        blocks: Sequence[Layer],
        seeds: Sequence[Array],
        where: Array | None = None,
    ) -> dict[str, Array]:
        """Line 3: the gradients of all examples, or of some, by the arrays of some blocks {address: [N, K, *shape]}."""
        there = addresses.flatten(params)
        wanted = {leaf.address: there[leaf.address] for block in blocks for leaf in block.leaves}
        moving, still = self._parted(others)

        def single(moving, seeds):
            def floats(some):
                values = [*(there | some).values(), *_together(moving, still)]
                return _floats(self.one.rebuilt(jaxpr_as_fun(self.one.program)(*values))[0])

            results, back = jax.vjp(floats, wanted)
            seeds = [_like(seed, result, draws) for seed, result in zip(seeds, results, strict=True)]
            return jax.vmap(lambda seed: back(seed)[0])(seeds)

        draws = seeds[0].shape[0]
        by_example = [jnp.moveaxis(s, 1, 0) if s.shape[1:2] == (self.examples,) else None for s in seeds]
        if where is not None:
            return jax.vmap(single)(*jax.tree.map(lambda leaf: leaf[where], (moving, by_example)))
        size = draws * sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
        chunk = min(self.examples, max(1, WORKSPACE // max(4 * size, 1)))
        return lax.map(lambda pair: single(*pair), (moving, by_example), batch_size=chunk)

    def _parted(self, others: Sequence[Any]) -> tuple[dict[int, Array], dict[int, Any]]:
        """The inputs that have the examples, [N, ...] with an axis of one where they were, and the others."""
        moving, still = {}, {}
        for place, leaf in enumerate(others):
            if (axis := self.places.get(place)) is None:
                still[place] = leaf
            else:
                moving[place] = jnp.expand_dims(jnp.moveaxis(jnp.asarray(leaf), axis, 0), axis + 1)
        return moving, still


def _of_one(
    function: Function,
    problem: Problem,
    arguments: Any,
    whole: Traced,
    places: Mapping[int, int],
    is_told: bool,
    leaves: Mapping[str, Any],
) -> tuple[One, Found]:
    """The function of one example, and what is done with its parameters."""
    read = tuple(getattr(whole.read, "shape", ()))
    sizes = [_sized(leaf, places.get(place), 1) for place, leaf in enumerate(whole.arrays)]
    pairs = [_sized(leaf, places.get(place), 2) for place, leaf in enumerate(whole.arrays)]
    traced, other = (Traced(function, problem.read, arguments) for _ in range(2))
    try:
        program, twin = traced.program(sizes), other.program(pairs)
    except Exception as error:
        raise ValueError(_REFUSED.format(why=f"with one example it fails: {error}")) from error
    found = tuple(getattr(traced.read, "shape", ()))
    if not is_told or not read or found != (1, *read[1:]):
        raise ValueError(_REFUSED.format(why=f"of one example the likelihood reads an array of shape {found}"))
    names = [*leaves, *[None] * (len(sizes) - len(leaves))]
    wanted = [place >= traced.kept for place in range(len(program.jaxpr.outvars))]
    uses = checked(follow(program, twin, names, wanted, 1), leaves, program)
    uses = uses._replace(products=tuple(map(_anywhere, uses.products)))
    axes = [
        grown(v.aval.shape, w.aval.shape)
        for v, w in zip(program.jaxpr.outvars[: traced.kept], twin.jaxpr.outvars[: traced.kept], strict=True)
    ]
    return One(program, traced.rebuilt, tuple(axes)), uses


_REFUSED = (
    '`jacobian="examples"` watches a function one example at a time, but {why}. Expected a function of a batch whose '
    "outputs lead with the examples of its inputs, also if there is only one. Give what has no examples as a keyword, "
    'or take `jacobian="rows"`.'
)


def _anywhere(product: Product) -> Product:
    """A product of one example: where no axis is that of the examples, all are positions of the one."""
    if isinstance(product.options, Convolution):
        return product
    return product._replace(examples=_or_nowhere(product.examples), examples_out=_or_nowhere(product.examples_out))


def _or_nowhere(spread: Spread | None) -> Spread:
    return NOWHERE if spread is None else spread


def _lifted(call: Call, stack: int) -> Any:
    return call._replace(inputs=Lifted(call.inputs, stack), outputs=Lifted(call.outputs, stack))


def _sized(leaf: Any, axis: int | None, size: int) -> Any:
    shape = tuple(leaf.shape)
    return jax.ShapeDtypeStruct(shape if axis is None else (*shape[:axis], size, *shape[axis + 1 :]), leaf.dtype)


def _together(moving: Mapping[int, Array], still: Mapping[int, Any]) -> list[Any]:
    both = {**moving, **still}
    return [both[place] for place in sorted(both)]


def _batched(one: One, outputs: Sequence[Array]) -> list[Array]:
    """Outputs [N, ...] of single examples as those of a batch; what has no example, a mean over them."""
    found = []
    for axis, leaf in zip(one.outputs, outputs[: len(one.outputs)], strict=True):
        if axis is not None:
            found.append(jnp.moveaxis(jnp.squeeze(leaf, axis + 1), 0, axis))
        else:
            found.append(jnp.mean(leaf, axis=0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[0])
    return found


def _floats(outputs: Any) -> list[Array]:
    """The leaves of outputs that have a cotangent."""
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]


def _like(seed: Array | None, result: Array, draws: int) -> Array:
    """The cotangents of one example [K, ...] in the shape of its output; zeros of an output that has no examples."""
    if seed is None:
        return jnp.zeros((draws, *result.shape), result.dtype)
    return seed.reshape(draws, *result.shape).astype(result.dtype)
