"""The convnet of the TENGraD paper, in small: what is kept, what is not run twice, what goes on, and what is shown."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import classify, tune
from experiments.data import Data, Part
from experiments.methods import METHODS, Shared
from experiments.records import keep
from experiments.training import Pace, Setting

PACE = Pace(0.1, dict.fromkeys(METHODS, 1.0), dict.fromkeys(METHODS, 2.0))
NOTHING = Data("fashion", Part([], []), Part([], []))


@pytest.fixture
def config(tmp_path):
    """A tiny net on a few of the digits, two methods."""
    config = classify.small(classify.Config(output=tmp_path, only=("TENGraD", "SGD-m")))
    return replace(config, batch=30, refresh_every=3)


def without_seconds(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


@pytest.mark.slow
def test_runs_of_all_seeds_go_on_where_they_stopped_and_nothing_is_done_twice(config, monkeypatch):
    whole, said = classify.load(config), []
    data = whole._replace(train=whole.train.first(90))
    monkeypatch.setattr(classify, "load", lambda config: data)
    found = classify.run(config, said.append)
    assert "Left: 4 epochs" in said[0]
    assert list(found.settings) == list(found.records) == ["SGD-m", "TENGraD"]
    assert [row["epoch"] for seeds in found.records.values() for rows in seeds for row in rows] == 4 * [0, 1]
    starts = {rows[0]["train_loss"] for seeds in found.records.values() for rows in seeds}
    assert len(starts) == 2  # one for each seed
    path = config.output / "classify.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # as if stopped before the last line
    longer = classify.run(replace(config, epochs=2), said.append)
    assert "Left: 5 epochs" in said[1]
    for name, seeds in longer.records.items():
        assert [rows[:2] for rows in seeds] == found.records[name]
    assert len(path.read_text().splitlines()) == 2 * 2 * 3

    def work(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr(classify, "Runner", work)
    assert classify.run(replace(config, epochs=2)) == longer
    assert classify.run(replace(config, seeds=(3,), estimate=True), said.append).records == {}
    assert "Left: 2 epochs" in said[2]
    with pytest.raises(AssertionError, match="ran again"):
        classify.run(replace(config, seeds=(3,)))

    monkeypatch.undo()
    path.unlink()
    (config.output / "classify_states").rename(config.output / "elsewhere")
    runner = classify.compiled("TENGraD", data, config)
    setting, last = longer.settings["TENGraD"], replace(config, epochs=2)
    straight = classify.train("TENGraD", setting, 1, lambda name: runner, data, last)
    assert without_seconds(straight) == without_seconds(longer.records["TENGraD"][1])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_with_the_clip_and_the_labels_of_its_own(name, config, monkeypatch):
    data, made = Data("digits", Part(np.zeros((30, 28, 28, 1), np.float32), np.zeros(30, int)), Part([], [])), []
    monkeypatch.setattr(classify, "Runner", lambda *given: made.append(given))
    for kl_clip in (0.0, 0.01):
        classify.compiled(name, data, replace(config, kl_clip=kl_clip))
        make, setting, task, labels = made.pop()
        variables = jax.eval_shape(task.model.init, jax.random.key(0), task.batch.images)
        layers = ng.linen.capture(task.model, task.likelihood, labels=labels).layers(variables, task.batch.images)
        state = jax.eval_shape(make(setting, layers).init, variables["params"])
        assert bool(optax.tree.get_all_with_path(state, "clip_factor")) == (METHODS[name].clips and kl_clip > 0)
        assert labels == ("true" if METHODS[name].of == "kbfgs" else "sampled")


def test_a_run_has_the_best_setting_of_the_trials_of_its_net_or_the_usual_one(tmp_path):
    config = classify.Config(output=tmp_path)
    key = tune.group(classify.chosen(config), NOTHING, 128)
    trial = {"name": "Adam", "damping": 0.0, **key, "epochs": 1}
    keep(tmp_path / "tune.jsonl", [trial | {"rate": 0.002, "loss": 0.4}, trial | {"rate": 0.003, "loss": 0.5}])
    found = classify.wanted(NOTHING, config)
    assert list(found) == list(METHODS)
    assert found["Adam"] == classify.wanted(NOTHING, replace(config, kl_clip=0.0))["Adam"] == Setting(0.002)
    assert found["TNT"] == METHODS["TNT"].ranges["classifier"].usual
    for other in ({"batch": 64}, {"channels": 32}, {"units": 64}, {"problem": "digits"}):
        assert classify.wanted(NOTHING, replace(config, **other))["Adam"] == Setting(0.001), other


@pytest.mark.parametrize("problem", ["fashion", "cifar10", "digits"])
def test_a_trial_is_of_the_net_of_a_run_with_the_same_options(problem):
    for options in ({}, {"channels": 8, "units": 32, "depth": 32}):
        pair = [file.chosen(file.Config(problem=problem, **options)) for file in (classify, tune)]
        assert pair[0].net == pair[1].net and pair[0].fields == pair[1].fields
    assert classify.Config().shared == Shared()


def test_an_unknown_method_and_no_epochs_are_refused(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'TENGraD'"):
        classify.run(replace(config, only=("KFAC",)))
    with pytest.raises(ValueError, match="`epochs` is 0, expected 1 or more"):
        classify.run(replace(config, epochs=0))


def test_records_of_fashion_mnist_are_as_they_were_and_no_other_problem_finds_them(config):
    setting, found, data = Setting(0.1), {}, Data("digits", Part([], range(60)), Part([], []))
    for problem in ("fashion", "cifar10", "digits"):
        found[problem] = classify.identity("SGD-m", setting, 0, data, replace(config, problem=problem))
    assert list(found["fashion"].items()) == [
        ("name", "SGD-m"),
        ("rate", 0.1),
        ("damping", 0.0),
        ("data", "digits"),
        ("images", 60),
        ("channels", 3),
        ("units", 8),
        ("batch", 30),
        ("periods", [3, 2]),
        ("weight_decay", 0.001),
        ("kl_clip", 0.0),
        ("seed", 0),
    ]
    for one in found:
        assert [other for other in found if found[one].items() <= found[other].items()] == [one]


def test_the_committed_runs_are_found_and_shown():
    config = classify.Config(output=Path(classify.__file__).parent / "results")
    found = classify.found_in(config)
    assert {"SGD-m", "K-FAC", "TENGraD"} <= set(found.settings)
    assert classify.table(found, config).row_count == len(found.settings)
    assert classify.found_in(replace(config, channels=5)) is None


def test_a_folder_has_of_a_method_the_setting_of_the_trials_else_the_last_that_came_to_its_end(tmp_path):
    config = classify.Config(output=tmp_path, epochs=1)
    data = NOTHING._replace(train=Part([], range(256)))
    ran = {"Adam": (0.002, 0.004, 0.001), "SOAP": (0.1, 0.2, 0.3)}
    for name, rates in ran.items():
        for rate in rates:
            own = classify.identity(name, Setting(rate), 0, data, config) | {"test_accuracy": 0.5, "train_loss": rate}
            keep(classify.records_path(config), (own | {"epoch": epoch} for epoch in range(1 + (rate < 0.3))))
    trial = {"name": "Adam", "damping": 0.0, **tune.group(classify.chosen(config), data, 128), "epochs": 1}
    keep(tmp_path / "tune.jsonl", [trial | {"rate": 0.004, "loss": 0.4}])
    with pytest.raises(ValueError, match="not what their steps cost"):
        classify.found_in(config)
    keep(classify.paces_path(config), [classify.pace_key(data, config) | PACE._asdict()])
    found = classify.found_in(config)
    assert found.settings == {"Adam": Setting(0.004), "SOAP": Setting(0.2)}
    assert found.numbers("SOAP", "train_loss").tolist() == [[0.2, 0.2]]


def shown_of(count):
    """What would be found of so many methods, two seeds and two epochs; the first diverged."""

    def rows(place, seed):
        key = {"images": 256, "batch": 128, "periods": [100, 20]}
        losses = [None if place == 0 and epoch else 2.0 / (1 + epoch) + 0.1 * place + seed for epoch in range(3)]
        accuracies = (0.1 if place == 0 else 0.8 + 0.01 * place + 0.001 * seed for _ in losses)
        pairs = enumerate(zip(losses, accuracies, strict=True))
        return [
            {**key, "epoch": epoch, "train_loss": loss, "test_accuracy": accuracy, "batch_losses": [loss, loss]}
            for epoch, (loss, accuracy) in pairs
        ]

    names = list(METHODS)[:count]
    records = {name: [rows(place, seed) for seed in (0, 1)] for place, name in enumerate(names)}
    settings = {name: METHODS[name].ranges["classifier"].usual for name in names}
    return classify.Found(settings, records, PACE)


def test_the_table_has_a_row_for_every_method_with_ranges_over_seeds():
    found = shown_of(16)
    shown = classify.table(found, classify.Config(seeds=(0, 1), epochs=2))
    cells = [list(column.cells) for column in shown.columns]
    assert shown.row_count == 16 and cells[0] == list(METHODS)
    assert cells[3][0] == "-\n10.00 [10.00, 10.00]"
    assert cells[3][1] == "1.2667 [0.7667, 1.7667]\n81.05 [81.00, 81.10]"
    assert cells[1][-1] == "its own" != cells[1][1]


@pytest.mark.parametrize(("count", "thin"), [(6, 1), (16, 0)])
def test_the_picture_has_a_line_and_a_band_for_every_method_and_batches_of_a_few(count, thin):
    figure = classify.picture(shown_of(count), classify.Config(seeds=(0, 1), epochs=2))
    assert [len(axis.lines) for axis in figure.axes] == 2 * [(1 + thin) * count] + 2 * [count]
    assert all(len(axis.collections) == count for axis in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(METHODS)[:count]
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len({line.get_color() for line in lines}) == count
    assert 70 < figure.axes[2].get_ylim()[0] < 81  # what stayed at chance is below
