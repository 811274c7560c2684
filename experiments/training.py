"""A model and an optimizer that step together: compiled once, resumable, timed in turn with others.

What is common to the experiments that train by many methods. `Runner` compiles one method for all its settings;
`resumable` takes a run from where it stopped to where it should end, keeping every epoch; `timed` measures what a step
costs with all methods in turn in one process, so that a busy machine slows all alike.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track

import natgrad_jax as ng
from experiments.data import Part
from experiments.records import Records, State, finite, keep, kept, machine, save, saved, state_path


class Setting(NamedTuple):
    """What is tuned: the learning rate and, for a second-order method, the damping."""

    rate: Any
    damping: Any = 0.0

    def __str__(self) -> str:
        return f"{self.rate:g}" + (f", {self.damping:g}" if self.damping else "")


Make = Callable[[Setting, ng.Layers], optax.GradientTransformation]


class Task(NamedTuple):
    """What all methods of a comparison have in common.

    Attributes:
        model: its `__call__` takes inputs and, as keywords, `options`.
        likelihood: of its outputs.
        batch: for shapes, with as many examples as a step has; one of them draws the parameters.
        seed: of the initial parameters and of the labels drawn.
        options: of the model while it trains, such as `train`.
    """

    model: nn.Module
    likelihood: ng.losses.Likelihood
    batch: Part
    seed: int = 0
    options: Mapping[str, Any] = {}


class Seen(NamedTuple):
    """What a warm start reads of one batch."""

    grad: Any
    curvature: Any


class Runner:
    """One method on a task, compiled once for all settings.

    Attributes:
        carry: parameters, state of the optimizer, and the other collections of the model.
        steps: taken since the start.
    """

    def __init__(self, make: Make, setting: Setting, task: Task, labels: Literal["sampled", "true"] = "sampled"):
        """Compile, and stand at the start with a setting; `labels` are those of the curvature."""
        self._init = jax.jit(lambda key: task.model.init(key, task.batch.images[:1]))
        self._seed, variables = task.seed, jax.eval_shape(self._init, jax.random.key(task.seed))
        capture = ng.linen.capture(task.model, task.likelihood, labels=labels)
        layers = capture.layers(variables, task.batch.images, **task.options)

        def optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
            return optax.with_extra_args_support(make(setting, layers))

        def evaluate(params, others, x, y, key):
            return capture.value_and_grad({"params": params, **others}, x, y, key=key, **task.options)

        @partial(jax.jit, donate_argnums=0)
        def step(carry, x, y, key, setting):
            params, state, others = carry
            out = evaluate(params, others, x, y, key)
            updates, state = optimizer(setting).update(out.grad, state, params, curvature=out.curvature)
            return (optax.apply_updates(params, updates), state, out.updated), out.value

        self._optimizer, self._evaluate = optimizer, evaluate
        self.begin(setting)
        self._step = step.lower(self.carry, *task.batch, self._key, self._setting).compile()

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables where it stands."""
        return {"params": self.carry[0], **self.carry[2]}

    def begin(self, setting: Setting, seed: int | None = None) -> None:
        """Go back to the start, with a setting; of the parameters and labels of another seed, if it is given."""
        self._key = jax.random.key(self._seed if seed is None else seed)
        others = dict(self._init(self._key))
        params = others.pop("params")
        self.carry: tuple[Any, Any, Any] = params, self._optimizer(setting).init(params), others
        self.steps, self._setting = 0, Setting(*(jnp.float32(number) for number in setting))

    def warm(self, stream: Iterable[Part]) -> None:
        """Fill the statistics with the batches of a pass at the first parameters."""
        params, state, others = self.carry
        seen = jax.jit(lambda *given: Seen((out := self._evaluate(*given)).grad, out.curvature()))
        passed = (seen(params, others, x, y, self._draw(-1 - i)) for i, (x, y) in enumerate(stream))
        self.carry = params, ng.warm_start(self._optimizer(self._setting), state, passed, params), others

    def restore(self, leaves: list[np.ndarray], steps: int) -> bool:
        """Go on from what was saved of `carry`; false if that is of another shape."""
        own, structure = jax.tree.flatten(self.carry)
        if [(leaf.shape, leaf.dtype) for leaf in own] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
            return False
        self.carry, self.steps = jax.tree.unflatten(structure, map(jnp.array, leaves)), steps
        return True

    def run(self, stream: Iterable[Part]) -> tuple[np.ndarray, float]:
        """A step for every batch; the losses of the batches, and the seconds that the steps took together."""
        losses, before = [], time.perf_counter()
        for x, y in stream:
            self.carry, loss = self._step(self.carry, x, y, self._draw(self.steps), self._setting)
            losses.append(loss)
            self.steps += 1
        jax.block_until_ready(self.carry)
        return np.array(losses), time.perf_counter() - before

    def _draw(self, count: int) -> jax.Array:
        return jax.random.fold_in(self._key, count % 2**31)


