"""The nouns of the library, and the letters that every shape is written in.

S  leading stack axes of a layer: copies made by nn.scan or nn.vmap, groups of a convolution (absent if none)
N  examples        T  positions that share the weights (1 if none)        K  label draws
I  rows of the weight matrix: the inputs of the layer, and one more for the bias
O  columns of the weight matrix: the outputs of the layer
a  inputs [S, N, T, I]         g  cotangents [S, K, N, T, O] of the SUMMED negative log-likelihood
W  total weight of the examples: N if none is weighted
D  = sum_t a_t g_t^T, the gradient of one example [S, I, O]
F  = E[vec(D) vec(D)^T], the Fisher block in the scale of ONE example; damping has the units of F
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import optax

Array = jax.Array
Scalar = float | Array
"""A number, or an array without axes."""
ScalarOrSchedule = optax.ScalarOrSchedule
"""A number, an array without axes, or a schedule: a function of the int32 step count."""


class Leaf(NamedTuple):
    """One parameter array of a layer: what part it plays, where it stands in the tree, its shape."""

    role: str
    address: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One block of the curvature: a layer, or a parameter that belongs to no known layer.

    Attributes:
        name: the address of the layer in the parameter tree, "encoder/Dense_0".
        kind: key into `layers.KINDS`: "dense", "conv"; "parameter" for a parameter of no known layer.
        shape: (I, O); the shape of the array itself if `kind` is "parameter".
        leaves: the parameter arrays of the layer.
        stack: sizes of the leading axes S.
        dtype: dtype of the curvature, "float32" or "float64".
        geometry: the options of the layer's kind that its rows depend on, hashable.
        grouped: whether the last stack axis is the groups of a convolution, an axis that its arrays do not have.
        note: why the parameter has no layer, for the coverage report.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    stack: tuple[int, ...] = ()
    dtype: str = "float32"
    geometry: Any = None
    grouped: bool = False
    note: str = ""

    @property
    def module_axes(self) -> int:
        """Number of leading axes that the arrays of the layer have: the stack without the groups of a convolution."""
        return len(self.stack) - self.grouped

    @property
    def has_bias(self) -> bool:
        """Whether the last row of the weight matrix is a bias."""
        return any(leaf.role == "bias" for leaf in self.leaves)


class Evidence(NamedTuple):
    """What one batch says about one layer.

    `inputs` and `cotangents` are as the model has them, one array per call of the layer; `layers.input_rows` and
    `layers.output_rows` turn them into a [S, N, T, I] and g [S, K, N, T, O]. A method reads what it needs: under
    `jit` the rest is dead code.

    Attributes:
        inputs: inputs of each call, [S, N, ..., channels]. None for a parameter of no known layer.
        cotangents: derivatives of the summed negative log-likelihood by the outputs of each call,
            [K, S, N, ..., channels]; the weight of an example enters by its square root. None where g is the identity.
        gradient: the sum over examples of D, [S, K, I, O]; [K, *shape] for a parameter of no known layer. None where g
            is the identity.
        weights: weights of the examples [N], or of their positions [N, T]. None if all are 1.
        count: W, the total weight of the examples. None stands for N.
    """

    inputs: tuple[Array, ...] | Array | None = None
    cotangents: tuple[Array, ...] | Array | None = None
    gradient: Array | None = None
    weights: Array | None = None
    count: Array | None = None


class Kind(NamedTuple):
    """How the layers of one kind become matrices and rows.

    to_matrix: layer, {role: array}            -> [S, I, O]
    from_matrix: layer, matrix                 -> {role: array}
    input_rows: layer, inputs of one call      -> [S, N, T, I], the ones of the bias included
    output_rows: layer, cotangents of one call -> [S, K, N, T, O]
    """

    to_matrix: Callable[[Layer, Mapping[str, Array]], Array]
    from_matrix: Callable[[Layer, Array], dict[str, Array]]
    input_rows: Callable[[Layer, Array], Array]
    output_rows: Callable[[Layer, Array], Array]


class Method(NamedTuple):
    """A preconditioner of ONE layer (with all copies of its stack), as pure functions.

    init: layer                                -> state
    observe: layer, state, evidence            -> state       cheap, each statistics step
    refresh: layer, state, damping             -> state       dear, each refresh step
    apply: layer, state, gradient, damping     -> update      each step; gradient and update are [S, I, O]
    rescale: layer, state, evidence            -> state       only for a scale that is measured in the basis that
                                                              `refresh` makes: after every refresh, and as scheduled

    Every array of a state leads with the axes S. `refresh` may not depend on a layer beyond its kind, shape, stack and
    dtype: layers that agree in these are stacked and refreshed as one.
    """

    init: Callable[[Layer], Any]
    observe: Callable[[Layer, Any, Evidence], Any]
    refresh: Callable[[Layer, Any, Scalar], Any]
    apply: Callable[[Layer, Any, Array, Scalar], Array]
    rescale: Callable[[Layer, Any, Evidence], Any] | None = None


@dataclass(frozen=True)
class Layers(Mapping[str, Layer]):
    """The layers of one model by name, and the parameters that belong to none.

    Immutable and hashable. `print(layers)` is the coverage report.

    Attributes:
        known: the layers that a method preconditions.
        rest: the parameters that belong to no known layer, each with the reason in its `note`.
    """

    known: tuple[Layer, ...]
    rest: tuple[Layer, ...] = ()
    _index: dict[str, Layer] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "_index", {layer.name: layer for layer in self.known})

    def __getitem__(self, name: str) -> Layer:
        return self._index[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """Every block of the curvature: the known layers, then the remaining parameters."""
        return self.known + self.rest

    def __str__(self) -> str:
        return "\n".join(_report(self))


def _report(layers: Layers) -> list[str]:
    """The lines of the coverage report."""
    lines = []
    if layers.known:
        rows = [("parameter", "shape", "kind", "factors", "state")]
        for layer in layers.known:
            copies = "".join(f"{size} x " for size in layer.stack)
            state = _bytes(prod(layer.stack) * 8 * (layer.shape[0] ** 2 + layer.shape[1] ** 2))
            first, *others = layer.leaves
            rows.append((first.address, str(first.shape), layer.kind, f"{copies}{layer.shape}", state))
            rows.extend((leaf.address, str(leaf.shape), "", "", "") for leaf in others)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines.append(
            "(factors: sizes of the two sides, bias included; state: a pair of float32 factors and their inverses)"
        )
    if layers.rest:
        lines.append("Not covered, hence a diagonal Fisher block each, same damping and learning rate:")
        width = max(len(layer.name) for layer in layers.rest)
        lines.extend(f"  {layer.name.ljust(width)}  {layer.shape}  {layer.note}".rstrip() for layer in layers.rest)
    elif layers.known:
        lines.append("Every parameter is covered.")
    return lines


def _bytes(count: float) -> str:
    """A number of bytes for reading."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
