"""Scanned layers whose stack is cut, recomputed on the way back, with batches in pieces: as on one device.

In a process of its own, because the number of devices is settled when JAX starts.
"""

import json

import pytest
from devices import on_devices

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, optax
import methods_table as table
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import natgrad_jax as ng

names, pieces = json.loads(sys.argv[1])
devices = len(jax.devices())

class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8, name="inner")(x)), None

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        x, _ = scanned(name="deep")(nn.Dense(8, name="first")(x), None)
        return nn.Dense(3, name="last")(x)

x, y = jax.random.normal(jax.random.key(0), (16, 5)), jax.random.randint(jax.random.key(1), (16,), 0, 3)
weights = jnp.ones(16).at[11:].set(0)
net = Net()
params = net.init(jax.random.key(2), x)["params"]
mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
places = {name: jax.tree.map(lambda _: NamedSharding(mesh, P("data" if name == "deep" else None)), tree)
          for name, tree in params.items()}  # the stack of the parameters is cut as well
flat = lambda tree: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])
found = {}
for name in names:
    labels = "true" if name == "tengrad" else None
    capture = ng.linen.capture(net, ng.losses.softmax_cross_entropy, labels=labels, microbatches=pieces)
    tx = table.row(name).scale_by(capture.layers({"params": params}, x), damping=0.1, statistics_every=1,
                                  refresh_every=2)

    def trained(tx, batch, params, state, there=None):
        @jax.jit
        def step(params, state, x, y, weights, key):
            out = capture.value_and_grad({"params": params}, x, y, key=key, weights=weights)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            params = optax.apply_updates(params, jax.tree.map(lambda update: -0.05 * update, updates))
            return (params, state) if there is None else jax.lax.with_sharding_constraint((params, state), there)

        for t in range(3):
            params, state = step(params, state, *batch, jax.random.key(t))
        return flat(params)

    one = trained(tx, (x, y, weights), params, tx.init(params))
    cut = jax.device_put(params, places)
    shardings = ng.sharding.state_specs(tx, cut, mesh, "layer")
    batch = jax.device_put((x, y, weights), NamedSharding(mesh, P("data")))
    state = jax.device_put(tx.init(params), shardings)
    many = trained(ng.sharding.share_refreshes(tx, mesh, "layer"), batch, cut, state, (places, shardings))
    found[name] = float(jnp.linalg.norm(many - one) / jnp.linalg.norm(one - flat(params)))
print(json.dumps(found))
"""


@pytest.mark.full
@pytest.mark.parametrize(("devices", "pieces"), [(2, 2), (8, 1), (4, 2)])
def test_c13_scanned_layers_over_devices_train_like_one(devices, pieces):
    names = ["kfac pi", "ekfac per_example", "shampoo"] if devices == 4 else ["kfac pi"]
    found = json.loads(on_devices(devices, SCRIPT, json.dumps([names, pieces]), timeout=560))
    for name in names:
        assert found[name] < 1e-5, name
