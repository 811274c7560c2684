"""Statistics and operators outside of a step: observe, refresh, a pass of data before training, light checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import addresses, checks
from natgrad_jax.addresses import Tree
from natgrad_jax.base import Layers, Scalar
from natgrad_jax.lift.evidence import Known, is_evidence
from natgrad_jax.lift.requests import Observe, Refresh, Request
from natgrad_jax.lift.state import NaturalGradientState


def observe(
    tx: optax.GradientTransformation,
    state: Any,
    evidence: Any,
    params: Tree | None = None,
    *,
    decay: Scalar | None = None,
) -> Any:
    """Move the statistics by one batch, and nothing else.

    No step is counted, no operator changes, and no other part of a chain, a mask or a partition moves.

    Args:
        tx: a lifted method, or a transformation with one in it.
        state: its state; the `opt_state` of an `nnx.Optimizer` comes back in Variables, as it is kept there.
        evidence: of a batch: what `capture.value_and_grad` returned; its `out.curvature`; {name: Evidence}, which a
            jitted function can return; or a gradient, for methods whose statistics are of it.
        params: the parameters; needed if `evidence` brings no gradient and `tx` has parts beside the method that need
            the structure of a tree: a mask, a partition, a momentum in a chain of your own.
        decay: weight of the old statistics; None for that of the method.

    Returns:
        The state of `tx` with new statistics.

    Raises:
        ValueError: if the state has no lifted method, or the evidence is not what its statistics are of.
    """
    return _ask(tx, state, Observe(None if decay is None else jnp.asarray(decay)), params, evidence)


def refresh(tx: optax.GradientTransformation, state: Any, evidence: Any = None, params: Tree | None = None) -> Any:
    """Make the operators afresh from the statistics; rebuild those that `without_operators` left out.

    K-FAC, TKFAC, TNT, MBF and Shampoo then continue bit for bit, if there were no statistics since the last refresh, if
    the damping is that of the last refresh, and if no refresh was rejected. EKFAC, TEKFAC, SOAP and TENGraD hold what a
    batch measured: give one, and they continue from there. The coupled Shampoo and the warm refresh ("qr") depend on
    their earlier operators. K-BFGS learned its operators from its steps.

    Args:
        tx: a lifted method, or a transformation with one in it.
        state: its state.
        evidence: a batch, as `observe` takes it, for operators that hold what a batch measured.
        params: the parameters, as `observe` takes them.

    Returns:
        The state of `tx` with new operators.

    Raises:
        ValueError: if the state has no lifted method, or the operators cannot be made of what there is.
    """
    return _ask(tx, state, Refresh(), params, evidence)


def without_operators(state: Any) -> Any:
    """The state without its operators, for a checkpoint of half the bytes or less; `refresh` makes them again.

    Args:
        state: of a lifted method, or of a transformation with one in it.

    Returns:
        The same with None in the place of every operator; their dates stay.

    Raises:
        ValueError: if the state has no lifted method.
    """

    def light(node):
        if not _is_ours(node):
            return node
        operators = {name: old._replace(value=None, underway=None) for name, old in node.operators.items()}
        return node._replace(operators=operators)

    _check(state)
    return jax.tree.map(light, state, is_leaf=_is_ours)


def warm_start(
    tx: optax.GradientTransformationExtraArgs,
    state: Any,
    evidence_stream: Iterable[Any],
    params: Tree | None = None,
) -> Any:
    """Fill the statistics with the running mean over a pass of data, before training.

    It is a loop over `observe`, as in the experiments of Goldfarb, Ren and Bahamou. Later updates treat the average as
    one full old value. TNT, Shampoo and K-BFGS leave it unchanged in their first step.

    Args:
        tx: a lifted method, or a chain with one in it.
        state: its state.
        evidence_stream: for each batch what `observe` takes.
        params: the parameters; see `observe`.

    Returns:
        The state of `tx` with warm statistics.

    Raises:
        TypeError: if the stream is that of no batches.
        ValueError: if the state has no lifted method, or the stream is not what its statistics are of.
    """
    of_one = isinstance(evidence_stream, Mapping) or hasattr(evidence_stream, "_fields")
    if of_one or hasattr(evidence_stream, "shape") or not isinstance(evidence_stream, Iterable):
        raise TypeError(
            f"`evidence_stream` is of type {type(evidence_stream).__name__}; expected one item for each batch, as in "
            "`[capture.value_and_grad(...) for x, y in data]`."
        )
    for done, item in enumerate(evidence_stream):
        state = observe(tx, state, item, params, decay=done / (done + 1))
    return state


def _ask(
    tx: optax.GradientTransformation,
    state: Any,
    request: Request,
    params: Tree | None,
    evidence: Any,
) -> Any:
    """The state after a request, with whatever form of evidence goes with it."""
    checks.transformation("tx", tx)
    _check(state)
    given, (state, params, evidence) = state, map(addresses.unboxed, (state, params, evidence))
    curvature, gradient = getattr(evidence, "curvature", evidence), getattr(evidence, "grad", None)
    layers, found = getattr(curvature, "layers", None), curvature() if callable(curvature) else curvature
    known = None if layers is None else (layers, getattr(curvature, "labels", "true"))
    if not (found is None or is_evidence(found)):
        gradient, found, known = evidence, None, None
    like = gradient if gradient is not None else {} if params is None else params
    try:
        zeros = jax.tree.map(jnp.zeros_like, like)
        new = _asked(state, zeros, params, gradient, found, request, tx=tx, known=known)
        return addresses.boxed(new, given)
    except (TypeError, ValueError) as error:
        if not jax.tree.leaves(like):
            error.add_note("A part of this transformation may need the structure of the parameters: pass `params`.")
        raise


@partial(jax.jit, static_argnames=("tx", "known"))
def _asked(
    state: Any,
    updates: Tree,
    params: Tree | None,
    gradient: Tree | None,
    evidence: Any,
    request: Request,
    *,
    tx: optax.GradientTransformation,
    known: tuple[Layers, str] | None,
) -> Any:
    curvature = evidence if known is None or evidence is None else Known(evidence, *known)
    update = optax.with_extra_args_support(tx).update
    _, new = update(updates, state, params, curvature=curvature, gradient=gradient, request=request)
    return _ours(state, new)


def _ours(old: Any, new: Any) -> Any:
    """The old state of a chain with the new states of the lifted methods in it."""
    return jax.tree.map(lambda old, new: new if _is_ours(old) else old, old, new, is_leaf=_is_ours)


def _is_ours(node: Any) -> bool:
    return isinstance(node, NaturalGradientState)


def _is_multi(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState)


def _has(state: Any, is_wanted: Callable[[Any], bool]) -> bool:
    """Whether a state, or one inside it, is wanted."""
    return any(map(is_wanted, jax.tree.leaves(state, is_leaf=is_wanted)))


def _check(state: Any) -> None:
    """Refuse a state that has no method of ours, or has it where a request cannot reach it."""
    if not _has(state, _is_ours):
        raise ValueError(
            f"`state` of type {type(state).__name__} holds no natural-gradient method; expected `tx.init(params)`."
        )
    if _has(state, _is_multi):
        raise ValueError(
            "`optax.MultiSteps` passes nothing on but every k-th update, and of the curvature only the last of k; "
            "accumulate where the batch is evaluated: `capture(..., microbatches=k)`."
        )
