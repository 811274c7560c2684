"""Models with functions that define a reverse rule alone: products with J by two passes of reverse mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import assert_differs, assert_equal

import natgrad_jax as ng


@jax.custom_vjp
def scaled_back(x):
    return 2 * x


scaled_back.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@jax.custom_vjp
def reversed_back(x):
    return x


reversed_back.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def opaque_back(x):
    return x


opaque_back.defvjp(lambda x: (x, None), lambda _, g: (_opaque(g),))


@jax.custom_jvp
def _opaque(g):
    return g


@_opaque.defjvp
def _(primals, tangents):
    raise TypeError("no derivative of this kernel")


class Net(nn.Module):
    """A dense layer on either side of a function."""

    between: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(self.between(nn.Dense(5, name="first")(x)))


X, Y = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8) % 4
VARIABLES = Net(nn.tanh).init(jax.random.key(1), X)
DIRECTION = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), VARIABLES)


def evaluation(between):
    capture = ng.linen.capture(Net(between), ng.losses.softmax_cross_entropy)
    return capture, capture.value_and_grad(VARIABLES, X, Y, key=jax.random.key(2))


def test_products_by_two_reverse_passes_are_those_by_forward_mode():
    _, ours = evaluation(scaled_back)
    _, plain = evaluation(lambda x: 2 * x)
    _, other = evaluation(lambda x: x)
    found, expected = (jax.jit(each.curvature.along)(DIRECTION["params"]) for each in (ours, plain))
    assert_equal(found, expected)
    assert_differs(found, other.curvature.along(DIRECTION["params"]))


def test_the_product_is_of_the_map_whose_transpose_the_reverse_rule_is():
    _, ours = evaluation(reversed_back)
    _, whole = evaluation(lambda x: x)
    first = {"params": {**jax.tree.map(jnp.zeros_like, DIRECTION["params"]), "first": DIRECTION["params"]["first"]}}
    assert_equal(ours.curvature.along(first["params"]), -whole.curvature.along(first["params"]))


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"damping": ng.adaptive_damping()}], ids=["quadratic", "adaptive"])
def test_steps_that_choose_themselves_lower_the_loss(settings):
    capture, _ = evaluation(scaled_back)
    tx = ng.kfac("quadratic", capture.layers(VARIABLES, X), momentum="quadratic", **settings)

    @jax.jit
    def step(carry, key):
        params, state = carry
        out = capture.value_and_grad({"params": params}, X, Y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return (jax.tree.map(jnp.add, params, updates), state), out.value

    carry, losses = (VARIABLES["params"], tx.init(VARIABLES["params"])), []
    for key in jax.random.split(jax.random.key(3), 8):
        carry, loss = step(carry, key)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


def test_a_reverse_rule_that_has_no_derivative_is_told():
    _, out = evaluation(opaque_back)
    with pytest.raises(TypeError, match=r"`jax.custom_vjp` whose backward rule .* as numbers"):
        out.curvature.along(DIRECTION["params"])


def test_a_state_made_with_another_momentum_is_refused():
    capture, out = evaluation(nn.tanh)
    layers, params = capture.layers(VARIABLES, X), VARIABLES["params"]
    without, with_it = (
        ng.kfac("quadratic", layers, momentum=momentum, damping=0.1) for momentum in (None, "quadratic")
    )
    with pytest.raises(ValueError, match="`momentum` is 'quadratic', but the state has no last step"):
        with_it.update(out.grad, without.init(params), params, curvature=out.curvature)
    with pytest.raises(ValueError, match="`momentum` is None, but the state has a last step"):
        without.update(out.grad, with_it.init(params), params, curvature=out.curvature)
    adaptive = (ng.kfac("quadratic", layers, momentum=momentum) for momentum in (None, "quadratic"))
    assert len({jax.tree.structure(tx.init(params)) for tx in adaptive}) == 1  # it needs the last step in any case


@pytest.mark.full
def test_a_convolution_without_outputs_has_zero_statistics():
    class Empty(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x.mean((1, 2))) + nn.Conv(2, (5, 5), padding="VALID", name="empty")(x).sum((1, 2))

    x, model = jnp.ones((4, 3, 3, 1)), Empty()
    variables = model.init(jax.random.key(0), x)
    capture = ng.linen.capture(model, ng.losses.squared_error)
    layers = capture.layers(variables, x)
    txs = [make(layers, damping=0.1) for make in (ng.scale_by_kfac, ng.scale_by_tengrad)]

    @jax.jit
    def step(params):
        out = capture.value_and_grad({"params": params}, x, jnp.zeros((4, 2)), key=jax.random.key(1))
        return [tx.update(out.grad, tx.init(params), curvature=out.curvature) for tx in txs]

    for updates, state in step(variables["params"]):
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))
        assert not updates["empty"]["kernel"].any() and updates["Dense_0"]["kernel"].any()
        assert state.metrics.rejected_statistics == 0
