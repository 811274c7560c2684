"""Models are called as they are, whatever their arguments and outputs; what cannot be watched is refused in words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from products import N
from reference import assert_equal, normal

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")


class Graph(NamedTuple):
    """An input of several arrays."""

    nodes: Any
    globals: Any


def test_a_model_is_called_as_it_is():
    params, y = {"w": normal(4, 3)}, normal(N, 3)
    graph = Graph(normal(N, 4), normal(N, 3, seed=4))

    def of_graph(p, graph):
        return graph.nodes @ p["w"] + graph.globals

    def of_keywords(p, *, inputs, targets, key):
        return inputs @ p["w"] + targets + 0 * key

    first = ng.capture(of_graph, ng.losses.squared_error, labels="true").value_and_grad(params, graph, y)
    inputs = ng.Inputs(inputs=graph.nodes, targets=graph.globals, key=1.0)
    second = ng.capture(of_keywords, ng.losses.squared_error, labels="true").value_and_grad(params, inputs, y)
    assert_equal(second.grad["w"], first.grad["w"])
    assert_equal(second.curvature()["w"].inputs[0], first.curvature()["w"].inputs[0])


def test_only_what_is_read_is_differentiated():
    def apply(p, x):
        return {"logits": x @ p["w"], "count": jnp.arange(3), "name": "head"}

    capture = ng.capture(apply, ng.losses.squared_error, labels="true", readout=lambda out: out["logits"])
    out = capture.value_and_grad({"w": normal(4, 3)}, normal(N, 4), normal(N, 3))
    assert out.outputs["name"] == "head" and out.outputs["count"].tolist() == [0, 1, 2]
    assert out.curvature()["w"].inputs[0].shape == (N, 4)


def test_an_output_that_jax_does_not_know_is_refused_in_words():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    capture = ng.capture(lambda p, x: Output(x @ p["w"]), ng.losses.squared_error, readout=lambda out: out.logits)
    with pytest.raises(TypeError, match=r"returns a Output.*register_dataclass"):
        capture.layers({"w": normal(4, 3)}, normal(N, 4))


def test_one_example_without_an_axis_of_examples_is_refused():
    capture = ng.capture(lambda p, x: x @ p["w"], ng.losses.softmax_cross_entropy, labels="true")
    with pytest.raises(ValueError, match=r"outputs have shape \(3,\).*x\[None\]"):
        capture.value_and_grad({"w": normal(4, 3)}, normal(4), 2)


def test_a_module_given_to_the_door_of_functions_is_sent_to_its_own():
    with pytest.raises(TypeError, match=r"ng\.linen\.capture"):
        ng.capture(nn.Dense(3), ng.losses.squared_error)


@pytest.mark.full
def test_linen_and_a_plain_function_of_the_same_are_the_same_to_the_last_bit():
    x, y = normal(N, 4), normal(N, 3, seed=1)
    module = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
    params = module.init(jax.random.key(0), x)["params"]

    def apply(p, x):
        h = jnp.tanh(x @ p["layers_0"]["kernel"] + p["layers_0"]["bias"])
        return h @ p["layers_2"]["kernel"] + p["layers_2"]["bias"]

    linen = ng.linen.capture(module, ng.losses.squared_error, labels="true")
    plain = ng.capture(apply, ng.losses.squared_error, labels="true")
    assert linen.layers({"params": params}, x) == plain.layers(params, x)
    ours = linen.value_and_grad({"params": params}, x, y).curvature()
    theirs = plain.value_and_grad(params, x, y).curvature()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_layers_tell_what_a_method_will_hold_and_print_what_it_holds_of_a_wide_side():
    params = {"w": jnp.zeros((4, 30_000), "float32"), "v": jnp.zeros((30_000, 2), "float32")}
    capture = ng.capture(lambda p, x: x @ p["w"] @ p["v"], ng.losses.squared_error)
    layers = capture.layers(params, jnp.zeros((N, 4), "float32"))
    assert "240.1 kB" in str(layers)  # a diagonal of 30,000 and a factor of 4, and their inverses
    for tx in (ng.scale_by_kfac(layers, damping=0.1), ng.scale_by_kfac(layers, damping=0.1, max_factor_dim=2)):
        state = tx.init(params)
        assert layers.bytes(tx) == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < 1e6
    whole, cut = (ng.scale_by_kfac(layers, damping=0.1, max_factor_dim=width) for width in (4, 2))
    assert layers.bytes(whole) - layers.bytes(cut) == 4 * (2 * 4**2 - 2 * 4)  # of the one side of 4: A and its inverse


@pytest.mark.full
@pytest.mark.verified
def test_layers_are_found_outside_of_the_axis_that_a_model_names():
    def apply(p, x):
        h = x @ p["w"]
        return (h - jax.lax.pmean(h.mean(0), "devices")) @ p["v"]

    params, x = {"w": normal(4, 3), "v": normal(3, 2, seed=1)}, normal(N, 4)
    capture = ng.capture(apply, ng.losses.squared_error, labels="true")
    layers = capture.layers(params, x)
    assert set(layers) == {"w", "v"} and layers["w"].positions == 1

    def grad(x, y):
        return capture.value_and_grad(params, x, y).grad

    found = jax.vmap(grad, axis_name="devices")(x[None], normal(1, N, 2))
    assert found["w"].shape == (1, 4, 3)


def test_callbacks_of_a_model_run_as_often_as_in_its_plain_gradient():
    def apply(p, x):
        def turn(h, _):
            jax.debug.callback(lambda value: calls.append(float(value)), h.sum())
            return jnp.tanh(h @ p["w"]), None

        return jax.lax.scan(turn, x, None, length=3)[0]

    params, x, y = {"w": normal(4, 4)}, normal(N, 4), normal(N, 4, seed=1)
    calls: list[float] = []
    jax.grad(lambda p: 0.5 * jnp.sum((apply(p, x) - y) ** 2) / N)(params)
    jax.effects_barrier()
    plain = calls.copy()
    calls.clear()
    ng.capture(apply, ng.losses.squared_error, labels="true").value_and_grad(params, x, y)
    jax.effects_barrier()
    np.testing.assert_allclose(calls, plain)
    assert len(plain) == 3
