"""Laws that hold for every method of the table. Each has a negative control: a broken transformation that fails it."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
import tasks
from methods_table import (
    ALL_NAMES,
    NAMES,
    direction,
    evaluate,
    of_the_lifting,
    scanned,
    start,
    step,
    wrapped,
)
from tasks import TASKS, task

from natgrad_jax import addresses

both_frameworks = tasks.both_frameworks
pytestmark = pytest.mark.whole
every_method = pytest.mark.parametrize("method", NAMES)
lifting_method = of_the_lifting(NAMES)
every_optimizer = pytest.mark.parametrize("method", ALL_NAMES)
lifting_optimizer = of_the_lifting(ALL_NAMES)
few_optimizers = of_the_lifting(ALL_NAMES, table.FEW)
everywhere = pytest.mark.parametrize("where", ["mlp", *(pytest.param(n, marks=pytest.mark.full) for n in TASKS[1:])])
"""On the net of dense layers; with `-m full` on the convnet too."""
on_one_layer = pytest.mark.parametrize("where", ["dense", *(pytest.param(n, marks=pytest.mark.full) for n in TASKS)])
"""Of what is the same for each layer: on a single one; with `-m full` on the nets."""
ANY = NAMES[0]


def fails(law, *args, **kwargs):
    """The control: a broken transformation does not pass the law."""
    with pytest.raises((AssertionError, TypeError, ValueError)):
        law(*args, **kwargs)


def scaled(tx, factor):
    """The direction times `factor(count)`."""

    def update(inner, updates, state, params, **extra):
        found, new = inner(updates, state, params, **extra)
        return optax.tree.scale(factor(state.count), found), new

    return wrapped(tx, update)


def blockwise(problem, one, other):
    """Inner products of two trees, one for each block of the curvature; leading axes of the leaves stay."""
    one, other = addresses.flatten(one), addresses.flatten(other)
    dots = []
    for block in problem.layers.blocks:
        axes = [tuple(range(-len(leaf.shape), 0)) for leaf in block.leaves]
        pairs = [(one[leaf.address], other[leaf.address], ax) for leaf, ax in zip(block.leaves, axes, strict=True)]
        dots.append(sum(jnp.sum(jnp.float32(a) * b, axis=ax) for a, b, ax in pairs))
    return jnp.stack(dots, axis=-1)


# --- descent ----------------------------------------------------------------------------------------------------------


def descends(where, tx, statistics=5):
    """<gradient, direction> > 0 in every block, at ten steps of which five have no statistics and seven no refresh."""
    record = jax.tree.map(lambda *leaves: np.stack(leaves), *looped(tx, where).records)
    assert jnp.all(blockwise(task(where), record.grad, record.updates) > 0)
    assert record.metrics.statistics[-1] == statistics
    assert getattr(record.metrics, "refreshes", jnp.array([3]))[-1] == 3


@pytest.mark.slow
@everywhere
@every_optimizer
def test_every_direction_descends_also_between_refreshes(method, where):
    descends(where, direction(method, where), 5 if table.row(method).apart else 3)


@pytest.mark.slow
def test_a_direction_that_turns_round_between_refreshes_fails_the_law_of_descent():
    fails(descends, "dense", scaled(direction(ANY, "dense"), lambda count: jnp.where(count % 4 == 3, -1.0, 1.0)))


def is_positive_definite(where, tx):
    """Any gradient, not only that of the batch that was measured, is met by a direction of descent."""
    loop, rng = looped(tx, where), np.random.default_rng(0)
    carry = jax.tree.map(np.asarray, loop.carry)
    gradients = jax.tree.map(lambda leaf: np.float32(rng.normal(size=(50, *leaf.shape))), carry[0])
    found = []
    for n in range(50):
        params, state = jax.tree.map(np.copy, carry)
        gradient = jax.tree.map(lambda leaf, n=n: leaf[n], gradients)
        frozen = state._replace(count=np.int32(11))  # nothing is due
        found.append(loop.step((params, frozen), np.int32(11), (True, gradient))[1].updates)
    directions = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    assert jnp.all(blockwise(task(where), gradients, directions) > 0)


@pytest.mark.slow
@every_method
def test_every_method_is_positive_definite_to_gradients_that_it_has_not_seen(method):
    is_positive_definite("mlp", direction(method))


@pytest.mark.slow
def test_a_method_that_mixes_entries_is_not_positive_definite():
    def update(inner, updates, state, params, **extra):
        found, state = inner(updates, state, params, **extra)
        return jax.tree.map(lambda u: u[..., ::-1], found), state

    fails(is_positive_definite, "dense", wrapped(direction(ANY, "dense"), update))


# --- tracing, jit, scan, donation -------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """Ten jitted, donated steps.

    Attributes:
        step: the compiled step, of (params, state), its number, and (whether it is taken instead, a gradient).
        carry: the last (params, state).
        records: of the steps.
        traces: how often the step was traced.
    """

    step: Any
    carry: Any
    records: list[table.Record]
    traces: int


def looped(tx, where="mlp"):
    """Ten steps; they run once for all laws that ask for them."""
    return _looped(tx, where)


@table.kept
def _looped(tx, where):
    problem, traces, records = task(where), [], []

    @partial(jax.jit, donate_argnums=0)
    def jitted(carry, t, other):
        traces.append(t)
        return step(problem, tx, carry, t, other)

    carry, other = start(problem, tx), (False, jax.tree.map(np.zeros_like, problem.params))
    for t in range(10):
        carry, record = jitted(carry, np.int32(t), other)
        records.append(record)
    return Loop(jitted, carry, records, len(traces))


def traces_once(tx, where="mlp"):
    """The first step is traced, the nine that follow are not: nothing about the state changes but its values."""
    assert looped(tx, where).traces == 1


@pytest.mark.slow
@lifting_optimizer
def test_ten_steps_trace_once(method):
    traces_once(direction(method))


@pytest.mark.slow
def test_a_state_that_changes_its_dtype_is_traced_twice():
    def update(inner, updates, state, params, **extra):
        found, state = inner(updates, state, params, **extra)
        return found, state._replace(metrics=state.metrics._replace(damping=state.metrics.damping.astype(jnp.bfloat16)))

    fails(traces_once, wrapped(direction(ANY, "dense"), update), "dense")


def agrees_however_it_runs(tx, where="mlp"):
    """Jitted and donated, scanned, and eager steps make the same updates and the same counters."""
    _, (params, state), records, _ = looped(tx, where)
    (scan_params, scan_state), _ = scanned(where, tx)
    chex.assert_trees_all_close(scan_params, params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(scan_state.metrics, state.metrics)
    carry = start(task(where), tx)
    with jax.disable_jit():
        for t, expected in enumerate(records[:2]):
            carry, record = step(task(where), tx, carry, jnp.int32(t))
            chex.assert_trees_all_close(record, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@few_optimizers
def test_jit_scan_donation_and_eager_agree(method):
    agrees_however_it_runs(direction(method, "dense"), "dense")


@pytest.mark.slow
def test_a_transformation_with_a_memory_in_python_disagrees_with_itself():
    calls = itertools.count()
    fails(agrees_however_it_runs, scaled(direction(ANY, "dense"), lambda count: 1.0 + 0.1 * next(calls)), "dense")


def owns_its_buffers(where, tx):
    """No two arrays of the first state share memory, or donation would fail."""
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tx.init(task(where).params))]
    assert len(set(pointers)) == len(pointers)


@everywhere
@lifting_optimizer
def test_no_two_arrays_of_the_first_state_share_a_buffer(method, where):
    owns_its_buffers(where, direction(method, where))


def test_a_state_with_a_shared_zero_fails_the_law_of_buffers():
    def init(inner, params):
        state = inner(params)
        return state._replace(metrics=state.metrics._replace(refreshes=state.count))

    fails(owns_its_buffers, "mlp", wrapped(direction(ANY), init=init))


# --- cost of skipped statistics ---------------------------------------------------------------------------------------


def product_flops(jaxpr, choose):
    """Flops of the matrix products of a jaxpr; `choose` (min or max) says which branch of a cond counts."""
    total = 0
    for equation in jaxpr.eqns:
        inside = [product_flops(inner, choose) for inner in table.inner_jaxprs(equation)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod(lengths))
        elif equation.primitive.name == "cond":
            total += choose(inside)
        else:
            total += sum(inside) * equation.params.get("length", 1)
    return total


def plain(params, t):
    out = evaluate(task("mlp wide"), params, t)
    return out.value, out.grad


def skips_the_second_backward(tx, extra=0):
    """Outside of its branches, a step has the products of a plain gradient and of the application, and no more."""
    params, state = start(task("mlp wide"), tx)
    jaxpr = jax.make_jaxpr(partial(step, task("mlp wide"), tx))((params, state), 1).jaxpr
    skipped, measured = product_flops(jaxpr, min), product_flops(jaxpr, max)
    gradient = product_flops(jax.make_jaxpr(plain)(params, 1).jaxpr, min)
    assert skipped <= gradient + max(application(), extra)
    assert measured >= 1.5 * gradient


def application():
    """Flops of a change of basis on both sides and back, for all layers."""
    return sum(
        4 * (rows + columns) * rows * columns
        for rows, columns in (layer.shape for layer in task("mlp wide").layers.known)
    )


@pytest.mark.slow
@lifting_optimizer
def test_a_step_without_statistics_has_no_second_backward(method):
    skips_the_second_backward(direction(method, "mlp wide"), applying(method))


@pytest.mark.slow
def test_evidence_taken_outside_of_the_branch_fails_the_law_of_skipped_statistics():
    def update(inner, updates, state, params, curvature=None, **extra):
        return inner(updates, state, params, curvature=curvature(), **extra)

    fails(skips_the_second_backward, wrapped(direction(ANY, "mlp wide"), update))


def compiled_flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def applying(method):
    """Flops of what a method applies at every step that grow with the batch."""
    return table.row(method).application(task("mlp wide").layers, 1024)


def compiles_without_a_second_backward(tx, extra=0, due=2):
    """XLA's own count: at a step that is due for nothing, what is compiled is a gradient and little else."""
    params, state = start(task("mlp wide"), tx)

    def at(count, params, state):
        return step(task("mlp wide"), tx, (params, state._replace(count=jnp.int32(count))), count)

    gradient = compiled_flops(partial(plain, t=1), params)
    assert compiled_flops(partial(at, 1), params, state) < 1.1 * (gradient + extra)
    assert compiled_flops(partial(at, due), params, state) > 1.5 * (gradient + extra)


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, table.FEW[:1])
def test_the_compiled_step_without_statistics_costs_a_gradient(method):
    due = 2 if table.row(method).apart else 4
    compiles_without_a_second_backward(direction(method, "mlp wide"), applying(method), due)


