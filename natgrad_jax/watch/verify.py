"""Whether what was watched of a layer explains its gradient.

The rows of all uses of a layer give its gradient, the sum over rows of a g^T. Where autodiff says something else, the
layer was seen wrongly: something is done with the parameter that no product shows. Compared are both, at perturbed
parameters and for random cotangents of the outputs, so that nothing is zero by chance.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.rows import pulled
from natgrad_jax.base import Array, Evidence, Layer
from natgrad_jax.layers.rows import from_matrix, input_rows, output_rows
from natgrad_jax.watch.common import Forward, Problem, evidence_for

_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
}
"""Options of the compiler for what runs once: on a CPU code that is slow and soon there."""


def wrong(problem: Problem, forward: Forward, params: Tree, given: Any) -> dict[str, str]:
    """The layers whose products do not explain their gradients; none where there are no numbers to compare.

    Args:
        problem: what is asked; only its readout is used.
        forward: the watched function.
        params: near which.
        given: what else the function reads.

    Returns:
        {layer: by how much}.
    """
    arrays = jax.tree.leaves((params, given))
    if not forward.layers.known or any(isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)) for x in arrays):
        return {}
    try:
        found = _run_once(lambda params, key: differences(problem, forward, params, key), params, jax.random.key(0))
    except NameError:  # it names an axis of a `pmap` or `shard_map`, and can be run inside of that only
        return {}
    return {
        name: f"its products explain its gradient but for {float(value):.0%}"
        for name, value in found.items()
        if value > _tolerance(forward, params)
    }


def _run_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function, compiled as quickly as can be; a compiler that does not know the options does it as usual."""
    if jax.default_backend() == "cpu":
        try:
            return jax.jit(function, compiler_options=_QUICKLY)(*arguments)
        except jax.errors.JaxRuntimeError:
            pass
    return jax.jit(function)(*arguments)


def rebuilt(layer: Layer, evidence: Evidence) -> dict[str, Array]:
    """The gradient of a layer as a sum over its rows, {role: array}, of evidence with one draw."""
    columns = jnp.squeeze(output_rows(layer, evidence), axis=-4)
    return from_matrix(layer, pulled(input_rows(layer, evidence), columns))


def differences(problem: Problem, forward: Forward, params: Tree, key: Array) -> dict[str, Array]:
    """How far the rebuilt gradient of each layer is from that of autodiff, relative to its length.

    Args:
        problem: what is asked; only its readout is used.
        forward: the watched function.
        params: near which.
        key: for the cotangents and the perturbation.

    Returns:
        {layer: a number, about the rounding of its dtype where all is seen}; NaN where the gradient is no number.
    """
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params)) + 1))

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        size = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32)))) + 0.1
        return leaf + (0.3 * size * jax.random.normal(next(keys), leaf.shape, jnp.float32)).astype(leaf.dtype)

    def seed_of(read):
        return jax.random.normal(next(keys), read.shape, jnp.float32).astype(read.dtype)

    found = evidence_for(problem, forward, jax.tree.map(moved, params), seed_of)
    return {layer.name: _difference(layer, found[layer.name]) for layer in forward.layers.known}


def _difference(layer: Layer, evidence: Evidence) -> Array:
    assert evidence.gradient is not None, "evidence of a pullback"
    there = rebuilt(layer, evidence)
    pairs = [(there[role], leaf[0].astype(there[role].dtype)) for role, leaf in evidence.gradient.items()]
    apart = sum(jnp.sum(jnp.square(mine - theirs)) for mine, theirs in pairs)
    length = jnp.sum(jnp.stack([jnp.sum(jnp.square(theirs)) for _, theirs in pairs]))
    return jnp.sqrt(apart / jnp.maximum(length, jnp.finfo(length.dtype).tiny))


def _tolerance(forward: Forward, params: Tree) -> float:
    """What rounding may make of a difference: four times the root of the coarsest unit of the dtypes in products."""
    dtypes = {probe.dtype for probes in forward.probes.values() for probe in probes}
    dtypes |= {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return 4 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes) ** 0.5
