"""The data sets of the papers' experiments, one function each.

    mnist, fashion_mnist     60,000 + 10,000 images [28, 28, 1], ten classes
    cifar10                  50,000 + 10,000 images [32, 32, 3], ten classes; "cifar10_jpeg75" if a folder has them as
                             JPEG of quality 75, whose pixels are off by 6/255 in the mean
    digits                   1,500 + 297 images [8, 8, 1] of scikit-learn, or enlarged to the size of another set
    curves, faces            20,000 + 10,000 rows of 784 pixels, 10,000 + 4,000 of 625, in the manner of CURVES and
                             FACES: their figures compare with no published ones
    shakespeare              1.1 megabytes of his works

Pixels are float32 in [0, 1], but those of `faces` centred; labels are int32. Where data come from is never chosen
silently. What is not as published in the folder that NATGRAD_DATA names is an error. Without one scikit-learn downloads
them once, and says so; if that fails, `problems` say it and go on with the digits, under their own name.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import sha256
from http.client import HTTPException
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from rich import print as say
from scipy.io import loadmat
from scipy.ndimage import map_coordinates, zoom
from sklearn.datasets import fetch_olivetti_faces, fetch_openml, get_data_home, load_digits


class Part(NamedTuple):
    """Images [N, H, W, C], float32 in [0, 1], and their labels [N], int32."""

    images: Any
    labels: Any

    def first(self, count: int) -> "Part":
        """So many of them."""
        return Part(self.images[:count], self.labels[:count])

    def mirrored(self) -> "Part":
        """The images, flat, as inputs and as what is to come out."""
        rows = self.images.reshape(len(self.images), -1)
        return Part(rows, rows)


class Data(NamedTuple):
    """What is trained and tested on."""

    name: str
    train: Part
    test: Part


def batches(part: Any, size: int, seed: int, epoch: int) -> Iterator[Any]:
    """The batches of an epoch of arrays [N, ...], in an order of its own; what is left over is dropped."""
    order = np.random.default_rng((seed, epoch)).permutation(len(jax.tree.leaves(part)[0]))
    chosen = (order[first : first + size] for first in range(0, len(order) - size + 1, size))
    return (jax.tree.map(lambda array, rows=rows: array[rows], part) for rows in chosen)


def endless(part: Any, size: int, seed: int, moved: bool = False) -> Iterator[Any]:
    """The batches of one epoch after the other, moved if that is asked for, each `shifted_and_flipped`."""
    epochs = ((epoch, batches(part, size, seed, epoch)) for epoch in count())
    return chain.from_iterable(shifted_and_flipped(own, seed, epoch) if moved else own for epoch, own in epochs)


def shifted_and_flipped(stream: Iterable[Part], seed: int, epoch: int, by: int = 4) -> Iterator[Part]:
    """Random crops of images with a black margin, of their own size, every other one mirrored; new in each epoch."""
    rng = np.random.default_rng((seed, epoch, by))

    def moved(part: Part) -> Part:
        count, height, width, _ = part.images.shape
        corners = rng.integers(0, 2 * by + 1, (count, 2, 1))
        rows, columns = corners[:, 0] + np.arange(height), corners[:, 1] + np.arange(width)
        columns = np.where(rng.random((count, 1)) < 0.5, columns[:, ::-1], columns)
        padded = np.pad(part.images, ((0, 0), (by, by), (by, by), (0, 0)))
        return Part(padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]], part.labels)

    return map(moved, stream)


_SUMS = """
47040016 ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db mnist/train-images-idx3-ubyte.gz
60008 65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5 mnist/train-labels-idx1-ubyte.gz
7840016 0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7 mnist/t10k-images-idx3-ubyte.gz
10008 ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2 mnist/t10k-labels-idx1-ubyte.gz
47040016 c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888 fashion_mnist/train-images-idx3-ubyte.gz
60008 bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9 fashion_mnist/train-labels-idx1-ubyte.gz
7840016 5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b fashion_mnist/t10k-images-idx3-ubyte.gz
10008 0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34 fashion_mnist/t10k-labels-idx1-ubyte.gz
18069875 abc644b0495a94840fcd3aa46e1b80eda693eab05cf1c1681838faadd592946a cifar10/cifar10_jpeg75_full.npz
1432511 b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d olivetti/olivettifaces.mat
1115394 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed tinyshakespeare/input.txt
"""
PUBLISHED = {file: (int(size), known) for size, known, file in map(str.split, _SUMS.strip().splitlines())}
"""{file: (bytes, SHA-256)} of the content; of what a .gz holds, since the same file may be packed in several ways."""


def folder() -> Path | None:
    """The folder that NATGRAD_DATA names, if it names one."""
    return Path(named) if (named := os.environ.get("NATGRAD_DATA")) else None


def cifar10(given: Path | None) -> Data:
    """CIFAR-10: as JPEG of quality 75 from cifar10/ in a folder, or from openml.org."""
    if given is None:
        name, (pixels, labels) = "cifar10", _openml("CIFAR_10")
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    else:
        say("Unpacking the images of CIFAR-10 (JPEG of quality 75)")
        name, packed = "cifar10_jpeg75", np.load(io.BytesIO(content(given, "cifar10/cifar10_jpeg75_full.npz")))
        header, bodies, labels = packed["header"].tobytes(), packed["data"].tobytes(), packed["labels"]
        files = (io.BytesIO(header + bodies[start:end]) for start, end in pairwise(packed["offsets"]))
        images = np.stack([np.asarray(Image.open(file)) for file in files])
    return Data(name, _part(images[:50000], labels[:50000]), _part(images[50000:], labels[50000:]))


def digits(size: int = 8, channels: int = 1) -> Data:
    """The digits that scikit-learn brings along, enlarged to images [size, size, channels]."""
    found: Any = load_digits()
    images = np.clip(zoom(found.images / 16, (1, size / 8, size / 8), order=1), 0, 1).astype(np.float32)[..., None]
    images, labels = images.repeat(channels, axis=-1), found.target.astype(np.int32)
    return Data("digits", Part(images[:1500], labels[:1500]), Part(images[1500:], labels[1500:]))


def curves(train: int = 20_000, test: int = 10_000, seed: int = 0) -> Data:
    """Images of curves, in the manner of CURVES: called "curves-like"; rows of 28x28 pixels in 256 grey levels.

    Three points uniform in [3, 24]^2, the quadratic curve through them at 64 values of its parameter, and a pen that
    falls off as a Gaussian of deviation 0.7 pixels around the nearest of these. Those for testing have the next seed.
    """
    return Data("curves-like", *(Part(drawn, drawn) for drawn in (_drawn(train, seed), _drawn(test, seed + 1))))


def _drawn(count: int, seed: int) -> np.ndarray:
    t, grid = np.linspace(0, 1, 64), np.arange(28)
    basis = np.stack([2 * (t - 0.5) * (t - 1), -4 * t * (t - 1), 2 * t * (t - 0.5)])
    corners = np.random.default_rng(seed).uniform(3, 24, (count, 3, 2))
    pixels = np.empty((count, 784), np.float32)
    for image, (x, y) in zip(pixels, np.einsum("npc,pt->nct", corners, basis)[..., None], strict=True):
        nearest = ((y - grid) ** 2)[:, :, None] + ((x - grid) ** 2)[:, None, :]
        image[:] = np.round(255 * np.exp(-nearest.min(axis=0).ravel() / (2 * 0.7**2))) / 255
    return pixels


def faces(given: Path | None, pieces: int = 40, seed: int = 0) -> Data:
    """Pieces of the Olivetti faces, in the manner of FACES: called "faces-like"; rows of 25x25 pixels.

    `pieces` times a face is turned by an angle uniform in +-90 degrees and enlarged by a factor uniform in [1.4, 1.8];
    of the 49x49 pixels in the middle every other one is taken. Every pixel has zero mean over the training set, and all
    are divided by their standard deviation. The first 25 people are for training, the last 10 for testing.
    """
    rng, images = np.random.default_rng(seed), olivetti(given)
    angles = np.radians(rng.uniform(-90, 90, (len(images), pieces, 1, 1)))
    factors = rng.uniform(1.4, 1.8, angles.shape)
    found = np.empty((len(images), pieces * 625), np.float32)
    for row, image, angle, factor in zip(found, images, angles, factors, strict=True):
        down, across = np.mgrid[-24:25:2, -24:25:2][:, None] / factor
        turned = np.cos(angle) * down - np.sin(angle) * across, np.sin(angle) * down + np.cos(angle) * across
        row[:] = map_coordinates(image, 31.5 + np.stack(turned).reshape(2, -1), order=1)
    train, test = found[:250].reshape(-1, 625), found[300:].reshape(-1, 625)
    mean = train.mean(axis=0)
    scale = (train - mean).std()
    return Data("faces-like", *(Part(x, x) for x in ((train - mean) / scale, (test - mean) / scale)))


def olivetti(given: Path | None) -> np.ndarray:
    """The Olivetti faces [400, 64, 64], ten of each person in turn, from olivetti/ in a folder or by scikit-learn."""
    if given is None:
        return _fetched("the Olivetti faces", fetch_olivetti_faces).images
    pixels = loadmat(io.BytesIO(content(given, "olivetti/olivettifaces.mat")))["faces"]
    return (pixels.T.reshape(400, 64, 64).transpose(0, 2, 1) / np.float32(pixels.max())).astype(np.float32)


def shakespeare(given: Path | None) -> bytes:
    """The works of Shakespeare in ASCII, from tinyshakespeare/ in a folder."""
    if given is None:
        raise ValueError(f"Nothing downloads the text; {_REMEDY} tinyshakespeare/input.txt.")
    return content(given, "tinyshakespeare/input.txt")


_REMEDY = "NATGRAD_DATA names a folder with"


def content(given: Path, file: str) -> bytes:
    """What a file of the folder holds, unpacked, if it is what was published.

    A `FileNotFoundError` if there is no such file, a `ValueError` if it is truncated, damaged or another one.
    """
    path, again = given / file, f"fetch it again: {_REMEDY} the files as they were published."
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {_REMEDY} {file}; without one it is downloaded, if it can be.")
    found, (size, known) = path.read_bytes(), PUBLISHED[file]
    try:
        found = gzip.decompress(found) if path.suffix == ".gz" else found
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); {again}") from error
    if len(found) < size:
        raise ValueError(f"{path} is truncated: {len(found)} bytes of {size}; {again}")
    if (own := sha256(found).hexdigest()) != known:
        raise ValueError(f"{path} is another file: its SHA-256 is {own}, expected {known}; {again}")
    return found


def _idx(name: str, inside: str, online: str, given: Path | None) -> Data:
    """A data set in four files of the format IDX, or as openml.org has it; scikit-learn checks what it downloads."""
    if given is None:
        pixels, classes = _openml(online)
        pixels = pixels.reshape(-1, 28, 28, 1)
        return Data(name, _part(pixels[:60000], classes[:60000]), _part(pixels[60000:], classes[60000:]))
    parts = []
    for part in ("train", "t10k"):
        images, labels = (content(given, f"{inside}/{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
        parts.append(_part(pixels, np.frombuffer(labels, np.uint8, offset=8)))
    return Data(name, *parts)


mnist = partial(_idx, "mnist", "mnist", "mnist_784")
fashion_mnist = partial(_idx, "fashion", "fashion_mnist", "Fashion-MNIST")
"""Folder or None -> the images."""


def _part(pixels: np.ndarray, labels: np.ndarray) -> Part:
    return Part((pixels / np.float32(255)).astype(np.float32), labels.astype(np.int32))


def _openml(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, D] and labels [N] of openml.org, uint8."""
    options = {"name": name, "version": 1, "as_frame": False, "parser": "liac-arff"}  # the other one needs pandas
    found = _fetched(f"{name} of openml.org", fetch_openml, **options)
    return found.data.astype(np.uint8), found.target.astype(np.uint8)


def _fetched(what: str, fetch: Callable[..., Any], **options: Any) -> Any:
    say(f"Reading {what} from {get_data_home()}; if it is not there it is downloaded first, which takes minutes")
    try:
        return fetch(**options)
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"{what} could not be downloaded ({error}). Let {_REMEDY} the published files, or ask for the digits."
        ) from error
