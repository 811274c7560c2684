"""With a `product_stride` of k, products with F are of every k-th example, and all else is of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")

LOSS = ng.losses.softmax_cross_entropy
DRAW = np.random.default_rng(0).normal
X, Y = DRAW(size=(10, 4)), np.arange(10) % 3
WEIGHTS = 0.5 + np.arange(10) / 8
PARAMS = {"w": DRAW(size=(4, 5)), "b": DRAW(size=5), "v": DRAW(size=(5, 3))}
DIRECTIONS = [{name: DRAW(size=leaf.shape) for name, leaf in PARAMS.items()} for _ in range(2)]


def apply(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return apply({name: self.param(name, lambda _, leaf=leaf: leaf) for name, leaf in PARAMS.items()}, x)


class Nnx(nnx.Module):
    def __init__(self):
        self.w, self.b, self.v = (nnx.Param(PARAMS[name]) for name in ("w", "b", "v"))

    def __call__(self, x):
        return apply({"w": self.w[...], "b": self.b[...], "v": self.v[...]}, x)


def by_function(stride, x, y, weights, **options):
    capture = ng.capture(apply, LOSS, labels="true", product_stride=stride, **options)
    return capture.value_and_grad(PARAMS, x, y, weights=weights), lambda tree: tree


def by_linen(stride, x, y, weights, **options):
    capture = ng.linen.capture(Linen(), LOSS, labels="true", product_stride=stride, **options)
    return capture.value_and_grad({"params": PARAMS}, x, y, weights=weights), lambda tree: tree


def by_nnx(stride, x, y, weights, **options):
    model = Nnx()
    capture = ng.nnx.capture(model, LOSS, labels="true", product_stride=stride, **options)
    out = capture.value_and_grad(model, x, y, weights=weights)
    return out, lambda tree: jax.tree.unflatten(jax.tree.structure(out.grad), [tree[name] for name in sorted(PARAMS)])


DOORS = {"function": by_function, "linen": by_linen, "nnx": by_nnx}


def gram(found):
    out, like = found
    products = [out.curvature.along(like(direction)) for direction in DIRECTIONS]
    return jnp.array([[jnp.vdot(one, other) for one in products] for other in products])


def same(one, other, gate=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=gate, atol=gate), one, other)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
@pytest.mark.parametrize("stride", [2, 3, 10, 99])
@pytest.mark.parametrize("door", DOORS)
def test_products_are_those_of_every_kth_example(door, stride, weights):
    few = None if weights is None else weights[::stride]
    found, whole = DOORS[door](stride, X, Y, weights), DOORS[door](1, X, Y, weights)
    same(gram(found), gram(by_function(1, X[::stride], Y[::stride], few)))
    assert not np.allclose(gram(found), gram(whole), rtol=1e-3)
    same((found[0].value, found[0].grad), (whole[0].value, whole[0].grad))
    same(*(jax.tree.leaves(out.curvature()) for out, _ in (found, whole)))
    same(*(out.curvature.value(out.grad) for out, _ in (found, whole)))


def test_of_pieces_they_are_those_of_every_kth_example_of_each():
    x, y = X[:8], Y[:8]
    found = gram(by_function(2, x, y, None, microbatches=2))
    same(found, gram(by_function(1, x[::2], y[::2], None)))
    first = gram(by_function(1, x[:4:2], y[:4:2], None))
    assert not np.allclose(found, first, rtol=1e-3)


def test_replicas_take_every_kth_of_their_own():
    x, y = X[:8].reshape(2, 4, 4), Y[:8].reshape(2, 4)

    def of_replica(x, y):
        return gram(by_function(2, x, y, None, axis_name="batch"))

    found = jax.vmap(of_replica, axis_name="batch")(x, y)
    same(found[0], gram(by_function(1, X[:8:2], Y[:8:2], None)))
    same(found[0], found[1])


def dense_fisher(x):
    """J^T H J / N of the flat parameters."""
    flat, unravel = ravel_pytree(PARAMS)

    def logits(flat):
        return apply(unravel(flat), x)

    jacobian, p = jax.jacobian(logits)(flat), jax.nn.softmax(logits(flat))
    hessian = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    return jnp.einsum("nia,nij,njb->ab", jacobian, hessian, jacobian) / len(p)


def test_a_step_has_the_length_that_minimises_the_model_of_these_examples():
    steps = {}
    for stride in (1, 5):
        capture = ng.capture(apply, LOSS, labels="exact", product_stride=stride, objective=LOSS)  # of unknown least
        tx = ng.kfac(layers=capture.layers(PARAMS, X), damping=0.125)
        out = capture.value_and_grad(PARAMS, X, Y, key=jax.random.key(0))
        step, _ = tx.update(out.grad, tx.init(PARAMS), PARAMS, curvature=out.curvature)
        d, g = (ravel_pytree(tree)[0] for tree in (step, out.grad))
        fisher = dense_fisher(X[::stride])
        assert abs(d @ g + d @ (fisher + 0.125 * jnp.eye(len(d))) @ d) < 1e-9 * abs(d @ g)
        steps[stride] = d
    assert not np.allclose(steps[1], steps[5], rtol=1e-3)


def test_where_a_part_weighs_nothing_the_damping_is_all_the_curvature():
    capture = ng.capture(apply, LOSS, labels="true", product_stride=5, objective=LOSS)
    tx = ng.kfac(layers=capture.layers(PARAMS, X), damping=0.125)
    out = capture.value_and_grad(PARAMS, X, Y, weights=1.0 * (np.arange(10) % 5 > 0))
    step, _ = tx.update(out.grad, tx.init(PARAMS), PARAMS, curvature=out.curvature)
    d, g = (ravel_pytree(tree)[0] for tree in (step, out.grad))
    assert abs(d @ g + 0.125 * d @ d) < 1e-9 * abs(d @ g)


def test_a_product_takes_fewer_flops():
    x, y = DRAW(size=(512, 4)), jnp.arange(512) % 3

    def product(stride):
        return jax.jit(lambda direction: by_function(stride, x, y, None)[0].curvature.along(direction))

    whole, few = (product(stride).lower(DIRECTIONS[0]).compile().cost_analysis()["flops"] for stride in (1, 8))
    assert few < whole / 6


def test_inputs_without_examples_are_refused():
    capture = ng.capture(lambda params, x, scale: scale * apply(params, x), LOSS, labels="true", product_stride=2)
    out = capture.value_and_grad(PARAMS, (X, jnp.ones(())), Y)
    with pytest.raises(ValueError, match=r"`product_stride` is 2, but .*\(\)\]; expected that all lead with the 10"):
        out.curvature.along(PARAMS)


@pytest.mark.parametrize("inputs", [ng.Inputs(X, scale=np.ones((10, 1))), ng.Inputs(x=X)], ids=["one", "all"])
def test_keywords_with_examples_are_refused(inputs):
    capture = ng.capture(lambda params, x, scale=1.0: scale * apply(params, x), LOSS, labels="true", product_stride=99)
    out = capture.value_and_grad(PARAMS, inputs, Y)
    with pytest.raises(ValueError, match=r"keywords \['(scale|x)'\] lead with the 10 examples; .* by position"):
        out.curvature.along(PARAMS)


class Random(nnx.Module):
    def __init__(self):
        self.body, self.drop = Nnx(), nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.body(self.drop(x))


def test_the_random_streams_of_a_model_are_where_they_were_at_its_step():
    model, direction = Random(), jax.tree.map(jnp.ones_like, nnx.state(Random(), nnx.Param))
    found = ng.nnx.capture(model, LOSS, labels="true", product_stride=2).value_and_grad(model, X, Y)
    other = Random()
    few = ng.nnx.capture(other, LOSS, labels="true").value_and_grad(other, X[::2], Y[::2])
    same(found.curvature.along(direction), few.curvature.along(direction))


def foretold(capture, x, y, params, **options):
    tx = ng.kfac(layers=capture.layers(params, x), **options)

    @jax.jit
    def step(params, state):
        out = capture.value_and_grad(params, x, y, key=jax.random.key(0))
        return tx.update(out.grad, state, params, curvature=out.curvature)[1].last, out.value

    later = tx.init(params)._replace(count=jnp.int32(1))  # the first step is tested, and made shorter
    last, value = step(params, later)
    return float(last.foretold), float(value)


@pytest.mark.parametrize(
    "decay", [{}, pytest.param({"weight_decay": 1e-3}, marks=pytest.mark.full)], ids=["plain", "l2"]
)
def test_no_step_foretells_more_than_there_is_to_gain(decay):
    """A part of the batch in which the inputs are zero has no curvature: the model is a line."""
    x, y, params = X * (np.arange(10) % 5 > 0)[:, None], DRAW(size=(10, 3)), {"w": DRAW(size=(4, 3))}

    def line(params, x):
        return x @ params["w"]

    given = line, ng.losses.squared_error
    least = 1e-3 / 2 * np.sum(params["w"] ** 2) if decay else 0
    fall, value = foretold(ng.capture(*given, product_stride=5), x, y, params, damping=1e-6, **decay)
    assert -1.0 - 1e-6 < fall / (value + least) < -0.9
    unknown = ng.capture(*given, product_stride=5, objective=ng.losses.squared_error)
    assert foretold(unknown, x, y, params, damping=1e-6, **decay)[0] < -100 * value


def test_the_least_loss_is_known_of_what_is_never_negative():
    def floor(likelihood, weights=None, **options):
        capture = ng.capture(apply, likelihood, labels="true", **options)
        targets = Y if likelihood is LOSS else np.ones((10, 3))
        return capture.value_and_grad(PARAMS, X, targets, weights=weights).curvature.floor

    assert floor(LOSS, product_stride=2) == floor(LOSS, WEIGHTS, product_stride=2, microbatches=2) == 0
    assert floor(LOSS, WEIGHTS - 1, product_stride=2) == -np.inf
    assert floor(LOSS) is floor(ng.losses.poisson, product_stride=2) is None
    term = ng.capture(apply, LOSS, labels="true", product_stride=2)
    out = ng.terms({"a": term}).value_and_grad(PARAMS, {"a": X}, {"a": Y})
    assert out.curvature.floor == 0


@pytest.mark.parametrize("stride", [0, -1, 1.5])
def test_a_stride_is_a_whole_number(stride):
    with pytest.raises(ValueError, match=r"`product_stride` is .*; expected a whole number of at least 1"):
        ng.capture(apply, LOSS, product_stride=stride)


def test_segments_are_of_whole_batches():
    with pytest.raises(ValueError, match=r"`product_stride` \(2\)"):
        ng.capture(apply, LOSS, product_stride=2, segments=lambda x: jnp.arange(len(x)))
