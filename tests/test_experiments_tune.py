"""The same budget of trials for every method: which settings they are, what is kept, what is the best."""

from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from experiments import tune
from experiments.data import digits
from experiments.methods import METHODS
from experiments.nets import autoencoder
from experiments.problems import problem
from experiments.records import keep, kept
from experiments.running import Setting


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_every_method_has_the_budget_within_its_range_unless_nothing_of_it_is_tuned(kind):
    for name, method in METHODS.items():
        within = method.ranges[kind]
        own = within.drawn(6, (0, 1))
        assert len(set(own)) == (6 if method.tuned else 1), name
        for setting in own:
            for least, number, most in zip(within.least, setting, within.most, strict=True):
                assert 0.99 * least <= number <= 1.01 * most  # three digits
    assert METHODS["SOAP"].ranges[kind].drawn(3, (0,))[0].damping == 1e-16


def test_draws_fill_every_stratum_and_are_those_of_the_committed_trials():
    within = METHODS["K-FAC"].ranges["classifier"]
    drawn = within.drawn(50, (3,))
    for numbers, least, most in zip(zip(*drawn, strict=True), within.least, within.most, strict=True):
        places = 50 * np.log(np.sort(numbers) / least) / np.log(most / least)
        assert np.all(np.abs(places - np.arange(50) - 0.5) < 0.7)  # half a stratum, and three digits
    assert drawn == within.drawn(50, (3,)) != within.drawn(50, (4,))
    trials = kept(Path(tune.__file__).parent / "results" / "tune.jsonl", {"problem": "mnist", "name": "SGD-m"})
    own = METHODS["SGD-m"].ranges["autoencoder"].drawn(6, (0, crc32(b"SGD-m")))
    assert {setting.rate for setting in own} <= {trial["rate"] for trial in trials}


def test_the_best_is_of_a_trial_that_did_not_diverge_among_the_longest(tmp_path):
    path, key = tmp_path / "tune.jsonl", {"data": "mnist"}
    rows = [(0.1, 2, None), (0.2, 2, 3.0), (0.3, 2, 4.0), (0.4, 1, 1.0)]
    keep(
        path,
        [
            {"name": "Adam", "rate": rate, "damping": 0.0, **key, "epochs": epochs, "loss": loss}
            for rate, epochs, loss in rows
        ],
    )
    assert tune.best(path, "Adam", key) == Setting(0.2)
    assert tune.best(path, "Adam", {"data": "curves-like"}) is tune.best(path, "SOAP", key) is None


def test_a_number_at_an_edge_of_what_was_tried_has_a_star_but_not_the_only_one():
    three = [{"rate": rate, "damping": 1e-8} for rate in (0.1, 0.2, 0.3)]
    assert [tune.starred(record, three) for record in three] == ["0.1, 1e-08*", "0.2, 1e-08", "0.3, 1e-08*"]
    assert tune.starred({"rate": 0.2, "damping": 3.0}, [*three, {"rate": 0.2, "damping": 3.0}]) == "0.2, 3*"


def test_the_picture_has_a_panel_for_every_tuned_method_with_its_trials_a_ring_and_crosses():
    losses = {"SGD-m": (3.0, 2.0, None), "K-FAC": (None, None, None), "K-FAC, adaptive": (1.0,)}
    trials = [
        {"name": name, "rate": 0.1 * 2**place, "damping": 1.0 + place, "loss": loss}
        for name, own in losses.items()
        for place, loss in enumerate(own)
    ]
    figure = tune.picture(trials, "a net")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["SGD-m", "K-FAC"]
    points = [[len(drawn.get_offsets()) for drawn in axis.collections] for axis in figure.axes]
    assert points == [[2, 1], [0, 3]]  # dots, crosses
    (ring,) = figure.axes[0].lines
    assert ring.get_data()[0] == [0.2] and not figure.axes[1].lines


def test_the_table_has_dashes_where_every_trial_or_half_of_them_diverged():
    losses = {"TNT": (None, None), "Adam": (None, 2.0, None)}
    trials = [
        {"name": name, "rate": 0.1 * 2**place, "damping": 1.0, "loss": loss, "images": 9, "epochs": 1}
        for name, own in losses.items()
        for place, loss in enumerate(own)
    ]
    rows = list(zip(*(column.cells for column in tune.table(trials, "a net").columns), strict=True))
    assert rows == [("TNT", "-", "-", "-", "2", "2"), ("Adam", "0.2, 1", "2", "-", "2", "3")]


class Small(tune.Config):
    """A tiny net on the digits."""

    @property
    def what(self):
        return problem("mnist")._replace(net=autoencoder((6, 3)), batch=300, load=lambda given: digits())


@pytest.mark.full
def test_trials_are_kept_and_not_repeated_and_their_best_is_starred_at_an_edge(tmp_path, monkeypatch):
    config = Small(output=tmp_path, only=("Adam", "SGD-m"), budget=2, epochs=1)
    records = tune.run(config)
    assert [record["name"] for record in records] == 3 * ["SGD-m"] + 3 * ["Adam"]
    assert [record["rate"] for record in records[::3]] == [0.003, 0.004]  # the usual ones first
    assert kept(config.output / "tune.jsonl") == records
    assert min(record["loss"] for record in records) < 64 * np.log(2)

    def work(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr(tune, "Runner", work)
    assert tune.run(config) == records
    with pytest.raises(AssertionError, match="ran again"):
        tune.run(replace(config, epochs=2))
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'TENGraD'"):
        tune.run(replace(config, only=("KFAC",)))
    assert tune.table(records, "a net").row_count == 2
