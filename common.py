"""What the model scripts share: data, noise, image files, run folders, the optimiser Muon, the UNet, its embeddings.

Nothing in here belongs to the algorithm box of a script's paper: schedules, losses, samplers, EMA, train loops and the
flags of a model stay in its script, where the reader of the paper looks for them.

Images are uint8 in 0..255 on disk and in memory, and float32 in [-1, 1] everywhere else; `to_float` and `to_uint8`
are the only way from one to the other.
"""

import argparse
import difflib
import gzip
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IMAGE_SIZE = 32
NULL_LABEL = (
    -1
)  # "no class": the label of an image whose class was dropped, and of unconditional sampling


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what would be right."""


# --- Data -------------------------------------------------------------------------------------------------------

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# name: (torchvision class, folder of Debian's package, SHA-256 of the decompressed files)
IDX_SETS = {
    "fashion-mnist": (
        datasets.FashionMNIST,
        "/usr/share/datasets/fashion-mnist",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "mnist": (
        datasets.MNIST,
        None,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    # The publishers of KMNIST give sums of the .gz files only; torchvision checks those when it downloads.
    "kmnist": (datasets.KMNIST, None, None),
}


@dataclass
class ImageData:
    """A data set in memory: images uint8 (N, C, 32, 32), labels int64 (N,) in [0, len(class_names))."""

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list
    source: str

    def __str__(self):
        n, c, h, w = self.images.shape
        counts = torch.bincount(self.labels, minlength=len(self.class_names))
        return (
            f"{self.source}: {n:,} images of {c}x{h}x{w}, {len(self.class_names)} classes of "
            f"{counts.min():,} to {counts.max():,} images, values {self.images.min()}..{self.images.max()}"
        )


def load_data(name, data_dir=None, channels=1, train=True):
    """Load a data set by name (fashion-mnist, mnist, kmnist), a folder with one sub-folder per class, or an .npz.

    IDX sets are looked for in `data_dir`, else in data/, then in Debian's folder, and are only then downloaded to
    data/. Folders and .npz files have no split of their own: `train` says nothing about them.
    channels: 1 (grey) or 3.  Returns ImageData.  Raises InputError naming the file that is missing or wrong.
    """
    path = Path(name)
    if name in IDX_SETS:
        images, labels, class_names, source = _load_idx(name, data_dir, train)
    elif path.is_dir():
        images, labels, class_names = _load_folder(path, channels)
        source = name
    elif path.suffix == ".npz" and path.is_file():
        images, labels, class_names = _load_npz(path)
        source = name
    else:
        raise InputError(
            f"no data set {name!r}: give one of {', '.join(IDX_SETS)}, a folder of class folders, or an .npz"
        )
    if (
        images.shape[1] != channels
    ):  # grey becomes three equal channels; colour becomes its luminance
        images = images.expand(-1, 3, -1, -1) if channels == 3 else TF.rgb_to_grayscale(images)
    return ImageData(_to_image_size(images).contiguous(), labels, class_names, source)


def _to_image_size(images):
    """uint8 (N, C, H, W) -> (N, C, 32, 32): 28x28 is padded with black, anything else resized."""
    if images.shape[-2:] == (28, 28):
        return F.pad(images, (2, 2, 2, 2))
    if images.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    return TF.resize(images, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)


def _load_idx(name, data_dir, train):
    """Find the two IDX files of a split, verify them, and let torchvision parse them."""
    dataset_class, debian_dir, sums = IDX_SETS[name]
    wanted = IDX_FILES[:2] if train else IDX_FILES[2:]
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder")
    places = [
        Path(data_dir or "data"),
        *([Path(debian_dir)] if debian_dir and data_dir is None else []),
    ]
    found = _find_idx(places, dataset_class.__name__, wanted)
    if found is None and data_dir is not None:
        raise InputError(
            f"--data-dir {data_dir} has no {wanted[0]} (or .gz), nor has its {dataset_class.__name__}/raw"
        )
    if found is None:
        _download(dataset_class, Path("data"))
        found = _find_idx(places, dataset_class.__name__, wanted)

    with tempfile.TemporaryDirectory() as scratch:  # torchvision's parser takes a plain file
        parsed = []
        for file, base in zip(found, wanted, strict=True):
            content = _read_verified(file, sums and sums[IDX_FILES.index(base)])
            plain = Path(scratch, base)
            plain.write_bytes(content)
            reader = (
                datasets.mnist.read_image_file
                if "images" in base
                else datasets.mnist.read_label_file
            )
            try:
                parsed.append(reader(str(plain)))
            except (
                AssertionError,
                ValueError,
                RuntimeError,
                KeyError,
                IndexError,
                TypeError,
            ) as error:
                raise InputError(
                    f"{file} is not an IDX file of {'images' if 'images' in base else 'labels'}"
                ) from error
    images, labels = parsed
    class_names = list(dataset_class.classes)
    if name == "mnist":
        class_names = [c.split(" ")[0] for c in class_names]  # torchvision says "0 - zero"
    if images.shape[1:] != (28, 28):
        raise InputError(f"{found[0]} has images of {tuple(images.shape[1:])}, not 28x28")
    if len(images) != len(labels):
        raise InputError(
            f"{found[0]} has {len(images)} images but {found[1]} has {len(labels)} labels"
        )
    if len(labels) == 0 or labels.max() >= len(class_names):
        raise InputError(f"{found[1]} has labels outside 0..{len(class_names) - 1}, or none at all")
    return images[:, None], labels, class_names, f"{name} ({found[0].parent})"


def _find_idx(places, class_name, wanted):
    """The paths of the wanted files in the first place that has one of them (plain or .gz), or None."""
    for place in places:
        for folder in (place / class_name / "raw", place):
            files = [
                next((f for f in (folder / w, folder / f"{w}.gz") if f.is_file()), None)
                for w in wanted
            ]
            if any(files):
                missing = [w for w, file in zip(wanted, files, strict=True) if file is None]
                if missing:
                    raise InputError(
                        f"{folder} has no {missing[0]} (or .gz) beside the other files of the set"
                    )
                return files
    return None


def _download(dataset_class, root):
    """torchvision's download, moved into place only when it is whole."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        try:
            dataset_class(scratch, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{dataset_class.__name__} was not found and could not be downloaded ({reason}); "
                f"put its four IDX files into a folder and name it with --data-dir"
            ) from error
        target = root / dataset_class.__name__ / "raw"
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        Path(scratch, dataset_class.__name__, "raw").replace(target)


