"""No untested step of any size: what is unusually long is tested, what the next batch finds ruinous is taken back."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from sklearn.datasets import load_digits

import natgrad_jax as ng
from natgrad_jax.around import bounds


def known(length=1.0, value=1.0, first=1.0):
    return bounds.Bounds(*map(jnp.float32, (length, value, first)))


@pytest.mark.parametrize(
    ("length", "unusual"), [(0.0, False), (2.0, False), (2.1, True), (np.inf, True), (np.nan, True)]
)
def test_a_step_is_unusual_that_is_twice_as_long_as_the_last_tested_one(length, unusual):
    assert bool(bounds.is_unusual(known(), jnp.float32(length))) == unusual


TABLE = {
    # loss of the batch before, of this one, of this one before the last step: whether that is taken back
    "rises on both": (1.0, 5.0, 1.0, True),
    "was high on this batch before": (1.0, 5.0, 4.0, False),
    "rises too little": (1.0, 3.9, 0.1, False),
    "is not finite": (1.0, np.nan, 1.0, True),
    "is infinite": (1.0, np.inf, 1.0, True),
    "is not finite before, either": (1.0, np.nan, np.nan, False),
    "below zero, and rises": (-1.0, 2.5, -1.0, True),
    "below zero, and rises a little": (-1.0, 1.5, -1.0, False),
    "within the rounding of the first loss": (1e-8, 1e-7, 1e-8, False),
    "falls": (5.0, 1.0, 5.0, False),
}


CLEAR = ("rises too little", "below zero, and rises a little", "within the rounding of the first loss", "falls")
"""Cases that the loss of the batch itself decides."""


@pytest.mark.parametrize("case", TABLE)
def test_a_step_is_taken_back_if_the_next_batch_says_that_it_raised_the_loss_fourfold(case):
    last_value, value, before, expected = TABLE[case]
    asked = []

    def at(params):
        jax.debug.callback(lambda w: asked.append(float(w)), params["w"])
        return jnp.float32(before)

    def found(last, heard=True):
        curvature, params = SimpleNamespace(value=at), {"w": jnp.float32(3.0)}
        last = {"w": jnp.float32(last)}
        given = known(value=last_value), curvature, params, last, jnp.float32(value), jnp.array(heard)
        return bool(bounds.is_to_be_taken_back(*given))

    assert found(2.0) == expected
    jax.effects_barrier()
    assert asked in ([], [1.0])  # at the parameters before the step, and only where the loss has risen
    assert bool(asked) == (case not in CLEAR)
    assert not found(0.0) and not found(2.0, heard=False)


def test_the_first_loss_is_that_of_the_first_batch_that_says_anything():
    found = bounds.unbound()
    batches = [(0.0, False), (np.inf, True), (np.nan, True), (-3.0, True), (5.0, True), (0.0, False)]
    expected = [(0.0, 0.0), (np.inf, 0.0), (np.nan, 0.0), (-3.0, 3.0), (5.0, 3.0), (5.0, 3.0)]
    for (value, heard), (last, first) in zip(batches, expected, strict=True):
        found = bounds.seen(found, jnp.float32(value), jnp.array(heard))
        assert np.array_equal(found.value, last, equal_nan=True) and found.first == first


def regression():
    """A net, and a step of an optimizer: params, state -> loss, params, state."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)
    y, model = jnp.sin(x @ jnp.ones((3, 1))), nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])
    capture = ng.linen.capture(model, ng.losses.squared_error)
    params = model.init(jax.random.key(0), x)["params"]
    return capture, params, capture.layers({"params": params}, x), x, y


@pytest.mark.parametrize("momentum", ["quadratic", None])
def test_a_ruinous_step_is_taken_back_and_training_goes_on(momentum):
    capture, params, layers, x, y = regression()
    tx = ng.kfac("quadratic", layers, momentum=momentum, damping=ng.adaptive_damping())

    @jax.jit
    def step(params, state):
        out = capture.value_and_grad({"params": params}, x, y)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return out.value, optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(12):
        loss, params, state = step(params, state)
    far = jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), params)
    strayed = jax.tree.map(jnp.add, params, far)
    high, back, after = step(strayed, state._replace(last=far))
    assert high > 100 * loss
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), back, params)
    assert after.rejected == state.rejected + 1 and after.damping == 2 * state.damping
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after.direction, state.direction))  # nothing is learned there
    assert not jnp.isfinite(after.ratio) and not any(map(jnp.any, jax.tree.leaves(after.last)))
    for _ in range(12):
        low, back, after = step(back, after)
    assert low < loss
    stays = step(strayed, state._replace(last=jax.tree.map(jnp.zeros_like, far)))[2]
    assert stays.rejected == state.rejected or stays.ratio < 1  # what was not a step is not taken back


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(128)(x))
        mean, logarithm = nn.Dense(8)(hidden), nn.Dense(8)(hidden)
        z = mean + jnp.exp(logarithm / 2) * jax.random.normal(self.make_rng("z"), mean.shape)
        return {"logits": nn.Dense(64)(nn.tanh(nn.Dense(128)(z))), "mean": mean, "logarithm": logarithm}


def elbo(outputs, targets, weights):
    """Minus the evidence lower bound."""
    mean, logarithm = outputs["mean"], outputs["logarithm"]
    divergence = jnp.sum(jnp.exp(logarithm) + mean**2 - 1 - logarithm, axis=-1) / 2
    return ng.losses.sigmoid_binary_cross_entropy(outputs["logits"], targets, weights) + jnp.mean(divergence)


def trained_vae(make, seed, steps=300, batch=256):
    """The losses of a VAE on the digits."""
    x, model = jnp.asarray(load_digits().data / 16, jnp.float32), VAE()
    likelihood = ng.losses.sigmoid_binary_cross_entropy
    capture = ng.linen.capture(model, likelihood, objective=elbo, readout=lambda outputs: outputs["logits"])
    key = jax.random.key(seed)
    params = model.init({"params": key, "z": key}, x[:2])["params"]
    tx = make(capture.layers({"params": params}, x[:batch], rngs={"z": key}))

    def step(carry, t):
        params, state = carry
        keys = jax.random.split(jax.random.fold_in(key, t), 3)
        chosen = x[jax.random.randint(keys[0], (batch,), 0, len(x))]
        out = capture.value_and_grad({"params": params}, chosen, chosen, key=keys[1], rngs={"z": keys[2]})
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return (optax.apply_updates(params, updates), state), out.value

    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[1])((params, tx.init(params))))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("said", ["everything adaptive", "nothing"])
def test_a_variational_autoencoder_does_not_blow_up(said, seed):
    """A step of norm 273 to 1,250 between two tests took the loss from 24 to 600, and the next to infinity."""
    adaptive = {"momentum": "quadratic", "damping": ng.adaptive_damping()}
    makes = {"nothing": ng.kfac, "everything adaptive": lambda layers: ng.kfac("quadratic", layers, **adaptive)}
    losses = trained_vae(lambda layers: makes[said](layers=layers), seed)
    assert np.all(np.isfinite(losses)) and np.mean(losses[-20:]) < 25.5 and losses[0] > 40


@pytest.mark.full
def test_without_the_bounds_it_does(monkeypatch):
    monkeypatch.setattr(bounds, "_LONGER", np.inf)
    monkeypatch.setattr(bounds, "_HIGHER", np.inf)
    adaptive = {"momentum": "quadratic", "damping": ng.adaptive_damping()}
    worst = [np.nanmax(trained_vae(lambda layers: ng.kfac("quadratic", layers, **adaptive), seed)) for seed in range(3)]
    assert max(worst) > 1000
