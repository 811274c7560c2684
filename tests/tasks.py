"""The small problems for the laws: nets in linen and their twins in NNX, each as a task that does not show which it is.

A law asks a `Task` for parameters and evaluations. Which framework it is of says `on`, around the law; linen if nothing
is said. Twins have the same names and start from the same numbers.
"""

from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import natgrad_jax as ng

FRAMEWORKS = ("linen", "nnx")
_current = ["linen"]


@contextmanager
def on(framework: str):
    """Tasks of one framework within."""
    _current.append(framework)
    try:
        yield
    finally:
        _current.pop()


def kept(function: Any) -> Any:
    """A function whose results are kept, those of each framework apart."""

    @cache
    def of(framework, *args, **kwargs):
        del framework
        return function(*args, **kwargs)

    @wraps(function)
    def current(*args, **kwargs):
        return of(_current[-1], *args, **kwargs)

    current.cache_clear = of.cache_clear
    return current


@pytest.fixture(autouse=True, params=["linen", pytest.param("nnx", marks=pytest.mark.full)])
def both_frameworks(request):
    """Of a file that names it: its tests run on tasks of linen, with `-m full` on those of NNX."""
    with on(request.param):
        yield


class MLP(nn.Module):
    """Three dense layers, two of them of one shape, if nothing else is said."""

    dtype: Any = jnp.float32
    width: int = 5
    hidden: int = 2
    outputs: int = 3

    @nn.compact
    def __call__(self, x):
        for _ in range(self.hidden):
            x = nn.tanh(nn.Dense(self.width, dtype=self.dtype, param_dtype=self.dtype)(x))
        return nn.Dense(self.outputs, dtype=self.dtype, param_dtype=self.dtype)(x)


class MLPTwin(nnx.Module):
    """The same in NNX."""

    def __init__(self, inputs: int, net: MLP):
        both = {"dtype": net.dtype, "param_dtype": net.dtype, "rngs": nnx.Rngs(0)}
        self.hidden = net.hidden
        for number, outputs in enumerate((*[net.width] * net.hidden, net.outputs)):
            setattr(self, f"Dense_{number}", nnx.Linear(inputs, outputs, **both))
            inputs = outputs

    def __call__(self, x):
        for number in range(self.hidden):
            x = nnx.tanh(getattr(self, f"Dense_{number}")(x))
        return getattr(self, f"Dense_{self.hidden}")(x)


class ConvNet(nn.Module):
    """A convolution and a grouped one, a normalisation (parameters of no known layer), a dense layer."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        both = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Conv(4, (3, 3), strides=2, **both)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, **both)(x))
        x = nn.relu(nn.Conv(4, (2, 2), padding="VALID", feature_group_count=2, **both)(x))
        return nn.Dense(3, use_bias=False, **both)(x.reshape(x.shape[0], -1))


class ConvNetTwin(nnx.Module):
    """The same in NNX."""

    def __init__(self, net: ConvNet):
        both = {"dtype": net.dtype, "param_dtype": net.dtype, "rngs": nnx.Rngs(0)}
        self.Conv_0 = nnx.Conv(2, 4, (3, 3), strides=2, **both)
        self.BatchNorm_0 = nnx.BatchNorm(4, **both)
        self.Conv_1 = nnx.Conv(4, 4, (2, 2), padding="VALID", feature_group_count=2, **both)
        self.Dense_0 = nnx.Linear(16, 3, use_bias=False, **both)

    def __call__(self, x):
        x = nnx.relu(self.BatchNorm_0(self.Conv_0(x)))
        return self.Dense_0(nnx.relu(self.Conv_1(x)).reshape(x.shape[0], -1))


class Dense(nnx.Linear):
    """One dense layer, by the name that linen has for it."""


class Task(NamedTuple):
    """A watched model and some batches: x [4, N, ...], integer labels y [4, N].

    Attributes:
        capture: the watched model.
        variables: its parameters under "params", and what else it has.
        layers: of the model.
        x: inputs.
        y: labels.
        graph: of an NNX model, None of a linen one.
    """

    capture: Any
    variables: Any
    layers: ng.Layers
    x: jax.Array
    y: jax.Array
    graph: Any = None

    @property
    def params(self) -> Any:
        """The first parameters."""
        return self.variables["params"]

    def evaluate(self, params: Any, x: Any, y: Any, **settings: Any) -> Any:
        """Loss, gradient and curvature of a batch at some parameters; what else the model has is as at first."""
        if self.graph is None:
            variables = {**self.variables, "params": params}
        else:
            variables = nnx.merge(self.graph, params, self.variables["rest"], copy=True)
        return self.capture.value_and_grad(variables, x, y, **settings)


TASKS = ("mlp", "convnet")
FAMILIES = tuple(families.NETS)
"""Further nets, of linen alone, of the laws that no relative stands for on them."""
_OTHERS = {
    **{name: {} for name in FAMILIES},
    **{f"{name} true labels": {"labels": "true"} for name in FAMILIES},
    "mlp": {},
    "convnet": {},
    "mlp true labels": {"labels": "true"},
    "mlp bfloat16": {"dtype": "bfloat16"},
    "convnet bfloat16": {"dtype": "bfloat16"},
    "mlp wide": {"examples": 1024, "width": 16},
    "dense": {"labels": "true"},
}
ALL_TASKS = tuple(name for name in _OTHERS if name.split()[0] not in FAMILIES)
"""Those that have a twin in NNX."""


@kept
def task(name: str) -> Task:
    """The problem of that name, in the framework that is on."""
    return _task(name.split()[0], **_OTHERS[name])


def _task(model: str, labels: str = "sampled", dtype: str = "float32", examples: int = 8, width: int = 5) -> Task:
    dtype = jnp.dtype(dtype)
    if model in FAMILIES and _current[-1] != "linen":
        pytest.skip(f"{model} has no twin in NNX")
    shape = {"convnet": (6, 6, 2), **families.SHAPES}.get(model, (width,))
    rng = np.random.default_rng(7)  # drawn by NumPy, which compiles nothing
    x = jnp.asarray(rng.normal(size=(4, examples, *shape)), dtype)
    y = jnp.asarray(rng.integers(3, size=(4, examples)), jnp.int32)
    # six outputs, so that no factor of "dense" has several null vectors: any basis of these were as good as another
    nets = {"mlp": MLP(dtype, width), "convnet": ConvNet(dtype), "dense": nn.Dense(6), **families.NETS}
    return watched(nets[model], x, y, jax.random.key(2), labels)


def watched(net: nn.Module, x: Any, y: Any, key: Any, labels: str = "sampled") -> Task:
    """The task of a net, or of its twin with the same numbers; x [4, N, ...], y [4, N]."""
    variables = jax.jit(net.init)(key, x[0])
    if _current[-1] == "linen":
        capture = ng.linen.capture(net, ng.losses.softmax_cross_entropy, labels=labels, verify=False)
        return Task(capture, variables, capture.layers(variables, x[0]), x, y)
    model = _twin(net, x.shape[-1])
    state = nnx.state(model)
    for numbers in variables.values():
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.copy, numbers))
    nnx.update(model, state)
    capture = ng.nnx.capture(model, ng.losses.softmax_cross_entropy, labels=labels, verify=False)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return Task(capture, {"params": params, "rest": rest}, capture.layers(model, x[0]), x, y, graph)


def _twin(net: nn.Module, inputs: int) -> nnx.Module:
    """The same net in NNX."""
    if isinstance(net, MLP):
        return MLPTwin(inputs, net)
    return ConvNetTwin(net) if isinstance(net, ConvNet) else Dense(inputs, net.features, rngs=nnx.Rngs(0))
