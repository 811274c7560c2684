"""Studies as data: many methods from the same starts on the same batches, losses against steps and seconds.

A `Study` names its problems, its entries (a method with the numbers that are tried), its limits, table and picture. Of
each entry the best numbers are chosen by short runs with one seed. Then all entries run in turn from every seed, some
steps each, so that a busy machine slows all alike; neither compilation nor the measuring of losses is in the seconds.
Rows are kept in a file, and what it has is not run again.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice, product, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from experiments import figures
from experiments.data import Part
from experiments.records import Records, chosen, keep, kept, machine, significant
from experiments.running import Labels, Peer, Runner

Numbers = dict[str, Any]


class Case(NamedTuple):
    """What is trained on what.

    Attributes:
        fields: of its rows, that tell it from other cases; "problem" among them.
        task: of a `Runner`.
        stream: seed -> batches for ever.
        loss: variables -> what is measured at every look.
    """

    fields: Mapping[str, Any]
    task: Any
    stream: Callable[[int], Iterator[Part]]
    loss: Callable[[Any], float]


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

    def shorter(self, steps: float | None, seconds: float | None) -> "Limits":
        """Others, where they are given."""
        return self._replace(steps=int(steps or self.steps), seconds=seconds or self.seconds)


@dataclass(frozen=True)
class Options:
    """What may be asked of a study; the rest is as its file has it.

    Attributes:
        output: folder of the records and of the picture.
        methods: which; all if none is named.
        problems: which; all if none is named.
        seeds: runs of a method from as many starts.
        steps: most of a run.
        seconds: of a run, where these end it.
        trial: seconds of a trial, or its steps.
        stays: whether all methods stay on their first batch, or points; these records have a file of their own.
    """

    output: Path = Path("results")
    methods: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seeds: int | None = None
    steps: int | None = None
    seconds: float | None = None
    trial: float | None = None
    stays: bool = False


class Study(NamedTuple):
    """An experiment.

    Attributes:
        name: of its records, its picture and its target of `make`.
        title: over its part of the report.
        cases: {problem: how it is made}.
        entries: {name: method}, or those of a case.
        limits: of the runs.
        table: rows -> table.
        picture: rows -> picture.
        config: numbers that the rows depend on, beside the limits.
        seeds: of the runs; without any the trials are all.
        trial: limits of the trials, if others.
        trial_seed: their seed.
        is_double: whether it computes in float64.
    """

    name: str
    title: str
    cases: Mapping[str, Callable[[], Case]]
    entries: Mapping[str, Entry] | Callable[[Case], Mapping[str, Entry]]
    limits: Limits
    table: Callable[[Records], Table]
    picture: Callable[[Records], Figure] | None = None
    config: Mapping[str, Any] = {}
    seeds: Sequence[int] = (0,)
    trial: Limits | None = None
    trial_seed: int = 0
    is_double: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What its rows depend on, as a record has it."""
        ends = "seconds" if np.isfinite(self.limits.seconds) else "steps"
        short = {"trial": getattr(self.trial, ends)} if self.trial else {}
        return {ends: getattr(self.limits, ends), **short, **self.config}

    def asked(self, options: Options) -> "Study":
        """The part of it that is asked for; a `ValueError` if there is no problem or method of a name."""
        entries: Any = self.entries
        names = chosen(entries, options.methods) if isinstance(entries, Mapping) else options.methods
        limits = self.limits.shorter(options.steps, options.seconds)
        is_timed = np.isfinite(limits.seconds)
        trial = self.trial and self.trial.shorter(*((None, options.trial) if is_timed else (options.trial, None)))

        def those(case: Case) -> Mapping[str, Entry]:
            found = entries(case) if callable(entries) else entries
            stays = {"stays": True} if options.stays else {}
            return {name: found[name]._replace(**stays) for name in names or found}

        return self._replace(
            name=self.name + "_stays" * options.stays,
            cases={name: self.cases[name] for name in chosen(self.cases, options.problems)},
            entries=those,
            limits=limits,
            trial=trial,
            seeds=self.seeds if options.seeds is None or not self.seeds else range(options.seeds),
        )

    def precision(self) -> Any:
        """A context in which it computes."""
        return jax.enable_x64(True) if self.is_double else nullcontext()

    def known(self, folder: Path) -> Records:
        """Its rows in a folder, at the numbers of the newest."""
        rows = kept(folder / f"{self.name}.jsonl", {"trial": not self.seeds})
        return [row for row in rows if row["config"] == rows[-1]["config"]]


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


