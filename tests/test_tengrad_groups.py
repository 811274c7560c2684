"""TENGraD by a grouping that the user gives: a group is one exact block of the curvature, each other layer another."""

import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from reference import assert_differs, assert_equal, damped
from test_tengrad import direction_on_net, net

import natgrad_jax as ng

DAMPING = 1e-2
BODY = {"body": ("layer_b", "layer_c")}


def direction(blocks):
    """Gradient and direction on the reference net 5-4-3-3, whose layers are called b, c, a."""
    return direction_on_net(lambda layers: ng.scale_by_tengrad(layers, damping=DAMPING, blocks=blocks))


def dense(*groups):
    """The damped solve with the dense Fisher matrix, of which the products between groups are zero."""
    model, params, x, y, _, _ = net()
    full = np.asarray(reference.fisher(model, params, "softmax_cross_entropy", x, y))
    index = {name: i for i, group in enumerate(groups) for name in group}
    of = ravel_pytree({
        name: {k: np.full(v.shape, index[name]) for k, v in one.items()} for name, one in params.items()
    })
    gradient, _ = direction("joint")
    return np.linalg.solve(damped(np.where(of[0][:, None] == of[0], full, 0), DAMPING), np.asarray(gradient))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_each_group_is_an_exact_block_and_so_is_each_other_layer():
    _, found = direction(BODY)
    expected = dense(("layer_b", "layer_c"), ("layer_a",))
    assert_equal(found, expected, 1e-9)
    assert_differs(dense(("layer_b",), ("layer_c",), ("layer_a",)), expected)  # the control: another grouping
    assert_equal(direction({"all": ("layer_a", "layer_b", "layer_c")})[1], direction("joint")[1])


def test_the_state_has_the_blocks_by_their_names():
    *_, layers = net(dtype="float32")
    state = ng.scale_by_tengrad(layers, damping=DAMPING, blocks=BODY).init(net(dtype="float32")[1])
    assert set(state.operators) == {"body", "layer_a"}
    assert len(state.operators["body"].value.jacobians) == 2


@pytest.mark.parametrize(
    ("blocks", "error", "sentence"),
    [
        (
            {"body": ("layer_b", "layer_x")},
            ValueError,
            r"names 'layer_x', which is no layer .* expected names of these: 'l",
        ),
        ({"one": ("layer_b",), "two": ("layer_b",)}, ValueError, "names 'layer_b' twice; a layer is in one block"),
        ({"layer_a": ("layer_b",)}, ValueError, "calls a block 'layer_a', which is the name of a layer outside of it"),
        ({"body": "layer_b"}, TypeError, "expected one of its words, or a mapping like"),
        (("layer_a", "layer_b"), TypeError, "expected one of its words, or a mapping like"),
        ({"body": ()}, TypeError, "expected one of its words, or a mapping like"),
        ("joined", ValueError, "`blocks` is 'joined'"),
    ],
)
def test_other_groups_are_refused(blocks, error, sentence):
    *_, layers = net(dtype="float32")
    with pytest.raises(error, match=sentence):
        ng.scale_by_tengrad(layers, damping=DAMPING, blocks=blocks)


def test_nothing_is_kept_of_all_layers_only():
    *_, layers = net(dtype="float32")
    with pytest.raises(ValueError, match="`kept=False` is the exact direction"):
        ng.scale_by_tengrad(layers, damping=DAMPING, blocks=BODY, kept=False, refresh_every=1)
