"""C13: on a mesh with `Explicit` axes, the default of `jax.make_mesh` since JAX 0.9, a batch trains as on one device.

In a process of its own, because the number of devices is settled when JAX starts.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from devices import on_devices
from jax.sharding import AxisType, PartitionSpec
from methods_table import ALL_NAMES

import natgrad_jax as ng

FEW = ("kfac pi", "ekfac per_example", "tengrad")
SCRIPT = """
import json, sys
import jax
import jax.numpy as jnp
import methods_table as table
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import natgrad_jax as ng

names = json.loads(sys.argv[1])

class Net(nn.Module):
    normalised: bool
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=False)(x) if self.normalised else x
        x = nn.Dense(6)(nn.tanh(x)) if len(names) > 1 else x  # the layer more for the rows of `-m full`
        return nn.Dense(3)(nn.tanh(x))

x, y = jax.random.normal(jax.random.key(0), (3, 8, 5)), jax.random.randint(jax.random.key(1), (3, 8), 0, 3)
weights = jnp.ones((3, 8)).at[2, 5:].set(0)  # the last batch has five examples
flat = lambda tree: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])

def trained(name, devices, share=slice(None)):
    # what these learn of parameters without a gradient is rounding, and normalisation makes such of biases
    net = Net(name not in ("soap", "kbfgs"))
    variables = net.init(jax.random.key(2), x[0])
    settings = {"labels": "true" if name == "tengrad" else None, "verify": False}
    capture = ng.linen.capture(net, ng.losses.softmax_cross_entropy, **settings)
    batch, given = (x, y, weights), variables
    if devices:
        mesh = jax.make_mesh((devices,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:devices])
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
        given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
        assert jax.typeof(batch[0]).sharding.mesh.explicit_axes == ("data",)
    layers, periods = capture.layers(given, batch[0][0]), {"statistics_every": 1, "refresh_every": 2}
    tx = table.row(name).scale_by(layers, damping=0.03, decay=0.9, **periods)
    state = tx.init(given["params"])
    kinds = jax.tree.map(jax.typeof, (given, state))

    @jax.jit
    def step(given, state, x, y, weights, t):
        out = capture.value_and_grad(given, x[share], y[share], key=jax.random.key(t), weights=weights[share])
        updates, state = tx.update(out.grad, state, given["params"], curvature=out.curvature)
        params = optax.apply_updates(given["params"], jax.tree.map(lambda u: -0.05 * u, updates))
        return {**out.updated, "params": params}, state, out.value, out.outputs

    losses = []
    for t in range(3):
        given, state, loss, outputs = step(given, state, *(part[t] for part in batch), t)
        losses.append(float(loss))
    if devices:
        assert jax.tree.map(jax.typeof, (given, state)) == kinds  # a second step compiles nothing
        assert jax.typeof(outputs).sharding.spec[0] == "data"
    statistics = [leaf for leaf in jax.tree.leaves(state.statistics) if leaf.dtype == jnp.float32]
    return flat(given), flat(statistics or losses), jnp.asarray(losses)

found = {}
for name in names:
    one = trained(name, 0)
    far = lambda other: [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in zip(one, other)]
    found[name] = {devices: far(trained(name, devices)) for devices in json.loads(sys.argv[2])}
    if name == "kfac pi":
        found[name]["half"] = far(trained(name, 0, slice(4)))
print(json.dumps(found))
"""


OTHERS = tuple(name for name in ALL_NAMES if name not in FEW)


@pytest.mark.full
@pytest.mark.parametrize(
    ("names", "devices"),
    [
        (FEW[:1], (4,)),
        pytest.param(FEW, (2, 4), marks=pytest.mark.full),
        pytest.param(FEW[:1], (8,), marks=pytest.mark.full),
        pytest.param(OTHERS, (2, 4), marks=pytest.mark.full),
        pytest.param(FEW[1:] + OTHERS[:2], (8,), marks=pytest.mark.full),
    ],
)
def test_c13_an_explicit_mesh_trains_like_one_device(names, devices):
    found = json.loads(on_devices(max(devices), SCRIPT, json.dumps(names), json.dumps(devices), timeout=560))
    assert set(found) == set(names)
    for name, errors in found.items():
        for count in map(str, devices):
            assert max(errors[count]) < (1e-3 if name == "soap" else 1e-5), (name, count)
    if FEW[0] in names:  # the control: half of each batch
        assert min(found[FEW[0]]["half"]) > 1e-3


def test_a_shard_map_in_a_model_takes_the_mesh_around_it():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    here, spec = jax.sharding.NamedSharding(mesh, PartitionSpec()), PartitionSpec("data")
    params, x = jax.device_put(({"w": jnp.ones((4, 2))}, jnp.ones((6, 4))), here)

    def watched(**named):
        each = jax.shard_map(jnp.dot, in_specs=(spec, PartitionSpec()), out_specs=spec, **named)
        return ng.capture(lambda params, x: each(x, params["w"]), ng.losses.squared_error, verify=False)

    assert list(watched().layers(params, x)) == ["w"]
    with pytest.raises(ValueError, match="mesh") as error:
        watched(mesh=mesh).layers(params, x)
    assert any("leave `mesh` out" in note for note in error.value.__notes__)
