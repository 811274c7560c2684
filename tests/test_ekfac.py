"""EKFAC: the best diagonal in K-FAC's basis, measured in the basis in which it is used."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from one_layer import State, ekfac_block, kfac_block
from reference import (
    assert_differs,
    assert_equal,
    damped,
    diagonal_in,
    error,
    errors,
    kron,
    normal,
    random_params,
    recomposed,
)
from watching import (
    AT_ONCE,
    basis_and_scale,
    evidence_of,
    factors,
    factors_of,
    first_step,
    implied_blocks,
    mlp,
    operator,
    pairs,
    prepared,
    random_layers,
    rows_of,
    state_of,
    summed,
    watched,
)

import natgrad_jax as ng
from natgrad_jax.algebra import averages
from natgrad_jax.algebra.moments import example_moments

EKFAC, MINIBATCH = ekfac_block(0.0), ekfac_block(0.5, "minibatch")
KFAC = kfac_block(0.0, "exact")
with_losses = pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])


# Where it is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c21_ekfac_is_the_block_where_inputs_and_cotangents_are_independent(dtype):
    some, others = normal(7, 4, dtype=dtype), normal(9, 3, seed=1, dtype=dtype)
    independent = jnp.repeat(some, 9, axis=0), jnp.tile(others, (7, 1))
    correlated = normal(63, 4, dtype=dtype), normal(63, 4, dtype=dtype)[:, :3]
    for (a, g), says in ((independent, assert_equal), (correlated, assert_differs)):
        layer, evidence = pairs(a, g)
        block = reference.second_moment(jnp.einsum("ni,no->nio", a, g))
        found = np.linalg.inv(np.asarray(operator(EKFAC, layer, evidence, 1.0), np.float64))
        says(damped(found, -1.0).astype(dtype), block)


@pytest.mark.usefixtures("x64")
def test_c22_ekfac_is_not_the_block_of_a_layer_with_one_output():
    a, g = normal(20, 4), normal(20, 1, seed=1) * jnp.abs(normal(20, 1, seed=2)) ** 2
    layer, evidence = pairs(a, g)
    found = recomposed(*basis_and_scale(state_of(EKFAC, layer, evidence, 1.0)))
    assert_differs(found, reference.second_moment(jnp.einsum("ni,no->nio", a, g)))


class Affine(nn.Module):
    """One linear layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="only")(x)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 3.0, 1.0, 0.5, 2.0)])
@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 5)])
def test_c28_ekfac_of_forward_evidence_is_the_block_of_one_linear_layer_with_squared_error(shape, weights):
    model, x = Affine(), normal(*shape)
    weights = None if weights is None else jnp.asarray(weights)
    params = random_params(model, x)
    net = watched(model, params, x, "squared_error", labels="forward", weights=weights)
    assert_equal(implied_blocks(EKFAC, net)["only"], net.blocks["only"])
    other = watched(model, params, x, "poisson", labels="forward", weights=weights)
    assert_differs(implied_blocks(EKFAC, other)["only"], other.blocks["only"])


@pytest.mark.usefixtures("x64")
def test_forward_evidence_has_no_gradient_of_a_batch_and_the_minibatch_estimator_says_so():
    x = normal(6, 5)
    net = watched(Affine(), random_params(Affine(), x), x, "squared_error", labels="forward")
    assert net.evidence["only"].gradient is None
    with pytest.raises(ValueError, match="forward"):
        state_of(MINIBATCH, net.layers["only"], net.evidence["only"], 1.0)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_ekfac_is_kfac_where_the_block_is_a_kronecker_product():
    net = mlp("linear", "squared_error")

    def moved(optimizer):
        optimizer = partial(optimizer, 1.0, damping=0.1, **AT_ONCE)
        step = first_step(optimizer, net.model, net.likelihood, net.params, net.x)
        return step(net.params, net.x, net.y)["layer_b"]["kernel"] - net.params["layer_b"]["kernel"]

    assert_equal(moved(ng.ekfac), moved(partial(ng.kfac, split="exact")))
    bent = mlp("tanh", "squared_error")
    assert_differs(implied_blocks(EKFAC, bent)["layer_b"], implied_blocks(KFAC, bent)["layer_b"])


