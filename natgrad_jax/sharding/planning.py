"""What K-FAC costs on several devices, before anything runs: flops, bytes sent, bytes held, for each policy.

    statistics   2 R n^2 for each factor of size n from R rows, spread as the examples are; then one sum over devices,
                 of a half of the entries where devices share, scattered where the state is cut by layer
    refresh      Cholesky, triangular inverse and product for each factor; of a truncated one nothing
    step         2 n m (n + m) for each matrix n x m of the gradient
    state        a factor and its inverse for each side

Bytes sent are those that leave one device on a ring of D: (D - 1) / D of an array that is gathered or scattered, twice
that of one that is summed. The forward and backward pass of the model and the sum of its gradient come on top, as with
any other optimizer; so does a backward pass for each draw of labels at a step with statistics. With the state cut by
layer a step is that of `share_gradients`: to scatter the gradient and to gather the direction is as much as that sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from natgrad_jax import checks, report
from natgrad_jax.algebra.stacks import inverse_flops
from natgrad_jax.algebra.truncated import Kept, Rank, by_products
from natgrad_jax.base import Layer, Layers
from natgrad_jax.blocks import kronecker
from natgrad_jax.lift.shares import shares
from natgrad_jax.sharding.places import Policy, axes_of, axis_cut

Pair = tuple[Any, Any]
_POLICIES: tuple[tuple[str, Policy, bool], ...] = (
    ("replicated", "replicated", False),
    ("replicated, shared", "replicated", True),
    ("layer, shared", "layer", True),
    ("factor", "factor", False),
)


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
    rank: Rank | str | None = None,
    max_factor_dim: int | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> Plan:
    """What K-FAC costs on the devices of a mesh, for each policy of `state_specs` and `share_refreshes`.

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
        rank: as `kfac` takes it.
        max_factor_dim: as `kfac` takes it.
        axis: the axis of the mesh, or several, along which state and refreshes are shared; all of them if None.

    Returns:
        The plan. "layer" cuts the stacks of scanned layers that the devices divide; other layers are held whole.

    Raises:
        TypeError: if `layers` or `mesh` is of another type.
        ValueError: if the batch is no whole number, or the mesh has no such axis.
    """
    checks.layers(layers)
    checks.size("batch", batch)
    if max_factor_dim is not None:
        checks.size("max_factor_dim", max_factor_dim, least=0)
    if rank not in (None, "auto"):
        checks.rank("rank", rank)
    axes = axes_of(mesh, axis, (Mesh, AbstractMesh))
    devices, kept = _Devices(mesh.size, prod(mesh.shape[each] for each in axes)), Kept(max_factor_dim, rank)
    pairs = {}
    for layer in layers.known:
        of = jax.eval_shape(lambda layer=layer: (kronecker.empty(layer, kept), kronecker.identity(layer, kept, "pi")))
        pairs[layer.name] = of
    costs = []
    for name, policy, shared in _POLICIES:
        examples, cut = (batch, max(1, layers.draws)), policy == "layer"
        statistics = _summed(
            layers, partial(_statistics, kept=kept, examples=examples, devices=devices, shared=shared, cut=cut)
        )
        state = sum(_held(layer, pairs[layer.name], policy, devices.sharing) for layer in layers.known)
        refresh = _refresh(layers, pairs, policy, shared, devices)
        step = _summed(layers, partial(_step, kept=kept, policy=policy, devices=devices))
        costs.append(Cost(name, state, statistics, refresh, step))
    return Plan(tuple(costs), mesh.size, batch)


class _Devices(NamedTuple):
    """How many there are, and how many share state and refreshes."""

    all: int
    sharing: int


def _summed(layers: Layers, of: Callable[[Layer], tuple[float, float]]) -> tuple[float, float]:
    found = [of(layer) for layer in layers.known]
    return sum(flops for flops, _ in found), sum(sent for _, sent in found)


def _ring(size: float, devices: int, times: int = 1) -> float:
    """Bytes that leave a device for an array of so many that is gathered; twice for a sum."""
    return times * size * (devices - 1) / devices


def _width(layer: Layer) -> int:
    """Bytes of a number."""
    return 8 if layer.dtype == "float64" else 4


def _statistics(
    layer: Layer, kept: Kept, examples: tuple[int, int], devices: _Devices, shared: bool, cut: bool
) -> tuple[float, float]:
    """Flops and bytes of both factors of all copies, from the rows of the examples of one device."""
    (batch, draws), flops, sent = examples, 0.0, 0.0
    rows, shared = batch * layer.positions, shared and kept.rank is None and batch % devices.sharing == 0
    scattered = shared and cut and bool(layer.stack) and layer.stack[0] % devices.sharing == 0
    for size, count, one_hot in ((layer.shape[0], rows, layer.one_hot), (layer.shape[1], draws * rows, False)):
        here, rank = count / devices.all, kept.vectors(size)
        if one_hot or kept.diagonal(size):
            flops, sent = flops + 2 * here * size, sent + size
        elif rank is None:
            flops, sent = flops + 2 * here * size**2, sent + size * (size // 2 + 1 if shared else size)
        else:
            few = by_products(count, size, rank)
            products = 8 * here * size * rank if few else 2 * here * size**2 + 4 * size**2 * rank
            own = (8 + 8 / 3 + 2 + 2) * size * rank**2 + 9 * rank**3  # old average, Q, inner products, turn; r x r
            flops, sent = flops + products + own, sent + (2 * size * rank if few else size**2)
    copies = prod(layer.stack)
    return copies * flops, _ring(copies * _width(layer) * sent, devices.all, 1 if scattered else 2)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _held(layer: Layer, pair: Pair, policy: Policy, devices: int) -> float:
    """Bytes of statistics and inverses on one device."""

    def held(leaf):
        whole = leaf.size * leaf.dtype.itemsize
        return whole if axis_cut(leaf.shape, len(layer.stack), policy, devices) is None else whole / devices

    return float(sum(map(held, _leaves(pair))))


def _inverses(layer: Layer, pair: Pair) -> float:
    """Flops of the inverses of all factors that are whole."""
    lead, (statistics, _) = len(layer.stack), pair
    sides = [leaf.shape[lead:] for leaf in _leaves(statistics)]
    return prod(layer.stack) * sum(inverse_flops(side[0]) for side in sides if len(side) == 2 and side[0] == side[1])


def _refresh(
    layers: Layers, pairs: dict[str, Pair], policy: Policy, shared: bool, devices: _Devices
) -> tuple[float, float]:
    """Flops and bytes of the device that has the most to do."""
    if not shared:
        cut = [
            leaf.size * leaf.dtype.itemsize
            for layer in layers.known
            for leaf in _leaves(pairs[layer.name][0])
            if leaf.ndim > len(layer.stack) + 1
            and axis_cut(leaf.shape, len(layer.stack), policy, devices.sharing) is not None
        ]
        flops = sum(_inverses(layer, pairs[layer.name]) for layer in layers.known)
        return flops, _ring(sum(cut), devices.sharing)
    found = shares(layers.known, pairs, devices.sharing, policy == "layer")
    own = sum(_inverses(layer, pairs[layer.name]) for layer in found.cut) / devices.sharing
    each, sizes = [], []
    for group in found.groups:
        name, place = group.copies[0]
        pair = pairs[name]
        if place is not None:
            pair = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), pair)
        each.append(_inverses(group.layer, pair))
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(pair[1])))

    def most(numbers):
        return max(float(sum(len(n) * x for n, x in zip(each, numbers, strict=True))) for each in found.chosen)

    return own + most(each), (devices.sharing - 1) * most(sizes)


def _step(layer: Layer, kept: Kept, policy: Policy, devices: _Devices) -> tuple[float, float]:
    """Flops and bytes of the product of both inverses with the gradient."""
    rows, columns = layer.shape
    flops = 0.0
    for size, other, one_hot in ((rows, columns, layer.one_hot), (columns, rows, False)):
        rank = kept.vectors(size)
        diagonal = one_hot or kept.diagonal(size)
        flops += 0 if diagonal else (2 * size if rank is None else 4 * rank) * size * other
    copies, width = prod(layer.stack), _width(layer)
    flops, size, sharing = copies * flops, copies * rows * columns * width, devices.sharing
    if policy in ("layer", "factor") and layer.stack and layer.stack[0] % sharing == 0:
        return flops / sharing, _ring(size, sharing) if policy == "factor" else 0.0  # each has that of its copies
    if policy != "factor":
        return flops, 0.0
    whole = [not diagonal for diagonal in (layer.one_hot or kept.diagonal(rows), kept.diagonal(columns))]
    cut = [full and n % sharing == 0 for full, n in zip(whole, layer.shape, strict=True)]
    last = copies * width * columns * (kept.vectors(columns) or columns)
    sent = _ring(size, sharing) * cut[0] + _ring(last, sharing) * cut[1]  # rows of the direction; the inverse behind it
    return flops / sharing if cut[0] else flops, sent


def _flops(count: float) -> str:
    """A number of operations for reading."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}flop"
        count /= 1000
    return f"{count:.3g} Pflop"
