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
# # Nothing to tune
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/6_nothing_to_tune.ipynb)
#
# A learning rate is chosen because nobody says how long a step should be. A curvature can say it. This notebook trains one net by steps that
# choose themselves, looks at what they choose, and reads what the state of an optimizer says of each layer.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn
from IPython.display import ProgressBar
from sklearn.datasets import load_digits

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps, to see that everything runs
STEPS = 3 if SMALL else 200
WIDTHS = (4,) if SMALL else (64, 64, 64)
RATES = (0.1,) if SMALL else (0.003, 0.01, 0.03, 0.1, 0.3)

# %% [markdown]
# ## The net
#
# Dense layers with tanh, and the 1,797 digits of scikit-learn. Losses are those of all images.

# %%
images, labels = jnp.array(load_digits().data / 16, jnp.float32), jnp.array(load_digits().target)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in WIDTHS:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(10)(x)


model, likelihood = Net(), ng.losses.softmax_cross_entropy
start = model.init(jax.random.key(0), images[:1])["params"]
capture = ng.linen.capture(model, likelihood)
layers = capture.layers({"params": start}, images[:64])


def training(make, batch):
    """A function of the number that `make` takes, compiled once: the state, and losses, lengths, dampings of all steps."""

    @jax.jit
    def run(number):
        tx = optax.with_extra_args_support(make(number))

        def step(carry, key):
            params, state = carry
            chosen = jax.random.choice(key, len(images), (batch,), replace=False)
            out = capture.value_and_grad({"params": params}, images[chosen], labels[chosen], key=key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            params = optax.apply_updates(params, updates)
            loss = likelihood(model.apply({"params": params}, images), labels)
            return (params, state), (loss, optax.global_norm(updates), getattr(state, "damping", 0.0))

        keys = jax.random.split(jax.random.key(1), STEPS)
        (_, state), found = jax.lax.scan(step, (start, tx.init(start)), keys)
        return state, *found

    return run


# %% [markdown]
# ## Rates, and no rate
#
# Adam and K-FAC have a rate that falls to zero like a cosine, and one run for each rate of a grid. The dashed lines have no rate at all:
# `ng.kfac(layers=layers)`. Each step is judged by the next batch, which was not made for it.


# %%
def cosine(rate):
    return lambda count: 0.5 * rate * (1 + jnp.cos(jnp.pi * count / STEPS))


MAKES = {
    "Adam": lambda rate: optax.adam(cosine(rate)),
    "K-FAC": lambda rate: ng.kfac(cosine(rate), layers),
}
BATCHES = (16,) if SMALL else (64, 1797)
figure, axes = plt.subplots(
    1, len(BATCHES), figsize=(5 * len(BATCHES), 3.6), sharey=True, layout="constrained", squeeze=False
)
nothing = {}
for axis, batch in zip(axes[0], BATCHES, strict=True):
    for _, color, (name, make) in zip(ProgressBar(len(MAKES)), ("#7f7f7f", "#2171b5"), MAKES.items(), strict=True):
        run = training(make, batch)
        axis.plot(RATES, [float(run(rate)[1][-1]) for rate in RATES], "o-", color=color, label=name)
    nothing[batch] = training(lambda _: ng.kfac(layers=layers), batch)(0.0)
    end = float(nothing[batch][1][-1])
    axis.axhline(end, color="#d94801", linestyle="--", label="K-FAC, nothing said")
    axis.set(xscale="log", yscale="log", xlabel="learning rate", title=f"batches of {batch}")
    axis.grid(alpha=0.2)
    print(f"batches of {batch}: {end:.1e} without a rate")
axes[0, 0].set_ylabel(f"loss after {STEPS} steps")
_ = axes[0, 0].legend(frameon=False)

# %% [markdown]
# With batches of 64 the steps without a rate end where the best of five rates end. With all images in a batch they become Newton's, and no rate
# comes near. With smaller batches the gradient is averaged over more of them, and steps get shorter.
#
# ## What it chose

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for batch, (state, _, lengths, dampings) in nothing.items():
    axes[0].plot(lengths, label=f"batches of {batch}")
    axes[1].plot(dampings)
    print(f"batches of {batch}: {int(state.rejected)} of {STEPS} steps taken back")
axes[0].set(yscale="log", xlabel="steps", ylabel="length of a step")
axes[1].set(yscale="log", xlabel="steps", ylabel="damping")
axes[0].legend(frameon=False)
for axis in axes:
    axis.grid(alpha=0.2)

# %% [markdown]
# ## What a state says
#
# `ng.diagnose` reads a state: how full the averages are, how old the operator, how wide the spectrum, how much of it is damping. Here are two
# runs of K-FAC with a rate. One has a damping that drowns the curvature: its steps are those of gradient descent.

# %%
run = training(lambda damping: ng.kfac(0.03, layers, damping=damping), BATCHES[0])
for _, damping in zip(ProgressBar(2), (0.03, 1e4), strict=True):
    state, losses, *_ = run(damping)
    print(f"damping {damping:g}: loss {losses[-1]:.1e}")
    print(ng.diagnose(state, layers), "\n")

# %% [markdown]
# `dict(ng.diagnose(state, layers))` is a flat mapping of numbers for a logger. Causes and cures: [docs/tuning.md](https://github.com/OWNER/natgrad_jax/blob/main/docs/tuning.md).
# The older rule, on the quadratic model of the batch itself, is `ng.kfac("quadratic", layers)`: [docs/steps.md](https://github.com/OWNER/natgrad_jax/blob/main/docs/steps.md).
