"""Modules of linen as people write them, with transformations of JAX or Flax around their parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from products import N, flat, found, model, rows_give_the_gradient_of_every_example, watched
from reference import assert_equal, normal

import natgrad_jax as ng

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.filterwarnings("ignore:.*has no layer")]
Dense = partial(nn.Dense, param_dtype="float64")


def net(function):
    """A linen module from the function of itself and its input."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(self, x)

    return Net()


def set_free(around, *layers):
    """A module whose layers exist before a transformation of JAX calls them."""

    def call(module, x):
        parts = [Dense(width, name=name) for name, width in layers]
        if module.is_initializing():
            for part in parts:
                x = part(x)
            return x
        return around(*parts, x)

    return net(call)


def of_parameters(module, x):
    """A net as a function, on a tree that is one parameter."""
    inner = Dense(3, parent=None)
    return inner.apply({"params": module.param("net", lambda key: inner.init(key, x)["params"])}, x)


def of_two_parameters(module, x):
    params = {"kernel": module.param("w", nn.initializers.normal(), (4, 3)), "bias": module.param("b", _zeros, (3,))}
    return Dense(3, parent=None).apply({"params": params}, x)


def in_and_out_of_a_scan(_, x):
    layer = Dense(4, name="d")
    axes = {"variable_broadcast": "params", "split_rngs": {"params": False}, "length": 3}
    return nn.scan(lambda d, x, _: (nn.tanh(d(x)), None), **axes)(layer, nn.tanh(layer(x)), None)[0]


def called_for_nothing(_, x):
    layer = Dense(3, name="d")
    layer(100 * x)
    return layer(x)


def tied_by_hand(_, x):
    layer = Dense(3, name="d")
    return nn.tanh(layer(x)) @ layer.variables["params"]["kernel"].T


def through(change, init):
    """A dense layer whose parameters are changed on the way by `nn.map_variables`."""

    def call(module, x):
        changed = partial(jax.tree.map, change if init or not module.is_initializing() else lambda leaf: leaf)
        mapped = nn.map_variables(Dense, "params", changed, init=init or module.is_initializing())
        return mapped(4, use_bias=False, name="d")(x)

    return net(call)


def branches(cond):
    def call(module, x):
        a, b = Dense(3, name="a"), Dense(3, name="b")
        return a(x) + b(x) if module.is_initializing() else cond(module, a, b, x)

    return net(call)


def frozen(_, x):
    variables = {"params": {"kernel": normal(4, 4, seed=7), "bias": normal(4, seed=8)}}
    return Dense(3, name="d")(nn.tanh(Dense(4, parent=None).apply(variables, x)))


def low_rank(module, x):
    layer = Dense(3, name="d")
    nn.share_scope(module, layer)
    left, right = (module.param(name, nn.initializers.normal(), shape) for name, shape in LOW.items())
    return layer(x) + x @ left @ right


def noisy(module, x):
    """A kernel with a noise of its own size, as Rainbow has it."""
    mean, size = (module.param(name, nn.initializers.normal(), (4, 3)) for name in ("mean", "size"))
    return x @ (mean + size * normal(4, 3, seed=3))


def factorised(module, x):
    """A kernel as lengths and directions, as PINNs have it."""
    lengths, directions = (
        module.param(*each) for each in (("g", _ones, (3,)), ("v", nn.initializers.normal(), (4, 3)))
    )
    return x @ (lengths * directions)


def spectral(module, x):
    """A complex product of every frequency, as neural operators have it."""
    real, imaginary = (module.param(name, nn.initializers.normal(), (3, 2, 2)) for name in ("real", "imaginary"))
    waves = jnp.einsum("nkc,kcd->nkd", jnp.fft.rfft(x, axis=1), real + 1j * imaginary)
    return jnp.fft.irfft(waves, axis=1)


def with_offsets(module, x):
    """A layer whose input is a table, the same for all examples."""
    code = Dense(4, use_bias=False, name="offsets")(jnp.linspace(0, 1, 5)[:, None])
    return Dense(2, name="head")(nn.tanh(x[:, None] + code).sum(1))


def with_token(module, x):
    token = module.param("token", nn.initializers.normal(), (1, 1, 4))
    x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 4)), x], axis=1)
    return nn.tanh(Dense(3, name="d")(x)).sum(1)


def of_two_ranks(_, x):
    layer = nn.Conv(4, (2,), name="c", param_dtype="float64")
    return layer(layer(x)[:, None].mean(1)).sum(1)


