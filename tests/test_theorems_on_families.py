"""The theorems on the families of nets that people train: each method against its dense definition, in float64.

A theorem compares what a method gives for ONE matrix of a layer (a copy of a stack, a group of a convolution) with its
definition on that matrix, and with a control that is another definition. Where a batch normalisation mixes the
examples, a theorem about the gradients of the examples holds of what the products of each example say, and not of the
Jacobian of its outputs: both are tested. Its last column runs by default, the full cross by `-m full`.

Not crossed, since no net is in them: claims about likelihoods, schedules, algebra of matrices and of secants.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import dense_families as families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_families import LAYERS, MIXED, dense
from family_steps import DAMPING, Copy, cells, copies, of_families, stepped, watched
from jax.flatten_util import ravel_pytree
from reference import CONTROL, assert_differs, assert_equal, damped, diagonal_in, error, partial_traces, recomposed
from tensors import kron

from natgrad_jax.algebra import averages
from natgrad_jax.algebra import rows as of_rows
from natgrad_jax.layers.rows import input_rows, output_rows

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.whole, pytest.mark.slow]


# Definitions ----------------------------------------------------------------------------------------------------------


def block(copy: Copy):
    """F, the mean of vec(D) vec(D)^T."""
    rows = copy.d.reshape(-1, copy.grad.size)
    return rows.T @ rows / len(rows)


def factors(copy: Copy):
    """A, summed over positions, and G, the mean over them."""
    columns = copy.g.reshape(-1, copy.g.shape[-1])
    return np.einsum("nti,ntj->ij", copy.a, copy.a) / len(copy.a), columns.T @ columns / len(columns)


def traces(copy: Copy):
    """The partial traces of F."""
    return partial_traces(block(copy), copy.grad.shape)


def solve(matrix, copy: Copy, damping: float = DAMPING):
    """(matrix + damping I)^-1 times the gradient."""
    return np.linalg.solve(damped(matrix, damping), copy.grad.ravel()).reshape(copy.grad.shape)


def pi_damped(copy: Copy):
    """The gradient between two inverses, the root of the damping in the proportion of their mean eigenvalues."""
    a, g = factors(copy)
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    return np.linalg.solve(damped(a, pi * DAMPING**0.5), copy.grad) @ np.linalg.inv(damped(g, DAMPING**0.5 / pi))


def product(pair):
    """The Kronecker product with these partial traces."""
    return kron(pair) / np.trace(pair[0])


def scale_of(copy: Copy):
    """The basis and the scale of a state."""
    return kron(copy.operator.basis), averages.mean(copy.operator.scale).ravel()


def spectrum(matrix, size: int):
    """The largest eigenvalues, in order."""
    return np.linalg.eigvalsh(matrix)[::-1][:size]


# Theorems of one matrix: found, what the definition says, what another one says ---------------------------------------


def rescaled(copy: Copy, pair):
    """The eigenvectors of a Kronecker product with the diagonal of F in them; with that of another basis."""
    q = kron(np.linalg.eigh(side)[1] for side in pair)
    scale = diagonal_in(q, block(copy))
    return copy.found, *(solve(recomposed(q, each), copy) for each in (scale, scale[::-1]))


def diagonal(copy: Copy, pair):
    q, scale = scale_of(copy)
    return scale, diagonal_in(q, block(copy)), diagonal_in(q, kron(pair))


def explained(copy: Copy):
    """How much of |F|^2 is left if the error is taken away: with this basis, by Pythagoras, at most its diagonal's."""
    f, (q, scale) = block(copy), scale_of(copy)
    found, worse = (np.sum(f**2) - np.sum((f - recomposed(q, each)) ** 2) for each in (scale, scale[::-1]))
    return found, np.sum(diagonal_in(q, f) ** 2), worse


def of_traces(copy: Copy):
    found = averages.mean(copy.statistics)
    return tuple(np.concatenate([*map(np.ravel, pair)]) for pair in (found, traces(copy), factors(copy)))


