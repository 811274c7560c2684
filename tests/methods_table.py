"""The table of all methods, and what the laws do with them. A new method adds ONE row to `METHODS`.

One that is a complete optimizer and nothing else, since it learns from its own step, adds it to `COMPLETE`. Its
direction is the step over the learning rate. The laws that call `update` as a training step does, with parameters and
with the curvature itself, are for it, too. Not for it are those that

    give evidence of another batch, of other numbers or as a mapping, or no parameters: it measures again where it goes;
    count refreshes, or freeze a state: it has none, and every measurement is one of its own step;
    make the damping large: one factor starts as the identity, so that damping enters by its root at first;
    build an optimizer from a direction, momentum behind it or decay: its own are inside.

What these say of guards, masks, types, injected settings and ensembles is in its own tests.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import Task, kept, task

import natgrad_jax as ng

Transformation = optax.GradientTransformationExtraArgs


class Row(NamedTuple):
    """One method.

    Attributes:
        name: of the method and its variant.
        scale_by: layers, **settings -> the direction alone.
        optimizer: learning rate, layers, **settings -> the complete optimizer.
        rate: the power of 1 / damping at which damping * direction approaches the gradient.
        rescales: whether something is measured in the basis of the last refresh.
        averages: whether its statistics are plain averages of what batches say.
        factorisations: how many a refresh of one layer has, in its fallback too.
        smoothing: the momentum that the complete optimizer has in front of the direction; None for one behind it.
        learning: settings with which the complete optimizer learns in fifteen steps.
        power: the power of 1 / damping that the direction has where the damping is large.
        apart: whether statistics have a period of their own; else they come with each refresh.
        application: flops of a step's application that grow with the batch, for a problem of that many examples.
    """

    name: str
    scale_by: Callable[..., Transformation]
    optimizer: Callable[..., Transformation]
    rate: float
    rescales: bool = False
    averages: bool = True
    factorisations: int = 2
    smoothing: Callable[..., Any] | None = None
    learning: Mapping[str, Any] = {"learning_rate": 0.05}
    power: float = 1.0
    apart: bool = True
    application: Callable[[ng.Layers, int], int] = lambda layers, examples: 0


def _row(
    name: str, scale_by: Callable, optimizer: Callable, rate: float, law: Mapping[str, Any] = {}, **variant: Any
) -> Row:
    """A row: what is special about it by the laws, and the settings of its variant."""
    if not law.get("apart", True):
        scale_by, optimizer = _without_periods_of_statistics(scale_by), _without_periods_of_statistics(optimizer)
    return Row(name, partial(scale_by, **variant), partial(optimizer, **variant), rate, **law)


def _without_periods_of_statistics(make: Callable) -> Callable:
    """The same for a method that measures where it refreshes; the laws name both periods."""

    @wraps(make)
    def made(*args, statistics_every=None, early_refresh=None, **settings):
        del statistics_every, early_refresh
        return make(*args, **settings)

    return made


def _in_sample_space(layers: ng.Layers, examples: int) -> int:
    """Flops of J D and J^T v from rows, and of the product with a matrix of the size of the batch."""
    shapes = (layer.shape for layer in layers.known)
    return sum(4 * examples * (rows + 1) * columns + 2 * examples**2 for rows, columns in shapes)


_TWICE = {"rescales": True, "factorisations": 4}
_TENSORS = {"smoothing": optax.trace}
_ROOTS = {"power": 0.5}
_SAMPLES = {"averages": False, "factorisations": 3, "apart": False, "application": _in_sample_space}


_SOAP_LEARNS = {"learning_rate": 0.1, "statistics": "gradient", "rescale_every": 1}

METHODS = (
    _row("kfac pi", ng.scale_by_kfac, ng.kfac, 0.5, split="pi"),
    _row("kfac exact", ng.scale_by_kfac, ng.kfac, 1.0, split="exact"),
    _row("ekfac per_example", ng.scale_by_ekfac, ng.ekfac, 1.0, {"rescales": True}, estimator="per_example"),
    # its first refresh is by eigendecompositions, in a branch beside that of the others
    _row("ekfac qr pi", ng.scale_by_ekfac, ng.ekfac, 0.5, _TWICE, refresh="qr", split="pi", estimator="minibatch"),
    _row("tkfac", ng.scale_by_tkfac, ng.tkfac, 0.5),
    _row("tekfac", ng.scale_by_tekfac, ng.tekfac, 1.0, {"rescales": True}),
    # those that can do without curvature are asked for it here, to be under the laws of it
    _row("tnt", ng.scale_by_tnt, ng.tnt, 1 / 3, _TENSORS),
    _row(
        "mbf",
        ng.scale_by_mbf,
        ng.mbf,
        1.0,
        _TENSORS | {"factorisations": 1, "learning": {"learning_rate": 0.05, "damping": 0.03}},
        statistics="curvature",
    ),
    _row("shampoo", ng.scale_by_shampoo, ng.shampoo, 1.0, _TENSORS | _ROOTS, statistics="curvature"),
    _row(
        "soap",
        ng.scale_by_soap,
        ng.soap,
        1.0,
        _TWICE | _ROOTS | {"smoothing": optax.ema, "learning": _SOAP_LEARNS},
        statistics="curvature",
        rescale_every=10,
    ),
    _row("tengrad", ng.scale_by_tengrad, ng.tengrad, 1.0, _SAMPLES),
)
NAMES = tuple(row.name for row in METHODS)
RATE = 0.02
"""The learning rate of the laws."""


def _over_its_rate(optimizer: Callable[..., Transformation], layers: Any, **settings: Any) -> Transformation:
    """The direction of a method that is a complete optimizer only: its step over minus the learning rate.

    That rate is its own, larger than that of the laws: over a step as short as theirs the change of the cotangents is
    half rounding in float32.
    """
    rate = 0.3

    def update(inner, updates, state, params, **extra):
        found, new = inner(updates, state, params, **extra)
        return jax.tree.map(lambda u: (u / -rate).astype(u.dtype), found), new

    return wrapped(optimizer(rate, layers, momentum=None, **{"kl_clip": None} | settings), update)


def _without_refreshes(optimizer: Callable[..., Transformation], *args: Any, **settings: Any) -> Transformation:
    """A method that refreshes nothing, without the settings that say when."""
    return optimizer(*args, **{name: value for name, value in settings.items() if "refresh" not in name})


_KBFGS = partial(_without_refreshes, ng.kbfgs)
COMPLETE = (
    Row("kbfgs", partial(_over_its_rate, _KBFGS), _KBFGS, 0.5, learning={"learning_rate": 2.0, "damping": 0.1}),
)
ALL_NAMES = NAMES + tuple(row.name for row in COMPLETE)
SETTINGS = {"damping": 0.03, "decay": 0.9, "statistics_every": 2, "refresh_every": 4, "early_refresh": False}


LIFTED = ("kfac pi", "ekfac qr pi", "tnt", "tengrad", "kbfgs")
"""One row for each way in which a method is lifted: plain, rescaled in a branch, tensors, measured only, stepping."""


FEW = ("kfac pi", "kbfgs")
"""Of these the two that are lifted least alike, for the laws whose rows take seconds."""


def of_the_lifting(names: tuple[str, ...], some: tuple[str, ...] = LIFTED) -> Any:
    """A law of the lifting, which cannot tell relatives apart: on the representative rows, on all with `-m full`."""
    rows = [name if name in some else pytest.param(name, marks=pytest.mark.full) for name in names]
    return pytest.mark.parametrize("method", rows)


def settings_of(method: str) -> dict[str, Any]:
    """The test settings that the direction of a row has."""
    return {k: v for k, v in SETTINGS.items() if row(method).apart or k not in ("statistics_every", "early_refresh")}


def build(method: str, where: str = "mlp", **settings: Any) -> Transformation:
    """The direction of a row for a problem, with the test settings."""
    return row(method).scale_by(task(where).layers, **{**SETTINGS, **settings})


_direction = kept(build)


def direction(method: str, where: str = "mlp", **settings: Any) -> Transformation:
    """The same, but one object for one question, so that what was compiled for it is found again."""
    return _direction(method, where, **settings)


@cache
def update_of(tx: Transformation) -> Any:
    """The jitted `update` of a transformation, compiled once for all tests that ask for the same object."""
    return jax.jit(tx.update)


def row(method: str) -> Row:
    """The row of that name."""
    return (METHODS + COMPLETE)[ALL_NAMES.index(method)]


def lifted(state: Any) -> ng.NaturalGradientState:
    """The state of the lifted method in the state of a chain."""

    def is_ours(node):
        return isinstance(node, ng.NaturalGradientState)

    (found,) = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
    return found


def contents(state: ng.NaturalGradientState) -> Any:
    """What a state holds of its layers, without the dates."""
    return state.statistics, {name: operator.value for name, operator in state.operators.items()}


class Record(NamedTuple):
    """What one step leaves behind."""

    value: jax.Array
    grad: Any
    updates: Any
    metrics: Any


def batch_of(problem: Task, t: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, labels and key of step t."""
    return problem.x[t % 4], problem.y[t % 4], jax.random.fold_in(jax.random.key(3), t)


