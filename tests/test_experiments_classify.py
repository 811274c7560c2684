"""The convnet of the TENGraD paper, in small: what is kept, what is not run twice, what goes on, and what is shown."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import classify
from experiments.report import runs_picture, runs_table, trials_table

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
    assert trials_table(classify.comparable(again.trials, config)).row_count == 2
    assert runs_table(again.runs, again.pace, "a net").row_count == 2
    upper, *_ = runs_picture(again.runs, again.pace, "a net", list(classify.METHODS)).axes
    assert len(upper.lines) == 4  # of two methods the batches and the epochs

    monkeypatch.undo()
    path.unlink()
    (config.output / "classify_states").rename(config.output / "elsewhere")
    runner = classify.compiled("TENGraD", data, config)
    setting = classify.best("TENGraD", found.trials)
    straight = classify.train("TENGraD", setting, lambda name: runner, data, replace(config, epochs=2))
    assert without_seconds(straight) == without_seconds(longer.runs["TENGraD"])


@pytest.mark.parametrize("name", classify.METHODS)
def test_every_method_is_made_of_its_settings_and_those_of_all(name, config):
    model, x = classify.chosen(config).net, np.zeros((2, 28, 28, 1), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    layers = ng.linen.capture(model, classify.chosen(config).likelihood).layers(variables, x)
    for kl_clip in (0.0, 0.01):
        entry = METHODS[name]
        tx = entry.make(replace(config, kl_clip=kl_clip))(entry.tried[0], layers)
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


def test_records_of_fashion_mnist_are_as_they_were_and_no_other_problem_finds_them(config):
    setting, found = classify.Setting(0.1), {}
    for problem in ("fashion", "cifar10", "digits"):
        chosen = replace(config, problem=problem)
        found[problem] = classify.identity("SGD-m", setting, 60, classify.Data("digits", None, None), chosen)
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
