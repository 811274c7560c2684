"""What becomes of `curvature` in the wrappers of Optax, as `docs/wrappers.md` says; its recipes run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from optax import contrib

import natgrad_jax as ng

PAGE = (Path(__file__).parents[1] / "docs" / "wrappers.md").read_text()
PARAMS = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
GRADS = jax.tree.map(lambda leaf: 0.1 * leaf, PARAMS)
TOKEN = object()
MASK = {"a": True, "b": True}


def spy(seen):
    """A transformation that notes what it was given as `curvature`."""

    def update(updates, state, params=None, *, curvature=None, **extra):
        seen.append(curvature)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def always(count):
    del count
    return True


WRAPPERS = {
    "optax.chain": lambda tx: optax.chain(tx, optax.scale(-1.0)),
    "optax.named_chain": lambda tx: optax.named_chain(("ours", tx)),
    "optax.masked": lambda tx: optax.masked(tx, MASK),
    "optax.partition": lambda tx: optax.partition({"one": tx}, {"a": "one", "b": "one"}),
    "optax.inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(
        rate=1.0
    ),
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "optax.conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
    "optax.conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "optax.selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask={"a": False, "b": True}),
    "optax.with_extra_args_support": optax.with_extra_args_support,
    "optax.snapshot": lambda tx: optax.chain(tx, optax.snapshot("norm", optax.tree.norm)),
    "optax.monitor": lambda tx: optax.chain(
        tx, optax.monitor({"norm": lambda updates, *_, **__: optax.tree.norm(updates)})
    ),
    "optax.add_noise": lambda tx: optax.chain(tx, optax.add_noise(0.1, 0.5, 0)),
    "optax.add_decayed_weights": lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
    "optax.clip_by_global_norm": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "optax.adaptive_grad_clip": lambda tx: optax.chain(optax.adaptive_grad_clip(1.0), tx),
    "optax.apply_every": lambda tx: optax.chain(tx, optax.apply_every(2)),
    "optax.contrib.schedule_free": lambda tx: contrib.schedule_free(tx, 0.1),
    "optax.contrib.mechanize": contrib.mechanize,
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "optax.MultiSteps(...).gradient_transformation()": lambda tx: optax.chain(
        optax.MultiSteps(tx, 2).gradient_transformation()
    ),
    "optax.contrib.reduce_on_plateau": lambda tx: optax.chain(tx, contrib.reduce_on_plateau()),
    "optax.scale_by_backtracking_linesearch": lambda tx: optax.chain(tx, optax.scale_by_backtracking_linesearch(3)),
    "optax.scale_by_zoom_linesearch": lambda tx: optax.chain(tx, optax.scale_by_zoom_linesearch(3)),
    "optax.lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "optax.contrib.sam": lambda tx: contrib.sam(tx, optax.sgd(0.1)),
    "optax.contrib.split_real_and_imaginary": contrib.split_real_and_imaginary,
    "optax.flatten": optax.flatten,
}
NEEDED = {
    "optax.contrib.reduce_on_plateau": ("value",),
    "optax.scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "optax.scale_by_zoom_linesearch": ("value", "grad", "value_fn"),
}


def rows():
    """{wrapper: what the page says becomes of `curvature`}."""
    found = re.findall(r"^\| `(\S+)`(?: in a chain)? \| (\w+(?: \w+)?) \|", PAGE, re.MULTILINE)
    return dict(found)


def becomes(wrapper, around=lambda wrapper, tx: wrapper(tx), **given):
    """What becomes of the argument."""
    seen = []
    tx = around(wrapper, spy(seen))
    params = optax.LookaheadParams.init_synced(PARAMS) if wrapper is WRAPPERS["optax.lookahead"] else PARAMS

    def step(params):
        return tx.update(GRADS, tx.init(params), params, curvature=TOKEN, **given)

    try:
        jax.eval_shape(step, params)
    except TypeError as error:
        if "unexpected keyword argument 'curvature'" not in str(error):
            raise
        return "refused"
    assert seen
    return "passed on" if all(each is TOKEN for each in seen) else "dropped"


def test_the_page_has_every_wrapper_that_is_tried():
    assert len(WRAPPERS) >= 25 and set(rows()) == set(WRAPPERS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_becomes_of_the_curvature_is_what_the_page_says(name):
    def value_fn(params, curvature):
        assert curvature is TOKEN
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    every = {"value": jnp.ones(()), "grad": GRADS, "value_fn": value_fn}
    given = {key: every[key] for key in NEEDED.get(name, ())}
    assert becomes(WRAPPERS[name], **given) == rows()[name]


@pytest.mark.parametrize("name", [name for name, what in rows().items() if what in ("refused", "dropped")])
def test_what_refuses_or_drops_it_passes_it_on_where_it_is_wrapped(name):
    assert becomes(WRAPPERS[name], around=ng.wrapped) == "passed on"


def test_multi_steps_updates_what_it_wraps_at_every_micro_batch():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    tx = optax.MultiSteps(optax.GradientTransformation(lambda params: optax.EmptyState(), update), 2)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(4):
        _, state = step(GRADS, state, PARAMS)
    jax.effects_barrier()
    assert len(calls) == 4 and int(state.gradient_step) == 2


def test_nothing_is_held_after_a_call():
    seen = []
    tx = ng.wrapped(lambda inner: optax.chain(inner), spy(seen))
    state = tx.init(PARAMS)
    tx.update(GRADS, state, PARAMS, curvature=TOKEN)
    tx.update(GRADS, state, PARAMS)
    assert seen == [TOKEN, None]


def test_the_recipes_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    names = {}
    for block in blocks:
        exec(compile(block, "docs/wrappers.md", "exec"), names)


def test_a_clip_in_front_of_ief_has_no_effect_and_behind_it_has():
    model, x, y = nn.Dense(3), jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
    variables = model.init(jax.random.key(1), x)
    capture = ng.linen.capture(model, ng.losses.softmax_cross_entropy, labels="true")
    ief = ng.scale_by_tengrad(capture.layers(variables, x), damping=0.1, target="ief", refresh_every=1)
    clip = optax.clip_by_global_norm(1e-3)

    @jax.jit
    def norms(params):
        out = capture.value_and_grad({"params": params}, x, y)
        chains = (ief, optax.chain(clip, ief), optax.chain(ief, clip))
        updates = [tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0] for tx in chains]
        return [optax.tree.norm(each) for each in updates]

    plain, before, behind = norms(variables["params"])
    np.testing.assert_allclose(before, plain, rtol=1e-5)
    np.testing.assert_allclose(behind, 1e-3, rtol=1e-5)
