"""The settings that methods share: every keyword is written, typed, explained and checked in the class that owns it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import jax
import optax

from natgrad_jax.algebra.truncated import Kept, Rank
from natgrad_jax.around.adaptive import AdaptiveDamping, Damping, adaptive_damping
from natgrad_jax.around.complete import complete
from natgrad_jax.around.control import Length, Quadratic
from natgrad_jax.base import Layer, Layers, Method, Scalar, ScalarOrSchedule
from natgrad_jax.blocks import rotated
from natgrad_jax.layers.views import Modes, in_modes, merged, view
from natgrad_jax.lift.evidence import Scale
from natgrad_jax.lift.lift import Strengths, lift
from natgrad_jax.lift.state import Period, Schedule
from natgrad_jax.lift.stored import stored
from natgrad_jax.lift.tensors import Statistics, lift_tensors
from natgrad_jax.settings.keywords import Fixed, Mask, Number, Settings, Size, Steps, Vectors

Transformation = optax.GradientTransformationExtraArgs
Rate = ScalarOrSchedule | Length | None
Smoothing = Callable[[Scalar], optax.GradientTransformation]
StoredAs = Literal["bfloat16", "float16", "float32"]
Tolerance = Annotated[
    float | None,
    "a layer keeps its eigenvectors where a refresh is due if they have hardly turned: if what is off the diagonal in "
    "their coordinates is at most this share of the whole (roots of sums of squares; 0.1, say). That takes a product "
    "instead of an eigendecomposition, and is counted in the metrics. None to refresh all.",
    Fixed(Number(below=1)),
]
"""Of methods that measure second moments in a basis."""


@dataclass(frozen=True, kw_only=True)
class Direction(Settings):
    """Settings of every direction."""

    damping: Annotated[
        Damping,
        "strength in the units of F, the Fisher block of one example, or its schedule. A larger damping is safer: the "
        "direction tends to the gradient, divided by the damping. In a short run, tune it first.",
        Number(schedule=True),
    ]
    decay: Annotated[
        ScalarOrSchedule,
        "weight of the old value in the averages. Take it near 1 for small batches, smaller where the curvature "
        "changes fast.",
        Number(below=1, schedule=True),
    ] = 0.95
    refresh_every: Annotated[
        Period,
        "steps between refreshes of the operator. Fewer steps follow the curvature more closely and cost more.",
        Steps(),
    ] = 100

    @property
    def given(self) -> ScalarOrSchedule | None:
        """The damping of the direction; None if it adapts itself, so that whoever wraps the direction gives it."""
        return None if isinstance(self.damping, AdaptiveDamping) else self.damping

    @property
    def schedule(self) -> Schedule:
        """The periods."""
        return Schedule(self.refresh_every, self.refresh_every)

    @property
    def decays(self) -> ScalarOrSchedule | tuple[ScalarOrSchedule, ...]:
        """The weights of old values that `method` takes."""
        return self.decay

    @property
    def strengths(self) -> Strengths | None:
        """The rule of dampings that depend on other layers, as `lift` takes it."""
        return None

    def method(self, *decays: Any, **named: Any) -> Method:
        """The functions of one layer.

        Args:
            *decays: weights of old values in the averages.
            **named: the same by their names.

        Returns:
            The method.
        """
        raise NotImplementedError

    def kept_method(self, *decays: Any) -> Method:
        """The functions of one layer, with what is kept of it in the dtype that is asked for."""
        return self.method(*decays)

    def lifted(self, layers: Layers) -> Transformation:
        """The direction for the layers of a model."""
        return lift(
            self.kept_method,
            layers,
            damping=self.given,
            decay=self.decays,
            schedule=self.schedule,
            strengths=self.strengths,
        )


@dataclass(frozen=True, kw_only=True)
class Averaged(Direction):
    """Settings of directions whose statistics are averages with a period of their own."""

    statistics_every: Annotated[
        Period,
        "steps between statistics. Statistics of the curvature cost a backward pass.",
        Steps(),
    ] = 10
    early_refresh: Annotated[
        bool,
        "whether to refresh at every statistics step until the first refresh period is over. Otherwise the statistics "
        "of the first batch alone serve for that long.",
    ] = True
    rolling: Annotated[
        bool,
        "whether the refreshes are spread over the steps of a period, balanced by the cubes of the sides, so that no "
        "step has all of them. Layers take turns; one that takes more than the share of a step has a part of its "
        "refresh at each (methods of K-FAC's family, SOAP). Each is refreshed as often as without. At the first step, "
        "and at early refreshes, all are.",
    ] = False
    max_factor_dim: Annotated[
        int | None,
        "a side wider than this, such as a vocabulary, keeps only the diagonal of its factor; None for 8192. The "
        "memory of a factor grows with the square of its side, the time of a refresh with the cube.",
        Size(0),
    ] = None

    factor_dtype: Annotated[
        StoredAs | None,
        "of the statistics and of what is applied, between steps; what is computed of them is in that of the layer. "
        '"bfloat16" halves what a method holds, and rounds every entry to three digits. None for that of the layer.',
    ] = None

    def kept_method(self, *decays: Any) -> Method:
        """The functions of one layer, with what is kept of it in the dtype that is asked for."""
        method = self.method(*decays)
        return method if self.factor_dtype is None else stored(method, self.factor_dtype)

    @property
    def schedule(self) -> Schedule:
        """The periods."""
        return Schedule(
            self.statistics_every, self.refresh_every, early_refresh=self.early_refresh, rolling=self.rolling
        )


@dataclass(frozen=True, kw_only=True)
class Truncatable(Averaged):
    """Settings of directions whose factors can be truncated to their leading eigenvectors."""

    rank: Annotated[
        Rank | Literal["auto"] | None,
        "eigenvectors that a side of a layer keeps, with one mean eigenvalue for the rest: a number, a share of its "
        'size (0.1), or "auto", an eighth of it and 32 at least, since shapes are fixed before any data is seen. What '
        "is kept and what a product takes then grow with the size of a side instead of its square, a refresh with no "
        "cube. None for whole factors.",
        Vectors(),
    ] = None

    @property
    def kept(self) -> Kept:
        """What a side keeps."""
        return Kept(self.max_factor_dim, self.rank)


@dataclass(frozen=True, kw_only=True)
class Rescaled(Truncatable):
    """Settings of directions that measure second moments in an eigenbasis.

    Directions that the last batches did not show are divided by the damping alone: with small batches it must not be
    too small.
    """

    split: Annotated[
        rotated.Split,
        'how the damping enters. "exact", as in the paper: added to the scale. "pi" or "even": as in `scale_by_kfac`, '
        "with the cross terms of two damped factors. These shorten directions in which one side has little curvature, "
        "and train deep autoencoders in fewer steps.",
    ] = "exact"
    estimator: Annotated[
        rotated.Estimator,
        'of the scale. "per_example": the mean square of each example\'s gradient; "minibatch": the square of the '
        "batch's gradient, cheaper and noisier (EKFAC-ra), unbiased for sampled labels only.",
    ] = "per_example"
    refresh: Annotated[
        rotated.Refresh,
        'how the eigenvectors are computed. "eigh": from scratch. "qr": by one step of orthogonal iteration from the '
        'old ones, after a first refresh by "eigh". It is cheaper, and keeps the scale instead of starting it again.',
    ] = "eigh"
    refresh_tolerance: Tolerance = None
    rescale_every: Annotated[
        Period, "steps between measurements of the scale. There is also one after every refresh.", Steps()
    ] = 10
    scale_decay: Annotated[
        ScalarOrSchedule | None,
        "weight of the old value in the average of the scale; None for `decay`. EKFAC's authors average the scale "
        "alone, with 0.75: `decay=0.0, scale_decay=0.75`.",
        Number(below=1, schedule=True),
    ] = None

    @property
    def schedule(self) -> Schedule:
        """The periods."""
        return Schedule(
            *(self.statistics_every, self.refresh_every, self.rescale_every, self.early_refresh),
            rolling=self.rolling,
            tolerance=self.refresh_tolerance,
        )

    @property
    def decays(self) -> tuple[ScalarOrSchedule, ScalarOrSchedule]:
        """The weights of old values: of the factors, and of the scale."""
        return self.decay, self.decay if self.scale_decay is None else self.scale_decay


@dataclass(frozen=True, kw_only=True)
class OfTensors(Averaged):
    """Settings of directions that need shapes and a gradient: the `layers` may be None."""

    damping: Annotated[
        Damping,
        "strength in the units of the statistics, or its schedule. The units are those of F, the Fisher block of one "
        "example, or of the squared gradient of a batch, which shrinks as the batch grows. A larger damping is safer "
        "and closer to the gradient. In a short run, tune it first.",
        Number(schedule=True),
    ]
    statistics: Annotated[
        Statistics,
        'what the statistics are of. "curvature": gradients of the labels of the capture, sampled by default. '
        '"gradient": the gradient itself, with the true labels; `curvature` is then not needed. If a transformation '
        "stands in front of the direction, pass the gradient to `update` as `gradient=`.",
    ] = "curvature"

    @property
    def units(self) -> Scale:
        """Of statistics of the curvature."""
        return "example"

    def see(self, source: Layer) -> Layer:
        """How an array, or a layer that stays whole, is seen as a tensor."""
        raise NotImplementedError

    def whole(self, layer: Layer) -> bool:
        """Whether the arrays of a layer stay together."""
        del layer
        return False

    def lifted(self, layers: Layers | None) -> Transformation:
        """The direction for the layers of a model, or for arrays of any model."""
        return lift_tensors(
            self.kept_method,
            self.see,
            layers,
            damping=self.given,
            decay=self.decay,
            schedule=self.schedule,
            statistics=self.statistics,
            scale=self.units,
            whole=self.whole,
        )


@dataclass(frozen=True, kw_only=True)
class OfCutTensors(OfTensors, Truncatable):
    """Settings of directions that join short modes and cut long ones, in the units of the gradient of a batch."""

    kernels: Annotated[
        Modes,
        'the modes of a convolution\'s kernel: "flatten_spatial", (window, C, O); "matrix", (window C, O); "all", each '
        "of its axes. Without `layers`, of any array of three axes or more. Modes of one entry do not count.",
    ] = "flatten_spatial"
    merge: Annotated[
        int | None, "neighbouring modes are joined while their product is at most this; None to join none.", Size()
    ] = None
    block_size: Annotated[
        int | None,
        "modes longer than this are cut into blocks, each with its own factors; None to cut none. 1024 bounds the time "
        "of a refresh.",
        Size(),
    ] = None

    @property
    def units(self) -> Scale:
        """Of statistics of the curvature."""
        return "batch"

    def see(self, source: Layer) -> Layer:
        """An array in its modes, merged and cut."""
        return view(source, merged(in_modes(source, self.kernels), self.merge), block=self.block_size)


@dataclass(frozen=True, kw_only=True)
class Completed(Settings):
    """What a complete optimizer adds to the settings of a direction, which its class inherits as well."""

    momentum: Annotated[
        Scalar | Quadratic | None,
        "weight of the old value in the momentum, which stands behind the direction unless the first lines say "
        'otherwise. "quadratic": the minimiser of the quadratic model of the loss. None for none.',
        Number(below=1),
    ] = 0.9
    weight_decay: Annotated[
        ScalarOrSchedule | None,
        "strength of decoupled weight decay; of an l2 penalty if the step is controlled. `update` then needs `params`. "
        "None for none.",
        Number(schedule=True),
    ] = None
    weight_decay_mask: Annotated[
        Any, "which parameters decay, as `optax.add_decayed_weights` takes it; None for all.", Mask()
    ] = None

    kl_clip: Annotated[
        Scalar | None,
        "bound of `clip_by_kl` on how far a step may move the model: on the product of gradient and direction times "
        "the squared learning rate. With the defaults no learning rate from 1e-3 to 1 diverged in our trials; the "
        "scripts of the TENGraD authors have 1e-2. A loss that sums many outputs needs a larger bound. None for none.",
        Number(),
    ] = 1e-3

    smoothing: ClassVar[Smoothing | None] = None
    """The momentum in front of the direction, if it does not stand behind it."""

    @property
    def heavy_ball(self) -> Scalar | Quadratic | None:
        """The momentum behind the direction, or in front where there is a `smoothing`."""
        return self.momentum

    def direction(self, layers: Any) -> Transformation:
        """The direction that is completed."""
        return cast(Direction, self).lifted(layers)

    def beside(self, learning_rate: Rate, chosen: Collection[str]) -> Self:
        """These settings with defaults that go with a learning rate; `chosen` names those that are no defaults.

        Raises:
            ValueError: if a setting that was chosen says what is found without a learning rate.
        """
        adapts = isinstance(cast(Direction, self).damping, AdaptiveDamping)
        free: dict[str, Any] = {"kl_clip": None, "momentum": None, "damping": adaptive_damping()}
        if isinstance(learning_rate, str | None) and "kl_clip" in chosen and isinstance(self.kl_clip, jax.Array):
            raise ValueError(
                f"`kl_clip` is {self.kl_clip!r}, but `learning_rate` is {learning_rate!r}, which chooses the length of "
                "the steps. `optax.inject_hyperparams` makes an array of every number, defaults too: name those that "
                'go with a learning rate, `inject_hyperparams(f, static_args=("damping", "kl_clip", "momentum"))`.'
            )
        if learning_rate is None:
            found = {"kl_clip", "momentum"} | ({"damping"} if adapts else set())
            if wrong := sorted(found & set(chosen)):
                raise ValueError(
                    f"`{wrong[0]}` is {getattr(self, wrong[0])!r}, but `learning_rate` is None: length, averaging and "
                    "damping of the steps are then found while training (`ng.automatic`). Drop it, or give "
                    '`learning_rate` a number, or "quadratic".'
                )
        elif learning_rate == "search":
            free = {"kl_clip": None, "momentum": None}
        elif isinstance(learning_rate, str):
            free["momentum"] = "quadratic"
        else:
            free = {"kl_clip": None} if adapts or isinstance(self.heavy_ball, str) else {}
        return replace(self, **{name: value for name, value in free.items() if name not in chosen})

    def completed(self, learning_rate: Rate, layers: Any) -> Transformation:
        """The complete optimizer for the layers of a model."""
        decay = (self.weight_decay, self.weight_decay_mask)
        around = (self.kl_clip, self.heavy_ball, *decay, self.smoothing)
        return complete(self.direction(layers), learning_rate, cast(Direction, self).damping, *around)
