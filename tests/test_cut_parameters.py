"""Parameters cut by tensor parallelism or FSDP train as on one device, and no device gathers a layer for the optimizer.

In processes of their own, because the number of devices is settled when JAX starts.
"""

import json

import pytest
from devices import on_devices

SCRIPT = """
import json, sys
from collections import Counter
import jax, jax.numpy as jnp, optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import natgrad_jax as ng
from collectives import Program

how, policy = sys.argv[1:]

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.Dense(16, name="down")(nn.tanh(nn.Dense(32, name="up")(x)))
        x = x + nn.MultiHeadDotProductAttention(4, qkv_features=16, name="heads")(x)
        return nn.Dense(8, name="last")(x.mean(1))

x, y = jax.random.normal(jax.random.key(0), (16, 6, 16)), jax.random.randint(jax.random.key(1), (16,), 0, 8)
net = Net()
params = net.init(jax.random.key(2), x)["params"]
capture = ng.linen.capture(net, ng.losses.softmax_cross_entropy, verify=False)
tx = ng.scale_by_kfac(capture.layers({"params": params}, x), damping=0.1, statistics_every=2, refresh_every=2)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def of_parameter(path, leaf):
    layer, role = (each.key for each in path[-2:])
    if how == "fsdp":
        return P(*(None,) * next(n for n, size in enumerate(leaf.shape) if size % 4 == 0), ("data", "model"))
    if layer in ("down", "out"):
        return P("model") if role == "kernel" else P()
    if layer == "last":
        return P()
    return P(None, "model") if role == "kernel" else P("model")

specs = jax.tree_util.tree_map_with_path(of_parameter, params)
places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, P))
batch = jax.device_put((x, y), NamedSharding(mesh, P(("data", "model") if how == "fsdp" else "data")))
cut = jax.device_put(params, places)
shardings = ng.sharding.state_specs(tx, cut, mesh, policy)

def step_of(second_order, there):
    def step(params, state, x, y, key):
        out = capture.value_and_grad({"params": params}, x, y, key=key)
        updates = out.grad
        if second_order:
            updates, state = tx.update(updates, state, params, curvature=out.curvature)
        params = optax.apply_updates(params, jax.tree.map(lambda update: -0.05 * update, updates))
        return jax.lax.with_sharding_constraint((params, state), (places, shardings)) if there else (params, state)

    return jax.jit(step)

def trained(step, batch, params, state):
    for t in range(2):
        params, state = step(params, state, *batch, jax.random.key(t))
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])

def compiled(second_order, state):
    return step_of(second_order, True).lower(cut, state, *batch, jax.random.key(0)).compile()

def gathered(program):
    found = Program(program.as_text(), 4, dearest=False).sent()
    return Counter(each.shape for each in found if each.what == "all-gather")

start = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
state = jax.device_put(tx.init(params), shardings)
step = compiled(True, state)
of_model = gathered(compiled(False, state)) if how == "fsdp" else Counter()  # what the passes need; else no matrix
one = trained(step_of(True, False), (x, y), params, tx.init(params))
four = trained(step, batch, cut, state)
print(json.dumps({
    "error": float(jnp.linalg.norm(four - one) / jnp.linalg.norm(one - start)),
    "more": sorted((gathered(step) - of_model).elements()),
    "state": [ng.sharding.bytes_per_device(jax.eval_shape(tx.init, params), shardings),
              ng.sharding.bytes_per_device(tx.init(params))],
}))
"""
MATRICES = [f"f32[{rows},{columns}]" for rows, columns in ((16, 32), (32, 16), (16, 16))]
WITH_BIAS = [f"f32[{rows},{columns}]" for rows, columns in ((17, 32), (33, 16), (17, 16), (18, 32), (34, 16), (18, 16))]
"""Of the layers that are cut; with a row for the bias, or filled up to an even number of rows."""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensor parallel", pytest.param("fsdp", marks=pytest.mark.full)])
def test_c13_cut_parameters_train_like_one_device_without_a_gather_of_a_layer(how):
    found = json.loads(on_devices(4, SCRIPT, how, "parameter", timeout=560))
    assert found["error"] < 1e-5
    assert not set(found["more"]) & {*MATRICES, *WITH_BIAS}, found["more"]
    assert found["state"][0] < 0.8 * found["state"][1]


@pytest.mark.full
def test_a_state_that_every_device_has_is_what_makes_it_gather_them():
    found = json.loads(on_devices(4, SCRIPT, "fsdp", "replicated", timeout=560))  # the control
    assert set(found["more"]) & {*MATRICES, *WITH_BIAS}
