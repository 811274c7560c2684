"""JAX configured otherwise: strict promotion of dtypes and ranks, NaN as an error, other random keys; and precision."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from methods_table import ALL_NAMES, COMPLETE, batch_of, build, inner_jaxprs, of_the_lifting, row, task

import natgrad_jax as ng
from natgrad_jax.algebra.trees import bias_corrected

STRICT = {
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
}
every_flag = pytest.mark.parametrize("flag", STRICT)


def traced(problem, tx, **settings):
    """One step traced, which is where promotion is refused; nothing is compiled."""
    x, y, key = batch_of(problem, 0)
    params = problem.variables["params"]

    def step(state):
        variables = {**problem.variables, "params": params}
        out = problem.capture.value_and_grad(variables, x, y, key=key, **settings)
        return tx.update(out.grad, state, params, curvature=out.curvature)

    return jax.eval_shape(step, jax.eval_shape(tx.init, params))


@pytest.mark.slow
@every_flag
@pytest.mark.parametrize("where", ["mlp", "convnet"])
@of_the_lifting(ALL_NAMES)
def test_every_method_is_traced_under_strict_promotion(method, where, flag):
    problem, tx = task(where), build(method, where)
    with STRICT[flag]():
        traced(problem, tx)


@pytest.mark.full
@every_flag
@pytest.mark.parametrize(
    "name",
    ["adaptive", "newton", "wide", "limited", "kl_clip", "exact", "weights", "positions", "microbatches", "rolling"],
)
def test_what_goes_with_the_methods_is_traced_under_strict_promotion(name, flag):
    problem, settings = task("mlp"), {}
    layers = problem.layers
    if name == "adaptive":
        rule = ng.adaptive_damping()
        tx = ng.kfac("quadratic", layers, momentum="quadratic", damping=rule, weight_decay=0.1)
    elif name == "newton":
        tx = ng.shampoo(0.1, root="newton")
    elif name == "wide":
        tx = ng.kfac(0.1, layers, max_factor_dim=4)
    elif name == "limited":
        tx = ng.kbfgs(0.1, layers, memory=2)
    elif name == "rolling":
        tx = ng.ekfac(0.1, layers, rolling=True, rank=2)
    else:
        tx = ng.kfac(0.1, layers, kl_clip=1e-3, split="exact")
    if name == "weights":
        settings = {"weights": jnp.ones(8)}
    watched = {"exact": {"labels": "exact"}, "microbatches": {"microbatches": 2}}.get(name, {})
    if watched:
        capture = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy, **watched)
        problem = problem._replace(capture=capture)
    with STRICT[flag]():
        traced(problem, tx, **settings)


@every_flag
def test_averages_whose_bias_is_corrected_are_traced_under_strict_promotion(flag):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    with STRICT[flag]():
        for tx in (ng.soap(0.1), ng.shampoo(0.1, graft_to="adam"), ng.mbf(0.1, vectors="smoothed_rms")):
            jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


@pytest.mark.parametrize("decay", [0.9, 0.999, np.float32(0.5)])
def test_the_bias_is_corrected_as_optax_does(decay, x64):
    tree = {"a": jnp.asarray([1.0, -2.0], "float32"), "b": jnp.asarray([3.0], "float64")}
    for count in (1, 7, 100_000):
        found, expected = (
            correct(tree, decay, jnp.int32(count)) for correct in (bias_corrected, optax.tree.bias_correction)
        )
        assert all(found[name].dtype == leaf.dtype for name, leaf in tree.items())
        np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-6)
        np.testing.assert_allclose(found["b"], tree["b"] / (1 - np.float64(decay) ** count), rtol=1e-14)


@pytest.mark.slow
@every_flag
@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "squared_error", "poisson"])
def test_every_likelihood_is_traced_under_strict_promotion(name, flag):
    problem = task("mlp")
    capture = ng.linen.capture(problem.capture.model, getattr(ng.losses, name))
    tx = ng.kfac("quadratic", problem.layers)
    with STRICT[flag]():
        weights = jnp.ones((8, 3))
        traced(problem._replace(capture=capture, y=jnp.ones((4, 8, 3))), tx, weights=weights)


def test_a_promotion_is_refused_by_these_flags():
    with STRICT["dtype_promotion"](), pytest.raises(ValueError, match="promot"):
        jax.eval_shape(lambda: jnp.ones(2) * jnp.arange(2))
    with STRICT["rank_promotion"](), pytest.raises(ValueError, match="rank"):
        jax.eval_shape(lambda: jnp.ones((2, 2)) * jnp.ones(2))


@pytest.mark.slow
@of_the_lifting(ALL_NAMES, ("kfac pi",))
def test_no_method_makes_a_nan_in_its_first_steps(method):
    problem, tx = task("mlp"), build(method)
    params = problem.variables["params"]

    @jax.jit
    def step(state, t):
        x, y, key = batch_of(problem, t)
        out = problem.capture.value_and_grad({"params": params}, x, y, key=key)
        return tx.update(out.grad, state, params, curvature=out.curvature)

    with jax.debug_nans(True):
        state = tx.init(params)
        for t in range(3):
            _, state = step(state, t)
        with pytest.raises(FloatingPointError):
            jax.jit(jnp.log)(-jnp.ones(()))


# --- random keys of another kind --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_binary_cross_entropy", "squared_error", "poisson"])
def test_labels_are_drawn_by_keys_of_another_kind(name):
    problem = task("dense")
    y = problem.y[0] if name.startswith("softmax") else jnp.ones((8, 6))
    capture = ng.linen.capture(problem.capture.model, getattr(ng.losses, name))
    measure = jax.jit(lambda key: capture.value_and_grad(problem.variables, problem.x[0], y, key=key).curvature())
    with jax.default_prng_impl("rbg"):
        assert "rbg" in str(jax.random.key_impl(jax.random.key(0)))
        for key in (jax.random.key(1), jax.random.PRNGKey(1)):
            (evidence,) = measure(key).values()
            assert np.isfinite(evidence.cotangents[0]).all()


def test_counts_are_drawn_by_keys_of_another_kind():
    with jax.default_prng_impl("rbg"):
        counts = jax.jit(ng.losses.poisson.sample)(jax.random.key(2), np.ones((20_000, 1), np.float32))
    assert abs(np.mean(counts) / np.exp(1.0) - 1) < 0.05


# --- precision --------------------------------------------------------------------------------------------------------


def products(jaxpr):
    """The precision of every product of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for inner in inner_jaxprs(equation):
            yield from products(inner)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mlp", "convnet"])
