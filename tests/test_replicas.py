"""C13 by hand: a batch spread over the replicas of `pmap` or `shard_map` trains like the same batch on one device.

In a process of its own, because the number of devices is settled when JAX starts.
"""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from flax import linen as nn
from methods_table import LIFTED, task

import natgrad_jax as ng


class Normed(nn.Module):
    axis: str | None

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name=self.axis)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.tanh(x))


SCRIPT = """
import json, sys
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import methods_table as table
import natgrad_jax as ng
from test_replicas import Normed

mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
likelihood = ng.losses.softmax_cross_entropy
kind, errors = sys.argv[1], {}
problem = table.task("mlp" if kind == "others" else "dense")
x, y, start = problem.x[0], problem.y[0], problem.variables["params"]
weights = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0, 3.0])  # replicas of unequal weight


def pair(model=problem.capture.model, other=None, **settings):
    settings = {"labels": "true"} | settings
    one = ng.linen.capture(model, likelihood, **settings)
    return one, ng.linen.capture(other or model, likelihood, axis_name="batch", **settings)


def step(capture, tx, carry, x, y, w):
    variables, state = carry
    out = capture.value_and_grad(variables, x, y, key=jax.random.key(5), weights=w)
    updates, state = tx.update(out.grad, state, variables["params"], curvature=out.curvature)
    params = jax.tree.map(lambda p, u: p - 0.05 * u, variables["params"], updates)
    return ({**variables, **out.updated, "params": params}, state), out.value


def trained(how, capture, tx, variables, steps=5):
    def one(carry, x, y, w):
        return step(capture, tx, carry, x, y, w)

    carry, batch = (variables, tx.init(variables["params"])), (x, y, weights)
    if how == "pmap":
        carry = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), carry)
        batch = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
        carry = jax.device_put(carry, NamedSharding(mesh, P("batch")))
        run = jax.pmap(one, axis_name="batch")
    elif how == "one":
        run = jax.jit(one)
    else:
        specs = (P(), *[P("batch")] * 3)
        carry = jax.device_put(carry, NamedSharding(mesh, P()))  # as it comes back: one compilation
        run = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=how == "checked"))
    for _ in range(steps):
        carry, value = run(carry, *batch)
    drift = 0.0
    if how == "pmap":
        drift = max(float(jnp.abs(leaf[0] - leaf[1]).max()) for leaf in jax.tree.leaves(carry))
        carry, value = jax.tree.map(lambda leaf: leaf[0], (carry, value))
    return carry[0]["params"], value, drift


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


def distance(hows, captures, tx, variables):
    params, value, _ = trained("one", captures[0], tx, variables)
    way = jnp.linalg.norm(flat(params) - flat(variables["params"]))
    found = {}
    for how in hows:
        there, other, drift = trained(how, captures[1], tx, variables)
        found[how] = [float(jnp.linalg.norm(flat(there) - flat(params)) / way), float(abs(other - value)), drift]
    return found


def controls():  # labels are drawn independently, and what is said where nothing is joined
    one, many = pair(labels="sampled")

    def cotangents(x, y):
        found = many.value_and_grad(variables, x, y, key=jax.random.key(7)).curvature()
        return next(iter(found.values())).cotangents[0]

    spread = jax.jit(jax.shard_map(cotangents, mesh=mesh, in_specs=(P("batch"), P("batch")), out_specs=P()))
    both = spread(jnp.concatenate([x[:1]] * 64), jnp.zeros(64, jnp.int32))
    errors["draws of two replicas are the same"] = bool(jnp.array_equal(both[0, :32], both[0, 32:]))
    tx = table.direction("kfac pi", "dense")
    try:
        trained("checked", one, tx, variables)
    except ValueError as error:
        errors["said"] = str(error)
    for how in ("unchecked", "pmap"):
        try:
            trained(how, one, tx, variables)
        except ValueError as error:
            errors["said under " + how] = str(error)
    each = ng.linen.capture(problem.capture.model, likelihood, labels="true", axis_name=())
    errors["without a name"] = distance(("unchecked",), (each, each), tx, variables)
    errors["members"] = trained("pmap", each, tx, variables)[2]


names = ("kfac pi",) if kind == "one method" else table.LIFTED[1:]
captures = pair()
variables = {"params": start}
for name in names:
    hows = ("checked", "unchecked", "pmap") if name == "kfac pi" else ("checked",)
    errors[name] = distance(hows, captures, table.direction(name, "mlp" if kind == "others" else "dense"), variables)
if kind == "one method":
    controls()
    print(json.dumps(errors))
    sys.exit()
errors["microbatches"] = distance(("checked",), pair(microbatches=2), table.direction("kfac pi"), variables)

normed = Normed(None)
variables = normed.init(jax.random.key(0), x)
captures = pair(normed, Normed("batch"))
tx = ng.kfac(0.1, captures[0].layers(variables, x), damping=0.1)
errors["normed"] = distance(("unchecked", "pmap"), captures, tx, variables)

with jax.enable_x64(True):  # steps that choose themselves magnify rounding
    variables, x, weights = jax.tree.map(lambda leaf: leaf.astype(float), ({"params": start}, x, weights))
    captures = pair(problem.capture.model.clone(dtype=float))
    rule = {"damping": ng.adaptive_damping(), "momentum": "quadratic"}
    tx = ng.kfac("quadratic", captures[0].layers(variables, x), **rule)
    errors["adaptive"] = distance(("checked",), captures, tx, variables)
print(json.dumps(errors))
"""