Runners = Callable[[str], Runner]
"""The runner of a method by its name, made when it is first asked for."""


def batches(part: Any, size: int, seed: int, epoch: int) -> Iterator[Any]:
    """The batches of an epoch, in an order of its own.

    Args:
        part: arrays [N, ...]: images and labels, or images alone.
        size: of a batch; what is left over is dropped.
        seed: of the orders.
        epoch: from 0.

    Yields:
        A batch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(jax.tree.leaves(part)[0]))
    for first in range(0, len(order) - size + 1, size):
        chosen = order[first : first + size]
        yield jax.tree.map(lambda array, chosen=chosen: array[chosen], part)


def shifted_and_flipped(stream: Iterable[Part], seed: int, epoch: int, by: int = 4) -> Iterator[Part]:
    """Random crops of images with a black margin, of their own size, every other one mirrored.

    Args:
        stream: batches.
        seed: of the crops.
        epoch: from 0; each has its own.
        by: width of the margin.

    Yields:
        A batch.
    """
    rng = np.random.default_rng((seed, epoch, by))
    for images, labels in stream:
        count, height, width, _ = images.shape
        corners = rng.integers(0, 2 * by + 1, (count, 2, 1))
        rows, columns = corners[:, 0] + np.arange(height), corners[:, 1] + np.arange(width)
        columns = np.where(rng.random((count, 1)) < 0.5, columns[:, ::-1], columns)
        padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
        yield Part(padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]], labels)


def by_epoch(records: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The records of a run: {epoch: record}."""
    return {record["epoch"]: record for record in records}


def resumable(
    path: Path,
    key: Mapping[str, Any],
    start: Callable[[], Runner],
    epoch: Callable[[int], Iterable[Part]],
    measure: Callable[[Runner], Mapping[str, Any]],
    *,
    epochs: int,
    steps: int,
    prepare: Callable[[Runner], None] = lambda runner: None,
) -> Records:
    """One run, from where it stopped if it did.

    Args:
        path: of the records; the states are beside it.
        key: what tells the run from all others.
        start: the runner at the start, if there is anything to do.
        epoch: the batches of an epoch, counted from 0.
        measure: entries of a record, of where the runner stands.
        epochs: to be done in all.
        steps: of an epoch.
        prepare: what is to be done at the start alone, such as a warm start.

    Returns:
        A record for the start and for every epoch.
    """
    rows = by_epoch(kept(path, key))
    if len(rows) > epochs:
        return [rows[count] for count in range(epochs + 1)]
    runner, place = start(), state_path(path, key)
    state = saved(place)
    if state and runner.restore(state.leaves, state.rows[-1]["epoch"] * steps):
        done = state.rows
        keep(path, (row for row in done if row["epoch"] not in rows))
    else:
        prepare(runner)
        done: Records = [{**key, **machine(), "epoch": 0, "seconds": 0.0, "batch_losses": [], **measure(runner)}]
        keep(path, done)
    with shown(str(key["name"]), len(done) - 1, epochs) as say:
        for count in range(len(done), epochs + 1):
            losses, seconds = runner.run(epoch(count - 1))
            row = {
                "epoch": count,
                "seconds": round(done[-1]["seconds"] + seconds, 2),
                "batch_losses": [finite(stretch.mean(), 5) for stretch in np.array_split(losses, min(10, len(losses)))],
            }
            done.append({**key, **machine(), **row, **measure(runner)})
            save(place, State(jax.tree.leaves(runner.carry), done))
            keep(path, done[-1:])
            say(count, losses[-1], seconds / len(losses))
    return done[: epochs + 1]


