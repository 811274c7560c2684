"""K-BFGS against its algorithm, written out here in numpy and double precision; edges, guards and refusals."""

from functools import cache, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from reference import GATES, assert_differs, assert_equal, error, normal, random_params
from tasks import MLP

import natgrad_jax as ng

VARIANTS = {
    "K-BFGS": {},
    "K-BFGS(L)": {"memory": 2},
    "KF-QN": {"hessian_action": "batch", "second_damping": "levenberg"},
}
NUMBERS = {"kl_clip": None, "learning_rate": 0.3, "damping": 0.3, "decay": 0.9, "momentum": 0.9, "weight_decay": 0.01}


# The algorithm in numpy -----------------------------------------------------------------------------------------------


@cache
def parts_of(model):
    """Parameters, x, y -> {layer: (inputs [N, I], cotangents of the examples [N, O])}, and gradients [I, O]."""
    names = [f"layer_{'bca'[index]}" for index in range(len(model.widths))]

    def outputs(probes, params, x):
        inputs = {}
        for index, name in enumerate(names):
            x = model.activation(x) if index else x
            inputs[name] = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
            x = inputs[name] @ reference.matrix(params[name]) + probes[name]
        return x, inputs

    @jax.jit
    def parts(params, x, y):
        params, x, y = reference.wide((params, x, y))
        probes = {name: jnp.zeros((len(x), width)) for name, width in zip(names, model.widths, strict=True)}

        def summed(probes):
            z, inputs = outputs(probes, params, x)
            return jnp.sum(reference.LOSSES["softmax_cross_entropy"](z, y)), inputs

        cotangents, inputs = jax.grad(summed, has_aux=True)(probes)
        return {name: (inputs[name], cotangents[name]) for name in names}

    return parts


def with_pair(inverse, s, y):
    rate = 1 / (s @ y)
    left = np.eye(len(s)) - rate * np.outer(s, y)
    return left @ inverse @ left.T + rate * np.outer(s, s)


class Definition:
    """K-BFGS of one layer, line by line; `warm` is A of a pass over data."""

    def __init__(self, shape, warm=None, memory=None, hessian_action="average", second_damping="powell"):
        self.memory, self.batch, self.levenberg = memory, hessian_action == "batch", second_damping == "levenberg"
        self.a, self.weight = (warm, 1.0) if warm is not None else (np.zeros(shape[:1] * 2), 0.0)
        self.h_a, self.h_g, self.pairs = None, np.eye(shape[1]), []
        self.m, self.s, self.y = np.zeros(shape), np.zeros(shape[1]), np.zeros(shape[1])

    def direction(self, inputs, gradient):
        a = inputs.T @ inputs / len(inputs)
        self.m = NUMBERS["momentum"] * self.m + (1 - NUMBERS["momentum"]) * gradient
        if self.h_a is not None or self.weight == 0:  # else the warm start is kept
            self.a = NUMBERS["decay"] * self.a + (1 - NUMBERS["decay"]) * a
            self.weight = NUMBERS["decay"] * self.weight + 1 - NUMBERS["decay"]
        self.damped = a if self.batch else self.a / self.weight
        self.damped = self.damped + NUMBERS["damping"] ** 0.5 * np.eye(len(a))
        if self.h_a is None:
            self.h_a = np.linalg.inv(self.damped)
        return self.h_a @ self.m @ self.h_g

    def learn(self, weights, new_weights, old, new):
        (inputs, cotangents), (new_inputs, new_cotangents) = old, new
        s = np.mean(new_inputs @ new_weights, axis=0) - np.mean(inputs @ weights, axis=0)
        y = np.mean(new_cotangents, axis=0) - np.mean(cotangents, axis=0)
        self.s = NUMBERS["decay"] * self.s + (1 - NUMBERS["decay"]) * s
        self.y = NUMBERS["decay"] * self.y + (1 - NUMBERS["decay"]) * y
        s, y, hy, root = self.s, self.y, self.h_g @ self.y, NUMBERS["damping"] ** 0.5
        if s @ y < 0.2 * y @ hy:
            phi = 0.8 * (y @ hy) / (y @ hy - s @ y)
            s = phi * s + (1 - phi) * hy
        if self.levenberg:
            y = y + root * s
        elif s @ y < root * s @ s:
            phi = (1 - root) * (s @ s) / (s @ s - s @ y)
            y = phi * y + (1 - phi) * s
        if s @ y > 1e-4 * (s @ s) * np.linalg.norm(np.mean(cotangents, axis=0)):
            self.pairs = [*self.pairs, (s, y)][-self.memory :] if self.memory else []
            self.h_g = with_pair(self.h_g, s, y)
            if self.memory:
                self.h_g = np.eye(len(s))
                for pair in self.pairs:
                    self.h_g = with_pair(self.h_g, *pair)
        s = self.h_a @ np.mean(inputs, axis=0)
        self.h_a = with_pair(self.h_a, s, self.damped @ s)


