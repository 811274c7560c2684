"""The kernel of examples that live on several devices, N / D of them on each of D.

    1  K_dd <- J_d J_d^T                                 the own block, of R / D rows
    2  K_de <- J_d J_e^T, e the next floor(D / 2)        each pair of devices once, by the symmetry of K
    3  K    <- the blocks of all devices                 one all-gather of R^2 / 2 numbers and a little

The rows of the others come in one of two ways. "gather": all rows in one all-gather. "ring": each device hands the rows
that it has to the one before, floor(D / 2) times, and has 2 / D of the rows at a time. `algebra.devices.exchange`
chooses. What is applied afterwards needs no row of another device: J v and J^T w are sums over examples.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from natgrad_jax.algebra.devices import Devices, Exchange, exchange
from natgrad_jax.base import Array, Layer
from natgrad_jax.blocks import samples
from natgrad_jax.blocks.samples import Gradients, Jacobian, Rows


def kernel(layer: Layer, jacobian: Jacobian, workspace: int, by: Exchange | None = None) -> Array:
    """J J^T, by the devices of the layer if these keep the rows of their examples.

    Args:
        layer: with its devices, or without.
        jacobian: J.
        workspace: as `samples.kernel` takes it; gathered rows may take as much.
        by: how rows are exchanged; what `exchange` says if None.

    Returns:
        [S, R, R], on every device.
    """
    devices = layer.devices
    if not is_spread(layer, jacobian):
        return samples.kernel(jacobian, workspace)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jacobian))
    by = by or ("ring" if size > workspace else exchange(size, devices.count))
    stack, draws, examples = _sizes(jacobian)
    mine = examples // devices.count

    def on_one_device(own):
        blocks = (_by_gather if by == "gather" else _by_ring)(own, devices, workspace)
        found = lax.all_gather(blocks, devices.axes)  # 3
        return found.reshape(devices.count, -1, prod(stack), draws, mine, draws, mine)

    found = devices.each(on_one_device, (places(jacobian, devices),), PartitionSpec())(jacobian)
    return _assembled(found).reshape(*stack, draws * examples, draws * examples)


def is_spread(layer: Layer, jacobian: Jacobian) -> bool:
    """Whether each device of a layer keeps the rows of as many examples."""
    devices = layer.devices
    return devices is not None and devices.rows and _sizes(jacobian)[2] % devices.count == 0


def places(jacobian: Jacobian, devices: Devices) -> Any:
    """Where the arrays of a Jacobian go if each device keeps the rows of its examples: a tree of `PartitionSpec`."""

    def of(tree, axis):
        return jax.tree.map(lambda _: PartitionSpec(*(None,) * axis, devices.axes), tree)

    if isinstance(jacobian, Gradients):
        return Gradients(of(jacobian.values, jacobian.values.ndim - 3))
    axis = jacobian.outputs.ndim - 3
    return Rows(of(jacobian.inputs, axis - 1), of(jacobian.outputs, axis))


def are_rows(node: Any) -> bool:
    """Whether a part of a state is a Jacobian."""
    return isinstance(node, Rows | Gradients)


def placed(jacobian: Jacobian, devices: Devices) -> Any:
    """The arrays of a Jacobian on the devices of their examples, on every device if these do not divide them."""
    divided = _sizes(jacobian)[2] % devices.count == 0

    def place(spec):
        return NamedSharding(devices.mesh, spec if divided else PartitionSpec())

    return jax.tree.map(place, places(jacobian, devices), is_leaf=lambda node: isinstance(node, PartitionSpec))


def _sizes(jacobian: Jacobian) -> tuple[tuple[int, ...], int, int]:
    """S, K and N."""
    shape = (jacobian.values if isinstance(jacobian, Gradients) else jacobian.outputs).shape
    return shape[:-4], shape[-4], shape[-3]


def _by_gather(own: Jacobian, devices: Devices, workspace: int) -> Array:
    """The blocks of one device [floor(D / 2) + 1, S, R / D, R / D] from the rows of all."""
    everyone = jax.tree.map(lambda leaf: lax.all_gather(leaf, devices.axes), own)
    here, count = lax.axis_index(devices.axes), devices.count

    def block(step):
        place = (here + step) % count
        return samples.cross(own, jax.tree.map(lambda leaf: leaf[place], everyone), workspace)

    return jnp.concatenate([samples.kernel(own, workspace)[None], lax.map(block, jnp.arange(1, count // 2 + 1))])


def _by_ring(own: Jacobian, devices: Devices, workspace: int) -> Array:
    """The same from the rows of one other device at a time."""
    count = devices.count
    handed = [(place, (place - 1) % count) for place in range(count)]

    def step(other, _):
        other = jax.tree.map(lambda leaf: lax.ppermute(leaf, devices.axes, handed), other)
        return other, samples.cross(own, other, workspace)

    _, blocks = lax.scan(step, own, None, length=count // 2)
    return jnp.concatenate([samples.kernel(own, workspace)[None], blocks])


def _assembled(found: Array) -> Array:
    """[D, floor(D / 2) + 1, S, K, n, K, n], the blocks of each device with the next ones -> [S, K, D, n, K, D, n]."""
    count, kept = found.shape[:2]
    rows, columns = jnp.indices((count, count))
    step = (columns - rows) % count
    own = step < kept
    blocks = found[jnp.where(own, rows, columns), jnp.where(own, step, (rows - columns) % count)]  # [D, D, S, ...]
    turned = jnp.moveaxis(blocks, (-2, -1), (-4, -3))
    blocks = jnp.where(own.reshape(count, count, *(1,) * 5), blocks, turned)
    return jnp.transpose(blocks, (2, 3, 0, 4, 5, 1, 6))
