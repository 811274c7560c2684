"""The Kronecker pair of a layer: averaged, damped, inverted, applied.

Averaged are A of the inputs and G of the outputs, or the two partial traces of F, each as a matrix, as its diagonal, or
truncated (`algebra.truncated`). F + damping I is no Kronecker
product; (A + x I) (x) (G + y I) with x y = damping is one. The rules of `split_damping` differ in the ratio of x and y;
"mean_eigenvalue" also lets their product exceed the damping. "exact" needs no rule: the damping is added to the
eigenvalues of the product itself, and what is kept is an eigenbasis.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from natgrad_jax.algebra import averages, panels, sweeps, truncated
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.eigenbasis import Basis, eigenbasis, standard
from natgrad_jax.algebra.stacks import Factor, damped_inverse, mean_diagonal, sandwich, trace
from natgrad_jax.algebra.truncated import Kept, coordinates, damped_solve, form
from natgrad_jax.base import Array, Evidence, Gradual, Layer, Scalar
from natgrad_jax.layers.rows import Pairing, Sharing, input_moment, output_moment, partial_traces

Split = Literal["pi", "even", "mean_eigenvalue", "exact"]
"""How a damping is split over the two sides."""


class Pair(NamedTuple):
    """Averages of A [S, I, I] and G [S, O, O]; of a side that is too wide, of its diagonal; or truncated ones."""

    inputs: Average
    outputs: Average


class Traces(NamedTuple):
    """The partial traces of F: E[D D^T] [S, I, I] and E[D^T D] [S, O, O]; of a side too wide, the diagonal."""

    inputs: Factor
    outputs: Factor


class Inverses(NamedTuple):
    """A^ [S, I, I] and G^ [S, O, O]."""

    inputs: Factor
    outputs: Factor


class Eigen(NamedTuple):
    """The basis (U, V) and the Kronecker eigenvalues s r^T [S, I, O], with one for the rest of a truncated side."""

    basis: Basis
    scale: Array


def identities(layer: Layer, kept: Kept) -> tuple[Factor, Factor]:
    """Identity matrices in the place of the two factors, each in a buffer of its own.

    Args:
        layer: the layer.
        kept: what a side keeps.

    Returns:
        [S, I, I] and [S, O, O]; a `Diagonal` of a side that is too wide, or whose rows are one-hot; `Truncated` ones.
    """
    rows, columns = layer.shape
    of_inputs = truncated.identity(layer.stack, rows, layer.dtype, kept._replace(most=0) if layer.one_hot else kept)
    return of_inputs, truncated.identity(layer.stack, columns, layer.dtype, kept)


def empty(layer: Layer, kept: Kept) -> Pair:
    """A pair of nothing yet.

    Args:
        layer: the layer.
        kept: as `identities` takes it.

    Returns:
        Averages of weight 0.
    """
    return Pair(*(averages.of_zeros(side, layer.stack, layer.dtype) for side in identities(layer, kept)))


def observe(layer: Layer, pair: Pair, evidence: Evidence, decay: Scalar, sharing: Sharing = "expand") -> Pair:
    """The pair with one more batch.

    A is the sum over positions and the mean over examples, G the mean over positions and examples, so that A (x) G
    is the block of one example.

    Args:
        layer: the layer.
        pair: so far.
        evidence: of the batch.
        decay: weight of the old value.
        sharing: "expand", or "reduce" for positions that are pooled before they are squared.

    Returns:
        The new pair.
    """
    (full_inputs, rank_in), (full_outputs, rank_out) = (form(side.total) for side in pair)
    return Pair(
        averages.update(pair.inputs, input_moment(layer, evidence, full_inputs, sharing, rank_in), decay),
        averages.update(pair.outputs, output_moment(layer, evidence, full_outputs, sharing, rank_out), decay),
    )


def means(pair: Pair) -> tuple[Factor, Factor]:
    """A and G."""
    return averages.mean(pair.inputs), averages.mean(pair.outputs)


def empty_traces(layer: Layer, kept: Kept) -> Average:
    """An average of no `Traces` yet: both under one weight, so that they stay partial traces of one matrix.

    Args:
        layer: the layer.
        kept: as `identities` takes it.

    Returns:
        An average of weight 0.
    """
    return averages.of_zeros(Traces(*identities(layer, kept)), layer.stack, layer.dtype)


def observe_traces(layer: Layer, traces: Average, evidence: Evidence, decay: Scalar, sharing: Pairing) -> Average:
    """The partial traces with one more batch.

    Args:
        layer: the layer.
        traces: so far.
        evidence: of the batch.
        decay: weight of the old value.
        sharing: as `layers.rows.partial_traces` takes it.

    Returns:
        The new average.
    """
    (inputs, _), (outputs, _) = map(form, traces.total)
    found = partial_traces(layer, evidence, (inputs, outputs), sharing)
    return averages.update(traces, Traces(*found), decay)


def trace_restricted(traces: Average) -> Traces:
    """The Kronecker pair that has the partial traces of F, hence its trace, up to the factor tr F that both share.

    Args:
        traces: the average.

    Returns:
        E[D D^T] and E[D^T D], each over the root of delta = tr F; zeros where that is zero.
    """
    means = averages.mean(traces)
    return averages.mean(Average(means, jnp.sqrt(trace(means.inputs))))


def split_damping(inputs: Factor, outputs: Factor, damping: Scalar, split: str) -> tuple[Array, Array]:
    """Strengths x, y for the factors A and G, with x y = damping.

    "pi": x / y = (tr A / I) / (tr G / O), which equalises the traces of the two cross terms in the product
    (Martens and Grosse 2015, section 6.3); "even": x = y. A factor of trace 0 makes "pi" even.

    "mean_eigenvalue": x = max(tr A / I, root of the damping), y likewise, so that x y may exceed the damping, which is
    a floor. Of use only where A and G share the units of F evenly: else the floor is high for one, low for the other.

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        damping: strength in the units of A (x) G.
        split: "pi", "even" or "mean_eigenvalue".

    Returns:
        x [S] in the units of A and y [S] in the units of G.
    """
    mean_inputs, mean_outputs = mean_diagonal(inputs), mean_diagonal(outputs)
    root = jnp.sqrt(jnp.asarray(damping, mean_inputs.dtype))
    if split == "mean_eigenvalue":
        return jnp.maximum(mean_inputs, root), jnp.maximum(mean_outputs, root)
    both = (mean_inputs > 0) & (mean_outputs > 0)
    roots = [jnp.sqrt(jnp.where(both, mean, 1)) for mean in (mean_inputs, mean_outputs)]  # their ratio may overflow
    pi = roots[0] / roots[1] if split == "pi" else jnp.ones_like(mean_inputs)
    return root * pi, root / pi


def identity(layer: Layer, kept: Kept, split: Split) -> Inverses | Eigen:
    """What changes no gradient, of the shapes that `inverted` gives.

    Args:
        layer: the layer.
        kept: as `identities` takes it.
        split: as `inverted` takes it.

    Returns:
        Eigen if the split is "exact", else inverses.
    """
    ones = identities(layer, kept)
    if split == "exact":
        basis = standard(*ones)
        return Eigen(basis, jnp.ones(layer.stack + tuple(map(coordinates, basis, layer.shape)), layer.dtype))
    return Inverses(*ones)


def inverted(inputs: Factor, outputs: Factor, damping: Scalar, split: Split) -> Inverses | Eigen:
    """The inverse of a Kronecker pair, damped by a rule of `split_damping`; its eigenbasis if the split is "exact".

    Args:
        inputs: A [S, I, I].
        outputs: G [S, O, O].
        damping: strength in the units of A (x) G.
        split: how the damping enters.

    Returns:
        (A + x I)^-1 and (G + y I)^-1; or the eigenvectors and the products of the eigenvalues, without damping.
    """
    if split == "exact":
        return Eigen(*eigenbasis(inputs, outputs))
    x, y = split_damping(inputs, outputs, damping, split)
    return Inverses(damped_inverse(inputs, x), damped_inverse(outputs, y))


def gradual(means: Callable[[Any], tuple[Factor, Factor]], split_of: Callable[[Layer], Split]) -> Gradual:
    """What `inverted` makes, in parts.

    Inverses are those of the factors and of the damping at the first part. An eigenbasis is one step of orthogonal
    iteration from the old one, with what the factors have along its columns in the place of their eigenvalues.

    Args:
        means: statistics -> A and G.
        split_of: layer -> how the damping enters.

    Returns:
        The parts.
    """

    def begin(layer, statistics, operator, damping, parts):
        pair, split = means(statistics), split_of(layer)
        if split == "exact":
            return panels.begin(operator.basis, pair, operator.scale, parts)
        return Inverses(
            *(sweeps.begin(*each, parts) for each in zip(pair, split_damping(*pair, damping, split), strict=True))
        )

    def proceed(layer, statistics, operator, work, part, parts):
        if isinstance(work, Inverses):
            sides = zip(work, layer.shape, strict=True)
            return Inverses(*(sweeps.sweep(side, size, part, parts) for side, size in sides))
        return panels.proceed(work, operator.basis, means(statistics), part, parts)

    def end(layer, statistics, operator, work):
        if isinstance(work, Inverses):
            return Inverses(*map(sweeps.end, work, layer.shape))
        pair = means(statistics)
        basis, _ = panels.end(work, operator.basis, pair, operator.scale)
        s, r = map(panels.values, work, pair)
        return Eigen(Basis(*basis), s[..., :, None] * r[..., None, :])

    return Gradual(begin, proceed, end)


def solve(inverse: Inverses | Eigen, gradient: Array, damping: Scalar) -> Array:
    """The inverse applied to a gradient.

    Args:
        inverse: from `inverted`.
        gradient: [S, I, O].
        damping: what is added to the Kronecker eigenvalues; inverses hold theirs.

    Returns:
        [S, I, O].
    """
    if isinstance(inverse, Eigen):
        return damped_solve(inverse.basis, inverse.scale, gradient, damping)
    return sandwich(inverse.inputs, gradient, inverse.outputs)
