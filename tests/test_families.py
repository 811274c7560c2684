"""The families of nets that people train: seen whole, verified, and told apart by whether they mix examples."""

import families
import pytest
from methods_table import task

LAYERS = {
    "dilated": ("Conv_0", "Conv_1", "Dense_0"),
    "transformer": (
        "Embed_0",
        *(f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value", "out")),
        "Dense_1",
        "Dense_0",
    ),
    "resnet": ("Conv_0", "ScanBlock_0/Conv_0", "Dense_0"),
    "lstm": ("OptimizedLSTMCell_0/hi+hf+hg+ho", "OptimizedLSTMCell_0/ii+if+ig+io", "Dense_0"),
}


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("name", families.NETS)
def test_every_kernel_of_a_family_is_a_layer_that_passes_verification(name):
    task.cache_clear()  # of what was found without it
    found = task(name)
    task.cache_clear()
    assert set(found.layers) == set(LAYERS[name])
    assert not found.capture.watch.unexplained
    assert all("Norm" in block.name for block in found.layers.rest)
    assert found.layers.mixed == (("Conv_0", "ScanBlock_0/Conv_0") if name == "resnet" else ())