def expected_steps(model, params, batches, variant, warm):
    """Parameters after each step, by the definition."""
    parts = parts_of(model)
    params = reference.wide(params)
    averages = {}
    if warm:
        for x, y in warm:
            for name, (inputs, _) in parts(params, x, y).items():
                a = np.asarray(inputs).T @ np.asarray(inputs) / len(inputs) / len(warm)
                averages[name] = averages.get(name, 0) + a
    layers = {
        name: Definition(reference.matrix(leaves).shape, averages.get(name), **variant)
        for name, leaves in params.items()
    }
    found = []
    for x, y in batches:
        old = {name: tuple(map(np.asarray, pair)) for name, pair in parts(params, x, y).items()}
        weights = {name: np.asarray(reference.matrix(leaves)) for name, leaves in params.items()}
        moved = {}
        for name, layer in layers.items():
            inputs, cotangents = old[name]
            gradient = inputs.T @ cotangents / len(inputs) + NUMBERS["weight_decay"] * weights[name]
            moved[name] = weights[name] - NUMBERS["learning_rate"] * layer.direction(inputs, gradient)
        params = {name: reference.arrays(jnp.asarray(moved[name]), params[name]) for name in params}
        new = {name: tuple(map(np.asarray, pair)) for name, pair in parts(params, x, y).items()}
        for name, layer in layers.items():
            layer.learn(weights[name], moved[name], old[name], new[name])
        found.append(np.asarray(flat(params)))
    return found


def stepping(capture, tx):
    """A jitted training step: (params, state), x, y -> (params, state)."""

    @jax.jit
    def step(carry, x, y, weights=None):
        params, state = carry
        out = capture.value_and_grad({"params": params}, x, y, weights=weights)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    return step


def watch(model, likelihood=ng.losses.softmax_cross_entropy):
    return ng.linen.capture(model, likelihood, labels="true")


def flat(params):
    """The matrices of all layers in one vector."""
    return jnp.concatenate([reference.matrix(params[name]).ravel() for name in sorted(params)])


def data(count, dtype, examples=6):
    draw = np.random.default_rng(5)
    return [
        (jnp.asarray(draw.normal(size=(examples, 5)), dtype), jnp.asarray(draw.integers(3, size=examples), jnp.int32))
        for _ in range(count)
    ]


