"""What does a step cost, in units of Adam's step on the same model?

Two models: the MNIST autoencoder of the papers (784-1000-500-250-30-250-500-1000-784, ReLU, batch 500) and a small
convolutional network (16, 32 and 64 channels, strides 1, 2 and 2, dense head, 28 x 28, batch 128). The inputs are
noise: a step costs the same on noise. All optimizers of a model run in turn in one process, a block of steps each, and
a figure is the median over rounds of block time over Adam's block time, so that a busy machine spoils all alike. A
block holds whole refresh periods. The first step holds tracing and compilation.

Expected: by flop count 2.2 x Adam for K-FAC on the autoencoder with statistics every 10 and inverses every 100 steps.

If kfac-jax can be imported (its release wants jax <= 0.9.1), it runs in turn with ours: fixed settings, one sampled
label, statistics every step, inverses every 10.

glibc returns blocks above 32 MB to the system at once, so a step whose scratch memory is larger than that faults it in
again page by page, which takes more than half of Adam's time on these models. `make bench` sets the variables that
keep it.

    make bench                                        (some 5 minutes)
    make bench ARGS="--models cnn --methods kfac"
"""

import importlib
import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen as nn
from rich.console import Console
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng


@dataclass(frozen=True)
class Config:
    """Every number of the experiment."""

    models: tuple[str, ...] = ("autoencoder", "cnn")
    methods: tuple[str, ...] = ("kfac", "tkfac", "ekfac", "tekfac")  # beginnings of the names to measure beside Adam
    rounds: int = 5
    damping: float = 1.0
    learning_rate: float = 1e-6
    seed: int = 0


class Autoencoder(nn.Module):
    """The MNIST autoencoder of the papers, with a linear code."""

    @nn.compact
    def __call__(self, x):
        """Logits [N, 784] of pixels [N, 784]."""
        for width in (1000, 500, 250):
            x = nn.relu(nn.Dense(width)(x))
        x = nn.Dense(30)(x)
        for width in (250, 500, 1000):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(784)(x)


class CNN(nn.Module):
    """Three convolutions and a dense head."""

    @nn.compact
    def __call__(self, x):
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@dataclass(frozen=True)
class Problem:
    """A model, its likelihood and one batch."""

    model: nn.Module
    likelihood: ng.losses.Likelihood
    inputs: jax.Array
    targets: jax.Array

    def outputs(self, params: Any, inputs: jax.Array) -> Any:
        """The model's outputs, without any capture."""
        return self.model.apply({"params": params}, inputs)


def problem(name: str, key: jax.Array) -> Problem:
    """The model of that name with a batch of noise."""
    if name == "autoencoder":
        x = jax.random.uniform(key, (500, 784))
        return Problem(Autoencoder(), ng.losses.sigmoid_binary_cross_entropy, x, x)
    x = jax.random.uniform(key, (128, 28, 28, 1))
    return Problem(CNN(), ng.losses.softmax_cross_entropy, x, jnp.arange(128) % 10)


