"""Whether what was watched of a layer explains its gradient.

The rows of all uses of a layer give its gradient, the sum over rows of a g^T. Where autodiff says something else, the
layer was seen wrongly: something is done with the parameter that no product shows. Compared are both, at perturbed
parameters and for random cotangents of the outputs, so that nothing is zero by chance.

The outputs of one example have a cotangent of zero. Where the rows of that example still have a gradient, the outputs
of others depend on them: behind the layer examples are mixed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.rows import lengths, pulled
from natgrad_jax.base import Array, Evidence, Layer
from natgrad_jax.layers.rows import from_matrix, input_rows, output_rows
from natgrad_jax.watch.common import evidence_for
from natgrad_jax.watch.problem import Forward, Problem

_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
}
"""Options of the compiler for what runs once: on a CPU code that is slow and soon there."""

_LEAK = 1e-6
"""Of cotangents that should be zero: zeros are passed on without rounding, in whatever dtype."""


class Verdict(NamedTuple):
    """What verification found.

    Attributes:
        wrong: {layer: by how much its products do not explain its gradient}.
        mixed: the layers behind which examples are mixed.
    """

    wrong: dict[str, str]
    mixed: tuple[str, ...]


class Measured(NamedTuple):
    """Numbers of one layer.

    Attributes:
        apart: how far the rebuilt gradient is from that of autodiff, relative to its length; about the rounding of its
            dtype where all is seen, NaN where the gradient is no number.
        leaked: length of the products of the rows of the example that has none, over the mean one of the others.
    """

    apart: Array
    leaked: Array


UNKNOWN = Verdict({}, ())


def verdict(problem: Problem, forward: Forward, params: Tree, given: Any) -> Verdict:
    """Whether the products of each layer explain its gradient, and its rows their examples.

    Args:
        problem: what is asked; only its readout is used.
        forward: the watched function.
        params: near which.
        given: what else the function reads.

    Returns:
        What was found; nothing where there are no numbers to compare.
    """
    arrays = jax.tree.leaves((params, given))
    if any(isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)) for x in arrays):
        return UNKNOWN
    try:
        _check_separate(forward, params)
        if not (forward.layers.known or _norms(forward)):
            return UNKNOWN
        found = _run_once(lambda params, key: differences(problem, forward, params, key), params, jax.random.key(0))
    except NameError:  # it names an axis of a `pmap` or `shard_map`, and can be run inside of that only
        return UNKNOWN
    tolerance = _tolerance(forward, params)
    wrong = {
        name: f"its products explain its gradient but for {float(each.apart):.0%}"
        for name, each in found.items()
        if each.apart > tolerance
    }
    return Verdict(wrong, tuple(name for name, each in found.items() if name not in wrong and each.leaked > _LEAK))


def _check_separate(forward: Forward, params: Tree) -> None:
    """Refuse a function of a batch that is not one of its single examples, on the inputs given and on others."""
    if (twice := forward.twice) is None:
        return
    both, places = twice.both, twice.places

    def apart(params, inputs, key):
        keys = iter(jax.random.split(key, len(inputs) + len(jax.tree.leaves(params))))
        elsewhere = jax.tree.map(lambda leaf: _moved(leaf, next(keys)), params)
        others = [_moved(leaf, next(keys)) if at in places else leaf for at, leaf in enumerate(inputs)]
        return [_apart(*both(elsewhere, some)) for some in (inputs, others)]

    found = [float(each) for each in _run_once(apart, params, list(twice.inputs), jax.random.key(1))]
    if max(found) > _tolerance(forward, params):
        raise ValueError(
            f'`jacobian="examples"` watches the model one example at a time, but on this batch its outputs are others, '
            f"by {max(found):.0%} of their length: the outputs of an example depend on the rest of the batch (batch "
            "normalisation in training, attention over a batch), or on what is drawn for it (dropout). It has no "
            'gradients of single examples; take `jacobian="rows"`, which says behind which layers examples are mixed.'
        )


def _apart(batch: Array, single: Array) -> Array:
    """How far two arrays are apart, relative to their length; 0 where there are no numbers to compare."""
    batch, single = (each.astype(jnp.promote_types(each.dtype, jnp.float32)) for each in (batch, single))
    known = jnp.isfinite(batch) & jnp.isfinite(single)
    length = jnp.sqrt(jnp.sum(jnp.where(known, batch, 0) ** 2))
    apart = jnp.sqrt(jnp.sum(jnp.where(known, batch - single, 0) ** 2))
    return apart / jnp.maximum(length, jnp.finfo(length.dtype).tiny)


def _moved(leaf: Array, key: Array) -> Array:
    """An array perturbed by a third of its size; whole numbers as they are."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    size = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32)))) + 0.1
    return leaf + (0.3 * size * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)