def of_kernel(copy: Copy):
    """J J^T of the examples has the eigenvalues of J^T J."""
    factor, f = copy.operator.factor, block(copy)
    size = min(len(f), len(factor))
    kernel = factor @ factor.T - DAMPING * np.eye(len(factor))
    return spectrum(kernel, size), spectrum(f, size), spectrum(kron(factors(copy)), size)


def inputs_alone(copy: Copy):
    a, _ = factors(copy)
    return -copy.found, np.linalg.solve(damped(a, DAMPING**0.5), copy.grad), np.linalg.solve(damped(a, 1.0), copy.grad)


class Theorem(NamedTuple):
    """What is compared for one matrix.

    Attributes:
        says: copy -> found, the definition, a control.
        method: key into `METHODS`.
        default: the family on which it runs by default; "" for none.
        of_examples: whether the definition has gradients of examples in it.
    """

    says: Callable[[Copy], tuple[Any, Any, Any]]
    method: str
    default: str
    of_examples: bool = True


THEOREMS = {
    "C53 K-FAC solves with the moments of a and g": Theorem(
        lambda c: (c.found, solve(kron(factors(c)), c), solve(block(c), c)), "kfac", "dilated", of_examples=False
    ),
    "C49 K-FAC's pi is the root of a ratio of mean eigenvalues": Theorem(
        lambda c: (c.found, pi_damped(c), solve(kron(factors(c)), c)), "kfac pi", "mlp", of_examples=False
    ),
    "C53 EKFAC solves with the best diagonal in K-FAC's eigenbasis": Theorem(
        lambda c: rescaled(c, factors(c)), "ekfac", "mlp"
    ),
    "C32 EKFAC's scale is the diagonal of F": Theorem(lambda c: diagonal(c, factors(c)), "ekfac", "mlp"),
    "C33 no diagonal in K-FAC's eigenbasis is nearer to F": Theorem(explained, "ekfac", "mlp"),
    "C53 TEKFAC solves with the best diagonal in TKFAC's eigenbasis": Theorem(
        lambda c: rescaled(c, traces(c)), "tekfac", "mlp"
    ),
    "C32 TEKFAC's scale is the diagonal of F": Theorem(lambda c: diagonal(c, factors(c)), "tekfac", "mlp"),
    "C33 no diagonal in TKFAC's eigenbasis is nearer to F": Theorem(explained, "tekfac", "mlp"),
    "C37 TKFAC keeps both partial traces of F": Theorem(of_traces, "tkfac", "mlp"),
    "C53 TKFAC solves with the product of the partial traces": Theorem(
        lambda c: (c.found, solve(product(traces(c)), c), solve(kron(factors(c)), c)), "tkfac", "mlp"
    ),
    "C58 TENGraD solves with F": Theorem(
        lambda c: (c.found, solve(block(c), c), solve(kron(factors(c)), c)), "tengrad", "dilated"
    ),
    "C59 TENGraD's kernel has the eigenvalues of F": Theorem(of_kernel, "tengrad", "dilated"),
    "C87 K-BFGS starts from the damped inverse of the moments of a": Theorem(
        inputs_alone, "kbfgs", "", of_examples=False
    ),
}


@pytest.mark.parametrize(("theorem", "family"), cells(THEOREMS))
def test_a_theorem_of_a_matrix_holds_on_a_family(theorem, family):
    says, method, _, of_examples = THEOREMS[theorem]
    apart = []
    for name in LAYERS[family]:
        mixed = of_examples and name in MIXED.get(family, ())
        for copy in copies(family, method, name):
            of_rows = copy._replace(d=np.einsum("nti,knto->knio", copy.a, copy.g)) if mixed else copy
            found, expected, control = says(of_rows)
            assert_equal(found, expected)
            apart.append(error(control, found))
            if mixed:
                assert_differs(says(copy)[1], found)
    assert max(apart) > CONTROL


# Theorems of the whole net --------------------------------------------------------------------------------------------


