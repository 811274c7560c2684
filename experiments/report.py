"""All that the experiments have found, on one page: the goals, every table and picture, and what was run where.

It trains nothing: it reads the records of a folder, draws the pictures anew, and writes `report.md` there.

    make report                                       (of results/)
    make report ARGS="--folder experiments/results"   (of the committed results)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from experiments import (
    autoencoder,
    control,
    crossover,
    defaults,
    demo,
    fidelity,
    figures,
    pinn,
    race,
    regression,
    speed,
    text,
    tune,
)
from experiments.figures import markdown, series, shares
from experiments.records import Records, grouped

OTHERS = (
    *(fidelity.SHOWN, speed.SHOWN, crossover.SHOWN, pinn.STUDY, regression.STUDY, text.STUDY),
    *(race.STUDY, race.MNIST, race.CURVES, race.FASHION, race.CIFAR10, control.STUDY, demo.STUDY),
    *(defaults.WITH_RATES, defaults.ELSEWHERE, defaults.WITHOUT),
)
PARTS: list[tuple[Any, ...]] = [*((study, tune.of(study)) for study in tune.LONG), *((each,) for each in OTHERS)]
"""What shares a part of the page: runs and their trials, or one experiment."""


def section(parts: tuple[Any, ...], folder: Path) -> tuple[tuple[str, ...], list[str]]:
    """What was run of some experiments, and their pictures and tables; none of these if the folder has nothing."""
    records: Records = []
    pictures, tables = [], []
    for each in parts:
        picture = figures.picture_of(each, folder)
        if found := each.known(folder):
            records += found
            tables.append(markdown(each.table(found)))
            if each.picture:
                figures.drawn(each.picture(found), picture)
        if picture.exists():
            pictures.append(f"![{each.title}]({picture.name})")
    commands = ", ".join(f"`{each.command or f'make {each.name}'}`" for each in parts[::-1])  # the trials come first
    return (parts[0].title, commands, f"{len(records)}", where(records)), pictures + tables


def where(records: Records) -> str:
    """The machines and versions of JAX that records are from."""
    found = sorted({f"{record['device']}, jax {record['jax']}" for record in records if "device" in record})
    before = any("device" not in record for record in records)
    return "; ".join(found + ["some before this was recorded" if found else "not recorded"] * before)


def goals(folder: Path) -> Table | None:
    """What this package wants to reach, and what was measured; None if there is nothing to say it from."""
    mnist = grouped(autoencoder.MNIST.known(folder))
    asked = [name for name in ours(mnist) if name in ("K-FAC", "K-FAC, adaptive", "K-BFGS", "K-BFGS(L)")]
    ends = {name: series(mnist[name])[:, 10].max() for name in asked}
    seconds, steps, right = won(race.MNIST, folder, 1), won(race.CURVES, folder, 0), won(race.FASHION, folder, 1)
    lines = (
        *goal("MNIST: tuned Adam's loss of epoch 10, in so much of its seconds", 0.2, seconds, ".2f"),
        *goal("MNIST: training loss of K-FAC or K-BFGS at epoch 10, with the worst seed", 62.0, ends, ".1f"),
        *goal("curves: off the plateau, in so much of tuned Adam's steps", 0.25, steps, ".2f"),
        *goal("Fashion-MNIST: 92 % right, nothing tuned, in so much of Adam's three epochs", 1.0, right, ".2f"),
    )
    headings = ("goal", "asked", "measured", "by", "reached")
    note = "By this package's methods, without SGD-m and Adam; the second line by tuned runs."
    return figures.table("", headings, lines, note, names=5) if lines else None


def won(study: Any, folder: Path, unit: int) -> dict[str, float]:
    """Steps (0) or seconds (1) of ours to the level of a race over Adam's: medians of the seeds."""
    runs, level = grouped(study.known(folder)), study.config["level"]
    names = ours(runs) if race.ADAM in runs else []
    return {name: float(np.median(shares(runs[name], runs[race.ADAM], level)[:, unit])) for name in names}


def ours(runs: Mapping[str, Records]) -> list[str]:
    """The runs of the methods of this package."""
    return [name for name in runs if name not in (*autoencoder.AUTHORS, "SGD-m", autoencoder.ADAM)]


def goal(text: str, asked: float, measured: Mapping[str, float], form: str) -> list[tuple[str, ...]]:
    """A line for a goal that the least of some numbers is no more than what was asked; none without any."""
    if not measured:
        return []
    best = min(measured, key=measured.__getitem__)
    reached = "yes" if measured[best] <= asked else "no"
    return [(text, f"{asked:g}", f"{measured[best]:{form}}", best, reached)]


def page(folder: Path) -> str:
    """The page, as Markdown; a `ValueError` if the folder has no records."""
    sections = [found for parts in PARTS if (found := section(parts, folder))[1]]
    if not sections:
        raise ValueError(f"{folder} has no records; `make` lists the experiments that write some, or name a --folder.")
    headings = ("part", "made by", "records", "run on")
    overview = figures.table("What was run where", headings, [line for line, _ in sections], names=4)
    asked = goals(folder)
    parts = ["# Results", "Written by `make report` from the records in this folder.", markdown(overview)]
    parts += ["## Goals", markdown(asked)] if asked else []
    for (title, *_), shown in sections:
        parts += [f"## {title}", *shown]
    return "\n\n".join(parts) + "\n"


def main(folder: Path = Path("results")) -> None:
    """Write the page of a folder there."""
    path = folder / "report.md"
    path.write_text(page(folder))
    print(f"Report: {path}")


if __name__ == "__main__":
    figures.asked(main)
