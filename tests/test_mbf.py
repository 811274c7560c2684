"""MBF: which weights share a block, what the statistics of a block are of, and the inverses of many small blocks."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from jax import lax
from reference import assert_differs, assert_equal, damped, error, normal
from watching import LIKELIHOODS, evidence_of

import natgrad_jax as ng
from natgrad_jax.base import Leaf
from natgrad_jax.layers.rows import gradient_matrix

DAMPING = 0.5
AT_ONCE = {"damping": DAMPING, "statistics_every": 1, "refresh_every": 1}


# The definition -------------------------------------------------------------------------------------------------------


def places(params):
    """Where the entries of every array stand in one vector of them all: a tree of integers."""
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    return structure.unflatten([
        np.arange(end - leaf.size, end).reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)
    ])


def vectors(tree):
    """A tree of [T, ...] as vectors [T, P]."""
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)


def average(values, decay=0.9):
    """The mean of values [T, ...] with weights decay^age."""
    weights = decay ** np.arange(len(values) - 1.0, -1, -1)
    return np.einsum("t,t...->...", weights / weights.sum(), values)


def block_diagonal(history, groups, decay=0.9):
    """The curvature [P, P] of gradients [T, P]: one block for each group of places [J, n], which J vectors share."""
    history = np.asarray(history, np.float64)
    found = np.zeros((history.shape[1],) * 2)
    for group in groups:
        seen = history[:, group]
        block = average(np.einsum("tjn,tjm->tnm", seen, seen) / len(group), decay)
        for vector in group:
            found[np.ix_(vector, vector)] = block
    return found


def direction(history, groups, damping=DAMPING, incoming=None):
    """(F + damping I)^-1 of what comes in, the last gradient if nothing is said."""
    incoming = history[-1] if incoming is None else incoming
    return np.linalg.solve(damped(block_diagonal(history, groups), damping), np.asarray(incoming, np.float64))


def windows(kernel):
    """The groups of a convolution: one for each pair of channels."""
    return list(np.reshape(kernel, (-1, 1, kernel.shape[-2] * kernel.shape[-1])).transpose(2, 1, 0))


def entries(array):
    """The groups of what has a diagonal."""
    return list(np.reshape(array, (-1, 1, 1)))


def whole(leaves):
    """The places of a dense layer as a matrix [I + 1, O]."""
    return np.concatenate([leaves["kernel"], leaves["bias"][None]])


# What is tested -------------------------------------------------------------------------------------------------------


def gradients_like(params, count=3, dtype="float64"):
    """Random gradients [T, ...] for every array."""
    leaves, structure = jax.tree.flatten(params)
    drawn = [normal(count, *leaf.shape, seed=seed, dtype=dtype) for seed, leaf in enumerate(leaves)]
    return structure.unflatten(drawn)


def at(tree, step):
    return jax.tree.map(lambda leaf: leaf[step], tree)


def steps(tx, gradients):
    """The updates of all steps [T, ...]."""

    def step(state, gradient):
        return tx.update(gradient, state)[::-1]

    return lax.scan(step, tx.init(at(gradients, 0)), gradients)[1]


def updates_of(tx, gradients):
    """The same as vectors [T, P]."""
    return vectors(jax.jit(lambda gradients: steps(tx, gradients))(gradients))


def first_update(tx, incoming, gradients):
    """The first update [P] for the first of what comes in, with statistics of the first gradient."""

    def first(incoming, gradient):
        return tx.update(incoming, tx.init(gradient), gradient=gradient)[0]

    updates = jax.jit(first)(at(incoming, 0), at(gradients, 0))
    return vectors(jax.tree.map(lambda leaf: leaf[None], updates))[0]


def dense_layers(inputs, outputs, dtype="float64"):
    """One dense layer with bias, its arrays at the top of the tree."""
    leaves = Leaf("kernel", "kernel", (inputs, outputs)), Leaf("bias", "bias", (outputs,))
    return ng.Layers((ng.Layer("dense", "dense", (inputs + 1, outputs), leaves, (), dtype),))


def dense_gradients(inputs=4, outputs=3, count=3, dtype="float64"):
    return gradients_like({"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}, count, dtype)


# Blocks of convolutions -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c79_a_convolution_of_one_point_has_scalar_blocks(dtype):
    gradients = {"kernel": normal(3, 1, 1, 4, 5, dtype=dtype)}
    found = updates_of(ng.scale_by_mbf(**AT_ONCE), gradients)[-1]
    g = np.asarray(vectors(gradients), np.float64)
    assert_equal(found, g[-1] / (average(g**2) + DAMPING))
    assert_differs(found, g[-1] / (np.mean(average(g**2)) + DAMPING))


@pytest.mark.slow
def test_c79_a_convolution_of_one_pair_of_channels_has_the_full_block(dtype):
    gradients = {"kernel": normal(3, 3, 2, 1, 1, dtype=dtype)}
    found = updates_of(ng.scale_by_mbf(**AT_ONCE), gradients)[-1]
    g = np.asarray(vectors(gradients), np.float64)
    full = average(np.einsum("ti,tj->tij", g, g))
    assert_equal(found, np.linalg.solve(damped(full, DAMPING), g[-1]))
    assert_differs(found, g[-1] / (np.diag(full) + DAMPING))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("channels", [(3, 4), (8, 9)])  # by the library, and by sweeps
def test_c81_blocks_of_a_convolution_are_independent(channels):
    kernels, tx = normal(2, 2, 2, *channels), ng.scale_by_mbf(**AT_ONCE)
    run = jax.jit(lambda kernels: steps(tx, {"kernel": kernels})["kernel"])
    found, order = run(kernels), np.random.default_rng(0).permutation(channels[1])
    np.testing.assert_array_equal(run(kernels[..., order]), found[..., order])
    changed = run(kernels.at[..., 1, 2].mul(2)) != found
    assert np.all(changed[..., 1, 2])
    assert not np.any(np.delete(changed.reshape(-1, np.prod(channels)), channels[1] + 2, axis=1))


@pytest.mark.usefixtures("x64")
def test_c81_vectors_of_a_dense_layer_are_not_independent():
    kernels, tx = normal(2, 4, 3), ng.scale_by_mbf(**AT_ONCE)
    run = jax.jit(lambda kernels: steps(tx, {"kernel": kernels})["kernel"])
    assert np.all(run(kernels) != run(kernels.at[:, :, 1].mul(2)))


@pytest.mark.slow
def test_c82_the_first_step_is_that_of_sherman_and_morrison(dtype):
    v = normal(1, 3, 3, 1, 1, dtype=dtype)
    u = v + normal(1, 3, 3, 1, 1, seed=1, dtype=dtype)
    found = first_update(ng.scale_by_mbf(**AT_ONCE), {"kernel": u}, {"kernel": v})
    v, u = (np.ravel(kernel).astype(np.float64) for kernel in (v, u))

    def closed_form(weight):
        return (u - weight * v * (v @ u) / (DAMPING + weight * v @ v)) / DAMPING

    assert_equal(found, closed_form(1.0))  # an average of one value is that value
    assert_differs(found, closed_form(0.1))


# Blocks of dense layers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(7, 5), (2, 5), (5, 1)])
def test_c80_the_average_over_inputs_is_a_solve_from_one_side(sizes):
    inputs, outputs = sizes
    drawn = dense_gradients(inputs, outputs, 2)
    backwards = jax.tree.map(lambda leaf: leaf[::-1], drawn)
    tx = ng.scale_by_mbf(dense_layers(inputs, outputs), **AT_ONCE)
    places_of = whole(places(at(drawn, 0)))
    found = first_update(tx, backwards, drawn)[places_of]
    g, m = (np.asarray(whole(at(tree, 0))) for tree in (drawn, backwards))
    square = g.T @ g
    assert_equal(found, m @ np.linalg.inv(damped(square / (inputs + 1), DAMPING)))
    assert_differs(found, m @ np.linalg.inv(damped(square, DAMPING)))


@pytest.mark.usefixtures("x64")
def test_c80_one_vector_has_the_block_of_the_empirical_fisher_matrix():
    gradients = {"kernel": normal(4, 1, 6)}
    found = updates_of(ng.scale_by_mbf(**AT_ONCE), gradients)[-1]
    g = np.asarray(vectors(gradients), np.float64)
    block = average(np.einsum("ti,tj->tij", g, g))
    assert_equal(found, np.linalg.solve(damped(block, DAMPING), g[-1]))
    assert_differs(found, np.linalg.solve(damped(block, 2 * DAMPING), g[-1]))


@cache
def dense_case():
    gradients = dense_gradients()
    index = whole(places(at(gradients, 0)))
    return gradients, {
        "fan_out": index,
        "fan_in": index.T,
        "literal": np.reshape(np.ravel(index.T), (5, 3)),  # of O x (I + 1) row by row, read as (I + 1) x O
    }


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dense", ["fan_out", "fan_in", "literal"])
def test_c83_the_vectors_of_a_dense_layer_are_as_asked_and_share_a_block_or_not(dense, shared):
    gradients, partitions = dense_case()

    def groups(index, shared):
        return [index] if shared else list(index[:, None])

    tx = ng.scale_by_mbf(dense_layers(4, 3), dense=dense, shared=shared, **AT_ONCE)
    found, g = updates_of(tx, gradients)[-1], vectors(gradients)
    assert_equal(found, direction(g, groups(partitions[dense], shared)))
    assert_differs(found, direction(g, groups(partitions[dense], not shared)))
    for other in partitions.keys() - {dense}:
        assert_differs(found, direction(g, groups(partitions[other], shared)))


@pytest.mark.usefixtures("x64")
def test_a_block_that_is_too_large_keeps_its_diagonal():
    gradients, partitions = dense_case()
    found = updates_of(ng.scale_by_mbf(dense_layers(4, 3), max_factor_dim=2, **AT_ONCE), gradients)[-1]
    g = np.asarray(vectors(gradients))
    diagonal = np.diag(np.diag(block_diagonal(g, [partitions["fan_out"]])))
    assert_equal(found, np.linalg.solve(damped(diagonal, DAMPING), g[-1]))
    assert_differs(found, direction(g, [partitions["fan_out"]]))


# Models ---------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer after the other in a scan."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0}
        body = nn.scan(lambda layer, x, _: (layer(x), None), variable_axes=axes, split_rngs={"params": True}, length=2)
        return body(nn.Dense(4, name="layer"), x, None)[0]


class Net(nn.Module):
    """Convolutions, one of them grouped, a norm, a stack of dense layers, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), name="conv")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.Conv(4, (2, 1), feature_group_count=2, use_bias=False, name="grouped")(x).mean((1, 2))
        return nn.Dense(3, name="out")(Twice(name="stack")(x))


