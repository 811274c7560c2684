"""The devices of a mesh share a refresh: equal to one device, as much for each, and nothing sent while they solve.

In processes of their own, because the number of devices is settled when JAX starts.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import methods_table
import optax
import pytest
from devices import on_devices
from jax.sharding import PartitionSpec

import natgrad_jax as ng
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.lift.shares import shares
from natgrad_jax.methods.kfac import KFAC

SCRIPT = """
import json, sys
import jax
import jax.numpy as jnp
import methods_table as table
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import natgrad_jax as ng
from collectives import Program

names, kinds, (outer, inner) = json.loads(sys.argv[1])
devices = len(jax.devices())

def apply(params, x):  # a scanned layer of eight copies and four more of its shape; two of other shapes, if asked for
    h = jnp.tanh(x @ params["first"]) if "first" in params else x
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["deep"])
    for n in range(4):
        h = jnp.tanh(h @ params[f"layer{n}"])
    return h @ params["last"] if "last" in params else h

keys = jax.random.split(jax.random.key(0), 9)
params = {"deep": jax.random.normal(keys[0], (8, inner, inner)) / 3}
params |= {f"layer{n}": jax.random.normal(keys[1 + n], (inner, inner)) / 3 for n in range(4)}
if outer != inner:
    params |= {"first": jax.random.normal(keys[5], (outer, inner)), "last": jax.random.normal(keys[6], (inner, outer))}
x, y = jax.random.normal(keys[7], (16, outer)), jax.random.normal(keys[8], (16, outer))
watched = ng.capture(apply, ng.losses.squared_error, verify=False)
layers = watched.layers(params, x)

def trained(tx, batch, params, state, shardings=None, watched=watched):
    @jax.jit
    def step(params, state, x, y, key):
        out = watched.value_and_grad(params, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        if shardings is not None:
            state = jax.lax.with_sharding_constraint(state, shardings)
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.05 * u, updates)), state

    for t in range(2):
        params, state = step(params, state, *batch, jax.random.key(t))
    return params, state

def refreshed(tx, state, params, shardings=None):
    refresh = jax.jit(lambda state, params: ng.refresh(tx, state, params=params), out_shardings=shardings)
    program = Program(refresh.lower(state, params).compile().as_text(), devices)
    return {"flops": program.flops(), "solves": program.solves(), "inside": program.solves_while_it_sends(),
            "sent": [(each.what, each.shape, each.times) for each in program.sent()], "bytes": program.bytes_sent()}

flat = lambda tree: jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(jax.device_get(tree))])
found = {}
for name in names:
    tx = table.row(name).scale_by(layers, damping=0.3, **{"statistics_every": 1, "refresh_every": 1})
    one = trained(tx, (x, y), params, tx.init(params))
    found[name] = {"moved": float(jnp.linalg.norm(flat(one[0]) - flat(params)))}
    if name.startswith("kfac"):
        found[name]["alone"] = refreshed(tx, one[1], one[0])
    for kind in kinds:
        axes, policy = kind.split()
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(getattr(AxisType, axes),))
        shared = ng.sharding.share_refreshes(tx, mesh, policy)
        shardings = ng.sharding.state_specs(tx, params, mesh, policy)
        everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
        start = jax.device_put((params, tx.init(params)), (everywhere, shardings))
        batch = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
        capture = ng.sharding.share_gradients(watched, mesh) if policy == "layer" else watched
        ended = trained(shared, batch, *start, shardings if axes == "Auto" else None, capture)
        found[name][kind] = {"error": float(jnp.linalg.norm(flat(ended[0]) - flat(one[0])))}
        found[name][kind]["state"] = ng.sharding.bytes_per_device(ended[1])
        if name.startswith("kfac"):
            found[name][kind] |= refreshed(shared, ended[1], ended[0], shardings)
