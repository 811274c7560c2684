"""Differential equations with known solutions, as losses of two terms: the residual inside, and the values at the edge.

Poisson in two and five dimensions and the heat equation in four, after Dangel, Müller and Zeinhofer (2024),
https://arxiv.org/abs/2405.15603, and https://arxiv.org/abs/2505.12149, with smaller nets and fewer points. Burgers'
equation begins as a sine; half of its points lie near the layer in the middle, which uniform ones hardly show.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_jax as ng
from experiments.data import Part

VISCOSITY = 0.01 / np.pi


class Equation(NamedTuple):
    """A differential equation on a box with corners `low` and `high`.

    Attributes:
        residual: net, point -> what is to be zero.
        solution: points [M, d] -> values [M].
        points: how many inside, and how many at the edge.
        is_evolution: whether the first coordinate is time, whose end is no edge.
        layer: axis, place and width of a thin layer of the solution, where half of the points inside are drawn.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    residual: Callable[[Callable[[Any], Any], Any], Any]
    solution: Callable[[Any], Any]
    widths: tuple[int, ...] = (32, 32)
    points: tuple[int, int] = (400, 100)
    is_evolution: bool = False
    layer: tuple[int, float, float] | None = None


def laplacian(u: Callable[[Any], Any], x: Any, axes: tuple[int, ...]) -> Any:
    """The sum of second derivatives along some axes, `jvp` of `jvp`."""

    def second(v):
        return jax.jvp(lambda y: jax.jvp(u, (y,), (v,))[1], (x,), (v,))[1]

    return jnp.sum(jax.vmap(second)(jnp.eye(x.size, dtype=x.dtype)[jnp.array(axes)]))


def _poisson(size: int, eigenvalue: float, solution: Callable[[Any], Any]) -> Equation:
    """Of a solution whose Laplacian is so many times itself."""

    def residual(u, x):
        return laplacian(u, x, tuple(range(size))) - eigenvalue * solution(x[None])[0]

    return Equation((0.0,) * size, (1.0,) * size, residual, solution)


def _heat(u: Callable[[Any], Any], x: Any) -> Any:
    return jax.grad(u)(x)[0] - laplacian(u, x, (1, 2, 3, 4)) / 4


def _burgers(u: Callable[[Any], Any], x: Any) -> Any:
    value, slope = jax.value_and_grad(u)(x)
    return slope[0] + value * slope[1] - VISCOSITY * laplacian(u, x, (1,))


def cole_hopf(points: Any, nodes: int = 100) -> Any:
    """Burgers' equation from -sin(pi x), by Gauss and Hermite: points [M, 2] of time and place -> [M]."""
    found, masses = np.polynomial.hermite.hermgauss(nodes)
    time, place = np.maximum(np.asarray(points, float).T, [[1e-12], [-np.inf]])
    where = place[:, None] - 2 * np.sqrt(VISCOSITY * time)[:, None] * found
    bend = -np.cos(np.pi * where) / (2 * np.pi * VISCOSITY)
    masses = masses * np.exp(bend - bend.max(axis=1, keepdims=True))
    return -np.sum(masses * np.sin(np.pi * where), axis=1) / np.sum(masses, axis=1)


EQUATIONS: dict[str, Equation] = {
    "poisson 2d": _poisson(2, -2 * np.pi**2, lambda x: jnp.prod(jnp.sin(jnp.pi * x), axis=1)),
    "poisson 5d": _poisson(5, -(np.pi**2), lambda x: jnp.sum(jnp.cos(jnp.pi * x), axis=1)),
    "heat 4+1d": Equation(
        *((0.0,) * 5, (1.0,) * 5, _heat),
        lambda x: jnp.exp(-x[:, 0]) * jnp.sum(jnp.sin(2 * x[:, 1:]), axis=1),
        is_evolution=True,
    ),
    "burgers 1+1d": Equation(
        (0.0, -1.0), (1.0, 1.0), _burgers, cole_hopf, (24, 24, 24), (500, 150), True, (1, 0.0, 0.05)
    ),
}


