"""TENGraD: the exact Fisher block of a batch, inverted in sample space.

    1  J <- the gradients of the examples as rows, over sqrt(number of rows), kept as factors a, g   observe
    2  K <- J J^T,  L L^T = K + damping I,  M = (L L^T)^-1                                           refresh
    3  direction <- dW / damping - J^T M J dW / damping  =  (J^T J + damping I)^-1 dW                apply

by Woodbury's identity: F = J^T J is not approximated, it is that of one batch, which serves until the next refresh:
there is no moving average. With `blocks="joint"` all known layers are one block: K is then the sum of theirs, and the
direction the exact damped natural gradient, in memory for the rows and N^2 numbers more.

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

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks, linalg, samples
from natgrad_jax.base import Array, Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.chain import complete
from natgrad_jax.control import Quadratic
from natgrad_jax.damping import AdaptiveDamping, Damping
from natgrad_jax.layers.joint import joint, joint_evidence, members
from natgrad_jax.samples import Jacobian
from natgrad_jax.steps import spring
from natgrad_jax.transform import Schedule, lift

Blocks = Literal["layer", "joint"]
Sharing = Literal["example", "reduce"]
Target = Literal["gradient", "ief"]
BLOCKS, SHARINGS, TARGETS = get_args(Blocks), get_args(Sharing), get_args(Target)


class TENGraDState(NamedTuple):
    """What a batch left behind.

    Attributes:
        jacobians: J of the layer; of every layer in turn if the block is a joint one.
        factor: L [S, R, R]; with `energy` a root of M, M = L L^T.
        strength: the damping in M [S]; 0 as long as there is no M of the date of J.
        target: slope / sqrt(N) of each row [S, R]; None for `target="gradient"`.
    """

    jacobians: tuple[Jacobian, ...]
    factor: Array
    strength: Array
    target: Array | None


def tengrad_block(
    examples: int,
    draws: int,
    sharing: Sharing = "example",
    energy: float | None = None,
    target: Target = "gradient",
    workspace: int | None = None,
) -> Method:
    """TENGraD of one layer, or of a joint block.

    Args:
        examples: N, the largest batch that there is room for.
        draws: K.
        sharing: "example" or "reduce".
        energy: part of the sum of the singular values that is kept; None for all.
        target: "gradient" or "ief".
        workspace: bytes for what is formed on the way; None for 256 MiB.

    Returns:
        The four functions.
    """
    rows, workspace = draws * examples, workspace or samples.WORKSPACE

    def init(layer):
        jacobians = tuple(samples.empty(member, examples, draws, sharing) for member in members(layer))
        factor = jnp.tile(jnp.eye(rows, dtype=layer.dtype), (*layer.stack, 1, 1))
        goal = jnp.zeros((*layer.stack, rows), layer.dtype) if target == "ief" else None
        return TENGraDState(jacobians, factor, jnp.zeros(layer.stack, layer.dtype), goal)

    def observe(layer, state, evidence):
        found = _by_member(layer, evidence)
        jacobians = tuple(
            samples.observed(member, old, one, sharing, workspace)  # 1
            for member, old, one in zip(members(layer), state.jacobians, found, strict=True)
        )
        goal = state.target
        if goal is not None:
            goal = jnp.broadcast_to(samples.slopes(found[0], goal.shape[-1]).astype(goal.dtype), goal.shape)
        return TENGraDState(jacobians, state.factor, jnp.zeros_like(state.strength), goal)

    def refresh(layer, state, damping):
        kernel = _over_members(layer, [samples.kernel(jacobian, workspace) for jacobian in state.jacobians], 2)  # 2
        strength = linalg.floored(damping, jnp.linalg.norm(kernel, axis=(-2, -1)))
        return state._replace(factor=_factor(kernel, strength, energy), strength=strength)

    def apply(layer, state, gradient, damping):
        known = state.strength > 0
        strength = jnp.where(known, state.strength, damping)
        strength = jnp.where(strength > 0, strength, 1)  # nothing measured and no damping: the gradient
        parts = _by_member(layer, gradient)
        shown = [samples.project(one, part) for one, part in zip(state.jacobians, parts, strict=True)]
        residual = -_over_members(layer, shown, 1) / strength[..., None]
        if state.target is not None:
            residual += state.target  # 3'
        weights = jnp.where(known[..., None], _solved(state.factor, residual, energy), 0)
        found = {
            member.name: part / strength[..., None, None] + samples.back(jacobian, _to_member(layer, weights, member))
            for member, jacobian, part in zip(members(layer), state.jacobians, parts, strict=True)
        }  # 3
        return found if layer.kind == "joint" else found[layer.name]

    return Method(init, observe, refresh, apply)


def _by_member(layer: Layer, values: Any) -> tuple[Any, ...]:
    """What a block has for each of its layers."""
    return tuple(values[member.name] for member in members(layer)) if layer.kind == "joint" else (values,)


def _over_members(layer: Layer, values: list[Array], axes: int) -> Array:
    """The sum over the layers of a joint block, and over their stacks, of what has `axes` axes of its own."""
    if layer.kind != "joint":
        return values[0]
    return jnp.sum(jnp.stack([jnp.sum(value, axis=range(value.ndim - axes)) for value in values]), axis=0)


def _to_member(layer: Layer, weights: Array, member: Layer) -> Array:
    """Weights [S, R] for one layer of a block."""
    return jnp.broadcast_to(weights, (*member.stack, weights.shape[-1])) if layer.kind == "joint" else weights


def _factor(kernel: Array, damping: Array, energy: float | None) -> Array:
    """Lines 2, 2': singular values are kept from the largest on, as long as their sum is within the energy."""
    if energy is None:
        return linalg.cholesky(kernel + damping[..., None, None] * jnp.eye(kernel.shape[-1], dtype=kernel.dtype))
    values, vectors = linalg.eigh(kernel)
    assert vectors is not None, "the kernel is no diagonal"
    singular = jnp.sqrt(values)[..., ::-1]
    kept = jnp.cumsum(singular, axis=-1) <= energy * jnp.sum(singular, axis=-1, keepdims=True)
    kept = kept.at[..., 0].set(True)[..., ::-1]
    return vectors * jnp.where(kept, (values + damping[..., None]) ** -0.5, 0)[..., None, :]


