"""All that the experiments have found, on one page: the goals, every table and picture, and what was run where.

It trains nothing: it reads the records of a folder, draws the pictures of the runs anew from all of them, and writes
`report.md` there. What the folder has no records of is left out.

    make report                                       (of results/)
    make report ARGS="--folder experiments/results"   (of the committed results)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from experiments import autoencoder, classify, crossover, fidelity, speed, tune
from experiments.methods import METHODS
from experiments.problems import Name, Reconstructed
from experiments.records import Records, kept
from experiments.tables import markdown


@dataclass(frozen=True)
class Config:
    """What is read.

    Attributes:
        folder: of the records and pictures; the page is written there.
    """

    folder: Path = Path("results")


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        title: its heading.
        commands: that make its records.
        records: that its tables are made of.
        tables: as the experiments print them.
        pictures: {file in the folder: what it shows}.
    """

    title: str
    commands: list[str]
    records: Records
    tables: list[Table]
    pictures: Mapping[str, str]

    @property
    def where(self) -> str:
        """The machines and versions of JAX that its records are from."""
        told = sorted({f"{record['device']}, jax {record['jax']}" for record in self.records if "device" in record})
        before = any("device" not in record for record in self.records)
        return "; ".join(told + ["some before this was recorded" if told else "not recorded"] * before)


def of_autoencoder(folder: Path, problem: Reconstructed, found: autoencoder.Found) -> Section:
    """The runs of an autoencoder, those of several seeds once more by themselves, and the trials before."""
    config, stem = autoencoder.Config(output=folder, problem=problem), f"autoencoder_{problem}"
    shown = f"Training loss of the autoencoder on {problem} against epochs and seconds"
    pictures = {drawn(autoencoder.picture(found, config), folder / f"{stem}.png"): shown}
    several = found.of(lambda run: not run.logged and len(found.records[run.name]) > 1)
    if several.runs:
        path = folder / f"{stem}_seeds.png"
        pictures[drawn(autoencoder.picture(several, config), path)] = f"{shown}: median and range of several seeds"
    runs = [row for seeds in found.records.values() for rows in seeds for row in rows]
    trials = newest_trials(folder, {"problem": problem})
    option = "" if problem == "mnist" else f"--problem {problem}"
    commands, title = [made("tune", option), made("autoencoder", option)], autoencoder.chosen(config).title
    tables = [autoencoder.table(found, config), *([tune.table(trials, title)] if trials else [])]
    pictures |= of_trials(trials, f"{title}, {problem}", folder / f"tune_{problem}.png")
    records = runs + kept(autoencoder.paces_path(config), {"problem": problem})
    return Section(f"The papers' autoencoder: {runs[0]['data']}", commands, records, tables, pictures)


def of_classifier(folder: Path, problem: Name, channels: int) -> Section | None:
    """The runs of a classifier, and the trials before."""
    config = classify.Config(output=folder, problem=problem, channels=channels)
    found = classify.found_in(config)
    if found is None:
        return None
    what = classify.chosen(config)
    shown = f"Training loss and test accuracy of {what.title} on {problem} against epochs and seconds"
    pictures = {drawn(classify.picture(found, config), folder / f"classify_{what.stem}.png"): shown}
    runs = [row for seeds in found.records.values() for rows in seeds for row in rows]
    trials = newest_trials(folder, what.fields)
    named = f"--problem {problem} --channels {channels}"
    tables = [classify.table(found, config), *([tune.table(trials, what.title)] if trials else [])]
    pictures |= of_trials(trials, what.title, folder / f"tune_{problem}_{channels}.png")
    size = f"--images {trials[0]['images']} --epochs {trials[0]['epochs']}" if trials else ""
    commands = [made("tune", f"{named} {size}".strip()), made("classify", named)]
    records = runs + kept(classify.paces_path(config), what.fields)
    return Section(f"{what.title}: {runs[0]['data']}", commands, records, tables, pictures)


def of_others(folder: Path) -> Iterator[Section]:
    """Fidelity, speed, the crossover of TENGraD, and pictures of experiments that keep no records.

    Args:
        folder: of the records.

    Yields:
        What there is.
    """
    if records := kept(folder / "fidelity.jsonl"):
        config = fidelity.Config(output=folder, data=folder if records[0]["data"] == "MNIST" else None)
        table = fidelity.table(fidelity.found_in(folder), config)
        shown = "Errors of the Fisher blocks, and cosines of the directions with the exact natural gradient"
        yield Section("Fidelity to the Fisher matrix", [made("fidelity")], records, [table], {"fidelity.png": shown})
    if records := speed.newest(kept(folder / "speed.jsonl")):
        shown = "Step, compilation and memory of every method over Adam's"
        path = folder / "speed.png"
        pictures = {drawn(speed.picture(records), path): shown}
        yield Section("What a step costs", [made("bench")], records, [speed.table(records)], pictures)
    if records := kept(folder / "crossover.jsonl"):
        shown = "TENGraD over K-FAC for one dense layer by its width and the batch"
        table = crossover.table(records, crossover.Config())
        yield Section("When TENGraD is cheaper", [made("crossover")], records, [table], {"crossover.png": shown})
    for name, title in PICTURES.items():
        if (folder / f"{name}.png").exists():
            yield Section(title, [made(name)], [], [], {f"{name}.png": title})


