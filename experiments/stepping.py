"""Every method as a compiled step on a batch of noise: how long it takes to compile, what it holds, blocks of steps.

What is measured of each, and why so, is said in `speed`.
"""

import importlib
import importlib.util
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import natgrad_jax as ng
from experiments import nets
from experiments.training import Make, Setting


class Method(NamedTuple):
    """A method at its periods.

    Attributes:
        name: for people.
        of: its name in the package it comes from.
        make: setting, layers -> optimizer; None for what owns its loop.
        statistics_every: steps between statistics, if it has such a period.
        refresh_every: steps between refreshes, if it has such a period.
        labels: of the curvature, as `ng.linen.capture` takes them; None for plain gradients.
    """

    name: str
    of: str
    make: Make | None
    statistics_every: int | None = None
    refresh_every: int | None = None
    labels: Literal["sampled", "true"] | None = None

    @property
    def period(self) -> int:
        """Steps after which everything has come round."""
        return math.lcm(self.statistics_every or 1, self.refresh_every or 1)


FREQUENT, RARE = (1, 10), (10, 100)


def ours(
    name: str,
    method: Callable[..., Any],
    *between: tuple[int, int],
    labels: Literal["sampled", "true"] = "sampled",
    **options: Any,
) -> list[Method]:
    """A method of the package at pairs of periods, of statistics and of refreshes, as far as it has such keywords."""
    own, found = inspect.signature(method).parameters, []
    for often in (FREQUENT, *between, RARE):
        periods = dict(zip(("statistics_every", "refresh_every", "rescale_every"), (*often, often[0]), strict=True))
        periods = {period: steps for period, steps in periods.items() if period in own}
        fixed = periods | ({"early_refresh": False} if "early_refresh" in own else {}) | options

        def make(setting: Setting, layers: Any, fixed: dict[str, Any] = fixed) -> optax.GradientTransformation:
            return method(layers=layers, **{"learning_rate": setting.rate, "damping": setting.damping} | fixed)

        statistics_every, refresh_every = map(periods.get, ("statistics_every", "refresh_every"))
        found.append(Method(name, method.__name__, make, statistics_every, refresh_every, labels))
    return found


ADAM = Method("Adam", "adam", lambda setting, _: optax.adam(setting.rate))
ADAPTIVE: dict[str, Any] = {
    "learning_rate": "quadratic",
    "momentum": "quadratic",
    "damping": ng.adaptive_damping(calibration=0),  # which would test each of the first steps
}
METHODS = (
    ADAM,
    Method("SGD-m", "sgd", lambda setting, _: optax.sgd(setting.rate, 0.9)),
    *ours("K-FAC", ng.kfac, (10, 10)),
    *ours("K-FAC, adaptive", ng.kfac, **ADAPTIVE),
    *ours("TKFAC", ng.tkfac),
    *ours("EKFAC", ng.ekfac),
    *ours("K-FAC, rank", ng.kfac, rank="auto"),
    *ours("EKFAC, rank", ng.ekfac, rank="auto"),
    *ours("K-FAC, rolling", ng.kfac, rolling=True),
    *ours("TEKFAC", ng.tekfac),
    *ours("TENGraD", ng.tengrad),
    *ours("K-BFGS", ng.kbfgs, labels="true"),
    *ours("K-BFGS(L)", ng.kbfgs, labels="true", memory=100),
    *ours("TNT", ng.tnt),
    *ours("MBF", ng.mbf),
    *ours("Shampoo, grafted", ng.shampoo, graft_to="adam"),
    *ours("SOAP", ng.soap),
    *([Method("kfac-jax", "kfac-jax", None, *FREQUENT)] if importlib.util.find_spec("kfac_jax") else ()),
)


@dataclass(frozen=True)
class Problem:
    """A model, its likelihood, one batch and the first parameters."""

    model: nn.Module
    likelihood: ng.losses.Likelihood
    inputs: jax.Array
    targets: jax.Array
    params: Any

    def outputs(self, params: Any, inputs: jax.Array) -> Any:
        """The model's outputs, without any capture."""
        return self.model.apply({"params": params}, inputs)


TOKENS = 8192
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "autoencoder": (nets.Autoencoder((1000, 500, 250, 30)), (500, 784)),
    "cnn": (nets.ThreeStages((16, 32, 64)), (128, 28, 28, 1)),
    "transformer": (nets.Transformer(layers=4, width=256, heads=4, tokens=TOKENS), (8, 128)),
    "tiny": (nets.TanhNet((8,)), (16, 12)),
}
"""A model and the shape of its inputs."""


