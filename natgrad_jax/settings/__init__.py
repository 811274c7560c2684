"""The settings of the methods: what a keyword can be, those that are shared, and the public functions made of them."""

from natgrad_jax.settings.keywords import Fixed, Groups, Mask, Number, Settings, Size, Steps
from natgrad_jax.settings.public import direction, direction_of_tensors, optimizer, optimizer_of_tensors
from natgrad_jax.settings.shared import (
    Averaged,
    Completed,
    Direction,
    OfCutTensors,
    OfTensors,
    Rescaled,
    Tolerance,
    Transformation,
    Truncatable,
)

__all__ = [
    "Averaged",
    "Completed",
    "Direction",
    "Fixed",
    "Groups",
    "Mask",
    "Number",
    "OfCutTensors",
    "OfTensors",
    "Rescaled",
    "Settings",
    "Size",
    "Steps",
    "Tolerance",
    "Transformation",
    "Truncatable",
    "direction",
    "direction_of_tensors",
    "optimizer",
    "optimizer_of_tensors",
]
