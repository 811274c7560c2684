"""Physics-informed nets: what error is left after the same seconds, by natural gradients, Adam, SOAP and L-BFGS?

The equations of `pde`; a net with tanh, new points at every step, double precision, an error that is relative, in L2,
at 2,000 other points. L-BFGS stays on its first points, since its memory is of one loss. Every method has as many
trials, of the same seconds, with the first seed, and runs from every seed at the setting that left the least error.
Seconds are those of the processor, of all threads, so that a busy machine slows nobody.

Expected: TENGraD of one block with a search along its direction, and SPRING, leave less than a tenth of the error of
Adam and of L-BFGS. With `--stays` all methods stay on their first points, which are then fitted, and nothing between.

    make pinn                                        (two hours on two cores)
    make pinn ARGS="--seconds 5 --seeds 1 --problems 'poisson 2d'"
    make pinn ARGS="--stays --seconds 20 --trial 3 --seeds 1 --problems 'poisson 5d'"
"""

import time
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import natgrad_jax as ng
from experiments import figures, pde, study
from experiments.records import Records, grouped
from experiments.study import Entry, Limits, Numbers, grid

EXACT: dict[str, Any] = {"learning_rate": "search", "blocks": "joint", "refresh_every": 1}
OFTEN: dict[str, Any] = {"statistics_every": 1, "refresh_every": 5, "early_refresh": False}
RATES = grid(rate=(1e-3, 5e-3, 2e-2))


def kfac(numbers: Numbers, layers: Any) -> optax.GradientTransformation:
    """K-FAC with a damping that adapts itself, from the number that is tried."""
    tx: Any = ng.kfac("quadratic", layers, damping=ng.adaptive_damping(1.0, least=1e-12), **OFTEN)
    return tx._replace(init=lambda params: tx.init(params)._replace(damping=jnp.float32(numbers["damping"])))


def lbfgs(numbers: Numbers, layers: Any) -> optax.GradientTransformation:
    """L-BFGS, whose memory is a shape."""
    return optax.lbfgs(memory_size=int(numbers["memory"]))


def case(name: str, scale: float = 1.0) -> study.Case:
    """An equation, with `scale` times its points."""
    equation = pde.EQUATIONS[name]
    task = pde.Task(equation, pde.points(equation, 0, scale))
    return study.Case({"problem": name}, task, partial(pde.stream, equation, scale=scale), pde.error(equation))


def table(rows: Records) -> Table:
    """The error that is left, and how many times less ours is than that of Adam and L-BFGS."""
    note = (
        "Median over the seeds, in brackets the steps. Last line: the least of Adam and L-BFGS over the least of the "
        "others."
    )
    found = figures.last(rows, "Relative L2 error after {seconds:g} processor seconds", note, ".1e")
    ratios = map(gain, grouped(rows, "problem").values())
    found.add_row("ratio", *(f"{ratio:.1f}" if np.isfinite(ratio) else "-" for ratio in ratios))
    return found


def gain(rows: Records) -> float:
    """The least median error of Adam and L-BFGS over the least of the others, on one problem."""
    ends = {name: float(np.median(figures.ends(own))) for name, own in grouped(rows).items()}
    rivals = [ends.pop(name) for name in ("Adam", "L-BFGS") if name in ends]
    return float(np.divide(min(rivals, default=np.inf), min(ends.values(), default=np.inf)))


exact = partial(study.natural, tried=grid(damping=(1e-4, 1e-6, 1e-8)), stretch=5, **EXACT)
SECONDS = Limits(10**9, 1, 60.0, clock=time.process_time)
STUDY = study.Study(
    "pinn",
    "Differential equations",
    {name: partial(case, name) for name in pde.EQUATIONS},
    {
        "TENGraD, joint": exact(ng.tengrad, momentum=None),
        "SPRING": exact(ng.tengrad, momentum="spring"),
        "TENGraD, joint, nothing tuned": study.natural(ng.tengrad, stretch=5, blocks="joint"),
        "K-FAC": Entry(kfac, grid(damping=(1.0, 1e-2, 1e-4)), stretch=10),
        "K-FAC, nothing said": study.natural(ng.kfac, stretch=10),
        "SOAP": study.natural(ng.soap, RATES, stretch=50, statistics="gradient", damping=1e-16),
        "Adam": study.adam(RATES, stretch=100),
        "L-BFGS": Entry(lbfgs, grid(memory=(10, 30, 100)), None, stretch=20, is_static=True, stays=True),
    },
    SECONDS,
    table,
    partial(figures.curves, label="relative L2 error", units=("processor seconds", "steps")),
    {"scale": 1.0},
    seeds=range(3),
    trial=SECONDS._replace(seconds=20.0),
    is_double=True,
)

if __name__ == "__main__":
    study.main(STUDY)
