"""The short studies, in small: their problems, entries, tables and pictures."""

import inspect

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from tasks import task

import natgrad_jax as ng
from experiments import control, defaults, demo, digits, figures, pinn, race, regression, study, text


@pytest.fixture(autouse=True)
def closed():
    """No picture stays."""
    yield
    plt.close("all")


def row(problem, name, losses, **others):
    """A row of a run that never was."""
    steps = [*range(0, 5 * len(losses), 5)]
    own = {"problem": problem, "name": name, "seed": 0, "numbers": {}, "steps": steps, "test": "97.0%"}
    return own | {"seconds": [0.1 * step for step in steps], "losses": losses, "compile_seconds": 1.0} | others


def test_an_epoch_of_the_digits_shows_every_image_at_most_once_and_each_has_its_own_order():
    images = digits.images()
    stream = digits.endless(images._replace(labels=np.arange(1797)), 500, 0)
    first, second = ([next(stream).labels for _ in range(3)] for _ in range(2))
    assert len(set(np.concatenate(first))) == 1500 and not np.array_equal(first, second)
    np.testing.assert_array_equal(
        first[0], next(digits.endless(images._replace(labels=np.arange(1797)), 500, 0)).labels
    )
    assert digits.entropy(digits.rows(digits.images(28)).images) == pytest.approx(282.95, abs=0.01)
    train, test = digits.split(images, 0.2, 0)
    assert len(train.labels) == 1437 and len(test.labels) == 360
    assert np.ptp(np.bincount(test.labels)) <= 2  # classes are alike


def test_the_demo_has_every_method_on_both_problems():
    config = demo.Config(smoke=True)
    names = {name for name in ng.__all__ if hasattr(ng, f"scale_by_{name}")} | {"kbfgs"}
    assert {method.__name__ for method, *_ in demo.METHODS.values()} == names | {"adam"}
    for case in demo.cases(config):
        shapes = jax.eval_shape(case.task.init, jax.random.key(0))
        for name, entry in demo.entries(case, config).items():
            layers = None if name == "Adam" else case.task.capture(entry.labels).layers(shapes, case.task.batch.images)
            jax.eval_shape(entry.make({"horizon": 10.0}, layers).init, shapes["params"])
            assert (entry.steps, entry.labels) == (10, "true" if name == "K-BFGS" else "sampled")
    rows = [row("classifier", "Adam", [2.0, 1.0, 0.5]), row("classifier", "K-FAC", [2.0, 0.4, 0.1])]
    shown = demo.table(rows)
    assert list(shown.columns[6].cells) == ["1.0", "0.5"] and list(shown.columns[5].cells) == ["100.0", "100.0"]


@pytest.mark.slow
@pytest.mark.full  # compiles every method twice
def test_the_demo_runs(tmp_path):
    demo.main(demo.Config(output=tmp_path, smoke=True))
    assert (tmp_path / "demo.png").exists()


def test_the_race_tells_levels_and_ratios():
    config = race.Config(seeds=2, levels=(1.0, 0.1))
    entries = race.entries(config)
    assert len(entries["Adam"].tried) == 12 and entries["Adam"].steps == 2000 and {*race.METHODS} < {*entries}
    assert set(race.entries(race.Config(methods=("K-FAC",)))) == {"Adam", "K-FAC"}
    adam = {"numbers": {"rate": 0.001, "falls": 1}}
    rows = [row("autoencoder", "Adam", [9.0, 0.9, 0.2], seed=seed, **adam) for seed in (0, 1)]
    rows += [row("autoencoder", "K-FAC", [9.0, end, 0.05], seed=seed) for seed, end in enumerate((0.09, 0.5))]
    table = race.table(rows, config)
    assert list(table.columns[0].cells) == ["Adam, 0.001, cosine", "K-FAC"]
    assert list(table.columns[3].cells) == ["-", "8 / 0.8 s"]
    assert list(table.columns[4].cells) == ["-", "<0.75 (0.50-1.00)"]
    falls = race.adam({"rate": 1.0, "falls": 1.0, "horizon": 10.0}, None)
    state = falls.init(np.zeros(2))
    assert np.allclose(falls.update(np.ones(2), state)[0], -1.0, atol=1e-3)