NET = reference.MLP(widths=(4, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "dtype", "warm"),
    [
        ("K-BFGS", "float64", True),
        ("K-BFGS", "float32", False),
        ("K-BFGS(L)", "float64", False),
        ("KF-QN", "float64", False),
    ],
)
def test_six_steps_are_those_of_the_algorithm(name, dtype, warm):
    model, batches = NET, data(6, dtype)
    params = random_params(model, batches[0][0], dtype=dtype)
    capture = watch(model)
    tx = ng.kbfgs(layers=capture.layers({"params": params}, batches[0][0]), **NUMBERS, **VARIANTS[name])
    state, step = tx.init(params), stepping(capture, tx)
    if warm:
        evidence = jax.jit(lambda x, y: capture.value_and_grad({"params": params}, x, y).curvature())
        state = ng.warm_start(tx, state, (evidence(*batch) for batch in batches[3:]), params)
    expected = expected_steps(model, params, batches, VARIANTS[name], batches[3:] if warm else None)
    carry = params, state
    before = flat(params)
    for (x, y), want in zip(batches, expected, strict=True):
        carry = step(carry, x, y)
        assert_equal(flat(carry[0]) - before, want - np.asarray(before, np.float64), 20 * GATES[dtype])
    metrics = table.lifted(carry[1]).metrics
    assert metrics.skipped_inputs == metrics.skipped_outputs == metrics.rejected_statistics == 0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_variants_are_different_algorithms():
    model, batches = NET, data(6, "float64")
    params = random_params(model, batches[0][0])
    last = [expected_steps(model, params, batches, variant, None) for variant in VARIANTS.values()]
    assert all(error(a[-1] - a[0], b[-1] - b[0]) > 0.01 for a, b in combinations(last, 2))


# Secants --------------------------------------------------------------------------------------------------------------


def first_step(model, x, y, likelihood, weights=None, momentum=None, dtype="float64", **settings):
    """Parameters before and after one step, and the state of the layers after it."""
    params = random_params(model, x, dtype=dtype)
    capture = watch(model, likelihood)
    settings = {"learning_rate": 0.1, "damping": 0.3} | settings
    tx = ng.kbfgs(layers=capture.layers({"params": params}, x), momentum=momentum, **settings)
    moved, state = stepping(capture, tx)((params, tx.init(params)), x, y, weights)
    return params, moved, table.lifted(state)


def secant(state, name):
    """The averages of s and y of a layer."""
    total, weight = state.statistics[name].secant
    return jax.tree.map(lambda leaf: np.asarray(leaf) / np.asarray(weight)[..., None], total)


@pytest.mark.slow
def test_c89_of_a_linear_layer_with_squared_error_y_is_the_hessian_times_s(dtype):
    x, y = normal(7, 5, dtype=dtype), normal(7, 4, seed=1, dtype=dtype)
    _, _, state = first_step(nn.Dense(4), x, y, ng.losses.gaussian(0.5), dtype=dtype)
    s, change = secant(state, "Dense")
    assert_equal(change, 2 * np.asarray(s, np.float64))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_c89_of_another_loss_it_is_not():
    _, _, state = first_step(nn.Dense(4), normal(7, 5), jnp.arange(7) % 4, ng.losses.softmax_cross_entropy)
    s, change = secant(state, "Dense")
    assert_differs(change, (s @ change) / (s @ s) * s)