def _read_verified(file, sha256):
    """Decompressed bytes of `file`; InputError if it is broken or not the published file."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:
        raise InputError(
            f"{file} is broken ({error}): delete it and run again, or name another --data-dir"
        ) from error
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{file} is not the published file (its SHA-256 differs): delete it, or name another --data-dir"
        )
    return content


def _load_folder(path, channels):
    """torchvision's ImageFolder, read into one tensor."""
    try:
        folder = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} needs one sub-folder of images per class ({str(error).splitlines()[0]})"
        ) from error
    images = torch.cat([load_image(file, channels) for file, _ in folder.samples])
    return images, torch.tensor(folder.targets), folder.classes


def spread(items, count):
    """At most `count` of the items, evenly spread: what is read from folders is sorted by class."""
    return items[:: -(-len(items) // count)]


def load_image(path, channels):
    """One picture from a file as uint8 (1, channels, 32, 32). Raises InputError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # pillow would clip these to white without a word
                raise ValueError("more than 8 bits a channel")
            return _to_image_size(
                TF.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))[None]
            )
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is not a readable image ({str(error).splitlines()[0]})"
        ) from error


def _load_npz(path):
    """x uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; y integers (N,); class_names optional."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x", "y", "class_names") if key in file}
    except Exception as error:  # numpy's readers stumble over a broken file in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable .npz of plain arrays ({reason})") from error
    if "x" not in arrays or "y" not in arrays:
        raise InputError(f"{path} needs the arrays x (images) and y (labels)")
    x, y = arrays["x"], arrays["y"]
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise InputError(
            f"{path}: x is {arrays['x'].dtype} {arrays['x'].shape}; it must be uint8 (N, H, W) or (N, H, W, 1|3)"
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
        raise InputError(
            f"{path}: y is {y.dtype} {y.shape}; it must be {len(x)} integers from 0 up"
        )
    names = [str(n) for n in arrays["class_names"].ravel()] if "class_names" in arrays else None
    if names is not None and y.max() >= len(names):
        raise InputError(f"{path}: y goes up to {y.max()} but there are {len(names)} class_names")
    if names is None and y.max() >= 10_000:
        raise InputError(
            f"{path}: y goes up to {y.max()}; labels must count the classes from 0 up, at most 10,000 of them"
        )
    return (
        torch.from_numpy(x.copy()),
        torch.from_numpy(y.astype(np.int64)),
        names or [str(i) for i in range(y.max() + 1)],
    )


def given_images(names, class_, config, class_names, data_dir=None):
    """Images by name: indices of test images (of a folder or .npz: of any), or files, whose class is that of --class.

    config: the checkpoint's.  Returns (float (N, C, 32, 32) in [-1, 1], int64 (N,)).  Raises InputError.
    """
    if len(names) > 20:
        raise InputError(f"{len(names)} images are too many for one picture: at most 20")
    images, labels, data = [], [], None
    for name in names:
        if name.isdecimal():
            data = data or load_data(
                config["data"], data_dir or config["data_dir"], config["channels"], train=False
            )
            if int(name) >= len(data.images):
                raise InputError(f"there is no image {name}: they are 0 to {len(data.images) - 1}")
            images.append(data.images[int(name)][None])
            labels.append(data.labels[int(name)].item())
        else:
            label, *others = parse_classes(class_, class_names)
            if others:
                raise InputError(f"{name} needs one --class, that of the image")
            images.append(load_image(name, config["channels"]))
            labels.append(label)
    return to_float(torch.cat(images)), torch.tensor(labels)


@lru_cache(maxsize=1)
def epoch_batches(n, batch_size, seed, epoch):
    """The batches of one epoch as indices: int64 (n // batch_size, batch_size), a pure function of its arguments.

    The images left over when batch_size does not divide n wait for another epoch's order. Raises InputError.
    """
    if not 1 <= batch_size <= n:
        raise InputError(f"--batch-size {batch_size} is not in 1..{n}, the number of images")
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
    return torch.from_numpy(order[: n - n % batch_size].reshape(-1, batch_size))


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8 0..255, the exact inverse of `to_float`. Clips; raises ValueError on NaN."""
    if not torch.isfinite(images).all():
        raise ValueError("images have values that are not finite")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grey_level_error(x, back):
    """The mean distance of two sets of images in [-1, 1], said in words."""
    error = (to_uint8(back).float() - to_uint8(x).float()).abs().mean().item()
    return f"mean absolute error {error:.2f} of 255 grey levels"


def parse_classes(text, class_names):
    """'Sneaker', 'sneaker,bag', '7' or 'all' -> list of class indices. Raises InputError naming close matches."""
    if text.strip().lower() == "all":
        return list(range(len(class_names)))
    lower = [file_stem(name) for name in class_names]
    indices = []
    for part in (p.strip() for p in text.split(",")):
        if file_stem(part) in lower:
            indices.append(lower.index(file_stem(part)))
        elif part.isascii() and part.isdecimal() and len(part) < 6 and int(part) < len(class_names):
            indices.append(int(part))
        else:
            close = difflib.get_close_matches(file_stem(part), lower, n=3) or lower[:10]
            names = ", ".join(class_names[lower.index(c)] for c in close)
            raise InputError(
                f"no class {part!r}: did you mean {names}? (or 0..{len(class_names) - 1}, or all)"
            )
    return indices


def at_most_one(args, *flags):
    """Raise InputError if the user gave several of these flags."""
    given = [f"--{flag}" for flag in flags if getattr(args, flag)]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are one at a time")


def check_frames(interpolate, classes, count):
    """Raise InputError unless what goes from one picture to another has frames and, between classes, two of these."""
    if interpolate == "class" and len(classes) != 2:
        raise InputError(
            "--interpolate class goes from one class to another: give two, as in --class Sneaker,Bag"
        )
    if interpolate and count < 2:
        raise InputError("frames from one picture to another need --num-samples 2 or more")


# --- Noise ------------------------------------------------------------------------------------------------------


def noise_streams(seed, indices):
    """One NumPy generator per image, keyed by (seed, image index).

    Image i starts from the same noise whatever the batch, the device or the runtime (torch or ONNX Runtime).
    """
    return [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]


def draw_noise(streams, shape):
    """The next standard normal array of every stream: float32 (len(streams), *shape)."""
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


# --- Image files ------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path):
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds, delete it if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def check_output(path, endings, given=()):
    """Refuse an output that could not be written, before the work is done.

    endings: of its name; "" is a folder;  given: names of images, or None, which it may not replace.
    """
    if path.suffix not in endings:
        names = " or ".join(ending for ending in endings if ending)
        raise InputError(
            f"--output {path}: the name must end in {names}" + ", or be a folder" * ("" in endings)
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise InputError(f"--output {path} is a folder that holds files: name another")
    if path.is_file() and not path.suffix:
        raise InputError(
            f"--output {path} is a file, where a folder for pictures would go: name another"
        )
    if path.resolve() in [Path(name).resolve() for name in given if name]:
        raise InputError(f"{path} is an image that is given: name another --output")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"--output {path} cannot be written: {error.strerror}") from error


def file_stem(class_name):
    """'T-shirt/top' -> 't-shirt-top': safe in a file name, and one that parse_classes understands."""
    return "".join(c if c.isalnum() else "-" for c in class_name.lower())


def image_grid(images, columns):
    """float (N, C, H, W) in [-1, 1] -> one PIL picture, row by row, `columns` wide, up to 8 times the size."""
    grid = make_grid(to_uint8(images), nrow=columns, padding=2)
    picture = TF.to_pil_image(
        grid[:1] if images.shape[1] == 1 else grid
    )  # make_grid turns grey into RGB
    scale = max(1, min(8, 1000 // picture.width))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_images(images, labels, class_names, path, columns):
    """Write images (N, C, H, W) in [-1, 1] to a .png (grid), an .npz (x uint8, y) or else a folder of PNGs."""
    path = Path(path)
    if path.suffix == ".png":
        save_picture(image_grid(images, columns), path)
    elif path.suffix == ".npz":
        arrays = {
            "x": to_uint8(images).numpy(),
            "y": np.array(labels),
            "class_names": np.array(class_names),
        }
        with written_whole(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, **arrays)
    else:
        for i, (image, label) in enumerate(zip(to_uint8(images), labels, strict=True)):
            save_picture(
                TF.to_pil_image(image), path / f"{i:05d}_{file_stem(class_names[label])}.png"
            )


def trajectory_frames(trace, columns):
    """trace, a list of (t, x_t, x_0_hat) -> one picture a step: the grid of x_t above the grid of x_0_hat."""
    _, x_T, _ = trace[0]
    blank = -torch.ones_like(x_T[:1]).expand(
        -len(x_T) % columns, -1, -1, -1
    )  # to fill the last row of x_t
    return [image_grid(torch.cat([x_t, blank, x_0_hat]), columns) for _, x_t, x_0_hat in trace]


def filmstrip(trace):
    """trace, a list of (t, x_t, x_0_hat) -> one picture: for each image a row of x_t above a row of x_0_hat.

    At most 11 moments are shown, from the first to the last.
    """
    last = len(trace) - 1
    moments = [trace[i] for i in sorted({round(k * last / 10) for k in range(11)})]
    rows = torch.stack(
        [torch.stack([x_t, x_0_hat], dim=1) for _, x_t, x_0_hat in moments], dim=2
    )  # (B, 2, moments, ...)
    return image_grid(rows.flatten(0, 2), columns=len(moments))


def in_the_plane(codes, how, others=None):
    """Codes (N, D), and others (M, D) after them, as points (N + M, 2) of a map.

    how: "pca", the two principal directions of the codes, or "tsne" (scikit-learn), fitted to all of them together.
    Codes of two numbers are points already.  Raises InputError where scikit-learn is missing.
    """
    every = codes if others is None else torch.cat([codes, others])
    if codes.shape[1] == 2:
        return every
    if how == "pca":
        directions = torch.linalg.svd(codes - codes.mean(dim=0), full_matrices=False).Vh[:2]
        return (every - codes.mean(dim=0)) @ directions.T
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError(
            "t-SNE needs scikit-learn: pip install scikit-learn, or take pca"
        ) from error
    perplexity = min(30, (len(every) - 1) / 3)
    return torch.from_numpy(
        TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(every.numpy())
    )


def save_map(points, labels, class_names, path, walks=()):
    """Write points (N, 2) as dots with a colour for each class, and walks [(points (S, 2), label), ...] as lines."""
    size, margin = 900, 20
    every = torch.cat([points, *(walk for walk, _ in walks)])
    low, high = every.min(dim=0).values, every.max(dim=0).values
    colours = [
        ImageColor.getrgb(f"hsv({360 * y // len(class_names)}, 90%, {85 - 30 * (y % 2)}%)")
        for y in range(len(class_names))
    ]
    picture = Image.new("RGB", (size + 150, size), "white")
    pen = ImageDraw.Draw(picture)

    def place(points):
        x, y = (
            (points - low) / (high - low).clamp(min=1e-9) * (size - 2 * margin) + margin
        ).T.tolist()
        return list(zip(x, [size - v for v in y], strict=True))

    for (x, y), label in zip(place(points), labels.tolist(), strict=True):
        pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=colours[label])
    for walk, label in walks:
        spots = place(walk)
        pen.line(spots, fill="black", width=4)
        pen.line(spots, fill=colours[label], width=2)
        for (x, y), radius in (
            (spots[0], 4),
            (spots[-1], 7),
        ):  # a small dot where it starts, a large one where it ends
            pen.ellipse(
                (x - radius, y - radius, x + radius, y + radius),
                fill=colours[label],
                outline="black",
            )
    for y, (name, colour) in enumerate(zip(class_names[:40], colours, strict=False)):
        pen.ellipse((size, margin + 20 * y, size + 10, margin + 20 * y + 10), fill=colour)
        pen.text((size + 16, margin + 20 * y), name, fill="black")
    save_picture(picture, path)


def save_picture(picture, path):
    """Write a PIL picture as PNG."""
    with written_whole(path) as scratch:
        picture.save(scratch, format="png")


def save_gif(frames, path, milliseconds=80):
    """Write a list of PIL pictures as an endless GIF that rests on its last frame for a second."""
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    with written_whole(path) as scratch:
        frames[0].save(
            scratch,
            format="gif",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
        )


def sampled_file(asked, name, classes, class_names, endings, given=()):
    """The path to write samples to: the one asked for, or NAME_CLASS.png; refused as by check_output."""
    what = file_stem(class_names[classes[0]]) if len(classes) == 1 else "samples"
    output = asked or Path(f"{name}_{what}.png")
    check_output(output, endings, given)
    return output


def save_sampled(images, labels, class_names, path, count, trace=None, strip=False):
    """Write `count` samples of each class as save_images does, or their trace as a GIF or a filmstrip."""
    if not images.isfinite().all():
        raise InputError(
            "the samples are not finite: the weights are damaged, or their training went astray"
        )
    columns = count if 1 < count <= 20 else min(10, len(images))
    if strip:
        save_picture(filmstrip(trace), path)
    elif path.suffix == ".gif":  # of the walk, or of one sample of each class after the other
        each = images.unflatten(0, (-1, count)).unbind(1)
        save_gif(
            trajectory_frames(trace, columns)
            if trace
            else [image_grid(x, min(10, len(x))) for x in each],
            path,
        )
    else:
        save_images(images, labels.tolist(), class_names, path, columns)


# --- Runs -------------------------------------------------------------------------------------------------------
# What a run is outside its paper: a folder, a clock, a log, a file to go on from, flags that explain themselves.

FORMAT = 2  # of the checkpoint file
LOG_EVERY = 50  # steps
RUN_FLAGS = (
    "data_dir",
    "epochs",
    "minutes",
    "save_every",
    "device",
    "deterministic",
)  # may change when a run goes on


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line; argparse would print the usage before it
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: int or float in [low, high], or in (low, high] with above."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            limits = f"{'above' if above else 'from'} {low}" + (
                f" to {high}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' * (kind is int)}number {limits}"
            )
        return value

    return parse


def whole_numbers(text):
    """An argparse type: '32,96' -> (32, 96), at most five numbers: 32 pixels can be halved no more often."""
    numbers = tuple(number(int, 1, 65536)(part) for part in text.split(","))
    if len(numbers) > 5:
        raise argparse.ArgumentTypeError(f"{text!r} is more than five numbers")
    return numbers


def run_parser(name, doc, batch_size=64):
    """The flags that all model scripts share: the run, its data, what to draw. The script adds its own."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=f"{name}.py", description=doc, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--train", action="store_true", help="train; without it, draw samples")
    add(
        "--resume",
        action="store_true",
        help="go on with the newest run, or that of --run-dir; needs no other flag",
    )
    add(
        "--run-dir",
        type=Path,
        help="folder of the run (default: runs/NAME, or runs/NAME-2, ... if that is taken)",
    )
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (auto)",
    )
    on_off = argparse.BooleanOptionalAction
    add(
        "--deterministic",
        action=on_off,
        default=False,
        help="of training: the same bits again on CUDA too (off)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="of weights, data order and noise (0)",
    )
    add(
        "--batch-size",
        type=number(int, 1),
        default=batch_size,
        help=f"images at a time ({batch_size})",
    )
    add = parser.add_argument_group("length of the run, one of the two").add_argument
    add(
        "--epochs",
        type=number(float, 0, above=True),
        help="passes over the data, fractions allowed (20)",
    )
    add(
        "--minutes",
        type=number(float, 0, above=True),
        help="wall time, resumed or not; the rate reaches 0 just then",
    )
    add(
        "--save-every",
        type=number(float, 0),
        default=3.0,
        help="minutes between checkpoints and sample grids (3)",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        default="fashion-mnist",
        help=f"{', '.join(IDX_SETS)}, a folder of class folders, or an .npz of x, y",
    )
    add(
        "--data-dir",
        help="where a named set's files are (data, then Debian's folder, then a download)",
    )
    add(
        "--channels",
        type=int,
        choices=(1, 3),
        default=1,
        help="of the images: 1 grey, 3 colour (1)",
    )
    add = parser.add_argument_group("what to draw").add_argument
    add(
        "--class",
        dest="class_",
        metavar="NAME",
        default="all",
        help="name or index, several with commas, all (all)",
    )
    add(
        "--num-samples",
        type=number(int, 1, 1_000_000),
        default=1,
        help="images of each class, or frames (1)",
    )
    add(
        "--checkpoint",
        type=Path,
        help="a .pt file or a run's folder (the newest run, else the shipped weights)",
    )
    add(
        "--output",
        type=Path,
        help="a .png grid, an .npz, a .gif, or a folder for PNGs (NAME_CLASS.png)",
    )
    return parser