NET = Net()


@cache
def net_case():
    """The layers of the net, gradients, and the groups of the arrays that have blocks or diagonals however it is."""
    capture = ng.linen.capture(NET, ng.losses.squared_error)
    x = normal(2, 3, 3, 2)
    params = jax.eval_shape(NET.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    gradients, at = gradients_like(params), places(params)
    blocks = windows(at["conv"]["kernel"]) + windows(at["grouped"]["kernel"])
    lone = [at["conv"]["bias"], at["norm"]["scale"], at["norm"]["bias"]]
    return capture.layers({"params": params}, x), gradients, at, blocks, lone


@cache
def net_updates(vectors):
    layers, gradients, *_ = net_case()
    return updates_of(ng.scale_by_mbf(layers, vectors=vectors, **AT_ONCE), gradients)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_with_layers_stacks_and_groups_have_blocks_of_their_own_and_dense_layers_their_bias():
    _, gradients, at, blocks, lone = net_case()
    stack, g = at["stack"]["layer"], vectors(gradients)
    copies = [np.concatenate([stack["kernel"][i], stack["bias"][i][None]]) for i in range(2)]
    groups = [*blocks, *copies, whole(at["out"]), *(entry for array in lone for entry in entries(array))]
    assert sorted(np.concatenate([group.ravel() for group in groups])) == list(range(g.shape[1]))
    found = net_updates("diagonal")[-1]
    assert_equal(found, direction(g, groups))
    joint = [*groups[: len(blocks)], np.concatenate(copies), *groups[len(blocks) + 2 :]]
    places_of_the_stack = np.concatenate(copies).ravel()
    assert_differs(found[places_of_the_stack], direction(g, joint)[places_of_the_stack])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_without_layers_the_shapes_of_the_arrays_decide():
    _, gradients, at, blocks, lone = net_case()
    stack, out, g = at["stack"]["layer"], at["out"], vectors(gradients)
    groups = [*blocks, *windows(stack["kernel"]), stack["bias"], out["kernel"]]
    groups += [entry for array in (*lone, out["bias"]) for entry in entries(array)]
    found = updates_of(ng.scale_by_mbf(**AT_ONCE), gradients)[-1]
    assert_equal(found, direction(g, groups))
    with_bias = direction(g, [whole(out)])
    assert_differs(found[whole(out).ravel()], with_bias[whole(out).ravel()])


# Biases of convolutions and parameters of norms -----------------------------------------------------------------------


def smoothed_rms(gradients):
    """The rule of the authors' code, of all steps."""
    m, v, found = 0.0, 0.0, []
    for t, g in enumerate(np.asarray(gradients, np.float64)):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * m**2
        found.append(m / (1e-8 + np.sqrt(v / (1 - 0.999 ** (t + 1)))))
    return np.stack(found)


def heavy_ball(gradients, weight=0.9):
    """The buffer of all steps."""
    buffer, found = 0.0, []
    for gradient in np.asarray(gradients, np.float64):
        buffer = weight * buffer + gradient
        found.append(buffer)
    return np.stack(found)


@pytest.mark.slow
def test_c84_vectors_follow_the_rule_of_the_authors_whatever_stands_in_front(dtype):
    gradients = {"bias": normal(4, 5, dtype=dtype), "kernel": normal(4, 2, 1, 1, 1, seed=1, dtype=dtype)}
    tx = ng.mbf(0.1, vectors="smoothed_rms", **AT_ONCE, kl_clip=None)
    found = updates_of(tx, gradients)
    bias, kernel = np.asarray(gradients["bias"], np.float64), np.asarray(vectors(gradients), np.float64)[:, 5:]
    assert_equal(found[:, :5], -0.1 * smoothed_rms(bias))
    assert_differs(found[:, :5], -0.1 * smoothed_rms(heavy_ball(bias)))
    assert_differs(found[:, :5], updates_of(optax.adam(0.1), gradients)[:, :5])
    assert_equal(found[-1, 5:], -0.1 * direction(kernel, [np.arange(2)[None]], incoming=heavy_ball(kernel)[-1]))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_c84_the_rule_is_for_parameters_without_a_block_and_leaves_the_others_alone():
    _, gradients, _, _, lone = net_case()
    found, plain, ruled = net_updates("smoothed_rms"), net_updates("diagonal"), np.concatenate(lone)
    others = np.setdiff1d(np.arange(found.shape[1]), ruled)
    assert_equal(found[:, ruled], smoothed_rms(vectors(gradients)[:, ruled]))
    assert_equal(found[:, others], plain[:, others])
    assert_differs(found[:, ruled], plain[:, ruled])


@pytest.mark.usefixtures("x64")
def test_c84_the_bias_of_a_dense_layer_follows_the_rule_only_where_its_layer_is_not_known():
    gradients = dense_gradients()
    for layers, says in ((None, assert_equal), (dense_layers(4, 3), assert_differs)):
        found = updates_of(ng.scale_by_mbf(layers, vectors="smoothed_rms", **AT_ONCE), gradients)
        says(found[:, :3], smoothed_rms(gradients["bias"]))


# What the statistics are of -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_momentum_stands_in_front_and_the_statistics_are_of_the_gradient_without_it():
    gradients, partitions = dense_case()
    found = updates_of(ng.mbf(0.1, dense_layers(4, 3), **AT_ONCE, kl_clip=None), gradients)[-1]
    g, groups = vectors(gradients), [partitions["fan_out"]]
    smooth = heavy_ball(g)
    assert_equal(found, -0.1 * direction(g, groups, incoming=smooth[-1]))
    assert_differs(found, -0.1 * direction(smooth, groups))
    assert_differs(found, -0.1 * heavy_ball(np.stack([direction(g[: t + 1], groups) for t in range(3)]))[-1])


MODEL, LOSS, EXAMPLES = reference.MLP(widths=(3, 2)), "softmax_cross_entropy", 6


@cache
def problem():
    x = normal(EXAMPLES, 4, seed=5)
    params = reference.random_params(MODEL, x)
    return params, x, reference.targets(LOSS, (EXAMPLES, 2))


@cache
def trained(statistics):
    """Three steps of the complete optimizer from true labels; learning rate, damping, decay -> parameters [P]."""
    params, x, y = problem()
    capture = ng.linen.capture(MODEL, LIKELIHOODS[LOSS], labels="true")
    layers = capture.layers({"params": params}, x)

    @jax.jit
    def run(learning_rate, damping, weight_decay):
        settings = {"statistics": statistics, "weight_decay": weight_decay, **AT_ONCE, "damping": damping}
        tx = ng.mbf(learning_rate, layers, **settings, kl_clip=None)

        def step(carry, _):
            params, state = carry
            out = capture.value_and_grad({"params": params}, x, y)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), None

        (last, _), _ = lax.scan(step, (params, tx.init(params)), None, length=3)
        return vectors(jax.tree.map(lambda new, old: (new - old)[None], last, params))

    return run


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_settings_of_the_mean_gradient_become_settings_of_one_example_by_the_size_of_the_batch():
    rate, damping, decay, size = 0.02, 0.01, 0.3, float(EXAMPLES)
    of_gradient, of_curvature = trained("gradient"), trained("curvature")
    assert_equal(of_curvature(rate * size, damping * size, decay / size), of_gradient(rate, damping, decay))
    assert_equal(of_gradient(rate / size, damping / size, decay * size), of_curvature(rate, damping, decay))
    for factors in ((1, 1, 1), (size, 1, 1 / size), (1, size, 1 / size), (size, size, 1)):
        a, d, e = (value * factor for value, factor in zip((rate, damping, decay), factors, strict=True))
        assert error(of_curvature(a, d, e), of_gradient(rate, damping, decay)) > 0.01


