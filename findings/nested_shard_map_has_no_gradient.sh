#!/usr/bin/env bash
# A `jax.shard_map` over one axis of a mesh inside another over a second axis runs on four CPU devices, and so does its
# gradient where `check_vma=False`. With the check, which is the default, `jax.jit` of the gradient raises while it is
# lowered: "operates on axis "data" which is already bound by a parent sdy.manual_computation op".
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
# Output seen:
#   check_vma=True: value 15.921, gradient: ValueError
#   check_vma=False: value 15.921, gradient: as without shard_map
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$scratch"
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$scratch/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2, 2), ("data", "more"), axis_types=(AxisType.Auto,) * 2)
w, x = jnp.ones((3, 2)), jnp.ones((8, 3))


def loss(check):
    def product(w, x):
        return jnp.tanh(x @ w)

    def inner(w, x):
        options = {"axis_names": {"more"}, "check_vma": check}
        return jax.shard_map(product, in_specs=(P(), P("more")), out_specs=P("more"), **options)(w, x)

    def outer(w, x):
        options = {"axis_names": {"data"}, "check_vma": check}
        return jnp.sum(
            jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), **options)(w, x)
        )

    return outer


expected = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)
outcomes = []
with jax.set_mesh(mesh):
    for check in (True, False):
        value = jax.jit(loss(check))(w, x)
        try:
            found = jax.jit(jax.grad(loss(check)))(w, x)
            assert jnp.allclose(found, expected)
            outcome = "as without shard_map"
        except ValueError as error:
            assert "already bound" in str(error), error
            outcome = "ValueError"
        outcomes.append(outcome)
        print(f"check_vma={check}: value {value:.3f}, gradient: {outcome}")
assert outcomes == ["ValueError", "as without shard_map"], outcomes
PY
