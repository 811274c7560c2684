"""How true is each method to the Fisher matrix: its blocks, and the direction that comes of them?

1. Blocks: |F - F~| / |F| in the Frobenius norm, layer by layer, of two small classifiers of images of 16x16 pixels: the
net 256-20-20-20-20-20-10 with tanh on which the first K-FAC paper drew its blocks, and a convolutional one. F~ is read
from the states of the package's own methods, undamped.

    1  F = E[vec(D) vec(D)^T], D the gradient by an image and a label
    2  F~ = Q diag(s) Q^T with Q = U (x) V; s the eigenvalues of the product, for K-FAC and TKFAC
    3  the A (x) G nearest to F: A and G the largest singular pair of F, arranged so that a product has rank one
       (Van Loan and Pitsianis 1993)

2. Directions: of the dense net, d against d* = (F + damping I)^-1 gradient with the F of ALL parameters together, dense
and from autodiff alone: the cosine of the two and |d - d*| / |d*|, at the damping of d* and at the best of a few.

Each at the start and after training by Adam. The family of K-FAC and TENGraD see F without sampling. TNT and MBF, whose
statistics are squares of a gradient of labels drawn from the model, see a hundred draws. What learns from gradients
of the true labels (Shampoo, SOAP, Adam), or from its own steps (K-BFGS), sees a hundred batches of 100 images at these
same parameters, its steps not taken. Shampoo, SOAP and Adam divide by a root of F, so that theirs are no lengths to
compare and dampings of their own; for K-BFGS a direction is all there is: it knows F only along the steps of before.

Expected. By theory: EKFAC's block no worse than K-FAC's, TEKFAC's no worse than TKFAC's, and 3 no worse than K-FAC's
and TKFAC's, in every layer; TENGraD's direction with a joint block equal to d*, and layer by layer equal to that of the
exact blocks. Not by theory: TKFAC's block better than K-FAC's in most layers; larger errors after training, when F
comes from the few images that the model is not sure of; cosines in the order of what a method keeps of F: TENGraD by
layer, EKFAC and TEKFAC, K-FAC and TKFAC, TNT, MBF, the gradient.

    make fidelity                            (some two minutes)
    make fidelity ARGS="--smoke"

The images are MNIST's, scaled down, if NATGRAD_DATA names a folder with `mnist/`; else scikit-learn's digits, enlarged.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
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

import natgrad_jax as ng
from experiments.data import Part, digits, folder, mnist
from experiments.directions import DIRECTIONS, LIKELIHOOD, Angle, Batches, angles, best, natural_gradient
from experiments.nets import StridedConvnet, TanhNet
from experiments.records import finite, keep, kept
from natgrad_jax.algebra import averages
from natgrad_jax.layers.rows import input_rows, output_rows, total
from natgrad_jax.methods.ekfac import EKFAC
from natgrad_jax.methods.kfac import KFAC
from natgrad_jax.methods.tekfac import TEKFAC
from natgrad_jax.methods.tkfac import TKFAC


class Entry(NamedTuple):
    """A method that keeps nothing of the past, and how to read a basis (U, V) and a scale from its operator."""

    method: ng.Method
    read: Callable[[Any], tuple[Any, jax.Array]]


def product(operator: Any) -> tuple[Any, jax.Array]:
    """The eigenvectors of a Kronecker product, and the products of its eigenvalues, as yet undamped."""
    return operator


def rescaled(operator: Any) -> tuple[Any, jax.Array]:
    """A basis, and what was measured in it."""
    return operator.basis, averages.mean(operator.scale)


METHODS = {
    "K-FAC": Entry(KFAC(damping=0.0, split="exact").method(0.0), product),
    "EKFAC": Entry(EKFAC(damping=0.0).method(0.0, 0.0), rescaled),
    "TKFAC": Entry(TKFAC(damping=0.0, split="exact").method(0.0), product),
    "TEKFAC": Entry(TEKFAC(damping=0.0).method(0.0, 0.0), rescaled),
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
        output: folder of the picture and of the records.
        data: folder with `mnist/`; None for the digits of scikit-learn.
        images: how many images to train on; all of them where there are fewer.
        examples: how many of these the blocks are of.
        few: how many the directions are of: F is dense, and TENGraD has ten rows of each.
        damping: of d*.
        draws: of labels, for the methods that see sampled ones.
        batches: for those that see minibatches: how many, of 100 images.
        widths: outputs of the hidden layers of the dense net.
        channels: outputs of the convolutions.
        hidden: outputs of the dense layer behind them.
        steps: of Adam between the two measurements.
        batch: images per step.
        learning_rate: Adam's.
        seed: of the initial parameters, the order of the data and the labels that are drawn.
        smoke: small nets and few images, to see that everything runs.
    """

    output: Path = Path("results")
    data: Path | None = field(default_factory=folder)
    images: int = 10_000
    examples: int = 500
    few: int = 250
    damping: float = 0.01
    draws: int = 100
    batches: int = 100
    widths: tuple[int, ...] = (20, 20, 20, 20, 20)
    channels: tuple[int, ...] = (8, 16, 32)
    hidden: int = 32
    steps: int = 500
    batch: int = 250
    learning_rate: float = 3e-3
    seed: int = 0
    smoke: bool = False