@pytest.mark.slow
def test_statistics_at_every_step_fail_the_law_of_the_compiled_cost():
    fails(compiles_without_a_second_backward, direction(ANY, "mlp wide", statistics_every=1))


# --- scale and symmetry -----------------------------------------------------------------------------------------------


def tends_to_the_gradient(build, rate, power=1.0, where="mlp"):
    """damping^power * direction -> gradient, with 1 / damping (exact) or a root of it (factored damping); C54, C76."""
    problem = task(where)
    params = problem.params

    @jax.jit
    def distance(damping):
        tx = build(damping)
        out = evaluate(problem, params, 0)
        found, _ = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
        error = jax.tree.map(lambda u, g: damping**power * u - g, found, out.grad)
        return jnp.max(jnp.sqrt(blockwise(problem, error, error) / blockwise(problem, out.grad, out.grad)))

    near, far = distance(1e4), distance(1e6)
    assert far < {1 / 3: 0.3, 0.5: 6e-2, 1.0: 2e-4}[rate]
    assert far < 2 * 100**-rate * near + 1e-6


@pytest.mark.slow
@on_one_layer
@every_method
def test_large_damping_gives_the_gradient_over_the_damping(method, where):
    row = table.row(method)
    tends_to_the_gradient(lambda damping: table.build(method, where, damping=damping), row.rate, row.power, where)


