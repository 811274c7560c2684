"""What NNX lets a model do that a watcher trips over: each is seen right, or refused in words."""

from contextlib import nullcontext
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from products import rows_give_the_gradient_of_every_example
from reference import normal

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("x64")
N, WIDTH = 6, 4
X, Y = (N, WIDTH), (N, WIDTH)
TOKENS = jnp.arange(N) % 7


class Net(nnx.Module):
    """Parts by name, and a function of the net and its inputs."""

    def __init__(self, call, **parts):
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


class Block(nnx.Module):
    """A dense layer and a tanh."""

    def __init__(self, rngs):
        self.linear = linear(rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def linear(rngs):
    return nnx.Linear(WIDTH, WIDTH, bias_init=nnx.initializers.normal(), param_dtype="float64", rngs=rngs)


class Counted(Block):
    """One that counts its calls."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.count = nnx.BatchStat(jnp.zeros((), int))

    def __call__(self, x):
        self.count[...] += 1
        return super().__call__(x)


def norm(rngs):
    return nnx.BatchNorm(WIDTH, param_dtype="float64", dtype="float64", rngs=rngs)


def table(rngs):
    return nnx.Embed(7, WIDTH, param_dtype="float64", rngs=rngs)


class Own(nnx.Linear):
    """A dense layer with a call of its own."""

    def __call__(self, x):
        return jnp.tanh(jnp.einsum("...i,io->...o", x, self.kernel[...]) + self.bias[...])


def own(rngs):
    return Own(WIDTH, 3, param_dtype="float64", rngs=rngs)


def triangular(a, kernel, *args, **kwargs):
    return jax.lax.dot_general(a, jnp.triu(kernel), *args, **kwargs)


def masked(rngs):
    return nnx.Linear(WIDTH, 3, use_bias=False, dot_general=triangular, param_dtype="float64", rngs=rngs)


def stack(rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,))
    def made(rngs):
        return Block(rngs)

    return made(rngs)


def rnn(rngs):
    return nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, 3, param_dtype="float64", rngs=rngs))


def net(call, **parts):
    rngs = nnx.Rngs(0)
    return Net(call, **{name: part(rngs) for name, part in parts.items()})


def one_kernel(call):
    """Two layers with one kernel Variable between them."""
    model = net(call, a=linear, b=linear)
    model.b.kernel = model.a.kernel
    return model


class Case(NamedTuple):
    """A model, its inputs, the names of its layers, words of the notes of the rest."""

    model: Any
    x: Any
    layers: tuple[str, ...]
    notes: dict[str, str]


def case(call, layers, x=X, notes=MappingProxyType({}), make=net, **parts):
    x = normal(*x) if isinstance(x, tuple) else x
    return Case(make(call, **parts), x, tuple(layers.split()), notes)


def called(part, x):
    return part(x)


def in_windows(m, x):
    """Every two positions attend to each other; the examples are merged with the windows."""
    x, whole = x.reshape(-1, 2, WIDTH), x.shape
    query, key = jnp.split(m.a(x), 2, axis=-1)
    scores = jax.nn.softmax(jnp.einsum("wtd,wsd->wts", query, key))
    return m.b(jnp.einsum("wts,wsd->wtd", scores, x)).reshape(whole).sum(1)


def rematerialised(part, x):
    return nnx.remat(called)(part, x)


again = nnx.scan(lambda x, m: rematerialised(m, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
INNER = nnx.jit(called)
STATE = nnx.StateAxes({nnx.Param: None, ...: nnx.Carry})
CASES = {
    "an inner jit": lambda: case(lambda m, x: INNER(m.b, INNER(m.a, x)), "a/linear b/linear", a=Block, b=Block),
    "remat": lambda: case(lambda m, x: nnx.remat(called)(m.a, x), "a/linear", a=Block),
    "broadcast into a scan": lambda: case(
        lambda m, x: nnx.scan(called, in_axes=(None, nnx.Carry), out_axes=nnx.Carry, length=3)(m.a, x),
        "a/linear",
        a=Block,
    ),
    "carried through a scan": lambda: case(
        lambda m, x: nnx.scan(lambda c: (c[0], c[0](c[1])), in_axes=nnx.Carry, out_axes=nnx.Carry, length=3)((m.a, x))[
            1
        ],
        "a/linear",
        a=Block,
    ),
    "state carried through a scan": lambda: case(
        lambda m, x: nnx.scan(called, in_axes=(STATE, nnx.Carry), out_axes=nnx.Carry, length=3)(m.a, x),
        "a/linear",
        a=Counted,
    ),
    "remat broadcast into a scan": lambda: case(
        lambda m, x: nnx.scan(rematerialised, in_axes=(None, nnx.Carry), out_axes=nnx.Carry, length=3)(m.a, x),
        "a/linear",
        a=Block,
    ),
    "remat carried through a scan": lambda: case(
        lambda m, x: nnx.scan(lambda c: (c[0], rematerialised(*c)), in_axes=nnx.Carry, out_axes=nnx.Carry, length=3)((
            m.a,
            x,
        ))[1],
        "a/linear",
        a=Block,
    ),
    "remat of a stack, scanned twice": lambda: case(
        lambda m, x: again(again(x, m.blocks), m.blocks),
        "blocks/linear",
        blocks=stack,
    ),
    "stacked, scanned": lambda: case(
        lambda m, x: nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, m.blocks),
        "blocks/linear",
        blocks=stack,
    ),
    "an ensemble": lambda: case(
        lambda m, x: nnx.vmap(called, in_axes=(0, None))(m.blocks, x).sum(0), "blocks/linear", blocks=stack
    ),
    "vmap over the examples": lambda: case(
        lambda m, x: nnx.vmap(called, in_axes=(None, 0))(m.a, x), "a/linear", a=Block
    ),
    "cond": lambda: case(
        lambda m, x: nnx.cond(x.sum() < 1e9, lambda m, x: m.a(x), lambda m, x: m.a(m.a(x)), m, x), "a/linear", a=Block
    ),
    "switch": lambda: case(
        lambda m, x: nnx.switch(
            (x.sum() < 1e9).astype(int), [lambda m, x: m.a(m.a(x)), lambda m, x: m.b(m.a(x))], m, x
        ),
        "a/linear b/linear",
        a=Block,
        b=Block,
    ),
    "fori_loop": lambda: case(
        lambda m, x: nnx.fori_loop(0, 3, lambda _, c: (c[0], c[0](c[1])), (m.a, x))[1], "a/linear", a=Block
    ),
    "vmap, checkpoint and scan of JAX": lambda: case(
        lambda m, x: jax.lax.scan(lambda x, _: (m.a(x), None), jax.checkpoint(m.b)(jax.vmap(m.a)(x)), None, length=2)[
            0
        ],
        "a/linear b/linear",
        a=Block,
        b=Block,
    ),
    "a table read past its module": lambda: case(
        lambda m, t: m.a(m.table.embedding[...].at[(t,)].get()), "table a/linear", x=TOKENS, a=Block, table=table
    ),
    "a table tied past its module": lambda: case(
        lambda m, t: m.a(m.table(t)) @ m.table.embedding[:].T, "table a/linear", x=TOKENS, a=Block, table=table
    ),
    "one module under two names": lambda: case(
        lambda m, x: m.b(jnp.tanh(m.a(x))),
        "a",
        make=lambda call: Net(call, a=(a := linear(nnx.Rngs(0))), b=a),
    ),
    "one Variable in two modules": lambda: case(
        lambda m, x: m.b(jnp.tanh(m.a(x))),
        "a",
        notes={"a/bias": "or has others as well", "b/bias": "or has others as well"},
        make=one_kernel,
    ),
    "rnn": lambda: case(lambda m, x: m.rnn(x).sum(1), "rnn/cell/dense_i rnn/cell/dense_h", x=(N, 5, WIDTH), rnn=rnn),
    "attention in windows, whose projections are cut apart": lambda: case(
        in_windows, "a/linear b/linear", x=(N, 4, WIDTH), a=Block, b=Block
    ),
    "a subclass with a call of its own": lambda: case(lambda m, x: m.a(x), "a", a=own),
    "a kernel that is changed on the way": lambda: case(
        lambda m, x: m.b(m.a(x)), "a", notes={"b/kernel": "goes through `select_n`"}, a=linear, b=masked
    ),
    "an array that is no Variable": lambda: case(
        lambda m, x: m.a(x) * m.scale, "a/linear", a=Block, scale=lambda rngs: nnx.data(jnp.arange(1.0, 1 + WIDTH))
    ),
    "lists": lambda: case(
        lambda m, x: m.blocks[1](m.blocks[0](x)),
        "blocks/0/linear blocks/1/linear",
        blocks=lambda rngs: nnx.List([Block(rngs), Block(rngs)]),
    ),
}

GRAPH_ONLY = ("state carried through a scan", "one module under two names", "one Variable in two modules")
"""The tree mode of NNX has neither StateAxes nor shared references."""


def mode(graph):
    """The graph mode of NNX or its tree mode; Flax 0.12.0 has the first alone."""
    if hasattr(nnx, "set_graph_mode"):
        return nnx.set_graph_mode(graph)
    return nullcontext() if graph else pytest.skip("there is no tree mode")


@cache
def watched(name, graph=True):
    """The case, its layers, evidence of true labels, gradient, and the gradient of every example by autodiff."""
    with mode(graph):
        one = CASES[name]()
        capture = ng.nnx.capture(one.model, ng.losses.squared_error, labels="true")
        layers = capture.layers(one.model, one.x)
        split, params, rest = nnx.split(one.model, nnx.Param, ...)

        def outputs(params):
            return nnx.merge(split, params, rest, copy=True)(one.x)

        y = normal(*jax.eval_shape(outputs, params).shape, seed=9)

        @nnx.jit
        def both(model):
            out = capture.value_and_grad(model, one.x, y)
            return out.curvature(), out.grad

        jacobian = jax.jit(jax.jacrev(lambda params: 0.5 * jnp.sum((outputs(params) - y) ** 2, axis=range(1, y.ndim))))
        return one, layers, *both(one.model), nnx.to_pure_dict(jacobian(params))


MODES = [
    pytest.param(name, graph, marks=[] if graph or "scan" in name else pytest.mark.full)
    for graph in (True, False)
    for name in CASES
    if graph or name not in GRAPH_ONLY
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "graph"), MODES)
def test_rows_give_the_gradient_of_every_example_whatever_is_around_the_modules(name, graph):
    one, layers, evidence, grad, jacobian = watched(name, graph)
    assert set(layers) == set(one.layers)
    notes = {block.name: block.note for block in layers.rest}
    assert notes.keys() == one.notes.keys() and all(words in notes[at] for at, words in one.notes.items())
    rows_give_the_gradient_of_every_example(layers, evidence, nnx.to_pure_dict(grad), jacobian)


def test_a_loop_of_unknown_length_is_refused_as_its_gradient_is():
    model = net(
        lambda m, x: nnx.while_loop(lambda c: c[2] < x.sum(), lambda c: (c[0], c[0](c[1]), c[2] + 1), (m.a, x, 0))[1],
        a=Block,
    )
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        nnx.grad(lambda model: model(normal(*X)).sum())(model)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        ng.nnx.capture(model, ng.losses.squared_error, labels="true").value_and_grad(model, normal(*X), normal(*Y))


def test_a_model_that_places_its_arrays_by_out_sharding_is_refused_on_an_explicit_mesh_and_not_by_a_constraint():
    """Within the capture the axes are `Auto`, where JAX knows constraints alone; see docs/devices.md."""
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))):
        place = jax.sharding.PartitionSpec("data", None)
        model = net(lambda m, t: m.a(m.table.embedding[...].at[t].get(out_sharding=place)), a=linear, table=table)
        with pytest.raises(ValueError, match="type Auto or Manual"):
            ng.nnx.capture(model, ng.losses.squared_error, labels="true").layers(model, TOKENS)
        model = net(lambda m, t: m.a(m.table(t)), a=linear, table=table)
        assert set(ng.nnx.capture(model, ng.losses.squared_error, labels="true").layers(model, TOKENS)) == {
            "a",
            "table",
        }


# What is traced, and how often ----------------------------------------------------------------------------------------


def test_an_inner_jit_keeps_its_cache_and_a_second_capture_finds_the_same_layers():
    traces = []

    @nnx.jit
    def inner(part, x):
        traces.append(1)
        return part(x)

    model, x, y = net(lambda m, x: inner(m.b, inner(m.a, x)), a=Block, b=Block), normal(*X), normal(*Y)
    model(x)
    captures = [ng.nnx.capture(model, ng.losses.squared_error, labels="true") for _ in range(2)]
    first, second = (capture.layers(model, x) for capture in captures)
    assert first == second and list(first) == ["a/linear", "b/linear"]
    captures[0].value_and_grad(model, x, y)
    count = len(traces)
    for capture in captures:
        out = capture.value_and_grad(model, x, y)
        assert set(out.curvature()) == {"a/linear", "b/linear"}
    model(x)
    assert len(traces) == count


# Objects beside the model ---------------------------------------------------------------------------------------------


def noisy(m, x, rngs):
    return m.a(nnx.Dropout(0.5)(x, rngs=rngs))


def as_inputs(model, rngs, **options):
    capture = ng.nnx.capture(model, ng.losses.squared_error, labels="true", **options)
    return lambda x, y: capture.value_and_grad(model, (x, rngs), y)


def as_a_keyword(model, rngs, **options):
    capture = ng.nnx.capture(model, ng.losses.squared_error, labels="true", **options)
    return lambda x, y: capture.value_and_grad(model, x, y, rngs=rngs)


def as_a_tuple(model, rngs, **options):
    both = (model, rngs)
    capture = ng.nnx.capture(
        both, ng.losses.squared_error, labels="true", call=lambda both, x: both[0](x, both[1]), **options
    )
    return lambda x, y: capture.value_and_grad(both, x, y)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("way", [as_inputs, as_a_keyword, as_a_tuple])
def test_streams_from_outside_move_as_in_a_plain_call(way, graph):
    with mode(graph):
        x, y = normal(*X), normal(*Y)
        model, plain, watched = net(noisy, a=Block), nnx.Rngs(1), nnx.Rngs(1)
        evaluate = way(model, watched)
        for step in range(2):
            expected = 0.5 * jnp.mean(jnp.sum((model(x, plain) - y) ** 2, axis=1))
            np.testing.assert_allclose(evaluate(x, y).value, expected, rtol=1e-10)
            assert plain.default.count[...] == watched.default.count[...] == step + 1


@pytest.mark.slow
@pytest.mark.parametrize("way", [as_a_keyword, as_a_tuple])
def test_each_piece_of_a_batch_draws_from_streams_outside_anew(way):
    model, rngs = net(noisy, a=Block), nnx.Rngs(1)
    x, y = jnp.tile(normal(1, WIDTH), (N, 1)), jnp.zeros(Y)
    out = way(model, rngs, microbatches=2)(x, y)
    assert rngs.default.count[...] == 2
    assert jnp.any(out.outputs[: N // 2] != out.outputs[N // 2 :])


@pytest.mark.full
def test_a_tuple_of_model_and_streams_trains_by_the_optimizer_of_nnx():
    both = net(noisy, a=linear), nnx.Rngs(1)
    capture = ng.nnx.capture(both, ng.losses.squared_error, call=lambda both, x: both[0](x, both[1]), labels="true")
    x, y = normal(64, WIDTH), normal(64, WIDTH) @ normal(WIDTH, WIDTH, seed=1)
    optimizer = nnx.Optimizer(both, ng.kfac(0.3, capture.layers(both, x), damping=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(both, optimizer):
        out = capture.value_and_grad(both, x, y)
        optimizer.update(both, out.grad, curvature=out.curvature)
        return out.value

    losses = [float(step(both, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0] and both[1].default.count[...] == 20


def test_parameters_of_another_model_among_the_inputs_are_none_of_the_model():
    model, teacher = net(lambda m, x, other: m.a(x) - other(x), a=linear), linear(nnx.Rngs(5))
    capture = ng.nnx.capture(model, ng.losses.squared_error, labels="true")
    assert {leaf.address for block in capture.layers(model, normal(*X), teacher).blocks for leaf in block.leaves} == {
        "a/kernel",
        "a/bias",
    }
    grad = capture.value_and_grad(model, (normal(*X), teacher), normal(*Y)).grad
    expected = nnx.grad(lambda m: optax.squared_error(m(normal(*X), teacher), normal(*Y)).sum() / (2 * N))(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), grad, expected)


# Refused in words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["hijax", "ref"])
def test_variables_that_have_no_gradient_are_refused(setting):
    if not hasattr(nnx, "var_defaults"):
        pytest.skip("there are no such variables")
    with nnx.var_defaults(**{setting: True}):
        model = net(lambda m, x: m.a(x), a=Block)
    with pytest.raises(TypeError, match=rf"'a/linear/bias' of Net was made with `{setting}=True`.*ordinary ones"):
        ng.nnx.capture(model, ng.losses.squared_error)
    with pytest.raises(TypeError, match=rf"'a/linear/bias' of Net was made with `{setting}=True`.*ordinary ones"):
        ng.nnx.capture(Net, ng.losses.squared_error).layers(model, normal(*X))


@pytest.mark.parametrize("what", ["layers", "value_and_grad"])
@pytest.mark.parametrize("part", [Block, Counted], ids=["pure", "with state"])
def test_a_call_of_the_model_outside_instead_of_the_one_given_is_refused(part, what):
    outside = net(lambda m, x: m.a(x), a=part)

    def asked(call):
        capture = ng.nnx.capture(outside, ng.losses.squared_error, labels="true", call=call)
        if what == "layers":
            return capture.layers(outside, normal(*X))
        return capture.value_and_grad(outside, normal(*X), normal(*Y))

    with pytest.raises(ValueError, match=r"`call` uses the model it is given"):
        asked(lambda _, x: outside(x))
    assert asked(lambda model, x: model(x))


def test_a_part_that_is_read_from_outside_is_named():
    outside = net(None, a=linear, b=linear)
    capture = ng.nnx.capture(outside, ng.losses.squared_error, call=lambda m, x: outside.b(m.a(x)))
    layers = capture.layers(outside, normal(*X))
    assert list(layers) == ["a"]
    assert [block.name for block in layers.rest] == ["b/bias", "b/kernel"]
    assert all("from outside" in block.note for block in layers.rest) and "from outside" in str(layers)


def test_a_tuple_that_is_not_told_how_it_is_called_is_refused():
    with pytest.raises(TypeError, match=r"a tuple, which cannot be called; expected `call=`"):
        ng.nnx.capture((linear(nnx.Rngs(0)), nnx.Rngs(1)), ng.losses.squared_error)


def test_an_exception_in_the_call_leaves_the_model_as_it_was():
    def fails(m, x):
        x = m.a(m.norm(x))
        m.seen = nnx.Cache(x)
        if broken:
            raise RuntimeError("of the model's own")
        return x

    model, x, y = net(fails, a=linear, norm=norm), normal(*X), normal(*Y)
    capture = ng.nnx.capture(model, ng.losses.squared_error, labels="true")
    attributes, before = set(vars(model)), jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model)))
    broken = True
    for ask in (lambda: capture.layers(model, x), lambda: capture.value_and_grad(model, x, y)):
        with pytest.raises(RuntimeError, match="of the model's own"):
            ask()
        assert set(vars(model)) == attributes
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    broken = False
    capture.value_and_grad(model, x, y)
    assert "seen" in vars(model) and jnp.any(model.norm.mean[...] != before["norm"]["mean"])
