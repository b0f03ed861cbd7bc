"""Score exported models against real images, without torch: results.json, a table and pictures in results/.

    python evaluate.py                                           the newest of each script in runs/, else as shipped
    python evaluate.py ddim gan --steps 10,20,50 --seeds 3       these, diffusion models at several numbers of steps
    python evaluate.py ddim --guidance 1,1.5,2                   at several strengths of guidance
    python evaluate.py ddim --solver ddim,dpm++ --steps 5,10     with both solvers
    python evaluate.py --train-extractor                         train again the two networks that judge

Samples are drawn by infer_onnx.py, the same number of each class, and compared with the test images in the features of
a classifier of the training images, pretrained/extractor.onnx. Its Frechet distance is called F-FID: it can be compared
with the row "real images" of the same table and with nothing else, no published FID. A second extractor, of another
architecture and seed, checks that the order of the models is not the first one's own.

A run replaces the table and the diagrams of the one before. Samples are kept in results/cache by what they depend on,
so that a run that was stopped goes on where it was, and only what is new is drawn. Needs tqdm besides infer_onnx.py's
packages; --tsne scikit-learn, --train-extractor and --cas torch.

Exit codes: 0 done, 2 wrong flags or data, 3 wrong model file, 4 provider not to be had, 5 the run failed, 130 Ctrl-C.
"""

import argparse
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import infer_onnx
from infer_onnx import InputError, written_whole

K = 5  # neighbours that make a radius, for precision, recall, density and coverage
QUERIES = 2000  # images whose nearest neighbours are looked for, pixel by pixel
FEW = 2000  # samples below which a table marks its scores
CHUNK, BATCH = 1000, 100  # images in a file of the cache, and drawn at a time
BATCHES, REPEATS, SECONDS = (
    (1, 4, 16, 64, 100),
    5,
    3.0,
)  # of the timing: so often, or so long, at each batch size
EPOCHS, SEEDS = (
    {1: 6, 2: 9},
    {1: 2, 2: 1},
)  # of the extractors: the second needs more passes to 93 %
CAS_EPOCHS = 3
CARD_KEY, CARD_FORMAT = "extractor_card", 1
NAMES = ("vae", "gan", "ddpm", "ddim", "ldm")
# Columns of the table: (name of the score, heading, format).
SCORES = (
    ("ffid", "F-FID", ".3g"), ("ffid2", "F-FID, second extractor", ".3g"), ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"), ("density", "density", ".3f"), ("coverage", "coverage", ".3f"),
    ("label_accuracy", "label accuracy", ".3f"), ("entropy", "class entropy", ".3f"),
    ("copy_ratio", "copy ratio", ".3f"), ("copies", "copies", ".3f"), ("cas", "CAS", ".3f"),
)  # fmt: skip

# --- Data -------------------------------------------------------------------------------------------------------

# name: (folder of torchvision's download, folder of Debian's package, SHA-256 of the decompressed files), as common.py
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


def load_split(name, data_dir, train):
    """The training or the test images of an IDX set: uint8 (N, 1, 32, 32), padded with black; labels int64 (N,).

    Looked for in data_dir alone if it is given, else in data/ and in Debian's folder; nothing is downloaded.  The order
    takes one image of each class in turn, so that any first part is balanced.  Raises InputError.
    """
    folder, debian, sums = IDX_SETS[name]
    places = [Path(data_dir)] if data_dir else [Path("data"), *([Path(debian)] if debian else [])]
    wanted = IDX_FILES[:2] if train else IDX_FILES[2:]
    folders = [path for place in places for path in (place / folder / "raw", place)]
    home = next((path for path in folders if any(path.glob(f"{wanted[0]}*"))), None)
    if home is None:
        where = " and ".join(map(str, places))
        raise InputError(
            f"no {wanted[0]} (or .gz) in {where}: name the folder of the IDX files with --data-dir"
        )
    files = [
        next((f for f in (home / w, home / f"{w}.gz") if f.is_file()), home / w) for w in wanted
    ]
    known = sums or (None,) * 4
    images, labels = (
        read_idx(f, known[IDX_FILES.index(w)]) for f, w in zip(files, wanted, strict=True)
    )
    if (
        images.shape[1:] != (28, 28)
        or labels.shape != images.shape[:1]
        or not len(labels)
        or labels.max() > 9
    ):
        raise InputError(
            f"{files[0]} and the labels beside it are not 28x28 images of ten classes, as many of both"
        )
    rank = np.empty(len(labels), np.int64)
    shuffled = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(labels))
    for y in range(10):
        members = shuffled[labels[shuffled] == y]
        rank[members] = np.arange(len(members))
    order = np.lexsort((labels, rank))
    return np.pad(images[order, None], ((0, 0), (0, 0), (2, 2), (2, 2))), labels[order].astype(
        np.int64
    )


def read_idx(file, sha256):
    """An IDX file of unsigned bytes (plain or .gz) as an array; InputError if it is broken or has another sum."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(content, ">u4", content[3], offset=4).astype(int)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(
            f"{file} is not a whole IDX file ({infer_onnx.one_line(error)})"
        ) from error
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{file} is not the published file (its SHA-256 differs)")
    return array


# --- Features ---------------------------------------------------------------------------------------------------


def check_images(images):
    """Raise InputError unless images are uint8 (N, 1, 32, 32) that use the range 0..255.

    The real sets reach 255 and have a background of 0; so does whatever resembles them.  Values of 0..1 or -1..1 that
    were taken for bytes do not.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (1, 32, 32):
        raise InputError(
            f"images are {images.dtype} {images.shape}, they must be uint8 (N, 1, 32, 32)"
        )
    if images.max() < 64 or images.min() > 64:
        raise InputError(
            f"images have the values {images.min()}..{images.max()}: a wrong range, it must be 0..255"
        )


