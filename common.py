"""What the model scripts share: data loading, noise, embeddings and the UNet.

Nothing here belongs to the algorithm box of a paper: schedules, losses, samplers and training loops
are in the scripts, where a reader of the paper looks for them.  Flags, checkpoints, logs, the
learning rate and the EMA are in runs.py.

Images are uint8 in 0..255 on disk and in memory, and float32 in [-1, 1] everywhere else; `to_float`
and `to_uint8` convert between the two.

torchvision is imported where data are read, since that takes almost as long as importing torch.
"""

import difflib
import gzip
import hashlib
import math
import os
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

IMAGE_SIZES = (32, 64, 128)  # height and width of the images, one of these
NULL_LABEL = -1  # "no class": where a label is dropped in training, and in unconditional sampling


class InputError(ValueError):
    """Wrong input from the user; the message is one line: what is wrong, what would be right."""


# --- Data -----------------------------------------------------------------------------------------


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# name: (torchvision's class, folder of Debian's package, SHA-256 of the decompressed files)
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
    # Only the .gz files of KMNIST have published sums; torchvision checks those when it downloads.
    "kmnist": ("KMNIST", None, None),
}
# Sets that torchvision finds, verifies and reads: (its class, arguments, the folder of the files).
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", {}, "cifar-10-batches-py"),
    "emnist-balanced": ("EMNIST", {"split": "balanced"}, "EMNIST/raw"),
    "emnist-letters": ("EMNIST", {"split": "letters"}, "EMNIST/raw"),
}
NAMED_SETS = (*IDX_SETS, *TORCHVISION_SETS)
# Images and labels in an .npz of ours, of Keras and of MedMNIST: to train, then to test.
NPZ_KEYS = (
    ("x", "y", "x", "y"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
UNLABELLED = ["images"]  # the one class of pictures without classes
# Names of folders that are parts of a data set, not classes; of those to test, the first is taken.
TRAINS = ("train", "training", "training_set")
TESTS = ("test", "testing", "test_set", "val", "valid", "validation")


@dataclass
class ImageData:
    """A data set in memory.

    images: uint8 (N, C, H, W), H = W of IMAGE_SIZES;  labels: int64 (N,) in [0, len(class_names));
    source: what was read;  notes: lines on what was left out or taken for something.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list
    source: str
    notes: list = field(default_factory=list)

    def __str__(self):
        n, c, h, w = self.images.shape
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        low, high = self.images.aminmax()
        named = [f"{y} {count:,}" for y, count in zip(self.class_names[:10], counts, strict=False)]
        lines = [
            f"{self.source}: {n:,} images of {c}x{h}x{w}, {len(counts)} "
            f"class{'es' if len(counts) > 1 else ''} of {min(counts):,} to {max(counts):,} images, "
            f"values {low}..{high}, {self.images.nbytes / 1e6:,.0f} MB",
            f"classes: {', '.join(named)}{', ...' if len(counts) > 10 else ''}",
            *self.notes,
            *(f"warning: {text}" for text in self.warnings),
        ]
        return "\n".join(lines)

    @cached_property
    def warnings(self):
        """What looks wrong in the data, a list of lines: empty where nothing does."""
        found = []
        n = len(self.images)
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        if empty := [y for y, count in zip(self.class_names, counts, strict=True) if count == 0]:
            more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
            found.append(f"no images of {', '.join(empty[:10])}{more}")
        if len(counts) == 1 and self.class_names != UNLABELLED:
            found.append(f"all images are of one class, {self.class_names[0]}: it is no condition")
        pixels = self.images.flatten(2)
        varied = (pixels.amax(2) != pixels.amin(2)).any(1)
        if constant := n - varied.sum().item():
            found.append(f"{constant:,} of {n:,} images are constant, one colour each")
        low, high = (value.item() for value in self.images.aminmax())
        if (low, high) == (0, 1):
            found.append("all values are 0 or 1 of 255: were they 0.0 to 1.0? Multiply by 255")
        elif low < high < low + 32:
            found.append(f"all values are {low} to {high}, of 0 to 255: next to no contrast")
        both = zip(self.images.numpy(), varied.tolist(), strict=True)  # no copy of the data
        different = {hash(image.tobytes()) for image, is_varied in both if is_varied}
        if (copies := n - constant - len(different)) > 0.1 * n:
            found.append(f"{copies:,} of {n:,} images are exact copies of others")
        return found

    @cached_property
    def fingerprint(self):
        """What a resumed run must find again: {"images": N, "sha256": of images and labels}."""
        content = hashlib.sha256(self.images.numpy())
        content.update(self.labels.numpy())
        return {"images": len(self.labels), "sha256": content.hexdigest()}


def load_data(
    name, data_dir=None, channels=1, train=True, background="white", skip_broken=False,
    image_size=32,
):  # fmt: skip
    """Load a data set.

    name: one of NAMED_SETS, or set:NAME where a folder has that name, too; a folder with one
    sub-folder per class, or with pictures alone, which are one class; or an .npz file;
    data_dir: where a named set's files are; without it data/ and Debian's folder are searched, and
    the set is downloaded to data/ if it is in neither;  channels: 1 (grey) or 3 (colour);
    train: the training or the test images; a folder or .npz file without test images has one set,
    used for both;  background: the colour behind transparent pictures;  skip_broken: leave out
    pictures that cannot be read;  image_size: one of IMAGE_SIZES.
    Returns ImageData.  Raises InputError, which names the file that is missing or wrong.
    """
    path = Path(name)
    set_name = name.removeprefix("set:")
    source = name
    notes = []
    if name in NAMED_SETS and data_dir is None and path.is_dir():
        raise InputError(
            f"{name!r} is a named data set, and a folder here: write ./{name} for the folder, "
            f"set:{name} for the set"
        )
    if skip_broken and (set_name in NAMED_SETS or path.is_file()):
        raise InputError(f"--skip-broken is for folders, and {name} is none: leave it out")
    if set_name in IDX_SETS:
        images, labels, class_names, source = _load_idx(set_name, data_dir, train)
    elif set_name in TORCHVISION_SETS:
        images, labels, class_names, source = _load_torchvision(set_name, data_dir, train)
    elif data_dir is not None and path.exists():
        raise InputError(f"--data-dir is for named sets, and {name} is none: leave it out")
    elif path.is_dir():
        images, labels, class_names, notes = _load_folder(
            path, channels, train, background, skip_broken, image_size
        )
        images, labels = torch.cat(images), torch.tensor(labels)
    elif path.suffix.lower() == ".npz" and path.is_file():
        images, labels, class_names, notes = _load_npz(path, train)
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    else:
        named = ", ".join(NAMED_SETS)
        raise InputError(
            f"no data set {name!r}: give one of {named}, a folder of pictures, or an .npz"
        )
    if images.shape[1] != channels:  # grey becomes three equal channels; colour its luminance
        from torchvision.transforms.functional import rgb_to_grayscale

        if channels == 3:
            images = images.expand(-1, 3, -1, -1)
        else:
            images = torch.cat([rgb_to_grayscale(part) for part in images.split(1000)])
    if images.shape[2:] != (image_size, image_size):
        _check_memory(len(images), channels, image_size)
        images = torch.cat([_to_image_size(part, image_size) for part in images.split(1000)])
    return ImageData(images.contiguous(), labels, class_names, source, notes)


def without_held_out(data):
    """An ImageData without every sixth image, those that evaluate.py --hold-out compares with."""
    kept = torch.arange(len(data.labels)) % 6 != 5
    images, labels = data.images[kept], data.labels[kept]
    source = f"{data.source}, every sixth image held out"
    notes = [*data.notes]
    if never := {*data.labels.tolist()} - {*data.labels[~kept].tolist()}:
        names = ", ".join(data.class_names[y] for y in sorted(never)[:10])
        notes.append(f"warning: no image is held out of {names}")
    return replace(data, images=images, labels=labels, source=source, notes=notes)


def with_mirrored(data):
    """An ImageData with all images, and after them all images again, left and right exchanged."""
    count, *shape = data.images.shape
    _check_memory(count, shape[0], shape[1], copies=3)
    images = data.images.new_empty(2 * count, *shape)
    images[:count] = data.images
    for part in torch.arange(count).split(1000):
        images[count + part] = data.images[part].flip(-1)
    source = f"{data.source}, each image also mirrored"
    return replace(data, images=images, labels=data.labels.repeat(2), source=source)


def _check_memory(count, channels, image_size, copies=2):
    """Raise InputError where images would not fit into memory, where the system says its size.

    copies: how often they are there at once: the parts, and then all of them in one tensor.
    """
    needed = copies * count * channels * image_size**2
    if not hasattr(os, "sysconf"):  # Windows
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise InputError(
            f"{count:,} images of {channels}x{image_size}x{image_size} need {needed / 1e9:,.1f} GB "
            f"while they are read, and this machine has {there / 1e9:,.1f} GB: give fewer, or a "
            "smaller --image-size"
        )


def _to_image_size(images, image_size):
    """uint8 (N, C, H, W) -> (N, C, image_size, image_size): the middle square, resized.

    28x28 is framed to 32x32 first, in the colour of its corners; in black where they differ.
    """
    if images.shape[-2:] == (28, 28):
        corners = images[..., [0, 0, -1, -1], [0, -1, 0, -1]]  # (N, C, 4)
        alike = (corners == corners[..., :1]).flatten(1).all(1)
        colour = corners[..., 0] * alike[:, None]
        framed = colour[..., None, None].repeat(1, 1, 32, 32)
        framed[..., 2:30, 2:30] = images
        images = framed
    if images.shape[-2:] == (image_size, image_size):
        return images
    side = min(images.shape[-2:])
    from torchvision.transforms.functional import center_crop, resize

    return resize(center_crop(images, [side, side]), [image_size, image_size], antialias=True)


def _load_idx(name, data_dir, train):
    """Find the two IDX files of a split, verify them, and let torchvision parse them."""
    from torchvision import datasets

    class_name, debian_dir, sums = IDX_SETS[name]
    dataset_class = getattr(datasets, class_name)
    wanted = IDX_FILES[:2] if train else IDX_FILES[2:]
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder")
    places = [Path(data_dir or "data")]
    if debian_dir and data_dir is None:
        places.append(Path(debian_dir))
    found = _find_idx(places, class_name, wanted)
    if found is None and data_dir is not None:
        raw = f"{class_name}/raw"
        raise InputError(f"--data-dir {data_dir} and its {raw} have no {wanted[0]} (or .gz)")
    if found is None:
        _download(dataset_class, Path("data"), f"{class_name}/raw")
        found = _find_idx(places, class_name, wanted)

    readers = {"images": datasets.mnist.read_image_file, "labels": datasets.mnist.read_label_file}
    parsed = []
    with tempfile.TemporaryDirectory() as scratch:  # torchvision's parser takes a plain file
        for file, base, kind in zip(found, wanted, readers, strict=True):
            content = _read_verified(file, name, sums and sums[IDX_FILES.index(base)])
            plain = Path(scratch, base)
            plain.write_bytes(content)
            try:
                parsed.append(readers[kind](str(plain)))
            except Exception as error:  # its reader fails in many ways
                raise InputError(f"{file} is not an IDX file of {kind}") from error
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
    """The paths of the wanted files (plain or .gz) in the first place that has any, or None."""
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


def _download(dataset_class, root, folder, **options):
    """torchvision's download, its files moved into place only when all are there."""
    root.mkdir(parents=True, exist_ok=True)
    target = root / folder
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        try:
            dataset_class(scratch, download=True, **options)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{dataset_class.__name__} was not found and could not be downloaded ({reason}); "
                f"put its files into {target}, or name their folder with --data-dir"
            ) from error
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(scratch, folder).iterdir():  # what else is there stays
            file.replace(target / file.name)


def _read_verified(file, name, sha256):
    """Decompressed bytes of `file`; InputError if it is broken, of another set than `name`, or not
    the published file, whose sum is sha256, None if there is none.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:
        raise InputError(
            f"{file} is corrupted ({error}): delete it and run again, or name another --data-dir"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    found = [other for other, (*_, sums) in IDX_SETS.items() if digest in (sums or ())]
    if found and found != [name]:
        hint = f"name the folder of {name} with --data-dir"
        raise InputError(f"{file} is of {found[0]}, not of {name}: {hint}")
    if sha256 and digest != sha256:
        raise InputError(
            f"{file} is not the published file (its SHA-256 differs): "
            "delete it, or name another --data-dir"
        )
    return content


def _load_torchvision(name, data_dir, train):
    """A set that torchvision finds, verifies and reads by itself."""
    from torchvision import datasets

    class_name, options, folder = TORCHVISION_SETS[name]
    dataset_class = getattr(datasets, class_name)
    place = Path(data_dir or "data", folder)
    if data_dir is None and not place.exists():
        _download(dataset_class, Path("data"), folder, **options)
    try:
        found = dataset_class(data_dir or "data", train=train, **options)
    except Exception as error:  # its readers fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{place} does not hold the published files of {name} ({reason}): "
            "delete it and run again, or name another --data-dir"
        ) from error
    images = torch.as_tensor(found.data)
    labels = torch.as_tensor(found.targets)
    class_names = list(found.classes)
    if class_name == "EMNIST":
        images = images.transpose(1, 2)[:, None]  # its files have columns where others have rows
    else:
        images = images.permute(0, 3, 1, 2)
    if class_names[0] == "N/A":  # emnist-letters counts from 1
        class_names = class_names[1:]
        labels = labels - 1
    if len(images) != len(labels) or not 0 <= labels.min() <= labels.max() < len(class_names):
        raise InputError(f"{place}: the labels of {name} do not go with its images or classes")
    return images, labels, class_names, f"{name} ({place})"


def _load_folder(path, channels, train, background, skip_broken, image_size):
    """Read a folder of class folders, or of pictures alone.

    Returns lists of images, as load_image returns them, and of labels; class names and notes.
    """
    folders = _class_folders(path)
    if not train and (beside := _test_folder(path)):
        if unknown := sorted({*_class_folders(beside)} - {*folders}):
            raise InputError(f"{beside} has the class {unknown[0]}, which {path} does not have")
        path = beside
    skipped = Counter()
    files = []  # (path, label)
    for y, folder in enumerate(folders):
        files += [(file, y) for file in _files_below(path / folder, path, skipped)]
    entries = sorted(path.iterdir(), key=lambda entry: entry.name)
    skipped["hidden"] += sum(_is_hidden(entry.name) for entry in entries)
    outer = [entry for entry in entries if not (entry.is_dir() or _is_hidden(entry.name))]
    if folders:
        skipped["beside the class folders"] = len(outer)
    else:
        files = [(file, 0) for file in outer]

    _check_memory(len(files), channels, image_size)
    images = []
    labels = []
    for file, y in tqdm(files, f"reading {path}", unit="file", delay=1, leave=False):
        try:
            images.append(load_image(file, channels, background, image_size))
            labels.append(y)
        except InputError as error:
            if not _is_picture(file):  # a text, or a file of the system's
                skipped[file.suffix or "without an ending"] += 1
            elif skip_broken:
                skipped["unreadable"] += 1
            else:
                raise InputError(f"{error}; --skip-broken leaves such pictures out") from error
    counts = [f"{count:,} {what}" for what, count in skipped.most_common() if count]
    notes = [f"files skipped: {', '.join(counts)}"] if counts else []
    if not images:
        found = f" ({notes[0]})" if notes else ""
        raise InputError(f"{path} needs one sub-folder of images per class, or images alone{found}")
    return images, labels, folders or UNLABELLED, notes


def _class_folders(path):
    """The names of the class folders, in order; InputError where they are train, val and test."""
    folders = [f for f in path.iterdir() if f.is_dir() and not _is_hidden(f.name)]
    folders.sort(key=lambda f: f.name)  # on Windows, too, where paths ignore case
    for folder in folders:
        inside = [*folder.iterdir()] if folder.name.lower() in TRAINS + TESTS else []
        if any(map(Path.is_dir, inside)) and not any(map(_is_picture, inside)):
            names = ", ".join(f.name for f in folders)
            train = min(folders, key=lambda f: f.name.lower() not in TRAINS)
            raise InputError(
                f"{path} holds {names}, which are no classes: name the folder of the training "
                f"images, as in --data {train}"
            )
    return [folder.name for folder in folders]


def _test_folder(path):
    """The folder of test images beside one of training images; None for other folders.

    Both hold class folders, or neither does: a folder test may have no labels.
    """
    place = path.absolute()
    if place.name.lower() not in TRAINS:
        return None
    labelled = bool(_class_folders(place))
    beside = {f.name.lower(): f for f in place.parent.iterdir() if f.is_dir()}
    found = [beside[name] for name in TESTS if name in beside]
    return next((f for f in found if bool(_class_folders(f)) == labelled), None)


def _refuse(error):
    """For os.walk, which else leaves out a folder that cannot be read."""
    if not isinstance(error, FileNotFoundError):  # test images need not have all classes
        raise error


def _files_below(folder, root, skipped):
    """The files in a folder and its sub-folders, in order.

    root: the folder of the data set;  skipped: a Counter, of what is hidden and of links that lead
    back to where they are.
    """
    found = []
    seen = set()
    for here, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        place = Path(here).resolve()
        if place in seen or root.resolve().is_relative_to(place):
            skipped["links that lead back"] += 1
            folders.clear()
            continue
        seen.add(place)
        skipped["hidden"] += sum(map(_is_hidden, [*folders, *files]))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [(here, name) for name in files if not _is_hidden(name)]
    return [Path(*parts) for parts in sorted(found, key=lambda x: (Path(x[0]).as_posix(), x[1]))]


def _is_hidden(name):
    """Whether a file or folder is not the user's: .DS_Store, ._x.png, __MACOSX, __pycache__."""
    return name.startswith((".", "__"))


def _is_picture(file):
    """Whether a file's name ends as those of pictures do; pillow may open others, too."""
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


def load_image(path, channels, background="white", image_size=32):
    """An image file as uint8 (1, channels, H, W). Raises InputError if it cannot be read.

    background: the colour behind a transparent picture;  image_size: H = W, one of IMAGE_SIZES.
    """
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as picture:
            # A large JPEG is decoded at an eighth to a half of its size, which is much faster.
            picture.draft(None, (4 * image_size, 4 * image_size))
            picture = upright(picture, background).convert("L" if channels == 1 else "RGB")
            return _to_image_size(pil_to_tensor(picture)[None], image_size)
    except Exception as error:  # pillow's readers fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable image ({reason})") from error


def upright(picture, background):
    """A PIL picture as RGB, turned as its EXIF orientation says, without transparency.

    background: the colour that shows where the picture is transparent; the colours that a file
    keeps there are mostly black.  Raises ValueError for more than 8 bits a channel, which pillow
    would clip to white silently.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a channel")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(behind, picture.convert("RGBA"))
    return picture.convert("RGB")


def _load_npz(path, train):
    """Read images uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3, and labels (N,), (N, 1).

    Their names are those of NPZ_KEYS.  class_names (classes,) may be there too; else the classes
    are called 0, 1, ....  Images without labels are one class.
    Returns images (N, C, H, W) and labels int64 (N,), arrays; class names and notes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = set(file)
            keys = [key for four in NPZ_KEYS if four[0] in held for key in four]
            arrays = {key: np.asarray(file[key]) for key in {*keys, "class_names"} & held}
    except Exception as error:  # NumPy raises errors of many types here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable .npz of plain arrays ({reason})") from error
    if len(keys) != 4 or (keys[1] not in held and held - {keys[0], keys[2]}):
        pairs = ", or ".join(f"{images} and {labels}" for images, labels, _, _ in NPZ_KEYS)
        raise InputError(f"{path} {_holds(path)}: it needs the arrays {pairs}")
    has_others = not train and keys[2] in held
    images_key, labels_key = keys[2:] if has_others else keys[:2]
    x = arrays[images_key]
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise InputError(
            f"{path} {_holds(path)}: {images_key} must be uint8 (N, H, W), (N, H, W, 1|3) or "
            "(N, 1|3, H, W)"
        )
    x = x.copy()
    if keys[1] not in held:
        return x, np.zeros(len(x), np.int64), UNLABELLED, []

    y = arrays.get(labels_key, np.empty(0))
    every_y = [arrays[key] for key in {keys[1], keys[3]} & held]  # the test set may lack a class
    whole = all(
        labels.dtype.kind in "iu" and labels.size and labels.min() >= 0 for labels in every_y
    )
    if not whole or y.shape not in ((len(x),), (len(x), 1)):
        raise InputError(f"{path} {_holds(path)}: {labels_key} must be {len(x)} integers from 0 up")
    last = max(int(labels.max()) for labels in every_y)
    if "class_names" in held:
        names = arrays["class_names"].ravel()
        if names.dtype.kind == "S":
            names = np.char.decode(names, "utf-8", "backslashreplace")
        names = [str(name) for name in names]
    elif last < 10_000:
        names = [str(i) for i in range(last + 1)]
    else:
        raise InputError(
            f"{path}: {labels_key} goes up to {last}; labels must count the classes from 0 up, at "
            "most 10,000 of them"
        )
    if last >= len(names):
        raise InputError(f"{path}: labels go up to {last}, but there are {len(names)} class_names")
    notes = [] if images_key == "x" else [f"images: {images_key}, labels: {labels_key}"]
    return x, y.reshape(len(x)).astype(np.int64), names, notes


def _holds(path):
    """'holds x uint8 (60000, 28, 28), y uint8 (60000,)', of an .npz."""
    found = []
    with np.load(path, allow_pickle=False) as file:
        for key in file:
            try:
                found.append(f"{key} {file[key].dtype} {file[key].shape}")
            except Exception:  # of a broken zip, of plain bytes: of many types, too
                found.append(f"{key} (no plain array)")
    return f"holds {', '.join(found) or 'no arrays'}"


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8 0..255, the exact inverse of `to_float`; values beyond are clipped.

    Raises ValueError for values that are not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("images have values that are not finite")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def subsample(items, count):
    """At most `count` of the items, evenly spaced: data read from folders is sorted by class."""
    return items[:: math.ceil(len(items) / count)]


def fold(name):
    """'T-shirt/top' -> 't-shirt-top': what spellings of a name share, and safe in a file name.

    Letters, digits and, beyond ASCII, marks and symbols stay, in lower case and NFC.
    """
    text = unicodedata.normalize("NFC", name.upper().lower())  # upper() makes SS of a sharp s
    joiners = "\u200c\u200d"  # within words of some scripts, and within emoji
    return "".join(
        c
        if c.isalnum() or c in joiners or (c > "\x7f" and unicodedata.category(c)[0] in "MS")
        else "-"
        for c in text
    )


def file_stems(class_names):
    """Each class as a part of a file name: short, and different even where case is ignored."""
    stems = [fold(name)[:50] for name in class_names]
    count = Counter(stems)
    return [
        stem if stem and count[stem] == 1 else f"{stem or 'class'}_{y}"
        for y, stem in enumerate(stems)
    ]


def same_classes(text, class_names, exact):
    """The indices of the classes that a text names: exactly (NFC), or folded."""

    def form(name):
        if exact:
            return unicodedata.normalize("NFC", name)
        # A comma matches only a comma: fold would make it a dash.
        return [fold(part.strip()) for part in name.split(",")] if "," in text else fold(name)

    return [y for y, name in enumerate(class_names) if form(name) == form(text)]


def is_index(text, class_names):
    """Whether a text is an index of a class: 0 ... number of classes - 1."""
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    return is_number and str(int(text)) == text and int(text) < len(class_names)


def class_index(text, class_names, where="the model"):
    """The index of the class that a text names.

    Tried in this order: the exact name (NFC), an index, the folded name, a beginning of one folded
    name.  where: the file that has the classes, for errors.  Raises InputError, which lists the
    indices of an ambiguous name, or suggests similar names.
    """
    stems = [fold(name) for name in class_names]
    stem = fold(text)
    last = len(class_names) - 1
    if stem == "all":
        raise InputError("all means every class, and stands alone: name such a class by its index")
    found = same_classes(text, class_names, exact=True)
    if not found and is_index(text, class_names):
        return int(text)
    found = found or same_classes(text, class_names, exact=False)
    if not found and stem.strip("-") and not stem.isdecimal():
        found = [y for y, other in enumerate(stems) if other.startswith(stem)]
    if len(found) == 1:
        return found[0]
    if found:
        indices = ", ".join(f"{y} ({class_names[y]})" for y in found[:10])
        more = ", ..." if len(found) > 10 else ""
        raise InputError(f"{where}: class {text!r} is ambiguous, give an index: {indices}{more}")
    similar = difflib.get_close_matches(stem, dict.fromkeys(stems), n=3) or stems
    names = [class_names[y] for y, other in enumerate(stems) if other in similar]
    suggested = ", ".join([*dict.fromkeys(unicodedata.normalize("NFC", n) for n in names)][:10])
    raise InputError(
        f"{where} has no class {text!r}: did you mean {suggested}? (or 0..{last}, or all)"
    )


def parse_classes(text, class_names, where="the model"):
    """'Sneaker', 'sneaker,bag', '7', 'T-shirt' or 'all' -> list of class indices.

    The whole text may be a name with commas in it, else commas separate names: an exact match of
    the whole comes first, then exact ones of all parts, then folded ones in the same order.  Parts
    are as in class_index.  Raises InputError.
    """
    if text.strip().lower() == "all":
        return list(range(len(class_names)))
    parts = [part.strip() for part in text.split(",")]
    known = [same_classes(p, class_names, exact=True) or is_index(p, class_names) for p in parts]
    is_name = same_classes(text, class_names, exact=True) or (
        not all(known) and same_classes(text, class_names, exact=False)
    )
    return [class_index(part, class_names, where) for part in ([text] if is_name else parts)]


def note_on_all(class_names):
    """Say how to ask for a class that is called all."""
    for y, name in enumerate(class_names):
        if name.strip().lower() == "all":
            print(f"class {y} is called {name}: --class {y} is that class, --class all every class")


# Options of `sample`: a kind of number and its range, or the choices.
RANGES = {
    "steps": (Integral, 1, math.inf),
    "guidance": (Real, 0, 1000),
    "guidance_interval": (Real, 0, 1),  # each of the two
    "eta": (Real, 0, 1),
    "truncation": (Real, 0.1, math.inf),
    "seed": (Integral, 0, 2**63 - 1),
    "first": (Integral, 0, 2**63 - 1),
    "batch_size": (Integral, 1, math.inf),
}
CHOICES = {
    "solver": ("ddim", "dpm++"), "variance": ("small", "large"), "prior": ("fitted", "normal"),
}  # fmt: skip
OPTIONAL = ("steps", "guidance", "truncation")  # None is the default, or no truncation


def check_options(**options):
    """Raise InputError for an option of `sample` that is not one of its values."""
    for name, value in options.items():
        if value is None and name in OPTIONAL:
            continue
        if name in CHOICES:
            if value not in CHOICES[name]:
                raise InputError(f"{name} {value!r} is not one of {', '.join(CHOICES[name])}")
            continue
        kind, low, high = RANGES[name]
        is_pair = name == "guidance_interval"
        if is_pair and (not isinstance(value, list | tuple) or len(value) != 2):
            raise InputError(f"{name} {value!r} is not a pair (low, high)")
        for number in value if is_pair else [value]:
            is_number = isinstance(number, kind) and not isinstance(number, bool)
            if not is_number or not low <= number <= high or number == math.inf:
                noun = "whole number" if kind is Integral else "number"
                limits = f"from {low} to {high}" if high < math.inf else f"from {low}"
                raise InputError(f"{name} {number!r} is not a {noun} {limits}")


def label_indices(labels, class_names):
    """The labels of `sample` as a list of indices into class_names.

    labels: a list, array or tensor of indices or names.  Raises InputError.
    """
    given = labels.tolist() if hasattr(labels, "tolist") else labels
    right = f"a list of 0..{len(class_names) - 1} or of class names"
    if not isinstance(given, list | tuple | range) or not len(given):
        raise InputError(f"labels {labels!r} are not {right}")
    given = [y.tolist() if hasattr(y, "tolist") else y for y in given]
    names = {y: class_index(y, class_names) for y in given if isinstance(y, str)}
    found = [names[y] if isinstance(y, str) else y for y in given]
    for y in found:
        # Without this check CUDA would read beyond the table of class embeddings.
        if type(y) is not int or not 0 <= y < len(class_names):
            raise InputError(f"labels are not {right}: {y!r} is none")
    return found


# --- Noise ----------------------------------------------------------------------------------------


def noise_streams(seed, indices):
    """One NumPy generator per image, keyed by (seed, image index).

    Image i starts from the same noise whatever the batch, the device or the runtime (torch or
    ONNX Runtime).
    """
    keys = [np.array([seed, i], np.uint64) for i in indices]  # a list of large ones turns to floats
    return [np.random.Generator(np.random.Philox(key=key)) for key in keys]


def next_noise(streams, shape):
    """The next standard normal array of every stream: float32 (len(streams), *shape)."""
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


# --- Embeddings -----------------------------------------------------------------------------------


def sinusoidal_embedding(t, dim):
    """Positions t, int64 (B,), as sines and cosines of geometric frequencies: float32 (B, dim).

    Vaswani et al. 2017 (arXiv:1706.03762) section 3.5, with all sines before all cosines:
    components i and i + dim/2 are sin and cos of t / 10000^(2i/dim).  dim must be even.
    """
    if dim % 2:
        raise ValueError(f"dim {dim} is odd; sine and cosine come in pairs")
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2)
    )
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeClassEmbedding(nn.Module):
    """(t, y) -> (B, emb_channels): an MLP of the timestep plus a learned row per class.

    t: int64 (B,);  y: int64 (B,) in [0, num_classes), or NULL_LABEL, whose row is the first.
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


# --- UNet -----------------------------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm with 16 channels a group (fewer where 16 does not divide the width)."""
    return nn.GroupNorm(channels // math.gcd(channels, 16), channels)


def zero_init(layer):
    """A layer that outputs 0 at the start: a block begins as its shortcut, a network at 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + f(x, emb): two normalised 3x3 convolutions; between them the embedding scales and shifts.

    As in ADM (Dhariwal & Nichol 2021, arXiv:2105.05233).
    """

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
    """x + multi-head self-attention over the H * W positions, with heads of 32 channels.

    Vaswani et al. 2017, eq. (1).  Written out, since the backward pass of
    F.scaled_dot_product_attention is slow in bfloat16 on CPUs.
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
        # For each q, over all k.
        weights = torch.softmax(k.transpose(2, 3) @ q * (c // self.heads) ** -0.5, dim=2)
        return x + self.out((v @ weights).reshape(b, c, h, w))


class UNet(nn.Module):
    """The denoiser of ddpm.py, ddim.py, ldm.py and distill.py: UNet(x_t, t, y) -> like x_t.

    channels      image (or latent) channels
    num_classes   labels are 0..num_classes-1, or NULL_LABEL
    widths        channels of each resolution, finest first; each is half the size of the one before
    depths        residual blocks of each resolution, on the way down and again on the way up,
                  joined by skip connections; the last is the bottom, which is passed once
    patch         space-to-depth: p x p pixels become p * p channels first, and pixels again at the
                  end; the cheapest way to a smaller grid
    attention     self-attention between the blocks of the bottom, or after its only one
    emb_channels  size of the time and class embedding

    x_t: (B, channels, H, W) float, H and W divisible by patch * 2^(len(widths) - 1);
    t, y: int64 (B,).
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
                f"--widths {widths} and --depths {depths} must have the same length, "
                "and be 1 or more"
            )
        last = widths[-1]
        if attention and last > 32 and last % 32:
            raise InputError(
                f"--widths: the last, {last}, must be a multiple of 32, for attention heads of 32"
            )
        if emb_channels < 4 or emb_channels % 4:
            raise InputError(f"--emb-channels {emb_channels} must be a multiple of 4")
        self.patch = patch
        self.class_names = [str(y) for y in range(num_classes)]  # until ema_network knows them
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
            self.bottom.append(ResidualBlock(last, last, emb_channels))
            if attention and i < max(1, depths[-1] - 1):
                self.bottom.append(SelfAttention(last))
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