def test_a_control_is_made_with_every_number_that_is_tried_and_told_with_what_was_chosen():
    for name, one in control.CONTROLS.items():
        asked = {*inspect.signature(one.make).parameters} - {"layers", "rate"}
        assert all({*numbers} - {"rate"} == asked for numbers in one.tried), name
    rows = [
        row(
            "classifier",
            "learning rate",
            [2.0, end],
            batch=16,
            seed=seed,
            numbers=control.CONTROLS["learning rate"].tried[4],
        )
        for seed, end in enumerate((0.5, 0.7, None))
    ]
    lost = [row("classifier", "everything adaptive", [2.0, 3.0], batch=16, numbers={"least": 1e-8})]
    assert control.cell(rows) == "0.7 [dim](0.1, 0.1)[/dim]" and control.cell(lost) == "diverged"
    assert figures.markdown(control.table(rows + lost)).count("diverged") == 1
    assert len(control.picture(rows + [lost[0] | {"seed": seed} for seed in range(3)]).axes) == 2
    config = control.Config(batches=(8, 16))
    fields = [case.fields for case in control.cases(config)]
    assert [tuple(each.values()) for each in fields] == [
        (problem, batch) for problem in ("autoencoder", "classifier") for batch in (8, 16)
    ]


def entries():
    """{experiment and method: its entry} of the studies that choose among numbers."""
    config = text.Config()
    return {
        **{f"control {name}": control.entry(name, 10) for name in control.CONTROLS},
        **{f"defaults {name}": one for name, one in defaults.with_rates(defaults.Config()).items()},
        **{f"defaults {name}": one for name, one in defaults.without(defaults.Config()).items()},
        **{f"pinn {name}": one for name, one in pinn.METHODS.items()},
        **{f"regression {name}": one for name, one in regression.METHODS.items()},
        **{f"race {name}": one for name, one in race.entries(race.Config()).items()},
        **{f"text {name}": text.entry(name, config) for name in config.methods},
    }


@pytest.mark.parametrize("name", entries())
def test_every_entry_takes_all_the_numbers_that_are_tried(name):
    entry, layers = entries()[name], task("mlp").layers
    assert entry.tried
    for numbers in entry.tried if entry.make else ():  # the peer makes its own
        made = entry.make({**numbers, "horizon": 10.0}, layers)
        assert isinstance(made, optax.GradientTransformation)


@pytest.mark.slow
@pytest.mark.full
def test_a_control_runs_and_a_bound_of_zero_holds_every_step(tmp_path, monkeypatch):
    few = control.CONTROLS["learning rate, KL clip"]._replace(tried=({"rate": 0.1, "damping": 1.0, "bound": 0},))
    monkeypatch.setitem(control.CONTROLS, "learning rate, KL clip", few)
    controls, widths = ("learning rate, KL clip",), {"autoencoder_widths": (), "classifier_widths": ()}
    config = control.Config(tmp_path, 4, 2, (8,), (1, 2), controls=controls, **widths)
    rows = control.run(config)
    assert [(each["problem"], each["seed"]) for each in rows] == [
        (problem, seed) for problem in ("autoencoder", "classifier") for seed in (1, 2)
    ]
    assert all(each["steps"] == [0, 2, 4] and len(set(each["losses"])) == 1 for each in rows)
    assert figures.markdown(control.table(rows)).count("diverged") == 2


def test_defaults_have_a_row_for_every_method_and_tell_what_is_over_its_start():
    config = defaults.Config(methods=("kfac", "kbfgs"))
    assert [*defaults.with_rates(config)][:3] == ["optax.adam", "kfac", "kfac, kl_clip=None"]
    assert [*defaults.without(config)] == ["optax.adam, 0.01", "kfac, 0.1", "kfac, no rate"]
    assert defaults.cell([row("net", "kfac", [2.0, 3.0])]) == "over"
    assert defaults.cell([row("net", "kfac", [2.0, end]) for end in (0.5, 1.0, None)]) == "1 (over)"
    rows = [row("net", "kfac", [2.0, 1.0], numbers={"rate": rate}) for rate in (0.1, 1.0)]
    assert "kfac" in figures.markdown(defaults.table(rows, "rate", "title"))
    assert [column.header for column in defaults.table(rows, "rate", "title").columns] == [
        "net",
        "optimizer",
        "0.1",
        "1",
    ]