class OneExample(nn.Module):
    """A module that knows no axis of examples."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(Dense(3, name="d")(x)).sum(0)


def masked(a, kernel, *args, **kwargs):
    return jax.lax.dot_general(a, jnp.triu(kernel), *args, **kwargs)


def backwards(x):
    return nn.RNN(nn.SimpleCell(3, param_dtype="float64", name="cell"), time_major=True)(x.swapaxes(0, 1)).sum(0)


def both_ways(x):
    ways = (nn.RNN(nn.MGUCell(3, param_dtype="float64", name=name)) for name in ("left", "right"))
    return nn.Bidirectional(*ways)(x).sum(1)


LOW = {"left": (4, 2), "right": (2, 3)}
_zeros, _ones = nn.initializers.zeros, nn.initializers.ones
GATES = " ".join(f"{way}/{gate}" for way in ("left", "right") for gate in ("if", "in", "hf", "hn"))
CASES = {
    "nn.jvp": lambda: model(
        net(lambda m, x: nn.jvp(lambda m, s: m(s) ** 2, Dense(3, name="d"), (x,), (jnp.ones_like(x),), {})[1]),
        (N, 4),
        "d",
    ),
    "jax.jvp": lambda: model(
        set_free(lambda d, e, x: jax.jvp(lambda x: e(nn.tanh(d(x))), (x,), (x,))[1], ("d", 3), ("e", 2)),
        (N, 4),
        "d e",
        {"e/bias": "likelihood does not see"},
    ),
    "jax.vmap of jax.grad": lambda: model(
        set_free(lambda d, e, x: jax.vmap(jax.grad(lambda x: nn.tanh(e(nn.tanh(d(x))))[0]))(x), ("d", 4), ("e", 1)),
        (N, 4),
        "d e",
    ),
    "jax.vmap": lambda: model(set_free(lambda d, x: jax.vmap(d)(x).mean(1), ("d", 3)), (N, 5, 4), "d"),
    "jax.vmap over as many": lambda: model(set_free(lambda d, x: jax.vmap(d)(x).mean(1), ("d", 3)), (N, N, 4), "d"),
    "lax.scan": lambda: model(
        set_free(lambda d, x: jax.lax.scan(lambda h, _: (nn.tanh(d(h)), None), x, None, length=3)[0], ("d", 4)),
        (N, 4),
        "d",
    ),
    "lax.cond": lambda: model(
        branches(lambda m, a, b, x: jax.lax.cond(x.sum() < 1e9, lambda x: a(x), lambda x: b(x), x)),
        (N, 4),
        "a b",
    ),
    "nn.cond": lambda: model(
        branches(lambda m, a, b, x: nn.cond(x.sum() < 1e9, lambda m, x: a(x), lambda m, x: b(x), m, x)), (N, 4), "a b"
    ),
    "time in front": lambda: model(net(lambda m, x: backwards(x)), (N, 5, 4), "cell/i cell/h"),
    "time in front, as long as the batch": lambda: model(net(lambda m, x: backwards(x)), (N, N, 4), "cell/i cell/h"),
    "both ways in time": lambda: model(net(lambda m, x: both_ways(x)), (N, 4, 2), GATES),
    "in and out of a scan": lambda: model(net(in_and_out_of_a_scan), (N, 4), "d"),
    "called for nothing": lambda: model(net(called_for_nothing), (N, 4), "d"),
    "tied by hand": lambda: model(net(tied_by_hand), (N, 4), "d"),
    "a pair of low rank in the scope of its layer": lambda: model(net(low_rank), (N, 4), "kernel left right"),
    "called with different ranks": lambda: model(
        net(lambda m, x: (d := Dense(4, name="d"))(nn.tanh(d(x)).mean(1))), (N, 5, 4), "d"
    ),
    "a frozen net inside": lambda: model(net(frozen), (N, 4), "d"),
    "a net as a function of a parameter": lambda: model(net(of_parameters), (N, 4), "net"),
    "a net as a function of parameters": lambda: model(net(of_two_parameters), (N, 4), "w"),
    "mapped variables": lambda: model(
        through(jnp.triu, init=False), (N, 4), "", {"d/kernel": "goes through `select_n`"}
    ),
    "mapped variables, from the start": lambda: model(
        through(jax.nn.softplus, init=True), (N, 4), "", {"d/kernel": "custom derivative rule"}
    ),
    "a noisy kernel": lambda: model(net(noisy), (N, 4), "", {"mean": "added", "size": "factor entry by entry"}),
    "a factorised kernel": lambda: model(
        net(factorised), (N, 4), "", {"g": "factor entry by entry", "v": "factor entry by entry"}
    ),
    "a complex product": lambda: model(
        net(spectral), (N, 5, 2), "", {"real": "before any product", "imaginary": "before any product"}
    ),
    "a table of offsets": lambda: model(
        net(with_offsets), (N, 4), "head", {"offsets/kernel": "no axis of the 6 examples"}
    ),
    "a token that is joined": lambda: model(net(with_token), (N, 5, 4), "d", {"token": "goes through `concatenate`"}),
    "a convolution of two ranks": lambda: model(net(of_two_ranks), (N, 5, 4), "c"),
    "a module of one example, by nn.vmap": lambda: model(
        nn.vmap(OneExample, variable_axes={"params": None}, split_rngs={"params": False})(), (N, 5, 4), "d"
    ),
    "a masked product": lambda: model(
        net(lambda m, x: Dense(4, use_bias=False, dot_general=masked, name="d")(x)),
        (N, 4),
        "",
        {"d/kernel": "goes through `select_n`"},
    ),
}
FEW = ("nn.jvp", "jax.vmap of jax.grad", "in and out of a scan", "time in front, as long as the batch")


@pytest.mark.parametrize("name", CASES)
def test_the_layers_of_a_module_are_what_is_done_with_its_parameters(name):
    one, _, layers = found(CASES[name])
    assert set(layers) == set(one.layers)
    notes = {block.name: block.note for block in layers.rest}
    assert notes.keys() == flat(one.params).keys() - {leaf.address for layer in layers.known for leaf in layer.leaves}
    assert notes.keys() >= one.notes.keys() and all(words in notes[at] for at, words in one.notes.items())


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_c2_rows_of_a_module_give_the_gradient_of_every_example(name):
    _, layers, evidence, grad, jacobian = watched(CASES[name])
    idle = ("b",) if "cond" in name else ()  # the branch that is not taken
    rows_give_the_gradient_of_every_example(layers, evidence, grad, jacobian, idle)


# Batches and trees of parameters --------------------------------------------------------------------------------------


def stepped(module, variables, x, **call):
    """The parameters after a step of K-FAC on a batch, its layers found in another."""
    capture = ng.linen.capture(module, ng.losses.squared_error, labels="true")
    layers = capture.layers(variables, normal(8, *x.shape[1:]), **call)
    tx = ng.kfac(0.1, layers, damping=0.1, statistics_every=1, refresh_every=1)

    @jax.jit
    def step(params):
        outputs = jax.eval_shape(partial(module.apply, **call), variables, x)
        out = capture.value_and_grad({**variables, "params": params}, x, jnp.ones(outputs.shape), **call)
        updates, _ = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
        return optax.apply_updates(params, updates)

    return layers, step(variables["params"])


def placed(_, x):
    """A table with as many rows as a batch has examples, and a layer for these rows."""
    code = Dense(3, name="position")(jnp.linspace(0, 1, 8)[:, None])
    return Dense(2, name="head")((x * code).mean(1))


def test_layers_found_in_one_batch_serve_a_shorter_one():
    module, x = net(placed), normal(3, 8, 3)
    layers, after = stepped(module, variables := module.init(jax.random.key(0), x), x)
    assert list(layers) == ["head"] and {block.name.partition("/")[0] for block in layers.rest} == {"position"}
    assert all(jax.tree.leaves(jax.tree.map(lambda new, old: jnp.all(new != old), after, variables["params"])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("around", "kind"),
    [
        (lambda params: freeze(params), FrozenDict),
        (lambda params: {**params, "kernel": nn.LogicallyPartitioned(params["kernel"], ("in", "out"))}, dict),
    ],
    ids=["frozen", "boxed"],
)
def test_a_tree_of_another_make_has_the_same_step_and_keeps_its_make(around, kind):
    module, x = Dense(3), normal(N, 4)
    params = module.init(jax.random.key(0), x)["params"]
    layers, expected = stepped(module, {"params": params}, x)
    (found_layers, found), other = stepped(module, {"params": around(params)}, x), around(expected)
    assert found_layers == layers and isinstance(found, kind) and jax.tree.structure(found) == jax.tree.structure(other)
    jax.tree.map(assert_equal, found, other)
    assert not np.allclose(expected["kernel"], params["kernel"])


def test_a_head_in_training_alone_is_no_matter_of_the_likelihood():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            h = nn.tanh(Dense(4, name="torso")(x))
            if train:
                self.sow("aux", "z", Dense(2, name="aux")(h))
            return Dense(3, name="head")(h)

    module, x = Net(), normal(N, 4)
    variables = {"params": module.init(jax.random.key(0), x, train=True)["params"]}
    (layers, in_training), (_, after) = (stepped(module, variables, x, train=train) for train in (True, False))
    assert list(layers) == ["torso", "head"] and all("likelihood" in block.note for block in layers.rest)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), in_training, after)
    assert not np.allclose(after["torso"]["kernel"], variables["params"]["torso"]["kernel"])
