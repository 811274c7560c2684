"""What do a step, its compilation and its memory cost, in units of Adam's on the same model?

Three models on noise: the MNIST autoencoder of the papers, a small convolutional network and, where it is asked for, a
transformer. Every method has statistics at every step and a refresh at every 10th, and 10 and 100; beside them kfac-jax
where it can be imported, of which only step and held are known. Each is measured in a process with an Adam of its own:

    step      median over rounds of a block of steps over Adam's block just before it; a block holds whole periods
    compile   seconds of tracing, lowering and compiling the jitted step, with JAX's caches empty
    held      bytes of the parameters and of the optimizer's state, which stay between the steps
    peak      bytes that the compiled step needs at once by XLA's account, without LAPACK's own workspace
    p95       of single steps over two periods, the 95th percentile over the median
    program   lines of the compiled program, in XLA's text
    flops     of the compiled step where nothing is due, and where all is: products, convolutions and factorisations
    bound     of the mean step by these, where statistics are due at every step or with every refresh

Expected: by flop count 2.2 x Adam's step for K-FAC on the autoencoder with periods of 10 and 100, and more for methods
with an eigenbasis or a root. `make bench` keeps glibc from returning scratch memory to the system after every step,
which takes more than half of Adam's time otherwise.

    make bench                                        (some 20 minutes)
    make bench ARGS="--models cnn --methods K-FAC SOAP"
"""

from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng
from experiments import figures, nets
from experiments.data import Part
from experiments.figures import shown
from experiments.methods import QUADRATIC, periods
from experiments.programs import Program
from experiments.records import Records, chosen, grouped, keep, kept, machine, significant
from experiments.running import Labels, Make, Peer, Runner, Task, has_peer


class Method(NamedTuple):
    """A method at its periods, which are None where it has none; `of` is its name in its package.

    Without a `make`, setting, layers -> optimizer, it owns its loop; without labels its gradients are plain.
    """

    name: str
    of: str
    make: Make | None
    statistics_every: int | None = None
    refresh_every: int | None = None
    labels: Labels | None = None

    @property
    def period(self) -> int:
        """Steps after which everything has come round."""
        return lcm(self.statistics_every or 1, self.refresh_every or 1)


FREQUENT, RARE = (1, 10), (10, 100)


def ours(name: str, method: Callable[..., Any], *between: Any, labels: Any = "sampled", **options: Any) -> list[Method]:
    """A method of the package at pairs of periods, of statistics and of refreshes, as far as it has such keywords."""
    of = method.__name__

    def at(often: tuple[int, int]) -> Method:
        every = periods(method, *often)
        given = every | ({} if of in ("kbfgs", "tengrad") else {"early_refresh": False}) | options
        steps = every.get("statistics_every"), every.get("refresh_every")
        return Method(name, of, lambda numbers, layers: method(layers=layers, **numbers | given), *steps, labels)

    return [at(often) for often in (FREQUENT, *between, RARE)]


ADAM = Method("Adam", "adam", lambda numbers, _: optax.adam(numbers["learning_rate"]))
STEADY = QUADRATIC | {"damping": ng.adaptive_damping(calibration=0)}  # which would test each of the first steps
METHODS = (
    ADAM,
    Method("SGD-m", "sgd", lambda numbers, _: optax.sgd(numbers["learning_rate"], 0.9)),
    *ours("K-FAC", ng.kfac, (10, 10)),
    *ours("K-FAC, adaptive", ng.kfac, **STEADY),
    *ours("TKFAC", ng.tkfac),
    *ours("EKFAC", ng.ekfac),
    *ours("K-FAC, rank", ng.kfac, rank="auto"),
    *ours("EKFAC, rank", ng.ekfac, rank="auto"),
    *ours("K-FAC, rolling", ng.kfac, rolling=True),
    *ours("EKFAC, rolling", ng.ekfac, rolling=True),
    *ours("TEKFAC", ng.tekfac),
    *ours("TENGraD", ng.tengrad),
    *ours("K-BFGS", ng.kbfgs, labels="true"),
    *ours("K-BFGS(L)", ng.kbfgs, labels="true", memory=100),
    *ours("TNT", ng.tnt),
    *ours("MBF", ng.mbf),
    *ours("Shampoo, grafted", ng.shampoo, graft_to="adam"),
    *ours("SOAP", ng.soap),
    *([Method("kfac-jax", "kfac-jax", None, *FREQUENT)] if has_peer() else ()),
)

