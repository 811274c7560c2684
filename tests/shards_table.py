"""Functions whose parameters are used inside of a `jax.shard_map`: on the one device of the suite, and on several."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import case, rows_give_the_gradient_of_every_example, watched
from reference import assert_differs, assert_equal

import natgrad_jax as ng
from natgrad_jax.program import replay

N = 8
SIZES = (len(jax.devices()) // 2, 2) if len(jax.devices()) > 1 else (1, 1)
"""Of the axes "data" and "model"."""
DATA = P("data")


def sharded(function, specs, out=DATA, *, check=True, axes=("data", "model"), manual=None):
    """The function on the mesh of all devices, of several two along "model" if that is there."""
    sizes = (math.prod(SIZES),) if len(axes) == 1 else SIZES
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    names = {} if manual is None else {"axis_names": set(manual)}
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check, **names)


def block(**settings):
    """A function of (w, x), w whole and x cut along the examples, as a shard_map."""
    axes = settings.pop("axes", ("data",))
    return lambda function: sharded(function, (P(), DATA), axes=axes, **settings)


W, WV, WB = {"w": (4, 3)}, {"w": (4, 3), "v": (3, 2)}, {"w": (4, 3), "b": (3,)}
X = (N, 4)


def _deep(p, x):
    @jax.checkpoint
    def turn(h, own):
        return jnp.tanh(h @ own["w"] + own["b"]), None

    return jax.lax.scan(turn, x, p)[0]


def _recurrent(p, x):
    start = jax.lax.pcast(jnp.zeros((len(x), 3)), ("data",), to="varying")
    return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["v"]), None), start, x.swapaxes(0, 1))[0]


def _branching(p, x):
    return jax.lax.cond(x.sum() < 1e9, lambda: x @ p["w"] + p["b"], lambda: jnp.tanh(x @ p["v"]))


def _norm(p, x):
    """With known deviations, which the scale meets first."""
    return (x - x.mean(-1, keepdims=True)) * (p["s"] / jnp.arange(1.0, 5.0)) + p["t"]


def _twice(w, x):
    return (y := jnp.tanh(jnp.concatenate([x, x**2]) @ w))[: len(x)] * y[len(x) :]


def _around(p, x):
    turn = block()(lambda w, x: jnp.tanh(x @ w))
    return jax.lax.scan(lambda h, own: (turn(own, h) + turn(p["v"], h), None), x, p["w"])[0]


def _swapped(w, x):
    return jnp.tanh(x.swapaxes(0, 1).reshape(-1, 4) @ w).reshape(5, -1, 3).sum(0)


def _of_the_next(x):
    """An array of the next device."""
    count = math.prod(SIZES)
    return jax.lax.ppermute(x, "data", [(i, (i + 1) % count) for i in range(count)])


def _beside(w, x):
    return jnp.tanh(x @ w) * jnp.tanh(jax.lax.all_gather(x, "data") @ w).sum(0)


FOLLOWED = {
    "a product": lambda: case(lambda p, x: block()(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["v"], WV, X, "w v"),
    "unchecked": lambda: case(
        lambda p, x: block(check=False)(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["v"], WV, X, "w v"
    ),
    "a bias": lambda: case(block()(lambda p, x: jnp.tanh(x @ p["w"] + p["b"])), WB, X, "w"),
    "two axes": lambda: case(
        sharded(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), (P(), P(("data", "model"))), P(("data", "model"))),
        WB,
        X,
        "w",
    ),
    "one axis by hand, the other by the compiler": lambda: case(
        sharded(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), (P(), DATA), manual=("data",)), WB, X, "w"
    ),
    "the same on all of an axis": lambda: case(
        sharded(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), (P(), DATA)), WB, X, "w"
    ),
    "all examples on every device": lambda: case(
        sharded(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), (P(), P()), P()), WB, X, "w"
    ),
    "positions": lambda: case(lambda p, x: block()(lambda w, x: jnp.tanh(x @ w).sum(1))(p["w"], x), W, (N, 5, 4), "w"),
    "merged with positions before": lambda: case(
        lambda p, x: block()(lambda w, x: jnp.tanh(x @ w))(p["w"], x.reshape(-1, 4)).reshape(-1, 5, 3).sum(1),
        W,
        (N, 5, 4),
        "w",
    ),
    "merged behind positions": lambda: case(lambda p, x: block()(_swapped)(p["w"], x), W, (N, 5, 4), "w"),
    "two views": lambda: case(lambda p, x: block()(_twice)(p["w"], x), W, X, "w"),
    "examples last": lambda: case(
        lambda p, x: sharded(lambda w, x: jnp.tanh(w @ x), (P(), P(None, "data")), P(None, "data"))(p["w"], x.T).T,
        {"w": (3, 4)},
        X,
        "w",
    ),
    "a table": lambda: case(
        lambda p, x: block()(lambda t, x: jnp.tanh(t[x]))(p["t"], x), {"t": (7, 3)}, jnp.arange(N) % 7, "t"
    ),
    "a convolution": lambda: case(
        lambda p, x: block()(
            lambda k, x: jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        )(p["k"], x),
        {"k": (2, 2, 3)},
        (N, 4, 2),
        "k",
    ),
    "layers in a scan": lambda: case(block()(_deep), {"w": (2, 4, 4), "b": (2, 4)}, X, "w"),
    "a scan over time": lambda: case(block()(_recurrent), {"w": (3, 3), "v": (4, 3)}, (N, 5, 4), "w v"),
    "a scan over examples": lambda: case(
        block()(lambda p, x: jax.lax.map(lambda x: jnp.tanh(x @ p["w"] + p["b"]), x)), WB, X, "w"
    ),
    "a scan around": lambda: case(_around, {"w": (2, 4, 4), "v": (4, 4)}, X, "w v"),
    "a branch": lambda: case(block()(_branching), WB | {"v": (4, 3)}, X, "w v"),
    "jit and vmap": lambda: case(
        block()(jax.jit(lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["w"] + p["b"]))(x))), WB, X, "w"
    ),
    "inputs of another device": lambda: case(
        lambda p, x: block()(lambda w, x: jnp.tanh(_of_the_next(x) @ w))(p["w"], x), W, X, "w"
    ),
    "inputs of all devices": lambda: case(lambda p, x: block()(_beside)(p["w"], x), W, X, "w"),
    "a norm": lambda: case(
        lambda p, x: block()(_norm)(p, x) @ p["v"], {"s": (4,), "t": (4,), "v": (4, 3)}, X, "v", s="", t=""
    ),
    "one number of examples": lambda: case(
        lambda p, x: block()(lambda w, x: jnp.tanh(x @ w))(p["w"], x).reshape(N, 3), W, X, "w"
    ),
    "a parameter cut beside": lambda: case(
        lambda p, x: sharded(
            lambda w, v, x: jax.lax.psum(jnp.tanh(x @ v), "model").sum(-1, keepdims=True) + jnp.tanh(x @ w),
            (P(), P(None, "model"), DATA),
        )(p["w"], p["v"], x),
        {"w": (4, 3), "v": (4, 2)},
        X,
        "w",
        v="cut over model inside a shard_map",
    ),
}
IDLE = {"a branch": ("v",)}
"""Layers of a branch that is not taken."""


def _both(specs, function=lambda w, x, z: x @ w + z, **settings):
    """Of a parameter and two inputs, cut likewise or not."""
    return lambda p, x: sharded(function, (P(), *specs), **settings)(p["w"], x, jnp.ones((len(x), 3)))


def _normalised(w, x):
    y = x @ w
    return jnp.tanh(y - jax.lax.pmean(y.mean(0), "data"))


def _answered_elsewhere(w, x):
    return _of_the_next(jnp.tanh(x @ w))


def _gathered(w, x):
    return jax.lax.all_gather(x, "data", tiled=True) @ w


MIXED = {
    "a mean over the batch": _normalised,
    "results on another device": _answered_elsewhere,
}
"""Functions of a parameter and the examples of a device, whose result is not that of these alone."""


REFUSED = {
    "examples over different devices": lambda: case(
        _both((DATA, P("model")), lambda w, x, z: jnp.tanh(x @ w) + jax.lax.psum(z.sum(), "model")),
        W,
        X,
        "",
        w="over other devices",
    ),
    "some examples on all devices": lambda: case(
        _both((DATA, P()), lambda w, x, z: jnp.tanh(x @ w) + z.sum()), W, X, "", w="over other devices"
    ),
    "two views cut as one": lambda: case(
        lambda p, x: block()(lambda w, x: jnp.tanh(x @ w))(p["w"], jnp.concatenate([x, x**2])).reshape(2, -1, 3).sum(0),
        W,
        X,
        "",
        w="more than the examples in their order",
    ),
    "examples cut": lambda: case(
        lambda p, x: block()(lambda w, x: jnp.tanh(x @ w))(p["w"], x.reshape(-1, 4)).reshape(-1, 4, 3).sum(1),
        W,
        (N - 2, 4, 4),
        "" if SIZES[0] > 1 else "w",
        **({"w": "cuts an example"} if SIZES[0] > 1 else {}),
    ),
    "a sum over a cut axis": lambda: case(
        lambda p, x: sharded(lambda w, x: jax.lax.psum(x @ w, "model"), (P(), P("data", "model")))(
            p["w"], jnp.tile(x, SIZES[1])
        ),
        W,
        X,
        "",
        w="does not differ along ['data'] alone",
    ),
    "no count of a further axis": lambda: case(
        lambda p, x: sharded(lambda w, x: jnp.tanh(x @ w), (P(), DATA), check=False)(p["w"], x),
        W,
        X,
        "w" if SIZES[1] == 1 else "",
        **({"w": "nothing tells what differs along ['model']"} if SIZES[1] > 1 else {}),
    ),
    "a factor of the devices": lambda: case(
        lambda p, x: block()(lambda p, x: x * (p["w"] * x.std(0)))(p, x) @ jnp.ones((4, 3)),
        {"w": (4,)},
        X,
        "",
        w="not known to be the same on all devices",
    ),
    "no examples": lambda: case(
        lambda p, x: block()(lambda p, x: x @ (jnp.ones((4, 4)) @ p["w"]))(p, x), W, X, "", w="no axis of the examples"
    ),
    "gathered examples": lambda: case(
        lambda p, x: block()(lambda w, x: x @ w + _gathered(w, x).sum())(p["w"], x),
        W,
        X,
        "w" if SIZES[0] == 1 else "",
        **({"w": "no axis of the examples"} if SIZES[0] > 1 else {}),
    ),
    "a parameter that comes out": lambda: case(
        lambda p, x: x @ sharded(lambda w: w.T, (P(),), P())(p["w"]).T, W, X, "", w="returned from a shard_map"
    ),
}


def explained(names, watched=watched):
    """{name: what is wrong with the rows of a case, "" where they give the gradient of every example}."""
    found = {}
    for name in names:
        one, layers, evidence, grad, jacobian = watched(FOLLOWED[name])
        try:
            assert set(layers) == set(one.layers), layers
            notes = {leaf.address: block.note for block in layers.rest for leaf in block.leaves}
            assert all(bool(note) == bool(one.notes[at]) and one.notes[at] in note for at, note in notes.items()), notes
            rows_give_the_gradient_of_every_example(layers, evidence, grad, jacobian, IDLE.get(name, ()))
            for norm in (block for block in layers.rest if block.kind == "norm"):
                for leaf in norm.leaves:
                    assert_equal(evidence[norm.name].examples[leaf.role][0], jacobian[leaf.address])
                    assert_differs(evidence[norm.name].examples[leaf.role][0][::-1], jacobian[leaf.address])
            found[name] = ""
        except AssertionError as error:
            found[name] = str(error) or "differs"
    return found


def without_order():
    """The control, on several devices: two views whose parts are put together as if they were blocks of one."""
    as_it_is = replay.crossing
    replay.crossing = lambda *a: (way := as_it_is(*a))._replace(axis=None, spec=P(*[e for e in way.spec if e]))
    try:
        return explained(["two views"], watched.__wrapped__)["two views"]
    finally:
        replay.crossing = as_it_is


def said(name):
    """What is wrong with the layers and the notes of a case that is not followed; "" of nothing."""
    one = REFUSED[name]()
    layers = ng.capture(one.apply, ng.losses.squared_error, verify=False).layers(one.params, one.x)
    notes = {block.name: block.note for block in layers.rest}
    there = set(layers) == set(one.layers) and notes.keys() == one.notes.keys()
    return "" if there and all(words in notes[name] for name, words in one.notes.items()) else f"{layers} {notes}"


def mixed(name):
    """The layers behind which `layers` finds the examples mixed."""
    one = case(lambda p, x: block()(MIXED[name])(p["w"], x), W, X, "w")
    return ng.capture(one.apply, ng.losses.squared_error).layers(one.params, one.x).mixed
