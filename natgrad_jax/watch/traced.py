"""Watching a function by its trace: what linen, NNX and plain functions have in common.

program, twin <- the function traced on the batch, and on shapes of twice as many examples
products      <- what is done with the parameters (`program.follow`)
layers        <- which of it are layers (`recognise`)
run           <- the program with records and probes at the products of the layers (`program.replay`)
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.trees import differs
from natgrad_jax.base import Array
from natgrad_jax.program.derivative import has_dtype, has_reverse_rules
from natgrad_jax.program.follow import follow
from natgrad_jax.program.products import Found
from natgrad_jax.program.replay import replay
from natgrad_jax.watch.masks import harmless
from natgrad_jax.watch.problem import Forward, Problem
from natgrad_jax.watch.recognise import Exceptions, recognise
from natgrad_jax.watch.segments import found as found_segments
from natgrad_jax.watch.segments import grown

Function = Callable[..., tuple[Any, Mapping[str, Any]]]
"""Parameters, state, inputs -> outputs, what was written."""


def watch(
    function: Function, params: Tree, state: Any, inputs: Any, problem: Problem, exceptions: Exceptions, root: str
) -> Forward:
    """Trace a function once, for its layers and to run it.

    Args:
        function: parameters, state, inputs -> outputs, what was written.
        params: the parameters; shapes suffice.
        state: what it reads beside them and has no examples.
        inputs: what it is called with, (args, kwargs); arrays whose first axis is as long as that of the outputs have
            the examples.
        problem: what is asked.
        exceptions: what is not to be a layer.
        root: the name of a layer whose kernel stands at the top; "" for its address.

    Returns:
        The watched function on these inputs.
    """
    traced = Traced(function, problem.read, (params, state, inputs))
    leaves = addresses.flatten(params)
    program = traced.program(traced.arrays)
    examples = traced.examples(program)
    fixed = len(leaves) + sum(is_array(leaf) for leaf in jax.tree.leaves(state))
    segments = found_segments(problem.segments, inputs[0], examples)
    times = grown(segments)
    twin, places = twin_of(function, problem.read, (params, state, inputs), examples, fixed, times)
    names = [*leaves, *[None] * (len(traced.arrays) - len(leaves))]
    wanted = [place >= traced.kept for place in range(len(program.jaxpr.outvars))]
    found = checked(follow(program, twin, names, wanted, examples, times), leaves, program)
    problem = problem.settled(traced.read)
    draws = problem.rows_of(traced.read)
    norms = problem.norms == "channels" and draws > 0
    layers, calls, touches = recognise(leaves, found, examples, draws, exceptions, root, norms)
    layers = replace(layers, labels=problem.label)
    used = {name: tuple(use.product for use in uses) for name, uses in [*calls.items(), *touches.items()]}
    products = [product for uses in used.values() for product in uses]
    probes = {name: tuple(jnp.zeros(one.output, one.dtype) for one in uses) for name, uses in used.items()}

    def on(others):
        def run(params, probes):
            given = {
                one.path: probe for name, uses in used.items() for one, probe in zip(uses, probes[name], strict=True)
            }
            outputs, records = replay(program, products, [*jax.tree.leaves(params), *others], given)
            seen = {name: tuple(records[one.path] for one in uses) for name, uses in used.items()}
            outputs, updated = traced.rebuilt(outputs)
            return outputs, (seen, updated)

        return run

    def masked(weights):
        positions = 1 < weights.ndim < len(getattr(traced.read, "shape", ()))
        return on(harmless(traced.arrays, places, weights, positions)[len(leaves) :]), None

    by_reverse, half = has_reverse_rules(program.jaxpr), has_dtype(program.jaxpr, jnp.float16)
    run = on(traced.arrays[len(leaves) :])
    return Forward(run, probes, layers, examples, calls, masked, by_reverse, half, segments=segments, norms=touches)


@contextmanager
def noted(inputs: Any) -> Generator[None]:
    """An exception of the model itself gets a note of what it was called with.

    Args:
        inputs: what it is called with, (args, kwargs).

    Yields:
        Nothing.

    Raises:
        Exception: that of the model.
    """
    try:
        yield
    except Exception as error:
        args, kwargs = jax.tree.map(lambda leaf: jax.typeof(leaf) if is_array(leaf) else leaf, inputs)
        given = [*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]
        error.add_note(
            f"So says the model, called with ({', '.join(given)}). Expected its own parameters, and inputs that it "
            "takes: a tuple stands for several positional ones, `ng.Inputs` for any."
        )
        if axes := jax.sharding.get_abstract_mesh().auto_axes:
            error.add_note(
                f"Inside of the capture the axes {list(axes)} are `Auto`: leave `mesh` out of `jax.shard_map` in the "
                "model, and write `jax.lax.with_sharding_constraint` in the place of `jax.sharding.reshard`."
            )
        raise


def checked(found: Found, leaves: Mapping[str, Any], program: ClosedJaxpr) -> Found:
    """Refuse a function of no parameter, and name the parameters that it reads from outside of what it is given."""
    if leaves and not found.used:
        raise ValueError(
            "What the likelihood reads depends on no parameter, so that the gradient is zero. Expected a function that "
            "uses the parameters it is given (of NNX: `call` uses the model it is given), not some that it closes over."
        )
    around = {id(constant) for constant in program.consts}
    why = "the function reads it from outside, not from what it is given"
    closed = {address: why for address in leaves.keys() - found.used if id(leaves[address]) in around}
    return found._replace(otherwise={**found.otherwise, **closed})


class Traced:
    """A function of arrays alone: what else there is among its arguments and results is kept as it is."""

    def __init__(self, function: Function, readout: Callable[[Any], Any], arguments: Any):
        self._function, self._readout = function, readout
        self._given, self._arguments = addresses.parted(arguments, lambda leaf: "array" if is_array(leaf) else "plain")
        self.arrays = self._given["array"]
        self.read: Any = None
        self.kept = 0

    def program(self, arrays: Sequence[Any]) -> ClosedJaxpr:
        """Its trace on arrays, or on shapes. The last outputs are what the likelihood reads."""

        def flat(*arrays):
            params, state, inputs = self._arguments({**self._given, "array": arrays})
            with noted(inputs):
                result = self._function(params, state, inputs)
            found, self._results = addresses.parted(result, lambda leaf: "number" if _is_number(leaf) else "plain")
            self._plain, self.kept = found["plain"], len(found["number"])
            _check_results(self._plain)
            return found["number"], jax.tree.leaves(self._readout(result[0]))

        found, shapes = _traced(flat, arrays)
        self.read = shapes[1][0] if len(shapes[1]) == 1 else shapes[1]
        return found

    def examples(self, program: ClosedJaxpr) -> int:
        """N: the length of the first axis of what the likelihood reads."""
        shape = program.jaxpr.outvars[-1].aval.shape if len(program.jaxpr.outvars) > self.kept else ()
        return shape[0] if shape else 1

    def rebuilt(self, outputs: Sequence[Array]) -> tuple[Any, Mapping[str, Any]]:
        """Outputs and what was written, from the outputs of the program."""
        return self._results({"number": outputs, "plain": self._plain})


def _traced(flat: Callable[..., Any], arrays: Sequence[Any]) -> tuple[ClosedJaxpr, Any]:
    """The trace of a function, also outside of the `pmap` or `shard_map` whose axes it names: of size 1 then."""
    axes: list[tuple[str, int]] = []
    while True:
        try:
            return jax.make_jaxpr(flat, axis_env=axes, return_shape=True)(*arrays)
        except NameError as error:
            name = re.search(r"unbound axis name: (\w+)", str(error))
            if name is None or (name[1], 1) in axes:
                raise
            axes.append((name[1], 1))


def twin_of(
    function: Function,
    readout: Callable[[Any], Any],
    arguments: Any,
    examples: int,
    fixed: int,
    segments: Sequence[tuple[int, int]] = (),
) -> tuple[ClosedJaxpr | None, dict[int, int]]:
    """The trace on twice as many examples, and which arrays have them along which axis.

    The trace is None where the function takes them in no way that was tried. Tried first is that every input with N
    entries along its first axis has the examples there, then that it is the first axis of N entries wherever it stands.
    The first `fixed` arrays are parameters and state. Parts of examples are so many times as many along first axes.
    """
    traced = Traced(function, readout, arguments)
    shapes = [tuple(leaf.shape) for leaf in traced.arrays]
    places = range(fixed, len(shapes))
    leading = {place: 0 for place in places if shapes[place][:1] == (examples,)}
    anywhere = {place: shapes[place].index(examples) for place in places if examples in shapes[place]}
    parts = {place: times for times, size in segments for place in places if shapes[place][:1] == (size,)}
    anywhere = {place: axis for place, axis in anywhere.items() if place not in parts}
    for chosen in (leading, anywhere):
        arrays = [_repeated(leaf, chosen[i]) if i in chosen else leaf for i, leaf in enumerate(traced.arrays)]
        arrays = [_repeated(leaf, 0, parts[i]) if i in parts else leaf for i, leaf in enumerate(arrays)]
        try:
            twin = traced.program(arrays)
        except Exception:  # whatever the function says of shapes that it was not made for
            continue
        if traced.examples(twin) == 2 * examples:
            return twin, chosen
    return None, leading


def _repeated(leaf: Any, axis: int, times: int = 2) -> Any:
    """An array of more examples: its shape; where JAX keeps count of replicas, one that nothing computes."""
    shape = tuple(leaf.shape)
    if isinstance(leaf, jax.core.Tracer) and differs(leaf):
        return jnp.concatenate([leaf] * times, axis=axis)
    return jax.ShapeDtypeStruct((*shape[:axis], times * shape[axis], *shape[axis + 1 :]), leaf.dtype)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_number(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, (bool, int, float, complex))


def _check_results(others: Sequence[Any]) -> None:
    """Refuse what may hold arrays that JAX does not see."""
    for leaf in others:
        if not isinstance(leaf, (str, bytes)):
            raise TypeError(
                f"The model returns a {type(leaf).__name__}, which is no array and no tree of arrays that JAX knows. "
                "Register it (`jax.tree_util.register_dataclass`), or give `method=` a function that returns arrays."
            )
