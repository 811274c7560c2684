"""A basis of r vectors and a mean for the rest: against the dense matrix that it stands for."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import Walk, ekfac_block, kfac_block, tekfac_block, tkfac_block
from reference import assert_differs, assert_equal, error, normal
from watching import pairs

import natgrad_jax as ng
from natgrad_jax.algebra import stacks, truncated
from natgrad_jax.algebra.moments import example_moments, moments_in, second_moment

pytestmark = pytest.mark.usefixtures("x64")
EXACT = 1e-10
"""Relative error where nothing is left out: that of a block iteration that has converged, in float64."""


def rotation(size, seed=0):
    return np.linalg.qr(np.asarray(normal(size, size, seed=seed)))[0]


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    basis = rotation(len(values), seed)
    return jnp.asarray(basis * np.asarray(values) @ basis.T)


def completed(side, seed=9):
    """Columns [n, r], and behind them n - r others that make them an orthogonal matrix."""
    whole = np.linalg.qr(np.concatenate([side, normal(len(side), len(side) - side.shape[1], seed=seed)], axis=1))[0]
    whole[:, : side.shape[1]] = side
    return whole


def settled(moment, rank, steps=200, stack=()):
    """What block iteration comes to with a moment that stays."""
    begin = truncated.emptied(truncated.start(stack, moment.shape[-1], rank, "float64"))
    once = partial(truncated.combined, new=moment, weights=(0.5, 0.5))
    return jax.jit(lambda old: jax.lax.fori_loop(0, steps, lambda _, old: once(old), old))(begin)


def dense(factor):
    return stacks.times(factor, jnp.eye(factor.vectors.shape[-2]))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_that_of_the_dropped_eigenvalues_from_their_mean_and_the_trace_is_kept(rank):
    values = 2.0 ** -np.arange(8)
    moment, tail = matrix(values), values[rank:]
    found = settled(moment, rank)
    distance = np.linalg.norm(dense(found) - moment)
    assert abs(distance - np.linalg.norm(tail - tail.mean())) < EXACT
    assert distance <= np.linalg.norm(tail) + EXACT
    assert abs(stacks.trace(found) - values.sum()) < EXACT
    any_basis = stacks.Truncated(jnp.asarray(rotation(8, 3)[:, :rank]), *found[1:])
    assert np.linalg.norm(dense(any_basis) - moment) > 2 * np.linalg.norm(tail)  # vectors count


@pytest.mark.full
def test_a_stack_is_done_as_each_of_its_matrices():
    moments = jnp.stack([matrix(2.0 ** -np.arange(6)), matrix(3.0 ** -np.arange(6), seed=1)])
    found = settled(moments, 2, stack=(2,))
    for index, moment in enumerate(moments):
        assert_equal(dense(jax.tree.map(lambda leaf, index=index: leaf[index], found)), dense(settled(moment, 2)))


def test_a_direction_that_the_first_batches_do_not_show_is_found():
    old = settled(matrix([1, 1e-2, 0, 0, 0, 0]), 2)
    sudden = jnp.zeros((6, 6)).at[4, 4].set(9.0) + 1e-3 * matrix(np.ones(6))
    found = jax.lax.fori_loop(0, 60, lambda _, old: truncated.combined(old, sudden, (0.5, 0.5)), old)
    assert abs(found.values[-1] - 9.001) < 1e-6


@pytest.mark.full
def test_products_stand_in_for_the_moment_where_they_take_fewer_flops():
    rows, weights = normal(50, 20), jnp.arange(50.0)
    few, many = (second_moment(rows, weights, rank=rank) for rank in (2, 15))
    assert isinstance(few, truncated.Moment) and many.shape == (20, 20)
    old = truncated.emptied(truncated.start((), 20, 2, "float64"))
    by_products, by_matrix = (truncated.combined(old, moment, (0.9, 0.1)) for moment in (few, many))
    assert_equal(dense(by_products), dense(by_matrix))


@pytest.mark.full
@pytest.mark.parametrize("sides", ["both", "rows", "one whole", "none"])
def test_coordinates_are_weighted_as_those_of_the_whole_basis_with_one_weight_for_the_rest(sides):
    u, v = rotation(6)[:, :2], rotation(5, 1)[:, :3]
    u, v = {"both": (u, v), "rows": (u, None), "one whole": (rotation(6), v), "none": (None, rotation(5))}[sides]
    x = normal(2, 6, 5, seed=3)
    whole = [np.eye(n) if side is None else completed(side) for side, n in ((u, 6), (v, 5))]
    places = [
        np.minimum(np.arange(n), truncated.coordinates(side, n) - 1) for side, n in ((u, 6), (v, 5))
    ]  # the rest is one entry, the last
    weights = 1 + normal(*(place.max() + 1 for place in places), seed=4) ** 2
    spread = np.asarray(weights)[np.ix_(*places)]
    coordinates = np.einsum("ij,sik,kl->sjl", whole[0], x, whole[1])
    assert_equal(
        truncated.filtered(x, (u, v), weights), np.einsum("ij,sjl,kl->sik", whole[0], spread * coordinates, whole[1])
    )
    sums = np.zeros((2, *weights.shape))
    for place, square in zip(np.ndindex(6, 5), np.moveaxis(coordinates**2, 0, -1).reshape(30, 2), strict=True):
        sums[:, places[0][place[0]], places[1][place[1]]] += square
    number = np.outer(*(np.bincount(place) for place in places))
    assert_equal(truncated.squares(x, (u, v)), sums / number)
    total = truncated.sums(truncated.squares(x, (u, v)), (u, v), (6, 5), axes=(0, 1))
    assert_equal(total[:, 0, 0], np.sum(np.asarray(x) ** 2, axis=(1, 2)))


@pytest.mark.full
@pytest.mark.parametrize("positions", [1, 4])
def test_second_moments_of_examples_in_the_basis_are_those_of_their_gradients(positions):
    a, g = normal(2, 7, positions, 6), normal(2, 3, 7, positions, 5, seed=1)
    sides = tuple(jnp.stack([jnp.asarray(rotation(n, seed)[:, :2]) for seed in (4, 5)]) for n in (6, 5))
    found = moments_in(sides, a, g, most=100)
    d = jnp.einsum("snti,sknto->sknio", a, g)
    assert_equal(found, jnp.sum(truncated.squares(d, sides), axis=(1, 2)) / 3)
    assert_equal(moments_in((None, None), a, g), example_moments(a, g))


def test_moments_are_carried_to_another_basis_as_the_mean_of_a_diagonal_is():
    old, new = rotation(6)[:, :2], rotation(6, 1)[:, :2]
    scale = jnp.array([5.0, 2.0, 0.5])
    whole = completed(old) @ np.diag([5.0, 2.0] + [0.5] * 4) @ completed(old).T
    in_new = np.diag(completed(new).T @ whole @ completed(new))
    assert_equal(scale @ truncated.turn(old, new), np.array([*in_new[:2], in_new[2:].mean()]))


SHARE = 0.8  # of sizes of 4 to 7: all vectors but one
METHODS = {
    "kfac pi": partial(kfac_block, 0.0),
    "kfac exact": partial(kfac_block, 0.0, "exact"),
    "ekfac": partial(ekfac_block, 0.0),
    "ekfac pi": partial(ekfac_block, 0.0, split="pi"),
    "ekfac minibatch": partial(ekfac_block, 0.0, "minibatch"),
    "tkfac": partial(tkfac_block, 0.0, "exact"),
    "tekfac": partial(tekfac_block, 0.0),
}


def rows(examples=9):
    """Rows whose second moments have eigenvalues far apart, as layer and evidence."""
    widths = [2.0 ** -jnp.arange(size) for size in (6, 5)]
    return pairs(*(normal(examples, len(width), seed=seed) * width for seed, width in enumerate(widths)))


def direction(walk: Walk, layer, evidence, damping=0.01, observations=200):
    """What a method makes of a gradient once its statistics are of one batch alone."""

    @jax.jit
    def run(gradient):
        state = jax.lax.fori_loop(0, observations, lambda _, s: walk.observe(layer, s, evidence), walk.init(layer))
        state = walk.refresh(layer, state, damping)
        state = walk.rescale(layer, state, evidence) if walk.method.rescale else state
        return walk.apply(layer, state, gradient, damping)

    return run(normal(*layer.shape, seed=5))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_is_exact_with_all_vectors_but_one_and_differs_with_two(method):
    layer, evidence = rows()
    whole = direction(method(), layer, evidence)
    assert_equal(direction(method(rank=SHARE), layer, evidence), whole, EXACT)
    assert error(direction(method(rank=2), layer, evidence), whole) > 1e-3
    assert_equal(direction(method(rank=99), layer, evidence, observations=1), whole, EXACT)


TENSORS = {
    "shampoo": partial(ng.scale_by_shampoo, damping=1e-3),
    "shampoo coupled": partial(ng.scale_by_shampoo, damping=1e-3, coupled=True),
    "shampoo newton": partial(ng.scale_by_shampoo, damping=1e-3, root="newton"),
    "soap qr": partial(ng.scale_by_soap, damping=1e-3),
    "soap eigh": partial(ng.scale_by_soap, damping=1e-3, refresh="eigh"),
}


def steps(method, count, rank, shape=(5, 4), every=1):
    """The last direction after some steps on gradients that come round."""
    widths = jnp.einsum("i,j->ij", *(2.0 ** -jnp.arange(size) for size in shape))
    tx = method(statistics="gradient", statistics_every=1, refresh_every=every, decay=0.5, rank=rank)
    gradient = normal(*shape) * widths

    def step(state, _):
        updates, state = tx.update({"w": gradient}, state)
        return state, updates["w"]

    return jax.jit(lambda state: jax.lax.scan(step, state, length=count)[1][-1])(tx.init({"w": gradient}))


@pytest.mark.full
@pytest.mark.parametrize("method", TENSORS.values(), ids=TENSORS)
def test_a_method_of_tensors_is_exact_with_all_vectors_but_one_and_differs_with_one(method):
    count = 1000 if method.keywords.get("coupled") else 100  # what is whitened comes to rest more slowly
    whole = steps(method, count, None)
    assert_equal(steps(method, count, SHARE), whole, 1e-8)  # singular values of one gradient: squares near rounding
    assert_differs(steps(method, count, 1), whole)


def test_the_state_grows_with_the_size_of_a_side_and_no_longer_with_its_square():
    layers = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error).layers(
        {"w": jnp.zeros((400, 300))}, jnp.zeros((2, 400))
    )
    for method, arrays in ((ng.scale_by_kfac, 2), (ng.scale_by_ekfac, 2)):
        held = layers.bytes(method(layers, damping=0.1, rank=10))
        assert held < layers.bytes(method(layers, damping=0.1)) / 10
        vectors = arrays * 8 * 10 * (400 + 300)
        assert vectors <= held < 1.1 * vectors


def test_the_report_of_a_method_says_which_vectors_a_layer_keeps():
    layers = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error).layers(
        {"w": jnp.zeros((40, 30))}, jnp.zeros((2, 40))
    )
    _, line, whole = layers.report(ng.kfac(0.1, layers, rank=10, max_factor_dim=35)).splitlines()
    assert re.split(r"\s\s+", line) == ["w", "diagonal of 40, 10 of 30", "2.8 kB", "2.8 kB"]
    assert whole.startswith("(whole state, momentum included: ")
    assert "40, 30" in layers.report(ng.kfac(0.1, layers))


@pytest.mark.parametrize("method", [ng.scale_by_kfac, ng.scale_by_tkfac, ng.scale_by_shampoo])
def test_a_diagnosis_has_the_eigenvalues_of_truncated_factors(method):
    layers = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error).layers(
        {"w": jnp.zeros((4, 3))}, jnp.zeros((2, 4))
    )
    state = method(layers, damping=0.1, rank=2).init({"w": jnp.zeros((4, 3))})

    def filled(leaf):
        if not isinstance(leaf, stacks.Truncated):
            return jnp.ones_like(leaf)
        return leaf._replace(values=jnp.array([2.0, 5.0]), rest=jnp.array(0.5))

    full = jax.tree.map(filled, state.statistics, is_leaf=lambda leaf: isinstance(leaf, stacks.Truncated))
    row = ng.diagnose(state._replace(statistics=full), layers)
    power = 1 if method is ng.scale_by_shampoo else 2  # of a factor, or of the product of both
    trace = 8.0 if method is ng.scale_by_tkfac else 1.0  # both traces share the root of that of the block
    name = next(iter(state.statistics))
    assert row[f"{name}/largest"] == pytest.approx(5.0**power / trace)
    assert row[f"{name}/smallest"] == pytest.approx(0.5**power / trace)


@pytest.mark.parametrize("wrong", [0, 1.0, -0.5, 2.5, "some", jnp.int32(3), True])
def test_a_rank_that_is_none_is_refused_in_a_sentence(wrong):
    with pytest.raises((TypeError, ValueError), match="`rank` is"):
        ng.scale_by_shampoo(damping=0.1, rank=wrong)


def test_a_rank_is_a_number_a_share_or_a_word():
    kept = {rank: truncated.Kept(None, rank).vectors(1000) for rank in (7, 0.25, "auto", None, 1000)}
    assert kept == {7: 7, 0.25: 250, "auto": 125, None: None, 1000: None}
    assert truncated.Kept(None, "auto").vectors(100) == 32 and truncated.Kept(None, "auto").vectors(32) is None


@pytest.mark.full
def test_a_truncated_optimizer_learns():
    def model(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    x, y = normal(32, 12), normal(32, 3, seed=1)
    params = {"a": 0.3 * normal(12, 10), "b": 0.3 * normal(10, 3)}
    capture = ng.capture(model, ng.losses.squared_error)
    tx = ng.ekfac(0.05, capture.layers(params, x), rank=3, damping=0.1)

    def step(carry, key):
        params, state = carry
        out = capture.value_and_grad(params, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return (optax.apply_updates(params, updates), state), out.value

    keys = jax.random.split(jax.random.key(0), 40)
    losses = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[1])((params, tx.init(params)))
    assert losses[-1] < 0.5 * losses[0]
