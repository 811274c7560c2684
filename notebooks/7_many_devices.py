# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/7_many_devices.ipynb)
#
# A batch over eight devices, and the state of an optimizer over them. The devices are simulated: XLA makes eight of one CPU. What is sent, and
# what is held where, is as it is on eight GPUs. Times are not.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("natgrad_jax") is None:
    source = "natgrad_jax[experiments] @ git+https://github.com/OWNER/natgrad_jax"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", source])

# %%
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on a CPU: one thread pool is enough
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))  # the next run need not compile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from IPython.display import ProgressBar
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps, to see that everything runs
STEPS, WIDTHS, BATCH = (2, (8,), 16) if SMALL else (60, (256, 32, 256), 512)
print(jax.devices())

# %% [markdown]
# ## One step, on one device and on eight
#
# The training step is that of one device. Nothing is said of devices in it: it is the batch that lies on a mesh.

# %%
images = jnp.array(load_digits().data / 16, jnp.float32)


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in WIDTHS:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(64)(x)


model, likelihood = Autoencoder(), ng.losses.sigmoid_binary_cross_entropy
start = model.init(jax.random.key(0), images[:1])["params"]
capture = ng.linen.capture(model, likelihood)
layers = capture.layers({"params": start}, images[:BATCH])
METHODS = {
    "K-FAC": ng.kfac(0.1, layers, damping=0.1, refresh_every=10),
    "TENGraD": ng.tengrad(0.1, layers, damping=0.3, refresh_every=10),
}


def stepping(tx):
    @jax.jit
    def step(params, state, x, key):
        out = capture.value_and_grad({"params": params}, x, x, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state, out.value

    return step


def train(name, placed):
    tx, random = METHODS[name], np.random.default_rng(0)
    step, params, losses = stepping(tx), placed(start), []
    state = tx.init(params)
    for count in ProgressBar(STEPS):
        x = placed(images[random.permutation(len(images))[:BATCH]], PartitionSpec("data"))
        params, state, loss = step(params, state, x, jax.random.key(count))
        losses.append(float(loss))
    return losses


count = len(jax.devices())
mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def on_mesh(tree, spec=None):
    return jax.device_put(tree, NamedSharding(mesh, spec or PartitionSpec()))


def on_one(tree, spec=None):
    return jax.device_put(tree, jax.devices()[0])


alone, together = ({name: train(name, placed) for name in METHODS} for placed in (on_one, on_mesh))
for name in METHODS:
    gap = np.max(np.abs(np.array(alone[name]) - np.array(together[name]))) / alone[name][-1]
    print(
        f"{name:8} {alone[name][-1]:.3f} on one device, {together[name][-1]:.3f} on {count}: largest gap {gap:.0e} of the last loss"
    )

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for color, name in zip(("#2171b5", "#31a354"), METHODS, strict=True):
    axis.plot(alone[name], color=color, label=f"{name}, one device")
    axis.plot(together[name], "o", color=color, markersize=3, markevery=4, label=f"{name}, {count} devices")
axis.set(xlabel="steps", ylabel="loss of the batch", yscale="log")
axis.grid(alpha=0.2, which="both")
_ = axis.legend(frameon=False, fontsize=8, ncols=2)

# %% [markdown]
# ## What a step sends
#
# The compiled program tells. K-FAC sums gradients and factors over the devices, and sends no rows of examples. TENGraD is made of rows: it
# gathers them.


# %%
def sent(name):
    """Megabytes that the collectives of a compiled step put out, by kind, on each device."""
    tx, params = METHODS[name], on_mesh(start)
    x = on_mesh(images[:BATCH], PartitionSpec("data"))
    text = stepping(tx).lower(params, tx.init(params), x, jax.random.key(0)).compile().as_text()
    kinds = {"all-reduce": 0.0, "all-gather": 0.0}
    for shapes, kind in re.findall(r"= (.*?) (all-reduce|all-gather)(?:-start)?\(", text):
        sizes = (
            np.prod([int(size) for size in dims.split(",") if size] or [1])
            for dims in re.findall(r"f32\[([\d,]*)\]", shapes)
        )
        kinds[kind] += 4e-6 * float(sum(sizes))
    return kinds


for name in METHODS:
    print(f"{name:8}", ", ".join(f"{kind} {megabytes:.2f} MB" for kind, megabytes in sent(name).items()))
print(f"parameters: {4e-6 * optax.tree.size(start):.2f} MB")

# %% [markdown]
# That is the whole program with the branches of statistics and refreshes, which most steps do not take.
#
# ## The state over the devices
#
# Every device holds the whole state, unless it is told otherwise. `ng.sharding.state_specs` says where each array goes, `bytes_per_device` what
# that takes.

# %%
tx = METHODS["K-FAC"]
abstract = jax.eval_shape(tx.init, start)
held = {}
for policy in ("replicated", "factor"):
    shardings = ng.sharding.state_specs(tx, start, mesh, policy=policy)
    held[policy] = ng.sharding.bytes_per_device(abstract, shardings)
print({policy: f"{bytes_ / 1e6:.2f} MB" for policy, bytes_ in held.items()})

figure, axis = plt.subplots(figsize=(5, 2), layout="constrained")
axis.barh(list(held), [bytes_ / 1e6 for bytes_ in held.values()], color="#2171b5")
axis.set(xlabel="megabytes of state on each device")
axis.invert_yaxis()

# %% [markdown]
# And it trains the same. The step ends by saying where its state belongs:

# %%
shardings = ng.sharding.state_specs(tx, on_mesh(start), mesh, policy="factor")


@jax.jit
def step(params, state, x, key):
    out = capture.value_and_grad({"params": params}, x, x, key=key)
    updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
    state = jax.lax.with_sharding_constraint(state, shardings)
    return optax.apply_updates(params, updates), state, out.value


params, random, losses = on_mesh(start), np.random.default_rng(0), []
state = jax.jit(tx.init, out_shardings=shardings)(params)
for number in ProgressBar(STEPS):
    x = on_mesh(images[random.permutation(len(images))[:BATCH]], PartitionSpec("data"))
    params, state, loss = step(params, state, x, jax.random.key(number))
    losses.append(float(loss))
print(f"{losses[-1]:.3f} with the state cut, {together['K-FAC'][-1]:.3f} with it on every device")

# %% [markdown]
# `pmap`, `shard_map`, uneven batches, `Explicit` axes: [docs/devices.md](https://github.com/OWNER/natgrad_jax/blob/main/docs/devices.md).
