"""The coverage report, what `print(layers)` shows; and what a state holds of each layer."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax


def coverage(layers: Any, widest: int) -> str:
    """The coverage report of some `base.Layers`.

    Args:
        layers: known layers and remaining parameters.
        widest: the largest size of a side whose whole factor is kept.

    Returns:
        A table of the known layers, then the remaining parameters with the reasons in their notes.
    """
    lines = []
    if layers.known:
        sampled = layers.examples * layers.draws
        rows = [("parameter", "shape", "kind", "factors", "state", "in sample space")]
        for layer in layers.known:
            first, *others = layer.leaves
            copies = "".join(f"{size} x " for size in layer.stack)
            batch = 4 * (min(layer.sample_sizes(layers.examples, layers.draws)) + prod(layer.stack) * sampled**2)
            sizes = (bytes_shown(_factors(layer, widest)), bytes_shown(batch) if sampled else "")
            rows.append((first.address, str(first.shape), layer.kind, f"{copies}{layer.shape}", *sizes))
            rows.extend((leaf.address, str(leaf.shape), "", "", "", "") for leaf in others)
        lines.extend(aligned(rows))
        lines.append(
            "(factors: sizes of the two sides, bias included; state: a pair of float32 factors and their inverses)"
        )
        if sampled:
            lines.append(f"(in sample space: {_batch(layers)}, with the inverse of their kernel, as TENGraD has it)")
    norms = [layer for layer in layers.rest if layer.kind == "norm"]
    rest = [layer for layer in layers.rest if layer.kind != "norm"]
    if norms:
        lines.append("Norms, an exact Fisher block of scale and shift for each channel, same damping and rate:")
        width = max(len(layer.name) for layer in norms)
        lines.extend(f"  {layer.name.ljust(width)}  {_blocks(layer)}" for layer in norms)
    if rest:
        exact = "; TENGraD, of the gradients of the examples, has them all" if layers.jacobian == "examples" else ""
        lines.append(f"Not covered, hence a diagonal Fisher block each, same damping and learning rate{exact}:")
        width = max(len(layer.name) for layer in rest)
        lines.extend(f"  {layer.name.ljust(width)}  {layer.shape}  {layer.note}".rstrip() for layer in rest)
    elif layers.known:
        lines.append("Every parameter is covered.")
    if layers.mixed:
        behind = "every layer" if len(layers.mixed) == len(layers.known) else ", ".join(layers.mixed)
        lines.append(
            f"Behind {behind}, examples are mixed (batch normalisation, attention over a batch): the gradient of an "
            "example is not that of its rows there. What TENGraD and the scale of EKFAC say of single examples "
            "is then an approximation."
        )
    if layers.labels:
        lines.append(f"Curvature by {_LABELS[layers.labels]}.")
    return "\n".join(lines)


_LABELS = {
    "sampled": 'labels drawn from the model (labels="sampled"), noisy and without bias',
    "exact": 'the Hessian of the likelihood itself (labels="exact"), without noise',
    "true": 'the labels of the batch (labels="true"), the empirical Fisher matrix',
    "forward": 'inputs alone (labels="forward")',
}


def _blocks(norm: Any) -> str:
    """The blocks of a norm in words: "8 of 2 x 2"."""
    channels, arrays = norm.shape
    return f"{channels} of {arrays} x {arrays}"


def held(state: Any) -> str:
    """What the state of an optimizer holds of each layer.

    Args:
        state: arrays or their shapes, with states that have `statistics` and `operators` by layer somewhere in them.

    Returns:
        A table.
    """
    rows = [("layer", "factors", "statistics", "applied")]
    found: list[Any] = []
    jax.tree.map(found.append, state, is_leaf=has_layers)
    for each in filter(has_layers, found):
        for name, statistics in each.statistics.items():
            applied = each.operators[name].value
            rows.append((name, _sides(statistics), bytes_shown(size(statistics)), bytes_shown(size(applied))))
    return "\n".join([*aligned(rows), f"(whole state, momentum included: {bytes_shown(size(state))})"])


def size(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def has_layers(node: Any) -> bool:
    """Whether a part of a state is that of a method, with `statistics` and `operators` by layer."""
    return hasattr(node, "statistics") and hasattr(node, "operators")


def _sides(statistics: Any) -> str:
    """The sizes of the factors of a layer, and how many vectors of a truncated one are kept."""
    shown = []
    for leaf in jax.tree.leaves(statistics, is_leaf=lambda node: hasattr(node, "vectors")):
        if hasattr(leaf, "vectors"):
            shown.append("{1} of {0}".format(*leaf.vectors.shape[-2:]))
        elif leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2]:
            shown.append(str(leaf.shape[-1]))
        elif leaf.ndim:
            shown.append(f"diagonal of {leaf.shape[-1]}")
    return ", ".join(shown)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows of a table as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _factors(layer: Any, widest: int) -> int:
    """Bytes of a pair of float32 factors and their inverses, of which a side that is too wide has the diagonal."""
    rows, columns = (size if size > widest else size**2 for size in layer.shape)
    return prod(layer.stack) * 8 * ((layer.shape[0] if layer.one_hot else rows) + columns)


def _batch(layers: Any) -> str:
    """How many rows a batch has, in words."""
    draws = f" of {layers.draws} draws" if layers.draws > 1 else ""
    return f"{layers.examples} examples{draws}"


def bytes_shown(count: float) -> str:
    """A number of bytes for reading."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
