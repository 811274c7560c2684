"""Shampoo beside a restatement in numpy: averages of every mode, their inverse roots, momentum in front, grafting."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from reference import assert_differs, assert_equal, normal
from test_laws_of_state import digits

import natgrad_jax as ng
from natgrad_jax.addresses import flatten
from natgrad_jax.algebra import averages
from natgrad_jax.around.graft import divide_by_rms, of_gradient
from natgrad_jax.layers.views import merged

# The definition -------------------------------------------------------------------------------------------------------


def in_modes(array):
    """A vector, a matrix, or a kernel [*window, C, O] as (window, C, O); axes of one entry are no modes."""
    shape = array.shape if array.ndim < 3 else (int(np.prod(array.shape[:-2])), *array.shape[-2:])
    return array.reshape([size for size in shape if size > 1] or [1])


def moments(tensor):
    """G_(i) G_(i)^T of every mode."""
    unfolded = [np.moveaxis(tensor, mode, 0).reshape(size, -1) for mode, size in enumerate(tensor.shape)]
    return [rows @ rows.T for rows in unfolded]


def root(matrix, damping, exponent):
    """(M + damping I)^-exponent."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * (values + damping) ** -exponent) @ vectors.T


def product(tensor, factors):
    """The tensor times a symmetric matrix in every mode."""
    for mode, factor in enumerate(factors):
        tensor = np.moveaxis(np.tensordot(factor, tensor, (1, mode)), 0, mode)
    return tensor


class Rule(NamedTuple):
    """Settings of the restatement."""

    damping: float = 0.1
    decay: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 0.0
    learning_rate: float = 0.5
    exponent: float | None = None
    add: bool = False
    statistics_every: int = 1
    refresh_every: int = 1
    early: bool = False
    of_momentum: bool = False
    length: str | None = None
    squares_of_momentum: bool = False
    length_decay: float = 0.9
    warm: Any = None


def followed(gradients, params=None, see=in_modes, **rule):
    """The updates of one array at every step, from its gradients [steps, ...], in float64."""
    rule, gradients = Rule(**rule), np.asarray(gradients, np.float64)
    params = np.zeros(gradients.shape[1:]) if params is None else np.asarray(params, np.float64)
    buffer, squares, found = np.zeros(gradients.shape[1:]), np.zeros(gradients.shape[1:]), []
    totals, weight, warm = rule.warm or [0.0] * see(buffer).ndim, float(rule.warm is not None), rule.warm is not None
    for t, gradient in enumerate(gradients):
        buffer = rule.momentum * buffer + gradient
        due = t % rule.statistics_every == 0
        if due and not (warm and t == 0):
            seen = moments(see(buffer if rule.of_momentum else gradient))
            old, new = (1.0, 1.0) if rule.add else (rule.decay, 1 - rule.decay)
            totals = [old * total + new * moment for total, moment in zip(totals, seen, strict=True)]
            weight = 1.0 if rule.add else old * weight + new
        if t % rule.refresh_every == 0 or (rule.early and t < rule.refresh_every and due):
            power = rule.exponent or 1 / (2 * len(totals))
            roots = [root(total / weight, rule.damping, power) for total in totals]
        direction = product(see(buffer), roots).reshape(buffer.shape)
        squares = (
            rule.length_decay * squares
            + (1 - rule.length_decay) * (buffer if rule.squares_of_momentum else gradient) ** 2
        )
        if rule.length:
            fair = squares / (1 - rule.length_decay ** (t + 1)) if rule.length == "adam" else squares
            other = buffer if rule.length == "sgd" else buffer / (np.sqrt(fair) + 1e-8)
            direction *= np.linalg.norm(other) / np.linalg.norm(direction)
        found.append(-rule.learning_rate * (direction + rule.weight_decay * params))
    return np.stack(found)


# The package ----------------------------------------------------------------------------------------------------------

SHAPES = {"vector": (5,), "matrix": (4, 3), "kernel": (3, 2, 2, 4), "pointwise": (1, 1, 4, 3), "row": (1, 5)}
FLAT = {"vector": (5,), "matrix": (4, 3)}
SETTINGS = {"damping": 0.1, "statistics_every": 1, "refresh_every": 1}


