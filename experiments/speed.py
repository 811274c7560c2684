"""What do a step, its compilation and its memory cost, in units of Adam's on the same model?

Three models: the MNIST autoencoder of the papers (784-1000-500-250-30-250-500-1000-784, ReLU, batch 500), a small
convolutional network (16, 32 and 64 channels, strides 1, 2 and 2, dense head, 28 x 28, batch 128), and, where it is
asked for, a transformer (4 layers of 256, vocabulary 8,192, context 128, 8 sequences). The inputs are noise: a step
costs the same on noise. Every method of the package, SGD with momentum and, where it can be imported (its release wants
jax <= 0.9.1), kfac-jax with fixed settings; each with statistics at every step and a refresh at every 10th, and with
statistics at every 10th and a refresh at every 100th. What EKFAC, TEKFAC and SOAP measure in their basis goes with the
statistics; TENGraD takes its statistics where it refreshes, K-BFGS refreshes nothing. "rank" is `rank="auto"`.

Each method is made, measured and dropped in one process with an Adam of its own, and all figures are over this Adam's,
so that a busy machine spoils both alike:

    step      median over rounds of the time of a block of steps over that of Adam's block just before it. A block
              holds whole periods. What comes with the first step alone is not in it.
    compile   seconds of tracing, lowering and compiling the jitted step, with JAX's caches empty. A refresh and
              statistics are branches of that one program.
    held      bytes of the parameters and of the optimizer's state, which stay between the steps.
    peak      bytes that the compiled step needs at once by XLA's account: arguments, outputs and scratch, less what an
              output takes over from an argument. The branches share their scratch, so it is that of the dearest,
              whether or not a step takes it. LAPACK's own workspace on a CPU is not in it.
    p95       of single steps over two periods, the 95th percentile over the median: what a refresh costs the step that
              has it. Each of them waits for its end.
    program   lines of the compiled program, in XLA's text.

Of kfac-jax, which owns its loop and its programs, only step and held.

Expected: by flop count 2.2 x Adam's step for K-FAC on the autoencoder with statistics every 10 and inverses every 100
steps, and more for the methods with an eigenbasis or a root. Adam holds three arrays of the size of the parameters.
K-FAC holds two, parameters and momentum, and two pairs of factors: for a layer of I x O, 2 (I^2 + O^2) / (I O) times
its weights, which is 4 where it is square and 600 for the head of the convnet, 3136 x 10. To compile, a program with
branches for statistics and refreshes takes several times as long as Adam's.

glibc returns blocks above 32 MB to the system at once, so a step whose scratch memory is larger than that faults it in
again page by page, which takes more than half of Adam's time on these models. `make bench` sets the variables that
keep it.

    make bench                                        (some 20 minutes)
    make bench ARGS="--models cnn --methods K-FAC SOAP"
    make bench ARGS="--smoke"

A record is kept as soon as a method is measured; table and picture show the newest of each that this machine made.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.records import Records, finite, keep, kept, machine
from experiments.stepping import ADAM, METHODS, MODELS, Method, Peer, Problem, Runner, problem
from experiments.training import Setting


@dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
        output: folder of the records and of the picture.
        models: "autoencoder", "cnn", "transformer", or "tiny", a dense net of a few units.
        methods: names as in the table or as in the package; none for all. Adam is always measured.
        rounds: pairs of blocks, Adam's and the method's.
        block: least steps of a block.
        damping: of the methods that do not adapt it.
        learning_rate: so small that the parameters stay where they are.
        seed: of the parameters and of the noise.
        smoke: two methods on the tiny net, to see that everything runs.
    """

    output: Path = Path("results")
    models: tuple[str, ...] = ("autoencoder", "cnn")
    methods: tuple[str, ...] = ()
    rounds: int = 3
    block: int = 20
    damping: float = 1.0
    learning_rate: float = 1e-6
    seed: int = 0
    smoke: bool = False