def _run_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function, compiled as quickly as can be; a compiler that does not know the options does it as usual.

    The batch that it closes over is an argument of the program: the compiler would compute with a constant.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def run(constants, *leaves):
        return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*leaves)

    def found(**options):
        return jax.jit(run, **options)(program.consts, *jax.tree.leaves(arguments))

    try:
        leaves = found(compiler_options=_QUICKLY if jax.default_backend() == "cpu" else None)
    except jax.errors.JaxRuntimeError:
        leaves = found()
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def rebuilt(layer: Layer, evidence: Evidence) -> dict[str, Array]:
    """The gradient of a layer as a sum over its rows, {role: array}, of evidence with one draw."""
    columns = jnp.squeeze(output_rows(layer, evidence), axis=-4)
    return from_matrix(layer, pulled(input_rows(layer, evidence), columns))


def differences(problem: Problem, forward: Forward, params: Tree, key: Array) -> dict[str, Measured]:
    """What one pullback says of each layer.

    Args:
        problem: what is asked; only its readout is used.
        forward: the watched function.
        params: near which.
        key: for the cotangents and the perturbation.

    Returns:
        {layer: its numbers}.
    """
    silent = forward.examples // 3  # neither the first nor the last, nor the one in the middle
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params)) + 1))

    def seed_of(read):
        seed = jax.random.normal(next(keys), read.shape, jnp.float32).astype(read.dtype)
        return seed if forward.examples == 1 else seed.at[silent].set(0)

    found = evidence_for(problem, forward, jax.tree.map(lambda leaf: _moved(leaf, next(keys)), params), seed_of)
    known = {layer.name: _measured(layer, found[layer.name], silent) for layer in forward.layers.known}
    return known | {layer.name: _measured_norm(found[layer.name]) for layer in _norms(forward)}


def _norms(forward: Forward) -> list[Layer]:
    return [layer for layer in forward.layers.rest if layer.kind == "norm"]


def _measured_norm(evidence: Evidence) -> Measured:
    """Those of a norm: its gradient is the sum of those of the examples."""
    assert evidence.gradient is not None and evidence.examples is not None, "evidence of a pullback"
    examples = evidence.examples
    pairs = [(jnp.sum(examples[role][0], axis=0), leaf[0]) for role, leaf in evidence.gradient.items()]
    return Measured(_relative([(mine, theirs.astype(mine.dtype)) for mine, theirs in pairs]), jnp.zeros(()))


def _relative(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """How far some arrays are from others, relative to the length of these."""
    apart = jnp.sum(jnp.stack([jnp.sum(jnp.square(mine - theirs)) for mine, theirs in pairs]))
    length = jnp.sum(jnp.stack([jnp.sum(jnp.square(theirs)) for _, theirs in pairs]))
    return jnp.sqrt(apart / jnp.maximum(length, jnp.finfo(length.dtype).tiny))


def _measured(layer: Layer, evidence: Evidence, silent: int) -> Measured:
    assert evidence.gradient is not None, "evidence of a pullback"
    there = rebuilt(layer, evidence)
    pairs = [(there[role], leaf[0].astype(there[role].dtype)) for role, leaf in evidence.gradient.items()]
    columns = jnp.sum(jnp.square(output_rows(layer, evidence)), axis=-1)
    rows = lengths(input_rows(layer, evidence))  # of a use the other way round the cotangents are here
    products = columns * rows[..., None, :, :]
    examples = products.shape[-2]
    whole, own = jnp.sum(products), jnp.sum(products[..., silent, :])
    others = (whole - own) / max(examples - 1, 1)
    leaked = jnp.sqrt(own / jnp.maximum(others, jnp.finfo(others.dtype).tiny)) if examples > 1 else jnp.zeros(())
    return Measured(_relative(pairs), leaked)


def _tolerance(forward: Forward, params: Tree) -> float:
    """What rounding may make of a difference: four times the root of the coarsest unit of the dtypes in products."""
    dtypes = {probe.dtype for probes in forward.probes.values() for probe in probes}
    dtypes |= {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return 4 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes) ** 0.5