def stream(steps=5, dtype="float64", shapes=SHAPES):
    """Gradients of every array at every step, {name: [steps, ...]}."""
    return {name: normal(steps, *shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}


def parameters(dtype="float64", shapes=SHAPES):
    return {name: normal(*shape, seed=seed + 9, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}


@cache
def scanned(tx):
    """Every step of a transformation, compiled once for one object."""

    @jax.jit
    def steps(state, gradients, params):
        return jax.lax.scan(lambda state, gradient: tx.update(gradient, state, params)[::-1], state, gradients)[::-1]

    return steps


def run(tx, gradients, params=None, state=None):
    """The updates at every step, and the last state."""
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), gradients) if params is None else params
    return scanned(tx)(tx.init(params) if state is None else state, gradients, params)


def agree(found, gradients, says=assert_equal, params=None, **rule):
    """Every update of every array beside the restatement's."""
    for name, updates in found.items():
        says(updates, followed(gradients[name], None if params is None else params[name], **rule))


# The baseline ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_step_is_that_of_the_definition_without_layers(dtype):
    shapes = SHAPES if dtype == "float64" else FLAT
    data, params = stream(dtype=dtype, shapes=shapes), parameters(dtype, shapes)
    found, _ = run(ng.shampoo(0.5, weight_decay=0.3, **SETTINGS, kl_clip=None), data, params)
    agree(found, data, params=params, weight_decay=0.3)
    agree(found, data, assert_differs, params=params)  # without weight decay
    agree(found, data, assert_differs, params=params, weight_decay=0.3, of_momentum=True)
    agree(found, data, assert_differs, params=params, weight_decay=0.3, momentum=0.0)


