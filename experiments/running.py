"""A method compiled on a task for all the numbers that are tried of it, and its steps; kfac-jax has the same face."""

import importlib
import importlib.util
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import natgrad_jax as ng
from experiments.data import Part
from natgrad_jax.around.averaging import AveragedState

Numbers = dict[str, Any]
"""What is tried of a method by name, such as its learning rate; on the device they are arrays."""
Make = Callable[[Any, Any], optax.GradientTransformation]
"""Numbers and layers -> the optimizer."""
Labels = Literal["exact", "sampled", "true"]


class Task(NamedTuple):
    """What all methods of a comparison have in common; `pde.Task` is another one.

    The batch has as many examples as a step; the model is given options while it trains, such as `train`.
    """

    model: nn.Module
    likelihood: ng.losses.Likelihood
    batch: Any
    options: Mapping[str, Any] = {}

    def init(self, key: jax.Array) -> Any:
        """The first variables."""
        return _init(self.model, key, self.batch.images[:1])

    def loss(self, variables: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """The loss of a batch, without any capture, and what the model writes, such as batch statistics."""
        others = [name for name in variables if name != "params"]
        outputs, written = self.model.apply(variables, x, **self.options, mutable=others)
        return self.likelihood(outputs, y), written

    def measured(self, *parts: Part) -> Callable[[Any], float]:
        """Variables -> the mean loss of some batches."""
        loss = jax.jit(self.loss)
        return lambda variables: float(np.mean([loss(variables, *part)[0] for part in parts]))

    def capture(self, labels: Labels, product_stride: int = 1) -> Any:
        """What watches the model."""
        return ng.linen.capture(self.model, self.likelihood, labels=labels, product_stride=product_stride)


@partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, key: jax.Array, x: Any) -> Any:
    """Compiled once for all methods."""
    return model.init(key, x)


Seen = namedtuple("Seen", ("grad", "curvature"))
"""What a warm start reads of one batch."""


