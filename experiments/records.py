"""What an experiment has found, line by line, and the states from which its runs go on.

A record is a line of JSON; its key, a part of it, tells it from all others. A process can be killed at any moment: half
a line is left out, with a warning, and the next record begins on a line of its own; a state takes the place of the one
before it in one stroke.
"""

import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np

Records = list[dict[str, Any]]


def kept(path: Path, key: Mapping[str, Any] = {}) -> Records:
    """The records of a file that have these entries; none if there is no file."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            warnings.warn(f"{path}, line {number}, is not whole and is left out: {line[:60]!r}", stacklevel=2)
            continue
        if key.items() <= record.items():
            records.append(record)
    return records


def keep(path: Path, records: Iterable[Mapping[str, Any]], afresh: bool = False) -> None:
    """Add lines to a file, or begin it anew; below half a line, should there be one."""
    if text := "".join(json.dumps(record) + "\n" for record in records):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb+" if afresh else "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                text = ("" if file.read() == b"\n" else "\n") + text
            file.write(text.encode())


def chosen(there: Iterable[str], asked: Collection[str]) -> list[str]:
    """Those of some names that are asked for, in order; all if none is. A `ValueError` if one is not there."""
    there = list(there)
    if unknown := {*asked} - {*there}:
        raise ValueError(f"There is no {sorted(unknown)}; there are {there}.")
    return [name for name in there if not asked or name in asked]


def significant(number: Any, digits: int = 6) -> float | None:
    """A number with so many significant digits; None if it is not finite."""
    return float(f"{number:.{digits}g}") if np.isfinite(number) else None


def machine() -> dict[str, Any]:
    """What a measured time depends on beside its setting: the release of JAX, and the device with what it may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return {"jax": jax.__version__, "device": device.device_kind}
    available = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(available(0)) if available else os.cpu_count()
    return {"jax": jax.__version__, "device": f"{cores} CPU core{'s' * (cores != 1)}"}


def grouped(rows: Records, *entries: str) -> dict[Any, Records]:
    """The rows of every method, or with the same of another entry, or of several."""
    found: dict[Any, Records] = {}
    for row in rows:
        found.setdefault(itemgetter(*entries or ("name",))(row), []).append(row)
    return found


def state_path(path: Path, key: Mapping[str, Any]) -> Path:
    """Where the state of a run is, beside the file of its records."""
    return path.with_name(f"{path.stem}_states") / f"{zlib.crc32(json.dumps(key).encode()):08x}.npz"


def save(path: Path, leaves: Iterable[Any], rows: Records) -> None:
    """Write down where a run stands, its arrays and its records, in the place of where it stood, in one stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        np.savez(file, *map(np.asarray, leaves), rows=np.array(json.dumps(rows)))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def saved(path: Path) -> tuple[list[np.ndarray], Records]:
    """The arrays and the records of where a run stood; none if it was not written down."""
    if not path.exists():
        return [], []
    with np.load(path) as arrays:
        leaves = [arrays[f"arr_{index}"] for index in range(len(arrays.files) - 1)]
        return leaves, json.loads(str(arrays["rows"]))
