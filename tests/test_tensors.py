"""Parameter arrays as tensors, with layers and without, with curvature and without; momentum, masks, warm starts."""

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from reference import assert_differs, assert_equal, normal, random_params
from tensors import moments, solved, units
from test_views import numbered
from watching import summed

import natgrad_jax as ng
from natgrad_jax.around import complete as chain
from natgrad_jax.layers.rows import from_matrix, to_matrix
from natgrad_jax.layers.views import in_modes, sources, view

AT_ONCE = {"damping": 0.1, "statistics_every": 1, "refresh_every": 1}
GRADIENT = ng.scale_by_tnt(statistics="gradient", decay=0.5, **AT_ONCE)
"""Without layers and without curvature."""


class Block(nn.Module):
    """A dense layer, to be stacked."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="dense")(x)), None


class Mixed(nn.Module):
    """A convolution in groups, a scanned stack, a scalar, a cube, and a dense layer without bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (2, 2), feature_group_count=2, name="conv")(x)).mean((1, 2))
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = stack(name="stack")(x, None)[0]
        x = x * self.param("scale", nn.initializers.ones, ())
        x = x * self.param("cube", nn.initializers.normal(), (2, 3, 4)).sum((0, 1))
        return nn.Dense(3, use_bias=False, name="last")(x)


SHAPES = {
    "conv/kernel": (2, 2, 2, 4),
    "conv/bias": (4,),
    "stack/dense/kernel": (3, 4, 4),
    "stack/dense/bias": (3, 4),
    "scale": (),
    "cube": (2, 3, 4),
    "last/kernel": (4, 3),
}
MODES = {
    "flatten_spatial": {"conv/kernel": (4, 2, 2), "cube": (2, 3, 4)},
    "matrix": {"conv/kernel": (8, 2), "cube": (6, 4)},
    "all": {"conv/kernel": (2, 2, 2, 2), "cube": (2, 3, 4)},
}
"""Of each word the modes of the arrays that it matters for, layers known."""
OTHERS = {
    "conv/bias": (4,),
    "stack/dense/kernel": (4, 4),
    "stack/dense/bias": (4,),
    "scale": (1,),
    "last/kernel": (4, 3),
}
STACKS = {"conv/kernel": (2,), "stack/dense/kernel": (3,), "stack/dense/bias": (3,)}


class Captured(NamedTuple):
    """A model on one batch."""

    layers: ng.Layers
    params: Any
    capture: Any
    out: Any
    evidence: Any


@cache
def captured(model, *shape, labels="sampled") -> Captured:
    """A model of three classes on a batch in double precision."""
    x, y = normal(*shape), jnp.arange(shape[0]) % 3
    params = random_params(model, x)
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels=labels)
    out = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(1))
    return Captured(capture.layers({"params": params}, x), params, capture, out, out.curvature())


@cache
def mixed():
    """The layers and parameters of `Mixed`."""
    model, x = Mixed(), normal(4, 3, 3, 4)
    params = random_params(model, x)
    return ng.linen.capture(model, ng.losses.softmax_cross_entropy).layers({"params": params}, x), params


