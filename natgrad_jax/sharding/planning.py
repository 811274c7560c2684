"""What a method costs on several devices, before anything runs: flops, bytes sent, bytes held, for each policy.

What is done of a layer is said in `recipes`. Bytes sent are those that leave one device on a ring of D: (D - 1) / D of
an array that is gathered or scattered, twice that of one that is summed. The forward and backward pass of the model and
the sum of its gradient come on top, as with any other optimizer; so does a backward pass for each draw of labels at a
step with statistics, and at a refresh that measures a batch. With the state cut by layer a step is that of
`share_gradients`: to scatter the gradient and to gather the direction is as much as that sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, get_args

import jax
from jax.sharding import AbstractMesh, Mesh

from natgrad_jax import checks, report
from natgrad_jax.algebra.truncated import Kept, Rank
from natgrad_jax.base import Layers
from natgrad_jax.lift.shares import shares
from natgrad_jax.sharding.places import Policy, axes_of, axis_cut
from natgrad_jax.sharding.recipes import Case, Costs, Pair, Planned, Recipe, held, recipe, ring

_POLICIES: dict[str, tuple[Policy, bool]] = {
    "replicated": ("replicated", False),
    "replicated, shared": ("replicated", True),
    "layer, shared": ("layer", True),
    "factor": ("factor", False),
    "examples, shared": ("examples", True),
}


class Cost(NamedTuple):
    """What one policy costs a device.

    Attributes:
        policy: of the state, and whether refreshes are shared.
        state: bytes held, of statistics and inverses.
        statistics: flops and bytes sent at a step with statistics.
        refresh: the same of a refresh; of the device that has the most to do.
        step: the same of every step.
    """

    policy: str
    state: float
    statistics: tuple[float, float]
    refresh: tuple[float, float]
    step: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """What each policy costs; `print(plan)` is a table.

    Attributes:
        costs: of each policy.
        devices: how many.
        batch: examples of all of them.
    """

    costs: tuple[Cost, ...]
    devices: int
    batch: int

    def __getitem__(self, policy: str) -> Cost:
        return {cost.policy: cost for cost in self.costs}[policy]

    def __str__(self) -> str:
        head = ("policy", "state", "statistics", "sent", "refresh", "sent", "step", "sent")
        rows: list[tuple[str, ...]] = [head]
        for cost in self.costs:
            pairs = (each for pair in (cost.statistics, cost.refresh, cost.step) for each in (_flops(pair[0]), pair[1]))
            cells = (each if isinstance(each, str) else report.bytes_shown(each) for each in pairs)
            rows.append((cost.policy, report.bytes_shown(cost.state), *cells))
        told = f"(one of {self.devices} devices, {self.batch} examples on all of them; flops, and bytes that leave it)"
        return "\n".join([*report.aligned(rows), told])


def plan(
    layers: Layers,
    mesh: Mesh | AbstractMesh,
    batch: int,
    *,
    method: Planned = "kfac",
    rank: Rank | str | None = None,
    max_factor_dim: int | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> Plan:
    """What a method costs on the devices of a mesh, for each policy of `state_specs` and `share_refreshes`.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    >>> layers = watched.layers({"w": jnp.ones((8, 4))}, jnp.ones((8, 8)))
    >>> found = plan(layers, jax.sharding.AbstractMesh((4,), ("data",)), batch=64)
    >>> found["replicated"].state, found["factor"].state
    (648.0, 168.0)

    Args:
        layers: what `capture.layers` returns. Those of a model that does not fit here: of shapes, as
            `capture.layers(jax.eval_shape(init), x)` gives them.
        mesh: the devices, or an `AbstractMesh` of devices that are not here. The batch is spread over all of them.
        batch: examples of all devices.
        method: "kfac", "ekfac", "shampoo", "soap" or "tengrad", with its default settings. Norms and parameters of no
            layer are left out.
        rank: as `kfac` takes it; TENGraD has none.
        max_factor_dim: as `kfac` takes it.
        axis: the axis of the mesh, or several, along which state and refreshes are shared; all of them if None.

    Returns:
        The plan. "layer" cuts the stacks of scanned layers that the devices divide; other layers are held whole. Of
        "factor" that of K-FAC alone is planned, and of TENGraD the policy "examples".

    Raises:
        TypeError: if `layers` or `mesh` is of another type.
        ValueError: if the batch is no whole number, the mesh has no such axis, or the method is unknown.
    """
    checks.layers(layers)
    checks.size("batch", batch)
    checks.choice("method", method, get_args(Planned))
    if max_factor_dim is not None:
        checks.size("max_factor_dim", max_factor_dim, least=0)
    if rank not in (None, "auto"):
        checks.rank("rank", rank)
    axes, draws = axes_of(mesh, axis, (Mesh, AbstractMesh)), max(1, layers.draws)
    sharing = prod(mesh.shape[each] for each in axes)
    how = recipe(method, Kept(max_factor_dim, rank), batch, draws)
    pairs = {layer.name: jax.eval_shape(lambda layer=layer: how.pair(layer)) for layer in layers.known}
    costs = []
    for name in how.policies:
        case = Case(batch, draws, mesh.size, sharing, *_POLICIES[name])
        state = sum(held(layer, pairs[layer.name], case) for layer in layers.known)
        statistics, measured, step = (
            _summed(of(layer, case) for layer in layers.known) for of in (how.statistics, how.measured, how.step)
        )
        refresh = _summed((measured, _refresh(layers, pairs, how, case)))
        costs.append(Cost(name, state, statistics, refresh, step))
    return Plan(tuple(costs), mesh.size, batch)


def _summed(found: Iterable[Costs]) -> Costs:
    flops, sent = zip((0.0, 0.0), *found, strict=True)
    return sum(flops), sum(sent)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _refresh(layers: Layers, pairs: dict[str, Pair], how: Recipe, case: Case) -> Costs:
    """Flops and bytes of the device that has the most to do."""
    if not case.shared or case.policy == "examples":
        cut = [
            leaf.size * leaf.dtype.itemsize
            for layer in layers.known
            for leaf in _leaves(pairs[layer.name][0])
            if leaf.ndim > len(layer.stack) + 1
            and axis_cut(leaf.shape, len(layer.stack), case.policy, case.sharing) is not None
        ]
        return sum(how.refresh(layer, pairs[layer.name]) for layer in layers.known), ring(sum(cut), case.sharing)
    found = shares(layers.known, pairs, case.sharing, case.policy == "layer")
    own = sum(how.refresh(layer, pairs[layer.name]) for layer in found.cut) / case.sharing
    each, sizes = [], []
    for group in found.groups:
        name, place = group.copies[0]
        pair = pairs[name]
        if place is not None:
            pair = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), pair)
        each.append(how.refresh(group.layer, pair))
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(pair[1])))

    def most(numbers):
        return max(float(sum(len(n) * x for n, x in zip(each, numbers, strict=True))) for each in found.chosen)

    return own + most(each), (case.sharing - 1) * most(sizes)


def _flops(count: float) -> str:
    """A number of operations for reading."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}flop"
        count /= 1000
    return f"{count:.3g} Pflop"
