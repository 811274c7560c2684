"""What is watched is what is done with the parameters, whatever module, transformation or framework it is done in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from products import N, case, flat, found, model, net, rows_give_the_gradient_of_every_example, watched
from reference import assert_differs, assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.layers.rows import input_moment, input_rows, output_moment, output_rows

pytestmark = pytest.mark.usefixtures("x64")


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


def _returned(change, again):
    """A stack of layers whose scan returns their parameters, out of a `checkpoint`, for a second scan if `again`."""

    def apply(p, x):
        def first(h, w):
            h, w = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), change(w)))(h, w)
            return h, (w, p["c"])

        h, (w, _) = jax.lax.scan(first, x @ p["c"], p["w"])
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), h, w)[0] if again else h

    return apply


def _chosen(left, right):
    """A parameter that the branches of a `cond` use and return, for a product behind it."""

    def apply(p, x):
        branches = [lambda w, x, change=change: (change(w), jnp.tanh(x @ w)) for change in (left, right)]
        w, h = jax.lax.cond(x.sum() < 1e9, *branches, p["w"], x)
        return h @ w

    return apply


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
    "cut with steps": lambda: case(
        lambda p, x: x @ jax.lax.slice(p["w"], (0, 0), (4, 3), (1, 2)), {"w": (4, 3)}, (N, 4), "", w="cut with steps"
    ),
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
    "returned from a scan, for nothing": lambda: case(
        _returned(jnp.sin, again=False), {"w": (2, 3, 3), "c": (3, 3)}, (N, 3), "w c"
    ),
    "returned from a scan, for another": lambda: case(
        _returned(jnp.transpose, again=True), {"w": (2, 3, 3), "c": (3, 3)}, (N, 3), "w c"
    ),
    "changed in a scan, for another": lambda: case(
        _returned(jnp.sin, again=True), {"w": (2, 3, 3), "c": (3, 3)}, (N, 3), "c", w="goes through `sin`"
    ),
    "the same from a scan for all turns": lambda: case(
        lambda p, x: x @ jax.lax.map(lambda _: p["w"], jnp.arange(2)).sum(0),
        {"w": (3, 3)},
        (N, 3),
        "",
        w="returned from a scan",
    ),
    "the same from all branches": lambda: case(_chosen(jnp.transpose, jnp.transpose), {"w": (3, 3)}, (N, 3), "w"),
    "another from each branch": lambda: case(
        _chosen(jnp.transpose, lambda w: w), {"w": (3, 3)}, (N, 3), "", w="returned from a branch"
    ),
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
    "a shard_map": lambda: case(
        lambda p, x: _sharded(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["v"],
        {"w": (4, 3), "v": (3, 2)},
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
        net(lambda x: nn.PReLU(name="p")(nn.Dense(3, name="d")(x))), (N, 4), "d", {"p/negative_slope": ""}
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


def _sharded(function):
    """The function on a mesh of one device, spread along the examples."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(function, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


def seen(name):
    """The case of that name, watched."""
    if name == "a shard_map" and jax.__version_info__ < (0, 9):
        pytest.skip("JAX 0.8 does not batch the pullback of one, which the oracle needs")
    return watched(CASES[name])


@pytest.mark.filterwarnings("ignore:.*has no layer")
@pytest.mark.parametrize("name", CASES)
def test_the_layers_are_what_is_done_with_the_parameters(name):
    one, _, layers = found(CASES[name])
    assert set(layers) == set(one.layers)
    notes = {block.name: block.note for block in layers.rest}
    assert notes.keys() == flat(one.params).keys() - {leaf.address for layer in layers.known for leaf in layer.leaves}
    for address, words in one.notes.items():
        assert words in notes[address]


FEW = {
    "as it is",
    "matrix first",
    "heads in front",
    "joined",
    "two products, one bias",
    "a bias of one product of two",
    "vmap",
    "scan over time",
    "scan over examples",
    "in and out of a scan",
    "cond",
    "jvp",
    "merged with positions",
    "behind positions",
    "two views",
    "attention",
    "einsum",
    "scan of layers",
    "conv transpose",
}
"""One of each way to use a parameter; the gradients of the examples of the others are compared with `-m full`."""


@pytest.mark.filterwarnings("ignore:.*has no layer")
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_c2_rows_give_the_gradient_of_every_example(name):
    _, layers, evidence, grad, jacobian = seen(name)
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
    _, layers, evidence, *_ = watched(CASES["tied"])
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


@pytest.mark.full
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
