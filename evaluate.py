"""Score exported models against real images, without torch.

    python evaluate.py                                     the newest of each, or the included one;
                                                           ddpm takes up to an hour on two cores
    python evaluate.py ddim gan --steps 10,20 --seeds 3    these, at several numbers of steps
    python evaluate.py ddim --guidance 1,1.5,2             at several strengths of guidance
    python evaluate.py ddim --steps 5 --solver ddim,dpm++  with both solvers
    python evaluate.py ddim --hold-out --guidance 1,2      to choose: not by the test images
    python evaluate.py ddim --data pictures/               of your own, a folder or an .npz
    python evaluate.py ddim --export-real real/            the real images, for other programs

infer_onnx.py generates the samples, the same number of each class.  They are compared with the test
images in the features of a classifier of the training images, pretrained/extractor.onnx.  Its
Frechet distance is called F-FID: compare it with the row "real images" of the same table, not with
a published FID.  A second extractor, of another architecture and seed, checks that the order of the
models does not depend on the first.  benchmarks/extractor.py trains both.

Choose settings and recipes by their scores with --hold-out, on a sixth of the training images, so
that the test images judge only the final choice.

For your own data, size, channels and background are those of the model, and samples have the class
frequencies of the training images.  Test images are those of a folder test (or val) beside --data
.../train, or of the .npz; else every sixth image, which training with --hold-out leaves out.

results.json goes to results/, and benchmarks/report.py adds its table, diagrams and pictures of
samples: they replace those of the same names.  Samples are cached in the folder cache/ of --output,
by model file, settings and seed: a stopped run resumes, and only new samples are generated.  Needs
the packages of infer_onnx.py; matplotlib for diagrams, scikit-learn too for --tsne, and
requirements.txt for --cas.

Exit codes: 0 done, 2 wrong flags or data, 3 wrong model file, 4 provider not available, 5 the run
failed, 130 Ctrl-C.
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import infer_onnx
from infer_onnx import InputError, ModelError, number, written_whole

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

NAMES = ("vae", "gan", "ddpm", "ddim", "ldm", "distill")
# Flags that --export-real, which scores nothing, has no use for.
OF_SCORES = (
    "num_samples", "seeds", "steps", "guidance", "guidance_interval", "solver", "shard", "tsne",
    "cas", "output", "extractors", "timing",
)  # fmt: skip
K = 5  # neighbours that make a radius, for precision, recall, density and coverage
QUERIES = 2000  # images whose nearest neighbours are looked for
DUPLICATE = 0.05  # a copy ratio below it: the image itself is there, scaled or compressed anew
LEAST_HELD_OUT = 100  # images that a limit of copy ratios is told from
FLOOR_PARTS = 30  # at most so many disjoint parts of the training images are scored for the floor
LEAST_PART = 1000  # samples, that F-FID is extrapolated from
SPLITS = 5  # F-FID of N samples is extrapolated from the parts of N, N / 2, ... N / 5 of them
LEAST_TEST = 20  # images to test, without which nothing is scored
FEW = 2000  # with fewer samples than this, a table marks its scores, as benchmarks/report.py says
CHUNK = 1000  # images in a file of the cache
BATCH = 100  # images generated at a time
TIMED_BATCHES = (1, 4, 16, 64, 100)
TIMED_REPEATS = 9  # at most, at each batch size
TIMED_SECONDS = 3.0  # of each setting: no repeat starts later
CAS_EPOCHS = 3
CARD_KEY = "extractor_card"  # where an extractor's .onnx file holds the JSON that describes it
CARD_FORMAT = 1
# Part of the key of cached samples.  Raise it whenever infer_onnx.sample gives other images for the
# same model, options, seed and index: other samplers, noise or rounding, or a new default.  Where
# the pictures in tests/golden have to be made anew, this has to be raised.
CACHE_VERSION = 3

# --- Data -----------------------------------------------------------------------------------------

# As in common.py: the folder of torchvision's download, the folder of Debian's package, and the
# SHA-256 of each decompressed file.
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_SETS = {
    "fashion-mnist": (
        "FashionMNIST",
        "/usr/share/datasets/fashion-mnist",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "mnist": (
        "MNIST",
        None,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "kmnist": ("KMNIST", None, None),
}


@dataclass
class RealImages:
    """A data set: training images and test images, which may be missing (None).

    Both are (uint8 images (N, C, H, W), labels int64 (N,)).
    """

    name: str
    class_names: list | None  # None of a named set: its extractor has them
    train: tuple
    test: tuple | None
    in_turn: bool  # whether samples are balanced over the classes: True for named sets

    def parts(self, hold_out=False):
        """What samples are compared with as training images and as test images.

        With hold_out, and where there are no test images, these are every sixth training image,
        which training with --hold-out leaves out.  Raises InputError for too few images.
        """
        train, test = self.train, self.test
        if hold_out or test is None:
            held_out = np.arange(len(train[1])) % 6 == 5
            train, test = ([array[part] for array in train] for part in (~held_out, held_out))
        if not self.in_turn and (len(test[1]) < LEAST_TEST or len(train[1]) <= K):
            counts = f"{len(train[1])} images to train and {len(test[1])} to test"
            right = f"scores need {LEAST_TEST} to test and {K + 1} to train"
            raise InputError(f"--data {self.name} has {counts}: {right}")
        return tuple(in_order(*part, self.in_turn) for part in (train, test))


def load_real(data, data_dir, image_shape=(1, 32, 32), background="white", skip_broken=False):
    """The RealImages of --data: a named set, a folder or an .npz.  Raises InputError.

    image_shape: (C, H, W) of the images;  the rest: as the flags of training.
    """
    name = named_set(data, data_dir)
    if skip_broken and (name or Path(data).is_file()):
        raise InputError(f"--skip-broken is for folders, and {data} is none: leave it out")
    if not name or image_shape != (1, 32, 32):
        try:
            from benchmarks import real  # here, so that a copy of this file alone can score
        except ImportError as error:
            reason = infer_onnx.one_line(error)
            raise InputError(f"--data {data} needs the folder benchmarks/: {reason}") from error
    if name:
        parts = [read_split(name, data_dir, train) for train in (True, False)]
        fit = framed if image_shape == (1, 32, 32) else lambda x: real.fit(x, image_shape)
        parts = [(fit(images), labels) for images, labels in parts]
        return RealImages(name, None, *parts, in_turn=True)
    *loaded, notes = real.load(Path(data), image_shape, background, skip_broken)
    found = RealImages(*loaded, in_turn=False)
    train, test = found.parts()
    whole = hashlib.sha256(test[0].tobytes() + test[1].tobytes()).hexdigest()
    found.name += f" {whole[:12]}"  # an extractor is of these images, whatever the folder
    kind = "of their own" if found.test else "every sixth, as training with --hold-out leaves out"
    print(*notes, f"{found.name}: {len(train[1]):,} training images, {len(test[1]):,} test images "
          f"({kind}), {len(found.class_names)} classes", sep="\n")  # fmt: skip
    return found


def named_set(data, data_dir):
    """The name of the set that --data means; None for a folder or .npz.  Raises InputError."""
    path = Path(data)
    if data in IDX_SETS and data_dir is None and path.is_dir():
        raise InputError(
            f"{data!r} is a named data set, and a folder here: write ./{data} for the folder, "
            f"set:{data} for the set"
        )
    if (name := data.removeprefix("set:")) in IDX_SETS:
        return name
    if path.is_dir() or (path.suffix.lower() == ".npz" and path.is_file()):
        if data_dir is not None:
            raise InputError(f"--data-dir is for named sets, and {data} is none: leave it out")
        return None
    named = ", ".join(IDX_SETS)
    raise InputError(f"no data set {data!r}: give one of {named}, a folder, or an .npz")


def framed(images):
    """uint8 (N, 1, 28, 28) -> (N, 1, 32, 32): padded with black."""
    return np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))


def read_split(name, data_dir, train):
    """The training or the test images of an IDX data set.

    Looked for in data_dir if it is given, else in data/ and in Debian's folder; nothing is
    downloaded.
    Returns uint8 (N, 1, 28, 28) and labels int64 (N,).  Raises InputError.
    """
    folder, debian, sums = IDX_SETS[name]
    places = [Path("data"), *([Path(debian)] if debian else [])]
    if data_dir:
        places = [Path(data_dir)]
    wanted = IDX_FILES[:2] if train else IDX_FILES[2:]
    folders = [path for place in places for path in (place / folder / "raw", place)]
    home = next((path for path in folders if any(path.glob(f"{wanted[0]}*"))), None)
    if home is None:
        command = "python ddim.py --train"
        if name != "fashion-mnist":
            command += f" --data {name}"
        raise InputError(
            f"no {wanted[0]} (or .gz) in {' and '.join(map(str, places))}: give the folder of the "
            f"IDX files with --data-dir; {command} downloads them to data/"
        )
    arrays = []
    for file_name in wanted:
        file = home / file_name
        packed = home / f"{file_name}.gz"
        sha256 = sums[IDX_FILES.index(file_name)] if sums else None
        arrays.append(read_idx(packed if packed.is_file() and not file.is_file() else file, sha256))
    images, labels = arrays
    if images.shape[1:] != (28, 28) or labels.shape != (len(images),) or not len(labels):
        raise InputError(f"{home}: {wanted[0]} are not 28x28 images with a label each")
    if labels.max() > 9:
        raise InputError(f"{home}: {wanted[1]} has more than ten classes")
    return images[:, None], labels.astype(np.int64)


def in_order(images, labels, in_turn):
    """Images and labels in an order whose first n images are like the whole, for any n.

    in_turn: one image of each class after the other, as long as there are any; else in the class
    frequencies of the whole.
    """
    rank = np.empty(len(labels))  # of an image among those of its class
    shuffled = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(labels))
    for y in np.unique(labels):
        members = shuffled[labels[shuffled] == y]
        rank[members] = np.arange(len(members)) + 0.5
        rank[members] /= 1 if in_turn else len(members)
    order = np.lexsort((labels, rank))
    return images[order], labels[order]


def read_idx(file, sha256):
    """The array in an IDX file of unsigned bytes, plain or .gz; InputError if it is corrupted."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(content, ">u4", content[3], offset=4).astype(int)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        message = f"{file} is not a whole IDX file ({infer_onnx.one_line(error)})"
        raise InputError(message) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise InputError(f"{file} is not the published file (its SHA-256 differs)")
    for name, (_, _, sums) in IDX_SETS.items():
        if not sha256 and found in (sums or ()):
            raise InputError(f"{file} is of {name}: right is --data {name}")
    return array