class Task(NamedTuple):
    """An equation with its points, of both terms, as what a `running.Runner` trains."""

    equation: Equation
    batch: Part
    options: Mapping[str, Any] = {}

    def init(self, key: Any) -> Any:
        """The first parameters, by Glorot."""
        widths = len(self.equation.low), *self.equation.widths, 1
        keys, make = jax.random.split(key, len(widths) - 1), jax.nn.initializers.glorot_normal()
        sizes = zip(keys, widths[:-1], widths[1:], strict=True)
        return {"params": [{"w": make(each, (i, o), float), "b": jnp.zeros(o, float)} for each, i, o in sizes]}

    @property
    def functions(self) -> dict[str, Callable[[Any, Any], Any]]:
        """Parameters, points -> what is trained, of either term."""

        def residual(params, x):
            return jax.vmap(lambda point: self.equation.residual(lambda y: net(params, y), point))(x)[:, None]

        return {"inside": residual, "edge": lambda params, x: net(params, x)[:, None]}

    def loss(self, variables: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """The loss, without any capture, and nothing that it writes."""
        outputs = {name: function(variables["params"], x[name]) for name, function in self.functions.items()}
        return sum(jnp.mean((outputs[name] - y[name]) ** 2) / 2 for name in outputs), {}

    def capture(self, labels: Any, product_stride: int = 1) -> Any:
        """What watches the two terms, as functions of variables."""
        options: Any = {"jacobian": "examples", "product_stride": product_stride, "verify": False}  # the suite verifies
        squared, functions = ng.losses.squared_error, self.functions.items()
        terms = ng.terms({name: ng.capture(function, squared, **options) for name, function in functions})
        return SimpleNamespace(
            layers=lambda variables, x: terms.layers(variables["params"], x),
            value_and_grad=lambda variables, x, y, key: terms.value_and_grad(variables["params"], x, y),
        )


def net(params: Any, x: Any) -> Any:
    """A net with tanh: points [..., d] -> values [...]."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ last["w"] + last["b"])[..., 0]


def edge(equation: Equation, count: int, random: np.random.Generator) -> np.ndarray:
    """Points on the sides of the box, but not at the end of time; half of an evolution's at its beginning."""
    low, high = np.array(equation.low), np.array(equation.high)
    points = random.uniform(low, high, (count, len(low)))
    axes = random.integers(int(equation.is_evolution), len(low), count)
    upper = random.integers(0, 2, count).astype(bool)
    points[np.arange(count), axes] = np.where(upper, high[axes], low[axes])
    if equation.is_evolution:
        half = count // 2
        points[:half] = random.uniform(low, high, (half, len(low)))
        points[:half, 0] = low[0]
    return points


def stream(equation: Equation, seed: int, scale: float = 1.0) -> Iterator[Part]:
    """New points each time, for ever, the same for the same seed."""
    random = np.random.default_rng(seed)
    return (points(equation, random, scale) for _ in count())


def points(equation: Equation, seed: int | np.random.Generator, scale: float = 1.0) -> Part:
    """Points inside and at the edge, `scale` times as many, with zeros and the values of the solution."""
    random = np.random.default_rng(seed)
    inside, outside = (max(4, int(scale * number)) for number in equation.points)
    within = random.uniform(equation.low, equation.high, (inside, len(equation.low)))
    if equation.layer is not None:
        axis, place, width = equation.layer
        near = random.laplace(place, width, inside // 2)
        within[: inside // 2, axis] = np.clip(near, equation.low[axis], equation.high[axis])
    found = {"inside": within, "edge": edge(equation, outside, random)}
    targets = {"inside": np.zeros((inside, 1)), "edge": np.asarray(equation.solution(found["edge"]))[:, None]}
    x, y = jax.tree.map(jnp.asarray, (found, targets))
    return Part(x, y)


def error(equation: Equation, tests: int = 2000) -> Callable[[Any], float]:
    """Variables -> the relative L2 error at points that were not trained on."""
    seen = np.random.default_rng(10_000).uniform(equation.low, equation.high, (tests, len(equation.low)))
    right, seen = jnp.asarray(equation.solution(seen)), jnp.asarray(seen)

    of = jax.jit(lambda params: jnp.linalg.norm(net(params, seen) - right) / jnp.linalg.norm(right))
    return lambda variables: float(of(variables["params"]))
