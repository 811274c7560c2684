"""Tables and pictures of the experiments: cells, Markdown, curves against steps and seconds."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.records import Records, grouped, keep, kept


class Shown(NamedTuple):
    """What was measured, as a part of the report, with its title; `study.Study` is another one.

    The name is that of its records, of which it shows a selection, and of its picture; the command makes the records,
    if it is not `make` and the name.
    """

    name: str
    title: str
    table: Callable[[Records], Table]
    picture: Callable[[Records], Figure]
    select: Callable[[Records], Records] = list
    command: str = ""

    def known(self, folder: Path) -> Records:
        """Its records in a folder."""
        return self.select(kept(folder / f"{self.name}.jsonl"))

    def main(self, measure: Callable[[], Records]) -> None:
        """Measure, keep the records in the place of older ones, present them, in the folder that is asked for."""

        def run(output: Path = Path("results")) -> None:
            records = measure()
            keep(output / f"{self.name}.jsonl", records, afresh=True)
            present(self, records, output)

        asked(run)


def table(
    title: str, headings: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "", names: int = 1
) -> Table:
    """A table whose first columns are names; a line where the first of several changes."""
    result, before = Table(title=title, caption=caption, caption_justify="left"), None
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="left" if index < names else "right", no_wrap=index < names)
    for first, *others in rows:
        if names > 1 and before not in (None, first):
            result.add_section()
        before = first
        result.add_row(first, *others)
    return result


def pivot(
    rows: Records, lines: Sequence[str], column: Callable[[Any], str], cell: Callable[[Records], str], **options: Any
) -> Table:
    """A table with a line for each value of some entries, and a column for each kind of rows.

    Row -> heading of its column, the rows of a cell -> its text, a dash where there are none; the options are `title`,
    `headings` of the lines, and those of `table`.
    """
    cells = grouped([row | {"heading": column(row)} for row in rows], *lines, "heading")
    names, columns = dict.fromkeys(key[:-1] for key in cells), dict.fromkeys(key[-1] for key in cells)
    wanted = {name: [cells.get((*name, heading)) for heading in columns] for name in names}
    texts = [(*map(str, name), *(cell(own) if own else "-" for own in line)) for name, line in wanted.items()]
    headings = (*options.pop("headings"), *columns)
    return table(options.pop("title"), headings, texts, names=len(lines), **options)


def spread(values: np.ndarray, digits: int) -> str:
    """The median of numbers [seeds], with their range if there are several; those that are not finite are counted."""
    there = values[np.isfinite(values)]
    if not len(there):
        return "-"
    text = f"{np.median(there):.{digits}f}"
    if len(there) > 1:
        text += f" [{there.min():.{digits}f}, {there.max():.{digits}f}]"
    return text if len(there) == len(values) else f"{text}, {len(values) - len(there)} of {len(values)} diverged"


def shown(number: float | None) -> str:
    """A number with three digits; a dash if there is none."""
    if number is None or not np.isfinite(number):
        return "-"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def markdown(table: Table) -> str:
    """A table as Markdown: the title above it, the caption below."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    lines = [
        line(column.header for column in table.columns),
        line("---:" if column.justify == "right" else "---" for column in table.columns),
        *map(line, zip(*(column.cells for column in table.columns), strict=True)),
    ]
    parts = (f"**{table.title}**" if table.title else "", "\n".join(lines), str(table.caption or ""))
    return "\n\n".join(part for part in parts if part)


def present(part: Any, rows: Records, folder: Path) -> None:
    """Print the table of a part of the report, and write its picture."""
    Console(width=170).print(part.table(rows))
    if part.picture:
        print(f"Picture: {drawn(part.picture(rows), picture_of(part, folder))}")


def drawn(figure: Figure, path: Path) -> Path:
    """Write a picture in 256 colors, which takes two thirds of its bytes away and cannot be seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def picture_of(part: Any, folder: Path) -> Path:
    """Where the picture of a part of the report is."""
    return folder / f"{getattr(part, 'image', '') or part.name}.png"


def asked(what: Any, **options: Any) -> Any:
    """What the command line makes of a type or a function; `--help` begins with the question of the file that runs."""
    text = sys.modules["__main__"].__doc__ or ""
    return tyro.cli(what, description=text.partition("\n")[0], **options)


def panels(rows: int, columns: int, figsize: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of panels [rows, columns], which no window shows."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def clean(axes: Iterable[Axes], alpha: float = 0.2, **grid: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    for axis in axes:
        axis.grid(alpha=alpha, **grid)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def plain(axis: Any, minor: str = "{x:g}") -> None:
    """Numbers without powers of ten on the x or y axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(minor)