@contextmanager
def shown(name: str, done: int, total: int, unit: str = "epoch") -> Iterator[Callable[[int, float, float], None]]:
    """A line about work while it goes on: epoch or trial, loss, seconds per step, time left.

    Args:
        name: of the method.
        done: epochs before.
        total: epochs in all.
        unit: what is counted, if not epochs.

    Yields:
        A function that is told how many are done, the loss and the seconds of a step.
    """
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        TextColumn(unit + " {task.completed} of {task.total}, {task.fields[told]}left:"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as progress:
        line = progress.add_task(name, total=total, completed=done, told="")

        def say(count: int, loss: float, step: float) -> None:
            progress.update(line, completed=count, told=f"loss {loss:.4g}, {step:.3f} s a step, ")

        yield say


class Pace(NamedTuple):
    """What a step costs, measured in turn.

    Attributes:
        idle: seconds a step of the baseline where it was least disturbed.
        first: {method: steps of the first refresh period, over those of the baseline}.
        later: {method: steps of later periods, over those of the baseline}.
    """

    idle: float
    first: Mapping[str, float]
    later: Mapping[str, float]

    def seconds(self, name: str, steps: float, period: int) -> float:
        """Of so many steps from the start, with refreshes in such periods."""
        early = min(steps, period)
        return self.idle * (early * self.first[name] + (steps - early) * self.later[name])


def timed(runners: Mapping[str, Runner], stream: list[Part], period: int, rounds: int, baseline: str) -> Pace:
    """The first refresh period, and so many later ones, of all methods in turn, a fifth of a period at a time.

    Args:
        runners: name -> runner at its start, the baseline among them.
        stream: some batches, taken again and again.
        period: steps from refresh to refresh.
        rounds: periods after the first.
        baseline: whose steps are the unit.

    Returns:
        The costs.
    """
    stretch = -(-period // 5)
    stream = (stream * (stretch // len(stream) + 1))[:stretch]
    found = in_turn({name: lambda run=runner.run: run(stream)[1] for name, runner in runners.items()}, 5 * (rounds + 1))
    periods = {name: seconds.reshape(-1, 5).sum(axis=1) for name, seconds in found.items()}
    ratios = {name: seconds / periods[baseline] for name, seconds in periods.items()}
    return Pace(
        round(float(found[baseline].min() / stretch), 6),
        {name: round(float(ratio[0]), 3) for name, ratio in ratios.items()},
        {name: round(float(np.median(ratio[1:])), 3) for name, ratio in ratios.items()},
    )


def paced(
    path: Path,
    key: Mapping[str, Any],
    runners: Callable[[], Mapping[str, Runner]],
    names: Iterable[str],
    stream: Callable[[], list[Part]],
    *,
    period: int,
    rounds: int,
    baseline: str,
) -> Pace:
    """The cost of steps, measured unless it is in the file.

    Args:
        path: of the records.
        key: what tells these costs from all others.
        runners: name -> runner at its start, the baseline among them.
        names: of the methods.
        stream: some batches.
        period: steps from refresh to refresh.
        rounds: periods after the first.
        baseline: whose steps are the unit.

    Returns:
        The costs.
    """
    if known := known_pace(path, key, {*names, baseline}):
        return known
    pace = timed(runners(), stream(), period, rounds, baseline)
    keep(path, [{**key, **machine(), **pace._asdict()}])
    return pace


def known_pace(path: Path, key: Mapping[str, Any], names: Iterable[str]) -> Pace | None:
    """The last cost of steps in a file that has all these methods, if any."""
    known = [record for record in kept(path, key) if set(names) <= set(record["first"])]
    return Pace(*(known[-1][entry] for entry in Pace._fields)) if known else None


def in_turn(stretches: Mapping[str, Callable[[], float]], turns: int) -> dict[str, np.ndarray]:
    """Seconds of every method in every turn [turns]; each in each turn does a stretch and says what it took."""
    found = {name: np.zeros(turns) for name in stretches}
    for turn in track(range(turns), description="timing"):
        for name, stretch in stretches.items():
            found[name][turn] = stretch()
    return found
