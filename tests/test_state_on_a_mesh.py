"""The state of an optimizer over the devices of a mesh: bytes, steps, and what a refresh sends.

In a process of its own, because the number of devices is settled when JAX starts.
"""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from devices import on_devices

import natgrad_jax as ng

SCRIPT = """
import json
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import natgrad_jax as ng
from collectives import Program

def apply(params, x):  # a scanned layer of four copies, and one without a size that four devices divide
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ params["first"]), params["deep"])
    return h @ params["last"]

keys = jax.random.split(jax.random.key(0), 5)
params = {"first": jax.random.normal(keys[0], (5, 8)), "deep": jax.random.normal(keys[1], (4, 8, 8)) / 3,
          "last": jax.random.normal(keys[2], (8, 3))}
x, y = jax.random.normal(keys[3], (16, 5)), jax.random.normal(keys[4], (16, 3))
watched = ng.capture(apply, ng.losses.squared_error, verify=False)
layers = watched.layers(params, x)
tx = ng.kfac(0.05, layers, damping=0.1, statistics_every=1, refresh_every=2, momentum=0.9)

def step_of(shardings=None):
    @jax.jit
    def step(params, state, x, y, key):
        out = watched.value_and_grad(params, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        if shardings is not None:
            state = jax.lax.with_sharding_constraint(state, shardings)
        return optax.apply_updates(params, updates), state

    return step

def trained(step, batch, params, state):
    for t in range(3):
        params, state = step(params, state, *batch, jax.random.key(t))
    return params, state

def sent(program):
    '''What a compiled program sends, as {operation: [shapes of each]}.'''
    found = {}
    for each in program.sent():
        found.setdefault(each.what, []).extend([each.shape] * each.times)
    return found

def refreshed(state, shardings):
    refresh = jax.jit(lambda state, params: ng.refresh(tx, state, params=params), out_shardings=shardings)
    program = Program(refresh.lower(state, params).compile().as_text(), 4)
    return {"sent": sent(program), "solves": program.solves(), "inside": program.solves_while_it_sends()}

flat = lambda tree: jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(jax.device_get(tree))])
one = flat(trained(step_of(), (x, y), params, tx.init(params)))
found = {}
for kind in ("Auto", "Explicit"):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(AxisType, kind),))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batch = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
    for policy in ("replicated", "factor"):
        shardings = ng.sharding.state_specs(tx, params, mesh, policy)
        start = jax.device_put((params, tx.init(params)), (jax.tree.map(lambda _: everywhere, params), shardings))
        step = step_of(shardings if kind == "Auto" else None)
        ended = trained(step, batch, *start)
        kept = jax.tree.map(lambda leaf, to: leaf.sharding.is_equivalent_to(to, leaf.ndim), ended[1], shardings)
        found[f"{kind} {policy}"] = {
            "error": float(jnp.linalg.norm(flat(ended) - one) / jnp.linalg.norm(one)),
            "bytes": [ng.sharding.bytes_per_device(each) for each in (start[1], ended[1])],
            "told": ng.sharding.bytes_per_device(jax.eval_shape(tx.init, params), shardings),
            "kept": all(jax.tree.leaves(kept)),
        }
        if kind == "Auto":
            found[f"{kind} {policy}"] |= refreshed(ended[1], shardings)
        elif policy == "replicated":
            text = step.lower(*ended, *batch, jax.random.key(0)).compile().as_text()
            found[f"{kind} {policy}"]["step"] = sorted(sent(Program(text, 4)))
with jax.enable_x64(True):
    import shards_table
    found["shards"] = [shards_table.SIZES, shards_table.explained(["two views"])]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What the script measured, by "axes policy"."""
    return json.loads(on_devices(4, SCRIPT))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_c13_a_state_over_devices_trains_like_one_device_and_stays_where_it_is(found, axes):
    for policy in ("replicated", "factor"):
        there = found[f"{axes} {policy}"]
        assert there["error"] < 1e-5 and there["kept"], policy
        assert there["bytes"] == [there["told"]] * 2
    assert found[f"{axes} factor"]["told"] < found[f"{axes} replicated"]["told"] / 2


@pytest.mark.slow
def test_c13_a_step_on_an_explicit_mesh_sends_sums_and_no_rows(found):
    assert found["Explicit replicated"]["step"] == ["all-reduce"]


@pytest.mark.slow
def test_c13_a_refresh_sends_nothing_while_it_solves(found):
    assert found["Auto replicated"]["sent"] == {}
    cut = found["Auto factor"]
    assert cut["sent"].pop("all-reduce")  # norms, traces and flags: no matrix
    assert cut["solves"] and not cut["inside"]  # in the loops over the matrices of a stack
    factors = ["f32[4,8,8]", "f32[4,8,8]", "f32[8,8]", "f32[8,8]"]  # the control: those that were cut, once each
    assert cut["sent"] == {"all-gather": factors}


@pytest.mark.slow
def test_c2_rows_of_a_shard_map_over_devices_give_the_gradient_of_every_example(found):
    assert found["shards"] == [[2, 2], {"two views": ""}]  # the others, and the control: `test_shards`, by `-m full`


def kfac_of_one_layer():
    params = {"w": jnp.ones((8, 4))}
    watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    return ng.kfac(0.1, watched.layers(params, jnp.ones((8, 8)))), params


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"policy": "layers"}, ValueError, "policy.*layers.*layer"),
        ({"policy": "rows"}, ValueError, "policy.*'rows'"),
        ({"axis": "model"}, ValueError, r"'model'.*\['data'\]"),
        ({"axis": ()}, ValueError, r"\(\).*\['data'\]"),
        ({"mesh": 4}, TypeError, "mesh.*4.*jax.make_mesh"),
    ],
)
def test_what_cannot_be_placed_is_refused(change, error, words):
    tx, params = kfac_of_one_layer()
    with pytest.raises(error, match=words):
        ng.sharding.state_specs(tx, params, **{"mesh": jax.make_mesh((1,), ("data",))} | change)


def test_bytes_of_shapes_need_to_know_where_they_go():
    tx, params = kfac_of_one_layer()
    shapes = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="known of 0"):
        ng.sharding.bytes_per_device(shapes)
    assert ng.sharding.bytes_per_device(tx.init(params)) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )


def test_momentum_is_where_its_parameter_is():
    tx, params = kfac_of_one_layer()
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    cut = jax.sharding.PartitionSpec(None, "model")
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, cut))
    shardings = ng.sharding.state_specs(optax.chain(tx, optax.trace(0.9)), params, mesh, axis="data")
    assert shardings[1].trace["w"].spec == cut
    (inner,) = (each for each in jax.tree.leaves(shardings, is_leaf=is_ours) if is_ours(each))
    (statistics,) = inner.statistics.values()
    assert {sharding.spec for sharding in jax.tree.leaves(statistics)} >= {jax.sharding.PartitionSpec("data")}
    assert inner.count.spec == jax.sharding.PartitionSpec()


def is_ours(node):
    return isinstance(node, ng.NaturalGradientState)
