"""All that the experiments have found, on one page: the goals, every table and picture, and what was run where.

It trains nothing: it reads the records of a folder, draws the pictures of the runs anew from all of them, and writes
`report.md` there. What the folder has no records of is left out.

    make report                                       (of results/)
    make report ARGS="--folder experiments/results"   (of the committed results)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from experiments import control, crossover, defaults, demo, fidelity, pinn, race, regression, speed, text, train, tune
from experiments.figures import markdown
from experiments.methods import METHODS
from experiments.problems import RECONSTRUCTED
from experiments.records import Records, kept

MEASURED = (fidelity.SHOWN, speed.SHOWN, crossover.SHOWN)
STUDIES = (pinn.STUDY, regression.STUDY, text.STUDY, race.STUDY, control.STUDY, demo.STUDY)
ALONE = (defaults.WITH_RATES, defaults.WITHOUT)
"""Studies of tables without a picture."""


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
        found = sorted({f"{record['device']}, jax {record['jax']}" for record in self.records if "device" in record})
        before = any("device" not in record for record in self.records)
        return "; ".join(found + ["some before this was recorded" if found else "not recorded"] * before)


def of_training(config: train.Config, found: train.Found) -> Section:
    """The runs on a problem, and the trials."""
    what, size = config.what, ""
    path, shown = config.path(f"_{what.stem}").with_suffix(".png"), f"{what.title}, {config.problem}: losses"
    pictures = {drawn(train.picture(found, config), path): f"{shown} against epochs and seconds"}
    tables = [train.table(found, config)]
    if trials := newest_trials(config.output, what.fields):
        tables.append(tune.table(trials, what.title))
        name = f"tune_{config.problem}{f'_{config.channels}' * config.is_classifier}.png"
        pictures[drawn(tune.picture(trials, what.title), config.output / name)] = f"{shown} of the trials"
        size = f" --images {trials[0]['images']} --epochs {trials[0]['epochs']}" * config.is_classifier
    commands = [
        made("tune", config.option + size),
        made("classify" if config.is_classifier else "autoencoder", config.option),
    ]
    runs = [row for seeds in found.records.values() for rows in seeds for row in rows]
    heading = what.title if config.is_classifier else "The papers' autoencoder"
    records = runs + kept(config.path("_paces"), what.fields)
    return Section(f"{heading}: {runs[0]['data']}", commands, records, tables, pictures)


def of_others(folder: Path) -> Iterator[Section]:
    """What was measured, the short studies, and pictures of those without records in the folder.

    Args:
        folder: of the records.

    Yields:
        What there is.
    """
    for each in (*MEASURED, *STUDIES, *ALONE):
        command, picture = made({"speed": "bench"}.get(each.name, each.name)), folder / f"{each.name}.png"
        if records := each.known(folder):
            pictures = {drawn(each.picture(records), picture): each.title} if each.picture else {}
            yield Section(each.title, [command], records, [each.table(records)], pictures)
        elif picture.exists():
            yield Section(each.title, [command], [], [], {picture.name: each.title})


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
    options += [{"problem": name, "channels": size} for name in ("fashion", "cifar10") for size in (16, 32, 128)]
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
        parts += [f"## {section.title}", *(f"![{shown}]({name})" for name, shown in section.pictures.items())]
        parts += map(markdown, section.tables)
    return "\n\n".join(parts) + "\n"


def main(folder: Path = Path("results")) -> None:
    """Write the page of a folder there."""
    path = folder / "report.md"
    path.write_text(page(folder))
    print(f"Report: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    tyro.cli(main)