def flat(tree):
    """{address: array} of parameters in dicts."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kernels", MODES)
def test_every_array_is_a_tensor_by_itself_and_comes_back_as_it_was(kernels):
    layers, params = mixed()
    leaves = flat(params)
    assert {name: leaf.shape for name, leaf in leaves.items()} == SHAPES
    found = sources(layers, params)
    assert {source.name for source in found} == set(SHAPES)
    for source in found:
        (leaf,) = source.leaves
        for block in (None, 3):
            seen = view(source, in_modes(source, kernels), block=block)
            tensor = to_matrix(seen, {leaf.role: leaves[source.name]})
            assert tensor.shape == seen.stack + seen.shape
            np.testing.assert_array_equal(from_matrix(seen, tensor)[leaf.role], leaves[source.name])
        seen = view(source, in_modes(source, kernels))
        assert seen.shape == {**OTHERS, **MODES[kernels]}[source.name]
        assert seen.stack == STACKS.get(source.name, ())


@pytest.mark.usefixtures("x64")
def test_groups_are_a_stack_of_kernels_over_their_own_outputs():
    layers, params = mixed()
    source = next(source for source in sources(layers, params) if source.name == "conv/kernel")
    kernel = numbered(2, 2, 2, 4)
    tensor = to_matrix(view(source, in_modes(source, "flatten_spatial")), {"kernel": jnp.asarray(kernel)})
    for group, row, column, channel, out in np.ndindex(2, 2, 2, 2, 2):
        assert tensor[group, 2 * row + column, channel, out] == kernel[row, column, channel, 2 * group + out]


@pytest.mark.usefixtures("x64")
def test_without_layers_the_shape_is_all_that_is_known_of_an_array():
    _, params = mixed()
    found = {source.name: source for source in sources(None, params)}
    assert {name: source.shape for name, source in found.items()} == SHAPES
    modes = {name: in_modes(source, "flatten_spatial") for name, source in found.items()}
    assert modes == {**SHAPES, "conv/kernel": (4, 2, 4), "scale": (1,)}
    assert in_modes(found["stack/dense/kernel"], "matrix") == (12, 4)


@pytest.mark.usefixtures("x64")
def test_a_kind_that_is_kept_whole_has_its_bias_as_the_last_row():
    layers, params = mixed()
    (source,) = (
        source
        for source in sources(layers, params, whole=lambda layer: layer.is_known and not layer.window)
        if source.name == "stack/dense"
    )
    parts = {role: params["stack"]["dense"][role] for role in ("kernel", "bias")}
    found = to_matrix(view(source, source.shape, (1, 0)), parts)
    for copy in range(3):
        np.testing.assert_array_equal(found[copy, :, :4], parts["kernel"][copy].T)
        np.testing.assert_array_equal(found[copy, :, 4], parts["bias"][copy])


# With layers and without, with curvature and without ------------------------------------------------------------------


class Plain(nn.Module):
    """A convolution, a normalisation and a dense layer: neither groups nor stacks."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(use_bias=False, name="norm")(nn.Conv(3, (2, 2), padding="VALID", name="conv")(x))
        return nn.Dense(3, name="last")(nn.tanh(x).mean((1, 2)))


def directions(tx, updates, **extra):
    """The first direction, {address: array}."""
    return flat(jax.jit(lambda updates: tx.update(updates, tx.init(updates), **extra)[0])(updates))


PLAIN = {"conv/kernel": (4, 2, 3), "conv/bias": (3,), "last/kernel": (3, 3), "last/bias": (3,), "norm/scale": (3,)}
"""The modes of the arrays of `Plain`."""


@cache
def plain():
    """Gradient and evidence of `Plain`, and its four directions, {statistics and whether layers are known: ...}."""
    model, x, y = Plain(), normal(6, 3, 3, 2), jnp.arange(6) % 3
    params = random_params(model, x)
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)
    layers = capture.layers({"params": params}, x)

    @jax.jit
    def run(params):
        out, found = capture.value_and_grad({"params": params}, x, y, key=jax.random.key(1)), {}
        for statistics, known in product(("curvature", "gradient"), (True, False)):
            tx = ng.scale_by_tnt(layers if known else None, statistics=statistics, **(AT_ONCE | {"damping": 1e-3}))
            curvature = out.curvature if statistics == "curvature" else None
            found[f"{statistics} {known}"] = flat(tx.update(out.grad, tx.init(params), curvature=curvature)[0])
        return flat(out.grad), out.curvature(), found

    return run(params)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("statistics", ["curvature", "gradient"])
