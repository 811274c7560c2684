"""C57, C59 to C61: the kernel of a batch and its products, from rows or gradients, are those of the Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_differs, assert_equal, error, normal
from watching import gradients, pairs

import natgrad_jax as ng
from natgrad_jax.base import Use
from natgrad_jax.blocks import samples
from natgrad_jax.blocks.samples import Gradients, Rows


def spatial(examples, positions, rows, columns, *, stack=(), draws=1, dtype="float64"):
    """A layer with shared weights, and its evidence."""
    inputs = normal(*stack, examples, positions, rows, seed=1, dtype=dtype)
    cotangents = normal(draws, *stack, examples, positions, columns, seed=2, dtype=dtype)
    layer = ng.Layer("shared", "dense", (rows, columns), (), stack, dtype, uses=(Use("dense", None, positions),))
    return layer, ng.Evidence((inputs,), (cotangents,), count=jnp.asarray(examples, dtype))


def jacobian(layer, evidence):
    """J [S, R, I O], from the definition."""
    found = gradients(layer, evidence)
    draws, examples = found.shape[-4:-2]
    return found.reshape(*layer.stack, draws * examples, -1) / np.sqrt(draws * examples)


def kept(kind, layer, evidence, workspace=samples.WORKSPACE):
    """What is kept of a batch, of one kind or the other."""
    draws, examples = evidence.cotangents[0].shape[0], evidence.inputs[0].shape[len(layer.stack)]
    zeros, (rows, columns) = (lambda *shape: jnp.zeros((*layer.stack, *shape), layer.dtype)), layer.shape
    like = {
        "rows": lambda: Rows(zeros(examples, layer.positions, rows), zeros(draws, examples, layer.positions, columns)),
        "gradients": lambda: Gradients(zeros(draws, examples, rows, columns)),
    }
    return samples.observed(layer, like[kind](), evidence, "example", workspace)


@pytest.mark.slow
def test_c57_the_kernel_of_a_dense_layer_is_the_hadamard_product_of_two_grams(dtype):
    x, g = normal(9, 6, dtype=dtype), normal(9, 4, seed=1, dtype=dtype)
    layer, evidence = pairs(jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1), g)  # with a bias
    found = samples.kernel(kept("rows", layer, evidence), samples.WORKSPACE)
    exact = jacobian(layer, evidence)
    assert_equal(found, exact @ exact.T)
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    assert_equal(found, (x @ x.T + 1) * (g @ g.T) / 9)
    assert_differs(found, (x @ x.T) * (g @ g.T) / 9)  # the control: a bias left out


@pytest.mark.slow
@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize(("kind", "order"), [("rows", "gram"), ("rows", "gradients"), ("gradients", None)])
def test_c60_the_kernel_of_shared_weights_is_that_of_the_jacobian_in_every_order(kind, order, stack, dtype):
    layer, evidence = spatial(6, 7, 5, 3, stack=stack, draws=2, dtype=dtype)
    exact = jacobian(layer, evidence)
    seen = kept(kind, layer, evidence)
    assert_equal(samples.kernel(seen, samples.WORKSPACE, order), exact @ np.swapaxes(exact, -1, -2))
    summed = exact.reshape(*stack, 2, 6, -1).sum(-3)  # the control: draws taken for one
    assert_differs(samples.kernel(seen, samples.WORKSPACE, order)[..., :6, :6], summed @ np.swapaxes(summed, -1, -2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "gradients"])
def test_c60_products_with_the_jacobian_need_no_jacobian(kind, dtype):
    layer, evidence = spatial(6, 7, 5, 3, stack=(2,), draws=2, dtype=dtype)
    exact, seen = jacobian(layer, evidence), kept(kind, layer, evidence)
    matrix, weights = normal(2, 5, 3, seed=5, dtype=dtype), normal(2, 12, seed=6, dtype=dtype)
    assert_equal(samples.project(seen, matrix), np.einsum("srp,sp->sr", exact, np.reshape(matrix, (2, 15))))
    assert_equal(samples.back(seen, weights), np.einsum("srp,sr->sp", exact, weights).reshape(2, 5, 3))


@pytest.mark.slow
def test_c59_the_push_through_identity(dtype):
    layer, evidence = spatial(6, 7, 5, 3, dtype=dtype)
    seen, exact = kept("rows", layer, evidence), jacobian(layer, evidence)
    weights = normal(6, seed=4, dtype=dtype)
    kernel = samples.kernel(seen, samples.WORKSPACE)
    found = samples.back(seen, jnp.linalg.solve(kernel + 0.3 * jnp.eye(6, dtype=dtype), weights))
    expected = np.linalg.solve(exact.T @ exact + 0.3 * np.eye(15), exact.T @ np.asarray(weights, np.float64))
    assert_equal(found.reshape(-1), expected, {"float64": 1e-9, "float32": 1e-4}[dtype])
    assert_differs(found.reshape(-1), exact.T @ np.asarray(weights, np.float64) / 0.3)  # the control


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "order"), [("rows", "gram"), ("rows", "gradients"), ("gradients", None)])
@pytest.mark.parametrize("workspace", [1, 5000])
def test_pieces_change_nothing_and_bound_what_is_formed(kind, order, workspace):
    rows, columns, positions = (30, 20, 2) if order == "gradients" else (5, 4, 12)
    layer, evidence = spatial(7, positions, rows, columns, draws=2)

    def whole(workspace):
        return lambda evidence: samples.kernel(kept(kind, layer, evidence, workspace), workspace, order)

    assert_equal(whole(workspace)(evidence), whole(samples.WORKSPACE)(evidence))
    if order:
        least, most = (largest(whole(some), evidence) for some in (1, samples.WORKSPACE))
        assert least <= most / 3


def largest(function, *args):
    """How many numbers the largest array has that a function forms."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(value, "jaxpr"):
                    yield from sizes(value.jaxpr)

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.usefixtures("x64")
def test_the_cheaper_order_is_taken():
    def flops(rows, columns, positions, order):
        layer, evidence = spatial(4, positions, rows, columns)
        seen = kept("rows", layer, evidence)
        cost = jax.jit(lambda seen: samples.kernel(seen, samples.WORKSPACE, order)).lower(seen).compile()
        return cost.cost_analysis()["flops"]

    for shape, better, worse in (((40, 30, 2), "gram", "gradients"), ((6, 5, 40), "gradients", "gram")):
        assert flops(*shape, None) == flops(*shape, better) < flops(*shape, worse)