def evaluate(problem: Task, params: Any, t: Any) -> Any:
    """Loss, gradient and curvature of step t."""
    x, y, key = batch_of(problem, t)
    return problem.evaluate(params, x, y, key=key)


def measured(where: str, t: int = 0) -> tuple[Any, Any]:
    """Gradient and evidence {name: Evidence} of step t at the first parameters."""
    return _measured(where, t)


@kept
def _measured(where: str, t: int) -> tuple[Any, Any]:
    return _measure(where)(task(where).params, np.int32(t))


@kept
def _measure(where: str) -> Any:
    """The compiled measurement, of the parameters and the number of the step."""

    def measure(params, t):
        out = evaluate(task(where), params, t)
        return out.grad, out.curvature()

    return jax.jit(measure)


def step(
    problem: Task, tx: Transformation, carry: tuple[Any, Any], t: Any, other: Any = None
) -> tuple[tuple[Any, Any], Record]:
    """One step of training with a small learning rate: (params, state), t -> (params, state), record.

    `other` is (whether it is taken instead, a gradient).
    """
    params, state = carry
    out = evaluate(problem, params, t)
    grad = out.grad if other is None else jax.tree.map(partial(jnp.where, other[0]), other[1], out.grad)
    updates, state = tx.update(grad, state, params, curvature=out.curvature)
    moved = jax.tree.map(lambda p, u: p - jnp.asarray(RATE, p.dtype) * u, params, updates)
    return (moved, state), Record(out.value, grad, updates, optax.tree.get(state, "metrics"))


