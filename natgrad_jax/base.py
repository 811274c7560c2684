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


Matrix = Any
"""The weight matrix of a layer [S, I, O]; of a block of several layers a mapping {layer: its matrix}."""


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
        positions: T, over all calls of the layer.
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
    positions: int = 1
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
        slopes: squared norm of the derivative of each example's loss by the outputs of the model [K, N], times the
            weight of the example. None where g is the identity.
    """

    inputs: tuple[Array, ...] | Array | None = None
    cotangents: tuple[Array, ...] | Array | None = None
    gradient: Array | None = None
    weights: Array | None = None
    count: Array | None = None
    slopes: Array | None = None


class Kind(NamedTuple):
    """How the layers of one kind become matrices and rows.

    to_matrix: layer, {role: array}            -> [S, I, O]
    from_matrix: layer, matrix                 -> {role: array}
    input_rows: layer, inputs of one call      -> [S, N, T, I], the ones of the bias included
    output_rows: layer, cotangents of one call -> [S, K, N, T, O]
    """

    to_matrix: Callable[[Layer, Mapping[str, Array]], Matrix]
    from_matrix: Callable[[Layer, Matrix], dict[str, Array]]
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
    apply: Callable[[Layer, Any, Matrix, Scalar], Matrix]
    rescale: Callable[[Layer, Any, Evidence], Any] | None = None


@dataclass(frozen=True)
class Layers(Mapping[str, Layer]):
    """The layers of one model by name, and the parameters that belong to none.

    Immutable and hashable. `print(layers)` is the coverage report.

    Attributes:
        known: the layers that a method preconditions.
        rest: the parameters that belong to no known layer, each with the reason in its `note`.
        examples: N of the inputs that the layers were found with; 0 if that is not known.
        draws: K that the evidence will have; 0 if it will have no cotangents.
    """

    known: tuple[Layer, ...]
    rest: tuple[Layer, ...] = ()
    examples: int = 0
    draws: int = 1
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


def sample_sizes(layer: Layer, examples: int, draws: int, positions: int | None = None) -> tuple[int, int]:
    """How many numbers a batch takes in sample space, for all copies of a layer.

    Args:
        layer: the layer.
        examples: N.
        draws: K.
        positions: T, if it is not that of the layer.

    Returns:
        Of the rows a and g, N T (I + K O); of the gradients of the examples, K N I O.
    """
    rows, columns = layer.shape
    copies = prod(layer.stack) * examples
    return copies * (positions or layer.positions) * (rows + draws * columns), copies * draws * rows * columns


def _report(layers: Layers) -> list[str]:
    """The lines of the coverage report."""
    lines = []
    if layers.known:
        sampled = layers.examples * layers.draws
        rows = [("parameter", "shape", "kind", "factors", "state", "in sample space")]
        for layer in layers.known:
            copies = "".join(f"{size} x " for size in layer.stack)
            state = prod(layer.stack) * 8 * (layer.shape[0] ** 2 + layer.shape[1] ** 2)
            batch = 4 * (min(sample_sizes(layer, layers.examples, layers.draws)) + prod(layer.stack) * sampled**2)
            first, *others = layer.leaves
            sizes = (_bytes(state), _bytes(batch) if sampled else "")
            rows.append((first.address, str(first.shape), layer.kind, f"{copies}{layer.shape}", *sizes))
            rows.extend((leaf.address, str(leaf.shape), "", "", "", "") for leaf in others)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines.append(
            "(factors: sizes of the two sides, bias included; state: a pair of float32 factors and their inverses)"
        )
        if sampled:
            lines.append(f"(in sample space: {_rows_of(layers)}, with the inverse of their kernel, as TENGraD has it)")
    if layers.rest:
        lines.append("Not covered, hence a diagonal Fisher block each, same damping and learning rate:")
        width = max(len(layer.name) for layer in layers.rest)
        lines.extend(f"  {layer.name.ljust(width)}  {layer.shape}  {layer.note}".rstrip() for layer in layers.rest)
    elif layers.known:
        lines.append("Every parameter is covered.")
    return lines


def _rows_of(layers: Layers) -> str:
    """How many rows a batch has, in words."""
    draws = f" of {layers.draws} draws" if layers.draws > 1 else ""
    return f"{layers.examples} examples{draws}"


def _bytes(count: float) -> str:
    """A number of bytes for reading."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
