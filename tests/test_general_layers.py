"""Layers over any axes (`nn.DenseGeneral`, attention), tables of embeddings: dense Fisher blocks, and dense twins."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from methods_table import ALL_NAMES, LIFTED, inner_jaxprs, of_the_lifting, row
from watching import evidence_of

import natgrad_jax as ng
from natgrad_jax.algebra.rows import OneHot, written_out
from natgrad_jax.layers.rows import from_matrix, gradient_matrix, input_rows, output_rows, to_matrix

pytestmark = pytest.mark.usefixtures("x64")


class Net(nn.Module):
    """A layer between an optional first one and a dense layer on what it gives, for inputs as they come."""

    layer: nn.Module
    swapped: bool = False

    @nn.compact
    def __call__(self, x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = nn.tanh(nn.Dense(x.shape[-1], name="first")(x))
        x = self.layer(x.swapaxes(0, 1) if self.swapped else x)
        x = nn.tanh(x.swapaxes(0, 1) if self.swapped else x)
        return nn.Dense(3, name="last")(x.reshape(len(x), -1))


class Attention(nn.Module):
    """Multi-head attention of a sequence with itself."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, out_features=3)(x)
        return nn.Dense(2)(nn.tanh(x).mean(1))


def floats(*shape):
    return reference.normal(*shape, seed=2)


def places(*shape):
    """Some of seven places, the same in either precision."""
    return jnp.asarray(np.random.default_rng(3).integers(0, 7, shape), "int32")


CASES = {
    "features": (Net(nn.DenseGeneral((2, 3), name="layer")), floats(4, 5), (6, 6)),
    "axes": (Net(nn.DenseGeneral(4, axis=(-2, -1), name="layer")), floats(4, 2, 3), (7, 4)),
    "axes in another order": (Net(nn.DenseGeneral(4, axis=(2, 1), name="layer")), floats(4, 2, 3), (7, 4)),
    "a first axis": (Net(nn.DenseGeneral((2, 2), axis=1, use_bias=False, name="layer")), floats(4, 3, 2), (3, 4)),
    "positions": (Net(nn.DenseGeneral((2, 2), name="layer")), floats(4, 3, 2), (3, 4)),
    "a batch of kernels": (Net(nn.DenseGeneral((2, 1), batch_dims=(0,), name="layer"), True), floats(4, 3, 2), (3, 2)),
    "a batch without bias": (
        Net(nn.DenseGeneral(2, batch_dims=(0,), use_bias=False, name="layer"), True),
        floats(4, 3, 2),
        (2, 2),
    ),
    "embedding": (Net(nn.Embed(7, 4, name="layer")), places(4), (7, 4)),
    "embedding of sequences": (Net(nn.Embed(7, 4, name="layer")), places(4, 3), (7, 4)),
    "embedding of one": (Net(nn.Embed(7, 4, name="layer")), places(1, 3), (7, 4)),
}


class Seen(NamedTuple):
    """A layer on one batch, and the dense Fisher block by autodiff of every copy of it, [S, I O, I O]."""

    layer: ng.Layer
    evidence: ng.Evidence
    params: Any
    block: Any


def stacked(leaves, copies):
    """The arrays of a layer as one vector for each copy, kernel first: [copies, I O]."""
    return jnp.concatenate([jnp.reshape(leaf, (copies, -1)) for leaf in leaves], axis=1)


