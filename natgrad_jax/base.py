"""The nouns of the library, and the letters that every shape is written in.

S  leading stack axes of a layer: copies made by nn.scan or nn.vmap, groups of a convolution (absent if none)
N  examples        T  positions that share the weights (1 if none)        K  label draws
I  rows of the weight matrix: the inputs of the layer, and one more for the bias
O  columns of the weight matrix: the outputs of the layer
a  inputs [S, N, T, I]         g  cotangents [S, K, N, T, O] of the SUMMED negative log-likelihood
W  total weight of the examples: N if none is weighted
D  = sum_t a_t g_t^T, the gradient of one example [S, I, O]
F  = E[vec(D) vec(D)^T], the Fisher block in the scale of ONE example; damping has the units of F

How data walks through the package: `capture` records what every use of a layer reads (inputs) and what the loss sends
back to it (cotangents), and hands them over as `Evidence`, as the model has them. The `Kind` of a layer turns them into
rows a and g, and its parameters into a matrix. A `Method` averages moments of the rows (statistics), makes of these
what is applied (operator), and applies it to the gradient as a matrix. `lift` does this for every layer of a tree, when
the schedule says so.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import optax

from natgrad_jax import report

Array = jax.Array
Scalar = float | Array
"""A number, or an array without axes."""
ScalarOrSchedule = optax.ScalarOrSchedule
"""A number, an array without axes, or a schedule: a function of the int32 step count."""
Matrix = Any
"""The weight matrix of a layer [S, I, O]; of a block of several layers a mapping {layer: its matrix}."""
Statistics = Any
"""What a method averages of a layer: a pytree whose arrays lead with the axes S."""
Operator = Any
"""What a method applies to a layer: a pytree whose arrays lead with the axes S."""


UNSEEN = "the likelihood does not see it"
"""The note of a parameter that the outputs of a call do not depend on."""
WIDEST = 8192
"""The largest size of a side of which methods keep the whole factor, unless they are told another."""


class Leaf(NamedTuple):
    """One parameter array of a layer: what part it plays, where it stands in the tree, its shape."""

    role: str
    address: str
    shape: tuple[int, ...]


class Use(NamedTuple):
    """One call of a layer: how what it reads and what comes back become rows.

    Attributes:
        kind: key into `layers.KINDS`.
        geometry: the options of the call that its rows depend on, hashable.
        positions: T of this call.
        transposed: whether the matrix is used the other way round, outputs to inputs, as a tied table is.
        biased: whether the bias of the layer, if it has one, is added to the result; to that of a tangent it is not.
        part: the `algebra.cuts.Block` of the matrix [S, I, O] that it uses, without the row of the bias; None for all.
        beside: whether its rows stand in those of the use before it, in other columns or for other copies.
    """

    kind: str
    geometry: Any = None
    positions: int = 1
    transposed: bool = False
    biased: bool = True
    part: Any = None
    beside: bool = False


@dataclass(frozen=True)
class Layer:
    """One block of the curvature: a layer, or a parameter that belongs to no known layer.

    Attributes:
        name: the address of the layer in the parameter tree, "encoder/Dense_0".
        kind: key into `layers.KINDS`: how its arrays become a matrix. "parameter" for one of no known layer, "norm"
            for the scale of a norm, with the shift if it has one.
        shape: (I, O); the shape of the array itself if `kind` is "parameter", (channels, arrays) if it is "norm".
        leaves: the parameter arrays of the layer.
        stack: sizes of the leading axes S.
        dtype: dtype of the curvature, "float32" or "float64".
        geometry: the options of the kind that the matrix depends on, hashable.
        grouped: whether the last stack axis is the groups of a convolution, an axis that its arrays do not have.
        window: sizes of the window over which the inputs are gathered; () for none.
        one_hot: whether a row of inputs has one entry that is not zero, so that A is diagonal.
        uses: its calls, in order; `Evidence.inputs[i]` belongs to `uses[i]`.
        arrays: (role, `algebra.arranged.Arrangement` of its parameter arrays) for the kernel and the bias of the kind;
            () where the parameter arrays are these as they are.
        note: why the parameter has no layer, for the coverage report.
        devices: the `algebra.devices.Devices` that have the examples, each some of them; None where nobody said.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    stack: tuple[int, ...] = ()
    dtype: str = "float32"
    geometry: Any = None
    grouped: bool = False
    window: tuple[int, ...] = ()
    one_hot: bool = False
    uses: tuple[Use, ...] = ()
    arrays: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    devices: Any = None

    @property
    def is_known(self) -> bool:
        """Whether it is a layer with rows, neither a norm nor a parameter that belongs to no layer."""
        return self.kind not in ("parameter", "norm")

    @property
    def positions(self) -> int:
        """T, over all uses."""
        return sum(use.positions for use in self.uses if not use.beside) or 1

    @property
    def module_axes(self) -> int:
        """Number of leading axes that the arrays of the layer have: the stack without the groups of a convolution."""
        return len(self.stack) - self.grouped

    @property
    def has_bias(self) -> bool:
        """Whether the last row of the weight matrix is a bias."""
        return any(leaf.role.startswith("bias") for leaf in self.leaves)

    def sample_sizes(self, examples: int, draws: int, positions: int | None = None) -> tuple[int, int]:
        """How many numbers a batch takes in sample space, for all copies of the layer.

        Args:
            examples: N.
            draws: K.
            positions: T, if it is not that of the layer.

        Returns:
            Of the rows a and g, N T (I + K O), a one-hot row counted as two; of the gradients of the examples, K N I O.
        """
        rows, columns = self.shape
        copies = prod(self.stack) * examples
        of_rows = (2 if self.one_hot else rows) + draws * columns
        return copies * (positions or self.positions) * of_rows, copies * draws * rows * columns


