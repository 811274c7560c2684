"""Which learning rate and damping are best for each method on a problem, if all have the same number of trials?

A trial is a short run from the same start on the same batches; the one with the least training loss at its end is the
best. Every method tries its usual numbers, and as many more within the ranges of `methods`. `make autoencoder` and
`make classify` take the best that is kept, and make trials where there are none.

Expected: with six trials every method within a tenth of its best loss, but for those whose stable settings are a narrow
diagonal (of K-FAC and its relatives the step is the learning rate over the damping), where half the trials diverge.

    make tune                                        (MNIST; some 40 minutes on two cores)
    make tune ARGS="--problems 'fashion, 16 channels' --trial 400"
"""

from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.table import Table

from experiments import autoencoder, classify, figures, study
from experiments.figures import ends, setting
from experiments.records import Records, grouped

LONG = (*autoencoder.STUDIES, *classify.STUDIES)


def table(rows: Records, title: str) -> Table:
    """The best numbers of every method, and how the others did."""
    lines = []
    for name, own in grouped(rows).items():
        losses = ends(own)
        best = starred(int(np.argmin(losses)), own) if np.isfinite(losses.min()) else "-"
        least, median = (f"{loss:.5g}" if np.isfinite(loss) else "-" for loss in (losses.min(), np.median(losses)))
        lines.append((name, best, least, median, f"{np.isinf(losses).sum()}", f"{len(own)}"))
    return figures.table(
        f"Training loss after {rows[0]['steps'][-1]} steps of trials; {title}",
        ("method", "best", "loss", "median loss", "diverged", "trials"),
        lines,
        "best: learning rate, damping; *: at an edge of what was tried.",
    )


def starred(index: int, rows: Records) -> str:
    """The numbers of a trial; with a star if one of them is the least or the largest that was tried."""
    chosen = rows[index]["numbers"]
    tried = ((chosen[name], [row["numbers"][name] for row in rows]) for name in chosen)
    is_edge = any(min(each) < max(each) and number in (min(each), max(each)) for number, each in tried)
    return setting(chosen) + "*" * is_edge


def picture(rows: Records, title: str) -> Figure:
    """Loss against learning rate, a panel for each tuned method; the color is the damping, a cross a diverged trial."""
    runs = {name: own for name, own in grouped(rows).items() if own[0]["numbers"]}
    columns = min(5, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = figures.panels(
        lines, columns, sharey=True, figsize=(max(6.5, 0.6 + 2.5 * columns), 0.8 + 2.1 * lines)
    )
    highest = max(row["losses"][-1] or 0.0 for row in rows)
    for axis, (name, own) in zip(axes.flat, runs.items(), strict=False):
        rates, dampings = (np.array([row["numbers"][entry] for row in own]) for entry in ("rate", "damping"))
        losses = ends(own)
        depth = np.log(dampings / dampings.min()) if dampings.min() < dampings.max() else np.zeros(len(own))
        good = np.isfinite(losses)
        for these, heights, marker in ((good, losses, "o"), (~good, np.full(len(own), highest), "x")):
            shades = {"c": depth[these], "cmap": "viridis", "vmin": 0, "vmax": max(depth.max(), 1)}
            axis.scatter(rates[these], heights[these], 36, marker=marker, **shades)
        if good.any():
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black"}
            axis.plot(rates[np.argmin(losses)], losses.min(), "o", **ring)
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.set(xscale="log", yscale="log")
        for scale, ticks in ((axis.xaxis, (1, 3)), (axis.yaxis, (1, 2, 3, 5, 7))):
            scale.set_major_locator(LogLocator(subs=ticks))
            figures.plain(scale, "")
        axis.tick_params(which="both", labelsize=8)
    figures.clean(axes.flat, which="both")
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    label = "learning rate (violet to yellow: small to large damping; cross: diverged; ring: best)"
    figure.supxlabel(label, fontsize=10)
    figure.supylabel("training loss of a trial", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def of(whole: study.Study) -> study.Study:
    """The trials of a study alone; they have its records."""
    (label,) = whole.cases
    return whole._replace(
        title=f"{whole.title}, trials",
        entries={name: entry for name, entry in whole.entries.items() if name not in autoencoder.AUTHORS},
        seeds=(),
        table=partial(table, title=whole.title),
        picture=partial(picture, title=whole.title),
        command="make tune" if label == "mnist" else f"make tune ARGS=\"--problems '{label}'\"",
        image=f"{whole.name}_trials",
    )


if __name__ == "__main__":
    study.main(*map(of, LONG), problems=("mnist",))