class Net(nn.Module):
    """A convolution of groups, a norm, dense layers in a scan, a dense one."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), padding="VALID", feature_group_count=2, name="conv")(x)
        x = nn.LayerNorm(name="norm")(nn.tanh(x)).reshape(len(x), -1, 4)
        axes = {"params": 0}
        block = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x.mean(1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="dense")(x)), None


def grouped_mean(outputs):
    """Means over examples and pixels of the outputs of the convolution, by group."""
    return np.mean(np.asarray(outputs), axis=(0, 1, 2)).reshape(2, 2)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_the_steps_of_the_mean_outputs_are_those_of_the_model_also_of_groups_and_positions():
    x, y = normal(6, 4, 4, 2), jnp.arange(6) % 3
    params, moved, state = first_step(Net(), x, y, ng.losses.softmax_cross_entropy)
    seen = [
        Net().apply({"params": tree}, x, capture_intermediates=True)[1]["intermediates"] for tree in (params, moved)
    ]
    before, after = (grouped_mean(found["conv"]["__call__"][0]) for found in seen)
    assert_equal(secant(state, "conv").s, after - before, 1e-7)  # a difference of numbers 100 times as large
    before, after = (np.mean(np.asarray(found["head"]["__call__"][0]), axis=0) for found in seen)
    assert_equal(secant(state, "head").s, after - before, 1e-7)
    assert state.operators["blocks/dense"].value.outputs.shape == (2, 4, 4)
    assert state.statistics["norm/scale+bias"].weight > 0
    assert state.metrics.rejected_statistics == 0


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_an_example_of_weight_two_is_there_twice_and_one_of_weight_zero_is_not():
    x, y = normal(6, 4, 4, 2), jnp.arange(6) % 3
    weights = jnp.asarray([2.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    chosen = jnp.asarray([0, 0, 1, 2, 4, 5])
    run = partial(first_step, Net(), likelihood=ng.losses.softmax_cross_entropy, others="gradient", **VARIANTS["KF-QN"])
    _, weighted, state = run(x, y, weights=weights)
    _, repeated, expected = run(x[chosen], y[chosen])
    for found, want in zip(*map(jax.tree.leaves, (table.contents(state), table.contents(expected))), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-9)
    for found, want in zip(*map(jax.tree.leaves, (weighted, repeated)), strict=True):
        assert_equal(found, want)


# KF-QN-CNN ------------------------------------------------------------------------------------------------------------


def patches(x):
    """Patches of 2 x 2, [N, T, I], channels last, and ones for the bias."""
    found = [x[:, i : i + 3, j : j + 3] for i in range(2) for j in range(2)]
    rows = np.concatenate(found, axis=-1).reshape(len(x), 9, -1)
    return np.concatenate([rows, np.ones((len(x), 9, 1))], axis=-1)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("split", ["even", "positions"])
def test_of_a_convolution_a_sums_positions_and_acts_without_being_kept(split):
    class Convolution(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.tanh(nn.Conv(3, (2, 2), padding="VALID", name="conv")(x)).mean((1, 2))

    capture, batches = watch(Convolution()), [(normal(6, 4, 4, 2, seed=k), jnp.arange(6) % 3) for k in range(2)]
    params = random_params(Convolution(), batches[0][0])
    layers = capture.layers({"params": params}, batches[0][0])
    tx = ng.kbfgs(0.1, layers, damping=0.3, momentum=None, split=split, **VARIANTS["KF-QN"])
    step, carry = stepping(capture, tx), (params, tx.init(params))
    x_strength = 0.3**0.5 * (3.0 if split == "positions" else 1.0)  # 9 positions
    (first, second), inverse = [patches(np.asarray(x)) for x, _ in batches], None
    carry = step(carry, *batches[0])
    assert carry[1].statistics["conv"].inputs is None
    inverse = np.linalg.inv(np.einsum("nti,ntj->ij", first, first) / 6 + x_strength * np.eye(9))
    assert_equal(carry[1].operators["conv"].value.inputs, inverse)
    carry = step(carry, *batches[1])
    s = inverse @ second.mean((0, 1))
    y = np.einsum("nti,ntj->ij", second, second) @ s / 6 + x_strength * s
    assert_equal(carry[1].operators["conv"].value.inputs, with_pair(inverse, s, y))
    s, y = secant(carry[1], "conv")
    v = 0.3 / x_strength
    assert np.all(np.linalg.eigvalsh(carry[1].operators["conv"].value.outputs) <= max(1, 1 / v) + 1e-9)


# Edges and guards -----------------------------------------------------------------------------------------------------


class Dead(nn.Module):
    """A layer of which no output ever reaches the loss."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(4, name="dead")(x) - 1e3))