print(json.dumps(found))
"""


def measured(devices, names, kinds, sizes):
    return json.loads(on_devices(devices, SCRIPT, json.dumps([names, kinds, sizes]), timeout=400))


@pytest.fixture(scope="module", params=[4, pytest.param(8, marks=pytest.mark.full)])
def equal(request):
    """Twelve layers of one shape, on so many devices."""
    devices = request.param
    return devices, measured(devices, ["kfac pi"], ["Auto replicated", "Auto layer"], [8, 8])["kfac pi"]


@pytest.mark.slow
def test_c13_shared_refreshes_train_like_one_device(equal):
    _, found = equal
    for kind in ("Auto replicated", "Auto layer"):
        assert found[kind]["error"] < 1e-5 * found["moved"], kind
    assert found["Auto layer"]["state"] < 0.6 * found["Auto replicated"]["state"]


@pytest.mark.slow
def test_each_device_has_its_part_of_the_flops(equal):
    devices, found = equal
    total, rounded_up = found["alone"]["flops"], -(-12 // devices) / 12
    assert sum(found["alone"]["solves"].values()) == 24
    for kind in ("Auto replicated", "Auto layer"):
        assert found[kind]["flops"] < 1.15 * total * rounded_up, kind
        assert sum(found[kind]["solves"].values()) == 24 * rounded_up, kind


@pytest.mark.slow
def test_a_shared_refresh_sends_once_and_not_while_it_solves(equal):
    devices, found = equal
    assert found["alone"]["sent"] == []
    for kind in ("Auto replicated", "Auto layer"):
        assert not found[kind]["inside"], kind
    ((what, shape, times),) = found["Auto replicated"]["sent"]
    longest = -(-12 // devices) * 2 * 8 * 8  # two inverses of each copy
    assert (what, shape, times) == ("all-gather", f"f32[{devices},{longest}]", 1)
    matrices = [shape for what, shape, _ in found["Auto layer"]["sent"] if "," in shape]
    assert matrices == [f"f32[{devices},{-(-4 // devices) * 2 * 8 * 8}]"]  # of the layers that have no stack


@pytest.mark.full
@pytest.mark.parametrize("name", methods_table.ALL_NAMES)
def test_c13_every_method_shares_its_refreshes_among_layers_of_different_shapes(name):
    kinds = ["Auto replicated", "Explicit layer"]
    found = measured(4, [name], kinds, [5, 8])[name]
    for kind in kinds:
        assert found[kind]["error"] < (1e-3 if name == "soap" else 2e-5) * found["moved"], kind


def test_the_shares_are_balanced_by_the_cubes_of_the_matrices():
    sizes = [(100, 10), (80, 80), (80, 70), (60, 60), (60, 60), (60, 5), (50, 50), (5, 5)]
    layers = [ng.Layer(str(index), "dense", shape, ()) for index, shape in enumerate(sizes)]
    method = KFAC(damping=1.0).method(0.9)
    pairs = {layer.name: jax.eval_shape(partial(method.init, layer)) for layer in layers}
    found = shares(layers, pairs, 3)
    placed = [
        found.groups[number].copies[place].name
        for each in found.chosen
        for number, places in enumerate(each)
        for place in places
    ]
    assert sorted(placed) == [str(n) for n in range(8)]
    assert sum(found.loads) == sum(rows**3 + columns**3 for rows, columns in sizes)
    assert max(found.loads) < 1.2 * min(found.loads)


def test_what_has_no_layers_is_refused():
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match=r"no state by layer.*ng.kfac"):
        ng.sharding.share_refreshes(optax.adam(0.1), mesh).init({"w": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"mesh.*'data'.*jax.make_mesh"):
        ng.sharding.share_refreshes(optax.adam(0.1), "data")
    for told in (lambda: ng.sharding.share_refreshes(None, mesh), lambda: ng.sharding.state_specs(None, {}, mesh)):
        with pytest.raises(TypeError, match=r"`tx` is None; expected an Optax transformation"):
            told()
    with pytest.raises(ValueError, match=r"`axis` is 3; expected an axis of the mesh.*'data'"):
        ng.sharding.share_refreshes(optax.adam(0.1), mesh, axis=3)
    with pytest.raises(ValueError, match=r"`devices` is 0; expected a whole number"):
        ng.sharding.exchange(1e4, 0)
    with pytest.raises(ValueError, match=r"policy.*'factor'"):
        ng.sharding.share_refreshes(optax.adam(0.1), mesh, "factor")


def test_sharing_is_refused_where_the_axes_are_taken_or_missing():
    mesh, other, spec = jax.make_mesh((1,), ("data",)), jax.make_mesh((1,), ("model",)), PartitionSpec()

    def shared(x):
        return Devices(mesh, ("data",)).each(jnp.square, (spec,), spec)(x)

    assert shared(jnp.ones(3)).shape == (3,)
    with pytest.raises(ValueError, match=r"\['data'\] are manual.*jax\.jit"):
        jax.shard_map(shared, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(3))
    with jax.set_mesh(other), pytest.raises(ValueError, match=r"\['model'\] and not \['data'\]"):
        shared(jnp.ones(3))


ROWS = """
import json
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import natgrad_jax as ng
from collectives import Program

keys = jax.random.split(jax.random.key(0), 4)
params = {"a": jax.random.normal(keys[0], (20, 24)), "b": jax.random.normal(keys[1], (24, 12))}
x, y = jax.random.normal(keys[2], (32, 20)), jax.random.normal(keys[3], (32, 12))
watched = ng.capture(lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"], ng.losses.squared_error)
tx = ng.scale_by_tengrad(watched.layers(params, x), damping=0.1, refresh_every=2)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
shardings = ng.sharding.state_specs(tx, params, mesh, "factor")

def trained(tx, batch, params, state, there=None):
    @jax.jit
    def step(params, state, x, y, key):
        out = watched.value_and_grad(params, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        state = state if there is None else jax.lax.with_sharding_constraint(state, there)
        return optax.apply_updates(params, jax.tree.map(lambda update: -0.05 * update, updates)), state

    program = Program(step.lower(params, state, *batch, jax.random.key(0)).compile().as_text(), 4)
    for t in range(3):
        params, state = step(params, state, *batch, jax.random.key(t))
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]), program

one, alone = trained(tx, (x, y), params, tx.init(params))
everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
batch = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
shared = ng.sharding.share_refreshes(tx, mesh)
four, program = trained(shared, batch, everywhere, jax.device_put(tx.init(params), shardings), shardings)
sent = [each.shape for each in program.sent() if each.what == "all-gather"]
print(json.dumps({"error": float(jnp.linalg.norm(four - one) / jnp.linalg.norm(one)), "sent": sent,
                  "solves": [alone.solves()[32], program.solves()[32]]}))
"""


@pytest.mark.full
def test_c13_the_rows_of_tengrad_are_gathered_once_and_its_kernels_shared():
    found = json.loads(on_devices(4, ROWS, timeout=400))
    assert found["error"] < 1e-5
    for rows in ("f32[32,20]", "f32[32,24]", "f32[1,32,1,24]", "f32[1,32,1,12]"):  # a and g of both layers
        assert found["sent"].count(rows) == 1, rows
    assert 2 * found["solves"][1] == found["solves"][0]