SMOKE: Any = {"images": 300, "examples": 20, "few": 10, "draws": 5, "batches": 5, "steps": 5}
SMALL: Any = {"widths": (4,), "channels": (2,), "hidden": 3}


class Record(NamedTuple):
    """The errors of one layer at one stage, {method: error}, and the share of images that the model then has right."""

    model: str
    stage: str
    right: float
    layer: str
    errors: dict[str, float]


Angles = dict[str, list[Angle]]
"""{method: its angles, one for each damping}."""


class Found(NamedTuple):
    """The errors of blocks, and {stage: angles} of the dense net."""

    blocks: list[Record]
    angles: dict[str, Angles]


def run(config: Config, report: Callable[[str], None] = lambda doing: None) -> Found:
    """Measure both models at the start, train them, and measure again.

    Args:
        config: the numbers.
        report: called with what is being done.

    Returns:
        The errors of blocks, model by model, stage by stage, in the order of the layers; the angles of the dense net.
    """
    data = load(config)
    models = {"dense net": TanhNet(config.widths), "CNN": StridedConvnet(config.channels, config.hidden)}
    found = Found([], {})
    for name, model in models.items():
        params = jax.jit(model.init)(jax.random.key(config.seed), data.images[:1])["params"]
        for stage in ("start", "trained"):
            if stage == "trained":
                report(f"{name}: training")
                params = trained(model, params, data, config)
            report(f"{name}, {stage}: blocks")
            found.blocks.extend(measured(name, stage, model, params, data, config))
            if isinstance(model, TanhNet):
                found.angles[stage] = turned(model, params, data, config, report)
    return found


def source(config: Config) -> str:
    """What the images are."""
    return "scikit-learn's digits" if config.data is None else "MNIST"


def load(config: Config) -> Part:
    """The images at 16x16 pixels."""
    if config.data is None:
        return digits(16).train.first(config.images)
    images, labels = mnist(config.data).train.first(config.images)
    return Part(np.clip(jax.image.resize(images, (len(images), 16, 16, 1), "linear"), 0, 1), labels)


