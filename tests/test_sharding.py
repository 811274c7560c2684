"""C13: a batch that is spread over several devices trains like the same batch on one.

In a process of its own, because the number of devices is settled when JAX starts.
"""

import json

import pytest
from devices import on_devices
from methods_table import ALL_NAMES, NAMES

SCRIPT = """
import json, sys
import jax
devices = int(sys.argv[1])
import jax.numpy as jnp
import methods_table as table
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
where = sys.argv[4]
problem = table.task(where)

def trained(tx, examples):
    everywhere, apart = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))
    if examples == "one device":
        here = problem
    elif examples == "spread":
        here = problem._replace(x=jax.device_put(problem.x, apart), y=jax.device_put(problem.y, apart))
    else:  # a quarter of it
        here = problem._replace(x=problem.x[:, :2], y=problem.y[:, :2])
    carry = table.start(problem, tx)
    if examples == "spread":
        carry = jax.device_put(carry, everywhere)
    places = {"out_shardings": everywhere} if examples == "spread" else {}
    step = jax.jit(lambda carry, x, y, t: table.step(here._replace(x=x, y=y), tx, carry, t)[0], **places)
    for t in range(6):
        carry = step(carry, here.x, here.y, t)
    if examples == "spread":
        assert len(here.x.sharding.device_set) == devices
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(carry[0]))])

first = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(problem.variables["params"])])
errors = {}
for name in json.loads(sys.argv[2]):
    tx = table.direction(name, where)
    one = trained(tx, "one device")
    moved = jnp.linalg.norm(one - first)
    others = ("spread", "a quarter") if name in json.loads(sys.argv[3]) else ("spread",)
    errors[name] = [float(jnp.linalg.norm(trained(tx, other) - one) / moved) for other in others]
print(json.dumps(errors))
"""


CONTROLLED = (NAMES[0], "tengrad")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "names", "where"),
    [
        (4, CONTROLLED[1:], "dense"),
        *(pytest.param(count, ALL_NAMES, "mlp", marks=pytest.mark.full) for count in (2, 4, 8)),
    ],
)
def test_c13_several_devices_train_like_one(devices, names, where):
    errors = json.loads(
        on_devices(devices, SCRIPT, str(devices), json.dumps(names), json.dumps(CONTROLLED), where, timeout=480)
    )
    assert set(errors) == set(names)
    for name, (spread, *_) in errors.items():
        # relative to the way gone in six steps, in float32; where no gradient has been, rounding chooses SOAP's basis
        assert spread < (1e-3 if name == "soap" else 2e-5), name
    for name in set(CONTROLLED) & set(names):  # the control: one device's share of the batch, taken for the whole
        assert errors[name][1] > 0.1, name