def test_without_groups_and_stacks_the_layers_need_not_be_known(statistics):
    gradient, evidence, found = plain()
    parts = {"norm/scale": evidence["norm/scale"].gradient["scale"]}
    for name in ("conv", "last"):
        parts |= {f"{name}/{role}": draws for role, draws in evidence[name].gradient.items()}
    for name, modes in PLAIN.items():
        array, known, unknown = (
            np.asarray(tree[name]).reshape(modes)
            for tree in (gradient, found[f"{statistics} True"], found[f"{statistics} False"])
        )
        of_labels = defined(parts[name].reshape(1, *modes) / 6**0.5, array, 1e-3)
        of_itself = defined(array[None], array, 1e-3)
        expected, other = (of_labels, of_itself) if statistics == "curvature" else (of_itself, of_labels)
        assert_equal(known, expected)
        assert_equal(unknown, expected)
        assert_differs(other, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_groups_and_stacks_are_blocks_by_themselves_if_the_layers_are_known():
    layers, params = mixed()
    gradient = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), params)
    tx = optax.masked(
        ng.scale_by_tnt(layers, statistics="gradient", **AT_ONCE), {name: name in ("conv", "stack") for name in params}
    )
    found, leaves = directions(tx, gradient), flat(gradient)
    for name in STACKS:
        array, direction = np.asarray(leaves[name]), np.asarray(found[name])
        if name == "conv/kernel":
            array, direction = (np.moveaxis(x.reshape(4, 2, 2, 2), 2, 0) for x in (array, direction))
        for copy, expected in zip(direction, array, strict=True):
            assert_equal(copy, defined(expected[None], expected))
        assert_differs(direction, defined(array[None], array))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_an_array_of_a_vmapped_update_is_stepped_as_it_is_alone():
    gradients = {"w": normal(3, 4, 2)}
    together = jax.jit(jax.vmap(lambda g: GRADIENT.update(g, GRADIENT.init(g))[0]))(gradients)["w"]
    for copy, gradient in zip(together, gradients["w"], strict=True):
        assert_equal(copy, defined(gradient[None], gradient))
    assert_differs(together, defined(gradients["w"][None], gradients["w"]))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_gradients_of_examples_are_those_of_every_copy_and_of_no_known_layer_that_of_the_batch():
    model, x, y = Mixed(), normal(4, 3, 3, 4), jnp.arange(4) % 3
    layers, params = mixed()
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="true")
    tx = ng.scale_by_tnt(layers, estimator="per_example", decay=0.0, **AT_ONCE)

    @jax.jit
    def run(params):
        def loss(params, x, y):
            return jnp.sum(reference.LOSSES["softmax_cross_entropy"](model.apply({"params": params}, x[None]), y[None]))

        out = capture.value_and_grad({"params": params}, x, y)
        _, state = tx.update(out.grad, tx.init(params), curvature=out.curvature)
        factors = {name: factors.total for name, factors in state.statistics.items()}
        return flat(jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)), factors

    gradients, factors = run(params)
    gradients = {name: np.asarray(gradient) for name, gradient in gradients.items()}
    of_batch = {name: gradient.sum(0, keepdims=True) / 2 for name, gradient in gradients.items()}  # of W = 4
    for role in ("kernel", "bias"):
        name = f"stack/dense/{role}"
        for copy in range(3):
            expected, others = moments(gradients[name][:, copy]), moments(of_batch[name][:, copy])
            for ours, theirs, other in zip(factors[name], expected, others, strict=True):
                assert_equal(ours[copy], theirs)
                assert_differs(other, theirs)
    for name in ("cube", "scale"):
        array = of_batch[name].reshape(1, *(SHAPES[name] or (1,)))
        for ours, theirs in zip(factors[name], moments(array), strict=True):
            assert_equal(ours, theirs)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_evidence_alone_does_not_say_what_layers_it_is_of():
    net = dense()
    tx = ng.scale_by_tnt(**AT_ONCE)
    with pytest.raises(TypeError, match=r"type dict.*what layers it is of.*`out.curvature`.*with `layers`"):
        tx.update(net.params, tx.init(net.params), curvature=net.evidence)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_missing_curvature_is_asked_for_with_both_remedies():
    for layers in (dense().layers, None):
        tx = ng.scale_by_tnt(layers, **AT_ONCE)
        with pytest.raises(
            ValueError, match=r'`curvature` is missing.*curvature=out.curvature.*`statistics="gradient"`'
        ):
            tx.update(dense().params, tx.init(dense().params))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("other", [{"v": jnp.ones(3)}, {"layer_b": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}])