@of_the_lifting(tuple(name for name in ALL_NAMES if name not in [each.name for each in COMPLETE]))
def test_no_product_of_a_factor_is_rounded_by_an_accelerator(method, where):
    problem, tx = task(where), build(method, where)
    params = problem.variables["params"]
    x, y, key = batch_of(problem, 0)

    def measured(params):
        out = problem.capture.value_and_grad({**problem.variables, "params": params}, x, y, key=key)
        return out.grad, tx.init(params), out.curvature()

    program = jax.make_jaxpr(lambda grad, state, e: tx.update(grad, state, curvature=e))(
        *jax.eval_shape(measured, params)
    )
    highest = jax.lax.Precision.HIGHEST
    found = list(products(program.jaxpr))
    assert found and all(precision in (highest, (highest, highest)) for precision in found)


def test_a_product_at_default_precision_is_seen():
    program = jax.make_jaxpr(jax.jit(lambda a: a @ a))(jnp.ones((2, 2)))
    assert list(products(program.jaxpr)) == [None]


@cache
def _rows():
    return jax.random.normal(jax.random.key(0), (16, 4)), jax.random.normal(jax.random.key(1), (4, 3))


OF_SCALES = ("kfac pi", "kfac exact", "ekfac per_example", "ekfac qr pi", "tkfac", "tekfac", "mbf", "tengrad")


