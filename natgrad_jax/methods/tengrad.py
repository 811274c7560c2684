"""TENGraD: the exact Fisher block of a batch, inverted in sample space.

    1  J <- the gradients of the examples as rows, over sqrt(number of rows), kept as factors a, g   measure
    2  K <- J J^T,  L L^T = K + damping I,  M = (L L^T)^-1                                           refresh
    3  direction <- dW / damping - J^T M J dW / damping  =  (J^T J + damping I)^-1 dW                apply

by Woodbury's identity: F = J^T J is not approximated, it is that of one batch, which serves until the next refresh:
there is no moving average, and J belongs to what is applied. With `blocks="joint"` all known layers are one block: K
is then the sum of theirs, and the direction the exact damped natural gradient, in memory for the rows and N^2 numbers
more. Between the two, `blocks={"encoder": ("Dense_0", "Dense_1")}` makes one block of the layers of each group.

With `energy` only the leading singular vectors of J are kept, at least one:

    2' K = V diag(s^2) V^T;  M <- V diag(1 / (s^2 + damping)) V^T over those with the largest s       refresh

With `target="ief"` the direction is that of the improved empirical Fisher of the batch, each example weighted by the
squared norm of its loss's derivative by the outputs, slope_n, instead of by 1:

    3' direction <- J^T M slope / sqrt(N), and line 3 for whatever was added to the gradient           apply

Soori, Can, Mu, Gürbüzbalaban and Dehnavi (2021), https://arxiv.org/abs/2106.03947; line 3' is of Wu, Yu, Zhang and
Woodland (2024), https://arxiv.org/abs/2406.06420. Unlike the authors' code: kernel and bias are one block, the bias a
row of it; every block is divided by its damping alike, so that one learning rate fits all; refreshes and applications
are of all layers. Not here: sketched rows (SENG), with which the operator is not positive definite; their randomised
decomposition.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple, Self

import jax.numpy as jnp

from natgrad_jax import checks
from natgrad_jax.algebra import stacks
from natgrad_jax.around.adaptive import AdaptiveDamping, Damping
from natgrad_jax.around.control import Length, Quadratic
from natgrad_jax.around.spring import spring
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.blocks import rings, samples
from natgrad_jax.blocks.samples import Jacobian
from natgrad_jax.layers.joint import by_member, from_members, is_joint, members
from natgrad_jax.layers.parameter import with_gradients
from natgrad_jax.lift.joined import of_joint_blocks, of_what_is_added
from natgrad_jax.lift.lift import lift
from natgrad_jax.lift.state import Period
from natgrad_jax.lift.unkept import unkept
from natgrad_jax.settings import (
    Completed,
    Direction,
    Fixed,
    Groups,
    Number,
    Size,
    Steps,
    Transformation,
    direction,
    optimizer,
)

Blocks = Literal["layer", "joint"] | Mapping[str, Collection[str]]
Sharing = Literal["example", "reduce"]
Target = Literal["gradient", "ief"]


class Measured(NamedTuple):
    """What a batch left behind.

    Attributes:
        jacobians: J of the layer; of every layer in turn if the block is a joint one.
        factor: L [S, R, R]; with `energy` a root of M, M = L L^T.
        fallbacks: how often L came from eigenvalues, since Cholesky's failed, int32 [S].
        strength: the damping in M [S]; 0 as long as no batch is measured.
        target: slope / sqrt(N) of each row [S, R]; None for `target="gradient"`.
    """

    jacobians: tuple[Jacobian, ...]
    factor: Array
    strength: Array
    target: Array | None
    fallbacks: Array


@dataclass(frozen=True, kw_only=True)
class TENGraD(Direction):
    """The TENGraD direction, (F + damping I)^-1 dW with the F of the last batch that was measured.

    How many examples and draws of labels the state has room for is how many the `layers` were found with; smaller
    batches are filled up. The damping of the last refresh holds until the next. Directions that the batch did not show
    are divided by it alone.
    """

    blocks: Annotated[
        Blocks,
        '"layer": one block for each layer; "joint": one of all known layers, the exact natural gradient of the batch, '
        "from the same kernels and with one factorisation in all; {block: names of its layers}: one for each of these, "
        "and for each other layer.",
        Groups(),
    ] = "layer"
    sharing: Annotated[
        Sharing,
        'positions that share the weights. "example": the exact gradients of the examples; "reduce": those of pooled '
        "positions, the sum of a beside the mean of g, cheaper and exact where g is the same at all of them.",
    ] = "example"
    energy: Annotated[
        float | None,
        "keep the leading singular vectors of J, whose singular values add up to this part of the sum of all, at least "
        "one; what is cut is divided by the damping alone. None keeps all and is cheaper: with a number the refresh is "
        "an eigendecomposition.",
        Fixed(Number(below=1)),
    ] = None
    target: Annotated[
        Target,
        '"gradient": that which comes in; "ief": of the improved empirical Fisher, which does not favour the examples '
        'that are learned already, as the empirical one does. It needs `labels="true"` and `refresh_every=1`: the '
        "direction is that of the batch that is measured.",
    ] = "gradient"
    examples: Annotated[
        int | None, "the largest batch, if not that of the `layers`; smaller ones take as much time and memory.", Size()
    ] = None
    workspace: Annotated[
        int | None,
        "bytes that what is formed on the way to one layer's kernel may take, at least what one example needs; more is "
        "done in pieces. None for 256 MiB.",
        Size(),
    ] = None
    kept: Annotated[
        bool,
        "whether J stays in the state. False: no array of the size of examples times parameters is ever there; the "
        'gradients of the examples by parameters of no layer are formed in pieces. For `jacobian="examples"`, '
        '`blocks="joint"` and `refresh_every=1`.',
    ] = True
    decay: Annotated[
        ScalarOrSchedule,
        "weight of the old value in the diagonal blocks of parameters of no known layer; nothing else is averaged.",
        Number(below=1, schedule=True),
    ] = 0.95
    refresh_every: Annotated[
        Period,
        "steps between the batches that are measured, each of which serves alone until the next. Fewer steps follow "
        "the curvature, at their cost.",
        Steps(),
    ] = 100

    def __post_init__(self):
        super().__post_init__()
        if self.target == "ief" and not (isinstance(self.refresh_every, int) and self.refresh_every == 1):
            raise ValueError(
                f'`refresh_every` is {self.refresh_every}, but the direction of `target="ief"` is that of the batch '
                "that is measured, whatever the gradient: set `refresh_every=1`."
            )

        plain = self.blocks == "joint" and self.target == "gradient" and self.energy is None
        if not self.kept and not (plain and isinstance(self.refresh_every, int) and self.refresh_every == 1):
            raise ValueError(
                '`kept=False` is the exact direction of the batch at hand: it needs `blocks="joint"` and '
                "`refresh_every=1`, and neither `energy` nor another `target`."
            )

    def lifted(self, layers: Layers) -> Transformation:
        """The direction for the layers of a model."""
        checks.layers(layers)
        size = layers.examples if self.examples is None else self.examples
        checks.size("examples", size)
        if not layers.draws:
            raise ValueError(
                'The `layers` are of a capture with `labels="forward"`, which has no cotangents, and TENGraD needs '
                'them: capture with `labels="sampled"`.'
            )
        if not self.kept:
            return unkept(layers, self.given, self.workspace or samples.WORKSPACE)
        method, layers = self.method_of(size, layers.draws), with_gradients(layers)

        def of(layers: Layers) -> Transformation:
            return lift(lambda decay: method, layers, damping=self.given, decay=self.decay, schedule=self.schedule)

        found = (
            of(layers)
            if self.blocks == "layer"
            else of_joint_blocks(layers, of, None if isinstance(self.blocks, str) else self.blocks)
        )
        return found if self.target == "gradient" else of_what_is_added(layers, found)

    def method_of(self, examples: int, draws: int) -> Method:
        """The functions of one layer, or of a joint block.

        Args:
            examples: N, the largest batch that there is room for.
            draws: K.

        Returns:
            The method.
        """
        rows, workspace = draws * examples, self.workspace or samples.WORKSPACE

        def init(layer):
            jacobians = tuple(samples.empty(member, examples, draws, self.sharing) for member in members(layer))
            factor = jnp.tile(jnp.eye(rows, dtype=layer.dtype), (*layer.stack, 1, 1))
            goal = jnp.zeros((*layer.stack, rows), layer.dtype) if self.target == "ief" else None
            none = jnp.zeros(layer.stack, jnp.int32)
            return (), Measured(jacobians, factor, jnp.zeros(layer.stack, layer.dtype), goal, none)

        def observe(layer, statistics, evidence):
            del layer, evidence
            return statistics

        def measure(layer, operator, evidence):
            found = by_member(layer, evidence)
            jacobians = tuple(
                samples.observed(member, old, one, self.sharing, workspace)  # 1
                for member, old, one in zip(members(layer), operator.jacobians, found, strict=True)
            )
            goal = operator.target
            if goal is not None:
                goal = jnp.broadcast_to(samples.slopes(found[0], goal.shape[-1]).astype(goal.dtype), goal.shape)
            return operator._replace(jacobians=jacobians, target=goal)

        def refresh(layer, statistics, operator, damping):
            del statistics
            pairs = zip(members(layer), operator.jacobians, strict=True)
            parts = [rings.kernel(replace(one, devices=layer.devices), rows, workspace) for one, rows in pairs]
            kernel = _over_members(layer, parts, 2)  # 2
            strength = stacks.floored(damping, stacks.frobenius(kernel))
            factor, failed = _factor(kernel, strength, self.energy)
            fallbacks = operator.fallbacks + failed.astype(jnp.int32)
            return operator._replace(factor=factor, strength=strength, fallbacks=fallbacks)

        def apply(layer, operator, gradient, damping):
            known = operator.strength > 0
            strength = jnp.where(known, operator.strength, damping)
            strength = jnp.where(strength > 0, strength, 1)  # nothing measured and no damping: the gradient
            parts = by_member(layer, gradient)
            shown = [samples.project(one, part) for one, part in zip(operator.jacobians, parts, strict=True)]
            residual = -_over_members(layer, shown, 1) / strength[..., None]
            if operator.target is not None:
                residual += operator.target  # 3'
            weights = jnp.where(
                known[..., None], _solved(operator.factor, residual.astype(operator.factor.dtype), self.energy), 0
            )
            found = (
                part / strength[..., None, None]
                + samples.back(jacobian, jnp.broadcast_to(weights, (*member.stack, rows)))
                for member, jacobian, part in zip(members(layer), operator.jacobians, parts, strict=True)
            )  # 3
            return from_members(layer, tuple(found))

        return Method(init, observe, refresh, apply, measure=measure)


def _over_members(layer: Layer, values: list[Array], axes: int) -> Array:
    """The sum over the layers of a joint block, and over their stacks, of what has `axes` axes of its own."""
    if not is_joint(layer):
        return values[0]
    return jnp.sum(jnp.stack([jnp.sum(value, axis=range(value.ndim - axes)) for value in values]), axis=0)


def _factor(kernel: Array, damping: Array, energy: float | None) -> tuple[Array, Array]:
    """Lines 2, 2': singular values are kept from the largest on, as long as their sum is within the energy.

    Without an energy L is that of Cholesky, and where rounding makes the kernel indefinite that of its eigenvalues,
    those below zero as zero. The other value says where that was.
    """
    if energy is None:
        return stacks.cholesky_or_eigh(kernel, damping)
    values, vectors = stacks.eigh(kernel)
    assert vectors is not None, "the kernel is no diagonal"
    singular = jnp.sqrt(values)[..., ::-1]
    kept = jnp.cumsum(singular, axis=-1) <= energy * jnp.sum(singular, axis=-1, keepdims=True)
    kept = kept.at[..., 0].set(True)[..., ::-1]
    root = vectors * jnp.where(kept, (values + damping[..., None]) ** -0.5, 0)[..., None, :]
    return root, jnp.zeros(damping.shape, bool)


def _solved(factor: Array, vector: Array, energy: float | None) -> Array:
    """M v."""
    if energy is None:
        return stacks.cholesky_solve(factor, vector)
    return stacks.einsum("...ri,...si,...s->...r", factor, factor, vector)


@dataclass(frozen=True, kw_only=True)
class TENGraDOptimizer(Completed, TENGraD):
    """TENGraD with heavy-ball momentum and decoupled weight decay.

    The defaults are those of the authors' scripts (Fashion-MNIST: learning rate 0.003, batches of 128), which also have
    `kl_clip=1e-2`, outside of which their dampings of 0.1 to 0.3 stand for shorter steps. Ours is by
    `experiments/defaults.py`. An adaptive damping goes with frequent refreshes.
    """

    momentum: Annotated[  # pyrefly: ignore[bad-override]
        Scalar | Quadratic | Literal["spring"] | None,
        'weight of the old direction in heavy-ball momentum; "quadratic": what minimises the quadratic model of the '
        'loss; "spring": that of `spring`, best with `refresh_every=1`, not for an adaptive damping; None for none.',
        Number(below=1),
    ] = 0.9
    spring_weight: Annotated[
        Scalar,
        'weight of the last direction in `momentum="spring"`; its authors take 0.99 beside a bound on the step, such '
        "as `kl_clip`.",
        Number(below=1),
    ] = 0.9
    damping: Damping = 0.1
    kl_clip: Scalar | None = 3e-3  # 1e-3 cost it its best rates

    def beside(self, learning_rate: ScalarOrSchedule | Length | None, chosen: Collection[str]) -> Self:
        """As of all; beside the momentum of SPRING, which reads it, the damping stays what it is.

        Raises:
            ValueError: if the length of a step of SPRING is to come from the quadratic model.
        """
        if learning_rate == "quadratic" and self.heavy_ball is not self.momentum:
            raise ValueError(
                '`momentum="spring"` goes with a learning rate or with "search", not with "quadratic": the direction '
                "of SPRING is that of the batch and of a pull towards the last step, which the quadratic model of the "
                "batch knows nothing of, and no test takes back a step that raises the loss."
            )
        spring_reads = {"damping"} if self.heavy_ball is not self.momentum else set()
        return super().beside(learning_rate, {*chosen, *spring_reads})

    def direction(self, layers: Layers) -> Transformation:
        """The direction, with its own momentum if that is asked for."""
        if self.heavy_ball is self.momentum:
            return self.lifted(layers)
        if isinstance(self.damping, AdaptiveDamping):
            raise ValueError(
                'The damping is adaptive, but with `momentum="spring"` it also says how strongly the last direction '
                "pulls, which the model that it adapts to knows nothing of; give `damping` a number or a schedule, or "
                'take `momentum="quadratic"`.'
            )
        return spring(self.lifted(layers), self.damping, self.spring_weight)

    @property
    def heavy_ball(self) -> Scalar | Quadratic | None:
        """The momentum behind the direction, which that of `spring` is not."""
        return None if isinstance(self.momentum, str) and self.momentum == "spring" else self.momentum


scale_by_tengrad = direction(TENGraD)
tengrad = optimizer(TENGraDOptimizer)
