"""Numbers of several seeds for reading, and tables as Markdown."""

from collections.abc import Iterable

import numpy as np
from rich.table import Table

from experiments.records import Records


def by_seed(seeds: list[Records], entry: str) -> np.ndarray:
    """An entry of the records of a run by seed [seeds, epochs + 1]; infinite where it has diverged."""
    return np.array([[np.inf if record[entry] is None else record[entry] for record in records] for records in seeds])


def spread(numbers: np.ndarray, digits: int) -> str:
    """The median of numbers [seeds], with their range if there are several; those that are not finite are counted."""
    there = numbers[np.isfinite(numbers)]
    if not len(there):
        return "-"
    text = f"{np.median(there):.{digits}f}"
    if len(there) > 1:
        text += f" [{there.min():.{digits}f}, {there.max():.{digits}f}]"
    return text if len(there) == len(numbers) else f"{text}, {len(numbers) - len(there)} of {len(numbers)} diverged"


def markdown(table: Table) -> str:
    """A table as Markdown: the title above it, the caption below."""
    sides = {"left": "---", "right": "---:"}
    lines = [
        _line(str(column.header) for column in table.columns),
        _line(sides.get(column.justify, "---") for column in table.columns),
        *(map(_line, zip(*(map(str, column.cells) for column in table.columns), strict=True))),
    ]
    parts = (f"**{table.title}**" if table.title else "", "\n".join(lines), str(table.caption or ""))
    return "\n\n".join(part for part in parts if part)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