@pytest.mark.slow
@pytest.mark.full  # the engine is that of the others
def test_defaults_run(tmp_path):
    config = defaults.Config(tmp_path, ("dense",), ("kfac",), (0.01, 1.0), 3, 16, (8, 16), 2)
    first, second = defaults.run(config)
    assert [each["numbers"]["rate"] for each in first] == 3 * [0.01, 1.0]
    assert len(second) == 2 * 3 * 2


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A configuration on invented letters."""
    some = np.random.default_rng(0).choice(np.frombuffer(b"abcd", np.uint8), 2000)
    monkeypatch.setattr(text, "shakespeare", lambda given: some.tobytes())
    return text.Config(tmp_path, ("Adam",), budget=1, trial=2, steps=4, every=2, batch=2, context=5, width=4)


def test_passages_are_followed_by_the_letters_that_come_next(letters):
    corpus = text.text(letters)
    assert corpus.letters == 4 and len(corpus.train) == 1800 and len(corpus.test) == 200
    stream = text.passages(np.arange(50), letters, 0)
    for _ in range(3):
        x, y = next(stream)
        assert x.shape == y.shape == (2, 5)
        np.testing.assert_array_equal(y, x + 1)
    entry = text.entry("K-FAC", letters)
    assert entry.tried[0] == {"rate": 0.1, "damping": 0.1} and len(entry.tried) == 2
    assert text.entry("K-FAC, nothing said", letters).tried == ({},)
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'K-FAC'"):
        text.run(text.Config(methods=("KFAC",)))


@pytest.mark.slow
@pytest.mark.full
def test_the_transformer_learns_letters(letters):
    (found,) = text.run(letters)
    assert abs(found["losses"][0] - np.log(4)) < 1 and len(found["losses"]) == 3  # nats a letter
    assert text.table([found]).row_count == 1


def test_the_table_of_equations_has_the_errors_and_the_ratio():
    ends = {"poisson 2d": (1e-6, 1e-2), "heat 4+1d": (1e-3, None)}
    rows = [
        row(problem, name, [1.0, end], config={"seconds": 8.0})
        for problem, pair in ends.items()
        for name, end in zip(("TENGraD, joint", "Adam"), pair, strict=True)
    ]
    found = figures.markdown(pinn.table(rows))
    assert "1.0e-06 (5)" in found and "10000.0" in found and "ratio" in figures.markdown(pinn.table(rows))


@pytest.mark.slow
@pytest.mark.full
def test_an_equation_is_solved_by_two_of_the_methods(tmp_path):
    few = {"seconds": 0.01, "trial": 0.01, "seeds": 1, "scale": 0.02, "equations": ("poisson 2d",)}
    rows = pinn.run(pinn.Config(tmp_path, methods=("Adam", "TENGraD, joint"), **few))
    assert [each["name"] for each in rows] == ["Adam", "TENGraD, joint"]
    assert all(each["losses"][-1] is not None and each["steps"][-1] > 0 for each in rows)
    tried = study.kept(tmp_path / "pinn.jsonl", {"trial": True})
    assert len(tried) == 6 and sum(each["best"] for each in tried) >= 2


@pytest.mark.parametrize(("name", "experiment"), [("pinn", pinn), ("regression", regression)])
def test_the_committed_records_are_those_of_the_committed_table(name, experiment):
    folder = pinn.Path(pinn.__file__).parent / "results"
    rows = study.kept(folder / f"{name}.jsonl", {"trial": False})
    assert figures.markdown(experiment.table(rows)) + "\n" == (folder / f"{name}.md").read_text()


def test_a_table_is_standardised_and_one_that_is_not_there_is_left_out(tmp_path, monkeypatch, capsys):
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
    assert regression.run(regression.Config(tmp_path, tables=("yacht",))) == []
    assert "yacht is left out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.full  # compiles four methods
def test_a_table_is_learned(tmp_path):
    rows = regression.run(regression.Config(tmp_path, 2.0, 0.5, 1, 8, tables=("diabetes",)))
    assert {each["name"] for each in rows} == set(regression.METHODS)
    assert all(each["losses"][-1] < 0.25 < each["losses"][0] for each in rows)
    assert figures.markdown(regression.table(rows)).count("|") > 12