# --- Features -------------------------------------------------------------------------------------


def check_images(images, image_shape, limits):
    """Raise InputError unless images are uint8 (N, *image_shape) that use the range of real ones.

    limits: the lowest and the highest value of real images, mostly 0 and 255.  Whatever resembles
    them comes near both: values in 0..1 or -1..1 that were taken for bytes do not.
    """
    if images.dtype != np.uint8 or images.shape[1:] != image_shape:
        found = f"{images.dtype} {images.shape}"
        wanted = f"uint8 (N, {', '.join(map(str, image_shape))})"
        raise InputError(f"images are {found}, they must be {wanted}")
    low, high = images.min(), images.max()
    quarter = limits[0] + (limits[1] - limits[0] + 1) / 4
    if high < quarter or low > quarter:
        right = "{}..{}".format(*limits)
        raise InputError(f"images have the values {low}..{high}: a wrong range, it must be {right}")


def extract(session, images):
    """Features float32 (N, D), logits float32 (N, classes) of uint8 images, the border cut off."""
    parts = []
    for first in range(0, len(images), 250):
        x = images[first : first + 250, :, 2:-2, 2:-2].astype(np.float32) / 127.5 - 1
        try:
            parts.append(session.run(["features", "logits"], {"x": x}))
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            reason = infer_onnx.one_line(error)
            raise infer_onnx.RunError(f"the extractor failed: {reason}") from error
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def task(images, labels, classes):
    """The images and labels that an extractor learns, and is tested with.

    Where there is a single class, it learns how many quarter turns each image was given (Gidaris et
    al. 2018, arXiv:1803.07728).
    """
    if classes > 1:
        return images, labels
    turned = [np.rot90(images, quarters, axes=(2, 3)) for quarters in range(4)]
    return np.concatenate(turned), np.arange(4, dtype=np.int64).repeat(len(images))


def extractor_file(folder, name, which, image_shape=(1, 32, 32)):
    """extractor.onnx and extractor2.onnx (which: 1 or 2); of MNIST extractor_mnist.onnx, ...

    name: of RealImages;  of pets, in colour at 64x64: extractor_pets_3x64.onnx.
    """
    suffix = "" if name == "fashion-mnist" else f"_{name.split()[0]}"
    if image_shape != (1, 32, 32):
        suffix += f"_{image_shape[0]}x{image_shape[1]}"
    return folder / f"extractor{'' if which == 1 else which}{suffix}.onnx"


