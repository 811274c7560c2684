"""Examples whose parts stand in one axis: graphs with their nodes and edges, filled up."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import N, rows_give_the_gradient_of_every_example
from reference import assert_differs, assert_equal, damped, normal

import natgrad_jax as ng
from natgrad_jax.layers.rows import input_moment, output_moment

pytestmark = pytest.mark.usefixtures("x64")
NODES, EDGES = np.array([3, 1, 3, 0, 1, 2]), np.array([2, 0, 5, 0, 0, 1])  # the last graph fills the batch up


class Graphs(NamedTuple):
    """A batch of graphs, as jraph has it."""

    nodes: Any
    edges: Any
    senders: Any
    receivers: Any
    globals: Any
    n_node: Any
    n_edge: Any


def graphs():
    first = np.concatenate([[0], np.cumsum(NODES)[:-1]])
    random = np.random.default_rng(0)
    ends = [first[graph] + random.integers(NODES[graph], size=(2, count)) for graph, count in enumerate(EDGES) if count]
    senders, receivers = map(jnp.asarray, np.concatenate(ends, axis=1))
    counts = jnp.asarray(NODES), jnp.asarray(EDGES)
    return Graphs(normal(10, 3), normal(8, 2, seed=1), senders, receivers, normal(N, 2, seed=2), *counts)


def segments(graphs):
    """Of the nodes and of the edges."""
    order = jnp.arange(len(graphs.n_node))
    return tuple(
        jnp.repeat(order, count, total_repeat_length=rows.shape[0])
        for count, rows in ((graphs.n_node, graphs.nodes), (graphs.n_edge, graphs.edges))
    )


def apply(p, graphs):
    """One round of messages, the sum over the nodes of each graph, a head that sees the globals."""
    sizes, of_nodes = (graphs.nodes.shape[0], graphs.n_node.shape[0]), segments(graphs)[0]
    messages = jnp.tanh(graphs.edges @ p["edge"] + graphs.nodes[graphs.senders] @ p["send"])
    nodes = jnp.tanh(graphs.nodes @ p["node"] + p["bias"] + jax.ops.segment_sum(messages, graphs.receivers, sizes[0]))
    pooled = jax.ops.segment_sum(nodes, of_nodes, sizes[1])
    return jnp.tanh(pooled @ p["head"] + graphs.globals @ p["own"])


def problem():
    shapes = {"edge": (2, 4), "send": (3, 4), "node": (3, 4), "bias": (4,), "head": (4, 2), "own": (2, 2)}
    return {name: normal(*shape, seed=10 + i) for i, (name, shape) in enumerate(shapes.items())}, graphs()


CAPTURE = ng.capture(apply, ng.losses.squared_error, labels="true", segments=segments)


def test_c2_rows_of_nodes_and_edges_give_the_gradient_of_every_graph():
    params, batch = problem()
    y, layers = normal(N, 2, seed=9), CAPTURE.layers(params, batch)
    assert set(layers) == {"edge", "send", "node", "head", "own"} and not layers.rest

    def by_graph(params):
        return 0.5 * jnp.sum((apply(params, batch) - y) ** 2, axis=1)

    @jax.jit
    def measure(params):
        out = CAPTURE.value_and_grad(params, batch, y)
        return out.curvature(), out.grad, jax.jacrev(by_graph)(params)

    rows_give_the_gradient_of_every_example(layers, *measure(params))


@pytest.mark.full
def test_factors_are_moments_of_the_nodes_that_there_are():
    params, batch = problem()
    layer = CAPTURE.layers(params, batch)["node"]
    evidence = CAPTURE.value_and_grad(params, batch, normal(N, 2, seed=9)).curvature()["node"]
    rows = np.concatenate([batch.nodes, np.ones((10, 1))], axis=1)
    assert_equal(input_moment(layer, evidence), rows.T @ rows / N)
    cotangents = np.asarray(evidence.cotangents[0][0]).sum(0)  # every node is of one graph
    assert_equal(output_moment(layer, evidence), cotangents.T @ cotangents / 10)
    assert_differs(output_moment(layer, evidence), cotangents.T @ cotangents / (10 * N))


@pytest.mark.full
def test_the_step_of_tengrad_is_that_of_the_dense_block_of_graphs_without_the_one_of_no_weight():
    params, batch = problem()
    y, weights = normal(N, 2, seed=9), jnp.array([1.0, 1, 1, 1, 1, 0])
    tx = ng.scale_by_tengrad(CAPTURE.layers(params, batch), damping=0.1)

    @jax.jit
    def stepped(params):
        out = CAPTURE.value_and_grad(params, batch, y, weights=weights)
        return out.grad, tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0]

    grad, step = stepped(params)

    def by_graph(edge):
        return 0.5 * jnp.sum((apply({**params, "edge": edge}, batch) - y) ** 2, axis=1)

    jacobian = np.asarray(jax.jacrev(by_graph)(params["edge"])).reshape(N, -1)[:5]
    block = jacobian.T @ jacobian / 5
    assert_equal(step["edge"].reshape(-1), np.linalg.solve(damped(block, 0.1), np.asarray(grad["edge"]).reshape(-1)))


def test_without_segments_nodes_are_no_layer_and_lengths_that_agree_are_refused():
    params, batch = problem()
    layers = ng.capture(apply, ng.losses.squared_error).layers(params, batch)
    assert set(layers) == {"head", "own"}
    alike = batch._replace(edges=normal(10, 2), senders=jnp.zeros(10, int), receivers=jnp.zeros(10, int))
    with pytest.raises(ValueError, match="of one length"):
        CAPTURE.layers(params, alike)
    with pytest.raises(ValueError, match="microbatches"):
        ng.capture(apply, ng.losses.squared_error, segments=segments, microbatches=2)
    floats = ng.capture(apply, ng.losses.squared_error, segments=lambda graphs: graphs.nodes)
    with pytest.raises(TypeError, match=r"expected integers \[M\]"):
        floats.layers(params, batch)


def test_what_to_do_is_said_where_the_number_of_graphs_is_fixed_in_the_function():
    def fixed(p, graphs):
        nodes = jnp.tanh(graphs.nodes @ p["node"])
        return jax.ops.segment_sum(nodes, segments(graphs)[0], 6) @ p["head"]

    def counted(p, graphs):
        nodes = jnp.tanh(graphs.nodes @ p["node"])
        return jax.ops.segment_sum(nodes, segments(graphs)[0], graphs.n_node.shape[0]) @ p["head"]

    params, batch = problem()
    params = {name: params[name] for name in ("node", "head")}
    captures = [ng.capture(each, ng.losses.squared_error, segments=segments) for each in (fixed, counted)]
    found, seen = (capture.layers(params, batch) for capture in captures)
    assert list(seen) == ["node", "head"]
    (note,) = [layer.note for layer in found.rest if layer.name == "node"]
    assert "takes 6 examples and no other number" in note
    assert "num_segments=graphs.n_node.shape[0]" in note
