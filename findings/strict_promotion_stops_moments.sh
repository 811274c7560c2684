#!/usr/bin/env bash
# With `jax_numpy_dtype_promotion="strict"`, which JAX offers to find unwanted promotions in one's own code, the first
# update of `optax.adam`, and of every other transformation that corrects the bias of an average, raises a
# TypePromotionError: Optax raises a float32 decay to the power of the int32 step count. All parameters and gradients
# are float32. `optax.sgd`, `optax.rmsprop` and `optax.lion`, which correct nothing, run.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8.
# Output seen:
#   runs: sgd with momentum, rmsprop, lion
#   TypePromotionError: adam, adamw, ema
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cd "$scratch"
JAX_PLATFORMS=cpu "$scratch/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import optax

params = {"w": jnp.ones(3, jnp.float32)}
transformations = {
    "sgd with momentum": optax.sgd(0.1, 0.9),
    "rmsprop": optax.rmsprop(0.1),
    "lion": optax.lion(0.1),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "ema": optax.ema(0.9),
}
found = {}
with jax.numpy_dtype_promotion("strict"):
    for name, tx in transformations.items():
        try:
            tx.update(params, tx.init(params), params)
            found[name] = "runs"
        except Exception as error:
            found[name] = type(error).__name__
for outcome in dict.fromkeys(found.values()):
    print(f"{outcome}: {', '.join(name for name, each in found.items() if each == outcome)}")
assert {name for name, each in found.items() if each == "TypePromotionError"} == {"adam", "adamw", "ema"}, found
assert all(found[name] == "runs" for name in ("sgd with momentum", "rmsprop", "lion")), found
PY
