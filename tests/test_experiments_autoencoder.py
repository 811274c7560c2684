"""The autoencoders of the papers, in small: records, what is not run twice, what goes on, the table and the picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import autoencoder, tune
from experiments.data import Data, Part
from experiments.methods import METHODS
from experiments.records import keep
from experiments.training import Setting


@pytest.fixture
def config(tmp_path):
    """A tiny net on a few of the digits, two passes, three runs."""
    only = ("SGD-m", "K-BFGS", "K-BFGS (authors)")
    return replace(autoencoder.small(autoencoder.Config(output=tmp_path, smoke=True, only=only)), batch=500)


def without_seconds(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


@pytest.mark.slow
def test_runs_of_all_seeds_go_on_where_they_stopped_and_are_shown_beside_the_logs(config, monkeypatch):
    said = []
    found = autoencoder.run(replace(config, epochs=1), said.append)
    assert "Left: 4 epochs" in said[0]  # of two methods and two seeds; the usual K-BFGS is the authors'
    assert [run.name for run in found.runs] == ["K-BFGS (authors)", "SGD-m", "K-BFGS"]
    assert found.records["K-BFGS"] == found.records["K-BFGS (authors)"]
    starts = {rows[0]["train_loss"] for seeds in found.records.values() for rows in seeds}
    assert len(starts) == 2  # one for each seed
    path = config.output / "autoencoder.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # as if stopped before the last line
    longer = autoencoder.run(config, said.append)
    assert "Left: 5 epochs" in said[1]
    for name, seeds in longer.records.items():
        assert [rows[:2] for rows in seeds] == found.records[name]
    assert len(path.read_text().splitlines()) == 2 * 2 * 3

    def work(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr(autoencoder, "Runner", work)
    assert autoencoder.run(config).records == longer.records
    assert autoencoder.run(replace(config, seeds=(3,), estimate=True), said.append).records == {}
    assert "Left: 4 epochs" in said[2]
    with pytest.raises(AssertionError, match="ran again"):
        autoencoder.run(replace(config, seeds=(3,)))

    shown = autoencoder.table(longer, config)
    assert shown.row_count == 3
    first = list(shown.columns[3].cells)
    assert first[0].endswith("(169.0)") and "[" in first[0]  # logged after an epoch, and the range of the seeds
    axes = autoencoder.picture(longer, config).axes
    assert [len(axis.lines) for axis in axes] == [2, 1, 2, 2]  # a row of dots beside the first
    assert all(len(axis.collections) == len(axis.lines) - (axis is axes[0]) for axis in axes)  # bands

    monkeypatch.undo()
    path.unlink()
    (config.output / "autoencoder_states").rename(config.output / "elsewhere")
    straight = autoencoder.run(replace(config, only=("K-BFGS",), seeds=(1,)))
    assert without_seconds(straight.records["K-BFGS"][0]) == without_seconds(longer.records["K-BFGS"][1])


NOTHING = Data("mnist", *2 * (Part(np.empty((0, 0)), np.empty(0)),))


def test_a_tuned_run_has_the_best_setting_of_the_trials_or_the_usual_one(tmp_path):
    config = autoencoder.Config(output=tmp_path, runs="tuned")
    key = tune.group(autoencoder.chosen(config), NOTHING, 1000)
    keep(tmp_path / "tune.jsonl", [{"name": "Adam", "rate": 0.002, "damping": 0.0, **key, "epochs": 2, "loss": 1.0}])
    found = {run.name: run.setting for run in autoencoder.wanted(NOTHING, config)}
    assert list(found) == list(METHODS)
    assert found["Adam"] == Setting(0.002)
    assert found["SOAP"] == METHODS["SOAP"].ranges["autoencoder"].usual
    other = {run.name: run.setting for run in autoencoder.wanted(NOTHING, replace(config, batch=500))}
    assert other["Adam"] == METHODS["Adam"].ranges["autoencoder"].usual


def test_an_unknown_run_and_authors_who_logged_nothing_are_refused(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'Adam'"):
        autoencoder.wanted(NOTHING, replace(config, only=("KFAC",)))
    with pytest.raises(ValueError, match="No author logged a run of curves; expected runs='tuned'"):
        autoencoder.wanted(NOTHING, replace(config, problem="curves", runs="authors", only=()))


def test_the_committed_runs_are_found_and_shown():
    folder = Path(autoencoder.__file__).parent / "results"
    found = autoencoder.found_in(folder, "mnist")
    assert {run.name for run in found.runs} >= {*autoencoder.AUTHORS, "Adam", "K-FAC, adaptive"}
    shown = autoencoder.table(found, autoencoder.Config(output=folder))
    assert any(cell.endswith("(61.6)") for cell in shown.columns[6].cells)


@pytest.fixture
def two(tmp_path):
    """Adam and K-FAC in a folder, two epochs of four steps, with what a step costs: K-FAC is dearer and sooner down."""
    config = autoencoder.Config(output=tmp_path, problem="curves", epochs=2)
    key, entries = tune.group(autoencoder.chosen(config), NOTHING._replace(name="curves-like"), 1000), []
    ends = {"Adam": [(140, 139, 135, 131), (130, 129, 125, 120)], "K-FAC": [(135, 129, 120, 118), (110, 105, 101, 99)]}
    for name, epochs in ends.items():
        setting = METHODS[name].ranges["autoencoder"].usual
        own = {"name": name, **setting._asdict(), **key, "images": 4000, "seed": 0, "seconds": 1.0, "test_loss": 1.0}
        entries.append(own | {"epoch": 0, "batch_losses": [], "train_loss": 500.0})
        for epoch, losses in enumerate(epochs, 1):
            entries.append(own | {"epoch": epoch, "batch_losses": losses, "train_loss": float(losses[-1])})
    keep(autoencoder.records_path(config), entries)
    costs = {"SGD-m": 1.0, "Adam": 1.0, "K-FAC": 1.5}
    keep(tmp_path / "autoencoder_paces.jsonl", [{**key, "rounds": 1, "idle": 0.5, "first": costs, "later": costs}])
    return config


def test_how_soon_a_run_is_as_low_as_adam_at_its_end_and_off_the_plateau(two, monkeypatch):
    monkeypatch.setitem(autoencoder.EPOCHS, "curves", 2)
    found = autoencoder.found_in(two.output, "curves")
    assert [run.name for run in found.runs] == ["Adam", "K-FAC"]
    columns = [list(column.cells) for column in autoencoder.table(found, two).columns]
    assert columns[-2:] == [["2 (1.00)", "1 (0.75)"], ["6 (1.00)", "2 (0.33)"]]
    adam, kfac = found.runs
    alone = found.of(lambda run: run is kfac)
    assert autoencoder.overtaken(alone, kfac, 2) == (np.inf, np.inf) and autoencoder.left(found, kfac, 50.0) == "-"
    assert autoencoder.overtaken(found, adam, 1) == (1, 1)


def test_a_folder_without_runs_has_nothing_and_one_without_costs_says_what_to_do(two, tmp_path, monkeypatch):
    monkeypatch.setitem(autoencoder.EPOCHS, "curves", 3)
    assert autoencoder.found_in(two.output, "curves") is None  # none is at its last epoch
    assert autoencoder.found_in(two.output, "mnist") is None
    monkeypatch.setitem(autoencoder.EPOCHS, "curves", 2)
    (two.output / "autoencoder_paces.jsonl").unlink()
    with pytest.raises(ValueError, match=r"what their steps cost; run `make autoencoder ARGS=--estimate`"):
        autoencoder.found_in(two.output, "curves")
