#!/usr/bin/env bash
# `optax.inject_hyperparams` keeps the numbers of an optimizer as arrays of the widest dtype of the parameters. With
# all parameters in bfloat16 the default `b2=0.999` of `optax.adam` becomes exactly 1, and every entry of the first
# update is NaN: the correction of the bias divides 0 by 0. Without the wrapper, or with `hyperparam_dtype=jnp.float32`,
# the same optimizer is finite. Nothing warns.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8.
# Output seen:
#   adam: finite
#   adam injected: b2 = 1, NaN
#   adam injected, hyperparam_dtype=float32: b2 = 0.999, finite
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cd "$scratch"
JAX_PLATFORMS=cpu "$scratch/venv/bin/python" - <<'PY'
import jax.numpy as jnp
import optax

params = {"w": jnp.ones(3, jnp.bfloat16)}
found = {}
for name, tx in {
    "adam": optax.adam(0.1),
    "adam injected": optax.inject_hyperparams(optax.adam)(0.1),
    "adam injected, hyperparam_dtype=float32": optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(0.1),
}.items():
    updates, state = tx.update(params, tx.init(params), params)
    found[name] = bool(jnp.isfinite(updates["w"]).all())
    held = f"b2 = {float(state.hyperparams['b2']):.4g}, " if hasattr(state, "hyperparams") else ""
    print(f"{name}: {held}{'finite' if found[name] else 'NaN'}")
assert list(found.values()) == [True, False, True], found
PY
