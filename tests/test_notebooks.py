"""The notebooks run, and their copies are copies."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

HOUSE = Path(__file__).parents[1]
SOURCES = sorted((HOUSE / "notebooks").glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]
LONG = tuple(name for name in NAMES if name != "1_quickstart")
"""Those that take half a minute or more; they run with `-m full`, and with `make notebooks`."""
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Source"]
PLACE = re.compile(r"(?:https://github\.com|/github)/(\w+)/natgrad_jax")


@pytest.fixture(params=SOURCES, ids=NAMES)
def source(request):
    """The source of a notebook."""
    return request.param


def cells(notebook):
    """What a reader sees of a notebook, but for its outputs."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebooks_are_numbered():
    assert len(NAMES) >= 4 and [int(name[0]) for name in NAMES] == [*range(1, len(NAMES) + 1)]


@pytest.mark.parametrize("where", ["", "rendered"])
def test_a_copy_has_the_cells_of_its_source(source, where):
    copy = nbformat.read(source.parent / where / f"{source.stem}.ipynb", as_version=4)
    assert cells(copy) == cells(jupytext.read(source)), "make notebooks"
    assert copy.metadata.jupytext.formats == "ipynb,py:percent"


def test_a_copy_beside_its_source_has_no_outputs(source):
    copy = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in copy.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_a_rendered_copy_ran_to_its_end_has_pictures_and_is_small(source):
    path = source.parent / "rendered" / f"{source.stem}.ipynb"
    assert path.stat().st_size < 1e6
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [number + 1 for number in range(len(code))]
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


def test_every_address_of_the_project_is_that_of_pyproject(source):
    texts = [source.read_text(), (HOUSE / "README.md").read_text()]
    owner = ADDRESS.split("/")[-2]
    found = [PLACE.findall(text) for text in texts]
    assert all(found) and {name for names in found for name in names} == {owner}


def test_the_badge_of_a_notebook_opens_it(source):
    assert f"/natgrad_jax/blob/main/notebooks/{source.stem}.ipynb)" in jupytext.read(source).cells[0].source


RUN = [
    pytest.param(source, marks=pytest.mark.full if source.stem in LONG else (), id=source.stem) for source in SOURCES
]


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("source", RUN)
def test_a_notebook_runs_with_small_settings(source, monkeypatch):
    monkeypatch.setenv("NATGRAD_SMALL", "1")
    monkeypatch.setattr(sys, "path", [str(HOUSE), *sys.path])
    plt.switch_backend("agg")
    try:
        made = runpy.run_path(str(source), run_name="__main__")
    finally:
        plt.close("all")
    assert made["SMALL"]
