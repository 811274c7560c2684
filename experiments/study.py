"""Studies as data: many methods from the same starts on the same batches, losses against steps and seconds.

A `Study` names its problems, its entries (a method with the numbers that are tried), its limits, table and picture. Of
each entry the best numbers are chosen by short runs with one seed. Then all entries run in turn from every seed, some
steps each, so that a busy machine slows all alike; neither compilation nor the measuring of losses is in the seconds.
Rows are kept in a file, and what it has is not run again; a run that is stopped goes on where it was a minute before.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from experiments import figures
from experiments.courses import Case, Compiled, Entry, Limits, adam, cosine, grid, in_turn, natural, staying
from experiments.records import Records, chosen, keep, kept, machine, state_path
from experiments.running import Numbers

__all__ = ["Case", "Entry", "Limits", "Numbers", "Study", "adam", "cosine", "grid", "main", "natural", "run"]

TRIAL_SEED = 0


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
        estimate: only say how long the runs that are left will take.
    """

    output: Path = Path("results")
    methods: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seeds: int | None = None
    steps: int | None = None
    seconds: float | None = None
    trial: float | None = None
    stays: bool = False
    estimate: bool = False


class Study(NamedTuple):
    """An experiment; its name is that of its records, its title stands over its part of the report.

    Attributes:
        cases: {problem: how it is made}.
        entries: {name: method, or case -> method}.
        config: numbers that the rows depend on, beside the limits.
        seeds: of the runs; without any the trials are all.
        trial: limits of the trials, if others.
        is_double: whether it computes in float64.
        command: that makes its records, if not `make` and its name.
        image: name of its picture, if it is another one.
        compiler: options of XLA for its programs.
    """

    name: str
    title: str
    cases: Mapping[str, Callable[[], Case]]
    entries: Mapping[str, Any]
    limits: Limits
    table: Callable[[Records], Table]
    picture: Callable[[Records], Figure] | None = None
    config: Mapping[str, Any] = {}
    seeds: Sequence[int] = (0,)
    trial: Limits | None = None
    is_double: bool = False
    command: str = ""
    image: str = ""
    compiler: Mapping[str, Any] = {}

    @property
    def key(self) -> dict[str, Any]:
        """What its rows depend on, as a record has it."""
        short = {"trial": getattr(self.trial, self.ends)} if self.trial else {}
        return {self.ends: getattr(self.limits, self.ends), **short, **self.config}

    @property
    def ends(self) -> str:
        """By what its runs end."""
        return "seconds" if np.isfinite(self.limits.seconds) else "steps"

    def asked(self, options: Options) -> "Study":
        """The part of it that is asked for."""
        short = {"steps": None, "seconds": None, self.ends: options.trial}
        cases = some(self.cases, options.problems)
        return self._replace(
            name=self.name + "_stays" * options.stays,
            cases={name: partial(staying, make) for name, make in cases.items()} if options.stays else cases,
            entries=some(self.entries, options.methods),
            limits=self.limits.shorter(options.steps, options.seconds),
            trial=self.trial and self.trial.shorter(**short),
            seeds=self.seeds if options.seeds is None or not self.seeds else range(options.seeds),
        )

    def known(self, folder: Path) -> Records:
        """Its rows in a folder, at the numbers of the newest."""
        rows = kept(folder / f"{self.name}.jsonl", {"trial": not self.seeds})
        return [row for row in rows if row["config"] == rows[-1]["config"]]

    def tried(self, path: Path, key: Mapping[str, Any]) -> Records:
        """The trials in a file that have a key; how long the runs after them were does not matter."""
        own = {name: number for name, number in self.key.items() if not self.trial or name != self.ends}
        return [row for row in kept(path, {**key, "trial": True}) if own.items() <= row["config"].items()]


def some(there: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """Those that are asked for; all if none is."""
    return {name: found for name, found in there.items() if not asked or name in asked}


def run(study: Study, folder: Path, is_estimate: bool = False) -> Records:
    """Choose the numbers of every entry, and run all in turn from every seed, but for what is in the folder.

    An estimate says how long that will take, and runs nothing.
    """
    path = folder / f"{study.name}.jsonl"
    with jax.enable_x64(study.is_double):
        return [row for make in study.cases.values() for row in _run(study, make(), path, is_estimate)]


def _run(study: Study, case: Case, path: Path, is_estimate: bool) -> Records:
    """The rows of a case."""
    seeds, wanted = study.seeds, {name: of(case) if callable(of) else of for name, of in study.entries.items()}
    keys = {name: {**case.fields, "name": name, "config": study.key} for name in wanted}
    tried = {name: study.tried(path, {**case.fields, "name": name}) for name in wanted}
    known = {name: kept(path, keys[name] | {"trial": False}) for name in wanted}
    left = {name: {*seeds} - {row["seed"] for row in known[name]} for name in wanted}
    missing = [name for name in wanted if left[name] or not (seeds or tried[name])]
    about, short = ", ".join(map(str, case.fields.values())), study.trial or study.limits

    def made(name: str) -> Compiled:
        with jax.enable_x64(study.is_double):  # which is of a thread
            return Compiled(wanted[name], case, study.limits, study.compiler)

    with ThreadPoolExecutor(2) as pool:  # XLA takes one core for a program
        each = track(pool.map(made, missing), f"{about}: compiling", len(missing))
        compiled = dict(zip(missing, each, strict=True))
    if is_estimate:
        times = [one.seconds(None if tried[name] else short, len(left[name])) for name, one in compiled.items()]
        print(f"{about}: {len(missing)} methods, {sum(times) / 60:.1f} minutes of steps are left.")
        return []
    for name in track(missing, f"{about}: trials"):
        if not tried[name]:
            some = compiled[name].tried(short.of(wanted[name]), TRIAL_SEED, bool(seeds))
            tried[name] = [{**keys[name], "trial": True, **machine(), **row} for row in some]
            keep(path, tried[name])
    first = {name: wanted[name].tried[0] for name in missing}
    best = first | {name: row["numbers"] for name in missing for row in tried[name][::-1] if row["best"]}
    for seed in track(seeds if missing else (), description=f"{about}: runs"):
        names = [name for name in missing if seed in left[name]]
        places = {name: state_path(path, {**keys[name], "seed": seed, "numbers": best[name]}) for name in names}
        for name, course in in_turn({name: compiled[name].course(best[name], seed) for name in names}, places):
            own = {"trial": False, **machine(), "seed": seed, "numbers": best[name], **course.row()}
            known[name].append({**keys[name], **own})
            keep(path, known[name][-1:])
            places[name].unlink(missing_ok=True)
    rows = [row for name in wanted for row in (known[name] if seeds else tried[name])]
    return [row for row in rows if row["seed"] in (seeds or (TRIAL_SEED,))]


def parts(studies: Sequence[Study], options: Options) -> list[Study]:
    """What is asked of the studies of a file, without those that have none of it; an unknown name is a `ValueError`."""
    chosen([name for study in studies for name in study.entries], options.methods)
    chosen([name for study in studies for name in study.cases], options.problems)
    found = [study.asked(options) for study in studies]
    return [part for part in found if part.entries and part.cases]


def main(*studies: Study, problems: tuple[str, ...] = ()) -> None:
    """Ask what is wanted of the studies of a file, by default of some problems; run them, show their rows."""
    options = figures.asked(Options, default=Options(problems=problems))
    for part in parts(studies, options):
        if rows := run(part, options.output, options.estimate):
            figures.present(part, rows, options.output)
