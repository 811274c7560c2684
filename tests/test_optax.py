"""Every method is an ordinary Optax transformation: what Optax's own wrappers and conventions ask for."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
from methods_table import ALL_NAMES, NAMES, direction, measured, of_the_lifting, row
from tasks import TASKS, task

import natgrad_jax as ng
from natgrad_jax import addresses

every_method = pytest.mark.parametrize("method", NAMES)
lifting_method = of_the_lifting(NAMES, ("kfac pi",))
every_optimizer = pytest.mark.parametrize("method", ALL_NAMES)
lifting_optimizer = of_the_lifting(ALL_NAMES)
ANY = NAMES[0]


def optimizer(method=ANY, where="mlp", learning_rate=0.02, **settings):
    return row(method).optimizer(learning_rate, task(where).layers, **{**table.SETTINGS, **settings})


def params_of(where="mlp"):
    return task(where).variables["params"]


@cache
def once(method):
    """Updates and state of the first step of a direction."""
    gradient, evidence = measured("mlp")
    return jax.jit(direction(method).update)(gradient, direction(method).init(params_of()), curvature=evidence)


def close(one, other):
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)  # of updates whose largest entries are near 1


# --- init without arrays ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", TASKS)
@lifting_optimizer
def test_the_state_can_be_had_from_shapes_alone(method, where):
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params_of(where))
    tx = optimizer(method, where)
    expected = table.shapes(tx.init(params_of(where)))
    assert table.shapes(jax.eval_shape(tx.init, params_of(where))) == expected
    assert table.shapes(tx.init(abstract)) == expected


@lifting_optimizer
def test_the_state_is_arrays_only_and_counts_in_int32(method):
    state = direction(method).init(params_of())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert state.count.dtype == jnp.int32
    for address in addresses.flatten(params_of()):  # is in one block
        assert [address == name or address.startswith(f"{name}/") for name in state.operators].count(True) == 1


@lifting_optimizer
def test_map_params_works_and_takes_no_factor_for_a_parameter(method):
    tx = optimizer(method)
    state = tx.init(params_of())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    chex.assert_trees_all_equal(table.lifted(mapped), table.lifted(state))
    (buffer,), (moved,) = (
        [part for part in jax.tree.leaves(tree, is_leaf=is_buffer) if is_buffer(part)] for tree in (state, mapped)
    )
    chex.assert_trees_all_equal(moved[-1], jax.tree.map(lambda leaf: leaf + 1, buffer[-1]))


def is_buffer(node):
    return isinstance(node, (optax.TraceState, optax.EmaState))


# --- chains and wrappers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@lifting_method
def test_the_complete_optimizer_is_direction_decay_momentum_and_learning_rate(method):
    gradient, evidence = measured("mlp")
    whole = optimizer(method, momentum=0.8, weight_decay=0.1, kl_clip=None)
    parts = [direction(method), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.02)]
    smoothing = row(method).smoothing
    parts.insert(2 if smoothing is None else 0, (smoothing or optax.trace)(0.8))

    def twice(tx):
        def step(state, _):
            updates, state = tx.update(gradient, state, params_of(), curvature=evidence, gradient=gradient)
            return state, updates

        return jax.lax.scan(step, tx.init(params_of()), length=2)[1]

    one, other = jax.jit(lambda: (twice(whole), twice(optax.chain(*parts))))()
    close(one, other)


@pytest.mark.full
def test_a_chain_with_clipping_passes_the_curvature_on():
    gradient, evidence = measured("mlp")
    tx = optax.chain(direction(ANY), optax.clip_by_global_norm(1e-3))
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params_of()), curvature=evidence)
    np.testing.assert_allclose(optax.tree.norm(updates), 1e-3, rtol=1e-4)


@pytest.mark.full
def test_hyperparameters_can_be_injected_and_changed_between_steps():
    gradient, evidence = measured("mlp")
    tx = optax.inject_hyperparams(ng.kfac)(0.02, task("mlp").layers, **table.SETTINGS, momentum=None, kl_clip=None)
    plain = optimizer("kfac pi", momentum=None, kl_clip=None)
    state, plain_state = tx.init(params_of()), plain.init(params_of())
    assert {"learning_rate", "damping", "statistics_every", "refresh_every"} <= set(state.hyperparams)
    update = jax.jit(tx.update)
    updates, state = update(gradient, state, curvature=evidence)
    close(updates, jax.jit(plain.update)(gradient, plain_state, curvature=evidence)[0])
    state.hyperparams["learning_rate"] *= 2
    state.hyperparams["refresh_every"] //= 4
    doubled, state = update(gradient, state, curvature=evidence)
    close(doubled, jax.tree.map(lambda leaf: 2 * leaf, updates))
    assert optax.tree.get(state, "refreshes") == 2
    assert update._cache_size() == 1


@pytest.mark.full
@lifting_method
def test_every_direction_takes_injected_hyperparameters(method):
    gradient, evidence = measured("mlp")
    injected = optax.inject_hyperparams(row(method).scale_by)(task("mlp").layers, **table.settings_of(method))
    updates, state = jax.jit(injected.update)(gradient, injected.init(params_of()), curvature=evidence)
    expected, expected_state = once(method)
    close(updates, expected)
    chex.assert_trees_all_equal(state.inner_state.metrics, expected_state.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, {"kernel": False, "bias": False}], ids=["by module", "by parameter"])
def test_masked_layers_are_skipped_and_the_others_are_as_before(hidden):
    gradient, evidence = measured("mlp")
    mask = {"Dense_0": hidden, "Dense_1": True, "Dense_2": True}
    tx = optax.masked(direction(ANY), mask)
    state = tx.init(params_of())
    assert set(state.inner_state.operators) == {"Dense_1", "Dense_2"}
    updates, _ = jax.jit(tx.update)(gradient, state, params_of(), curvature=evidence)
    whole, _ = once(ANY)
    close(updates, {**whole, "Dense_0": gradient["Dense_0"]})


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["partition", "masked freeze"])
def test_layers_can_be_partitioned_among_optimizers(wrapper):
    gradient, evidence = measured("convnet")
    labels = {name: "adam" if name.startswith("BatchNorm") else "natural" for name in gradient}
    others = {"adam": optax.adam(1e-3), "masked freeze": optax.set_to_zero()}
    other = others["adam" if wrapper == "partition" else wrapper]
    tx = optax.partition({"natural": optimizer(where="convnet"), "adam": other}, labels)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(gradient), gradient, curvature=evidence)
    expected, _ = other.update(gradient, other.init(gradient))
    close(updates["BatchNorm_0"], expected["BatchNorm_0"])
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates["Dense_0"]))


def test_a_mask_through_the_middle_of_a_layer_is_refused():
    mask = {name: {"kernel": True, "bias": name != "Dense_1"} for name in params_of()}
    with pytest.raises(ValueError, match=r"mask hides 'Dense_1/bias'.*layer 'Dense_1'.*all of them or none"):
        optax.masked(direction(ANY), mask).init(params_of())


@pytest.mark.full
def test_apply_if_finite_leaves_out_a_gradient_that_is_not():
    gradient, evidence = measured("mlp")
    tx = optax.apply_if_finite(optimizer(), max_consecutive_errors=3)
    state, update = tx.init(params_of()), jax.jit(tx.update)
    _, state = update(gradient, state, params_of(), curvature=evidence)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, gradient)
    updates, after = update(bad, state, params_of(), curvature=evidence)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert after.total_notfinite == 1


@pytest.mark.full
@lifting_method
def test_update_and_skip_are_two_branches_of_one_type(method):
    gradient, evidence = measured("mlp")
    tx = optimizer(method)

    @jax.jit
    def step(due, state):
        return jax.lax.cond(
            due,
            lambda state: tx.update(gradient, state, params_of(), curvature=evidence),
            lambda state: (optax.tree.zeros_like(gradient), state),
            state,
        )

    state = tx.init(params_of())
    _, skipped = step(False, state)
    chex.assert_trees_all_equal(skipped, state)
    assert table.lifted(step(True, state)[1]).count == 1


@pytest.mark.full
@pytest.mark.parametrize("name", ["conditionally_transform", "schedule_free"])
def test_other_wrappers_pass_the_curvature_on(name):
    gradient, evidence = measured("mlp")
    wrappers = {
        "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0),
        "schedule_free": lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.02),
    }
    tx = wrappers[name](optimizer(momentum=None))
    updates, state = jax.jit(tx.update)(gradient, tx.init(params_of()), params_of(), curvature=evidence)
    assert optax.tree.get(state, "metrics").statistics == 1
    assert jax.tree.structure(updates) == jax.tree.structure(gradient)


def test_flattened_parameters_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"one array of shape \(78,\).*expected the tree.*take `optax.flatten` away"):
        optax.flatten(direction(ANY)).init(params_of())


@pytest.mark.slow
def test_multi_steps_sees_the_evidence_of_the_last_micro_batch_only():
    tx = optax.MultiSteps(direction(ANY, statistics_every=1, refresh_every=1), every_k_schedule=2)
    gradient = measured("mlp")[0]
    evidence = [measured("mlp", t)[1] for t in range(2)]
    state, update = tx.init(params_of()), jax.jit(tx.update)
    updates, state = update(gradient, state, params_of(), curvature=evidence[0])
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    assert state.inner_opt_state.count == 0
    updates, state = update(gradient, state, params_of(), curvature=evidence[1])
    assert state.inner_opt_state.metrics.statistics == 1
    alone = direction(ANY, statistics_every=1, refresh_every=1)
    expected, expected_state = jax.jit(alone.update)(gradient, alone.init(params_of()), curvature=evidence[1])
    close(updates, expected)
    close(table.contents(state.inner_opt_state), table.contents(expected_state))


# --- ensembles and checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.full
@lifting_method
def test_an_ensemble_under_vmap_steps_as_its_members_do(method):
    tx, scales = direction(method), (0.5, 1.0, 2.0)
    gradient, evidence = measured("mlp")
    members = [jax.tree.map(lambda leaf, s=s: s * leaf, (gradient, evidence)) for s in scales]
    stack = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))

    def one(gradient, evidence):
        return tx.update(gradient, tx.init(gradient), curvature=evidence)[0]

    together = jax.jit(jax.vmap(one))(*stack(*members))
    alone = jax.jit(one)
    chex.assert_trees_all_close(together, stack(*(alone(*member) for member in members)), rtol=1e-3, atol=1e-4)


def saved_by_numpy(state, folder):
    """Through a file of plain arrays, without pickle."""
    leaves, structure = jax.tree.flatten(state)
    np.savez(folder / "state.npz", *leaves)
    with np.load(folder / "state.npz", allow_pickle=False) as file:
        return jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])


def saved_by_orbax(state, folder):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.eval_shape(lambda: state))


def resumes(method, save, folder):
    """C15: the step after a restored checkpoint, in the middle of an interval, is the step after the state itself."""
    gradient, evidence = measured("mlp")
    tx = optimizer(method)
    update = jax.jit(tx.update)
    state = tx.init(params_of())
    for _ in range(3):
        _, state = update(gradient, state, curvature=evidence)
    restored = save(state, folder)
    assert table.shapes(restored) == table.shapes(state)
    chex.assert_trees_all_equal(*(update(gradient, s, curvature=evidence) for s in (state, restored)))


@pytest.mark.full
@lifting_method
def test_a_checkpoint_of_plain_arrays_gives_the_identical_next_step(method, tmp_path):
    resumes(method, saved_by_numpy, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_orbax_gives_the_identical_next_step(tmp_path):
    resumes(ANY, saved_by_orbax, tmp_path)


@pytest.mark.slow
def test_a_state_that_is_not_saved_whole_fails_the_law_of_checkpoints(tmp_path):
    def forgetful(state, folder):
        return jax.tree.map(jnp.zeros_like, saved_by_numpy(state, folder))

    with pytest.raises(AssertionError):
        resumes(ANY, forgetful, tmp_path)
