"""The families of nets that people train: seen whole, verified, and told apart by whether they mix examples."""

import families
import pytest
from methods_table import task

import natgrad_jax as ng


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("name", families.NETS)
def test_every_kernel_of_a_family_is_a_layer_that_passes_verification(name):
    problem = task(name)
    capture = ng.linen.capture(problem.capture.model, ng.losses.softmax_cross_entropy)  # those of tasks do not verify
    layers = capture.layers(problem.variables, problem.x[0])
    assert set(layers) == set(families.LAYERS[name])
    assert not capture.watch.unexplained
    assert all("Norm" in block.name for block in layers.rest)
    assert layers.mixed == (("Conv_0", "ScanBlock_0/Conv_0") if name == "resnet" else ())
