"""Kinds of layer: parameters <-> matrix, activations -> rows. A new kind is one file, and one line here."""

from natgrad_jax.base import Kind
from natgrad_jax.layers import joint, views
from natgrad_jax.layers.conv import CONV
from natgrad_jax.layers.dense import DENSE, ROWS
from natgrad_jax.layers.embed import EMBED
from natgrad_jax.layers.norm import NORM
from natgrad_jax.layers.parameter import ARRAY, PARAMETER

KINDS: dict[str, Kind] = {
    "dense": DENSE,
    "rows": ROWS,
    "conv": CONV,
    "embed": EMBED,
    "parameter": PARAMETER,
    "array": ARRAY,
    "norm": NORM,
}
KINDS["tensor"] = views.kind(KINDS)
KINDS["joint"] = joint.kind(KINDS)
