"""The long runs, in small: what is kept, what is not run twice, what goes on, the tables and the pictures."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import train
from experiments.data import Data, Part, digits
from experiments.methods import METHODS
from experiments.nets import Convnet, autoencoder
from experiments.problems import problem
from experiments.records import keep
from experiments.running import Pace, Setting

RESULTS = Path(train.__file__).parent / "results"
PACE = Pace(0.1, dict.fromkeys(METHODS, 1.0), dict.fromkeys(METHODS, 2.0))


def empty(name, images=0):
    """Data without pixels."""
    return Data(name, Part(np.empty((images, 0)), np.empty(images)), Part(np.empty((0, 0)), np.empty(0)))


TINY = {
    "mnist": problem("mnist")._replace(net=autoencoder((6, 3)), batch=500),
    "fashion": problem("fashion")._replace(net=Convnet((3,), (2,)), batch=300),
    "cifar10": problem("cifar10", 3)._replace(batch=300),
}


class Small(train.Config):
    """Tiny nets on the digits."""

    @property
    def what(self):
        shape = {"cifar10": (32, 3)}.get(self.problem, (8,))
        return TINY[self.problem]._replace(load=lambda given: digits(*shape))


def without_seconds(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


@pytest.mark.full
def test_runs_of_all_seeds_go_on_where_they_stopped_and_are_shown_beside_the_logs(tmp_path, monkeypatch):
    only, said = ("SGD-m", "Adam", "SGD-m (authors)"), []
    config = Small(output=tmp_path, only=only, epochs=2, seeds=(0, 1))
    found = train.run(replace(config, epochs=1), said.append)
    assert "Left: 4 epochs" in said[0]  # of two methods and two seeds; the usual SGD-m is the authors'
    assert [run.name for run in found.runs] == ["SGD-m (authors)", "SGD-m", "Adam"]
    assert found.records["SGD-m"] == found.records["SGD-m (authors)"]
    starts = {rows[0]["train_loss"] for seeds in found.records.values() for rows in seeds}
    assert len(starts) == 2  # one for each seed
    path = config.output / "autoencoder.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # as if stopped before the last line
    longer = train.run(config, said.append)
    assert "Left: 5 epochs" in said[1]
    for name, seeds in longer.records.items():
        assert [rows[:2] for rows in seeds] == found.records[name]
    assert len(path.read_text().splitlines()) == 2 * 2 * 3

    def work(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr(train, "Runner", work)
    assert train.run(config).records == longer.records
    assert train.run(replace(config, seeds=(3,), estimate=True), said.append).records == {}
    assert "Left: 4 epochs" in said[2]
    with pytest.raises(AssertionError, match="ran again"):
        train.run(replace(config, seeds=(3,)))

    shown = train.table(longer, config)
    assert shown.row_count == 3
    first = list(shown.columns[3].cells)
    assert first[0].endswith("(197.6)") and "[" in first[0]  # logged after an epoch, and the range of the seeds
    axes = train.picture(longer, config).axes
    assert [len(axis.lines) for axis in axes] == [2, 3, 4, 4]  # a line for each seed, and a row of dots

    monkeypatch.undo()
    path.unlink()
    (config.output / "autoencoder_states").rename(config.output / "elsewhere")
    straight = train.run(replace(config, only=("Adam",), seeds=(1,)))
    assert without_seconds(straight.records["Adam"][0]) == without_seconds(longer.records["Adam"][1])


@pytest.mark.slow
@pytest.mark.full  # the engine is that of the autoencoder
@pytest.mark.parametrize("name", ["fashion", "cifar10"])
def test_a_classifier_runs(name, tmp_path):
    config = Small(tmp_path, ("SGD-m", "TENGraD"), name, epochs=1, seeds=(0, 1), refresh_every=5)
    found = train.run(config)
    rows = found.records["TENGraD"][1]
    assert [row["epoch"] for row in rows] == [0, 1] and rows[1]["train_loss"] != rows[0]["train_loss"]
    assert train.found_in(config).records == found.records


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_with_the_clip_and_the_labels_of_its_own(name, tmp_path, monkeypatch):
    config, made = Small(output=tmp_path, problem="fashion"), []
    data = Data("digits", Part(np.zeros((30, 8, 8, 1), np.float32), np.zeros(30, int)), Part([], []))
    monkeypatch.setattr(train, "Runner", lambda *given: made.append(given))
    train.compiled(name, data, config)
    make, setting, task, labels = made.pop()
    variables = jax.eval_shape(task.model.init, jax.random.key(0), task.batch.images)
    layers = ng.linen.capture(task.model, task.likelihood, labels=labels).layers(variables, task.batch.images)
    state = jax.eval_shape(make(setting, layers).init, variables["params"])
    assert bool(optax.tree.get_all_with_path(state, "clip_factor")) == METHODS[name].clips
    assert labels == ("true" if METHODS[name].of == "kbfgs" else "sampled")


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_a_tuned_run_has_the_best_setting_of_the_trials_of_its_net_or_the_usual_one(name, tmp_path):
    config = train.Config(output=tmp_path, problem=name)
    kind, data = config.what.kind, empty(name)
    trial = {"name": "Adam", "damping": 0.0, **config.what.key(data), "epochs": 2}
    keep(tmp_path / "tune.jsonl", [trial | {"rate": 0.002, "loss": 0.4}, trial | {"rate": 0.003, "loss": 0.5}])
    found = {run.name: run.setting for run in train.wanted(data, config) if not run.logged}
    assert list(found) == list(METHODS)
    assert found["Adam"] == Setting(0.002) and found["SOAP"] == METHODS["SOAP"].ranges[kind].usual
    other = {"channels": 32} if name == "fashion" else {"problem": "curves"}
    runs = {run.name: run.setting for run in train.wanted(data, replace(config, **other))}
    assert runs["Adam"] == METHODS["Adam"].ranges[kind].usual


def test_an_unknown_run_and_no_epochs_are_refused(tmp_path):
    config = train.Config(output=tmp_path)
    with pytest.raises(ValueError, match=r"no \['KFAC'\]; there are .*'Adam'"):
        train.wanted(empty("mnist"), replace(config, only=("KFAC",)))
    with pytest.raises(ValueError, match="`epochs` is 0, expected 1 or more"):
        train.wanted(empty("fashion"), replace(config, problem="fashion", epochs=0))


def test_records_are_as_they_were_and_no_other_problem_finds_them(tmp_path):
    found = {}
    for name in ("fashion", "cifar10", "mnist", "curves"):
        config = train.Config(output=tmp_path, problem=name, channels=3)
        found[name] = train.identity(train.Run("SGD-m", "SGD-m", Setting(0.1)), 0, empty("digits", 60), config)
    common = {"name": "SGD-m", "rate": 0.1, "damping": 0.0, "data": "digits", "images": 60, "seed": 0}
    on_classifier = {"periods": [100, 20], "weight_decay": 0.001, "kl_clip": 0.0, "batch": 128}
    assert found["fashion"] == common | {"channels": 3, "units": 128} | on_classifier
    assert found["mnist"] == common | {"problem": "mnist", "widths": [1000, 500, 250, 30], "batch": 1000}
    for one in found:
        assert [other for other in found if found[one].items() <= found[other].items()] == [one]


def test_the_committed_runs_are_found_and_shown():
    config = train.Config(output=RESULTS)
    found = train.found_in(config)
    assert {run.name for run in found.runs} >= {*train.AUTHORS, "Adam", "K-FAC, adaptive"}
    assert any(cell.endswith("(61.6)") for cell in train.table(found, config).columns[6].cells)
    config = replace(config, problem="fashion")
    found = train.found_in(config)
    assert {"SGD-m", "K-FAC", "TENGraD"} <= {run.name for run in found.runs}
    assert train.table(found, config).row_count == len(found.runs)
    assert train.found_in(replace(config, channels=5)) is None


def test_a_folder_has_of_a_method_the_setting_of_the_trials_else_the_last_that_came_to_its_end(tmp_path):
    config, data = train.Config(output=tmp_path, problem="fashion", epochs=1), empty("fashion", 256)
    for name, rates in {"Adam": (0.002, 0.004, 0.001), "SOAP": (0.1, 0.2, 0.3)}.items():
        for rate in rates:
            own = train.identity(train.Run(name, name, Setting(rate)), 0, data, config)
            own |= {"test_accuracy": 0.5, "train_loss": rate}
            keep(config.path(), (own | {"epoch": epoch} for epoch in range(1 + (rate < 0.3))))
    trial = {"name": "Adam", "damping": 0.0, **config.what.key(data), "epochs": 1}
    keep(tmp_path / "tune.jsonl", [trial | {"rate": 0.004, "loss": 0.4}])
    with pytest.raises(ValueError, match="not what their steps cost"):
        train.found_in(config)
    key = config.cost_key(data)
    keep(config.path("_paces"), [{**key, "rounds": 1, **PACE._asdict()}])
    found = train.found_in(config)
    assert {run.name: run.setting for run in found.runs} == {"Adam": Setting(0.004), "SOAP": Setting(0.2)}
    assert found.numbers(found.runs[1], "train_loss", 1).tolist() == [[0.2, 0.2]]


def shown_of(count):
    """What would be found of so many methods on a classifier, two seeds and two epochs; the first diverged."""

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
    runs = [train.Run(name, name, METHODS[name].ranges["classifier"].usual) for name in names]
    return train.Found(runs, records, PACE)


CLASSIFIER = train.Config(problem="fashion", seeds=(0, 1), epochs=2)


def test_the_table_has_a_row_for_every_method_with_ranges_over_seeds():
    shown = train.table(shown_of(16), CLASSIFIER)
    cells = [list(column.cells) for column in shown.columns]
    assert shown.row_count == 16 and cells[0] == list(METHODS)
    assert cells[3][0] == "-\n10.00 [10.00, 10.00]"
    assert cells[3][1] == "1.2667 [0.7667, 1.7667]\n81.05 [81.00, 81.10]"
    assert cells[1][-1] == "its own" != cells[1][1]


def test_the_picture_of_a_classifier_has_losses_and_errors_of_every_seed():
    figure = train.picture(shown_of(4), CLASSIFIER)
    assert [len(axis.lines) for axis in figure.axes] == 4 * [2 * 4]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == list(METHODS)[:4]
    assert figure.axes[2].get_title(loc="left") == "test error, %"


@pytest.fixture
def two(tmp_path):
    """Adam and K-FAC in a folder, two epochs of four steps, with what a step costs: K-FAC is dearer and sooner down."""
    config, entries = train.Config(output=tmp_path, problem="curves", epochs=2), []
    key = config.what.key(empty("curves-like"))
    ends = {"Adam": [(140, 139, 135, 131), (130, 129, 125, 120)], "K-FAC": [(135, 129, 120, 118), (110, 105, 101, 99)]}
    for name, epochs in ends.items():
        setting = METHODS[name].ranges["autoencoder"].usual
        own = {"name": name, **setting._asdict(), **key, "images": 4000, "seed": 0, "seconds": 1.0, "test_loss": 1.0}
        entries.append(own | {"epoch": 0, "batch_losses": [], "train_loss": 500.0})
        for epoch, losses in enumerate(epochs, 1):
            entries.append(own | {"epoch": epoch, "batch_losses": losses, "train_loss": float(losses[-1])})
    keep(config.path(), entries)
    costs = {"SGD-m": 1.0, "Adam": 1.0, "K-FAC": 1.5}
    keep(config.path("_paces"), [{**key, "rounds": 1, "idle": 0.5, "first": costs, "later": costs}])
    return config


def test_how_soon_a_run_is_as_low_as_adam_at_its_end_and_off_the_plateau(two):
    found = train.found_in(two)
    assert [run.name for run in found.runs] == ["Adam", "K-FAC"]
    columns = [list(column.cells) for column in train.table(found, two).columns]
    assert columns[-2:] == [["2 (1.00)", "1 (0.75)"], ["6 (1.00)", "2 (0.33)"]]
    adam, kfac = found.runs
    alone = found._replace(runs=[kfac])
    assert train.overtaken(alone, kfac, 2) == (np.inf, np.inf) and train.left(found, kfac, 50.0) == "-"
    assert train.overtaken(found, adam, 1) == (1, 1)


def test_a_folder_without_runs_has_nothing_and_one_without_costs_says_what_to_do(two):
    assert train.found_in(replace(two, epochs=3)) is None  # none is at its last epoch
    assert train.found_in(replace(two, problem="mnist")) is None
    two.path("_paces").unlink()
    with pytest.raises(ValueError, match=r"what their steps cost; run the same with `--estimate`"):
        train.found_in(two)
