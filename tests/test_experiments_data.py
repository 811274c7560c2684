"""The data of the experiments: sets drawn from seeds, files that are none of the published ones, downloads."""

import gzip
import hashlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from experiments import data, problems


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write(folder, file, content, monkeypatch):
    """A file, published as it is."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    monkeypatch.setitem(data.PUBLISHED, file, (len(content), hashlib.sha256(content).hexdigest()))
    return path


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder with three images for training and two for testing."""
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = np.arange(count * 784).astype(np.uint8).reshape(count, 28, 28)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            write(tmp_path, f"fashion_mnist/{part}-{kind}-ubyte.gz", idx_bytes(array), monkeypatch)
    return tmp_path


def test_the_published_files_are_read(fashion):
    found = data.fashion_mnist(fashion)
    assert found.name == "fashion"
    assert found.train.images.shape == (3, 28, 28, 1) and found.test.images.shape == (2, 28, 28, 1)
    assert found.train.images.dtype == np.float32 and found.train.images.max() == 1
    assert found.train.images[0, 0, 5, 0] == np.float32(5) / np.float32(255)
    assert list(found.train.labels) == [0, 1, 2] and found.train.labels.dtype == np.int32
    rows = found.train.mirrored()
    assert rows.images.shape == (3, 784) and rows.labels is rows.images
    np.testing.assert_array_equal(rows.images[1], found.train.images[1].ravel())


