"""Records of experiments, and what is left of them when a process is killed."""

import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import records


def test_what_is_kept_is_found_by_any_part_of_it(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    assert records.kept(path) == []
    rows = [{"name": "a", "rate": 0.1}, {"name": "a", "rate": 0.2}, {"name": "b", "rate": 0.1, "loss": None}]
    records.keep(path, rows[:1])
    records.keep(path, rows[1:])
    records.keep(path, [])
    assert records.kept(path) == rows
    assert records.kept(path, {"name": "a"}) == rows[:2]
    assert records.kept(path, {"rate": 0.1, "loss": None}) == rows[2:]
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("length", range(1, len('{"epoch": 1}\n')))
def test_half_a_line_is_left_out_with_a_warning_and_breaks_no_other(length, tmp_path):
    path, rows = tmp_path / "records.jsonl", [{"epoch": epoch} for epoch in range(3)]
    records.keep(path, rows[:1])
    with path.open("a") as file:
        file.write((json.dumps(rows[1]) + "\n")[:length])  # killed here
    if length == len(json.dumps(rows[1])):  # but for its end the line is whole
        assert records.kept(path) == rows[:2]
        records.keep(path, rows[2:])
        assert records.kept(path) == rows
        return
    with pytest.warns(UserWarning, match=r"records.jsonl, line 2, is not whole and is left out"):
        assert records.kept(path) == rows[:1]
    records.keep(path, rows[1:])
    with pytest.warns(UserWarning, match="line 2, is not whole"):
        assert records.kept(path) == rows


def test_half_a_letter_is_half_a_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes('{"name": "é'.encode()[:-1])
    with pytest.warns(UserWarning, match="line 1"):
        assert records.kept(path) == []


def test_a_state_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = records.state_path(tmp_path / "classify.jsonl", {"name": "a"})
    assert path.parent == tmp_path / "classify_states" and records.saved(path) == ([], [])
    assert path != records.state_path(tmp_path / "classify.jsonl", {"name": "b"})
    leaves = [np.arange(3.0), np.array(7, np.int32)]
    records.save(path, leaves, [{"epoch": 0}])

    def killed(file, *arrays, **named):
        file.write(b"PK half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", killed)
        records.save(path, leaves, [{"epoch": 0}, {"epoch": 1}])
    found, rows = records.saved(path)
    assert rows == [{"epoch": 0}]
    for mine, own in zip(found, leaves, strict=True):
        assert mine.dtype == own.dtype
        np.testing.assert_array_equal(mine, own)
    records.save(path, leaves[:1], [{"epoch": 2}])
    found, rows = records.saved(path)
    assert rows == [{"epoch": 2}] and len(found) == 1


def test_a_number_that_is_not_finite_is_none():
    assert [records.significant(number, 3) for number in (1.2345, np.nan, -np.inf)] == [1.23, None, None]


def test_a_machine_is_a_release_of_jax_and_a_device_with_the_cores_that_it_may_use(monkeypatch):
    assert set(records.machine()) == {"jax", "device"} and records.machine()["jax"] == jax.__version__
    for cores, device in ((1, "1 CPU core"), (3, "3 CPU cores")):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="cpu", device_kind="cpu")])
            patch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
            assert records.machine()["device"] == device
            patch.delattr(os, "sched_getaffinity")  # as on a Mac
            patch.setattr(os, "cpu_count", lambda: 8)
            assert records.machine()["device"] == "8 CPU cores"
            patch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")])
            assert records.machine()["device"] == "NVIDIA H200"
