"""The engine of the short studies: what is chosen, when runs end, what is kept and not run again."""

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import study
from experiments.data import Part
from experiments.nets import Perceptron
from experiments.records import kept
from experiments.running import Task

X = np.random.default_rng(0).random((8, 3), np.float32)
PART = Part(X, X @ np.array([[1.0], [2.0], [3.0]], np.float32))


@pytest.fixture(scope="module")
def case():
    """A linear map to be learned from all examples at every step."""
    task = Task(Perceptron((), 1), ng.losses.squared_error, PART)
    loss = jax.jit(lambda variables: task.loss(variables, *PART))

    def stream(seed):
        while True:
            yield PART

    return study.Case({"problem": "line"}, task, stream, lambda variables: float(loss(variables)), lambda _: "told")


def sgd(numbers, layers):
    assert layers is None
    return optax.sgd(study.cosine(numbers["rate"], numbers["horizon"]))


ENTRY = study.Entry(sgd, study.grid(rate=(1e9, 0.001, 0.3)), labels=None)
LIMITS = study.Limits(steps=6, look=2)


def test_every_entry_runs_at_the_best_of_its_trials_from_every_seed_and_is_not_run_again(case, tmp_path, monkeypatch):
    path, entries = tmp_path / "study.jsonl", {"one": ENTRY, "two": ENTRY._replace(tried=({"rate": 0.1},), steps=3)}
    rows = study.run(path, {"a": 1}, [case], entries, LIMITS, seeds=(0, 1))
    assert [(row["name"], row["seed"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert [row["numbers"] for row in rows] == 2 * [{"rate": 0.3}] + 2 * [{"rate": 0.1}]
    assert [row["steps"] for row in rows] == 2 * [[0, 2, 4, 6]] + 2 * [[0, 2, 3]]
    assert all(row["losses"][-1] < row["losses"][0] and row["test"] == "told" for row in rows)
    assert rows[0]["losses"][0] != rows[1]["losses"][0]  # another start
    tried = kept(path, {"trial": True})
    assert [(row["name"], row["best"]) for row in tried] == [("one", False), ("one", False), ("one", True)]
    assert tried[0]["losses"][-1] is None
    (again,) = study.run(tmp_path / "other.jsonl", {}, [case], {"one": ENTRY._replace(tried=({"rate": 0.3},))}, LIMITS)
    assert again["losses"] == rows[0]["losses"]  # in turn with others or alone

    monkeypatch.setattr(study, "Compiled", None)
    assert study.run(path, {"a": 1}, [case], entries, LIMITS, seeds=(0, 1)) == rows
    with pytest.raises(TypeError):  # it would compile
        study.run(path, {"a": 2}, [case], entries, LIMITS)


def test_a_run_ends_at_a_level_in_time_and_trials_alone_are_all_told(case, tmp_path):
    entry, level = ENTRY._replace(tried=study.grid(rate=(0.1, 0.5))), 0.5
    limits = study.Limits(400, 1, level=level)
    (row,) = study.run(tmp_path / "level.jsonl", {}, [case], {"one": entry}, limits)
    assert row["losses"][-1] <= level < row["losses"][-2] and row["numbers"] == {"rate": 0.5}  # sooner there
    assert study.reached(row, level) == (row["steps"][-1], row["seconds"][-1])
    assert study.reached(row, -1.0) == (np.inf, np.inf)
    ticks = iter(range(10**6))
    timed = study.Limits(10**9, 2, 5.0, clock=lambda: float(next(ticks)))  # a second a look
    (row,) = study.run(tmp_path / "time.jsonl", {}, [case], {"one": entry._replace(tried=({"rate": 0.1},))}, timed)
    assert row["seconds"] == [0, 1, 2, 3, 4, 5] and row["steps"][-1] == 10
    rows = study.run(tmp_path / "trials.jsonl", {}, [case], {"one": entry}, LIMITS, seeds=())
    assert [row["numbers"]["rate"] for row in rows] == [0.1, 0.5]


@pytest.mark.full
def test_a_static_number_is_a_number_when_it_compiles(case, tmp_path):
    def make(numbers, layers):
        return optax.lbfgs(memory_size=int(numbers["memory"]))

    entry = study.Entry(make, study.grid(memory=(1, 2)), labels=None, is_static=True, stretch=2)
    (row,) = study.run(tmp_path / "static.jsonl", {}, [case], {"L-BFGS": entry}, LIMITS)
    assert row["losses"][-1] < 1e-3


@pytest.mark.full
def test_a_cosine_rises_and_falls_as_that_of_optax():
    ours, theirs = study.cosine(0.3, 200, 0.05), optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 200)
    counts = np.arange(220)
    np.testing.assert_allclose(jax.vmap(ours)(counts), jax.vmap(theirs)(counts), atol=1e-6)
    assert float(study.cosine(0.3, 200)(0)) == pytest.approx(0.3)


@pytest.mark.parametrize(("stays", "seen"), [(False, [0, 1, 2, 3, 4, 5]), (True, [0, 0, 0, 0, 0, 0])])
def test_an_entry_that_stays_sees_its_first_batch_alone(stays, seen):
    class Listening:
        variables, compile_seconds, batches = None, 0.0, ()

        def begin(self, numbers, seed):
            pass

        def run(self, stream):
            self.batches += tuple(stream)
            return np.zeros(0), 1.0

    runner, case = Listening(), study.Case({}, None, lambda seed: iter(range(9)), lambda variables: 1.0)
    course = study.Course(runner, case, {}, 0, LIMITS, stays)
    while not course.is_over:
        course.advance()
    assert [*runner.batches] == seen
