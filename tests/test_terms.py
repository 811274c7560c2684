"""A loss of several terms: one gradient, one curvature, exact in sample space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from reference import assert_differs, assert_equal, normal
from test_residuals import by_two_tangents, net, params
from watching import factors_of

import natgrad_jax as ng
from natgrad_jax.layers.rows import paired_rows, to_matrix

pytestmark = pytest.mark.usefixtures("x64")
DAMPING = 1e-2
X = {"inside": np.random.default_rng(0).normal(size=(4, 2)), "edge": np.random.default_rng(1).normal(size=(3, 2))}
Y = {"inside": np.random.default_rng(2).normal(size=(4, 1)), "edge": np.random.default_rng(3).normal(size=(3, 1))}
WEIGHTS = {"edge": 5.0}
FUNCTIONS = {"inside": by_two_tangents, "edge": lambda p, x: net(p, x)[:, None]}


def captures():
    return {name: ng.capture(f, ng.losses.squared_error, jacobian="examples") for name, f in FUNCTIONS.items()}


def errors(flat, tree, weights=WEIGHTS):
    """What half the square of is the loss."""
    parts = [
        (f(tree(flat), X[name]) - Y[name])[:, 0] * (weights.get(name, 1.0) / len(Y[name])) ** 0.5
        for name, f in FUNCTIONS.items()
    ]
    return jnp.concatenate(parts)


@pytest.fixture(scope="module")
def problem():
    """Two terms of a differential equation, evaluated."""
    with jax.enable_x64(True):
        loss, p = ng.terms(captures(), WEIGHTS), params()
        layers = loss.layers(p, X)
        tx = ng.scale_by_tengrad(layers, damping=DAMPING, blocks="joint")

        @jax.jit
        def step(p):
            out = loss.value_and_grad(p, X, Y)
            direction = tx.update(out.grad, tx.init(p), curvature=out.curvature)[0]
            elsewhere = out.curvature.value(jax.tree.map(lambda leaf: 0.9 * leaf, p))
            return out._replace(curvature=None), direction, out.curvature.along(direction), out.curvature(), elsewhere

        flat, tree = ravel_pytree(p)
        yield layers, step(p), flat, tree


@pytest.mark.full
def test_loss_and_gradient_are_weighted_sums_and_every_term_has_its_loss(problem):
    _, (out, _, _, _, elsewhere), flat, tree = problem
    half = jax.jit(jax.value_and_grad(lambda flat: jnp.sum(errors(flat, tree) ** 2) / 2))
    value, gradient = half(flat)
    assert_equal(out.value, value)
    assert_equal(ravel_pytree(out.grad)[0], gradient)
    assert_equal(elsewhere, half(0.9 * flat)[0])
    for name, f in FUNCTIONS.items():
        assert_equal(out.losses[name], np.mean((np.asarray(jax.jit(f)(tree(flat), X[name])) - Y[name]) ** 2) / 2)


@pytest.mark.full
def test_tengrad_of_all_terms_is_the_damped_gauss_newton_direction_of_their_sum(problem):
    layers, (_, direction, along, _, _), flat, tree = problem
    assert layers.examples == 7 and set(layers) == {"a", "b", "c"} and not layers.rest

    @jax.jit
    def dense(flat, weights):
        own = jax.jacrev(errors)(flat, tree, WEIGHTS)
        return jax.jacrev(errors)(flat, tree, weights), own.T @ errors(flat, tree, WEIGHTS)

    def expected(weights):
        jacobian, gradient = (np.asarray(each) for each in dense(flat, weights))
        return np.linalg.solve(jacobian.T @ jacobian + DAMPING * np.eye(flat.size), gradient), jacobian

    (found, jacobian), (without, _) = expected(WEIGHTS), expected({"edge": 1.0})
    direction = ravel_pytree(direction)[0]
    assert_equal(direction, found, 1e-7)
    assert_differs(direction, without)
    assert_equal(np.concatenate([np.ravel(along[name]) for name in X]), jacobian @ np.asarray(direction))


@pytest.mark.full
def test_the_moments_of_kfac_are_those_of_all_rows(problem):
    layers, (_, _, _, evidence, _), *_ = problem
    found = factors_of(layers["a"], evidence["a"])
    inputs, outputs = np.zeros((3, 3)), np.zeros((4, 4))
    for name, capture in captures().items():
        own = capture.layers(params(), X[name])
        said = jax.jit(lambda p, c=capture, n=name: c.value_and_grad(p, X[n], Y[n]).curvature()["a"])(params())
        size, layer = len(X[name]), own["a"]
        moments = factors_of(layer, said)
        inputs += size / 7 * np.asarray(moments[0])
        share = WEIGHTS.get(name, 1.0) * layer.positions / layers["a"].positions
        outputs += share * np.asarray(moments[1])
    assert_equal(found[0], inputs)
    assert_equal(found[1], outputs)


def heads(p, x):
    """A policy and a value from one body."""
    h = jnp.tanh(x @ p["body"] + p["bias"])
    return {"policy": h @ p["policy"], "value": h @ p["value"]}


def test_several_heads_of_one_model_are_terms_with_one_curvature():
    p = {"bias": normal(3, seed=1), "body": normal(2, 3), "policy": normal(3, 3, seed=2), "value": normal(3, 1, seed=3)}
    x, y = normal(5, 2, seed=4), {"policy": jnp.array([0, 1, 2, 1, 0]), "value": normal(5, 1, seed=5)}
    likelihoods = {"policy": ng.losses.softmax_cross_entropy, "value": ng.losses.squared_error}
    loss = ng.terms(
        {
            name: ng.capture(heads, each, labels="exact", readout=lambda outputs, name=name: outputs[name])
            for name, each in likelihoods.items()
        },
        {"value": 0.5},
    )
    layers = loss.layers(p, x)
    assert set(layers) == {"body", "policy", "value"} and layers.draws == 3 and not layers.rest
    tx = ng.scale_by_tengrad(layers, damping=DAMPING, blocks="joint")

    @jax.jit
    def direction(p):
        out = loss.value_and_grad(p, x, y)
        return tx.update(out.grad, tx.init(p), curvature=out.curvature)[0], out.grad

    found, gradient = (ravel_pytree(each)[0] for each in direction(p))
    flat, tree = ravel_pytree(p)
    jacobians, outputs = jax.jit(lambda f: (jax.jacrev(lambda f: heads(tree(f), x))(f), heads(tree(f), x)))(flat)
    jacobians, odds = jax.tree.map(np.asarray, jacobians), np.exp(np.asarray(outputs["policy"]))
    probabilities = odds / odds.sum(1, keepdims=True)
    hessians = probabilities[:, :, None] * np.eye(3) - np.einsum("ni,nj->nij", probabilities, probabilities)
    fisher = np.einsum("nip,nij,njq->pq", jacobians["policy"], hessians, jacobians["policy"])
    fisher += 0.5 * np.einsum("nip,niq->pq", jacobians["value"], jacobians["value"])
    assert_equal(found, np.linalg.solve(fisher / 5 + DAMPING * np.eye(flat.size), gradient), 1e-7)


def test_a_parameter_that_one_term_knows_and_another_does_not_is_an_array_with_gradients_of_examples():
    p = {"w": normal(2, 3), "v": normal(3, 1, seed=1)}
    functions = {"plain": lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], "odd": lambda p, x: x @ p["w"] ** 2 @ p["v"]}
    loss = ng.terms({
        name: ng.capture(f, ng.losses.squared_error, jacobian="examples") for name, f in functions.items()
    })
    layers = loss.layers(p, normal(3, 2))
    assert list(layers) == ["v"] and [layer.name for layer in layers.rest] == ["w"]
    assert "all terms" in layers.rest[0].note or layers.rest[0].note
    x, y = {"plain": normal(3, 2), "odd": normal(2, 2, seed=2)}, {"plain": normal(3, 1), "odd": normal(2, 1)}
    found = jax.jit(lambda p: loss.value_and_grad(p, x, y).curvature()["w"].examples["value"][0])(p)
    for name, cut in (("plain", slice(0, 3)), ("odd", slice(3, 5))):
        size = len(y[name])
        one = jax.jit(jax.jacrev(lambda w, name=name: functions[name](p | {"w": w}, x[name])[:, 0]))(p["w"])
        assert_equal(abs(found[cut]), abs(one) * (5 / size) ** 0.5)


def values(p, x):
    """A net of one hidden layer, with or without the last bias."""
    return jnp.tanh(x @ p["w"]) @ p["v"] + p.get("c", 0.0)


def slopes(p, x):
    """Its derivative by the first coordinate, which reads the last matrix the other way round, and no bias."""
    return jax.vmap(lambda point: jax.grad(lambda z: values(p, z)[0])(point)[:1])(x)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("bias", [{"c": np.zeros(1)}, {}], ids=["bias", "no bias"])
def test_a_matrix_that_one_term_reads_the_other_way_round_is_one_layer_with_the_gradients_of_the_examples(bias, draws):
    p = {"w": normal(2, 3), "v": normal(3, 1, seed=1), **bias}
    functions, sizes = {"values": values, "slopes": slopes}, {"values": 3, "slopes": 2}
    x, y = ({name: normal(size, k, seed=k) for name, size in sizes.items()} for k in (2, 1))
    weights = {name: np.arange(1.0, size + 1) for name, size in sizes.items()}
    labels = {"labels": "sampled", "draws": draws} if draws > 1 else {"labels": "exact"}
    loss = ng.terms({
        name: ng.capture(f, ng.losses.squared_error, jacobian="examples", **labels) for name, f in functions.items()
    })
    layers = loss.layers(p, x)
    assert set(layers) == {"w", "v"} and not layers.rest and layers["v"].shape == (3 + len(bias), 1)

    @jax.jit
    def seen(p):
        out = loss.value_and_grad(p, x, y, weights=weights, key=jax.random.key(0) if draws > 1 else None)
        evidence = out.curvature()["v"]
        a, g = paired_rows(layers["v"], evidence)
        return jnp.einsum("nti,knto->kni", a, g), to_matrix(layers["v"], evidence.gradient)

    each, whole = seen(p)
    assert_equal(jnp.sum(each, axis=1), whole[..., 0])
    if draws == 1:
        for name, cut in (("values", slice(0, 3)), ("slopes", slice(3, 5))):
            flat = {"v": p["v"], **bias}
            one = jax.jit(jax.jacrev(lambda own, name=name: functions[name](p | own, x[name])[:, 0]))(flat)
            expected = jnp.concatenate([one[key].reshape(sizes[name], -1) for key in ("v", *bias)], axis=1)
            share = weights[name].sum() / sum(each.sum() for each in weights.values())
            assert_equal(abs(each[0, cut]), abs(expected) * (weights[name][:, None] / share) ** 0.5)


class Heads(nnx.Module):
    """Two heads behind a normalisation and a dropout."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm, self.drop = nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.one, self.two = nnx.Linear(2, 1, rngs=rngs), nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        h = self.drop(self.norm(x))
        return self.one(h), self.two(h)


