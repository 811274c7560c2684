"""The autoencoder of the papers, in small: records, what is not run twice, the table and the picture."""

import json

import pytest

from experiments import autoencoder


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A narrow net on the digits, one pass, two runs."""
    monkeypatch.setattr(autoencoder, "MODEL", autoencoder.Autoencoder(widths=(6, 3, 6)))
    return autoencoder.Config(
        output=tmp_path, only=("SGD-m (authors)", "TNT (authors)"), epochs=1, batch=300, rounds=1, data=None
    )


@pytest.mark.slow
def test_runs_are_kept_and_not_repeated_and_are_shown_beside_the_logs(config, monkeypatch):
    records, paces = autoencoder.run(config)
    assert [record["name"] for record in records] == list(config.only) == list(paces)
    assert all(record["losses"][1] < record["losses"][0] for record in records)
    lines = (config.output / "autoencoder.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records

    def train(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr(autoencoder, "train", train)
    assert autoencoder.run(config)[0] == records
    with pytest.raises(AssertionError, match="ran again"):
        autoencoder.run(autoencoder.Config(**{**vars(config), "seed": 1}))

    shown = autoencoder.table(records, paces, config)
    assert shown.row_count == 2
    assert "(191.2)" in list(shown.columns[1].cells)[1]  # what the authors of TNT logged after one epoch
    (left, right) = autoencoder.picture(records).axes
    assert len(left.lines) == 4 and not right.lines  # two curves, two rows of dots


def test_an_unknown_run_or_trial_is_refused_before_any_work(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'Adam'"):
        autoencoder.wanted(autoencoder.Config(**{**vars(config), "only": ("KFAC",)}))
    with pytest.raises(ValueError, match=r"'TNT:0\.1' is none of"):
        autoencoder.wanted(autoencoder.Config(**{**vars(config), "trials": ("TNT:0.1",)}))


def test_a_missing_file_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is missing; NATGRAD_DATA"):
        autoencoder.images(autoencoder.Config(**{**vars(config), "data": tmp_path}))
