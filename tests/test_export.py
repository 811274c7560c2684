"""A training step is exported once, with a symbolic number of examples, and trains at any."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from bases import without_choice
from jax import export
from methods_table import ALL_NAMES, build, lifted, task

import natgrad_jax as ng

SIZES = (8, 5)


def exported(tx, problem, constraints=(), size="n"):
    """A step on leaves, seed and batch: jitted, and exported and read back from bytes, and the first leaves."""
    pytest.importorskip("flatbuffers")
    leaves, structure = jax.tree.flatten((problem.variables["params"], tx.init(problem.variables["params"])))

    @jax.jit
    def step(leaves, x, y, seed):
        params, state = jax.tree.unflatten(structure, leaves)
        variables = {**problem.variables, "params": params}
        out = problem.capture.value_and_grad(variables, x, y, key=jax.random.key(seed))
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return jax.tree.leaves((optax.apply_updates(params, updates), state))

    (many,) = export.symbolic_shape(size, constraints=constraints)
    like = jax.ShapeDtypeStruct
    x, y = (like((many, *leaf.shape[2:]), leaf.dtype) for leaf in (problem.x, problem.y))
    shapes = [like(leaf.shape, leaf.dtype) for leaf in leaves]
    packed = export.export(step)(shapes, x, y, like((), jnp.uint32)).serialize()
    return step, export.deserialize(packed).call, leaves, structure


def assert_same(step, again, leaves, structure, problem, sizes=SIZES):
    for size in sizes:
        here = there = leaves
        for t in range(2):
            batch = problem.x[t, :size], problem.y[t, :size], jnp.uint32(t)
            here, there = step(here, *batch), again(there, *batch)
        both = (jax.tree.leaves(without_choice(jax.tree.unflatten(structure, each))) for each in (here, there))
        for one, other in zip(*both, strict=True):
            assert jnp.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


STANDS_FOR_ALL = "kfac pi"
METHODS = [
    (STANDS_FOR_ALL, "dense"),
    *(pytest.param(STANDS_FOR_ALL, where, marks=pytest.mark.full) for where in ("mlp", "convnet")),
    *(pytest.param(n, "mlp", marks=pytest.mark.full) for n in ALL_NAMES if n not in ("tengrad", STANDS_FOR_ALL)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "where"), METHODS)
def test_an_exported_step_trains_at_any_batch_size(method, where):
    problem = task(where)
    tx = optax.chain(build(method, where), optax.scale(-0.02))
    step, again, leaves, structure = exported(tx, problem)
    assert_same(step, again, leaves, structure, problem)
    _, state = jax.tree.unflatten(structure, again(leaves, problem.x[0], problem.y[0], jnp.uint32(0)))
    assert lifted(state).count == 1


@pytest.mark.full
def test_tengrad_is_exported_for_at_most_as_many_examples_as_it_has_room_for():
    problem = task("mlp")
    tx = optax.chain(build("tengrad"), optax.scale(-0.02))
    step, again, leaves, structure = exported(tx, problem, constraints=("n<=8",))
    assert_same(step, again, leaves, structure, problem)


@pytest.mark.full
@pytest.mark.parametrize("how", ["pieces", "controlled", "chosen"])
def test_a_batch_in_pieces_and_steps_that_choose_themselves_are_exported(how):
    problem = task("mlp")
    if how == "pieces":
        capture = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, microbatches=2)
        problem = problem._replace(capture=capture)
    rule = {"damping": ng.adaptive_damping(), "momentum": "quadratic"}
    make = {
        "pieces": partial(ng.kfac, 0.02, damping=0.1),
        "controlled": partial(ng.kfac, "quadratic", **rule),
        "chosen": partial(ng.kfac, None),
    }[how]
    step, again, leaves, structure = exported(make(problem.layers), problem, size="2*n" if how == "pieces" else "n")
    assert_same(step, again, leaves, structure, problem, (8, 4))


@pytest.mark.full
@pytest.mark.parametrize("method", ["kfac pi", "ekfac per_example", "soap"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_step_is_exported_for_a_platform_that_is_not_here(platform, method):
    problem, tx = task("dense"), build(method, "dense")
    params = problem.variables["params"]

    @jax.jit
    def step(params, state, x, y, seed):
        out = problem.capture.value_and_grad({"params": params}, x, y, key=jax.random.key(seed))
        return tx.update(out.grad, state, params, curvature=out.curvature)

    shapes = jax.eval_shape(lambda: (params, tx.init(params), problem.x[0], problem.y[0], jnp.uint32(0)))
    found = export.export(step, platforms=[platform])(*shapes)
    assert found.platforms == (platform,) and len(found.out_avals) == len(jax.tree.leaves(shapes[:2]))