def extract(session, images):
    """Features float32 (N, D) and logits float32 (N, 10) of uint8 images; the border of 2 pixels is cut off."""
    parts = []
    for first in range(0, len(images), 250):
        x = images[first : first + 250, :, 2:30, 2:30].astype(np.float32) / 127.5 - 1
        parts.append(session.run(["features", "logits"], {"x": x}))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def extractor_file(folder, data, number):
    """extractor.onnx, extractor2.onnx; of another data set extractor_mnist.onnx, ..."""
    return (
        folder
        / f"extractor{number if number > 1 else ''}{'' if data == 'fashion-mnist' else f'_{data}'}.onnx"
    )


def load_extractor(path, data, test, threads):
    """(session, features of the test images, what results.json says of the file).

    Raises InputError unless it is an extractor of this data set that classifies the test images as well as it says.
    """
    if not path.is_file():
        raise InputError(
            f"no extractor {path}: python evaluate.py --train-extractor --data {data} makes it"
        )
    content = infer_onnx.read_model(path)
    session = infer_onnx.open_session(path, content, threads)
    try:
        card = json.loads(session.get_modelmeta().custom_metadata_map[CARD_KEY])
        if card["format"] != CARD_FORMAT or card["data"] != data:
            raise InputError(f"{path} is an extractor of {card['data']}, format {card['format']}")
        features, logits = extract(session, test[0])
        accuracy = float((logits.argmax(1) == test[1]).mean())
        if abs(accuracy - card["accuracy"]) > 0.002:
            raise InputError(
                f"{path} classifies {accuracy:.4f} of the test images, but says {card['accuracy']:.4f}"
            )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not an extractor that evaluate.py wrote") from error
    sha256 = hashlib.sha256(content).hexdigest()
    return session, features, {**card, "file": path.name, "sha256": sha256, "accuracy": accuracy}


