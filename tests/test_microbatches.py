"""A batch in pieces gives the loss, the statistics and the step of the whole batch, for every method."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from bases import without_choice
from flax import linen as nn
from flax import nnx
from methods_table import ALL_NAMES, of_the_lifting, row

import natgrad_jax as ng
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.eigenbasis import Basis
from natgrad_jax.blocks.rotated import Rotated

pytestmark = pytest.mark.usefixtures("x64")


class Net(nn.Module):
    """A convolution with groups, a dense layer on sequences, a norm of each example, an embedding."""

    @nn.compact
    def __call__(self, x, token):
        x = nn.tanh(nn.Conv(4, (2, 2), feature_group_count=2, strides=2)(x))
        x = nn.LayerNorm()(nn.Dense(3)(x.reshape(len(x), -1, 4)) + nn.Embed(5, 3)(token)[:, None])
        return nn.Dense(3)(nn.tanh(x).mean(1))


@cache
def problem():
    x, token = reference.normal(8, 4, 4, 2), jnp.arange(8) % 5
    params = jax.tree.map(lambda p: p.astype("float64"), Net().init(jax.random.key(0), x, token)["params"])
    return params, (x, token), jnp.arange(8) % 3, 0.5 + jnp.arange(8) / 8


def captured(pieces, labels="true", **settings):
    return ng.linen.capture(Net(), ng.losses.softmax_cross_entropy, labels=labels, microbatches=pieces, **settings)


@cache
def trainer(tx_of, pieces, weighted):
    """The transformation, and one compiled step of it."""
    params, inputs, y, weights = problem()
    capture = captured(pieces)
    tx = tx_of(capture.layers({"params": params}, *inputs))

    @jax.jit
    def step(params, state):
        out = capture.value_and_grad({"params": params}, inputs, y, weights=weights if weighted else None)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    return tx, step


def steps(tx_of, pieces, weighted=False, count=3, begin=None):
    """The parameters after some steps, and the state; from those at the start, if nothing else is said."""
    tx, step = trainer(tx_of, pieces, weighted)
    params, state = begin or (problem()[0], tx.init(problem()[0]))
    for _ in range(count):
        params, state = step(params, state)
    return params, state


def agree(one, other, gate=1e-9):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=gate, atol=gate)


@cache
def optimizer(method):
    settings = {"damping": 0.1, "statistics_every": 1, "refresh_every": 2}
    return lambda layers: row(method).optimizer(0.05, layers, **settings)


@pytest.mark.full
@pytest.mark.parametrize("weighted", [False, True])
def test_the_evidence_is_that_of_the_whole_batch_on_which_every_method_works(weighted):
    params, inputs, y, weights = problem()
    weights = weights if weighted else None

    def evidence(pieces):
        return captured(pieces).value_and_grad({"params": params}, inputs, y, weights=weights).curvature()

    one, other = jax.jit(lambda: (evidence(4), evidence(1)))()
    agree(one, other)
    assert {type(each) for each in one.values()} == {ng.Evidence} and len(jax.tree.leaves(one)) > 20


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, ("kfac pi",))
def test_the_state_and_the_step_are_those_of_the_whole_batch(method):
    tx_of = optimizer(method)
    first = {pieces: steps(tx_of, pieces, count=2) for pieces in (4, 1)}
    agree(*map(without_choice, first.values()))
    # from one state: an iteration goes on from eigenvectors of zero, which rounding chose in the first refresh
    agree(*(without_choice(steps(tx_of, pieces, begin=first[1])) for pieces in (4, 1)))


@pytest.mark.parametrize("change", ["sign", "rotation", "order", "turn"])
def test_only_the_choice_of_eigenvectors_is_no_difference_of_states(change):
    """The control of that: the last two columns have the same scale, the others do not."""
    u, v = (jnp.linalg.qr(reference.normal(1, n, n, seed=n))[0] for n in (4, 3))
    turn = jax.scipy.linalg.block_diag(jnp.eye(2), jnp.array([[0.6, -0.8], [0.8, 0.6]]))
    scale = jnp.array([1.0, 2, 3, 3])[None, :, None] * jnp.array([1.0, 4, 9])
    changed, same = {
        "sign": (u * jnp.array([1, -1, 1, 1]), True),
        "rotation": (u @ turn, True),
        "order": (u[..., jnp.array([1, 0, 2, 3])], False),
        "turn": (u @ turn[::-1, ::-1], False),
    }[change]
    one, other = (without_choice(Rotated(Basis(side, v), Average(scale, jnp.ones(1)), None)) for side in (u, changed))
    if same:
        agree(one, other)
        return
    with pytest.raises(AssertionError):
        agree(one, other, gate=0.1)


@pytest.mark.full
@pytest.mark.parametrize("method", ["kfac pi", "tengrad"])
def test_so_are_they_with_weights(method):
    agree(steps(optimizer(method), 2, weighted=True), steps(optimizer(method), 1, weighted=True))


@pytest.mark.full
def test_so_is_a_step_that_chooses_its_own_length():
    def adaptive(layers):
        return ng.kfac("quadratic", layers, damping=ng.adaptive_damping(), momentum="quadratic", weight_decay=1e-3)

    agree(steps(adaptive, 4, weighted=True), steps(adaptive, 1, weighted=True), gate=1e-7)


@pytest.mark.full
def test_accumulated_gradients_with_the_curvature_of_the_last_piece_are_not():
    params, inputs, y, _ = problem()
    capture = captured(1)
    tx = optax.MultiSteps(optimizer("kfac pi")(capture.layers({"params": params}, *inputs)), 2)
    state = tx.init(params)

    @jax.jit
    def step(state, inputs, y):
        out = capture.value_and_grad({"params": params}, inputs, y)
        return tx.update(out.grad, state, params, curvature=out.curvature)

    for part in (slice(0, 4), slice(4, 8)):
        updates, state = step(state, tuple(x[part] for x in inputs), y[part])
    found = optax.apply_updates(params, updates)
    with pytest.raises(AssertionError):
        agree(found, steps(optimizer("kfac pi"), 1, count=1)[0], gate=1e-5)


@pytest.mark.full
def test_loss_gradient_and_outputs_are_those_of_the_whole_batch():
    params, inputs, y, weights = problem()

    @jax.jit
    def both(params):
        outs = [captured(n).value_and_grad({"params": params}, inputs, y, weights=weights) for n in (1, 4)]
        return [(out.value, out.grad, out.outputs) for out in outs]

    agree(*both(params))


@pytest.mark.parametrize("pieces", [3, pytest.param(2, marks=pytest.mark.full)])
def test_in_double_precision_the_shares_of_the_pieces_are_exact_too(pieces):
    params, x, y = {"w": reference.normal(4, 2)}, reference.normal(6, 4, seed=1), reference.normal(6, 2, seed=2)
    watched = {"labels": "true", "verify": False}
    whole, cut = (
        ng.capture(lambda p, x: jnp.tanh(x @ p["w"]), ng.losses.squared_error, microbatches=count, **watched)
        for count in (1, pieces)
    )

    @jax.jit
    def found(params):
        outs = [capture.value_and_grad(params, x, y) for capture in (whole, cut)]
        return [(out.value, out.curvature.value(params), out.grad, out.curvature.along(params)) for out in outs]

    agree(*found(params), gate=1e-14)  # a third or the root of a half in float32 is off by 1e-8


def test_every_piece_draws_labels_of_its_own():
    params, inputs, y, _ = problem()
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 8, axis=0), inputs)

    @jax.jit
    def measure(params):
        return captured(8, "sampled").value_and_grad({"params": params}, same, y, key=jax.random.key(3)).curvature()

    cotangents = measure(params)["Dense_1"].cotangents[0][0]
    assert len(np.unique(np.round(cotangents, 6), axis=0)) > 1


def test_batch_statistics_are_those_of_one_piece_after_the_other():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x))

    x, y = reference.normal(6, 3), jnp.arange(6) % 2
    variables = Normalised().init(jax.random.key(0), x)
    capture = ng.linen.capture(Normalised(), ng.losses.softmax_cross_entropy, labels="true", microbatches=3)
    found = capture.value_and_grad(variables, x, y).updated["batch_stats"]["BatchNorm_0"]["mean"]
    expected = jnp.zeros(3)
    for piece in x.reshape(3, 2, 3):
        expected = 0.5 * expected + 0.5 * piece.mean(0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


class Counted(nn.Module):
    """Each call scales its inputs by how many there were before it."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", jnp.ones, ())
        if not self.is_initializing():
            count.value += 1
        return nn.Dense(2)(x * count.value)