def of_lost_process(error):
    """Whether a RuntimeError says that another of the processes has ended."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextmanager
def errors_in_one_line(parser):
    """End the program with one line and exit code 2 where its input is wrong, and with 130 on Ctrl-C."""
    try:
        yield
    except (InputError, argparse.ArgumentTypeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (MemoryError, RuntimeError) as error:
        if of_lost_process(error):
            parser.exit(2, f"{parser.prog}: error: another process is gone, torchrun says which\n")
        if not isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) and "allocate memory" not in str(error):
            raise
        parser.exit(
            2, f"{parser.prog}: error: out of memory: lower --batch-size; what was saved is kept\n"
        )
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # or its threads may abort the process at its end


def parse_run(parser, argv, names, fixed):
    """The flags, and with --resume the checkpoint to go on from, whose flags count where none were typed.

    names: of the checkpoint files that a run may go on from;  fixed: flags that cannot change when it does.
    Returns (args, checkpoint or None).  Raises InputError for flags that do not go together.
    """
    args = parser.parse_args(argv)
    if args.epochs and args.minutes:
        raise InputError("give --epochs or --minutes, not both")
    if args.checkpoint and (args.train or args.resume):
        raise InputError(
            "--checkpoint is to sample from; a run goes on with --resume --run-dir FOLDER"
        )
    if not args.train and not args.resume and (args.run_dir or args.epochs or args.minutes):
        raise InputError("--run-dir, --epochs and --minutes go with --train or --resume")
    if not args.train and not args.resume and "LOCAL_RANK" in os.environ:
        raise InputError("torchrun is for --train and --resume: draw with python")
    if not args.resume:
        args.epochs = args.epochs if args.epochs or args.minutes else 20.0
        return args, None
    path = find_checkpoint(names, args.run_dir)
    checkpoint = load_checkpoint(path, names)
    if "optimizer" not in checkpoint:
        raise InputError(f"{path} holds weights to sample with, not a run to go on with")
    length = (
        {}
        if args.epochs or args.minutes
        else {k: checkpoint["config"][k] for k in ("epochs", "minutes")}
    )
    parser.set_defaults(**{**checkpoint["config"], "epochs": None, "minutes": None, **length})
    args = parser.parse_args(argv)  # again: what is typed still wins over the checkpoint
    args.run_dir = path.parent
    for k in fixed:
        if getattr(args, k) != checkpoint["config"][k]:
            raise InputError(
                f"--{k.replace('_', '-')} is {checkpoint['config'][k]} and cannot change in a run"
            )
    return args, checkpoint


def pick_device(name):
    """'auto' -> the best device there is, made ready to train on; InputError if the one asked for is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
        "auto": True,
    }
    if not there[name]:
        raise InputError(f"--device {name} is not to be had on this machine: use --device auto")
    device = torch.device(name if name != "auto" else next(d for d in there if there[d]))
    torch.set_flush_denormal(True)  # a CPU takes many times as long over numbers next to zero
    if device.type == "cuda":
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32; on a CPU the same setting costs a third of the speed
    return device


