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
# # From Adam to EKFAC in five lines
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/1_quickstart.ipynb)
#
# Adam looks at every weight by itself: it divides a gradient by the size that the gradient usually has there. A *natural
# gradient* asks another question: not how far the weights move, but how far the **predictions** do. The answer is a matrix,
#
# $$F = \mathbb{E}\left[\nabla \log p(y \mid x)\; \nabla \log p(y \mid x)^\top\right],$$
#
# named after Fisher, and the step it recommends is $F^{-1} \nabla$. For a net with a million weights $F$ has $10^{12}$ entries,
# so nobody writes it down. EKFAC ([George et al. 2018](https://arxiv.org/abs/1806.03884)) writes down one small pair of bases
# per layer in which $F$ is nearly diagonal, and divides there.
#
# This page trains one autoencoder twice, first by Adam, then by EKFAC. What has to change is five lines.

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

import itertools
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from IPython.display import ProgressBar
from scipy.special import xlogy
from sklearn.datasets import load_digits

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps, to see that everything runs
STEPS = 20 if SMALL else 600
WIDTHS = (6,) if SMALL else (256, 128, 64, 12, 64, 128, 256)
BATCH = 599  # a third of the data

# %% [markdown]
# ## The problem
#
# The 1,797 handwritten digits of scikit-learn, 8×8 grey pixels each, squeezed through twelve numbers and back. Narrow deep
# autoencoders are where second-order methods first showed what they can do with neural nets, and they are still a fair place to
# meet them: the loss surface is a long, bent valley, in which a gradient points at the walls.
#
# A grey pixel has a cross-entropy that no reconstruction can undercut, the entropy of the pixel itself. We subtract it, so
# that the best conceivable loss is zero.

# %%
x = (load_digits().data / 16).astype("float32")
floor = float(-np.mean(np.sum(xlogy(x, x) + xlogy(1 - x, 1 - x), axis=-1)))


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        pixels = x.shape[-1]
        for width in WIDTHS:
            x = nn.Dense(width)(x)
            x = x if width == min(WIDTHS) else nn.tanh(x)  # the code in the middle is linear
        return nn.Dense(pixels)(x)


model = Autoencoder()
start = model.init(jax.random.key(0), x[:1])["params"]
print(f"{optax.tree.size(start):,} weights; a loss of {floor:.2f} nats an image is the least possible")


# %% [markdown]
# The loop is the same for both optimizers: shuffle, step, and every tenth step look at the loss of all images. The clock stands
# still meanwhile, and for the first step, which is the compiler's.


# %%
def train(step, params, opt_state):
    """Steps, seconds and losses of a run."""
    random, key = np.random.default_rng(0), jax.random.key(1)
    every, seconds = 10, 0.0
    curve = [(0, 0.0, float(measure(params)))]
    jax.block_until_ready(step(params, opt_state, x[:BATCH], key))  # compiles; what it returns is forgotten
    for stretch in ProgressBar(STEPS // every):
        began = time.perf_counter()
        for t in range(stretch * every, (stretch + 1) * every):
            batch = x[random.permutation(len(x))[:BATCH]]
            params, opt_state = step(params, opt_state, batch, jax.random.fold_in(key, t))
        jax.block_until_ready(params)
        seconds += time.perf_counter() - began
        curve.append(((stretch + 1) * every, seconds, float(measure(params))))
    return np.array(curve).T


@jax.jit
def measure(params):
    return ng.losses.sigmoid_binary_cross_entropy(model.apply({"params": params}, x), x) - floor


def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 20, STEPS)


# %% [markdown]
# ## Adam
#
# Its settings were the best of six, in a run like this one. EKFAC has those that did best in a run of twice the length, among
# a dozen. Both begin with a warm-up and end with a cosine decay.

# %%
adam = optax.adam(schedule(0.01), b2=0.95)


@jax.jit
def adam_step(params, opt_state, batch, key):
    def loss(params):
        return ng.losses.sigmoid_binary_cross_entropy(model.apply({"params": params}, batch), batch)

    updates, opt_state = adam.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


by_adam = train(adam_step, start, adam.init(start))
print(f"Adam: {by_adam[2, -1]:.2f} nats above the floor")

# %% [markdown]
# ## EKFAC
#
# Now the five lines, numbered in the code.
#
# 1. **Watch the model.** `capture` knows the model and the likelihood. The Fisher matrix belongs to a distribution of the targets,
#    so the loss has to be one: here every pixel is a coin.
# 2. **Find the layers**, from the shapes of a batch.
# 3. **Make the optimizer**, a transformation of Optax like any other. The *damping* $\lambda$ stands in $(F + \lambda I)^{-1}$; a large
#    one early, while the statistics are young and the steps long, and a small one later.
# 4. **Loss, gradient and curvature** come from one forward pass. The curvature is a promise: nothing is computed until someone asks.
# 5. **Hand it to `update`**, which asks only on the steps when statistics are due.

