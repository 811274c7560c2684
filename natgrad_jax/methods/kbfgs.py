"""K-BFGS: a Kronecker product whose two inverses are learned by BFGS from the steps that are taken.

Of a layer with inputs a, outputs z = a W before the activation and their cotangents g, means over batch and positions:

    1  A <- EMA(E[sum_t a a^T])                                        observe
    2  H_a <- (A + x I)^-1,  x v = damping                             start, only once; H_g starts at I
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

A of one-hot inputs is diagonal, so its H_a is line 2 at every step, exactly, and lines 8 and 9 are not needed.

Not here: H_0 = I scaled by the last pair; another A for dense layers than for convolutions.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from natgrad_jax.algebra import averages, bfgs
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.branches import when
from natgrad_jax.algebra.stacks import Diagonal, Factor, damped_inverse, einsum, matmul
from natgrad_jax.algebra.truncated import Kept
from natgrad_jax.base import Array, Evidence, Layer, Layers, Scalar, ScalarOrSchedule
from natgrad_jax.blocks.kronecker import identities
from natgrad_jax.layers.rows import input_moment, input_moment_action, input_rows, mean_input, mean_output
from natgrad_jax.lift.guards import choose
from natgrad_jax.lift.requests import chained
from natgrad_jax.lift.state import Period
from natgrad_jax.lift.stepping import Others, Skips, StepMethod, lift_stepping
from natgrad_jax.settings import Mask, Number, Settings, Size, Steps, Transformation, optimizer

HessianAction = Literal["average", "batch"]
SecondDamping = Literal["powell", "levenberg"]
Split = Literal["even", "positions"]
_SKIP = 1e-4


class Secant(NamedTuple):
    """A step of the mean outputs, s, and of their mean cotangents, y: [S, O]."""

    s: Array
    y: Array


class Averages(NamedTuple):
    """A [S, I, I], or a `Diagonal`, or None where it is not kept; s and y."""

    inputs: Average | None
    secant: Average


class Learned(NamedTuple):
    """What is applied.

    Attributes:
        inputs: H_a [S, I, I], or a `Diagonal`.
        outputs: H_g [S, O, O], or its pairs [S, p, O].
        started: whether line 2 is done, int32 [S].
    """

    inputs: Factor
    outputs: Factor | bfgs.Pairs
    started: Array


@dataclass(frozen=True, kw_only=True)
class KBFGSOptimizer(Settings):
    """K-BFGS, K-BFGS(L) or KF-QN-CNN, complete: what it learns from is its own step.

    Capture with `labels="true"`, as the papers do. A step then costs one more evaluation of the batch, at the new
    parameters, and nothing else. With `"sampled"` labels both evaluations use the labels drawn at the old parameters,
    and the pair is of their loss. The pair never contains the penalty. A transformation behind this one, such as
    clipping, may change the step: the pair is then of a step that was not taken, which does no harm. `kl_clip` shortens
    the step inside, and the pair is of the short step. `update` needs `params`, and `out.curvature` itself: a mapping
    of evidence cannot be measured again.

    Damping 0.3 beside a learning rate of 0.3, `decay` and momentum 0.9, `weight_decay=1e-5` and, if any, `memory=100`
    are those of the authors' demonstration on an autoencoder (https://github.com/renyiryry/kbfgs_neurips2020_public),
    after a pass over the data for A (`warm_start`). They are in the units of one example, as everything here.
    """

    damping: Annotated[
        ScalarOrSchedule,
        "strength in the units of the Hessian of one example, its root on either factor; its schedule, if a function. "
        "More is safer. H_g starts as the identity, so the first steps see the root on the inputs alone.",
        Number(schedule=True),
    ] = 0.3
    memory: Annotated[
        int | None, "p, how many pairs stand for H_g; None for the matrix itself, dear where outputs are wide.", Size()
    ] = None
    hessian_action: Annotated[
        HessianAction, 'by which A line 8 learns: its "average", or that of the "batch", which is never formed.'
    ] = "average"
    second_damping: Annotated[SecondDamping, '"powell", line 6, or "levenberg", line 6\'.'] = "powell"
    split: Annotated[
        Split,
        'how the damping is split over the T positions that share weights: "even", the root on either factor; or '
        '"positions", root(damping T) and root(damping / T). Both are stand-ins: what the paper does is not known.',
    ] = "even"
    others: Annotated[
        Others,
        'parameters of no known layer, norms for instance, of which nothing is known, either: a "diagonal" Fisher '
        "block with the same damping, which with true labels is W times the square of the mean gradient; or "
        '"gradient", the momentum as it is. Both are stand-ins.',
    ] = "diagonal"
    decay: Annotated[
        ScalarOrSchedule,
        "weight of the old value in the averages of A and of s and y; 0 for full batches.",
        Number(below=1, schedule=True),
    ] = 0.9
    statistics_every: Annotated[
        Period, "steps between evaluations at the new parameters, and all that is learned from them.", Steps()
    ] = 1
    momentum: Annotated[
        Scalar | None,
        "weight of the old gradient in an average that starts from zero; None for none.",
        Number(below=1),
    ] = 0.9
    weight_decay: Annotated[
        ScalarOrSchedule | None,
        "strength of an l2 penalty of the loss, whose gradient goes into the momentum; None for none.",
        Number(schedule=True),
    ] = None
    weight_decay_mask: Annotated[
        Any, "which parameters it holds for, as `optax.add_decayed_weights` takes it; None for all.", Mask()
    ] = None

    kl_clip: Annotated[
        Scalar | None,
        "bound on a step s of gradient g, momentum in front: the largest product -learning_rate <g, s>, as that of "
        "`clip_by_kl`; None for none.",
        Number(),
    ] = 0.1

    def completed(self, learning_rate: ScalarOrSchedule, layers: Layers) -> Transformation:
        """The complete optimizer for the layers of a model."""
        step = lift_stepping(
            self.method(),
            learning_rate,
            layers,
            damping=self.damping,
            decay=self.decay,
            statistics_every=self.statistics_every,
            others=self.others,
            kl_clip=self.kl_clip,
        )
        parts: list[optax.GradientTransformation] = []
        if self.weight_decay is not None:
            parts.append(optax.add_decayed_weights(self.weight_decay, self.weight_decay_mask))
        if self.momentum is not None:
            parts.append(optax.ema(self.momentum, debias=False))
        return chained(*parts, step, direction=step) if parts else step

    def method(self) -> StepMethod:
        """The functions of one layer."""

        def init(layer):
            rows, columns = layer.shape
            inputs, outputs = identities(layer, Kept(max(rows, columns) if self.memory is None else rows))
            if self.memory is not None:
                outputs = bfgs.no_pairs(layer.stack, self.memory, columns, layer.dtype)
            kept = layer.one_hot or self.hessian_action == "average"  # a diagonal always is
            average = averages.of_zeros(inputs, layer.stack, layer.dtype) if kept else None
            zeros = jnp.zeros((*layer.stack, columns), layer.dtype)
            secant = averages.of_zeros(Secant(zeros, zeros), layer.stack, layer.dtype)
            return Averages(average, secant), Learned(inputs, outputs, jnp.zeros(layer.stack, jnp.int32))

        def observe(layer, statistics, evidence, decay):
            if statistics.inputs is None:
                return statistics  # 1'
            moment = input_moment(layer, evidence, full=not layer.one_hot)
            return statistics._replace(inputs=averages.update(statistics.inputs, moment, decay))  # 1

        def start(layer, statistics, operator, evidence, strengths):
            x, _ = _split(layer, evidence, strengths.damping, self.split)
            missing, old = (operator.started == 0) | layer.one_hot, operator.inputs

            def made(old):
                del old
                kept = statistics.inputs
                return damped_inverse(input_moment(layer, evidence) if kept is None else averages.mean(kept), x)

            new = choose(missing, when(jnp.any(missing), made, old), old)  # 2
            return operator._replace(inputs=new, started=jnp.ones_like(operator.started))

        def apply(layer, operator, matrix, strengths):
            del layer, strengths
            inputs, outputs = operator.inputs, operator.outputs
            moved = inputs.entries[..., None] * matrix if isinstance(inputs, Diagonal) else matmul(inputs, matrix)
            return bfgs.times(moved, outputs)  # 3

        def learn(layer, statistics, operator, here, there, strengths):
            x, v = _split(layer, here.evidence, strengths.damping, self.split)
            inputs, cotangents = mean_input(layer, here.evidence), mean_output(layer, here.evidence)

            # mean z+ - mean z: what the weights do is known exactly, and is not taken as a difference of large numbers
            moved = mean_input(layer, there.evidence) - inputs
            s = einsum("...i,...io->...o", moved, there.weights)
            s += einsum("...i,...io->...o", inputs, there.weights - here.weights)
            y = mean_output(layer, there.evidence) - cotangents
            secant = averages.update(statistics.secant, Secant(s, y), strengths.decay)  # 4
            s, y = averages.mean(secant)
            s = bfgs.powell(s, y, bfgs.image(operator.outputs, y))  # 5
            damp = bfgs.powell_of_identity if self.second_damping == "powell" else bfgs.levenberg
            y = damp(s, y, v)  # 6, 6'
            outputs, skipped_outputs = bfgs.updated(operator.outputs, s, y, _bound(s, cotangents))  # 7
            inverse, skipped_inputs = operator.inputs, jnp.zeros(layer.stack, bool)
            if not layer.one_hot:
                s = bfgs.image(inverse, inputs)
                if statistics.inputs is None:
                    y = input_moment_action(layer, here.evidence, s) + x * s  # 8'
                else:
                    y = bfgs.image(averages.mean(statistics.inputs), s) + x * s  # 8
                inverse, skipped_inputs = bfgs.updated(inverse, s, y, _bound(s, inputs))  # 9
            skips = Skips(*(jnp.sum(each, dtype=jnp.int32) for each in (skipped_inputs, skipped_outputs)))
            return statistics._replace(secant=secant), operator._replace(inputs=inverse, outputs=outputs), skips

        return StepMethod(init, start, apply, learn, observe, averages=self.hessian_action == "average")


def _split(layer: Layer, evidence: Evidence, damping: Array, split: Split) -> tuple[Array, Array]:
    """The strengths x of A and v of H_g."""
    root = jnp.sqrt(damping.astype(layer.dtype))
    positions = input_rows(layer, evidence).shape[-2] if split == "positions" else 1
    return root * positions**0.5, root / positions**0.5


def _bound(s: Array, mean: Array) -> Array:
    """What s^T y has to be above."""
    return _SKIP * bfgs.dot(s, s) * jnp.sqrt(bfgs.dot(mean, mean))


kbfgs = optimizer(KBFGSOptimizer)
