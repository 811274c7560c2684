"""Norms: the scale of channels and the shift behind it, from products and sums entry by entry.

What comes back to a scale is y g at every position, and to a shift g: their sums over the positions of an example are
the gradients of that example, which is all that a norm has. So it does not matter whether a scale is multiplied with
what is normalised, or with the deviation that this is divided by.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra import arranged
from natgrad_jax.algebra.arranged import Arranged, addresses, shape
from natgrad_jax.base import Array, Layer, Leaf
from natgrad_jax.layers.parameter import dtype_of
from natgrad_jax.losses import present
from natgrad_jax.program.entrywise import ADDED, FACTOR
from natgrad_jax.program.products import Entrywise, Product
from natgrad_jax.watch.reading import Reading, reading, stack_of


class Touch(NamedTuple):
    """A product of a norm in the program.

    Attributes:
        product: the product.
        role: of the array in the norm; "" of a factor, of which the other operand is recorded and nothing else.
        outputs: how the cotangent of its result is read, [S, N, positions, channels].
    """

    product: Product
    role: str
    outputs: Reading | None


class Batch(NamedTuple):
    """Of whom what is recorded is.

    Attributes:
        examples: N.
        weights: of the examples [N]; None if all are 1.
        segments: {M: whose the M parts of an axis are}.
    """

    examples: int
    weights: Array | None
    segments: Mapping[int, Array]


def found(
    leaves: Mapping[str, Any], products: Sequence[Product], examples: int, notes: dict[str, str], wanted: bool
) -> list[tuple[Layer, tuple[Touch, ...]]]:
    """The norms of a function.

    Args:
        leaves: the parameters by address, shapes suffice.
        products: all of the function.
        examples: N.
        notes: why an address is in no layer; those of what is no norm either are added.
        wanted: whether there are to be norms at all.

    Returns:
        The norms, and their products.
    """
    by_array: dict[str, list[Product]] = defaultdict(list)
    elsewhere: set[str] = set()
    for product in products:
        if isinstance(product.options, Entrywise):
            by_array["+".join(addresses(product.kernel))].append(product)
        else:
            both = (product.kernel, product.bias)
            elsewhere |= {address for each in both if each is not None for address in addresses(each)}
    for address, of_array in by_array.items():
        word = FACTOR if any(product.options.scale is None for product in of_array) else ADDED
        if not wanted or address in elsewhere or not _is_one(of_array):
            notes |= {part: notes.get(part, word) for part in address.split("+")}
    there = {address: each for address, each in by_array.items() if address not in notes and address in leaves}
    kinds = {address: {product.options.scale is None for product in each} for address, each in there.items()}
    scales = {product.path: address for address, each in there.items() if kinds[address] == {True} for product in each}
    shifts: dict[str, str] = {}
    for address, each in there.items():
        owners = {scales.get(product.options.scale) for product in each}
        (owner,) = owners if len(owners) == 1 and kinds[address] == {False} else (None,)
        if owner is not None and owner not in shifts and _alike(there[owner][0], each[0]):
            shifts[owner] = address
        elif address not in scales.values():
            notes[address] = ADDED if kinds[address] == {False} else FACTOR
    pairs = {address: [address, *([shifts[address]] if address in shifts else [])] for address in scales.values()}
    return [_norm(leaves, [there[address] for address in arrays], examples) for arrays in pairs.values()]


def _is_one(products: Sequence[Product]) -> bool:
    """Whether all products see an array as the same one, uncut."""
    kernels = {product.kernel for product in products}
    (kernel, *others) = kernels
    return not others and isinstance(kernel, Arranged) and not kernel.cuts


def _alike(scale: Product, shift: Product) -> bool:
    return (
        isinstance(scale.kernel, Arranged)
        and isinstance(shift.kernel, Arranged)
        and shape(scale.kernel) == shape(shift.kernel)
    )


def _norm(
    leaves: Mapping[str, Any], arrays: Sequence[Sequence[Product]], examples: int
) -> tuple[Layer, tuple[Touch, ...]]:
    """The noun of a norm, from the products of its scale and its shift."""
    parts, touches, arrangements = [], [], []
    for role, products in zip(("scale", "shift"), arrays, strict=False):
        (address,) = addresses(products[0].kernel)
        parts.append(Leaf(role, address, tuple(leaves[address].shape)))
        arrangements.append((role, products[0].kernel))
        for product in products:
            axes = product.options.axes
            outputs = reading(product, product.output, product.examples_out, examples, ((), axes))
            touches.append(Touch(product, role, outputs))
            touches += [Touch(factor, "", None) for factor in product.options.factors]
    parent = parts[0].address.rpartition("/")[0]
    name = "+".join([parts[0].address, *(leaf.address.removeprefix(parent + "/") for leaf in parts[1:])])
    plain = all(_is_flat(arrangement, leaf) for (_, arrangement), leaf in zip(arrangements, parts, strict=True))
    layer = Layer(
        name=name,
        kind="norm",
        shape=(prod(parts[0].shape), len(parts)),
        leaves=tuple(parts),
        dtype=max(dtype_of(leaves[leaf.address]) for leaf in parts),
        geometry=stack_of(arrays[0][0]),
        arrays=() if plain else tuple(arrangements),
    )
    return layer, tuple({touch.product.path: touch for touch in touches}.values())


def _is_flat(arrangement: Any, leaf: Leaf) -> bool:
    """Whether the entries of an array are in the order of its parameter."""
    size = (prod(leaf.shape),)
    return arranged.reshaped(arrangement, size) == arranged.reshaped(arranged.source(leaf.address, leaf.shape), size)


def gradients_of_examples(
    layer: Layer, touches: Sequence[Touch], records: Sequence[Array], cotangents: Sequence[Array], batch: Batch
) -> dict[str, Array]:
    """The gradients of the examples by the arrays of a norm.

    Args:
        layer: the norm.
        touches: its products.
        records: what each multiplied the parameter with.
        cotangents: of the result of each, [K, ...].
        batch: whose they are.

    Returns:
        {role: [K, N, *shape]}.
    """
    seen = {touch.product.path: record for touch, record in zip(touches, records, strict=True)}
    sums: dict[str, list[Array]] = defaultdict(list)
    for touch, cotangent in zip(touches, cotangents, strict=True):
        if touch.outputs is not None:
            rows = touch.outputs(_multiplied(touch.product, cotangent.astype(layer.dtype), seen), 1)
            sums[touch.role].append(_summed(touch, rows, batch))
    shapes, arrangements = {leaf.address: leaf.shape for leaf in layer.leaves}, dict(layer.arrays)
    found = {}
    for leaf in layer.leaves:
        whole = sum(sums[leaf.role][1:], sums[leaf.role][0])
        if leaf.role not in arrangements:
            found[leaf.role] = whole.reshape(*whole.shape[:2], *leaf.shape)
            continue

        def placed(one, leaf=leaf):
            return arranged.take_apart(arrangements[leaf.role], one, shapes)[leaf.address]

        found[leaf.role] = jax.vmap(jax.vmap(placed))(whole)
    return found


def _multiplied(product: Product, cotangent: Array, seen: Mapping[Any, Array]) -> Array:
    """What comes back to each entry of the parameter at each position."""
    options = product.options
    if options.scale is not None:
        return cotangent
    found = _by(product, cotangent, jnp.broadcast_to(seen[product.path], product.output))
    depth = len(product.levels)
    for factor in options.factors:
        value = jnp.broadcast_to(seen[factor.path], (*factor.output[:depth], *seen[factor.path].shape[depth:]))
        sizes = [1] * (len(product.output) - depth)
        for old, new in zip(factor.options.axes, options.axes, strict=True):
            sizes[new] = value.shape[depth + old]
        found = _by(factor, found, value.reshape(*value.shape[:depth], *sizes))
    return found


def _by(product: Product, cotangent: Array, value: Array) -> Array:
    value = value.astype(cotangent.dtype).reshape((1,) * (cotangent.ndim - value.ndim) + value.shape)
    if product.primitive == "div":
        return cotangent / jnp.where(value != 0, value, 1)  # zero in a branch that was not taken
    return cotangent * value


def _summed(touch: Touch, rows: Array, batch: Batch) -> Array:
    """[K, S, N, positions, channels] summed over positions, as [K, N, S, channels]."""
    product, read = touch.product, touch.outputs
    assert read is not None, "a factor has no rows"
    copies, channels = len(stack_of(product)), len(product.options.axes)
    rows = jnp.sum(rows, axis=range(copies + 2, rows.ndim - channels))
    rows = jnp.moveaxis(rows, copies + 1, 1)
    if read.parts:
        mine = jnp.asarray(batch.segments[read.parts])[None, :] == jnp.arange(batch.examples)[:, None]
        rows = jnp.einsum("nm,km...->kn...", mine.astype(rows.dtype), rows, precision="highest")
    return jnp.moveaxis(present(jnp.moveaxis(rows, 1, 0), batch.weights), 0, 1)