@pytest.mark.full
@pytest.mark.parametrize("batches", [1, 2])
def test_heads_of_an_nnx_model_are_one_call_of_it_and_other_batches_are_others(batches):
    x = [jnp.asarray(normal(4, 2, seed=seed)) for seed in range(batches)]
    heads = {"one": lambda out: out[0], "two": lambda out: out[1]}
    model = Heads()
    loss = ng.terms({
        name: ng.nnx.capture(model, ng.losses.squared_error, labels="true", readout=head)
        for name, head in heads.items()
    })

    @nnx.jit
    def terms(model):
        inputs = x[0] if batches == 1 else dict(zip(heads, x, strict=True))
        return loss.value_and_grad(model, inputs, dict.fromkeys(heads, jnp.ones((4, 1)))).outputs

    @nnx.jit
    def by_hand(model):
        return [model(each) for each in x]

    ours, theirs = Heads(), Heads()
    outputs, expected = terms(ours), by_hand(theirs)
    for name, number in (("one", 0), ("two", batches - 1)):
        jax.tree.map(assert_equal, outputs[name], expected[number])
    moved = [nnx.state(each, nnx.BatchStat, nnx.RngCount) for each in (ours, theirs)]
    for one, other in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def evidence_of_one_term():
    """The curvature of a capture of its own, for an optimizer of the layers of terms."""
    p, x = {"w": jnp.ones((2, 1))}, X["edge"]
    alone = ng.capture(lambda p, x: x @ p["w"], ng.losses.squared_error, labels="true")
    tx = ng.scale_by_kfac(ng.terms({"plain": alone}).layers(p, x), damping=DAMPING)
    out = alone.value_and_grad(p, x, Y["edge"])
    tx.update(out.grad, tx.init(p), curvature=out.curvature)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ng.terms({}), "at least one"),
        (lambda: ng.terms({"a": net}), "expected what `ng.capture`"),
        (lambda: ng.terms(captures(), {"other": 1.0}), "no terms"),
        (lambda: ng.terms(captures()).value_and_grad(params(), X, Y["edge"]), "one entry for each term"),
        (lambda: ng.terms(captures()).layers(params(), {"edge": X["edge"]}), "without the terms"),
        (lambda: ng.terms(list(captures().values())), "`captures` is of type list"),
        (lambda: ng.terms(captures(), [1.0]), "`weights` is of type list"),
        (lambda: ng.terms(captures()).value_and_grad(params(), X, Y, weights=jnp.ones(4)), "`weights` is of type"),
        (lambda: ng.terms(captures()).value_and_grad(params(), X, Y, weights={"egde": jnp.ones(3)}), "egde.*no terms"),
        (
            lambda: ng.terms({"a": ng.capture(net, ng.losses.squared_error, labels="forward")}).layers(
                params(), X["edge"]
            ),
            "'a'.*forward",
        ),
        (lambda: evidence_of_one_term(), "its rows cannot be made"),
    ],
)
def test_terms_that_do_not_fit_are_refused(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def bent(p, x):
    """A parameter of no layer beside a layer."""
    return jnp.tanh(x @ jnp.sin(p["odd"])) @ p["last"]


@pytest.mark.parametrize(
    ("workspace", "pieces"), [(None, 1), *(pytest.param(700, pieces, marks=pytest.mark.full) for pieces in (1, 2))]
)
def test_a_direction_of_which_nothing_is_kept_is_that_of_all_terms(workspace, pieces):
    p = {"odd": normal(2, 3), "last": normal(3, 2, seed=1)}
    functions = {"one": lambda p, x: bent(p, x)[:, :1], "two": bent}  # of one draw and of two
    y = {"one": normal(4, 1, seed=2), "two": normal(3, 2, seed=3)}
    x = {"one": normal(4, 2, seed=4), "two": normal(3, 2, seed=5)}
    options = {"labels": "exact", "jacobian": "examples"}
    cut = {"one": pieces, "two": 1}
    loss, whole = (
        ng.terms(
            {n: ng.capture(f, ng.losses.squared_error, microbatches=k[n], **options) for n, f in functions.items()},
            {"two": 3.0},
        )
        for k in (cut, dict.fromkeys(cut, 1))
    )
    layers, settings = loss.layers(p, x), {"damping": DAMPING, "blocks": "joint", "refresh_every": 1}
    assert set(layers) == {"last"} and layers.draws == 2
    weights = {"two": jnp.array([1.0, 0.0, 2.0])}

    @jax.jit
    def directions():
        out, all_at_once = (
            each.value_and_grad(p, x, y, key=jax.random.key(0), weights=weights) for each in (loss, whole)
        )
        txs = [
            ng.scale_by_tengrad(layers, **settings, **more) for more in ({}, {"kept": False, "workspace": workspace})
        ]
        halved = ng.terms(loss.captures, {"two": 1.5}).value_and_grad(p, x, y, key=jax.random.key(0), weights=weights)
        found = [
            tx.update(out.grad, tx.init(p), curvature=curvature)[0]
            for tx, curvature in zip(txs, (all_at_once.curvature, out.curvature), strict=True)
        ]
        found.append(txs[1].update(out.grad, txs[1].init(p), curvature=halved.curvature)[0])
        return [ravel_pytree(each)[0] for each in found]

    kept, unkept, other = directions()
    assert_equal(unkept, kept, 1e-8)
    assert_differs(other, kept)