def test_what_is_smaller_is_kept():
    for positions, rows, columns, kind in (
        (1, 9, 7, Rows),
        (3, 9, 7, Rows),
        (5, 9, 7, Gradients),
        (50, 9, 7, Gradients),
    ):
        layer = ng.Layer("layer", "dense", (rows, columns), (), uses=(Use("dense", None, positions),))
        both = [6 * positions * (rows + columns), 6 * rows * columns]
        found = samples.empty(layer, 6, 1, "example")
        assert isinstance(found, kind)
        assert sum(leaf.size for leaf in jax.tree.leaves(found)) == min(both)
        assert isinstance(samples.empty(layer, 6, 1, "reduce"), Rows)


# C61 ------------------------------------------------------------------------------------------------------------------


def reduced(layer, evidence):
    """The kernel of pooled positions."""
    like = samples.empty(layer, evidence.inputs[0].shape[0], 1, "reduce")
    return samples.kernel(samples.observed(layer, like, evidence, "reduce", samples.WORKSPACE), samples.WORKSPACE)


@pytest.mark.slow
def test_c61_pooled_positions_are_exact_where_the_cotangents_are_the_same_at_all_of_them(dtype):
    layer, evidence = spatial(6, 7, 5, 3, dtype=dtype)
    (g,) = evidence.cotangents
    constant = evidence._replace(cotangents=(jnp.broadcast_to(g[:, :, :1], g.shape),))
    exact = jacobian(layer, constant)
    assert_equal(reduced(layer, constant), exact @ exact.T)
    by_sums = (
        np.asarray(constant.inputs[0].sum(1), np.float64),
        np.asarray(constant.cotangents[0][0].sum(1), np.float64),
    )
    summed = (by_sums[0] @ by_sums[0].T) * (by_sums[1] @ by_sums[1].T) / 6  # the control: the sum on both sides
    np.testing.assert_allclose(summed / (exact @ exact.T), 49, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_c61_the_error_is_small_on_smooth_data_and_large_on_noise():
    def of(smoothness):
        layer, evidence = spatial(32, 49, 5, 3)

        def smooth(x):
            mean = x.mean(-2, keepdims=True)
            return mean + (x - mean) * (1 - smoothness)

        evidence = evidence._replace(inputs=(smooth(evidence.inputs[0]),), cotangents=(smooth(evidence.cotangents[0]),))
        exact = jacobian(layer, evidence)
        return error(reduced(layer, evidence), exact @ exact.T)

    assert of(0.99) < 0.05 and of(0.0) > 0.5


@pytest.mark.parametrize("change", ["examples", "draws"])
def test_a_batch_for_which_there_is_no_room_is_refused(change):
    layer, evidence = spatial(6, 1, 5, 3, dtype="float32")
    like = samples.empty(layer, 5 if change == "examples" else 6, 2 if change == "draws" else 1, "example")
    if change == "examples":
        with pytest.raises(ValueError, match=r"room for \(5, 1, 5\)"):
            samples.observed(layer, like, evidence, "example", samples.WORKSPACE)
    else:
        with pytest.raises(ValueError, match="2 draws"):
            samples.observed(layer, like, evidence, "example", samples.WORKSPACE)


def test_evidence_without_cotangents_is_refused():
    layer, evidence = spatial(6, 1, 5, 3, dtype="float32")
    with pytest.raises(ValueError, match="forward"):
        samples.observed(layer, samples.empty(layer, 6, 1, "example"), evidence._replace(cotangents=None), "example", 1)
