"""Each call of `wrong_calls.txt` says exactly what stands below it, and says so itself: no exception is of JAX.

The file has a call in a line that starts with ">>> ", and behind it the type of the exception and its sentence.
"""

import traceback
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from methods_table import measured, task

import natgrad_jax as ng

TABLE = Path(__file__).with_name("wrong_calls.txt").read_text()
PACKAGE = Path(ng.__file__).parent


def rows():
    """(call, what it says) of the table."""
    parts = (part.partition("\n\n")[0].partition("\n") for part in TABLE.split(">>> ")[1:])  # headings are left out
    return [(call, " ".join(line.strip() for line in said.splitlines())) for call, _, said in parts]


@cache
def names():
    """What the calls are made of: a net of three dense layers, a batch of eight, optimizers and their states."""
    problem = task("mlp")
    gradient, evidence = measured("mlp")
    layers, params = problem.layers, problem.variables["params"]
    model, likelihood = problem.capture.model, ng.losses.softmax_cross_entropy
    tx = ng.scale_by_kfac(layers, damping=0.1)
    net = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    return {
        **{"jax": jax, "jnp": jnp, "np": np, "optax": optax, "nn": nn, "nnx": nnx, "ng": ng},
        **{"capture": problem.capture, "variables": problem.variables, "params": params, "layers": layers},
        **{"x": problem.x[0], "y": problem.y[0], "key": jax.random.key(0), "apply": lambda params, x: x},
        **{"gradient": gradient, "evidence": evidence, "tx": tx, "state": tx.init(params)},
        "other_state": tx.init(params)._replace(statistics=ng.scale_by_ekfac(layers, damping=0.1).init(params)),
        "on_axis": ng.linen.capture(model, likelihood, axis_name="batch"),
        "in_pieces": ng.linen.capture(model, likelihood, microbatches=3),
        "squares": ng.linen.capture(model, ng.losses.squared_error, labels="true"),
        "adaptive": ng.kfac("quadratic", layers, damping=ng.adaptive_damping()),
        "stepping": ng.kbfgs(0.1, layers),
        "ekfac": ng.scale_by_ekfac(layers, damping=0.1),
        **{"net": net, "nnx_capture": ng.nnx.capture(net, likelihood)},
        "out": problem.capture.value_and_grad(problem.variables, problem.x[0], problem.y[0], key=jax.random.key(0)),
        "train": TrainState.create(apply_fn=model.apply, params=params, tx=tx),
    }


def outcome(call):
    """Type and sentence of the exception, and whether the package raised it."""
    try:
        eval(call, dict(names()))
    except Exception as error:
        (*_, last) = traceback.extract_tb(error.__traceback__)
        said = " ".join(str(error).split())
        return f"{type(error).__name__}: {said}", Path(last.filename).is_relative_to(PACKAGE)
    return "nothing", False


def test_the_table_has_a_hundred_and_twenty_calls():
    calls = [call for call, _ in rows()]
    assert len(calls) >= 120 and len(set(calls)) == len(calls)


@pytest.mark.parametrize(("call", "sentence"), [pytest.param(*each, id=each[0]) for each in rows()])
def test_a_wrong_call_says_what_is_wrong(call, sentence):
    said, is_ours = outcome(call)
    assert said == sentence
    assert is_ours and said.startswith(("ValueError: ", "TypeError: "))


@pytest.mark.parametrize("call", ["params['Dense_9']", "jnp.ones(3) @ jnp.ones(4)", "ng.kfac(0.1, layers)"])
def test_an_exception_of_another_and_none_at_all_are_told_apart(call):
    said, is_ours = outcome(call)
    assert not is_ours or said == "nothing"
