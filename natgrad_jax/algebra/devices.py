"""The devices of a mesh that share a work: each does its part by itself, and sums over examples are scattered.

    1  part <- each device sums over the examples that it has                        no collective
    2  half <- of a symmetric matrix each pair of entries once                       n (n + 2) / 2 numbers of n^2
    3  sum  <- reduce-scatter along the stack, each device keeps its copies          (D - 1) / D of the array
               all-reduce where the devices do not divide the stack                  twice that

The compiler sums on every device and cuts afterwards: on CPUs it makes no reduce-scatter of the two. Here it is said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from natgrad_jax import checks
from natgrad_jax.base import Array

Exchange = Literal["gather", "ring"]
"""How rows come to devices that have others: all at once, or those of one device after another."""


def exchange(size: float, devices: int, latency: float = 1e-5, bandwidth: float = 1e10) -> Exchange:
    """How devices that each have some of the rows of a batch make their kernel.

    A collective takes `latency + bytes that leave a device / bandwidth`. One all-gather of B bytes sends (D - 1) / D B.
    A ring uses the symmetry of the kernel: floor(D / 2) launches, each of B / D. It holds 2 / D of the rows, the
    all-gather all of them. So the all-gather is for few bytes on many devices; the ring also where both are even.

    Args:
        size: B, bytes of the rows of all devices.
        devices: D.
        latency: seconds of a launch.
        bandwidth: bytes that leave a device in a second.

    Returns:
        "gather" or "ring".

    Raises:
        TypeError: if one of them is no number.
        ValueError: if one is negative, there is no device, or nothing leaves one.
    """
    checks.number("size", size, least=0)
    checks.size("devices", devices)
    checks.number("latency", latency, least=0)
    checks.number("bandwidth", bandwidth, least=1)
    gathered = latency + (devices - 1) / devices * size / bandwidth
    handed = devices // 2 * (latency + size / devices / bandwidth)
    return "gather" if gathered < handed else "ring"


@dataclass(frozen=True)
class Devices:
    """Those that share refreshes, and sums over examples.

    Attributes:
        mesh: what they are on.
        axes: the axes of the mesh along which they differ.
        cut: whether each has its part of the stacks that they divide.
        rows: whether each keeps the rows of its examples, where a method keeps rows.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    cut: bool = False
    rows: bool = False

    @cached_property
    def count(self) -> int:
        """How many there are."""
        return prod(self.mesh.shape[axis] for axis in self.axes)

    def divide(self, stack: tuple[int, ...]) -> bool:
        """Whether each has some copies of a stack whole."""
        return self.cut and bool(stack) and stack[0] % self.count == 0

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The other axes of the mesh, along which there are examples, too."""
        return tuple(name for name in self.mesh.axis_names if name not in self.axes)

    def each(self, function: Callable[..., Any], specs: tuple[PartitionSpec, ...], out: Any) -> Callable[..., Any]:
        """A function done on every device by itself, where the mesh is `Auto`, whatever is around."""
        around = jax.sharding.get_abstract_mesh()
        mesh = None
        if around.empty:
            kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
            mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)
        elif missing := set(self.axes) - set(around.axis_names):
            raise ValueError(
                f"The mesh around has axes {list(around.axis_names)} and not {sorted(missing)}, over which work is "
                "shared: give `ng.sharding.share_refreshes` and `share_gradients` the mesh that the batch is on."
            )
        elif by_hand := set(self.axes) & set(around.manual_axes):
            raise ValueError(
                f"The axes {sorted(by_hand)} are manual here, inside of `jax.shard_map` or `jax.pmap`, so that "
                "work cannot be shared over them: leave `ng.sharding.share_refreshes` and `share_gradients` out, or "
                "use `jax.jit`."
            )
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)

    def summed(
        self,
        function: Callable[..., Any],
        values: Sequence[Any],
        places: Sequence[int],
        stack: tuple[int, ...],
        symmetric: bool = False,
    ) -> Any:
        """The sum over all devices of the mesh of a function of the examples that each has.

        Args:
            function: values -> sums over their examples, whose arrays lead with the axes S.
            values: trees of arrays.
            places: along which axis the arrays of each tree have the examples.
            stack: sizes of the axes S.
            symmetric: whether arrays [S, n, n] are symmetric matrices, of which a half is sent.

        Returns:
            What the function gives of all examples. Where the devices divide the stack, each has its copies.
        """
        scattered = self.divide(stack)

        def total(part):
            square = symmetric and part.ndim == len(stack) + 2
            sent = halved(part) if square else part
            if scattered:
                found = jax.lax.psum_scatter(sent, self.axes, scatter_dimension=0, tiled=True)  # 3
                found = jax.lax.psum(found, self.others) if self.others else found
            else:
                found = jax.lax.psum(sent, self.mesh.axis_names)
            return made_whole(found) if square else found

        specs = tuple(PartitionSpec(*(None,) * place, self.mesh.axis_names) for place in places)
        out = PartitionSpec(self.axes) if scattered else PartitionSpec()
        return self.each(lambda *parts: jax.tree.map(total, function(*parts)), specs, out)(*values)


def halved(matrix: Array) -> Array:
    """Each pair of entries of a symmetric matrix once: the entries (i, i + k) with k to n / 2, cyclically.

    Args:
        matrix: [..., n, n].

    Returns:
        [..., n, floor(n / 2) + 1].
    """
    *lead, size, _ = matrix.shape
    flat = jnp.concatenate([matrix, matrix], axis=-1).reshape(*lead, 2 * size**2)
    flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, size)])
    return flat.reshape(*lead, size, 2 * size + 1)[..., : size // 2 + 1]  # a row longer than the array turns by one


def made_whole(half: Array) -> Array:
    """The symmetric matrix of `halved`, [..., n, n] of [..., n, floor(n / 2) + 1]."""
    *lead, size, kept = half.shape
    wide = jnp.pad(half, [(0, 0)] * (len(lead) + 1) + [(0, size - kept)])
    flat = jnp.concatenate([wide, wide], axis=-1).reshape(*lead, 2 * size**2)[..., size:]
    turned = flat.reshape(*lead, size, 2 * size - 1)[..., :size]
    place = jnp.arange(size)
    there = (place - place[:, None]) % size < kept
    return jnp.where(there, turned, jnp.swapaxes(turned, -1, -2))
