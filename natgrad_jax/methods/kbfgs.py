"""K-BFGS: a Kronecker product whose two inverses are learned by BFGS from the steps that are taken.

Of a layer with inputs a, outputs z = a W before the activation and their cotangents g, means over batch and positions:

    1  A <- EMA(E[sum_t a a^T])                                        observe
    2  H_a <- (A + x I)^-1,  x v = damping                             observe, only once; H_g starts at I
    3  W+ <- W - learning_rate H_a M H_g                               apply;  M the momentum of the gradient
    4  s, y <- EMA of mean z+ - mean z,  mean g+ - mean g              learn;  the same batch once more, at W+
    5  s <- phi s + (1 - phi) H_g y  where s^T y < 0.2 y^T H_g y       learn;  used once, the averages stay
    6  y <- phi y + (1 - phi) s      where s^T y < v s^T s             learn
    7  H_g <- BFGS(H_g; s, y)  unless s^T y <= 1e-4 |s|^2 |mean g|     learn
    8  s <- H_a mean a,  y <- (A + x I) s                              learn
    9  H_a <- BFGS(H_a; s, y)  unless s^T y <= 1e-4 |s|^2 |mean a|     learn

K-BFGS(L), `memory=p`, keeps the last p pairs of line 7 instead of H_g. KF-QN-CNN, `hessian_action="batch"` and
`second_damping="levenberg"`, neither keeps nor averages A, and has another damping:

    1' nothing; line 2 takes the A of the first batch, the only time that it is formed
    6' y <- y + v s
    8' y <- E[sum_t a (a^T s)] + x s

Goldfarb, Ren and Bahamou (2020), https://arxiv.org/abs/2006.08877; for convolutions Ren, Bahamou and Goldfarb (2021),
https://arxiv.org/abs/2102.06737, of which no code of the authors is public: line 2 there, the way the damping is split
over positions, and parameters of norms are stand-ins, after other implementations. EMA, decay and damping are of the
loss of one example, in which the authors' settings are, too. Averages here are free of bias; of s and y they are a
multiple of the authors', which no line sees.

Not here: H_0 = I scaled by the last pair; another A for dense layers than for convolutions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages, bfgs, checks
from natgrad_jax.averages import Average
from natgrad_jax.base import Array, Evidence, Layer, Layers, Scalar, ScalarOrSchedule
from natgrad_jax.layers import input_moment, input_moment_action, input_rows, mean_input, mean_output
from natgrad_jax.linalg import damped_inverse, einsum, matmul
from natgrad_jax.step_transform import Others, Skips, StepMethod, lift_stepping

HessianAction = Literal["average", "batch"]
ACTIONS = get_args(HessianAction)
SecondDamping = Literal["powell", "levenberg"]
DAMPINGS = get_args(SecondDamping)
Split = Literal["even", "positions"]
SPLITS = get_args(Split)
_SKIP = 1e-4


class Secant(NamedTuple):
    """A step of the mean outputs, s, and of their mean cotangents, y: [S, O]."""

    s: Array
    y: Array


class KBFGSState(NamedTuple):
    """State of a layer.

    Attributes:
        inputs: the average of A [S, I, I]; None with `hessian_action="batch"`.
        input_inverse: H_a [S, I, I].
        secant: the average of s and y.
        output_inverse: H_g [S, O, O], or its pairs [S, p, O].
        started: whether line 2 is done, int32 [S].
    """

    inputs: Average | None
    input_inverse: Array
    secant: Average
    output_inverse: bfgs.Inverse
    started: Array


def kbfgs_block(
    memory: int | None = None,
    hessian_action: HessianAction = "average",
    second_damping: SecondDamping = "powell",
    split: Split = "even",
) -> StepMethod:
    """K-BFGS of one layer.

    Args:
        memory: p, or None for H_g itself.
        hessian_action: "average" or "batch".
        second_damping: "powell" or "levenberg".
        split: "even" or "positions".

    Returns:
        The functions.
    """

    def init(layer):
        rows, columns = layer.shape
        average = averages.empty(layer.stack, (rows, rows), layer.dtype) if hessian_action == "average" else None
        zeros = Secant(*(jnp.zeros((*layer.stack, columns), layer.dtype) for _ in range(2)))
        if memory is None:
            outputs = _identity(layer, columns)
        else:
            outputs = bfgs.no_pairs(layer.stack, int(memory), columns, layer.dtype)
        started = jnp.zeros(layer.stack, jnp.int32)
        secant = Average(zeros, jnp.zeros(layer.stack, layer.dtype))
        return KBFGSState(average, _identity(layer, rows), secant, outputs, started)

    def warm(layer, state, evidence, decay):
        if state.inputs is None:
            raise ValueError(
                'A warm start fills averages, but with `hessian_action="batch"` there is none; leave it away.'
            )
        return state._replace(inputs=averages.update(state.inputs, input_moment(layer, evidence), decay))  # 1

    def observe(layer, state, evidence, strengths):
        moment = partial(input_moment, layer, evidence)  # 1'
        if state.inputs is not None:
            state = warm(layer, state, evidence, strengths.decay)  # 1
            moment = partial(averages.mean, state.inputs)
        x, _ = _split(layer, evidence, strengths.damping, split)
        missing, old = state.started == 0, state.input_inverse
        new = jax.lax.cond(jnp.any(missing), lambda: damped_inverse(moment(), x), lambda: old)  # 2
        new = jnp.where(missing[..., None, None], new, old)
        return state._replace(input_inverse=new, started=jnp.ones_like(state.started))

    def apply(layer, state, matrix, strengths):
        del layer, strengths
        return bfgs.times(matmul(state.input_inverse, matrix), state.output_inverse)  # 3

    def learn(layer, state, here, there, strengths):
        x, v = _split(layer, here.evidence, strengths.damping, split)
        inputs, cotangents = mean_input(layer, here.evidence), mean_output(layer, here.evidence)

        # mean z+ - mean z, where what the weights do, known exactly, is no difference of large numbers
        moved = mean_input(layer, there.evidence) - inputs
        s = _product(moved, there.weights) + _product(inputs, there.weights - here.weights)
        y = mean_output(layer, there.evidence) - cotangents
        secant = averages.update(state.secant, Secant(s, y), strengths.decay)  # 4
        s, y = averages.mean(secant)
        s = bfgs.powell(s, y, bfgs.image(state.output_inverse, y))  # 5
        if second_damping == "powell":
            y = bfgs.powell_of_identity(s, y, v)  # 6
        else:
            y = bfgs.levenberg(s, y, v)  # 6'
        outputs, skipped_outputs = bfgs.updated(state.output_inverse, s, y, _bound(s, cotangents))  # 7

        s = bfgs.image(state.input_inverse, inputs)
        if state.inputs is None:
            y = input_moment_action(layer, here.evidence, s) + x * s  # 8'
        else:
            y = bfgs.image(averages.mean(state.inputs), s) + x * s  # 8
        inverse, skipped_inputs = bfgs.updated(state.input_inverse, s, y, _bound(s, inputs))  # 9
        skips = Skips(*(jnp.sum(skipped, dtype=jnp.int32) for skipped in (skipped_inputs, skipped_outputs)))
        return state._replace(input_inverse=inverse, secant=secant, output_inverse=outputs), skips

    return StepMethod(init, warm, observe, apply, learn)


def kbfgs(
    learning_rate: ScalarOrSchedule,
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 0.3,
    memory: int | None = None,
    hessian_action: HessianAction = "average",
    second_damping: SecondDamping = "powell",
    split: Split = "even",
    others: Others = "diagonal",
    decay: ScalarOrSchedule = 0.9,
    statistics_every: int | Array = 1,
    momentum: Scalar | None = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS, K-BFGS(L) or KF-QN-CNN, complete: what it learns from is its own step.

    `capture` with `labels="true"`, as in the papers: then a step costs one evaluation of the batch more, at the new
    parameters, and nothing else. With `"sampled"` labels both evaluations have those drawn at the old parameters, and
    the pair is of the loss with these. The pair never has the penalty in it. What stands behind this
    transformation and changes its step (clipping, say) does no harm to the pair, which is then of a step that was not
    taken; there is no such option inside, for no bound on the step belongs to the method.

    Damping 0.3 beside a learning rate of 0.3, `decay` and momentum 0.9, `weight_decay=1e-5` and, if any, `memory=100`
    are those of the authors' demonstration on an autoencoder (https://github.com/renyiryry/kbfgs_neurips2020_public),
    after a pass over the data for A (`warm_start`). They are in the units of one example, as everything here.

    Args:
        learning_rate: step size, or its schedule.
        layers: from `capture.layers`.
        damping: strength in the units of the Hessian of one example, its root on either factor; its schedule, if a
            function. H_g starts as the identity, so the first steps see the root on the inputs alone.
        memory: p, how many pairs stand for H_g; None for the matrix itself.
        hessian_action: by which A line 8 learns: its "average", or that of the "batch", which is never formed.
        second_damping: "powell", line 6, or "levenberg", line 6'.
        split: how the damping is split over the T positions that share weights: "even", the root on either factor; or
            "positions", root(damping T) and root(damping / T). Both are stand-ins: what the paper does is not known.
        others: parameters of no known layer, norms for instance, of which nothing is known, either: a "diagonal"
            Fisher block with the same damping, which with true labels is W times the square of the mean gradient; or
            "gradient", the momentum as it is. Both are stand-ins.
        decay: weight of the old value in the averages of A and of s and y; 0 for full batches.
        statistics_every: steps between evaluations at the new parameters, and all that is learned from them.
        momentum: weight of the old gradient in an average that starts from zero; None for none.
        weight_decay: strength of an l2 penalty of the loss, whose gradient goes into the momentum; None for none.
        weight_decay_mask: which parameters it holds for, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `params` and, as `curvature`, the `out.curvature` of `value_and_grad`
        itself. For `optax.inject_hyperparams` name `memory` among the `static_args`.

    Raises:
        TypeError: if `layers` is no `Layers`, or a number is none.
        ValueError: if a word is unknown or a number out of its range.
    """
    for name, value, choices in (
        ("hessian_action", hessian_action, ACTIONS),
        ("second_damping", second_damping, DAMPINGS),
        ("split", split, SPLITS),
    ):
        checks.choice(name, value, choices)
    if memory is not None:
        checks.number("memory", memory, least=1)
        if int(memory) != memory:
            raise ValueError(f"`memory` is {memory}; expected a whole number of pairs.")
    parts: list[optax.GradientTransformation] = []
    if weight_decay is not None:
        checks.number("weight_decay", weight_decay, least=0)
        parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
    if momentum is not None:
        checks.number("momentum", momentum, least=0, below=1)
        parts.append(optax.ema(momentum, debias=False))
    step = lift_stepping(
        kbfgs_block(memory, hessian_action, second_damping, split),
        learning_rate,
        layers,
        damping=damping,
        decay=decay,
        statistics_every=statistics_every,
        others=others,
    )
    return optax.chain(*parts, step) if parts else step


def _identity(layer: Layer, size: int) -> Array:
    return jnp.zeros((*layer.stack, size, size), layer.dtype) + jnp.eye(size, dtype=layer.dtype)


def _split(layer: Layer, evidence: Evidence, damping: Array, split: Split) -> tuple[Array, Array]:
    """The strengths x of A and v of H_g."""
    root = jnp.sqrt(damping.astype(layer.dtype))
    positions = input_rows(layer, evidence).shape[-2] if split == "positions" else 1
    return root * positions**0.5, root / positions**0.5


def _product(row: Array, matrix: Array) -> Array:
    """Rows [S, I] times matrices [S, I, O]."""
    return einsum("...i,...io->...o", row, matrix)


def _bound(s: Array, mean: Array) -> Array:
    """What s^T y has to be above."""
    return _SKIP * bfgs.dot(s, s) * jnp.sqrt(bfgs.dot(mean, mean))
