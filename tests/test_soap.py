"""SOAP follows a restatement of it in numpy; vectors are Adam's; a scale belongs to its basis; noise stays noise."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from jax import lax
from reference import assert_differs, assert_equal, error, normal

import natgrad_jax as ng

DAMPING = 1e-6
STEPS, EVERY, DECAY = 12, 4, 0.9
SETTINGS = {"damping": DAMPING, "decay": DECAY, "refresh_every": EVERY}
AFRESH = {"refresh": "eigh"}
"""What compiles in half the time, where the way of refreshing is not the question."""


# The definition -------------------------------------------------------------------------------------------------------


def turned(tensor, sides, inverse=False):
    """The tensor x_i Q_i^T in every mode, or x_i Q_i; None for a mode that keeps its coordinates."""
    for mode, side in enumerate(sides):
        if side is not None:
            columns = side if inverse else side.T
            tensor = np.moveaxis(np.tensordot(columns, tensor, (1, mode)), 0, mode)
    return tensor


def contraction(tensor, mode):
    rows = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    return rows @ rows.T


def along(tensor, mode, order):
    return np.take(tensor, order, axis=mode)


def soap_by_definition(gradients, incoming=None, *, refresh="qr", full=None, move=True):
    """The directions of gradients [T, n_1, ..., n_k] in float64.

    Args:
        gradients: what the statistics are of.
        incoming: what is turned and divided; the gradients themselves if None.
        refresh: "qr" or "eigh".
        full: which modes have a basis; all if None.
        move: whether the second moments move with the basis.
    """
    gradients = np.asarray(gradients, np.float64)
    incoming = gradients if incoming is None else np.asarray(incoming, np.float64)
    shape = gradients.shape[1:]
    modes = [mode for mode in range(len(shape)) if len(shape) > 1 and (full is None or full[mode])]
    factors, sides = {mode: 0.0 for mode in modes}, [None] * len(shape)
    squares, weight, found = np.zeros(shape), 0.0, []
    for t, (g, m) in enumerate(zip(gradients, incoming, strict=True)):
        for mode in modes:
            factors[mode] = DECAY * factors[mode] + (1 - DECAY) * contraction(g, mode)
        if t % EVERY == 0:
            old = list(sides)
            for mode in modes:
                if refresh == "eigh" or t == 0:
                    sides[mode] = np.linalg.eigh(factors[mode])[1]
                    if t and move:
                        turn = (sides[mode].T @ old[mode]) ** 2
                        squares = np.moveaxis(np.tensordot(turn, squares, (1, mode)), 0, mode)
                else:
                    image = factors[mode] @ old[mode]
                    order = np.argsort(-np.sum(old[mode] * image, axis=0))
                    sides[mode] = np.linalg.qr(image[:, order])[0]
                    squares = along(squares, mode, order) if move else squares
        squares = DECAY * squares + (1 - DECAY) * turned(g, sides) ** 2
        weight = DECAY * weight + 1 - DECAY
        found.append(turned(turned(m, sides) / np.sqrt(squares / weight + DAMPING), sides, inverse=True))
    return np.stack(found)


def averaged(gradients, decay):
    """The average of the gradient so far, at every step, free of its start at zero."""
    total, found = 0.0, []
    for t, gradient in enumerate(np.asarray(gradients, np.float64)):
        total = decay * total + (1 - decay) * gradient
        found.append(total / (1 - decay ** (t + 1)))
    return np.stack(found)


# What is tested -------------------------------------------------------------------------------------------------------


def updates_of(tx, gradients):
    """The updates of all steps."""

    def step(state, gradient):
        return tx.update(gradient, state)[::-1]

    start = tx.init(jax.tree.map(lambda leaf: leaf[0], gradients))
    return jax.jit(lambda start, gradients: lax.scan(step, start, gradients)[1])(start, gradients)


def drifting(*shape, seed=0, dtype="float64"):
    """Gradients [T, *shape] whose large entries wander from one end of every mode to the other."""
    gradients = np.array(normal(STEPS, *shape, seed=seed, dtype="float64"))
    for mode, size in enumerate(shape):
        place = np.linspace(-1, 1, size)
        gain = np.exp(np.linspace(-1, 1, STEPS)[:, None] * place)
        gradients *= gain.reshape((STEPS, *(size if axis == mode else 1 for axis in range(len(shape)))))
    return jnp.asarray(gradients, dtype)


def of_kernel(gradients, **settings):
    """The directions of one array."""
    return updates_of(ng.scale_by_soap(**SETTINGS | settings), {"kernel": gradients})["kernel"]


# Step by step ---------------------------------------------------------------------------------------------------------


def assert_follows(found, expected):
    """Equal at every step; the first one in single precision but for the rounding of what should be zero.

    The basis of one gradient makes that gradient diagonal. What rounding leaves beside the diagonal is divided by the
    root of the damping, 1e-3.
    """
    first, gate = {"float64": (1e-9, None), "float32": (2e-2, None)}[str(found.dtype)]
    assert_equal(found[0], expected[0], first)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert_equal(ours, theirs, gate)


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["qr", "eigh"])
def test_it_follows_its_definition_and_c41_the_scale_moves_with_its_basis(dtype, refresh):
    gradients = drifting(5, 4, dtype=dtype)
    found = of_kernel(gradients, refresh=refresh)
    assert_follows(found, soap_by_definition(gradients, refresh=refresh))
    assert_differs(found, soap_by_definition(gradients, refresh=refresh, move=False))
    assert_differs(found, soap_by_definition(gradients, refresh={"qr": "eigh", "eigh": "qr"}[refresh]))

    gradients = drifting(5, 4)
    found = of_kernel(gradients)
    assert_differs(found, soap_by_definition(gradients, full=(False, False)))
    assert_differs(found, of_kernel(gradients.swapaxes(1, 2)[:, :, :4])[..., :4] if False else -found)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({}, (4, 3, 11)),
        ({"kernels": "matrix"}, (12, 11)),
        ({"kernels": "all"}, (2, 2, 3, 11)),
        ({"kernels": "all", "merge": 6}, (4, 3, 11)),
    ],
    ids=["default", "matrix", "all", "merge"],
)
def test_a_convolution_has_the_modes_that_are_asked_for(settings, modes):
    gradients = drifting(2, 2, 3, 11)
    found, expected = (
        of_kernel(gradients, **AFRESH, **settings),
        soap_by_definition(gradients.reshape(STEPS, *modes), **AFRESH),
    )
    assert_follows(found.reshape(expected.shape), expected)
    others = soap_by_definition(gradients.reshape(STEPS, *((12, 11) if len(modes) == 3 else (4, 3, 11))), **AFRESH)
    assert_differs(found, others.reshape(found.shape))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_groups_of_a_convolution_have_bases_of_their_own_if_its_layer_is_known():
    model, x = nn.Conv(4, (2, 2), feature_group_count=2, use_bias=False), normal(1, 3, 3, 4)
    capture, gradients = ng.linen.capture(model, ng.losses.squared_error), drifting(2, 2, 2, 4)
    layers = capture.layers({"params": {"kernel": gradients[0]}}, x)
    found = updates_of(ng.scale_by_soap(layers, **SETTINGS, **AFRESH), {"kernel": gradients})["kernel"]
    for outputs in (slice(0, 2), slice(2, 4)):
        group = gradients[..., outputs].reshape(STEPS, 4, 2, 2)
        assert_follows(found[..., outputs].reshape(group.shape), soap_by_definition(group, **AFRESH))
    assert_differs(found.reshape(STEPS, 4, 2, 4), soap_by_definition(gradients.reshape(STEPS, 4, 2, 4), **AFRESH))


@pytest.mark.usefixtures("x64")
def test_modes_of_one_entry_do_not_count():
    gradients = drifting(1, 1, 5, 4)
    assert_follows(of_kernel(gradients, **AFRESH)[:, 0, 0], soap_by_definition(gradients[:, 0, 0], **AFRESH))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_blocks_of_a_long_mode_are_arrays_by_themselves():
    gradients = drifting(5, 4)
    found = of_kernel(gradients, block_size=3)  # rows 3 + 2, columns 2 + 2
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 2), slice(2, 4)):
            assert_follows(found[:, rows, columns], soap_by_definition(gradients[:, rows, columns]))
    assert_differs(found, soap_by_definition(gradients))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_mode_that_is_too_long_keeps_its_coordinates():
    gradients = drifting(6, 4)
    found = of_kernel(gradients, max_factor_dim=5, **AFRESH)
    assert_follows(found, soap_by_definition(gradients, full=(False, True), **AFRESH))
    assert_differs(found, soap_by_definition(gradients, **AFRESH))


# Vectors --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_vector_is_adams_however_small_some_of_its_entries_are(dtype):
    gradients = {"bias": normal(STEPS, 5, dtype=dtype) * 10.0 ** -(jnp.arange(5, dtype=dtype) ** 2)}
    tx = ng.scale_by_soap(damping=1e-30, decay=DECAY)
    found = updates_of(tx, gradients)["bias"]
    assert_equal(found, updates_of(optax.scale_by_adam(0.0, DECAY, eps=0.0, eps_root=1e-30), gradients)["bias"])


@pytest.mark.usefixtures("x64")
def test_on_vectors_the_complete_optimizer_is_adam():
    gradients = {"bias": normal(STEPS, 5), "scale": normal(STEPS, 3, seed=1)}
    found = updates_of(ng.soap(0.1, damping=DAMPING, kl_clip=None), gradients)
    expected = updates_of(optax.adam(0.1, 0.95, 0.95, eps=0.0, eps_root=DAMPING), gradients)
    jax.tree.map(assert_equal, found, expected)
    jax.tree.map(assert_differs, found, updates_of(optax.adam(0.1, 0.5, 0.95), gradients))


@pytest.mark.full
def test_the_direction_of_zeros_is_zero_also_without_damping():
    gradients = {"bias": normal(2, 4, dtype="float32").at[:, 1].set(0.0), "kernel": jnp.zeros((2, 3, 4))}
    found = updates_of(ng.scale_by_soap(damping=0.0, **AFRESH), gradients)
    np.testing.assert_array_equal(found["kernel"], 0.0)
    assert jnp.all((found["bias"] == 0) == (gradients["bias"] == 0)) and jnp.all(jnp.isfinite(found["bias"]))


# What stands in front -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_average_of_the_gradient_stands_in_front_and_the_statistics_are_of_the_gradient_itself():
    gradients = drifting(5, 4)
    found = updates_of(ng.soap(0.1, momentum=0.95, **SETTINGS, kl_clip=None), {"kernel": gradients})["kernel"]
    smooth = averaged(gradients, 0.95)
    assert_follows(found, -0.1 * soap_by_definition(gradients, smooth))
    assert_differs(found, -0.1 * soap_by_definition(smooth))

    chain = optax.chain(optax.ema(0.95), ng.scale_by_soap(**SETTINGS), optax.scale_by_learning_rate(0.1))

    def told(updates, state, params=None):
        return chain.update(updates, state, params, gradient=updates)

    by_hand = updates_of(optax.GradientTransformation(chain.init, told), {"kernel": gradients})["kernel"]
    assert_equal(by_hand, found)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_chain_that_is_not_told_the_gradient_takes_the_statistics_of_what_comes_in():
    gradients = drifting(5, 4)
    chain = optax.chain(optax.ema(0.95), ng.scale_by_soap(**SETTINGS, **AFRESH))
    found = updates_of(chain, {"kernel": gradients})["kernel"]
    smooth = averaged(gradients, 0.95)
    assert_follows(found, soap_by_definition(smooth, **AFRESH))
    assert_differs(found, soap_by_definition(gradients, smooth, **AFRESH))


# What the statistics are of -------------------------------------------------------------------------------------------


MODEL = reference.MLP(widths=(4,))


@cache
def problem():
    x = normal(8, 4, seed=3)
    params = reference.random_params(MODEL, x)
    capture = ng.linen.capture(MODEL, ng.losses.squared_error, labels="true")
    return capture, params, x, reference.targets("squared_error", (8, 4))


def trained(layers, **settings):
    """Where six steps lead, as a function of the damping."""
    capture, params, x, y = problem()
    known = capture.layers({"params": params}, x) if layers else None

    @jax.jit
    def run(damping):
        tx = ng.soap(0.05, known, **SETTINGS | AFRESH | settings | {"damping": damping}, kl_clip=None)

        def step(carry, _):
            params, state = carry
            out = capture.value_and_grad({"params": params}, x, y)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), None

        last = lax.scan(step, (params, tx.init(params)), None, length=6)[0][0]
        moved = jax.tree.map(lambda new, old: (new - old).ravel(), last, params)
        return jnp.concatenate(jax.tree.leaves(moved))

    return run


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_true_labels_give_the_statistics_of_the_gradient_with_layers_or_without():
    of_gradient = trained(layers=False)
    expected = of_gradient(1e-3)
    assert_equal(trained(layers=True)(1e-3), expected)
    for layers in (True, False):
        assert_equal(trained(layers=layers, statistics="curvature")(1e-3), expected)
    assert error(of_gradient(1e-3 / 8), expected) > 0.01  # other units would show


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_rounding_in_null_directions_of_the_first_gradients_is_not_amplified():
    left, right = (
        np.linalg.norm(v) ** -1 * v for v in (np.asarray(normal(n, seed=n, dtype="float32")) for n in (48, 64))
    )
    outer = np.outer(left, right)
    found = of_kernel(jnp.broadcast_to(outer, (STEPS, 48, 64)), damping=1e-16)
    for update in found:
        assert_equal(left @ update @ right, 1.0, 1e-3)
        assert np.linalg.norm(update - outer) < 0.1
    q, r = (np.linalg.eigh(moment)[1] for moment in (outer @ outer.T, outer.T @ outer))
    inside = q.T @ outer @ r
    plain = q @ (inside / np.sqrt(inside**2 + np.float32(1e-16))) @ r.T
    assert np.linalg.norm(plain - outer) > 1.0


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_it_is_the_same_in_a_scan_and_step_by_step_and_again():
    gradients = {"kernel": drifting(5, 4), "bias": normal(STEPS, 4)}
    tx = ng.soap(0.1, **SETTINGS, kl_clip=None)
    start, update = tx.init(jax.tree.map(lambda leaf: leaf[0], gradients)), jax.jit(tx.update)

    def by_hand():
        state, found = start, []
        for t in range(STEPS):
            updates, state = update(jax.tree.map(lambda leaf, t=t: leaf[t], gradients), state)
            found.append(updates)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    found, scanned = by_hand(), updates_of(tx, gradients)
    jax.tree.map(np.testing.assert_array_equal, by_hand(), found)
    jax.tree.map(assert_equal, scanned, found)
    jax.tree.map(assert_differs, jax.tree.map(lambda leaf: leaf[::-1], scanned), found)
