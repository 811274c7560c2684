"""A checkpoint of one policy and number of devices goes on with another: the steps after it are those of one device.

Each side is a process of its own, because the number of devices is settled when JAX starts.
"""

import pytest
from devices import on_devices

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as orbax
from jax.sharding import NamedSharding, PartitionSpec as P, AxisType
import natgrad_jax as ng
from sharded import apply

folder, role, method, policy = sys.argv[1:]
mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 5)
params = {"first": jax.random.normal(keys[0], (8, 16)) / 3, "deep": jax.random.normal(keys[1], (4, 16, 16)) / 3,
          "last": jax.random.normal(keys[2], (16, 8)) / 3}
x, y = jax.random.normal(keys[3], (16, 8)), jax.random.normal(keys[4], (16, 8))
watched = ng.capture(apply, ng.losses.squared_error, verify=False)
settings = {"damping": 0.1, "refresh_every": 2} | ({} if method == "tengrad" else {"statistics_every": 1})
tx = getattr(ng, method)(0.05, watched.layers(params, x), **settings)
state = tx.init(params)
shared = tx if policy == "factor" else ng.sharding.share_refreshes(tx, mesh, policy)
watched = ng.sharding.share_gradients(watched, mesh) if policy == "layer" else watched
places = (jax.tree.map(lambda _: NamedSharding(mesh, P()), params), ng.sharding.state_specs(tx, params, mesh, policy))
batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))


@jax.jit
def step(carry, x, y, t):
    params, state = carry
    out = watched.value_and_grad(params, x, y, key=jax.random.fold_in(jax.random.key(9), t))
    updates, state = shared.update(out.grad, state, params, curvature=out.curvature)
    return jax.lax.with_sharding_constraint((optax.apply_updates(params, updates), state), places)


def trained(carry, times):
    for t in times:
        carry = step(carry, *batch, jnp.int32(t))
    return carry


with orbax.StandardCheckpointer() as checkpointer:
    if role == "save":
        carry = trained(jax.device_put((params, state), places), range(3))
        cut = [leaf for leaf in jax.tree.leaves(carry) if not leaf.sharding.is_fully_replicated]
        assert len(jax.devices()) == 1 or policy == "replicated" or cut
        checkpointer.save(folder + "/state", carry)
        np.savez(folder + "/after.npz", *map(np.asarray, jax.tree.leaves(trained(carry, range(3, 5))[0])))
    else:
        shape = jax.ShapeDtypeStruct
        like = jax.tree.map(lambda x, where: shape(x.shape, x.dtype, sharding=where), (params, state), places)
        carry = checkpointer.restore(folder + "/state", like)
        kept = jax.tree.map(lambda leaf, to: leaf.sharding.is_equivalent_to(to, leaf.ndim), carry, places)
        assert all(jax.tree.leaves(kept))
        there = np.load(folder + "/after.npz")
        for name, leaf in zip(there.files, jax.tree.leaves(trained(carry, range(3, 5))[0]), strict=True):
            np.testing.assert_allclose(leaf, there[name], rtol=2e-5, atol=2e-6)
        fresh = jax.tree.leaves(trained(jax.device_put((carry[0], state), places), range(3, 5))[0])
        last = there[there.files[-1]]
        assert not np.allclose(fresh[-1], last, rtol=2e-5, atol=2e-6)  # the control: the state of before any step
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("kfac", (4, "layer"), (2, "layer")),
        ("kfac", (4, "layer"), (1, "replicated")),
        ("kfac", (2, "factor"), (4, "layer")),
        ("ekfac", (4, "layer"), (2, "replicated")),
        ("tengrad", (4, "examples"), (2, "examples")),
        ("tengrad", (4, "examples"), (1, "replicated")),
        ("tengrad", (1, "replicated"), (4, "examples")),
    ],
)
def test_training_goes_on_under_another_policy_on_other_devices(method, before, after, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    for (devices, policy), role in ((before, "save"), (after, "restore")):
        on_devices(devices, SCRIPT, str(tmp_path), role, method, policy, timeout=300)