PICTURES = {
    "race": "The race by steps that choose themselves: training loss above its floor",
    "control": "Which ways of choosing the step survive a small batch",
    "demo": "Every method on two small problems",
}
"""Of experiments that keep no records."""


def newest_trials(folder: Path, fields: Mapping[str, Any]) -> Records:
    """The trials with most epochs on a problem, in the order of the methods."""
    found = kept(folder / "tune.jsonl", fields)
    most = max((record["epochs"] for record in found), default=0)
    return [record for name in METHODS for record in found if record["name"] == name and record["epochs"] == most]


def of_trials(trials: Records, title: str, path: Path) -> dict[str, str]:
    """Their picture, if there are any."""
    told = f"{title}: loss of the trials against learning rate, a panel for each method"
    return {drawn(tune.picture(trials, title), path): told} if trials else {}


def made(target: str, options: str = "") -> str:
    """The command that makes some records."""
    return f'make {target} ARGS="{options}"' if options else f"make {target}"


def drawn(figure: Figure, path: Path) -> str:
    """Write a picture; its name."""
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path.name


def shrink(path: Path) -> None:
    """Leave a picture 256 colors, which takes two thirds of its bytes away and cannot be seen."""
    with Image.open(path) as picture:
        if picture.mode != "P":
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def goals(runs: Mapping[Reconstructed, autoencoder.Found]) -> Table | None:
    """What this package wants to reach, and what was measured; None if there is nothing to say it from."""
    table = Table(caption="Ours: tuned runs of this package's methods, without SGD-m and Adam.")
    for heading in ("goal", "asked", "measured", "by", "reached"):
        table.add_column(heading)
    if mnist := runs.get("mnist"):
        shares = {run.name: autoencoder.overtaken(mnist, run, 10)[1] for run in ours(mnist)}
        row(table, "MNIST: tuned Adam's loss of epoch 10, in so much of its seconds", 0.5, shares, ".2f")
        asked = ("K-FAC", "K-FAC, adaptive", "K-BFGS", "K-BFGS(L)")
        ends = {run.name: mnist.losses(run, 10)[:, 10].max() for run in mnist.runs if run.method in asked}
        row(table, "MNIST: training loss of K-FAC or K-BFGS at epoch 10, with the worst seed", 62.0, ends, ".1f")
    if curves := runs.get("curves"):
        level = autoencoder.PLATEAUS["curves"]
        until = {name: autoencoder.epochs_below(seeds, level) for name, seeds in curves.records.items()}
        adam = until.get(autoencoder.ADAM)
        shares = {run.name: until[run.name] / adam for run in ours(curves)} if adam else {}
        row(table, f"curves: below {level:g}, off the plateau, in so much of tuned Adam's steps", 0.2, shares, ".2f")
    return table if table.row_count else None


def ours(found: autoencoder.Found) -> list[autoencoder.Run]:
    """The tuned runs of the methods of this package."""
    return [run for run in found.runs if not run.logged and run.name not in ("SGD-m", autoencoder.ADAM)]


def row(table: Table, goal: str, asked: float, measured: Mapping[str, float], form: str) -> None:
    """A goal that the least of some numbers is no more than what was asked; no row without any."""
    if not measured:
        return
    best = min(measured, key=measured.__getitem__)
    told = f"{measured[best]:{form}}"
    table.add_row(goal, f"{asked:g}", told, best, "yes" if measured[best] <= asked else "no")


def page(folder: Path) -> str:
    """The page.

    Args:
        folder: of the records and the pictures.

    Returns:
        Markdown.

    Raises:
        ValueError: if there are no records.
    """
    all_runs = {problem: autoencoder.found_in(folder, problem) for problem in get_args(Reconstructed)}
    runs = {problem: found for problem, found in all_runs.items() if found}
    sections = [of_autoencoder(folder, problem, found) for problem, found in runs.items()]
    for problem, channels in product(get_args(Name), (16, 32, 128)):
        sections += [section] if (section := of_classifier(folder, problem, channels)) else []
    sections += of_others(folder)
    if not sections:
        raise ValueError(f"{folder} has no records; `make` lists the experiments that write some, or name a --folder.")
    for name in (name for section in sections for name in section.pictures):
        shrink(folder / name)
    overview = Table("part", "made by", "records", "run on", title="What was run where")
    for section in sections:
        commands = ", ".join(f"`{command}`" for command in section.commands)
        overview.add_row(section.title, commands, f"{len(section.records)}", section.where if section.records else "")
    asked = goals(runs)
    parts = ["# Results", "Written by `make report` from the records in this folder.", markdown(overview)]
    parts += ["## Goals", markdown(asked)] if asked else []
    for section in sections:
        parts += [f"## {section.title}", *(f"![{told}]({name})" for name, told in section.pictures.items())]
        parts += map(markdown, section.tables)
    return "\n\n".join(parts) + "\n"


def main(config: Config) -> None:
    """Write the page."""
    path = config.folder / "report.md"
    path.write_text(page(config.folder))
    print(f"Report: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
