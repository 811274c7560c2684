"""The experiment on text, in small."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import text


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny net on invented letters."""
    letters = np.random.default_rng(0).choice(np.frombuffer(b"abcd", np.uint8), 2000)
    monkeypatch.setattr(text, "shakespeare", lambda given: letters.tobytes())
    return text.Config(
        output=tmp_path, methods=("Adam",), budget=1, trial=2, steps=4, every=2, batch=2, context=5, width=4
    )


def test_passages_are_followed_by_the_letters_that_come_next(config):
    corpus = text.text(config)
    assert corpus.letters == 4 and len(corpus.train) == 1800 and len(corpus.test) == 200
    found = list(text.passages(np.arange(50), config, 0, 3))
    assert len(found) == 3
    for x, y in found:
        assert x.shape == y.shape == (2, 5)
        np.testing.assert_array_equal(y, x + 1)


@pytest.mark.slow
def test_every_method_runs_at_the_best_of_its_trials_and_is_not_run_again(config, monkeypatch):
    rows = text.run(config)
    (row,) = rows
    tried = [record for record in text.kept(config.output / "text.jsonl") if record["kind"] == "trial"]
    assert len(tried) == 2 and row["rate"] == min(tried, key=lambda record: record["loss"])["rate"]
    assert len(row["losses"]) == len(row["at"]) == 3 and np.all(np.diff(row["at"]) > 0)
    assert abs(row["losses"][0] - np.log(4)) < 1  # nats a letter
    monkeypatch.setattr(text, "Racer", None)
    assert text.run(config) == rows
    assert text.table(rows, config).row_count == 1 and len(text.picture(rows, config).axes) == 2


def test_an_unknown_method_is_refused(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'K-FAC'"):
        text.run(replace(config, methods=("KFAC",)))