def _solved(factor: Array, vector: Array, energy: float | None) -> Array:
    """M v."""
    if energy is None:
        return linalg.cholesky_solve(factor, vector)
    return linalg.einsum("...ri,...si,...s->...r", factor, factor, vector)


def scale_by_tengrad(
    layers: Layers,
    *,
    damping: Damping,
    blocks: Blocks = "layer",
    sharing: Sharing = "example",
    energy: float | None = None,
    target: Target = "gradient",
    examples: int | None = None,
    workspace: int | None = None,
    decay: ScalarOrSchedule = 0.95,
    refresh_every: int | Array = 100,
) -> optax.GradientTransformationExtraArgs:
    """The TENGraD direction, (F + damping I)^-1 dW with the F of the last batch that was measured.

    Args:
        layers: from `capture.layers`. How many examples and draws of labels the state has room for is how many it was
            called with; smaller batches are filled up.
        damping: strength in the units of F, the Fisher block of one example, or its schedule; that of the last refresh
            holds until the next. Directions that the batch did not show are divided by it alone.
        blocks: "layer" for one block per layer; "joint" for one of all known layers: the exact natural gradient.
        sharing: positions that share the weights. "example": the exact gradients of the examples; "reduce": those of
            pooled positions, the sum of a beside the mean of g, cheaper and exact where g is the same at all of them.
        energy: keep the leading singular vectors of J, whose singular values add up to this part of the sum of all, at
            least one; None keeps all. The refresh is then an eigendecomposition.
        target: "gradient" for the gradient that comes in. "ief" for the improved empirical Fisher: needs
            `labels="true"` and `refresh_every=1`, since the direction is that of the batch that is measured.
        examples: the largest batch, if not that of the `layers`.
        workspace: bytes that what is formed on the way to one layer's kernel may take, at least what one example needs;
            more is done in pieces. None for 256 MiB.
        decay: weight of the old value in the diagonal blocks of parameters of no known layer; nothing else is averaged.
        refresh_every: steps between the batches that are measured.

    Returns:
        A transformation; `update` needs `curvature`.

    Raises:
        TypeError: if `layers` is no `Layers`, or a setting is no number.
        ValueError: if a word is unknown, a number out of its range, or the number of examples not known.
    """
    checks.choice("blocks", blocks, BLOCKS)
    checks.choice("sharing", sharing, SHARINGS)
    checks.choice("target", target, TARGETS)
    if workspace is not None:
        checks.number("workspace", workspace, least=1)
    if energy is not None:
        checks.number("energy", energy, least=0, below=1)
    if target == "ief" and not (isinstance(refresh_every, int) and refresh_every == 1):
        raise ValueError(
            f'`refresh_every` is {refresh_every}, but the direction of `target="ief"` is that of the batch that is '
            "measured, whatever the gradient: set `refresh_every=1`."
        )
    if not isinstance(layers, Layers):
        raise TypeError(f"`layers` is {layers!r}; expected what `capture.layers(variables, x)` returns.")
    size = layers.examples if examples is None else examples
    checks.number("examples", size, least=1)
    if not layers.draws:
        raise ValueError(
            'The `layers` are of a capture with `labels="forward"`, which has no cotangents, and TENGraD needs them: '
            'capture with `labels="sampled"`.'
        )

    def lifted(layers: Layers) -> optax.GradientTransformationExtraArgs:
        return lift(
            lambda decay: tengrad_block(size, layers.draws, sharing, energy, target, workspace),
            layers,
            damping=damping,
            decay=decay,
            schedule=Schedule(refresh_every, refresh_every, as_one=True),
        )

    direction = lifted(layers) if blocks == "layer" else _of_joint_block(layers, lifted)
    return direction if target == "gradient" else _of_what_is_added(layers, direction)


