"""The convnet of the TENGraD paper, in small: what is kept, what is not run twice, what goes on, and what is shown."""

import gzip
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import classify

METHODS = dict(classify.METHODS)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny net on a few of the digits; two methods, two trials each."""
    methods = {name: classify.METHODS[name] for name in ("TENGraD", "SGD-m")}
    for name, entry in methods.items():
        methods[name] = entry._replace(tried=entry.tried[:2])
    monkeypatch.setattr(classify, "METHODS", methods)
    return replace(classify.small(classify.Config(output=tmp_path)), batch=30, subset=60, refresh_every=3)


def without_seconds(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_nothing_is_done_twice(config, monkeypatch):
    whole, said = classify.load(config), []
    data = whole._replace(train=whole.train.first(90))
    monkeypatch.setattr(classify, "load", lambda config: data)
    found = classify.run(config, said.append)
    assert "Left: 4 trials" in said[0]
    assert [record["name"] for record in found.trials] == ["TENGraD", "TENGraD", "SGD-m", "SGD-m"]
    assert [row["epoch"] for rows in found.runs.values() for row in rows] == [0, 1, 0, 1]
    path = config.output / "classify.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # as if stopped before the last line
    longer = classify.run(replace(config, epochs=2), said.append)
    assert "Left: 0 trials" in said[1]
    assert longer.trials == found.trials
    for name, rows in longer.runs.items():
        assert rows[:2] == found.runs[name]
        assert len(rows) == 3
    assert len(path.read_text().splitlines()) == 2 * 3

    def work(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr(classify, "Runner", work)
    again = classify.run(replace(config, epochs=2))
    assert again == longer
    with pytest.raises(AssertionError, match="ran again"):
        classify.run(replace(config, seed=1))
    assert classify.tuning(again, config).row_count == 2
    assert classify.table(again, replace(config, epochs=2)).row_count == 2
    upper, *_ = classify.picture(again, config).axes
    assert len(upper.lines) == 4  # of two methods the batches and the epochs

    monkeypatch.undo()
    path.unlink()
    (config.output / "classify_states").rename(config.output / "elsewhere")
    runner = classify.Runner(classify.METHODS["TENGraD"], data, config)
    setting = classify.best("TENGraD", found.trials)
    straight = classify.train("TENGraD", setting, lambda name: runner, data, replace(config, epochs=2))
    assert without_seconds(straight) == without_seconds(longer.runs["TENGraD"])


@pytest.mark.parametrize("name", classify.METHODS)
def test_every_method_is_made_of_its_settings_and_those_of_all(name, config):
    model, x = classify.net(config), np.zeros((2, 28, 28, 1), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    layers = ng.linen.capture(model, classify.LIKELIHOOD).layers(variables, x)
    for kl_clip in (0.0, 0.01):
        entry = METHODS[name]
        tx = entry.make(entry.tried[0], layers, replace(config, kl_clip=kl_clip))
        state = jax.eval_shape(tx.init, variables["params"])
        assert bool(optax.tree.get_all_with_path(state, "clip_factor")) == (entry.natural and kl_clip > 0)


def test_all_methods_have_as_many_trials():
    assert {len(entry.tried) for entry in METHODS.values()} == {9}


def test_the_best_setting_is_of_a_trial_that_did_not_diverge():
    trials = [
        {"name": "Adam", "rate": rate, "damping": 0.0, "loss": loss}
        for rate, loss in ((1.0, None), (0.1, 0.5), (0.01, 0.4), (0.001, 0.6))
    ]
    assert classify.best("Adam", trials) == classify.Setting(0.01)
    with pytest.raises(ValueError, match="Every trial of Adam diverged"):
        classify.best("Adam", trials[:1])


def test_an_unknown_method_is_refused(config):
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'TENGraD'"):
        classify.run(replace(config, only=("KFAC",)))


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_fashion(folder, images):
    (folder / "fashion_mnist").mkdir(exist_ok=True)
    for part, count in images.items():
        pixels = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            (folder / "fashion_mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))


def test_the_published_files_are_read(config, tmp_path):
    write_fashion(tmp_path, {"train": 3, "t10k": 2})
    data = classify.load(replace(config, data=tmp_path))
    assert data.train.images.shape == (3, 28, 28, 1) and data.test.images.shape == (2, 28, 28, 1)
    assert data.train.images.dtype == np.float32 and data.train.images.max() == 1
    assert list(data.train.labels) == [0, 1, 2]


def test_a_missing_or_broken_file_is_named_with_what_to_do(config, tmp_path):
    config = replace(config, data=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is missing; NATGRAD_DATA"):
        classify.load(config)
    write_fashion(tmp_path, {"train": 3, "t10k": 2})
    path = tmp_path / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for broken in (
        whole[:-9],
        whole[:9],
        b"",
        b"<html>",
        gzip.compress(b""),
        gzip.compress(gzip.decompress(whole)[:-1]),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz .*; fetch it again: NATGRAD_DATA"):
            classify.load(config)
    write_fashion(tmp_path, {"t10k": 1})
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"has 1 images and 2 labels in its files t10k-\*"):
        classify.load(config)
