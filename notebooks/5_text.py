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
# # A transformer on text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/5_text.ipynb)
#
# A language model has what papers on natural gradients seldom have: tables of tokens, norms, attention, and weights that every position
# shares. Nothing of it needs registering. The capture sees products with parameters, wherever they are.
#
# The text needs no download: Python brings half a megabyte of English about itself along.

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
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from IPython.display import ProgressBar

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps, to see that everything runs
STEPS, EVERY = (2, 1) if SMALL else (300, 20)
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = (1, 8, 2, 8, 2) if SMALL else (2, 64, 4, 64, 16)

# %% [markdown]
# ## Text and net
#
# Letters are tokens. The last tenth of the text is kept for measuring. The net has two layers of causal attention and of dense layers, each
# behind a norm and beside a shortcut.

# %%
text = "".join(topics.topics.values())
letters = sorted(set(text))
codes = np.array([letters.index(letter) for letter in text], np.int32)
train, held = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
print(f"{len(text):,} letters, {len(letters)} different ones")


def passages(text, seed):
    random = np.random.default_rng(seed)
    while True:
        places = random.integers(len(text) - CONTEXT, size=(BATCH, 1)) + np.arange(CONTEXT + 1)
        yield text[places[:, :-1]], text[places[:, 1:]]


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        place = self.param("places", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        mask = nn.make_causal_mask(x)
        x = nn.Embed(len(letters), WIDTH)(x) + place
        for _ in range(LAYERS):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(h, mask=mask)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(len(letters))(nn.LayerNorm()(x))


model, likelihood = Transformer(), ng.losses.softmax_cross_entropy
x, y = next(passages(train, 0))
start = model.init(jax.random.key(0), x)["params"]

# %% [markdown]
# ## What is covered
#
# The likelihood sums over the letters of a passage, and takes the mean over passages. `layers` finds what has curvature. It says of each array how its
# block looks, and what gets a diagonal.

# %%
capture = ng.linen.capture(model, likelihood)
layers = capture.layers({"params": start}, x)
print(layers)

# %% [markdown]
# ## Three optimizers
#
# * **Adam**, with a rate that rises to 6e-3 and falls to zero like a cosine. It was not searched for.
# * **SOAP**: Adam in the eigenbasis of the gradient's second moments. It has Adam's settings, and needs no curvature.
# * **K-FAC with nothing said**: length, averaging and damping of the steps come from what the next batch says.


# %%
def rate(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS)


OPTIMIZERS = {
    "Adam": optax.adam(rate(6e-3)),
    "SOAP": ng.soap(rate(6e-3), layers),
    "K-FAC, nothing said": ng.kfac(layers=layers, statistics_every=5, refresh_every=20),
}
tests = [pair for pair, _ in zip(passages(held, 1), range(2 if SMALL else 16), strict=False)]
tests = tuple(jnp.stack(arrays) for arrays in zip(*tests, strict=True))


@jax.jit
def measure(params):
    """Nats a letter, of letters that are not trained on."""
    return jnp.mean(jax.vmap(lambda x, y: likelihood(model.apply({"params": params}, x), y))(*tests)) / CONTEXT


def fit(tx):
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, x, y, key):
        out = capture.value_and_grad({"params": params}, x, y, key=key)
        updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), state

    params, state, stream, seconds = start, tx.init(start), passages(train, 2), 0.0
    jax.block_until_ready(step(params, state, x, y, jax.random.key(0)))  # compiled
    curve = [(0, 0.0, float(measure(params)))]
    for stretch in ProgressBar(STEPS // EVERY):
        before = time.perf_counter()
        for count in range(stretch * EVERY, (stretch + 1) * EVERY):
            params, state = step(params, state, *next(stream), jax.random.key(count))
        jax.block_until_ready(params)
        seconds += time.perf_counter() - before
        curve.append(((stretch + 1) * EVERY, seconds, float(measure(params))))
    return params, np.array(curve)


found = {}
for name, tx in OPTIMIZERS.items():
    found[name] = fit(tx)
    _, seconds, loss = found[name][1][-1]
    print(f"{name:20} {loss:.3f} nats a letter, {1000 * seconds / STEPS:.0f} ms a step")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for axis, column, label in zip(axes, (0, 1), ("steps", "seconds"), strict=True):
    for name, (_, curve) in found.items():
        axis.plot(curve[:, column], curve[:, 2], label=name)
    axis.set(xlabel=label)
    axis.grid(alpha=0.2)
axes[0].set_ylabel("nats a letter, not trained on")
_ = axes[0].legend(frameon=False)

# %% [markdown]
# ## What it writes
#
# Letters drawn from the best of the nets, one after the other. A few hundred steps make words, not sense.

# %%
best = min(found, key=lambda name: found[name][1][-1, 2])


@jax.jit
def following(params, passage, key):
    return jax.random.categorical(key, model.apply({"params": params}, passage[None])[0, -1] / 0.8)


written = list(map(int, held[:CONTEXT]))
for count in ProgressBar(5 if SMALL else 300):
    passage = jnp.array(written[-CONTEXT:])
    written.append(int(following(found[best][0], passage, jax.random.key(count))))
print(f"{best}:", "".join(letters[code] for code in written[CONTEXT:]))

# %% [markdown]
# With as many trials for every method, and Shakespeare: `make text`. Which keywords shared weights have:
# [docs/curvature.md](https://github.com/OWNER/natgrad_jax/blob/main/docs/curvature.md).
