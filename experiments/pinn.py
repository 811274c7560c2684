"""Physics-informed nets: what error is left after the same seconds, by natural gradients, Adam, SOAP and L-BFGS?

Poisson in two and five dimensions, the heat equation in four, Burgers' in one (`experiments/pde.py`); a net with tanh,
points that stay, double precision, an error that is relative, in L2, at 2,000 other points. Every method has as many
trials of its setting as every other, of the same seconds, with the first seed; then it runs from every seed at the
setting that left the least error. Seconds are those of the processor, of all threads, so that a busy machine slows
nobody; compilation and the measuring of the error are not in them.

Expected: TENGraD of one block with a search along its direction, and SPRING, leave less than a tenth of the error of
Adam and of L-BFGS. Found with one seed, 8 seconds and trials of 3: on Poisson in two dimensions 1/222 (TENGraD 1.3e-5,
K-FAC 1.7e-4, SPRING 4.5e-4, L-BFGS 3.0e-3), on Burgers' less than a quarter, none near its end; the others are not run.

    make pinn                                        (two hours on two cores)
    make pinn ARGS="--seconds 5 --seeds 1 --equations 'poisson 2d'"
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng
from experiments import pde
from experiments.records import Records, finite, keep, kept, machine
from experiments.tables import markdown

EXACT: dict[str, Any] = {"blocks": "joint", "refresh_every": 1}
OFTEN: dict[str, Any] = {"statistics_every": 1, "refresh_every": 5, "early_refresh": False}


class Contender(NamedTuple):
    """A method.

    Attributes:
        make: layers, a number, steps until its schedule ends -> the optimizer; both may be traced.
        tried: the numbers that are tried.
        block: steps between looks.
        starts: whether the number is the damping that the state begins with.
    """

    make: Callable[[Any, Any, Any], optax.GradientTransformation]
    tried: tuple[float, ...]
    block: int
    starts: bool = False


def _cosine(rate: Any, steps: Any) -> optax.Schedule:
    return lambda count: 0.5 * rate * (1 + jnp.cos(jnp.pi * jnp.minimum(count / steps, 1)))


def _tengrad(momentum: Any) -> Callable[[Any, Any, Any], optax.GradientTransformation]:
    return lambda layers, damping, _: ng.tengrad("search", layers, damping=damping, momentum=momentum, **EXACT)


CONTENDERS = {
    "TENGraD, joint": Contender(_tengrad(None), (1e-4, 1e-6, 1e-8), 5),
    "SPRING": Contender(_tengrad("spring"), (1e-4, 1e-6, 1e-8), 5),
    "K-FAC": Contender(
        lambda layers, _start, _: ng.kfac("quadratic", layers, damping=ng.adaptive_damping(1.0, least=1e-12), **OFTEN),
        (1.0, 1e-2, 1e-4),
        10,
        starts=True,
    ),
    "SOAP": Contender(
        lambda layers, rate, steps: ng.soap(_cosine(rate, steps), layers, statistics="gradient", damping=1e-16),
        (1e-3, 5e-3, 2e-2),
        50,
    ),
    "Adam": Contender(lambda layers, rate, steps: optax.adam(_cosine(rate, steps)), (1e-3, 5e-3, 2e-2), 100),
    "L-BFGS": Contender(lambda layers, memory, _: optax.lbfgs(memory_size=int(memory)), (10, 30, 100), 20),
}
OTHERS = ("Adam", "L-BFGS")


@dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
        output: folder of records, table and picture.
        seconds: of the processor, of a run.
        trial: seconds of a trial.
        seeds: runs of a method from as many nets and points.
        scale: of the numbers of points.
        equations: which.
        methods: which.
    """

    output: Path = Path("results")
    seconds: float = 60.0
    trial: float = 20.0
    seeds: int = 3
    scale: float = 1.0
    equations: tuple[pde.Name, ...] = pde.NAMES
    methods: tuple[str, ...] = tuple(CONTENDERS)


