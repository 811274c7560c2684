"""What a method keeps and does of one layer on several devices: flops, bytes sent, shapes.

    kfac       statistics 2 R n^2 a side; refresh Cholesky, triangular inverse, product; step 2 n m (n + m)
    ekfac      statistics as K-FAC; refresh 9 n^3 a side, then the rows turned, 2 R n^2 a side, and their squares,
               2 R n m; step 4 n m (n + m)
    shampoo    statistics 2 n m (n + m) of the gradient; refresh 9 n^3 and a product 2 n^3 a side; step 2 n m (n + m)
    soap       statistics as Shampoo; refresh the first one: 9 n^3 a side, a product 2 n^3 that turns the scale, and
               2 n m (n + m); step 6 n m (n + m), with its squares at every step
    tengrad    refresh 2 R^2 (n + m) for the kernel, R^3 / 3; step 4 R n m + 4 R m + 2 R^2

for a matrix n x m of the gradient and R rows. A later refresh of SOAP, by one step of iteration, takes less. Not here:
the eigenvalues that TENGraD falls back to where Cholesky fails.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import jax

from natgrad_jax.algebra import averages
from natgrad_jax.algebra.devices import exchange
from natgrad_jax.algebra.eigenbasis import columns
from natgrad_jax.algebra.stacks import inverse_flops
from natgrad_jax.algebra.truncated import Kept, by_products, coordinates
from natgrad_jax.base import Layer
from natgrad_jax.blocks import kronecker, rotated, samples, tensor
from natgrad_jax.sharding.places import Policy, axis_cut

Pair = tuple[Any, Any]
Costs = tuple[float, float]
Planned = Literal["kfac", "ekfac", "shampoo", "soap", "tengrad"]
_EIGH = 9.0
"""Flops of an eigendecomposition over n^3: reduction, divide and conquer, back transformation."""


class Case(NamedTuple):
    """A policy on a mesh.

    Attributes:
        batch: examples of all devices.
        draws: of labels.
        devices: how many.
        sharing: how many share state and refreshes.
        policy: of the state.
        shared: whether refreshes and sums are shared.
    """

    batch: int
    draws: int
    devices: int
    sharing: int
    policy: Policy
    shared: bool

    def cuts(self, layer: Layer) -> bool:
        """Whether each device has its part of the stack of a layer."""
        return axis_cut(layer.stack[:1], 1, self.policy, self.sharing) is not None if layer.stack else False

    def scatters(self, layer: Layer) -> bool:
        """Whether sums over examples are scattered over the stack of a layer."""
        return self.shared and self.policy == "layer" and self.cuts(layer) and self.batch % self.devices == 0


class Recipe(NamedTuple):
    """A method.

    Attributes:
        pair: layer -> statistics and operator, as `jax.eval_shape` takes it.
        statistics: layer, case -> flops and bytes.
        refresh: layer, pair -> flops of all copies, without what is measured for it.
        measured: layer, case -> flops and bytes of what a batch is measured for at a refresh.
        step: layer, case -> flops, and bytes beside the sum of the gradient.
        policies: names of those that are planned.
    """

    pair: Callable[[Layer], Pair]
    statistics: Callable[[Layer, Case], Costs]
    refresh: Callable[[Layer, Pair], float]
    measured: Callable[[Layer, Case], Costs]
    step: Callable[[Layer, Case], Costs]
    policies: tuple[str, ...]


_SHARED = ("replicated", "replicated, shared", "layer, shared")


def recipe(method: Planned, kept: Kept, examples: int, draws: int) -> Recipe:
    """The recipe of a method.

    Args:
        method: its name.
        kept: what its sides keep.
        examples: N of all devices.
        draws: K.

    Returns:
        The recipe.
    """
    if method == "kfac":
        return Recipe(
            lambda layer: (kronecker.empty(layer, kept), kronecker.identity(layer, kept, "pi")),
            partial(_of_factors, kept=kept),
            lambda layer, pair: _of_sides(layer, pair, inverse_flops),
            _nothing,
            partial(_of_products, kept=kept, times=1),
            (*_SHARED, "factor"),
        )
    if method == "ekfac":
        return Recipe(
            lambda layer: (kronecker.empty(layer, kept), rotated.identity(layer, kept, "exact")),
            partial(_of_factors, kept=kept),
            lambda layer, pair: _of_sides(layer, pair, lambda size: _EIGH * size**3),
            partial(_of_squares, kept=kept),
            partial(_of_products, kept=kept, times=2),
            _SHARED,
        )
    if method == "shampoo":
        return Recipe(
            lambda layer: _arrays(layer, lambda one: (tensor.empty(one, kept), tensor.identities(one, kept))),
            partial(_of_gradient, kept=kept),
            lambda layer, pair: _of_sides(layer, pair, lambda size: (_EIGH + 2) * size**3),
            _nothing,
            partial(_of_products, kept=kept, times=1, vectors=True),
            _SHARED,
        )
    if method == "soap":
        return Recipe(
            lambda layer: _arrays(layer, partial(_turned, kept=kept)),
            partial(_of_gradient, kept=kept, vectors=False),
            partial(_of_turns, kept=kept),
            _nothing,
            partial(_of_products, kept=kept, times=3),
            _SHARED,
        )
    return Recipe(
        lambda layer: _of_rows(layer, examples, draws),
        _nothing,
        lambda layer, pair: 0.0,
        _of_kernel,
        _of_solves,
        ("examples, shared",),
    )


def held(layer: Layer, pair: Pair, case: Case) -> float:
    """Bytes of statistics and operators on one device."""

    def of(leaf):
        whole = leaf.size * leaf.dtype.itemsize
        return (
            whole if axis_cut(leaf.shape, len(layer.stack), case.policy, case.sharing) is None else whole / case.sharing
        )

    rows = [node for node in jax.tree.leaves(pair, is_leaf=_are_rows) if _are_rows(node)]
    spread = sum(leaf.size * leaf.dtype.itemsize for node in rows for leaf in jax.tree.leaves(node))
    whole = float(sum(map(of, jax.tree.leaves(pair))))
    return (
        whole - spread * (1 - 1 / case.sharing)
        if case.policy == "examples" and case.batch % case.sharing == 0
        else whole
    )


def ring(size: float, devices: int, times: int = 1) -> float:
    """Bytes that leave a device for an array of so many that is gathered; twice for a sum."""
    return times * size * (devices - 1) / devices


def _are_rows(node: Any) -> bool:
    return isinstance(node, samples.Rows | samples.Gradients)


def _width(layer: Layer) -> int:
    """Bytes of a number."""
    return 8 if layer.dtype == "float64" else 4


def _nothing(layer: Layer, case: Case) -> Costs:
    del layer, case
    return 0.0, 0.0


def _sides(layer: Layer, kept: Kept) -> list[tuple[int, int, bool]]:
    """Of either side its size, that of the other, and whether it is a diagonal."""
    rows, cols = layer.shape
    return [(rows, cols, layer.one_hot or kept.diagonal(rows)), (cols, rows, kept.diagonal(cols))]


def _sent(layer: Layer, size: float, case: Case, scattered: bool, half: float | None = None) -> float:
    """Bytes of a sum of `size` numbers a copy, which are `half` as many where it is shared.

    Where it is scattered, the devices along axes that do not share have a part left to sum.
    """
    bytes_of = prod(layer.stack) * _width(layer)
    if half is None:
        return ring(bytes_of * size, case.devices, 2)
    if not scattered:
        return ring(bytes_of * half, case.devices, 2)
    rest = bytes_of * half / case.sharing
    return ring(bytes_of * half, case.sharing) + ring(rest, case.devices // case.sharing, 2)


def _of_factors(layer: Layer, case: Case, kept: Kept) -> Costs:
    """Both factors of all copies, from the rows of the examples of one device; a half of each where it is shared."""
    flops, sent, half = 0.0, 0.0, 0.0
    shared = case.shared and kept.rank is None and case.batch % case.devices == 0
    for (size, _, diagonal), draws in zip(_sides(layer, kept), (1, case.draws), strict=True):
        count, rank = draws * case.batch * layer.positions, kept.vectors(size)
        here = count / case.devices
        if diagonal:
            flops, sent, half = flops + 2 * here * size, sent + size, half + size
        elif rank is None:
            flops, sent, half = flops + 2 * here * size**2, sent + size**2, half + size * (size // 2 + 1)
        else:
            few = by_products(count, size, rank)
            products = 8 * here * size * rank if few else 2 * here * size**2 + 4 * size**2 * rank
            own = (8 + 8 / 3 + 2 + 2) * size * rank**2 + 9 * rank**3  # old average, Q, inner products, turn; r x r
            flops, sent = flops + products + own, sent + (2 * size * rank if few else size**2)
    return prod(layer.stack) * flops, _sent(layer, sent, case, case.scatters(layer), half if shared else None)


def _of_sides(layer: Layer, pair: Pair, of: Callable[[int], float]) -> float:
    """Flops of what is done to each factor that is whole."""
    lead = len(layer.stack)
    sides = [leaf.shape[lead:] for leaf in jax.tree.leaves(pair[0])]
    return prod(layer.stack) * sum(of(side[0]) for side in sides if len(side) == 2 and side[0] == side[1])


def _of_squares(layer: Layer, case: Case, kept: Kept) -> Costs:
    """The squared gradients of examples in the basis: rows turned, squares multiplied, or the gradients formed."""
    rows, cols = layer.shape
    count, positions = case.batch / case.devices, layer.positions
    turned = [2 * size * (kept.vectors(size) or size) * (not diagonal) for size, _, diagonal in _sides(layer, kept)]
    flops = count * positions * (turned[0] + case.draws * turned[1]) + 2 * case.draws * count * positions * rows * cols
    scattered = case.scatters(layer)
    basis = sum(size * (kept.vectors(size) or size) for size, _, diagonal in _sides(layer, kept) if not diagonal)
    to_all = ring(prod(layer.stack) * _width(layer) * basis, case.sharing) if scattered else 0.0  # of all copies
    return prod(layer.stack) * flops, to_all + _sent(
        layer, rows * cols, case, scattered, rows * cols if case.shared else None
    )


def _arrays(layer: Layer, of: Callable[[Layer], Pair]) -> Pair:
    """What a method of tensors keeps of the kernel, and of the bias if there is one."""
    found = of(_matrix(layer))
    if not layer.has_bias:
        return found
    return tuple((one, other) for one, other in zip(found, of(_matrix(layer, bias=True)), strict=True))  # pyrefly: ignore


def _matrix(layer: Layer, bias: bool = False) -> Layer:
    """The kernel of a layer without its bias, or the bias, as a tensor."""
    shape = layer.shape[1:] if bias else (layer.shape[0] - layer.has_bias, layer.shape[1])
    return Layer(layer.name, "tensor", shape, (), layer.stack, layer.dtype)


def _turned(one: Layer, kept: Kept) -> Pair:
    """What SOAP keeps of a tensor: vectors have no basis."""
    kept = kept if len(one.shape) > 1 else kept._replace(most=0)
    basis = tuple(map(columns, tensor.identities(one, kept)))
    shape = tuple(map(coordinates, basis, one.shape))
    return tensor.empty(one, kept), (basis, averages.empty(one.stack, shape, one.dtype))


def _modes(layer: Layer, kept: Kept) -> float:
    """Flops of a product of the kernel's gradient with a matrix in each mode that has one."""
    rows, cols = _matrix(layer).shape
    sides = ((rows, rows * cols), (cols, rows * cols))
    return sum(2 * (kept.vectors(size) or size) * entries * (not kept.diagonal(size)) for size, entries in sides)


