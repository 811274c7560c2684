"""A checkpoint of one number of devices goes on with another: replicated or sharded, the steps after it are equal.

Each side is a process of its own, because the number of devices is settled when JAX starts.
"""

import pytest
from devices import on_devices

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as orbax
from jax.sharding import NamedSharding, PartitionSpec as P, AxisType
import methods_table as table
import natgrad_jax as ng

folder, role, how = sys.argv[1:]
mesh = jax.make_mesh((len(jax.devices()),), ("batch",), axis_types=(AxisType.Auto,))
problem = table.task("mlp wide")  # sizes of 16, which four devices can share
tx = ng.kfac(0.05, problem.layers, damping=0.1, statistics_every=2, refresh_every=3, early_refresh=False)


def placed(tree):
    def where(leaf):
        cut = how == "sharded" and leaf.ndim and leaf.shape[0] % len(jax.devices()) == 0
        return NamedSharding(mesh, P("batch") if cut else P())

    return jax.tree.map(where, tree)


@jax.jit
def step(carry, t):
    params, state = carry
    x, y, key = table.batch_of(problem, t)
    x, y = (jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P("batch"))) for leaf in (x, y))
    out = problem.capture.value_and_grad({"params": params}, x, y, key=key)
    updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
    return optax.apply_updates(params, updates), state


def trained(carry, times):
    for t in times:
        carry = step(carry, jnp.int32(t))
    return carry


start = table.start(problem, tx)
with orbax.StandardCheckpointer() as checkpointer:
    if role == "save":  # in the middle of both periods, and what comes after
        carry = trained(jax.device_put(start, placed(start)), range(5))
        checkpointer.save(folder + "/state", carry)
        leaves = jax.tree.leaves(trained(carry, range(5, 8)))
        np.savez(folder + "/after.npz", *map(np.asarray, leaves))
    else:
        shape = jax.ShapeDtypeStruct
        like = jax.tree.map(lambda x, where: shape(x.shape, x.dtype, sharding=where), start, placed(start))
        carry = checkpointer.restore(folder + "/state", like)
        assert all(len(leaf.sharding.device_set) == len(jax.devices()) for leaf in jax.tree.leaves(carry))
        assert how != "sharded" or any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(carry))
        there = np.load(folder + "/after.npz")
        for name, leaf in zip(there.files, jax.tree.leaves(trained(carry, range(5, 8))), strict=True):
            np.testing.assert_allclose(leaf, there[name], rtol=2e-5, atol=2e-6)
        fresh = jax.tree.leaves(trained(jax.device_put(start, placed(start)), range(5, 8)))
        assert not np.allclose(fresh[0], there[there.files[0]], rtol=2e-5, atol=2e-6)  # what the checkpoint was for
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        (1, 4, "sharded"),
        pytest.param(1, 4, "replicated", marks=pytest.mark.full),
        pytest.param(4, 1, "replicated", marks=pytest.mark.full),
    ],
)
def test_training_goes_on_on_another_number_of_devices(before, after, how, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    on_devices(before, SCRIPT, str(tmp_path), "save", "replicated")
    on_devices(after, SCRIPT, str(tmp_path), "restore", how)


@pytest.mark.full
def test_what_was_sharded_over_four_devices_goes_on_on_one(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    on_devices(4, SCRIPT, str(tmp_path), "save", "sharded")
    on_devices(1, SCRIPT, str(tmp_path), "restore", "replicated")