ROUNDS, BLOCK, FIXED = 3, 20, {"learning_rate": 1e-6, "damping": 1.0}
"""Pairs of blocks, least steps of a block, and a rate so small that the parameters stay where they are."""
TOKENS = 8192
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "autoencoder": (nets.autoencoder((1000, 500, 250, 30)), (500, 784)),
    "cnn": (nets.Convnet((16, 32, 64), (1, 2, 2)), (128, 28, 28, 1)),
    "transformer": (nets.Transformer(layers=4, width=256, heads=4, tokens=TOKENS), (8, 128)),
    "tiny": (nets.Perceptron((8,), 10), (16, 12)),
}
"""A model and the shape of its inputs."""


def noise(name: str) -> Task:
    """The model of that name with a batch of noise."""
    (model, shape), is_text, key = MODELS[name], name == "transformer", jax.random.key(0)
    x = jax.random.randint(key, shape, 0, TOKENS) if is_text else jax.random.uniform(key, shape)
    if name == "autoencoder":
        return Task(model, ng.losses.sigmoid_binary_cross_entropy, Part(x, x))
    y = jnp.roll(x, -1, axis=1) if is_text else jnp.arange(len(x)) % 10
    return Task(model, ng.losses.softmax_cross_entropy, Part(x, y))


def made(method: Method, task: Task) -> Any:
    """A method compiled on a task, after its first step."""
    if method.make:
        runner: Any = Runner(method.make, FIXED, task, method.labels)
        jax.clear_caches()  # compilation is measured with empty ones
    else:
        options = {"inverse_update_period": method.refresh_every, "estimation_mode": "fisher_gradients"}
        runner = Peer(task, FIXED | {"momentum": 0.9}, **options)
    runner.run([task.batch])
    return runner


def sizes(runner: Any) -> dict[str, Any]:
    """Seconds of compilation, bytes and lines; None where nothing is known."""
    program = runner.program
    memory = program and program.memory_analysis()
    together = sum(getattr(memory, f"{part}_size_in_bytes", 0) for part in ("argument", "temp", "output"))
    return {
        "compile_seconds": runner.compile_seconds,
        "held_bytes": sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(runner.carry)),
        "peak_bytes": memory and together - memory.alias_size_in_bytes,
        "program_lines": program and (program.as_text() or "").count("\n"),
    }


def flops(method: Method, runner: Any, base: Any) -> dict[str, Any]:
    """Those of the compiled step over Adam's, the least and the most, and their mean over a period."""
    if runner.program is None:
        return {}
    adam = Program(base.program.as_text()).flops()
    least, most = (Program(runner.program.as_text(), dearest).flops() / adam for dearest in (False, True))
    every, refresh = method.statistics_every or 1, method.refresh_every or 1
    mean = least + (most - least) / refresh if every in (1, refresh) else None
    return {"least_flops": significant(least), "most_flops": significant(most), "bound": mean and significant(mean)}


def measure(name: str, task: Task, method: Method) -> dict[str, Any]:
    """One method on one model, and an Adam in turn with it: what was measured, with units, and its ratios without."""
    base = made(ADAM, task)
    runner = base if method is ADAM else made(method, task)

    def block(runner: Any, steps: int) -> float:
        return runner.run([task.batch] * steps)[1] / steps

    steps, pairs = BLOCK + -BLOCK % method.period, []
    for _ in range(ROUNDS):
        adams = block(base, BLOCK)
        pairs.append((adams if runner is base else block(runner, steps), adams))
    ratios = [mine / adams for mine, adams in pairs]
    singles = [block(runner, 1) for _ in range(max(40, 2 * method.period))]
    found: dict[str, Any] = flops(method, runner, base)
    for (entry, one), other in zip(sizes(runner).items(), sizes(base).values(), strict=True):
        found[entry] = one and significant(one, 9)
        found[entry.split("_")[0]] = significant(one / other) if one and other else None
    periods = {name: getattr(method, name) for name in ("statistics_every", "refresh_every")}
    times = {
        "milliseconds": 1000 * np.median([mine for mine, _ in pairs]),
        "step": np.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "p95": np.percentile(singles, 95) / np.median(singles),
    }
    times = {entry: significant(number) for entry, number in times.items()}
    return {"model": name, "method": method.name, **periods, **machine(), **times, **found}


