"""The registry of the comparisons: every method of the package is in it, and can be made on both kinds of problems."""

import jax
import jax.numpy as jnp
import optax
import pytest

import natgrad_jax as ng
from experiments.methods import ALL, METHODS
from experiments.nets import Convnet, autoencoder
from experiments.problems import problem
from experiments.running import Setting


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
            for least, usual, most in zip(found.least, found.usual, found.most, strict=True):
                assert least <= usual <= most


@pytest.mark.full
@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_steps_with_a_setting_that_only_the_device_knows(name, kind):
    method = ALL[name]
    net = autoencoder((6, 3)) if kind == "autoencoder" else Convnet((2, 4), (1, 2))
    chosen = problem("mnist" if kind == "autoencoder" else "fashion")._replace(net=net)
    x = jnp.zeros((6, 9) if kind == "autoencoder" else (6, 8, 8, 1))
    y = x if kind == "autoencoder" else jnp.zeros(6, jnp.int32)
    capture = ng.linen.capture(chosen.net, chosen.likelihood, labels=method.labels)
    variables = jax.eval_shape(chosen.net.init, jax.random.key(0), x)
    layers = capture.layers(variables, x)
    make = method.make(kind, 4)

    def step(params, rate, damping):
        tx = optax.with_extra_args_support(make(Setting(rate, damping), layers))
        state = tx.init(params)
        out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(0))
        return optax.apply_updates(params, tx.update(out.grad, state, params, curvature=out.curvature)[0]), state

    params, state = jax.eval_shape(step, variables["params"], 0.1, 0.1)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    clipped = bool(optax.tree.get_all_with_path(state, "clip_factor"))
    assert clipped == (method.clips and kind == "classifier")