class Runner:
    """One method on a task, compiled once for all numbers of the same names.

    Attributes:
        carry: parameters, state of the optimizer, and the other collections of the model.
        steps: taken since the start.
        compile_seconds: of tracing, lowering and compiling, once that is done, at the first step.
    """

    def __init__(
        self,
        make: Make,
        numbers: Numbers,
        task: Any,
        labels: Labels | None = "sampled",
        *,
        stretch: int = 1,
        product_stride: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        compiler: Mapping[str, Any] = {},
    ):
        """Watch the model, unless the labels are None, and stand at the start.

        A program has `stretch` steps; products with F are of every `product_stride`-th example; the clock says seconds;
        the options are XLA's, left out where this release does not have them.
        """
        self._task, self._stretch, self._clock, self._compiler = task, stretch, clock, compiler
        self._capture, layers = None, None
        if labels:
            variables = jax.eval_shape(task.init, jax.random.key(0))
            self._capture = task.capture(labels, product_stride)
            layers = self._capture.layers(variables, task.batch.images, **task.options)
        self._optimizer = lambda numbers: optax.with_extra_args_support(make(numbers, layers))
        self._start = jax.jit(lambda numbers, params: self._optimizer(numbers).init(params))
        self.compile_seconds: float | None = None
        self.begin(numbers)

    @cached_property
    def program(self) -> Any:
        """The compiled step, or so many of them."""
        before = time.perf_counter()
        arguments = next(self._stretches([self._task.batch] * self._stretch))
        lowered = jax.jit(self._steps, donate_argnums=0).lower(self.carry, *arguments, self._numbers)
        try:
            program = lowered.compile(dict(self._compiler))
        except jax.errors.JaxRuntimeError:  # of a release that has no such option
            program = lowered.compile()
        self.compile_seconds = time.perf_counter() - before
        return program

    def _evaluate(self, params: Any, others: Any, x: Any, y: Any, key: jax.Array) -> Any:
        capture: Any = self._capture
        return capture.value_and_grad({"params": params, **others}, x, y, key=key, **self._task.options)

    def _step(self, carry: Any, x: Any, y: Any, key: jax.Array, numbers: Any) -> Any:
        params, state, others = carry
        optimizer = self._optimizer(numbers)
        if self._capture is None:

            def loss(params):
                return self._task.loss({"params": params, **others}, x, y)

            def value_fn(params):
                return loss(params)[0]

            if optax.tree.get(state, "value") is None:
                (value, written), grad = jax.value_and_grad(loss, has_aux=True)(params)
                others = {**others, **written}
            else:  # a line search has both at its end
                value, grad = optax.value_and_grad_from_state(value_fn)(params, state=state)
            updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        else:
            out = self._evaluate(params, others, x, y, key)
            value, others = out.value, getattr(out, "updated", None) or others
            updates, state = optimizer.update(out.grad, state, params, curvature=out.curvature)
        return (optax.apply_updates(params, updates), state, others), value

    def _steps(self, carry: Any, x: Any, y: Any, key: jax.Array, numbers: Any) -> Any:
        if self._stretch == 1:
            return self._step(carry, x, y, key, numbers)
        return jax.lax.scan(lambda carry, now: self._step(carry, *now, numbers), carry, (x, y, key))

    def _stretches(self, stream: Iterable[Part]) -> Iterator[Any]:
        """Inputs, labels and key of a step, or stacked of several; what is left over is dropped.

        Yields:
            Those of a program.
        """
        stream, count = iter(stream), self.steps
        while len(some := list(islice(stream, self._stretch))) == self._stretch:
            keys = [jax.random.fold_in(self._key, (count + index) % 2**31) for index in range(self._stretch)]
            count += self._stretch
            if self._stretch == 1:
                yield *some[0], keys[0]
            else:
                yield *jax.tree.map(lambda *leaves: np.stack(leaves), *some), jnp.stack(keys)

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables where it stands, or the averages of its parameters if the optimizer keeps some."""
        params, state, others = self.carry
        return {"params": ng.averaged_params(state) if isinstance(state, AveragedState) else params, **others}

    def begin(self, numbers: Numbers, seed: int = 0) -> None:
        """Go back to the start; the seed is that of the parameters and of the labels drawn."""
        self._key, self.steps = jax.random.key(seed), 0
        self._numbers = jax.tree.map(jnp.float32, numbers)
        others = dict(self._task.init(self._key))
        params = others.pop("params")
        carry = params, self._start(self._numbers, params), others
        self.carry: tuple[Any, Any, Any] = jax.tree.map(jnp.array, carry)  # which is donated, each array once

    def warm(self, stream: Iterable[Part]) -> None:
        """Fill the statistics with some batches at the first parameters."""
        params, state, others = self.carry
        seen = jax.jit(lambda *given: Seen((out := self._evaluate(*given)).grad, out.curvature()))
        keys = (jax.random.fold_in(self._key, (-1 - index) % 2**31) for index in range(2**31))
        passed = (seen(params, others, x, y, key) for (x, y), key in zip(stream, keys, strict=False))
        self.carry = params, ng.warm_start(self._optimizer(self._numbers), state, passed, params), others

    def restore(self, leaves: list[np.ndarray], steps: int) -> bool:
        """Go on from what was saved of `carry`; false if that is of another shape."""
        own, structure = jax.tree.flatten(self.carry)
        if [(leaf.shape, leaf.dtype) for leaf in own] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
            return False
        self.carry, self.steps = jax.tree.unflatten(structure, map(jnp.array, leaves)), steps
        return True

    def run(self, stream: Iterable[Part]) -> tuple[np.ndarray, float]:
        """A step for every batch; the losses of the batches, and the seconds that the steps took together."""
        program, losses, before = self.program, [], self._clock()
        for x, y, key in self._stretches(stream):
            self.carry, loss = program(self.carry, x, y, key, self._numbers)
            losses.append(loss)
            self.steps += self._stretch
        jax.block_until_ready(self.carry)
        return np.ravel(losses), self._clock() - before


def has_peer() -> bool:
    """Whether kfac-jax can be imported; its release 0.0.8 wants jax <= 0.9.1."""
    return importlib.util.find_spec("kfac_jax") is not None


class Peer:
    """kfac-jax, which owns its loop and its programs: as far as it can be, the same as a `Runner`."""

    compile_seconds = program = None

    def __init__(self, task: Task, fixed: Numbers | None = None, **options: Any):
        """Compile every branch, and stand at the start.

        Learning rate, momentum and damping are fixed, or adapt themselves; options are kfac-jax's.
        """
        kfac_jax = importlib.import_module("kfac_jax")

        def loss(params, batch):
            outputs: Any = task.model.apply({"params": params}, batch[0])
            if task.likelihood is ng.losses.softmax_cross_entropy:
                kfac_jax.register_softmax_cross_entropy_loss(outputs, batch[1])
            else:
                kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, batch[1])
            return task.likelihood(outputs, batch[1])

        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss),
            l2_reg=0.0,
            num_burnin_steps=0,
            multi_device=False,
            **{f"use_adaptive_{name}": fixed is None for name in ("learning_rate", "momentum", "damping")},
            **options,
        )
        self._task, self._fixed = task, jax.tree.map(jnp.asarray, fixed or {})
        self.begin({})
        self.run([task.batch] * 6)
        self.begin({})

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables where it stands."""
        return {"params": self.carry[0]}

    def begin(self, numbers: Numbers, seed: int = 0) -> None:
        """Go back to the start."""
        self._key, self.steps = jax.random.key(seed), 0
        params = self._task.init(self._key)["params"]
        self.carry = params, self._optimizer.init(params, self._key, tuple(self._task.batch))

    def run(self, stream: Iterable[Part]) -> tuple[np.ndarray, float]:
        """As that of a `Runner`; the losses are not read."""
        before = time.perf_counter()
        for x, y in stream:
            key = jax.random.fold_in(self._key, self.steps)
            given: dict[str, Any] = {"batch": (x, y), "global_step_int": self.steps, **self._fixed}
            self.carry = self._optimizer.step(*self.carry, key, **given)[:2]
            self.steps += 1
        jax.block_until_ready(self.carry)
        return np.zeros(0), time.perf_counter() - before
