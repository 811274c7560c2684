"""Verification of layers: what their products do not explain is found, and where examples are mixed is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from products import N
from reference import normal
from test_products import CASES

import natgrad_jax as ng
from natgrad_jax.layers.rows import input_rows, output_rows

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.verified]


def losing(monkeypatch, path):
    """The engine overlooks a use."""
    from natgrad_jax.watch import traced

    def blind(*args):
        found = follow(*args)
        return found._replace(products=tuple(product for product in found.products if product.path != path))

    follow = traced.follow
    monkeypatch.setattr(traced, "follow", blind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "scan over time", "in and out of a scan", "optimized lstm", "conv transpose"])
def test_layers_are_verified(name, recwarn):
    one = CASES[name]()
    capture = ng.capture(one.apply, ng.losses.squared_error)
    assert set(capture.layers(one.params, one.x)) == set(one.layers)
    assert not capture.watch.unexplained and not [w for w in recwarn if "explain" in str(w.message)]


@pytest.mark.full
def test_a_use_that_was_overlooked_is_found_by_verification_and_costs_the_layer(monkeypatch):
    def apply(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"] @ p["v"]

    params, x, y = {"w": normal(4, 4), "v": normal(4, 2, seed=1)}, normal(N, 4), normal(N, 2)
    losing(monkeypatch, (2,))
    capture = ng.capture(apply, ng.losses.squared_error, labels="true")
    with pytest.warns(UserWarning, match="do not explain"):
        layers = capture.layers(params, x)
    assert list(layers) == ["v"] and "explain its gradient" in layers.rest[0].note
    out = capture.value_and_grad(params, x, y)
    assert set(out.curvature()) == {"v", "w"}
    careless = ng.capture(apply, ng.losses.squared_error, verify=False)
    assert set(careless.layers(params, x)) == {"w", "v"}


def _attended(p, x):
    """Every example attends to all others."""
    h = x @ p["w"]
    return jax.nn.softmax(h @ h.T) @ h @ p["v"]


def _causal(p, x):
    """Every example sees those before it."""
    return jnp.cumsum(x @ p["w"], axis=0) @ p["v"]


def _normalised(p, x):
    h = x @ p["w"]
    return ((h - h.mean(0)) / h.std(0)) @ p["v"]


MIXED = {
    "attention over the batch": (_attended, ("w",)),
    "examples before it": (_causal, ("w",)),
    "examples behind it": (lambda p, x: jnp.cumsum((x @ p["w"])[::-1], axis=0)[::-1] @ p["v"], ("w",)),
    "examples in another order": (lambda p, x: jnp.tanh(x[::-1] @ p["w"])[::-1] @ p["v"], ("w",)),
    "batch normalisation": (_normalised, ("w",)),
    "a neighbour": (lambda p, x: x @ p["w"] @ p["v"] + jnp.roll(x, 1, axis=0) @ p["w"] @ p["v"], ()),
    "a neighbour, behind the layer": (lambda p, x: (h := x @ p["w"] @ p["v"]) + jnp.roll(h, 1, axis=0), ("v", "w")),
    "a readout": (lambda p, x: (h := x @ p["w"] @ p["v"]) - h.mean(0), ("v", "w")),
    "inputs": (lambda p, x: jnp.tanh((x - x.mean(0)) @ p["w"]) @ p["v"], ()),
    "none": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], ()),
    "a norm of each example": (lambda p, x: (h := x @ p["w"]) / jnp.std(h, axis=1, keepdims=True) @ p["v"], ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_layers_behind_which_examples_are_mixed_are_told_and_have_no_gradient_of_an_example(name):
    apply, mixed = MIXED[name]
    params, x, y = {"w": normal(4, 3), "v": normal(3, 2, seed=1)}, normal(N, 4), normal(N, 2, seed=2)
    capture = ng.capture(apply, ng.losses.squared_error, labels="true")
    layers = capture.layers(params, x)
    assert set(layers) == {"v", "w"} and sorted(layers.mixed) == list(mixed)
    assert ("examples are mixed" in str(layers)) == bool(mixed)
    evidence = capture.value_and_grad(params, x, y).curvature()

    def by_example(params):
        return 0.5 * jnp.sum((apply(params, x) - y) ** 2, axis=1)

    for address, expected in jax.jacrev(by_example)(params).items():
        rows, columns = input_rows(layers[address], evidence[address]), output_rows(layers[address], evidence[address])
        found = np.einsum("nti,knto->nio", np.asarray(rows), np.asarray(columns))
        assert np.allclose(found, expected, rtol=1e-9, atol=1e-12) == (address not in mixed)
        np.testing.assert_allclose(found.sum(0), expected.sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(("norm", "mixed"), [(nn.BatchNorm, ["c", "d"]), (nn.LayerNorm, [])])
def test_a_layer_in_front_of_batch_normalisation_is_told_also_in_half_precision_and_among_many(norm, mixed):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
            x = nn.Conv(4, (2,), feature_group_count=2, name="c", **half)(nn.Embed(3, 2, name="e", **half)(x))
            x = nn.Dense(3, name="d", **half)(nn.tanh(x).reshape(len(x), -1))
            x = norm(**({"use_running_average": False} if norm is nn.BatchNorm else {}), **half)(x)
            return nn.Dense(2, name="last", **half)(x)

    x = jnp.arange(3 * 600).reshape(600, 3) % 7 % 3
    variables = Net().init(jax.random.key(0), x)
    layers = ng.linen.capture(Net(), ng.losses.softmax_cross_entropy).layers(variables, x)
    assert set(layers) == {"c", "d", "e", "last"} and sorted(layers.mixed) == sorted(mixed + ["e"] * bool(mixed))
