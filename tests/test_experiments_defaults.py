"""The experiment on defaults, from its configuration to its tables."""

import numpy as np
import pytest
from rich.console import Console

from experiments import defaults


@pytest.mark.slow
def test_both_tables_have_a_cell_for_every_run():
    config = defaults.Config(
        nets=("dense",), methods=("kfac",), rates=(0.01, 1.0), steps=3, batch=16, batches=(8, 16), seeds=2
    )
    done = []
    first, second = defaults.run(config, done.append)
    assert [record.row for record in first[::2]] == ["optax.adam", "kfac", "kfac, kl_clip=None"]
    assert [record.row for record in second[::2]] == ["optax.adam, 0.01", "kfac, 0.1", "kfac, no rate"]
    assert len(done) == 6 and all(len(record.losses) == 2 for record in second)
    assert all(np.isclose(record.start, first[0].start) for record in first)
    console = Console(width=200, record=True)
    for records in (first, second):
        console.print(defaults.table(records, "title"))
    assert "kfac, no rate" in console.export_text()


def test_a_loss_above_its_start_is_told():
    assert defaults._cell(defaults.Record("net", "row", "1", (3.0,), 2.0)) == "over"
    assert defaults._cell(defaults.Record("net", "row", "1", (0.5, 1.0, np.inf), 2.0)) == "1 (over)"