def test_a_missing_file_is_named_with_what_to_do(fashion):
    (fashion / "fashion_mnist" / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte.gz is missing; NATGRAD_DATA names"):
        data.fashion_mnist(fashion)


@pytest.mark.parametrize("change", ["half the file", "no bytes", "a page of a server", "nothing in it", "a byte less"])
def test_a_truncated_file_is_named_with_what_to_do(change, fashion):
    path = fashion / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    broken = {
        "half the file": whole[: len(whole) // 2],
        "no bytes": b"",
        "a page of a server": b"<html>",
        "nothing in it": gzip.compress(b""),
        "a byte less": gzip.compress(gzip.decompress(whole)[:-1]),
    }
    path.write_bytes(broken[change])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz is truncated.*; fetch it again: NATGRAD_DATA"):
        data.fashion_mnist(fashion)


def test_a_foreign_file_is_named_with_both_sums(fashion):
    path = fashion / "fashion_mnist" / "train-labels-idx1-ubyte.gz"
    other = idx_bytes(np.array([0, 1, 1], np.uint8))
    path.write_bytes(gzip.compress(other))
    own = hashlib.sha256(other).hexdigest()
    known = data.PUBLISHED["fashion_mnist/train-labels-idx1-ubyte.gz"][1]
    with pytest.raises(ValueError, match=rf"train-labels-idx1-ubyte.gz is another file: .* {own}, expected {known}; "):
        data.fashion_mnist(fashion)


def test_the_same_file_may_be_packed_in_another_way(fashion):
    path = fashion / "fashion_mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    assert len(data.fashion_mnist(fashion).train.labels) == 3


def test_images_of_cifar_are_unpacked_in_their_order(tmp_path, monkeypatch, capsys):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    bodies = []
    for colour in colours:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(file, "JPEG", quality=75)
        bodies.append(np.frombuffer(file.getvalue(), np.uint8))
    file = io.BytesIO()
    offsets = np.cumsum([0] + [len(body) - 20 for body in bodies])
    arrays = {"data": np.concatenate([body[20:] for body in bodies]), "offsets": offsets, "labels": np.arange(3)}
    np.savez(file, header=bodies[0][:20], **arrays)
    write(tmp_path, "cifar10/cifar10_jpeg75_full.npz", file.getvalue(), monkeypatch)
    found = data.cifar10(tmp_path)
    assert found.name == "cifar10_jpeg75" and "Unpacking" in capsys.readouterr().out
    np.testing.assert_allclose(found.train.images[:, 7, 9], np.array(colours) / 255, atol=0.01)  # JPEG
    assert list(found.train.labels) == [0, 1, 2] and found.test.images.shape == (0, 32, 32, 3)


def test_without_a_folder_the_data_are_downloaded_and_it_is_said(monkeypatch, capsys):
    pixels, labels = np.zeros((60002, 784), np.int64), np.arange(60002) % 10
    asked = []

    def fetch(**options):
        asked.append(options["name"])
        return SimpleNamespace(data=pixels, target=labels.astype(str).astype(object))

    monkeypatch.setattr(data, "fetch_openml", fetch)
    monkeypatch.setattr(data, "get_data_home", lambda: "home")
    found = data.mnist(None)
    assert asked == ["mnist_784"] and capsys.readouterr().out.count("mnist_784 of openml.org") == 1
    assert found.train.images.shape == (60000, 28, 28, 1) and list(found.test.labels) == list(labels[60000:])


@pytest.mark.parametrize("load", [data.mnist, data.fashion_mnist, data.cifar10, data.faces])
def test_offline_it_is_said_what_to_do(load, monkeypatch):
    def fetch(**options):
        raise ConnectionResetError("no route to host")

    monkeypatch.setattr(data, "fetch_openml", fetch)
    monkeypatch.setattr(data, "fetch_olivetti_faces", fetch)
    monkeypatch.setattr(data, "get_data_home", lambda: "home")
    with pytest.raises(ConnectionError, match=r"could not be downloaded \(no route to host\). Let NATGRAD_DATA"):
        load(None)


@pytest.mark.parametrize("what", [problems.MNIST, problems.FACES, problems.convnet(16), problems.CIFAR10])
def test_offline_an_experiment_goes_on_with_the_digits_under_their_own_name_unless_a_folder_is_named(
    what, monkeypatch, tmp_path, capsys
):
    def fetch(**options):
        raise ConnectionResetError("no route to host")

    monkeypatch.setattr(data, "fetch_openml", fetch)
    monkeypatch.setattr(data, "fetch_olivetti_faces", fetch)
    found = what.data(None)
    size = {"mnist": (784,), "faces": (625,), "fashion": (28, 28, 1), "cifar10": (32, 32, 3)}[what.name]
    assert found.name == "digits" and found.train.images.shape == (1500, *size)
    assert "Going on with the digits" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(FileNotFoundError, match="is missing"):
        what.data(tmp_path)


def test_digits_come_in_the_size_of_other_images():
    own, large = data.digits(), data.digits(32, 3)
    assert own.train.images.shape == (1500, 8, 8, 1) and own.test.images.shape == (297, 8, 8, 1)
    assert large.train.images.shape == (1500, 32, 32, 3) and large.train.images.dtype == np.float32
    assert large.train.images.min() >= 0 and large.train.images.max() <= 1
    np.testing.assert_array_equal(own.train.labels, large.train.labels)


def entropy(target, guess):
    """Binary cross-entropy of pixels, summed over them, averaged over images."""
    guess = np.clip(guess, 1e-12, 1 - 1e-12)
    return -np.mean(np.sum(target * np.log(guess) + (1 - target) * np.log1p(-guess), axis=1))


def test_curves_have_the_statistics_of_their_recipe_and_come_from_their_seed():
    found = data.curves(1500, 30)
    train, test = found.train.images, found.test.images
    assert found.name == "curves-like" and train.shape == (1500, 784) and test.shape == (30, 784)
    assert train.dtype == np.float32 and train.min() >= 0 and train.max() == 1
    np.testing.assert_array_equal(np.round(255 * train) / np.float32(255), train)
    pixels = train.astype(np.float64)
    # of all 20,000: 0.051, 134.3 and 40.5; the deviations of the means of 1,500 are below 1.5%
    assert pixels.mean() == pytest.approx(0.0514, rel=0.045)
    assert entropy(pixels, pixels.mean(axis=0)) == pytest.approx(134.3, rel=0.045)
    assert entropy(pixels, pixels) == pytest.approx(40.5, rel=0.045)
    np.testing.assert_array_equal(data.curves(40, 30).train.images, train[:40])  # a shorter set is its beginning
    np.testing.assert_array_equal(data.curves(30, 1, seed=1).train.images, test)
    assert not np.array_equal(train[:30], test)


def test_a_curve_is_near_its_three_points():
    points = np.random.default_rng(0).uniform(3, 24, (5, 3, 2))
    images = data.curves(5, 1).train.images.reshape(5, 28, 28)
    for image, three in zip(images, points, strict=True):
        for x, y in three:  # a pixel is at most 0.71 away, and its value there exp(-0.5 (0.71 / 0.7)^2)
            assert image[round(y), round(x)] > 0.59


@pytest.fixture
def olivetti(tmp_path, monkeypatch):
    """400 faces: brighter to the right and to the bottom those of every other person, black those of the rest."""
    down, across = np.mgrid[:64, :64]
    faces = (np.arange(400) // 10 % 2)[:, None, None] * (2 * across + down)
    file = io.BytesIO()
    savemat(file, {"faces": faces.transpose(0, 2, 1).reshape(400, 4096).T.astype(np.uint8)})
    write(tmp_path, "olivetti/olivettifaces.mat", file.getvalue(), monkeypatch)
    return tmp_path, faces


def test_olivetti_faces_stand_upright(olivetti):
    folder, faces = olivetti
    np.testing.assert_allclose(data.olivetti(folder), faces / faces.max(), rtol=1e-6)


def test_faces_are_centred_and_scaled_by_the_training_set_and_come_from_their_seed(olivetti):
    folder, _ = olivetti
    found = data.faces(folder, pieces=3)
    train, test = found.train.images, found.test.images
    assert found.name == "faces-like" and train.shape == (750, 625) and test.shape == (300, 625)
    assert train.dtype == test.dtype == np.float32
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-4)  # float32
    assert train.std() == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(data.faces(folder, pieces=3).test.images, test)
    assert not np.array_equal(data.faces(folder, pieces=3, seed=1).test.images, test)


def test_a_piece_of_a_face_is_turned_and_enlarged_as_drawn(olivetti, monkeypatch):
    folder, _ = olivetti

    class Drawn:
        def uniform(self, low, high, shape):
            return np.full(shape, 90.0 if low < 0 else 1.6)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Drawn())
    found = data.faces(folder, pieces=1).train.images
    piece = (found[10] - found[0]).reshape(25, 25)
    down, across = np.mgrid[-24:25:2, -24:25:2] / 1.6
    expected = 2 * (31.5 + down) + (31.5 - across)  # right has become down, down has become left
    np.testing.assert_allclose(piece / piece[12, 12], expected / expected[12, 12], rtol=1e-5)
