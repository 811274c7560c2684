"""What the experiments train with: batches, crops, runs that go on, a net with batch norm."""

from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import natgrad_jax as ng
from experiments.data import Data, Part, batches, digits, endless, shifted_and_flipped
from experiments.nets import Block, Convnet, Perceptron, ResNet, autoencoder
from experiments.problems import CIFAR10, CURVES, FACES, MNIST, convnet
from experiments.running import Runner, Task


def part(count, size=32, channels=3):
    rng = np.random.default_rng(0)
    images = rng.random((count, size, size, channels), np.float32)
    return Part(images, np.arange(count, dtype=np.int32) % 10)


def test_an_epoch_shows_every_image_once_with_its_label_and_each_has_its_own_order():
    given = part(10, 2, 1)
    seen = [list(batches(given, 3, 0, epoch)) for epoch in (0, 0, 1)]
    assert [len(batch.labels) for batch in seen[0]] == [3, 3, 3]
    orders = [np.concatenate([batch.labels for batch in epoch]) for epoch in seen]
    assert len(set(orders[0])) == 9
    np.testing.assert_array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    for batch in seen[0]:
        np.testing.assert_array_equal(batch.images, given.images[batch.labels])
    alone = np.concatenate(list(batches(given.images, 3, 0, 0)))
    np.testing.assert_array_equal(alone, given.images[orders[0]])


def test_crops_are_pieces_of_the_image_with_its_margin_and_half_are_mirrored():
    given = part(200, 6, 2)
    (found,) = shifted_and_flipped([given], 0, 0, by=2)
    padded = np.pad(given.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    where = []
    for image, source in zip(found.images, padded, strict=True):
        hits = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            if np.array_equal(image[:, ::-1] if mirrored else image, source[row : row + 6, column : column + 6])
        ]
        assert len(hits) == 1
        where += hits
    assert {row for row, _, _ in where} == {column for _, column, _ in where} == set(range(5))
    assert 60 < sum(mirrored for _, _, mirrored in where) < 140  # 100, and 5.6 deviations
    (again,) = shifted_and_flipped([given], 0, 0, by=2)
    np.testing.assert_array_equal(found.images, again.images)
    (other,) = shifted_and_flipped([given], 0, 1, by=2)
    assert not np.array_equal(found.images, other.images)


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154)])  # He et al.: 0.27M, 0.46M
def test_a_resnet_has_the_parameters_of_the_paper(depth, count):
    variables = jax.eval_shape(ResNet(depth).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    with pytest.raises(ValueError, match=r"depth 21 has no three equal stages; expected 6 n \+ 2"):
        jax.eval_shape(ResNet(21).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.full
def test_the_shortcut_skips_pixels_and_adds_channels_of_zeros_on_both_sides():
    block, x = Block(8, 2), jnp.asarray(part(2, 6, 4).images)
    variables = block.init(jax.random.key(0), x, False)
    variables["params"] = jax.tree.map(jnp.zeros_like, variables["params"])  # nothing but the shortcut is left
    found = block.apply(variables, x, False)
    np.testing.assert_array_equal(found[..., 2:6], x[:, ::2, ::2])
    assert not np.any(found[..., :2]) and not np.any(found[..., 6:])


@pytest.mark.full
def test_a_classifier_is_measured_by_loss_and_accuracy():
    chosen, data = convnet(16)._replace(net=Convnet((4,), (2,))), digits()
    variables = chosen.net.init(jax.random.key(0), data.test.images[:1])
    found = chosen.measured(variables, data)
    logits = chosen.net.apply(variables, data.test.images)
    right = float(np.mean(np.argmax(logits, axis=-1) == data.test.labels))
    assert found["test_accuracy"] == pytest.approx(right, abs=1e-5)
    assert chosen.means(variables, data.test, size=100)[1] == pytest.approx(right, abs=1e-5)  # 297 images in pieces
    own = optax.softmax_cross_entropy_with_integer_labels(logits, data.test.labels).mean()
    assert found["test_loss"] == pytest.approx(float(own), abs=1e-4)  # float32, in another order


@pytest.mark.full
def test_several_steps_in_one_program_are_those_of_several_programs():
    net, given = Perceptron((3,), 10), part(12, 2, 1)
    task, ends = Task(net, ng.losses.softmax_cross_entropy, given.first(4)), []
    for labels, make in ((None, sgd), ("sampled", sgd), ("sampled", lambda numbers, layers: ng.kfac(0.1, layers))):
        for stretch in (1, 3):
            runner = Runner(make, {"rate": 0.1}, task, labels, stretch=stretch)
            losses, _ = runner.run(batches(given, 4, 0, 0))
            assert losses.shape == (3,) and runner.steps == 3
            ends.append(jax.tree.leaves(runner.variables))
    for one, other in ((ends[0], ends[1]), (ends[0], ends[2]), (ends[4], ends[5])):
        for leaf, same in zip(one, other, strict=True):
            np.testing.assert_allclose(leaf, same, rtol=1e-5, atol=1e-7)
    assert not np.allclose(ends[0][0], ends[4][0])


def test_a_run_is_measured_at_the_averages_that_its_optimizer_keeps():
    net, given = Perceptron((3,), 10), part(12, 2, 1)
    task = Task(net, ng.losses.softmax_cross_entropy, given.first(4))
    kept, plain = (Runner(make, {"rate": 0.1}, task, None) for make in (averaged_sgd, sgd))
    path = []
    for batch in batches(given, 4, 0, 0):
        kept.run([batch])
        plain.run([batch])
        path.append(jax.tree.map(np.array, plain.variables["params"]))
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *path)  # of the first 1 / (1 - 0.9) steps
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), kept.variables["params"], mean)