DRAWS = 4000


@cache
def sampled():
    """The layers of the model, the evidence of many draws of labels, and the block of each dense layer."""
    params, x, y = problem()
    layers, evidence = evidence_of(MODEL, LIKELIHOODS[LOSS], params, x, y, labels="sampled", draws=DRAWS)
    tx = ng.scale_by_mbf(layers, statistics="curvature", **AT_ONCE)
    state = jax.jit(lambda p, e: tx.update(p, tx.init(p), curvature=e)[1])(params, evidence)
    blocks = {name: blocks.total / blocks.weight for name, blocks in state.statistics.items()}
    return layers, evidence, blocks


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_statistics_of_sampled_labels_are_second_moments_of_the_summed_gradient_over_the_size():
    layers, evidence, blocks = sampled()
    for name in layers:
        drawn = np.asarray(gradient_matrix(layers[name], evidence[name]))  # [K, I + 1, O]
        moment = np.einsum("kio,kip->op", drawn, drawn) / (DRAWS * drawn.shape[1])
        assert_equal(blocks[name], moment / EXAMPLES)
        assert_differs(blocks[name], moment / EXAMPLES**2)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_statistics_of_sampled_labels_tend_to_the_mean_block_of_the_fisher_matrix_of_one_example():
    params, x, y = problem()
    layers, _, blocks = sampled()
    fisher = reference.fisher_blocks(MODEL, params, tuple(layers), LOSS, x, y)
    gradients = reference.example_gradients(MODEL, params, tuple(layers), LOSS, x, y)
    for name, layer in layers.items():
        found, (rows, _) = blocks[name], layer.shape
        assert error(found, reference.partial_traces(fisher[name], layer.shape)[1] / rows) < 0.1  # noise of the draws
        true = reference.second_moment(gradients[name])
        assert_differs(found, reference.partial_traces(true, layer.shape)[1] / rows)


