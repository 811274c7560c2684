"""What the state of an optimizer says of each layer: as a table to read, and as numbers to log.

    1  block <- eigenvalues of what is kept of the layer     A (x) G, the two traces, a scale, a diagonal; else a factor
    2  share <- damping / (damping + mean eigenvalue)        of the same
    3  cause <- the first rule that the numbers of the layer break, with what to change      and one of the whole

It runs on the host, outside of `jit`, and takes an eigendecomposition of every factor: now and then, not at each step.
Not here: the rules; see `rules`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from natgrad_jax import addresses, checks, rules
from natgrad_jax.algebra import averages
from natgrad_jax.algebra.averages import Average
from natgrad_jax.algebra.stacks import Diagonal, Truncated
from natgrad_jax.around.automatic import AutomaticState
from natgrad_jax.around.clip import ClipState
from natgrad_jax.around.control import ControlState
from natgrad_jax.base import Layers
from natgrad_jax.blocks import kronecker
from natgrad_jax.blocks.rotated import Rotated
from natgrad_jax.lift.state import NaturalGradientState
from natgrad_jax.report import aligned

COLUMNS = ("weight", "age", "condition", "smallest", "largest", "damping_share", "rejected", "step")
_CONTROLLED = (ControlState, AutomaticState)
_AROUND = (*_CONTROLLED, ClipState)


class _Spectrum(NamedTuple):
    """Eigenvalues: the least, the greatest, their mean; whether they are those of the block, not of a factor."""

    smallest: float
    largest: float
    mean: float
    of_block: bool = True


@dataclass(frozen=True)
class Diagnosis(Mapping[str, float]):
    """A flat mapping of numbers, "layer/column" and those of the whole; `print` it for the table.

    Attributes:
        numbers: {"encoder/Dense_0/age": 3.0, ..., "damping": 0.03}; what a method does not have is not there.
        causes: {layer: what is probably wrong and what to change}; "" where nothing is.
        cause: the same of the whole optimizer, on the last line of the table.
    """

    numbers: dict[str, float]
    causes: dict[str, str]
    cause: str = ""

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        shown = [column for column in COLUMNS if any(f"{name}/{column}" in self.numbers for name in self.causes)]
        rows = [("layer", *(column.replace("_", " ") for column in shown), "likely cause, and what to change")]
        for name, cause in self.causes.items():
            numbers = (self.numbers.get(f"{name}/{column}") for column in shown)
            rows.append((name, *("" if number is None else f"{number:.3g}" for number in numbers), cause))
        whole = (f"{name} {number:.3g}" for name, number in self.numbers.items() if "/" not in name)
        return "\n".join([*aligned(rows), f"whole: {', '.join(whole)}  {self.cause}".rstrip()])


def diagnose(state: Any, layers: Layers | None = None, *, params: Any = None, updates: Any = None) -> Diagnosis:
    """What the state of an optimizer says of each layer, and of the whole.

    Each layer has a row. A stack of copies shows its worst copy. The whole has a cause where an array of the state, the
    parameters or the updates is not finite, where all curvature is zero, where `kl_clip` holds every step, and where
    statistics were dropped.

    weight: how full its averages are, from 0 (nothing observed) to 1. age: steps since its operator was made.
    smallest, largest: eigenvalues of its block, without damping; if the block is no product of what the method keeps,
    of the factor with the widest range. condition: the ratio of the damped eigenvalues. damping_share: damping over
    damping plus mean eigenvalue. rejected: 1 if its last refresh was not finite and an older operator serves. step:
    norm of the update over norm of the parameters; NaN where one of them is not finite.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> params = {"w": jnp.ones((4, 3))}
    >>> watched = ng.capture(lambda params, x: x @ params["w"], ng.losses.squared_error)
    >>> layers = watched.layers(params, jnp.ones((8, 4)))
    >>> found = diagnose(ng.kfac(0.1, layers).init(params), layers)
    >>> found["w/weight"], found.causes["w"].split(":")[0]
    (0.0, 'nothing was observed yet')
    >>> found.cause
    ''

    Args:
        state: of any transformation with one of ours somewhere in it.
        layers: of the model; None for an optimizer that was built without.
        params: the parameters, for the column "step", and to see whether they are finite.
        updates: the last updates, for the same.

    Returns:
        A `Diagnosis`: print it, or log `dict(...)` of it.

    Raises:
        TypeError: if `layers` is neither None nor a `Layers`.
        ValueError: if no state of ours is in the state.
    """
    checks.layers(layers, optional=True)
    state, params, updates = (jax.device_get(addresses.unboxed(tree)) for tree in (state, params, updates))
    found: list[Any] = []
    _collect(state, (NaturalGradientState, *_AROUND), found)
    ours = [each for each in found if isinstance(each, NaturalGradientState)]
    if not ours:
        raise ValueError(
            f"`state` is of type {type(state).__name__} and has no state of natgrad_jax in it; expected what `tx.init` "
            "or `tx.update` of one of its optimizers returned."
        )
    numbers, rows = {}, {}
    for each in found:
        numbers |= _of_the_whole(each)
    for each in ours:
        for name in each.statistics:
            rows[name] = _of_layer(each, name, layers, numbers)
            if params is not None and updates is not None:
                rows[name] |= _step(name, layers, params, updates)
    numbers |= {f"{name}/{column}": row[column] for name, row in rows.items() for column in COLUMNS if column in row}
    vanished = rules.all_vanished(rows)
    remark = _remark(found)
    causes = {name: remark(rules.of_layer(row, vanished)) for name, row in rows.items()}  # 3
    not_finite = rules.not_finite({"params": params, "updates": updates, "state": state})
    return Diagnosis(numbers, causes, remark(rules.of_whole(numbers, not_finite, vanished)))


def _collect(node: Any, kinds: tuple[type, ...], found: list[Any]) -> None:
    """States of these kinds, the outer ones first; one may be inside another."""
    for leaf in jax.tree.leaves(node, is_leaf=lambda item: isinstance(item, kinds)):
        if isinstance(leaf, kinds):
            found.append(leaf)
            if isinstance(leaf, _AROUND):
                _collect(leaf.direction, kinds, found)


def _of_the_whole(state: Any) -> dict[str, float]:
    if isinstance(state, _CONTROLLED):
        found = {name: float(getattr(state, name)) for name in ("learning_rate", "momentum", "ratio")}
        return found | {"rejected_steps": float(state.rejected)}
    if isinstance(state, ClipState):
        return {"clip_factor": float(state.clip_factor)}
    return {"count": float(state.count)} | {name: float(value) for name, value in state.metrics._asdict().items()}


def _remark(found: list[Any]) -> Callable[[str], str]:
    """Adds to a cause that speaks of the damping where it is set."""
    if any(isinstance(each, AutomaticState) for each in found):
        return rules.with_automatic_damping
    if any(isinstance(each, ControlState) and each.bounds.first > 0 for each in found):  # else the damping is given
        return rules.with_adaptive_damping
    return lambda cause: cause


def _of_layer(
    state: NaturalGradientState, name: str, layers: Layers | None, whole: Mapping[str, float]
) -> dict[str, float]:
    """The numbers of one row."""
    statistics, operator, row = state.statistics[name], state.operators[name], {}
    weights = [np.min(each.weight) for each in _averages(statistics)]
    if weights:
        row["weight"] = float(min(weights))
    date, newest = np.min(operator.date), max(np.max(each.date) for each in state.operators.values())
    kind = None if layers is None else {layer.name: layer.kind for layer in layers.rest}.get(name)
    plain = kind is not None
    if not plain and date >= 0:
        row["age"] = float(state.count - 1 - date)
    if not plain:
        row["rejected"] = float(date < newest and whole.get("rejected_refreshes", 0) > 0)  # layers may take turns
    spectrum = _spectrum(statistics, operator.value, kind)  # 1
    damping = whole.get("damping", 0.0)
    if spectrum is not None and row.get("weight", 1) > 0:
        row |= {"smallest": spectrum.smallest, "largest": spectrum.largest}
        damped = damping if spectrum.of_block else 0.0
        if spectrum.smallest + damped > 0:
            row["condition"] = (spectrum.largest + damped) / (spectrum.smallest + damped)
        if spectrum.of_block and damping + spectrum.mean > 0:
            row["damping_share"] = damping / (damping + spectrum.mean)  # 2
    return row


def _averages(tree: Any) -> list[Average]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda item: isinstance(item, Average))
    return [leaf for leaf in leaves if isinstance(leaf, Average)]


def _spectrum(statistics: Any, operator: Any, kind: str | None) -> _Spectrum | None:
    """The eigenvalues of the block of a layer, or of its factor with the widest range; None if nothing is kept."""
    if kind is not None:
        if not _averages(statistics):
            return None
        mean = averages.mean(statistics)
        return _of(np.ravel(_eigenvalues(mean) if kind == "norm" else mean))
    if isinstance(operator, Rotated):
        return _of(np.ravel(averages.mean(operator.scale)))
    if isinstance(statistics, kronecker.Pair):
        return _product(*kronecker.means(statistics))
    if isinstance(statistics, Average) and isinstance(statistics.total, kronecker.Traces):
        return _product(*kronecker.trace_restricted(statistics))
    factors = [leaf for each in _averages(statistics) for leaf in _factors(averages.mean(each))]
    spectra = [_of(np.ravel(_eigenvalues(factor)))._replace(of_block=False) for factor in factors]
    return max(spectra, key=lambda each: each.largest / max(each.smallest, 1e-300), default=None)


def _factors(tree: Any) -> list[Any]:
    forms = (Diagonal, Truncated)
    leaves = jax.tree.leaves(tree, is_leaf=lambda item: isinstance(item, forms))
    return [leaf for leaf in leaves if isinstance(leaf, forms) or _is_square(leaf)]


def _is_square(leaf: Any) -> bool:
    return leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2]


def _eigenvalues(factor: Any) -> np.ndarray:
    """[..., n] in double precision, not negative."""
    if isinstance(factor, Diagonal):
        return np.asarray(factor.entries, np.float64)
    if isinstance(factor, Truncated):
        (size, rank), rest = factor.vectors.shape[-2:], np.asarray(factor.rest, np.float64)[..., None]
        return np.concatenate([factor.values, np.repeat(rest, size - rank, axis=-1)], axis=-1, dtype=np.float64)
    if not np.all(np.isfinite(factor)):
        return np.full(factor.shape[:-1], np.nan)
    return np.maximum(np.linalg.eigvalsh(np.asarray(factor, np.float64)), 0)


def _product(inputs: Any, outputs: Any) -> _Spectrum:
    one, other = _eigenvalues(inputs), _eigenvalues(outputs)
    return _of(np.ravel(one[..., :, None] * other[..., None, :]))


def _of(values: np.ndarray) -> _Spectrum:
    values = np.asarray(values, np.float64)
    return _Spectrum(float(values.min(initial=np.inf)), float(values.max(initial=0)), float(np.mean(values)))


def _step(name: str, layers: Layers | None, params: Any, updates: Any) -> dict[str, float]:
    """Norm of the update over that of the parameters, of all arrays of a layer."""
    trees = [addresses.flatten(tree) for tree in (params, updates)]
    blocks = {} if layers is None else {layer.name: layer for layer in layers.blocks}
    places = [leaf.address for leaf in blocks[name].leaves] if name in blocks else [name]
    if not all(place in tree for place in places for tree in trees):
        return {}
    norms = [np.sqrt(sum(np.sum(np.square(np.asarray(tree[p], np.float64))) for p in places)) for tree in trees]
    if not np.all(np.isfinite(norms)):
        return {"step": np.nan}
    return {"step": float(norms[1] / norms[0])} if norms[0] > 0 else {}
