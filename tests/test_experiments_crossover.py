"""The map of costs over width and batch, in small."""

import json
from dataclasses import replace

import pytest

from experiments import crossover


@pytest.fixture
def config(tmp_path):
    """Two cells of two methods."""
    return crossover.Config(output=tmp_path, pair=("EKFAC", "K-FAC"), widths=(4, 8), batches=(3,), rounds=1, block=0)


@pytest.mark.slow
def test_every_cell_is_measured_and_shown(config):
    records = crossover.run(config)
    assert [(record["width"], record["batch"]) for record in records] == [(4, 3), (8, 3)]
    lines = (config.output / "crossover.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    for record in records:
        assert min(record["step"], record["refresh"]) > 0
        assert record["bytes"][0] - record["bytes"][1] == 4 * (record["width"] ** 2 + 1)  # the scale, and its weight
    assert crossover.table(records, config).row_count == 2
    assert len(crossover.picture(records, config).axes) == 3


@pytest.mark.slow
def test_a_step_is_due_for_no_refresh_and_a_refresh_does_both(config):
    bench = crossover.Bench("K-FAC", 4, 3, config)
    bench.steps(5)
    assert int(bench.state.metrics.refreshes) == int(bench.state.metrics.statistics) == 1
    bench.refresh()
    assert int(bench.state.metrics.refreshes) == int(bench.state.metrics.statistics) == 2


def test_an_unknown_method_is_refused(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'K-FAC'"):
        crossover.run(replace(config, pair=("KFAC", "K-FAC")))
