"""Sums over the examples that several devices have: of a half of the entries, and scattered over the copies of a layer.

In a process of its own, because the number of devices is settled when JAX starts.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from devices import on_devices

import natgrad_jax as ng
from natgrad_jax.algebra.devices import halved, made_whole

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from collectives import Program
from sharded import apply
import natgrad_jax as ng

(name, axes, axis, where) = json.loads(sys.argv[1])
keys = jax.random.split(jax.random.key(0), 5)
params = {"first": jax.random.normal(keys[0], (6, 16)) / 3, "deep": jax.random.normal(keys[1], (4, 16, 16)) / 3,
          "last": jax.random.normal(keys[2], (16, 6)) / 3}
batch = jax.random.normal(keys[3], (16, 6)), jax.random.normal(keys[4], (16, 6)), (jnp.arange(16) < 11).astype(float)
watched = ng.capture(apply, ng.losses.squared_error, verify=False)
tx = getattr(ng, f"scale_by_{name}")(watched.layers(params, batch[0]), damping=0.3, statistics_every=1, refresh_every=1)

def trained(tx, watched, params, state, x, y, weights, places=None):
    @jax.jit
    def step(params, state, x, y, weights, key):
        out = watched.value_and_grad(params, x, y, key=key, weights=weights)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.05 * u, updates))
        if places is not None:
            params, state = jax.lax.with_sharding_constraint((params, state), places)
        return params, state, out.grad

    compiled = step.lower(params, state, x, y, weights, jax.random.key(0)).compile()
    for t in range(2):
        params, state, grad = compiled(params, state, x, y, weights, jax.random.key(t))
    sent = [(each.what, each.shape) for each in Program(compiled.as_text(), 4).sent() for _ in range(each.times)]
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]), grad, params, sent

one, *_ = trained(tx, watched, params, tx.init(params), *batch)
shape, names = ((2, 2), ("data", "model")) if axis else ((4,), ("data",))
mesh = jax.make_mesh(shape, names, axis_types=(getattr(AxisType, axes),) * len(shape))
spread = jax.device_put(batch, NamedSharding(mesh, P(tuple(where))))
places = ng.sharding.state_specs(tx, params, mesh, "layer", axis)
places = jax.tree.map(lambda _: NamedSharding(mesh, P()), params), places
there = jax.device_put((params, tx.init(params)), places)
capture = ng.sharding.share_gradients(watched, mesh, axis)
shared, places = ng.sharding.share_refreshes(tx, mesh, "layer", axis), places if axes == "Auto" else None
four, grad, ended, sent = trained(shared, capture, *there, *spread, places)
error, moved = (jnp.linalg.norm(four - other) for other in (one, jnp.ravel(jnp.concatenate(
    [jnp.ravel(leaf) for leaf in jax.tree.leaves(params)]))))
print(json.dumps({"error": float(error / moved), "scattered": [what for what, _ in sent].count("reduce-scatter"),
                  "inputs": [what for what, shape in sent if shape == "f32[16,6]" and what == "all-gather"],
                  "gradient": str(grad["deep"].sharding.spec), "whole": ended["deep"].sharding.is_fully_replicated}))
"""


def found(name, axes="Auto", axis=None, where=("data",)):
    return json.loads(on_devices(4, SCRIPT, json.dumps([name, axes, axis, where]), timeout=400))


@pytest.mark.full  # `test_shared_refreshes` and `test_plan` stand for it: the steps of one device, and the bytes
@pytest.mark.parametrize("name", ["kfac", "ekfac", "tekfac", "tkfac"])
def test_c13_sums_that_are_scattered_are_those_of_one_device(name):
    there = found(name)
    assert there["error"] < 1e-5  # a batch filled up with examples of weight zero
    assert there["scattered"] >= 2  # the gradient, and the statistics
    assert "data" in there["gradient"]
    assert there["inputs"] == []  # nor to have one with weight in the place of the others


@pytest.mark.full
@pytest.mark.parametrize(
    ("axes", "axis", "where"),
    [("Explicit", None, ("data",)), ("Auto", "data", ("data",)), ("Auto", "model", ("model", "data"))],
)
def test_c13_sums_are_scattered_over_explicit_axes_and_over_one_of_two(axes, axis, where):
    there = found("kfac", axes, axis, where)
    assert there["error"] < 1e-5 and there["scattered"] >= 2
    assert (axis or "data") in there["gradient"]
    assert there["whole"]  # parameters stay where they were


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_half_of_the_entries_gives_a_symmetric_matrix(size):
    matrix = jax.random.normal(jax.random.key(size), (3, size, size))
    symmetric = matrix + jnp.swapaxes(matrix, -1, -2)
    assert halved(symmetric).shape == (3, size, size // 2 + 1)
    assert (made_whole(halved(symmetric)) == symmetric).all()
    if size > 2:  # the control
        assert (made_whole(halved(matrix)) != matrix).any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mesh": 4}, TypeError, r"mesh.*4.*jax\.make_mesh"),
        ({"axis": "model"}, ValueError, r"'model'.*\['data'\]"),
        ({"capture": 3}, TypeError, r"capture.*3.*ng\.linen\.capture"),
        ({"microbatches": 2}, ValueError, "microbatches=2"),
    ],
)
def test_gradients_that_cannot_be_shared_are_refused(change, error, words):
    pieces = change.pop("microbatches", 1)
    watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error, microbatches=pieces)
    given = {"capture": watched, "mesh": jax.make_mesh((1,), ("data",))} | change
    with pytest.raises(error, match=words):
        ng.sharding.share_gradients(**given)
