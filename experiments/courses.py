"""Runs from the same start, one for each method: what they train on, when they end, where they go on.

An `Entry` is a method with the numbers that are tried, a `Case` what it is trained on. A `Course` is one run, and has a
look at its loss every few steps.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice, product, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Part
from experiments.records import Records, save, saved, significant
from experiments.running import Labels, Numbers, Peer, Runner

SAVE_EVERY = 60.0
"""Seconds after which it is written down where the runs stand."""


class Case(NamedTuple):
    """What is trained on what.

    Attributes:
        fields: of its rows, that tell it from other cases; "problem" among them.
        stream: seed -> batches for ever.
        loss: variables -> what is measured at every look: the loss, or several numbers, of which "losses" is it.
    """

    fields: Mapping[str, Any]
    task: Any
    stream: Callable[[int], Iterator[Part]]
    loss: Callable[[Any], float | Mapping[str, float]]


def staying(make: Callable[[], Case]) -> Case:
    """A case that stays on the first batch of its stream."""
    case = make()
    return case._replace(stream=lambda seed: repeat(next(case.stream(seed))))


class Entry(NamedTuple):
    """A method of a study, with the numbers of which the best are tried.

    Attributes:
        make: numbers, layers -> optimizer; the numbers have "horizon", the steps of the run, beside those tried.
        labels: of the curvature; None for plain gradients, without any capture.
        steps: most of them, if others than those of the study.
        look: steps between two looks at the loss, if others than those of the study, or of a program.
        stretch: steps that are compiled into one program; they divide those of a look.
        product_stride: of the capture.
        is_static: whether each of the numbers is compiled by itself.
        peer: task -> what runs instead of a `Runner`.
        stays: whether it stays on the first batch of the stream.
        warm: how many batches fill its statistics before the first step.
    """

    make: Callable[[Numbers, Any], Any] | None
    tried: tuple[Numbers, ...] = ({},)
    labels: Labels | None = "sampled"
    steps: int | None = None
    look: int | None = None
    stretch: int = 1
    product_stride: int = 1
    is_static: bool = False
    peer: Callable[[Any], Peer] | None = None
    stays: bool = False
    warm: int = 0


class Limits(NamedTuple):
    """When a run ends: after so many steps, or seconds of a clock, or where its loss is no more than `level`.

    It has a look at its loss every `look` steps, and keeps the mean losses of the batches of so many `parts` of these.
    """

    steps: int
    look: int
    seconds: float = np.inf
    level: float = -np.inf
    clock: Callable[[], float] = time.perf_counter
    parts: int = 0

    def of(self, entry: Entry) -> "Limits":
        """Those of an entry."""
        return self._replace(steps=entry.steps or self.steps, look=entry.look or max(self.look, entry.stretch))

    def shorter(self, steps: float | None, seconds: float | None) -> "Limits":
        """Others, where they are given."""
        return self._replace(steps=int(steps or self.steps), seconds=seconds or self.seconds)


def grid(**tried: Iterable[float]) -> tuple[Numbers, ...]:
    """Every number with every other, by their names."""
    return tuple(dict(zip(tried, numbers, strict=True)) for numbers in product(*tried.values()))


def cosine(rate: Any, horizon: Any, warmup: float = 0.0) -> optax.Schedule:
    """A rate that rises within a share of the steps, and falls to zero like a cosine; numbers may be traced."""

    def schedule(count):
        rise = jnp.floor(warmup * horizon + 0.5)
        fall = jnp.clip((count - rise) / (horizon - rise), 0, 1)
        return rate * jnp.where(count < rise, count / jnp.maximum(rise, 1), 0.5 * (1 + jnp.cos(jnp.pi * fall)))

    return schedule


def natural(
    method: Callable[..., Any],
    tried: tuple[Numbers, ...] = ({},),
    labels: Labels | None = "sampled",
    stretch: int = 1,
    product_stride: int = 1,
    **options: Any,
) -> Entry:
    """A method of the package with options; of what is tried "rate" falls like a cosine, the rest are keywords."""

    def make(numbers: Numbers, layers: Any) -> Any:
        given = {name: number for name, number in numbers.items() if name not in ("rate", "horizon")}
        if "rate" in numbers:
            given["learning_rate"] = cosine(numbers["rate"], numbers["horizon"])
        return method(layers=layers, **given, **options)

    return Entry(make, tried, labels, stretch=stretch, product_stride=product_stride)


def adam(tried: tuple[Numbers, ...], stretch: int = 1) -> Entry:
    """Adam at the best of some rates, each falling like a cosine."""
    return natural(lambda layers, learning_rate, damping=0.0: optax.adam(learning_rate), tried, None, stretch)


class Course:
    """A run from one start, with looks at its loss: steps, seconds, losses and what else is measured."""

    def __init__(self, runner: Any, case: Case, numbers: Numbers, seed: int, limits: Limits, warm: int = 0):
        """Go to the start, with statistics of so many batches."""
        self._runner, self._case, self._limits = runner, case, limits
        self._stream = case.stream(seed)
        self.looks: Records = []
        runner.begin(numbers, seed)
        if warm:
            runner.warm(islice(case.stream(seed), warm))
        self._look(0, 0.0)

    def _look(self, steps: int, seconds: float, losses: Any = ()) -> None:
        found = self._case.loss(self._runner.variables)
        found = found if isinstance(found, Mapping) else {"losses": found}
        look: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 4)}
        look |= {name: significant(number) for name, number in found.items()}
        if most := self._limits.parts:
            parts = np.array_split(losses, min(most, len(losses))) if len(losses) else []
            look["batch_losses"] = [significant(part.mean()) for part in parts]
        self.looks.append(look)

    @property
    def is_over(self) -> bool:
        """Whether a limit is reached, or the loss is lost."""
        limits, now = self._limits, self.looks[-1]
        spent = now["steps"] >= limits.steps or now["seconds"] >= limits.seconds
        return spent or now["losses"] is None or now["losses"] <= limits.level

    def advance(self) -> None:
        """Some steps, and a look at the loss; that and the making of the batches are outside the clock."""
        now = self.looks[-1]
        count = min(self._limits.look, self._limits.steps - now["steps"])
        losses, seconds = self._runner.run(list(islice(self._stream, count)))
        self._look(now["steps"] + count, now["seconds"] + seconds, losses)

    def save(self, path: Path) -> None:
        """Write down where it stands, unless it ends by its seconds: then its numbers are of its pace today."""
        if isinstance(self._runner, Runner) and np.isinf(self._limits.seconds):
            save(path, jax.tree.leaves(self._runner.carry), self.looks)

    def go_on(self, path: Path) -> None:
        """Go to where it stood, if that was written down and is of the same shape."""
        leaves, looks = saved(path)
        if looks and self._runner.restore(leaves, steps := looks[-1]["steps"]):
            self.looks, self._stream = looks, islice(self._stream, steps, None)

    def row(self) -> dict[str, Any]:
        """For a record; of more than 120 looks those at equal ratios."""
        looks = self.looks
        if len(looks) > 120:
            looks = [looks[index] for index in np.unique(np.geomspace(1, len(looks), 120).astype(int)) - 1]
        row = {name: [look[name] for look in looks] for name in looks[0]}
        return row | {"compile_seconds": self._runner.compile_seconds}

    @property
    def merit(self) -> tuple[float, float]:
        """The less the better: steps until the level, then the last loss."""
        steps, loss = self.looks[-1]["steps"], self.looks[-1]["losses"]
        loss = np.inf if loss is None else loss
        return (steps if loss <= self._limits.level else np.inf), loss


class Compiled:
    """An entry on a case: its runners, and the numbers that are the best."""

    def __init__(self, entry: Entry, case: Case, limits: Limits, compiler: Mapping[str, Any]):
        """Compile, with options of XLA."""
        self.entry, self.limits = entry, limits.of(entry)
        self._case = staying(lambda: case) if entry.stays else case
        options: Any = {"stretch": entry.stretch, "product_stride": entry.product_stride}
        options |= {"clock": self.limits.clock, "compiler": compiler}

        def runner(numbers: Numbers) -> Any:
            if entry.peer:
                return entry.peer(case.task)
            make: Any = entry.make
            fixed = (lambda given, layers: make(given | numbers, layers)) if entry.is_static else make
            return Runner(fixed, numbers | {"horizon": 1.0}, case.task, entry.labels, **options)

        self._runners = [runner(numbers) for numbers in entry.tried[: None if entry.is_static else 1]]
        for each in self._runners:
            each.program  # noqa: B018 (it is compiled when it is asked for)

    @cached_property
    def pace(self) -> float:
        """Seconds of a step, from a few."""
        few, runner = 3 * max(self.entry.stretch, min(self.limits.look, 7)), self._runners[0]
        runner.begin(self.entry.tried[0] | {"horizon": float(few)})
        return runner.run(list(islice(self._case.stream(0), few)))[1] / few

    def course(self, numbers: Numbers, seed: int, limits: Limits | None = None) -> Course:
        """A run at its start."""
        limits, entry = limits or self.limits, self.entry
        runner = self._runners[entry.tried.index(numbers) if entry.is_static else 0]
        horizon = limits.seconds / self.pace if np.isfinite(limits.seconds) else limits.steps
        given = numbers | {"horizon": float(horizon)}
        return Course(runner, self._case, given, seed, limits, entry.warm)

    def tried(self, limits: Limits, seed: int, is_choice: bool) -> Records:
        """A row for each of the numbers, none for a choice among one; what is slower to a level is cut."""
        rows, merits, best = [], [], (np.inf, np.inf)
        for numbers in self.entry.tried if len(self.entry.tried) > 1 or not is_choice else ():
            course = self.course(numbers, seed, limits)
            while not course.is_over and course.looks[-1]["steps"] < best[0]:
                course.advance()
            best = min(best, course.merit)
            merits.append(course.merit)
            rows.append({"seed": seed, "numbers": numbers, **course.row()})
        return [row | {"best": merit == best} for row, merit in zip(rows, merits, strict=True)]

    def seconds(self, trial: Limits | None, runs: int) -> float:
        """How long its trials, if there are any, and so many runs will take."""
        each = [*([trial] * len(self.entry.tried) if trial else ()), *[self.limits] * runs]
        return sum(min(limits.steps * self.pace, limits.seconds) for limits in each)


def in_turn(courses: Mapping[str, Course], places: Mapping[str, Path]) -> Iterable[tuple[str, Course]]:
    """Take runs to their end, all in turn, from where they were saved; they are saved again every minute."""
    for name, course in courses.items():
        course.go_on(places[name])
    then = time.monotonic()
    while running := {name: course for name, course in courses.items() if not course.is_over}:
        for course in running.values():
            course.advance()
        if time.monotonic() - then > SAVE_EVERY:
            for name, course in running.items():
                course.save(places[name])
            then = time.monotonic()
    return courses.items()