@cache
def seen(case: str) -> Seen:
    model, x, _ = CASES[case]
    params = jax.tree.map(lambda p: p.astype("float64"), model.init(jax.random.key(1), x)["params"])
    y = jnp.arange(len(x)) % 3
    layers, evidence = evidence_of(model, ng.losses.softmax_cross_entropy, params, x, y)
    layer = layers["layer"]
    leaves = [params["layer"][leaf.role] for leaf in layer.leaves]
    copies = int(np.prod(layer.stack))

    def outputs(leaves, x):
        parts = {leaf.role: value for leaf, value in zip(layer.leaves, leaves, strict=True)}
        return model.apply({"params": {**params, "layer": parts}}, x[None])[0]

    def of_example(x):
        jacobian = [j.reshape(3, copies, -1) for j in jax.jacrev(outputs)(leaves, x)]
        jacobian, p = jnp.concatenate(jacobian, axis=-1), jax.nn.softmax(outputs(leaves, x))
        return jnp.einsum("asp,ab,bsq->spq", jacobian, jnp.diag(p) - jnp.outer(p, p), jacobian)

    return Seen(layer, evidence["layer"], params, jax.jit(lambda x: jnp.mean(jax.vmap(of_example)(x), axis=0))(x))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_captured_block_is_the_dense_fisher_block(case):
    layer, evidence, _, block = seen(case)
    assert layer.shape == CASES[case][2]
    dense = written_out(input_rows(layer, evidence))
    columns = np.asarray(output_rows(layer, evidence))
    vectors = np.einsum("...nti,...knto->...knio", np.asarray(dense), columns)
    vectors = vectors.reshape(*vectors.shape[:-2], -1)
    found = np.einsum("...knp,...knq->...pq", vectors, vectors) / (vectors.shape[-3] * float(evidence.count))
    reference.assert_equal(found.reshape(block.shape), block)
    wrong = vectors[..., ::-1]
    wrong = np.einsum("...knp,...knq->...pq", wrong, wrong) / (vectors.shape[-3] * float(evidence.count))
    reference.assert_differs(wrong.reshape(block.shape), block)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_the_matrix_turns_back_and_its_gradient_is_a_product_of_rows(case):
    layer, evidence, params, _ = seen(case)
    back = from_matrix(layer, to_matrix(layer, params["layer"]))
    for role, leaf in params["layer"].items():
        np.testing.assert_array_equal(back[role], leaf)
    rows, columns = written_out(input_rows(layer, evidence)), output_rows(layer, evidence)
    assert layer.positions == rows.shape[-2]
    products = np.einsum("...nti,...knto->...kio", np.asarray(rows), np.asarray(columns))
    reference.assert_equal(gradient_matrix(layer, evidence), products)


@pytest.mark.full
def test_every_projection_of_attention_is_a_layer():
    model, x = Attention(), floats(4, 3, 4)
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)
    layers = capture.layers(model.init(jax.random.key(0), x), x)
    assert layers.rest == ()
    assert {name.rsplit("/", 1)[-1]: layer.shape for name, layer in layers.items()} == {
        "query": (5, 4),
        "key": (5, 4),
        "value": (5, 4),
        "out": (5, 3),
        "Dense_0": (4, 2),
    }


# Twins: the same network, written with dense layers -----------------------------------------------------------------


class Twins(NamedTuple):
    """Two models of one function: inputs and parameters of either, and the second's parameters from the first's."""

    models: tuple[nn.Module, nn.Module]
    inputs: tuple[Any, Any]
    turned: Any


class OneHotTable(nn.Module):
    """A table of embeddings as a dense layer on one-hot inputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, name="layer")(x)
        return nn.Dense(3, name="last")(nn.tanh(x).reshape(len(x), -1))


class Flat(nn.Module):
    """A layer over two axes as a dense layer on both as one."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="layer")(nn.tanh(nn.Dense(3, name="first")(x)).reshape(len(x), -1))
        return nn.Dense(3, name="last")(nn.tanh(x))


def _table(params):
    return {**params, "layer": {"kernel": params["layer"]["embedding"]}}


def _flat(params):
    return {**params, "layer": {**params["layer"], "kernel": params["layer"]["kernel"].reshape(6, 4)}}


TWINS = {
    "embedding": Twins(
        (CASES["embedding"][0], OneHotTable()), (places(4), jax.nn.one_hot(places(4), 7, dtype="float64")), _table
    ),
    "embedding of sequences": Twins(
        (CASES["embedding of sequences"][0], OneHotTable()),
        (places(4, 3), jax.nn.one_hot(places(4, 3), 7, dtype="float64")),
        _table,
    ),
    "axes": Twins((CASES["axes"][0], Flat()), (floats(4, 2, 3), floats(4, 2, 3)), _flat),
}
LEARNS_ITS_INVERSE = {"kbfgs"}  # exactly diagonal for a table, where the dense twin learns it by BFGS
OFF_THE_DIAGONAL = {"tkfac", "tekfac"}  # their factor of the inputs of several positions is not diagonal
TURNS_THE_UNSEEN = {"ekfac qr pi", "soap"}  # iterated bases of what no batch has shown are arbitrary, and then scaled


