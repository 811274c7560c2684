"""Warm starts of methods that need shapes and a gradient: from curvature, evidence or gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_differs, assert_equal, normal
from tensors import moments
from test_tensors import AT_ONCE, GRADIENT, dense

import natgrad_jax as ng


@cache
def stream():
    """What the capture returns for three batches of a dense layer."""
    net, keys = dense(), jax.random.split(jax.random.key(0), 3)
    batches = zip((normal(4, 4, seed=t) for t in range(3)), keys, strict=True)
    return [net.capture.value_and_grad({"params": net.params}, x, jnp.arange(4) % 3, key=key) for x, key in batches]


def warm(tx, items, params=None):
    """The H_i of the kernel after a pass."""
    state = ng.warm_start(tx, tx.init(dense().params), items, params)
    assert (state.count, state.metrics.statistics) == (0, len(items))
    return state.statistics["layer_b/kernel"]


def mean_of(factors):
    """The H_i that an average holds."""
    return [np.asarray(total) / np.asarray(factors.weight) for total in factors.total]


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("known", [True, False], ids=["layers", "no layers"])
@pytest.mark.parametrize("gives", ["outs", "curvatures", "evidence"])
def test_a_warm_start_takes_the_curvature_however_the_stream_gives_it(gives, known):
    outs, params = stream(), None if gives == "outs" else dense().params
    tx = ng.scale_by_tnt(dense().layers if known else None, **AT_ONCE)
    if gives == "evidence" and not known:
        with pytest.raises(TypeError, match="which does not say what layers it is of"):
            warm(tx, [out.curvature() for out in outs], params)
        return
    of = {"outs": lambda out: out, "curvatures": lambda out: out.curvature, "evidence": lambda out: out.curvature()}
    found = mean_of(warm(tx, [of[gives](out) for out in outs], params))
    draws = np.concatenate([out.curvature()["layer_b"].gradient["kernel"] for out in outs]) / 2  # of W = 4
    for ours, theirs in zip(found, moments(draws), strict=True):
        assert_equal(ours, theirs)
        assert_differs(ours, theirs / 4)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gives", ["outs", "gradients"])
def test_a_warm_start_of_statistics_of_the_gradient_takes_gradients(gives):
    outs = stream()
    found = mean_of(warm(GRADIENT, outs if gives == "outs" else [out.grad for out in outs]))
    gradients = np.stack([out.grad["layer_b"]["kernel"] for out in outs])
    for ours, theirs, of_the_last in zip(found, moments(gradients), moments(gradients[-1:]), strict=True):
        assert_equal(ours, theirs)
        assert_differs(ours, of_the_last)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_warm_start_from_what_the_statistics_are_not_of_is_refused_with_the_remedy():
    net, params = dense(), dense().params

    @jax.jit
    def measure(params):
        out = net.capture.value_and_grad({"params": params}, normal(4, 4), jnp.arange(4) % 3, key=jax.random.key(0))
        return out.grad, out.curvature()

    gradient, evidence = measure(params)
    with pytest.raises(ValueError, match=r"statistics are of the gradient.*evidence alone.*`capture.value_and_grad`"):
        ng.warm_start(GRADIENT, GRADIENT.init(params), [evidence], params)
    tx = ng.scale_by_tnt(dense().layers, **AT_ONCE)
    with pytest.raises(ValueError, match="`curvature` is missing"):
        ng.warm_start(tx, tx.init(params), [gradient])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_c17_the_first_step_after_a_warm_start_leaves_the_statistics_as_they_are():
    settings = {"damping": 0.1, "statistics": "gradient", "statistics_every": 2, "refresh_every": 4}
    gradient = {"w": normal(4, 3)}

    def calendar(early, is_warm):
        tx = ng.scale_by_tnt(**settings, early_refresh=early)
        state = tx.init(gradient)
        state = ng.warm_start(tx, state, [{"w": normal(4, 3, seed=1)}]) if is_warm else state
        start, metrics, kept = state.metrics, [], []

        @jax.jit
        def step(state):
            return tx.update(gradient, state)[1]

        for _ in range(9):
            former, state = state, step(state)
            same = jax.tree.map(jnp.array_equal, former.statistics["w"], state.statistics["w"])
            kept.append(all(jax.tree.leaves(same)))
            metrics.append((int(state.metrics.statistics - start.statistics), int(state.metrics.refreshes)))
        return metrics, kept

    for early, refreshes in ((True, (1, 1, 2, 2, 3, 3, 3, 3, 4)), (False, (1, 1, 1, 1, 2, 2, 2, 2, 3))):
        metrics, kept = calendar(early, True)
        assert metrics == list(zip((0, 0, 1, 1, 2, 2, 3, 3, 4), refreshes, strict=True))
        assert kept == [step == 0 or step % 2 == 1 for step in range(9)]
    metrics, kept = calendar(True, False)
    assert [statistics for statistics, _ in metrics] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert kept == [step % 2 == 1 for step in range(9)]