class Evidence(NamedTuple):
    """What one batch says about one layer, as the model has it.

    `layers.rows` turns inputs and cotangents into rows a [S, N, T, I] and g [S, K, N, T, O], and the gradient into a
    matrix. A method reads what it needs: under `jit` the rest is dead code.

    Attributes:
        inputs: inputs of each use, [S, N, ..., channels]. None for a parameter of no known layer.
        cotangents: derivatives of the summed negative log-likelihood by the outputs of each use,
            [K, S, N, ..., channels]; the weight of an example enters by its square root. None where g is the identity.
        gradient: the sum over examples of the derivatives by each array of the layer, {role: [K, *shape]}. None where g
            is the identity.
        weights: weights of the examples [N], or of their positions [N, T]. None if all are 1.
        count: W, the total weight of the examples. None stands for N.
        slopes: squared norm of the derivative of each example's loss by the outputs of the model [K, N], times the
            weight of the example. None where g is the identity.
        examples: of a parameter of no known layer, of which gradient is the sum over N: {role: [K, N, *shape]}. None
            of a layer, which has rows, and without `jacobian="examples"`. A norm has them always.
    """

    inputs: tuple[Array, ...] | Array | None = None
    cotangents: tuple[Array, ...] | Array | None = None
    gradient: Mapping[str, Array] | None = None
    weights: Array | None = None
    count: Array | None = None
    slopes: Array | None = None
    examples: Mapping[str, Array] | None = None


class Kind(NamedTuple):
    """What a layer of one kind answers: about its arrays, its rows.

    What has no rows (a parameter by itself, a tensor, a block of several layers) has a matrix only.

    Attributes:
        to_matrix: layer, {role: array} -> [S, I, O].
        from_matrix: layer, matrix -> {role: array}.
        input_rows: layer, use, recorded inputs of the use -> rows [S, N, T, I], the ones of the bias included; None of
            what has no rows.
        output_rows: layer, use, cotangents of the use -> [S, K, N, T, O]; None of what has no rows.
        gradient: layer, evidence -> {role: [K, *shape]}, where that is cheaper from the rows on a CPU; None elsewhere.
    """

    to_matrix: Callable[[Layer, Mapping[str, Array]], Matrix]
    from_matrix: Callable[[Layer, Matrix], dict[str, Array]]
    input_rows: Callable[[Layer, Use, Any], Any] | None = None
    output_rows: Callable[[Layer, Use, Array], Array] | None = None
    gradient: Callable[[Layer, Evidence], dict[str, Array]] | None = None


class Gradual(NamedTuple):
    """A refresh of ONE layer in parts of about equal work, as pure functions; see `lift.gradual`.

    begin: layer, statistics, operator, damping, parts            -> work          arrays that lead with the axes S
    proceed: layer, statistics, operator, work, part, parts       -> work          the part is int32 []
    end: layer, statistics, operator, work                        -> operator
    """

    begin: Callable[[Layer, Statistics, Operator, Scalar, int], Any]
    proceed: Callable[[Layer, Statistics, Operator, Any, Array, int], Any]
    end: Callable[[Layer, Statistics, Operator, Any], Operator]