@of_families("transformer")
def test_c2_rows_are_the_gradients_of_the_examples_and_their_sum_is_that_of_the_batch(family):
    said, (_, layers, (_, evidence)) = dense(family), watched(family)

    @jax.jit
    def gradients(evidence):
        pairs = {
            name: (input_rows(layer, evidence[name]), output_rows(layer, evidence[name]))
            for name, layer in layers.items()
        }
        return {name: jnp.einsum("...nti,...knto->kn...io", *pair) for name, pair in rows_in_full(pairs).items()}

    for name, found in gradients({name: evidence[name] for name in layers}).items():
        expected = np.asarray(said.examples[name])
        found = np.reshape(found, expected.shape)
        assert_equal(found.sum(1), expected.sum(1))
        (assert_differs if name in MIXED.get(family, ()) else assert_equal)(found, expected)
        assert_differs(found[:, ::-1], expected)


def rows_in_full(pairs):
    """Rows with one entry each as arrays."""
    return {name: (a if isinstance(a, jax.Array) else of_rows.written_out(a), g) for name, (a, g) in pairs.items()}


@of_families("transformer")
def test_c31_products_along_directions_are_those_of_the_dense_fisher_matrix_and_c12_half_of_them_is_the_divergence(
    family,
):
    said, capture = dense(family), watched(family)[0]
    flat, tree = ravel_pytree(said.params)
    u, v = np.random.default_rng(1).normal(size=(2, flat.size))

    @jax.jit
    def along(variables, u, v):
        curvature = capture.value_and_grad(variables, said.x, said.y).curvature
        at = [jax.nn.log_softmax(families.outputs(family, variables, tree(flat + d), said.x)) for d in (0, 1e-4 * u)]
        return curvature.along(tree(u)), curvature.along(tree(v)), at

    of_u, of_v, (here, there) = along(said.variables, u, v)
    rows = np.einsum("ncp,nck->nkp", said.jacobian, said.root).reshape(-1, flat.size)
    assert_equal(np.vdot(of_u, of_v), (rows @ u) @ (rows @ v) / len(said.x))
    divergence = np.sum(np.exp(here) * (here - there)) / len(said.x)
    assert_equal(1e-8 * np.vdot(of_u, of_u) / 2, divergence, 5e-3)  # of the third order
    true = np.einsum("ncp,nc->np", said.jacobian, np.exp(here) - np.eye(here.shape[1])[said.y])
    assert_differs((true @ u) @ (true @ v) / len(said.x), np.vdot(of_u, of_v))  # the empirical one


@of_families("mlp")
def test_c58_the_joint_direction_of_tengrad_solves_with_the_block_of_all_layers(family):
    direction, _ = stepped(family, "tengrad joint")
    said, mixed = dense(family), family in MIXED
    by_rows = {
        name: np.einsum("snti,ksnto->knsio", said.inputs[name], said.cotangents[name]) for name in LAYERS[family]
    }

    def joined(of):
        return np.concatenate([np.ravel(families.matrix(family, name, of)) for name in LAYERS[family]])

    def expected(examples):
        rows = np.concatenate(
            [np.reshape(examples[name], (len(said.root[0]) * len(said.x), -1)) for name in LAYERS[family]], axis=1
        )
        return np.linalg.solve(damped(rows.T @ rows / len(rows), DAMPING), joined(said.grad))

    found = joined(direction)
    assert_equal(found, expected(by_rows))
    (assert_differs if mixed else assert_equal)(found, expected(said.examples))
    assert_differs(joined(stepped(family, "tengrad")[0]), found)


@of_families("")  # `test_exact_blocks` has it of a perceptron
def test_c19_kfac_is_the_block_of_one_example_where_a_layer_has_one_position(family):
    apart = []
    for name in LAYERS[family]:
        for copy in copies(family, "kfac", name, examples=1):
            if copy.a.shape[1] == 1:
                assert_equal(copy.found, solve(block(copy), copy))
            else:
                apart.append(error(kron(factors(copy)), block(copy)))
    assert bool(apart) == (family != "mlp") and max(apart, default=1) > CONTROL
