"""Views: which entry of a matrix lands where in a tensor, and back."""

from itertools import product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import natgrad_jax as ng
from natgrad_jax.addresses import flatten
from natgrad_jax.layers.rows import from_matrix, to_matrix
from natgrad_jax.layers.views import View, as_matrix, as_tensor, in_modes, merged, sources, view


def numbered(*shape):
    """The numbers from one on: a zero is none of them."""
    return np.arange(1.0, prod(shape) + 1).reshape(shape)


def placed(matrix, split, order, joined, stacked, block):
    """The tensor of one matrix, entry by entry."""
    ordered = [split[axis] for axis in order]
    sizes = list(joined or ordered)
    lead, rest = sizes[:stacked], sizes[stacked:]
    cuts = [1 if block is None else -(-size // block) for size in rest]
    modes = [-(-size // cut) for size, cut in zip(rest, cuts, strict=True)]
    tensor = np.zeros((*lead, prod(cuts), *modes))
    for index in np.ndindex(*split):
        place = np.ravel_multi_index([index[axis] for axis in order], ordered)
        place = np.unravel_index(place, sizes)
        pairs = [divmod(int(at), size) for at, size in zip(place[stacked:], modes, strict=True)]
        which = np.ravel_multi_index([pair[0] for pair in pairs], cuts)
        tensor[(*place[:stacked], which, *(pair[1] for pair in pairs))] = matrix.reshape(split)[index]
    return tensor if prod(cuts) > 1 else tensor.reshape(*lead, *modes)


OPTIONS = [
    (order, joined, stacked, block)
    for order, joineds in (
        ((0, 1, 2), (None, (4, 6), (24,), (2, 12))),
        ((2, 0, 1), (None, (12, 2), (3, 1, 8))),
    )
    for joined, stacked, block in product(joineds, (0, 1, 2), (None, 3, 5))
    if stacked < len(joined or order)
]
"""Of a matrix (8, 3) that is split into (4, 2, 3): whatever can be said of it, in all combinations."""


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("stack", "every"), [((2,), 1), ((), 5), ((2, 1), 7)], ids=["stack", "alone", "two stacks"])
def test_every_entry_of_a_matrix_lands_where_split_order_joined_stacked_and_block_say(stack, every):
    source, matrix = ng.Layer("w", "dense", (8, 3), (), stack), numbered(*stack, 8, 3)
    options = OPTIONS[::every]
    seen = [
        view(source, (4, 2, 3), order, joined=joined, stacked=stacked, block=block)
        for order, joined, stacked, block in options
    ]

    @jax.jit
    def there_and_back(matrix):
        tensors = [as_tensor(layer.geometry, matrix) for layer in seen]
        return tensors, [as_matrix(layer.geometry, tensor) for layer, tensor in zip(seen, tensors, strict=True)]

    for option, layer, tensor, back in zip(options, seen, *there_and_back(matrix), strict=True):
        expected = np.stack([placed(row, (4, 2, 3), *option) for row in matrix.reshape(-1, 8, 3)])
        assert tensor.shape == layer.stack + layer.shape
        np.testing.assert_array_equal(np.reshape(tensor, expected.shape), expected)
        np.testing.assert_array_equal(back, matrix)
        assert max(layer.shape) <= (option[-1] or 24)


def test_entries_in_another_order_land_elsewhere():
    rows = numbered(8, 3)
    expected = placed(rows, (4, 2, 3), (0, 1, 2), None, 0, None)
    found = as_tensor(View(ng.Layer("w", "dense", (8, 3), ()), (4, 2, 3), (1, 0, 2), (4, 2, 3)), rows)
    assert found.shape == expected.shape
    assert np.any(found != expected)


def test_blocks_are_of_equal_size_and_filled_up_with_zeros():
    tensor = as_tensor(View(ng.Layer("w", "dense", (5, 3), ()), (5, 3), (0, 1), block=2), numbered(5, 3))
    assert tensor.shape == (6, 2, 2)  # three times two blocks
    assert jnp.sum(tensor == 0) == 24 - 15
    np.testing.assert_array_equal(tensor[5], [[15, 0], [0, 0]])
    np.testing.assert_array_equal(tensor[1], [[3, 0], [6, 0]])


def test_modes_of_one_entry_vanish_and_neighbours_are_joined_while_there_is_room():
    assert merged((3, 3, 1, 64, 128), 1024) == (576, 128)
    assert merged((3, 3, 1, 64, 128), None) == (3, 3, 64, 128)
    assert merged((1, 1), 8) == merged((), 8) == (1,)
    assert merged((4, 2, 2, 9), 8) == (8, 2, 9)


# Copies of a scan -----------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention behind a norm, and a cell whose gates are one product."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.RNN(nn.OptimizedLSTMCell(4), name="cells")(x), None


class Stacked(nn.Module):
    """Three of them in a scan, whose parameters have the copies along any axis."""

    axis: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Attending, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return nn.Dense(3, name="last")(stack(name="stack")(x, None)[0].mean(1))


OF_A_COPY = {
    "stack/attention/query/kernel": (4, 4),
    "stack/attention/query/bias": (4,),
    "stack/attention/out/kernel": (4, 4),
    "stack/attention/out/bias": (4,),
    "stack/norm/scale": (4,),
    "stack/norm/bias": (4,),
    "stack/OptimizedLSTMCell_0/ii/kernel": (4, 4),
    "stack/OptimizedLSTMCell_0/hf/kernel": (4, 4),
    "stack/OptimizedLSTMCell_0/hf/bias": (4,),
}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.full)])
def test_the_copies_of_a_scan_are_tensors_by_themselves_however_their_arrays_are_moved(axis):
    model, x = Stacked(axis), jnp.ones((2, 5, 4))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    layers = ng.linen.capture(model, ng.losses.softmax_cross_entropy).layers({"params": params}, x)
    found = {source.name: source for source in sources(layers, params)}
    assert set(found) == set(flatten(params))
    for name, modes in OF_A_COPY.items():
        (leaf,) = found[name].leaves
        array = numbered(*leaf.shape)
        tensor = to_matrix(view(found[name], in_modes(found[name], "flatten_spatial")), {leaf.role: jnp.asarray(array)})
        np.testing.assert_array_equal(tensor, np.moveaxis(array, axis, 0).reshape(3, *modes))
        np.testing.assert_array_equal(
            from_matrix(found[name], to_matrix(found[name], {leaf.role: array}))[leaf.role], array
        )