def start(problem: Task, tx: Transformation) -> tuple[Any, Any]:
    """Parameters and state in buffers of their own."""
    params = jax.tree.map(jnp.copy, problem.params)
    return params, tx.init(params)


def trained(problem: Task, tx: Transformation, steps: int = 15) -> tuple[Any, jax.Array]:
    """State and losses of a complete optimizer on one batch, the carry donated; the state keeps its shapes."""

    def on(carry, _):
        params, state = carry
        out = evaluate(problem, params, 0)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return (optax.apply_updates(params, updates), state), out.value

    begin = start(problem, tx)
    run = jax.jit(lambda carry: jax.lax.scan(on, carry, length=steps), donate_argnums=0)
    (_, state), losses = run(jax.tree.map(jnp.copy, begin))
    assert shapes(state) == shapes(begin[1])
    return state, losses


@kept
def _scanned(where: str, tx: Transformation, steps: int) -> Any:
    problem = task(where)
    run = jax.jit(lambda carry: jax.lax.scan(partial(step, problem, tx), carry, jnp.arange(steps)))
    return run(start(problem, tx))


def scanned(where: str, tx: Transformation, steps: int = 10) -> tuple[tuple[Any, Any], Record]:
    """Some steps in one `lax.scan`: the last (params, state), and the records stacked."""
    return _scanned(where, tx, steps)


def shapes(tree: Any) -> Any:
    """Shape, dtype and weakness of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), jax.eval_shape(lambda: tree))


def wrapped(tx: Transformation, update: Callable[..., Any] | None = None, init: Callable[..., Any] | None = None):
    """A transformation with another `update(inner, updates, state, params, **extra)` or `init(inner, params)`."""

    def new_update(updates, state, params=None, **extra):
        return (update or _call)(tx.update, updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(partial(init, tx.init) if init else tx.init, new_update)


def _call(inner: Callable[..., Any], updates: Any, state: Any, params: Any, **extra: Any) -> Any:
    return inner(updates, state, params, **extra)


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs inside an equation: branches, bodies, called functions."""
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found
