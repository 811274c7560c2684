"""The plan of the house: who may import whom, what nobody may import, how long a file may be."""

import ast
from pathlib import Path

import pytest

import natgrad_jax

PACKAGE = "natgrad_jax"
ROOT = Path(natgrad_jax.__file__).parent
ROOMS = (
    "report",
    "base",
    "addresses",
    "checks",
    "losses",
    "algebra",
    "algebra/branches",
    "algebra/stacks",
    "algebra/sweeps",
    "algebra/truncated",
    "algebra/averages",
    "algebra/arranged",
    "algebra/cuts",
    "algebra/rows",
    "algebra/eigenbasis",
    "algebra/panels",
    "algebra/moments",
    "algebra/modes",
    "algebra/roots",
    "algebra/bfgs",
    "algebra/trees",
    "algebra/meshes",
    "algebra/devices",
    "layers/arrays",
    "layers/pieces",
    "layers/dense",
    "layers/conv",
    "layers/embed",
    "layers/parameter",
    "layers/norm",
    "layers/parts",
    "layers/joint",
    "layers/views",
    "layers",
    "layers/rows",
    "program",
    "program/products",
    "program/axes",
    "program/facts",
    "program/liveness",
    "program/scenes",
    "program/entrywise",
    "program/scans",
    "program/shards",
    "program/follow",
    "program/replay",
    "program/derivative",
    "watch",
    "watch/reading",
    "watch/parts",
    "watch/segments",
    "watch/norms",
    "watch/recognise",
    "watch/problem",
    "watch/scaled",
    "watch/space",
    "watch/strides",
    "watch/common",
    "watch/masks",
    "watch/microbatches",
    "watch/replicas",
    "watch/meshes",
    "watch/traced",
    "watch/examples",
    "watch/verify",
    "watch/doors",
    "watch/joining",
    "watch/terms",
    "watch/function",
    "watch/linen",
    "watch/nnx",
    "blocks",
    "blocks/kronecker",
    "blocks/rotated",
    "blocks/tensor",
    "blocks/samples",
    "blocks/rings",
    "blocks/diagonal",
    "blocks/norm",
    "lift",
    "lift/requests",
    "lift/guards",
    "lift/meshes",
    "lift/evidence",
    "lift/grouping",
    "lift/shares",
    "lift/restored",
    "lift/state",
    "lift/stored",
    "lift/turns",
    "lift/gradual",
    "lift/advance",
    "lift/lift",
    "lift/tensors",
    "lift/stepping",
    "lift/joined",
    "lift/unkept",
    "around",
    "around/adaptive",
    "around/bounds",
    "around/clip",
    "around/graft",
    "around/spring",
    "around/model",
    "around/control",
    "around/search",
    "around/automatic",
    "around/averaging",
    "around/complete",
    "around/statistics",
    "rules",
    "diagnosis",
    "wrapping",
    "sharding/places",
    "sharding/sharing",
    "sharding/recipes",
    "sharding/planning",
    "sharding",
    "settings/keywords",
    "settings/shared",
    "settings/public",
    "settings",
    "methods",
)
"""From the foundation up: "folder/file", and "folder" for its `__init__`; a file imports only from those before it.

The files of `methods` are on one floor, and may not import one another.
"""
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
    parts = [part for part in name.split(".")[1:] if part != "__init__"]
    return "methods" if parts[:1] == ["methods"] else "/".join(parts) or None


def folder(name):
    """The folder of a dotted name."""
    return (room(name) or "").split("/")[0]


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
        if (
            there is None
            or {folder(origin), folder(target)} == {"watch", "methods"}
            or ROOMS.index(there) > ROOMS.index(here)
            or here == there == "methods"
        ):
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


def factorisations(sources):
    """Calls of LAPACK through JAX, outside of the file that walks a stack one matrix at a time."""
    found = []
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr == "linalg"
            ):
                library = getattr(node.value.value, "id", None)
                if library in ("lax", "jnp", "jax") and node.attr != "norm" and name != f"{PACKAGE}.algebra.stacks":
                    found.append((name, node.attr))
    return found


def test_every_file_is_in_a_room_of_the_plan():
    assert {room(name) for name in sources()} - {None} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


def test_no_import_runs_up():
    assert arrows(sources()), "no arrow was drawn at all"
    assert wrong_arrows(sources()) == []


def test_watching_and_methods_meet_only_in_the_evidence():
    house = sources()
    drawn = arrows(house)
    reached = {origin: {target for o, target in drawn if o == origin} for origin in house}
    for origin, found in reached.items():
        while (more := found.union(*(reached[t] for t in found))) != found:
            found = more
        if folder(origin) in ("watch", "methods"):
            other = "methods" if folder(origin) == "watch" else "watch"
            assert not [t for t in found if folder(t) == other], origin


def test_algebra_knows_no_layer():
    nouns = ("Layer", "Layers", "Evidence", "Kind", "Method", "Use")
    for name, text in sources().items():
        if folder(name) == "algebra":
            assert not [target for target, _ in imports(text) if target.rsplit(".", 1)[-1] in nouns], name


def test_nothing_private_of_another_library_is_imported():
    assert private_imports(sources()) == []


def test_every_factorisation_goes_through_one_file():
    """On a CPU a batched one inside of a branch may wait for ever."""
    house = sources()
    assert factorisations(house) == []
    house[f"{PACKAGE}.algebra.sweeps"] += "\nroot = lax.linalg.cholesky(matrix)\n"
    assert factorisations(house) == [(f"{PACKAGE}.algebra.sweeps", "cholesky")]


def test_no_file_is_longer_than_a_reader_can_hold():
    around = {str(file): file.read_text() for file in (ROOT.parent / "experiments").glob("*.py")}
    assert around and too_long(sources() | around) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("origin", "line", "target"),
    [
        ("algebra.stacks", "from natgrad_jax.lift.lift import lift", "lift.lift"),
        ("algebra.stacks", "from natgrad_jax.algebra import moments", "algebra.moments"),
        ("losses", "import natgrad_jax.watch.linen", "watch.linen"),
        ("methods.kfac", "from natgrad_jax.methods.ekfac import ekfac", "methods.ekfac"),
        ("methods.kfac", "from natgrad_jax.watch import linen", "watch.linen"),
        ("watch.linen", "def late():\n    from natgrad_jax.methods import kfac", "methods.kfac"),
        ("around.adaptive", "import natgrad_jax", "__init__"),
    ],
)
def test_a_wrong_arrow_is_reported(origin, line, target):
    house = sources()
    house[f"{PACKAGE}.{origin}"] += f"\n{line}\n"
    assert (f"{PACKAGE}.{origin}", f"{PACKAGE}.{target}") in wrong_arrows(house)


def test_a_private_import_and_a_long_file_are_reported():
    house = {"natgrad_jax.algebra.stacks": "from jax._src import core\n" + "\n" * LINES}
    assert private_imports(house) and too_long(house)
