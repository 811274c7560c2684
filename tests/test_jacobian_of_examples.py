"""Gradients of the examples of any function: `jacobian="examples"`, for parameters of every kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from reference import assert_differs, assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.watch import examples as watched

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.verified]
N, DAMPING = 6, 0.1


def apply(p, x):
    """A layer, a scale, a parameter that enters by a power and one by a sine: only the first is a layer."""
    h = jnp.tanh(x @ p["w"]) * p["scale"] + p["power"] ** 2
    return h @ jnp.sin(p["odd"])


class Alike:
    """The curvature of a batch in pieces, in whose Jacobian each piece has as much weight as any other."""

    def __init__(self, curvature, space):
        self.curvature, self.space, self.count = curvature, lambda: space, curvature.count

    def __call__(self):
        return self.curvature()


def params():
    return {"odd": normal(3, 2, seed=4), "power": normal(3, seed=3), "scale": normal(3, seed=2), "w": normal(4, 3)}


def jacobian(p, x, likelihood_root=1.0):
    """Every output's gradient by all parameters, [N, C, P], over the root of N."""
    flat, tree = ravel_pytree(p)
    return jax.jacrev(lambda flat: apply(tree(flat), x))(flat) * likelihood_root / len(x) ** 0.5


def direction(tx, capture, p, x, y, weights=None):
    """The first update, as one vector."""

    @jax.jit
    def step(p, x, y):
        out = capture.value_and_grad(p, x, y, weights=weights)
        return tx.update(out.grad, tx.init(p), p, curvature=out.curvature)[0], out.grad

    found, gradient = step(p, x, y)
    return ravel_pytree(found)[0], ravel_pytree(gradient)[0]


@pytest.mark.full
def test_tengrad_is_exact_for_parameters_of_no_layer():
    p, x, y = params(), normal(N, 4, seed=5), normal(N, 2, seed=6)
    capture = ng.capture(apply, ng.losses.squared_error, labels="exact", jacobian="examples")
    layers = capture.layers(p, x)
    assert {layer.name for layer in layers.rest} == {"odd", "power", "scale"}
    found, gradient = direction(ng.scale_by_tengrad(layers, damping=DAMPING, blocks="joint"), capture, p, x, y)
    dense = jacobian(p, x).reshape(-1, found.size)
    assert_equal(found, np.linalg.solve(dense.T @ dense + DAMPING * np.eye(found.size), gradient), 1e-8)
    rows = ng.capture(apply, ng.losses.squared_error, labels="exact")
    tx = ng.scale_by_tengrad(rows.layers(p, x), damping=DAMPING, blocks="joint")
    assert_differs(direction(tx, rows, p, x, y)[0], found)


@pytest.mark.full
def test_blocks_of_arrays_are_those_of_the_dense_matrix():
    p, x, y = params(), normal(N, 4, seed=5), normal(N, 2, seed=6)
    capture = ng.capture(apply, ng.losses.squared_error, labels="exact", jacobian="examples")
    tx = ng.scale_by_tengrad(capture.layers(p, x), damping=DAMPING)
    found, gradient = direction(tx, capture, p, x, y)
    dense, start = jacobian(p, x).reshape(-1, found.size), 0
    for size in (6, 3, 3, 12):
        block = dense[:, start : start + size]
        expected = np.linalg.solve(block.T @ block + DAMPING * np.eye(size), gradient[start : start + size])
        assert_equal(found[start : start + size], expected, 1e-8)
        start += size


@pytest.mark.full
def test_the_improved_empirical_fisher_counts_every_parameter():
    p, x, y = params(), normal(N, 4, seed=5), normal(N, 2, seed=6)
    capture = ng.capture(apply, ng.losses.squared_error, labels="true", jacobian="examples")
    settings = {"damping": DAMPING, "blocks": "joint", "target": "ief", "refresh_every": 1}
    found, _ = direction(ng.scale_by_tengrad(capture.layers(p, x), **settings), capture, p, x, y)
    errors = apply(p, x) - y
    rows = jnp.einsum("ncp,nc->np", jacobian(p, x), errors)
    slopes = jnp.sum(errors**2, axis=1) / N**0.5
    assert_equal(found, rows.T @ np.linalg.solve(rows @ rows.T + DAMPING * np.eye(N), slopes), 1e-8)