def measure(name: str, given: Problem, method: Method, config: Config) -> dict[str, Any]:
    """One method on one model, and an Adam in turn with it.

    Args:
        name: of the model.
        given: the model.
        method: to measure.
        config: the numbers.

    Returns:
        A record: what was measured, with units, and its ratios to Adam's without; None for what could not be.
    """
    setting = Setting(config.learning_rate, config.damping)
    base = Runner(ADAM, given, setting)
    runner = base if method is ADAM else (Runner if method.make else Peer)(method, given, setting)
    steps = config.block + -config.block % method.period
    mine, adams = [], []
    for _ in range(config.rounds):
        adams.append(base.block(config.block) / config.block)
        mine.append(adams[-1] if runner is base else runner.block(steps) / steps)
    ratios = [one / other for one, other in zip(mine, adams, strict=True)]

    def over(one: float | None, other: float | None) -> float | None:
        return finite(one / other, 3) if one and other else None

    singles = sorted(runner.block(1) for _ in range(max(40, 2 * method.period)))
    return {
        "model": name,
        "method": method.name,
        "statistics_every": method.statistics_every,
        "refresh_every": method.refresh_every,
        **machine(),
        "milliseconds": finite(1000 * statistics.median(mine), 3),
        "step": finite(statistics.median(ratios), 3),
        "least": finite(min(ratios), 3),
        "most": finite(max(ratios), 3),
        "compile_seconds": runner.seconds and finite(runner.seconds, 3),
        "compile": over(runner.seconds, base.seconds),
        "held_bytes": runner.held,
        "held": over(runner.held, base.held),
        "peak_bytes": runner.peak,
        "peak": over(runner.peak, base.peak),
        "p95": over(float(np.percentile(singles, 95)), statistics.median(singles)),
        "program_lines": runner.lines,
        "program": over(runner.lines, base.lines),
    }


def run(config: Config) -> Records:
    """Measure every method that is asked for on every model, and keep the records.

    Args:
        config: every number.

    Returns:
        The newest records that this machine made of these models, in the order of the methods.

    Raises:
        ValueError: if there is no model or no method of a name.
    """
    names = {name for method in METHODS for name in (method.name, method.of)}
    for asked, there in ((config.models, set(MODELS)), (config.methods, names)):
        if unknown := set(asked) - there:
            raise ValueError(f"There is no {sorted(unknown)}; there are {sorted(there)}.")
    wanted = [
        method
        for method in METHODS
        if not config.methods or method is ADAM or {method.name, method.of} & set(config.methods)
    ]
    path = config.output / "speed.jsonl"
    Runner(ADAM, problem("tiny", config.seed), Setting(0.0))  # a process loads the compiler with its first program
    problems = {name: problem(name, config.seed) for name in config.models}
    for name, method in track([(name, method) for name in problems for method in wanted], "measuring"):
        keep(path, [measure(name, problems[name], method, config)])
    return [record for record in newest(kept(path, machine())) if record["model"] in config.models]


def newest(records: Records) -> Records:
    """The newest record of every method on every model, in the order of the methods; then of those not known here."""
    entries = ("model", "method", "statistics_every", "refresh_every")
    found = {tuple(record[entry] for entry in entries): record for record in records}
    order = [(name, method.name, *method[3:5]) for name in MODELS for method in METHODS]
    return [found[one] for one in (*filter(found.__contains__, order), *(one for one in found if one not in order))]


FIGURES = {
    "step": ("a step", ("step",)),
    "compile": ("compilation", ("compile",)),
    "memory": ("memory: held between steps (dark) / peak (light)", ("held", "peak")),
}
"""Panels: their titles, and the ratios in each."""
LATER = {"p95": "p95 / median", "program_lines": "program lines", "program": "x Adam"}
"""Columns of figures that older records do not have."""
COLORS = ("#1f5f99", "#a9c4de")


