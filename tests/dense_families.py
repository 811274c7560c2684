"""The nets of `families` and what the definitions say of them, in float64; nothing of natgrad_jax is imported here.

Gradients of the examples are made by `jax.jacrev` of the net. What a product reads, and what comes back to it, is of
the same net written out by hand, each product with a probe added to it. The draws are the columns of the root of the
exact Hessian times the root of their number, so that moments are means over draws K; each example has signs of its own.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from reference import take, wide
from tasks import MLP

NETS = {"mlp": MLP(jnp.float64), **families.NETS, "lstm": families.Recurrent(jnp.float64)}
SHAPES = {"mlp": (5,), **families.SHAPES}
LAYERS = {"mlp": ("Dense_0", "Dense_1", "Dense_2"), **families.LAYERS}
MIXED = {"resnet": ("Conv_0", "ScanBlock_0/Conv_0")}
"""The layers in front of a batch normalisation: the outputs of one example depend on what they make of others."""
GROUPED = {("dilated", "Conv_1"): 2}
CHANNELS = {
    ("dilated", "Conv_0"): 2,
    ("dilated", "Conv_1"): 2,
    ("resnet", "Conv_0"): 2,
    ("resnet", "ScanBlock_0/Conv_0"): 3,
}
"""Of what a convolution reads, for each group."""


class Dense(NamedTuple):
    """What the definitions say of one batch.

    Attributes:
        variables: of the net, under "params" and, with batch normalisation, "batch_stats".
        x: inputs [N, ...].
        y: labels [N].
        grad: of the mean loss, a tree like the parameters.
        jacobian: of the outputs of the batch by all parameters, [N, C, P], in the order of `ravel_pytree`.
        root: S of the Hessian of each example, S S^T = H, [N, C, C].
        examples: {layer: gradients of the examples D [K, N, S, I, O]}.
        inputs: {layer: a [S, N, T, I]}; of a product with the transposed matrix, what comes back.
        cotangents: {layer: g [K, S, N, T, O]}.
    """

    variables: Any
    x: Any
    y: Any
    grad: Any
    jacobian: Any
    root: Any
    examples: dict[str, Any]
    inputs: dict[str, Any]
    cotangents: dict[str, Any]

    @property
    def params(self):
        return self.variables["params"]


def variables_of(family: str, x) -> Any:
    """Drawn at random, the biases and the norms as well."""
    variables = wide(jax.jit(NETS[family].init)(jax.random.key(7), x))
    draw = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.2 * draw.normal(size=leaf.shape), variables["params"])
    return {**variables, "params": moved}


def outputs(family: str, variables: Any, params: Any, x):
    """The logits [N, C] of a batch, in training."""
    return NETS[family].apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]


@cache
def dense(family: str, examples: int = 6, labels: str = "exact") -> Dense:
    """The definitions on one batch; `labels="true"` has one draw, the derivatives of the loss itself."""
    draw = np.random.default_rng(3)
    x = jnp.asarray(draw.normal(size=(examples, *SHAPES[family])))
    variables = variables_of(family, x)
    y = jnp.asarray(draw.integers(3, size=examples))
    return Dense(variables, x, y, *_definitions(family, labels, variables, x, y))


@partial(jax.jit, static_argnums=(0, 1))
def _definitions(family: str, labels: str, variables: Any, x, y):
    params = variables["params"]
    apply = partial(outputs, family, variables)
    p = jax.nn.softmax(apply(params, x))
    tree = jax.jacrev(apply)(params, x)
    slopes = (p - jax.nn.one_hot(y, p.shape[1])) / len(x)
    grad = jax.tree.map(lambda leaf: jnp.tensordot(slopes, leaf, 2), tree)
    flat = jax.vmap(jax.vmap(lambda leaves: ravel_pytree(leaves)[0]))(tree)
    root = jax.vmap(lambda p: jnp.diag(jnp.sqrt(p)) - jnp.outer(p, jnp.sqrt(p)))(p)
    signs = jax.random.rademacher(jax.random.key(0), p.shape[::-1], p.dtype)  # of each draw and example
    exact = jnp.moveaxis(root, 2, 0) * signs[..., None] * p.shape[1] ** 0.5  # [K, N, C]
    seeds = slopes[None] * len(x) if labels == "true" else exact
    examples = {}
    for name in LAYERS[family]:
        of_outputs = jax.vmap(jax.vmap(lambda leaves, name=name: matrix(family, name, leaves)))(tree)
        examples[name] = jnp.einsum("knc,nc...->kn...", seeds, of_outputs)
    return grad, flat, root, examples, *_recorded(family, params, x, seeds)


# Parameters as matrices -----------------------------------------------------------------------------------------------


def matrix(family: str, name: str, tree: Any):
    """The arrays of a layer as matrices [S, I, O]: rows of the kernel, then the bias; gates side by side."""
    folder, _, last = name.rpartition("/")
    parts = [take(tree, f"{folder}/{part}".strip("/")) for part in last.split("+")]
    if "embedding" in parts[0]:
        return parts[0]["embedding"][None]
    copies, groups = (2 if name.startswith("Scan") else 1), GROUPED.get((family, name), 1)

    def columns(part):
        return part["bias"].size // copies if "bias" in part else part["kernel"].shape[-1]

    rows = [jnp.concatenate([part["kernel"].reshape(copies, -1, columns(part)) for part in parts], axis=-1)]
    if "bias" in parts[0]:
        rows.append(jnp.concatenate([part["bias"].reshape(copies, 1, -1) for part in parts], axis=-1))
    found = jnp.concatenate(rows, axis=1)
    if groups == 1:
        return found
    return jnp.moveaxis(found.reshape(found.shape[1], groups, -1), 1, 0)


def tensors(family: str, name: str, tree: Any, whole: bool) -> list[Any]:
    """The arrays of a layer, one for each copy, a kernel of a convolution as [window, C, O]; else matrices if whole.

    A kernel of attention is the matrix from what it reads to all heads, and its bias a vector.
    """
    found, convolution = [], "Conv" in name
    for weights in np.asarray(matrix(family, name, tree)):
        if whole and not convolution:
            found.append(weights)
            continue
        rows, channels = len(weights) - ("Embed" not in name and "/ii+" not in name), CHANNELS.get((family, name), 0)
        for columns in np.split(weights, 4 if "+" in name else 1, axis=1):
            kernel = columns[:rows]
            found.append(kernel.reshape(-1, channels, kernel.shape[1]) if convolution else kernel)
            found += [] if convolution or rows == len(columns) else [columns[rows]]
    if convolution:
        biases = np.asarray(matrix(family, name, tree))[:, -1]
        found += [*biases] if name.startswith("Scan") else [biases.ravel()]
    return found


# The nets, written out ------------------------------------------------------------------------------------------------


class Products:
    """The products of a net: what they read is recorded, probes are added to what they give."""

    def __init__(self, family: str, params: Any, probes: Any):
        self.family, self.params, self.probes = family, params, probes
        self.read, self.gave = {}, {}

    def __call__(self, name: str, rows, *, copy: int | None = None, transposed: bool = False):
        """Rows [N, T, I] times the matrix of a layer, [N, T, O]; [S, N, T, ...] of groups."""
        weights = matrix(self.family, name, self.params)
        weights = weights if copy is None else weights[copy : copy + 1]
        stacked = rows if rows.ndim == 4 else rows[None]
        if stacked.shape[-1] < weights.shape[1] and not transposed:
            stacked = jnp.concatenate([stacked, jnp.ones_like(stacked[..., :1])], axis=-1)
        number = sum(key[0] == name for key in self.read)
        key = (name, number, "transposed" if transposed else "" if copy is None else "copy")
        found = jnp.einsum("snto,sio->snti" if transposed else "snti,sio->snto", stacked, weights)
        self.read[key], self.gave[key] = stacked, found
        found = found + self.probes.get(key, 0)
        return found if rows.ndim == 4 else found[0]


def _recorded(family: str, params: Any, x, seeds):
    """a and g of every layer."""

    def run(probes):
        products = Products(family, params, probes)
        return _WRITTEN[family](products, params, x), (products.read, products.gave)

    _, (_, gave) = jax.eval_shape(run, {})
    probes = {key: jnp.zeros(shape.shape) for key, shape in gave.items()}
    _, pull, (read, _) = jax.vjp(run, probes, has_aux=True)
    (back,) = jax.vmap(pull)(seeds)
    inputs, cotangents = {}, {}
    for name in LAYERS[family]:
        keys = [key for key in read if key[0] == name]
        pairs = [(read[key], back[key]) for key in keys]
        if any(kind == "transposed" for *_, kind in keys):
            pairs = [_balanced(*_turned(*pair, kind)) for pair, (*_, kind) in zip(pairs, keys, strict=True)]
        side_by_side = 0 if keys[0][-1] == "copy" else 2  # copies of a stack; else further positions
        inputs[name] = jnp.concatenate([a for a, _ in pairs], axis=side_by_side)
        cotangents[name] = jnp.concatenate([g for _, g in pairs], axis=side_by_side + 1)
    return inputs, cotangents


def _turned(read, back, kind: str):
    """Of a product with the transposed matrix each draw is a position of its own: a is what comes back in it."""
    if kind != "transposed":
        return read, back
    draws, copies, examples, positions, rows = back.shape
    a = jnp.moveaxis(back, 0, 3).reshape(copies, examples, positions * draws, rows)
    g = jnp.einsum("kl,snto->ksntlo", jnp.eye(draws), read)
    return a, g.reshape(draws, copies, examples, positions * draws, -1)


def _balanced(a, g):
    """The same products D, both sides with one mean square length."""
    scale = (jnp.mean(jnp.sum(g**2, -1)) / jnp.mean(jnp.sum(a**2, -1))) ** 0.25
    return a * scale, g / scale


def patches(x, window: tuple[int, ...], stride: int = 1, gaps: tuple[int, ...] = (1, 1)):
    """The inputs of a convolution that is filled up to `SAME`: [N, ..., C] -> [N, T, window, C]."""
    axes, channels = len(window), x.shape[-1]
    for axis in reversed(range(axes)):
        size, width, gap = x.shape[1 + axis], window[axis], gaps[axis]
        count = -(-size // stride)
        low = max((count - 1) * stride + (width - 1) * gap + 1 - size, 0) // 2
        at = stride * np.arange(count)[:, None] + gap * np.arange(width) - low
        there = (at >= 0) & (at < size)
        x = jnp.take(x, at.clip(0, size - 1), axis=1 + axis) * there.reshape(*at.shape, *(1,) * (x.ndim - 2 - axis))
    order = (0, *(1 + 2 * axis for axis in range(axes)), *(2 + 2 * axis for axis in range(axes)), 1 + 2 * axes)
    x = x.transpose(order)
    return x.reshape(len(x), np.prod(x.shape[1 : 1 + axes]), np.prod(window), channels)


def _flat(rows):
    return rows.reshape(*rows.shape[:-2], -1)


def _normalised(x, arrays, axes, epsilon):
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axes, keepdims=True) + epsilon) * arrays["scale"] + arrays["bias"]


def _mlp(product, params, x):
    h = x[:, None]
    for number in range(3):
        h = product(f"Dense_{number}", jnp.tanh(h) if number else h)
    return h[:, 0]


def _dilated(product, params, x):
    h = nn.relu(product("Conv_0", _flat(patches(x, (2, 3), gaps=(2, 1)))))
    rows = patches(h.reshape(*x.shape[:-1], 4), (2, 2), 2, (2, 2))
    h = product("Conv_1", jnp.stack([_flat(rows[..., :2]), _flat(rows[..., 2:])]))
    return product("Dense_0", nn.relu(jnp.concatenate([*h], axis=-1)).reshape(len(x), 1, -1))[:, 0]


def _transformer(product, params, x):
    def normed(h, number):
        return _normalised(h, params[f"LayerNorm_{number}"], -1, 1e-6)

    h = product("Embed_0", jax.nn.one_hot((10 * jnp.abs(x)).astype(int) % 5, 5))
    folder, z = "MultiHeadDotProductAttention_0", normed(h, 0)
    query, key, value = (product(f"{folder}/{of}", z).reshape(*x.shape, 2, 2) for of in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", query, key) / 2**0.5)
    h = h + product(f"{folder}/out", jnp.einsum("nhts,nshd->nthd", weights, value).reshape(h.shape))
    h = h + product("Dense_0", nn.gelu(product("Dense_1", normed(h, 1))))
    return product("Embed_0", normed(h, 2), transposed=True).mean(1)


def _resnet(product, params, x):
    h, norms = product("Conv_0", _flat(patches(x, (2,)))), params["ScanBlock_0"]["BatchNorm_0"]
    for copy in range(2):
        y = product("ScanBlock_0/Conv_0", _flat(patches(h, (3,))), copy=copy)
        h = h + nn.relu(_normalised(y, {role: leaf[copy] for role, leaf in norms.items()}, (0, 1), 1e-5))
    return product("Dense_0", h.mean(1, keepdims=True))[:, 0]


def _lstm(product, params, x):
    hidden = memory = jnp.zeros((len(x), 1, 3))
    for step in range(x.shape[1]):
        gates = product("OptimizedLSTMCell_0/hi+hf+hg+ho", hidden)
        gates = gates + product("OptimizedLSTMCell_0/ii+if+ig+io", x[:, step : step + 1])
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        memory = nn.sigmoid(f) * memory + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(memory)
    return product("Dense_0", hidden)[:, 0]


_WRITTEN = {"mlp": _mlp, "dilated": _dilated, "transformer": _transformer, "resnet": _resnet, "lstm": _lstm}
