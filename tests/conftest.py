"""Fixtures of the whole suite: one thread for LAPACK, cheap compilation, and double precision where a test asks for it.

Most of the time of the suite goes into compiling, each function for a few calls. So the code generator does not
optimise, which is no matter of the package, and what was compiled is kept in `.jax_cache`, for the other process and
for the next run. The key of an entry is the program itself, so that a change of the package compiles what it changes.

Of the table of a test that is `slow` one row runs, another one for other tests, so that the suite sees every row of the
common tables many times; `-m full` runs the rest. A test that is `whole` runs on all its rows. One whose claim a
neighbour stands for is `full` itself.

Within a process it is kept as long as there is room: each program holds memory maps, of which a process has 65,530, and
jaxlib dies where it gets no more.
"""

import collections
import gc
import os
import pathlib
import zlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when the library loads, hence before jax
os.environ.setdefault(
    "XLA_FLAGS",  # together a third of the time
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".jax_cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # to find costs less than to compile the least
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

from natgrad_jax.watch.verify import UNKNOWN

MAPS = 6_000
"""With more memory maps, which stand for some 2.5 GB, a process forgets what it compiled; a file adds about 1,000."""

gc.freeze()
gc.set_threshold(50_000, 20, 50)  # tracing makes many objects that stay: to look through them was a tenth of the time


@pytest.hookimpl(tryfirst=True)  # before those are dropped that `-m` does not ask for
def pytest_collection_modifyitems(items):
    """The rows of slow tables that others stand for are marked `full`."""
    tables = collections.defaultdict(list)
    for item in items:
        sampled = item.get_closest_marker("slow") and not item.get_closest_marker("whole")
        if sampled and not item.get_closest_marker("full"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for name, rows in tables.items():
        kept = sample(name, len(rows))
        for at, item in enumerate(rows):
            if at not in kept:
                item.add_marker(pytest.mark.full)


def pytest_collection_finish():
    """What was collected stays: no collection of garbage looks through it."""
    gc.freeze()


def sample(name, count, size=1):
    """Which of the `count` rows of a test run: as many as `size`, spread from one that its name picks."""
    first, size = zlib.crc32(name.encode()), min(size, count)
    return {(first + i * count // size) % count for i in range(size)}


@pytest.fixture(scope="module", autouse=True)
def forget():
    """What was compiled is let go where it may be too much for another file."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()  # a second: not after every file


@pytest.fixture(autouse=True)
def unverified(request, monkeypatch):
    """`layers` does not compare what it finds with autodiff: a compilation for each call. Tests of that ask for it."""
    if "verified" not in request.keywords:
        monkeypatch.setattr("natgrad_jax.watch.doors.verdict", lambda *_: UNKNOWN)


@pytest.fixture
def x64():
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """A claim in both precisions; the oracle is in float64 either way."""
    with jax.enable_x64(True):
        yield request.param
