"""Laws of the methods that need shapes and a gradient, given nothing else: no layers, no curvature."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import methods_table as table
import optax
import pytest
import test_laws as laws
import test_laws_of_state as state_laws
from methods_table import measured, wrapped
from tasks import TASKS, task

import natgrad_jax as ng

METHODS = {
    "tnt": ng.scale_by_tnt,
    "mbf": ng.scale_by_mbf,
    "shampoo": ng.scale_by_shampoo,
    "soap": ng.scale_by_soap,
}
every_method = pytest.mark.parametrize("method", METHODS)
everywhere = pytest.mark.parametrize("where", TASKS)


@cache
def direction(method, where="mlp"):
    """Without layers; `where` only tells compiled transformations apart."""
    del where
    return METHODS[method](statistics="gradient", **table.SETTINGS)


@pytest.mark.slow
@every_method
def test_every_direction_descends_also_between_refreshes(method):
    laws.descends("convnet", direction(method, "convnet"))


@pytest.mark.slow
@every_method
def test_ten_steps_trace_once(method):
    laws.traces_once(direction(method, "convnet"), "convnet")


@pytest.mark.full
@everywhere
@every_method
def test_types_buffers_and_the_contract_of_optax_are_kept(method, where):
    tx = direction(method, where)
    laws.owns_its_buffers(where, tx)
    state_laws.keeps_types(where, tx)
    state_laws.swallows_unknown_keywords(direction(method))
    state_laws.needs_no_parameters(direction(method))


@pytest.mark.slow
@every_method
def test_the_curvature_is_not_asked_even_if_it_is_there(method):
    def curvature():
        raise AssertionError("was called")

    tx, gradient = direction(method), task("mlp").params
    given = jax.make_jaxpr(lambda gradient, state: tx.update(gradient, state, curvature=curvature))
    state = jax.eval_shape(tx.init, gradient)
    assert str(given(gradient, state)) == str(jax.make_jaxpr(tx.update)(gradient, state))


def test_a_method_of_the_curvature_does_ask_for_it():
    def curvature():
        raise AssertionError("was called")

    gradient, _ = measured("mlp")
    tx = ng.scale_by_tnt(task("mlp").layers, **table.SETTINGS)
    with pytest.raises(AssertionError, match="was called"):
        tx.update(gradient, tx.init(gradient), curvature=curvature)


def survives_a_poisoned_gradient(tx):
    """A gradient that is not finite leaves what was learned as it was, and is counted; the next step is fine."""
    gradient, _ = measured("mlp")
    update = jax.jit(tx.update)
    _, good = update(gradient, tx.init(gradient))
    _, bad = update(state_laws.poison(gradient), good._replace(count=jnp.int32(4)))  # where all is due
    chex.assert_trees_all_close(table.contents(bad), table.contents(good), rtol=1e-4, atol=1e-6)
    assert bad.metrics.rejected_statistics == sum(map(state_laws.copies_in, good.statistics.values()))
    updates, _ = update(gradient, bad)
    assert jnp.all(laws.blockwise(task("mlp"), gradient, updates) > 0)


@pytest.mark.full
@every_method
def test_a_gradient_that_is_not_finite_leaves_the_previous_factors_and_is_counted(method):
    survives_a_poisoned_gradient(direction(method))


@pytest.mark.full
def test_a_method_without_a_guard_does_not_survive():
    def update(inner, updates, state, params, **extra):
        found, state = inner(updates, state, params, **extra)
        seen = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates))
        return found, state._replace(statistics=jax.tree.map(lambda leaf: leaf + 0 * seen, state.statistics))

    laws.fails(survives_a_poisoned_gradient, wrapped(direction("shampoo"), update))


@pytest.mark.full
@every_method
def test_a_parameter_that_another_optimizer_takes_is_left_alone(method):
    gradient, _ = measured("mlp")
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "bias" if path[-1].key == "bias" else "kernel", gradient)
    tx = optax.partition({"bias": optax.sgd(1.0), "kernel": direction(method)}, labels)
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    alone, _ = jax.jit(direction(method).update)(gradient, direction(method).init(gradient))
    for name in gradient:
        chex.assert_trees_all_close(updates[name]["bias"], -gradient[name]["bias"])
        chex.assert_trees_all_close(updates[name]["kernel"], alone[name]["kernel"], rtol=1e-4, atol=1e-6)
    assert set(table.lifted(state).operators) == {f"{name}/kernel" for name in gradient}
