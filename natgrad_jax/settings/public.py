"""The public functions, made of settings: the fields of a class are the keywords of its function.

A type checker and an editor read them off the class, a notebook and `optax.inject_hyperparams` off the signature,
`help` off the text.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, Protocol, Union, cast, get_args, get_origin

from natgrad_jax import checks
from natgrad_jax.around.adaptive import Damping
from natgrad_jax.base import Layers, Scalar, ScalarOrSchedule
from natgrad_jax.lift.meshes import on_any_mesh
from natgrad_jax.lift.restored import with_gradients_checked
from natgrad_jax.lift.state import Period
from natgrad_jax.settings.keywords import hints_of, parts_of
from natgrad_jax.settings.shared import Completed, Direction, OfTensors, Rate, Transformation

P = ParamSpec("P")


class Complete(Protocol):
    """Settings that make a complete optimizer."""

    def completed(self, learning_rate: Any, layers: Any) -> Transformation:
        """The complete optimizer for the layers of a model."""
        ...


class DirectionOfLayers(Protocol[P]):
    """A direction for the layers of a model."""

    def __call__(self, layers: Layers, *args: P.args, **kwargs: P.kwargs) -> Transformation:
        """The direction."""
        ...


class DirectionOfTensors(Protocol[P]):
    """A direction that can do without layers."""

    def __call__(self, layers: Layers | None = None, *args: P.args, **kwargs: P.kwargs) -> Transformation:
        """The direction."""
        ...


class OptimizerOfLayers(Protocol[P]):
    """A complete optimizer for the layers of a model."""

    def __call__(
        self, learning_rate: Rate = None, layers: Layers | None = None, *args: P.args, **kwargs: P.kwargs
    ) -> Transformation:
        """The optimizer; the layers are needed."""
        ...


class OptimizerOfTensors(Protocol[P]):
    """A complete optimizer that can do without layers."""

    def __call__(
        self, learning_rate: Rate = None, layers: Layers | None = None, *args: P.args, **kwargs: P.kwargs
    ) -> Transformation:
        """The optimizer."""
        ...


def direction(settings: Callable[P, Direction]) -> DirectionOfLayers[P]:
    """The public `scale_by_*` of some settings, whose first argument is the layers.

    Args:
        settings: a class of settings.

    Returns:
        The function, with the name, signature and documentation of the settings.
    """
    return _public(settings, f"scale_by_{_name(settings)}", _LAYERS)


def optimizer(settings: Callable[P, Complete]) -> OptimizerOfLayers[P]:
    """The public complete optimizer of some settings, whose first arguments are learning rate and layers.

    Args:
        settings: a class of settings.

    Returns:
        The function, with the name, signature and documentation of the settings.
    """
    completes = issubclass(cast(type, settings), Completed)
    return _public(settings, _name(settings), _RATE | _BEHIND if completes else _PLAIN_RATE | _LAYERS)


def direction_of_tensors(settings: Callable[P, OfTensors]) -> DirectionOfTensors[P]:
    """The same as `direction`, of settings for which the layers may be None."""
    return _public(settings, f"scale_by_{_name(settings)}", _ARRAYS)


def optimizer_of_tensors(
    settings: Callable[P, Completed],
) -> OptimizerOfTensors[P]:
    """The same as `optimizer`, of settings for which the layers may be None."""
    return _public(settings, _name(settings), _RATE | _ARRAYS)


_RATE = {
    "learning_rate": (
        Rate,
        None,
        "step size, or its schedule. None: the optimizer finds length, averaging and damping of its steps while "
        'training (`automatic`). "quadratic": the minimiser of the quadratic model of the batch (`controlled`), with '
        'momentum "quadratic" and `adaptive_damping()` where nothing else is said. "search": the length of least loss '
        "among many, for all the data in a batch.",
    )
}
_PLAIN_RATE = {"learning_rate": (ScalarOrSchedule, inspect.Parameter.empty, "step size, or its schedule.")}
_LAYERS = {"layers": (Layers, inspect.Parameter.empty, "what `capture.layers` returns.")}
_BEHIND = {"layers": (Layers, None, "what `capture.layers` returns; required.")}
_ARRAYS = {
    "layers": (
        Layers | None,
        None,
        "what `capture.layers` returns. Without layers the method knows only the shapes of the parameter arrays. It "
        "then does not separate the groups of a convolution, and the copies of a scanned layer are a mode.",
    )
}
_EXAMPLE = """
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, int)
    >>> variables = model.init(jax.random.key(0), x)
    >>> capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy)
    >>> tx = ng.{call}
    >>> @jax.jit
    ... def step(params, state, key):
    ...     out = capture.value_and_grad({{"params": params}}, x, y, key=key)
    ...     return tx.update(out.grad, state, params, curvature=out.curvature)
    >>> state = tx.init(variables["params"])
    >>> updates, state = step(variables["params"], state, jax.random.key(1))
