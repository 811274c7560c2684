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
# # An equation, solved by a net
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/4_pinn.ipynb)
#
# A physics-informed net has no data. It has an equation, and the loss is by how much the net does not satisfy it. Such losses are
# hard for gradients: derivatives of the net make them badly conditioned. And they are easy for natural gradients: a few hundred points
# say all there is to say, so the Gauss-Newton matrix of the whole batch can be inverted exactly, in the space of the points.

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

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import ProgressBar

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps, to see that everything runs
WIDTH, INSIDE, EDGE = (4, 9, 8) if SMALL else (24, 196, 60)
STEPS, ADAM_STEPS = (2, 4) if SMALL else (100, 3000)

# %% [markdown]
# ## The equation
#
# Poisson's equation on the unit square, $-\Delta u = 2\pi^2 \sin(\pi x)\sin(\pi y)$, with zero at the edge. The solution is known,
# $u = \sin(\pi x)\sin(\pi y)$, and used for nothing but the error.
#
# The residual is written as it is read: `jvp` of `jvp` along either axis, and `vmap` over the points.


# %%
def u(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[..., 0]


def residual(params, points):
    def one(point):
        def second(axis):
            return jax.jvp(lambda y: jax.jvp(lambda z: u(params, z), (y,), (axis,))[1], (point,), (axis,))[1]

        source = 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * point))
        return jnp.sum(jax.vmap(second)(jnp.eye(2))) + source

    return jax.vmap(one)(points)[:, None]


def edge(params, points):
    return u(params, points)[:, None]


# %% [markdown]
# ## The loss
#
# Two terms, each with its function, points and likelihood. `jacobian="examples"` has a function watched one example at a time: the
# products of a layer are then with the values, with their derivatives along both axes, and with the second derivatives, all positions
# that share the weights. The report says that nothing is left out.

# %%
loss = ng.terms(
    {
        "inside": ng.capture(residual, ng.losses.squared_error, jacobian="examples"),
        "edge": ng.capture(edge, ng.losses.squared_error, jacobian="examples"),
    },
    weights={"edge": 10.0},
)

side = np.linspace(0, 1, round(INSIDE**0.5) + 2)[1:-1]
walk, zero = np.linspace(0, 1, EDGE // 4), np.zeros(EDGE // 4)
sides = [(walk, zero), (walk, zero + 1), (zero, walk), (zero + 1, walk)]
inputs = {
    "inside": jnp.array(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), jnp.float32),
    "edge": jnp.array(np.concatenate([np.stack(pair, -1) for pair in sides]), jnp.float32),
}
targets = {name: jnp.zeros((len(points), 1)) for name, points in inputs.items()}

glorot = jax.nn.initializers.glorot_normal()
keys = jax.random.split(jax.random.key(0), 3)
sizes = [(2, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
start = [{"w": glorot(key, size), "b": jnp.zeros(size[1])} for key, size in zip(keys, sizes, strict=True)]
layers = loss.layers(start, inputs)
print(layers)

# %% [markdown]
# ## Two optimizers
#
# TENGraD of one block is the exact damped Gauss-Newton direction; `"search"` takes the length along it that has the least loss, out of
# twenty, in the same compiled step. Adam has a learning rate that decays by a cosine.

# %%
grid = np.stack(np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64)), -1).reshape(-1, 2)
solution = np.prod(np.sin(np.pi * grid), axis=1)
error_of = jax.jit(lambda params: jnp.linalg.norm(u(params, grid) - solution) / np.linalg.norm(solution))


def train(tx, steps, every):
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        out = loss.value_and_grad(params, inputs, targets)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state, out.losses

    params, state, spent = start, tx.init(start), 0.0
    losses = jax.block_until_ready(step(params, state))[2]  # compiled
    found = [(0, 0.0, float(error_of(params)))]
    for stretch in ProgressBar(steps // every):
        before = time.perf_counter()
        for _ in range(every):
            params, state, losses = step(params, state)
        jax.block_until_ready(params)
        spent += time.perf_counter() - before
        found.append(((stretch + 1) * every, spent, float(error_of(params))))
    return params, losses, np.array(found)


exact = ng.tengrad("search", layers, damping=1e-6, blocks="joint", refresh_every=1)
ours, losses, course = train(exact, STEPS, 2)
adam, _, beside = train(optax.adam(optax.cosine_decay_schedule(1e-2, ADAM_STEPS)), ADAM_STEPS, 2 if SMALL else 50)
print("TENGraD:", {name: f"{value:.1e}" for name, value in losses.items()}, f"error {course[-1, 2]:.1e}")
print(f"Adam: error {beside[-1, 2]:.1e}")

# %% [markdown]
# ## What is left

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, column, label in zip(axes, (0, 1), ("steps", "seconds"), strict=True):
    for found, name in ((course, "TENGraD, joint"), (beside, "Adam")):
        axis.plot(found[1:, column], found[1:, 2], label=name)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="relative $L^2$ error")
_ = axes[0].legend()

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
pictures = {
    "the net": u(ours, grid),
    "TENGraD: error": u(ours, grid) - solution,
    "Adam: error": u(adam, grid) - solution,
}
for axis, (name, values) in zip(axes, pictures.items(), strict=True):
    shown = axis.imshow(np.asarray(values).reshape(64, 64), origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r")
    axis.set_title(name)
    figure.colorbar(shown, ax=axis)

# %% [markdown]
# More equations, in five dimensions and with time, beside SPRING, K-FAC, SOAP and L-BFGS: `make pinn`. Presets, several heads, and what
# to do with points that are drawn anew: [docs/pinn.md](https://github.com/OWNER/natgrad_jax/blob/main/docs/pinn.md).