@pytest.mark.full
def test_a_dead_layer_learns_nothing_and_no_damping_divides_by_zero():
    x, y = normal(6, 5, dtype="float32"), jnp.arange(6) % 3
    capture = watch(Dead())
    params = random_params(Dead(), x, dtype="float32")
    layers = capture.layers({"params": params}, x)

    @jax.jit
    def run(damping):
        tx = ng.kbfgs(0.1, layers, damping=damping)

        def step(carry, _):
            params, state = carry
            out = capture.value_and_grad({"params": params}, x, y)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state), out.value

        return jax.lax.scan(step, (params, tx.init(params)), length=10)

    for damping in (0.0, 0.3, 1.0, 3.0, 1e4):
        (found, state), losses = run(damping)
        state = table.lifted(state)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((found, state)))
        assert losses[-1] < losses[0]
        assert jnp.all(found["dead"]["kernel"] == params["dead"]["kernel"])
        assert jnp.all(state.operators["dead"].value.outputs == jnp.eye(4))
        assert state.metrics.skipped_outputs >= 10 and state.metrics.rejected_statistics == 0


@pytest.mark.full
def test_a_step_to_where_nothing_is_finite_is_forgotten_and_counted():
    problem = table.task("mlp true labels")
    far = lambda count: jnp.where(count == 2, jnp.inf, 0.02)  # noqa: E731
    tx = ng.kbfgs(far, problem.layers, damping=0.3, momentum=None)
    step, state, states = jax.jit(partial(table.step, problem, tx)), tx.init(problem.variables["params"]), []
    for t in range(4):
        (_, state), record = step((problem.variables["params"], state), t)
        states.append(state)
    _, good, bad, after = states
    assert [int(state.metrics.rejected_statistics) for state in states] == [0, 0, 3, 3]
    jax.tree.map(np.testing.assert_array_equal, table.contents(bad), table.contents(good))
    assert bad.count == 3 and after.metrics.statistics == 4
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((after, record)))


@pytest.mark.full
def test_masked_layers_stay_and_the_others_step_as_before():
    problem = table.task("mlp true labels")
    params = problem.variables["params"]
    plain = ng.kbfgs(0.1, problem.layers, damping=0.3)
    masked = optax.masked(plain, {"Dense_0": True, "Dense_1": False, "Dense_2": True})

    @partial(jax.jit, static_argnums=0)
    def one(tx):
        out = table.evaluate(problem, params, 0)
        return out.grad, *tx.update(out.grad, tx.init(params), params, curvature=out.curvature)

    gradient, updates, state = one(masked)
    _, expected, whole = one(plain)
    assert set(table.lifted(state).operators) == {"Dense_0", "Dense_2"}
    for name in ("Dense_0", "Dense_2"):
        np.testing.assert_allclose(updates[name]["kernel"], expected[name]["kernel"], rtol=1e-5, atol=1e-7)
    assert jnp.all(updates["Dense_1"]["kernel"] == gradient["Dense_1"]["kernel"])  # as a mask leaves it
    one_s, other_s = (secant(table.lifted(tree), "Dense_2").s for tree in (state, whole))
    assert np.all(np.isfinite(one_s)) and error(one_s, other_s) > 1e-3  # of the step that was taken


@pytest.mark.full
def test_hyperparameters_can_be_injected_and_changed_between_steps():
    problem = table.task("mlp true labels")
    params = problem.variables["params"]
    inject = optax.inject_hyperparams(ng.kbfgs, static_args=("memory", "statistics_every"))
    tx = inject(0.1, problem.layers, damping=0.3, memory=3, weight_decay=0.01)

    @jax.jit
    def one(state):
        out = table.evaluate(problem, params, 0)
        return tx.update(out.grad, state, params, curvature=out.curvature)

    state = tx.init(params)
    updates, after = one(state)
    state.hyperparams["learning_rate"] *= 2
    doubled, _ = one(state)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(2 * u, v, rtol=1e-5, atol=1e-7), updates, doubled)
    assert optax.tree.get(after, "metrics").statistics == 1 and one._cache_size() == 1
    assert {"damping", "decay", "momentum", "weight_decay"} <= set(state.hyperparams)


