"""Numbers of seeds for reading, and tables as Markdown."""

import numpy as np
from rich.table import Table

from experiments.tables import by_seed, markdown, spread


def test_numbers_of_seeds_are_a_median_with_a_range_and_one_is_a_number():
    assert spread(np.array([3.0, 1.04, 2.0]), 1) == "2.0 [1.0, 3.0]"
    assert spread(np.array([1.25]), 2) == "1.25"
    assert spread(np.array([1.0, np.inf, np.inf]), 1) == "1.0, 2 of 3 diverged"
    assert spread(np.array([1.0, np.nan, 3.0]), 0) == "2 [1, 3], 1 of 3 diverged"
    assert spread(np.array([np.inf]), 1) == "-"


def test_an_entry_by_seed_is_infinite_where_the_run_diverged():
    seeds = [[{"loss": 2.0}, {"loss": 1.0}], [{"loss": 3.0}, {"loss": None}]]
    np.testing.assert_array_equal(by_seed(seeds, "loss"), [[2.0, 1.0], [3.0, np.inf]])


def test_a_table_as_markdown_has_its_title_its_caption_and_a_cell_on_one_line():
    table = Table(title="Losses", caption="of three")
    table.add_column("method")
    table.add_column("epoch\n1", justify="right")
    table.add_row("a|b", "1\n2")
    assert markdown(table) == ("**Losses**\n\n| method | epoch 1 |\n| --- | ---: |\n| a\\|b | 1 2 |\n\nof three")
