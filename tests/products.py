"""A function of parameters and a batch beside what the engine finds in it: the tables of cases are built of these."""

from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from reference import assert_differs, assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.algebra.rows import written_out
from natgrad_jax.layers.rows import from_matrix, input_rows, output_rows

N = 6


class Case(NamedTuple):
    """A function of parameters and a batch, the names of its layers, and words of the notes of other parameters."""

    apply: Any
    params: Any
    x: Any
    layers: tuple[str, ...]
    notes: dict[str, str]


def case(apply, params, x, layers, **notes):
    params = {name: normal(*shape, seed=place + 1) for place, (name, shape) in enumerate(params.items())}
    return Case(apply, params, normal(*x) if isinstance(x, tuple) else x, tuple(layers.split()), notes)


def model(module, x, layers, notes=MappingProxyType({})):
    """A linen module as a function of its parameters."""
    x = normal(*x) if isinstance(x, tuple) else x
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)["params"]
    leaves, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(tree, [normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])
    return Case(lambda params, x: module.apply({"params": params}, x), params, x, tuple(layers.split()), notes)


def net(function):
    """A linen module from the function of its call."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return Net()


def found(build):
    """The case, its capture and its layers; nothing is compiled for it."""
    one = build()
    capture = ng.capture(one.apply, ng.losses.squared_error, labels="true")
    return one, capture, capture.layers(one.params, one.x)


@cache
def watched(build):
    """The case, its layers, evidence of true labels, and the gradient of every example by autodiff."""
    one, capture, layers = found(build)
    outputs = jax.eval_shape(one.apply, one.params, one.x)
    y = normal(*outputs.shape, seed=9)

    def by_example(params):
        return 0.5 * jnp.sum((one.apply(params, one.x) - y) ** 2, axis=range(1, y.ndim))

    @jax.jit
    def both(params):
        out = capture.value_and_grad(params, one.x, y)
        return out.curvature(), out.grad, jax.jacrev(by_example)(params)

    return one, layers, *both(one.params)


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@partial(jax.jit, static_argnums=0)
def _by_example(layer, evidence):
    rows, columns = written_out(input_rows(layer, evidence)), output_rows(layer, evidence)
    matrices = jnp.einsum("...nti,...knto->n...io", rows, columns)
    return rows, columns, jax.vmap(partial(from_matrix, layer))(matrices)


def by_example(layer, evidence):
    """Rows a and g of a layer, and the gradient of every example by them, {role: [N, ...]}."""
    return jax.tree.map(np.asarray, _by_example(layer, evidence))


def rows_give_the_gradient_of_every_example(layers, evidence, grad, jacobian, idle=()):
    """The evidence of a batch of N explains the gradient of each example, in parameters and order, and their mean.

    The layers that are `idle` have a gradient of zero.
    """
    expected, mean = (flat(jax.tree.map(np.asarray, tree)) for tree in (jacobian, grad))
    for address, leaf in expected.items():
        np.testing.assert_allclose(mean[address] * layers.examples, leaf.sum(0), rtol=1e-9, atol=1e-12)
    for layer in layers.known:
        rows, columns, found = by_example(layer, evidence[layer.name])
        assert layer.positions == rows.shape[-2] == columns.shape[-2]
        ours = np.concatenate([found[leaf.role].reshape(layers.examples, -1) for leaf in layer.leaves], axis=1)
        theirs = np.concatenate([expected[leaf.address].reshape(layers.examples, -1) for leaf in layer.leaves], axis=1)
        if layer.name in idle:
            assert not np.any(ours) and not np.any(theirs)
            continue
        assert_equal(ours, theirs)
        assert_differs(np.roll(ours, 1, axis=0), theirs)
