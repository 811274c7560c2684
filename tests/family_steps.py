"""The first step of each method on the families of nets, beside what the definitions say of it."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import dense_families as families
import jax
import numpy as np
import pytest
from dense_families import NETS, dense
from methods_table import lifted

import natgrad_jax as ng

DAMPING = 0.03
_EACH = {"damping": DAMPING, "refresh_every": 1}
_BOTH = {**_EACH, "statistics_every": 1}
_TENSORS = {**_BOTH, "statistics": "gradient"}
METHODS: dict[str, Callable[..., Any]] = {
    "kfac": partial(ng.scale_by_kfac, split="exact", **_BOTH),
    "kfac pi": partial(ng.scale_by_kfac, split="pi", **_BOTH),
    "ekfac": partial(ng.scale_by_ekfac, **_BOTH),
    "tkfac": partial(ng.scale_by_tkfac, split="exact", **_BOTH),
    "tekfac": partial(ng.scale_by_tekfac, damping_rule="scalar", **_BOTH),
    "tengrad": partial(ng.scale_by_tengrad, **_EACH),
    "tengrad joint": partial(ng.scale_by_tengrad, blocks="joint", **_EACH),
    "kbfgs": partial(ng.kbfgs, 1.0, damping=DAMPING, momentum=None, kl_clip=None),
    "tnt": lambda layers: ng.scale_by_tnt(layers=layers, **_TENSORS),
    "tnt of examples": partial(ng.scale_by_tnt, estimator="per_example", **_BOTH),
    "mbf": lambda layers: ng.scale_by_mbf(layers=layers, **_TENSORS),
    "shampoo": lambda layers: ng.scale_by_shampoo(layers=layers, **_TENSORS),
    "soap": lambda layers: ng.scale_by_soap(layers=layers, **_TENSORS),
}


@cache
def watched(family: str, examples: int = 6, labels: str = "exact") -> Any:
    """Capture and layers of a family; its gradient and evidence on the batch of `dense`."""
    said = dense(family, examples, labels)
    capture = ng.linen.capture(NETS[family], ng.losses.softmax_cross_entropy, labels=labels)

    @jax.jit
    def measure(variables):
        out = capture.value_and_grad(variables, said.x, said.y)
        return out.grad, out.curvature()

    return capture, capture.layers(said.variables, said.x), measure(said.variables)


def labels_of(method: str) -> str:
    """Of the capture: K-BFGS learns from the gradient of a loss."""
    return "true" if method == "kbfgs" else "exact"


@cache
def stepped(family: str, method: str, examples: int = 6) -> tuple[Any, Any]:
    """The first direction of a method, a tree, and its state."""
    capture, layers, (grad, evidence) = watched(family, examples, labels_of(method))
    said, tx = dense(family, examples), METHODS[method](layers)

    @jax.jit
    def update(variables, grad, evidence):
        if method == "kbfgs":  # which measures its own step
            out = capture.value_and_grad(variables, said.x, said.y)
            grad, evidence = out.grad, out.curvature
        return tx.update(grad, tx.init(grad), variables["params"], curvature=evidence)

    return update(said.variables, grad, evidence)


class Copy(NamedTuple):
    """One matrix: the definitions' a [N, T, I], g [K, N, T, O], D [K, N, I, O] and gradient, and what the method has.

    Attributes:
        found: its direction [I, O].
        statistics: of the layer, the axis of the copy taken away.
        operator: of the layer, likewise.
    """

    a: Any
    g: Any
    d: Any
    grad: Any
    found: Any
    statistics: Any
    operator: Any


def copies(family: str, method: str, name: str, examples: int = 6) -> list[Copy]:
    """Those of a layer."""
    said, (direction, state) = dense(family, examples, labels_of(method)), stepped(family, method, examples)
    layer, state = watched(family, examples, labels_of(method))[1][name], lifted(state)
    grad, found = (np.asarray(families.matrix(family, name, tree)) for tree in (said.grad, direction))
    kept = state.statistics[name], state.operators[name].value
    arrays = map(np.asarray, (said.inputs[name], said.cotangents[name], said.examples[name]))
    a, g, d = arrays
    return [
        Copy(
            *(a[at], g[:, at], d[:, :, at], grad[at], found[at]),
            *jax.tree.map(lambda leaf, at=at: np.asarray(leaf)[at] if layer.stack else np.asarray(leaf), kept),
        )
        for at in range(len(a))
    ]


def cells(theorems):
    """Every theorem on every family, all but one `full`."""
    return [
        pytest.param(name, family, marks=() if family == theorem.default else pytest.mark.full)
        for name, theorem in theorems.items()
        for family in NETS
    ]


def of_families(default: str):
    """One family by default."""
    rows = [family if family == default else pytest.param(family, marks=pytest.mark.full) for family in NETS]
    return pytest.mark.parametrize("family", rows)
