"""Second moments measured in an eigenbasis: the diagonal that stands in the place of the Kronecker eigenvalues."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from natgrad_jax.algebra import averages, panels
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.branches import either
from natgrad_jax.algebra.eigenbasis import Basis, eigenbasis, mean_squares, standard, turned, warm_eigenbasis
from natgrad_jax.algebra.moments import moments_in
from natgrad_jax.algebra.stacks import Diagonal, Factor, trace
from natgrad_jax.algebra.truncated import Kept, coordinates, damped_solve, squares, sums
from natgrad_jax.base import Array, Evidence, Gradual, Layer, Scalar
from natgrad_jax.blocks.kronecker import identities, split_damping
from natgrad_jax.layers.pieces import summed
from natgrad_jax.layers.rows import example_count, gradient_matrix, input_moment, input_rows, output_rows, total

Estimator = Literal["per_example", "minibatch"]
Refresh = Literal["eigh", "qr"]
Split = Literal["exact", "pi", "even"]


class Rotated(NamedTuple):
    """What is applied: moments in a basis.

    Attributes:
        basis: U [S, I, I] and V [S, O, O], or fewer columns.
        scale: the average of the second moments in the basis [S, I, O], with one for the rest of a truncated side.
        traces: of A and G [S], which say how "pi" and "even" split the damping; None for "exact".
    """

    basis: Basis
    scale: Average
    traces: tuple[Array, Array] | None


def identity(layer: Layer, kept: Kept, split: Split) -> Rotated:
    """The basis that changes nothing, with no moments yet.

    Args:
        layer: the layer.
        kept: as `kronecker.identities` takes it.
        split: as `solve` takes it.

    Returns:
        An operator; applied, it divides by the damping.
    """
    traces = None if split == "exact" else (jnp.ones(layer.stack, layer.dtype), jnp.ones(layer.stack, layer.dtype))
    basis = standard(*identities(layer, kept))
    scale = averages.empty(layer.stack, tuple(map(coordinates, basis, layer.shape)), layer.dtype)
    return Rotated(basis, scale, traces)


def refreshed(inputs: Factor, outputs: Factor, old: Rotated, estimator: Estimator, refresh: Refresh) -> Rotated:
    """The basis of a Kronecker pair, and what the scale starts from in it.

    Of eigenvectors made afresh ("eigh") the scale is empty, or for "minibatch" the Kronecker eigenvalues, diag(U^T A U)
    diag(V^T G V)^T. A step from the old basis ("qr") keeps the scale, which moves with the columns; the first refresh
    is one by "eigh", of all copies of a stack if one of them has no scale yet.

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        old: the old basis, and the average of the scale in it.
        estimator: "per_example" or "minibatch".
        refresh: "eigh" or "qr".

    Returns:
        The new basis, and the average of the scale in it.
    """
    given = (inputs, outputs, old.basis, old.scale)

    def cold(inputs, outputs, basis, scale):
        del basis
        found, eigenvalues = eigenbasis(inputs, outputs)
        if estimator == "minibatch":
            return found, Average(eigenvalues, jnp.ones_like(scale.weight))
        return found, Average(jnp.zeros_like(scale.total), jnp.zeros_like(scale.weight))

    def warm(inputs, outputs, basis, scale):
        found, moved = warm_eigenbasis(basis, scale.total, inputs, outputs)
        return found, scale._replace(total=moved)

    basis, scale = cold(*given) if refresh == "eigh" else either(jnp.all(old.scale.weight > 0), warm, cold, *given)
    return old._replace(basis=basis, scale=scale)


def gradual(means: Callable[[Any], tuple[Factor, ...]], basis_of: Callable[[Any], Any] = Basis._make) -> Gradual:
    """The basis in parts: one step of orthogonal iteration from the old one, whatever the refresh is otherwise.

    Args:
        means: statistics -> M of each mode, A and G of a matrix.
        basis_of: the sides of all modes -> the `basis` of an operator.

    Returns:
        The parts. The scale is kept, and moves with the columns.
    """

    def begin(layer, statistics, operator, damping, parts):
        del layer, damping
        return panels.begin(operator.basis, means(statistics), operator.scale.total, parts)

    def proceed(layer, statistics, operator, work, part, parts):
        del layer
        return panels.proceed(work, operator.basis, means(statistics), part, parts)

    def end(layer, statistics, operator, work):
        del layer
        basis, total = panels.end(work, operator.basis, means(statistics), operator.scale.total)
        return operator._replace(basis=basis_of(basis), scale=operator.scale._replace(total=total))

    return Gradual(begin, proceed, end)


def rescaled(layer: Layer, old: Rotated, evidence: Evidence, estimator: Estimator, decay: Scalar) -> Rotated:
    """The moments with what one batch shows of them.

    "per_example": E[(U^T D V)^2], D = sum_t a g^T the gradient of one example, whatever its positions do.
    "minibatch": (U^T (sum_n D_n) V)^2 / W, averaged over draws; unbiased for sampled labels only.

    Args:
        layer: the layer.
        old: the operator.
        evidence: of the batch.
        estimator: "per_example" or "minibatch".
        decay: weight of the old moments.

    Returns:
        The operator.
    """
    measure = _minibatch if estimator == "minibatch" else _per_example
    return old._replace(scale=averages.update(old.scale, measure(layer, old.basis, evidence), decay))


def followed(inputs: Factor, outputs: Factor, old: Rotated) -> Rotated:
    """The operator with the traces of these factors, A [S, I, I] and G [S, O, O]."""
    return old._replace(traces=(trace(inputs), trace(outputs)))


def turn(inputs: Factor, outputs: Factor, old: Rotated) -> Array:
    """How far the basis is from the eigenvectors of a pair: the greater of the two sides; 1 if nothing is measured yet.

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        old: the operator.

    Returns:
        From 0 to 1, [S].
    """
    found = jnp.maximum(turned(old.basis.inputs, inputs), turned(old.basis.outputs, outputs))
    return jnp.where(old.scale.weight > 0, found, 1)


def solve(operator: Rotated, gradient: Array, damping: Scalar, split: Split) -> Array:
    """The gradient over the damped scale, in the basis.

    "exact" divides by scale + damping. The other splits damp as a Kronecker product is damped, (s + x)(r + y) in the
    place of s r: they divide by scale + x r + y s + x y, where s and r are the sums of the scale over its columns and
    over its rows, in the units of A and of G. Where the scale is the product of the eigenvalues of A and G, that is
    the damping of the pair.

    Args:
        operator: basis, scale and traces.
        gradient: [S, I, O].
        damping: strength in the units of the scale, [] or [S].
        split: "exact", "pi" or "even".

    Returns:
        [S, I, O].
    """
    scale = averages.mean(operator.scale)
    if operator.traces is None or split == "exact":
        return damped_solve(operator.basis, scale, gradient, damping)
    tops = [jnp.where(top > 0, top, 1)[..., None, None] for top in operator.traces]
    sizes = gradient.shape[-2:]
    rows = sums(scale, operator.basis, sizes, axes=(1,)) / tops[1]  # [S, I, 1]
    columns = sums(scale, operator.basis, sizes, axes=(0,)) / tops[0]
    mean_rows = sums(rows, operator.basis, sizes, axes=(0,))[..., 0] / sizes[0]
    mean_columns = sums(columns, operator.basis, sizes, axes=(1,))[..., 0] / sizes[1]
    x, y = split_damping(Diagonal(mean_rows), Diagonal(mean_columns), damping, split)
    cross = x[..., None, None] * columns + y[..., None, None] * rows
    return damped_solve(operator.basis, scale + cross, gradient, x * y)


def _per_example(layer: Layer, basis: Basis, evidence: Evidence) -> Array:
    if evidence.cotangents is None:  # g = identity: F = A (x) I
        moment = input_moment(layer, evidence, full=basis.inputs is not None)
        found = mean_squares(basis.inputs, moment)[..., None]
        return jnp.broadcast_to(found, (*found.shape[:-1], coordinates(basis.outputs, layer.shape[-1])))

    def of_piece(part):
        return moments_in(basis, input_rows(layer, part), output_rows(layer, part))

    return summed(of_piece, layer, evidence) / total(evidence, example_count(layer, evidence))


def _minibatch(layer: Layer, basis: Basis, evidence: Evidence) -> Array:
    gradient = gradient_matrix(layer, evidence)
    if evidence.count is None:
        raise ValueError(
            f"The evidence for layer {layer.name!r} has no `count`, which the estimator 'minibatch' needs; take the "
            "evidence from `capture.value_and_grad`."
        )
    return jnp.mean(squares(gradient, basis), axis=-3) / evidence.count
