"""What is watched is what is done with the parameters, whatever module, transformation or framework it is done in."""

from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import assert_differs, assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.algebra.rows import written_out
from natgrad_jax.layers.rows import from_matrix, input_moment, input_rows, output_moment, output_rows

pytestmark = pytest.mark.usefixtures("x64")
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


def standardised(p):
    return (p - p.mean(0)) / p.std(0)


class Scanned(nn.Module):
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        def body(block, x, _):
            return nn.tanh(block(x)), None

        cell = nn.remat(nn.Dense) if self.remat else nn.Dense
        axes = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(body, length=x.shape[-1], **axes)(cell(x.shape[-1], name="block"), x, None)[0]


class Standard(nn.Dense):
    """A dense layer whose kernel is standardised before it is used, by overriding `param`."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return standardised(value) if name == "kernel" else value


def _in_and_out_of_a_scan(p, x):
    h = jnp.tanh(x @ p["w"])
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), h, None, length=3)[0]


def _lstm(cell):
    return net(lambda x: nn.RNN(cell(3, param_dtype="float64", name="cell"))(x).sum(1))


LSTM = " ".join(f"cell/{gate}" for gate in ("ii", "hi", "if", "hf", "ig", "hg", "io", "ho"))
WB = {"w": (4, 3), "b": (3,)}
CASES = {
    # how a parameter comes to its product
    "as it is": lambda: case(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), WB, (N, 4), "w"),
    "transposed": lambda: case(lambda p, x: x @ p["w"].T + p["b"], {"w": (3, 4), "b": (3,)}, (N, 4), "w"),
    "matrix first": lambda: case(lambda p, x: (p["w"] @ x.T).T + p["b"], {"w": (3, 4), "b": (3,)}, (N, 4), "w"),
    "a vector": lambda: case(lambda p, x: (x @ p["w"] + p["b"])[:, None], {"w": (4,), "b": ()}, (N, 4), "w"),
    "reversed": lambda: case(lambda p, x: x @ p["w"][::-1, ::-1], {"w": (4, 3)}, (N, 4), "w"),
    "heads": lambda: case(
        lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]) + p["b"], {"w": (4, 2, 3), "b": (2, 3)}, (N, 4), "w"
    ),
    "heads in front": lambda: case(
        lambda p, x: jnp.einsum("nd,hdk->hnk", x, p["w"]).swapaxes(0, 1) + p["b"],
        {"w": (2, 4, 3), "b": (2, 3)},
        (N, 4),
        "w",
    ),
    "joined": lambda: case(
        lambda p, x: jnp.tanh(x @ jnp.concatenate([p["w"], p["v"]], 1) + jnp.concatenate([p["b"], p["c"]])),
        {"w": (4, 3), "v": (4, 2), "b": (3,), "c": (2,)},
        (N, 4),
        "w+v",
    ),
    "two products, one bias": lambda: case(
        lambda p, x: x @ p["w"] + x[:, :2] @ p["v"] + p["b"], {"w": (4, 3), "v": (2, 3), "b": (3,)}, (N, 4), "w v"
    ),
    "standardised": lambda: case(
        lambda p, x: x @ standardised(p["w"]) + p["b"], WB, (N, 4), "", w="goes through", b="added"
    ),
    "masked": lambda: case(
        lambda p, x: x @ (p["w"] * jnp.eye(4, 3)), {"w": (4, 3)}, (N, 4), "", w="factor entry by entry"
    ),
    "cut": lambda: case(lambda p, x: x @ p["w"][:, :2], {"w": (4, 3)}, (N, 4), "", w="cut"),
    "rounded": lambda: case(
        lambda p, x: x @ p["w"].astype(int).astype(x.dtype), {"w": (4, 3)}, (N, 4), "", w="goes through"
    ),
    "held fixed at one use": lambda: case(
        lambda p, x: jnp.tanh(x @ jax.lax.stop_gradient(p["w"])) + x @ p["w"], {"w": (4, 3)}, (N, 4), "w"
    ),
    "a product of two": lambda: case(
        lambda p, x: x @ (p["w"] @ p["v"]), {"w": (4, 2), "v": (2, 3)}, (N, 4), "", w="another", v="another"
    ),
    "read elsewhere": lambda: case(
        lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2), {"w": (4, 3)}, (N, 4), "", w="goes through"
    ),
    "a custom rule": lambda: case(
        lambda p, x: x @ _sine(p["w"]), {"w": (4, 3)}, (N, 4), "", w="custom derivative rule"
    ),
    "a bias of one product of two": lambda: case(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) + x[:, ::-1] @ p["w"], WB, (N, 4), "w"
    ),
    "a bias of positions": lambda: case(
        lambda p, x: (x @ p["w"] + p["b"]).sum(1), {"w": (4, 3), "b": (2, 1)}, (N, 2, 4), "w", b="not as the bias"
    ),
    "a value that is used beside its bias": lambda: case(
        lambda p, x: (y := x @ p["w"]) * jnp.tanh(y + p["b"]), WB, (N, 4), "w", b="not as the bias"
    ),
    # around the product
    "jit": lambda: case(lambda p, x: jax.jit(jnp.matmul)(x, p["w"]) + p["b"], WB, (N, 4), "w"),
    "checkpoint": lambda: case(
        jax.checkpoint(lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"])), WB | {"v": (3, 2)}, (N, 4), "w v"
    ),
    "vmap": lambda: case(
        lambda p, x: jax.vmap(lambda x: p["v"] @ jnp.tanh(x @ p["w"] + p["b"]))(x), WB | {"v": (2, 3)}, (N, 4), "w v"
    ),
    "scan over time": lambda: case(
        lambda p, x: jax.lax.scan(
            lambda h, x: ((h := jnp.tanh(h @ p["w"] + x @ p["v"] + p["b"])), h), jnp.zeros((N, 3)), x.swapaxes(0, 1)
        )[1][-1],
        {"w": (3, 3), "v": (4, 3), "b": (3,)},
        (N, 5, 4),
        "w v",
    ),
    "scan over examples": lambda: case(
        lambda p, x: jax.lax.map(lambda x: jnp.tanh(x @ p["w"] + p["b"]), x), WB, (N, 4), "w"
    ),
    "in and out of a scan": lambda: case(_in_and_out_of_a_scan, {"w": (3, 3)}, (N, 3), "w"),
    "cond": lambda: case(
        lambda p, x: jax.lax.cond(x.sum() < 1e9, lambda: x @ p["w"] + p["b"], lambda: jnp.tanh(x @ p["v"])),
        WB | {"v": (4, 3)},
        (N, 4),
        "w v",
    ),
    "while": lambda: case(
        lambda p, x: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["w"]), x, unroll=2) @ p["v"],
        {"w": (4, 4), "v": (4, 3)},
        (N, 4),
        "w v",
    ),
    "jvp": lambda: case(
        lambda p, x: jax.jvp(lambda x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], (x,), (x * x,))[1],
        WB | {"v": (3, 2)},
        (N, 4),
        "w v",
    ),
    # where the examples are
    "positions": lambda: case(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]).sum(1), WB, (N, 5, 4), "w"),
    "merged with positions": lambda: case(
        lambda p, x: jnp.tanh(x.reshape(-1, 4) @ p["w"] + p["b"]).reshape(-1, 5, 3).sum(1), WB, (N, 5, 4), "w"
    ),
    "merged, through a rule and another product": lambda: case(
        lambda p, x: (jax.nn.gelu(jax.nn.relu(x.reshape(-1, 4) @ p["w"])) @ p["v"]).reshape(-1, 5, 2).sum(1),
        {"w": (4, 3), "v": (3, 2)},
        (N, 5, 4),
        "w v",
    ),
    "behind positions": lambda: case(
        lambda p, x: jnp.tanh(x.swapaxes(0, 1).reshape(-1, 4) @ p["w"]).reshape(5, -1, 3).sum(0),
        {"w": (4, 3)},
        (N, 5, 4),
        "w",
    ),
    "two views": lambda: case(
        lambda p, x: (y := jnp.tanh(jnp.concatenate([x, x**2]) @ p["w"]))[: len(x)] * y[len(x) :],
        {"w": (4, 3)},
        (N, 4),
        "w",
    ),
    "as many positions as examples": lambda: case(
        lambda p, x: jnp.tanh(jnp.tanh(x + p["t"] @ p["w"]) @ p["v"]).sum(1),
        {"t": (N, 4), "w": (4, 4), "v": (4, 3)},
        (N, N, 4),
        "v",
        w="another",
        t="another",
    ),
    # linen
    "attention": lambda: model(
        net(lambda x: nn.MultiHeadDotProductAttention(2, name="a")(x).sum(1)), (N, 3, 4), "a/query a/key a/value a/out"
    ),
    "tied": lambda: model(
        net(lambda x: (table := nn.Embed(7, 4, name="table")).attend(nn.tanh(nn.Dense(4, name="d")(table(x))))),
        jnp.arange(N) % 7,
        "table d",
    ),
    "lstm": lambda: model(_lstm(nn.LSTMCell), (N, 4, 2), LSTM),
    "optimized lstm": lambda: model(_lstm(nn.OptimizedLSTMCell), (N, 4, 2), "cell/hi+hf+hg+ho cell/ii+if+ig+io"),
    "gru": lambda: model(
        _lstm(nn.GRUCell),
        (N, 4, 2),
        "cell/ir cell/iz cell/in cell/hr cell/hz cell/hn",
    ),
    "conv lstm": lambda: model(
        net(lambda x: nn.RNN(nn.ConvLSTMCell(3, (2,), param_dtype="float64", name="cell"))(x).sum(1)),
        (N, 3, 4, 2),
        "cell/ih cell/hh",
    ),
    "einsum": lambda: model(net(lambda x: nn.Einsum((4, 2, 3), "nd,dhk->nhk", name="e")(x)), (N, 4), "e"),
    "prelu": lambda: model(
        net(lambda x: nn.PReLU(name="p")(nn.Dense(3, name="d")(x))), (N, 4), "d", {"p/negative_slope": "factor"}
    ),
    "scan of layers": lambda: model(Scanned(), (N, 3), "block"),
    "scan of layers on axis 1, rematerialised": lambda: model(Scanned(1, True), (N, 3), "block"),
    "conv transpose": lambda: model(
        net(lambda x: nn.ConvTranspose(3, (2, 3), strides=(2, 1), transpose_kernel=True, name="c")(x)),
        (N, 3, 4, 3),
        "c",
    ),
    "conv local": lambda: model(net(lambda x: nn.ConvLocal(3, (2,), name="c")(x)), (N, 4, 2), "c"),
    "kernel of a subclass": lambda: model(Standard(3), (N, 4), "", {"kernel": "goes through", "bias": "added"}),
    "weight norm": lambda: model(
        net(lambda x: nn.WeightNorm(nn.Dense(3, name="d"))(x)),
        (N, 4),
        "",
        {
            "d/kernel": "factor entry by entry",
            "d/bias": "added",
            "WeightNorm_0/d/kernel/scale": "factor entry by entry",
        },
    ),
}


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


@cache
def watched(name):
    """The case, its capture, layers, evidence of true labels, and the gradient of every example by autodiff."""
    one = CASES[name]()
    outputs = jax.eval_shape(one.apply, one.params, one.x)
    y = normal(*outputs.shape, seed=9)
    capture = ng.capture(one.apply, ng.losses.squared_error, labels="true")
    layers = capture.layers(one.params, one.x)

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


@pytest.mark.filterwarnings("ignore:.*has no layer")
@pytest.mark.parametrize("name", CASES)
def test_the_layers_are_what_is_done_with_the_parameters(name):
    one, layers, *_ = watched(name)
    assert set(layers) == set(one.layers)
    notes = {block.name: block.note for block in layers.rest}
    assert notes.keys() == flat(one.params).keys() - {leaf.address for layer in layers.known for leaf in layer.leaves}
    for address, words in one.notes.items():
        assert words in notes[address]


def rows_give_the_gradient_of_every_example(layers, evidence, grad, jacobian, idle=()):
    """The evidence of a batch of N explains the gradient of each example, in parameters and order, and their mean.

    The layers that are `idle` have a gradient of zero.
    """
    expected, mean = flat(jacobian), flat(grad)
    for address, leaf in expected.items():
        np.testing.assert_allclose(mean[address] * N, leaf.sum(0), rtol=1e-9, atol=1e-12)
    for layer in layers.known:
        rows, columns = written_out(input_rows(layer, evidence[layer.name])), output_rows(layer, evidence[layer.name])
        assert layer.positions == rows.shape[-2] == columns.shape[-2]
        matrices = np.einsum("...nti,...knto->n...io", np.asarray(rows), np.asarray(columns))
        found = jax.vmap(lambda matrix, layer=layer: from_matrix(layer, matrix))(jnp.asarray(matrices))
        ours = jnp.concatenate([found[leaf.role].reshape(N, -1) for leaf in layer.leaves], axis=1)
        theirs = jnp.concatenate([expected[leaf.address].reshape(N, -1) for leaf in layer.leaves], axis=1)
        if layer.name in idle:
            assert not jnp.any(ours) and not jnp.any(theirs)
            continue
        assert_equal(ours, theirs)
        assert_differs(jnp.roll(ours, 1, axis=0), theirs)


@pytest.mark.filterwarnings("ignore:.*has no layer")
@pytest.mark.parametrize("name", CASES)
def test_c2_rows_give_the_gradient_of_every_example(name):
    _, layers, evidence, grad, jacobian = watched(name)
    idle = ("v",) if name == "cond" else ()  # the branch that is not taken
    rows_give_the_gradient_of_every_example(layers, evidence, grad, jacobian, idle)


# Uses that do not count ---


def test_a_product_that_no_output_depends_on_does_not_count():
    def apply(p, x):
        _ = jnp.tanh(100 * x @ p["w"]).sum()
        return jnp.tanh(x @ p["w"])

    layers = ng.capture(apply, ng.losses.squared_error).layers({"w": normal(4, 3)}, normal(N, 4))
    assert len(layers["w"].uses) == 1


def test_a_head_that_the_likelihood_does_not_see_is_named():
    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        return {"policy": h @ p["policy"], "value": h @ p["value"]}

    params = {"w": normal(4, 3), "policy": normal(3, 2), "value": normal(3, 1)}
    capture = ng.capture(apply, ng.losses.softmax_cross_entropy, readout=lambda out: out["policy"])
    layers = capture.layers(params, normal(N, 4))
    assert set(layers) == {"w", "policy"}
    (value,) = layers.rest
    assert value.name == "value" and "likelihood does not see" in value.note


def test_complex_parameters_are_named_and_refused():
    params = {"w": normal(4, 3) + 1j * normal(4, 3, seed=1), "v": normal(3, 2)}
    capture = ng.capture(lambda p, x: jnp.abs(x @ p["w"]) @ p["v"], ng.losses.squared_error)
    layers = capture.layers(params, normal(N, 4))
    assert list(layers) == ["v"] and "complex" in layers.rest[0].note
    for tx in (ng.kfac(0.1, layers), ng.soap(0.1), ng.tengrad(0.1, layers), ng.kbfgs(0.1, layers), ng.tnt(0.1, layers)):
        with pytest.raises(TypeError, match=r"'w' is complex.*optax\.partition"):
            tx.init(params)


def test_a_function_of_one_number_of_examples_is_watched_by_the_one_axis_of_that_length():
    def apply(p, x):
        return jnp.tanh(x @ p["w"]).reshape(N, 3)

    layers = ng.capture(apply, ng.losses.squared_error).layers({"w": normal(4, 3)}, normal(N, 4))
    assert list(layers) == ["w"]
    square = ng.capture(apply, ng.losses.squared_error)
    with pytest.warns(UserWarning, match="no layer"):
        layers = square.layers({"w": normal(N, 3)}, normal(N, N))
    assert "could be told" in layers.rest[0].note


# Tied weights ---


def test_factors_of_a_tied_table_are_those_of_its_uses_each_pair_balanced():
    _, layers, evidence, *_ = watched("tied")
    layer, of_table = layers["table"], evidence["table"]
    assert [(use.kind, use.transposed) for use in layer.uses] == [("embed", False), ("dense", True)]
    places, read = of_table.inputs
    cotangents, logits = (each[0] for each in of_table.cotangents)
    pairs = [(np.eye(7)[np.asarray(places).reshape(-1)], cotangents.reshape(-1, 4)), (logits, read)]
    inputs, outputs = np.zeros((7, 7)), np.zeros((4, 4))
    for a, g in pairs:
        a, g = np.asarray(a).reshape(-1, 7), np.asarray(g).reshape(-1, 4)
        scale = ((g**2).sum() / (a**2).sum()) ** 0.25
        inputs += scale**2 * a.T @ a / N
        outputs += g.T @ g / scale**2 / (2 * N)
    assert_equal(input_moment(layer, of_table), inputs)
    assert_equal(output_moment(layer, of_table), outputs)


@pytest.mark.parametrize(("labels", "draws"), [("exact", 7), ("sampled", 3)])
def test_a_tied_table_has_the_gradient_of_every_draw(labels, draws):
    one = CASES["tied"]()
    capture = ng.capture(
        one.apply, ng.losses.softmax_cross_entropy, labels=labels, draws=1 if labels == "exact" else draws
    )
    layer = capture.layers(one.params, one.x)["table"]
    out = capture.value_and_grad(one.params, one.x, jnp.arange(N) % 7, key=jax.random.key(0))
    evidence = out.curvature()["table"]
    rows, columns = input_rows(layer, evidence), output_rows(layer, evidence)
    assert layer.positions == rows.shape[-2] == 1 + draws
    found = np.einsum("nti,knto->kio", np.asarray(rows), np.asarray(columns))
    assert_equal(found, evidence.gradient["embedding"])
    assert_differs(found[::-1], evidence.gradient["embedding"])


# How models are called ---


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
