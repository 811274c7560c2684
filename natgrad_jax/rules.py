"""The rules of `diagnose`: from the numbers of a layer, or of the whole, to the likely cause and what to change.

The first rule that is broken speaks. A number that a method does not have breaks none.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_HUGE, _NOISE, _DROWNED = 1e18, 1e-6, 0.99
_CLIPPED = 1e-3
"""Of `kl_clip=1e-3` a step that would move the model by 500 nats. Good runs are clipped to 0.007."""

_LOWER = "raise `damping`, lower the learning rate, or set `kl_clip`"

Row = Mapping[str, float]


def of_layer(row: Row, vanished: bool) -> str:
    """The likely cause of one layer.

    Args:
        row: {column: number} of the layer.
        vanished: whether the curvature of all layers is zero.

    Returns:
        A sentence; "" if no rule is broken.
    """
    share, condition = row.get("damping_share"), row.get("condition")
    if np.isnan(row.get("step", 0)):
        return "its parameters or its update are not finite: see the whole"
    if np.isnan(row.get("largest", 0)):
        return "its statistics are not finite: see the whole"
    if row.get("weight") == 0 or ("weight" not in row and "age" not in row):
        return "nothing was observed yet: its first statistics are still to come, or none was finite"
    if row.get("rejected"):
        return "its last refresh was not finite, so an older one serves: raise `damping`, check the scale of its inputs"
    if row.get("largest") == 0:
        if vanished:
            return "its curvature is zero, as that of all layers: see the whole"
        return "no gradient reaches it: dead units, or a head that the likelihood does not read; `exclude` it"
    if row.get("largest", 0) > _HUGE:
        return "its inputs or gradients are huge: normalise the inputs, or use float64"
    if share is not None and share > _DROWNED:
        return "the damping is larger than almost all of its curvature, as in gradient descent: lower it"
    if condition is not None and condition > 1 / _NOISE:
        return "float32 cannot tell its small eigenvalues from zero: raise `damping`"
    if row.get("step", 0) > 1:
        return f"its step is longer than its parameters: {_LOWER}"
    return ""


def of_whole(numbers: Row, not_finite: str, vanished: bool) -> str:
    """The likely cause of the whole.

    Args:
        numbers: {name: number} of the whole.
        not_finite: which arrays are not finite, as `not_finite` says it.
        vanished: whether the curvature of all layers is zero.

    Returns:
        A sentence; "" if no rule is broken.
    """
    factor, dropped = numbers.get("clip_factor", 1), numbers.get("rejected_statistics", 0)
    if not_finite:
        return (
            f"not finite: {not_finite}. Restart from a checkpoint of before, and check the inputs and the length of "
            "the steps; `optax.apply_if_finite(tx, n)` drops such steps, see docs/wrappers.md"
        )
    if vanished:
        return (
            "all curvature is zero. If the loss is not, the outputs are saturated, as after steps that were too long: "
            f"go back to before these and {_LOWER}"
        )
    if factor < _CLIPPED:
        return f"`kl_clip` shortens the steps to {factor:.1g} of their length: raise it if the loss hardly falls"
    if dropped > 0:
        return (
            f"{dropped:.0f} times the statistics of a layer were not finite and were dropped: check the inputs of "
            "these batches"
        )
    return ""


def all_vanished(rows: Mapping[str, Row]) -> bool:
    """Whether the curvature of all layers is zero.

    Parameters of no known layer have no age. Their averages remember what was before, so that layers speak for them.
    """
    known = [row["largest"] for row in rows.values() if "largest" in row and "age" in row]
    largest = known or [row["largest"] for row in rows.values() if "largest" in row]
    return bool(largest) and max(largest) == 0


def not_finite(trees: Mapping[str, Any]) -> str:
    """Which arrays of some trees are not finite, in words; scalars may be, such as a ratio before the first test.

    >>> not_finite({"params": {"w": np.array([np.nan]), "ratio": np.array(np.nan)}, "updates": None})
    '`params` (w)'

    Args:
        trees: {what it is called: arrays on the host}.

    Returns:
        Words; "" if all are finite.
    """
    found = {}
    for called, tree in trees.items():
        places = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
            if np.ndim(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(leaf))
        ]
        if places:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            found[called] = f"`{called}` ({places[0]}{more})"
    return ", ".join(found.values())


def with_automatic_damping(cause: str) -> str:
    """A cause where no damping is set."""
    return cause + "; without a setting the steps adapt it, and `damping=` fixes it" if "damping" in cause else cause


def with_adaptive_damping(cause: str) -> str:
    """A cause where the damping adapts itself: its bounds are what can be changed."""
    if "damping" not in cause:
        return cause
    bound, moves = ("least", "raises") if "raise `damping`" in cause else ("most", "lowers")
    return f"{cause}; it adapts itself, and `adaptive_damping({bound}=...)` {moves} it"
