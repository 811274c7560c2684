"""The plan of the house: who may import whom, what nobody may import, how long a file may be."""

import ast
from pathlib import Path

import pytest

import natgrad_jax

PACKAGE = "natgrad_jax"
ROOT = Path(natgrad_jax.__file__).parent
ROOMS = (
    "base",
    "addresses",
    "linalg",
    "roots",
    "bfgs",
    "averages",
    "eigenbasis",
    "damping",
    "grouping",
    "losses",
    "layers",
    "modes",
    "factors",
    "inverses",
    "scales",
    "samples",
    "diagonal",
    "checks",
    "capture",
    "transform",
    "tensor_transform",
    "step_transform",
    "steps",
    "control",
    "chain",
    "methods",
)
"""From the foundation up; a file imports only from rooms before its own."""
BY_THEMSELVES = ("layers", "capture")
"""Folders whose files may import one another; methods may not."""
PRIVATE = ("jax._src", "flax._src", "optax._src", "jaxlib")
LINES = 500


def sources():
    """{dotted name: text} of every file of the package."""
    files = sorted(ROOT.rglob("*.py"))
    names = [".".join((PACKAGE, *file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    return {name: file.read_text() for name, file in zip(names, files, strict=True)}


def imports(source):
    """For every import of a file: its dotted name, and what it stands for if that is no file: `from name import x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", module) for alias in node.names)


def room(name):
    """The room of a dotted name; None for the front door."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else None


def arrows(sources):
    """(from file, to file) for every import within the package."""
    found = set()
    for name, text in sources.items():
        for names in imports(text):
            candidates = (candidate for n in names for candidate in (n, f"{n}.__init__"))
            target = next((candidate for candidate in candidates if candidate in sources), name)
            found |= {(name, target)} - {(name, name)}
    return found


def wrong_arrows(sources):
    """Arrows that run up, to a neighbour that is none of one's business, or through the front door."""
    wrong = []
    for origin, target in sorted(arrows(sources)):
        here, there = room(origin), room(target)
        if here is None:
            continue
        if there is None or {here, there} == {"capture", "methods"}:
            wrong.append((origin, target))
        elif here == there:
            wrong += [(origin, target)] * (here not in BY_THEMSELVES)
        elif ROOMS.index(there) > ROOMS.index(here):
            wrong.append((origin, target))
    return wrong


def private_imports(sources):
    return [
        (name, target)
        for name, text in sources.items()
        for target, _ in imports(text)
        if target.startswith(PRIVATE) or target.startswith(".")
    ]


def too_long(sources):
    return [name for name, text in sources.items() if text.count("\n") > LINES]


def test_every_file_is_in_a_room_of_the_plan():
    assert {room(name) for name in sources()} - {None} == set(ROOMS)


def test_no_import_runs_up():
    assert arrows(sources()), "no arrow was drawn at all"
    assert wrong_arrows(sources()) == []


def test_capture_and_methods_meet_only_in_the_evidence():
    reached = {origin: {t for o, t in arrows(sources()) if o == origin} for origin in sources()}
    for origin, found in reached.items():
        while (more := found.union(*(reached[t] for t in found))) != found:
            found = more
        if room(origin) in ("capture", "methods"):
            other = "methods" if room(origin) == "capture" else "capture"
            assert not [t for t in found if room(t) == other], origin


def test_nothing_private_of_another_library_is_imported():
    assert private_imports(sources()) == []


def test_no_file_is_longer_than_a_reader_can_hold():
    around = {str(file): file.read_text() for file in (ROOT.parent / "experiments").glob("*.py")}
    assert around and too_long(sources() | around) == []


@pytest.mark.parametrize(
    ("origin", "line", "target"),
    [
        ("linalg", "from natgrad_jax.transform import lift", "transform"),
        ("linalg", "from natgrad_jax import chain", "chain"),
        ("losses", "import natgrad_jax.capture.linen", "capture.linen"),
        ("methods.kfac", "from natgrad_jax.methods.ekfac import ekfac", "methods.ekfac"),
        ("methods.kfac", "from natgrad_jax.capture import linen", "capture.linen"),
        ("capture.linen", "def late():\n    from natgrad_jax.methods import kfac", "methods.kfac"),
        ("damping", "import natgrad_jax", "__init__"),
    ],
)
def test_a_wrong_arrow_is_reported(origin, line, target):
    house = sources()
    house[f"{PACKAGE}.{origin}"] += f"\n{line}\n"
    assert (f"{PACKAGE}.{origin}", f"{PACKAGE}.{target}") in wrong_arrows(house)


def test_a_private_import_and_a_long_file_are_reported():
    house = {"natgrad_jax.linalg": "from jax._src import core\n" + "\n" * LINES}
    assert private_imports(house) and too_long(house)
