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
# # What the Fisher looks like
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/natgrad_jax/blob/main/notebooks/2_fisher.ipynb)
#
# Every method in this library is a way of *not* writing down one matrix. Here we write it down. A net of 255 weights has a
# Fisher matrix of 255×255, which fits on a screen, and beside it fits what K-FAC, EKFAC, TKFAC, TEKFAC and TENGraD put in its place.
#
# One trick makes that easy. A damped natural-gradient method is a linear map from gradients to directions, $d = (\tilde F + \lambda I)^{-1}
# \nabla$. So we need not look inside: give it the unit vectors one after the other, collect the answers as a matrix, invert, subtract
# $\lambda I$, and there is the $\tilde F$ that it believes in.

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
import numpy as np
import optax
from flax import linen as nn
from IPython.display import ProgressBar
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import natgrad_jax as ng

SMALL = "NATGRAD_SMALL" in os.environ  # a few steps and batches, to see that everything runs
STEPS, DRAWS, IMAGES = (5, 2, 100) if SMALL else (200, 10, 300)
SIZE = 64  # images in a batch

# %% [markdown]
# ## A net small enough
#
# Digits of 4×4 pixels, two hidden layers of seven units with tanh, ten classes. We keep 300 images, and call their distribution
# the truth. A little training first: at its random start a net believes in everything alike, and its Fisher matrix is dull.

# %%
digits = load_digits()
x = (digits.images / 16).reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)[:IMAGES].astype("float32")
y = digits.target[:IMAGES]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(nn.Dense(7)(x))
        return nn.Dense(10)(x)


model, adam = Net(), optax.adam(0.01)
params = model.init(jax.random.key(0), x)["params"]


def loss(params):
    return ng.losses.softmax_cross_entropy(model.apply({"params": params}, x), y)


def step(carry, _):
    params, state = carry
    updates, state = adam.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None


(params, _), _ = jax.lax.scan(step, (params, adam.init(params)), length=STEPS)
right = np.mean(np.argmax(model.apply({"params": params}, x), axis=-1) == y)
vector, tree = ravel_pytree(params)
print(f"{len(vector)} weights; after {STEPS} steps {right:.0%} of the images are right")

# %% [markdown]
# ## The matrix itself
#
# With $J_n$ the Jacobian of the ten logits of image $n$, and $p_n$ the probabilities that the net gives to the classes,
#
# $$F = \frac{1}{N} \sum_n J_n^\top \left(\operatorname{diag} p_n - p_n p_n^\top\right) J_n .$$
#
# The middle is the covariance of a label drawn from the net's own belief. No label of the data appears.


# %%
@jax.jit
def fisher(vector):
    def logits(vector, image):
        return model.apply({"params": tree(vector)}, image)

    jacobian = jax.vmap(jax.jacrev(logits), (None, 0))(vector, x)
    p = jax.nn.softmax(jax.vmap(logits, (None, 0))(vector, x))
    covariance = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jnp.einsum("ncp,ncd,ndq->pq", jacobian, covariance, jacobian) / len(x)


exact = np.asarray(fisher(vector), np.float64)

# Where each layer lies in the vector, its bias in front of its kernel, as the parameter tree has it
sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(layer)) for name, layer in params.items()}
ends = np.cumsum(list(sizes.values()))
places = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


# %%
def show(axis, matrix, scale, title):
    """A matrix in colours: the square root of the entries with their signs, so that small ones can be seen."""
    picture = np.sign(matrix) * np.sqrt(np.abs(matrix))
    image = axis.imshow(picture, cmap="RdBu_r", vmin=-np.sqrt(scale), vmax=np.sqrt(scale), interpolation="nearest")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set(xticks=[], yticks=[])
    return image


figure, axis = plt.subplots(figsize=(7, 6.2), layout="constrained")
scale = np.quantile(np.abs(exact), 0.98)
image = show(axis, exact, scale, "F of all weights; root of the entries, with their signs")
for end in ends[:-1]:
    axis.axhline(end - 0.5, color="black", linewidth=0.8)
    axis.axvline(end - 0.5, color="black", linewidth=0.8)
middles = [(place.start + place.stop) / 2 for place in places.values()]
axis.set_xticks(middles, list(places))
axis.set_yticks(middles, list(places), rotation=90, va="center")
axis.tick_params(length=0)
figure.colorbar(image, shrink=0.7)
plt.show()