def test_curvature_or_gradient_of_another_model_is_refused_by_name(other):
    net, of_gradient = dense(), ng.scale_by_tnt(statistics="gradient", **AT_ONCE)
    tx = ng.scale_by_tnt(**AT_ONCE)
    with pytest.raises(ValueError, match=r"Parameter '.*' has shape .*; `curvature` has .*Capture the model"):
        tx.update(other, tx.init(other), curvature=net.out.curvature)
    with pytest.raises(ValueError, match=r"Parameter 'layer_b/.*' has shape .*; `gradient` has .*Pass the gradient"):
        of_gradient.update(net.params, of_gradient.init(net.params), gradient=other)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_evidence_has_no_gradient():
    net = captured(reference.MLP(widths=(3,)), 4, 4, labels="forward")
    tx = ng.scale_by_tnt(net.layers, **AT_ONCE)
    with pytest.raises(ValueError, match=r"evidence for 'layer_b' has no `gradient`.*\"forward\""):
        tx.update(net.params, tx.init(net.params), curvature=net.evidence)


# The gradient that the statistics are of, and the one that is preconditioned ------------------------------------------


def defined(seen, momentum, damping=0.1):
    """The direction of a tensor after gradients were seen, all of one weight."""
    return solved(units(moments(seen)), damping ** (1 / momentum.ndim), momentum)


@pytest.mark.usefixtures("x64")
def test_the_statistics_are_of_the_extra_argument_and_the_direction_is_of_the_update():
    gradient, momentum = {"w": normal(4, 3)}, {"w": normal(4, 3, seed=1)}
    found = directions(GRADIENT, momentum, gradient=gradient)["w"]
    assert_equal(found, defined(gradient["w"][None], momentum["w"]))
    assert_differs(directions(GRADIENT, momentum)["w"], found)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("front", ["behind", "complete", "chain"])
def test_momentum_in_front_leaves_the_statistics_to_the_gradient_but_a_plain_chain_does_not(front):
    gradients = normal(2, 4, 3)
    settings = {"statistics": "gradient", "decay": 0.5, **AT_ONCE}
    tx = {
        "behind": lambda: chain.behind(optax.trace(0.9), GRADIENT),
        "complete": lambda: optax.chain(ng.tnt(1.0, momentum=0.9, **settings, kl_clip=None), optax.scale(-1.0)),
        "chain": lambda: optax.chain(optax.trace(0.9), GRADIENT),
    }[front]()

    @jax.jit
    def second(gradients):
        _, state = tx.update({"w": gradients[0]}, tx.init({"w": gradients[0]}))
        return tx.update({"w": gradients[1]}, state)[0]["w"]

    first, last = np.asarray(gradients)
    average = np.stack([first, 2**0.5 * last]) * (2 / 3) ** 0.5  # weights 1/3 and 2/3
    expected = defined(average, last + 0.9 * first)
    (assert_differs if front == "chain" else assert_equal)(second(gradients), expected)


# Masks ----------------------------------------------------------------------------------------------------------------


def dense(labels="sampled"):
    """A dense layer of four inputs and three outputs on four examples."""
    return captured(reference.MLP(widths=(3,)), 4, 4, labels=labels)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("known", [True, False], ids=["layers", "no layers"])
def test_masks_and_partitions_may_part_a_kernel_from_its_bias(known, wrapper):
    net, kernels = dense(), {"layer_b": {"kernel": True, "bias": False}}
    labels = jax.tree.map(lambda is_kernel: "tnt" if is_kernel else "sgd", kernels)
    tx = ng.scale_by_tnt(net.layers if known else None, **AT_ONCE)
    parted = {
        "masked": lambda: optax.masked(tx, kernels),
        "partition": lambda: optax.partition({"tnt": tx, "sgd": optax.sgd(-2.0)}, labels),
    }[wrapper]()
    found = directions(parted, net.out.grad, curvature=net.evidence if known else net.out.curvature)
    gradient, draws = (
        flat(net.out.grad),
        np.asarray(summed(net.layers["layer_b"], net.evidence["layer_b"])) / 2,
    )  # of W = 4
    assert_equal(found["layer_b/kernel"], defined(draws[:, :4], gradient["layer_b/kernel"]))
    bias = gradient["layer_b/bias"]
    assert_equal(found["layer_b/bias"], bias if wrapper == "masked" else 2 * bias)
    assert_differs(found["layer_b/bias"], defined(draws[:, 4], bias))
    states = [state for state in jax.tree.leaves(parted.init(net.params), is_leaf=is_ours) if is_ours(state)]
    assert [set(state.operators) for state in states] == [{"layer_b/kernel"}]


