"""Refreshes in parts: what all parts make together is what one refresh makes, and no part holds all of the work."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_table import inner_jaxprs, measured, task

import natgrad_jax as ng
from natgrad_jax.algebra import panels, sweeps
from natgrad_jax.algebra.eigenbasis import iterated
from natgrad_jax.algebra.stacks import Diagonal, Truncated, damped_inverse
from natgrad_jax.lift import turns
from natgrad_jax.methods.kfac import KFAC

SIZES = [(7, 3), (60, 10), (61, 10), (5, 10), (9, 2)]
"""Sizes of a side, and parts: with and without a block that is not full, or fewer columns than parts."""


def moment(size, rank=None, copies=2, dtype=None):
    rows = np.random.default_rng(size).normal(size=(copies, size, rank or 2 * size))
    return jnp.asarray(rows @ rows.swapaxes(1, 2) / rows.shape[-1], dtype or float)


def inverse_in_parts(matrix, damping, parts, leave_out=None):
    size = matrix.shape[-1]

    def sweep(work, part):
        new = sweeps.sweep(work, size, part, parts)
        return new if leave_out is None else jnp.where(part == leave_out, work, new), None

    work = jax.lax.scan(sweep, sweeps.begin(matrix, damping, parts), jnp.arange(parts))[0]
    return sweeps.end(work, size)


@pytest.mark.parametrize(("size", "parts"), SIZES)
def test_all_sweeps_together_are_the_inverse(size, parts):
    with jax.enable_x64(True):
        matrix, damping = moment(size), jnp.array([0.01, 0.1])
        expected = np.linalg.inv(np.asarray(matrix) + np.asarray(damping)[:, None, None] * np.eye(size))
        found = jax.jit(partial(inverse_in_parts, parts=parts))(matrix, damping)
        assert np.allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
        fewer = jax.jit(partial(inverse_in_parts, parts=parts, leave_out=1))(matrix, damping)
        assert not np.allclose(fewer, expected, rtol=1e-2)


def test_sweeps_are_as_exact_as_cholesky():
    """Of condition 1e6 in float32, in the norm that the condition bounds."""
    size, parts = 90, 9
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    exact = (basis * np.geomspace(1, 1e-6, size)) @ basis.T
    expected = (basis * (1 / (np.geomspace(1, 1e-6, size) + 2e-6))) @ basis.T
    matrix, damping = jnp.asarray(exact[None], jnp.float32), jnp.full(1, 2e-6, jnp.float32)
    errors = [
        np.linalg.norm(np.asarray(found[0], np.float64) - expected)
        for found in (jax.jit(partial(inverse_in_parts, parts=parts))(matrix, damping), damped_inverse(matrix, damping))
    ]
    assert errors[0] < 3 * errors[1] and errors[0] < 0.1 * np.linalg.norm(expected)


def test_a_block_that_has_all_of_the_rank_leaves_the_rest_positive():
    """The block is ill-conditioned then, and what it leaves is the damping alone."""
    size, rank, damping = 200, 20, jnp.zeros(1)
    rows = np.random.default_rng(420).normal(size=(size, rank))
    matrix = jnp.asarray(rows @ rows.T / rank, jnp.float32)[None]
    damped = np.asarray(sweeps.begin(matrix, damping, 1), np.float64)
    expected = np.linalg.inv(damped)
    for parts in (10, 40):
        found = jax.jit(partial(inverse_in_parts, parts=parts))(matrix, damping)
        assert np.linalg.norm(np.asarray(found, np.float64) - expected) < 0.05 * np.linalg.norm(expected)


def test_what_is_not_positive_definite_is_not_finite():
    matrix = jnp.diag(jnp.array([1.0, 2.0, -3.0, 4.0]))[None]
    assert not jnp.all(jnp.isfinite(inverse_in_parts(matrix, jnp.zeros(1), 2)))


def test_factors_that_are_no_matrix_are_inverted_at_once():
    damping = jnp.full(2, 0.5)
    truncated = Truncated(jnp.broadcast_to(jnp.eye(5)[:, :2], (2, 5, 2)), jnp.ones((2, 2)), jnp.full(2, 0.1))
    for factor in (Diagonal(jnp.arange(8.0).reshape(2, 4)), truncated):
        size = 4 if isinstance(factor, Diagonal) else 5
        work = sweeps.sweep(sweeps.begin(factor, damping, 3), size, jnp.int32(0), 3)
        expected = damped_inverse(factor, damping)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, sweeps.end(work, size), expected))


@partial(jax.jit, static_argnums=3)
def basis_in_parts(side, moments, scale, parts):
    """The basis and the scale after a period; a moment for each part."""

    def proceed(work, each):
        part, moment = each
        return panels.proceed(work, (side, None), (moment, None), part, parts), None

    last = moments[-1]
    work = panels.begin((side, None), (last, None), scale, parts)
    work = jax.lax.scan(proceed, work, (jnp.arange(parts), moments))[0]
    (found, _), moved = panels.end(work, (side, None), (last, None), scale)
    return found, moved, panels.values(work[0], last)


def old_basis(size, copies=2):
    matrices = np.random.default_rng(1).normal(size=(copies, size, size))
    return jnp.asarray(np.linalg.qr(matrices)[0])


@pytest.mark.parametrize(("size", "parts"), SIZES)
def test_all_panels_together_are_a_step_of_orthogonal_iteration(size, parts):
    with jax.enable_x64(True):
        matrix, side = moment(size), old_basis(size)
        along = jnp.einsum("sij,sik,skj->sj", side, matrix, side)
        expected, order = iterated(side, matrix)
        moments = jnp.broadcast_to(matrix, (parts, *matrix.shape))
        found, moved, values = basis_in_parts(side, moments, along[..., None], parts)
        agreement = np.abs(np.einsum("sij,sij->sj", found, expected))
        assert np.allclose(agreement, 1, atol=1e-9)
        assert np.allclose(moved[..., 0], np.take_along_axis(np.asarray(along), np.asarray(order), axis=-1))
        assert np.allclose(values, np.einsum("sij,sik,skj->sj", found, matrix, found))
        other = basis_in_parts(side, moments, -along[..., None], parts)[0]  # the smallest first
        assert np.min(np.abs(np.einsum("sij,sij->sj", other, expected))) < 0.9


@pytest.mark.parametrize("kind", ["whole", "of low rank", "zero", "that changes"])
def test_panels_are_orthogonal_whatever_the_moment_is(kind):
    size, parts = 61, 10
    matrix = {"of low rank": moment(size, 3), "zero": jnp.zeros((2, size, size))}.get(kind, moment(size))
    change = jnp.arange(1.0, parts + 1) if kind == "that changes" else jnp.zeros(parts)
    moments = (matrix + change[:, None, None, None] * moment(size, 4)).astype(jnp.float32)
    side, scale = old_basis(size).astype(jnp.float32), jnp.ones((2, size, 1), jnp.float32)
    found = np.asarray(basis_in_parts(side, moments, scale, parts)[0], np.float64)
    assert np.allclose(found.swapaxes(1, 2) @ found, np.eye(size), atol=5e-6)


PERIOD, STEPS = 4, 13
METHODS = {
    "kfac": (ng.scale_by_kfac, {}),
    "kfac exact": (ng.scale_by_kfac, {"split": "exact"}),
    "kfac bfloat16": (ng.scale_by_kfac, {"factor_dtype": "bfloat16"}),
    "tkfac": (ng.scale_by_tkfac, {}),
    "ekfac": (ng.scale_by_ekfac, {"rescale_every": 1}),
    "ekfac qr": (ng.scale_by_ekfac, {"refresh": "qr", "estimator": "minibatch", "rescale_every": 1}),
    "tekfac": (ng.scale_by_tekfac, {"rescale_every": 1}),
    "soap": (ng.scale_by_soap, {"statistics": "curvature", "damping": 1e-2}),
}
SETTINGS = {"damping": 0.1, "statistics_every": 1, "refresh_every": PERIOD, "early_refresh": False, "rolling": True}


@pytest.fixture
def all_in_parts(monkeypatch):
    """Small layers, too, have their refreshes in parts, those that take more than the share of a step."""
    monkeypatch.setattr(turns, "LEAST", 0)


@cache
def stepping(method, **settings):
    """The transformation and a compiled step of it, of the state and the batches [T, ...] at a count."""
    make, own = METHODS[method]
    tx = make(task("mlp").layers, **SETTINGS | own | settings)

    @jax.jit
    def step(state, batches, t):
        gradient, evidence = jax.tree.map(lambda leaf: leaf[t % len(leaf)], batches)
        return tx.update(gradient, state, curvature=evidence)

    return tx, step


def trained(method, count=3, state=None, steps=STEPS, **settings):
    """Updates and states of each step."""
    tx, step = stepping(method, **settings)
    state, found = tx.init(task("mlp").variables["params"]) if state is None else state, []
    for t in range(steps):
        found.append(step(state, batches_of("mlp", count), t))
        state = found[-1][1]
    return found


@cache
def batches_of(where, count=3):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(measured(where, t) for t in range(count)))


@pytest.mark.parametrize("method", ["kfac", pytest.param("tkfac", marks=pytest.mark.full)])
def test_an_operator_is_that_of_the_statistics_of_a_period_before(method, all_in_parts):
    layers, found = task("mlp").layers, trained(method)
    whole = METHODS[method][0](layers, **SETTINGS | {"rolling": False})
    gradient = measured("mlp")[0]
    for name in layers:
        for t in (PERIOD, 2 * PERIOD):  # made of what was there at the end of step t - PERIOD
            expected = ng.refresh(whole, _without(found[t - PERIOD][1]), params=gradient).operators[name].value
            value, date = found[t][1].operators[name].value, found[t][1].operators[name].date
            assert int(date) == t
            for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
                assert np.allclose(one, other, rtol=2e-4, atol=2e-4 * np.abs(other).max())
            now = ng.refresh(whole, _without(found[t][1]), params=gradient).operators[name].value
            assert not jax.tree.all(jax.tree.map(partial(np.allclose, rtol=2e-2), value, now))
    assert int(found[-1][1].metrics.refreshes) == 1 + STEPS // PERIOD


def _without(state):
    return state._replace(operators={name: old._replace(underway=None) for name, old in state.operators.items()})


@pytest.mark.parametrize(
    "method", [name if name == "ekfac" else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
def test_updates_stay_near_those_of_whole_refreshes(method, all_in_parts):
    """Of batches that come again the statistics come to rest, and so do the operators."""
    rolled, whole = trained(method, 1, steps=41), trained(method, 1, steps=41, rolling=False)
    one, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each[-1][0])]) for each in (rolled, whole))
    gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(measured("mlp")[0])])

    def cosine(one, other):
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    assert cosine(one, other) > 0.999 > cosine(gradient, other)
    assert rolled[-1][1].metrics.rejected_refreshes == 0


@pytest.mark.parametrize(
    ("method", "early", "asked"),
    [
        pytest.param("kfac exact", False, 10, marks=pytest.mark.full),
        pytest.param("ekfac", False, 10, marks=pytest.mark.full),
        ("ekfac qr", True, None),
    ],
)
def test_whole_refreshes_on_the_way_drop_what_is_underway(method, early, asked, all_in_parts):
    """With statistics at rest every update is that of whole refreshes: no column has the moment of another."""

    def updates(rolling):
        tx, _ = stepping(method, rolling=rolling, early_refresh=early, damping=1e-2)
        gradient, evidence = measured("mlp")
        params = task("mlp").variables["params"]

        def step(state, t):
            def asked_for(state):
                return ng.refresh(tx, state, evidence, params=params)

            state = state if asked is None else jax.lax.cond(t == asked, asked_for, lambda state: state, state)
            found, state = tx.update(gradient, state, curvature=evidence)
            return state, (found, state.operators["Dense_1"].date)

        return jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS + 4)))(tx.init(params))[1]

    (rolled, date), (whole, _) = updates(True), updates(False)
    for one, other in zip(jax.tree.leaves(rolled), jax.tree.leaves(whole), strict=True):
        assert np.allclose(one, other, rtol=0.02, atol=0.02 * np.abs(other).max())
    dropped = PERIOD if early else 12
    assert int(date[dropped]) < dropped and int(date[-1]) == 4 * PERIOD


def factorised(jaxpr, within=()):
    """Sizes of the matrices that are factorised, and how many branches deep."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("cholesky", "eigh", "qr"):
            found.append((min(equation.invars[0].aval.shape[-2:]), len(within)))
        deeper = (*within, equation) if equation.primitive.name == "cond" else within
        for inner in inner_jaxprs(equation):
            found += factorised(inner, deeper)
    return found


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_part_factorises_matrices_of_its_share_alone(method, all_in_parts):
    make, settings = METHODS[method]
    layers, (gradient, evidence) = task("mlp").layers, measured("mlp")
    tx = make(layers, **SETTINGS | settings | {"refresh_every": 4})
    state = jax.eval_shape(tx.init, task("mlp").variables["params"])
    step = jax.make_jaxpr(lambda state: tx.update(gradient, state, curvature=evidence))(state)
    sides = {side for layer in layers.values() for side in layer.shape}
    shares = {sweeps.width(side, 4) for side in sides}
    sizes = {size for size, _ in factorised(step.jaxpr)}
    assert sizes <= sides | shares and shares <= sizes  # whole ones at the start


