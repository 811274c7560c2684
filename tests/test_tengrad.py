"""C58 and C62 to C67: the TENGraD direction is the dense solve, by layer and for the whole net; iEF and SPRING."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
import reference
import test_laws as laws
import test_laws_of_state as state_laws
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from one_layer import tengrad_block
from reference import assert_differs, assert_equal, damped, error, normal, targets
from tasks import MLP, TASKS, ConvNet
from watching import evidence_of, gradients, implied_blocks, mlp, pairs

import natgrad_jax as ng
from natgrad_jax.algebra import stacks as linalg
from natgrad_jax.layers.rows import to_matrix

GATE = {"float64": 1e-9, "float32": 1e-4}
"""Woodbury's form in float32 cancels, the more the smaller the damping."""
x64 = pytest.mark.usefixtures("x64")


def applied(layer, evidence, matrix, damping, **settings):
    """The direction of one layer after its first batch."""
    method = tengrad_block(evidence.inputs[0].shape[-2], 1, **settings)

    @jax.jit
    def run(evidence, matrix):
        state = method.prepared(layer, evidence, damping)
        return method.apply(layer, state, matrix, damping)

    return run(evidence, matrix)


def jacobian(layer, evidence):
    """J [N, I O], F = J^T J."""
    found = gradients(layer, evidence)[0]
    return found.reshape(len(found), -1) / np.sqrt(float(evidence.count))


# C58: the dense solve -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "damping"), [(9, 0.3), (7, 1e-2)])
def test_c58_the_direction_is_the_dense_solve_and_both_forms_of_woodbury_are_it(examples, damping, dtype):
    layer, evidence = pairs(normal(examples, 7, dtype=dtype), normal(examples, 4, seed=1, dtype=dtype))
    matrix = normal(7, 4, seed=2, dtype=dtype)
    j, d = jacobian(layer, evidence), np.asarray(matrix, np.float64).ravel()
    dense = np.linalg.solve(j.T @ j + damping * np.eye(28), d)
    assert_equal(applied(layer, evidence, matrix, damping).ravel(), dense, GATE[dtype])
    rows, n = j * np.sqrt(examples), examples
    unscaled = (d - rows.T @ np.linalg.solve(n * damping * np.eye(n) + rows @ rows.T, rows @ d)) / damping
    assert_equal(unscaled, dense)


@x64
def test_c58_kernel_and_bias_are_one_block():
    x, g = normal(9, 6), normal(9, 4, seed=1)
    layer, evidence = pairs(jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1), g)
    matrix, j = normal(7, 4, seed=2), jacobian(layer, evidence)
    found = applied(layer, evidence, matrix, 0.3).ravel()
    kernel, bias = j[:, :24], j[:, 24:]
    apart = [
        np.linalg.solve(part.T @ part + 0.3 * np.eye(part.shape[1]), d)
        for part, d in ((kernel, matrix[:6].ravel()), (bias, matrix[6:].ravel()))
    ]
    assert_equal(found, np.linalg.solve(j.T @ j + 0.3 * np.eye(28), matrix.ravel()))
    assert error(np.concatenate(apart), found) > 0.05  # the control


@pytest.mark.full
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_with_exact_labels_the_block_is_the_fisher_block_of_every_layer_of_a_deep_net(loss, dtype):
    net = mlp("tanh", loss, dtype=dtype)
    draws = {"squared_error": 3, "softmax_cross_entropy": 3}[loss]
    found = implied_blocks(tengrad_block(7, draws), net)
    for name in net.layers:
        assert_equal(found[name], net.blocks[name], GATE[dtype])


@cache
def net(loss="softmax_cross_entropy", labels="exact", examples=7, dtype="float64"):
    """The reference net 5-4-3-3: model, parameters, batch, capture, layers, and a jitted evaluation."""
    model, x = reference.MLP(), normal(examples, 5, seed=2, dtype=dtype)
    params = reference.random_params(model, x, dtype=dtype)
    y = targets(loss, (examples, 3), dtype=dtype)
    capture = ng.linen.capture(model, getattr(ng.losses, loss), labels=labels)
    return model, params, x, y, capture, capture.layers({"params": params}, x)


