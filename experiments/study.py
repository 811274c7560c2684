"""Many methods from the same starts on the same batches, losses against steps and seconds: the engine of short studies.

A study is data: problems, entries (a method with the numbers that are tried) and limits. Of each entry the best numbers
are chosen by short runs with one seed. Then all entries run in turn from every seed, some steps each, so that a busy
machine slows all alike; neither compilation nor the measuring of losses is in the seconds. Rows are kept in a file, and
what it has is not run again.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, product, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from experiments.data import Part
from experiments.records import Records, keep, kept, machine, significant
from experiments.running import Labels, Peer, Runner

Numbers = dict[str, Any]


class Case(NamedTuple):
    """What is trained on what.

    Attributes:
        fields: of its rows, that tell it from other cases; "problem" among them.
        task: of a `Runner`.
        stream: seed -> batches for ever.
        loss: variables -> what is measured at every look.
        test: variables -> what is told at the end.
    """

    fields: Mapping[str, Any]
    task: Any
    stream: Callable[[int], Iterator[Part]]
    loss: Callable[[Any], float]
    test: Callable[[Any], str] | None = None


class Entry(NamedTuple):
    """A method of a study.

    Attributes:
        make: numbers, layers -> optimizer; the numbers have "horizon", the steps of the run, beside those tried.
        tried: the numbers of which the best are taken.
        labels: of the curvature; None for plain gradients, without any capture.
        steps: most of them, if others than those of the study.
        look: steps between two looks at the loss, if others than those of the study.
        stretch: steps that are compiled into one program; they divide those of a look.
        is_static: whether each of the numbers is compiled by itself.
        peer: task -> what runs instead of a `Runner`.
        stays: whether it stays on the first batch of the stream.
    """

    make: Callable[[Numbers, Any], Any] | None
    tried: tuple[Numbers, ...] = ({},)
    labels: Labels | None = "sampled"
    steps: int | None = None
    look: int | None = None
    stretch: int = 1
    is_static: bool = False
    peer: Callable[[Any], Peer] | None = None
    stays: bool = False


class Limits(NamedTuple):
    """When a run ends: after so many steps or seconds, or where its loss is no more than `level`.

    Attributes:
        steps: most of them.
        look: steps between two looks at the loss.
        seconds: most of them.
        level: of the loss.
        clock: of the seconds.
    """

    steps: int
    look: int
    seconds: float = np.inf
    level: float = -np.inf
    clock: Callable[[], float] = time.perf_counter

    def of(self, entry: Entry) -> "Limits":
        """Those of an entry."""
        return self._replace(steps=entry.steps or self.steps, look=entry.look or self.look)


def key(config: Any, *names: str) -> dict[str, Any]:
    """The numbers of a configuration that its rows depend on, as a record has them."""
    found = {name: getattr(config, name) for name in names}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in found.items()}


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


class Course:
    """A run from one start, with a look at its loss every few steps."""

    def __init__(self, runner: Any, case: Case, numbers: Numbers, seed: int, limits: Limits, stays: bool = False):
        """Go to the start."""
        self._runner, self._case, self._limits = runner, case, limits
        runner.begin(numbers, seed)
        stream = case.stream(seed)
        self._stream = repeat(next(stream)) if stays else stream
        self.steps, self.seconds, self.losses = [0], [0.0], [case.loss(runner.variables)]

    @property
    def is_over(self) -> bool:
        """Whether a limit is reached, or the loss is lost."""
        limits, loss = self._limits, self.losses[-1]
        spent = self.steps[-1] >= limits.steps or self.seconds[-1] >= limits.seconds
        return spent or loss <= limits.level or not np.isfinite(loss)

    def advance(self) -> None:
        """Some steps, and a look at the loss; that and the making of the batches are outside the clock."""
        count = min(self._limits.look, self._limits.steps - self.steps[-1])
        _, seconds = self._runner.run(list(islice(self._stream, count)))
        self.steps.append(self.steps[-1] + count)
        self.seconds.append(self.seconds[-1] + seconds)
        self.losses.append(self._case.loss(self._runner.variables))

    def row(self, most: int = 120) -> dict[str, Any]:
        """For a record; of very many looks those at equal ratios."""
        looks = np.unique(np.geomspace(1, len(self.steps), most).astype(int)) - 1
        looks = looks if len(self.steps) > most else range(len(self.steps))
        test = self._case.test(self._runner.variables) if self._case.test else ""
        return {
            "steps": [self.steps[look] for look in looks],
            "seconds": [round(self.seconds[look], 4) for look in looks],
            "losses": [significant(self.losses[look]) for look in looks],
            "test": test,
            "compile_seconds": self._runner.compile_seconds,
        }

    @property
    def merit(self) -> tuple[float, float]:
        """The less the better: steps until the level, then the last loss."""
        loss = self.losses[-1]
        return (self.steps[-1] if loss <= self._limits.level else np.inf), loss if np.isfinite(loss) else np.inf


class Compiled:
    """An entry on a case: its runners, and the numbers that are the best."""

    def __init__(self, entry: Entry, case: Case, limits: Limits):
        """Compile; if the end is a matter of seconds, look first how many steps there will be."""
        self._entry, self._case, self.limits = entry, case, limits.of(entry)
        self._runners: list[Any] = []
        for numbers in entry.tried if entry.is_static else entry.tried[:1]:
            make: Any = partial(_fixed, entry.make, numbers) if entry.is_static else entry.make
            given = numbers | {"horizon": 1.0}
            options: Any = {"stretch": entry.stretch, "clock": limits.clock}
            if entry.peer:
                runner: Any = entry.peer(case.task)
            else:
                runner = Runner(make, given, case.task, entry.labels, **options)
            self._runners.append(runner)
        self._pace = 0.0
        if np.isfinite(limits.seconds):
            few = self.limits._replace(steps=3 * self.limits.look, seconds=np.inf)
            course = self.course(entry.tried[0], 0, few)
            while not course.is_over:
                course.advance()
            self._pace = course.seconds[-1] / course.steps[-1]

    def course(self, numbers: Numbers, seed: int, limits: Limits | None = None) -> Course:
        """A run at its start."""
        limits = limits or self.limits
        runner = self._runners[self._entry.tried.index(numbers) if self._entry.is_static else 0]
        horizon = limits.seconds / self._pace if self._pace and np.isfinite(limits.seconds) else limits.steps
        return Course(runner, self._case, numbers | {"horizon": float(horizon)}, seed, limits, self._entry.stays)

    def tried(self, limits: Limits, seed: int, is_choice: bool) -> Records:
        """A row for each of the numbers, none for a choice among one; what is slower to a level is cut."""
        rows, merits, best = [], [], (np.inf, np.inf)
        for numbers in self._entry.tried if len(self._entry.tried) > 1 or not is_choice else ():
            course = self.course(numbers, seed, limits)
            while not course.is_over and course.steps[-1] < best[0]:
                course.advance()
            best = min(best, course.merit)
            merits.append(course.merit)
            rows.append({"seed": seed, "numbers": numbers, **course.row()})
        return [row | {"best": merit == best} for row, merit in zip(rows, merits, strict=True)]


def _fixed(make: Any, numbers: Numbers, given: Numbers, layers: Any) -> Any:
    return make(given | numbers, layers)


def run(
    path: Path,
    key: Mapping[str, Any],
    cases: Iterable[Case],
    entries: Mapping[str, Entry] | Callable[[Case], Mapping[str, Entry]],
    limits: Limits,
    seeds: Sequence[int] = (0,),
    trial: Limits | None = None,
    trial_seed: int = 0,
) -> Records:
    """Choose the numbers of every entry, and run all in turn from every seed, but for what is in the file.

    Args:
        path: of the rows.
        key: numbers that tell them from those of other configurations.
        cases: the problems.
        entries: {name: method}, or those of a case.
        limits: of the runs.
        seeds: of the runs; without any the trials are all.
        trial: limits of the trials, if others.
        trial_seed: their seed.
    """
    rows: Records = []
    for case in cases:
        wanted = entries(case) if callable(entries) else entries
        keys = {name: {**case.fields, "name": name, "config": dict(key)} for name in wanted}
        tried = {name: kept(path, keys[name] | {"trial": True}) for name in wanted}
        known = {name: kept(path, keys[name] | {"trial": False}) for name in wanted}
        left = {name: {*seeds} - {row["seed"] for row in known[name]} for name in wanted}
        missing = [name for name in wanted if left[name] or not (seeds or tried[name])]
        compiled: dict[str, Compiled] = {}
        told = ", ".join(map(str, case.fields.values()))
        for name in track(missing, description=f"{told}: compiling, trials"):
            compiled[name] = Compiled(wanted[name], case, limits)
            if not tried[name]:
                some = compiled[name].tried((trial or limits).of(wanted[name]), trial_seed, bool(seeds))
                tried[name] = [{**keys[name], "trial": True, **machine(), **row} for row in some]
                keep(path, tried[name])
        for seed in track(seeds if missing else (), description=f"{told}: runs"):
            first = {name: wanted[name].tried[0] for name in missing}
            best = first | {name: row["numbers"] for name in missing for row in tried[name][::-1] if row["best"]}
            courses = {name: compiled[name].course(best[name], seed) for name in missing if seed in left[name]}
            while running := [course for course in courses.values() if not course.is_over]:
                for course in running:
                    course.advance()
            for name, course in courses.items():
                own = {"trial": False, **machine(), "seed": seed, "numbers": best[name], **course.row()}
                known[name].append({**keys[name], **own})
                keep(path, known[name][-1:])
        rows += [row for name in wanted for row in (known[name] if seeds else tried[name])]
    return [row for row in rows if row["seed"] in (seeds or (trial_seed,))]


def reached(row: Mapping[str, Any], level: float) -> tuple[float, float]:
    """Steps and seconds at which a run is first at a loss; infinite if never."""
    found = (look for look, loss in enumerate(row["losses"]) if loss is not None and loss <= level)
    look = next(found, None)
    return (np.inf, np.inf) if look is None else (row["steps"][look], row["seconds"][look])
