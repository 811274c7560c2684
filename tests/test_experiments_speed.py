"""What a step, its compilation and its memory cost, in small: records, table, picture, and every method once."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import figures, records, speed
from experiments.running import Runner
from tests import methods_table as table_of

FEW = ("Adam", "K-FAC")
STEPPED = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.full)
    for name in dict.fromkeys(method.name for method in speed.METHODS if method.make)
]
"""Methods; the registry of `methods` makes each of them."""


@pytest.fixture
def few(monkeypatch):
    """Short rounds; the tests that follow find what was compiled before."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(figures, "present", lambda *_: None)
    monkeypatch.setattr(speed, "METHODS", [method for method in speed.METHODS if method.refresh_every != 100])
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "BLOCK", 3)


def record(method, **figures):
    """A record of a run that never was."""
    ratios = {"step": 2.0, "least": 1.5, "most": 2.5, "compile": 3.0, "held": 1.2, "peak": 1.4} | figures
    sizes = {"milliseconds": 1.0, "compile_seconds": 0.5, "held_bytes": 12_000_000, "peak_bytes": 14_000_000}
    periods = {"statistics_every": None, "refresh_every": 10}
    return {"model": "tiny", "method": method, **periods, **records.machine(), **sizes, **ratios}


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_every_method_is_measured_beside_adam_kept_and_shown(tmp_path):
    found = speed.run(tmp_path, ("tiny",), ("sgd", "TENGraD"))
    assert records.kept(tmp_path / "speed.jsonl") == found
    assert [(one["method"], one["statistics_every"], one["refresh_every"]) for one in found] == [
        ("Adam", None, None),
        ("SGD-m", None, None),
        ("TENGraD", None, 10),
    ]
    for one in found:
        assert one.items() >= {"model": "tiny", **records.machine()}.items()
        assert 0 < one["least"] <= one["step"] <= one["most"]
        assert min(one["milliseconds"], one["compile_seconds"]) > 0
        assert one["peak_bytes"] > one["held_bytes"]  # it counts the batch, too
    adam, sgd, _ = found
    assert [adam[name] for name in ("step", "least", "most", "compile", "held", "peak")] == 6 * [1]
    parameters = 12 * 8 + 8 + 8 * 10 + 10
    assert adam["held_bytes"] == 4 * (3 * parameters + 1)  # parameters, two moments, a count
    assert sgd["held_bytes"] == 4 * 2 * parameters
    assert adam["least_flops"] == adam["most_flops"] == sgd["bound"] == 1
    assert sgd["held"] == pytest.approx(sgd["held_bytes"] / adam["held_bytes"], abs=1e-3)
    assert speed.table(found).row_count == 3


def test_only_the_newest_record_of_this_machine_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "made", lambda *_: None)
    monkeypatch.setattr(figures, "present", lambda *_: None)
    steps = iter((2.0, 3.0))
    monkeypatch.setattr(speed, "measure", lambda *_: record("Adam", step=next(steps), refresh_every=None))
    monkeypatch.setattr(speed, "METHODS", (speed.ADAM,))
    records.keep(tmp_path / "speed.jsonl", [record("Adam", refresh_every=None, device="another")])
    assert [one["step"] for one in speed.run(tmp_path, ("tiny",))] == [2.0]
    assert [one["step"] for one in speed.run(tmp_path, ("tiny",))] == [3.0]
    assert len(records.kept(tmp_path / "speed.jsonl")) == 3


def test_the_picture_has_a_bar_for_every_number_and_a_log_axis_where_ratios_spread():
    nothing = {"compile": None, "peak": None, "compile_seconds": None, "peak_bytes": None}
    rows = [record("Adam", step=1.0, held=1.0), record("TENGraD", compile=40.0), record("kfac-jax", **nothing)]
    figure = speed.picture(rows)
    step, compilation, memory = figure.axes
    assert [len(axis.patches) for axis in figure.axes] == [3, 3, 6]
    ends = [bar.get_x() + bar.get_width() for bar in step.patches]
    np.testing.assert_allclose(ends, [1, 2, 2])
    assert [axis.get_xscale() for axis in (step, compilation, memory)] == ["linear", "log", "linear"]
    assert [tick.get_text() for tick in step.get_yticklabels()] == [f"{row['method']} (-, 10)" for row in rows]
    figure.draw_without_rendering()
    cells = [list(column.cells)[2] for column in speed.table(rows).columns]
    assert cells == ["tiny", "kfac-jax", "", "10", "1", "2", "1.5-2.5", "-", "-", "12", "1.2", *8 * ["-"]]


def test_a_backend_that_says_nothing_of_memory_leaves_no_peak():
    silent = SimpleNamespace(memory_analysis=lambda: None, as_text=lambda: "a\nb\n")
    for program, lines in ((None, None), (silent, 2)):
        found = speed.sizes(SimpleNamespace(program=program, compile_seconds=None, carry=np.zeros(3)))
        assert found == {"compile_seconds": None, "held_bytes": 24, "peak_bytes": None, "program_lines": lines}
    names = ("argument", "temp", "output", "alias")
    sizes = SimpleNamespace(**{f"{name}_size_in_bytes": 10**power for power, name in enumerate(names)})
    program = SimpleNamespace(memory_analysis=lambda: sizes, as_text=lambda: "")
    found = speed.sizes(SimpleNamespace(program=program, compile_seconds=None, carry=np.zeros(3)))
    assert found["peak_bytes"] == 1 + 10 + 100 - 1000


def test_every_method_of_the_package_occurs_often_and_rarely():
    ours = [method for method in speed.METHODS if method.labels]
    assert {method.of for method in ours} == {name.split()[0] for name in table_of.ALL_NAMES}
    for name in {method.name for method in ours}:
        assert len({method[3:5] for method in ours if method.name == name}) >= 2
    assert len({method[:1] + method[3:5] for method in speed.METHODS}) == len(speed.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPPED)
def test_a_step_of_every_method_leaves_a_state_of_the_same_shapes(name):
    task = speed.noise("tiny")
    method = next(method for method in speed.METHODS if method.name == name)
    runner = Runner(method.make, speed.FIXED, task, method.labels)
    before = jax.eval_shape(lambda: runner.carry)
    after, _ = jax.eval_shape(runner._steps, before, *task.batch, jax.random.key(0), speed.FIXED)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (before, after)]
    assert shapes[0] == shapes[1]


def test_a_block_holds_whole_periods():
    periods = {(method.name, *method[3:5]): method.period for method in speed.METHODS}
    assert periods["Adam", None, None] == 1
    assert periods["K-FAC", 10, 100] == periods["TENGraD", None, 100] == 100
    assert periods["K-BFGS", 10, None] == 10


@pytest.mark.parametrize("option", [{"models": ("resnet",)}, {"models": ("tiny",), "methods": ("KFAC",)}])
def test_an_unknown_name_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match=r"There is no \['(resnet|KFAC)'\]; there are \["):
        speed.run(tmp_path, **option)
