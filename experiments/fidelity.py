"""How true is each method to the Fisher matrix: its blocks, and the direction that comes of them?

1. Blocks: |F - F~| / |F| in the Frobenius norm, layer by layer, of two small classifiers of images of 16x16 pixels: the
net 256-20-20-20-20-20-10 with tanh on which the first K-FAC paper drew its blocks, and a convolutional one. F~ is read
from the states of the package's own methods, undamped.

    1  F = E[vec(D) vec(D)^T], D the gradient by an image and a label
    2  F~ = Q diag(s) Q^T with Q = U (x) V; s the eigenvalues of the product, for K-FAC and TKFAC
    3  the A (x) G nearest to F: the largest singular pair of F, arranged so that a product has rank one
       (Van Loan and Pitsianis 1993)

2. Directions, of the dense net: see `directions`. Each at the start and after training by Adam. The images are MNIST's,
scaled down, if NATGRAD_DATA names a folder with `mnist/`; else scikit-learn's digits, enlarged.

Expected. By theory: EKFAC's block no worse than K-FAC's, TEKFAC's no worse than TKFAC's, and 3 no worse than K-FAC's
and TKFAC's, in every layer; TENGraD's direction with a joint block equal to d*. Not by theory: TKFAC's block better
than K-FAC's in most layers; larger errors after training; cosines in the order of what a method keeps of F.

    make fidelity                            (some two minutes)
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng
from experiments import figures
from experiments.data import Part, digits, folder, mnist
from experiments.directions import DIRECTIONS, LIKELIHOOD, Batches, angles, natural_gradient
from experiments.nets import Convnet, Perceptron
from experiments.records import Records, grouped
from experiments.running import Runner, Task
from natgrad_jax.algebra import averages
from natgrad_jax.layers.rows import input_rows, output_rows, total
from natgrad_jax.methods.ekfac import EKFAC
from natgrad_jax.methods.kfac import KFAC
from natgrad_jax.methods.tekfac import TEKFAC
from natgrad_jax.methods.tkfac import TKFAC

METHODS: dict[str, ng.Method] = {
    "K-FAC": KFAC(damping=0.0, split="exact").method(0.0),
    "EKFAC": EKFAC(damping=0.0).method(0.0, 0.0),
    "TKFAC": TKFAC(damping=0.0, split="exact").method(0.0),
    "TEKFAC": TEKFAC(damping=0.0).method(0.0, 0.0),
}
"""Methods that keep nothing of the past."""
BEST = "best A ⊗ G"
NAMES = (*METHODS, BEST)
NO_WORSE = {"EKFAC": ("K-FAC",), "TEKFAC": ("TKFAC",), BEST: ("K-FAC", "TKFAC")}
"""The theorems: what is no worse than what, on any layer and any data."""
COLOURS = {"K-FAC": "#9ecae1", "EKFAC": "#2171b5", "TKFAC": "#fdbe85", "TEKFAC": "#d94801"}


class Sizes(NamedTuple):
    """How many images there are, and of how many are the blocks, and the directions, `few`, since F is dense there.

    Then how often labels are drawn, how many batches of 100 images there are, and steps of Adam.
    """

    images: int = 10_000
    examples: int = 500
    few: int = 250
    draws: int = 100
    batches: int = 100
    steps: int = 500


DENSE, DAMPING, BATCH = "dense net", 0.01, 250
"""The net of the directions, the damping of d*, and images per step of Adam, at a rate of 0.003."""
NETS: dict[str, nn.Module] = {
    DENSE: Perceptron((20, 20, 20, 20, 20), 10),
    "CNN": Convnet((8, 16, 32), (2, 2, 2), (32,)),
}


def run(given: Path | None, sizes: Sizes = Sizes(), nets: dict[str, nn.Module] = NETS) -> Records:  # noqa: B008
    """Measure the nets at the start, train them, measure again: records of blocks, and of the dense net's angles."""
    data, found = load(given, sizes.images), []
    key = {"data": "scikit-learn's digits" if given is None else "MNIST", "seed": 0}
    for name, net in track(nets.items(), "measuring"):
        task = Task(net, LIKELIHOOD, data.first(BATCH))
        runner = Runner(lambda numbers, _: optax.adam(numbers["rate"]), {"rate": 3e-3}, task, None)
        for stage in ("start", "trained"):
            if stage == "trained":
                chosen = np.random.default_rng(0).integers(len(data.images), size=(sizes.steps, BATCH))
                runner.run(Part(data.images[rows], data.labels[rows]) for rows in chosen)
            with jax.enable_x64(True):
                params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), runner.variables["params"])
                found += [key | {"model": name, "stage": stage} | row for row in measured(net, params, data, sizes)]
                if name == DENSE:
                    found += [key | {"stage": stage} | row for row in turned(net, params, data, sizes)]
    return found