def trained(model: nn.Module, params: Any, data: Part, config: Config) -> Any:
    """The parameters after some steps of Adam."""
    tx = optax.adam(config.learning_rate)

    def loss(params, images, labels):
        outputs: Any = model.apply({"params": params}, images)
        return LIKELIHOOD(outputs, labels)

    @jax.jit
    def step(params, opt_state, images, labels):
        updates, opt_state = tx.update(jax.grad(loss)(params, images, labels), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state, random = tx.init(params), np.random.default_rng(config.seed)
    for _ in range(config.steps):
        chosen = random.integers(len(data.images), size=config.batch)
        params, opt_state = step(params, opt_state, data.images[chosen], data.labels[chosen])
    return params


def measured(name: str, stage: str, model: nn.Module, params: Any, data: Part, config: Config) -> list[Record]:
    """The errors of every layer, in double precision."""
    capture = ng.linen.capture(model, LIKELIHOOD, labels="exact")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        images, labels = data.images[: config.examples].astype(np.float64), data.labels[: config.examples]
        evidence, right = watched(capture, params, images, labels)
        found = {
            layer: errors(layer, evidence[layer.name]) for layer in capture.layers({"params": params}, images).known
        }
        return [
            Record(name, stage, float(right), label(layer), {name: float(of_layer[name]) for name in NAMES})
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
    statistics, operator = entry.method.init(layer)
    statistics = entry.method.observe(layer, statistics, evidence)
    operator = entry.method.refresh(layer, statistics, operator, 0.0)
    if entry.method.rescale:
        operator = entry.method.rescale(layer, operator, evidence)
    basis, scale = entry.read(operator)
    u, v = (side[:, None, :] * side[None, :, :] for side in basis)
    block = jnp.einsum("ijk,kl,opl->ijop", u, scale, v)  # 2
    return block.reshape(layer.shape[0] ** 2, layer.shape[1] ** 2)


def nearest(block: jax.Array) -> jax.Array:
    """The Kronecker product nearest to F, both arranged."""
    outputs = jnp.linalg.eigh(block.T @ block)[1][:, -1]
    return jnp.outer(block @ outputs, outputs)  # 3


def turned(model: nn.Module, params: Any, data: Part, config: Config, report: Callable[[str], None]) -> Angles:
    """Every direction beside d*, in double precision."""
    few = data.first(config.few)
    rows = np.random.default_rng(config.seed).integers(len(data.images), size=(config.batches, 100))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        stream = data.images[rows].astype(np.float64), data.labels[rows]
        given = Batches(few.images.astype(np.float64), few.labels, stream)
        report("the exact direction")
        aim = np.asarray(natural_gradient(model, params, given.images, few.labels, config.damping))
        found = {}
        for name in DIRECTIONS:
            report(f"the direction of {name}")
            found[name] = angles(name, model, params, given, aim, config.damping, config.draws)
    return found


def groups(records: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """{model: {stage: the records of its layers}}."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(record.model, {}).setdefault(record.stage, []).append(record)
    return found


def holds(record: Record, name: str) -> bool:
    """Whether the theorem about this method holds in a layer, up to rounding."""
    return all(record.errors[name] <= record.errors[other] + 1e-9 for other in NO_WORSE[name])


def table(found: Found, config: Config) -> Table:
    """The mean errors of the blocks, the directions, and in how many layers the theorems hold."""
    held = {name: sum(holds(record, name) for record in found.blocks) for name in NO_WORSE}
    theorems = "; ".join(f"{name} <= {', '.join(NO_WORSE[name])} in {count}" for name, count in held.items())
    result = Table(
        title=f"Fidelity to the Fisher matrix, {source(config)} at 16x16 pixels",
        caption="Blocks: |F - F~| / |F|, mean over the layers. Directions, of the dense net: cosine with (F + "
        f"{config.damping:g} I)^-1 gradient and relative error, at the same damping; best cosine of a few dampings "
        f"(in brackets). Theorems of blocks hold, of {len(found.blocks)} layers: {theorems}.",
        caption_justify="left",
    )
    models = groups(found.blocks)
    result.add_column("method", no_wrap=True)
    for heading in (f"{model}\n{stage}" for model, stages in models.items() for stage in stages):
        result.add_column(heading, justify="right")
    for heading in (
        f"{kind}\n{stage}" for stage in ("start", "trained") for kind in ("cosine", "error", "best cosine")
    ):
        result.add_column(heading, justify="right")
    for name in dict.fromkeys((*DIRECTIONS, *NAMES)):
        cells = [
            f"{np.mean([record.errors[name] for record in group]):.3f}" if name in NAMES else ""
            for stages in models.values()
            for group in stages.values()
        ]
        for shown in found.angles.values():
            same, top = pair(shown.get(name, []))
            cells += [f"{same.cosine:.3f}", number(same.error)] if same else ["", ""]
            cells.append(f"{top.cosine:.3f} ({top.damping:g})" if top else "")
        result.add_row(name, *cells)
    return result


def pair(angles: list[Angle]) -> tuple[Angle | None, Angle | None]:
    """The angle at the damping of d*, if the method shares its units, and the best."""
    return next((angle for angle in angles if angle.same), None), best(angles) if angles else None


def number(error: float) -> str:
    """A relative error for reading; rounding as what it is."""
    return "" if np.isnan(error) else f"{error:.0e}" if error < 1e-3 else f"{error:.3f}"


def label(layer: ng.Layer) -> str:
    """The name of a layer and the shape of its matrix."""
    return f"{layer.name} {layer.shape[0]}x{layer.shape[1]}"


def picture(found: Found, config: Config) -> Figure:
    """Errors of blocks: a panel for each model and stage; cosines of directions: a panel for each stage."""
    models = groups(found.blocks)
    figure, axes = plt.subplots(3, 2, figsize=(11, 11), sharey="row", layout="constrained", height_ratios=(1, 1, 1.15))
    width = 0.8 / len(METHODS)
    for row, (model, stages) in zip(axes[:2], models.items(), strict=True):
        for axis, (stage, group) in zip(row, stages.items(), strict=True):
            positions = np.arange(len(group))
            for index, (name, colour) in enumerate(COLOURS.items()):
                values = [record.errors[name] for record in group]
                axis.bar(positions - 0.4 + (index + 0.5) * width, values, width, color=colour, label=name)
            best = [record.errors[BEST] for record in group]
            axis.hlines(best, positions - 0.44, positions + 0.44, color="black", linewidth=1.2, label=BEST)
            axis.set_xticks(positions, [record.layer.replace(" ", "\n") for record in group], fontsize=9)
            axis.set_title(f"{model}, {stage}: {group[0].right:.0%} right", loc="left", fontweight="bold")
        row[0].set_ylabel(r"error of a block, $\|F - \tilde{F}\|\;/\;\|F\|$")
    line, *bars = axes[0, 0].get_legend_handles_labels()[0]
    axes[0, 0].legend(handles=[*bars, line], loc="upper left", ncols=2, frameon=False, fontsize=9)
    positions = np.arange(len(DIRECTIONS))
    for axis, stage in zip(axes[2], found.angles, strict=True):
        pairs = [pair(each) for each in found.angles[stage].values()]
        axis.bar(positions, [0 if same is None else same.cosine for same, _ in pairs], 0.7, color="#2171b5")
        axis.plot(
            positions, [np.nan if top is None else top.cosine for _, top in pairs], "D", color="#d94801", markersize=6
        )
        axis.set_xticks(positions, list(DIRECTIONS), rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_title(f"dense net, {stage}: directions", loc="left", fontweight="bold")
    axes[2, 0].set(ylabel=r"cosine with $(F + \lambda I)^{-1}\,\nabla$, all parameters", ylim=(0, 1.19))
    axes[2, 0].set_yticks(np.linspace(0, 1, 6))
    entries = [f"same damping, {config.damping:g}", "best of a few dampings"]
    axes[2, 1].legend([axes[2, 1].patches[0], axes[2, 1].lines[0]], entries, ncols=2, frameon=False, fontsize=9)
    for axis in axes.flat:
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Fidelity to the Fisher matrix, {source(config)} at 16x16 pixels")
    return figure


def keep_all(found: Found, config: Config) -> None:
    """Write the records, a line of JSON each, in the place of older ones."""
    setting = {"data": source(config), "seed": config.seed}
    blocks = [
        setting | {"model": each.model, "stage": each.stage, "right": each.right, "layer": each.layer} | each.errors
        for each in found.blocks
    ]
    directions = [
        setting | {"stage": stage} | angle._asdict() | {"error": finite(angle.error, 12)}
        for stage, found_there in found.angles.items()
        for angles in found_there.values()
        for angle in angles
    ]
    path = config.output / "fidelity.jsonl"
    path.unlink(missing_ok=True)
    keep(path, blocks + directions)


def found_in(folder: Path) -> Found:
    """What `keep_all` wrote into a folder; nothing if there is no file."""
    found, entries = Found([], {}), {"model", "stage", "right", "layer"}
    for record in kept(folder / "fidelity.jsonl"):
        if "layer" in record:
            errors = {name: record[name] for name in NAMES}
            found.blocks.append(Record(**{name: record[name] for name in entries}, errors=errors))
        else:
            angle = {name: record[name] for name in Angle._fields}
            angle["error"] = np.nan if angle["error"] is None else angle["error"]
            found.angles.setdefault(record["stage"], {}).setdefault(record["method"], []).append(Angle(**angle))
    return found


def main(config: Config) -> None:
    """Measure, print the table, write the picture and the records."""
    if config.smoke:
        config = replace(config, output=config.output / "smoke", data=None, **SMOKE, **SMALL)
    console = Console(width=170)
    with console.status("") as status:
        found = run(config, status.update)
    console.print(table(found, config))
    path = config.output / "fidelity.png"
    keep_all(found, config)
    picture(found, config).savefig(path, dpi=110)
    console.print(f"Picture: {path}; records: {path.with_suffix('.jsonl')}")


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(tyro.cli(Config, description=__doc__))
