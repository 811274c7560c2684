"""Every public keyword: explained, in the signature, checked in the user's own word; and what Optax injects."""

import doctest
import inspect
import sys
from functools import cache

import jax
import jax.numpy as jnp
import methods_table
import numpy as np
import optax
import pytest
from methods_table import task

import natgrad_jax as ng
from natgrad_jax.lift.state import due

NAMES = ("kfac", "ekfac", "tkfac", "tekfac", "tnt", "mbf", "shampoo", "soap", "tengrad", "kbfgs")
DIRECTIONS = tuple(f"scale_by_{name}" for name in NAMES if name != "kbfgs")
MAKERS = NAMES + DIRECTIONS
every_maker = pytest.mark.parametrize("name", MAKERS)
every_optimizer = pytest.mark.parametrize("name", NAMES)
LIFTED = {row.split()[0] for row in methods_table.LIFTED}


def of_the_keywords(names):
    """The methods that stand for all ways of lifting; all with `-m full`."""
    return [name if name in LIFTED else pytest.param(name, marks=pytest.mark.full) for name in names]


def keywords(name):
    return inspect.signature(getattr(ng, name)).parameters


def made(name, rate=0.1, **settings):
    """A direction or a complete optimizer for the small net."""
    layers = task("mlp").layers
    if name.startswith("scale_by_"):
        return getattr(ng, name)(layers, **{"damping": 0.1, **settings})
    return getattr(ng, name)(rate, layers, **settings)


# Documentation --------------------------------------------------------------------------------------------------------


@every_maker
def test_help_explains_every_keyword_and_starts_with_the_signature(name):
    function = getattr(ng, name)
    assert function.__name__ == name and function.__doc__.splitlines()[0].endswith((".", ","))
    arguments = function.__doc__.split("Args:\n")[1].split("\n\nReturns:")[0]
    explained = [
        line.split(":")[0].strip() for line in arguments.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    assert sorted(explained) == sorted(keywords(name))
    assert "see `scale_by" not in function.__doc__
    shown = str(inspect.signature(function))
    assert shown.count("\n") == len(keywords(name)) + 2 and "typing" not in shown and "ArrayLike" not in shown


@every_maker
def test_the_documentation_has_an_example_that_is_collected_and_run_as_a_doctest_of_its_module(name):
    module = sys.modules[getattr(ng, name).__module__]
    (found,) = (test for test in doctest.DocTestFinder().find(module) if test.name == f"{module.__name__}.{name}")
    assert len(found.examples) == 10


def test_what_methods_share_means_and_defaults_the_same_but_where_a_class_says_so():
    defaults = {}
    for name in NAMES:
        for keyword, parameter in keywords(name).items():
            defaults.setdefault(keyword, set()).add(str(parameter.default))
    for shared in ("weight_decay", "weight_decay_mask", "max_factor_dim", "block_size", "merge"):
        assert defaults[shared] == {"None"}
    assert defaults["kl_clip"] == {"0.001", "0.003", "0.01", "0.1"}
    assert defaults["momentum"] == {"0.9", "0.95"} and defaults["refresh_every"] == {"100", "10"}


# Refusals -------------------------------------------------------------------------------------------------------------

WRONG = {
    "learning_rate": (-0.1, float("nan"), "fast"),
    "momentum": (1.0, 1.5, -1.0, float("nan"), "heavy", True),
    "weight_decay": (-1.0, float("nan"), "some"),
    "weight_decay_mask": (True, jnp.ones(())),
    "damping": (-1.0, float("nan"), float("inf"), "much", None),
    "decay": (1.0, -0.1, float("nan"), "slow"),
    "scale_decay": (1.0, -0.1),
    "statistics_every": (0, 2.5, -1, "often", lambda count: 5, None),
    "refresh_every": (0, 2.5, -1, lambda count: 5),
    "rescale_every": (0, 2.5, lambda count: 5),
    "early_refresh": ("no", 1, None),
    "kept": ("no", 1, None),
    "max_factor_dim": (-1, 2.5, "wide", jnp.int32(4)),
    "rolling": ("yes", 1, None),
    "refresh_tolerance": (-0.1, 1.0, "much", jnp.float32(0.1)),
    "factor_dtype": ("int8", jnp.bfloat16, 16),
    "rank": (0, 1.5, -0.1, "some", True, jnp.int32(4)),
    "kl_clip": (-1.0, float("nan"), lambda count: 0.1),
    "split": ("pie", None, 1),
    "sharing": ("some", None),
    "estimator": ("guess",),
    "refresh": ("svd",),
    "damping_rule": ("none",),
    "statistics": ("loss",),
    "scale": ("batches",),
    "kernels": ("spatial",),
    "normalise": ("no",),
    "merge": (0, 1.5),
    "block_size": (0, 1.5, jnp.float32(4)),
    "exponent": (0.0, -1.0, jnp.float32(0.5)),
    "root": ("cholesky",),
    "accumulate": ("mean",),
    "coupled": ("yes",),
    "graft_to": ("sgd-m",),
    "graft_decay": (3.0, -0.1),
    "dense": ("fan",),
    "shared": (2,),
    "vectors": ("none",),
    "blocks": ("all",),
    "energy": (1.0, -0.1, jnp.float32(0.9)),
    "target": ("true",),
    "examples": (0, 1.5),
    "workspace": (1.5, 0),
    "spring_weight": (1.0, -0.1),
    "memory": (0, 2.5),
    "hessian_action": ("mean",),
    "second_damping": ("none",),
    "others": ("adam",),
}
NOT_WRONG = {("tkfac", "split", None), ("scale_by_tkfac", "split", None)}
REFUSED = [
    pytest.param(
        name,
        keyword,
        value,
        id=f"{name}-{keyword}-{value if isinstance(value, (str, int, float)) else type(value).__name__}",
    )
    for name in MAKERS
    for keyword in keywords(name)
    for value in WRONG.get(keyword, ())
    if (name, keyword, value if isinstance(value, (str, float, int, type(None))) else "") not in NOT_WRONG
]


def test_every_keyword_has_a_value_that_is_refused():
    known = {keyword for name in MAKERS for keyword in keywords(name)} - {"layers"}
    assert known == set(WRONG)


@pytest.mark.parametrize(("name", "keyword", "value"), REFUSED)
def test_a_wrong_value_is_refused_in_the_users_word(name, keyword, value):
    settings = {keyword: value} if keyword != "learning_rate" else {}
    with pytest.raises((TypeError, ValueError), match=rf"`{keyword}`") as caught:
        made(name, *([value] if keyword == "learning_rate" else []), **settings)
    assert "expected" in str(caught.value) or "static_args" in str(caught.value)


@every_maker
def test_the_defaults_and_what_is_near_the_bounds_are_taken(name):
    fine = {"momentum": 0.0, "decay": 0.0, "weight_decay": 0.0, "max_factor_dim": 0, "statistics_every": 1}
    made(name, **{keyword: value for keyword, value in fine.items() if keyword in keywords(name)})
    made(name, damping=lambda count: 0.1)
    made(name, damping=jnp.bfloat16(0.1))
    made(name, decay=np.float32(0.5))


def test_an_unknown_keyword_and_a_missing_one_are_refused():
    with pytest.raises(TypeError, match="dampin"):
        ng.kfac(0.1, task("mlp").layers, dampin=0.1)
    with pytest.raises(TypeError, match="damping"):
        ng.scale_by_kfac(task("mlp").layers)
    with pytest.raises(TypeError, match="momentum"):
        ng.scale_by_kfac(task("mlp").layers, damping=0.1, momentum=0.9)
    with pytest.raises(TypeError, match="`layers` is 3"):
        ng.kfac(0.1, 3)


# Injection ------------------------------------------------------------------------------------------------------------


@cache
def params(dtype="float32"):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), task("mlp true labels").variables["params"])


