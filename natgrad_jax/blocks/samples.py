"""Sample space: a batch as the rows of J, so that the Fisher block of a layer is F = J^T J.

Row n of J is D_n / sqrt(K W), the gradient of one example (for each draw of labels). J has as many columns as the layer
has weights and is formed only where that is the smaller thing: what is kept of it are the rows a and g of the layer,
D_n = sum_t a_t g_t^T, if N T (I + K O) numbers are fewer than K N I O, else the D_n. What a method asks of J:

    kernel    J J^T      [S, R, R], R = K N
    project   J vec(X)   [S, R] of X [S, I, O]
    back      J^T v      [S, I, O] of v [S, R]

The kernel of rows has two orders. "gram": the products of the rows of every two examples, (a a^T) o (g g^T) summed over
the positions of both, without any D_n, 2 (N T)^2 (I + K^2 O) flops. "gradients": some columns of all D_n at a time,
2 K N T I O + 2 (K N)^2 I O flops. The cheaper one is taken, in pieces that take no more memory than they are allowed.
For one position the first is the Khatri-Rao product of TENGraD (Soori et al. 2021, https://arxiv.org/abs/2106.03947).
"""

from math import prod
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from natgrad_jax.algebra import rows as of_rows
from natgrad_jax.algebra.rows import OneHot
from natgrad_jax.algebra.stacks import einsum
from natgrad_jax.base import Array, Evidence, Layer
from natgrad_jax.layers.rows import Pairing, paired_rows, total
from natgrad_jax.losses import example_weights

Order = Literal["gram", "gradients"]
WORKSPACE = 2**28
"""Bytes that what is formed on the way to a kernel may take, if nothing else is said."""


class Rows(NamedTuple):
    """J by its rows: inputs a [S, N, T, I] and outputs g [S, K, N, T, O], these divided by sqrt(K W)."""

    inputs: of_rows.Rows
    outputs: Array


class Gradients(NamedTuple):
    """J itself: the gradients of the examples [S, K, N, I, O], divided by sqrt(K W)."""

    values: Array


Jacobian = Rows | Gradients


def empty(layer: Layer, examples: int, draws: int, sharing: Pairing) -> Jacobian:
    """A Jacobian of zeros.

    Args:
        layer: the layer.
        examples: N.
        draws: K.
        sharing: "example", or "reduce" for pooled positions.

    Returns:
        Rows or gradients, whichever takes less memory.
    """
    stack, (rows, columns) = layer.stack, layer.shape
    if layer.kind == "array":
        return Gradients(jnp.zeros((draws, examples, rows, columns), layer.dtype))
    positions = 1 if sharing == "reduce" and not layer.one_hot else layer.positions
    by_rows, by_gradients = layer.sample_sizes(examples, draws, positions)
    if by_gradients < by_rows:
        return Gradients(jnp.zeros((*stack, draws, examples, rows, columns), layer.dtype))
    lead = (*stack, examples, positions)
    if layer.one_hot:
        inputs = OneHot(jnp.zeros(lead, jnp.int32), jnp.zeros(lead, layer.dtype), rows)
    else:
        inputs = jnp.zeros((*lead, rows), layer.dtype)
    return Rows(inputs, jnp.zeros((*stack, draws, examples, positions, columns), layer.dtype))


def observed(layer: Layer, like: Jacobian, evidence: Evidence, sharing: Pairing, workspace: int) -> Jacobian:
    """The Jacobian of a batch, filled up with rows of zeros if the batch is a short one.

    Args:
        layer: the layer.
        like: an older one, of the same kind and shape.
        evidence: inputs and cotangents of the batch.
        sharing: "example", or "reduce" for pooled positions.
        workspace: bytes that the rows a and g of the examples at hand may take where only gradients are kept.

    Returns:
        The Jacobian.

    Raises:
        ValueError: if the batch is larger than what there is room for, or has no cotangents.
    """
    if layer.kind == "array":
        values = _of_array(layer, evidence)
        scaled = Gradients(values / _root_of_count(layer, like, evidence, values))
        return jax.tree.map(lambda new, old: _filled_up(layer, new, old.shape), scaled, like)
    if evidence.cotangents is None:
        raise ValueError(
            'Rows in sample space need cotangents, which evidence of `labels="forward"` does not have; capture with '
            '`labels="sampled"`, "exact" or "true".'
        )
    if isinstance(like, Gradients):
        values = _gradients(layer, evidence, sharing, workspace)
        scaled = Gradients(values / _root_of_count(layer, like, evidence, values))
    else:
        inputs, outputs = paired_rows(layer, evidence, sharing)
        scaled = Rows(inputs, outputs / _root_of_count(layer, like, evidence, outputs))
    return jax.tree.map(lambda new, old: _filled_up(layer, new, old.shape), scaled, like)


