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
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from experiments import crossover, fidelity, pinn, regression, speed, text, train, tune
from experiments.figures import markdown
from experiments.methods import METHODS
from experiments.problems import RECONSTRUCTED
from experiments.records import Records, kept


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


def of_training(config: train.Config, found: train.Found) -> Section:
    """The runs on a problem, those of an autoencoder with several seeds once more by themselves, and the trials."""
    folder, what = config.output, config.what
    path, name = config.path(f"_{what.stem}").with_suffix(".png"), f"{config.problem}"
    if config.is_classifier:
        shown = f"Training loss and test accuracy of {what.title} on {name} against epochs and seconds"
        option, title, heading = f"--problem {name} --channels {config.channels}", what.title, what.title
        name += f"_{config.channels}"
    else:
        shown = f"Training loss of the autoencoder on {name} against epochs and seconds"
        option, title = "" if name == "mnist" else f"--problem {name}", f"{what.title}, {name}"
        heading = "The papers' autoencoder"
    pictures = {drawn(train.picture(found, config), path): shown}
    several = found.of(lambda run: not run.logged and len(found.records[run.name]) > 1)
    if several.runs and not config.is_classifier:
        again = path.with_stem(f"{path.stem}_seeds")
        pictures[drawn(train.picture(several, config), again)] = f"{shown}: median and range of several seeds"
    tables, size = [train.table(found, config)], ""
    if trials := newest_trials(folder, what.fields):
        tables.append(tune.table(trials, what.title))
        told = f"{title}: loss of the trials against learning rate, a panel for each method"
        pictures[drawn(tune.picture(trials, title), folder / f"tune_{name}.png")] = told
        if config.is_classifier:
            size = f" --images {trials[0]['images']} --epochs {trials[0]['epochs']}"
    commands = [made("tune", option + size), made("classify" if config.is_classifier else "autoencoder", option)]
    runs = [row for seeds in found.records.values() for rows in seeds for row in rows]
    records = runs + kept(config.path("_paces"), what.fields)
    return Section(f"{heading}: {runs[0]['data']}", commands, records, tables, pictures)


def of_others(folder: Path) -> Iterator[Section]:
    """Fidelity, speed, the crossover of TENGraD, short studies, and pictures of those without records in the folder.

    Args:
        folder: of the records.

    Yields:
        What there is.
    """
    if records := kept(folder / "fidelity.jsonl"):
        shown = "Errors of the Fisher blocks, and cosines of the directions with the exact natural gradient"
        table = fidelity.table(records)
        yield Section("Fidelity to the Fisher matrix", [made("fidelity")], records, [table], {"fidelity.png": shown})
    if records := speed.newest(kept(folder / "speed.jsonl")):
        shown = "Step, compilation and memory of every method over Adam's"
        pictures = {drawn(speed.picture(records), folder / "speed.png"): shown}
        yield Section("What a step costs", [made("bench")], records, [speed.table(records)], pictures)
    if records := kept(folder / "crossover.jsonl"):
        shown = "TENGraD over K-FAC for one dense layer by its width and the batch"
        table = crossover.table(records)
        yield Section("When TENGraD is cheaper", [made("crossover")], records, [table], {"crossover.png": shown})
    for name, (study, title, shown) in STUDIES.items():
        if records := kept(folder / f"{name}.jsonl", {"trial": False}):
            pictures = {drawn(study.picture(records), folder / f"{name}.png"): shown}
            yield Section(title, [made(name)], records, [study.table(records)], pictures)
    for name, title in PICTURES.items():
        if (folder / f"{name}.png").exists():
            yield Section(title, [made(name)], [], [], {f"{name}.png": title})


