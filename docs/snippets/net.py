import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import natgrad_jax as ng


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))


x = jax.random.normal(jax.random.key(0), (64, 4))
y = jnp.argmax(x @ jax.random.normal(jax.random.key(1), (4, 3)), axis=1)
model = Net()
variables = model.init(jax.random.key(2), x)
capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)
layers = capture.layers(variables, x)


def train(tx, capture=capture, steps=20):
    """Parameters, optimizer state and the loss of every step."""

    @jax.jit
    def step(params, state, key):
        out = capture.value_and_grad({"params": params}, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state, out.value

    params, losses = variables["params"], []
    state = tx.init(params)
    for i in range(steps):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    return params, state, losses
