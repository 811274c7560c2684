"""Likelihoods: what the outputs of a model say about labels.

A likelihood is the negative log-probability of the targets under a model whose outputs z are its parameters. It
gives the value, labels drawn from the model, and a square root R of the Hessian H = R R^T by the outputs, which is
also the Fisher information of the outputs. The value of an example is the SUM over its outputs and positions; the loss
is the MEAN over examples, weighted if weights are given.

Damping and clip are in the units of that loss: per example, so per sequence for a sequence. `reduced("mean")` takes the
mean over the T positions of an example in the place of the sum, for units per position: loss, R R^T and F are divided
by T. With damping / T and kl_clip / T it makes the same steps.

Weights are of examples, of their positions, or of the outputs of each. What has weight zero counts for nothing,
whatever stands there: outputs and targets are replaced before anything is computed of them, so that a label of -100 or
a target that is no number says nothing. A negative weight enters the loss with its sign, and the curvature and the
total weight W with its size: with w of either sign, loss = sum w l / sum |w|, and F is that of examples which count
|w| times.

Loss, labels and roots are computed in float32 at least, whatever the outputs are in.

Not here: losses that are no negative log-likelihood; give such a one to `capture` as `objective`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgrad_jax import checks
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
        reduction: over the positions of an example, "sum" or "mean"; see `reduced`.
        is_positive: whether no term is ever below 0.
    """

    name: str
    terms: Callable[[Array, Array], Array]
    sample: Callable[[Array, Array], Array]
    root: Callable[[Array, Array], Array]
    root_transpose: Callable[[Array, Array], Array]
    check: Callable[[Array, Array], str | None]
    reduction: str = "sum"
    is_positive: bool = False

    def reduced(self, reduction: str) -> "Likelihood":
        """The same likelihood, its loss summed or averaged over the positions of an example.

        The positions are the axes of the outputs between the first, of the examples, and the last, of the outputs of
        one position; there are T of them. Positions of weight zero are among the T, so that the loss of a batch is the
        mean of those of its pieces.

        >>> logits, labels = jnp.zeros((2, 5, 3)), jnp.zeros((2, 5), int)
        >>> each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        >>> bool(jnp.allclose(softmax_cross_entropy.reduced("mean")(logits, labels), each.mean()))
        True

        Args:
            reduction: "sum" for a loss, damping and clip per example, "mean" for the same per position.

        Returns:
            The likelihood.

        Raises:
            ValueError: if it is another word.
        """
        checks.choice("reduction", reduction, ("sum", "mean"))
        return replace(self, reduction=reduction)

    def share(self, outputs: Array) -> float:
        """What a position counts for, given outputs [N, ..., C]: 1 / T in a mean over positions, else 1."""
        return 1 / max(1, prod(outputs.shape[1:-1])) if self.reduction == "mean" else 1.0

    def __call__(self, outputs: Array, targets: Array, weights: Array | None = None) -> Array:
        """The mean loss: sum over outputs, sum or mean over positions, (weighted) mean over examples.

        Args:
            outputs: [N, ..., C].
            targets: as the likelihood wants them.
            weights: of the examples [N], of their positions or of their outputs: any leading axes of the outputs,
                without C where that holds the classes of one label. An example counts as much as its heaviest entry.

        Returns:
            A scalar, in float32 at least; 0 where nothing has a weight.

        Raises:
            ValueError: if the targets do not fit the outputs, or the weights have more axes than the terms of the loss.
        """
        outputs, targets = wide(jnp.asarray(outputs)), jnp.asarray(targets)
        if complaint := self.check(outputs, targets):
            raise ValueError(f"{self.name}: {complaint}.")
        weights = None if weights is None else wide(jnp.asarray(weights))
        terms = self.terms(present(outputs, weights), present(targets, weights))
        total = total_weight(weights, outputs.shape[0]).astype(terms.dtype)
        if weights is not None:
            terms = terms * spread(weights, terms.ndim).astype(terms.dtype)
        return self.share(outputs) * jnp.sum(terms) / jnp.where(total > 0, total, 1)


def wide(values: Array) -> Array:
    """Values in float32 at least; masks become numbers."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def spread(weights: Array, axes: int) -> Array:
    """Weights with trailing axes of length one, up to `axes` axes.

    Args:
        weights: [N, ...].
        axes: of what they weigh.

    Returns:
        [N, ..., 1, ...].

    Raises:
        ValueError: if they have more axes than that.
    """
    if weights.ndim > axes:
        raise ValueError(
            f"`weights` have shape {weights.shape}, but what they weigh has {axes} axes: one term of the loss for each "
            "label. Expected weights of examples [N], or of their positions."
        )
    return jnp.reshape(weights, weights.shape + (1,) * (axes - weights.ndim))


def present(values: Array, weights: Array | None) -> Array:
    """Values [N, ...] with zeros where the weight is zero: selected, since what is not finite stays so in a product."""
    if weights is None:
        return values
    return jnp.where(spread(weights, values.ndim) != 0, values, jnp.zeros((), values.dtype))


def example_weights(weights: Array) -> Array:
    """Weights of the examples [N], without signs: an example counts as much as its heaviest entry."""
    return jnp.max(jnp.abs(weights), axis=tuple(range(1, weights.ndim)))


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
        f"expected integer labels of shape {outputs.shape[:-1]} or floating-point probabilities (one-hot) of shape "
        f"{outputs.shape}"
    )


def _cross_entropy(outputs: Array, targets: Array) -> Array:
    if jnp.issubdtype(targets.dtype, jnp.integer):
        known = (targets >= 0) & (targets < outputs.shape[-1])
        terms = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(known, targets, 0))
        return terms * jnp.where(known, 1, jnp.nan).astype(terms.dtype)  # so that the gradient is no number, either
    return -jnp.sum(_zero_times(targets.astype(outputs.dtype), jax.nn.log_softmax(outputs)), axis=-1)


def _zero_times(factor: Array, values: Array) -> Array:
    """Their product, where zero times infinity is zero: what has no probability says nothing where none is asked."""
    return jnp.where(factor == 0, 0, factor * jnp.where(factor == 0, 0, values))


def _binary_cross_entropy(outputs: Array, targets: Array) -> Array:
    targets = targets.astype(outputs.dtype)
    on, off = jax.nn.log_sigmoid(outputs), jax.nn.log_sigmoid(-outputs)
    return -_zero_times(targets, on) - _zero_times(1 - targets, off)


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
    is_positive=True,
)
"""Categorical: outputs are logits, targets integer labels [N, ...] or probabilities (one-hot) [N, ..., C].