def direction_on_net(make, *, loss="softmax_cross_entropy", labels="exact", examples=7, dtype="float64"):
    """Gradient and first direction of `make(layers)` on the reference net, as vectors."""
    _, params, x, y, capture, layers = net(loss, labels, examples, dtype)
    tx = make(layers)

    @jax.jit
    def run(params):
        out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(0))
        return out.grad, tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0]

    return tuple(ravel_pytree(tree)[0] for tree in run(params))


@pytest.mark.slow
@pytest.mark.parametrize("damping", [0.3, 1e-2])
def test_c58_the_joint_direction_is_the_exact_damped_natural_gradient_of_the_whole_net(damping, dtype):
    model, params, x, y, _, _ = net(dtype=dtype)
    full = reference.fisher(model, params, "softmax_cross_entropy", x, y)
    gradient, found = direction_on_net(
        lambda layers: ng.scale_by_tengrad(layers, damping=damping, blocks="joint"), dtype=dtype
    )
    assert_equal(found, np.linalg.solve(damped(full, damping), np.asarray(gradient, np.float64)), GATE[dtype])
    _, apart = direction_on_net(lambda layers: ng.scale_by_tengrad(layers, damping=damping), dtype=dtype)
    assert_differs(apart, found)  # the control: one block for each layer


@x64
@pytest.mark.full
def test_the_joint_kernel_of_stacked_and_grouped_layers_is_that_of_all_copies():
    problem = table.task("convnet")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), problem.variables)
    capture = ng.linen.capture(ConvNet(jnp.float64), ng.losses.softmax_cross_entropy, labels="true")
    x, y = problem.x[0].astype(jnp.float64), problem.y[0]
    layers = capture.layers(wide, x)
    tx = ng.scale_by_tengrad(layers, damping=0.1, blocks="joint")

    @jax.jit
    def run(params):
        out = capture.value_and_grad({**wide, "params": params}, x, y)
        evidence = out.curvature()
        return evidence, out.grad, tx.update(out.grad, tx.init(params), params, curvature=evidence)[0]

    evidence, *trees = run(wide["params"])
    rows = [np.moveaxis(gradients(layer, evidence[name]), -3, 0) for name, layer in layers.items()]  # N first
    j = np.concatenate([part.reshape(8, -1) for part in rows], axis=1) / np.sqrt(8)

    def vector(tree):
        matrices = [to_matrix(layer, tree[layer.name]) for layer in layers.known]
        return np.concatenate([np.ravel(matrix) for matrix in matrices])

    gradient, found = map(vector, trees)
    assert_equal(found, np.linalg.solve(j.T @ j + 0.1 * np.eye(j.shape[1]), gradient))


# C62 to C64 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["layer", "joint"])
def test_c62_room_for_more_examples_changes_nothing(blocks, dtype):
    def make(examples):
        return lambda layers: ng.scale_by_tengrad(layers, damping=0.1, blocks=blocks, examples=examples)

    _, exact = direction_on_net(make(None), labels="true", dtype=dtype)
    _, roomy = direction_on_net(make(12), labels="true", dtype=dtype)
    assert_equal(roomy, exact)


@x64
def test_c62_fails_if_the_sum_is_divided_by_the_room():
    layer, evidence = pairs(normal(20, 4), normal(20, 3, seed=1))
    padded = pairs(*(jnp.pad(rows, ((0, 20), (0, 0))) for rows in (evidence.inputs[0], evidence.cotangents[0][0])))[1]
    matrix = normal(4, 3, seed=2)
    fair = applied(layer, padded._replace(count=evidence.count), matrix, 0.01)
    assert_equal(fair, applied(layer, evidence, matrix, 0.01))
    assert_differs(applied(layer, padded, matrix, 0.01), fair)


@x64
def test_c63_without_damping_it_tends_to_the_pseudo_inverse():
    layer, evidence = pairs(normal(30, 4), normal(30, 3, seed=1))
    j, matrix = jacobian(layer, evidence), normal(4, 3, seed=2)
    limit = np.linalg.pinv(j.T @ j) @ matrix.ravel()
    assert_equal(applied(layer, evidence, matrix, 1e-9).ravel(), limit, 1e-6)
    assert_differs(applied(layer, evidence, matrix, 1.0).ravel(), limit)


