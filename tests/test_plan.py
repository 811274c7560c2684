"""The plan of several devices says what the compiled programs do, to a tenth."""

import json

import pytest
from devices import on_devices

import natgrad_jax as ng

MEASURE = """
import json, sys
import jax
from experiments.sharded import Config, apply, measure
import jax.numpy as jnp
import natgrad_jax as ng

config = Config(**json.loads(sys.argv[1]))
shapes = {"first": (config.ends, config.units), "deep": (config.depth, config.units, config.units)}
params = {name: jnp.ones(shape) for name, shape in (shapes | {"last": (config.units, config.ends)}).items()}
layers = ng.capture(apply, ng.losses.squared_error).layers(params, jnp.ones((config.batch, config.ends)))
planned = ng.sharding.plan(layers, jax.make_mesh((jax.device_count(),), ("data",)), config.batch)
print(json.dumps([measure(config), [cost._asdict() for cost in planned.costs]]))
"""
NEAR = 0.1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, pytest.param(8, marks=pytest.mark.full)])
def test_the_plan_is_what_the_compiled_programs_do(devices):
    sizes = {"units": 32, "depth": 8, "ends": 16, "batch": 64}
    measured, planned = json.loads(on_devices(devices, MEASURE, json.dumps(sizes), timeout=400))
    adam, *measured = measured
    assert [row["policy"] for row in measured] == [cost["policy"] for cost in planned]
    for found, said in zip(measured, planned, strict=True):
        near = {"rel": NEAR}
        policy, arguments = found["policy"], found["refresh"]["arguments"] - found["parameters"]
        assert said["state"] == pytest.approx(found["state"], **near), policy
        assert said["state"] == pytest.approx(arguments, **near), policy  # by XLA's memory analysis
        assert said["refresh"][0] == pytest.approx(found["refresh"]["flops"], **near), policy
        assert said["refresh"][1] == pytest.approx(found["refresh"]["bytes"], rel=NEAR, abs=1500), policy  # flags
        of_model = found["observe"]["bare"]  # of the passes through the model
        assert said["statistics"][0] == pytest.approx(found["observe"]["flops"] - of_model, **near), policy
        assert said["statistics"][1] == pytest.approx(found["observe"]["bytes"], rel=NEAR, abs=1500), policy
        more = [found["step"][what] - adam["step"][what] for what in ("flops", "bytes")]
        assert said["step"][0] == pytest.approx(more[0], **near), policy
        if policy != "factor":
            assert said["step"][1] == pytest.approx(more[1], rel=NEAR, abs=1500), policy


def layers_of(depth=8, units=64):
    stack = ng.Leaf("kernel", "deep", (depth, units, units))
    return ng.Layers((ng.Layer("deep", "dense", (units, units), (stack,), (depth,)),))