def slopes(evidence: Evidence, rows: int) -> Array:
    """The squared norm of each example's derivative by the outputs, over sqrt(W): the right-hand side of iEF.

    Args:
        evidence: of true labels.
        rows: how many there is room for.

    Returns:
        [R], zeros behind the examples. With weights, slope and row both carry the root of the weight of the example.

    Raises:
        ValueError: if the evidence has none.
    """
    if evidence.slopes is None:
        raise ValueError(
            'The evidence has no `slopes`, which `target="ief"` needs; take it from `capture.value_and_grad` with '
            '`labels="true"`.'
        )
    found = evidence.slopes
    if evidence.weights is not None:
        weights = example_weights(evidence.weights).astype(found.dtype)
        found = found / jnp.sqrt(jnp.where(weights > 0, weights, 1))
    count = jnp.asarray(total(evidence, found.shape[-1]), found.dtype)
    found = found.reshape(-1) / jnp.sqrt(jnp.where(count > 0, count, 1))
    return jnp.pad(found, (0, rows - found.size))


def kernel(jacobian: Jacobian, workspace: int, order: Order | None = None) -> Array:
    """J J^T.

    Args:
        jacobian: J.
        workspace: bytes that what is formed on the way may take, at least what one example or one column needs.
        order: in which the products are done; the cheaper one if None. Of gradients there is only one.

    Returns:
        [S, R, R].
    """
    return cross(jacobian, jacobian, workspace, order)


def cross(jacobian: Jacobian, other: Jacobian, workspace: int, order: Order | None = None) -> Array:
    """J J'^T of two batches of one size.

    Args:
        jacobian: J.
        other: J', of the same shapes.
        workspace: as `kernel` takes it.
        order: as `kernel` takes it.

    Returns:
        [S, R, R].
    """
    if isinstance(jacobian, Gradients):
        assert isinstance(other, Gradients), "batches of one layer are kept alike"
        flat, another = (each.values.reshape(*_lead(each), -1) for each in (jacobian, other))
        return einsum("...ri,...si->...rs", flat, another)
    assert isinstance(other, Rows), "batches of one layer are kept alike"
    if isinstance(jacobian.inputs, OneHot):
        order = "gram"  # the other writes columns of one-hot gradients out
    if order is None:
        rows, (draws, examples, positions, columns) = jacobian.inputs.shape[-1], jacobian.outputs.shape[-4:]
        gram = examples * positions**2 * (rows + draws**2 * columns)
        order = "gram" if gram <= draws * rows * columns * (positions + draws * examples) else "gradients"
    return (_by_gram if order == "gram" else _by_gradients)(jacobian, other, workspace)


def project(jacobian: Jacobian, matrix: Array) -> Array:
    """J vec(X): the product of the gradient of every example with X [S, I, O], as [S, R]."""
    if isinstance(jacobian, Gradients):
        found = einsum("...knio,...io->...kn", jacobian.values, matrix)
    else:
        moved = of_rows.times(jacobian.inputs, matrix)
        found = einsum("...nto,...knto->...kn", moved, jacobian.outputs)
    return found.reshape(_lead(jacobian))


def back(jacobian: Jacobian, coefficients: Array) -> Array:
    """J^T v: the sum of the gradients of the examples, each times its coefficient, [S, I, O] of v [S, R]."""
    if isinstance(jacobian, Gradients):
        lead = jacobian.values.shape[:-2]
        return einsum("...knio,...kn->...io", jacobian.values, coefficients.reshape(lead))
    weights = coefficients.reshape(jacobian.outputs.shape[:-2])
    weighted = einsum("...knto,...kn->...nto", jacobian.outputs, weights)
    return of_rows.pulled(jacobian.inputs, weighted)


def _lead(jacobian: Jacobian) -> tuple[int, ...]:
    """The axes [S, R]."""
    shape = (jacobian.values if isinstance(jacobian, Gradients) else jacobian.outputs).shape
    return (*shape[:-4], shape[-4] * shape[-3])


def _root_of_count(layer: Layer, like: Jacobian, evidence: Evidence, found: Array) -> Array:
    """sqrt(K W), and 1 for an empty batch."""
    draws, examples = found.shape[-4:-2]
    if (room := jax.tree.leaves(like)[-1].shape[-4]) != draws:
        raise ValueError(
            f"The evidence of layer {layer.name!r} has {draws} draws of labels, but there is room for {room} draws; "
            "build the transformation with the `layers` of this very capture."
        )
    count = jnp.asarray(draws * total(evidence, examples), layer.dtype)
    return jnp.sqrt(jnp.where(count > 0, count, 1))


def _filled_up(layer: Layer, array: Array, shape: tuple[int, ...]) -> Array:
    """An array with zeros behind its examples and positions."""
    if any(have > room for have, room in zip(array.shape, shape, strict=True)):
        raise ValueError(
            f"The batch gives layer {layer.name!r} arrays of shape {array.shape} in sample space; there is room for "
            f"{shape}. Room is made for the inputs that `capture.layers` was called with: call it with the largest "
            "batch, or give `examples`."
        )
    return jnp.pad(array, [(0, room - have) for have, room in zip(array.shape, shape, strict=True)])


