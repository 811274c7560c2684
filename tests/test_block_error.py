"""The errors of the experiment on Fisher blocks, against those of dense matrices on small problems."""

import gzip
from functools import cache

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference
import watching
from reference import assert_differs, assert_equal
from rich.console import Console

from experiments import block_error
from experiments.block_error import BEST, METHODS, NAMES, NO_WORSE

TINY = block_error.Config(
    data=None, images=40, examples=6, widths=(), channels=(2,), hidden=3, steps=2, batch=5, learning_rate=0.1
)

LAYERS = ("Conv_0", "Dense_0", "Dense_1")


@pytest.fixture(autouse=True)
def double(x64):
    """Double precision."""


@cache
def net():
    """A convolution and two dense layers on random images, watched; and the dense block of each layer."""
    model = block_error.Convolutional(channels=(2,), hidden=3)
    x = reference.normal(7, 4, 4, 1)
    return watching.watched(model, reference.random_params(model, x), x, "softmax_cross_entropy")


@cache
def found(layer):
    """{method: error} by the experiment."""
    return block_error.errors(net().layers[layer], net().evidence[layer])


@cache
def implied_blocks(method):
    """What a method stands for, by the matrix that it multiplies gradients with."""
    return watching.implied_blocks(METHODS[method].method, net())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_error_of_a_method_is_that_of_the_matrix_it_stands_for(method, layer):
    assert_equal(found(layer)[method], reference.error(implied_blocks(method)[layer], net().blocks[layer]))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_best_product_is_the_largest_singular_pair_of_the_arranged_block(layer):
    assert_equal(found(layer)[BEST], reference.best_kronecker_error(net().blocks[layer], net().layers[layer].shape))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NO_WORSE)
def test_the_theorems_hold_in_every_layer(name, layer):
    assert block_error.holds(record(found(layer)), name)


@pytest.mark.parametrize("name", NO_WORSE)
def test_a_broken_theorem_is_counted_as_broken(name):
    assert not block_error.holds(record(dict.fromkeys(NAMES, 0.5) | {name: 0.6}), name)


def test_a_scale_measured_in_another_basis_breaks_the_theorem():
    ekfac, evidence, layer = METHODS["EKFAC"].method, net().evidence["Conv_0"], net().layers["Conv_0"]

    def rescale(layer, state, evidence):
        start = ekfac.init(layer)  # whose basis is the identity
        return state._replace(scale=ekfac.rescale(layer, start, evidence).scale)

    wrong = METHODS["EKFAC"]._replace(method=ekfac._replace(rescale=rescale))
    implied = jax.jit(lambda evidence: block_error.implied(wrong, layer, evidence))(evidence)
    error = reference.error(implied, block_error.exact(layer, evidence))
    assert_differs(error, found("Conv_0")["EKFAC"])
    assert not block_error.holds(record(found("Conv_0") | {"EKFAC": error}), "EKFAC")


@pytest.mark.slow
def test_every_layer_of_both_models_is_measured_twice_and_shown():
    with jax.enable_x64(False):
        records = block_error.run(TINY)
    layers = ["Dense_0"] * 2 + [*LAYERS] * 2
    assert [each.layer.name for each in records] == layers
    assert all(block_error.holds(each, name) for each in records for name in NO_WORSE)
    assert records[0].errors != records[1].errors, "training changed nothing"
    console = Console(width=80, record=True, quiet=True)
    console.print(block_error.table(records, TINY))
    figure = block_error.picture(records, TINY)
    assert [len(axis.patches) for axis in figure.axes] == [4, 4, 12, 12]
    plt.close(figure)


def test_images_of_either_source_have_16x16_pixels_between_0_and_1(tmp_path):
    pixels = np.zeros((3, 28, 28), np.uint8)
    pixels[1] = 255
    (tmp_path / "mnist").mkdir()
    for file, content in {
        "images-idx3": bytes(16) + pixels.tobytes(),
        "labels-idx1": bytes(8) + bytes([7, 8, 9]),
    }.items():
        (tmp_path / "mnist" / f"train-{file}-ubyte.gz").write_bytes(gzip.compress(content))
    mnist = block_error.load(block_error.Config(data=tmp_path, images=2))
    assert mnist.images.shape == (2, 16, 16, 1) and mnist.labels.tolist() == [7, 8]
    assert_equal(mnist.images.mean(axis=(1, 2, 3)), [0.0, 1.0])
    digits = block_error.load(block_error.Config(data=None)).images
    assert digits.shape == (1797, 16, 16, 1) and digits.min() == 0 and digits.max() == 1


def record(errors):
    return block_error.Record("", "", 0.0, None, errors)
