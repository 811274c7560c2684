"""Several processes: they train as one, end where one of them dies, and go on from the checkpoint exactly."""

import re

import pytest
from several_processes import Config, run, story, table, train

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_c13_two_processes_train_like_one(tmp_path):
    config = Config(steps=3, every=3, batch=40, hidden=0)
    alone = dict(train(config, tmp_path / "state.npz"))
    both = run(config, tmp_path / "both", 2)
    assert both.codes == [0, 0], both.said
    assert both.losses == pytest.approx(alone, rel=1e-5) and len(both.losses) == 3


@pytest.mark.full
def test_half_of_each_batch_trains_otherwise(tmp_path):  # the control
    whole, half = (dict(train(Config(steps=3, batch=size, units=8), tmp_path / str(size))) for size in (40, 20))
    assert whole != pytest.approx(half, rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_where_one_process_dies_the_others_end_and_a_restart_goes_on_exactly(processes, tmp_path):
    config = Config(processes, steps=16, every=5, killed=12, limit=560)
    runs = story(config, tmp_path)
    one, several, killed, again = runs.values()
    assert several.codes == again.codes == [0] * processes
    assert several.losses == pytest.approx(one.losses, rel=1e-4)
    assert killed.codes[-1] == -9 and all(killed.codes)  # the others end with an error of their own
    assert max(killed.losses) < 15  # and none was stopped: `run` raises if they wait for ever
    of_another = "another task died|Gloo|UNAVAILABLE|unhealthy|heartbeat"
    assert all(re.search(of_another, said) for said in killed.said[:-1]), killed.said
    assert again.losses == several.losses
    assert table(config, runs).row_count == 4


def test_a_process_that_does_not_end_in_time_is_stopped(tmp_path):
    with pytest.raises(TimeoutError, match="1 of 1 processes ran for 0 seconds"):
        run(Config(limit=0), tmp_path, 1)
