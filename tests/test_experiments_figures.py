"""Numbers of seeds for reading, tables as Markdown, curves."""

import numpy as np
from rich.table import Table

from experiments.figures import curves, ends, markdown, middle, outcome, spread, table


def test_numbers_of_seeds_are_a_median_with_a_range_and_one_is_a_number():
    assert spread(np.array([3.0, 1.04, 2.0]), 1) == "2.0 [1.0, 3.0]"
    assert spread(np.array([1.25]), 2) == "1.25"
    assert spread(np.array([1.0, np.inf, np.inf]), 1) == "1.0, 2 of 3 diverged"
    assert spread(np.array([1.0, np.nan, 3.0]), 0) == "2 [1, 3], 1 of 3 diverged"
    assert spread(np.array([np.inf]), 1) == "-"


def test_a_table_as_markdown_has_its_title_its_caption_and_a_cell_on_one_line():
    table = Table(title="Losses", caption="of three")
    table.add_column("method")
    table.add_column("epoch\n1", justify="right")
    table.add_row("a|b", "1\n2")
    assert markdown(table) == ("**Losses**\n\n| method | epoch 1 |\n| --- | ---: |\n| a\\|b | 1 2 |\n\nof three")


def test_a_line_stands_where_the_first_of_several_names_changes():
    found = table("Losses", ("problem", "method", "loss"), [("a", "x", "1"), ("a", "y", "2"), ("b", "x", "3")], names=2)
    assert [row.end_section for row in found.rows] == [False, True, False]
    assert [column.justify for column in found.columns] == ["left", "left", "right"]


def test_curves_have_a_row_of_panels_for_a_problem_and_the_middle_run_of_a_method_is_thick():
    ends_of = {("one", "Adam"): (3.0, 1.0, 2.0), ("one", "K-FAC"): (None,), ("two", "Adam"): (1.0,)}
    rows = [
        {"problem": problem, "name": name, "steps": [0, 5], "seconds": [0.0, 1.0], "losses": [4.0, end]}
        for (problem, name), last in ends_of.items()
        for end in last
    ]
    assert middle(rows[:3]) is rows[2] and list(ends(rows[2:4])) == [2.0, np.inf]
    figure = curves(rows, "loss", across="linear", rivals=("K-FAC", "Adam"))
    assert [len(axis.lines) for axis in figure.axes] == [5, 5, 2, 2]
    assert [axis.lines[-1].get_ydata()[0] for axis in figure.axes] == [np.inf, np.inf, 1.0, 1.0]
    assert [len(axis.lines) for axis in curves(rows, "loss").axes] == [4, 4, 1, 1]
    assert [line.get_linewidth() for line in figure.axes[0].lines[:3]] == [0.6, 0.6, 1.8]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["Adam", "K-FAC"]


def test_a_run_that_begins_at_its_level_has_no_pace_and_no_ratio_to_it():
    begins = {"problem": "p", "name": "A", "numbers": {}, "steps": [0], "seconds": [0.0], "losses": [1.0], "seed": 0}
    comes = begins | {"name": "B", "steps": [0, 5], "seconds": [0.0, 1.0], "losses": [3.0, 1.0]}
    found = outcome([begins, comes], "title", ("A", "B"), (2.0,))
    assert [[*column.cells] for column in found.columns[3:]] == [
        ["-", "200"],
        ["0 / 0 s", "5 / 1 s"],
        ["-", "-"],
        ["0.00", "1.00"],
    ]
