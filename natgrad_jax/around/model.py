"""The quadratic model of the loss along one or two vectors, by exact products with F on the batch.

    M(w) = b^T w + w^T B w / 2,    b = V^T g,  B = V^T (F + l2 I) V,    of the objective h + l2 / 2 |theta|^2

A product with F is one forward-mode pass, `curvature.along`; the model has no damping in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.algebra import trees
from natgrad_jax.base import Array


class Model(NamedTuple):
    """The quadratic model over V = [u, v]: slope b [2], curvature B [2, 2] without damping, and V^T V [2, 2]."""

    slope: Array
    curvature: Array
    lengths: Array


def penalty(mask: Any) -> Callable[..., Any]:
    """A function of a tree and a strength: the leaves that l2 holds for times the strength, zeros elsewhere."""
    decays = optax.add_decayed_weights(1.0, mask)

    def penalised(tree: Any, strength: Array) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return trees.scaled(decays.update(zeros, decays.init(tree), tree)[0], strength)

    return penalised


def model_of(curvature: Any, pair: tuple[Any, ...], gradient: Any, penalised: Callable[[Any], Any] | None) -> Model:
    """The quadratic model over one or two vectors; `penalised` multiplies by the Hessian of the l2 penalty."""
    bent = trees.gram([curvature.along(one) for one in pair])
    if penalised is not None:
        bent = bent + trees.gram(pair, [penalised(one) for one in pair])
    return Model(*map(_padded, (trees.dots(pair, gradient), bent, trees.gram(pair))))


def minimiser(model: Model, damping: Array, weights: Array, free: tuple[bool, bool]) -> Array:
    """The weights [2] that minimise the damped model, those not free held fixed; zeros where that is not finite."""
    bent = model.curvature + damping * model.lengths
    slope = model.slope + bent @ jnp.where(jnp.array(free), 0, weights)
    size = jnp.sqrt(jnp.where(jnp.diagonal(bent) > 0, jnp.diagonal(bent), jnp.inf))  # inf: a zero vector gets no weight
    slope, cosine = slope / size, bent[0, 1] / (size[0] * size[1])
    found = -slope
    if all(free):
        other = 1 - cosine**2
        both = -(slope - cosine * slope[::-1]) / other
        found = jnp.where(other > 1e-5, both, found * jnp.array([1, 0], found.dtype))  # nearly parallel: u alone
    weights = jnp.where(jnp.array(free), found / size, weights)
    return jnp.where(jnp.all(jnp.isfinite(weights)), weights, 0)


def change_of_penalty(penalised: Callable[[Any], Any] | None, middle: Any, step: Any) -> Array:
    """The change of l2 / 2 |theta|^2 along a step, from the point halfway; 0 without a penalty."""
    return jnp.zeros(()) if penalised is None else trees.dot(penalised(middle), step)


def ratio_of(change: Array, foretold: Array) -> Array:
    """Change over the change foretold; where a rise was foretold, infinite if the loss fell, minus that if it rose."""
    surprise = jnp.where(change < 0, jnp.inf, -jnp.inf)
    ratio = jnp.where(foretold < 0, change / foretold, surprise)
    return jnp.where(jnp.isfinite(change) & jnp.isfinite(foretold), ratio, jnp.nan).astype(jnp.float32)


def _padded(array: Array) -> Array:
    """With zeros up to two entries along each axis."""
    return jnp.pad(array, [(0, 2 - size) for size in array.shape])


def change_by(curvature: Any, params: Any, step: Any, value: Array, penalised: Callable[[Any], Any] | None) -> Array:
    """The change of the objective by a step from where the loss of the batch is `value`: one forward pass."""
    middle = trees.add(params, step, 0.5)
    return curvature.value(trees.add(params, step, 1.0)) - value + change_of_penalty(penalised, middle, step)


_LEAST_SHARE = 4.0**-4


def shortened(curvature: Any, params: Any, step: Any, value: Array, penalised: Callable[[Any], Any] | None) -> Array:
    """The largest share of a step that lowers the loss, of 1/4, 1/16, 1/64 and 1/256; 0 if none does."""

    def is_wanted(carry: tuple[Array, Array]) -> Array:
        share, found = carry
        return ~found & (share > _LEAST_SHARE)

    def shorter(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        share = carry[0] / 4
        return share, change_by(curvature, params, trees.scaled(step, share), value, penalised) < 0

    share, found = jax.lax.while_loop(is_wanted, shorter, (jnp.ones_like(value), jnp.array(False)))
    return jnp.where(found, share, 0)


def says(curvature: Any) -> Array:
    """Whether a batch says anything: one of weight zero, all of it masked, does not."""
    return getattr(curvature, "count", jnp.ones(())) > 0


def check(curvature: Any, params: Any) -> None:
    """Refuse what the model of the loss cannot be taken from."""
    if params is None:
        raise ValueError("`params` is None; a controlled step needs them: `tx.update(grads, state, params, ...)`.")
    if not (hasattr(curvature, "along") and hasattr(curvature, "value")):
        raise TypeError(
            f"`curvature` is of type {type(curvature).__name__}; a controlled step takes products and losses from "
            "`out.curvature` itself, where `out` is what `capture.value_and_grad` returned."
        )
