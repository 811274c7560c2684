"""The map of costs over width and batch, in small."""

import json
from dataclasses import replace

import pytest

from experiments import crossover


@pytest.fixture
def config(tmp_path):
    """Two cells of two methods."""
    return crossover.Config(output=tmp_path, widths=(4, 8), batches=(3,), rounds=1, block=0)


@pytest.mark.full
def test_every_cell_is_measured_and_shown(config):
    records = crossover.run(config)
    assert [(record["width"], record["batch"]) for record in records] == [(4, 3), (8, 3)]
    lines = (config.output / "crossover.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    for record in records:
        assert min(record["step"], record["refresh"]) > 0
        width, batch = record["width"], record["batch"]
        formula = 4 * (2 * width * batch + batch**2), 16 * width**2  # rows and kernel; factors and their inverses
        for size, least in zip(record["bytes"], formula, strict=True):
            assert least < size < least + 64  # counters
    assert crossover.table(records).row_count == 2
    assert len(crossover.picture(records).axes) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", crossover.METHODS)
def test_a_step_is_due_for_no_refresh_and_a_refresh_does_both(name, config):
    bench = crossover.Bench(name, 4, 3, config)
    bench.steps(5)
    assert int(bench.state.metrics.refreshes) == int(bench.state.metrics.statistics) == 1
    bench.refresh()
    assert int(bench.state.metrics.refreshes) == int(bench.state.metrics.statistics) == 2


def test_an_unknown_method_is_refused(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'K-FAC'"):
        crossover.run(replace(config, pair=("KFAC", "K-FAC")))
