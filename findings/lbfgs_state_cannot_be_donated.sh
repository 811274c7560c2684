#!/usr/bin/env bash
# The first state of `optax.lbfgs` and of `optax.contrib.cocob` holds one and the same buffer in two places. A jitted
# training step that donates its state, as every other optimizer of Optax allows, raises in its very first call:
# "Attempt to donate the same buffer twice". The states that the steps return are free of it, so that it is enough to
# copy the first: `jax.tree.map(jnp.copy, tx.init(params))`.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8.
# Output seen:
#   one buffer twice, donation raises: lbfgs, cocob
#   each buffer once, donation runs: adam, adamw, lamb, rmsprop
#   lbfgs copied first: donation runs
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cd "$scratch"
JAX_PLATFORMS=cpu "$scratch/venv/bin/python" - 2>/dev/null <<'PY'
import jax
import jax.numpy as jnp
import optax
from optax import contrib

params = {"w": jnp.ones(3)}
optimizers = {
    "lbfgs": optax.lbfgs(),
    "cocob": contrib.cocob(),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "lamb": optax.lamb(0.1),
    "rmsprop": optax.rmsprop(0.1),
}


def donated(state):
    """Whether a jitted function takes a state that is donated to it."""
    try:
        jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 0, state), donate_argnums=0)(state)
    except Exception as error:
        assert "donate the same buffer twice" in str(error), error
        return False
    return True


shared, apart = [], []
for name, tx in optimizers.items():
    state = tx.init(params)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    once = len(set(buffers)) == len(buffers)
    assert donated(state) == once, name
    (apart if once else shared).append(name)
print(f"one buffer twice, donation raises: {', '.join(shared)}")
print(f"each buffer once, donation runs: {', '.join(apart)}")
assert shared == ["lbfgs", "cocob"], shared
assert donated(jax.tree.map(jnp.copy, optimizers["lbfgs"].init(params)))
print("lbfgs copied first: donation runs")
PY
