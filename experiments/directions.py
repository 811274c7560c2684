"""Every method as a direction d at given parameters, beside d* = (F + damping I)^-1 gradient with F of ALL parameters.

Measured are the cosine of the two and |d - d*| / |d*|, at the damping of d* and at the best of a few. The family of
K-FAC and TENGraD see F without sampling; TNT and MBF a hundred draws of labels. What learns from gradients of the true
labels (Shampoo, SOAP, Adam) or from its own steps (K-BFGS) sees a hundred batches at these same parameters, its steps
not taken. Shampoo, SOAP and Adam divide by a root of F: theirs are no lengths to compare, and dampings of their own.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng
from experiments.records import Records, significant

LIKELIHOOD = ng.losses.softmax_cross_entropy


class Batches(NamedTuple):
    """Images and labels of which the directions are, and minibatches [B, 100, ...] for what learns from these."""

    images: np.ndarray
    labels: np.ndarray
    stream: tuple[np.ndarray, np.ndarray]


class Direction(NamedTuple):
    """A method as a direction, and what it sees of the curvature.

    Attributes:
        make: layers, damping -> transformation.
        sees: labels; of the "true" ones minibatches, one after the other.
        dampings: those tried; None for the multiples of the common one.
        scale: by what its update is divided; None where it has no length that compares with d*.
    """

    make: Callable[..., optax.GradientTransformation]
    sees: Literal["exact", "sampled", "true"] = "exact"
    dampings: tuple[float, ...] | None = None
    scale: float | None = 1.0


MULTIPLES = (0.01, 0.1, 1.0, 10.0, 100.0)
ROOTS = (1e-9, 1e-7, 1e-5, 1e-3, 0.1)
OFTEN: Any = {"decay": 0.99, "statistics_every": 1, "refresh_every": 10}
DIRECTIONS = {
    "TENGraD, joint": Direction(partial(ng.scale_by_tengrad, blocks="joint")),
    "TENGraD": Direction(ng.scale_by_tengrad),
    "EKFAC": Direction(ng.scale_by_ekfac),
    "TEKFAC": Direction(ng.scale_by_tekfac),
    "K-FAC": Direction(ng.scale_by_kfac),
    "TKFAC": Direction(ng.scale_by_tkfac),
    "TNT": Direction(ng.scale_by_tnt, "sampled"),
    "MBF": Direction(partial(ng.scale_by_mbf, statistics="curvature"), "sampled"),
    "K-BFGS": Direction(partial(ng.kbfgs, 0.3, kl_clip=None, momentum=None, decay=0.9), "true", None, -0.3),
    "SOAP": Direction(partial(ng.scale_by_soap, **OFTEN), "true", ROOTS, None),
    "Shampoo": Direction(partial(ng.scale_by_shampoo, **OFTEN), "true", ROOTS, None),
    "Adam": Direction(lambda layers, damping: optax.scale_by_adam(0.0, 0.99, eps=damping), "true", ROOTS, None),
    "gradient": Direction(lambda layers, damping: optax.identity(), dampings=(1.0,), scale=None),
}


def angles(name: str, model: nn.Module, params: Any, given: Batches, aim: Any, damping: float, draws: int) -> Records:
    """A method beside d*, at its dampings: a record for each, with the relative error where it has a length of F."""
    entry, found = DIRECTIONS[name], []
    for tried in entry.dampings or [damping * multiple for multiple in MULTIPLES]:
        own = np.asarray(direction(entry, model, draws)(params, given, tried)) / (entry.scale or 1.0)
        cosine = own @ aim / (np.linalg.norm(own) * np.linalg.norm(aim))
        error = None if entry.scale is None else significant(np.linalg.norm(own - aim) / np.linalg.norm(aim))
        same = entry.dampings is None and tried == damping
        found.append({"method": name, "damping": tried, "same": same, "cosine": float(cosine), "error": error})
    return found


@cache
def direction(entry: Direction, model: nn.Module, draws: int) -> Callable[[Any, Batches, float], jax.Array]:
    """Parameters, images, damping -> the direction [P] of a method that has seen what it sees."""
    draws = draws if entry.sees == "sampled" else 1
    capture = ng.linen.capture(model, LIKELIHOOD, labels=entry.sees, draws=draws)

    @jax.jit
    def found(params, given, damping):
        layers = capture.layers({"params": params}, given.images)
        tx = optax.with_extra_args_support(entry.make(layers=layers, damping=damping))

        def step(state, batch):
            out = capture.value_and_grad({"params": params}, *batch, key=jax.random.key(0))
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return state, ravel_pytree(updates)[0]

        state = tx.init(params)
        if entry.sees == "true":
            state, _ = jax.lax.scan(step, state, given.stream)
        return step(state, (given.images, given.labels))[1]

    return found


@partial(jax.jit, static_argnums=0)
def natural_gradient(model: nn.Module, params: Any, images: jax.Array, labels: jax.Array, damping: float) -> jax.Array:
    """d* [P] = (F + damping I)^-1 gradient, of all parameters together, in the order of `ravel_pytree`, by autodiff."""
    flat, tree = ravel_pytree(params)

    def chances(flat: jax.Array, image: jax.Array) -> jax.Array:
        outputs: Any = model.apply({"params": tree(flat)}, image[None])
        return jax.nn.log_softmax(outputs[0])

    p = jnp.exp(jax.vmap(chances, (None, 0))(flat, images))
    scores = jax.vmap(jax.jacrev(chances), (None, 0))(flat, images)  # [N, C, P]
    gradient = -jnp.mean(scores[jnp.arange(len(labels)), labels], axis=0)
    fisher = jnp.einsum("nc,ncp,ncq->pq", p, scores, scores) / len(images)
    damped = fisher + damping * jnp.eye(len(flat))
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), gradient)
