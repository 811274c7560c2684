"""The table of layers on the page about coverage, made by watching each layer: `python docs/layers_table.py`.

Each row is a layer between an input and a dense head, in linen and in NNX. `capture.layers` says as what kind it is
watched, and compares its products with autodiff.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import natgrad_jax as ng

PAGE = Path(__file__).parent / "layers.md"
TABLE = re.compile(r"^\| layer \|.*?\n(?=\n)", re.DOTALL | re.MULTILINE)
"""Where the table stands on the page."""
LOSS = ng.losses.squared_error


class Row(NamedTuple):
    """A layer: its name, the input without the axis of examples, a linen and an NNX module, or None."""

    name: str
    shape: tuple[int, ...]
    linen: Callable[[], Any] | None
    nnx: Callable[[nnx.Rngs], Any] | None


class OfLinen(nn.Module):
    """A layer and a dense head."""

    make: Callable[[], Any]

    @nn.compact
    def __call__(self, x):
        y = self.make()(x)
        return nn.Dense(2, name="head")(jnp.reshape(y, (len(y), -1)))


class OfNNX(nnx.Module):
    """A layer, without head."""

    def __init__(self, make, rngs):
        self.layer = make(rngs)

    def __call__(self, x):
        y = self.layer(x)
        return jnp.reshape(y, (len(y), -1))


class Lookup(nn.Module):
    """A table that is tied to the head."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(7, 4)
        return table.attend(nn.tanh(table(x)))


class Scanned(nn.Module):
    """A dense layer, three times, each with weights of its own."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


class Step(nn.Module):
    """One step of the scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(x.shape[-1])(x)), None


class Spectral(nn.Module):
    """A dense layer whose kernel is divided by its largest singular value."""

    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=False)


class OwnProduct(nn.Module):
    """A product that a module writes itself."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, 6))
        return jnp.einsum("nd,dhk->nhk", x, kernel.reshape(4, 2, 3))


class OwnTable(nn.Module):
    """A lookup that a module writes itself."""

    @nn.compact
    def __call__(self, x):
        return self.param("table", nn.initializers.normal(), (7, 4))[x]


class Standardised(nn.Conv):
    """A convolution whose kernel is standardised before it is used."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return (value - value.mean((0, 1, 2))) / value.std((0, 1, 2)) if name == "kernel" else value


class Own(nnx.Module):
    """A product or a lookup that a module writes itself."""

    def __init__(self, array, use):
        self.array, self.use = nnx.Param(array), use

    def __call__(self, x):
        return self.use(self.array[...], x)


class Stack(nnx.Module):
    """Dense layers, three of them, as one scan."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        turn = nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return turn(x, self.layers)


class Rematerialised(nnx.Module):
    """A dense layer whose outputs are computed again in the backward pass."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return nnx.remat(lambda layer, x: layer(x))(self.layer, x)


class Tied(nnx.Module):
    """A table that is tied to the head."""

    def __init__(self, rngs):
        self.table = nnx.Embed(7, 4, rngs=rngs)

    def __call__(self, x):
        return self.table.attend(nnx.tanh(self.table(x)))