@pytest.mark.slow
def test_a_layer_left_on_the_raw_gradient_fails_the_law_of_large_damping():
    def update(inner, updates, state, params, **extra):
        found, state = inner(updates, state, params, **extra)
        return {**found, "kernel": updates["kernel"]}, state

    fails(
        tends_to_the_gradient,
        lambda damping: wrapped(table.build(ANY, "dense", damping=damping), update),
        0.5,
        where="dense",
    )


@pytest.mark.slow
def test_factored_damping_does_not_have_the_rate_of_exact_damping():
    fails(tends_to_the_gradient, lambda damping: table.build("kfac pi", "dense", damping=damping), 1.0, where="dense")


def ignores_the_order_of_examples(tx, where="mlp true labels"):
    """The same examples in another order give the same update; C5.

    Sums in another order round otherwise, which a solve magnifies by the condition number of the damped block: to 2e-5
    of the largest entry on the families, in float32, and to 1e-14 in float64.
    """
    problem = task(where)
    params = problem.params

    @jax.jit
    def direction_for(order):
        out = problem.evaluate(problem.params, problem.x[0][order], problem.y[0][order])
        return tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0]

    forwards, backwards = jnp.arange(8), jnp.array([3, 7, 1, 0, 6, 2, 5, 4])
    one, other = direction_for(forwards), direction_for(backwards)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=5e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["dense", pytest.param("mlp true labels", marks=pytest.mark.full)])
@lifting_optimizer
def test_the_order_of_the_examples_does_not_matter(method, where):
    ignores_the_order_of_examples(direction(method, where), where)


@pytest.mark.slow
def test_examples_weighted_by_their_place_fail_the_law_of_permutation():
    def update(inner, updates, state, params, curvature=None, **extra):
        def weighted():
            return {
                name: evidence._replace(inputs=tuple(x * jnp.arange(8.0)[:, None] for x in evidence.inputs))
                for name, evidence in curvature().items()
            }

        return inner(updates, state, params, curvature=weighted, **extra)

    fails(ignores_the_order_of_examples, wrapped(direction(ANY, "dense"), update), "dense")