class Runner:
    """One method on an equation: compiled once, for every number that is tried and for every seed."""

    def __init__(self, name: str, task: pde.Task, memory: float = 0):
        """Compile a block of steps; `memory` is that of L-BFGS, which fixes the shapes of its state."""
        self._contender, self._memory = CONTENDERS[name], memory
        by_value = name == "L-BFGS"
        layers = None if name in OTHERS else task.loss.layers(task.params, task.inputs)
        step = _by_value if by_value else _by_gradient if layers is None else _by_curvature

        def made(number, steps):
            return optax.with_extra_args_support(self._contender.make(layers, memory or number, steps))

        def block(carry, number, steps, inputs, targets):
            tx, data = made(number, steps), task._replace(inputs=inputs, targets=targets)
            return jax.lax.fori_loop(0, self._contender.block, lambda _, one: step(tx, data, one), carry)

        def begin(params, number):
            state: Any = made(number, 1.0).init(params)
            return params, (state._replace(damping=jnp.float32(number)) if self._contender.starts else state)

        self._begin, self._error = jax.jit(begin), jax.jit(task.error)
        arguments = 1.0, 1.0, task.inputs, task.targets
        self._block = jax.jit(block).lower(self._begin(task.params, 1.0), *arguments).compile()

    def __call__(self, task: pde.Task, number: float, seconds: float, steps: float, most: int = 10**9) -> Any:
        """Run for some seconds of the processor: steps, seconds and errors at every look, and the last parameters."""
        carry, spent, done = self._begin(task.params, number), 0.0, 0
        counts, times, errors = [0], [0.0], [float(self._error(task.params))]
        while spent < seconds and done < most and np.isfinite(errors[-1]):
            before = time.process_time()
            carry = jax.block_until_ready(self._block(carry, number, steps, task.inputs, task.targets))
            spent += time.process_time() - before
            done += self._contender.block
            counts.append(done)
            times.append(spent)
            errors.append(float(self._error(carry[0])))
        return {"steps": counts, "seconds": times, "errors": errors, "params": carry[0]}


def _by_curvature(tx: Any, task: pde.Task, carry: Any) -> Any:
    params, state = carry
    out = task.loss.value_and_grad(params, task.inputs, task.targets)
    updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
    return optax.apply_updates(params, updates), state


def _by_gradient(tx: Any, task: pde.Task, carry: Any) -> Any:
    params, state = carry
    updates, state = tx.update(jax.grad(task.value)(params, task.inputs, task.targets), state, params)
    return optax.apply_updates(params, updates), state


def _by_value(tx: Any, task: pde.Task, carry: Any) -> Any:
    params, state = carry
    loss = partial(task.value, inputs=task.inputs, targets=task.targets)
    value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    return optax.apply_updates(params, updates), state


def of_method(config: Config, equation: pde.Name, name: str) -> Iterator[dict[str, Any]]:
    """The trials of a method on an equation, and its runs from every seed at the best of them.

    Args:
        config: the numbers.
        equation: which.
        name: of the method.

    Yields:
        A record for each.
    """
    tasks = [pde.task(pde.EQUATIONS[equation], seed, config.scale) for seed in range(config.seeds)]
    numbers, by_memory = [float(number) for number in CONTENDERS[name].tried], name == "L-BFGS"
    runners = {n: Runner(name, tasks[0], n) for n in numbers} if by_memory else {}
    runners = runners or dict.fromkeys(numbers, Runner(name, tasks[0]))
    first = runners[numbers[0]](tasks[0], numbers[0], np.inf, 1e6, most=3 * CONTENDERS[name].block)
    pace, best = first["seconds"][-1] / first["steps"][-1], (np.inf, numbers[0])
    key = {"equation": equation, "method": name}
    for number in numbers:
        found = runners[number](tasks[0], number, config.trial, config.trial / pace)
        yield key | {"trial": True, "setting": number} | _record(found)
        best = min(best, (found["errors"][-1] if np.isfinite(found["errors"][-1]) else np.inf, number))
    for seed, task in enumerate(tasks):
        found = runners[best[1]](task, best[1], config.seconds, config.seconds / pace)
        yield key | {"trial": False, "setting": best[1], "seed": seed} | _record(found)