def training_device(args):
    """The device to train on, made ready; in a process that torchrun started, together with the others.

    Each process takes its share of every batch. The first alone speaks, logs and saves.  Raises InputError.
    """
    device = pick_device(args.device)
    if args.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read when CUDA's library starts
        torch.use_deterministic_algorithms(True)
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "mps":
        raise InputError("torchrun is for CPUs and CUDA: --device cpu")
    if device.type == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(
                f"more processes than GPUs: --nproc-per-node must be at most {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if args.batch_size % dist.get_world_size():
        raise InputError(
            f"--batch-size {args.batch_size} is no multiple of the {dist.get_world_size()} processes"
        )
    if dist.get_rank():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for as long as the process lives
    return device


def autocast(device, bf16):
    """The context of a forward pass: bfloat16 as --bf16 says; without the flag (None), on x86 CPUs that compute in it.

    These are those with AMX or AVX512-BF16; others emulate it, slowly.  Weights, losses, optimiser stay float32.
    """
    if bf16 is None and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        bf16 = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16))


class Muon(torch.optim.AdamW):
    """Muon for the weights between a network's first and last layer, AdamW for all else.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): the momentum of a weight matrix is made orthogonal,
    so that it learns in all directions alike; scaled as by Liu et al. 2025 (arXiv:2502.16982), so that a learning rate
    for AdamW suits both.  A convolution's weight is the matrix (out, in * kh * kw).  torch's Muon takes matrices alone,
    always in bfloat16, which CPUs that emulate it do slowly.  It stands here since no script's paper is about it.

    named_parameters: of a UNet;  the rest as of AdamW.
    """

    def __init__(self, named_parameters, lr, weight_decay, fused):
        rest = dict(named_parameters)
        inner = [
            k
            for k, p in rest.items()
            if p.ndim > 1 and not k.startswith(("stem", "head", "embedding"))
        ]
        groups = [{"params": [rest.pop(name) for name in inner]}, {"params": [*rest.values()]}]
        super().__init__(groups, lr, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self):
        lr, decay, weights = (self.param_groups[0][key] for key in ("lr", "weight_decay", "params"))
        for weight in weights:
            if weight not in self.state:  # AdamW looks for a step where it finds a state
                self.state[weight] = {"momentum": torch.zeros_like(weight), "step": torch.zeros(())}
            momentum = self.state[weight]["momentum"].lerp_(weight.grad, 0.05)
            update = orthogonal(weight.grad.lerp(momentum, 0.95).flatten(1))  # as in Nesterov's
            weight.mul_(1 - lr * decay)
            weight.add_(update.view_as(weight), alpha=-lr * 0.2 * max(update.shape) ** 0.5)
            weight.grad = None  # so that AdamW passes it over
        super().step()


