"""A batch on a mesh with `Explicit` axes: evaluated where they are `Auto`, and its curvature asked there.

Loss, gradient and what was written leave the region at once. The curvature stays: a transformation asks for it in the
region of its own, so that no row leaves the devices that have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, reshard

from natgrad_jax import addresses
from natgrad_jax.addresses import Tree
from natgrad_jax.algebra.devices import Devices
from natgrad_jax.algebra.meshes import Mesh, entered, is_within, left, within
from natgrad_jax.base import Array, Evidence, Layers
from natgrad_jax.watch.problem import Evaluation, no_argument


@dataclass(frozen=True, eq=False, repr=False)
class Meshed:
    """The curvature of a batch on such a mesh; asked like `common.Curvature`, its answers on every device."""

    _inner: Any
    _mesh: Mesh

    dtype = no_argument

    @property
    def layers(self) -> Layers:
        """The layers that the evidence is of."""
        return self._inner.layers

    @property
    def labels(self) -> str:
        """Whose cotangents the evidence has."""
        return self._inner.labels

    @property
    def count(self) -> Array:
        """W, the total weight of the examples."""
        return self._asked(lambda: self._inner.count)

    @property
    def floor(self) -> Array | None:
        """What the loss cannot fall below; see `common.Curvature.floor`."""
        return self._asked(lambda: self._inner.floor)

    def __call__(self, params: Tree | None = None) -> dict[str, Evidence]:
        """The evidence of the batch, at the parameters of this step or at others."""
        return self._asked(self._inner, params)

    def along(self, direction: Tree) -> Any:
        """J times a direction at the outputs of the batch; see `common.Curvature.along`."""
        return self._asked(self._inner.along, direction)

    def value(self, params: Tree | None = None) -> Array:
        """The objective on the same batch, at the parameters of this step or at others."""
        return self._asked(self._inner.value, params)

    def value_and_slope(self, params: Tree, direction: Tree) -> tuple[Array, Array]:
        """The objective on the same batch at other parameters, and its derivative along a direction there."""
        return self._asked(self._inner.value_and_slope, params, direction)

    @property
    def space(self) -> Callable[[], Any]:
        """What gives the batch as the rows of the Jacobian, to be asked in the region; see `common.Curvature.space`."""
        return self._inner.space

    def _asked(self, question: Callable[..., Any], *given: Any) -> Any:
        if is_within(self._mesh):
            return question(*entered(given))
        with within(self._mesh):
            found = question(*entered(given))
        return left(found, self._mesh)


def evaluated(
    mesh: Mesh,
    evaluate: Callable[..., Evaluation],
    params: Tree,
    state: Any,
    batch: Any,
    devices: Devices | None = None,
) -> Evaluation:
    """The evaluation of a batch on a mesh with `Explicit` axes.

    Args:
        mesh: the mesh.
        evaluate: parameters, state, batch -> evaluation.
        params: of the model.
        state: what it reads beside them.
        batch: inputs, targets and whatever goes with them.
        devices: those that share the gradients of scanned layers.

    Returns:
        The evaluation: the gradient is where the parameters are, or where it is summed if it is shared; what was
        written is where it was read. Outputs that lead with the examples are spread as these are, other arrays are on
        every device.
    """
    with within(mesh):
        found = evaluate(*entered((params, state, batch)))
    spread = {
        leaf.shape[0]: PartitionSpec(jax.typeof(leaf).sharding.spec[0])
        for leaf in jax.tree.leaves(batch)
        if isinstance(leaf, jax.Array) and leaf.ndim and jax.typeof(leaf).sharding.spec[0] is not None
    }

    def as_examples(leaf):
        return spread.get(leaf.shape[0], PartitionSpec()) if leaf.ndim else PartitionSpec()

    return found._replace(
        value=left(found.value, mesh),
        grad=_left_gradient(found.grad, mesh, params, found.curvature.layers, devices),
        curvature=Meshed(found.curvature, mesh),
        outputs=left(found.outputs, mesh, spec_of=as_examples),
        updated=left(dict(found.updated), mesh, state),
    )


def _left_gradient(gradient: Tree, mesh: Mesh, params: Tree, layers: Layers, devices: Devices | None) -> Tree:
    """The gradient outside of the region, where the parameters are; of scanned layers each device has its copies."""
    found, inside = left(gradient, mesh, params), addresses.flatten(gradient)
    if devices is None:
        return found
    there, moved = addresses.flatten(params), {}
    for layer in layers.known:
        for leaf in layer.leaves if layer.module_axes and devices.divide(layer.stack) else ():
            if leaf.shape[0] == layer.stack[0] and not any(jax.typeof(there[leaf.address]).sharding.spec):
                moved[leaf.address] = reshard(inside[leaf.address], NamedSharding(mesh, PartitionSpec(devices.axes)))
    return addresses.replace(found, moved)