H = diag(p) - p p^T with p = softmax(z), R = diag(sqrt p) - p sqrt(p)^T. An integer label outside of 0, ..., C - 1 makes
loss and gradient NaN, unless its weight is zero: what stands for "no label" needs that.
"""


def _scaled_root(spread_of: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """R of a diagonal Hessian, which is its own transpose."""
    return lambda outputs, vector: spread_of(outputs) * vector


def _deviation(outputs: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs))


sigmoid_binary_cross_entropy = Likelihood(
    name="sigmoid_binary_cross_entropy",
    terms=_binary_cross_entropy,
    sample=lambda key, outputs: jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype),
    root=_scaled_root(_deviation),
    root_transpose=_scaled_root(_deviation),
    check=_same_shape,
    is_positive=True,
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
    if not (isinstance(variance, (int, float, np.number, jax.Array)) and variance > 0):
        raise ValueError(f"`variance` is {checks.shown(variance)}; expected a positive number.")

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
        is_positive=True,
    )


squared_error = gaussian(1.0)
"""Half the squared error, (z - y)^2 / 2: `gaussian` of variance 1."""


def _halves(outputs: Array) -> tuple[Array, Array]:
    """Means and logarithms of variances, the halves of the last axis."""
    means, logs = jnp.split(outputs, 2, axis=-1)
    return means, logs


def _mean_and_variance(outputs: Array, targets: Array) -> Array:
    means, logs = _halves(outputs)
    return 0.5 * (logs + (targets.astype(outputs.dtype) - means) ** 2 * jnp.exp(-logs))


def _half_as_wide(outputs: Array, targets: Array) -> str | None:
    if outputs.shape[-1] % 2 or targets.shape != (*outputs.shape[:-1], outputs.shape[-1] // 2):
        return (
            f"targets of shape {targets.shape} do not fit outputs of shape {outputs.shape}; their last axis "
            "holds a mean for each target and then a logarithm of the variance for each"
        )
    return None


def _precision_root(outputs: Array) -> Array:
    _, logs = _halves(outputs)
    return jnp.concatenate([jnp.exp(-0.5 * logs), jnp.full_like(logs, 0.5**0.5)], axis=-1)


def _gaussian_of(key: Array, outputs: Array) -> Array:
    means, logs = _halves(outputs)
    return means + jnp.exp(0.5 * logs) * jax.random.normal(key, means.shape, means.dtype)


mean_and_variance = Likelihood(
    name="mean_and_variance",
    terms=_mean_and_variance,
    sample=_gaussian_of,
    root=_scaled_root(_precision_root),
    root_transpose=_scaled_root(_precision_root),
    check=_half_as_wide,
)
"""A Gaussian whose variance the model predicts, too: outputs [N, ..., 2 C] are C means and then C logarithms of the
variances s, targets [N, ..., C]: (s + (y - m)^2 exp(-s)) / 2, without the constant.

H = diag(exp(-s), 1 / 2) is the Fisher matrix, which does not depend on the target and is positive, as the second
derivative of the loss is not.
"""


def _rate_root(outputs: Array) -> Array:
    return jnp.exp(0.5 * outputs)


_MANY = 1e6  # from this rate on a Poisson variable is a Gaussian one to a skewness of 0.001


def _counts(key: Array, outputs: Array) -> Array:
    """Counts of the rates exp(z); of large rates Gaussian ones, since those of `jax.random.poisson` end at 2^31 - 1."""
    rate = jnp.exp(outputs)
    if "threefry2x32" not in str(jax.random.key_impl(key)):  # the only keys that `jax.random.poisson` takes
        key = jax.random.key(jax.random.bits(key, (), jnp.uint32), impl="threefry2x32")
    few = jax.random.poisson(key, jnp.minimum(rate, _MANY)).astype(outputs.dtype)
    many = jnp.round(rate + jnp.sqrt(rate) * jax.random.normal(key, outputs.shape, outputs.dtype))
    return jnp.where(rate < _MANY, few, many)


poisson = Likelihood(
    name="poisson",
    terms=lambda outputs, targets: jnp.exp(outputs) - _zero_times(targets.astype(outputs.dtype), outputs),
    sample=_counts,
    root=_scaled_root(_rate_root),
    root_transpose=_scaled_root(_rate_root),
    check=_same_shape,
)
"""Counts: outputs are logarithms of the rate, targets counts of the same shape: exp(z) - y z, without the term log y!.

H = diag(exp z). Labels are drawn as they are up to a rate of 10^6, and beyond as rounded Gaussians of the same mean
and variance. Where the rate itself is infinite (z above 88 in float32) the label is no number; the statistics of that
batch are then dropped, and counted.
"""

LIKELIHOODS = (softmax_cross_entropy, sigmoid_binary_cross_entropy, squared_error, mean_and_variance, poisson)