def run(
    output: Path = Path("results"), models: tuple[str, ...] = ("autoencoder", "cnn"), methods: tuple[str, ...] = ()
) -> Records:
    """Measure and keep what is asked for, and Adam; show the newest records of this machine.

    Args:
        output: folder of the records and of the picture.
        models: "autoencoder", "cnn", "transformer", or "tiny", a dense net of a few units.
        methods: names as in the table or as in the package; none for all. Adam is always measured.
    """
    models = tuple(chosen(MODELS, models))
    asked = chosen(dict.fromkeys(name for method in METHODS for name in (method.name, method.of)), methods)
    wanted = [method for method in METHODS if method is ADAM or {method.name, method.of} & {*asked}]
    path, tasks = output / "speed.jsonl", {name: noise(name) for name in models}
    made(ADAM, noise("tiny"))  # a process loads the compiler with its first program
    for name, method in track([(name, method) for name in tasks for method in wanted], "measuring"):
        keep(path, [measure(name, tasks[name], method)])
    found = [record for record in newest(kept(path, machine())) if record["model"] in models]
    figures.present(SHOWN, found, output)
    return found


def newest(records: Records) -> Records:
    """The newest record of every method on every model, in the order of the methods; then of those not known here."""
    found = grouped(records, "model", "method", "statistics_every", "refresh_every")
    order = [(name, method.name, *method[3:5]) for name in MODELS for method in METHODS]
    return [found[one][-1] for one in dict.fromkeys((*order, *found)) if one in found]


FIGURES = {
    "a step": ("step",),
    "compilation": ("compile",),
    "memory: held between steps (dark) / peak (light)": ("held", "peak"),
}
"""Panels, and the ratios in each."""
COLUMNS = (
    *(("statistics", "statistics_every"), ("refresh", "refresh_every"), ("ms", "milliseconds"), ("x Adam", "step")),
    *(("range", "range"), ("compile s", "compile_seconds"), ("x Adam", "compile"), ("held MB", "held_bytes")),
    *(("x Adam", "held"), ("peak MB", "peak_bytes"), ("x Adam", "peak"), ("p95 / median", "p95")),
    *(("program lines", "program_lines"), ("x Adam", "program"), ("flops x Adam, nothing due", "least_flops")),
    *(("all due", "most_flops"), ("bound", "bound")),
)
"""Headings and figures; older records do not have the last six."""
COLORS = ("#1f5f99", "#a9c4de")


def table(records: Records) -> Table:
    """Every figure, with its ratio to Adam's."""
    return figures.table(
        "A step, its compilation and its memory, over those of Adam (x Adam)",
        ("model", "method", *(heading for heading, _ in COLUMNS)),
        [(record["model"], record["method"], *(cell(record, entry) for _, entry in COLUMNS)) for record in records],
        "A step: median over rounds, and their range; held: parameters and state; MB are a million bytes.",
        names=2,
    )


def cell(record: dict[str, Any], entry: str) -> str:
    """A figure, for reading."""
    if entry == "range":
        return f"{shown(record['least'])}-{shown(record['most'])}"
    if entry.endswith("_every"):
        return str(record[entry] or "")
    number = record.get(entry)
    return shown(number / 1e6 if number and entry.endswith("_bytes") else number)


def label(record: dict[str, Any]) -> str:
    """A method with its periods."""
    periods = [str(record[name] or "-") for name in ("statistics_every", "refresh_every")]
    return record["method"] + (f" ({', '.join(periods)})" if set(periods) != {"-"} else "")


def picture(records: Records) -> Figure:
    """The ratios to Adam's as bars from 1: a row of panels for each model, a panel for each figure."""
    models = grouped(records, "model")
    heights = [len(rows) + 3 for rows in models.values()]
    size = (16, 1.2 + sum(0.09 + 0.27 * height for height in heights))
    options: Any = {"figsize": size, "gridspec_kw": {"height_ratios": heights}, "sharey": "row"}
    figure, axes = figures.panels(len(models), len(FIGURES), **options)
    for (model, rows), line in zip(models.items(), axes, strict=True):
        for axis, (title, ratios) in zip(line, FIGURES.items(), strict=True):
            bars(axis, rows, ratios)
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        line[0].set_yticks(range(len(rows)), [label(record) for record in rows])
        line[0].invert_yaxis()
        line[0].set_ylabel(model, fontweight="bold")
    title = "Times Adam's, same model (in brackets: steps between statistics, between refreshes)"
    figure.suptitle(title, x=0.01, ha="left")
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
        figures.plain(axis.xaxis, "")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.16, y=0.01)
    figures.clean([axis], axis="x", alpha=0.25)


SHOWN = figures.Shown("speed", "What a step costs", table, picture, newest, "make bench")

if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # what is found on the disk is not compiled
    figures.asked(run)