def stepped(tx, dtype="float32"):
    """One jitted step, state made under `jit` as well."""
    problem = task("mlp true labels")
    state = jax.jit(tx.init)(params(dtype))

    @jax.jit
    def step(state):
        out = problem.capture.value_and_grad({"params": params(dtype)}, problem.x[0].astype(dtype), problem.y[0])
        return tx.update(out.grad, state, params(dtype), curvature=out.curvature)

    return step(state)


def injected_and_plain(name):
    """The same optimizer with its numbers as arrays in its state, and as they are."""
    layers, make = task("mlp true labels").layers, getattr(ng, name)
    return optax.inject_hyperparams(make)(0.1, layers, damping=0.1), make(0.1, layers, damping=0.1)


@pytest.mark.slow
@every_optimizer
def test_every_method_is_injected_without_static_arguments(name):
    (updates, state), (expected, _) = (jax.eval_shape(lambda tx=tx: stepped(tx)) for tx in injected_and_plain(name))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), updates) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    assert "damping" in state.hyperparams and "max_factor_dim" not in state.hyperparams


@pytest.mark.parametrize("rate", [(), ("quadratic",), ("search",)])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "kbfgs"])
def test_a_rate_that_is_no_number_is_injected_where_what_goes_with_one_stays_as_it_is(name, rate):
    layers, make = task("mlp true labels").layers, getattr(ng, name)
    static = optax.inject_hyperparams(make, static_args=("damping", "kl_clip", "momentum"))
    found, expected = (
        jax.eval_shape(tx.init, params()) for tx in (static(*rate, layers=layers), make(*rate, layers=layers))
    )
    assert jax.tree.structure(found.inner_state) == jax.tree.structure(expected)
    with pytest.raises(ValueError, match=r"`kl_clip`.*static_args=\(\"damping\", \"kl_clip\", \"momentum\"\)"):
        jax.eval_shape(optax.inject_hyperparams(make)(*rate, layers=layers).init, params())


