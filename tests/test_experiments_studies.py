"""The short studies, in small: their problems, entries, tables and pictures."""

from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tasks import task

import natgrad_jax as ng
from experiments import control, defaults, demo, figures, pinn, problems, race, regression, study, text
from experiments.nets import Perceptron
from experiments.records import kept
from experiments.study import Limits, Options

RESULTS = Path(pinn.__file__).parent / "results"
STUDIES = {
    "control": control.STUDY,
    "with rates": defaults.WITH_RATES,
    "without": defaults.WITHOUT,
    "demo": demo.STUDY,
    "pinn": pinn.STUDY,
    "race": race.STUDY,
    "regression": regression.STUDY,
    "text": text.STUDY,
}


def row(problem, name, losses, **others):
    """A row of a run that never was."""
    steps = [*range(0, 5 * len(losses), 5)]
    own = {"problem": problem, "name": name, "seed": 0, "numbers": {}, "steps": steps, "trial": False}
    return own | {"seconds": [0.1 * step for step in steps], "losses": losses, "compile_seconds": 1.0} | others


def few(whole, methods, cases, limits, **others):
    """A study in small."""
    entries = {name: whole.entries[name] for name in methods}
    return whole._replace(entries=entries, cases=cases, limits=limits, **others)


def test_an_epoch_of_the_digits_shows_every_image_at_most_once_and_the_loss_is_above_the_least():
    case = problems.on_digits(Perceptron((), 10), {"problem": "net"}, 500)
    batches = [batch.images.tobytes() for batch in islice(case.stream(0), 6)]
    assert len(set(batches)) == 6 and batches[0] == next(case.stream(0)).images.tobytes()
    assert problems.entropy(problems.all_digits(28).mirrored().images) == pytest.approx(282.95, abs=0.01)
    rows = problems.all_digits().mirrored()
    perfect = problems.on_digits(Perceptron(()), {"problem": "autoencoder"}, 9)
    zeros = jax.tree.map(np.zeros_like, perfect.task.init(jax.random.key(0)))
    expected = 64 * np.log(2) - problems.entropy(rows.images)
    assert perfect.loss(zeros) == pytest.approx(expected, rel=1e-4)
    assert perfect.task.batch.images.shape == (9, 64)


def test_the_demo_has_every_method_on_both_problems():
    names = {name for name in ng.__all__ if hasattr(ng, f"scale_by_{name}")} | {"kbfgs"}
    assert {method.__name__ for method, *_ in demo.METHODS.values()} == names | {"adam"}
    for make in demo.STUDY.cases.values():
        case = make()
        shapes = jax.eval_shape(case.task.init, jax.random.key(0))
        for entry in (make(case) for make in demo.STUDY.entries.values()):
            layers = entry.labels and case.task.capture(entry.labels).layers(shapes, case.task.batch.images)
            jax.eval_shape(entry.make({"horizon": 10.0}, layers).init, shapes["params"])
    rows = [row("classifier", "Adam", [2.0, 1.0, 0.5]), row("classifier", "K-FAC", [2.0, 0.4, 0.1])]
    shown = demo.STUDY.table(rows)
    assert [list(column.cells) for column in shown.columns[2:]] == [
        ["0.5", "0.1"],
        ["100", "100"],
        ["10 / 1 s", "5 / 0.5 s"],
        ["1.00", "0.50"],
    ]
    assert len(demo.STUDY.picture(rows).axes) == 2


def test_the_race_shows_levels_and_ratios():
    entries = race.STUDY.entries
    assert len(entries["Adam"].tried) == 12 and entries["Adam"].steps == 2000
    assert [*race.STUDY.asked(Options(methods=("K-FAC",))).entries] == ["K-FAC"]
    adam = {"numbers": {"rate": 0.001, "falls": 1}}
    rows = [row("autoencoder", "Adam", [9.0, 0.9, 0.2], seed=seed, **adam) for seed in (0, 1)]
    rows += [row("autoencoder", "K-FAC", [9.0, end, 0.05], seed=seed) for seed, end in enumerate((0.09, 0.5))]
    table = partial(race.STUDY.table, levels=(1.0, 0.1))(rows)
    assert list(table.columns[1].cells) == ["Adam, rate 0.001, falls 1", "K-FAC"]
    assert list(table.columns[5].cells) == ["-", "8 / 0.75 s"]
    assert list(table.columns[6].cells) == ["-", "<0.75 (0.50-1.00)"]
    falls = race.adam({"rate": 1.0, "falls": 1.0, "horizon": 10.0}, None)
    state = falls.init(np.zeros(2))
    assert np.allclose(falls.update(np.ones(2), state)[0], -1.0, atol=1e-3)


