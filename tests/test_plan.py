"""The plan of several devices says what the compiled programs do, to a tenth."""

import json

import jax
import pytest
from devices import on_devices

import natgrad_jax as ng
from natgrad_jax.base import Leaf, Use

MEASURE = """
import json, sys
import jax
from sharded import Config, apply, mean_step, measure
import jax.numpy as jnp
import natgrad_jax as ng

config, (method, *policies) = Config(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
shapes = {"first": (config.ends, config.units), "deep": (config.depth, config.units, config.units)}
params = {name: jnp.ones(shape) for name, shape in (shapes | {"last": (config.units, config.ends)}).items()}
layers = ng.capture(apply, ng.losses.squared_error).layers(params, jnp.ones((config.batch, config.ends)))
mesh = jax.make_mesh((jax.device_count(),), ("data",))
planned = ng.sharding.plan(layers, mesh, config.batch, method=method)
policies = tuple(policies) or tuple(cost.policy for cost in planned.costs)
found = measure(config, policies, method)
over = {row["policy"]: mean_step(row, found[0], "bytes") for row in found[1:]}
print(json.dumps([found, [planned[name]._asdict() for name in policies], over]))
"""
OF_A_BATCH = {"kfac": ("observe",), "ekfac": ("observe", "refresh"), "tengrad": ("refresh",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "method", "policies"),
    [
        (4, "kfac", ["layer, shared"]),
        *(pytest.param(count, "kfac", [], marks=pytest.mark.full) for count in (4, 8)),
        *(pytest.param(4, name, [], marks=pytest.mark.full) for name in ("ekfac", "shampoo", "soap", "tengrad")),
    ],
)
def test_the_plan_is_what_the_compiled_programs_do(devices, method, policies):
    sizes = {"units": 32, "depth": 8, "ends": 16, "batch": 64}
    asked = json.dumps(sizes), json.dumps([method, *policies])
    measured, planned, over = json.loads(on_devices(devices, MEASURE, *asked, timeout=560))
    adam, *measured = measured
    here, units, ends = sizes["batch"] // devices, sizes["units"], sizes["ends"]
    given = 4 * (sizes["depth"] * units**2 + 2 * units * ends + 2 * here * ends) + 64
    forward = 2 * here * (sizes["depth"] * units**2 + 2 * units * ends)
    passes = 2 * forward - 2 * here * units * ends  # to the outputs, and back to those of the first layer
    assert [row["policy"] for row in measured] == [cost["policy"] for cost in planned]
    for found, said in zip(measured, planned, strict=True):

        def near(number, flags=0.0):
            return pytest.approx(number, rel=0.1, abs=flags)

        def own(what, found=found):
            return found[what]["flops"] - (passes if what in OF_A_BATCH.get(method, ()) else 0)

        policy = found["policy"]
        squares = said["step"][0] / 3 if method == "soap" else 0  # of every step, the refresh's own too
        assert said["state"] == near(found["state"]), policy
        there = found["refresh"]["arguments"]  # by XLA's memory analysis; with what is used of the batch and parameters
        assert 0.9 * said["state"] < there < 1.1 * said["state"] + (0 if method in ("kfac", "shampoo") else given), (
            policy
        )
        assert said["statistics"][0] == near(own("observe")), policy
        assert said["statistics"][1] == near(found["observe"]["bytes"], 1500), policy  # flags and counters beside it
        assert said["refresh"][0] + squares == near(own("refresh")), policy
        assert said["refresh"][1] == near(found["refresh"]["bytes"], 1500), policy
        more = [found["step"][what] - adam["step"][what] for what in ("flops", "bytes")]
        assert said["step"][0] == near(more[0]), policy
        assert said["step"][1] == near(more[1], 0.01 * adam["step"]["bytes"]), policy
    if method == "kfac":
        assert over["layer, shared"] < 1.1  # bytes of a mean step at (10, 100) over Adam's


def dense(units, positions=1, stack=(), **more):
    leaf = Leaf("kernel", "deep", (*stack, units, units))
    return ng.Layer("deep", "dense", (units, units), (leaf,), stack, uses=(Use("dense", positions=positions),), **more)


def planned(layer, **settings):
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    return ng.sharding.plan(ng.Layers((layer,)), mesh, 64, **settings)