def middle(runs: Records) -> dict[str, Any]:
    """The run whose last loss is the median."""
    return runs[int(np.argsort(ends(runs), kind="stable")[len(runs) // 2])]


def curves(
    rows: Records,
    label: str,
    *,
    across: str = "log",
    up: str = "log",
    levels: Sequence[float] = (),
    rivals: Sequence[str] = (),
    units: tuple[str, str] = ("seconds of training", "steps"),
) -> Figure:
    """Losses against seconds and steps, a row of panels for each problem: every run thin, the middle one thick.

    Dotted is the last of the `goals` by levels or rivals.
    """
    problems, before = grouped(rows, "problem"), []
    figure, axes = panels(len(problems), 2, figsize=(11, 0.8 + 3.6 * len(problems)), sharey="row")
    first = int(across == "log")  # there is no step 0
    for pair, (problem, some) in zip(axes, problems.items(), strict=True):
        methods = grouped(some)
        for index, (name, runs) in enumerate(methods.items()):
            for run in runs:
                style = {"color": f"C{index % 10}", "linestyle": "--" if index >= 10 else "-"}
                thick = {"linewidth": 1.8, "label": name} if run is middle(runs) else {"linewidth": 0.6, "alpha": 0.5}
                losses = np.array(run["losses"][first:], float)  # nan where there is none
                for axis, unit in zip(pair, ("seconds", "steps"), strict=True):
                    axis.plot(run[unit][first:], losses, **style, **thick)
        for axis, unit in zip(pair, units, strict=True):
            axis.set(xscale=across, yscale=up, xlabel=unit)
            plain(axis.xaxis, "")
            for goal in goals(methods, levels, rivals)[-1:]:
                axis.axhline(goal, color="grey", linewidth=0.8, linestyle=":", zorder=0)
        low, high = pair[0].get_ylim()
        if up == "log" and high < 15 * low:
            plain(pair[0].yaxis)
        pair[0].set_ylabel(label)
        pair[0].set_title(problem, loc="left", fontweight="bold")
        if [*methods] != before:
            pair[1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        before = [*methods]
    clean(axes.flat)
    return figure


def of_epochs(rows: Records, label: str) -> Figure:
    """Losses against seconds and epochs, the looks of long runs, but for the first."""
    rows = [row | {"steps": [*range(len(row["steps"]))]} for row in rows]
    rows = [row | {name: row[name][1:] for name in ("steps", "seconds", "losses")} for row in rows]
    figure = curves(rows, label, across="linear", units=("seconds", "epochs"))
    for axis in figure.axes:
        plain(axis.yaxis)
    return figure


def ends(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The last losses of runs; infinite of those that diverged."""
    return np.array([np.inf if run["losses"][-1] is None else run["losses"][-1] for run in runs])


def last(rows: Records, title: str, caption: str, form: str = ".2g") -> Table:
    """A table of the last losses of methods and, in brackets, their steps, by problems: medians.

    The title may name numbers of the config, as "{seconds:g}".
    """

    def cell(runs: Records) -> str:
        return f"{np.median(ends(runs)):{form}} ({np.median([run['steps'][-1] for run in runs]):.0f})"

    options: Any = {"title": title.format(**rows[0]["config"]), "headings": ["method"], "caption": caption}
    return pivot(rows, ["name"], lambda row: row["problem"], cell, **options)


def series(runs: Records, entry: str = "losses") -> np.ndarray:
    """An entry of runs at every look [seeds, looks]; infinite where a run has diverged, and after."""
    found = np.full((len(runs), max(len(run["steps"]) for run in runs)), np.inf)
    for line, run in zip(found, runs, strict=True):
        line[: len(run[entry])] = [np.inf if number is None else number for number in run[entry]]
    return found


def seconds(runs: Records) -> np.ndarray:
    """Until every look, medians of the runs that came there."""
    found = series(runs, "seconds")
    return np.nanmedian(np.where(np.isfinite(found), found, np.nan), axis=0)


def costs(runs: Mapping[str, Records], baseline: str) -> dict[str, str]:
    """What a step of every method takes after the first look, in units of a baseline's; dashes if that did not run."""

    def taken(run: dict[str, Any], entry: str) -> float:
        return run[entry][-1] - run[entry][min(1, len(run["steps"]) - 2)]  # from 0 if there is one look alone

    def cost(own: Records) -> float:
        most = max(len(run["steps"]) for run in own)
        whole = [run for run in own if len(run["steps"]) == most]  # without those that diverged, if others did not
        return float(np.median([taken(run, "seconds") / taken(run, "steps") for run in whole]))

    unit = cost(runs[baseline]) if baseline in runs else np.nan
    return {name: f"{cost(own) / unit:.2f}" if baseline in runs else "-" for name, own in runs.items()}


def epochs_of(runs: Records, *epochs: int) -> list[int]:
    """Those of some looks that there are, and the last."""
    last = max(len(run["steps"]) for run in runs) - 1
    return [epoch for epoch in epochs if epoch < last] + [last]


def setting(numbers: Mapping[str, float]) -> str:
    """What was chosen, for people."""
    return ", ".join(f"{number:g}" for number in numbers.values() if number) or "its own"


def reached(row: Mapping[str, Any], level: float) -> tuple[float, float]:
    """Steps and seconds at which a run is first at a loss; infinite if never."""
    looks = zip(row["losses"], row["steps"], row["seconds"], strict=True)
    found = ((steps, seconds) for loss, steps, seconds in looks if loss is not None and loss <= level)
    return next(found, (np.inf, np.inf))


def goals(runs: Mapping[str, Records], levels: Sequence[float], rivals: Sequence[str]) -> Sequence[float]:
    """Some levels of the loss; without any the one where the first of the rivals that ran ends, if one did."""
    return levels or [float(np.median(ends(runs[name]))) for name in rivals if name in runs][:1]


def outcome(rows: Records, title: str, rivals: Sequence[str], levels: Sequence[float] = (), note: str = "") -> Table:
    """Where methods end, when they reach some levels, and the seconds to the last level over those of rivals.

    Rivals that did not run are left out. Without levels there is one, where the first rival ends. The note is below.
    """
    lines, heads = [], [f"to {level:g}" for level in levels] or [f"to {rivals[0]}'s end"]
    there = [name for name in rivals if any(row["name"] == name for row in rows)]
    for problem, some in grouped(rows, "problem").items():
        runs = grouped(some)
        wanted = goals(runs, levels, rivals) or [np.nan]
        for own in runs.values():
            cells = []
            for goal in wanted:
                steps, seconds = np.median([reached(row, goal) for row in own], axis=0)
                cells.append(f"{steps:.0f} / {seconds:.3g} s" if np.isfinite(steps) else "-")
            cells += [ratio(own, runs[name], wanted[-1]) for name in there if name in runs]
            pace = np.median([1000 * row["seconds"][-1] / (row["steps"][-1] or np.nan) for row in own])
            chosen = (f"{name} {number:g}" for name, number in own[0]["numbers"].items())
            name = ", ".join([own[0]["name"], *chosen])
            lines.append((problem, name, f"{np.median(ends(own)):.4g}", shown(pace), *cells))
    headings = ("problem", "method", "loss", "ms / step", *heads, *(f"x {name}" for name in there))
    caption = (
        "Medians. To a loss: steps / seconds of training, all methods in turn in one process, without compilation. The "
        "last columns: seconds to the last loss over those of another, their range over the runs in brackets; < if it "
        "did not get there. "
    )
    return table(title, headings, lines, (caption + note).strip(), names=2)


def ratio(mine: Records, rival: Records, level: float) -> str:
    """Seconds to a loss over those of a rival from the same seeds; "<" if the rival did not get there."""
    if len(mine) != len(rival) or not np.all(np.isfinite(found := shares(mine, rival, level)[:, 1])):
        return "-"
    spread = f" ({found.min():.2f}-{found.max():.2f})" if len(found) > 1 else ""
    return "<" * any(np.isinf(reached(row, level)[1]) for row in rival) + f"{np.median(found):.2f}" + spread


def shares(mine: Records, rival: Records, level: float) -> np.ndarray:
    """Steps and seconds to a loss over those of a rival from the same seeds, or over all that it had: [seeds, 2]."""
    own, its = (np.array([reached(row, level) for row in rows]) for rows in (mine, rival))
    with np.errstate(divide="ignore", invalid="ignore"):  # a rival may begin at the level
        return own / np.minimum(its, [(row["steps"][-1], row["seconds"][-1]) for row in rival])