def load_extractor(path, data, test, threads, command=""):
    """(session, what results.json says of the file).

    data: the name of RealImages;  command: to train it with, for an error.
    Raises InputError unless it is an extractor of this data set that classifies the test images,
    (images, labels), as well as its card says.
    """
    command = command or f"python benchmarks/extractor.py --data {data}"
    remedy = f"{command} --output {shlex.quote(str(path.parent))} trains it"
    if not path.is_file():
        raise InputError(f"no extractor {path}: {remedy}")
    content = path.read_bytes()
    if not infer_onnx.has_seal(content):
        raise infer_onnx.ModelError(f"{path} is damaged, or no extractor: {remedy} again")
    session = infer_onnx.open_session(path, content, threads)
    try:
        card = json.loads(session.get_modelmeta().custom_metadata_map[CARD_KEY])
        if card["format"] != CARD_FORMAT or card["data"] != data:
            raise InputError(
                f"{path} is an extractor of {card['data']}, format {card['format']}, not of {data}"
            )
        said = card["accuracy"]
        images, labels = task(*test, len(card["class_names"]))
        accuracy = float((extract(session, images)[1].argmax(1) == labels).mean())
        if abs(accuracy - said) > 0.002:
            raise InputError(f"{path} has test accuracy {accuracy:.4f}, but says {said:.4f}")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not an extractor of benchmarks/extractor.py") from error
    sha256 = hashlib.sha256(content).hexdigest()
    return session, {**card, "file": path.name, "sha256": sha256, "accuracy": accuracy}


# --- Scores ---------------------------------------------------------------------------------------

# Features are float32 (N, D) of one extractor.


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """The squared Frechet distance of two Gaussians, Heusel et al. 2017 (arXiv:1706.08500) eq. (6).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).  The product has the same
    eigenvalues as the symmetric cov_a^(1/2) cov_b cov_a^(1/2), whose square roots are real: no
    general matrix root is needed.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def ffid_at_infinity(real, features):
    """F-FID extrapolated to N -> infinity, Chong & Forsyth 2020 (arXiv:1911.07023).

    A Frechet distance of N samples is too large by nearly a constant over N.  Its mean over the k
    parts of N / k samples, k = 1 ... SPLITS, lies near a line in k / N; this is where k is 0.

    real: moments of the real features;  features: (N, D), the classes in turn.
    """
    means = []
    for k in range(1, SPLITS + 1):
        size = len(features) // k
        parts = [features[i * size : (i + 1) * size] for i in range(k)]
        means.append(np.mean([frechet_distance(*real, *moments(part)) for part in parts]))
    return float(np.polyfit(range(1, SPLITS + 1), means, deg=1)[1])


def squared_distances(a, b):
    """float32 (len(a), len(b)) of the rows of a and b, by one matrix product."""
    products = a @ b.T
    products *= -2
    products += (a * a).sum(axis=1)[:, None]
    products += (b * b).sum(axis=1)
    return np.maximum(products, 0, out=products)


def in_blocks(rows, size=500):
    """Slices of at most `size` rows, so that their distances to all columns fit into memory."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def neighbour_radii(x, k=K):
    """The squared distance of each row to its k-th nearest other row: float32 (N,)."""
    radii = np.empty(len(x), np.float32)
    for rows in in_blocks(len(x)):
        squares = squared_distances(x[rows], x)
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def manifold_scores(real, real_radii, fake, k=K):
    """Precision, recall, density and coverage of fake (M, D) beside real (N, D).

    Each point has a ball that reaches to its k-th neighbour; real_radii: of neighbour_radii.
    Kynkaanniemi et al. 2019 (arXiv:1904.06991) eqs. (1), (2): precision is the fraction of fakes
    inside a real ball, recall that of reals inside a fake ball.  Naeem et al. 2020
    (arXiv:2002.09797): density is the mean number of real balls around a fake, over k; coverage the
    fraction of real balls with a fake inside.  As in the code of the latter, the edge is outside.
    """
    fake_radii = neighbour_radii(fake, k)
    balls = np.zeros(len(fake), np.int64)
    recalled = 0
    covered = 0
    for rows in in_blocks(len(real)):
        squares = squared_distances(real[rows], fake)
        inside = squares < real_radii[rows, None]
        balls += inside.sum(axis=0)
        covered += inside.any(axis=1).sum()
        recalled += (squares < fake_radii).any(axis=1).sum()
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(recalled / len(real)),
        "density": float(balls.mean() / k),
        "coverage": float(covered / len(real)),
    }


def class_scores(predicted, labels, classes=10):
    """Scores of the classes int (N,) that the extractor sees, beside the requested ones.

    label_accuracy and accuracy_by_class: fraction seen as requested; labels are None where no class
    was requested, and a class that was not has None.  histogram: fraction of each class.
    """
    scores = {"label_accuracy": None}
    if labels is not None:
        right = np.bincount(labels[predicted == labels], minlength=classes)
        requested = np.bincount(labels, minlength=classes)
        scores["label_accuracy"] = float((predicted == labels).mean())
        pairs = zip(right.tolist(), requested.tolist(), strict=True)
        scores["accuracy_by_class"] = [r / n if n else None for r, n in pairs]
    scores["histogram"] = (np.bincount(predicted, minlength=classes) / len(predicted)).tolist()
    return scores


def nearest(queries, references):
    """Squared distance to the nearest reference, float32 (N,), and its index, int64 (N,)."""
    squares = np.empty(len(queries), np.float32)
    indices = np.empty(len(queries), np.int64)
    for rows in in_blocks(len(queries)):
        block = squared_distances(queries[rows], references)
        indices[rows] = block.argmin(axis=1)
        squares[rows] = block.min(axis=1)
    return squares, indices


