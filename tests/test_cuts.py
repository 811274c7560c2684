"""Parameters that are cut before their products: fused kernels, gates in one array, layers in one array."""

from itertools import product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import N, case, rows_give_the_gradient_of_every_example, watched
from reference import assert_differs, assert_equal, damped, normal

import natgrad_jax as ng
from natgrad_jax.algebra.arranged import build, reshaped, shape, source, transposed
from natgrad_jax.algebra.cuts import Block, sliced, whole
from natgrad_jax.layers.rows import input_moment, output_moment

pytestmark = pytest.mark.usefixtures("x64")
DAMPING = 0.1


def _different(parts):
    """Something of all parts that is not the same for any two."""
    return sum(jnp.tanh((place + 1) * part) for place, part in enumerate(parts))


def _conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def _lstm(p, x):
    """A cell whose four gates are in one kernel [inputs and hidden, 4 H], cut both ways."""
    hidden = p["b"].shape[0] // 4

    def turn(carry, x):
        h, c = carry
        cut = zip(jnp.split(p["w"], 4, axis=1), jnp.split(p["u"], 4, axis=1), jnp.split(p["b"], 4), strict=True)
        i, f, g, o = (x @ w + b + h @ u for w, u, b in cut)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zeros = jnp.zeros((len(x), hidden))
    return jax.lax.scan(turn, (zeros, zeros), x.swapaxes(0, 1))[0][0]


