"""The engine of the short studies: what is chosen, when runs end, what is kept and not run again."""

from itertools import islice

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import courses, defaults, figures, study
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
    loss = jax.jit(lambda variables: task.loss(variables, *PART)[0])

    def stream(seed):
        while True:
            yield PART

    return study.Case({"problem": "line"}, task, stream, lambda variables: float(loss(variables)))


def sgd(numbers, layers):
    assert layers is None
    return optax.sgd(study.cosine(numbers["rate"], numbers["horizon"]))


ENTRY = study.Entry(sgd, study.grid(rate=(1e9, 0.001, 0.3)), labels=None)
LIMITS = study.Limits(steps=6, look=2)


@pytest.fixture
def made(case):
    """Entries and limits -> a study."""

    def of(entries, limits=LIMITS, **others):
        return study.Study("study", "A study", {"line": lambda: case}, entries, limits, None, **others)

    return of


def test_every_entry_runs_at_the_best_of_its_trials_from_every_seed_and_is_not_run_again(made, tmp_path, monkeypatch):
    entries = {"one": ENTRY, "two": ENTRY._replace(tried=({"rate": 0.1},), steps=3)}
    whole = made(entries, seeds=(0, 1), config={"a": 1})
    rows = study.run(whole, tmp_path)
    assert [(row["name"], row["seed"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert [row["numbers"] for row in rows] == 2 * [{"rate": 0.3}] + 2 * [{"rate": 0.1}]
    assert [row["steps"] for row in rows] == 2 * [[0, 2, 4, 6]] + 2 * [[0, 2, 3]]
    assert all(row["losses"][-1] < row["losses"][0] for row in rows)
    assert rows[0]["losses"][0] != rows[1]["losses"][0]  # another start
    assert rows[0]["config"] == whole.key == {"steps": 6, "a": 1}
    tried = kept(tmp_path / "study.jsonl", {"trial": True})
    assert [(row["name"], row["best"]) for row in tried] == [("one", False), ("one", False), ("one", True)]
    assert tried[0]["losses"][-1] is None
    (again,) = study.run(made({"one": ENTRY._replace(tried=({"rate": 0.3},))}), tmp_path / "other")
    assert again["losses"] == rows[0]["losses"]  # in turn with others or alone

    monkeypatch.setattr(study, "Compiled", None)
    assert study.run(whole, tmp_path) == rows
    with pytest.raises(TypeError):  # it would compile
        study.run(whole._replace(config={"a": 2}), tmp_path)


def test_a_run_that_was_stopped_goes_on_where_it_was_saved(made, tmp_path, monkeypatch):
    whole, advance, seen = made({"one": ENTRY._replace(tried=({"rate": 0.1},))}), courses.Course.advance, []
    (straight,) = study.run(whole, tmp_path / "straight")
    monkeypatch.setattr(courses, "SAVE_EVERY", -1.0)

    def stopped(course):
        seen.append(course.looks[-1]["steps"])
        if seen == [0, 2, 4]:
            raise KeyboardInterrupt
        advance(course)

    monkeypatch.setattr(courses.Course, "advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        study.run(whole, tmp_path)
    (state,) = (tmp_path / "study_states").iterdir()
    (again,) = study.run(whole, tmp_path)
    assert seen == [0, 2, 4, 4] and not state.exists()
    for entry in ("steps", "losses", "numbers"):
        assert again[entry] == straight[entry]


def test_an_estimate_runs_nothing_and_says_how_long_it_will_take(made, tmp_path, capsys):
    assert study.run(made({"one": ENTRY}), tmp_path, is_estimate=True) == [] and not any(tmp_path.iterdir())
    assert "line: 1 methods, 0.0 minutes of steps are left" in capsys.readouterr().out


def test_a_run_ends_at_a_level_in_time_and_trials_alone_are_all_shown(made, tmp_path):
    entry, level = ENTRY._replace(tried=study.grid(rate=(0.1, 0.5))), 0.5
    (row,) = study.run(made({"one": entry}, study.Limits(400, 1, level=level)), tmp_path / "level")
    assert row["losses"][-1] <= level < row["losses"][-2] and row["numbers"] == {"rate": 0.5}  # sooner there
    assert figures.reached(row, level) == (row["steps"][-1], row["seconds"][-1])
    assert figures.reached(row, -1.0) == (np.inf, np.inf)
    ticks = iter(range(10**6))
    timed = study.Limits(10**9, 2, 5.0, clock=lambda: float(next(ticks)))  # a second a look
    (row,) = study.run(made({"one": entry._replace(tried=({"rate": 0.1},))}, timed), tmp_path / "time")
    assert row["seconds"] == [0, 1, 2, 3, 4, 5] and row["steps"][-1] == 10
    alone = made({"one": entry}, seeds=())
    rows = study.run(alone, tmp_path)
    assert [row["numbers"]["rate"] for row in rows] == [0.1, 0.5] and alone.known(tmp_path) == rows


def test_what_is_asked_for_is_a_part_of_a_study_and_what_is_not_there_is_refused(made):
    timed = study.Limits(10**9, 1, 60.0)
    whole = made({"one": ENTRY, "two": ENTRY}, timed, trial=timed.shorter(None, 20.0), config={"a": 1})
    assert whole.key == {"seconds": 60.0, "trial": 20.0, "a": 1}
    part = whole.asked(study.Options(methods=("two",), seconds=5.0, trial=2.0, seeds=3, stays=True))
    assert part.key == {"seconds": 5.0, "trial": 2.0, "a": 1} and len(part.seeds) == 3
    assert part.name == "study_stays" and part.entries == {"two": ENTRY}
    case = part.cases["line"]()
    assert [*islice(case.stream(0), 2)] == 2 * [PART]
    assert whole.asked(study.Options()).key == whole.key
    for wrong in ({"methods": ("three",)}, {"problems": ("circle",)}):
        with pytest.raises(ValueError, match=r"There is no \['(three|circle)'\]; there are \['(one|line)'"):
            study.parts((whole,), study.Options(**wrong))


@pytest.mark.full
def test_a_static_number_is_a_number_when_it_compiles(made, tmp_path):
    def make(numbers, layers):
        return optax.lbfgs(memory_size=int(numbers["memory"]))

    entry = study.Entry(make, study.grid(memory=(1, 2)), labels=None, is_static=True, stretch=2)
    (row,) = study.run(made({"L-BFGS": entry}), tmp_path)
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
    course = courses.Course(runner, courses.staying(lambda: case) if stays else case, {}, 0, LIMITS)
    while not course.is_over:
        course.advance()
    assert [*runner.batches] == seen


def test_of_several_studies_those_run_that_have_what_is_asked_for():
    one, other = defaults.WITH_RATES, defaults.WITHOUT
    for methods, expected in (((), [one, other]), (("kfac",), [one]), (("kfac", "kfac, no rate"), [one, other])):
        found = study.parts((one, other), study.Options(methods=methods))
        assert [each.title for each in found] == [each.title for each in expected]
        assert not methods or sorted(name for each in found for name in each.entries) == sorted(methods)
    with pytest.raises(ValueError, match="no \\['sgd'\\]"):
        study.parts((one, other), study.Options(methods=("kfac", "sgd")))
