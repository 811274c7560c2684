"""Parameters used inside of a `jax.shard_map`: followed where devices have parts of the examples, named elsewhere.

Here on one device; on four in a process of its own, because the number of devices is settled when JAX starts.
"""

import json

import jax
import pytest
import shards_table as table
from devices import on_devices

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import shards_table as table
print(json.dumps({"sizes": table.SIZES, "explained": table.explained(table.FOLLOWED), "without": table.without_order(),
                  "said": {name: table.said(name) for name in table.REFUSED},
                  "mixed": {name: table.mixed(name) for name in table.MIXED}}))
"""
pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="JAX 0.8 does not batch the pullback of one"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", table.FOLLOWED)
def test_c2_rows_of_a_shard_map_give_the_gradient_of_every_example(name):
    assert table.explained([name]) == {name: ""}


@pytest.mark.filterwarnings("ignore:.*no layer")
@pytest.mark.parametrize("name", table.REFUSED)
def test_what_is_not_followed_in_a_shard_map_is_named(name):
    assert table.said(name) == ""


@pytest.mark.verified
def test_layers_behind_which_a_shard_map_mixes_examples_are_said():
    assert table.mixed("a mean over the batch") == ("w",)


@pytest.mark.full
def test_c2_over_four_devices_rows_of_a_shard_map_give_the_gradient_of_every_example():
    found = json.loads(on_devices(4, SCRIPT, timeout=560))
    assert found["sizes"] == [2, 2]
    assert found["explained"] == dict.fromkeys(table.FOLLOWED, "")
    assert "differs" in found["without"]
    assert found["said"] == dict.fromkeys(table.REFUSED, "")
    assert found["mixed"] == {name: ["w"] for name in table.MIXED}