@x64
@pytest.mark.parametrize("energy", [0.9, 0.999])
def test_c64_the_leading_vectors_are_woodbury_of_the_truncated_jacobian(energy):
    layer, evidence = pairs(normal(32, 7), normal(32, 6, seed=1))
    j, matrix = jacobian(layer, evidence), normal(7, 6, seed=2)
    u, s, v = np.linalg.svd(j, full_matrices=False)
    rank = int(np.sum(np.cumsum(s) <= energy * np.sum(s)))
    assert 0 < rank < 32
    truncated = u[:, :rank] * s[:rank] @ v[:rank]
    found = applied(layer, evidence, matrix, 0.3, energy=energy).ravel()
    assert_equal(found, np.linalg.solve(truncated.T @ truncated + 0.3 * np.eye(42), matrix.ravel()))
    assert error(found, np.linalg.solve(j.T @ j + 0.3 * np.eye(42), matrix.ravel())) > 1e-4  # not the exact step


@x64
def test_c64_one_vector_is_kept_even_if_it_has_more_than_the_energy():
    direction, rest = normal(6, seed=3), normal(9, 6, seed=4)
    inputs = direction * normal(9, 1) + 1e-3 * rest
    layer, evidence = pairs(inputs, jnp.ones((9, 1)))
    matrix = direction[:, None]
    found = applied(layer, evidence, matrix, 0.1, energy=0.5)
    assert_equal(found, applied(layer, evidence, matrix, 0.1), 1e-3)
    assert_differs(matrix / 0.1, found)  # the control: a rank of zero


# C66: the improved empirical Fisher -----------------------------------------------------------------------------------