def orthogonal(matrix):
    """About U V^T of a matrix U S V^T, with singular values near 1: five Newton-Schulz steps (Jordan et al. 2024)."""
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = (x / x.norm().clamp(min=1e-7)).to(
        torch.bfloat16 if x.is_cuda else x.dtype
    )  # on a GPU that is enough
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return (x if wide else x.T).to(matrix.dtype)


def processes():
    """The rank of this process, and how many torchrun started: (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parallel(model):
    """The model as it trains: in one of several processes, it leaves the mean of their gradients."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def find_checkpoint(names, asked=None, shipped=()):
    """The file asked for, or the one in the folder asked for; else that of the newest run; else a shipped one.

    names, shipped: stems of the files.  Raises InputError if there is none.
    """
    if asked:
        asked = Path(asked)
        places = (
            [asked / f"{name}.pt" for name in dict.fromkeys([*names, *shipped])]
            if asked.is_dir()
            else [asked]
        )
    else:
        runs = [path for name in names for path in Path("runs").glob(f"*/{name}.pt")]
        runs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        places = [*runs, *(Path(__file__).parent / f"pretrained/{name}.pt" for name in shipped)]
    for path in places:
        if path.is_file():
            return path
    wanted = " or ".join(map(str, places)) or f"runs/*/{names[0]}.pt"
    raise InputError(f"there is no {wanted}: train first, with --train")