def _of_gradient(layer: Layer, case: Case, kept: Kept, vectors: bool = True) -> Costs:
    """The moments of the gradient in every mode, which every device has; of its copies where the state is cut."""
    bias = 2 * layer.shape[1] ** 2 if layer.has_bias and vectors and not kept.diagonal(layer.shape[1]) else 0
    flops = prod(layer.stack) * (_modes(layer, kept) + bias)
    return flops / case.sharing if case.cuts(layer) else flops, 0.0


def _of_turns(layer: Layer, pair: Pair, kept: Kept) -> float:
    """The first refresh of SOAP: eigenvectors, the turn of each, and the scale in them."""
    eigen = _of_sides(layer, pair, lambda size: (_EIGH + 2) * size**3)
    return eigen + prod(layer.stack) * _modes(layer, kept)


def _of_products(layer: Layer, case: Case, kept: Kept, times: int, vectors: bool = False) -> Costs:
    """Products of the gradient with a matrix on either side, so many times."""
    rows, cols = layer.shape
    flops = 0.0
    for size, other, diagonal in _sides(layer, kept):
        rank = kept.vectors(size)
        flops += 0 if diagonal else times * (2 * size if rank is None else 4 * rank) * size * other
    flops += 2 * cols**2 if vectors and layer.has_bias else 0
    copies = prod(layer.stack)
    flops, size, sharing = copies * flops, copies * rows * cols * _width(layer), case.sharing
    if case.cuts(layer):  # each device has the direction of its copies; scattered, its gradient is a sum as before
        return flops / sharing, ring(size, sharing) if case.policy == "factor" else 0.0
    if case.policy != "factor":
        return flops, 0.0
    cut = [not diagonal and n % sharing == 0 for n, _, diagonal in _sides(layer, kept)]
    last = copies * _width(layer) * cols * (kept.vectors(cols) or cols)
    sent = ring(size, sharing) * cut[0] + ring(last, sharing) * cut[1]  # rows of the direction; the inverse behind it
    return flops / sharing if cut[0] else flops, sent


