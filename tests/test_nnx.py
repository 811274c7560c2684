"""NNX models: the evidence of their linen twins, their state moved once, training by `nnx.Optimizer`."""

import pickle
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from methods_table import ALL_NAMES, of_the_lifting, row
from reference import normal

import natgrad_jax as ng

X, Y = jax.random.normal(jax.random.key(0), (8, 4, 4, 2)), jnp.arange(8) % 3


class Net(nnx.Module):
    """Convolution, batch normalisation, dropout, a dense layer called twice, a list of layers."""

    def __init__(self, rngs, rate=0.5):
        self.conv = nnx.Conv(2, 4, (2, 2), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.shared = nnx.Linear(16, 16, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(16, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1)
        return self.heads[0](self.shared(nnx.tanh(self.shared(self.drop(x)))))


class Twin(linen.Module):
    """The same network in linen, without dropout."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (2, 2), strides=2, name="conv")(x)
        x = linen.BatchNorm(use_running_average=False, name="norm")(x)
        shared = linen.Dense(16, name="shared")
        x = shared(linen.tanh(shared(linen.relu(x).reshape(len(x), -1))))
        return linen.Dense(3, name="heads_0")(x)


class Decoder(nnx.Module):
    """A small decoder in the style of Gemma: grouped queries, RMS norms, a gated MLP, a tied table."""

    def __init__(self, rngs, vocabulary=13, width=8, heads=4, groups=2, head=4):
        self.table = nnx.Embed(vocabulary, width, rngs=rngs)
        self.before, self.behind = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.query = nnx.Einsum("btd,dhk->bthk", (width, heads, head), rngs=rngs)
        self.keys = nnx.Einsum("bsd,cdgk->cbsgk", (2, width, groups, head), rngs=rngs)
        self.out = nnx.Einsum("bthk,hkd->btd", (heads, head, width), rngs=rngs)
        self.gate, self.up = (nnx.Linear(width, 16, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(16, width, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens)
        h = self.before(x)
        query, (key, value) = self.query(h), self.keys(h)
        key, value = (jnp.repeat(each, 2, axis=2) for each in (key, value))
        scores = jnp.einsum("bthk,bshk->bhts", query, key) / 2
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        x = x + self.out(jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), value))
        h = self.behind(x)
        return self.table.attend(x + self.down(nnx.gelu(self.gate(h)) * self.up(h)))


def fresh(rate=0.5):
    return Net(nnx.Rngs(0), rate)


@cache
def watched(labels="sampled"):
    capture = ng.nnx.capture(Net, ng.losses.softmax_cross_entropy, labels=labels)
    return capture, capture.layers(fresh(), X)


@pytest.mark.full
def test_the_layers_are_printed_as_those_of_linen_are():
    _, layers = watched()
    assert list(layers) == ["conv", "shared", "heads/0"] and layers["shared"].positions == 2
    assert [(block.name, block.kind) for block in layers.rest] == [("norm/scale+bias", "norm")]
    assert pickle.loads(pickle.dumps(layers)) == layers
    assert "conv/kernel" in str(layers)


@pytest.mark.full
def test_evidence_gradient_and_batch_statistics_are_those_of_the_linen_twin():
    model = fresh(rate=0.0)
    values = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    names = {"conv": "conv", "norm": "norm", "shared": "shared", "heads_0": "heads/0"}
    variables = jax.eval_shape(Twin().init, jax.random.key(0), X)
    variables = {
        collection: {twin: {leaf: values[f"{names[twin]}/{leaf}"] for leaf in leaves} for twin, leaves in tree.items()}
        for collection, tree in variables.items()
    }
    capture, _ = watched("exact")
    ours = capture.value_and_grad(model, X, Y)
    theirs = ng.linen.capture(Twin(), ng.losses.softmax_cross_entropy, labels="exact").value_and_grad(variables, X, Y)
    np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-6)
    found, expected = ours.curvature(), theirs.curvature()
    for twin, name in names.items():
        if name != "norm":
            for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[twin]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        model.norm.mean[...], theirs.updated["batch_stats"]["norm"]["mean"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.full
def test_gradient_and_state_are_those_of_a_plain_call_and_the_state_moves_once():
    watchful, plain = fresh(), fresh()
    capture, _ = watched()
    out = capture.value_and_grad(watchful, X, Y, key=jax.random.key(3))
    out.curvature()

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

    value, grad = nnx.jit(nnx.value_and_grad(loss))(plain)
    np.testing.assert_allclose(out.value, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), out.grad, grad)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *map(_rest, (watchful, plain)))
    assert int(watchful.drop.rngs.count[...]) == 1 and jnp.any(watchful.norm.mean[...] != 0)


def _rest(model):
    return [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Not((nnx.Param, nnx.RngKey))))]


def test_looking_for_layers_leaves_the_model_as_it_is():
    model = fresh()
    before = jax.tree.map(jnp.array, _rest(model))
    watched()[0].layers(model, X)
    jax.tree.map(np.testing.assert_array_equal, before, _rest(model))


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, ("kfac pi",))
def test_every_method_trains_by_the_optimizer_of_nnx_in_one_trace(method):
    capture, layers = watched("true" if method == "kbfgs" else "sampled")
    model, traces = fresh(rate=0.0), []
    optimizer = nnx.Optimizer(model, row(method).optimizer(0.01, layers, damping=1.0, refresh_every=2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        traces.append(1)
        out = capture.value_and_grad(model, X, Y, key=key)
        optimizer.update(model, out.grad, curvature=out.curvature)
        return out.value

    losses = [float(step(model, optimizer, jax.random.key(i))) for i in range(20)]
    assert losses[-1] < losses[0] and len(traces) == 1


@pytest.mark.full
@pytest.mark.parametrize("make", [ng.soap, ng.shampoo, partial(ng.mbf, damping=0.1)], ids=["soap", "shampoo", "mbf"])
def test_methods_that_need_only_gradients_train_as_any_optimizer_does(make):
    model = fresh(rate=0.0)
    optimizer = nnx.Optimizer(model, make(0.01), wrt=nnx.Param)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

    @nnx.jit
    def step(model, optimizer):
        value, grad = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grad)
        return value

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.full
def test_the_functional_loop_gives_the_same_parameters():
    capture, layers = watched()
    tx = ng.kfac(0.1, layers, damping=0.1)
    model, first = fresh(), fresh()
    optimizer = nnx.Optimizer(first, tx, wrt=nnx.Param)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, state, key):
        model = nnx.merge(graph, params, rest)
        out = capture.value_and_grad(model, X, Y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), nnx.state(model, nnx.Not(nnx.Param)), state

    state = tx.init(params)
    for i in range(3):
        params, rest, state = step(params, rest, state, jax.random.key(i))
        out = capture.value_and_grad(first, X, Y, key=jax.random.key(i))
        optimizer.update(first, out.grad, curvature=out.curvature)
    theirs = nnx.state(first, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), params, theirs)


@pytest.mark.full
def test_a_decoder_in_the_style_of_gemma_is_covered_and_trains():
    tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 13)
    model = Decoder(nnx.Rngs(0))
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy)
    layers = capture.layers(model, tokens)
    assert {block.name for block in layers.rest} == {"before/scale", "behind/scale"}
    assert layers["keys"].stack == (2,) and [use.transposed for use in layers["table"].uses] == [False, True]
    optimizer = nnx.Optimizer(model, ng.kfac(0.1, layers, kl_clip=1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        out = capture.value_and_grad(model, tokens, tokens, key=key)
        optimizer.update(model, out.grad, curvature=out.curvature)
        return out.value

    losses = [float(step(model, optimizer, jax.random.key(i))) for i in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_tuple_of_model_and_streams_goes_by_a_call_of_ones_own():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.drop = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.linear(self.drop(x, rngs=rngs))

    class Both(nnx.Module):
        def __init__(self):
            self.model, self.rngs = Noisy(nnx.Rngs(0)), nnx.Rngs(1)

    both = Both()
    capture = ng.nnx.capture(
        both, ng.losses.softmax_cross_entropy, call=lambda both, x: both.model(x, both.rngs), labels="true"
    )
    assert list(capture.layers(both, jnp.ones((8, 4)))) == ["model/linear"]
    capture.value_and_grad(both, jnp.ones((8, 4)), Y)
    assert int(both.rngs.default.count[...]) == 1


def test_a_model_of_another_kind_is_sent_to_its_door():
    with pytest.raises(TypeError, match=r"ng\.linen\.capture"):
        ng.nnx.capture(linen.Dense(3), ng.losses.squared_error)
    with pytest.raises(TypeError, match=r"expected a flax\.linen\.Module"):
        ng.linen.capture(fresh(), ng.losses.squared_error)


def of_its_row(method):
    """The complete optimizer of a row, with a refresh behind the third of six steps."""
    return lambda layers: row(method).optimizer(0.05, layers, damping=0.3, statistics_every=2, refresh_every=4)


def everything_adaptive(layers):
    return ng.kfac("quadratic", layers, momentum="quadratic", damping=ng.adaptive_damping(0.3, every=4))


SAVED = {
    "ekfac per_example": of_its_row("ekfac per_example"),
    "no learning rate": lambda layers: ng.kfac(layers=layers),
}
SAVED_TOO = {"everything adaptive": everything_adaptive} | {
    name: of_its_row(name) for name in ALL_NAMES if name not in SAVED
}


@pytest.mark.full
@pytest.mark.parametrize("what", [*SAVED, *[pytest.param(what, marks=pytest.mark.full) for what in SAVED_TOO]])
def test_a_checkpoint_in_mid_interval_goes_on_bit_for_bit(tmp_path, what):
    ocp = pytest.importorskip("orbax.checkpoint")
    capture, layers = watched("true" if what == "kbfgs" else "sampled")
    tx = (SAVED | SAVED_TOO)[what](layers)

    @nnx.jit
    def step(model, optimizer, key):
        out = capture.value_and_grad(model, X, Y, key=key)
        optimizer.update(model, out.grad, curvature=out.curvature)

    def trained(model, optimizer, steps):
        for i in steps:
            step(model, optimizer, jax.random.key(i))
        return nnx.state((model, optimizer))

    model = fresh()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    saved = trained(model, optimizer, range(3))
    without_keys, _ = _keys_as_numbers(saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", without_keys)
    expected = trained(model, optimizer, range(3, 6))
    model = fresh()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start, as_keys = _keys_as_numbers(nnx.state((model, optimizer)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "step", start)
    nnx.update((model, optimizer), as_keys(restored))
    found = trained(model, optimizer, range(3, 6))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(_numbers(ours), _numbers(theirs))


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _keys_as_numbers(state):
    """Orbax has no random keys: the state with their data, and the way back."""

    def back(numbers):
        return jax.tree.map(lambda old, new: jax.random.wrap_key_data(new) if _is_key(old) else new, state, numbers)

    return jax.tree.map(_numbers, state), back


def test_a_filter_says_what_the_parameters_are():
    model, x = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(2), (8, 4))
    assert set(ng.nnx.capture(model, ng.losses.squared_error).layers(model, x)) == {
        "LoRALinear",
        "lora/lora_a",
        "lora/lora_b",
    }
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy, wrt=nnx.LoRAParam)
    layers = capture.layers(model, x)
    assert set(layers) == {"lora/lora_a", "lora/lora_b"} and layers.rest == ()
    optimizer, kernel = nnx.Optimizer(model, ng.kfac(0.1, layers, damping=0.1), wrt=nnx.LoRAParam), model.kernel[...]

    @nnx.jit
    def step(model, optimizer, key):
        out = capture.value_and_grad(model, x, Y, key=key)
        optimizer.update(model, out.grad, curvature=out.curvature)
        return out.value

    losses = [step(model, optimizer, jax.random.key(i)) for i in range(8)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.kernel[...], kernel)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_bridged_model_is_watched_as_what_it_becomes(to):
    if to == "nnx":
        model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(linen.Dense(3), rngs=nnx.Rngs(0)), jnp.ones((8, 4)))
        capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy, labels="true")
    else:
        bridged = nnx.bridge.ToLinen(nnx.Linear, args=(4, 3))
        model = bridged.init(jax.random.key(0), jnp.ones((8, 4)))
        capture = ng.linen.capture(bridged, ng.losses.softmax_cross_entropy, labels="true")
    layers = capture.layers(model, jnp.ones((8, 4)))
    assert layers.rest == () and [layer.shape for layer in layers.known] == [(5, 3)]
    assert jnp.isfinite(capture.value_and_grad(model, jnp.ones((8, 4)), Y).value)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["WeightNorm", "SpectralNorm"])
def test_parameters_that_a_call_writes_stay_as_they_are_and_other_state_moves(wrapper):
    if not hasattr(nnx, wrapper):
        pytest.skip("there is no such module")
    x, y = normal(8, 4, dtype="float32"), normal(8, 3, seed=1, dtype="float32")
    first, plain, model = (
        getattr(nnx, wrapper)(nnx.Linear(4, 3, rngs=(rngs := nnx.Rngs(0))), rngs=rngs) for _ in "abc"
    )
    grad = nnx.grad(lambda m: 0.5 * jnp.mean(jnp.sum((m(x) - y) ** 2, axis=1)))(plain)
    capture = ng.nnx.capture(model, ng.losses.squared_error, labels="true", verify=False)
    found = capture.value_and_grad(model, x, y).grad
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, grad)
    start, written, kept = (each.layer_instance.kernel[...] for each in (first, plain, model))
    np.testing.assert_array_equal(kept, start)
    assert not np.allclose(written, start)
    others = (nnx.to_pure_dict(nnx.state(each, nnx.Not(nnx.Param))) for each in (model, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *others)