def test_a_bad_part_is_dropped_and_counted(all_in_parts):
    def stepped(state, steps):
        return trained("kfac", 3, state, steps)[-1][1]

    state = stepped(None, 2)
    name = next(name for name, old in state.operators.items() if old.underway is not None)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.operators[name].underway.work)
    old = state.operators[name]
    state = state._replace(operators={**state.operators, name: old._replace(underway=old.underway._replace(work=bad))})
    state = stepped(state, PERIOD - 1)
    assert int(state.metrics.rejected_refreshes) == 1 and int(state.operators[name].date) == 0
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.operators[name].value, old.value))
    state = stepped(state, PERIOD)  # the next one is made of the statistics again
    assert int(state.operators[name].date) == 2 * PERIOD and int(state.metrics.rejected_refreshes) == 1


def test_a_checkpoint_without_operators_begins_again(all_in_parts):
    tx, last = stepping("kfac")[0], trained("kfac", steps=7)[-1][1]
    light = ng.without_operators(last)
    assert not jax.tree.leaves([old.underway for old in light.operators.values()])
    state = ng.refresh(tx, light, params=task("mlp").variables["params"])
    assert jax.tree.structure(state) == jax.tree.structure(last)
    date = {name: int(old.date) for name, old in state.operators.items()}
    found = trained("kfac", 3, state, 3)[-1][1]
    assert {name: int(old.date) for name, old in found.operators.items()} == date  # nothing was begun: none is ended
    found = trained("kfac", 3, found, 4)[-1][1]
    assert all(int(old.date) == 12 for old in found.operators.values() if old.underway is not None)


