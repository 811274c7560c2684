"""The registry of the comparisons: every method of the package is in it, and can be made on both kinds of problems."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from experiments.methods import ALL, METHODS, NOTHING
from experiments.nets import Convnet, autoencoder
from experiments.problems import MNIST, convnet


def missing(names):
    """What the package has and a registry with these names has not."""
    own = {name.removeprefix("scale_by_") for name in ng.__all__ if name.startswith("scale_by_")} | {"kbfgs"}
    return own - set(names)


def test_every_method_of_the_package_is_compared():
    names = {method.of for method in METHODS.values() if isinstance(method.of, str)}
    assert missing(names) == set()
    assert all(hasattr(ng, name) for name in names)
    assert missing(names - {"soap"}) == {"soap"}


def test_the_usual_setting_is_within_what_is_tried():
    for method in ALL.values():
        for found in method.ranges.values():
            for usual, tried in zip(found.usual, found[1:], strict=True):
                assert tried is None or tried[0] <= usual <= tried[1]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_steps_with_a_setting_that_only_the_device_knows(name, kind):
    method = ALL[name]
    net = autoencoder((6, 3)) if kind == "autoencoder" else Convnet((2, 4), (1, 2))
    chosen = (MNIST if kind == "autoencoder" else convnet(16))._replace(net=net)
    x = jnp.zeros((6, 9) if kind == "autoencoder" else (6, 8, 8, 1))
    y = x if kind == "autoencoder" else jnp.zeros(6, jnp.int32)
    capture = ng.linen.capture(chosen.net, chosen.likelihood, labels=method.labels)
    variables = jax.eval_shape(chosen.net.init, jax.random.key(0), x)
    layers = capture.layers(variables, x)
    make = method.make(kind, 4)

    def step(params, rate, damping):
        tx = optax.with_extra_args_support(make({"rate": rate, "damping": damping}, layers))
        state = tx.init(params)
        out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(0))
        return optax.apply_updates(params, tx.update(out.grad, state, params, curvature=out.curvature)[0]), state

    params, state = jax.eval_shape(step, variables["params"], 0.1, 0.1)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    clipped = bool(optax.tree.get_all_with_path(state, "clip_factor"))
    assert clipped == (method.clips and kind == "classifier")


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_every_method_has_the_budget_within_its_range_unless_nothing_of_it_is_tuned(kind):
    for name, method in METHODS.items():
        within = method.ranges[kind]
        usual, *drawn = within.tried(name, 6)
        assert not usual and not drawn if method.ranges is NOTHING else len(drawn) == 6, name
        for numbers in drawn:
            sides = within.rates, within.dampings or 2 * within.usual[1:]
            for number, (least, most) in zip(numbers.values(), sides, strict=True):
                assert 0.99 * least <= number <= 1.01 * most  # three digits
    assert METHODS["SOAP"].ranges[kind].tried("SOAP", 3)[1]["damping"] == 1e-16


def test_draws_fill_every_stratum_and_are_those_of_a_name():
    within = METHODS["K-FAC"].ranges["classifier"]
    _, *drawn = within.tried("K-FAC", 50)
    columns = zip(*(numbers.values() for numbers in drawn), strict=True)
    for numbers, (least, most) in zip(columns, within[1:], strict=True):
        places = 50 * np.log(np.sort(numbers) / least) / np.log(most / least)
        assert np.all(np.abs(places - np.arange(50) - 0.5) < 0.7)  # half a stratum, and three digits
    assert within.tried("K-FAC", 50) == within.tried("K-FAC", 50) != within.tried("EKFAC", 50)
