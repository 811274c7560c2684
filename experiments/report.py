"""Tables and pictures of trials and of runs, from their records.

A record of a trial has the loss and the accuracy at its end, one of a run those after an epoch; see `classify`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments.records import Records
from experiments.training import Pace, Setting


def trials_table(trials: Records) -> Table:
    """The best of the trials of every method, for every strength of the clip."""
    result = Table(
        title=f"Trials: training loss of {trials[0]['images']} images after {trials[0]['epochs']} epoch(s)",
        caption="best: learning rate, damping; *: at an edge of what was tried.",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("kl_clip", "best", "loss", "accuracy, %", "median loss", "diverged", "trials"):
        result.add_column(heading, justify="right")
    groups: dict[tuple[str, float], Records] = {}
    for record in trials:
        groups.setdefault((record["name"], record["kl_clip"]), []).append(record)
    for (name, clip), records in groups.items():
        losses = [np.inf if record["loss"] is None else record["loss"] for record in records]
        record = records[int(np.argmin(losses))]
        cells = (f"{min(losses):.4f}", f"{100 * record['accuracy']:.2f}", f"{np.median(losses):.4f}")
        result.add_row(
            name, f"{clip:g}", starred(record, records), *cells, f"{np.isinf(losses).sum()}", f"{len(records)}"
        )
    return result


def starred(record: Mapping[str, Any], records: Records) -> str:
    """The setting of a trial; with a star if a number of it is the least or the largest that was tried."""
    edges = []
    for number in ("rate", "damping"):
        values = [other[number] for other in records]
        edges.append(min(values) < max(values) and record[number] in (min(values), max(values)))
    return f"{Setting(record['rate'], record['damping'])}{'*' if any(edges) else ''}"


def runs_table(runs: Mapping[str, Records], pace: Pace, title: str) -> Table:
    """Loss and accuracy after some epochs, and what an epoch costs."""
    last = min(len(rows) for rows in runs.values()) - 1
    epochs = sorted({epoch for epoch in (1, 2, 3, 5, 10, 20, last) if epoch <= last})
    result = Table(
        title=f"Training loss, and test accuracy in %; {title}",
        caption="A step over SGD-m's: all methods in turn in one process, after the first refresh period. The seconds "
        "are of all epochs at that cost.",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for heading in ("rate, damping", *(f"epoch {epoch}" for epoch in epochs), "a step / SGD-m's", "s"):
        result.add_column(heading, justify="right")
    for name, rows in runs.items():
        shown = (rows[epoch] for epoch in epochs)
        cells = (
            f"{np.nan if row['train_loss'] is None else row['train_loss']:.4f}  {100 * row['test_accuracy']:.2f}"
            for row in shown
        )
        seconds = f"{_seconds(name, last, rows, pace):.0f}"
        setting = str(Setting(rows[0]["rate"], rows[0]["damping"]))
        result.add_row(name, setting, *cells, f"{pace.later[name]:.2f}", seconds)
    return result


def runs_picture(runs: Mapping[str, Records], pace: Pace, title: str, order: Sequence[str]) -> Figure:
    """Training loss and test accuracy, against epochs and against seconds; in thin lines the losses of batches.

    Runs that stay below half of the best accuracy are below the axis, so that the others can be told apart.

    Args:
        runs: name -> records, of the start and of every epoch.
        pace: what a step costs.
        title: of the picture.
        order: names of all methods; a method has its color from its place there.

    Returns:
        The picture.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained")
    for name, rows in runs.items():
        color = f"C{order.index(name)}"
        epochs = np.array([row["epoch"] for row in rows])
        parts = [(row["epoch"] - 1, np.array(row["batch_losses"], float)) for row in rows[1:]]
        middles = np.concatenate([first + (np.arange(len(part)) + 0.5) / len(part) for first, part in parts])
        losses = np.concatenate([part for _, part in parts])
        for column, clock in enumerate((
            lambda epoch: epoch,
            np.vectorize(lambda epoch, name=name, rows=rows: _seconds(name, epoch, rows, pace)),
        )):
            style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.6, "label": name}
            upper, lower = axes[:, column]
            upper.plot(clock(middles), losses, color=color, linewidth=0.8, alpha=0.6)
            upper.plot(clock(epochs[1:]), np.array([row["train_loss"] for row in rows[1:]], float), **style)
            lower.plot(clock(epochs[1:]), [100 * row["test_accuracy"] for row in rows[1:]], **style)
    for axis in axes.flat:
        axis.grid(alpha=0.2, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(yscale="log", ylabel="training loss, nats an image")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("{x:g}")
    reached = np.array([100 * row["test_accuracy"] for rows in runs.values() for row in rows[1:]])
    above = reached[reached >= reached.max() / 2]
    lowest = above.min() - 0.1 * (above.max() - above.min()) - 0.1
    axes[1, 0].set(ylabel="test accuracy, %", xlabel="epochs", ylim=(lowest, None))
    axes[1, 1].set(xlabel="seconds on the idle machine (see the experiment)")
    axes[0, 0].set_title(title, loc="left", fontweight="bold")
    axes[0, 1].legend(frameon=False, fontsize=9)
    return figure


def _seconds(name: str, epochs: float, rows: Records, pace: Pace) -> float:
    """Of so many epochs of a run, by the cost of its steps."""
    return pace.seconds(name, epochs * (rows[0]["images"] // rows[0]["batch"]), rows[0]["periods"][0])
