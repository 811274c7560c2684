"""How far are the Fisher blocks of K-FAC, EKFAC, TKFAC and TEKFAC from those that they stand for?

Measured is the relative error |F - F~| / |F| in the Frobenius norm, layer by layer, of two small classifiers of images
of 16x16 pixels: the net 256-20-20-20-20-20-10 with tanh on which the first K-FAC paper drew its blocks, and a
convolutional one. Each at its start and after training by Adam, with F of some images, exact: no label is sampled and
nothing is averaged over steps or damped. F~ is read from the states of the package's own methods.

    1  F = E[vec(D) vec(D)^T], D the gradient by an image and a label
    2  F~ = Q diag(s) Q^T with Q = U (x) V; s the eigenvalues of the product, for K-FAC and TKFAC
    3  the A (x) G nearest to F: A and G the largest singular pair of F, arranged so that a product has rank one
       (Van Loan and Pitsianis 1993)

Expected. By theory, for every layer: EKFAC no worse than K-FAC, TEKFAC no worse than TKFAC, and 3 no worse than K-FAC
and TKFAC; EKFAC and TEKFAC, which are no products, may be better than 3. Not by theory, but of most layers: TKFAC
better than K-FAC, and TEKFAC than EKFAC. Larger errors after training, when F comes from the few images that the model
is not sure of, and for K-FAC on convolutions, whose positions it takes for independent.

The images are MNIST's, scaled down, if NATGRAD_DATA names a folder with `mnist/`, its four IDX files as they are
distributed; else the digits of scikit-learn, scaled up.
"""

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import natgrad_jax as ng
from natgrad_jax import averages
from natgrad_jax.layers import input_rows, output_rows, total
from natgrad_jax.methods.ekfac import ekfac_block
from natgrad_jax.methods.kfac import kfac_block
from natgrad_jax.methods.tekfac import tekfac_block
from natgrad_jax.methods.tkfac import tkfac_block


class Entry(NamedTuple):
    """A method that keeps nothing of the past, and how to read a basis (U, V) and a scale from its state."""

    method: ng.Method
    read: Callable[[Any], tuple[Any, jax.Array]]


def product(state: Any) -> tuple[Any, jax.Array]:
    """The eigenvectors of a Kronecker product, and the products of its eigenvalues, as yet undamped."""
    return state.inverse


def rescaled(state: Any) -> tuple[Any, jax.Array]:
    """A basis, and what was measured in it."""
    return state.basis, averages.mean(state.scale)


METHODS = {
    "K-FAC": Entry(kfac_block(0.0, split="exact"), product),
    "EKFAC": Entry(ekfac_block(0.0), rescaled),
    "TKFAC": Entry(tkfac_block(0.0, split="exact"), product),
    "TEKFAC": Entry(tekfac_block(0.0), rescaled),
}
BEST = "best A ⊗ G"
NAMES = (*METHODS, BEST)
NO_WORSE = {"EKFAC": ("K-FAC",), "TEKFAC": ("TKFAC",), BEST: ("K-FAC", "TKFAC")}
"""The theorems: what is no worse than what, on any layer and any data."""
COLOURS = {"K-FAC": "#9ecae1", "EKFAC": "#2171b5", "TKFAC": "#fdbe85", "TEKFAC": "#d94801"}


@dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
        output: folder of the picture.
        data: folder with `mnist/`; None for the digits of scikit-learn.
        images: how many images to train on; all of them where there are fewer.
        examples: how many of these the blocks are of.
        widths: outputs of the hidden layers of the dense net.
        channels: outputs of the convolutions.
        hidden: outputs of the dense layer behind them.
        steps: of Adam between the two measurements.
        batch: images per step.
        learning_rate: Adam's.
        seed: of the initial parameters and the order of the data.
    """

    output: Path = Path("results")
    data: Path | None = Path(os.environ["NATGRAD_DATA"]) if os.environ.get("NATGRAD_DATA") else None
    images: int = 10_000
    examples: int = 500
    widths: tuple[int, ...] = (20, 20, 20, 20, 20)
    channels: tuple[int, ...] = (8, 16, 32)
    hidden: int = 32
    steps: int = 500
    batch: int = 250
    learning_rate: float = 3e-3
    seed: int = 0


class Dense(nn.Module):
    """Dense layers with tanh between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        """Images [N, 16, 16, 1] -> logits [N, 10]."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Convolutional(nn.Module):
    """Convolutions of 3x3 and stride 2, then two dense layers; ReLU between them."""

    channels: tuple[int, ...]
    hidden: int

    @nn.compact
    def __call__(self, x):
        """Images [N, 16, 16, 1] -> logits [N, 10]."""
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Data(NamedTuple):
    """Images [N, 16, 16, 1] in [0, 1] and their labels [N]."""

    images: np.ndarray
    labels: np.ndarray


class Record(NamedTuple):
    """The errors of one layer at one stage, {method: error}, and the share of images that the model then has right."""

    model: str
    stage: str
    right: float
    layer: ng.Layer
    errors: dict[str, float]


def run(config: Config, report: Callable[[str], None] = lambda doing: None) -> list[Record]:
    """Measure both models at the start, train them, and measure again.

    Args:
        config: the numbers.
        report: called with what is being done.

    Returns:
        The records, model by model, stage by stage, in the order of the layers.
    """
    data = load(config)
    models = {"dense net": Dense(config.widths), "CNN": Convolutional(config.channels, config.hidden)}
    records = []
    for name, model in models.items():
        report(f"{name}: blocks at the start")
        params = jax.jit(model.init)(jax.random.key(config.seed), data.images[:1])["params"]
        records += measured(name, "start", model, params, data, config)
        report(f"{name}: training")
        params = trained(model, params, data, config)
        report(f"{name}: blocks after training")
        records += measured(name, "trained", model, params, data, config)
    return records


def source(config: Config) -> str:
    """What the images are."""
    return "scikit-learn's digits" if config.data is None else "MNIST"


def load(config: Config) -> Data:
    """The images at 16x16 pixels."""
    if config.data is None:
        digits: Any = load_digits()
        images, labels = digits.images / 16, digits.target
    else:
        pixels, labels = (
            np.frombuffer(gzip.decompress((config.data / "mnist" / f"train-{file}-ubyte.gz").read_bytes()), np.uint8)
            for file in ("images-idx3", "labels-idx1")
        )
        images, labels = pixels[16:].reshape(-1, 28, 28)[: config.images] / 255, labels[8:]  # behind their headers
    images = images[: config.images, ..., None].astype(np.float32)
    images = np.clip(jax.image.resize(images, (len(images), 16, 16, 1), "linear"), 0, 1)
    return Data(images, labels[: config.images].astype(np.int32))


def trained(model: nn.Module, params: Any, data: Data, config: Config) -> Any:
    """The parameters after some steps of Adam."""
    tx = optax.adam(config.learning_rate)

    def loss(params, images, labels):
        outputs: Any = model.apply({"params": params}, images)
        return ng.losses.softmax_cross_entropy(outputs, labels)

    @jax.jit
    def step(params, opt_state, images, labels):
        updates, opt_state = tx.update(jax.grad(loss)(params, images, labels), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state, random = tx.init(params), np.random.default_rng(config.seed)
    for _ in range(config.steps):
        chosen = random.integers(len(data.images), size=config.batch)
        params, opt_state = step(params, opt_state, data.images[chosen], data.labels[chosen])
    return params


def measured(name: str, stage: str, model: nn.Module, params: Any, data: Data, config: Config) -> list[Record]:
    """The errors of every layer, in double precision."""
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="exact")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        images, labels = data.images[: config.examples].astype(np.float64), data.labels[: config.examples]
        evidence, right = watched(capture, params, images, labels)
        found = {
            layer: errors(layer, evidence[layer.name]) for layer in capture.layers({"params": params}, images).known
        }
        return [
            Record(name, stage, float(right), layer, {name: float(of_layer[name]) for name in NAMES})
            for layer, of_layer in found.items()
        ]


@partial(jax.jit, static_argnums=0)
def watched(capture: Any, params: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
    """The evidence of every layer, and the share of images that the model has right."""
    out = capture.value_and_grad({"params": params}, images, labels)
    return out.curvature(), jnp.mean(jnp.argmax(out.outputs, axis=-1) == labels)


@partial(jax.jit, static_argnums=0)
def errors(layer: ng.Layer, evidence: ng.Evidence) -> dict[str, jax.Array]:
    """The relative errors of the methods and of the best Kronecker product, of a layer without stack axes.

    Args:
        layer: the layer.
        evidence: of one batch.

    Returns:
        {method: |F - F~| / |F|}.
    """
    block = exact(layer, evidence)
    others = {name: implied(entry, layer, evidence) for name, entry in METHODS.items()} | {BEST: nearest(block)}
    return {name: jnp.linalg.norm(block - other) / jnp.linalg.norm(block) for name, other in others.items()}


def exact(layer: ng.Layer, evidence: ng.Evidence) -> jax.Array:
    """F, arranged [I I, O O] so that A (x) G would be vec(A) vec(G)^T."""
    rows, columns = input_rows(layer, evidence), output_rows(layer, evidence)
    gradients = jnp.einsum("nti,knto->knio", rows, columns).reshape(-1, *layer.shape)
    draws, examples = columns.shape[:2]
    block = jnp.einsum("mio,mjp->ijop", gradients, gradients) / (draws * total(evidence, examples))  # 1
    return block.reshape(layer.shape[0] ** 2, layer.shape[1] ** 2)


def implied(entry: Entry, layer: ng.Layer, evidence: ng.Evidence) -> jax.Array:
    """F~ of a method that has seen this batch alone, arranged like F."""
    state = entry.method.observe(layer, entry.method.init(layer), evidence)
    state = entry.method.refresh(layer, state, 0.0)
    if entry.method.rescale:
        state = entry.method.rescale(layer, state, evidence)
    basis, scale = entry.read(state)
    u, v = (side[:, None, :] * side[None, :, :] for side in basis)
    block = jnp.einsum("ijk,kl,opl->ijop", u, scale, v)  # 2
    return block.reshape(layer.shape[0] ** 2, layer.shape[1] ** 2)


def nearest(block: jax.Array) -> jax.Array:
    """The Kronecker product nearest to F, both arranged."""
    outputs = jnp.linalg.eigh(block.T @ block)[1][:, -1]
    return jnp.outer(block @ outputs, outputs)  # 3


def groups(records: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """{model: {stage: the records of its layers}}."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(record.model, {}).setdefault(record.stage, []).append(record)
    return found


