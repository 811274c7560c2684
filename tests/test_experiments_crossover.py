"""The map of costs over width and batch, in small."""

import pytest

from experiments import crossover


@pytest.mark.full
def test_every_cell_is_measured_and_shown(monkeypatch):
    monkeypatch.setattr(crossover, "ROUNDS", 1)
    records = [crossover.cell(width, 3) for width in (4, 8)]
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
def test_a_step_is_due_for_no_refresh_and_a_refresh_does_both(name):
    bench = crossover.Bench(name, 4, 3)
    bench.time("step", 5)
    assert int(bench.state.metrics.refreshes) == int(bench.state.metrics.statistics) == 1
    bench.time("refresh")
    assert int(bench.state.metrics.refreshes) == int(bench.state.metrics.statistics) == 2
