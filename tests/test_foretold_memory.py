"""`layers.bytes(tx)` foretells the state of every method before anything is allocated."""

import jax
import optax
import pytest
from methods_table import ALL_NAMES, row, task

import natgrad_jax as ng


def real(state):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def optimizer(method, layers):
    return row(method).optimizer(0.1, layers, damping=0.1)


@pytest.mark.parametrize("method", ALL_NAMES)
def test_the_state_of_every_method_has_the_bytes_that_were_foretold(method):
    problem = task("convnet")
    tx, params = optimizer(method, problem.layers), problem.variables["params"]
    foretold = problem.layers.bytes(tx)
    state = jax.eval_shape(tx.init, params)
    assert abs(foretold - real(state)) <= 0.05 * real(state)
    assert real(state) > real(params)


@pytest.mark.parametrize("tx", ["chosen", "wrapped"])
def test_wrappers_and_steps_that_choose_themselves_are_foretold(tx):
    problem = task("mlp")
    params = problem.variables["params"]
    if tx == "chosen":
        tx = ng.kfac(layers=problem.layers)
    else:
        tx = optax.apply_if_finite(ng.kfac("quadratic", problem.layers, damping=ng.adaptive_damping()), 3)
    assert problem.layers.bytes(tx) == real(jax.eval_shape(tx.init, params))


@pytest.mark.full
def test_parameters_of_half_precision_are_foretold_from_their_shapes():
    problem = task("mlp bfloat16")
    tx, params = optimizer("mbf", problem.layers), problem.variables["params"]
    shapes = jax.eval_shape(lambda: params)
    assert problem.layers.bytes(tx, shapes) == real(tx.init(params))
    assert problem.layers.bytes(tx) > problem.layers.bytes(tx, shapes)  # a momentum in float32