def _of_rows(layer: Layer, examples: int, draws: int) -> Pair:
    """The rows of a batch, the factor of their kernel, and the damping of each copy."""
    return (), (
        samples.empty(layer, examples, draws, "example"),
        jax.numpy.zeros((*layer.stack, draws * examples, draws * examples), layer.dtype),
        jax.numpy.zeros(layer.stack, layer.dtype),
    )


def _row_sizes(layer: Layer, case: Case) -> tuple[float, int, bool]:
    """Numbers of the rows of a copy, R, and whether gradients are kept in their place."""
    by_rows, by_gradients = layer.sample_sizes(case.batch, case.draws)
    copies = prod(layer.stack)
    return min(by_rows, by_gradients) / copies, case.draws * case.batch, by_gradients < by_rows


def _of_kernel(layer: Layer, case: Case) -> Costs:
    """The blocks of a device, the exchange of rows, and the Cholesky factor that every device makes."""
    numbers, rows, gradients = _row_sizes(layer, case)
    (n, m), positions, copies, width = layer.shape, layer.positions, prod(layer.stack), _width(layer)
    blocks, mine = case.sharing // 2 + 1, rows / case.sharing
    if gradients:
        product = 2 * mine**2 * n * m
    else:
        examples = case.batch / case.sharing
        gram = 2 * (examples * positions) ** 2 * (n + case.draws**2 * m + case.draws**2)
        formed = 2 * mine * positions * n * m + 2 * mine**2 * n * m
        product = min(gram, formed + (2 * mine * positions * n * m))
    size = copies * width * numbers
    if exchange(size, case.sharing) == "ring":
        sent = case.sharing // 2 * size / case.sharing
    else:
        sent = ring(size, case.sharing)
    return copies * (blocks * product + rows**3 / 3), sent + ring(copies * width * blocks * rows * mine, case.sharing)


def _of_solves(layer: Layer, case: Case) -> Costs:
    """J v and J^T w of the rows that are here, the solve between, and the sum of the direction."""
    _, rows, gradients = _row_sizes(layer, case)
    (n, m), copies, width = layer.shape, prod(layer.stack), _width(layer)
    here = case.batch / case.sharing
    products = 4 * n * m * here * (case.draws if gradients else layer.positions)
    products += 0 if gradients else 2 * case.draws * here * layer.positions * m
    sent = ring(copies * width * rows, case.sharing) + ring(copies * width * n * m, case.sharing, 2)
    return copies * (products + 2 * rows**2), sent