def test_a_control_is_shown_with_what_was_chosen():
    chosen = control.CONTROLS["learning rate"].tried[4]
    rows = [
        row("classifier", "learning rate", [2.0, end], batch=16, seed=seed, numbers=chosen)
        for seed, end in enumerate((0.5, 0.7, None))
    ]
    lost = [row("classifier", "everything adaptive", [2.0, 3.0], batch=16, numbers={"least": 1e-8})]
    assert control.cell(rows) == "0.7 (0.1, 0.1)" and control.cell(lost) == "diverged"
    assert figures.markdown(control.table(rows + lost)).count("diverged") == 1
    (axis,) = control.picture(rows + lost).axes  # one problem
    assert [line.get_label() for line in axis.get_lines()][:1] == ["learning rate"]
    fields = [make().fields for make in control.STUDY.cases.values()]
    assert [(each["problem"], each["batch"]) for each in fields] == [
        (problem, batch) for problem in ("autoencoder", "classifier") for batch in (16, 128, 1797)
    ]


ENTRIES = {
    f"{study} {name}": entry for study, one in STUDIES.items() if study != "demo" for name, entry in one.entries.items()
}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_takes_all_the_numbers_that_are_tried(name):
    entry, layers = ENTRIES[name], task("mlp").layers
    assert entry.tried
    for numbers in entry.tried if entry.make else ():  # the peer makes its own
        made = entry.make({**numbers, "horizon": 10.0}, layers)
        assert isinstance(made, optax.GradientTransformation)


@pytest.mark.slow
@pytest.mark.full
def test_a_control_runs_and_a_bound_of_zero_holds_every_step(tmp_path):
    tried = ({"rate": 0.1, "damping": 1.0, "bound": 0},)
    entry = control.CONTROLS["learning rate, KL clip"]._replace(tried=tried, stretch=2)
    cases = {"one": partial(problems.on_digits, Perceptron((), 10), {"problem": "net", "batch": 8}, 8)}
    small = control.STUDY._replace(cases=cases, entries={"learning rate, KL clip": entry}, limits=Limits(4, 2))
    rows = study.run(small._replace(seeds=(1, 2)), tmp_path)
    assert [each["seed"] for each in rows] == [1, 2]
    assert all(each["steps"] == [0, 2, 4] and len(set(each["losses"])) == 1 for each in rows)
    assert figures.markdown(control.table(rows)).count("diverged") == 1


def test_defaults_have_a_row_for_every_method_and_tell_what_is_over_its_start():
    assert [*defaults.with_rates()][:3] == ["optax.adam", "kfac", "kfac, kl_clip=None"]
    assert [*defaults.without()][:3] == ["optax.adam, 0.01", "kfac, 0.1", "kfac, no rate"]
    assert "kbfgs, no rate" not in defaults.without()
    assert defaults.cell([row("net", "kfac", [2.0, 3.0])]) == "over"
    assert defaults.cell([row("net", "kfac", [2.0, end]) for end in (0.5, 1.0, None)]) == "1 (over)"
    rows = [row("net", "kfac", [2.0, 1.0], numbers={"rate": rate}) for rate in (0.1, 1.0)]
    columns = defaults.table(rows, "title").columns
    assert [column.header for column in columns] == ["net", "optimizer", "0.1", "1"]


@pytest.mark.slow
@pytest.mark.full  # the engine is that of the others
def test_defaults_run(tmp_path):
    cases = {"dense": defaults.case("dense", 16)}
    first = study.run(few(defaults.WITH_RATES, ["kfac"], cases, Limits(3, 3)), tmp_path)
    second = study.run(few(defaults.WITHOUT, ["kfac, 0.1"], cases, Limits(3, 3), seeds=(0, 1)), tmp_path)
    assert [each["numbers"]["learning_rate"] for each in first] == [*defaults.RATES]
    assert [each["seed"] for each in second] == [0, 1]
    assert defaults.WITH_RATES.known(tmp_path) == first and defaults.WITHOUT.known(tmp_path) == second


@pytest.fixture
def letters(monkeypatch):
    """The study of text on invented letters."""
    some = np.random.default_rng(0).choice(np.frombuffer(b"abcd", np.uint8), 2000)
    monkeypatch.setattr(text, "shakespeare", lambda given: some.tobytes())
    cases = {"text": partial(text.case, 2, 5, 4)}
    return few(text.STUDY, ["Adam"], cases, Limits(4, 2), trial=Limits(2, 2))


