"""A method of one layer as tests walk through it: one state that holds its two values, statistics and operator."""

from typing import Any, NamedTuple

import jax.numpy as jnp

import natgrad_jax as ng
from natgrad_jax.methods.ekfac import EKFAC
from natgrad_jax.methods.kfac import KFAC
from natgrad_jax.methods.shampoo import Shampoo
from natgrad_jax.methods.tekfac import TEKFAC
from natgrad_jax.methods.tengrad import TENGraD
from natgrad_jax.methods.tkfac import TKFAC
from natgrad_jax.methods.tnt import TNT


class State(NamedTuple):
    """What a method averages of a layer, and what it applies to it."""

    statistics: Any
    operator: Any


class Walk(NamedTuple):
    """The functions of a method, each from one state to the next."""

    method: ng.Method

    def init(self, layer):
        return self.followed(layer, State(*self.method.init(layer)))

    def observe(self, layer, state, evidence):
        if self.method.couple is not None:
            statistics = self.method.couple(layer, state.statistics, state.operator, evidence)
        else:
            statistics = self.method.observe(layer, state.statistics, evidence)
        return self.followed(layer, state._replace(statistics=statistics))

    def refresh(self, layer, state, damping):
        operator = self.method.refresh(layer, state.statistics, state.operator, jnp.asarray(damping))
        return self.followed(layer, state._replace(operator=operator))

    def rescale(self, layer, state, evidence):
        return state._replace(operator=self.method.rescale(layer, state.operator, evidence))

    def apply(self, layer, state, gradient, damping):
        return self.method.apply(layer, state.operator, gradient, damping)

    def followed(self, layer, state):
        if self.method.follow is None:
            return state
        return state._replace(operator=self.method.follow(layer, state.statistics, state.operator))

    def prepared(self, layer, evidence, damping):
        """The state after a first batch."""
        if self.method.measure:
            state = self.init(layer)
            state = state._replace(operator=self.method.measure(layer, state.operator, evidence))
            return self.refresh(layer, state, damping)
        state = self.refresh(layer, self.observe(layer, self.init(layer), evidence), damping)
        return self.rescale(layer, state, evidence) if self.method.rescale else state


def kfac_block(decay, split="pi", **settings):
    return Walk(KFAC(damping=1.0, split=split, **settings).method(decay))


def ekfac_block(decay, estimator="per_example", **settings):
    return Walk(EKFAC(damping=1.0, estimator=estimator, **settings).method(decay, decay))


def tkfac_block(decay, split=None, **settings):
    return Walk(TKFAC(damping=1.0, split=split, **settings).method(decay))


def tekfac_block(decay, estimator="per_example", **settings):
    return Walk(TEKFAC(damping=1.0, estimator=estimator, **settings).method(decay, decay))


def tnt_block(decay, split="total", **settings):
    return Walk(TNT(damping=1.0, split=split, **settings).method(decay))


def shampoo_block(decay, exponent=None, **settings):
    return Walk(Shampoo(damping=1.0, exponent=exponent, **settings).method(decay))


def tengrad_block(examples, draws, **settings):
    return Walk(TENGraD(damping=1.0, refresh_every=1, **settings).method_of(examples, draws))
