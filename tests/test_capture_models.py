"""Capturing changes nothing, and sees the same layers through remat, jit, scan, vmap and shared modules."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from reference import assert_differs, assert_equal, normal, random_params
from watching import captured_fisher, evidence_of, gradients, summed

import natgrad_jax as ng

# C3 -------------------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Convolution, batch normalisation, rematerialised dense layer, dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (2, 2), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.relu(nn.remat(nn.Dense)(5)(x.reshape(len(x), -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


X, Y = normal(6, 4, 4, 2, dtype="float32"), jnp.arange(6) % 3


class Something(nn.Module):
    """What is quickly run without jit."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.remat(nn.Dense)(5)(x.reshape(len(x), -1)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def plainly(model, variables, rngs):
    """Loss, gradient and written collections, by jax alone."""

    def loss(params):
        collections = {**variables, "params": params}
        outputs, updated = model.apply(collections, X, train=True, rngs=rngs, mutable=["batch_stats"])
        terms = optax.softmax_cross_entropy_with_integer_labels(outputs, Y)
        return jnp.sum(terms) / len(X), updated

    (value, updated), grad = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, grad, updated


def watching(model, variables, rngs):
    """The same by a capture whose curvature is also computed."""
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)
    key = jax.random.key(5)
    out = capture.value_and_grad(variables, X, Y, key=key, train=True, rngs=rngs, mutable=["batch_stats"])
    return (out.value, out.grad, out.updated), out.curvature()


def same(ours, theirs):
    """Bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "jitted"), [(Everything(), True), (Something(), True), (Something(), False)])
def test_c3_loss_gradient_and_batch_statistics_are_those_of_jax_bit_for_bit(model, jitted):
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), X)
    run = partial(jax.jit, static_argnums=0) if jitted else lambda function: function
    rngs = {"dropout": jax.random.key(1)}
    ours, _ = run(watching)(model, variables, rngs)
    assert same(ours, run(plainly)(model, variables, rngs))
    assert not same(ours, run(plainly)(model, variables, {"dropout": jax.random.key(2)}))


# Shared modules -------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer on both halves of the input."""

    @nn.compact
    def __call__(self, x):
        left, right = jnp.split(x, 2, axis=-1)
        shared, head = nn.Dense(3, name="shared"), nn.Dense(2, name="head")
        return head(nn.tanh(shared(left)) * shared(right))


@pytest.mark.usefixtures("x64")
def test_a_module_called_twice_is_one_layer_whose_calls_are_positions():
    model, x, y = Twice(), normal(4, 6), normal(4, 2, seed=1)
    params = random_params(model, x)
    layers, evidence = evidence_of(model, ng.losses.squared_error, params, x, y, labels="true")
    assert (layers["shared"].positions, layers["head"].positions, layers.examples) == (2, 1, 4)
    found = gradients(layers["shared"], evidence["shared"])[0]
    expected = reference.example_gradients(model, params, ("shared",), "squared_error", x, y)["shared"]
    assert_equal(found, expected)
    one_call = evidence["shared"]._replace(
        inputs=evidence["shared"].inputs[:1], cotangents=evidence["shared"].cotangents[:1]
    )
    once = replace(layers["shared"], uses=layers["shared"].uses[:1])
    assert_differs(gradients(once, one_call)[0], expected)
    with pytest.raises(ValueError, match="is of 1 calls; the layer has 2"):
        gradients(layers["shared"], one_call)


@pytest.mark.usefixtures("x64")
def test_exact_evidence_of_a_module_called_twice_is_its_dense_block():
    model, x, y = Twice(), normal(4, 6), normal(4, 2, seed=1)
    params = random_params(model, x)
    layers, evidence = evidence_of(model, ng.losses.squared_error, params, x, y)
    expected = reference.fisher_blocks(model, params, ("shared",), "squared_error", x, y)["shared"]
    assert_equal(captured_fisher(layers["shared"], evidence["shared"]), expected)


# Transforms -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What is transformed: two layers, the second called twice."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        inner, outer = nn.Dense(4), nn.Dense(self.width)
        return outer(nn.tanh(inner(x))) + outer(nn.silu(inner(x)))


class Net(nn.Module):
    """A block, plain or transformed."""

    lift: Any = lambda block: block

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(self.lift(Block)(name="block")(x))


LIFTS = {"remat": nn.remat, "jit": nn.jit, "remat of jit": lambda block: nn.remat(nn.jit(block))}