# --- Scores -----------------------------------------------------------------------------------------------------


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """The squared Frechet distance of two Gaussians, Heusel et al. 2017 (arXiv:1706.08500) eq. (6).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).  The product has the eigenvalues of the symmetric
    cov_a^(1/2) cov_b cov_a^(1/2), whose square roots are real: no general matrix root is needed.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    products = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    return float(
        ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.sqrt(products).sum()
    )


def squared_distances(a, b):
    """float32 (len(a), len(b)) of the rows of a and b, by one matrix product."""
    products = a @ b.T
    products *= -2
    products += (a * a).sum(axis=1)[:, None]
    products += (b * b).sum(axis=1)
    return np.maximum(products, 0, out=products)


def in_blocks(rows, size=500):
    """Slices of so many rows, so that distances to all columns fit into memory."""
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
    """Precision, recall, density and coverage of fake (M, D) beside real (N, D); real_radii: of neighbour_radii.

    Kynkaanniemi et al. 2019 (arXiv:1904.06991) eqs. (1), (2): the share of fakes inside the ball of a real image, which
    reaches to its k-th neighbour, and the share of reals inside the ball of a fake one.  Naeem et al. 2020
    (arXiv:2002.09797): the number of reals' balls around a fake over k, and the share of reals with a fake in their
    ball.  A point on the edge of a ball is outside, as in the code of the latter.
    """
    fake_radii = neighbour_radii(fake, k)
    balls, recalled, covered = np.zeros(len(fake), np.int64), 0, 0
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


def class_scores(predicted, labels):
    """Of classes int (N,) that the extractor sees: the share that was asked for (labels; None where no class was), of
    all and by class; the share of each class, and the entropy of these over its largest value: 1 is even, 0 a single
    class.
    """
    shares = np.bincount(predicted, minlength=10) / len(predicted)
    present = shares[shares > 0]
    asked = {"label_accuracy": None}
    if labels is not None:
        asked["label_accuracy"] = float((predicted == labels).mean())
        right, all_of = (
            np.bincount(of, minlength=10) for of in (labels[predicted == labels], labels)
        )
        asked["accuracy_by_class"] = (right / np.maximum(all_of, 1)).tolist()
    return {
        **asked,
        "entropy": float(-(present * np.log(present)).sum() / math.log(10)),
        "histogram": shares.tolist(),
    }


def as_pixels(images):
    """uint8 images (N, 1, 32, 32) -> float32 (N, 784) in [0, 1], without the border."""
    return images[:, 0, 2:30, 2:30].reshape(len(images), -1).astype(np.float32) / 255


def nearest(queries, references):
    """The squared distance to the nearest of the references, float32 (N,), and its index, int64 (N,)."""
    squares, indices = np.empty(len(queries), np.float32), np.empty(len(queries), np.int64)
    for rows in in_blocks(len(queries)):
        block = squared_distances(queries[rows], references)
        indices[rows] = block.argmin(axis=1)
        squares[rows] = block.min(axis=1)
    return squares, indices


def copy_ratios(queries, train, test):
    """For each query, the distance to the nearest training image over that to the nearest test image: (N,).

    All training images are asked, since a copy of one that was left out would not be found.  They are more than the
    test images, so the ratio of a new image is below 1: compare with the ratio of real images that are in neither.
    """
    return np.sqrt(nearest(queries, train)[0] / np.maximum(nearest(queries, test)[0], 1e-6))


@dataclass
class Reference:
    """The real images, and what is computed of them once: every set of samples is compared with it."""

    sessions: list  # of the extractors, the judge first
    features: list  # of the test images, for each extractor
    radii: np.ndarray  # of the judge's features
    train: np.ndarray  # pixels of all training images
    held_out: np.ndarray  # pixels of a fifth of the test images
    others: np.ndarray  # pixels of the rest
    limit: float  # one held-out image in a hundred has a lower copy ratio


def make_reference(extractors, train, test):
    """extractors: as load_extractor gives them;  train, test: (images, labels)."""
    pixels, count = as_pixels(test[0]), min(QUERIES, len(test[0]) // 5)
    held_out, others, train = pixels[:count], pixels[count:], as_pixels(train[0])
    sessions, features = [e[0] for e in extractors], [e[1] for e in extractors]
    limit = float(np.quantile(copy_ratios(held_out, train, others), 0.01))
    return Reference(
        sessions, features, neighbour_radii(features[0]), train, held_out, others, limit
    )


def score_images(reference, images, labels, queries=None):
    """Every score of uint8 images (N, 1, 32, 32), a dict.  labels: the classes asked for, None if none were;
    queries: pixels to look for among the training images, else those of the first images.  Raises InputError.
    """
    check_images(images)
    scores = {}
    for name, session, real in zip(
        ("ffid", "ffid2"), reference.sessions, reference.features, strict=False
    ):
        features, logits = extract(session, images)
        scores[name] = frechet_distance(*moments(real), *moments(features))
        if name == "ffid":
            scores |= manifold_scores(real, reference.radii, features)
            scores |= class_scores(logits.argmax(axis=1), labels)
    queries = as_pixels(images[:QUERIES]) if queries is None else queries
    ratios = copy_ratios(queries, reference.train, reference.others)
    return {
        **scores,
        "copy_ratio": float(np.median(ratios)),
        "copies": float((ratios < reference.limit).mean()),
    }


def summary(scores):
    """Scores of several seeds as {name: {"mean", "spread", "values"}}: the spread is their standard deviation, None of
    a single seed.  What is of ten classes is averaged.
    """
    result = {}
    for name in scores[0]:
        values = [s[name] for s in scores if name in s]
        if name in ("histogram", "accuracy_by_class"):
            result[name] = np.mean(values, axis=0).tolist()
        elif values[0] is not None:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            result[name] = {"mean": float(np.mean(values)), "spread": spread, "values": values}
    return result


# --- Samples ----------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """A model, and how it is drawn with."""

    name: str  # as it was asked for
    path: Path
    model: infer_onnx.Model
    options: dict  # of diffusion models: steps, guidance, and a solver or a limit other than the model's own

    def passes(self):
        """Evaluations of the network for an image."""
        return infer_onnx.evaluations(self.model.card, **self.options)

    def title(self):
        values = [
            f"{key} {value}".replace("_", " ").removesuffix(".0")
            for key, value in self.options.items()
        ]
        return ", ".join([self.name, *values])


def find_settings(args, class_names):
    """The settings that the flags ask for; raises InputError, or ModelError for a file that cannot be used."""
    settings = []
    for name in dict.fromkeys(args.models or NAMES):
        try:
            path = infer_onnx.find_model(name)
        except infer_onnx.ModelError as error:
            if args.models:
                raise InputError(
                    f"no model {name!r}: give one of {', '.join(NAMES)}, or an .onnx file"
                ) from error
            continue
        model = infer_onnx.load_model(path, args.provider, args.threads)
        card = model.card
        if card["image_shape"] != [1, 32, 32] or card["class_names"] != class_names:
            if not args.models:
                print(f"left out {path}: it does not draw the classes of {args.data}")
                continue
            raise InputError(
                f"{path} does not draw grey images of the classes of {args.data}: see --data"
            )
        if card["kind"] == "codes":
            settings.append(Setting(name, path, model, {}))
            continue
        most = len(card["alpha_bars"])
        if args.steps and max(args.steps) > most:
            print(
                f"{name}: --steps {max(args.steps)} is more than the {most} of the training, {most} are taken"
            )
        if args.guidance and card["guidance_fixed"]:
            print(f"{name} knows no other guidance than {card['guidance']:g}")
        guidances = (
            args.guidance if args.guidance and not card["guidance_fixed"] else [card["guidance"]]
        )
        steps = dict.fromkeys(min(s, most) for s in args.steps or [card["steps"]])
        solvers = args.solver if "solver" in infer_onnx.MODEL_FLAGS[card["model"]] else ["ddim"]
        if solvers != args.solver:
            print(f"{name} has a sampler of its own: --solver is not for it")
        limits = args.guidance_limit or [card["guidance_limit"]]
        for solver, limit, guidance, number in itertools.product(solvers, limits, guidances, steps):
            options = {"steps": number, "guidance": guidance}
            options |= (
                {"guidance_limit": limit}
                if guidance > 1 and limit != card["guidance_limit"]
                else {}
            )
            options |= {"solver": solver} if solver != "ddim" else {}
            setting = Setting(name, path, model, options)
            settings += (
                [setting] if setting not in settings else []
            )  # no limit matters up to guidance 1
    if not settings:
        raise InputError(
            "no model in runs/ or pretrained/: make one with export.py, or name an .onnx file"
        )
    return settings


def balanced_labels(first, stop):
    """Classes of the samples with these numbers, one after the other: any ten are all of them."""
    return [i % 10 for i in range(first, stop)]


def chunk_file(cache, setting, seed, first, stop):
    """Where these samples belong: a hash of all that they depend on, and of no name."""
    source = Path(infer_onnx.__file__).read_text()
    depends_on = {
        "model": setting.model.sha256,
        "provider": setting.model.session.get_providers()[0],
        "options": setting.options,
        "images": [seed, first, stop],
        "code": source[source.index("# --- Denoise") : source.index("# --- Images")],
    }
    return cache / f"{hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()}.npz"


def chunks(count):
    return [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]


def read_chunk(path, count):
    """The images in a file of the cache; None if there is none, or a broken one."""
    try:
        with np.load(path) as file:
            images = file["x"]
    except Exception:  # numpy's readers stumble over a broken file in many ways
        return None
    return images if images.shape == (count, 1, 32, 32) and images.dtype == np.uint8 else None


def draw_chunk(cache, setting, seed, first, stop, bar):
    """uint8 images (stop - first, 1, 32, 32): from the cache, or drawn and put there."""
    path = chunk_file(cache, setting, seed, first, stop)
    drawn = read_chunk(path, stop - first)
    if drawn is None:
        bar.set_description(f"{setting.title()}, seed {seed}", refresh=False)
        parts = []
        for start in range(first, stop, BATCH):
            labels = balanced_labels(start, min(start + BATCH, stop))
            parts.append(
                infer_onnx.sample(setting.model, labels, seed=seed, first=start, **setting.options)
            )
            bar.update(len(labels) * setting.passes())
        drawn = np.concatenate(parts)
        with written_whole(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, x=drawn)
    return drawn


def draw_samples(cache, setting, seed, count, bar):
    """uint8 images (count, 1, 32, 32) of a seed."""
    return np.concatenate(
        [draw_chunk(cache, setting, seed, *chunk, bar) for chunk in chunks(count)]
    )


def latency(setting):
    """Median milliseconds an image at each batch size, from labels to bytes: {"batch": {size: ms}, "best": size}."""
    times = {}
    for batch in BATCHES:
        labels, measured = balanced_labels(0, batch), []
        once = setting.options | ({"steps": 1, "guidance_limit": 1} if setting.options else {})
        infer_onnx.sample(
            setting.model, labels, **once
        )  # warms up, in a single step, guided if any is
        begun = time.perf_counter()
        while not measured or (len(measured) < REPEATS and time.perf_counter() - begun < SECONDS):
            start = time.perf_counter()
            infer_onnx.sample(setting.model, labels, **setting.options)
            measured.append(1e3 * (time.perf_counter() - start) / batch)
        times[str(batch)] = float(np.median(measured))
    return {"batch": times, "best": min(times, key=times.get)}


# --- Table ------------------------------------------------------------------------------------------------------


def score_cells(row, floor):
    """The name of a row, N, F-FID over the floor's, the mean of each score and, of several seeds, its spread."""
    cells = []
    for name, _, digits in SCORES:
        score = row["scores"].get(name)
        spread = f" ± {score['spread']:{digits}}" if score and score["spread"] else ""
        cells.append(f"{score['mean']:{digits}}{spread}" if score else "–")
    multiple = f"{row['scores']['ffid']['mean'] / floor['scores']['ffid']['mean']:.1f}"
    return [
        row["title"],
        f"{row['n']:,}{' (!)' if row['marked'] else ''}",
        str(row["seeds"]),
        multiple,
        *cells,
    ]