class Method(NamedTuple):
    """A preconditioner of ONE layer (with all copies of its stack), as pure functions of two values.

    Statistics are what is averaged over batches, the operator is what is applied to the gradient.

    init: layer                                       -> statistics, operator
    observe: layer, statistics, evidence              -> statistics      cheap, each statistics step
    refresh: layer, statistics, operator, damping     -> operator        dear, each refresh step
    apply: layer, operator, gradient, damping         -> update          each step; both matrices are [S, I, O]
    rescale: layer, operator, evidence                -> operator        only for what is measured in the terms of an
                                                                         operator: after every refresh, and as scheduled
    follow: layer, statistics, operator               -> operator        only for what an operator has of the statistics
                                                                         for nothing: whenever either has changed
    measure: layer, operator, evidence                -> operator        only for what an operator is made of that no
                                                                         average holds: before every refresh
    couple: layer, statistics, operator, evidence     -> statistics      only for statistics that are measured in the
                                                                         terms of an operator: in the place of `observe`
    turned: layer, statistics, operator               -> [S]             only for an operator with a basis: how far it
                                                                         is from the eigenvectors of the statistics

    gradual: the refresh in parts, for a layer that takes too long for one step; None where there is no such way.
    holds: whether statistics that were observed before the first step serve it as they are.

    Every array leads with the axes S. `refresh` may not depend on a layer beyond its kind, shape, stack, window and
    dtype: layers that agree in these are stacked and refreshed as one.
    """

    init: Callable[[Layer], tuple[Statistics, Operator]]
    observe: Callable[[Layer, Statistics, Evidence], Statistics]
    refresh: Callable[[Layer, Statistics, Operator, Scalar], Operator]
    apply: Callable[[Layer, Operator, Matrix, Scalar], Matrix]
    rescale: Callable[[Layer, Operator, Evidence], Operator] | None = None
    follow: Callable[[Layer, Statistics, Operator], Operator] | None = None
    measure: Callable[[Layer, Operator, Evidence], Operator] | None = None
    couple: Callable[[Layer, Statistics, Operator, Evidence], Statistics] | None = None
    turned: Callable[[Layer, Statistics, Operator], Array] | None = None
    gradual: Gradual | None = None
    holds: bool = False


@dataclass(frozen=True)
class Layers(Mapping[str, Layer]):
    """The layers of one model by name, and the parameters that belong to none.

    Immutable and hashable. `print(layers)` is the coverage report.

    Attributes:
        known: the layers that a method preconditions.
        rest: the norms, and the parameters that belong to no known layer, each with the reason in its `note`.
        examples: N of the inputs that the layers were found with; 0 if that is not known.
        draws: K that the evidence will have; 0 if it will have no cotangents.
        mixed: names of the layers behind which the outputs of one example depend on the rows of others.
        labels: whose cotangents the evidence will have; "" if that is not known.
        jacobian: "examples" if the model is watched one example at a time, and the evidence of the remaining parameters
            will have the gradients of the examples; else "rows".
    """

    known: tuple[Layer, ...]
    rest: tuple[Layer, ...] = ()
    examples: int = 0
    draws: int = 1
    mixed: tuple[str, ...] = field(default=(), compare=False)
    labels: str = field(default="", compare=False)
    jacobian: str = "rows"
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
        return report.coverage(self, WIDEST)

    def bytes(self, tx: optax.GradientTransformation, params: Any = None) -> int:
        """How much memory the state of a transformation takes for these layers; nothing is computed.

        What `print(layers)` says of a layer is a pair of whole factors. Here the settings count: of a side that is
        wider than `max_factor_dim` a method holds the diagonal, and one that keeps rows or roots holds those.

        Args:
            tx: a direction or a complete optimizer, made of these layers, or a wrapper around one.
            params: the parameters; shapes suffice. Their dtypes count where a momentum is kept; None for that of
                their curvature.

        Returns:
            Bytes.

        Raises:
            TypeError: if `tx` is no transformation.
        """
        return report.size(self._state(tx, params))

    def report(self, tx: optax.GradientTransformation) -> str:
        """What the state of a transformation holds of each layer; nothing is computed.

        Args:
            tx: a direction or a complete optimizer, made of these layers.

        Returns:
            A table: of each layer the sizes of its sides, with the number of vectors of one that is truncated
            ("125 of 1001"), the bytes of its statistics and of what is applied; then those of the whole state.
        """
        return report.held(self._state(tx))

    def _state(self, tx: optax.GradientTransformation, params: Any = None) -> Any:
        """The shapes of a state."""
        if not hasattr(tx, "init"):
            raise TypeError(
                f"`tx` is of type {type(tx).__name__}; expected a transformation, such as `ng.kfac(0.1, layers)`."
            )
        if params is None:
            params = {
                leaf.address: jax.ShapeDtypeStruct(leaf.shape, layer.dtype)
                for layer in self.blocks
                for leaf in layer.leaves
            }
        return jax.eval_shape(tx.init, params)
