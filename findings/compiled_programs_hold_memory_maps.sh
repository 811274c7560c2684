#!/usr/bin/env bash
# Every program that JAX has compiled for the CPU and still keeps holds about six memory maps of its process, however
# small it is. Linux allows a process 65,530 maps (vm.max_map_count), so some thousand to ten thousand compiled functions,
# as a long run of tests has them, use all; what is compiled or read from the compilation cache after that kills the
# process without an exception of Python (seen: a segmentation fault in the read of the cache). Memory is no sign of it: the
# process held under 6 of 24 GB. `jax.clear_caches()` gives the maps back, also those of functions that are still there.
#
# Versions: jax 0.10.2, jaxlib 0.10.2 (0.8.1 alike), Linux.
# Output seen:
#   maps for each of 100 compiled functions: 6.0; left of them after jax.clear_caches(): 0.0
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$scratch"
JAX_PLATFORMS=cpu "$scratch/venv/bin/python" - <<'PY'
import gc

import jax
import jax.numpy as jnp


def maps():
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


x = jnp.ones((8, 8))
jax.jit(jnp.tanh)(x).block_until_ready()
start, kept = maps(), []
for number in range(100):
    function = jax.jit(lambda x, number=number: jnp.tanh(x @ x + number) * jnp.sin(x).sum())
    function(x).block_until_ready()
    kept.append(function)
held = (maps() - start) / len(kept)
jax.clear_caches()
gc.collect()
left = (maps() - start) / len(kept)
print(f"maps for each of {len(kept)} compiled functions: {held:.1f}; left of them after jax.clear_caches(): {abs(left):.1f}")
assert 4 < held < 9 and left < 0.5
PY
