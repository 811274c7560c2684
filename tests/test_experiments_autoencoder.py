"""The autoencoders of the papers, in small: records, what is not run twice, what goes on, the table and the picture."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import autoencoder, tune
from experiments.data import Data, Part
from experiments.methods import ALL, METHODS
from experiments.records import keep, kept
from experiments.training import Pace, Setting


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
    first = list(shown.columns[2].cells)
    assert first[0].endswith("(169.0)") and "[" in first[0]  # logged after an epoch, and the range of the seeds
    axes = autoencoder.picture(longer, config).axes
    assert [len(axis.lines) for axis in axes] == [2, 1, 2, 2]  # a row of dots beside the first
    assert all(len(axis.collections) == len(axis.lines) - (axis is axes[0]) for axis in axes)  # bands

    monkeypatch.undo()
    path.unlink()
    (config.output / "autoencoder_states").rename(config.output / "elsewhere")
    straight = autoencoder.run(replace(config, only=("K-BFGS",), seeds=(1,)))
    assert without_seconds(straight.records["K-BFGS"][0]) == without_seconds(longer.records["K-BFGS"][1])


NOTHING = Data("mnist", Part([], []), Part([], []))


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


def test_the_committed_runs_are_found_and_shown_without_seconds():
    config = autoencoder.Config(output=Path(autoencoder.__file__).parent / "results")
    data = NOTHING._replace(train=Part([], range(60000)))
    pace = Pace(0.1, dict.fromkeys(ALL, 1.0), dict.fromkeys(ALL, 1.0))
    key = tune.group(autoencoder.chosen(config), data, config.batch)
    assert len(kept(autoencoder.records_path(config), key | {"seed": 0})) >= 16 * 11
    runs, path = autoencoder.wanted(data, replace(config, runs="authors")), autoencoder.records_path(config)
    records = {run.name: [kept(path, autoencoder.identity(run, 0, data, config))] for run in runs}
    found = autoencoder.Found(runs, records, pace)
    assert "61.4 (61.6)" in list(autoencoder.table(found, config).columns[5].cells)
    assert "Left: 0 epochs" in autoencoder.plan(runs, pace, data, config)