ONE = "one method"
OTHERS = (*LIFTED[1:], "adaptive", "microbatches", "normed")


@cache
def errors(kind):
    """What the script measured, of one method with the controls or of what is around it."""
    return json.loads(on_devices(4, SCRIPT, kind, timeout=480))


@pytest.mark.slow
@pytest.mark.parametrize("name", [LIFTED[0], *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_c13_two_replicas_train_like_one_device(name):
    for how, (distance, value, drift) in errors("others" if name in OTHERS else ONE)[name].items():
        bounds = (1e-11, 1e-12) if name == "adaptive" else (2e-5, 1e-6)  # that one in float64
        assert distance < bounds[0], how  # of the way gone in five steps
        assert value < bounds[1], how
        assert drift == 0, how


@pytest.mark.slow
def test_c13_without_a_name_two_replicas_do_not_train_like_one_device():
    assert errors(ONE)["without a name"]["unchecked"][0] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unchecked", "pmap"])
def test_where_nothing_tells_whether_replicas_share_a_batch_it_has_to_be_said(how):
    said = errors(ONE)[f"said under {how}"]
    assert "The replicas of the axis 'batch'" in said and "drift apart" in said and "axis_name=()" in said
    assert errors(ONE)["members"] > 0.01  # each trained by itself


@pytest.mark.slow
def test_labels_are_drawn_independently_on_each_replica():
    assert errors(ONE)["draws of two replicas are the same"] is False


@pytest.mark.slow
def test_where_jax_knows_that_replicas_would_drift_apart_it_is_said():
    said = errors(ONE)["said"]
    assert "The gradient is the same on all replicas of ['batch']" in said and "axis_name='batch'" in said


def test_a_name_that_is_not_bound_and_one_that_is_no_name_are_refused():
    problem = task("mlp")
    capture = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, axis_name="batch")
    with pytest.raises(ValueError, match="`axis_name` is 'batch', but no such axis is bound here"):
        capture.value_and_grad(problem.variables, problem.x[0], problem.y[0], key=jax.random.key(0))
    with pytest.raises(TypeError, match="`axis_name` is 3; expected the name"):
        ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, axis_name=3)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="JAX 0.8 does not batch the pullback of a `shard_map`")
def test_a_branch_that_a_replica_does_not_take_has_rows_of_zeros_of_that_replica():
    def apply(params, x):
        return jax.lax.cond(x.shape[0] * params["b"] > 0, lambda: x @ params["w"], lambda: jnp.tanh(x @ params["v"]))

    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((2, 3)), "b": jnp.ones(())}
    x, y = jnp.arange(8.0).reshape(4, 2), jnp.zeros((4, 3))
    one, many = (ng.capture(apply, ng.losses.squared_error, labels="true", axis_name=a) for a in (None, "batch"))
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def measure(capture):
        def run(params, x, y):
            evidence = capture.value_and_grad(params, x, y).curvature()
            return {name: (evidence[name].inputs, evidence[name].cotangents) for name in ("w", "v")}

        return run

    specs = (spec(), spec("batch"), spec("batch"))
    found = jax.jit(jax.shard_map(measure(many), mesh=mesh, in_specs=specs, out_specs=spec()))(params, x, y)
    expected = jax.jit(measure(one))(params, x, y)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(ours, theirs)
    assert jnp.any(found["w"][0][0]) and not jnp.any(found["v"][0][0])


def test_replicas_of_vmap_are_those_of_the_batch():
    problem = task("mlp")
    capture = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, axis_name="seeds", labels="true")
    plain = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, labels="true")

    def measure(x, y):
        out = capture.value_and_grad(problem.variables, x, y)
        return out.value, out.grad

    x, y = problem.x[0], problem.y[0]
    found = jax.jit(jax.vmap(measure, axis_name="seeds"))(x.reshape(2, 4, -1), y.reshape(2, 4))
    out = jax.jit(lambda x, y: plain.value_and_grad(problem.variables, x, y)[:2])(x, y)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(out), strict=True):
        assert np.allclose(ours[0], expected, rtol=1e-5, atol=1e-6) and np.array_equal(ours[0], ours[1])


def test_layers_of_a_norm_over_replicas_are_found_outside_of_them():
    x, likelihood = task("mlp").x[0], ng.losses.softmax_cross_entropy
    variables = Normed(None).init(jax.random.key(0), x)
    with pytest.raises(NameError, match="unbound axis"):
        Normed("batch").apply(variables, x, mutable=["batch_stats"])
    found = ng.linen.capture(Normed("batch"), likelihood, axis_name="batch").layers(variables, x)
    assert found.blocks == ng.linen.capture(Normed(None), likelihood).layers(variables, x).blocks
