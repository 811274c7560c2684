"""Layers take turns with their refreshes, so that no step has them all.

    1  gradual <- the layers that take more than the share of a step                           by n^3 of their matrices
    2  groups <- the others, the dearest first, each to the group that has the least to do
    3  one step of a period for each group, spread over it
    4  a step refreshes the groups from the first to the last that are due: one, none, or at the start all of them

Each layer is refreshed once in `refresh_every` steps, as without turns, at a step of its own; those of line 1 by a part
at every step (`lift.gradual`). The groups are branches that hold their own operators alone: each refresh is compiled
once, and a step computes those that are due. Which these are follows from the step count alone, so that no checkpoint
has to say it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.branches import when
from natgrad_jax.base import Array
from natgrad_jax.lift.grouping import cost
from natgrad_jax.lift.state import Block, NaturalGradientState, Schedule

LEAST = 2 * 256**3
"""A refresh of this cost or less is never done in parts: it takes a millisecond or two."""


class Turns(NamedTuple):
    """Who refreshes when.

    Attributes:
        groups: the blocks of each turn; then those without a turn, whose refresh is in parts, if there are any.
        steps: of each turn the step of a period, ascending.
        period: steps after which all have come round.
        gradual: the blocks without a turn.
    """

    groups: tuple[tuple[Block, ...], ...]
    steps: tuple[int, ...]
    period: int
    gradual: tuple[Block, ...] = ()

    def due(self, count: Array, all_of_them: bool | Array) -> tuple[Array, Array]:
        """The groups that are due at a step: those from the first up to the second number.

        Args:
            count: steps done.
            all_of_them: whether all are.

        Returns:
            Two whole numbers, the same where none is due.
        """
        place = count % self.period
        is_due = jnp.array(self.steps) == place  # of at most one: they ascend
        first = jnp.where(all_of_them, 0, jnp.argmax(is_due))
        return first, jnp.where(all_of_them, len(self.groups), first + jnp.sum(is_due))


def turns(blocks: Sequence[Block], schedule: Schedule) -> Turns:
    """The turns of some blocks.

    Args:
        blocks: the layers with their methods.
        schedule: with periods that are numbers of Python. A method that measures after a refresh has its turns at
            steps with statistics, if the period of refreshes is a multiple of theirs.

    Returns:
        The turns. Blocks of no known layer, which have nothing to refresh, go with the first.
    """
    period, between = int(schedule.refresh_every), int(schedule.statistics_every)
    measures = any(block.method.rescale or block.method.measure for block in blocks)
    stride = between if measures and period % between == 0 else 1
    known = [block for block in blocks if block.layer.is_known]
    costs = {
        block.layer.name: cost(block.layer, jax.eval_shape(partial(block.method.init, block.layer))) for block in known
    }
    share = max(LEAST, sum(costs.values()) / period)
    gradual = [block for block in known if block.method.gradual and period > 1 and costs[block.layer.name] > share]  # 1
    others = [block for block in known if block not in gradual]
    count = max(1, min(period // stride, len(others)))
    groups: list[list[Block]] = [
        [block for block in blocks if not block.layer.is_known],
        *([] for _ in range(count - 1)),
    ]
    loads = [0] * count
    for block in sorted(others, key=lambda block: -costs[block.layer.name]):  # 2
        least = loads.index(min(loads))
        groups[least].append(block)
        loads[least] += costs[block.layer.name]
    steps = tuple(index * (period // stride) // count * stride for index in range(count))  # 3
    return Turns(tuple(map(tuple, [*groups, *([gradual] if gradual else [])])), steps, period, tuple(gradual))


def in_turn(
    found: Turns,
    due: tuple[Array, Array],
    refresh: Callable[[tuple[Block, ...], NaturalGradientState], NaturalGradientState],
    state: NaturalGradientState,
) -> NaturalGradientState:
    """Line 4: the state with the groups refreshed that are due.

    Args:
        found: the turns.
        due: the groups from the first up to the second number.
        refresh: of some blocks: blocks, state -> state.
        state: before.

    Returns:
        After.
    """
    for index, group in enumerate(found.groups):
        names = [block.layer.name for block in group]

        def refreshed(part, group=group, names=names, state=state):
            operators, metrics = part
            new = refresh(group, state._replace(operators={**state.operators, **operators}, metrics=metrics))
            return {name: new.operators[name] for name in names}, new.metrics

        here = (due[0] <= index) & (index < due[1])
        operators, metrics = when(here, refreshed, ({name: state.operators[name] for name in names}, state.metrics))
        state = state._replace(operators={**state.operators, **operators}, metrics=metrics)
    return state