@pytest.mark.slow
@pytest.mark.parametrize("name", of_the_keywords(NAMES))
def test_a_step_with_injected_numbers_is_that_with_the_numbers(name):
    (updates, _), (expected, _) = map(stepped, injected_and_plain(name))
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("name", ["kfac", *(pytest.param(name, marks=pytest.mark.full) for name in ("soap", "kbfgs"))])
def test_settings_in_bfloat16_as_optax_makes_them_for_such_parameters_are_taken(name):
    tx = optax.inject_hyperparams(getattr(ng, name))(0.1, task("mlp true labels").layers, damping=0.1)
    updates, state = stepped(tx, "bfloat16")
    assert state.hyperparams["damping"].dtype == jnp.bfloat16
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_decay_that_bfloat16_would_round_to_one_is_injected_in_float32(dtype):
    tx = optax.inject_hyperparams(ng.shampoo, hyperparam_dtype=jnp.float32)(0.1)
    state = tx.init({"w": jnp.ones((3, 2), dtype)})
    assert state.hyperparams["graft_decay"] == np.float32(0.999)
    with pytest.raises(ValueError, match=r"`graft_decay` is 1\.0.*hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(ng.shampoo)(0.1).init({"w": jnp.ones((3, 2), "bfloat16")})


def test_periods_that_were_made_floats_stay_exact():
    assert [count for count in range(100_000, 100_401) if bool(due(jnp.int32(count), jnp.bfloat16(100)))] == [
        100_000,
        100_100,
        100_200,
        100_300,
        100_400,
    ]


@pytest.mark.parametrize(
    ("name", "keyword", "value"),
    [
        ("kfac", "max_factor_dim", 5),
        ("shampoo", "block_size", 4),
        ("shampoo", "merge", 4),
        ("shampoo", "exponent", 0.25),
        ("tengrad", "examples", 8),
        ("tengrad", "workspace", 10**6),
        ("tengrad", "energy", 0.9),
        ("kbfgs", "memory", 3),
    ],
)
def test_what_fixes_shapes_is_refused_as_an_array_with_the_remedy(name, keyword, value):
    tx = optax.inject_hyperparams(getattr(ng, name))(0.1, task("mlp true labels").layers, **{keyword: value})
    with pytest.raises(TypeError, match=rf"`{keyword}` is an array.*static_args='{keyword}'"):
        jax.jit(tx.init)(params())
    static = optax.inject_hyperparams(getattr(ng, name), static_args=keyword)
    jax.eval_shape(static(0.1, task("mlp true labels").layers, **{keyword: value}).init, params())


def test_a_mask_that_injection_takes_for_a_schedule_is_refused_with_the_remedy():
    def mask(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    settings = {"weight_decay": 0.1, "weight_decay_mask": mask}
    tx = optax.inject_hyperparams(ng.kfac)(0.1, task("mlp true labels").layers, **settings)
    with pytest.raises(TypeError, match=r"`weight_decay_mask`.*static_args='weight_decay_mask'"):
        tx.init(params())
    optax.inject_hyperparams(ng.kfac, static_args="weight_decay_mask")(
        0.1, task("mlp true labels").layers, **settings
    ).init(params())


# EKFAC's authors ------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["scale_by_ekfac", "scale_by_tekfac"])
def test_the_scale_alone_is_averaged_with_its_own_weight(name):
    problem = task("mlp")
    settings = {"damping": 0.1, "decay": 0.0, "statistics_every": 1, "refresh_every": 4, "rescale_every": 1}
    settings["early_refresh"] = False
    tx = getattr(ng, name)(problem.layers, scale_decay=0.75, **settings)
    same = getattr(ng, name)(problem.layers, **settings)
    state, other = tx.init(problem.variables["params"]), same.init(problem.variables["params"])
    weights = []

    @jax.jit
    def step(state, other, x, y, key):
        out = problem.capture.value_and_grad(problem.variables, x, y, key=key)
        evidence = out.curvature()
        return tuple(each.update(out.grad, old, curvature=evidence)[1] for each, old in ((tx, state), (same, other)))

    for t in range(3):
        state, other = step(state, other, problem.x[t], problem.y[t], jax.random.key(t))
        weights.append(float(state.operators["Dense_0"].value.scale.weight))
    np.testing.assert_allclose(weights, [0.25, 0.4375, 0.578125], rtol=1e-6)
    assert float(other.operators["Dense_0"].value.scale.weight) == 1.0
    ours, theirs = (jax.tree.leaves(each.statistics["Dense_0"]) for each in (state, other))
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two)