def cost_cells(row):
    """The name of a row, and what the model costs."""
    times = row["latency"]
    best = f"{times['batch'][times['best']]:.2f} ({times['best']})" if times else "–"
    one = f"{times['batch']['1']:.2f}" if times else "–"
    sizes = [
        f"{row['parameters']:,}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['training_minutes']:.0f}",
    ]
    return [row["title"], str(row["evaluations"]), one, best, *sizes]


def as_table(head, lines):
    """A Markdown table of cells that are text already."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n\n"


def disagreements(rows):
    """Pairs of rows that the two extractors put in opposite orders, the better one by the first extractor before."""
    pairs = []
    for pair in itertools.combinations(rows, 2):
        (a, a2), (b, b2) = (
            [row["scores"][name]["mean"] for name in ("ffid", "ffid2")] for row in pair
        )
        if (a - b) * (a2 - b2) < 0:
            pairs.append(" before ".join(row["title"] for row in (pair if a < b else pair[::-1])))
    return pairs


def table(results):
    """What results.json holds, as Markdown."""
    protocol, machine, rows = results["protocol"], results["machine"], results["rows"]
    text = f"# Samples against {protocol['reference']:,} test images of {protocol['data']}\n\n"
    head = ["model", "N", "seeds", "F-FID / floor", *(heading for _, heading, _ in SCORES)]
    text += as_table(
        head, [score_cells(row, results["floor"]) for row in (results["floor"], *rows)]
    )
    if len(results["extractors"]) > 1 and len(rows) > 1:
        pairs = disagreements(rows)
        said = f": by the first, {'; '.join(pairs)}" if pairs else ""
        text += f"The extractors disagree on the order of {len(pairs)} of {math.comb(len(rows), 2)} pairs{said}.\n\n"
    by_class = [
        (row, row["scores"]["accuracy_by_class"])
        for row in rows
        if "accuracy_by_class" in row["scores"]
    ]
    if by_class:
        text += "Label accuracy by class:\n\n"
        lines = [[row["title"], *(f"{share:.2f}" for share in shares)] for row, shares in by_class]
        text += as_table(["model", *results["extractors"][0]["class_names"]], lines)
    head = [
        "model",
        "network evaluations",
        "ms / image, batch 1",
        "ms / image, best batch (its size)",
    ]
    text += as_table(
        [*head, "parameters", "MB", "training minutes"], [cost_cells(row) for row in rows]
    )
    threads = f"{machine['cores']} cores, {machine['threads'] or 'as many'} threads"
    where = f"{machine['processor']}, {threads}, {machine['provider']}"
    text += f"On {where}, onnxruntime {machine['onnxruntime']}; times: medians, which move with the machine's load.\n\n"
    for number, card in enumerate(results["extractors"], 1):
        weak = " (!) below 93 %, too weak to judge" if card["accuracy"] < 0.93 else ""
        text += f"- Extractor {number}: {card['file']}, {card['architecture']}; test accuracy "
        text += f"{card['accuracy']:.2%}{weak}; SHA-256 `{card['sha256']}`.\n"
    return text + NOTES.format(few=FEW, **protocol)


NOTES = """\
- F-FID: Frechet distance in the first extractor's features of {data}. It is no FID and compares with none.
- ±: standard deviation over the seeds of the sampling; a smaller difference is none. The floor's seeds are disjoint
  parts of the training images.
