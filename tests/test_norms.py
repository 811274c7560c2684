"""Scale and shift of a norm: 2 x 2 for each channel, the block of the dense Fisher matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from flax import nnx
from reference import assert_equal

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
        return addresses.flatten(out.grad), addresses.flatten(updates), state.operators

    gradient, updates, operators = step()
    blocks = jax.jit(lambda params: {norm.name: dense_block(apply, params, norm) for norm in norms})(params)
    for norm in norms:
        assert_equal(operators[norm.name].value, blocks[norm.name])
        mine, found = (
            np.stack([np.ravel(tree[leaf.address]) for leaf in norm.leaves], axis=-1) for tree in (gradient, updates)
        )
        damped = np.asarray(blocks[norm.name]) + DAMPING * np.eye(norm.shape[1])
        assert_equal(found, np.linalg.solve(damped, mine[..., None])[..., 0])
        if norm.shape[1] == 2:  # the control: shift and scale do correlate
            assert np.abs(blocks[norm.name][:, 0, 1]).max() > 1e-3 * np.abs(blocks[norm.name]).max()
