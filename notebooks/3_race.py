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
# # The papers' methods, raced
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/3_race.ipynb)
#
# Ten methods from ten years of papers, one autoencoder, one start, one order of the batches. Each paper has its own net, its own
# schedule and its own opponents; here they meet on the same track. It is a small track, so whoever wins it has won just that. But it is
# open: change the net, change a setting, run it again.

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
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from IPython.display import ProgressBar
from scipy.special import xlogy
from sklearn.datasets import load_digits

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps, to see that everything runs
STEPS, EVERY = (4, 2) if SMALL else (500, 10)
WIDTHS = (8,) if SMALL else (256, 128, 64, 12, 64, 128, 256)
BATCH = 599  # a third of the data

# %% [markdown]
# ## The track
#
# The 1,797 digits of scikit-learn, 8×8 grey pixels through twelve numbers and back, as in the [quickstart](1_quickstart.ipynb). The loss is
# the cross-entropy of an image, less the entropy of its pixels, which is the least that any reconstruction can reach.

# %%
x = (load_digits().data / 16).astype("float32")
floor = float(-np.mean(np.sum(xlogy(x, x) + xlogy(1 - x, 1 - x), axis=-1)))
likelihood = ng.losses.sigmoid_binary_cross_entropy


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        pixels = x.shape[-1]
        for width in WIDTHS:
            x = nn.Dense(width)(x)
            x = x if width == min(WIDTHS) else nn.tanh(x)
        return nn.Dense(pixels)(x)


model = Autoencoder()
start = model.init(jax.random.key(0), x[:1])["params"]

# %% [markdown]
# ## The field
#
# * **Adam**, the one to beat.
# * **K-FAC, EKFAC, TKFAC, TEKFAC**: the Fisher block of a layer as a Kronecker product, or as the eigenbasis of one.
# * **TENGraD**: the block of one batch, not approximated, inverted in the space of its examples.
# * **TNT**: a Kronecker factor for each axis of an array, from gradients of labels that the model draws.
# * **MBF**: one small block for all the weights that leave an input.
# * **Shampoo** and **SOAP**: roots of the gradient's own second moments; Adam in the eigenbasis of these.
# * **K-BFGS**: Kronecker factors learned, as BFGS does, from the steps that were taken.
# * Two that nobody tuned: K-FAC and EKFAC with steps that **choose themselves**. Learning rate and momentum minimise the quadratic model of the loss,
#
#   $$m(\delta) = \nabla^\top \delta + \tfrac{1}{2}\, \delta^\top (F + \lambda I)\, \delta,$$
#
#   over the direction and the last step together, with exact products of $F$; and $\lambda$ falls while the model foretells the loss well. The keyword
#   `learning_rate="quadratic"` does it for any of the optimizers, `ng.controlled` for any direction, your own for instance.
#
# The others have the learning rates and dampings that did best among a handful (K-FAC and EKFAC: a dozen) in runs of twice the length, on smaller
# batches. Two did not bear the change, so Adam has the best of six settings of its own here, and K-BFGS of ten. That is all the tuning there is, and
# a tie by a hair's breadth is a tie. `kl_clip` stays on: without it one seed of TEKFAC ended at 0.45 or at 788, by the order of its sums.