- (!): fewer than {few:,} samples, or not as many as the {reference:,} test images. As N falls both F-FIDs grow,
  coverage falls, and the others move a little: compare within this table only, and with its floor.
- real images: as many training images scored in place of samples, the floor. Its label accuracy, copy ratio and copies
  are those of test images instead, since the extractor and the training images know the training images.
- Precision, recall, density, coverage: k = {k}, all against all.
- Label accuracy: the share that the extractor sees as the class asked for. Class entropy: of the classes it sees; 1 is
  an even mix.
- Copy ratio: of up to {queries:,} samples, the median pixel distance to the nearest of {train:,} training images over
  that to the nearest of {others:,} test images. Copies: the share with a ratio that only 1 % of real images go below.
  A ratio far below that of the real images, or a share far above 0.01, says that training images are reproduced.
- Network evaluations: a step takes two where it is guided, at t below the guidance limit, which is the model's unless
  it is named.
- CAS (Ravuri & Vinyals 2019, arXiv:1905.10887): accuracy on the test images of a network trained on {train:,} samples;
  beside it, that of the same network trained on the training images.
"""

# --- Pictures ---------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1030, 560, 70, 350, 40, 50
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#000000",
    "#bcbd22",
    "#17becf",
)
GREY = "#bbbbbb"


def ticks(low, high, log):
    """Round numbers from low to high: 1, 2 and 5 times powers of ten, or about five at equal steps."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = power * next(m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 6)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def axes(title, x_label, y_label, x_range, y_range, log=(False, False), names=None):
    """An empty diagram: (picture, its ImageDraw, place(x, y) -> pixel).  names: of x = 0, 1, ..."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(13)

    def share(value, limits, is_log):
        low, high, value = (math.log(v) if is_log else v for v in (*limits, value))
        return (value - low) / (high - low)

    def place(x, y):
        right, up = share(x, x_range, log[0]), share(y, y_range, log[1])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for x, name in enumerate(names) if names else ((x, f"{x:g}") for x in ticks(*x_range, log[0])):
        at = place(x, y_range[0])
        if not names:
            draw.line([at, place(x, y_range[1])], fill="#eeeeee")
        draw.text((at[0], at[1] + 4 + 14 * (x % 2 if names else 0)), name, "black", anchor="ma")
    for y in ticks(*y_range, log[1]):
        at = place(x_range[0], y)
        draw.line([at, place(x_range[1], y)], fill="#eeeeee")
        draw.text((at[0] - 6, at[1]), f"{y:g}", "black", anchor="rm")
    draw.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline="black")
    draw.text((LEFT, 6), title, "black")
    draw.text((LEFT, TOP - 3), y_label, "#555555", anchor="lb")
    draw.text((WIDTH - RIGHT, HEIGHT - 4), x_label, "#555555", anchor="rb")
    return picture, draw, place


def legend(draw, names):
    for i, name in enumerate(names):
        top = TOP + 18 * i
        draw.rectangle(
            [WIDTH - RIGHT + 10, top, WIDTH - RIGHT + 20, top + 10], fill=COLOURS[i % len(COLOURS)]
        )
        draw.text((WIDTH - RIGHT + 26, top + 5), name, "black", anchor="lm")


def write_picture(picture, path):
    with written_whole(path) as scratch:
        picture.save(scratch, format="png")


def draw_curves(path, x_label, curves, floor):
    """F-FID over a quantity, both on logarithmic scales: curves {name: [(x, F-FID, text), ...]}, floor a line."""
    xs, ys = zip(*((x, y) for points in curves.values() for x, y, _ in points), strict=True)
    # On the right there is room for the text beside a point.
    x_range, y_range = (min(xs) / 1.5, max(xs) * 2), (min(*ys, floor) / 1.5, max(*ys, floor) * 1.5)
    picture, draw, place = axes(
        "quality of samples", x_label, "F-FID", x_range, y_range, (True, True)
    )
    draw.line([place(x_range[0], floor), place(x_range[1], floor)], fill="#888888")
    draw.text(place(x_range[1], floor), "real images", "#555555", anchor="rb")
    for i, points in enumerate(curves.values()):
        colour = COLOURS[i % len(COLOURS)]
        points = sorted(points)
        draw.line([place(x, y) for x, y, _ in points], fill=colour, width=2)
        for x, y, text in points:
            draw.circle(place(x, y), 5, fill=colour)
            draw.text((place(x, y)[0] + 8, place(x, y)[1]), text, colour, anchor="lb")
    legend(draw, curves)
    write_picture(picture, path)


def draw_histogram(path, rows, class_names):
    """The share of each class in the samples, as the extractor sees them: bars side by side; rows {name: shares}."""
    high = 1.1 * max(max(shares) for shares in rows.values())
    picture, draw, place = axes(
        "classes of the samples", "", "share", (-0.6, 9.6), (0, high), names=class_names
    )
    for i, shares in enumerate(rows.values()):
        width = 0.84 / len(rows)
        for y, share in enumerate(shares):
            left = y - 0.42 + i * width
            corners = [*place(left, share), *place(left + width, 0)]
            draw.rectangle(corners, fill=COLOURS[i % len(COLOURS)])
    draw.line([place(-0.6, 0.1), place(9.6, 0.1)], fill="black")
    legend(draw, rows)
    write_picture(picture, path)


def draw_results(results, folder, class_names):
    """The diagrams of results.json: quality against latency and against steps, and the classes of the samples."""
    floor = results["floor"]["scores"]["ffid"]["mean"]
    by_time, by_steps = {}, {}
    for row in results["rows"]:
        name = row["title"].replace(f", steps {row['steps']}", "")
        ffid, times = row["scores"]["ffid"]["mean"], row["latency"]
        if times:
            text = f"{row['steps']} steps" if row["steps"] else ""
            by_time.setdefault(name, []).append((times["batch"][times["best"]], ffid, text))
        if row["steps"]:
            by_steps.setdefault(name, []).append((row["steps"], ffid, ""))
    for stale in ("quality_latency.png", "steps.png"):
        (folder / stale).unlink(missing_ok=True)
    if by_time:
        draw_curves(
            folder / "quality_latency.png", "ms / image at the best batch size", by_time, floor
        )
    if by_steps:
        draw_curves(folder / "steps.png", "steps of the sampler", by_steps, floor)
    draw_histogram(
        folder / "classes.png",
        {row["title"]: row["scores"]["histogram"] for row in results["rows"]},
        class_names,
    )


def draw_sets(folder, setting, images, reference):
    """Two pictures of samples: ten of each class, and each above the nearest training image."""
    stem = infer_onnx.file_stem(setting.title())
    by_class = np.concatenate([images[:100][y::10] for y in range(10)])
    write_picture(
        infer_onnx.to_picture(by_class, len(by_class) // 10), folder / f"samples_{stem}.png"
    )
    few = as_pixels(images[:20])
    found = reference.train[nearest(few, reference.train)[1]]
    rows = np.stack([few.reshape(-1, 10, 784), found.reshape(-1, 10, 784)], axis=1).reshape(
        -1, 1, 28, 28
    )
    picture = infer_onnx.to_picture((rows * 255).round().astype(np.uint8), 10)
    write_picture(picture, folder / f"nearest_{stem}.png")


def draw_side_by_side(path, first_images):
    """A row of samples for each setting, from one seed, one of each class; first_images {name: uint8 (10, ...)}."""
    grid = infer_onnx.to_picture(np.concatenate(list(first_images.values())), 10)
    picture = Image.new("L", (grid.width + 330, grid.height), "white")
    picture.paste(grid, (330, 0))
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(13)
    for i, name in enumerate(first_images):
        draw.text((320, (i + 0.5) * grid.height / len(first_images)), name, "black", anchor="rm")
    write_picture(picture, path)


def draw_tsne(folder, setting, images, reference):
    """A map of features, real (grey) and generated (by class), fitted to both together.  It is a picture, no score."""
    from sklearn.manifold import TSNE

    features = extract(reference.sessions[0], images[:1000])[0]
    real = reference.features[0][: len(features)]
    both = np.concatenate([real, features])
    points = TSNE(random_state=0, perplexity=min(30, len(both) / 4)).fit_transform(both)
    (x_low, y_low), (x_high, y_high) = points.min(axis=0) - 1, points.max(axis=0) + 1
    title = f"t-SNE of {len(real):,} real images (grey) and samples: {setting.title()}"
    picture, draw, place = axes(title, "", "", (x_low, x_high), (y_low, y_high))
    colours = [GREY] * len(real) + [COLOURS[i % 10] for i in range(len(features))]
    for point, colour in zip(points.tolist(), colours, strict=True):
        draw.circle(place(*point), 3, fill=colour)
    legend(draw, setting.model.card["class_names"])
    write_picture(picture, folder / f"tsne_{infer_onnx.file_stem(setting.title())}.png")


# --- Extractors -------------------------------------------------------------------------------------------------


def train_extractor(train, test, number, epochs, path=None, data=None, data_dir=None):
    """Train a classifier and return its accuracy on the test images; with a path, write it there as ONNX.

    train, test: (uint8 images (N, 1, 32, 32), labels (N,));  number: of the architecture;
    data, data_dir: of the class names in the file.  The graph takes x float32 (B, 1, 28, 28) in [-1, 1] and gives
    features (B, 128) and logits (B, 10).  On one machine, with as many threads, the file comes out the same.
    """
    import onnx
    import torch
    from torch import nn
    from torch.nn import functional as F

    import common
    import export

    def conv(width_in, width_out, stride=1):
        layer = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(width_out), nn.ReLU())

    class Residual(nn.Module):
        """Two convolutions and a shortcut (He et al. 2015, arXiv:1512.03385)."""

        def __init__(self, width_in, width_out, stride):
            super().__init__()
            self.inner = nn.Sequential(
                conv(width_in, width_out, stride), *conv(width_out, width_out)[:2]
            )
            projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

        def forward(self, x):
            return F.relu(self.inner(x) + self.shortcut(x))

    class Extractor(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.head = body, nn.Linear(128, 10)

        def forward(self, x):
            features = self.body(x).mean(dim=(2, 3))
            return features, self.head(features)

    seed = SEEDS[number]
    torch.manual_seed(seed)
    if number == 2:
        architecture = "residual, 32-64-64-128 channels, strides"
        body = nn.Sequential(
            conv(1, 32), Residual(32, 64, 2), Residual(64, 64, 1), Residual(64, 128, 2)
        )
    else:
        architecture = "plain, 32-32-64-64-128-128 channels, max pooling"
        first, second = (
            (conv(1, 32), conv(32, 32), nn.MaxPool2d(2)),
            (conv(32, 64), conv(64, 64), nn.MaxPool2d(2)),
        )
        body = nn.Sequential(*first, *second, conv(64, 128), conv(128, 128))
    model = Extractor(body).to(memory_format=torch.channels_last)
    images, labels = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    test_images, test_labels = torch.from_numpy(test[0]), torch.from_numpy(test[1])
    batch_size = min(128, len(images))
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with tqdm(total=steps, unit="step", desc=f"extractor {number}", mininterval=pause()) as bar:
        for epoch in range(epochs):
            for batch in common.epoch_batches(len(images), batch_size, seed, epoch):
                top, left = torch.randint(
                    0, 5, (2,)
                ).tolist()  # 28x28 of 32x32: shifts by up to 2 pixels
                x = common.to_float(images[batch, :, top : top + 28, left : left + 28])
                loss = F.cross_entropy(model(x)[1], labels[batch], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()
    model.eval().requires_grad_(False)
    parts = test_images[:, :, 2:30, 2:30].split(250)
    predicted = torch.cat([model(common.to_float(part))[1].argmax(dim=1) for part in parts])
    accuracy = (predicted == test_labels).float().mean().item()
    if path:
        proto = export.export_graph(model, {"x": torch.zeros(2, 1, 28, 28)}, "features", "logits")
        card = {
            "format": CARD_FORMAT, "data": data, "accuracy": accuracy, "architecture": architecture, "seed": seed,
            "epochs": epochs, "parameters": sum(p.numel() for p in model.parameters()),
            "class_names": common.load_data(data, data_dir, train=False).class_names, "torch": str(torch.__version__),
        }  # fmt: skip
        onnx.helper.set_model_props(proto, {CARD_KEY: json.dumps(card)})
        with written_whole(path) as scratch:
            scratch.write_bytes(infer_onnx.sealed(proto.SerializeToString()))
    return accuracy


def train_both(args):
    """Train the two extractors of a data set, and check them as they will be used."""
    train, test = (load_split(args.data, args.data_dir, split) for split in (True, False))
    for number in (1, 2):
        path = extractor_file(args.extractors, args.data, number)
        train_extractor(
            train, test, number, args.epochs or EPOCHS[number], path, args.data, args.data_dir
        )
        card = load_extractor(path, args.data, test, args.threads)[2]
        size = path.stat().st_size / 1e6
        print(
            f"wrote {path} ({size:.2f} MB): test accuracy {card['accuracy']:.2%}, SHA-256 {card['sha256']}",
            flush=True,
        )


# --- Command line -----------------------------------------------------------------------------------------------


def pause():
    """Seconds between updates of a bar; a log file needs fewer lines."""
    return 0.5 if sys.stderr.isatty() else 30


def several(parse):
    """An argparse type: values with commas, each once."""
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",")))


def solver(text):
    if text not in infer_onnx.SOLVERS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(infer_onnx.SOLVERS)}")
    return text


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    number = infer_onnx.number
    parser = infer_onnx.Parser(
        prog="evaluate.py", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"{', '.join(NAMES)} or .onnx files (all that are found)",
    )
    add(
        "--num-samples",
        type=number(int, 20, 1_000_000),
        default=10_000,
        help="N, all classes together (10000)",
    )
    add(
        "--seeds",
        type=number(int, 1, 100),
        default=1,
        help="sets of N samples; their spread is reported (1)",
    )
    add(
        "--steps",
        type=several(number(int, 1)),
        help="of diffusion models, several with commas (the model's)",
    )
    add(
        "--guidance",
        type=several(number(float, 0)),
        help="of diffusion models, several with commas (the model's)",
    )
    add(
        "--guidance-limit",
        type=several(number(float, 0, 1)),
        help="guide below these shares of T (the model's)",
    )
    add(
        "--solver",
        type=several(solver),
        default=["ddim"],
        help="of ddim and ldm: ddim, dpm++ or both (ddim)",
    )
    add(
        "--data",
        choices=[*IDX_SETS],
        default="fashion-mnist",
        help="the real images (fashion-mnist)",
    )
    add("--data-dir", help="where their IDX files are (data/, then Debian's folder)")
    add("--output", type=Path, default=Path("results"), help="the folder to write to (results)")
    add(
        "--provider",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cuda is that or an error (auto)",
    )
    add("--threads", type=number(int, 0, 1024), default=0, help="on the CPU; 0 is one per core (0)")
    add(
        "--shard",
        type=infer_onnx.shard,
        metavar="I/N",
        help="only draw the I-th of N parts of what is to be scored",
    )
    add("--no-timing", dest="timing", action="store_false", help="do not time the models")
    add(
        "--tsne",
        action="store_true",
        help="a map of real and generated features (needs scikit-learn)",
    )
    add(
        "--cas",
        action="store_true",
        help="accuracy of a network trained on samples (draws 60,000; needs torch)",
    )
    add(
        "--train-extractor",
        action="store_true",
        help="train the extractors of --data instead (needs torch)",
    )
    add(
        "--epochs",
        type=number(int, 1, 1000),
        help=f"of --train-extractor ({EPOCHS[1]} and {EPOCHS[2]})",
    )
    home = Path(__file__).parent / "pretrained"
    add(
        "--extractors",
        type=Path,
        default=home,
        metavar="FOLDER",
        help="where the extractors are, or go (pretrained)",
    )
    return parser


def processor():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_results(results, folder):
    texts = {"results.json": json.dumps(results, indent=1) + "\n", "table.md": table(results)}
    for name, text in texts.items():
        with written_whole(folder / name) as scratch:
            scratch.write_text(text)


def marked(n, reference):
    """Whether so few samples, or more or fewer than reference images, make scores that do not compare with others."""
    return n < FEW or n != len(reference.features[0])


def score_floor(reference, train, test, accuracy, args):
    """The scores of real images: as many training images as samples, a disjoint part of them for each seed.

    Their label accuracy, copy ratio and copies are those of test images: of training images these say nothing.
    """
    images, n = train[0], min(args.num_samples, len(train[0]))
    seeds = min(args.seeds, len(images) // n)
    parts = [images[i * n : (i + 1) * n] for i in range(seeds)]
    scores = [score_images(reference, part, None, reference.held_out) for part in parts]
    scores = [{**s, "label_accuracy": accuracy} for s in scores]
    if args.cas:
        scores[0]["cas"] = train_extractor(train, test, 1, CAS_EPOCHS)
    about = {"title": "real images", "n": n, "marked": marked(n, reference), "seeds": seeds}
    return {**about, "scores": summary(scores)}


def score_setting(setting, reference, sets, test, args):
    """A row of results.json.  sets: the samples of each seed, uint8 (N, 1, 32, 32), N or more of seed 0."""
    labels = np.array(balanced_labels(0, len(sets[0])))
    asked = None if setting.options.get("guidance") == 0 else labels[: args.num_samples]
    try:
        scores = [score_images(reference, images[: args.num_samples], asked) for images in sets]
    except InputError as error:
        raise InputError(f"{setting.title()}: {error}") from error
    if args.cas and asked is not None:
        pairs = sets[0][: len(reference.train)], labels[: len(reference.train)]
        scores[0]["cas"] = train_extractor(pairs, test, 1, CAS_EPOCHS)
    card = setting.model.card
    files = [
        setting.path,
        *(setting.path.with_name(Path(part["file"]).name) for part in card["parts"].values()),
    ]
    return {
        "title": setting.title(), "model": setting.name, "file": setting.path.name, "sha256": setting.model.sha256,
        "steps": setting.options.get("steps"), "guidance": setting.options.get("guidance"),
        "guidance_limit": setting.options.get("guidance_limit", card.get("guidance_limit")),
        "solver": setting.options.get("solver"),
        "n": args.num_samples, "marked": marked(args.num_samples, reference), "seeds": args.seeds,
        "scores": summary(scores), "evaluations": setting.passes(),
        "parameters": card["parameters"], "bytes": sum(file.stat().st_size for file in files),
        "training_minutes": card["training"]["seconds"] / 60, "latency": latency(setting) if args.timing else None,
    }  # fmt: skip


def score_models(args):
    """Draw, score and picture every setting.  The results are written when all are there."""
    for module in ("sklearn",) * args.tsne + ("torch",) * args.cas:
        importlib.import_module(module)  # now, and not after the work
    if args.num_samples % 10:
        raise InputError(
            f"--num-samples {args.num_samples} is not a multiple of 10, the number of classes"
        )
    train, test = (load_split(args.data, args.data_dir, split) for split in (True, False))
    files = [extractor_file(args.extractors, args.data, number) for number in (1, 2)]
    if not files[1].is_file():
        print(
            f"no {files.pop().name}: the order of the models is not checked by a second extractor"
        )
    extractors = [load_extractor(file, args.data, test, args.threads) for file in files]
    class_names = extractors[0][2]["class_names"]
    settings = find_settings(args, class_names)
    cache = args.output / "cache"
    cache.mkdir(parents=True, exist_ok=True)  # or fail, before the work
    sizes, first_images = [args.num_samples] * args.seeds, {}
    if args.cas:
        sizes[0] = max(args.num_samples, len(train[0]))
    parts = [
        (s, seed, *chunk)
        for s in settings
        for seed, size in enumerate(sizes)
        for chunk in chunks(size)
    ]
    if args.shard:
        parts = parts[args.shard[0] - 1 :: args.shard[1]]
    absent = [part for part in parts if not chunk_file(cache, *part).is_file()]
    missing = sum((stop - first) * setting.passes() for setting, _, first, stop in absent)
    options = {"total": missing, "unit": " evaluations", "unit_scale": True, "mininterval": pause()}
    if args.shard:
        with tqdm(**options) as bar:
            for part in absent:
                draw_chunk(cache, *part, bar)
        print(
            f"drawn: {len(parts)} files in {cache}; with those of the other shards there, run again without --shard"
        )
        return
    print(f"running on {settings[0].model.where}")
    print(f"{len(settings)} settings; real images are scored first", flush=True)
    reference = make_reference(extractors, train, test)
    results = {
        "protocol": {
            "data": args.data, "k": K, "reference": len(test[0]), "train": len(train[0]),
            "queries": len(reference.held_out), "others": len(reference.others),
        },
        "extractors": [card for _, _, card in extractors],
        "machine": {
            "processor": processor(), "cores": os.cpu_count(), "threads": args.threads,
            "provider": settings[0].model.session.get_providers()[0], "python": platform.python_version(),
            "numpy": np.__version__, "onnxruntime": ort.__version__,
        },
        "floor": score_floor(reference, train, test, extractors[0][2]["accuracy"], args),
        "rows": [],
    }  # fmt: skip
    with tqdm(**options) as bar:
        for setting in settings:
            sets = [
                draw_samples(cache, setting, seed, size, bar) for seed, size in enumerate(sizes)
            ]
            bar.set_description(f"{setting.title()}, scoring")
            results["rows"].append(score_setting(setting, reference, sets, test, args))
            draw_sets(args.output, setting, sets[0], reference)
            if args.tsne:
                draw_tsne(args.output, setting, sets[0][: args.num_samples], reference)
            first_images[setting.title()] = sets[0][:10]
    write_results(results, args.output)
    draw_side_by_side(args.output / "side_by_side.png", first_images)
    draw_results(results, args.output, class_names)
    print(table(results))
    print(f"wrote {args.output}: results.json, table.md and pictures")


def main(argv=None):
    ort.set_default_logger_severity(4)
    parser = build_parser()
    args = parser.parse_args(argv)
    codes = {
        InputError: 2, ImportError: 2, infer_onnx.ModelError: 3, infer_onnx.ProviderError: 4, infer_onnx.RunError: 5,
        MemoryError: 5, OSError: 5,
    }  # fmt: skip
    try:
        train_both(args) if args.train_extractor else score_models(args)
    except tuple(codes) as error:
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        parser.exit(code, f"{parser.prog}: error: {infer_onnx.one_line(error)}\n")
    except KeyboardInterrupt:
        goes_on = "" if args.train_extractor else "; samples are kept, the same command goes on"
        parser.exit(130, f"{parser.prog}: stopped{goes_on}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
