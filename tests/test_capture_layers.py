"""Every layer option: the rows that are captured give the outputs and, with the cotangents, the gradient."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from options import CONV, LAYERS

import natgrad_jax as ng
from natgrad_jax.layers.rows import from_matrix, gradient_matrix, input_rows, output_rows, to_matrix

pytestmark = pytest.mark.usefixtures("x64")
MORE = {
    "dense on sequences without bias",
    "dense on images",
    "conv without bias",
    "conv 1d of an int",
    "strides",
    "valid",
    "padding of an int",
    "padding of ints",
    "padding of an int and a pair",
    "circular with strides and kernel dilation",
    "reflect with kernel dilation",
    "causal with strides and kernel dilation",
    "input dilation that is cropped",
    "groups without bias",
    "groups 1d with strides",
    "groups over further batch axes",
    "depthwise with a multiplier",
}
"""Other ways to write what others stand for, and options together that are tried one by one."""


def rows(options):
    """The rows of a table of options, those of `MORE` with `-m full` alone."""
    return [pytest.param(name, marks=pytest.mark.full) if name in MORE else name for name in options]


every_option = pytest.mark.parametrize("option", rows(LAYERS))


class Seen(NamedTuple):
    """One layer on one batch: what the package captured, and what plain jax says."""

    layer: ng.Layer
    evidence: ng.Evidence
    rows: Any
    columns: Any
    weights: Any
    leaves: Any
    outputs: Any
    gradient: Any


@cache
def seen(option: str, dtype: str = "float64") -> Seen:
    """A layer in a model of its own, with the squared error of true labels."""
    module, shape = LAYERS[option]
    model = nn.Sequential([module])
    x = reference.normal(*shape, dtype=dtype)
    params = reference.random_params(model, x, dtype=dtype)
    y = reference.normal(*jax.eval_shape(model.apply, {"params": params}, x).shape, seed=1, dtype=dtype)
    capture = ng.linen.capture(model, ng.losses.squared_error, labels="true")
    (layer,) = capture.layers({"params": params}, x).values()

    def plain(params):
        outputs = model.apply({"params": params}, x)
        return 0.5 * jnp.sum((outputs - y) ** 2), outputs

    @jax.jit
    def both(params):
        evidence = capture.value_and_grad({"params": params}, x, y).curvature()[layer.name]
        rows, columns = input_rows(layer, evidence), output_rows(layer, evidence)
        weights, leaves = to_matrix(layer, params["layers_0"]), params["layers_0"]
        gradient, outputs = jax.grad(plain, has_aux=True)(params)
        return Seen(None, evidence, rows, columns, weights, leaves, outputs, gradient["layers_0"])

    return both(params)._replace(layer=layer)


def by_group(values, layer):
    """The columns [..., O] of the groups of a layer apart: [groups, ..., O] if there are groups."""
    return np.stack(np.split(np.asarray(values), layer.geometry.groups, axis=-1)) if layer.grouped else values


def pairs(rows, columns):
    """Sum over examples and positions of a g^T, [S, I, O]."""
    return np.einsum("...nti,...knto->...io", rows, columns)


@every_option
def test_c2_inputs_times_cotangents_are_the_gradient_of_the_summed_loss(option):
    one = seen(option)
    expected = by_group(reference.matrix(one.gradient), one.layer)
    reference.assert_equal(pairs(one.rows, one.columns), expected)
    reference.assert_equal(gradient_matrix(one.layer, one.evidence).squeeze(len(one.layer.stack)), expected)
    of_the_next_example = np.roll(one.columns, 1, axis=-3)
    reference.assert_differs(pairs(one.rows, of_the_next_example), expected)


@every_option
def test_the_layer_knows_beforehand_how_many_positions_its_rows_have(option):
    one = seen(option)
    assert one.layer.positions == one.rows.shape[-2] == one.columns.shape[-2]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["dense", "conv", "groups"])
def test_c2_holds_in_float32(option):
    one = seen(option, "float32")
    found = pairs(one.rows, one.columns)
    assert found.dtype == jnp.float32
    reference.assert_equal(found, by_group(reference.matrix(one.gradient), one.layer))


def test_c2_cotangents_are_of_the_summed_loss_not_of_the_mean():
    one = seen("dense")
    of_the_mean = pairs(one.rows, one.columns / 3)
    reference.assert_equal(3 * of_the_mean, reference.matrix(one.gradient))
    reference.assert_differs(of_the_mean, reference.matrix(one.gradient))


@every_option
def test_c24_rows_times_the_weight_matrix_are_the_outputs(option):
    one = seen(option)
    weights = one.weights[..., None, :, :]
    expected = by_group(one.outputs.reshape(one.outputs.shape[0], -1, one.outputs.shape[-1]), one.layer)
    reference.assert_equal(np.matmul(one.rows, weights), expected)
    if one.layer.shape[0] > 1:
        reference.assert_differs(np.matmul(one.rows, weights[..., ::-1, :]), expected)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("strides of an int", {"padding": ((0, 1), (0, 1))}),
        ("same", {"padding": ((1, 0), (1, 0))}),
        ("padding of pairs", {"padding": ((2, 0), (1, 0))}),
        ("kernel dilation", {"kernel_dilation": (1, 1)}),
        ("both dilations and strides", {"strides": (2, 2)}),
        ("reflect", {"padding": ((1, 1), (1, 1))}),
    ],
)
def test_c24_fails_with_the_geometry_of_another_layer(option, wrong):
    one = seen(option)
    (use,) = one.layer.uses
    other = replace(one.layer, uses=(use._replace(geometry=replace(use.geometry, **wrong)),))
    found = np.matmul(jax.jit(partial(input_rows, other))(one.evidence), one.weights)
    expected = one.outputs.reshape(one.outputs.shape[0], -1, one.outputs.shape[-1])
    assert found.shape != expected.shape or reference.error(found, expected) > reference.CONTROL


@every_option
def test_the_weight_matrix_holds_the_kernel_and_then_the_bias_and_turns_back(option):
    layer, weights, leaves = (one := seen(option)).layer, one.weights, one.leaves
    assert weights.shape == layer.stack + layer.shape
    np.testing.assert_array_equal(weights, by_group(reference.matrix(leaves), layer))
    back = from_matrix(layer, weights)
    assert back.keys() == leaves.keys()
    for role, leaf in leaves.items():
        np.testing.assert_array_equal(back[role], leaf)


@pytest.mark.parametrize("option", rows(CONV))
def test_every_group_of_a_convolution_is_a_copy_in_the_stack(option):
    groups = CONV[option][0].feature_group_count
    assert seen(option).layer.stack == ((groups,) if groups > 1 else ())


def test_a_model_that_is_itself_a_layer_is_named_by_its_type():
    model, x = nn.Dense(3), reference.normal(4, 2)
    capture = ng.linen.capture(model, ng.losses.squared_error)
    assert list(capture.layers({"params": reference.random_params(model, x)}, x)) == ["Dense"]