"""
Told = Mapping[str, tuple[Any, Any, str]]


def _public(settings: Any, name: str, first: Told) -> Any:
    """A function of the first arguments and of the fields of some settings as keywords."""
    completes = "learning_rate" in first

    def made(*args: Any, **kwargs: Any) -> Transformation:
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise TypeError(f"`{name}`: {error}; it takes {', '.join(signature.parameters)}.") from None
        layers = given.pop("layers", None)
        rate = given.pop("learning_rate", None)
        if not completes:
            return on_any_mesh(settings(**given).lifted(layers))
        if isinstance(rate, str):
            checks.choice("learning_rate", rate, ("quadratic", "search"))
        elif rate is not None:
            checks.number("learning_rate", rate, least=0, schedule=True)
        chosen = settings(**given)
        if isinstance(chosen, Completed):
            said = {name for name, value in given.items() if value is not signature.parameters[name].default}
            chosen = chosen.beside(rate, said)
        return with_gradients_checked(on_any_mesh(chosen.completed(rate, layers)))

    made.__name__ = made.__qualname__ = name
    made.__module__ = settings.__module__
    front = [
        inspect.Parameter(
            each, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=_Shown(_shown(hint))
        )
        for each, (hint, default, _) in first.items()
    ]
    signature = _Signature([*front, *_keywords(settings)])
    setattr(made, "__signature__", signature)  # noqa: B010, which a type checker does not know of functions
    made.__doc__ = _documentation(settings, name, first, completes)
    return made


class _Signature(inspect.Signature):
    """A signature with one parameter a line."""

    __slots__ = ()

    def __str__(self) -> str:
        names = list(self.parameters.values())
        keywords = [each for each in names if each.kind is inspect.Parameter.KEYWORD_ONLY]
        lines = [*(str(each) for each in names if each not in keywords), "*", *map(str, keywords)]
        return "(\n" + "".join(f"    {line},\n" for line in lines) + ")"


class _Shown(str):
    """An annotation as it is read."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


_ALIASES = (
    (Damping, "Damping"),
    (Rate, "ScalarOrSchedule | 'quadratic' | 'search'"),
    (ScalarOrSchedule, "ScalarOrSchedule"),
    (Period, "int | Array"),
    (Scalar, "Scalar"),
)


def _shown(hint: Any) -> str:
    """A type, in few words."""
    parts = set(parts_of(hint))
    for alias, name in _ALIASES:
        if (known := set(parts_of(alias))) <= parts:
            others = [_shown(part) for part in parts_of(hint) if part not in known]
            return " | ".join([name, *others])
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(_shown(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    return "None" if hint is NoneType else getattr(hint, "__name__", str(hint))


def _keywords(settings: Any) -> list[inspect.Parameter]:
    """The parameters of a public function, what is special about the method before what all have."""
    hints, own = hints_of(settings), inspect.signature(settings).parameters
    shared = [each.name for base in (OfTensors, Completed) for each in fields(base)]
    special = [name for name in own if name not in shared]
    order = ["damping", *special, *(name for name in own if name != "damping" and name not in special)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [own[name].replace(kind=keyword, annotation=_Shown(_shown(get_args(hints[name])[0]))) for name in order]


def _documentation(settings: Any, name: str, first: Told, completes: bool) -> str:
    """What `help` shows: what it is, how it is called, every keyword, what is returned and raised."""
    hints = hints_of(settings)
    texts = {each: text for each, (_, _, text) in first.items()}
    texts |= {
        each.name: next(x for x in get_args(hints[each.name])[1:] if isinstance(x, str)) for each in _keywords(settings)
    }
    call = f"{name}({'0.1, ' * completes}capture.layers(variables, x){'' if completes else ', damping=0.03'})"
    keywords = "\n".join(
        textwrap.fill(f"{each}: {text}", 116, initial_indent="    ", subsequent_indent="        ")
        for each, text in texts.items()
    )
    needs = "`update` takes `curvature=out.curvature`; see the example."
    kind = "A complete optimizer" if completes else "A transformation of the gradient"
    example = inspect.cleandoc(_EXAMPLE.format(call=call))
    return (
        f"{inspect.getdoc(settings)}\n\n{example}\n\n"
        f"Args:\n{keywords}\n\nReturns:\n    {kind}; {needs}\n\n"
        "Raises:\n    TypeError: if a setting is of another type than it says.\n"
        "    ValueError: if a word is unknown, a number out of its range, or two settings exclude one another."
    )


def _name(settings: Any) -> str:
    return settings.__name__.removesuffix("Optimizer").lower()
