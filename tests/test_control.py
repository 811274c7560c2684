"""The step that the quadratic model chooses against the dense model, the damping that adapts against the true loss."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import methods_table as table
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from methods_table import NAMES, measured, of_the_lifting, row, task
from tasks import MLP
from watching import LIKELIHOODS, mlp

import natgrad_jax as ng

every_method = of_the_lifting(NAMES)
LOSS = "softmax_cross_entropy"
SETTINGS = table.SETTINGS | {"statistics_every": 1, "refresh_every": 1}
DAMPING, L2 = 0.3, 0.2
CHOICES = [
    ("quadratic", "quadratic"),
    ("quadratic", None),
    ("quadratic", 0.7),
    (0.4, "quadratic"),
    (lambda count: 0.4 / (1 + count), "quadratic"),
]


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def watched(make, activation="tanh", loss=LOSS, steps=3, **kwargs):
    """Some steps of an optimizer on the reference net: for each (params, out, updates, state after it)."""
    net = mlp(activation, loss)
    capture = ng.linen.capture(net.model, LIKELIHOODS[loss], labels="exact", **kwargs)
    tx = make(net.layers)

    @jax.jit
    def step(params, state):
        out = capture.value_and_grad({"params": params}, net.x, net.y)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return out.value, out.grad, updates, state

    params, state, records = net.params, tx.init(net.params), []
    for _ in range(steps):
        value, grad, updates, state = step(params, state)
        records.append((params, value, grad, updates, state))
        params = optax.apply_updates(params, updates)
    return net, records


def dense_weights(curvature, slope, damping, pair, given):
    """The weights that minimise slope^T V w + w^T V^T (curvature + damping) V w / 2, those given held fixed."""
    size = len(slope)
    v = np.stack(pair, axis=1)
    bent = v.T @ (curvature + damping * np.eye(size)) @ v
    free = [index for index, value in enumerate(given) if value is None]
    weights = np.array([0.0 if value is None else value for value in given])
    right = -(v.T @ slope + bent @ weights)[free]
    weights[free] = np.linalg.lstsq(bent[np.ix_(free, free)], right, rcond=1e-12)[0]
    return weights


def mask(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


@cache
def descent(penalty):
    """What decays, the first state of the direction, and a function: params, state -> slope, direction, state."""
    net = mlp("tanh", LOSS)
    direction = row("kfac pi").scale_by(net.layers, **SETTINGS | {"damping": DAMPING + penalty})
    capture = ng.linen.capture(net.model, LIKELIHOODS[LOSS], labels="exact")
    decayed = flat(jax.tree.map(lambda leaf, kept: jnp.full_like(leaf, kept), net.params, mask(net.params)))

    @jax.jit
    def descend(params, inner):
        out = capture.value_and_grad({"params": params}, net.x, net.y)
        slope, unravel = ravel_pytree(out.grad)
        slope += penalty * decayed * ravel_pytree(params)[0]
        return slope, *direction.update(unravel(slope), inner, params, curvature=out.curvature)

    return decayed, direction.init(net.params), descend


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("l2", [None, L2])
@pytest.mark.parametrize(("learning_rate", "momentum"), CHOICES)
def test_what_is_not_given_minimises_the_dense_quadratic_model(learning_rate, momentum, l2):
    penalty = l2 or 0.0

    def make(layers):
        return ng.controlled(
            row("kfac pi").scale_by(layers, **SETTINGS),
            learning_rate,
            damping=DAMPING,
            momentum=momentum,
            l2=l2,
            l2_mask=mask,
        )

    net, records = watched(make)
    decayed, inner, descend = descent(penalty)
    last = np.zeros_like(decayed)
    for count, (params, _, _, updates, state) in enumerate(records):
        dense = np.asarray(reference.fisher(net.model, params, LOSS, net.x, net.y)) + penalty * np.diag(decayed)
        slope, u, inner = descend(params, inner)
        slope = flat(slope)
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        given = [None if value == "quadratic" else value or 0.0 for value in (rate, momentum)]
        weights = dense_weights(dense, slope, DAMPING, (-flat(u), last), given)
        np.testing.assert_allclose([state.learning_rate, state.momentum], weights, rtol=2e-5, atol=1e-6)
        expected = weights[1] * last - weights[0] * flat(u)
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-4, atol=1e-6)
        if count and momentum == "quadratic":  # the control: without the coupling of the two vectors
            alone = dense_weights(dense, slope, DAMPING, (-flat(u), 0 * last), given)
            assert not np.allclose(state.momentum, alone[1], rtol=0.1)
        last = flat(updates)


@pytest.mark.usefixtures("x64")
def test_the_ratio_is_the_change_of_the_loss_over_the_undamped_dense_model():
    rule = ng.adaptive_damping(DAMPING, every=1, calibration=0)

    def make(layers):
        return ng.kfac("quadratic", layers, damping=rule, momentum="quadratic", weight_decay=L2)

    net, records = watched(make)
    for (params, value, grad, updates, state), following in pairwise(records):
        theta, step = flat(params), flat(updates)
        dense = reference.fisher(net.model, params, LOSS, net.x, net.y) + L2 * np.eye(len(theta))
        foretold = (flat(grad) + L2 * theta) @ step + step @ dense @ step / 2
        change = following[1] - value + L2 / 2 * (np.sum((theta + step) ** 2) - np.sum(theta**2))
        np.testing.assert_allclose(state.ratio, change / foretold, rtol=1e-4)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("activation", "equal"), [("linear", True), ("tanh", False)])
def test_the_ratio_is_one_where_the_loss_is_its_own_quadratic_model(activation, equal):
    """Of the last layer alone, with squared error, the loss is quadratic; of all layers of a tanh net it is not."""
    model, x, y = (reference.MLP((3,)) if equal else reference.MLP()), reference.normal(9, 5), None
    params = reference.random_params(model, x)
    y = reference.normal(9, 3, seed=3)
    capture = ng.linen.capture(model, ng.losses.squared_error, labels="exact")
    tx = ng.kfac("quadratic", capture.layers({"params": params}, x), damping=ng.adaptive_damping(1.0, calibration=0))

    @jax.jit
    def first(params):
        out = capture.value_and_grad({"params": params}, x, y)
        return tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[1]

    assert (abs(first(params).ratio - 1) < 1e-5) == equal


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.9, 0.5), (np.inf, 0.5), (0.75, 1), (0.5, 1), (0.25, 1), (0.2, 2), (-3.0, 2), (-np.inf, 2), (np.nan, 2)],
)
def test_the_damping_falls_after_a_good_ratio_and_rises_after_a_bad_one_or_nan(ratio, factor):
    rule = ng.adaptive_damping(1.0, factor=0.5**0.25, every=4, calibration=2, calibration_factor=0.1, least=0.3, most=3)
    bounds = {0.5: 0.3, 1: 1.0, 2: 3.0}[factor]  # by 10, and then the bounds
    for count, before, moved in ((8, 1.0, factor), (0, 1.0, bounds), (8, 0.1, bounds), (8, np.nan, bounds)):
        found = rule.adapted(*map(jnp.asarray, (1.0, before, ratio, count, count < 2)))
        np.testing.assert_allclose(found, moved, rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "ratio", "due"),
    [(0, np.nan, True), (1, 1.0, True), (2, 1.0, False), (4, 1.0, True)]  # calibration, and every fourth
    + [(6, 0.25, False), (6, 0.2, True), (6, -np.inf, True), (6, np.nan, True)],  # after a bad test
)
def test_a_step_is_tested_in_its_turn_and_after_a_bad_test(count, ratio, due):
    rule = ng.adaptive_damping(1.0, every=4, calibration=2)
    assert bool(rule.is_due(*map(jnp.asarray, (count, ratio, count < 2)))) == due


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0], [1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4, 0.9**5 / 4, 0.9**5 / 4]),
        ([np.nan, 0.1, 1.0, 1.0, 0.5, 0.1, 0.5], [2.0, 4.0, 2.0, 1.0, 1.0, 2.0, 2.0]),  # the first bad ones do not
        ([np.nan, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 4.0, 2.0, 1.0, 1 / 2, 1 / 4, 1 / 8]),
    ],
)
def test_a_bad_test_after_a_better_one_ends_the_calibration(ratios, expected):
    """Steps with the ratios of their tests: the damping moves by twos until it is bracketed, then in its turn."""
    rule = ng.adaptive_damping(1.0, every=5, factor=0.9, calibration=10, calibration_factor=0.5)
    damping, before, calibrating, path = jnp.float32(1.0), jnp.float32(jnp.nan), jnp.array(True), []
    for count, ratio in enumerate(map(jnp.float32, ratios)):
        now = ratio if rule.is_due(jnp.asarray(count), before, calibrating) else before
        if rule.is_due(jnp.asarray(count), before, calibrating):
            damping = rule.adapted(damping, before, ratio, jnp.asarray(count), calibrating)
        calibrating = rule.calibrates(jnp.asarray(count), before, now, calibrating)
        before = now
        path.append(float(damping))
    np.testing.assert_allclose(path, expected, rtol=1e-6)


def controlled_steps(rule, learning_rate="quadratic", steps=6, where="mlp", **settings):
    """States after each of some steps of K-FAC, and the losses before them."""
    problem = task(where)
    settings = {"statistics_every": 2, "refresh_every": 2} | settings
    tx = ng.kfac(learning_rate, problem.layers, damping=rule, **settings)

    @jax.jit
    def step(params, state):
        out = table.evaluate(problem, params, 0)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state, out.value

    params = problem.variables["params"]
    state, states, losses, tree = tx.init(params), [], [], [params]
    for _ in range(steps):
        params, state, value = step(params, state)
        states.append(state)
        losses.append(float(value))
        tree.append(params)
    assert step._cache_size() == 1, "one trace serves all steps, tested or not"
    return states, losses, tree


@pytest.mark.parametrize("rate", [300.0, 1e9])
def test_a_tested_step_that_raises_the_loss_is_made_as_short_as_lowers_it_and_raises_the_damping(rate):
    """By a fourth at a time; none at all where a 256th of it still raises the loss. Without a test it is made whole."""
    rule = ng.adaptive_damping(0.1, every=2, calibration=0, factor=0.5)
    states, losses, params = controlled_steps(rule, learning_rate=rate, steps=1, momentum=0.9)
    whole = controlled_steps(0.4, learning_rate=rate, steps=2, momentum=0.9, kl_clip=None)
    assert whole[1][1] > whole[1][0]  # the control
    np.testing.assert_allclose(states[0].damping, 0.4, rtol=1e-6)
    problem, share = task("mlp"), float(states[0].learning_rate) / rate
    made = states[0].last

    def loss(times):
        moved = optax.apply_updates(params[0], jax.tree.map(lambda leaf: times * leaf, made))
        return table.evaluate(problem, moved, 0).value

    assert share in ([0.25, 0.0625, 0.25**3, 0.25**4] if rate < 1e9 else [0])
    assert states[0].rejected == (share == 0)
    np.testing.assert_allclose(flat(params[1]), flat(params[0]) + flat(made), atol=1e-6)
    assert (share == 0 and not np.any(flat(made))) or loss(1.0) < losses[0] <= loss(4.0)


@pytest.mark.full
def test_after_a_bad_test_every_step_is_tested_until_one_is_good():
    rule = ng.adaptive_damping(0.1, every=50, calibration=0, factor=0.99)
    states, _, params = controlled_steps(rule, learning_rate=1e9, steps=3, momentum=0.9)
    assert [int(state.rejected) for state in states] == [1, 2, 3]
    np.testing.assert_allclose([state.damping for state in states], 0.1 * 0.99**-50 * 2.0 ** np.arange(3), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params[3], params[0])


@pytest.mark.full
@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_that_is_not_finite_counts_as_a_failure(every):
    model = MLP()
    problem = task("mlp")
    capture = ng.linen.capture(model, ng.losses.poisson)
    counts = jnp.ones((8, 3))
    tx = ng.kfac(1e9, problem.layers, damping=ng.adaptive_damping(1.0, every=every, calibration=0), momentum=None)

    @jax.jit
    def first(params):
        out = capture.value_and_grad({"params": params}, problem.x[0], counts, key=jax.random.key(0))
        return tx.update(out.grad, tx.init(params), params, curvature=out.curvature)

    updates, state = first(problem.variables["params"])
    assert not np.any(flat(updates))
    assert state.rejected == 1
    assert np.isnan(state.ratio) or state.ratio == -np.inf
    np.testing.assert_allclose(state.damping, 0.9**-every, rtol=1e-6)


@pytest.mark.full
def test_steps_between_tests_leave_damping_and_ratio_as_they_are():
    states, _, _ = controlled_steps(ng.adaptive_damping(1.0, every=3, calibration=0), steps=7)
    ratios, dampings = [float(s.ratio) for s in states], [float(s.damping) for s in states]
    for kept in (1, 2, 4, 5):
        assert ratios[kept] == ratios[kept - 1] and dampings[kept] == dampings[kept - 1]
    for tested in (3, 6):
        assert ratios[tested] != ratios[tested - 1]


@pytest.mark.full
def test_the_calibration_mends_a_damping_that_is_too_large_by_orders_of_magnitude():
    def last_loss(calibration):
        rule = ng.adaptive_damping(1e4, every=20, calibration=calibration, calibration_factor=0.1)
        _, losses, _ = controlled_steps(rule, steps=15, momentum=None, refresh_every=1)
        return losses[-1]

    assert last_loss(15) < 0.5 * last_loss(0)


@pytest.mark.full
def test_the_calibration_mends_a_damping_that_is_too_small_by_orders_of_magnitude():
    """The steps of a fixed learning rate overshoot; tested each, they are not whole until the damping has risen."""

    def trained(**bounds):
        rule = ng.adaptive_damping(1e-6, calibration=15, calibration_factor=0.1, **bounds)
        states, losses, _ = controlled_steps(rule, learning_rate=3.0, steps=15, momentum=None, refresh_every=1)
        assert losses[-1] < 0.1 * losses[0]
        return states[-1].damping, [float(state.learning_rate) / 3 for state in states]

    damping, shares = trained()
    assert damping > 1e-4 and shares[0] < 0.1 and 1 in shares[:10]
    damping, shares = trained(most=1e-6)
    assert max(shares[:10]) < 0.1


@pytest.mark.full
@every_method
def test_with_everything_adaptive_the_loss_falls_on_a_real_problem(method):
    problem = task("mlp")
    adaptive = {"damping": ng.adaptive_damping(), "statistics_every": 2, "refresh_every": 2}
    tx = row(method).optimizer("quadratic", problem.layers, momentum="quadratic", **adaptive)
    _, losses = table.trained(problem, tx)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.1 * losses[0]


def test_a_parallel_last_step_and_a_gradient_of_zero_give_no_nan():
    problem = task("mlp")
    tx = ng.controlled(optax.with_extra_args_support(optax.identity()), "quadratic", damping=0.1, momentum="quadratic")
    params = problem.variables["params"]
    state = tx.init(params)

    @jax.jit
    def first(state, factor):
        out = table.evaluate(problem, params, 0)
        gradient = jax.tree.map(lambda leaf: factor * leaf, out.grad)
        return *tx.update(gradient, state, params, curvature=out.curvature), out.grad

    parallel = state._replace(last=jax.tree.map(lambda leaf: -2 * leaf, first(state, 1.0)[2]))
    for start in (state, parallel):
        updates, found, _ = first(start, 1.0)
        assert found.momentum == 0
        assert found.learning_rate > 0
        assert np.all(np.isfinite(flat(updates)))
    assert not np.any(flat(first(state, 0.0)[0]))


@pytest.mark.full
def test_a_mask_hides_parameters_from_the_step_and_from_the_model():
    problem = task("mlp")
    params = problem.variables["params"]

    def mask(tree):
        return {name: name != "Dense_2" for name in tree}

    tx = optax.masked(ng.kfac("quadratic", problem.layers, momentum="quadratic", damping=ng.adaptive_damping()), mask)

    @jax.jit
    def first():
        out = table.evaluate(problem, params, 0)
        updates, state = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)
        chosen = {**updates, "Dense_2": jax.tree.map(jnp.zeros_like, params["Dense_2"])}
        return out.value, out.curvature.value(optax.apply_updates(params, chosen)), updates, out.grad, state

    before, after, updates, gradient, state = first()
    assert after < before
    np.testing.assert_array_equal(updates["Dense_2"]["kernel"], gradient["Dense_2"]["kernel"])
    assert state.inner_state.ratio > 0


def test_warm_start_reaches_the_direction_and_nothing_else():
    gradient, evidence = measured("mlp")
    tx = ng.kfac("quadratic", task("mlp").layers, damping=ng.adaptive_damping())
    state = ng.warm_start(tx, tx.init(gradient), [evidence, evidence], gradient)
    assert state.direction.metrics.statistics == 2
    assert state.count == 0


def test_the_value_of_a_curvature_is_the_loss_here_and_elsewhere():
    problem = task("mlp")
    params = problem.variables["params"]
    moved = jax.tree.map(lambda leaf: 1.1 * leaf, params)

    @jax.jit
    def values(params, moved):
        out = table.evaluate(problem, params, 0)
        here = out.curvature.value(), out.curvature.value(params)
        return out.value, *here, out.curvature.value(moved), table.evaluate(problem, moved, 0).value

    value, unasked, here, there, expected = values(params, moved)
    assert unasked == value
    np.testing.assert_allclose(here, value, rtol=1e-6)
    np.testing.assert_allclose(there, expected, rtol=1e-6)
    assert abs(there - value) > 1e-3 * value


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learning_rate", "momentum"])
def test_a_word_that_is_unknown_is_refused(name):
    settings = {"learning_rate": 0.1, "layers": task("mlp").layers, name: "exact"}
    with pytest.raises(ValueError, match=rf"`{name}` is 'exact'; expected one of 'quadratic'"):
        ng.kfac(**settings)


def test_a_clip_of_a_controlled_step_is_refused():
    with pytest.raises(ValueError, match=r"`kl_clip` is 0\.1, but the length of the step comes from the quadratic"):
        ng.kfac("quadratic", task("mlp").layers, kl_clip=0.1)


def test_a_direction_alone_cannot_adapt_its_damping():
    gradient, evidence = measured("mlp")
    tx = ng.scale_by_kfac(task("mlp").layers, damping=ng.adaptive_damping())
    with pytest.raises(ValueError, match="adaptive, which takes the whole step to see: use the complete optimizer"):
        tx.update(gradient, tx.init(gradient), curvature=evidence)


def test_evidence_without_products_and_missing_parameters_are_refused():
    gradient, evidence = measured("mlp")
    tx = ng.kfac("quadratic", task("mlp").layers)
    with pytest.raises(TypeError, match="`curvature` is of type dict; a controlled step takes products and losses"):
        tx.update(gradient, tx.init(gradient), gradient, curvature=evidence)
    with pytest.raises(ValueError, match="`params` is None; a controlled step needs them"):
        tx.update(gradient, tx.init(gradient), curvature=evidence)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial": -1.0}, "`initial` is -1.0"),
        ({"initial": 1.0, "least": 2.0}, "`least`, 2.0"),
        ({"factor": 1.5}, "`factor` is 1.5; expected a number between 0 and 1"),
        ({"calibration_factor": 0.0}, "`calibration_factor` is 0.0"),
        ({"every": 0}, "`every` is 0"),
        ({"calibration": -1}, "`calibration` -1"),
    ],
)
def test_a_rule_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ng.adaptive_damping(**settings)
