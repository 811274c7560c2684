"""The pages of the site: their examples run, nothing public is missing, what is cited is listed."""

import doctest
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import natgrad_jax as ng

HOUSE = Path(__file__).parents[1]
DOCS = HOUSE / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
EXAMPLES = [name for name, text in PAGES.items() if ">>>" in text]
METHODS = sorted(path.stem for path in (HOUSE / "natgrad_jax" / "methods").glob("[a-z]*.py"))
SECTIONS = ("Example", "When to use it", "When not", "Cost and memory", "Keywords", "Neighbours")
SNIPPET = re.compile(r'--8<-- "(\w+\.py)"')


@cache
def names_of(snippet):
    """What a snippet defines; all pages share its compiled programs."""
    names = {}
    exec(compile((DOCS / "snippets" / snippet).read_text(), snippet, "exec"), names)
    return names


def failures(name, text):
    """How many examples of a page fail, with the names of the snippets that it shows."""
    names = {key: value for snippet in SNIPPET.findall(text) for key, value in names_of(snippet).items()}
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    assert test.examples
    return doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_page_do_what_they_say(name):
    assert failures(name, PAGES[name]) == 0


def test_an_example_that_says_something_else_fails(capsys):
    assert failures("wrong", ">>> 1 + 1\n3\n") == 1
    assert "Expected" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_the_page_of_a_method_has_all_its_parts(method):
    text = PAGES[f"methods/{method}.md"]
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [each for each in headings if each in SECTIONS] == list(SECTIONS)
    assert f"{{{{ box {method} }}}}" in text and f"{{{{ keywords {method} }}}}" in text
    assert "**Source of the defaults.**" in text and "](https://arxiv.org/abs/" in text
    assert f"]({method}.md)" in PAGES["methods/index.md"]


def documented():
    """The objects that pages of the API ask for."""
    return set(re.findall(r"^::: natgrad_jax\.([\w.]+)$", "\n".join(PAGES.values()), re.MULTILINE))


@pytest.mark.parametrize("name", sorted(set(ng.__all__)))
def test_every_public_name_is_in_the_reference(name):
    value = getattr(ng, name)
    where = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{name}"
    assert where.removeprefix("natgrad_jax.") in documented()


def cited():
    """The claims that names of tests cite."""
    return {
        int(number) for path in HOUSE.glob("tests/*.py") for number in re.findall(r"def test_c(\d+)_", path.read_text())
    }


def test_every_claim_that_a_test_cites_is_listed_once():
    listed = [int(number) for number in re.findall(r"^\| C(\d+) \|", PAGES["extend/claims.md"], re.MULTILINE)]
    assert listed == list(range(1, 90))
    assert cited() <= set(listed) and cited()


def table():
    """The script that makes the table of layers."""
    spec = importlib.util.spec_from_file_location("layers_table", DOCS / "layers_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_layers_says_what_is_watched():
    made = table()
    lines = made.shown().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [row.name for row in made.ROWS]
    some = (
        "dense",
        "grouped",
        "embedding tied to the head",
        "layer norm",
        "LoRA",
        "a module's own table",
        "weight norm",
    )
    for row, line in zip(made.ROWS, lines, strict=True):
        if row.name in some:
            assert made.line(row, verify=False) == line


@pytest.mark.full
@pytest.mark.verified
def test_the_table_of_layers_is_that_of_its_script():
    made = table()
    assert made.table() == made.shown()


def test_the_version_stands_in_the_package_and_is_cited():
    said = re.search(r"^version: (.*)$", (HOUSE / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (HOUSE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert said[1] == newest[1] == ng.__version__


def test_every_find_is_in_the_list_of_findings():
    listed = re.findall(r"^\| `(\w+\.sh)`", (HOUSE / "findings" / "README.md").read_text(), re.MULTILINE)
    assert listed == sorted(path.name for path in HOUSE.glob("findings/*.sh"))