class Runner:
    """One optimizer on one problem: a jitted step with donated state, and its times."""

    def __init__(self, period: int, given: Problem, step: Callable[..., Any], params: Any, state: Any):
        """Compile the step and take the first one."""
        self.period, self.given = period, given
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._key = jax.random.key(1)
        self._params, self._state = jax.tree.map(jnp.array, (params, state))
        self.first = self.block(1)

    def block(self, steps: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self._key, key = jax.random.split(self._key)
            arguments = (self._params, self._state, self.given.inputs, self.given.targets, key)
            self._params, self._state = self._step(*arguments)
        jax.block_until_ready((self._params, self._state))
        return time.perf_counter() - start


def adam(given: Problem, params: Any, config: Config) -> Runner:
    """Optax's Adam with plain `jax.grad`."""
    tx = optax.adam(config.learning_rate)

    def step(params, state, x, y, key):
        del key
        grad = jax.grad(lambda params: given.likelihood(given.outputs(params, x), y))(params)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    return Runner(1, given, step, params, tx.init(params))


def natural(method: Callable[..., Any], every: tuple[int, int]) -> Callable[[Problem, Any, Config], Runner]:
    """A method of ours with statistics and refreshes at such steps."""

    def build(given, params, config):
        capture = ng.linen.capture(given.model, given.likelihood)
        layers = capture.layers({"params": params}, given.inputs)
        periods = dict(zip(("statistics_every", "refresh_every", "rescale_every"), (*every, every[0]), strict=True))
        options = {"damping": config.damping, "early_refresh": False, **periods}
        own = inspect.signature(method).parameters
        tx = method(config.learning_rate, layers, **{name: options[name] for name in options if name in own})

        def step(params, state, x, y, key):
            out = capture.value_and_grad({"params": params}, x, y, key=key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return optax.apply_updates(params, updates), state

        return Runner(every[1], given, step, params, tx.init(params))

    return build


class Peer:
    """kfac-jax, which owns its loop: the same times as a `Runner`."""

    def __init__(self, given: Problem, params: Any, config: Config):
        """Compile the step and take the first one."""
        kfac_jax = importlib.import_module("kfac_jax")

        def loss(params, batch):
            outputs = given.outputs(params, batch[0])
            if given.likelihood is ng.losses.softmax_cross_entropy:
                kfac_jax.register_softmax_cross_entropy_loss(outputs, batch[1])
            else:
                kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, batch[1])
            return given.likelihood(outputs, batch[1])

        self.period, self._config = 10, config
        self._batch = (given.inputs, given.targets)
        self._optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(loss),
            l2_reg=0.0,
            use_adaptive_learning_rate=False,
            use_adaptive_momentum=False,
            use_adaptive_damping=False,
            inverse_update_period=10,
            num_burnin_steps=0,
            estimation_mode="fisher_gradients",
            multi_device=False,
        )
        self._key, self._count = jax.random.key(1), 0
        self._params = jax.tree.map(jnp.array, params)
        self._state = self._optimizer.init(self._params, self._key, self._batch)
        self.first = self.block(1)

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
                learning_rate=jnp.asarray(self._config.learning_rate),
                momentum=jnp.asarray(0.9),
                damping=jnp.asarray(self._config.damping),
            )
            self._count += 1
        jax.block_until_ready((self._params, self._state))
        return time.perf_counter() - start


METHODS: dict[str, Callable[[Problem, Any, Config], Runner | Peer]] = {
    "adam": adam,
    **{f"kfac {every}": natural(ng.kfac, every) for every in ((1, 10), (10, 10), (10, 100))},
    **{f"tkfac {every}": natural(ng.tkfac, every) for every in ((1, 10), (10, 100))},
    **{f"ekfac {every}": natural(ng.ekfac, every) for every in ((1, 10), (10, 100))},
    **{f"tekfac {every}": natural(ng.tekfac, every) for every in ((1, 10), (10, 100))},
    **{f"tengrad {every}": natural(ng.tengrad, every) for every in ((10, 10), (100, 100))},
    **({"kfac-jax (1, 10)": Peer} if importlib.util.find_spec("kfac_jax") else {}),
}


def run(config: Config) -> list[dict[str, Any]]:
    """Measure every method on every model.

    Args:
        config: every number.

    Returns:
        One record per model and method: seconds per step, ratio to Adam and its range over rounds, first step.
    """
    records = []
    for name in config.models:
        given = problem(name, jax.random.key(config.seed))
        params = given.model.init(jax.random.key(config.seed), given.inputs)["params"]
        wanted = {method: build for method, build in METHODS.items() if method.startswith(("adam", *config.methods))}
        runners = {method: build(given, params, config) for method, build in wanted.items()}
        times: dict[str, list[float]] = {method: [] for method in runners}
        for _ in track(range(config.rounds), description=name):
            for method, runner in runners.items():
                steps = max(20, runner.period)
                times[method].append(runner.block(steps) / steps)
        for method, runner in runners.items():
            ratios = [mine / base for mine, base in zip(times[method], times["adam"], strict=True)]
            records.append({
                "model": name,
                "method": method,
                "milliseconds": 1000 * statistics.median(times[method]),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "first": runner.first / runners["adam"].first,
            })
    return records


def main(config: Config) -> None:
    """Measure and print one table."""
    table = Table(title="A step in units of Adam's step (median over rounds, in one process)")
    for column in ("model", "method (statistics, refresh)", "ms", "x Adam", "range", "first step x Adam's"):
        table.add_column(column, justify="left" if column[0] == "m" and column != "ms" else "right")
    for record in run(config):
        spread = f"{record['least']:.2f}-{record['most']:.2f}"
        cells = (f"{record['milliseconds']:.1f}", f"{record['ratio']:.2f}", spread, f"{record['first']:.1f}")
        table.add_row(record["model"], record["method"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