def test_a_state_of_whole_refreshes_is_refused_and_a_refresh_completes_it(all_in_parts):
    (tx, _), (whole, _) = stepping("kfac"), stepping("kfac", rolling=False)
    (gradient, evidence), params = measured("mlp"), task("mlp").variables["params"]

    def step(state):
        return tx.update(gradient, state, curvature=evidence)[1]

    old = jax.eval_shape(whole.init, params)
    for state in (old, ng.without_operators(jax.eval_shape(tx.init, params))):
        with pytest.raises(ValueError, match=r"no `operators\['Dense_0'\].underway`.*ng.refresh"):
            jax.eval_shape(step, state)
    completed = jax.eval_shape(lambda state: step(ng.refresh(tx, state, evidence, params=params)), old)
    assert jax.tree.structure(completed) == jax.tree.structure(jax.eval_shape(tx.init, params))


def test_layers_within_their_share_take_turns_as_before():
    sizes = [(2000, 50), (300, 300), (300, 300), (40, 40)]
    layers = [ng.Layer(str(index), "dense", shape, ()) for index, shape in enumerate(sizes)]
    method = KFAC(damping=1.0).method(0.9)
    blocks = [turns.Block(layer, method) for layer in layers]
    found = turns.turns(blocks, turns.Schedule(1, 10, rolling=True))
    assert [block.layer.name for block in found.gradual] == ["0"]
    assert found.groups[-1] == found.gradual and len(found.steps) == len(found.groups) - 1 == 3
    assert turns.turns(blocks, turns.Schedule(1, 1, rolling=True)).gradual == ()