class Dropping(nnx.Module):
    """Each call draws from a stream of the model, which moves on; a matrix beside it stays as it is."""

    def __init__(self, rngs):
        self.first, self.drop = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.fixed, self.last = nnx.Variable(jnp.eye(4)), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.first(x)) @ self.fixed[...]))


def counted(x, y, pieces):
    variables = Counted().init(jax.random.key(0), x)
    capture = ng.linen.capture(Counted(), ng.losses.softmax_cross_entropy, labels="true", microbatches=pieces)
    return capture.value_and_grad(variables, x, y), variables["params"]


def dropping(x, y, pieces):
    model = Dropping(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy, labels="true", microbatches=pieces)
    return capture.value_and_grad(model, x, y), params


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("model", [counted, dropping])
def test_what_is_lazy_sees_the_state_that_each_piece_found(model, pieces):
    x, y = reference.normal(12, 3), jnp.arange(12) % 2
    out, params = model(x, y, pieces)
    np.testing.assert_allclose(out.curvature.value(params), out.value, rtol=1e-6)
    gradients = ng.addresses.flatten(out.grad)
    evidence = out.curvature()
    for layer in out.curvature.layers.known:
        for leaf in layer.leaves:
            own = evidence[layer.name].gradient[leaf.role][0] / len(y)
            np.testing.assert_allclose(own, gradients[leaf.address], rtol=1e-5, atol=1e-6)
    assert out.curvature.layers.known
    slope = out.curvature.value_and_slope(params, out.grad)[1]
    squares = sum(jnp.sum(jnp.square(leaf)) for leaf in gradients.values())
    np.testing.assert_allclose(slope, squares, rtol=1e-5)


def test_of_the_state_only_what_is_written_is_kept_for_each_piece():
    """The matrix that stays would be there once for each piece; of the stream it is the count."""
    x, y = reference.normal(12, 3), jnp.arange(12) % 2
    before = nnx.split(Dropping(nnx.Rngs(0)), nnx.Param, ...)[2]
    *_, moved = dropping(x, y, 3)[0].curvature._pieces
    assert [leaf.shape for leaf in jax.tree.leaves(moved)] == [(3,)] and len(jax.tree.leaves(before)) > 2


def test_what_cannot_be_cut_is_refused_with_the_shapes():
    params, inputs, y, _ = problem()
    with pytest.raises(ValueError, match=r"`microbatches` is 3.*a multiple of 3"):
        captured(3).value_and_grad({"params": params}, inputs, y)
    with pytest.raises(ValueError, match=r"lead with the examples"):
        captured(4).value_and_grad({"params": params}, (inputs[0], inputs[1][:4]), y)
    for wrong, error in ((0, ValueError), (2.5, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="`microbatches`"):
            captured(wrong)
