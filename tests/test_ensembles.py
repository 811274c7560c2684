"""C7 for ensembles: `vmap` over members is the loop over members, and what none of them needs is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bases import without_choice
from methods_table import ALL_NAMES, build, evaluate, inner_jaxprs, of_the_lifting, start, task

import natgrad_jax as ng
from natgrad_jax.algebra.branches import chosen, either, when

MEMBERS, STEPS = 3, 8


class Counted:
    """A curvature that tells the host whenever it is computed, or measures the loss elsewhere."""

    def __init__(self, curvature, computed, tested):
        self._curvature, self._computed, self._tested = curvature, computed, tested

    def __getattr__(self, name):
        return getattr(self._curvature, name)

    def __call__(self, params=None):
        jax.debug.callback(lambda: self._computed.append(1))
        return self._curvature(params)

    def value(self, params=None):
        if params is not None:
            jax.debug.callback(lambda: self._tested.append(1))
        return self._curvature.value(params)

    def value_and_slope(self, params, direction):
        jax.debug.callback(lambda: self._tested.append(1))
        return self._curvature.value_and_slope(params, direction)


def older(state, offset):
    """The state as if some steps more were done."""

    def is_ours(node):
        return isinstance(node, ng.NaturalGradientState)

    return jax.tree.map(
        lambda node: node._replace(count=node.count + offset) if is_ours(node) else node, state, is_leaf=is_ours
    )


def compared(tx, problem, offsets=(0, 0, 0)):
    """Members one after another and under `vmap`: both results, and how often the curvature was computed in each."""
    computed, tested = [], []

    def train(member, offset):
        params, state = start(problem, tx)

        def step(carry, t):
            params, state = carry
            out = evaluate(problem, params, t + 5 * member)
            curvature = Counted(out.curvature, computed, tested)
            updates, state = tx.update(out.grad, state, params, curvature=curvature)
            return (optax.apply_updates(params, updates), state), out.value

        return jax.lax.scan(step, (params, older(state, offset)), jnp.arange(STEPS))

    def counts():
        jax.effects_barrier()
        found = len(computed), len(tested)
        computed.clear(), tested.clear()
        return found

    members, offsets = jnp.arange(MEMBERS), jnp.array(offsets)
    alone = jax.jit(lambda: jax.lax.map(lambda each: train(*each), (members, offsets)))()
    by_one = tuple(number / MEMBERS for number in counts())
    together = jax.jit(jax.vmap(train))(members, offsets)
    return alone, together, by_one, counts()


def assert_alike(alone, together, tolerance=2e-5):
    for one, other in zip(*map(jax.tree.leaves, (alone, together)), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * max(1e-3, np.nanmax(np.abs(one), initial=0)))


def complete(method, **settings):
    """The direction of a row with its steps."""
    return optax.chain(build(method, **settings), optax.scale(-0.02))


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, ("kfac pi",))
def test_members_train_as_they_would_alone_and_share_what_is_due(method):
    alone, together, by_one, at_once = compared(complete(method), task("mlp"))
    assert_alike(*map(without_choice, (alone, together)))
    assert at_once == by_one, "the curvature of a step at which it is due for nobody was computed"
    passes = 2 if method == "kbfgs" else 1
    assert by_one[0] <= passes * STEPS / 2
    assert_differ(together)


def assert_differ(found):
    """The members are different ones."""
    (leaf, *_) = jax.tree.leaves(found[0][0])
    assert not np.allclose(leaf[0], leaf[1])


@pytest.mark.full
def test_members_of_different_age_of_which_some_refresh_afresh_train_as_they_would_alone():
    alone, together, by_one, at_once = compared(complete("ekfac qr pi"), task("mlp"), offsets=(0, 1, 3))
    assert_alike(*map(without_choice, (alone, together)))
    assert by_one[0] <= STEPS / 2 and at_once[0] == STEPS  # due for one of them at every step


@pytest.mark.full
@pytest.mark.parametrize("how", ["controlled", "chosen", "pieces"])
def test_members_share_tests_of_the_step_and_pieces_of_the_batch(how):
    problem = task("mlp")
    periods = {"statistics_every": 2, "refresh_every": 4, "early_refresh": False}
    if how == "pieces":
        capture = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, microbatches=2)
        tx, problem = complete("kfac pi"), problem._replace(capture=capture)
    elif how == "chosen":
        tx = ng.kfac(layers=problem.layers, **periods)
    else:
        rule = ng.adaptive_damping(every=4)
        tx = ng.kfac("quadratic", problem.layers, damping=rule, momentum="quadratic", **periods)
    alone, together, by_one, at_once = compared(tx, problem)
    assert_alike(alone, together, 2e-4)  # steps that choose themselves magnify rounding
    assert at_once[0] == by_one[0] <= STEPS / 2
    assert at_once[1] <= MEMBERS * by_one[1]
    assert_differ(together)


def _branches(jaxpr):
    found = [equation for equation in jaxpr.eqns if equation.primitive.name == "cond"]
    for equation in jaxpr.eqns:
        for inner in inner_jaxprs(equation):
            found += _branches(inner)
    return found


def test_a_branch_stays_one_under_vmap_of_vmap_and_gives_each_its_own():
    states = {"x": jnp.arange(6.0).reshape(2, 3), "n": jnp.zeros((2, 3), jnp.int32)}

    def step(is_due, state):
        return when(is_due, lambda state: {"x": jnp.exp(state["x"]), "n": state["n"] + 1}, state)

    def naive(is_due, state):
        return jax.lax.cond(is_due, lambda state: {"x": jnp.exp(state["x"]), "n": state["n"] + 1}, lambda s: s, state)

    both = jax.vmap(jax.vmap(step))
    for is_due in (jnp.zeros((2, 3), bool), jnp.ones((2, 3), bool), jnp.array([[True, False, True], [False] * 3])):
        found = both(is_due, states)
        np.testing.assert_array_equal(found["x"], jnp.where(is_due, jnp.exp(states["x"]), states["x"]))
        np.testing.assert_array_equal(found["n"], is_due)
    assert len(_branches(jax.make_jaxpr(both)(is_due, states).jaxpr)) == 1
    assert not _branches(jax.make_jaxpr(jax.vmap(jax.vmap(naive)))(is_due, states).jaxpr)  # what it is there for


@pytest.mark.full
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_one_of_two_dear_functions_is_that_of_each_member(mapped):
    def choose(which, x):
        return either(which, lambda x, skip: (jnp.exp(x), skip), lambda x, skip: (jnp.sin(x), skip), x, None)[0]

    for flags in ([True, False, True], [False] * 3, [True] * 3):
        which = jnp.array(flags) if mapped[0] == 0 else jnp.array(flags[0])
        x = jnp.arange(3.0) if mapped[1] == 0 else jnp.array(0.5)
        found = jax.jit(jax.vmap(choose, mapped))(which, x)
        np.testing.assert_array_equal(found, jnp.broadcast_to(jnp.where(which, jnp.exp(x), jnp.sin(x)), (3,)))
        again = jax.vmap(jax.vmap(choose, mapped), (0, None))(jnp.stack([which, ~which]), x)
        np.testing.assert_array_equal(again[0], found)


def test_a_branch_can_be_differentiated_in_both_modes_as_a_cond_can():
    def value(x, is_due):
        return when(is_due, lambda x: x**3, x)

    assert [float(jax.grad(value)(2.0, jnp.array(due))) for due in (True, False)] == [12.0, 1.0]
    assert [float(jax.jacfwd(value)(2.0, jnp.array(due))) for due in (True, False)] == [12.0, 1.0]
    found = jax.vmap(jax.grad(value))(jnp.array([2.0, 2.0]), jnp.array([True, False]))
    assert found.tolist() == [12.0, 1.0]


def test_one_of_two_trees_is_chosen_whatever_their_types():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def whole(here):
        return chosen(here[0], {"a": jnp.ones(1), "n": 1}, {"a": jnp.zeros(1, jnp.bfloat16), "n": jnp.int32(0)})

    for here in (True, False):
        by_device = jax.shard_map(lambda here: whole(here)["a"], mesh=mesh, in_specs=spec, out_specs=spec)
        found = jax.jit(by_device)(jnp.array([here]))
        assert found == here and found.dtype == jnp.float32
        alike = jax.shard_map(
            lambda here: chosen(here[0], jnp.ones(1), jnp.zeros(1)), mesh=mesh, in_specs=spec, out_specs=spec
        )
        assert jax.jit(alike)(jnp.array([here])) == here
