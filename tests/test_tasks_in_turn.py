"""Tasks that take turns: a layer that a batch does not use keeps its statistics, or the method says that it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_differs, normal

import natgrad_jax as ng
from natgrad_jax.algebra import averages

pytestmark = pytest.mark.usefixtures("x64")
N = 6


def apply(params, x, task):
    h = jnp.tanh(x @ params["torso"])
    heads = {name: h @ params[f"head_{name}"] for name in "ab"}
    return heads[task] if task in heads else heads["a"] + heads["b"]


CAPTURE = ng.capture(apply, ng.losses.squared_error, labels="true")


def parameters():
    return {"torso": normal(3, 4), "head_a": normal(4, 2, seed=1), "head_b": normal(4, 2, seed=2)}


def layers_of(task):
    return CAPTURE.layers(parameters(), normal(N, 3, seed=3), task=task)


def evaluated(task):
    return CAPTURE.value_and_grad(parameters(), normal(N, 3, seed=3), normal(N, 2, seed=4), task=task)


def steps(tx, tasks):
    """The states after some batches."""

    def step(state, task):
        out = evaluated(task)
        return tx.update(out.grad, state, parameters(), curvature=out.curvature)

    updates, states = None, [tx.init(parameters())]
    for task in tasks:
        updates, state = jax.jit(step, static_argnames="task")(states[-1], task=task)
        states.append(state)
    return updates, states


@pytest.mark.full
@pytest.mark.parametrize("make", [ng.scale_by_kfac, ng.scale_by_ekfac, ng.scale_by_tengrad])
def test_a_head_whose_turn_it_is_not_stays_where_it_is(make):
    layers = layers_of("both")
    settings = {} if make is ng.scale_by_tengrad else {"statistics_every": 1}
    updates, states = steps(make(layers, damping=0.1, refresh_every=1, **settings), "aba")
    mine, others = [
        [jax.tree.leaves((s.statistics[name], s.operators[name].value)) for s in states[1:]]
        for name in ("head_b", "head_a")
    ]
    assert not np.any(updates["head_b"]) and np.any(updates["head_a"]) and np.any(updates["torso"])
    jax.tree.map(np.testing.assert_array_equal, mine[1], mine[2])  # after its turn, and after that of the other
    jax.tree.map(np.testing.assert_array_equal, others[0], others[1])
    assert any(np.any(one != other) for one, other in zip(mine[0], mine[1], strict=True))
    assert int(states[-1].metrics.rejected_statistics) == int(states[-1].metrics.rejected_refreshes) == 0


def test_layers_of_one_task_serve_the_batches_of_another():
    layers = layers_of("a")
    (unseen,) = layers.rest
    assert unseen.name == "head_b" and "likelihood does not see" in unseen.note
    updates, states = steps(ng.scale_by_kfac(layers, damping=0.1, statistics_every=1, refresh_every=1), "ab")
    (before, after) = (averages.mean(state.statistics["head_b"]) for state in states[1:])
    assert not np.any(before) and np.all(after > 0)
    grad = evaluated("b").grad["head_b"]
    np.testing.assert_allclose(updates["head_b"], grad / (N * grad**2 + 0.1))
    assert_differs(updates["head_b"], grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [lambda layers: ng.kbfgs(0.1, layers), lambda layers: ng.scale_by_tnt(layers, damping=0.1, statistics="curvature")],
    ids=["kbfgs", "tnt"],
)
def test_a_method_that_needs_all_layers_at_every_step_says_so(make):
    tx = make(layers_of("both"))
    out = evaluated("a")
    with pytest.raises(ValueError, match=r"does not use the layers \['head_b'\].*optax\.partition"):
        tx.update(out.grad, tx.init(parameters()), parameters(), curvature=out.curvature)


@pytest.mark.full
def test_evidence_of_another_model_is_refused_as_before():
    out = evaluated("a")
    tx = ng.scale_by_kfac(layers_of("both"), damping=0.1, statistics_every=1)
    with pytest.raises(ValueError, match=r"evidence for 'head_b'.*Capture the model"):
        tx.update(
            out.grad, tx.init(parameters()), parameters(), curvature=out.curvature()
        )  # a mapping does not say what was used