def test_a_plan_counts_what_the_definitions_say():
    found = planned(dense(64, positions=3, stack=(8,)))
    assert found["replicated"].statistics == (8 * 2 * 2 * (64 * 3 / 8) * 64**2, 8 * 2 * 2 * 7 / 8 * 4 * 64**2)
    assert found["replicated"].refresh == (pytest.approx(16 * 64**3 * 10 / 3), 0)
    assert found["layer, shared"].refresh == (pytest.approx(2 * 64**3 * 10 / 3), 0)
    assert found["layer, shared"].state == pytest.approx(found["replicated"].state / 8)
    assert found["layer, shared"].step == (2 * 64**2 * 128, 0)  # to scatter and to gather is to sum
    assert found["layer, shared"].statistics[1] == 7 / 8 * 4 * 8 * 2 * 64 * 33  # each pair of entries once, scattered
    assert found["replicated, shared"].statistics[1] == 2 * found["layer, shared"].statistics[1]
    part = planned(dense(64, stack=(8,)), axis="model")
    assert part["layer, shared"].state == pytest.approx(found["replicated"].state / 4)


def test_a_plan_of_other_methods_counts_what_the_definitions_say():
    kfac, ekfac, soap, rows = (
        planned(dense(64, stack=(8,)), method=name) for name in ("kfac", "ekfac", "soap", "tengrad")
    )
    each, cube = 2 * 64**2 * 64, 64**3
    assert ekfac["replicated"].step[0] == 2 * kfac["replicated"].step[0] == 8 * 4 * each
    assert soap["replicated"].step[0] == 3 * kfac["replicated"].step[0]
    turned = 2 * 2 * 8 * 64**2 + 2 * 8 * 64**2  # the rows of 8 examples, and their squares
    assert ekfac["layer, shared"].refresh[0] == pytest.approx(2 * 9 * cube + 8 * turned)
    assert soap["replicated"].statistics == (8 * 2 * each, 0)  # of a gradient that every device has
    kernel = 5 * 2 * 8**2 * (64 + 64 + 1)  # of five blocks of 8 x 8, the products of their rows, and their product
    assert rows["examples, shared"].refresh[0] == pytest.approx(8 * (kernel + cube / 3))
    assert rows["examples, shared"].state == pytest.approx(4 * 8 * (8 * 128 + 64**2 + 1))
    assert [cost.policy for cost in rows.costs] == ["examples, shared"]


def test_what_is_truncated_or_a_diagonal_is_planned_as_such():
    whole, few = planned(dense(512)), planned(dense(512), rank=16)
    assert few["replicated"].state < whole["replicated"].state / 16
    assert few["replicated"].refresh[0] == 0 < whole["replicated"].refresh[0]
    assert few["replicated"].statistics[1] == pytest.approx(2 * 2 * 7 / 8 * 4 * 2 * 512 * 16)
    wide, table = planned(dense(512), max_factor_dim=100), planned(dense(512, one_hot=True))
    assert wide["replicated"].refresh[0] == 0 and wide["replicated"].step[0] == 0
    assert table["replicated"].refresh[0] == pytest.approx(whole["replicated"].refresh[0] / 2)


def test_a_plan_is_a_table():
    lines = str(planned(dense(64))).splitlines()
    assert lines[0].split() == ["policy", "state", "statistics", "sent", "refresh", "sent", "step", "sent"]
    assert len(lines) == 6 and "8 devices, 64 examples" in lines[-1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batch": 0}, ValueError, "batch.*0"),
        ({"mesh": 8}, TypeError, r"mesh.*8.*jax\.make_mesh"),
        ({"axis": "pipe"}, ValueError, r"'pipe'.*\['data'\]"),
        ({"rank": -1}, (TypeError, ValueError), "rank.*-1"),
        ({"layers": {}}, TypeError, "layers"),
        ({"method": "adam"}, ValueError, "method.*'adam'.*tengrad"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, error, words):
    given = {"layers": ng.Layers((dense(4),)), "mesh": jax.sharding.AbstractMesh((8,), ("data",)), "batch": 8}
    with pytest.raises(error, match=words):
        ng.sharding.plan(**given | change)