def averaged_sgd(numbers, layers):
    return ng.averaged(sgd(numbers, layers), 0.9)


def sgd(numbers, layers):
    return optax.sgd(numbers["rate"])


class Normed(nn.Module):
    """Dense layers with batch norm between them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3)(x.reshape(len(x), -1)[:, ::16])
        return nn.Dense(10)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


@pytest.mark.parametrize("labels", [None, "true"])
def test_batch_statistics_move_with_and_without_a_capture(labels):
    given = part(8)
    task = Task(Normed(), ng.losses.softmax_cross_entropy, given, {"train": True})
    runner = Runner(lambda numbers, layers: optax.sgd(numbers["rate"]), {"rate": 0.0}, task, labels)
    inputs = given.images.reshape(8, -1)[:, ::16] @ runner.variables["params"]["Dense_0"]["kernel"]
    runner.run([given, given])
    found = runner.variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], 0.75 * inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.25 + 0.75 * inputs.var(0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.full  # a minute of compilation
def test_a_run_with_batch_norm_updates_its_averages_and_goes_on_from_what_was_saved():
    chosen = CIFAR10._replace(net=ResNet(8, 2), batch=4)
    given = part(12)
    task = Task(chosen.net, ng.losses.softmax_cross_entropy, given.first(4), {"train": True})
    runner = Runner(lambda numbers, layers: ng.kfac(numbers["rate"], layers, damping=1.0), {"rate": 0.1}, task)
    before = jax.tree.map(np.array, runner.variables["batch_stats"])
    runner.run(islice(endless(given, 4, 0, True), 3))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, runner.variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    saved = [np.array(leaf) for leaf in jax.tree.leaves(runner.carry)]
    losses, _ = runner.run(islice(endless(given, 4, 0, True), 3, 6))
    runner.begin({"rate": 0.1})
    assert runner.restore(saved, 3)
    again, _ = runner.run(islice(endless(given, 4, 0, True), 3, 6))
    np.testing.assert_array_equal(losses, again)
    assert not runner.restore(saved[1:], 3)


@pytest.mark.full
def test_a_warm_start_fills_the_statistics_and_leaves_the_parameters():
    given = part(8, 8, 1)
    task = Task(Convnet((2,), (2,)), ng.losses.softmax_cross_entropy, given.first(4))
    runner = Runner(lambda numbers, layers: ng.kfac(numbers["rate"], layers, damping=1.0), {"rate": 0.1}, task)
    before = jax.tree.map(np.array, runner.carry)
    runner.warm(batches(given, 4, 0, 0))
    jax.tree.map(np.testing.assert_array_equal, before[0], runner.carry[0])
    assert not all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[1], runner.carry[1])), strict=True)
    )


@pytest.mark.parametrize(
    ("chosen", "pixels", "count"),
    [(MNIST, 784, 2_837_314), (CURVES, 784, 842_340), (FACES, 625, 7_537_655)],  # as counted in their code
)
def test_the_autoencoders_have_the_parameters_of_the_papers_and_their_start(chosen, pixels, count):
    shapes = jax.eval_shape(chosen.net.init, jax.random.key(0), jnp.zeros((1, pixels)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
    assert str(pixels) in chosen.title


@pytest.mark.full
@pytest.mark.parametrize("whole", [MNIST, FACES])
def test_an_autoencoder_is_linear_in_its_code_and_its_loss_is_summed_over_pixels(whole):
    chosen, x = whole._replace(net=autoencoder((6, 3))), np.random.default_rng(0).random((5, 7), np.float32)
    params = chosen.net.init(jax.random.key(0), x)["params"]
    y = x
    for index, active in enumerate((True, False, True, False)):
        layer = params[f"Dense_{index}"]
        bound = y.shape[-1] ** -0.5
        assert np.abs(layer["kernel"]).max() < bound and 0 < np.abs(layer["bias"]).max() < bound
        y = y @ layer["kernel"] + layer["bias"]
        y = np.maximum(y, 0) if active else y
    y = np.array(y)
    p = 1 / (1 + np.exp(-y))
    terms = 0.5 * (y - x) ** 2 if whole is FACES else -x * np.log(p) - (1 - x) * np.log(1 - p)
    found = chosen.measured({"params": params}, Data("", Part(x, x), Part(x[:1], x[:1])))
    assert found["losses"] == pytest.approx(np.mean(np.sum(terms, axis=1)), abs=1e-4)
    assert found["test_loss"] == pytest.approx(np.sum(terms[0]), abs=1e-4)
    assert chosen.means({"params": params}, Part(x, x), size=2)[0] == pytest.approx(found["losses"], abs=1e-4)
