"""Leaves of a tree by address: every kind of tree is named as its reader would, and only boxes are looked through."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from reference import normal

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")


class Attention(NamedTuple):
    query: Any
    value: Any


class Single(NamedTuple):
    value: Any


@jax.tree_util.register_dataclass
@dataclass
class Pair:
    value: Any
    bias: Any


W, B = jnp.ones(2), jnp.zeros(3)
# {what: (tree, its addresses)}
TREES = {
    "a dict": ({"a": {"kernel": W}, "b": B}, ["a/kernel", "b"]),
    "a tuple": ({"a": (W, B)}, ["a/0", "a/1"]),
    "a NamedTuple with a field called value": ({"a": Attention(W, B)}, ["a/query", "a/value"]),
    "a dataclass with a field called value": ({"a": Pair(W, B)}, ["a/value", "a/bias"]),
    "a key called value": ({"a": {"value": W}}, ["a/value"]),
    "a field by itself": (Attention(W, B), ["query", "value"]),
    "only a field called value": (Single(W), ["value"]),
    "a box of linen": ({"a": nn.Partitioned(W, (None,)), "b": B}, ["a", "b"]),
    "Variables of NNX": (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param), ["bias", "kernel"]),
    "a box in a field called value": ({"a": Attention(nnx.Param(W), nnx.Param(B))}, ["a/query", "a/value"]),
    "the other one masked": ({"a": Attention(optax.MaskedNode(), B)}, ["a/value"]),
    "nothing beside it": ({"a": Attention(None, B)}, ["a/value"]),
}


@pytest.mark.parametrize("what", TREES)
def test_leaves_have_the_names_that_a_reader_gives_them(what):
    tree, expected = TREES[what]
    found = ng.addresses.flatten(tree)
    assert [*found] == expected
    assert all(one is other for one, other in zip(found.values(), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("what", TREES)
def test_leaves_are_replaced_by_these_names_and_by_no_others(what):
    tree, expected = TREES[what]
    new = {address: jnp.full(4, index) for index, address in enumerate(expected)}
    changed = ng.addresses.replace(tree, new | {"elsewhere": W})
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    assert all(ng.addresses.flatten(changed)[address] is leaf for address, leaf in new.items())


def test_what_a_mask_took_away_keeps_its_name_and_is_not_replaced():
    tree = {"a": Attention(W, optax.MaskedNode())}
    assert ng.addresses.masked(tree) == {"a/value"}
    assert ng.addresses.replace(tree, {"a/value": B}) == tree


def test_two_leaves_of_one_name_are_refused_with_both_paths():
    with pytest.raises(ValueError, match=r"\['a'\]\['b'\] and \['a/b'\], which are both called 'a/b'"):
        ng.addresses.flatten({"a/b": W, "a": {"b": B}})


def test_a_parameter_in_a_field_called_value_is_a_layer_of_that_name():
    params = {"attention": Attention(normal(3, 3), normal(3, 3, seed=1))}

    def model(params, x):
        return x @ params["attention"].query @ params["attention"].value

    capture = ng.capture(model, ng.losses.squared_error, labels="true")
    assert {leaf.address for layer in capture.layers(params, normal(4, 3)).known for leaf in layer.leaves} == {
        "attention/query",
        "attention/value",
    }