@pytest.mark.full
def test_gradients_of_examples_are_the_same_in_chunks_in_pieces_and_without_those_of_no_weight(monkeypatch):
    p, x, y = params(), normal(N, 4, seed=5), normal(N, 2, seed=6)
    weights = jnp.array([1.0, 2.0, 1.0, 0.0, 1.0, 1.0])

    def finder(**options):
        capture = ng.capture(apply, ng.losses.squared_error, labels="true", jacobian="examples", **options)
        return jax.jit(lambda x: capture.value_and_grad(p, x, y, weights=weights).curvature()["odd"].examples["value"])

    by_example = jax.jacrev(lambda odd: 0.5 * jnp.sum((apply(p | {"odd": odd}, x) - y) ** 2, axis=1))
    one, found = np.asarray(jax.jit(by_example)(p["odd"])), finder()
    expected = one * np.sqrt(weights)[:, None, None]
    bad = x.at[3].set(jnp.nan)
    assert_equal(found(x)[0], expected)
    assert_equal(found(bad)[0], expected)
    monkeypatch.setattr(watched, "WORKSPACE", 1)
    assert_equal(finder()(x)[0], expected)
    assert_equal(finder(microbatches=3)(x)[0], expected)
    assert_differs(found(x)[0], one)


class Normed(nn.Module):
    """A layer behind a normalisation."""

    of: str

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(3)(x)
        if self.of == "batch":
            h = nn.BatchNorm(use_running_average=False)(h)
        elif self.of == "running":
            h = nn.BatchNorm(use_running_average=True)(h)
        elif self.of == "attention":
            h = nn.softmax(h @ h.T) @ h
        else:
            h = nn.LayerNorm()(h)
        return nn.Dense(2)(h)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["batch", "attention"])
def test_a_model_whose_examples_are_mixed_is_refused_whatever_the_inputs_are(of):
    model, x = Normed(of), jnp.ones((N, 4))  # all alike, of which a normalisation makes zeros
    capture = ng.linen.capture(model, ng.losses.squared_error, jacobian="examples")
    with pytest.raises(ValueError, match="depend on the rest of the batch"):
        capture.layers(model.init(jax.random.key(0), x), x)


@pytest.mark.full
@pytest.mark.parametrize("of", ["layer", "running"])
def test_a_model_that_separates_is_not_refused(of):
    model, x = Normed(of), normal(N, 4)
    capture = ng.linen.capture(model, ng.losses.squared_error, jacobian="examples")
    layers = capture.layers(model.init(jax.random.key(0), x), x)
    assert list(layers) == ["Dense_0", "Dense_1"] and layers.jacobian == "examples"


def test_a_function_that_cannot_be_called_with_one_example_is_refused():
    def pairs(p, x):
        return (x.reshape(N // 2, 2, -1) @ p["w"]).reshape(N, -1)

    capture = ng.capture(pairs, ng.losses.squared_error, jacobian="examples")
    with pytest.raises(ValueError, match="one example at a time"):
        capture.layers({"w": normal(4, 2)}, normal(N, 4))


@pytest.mark.full
def test_labels_are_exact_where_an_example_has_one_output_and_sampled_elsewhere():
    def outputs(of, **options):
        capture = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error, **options)
        return capture.layers({"w": normal(4, of)}, normal(N, 4))

    assert outputs(1).labels == "exact" and outputs(2).labels == "sampled"
    assert outputs(1, draws=2).labels == "sampled" and outputs(1, labels="true").labels == "true"
    assert "labels" in str(outputs(1)) and "exact" in str(outputs(1))


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["true", "exact"])
def test_a_direction_of_which_nothing_is_kept_is_that_of_the_kept_jacobian_in_any_pieces(labels):
    p, x, y = params(), normal(N, 4, seed=5), normal(N, 2, seed=6)
    capture = ng.capture(apply, ng.losses.squared_error, labels=labels, jacobian="examples")
    layers, settings = capture.layers(p, x), {"damping": DAMPING, "blocks": "joint", "refresh_every": 1}
    weights = jnp.array([1.0, 2.0, 1.0, 0.0, 1.0, 1.0])
    expected, _ = direction(ng.scale_by_tengrad(layers, **settings), capture, p, x, y, weights)
    for workspace in (None, 1, 1000):
        tx = ng.scale_by_tengrad(layers, kept=False, workspace=workspace, **settings)
        assert_equal(direction(tx, capture, p, x, y, weights)[0], expected, 1e-8)
    assert not [leaf for leaf in jax.tree.leaves(tx.init(p)) if leaf.size > 1]