def rows_of_twins():
    """Every method on a table, the representatives on the others; all with `-m full`."""
    for twins in TWINS:
        for name in ALL_NAMES:
            marks = () if name in LIFTED else (pytest.mark.full,)
            yield pytest.param(name, twins, marks=marks, id=f"{name}-{twins}")


@pytest.mark.full
@pytest.mark.parametrize(("method", "twins"), [*rows_of_twins()])
def test_a_layer_trains_as_its_dense_twin_does(method, twins):
    table = twins != "axes"
    if table and (
        method in LEARNS_ITS_INVERSE | TURNS_THE_UNSEEN or (method in OFF_THE_DIAGONAL and "sequences" in twins)
    ):
        pytest.skip("another factor by design")
    pair = TWINS[twins]
    start = jax.tree.map(
        lambda p: p.astype("float64"), pair.models[0].init(jax.random.key(1), pair.inputs[0])["params"]
    )
    ends = []
    for model, x, params in zip(pair.models, pair.inputs, (start, pair.turned(start)), strict=True):
        labels = "true" if method == "kbfgs" else "exact"
        capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels=labels)
        settings = {"statistics_every": 1, "refresh_every": 2, "damping": 0.1}
        tx = row(method).optimizer(0.1, capture.layers({"params": params}, x), **settings)

        @jax.jit
        def step(params, state, capture=capture, tx=tx, x=x):
            out = capture.value_and_grad({"params": params}, x, jnp.arange(4) % 3)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(4):
            params, state = step(params, state)
        ends.append(params)
    turned = pair.turned(ends[0])
    for ours, theirs in zip(jax.tree.leaves(turned), jax.tree.leaves(ends[1]), strict=True):
        reference.assert_equal(ours, theirs, gate=1e-7)
    moved = jax.tree.leaves(pair.turned(start))
    assert any(reference.error(ours, old) > 1e-4 for ours, old in zip(jax.tree.leaves(turned), moved, strict=True))


# Tables of embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_rows_of_a_table_are_places_not_vectors():
    layer, evidence, _, _ = seen("embedding of sequences")
    rows = input_rows(layer, evidence)
    assert isinstance(rows, OneHot) and rows.shape == (4, 3, 7)
    np.testing.assert_array_equal(written_out(rows), jax.nn.one_hot(places(4, 3), 7))


@pytest.mark.full
@of_the_lifting(ALL_NAMES)
def test_a_vocabulary_of_fifty_thousand_fits(method):
    """No array of a step, compiled, has as many entries as the one-hot rows or a square of the vocabulary would."""
    vocabulary = 50_000
    model, x = Net(nn.Embed(vocabulary, 2, param_dtype="float32", name="layer")), jnp.arange(24).reshape(8, 3) * 2000
    params = model.init(jax.random.key(0), x)["params"]
    labels = "true" if method == "kbfgs" else "sampled"
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels=labels)
    settings = {"statistics_every": 1, "refresh_every": 2, "damping": 0.1}
    tx = row(method).optimizer(0.1, capture.layers({"params": params}, x), **settings)

    def step(params, state, key):
        out = capture.value_and_grad({"params": params}, x, jnp.arange(8) % 3, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    jaxpr = jax.make_jaxpr(step)(params, tx.init(params), jax.random.key(1))
    largest = max(_sizes(jaxpr.jaxpr))
    assert vocabulary * 2 <= largest < vocabulary * 24
    params, _ = jax.jit(step)(params, tx.init(params), jax.random.key(1))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))


def _sizes(jaxpr):
    """The numbers of entries of all arrays in a program."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in inner_jaxprs(equation):
            yield from _sizes(inner)
