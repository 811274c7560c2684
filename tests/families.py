"""Small nets of the families that people train, beside those of `methods_table`: what the laws hold on.

All take numbers [N, ...] and return logits [N, C]; weights are drawn as Flax does.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn


class DilatedConvNet(nn.Module):
    """A convolution with gaps in its kernel, one in groups with gaps, a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (2, 3), kernel_dilation=(2, 1))(x))
        x = nn.relu(nn.Conv(4, (2, 2), strides=2, kernel_dilation=2, feature_group_count=2)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


class TiedTransformer(nn.Module):
    """A layer of attention and a dense one on letters, whose table is the head, too; the mean logits of an example."""

    letters: int = 5

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(self.letters, 4)
        x = table((10 * jnp.abs(x)).astype(int) % self.letters)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return table.attend(nn.LayerNorm()(x)).mean(1)


class Block(nn.Module):
    """A residual block with batch normalisation."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.BatchNorm(use_running_average=False)(nn.Conv(x.shape[-1], (3,))(x))
        return x + nn.relu(y), None


class ScannedResNet(nn.Module):
    """Two residual blocks as one scan, a dense layer."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=2, **axes)()(nn.Conv(3, (2,))(x), None)
        return nn.Dense(3)(x.mean(1))


class Recurrent(nn.Module):
    """An LSTM whose gates are one product, and a dense layer behind its last step."""

    carry: Any = jnp.float32  # dtype of what a cell starts from

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=self.carry))(x)[:, -1])


NETS = {"dilated": DilatedConvNet(), "transformer": TiedTransformer(), "resnet": ScannedResNet(), "lstm": Recurrent()}
SHAPES = {"dilated": (5, 5, 2), "transformer": (4,), "resnet": (6, 2), "lstm": (4, 2)}
LAYERS = {
    "dilated": ("Conv_0", "Conv_1", "Dense_0"),
    "transformer": (
        "Embed_0",
        *(f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value", "out")),
        "Dense_1",
        "Dense_0",
    ),
    "resnet": ("Conv_0", "ScanBlock_0/Conv_0", "Dense_0"),
    "lstm": ("OptimizedLSTMCell_0/hi+hf+hg+ho", "OptimizedLSTMCell_0/ii+if+ig+io", "Dense_0"),
}
"""{family: its layers but for norms}."""