# %%
def rate(peak):
    """A warm-up, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 20, STEPS)


def falling(start, end):
    """A damping that falls in the first half."""
    return optax.exponential_decay(start, max(1, STEPS // 2), end / start, end_value=end)


OFTEN = {"statistics_every": 5, "refresh_every": 20}
BASES = {"statistics_every": 5, "rescale_every": 5, "refresh_every": 50, "decay": 0.98}
LONG: dict = {"kl_clip": 1e-2}  # a change of the outputs ten times that of the defaults of K-FAC's family
YOUNG = {"statistics_every": 5, "refresh_every": 5, "decay": 0.5}


def controlled(layers):
    """A direction whose steps choose themselves."""
    direction = ng.scale_by_ekfac(layers, damping=1.0, split="pi", rescale_every=5, **YOUNG)
    return ng.controlled(direction, "quadratic", momentum="quadratic", damping=ng.adaptive_damping())


METHODS = {
    "Adam": lambda layers: optax.adam(rate(0.01), b2=0.95),
    "K-FAC": lambda layers: ng.kfac(rate(0.1), layers, **LONG, damping=falling(3, 0.003), **OFTEN),
    "TKFAC": lambda layers: ng.tkfac(rate(0.1), layers, **LONG, damping=falling(3, 0.003), **OFTEN),
    "EKFAC": lambda layers: ng.ekfac(rate(0.07), layers, **LONG, damping=falling(3, 0.02), **BASES),
    "TEKFAC": lambda layers: ng.tekfac(rate(0.07), layers, **LONG, damping=falling(3, 0.02), **BASES),
    "TENGraD": lambda layers: ng.tengrad(rate(0.1), layers, **LONG, damping=falling(3, 0.3), refresh_every=5),
    "TNT": lambda layers: ng.tnt(rate(0.1), layers, **LONG, damping=falling(3, 0.03), **OFTEN),
    "MBF": lambda layers: ng.mbf(rate(0.003), layers, **LONG, damping=0.1, **OFTEN),
    "Shampoo": lambda layers: ng.shampoo(
        rate(0.003), layers, damping=1e-8, graft_to="adam", decay=0.95, graft_decay=0.99, **OFTEN
    ),
    "SOAP": lambda layers: ng.soap(rate(0.02), layers),
    "K-BFGS": lambda layers: ng.kbfgs(rate(2.0), layers, damping=0.1),
    "K-FAC, adaptive": lambda layers: ng.kfac(
        "quadratic", layers, momentum="quadratic", damping=ng.adaptive_damping(), **YOUNG
    ),
    "EKFAC, controlled": controlled,
}
STYLES = {
    name: {"color": color, "linestyle": style}
    for name, color, style in zip(
        METHODS,
        ("#7f7f7f", "#2171b5", "#6baed6", "#d94801", "#fd8d3c", "#31a354", "#756bb1", "#bcbddc", "#8c510a", "#bf812d")
        + ("#e7298a", "#2171b5", "#d94801"),
        ("-",) * 11 + ("--",) * 2,
        strict=True,
    )
}

# %% [markdown]
# ## The run
#
# One training step serves all of them. What a method does not ask for is not computed: Adam's step through this function costs what it
# costs through `jax.grad`. The clock does not count compilation, nor the measuring of losses.


# %%
@jax.jit
def measure(params):
    return likelihood(model.apply({"params": params}, x), x) - floor


def train(method):
    """Steps, seconds and losses of a run."""
    capture = ng.linen.capture(model, likelihood, labels="true" if method == "K-BFGS" else "sampled")
    tx = optax.with_extra_args_support(METHODS[method](capture.layers({"params": start}, x[:BATCH])))

    @jax.jit
    def step(params, opt_state, batch, key):
        out = capture.value_and_grad({"params": params}, batch, batch, key=key)
        updates, opt_state = tx.update(out.grad, opt_state, params, curvature=out.curvature)
        return optax.apply_updates(params, updates), opt_state

    random, key, seconds = np.random.default_rng(0), jax.random.key(1), 0.0
    params, opt_state = start, tx.init(start)
    curve = [(0, 0.0, float(measure(params)))]
    jax.block_until_ready(step(params, opt_state, x[:BATCH], key))  # compiles; what it returns is forgotten
    for first in range(0, STEPS, EVERY):
        began = time.perf_counter()
        for t in range(first, first + EVERY):
            batch = x[random.permutation(len(x))[:BATCH]]
            params, opt_state = step(params, opt_state, batch, jax.random.fold_in(key, t))
        jax.block_until_ready(params)
        seconds += time.perf_counter() - began
        curve.append((first + EVERY, seconds, float(measure(params))))
    return np.array(curve).T


curves = {}
for _, method in zip(ProgressBar(len(METHODS)), METHODS, strict=True):
    curves[method] = train(method)
    _, seconds, losses = curves[method]
    print(f"{method:18} {losses[-1]:6.2f} nats above the floor, {1000 * seconds[-1] / STEPS:5.1f} ms a step")

# %% [markdown]
# ## The finish
#
# The upper picture is the one of the papers. The lower one is the one of your electricity bill. The dotted line is where Adam ends.

# %%
figure, axes = plt.subplots(2, 1, figsize=(10, 10.5), sharey=True, layout="constrained")
target = curves["Adam"][2, -1]
for axis, row, unit in zip(axes, (0, 1), ("steps", "seconds, without compilation"), strict=True):
    for method, curve in curves.items():
        width = 2.6 if method == "Adam" else 1.6
        axis.plot(curve[row], curve[2], label=method, linewidth=width, **STYLES[method])
        axis.plot(curve[row, -1], curve[2, -1], "o", color=STYLES[method]["color"], markersize=4)
    axis.axhline(target, color="grey", linewidth=0.8, linestyle=":", zorder=0)
    axis.set(xlabel=unit, yscale="log", xlim=(0, None), ylabel="training loss above its floor, nats an image")
    axis.grid(alpha=0.2, which="both")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_title("An autoencoder of digits, 64-256-128-64-12-64-128-256-64", loc="left")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
plt.show()

# %% [markdown]
# And what it came to, in the order of the finish:

# %%
print(f"{'':18} {'loss':>6}  {'steps':>6}  {'seconds until Adam’s loss':>26}")
for method in sorted(curves, key=lambda method: curves[method][2, -1]):
    steps, seconds, losses = curves[method]
    reached = losses <= target
    when = (f"{steps[np.argmax(reached)]:.0f}", f"{seconds[np.argmax(reached)]:.1f}") if reached.any() else ("-", "-")
    print(f"{method:18} {losses[-1]:6.2f}  {when[0]:>6}  {when[1]:>26}")

# %% [markdown]
# ## How to read it
#
# * A step of a second-order method is dearer than Adam's, and how much dearer depends on the net, the batch and the machine far more than on the
#   method. On a small net like this one, on a CPU, the eigendecompositions of EKFAC, TEKFAC and SOAP weigh more than they would beside a large one.
# * The two that choose their own steps are down first, and then stay where the noise of a batch lets them: nothing makes their steps decay. On full
#   batches, or with a floor under the damping, they go on.
# * TENGraD sees one batch where the others average over many. Its step is cheap where layers are wider than batches are large; here it is the other
#   way round.
# * None of this is about the test set. A lower training loss is what an optimizer is asked for; whether one wants it is another question.
#
# The experiments of the repository ask the same at the sizes of the papers: `make autoencoder`, `make classify`, `make race`.