CASES = {
    "some columns": lambda: case(lambda p, x: x @ p["w"][:, :2], {"w": (4, 3)}, (N, 4), "w"),
    "fused, with a bias": lambda: case(
        lambda p, x: _different(x @ k + b for k, b in zip(jnp.split(p["w"], 3, 1), jnp.split(p["b"], 3), strict=True)),
        {"w": (4, 6), "b": (6,)},
        (N, 4),
        "w",
    ),
    "fused, heads in the middle": lambda: case(
        lambda p, x: _different(
            jnp.einsum("nd,dhk->nhk", x, p["w"].reshape(4, 3, 2, 2)[:, part]) for part in range(3)
        ).sum(1),
        {"w": (4, 12)},
        (N, 4),
        "w",
    ),
    "rows of different inputs": lambda: case(
        lambda p, x: x @ p["w"][:4] + jnp.tanh(x[:, :2] @ p["w"][4:]), {"w": (6, 3)}, (N, 4), "w"
    ),
    "overlapping": lambda: case(
        lambda p, x: x @ p["w"][:, :3] * jnp.tanh(x @ p["w"][:, 1:]), {"w": (4, 4)}, (N, 4), "w"
    ),
    "layers in one array": lambda: case(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"][0] + p["b"][0]) @ p["w"][1] + p["b"][1]),
        {"w": (2, 4, 4), "b": (2, 4)},
        (N, 4),
        "w",
    ),
    "layers in one array, each cut and under a checkpoint": lambda: case(
        lambda p, x: jax.checkpoint(lambda w, x: x @ w[0][:, :4] * jnp.tanh(x @ w[0][:, 4:]))(
            p["w"], jnp.tanh(x @ p["w"][1][:, 2:6])
        ),
        {"w": (2, 4, 8)},
        (N, 4),
        "w",
    ),
    "a convolution": lambda: case(
        lambda p, x: _conv(x, p["w"][..., :2]) * _conv(x, p["w"][..., 2:]), {"w": (3, 2, 4)}, (N, 5, 2), "w"
    ),
    "a convolution along its inputs": lambda: case(
        lambda p, x: _conv(x, p["w"][:, :2]), {"w": (3, 4, 3)}, (N, 5, 2), "", w="cut along its inputs"
    ),
    "two tables in one": lambda: case(
        lambda p, x: jnp.tanh(p["t"][:5][x] * p["t"][5:][x % 2]), {"t": (7, 3)}, jnp.arange(N) % 5, "t"
    ),
    "a tied table with more rows than are used": lambda: case(
        lambda p, x: jnp.tanh(jnp.tanh(p["t"][:5][x]) @ p["t"][:5].T), {"t": (7, 3)}, jnp.arange(N) % 5, "t"
    ),
    "gates of a cell": lambda: case(_lstm, {"w": (2, 8), "u": (2, 8), "b": (8,)}, (N, 3, 2), "w u"),
    "a bias that two kernels share": lambda: case(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][:2]) * (x @ p["v"] + p["b"][2:]),
        {"w": (4, 2), "v": (4, 2), "b": (4,)},
        (N, 4),
        "w v",
        b="added to products of several",
    ),
    "at a place that is computed": lambda: case(
        lambda p, x: x @ jax.lax.dynamic_slice(p["w"], (0, (x[0, 0] > 0).astype(int)), (4, 2)),
        {"w": (4, 3)},
        (N, 4),
        "",
        w="cut at a place that is computed",
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has no layer")
@pytest.mark.parametrize("name", CASES)
def test_c2_what_is_cut_is_one_layer_whose_rows_give_the_gradient_of_every_example(name):
    one, layers, evidence, grad, jacobian = watched(CASES[name])
    assert set(layers) == set(one.layers)
    notes = {block.name: block.note for block in layers.rest}
    assert all(words in notes[address] for address, words in one.notes.items())
    rows_give_the_gradient_of_every_example(layers, evidence, grad, jacobian)


@pytest.mark.full
def test_whether_the_kernel_is_cut_or_the_result_is_the_same():
    def cut_kernel(p, x):
        return _different(x @ k + b for k, b in zip(jnp.split(p["w"], 3, 1), jnp.split(p["b"], 3), strict=True))

    def cut_result(p, x):
        return _different(jnp.split(x @ p["w"] + p["b"], 3, 1))

    params, x, y = {"w": normal(4, 6), "b": normal(6, seed=1)}, normal(N, 4, seed=2), normal(N, 2, seed=3)
    moments = []
    for apply in (cut_kernel, cut_result):
        capture = ng.capture(apply, ng.losses.squared_error, labels="true")
        layers, evidence = capture.layers(params, x), capture.value_and_grad(params, x, y).curvature()
        moments.append([side(layers["w"], evidence["w"]) for side in (input_moment, output_moment)])
    jax.tree.map(assert_equal, *moments)
    assert moments[0][1][0, 5] != 0  # the products of different parts, which separate kernels would not have


def dense_block(apply, params, x, y):
    """The empirical Fisher matrix of all the entries of one array."""
    (name,) = params

    def losses(vector):
        outputs = apply({name: vector.reshape(params[name].shape)}, x)
        return 0.5 * jnp.sum((outputs - y) ** 2, axis=-1)

    jacobian = jax.jacrev(losses)(params[name].reshape(-1))
    return np.asarray(jacobian.T @ jacobian / len(x))


@pytest.mark.full
@pytest.mark.parametrize("name", ["rows of different inputs", "overlapping"])
def test_the_step_of_tengrad_is_that_of_the_dense_block_of_the_array(name):
    one = CASES[name]()
    y = normal(*one.apply(one.params, one.x).shape, seed=9)
    capture = ng.capture(one.apply, ng.losses.squared_error, labels="true")
    tx = ng.scale_by_tengrad(capture.layers(one.params, one.x), damping=DAMPING)

    @jax.jit
    def found(params):
        out = capture.value_and_grad(params, one.x, y)
        return out.grad, tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0]

    grad, step = found(one.params)
    block = dense_block(one.apply, one.params, one.x, y)
    expected = np.linalg.solve(damped(block, DAMPING), np.asarray(grad["w"]).reshape(-1))
    assert_equal(step["w"].reshape(-1), expected)
    halves = np.zeros_like(block)
    rows = np.arange(len(block)) < len(block) // 2
    halves[np.ix_(rows, rows)], halves[np.ix_(~rows, ~rows)] = block[np.ix_(rows, rows)], block[np.ix_(~rows, ~rows)]
    assert_differs(step["w"].reshape(-1), np.linalg.solve(damped(halves, DAMPING), np.asarray(grad["w"]).reshape(-1)))


