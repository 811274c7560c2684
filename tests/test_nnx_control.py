"""Every way of choosing a step trains an NNX model as it trains its linen twin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import natgrad_jax as ng

X, Y = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
STEPS = 3


class Net(nnx.Module):
    """Two dense layers."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


class Twin(linen.Module):
    """The same in linen."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3, name="b")(linen.tanh(linen.Dense(5, name="a")(x)))


def quadratic(layers):
    return ng.kfac("quadratic", layers, momentum="quadratic", damping=ng.adaptive_damping(0.1, every=2))


def grafted(layers):
    return optax.chain(ng.graft(ng.scale_by_kfac(layers, damping=0.1), optax.scale_by_adam()), optax.scale(-0.1))


def clipped(layers):
    return ng.kfac(0.5, layers, damping=0.1, kl_clip=1e-2)


def automatic(layers):
    return ng.kfac(layers=layers)


def of_few_examples(layers):
    return ng.tengrad(0.1, layers, damping=0.1, momentum="spring")


def decayed(layers):
    return ng.soap(0.05, layers, weight_decay=0.1)


def plain(layers):
    return ng.ekfac(0.1, layers, damping=0.1)


# {what: (optimizer, how it is kept, arguments that are donated, pieces of a batch, whether it starts warm)}
OPTIONS = {
    "no learning rate": (automatic, nnx.Optimizer, (), 1, False),
    "no learning rate, model and optimizer in one": (automatic, nnx.ModelAndOptimizer, (0, 1), 1, False),
    "momentum for few examples": (of_few_examples, nnx.Optimizer, (), 1, False),
    "decoupled decay": (decayed, nnx.Optimizer, (), 1, False),
    "quadratic rate and momentum, adaptive damping": (quadratic, nnx.Optimizer, (), 1, False),
    "clipped by KL": (clipped, nnx.Optimizer, (), 1, False),
    "grafted": (grafted, nnx.Optimizer, (), 1, False),
    "accumulated": (plain, nnx.Optimizer, (), 2, False),
    "donated": (plain, nnx.Optimizer, (0, 1), 1, False),
    "donated, quadratic": (quadratic, nnx.Optimizer, (0, 1), 1, False),
    "started warm": (plain, nnx.Optimizer, (), 1, True),
    "model and optimizer in one": (plain, nnx.ModelAndOptimizer, (), 1, False),
}

FULL = ("no learning rate, model and optimizer in one", "momentum for few examples", "decoupled decay")
"""What others stand for."""


def of_linen(params, make, pieces, warm):
    """The parameters of the linen twin after some steps."""
    capture = ng.linen.capture(Twin(), ng.losses.softmax_cross_entropy, microbatches=pieces)
    tx = make(capture.layers({"params": params}, X))
    state = tx.init(params)
    if warm:
        out = capture.value_and_grad({"params": params}, X, Y, key=jax.random.key(9))
        state = ng.warm_start(tx, state, [out.curvature], params)

    @jax.jit
    def step(params, state, key):
        out = capture.value_and_grad({"params": params}, X, Y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, jax.random.key(i))
    return params


@pytest.mark.full
@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.full] * (what in FULL)) for what in OPTIONS])
def test_an_option_of_control_trains_as_in_linen_in_one_trace(what):
    make, kept, donated, pieces, warm = OPTIONS[what]
    model, traces = Net(nnx.Rngs(0)), []
    first = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    expected = of_linen(first, make, pieces, warm)
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy, microbatches=pieces)
    tx = make(capture.layers(model, X))
    optimizer = kept(model, tx, wrt=nnx.Param)
    if warm:
        out = capture.value_and_grad(model, X, Y, key=jax.random.key(9))
        optimizer.opt_state = ng.warm_start(tx, optimizer.opt_state, [out], nnx.state(model, nnx.Param))

    def step(model, optimizer, key):
        traces.append(1)
        out = capture.value_and_grad(model, X, Y, key=key)
        given = (out.grad,) if kept is nnx.ModelAndOptimizer else (model, out.grad)
        optimizer.update(*given, curvature=out.curvature)

    step = nnx.jit(step, donate_argnums=donated)
    for i in range(STEPS):
        step(model, optimizer, jax.random.key(i))
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), found, expected)
    assert len(traces) == 1
    assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (found, first)), strict=True))


def of_arrays(state):
    """A state as Optax has it."""
    return jax.tree.map(lambda leaf: leaf[...], state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@pytest.mark.slow
def test_the_state_that_an_optimizer_of_nnx_keeps_is_read_observed_refreshed_and_kept_again():
    model = Net(nnx.Rngs(0))
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy)
    layers = capture.layers(model, X)
    tx = ng.averaged(ng.scale_by_kfac(layers, damping=0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        out = capture.value_and_grad(model, X, Y, key=key)
        optimizer.update(model, out.grad, curvature=out.curvature)
        return out.grad, out.curvature()

    gradient, evidence = step(model, optimizer, jax.random.key(0))
    kept, bare = optimizer.opt_state, of_arrays(optimizer.opt_state)
    assert ng.diagnose(kept, layers) == ng.diagnose(bare, layers)
    average = ng.averaged_params(kept)
    jax.tree.map(np.testing.assert_array_equal, average, of_arrays(ng.averaged_params(bare)))
    nnx.update(model, average)
    np.testing.assert_array_equal(model.a.kernel[...], jax.tree.leaves(average["a"]["kernel"])[0])

    def asked(state):
        moved = ng.observe(tx, state, evidence, gradient)
        return {"observed": moved, "refreshed": ng.refresh(tx, ng.without_operators(moved), None, gradient)}

    found, expected = asked(kept), asked(bare)
    for name in expected:
        assert jax.tree.structure(found[name]) == jax.tree.structure(kept)
        jax.tree.map(np.testing.assert_array_equal, of_arrays(found[name]), expected[name])
    weights = [of_arrays(each).direction.statistics["a"].inputs.weight for each in (kept, found["observed"])]
    assert weights[1] > weights[0]
    mixed = tx.init(nnx.state(model, nnx.Param))  # the average of the parameters in Variables, the rest not
    assert jax.tree.structure(ng.observe(tx, mixed, evidence, gradient)) == jax.tree.structure(mixed)
    optimizer.opt_state = found["refreshed"]
    step(model, optimizer, jax.random.key(1))
    assert int(optax.tree.get(of_arrays(optimizer.opt_state), "metrics").statistics) == 2


def test_a_chain_of_optax_is_observed_and_refreshed_with_parameters_in_variables():
    model = Net(nnx.Rngs(0))
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy, labels="true", verify=False)
    tx = optax.chain(optax.trace(0.9), ng.scale_by_kfac(capture.layers(model, X), damping=0.1), optax.ema(0.9))
    evidence = nnx.jit(lambda model: capture.value_and_grad(model, X, Y).curvature())(model)
    params = nnx.state(model, nnx.Param)
    cold, (found, expected) = (
        tx.init(params),
        [
            ng.refresh(tx, ng.observe(tx, tx.init(given), evidence, given), None, given)
            for given in (params, of_arrays(params))
        ],
    )
    assert jax.tree.structure(found) == jax.tree.structure(cold)
    jax.tree.map(np.testing.assert_array_equal, of_arrays(found), expected)
    assert found[1].metrics.statistics == 1 == found[1].metrics.refreshes


@pytest.mark.full
def test_twenty_donated_steps_are_one_trace_with_either_jit_and_end_alike():
    capture = ng.nnx.capture(Net, ng.losses.softmax_cross_entropy)
    traces = {"nnx": 0, "jax": 0}
    tx = ng.kfac(0.05, capture.layers(Net(nnx.Rngs(0)), X), damping=0.1, statistics_every=2, refresh_every=5)

    @nnx.jit(donate_argnums=(0, 1))
    def stateful(model, optimizer, key):
        traces["nnx"] += 1
        out = capture.value_and_grad(model, X, Y, key=key)
        optimizer.update(model, out.grad, curvature=out.curvature)

    model = Net(nnx.Rngs(0))
    graph, params = nnx.split(model)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @partial(jax.jit, donate_argnums=(0, 1))
    def functional(params, state, key):
        traces["jax"] += 1
        out = capture.value_and_grad(nnx.merge(graph, params), X, Y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    for i in range(20):
        given = jax.tree.leaves((nnx.state((model, optimizer)), params, state))
        stateful(model, optimizer, jax.random.key(i))
        params, state = functional(params, state, jax.random.key(i))
        kept = [leaf for leaf in given if not leaf.is_deleted()]
        assert len(kept) <= 4 and all(leaf.size == 1 for leaf in kept)  # numbers that are written and never read
    assert traces == {"nnx": 1, "jax": 1}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), nnx.state(model, nnx.Param), params
    )