def load_checkpoint(path, names):
    """Read a checkpoint made by one of the scripts `names`; InputError says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load passes over damaged numbers
                raise ValueError("a sum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        name, version = checkpoint["model"], checkpoint["format"]
    except Exception as error:  # whatever the reader of a foreign or broken file stumbles over
        raise InputError(
            f"{path} is not a checkpoint of {' or '.join(names)}, or not a whole one"
        ) from error
    if name not in names:
        raise InputError(f"{path} is a checkpoint of {name}, not of {' or '.join(names)}")
    if version != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {version}; these scripts read format {FORMAT}"
        )
    if (
        missing := {"config", "network", "class_names", "ema", "step", "seconds"}
        - checkpoint.keys()
    ):
        raise InputError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def load_run_data(args, checkpoint=None):
    """The training data that the flags name, said in a line; InputError if a run that goes on had other classes."""
    later = os.environ.get("LOCAL_RANK", "0") != "0"
    if later:
        dist.barrier()  # only the first of a machine may have to download
    data = load_data(args.data, args.data_dir, args.channels)
    if dist.is_initialized() and not later:
        dist.barrier()
    print(data)
    if checkpoint and data.class_names != checkpoint["class_names"]:
        raise InputError(
            f"the data has the classes {data.class_names}, the run {checkpoint['class_names']}"
        )
    return data


@contextmanager
def signals_caught():
    """Yield a list that the first Ctrl-C or SIGTERM is added to; the second ends the program as usual."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def new_folder(path):
    """Make a folder; whether there was none."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


class Run:
    """Where a run stands: its folder, step and clock. It counts, shows and logs; the training is the script's.

    name: of the script;  args: its flags;  num_images: in the data;  checkpoint: to go on from;  part: what is trained,
    if not all of it;  folder: that of an earlier part;  share: of --epochs or --minutes.
    folder, step, stopped and rank are there to be used; the script adds to `step`.
    """

    def __init__(self, name, args, num_images, checkpoint=None, part="", folder=None, share=1.0):
        self.name, self.part, self.args, self.num_images, self.share = (
            name,
            part,
            args,
            num_images,
            share,
        )
        self.stem, self.log_file = part or name, f"{part}_log.jsonl" if part else "log.jsonl"
        self.steps_per_epoch = len(epoch_batches(num_images, args.batch_size, args.seed, 0))
        self.total_steps = (
            math.ceil(round(args.epochs * share * self.steps_per_epoch, 6)) if args.epochs else None
        )
        self.step = self.first_step = checkpoint["step"] if checkpoint else 0
        self.rank, self.world = processes()
        self.signals, self.stopped = [], False
        self.folder = folder or (args.run_dir if checkpoint else self._new_folder(args.run_dir))
        self.start = self.last_save = time.monotonic()
        self.clock = self.start - (
            checkpoint["seconds"] if checkpoint else 0
        )  # as if it had never been interrupted

    def _new_folder(self, asked):
        """Make the folder of a new run: the one asked for, if it holds no run, else runs/NAME, runs/NAME-2, ..."""
        folder = [None]
        if self.rank == 0:
            files = {
                f"{self.stem}.pt",
                self.log_file,
                f"{self.name}.pt",
                "log.jsonl",
            }  # a part, or the whole
            if asked and any((asked / file).exists() for file in files):
                raise InputError(f"{asked} holds a run: --resume it, or name another --run-dir")
            names = itertools.chain([self.name], (f"{self.name}-{i}" for i in itertools.count(2)))
            folder = [
                asked or next(path for name in names if new_folder(path := Path("runs", name)))
            ]
            folder[0].mkdir(parents=True, exist_ok=True)
        if self.world > 1:
            dist.broadcast_object_list(folder)
        return folder[0]

    @contextmanager
    def under_way(self):
        """Yield tqdm's progress bar while training, with signals caught.

        The folder belongs to this process meanwhile.  Raises InputError if it is another's already, and where files
        cannot be written or other processes are lost.
        """
        bar_format = "{percentage:5.1f}% |{bar}| {elapsed}<{remaining}{postfix}"
        interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file needs fewer lines
        options = {"bar_format": bar_format, "mininterval": interval, "disable": self.rank > 0}
        options |= {"total": 1.0, "initial": min(self.progress(), 1.0)}
        kept = (
            f"what {self.folder} holds is kept. Go on with:  {self._command('--resume --run-dir')}"
        )
        try:
            with self._own_folder(), signals_caught() as self.signals, tqdm(**options) as bar:
                yield bar
        except OSError as error:
            raise InputError(f"cannot write ({error}); {kept}") from error
        except RuntimeError as error:
            if not of_lost_process(error):
                raise
            raise InputError(f"another process is gone, torchrun says which; {kept}") from error

    @contextmanager
    def _own_folder(self):
        """Keep other runs out of the folder, where the system can; drop the log's lines after `step`.

        A killed run had logged more than it had saved, perhaps half a line.
        """
        if self.rank:
            yield
            return
        with (self.folder / ".lock").open("w") as file:
            try:
                if fcntl:
                    fcntl.flock(
                        file, fcntl.LOCK_EX | fcntl.LOCK_NB
                    )  # ends with the process, however that ends
            except BlockingIOError as error:
                raise InputError(
                    f"{self.folder} is the folder of a run that goes on: stop that, or wait"
                ) from error
            except OSError:
                pass  # a file system without locks
            path = self.folder / self.log_file
            if path.exists():
                lines = [line for line in path.read_text().splitlines() if self._is_logged(line)]
                with written_whole(path) as scratch:
                    scratch.write_text("".join(f"{line}\n" for line in lines))
            yield

    def _is_logged(self, line):
        try:
            return json.loads(line)["step"] <= self.step
        except (ValueError, TypeError, KeyError):
            return False

    def seconds(self):
        return time.monotonic() - self.clock

    def progress(self):
        """The share of --epochs or --minutes that is over, from 0 on."""
        return (
            self.step / self.total_steps
            if self.args.epochs
            else self.seconds() / 60 / (self.args.minutes * self.share)
        )

    def agree(self):
        """`progress`, the same in all processes, and in `stopped` whether any of them caught a signal."""
        done, self.stopped = self.progress(), bool(self.signals)
        if self.world > 1:  # a signal that comes from here on counts in the next step
            said = torch.tensor([done, self.stopped], dtype=torch.float64)
            dist.all_reduce(said, dist.ReduceOp.MAX)
            done, self.stopped = said[0].item(), bool(said[1])
        return done

    def by_the_first(self, function):
        """A decorator: in the other processes, a function that does nothing."""
        return (lambda *args: None) if self.rank else function

    def own(self, *batch):
        """This process's share of a batch: of each tensor every world-th row, from its rank on."""
        return [part[self.rank :: self.world] for part in batch]

    def total(self, values):
        """The sum of a tensor over the processes, each of which has one of its own share of the batch."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values):
        """The mean of a tensor over the processes, as `total`."""
        return self.total(values) / self.world

    def epoch(self):
        return self.step / self.steps_per_epoch

    def batch(self):
        """The indices of this step's images: int64 (B,), a function of (seed, step) alone."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        return epoch_batches(self.num_images, self.args.batch_size, self.args.seed, epoch)[i]

    def seed(self, generator):
        """Make what a step draws depend on (seed, step) alone: a run goes on without a generator's state."""
        generator.manual_seed(
            int(np.random.SeedSequence([self.args.seed, self.step]).generate_state(1)[0])
        )

    def show(self, bar, text):
        speed = (
            (self.step - self.first_step) * self.args.batch_size / (time.monotonic() - self.start)
        )
        bar.set_postfix_str(
            f"epoch {int(self.epoch())}, {text}, {speed:.0f} images/s", refresh=False
        )
        bar.update(min(self.progress(), 1.0) - bar.n)

    def log(self, line):
        """Add a line, a dict of numbers, to log.jsonl."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        line = {"step": self.step, "epoch": self.epoch(), "seconds": self.seconds(), **line}
        with (self.folder / self.log_file).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def check_finite(self, **values):
        """Raise InputError unless all values are finite numbers."""
        if not all(map(math.isfinite, values.values())):
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            kept = f"what {self.folder} holds is kept. Go on with a lower --lr than {self.args.lr}, and look at the data"
            raise InputError(f"step {self.step}: {said}: not finite, stopped; {kept}")

    def picture(self):
        """Where the grid of samples of this step belongs."""
        return self.folder / f"samples/{self.part or 'step'}_{self.step:07d}.png"

    def save_due(self):
        return self.rank == 0 and time.monotonic() - self.last_save >= 60 * self.args.save_every

    def save(self, content):
        """Write the checkpoint: `content`, and where the run stands."""
        state = {
            "format": FORMAT, "model": self.stem, "step": self.step, "seconds": self.seconds(),
            "images": self.step * self.args.batch_size, "torch": str(torch.__version__),
        }  # fmt: skip
        try:
            with written_whole(self.folder / f"{self.stem}.pt") as scratch:
                torch.save({**state, **content}, scratch)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{self.folder / self.stem}.pt: {str(error).splitlines()[0]}") from error
        self.last_save = time.monotonic()

    def end(self):
        """Say how the run ended and what comes next; returns the exit code."""
        if self.world > 1:
            dist.barrier()  # for what the first has to save
        if self.part:
            self.agree()  # or a signal while that was saved would be lost, and the next part begin
        print(f"{self.step} steps, {self.epoch():.2f} epochs, {self.seconds() / 60:.1f} minutes")
        if self.stopped:
            print(
                f"Stopped and saved. Go on with:\n  {self._command('--resume --run-dir')}",
                flush=True,
            )
            return 130
        if not self.part:
            where = shlex.quote(self.folder.as_posix())
            print(
                f"Draw samples with:\n  python {self.name}.py --checkpoint {where} --class all --num-samples 10"
            )
        return 0

    def _command(self, flags):
        """The command line that starts this script in the same way, with flags and then the run's folder."""
        start = "python"
        if self.world > 1:
            here = os.environ[
                "LOCAL_WORLD_SIZE"
            ]  # of several machines, their number and address are the user's
            start = f"torchrun --nproc-per-node {here}" + " ..." * (int(here) < self.world)
        return f"{start} {self.name}.py {flags} {shlex.quote(self.folder.as_posix())}"