def observed(model, params, x, labels="true"):
    y = normal(*jax.eval_shape(lambda p: model.apply({"params": p}, x), params).shape, seed=1, dtype=str(x.dtype))
    return evidence_of(model, ng.losses.squared_error, params, x, y, labels=labels)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lift", LIFTS)
def test_c3_evidence_is_the_same_through(lift):
    x = normal(4, 5)
    params = random_params(Net(), x)
    _, expected = observed(Net(), params, x)
    layers, found = observed(Net(LIFTS[lift]), params, x)
    assert set(layers) == {"block/Dense_0", "block/Dense_1", "head"}
    for name, layer in layers.items():
        assert len(found[name].inputs) == len(expected[name].inputs) == (1 if name == "head" else 2)
        assert_equal(gradients(layer, found[name]), gradients(layer, expected[name]))


class Unrolled(nn.Module):
    """Three blocks one after the other."""

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = Block(5, name=f"block_{index}")(x)
        return x


class Scanned(nn.Module):
    """The same three blocks in a scan."""

    body: Any = Block

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0}
        body = nn.scan(lambda block, x, _: (block(x), None), variable_axes=axes, split_rngs={"params": True}, length=3)
        return body(self.body(5, name="block"), x, None)[0]


def in_a_stack(params):
    """The parameters of `block_0`, `block_1`, ... stacked, as a scan or vmap holds them."""
    return {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"block_{i}"] for i in range(3)))}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("body", [Block, nn.remat(Block)], ids=["scan", "scan of remat"])
def test_c3_evidence_of_a_scan_is_that_of_the_unrolled_layers(body):
    x = normal(4, 5)
    params = random_params(Unrolled(), x)
    unrolled, expected = observed(Unrolled(), params, x)
    layers, found = observed(Scanned(body), in_a_stack(params), x)
    for name in ("Dense_0", "Dense_1"):
        layer, stacked = layers[f"block/{name}"], found[f"block/{name}"]
        assert (layer.stack, layer.positions) == ((3,), 2)
        one_by_one = [gradients(unrolled[f"block_{i}/{name}"], expected[f"block_{i}/{name}"]) for i in range(3)]
        assert_equal(gradients(layer, stacked), np.stack(one_by_one))
        assert_equal(summed(layer, stacked)[:, 0], np.stack(one_by_one).sum((1, 2)))
        assert_differs(gradients(layer, stacked), np.stack(one_by_one[::-1]))


class Apart(nn.Module):
    """Three blocks beside each other."""

    @nn.compact
    def __call__(self, x):
        return jnp.stack([Block(name=f"block_{index}")(x) for index in range(3)], axis=1)


class Mapped(nn.Module):
    """The same three blocks in a vmap."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "in_axes": None, "out_axes": 1, "axis_size": 3}
        return nn.vmap(Block, split_rngs={"params": True}, **axes)(name="block")(x)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_c3_evidence_of_a_vmap_is_that_of_its_members():
    x = normal(4, 5)
    params = random_params(Apart(), x)
    apart, expected = observed(Apart(), params, x, labels="exact")
    layers, found = observed(Mapped(), in_a_stack(params), x, labels="exact")
    for name in ("Dense_0", "Dense_1"):
        assert layers[f"block/{name}"].stack == (3,)
        blocks = captured_fisher(layers[f"block/{name}"], found[f"block/{name}"])
        for index in range(3):
            member = f"block_{index}/{name}"
            assert_equal(blocks[index], captured_fisher(apart[member], expected[member]))
        assert_differs(blocks[0], blocks[1])


class Layers(nn.Module):
    """Examples and positions merged into one axis, in front of a layer."""

    @nn.compact
    def __call__(self, x):
        rows = nn.Dense(4, name="merged")(x.reshape(-1, x.shape[-1]))
        return nn.Dense(3, name="head")(nn.tanh(rows).reshape(*x.shape[:-1], -1).sum(1))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_an_axis_of_merged_examples_and_positions_is_taken_apart():
    model, x = Layers(), normal(4, 2, 5)
    params = random_params(model, x)
    y = normal(4, 3, seed=1)
    layers, evidence = evidence_of(model, ng.losses.squared_error, params, x, y, labels="true")
    assert layers["merged"].positions == 2
    expected = reference.example_gradients(model, params, ("merged",), "squared_error", x, y)["merged"]
    assert_equal(gradients(layers["merged"], evidence["merged"])[0], expected)
