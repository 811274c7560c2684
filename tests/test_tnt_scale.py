"""TNT in the scale of one example and in that of a batch: settings of one are those of the other, converted."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import pytest
import reference
from flax import linen as nn
from reference import assert_differs, assert_equal, normal, random_params

import natgrad_jax as ng

AT_ONCE = {"statistics_every": 1, "refresh_every": 1}


class Small(nn.Module):
    """A convolution and a dense layer: arrays of three modes, of two, and of one."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (2, 2), name="first")(x))
        return nn.Dense(3, use_bias=False, name="last")(x.mean((1, 2)))


COUNTS = {"first": {"kernel": 3, "bias": 1}, "last": {"kernel": 2}}
W = 8


@cache
def batches():
    """The layers of `Small`, its parameters, and gradient and evidence of three batches of size W."""
    model, x = Small(), normal(3, W, 3, 3, 2)
    params, y = random_params(model, x[0]), reference.targets("softmax_cross_entropy", (3, W, 3))
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)

    @jax.jit
    @jax.vmap
    def measure(x, y, key):
        out = capture.value_and_grad({"params": params}, x, y, key=key)
        return out.grad, out.curvature()

    return capture.layers({"params": params}, x[0]), params, measure(x, y, jax.random.split(jax.random.key(0), 3))


@partial(jax.jit, static_argnums=(0, 1))
def _trained(split, scale, learning_rate, damping, weight_decay):
    layers, params, steps = batches()
    settings = {"split": split, "scale": scale, "weight_decay": weight_decay, **AT_ONCE}
    tx = ng.tnt(learning_rate, layers, damping=damping, **settings, kl_clip=None)

    def step(carry, batch):
        updates, state = tx.update(batch[0], carry[1], carry[0], curvature=batch[1])
        return (optax.apply_updates(carry[0], updates), state), None

    (moved, _), _ = jax.lax.scan(step, (params, tx.init(params)), steps)
    return jax.tree.map(jnp.subtract, moved, params)


def trained(split, scale, learning_rate, damping, weight_decay):
    """How far the complete optimizer goes in three steps."""
    batches()  # outside of the trace
    return _trained(split, scale, learning_rate, damping, weight_decay)


def each(says, found, expected, count=None):
    """A claim about every array, or about those of some number of modes."""
    for name, roles in COUNTS.items():
        for role, modes in roles.items():
            if count in (None, modes):
                says(found[name][role], expected[name][role])


OWN = {"batch": (0.1, 0.02, 2.0), "example": (0.1, 0.1, 0.5)}
"""Learning rate, damping and weight decay on either scale."""


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", OWN)
def test_c72_the_total_damping_of_one_scale_is_converted_by_the_size_of_the_batch(scale):
    rate, damping, decay = OWN[scale]
    other, w = ("example", W) if scale == "batch" else ("batch", 1 / W)
    found = trained("total", scale, rate, damping, decay)
    each(assert_equal, found, trained("total", other, rate * w, damping * w, decay / w))
    each(assert_differs, found, trained("total", other, rate * w, damping, decay / w))
    each(assert_differs, found, trained("total", other, rate * w, damping * w, decay))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scale", OWN)
def test_c72_the_damping_per_mode_of_one_scale_is_converted_by_a_root_of_the_size_of_the_batch(scale, count):
    rate, damping, decay = OWN[scale]
    other, w = ("example", W) if scale == "batch" else ("batch", 1 / W)
    found = trained("per_mode", scale, rate, damping, decay)
    each(assert_equal, found, trained("per_mode", other, rate * w, damping * w ** (1 / count), decay / w), count)
    each(assert_differs, found, trained("per_mode", other, rate * w, damping, decay / w), count)
    if count > 1:
        each(assert_differs, found, trained("per_mode", other, rate * w, damping * w, decay / w), count)
