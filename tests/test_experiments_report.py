"""One page of all that was found: every run of the committed results is on it, and the goals are told as they are."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import figures, report
from experiments.records import kept

RESULTS = Path(report.__file__).parent / "results"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the committed results."""
    return Path(shutil.copytree(RESULTS, tmp_path_factory.mktemp("results") / "results"))


def drawn_in_little(figure, path):
    """A picture anew where it belongs, but empty: that it is made, not how it looks, is the matter of the page."""
    for axis in figure.axes:
        axis.remove()
    figure.texts.clear()
    path.unlink()
    return DRAWN(figure, path)


DRAWN = figures.drawn


@pytest.fixture(scope="module")
def page(folder):
    """The page of the committed results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "drawn", drawn_in_little)
        return report.page(folder)


def test_the_page_has_every_experiment_of_the_committed_records_with_its_pictures_and_where_it_ran(folder, page):
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings[0] == "Goals"
    for part in ("The papers' autoencoder: mnist", "3C1F, 16 channels: fashion", "Fidelity to the Fisher matrix"):
        assert part in headings and f"| {part} | `make " in page
    linked = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert len(linked) == len(set(linked)) >= len(headings) - 1
    assert all((folder / name).exists() for name in linked)
    ran = {record["name"] for record in kept(folder / "autoencoder_mnist.jsonl")}
    assert all(f"| {name} |" in page for name in ran - {"Adam of TNT", "Shampoo"})
    assert "| K-FAC (K-BFGS authors) | 0.1, 3 |" in page


def test_the_committed_page_is_that_of_the_committed_records(page):
    assert (RESULTS / "report.md").read_text() == page


def test_a_picture_has_256_colors_and_looks_as_before(tmp_path):
    path, rng = tmp_path / "new" / "picture.png", np.random.default_rng(0)
    tints = rng.integers(0, 256, (40, 3), np.uint8)
    before = tints[rng.integers(0, 40, (50, 60))]
    figure = Figure(figsize=(0.6, 0.5), dpi=100)
    figure.figimage(before)
    assert figures.drawn(figure, path) == path
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert np.abs(np.asarray(picture.convert("RGB"), int) - before).max() <= 1


def test_the_committed_results_have_at_most_three_megabytes():
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 3e6


def test_a_goal_that_is_missed_is_told_so():
    (line,) = report.goal("half", 0.5, {"slow": 0.9, "fast": 0.4, "never": np.inf}, ".2f")
    assert line == ("half", "0.5", "0.40", "fast", "yes")
    assert report.goal("half", 0.5, {"slow": 0.9}, ".2f")[0][2:] == ("0.90", "slow", "no")
    assert report.goal("of nothing", 0.5, {}, ".2f") == []


def test_where_records_are_from_and_that_some_do_not_say():
    rows = [
        {"device": "2 CPU cores", "jax": "0.9"},
        {"device": "a GPU", "jax": "0.9"},
        {"device": "a GPU", "jax": "0.9"},
    ]
    assert report.where(rows) == "2 CPU cores, jax 0.9; a GPU, jax 0.9"
    assert report.where([*rows[:1], {}]).endswith("; some before this was recorded")
    assert report.where([{}]) == "not recorded" and report.where([]) == ""


def test_a_folder_without_records_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="has no records; `make` lists the experiments"):
        report.page(tmp_path)
