"""The nets of the experiments, of images [N, H, W, C], rows [N, I] or tokens [N, T].

With `train` batch norm takes the moments of the batch and updates its averages; the nets without one ignore it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Perceptron(nn.Module):
    """Dense layers: hidden widths, then as many outputs as are given, or as there are inputs.

    The hidden layer `linear`, if there is one, has no activation. Weights and biases start as Flax has them, or uniform
    in +-1/sqrt(fan in).
    """

    widths: tuple[int, ...]
    outputs: int | None = None
    linear: int | None = None
    activation: Callable[[Any], Any] = nn.tanh
    uniform: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Inputs [N, ...] -> outputs [N, O]."""
        x = x.reshape(len(x), -1)
        for index, width in enumerate((*self.widths, self.outputs or x.shape[-1])):
            x = nn.Dense(width, **start(x.shape[-1], self.uniform))(x)
            x = x if index in (self.linear, len(self.widths)) else self.activation(x)
        return x


def autoencoder(widths: tuple[int, ...]) -> Perceptron:
    """The autoencoder of the papers with ReLU: an encoder with a linear code at its end, and its mirror image."""
    return Perceptron((*widths, *widths[-2::-1]), linear=len(widths) - 1, activation=nn.relu, uniform=True)


class Convnet(nn.Module):
    """Convolutions of 3x3, the largest of every patch of sides `window`, then hidden dense layers; ReLU between them.

    What is left over of an image beside its patches is dropped. Weights and biases start as in `Perceptron`.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    window: int = 1
    uniform: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, H, W, C] -> logits [N, 10]."""
        for channels, stride in zip(self.channels, self.strides, strict=True):
            x = nn.relu(nn.Conv(channels, (3, 3), stride, **start(9 * x.shape[-1], self.uniform))(x))
        if self.window > 1:  # on a CPU faster than `nn.max_pool`
            rows, columns = (size // self.window for size in x.shape[1:3])
            x = x[:, : rows * self.window, : columns * self.window]
            x = x.reshape(len(x), rows, self.window, columns, self.window, x.shape[-1]).max((2, 4))
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, **start(x.shape[-1], self.uniform))(x))
        return nn.Dense(10, **start(x.shape[-1], self.uniform))(x)


class Transformer(nn.Module):
    """A language model: tables of tokens and positions, layers of causal attention and of two dense layers, logits.

    Normalisation stands in front of what it feeds; attention is made of four dense layers.
    """

    layers: int
    width: int
    heads: int
    tokens: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Tokens [N, T] -> logits of the next one [N, T, tokens]."""
        length, size = x.shape[1], self.width // self.heads
        h = nn.Embed(self.tokens, self.width)(x) + nn.Embed(length, self.width)(jnp.arange(length))
        hidden = jnp.tril(jnp.ones((length, length), bool))
        for _ in range(self.layers):
            z = nn.LayerNorm()(h)
            q, k, v = (nn.Dense(self.width)(z).reshape(*x.shape, self.heads, size) for _ in range(3))
            scores = jnp.einsum("nthd,nshd->nhts", q, k) / size**0.5
            seen = jnp.einsum("nhts,nshd->nthd", nn.softmax(jnp.where(hidden, scores, -1e9)), v)
            h = h + nn.Dense(self.width)(seen.reshape(h.shape))
            h = h + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        return nn.Dense(self.tokens)(nn.LayerNorm()(h))


class ResNet(nn.Module):
    """The ResNet of CIFAR-10: `depth` 6 n + 2, 16 channels in the paper, shortcuts without parameters ("option A").

    Three stages of n blocks with 1, 2 and 4 times the channels, each after the first at half the resolution. Pixels are
    normalised within the net. He et al. (2016), https://arxiv.org/abs/1512.03385, section 4.2.
    """

    depth: int = 20
    channels: int = 16

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, 32, 32, 3] -> logits [N, 10]."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"A ResNet of depth {self.depth} has no three equal stages; expected 6 n + 2: 20, 32, ...")
        x = (x - jnp.array(CIFAR_MEAN)) / jnp.array(CIFAR_DEVIATION)
        x = nn.relu(norm(not train)(convolution(self.channels)(x)))
        for stage in range(3):
            for block in range(blocks):
                x = Block(self.channels * 2**stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(10, kernel_init=KAIMING, bias_init=start(x.shape[-1])["bias_init"])(x.mean((1, 2)))


CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
norm = partial(nn.BatchNorm, momentum=0.9)
convolution = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=KAIMING)


class Block(nn.Module):
    """Two convolutions with a shortcut around them, which skips pixels and adds channels of zeros where it must."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [N, H, W, C] -> images [N, H / stride, W / stride, channels]."""
        y = nn.relu(norm(not train)(convolution(self.channels, strides=self.stride)(x)))
        y = norm(not train)(convolution(self.channels)(y))
        before, after = (more := self.channels - x.shape[-1]) // 2, more - more // 2
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (before, after)))
        return nn.relu(y + shortcut)


def start(fan_in: int, uniform: bool = True) -> dict[str, Any]:
    """The initializers of a layer: weights and biases uniform in +-1/sqrt(fan in), or those of Flax."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return {"kernel_init": draw, "bias_init": draw} if uniform else {}
