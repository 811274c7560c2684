"""The theorems of methods that see a gradient as a tensor, on the families of nets, in float64.

Each compares the direction of every array with its definition from the gradient alone, in the modes (window, C, O) of a
convolution, of each group and of each copy in a scan by itself. One family runs by default, the others by `-m full`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from dense_families import CHANNELS, GROUPED, LAYERS, dense, tensors
from family_steps import DAMPING, cells, of_families, stepped
from methods_table import lifted
from reference import CONTROL, assert_equal, damped, error
from tensors import kron, moments, solved, units

from natgrad_jax.algebra import averages

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.whole, pytest.mark.slow]


def roots(gradient, power: float):
    """(H_i + damping I)^power of every mode."""
    for moment in moments(gradient[None]):
        values, vectors = np.linalg.eigh(damped(moment, DAMPING))
        yield (vectors * values**power) @ vectors.T


def tnt(gradient):
    factors, strength = moments(gradient[None]), DAMPING ** (1 / gradient.ndim)
    return solved(units(factors), strength, gradient), solved(factors, strength, gradient)


def shampoo(gradient):
    whitened = [kron(roots(gradient, power / gradient.ndim)) @ gradient.ravel() for power in (-0.5, -1.0)]
    return [each.reshape(gradient.shape) for each in whitened]


def soap(gradient):
    adam = gradient / np.sqrt(gradient**2 + DAMPING)
    if gradient.ndim == 1:
        return adam, gradient
    q = kron(np.linalg.eigh(moment)[1] for moment in moments(gradient[None]))
    turned = gradient.ravel() @ q
    return (q @ (turned / np.sqrt(turned**2 + DAMPING))).reshape(gradient.shape), adam


def mbf(gradient):
    """A convolution by windows, a layer with its bias by outputs, the bias of a convolution by itself."""
    if gradient.ndim == 1:
        return gradient / (gradient**2 + DAMPING), gradient / DAMPING
    if gradient.ndim == 3:
        own = np.sum(gradient**2, axis=0)
        return gradient / (own + DAMPING), gradient / (gradient**2 + DAMPING)
    shared = gradient.T @ gradient / len(gradient)
    return gradient @ np.linalg.inv(damped(shared, DAMPING)), gradient / (gradient**2 + DAMPING)


class OfTensors(NamedTuple):
    """gradient -> the definition, a control; of the method on all families; whether a dense layer is one tensor."""

    says: Callable[[Any], Any]
    method: str
    default: str
    whole: bool = False


OF_TENSORS = {
    "C69 TNT solves with the product of normalised factors": OfTensors(tnt, "tnt", "mlp"),
    "C47 Shampoo divides by the 2k-th root of the moment of each of k modes": OfTensors(shampoo, "shampoo", "mlp"),
    "C41 SOAP is Adam in the eigenbasis of the modes": OfTensors(soap, "soap", "mlp"),
    "C80 MBF solves with one block of the outputs, C79 or one of each window": OfTensors(mbf, "mbf", "dilated", True),
}


@pytest.mark.parametrize(("theorem", "family"), cells(OF_TENSORS))
def test_a_theorem_of_a_tensor_holds_on_a_family(theorem, family):
    says, method, _, whole = OF_TENSORS[theorem]
    direction, apart = stepped(family, method)[0], []
    for name in LAYERS[family]:
        pairs = (tensors(family, name, tree, whole) for tree in (dense(family).grad, direction))
        for gradient, found in zip(*pairs, strict=True):
            if np.linalg.norm(gradient) > 1e-12:  # nothing but rounding in front of a norm, or at the keys of attention
                expected, control = says(gradient)
                assert_equal(found, expected)
                apart.append(error(control, found))
    assert max(apart) > CONTROL


@of_families("dilated")
def test_c78_the_factors_of_tnt_are_the_partial_traces_of_the_block_of_an_array(family):
    said, state, apart = dense(family), lifted(stepped(family, "tnt of examples")[1]), []
    for name in LAYERS[family]:
        examples = np.einsum("snti,ksnto->knsio", said.inputs[name], said.cotangents[name])
        batch = examples.sum(1, keepdims=True) / len(said.x) ** 0.5
        folder, _, parts = name.rpartition("/")
        for number, part in enumerate(parts.split("+")):
            one, other = (
                by_role(family, name, np.split(each, len(parts.split("+")), axis=-1)[number])
                for each in (examples, batch)
            )
            for role, draws in one.items():
                found = averages.mean(state.statistics[f"{folder}/{part}/{role}".strip("/")])
                for copy in range(draws.shape[1]):
                    expected, control = moments(draws[:, copy]), moments(other[role][:, copy])
                    for factor, right, wrong in zip(found, expected, control, strict=True):
                        factor = np.asarray(factor).reshape(-1, *right.shape)[copy]
                        if np.linalg.norm(right) > 1e-20:  # else nothing but rounding
                            assert_equal(factor, right)
                            apart.append(error(wrong, factor))
    assert max(apart) > CONTROL


def by_role(family: str, name: str, gradients):
    """Kernel and bias of D [K, N, S, I, O] as draws [K N, S, modes], the bias of all groups as one vector."""
    gradients = gradients.reshape(-1, *gradients.shape[2:])
    if "Embed" in name:
        return {"embedding": gradients}
    if "/ii+" in name:
        return {"kernel": gradients}
    kernel, bias = gradients[..., :-1, :], gradients[..., -1, :]
    if channels := CHANNELS.get((family, name)):
        kernel = kernel.reshape(*kernel.shape[:2], -1, channels, kernel.shape[-1])
    return {"kernel": kernel, "bias": bias.reshape(len(bias), 1, -1) if (family, name) in GROUPED else bias}