def load(given: Path | None, count: int) -> Part:
    """So many images at 16x16 pixels: those of MNIST in a folder, or the digits."""
    if given is None:
        return digits(16).train.first(count)
    images, labels = mnist(given).train.first(count)
    return Part(np.clip(jax.image.resize(images, (len(images), 16, 16, 1), "linear"), 0, 1), labels)


def measured(model: nn.Module, params: Any, data: Part, sizes: Sizes) -> Records:
    """The share of images that the model has right, and the errors of every layer."""
    capture = ng.linen.capture(model, LIKELIHOOD, labels="exact")
    images, labels = data.images[: sizes.examples].astype(np.float64), data.labels[: sizes.examples]

    @jax.jit
    def watched(params: Any) -> Any:
        out = capture.value_and_grad({"params": params}, images, labels)
        return out.curvature(), jnp.mean(jnp.argmax(out.outputs, axis=-1) == labels)

    evidence, right = watched(params)
    rows = []
    for layer in capture.layers({"params": params}, images).known:
        own = {name: float(error) for name, error in errors(layer, evidence[layer.name]).items()}
        rows.append({"right": float(right), "layer": f"{layer.name} {layer.shape[0]}x{layer.shape[1]}"} | own)
    return rows


@partial(jax.jit, static_argnums=0)
def errors(layer: ng.Layer, evidence: ng.Evidence) -> dict[str, jax.Array]:
    """{method: |F - F~| / |F|} of a layer without stack axes, and that of the best Kronecker product."""
    block = exact(layer, evidence)
    others = {name: implied(method, layer, evidence) for name, method in METHODS.items()} | {BEST: nearest(block)}
    return {name: jnp.linalg.norm(block - other) / jnp.linalg.norm(block) for name, other in others.items()}


def exact(layer: ng.Layer, evidence: ng.Evidence) -> jax.Array:
    """F, arranged [I I, O O] so that A (x) G would be vec(A) vec(G)^T."""
    rows, columns = input_rows(layer, evidence), output_rows(layer, evidence)
    gradients = jnp.einsum("nti,knto->knio", rows, columns).reshape(-1, *layer.shape)
    draws, examples = columns.shape[:2]
    block = jnp.einsum("mio,mjp->ijop", gradients, gradients) / (draws * total(evidence, examples))  # 1
    return block.reshape(layer.shape[0] ** 2, layer.shape[1] ** 2)


def implied(method: ng.Method, layer: ng.Layer, evidence: ng.Evidence) -> jax.Array:
    """F~ of a method that has seen this batch alone, arranged like F."""
    statistics, operator = method.init(layer)
    statistics = method.observe(layer, statistics, evidence)
    operator = method.refresh(layer, statistics, operator, 0.0)
    if method.rescale:
        operator = method.rescale(layer, operator, evidence)
        basis, scale = operator.basis, averages.mean(operator.scale)  # what was measured in a basis
    else:
        basis, scale = operator  # of a product, as yet undamped
    u, v = (side[:, None, :] * side[None, :, :] for side in basis)
    block = jnp.einsum("ijk,kl,opl->ijop", u, scale, v)  # 2
    return block.reshape(layer.shape[0] ** 2, layer.shape[1] ** 2)


def nearest(block: jax.Array) -> jax.Array:
    """The Kronecker product nearest to F, both arranged."""
    outputs = jnp.linalg.eigh(block.T @ block)[1][:, -1]
    return jnp.outer(block @ outputs, outputs)  # 3


def turned(model: nn.Module, params: Any, data: Part, sizes: Sizes) -> Records:
    """Every direction beside d*."""
    images, labels = data.images[: sizes.few].astype(np.float64), data.labels[: sizes.few]
    rows = np.random.default_rng(0).integers(len(data.images), size=(sizes.batches, 100))
    given = Batches(images, labels, (data.images[rows].astype(np.float64), data.labels[rows]))
    aim = np.asarray(natural_gradient(model, params, images, labels, DAMPING))
    return [row for name in DIRECTIONS for row in angles(name, model, params, given, aim, DAMPING, sizes.draws)]


def holds(row: dict[str, Any], name: str) -> bool:
    """Whether the theorem about this method holds in a layer, up to rounding."""
    return all(row[name] <= row[other] + 1e-9 for other in NO_WORSE[name])


def parted(records: Records) -> tuple[dict[tuple[str, str], Records], dict[str, dict[str, Records]], str]:
    """{(model, stage): its layers}, {stage: {method: its angles}}, and a title."""
    layers, angles = ([row for row in records if ("layer" in row) == of_layer] for of_layer in (True, False))
    directions = {stage: grouped(rows, "method") for stage, rows in grouped(angles, "stage").items()}
    title = f"Fidelity to the Fisher matrix, {records[0]['data']} at 16x16 pixels"
    return grouped(layers, "model", "stage"), directions, title