def adam(rates: Iterable[float], stretch: int = 1) -> Entry:
    """Adam at the best of some rates, each falling like a cosine."""
    return Entry(
        lambda numbers, layers: optax.adam(cosine(numbers["rate"], numbers["horizon"])),
        grid(rate=rates),
        labels=None,
        look=stretch if stretch > 1 else None,
        stretch=stretch,
    )


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
        return {
            "steps": [self.steps[look] for look in looks],
            "seconds": [round(self.seconds[look], 4) for look in looks],
            "losses": [significant(self.losses[look]) for look in looks],
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
        """Compile."""
        self._entry, self._case, self.limits = entry, case, limits.of(entry)
        self._runners = [self._runner(numbers) for numbers in entry.tried[: None if entry.is_static else 1]]
        for runner in self._runners:
            runner.program  # noqa: B018 (it is compiled when it is asked for)

    def _runner(self, numbers: Numbers) -> Any:
        entry = self._entry
        if entry.peer:
            return entry.peer(self._case.task)
        make: Any = partial(_fixed, entry.make, numbers) if entry.is_static else entry.make
        options: Any = {"stretch": entry.stretch, "clock": self.limits.clock}
        return Runner(make, numbers | {"horizon": 1.0}, self._case.task, entry.labels, **options)

    @cached_property
    def _pace(self) -> float:
        """Seconds of a step, from a few."""
        few = self.limits._replace(steps=3 * self.limits.look, seconds=np.inf)
        course = self.course(self._entry.tried[0], 0, few)
        while not course.is_over:
            course.advance()
        return course.seconds[-1] / course.steps[-1]

    def course(self, numbers: Numbers, seed: int, limits: Limits | None = None) -> Course:
        """A run at its start."""
        limits = limits or self.limits
        runner = self._runners[self._entry.tried.index(numbers) if self._entry.is_static else 0]
        horizon = limits.seconds / self._pace if np.isfinite(limits.seconds) else limits.steps
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


def run(study: Study, folder: Path) -> Records:
    """Choose the numbers of every entry, and run all in turn from every seed, but for what is in the folder."""
    path = folder / f"{study.name}.jsonl"
    with study.precision():
        return [row for make in study.cases.values() for row in _run(study, make(), path)]


def _run(study: Study, case: Case, path: Path) -> Records:
    """The rows of a case."""
    wanted, seeds = study.entries(case) if callable(study.entries) else study.entries, study.seeds
    keys = {name: {**case.fields, "name": name, "config": study.key} for name in wanted}
    tried = {name: kept(path, keys[name] | {"trial": True}) for name in wanted}
    known = {name: kept(path, keys[name] | {"trial": False}) for name in wanted}
    left = {name: {*seeds} - {row["seed"] for row in known[name]} for name in wanted}
    missing = [name for name in wanted if left[name] or not (seeds or tried[name])]
    about = ", ".join(map(str, case.fields.values()))

    def made(name: str) -> Compiled:
        with study.precision():  # which is of a thread
            return Compiled(wanted[name], case, study.limits)

    with ThreadPoolExecutor(2) as pool:  # XLA takes one core for a program
        each = track(pool.map(made, missing), f"{about}: compiling", len(missing))
        compiled = dict(zip(missing, each, strict=True))
    for name in track(missing, f"{about}: trials"):
        if not tried[name]:
            limits = (study.trial or study.limits).of(wanted[name])
            some = compiled[name].tried(limits, study.trial_seed, bool(seeds))
            tried[name] = [{**keys[name], "trial": True, **machine(), **row} for row in some]
            keep(path, tried[name])
    for seed in track(seeds if missing else (), description=f"{about}: runs"):
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
    rows = [row for name in wanted for row in (known[name] if seeds else tried[name])]
    return [row for row in rows if row["seed"] in (seeds or (study.trial_seed,))]


def shared_out(studies: Sequence[Study], options: Options) -> list[tuple[Study, Options]]:
    """The studies of a file with what is asked of each, without those that have none of the methods or problems.

    A `ValueError` if there is no study with a name that is asked for.
    """
    if len(studies) == 1:
        return [(studies[0], options)]
    entries: list[Any] = [study.entries for study in studies]  # mappings: others have a file of their own
    chosen([name for known in entries for name in known], options.methods)
    chosen([name for study in studies for name in study.cases], options.problems)
    found = []
    for study, known in zip(studies, entries, strict=True):
        own = {
            "methods": tuple(name for name in options.methods if name in known),
            "problems": tuple(name for name in options.problems if name in study.cases),
        }
        if all(bool(names) == bool(getattr(options, what)) for what, names in own.items()):
            found.append((study, replace(options, **own)))
    return found


def main(*studies: Study) -> None:
    """Ask what is wanted of the studies of a file; run them, print their tables, write their pictures."""
    plt.switch_backend("agg")
    options = tyro.cli(Options, description=figures.question(sys.modules["__main__"].__doc__))
    for study, own in shared_out(studies, options):
        part = study.asked(own)
        if rows := run(part, options.output):
            picture = part.picture(rows) if part.picture else None
            figures.present([part.table(rows)], picture, options.output / f"{part.name}.png")
