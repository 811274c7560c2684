"""Which rows of a slow table run in the suite."""

import pytest
from conftest import sample


@pytest.mark.parametrize("count", [1, 2, 3, 11, 40])
def test_as_many_rows_run_as_are_asked_for_each_a_row_of_the_table(count):
    for name in ("test_a", "test_b", "test_c"):
        rows = sample(name, count)
        assert len(rows) == 1 and rows <= set(range(count)) and rows == sample(name, count)


@pytest.mark.parametrize("count", [1, 2, 3, 11, 40])
def test_of_a_larger_sample_no_row_runs_twice(count):
    assert len(sample("test_a", count, size=3)) == min(3, count)


def test_together_the_tests_run_every_row():
    assert set.union(*(sample(f"test_{i}", 11) for i in range(40))) == set(range(11))
    assert len(sample("test_a", 11)) < 11


def test_a_row_that_others_stand_for_is_full_and_one_of_a_whole_table_is_not(request):
    items = request.session.items  # what was asked for, hence without the rows that are left out
    tables = {}
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("whole"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = request.config.option.markexpr
    assert "full" not in chosen or "not full" not in chosen or all(len(rows) == 1 for rows in tables.values())