IMAGE, SEQUENCE, PLACES = (6, 6, 4), (5, 4), (3,)
ROWS = (
    Row("dense", (4,), lambda: nn.Dense(3), lambda r: nnx.Linear(4, 3, rngs=r)),
    Row("dense on sequences", SEQUENCE, lambda: nn.Dense(3), lambda r: nnx.Linear(4, 3, rngs=r)),
    Row(
        "`DenseGeneral`, `LinearGeneral`",
        SEQUENCE,
        lambda: nn.DenseGeneral((2, 3)),
        lambda r: nnx.LinearGeneral(4, (2, 3), rngs=r),
    ),
    Row(
        "`Einsum`",
        SEQUENCE,
        lambda: nn.Einsum((4, 2, 3), "btd,dhk->bthk"),
        lambda r: nnx.Einsum("btd,dhk->bthk", (4, 2, 3), rngs=r),
    ),
    Row("convolution, 1D", SEQUENCE, lambda: nn.Conv(3, (3,)), lambda r: nnx.Conv(4, 3, (3,), rngs=r)),
    Row("convolution, 2D", IMAGE, lambda: nn.Conv(3, (3, 3)), lambda r: nnx.Conv(4, 3, (3, 3), rngs=r)),
    Row("convolution, 3D", (4, 4, 4, 2), lambda: nn.Conv(3, (2, 2, 2)), lambda r: nnx.Conv(2, 3, (2, 2, 2), rngs=r)),
    Row(
        "strided, dilated",
        IMAGE,
        lambda: nn.Conv(3, (2, 2), strides=2, kernel_dilation=2),
        lambda r: nnx.Conv(4, 3, (2, 2), strides=2, kernel_dilation=2, rngs=r),
    ),
    Row(
        "grouped",
        IMAGE,
        lambda: nn.Conv(4, (3, 3), feature_group_count=2),
        lambda r: nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=r),
    ),
    Row(
        "depthwise",
        IMAGE,
        lambda: nn.Conv(4, (3, 3), feature_group_count=4),
        lambda r: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=r),
    ),
    Row(
        "transposed",
        IMAGE,
        lambda: nn.ConvTranspose(3, (2, 2), strides=(2, 2)),
        lambda r: nnx.ConvTranspose(4, 3, (2, 2), strides=(2, 2), rngs=r),
    ),
    Row("`ConvLocal`", IMAGE, lambda: nn.ConvLocal(3, (2, 2)), None),
    Row("embedding", PLACES, lambda: nn.Embed(7, 4), lambda r: nnx.Embed(7, 4, rngs=r)),
    Row("embedding tied to the head", PLACES, Lookup, Tied),
    Row(
        "attention",
        SEQUENCE,
        lambda: nn.MultiHeadDotProductAttention(2),
        lambda r: nnx.MultiHeadAttention(2, 4, decode=False, rngs=r),
    ),
    Row("LSTM", SEQUENCE, lambda: nn.RNN(nn.LSTMCell(3)), lambda r: nnx.RNN(nnx.LSTMCell(4, 3, rngs=r), rngs=r)),
    Row(
        "optimized LSTM",
        SEQUENCE,
        lambda: nn.RNN(nn.OptimizedLSTMCell(3)),
        lambda r: nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=r), rngs=r),
    ),
    Row("GRU", SEQUENCE, lambda: nn.RNN(nn.GRUCell(3)), lambda r: nnx.RNN(nnx.GRUCell(4, 3, rngs=r), rngs=r)),
    Row(
        "both ways in time",
        SEQUENCE,
        lambda: nn.Bidirectional(nn.RNN(nn.SimpleCell(3)), nn.RNN(nn.SimpleCell(3))),
        lambda r: nnx.Bidirectional(*(nnx.RNN(nnx.SimpleCell(4, 3, rngs=r), rngs=r) for _ in range(2)), rngs=r),
    ),
    Row("`scan` over layers", (4,), Scanned, Stack),
    Row("`remat`", (4,), lambda: nn.remat(nn.Dense)(3), Rematerialised),
    Row(
        "a module's own product",
        (4,),
        OwnProduct,
        lambda r: Own(r.normal((4, 3)), lambda kernel, x: x @ kernel),
    ),
    Row("a module's own table", PLACES, OwnTable, lambda r: Own(r.normal((7, 4)), lambda table, x: table[x])),
    Row("LoRA", (4,), None, lambda r: nnx.LoRA(4, 2, 3, rngs=r)),
    Row("layer norm", (4,), lambda: nn.LayerNorm(), lambda r: nnx.LayerNorm(4, rngs=r)),
    Row("RMS norm", (4,), lambda: nn.RMSNorm(), lambda r: nnx.RMSNorm(4, rngs=r)),
    Row("group norm", IMAGE, lambda: nn.GroupNorm(2), lambda r: nnx.GroupNorm(4, 2, rngs=r)),
    Row("instance norm", IMAGE, lambda: nn.InstanceNorm(), lambda r: nnx.InstanceNorm(4, rngs=r)),
    Row(
        "batch norm, in evaluation",
        (4,),
        lambda: nn.BatchNorm(use_running_average=True),
        lambda r: nnx.BatchNorm(4, use_running_average=True, rngs=r),
    ),
    Row("`PReLU`", (4,), lambda: nn.PReLU(), lambda r: nnx.PReLU()),
    Row(
        "weight norm",
        (4,),
        lambda: nn.WeightNorm(nn.Dense(3)),
        lambda r: nnx.WeightNorm(nnx.Linear(4, 3, rngs=r), rngs=r),
    ),
    Row("spectral norm", (4,), Spectral, lambda r: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=r), rngs=r)),
    Row("standardised convolution", IMAGE, lambda: Standardised(3, (3, 3)), None),
)


def inputs(row):
    """Four examples for a layer."""
    if row.shape == PLACES:
        return jnp.arange(4 * row.shape[0]).reshape(4, -1) % 7
    return jax.random.normal(jax.random.key(0), (4, *row.shape))


def of_linen(row, verify=True):
    """The layers and remaining parameters of a linen layer, without those of its head."""
    x = inputs(row)
    tied = row.linen is Lookup
    model = Lookup() if tied else OfLinen(row.linen)
    make = model.init if verify else lambda *args: jax.eval_shape(model.init, *args)
    found = ng.linen.capture(model, LOSS, verify=verify).layers(make(jax.random.key(1), x), x)
    return [layer for layer in found.blocks if not layer.name.startswith("head")]


def of_nnx(row, verify=True):
    """The same of an NNX layer."""
    model = OfNNX(row.nnx, nnx.Rngs(0))
    return list(ng.nnx.capture(model, LOSS, verify=verify).layers(model, inputs(row)).blocks)


def cell(watch, row, verify=True):
    """As what a layer is watched."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        blocks = watch(row, verify)
    if any("do not explain" in str(warning.message) for warning in caught):
        return "not explained"
    known = sorted({use.kind for layer in blocks if layer.is_known for use in layer.uses})
    others = sorted({{"norm": "norm"}.get(layer.kind, "diagonal") for layer in blocks if not layer.is_known})
    return " and ".join([*known, *others])


def line(row, verify=True):
    """The line of a layer."""
    cells = [
        "-" if make is None else cell(watch, row, verify) for make, watch in ((row.linen, of_linen), (row.nnx, of_nnx))
    ]
    exact = all(each in ("dense", "conv", "embed", "dense and embed", "norm", "-") for each in cells)
    return f"| {row.name} | {cells[0]} | {cells[1]} | {'yes' if exact else 'no'} |"


def table(verify=True):
    """The whole table."""
    return (
        "\n".join([
            "| layer | linen | NNX | exact |",
            "| --- | --- | --- | --- |",
            *(line(row, verify) for row in ROWS),
        ])
        + "\n"
    )


def shown():
    """The table on the page as it is."""
    return TABLE.findall(PAGE.read_text())[0]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(shown(), table()))
    print(shown())
