"""A learning rate found by search; solves that fall back to eigenvalues; tests at the floor of the precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_differs, assert_equal, normal

import natgrad_jax as ng
from natgrad_jax.algebra import stacks
from natgrad_jax.around.search import LENGTHS, LONGEST

pytestmark = pytest.mark.usefixtures("x64")


def apply(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def problem():
    """A function with parameters, inputs and targets."""
    return {"w": normal(3, 4), "v": normal(4, 1, seed=1)}, normal(6, 3, seed=2), normal(6, 1, seed=3)


@pytest.fixture(scope="module")
def searched():
    """One step of TENGraD by search, without and with the momentum of SPRING, and of the direction alone."""
    with jax.enable_x64(True):
        p, x, y = problem()
        capture = ng.capture(apply, ng.losses.squared_error)
        layers, settings = capture.layers(p, x), {"blocks": "joint", "refresh_every": 1}
        kinds = {
            "search": ng.tengrad("search", layers, damping=1e-3, weight_decay=0.1, **settings),
            "spring": ng.tengrad("search", layers, damping=1e-3, momentum="spring", **settings),
            "direction": ng.scale_by_tengrad(layers, damping=1e-3 + 0.1, **settings),
        }

        @jax.jit
        def step(p, states):
            out = capture.value_and_grad(p, x, y)
            pulled = jax.tree.map(lambda g, leaf: g + 0.1 * leaf, out.grad, p)
            given = {name: pulled if name == "direction" else out.grad for name in kinds}
            return out.value, {n: tx.update(given[n], states[n], p, curvature=out.curvature) for n, tx in kinds.items()}

        value, found = step(p, {name: tx.init(p) for name, tx in kinds.items()})
        yield p, x, y, value, found, step


def test_the_step_is_the_length_of_the_grid_with_the_least_loss(searched):
    p, x, y, _, found, _ = searched
    direction, (step, state) = found["direction"][0], found["search"]

    @jax.jit
    def objective(length):
        at = jax.tree.map(lambda leaf, u: leaf - length * u, p, direction)
        return jnp.mean((apply(at, x) - y) ** 2) / 2 + 0.05 * sum(jnp.sum(leaf**2) for leaf in at.values())

    lengths = LONGEST * 0.5 ** np.arange(LENGTHS)
    best = lengths[int(np.argmin([objective(length) for length in lengths]))]
    assert_equal(state.learning_rate, np.float32(best))
    assert objective(best) < objective(0.0) and state.rejected == 0
    for name in p:
        assert_equal(step[name], -best * direction[name], 1e-7)
        assert_differs(step[name], -2 * best * direction[name])


def test_a_loss_by_search_with_spring_never_rises(searched):
    p, *_, found, step = searched
    states, losses = {name: state for name, (_, state) in found.items()}, []
    for _ in range(5):
        value, found = step(p, states)
        losses.append(float(value))
        p = jax.tree.map(jnp.add, p, found["spring"][0])
        states = {name: state for name, (_, state) in found.items()} | {"search": states["search"]}
    assert all(after <= before for before, after in itertools.pairwise(losses)) and losses[-1] < losses[0]


@pytest.mark.full
def test_no_length_that_lowers_the_loss_is_no_step():
    p, x, y = problem()
    capture = ng.capture(apply, ng.losses.squared_error)
    tx = ng.tengrad("search", capture.layers(p, x), damping=1e-3, blocks="joint")
    out = capture.value_and_grad(p, x, y)
    uphill = jax.tree.map(jnp.negative, out.grad)
    step, state = jax.jit(lambda g: tx.update(g, tx.init(p), p, curvature=out.curvature))(uphill)
    assert state.rejected == 1 and state.learning_rate == 0 and not any(jnp.any(leaf) for leaf in step.values())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_rate": "search", "kl_clip": 1e-3}, "found by search"),
        ({"learning_rate": "search", "damping": ng.adaptive_damping()}, "quadratic model"),
        ({"learning_rate": "search", "momentum": "quadratic"}, "quadratic model"),
        ({"learning_rate": "quadratic", "momentum": "spring", "damping": 0.1}, "takes back a step"),
    ],
)
def test_settings_that_exclude_search_or_spring_are_refused(settings, match):
    p, x, _ = problem()
    with pytest.raises(ValueError, match=match):
        ng.tengrad(layers=ng.capture(apply, ng.losses.squared_error).layers(p, x), **settings)


def test_an_indefinite_kernel_is_factorised_by_its_eigenvalues_and_counted():
    rotation = np.linalg.qr(np.asarray(normal(5, 5)))[0]
    values = np.array([[1.0, 2, 3, 4, -0.5], [1.0, 2, 3, 4, 0.5]])
    kernels = jnp.asarray(np.einsum("ij,sj,kj->sik", rotation, values, rotation))
    factor, failed = jax.jit(stacks.cholesky_or_eigh)(kernels, jnp.array([0.1, 0.1]))
    assert failed.tolist() == [True, False]
    expected = np.einsum("ij,sj,kj->sik", rotation, np.maximum(values, 0) + 0.1, rotation)
    assert_equal(jnp.einsum("sij,skj->sik", factor, factor), expected)
    assert_equal(factor, jnp.tril(factor))
    assert not jnp.all(jnp.isfinite(stacks.cholesky(stacks.plus_identity(kernels, jnp.array([0.1, 0.1])))))
    found = stacks.cholesky_solve(factor, jnp.ones((2, 5)))
    assert_equal(found, np.linalg.solve(expected, np.ones((2, 5, 1)))[..., 0])
