#!/usr/bin/env bash
# `flax.linen.RNN(OptimizedLSTMCell(...))` on float64 inputs, with parameters cast to float64, raises: the first carry is
# of `param_dtype`, float32, and the carry after a step is float64, which the scan refuses. So `jax_enable_x64` and a
# cast of the parameters are not enough for double precision, as they are for Dense. `param_dtype=jnp.float64` helps.
#
# Versions: flax 0.12.8, jax 0.10.2, jaxlib 0.10.2.
# Output seen:
#   Dense, parameters cast: float64
#   LSTM, parameters cast: TypeError
#   LSTM, param_dtype=float64: float64
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cd "$scratch"
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$scratch/venv/bin/python" - <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp

x = jnp.ones((2, 5, 3))
models = {
    "Dense, parameters cast": nn.Dense(4),
    "LSTM, parameters cast": nn.RNN(nn.OptimizedLSTMCell(4)),
    "LSTM, param_dtype=float64": nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=jnp.float64)),
}
outcomes = []
for name, model in models.items():
    variables = model.init(jax.random.key(0), x.astype(jnp.float32))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    try:
        outcome = str(model.apply(variables, x).dtype)
    except TypeError as error:
        assert "carry" in str(error), error
        outcome = "TypeError"
    outcomes.append(outcome)
    print(f"{name}: {outcome}")
assert outcomes == ["float64", "TypeError", "float64"], outcomes
PY
