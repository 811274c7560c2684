#!/usr/bin/env bash
# Differentiating a scan may run a debug callback (or `jax.debug.print`) of its body once instead of once for each turn.
# Reverse mode moves what is the same in all turns out of the loop, and takes the callback along if all that it reads is
# the same: a carry that the body hands on, a constant. What is counted or printed in a loop is then another number under
# `jax.grad` than in the forward pass, also without `jit`. A callback that reads what changes keeps its turns.
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
# Output seen:
#   callback of what stays the same: forward 5 times, value_and_grad 1 times
#   callback of what changes: forward 5 times, value_and_grad 5 times
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$scratch"
JAX_PLATFORMS=cpu "$scratch/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp


def counted(function, changes):
    calls = []

    def loss(x):
        def turn(carry, _):
            jax.debug.callback(lambda value: calls.append(value), carry.sum())
            return (jnp.sin(carry) if changes else carry), None

        return jnp.sum(jax.lax.scan(turn, x, None, length=5)[0] ** 2)

    jax.block_until_ready(function(loss)(jnp.ones(3)))
    jax.effects_barrier()
    return len(calls)


for changes, words in ((False, "stays the same"), (True, "changes")):
    forward, backward = (counted(function, changes) for function in (lambda loss: loss, jax.value_and_grad))
    print(f"callback of what {words}: forward {forward} times, value_and_grad {backward} times")
    assert (forward, backward) == ((5, 5) if changes else (5, 1))
PY