# %% [markdown]
# Two things leap to the eye. The blocks on the diagonal, one for each layer, are not all there is: the layers do talk to each other.
# And within a block there is a weave, the same small pattern of seven by seven (ten by ten in the last layer) repeated over and over at
# different strengths, empty where a pixel is always black. That weave is the whole idea of K-FAC.
#
# The gradient of a layer by its weight matrix is an outer product, $D = a\, g^\top$, of its inputs $a$ and the derivatives $g$ by its outputs.
# So its block is $\mathbb{E}[a a^\top \otimes g g^\top]$. If $a$ and $g$ were independent, that would be
#
# $$A \otimes G, \qquad A = \mathbb{E}[a a^\top], \quad G = \mathbb{E}[g g^\top]:$$
#
# $G$, repeated in a pattern given by $A$. Two small matrices in the place of a large one.
#
# ## What the methods believe
#
# | method | block |
# | --- | --- |
# | K-FAC | $A \otimes G$ |
# | TKFAC | the product $\Phi \otimes \Psi$ that has the block's own partial traces |
# | EKFAC, TEKFAC | the eigenvectors of that product, but with the variances measured along them: $(U \otimes V) \operatorname{diag}(s) (U \otimes V)^\top$ |
# | TENGraD | the block itself, but of one batch |
#
# All but TENGraD see all images here, and expectations over labels instead of draws, so that what is wrong with them is their *form*. TENGraD
# sees a batch of 64 images, with one label drawn for each, as it does in training: its form is exact, and its error is that of a small sample.

# %%
METHODS = {
    "K-FAC": lambda layers, damping: ng.scale_by_kfac(layers, damping=damping, split="exact"),
    "EKFAC": lambda layers, damping: ng.scale_by_ekfac(layers, damping=damping),
    "TKFAC": lambda layers, damping: ng.scale_by_tkfac(layers, damping=damping, split="exact"),
    "TEKFAC": lambda layers, damping: ng.scale_by_tekfac(layers, damping=damping),
    "TENGraD": lambda layers, damping: ng.scale_by_tengrad(layers, damping=damping),
}
COLOURS = {"K-FAC": "#9ecae1", "EKFAC": "#2171b5", "TKFAC": "#fdbe85", "TEKFAC": "#d94801", "TENGraD": "#31a354"}
DAMPING = 0.1


def believed(method, labels, count):
    """Images, their labels, a key -> the matrix that a method believes in, of all weights."""
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels=labels)
    tx = METHODS[method](capture.layers({"params": params}, x[:count]), DAMPING)

    @jax.jit
    def answers(x, y, key):
        out = capture.value_and_grad({"params": params}, x, y, key=key)
        _, state = tx.update(out.grad, tx.init(params), params, curvature=out.curvature)  # measures, and inverts

        def ask(unit):  # the next step is not due for statistics: it only applies what is there
            return ravel_pytree(tx.update(tree(unit), state, params, curvature=out.curvature)[0])[0]

        return jax.lax.map(ask, jnp.eye(len(vector)))

    def matrix(x, y, key=None):
        return np.linalg.inv(np.asarray(answers(x, y, key), np.float64)) - DAMPING * np.eye(len(vector))

    return matrix


batch = np.random.default_rng(1).permutation(len(x))[:SIZE]
beliefs = {}
for _, name in zip(ProgressBar(len(METHODS) - 1), METHODS, strict=False):
    beliefs[name] = believed(name, "exact", len(x))(x, y)
beliefs["TENGraD"] = believed("TENGraD", "sampled", SIZE)(x[batch], y[batch], jax.random.key(0))


def error(matrix, name):
    """|F - F~| / |F| of the block of a layer."""
    place = places[name]
    return np.linalg.norm((matrix - exact)[place, place]) / np.linalg.norm(exact[place, place])


# %% [markdown]
# Here is the block of the layer in the middle, 7 inputs and a bias by 7 outputs. Above each approximation is its relative error in the
# Frobenius norm.

# %%
name = "Dense_1"
place = places[name]
figure, axes = plt.subplots(2, 3, figsize=(10, 7.2), layout="constrained")
scale = np.quantile(np.abs(exact[place, place]), 0.995)
for axis, (title, matrix) in zip(axes.flat, {"exact": exact, **beliefs}.items(), strict=True):
    told = "" if title == "exact" else f", error {error(matrix, name):.2f}"
    of = f" of {SIZE} images" if title == "TENGraD" else ""
    image = show(axis, matrix[place, place], scale, f"{title}{of}{told}")