def problem(name: str, seed: int) -> Problem:
    """The model of that name with a batch of noise."""
    model, shape = MODELS[name]
    if name == "transformer":
        x = jax.random.randint(jax.random.key(seed), shape, 0, TOKENS)
    else:
        x = jax.random.uniform(jax.random.key(seed), shape)
    params = jax.jit(model.init)(jax.random.key(seed), x)["params"]
    if name == "autoencoder":
        return Problem(model, ng.losses.sigmoid_binary_cross_entropy, x, x, params)
    y = jnp.roll(x, -1, axis=1) if name == "transformer" else jnp.arange(len(x)) % 10
    return Problem(model, ng.losses.softmax_cross_entropy, x, y, params)


def program(method: Method, given: Problem, setting: Setting) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """A method on a problem.

    Args:
        method: with a `make`.
        given: the problem.
        setting: learning rate and damping.

    Returns:
        Parameters, state, inputs, targets, key -> parameters, state; and parameters -> state.
    """
    assert method.make is not None
    capture = ng.linen.capture(given.model, given.likelihood, labels=method.labels or "sampled")
    layers = capture.layers({"params": given.params}, given.inputs)
    tx = optax.with_extra_args_support(method.make(setting, layers))

    def plain(params, state, x, y, key):
        del key
        grad = jax.grad(lambda params: given.likelihood(given.outputs(params, x), y))(params)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    def step(params, state, x, y, key):
        out = capture.value_and_grad({"params": params}, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    return step if method.labels else plain, tx.init


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


class Runner:
    """One optimizer on one problem: a compiled step with donated state.

    Attributes:
        seconds: of tracing, lowering and compiling.
        held: bytes of parameters and state.
        peak: bytes that the compiled step needs at once; None where the backend does not say.
        lines: of the compiled program, in XLA's text.
    """

    def __init__(self, method: Method, given: Problem, setting: Setting):
        """Compile the step and take the first one."""
        step, init = program(method, given, setting)
        self._fixed = given.inputs, given.targets
        self._key = jax.random.key(1)
        self._carry = jax.tree.map(jnp.array, (given.params, jax.jit(init)(given.params)))
        self.held = size(self._carry)
        jax.clear_caches()  # else what one method has traced the next need not trace again
        start = time.perf_counter()
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry, *self._fixed, self._key).compile()
        self.seconds: float | None = time.perf_counter() - start
        self.peak = peak(self._step.memory_analysis())
        self.lines: int | None = (self._step.as_text() or "").count("\n")
        self.block(1)

    def block(self, steps: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self._key, key = jax.random.split(self._key)
            self._carry = self._step(*self._carry, *self._fixed, key)
        jax.block_until_ready(self._carry)
        return time.perf_counter() - start


def peak(found: Any) -> int | None:
    """Bytes that a program needs at once, by what XLA says of it; None if it says nothing."""
    if found is None:
        return None
    sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes
    return sum(sizes) - found.alias_size_in_bytes


class Peer:
    """kfac-jax, which owns its loop: as far as it can be measured, the same as a `Runner`."""

    def __init__(self, method: Method, given: Problem, setting: Setting):
        """Compile the step and take the first one."""
        kfac_jax = importlib.import_module("kfac_jax")

        def loss(params, batch):
            outputs = given.outputs(params, batch[0])
            if given.likelihood is ng.losses.softmax_cross_entropy:
                kfac_jax.register_softmax_cross_entropy_loss(outputs, batch[1])
            else:
                kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, batch[1])
            return given.likelihood(outputs, batch[1])

        self._setting, self._batch = setting, (given.inputs, given.targets)
        self._optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(loss),
            l2_reg=0.0,
            use_adaptive_learning_rate=False,
            use_adaptive_momentum=False,
            use_adaptive_damping=False,
            inverse_update_period=method.refresh_every,
            num_burnin_steps=0,
            estimation_mode="fisher_gradients",
            multi_device=False,
        )
        self._key, self._count = jax.random.key(1), 0
        self._params = jax.tree.map(jnp.array, given.params)
        self._state = self._optimizer.init(self._params, self._key, self._batch)
        self.block(1)
        self.held = size((self._params, self._state))
        self.seconds = self.peak = self.lines = None

    def block(self, steps: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self._key, key = jax.random.split(self._key)
            self._params, self._state, _ = self._optimizer.step(
                self._params,
                self._state,
                key,
                batch=self._batch,
                global_step_int=self._count,
                learning_rate=jnp.asarray(self._setting.rate),
                momentum=jnp.asarray(0.9),
                damping=jnp.asarray(self._setting.damping),
            )
            self._count += 1
        jax.block_until_ready((self._params, self._state))
        return time.perf_counter() - start