@pytest.mark.full
def test_factors_of_parts_with_different_inputs_are_those_of_rows_with_zeros():
    one, layers, evidence, *_ = watched(CASES["rows of different inputs"])
    x, pre = np.asarray(one.x), np.asarray(one.x[:, :2] @ one.params["w"][4:])
    y = np.asarray(normal(N, 3, seed=9))
    g = np.asarray(one.apply(one.params, one.x)) - y
    rows = np.zeros((N, 2, 6))
    rows[:, 0, :4], rows[:, 1, 4:] = x, x[:, :2]
    columns = np.stack([g, g * (1 - np.tanh(pre) ** 2)], axis=1)
    assert_equal(input_moment(layers["w"], evidence["w"]), np.einsum("nti,ntj->ij", rows, rows) / N)
    assert_equal(output_moment(layers["w"], evidence["w"]), np.einsum("nto,ntp->op", columns, columns) / (2 * N))
    pooled = rows.sum(1)
    assert_differs(input_moment(layers["w"], evidence["w"]), pooled.T @ pooled / N)


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("name", ["fused, with a bias", "layers in one array", "gates of a cell"])
def test_what_is_cut_passes_verification(name, recwarn):
    one = CASES[name]()
    capture = ng.capture(one.apply, ng.losses.squared_error)
    assert set(capture.layers(one.params, one.x)) == set(one.layers)
    assert not capture.watch.unexplained and not list(recwarn)


@pytest.mark.verified
def test_a_cut_at_the_wrong_place_does_not_pass(monkeypatch):
    from natgrad_jax.program import facts

    right = facts.sliced
    monkeypatch.setattr(facts, "sliced", lambda a, axis, start, size: right(a, axis, max(start - 1, 0), size))
    one = CASES["fused, with a bias"]()
    with pytest.warns(UserWarning, match="do not explain"):
        assert not ng.capture(one.apply, ng.losses.squared_error).layers(one.params, one.x)


# arrays and their parts


def arranged_at_random(seed):
    """An array after some transpositions, slices and reshapes, and its arrangement."""
    draw = np.random.default_rng(seed)
    array = draw.permutation(prod(sizes := draw.choice([2, 3, 4, 6], 3))).reshape(sizes)
    found, value = source("w", sizes.tolist()), array
    for kind in draw.choice(["transpose", "slice", "reshape"], 5):
        if kind == "transpose":
            order = draw.permutation(value.ndim).tolist()
            found, value = transposed(found, order), value.transpose(order)
        elif kind == "slice" and value.ndim:
            axis = int(draw.integers(value.ndim))
            start = int(draw.integers(value.shape[axis]))
            size = int(draw.integers(1, value.shape[axis] - start + 1))
            if after := sliced(found, axis, start, size):
                found, value = after, value[(slice(None),) * axis + (slice(start, start + size),)]
        elif kind == "reshape" and (after := reshaped(found, (value.shape[0], value.size // value.shape[0]))):
            found, value = after, value.reshape(value.shape[0], -1)
    return array, found, value


def test_a_part_is_the_block_of_the_whole_that_it_is_said_to_be():
    known = []
    for seed in range(200):
        array, part, value = arranged_at_random(seed)
        assert shape(part) == value.shape
        if (found := whole(part)) is not None:
            known.append((array, value, *found))
    assert len(known) > 150
    arrays = [array for array, *_ in known]
    every = jax.jit(lambda arrays: [build(each[2], {"w": a}) for each, a in zip(known, arrays, strict=True)])(arrays)
    for built, (array, value, _, block) in zip(map(np.asarray, every), known, strict=True):
        cut = tuple(slice(start, start + size) for start, size in zip(*block, strict=True))
        assert sorted(built.reshape(-1)) == list(range(array.size))
        np.testing.assert_array_equal(built[cut].reshape(value.shape), value)


def test_blocks_are_apart_where_they_share_no_entry():
    starts, sizes = product(range(4), range(4)), product((1, 2), (1, 2))
    blocks = [Block(start, size) for start, size in product(starts, sizes)]
    for one, other in product(blocks, blocks):
        mine, theirs = (
            set(product(*map(range, block.starts, map(sum, zip(*block, strict=True))))) for block in (one, other)
        )
        assert one.is_apart(other, 2) == (not mine & theirs)