figure.colorbar(image, ax=axes, shrink=0.6)
figure.suptitle(f"The block of {name}: exact, and as five methods have it")
plt.show()

# %% [markdown]
# The products are smoother than the truth: $A \otimes G$ has one and the same weave everywhere. EKFAC and TEKFAC may not change the threads,
# only how strongly each is drawn. TENGraD's picture was drawn by a few images: those that the net is not
# sure of, and that happened to be in the batch.
#
# Subtract the truth, and what is left is what a method gets wrong. K-FAC has a white corner: the input of a bias is always one, of which
# everything is independent, so that there the assumption holds.

# %%
figure, axes = plt.subplots(1, 5, figsize=(13, 3.1), layout="constrained")
for axis, (title, matrix) in zip(axes, beliefs.items(), strict=True):
    image = show(axis, (matrix - exact)[place, place], scale, f"{title} - exact")
figure.colorbar(image, ax=axes, shrink=0.8)
plt.show()

# %% [markdown]
# ## Errors, with bars
#
# An optimizer does not see all images and all labels; it sees a batch, and draws one label for each. So each method has two errors, one
# of its form and one of its sample. Wide bars: all images, expectations over labels, so that only the form is wrong; that of TENGraD is
# zero, whatever the data. Points: ten batches of 64 images with drawn labels, their mean, and a whisker from the least to the largest.

# %%
random = np.random.default_rng(2)
batches = [random.permutation(len(x))[:SIZE] for _ in range(DRAWS)]
form, sample = {}, {}
for _, method in zip(ProgressBar(len(METHODS)), METHODS, strict=True):
    of_all = believed(method, "exact", len(x))(x, y) if method == "TENGraD" else beliefs[method]
    of_batch = believed(method, "sampled", SIZE)
    drawn = [of_batch(x[chosen], y[chosen], jax.random.key(seed)) for seed, chosen in enumerate(batches)]
    form[method] = np.array([error(of_all, name) for name in places])
    sample[method] = np.array([[error(matrix, name) for name in places] for matrix in drawn])

figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
positions = np.arange(len(places))
for index, method in enumerate(METHODS):
    where = positions + (index - 2) * 0.16
    axis.bar(where, form[method], 0.15, color=COLOURS[method], label=method)
    mean = sample[method].mean(0)
    reach = np.abs(np.stack([sample[method].min(0), sample[method].max(0)]) - mean)
    axis.errorbar(where, mean, reach, fmt="o", color="black", mfc=COLOURS[method], markersize=6, capsize=3, linewidth=1)
axis.set_xticks(positions, [f"{name}\n{size} weights" for name, size in sizes.items()])
axis.set_ylabel(r"$\|F - \tilde{F}\|\;/\;\|F\|$ of the block")
axis.set_title(f"Bars: the form alone.  Points and whiskers: {DRAWS} batches of {SIZE} images", loc="left", fontsize=10)
axis.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.14))
axis.grid(axis="y", alpha=0.25)
axis.set_axisbelow(True)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Two inequalities among the bars are theorems, for any net and any data: EKFAC is never worse than K-FAC, nor TEKFAC than TKFAC, because both
# measure the best diagonal in the basis that they are given.

# %%
for better, worse in (("EKFAC", "K-FAC"), ("TEKFAC", "TKFAC")):
    print(f"{better} <= {worse} in every layer: {bool(np.all(form[better] <= form[worse] + 1e-3))}")
print(f"largest error of TENGraD when it sees everything: {form['TENGraD'].max():.1e}")

# %% [markdown]
# And the points tell why the exact block is not the end of the story: from one small batch it is the simplest form, K-FAC's, that comes nearest
# to the truth, and the exact one that is furthest. The few numbers of a Kronecker product can be learned from few images;
# all the numbers of the block cannot. What a method gives up in form it gets back in sampling, which is why K-FAC averages over many batches and
# TENGraD prefers large ones.
#
# How much of this survives in the *direction* of a step, and on larger nets, is what `experiments/fidelity.py` measures. How fast each
# method trains is yet another question: [the race](3_race.ipynb).