def _of_array(layer: Layer, evidence: Evidence) -> Array:
    """The gradients of the examples by an array of no known layer, [K, N, size, 1]."""
    if evidence.examples is None:
        raise ValueError(
            f"The evidence for {layer.name!r} has no gradients of the examples, which this method was built for: take "
            'it from a capture with `jacobian="examples"`, as the `layers` are.'
        )
    values = evidence.examples["value"]
    return values.reshape(*values.shape[:2], *layer.shape).astype(layer.dtype)


def _gradients(layer: Layer, evidence: Evidence, sharing: Pairing, workspace: int) -> Array:
    """The gradients of the examples [S, K, N, I, O], so many at a time as the workspace holds the rows of."""

    def formed(evidence):
        rows, columns = paired_rows(layer, evidence, sharing)
        return einsum("...nti,...knto->...knio", of_rows.written_out(rows), columns)

    axes = layer.module_axes
    first = jax.tree.leaves(evidence.cotangents)[0]
    draws, examples = first.shape[0], first.shape[1 + axes]
    chunk = _pieces(jnp.dtype(layer.dtype).itemsize * layer.sample_sizes(1, draws)[0], workspace)
    if chunk >= examples:
        return formed(evidence)

    def of_one(example):
        inputs, cotangents, weights = example
        one = Evidence(
            jax.tree.map(lambda x: jnp.expand_dims(x, axes), inputs),
            jax.tree.map(lambda g: jnp.expand_dims(g, 1 + axes), cotangents),
            weights=None if weights is None else weights[None],
        )
        return jnp.squeeze(formed(one), -3)

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, axes, 0), evidence.inputs)
    cotangents = jax.tree.map(lambda g: jnp.moveaxis(g, 1 + axes, 0), evidence.cotangents)
    found = lax.map(of_one, (inputs, cotangents, evidence.weights), batch_size=chunk)
    return jnp.moveaxis(found, 0, -3)


def _by_gram(jacobian: Rows, other: Rows, workspace: int) -> Array:
    """The kernel from the products of rows, some examples with all of the other at a time."""
    inputs, outputs = jacobian
    draws, examples, positions = outputs.shape[-4:-1]

    def of_one(example):
        a, g = example  # [S, T, I], [S, K, T, O]
        by_inputs = of_rows.products_across(a, other.inputs)
        by_outputs = einsum("...kto,...lnuo->...ktlnu", g, other.outputs)
        return einsum("...tnu,...ktlnu->...kln", by_inputs, by_outputs)

    stacked = prod(inputs.shape[:-3])
    each = stacked * positions**2 * examples * (1 + draws**2) * inputs.dtype.itemsize
    by_example = (of_rows.examples_first(inputs), jnp.moveaxis(outputs, -3, 0))
    chunk = min(_pieces(each, workspace), examples)
    found = jax.vmap(of_one)(by_example) if chunk == examples else lax.map(of_one, by_example, batch_size=chunk)
    size = draws * examples
    return jnp.moveaxis(found, 0, -3).reshape(*_lead(jacobian)[:-1], size, size)


def _by_gradients(jacobian: Rows, other: Rows, workspace: int) -> Array:
    """The kernel as the sum over columns of J and of the other, those of some outputs at a time."""
    inputs, outputs = jacobian
    lead, columns = _lead(jacobian), outputs.shape[-1]
    each = outputs.size // (columns * outputs.shape[-2]) * inputs.shape[-1] * inputs.dtype.itemsize
    chunk = min(_pieces(each if other is jacobian else 2 * each, workspace), columns)
    blocks = -(-columns // chunk)

    def by_block(outputs):
        padded = jnp.pad(outputs, [(0, 0)] * (outputs.ndim - 1) + [(0, blocks * chunk - columns)])
        return jnp.moveaxis(padded.reshape(*outputs.shape[:-1], blocks, chunk), -2, 0)

    def formed(inputs, block):
        return einsum("...nti,...knto->...knio", inputs, block).reshape(*lead, -1)

    def add(partial, pair):
        some = formed(inputs, pair[0])
        others = some if other is jacobian else formed(other.inputs, pair[1])
        return partial + einsum("...ri,...si->...rs", some, others), None

    start = jnp.zeros((*lead, lead[-1]), inputs.dtype)
    pairs = by_block(outputs), None if other is jacobian else by_block(other.outputs)
    return add(start, jax.tree.map(lambda one: one[0], pairs))[0] if blocks == 1 else lax.scan(add, start, pairs)[0]


def _pieces(each: int, workspace: int) -> int:
    """How many things of `each` bytes the workspace holds; at least one."""
    return max(1, workspace // max(each, 1))