STUDIES: dict[str, tuple[Any, str, str]] = {
    "pinn": (pinn, "Differential equations", "Relative L2 error against seconds of the processor and steps"),
    "regression": (regression, "Least squares", "Loss on whole tables against seconds of the processor and steps"),
    "text": (text, "A transformer on letters", "Loss of letters not trained on against seconds and steps"),
}
"""Short studies: {records: the experiment, its title, what its picture shows}."""
PICTURES = {
    "race": "The race by steps that choose themselves: training loss above its floor",
    "control": "Which ways of choosing the step survive a small batch",
    "demo": "Every method on two small problems",
}


def newest_trials(folder: Path, fields: Mapping[str, Any]) -> Records:
    """The trials with most epochs on a problem, in the order of the methods."""
    found = kept(folder / "tune.jsonl", fields)
    most = max((record["epochs"] for record in found), default=0)
    return [record for name in METHODS for record in found if record["name"] == name and record["epochs"] == most]


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


def goals(runs: Mapping[str, train.Found]) -> Table | None:
    """What this package wants to reach, and what was measured; None if there is nothing to say it from."""
    table = Table(caption="Ours: tuned runs of this package's methods, without SGD-m and Adam.")
    for heading in ("goal", "asked", "measured", "by", "reached"):
        table.add_column(heading)
    if mnist := runs.get("mnist"):
        shares = {run.name: train.overtaken(mnist, run, 10)[1] for run in ours(mnist)}
        row(table, "MNIST: tuned Adam's loss of epoch 10, in so much of its seconds", 0.5, shares, ".2f")
        asked = ("K-FAC", "K-FAC, adaptive", "K-BFGS", "K-BFGS(L)")
        ends = {
            run.name: mnist.numbers(run, "train_loss", 10)[:, 10].max() for run in mnist.runs if run.method in asked
        }
        row(table, "MNIST: training loss of K-FAC or K-BFGS at epoch 10, with the worst seed", 62.0, ends, ".1f")
    if curves := runs.get("curves"):
        level = train.PLATEAUS["curves"]
        until = {name: train.epochs_below(seeds, level) for name, seeds in curves.records.items()}
        adam = until.get(train.ADAM)
        shares = {run.name: until[run.name] / adam for run in ours(curves)} if adam else {}
        row(table, f"curves: below {level:g}, off the plateau, in so much of tuned Adam's steps", 0.2, shares, ".2f")
    return table if table.row_count else None


def ours(found: train.Found) -> list[train.Run]:
    """The tuned runs of the methods of this package."""
    return [run for run in found.runs if not run.logged and run.name not in ("SGD-m", train.ADAM)]


def row(table: Table, goal: str, asked: float, measured: Mapping[str, float], form: str) -> None:
    """A goal that the least of some numbers is no more than what was asked; no row without any."""
    if measured:
        best = min(measured, key=measured.__getitem__)
        reached = "yes" if measured[best] <= asked else "no"
        table.add_row(goal, f"{asked:g}", f"{measured[best]:{form}}", best, reached)


def page(folder: Path) -> str:
    """The page, as Markdown; a `ValueError` if the folder has no records."""
    options: list[dict[str, Any]] = [{"problem": name} for name in RECONSTRUCTED]
    pairs = product(("fashion", "cifar10", "digits"), (16, 32, 128))
    options += [{"problem": name, "channels": channels} for name, channels in pairs]
    configs = [train.Config(output=folder, **option) for option in options]
    runs = [(config, found) for config in configs if (found := train.found_in(config))]
    sections = [*(of_training(*pair) for pair in runs), *of_others(folder)]
    if not sections:
        raise ValueError(f"{folder} has no records; `make` lists the experiments that write some, or name a --folder.")
    for name in (name for section in sections for name in section.pictures):
        shrink(folder / name)
    overview = Table("part", "made by", "records", "run on", title="What was run where")
    for section in sections:
        commands = ", ".join(f"`{command}`" for command in section.commands)
        overview.add_row(section.title, commands, f"{len(section.records)}", section.where if section.records else "")
    asked = goals({config.problem: found for config, found in runs})
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
