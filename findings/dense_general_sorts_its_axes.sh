#!/usr/bin/env bash
# Flax's layers over several axes do not keep the order in which the axes are given: they sort them. In linen
# `DenseGeneral(axis=(2, 1))` and `axis=(1, 2)` are one and the same layer, whose kernel has the sizes of axes 1 and 2 in
# that order; whoever reads the kernel in the order that was written exchanges the axes in silence where their sizes are
# equal. NNX sorts the axes when the layer is called, but not the `in_features` that go with them, so that features in the
# order of the axes are refused when the layer runs, and only features in sorted order work.
#
# Versions: flax 0.12.8, jax 0.10.2.
# Output seen:
#   linen: axis=(2, 1) of (5, 2, 3) has a kernel (2, 3, 4), same outputs as axis=(1, 2): True
#   nnx: axis=(2, 1) with in_features (3, 2): TypeError; with (2, 3): runs
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8
cd "$scratch"
"$scratch/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from flax import linen, nnx

x = jax.random.normal(jax.random.key(0), (5, 2, 3))
given, usual = (linen.DenseGeneral(4, axis=axis) for axis in ((2, 1), (1, 2)))
params = given.init(jax.random.key(1), x)
ours = params["params"]["kernel"].shape
same = bool(jnp.allclose(given.apply(params, x), usual.apply(params, x)))
print(f"linen: axis=(2, 1) of (5, 2, 3) has a kernel {ours}, same outputs as axis=(1, 2): {same}")


def called(features):
    try:
        nnx.LinearGeneral(features, 4, axis=(2, 1), rngs=nnx.Rngs(0))(x)
    except TypeError:
        return "TypeError"
    return "runs"


found = called((3, 2)), called((2, 3))
print(f"nnx: axis=(2, 1) with in_features (3, 2): {found[0]}; with (2, 3): {found[1]}")
assert ours == (2, 3, 4) and same and found == ("TypeError", "runs"), "the order of the axes counts now"
PY