def table(records: Records) -> Table:
    """Every figure, with its ratio to Adam's."""
    result = Table(
        title="A step, its compilation and its memory, over those of Adam (x Adam)",
        caption="A step: median over rounds, and their range; held: parameters and state; MB are a million bytes.",
        caption_justify="left",
    )
    for heading in ("model", "method"):
        result.add_column(heading)
    for heading in ("statistics", "refresh", "ms", "x Adam", "range", "compile s", "x Adam", "held MB", "x Adam"):
        result.add_column(heading, justify="right")
    for heading in ("peak MB", "x Adam"):
        result.add_column(heading, justify="right")
    later = [name for name in LATER if any(record.get(name) for record in records)]
    for name in later:
        result.add_column(LATER[name], justify="right")
    before = None
    for record in records:
        if before not in (None, record["model"]):
            result.add_section()
        before = record["model"]
        periods = (str(record[name] or "") for name in ("statistics_every", "refresh_every"))
        spread = "-".join(shown(record[name]) for name in ("least", "most"))
        megabytes = {name: (record[f"{name}_bytes"] or np.nan) / 1e6 for name in ("held", "peak")}
        result.add_row(
            record["model"],
            record["method"],
            *periods,
            *(shown(record["milliseconds"]), shown(record["step"]), spread),
            *(shown(record["compile_seconds"]), shown(record["compile"])),
            *(cell for name in megabytes for cell in (shown(megabytes[name]), shown(record[name]))),
            *(shown(record.get(name)) for name in later),
        )
    return result


def shown(number: float | None) -> str:
    """A number with three digits; a dash if there is none."""
    if number is None or not np.isfinite(number):
        return "-"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def label(record: dict[str, Any]) -> str:
    """A method with its periods."""
    periods = [str(record[name] or "-") for name in ("statistics_every", "refresh_every")]
    return record["method"] + (f" ({', '.join(periods)})" if set(periods) != {"-"} else "")


def picture(records: Records) -> Figure:
    """The ratios to Adam's as bars from 1: a row of panels for each model, a panel for each figure."""
    models = list(dict.fromkeys(record["model"] for record in records))
    rows = [[record for record in records if record["model"] == model] for model in models]
    heights = [len(row) for row in rows]
    figure, axes = plt.subplots(
        len(models),
        len(FIGURES),
        figsize=(16, 1.2 + sum(0.9 + 0.27 * height for height in heights)),
        gridspec_kw={"height_ratios": [height + 3 for height in heights]},
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for model, row, line in zip(models, rows, axes, strict=True):
        for axis, (title, ratios) in zip(line, FIGURES.values(), strict=True):
            bars(axis, row, ratios)
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        line[0].set_yticks(range(len(row)), [label(record) for record in row])
        line[0].invert_yaxis()
        line[0].set_ylabel(model, fontweight="bold")
    figure.suptitle(
        "Times Adam's, same model (in brackets: steps between statistics, between refreshes)", x=0.01, ha="left"
    )
    return figure


def bars(axis: Axes, records: Records, ratios: tuple[str, ...]) -> None:
    """A bar from 1 for each record and ratio, with the number at its end."""
    values = np.array([[record[name] or np.nan for name in ratios] for record in records])  # [R, F]
    height = 0.8 / len(ratios)
    for index, (column, color) in enumerate(zip(values.T, COLORS, strict=False)):
        places = np.arange(len(records)) + height * (index - (len(ratios) - 1) / 2)
        axis.barh(places, column - 1, left=1, height=height, color=color)
    ends = np.nanmax(values, axis=1, initial=1)
    if ratios == ("step",):
        ends = np.array([record["most"] for record in records])
        for index, record in enumerate(records):
            axis.plot([record["least"], record["most"]], [index, index], color="black", linewidth=1.2)
    for index, (end, row) in enumerate(zip(ends, values, strict=True)):
        text = " / ".join(shown(value) for value in row)
        axis.annotate(text, (max(end, 1), index), (4, 0), textcoords="offset points", va="center", fontsize=8)
    found = values[np.isfinite(values)]
    if len(found) and found.max() > 10 * found.min():
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.16, y=0.01)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def main(config: Config) -> None:
    """Measure, print the table, write the picture."""
    if config.smoke:
        config = replace(config, output=config.output / "smoke", models=("tiny",), methods=("TENGraD", "MBF"), rounds=1)
    jax.config.update("jax_enable_compilation_cache", False)  # what is found on the disk is not compiled
    records, console = run(config), Console(width=160)
    console.print(table(records))
    path = config.output / "speed.png"
    picture(records).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
