"""How a damping adapts itself while training, by the rule of Levenberg and Marquardt."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from natgrad_jax import checks
from natgrad_jax.base import Array, ScalarOrSchedule

_GOOD, BAD = 0.75, 0.25  # ratios above the one, below the other


@dataclass(frozen=True)
class AdaptiveDamping:
    """A damping that follows how well the quadratic model predicts the loss; made by `adaptive_damping`.

    Attributes:
        initial: damping of the first step.
        factor: by which the damping falls in a step where the model is good, to the power of `every` when tested.
        every: steps between tests.
        calibration: number of first steps that are tested each, unless a bad test follows a better one.
        calibration_factor: by which the damping falls or rises in each of them, and in each that follows a bad test.
        least: lower bound of the damping.
        most: upper bound of the damping.
    """

    initial: float
    factor: float
    every: int
    calibration: int
    calibration_factor: float
    least: float
    most: float

    def is_due(self, count: Array, ratio: Array, calibrating: Array) -> Array:
        """Whether a step is tested: in its turn, while calibrating, or because the ratio of the last test was bad."""
        return self._moves_fast(count, ratio, calibrating) | (count % self.every == 0)

    def calibrates(self, count: Array, before: Array, ratio: Array, calibrating: Array) -> Array:
        """Whether the step after this one is of the calibration, too, given the ratios of its last two tests."""
        is_bracketed = (before >= BAD) & ~(ratio >= BAD)
        return calibrating & (count + 1 < self.calibration) & ~is_bracketed

    def adapted(self, damping: Array, before: Array, ratio: Array, count: Array, calibrating: Array) -> Array:
        """The damping after a test.

        Args:
            damping: before.
            before: the ratio of the last test.
            ratio: change of the loss over the change that the model predicted; NaN where either is not finite.
            count: of the step, int32.
            calibrating: whether the step is of the calibration.

        Returns:
            A smaller damping for a ratio above 3/4, a larger one for a ratio below 1/4 or NaN, within the bounds.
        """
        fast = self._moves_fast(count, before, calibrating)
        by = jnp.where(fast, self.calibration_factor, self.factor**self.every)
        change = jnp.where(ratio > _GOOD, by, jnp.where(ratio >= BAD, 1, 1 / by))
        return jnp.clip(damping * change, self.least, self.most).astype(damping.dtype)

    def raised(self, damping: Array) -> Array:
        """The damping after a step that is taken back."""
        return jnp.clip(damping / self.calibration_factor, self.least, self.most)

    # After a bad test every step is tested until one is good. Where the loss is flat the damping falls far. Once the
    # model is wrong, an untested step can do any damage: on the curves of `make autoencoder` K-FAC diverged at its
    # fifteenth step; tested on, it is at 69 nats after ten epochs.
    def _moves_fast(self, count: Array, ratio: Array, calibrating: Array) -> Array:
        return calibrating | (count > 0) & ~(ratio >= BAD)


Damping = ScalarOrSchedule | AdaptiveDamping
"""A number, a schedule, or a rule."""


def refuse_uncalled(name: str, value: Any) -> None:
    """Refuse `adaptive_damping` itself, which would be taken for a schedule.

    Args:
        name: of the setting, for the message.
        value: what the user gave.

    Raises:
        TypeError: if it is that function.
    """
    if value is adaptive_damping:
        raise TypeError(f"`{name}` is the function adaptive_damping; expected the rule it makes, `adaptive_damping()`.")


def adaptive_damping(
    initial: float = 1.0,
    *,
    factor: float = 0.9,
    every: int = 5,
    calibration: int = 10,
    calibration_factor: float = 0.5,
    least: float = 1e-8,
    most: float = 1e8,
) -> AdaptiveDamping:
    """The rule of Levenberg and Marquardt, for the `damping` of every complete optimizer.

    With h the loss of the batch, M the quadratic model of `control.controlled` and d the step,

        rho = (h(theta + d) - h(theta)) / (M(theta + d) - M(theta))        both on the same batch, M without damping
        damping <- factor^every damping     if rho > 3/4
        damping <- factor^-every damping    if rho < 1/4 or rho is NaN

    as in Martens and Grosse (2015), section 6.5, whose factor is 0.95; 0.9 is kfac-jax's. A change below half of the
    digits of h is read from its slopes at both ends, so that rounding does not move the damping. Each of the first
    `calibration` steps is tested and moves the damping by `calibration_factor`. So you need not know the initial
    damping to an order of magnitude. A bad rho or NaN after a better one ends this calibration: the damping is between
    the two. Each step after a test with a bad rho or NaN is tested, too, until one is good. Where a tested step raises
    the loss of its own batch, or makes it NaN, a fourth of it is tried, and so on down to a 256th; where none lowers
    the loss, the step is rejected.

    A step more than twice as long as the last tested one is tested out of its turn; a good test then leaves the
    damping. And where the loss of a batch is not finite, or four times that of the batch before, it is compared with
    the loss of this batch before the last step. If that is finite and a fourth or less, the step is taken back, and
    the damping rises by `calibration_factor`.

    Use it with `learning_rate="quadratic"`. With a given learning rate it is no trust region: for short steps the model
    is right at every damping. Small batches break it: a step is tested on the examples that it was made for, so the
    damping falls too far. `least` bounds it then, at 0.001 to 0.1 in `experiments/control.py`.

    Args:
        initial: damping of the first step.
        factor: by which the damping falls per step while the model is good, in (0, 1); it rises by the inverse.
        every: steps between tests; a test costs one forward pass.
        calibration: number of first steps that are tested each, unless a bad test follows a better one; 0 for none.
        calibration_factor: by which the damping falls in each of these, and after a bad test, in (0, 1); it rises by
            the inverse.
        least: lower bound of the damping.
        most: upper bound of the damping.

    Returns:
        The rule.

    Raises:
        TypeError: if it is no number.
        ValueError: if a number is out of its range.
    """
    numbers = {"initial": initial, "factor": factor, "calibration_factor": calibration_factor}
    for name, value in {**numbers, "least": least, "most": most}.items():
        checks.number(name, value, least=0)
    rule = AdaptiveDamping(initial, factor, every, calibration, calibration_factor, least, most)
    for name in ("factor", "calibration_factor"):
        if not 0 < getattr(rule, name) < 1:
            raise ValueError(f"`{name}` is {getattr(rule, name)}; expected a number between 0 and 1.")
    if not (isinstance(every, int) and every >= 1 and isinstance(calibration, int) and calibration >= 0):
        raise ValueError(f"`every` is {every} and `calibration` {calibration}; expected a positive int and one from 0.")
    if not 0 < least <= initial <= most:
        raise ValueError(f"`initial` is {initial}; expected it between `least`, {least} > 0, and `most`, {most}.")
    return rule