def run(config: Config) -> Iterator[dict[str, Any]]:
    """All trials and runs, in double precision.

    Args:
        config: the numbers.

    Yields:
        The records of `of_method`.
    """
    with jax.enable_x64(True):
        for equation in config.equations:
            for name in config.methods:
                yield from of_method(config, equation, name)


def _record(found: dict[str, Any]) -> dict[str, Any]:
    picks = np.unique(np.geomspace(1, len(found["steps"]), 40).astype(int)) - 1
    return {
        "steps": [found["steps"][at] for at in picks],
        "seconds": [round(found["seconds"][at], 3) for at in picks],
        "errors": [finite(found["errors"][at], 12) for at in picks],
    }


def last(records: Records) -> np.ndarray:
    """The errors at the end of runs; infinite of those that diverged."""
    return np.array([np.inf if record["errors"][-1] is None else record["errors"][-1] for record in records])


def table(records: Records, seconds: float) -> Table:
    """The error that is left, its median over the seeds, and how many times less ours is than that of the others."""
    runs = [record for record in records if not record["trial"]]
    equations = list(dict.fromkeys(record["equation"] for record in runs))
    names = list(dict.fromkeys(record["method"] for record in runs))
    result = Table(
        title=f"Relative L2 error after {seconds:g} processor seconds",
        caption="Median over the seeds, in brackets the steps. Last line: the least of Adam and L-BFGS over the least "
        "of the others.",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    errors = {}
    for equation in equations:
        result.add_column(equation, justify="right")
    for name in names:
        cells = []
        for equation in equations:
            those = [r for r in runs if (r["equation"], r["method"]) == (equation, name)]
            errors[equation, name] = np.median(last(those)) if those else np.inf
            steps = np.median([r["steps"][-1] for r in those]) if those else 0
            cells.append(f"{errors[equation, name]:.1e} ({steps:.0f})" if those else "-")
        result.add_row(name, *cells)
    least = [
        [min((errors[e, n] for n in names if (n in OTHERS) is others), default=np.inf) for others in (True, False)]
        for e in equations
    ]
    result.add_row("ratio", *(f"{theirs / ours:.1f}" if np.isfinite(theirs / ours) else "-" for theirs, ours in least))
    return result


def picture(records: Records) -> Figure:
    """Errors against seconds and steps, an equation in every column; the median run of each method."""
    runs = [record for record in records if not record["trial"]]
    equations = list(dict.fromkeys(record["equation"] for record in runs))
    figure, axes = plt.subplots(2, len(equations), figsize=(4 * len(equations), 7), squeeze=False, layout="constrained")
    for column, equation in enumerate(equations):
        for number, name in enumerate(CONTENDERS):
            those = [r for r in runs if (r["equation"], r["method"]) == (equation, name)]
            if not those:
                continue
            one = those[int(np.argsort(last(those))[len(those) // 2])]
            for row, along in enumerate(("seconds", "steps")):
                y = [np.nan if error is None else error for error in one["errors"]]
                axes[row, column].plot(one[along], y, color=f"C{number}", label=name)
        for row, along in enumerate(("processor seconds", "steps")):
            axes[row, column].set(yscale="log", xscale="log", xlabel=along, title=equation if row == 0 else "")
    for row in axes:
        row[0].set_ylabel("relative L2 error")
    axes[0, 0].legend(fontsize=8)
    return figure


def main(config: Config) -> None:
    """Run, keep, print, draw; what the records have already is not run again."""
    path = config.output / "pinn.jsonl"
    for equation in config.equations:
        for name in config.methods:
            if kept(path, {"equation": equation, "method": name, "trial": False, "budget": config.seconds}):
                continue
            some = list(run(replace(config, equations=(equation,), methods=(name,))))
            keep(path, [record | {"budget": config.seconds} | machine() for record in some])
            print(f"{equation}, {name}: {last([r for r in some if not r['trial']])}", flush=True)
    records = kept(path, {"budget": config.seconds})
    found = table(records, config.seconds)
    Console().print(found)
    (config.output / "pinn.md").write_text(markdown(found) + "\n")
    figure = picture(records)
    figure.savefig(config.output / "pinn.png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
