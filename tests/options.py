"""Every layer option that the package must handle: {sentence: (layer, shape of a batch)}."""

from flax import linen as nn

DENSE = {
    "dense": (nn.Dense(4), (3, 5)),
    "dense without bias": (nn.Dense(4, use_bias=False), (3, 5)),
    "dense on sequences": (nn.Dense(4), (3, 2, 5)),
    "dense on sequences without bias": (nn.Dense(4, use_bias=False), (3, 2, 5)),
    "dense on images": (nn.Dense(4), (3, 2, 3, 5)),
    "dense with one input": (nn.Dense(4), (3, 1)),
    "dense with one output": (nn.Dense(1), (3, 5)),
}

IMAGE = (3, 6, 5, 2)

CONV = {
    "conv": (nn.Conv(4, (3, 2)), IMAGE),
    "conv without bias": (nn.Conv(4, (3, 2), use_bias=False), IMAGE),
    "conv of one point": (nn.Conv(4, (1, 1)), IMAGE),
    "conv 1d": (nn.Conv(4, (3,)), (3, 7, 2)),
    "conv 1d of an int": (nn.Conv(4, 3), (3, 7, 2)),
    "conv 3d": (nn.Conv(2, (2, 1, 3)), (3, 3, 2, 4, 2)),
    "conv over further batch axes": (nn.Conv(4, (2, 2)), (3, 2, 4, 3, 2)),
    "strides": (nn.Conv(4, (3, 2), strides=(2, 3)), IMAGE),
    "strides of an int": (nn.Conv(4, (3, 2), strides=2, padding="VALID"), IMAGE),
    "same": (nn.Conv(4, (2, 2), strides=2, padding="SAME"), IMAGE),
    "same lower": (nn.Conv(4, (2, 2), strides=2, padding="SAME_LOWER"), IMAGE),
    "valid": (nn.Conv(4, (3, 2), padding="VALID"), IMAGE),
    "padding of an int": (nn.Conv(4, (3, 2), padding=2), IMAGE),
    "padding of ints": (nn.Conv(4, (3, 2), padding=[1, 2]), IMAGE),
    "padding of pairs": (nn.Conv(4, (3, 2), padding=[(0, 2), (1, 0)]), IMAGE),
    "padding of an int and a pair": (nn.Conv(4, (3, 2), padding=[1, (0, 2)]), IMAGE),
    "padding that crops": (nn.Conv(4, (2, 2), padding=[(-1, 2), (1, -2)]), IMAGE),
    "circular": (nn.Conv(4, (3, 2), padding="CIRCULAR"), IMAGE),
    "circular with strides and kernel dilation": (
        nn.Conv(4, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), padding="CIRCULAR"),
        IMAGE,
    ),
    "reflect": (nn.Conv(4, (3, 4), padding="REFLECT"), IMAGE),
    "reflect with kernel dilation": (nn.Conv(4, (3, 2), kernel_dilation=2, padding="REFLECT"), IMAGE),
    "causal": (nn.Conv(4, (3,), padding="CAUSAL"), (3, 7, 2)),
    "causal with strides and kernel dilation": (
        nn.Conv(4, (3,), strides=2, kernel_dilation=2, padding="CAUSAL"),
        (3, 7, 2),
    ),
    "input dilation": (nn.Conv(4, (3, 2), input_dilation=(2, 3), padding=0), IMAGE),
    "input dilation that is cropped": (nn.Conv(4, (3, 2), input_dilation=2, padding=[(-1, 1), (2, -2)]), IMAGE),
    "kernel dilation": (nn.Conv(4, (3, 2), kernel_dilation=(2, 3)), IMAGE),
    "both dilations and strides": (
        nn.Conv(4, (3, 2), input_dilation=(3, 2), kernel_dilation=(2, 1), strides=(2, 3), padding=[(1, 0), (2, 2)]),
        IMAGE,
    ),
    "groups": (nn.Conv(4, (3, 2), feature_group_count=2), IMAGE),
    "groups without bias": (nn.Conv(6, (2, 2), feature_group_count=2, use_bias=False, padding="VALID"), IMAGE),
    "groups 1d with strides": (nn.Conv(6, (3,), strides=2, feature_group_count=3), (3, 7, 6)),
    "groups over further batch axes": (nn.Conv(4, (2,), feature_group_count=2), (3, 2, 5, 4)),
    "depthwise": (nn.Conv(3, (3, 2), feature_group_count=3), (3, 4, 5, 3)),
    "depthwise with a multiplier": (
        nn.Conv(6, (2, 2), feature_group_count=3, kernel_dilation=2, padding="CIRCULAR"),
        (3, 4, 5, 3),
    ),
}

LAYERS = DENSE | CONV
