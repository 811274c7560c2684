"""The long runs: autoencoders, convnets and their trials. What is tried, what is kept, tables and pictures."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments import autoencoder, classify, figures, problems, race, study, tune
from experiments.data import digits
from experiments.methods import METHODS
from experiments.nets import Convnet
from experiments.nets import autoencoder as mirrored
from experiments.records import grouped, kept
from experiments.study import Limits

RESULTS = Path(study.__file__).parent / "results"
TINY = {
    "autoencoder_mnist": problems.MNIST._replace(net=mirrored((6, 3)), batch=500, epoch=3, load=lambda given: digits()),
    "classify_16": problems.convnet(16)._replace(net=Convnet((3,), (2,)), epoch=4, load=lambda given: digits()),
    "classify_resnet20_16": problems.CIFAR10._replace(
        net=problems.ResNet(8, 2), epoch=4, load=lambda given: digits(32, 3)
    ),
}


def small(whole, names):
    """Two short epochs of some methods of a study."""
    problem = TINY[whole.name]
    entries = {name: whole.entries[name] for name in names}
    entries = {name: entry._replace(warm=entry.warm and 1) for name, entry in entries.items()}
    shown = {key: partial(getattr(whole, key).func, problem=problem) for key in ("table", "picture")}
    limits = Limits(2 * problem.epoch, problem.epoch, parts=10)
    cases = {name: problem.case for name in whole.cases}
    return whole._replace(cases=cases, entries=entries, limits=limits, trial=limits, **shown)


@pytest.mark.full
def test_an_autoencoder_is_trained_with_all_that_is_measured_at_the_best_of_its_trials(tmp_path):
    whole = small(autoencoder.MNIST, ("SGD-m (authors)", "SGD-m", "Adam"))
    adam = whole.entries["Adam"]._replace(tried=({"rate": 0.01, "damping": 0.0},))
    whole = whole._replace(entries=whole.entries | {"Adam": adam})
    trials = study.run(tune.of(whole), tmp_path)
    assert [row["name"] for row in trials] == ["SGD-m"] * 7 + ["Adam"]
    rows = study.run(whole, tmp_path)
    assert [row["name"] for row in rows] == ["SGD-m (authors)", "SGD-m", "Adam"]
    assert rows[1]["numbers"] == min(trials[:7], key=lambda row: row["losses"][-1] or np.inf)["numbers"]
    assert len(kept(tmp_path / "autoencoder_mnist.jsonl", {"trial": True})) == 8  # none was repeated
    assert all(row["steps"] == [0, 3, 6] and row["data"] == "digits" for row in rows)
    assert [len(parts) for parts in rows[-1]["batch_losses"]] == [0, 3, 3] and len(rows[-1]["test_loss"]) == 3
    assert rows[0]["losses"][0] == rows[-1]["losses"][0] > rows[-1]["losses"][-1]
    assert tune.of(whole).known(tmp_path) == trials and whole.known(tmp_path) == rows
    assert whole.table(rows).row_count == 3 and len(whole.picture(rows).axes) == 4


@pytest.mark.slow
@pytest.mark.full  # the engine is that of the autoencoder
@pytest.mark.parametrize("index", [0, -1])
def test_a_classifier_is_trained(index, tmp_path):
    whole = small(classify.STUDIES[index], ("SGD-m", "TENGraD"))._replace(trial=None)
    usual = {name: entry._replace(tried=entry.tried[:1]) for name, entry in whole.entries.items()}
    rows = study.run(whole._replace(entries=usual, seeds=(0, 1)), tmp_path)
    assert len(rows) == 4 and all(0 <= row["test_accuracy"][-1] <= 1 for row in rows)
    assert rows[0]["losses"][0] != rows[0]["losses"][1] and whole.table(rows).row_count == 2


@pytest.mark.full
def test_the_race_of_a_classifier_ends_at_its_test_error(tmp_path):
    problem = TINY["classify_16"]
    adam = race.FASHION.entries["Adam"]._replace(tried=({"rate": 1e-2, "falls": 1},))
    whole = race.classifying(problem, 50.0, 3, entries=race.FASHION.entries | {"Adam": adam})
    assert [*whole.entries] == ["Adam", "K-FAC, nothing said, averaged", "SOAP as published, averaged"]
    rows = study.run(whole, tmp_path)
    assert all(row["losses"][-1] <= 50 or row["steps"][-1] == 12 for row in rows)
    case = problem.case_of_errors()
    variables = case.task.init(jax.random.key(0))
    right = problem.measured(variables, digits())["test_accuracy"]
    assert case.loss(variables) == pytest.approx(100 * (1 - right)) == pytest.approx(rows[0]["losses"][0], rel=1e-5)
    assert whole.table(rows).row_count == 3 and whole.command == 'make race ARGS="--problems fashion"'


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_with_the_clip_and_the_labels_of_its_own(name):
    entry, task = classify.STUDIES[0].entries[name], TINY["classify_16"].case().task
    variables = jax.eval_shape(task.init, jax.random.key(0))
    layers = ng.linen.capture(task.model, task.likelihood, labels=entry.labels).layers(variables, task.batch.images)
    state = jax.eval_shape(entry.make(entry.tried[0], layers).init, variables["params"])
    assert bool(optax.tree.get_all_with_path(state, "clip_factor")) == METHODS[name].clips
    assert entry.labels == ("true" if METHODS[name].of == "kbfgs" else "sampled")


def test_the_runs_of_the_authors_are_on_mnist_alone_at_their_numbers_and_are_not_tuned():
    for whole in (*autoencoder.STUDIES, *classify.STUDIES):
        assert ({*autoencoder.AUTHORS} <= {*whole.entries}) == (whole is autoencoder.MNIST)
        assert {*METHODS} <= {*tune.of(whole).entries} and not {*autoencoder.AUTHORS} & {*tune.of(whole).entries}
    entry = autoencoder.MNIST.entries["K-FAC (K-BFGS authors)"]
    assert entry.tried == ({"rate": 0.1, "damping": 3.0},) and entry.warm == 60
    names = [each.name for each in (*autoencoder.STUDIES, *classify.STUDIES)]
    assert len(set(names)) == len(names) == 7


@pytest.mark.parametrize("index", range(4))
def test_the_committed_runs_are_those_of_a_study_and_shown(index):
    whole = (*autoencoder.STUDIES[:2], *classify.STUDIES[:2])[index]
    rows, trials = whole.known(RESULTS), tune.of(whole).known(RESULTS)
    assert {row["name"] for row in rows} <= {*whole.entries} and {*rows[0]["config"]} == {*whole.key}
    assert whole.table(rows).row_count == len(grouped(rows)) and tune.of(whole).table(trials).row_count >= 5
    path = RESULTS / f"{whole.name}.jsonl"
    for name in ("Adam", "K-FAC"):  # a run finds its trials again, in as many steps as these had
        key = {**{entry: rows[0][entry] for entry in ("problem", "data")}, "name": name}
        own = whole._replace(trial=whole.trial._replace(steps=trials[0]["steps"][-1])).tried(path, key)
        (best,) = (row["numbers"] for row in own if row["best"])
        assert len(own) >= 7 and best in [row["numbers"] for row in rows if row["name"] == name]
    if whole is autoencoder.MNIST:
        assert any(cell.endswith("(61.6)") for cell in whole.table(rows).columns[6].cells)


def test_the_draws_are_those_of_the_committed_trials():
    drawn = METHODS["SGD-m"].ranges["autoencoder"].tried("SGD-m", 6)
    trials = kept(RESULTS / "autoencoder_mnist.jsonl", {"trial": True, "name": "SGD-m"})
    assert {numbers["rate"] for numbers in drawn} <= {trial["numbers"]["rate"] for trial in trials}


def rows_of(count):
    """What would be found of so many methods on a classifier, two seeds and two epochs; the first diverged."""
    found = []
    for place, name in enumerate(list(METHODS)[:count]):
        for seed in (0, 1):
            losses = [None if place == 0 and epoch else 2.0 / (1 + epoch) + 0.1 * place + seed for epoch in range(3)]
            accuracies = [0.1 if place == 0 else 0.8 + 0.01 * place + 0.001 * seed] * 3
            numbers = METHODS[name].ranges["classifier"].tried(name, 1)[0]
            found.append(
                {"name": name, "seed": seed, "numbers": numbers, "steps": [0, 2, 4], "seconds": [0.0, 1.0, 2.0 + place]}
                | {"losses": losses, "test_accuracy": accuracies}
            )
    return found


def test_the_table_of_a_classifier_has_a_row_for_every_method_with_ranges_over_seeds():
    shown = classify.STUDIES[0].table(rows_of(len(METHODS)))
    cells = [list(column.cells) for column in shown.columns]
    assert shown.row_count == len(METHODS) and cells[0] == list(METHODS)
    assert cells[3][0] == "-\n10.00 [10.00, 10.00]"
    assert cells[3][1] == "1.2667 [0.7667, 1.7667]\n81.05 [81.00, 81.10]"
    assert cells[1][-1] == "its own" != cells[1][1]
    assert cells[-2][:3] == ["1.00", "2.00", "3.00"]


def test_the_picture_of_a_classifier_has_losses_and_errors_of_every_seed():
    figure = classify.STUDIES[0].picture(rows_of(4))
    assert [len(axis.lines) for axis in figure.axes] == 4 * [2 * 4]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == list(METHODS)[:4]
    assert figure.axes[2].get_title(loc="left") == "test error, %"


def test_how_soon_a_run_is_as_low_as_adam_at_its_end_and_off_the_plateau():
    ends = {"Adam": [(140, 139, 135, 131), (130, 129, 125, 120)], "K-FAC": [(135, 129, 120, 118), (110, 105, 101, 99)]}
    rows = [
        {"name": name, "seed": 0, "numbers": {"rate": 0.1, "damping": 0.0}, "steps": [0, 4, 8]}
        | {"seconds": [0.0, cost, 2 * cost], "batch_losses": [[], *epochs], "test_loss": [1.0] * 3}
        | {"losses": [500.0, *(float(epoch[-1]) for epoch in epochs)]}
        for cost, (name, epochs) in zip((2.0, 3.0), ends.items(), strict=True)
    ]
    columns = [list(column.cells) for column in autoencoder.CURVES.table(rows).columns]
    assert columns[-2:] == [["2 (1.00)", "1 (0.75)"], ["6 (1.00)", "2 (0.33)"]]
    runs = grouped(rows)
    assert autoencoder.overtaken({"K-FAC": rows[1:]}, "K-FAC") == (np.inf, np.inf)
    assert autoencoder.overtaken(runs, "K-FAC") == (1, 0.75)
    assert autoencoder.steps_below(runs["K-FAC"], 50.0) == np.inf


def test_a_run_that_ended_early_is_infinite_where_others_went_on():
    rows = [
        {"steps": [0, 1, 2], "losses": [3.0, 2.0, 1.0], "seconds": [0.0, 3.0, 7.0]},
        {"steps": [0, 1], "losses": [3.0, None], "seconds": [0.0, 4.0]},
    ]
    np.testing.assert_array_equal(figures.series(rows), [[3.0, 2.0, 1.0], [3.0, np.inf, np.inf]])
    np.testing.assert_array_equal(figures.seconds(rows), [0.0, 3.5, 7.0])
    assert figures.costs({"a": rows[:1], "b": rows[1:], "c": rows}, "a") == {"a": "1.00", "b": "1.00", "c": "1.00"}
    assert figures.costs({"b": rows}, "a") == {"b": "-"}


def trials_of(losses):
    """Trials of methods, with rates that double and dampings that grow."""
    return [
        {"name": name, "numbers": {"rate": 0.1 * 2**place, "damping": 1.0 + place}, "steps": [9], "losses": [loss]}
        for name, own in losses.items()
        for place, loss in enumerate(own)
    ]


def test_a_number_at_an_edge_of_what_was_tried_has_a_star_but_not_the_only_one():
    three = [{"numbers": {"rate": rate, "damping": 1e-8}} for rate in (0.1, 0.2, 0.3)]
    assert [tune.starred(index, three) for index in range(3)] == ["0.1, 1e-08*", "0.2, 1e-08", "0.3, 1e-08*"]
    four = [*three, {"numbers": {"rate": 0.2, "damping": 3.0}}]
    assert tune.starred(3, four) == "0.2, 3*"


def test_the_picture_of_trials_has_a_panel_for_every_tuned_method_with_dots_a_ring_and_crosses():
    trials = trials_of({"SGD-m": (3.0, 2.0, None), "K-FAC": (None, None, None)})
    adaptive = {"name": "K-FAC, adaptive", "numbers": {}, "steps": [9], "losses": [1.0]}
    figure = tune.picture([*trials, adaptive], "a net")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["SGD-m", "K-FAC"]
    points = [[len(drawn.get_offsets()) for drawn in axis.collections] for axis in figure.axes]
    assert points == [[2, 1], [0, 3]]  # dots, crosses
    (ring,) = figure.axes[0].lines
    assert ring.get_data()[0] == [0.2] and not figure.axes[1].lines


def test_the_table_of_trials_has_dashes_where_every_trial_or_half_of_them_diverged():
    trials = trials_of({"TNT": (None, None), "Adam": (None, 2.0, None)})
    rows = list(zip(*(column.cells for column in tune.table(trials, "a net").columns), strict=True))
    assert rows == [("TNT", "-", "-", "-", "2", "2"), ("Adam", "0.2, 2", "2", "-", "2", "3")]