@pytest.mark.slow
@of_the_lifting(OF_SCALES)
def test_inputs_of_any_size_have_a_step_and_those_whose_squares_overflow_are_counted(method):
    """W x stays as it is where x is scaled by s and W by 1 / s; F is then s^2 times as large, and so is the damping."""
    x, kernel = _rows()
    capture = ng.capture(lambda params, x: x @ params["dense"]["kernel"], ng.losses.squared_error, labels="exact")
    layers = capture.layers({"dense": {"kernel": kernel}}, x)
    tx = row(method).scale_by(layers, damping=1.0, **_at_once(method))

    @jax.jit
    def step(scale):
        params = {"dense": {"kernel": kernel / scale}}
        out = capture.value_and_grad(params, x * scale, jnp.zeros((16, 3)), key=jax.random.key(2))
        extra = {"curvature": out.curvature, "damping": 0.03 * scale**2}
        updates, state = tx.update(out.grad, tx.init(params), params, **extra)
        return updates["dense"]["kernel"] * scale, state.metrics

    expected, metrics = step(jnp.float32(1))
    assert expected.any() and metrics.rejected_statistics + metrics.rejected_refreshes == 0
    for scale in (1e10, 1e15):
        found, metrics = step(jnp.float32(scale))
        assert metrics.rejected_statistics + metrics.rejected_refreshes == 0
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max()))
    _, metrics = step(jnp.float32(1e25))
    assert metrics.rejected_statistics + metrics.rejected_refreshes > 0


def _at_once(method):
    periods = {"statistics_every": 1, "refresh_every": 1}
    return periods if row(method).apart else {"refresh_every": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("softmax_cross_entropy", "float16"),
        ("sigmoid_binary_cross_entropy", "bfloat16"),
        ("squared_error", "float16"),
        ("poisson", "bfloat16"),
    ],
)
def test_a_loss_of_outputs_in_half_precision_is_summed_in_float32(name, dtype):
    likelihood, shape = getattr(ng.losses, name), (64, 1024, 3)
    outputs = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    targets = jnp.zeros(shape[:2], jnp.int32) if name.startswith("softmax") else jnp.zeros(shape)
    value, gradient = jax.value_and_grad(likelihood)(outputs, targets)
    expected, wide = jax.value_and_grad(likelihood)(outputs.astype(jnp.float32), targets)
    assert value.dtype == jnp.float32 and gradient.dtype == outputs.dtype and value > 100
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient, wide.astype(dtype))
    in_half = float(jnp.sum(likelihood.terms(outputs, targets)))  # the control: summed as the outputs are
    assert not np.isclose(in_half / 64, float(expected), rtol=1e-4)


class Half(nn.Module):
    """A net that computes in bfloat16, or not; its parameters are in float32."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype)(nn.tanh(nn.Dense(5, dtype=self.dtype)(x)))


@pytest.mark.full
def test_a_net_that_computes_in_half_precision_trains_with_an_adaptive_damping_as_in_float32():
    x, y = task("mlp").x[0], task("mlp").y[0]
    ends, dampings = {}, {}
    for dtype in ("float32", "bfloat16", "float16"):
        capture = ng.linen.capture(Half(dtype), ng.losses.softmax_cross_entropy, labels="exact")
        start = capture.model.init(jax.random.key(0), x)
        tx = ng.kfac("quadratic", capture.layers(start, x), momentum="quadratic", damping=ng.adaptive_damping())

        def step(carry, _, capture=capture, tx=tx):
            params, state = carry
            out = capture.value_and_grad({"params": params}, x, y)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return (jax.tree.map(jnp.add, params, updates), state), out.value

        def run(params, step=step, tx=tx):
            return jax.lax.scan(step, (params, tx.init(params)), length=30)

        (_, state), losses = jax.jit(run)(start["params"])
        ends[dtype], dampings[dtype] = float(losses[-1]), float(state.damping)
    assert max(ends.values()) < 1.2 * ends["float32"] + 1e-3 and ends["float32"] < 0.01
    assert max(dampings.values()) < 1  # it has fallen from where it starts


class TwoDtypes(nn.Module):
    """A layer in float32 and a scale in float64."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (), jnp.float64)
        return nn.Dense(3, param_dtype=jnp.float32)(x) * scale


@pytest.mark.full
@pytest.mark.parametrize(
    "method", [each if each == "tengrad" else pytest.param(each, marks=pytest.mark.full) for each in ALL_NAMES]
)
def test_each_parameter_keeps_its_dtype(method, x64):
    x = jnp.ones((8, 4), jnp.float32)
    capture = ng.linen.capture(TwoDtypes(), ng.losses.squared_error)
    start = capture.model.init(jax.random.key(0), x)
    tx = row(method).scale_by(capture.layers(start, x), damping=0.1)

    def step(params):
        out = capture.value_and_grad({"params": params}, x, jnp.zeros((8, 3)), key=jax.random.key(1))
        return tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0]

    found = jax.eval_shape(step, start["params"])
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, start["params"])
