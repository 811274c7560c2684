"""What keeps the program of a step small: a branch hands through what it changes, and vectors are done as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_table import inner_jaxprs, measured, task

from natgrad_jax.algebra import trees
from natgrad_jax.lift.guards import finite, finite_each
from natgrad_jax.methods.ekfac import EKFAC
from natgrad_jax.methods.kfac import KFAC

PERIODS = {"damping": 0.1, "statistics_every": 2, "refresh_every": 6}


def branches(jaxpr):
    """All `cond` equations of a program."""
    here = [each for each in jaxpr.eqns if each.primitive.name == "cond"]
    return here + [one for each in jaxpr.eqns for inner in inner_jaxprs(each) for one in branches(inner)]


@pytest.mark.parametrize("settings", [KFAC(**PERIODS), EKFAC(**PERIODS)], ids=["kfac", "ekfac"])
def test_no_branch_gives_back_what_it_was_given(settings):
    tx, (gradient, evidence) = settings.lifted(task("mlp").layers), measured("mlp", 0)
    state = jax.eval_shape(tx.init, gradient)
    program = jax.make_jaxpr(lambda state: tx.update(gradient, state, curvature=evidence))(state)
    found = branches(program.jaxpr)
    assert found
    for cond in found:
        changed = zip(*(branch.jaxpr.outvars for branch in cond.params["branches"]), strict=True)
        given = [list(map(id, branch.jaxpr.invars)) for branch in cond.params["branches"]]
        through = [
            place
            for place, outs in enumerate(changed)
            if all(id(out) in own for out, own in zip(outs, given, strict=True))
            and len({own.index(id(out)) for out, own in zip(outs, given, strict=True)}) == 1
        ]
        assert not through


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_entry_that_is_not_finite_is_seen_wherever_it_stands(bad):
    clean = {
        "a": ({"matrix": jnp.ones((3, 3)), "long": jnp.ones(5), "count": jnp.zeros((), jnp.int32)}, 0),
        "b": ({"short": jnp.full(2, 1e38), "number": jnp.ones(())}, 0),
        "c": ({"stack": jnp.ones((2, 3)), "empty": jnp.zeros((2, 0))}, 1),
    }
    assert {name: np.all(good) for name, good in finite_each(clean).items()} == dict.fromkeys(clean, True)
    for name, leaf, place in (("a", "matrix", (0, 2)), ("a", "long", (4,)), ("b", "short", (0,)), ("b", "number", ())):
        state, axes = clean[name]
        spoilt = clean | {name: (state | {leaf: state[leaf].at[place].set(bad)}, axes)}
        good = finite_each(spoilt)
        assert {one: bool(np.all(good[one])) for one in clean} == {one: one != name for one in clean}
        assert not finite(spoilt[name][0], 0)
    (state, axes), stack = clean["c"], jnp.ones((2, 3)).at[1, 0].set(bad)
    assert np.array_equal(finite_each({"c": (state | {"stack": stack}, axes)})["c"], [True, False])


@pytest.mark.full
def test_a_product_of_trees_is_that_of_all_their_entries():
    keys = jax.random.split(jax.random.key(0), 8)
    shapes = ((3, 2), (4,), (), (2, 2, 2))
    one, other = (
        [jax.random.normal(key, shape) for key, shape in zip(part, shapes, strict=True)]
        for part in (keys[:4], keys[4:])
    )
    one[1], other[1] = one[1].astype(jnp.bfloat16), other[1].astype(jnp.bfloat16)
    flat = [np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in tree]) for tree in (one, other)]
    assert trees.dot(one, other) == pytest.approx(flat[0] @ flat[1], rel=1e-6)
    assert trees.dot([], []) == 0