def test_passages_are_followed_by_the_letters_that_come_next():
    stream = text.passages(np.arange(50), 0, 2, 5)
    for _ in range(3):
        x, y = next(stream)
        assert x.shape == y.shape == (2, 5)
        np.testing.assert_array_equal(y, x + 1)
    entry = text.STUDY.entries["K-FAC"]
    assert entry.tried[0] == {"rate": 0.1, "damping": 0.1} and len(entry.tried) == 4
    assert text.STUDY.entries["K-FAC, nothing said"].tried == ({},)


@pytest.mark.slow
@pytest.mark.full
def test_the_transformer_learns_letters(letters, tmp_path):
    (found,) = study.run(letters, tmp_path)
    assert abs(found["losses"][0] - np.log(4)) < 1 and len(found["losses"]) == 3  # nats a letter
    assert text.STUDY.table([found]).row_count == 1


def test_the_table_of_equations_has_the_errors_and_the_ratio():
    ends = {"poisson 2d": (1e-6, 1e-2), "heat 4+1d": (1e-3, None)}
    rows = [
        row(problem, name, [1.0, end], config={"seconds": 8.0})
        for problem, pair in ends.items()
        for name, end in zip(("TENGraD, joint", "Adam"), pair, strict=True)
    ]
    found = figures.markdown(pinn.table(rows))
    assert "1.0e-06 (5)" in found and "| ratio | 10000.0 | - |" in found


@pytest.mark.slow
@pytest.mark.full
def test_an_equation_is_solved_by_two_of_the_methods(tmp_path):
    limits, cases = pinn.SECONDS._replace(seconds=0.01), {"poisson 2d": partial(pinn.case, "poisson 2d", 0.02)}
    small = few(pinn.STUDY, ["Adam", "TENGraD, joint"], cases, limits, trial=limits, seeds=(0,))
    rows = study.run(small, tmp_path)
    assert [each["name"] for each in rows] == ["Adam", "TENGraD, joint"]
    assert all(each["losses"][-1] is not None and each["steps"][-1] > 0 for each in rows)
    tried = kept(tmp_path / "pinn.jsonl", {"trial": True})
    assert len(tried) == 6 and sum(each["best"] for each in tried) >= 2
    assert small.known(tmp_path) == rows


@pytest.mark.parametrize(("name", "count"), [("pinn", 96), ("regression", 48), ("text", 6)])
def test_the_committed_records_are_those_of_a_study(name, count):
    rows = STUDIES[name].known(RESULTS)
    assert len(rows) == count and {*rows[0]["config"]} == {*STUDIES[name].key}
    assert {each["name"] for each in rows} <= {*STUDIES[name].entries}
    assert STUDIES[name].table(rows).row_count >= len({each["name"] for each in rows})


def test_a_table_is_standardised_and_one_that_is_not_there_says_where_it_would_be(tmp_path, monkeypatch):
    x, y = regression.table_of("diabetes", 1000)
    assert x.shape == (442, 10) and y.shape == (442, 1)
    for part in (x, y):
        np.testing.assert_allclose((part.mean(0), part.std(0)), (0 * part[0], 1 + 0 * part[0]), atol=1e-5)
    (tmp_path / "uci" / "energy").mkdir(parents=True)
    (tmp_path / "uci" / "energy" / "data.txt").write_text("1 2 3\n2 4 5\n3 3 1\n")
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    x, y = regression.table_of("energy", 1000)
    assert x.shape == (3, 2) and np.argmax(y) == np.argmax(x[:, 1])
    assert len(regression.table_of("energy", 2).labels) == 2
    with pytest.raises(FileNotFoundError, match=r"uci/yacht/data.txt is missing. NATGRAD_DATA names a folder"):
        regression.table_of("yacht", 10)


@pytest.mark.slow
@pytest.mark.full  # compiles four methods
def test_a_table_is_learned(tmp_path):
    limits = regression.SECONDS._replace(seconds=2.0)
    cases = {"diabetes": partial(regression.case, "diabetes", 8)}
    small = few(regression.STUDY, regression.STUDY.entries, cases, limits, trial=limits.shorter(None, 0.5), seeds=(0,))
    rows = study.run(small, tmp_path)
    assert {each["name"] for each in rows} == set(regression.STUDY.entries)
    assert all(each["losses"][-1] < 0.25 < each["losses"][0] for each in rows)
    assert figures.markdown(small.table(rows)).count("|") > 12