class Scalar(nn.Module):
    """Twelve weights and one output."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False)(x)


def scalar_problem(dtype):
    """Linear regression with five examples: parameters, batch, and the exact natural gradient without damping."""
    x, y = normal(5, 12, dtype=dtype), normal(5, 1, seed=1, dtype=dtype)
    params = reference.random_params(Scalar(), x, dtype=dtype)
    wide_x, wide_y, w = (np.asarray(a, np.float64) for a in (x, y, params["Dense_0"]["kernel"]))
    return params, x, y, np.linalg.pinv(wide_x) @ (wide_x @ w - wide_y)


def direction_of(make, params, x, y, labels="true", last=None):
    """The direction of `make(layers)` in the problem with one output."""
    capture = ng.linen.capture(Scalar(), ng.losses.squared_error, labels=labels)
    tx = make(capture.layers({"params": params}, x))

    @jax.jit
    def run(params):
        out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(0))
        state = tx.init(params)
        if last is not None:
            state = state._replace(last={"Dense_0": {"kernel": last}})
        return tx.update(out.grad, state, params, curvature=out.curvature)[0]["Dense_0"]["kernel"]

    return run(params)


@pytest.mark.slow
def test_c66_without_damping_the_ief_direction_is_the_exact_natural_gradient(dtype):
    params, x, y, exact = scalar_problem(dtype)
    made = {"damping": 0.0, "target": "ief", "refresh_every": 1}
    found = direction_of(lambda layers: ng.scale_by_tengrad(layers, **made), params, x, y)
    assert_equal(found, exact, {"float64": 1e-9, "float32": 1e-4}[dtype])
    plain = direction_of(lambda layers: ng.scale_by_tengrad(layers, damping=1e-6, refresh_every=1), params, x, y)
    cosine = np.vdot(plain, exact) / np.linalg.norm(plain) / np.linalg.norm(exact)
    assert cosine < 0.9  # the control: the empirical Fisher as it is


@pytest.mark.full
@x64
def test_ief_with_damping_and_weights_solves_for_the_weighted_slopes():
    model, params, x, y, _, _ = net(labels="true")
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="true")
    weights = jnp.array([1.0, 2.0, 0.0, 0.5, 1.0, 1.0, 3.0])
    layers = capture.layers({"params": params}, x)
    tx = ng.scale_by_tengrad(layers, damping=0.2, target="ief", refresh_every=1, blocks="joint")

    def loss(vector, x, y):
        z = model.apply({"params": ravel_pytree(params)[1](vector)}, x[None])[0]
        return reference.LOSSES["softmax_cross_entropy"](z, y)

    @jax.jit
    def run(params):
        out = capture.value_and_grad({"params": params}, x, y, weights=weights)
        found, _ = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
        rows = jax.vmap(jax.grad(loss), (None, 0, 0))(ravel_pytree(params)[0], x, y)
        return ravel_pytree(found)[0], rows, jax.nn.softmax(out.outputs)

    found, rows, probabilities = map(np.asarray, run(params))
    slopes = np.sum((probabilities - np.eye(3)[y]) ** 2, axis=1)
    fisher = np.einsum("np,n,nq->pq", rows, weights, rows) / np.sum(weights)
    assert_equal(found, np.linalg.solve(damped(fisher, 0.2), rows.T @ (weights * slopes) / np.sum(weights)))


@x64
def test_ief_adds_the_solve_of_what_was_added_to_the_gradient():
    layers = net(labels="true")[-1]
    made = {"damping": 0.2, "refresh_every": 1, "blocks": "joint"}
    _, params, x, y, capture, _ = net(labels="true")
    ief = ng.scale_by_tengrad(layers, target="ief", **made)
    plain = ng.scale_by_tengrad(layers, **made)

    @jax.jit
    def run(params):
        out = capture.value_and_grad({"params": params}, x, y)
        more = jax.tree.map(lambda g, p: g + 0.1 * p, out.grad, params)

        def update(tx, updates, **extra):
            return ravel_pytree(tx.update(updates, tx.init(params), params, curvature=out.curvature, **extra)[0])[0]

        alone = update(ief, out.grad)
        return update(ief, more, gradient=out.grad), alone, alone + update(plain, more) - update(plain, out.grad)

    found, alone, expected = run(params)
    assert_equal(found, expected)
    assert_differs(alone, expected)


# C67: SPRING ----------------------------------------------------------------------------------------------------------


def spring_direction(weight, dtype, last):
    params, x, y, _ = scalar_problem(dtype)

    def make(layers):
        return ng.spring(ng.scale_by_tengrad(layers, damping=0.03, refresh_every=1), 0.03, weight)

    return params, x, y, direction_of(make, params, x, y, labels="exact", last=last)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.9])
def test_c67_spring_solves_the_proximal_least_squares_problem(weight, dtype):
    last = normal(12, 1, seed=5, dtype=dtype)
    params, x, y, found = spring_direction(weight, dtype, last)
    x, y, w, before = (np.asarray(a, np.float64) for a in (x, y, params["Dense_0"]["kernel"], last))
    o, residual = x / np.sqrt(5), (x @ w - y) / np.sqrt(5)  # min |o u - residual|^2 + 0.03 |u - weight before|^2
    stacked = np.concatenate([o, np.sqrt(0.03) * np.eye(12)])
    goal = np.concatenate([residual, np.sqrt(0.03) * weight * before])
    assert_equal(found, np.linalg.lstsq(stacked, goal)[0], {"float64": 1e-9, "float32": 2e-4}[dtype])
    minsr = o.T @ np.linalg.solve(o @ o.T + 0.03 * np.eye(5), residual)
    assert (error(found, minsr) < GATE[dtype]) == (weight == 0)  # without momentum it is MinSR, with momentum not


@x64
def test_spring_keeps_what_the_batch_says_nothing_about():
    _, x, _, found = spring_direction(0.9, "float64", last := normal(12, 1, seed=5))
    unseen = np.linalg.svd(np.asarray(x))[2][5:]  # where no input of the batch points
    assert_equal(unseen @ found, 0.9 * unseen @ last)


@pytest.mark.full
@pytest.mark.parametrize("settings", [{"momentum": "spring"}, {"momentum": "spring", "learning_rate": "search"}])
def test_the_complete_optimizer_with_spring_learns(settings):
    state_laws.learns("tengrad", 0.1, blocks="joint", refresh_every=1, **settings)


# One date -------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_kernel_that_overflows_takes_the_rows_of_its_batch_back():
    gradient, evidence = table.measured("mlp")
    tx = table.direction("tengrad", refresh_every=1)
    update = jax.jit(tx.update)
    _, good = update(gradient, tx.init(gradient), curvature=evidence)
    huge = {name: one._replace(cotangents=(one.cotangents[0] * 1e25,)) for name, one in evidence.items()}
    found, after = update(gradient, good, curvature=huge)
    assert after.metrics.rejected_refreshes == 3 and after.metrics.rejected_statistics == 0
    for name, state in after.operators.items():
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(good.operators[name]), strict=True):
            np.testing.assert_array_equal(new, old)
    expected, _ = update(gradient, good._replace(count=jnp.int32(1)), curvature=evidence)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4), found, expected))


@pytest.mark.full
def test_a_batch_that_is_observed_between_refreshes_leaves_the_rows_and_their_inverse_alone():
    gradient, evidence = table.measured("mlp")
    tx = table.direction("tengrad")
    update = jax.jit(tx.update)
    _, state = update(gradient, tx.init(gradient), curvature=evidence)
    warm = ng.warm_start(tx, state, [table.measured("mlp", 1)[1]], gradient)  # between refreshes
    found, _ = update(gradient, warm, curvature=evidence)
    expected, _ = update(gradient, state, curvature=evidence)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


@pytest.mark.full
def test_the_damping_of_a_direction_is_that_of_its_refresh():
    gradient, evidence = table.measured("mlp")
    schedule = optax.linear_schedule(0.1, 10.0, 3)
    tx, constant = (table.build("tengrad", damping=damping) for damping in (schedule, 0.1))

    @partial(jax.jit, static_argnums=0)
    def second(tx, gradient, evidence):
        _, state = tx.update(gradient, tx.init(gradient), curvature=evidence)
        return tx.update(gradient, state, curvature=evidence)[0]

    found, expected = (ravel_pytree(second(one, gradient, evidence))[0] for one in (tx, constant))
    assert_equal(found, expected, 1e-4)


# Laws of the joint block, iEF and SPRING ------------------------------------------------------------------------------

VARIANTS = {
    "joint": lambda layers, **s: ng.scale_by_tengrad(layers, damping=0.03, blocks="joint", **{"refresh_every": 4, **s}),
    "joint reduced": lambda layers, **s: ng.scale_by_tengrad(
        layers, damping=0.03, blocks="joint", sharing="reduce", energy=0.9, **{"refresh_every": 4, **s}
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.full
@pytest.mark.parametrize("where", [TASKS[0], *(pytest.param(name, marks=pytest.mark.full) for name in TASKS[1:])])
def test_a_joint_direction_keeps_the_laws(where):
    tx = VARIANTS["joint"](table.task(where).layers)
    laws.owns_its_buffers(where, tx)
    state_laws.keeps_types(where, tx)
    _, record = table.scanned(where, tx)
    products = laws.blockwise(table.task(where), record.grad, record.updates).sum(-1)
    assert jnp.all(products > 0) and record.metrics.refreshes[-1] == 3
    state_laws.survives_poison(where, VARIANTS["joint"](table.task(where).layers, refresh_every=1))


@pytest.mark.full
def test_a_joint_direction_of_pooled_positions_and_leading_vectors_descends():
    tx = VARIANTS["joint reduced"](table.task("convnet").layers)
    _, record = table.scanned("convnet", tx)
    assert jnp.all(laws.blockwise(table.task("convnet"), record.grad, record.updates).sum(-1) > 0)


@pytest.mark.full
def test_a_mask_takes_layers_out_of_the_joint_block():
    gradient, evidence = table.measured("mlp")
    layers = table.task("mlp").layers
    mask = {"Dense_0": True, "Dense_1": True, "Dense_2": False}
    masked = optax.masked(VARIANTS["joint"](layers), mask)
    found, state = jax.jit(masked.update)(gradient, masked.init(gradient), curvature=evidence)
    two = {name: gradient[name] for name in ("Dense_0", "Dense_1")}
    alone = VARIANTS["joint"](ng.Layers(layers.known[:2], examples=layers.examples))
    expected, _ = jax.jit(alone.update)(two, alone.init(two), curvature=evidence)
    assert jax.tree.all(jax.tree.map(jnp.allclose, {name: found[name] for name in two}, expected))
    assert len(state.inner_state.operators["joint"].value.jacobians) == 2


# What is refused, and what is told ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"blocks": "net"}, "`blocks` is 'net'"),
        ({"sharing": "expand"}, "`sharing` is 'expand'"),
        ({"target": "ief"}, "refresh_every"),
        ({"energy": 1.5}, "`energy` is 1.5"),
        ({"examples": 0}, "`examples` is 0"),
        ({"workspace": 0}, "`workspace` is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        ng.scale_by_tengrad(table.task("mlp").layers, damping=0.1, **settings)


def test_spring_refuses_a_damping_that_adapts_to_a_model_without_it():
    with pytest.raises(ValueError, match="adaptive"):
        ng.tengrad(0.1, table.task("mlp").layers, momentum="spring", damping=ng.adaptive_damping(), kl_clip=None)


def test_layers_of_unknown_size_or_without_cotangents_are_refused():
    layers = table.task("mlp").layers
    with pytest.raises(ValueError, match="`examples` is 0"):
        ng.tengrad(0.1, ng.Layers(layers.known), kl_clip=None)
    with pytest.raises(ValueError, match="forward"):
        ng.tengrad(0.1, ng.Layers(layers.known, examples=8, draws=0), kl_clip=None)


def test_ief_refuses_curvature_of_other_labels():
    problem = table.task("mlp")
    tx = ng.scale_by_tengrad(problem.layers, damping=0.1, target="ief", refresh_every=1)

    def step(params):
        out = table.evaluate(problem, params, 0)
        return tx.update(out.grad, tx.init(params), curvature=out.curvature)

    with pytest.raises(ValueError, match="labels='sampled'"):
        jax.eval_shape(step, problem.variables["params"])


def test_the_report_tells_the_bytes_of_the_state():
    for where in TASKS:
        layers = table.task(where).layers
        state = jax.eval_shape(table.direction("tengrad", where).init, table.task(where).variables["params"])
        for layer in layers.known:
            own = jax.tree.leaves(state.operators[layer.name].value._replace(strength=(), fallbacks=()))
            total = sum(4 * leaf.size for leaf in own)
            shown = f"{total} B" if total < 1000 else f"{total / 1000:.1f} kB"
            assert any(layer.leaves[0].address in line and shown in line for line in str(layers).splitlines())


@pytest.mark.full
def test_how_many_rows_there_will_be_is_known_from_the_capture():
    x, y = jnp.ones((6, 5)), jnp.zeros(6, jnp.int32)
    for labels, draws in (("sampled", 2), ("exact", 1), ("true", 1), ("forward", 1)):
        layers, evidence = evidence_of(
            MLP(),
            ng.losses.softmax_cross_entropy,
            MLP().init(jax.random.key(0), x)["params"],
            x,
            y,
            labels=labels,
            draws=draws,
        )
        rows = 0 if labels == "forward" else evidence["Dense_0"].cotangents[0].shape[0]
        assert (layers.examples, layers.draws) == (6, rows)


@pytest.mark.full
@pytest.mark.parametrize("routine", ["cholesky", "eigh"])
def test_low_rank_takes_an_eigendecomposition_and_full_rank_a_cholesky(routine, monkeypatch):
    called, real = [], getattr(linalg, routine)
    monkeypatch.setattr(linalg, routine, lambda *args: called.append(routine) or real(*args))
    layer, evidence = pairs(normal(5, 4, dtype="float32"), normal(5, 3, dtype="float32"))
    method = tengrad_block(5, 1, energy=0.9 if routine == "eigh" else None)
    method.prepared(layer, evidence, 0.1)
    assert called == [routine]


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", [{}, {"blocks": "joint"}, {"energy": 0.9}], ids=["layer", "joint", "energy"])
def test_parameters_of_two_dtypes_have_directions_in_their_own(variant):
    params = {"w": reference.normal(4, 3, dtype="float32"), "v": reference.normal(3, 2, seed=1)}
    x, y = reference.normal(5, 4, dtype="float32"), reference.normal(5, 2)
    capture = ng.capture(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], ng.losses.squared_error, labels="true")
    wide = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
    found = []
    for given in (params, wide):
        tx = ng.scale_by_tengrad(capture.layers(given, x), damping=0.1, **variant)
        out = capture.value_and_grad(given, x, y)
        found.append(tx.update(out.grad, tx.init(given), curvature=out.curvature)[0])
    assert {name: leaf.dtype.name for name, leaf in found[0].items()} == {"w": "float32", "v": "float64"}
    for name, leaf in found[0].items():
        np.testing.assert_allclose(leaf, found[1][name], rtol=1e-4, atol=1e-5)