# --- Embeddings -------------------------------------------------------------------------------------------------


def sinusoidal_embedding(t, dim):
    """Positions t, int64 (B,), as sines and cosines of geometric frequencies: float32 (B, dim).

    Vaswani et al. 2017 (arXiv:1706.03762) section 3.5, with all sines before all cosines: component i and component
    i + dim/2 are sin and cos of t / 10000^(2i/dim).  dim must be even.
    """
    if dim % 2:
        raise ValueError(f"dim {dim} is odd; sine and cosine come in pairs")
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2)
    )
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeClassEmbedding(nn.Module):
    """(t, y), int64 (B,) each -> (B, emb_channels): an MLP of the time, plus a learned row per class.

    y is in [0, num_classes) or NULL_LABEL, which has a row of its own (row 0, so that it never moves).
    """

    def __init__(self, emb_channels, num_classes):
        super().__init__()
        self.sinusoidal_dim = emb_channels // 2
        self.time = nn.Sequential(
            nn.Linear(self.sinusoidal_dim, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        self.label = nn.Embedding(num_classes + 1, emb_channels)

    def forward(self, t, y):
        return F.silu(
            self.time(sinusoidal_embedding(t, self.sinusoidal_dim)) + self.label(y - NULL_LABEL)
        )


# --- UNet -------------------------------------------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm with 16 channels a group (fewer where 16 does not divide the width)."""
    return nn.GroupNorm(channels // math.gcd(channels, 16), channels)


def zero_init(layer):
    """A layer that outputs zero at the start: the block around it begins as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + f(x, emb): two normalised 3x3 convolutions; the embedding scales and shifts between them (as in ADM)."""

    def __init__(self, in_channels, out_channels, emb_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """x + multi-head self-attention over the H * W positions, heads of 32 channels (Vaswani et al. 2017, eq. (1)).

    Written out, since F.scaled_dot_product_attention goes back slowly in bfloat16 on CPUs.
    """

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3 * self.heads, c // self.heads, h * w)
        q, k, v = qkv.chunk(3, dim=1)  # (B, heads, C/heads, H*W) each
        weights = torch.softmax(
            k.transpose(2, 3) @ q * (c // self.heads) ** -0.5, dim=2
        )  # of all k, for each q
        return x + self.out((v @ weights).reshape(b, c, h, w))


class UNet(nn.Module):
    """The denoiser of ddpm.py, ddim.py and ldm.py: UNet(x_t, t, y) -> like x_t.

    channels      image (or latent) channels
    num_classes   labels are 0..num_classes-1, or NULL_LABEL
    widths        channels of each resolution, finest first; each is half the size of the one before
    depths        residual blocks of each resolution: so many on the way down and again on the way up, joined by skip
                  connections; the last is the bottom, which is passed once
    patch         space-to-depth: p x p pixels become p * p channels first and pixels again at the end; the cheapest
                  way to a smaller grid
    attention     self-attention between the blocks of the bottom, or after its only one
    emb_channels  size of the time and class embedding

    x_t: (B, channels, H, W) float with H and W divisible by patch * 2^(len(widths) - 1);  t, y: (B,) int64.
    Raises InputError for numbers that make no network.
    """

    def __init__(
        self,
        channels=1,
        num_classes=10,
        widths=(32, 96),
        depths=(1, 3),
        patch=2,
        attention=True,
        emb_channels=128,
    ):
        super().__init__()
        if not widths or len(widths) != len(depths) or min(*widths, *depths) < 1:
            raise InputError(
                f"--widths {widths} and --depths {depths} must be equally many, all 1 or more"
            )
        if attention and widths[-1] > 32 and widths[-1] % 32:
            raise InputError(
                f"--widths: the last, {widths[-1]}, must be a multiple of 32, for attention heads of 32"
            )
        if emb_channels < 4 or emb_channels % 4:
            raise InputError(f"--emb-channels {emb_channels} must be a multiple of 4")
        self.patch = patch
        self.embedding = TimeClassEmbedding(emb_channels, num_classes)
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width, below, depth in zip(widths[:-1], widths[1:], depths[:-1], strict=True):
            blocks = [ResidualBlock(width, width, emb_channels) for _ in range(depth)]
            self.down.append(
                nn.ModuleList([*blocks, nn.Conv2d(width, below, 3, stride=2, padding=1)])
            )
            blocks = [ResidualBlock(2 * width, width, emb_channels) for _ in range(depth)]
            self.up.insert(0, nn.ModuleList([nn.Conv2d(below, 4 * width, 1), *blocks]))
        self.bottom = nn.ModuleList()
        for i in range(depths[-1]):
            self.bottom.append(ResidualBlock(widths[-1], widths[-1], emb_channels))
            if attention and i < max(1, depths[-1] - 1):
                self.bottom.append(SelfAttention(widths[-1]))
        self.norm = group_norm(widths[0])
        self.head = zero_init(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))

    def forward(self, x_t, t, y):
        emb = self.embedding(t, y)
        h = self.stem(F.pixel_unshuffle(x_t, self.patch))
        skips = []
        for *blocks, downsample in self.down:
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
            h = downsample(h)
        for layer in self.bottom:
            h = layer(h, emb) if isinstance(layer, ResidualBlock) else layer(h)
        for upsample, *blocks in self.up:
            h = F.pixel_shuffle(upsample(h), 2)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)
