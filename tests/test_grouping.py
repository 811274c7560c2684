"""Layers of one shape are refreshed as one, to the same result; and no batched LAPACK call is left that could hang.

On a CPU, several batched LAPACK calls inside one `lax.cond` wait for one another for ever: nine `jnp.linalg.eigh` of
stacks [2, n, n] with n = 250, 258, ... do so within a second on two cores. Here the same nine go through the package.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import pytest
from methods_table import NAMES, direction, measured, task

import natgrad_jax as ng
from natgrad_jax.algebra import stacks as linalg
from natgrad_jax.base import Leaf

every_method = table.of_the_lifting(NAMES, ("kfac pi",))


@pytest.mark.slow
@every_method
def test_layers_refreshed_together_equal_layers_refreshed_one_by_one(method):
    layers, (gradient, evidence) = task("mlp").layers, measured("mlp")
    joint = direction(method)
    updates, _ = jax.jit(joint.update)(gradient, joint.init(gradient), curvature=evidence)
    for name in ("Dense_0", "Dense_1"):  # of one shape
        single = table.row(method).scale_by(replace(layers, known=(layers[name],)), **table.SETTINGS)
        own = {name: gradient[name]}
        found, _ = jax.jit(single.update)(own, single.init(own), curvature=evidence)
        chex.assert_trees_all_close(found, {name: updates[name]}, rtol=1e-4, atol=1e-5)


def lapack_calls(function, *args):
    """(target, shape of its matrices) of every LAPACK call in the code that XLA makes for this machine."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found = re.findall(r"= (.*?) custom-call\(.*custom_call_target=\"((?:lapack|blas)_\w+)\"", text)
    return [(target, max(re.findall(r"\w+\[([\d,]*)\]", result), key=len)) for result, target in found]


def batched(calls):
    return [call for call in calls if call[1].count(",") > 1]


def factorisations(calls):
    return [call for call in calls if re.search("potrf|syev|geqrf", call[0])]


def equal_layers(count):
    """Some dense layers (4 -> 5, no bias) of one shape, with gradients and evidence."""
    names = [f"layer{i}" for i in range(count)]
    layers = ng.Layers(tuple(stacked_layer(name, (), 4, 5) for name in names), examples=8)
    return layers, {n: {"kernel": jnp.ones((4, 5))} for n in names}, {n: stacked_evidence((), 4, 5) for n in names}


def stacked_layer(name, stack, rows, columns):
    leaf = Leaf("kernel", f"{name}/kernel", (*stack, rows, columns))
    return ng.Layer(name, "dense", (rows, columns), (leaf,), stack)


def stacked_evidence(stack, rows, columns):
    rng = np.random.default_rng(rows)
    shapes = (*stack, 8, rows), (1, *stack, 8, columns), (1, *stack, rows, columns)
    inputs, cotangents, gradient = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return ng.Evidence((inputs,), (cotangents,), {"kernel": gradient}, None, jnp.float32(8))


def calls_of(layers, gradient, evidence, method):
    tx = table.row(method).scale_by(layers, **table.SETTINGS)
    return lapack_calls(lambda g, s, e: tx.update(g, s, curvature=e), gradient, tx.init(gradient), evidence)


@pytest.mark.slow
@every_method
def test_equal_shapes_give_one_factorisation_of_each_side(method):
    few, many = (factorisations(calls_of(*equal_layers(count), method)) for count in (1, 4))
    assert sorted(few) == sorted(many) and len(few) == table.row(method).factorisations


@pytest.mark.full
def test_different_shapes_give_factorisations_of_their_own():
    layers = ng.Layers(tuple(stacked_layer(f"layer{n}", (), n, n + 1) for n in (4, 6, 8)))
    gradient = {f"layer{n}": {"kernel": jnp.ones((n, n + 1))} for n in (4, 6, 8)}
    evidence = {f"layer{n}": stacked_evidence((), n, n + 1) for n in (4, 6, 8)}
    assert len(factorisations(calls_of(layers, gradient, evidence, "kfac exact"))) == 6


@pytest.mark.slow
@every_method
def test_no_batched_lapack_call_is_compiled_for_a_cpu(method):
    tx, (gradient, evidence) = direction(method, "convnet"), measured("convnet")  # with a grouped convolution
    calls = lapack_calls(lambda g, s, e: tx.update(g, s, curvature=e), gradient, tx.init(gradient), evidence)
    assert factorisations(calls) and not batched(calls)


@pytest.mark.parametrize("routine", [linalg.eigh, linalg.inverse, linalg.orthonormal])
def test_neither_stacks_nor_a_vmap_make_a_lapack_call_batched(routine):
    for function in (routine, jax.vmap(routine), jax.vmap(jax.vmap(routine))):
        calls = lapack_calls(function, jnp.broadcast_to(jnp.eye(3), (2, 2, 3, 3)))
        assert calls and not batched(calls)


@pytest.mark.parametrize("routine", [jnp.linalg.eigh, jnp.linalg.cholesky, jnp.linalg.qr])
def test_the_unguarded_routines_are_batched(routine):
    assert batched(lapack_calls(routine, jnp.broadcast_to(jnp.eye(3), (2, 3, 3))))


DEADLOCK = """
import jax, numpy as np
import natgrad_jax as ng
from methods_table import row
from test_grouping import stacked_evidence, stacked_layer

sizes = range(250, 322, 8)
layers = ng.Layers(tuple(stacked_layer(f"layer{n}", (2,), n, n + 4) for n in sizes))
gradient = {f"layer{n}": {"kernel": np.ones((2, n, n + 4), np.float32)} for n in sizes}
evidence = {f"layer{n}": stacked_evidence((2,), n, n + 4) for n in sizes}
tx = row("kfac exact").scale_by(layers, damping=0.1, statistics_every=2, refresh_every=2)
state, update = jax.jit(tx.init)(gradient), jax.jit(tx.update, donate_argnums=1)
for _ in range(3):
    updates, state = update(gradient, state, curvature=evidence)
assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(updates)))
assert state.metrics.refreshes == 2 and state.metrics.rejected_refreshes == 0
print("done")
"""


@pytest.mark.full
def test_nine_batched_refreshes_of_different_shapes_inside_one_branch_do_not_hang():
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", DEADLOCK],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.strip() == "done", run.stderr
