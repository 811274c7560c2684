"""Likelihoods: what the outputs of a model say about labels.

A likelihood is the negative log-probability of the targets under a model whose outputs z are its parameters. It
gives the value, labels drawn from the model, and a square root R of the Hessian H = R R^T by the outputs, which is
also the Fisher information of the outputs. The value of an example is the SUM over its outputs and positions; the loss
is the MEAN over examples, weighted if weights are given.

Not here: losses that are no negative log-likelihood; give such a one to `capture` as `objective`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.base import Array


@dataclass(frozen=True)
class Likelihood:
    """A family of distributions of the targets, given the outputs of the model.

    Attributes:
        name: for messages.
        terms: outputs [N, ..., C], targets -> negative log-likelihood, elementwise: [N, ...] if the last axis holds the
            classes of one label, else [N, ..., C].
        sample: key, outputs -> targets drawn from the model.
        root: outputs, v -> R v, of the shape of the outputs; R works on the last axis.
        root_transpose: outputs, v -> R^T v.
        check: outputs, targets -> None, or a sentence on what does not fit.
    """

    name: str
    terms: Callable[[Array, Array], Array]
    sample: Callable[[Array, Array], Array]
    root: Callable[[Array, Array], Array]
    root_transpose: Callable[[Array, Array], Array]
    check: Callable[[Array, Array], str | None]

    def __call__(self, outputs: Array, targets: Array, weights: Array | None = None) -> Array:
        """The mean loss: sum over outputs and positions, (weighted) mean over examples.

        Args:
            outputs: [N, ..., C].
            targets: as the likelihood wants them.
            weights: of the examples [N], or of their positions, any leading axes of the outputs. An example counts as
                much as its heaviest position.

        Returns:
            A scalar.
        """
        terms = self.terms(outputs, targets)
        return jnp.sum(terms * spread(weights, terms.ndim)) / jnp.maximum(total_weight(weights, len(outputs)), 1e-30)


def spread(weights: Array | None, axes: int) -> Array | float:
    """Weights with trailing axes of length one, up to `axes` axes; 1.0 if there are none."""
    if weights is None:
        return 1.0
    return jnp.reshape(weights, weights.shape + (1,) * (axes - weights.ndim))


def example_weights(weights: Array) -> Array:
    """Weights of the examples [N]: an example counts as much as its heaviest position."""
    return jnp.max(weights, axis=tuple(range(1, weights.ndim)))


def total_weight(weights: Array | None, examples: int) -> Array:
    """W, the total weight of a batch: N if nothing is weighted."""
    if weights is None:
        return jnp.asarray(examples, jnp.float32)
    return jnp.sum(example_weights(weights))


def _same_shape(outputs: Array, targets: Array) -> str | None:
    if outputs.shape != targets.shape:
        return f"targets of shape {targets.shape} do not fit outputs of shape {outputs.shape}; they must be equal"
    return None


def _labels_or_distributions(outputs: Array, targets: Array) -> str | None:
    integer = jnp.issubdtype(targets.dtype, jnp.integer)
    if outputs.ndim < 2:
        return (
            f"the outputs have shape {outputs.shape}; expected [N, ..., C]: one example has an axis of its own, x[None]"
        )
    if integer and targets.shape == outputs.shape[:-1]:
        return None
    if not integer and targets.shape == outputs.shape:
        return None
    return (
        f"targets of shape {targets.shape} and dtype {targets.dtype} do not fit outputs of shape {outputs.shape}; "
        f"expected integer labels of shape {outputs.shape[:-1]} or probabilities (one-hot) of shape {outputs.shape}"
    )


def _cross_entropy(outputs: Array, targets: Array) -> Array:
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return optax.softmax_cross_entropy(outputs, targets)


def _softmax_root(outputs: Array, vector: Array) -> Array:
    probabilities = jax.nn.softmax(outputs)
    root = jnp.sqrt(probabilities)
    return root * vector - probabilities * jnp.sum(root * vector, axis=-1, keepdims=True)


def _softmax_root_transpose(outputs: Array, vector: Array) -> Array:
    probabilities = jax.nn.softmax(outputs)
    return jnp.sqrt(probabilities) * (vector - jnp.sum(probabilities * vector, axis=-1, keepdims=True))


softmax_cross_entropy = Likelihood(
    name="softmax_cross_entropy",
    terms=_cross_entropy,
    sample=lambda key, outputs: jax.random.categorical(key, outputs),
    root=_softmax_root,
    root_transpose=_softmax_root_transpose,
    check=_labels_or_distributions,
)
"""Categorical: outputs are logits, targets integer labels [N, ...] or probabilities (one-hot) [N, ..., C].

H = diag(p) - p p^T with p = softmax(z), R = diag(sqrt p) - p sqrt(p)^T.
"""


def _scaled_root(spread_of: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """R of a diagonal Hessian, which is its own transpose."""
    return lambda outputs, vector: spread_of(outputs) * vector


def _deviation(outputs: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs))


sigmoid_binary_cross_entropy = Likelihood(
    name="sigmoid_binary_cross_entropy",
    terms=lambda outputs, targets: optax.sigmoid_binary_cross_entropy(outputs, targets.astype(outputs.dtype)),
    sample=lambda key, outputs: jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype),
    root=_scaled_root(_deviation),
    root_transpose=_scaled_root(_deviation),
    check=_same_shape,
)
"""Independent Bernoullis: outputs are logits, targets in [0, 1] of the same shape.

H = diag(s (1 - s)) with s = sigmoid(z).
"""


def gaussian(variance: float = 1.0) -> Likelihood:
    """Squared error, (z - y)^2 / (2 variance): a Gaussian of known variance around the outputs.

    The constant of the log-density is left out. H = I / variance.

    >>> gaussian(variance=0.5)(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]]))
    Array(5., dtype=float32)

    Args:
        variance: of each output, positive.

    Returns:
        The likelihood.

    Raises:
        ValueError: if the variance is not a positive number.
    """
    if not variance > 0:
        raise ValueError(f"`variance` is {variance}; expected a positive number.")

    def constant(outputs):
        return jnp.full((), variance**-0.5, outputs.dtype)

    return Likelihood(
        name=f"gaussian(variance={variance})",
        terms=lambda outputs, targets: (
            optax.losses.squared_error(outputs, targets.astype(outputs.dtype)) / (2 * variance)
        ),
        sample=lambda key, outputs: outputs + variance**0.5 * jax.random.normal(key, outputs.shape, outputs.dtype),
        root=_scaled_root(constant),
        root_transpose=_scaled_root(constant),
        check=_same_shape,
    )


squared_error = gaussian(1.0)
"""Half the squared error, (z - y)^2 / 2: `gaussian` of variance 1."""


def _rate_root(outputs: Array) -> Array:
    return jnp.exp(0.5 * outputs)


poisson = Likelihood(
    name="poisson",
    terms=lambda outputs, targets: jnp.exp(outputs) - targets.astype(outputs.dtype) * outputs,
    sample=lambda key, outputs: jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype),
    root=_scaled_root(_rate_root),
    root_transpose=_scaled_root(_rate_root),
    check=_same_shape,
)
"""Counts: outputs are logarithms of the rate, targets counts of the same shape: exp(z) - y z, without the term log y!.

H = diag(exp z).
"""

LIKELIHOODS = (softmax_cross_entropy, sigmoid_binary_cross_entropy, squared_error, poisson)