@pytest.mark.full
def test_an_ensemble_under_vmap_steps_as_its_members_do():
    problem = table.task("mlp true labels")
    tx = ng.kbfgs(0.1, problem.layers, damping=0.3, memory=3, statistics_every=2)
    scales = jnp.asarray([0.5, 1.0])

    def run(scale):
        params = jax.tree.map(lambda leaf: scale * leaf, problem.variables["params"])
        (params, _), _ = jax.lax.scan(partial(table.step, problem, tx), (params, tx.init(params)), jnp.arange(3))
        return params

    together, alone = jax.jit(jax.vmap(run))(scales), jax.jit(run)
    for index, scale in enumerate(scales):
        jax.tree.map(
            lambda one, other, index=index: np.testing.assert_allclose(one[index], other, rtol=1e-4, atol=1e-5),
            together,
            alone(scale),
        )


@pytest.mark.full
@pytest.mark.parametrize("where", ["mlp bfloat16", pytest.param("convnet bfloat16", marks=pytest.mark.full)])
def test_a_step_changes_no_shape_and_no_dtype(where):
    problem = table.task(where)
    tx = ng.kbfgs(0.1, problem.layers, memory=3, weight_decay=1e-5)
    carry = jax.eval_shape(lambda: table.start(problem, tx))
    after, _ = jax.eval_shape(partial(table.step, problem, tx), carry, jnp.int32(0))
    assert table.shapes(after) == table.shapes(carry)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(table.lifted(carry[1])))


# Refusals -------------------------------------------------------------------------------------------------------------


def updated(problem, *, labels="true", curvature=None, params=True, **settings):
    """What tracing one update says."""
    capture = ng.linen.capture(MLP(), ng.losses.softmax_cross_entropy, labels=labels)
    tx = ng.kbfgs(0.1, problem.layers, **settings)
    variables = problem.variables

    def one(x, y, key):
        out = capture.value_and_grad(variables, x, y, key=key)
        known = out.curvature() if curvature == "mapping" else out.curvature
        where = variables["params"] if params else None
        return tx.update(out.grad, tx.init(variables["params"]), where, curvature=known)[0]

    return jax.eval_shape(one, problem.x[0], problem.y[0], jax.random.key(0))


def test_what_cannot_be_measured_again_is_refused_with_the_remedy():
    problem = table.task("mlp")
    with pytest.raises(TypeError, match=r"dict of evidence.*cannot be measured again.*pass `out.curvature` itself"):
        updated(problem, curvature="mapping")
    with pytest.raises(ValueError, match=r"`params` is None.*tx.update\(grads, state, params"):
        updated(problem, params=False)
    for labels in ("exact", "forward"):
        with pytest.raises(ValueError, match=rf'labels="{labels}".*not the gradient of any loss.*labels="true"'):
            updated(problem, labels=labels)
    assert updated(problem, labels="sampled") is not None


def test_settings_that_are_none_are_refused():
    layers = table.task("mlp").layers
    for name in ("hessian_action", "second_damping", "split", "others"):
        with pytest.raises(ValueError, match=f"`{name}` is 'best'; expected one of"):
            ng.kbfgs(0.1, layers, **{name: "best"})
    for settings in ({"memory": 0}, {"weight_decay": -1.0}, {"momentum": 1.0}, {"statistics_every": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` is .*expected a (finite|whole) number"):
            ng.kbfgs(0.1, layers, **settings)
    with pytest.raises(ValueError, match=r"`memory` is 2.5; expected a whole number"):
        ng.kbfgs(0.1, layers, memory=2.5)
    for rate, damping in (("quadratic", 0.3), (0.1, ng.adaptive_damping())):
        with pytest.raises(TypeError, match=r"expected a finite number of at least 0"):
            ng.kbfgs(rate, layers, damping=damping)


def test_a_warm_start_of_nothing_is_refused():
    problem = table.task("mlp")
    params = problem.variables["params"]
    tx = ng.kbfgs(0.1, problem.layers, hessian_action="batch")
    with pytest.raises(ValueError, match=r"averages none.*drop the warm start"):
        ng.warm_start(tx, tx.init(params), [table.measured("mlp")[1]], params)
