"""What a user gets wrong is a clear sentence, before any work: what was found, what was expected, what to do."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct
from methods_table import ALL_NAMES, NAMES, SETTINGS, direction, evaluate, measured, row, task

import natgrad_jax as ng

every_method = pytest.mark.parametrize("method", NAMES)
every_optimizer = pytest.mark.parametrize("method", ALL_NAMES)
KEY = jax.random.key(0)
X = jnp.ones((8, 5))
LABELS = jnp.zeros(8, jnp.int32)


def says(error, *words):
    """The call raises the error, and its sentence has these words in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(word) for word in words))


def watch(model=None, likelihood=ng.losses.softmax_cross_entropy, x=X, **settings):
    """A watched model and its variables."""
    model = nn.Dense(3) if model is None else model
    return ng.linen.capture(model, likelihood, **settings), model.init(KEY, x)


def no_work(monkeypatch):
    """From here on nothing can be compiled: an error must come while the call is traced."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled before the input was checked")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


# --- the likelihood and its labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["softmax", optax.softmax_cross_entropy, None])
def test_an_unknown_likelihood(likelihood):
    with says(TypeError, "`likelihood` is", "expected one of ng.losses.softmax_cross_entropy", "`objective`"):
        ng.linen.capture(nn.Dense(3), likelihood)


def test_a_model_that_is_no_module():
    with says(TypeError, "`model` is", "expected a flax.linen.Module instance"):
        ng.linen.capture(nn.Dense, ng.losses.squared_error)


def test_an_object_that_hides_a_module_and_a_model_of_nnx_are_told_what_to_pass():
    class Pretrained:
        module, params = nn.Dense(3), {}

    with says(TypeError, "`model` is Pretrained", "pass that, its `module`"):
        ng.linen.capture(Pretrained(), ng.losses.squared_error)
    with says(TypeError, "`model` is Linear", "`ng.nnx.capture`"):
        ng.linen.capture(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ng.losses.squared_error)


def test_unknown_labels():
    with says(ValueError, "`labels` is 'mc'", "expected one of 'sampled', 'exact', 'true', 'forward'"):
        watch(labels="mc")


@pytest.mark.parametrize("draws", [0, -1, 1.5, "2"])
def test_draws_that_are_no_positive_int(draws):
    with says(ValueError, "`draws` is", "expected a positive int"):
        watch(draws=draws)


def test_draws_where_nothing_is_drawn():
    with says(ValueError, "`draws` is 2", 'only `labels="sampled"` draws', "'exact'"):
        watch(labels="exact", draws=2)


@pytest.mark.parametrize("variance", [0, -1.0, float("nan")])
def test_a_variance_that_is_not_positive(variance):
    with says(ValueError, "`variance` is", "expected a positive number"):
        ng.losses.gaussian(variance)


def test_no_key_where_labels_are_sampled():
    capture, variables = watch()
    with says(ValueError, "`key` is None", "draws labels", "`key=jax.random.key"):
        capture.value_and_grad(variables, X, LABELS)


# --- batches ----------------------------------------------------------------------------------------------------------

TARGETS = {
    "integer labels of another batch": (ng.losses.softmax_cross_entropy, jnp.zeros(7, jnp.int32), "(7,)"),
    "one-hot of another width": (ng.losses.softmax_cross_entropy, jnp.zeros((8, 4)), "(8, 4)"),
    "labels as floats": (ng.losses.softmax_cross_entropy, jnp.zeros(8), "float32"),
    "one-hot as integers": (ng.losses.softmax_cross_entropy, jnp.zeros((8, 3), jnp.int32), "int32"),
    "a column for a matrix": (ng.losses.squared_error, jnp.zeros((8, 1)), "(8, 1)"),
    "a vector for a matrix": (ng.losses.squared_error, jnp.zeros(8), "(8,)"),
    "labels for bits": (ng.losses.sigmoid_binary_cross_entropy, LABELS, "(8,)"),
    "counts of another batch": (ng.losses.poisson, jnp.zeros((4, 3)), "(4, 3)"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_do_not_fit_the_outputs(case):
    likelihood, targets, found = TARGETS[case]
    capture, variables = watch(likelihood=likelihood)
    with says(ValueError, likelihood.name, "targets of shape", found, "do not fit outputs of shape (8, 3)"):
        capture.value_and_grad(variables, X, targets, key=KEY)


@pytest.mark.parametrize("weights", [jnp.ones(7), jnp.ones((8, 2)), jnp.ones((8, 3, 1))])
def test_weights_that_do_not_fit_the_outputs(weights):
    capture, variables = watch()
    with says(ValueError, f"`weights` of shape {weights.shape}", "(8, 3)", "expected"):
        capture.value_and_grad(variables, X, LABELS, key=KEY, weights=weights)


def test_variables_without_parameters():
    capture, variables = watch()
    for call in (
        lambda: capture.layers(variables["params"], X),
        lambda: capture.value_and_grad(variables["params"], X, LABELS, key=KEY),
    ):
        with says(ValueError, "`variables` has the collections ['bias', 'kernel']", 'no "params"', "`model.init`"):
            call()


@struct.dataclass
class Output:
    """Outputs of a model, which cannot be set."""

    logits: Any
    count: Any


def test_a_model_with_several_outputs_and_no_readout():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), x

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Output(nn.Dense(3)(x), jnp.arange(2))

    for model, words in ((Pair(), "tuple ((8, 3), (8, 5))"), (Named(), "Output(logits=(8, 3), count=(2,))")):
        capture, variables = watch(model)
        with says(TypeError, "likelihood reads", words, "expected one floating-point array", "`readout`"):
            capture.value_and_grad(variables, X, LABELS, key=KEY)


# --- models -----------------------------------------------------------------------------------------------------------


def test_integer_inputs_to_a_dense_layer_are_what_it_makes_of_them():
    capture, variables = watch()
    integers = jnp.arange(40).reshape(8, 5)
    assert list(capture.layers(variables, integers)) == ["Dense"]
    measure = jax.jit(lambda variables: capture.value_and_grad(variables, integers, LABELS, key=KEY).curvature())
    np.testing.assert_array_equal(measure(variables)["Dense"].inputs[0], np.asarray(integers, np.float32))


class Images(nn.Module):
    """A convolution with some options, and a dense layer."""

    options: dict

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (3, 3), name="conv", **self.options)(x)
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


OPTIONS = {
    "mask": {"mask": np.tril(np.ones((3, 3, 1, 2), np.float32))},
    "conv_general_dilated": {"conv_general_dilated": lambda x, kernel, *a, **k: _conv(x, jnp.tanh(kernel), *a, **k)},
}
WORDS = {"mask": "factor entry by entry", "conv_general_dilated": "goes through `tanh`"}
_conv = jax.lax.conv_general_dilated


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_a_convolution_that_cannot_be_handled_costs_the_layer_not_the_model(option):
    images = jnp.ones((8, 4, 4, 1))
    capture, variables = watch(Images(OPTIONS[option]), x=images)
    layers = capture.layers(variables, images)
    assert list(layers) == ["head"]
    notes = {layer.name: layer.note for layer in layers.rest}
    assert set(notes) == {"conv/kernel", "conv/bias"} and WORDS[option] in notes["conv/kernel"]
    assert notes["conv/kernel"] in str(layers)
    tx = ng.kfac(0.1, layers)

    def step(params):
        out = capture.value_and_grad({"params": params}, images, jnp.zeros(8, int), key=jax.random.key(0))
        return tx.update(out.grad, tx.init(params), params, curvature=out.curvature)[0]

    assert jax.tree.structure(jax.eval_shape(step, variables["params"])) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize("options", [{"padding": "same"}, {"conv_general_dilated": _conv}], ids=["same", "its own"])
def test_an_option_that_comes_to_the_same_product_costs_nothing(options):
    images = jnp.ones((8, 4, 4, 1))
    capture, variables = watch(Images(options), x=images)
    assert list(capture.layers(variables, images)) == ["conv", "head"]


def test_excluding_what_the_model_does_not_have():
    capture, variables = watch(nn.Sequential([nn.Dense(4), nn.Dense(3)]), exclude=["encoder"])
    with says(ValueError, "`exclude` names 'encoder'", "it has ['layers_0', 'layers_1']"):
        capture.layers(variables, X)


def test_a_model_without_a_known_layer_warns_and_lists_its_parameters():
    class Shift(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("shift", nn.initializers.zeros, x.shape[-1:])

    capture, variables = watch(Shift())
    with pytest.warns(UserWarning, match=r"Shift has no layer that natgrad_jax can watch.*: shift"):
        layers = capture.layers(variables, X)
    assert len(layers) == 0 and "shift" in str(layers)


@pytest.mark.filterwarnings("error")
def test_a_norm_by_itself_has_its_block_without_a_warning():
    capture, variables = watch(nn.LayerNorm())
    layers = capture.layers(variables, X)
    assert len(layers) == 0 and [layer.kind for layer in layers.rest] == ["norm"]


@pytest.mark.filterwarnings("error")
def test_a_model_with_a_known_layer_does_not_warn():
    capture, variables = watch(nn.Sequential([nn.LayerNorm(), nn.Dense(3)]))
    assert "layers_0/scale" in str(capture.layers(variables, X))


# --- settings ---------------------------------------------------------------------------------------------------------

NO_STRENGTH = [-1e-3, float("nan"), float("inf"), np.float32(-1), np.float64("nan"), np.int32(-2), jnp.float32(-1)]


@pytest.mark.parametrize("damping", NO_STRENGTH, ids=lambda value: f"{type(value).__name__} {value}")
@every_optimizer
def test_a_damping_that_is_negative_or_no_number(method, damping):
    for build in (row(method).scale_by, lambda layers, **settings: row(method).optimizer(0.1, layers, **settings)):
        with says(ValueError, f"`damping` is {damping}", "expected a finite number of at least 0"):
            build(task("mlp").layers, damping=damping)


@pytest.mark.parametrize("damping", ["0.1", None, [0.1], np.ones(2), True, {"value": 1}])
def test_a_damping_that_is_no_scalar(damping):
    with says(TypeError, "`damping` is", "expected a finite number of at least 0", "function of the step count"):
        ng.scale_by_kfac(task("mlp").layers, damping=damping)


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5, float("nan")])
@every_optimizer
def test_a_decay_that_is_no_weight(method, decay):
    with says(ValueError, f"`decay` is {decay}", "expected", "0", "below 1"):
        row(method).scale_by(task("mlp").layers, damping=0.1, decay=decay)


@pytest.mark.parametrize("name", ["statistics_every", "refresh_every", "rescale_every"])
@pytest.mark.parametrize("period", [0, -3, np.int64(0)])
def test_a_period_of_no_steps(name, period):
    with says(ValueError, f"`{name}` is {period}", "expected", "at least 1"):
        ng.scale_by_ekfac(task("mlp").layers, damping=0.1, **{name: period})


def test_a_misspelt_split():
    with says(ValueError, "`split` is 'Pi'", "expected one of 'pi', 'even', 'exact'"):
        ng.scale_by_kfac(task("mlp").layers, damping=0.1, split="Pi")


def test_a_misspelt_split_of_tkfac():
    with says(ValueError, "`split` is 'none'", "expected one of 'pi', 'even', 'mean_eigenvalue', 'exact'"):
        ng.tkfac(0.1, task("mlp").layers, split="none")


@pytest.mark.parametrize("optimizer", [ng.ekfac, ng.tekfac])
def test_a_misspelt_split_in_an_eigenbasis(optimizer):
    with says(ValueError, "`split` is 'Pi'", "expected one of 'exact', 'pi', 'even'"):
        optimizer(0.1, task("mlp").layers, split="Pi")


@pytest.mark.parametrize(
    ("optimizer", "choices"),
    [
        (ng.kfac, "'expand', 'reduce'"),
        (ng.ekfac, "'expand', 'reduce'"),
        (ng.tkfac, "'example', 'expand', 'reduce'"),
        (ng.tekfac, "'example', 'expand', 'reduce'"),
    ],
)
def test_a_misspelt_sharing(optimizer, choices):
    with says(ValueError, "`sharing` is 'positions'", f"expected one of {choices}"):
        optimizer(0.1, task("mlp").layers, sharing="positions")


@pytest.mark.parametrize("optimizer", [ng.ekfac, ng.tekfac])
def test_a_misspelt_refresh(optimizer):
    with says(ValueError, "`refresh` is 'QR'", "expected one of 'eigh', 'qr'"):
        optimizer(0.1, task("mlp").layers, refresh="QR")


def test_a_misspelt_damping_rule():
    with says(ValueError, "`damping_rule` is 'mean'", "expected one of 'mean_eigenvalue', 'scalar'"):
        ng.tekfac(0.1, task("mlp").layers, damping_rule="mean")


def test_a_misspelt_estimator():
    with says(ValueError, "`estimator` is 'batch'", "expected one of 'per_example', 'minibatch'"):
        ng.ekfac(0.1, task("mlp").layers, estimator="batch")


@pytest.mark.parametrize("layers", [{}, ["Dense_0"], "Dense_0", 0.1])
@every_optimizer
def test_layers_that_are_none(method, layers):
    with says(TypeError, "`layers` is", "expected", "`capture.layers(variables, x)`"):
        row(method).scale_by(layers, damping=0.1)


# --- states, gradients and evidence of another model ------------------------------------------------------------------


def other_params(**changes):
    """The parameters of the MLP with some leaves exchanged."""
    return {**task("mlp").variables["params"], **changes}


@every_optimizer
def test_layers_of_another_model(method, monkeypatch):
    no_work(monkeypatch)
    tx = direction(method)
    with says(ValueError, "Layer 'Dense_0", "'Dense_0/kernel'", "lacks", "it has ['kernel']", "this very model"):
        tx.init({"kernel": jnp.ones((2, 2))})
    with says(ValueError, "'Dense_1/kernel'", "(5, 4)", "expected (5, 5)", "this very model"):
        tx.init(other_params(Dense_1={"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)}))
    with says(ValueError, "do not have the parameters ['extra/scale']", "'Dense_0/kernel'", "this very model"):
        tx.init(other_params(extra={"scale": jnp.ones(3)}))


@pytest.mark.slow
@every_method
def test_gradients_of_another_model(method, monkeypatch):
    gradient, evidence = measured("mlp")
    state = direction(method).init(gradient)
    no_work(monkeypatch)
    with says(ValueError, "'Dense_2/kernel'", "lacks", "it has", "'Dense_0/bias'"):
        direction(method).update({k: v for k, v in gradient.items() if k != "Dense_2"}, state, curvature=evidence)


@every_method
def test_a_forgotten_curvature(method, monkeypatch):
    gradient, _ = measured("mlp")
    state = direction(method).init(gradient)
    no_work(monkeypatch)
    with says(ValueError, "`curvature` is missing", "curvature=out.curvature", "`capture.value_and_grad`"):
        direction(method).update(gradient, state, gradient)


def change(field, value):
    """The evidence of the MLP with one field of Dense_1 changed."""
    _, evidence = measured("mlp")
    return {**evidence, "Dense_1": evidence["Dense_1"]._replace(**{field: value})}


WRONG = {
    "inputs": ((jnp.ones((8, 4)),), ("inputs", "(8, 1, 5)", "expected 6")),
    "cotangents": ((jnp.ones((1, 8, 4)),), ("cotangents", "(1, 8, 1, 4)", "expected 5")),
    "gradient": ({"kernel": jnp.ones((1, 4, 5)), "bias": jnp.ones((1, 5))}, ("gradient", "(1, 4, 5)", "(5, 5)")),
}


@pytest.mark.parametrize("field", WRONG)
@every_method
def test_evidence_of_other_shapes(method, field):
    gradient, _ = measured("mlp")
    value, words = WRONG[field]
    with says(ValueError, "evidence for", "'Dense_1'", *words, "Capture the model"):
        direction(method).update(gradient, direction(method).init(gradient), curvature=change(field, value))


@pytest.mark.slow
def test_evidence_for_a_remaining_parameter_without_its_gradient():
    norm, tx = "BatchNorm_0/scale+bias", direction("kfac pi", "convnet")

    def step(params):
        out = evaluate(task("convnet"), params, 0)
        evidence = out.curvature()
        bad = {**evidence, norm: evidence[norm]._replace(gradient=None)}
        return tx.update(out.grad, tx.init(params), curvature=bad)

    with says(ValueError, f"{norm!r}", "`gradient` and `count`"):
        jax.eval_shape(step, task("convnet").params)


def test_evidence_without_cotangents_for_a_method_that_squares_gradients():
    gradient, evidence = measured("mlp")
    bare = {name: one._replace(gradient=None) for name, one in evidence.items()}
    tx = ng.scale_by_ekfac(task("mlp").layers, estimator="minibatch", **SETTINGS)
    with says(ValueError, "evidence for 'Dense_0'", "no `gradient`", "`capture.value_and_grad`"):
        tx.update(gradient, tx.init(gradient), curvature=bare)


@pytest.mark.slow
@pytest.mark.parametrize("found", ["the evaluation itself", 3.0, "evidence", [1, 2]], ids=str)
def test_a_curvature_that_is_none(found):
    gradient, _ = measured("mlp")
    problem, tx = task("mlp"), direction(NAMES[0])
    if found == "the evaluation itself":
        found = problem.capture.value_and_grad(problem.variables, problem.x[0], problem.y[0], key=KEY)
    with says(
        TypeError, f"`curvature` is of type {type(found).__name__}", "expected `out.curvature`", "{name: Evidence}"
    ):
        tx.update(gradient, tx.init(gradient), curvature=found)


# --- warm start -------------------------------------------------------------------------------------------------------


def test_a_warm_start_of_another_optimizer():
    params = task("mlp").variables["params"]
    with says(ValueError, "`state` of type", "no natural-gradient method", "`tx.init(params)`"):
        ng.warm_start(optax.adam(0.1), optax.adam(0.1).init(params), [measured("mlp")[1]], params)


def test_a_warm_start_from_evidence_alone_needs_parameters_only_for_what_stands_around():
    params, evidence = task("mlp").variables["params"], measured("mlp")[1]
    tx = direction(NAMES[0])
    assert ng.warm_start(tx, tx.init(params), [evidence]).metrics.statistics == 1
    masked = optax.masked(tx, jax.tree.map(lambda leaf: True, params))
    with pytest.raises((TypeError, ValueError)) as caught:
        ng.warm_start(masked, masked.init(params), [evidence])
    assert "pass `params`" in "".join(caught.value.__notes__)


REFUSED_BY_THE_MODEL = {
    "None": lambda capture, variables: (variables, None),
    "words": lambda capture, variables: (variables, "images"),
    "a generator": lambda capture, variables: (variables, (row for row in X)),
    "a batch of other features": lambda capture, variables: (variables, jnp.ones((8, 7))),
    "parameters of another model": lambda capture, variables: ({"params": {"head": variables["params"]}}, X),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_MODEL)
def test_what_the_model_itself_refuses_is_said_with_what_it_was_called_with(case):
    capture, variables = watch()
    variables, x = REFUSED_BY_THE_MODEL[case](capture, variables)
    with pytest.raises(Exception) as raised:
        capture.value_and_grad(variables, x, LABELS, key=KEY)
    with pytest.raises(type(raised.value)):
        capture.model.apply(variables, x)
    (note,) = (each for each in raised.value.__notes__ if "the model" in each)
    shown = f"float32[{','.join(map(str, x.shape))}]" if hasattr(x, "shape") else str(x)
    assert note.startswith(f"So says the model, called with ({shown}). Expected its own parameters")