def _of_joint_block(
    layers: Layers, lifted: Callable[[Layers], optax.GradientTransformationExtraArgs]
) -> optax.GradientTransformationExtraArgs:
    """A lifted method of the one block that those known layers make whose parameters are there."""
    lifted(joint(layers))  # settings are refused now, not when there are parameters

    def found_in(tree: Any) -> Layers:
        there = checks.present(layers, tree)
        return replace(
            layers,
            known=tuple(layer for layer in layers.known if layer in there),
            rest=tuple(layer for layer in layers.rest if layer in there),
        )

    def init(params):
        return lifted(joint(found_in(params))).init(params)

    def update(updates, state, params=None, *, curvature=None, **extra):
        found = found_in(updates)
        evidence = joint_evidence(found, checks.lazy_evidence(curvature, found.blocks))
        return lifted(joint(found)).update(updates, state, params, curvature=evidence, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_what_is_added(
    layers: Layers, direction: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Give a direction with a target of its own only what was added to the gradient of the known layers.

    That is exactly zero, a penalty, or the pull of `steps.spring`: whoever adds something passes the gradient itself on
    as the extra argument `gradient`.
    """

    def update(updates, state, params=None, *, curvature=None, gradient=None, warm_start=None, **extra):
        if (labels := getattr(curvature, "labels", "true")) != "true":
            raise ValueError(
                f'`target="ief"` is of the empirical Fisher, but the curvature has labels={labels!r}; capture with '
                '`labels="true"`.'
            )
        if warm_start is None:
            leaves, raw = addresses.flatten(updates), addresses.flatten(updates if gradient is None else gradient)
            known = [leaf.address for layer in layers.known for leaf in layer.leaves if leaf.address in leaves]
            updates = addresses.replace(updates, leaves | {name: leaves[name] - raw[name] for name in known})
        return direction.update(updates, state, params, curvature=curvature, warm_start=warm_start, **extra)

    return optax.GradientTransformationExtraArgs(direction.init, update)


def tengrad(
    learning_rate: ScalarOrSchedule | Quadratic,
    layers: Layers,
    *,
    damping: Damping = 0.1,
    blocks: Blocks = "layer",
    sharing: Sharing = "example",
    energy: float | None = None,
    target: Target = "gradient",
    examples: int | None = None,
    workspace: int | None = None,
    decay: ScalarOrSchedule = 0.95,
    refresh_every: int | Array = 100,
    kl_clip: Scalar | None = None,
    momentum: Scalar | Quadratic | Literal["spring"] | None = 0.9,
    spring_weight: Scalar = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TENGraD with heavy-ball momentum and decoupled weight decay.

    The defaults are those of the authors' scripts (Fashion-MNIST: learning rate 0.003, batches of 128), which also have
    `kl_clip=1e-2`, outside of which their dampings of 0.1 to 0.3 stand for shorter steps.

    Args:
        learning_rate: step size, its schedule, or "quadratic": what minimises the quadratic model (`controlled`); let
            `momentum` then be "quadratic", too, "spring" or None.
        layers: from `capture.layers`.
        damping: see `scale_by_tengrad`; or `adaptive_damping(...)`, beside frequent refreshes.
        blocks: see `scale_by_tengrad`.
        sharing: see `scale_by_tengrad`.
        energy: see `scale_by_tengrad`.
        target: see `scale_by_tengrad`.
        examples: see `scale_by_tengrad`.
        workspace: see `scale_by_tengrad`.
        decay: see `scale_by_tengrad`.
        refresh_every: see `scale_by_tengrad`.
        kl_clip: bound of `clip_by_kl` on how far a step may move the model; None for none.
        momentum: weight of the old direction, "quadratic", or "spring" for that of `spring`, which is best with
            `refresh_every=1` and a damping that is not adaptive; None for none.
        spring_weight: weight of the last direction in `momentum="spring"`.
        weight_decay: strength, an l2 penalty of the loss if the step is controlled; None for none, else `update` needs
            `params`.
        weight_decay_mask: which parameters decay, as `optax.add_decayed_weights` takes it.

    Returns:
        A complete optimizer; `update` needs `curvature`.

    Raises:
        ValueError: if a word is unknown, or a number out of its range.
    """
    direction = scale_by_tengrad(
        layers,
        damping=damping,
        blocks=blocks,
        sharing=sharing,
        energy=energy,
        target=target,
        examples=examples,
        workspace=workspace,
        decay=decay,
        refresh_every=refresh_every,
    )
    if isinstance(momentum, str) and momentum == "spring":
        if isinstance(damping, AdaptiveDamping):
            raise ValueError(
                'The damping is adaptive, but with `momentum="spring"` it also says how strongly the last direction '
                "pulls, which the model that it adapts to knows nothing of; give `damping` a number or a schedule, or "
                'take `momentum="quadratic"`.'
            )
        direction, momentum = spring(direction, damping, spring_weight), None
    return complete(direction, learning_rate, damping, kl_clip, momentum, weight_decay, weight_decay_mask)