# The scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c32_the_scale_is_the_diagonal_of_the_block_in_the_basis_and_keeps_its_trace(dtype):
    net = mlp("tanh", "softmax_cross_entropy", dtype=dtype)
    for name in reversed(tuple(net.layers)):
        q, scale = basis_and_scale(state_of(EKFAC, net.layers[name], net.evidence[name], 1.0))
        assert_equal(scale, diagonal_in(q, net.blocks[name]))
        assert_equal(np.sum(scale), np.trace(net.blocks[name]))
    assert_differs(diagonal_in(q, kron(*factors(net.layers, net.evidence)[name])), scale)


class Pixels(nn.Module):
    """Two convolutions, their positions mixed by the second."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(2, (2, 2), name="head")(nn.tanh(nn.Conv(3, (2, 2), name="first")(x)))


@pytest.mark.full
def test_c32_the_scale_of_a_convolution_is_the_square_of_the_sum_over_positions(dtype):
    x = normal(3, 3, 3, 2, dtype=dtype)
    net = watched(Pixels(), random_params(Pixels(), x, dtype=dtype), x, "squared_error")
    layer, evidence = net.layers["first"], net.evidence["first"]
    state = state_of(EKFAC, layer, evidence, 1.0)
    q, scale = basis_and_scale(state)
    assert_equal(scale, diagonal_in(q, net.blocks["first"]))
    rows, columns = rows_of(layer, evidence)
    rows, columns = rows @ state.operator.basis.inputs, columns @ state.operator.basis.outputs
    sum_of_squares = np.einsum("nti,knto->io", rows**2, columns**2) / (len(columns) * len(rows))
    assert_differs(sum_of_squares.ravel(), scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [1, 100, 1 << 22])
def test_the_moments_do_not_depend_on_how_many_examples_are_taken_at_a_time(most):
    a, g = normal(2, 6, 3, 4), normal(2, 5, 6, 3, 2, seed=1)  # [S, N, T, I] and [S, K, N, T, O]
    expected = np.einsum("sknio->sio", np.einsum("snti,sknto->sknio", a, g) ** 2) / 5
    assert_equal(example_moments(a, g, most), expected)
    assert_differs(np.einsum("snti,sknto->sio", a**2, g**2) / 5, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("labels", ["exact", "forward"])
def test_a_side_that_is_too_wide_keeps_its_own_coordinates(labels):
    net = mlp("tanh", "squared_error")
    _, evidence = evidence_of(net.model, net.likelihood, net.params, net.x, net.y, labels=labels)
    layer, evidence = net.layers["layer_b"], evidence["layer_b"]
    a, g = factors_of(layer, evidence)
    block = kron(a, g) if labels == "forward" else net.blocks["layer_b"]
    q = kron(np.eye(6), np.linalg.eigh(g)[1])
    expected = recomposed(q, diagonal_in(q, block))
    found = operator(ekfac_block(0.0, max_factor_dim=5), layer, evidence, 1.0)
    assert_equal(found, np.linalg.inv(damped(expected, 1.0)))
    assert_differs(np.linalg.inv(found), damped(block, 1.0))


# How good it is -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(3, 5, 4), (7, 3, 79)])
def test_c33_ekfac_is_never_further_from_the_block_than_kfac(sizes):
    layer, evidence, blocks = random_layers(*sizes)
    q, scale = basis_and_scale(state_of(EKFAC, layer, evidence, 1.0))
    kronecker = np.stack([kron(a, g) for a, g in zip(*factors_of(layer, evidence), strict=True)])
    of_kfac = errors(kronecker, blocks)
    assert np.all(errors(recomposed(q, scale), blocks) <= of_kfac * (1 + 1e-9))
    assert np.any(errors(recomposed(q, scale), blocks) < 0.9 * of_kfac)
    in_another_basis = recomposed(np.swapaxes(q, 1, 2), scale)
    assert not np.all(errors(in_another_basis, blocks) <= of_kfac * (1 + 1e-9))


@pytest.mark.usefixtures("x64")
def test_c41_the_scale_is_measured_in_the_basis_and_not_in_its_transpose():
    layer, evidence, blocks = random_layers(6, 4, 200, copies=1)
    q, scale = basis_and_scale(state_of(EKFAC, layer, evidence, 1.0))
    assert_equal(scale, diagonal_in(q, blocks))
    transposed = diagonal_in(np.swapaxes(q, 1, 2), blocks)
    assert_differs(transposed, scale)
    assert error(recomposed(q, transposed), blocks) > error(recomposed(q, scale), blocks)


# The scale through time -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history():
    """Four steps, a refresh at the first and the fourth: the states, and the empirical blocks of the batches."""
    with jax.enable_x64(True):
        model, likelihood = reference.MLP(), ng.losses.softmax_cross_entropy
        xs, ys = normal(4, 9, 5), reference.targets("softmax_cross_entropy", (4, 9, 3))
        params = random_params(model, xs[0])
        capture = ng.linen.capture(model, likelihood, labels="true")
        layers = capture.layers({"params": params}, xs[0])
        tx = ng.scale_by_ekfac(
            layers, damping=0.1, decay=0.8, statistics_every=1, rescale_every=1, refresh_every=3, early_refresh=False
        )

        @jax.jit
        def step(state, x, y):
            out = capture.value_and_grad({"params": params}, x, y)
            return tx.update(out.grad, state, params, curvature=out.curvature)[1]

        states, blocks = [tx.init(params)], []
        for x, y in zip(xs, ys, strict=True):
            states.append(step(states[-1], x, y))
            gradients = reference.example_gradients(model, params, tuple(layers), "softmax_cross_entropy", x, y)
            blocks.append({name: reference.second_moment(gradients[name]) for name in layers})
        kept = [{name: State((), one.value) for name, one in state.operators.items()} for state in states[1:]]
        yield kept, blocks


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("step", [0, 3])
def test_c41_after_a_refresh_the_scale_is_the_diagonal_in_the_new_basis_of_the_batch_at_hand(history, step):
    states, blocks = history
    for name, block in blocks[step].items():
        q, scale = basis_and_scale(states[step][name])
        assert_equal(scale, diagonal_in(q, block))
    if step:
        former, kept = basis_and_scale(states[step - 1]["layer_b"])
        q, _ = basis_and_scale(states[step]["layer_b"])
        assert_differs(q, former)
        assert_differs(kept, diagonal_in(q, blocks[step]["layer_b"]))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_between_refreshes_the_scale_is_the_moving_average_in_the_old_basis(history):
    states, blocks = history
    for name in blocks[0]:
        q, scale = basis_and_scale(states[2][name])
        np.testing.assert_array_equal(q, basis_and_scale(states[0][name])[0])
        mixed = sum(0.8 ** (2 - step) * blocks[step][name] for step in range(3)) / (1 + 0.8 + 0.8**2)
        assert_equal(scale, diagonal_in(q, mixed))
    assert_differs(scale, diagonal_in(q, blocks[2][name]))


# The estimator from batches -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_minibatch_scale_starts_at_the_kronecker_eigenvalues_and_takes_in_the_square_of_the_batch_gradient():
    net = mlp("tanh", "softmax_cross_entropy")
    layer, evidence = net.layers["layer_b"], net.evidence["layer_b"]
    q, scale = basis_and_scale(state_of(MINIBATCH, layer, evidence, 1.0))
    start = diagonal_in(q, kron(*factors_of(layer, evidence)))
    coordinates = np.reshape(summed(layer, evidence), (3, -1)) @ q
    assert_equal(scale, 0.5 * start + 0.5 * np.mean(coordinates**2, axis=0) / 7)
    assert_differs(scale, start)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_minibatch_scale_is_unbiased_for_labels_of_the_model_and_not_for_true_ones():
    net = mlp("tanh", "softmax_cross_entropy")
    layer, name, fresh = net.layers["layer_b"], "layer_b", ekfac_block(0.0, "minibatch")
    q, expected = basis_and_scale(state_of(EKFAC, layer, net.evidence[name], 1.0))

    def scale(evidence):
        coordinates = summed(layer, evidence).reshape(-1, len(q)) @ q
        by_hand = np.mean(coordinates**2, axis=0) / 7
        state = fresh.rescale(layer, state_of(EKFAC, layer, net.evidence[name], 1.0), evidence)
        assert_equal(basis_and_scale(state)[1], by_hand)
        return by_hand

    of = partial(evidence_of, net.model, net.likelihood, net.params, net.x, net.y)
    assert_equal(scale(of(labels="sampled", draws=3000)[1][name]), expected, gate=0.08)  # sampling: 2 / sqrt(3000)
    assert_differs(scale(of(labels="true")[1][name]), expected)


@pytest.mark.usefixtures("x64")
def test_c42_minibatch_scale_is_the_variance_and_n_times_the_squared_mean():
    mean, deviation, examples, batches = 0.3, 1.1, 32, 200_000
    layer, evidence = pairs(jnp.ones((examples, 1)), jnp.ones((examples, 1)))
    sums = examples * mean + np.sqrt(examples) * deviation * normal(batches, 1, 1)
    method = ekfac_block(0.0, "minibatch")
    state = method.rescale(layer, method.init(layer), evidence._replace(gradient={"kernel": sums}))
    found = averages.mean(state.operator.scale).item()
    assert abs(found / (deviation**2 + examples * mean**2) - 1) < 0.01
    assert abs(found / (deviation**2 + mean**2) - 1) > 0.1


# Damping --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", [EKFAC, MINIBATCH], ids=["per_example", "minibatch"])
def test_c53_the_damped_step_is_the_dense_solve(dtype, method):
    net = mlp("tanh", "softmax_cross_entropy", dtype=dtype)
    layer, evidence = net.layers["layer_b"], net.evidence["layer_b"]
    block = recomposed(*basis_and_scale(state_of(method, layer, evidence, 1e-2)))
    gate = {"float64": 1e-9, "float32": 1e-4}[dtype]  # the condition of the damped block times the rounding
    assert_equal(operator(method, layer, evidence, 1e-2), np.linalg.inv(damped(block, 1e-2)), gate)
    assert_differs(operator(method, layer, evidence, 1e-2), np.linalg.inv(damped(block, 2e-2)))


@pytest.mark.parametrize("method", [EKFAC, MINIBATCH], ids=["per_example", "minibatch"])
def test_c54_large_damping_gives_the_gradient_over_the_damping(dtype, method):
    net = mlp("tanh", "softmax_cross_entropy", dtype=dtype)
    layer, evidence = net.layers["layer_b"], net.evidence["layer_b"]
    size = layer.shape[0] * layer.shape[1]
    for damping, gate in ((1e4, 3e-3), (1e6, 2e-4)):
        assert error(damping * operator(method, layer, evidence, damping), np.eye(size)) < gate
    assert_differs(1e-2 * operator(method, layer, evidence, 1e-2), np.eye(size))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [EKFAC, MINIBATCH], ids=["per_example", "minibatch"])
@pytest.mark.parametrize("examples", [1, 40])
def test_c55_every_update_descends(method, examples):
    layer, evidence, _ = random_layers(6, 5, examples, copies=30, dtype="float32")

    @jax.jit
    def products(damping):
        state = prepared(method, layer, evidence, damping)
        gradients = normal(30, 6, 5, seed=7, dtype="float32"), summed(layer, evidence)[:, 0]
        return [jnp.sum(g * method.apply(layer, state, g, damping), axis=(1, 2)) for g in gradients]

    for damping in (1e-8, 1e-3, 1.0, 1e4):
        assert jnp.min(jnp.stack(products(damping))) > 0


@pytest.mark.usefixtures("x64")
def test_c55_fails_where_the_basis_is_not_orthogonal():
    layer, evidence, _ = random_layers(6, 5, 40, copies=30)
    state = state_of(EKFAC, layer, evidence, 1.0)
    basis = state.operator.basis._replace(inputs=normal(30, 6, 6))
    skewed = state._replace(operator=state.operator._replace(basis=basis))
    gradient = normal(30, 6, 5, seed=7)
    there = skewed.operator.basis.inputs.swapaxes(1, 2) @ gradient  # into a basis, and out of another
    assert jnp.min(jnp.sum(gradient * EKFAC.apply(layer, state, there, 1.0), axis=(1, 2))) < 0
