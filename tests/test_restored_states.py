"""A state of other settings is refused with the name of a leaf; one of the same comes back from flax and Orbax."""

from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from methods_table import ALL_NAMES, build, evaluate, of_the_lifting, row, task

import natgrad_jax as ng


def by_msgpack(tx, state, params, folder):
    """As `docs/wrappers.md` says: the state of `optax.named_chain` is an OrderedDict, made known to flax as a dict."""
    del folder
    serialization.register_serialization_state(
        OrderedDict,
        lambda state: serialization.to_state_dict(dict(state)),
        lambda target, state: OrderedDict(serialization.from_state_dict(dict(target), state)),
        override=True,
    )
    return serialization.from_bytes(tx.init(params), serialization.to_bytes(state))


def by_orbax(tx, state, params, folder):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.eval_shape(tx.init, params))


def by_manager(tx, state, params, folder):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.CheckpointManager(folder) as manager:
        manager.save(3, args=orbax.args.StandardSave(state))
        manager.wait_until_finished()
        return manager.restore(3, args=orbax.args.StandardRestore(jax.eval_shape(tx.init, params)))


@pytest.mark.full
@pytest.mark.parametrize("through", [by_msgpack, by_orbax, by_manager])
def test_a_named_chain_around_ours_continues_bit_for_bit(through, tmp_path):
    problem = task("mlp")
    params = problem.variables["params"]
    tx = optax.named_chain(("ours", build("kfac pi")), ("rate", optax.scale(-0.05)))

    @jax.jit
    def step(state, t):
        out = evaluate(problem, params, t)
        return tx.update(out.grad, state, params, curvature=out.curvature)

    state = tx.init(params)
    for t in range(3):  # in mid-interval
        _, state = step(state, t)
    expected, found = step(state, 3), step(through(tx, state, params, tmp_path), 3)
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


class Wider(nn.Module):
    """The net of the problem, wider."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(nn.Dense(7)(x))
        return nn.Dense(3)(x)


def refuses(make, other, *words):
    """The state of one transformation is refused by the other, in these words."""
    problem = task("mlp")
    params = problem.variables["params"]
    state = make(problem.layers).init(params)
    with pytest.raises(ValueError, match=".*".join(words) + ".*Build the transformation as"):
        jax.eval_shape(lambda state: _updated(other(problem.layers), problem, state), state)


def _updated(tx, problem, state):
    out = evaluate(problem, problem.variables["params"], 0)
    return tx.update(out.grad, state, problem.variables["params"], curvature=out.curvature)


@pytest.mark.parametrize(
    ("make", "other", "words"),
    [
        (ng.scale_by_kfac, ng.scale_by_ekfac, ["no `operators", "basis"]),
        (ng.scale_by_kfac, partial(ng.scale_by_kfac, split="exact"), ["no `operators", "basis"]),
        (ng.scale_by_kfac, partial(ng.scale_by_kfac, max_factor_dim=5), ["no `", "entries"]),
        (partial(ng.scale_by_tengrad, examples=16), ng.scale_by_tengrad, ["of shape", "expected"]),
        (ng.scale_by_tkfac, ng.scale_by_kfac, ["no `statistics"]),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_name_of_a_leaf(make, other, words):
    refuses(partial(make, damping=0.1), partial(other, damping=0.1), *words)


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, ("kfac pi",))
def test_a_state_of_another_width_is_refused_with_the_name_of_a_leaf(method):
    problem, x = task("mlp"), jnp.ones((8, 5))
    variables = jax.jit(Wider().init)(jax.random.key(0), x)
    layers = ng.linen.capture(Wider(), ng.losses.softmax_cross_entropy).layers(variables, x)
    wide = problem._replace(layers=layers)
    state = jax.eval_shape(row(method).scale_by(wide.layers, damping=0.1).init, variables["params"])
    with pytest.raises(ValueError, match=r"The state has `.*Dense_.*` of shape .* expected .* another width"):
        jax.eval_shape(lambda state: _updated(build(method), problem, state), state)
    own = jax.eval_shape(build(method).init, problem.variables["params"])  # the control
    jax.eval_shape(lambda state: _updated(build(method), problem, state), own)
