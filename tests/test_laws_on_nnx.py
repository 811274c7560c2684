"""The laws hold for NNX as for linen: twins are watched alike, and what a method does with that is the same program.

`-m full` runs the tables of laws themselves on tasks of NNX (`tasks.both_frameworks`); here they run for one method of
layers and one of tensors.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws as laws
import test_laws_of_state as state_laws
from flax import nnx
from methods_table import ALL_NAMES, METHODS, build, measured, of_the_lifting, row, trained
from reference import normal
from tasks import ALL_TASKS, FRAMEWORKS, on, task

import natgrad_jax as ng
from natgrad_jax.watch import traced

SUITE = ("mlp", "convnet", "dense")
"""Nets of the suite; the others differ in dtype, labels or size."""
LAWFUL = ("kfac pi", "tnt")


def of_both(function):
    """What a function without arguments says with linen on, and with NNX."""
    found = []
    for framework in FRAMEWORKS:
        with on(framework):
            found.append(function())
    return found


def numbers(tree):
    """The arrays of a tree of either framework, in one order."""
    return jax.tree.leaves(tree)


# --- proof by twins ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=() if name in SUITE else pytest.mark.full) for name in ALL_TASKS]
)
def test_twins_have_the_same_layers_the_same_report_and_the_same_evidence_bit_for_bit(where):
    one, other = of_both(lambda: task(where))
    assert one.layers == other.layers and str(one.layers) == str(other.layers)
    (grad, evidence), (nnx_grad, nnx_evidence) = of_both(lambda: measured(where))
    assert isinstance(nnx_grad, nnx.State) and not isinstance(grad, nnx.State)
    chex.assert_trees_all_equal(evidence, nnx_evidence)
    chex.assert_trees_all_equal(numbers(grad), numbers(nnx_grad))


def test_twins_of_other_numbers_have_other_evidence():
    with on("nnx"):
        problem = task("mlp")
        moved = jax.tree.map(lambda leaf: leaf + 1e-3, problem.params)
        found = problem.evaluate(moved, problem.x[0], problem.y[0], key=jax.random.key(3)).curvature()
        _, evidence = measured("mlp")
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(found, evidence, rtol=1e-6)


def program(method, where):
    """What an update does, as text: of a gradient, a state, parameters and evidence."""
    grad, evidence = measured(where)
    tx = build(method, where)
    state = jax.eval_shape(tx.init, grad)
    update = jax.make_jaxpr(lambda grad, state, evidence: tx.update(grad, state, grad, curvature=evidence))
    return str(update(grad, state, evidence))


@pytest.mark.slow
@pytest.mark.parametrize("method", [row.name for row in METHODS])
def test_an_update_is_the_same_program_in_both_frameworks(method):
    one, other = of_both(lambda: program(method, "convnet"))
    assert one == other


@pytest.mark.slow
def test_another_setting_is_another_program():
    with on("nnx"):
        one, other = program("kfac pi", "convnet"), program("kfac exact", "convnet")
    assert one != other


@pytest.mark.full
@pytest.mark.parametrize("method", ["kbfgs", *[pytest.param(n, marks=pytest.mark.full) for n in ALL_NAMES[:-1]]])
def test_complete_optimizers_train_alike(method):
    """K-BFGS measures again at the end of its step, so that its program has the model in it."""
    settings = {"kl_clip": None, "refresh_every": 5, "statistics_every": 1} | row(method).learning

    def train():
        problem = task("mlp")
        state, losses = trained(problem, row(method).optimizer(layers=problem.layers, **settings), steps=6)
        return losses, numbers(state)

    one, other = of_both(train)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    chex.assert_trees_all_close(one[1], other[1], rtol=1e-3, atol=1e-4)


# --- the laws themselves ----------------------------------------------------------------------------------------------


@pytest.fixture
def of_nnx():
    """Tasks of NNX."""
    with on("nnx"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("of_nnx")
@pytest.mark.full  # the update is the same program, see above
@pytest.mark.parametrize("method", LAWFUL)
def test_steps_trace_once_and_agree_however_they_run_and_descend(method):
    laws.traces_once(laws.direction(method))
    laws.agrees_however_it_runs(laws.direction(method))
    laws.descends("mlp", laws.direction(method, "mlp"))


@pytest.mark.full
@pytest.mark.usefixtures("of_nnx")
@pytest.mark.parametrize("where", ["convnet", pytest.param("mlp bfloat16", marks=pytest.mark.full)])
@of_the_lifting(ALL_NAMES)
def test_shapes_types_buffers_and_the_contract_of_optax_are_kept(method, where):
    tx = laws.direction(method, where)
    laws.owns_its_buffers(where, tx)
    if method in [row.name for row in METHODS]:
        state_laws.keeps_types(where, tx)
        state_laws.swallows_unknown_keywords(laws.direction(method))
        state_laws.needs_no_parameters(laws.direction(method))


@pytest.mark.full
@pytest.mark.usefixtures("of_nnx")
@pytest.mark.parametrize("method", [pytest.param(LAWFUL[0], marks=pytest.mark.full), LAWFUL[1]])
def test_a_batch_that_is_not_finite_leaves_the_previous_factors(method):
    state_laws.survives_poison("convnet", laws.direction(method, "convnet", statistics_every=1, refresh_every=1))


@pytest.mark.full
@pytest.mark.usefixtures("of_nnx")
def test_a_step_without_statistics_has_no_second_backward():
    laws.skips_the_second_backward(laws.direction("kfac pi", "mlp wide"))


@pytest.mark.full
@pytest.mark.usefixtures("of_nnx")
def test_broken_transformations_fail_the_laws_here_too():
    laws.test_a_state_with_a_shared_zero_fails_the_law_of_buffers()
    state_laws.test_half_precision_in_the_state_or_double_in_the_updates_fails_the_law_of_types("state")
    state_laws.test_a_strict_signature_fails_the_law_of_keywords()


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.verified
def test_verification_says_the_same_of_both():
    def told():  # the captures of tasks do not verify
        problem, loss = task("convnet"), ng.losses.softmax_cross_entropy
        if problem.graph is None:
            return ng.linen.capture(problem.capture.model, loss).layers(problem.variables, problem.x[0])
        model = nnx.merge(problem.graph, problem.params, problem.variables["rest"], copy=True)
        return ng.nnx.capture(model, loss).layers(model, problem.x[0])

    one, other = of_both(told)
    assert one == other and one.mixed == other.mixed == ("Conv_0",) and str(one) == str(other)


@pytest.mark.slow
@pytest.mark.verified
def test_verification_finds_a_use_that_was_overlooked(monkeypatch):
    def blind(*args):
        found = follow(*args)
        return found._replace(products=(found.products[0], *found.products[2:]))

    class Twice(nnx.Module):
        def __init__(self):
            self.w, self.v = (nnx.Param(normal(4, n, seed=n, dtype="float32")) for n in (4, 2))

        def __call__(self, x):
            return jnp.tanh(x @ self.w) @ self.w @ self.v

    follow = traced.follow
    monkeypatch.setattr(traced, "follow", blind)
    capture = ng.nnx.capture(Twice, ng.losses.squared_error)
    with pytest.warns(UserWarning, match="do not explain"):
        layers = capture.layers(Twice(), normal(6, 4, dtype="float32"))
    assert list(layers) == ["v"] and "explain its gradient" in layers.rest[0].note