@pytest.mark.parametrize(
    ("labels", "workspace"),
    [("exact", 500), *(pytest.param(*row, marks=pytest.mark.full) for row in (("exact", None), ("true", 1)))],
)
def test_a_direction_of_which_nothing_is_kept_is_that_of_the_batch_in_pieces(labels, workspace):
    p, x, y = {key: params()[key] for key in ("odd", "w")}, normal(N, 4, seed=5), normal(N, 2, seed=6)
    weights = jnp.array([1.0, 2.0, 0.1, 0.0, 0.5, 8.0])  # another sum in each piece
    settings = {"damping": DAMPING, "blocks": "joint", "refresh_every": 1}
    watched = {"labels": labels, "jacobian": "examples", "verify": False}

    def odd(p, x):
        return jnp.tanh(x @ p["w"]) @ jnp.sin(p["odd"])

    whole, pieces = (ng.capture(odd, ng.losses.squared_error, microbatches=k, **watched) for k in (1, 3))
    layers = whole.layers(p, x)
    assert {layer.name for layer in layers.rest} == {"odd"}
    kept, unkept = (
        ng.scale_by_tengrad(layers, **settings, **more) for more in ({}, {"kept": False, "workspace": workspace})
    )

    @jax.jit
    def found(p):
        out, parts = (capture.value_and_grad(p, x, y, weights=weights) for capture in (whole, pieces))
        alike = dataclasses.replace(parts.curvature.space(), scales=jnp.full(3, 3**-0.5))
        directions = [
            tx.update(out.grad, tx.init(p), curvature=curvature)[0]
            for tx, curvature in (
                (kept, out.curvature),
                (unkept, parts.curvature),
                (unkept, Alike(parts.curvature, alike)),
            )
        ]
        return [ravel_pytree(each)[0] for each in directions]

    expected, right, wrong = found(p)
    assert_equal(right, expected, 1e-8)
    assert_differs(wrong, expected)


def test_a_direction_of_which_nothing_is_kept_needs_what_it_is_made_of():
    p, x = params(), normal(N, 4)
    layers = ng.capture(apply, ng.losses.squared_error).layers(p, x)
    with pytest.raises(ValueError, match='blocks="joint"'):
        ng.scale_by_tengrad(layers, damping=DAMPING, kept=False, refresh_every=1)
    with pytest.raises(ValueError, match='jacobian="examples"'):
        ng.scale_by_tengrad(layers, damping=DAMPING, kept=False, blocks="joint", refresh_every=1)


@pytest.mark.full
def test_no_array_of_examples_times_parameters_is_formed_where_nothing_is_kept():
    def odd(p, x):
        return jnp.tanh(x @ jnp.sin(p["w"])) @ p["v"]

    of = jax.ShapeDtypeStruct
    p, x, y = {"v": of((60, 1), float), "w": of((60, 60), float)}, of((200, 60), float), of((200, 1), float)
    whole, pieces = (ng.capture(odd, ng.losses.squared_error, jacobian="examples", microbatches=k) for k in (1, 4))
    layers, settings = whole.layers(p, x), {"damping": DAMPING, "blocks": "joint", "refresh_every": 1}

    def bytes_of(capture=whole, **others):
        tx = ng.scale_by_tengrad(layers, **settings, **others)

        def step(p, x, y):
            out = capture.value_and_grad(p, x, y)
            return tx.update(out.grad, tx.init(p), curvature=out.curvature)[0]

        return jax.jit(step).lower(p, x, y).compile().memory_analysis().temp_size_in_bytes

    jacobian = 8 * 200 * 60 * 60
    for capture in (whole, pieces):
        assert bytes_of(capture, kept=False, workspace=2**18) < jacobian / 2 < jacobian < bytes_of(capture)
