"""The families of nets that people train: seen whole, verified, and told apart by whether they mix examples."""

import families
import pytest
from methods_table import task


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("name", families.NETS)
def test_every_kernel_of_a_family_is_a_layer_that_passes_verification(name):
    task.cache_clear()  # of what was found without it
    found = task(name)
    task.cache_clear()
    assert set(found.layers) == set(families.LAYERS[name])
    assert not found.capture.watch.unexplained
    assert all("Norm" in block.name for block in found.layers.rest)
    assert found.layers.mixed == (("Conv_0", "ScanBlock_0/Conv_0") if name == "resnet" else ())
