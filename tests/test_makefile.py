"""What `make help` tells: every target once, each with a line about it."""

import re
from collections import Counter
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "Makefile").read_text()


def twice(text):
    """Targets that stand in a Makefile more than once."""
    count = Counter(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    return [name for name, times in count.items() if times > 1]


def silent(text):
    """Targets without a line about them."""
    return [line for line in re.findall(r"^[a-z]+:.*", text, re.MULTILINE) if " ## " not in line]


def test_every_target_stands_once_and_says_what_it_does():
    assert twice(TEXT) == silent(TEXT) == []
    assert twice(TEXT + "\ndemo: x ## again\n") == ["demo"] and silent("demo: x\n") == ["demo: x"]


def test_every_target_is_phony_and_every_module_that_it_runs_is_there():
    (phony,) = re.findall(r"^\.PHONY: (.*)", TEXT, re.MULTILINE)
    assert sorted(phony.split()) == sorted(re.findall(r"^([a-z]+):", TEXT, re.MULTILINE))
    modules = re.findall(r"-m experiments\.(\w+)", TEXT)
    there = Path(__file__).parents[1] / "experiments"
    assert modules and all((there / f"{name}.py").exists() for name in modules)
