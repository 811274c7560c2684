"""Rows that stay on the devices of their examples: the kernel by a ring or by one gather, and TENGraD with it.

In processes of their own, because the number of devices is settled when JAX starts.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from devices import on_devices

import natgrad_jax as ng
from natgrad_jax.algebra.devices import exchange

KERNELS = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from collectives import Program
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.algebra.rows import OneHot
from natgrad_jax.base import Layer
from natgrad_jax.blocks import rings
from natgrad_jax.blocks.samples import Gradients, Rows

count, examples, found = len(jax.devices()), 16, {}
mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
devices = Devices(mesh, ("data",), rows=True)
layer = Layer("w", "dense", (6, 5), (), devices=devices)
with jax.enable_x64(True):
    a, g, index = (jax.random.normal(jax.random.key(0), (3, examples, 2, 6)),
                   jax.random.normal(jax.random.key(1), (3, 2, examples, 2, 5)),
                   jax.random.randint(jax.random.key(2), (3, examples, 2), 0, 6))
    hot = jax.nn.one_hot(index, 6)
    dense = jnp.einsum("snti,sknto->sknio", a, g)
    kinds = {"rows": (Rows(a, g), dense), "gradients": (Gradients(dense), dense),
             "one-hot": (Rows(OneHot(index, jnp.ones(index.shape), 6), g), jnp.einsum("snti,sknto->sknio", hot, g))}
    for kind, (jacobian, gradients) in kinds.items():
        flat = gradients.reshape(3, 2 * examples, -1)  # the definition
        exact = flat @ jnp.swapaxes(flat, -1, -2)
        spread = jax.device_put(jacobian, rings.placed(jacobian, devices))
        for by in ("gather", "ring"):
            run = jax.jit(lambda rows, by=by: rings.kernel(layer, rows, 1 << 20, by)).lower(spread).compile()
            sent = [(each.what, each.times) for each in Program(run.as_text(), count).sent()]
            error = float(jnp.abs(run(spread) - exact).max() / jnp.abs(exact).max())
            found[f"{kind} {by}"] = {"error": error, "sent": sent}
wide = Rows(jnp.zeros((256, 1, 512)), jnp.zeros((1, 256, 1, 512)))  # 1 MB of rows, 0.25 MB of a kernel
wide = jax.device_put(wide, rings.placed(wide, devices))
for by in ("gather", "ring"):
    run = jax.jit(lambda rows, by=by: rings.kernel(layer, rows, 1 << 20, by)).lower(wide).compile()
    found[by] = [run.memory_analysis().temp_size_in_bytes, Program(run.as_text(), count).bytes_sent()]
print(json.dumps(found))
"""

TRAINED = """
import json, sys
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from collectives import Program
from natgrad_jax.blocks import rings
import natgrad_jax as ng

axes, width, settings, double = json.loads(sys.argv[1])
count, examples = len(jax.devices()), 32

def apply(params, x):
    h = jnp.tanh(x @ params["first"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["deep"])
    return h @ params["last"]

def run():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {"first": jax.random.normal(keys[0], (width, width)), "last": jax.random.normal(keys[1], (width, width)),
              "deep": jax.random.normal(keys[2], (2, width, width))}
    params = jax.tree.map(lambda leaf: leaf / width**0.5, params)
    x, y = jax.random.normal(keys[3], (examples, width)), jax.random.normal(keys[4], (examples, width))
    batch = x, y, (jnp.arange(examples) < examples - 5).astype(x.dtype)
    watched = ng.capture(apply, ng.losses.squared_error, verify=False)
    layers = watched.layers(params, x)
    tx = ng.tengrad(0.05, layers, **{"damping": 0.1, "refresh_every": 2} | settings)

    def trained(tx, params, state, x, y, weights, places=None):
        def step(params, state, x, y, weights, key):
            out = watched.value_and_grad(params, x, y, key=key, weights=weights)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            params = optax.apply_updates(params, updates)
            return (params, state) if places is None else jax.lax.with_sharding_constraint((params, state), places)

        compiled = jax.jit(step).lower(params, state, x, y, weights, jax.random.key(0)).compile()
        for t in range(3):
            params, state = compiled(params, state, x, y, weights, jax.random.key(t))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]), compiled

    one, _ = trained(tx, params, tx.init(params), *batch)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(getattr(AxisType, axes),))
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    found = {}
    for policy in ("examples", "replicated"):
        state, everywhere = ng.sharding.state_specs(tx, params, mesh, policy), NamedSharding(mesh, P())
        places = jax.tree.map(lambda _: everywhere, params), state
        start = jax.device_put((params, tx.init(params)), places)
        shared = ng.sharding.share_refreshes(tx, mesh, policy)
        four, compiled = trained(shared, *start, *spread, places if axes == "Auto" else None)
        program = Program(compiled.as_text(), count)
        before = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
        found[policy] = {
            "error": float(jnp.linalg.norm(four - one) / jnp.linalg.norm(one - before)),
            "state": ng.sharding.bytes_per_device(start[1]), "bytes": program.bytes_sent(),
            "sent": [[each.what, each.shape, each.times] for each in program.sent()],
            "peak": compiled.memory_analysis().temp_size_in_bytes,
        }
    return found

with jax.enable_x64(double):
    print(json.dumps(run()))
"""


