"""TKFAC keeps the trace of the block, and both of its partial traces; how its damping enters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from one_layer import kfac_block, tkfac_block
from reference import (
    assert_differs,
    assert_equal,
    best_kronecker_error,
    damped,
    error,
    errors,
    kron,
    normal,
    partial_traces,
    random_params,
    rearranged,
)
from watching import (
    captured_fisher,
    factors_of,
    gradients,
    implied_block,
    implied_blocks,
    mlp,
    operator,
    pairs,
    random_layers,
    rows_of,
    watched,
)

SPLITS = ("even", "pi", "mean_eigenvalue", "exact")
BY_SPLIT = {split: tkfac_block(0.0, split) for split in SPLITS}
TKFAC, KFAC = BY_SPLIT["exact"], kfac_block(0.0, "exact")
"""The damping added to the eigenvalues of the product, so that the operator shows the block."""


def products(left, right):
    """Kronecker products of every copy."""
    return np.stack([kron(a, g) for a, g in zip(left, right, strict=True)])


def by_definition(block, shape):
    """delta, Phi and Psi of the paper from the dense block: tr Phi = tr Psi = 1."""
    inputs, outputs = partial_traces(block, shape)
    return np.trace(block), inputs / np.trace(inputs), outputs / np.trace(outputs)


def inverse(block):
    return np.linalg.inv(np.asarray(block, np.float64))


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c36_the_trace_is_that_of_the_block_and_that_of_kfac_is_not(dtype):
    layer, evidence, blocks = random_layers(6, 5, 64, copies=20, dtype=dtype)
    found = implied_block(TKFAC, layer, evidence, 300.0)  # about the mean eigenvalue
    assert_equal(np.trace(found, axis1=1, axis2=2), np.trace(blocks, axis1=1, axis2=2))
    of_kfac = products(*factors_of(layer, evidence))
    assert_differs(np.trace(of_kfac, axis1=1, axis2=2), np.trace(blocks, axis1=1, axis2=2))


@pytest.mark.slow
def test_c37_both_partial_traces_are_those_of_the_dense_block(dtype):
    net = mlp("tanh", "softmax_cross_entropy", dtype=dtype)
    found = implied_blocks(TKFAC, net)
    gate = {"float64": None, "float32": 1e-4}[dtype]  # read off the inverse of the damped block
    for name, layer in net.layers.items():
        for ours, theirs in zip(
            *(partial_traces(b, layer.shape) for b in (found[name], net.blocks[name])), strict=True
        ):
            assert_equal(ours, theirs, gate)
    layer, evidence, blocks = random_layers(6, 5, 64, copies=1)
    of_kfac = products(*factors_of(layer, evidence))
    for ours, theirs in zip(*(partial_traces(b[0], layer.shape) for b in (of_kfac, blocks)), strict=True):
        assert_differs(ours, theirs)


@pytest.mark.usefixtures("x64")
def test_c38_it_is_the_kronecker_product_of_the_second_moments_of_gradients_over_their_trace():
    layer, evidence, _ = random_layers(6, 5, 64, copies=1)
    d = gradients(layer, evidence)[0, 0]
    left, right = np.einsum("nio,njo->ij", d, d) / 64, np.einsum("nio,nip->op", d, d) / 64
    assert_equal(implied_block(TKFAC, layer, evidence)[0], kron(left, right) / np.trace(left))
    batch = d.sum(0)  # weighing the sums of a batch by their traces is another method
    assert_differs(kron(batch @ batch.T, batch.T @ batch) / np.sum(batch**2) / 64, kron(left, right) / np.trace(left))


@pytest.mark.usefixtures("x64")
def test_c39_it_is_one_power_step_from_the_identity_in_the_arrangement_of_van_loan():
    layer, evidence, blocks = random_layers(6, 5, 64, copies=1)
    arranged = rearranged(blocks[0], layer.shape)

    def power_step(left, right):
        a, g = arranged @ right.ravel(), arranged.T @ left.ravel()
        return kron(a.reshape(6, 6), g.reshape(5, 5)) / (left.ravel() @ arranged @ right.ravel())

    found = implied_block(TKFAC, layer, evidence)[0]
    assert_equal(found, power_step(np.eye(6), np.eye(5)))
    assert_differs(power_step(np.diag(np.arange(6.0)), np.diag(np.arange(5.0))), found)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(3, 5, 4), (7, 3, 79)])
def test_c34_no_kronecker_product_is_nearer_than_the_best(sizes):
    layer, evidence, blocks = random_layers(*sizes)
    best = best_kronecker_error(blocks, layer.shape)
    of_tkfac = errors(implied_block(TKFAC, layer, evidence), blocks)
    of_kfac = errors(products(*factors_of(layer, evidence)), blocks)
    for found in (of_tkfac, of_kfac):
        assert np.all(best <= found * (1 + 1e-9))
    assert np.mean(best) < 0.98 * np.mean(of_tkfac)
    none_is_as_near = errors(blocks + 0.1 * best[:, None, None] * blocks, blocks)  # no Kronecker product
    assert not np.all(best <= none_is_as_near * (1 + 1e-9))


# Where it is exact ----------------------------------------------------------------------------------------------------


def test_c21_tkfac_is_the_block_where_inputs_and_cotangents_are_independent(dtype):
    some, others = normal(7, 4, dtype=dtype), normal(9, 3, seed=1, dtype=dtype)
    independent = jnp.repeat(some, 9, axis=0), jnp.tile(others, (7, 1))
    correlated = normal(63, 4, dtype=dtype), normal(63, 4, dtype=dtype)[:, :3]
    for (a, g), says in ((independent, assert_equal), (correlated, assert_differs)):
        layer, evidence = pairs(a, g)
        says(implied_block(TKFAC, layer, evidence), reference.second_moment(jnp.einsum("ni,no->nio", a, g)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1), (1, 4)])
def test_c22_tkfac_is_the_block_of_a_layer_with_one_output_or_one_input(dtype, sizes):
    one = normal(20, 1, seed=1, dtype=dtype) * jnp.abs(normal(20, 1, seed=2, dtype=dtype)) ** 2
    a, g = (normal(20, 4, dtype=dtype), one) if sizes == (4, 1) else (one, normal(20, 4, dtype=dtype))
    layer, evidence = pairs(a, g)
    block = reference.second_moment(jnp.einsum("ni,no->nio", a, g))
    assert_equal(implied_block(TKFAC, layer, evidence), block)
    assert_differs(implied_block(KFAC, layer, evidence), block)


# Through time ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_c43_the_average_is_the_tkfac_of_the_averaged_block(dtype):
    sizes = np.abs(normal(5, 12, 1, seed=2)) ** -1.5  # heavy tails
    a, g = normal(5, 12, 4) * sizes, normal(5, 12, 3, seed=1) + normal(5, 12, 4)[..., :3]
    batches = [pairs(*(jnp.asarray(rows[batch], dtype) for rows in (a, g))) for batch in range(5)]
    layer, weights = batches[0][0], 0.8 ** np.arange(4, -1, -1.0)
    blocks = np.stack([captured_fisher(*batch) for batch in batches])

    @jax.jit
    def after_all(evidences):
        method = tkfac_block(0.8, "exact")
        state = method.init(layer)
        for evidence in evidences:
            state = method.observe(layer, state, evidence)
        state = method.refresh(layer, state, 1.0)
        return state.statistics, state.operator.basis, state.operator.scale

    traces, basis, scale = after_all([evidence for _, evidence in batches])
    found = reference.recomposed(kron(*basis), np.ravel(scale)).astype(dtype)
    delta, phi, psi = by_definition(np.einsum("b,bpq->pq", weights / weights.sum(), blocks), layer.shape)
    assert_equal(found, delta * kron(phi, psi))
    assert_equal(jnp.trace(traces.total.inputs), jnp.trace(traces.total.outputs))
    singles = [by_definition(block, layer.shape) for block in blocks]
    normalised = [
        sum(w * part for w, part in zip(weights / weights.sum(), parts, strict=True))
        for parts in zip(*singles, strict=True)
    ]
    assert_differs(normalised[0] * kron(*normalised[1:]), found)


# Positions ------------------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Two convolutions, and the mean over positions."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(2, (2, 2), name="last")(nn.tanh(nn.Conv(3, (2, 2), name="first")(x))).mean((1, 2))


@pytest.mark.slow
def test_c44_the_trace_of_a_convolution_is_kept_and_by_pairs_of_positions_that_of_the_local_part(dtype):
    x = normal(3, 3, 3, 2, dtype=dtype)
    net = watched(Pixels(), random_params(Pixels(), x, dtype=dtype), x, "squared_error")
    layer, evidence, block = net.layers["first"], net.evidence["first"], net.blocks["first"]

    def trace(sharing):
        method = tkfac_block(0.0, "exact", sharing=sharing)
        return np.trace(implied_block(method, layer, evidence, float(np.trace(block)) / len(block)))

    rows, columns = (np.asarray(x, np.float64) for x in rows_of(layer, evidence))
    inputs, outputs = np.sum(rows**2, axis=-1), np.sum(columns**2, axis=-1).mean(0)  # [N, T]
    local = np.sum(inputs * outputs) / 3
    gate = {"float64": None, "float32": 1e-4}[dtype]  # read off the inverse of the damped block
    assert_equal(trace("example"), np.trace(block), gate)
    assert_equal(trace("expand"), local, gate)
    assert_differs(trace("expand"), np.trace(block))
    assert_differs(np.sum(inputs.sum(1) * outputs.sum(1)) / 3, np.trace(block))
    assert_differs(trace("reduce"), np.trace(block))


# Damping --------------------------------------------------------------------------------------------------------------


def reference_case(dtype="float64"):
    """A layer, its evidence, and delta, Phi and Psi by definition."""
    layer, evidence, blocks = random_layers(4, 3, 30, copies=1, dtype=dtype)
    layer, evidence = pairs(evidence.inputs[0][0], evidence.cotangents[0][0, 0])
    return layer, evidence, *by_definition(blocks[0], layer.shape)


@pytest.mark.slow
def test_c51_even_damping_has_two_forms_if_delta_is_of_the_same_refresh(dtype):
    layer, evidence, delta, phi, psi = reference_case(dtype)
    damping = 0.1 * delta
    found = operator(BY_SPLIT["even"], layer, evidence, damping)
    root = np.sqrt(damping)
    assert_equal(found, kron(*(inverse(damped(np.sqrt(delta) * side, root)) for side in (phi, psi))))

    def divided(delta_of_now):
        strength = np.sqrt(damping / delta)
        return kron(*(inverse(damped(side, strength)) for side in (phi, psi))) / delta_of_now

    assert_equal(found, divided(delta))
    assert_differs(found, divided(1.5 * delta))


@pytest.mark.slow
@pytest.mark.parametrize("share", [1e-4, 1e-2, 1e2])
def test_mean_eigenvalue_damps_each_side_by_its_mean_eigenvalue_but_never_less_than_asked(dtype, share):
    layer, evidence, delta, phi, psi = reference_case(dtype)
    damping = share * delta
    sides = np.sqrt(delta) * phi, np.sqrt(delta) * psi
    strengths = [max(np.trace(side) / len(side), np.sqrt(damping)) for side in sides]
    found = operator(BY_SPLIT["mean_eigenvalue"], layer, evidence, damping)
    assert_equal(found, kron(*(inverse(damped(side, x)) for side, x in zip(sides, strengths, strict=True))))
    even = operator(BY_SPLIT["even"], layer, evidence, damping)
    (assert_equal if share == 1e2 else assert_differs)(even, found)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "split"), [("dense", "even"), ("conv", "mean_eigenvalue")])
def test_the_default_is_the_papers_choice_by_the_kind_of_the_layer(kind, split):
    layer, evidence, delta, _, _ = reference_case()

    def inverses(method, kind):
        window = (1,) if kind == "conv" else ()

        def refreshed(evidence):
            state = method.observe(layer, method.init(layer), evidence)
            return method.refresh(replace(layer, window=window), state, 0.01 * delta).operator

        return kron(*jax.jit(refreshed)(evidence))

    default = tkfac_block(0.0)
    assert_equal(inverses(default, kind), inverses(BY_SPLIT[split], kind))
    assert_differs(inverses(default, "conv"), inverses(default, "dense"))


@pytest.mark.usefixtures("x64")
def test_c50_pi_is_the_root_of_outputs_over_inputs_whatever_the_data():
    layer, evidence, delta, phi, psi = reference_case()
    damping, pi = 0.1 * delta, np.sqrt(3 / 4)
    found = operator(BY_SPLIT["pi"], layer, evidence, damping)
    x, y = np.sqrt(damping) * pi, np.sqrt(damping) / pi
    assert_equal(found, kron(inverse(damped(np.sqrt(delta) * phi, x)), inverse(damped(np.sqrt(delta) * psi, y))))
    assert error(operator(BY_SPLIT["even"], layer, evidence, damping), found) > 0.01


@pytest.mark.parametrize("split", ["even", "pi", "mean_eigenvalue"])
def test_c52_damping_of_the_factors_exceeds_exact_damping(dtype, split):
    layer, evidence, delta, phi, psi = reference_case(dtype)
    damping = 0.1 * delta
    divided = inverse(operator(BY_SPLIT[split], layer, evidence, damping))
    exact = damped(delta * kron(phi, psi), damping)
    assert_equal(operator(TKFAC, layer, evidence, damping), inverse(exact), {"float64": 1e-9, "float32": 1e-4}[dtype])
    least = np.linalg.eigvalsh(divided - exact)[0] / np.linalg.norm(exact)
    assert least >= {"float64": -1e-9, "float32": -1e-4}[dtype]
    assert_differs(divided, exact)
    assert np.linalg.eigvalsh(exact - divided)[0] / np.linalg.norm(exact) < -0.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("split", SPLITS)
def test_c54_large_damping_gives_the_gradient_over_the_damping(split):
    layer, evidence, delta, _, _ = reference_case()
    damping = 1e6 * delta
    gate = 1e-5 if split == "exact" else 6e-3
    assert error(damping * operator(BY_SPLIT[split], layer, evidence, damping), np.eye(12)) < gate
    assert_differs(damping / 1e8 * operator(BY_SPLIT[split], layer, evidence, damping / 1e8), np.eye(12))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_a_layer_whose_gradients_are_zero_has_the_damping_alone(split):
    layer, evidence = pairs(normal(6, 4, dtype="float32"), jnp.zeros((6, 3)))
    found = operator(BY_SPLIT[split], layer, evidence, 0.25)
    assert_equal(found, 4 * np.eye(12))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [3, 1])
def test_a_side_that_is_too_wide_keeps_the_diagonal_of_its_factor(most):
    layer, evidence, delta, phi, psi = reference_case()
    kept = np.diag(np.diag(phi)), psi if most == 3 else np.diag(np.diag(psi))
    found = implied_block(tkfac_block(0.0, "exact", max_factor_dim=most), layer, evidence, float(delta))
    assert_equal(found, delta * kron(*kept))
    assert_differs(found, delta * kron(phi, psi))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_forward_evidence_gives_the_product_of_a_and_the_identity():
    net = mlp("tanh", "squared_error", examples=7)
    forward = watched(net.model, net.params, net.x, "squared_error", labels="forward")
    layer, evidence = forward.layers["layer_b"], forward.evidence["layer_b"]
    a, _ = factors_of(layer, evidence)
    assert_equal(implied_block(TKFAC, layer, evidence), kron(a, np.eye(layer.shape[1])))
    assert_differs(implied_block(TKFAC, layer, net.evidence["layer_b"]), kron(a, np.eye(layer.shape[1])))
