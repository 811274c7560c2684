"""Scale and shift of a norm: 2 x 2 for each channel, the block of the dense Fisher matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from flax import nnx
from reference import assert_differs, assert_equal

import natgrad_jax as ng
from natgrad_jax import addresses

LOSS = ng.losses.softmax_cross_entropy
X = np.random.default_rng(0).normal(size=(5, 3, 4))
Y = np.array([0, 2, 1, 1, 0])
DAMPING = 0.01


def by_hand(params, x):
    """Norms as people write them."""
    y = jnp.tanh(x @ params["w"])
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5) * params["ln"]["scale"]
    y = y + params["ln"]["shift"]
    y = jnp.tanh(y) * jax.lax.rsqrt(jnp.mean(jnp.tanh(y) ** 2, -1, keepdims=True) + 1e-6) * (1 + params["rms"])
    y = y + params["gain"] * jnp.tanh(y)
    folded = params["bn"][0] / jnp.sqrt(jnp.arange(1.0, 5.0))  # of known statistics, before the product
    y = folded * (y - 0.3) + params["bn"][1]

    def turn(carry, own):
        carry = jnp.sin(carry) * own[0] + own[1]
        return carry * params["shared"], None

    y, _ = jax.lax.scan(turn, y, params["turns"])
    return (y @ params["v"]).mean(1)


def hand_params():
    shapes = {"w": (4, 4), "v": (4, 3), "rms": (4,), "gain": (), "shared": (4,)}
    shapes |= {"ln": {"scale": (4,), "shift": (4,)}, "bn": [(4,), (4,)], "turns": [(2, 4), (2, 4)]}
    numbers = iter(range(100))
    return jax.tree.map(
        lambda shape: 1 + 0.5 * reference.normal(*shape, seed=next(numbers)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


class Net(nn.Module):
    """The norms of linen, in evaluation where they have statistics."""

    @nn.compact
    def __call__(self, x):
        for norm in (nn.LayerNorm(), nn.GroupNorm(2), nn.RMSNorm(), nn.BatchNorm(use_running_average=True)):
            x = norm(jnp.tanh(nn.Dense(4)(x)))
        return nn.Dense(3)(x).mean(1)


class Twin(nnx.Module):
    """The same of NNX."""

    def __init__(self):
        rngs, kind = nnx.Rngs(0), {"param_dtype": jnp.float64}
        self.dense = nnx.List([nnx.Linear(4, 4, rngs=rngs, **kind) for _ in range(4)])
        makers = (nnx.LayerNorm, lambda n, **k: nnx.GroupNorm(n, 2, **k), nnx.RMSNorm, nnx.BatchNorm)
        self.norms = nnx.List([make(4, rngs=rngs, **kind) for make in makers])
        self.head = nnx.Linear(4, 3, rngs=rngs, **kind)
        self.norms[3].use_running_average = True

    def __call__(self, x):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = norm(jnp.tanh(dense(x)))
        return self.head(x).mean(1)


def of_linen():
    variables = Net().init(jax.random.key(0), X)
    statistics = variables["batch_stats"]
    params = reference.random_params(Net(), X)
    capture = ng.linen.capture(Net(), LOSS, labels="exact", verify=False)
    model = {"params": params, "batch_stats": statistics}
    return capture, lambda: model, params, lambda p, x: Net().apply({"params": p, "batch_stats": statistics}, x)


def of_nnx():
    model = Twin()
    graph, params, others = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * reference.normal(*leaf.shape), params)
    capture = ng.nnx.capture(model, LOSS, labels="exact", verify=False)
    return (
        capture,
        lambda: nnx.merge(graph, params, jax.tree.map(jnp.copy, others)),
        params,
        lambda p, x: nnx.merge(graph, p, others)(x),
    )


def of_a_function():
    capture, params = ng.capture(by_hand, LOSS, labels="exact", verify=False), hand_params()
    return capture, lambda: params, params, by_hand


CASES = {
    "linen": (of_linen, ["BatchNorm_0", "GroupNorm_0", "LayerNorm_0", "RMSNorm_0"], [2, 2, 2, 1]),
    "nnx": (of_nnx, ["norms/0", "norms/1", "norms/2", "norms/3"], [2, 2, 1, 2]),
    "by hand": (of_a_function, ["bn/0", "gain", "ln", "rms", "shared", "turns/0"], [2, 1, 2, 1, 1, 2]),
}


def dense_block(apply, params, norm):
    """F of the arrays of a norm, channel by channel [channels, 2, 2], of the whole matrix by its definition."""
    leaves = {name: jnp.asarray(leaf) for name, leaf in addresses.flatten(params).items()}
    mine = [leaves[leaf.address].reshape(-1) for leaf in norm.leaves]

    def outputs(flat, x):
        own = {leaf.address: each.reshape(leaf.shape) for leaf, each in zip(norm.leaves, flat, strict=True)}
        return apply(addresses.replace(params, leaves | own), x[None])[0]

    jacobian = jnp.stack(jax.vmap(jax.jacrev(outputs), (None, 0))(mine, X), axis=-1)  # [N, C, channels, 2]
    outs = jax.vmap(outputs, (None, 0))(mine, X)
    hessian = jax.vmap(jax.hessian(reference.LOSSES["softmax_cross_entropy"]))(outs, Y)
    return jnp.einsum("napi,nab,nbpj->pij", jacobian, hessian, jacobian) / len(X)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_the_block_of_a_norm_is_that_of_the_dense_fisher_matrix(case):
    make, names, arrays = CASES[case]
    capture, model, params, apply = make()
    layers = capture.layers(model(), X)
    norms = [layer for layer in layers.rest if layer.kind == "norm"]
    assert [layer.shape[1] for layer in norms] == arrays
    assert all(norm.name.startswith(name) for norm, name in zip(norms, names, strict=True))
    tx = ng.scale_by_kfac(layers, damping=DAMPING, refresh_every=1)

    @jax.jit
    def step():
        out = capture.value_and_grad(model(), X, Y)
        updates, state = tx.update(out.grad, tx.init(params), curvature=out.curvature)
        return addresses.flatten(out.grad), addresses.flatten(updates), state

    gradient, updates, state = step()
    said = ng.diagnose(state, layers)
    blocks = jax.jit(lambda params: {norm.name: dense_block(apply, params, norm) for norm in norms})(params)
    for norm in norms:
        assert_equal(state.operators[norm.name].value, blocks[norm.name])
        largest = np.linalg.eigvalsh(np.asarray(blocks[norm.name])).max()
        np.testing.assert_allclose(said[f"{norm.name}/largest"], largest, rtol=1e-6)
        mine, found = (
            np.stack([np.ravel(tree[leaf.address]) for leaf in norm.leaves], axis=-1) for tree in (gradient, updates)
        )
        damped = np.asarray(blocks[norm.name]) + DAMPING * np.eye(norm.shape[1])
        assert_equal(found, np.linalg.solve(damped, mine[..., None])[..., 0])
        if norm.shape[1] == 2:  # the control: shift and scale do correlate
            assert np.abs(blocks[norm.name][:, 0, 1]).max() > 1e-3 * np.abs(blocks[norm.name]).max()


def simple(params, x):
    """A layer norm on what a product gives, and another product."""
    y = x @ params["w"]
    y = (y - y.mean(-1, keepdims=True)) / (y.std(-1, keepdims=True) + 0.1)
    return (jnp.tanh(y * params["scale"] + params["shift"]) @ params["v"]).mean(1)


def simple_params(dtype="float64"):
    shapes = {"w": (4, 4), "scale": (4,), "shift": (4,), "v": (4, 3)}
    return {name: reference.normal(*shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_c2_the_gradients_of_weighted_examples_also_in_pieces():
    params, weights = simple_params(), np.array([1.0, 0.0, 2.0, 0.5])
    x, y = np.where(np.arange(4)[:, None, None] == 1, np.nan, X[:4]), Y[:4]

    def found(microbatches):
        capture = ng.capture(simple, LOSS, labels="exact", microbatches=microbatches, verify=False)
        out = capture.value_and_grad(params, x, y, weights=weights)
        return {role: leaf for role, leaf in out.curvature()["scale+shift"].examples.items()}

    whole, pieces = jax.jit(lambda: (found(1), found(2)))()

    def outputs(scale, shift, x):
        return simple(params | {"scale": scale, "shift": shift}, x[None])[0]

    at = params["scale"], params["shift"]
    jacobians = jax.vmap(jax.jacrev(outputs, (0, 1)), (None, None, 0))(*at, X[:4])
    hessians = jax.vmap(jax.hessian(reference.LOSSES["softmax_cross_entropy"]))(
        jax.vmap(outputs, (None, None, 0))(*at, X[:4]), y
    )
    for role, jacobian in zip(("scale", "shift"), jacobians, strict=True):
        square = weights[:, None] * np.einsum("nap,nab,nbp->np", jacobian, hessians, jacobian)
        for mine in (whole, pieces):
            assert_equal(np.mean(np.square(mine[role]), axis=0), square)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_tengrad_and_kfac_solve_a_norm_by_the_gradients_of_its_examples():
    params = simple_params()
    capture = ng.capture(simple, LOSS, labels="true", verify=False)
    layers = capture.layers(params, X)
    makers = {"tengrad": ng.scale_by_tengrad, "kfac": ng.scale_by_kfac}

    def loss(pair, x, y):
        logits = simple(params | dict(zip(("scale", "shift"), pair.T, strict=True)), x[None])[0]
        return -jax.nn.log_softmax(logits)[y]

    @jax.jit
    def both(pair):
        out = capture.value_and_grad(params, X, Y)
        built = {name: make(layers, damping=DAMPING, refresh_every=1) for name, make in makers.items()}
        updates = {
            name: tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0] for name, tx in built.items()
        }
        return updates, jax.vmap(jax.grad(loss), (None, 0, 0))(pair, X, Y)

    updates, each = both(jnp.stack([params["scale"], params["shift"]], axis=-1))  # [N, channels, 2]
    gradient = np.mean(each, axis=0)
    damped = np.einsum("ncp,ncq->cpq", each, each) / len(X) + DAMPING * np.eye(2)
    expected = np.linalg.solve(damped, gradient[..., None])[..., 0]
    for found in updates.values():
        assert_equal(np.stack([found["scale"], found["shift"]], axis=-1), expected)
    assert_differs(gradient / np.diagonal(damped, axis1=1, axis2=2), expected)  # without what scale and shift share


def test_what_a_mask_leaves_of_a_norm_has_a_block_of_its_own():
    params = simple_params("float32")
    layers = ng.capture(simple, LOSS).layers(params, np.float32(X))
    assert [layer.shape for layer in layers.rest] == [(4, 2)]
    tx = optax.masked(ng.scale_by_kfac(layers, damping=DAMPING), {"w": True, "v": True, "scale": True, "shift": False})
    assert tx.init(params).inner_state.statistics["scale+shift"].total.shape == (4, 1, 1)


def test_a_norm_is_told_in_the_report_and_can_be_excluded():
    params = simple_params("float32")
    layers = ng.capture(simple, LOSS).layers(params, np.float32(X))
    assert "scale+shift  4 of 2 x 2" in str(layers)
    assert "Every parameter is covered" in str(layers)
    found = ng.capture(simple, LOSS, exclude="shift").layers(params, np.float32(X))
    assert [(layer.name, layer.note) for layer in found.rest] == [("scale", "excluded"), ("shift", "excluded")]
    forward = ng.capture(simple, LOSS, labels="forward").layers(params, np.float32(X))
    assert [layer.kind for layer in forward.rest] == ["parameter", "parameter"]


FACTOR, ADDED = "a factor entry by entry, not of a product", "added, not as the bias of a product"
REFUSED = {
    "a table of positions": (lambda p, y: y * p["table"], {"table": (3, 4)}, {"table": FACTOR}),
    "a product of its own": (lambda p, y: y * p["s"] + (y @ p["s"])[..., None], {"s": (4,)}, {"s": FACTOR}),
    "a factor before a product": (lambda p, y: y @ (p["m"] * jnp.arange(4.0)), {"m": (4, 4)}, {"m": FACTOR}),
    "a number before a product": (lambda p, y: y @ (1 + p["m"]), {"m": (4, 4)}, {"m": ADDED}),
    "a shift behind more": (lambda p, y: jnp.tanh(y * p["s"]) + p["t"], {"s": (4,), "t": (4,)}, {"t": ADDED}),
    "a shift of two": (
        lambda p, y: (y * p["s"] + p["t"]) * p["r"] + p["t"],
        {"s": (4,), "r": (4,), "t": (4,)},
        {"t": ADDED},
    ),
    "a shift alone": (lambda p, y: jnp.tanh(y) + p["t"], {"t": (4,)}, {"t": ADDED}),
    "noise": (lambda p, y: y * (p["m"] + p["s"] * jnp.arange(4.0)), {"m": (4,), "s": (4,)}, {"m": ADDED, "s": ADDED}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_norm_is_named(case):
    apply, shapes, notes = REFUSED[case]
    params = {name: reference.normal(*shape, dtype="float32") for name, shape in shapes.items()}

    def net(params, x):
        return apply(params, x).mean(1)

    with pytest.warns(UserWarning, match="no layer"):
        found = ng.capture(net, ng.losses.squared_error).layers(params, np.float32(X))
    said = {layer.name: layer.note for layer in found.rest if layer.kind == "parameter"}
    assert {name: said[name] for name in notes} == notes