def coarse_pixels(images):
    """uint8 images (N, C, H, W) -> float32 (N, C * 196), brightness and contrast made equal.

    Means of blocks of pixels, 2 x 2 at 32x32, without the border, less their mean, scaled to length
    1: neither a little blur nor other grey levels move a copy far from its original.
    """
    edge = images.shape[-1] // 16
    inner = images[:, :, edge:-edge, edge:-edge].reshape(len(images), -1, 14, edge, 14, edge)
    x = inner.mean(axis=(3, 5), dtype=np.float32).reshape(len(images), -1)
    x -= x.mean(axis=1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


def moved(images):
    """Yield images (N, C, H, W) as they are, moved by a pixel to all eight sides, and mirrored.

    Eighteen arrays: the mirror image is moved, too.  The border is wide enough.
    """
    for x in (images, images[..., ::-1]):
        for shift in itertools.product((-1, 0, 1), repeat=2):
            yield np.roll(x, shift, axis=(2, 3))


def nearest_moved(images, references):
    """As nearest, of uint8 images (N, C, H, W): of those that `moved` gives the best counts.

    A copy does not hide by a step aside, or in a mirror.  references: of coarse_pixels.
    """
    found = [nearest(coarse_pixels(x), references) for x in moved(images)]
    squares, indices = (np.stack(arrays) for arrays in zip(*found, strict=True))
    best = squares.argmin(axis=0)[None]
    return tuple(np.take_along_axis(array, best, axis=0)[0] for array in (squares, indices))


def copy_ratios(images, train, test):
    """Distance to the nearest training image over that to the nearest test image: (N,).

    All training images are searched, since a copy of one that was left out would be missed.  They
    are more than the test images, so the ratio of a new image is below 1: compare it with the ratio
    of real images that are in neither set.  Arguments as in nearest_moved.
    """
    squares = [nearest_moved(images, references)[0] for references in (train, test)]
    return np.sqrt(squares[0] / np.maximum(squares[1], 1e-6))


@dataclass
class Reference:
    """The real images and what is computed of them once; samples are compared with it."""

    sessions: list  # of the extractors, the first one first
    features: list  # of the test images, for each extractor
    radii: np.ndarray  # of the first extractor's features
    train: np.ndarray  # coarse pixels of all training images
    held_out: np.ndarray  # uint8 (N, C, H, W), a fifth of the test images
    others: np.ndarray  # coarse pixels of the other test images
    ratios: np.ndarray | None  # copy ratios of the held-out images
    limit: float | None  # below: 1 % of held-out images, duplicates aside; None if they are few
    limits: tuple = (0, 255)  # the lowest and the highest value of the test images
    classes: int = 10


def make_reference(sessions, train, test, classes=10):
    """sessions: of the extractors;  train, test: uint8 images (N, C, H, W).

    train: None if copy_scores are not wanted.
    """
    count = min(QUERIES, len(test) // 5)
    held_out = test[:count]
    coarse = others = ratios = limit = None
    if train is not None:
        coarse, others = coarse_pixels(train), coarse_pixels(test[count:])
        ratios = copy_ratios(held_out, coarse, others)
        new = ratios[ratios > DUPLICATE]
        if len(new) < count:
            found = f"{count - len(new)} of {count} test images are also training images, or nearly"
            print(f"{found}: they do not count where copies are told")
        limit = float(np.quantile(new, 0.01)) if len(new) >= LEAST_HELD_OUT else None
    features = [extract(session, test)[0] for session in sessions]
    radii = neighbour_radii(features[0])
    limits = (int(test.min()), int(test.max()))
    copies = (coarse, held_out, others, ratios, limit)
    return Reference(sessions, features, radii, *copies, limits, classes)


def score_images(reference, images, labels):
    """Every score of uint8 images (N, C, H, W) but those of copy_scores, a dict.

    labels: the requested classes, None if there are none.  Raises InputError.
    """
    check_images(images, reference.held_out.shape[1:], reference.limits)
    features, logits = extract(reference.sessions[0], images)
    real = reference.features[0]
    real_moments = moments(real)
    scores = {"ffid": frechet_distance(*real_moments, *moments(features))}
    if len(images) >= SPLITS * LEAST_PART:
        scores["ffid_infinity"] = ffid_at_infinity(real_moments, features)
    scores |= manifold_scores(real, reference.radii, features)
    predicted = logits.argmax(axis=1)
    if reference.classes == 1:  # the extractor knows no classes
        predicted, labels = np.zeros(len(images), int), None
    scores |= class_scores(predicted, labels, reference.classes)
    if len(reference.sessions) > 1:
        second, _ = extract(reference.sessions[1], images)
        scores["ffid2"] = frechet_distance(*moments(reference.features[1]), *moments(second))
    return scores


def copy_scores(reference, images):
    """The median copy ratio of uint8 images (N, C, H, W), and the fraction that look copied.

    The latter is None where the held-out images are too few to tell.
    """
    ratios = copy_ratios(images[:QUERIES], reference.train, reference.others)
    return told_copies(ratios, reference.limit)


def told_copies(ratios, limit):
    """The scores of copy_scores from copy ratios (N,);  limit: as in Reference."""
    copies = None if limit is None else float((ratios < limit).mean())
    return {"copy_ratio": float(np.median(ratios)), "copies": copies}


def summary(scores):
    """Scores of several seeds -> {name: {"mean", "spread", "values"}}; means alone of each class.

    The spread is the standard deviation over the seeds, None for a single seed.
    """
    result = {}
    for name in scores[0]:
        values = [s[name] for s in scores if name in s]
        if name in ("histogram", "accuracy_by_class"):  # the seeds request the same classes
            classes = zip(*values, strict=True)
            result[name] = [None if None in each else float(np.mean(each)) for each in classes]
        elif values[0] is not None:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            result[name] = {"mean": float(np.mean(values)), "spread": spread, "values": values}
    return result


# --- Samples --------------------------------------------------------------------------------------


@dataclass
class Setting:
    """A model and the options that it is sampled with: a row of the table."""

    name: str  # as on the command line
    path: Path
    model: infer_onnx.Model
    options: dict  # of diffusion models: steps, guidance; interval and solver if not the default
    cycle: tuple = tuple(range(10))  # of balanced_labels
    shown: np.ndarray | None = None  # the samples in pictures, the first of seed 0

    def evaluations(self):
        """Network evaluations per image."""
        return infer_onnx.evaluations(self.model.card, **self.options)

    def title(self):
        """Such as "ddim, steps 20, guidance 2, guidance interval 0:0.6, solver dpm++".

        The interval is named where it is not the model's default.  The solver is named where it is
        not ddim, whatever the default: a title means the same in old tables and in new ones.
        """
        options = dict(self.options)
        solver = options.pop("solver", self.model.card.get("solver", "ddim"))
        if solver != "ddim":
            options["solver"] = solver
        texts = [self.name]
        for key, value in options.items():
            numbers = value if isinstance(value, tuple) else (value,)
            shown = ":".join(f"{number}".removesuffix(".0") for number in numbers)
            texts.append(f"{key} {shown}".replace("_", " "))
        return ", ".join(texts)


def open_model(args, name):
    """The path of a model and the model; InputError, or ModelError for a file of no use."""
    try:
        path = infer_onnx.find_model(name)
    except ModelError as error:
        message = f"no model {name!r}: give one of {', '.join(NAMES)}, or an .onnx file"
        raise InputError(message) from error
    model = infer_onnx.load_model(path, args.provider, args.threads)
    for key in ("parameters", "training"):  # sampling needs neither, its row does
        if key not in model.card:
            raise ModelError(f"{path}: no {key} in its metadata")
    if "seconds" not in model.card["training"]:
        raise ModelError(f"{path}: no seconds of training in its metadata")
    return path, model


def reading_of(card):
    """How a model's training read its images: (image_shape, background)."""
    return tuple(card["image_shape"]), card["training"].get("background", "white")


def find_settings(args, class_names, image_shape=(1, 32, 32), background=None, cycle=range(10)):
    """The settings that the flags ask for; InputError, or ModelError for a file of no use.

    background: of the real images, None where they are not transparent;  the rest: as the real
    images have it and as in Setting.
    """
    settings = []
    for name in dict.fromkeys(args.models or NAMES):
        try:
            path, model = open_model(args, name)
        except InputError:
            if args.models:
                raise
            continue
        shape, behind = reading_of(model.card)
        names = model.card["class_names"]
        if shape != image_shape or names != class_names or behind != (background or behind):
            channels, size, _ = image_shape
            kind = f"{'grey' if channels == 1 else 'colour'} images of {size}x{size}"
            listed = f"{len(names)} classes ({', '.join(names[:5])}{', ...' * (len(names) > 5)})"
            message = f"{path} does not generate {kind} of the classes of {args.data}, "
            message += f"but {'x'.join(map(str, shape))} of {listed}, background {behind}"
            if args.models:
                raise InputError(f"{message}: see --data")
            print(f"left out: {message}")
            continue
        options = setting_options(args, name, model.card)
        settings += [Setting(name, path, model, option, tuple(cycle)) for option in options]
    if not settings:
        places = "runs/, pretrained/ or this folder"
        raise InputError(f"no model in {places}: make one with export.py, or give an .onnx file")
    return settings


def setting_options(args, name, card):
    """The options of each setting of a model; prints which flags it cannot follow."""
    if card["kind"] == "codes" or card.get("steps_fixed"):
        if args.steps or args.guidance or args.guidance_interval or args.solver:
            how = f"in {card['steps']} steps only" if "steps" in card else "in one evaluation"
            flags = "--steps, --guidance, --guidance-interval and --solver are ignored"
            print(f"{name} samples {how}: {flags}")
        return [{"steps": card["steps"]} if "steps" in card else {}]
    most = infer_onnx.steps_limit(card)
    if args.steps and max(args.steps) > most:
        excess = f"--steps {max(args.steps)} is more than the {most} timesteps of a walk"
        print(f"{name}: {excess}, {most} are used")
    steps = dict.fromkeys(min(count, most) for count in args.steps or [card["steps"]])
    guidances = args.guidance or [card["guidance"]]
    if args.guidance and card["guidance_fixed"]:
        guidances = [card["guidance"]]
        print(f"{name} supports only guidance {card['guidance']:g}: --guidance is ignored")
    if args.guidance_interval and max(guidances) <= 1:
        print(f"{name}: no guidance is above 1: --guidance-interval is ignored")
    usual = card.get("solver")  # ddpm has only one sampler
    solvers = args.solver or [usual]
    if usual is None and args.solver:
        solvers = [None]
        print(f"{name} has only one sampler: --solver is ignored")
    intervals = args.guidance_interval or [tuple(card["guidance_interval"])]
    found = []
    for solver, interval, guidance, count in itertools.product(
        solvers, intervals, guidances, steps
    ):
        options = {"steps": count, "guidance": guidance}
        if guidance > 1 and interval != tuple(card["guidance_interval"]):  # else it does not matter
            options["guidance_interval"] = interval
        if solver != usual:
            options["solver"] = solver
        if guidance > 1 and infer_onnx.evaluations(card, **options) == count:
            print(f"{name}, {count} steps: guidance {guidance:g} counts as 1: none is guided")
            options["guidance"] = 1.0
            options.pop("guidance_interval", None)
        if options not in found:
            found.append(options)
    return found


def balanced_labels(first, stop, cycle=range(10)):
    """Classes of the samples number first to stop - 1: those of the cycle, over and over.

    cycle: all classes in turn, or as often as the real images have them.
    """
    return [cycle[i % len(cycle)] for i in range(first, stop)]


def chunks(count):
    return [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]


def chunk_file(cache, setting, seed, first, stop):
    """Where samples first to stop - 1 of a seed are cached: a hash of all that they depend on."""
    key = {
        "version": CACHE_VERSION,
        "model": setting.model.sha256,
        "provider": setting.model.provider,
        "options": setting.options,
        "images": [seed, first, stop],
    }
    if setting.cycle != tuple(range(10)):
        key["labels"] = balanced_labels(first, stop, setting.cycle)
    return cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.npz"


def read_chunk(path, count, image_shape=(1, 32, 32)):
    """The images in a file of the cache; None if there is none, or it is corrupted."""
    try:
        with np.load(path) as file:
            images = file["x"]
    except Exception:  # numpy's readers fail on a corrupted file in many ways
        return None
    return images if images.shape == (count, *image_shape) and images.dtype == np.uint8 else None


def sample_chunk(cache, setting, seed, first, stop, bar):
    """uint8 images (stop - first, C, H, W): from the cache, or sampled and put there."""
    path = chunk_file(cache, setting, seed, first, stop)
    images = read_chunk(path, stop - first, setting.model.card["image_shape"])
    if images is not None:
        return images
    show(bar, f"{setting.title()}, seed {seed}")
    parts = []
    for start in range(first, stop, BATCH):
        labels = balanced_labels(start, min(start + BATCH, stop), setting.cycle)
        options = {"seed": seed, "first": start, **setting.options}
        parts.append(infer_onnx.sample(setting.model, labels, **options))
        if bar is not None:
            bar.update(len(labels) * setting.evaluations())
    images = np.concatenate(parts)
    with written_whole(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, x=images)
    return images


def sample_set(cache, setting, seed, count, bar):
    """uint8 images (count, C, H, W) of a seed, their classes as balanced_labels has them."""
    parts = [sample_chunk(cache, setting, seed, *chunk, bar) for chunk in chunks(count)]
    return np.concatenate(parts)


def missing(cache, parts):
    """Those parts of the samples, (setting, seed, first, stop), that have no file in the cache."""
    return [part for part in parts if not chunk_file(cache, *part).is_file()]


def sample_shard(cache, parts):
    """Only put these parts of the samples into the cache."""
    absent = missing(cache, parts)
    with sampling_bar(absent) as bar:
        for part in absent:
            sample_chunk(cache, *part, bar)
    print(f"{len(parts)} files of samples are in {cache}")
    print("add those of the other shards, then run the same command without --shard")


class WholeLines:
    """A stream for a progress bar where there is no terminal: each state is a line of its own."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if text := text.strip():
            self.stream.write(f"{text}\n")

    def flush(self):
        self.stream.flush()


def bar_options():
    """Options of a tqdm bar: it moves on a terminal; elsewhere a line comes every 30 seconds."""
    if sys.stderr.isatty():
        return {"mininterval": 0.5}
    return {"mininterval": 30, "file": WholeLines(sys.stderr)}


def sampling_bar(parts):
    """A progress bar of the network evaluations that these parts take; None without tqdm."""
    if tqdm is None:
        return contextlib.nullcontext()
    total = sum((stop - first) * setting.evaluations() for setting, _, first, stop in parts)
    return tqdm(total=total, unit=" evaluations", unit_scale=True, **bar_options())


def show(bar, text):
    """Say what is being done: on the bar, or on a line where there is none."""
    if bar is None:
        print(text, file=sys.stderr)
    else:
        bar.set_description(text, refresh=sys.stderr.isatty())


def latencies(settings):
    """Median ms per image, from labels to bytes, of each setting: {"batch": {size: ms}, "best"}.

    best: the size of the shortest time.  The settings take turns: what else the machine does slows
    all of them.
    """
    found = [{} for _ in settings]
    for batch in TIMED_BATCHES:
        measured = [[] for _ in settings]
        for setting in settings:
            warm_up = dict(setting.options)
            if warm_up and not setting.model.card.get("steps_fixed"):
                warm_up |= {"steps": 1, "guidance_interval": (0, 1)}  # guided if any step is
            infer_onnx.sample(setting.model, balanced_labels(0, batch, setting.cycle), **warm_up)
        end = time.perf_counter() + TIMED_SECONDS * len(settings)
        while not measured[0] or (len(measured[0]) < TIMED_REPEATS and time.perf_counter() < end):
            for setting, times in zip(settings, measured, strict=True):
                labels = balanced_labels(0, batch, setting.cycle)
                start = time.perf_counter()
                infer_onnx.sample(setting.model, labels, **setting.options)
                times.append(1e3 * (time.perf_counter() - start) / batch)
        for medians, times in zip(found, measured, strict=True):
            medians[str(batch)] = float(np.median(times))
    return [{"batch": medians, "best": min(medians, key=medians.get)} for medians in found]


# --- Command line ---------------------------------------------------------------------------------


def several(parse):
    """An argparse type: values with commas, each once."""
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",")))


def interval(text):
    """An argparse type: '0.25:0.8' -> (0.25, 0.8)."""
    low, _, high = text.partition(":")
    fraction = number(float, 0, 1)
    try:
        pair = fraction(low), fraction(high)
        infer_onnx.guided_times(pair, 1)
    except (argparse.ArgumentTypeError, InputError) as error:
        right = "LOW:HIGH with 0 <= LOW <= HIGH <= 1"
        raise argparse.ArgumentTypeError(f"{text!r} is not {right}") from error
    return pair


def solver(text):
    if text not in infer_onnx.SOLVERS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(infer_onnx.SOLVERS)}")
    return text


def build_parser():
    parser = infer_onnx.Parser(prog="evaluate.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("models", type=infer_onnx.path_text, nargs="*", metavar="MODEL",
        help=f"models to score: {', '.join(NAMES)}, another name of a file in pretrained/, such as "
             "distill2, or .onnx files (those of the first six that are found)")
    add("--num-samples", type=number(int, 20, 1_000_000),
        help="number of samples of each seed, 20 to 1,000,000; of named sets a multiple of 10 "
             "(10000; of your own data as many as test images, at most 10000)")
    add("--seeds", type=number(int, 1, 100), default=1,
        help="number of sampling seeds, 1 to 100; the spread over them is reported (1)")
    add("--steps", type=several(number(int, 1)), metavar="S,...",
        help="numbers of sampling steps of diffusion models, 1 to T (the model's default)")
    add("--guidance", type=several(number(float, 0, 1000)), metavar="W,...",
        help="guidance weights, 0 to 1000: 0 ignores the class, 1 is conditional, above 1 guided "
             "(the model's default)")
    add("--guidance-interval", type=several(interval), metavar="LOW:HIGH,...",
        help="guidance above 1 acts only at LOW T <= t < HIGH T, T the training timesteps "
             "(the model's default)")
    add("--solver", type=several(solver), metavar="NAME,...",
        help="samplers of ddim and ldm: ddim, dpm++ or both (the model's default)")
    add("--data", type=infer_onnx.path_text, default="fashion-mnist",
        help=f"the real images: {', '.join(IDX_SETS)}, a folder or .npz as for training "
             "(fashion-mnist)")
    add("--skip-broken", action="store_true",
        help="leave out pictures of a folder that cannot be read (off: they are refused)")
    add("--export-real", type=infer_onnx.output_path, metavar="FOLDER/",
        help="only write the test images, or with --hold-out the held-out ones, as PNGs in the "
             "model's size, for programs that compare two folders")
    add("--hold-out", action="store_true",
        help="compare with every sixth training image, which training with --hold-out leaves out, "
             "in place of the test images: to choose settings and recipes (off)")
    add("--data-dir", type=infer_onnx.path_text, metavar="FOLDER",
        help="folder of the real images' IDX files; nothing is downloaded "
             "(data/, else Debian's folder)")
    add("--output", type=infer_onnx.file_path, default=Path("results"), metavar="FOLDER",
        help="folder for scores, pictures and the cache of samples (results)")
    add("--provider", choices=("auto", "cuda", "cpu"), default="auto",
        help="where to run: auto is CUDA if it works, else CPU; cuda is CUDA or an error (auto)")
    add("--threads", type=number(int, 0, 1024), default=0,
        help="threads on the CPU, 0 to 1024; 0 is one per core (0)")
    add("--shard", type=infer_onnx.shard, metavar="I/N",
        help="only sample the I-th of N parts of the images, to share work between machines (all)")
    add("--no-timing", dest="timing", action="store_false",
        help="do not measure latency (default: measure it)")
    add("--tsne", action="store_true",
        help="plot t-SNE maps of real and generated features, too "
             "(needs scikit-learn and matplotlib)")
    add("--cas", action="store_true",
        help="also train a classifier on as many samples as there are training images and score "
             "it on the test images (needs requirements.txt)")
    add("--extractors", type=infer_onnx.file_path, metavar="FOLDER",
        default=Path(__file__).resolve().parent / "pretrained",
        help="folder of the extractors' .onnx files (pretrained/)")
    # fmt: on
    return parser


def processor():
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(threads, provider):
    """What results.json says of the machine."""
    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": threads,
        "provider": provider, "python": platform.python_version(),
        "numpy": np.__version__, "onnxruntime": infer_onnx.ort.__version__,
    }  # fmt: skip


def classifier_accuracy(train, test, classes):
    """CAS: the accuracy on test of the first extractor's architecture, trained on train."""
    from benchmarks.extractor import train_classifier  # needs torch

    return train_classifier(train, test, classes, 1, CAS_EPOCHS)[1]


def marked(n, reference):
    """Whether n samples are few, or not as many as test images: other tables do not compare."""
    return n < FEW or n != len(reference.features[0])


def score_floor(reference, train, test, accuracy, args, cycle=range(10)):
    """The scores of real images: of disjoint parts of the training images, num_samples images each.

    At most FLOOR_PARTS of them, each with its classes as often as the samples have them.  Label
    accuracy, copy ratio and copies are those of images that are not training images: of training
    images they say nothing.  accuracy: of the first extractor;  cycle: as in Setting.
    """
    images, labels = train
    n = min(args.num_samples, len(images))
    wanted = np.bincount(balanced_labels(0, n, cycle), minlength=reference.classes)
    parts = [slice(i * n, i * n + n) for i in range(min(len(images) // n, FLOOR_PARTS))]
    counts = [np.bincount(labels[part], minlength=reference.classes) for part in parts]
    off = [np.abs(count - wanted).sum() - reference.classes for count in counts]  # but for rounding
    parts = [part for part, images_off in zip(parts, off, strict=True) if images_off < 0.05 * n]
    known = accuracy if reference.classes > 1 else None  # of one class it is that of quarter turns
    others = {**told_copies(reference.ratios, reference.limit), "label_accuracy": known}
    scores = [{**score_images(reference, images[part], None), **others} for part in parts]
    if args.cas:
        scores[0]["cas"] = classifier_accuracy(train, test, reference.classes)
    row = {"title": "real images", "n": n, "marked": marked(n, reference), "seeds": len(parts)}
    return {**row, "scores": summary(scores)}


def is_without_class(setting):
    """Whether samples are of no class: at guidance 0, or of a student that learned from it."""
    learned = setting.model.card["training"].get("guidance")
    return setting.options.get("guidance", learned) == 0


def score_setting(setting, reference, sets, test, args):
    """A row of results.json.  sets: uint8 (N, C, H, W) of each seed, maybe more of the first."""
    n = args.num_samples
    labels = np.array(balanced_labels(0, len(sets[0]), setting.cycle))
    options, card = setting.options, setting.model.card
    unconditional = is_without_class(setting)
    requested = None if unconditional else labels[:n]
    try:
        scores = [
            {**score_images(reference, images[:n], requested), **copy_scores(reference, images[:n])}
            for images in sets
        ]
    except InputError as error:
        raise InputError(f"{setting.title()}: {error}") from error
    if args.cas and not unconditional:
        most = len(reference.train)
        samples = sets[0][:most], labels[:most]
        scores[0]["cas"] = classifier_accuracy(samples, test, reference.classes)
    parts = [setting.path.with_name(Path(part["file"]).name) for part in card["parts"].values()]
    return {
        "title": setting.title(),
        "model": setting.name,
        "file": setting.path.name,
        "sha256": setting.model.sha256,
        "steps": options.get("steps"),
        "guidance": options.get("guidance"),
        "guidance_interval": options.get("guidance_interval", card.get("guidance_interval")),
        "solver": options.get("solver", card.get("solver")),
        "n": n,
        "marked": marked(n, reference),
        "seeds": args.seeds,
        "scores": summary(scores),
        "evaluations": setting.evaluations(),
        "parameters": card["parameters"],
        "bytes": sum(file.stat().st_size for file in (setting.path, *parts)),
        "training_minutes": card["training"]["seconds"] / 60,
        "latency": None,
    }


def load_extractors(args, real, image_shape, background):
    """The first extractor, and the second if there is one, as load_extractor returns them."""
    files = [extractor_file(args.extractors, real.name, which, image_shape) for which in (1, 2)]
    if not files[1].is_file():
        print(f"no {files[1].name}: no second extractor checks the order of the models")
        files = files[:1]
    command = f"python benchmarks/extractor.py --data {shlex.quote(args.data)}"
    if args.data_dir is not None:
        command += f" --data-dir {shlex.quote(str(args.data_dir))}"
    command += f" --channels {image_shape[0]}" * (image_shape[0] != 1)
    command += f" --image-size {image_shape[1]}" * (image_shape[1] != 32)
    command += f" --background {background!r}" * (background != "white")
    command += " --skip-broken" * args.skip_broken
    test = real.parts()[1]
    return [load_extractor(file, real.name, test, args.threads, command) for file in files]


def check_packages(args):
    """Raise InputError if a flag needs what is not installed: now, and not after the work."""
    needs = {}
    if args.tsne:
        modules = ("sklearn.manifold", "matplotlib.figure", "benchmarks.report")
        needs["--tsne needs scikit-learn and matplotlib"] = modules
    if args.cas:
        needs["--cas needs the packages of requirements.txt"] = ("benchmarks.extractor",)
    for message, modules in needs.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"{message}: {infer_onnx.one_line(error)}") from error


def score_models(args):
    """Generate, score and picture the samples of every setting; scores are written at the end."""
    defaults = vars(build_parser().parse_args([]))
    if args.export_real and (given := [k for k in OF_SCORES if getattr(args, k) != defaults[k]]):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        flags = flags.replace("--timing", "--no-timing")
        raise InputError(f"--export-real only writes real images: leave out {flags}")
    if args.export_real and len(args.models) > 1:
        raise InputError("--export-real writes images as one model has them: name one at most")
    check_packages(args)
    is_named = named_set(args.data, args.data_dir) is not None
    if not (is_named or args.models):
        raise InputError(f"--data {args.data} needs the models to score, as in: evaluate.py ddim")
    image_shape, background = (1, 32, 32), "white"
    if args.models:
        image_shape, background = reading_of(open_model(args, args.models[0])[1].card)
    if is_named:  # their pictures are nowhere transparent
        background = "white"
    if is_named and (args.num_samples or 10) % 10:
        message = "is not a multiple of 10, the number of classes"
        raise InputError(f"--num-samples {args.num_samples} {message}")
    real = load_real(args.data, args.data_dir, image_shape, background, args.skip_broken)
    train, test = real.parts(args.hold_out)
    if args.export_real:
        return export_real(args.export_real, *test, real.class_names)
    extractors = load_extractors(args, real, image_shape, background)
    sessions, cards = zip(*extractors, strict=True)
    n = args.num_samples or (10_000 if is_named else min(10_000, len(test[1])))
    args.num_samples = n
    class_names = cards[0]["class_names"]
    if args.cas and len(class_names) == 1:
        raise InputError("--cas needs classes, and the data have one")
    behind = None if is_named else background
    cycle = range(10) if is_named else train[1].tolist()
    settings = find_settings(args, class_names, image_shape, behind, cycle)
    without = [setting.title() for setting in settings if is_without_class(setting)]
    if args.cas and without:
        said = f"guidance 0 ignores classes, which --cas needs: {', '.join(without)}"
        if len(without) == len(settings):
            raise InputError(said)
        print(f"no CAS where {said}")
    held_out = args.hold_out or real.test is None
    if held_out:
        for path, card in {setting.path: setting.model.card for setting in settings}.items():
            training = card["training"]
            if not training.get("hold_out"):
                said = "was not trained with --hold-out: it has seen what it is compared with"
                print(f"warning: {path} {said}")
            elif training.get("start"):
                print(f"note: {path} began with {training['start']}, which may have seen it")
    cache = args.output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for folder in (args.output, cache):  # or fail, before the work
        tempfile.TemporaryFile(dir=folder).close()
    sizes = [n] * args.seeds
    if args.cas:
        sizes[0] = max(n, len(train[0]))
    wanted = [(setting, seed, size) for setting in settings for seed, size in enumerate(sizes)]
    parts = [(setting, seed, *chunk) for setting, seed, size in wanted for chunk in chunks(size)]
    if args.shard:
        part, of = args.shard
        if len(parts) < of:
            most = f"there are {len(parts)} files of samples, and as many shards at most"
            raise InputError(f"--shard {part}/{of}: {most}")
        sample_shard(cache, parts[part - 1 :: of])
        return
    for where in dict.fromkeys(setting.model.where for setting in settings):
        print(f"running on {where}")
    print(f"{len(settings)} settings; real images are scored first", flush=True)
    reference = make_reference([*sessions], train[0], test[0], len(class_names))
    results = {
        "protocol": {
            "data": real.name, "hold_out": held_out, "k": K,
            "balanced": is_named, "has_test": real.test is not None,
            "block": image_shape[1] // 16, "reference": len(test[0]),
            "train": len(train[0]), "queries": len(reference.held_out),
            "others": len(reference.others), "copy_limit": reference.limit,
        },
        "extractors": [*cards],
        "machine": machine(args.threads, settings[0].model.provider),
        "floor": score_floor(reference, train, test, cards[0]["accuracy"], args, cycle),
        "rows": [],
    }  # fmt: skip
    with sampling_bar(missing(cache, parts)) as bar:
        for setting in settings:
            sets = [sample_set(cache, setting, seed, size, bar) for seed, size in enumerate(sizes)]
            show(bar, f"{setting.title()}, scoring")
            results["rows"].append(score_setting(setting, reference, sets, test, args))
            setting.shown = sets[0][: min(n, 1000)]
    if args.timing:
        print("measuring times", flush=True)
        for row, times in zip(results["rows"], latencies(settings), strict=True):
            row["latency"] = times
    write_results(args, results, settings, reference, train[0])


def export_real(folder, images, labels, class_names):
    """Write real images as PNGs, whose names have their classes."""
    infer_onnx.check_output(folder, [""], flag="--export-real")
    names = class_names or [str(y) for y in range(10)]
    infer_onnx.write_images(images, labels.tolist(), names, folder, 10, {"Software": "evaluate.py"})
    print(f"wrote {folder}: {len(images):,} real images")


def write_results(args, results, settings, reference, train):
    """results.json, and what benchmarks/report.py makes of it and of the samples.

    train: uint8 images (N, C, H, W).
    """
    folder = args.output
    file = folder / "results.json"
    content = (json.dumps(results, indent=1) + "\n").encode()
    unchanged = file.is_file() and file.read_bytes() == content
    with written_whole(file) as scratch:
        scratch.write_bytes(content)
    try:
        from benchmarks import report  # here, so that a copy of this file alone can score
    except ImportError as error:
        reason = infer_onnx.one_line(error)
        print(f"wrote {file}; table and pictures need the folder benchmarks/: {reason}")
        return
    report.write_text(report.table(results), folder / "table.md")
    class_names = results["extractors"][0]["class_names"]
    rows = {}
    for setting in settings:
        title, shown = setting.title(), setting.shown
        count = setting.evaluations()
        rows[f"{title}: {count} evaluation{'s' * (count != 1)}"] = shown[:10]
        copied = train[nearest_moved(shown[:20], reference.train)[1]]
        labels = np.array(balanced_labels(0, len(shown), setting.cycle))
        names = class_names
        if is_without_class(setting):
            labels, names = labels * 0, ["any class"]
        report.write_samples(folder, title, shown, copied, names, labels)
        if args.tsne:
            features = extract(reference.sessions[0], shown)[0]
            real = reference.features[0][: len(features)]
            report.write_tsne(folder, title, real, features, names, labels)
    report.write_side_by_side(folder / "side_by_side.png", rows)
    try:
        report.plot_results(results, folder)
    except ImportError:
        old = [folder / name for name in report.DIAGRAMS if (folder / name).is_file()]
        said = "no new diagrams"
        if old and not unchanged:
            for path in old:
                path.unlink()
            said = "old diagrams removed"
        print(f"{said}: pip install matplotlib, then python benchmarks/report.py {folder}")
    print(report.table(results))
    print(f"wrote {folder}: results.json, table.md and pictures")


def main(argv=None):
    stopped = "stopped; samples are cached: the same command resumes, unless it is --export-real"
    return infer_onnx.run_command(build_parser(), score_models, argv, stopped)


if __name__ == "__main__":
    sys.exit(main())