def is_ours(node):
    return isinstance(node, ng.NaturalGradientState)


# Trees ----------------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_the_parameters_may_be_one_array(shape):
    gradient = normal(*shape, dtype="float32")
    bare, _ = GRADIENT.update(gradient, GRADIENT.init(gradient))
    named, _ = GRADIENT.update({"it": gradient}, GRADIENT.init({"it": gradient}))
    assert_equal(bare, named["it"])
    assert jnp.any(bare != gradient)


# Precision and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_precision_parameters_have_single_precision_statistics():
    gradient, tx = {"w": normal(4, 3, dtype="bfloat16"), "s": jnp.full((), 0.5, "bfloat16")}, GRADIENT
    found, state = jax.jit(lambda gradient: tx.update(gradient, tx.init(gradient)))(gradient)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    assert {
        leaf.dtype
        for leaf in jax.tree.leaves((state.statistics, [operator.value for operator in state.operators.values()]))
    } == {jnp.dtype("float32")}
    for name, array in gradient.items():
        array = np.asarray(array, np.float64).reshape(array.shape or (1,))
        assert_equal(found[name].reshape(array.shape), defined(array[None], array), 2**-8)
        assert_differs(found[name].reshape(array.shape), array)


BAD = {
    "layers": (3, TypeError, r"`layers` is 3; expected what `capture.layers\(variables, x\)` returns, or None"),
    "damping": (-1, ValueError, "`damping` is -1; expected a finite number of at least 0"),
    "split": ("even", ValueError, "`split` is 'even'; expected one of 'total', 'per_mode'"),
    "kernels": ("conv", ValueError, "`kernels` is 'conv'; expected one of 'flatten_spatial', 'matrix', 'all'"),
    "statistics": ("batch", ValueError, "`statistics` is 'batch'; expected one of 'curvature', 'gradient'"),
    "scale": ("mean", ValueError, "`scale` is 'mean'; expected one of 'example', 'batch'"),
    "estimator": ("exact", ValueError, "`estimator` is 'exact'; expected one of 'minibatch', 'per_example'"),
    "decay": (1.0, ValueError, "`decay` is 1.0; expected a finite number of at least 0 and below 1"),
    "statistics_every": (0, ValueError, "`statistics_every` is 0; expected a whole number of steps, at least 1"),
    "refresh_every": ("often", TypeError, "`refresh_every` is 'often'; expected a whole number of steps, at least 1"),
}


@pytest.mark.parametrize("option", BAD)
def test_a_setting_that_makes_no_sense_is_refused_when_it_is_given(option):
    value, error, sentence = BAD[option]
    with pytest.raises(error, match=sentence):
        ng.scale_by_tnt(**{"damping": 0.1, option: value})
    with pytest.raises(error, match=sentence):
        ng.tnt(0.1, **{option: value}, kl_clip=None)


@pytest.mark.parametrize("layers", [{"w": np.ones(2)}, (), "dense"])
def test_layers_of_another_kind_of_object_are_refused(layers):
    with pytest.raises(
        TypeError, match=r"`layers` is .*expected what `capture.layers\(variables, x\)` returns, or None"
    ):
        ng.scale_by_tnt(layers, damping=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("without", ["layers", "curvature"])
def test_statistics_of_examples_need_layers_and_curvature(without):
    lacking = {"layers": None} if without == "layers" else {"layers": dense().layers, "statistics": "gradient"}
    with pytest.raises(ValueError, match=r"`estimator` is 'per_example'.*the `layers` of the model.*minibatch"):
        ng.scale_by_tnt(damping=0.1, estimator="per_example", **lacking)
    ng.scale_by_tnt(dense().layers, damping=0.1, estimator="per_example")
