"""People's own pictures for evaluate.py, which has no torch: a folder, or an .npz file.

They are read as common.py reads them for training: what has its names is its text, which a test
compares, and so are the images, up to a grey level where they are resized.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import infer_onnx
from infer_onnx import InputError, fold

try:
    from tqdm import tqdm
except ImportError:

    def tqdm(items, *_, **__):
        return items


NPZ_KEYS = (
    ("x", "y", "x", "y"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
UNLABELLED = ["images"]  # the one class of pictures without classes
# Names of folders that are parts of a data set, not classes; of those to test, the first is taken.
TRAINS = ("train", "training", "training_set")
TESTS = ("test", "testing", "test_set", "val", "valid", "validation")

# --- Both parts -----------------------------------------------------------------------------------


def load(path, image_shape, background, skip_broken):
    """A folder or an .npz: (short name, class names, training images, test images or None, notes).

    Both are (uint8 images (N, C, H, W) of image_shape, labels int64 (N,)).  The name is also for
    files; of pets/train it is pets.  Raises InputError.
    """

    def read(train):
        if path.is_dir():
            images, labels, *rest = _load_folder(
                path, image_shape[0], train, background, skip_broken, image_shape[1]
            )
            return (np.concatenate(images), np.array(labels, np.int64)), *rest
        images, labels, *rest = _load_npz(path, train)
        return (fit(images, image_shape), labels), *rest

    train, class_names, notes = read(True)
    if path.is_dir():
        has_test = _test_folder(path)
    else:
        with np.load(path) as file:  # beside x there are no test images, whatever they are called
            has_test = {*file} & {keys[2] for keys in NPZ_KEYS[1:] if keys[0] in file}
    test = None
    if has_test:
        test, _, of_test = read(False)
        notes = [*notes, *(f"of the test images: {note}" for note in of_test)]
    place = path.resolve()
    place = place.parent if place.name.lower() in TRAINS else place
    return fold(place.stem).strip("-") or "data", class_names, train, test, notes


def fit(images, image_shape):
    """uint8 images (N, C, H, W) in the channels and the size of image_shape."""
    if images.shape[1:] == image_shape:
        return images
    fitted = []
    for x in images:
        if len(x) == 3 and image_shape[0] == 1:  # as torchvision's rgb_to_grayscale
            r, g, b = x.astype(np.float32)
            x = (0.2989 * r + 0.587 * g + 0.114 * b).astype(np.uint8)[None]
        picture = Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0))
        fitted.append(infer_onnx.to_pixels(picture, image_shape))
    return np.stack(fitted)


def load_image(path, channels, background, image_size):
    """An image file as uint8 (1, channels, H, W), H = W = image_size. Raises InputError."""
    return infer_onnx.read_pixels(path, [channels, image_size, image_size], background)[None]


# --- As in common.py ------------------------------------------------------------------------------


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