def holds(record: Record, name: str) -> bool:
    """Whether the theorem about this method holds in a layer, up to rounding."""
    return all(record.errors[name] <= record.errors[other] + 1e-9 for other in NO_WORSE[name])


def table(records: list[Record], config: Config) -> Table:
    """The errors, and in how many layers the theorems hold."""
    result = Table(
        title="Relative error of the Fisher block of each layer",
        caption=f"|F - F~| / |F| in the Frobenius norm, F exact on {config.examples} images of {source(config)} at "
        "16x16 pixels. Right: share of these that the model gets right. Below each model: in how many layers a column "
        "is no larger than another.",
        caption_justify="left",
    )
    result.add_column("model")
    result.add_column("layer", no_wrap=True)
    for name in NAMES:
        result.add_column(name, justify="right")
    for model, stages in groups(records).items():
        for stage, group in stages.items():
            rows = [(label(record.layer), *record.errors.values()) for record in group]
            rows.append(("mean", *np.mean([row[1:] for row in rows], axis=0)))
            for head, row in zip_longest((model, stage, f"{group[0].right:.0%} right"), rows, fillvalue=""):
                name, *numbers = row or ("",)
                result.add_row(head, name, *(f"{number:.3f}" for number in numbers))
            result.add_section()
        all_layers = [record for group in stages.values() for record in group]
        counts = {name: sum(holds(record, name) for record in all_layers) for name in NO_WORSE}
        cells = (
            f"{counts[name]}/{len(all_layers)}\n≤ {', '.join(NO_WORSE[name])}" if name in NO_WORSE else ""
            for name in NAMES
        )
        result.add_row(model, "theorems", *cells, end_section=True)
    return result


def label(layer: ng.Layer) -> str:
    """The name of a layer and the shape of its matrix."""
    return f"{layer.name} {layer.shape[0]}x{layer.shape[1]}"


def picture(records: list[Record], config: Config) -> Figure:
    """A bar for each method and layer, a line for the best Kronecker product; a panel for each model and stage."""
    models = groups(records)
    figure, axes = plt.subplots(len(models), 2, figsize=(11, 7.5), sharey=True, layout="constrained", squeeze=False)
    width = 0.8 / len(METHODS)
    for row, (model, stages) in zip(axes, models.items(), strict=True):
        for axis, (stage, group) in zip(row, stages.items(), strict=True):
            positions = np.arange(len(group))
            for index, (name, colour) in enumerate(COLOURS.items()):
                values = [record.errors[name] for record in group]
                axis.bar(positions - 0.4 + (index + 0.5) * width, values, width, color=colour, label=name)
            best = [record.errors[BEST] for record in group]
            axis.hlines(best, positions - 0.44, positions + 0.44, color="black", linewidth=1.2, label=BEST)
            axis.set_xticks(positions, [label(record.layer).replace(" ", "\n") for record in group])
            axis.set_title(f"{model}, {stage}: {group[0].right:.0%} right", loc="left", fontweight="bold")
            axis.tick_params(axis="x", length=0, labelsize=9)
            axis.grid(axis="y", alpha=0.25)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(r"$\|F - \tilde{F}\|\;/\;\|F\|$")
    figure.suptitle(f"Relative error of the Fisher block of each layer, {source(config)} at 16x16 pixels")
    line, *bars = axes[0, 0].get_legend_handles_labels()[0]
    figure.legend(handles=[*bars, line], loc="outside lower center", ncols=len(NAMES), frameon=False)
    return figure


def main(config: Config) -> None:
    """Measure, print the table, write the picture."""
    console = Console()
    with console.status("") as status:
        records = run(config, status.update)
    console.print(table(records, config))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "block_error.png"
    picture(records, config).savefig(path, dpi=110)
    console.print(f"Picture: {path}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
