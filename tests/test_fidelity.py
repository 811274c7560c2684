"""The errors and angles of the experiment on fidelity, against dense matrices on small problems."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import watching
from jax.flatten_util import ravel_pytree
from one_layer import Walk
from reference import assert_differs, assert_equal
from rich.console import Console

from experiments import fidelity
from experiments.data import Data, Part
from experiments.directions import DIRECTIONS, Batches, angles, direction, natural_gradient
from experiments.fidelity import BEST, METHODS, NAMES, NO_WORSE
from experiments.nets import Convnet, Perceptron

LAYERS = ("Conv_0", "Dense_0", "Dense_1")


@pytest.fixture(autouse=True)
def double(x64):
    """Double precision."""


@cache
def net():
    """A convolution and two dense layers on random images, watched; and the dense block of each layer."""
    model = Convnet((2,), (2,), (3,))
    x = reference.normal(7, 4, 4, 1)
    return watching.watched(model, reference.random_params(model, x), x, "softmax_cross_entropy")


@cache
def found(layer):
    """{method: error} by the experiment."""
    return fidelity.errors(net().layers[layer], net().evidence[layer])


@cache
def implied_blocks(method):
    """What a method stands for, by the matrix that it multiplies gradients with."""
    return watching.implied_blocks(Walk(METHODS[method]), net())


@pytest.mark.full
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_error_of_a_method_is_that_of_the_matrix_it_stands_for(method, layer):
    assert_equal(found(layer)[method], reference.error(implied_blocks(method)[layer], net().blocks[layer]))


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_the_best_product_is_the_largest_singular_pair_of_the_arranged_block(layer):
    assert_equal(found(layer)[BEST], reference.best_kronecker_error(net().blocks[layer], net().layers[layer].shape))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NO_WORSE)
def test_the_theorems_hold_in_every_layer(name, layer):
    assert fidelity.holds(found(layer), name)


@pytest.mark.parametrize("name", NO_WORSE)
def test_a_broken_theorem_is_counted_as_broken(name):
    assert not fidelity.holds(dict.fromkeys(NAMES, 0.5) | {name: 0.6}, name)


def test_a_scale_measured_in_another_basis_breaks_the_theorem():
    ekfac, evidence, layer = METHODS["EKFAC"], net().evidence["Conv_0"], net().layers["Conv_0"]

    def rescale(layer, operator, evidence):
        _, start = ekfac.init(layer)  # whose basis is the identity
        return operator._replace(scale=ekfac.rescale(layer, start, evidence).scale)

    wrong = ekfac._replace(rescale=rescale)
    implied = jax.jit(lambda evidence: fidelity.implied(wrong, layer, evidence))(evidence)
    error = reference.error(implied, fidelity.exact(layer, evidence))
    assert_differs(error, found("Conv_0")["EKFAC"])
    assert not fidelity.holds(found("Conv_0") | {"EKFAC": error}, "EKFAC")


@cache
def small():
    """A tanh net on random images with true labels, watched by labels that are summed over; and its gradient."""
    model, x = Perceptron((3,), 10), reference.normal(6, 2, 2, 1)
    params = reference.random_params(model, x)
    y = reference.targets("softmax_cross_entropy", (6, 10))
    return model, params, Batches(x, y, (x[None, :4], y[None, :4]))


def test_the_exact_direction_solves_with_the_dense_fisher_of_all_parameters():
    model, params, given = small()
    fisher = reference.fisher(model, params, "softmax_cross_entropy", given.images, given.labels)

    @jax.jit
    def gradient_at(params):
        def loss(params):
            outputs = model.apply({"params": params}, given.images)
            return reference.mean_loss("softmax_cross_entropy", outputs, given.labels)

        return ravel_pytree(jax.grad(loss)(params))[0]

    gradient = gradient_at(params)
    expected = np.linalg.solve(reference.damped(fisher, 0.01), gradient)
    assert_equal(natural_gradient(model, params, given.images, given.labels, 0.01), expected)


@pytest.mark.full
def test_the_joint_block_of_tengrad_has_the_exact_direction_and_its_layers_alone_have_not():
    model, params, given = small()
    aim = np.asarray(natural_gradient(model, params, given.images, given.labels, 0.01))
    joint, layers = (
        next(each for each in angles(name, model, params, given, aim, 0.01, 1) if each["same"])
        for name in ("TENGraD, joint", "TENGraD")
    )
    assert joint["error"] < 1e-9 and joint["cosine"] > 1 - 1e-12
    assert layers["error"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["K-BFGS", "gradient"])
def test_a_direction_points_uphill_as_the_gradient_does(name):
    model, params, given = small()
    aim = np.asarray(natural_gradient(model, params, given.images, given.labels, 0.01))
    assert all(each["cosine"] > 0 for each in angles(name, model, params, given, aim, 0.01, 1))


@pytest.mark.full
def test_what_sees_minibatches_has_another_direction_after_others():
    model, params, given = small()
    other = given._replace(stream=(given.images[None, 2:], given.labels[None, 2:]))
    found = direction(DIRECTIONS["Shampoo"], model, 1)
    assert_differs(found(params, given, 1e-5), found(params, other, 1e-5))


@pytest.mark.slow
@pytest.mark.full  # what it puts together is tested part by part below
def test_every_layer_of_both_models_is_measured_twice_and_shown_and_every_method_beside_the_exact_direction():
    small = fidelity.Sizes(300, 20, 10, draws=5, batches=5, steps=5)
    nets = {"dense net": Perceptron((4,), 10), "CNN": Convnet((2,), (2,), (3,))}
    with jax.enable_x64(False):
        found = fidelity.run(None, small, nets)
    blocks = [row for row in found if "layer" in row]
    assert [row["layer"].split()[0] for row in blocks] == ["Dense_0", "Dense_1"] * 2 + [*LAYERS] * 2
    assert all(fidelity.holds(row, name) for row in blocks for name in NO_WORSE)
    assert blocks[0]["EKFAC"] != blocks[2]["EKFAC"], "training changed nothing"
    angles = [row for row in found if "method" in row]
    assert [*dict.fromkeys((row["stage"], row["method"]) for row in angles)] == [
        (stage, name) for stage in ("start", "trained") for name in DIRECTIONS
    ]
    assert np.all(np.isfinite([row["cosine"] for row in angles]))
    assert sum(row["method"] == "SOAP" and row["stage"] == "start" for row in angles) == 5
    console = Console(width=80, record=True, quiet=True)
    console.print(fidelity.table(found))
    figure = fidelity.picture(found)
    assert [len(axis.patches) for axis in figure.axes] == [8, 8, 12, 12, len(DIRECTIONS), len(DIRECTIONS)]


def test_images_of_either_source_have_16x16_pixels_between_0_and_1(monkeypatch):
    pixels = np.zeros((3, 28, 28, 1), np.float32)
    pixels[1] = 1
    part = Part(pixels, np.array([7, 8, 9], np.int32))
    monkeypatch.setattr(fidelity, "mnist", lambda given: Data("mnist", part, part))
    mnist = fidelity.load(Path("folder"), 2)
    assert mnist.images.shape == (2, 16, 16, 1) and mnist.labels.tolist() == [7, 8]
    assert_equal(mnist.images.mean(axis=(1, 2, 3)), [0.0, 1.0])
    digits = fidelity.load(None, 10_000).images
    assert digits.shape == (1500, 16, 16, 1) and digits.min() == 0 and digits.max() == 1
