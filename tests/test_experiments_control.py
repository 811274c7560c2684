"""The experiment on ways of choosing the step, from its configuration to its table and picture."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from experiments import control


@pytest.fixture
def config():
    """As small as it can be."""
    return control.Config(
        steps=4,
        measurements=2,
        batches=(8,),
        seeds=(1, 2),
        autoencoder_widths=(),
        classifier_widths=(),
        controls=("learning rate", "learning rate, KL clip"),
    )


@pytest.mark.slow
def test_a_run_gives_a_record_for_every_cell_of_the_table_and_every_line_of_the_picture(config, monkeypatch):
    few = control.CONTROLS["learning rate, KL clip"]._replace(tried={"rate": (0.1,), "damping": (1.0,), "bound": (0,)})
    monkeypatch.setitem(control.CONTROLS, "learning rate, KL clip", few)
    done = []
    records = control.run(config, done.append)
    expected = [
        (problem, name, batch)
        for problem in ("autoencoder", "classifier")
        for name in config.controls
        for batch in config.batches
    ]
    assert [(record.problem, record.control, record.batch) for record in records] == expected
    assert len(done) == len(expected)
    for record in records:
        assert record.losses.shape == (2, 3)
        held = record.control == "learning rate, KL clip"  # a bound of zero holds every step
        assert held == record.diverged
        assert held == np.all(record.losses == record.losses[:, :1])
    console = Console(width=200)
    with console.capture() as captured:
        console.print(control.table(records))
    assert captured.get().count("diverged") == 2
    plt.switch_backend("agg")
    assert len(control.picture(records).axes) == 4


def test_every_epoch_of_the_orders_shows_every_image_at_most_once(config):
    problem = control.problems(config)[0]
    size = len(problem.inputs)
    config = control.Config(steps=2 * (size // 500), measurements=2)
    first, second = control.orders(problem, 500, 0, config).reshape(2, -1)
    assert len(set(first)) == len(first)
    assert set(first) != set(second)
    np.testing.assert_array_equal(first, control.orders(problem, 500, 0, config).reshape(2, -1)[0])