def table(records: Records) -> Table:
    """The mean errors of the blocks, the directions, and in how many layers the theorems hold."""
    blocks, directions, title = parted(records)
    layers = [row for group in blocks.values() for row in group]
    held = (f"{name} <= {', '.join(NO_WORSE[name])} in {sum(holds(row, name) for row in layers)}" for name in NO_WORSE)
    (damping,) = {row["damping"] for row in records if row.get("same")}
    rows = []
    for name in dict.fromkeys((*DIRECTIONS, *NAMES)):
        cells = [f"{np.mean([row[name] for row in group]):.3f}" if name in NAMES else "" for group in blocks.values()]
        for shown in directions.values():
            same, top = pair(shown.get(name, []))
            cells += [f"{same['cosine']:.3f}", number(same["error"])] if same else ["", ""]
            cells.append(f"{top['cosine']:.3f} ({top['damping']:g})" if top else "")
        rows.append((name, *cells))
    measured = (f"{kind}\n{stage}" for stage in directions for kind in ("cosine", "error", "best cosine"))
    return figures.table(
        title,
        ("method", *(f"{model}\n{stage}" for model, stage in blocks), *measured),
        rows,
        "Blocks: |F - F~| / |F|, mean over the layers. Directions, of the dense net: cosine with (F + "
        f"{damping:g} I)^-1 gradient and relative error, at the same damping; best cosine of a few dampings "
        f"(in brackets). Theorems of blocks hold, of {len(layers)} layers: {'; '.join(held)}.",
    )


def pair(angles: Records) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The angle at the damping of d*, if the method shares its units, and that of the largest cosine."""
    best = max(angles, key=lambda angle: np.nan_to_num(angle["cosine"], nan=-1.0), default=None)
    return next((angle for angle in angles if angle["same"]), None), best


def number(error: float | None) -> str:
    """A relative error for reading; rounding as what it is."""
    return "" if error is None else f"{error:.0e}" if error < 1e-3 else f"{error:.3f}"


def picture(records: Records) -> Figure:
    """Errors of blocks: a panel for each model and stage; cosines of directions: a panel for each stage."""
    blocks, directions, title = parted(records)
    figure, axes = figures.panels(3, 2, figsize=(11, 11), sharey="row", height_ratios=(1, 1, 1.15))
    figures.clean(axes.flat, axis="y", alpha=0.25)
    width = 0.8 / len(METHODS)
    for axis, ((model, stage), group) in zip(axes[:2].flat, blocks.items(), strict=True):
        places = np.arange(len(group))
        for index, (name, colour) in enumerate(COLOURS.items()):
            errors, left = [row[name] for row in group], places - 0.4 + (index + 0.5) * width
            axis.bar(left, errors, width, color=colour, label=name)
        least = [row[BEST] for row in group]
        axis.hlines(least, places - 0.44, places + 0.44, color="black", linewidth=1.2, label=BEST)
        axis.set_xticks(places, [row["layer"].replace(" ", "\n") for row in group], fontsize=9)
        axis.set_title(f"{model}, {stage}: {group[0]['right']:.0%} right", loc="left", fontweight="bold")
    for axis in axes[:2, 0]:
        axis.set_ylabel(r"error of a block, $\|F - \tilde{F}\|\;/\;\|F\|$")
    axes[0, 0].legend(loc="upper left", ncols=2, frameon=False, fontsize=9)
    places = np.arange(len(DIRECTIONS))
    for axis, (stage, found) in zip(axes[2], directions.items(), strict=True):
        pairs = [pair(each) for each in found.values()]
        heights = [same["cosine"] if same else 0 for same, _ in pairs]
        axis.bar(places, heights, 0.7, color="#2171b5", label="same damping")
        tops = [top["cosine"] if top else np.nan for _, top in pairs]
        axis.plot(places, tops, "D", color="#d94801", markersize=6, label="best of a few dampings")
        axis.set_xticks(places, list(found), rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_title(f"dense net, {stage}: directions", loc="left", fontweight="bold")
    axes[2, 0].set(ylabel=r"cosine with $(F + \lambda I)^{-1}\,\nabla$, all parameters", ylim=(0, 1.19))
    axes[2, 0].set_yticks(np.linspace(0, 1, 6))
    axes[2, 1].legend(ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


SHOWN = figures.Shown("fidelity", "Fidelity to the Fisher matrix", table, picture)


if __name__ == "__main__":
    SHOWN.main(lambda: run(folder()))