def trained(count, axes="Auto", width=12, double=False, **settings):
    given = json.dumps([axes, width, settings, double])
    return json.loads(on_devices(count, TRAINED, given, timeout=500))


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_kernel_of_spread_rows_is_that_of_all_by_a_ring_and_by_a_gather(count):
    found = json.loads(on_devices(count, KERNELS, timeout=400))
    (peak_of_gather, sent_by_gather), (peak_of_ring, sent_by_ring) = found.pop("gather"), found.pop("ring")
    rows, kernels = 2 * 256 * 512 * 4, (count // 2 + 1) * 256**2 * 4 / count * (count - 1) / count
    assert sent_by_gather == (count - 1) / count * rows + kernels
    assert sent_by_ring == count // 2 / count * rows + kernels
    assert peak_of_ring < peak_of_gather - (0.9 if count > 2 else 0) * (1 - 3 / count) * rows
    for name, there in found.items():
        assert there["error"] < 1e-12, name
    ring = dict(found["rows ring"]["sent"])
    assert ring["collective-permute"] == count // 2 and ring["all-gather"] == 1  # each pair of devices once
    assert {what for what, _ in found["rows gather"]["sent"]} == {"all-gather"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {}),
        (4, {}),
        (8, {}),
        (4, {"axes": "Explicit"}),
        (4, {"blocks": "joint"}),
        (4, {"energy": 0.9}),
        (4, {"momentum": "spring", "refresh_every": 1}),
    ],
)
def test_c13_tengrad_and_spring_with_rows_on_their_devices_train_like_one(count, settings):
    for double, bound in ((False, 1e-5), (True, 1e-10)):
        there = trained(count, double=double, **settings)["examples"]
        assert there["error"] < bound


@pytest.mark.full
def test_rows_on_their_devices_are_held_once_and_go_round():
    found = trained(8, width=48, workspace=1)
    spread, whole = found["examples"], found["replicated"]
    rows = 4 * 32 * (48 + 48) * 4  # bytes of a and g of four layers
    assert whole["state"] - spread["state"] == rows * 7 / 8
    handed = [shape for what, shape, times in spread["sent"] if what == "collective-permute" and times == 4]
    assert len(handed) == 4  # a and g of the scanned layer, and of the two others as one
    gathered = ["f32[1,32,1,48]" in [shape for _, shape, _ in each["sent"]] for each in (spread, whole)]
    assert gathered == [False, True]  # the control: every device wants them


def test_the_cost_model_gathers_few_bytes_on_many_devices():
    assert exchange(1e4, 64) == "gather"
    assert exchange(1e9, 64) == "ring" and exchange(1e4, 2) == "ring"
    assert exchange(1e6, 8, latency=1.0) == "gather"  # the control: where a launch is dear


def test_rows_are_placed_where_their_examples_are():
    params = {"w": jnp.ones((8, 4))}
    watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    tx = ng.scale_by_tengrad(watched.layers(params, jnp.ones((6, 8))), damping=0.1)
    mesh = jax.make_mesh((1,), ("data",))
    state = ng.sharding.state_specs(tx, params, mesh, "examples")
    operator = state.operators["w"].value
    spec = jax.sharding.PartitionSpec
    assert operator.factor.spec == spec() and operator.jacobians[0].outputs.spec == spec(None, ("data",))