# Calendar -------------------------------------------------------------------------------------------------------------


def counted(tx, gradients):
    """On which steps there were statistics, and refreshes."""

    def step(state, gradient):
        _, new = tx.update(gradient, state)
        return new, (new.metrics.statistics - state.metrics.statistics, new.metrics.refreshes - state.metrics.refreshes)

    start = tx.init(at(gradients, 0))
    return tuple(map(list, jax.jit(lambda g: lax.scan(step, start, g)[1])(gradients)))


@pytest.mark.full
def test_c17_statistics_start_with_the_first_step_and_the_first_period_refreshes_after_each():
    gradients, calendar = dense_gradients(count=15, dtype="float32"), {"statistics_every": 2, "refresh_every": 6}
    statistics, refreshes = counted(ng.scale_by_mbf(damping=1.0, **calendar), gradients)
    assert statistics == [t % 2 == 0 for t in range(15)]
    assert refreshes == [t % 6 == 0 or (t < 6 and t % 2 == 0) for t in range(15)]
    _, late = counted(ng.scale_by_mbf(damping=1.0, early_refresh=False, **calendar), gradients)
    assert late == [t % 6 == 0 for t in range(15)]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_c17_the_first_step_after_a_warm_start_adds_to_its_statistics():
    gradients, _ = dense_case()
    tx, first = ng.scale_by_mbf(dense_layers(4, 3), **AT_ONCE), jax.tree.map(lambda leaf: 3 * leaf[0], gradients)
    warm = ng.warm_start(tx, tx.init(first), [at(gradients, 1), at(gradients, 2)])
    found, state = jax.jit(tx.update)(first, warm)
    assert state.metrics.statistics - warm.metrics.statistics == state.metrics.refreshes == 1
    g, new, *of_the_pass = (np.asarray(whole(tree)) for tree in (first, first, at(gradients, 1), at(gradients, 2)))
    new, *of_the_pass = (matrix.T @ matrix / len(matrix) for matrix in (new, *of_the_pass))
    mean = sum(of_the_pass) / 2
    assert_equal(whole(found), g @ np.linalg.inv(damped(0.9 * mean + 0.1 * new, DAMPING)))
    assert_differs(whole(found), g @ np.linalg.inv(damped(mean, DAMPING)))
