"""Statistics and operators outside of a step: `observe`, `refresh`, checkpoints without operators."""

from functools import cache

import jax
import numpy as np
import optax
import pytest
from methods_table import NAMES, evaluate, lifted, measured, of_the_lifting, row, task

import natgrad_jax as ng

MADE_OF_STATISTICS = ("kfac pi", "kfac exact", "tkfac", "tnt", "mbf", "shampoo")
MEASURED = tuple(name for name in NAMES if name not in MADE_OF_STATISTICS)
SETTINGS = {"damping": 0.1, "statistics_every": 2, "refresh_every": 2}


@cache
def out(t=0):
    problem = task("convnet")
    return evaluate(problem, problem.variables["params"], t)


def params():
    return task("convnet").variables["params"]


def optimizer(method, **settings):
    return row(method).optimizer(0.05, task("convnet").layers, **{**SETTINGS, **settings})


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "wrap"),
    [("kfac pi", wrap) for wrap in ("chain", "partition", "masked", "injected", "clipped")] + [("tnt", "chain")],
)
def test_observe_moves_the_statistics_of_a_step_and_nothing_else(method, wrap):
    tx = optimizer(method)
    if wrap == "chain":
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx, optax.trace(0.5))
    elif wrap == "partition":
        tx = optax.partition({"ours": tx, "theirs": optax.adam(1e-3)}, _labels(params()))
    elif wrap == "masked":
        tx = optax.masked(tx, jax.tree.map(lambda label: label == "ours", _labels(params())))
    elif wrap == "injected":
        made = row(method).optimizer
        tx = optax.inject_hyperparams(lambda learning_rate: made(learning_rate, task("convnet").layers, **SETTINGS))(
            0.1
        )
    elif wrap == "clipped" and method != "tnt":
        tx = optimizer(method, kl_clip=1e-3)
    state = tx.init(params())
    gradient, evidence = measured("convnet")
    observed = ng.observe(tx, state, evidence, params())
    stepped = jax.jit(tx.update)(gradient, state, params(), curvature=evidence)[1] if wrap != "masked" else None
    ours, before = lifted(observed), lifted(state)
    assert ours.count == 0 and ours.metrics.statistics == 1 and ours.metrics.refreshes == 0
    assert same(ours.operators, before.operators)
    if method != "tengrad":
        assert not same(ours.statistics, before.statistics)
    if stepped is not None:
        np.testing.assert_allclose(*map(_flat, (ours.statistics, lifted(stepped).statistics)), rtol=1e-4, atol=1e-6)
    others = [jax.tree.leaves(node) for node in (observed, state)]
    moved = [not np.array_equal(a, b) for a, b in zip(*others, strict=True)]
    own = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, before)), strict=True)]
    assert sum(moved) == sum(own)


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)] or [np.zeros(1)])


def _labels(tree):
    """The convolutions are ours."""
    return {
        name: jax.tree.map(lambda _, name=name: "ours" if "Conv" in name else "theirs", sub)
        for name, sub in tree.items()
    }


@pytest.mark.full
def test_observe_weighs_the_old_statistics_as_it_is_told():
    tx = optimizer("kfac pi")
    first, second = (measured("convnet", t)[1] for t in (0, 1))
    state = ng.observe(tx, tx.init(params()), first)
    mean = lambda state: lifted(state).statistics["Dense_0"].inputs  # noqa: E731
    once = ng.observe(tx, state, second, decay=0.0)
    np.testing.assert_allclose(
        mean(once).total, mean(ng.observe(tx, tx.init(params()), second, decay=0.0)).total, rtol=1e-6
    )
    half = ng.observe(tx, state, second, decay=0.5)
    np.testing.assert_allclose(mean(half).total, 0.5 * mean(state).total + 0.5 * mean(once).total, rtol=1e-5)


@pytest.mark.full
def test_observe_through_multi_steps_is_refused_with_the_remedy():
    tx = optax.MultiSteps(optimizer("kfac pi"), 2)
    with pytest.raises(ValueError, match="microbatches=k"):
        ng.observe(tx, tx.init(params()), out(), params())


@pytest.mark.slow
@of_the_lifting(MADE_OF_STATISTICS)
def test_a_checkpoint_without_operators_goes_on_bit_for_bit(method):
    tx = optimizer(method)
    state, theta = tx.init(params()), params()
    update = jax.jit(lambda grad, state, theta, evidence: tx.update(grad, state, theta, curvature=evidence))
    measure = jax.jit(lambda theta, t: _known(evaluate(task("convnet"), theta, t)))
    for t in range(3):
        gradient, evidence = measure(theta, t)
        updates, state = update(gradient, state, theta, evidence)
        theta = optax.apply_updates(theta, updates)
    light = ng.without_operators(state)
    assert _bytes(light) < 0.7 * _bytes(state)
    rebuilt = ng.refresh(tx, light)
    assert same(lifted(rebuilt).operators, lifted(state).operators)
    gradient, evidence = measure(theta, 3)
    one, two = (update(gradient, each, theta, evidence)[0] for each in (state, rebuilt))
    assert same(one, two)
    other = ng.refresh(tx, ng.without_operators(ng.observe(tx, state, measured("convnet", 2)[1])))
    assert not same(lifted(other).operators, lifted(state).operators)  # statistics have moved since the refresh


def _known(here):
    return here.grad, here.curvature()


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.full
@of_the_lifting(MEASURED)
def test_operators_that_a_batch_measured_want_one(method):
    tx = optimizer(method)
    state = tx.init(params())
    gradient, evidence = measured("convnet")
    light = ng.without_operators(ng.observe(tx, state, evidence))
    with pytest.raises(ValueError, match=r"keep the operators in the checkpoint, or give a batch"):
        ng.refresh(tx, light)
    fresh = ng.refresh(tx, light, evidence)
    updates, _ = jax.jit(tx.update)(gradient, fresh, params(), curvature=evidence)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    assert not same(lifted(fresh).operators, lifted(state).operators)


def test_what_was_learned_from_steps_cannot_be_made_again():
    problem = task("mlp true labels")
    tx = ng.kbfgs(0.1, problem.layers)
    state = tx.init(problem.variables["params"])
    with pytest.raises(ValueError, match="learned from the steps"):
        ng.refresh(tx, state)


def test_a_part_that_needs_the_structure_of_the_parameters_says_so():
    tx = optax.chain(optax.trace(0.9), ng.scale_by_kfac(task("convnet").layers, damping=0.1))
    state = tx.init(params())
    with pytest.raises((ValueError, TypeError)) as caught:
        ng.refresh(tx, state)
    assert "pass `params`" in "".join(caught.value.__notes__)
    assert lifted(ng.refresh(tx, state, params=params())).metrics.refreshes == 1


def test_a_state_without_a_method_of_ours_is_refused():
    tx = optax.adam(1e-3)
    for function in (
        lambda state: ng.observe(tx, state, out()),
        ng.without_operators,
        lambda state: ng.refresh(tx, state),
    ):
        with pytest.raises(ValueError, match="holds no natural-gradient method"):
            function(tx.init(params()))


def test_a_direction_of_the_empirical_fisher_refuses_sampled_evidence_also_when_it_is_asked_to_refresh():
    problem = task("mlp")
    tx = ng.scale_by_tengrad(problem.layers, damping=0.1, target="ief", refresh_every=1)
    params = problem.variables["params"]
    state, sampled = tx.init(params), evaluate(problem, params, 0)
    assert sampled.curvature.labels != "true"
    with pytest.raises(ValueError, match=r"labels='.*'; capture with"):
        ng.refresh(tx, state, sampled)