# %%
capture = ng.linen.capture(model, ng.losses.sigmoid_binary_cross_entropy)  # 1
layers = capture.layers({"params": start}, x[:BATCH])  # 2
falling = optax.exponential_decay(3.0, max(1, STEPS // 2), 0.02 / 3, end_value=0.02)
ekfac = ng.ekfac(schedule(0.07), layers, damping=falling, statistics_every=5, rescale_every=5, refresh_every=50)  # 3


@jax.jit
def ekfac_step(params, opt_state, batch, key):
    out = capture.value_and_grad({"params": params}, batch, batch, key=key)  # 4
    updates, opt_state = ekfac.update(out.grad, opt_state, params, curvature=out.curvature)  # 5
    return optax.apply_updates(params, updates), opt_state


by_ekfac = train(ekfac_step, start, ekfac.init(start))
print(f"EKFAC: {by_ekfac[2, -1]:.2f} nats above the floor")

# %% [markdown]
# The `key` is for labels: the Fisher matrix averages over labels that the *model* believes in, not over those of the data, so a step
# with statistics draws some.
#
# ## What is covered
#
# Not every parameter has a layer that the library knows. Printing `layers` says what has, at what cost in memory, and what is left to a
# diagonal. It is worth a look before every long run.

# %%
print(layers)

# %% [markdown]
# ## The two runs
#
# Against steps, since that is what the mathematics is about; and against seconds, since that is what you pay.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for axis, row, unit in zip(axes, (0, 1), ("steps", "seconds, without compilation"), strict=True):
    for name, curve, color in (("Adam", by_adam, "#7f7f7f"), ("EKFAC", by_ekfac, "#d94801")):
        axis.plot(curve[row], curve[2], color=color, linewidth=2, label=name)
        axis.plot(curve[row, -1], curve[2, -1], "o", color=color, markersize=5)
    axis.axhline(by_adam[2, -1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel=unit, yscale="log", xlim=(0, None))
    axis.grid(alpha=0.2, which="both")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("training loss above its floor, nats an image")
axes[0].set_title("An autoencoder of digits; dotted: where Adam ends", loc="left")
axes[1].legend(frameon=False)
plt.show()

# %%
reached = by_ekfac[2] <= by_adam[2, -1]
if reached.any():
    first = np.argmax(reached)
    print(f"EKFAC reaches Adam's final loss after {by_ekfac[0, first]:.0f} of {STEPS} steps, ", end="")
    print(f"in {by_ekfac[1, first] / by_adam[1, -1]:.0%} of Adam's seconds.")

# %% [markdown]
# In steps it is no contest. In seconds it is one: on two CPU cores, busy ones at that, a step of EKFAC costs two to four of Adam's here, so that it gets
# to where Adam ends at about the same time, somewhat sooner or somewhat later. What lies below is for EKFAC alone, in a run of this length. An
# eigendecomposition weighs a lot next to the gradient of a net this small, and little next to that of a large one.
#
# ## The same in Flax NNX
#
# A model of NNX holds its parameters itself, and `nnx.Optimizer` its optimizer. The five lines are the same five; what the gradient
# and the state of a model are in NNX, they are here, so the loop is the one that Flax teaches. This twin starts from the numbers
# from which the net above started, and sees the same batches.


# %%
class Twin(nnx.Module):
    def __init__(self, rngs):
        pixels = x.shape[-1]
        sizes = (pixels, *WIDTHS, pixels)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = layer(x)
            x = x if layer.out_features == min(WIDTHS) else nnx.tanh(x)
        return self.layers[-1](x)


twin = Twin(nnx.Rngs(0))
for number, layer in enumerate(twin.layers):
    layer.kernel[...], layer.bias[...] = (start[f"Dense_{number}"][name] for name in ("kernel", "bias"))

watched = ng.nnx.capture(twin, ng.losses.sigmoid_binary_cross_entropy)  # 1
found = watched.layers(twin, x[:BATCH])  # 2
settings = {"damping": falling, "statistics_every": 5, "rescale_every": 5, "refresh_every": 50}
optimizer = nnx.Optimizer(twin, ng.ekfac(schedule(0.07), found, **settings), wrt=nnx.Param)  # 3


@nnx.jit
def nnx_step(model, optimizer, batch, key):
    out = watched.value_and_grad(model, batch, batch, key=key)  # 4
    optimizer.update(model, out.grad, curvature=out.curvature)  # 5


random = np.random.default_rng(0)
for t in ProgressBar(STEPS // 10):
    batch = x[random.permutation(len(x))[:BATCH]]
    nnx_step(twin, optimizer, batch, jax.random.fold_in(jax.random.key(1), t))

loss = ng.losses.sigmoid_binary_cross_entropy(twin(x), x) - floor
there = by_ekfac[2][by_ekfac[0] == STEPS // 10]
print(f"after {STEPS // 10} steps: {loss:.3f} in NNX", *[f"and {each:.3f} in linen" for each in there])
print(f"{len(found)} layers, as many as above, and {len(found.rest)} parameters outside of them")

# %% [markdown]
# ## Where to go from here
#
# * Nothing to tune: `ng.ekfac("quadratic", layers, momentum="quadratic", damping=ng.adaptive_damping(), split="pi")` chooses learning rate,
#   momentum and damping by itself, from a quadratic model of the loss.
# * [What the Fisher looks like](2_fisher.ipynb): the matrix itself, and what each method keeps of it.
# * [The papers' methods, raced](3_race.ipynb): all of them on this problem.