class Net(nn.Module):
    """A convolution with a bias, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Conv(3, (2, 2), padding="VALID")(x)).reshape(len(x), -1))


@cache
def watched_steps():
    """Gradients of four batches at the same parameters, and the updates of three ways to Shampoo."""
    x, y = normal(4, 6, 3, 3, 2), reference.targets("softmax_cross_entropy", (4, 6, 3))
    params = reference.random_params(Net(), x[0])
    capture = ng.linen.capture(Net(), ng.losses.softmax_cross_entropy, labels="true")
    layers = capture.layers({"params": params}, x[0])
    settings = {**SETTINGS, "damping": 1e-3}
    ways = (
        ng.shampoo(0.5, **settings, kl_clip=None),
        ng.shampoo(0.5, layers, **settings, kl_clip=None),
        ng.shampoo(0.5, layers, statistics="curvature", **settings, kl_clip=None),
    )

    def one(states, batch):
        out = capture.value_and_grad({"params": params}, *batch)
        pairs = zip(ways, states, strict=True)
        steps = [tx.update(out.grad, state, params, curvature=out.curvature) for tx, state in pairs]
        updates, states = zip(*steps, strict=True)
        return states, (out.grad, updates)

    run = jax.jit(lambda x, y: jax.lax.scan(one, tuple(tx.init(params) for tx in ways), (x, y))[1])
    return run(x, y)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", [0, 1, 2], ids=["without layers", "with layers", "of true labels"])
def test_every_step_is_that_of_the_definition_on_a_model(way):
    gradients, updates = watched_steps()
    gradients, found = flatten(gradients), flatten(updates[way])
    agree(found, gradients, damping=1e-3)
    agree(found, gradients, assert_differs, damping=1e-3, of_momentum=True)
    of_example = {name: 6**0.5 * leaf for name, leaf in gradients.items()}  # statistics in the scale of one example
    agree(found, of_example, assert_differs, damping=1e-3, learning_rate=0.5 / 6**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [None, 0.5])
@pytest.mark.usefixtures("x64")
def test_sums_and_another_exponent_are_those_of_the_definition(exponent):
    data = stream(shapes=FLAT)
    found, _ = run(ng.shampoo(0.5, accumulate="sum", exponent=exponent, **SETTINGS, kl_clip=None), data)
    agree(found, data, add=True, exponent=exponent)
    agree(found, data, assert_differs, add=False, exponent=exponent)
    if exponent:
        agree({"matrix": found["matrix"]}, data, assert_differs, add=True)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.usefixtures("x64")
def test_c17_roots_are_of_multiples_of_the_period_and_early_of_all_statistics_before_it(early):
    data = stream(9, shapes=FLAT)
    settings = {"damping": 0.1, "statistics_every": 2, "refresh_every": 4, "early_refresh": early}
    found, state = run(ng.scale_by_shampoo(**settings), data)
    rule = {"momentum": 0.0, "learning_rate": -1.0, "statistics_every": 2, "refresh_every": 4}
    agree(found, data, early=early, **rule)
    assert state.metrics.refreshes == 3 + early
    others = {name: np.stack(found[name][2:4]) for name in found}  # the steps in which the two differ
    for name, updates in others.items():
        assert_differs(updates, followed(data[name], early=not early, **rule)[2:4])


@pytest.mark.usefixtures("x64")
def test_roots_by_newton_make_the_steps_of_those_by_eigendecompositions():
    data = stream(shapes={"matrix": (4, 3), "kernel": (3, 2, 2, 4)})
    found, state = run(ng.shampoo(0.5, root="newton", **SETTINGS, kl_clip=None), data)
    agree(found, data)
    assert state[0][1].metrics.rejected_refreshes == 0


# Modes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block", [2, 3, 4])
def test_blocks_are_preconditioned_each_by_itself(block):
    data = stream(3, shapes={"matrix": (7, 5)})
    found, state = run(ng.shampoo(0.5, block_size=block, **SETTINGS, kl_clip=None), data)
    found, expected = found["matrix"], np.zeros((3, 7, 5))
    rows, columns = (-(-size // -(-size // block)) for size in (7, 5))  # equal blocks of at most that size
    for i in range(0, 7, rows):
        for j in range(0, 5, columns):
            here = (slice(None), slice(i, i + rows), slice(j, j + columns))
            expected[here] = followed(data["matrix"][here], see=lambda array: array)
    assert_equal(found, expected)
    assert_differs(found, followed(data["matrix"]))
    for factor, size in zip(state[0][1].statistics["matrix"].total, (rows, columns), strict=True):
        assert factor.shape == (-(-7 // rows) * -(-5 // columns), size, size)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"kernels": "all", "merge": 12}, (12, 4)),
        ({"kernels": "all", "merge": 4}, (4, 3, 4)),
        ({"kernels": "all"}, (2, 2, 3, 4)),
        ({"kernels": "matrix"}, (12, 4)),
        ({"kernels": "matrix", "merge": 48}, (48,)),
        ({"kernels": "flatten_spatial"}, (4, 3, 4)),
    ],
)
def test_the_modes_of_a_kernel_are_those_that_are_asked_for(settings, shape):
    data = stream(3, shapes={"kernel": (2, 2, 3, 4)})
    found, _ = run(ng.shampoo(0.5, **settings, **SETTINGS, kl_clip=None), data)
    assert_equal(found["kernel"], followed(data["kernel"], see=lambda array: array.reshape(shape)))
    for other in {(12, 4), (4, 3, 4), (2, 2, 3, 4), (48,)} - {shape}:
        assert reference.error(found["kernel"], followed(data["kernel"], see=lambda a, s=other: a.reshape(s))) > 0.01


def test_neighbouring_modes_are_joined_while_their_product_is_small_and_those_of_one_entry_do_not_count():
    for sizes, most, expected in (
        ((2, 3, 4), 6, (6, 4)),
        ((2, 3, 4), 24, (24,)),
        ((2, 3, 4), 5, (2, 3, 4)),
        ((4, 3, 2), 6, (4, 6)),
        ((1, 3, 1, 5), None, (3, 5)),
        ((1, 1), None, (1,)),
        ((), 10, (1,)),
    ):
        assert merged(sizes, most) == expected


@pytest.mark.usefixtures("x64")
def test_a_mode_that_is_too_long_keeps_the_diagonal_of_its_factor():
    data = stream(3, shapes={"matrix": (5, 3)})
    found, state = run(ng.shampoo(0.5, max_factor_dim=4, momentum=None, **SETTINGS, kl_clip=None), data)
    left, right = 0.0, 0.0
    expected, whole = [], followed(data["matrix"], momentum=0.0)
    for t, gradient in enumerate(np.asarray(data["matrix"])):
        a, b = moments(gradient)
        left, right, weight = 0.9 * left + 0.1 * a, 0.9 * right + 0.1 * b, 1 - 0.9 ** (t + 1)
        roots = root(np.diag(np.diag(left)) / weight, 0.1, 0.25), root(right / weight, 0.1, 0.25)
        expected.append(-0.5 * product(gradient, roots))
    assert_equal(found["matrix"], np.stack(expected))
    assert_differs(found["matrix"], whole)
    assert state[0].operators["matrix"].value[0].entries.shape == (5,)


# Grafting -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("length", ["sgd", "rmsprop", "adam"])
def test_a_grafted_step_has_the_length_of_the_momentum_over_the_root_of_the_gradients_own_squares(length):
    data = jax.tree.map(lambda leaf: 3 * leaf, stream(shapes=FLAT))
    tx = ng.shampoo(0.5, graft_to=length, graft_decay=0.9, **SETTINGS, kl_clip=None)
    found, _ = run(tx, data)
    agree(found, data, length=length)
    agree(found, data, assert_differs)  # its own length
    for other in {"sgd", "rmsprop", "adam"} - {length}:
        agree(found, data, assert_differs, length=other)
    if length != "sgd":
        agree(found, data, assert_differs, length=length, squares_of_momentum=True)


@pytest.mark.usefixtures("x64")
def test_divided_by_the_rms_of_the_gradient_a_momentum_in_front_enters_the_numerator_alone():
    data = stream()["matrix"]
    for debias in (True, False):
        alone = {"tx": divide_by_rms(0.9, debias=debias), "momentum": 0.0}
        front = {"tx": optax.chain(optax.trace(0.8), divide_by_rms(0.9, debias=debias)), "momentum": 0.8}
        for case in (alone, front):
            buffer, squares, state = np.zeros((4, 3)), np.zeros((4, 3)), case["tx"].init({"x": data[0]})
            for t, gradient in enumerate(np.asarray(data)):
                buffer, squares = case["momentum"] * buffer + gradient, 0.9 * squares + 0.1 * gradient**2
                fair = squares / (1 - 0.9 ** (t + 1)) if debias else squares
                found, state = case["tx"].update({"x": data[t]}, state, gradient={"x": data[t]})
                assert_equal(found["x"], buffer / (np.sqrt(fair) + 1e-8))
            without, _ = case["tx"].update({"x": data[4]}, state)  # of what comes in
            with_gradient, _ = case["tx"].update({"x": data[4]}, state, gradient={"x": data[4]})
            assert (reference.error(without["x"], with_gradient["x"]) > 0.1) == (case is front)


def masked_twice(make, gradient):
    """Two steps with the array "b" hidden, given the gradient of everything, beside two of the array "a" alone."""
    tx, alone = optax.masked(make(), {"a": True, "b": False}), make()

    @jax.jit
    def steps(gradient):
        state, own_state = tx.init(gradient), alone.init({"a": gradient["a"]})
        for step in (gradient, jax.tree.map(jnp.square, gradient)):
            own = {"a": step["a"]}
            without, _ = tx.update(step, state, gradient)
            updates, state = tx.update(step, state, gradient, gradient=step)
            expected, own_state = alone.update(own, own_state, own, gradient=own)
            assert jax.tree.structure(without) == jax.tree.structure(gradient)
        return updates, expected, step

    return steps(gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.trace(0.5), divide_by_rms(0.9, debias=True)),
        lambda: optax.chain(optax.trace(0.5), of_gradient(optax.scale_by_rms(0.9))),
        lambda: ng.shampoo(0.5, graft_to="adam", **SETTINGS, kl_clip=None),
    ],
    ids=["divide_by_rms", "of_gradient", "shampoo"],
)
def test_under_a_mask_the_gradient_is_that_of_the_arrays_that_are_seen(make):
    gradient = {"a": normal(4, 3, dtype="float32"), "b": normal(5, seed=1, dtype="float32")}
    updates, expected, step = masked_twice(make, gradient)
    assert_equal(updates["a"], expected["a"])
    np.testing.assert_array_equal(updates["b"], step["b"])
    assert_differs(updates["a"], step["a"])


def test_a_transformation_of_the_gradient_sees_it_behind_a_momentum_and_what_comes_in_where_it_is_not_given():
    inner = of_gradient(optax.scale(2.0))
    tx = optax.chain(optax.trace(0.5), inner)
    one, state = {"x": jnp.ones(3)}, tx.init({"x": jnp.ones(3)})
    _, state = tx.update(one, state, gradient=one)
    found, _ = tx.update(one, state, gradient=one)
    np.testing.assert_array_equal(found["x"], 2.0)
    found, _ = tx.update(one, state)
    np.testing.assert_array_equal(found["x"], 3.0)


def test_an_unknown_graft_is_refused():
    with pytest.raises(ValueError, match="`graft_to` is 'adagrad'; expected one of 'sgd', 'rmsprop', 'adam'"):
        ng.shampoo(0.1, graft_to="adagrad", kl_clip=None)


# Settings -------------------------------------------------------------------------------------------------------------


def test_coupled_factors_of_a_sum_are_refused():
    with pytest.raises(ValueError, match="coupled factors fit an average"):
        ng.scale_by_shampoo(damping=0.1, coupled=True, accumulate="sum")


# Warm start -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_after_a_warm_start_the_first_step_leaves_the_statistics_and_the_next_ones_average_on():
    data, tx = stream(6, shapes=FLAT), ng.shampoo(0.5, **SETTINGS, kl_clip=None)
    pass_of = [jax.tree.map(lambda leaf, t=t: leaf[t], data) for t in range(3)]
    rest = jax.tree.map(lambda leaf: leaf[3:], data)
    state = ng.warm_start(tx, tx.init(pass_of[0]), pass_of)
    found, _ = run(tx, rest, state=state)
    for name, updates in found.items():
        means = [
            np.mean(parts, axis=0)
            for parts in zip(*(moments(in_modes(np.asarray(leaf))) for leaf in data[name][:3]), strict=True)
        ]
        for ours, theirs in zip(averages.mean(state[0][1].statistics[name]), means, strict=True):
            assert_equal(ours, theirs)
        assert_equal(updates, followed(rest[name], warm=means))
        assert_differs(updates, followed(rest[name]))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_a_warm_start_takes_gradients_evidence_or_all_that_the_capture_returned():
    x, y = normal(3, 6, 4), reference.targets("softmax_cross_entropy", (3, 6, 3))
    params = reference.random_params(nn.Dense(3), x[0])
    capture = ng.linen.capture(nn.Dense(3), ng.losses.softmax_cross_entropy, labels="true")
    layers = capture.layers({"params": params}, x[0])
    outs = [capture.value_and_grad({"params": params}, *batch) for batch in zip(x, y, strict=True)]
    by_gradient, by_curvature = (
        ng.shampoo(0.5, layers, statistics=statistics, **SETTINGS, kl_clip=None)
        for statistics in ("gradient", "curvature")
    )
    states = [
        ng.warm_start(by_gradient, by_gradient.init(params), [out.grad for out in outs]),
        ng.warm_start(by_gradient, by_gradient.init(params), outs),
        ng.warm_start(by_curvature, by_curvature.init(params), outs),
        ng.warm_start(by_curvature, by_curvature.init(params), [out.curvature() for out in outs], params),
    ]
    leaves = [flatten(out.grad) for out in outs]
    for state in states:
        assert state[0][1].count == 0 and state[0][1].metrics.statistics == 3
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state[0][0]))  # the momentum has not moved
        for name, block in state[0][1].statistics.items():
            all_moments = [moments(in_modes(np.asarray(tree[name]))) for tree in leaves]
            for ours, *theirs in zip(averages.mean(block), *all_moments, strict=True):
                assert_equal(ours, np.mean(theirs, axis=0))
                assert_differs(ours, theirs[0])
    with pytest.raises(ValueError, match=r"statistics are of the gradient.*evidence alone"):
        ng.warm_start(by_gradient, by_gradient.init(params), [out.curvature() for out in outs], params)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_as_it_is_mostly_used_it_brings_the_loss_on_digits_further_down_than_adam_of_the_same_learning_rate():
    problem = digits()
    x, y, capture, variables = problem.x, problem.y, problem.capture, problem.variables

    def trained(tx):
        def step(carry, t):
            params, state = carry
            out = capture.value_and_grad({"params": params}, x[t % 5], y[t % 5], key=jax.random.key(0))
            updates, state = tx.update(out.grad, state, params)
            return (optax.apply_updates(params, updates), state), out.value

        start = variables["params"], tx.init(variables["params"])
        return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(15))[1])()

    settings = {"merge": 1024, "block_size": 1024, "statistics_every": 1, "refresh_every": 20}
    found = trained(ng.shampoo(1e-2, damping=1e-12, decay=0.999, graft_to="adam", **settings, kl_clip=None))
    adam = trained(optax.adam(1e-2))
    assert found[-1] < 0.9 * adam[-1]
    assert found[-1] < found[0] / 3
    assert not trained(optax.sgd(1e-2))[-1] < found[0] / 3  # the control
