"""The nets of the experiments on classification, and the autoencoder.

The former take images [N, H, W, C] with pixels in [0, 1] and return logits [N, 10]. `train` says whether batch norm
takes the moments of the batch, and updates its averages, or takes the averages; the nets without one ignore it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Autoencoder(nn.Module):
    """Dense layers with ReLU, but for the code and the outputs; weights and biases uniform in +-1/sqrt(fan in).

    Attributes:
        widths: of the hidden layers of the encoder, the code last; the decoder mirrors them.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Rows [N, D] -> outputs [N, D]."""
        code = len(self.widths) - 1
        widths = (*self.widths, *self.widths[-2::-1], x.shape[-1])
        for index, width in enumerate(widths):
            x = nn.Dense(width, **uniform(x.shape[-1]))(x)
            x = x if index in (code, len(widths) - 1) else nn.relu(x)
        return x


class ThreeConvolutions(nn.Module):
    """The convnet of TENGraD for Fashion-MNIST, "3C1F"; weights and biases uniform in +-1/sqrt(fan in)."""

    channels: int
    units: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, 28, 28, 1] -> logits [N, 10]."""
        for _ in range(3):
            x = nn.relu(nn.Conv(self.channels, (3, 3), **uniform(9 * x.shape[-1]))(x))
        x = x[:, :27, :27].reshape(-1, 9, 3, 9, 3, self.channels).max((2, 4))  # on a CPU faster than `nn.max_pool`
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.units, **uniform(x.shape[-1]))(x))
        return nn.Dense(10, **uniform(self.units))(x)


class SmallConvnet(nn.Module):
    """Two convolutions, the second of stride 2 and twice the channels, and a dense layer of logits."""

    channels: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, H, W, C] -> logits [N, 10]."""
        x = nn.relu(nn.Conv(self.channels, (3, 3), **uniform(9 * x.shape[-1]))(x))
        x = nn.relu(nn.Conv(2 * self.channels, (3, 3), 2, **uniform(9 * self.channels))(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10, **uniform(x.shape[-1]))(x)


class TanhNet(nn.Module):
    """Dense layers with tanh between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, H, W, C] -> logits [N, 10]."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class StridedConvnet(nn.Module):
    """Convolutions of 3x3 and stride 2, then two dense layers; ReLU between them."""

    channels: tuple[int, ...]
    hidden: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, H, W, C] -> logits [N, 10]."""
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class ThreeStages(nn.Module):
    """Three convolutions of 3x3, the second and the third of stride 2, with ReLU, and a dense layer of logits."""

    channels: tuple[int, int, int]

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Images [N, H, W, C] -> logits [N, 10]."""
        for channels, stride in zip(self.channels, (1, 2, 2), strict=True):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Transformer(nn.Module):
    """A language model: tables of tokens and positions, layers of causal attention and of two dense layers, logits.

    Normalisation stands in front of what it feeds; attention is made of dense layers, four of them each.
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
    """The ResNet of CIFAR-10: 6 n + 2 layers, shortcuts without parameters ("option A").

    A convolution, three stages of n blocks with 1, 2 and 4 times the channels, each stage after the first at half the
    resolution, the mean over positions, and logits. Convolutions have no bias, batch norms have scale and bias; weights
    are normal with variance 2 / fan in. Pixels are normalised by the moments of CIFAR-10, within the net.

    He et al. (2016), https://arxiv.org/abs/1512.03385, section 4.2.

    Attributes:
        depth: 8, 14, 20, 32, 44, ...
        channels: of the first stage; 16 in the paper.
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
        x = nn.relu(_norm(train)(_convolution(self.channels)(x)))
        for stage in range(3):
            for block in range(blocks):
                x = Block(self.channels * 2**stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(10, kernel_init=KAIMING, bias_init=uniform(x.shape[-1])["bias_init"])(x.mean((1, 2)))


CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Block(nn.Module):
    """Two convolutions with a shortcut around them, which skips pixels and adds channels of zeros where it must."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [N, H, W, C] -> images [N, H / stride, W / stride, channels]."""
        y = nn.relu(_norm(train)(_convolution(self.channels, self.stride)(x)))
        y = _norm(train)(_convolution(self.channels)(y))
        before, after = (more := self.channels - x.shape[-1]) // 2, more - more // 2
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (before, after)))
        return nn.relu(y + shortcut)


def _convolution(channels: int, stride: int = 1) -> nn.Conv:
    return nn.Conv(channels, (3, 3), stride, padding=1, use_bias=False, kernel_init=KAIMING)


def _norm(train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)


def uniform(fan_in: int) -> dict[str, Any]:
    """The initializers of a layer: weights and biases uniform in +-1/sqrt(fan in)."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return {"kernel_init": draw, "bias_init": draw}
