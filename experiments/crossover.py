"""From which width of a layer, and up to which batch, is TENGraD cheaper than K-FAC?

One dense layer with as many inputs I as outputs O, a batch of N examples, noise. At every step K-FAC multiplies the
gradient by two inverses, 2 I O (I + O) flops; TENGraD meets it with the N examples of its last refresh and comes back,
4 N I O flops. So its step should be the cheaper one where N < (I + O) / 2, the line in the picture. What it keeps grows
with N (I + O) + N^2, for K-FAC with 4 I^2; a refresh with N^2 (I + O) and N^3, for K-FAC with N I^2 and I^3.

Measured, as TENGraD over K-FAC, the median of a few ratios: (a) a step that is due for neither statistics nor a
refresh, (b) both without the step, (c) the bytes of the state. Expected: (a) crosses one near the line, (b) above it.

    make crossover                                  (some two minutes)
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng
from experiments import figures
from experiments.methods import periods
from experiments.records import Records, significant

WIDTHS, BATCHES = (128, 256, 512, 1024, 2048), (64, 128, 256, 512, 1024)
ROUNDS, LEAST, NEVER = 5, 10.0, 1_000_000
"""How often both are timed in turn, milliseconds of steps between two looks at the clock, steps between refreshes."""
METHODS: dict[str, Callable[..., Any]] = {
    "TENGraD": partial(ng.scale_by_tengrad, damping=0.1),
    "K-FAC": partial(ng.scale_by_kfac, damping=0.1, early_refresh=False),
}
RATIOS = {"step": "a step", "refresh": "statistics and a refresh", "state": "bytes of the state"}


class Bench:
    """One method on one layer: steps without a refresh, refreshes without a step, and its state."""

    def __init__(self, name: str, width: int, batch: int):
        """Compile, and do each once."""
        a, g = jax.random.normal(jax.random.key(0), (2, batch, width))
        model = nn.Dense(width, use_bias=False)
        variables = model.init(jax.random.key(0), a)
        layers = ng.linen.capture(model, ng.losses.squared_error).layers(variables, a)
        ((layer, _),) = layers.items()
        evidence = {layer: ng.Evidence(inputs=(a,), cotangents=(g[None],), gradient={"kernel": (a.T @ g)[None]})}
        self._fixed = {"kernel": a.T @ g / batch}, evidence
        self.state: Any = METHODS[name](layers).init(variables["params"])

        def compiled(every: int, wanted: slice) -> Callable[..., Any]:
            tx = METHODS[name](layers, **periods(METHODS[name], every, every))
            step = jax.jit(lambda state, grad, found: tx.update(grad, state, curvature=found)[wanted], donate_argnums=0)
            return step.lower(self.state, *self._fixed).compile()

        self._programs = {
            "step": compiled(NEVER, slice(0, 2)),
            "refresh": compiled(1, slice(1, 2)),  # the state alone: what only the update needs is not computed
        }
        self.time("refresh")
        self.time("step")

    def time(self, what: str, count: int = 1) -> float:
        """Milliseconds of a step that is due for nothing, or of statistics and a refresh, of so many."""
        before, found = time.perf_counter(), ()
        for _ in range(count):
            *found, self.state = self._programs[what](self.state, *self._fixed)
        jax.block_until_ready((found, self.state))
        return 1000 * (time.perf_counter() - before) / count


def cell(width: int, batch: int) -> dict[str, Any]:
    """One width and one batch: medians of both methods in turn."""
    benches = [Bench(name, width, batch) for name in METHODS]
    counts = [int(np.clip(np.ceil(LEAST / bench.time("step")), 1, 100)) for bench in benches]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(bench.state)) for bench in benches]
    found: dict[str, Any] = {"pair": [*METHODS], "width": width, "batch": batch, "bytes": sizes}
    for name, often in {"step": counts, "refresh": (1, 1)}.items():
        rounds = [[bench.time(name, n) for bench, n in zip(benches, often, strict=True)] for _ in range(ROUNDS)]
        found[f"{name}_ms"] = [significant(number, 4) for number in np.median(rounds, axis=0)]
        found[name] = significant(np.median([mine / other for mine, other in rounds]), 4)
    return found | {"state": significant(sizes[0] / sizes[1], 4)}


def table(records: Records) -> Table:
    """The three ratios, and what they are ratios of."""
    (first, second), rows = records[0]["pair"], []
    for record in records:
        width, batch = record["width"], record["batch"]
        pairs = zip(RATIOS, (record["step_ms"], record["refresh_ms"], np.divide(record["bytes"], 1e6)), strict=True)
        cells = (f"{record[name]:.2f} ({one:.3g} / {other:.3g})" for name, (one, other) in pairs)
        rows.append((f"{width}", f"{batch}", f"{batch / width:g}", *cells))
    return figures.table(
        f"{first} over {second}, one dense layer",
        ("I = O", "N", "N / ((I + O) / 2)", *RATIOS.values()),
        rows,
        f"In brackets: {first} / {second}, in milliseconds and megabytes.",
        names=0,
    )


def picture(records: Records) -> Figure:
    """The three ratios as maps over width and batch, with the line N = (I + O) / 2."""
    figure, axes = figures.panels(1, 3, figsize=(13, 4.4), sharey=True)
    sides, counts = ([*dict.fromkeys(record[name] for record in records)] for name in ("width", "batch"))
    widths, batches = np.log2(sides), np.log2(counts)
    for axis, (name, title) in zip(axes[0], RATIOS.items(), strict=True):
        values = np.array([record[name] for record in records]).reshape(len(widths), len(batches)).T
        mesh = axis.pcolormesh(widths, batches, np.log2(values), cmap="RdBu_r", vmin=-5, vmax=5, shading="nearest")
        for (row, column), value in np.ndenumerate(values):
            place = (widths[column], batches[row])
            halo = [withStroke(linewidth=4, foreground=mesh.to_rgba(np.log2(value)))]  # the line passes behind
            color = "white" if abs(np.log2(value)) > 3.3 else "black"
            axis.annotate(f"{value:.2g}", place, ha="center", va="center", color=color, path_effects=halo)
        limits = axis.axis()
        axis.plot(widths, widths, "k--", linewidth=1.5)
        axis.axis(limits)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xticks(widths, sides)
        axis.set_yticks(batches, counts)
        axis.set_xlabel("width of the layer, I = O")
    axes[0, 0].set_ylabel("batch, N")
    first, second = records[0]["pair"]
    figure.suptitle(f"{first} over {second} (blue: {first} has less; dashed: N = (I + O) / 2)", x=0.01, ha="left")
    return figure


SHOWN = figures.Shown("crossover", "When TENGraD is cheaper", table, picture)


if __name__ == "__main__":
    SHOWN.main(lambda: [cell(*each) for each in track([*product(WIDTHS, BATCHES)], "measuring")])
