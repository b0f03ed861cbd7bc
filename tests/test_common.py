"""common.py: data sets, the range pair, noise, image files, embeddings and the UNet."""

import argparse
import gzip
import hashlib
import math
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_NETWORK, idx_bytes, small_set, write_idx
from PIL import Image
from torchvision import datasets
from torchvision.utils import make_grid

import common
import infer_onnx
import runs
from common import NULL_LABEL, InputError, UNet, load_data

# --- Ranges ---------------------------------------------------------------------------------------


def test_ranges_are_exact_inverses_on_every_grey_level():
    levels = torch.arange(256, dtype=torch.uint8)
    x = common.to_float(levels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(common.to_uint8(x), levels)


def test_to_uint8_clips_and_refuses_nan():
    assert common.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="finite"):
        common.to_uint8(torch.tensor([0.0, math.nan]))


# --- IDX sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", ["elsewhere", "elsewhere/FashionMNIST/raw"])
def test_idx_set_is_read_padded_and_described(fashion, in_tmp, compress, place):
    fashion(in_tmp / place, compress=compress)
    data = load_data("fashion-mnist", in_tmp / "elsewhere")
    images, labels = small_set()
    assert data.images.shape == (60, 1, 32, 32) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0, 2:-2, 2:-2], images)
    assert data.images[:, :, :2].max() == 0
    assert data.labels.dtype == torch.int64 and np.array_equal(data.labels, labels)
    assert data.class_names[7] == "Sneaker" and data.class_names[0] == "T-shirt/top"
    for part in ("60 images", "10 classes", "of 6 to 6", "0..255"):
        assert part in str(data)


def test_train_and_test_are_different_splits(fashion, in_tmp):
    fashion(in_tmp / "d")
    train, test = load_data("fashion-mnist", "d"), load_data("fashion-mnist", "d", train=False)
    assert np.array_equal(test.labels, small_set(seed=1)[1])
    assert not torch.equal(train.images, test.images)


def test_places_are_searched_in_order(fashion, in_tmp, monkeypatch):
    downloads = []
    monkeypatch.setattr(
        common, "_download", lambda dataset_class, root, folder: downloads.append(write_idx(root))
    )
    fashion(in_tmp / "unused")
    assert "(data)" in load_data("fashion-mnist").source and downloads  # nothing there: downloaded
    write_idx(in_tmp / "debian", compress=True)
    assert "(data)" in load_data("fashion-mnist").source  # data/ comes before Debian's folder
    for file in (in_tmp / "data").iterdir():
        file.unlink()
    assert str(in_tmp / "debian") in load_data("fashion-mnist").source and len(downloads) == 1
    write_idx(in_tmp / "asked")
    assert "asked" in load_data("fashion-mnist", "asked").source  # --data-dir comes first


def test_a_failed_download_leaves_nothing(in_tmp, monkeypatch):
    class Broken:
        def __init__(self, root, download):
            (common.Path(root) / "Broken").mkdir()
            # as torchvision says it
            raise RuntimeError("Error downloading x.gz:\nTried mirror, got:\nconnection lost")

    monkeypatch.setattr(datasets, "MNIST", Broken)
    with pytest.raises(InputError, match=r"connection lost.*--data-dir"):
        load_data("mnist")
    assert list((in_tmp / "data").iterdir()) == []


def test_a_download_replaces_nothing_but_its_own_folder(in_tmp, monkeypatch):
    class Fake:
        classes = datasets.KMNIST.classes

        def __init__(self, root, download):
            write_idx(common.Path(root) / "Fake" / "raw")

    existing = in_tmp / "data/Fake/cat/1.png"
    existing.parent.mkdir(parents=True)
    existing.write_bytes(b"mine")
    monkeypatch.setitem(common.IDX_SETS, "kmnist", ("Fake", None, None))
    monkeypatch.setattr(datasets, "Fake", Fake, raising=False)
    assert len(load_data("kmnist").images) == 60 and existing.read_bytes() == b"mine"
    assert sorted(f.name for f in (in_tmp / "data").iterdir()) == ["Fake"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "corrupt", [truncate, flip, lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"<html>")]
)
@pytest.mark.parametrize("which", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_broken_file_is_named(fashion, in_tmp, compress, corrupt, which):
    file = fashion(in_tmp / "d", compress=compress) / (which + ".gz" * compress)
    corrupt(file)
    with pytest.raises(InputError, match=f"{file.name} (is corrupted|is not the published file)"):
        load_data("fashion-mnist", "d")


def test_a_broken_cached_copy_is_not_ignored(fashion, in_tmp):
    truncate(fashion(in_tmp / "data") / "train-images-idx3-ubyte")
    write_idx(in_tmp / "debian")
    with pytest.raises(InputError, match="data/train-images-idx3-ubyte is not the published file"):
        load_data("fashion-mnist")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(59)), "60 images but .* 59 labels"),
        ("train-labels-idx1-ubyte", idx_bytes(np.full(60, 10)), r"labels outside 0\.\.9"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros((60, 28, 28))), "not an IDX file of labels"),
        ("train-images-idx3-ubyte", idx_bytes(np.zeros(60)), "not an IDX file of images"),
        ("train-images-idx3-ubyte", idx_bytes(small_set()[0])[:-1], "not an IDX file of images"),
        ("train-images-idx3-ubyte", idx_bytes(np.zeros((60, 8, 8))), "not 28x28"),
        ("train-images-idx3-ubyte", b"PK\x03\x04 not idx at all", "not an IDX file of images"),
    ],
)
def test_a_set_without_sums_is_still_checked(in_tmp, file, content, message):
    write_idx(in_tmp / "d")
    (in_tmp / "d" / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_data("kmnist", "d")


def test_missing_files_and_folders_are_named(in_tmp):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_data("kmnist", "nowhere")
    with pytest.raises(InputError, match="have no train-images-idx3-ubyte"):
        load_data("kmnist", in_tmp)
    write_idx(in_tmp)
    (in_tmp / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="no train-labels-idx1-ubyte"):
        load_data("kmnist", in_tmp)
    with pytest.raises(InputError, match=r"no data set 'cifar'.*fashion-mnist"):
        load_data("cifar")


def test_real_fashion_mnist_matches_its_published_sums():
    _, debian, sums = common.IDX_SETS["fashion-mnist"]
    if not common.Path(debian).is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    data = load_data("fashion-mnist", debian, train=False)
    assert data.images.shape == (10_000, 1, 32, 32)
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    content = gzip.decompress(common.Path(debian, "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == sums[3]


# --- Folders and arrays ---------------------------------------------------------------------------


def write_folder(root, size=(28, 28), mode="RGB"):
    for i, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for j in range(3):
            level = 40 * i + j
            colour = (level, 100, 200) if mode == "RGB" else level
            Image.new(mode, size, colour).save(root / name / f"{j}.png")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (50, 40)])
def test_folder_of_class_folders(in_tmp, channels, size):
    write_folder(in_tmp / "pets", size)
    data = load_data("pets", channels=channels)
    assert data.images.shape == (6, channels, 32, 32) and data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    middle = data.images[4, :, 16, 16].tolist()
    luma = round(0.299 * 41 + 0.587 * 100 + 0.114 * 200)
    assert middle == ([41, 100, 200] if channels == 3 else [luma])


def test_broken_folders_are_named(in_tmp):
    (in_tmp / "empty").mkdir()
    with pytest.raises(InputError, match="one sub-folder of images per class"):
        load_data("empty")
    write_folder(in_tmp / "pets", mode="L")
    (in_tmp / "pets/dog/1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"dog/1\.png is not a readable image"):
        load_data("pets")
    Image.fromarray(np.full((28, 28), 3000, np.uint16)).save(in_tmp / "pets/dog/1.png")
    with pytest.raises(InputError, match=r"dog/1\.png .*more than 8 bits"):
        load_data("pets")


@pytest.mark.parametrize(
    "shape", [(5, 28, 28), (5, 28, 28, 1), (5, 28, 28, 3), (5, 3, 28, 28), (5, 1, 40, 40)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_layouts(in_tmp, shape, channels):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez("d.npz", x=x, y=np.arange(5), class_names=np.array(list("abcde")))
    data = load_data("d.npz", channels=channels)
    assert data.images.shape == (5, channels, 32, 32) and data.class_names == list("abcde")
    if shape == (5, 28, 28, 3) and channels == 3:
        assert np.array_equal(data.images[:, :, 2:-2, 2:-2], x.transpose(0, 3, 1, 2))
    if shape == (5, 28, 28):
        assert all(np.array_equal(data.images[:, c, 2:-2, 2:-2], x) for c in range(channels))


X, Y = np.zeros((4, 28, 28), np.uint8), np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": Y}, "needs the arrays x"),
        ({"x": X.astype(np.float32), "y": Y}, "must be uint8"),
        ({"x": X[:, :, 0], "y": Y}, "must be uint8"),
        ({"x": X[:0], "y": Y[:0]}, "must be uint8"),
        ({"x": X, "y": Y[:3]}, "4 integers from 0"),
        ({"x": X, "y": Y - 1}, "4 integers from 0"),
        ({"x": X, "y": Y.astype(float)}, "4 integers from 0"),
        ({"x": X, "y": Y, "class_names": np.array(["a", "b"])}, "go up to 3"),
        ({"x": X, "y": Y * 10_000}, "at most 10,000"),
        ({"x": X, "y": np.array([0, 1, 2, {}], dtype=object)}, "plain arrays"),
    ],
)
def test_bad_npz_is_named(in_tmp, arrays, message):
    np.savez("d.npz", **arrays)
    with pytest.raises(InputError, match=rf"d\.npz.*{message}"):
        load_data("d.npz")


def test_an_npy_under_the_name_of_an_npz_is_named(in_tmp):
    with (in_tmp / "d.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(InputError, match=r"d\.npz is not a readable"):
        load_data("d.npz")


def test_an_archive_of_other_files_is_named(in_tmp):
    """NumPy gives the bytes of a member that is no .npy, and zipfile has errors of its own."""
    with zipfile.ZipFile("pictures.npz", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(InputError, match=r"pictures\.npz holds a\.txt \(no plain array\): it need"):
        load_data("pictures.npz")
    with zipfile.ZipFile("text.npz", "w") as file:
        file.writestr("x", "x")
        file.writestr("y", "y")
    with pytest.raises(InputError, match=r"text\.npz .*x must be uint8"):
        load_data("text.npz")
    np.savez("d.npz", z=X)
    content = Path("d.npz").read_bytes()
    Path("d.npz").write_bytes(content.replace(b"z.npy", b"y.npy", 1))  # not in the directory
    with pytest.raises(InputError, match=r"d\.npz holds z \(no plain array\)"):
        load_data("d.npz")


def test_truncated_npz_is_named(in_tmp):
    np.savez("d.npz", x=X, y=Y)
    truncate(in_tmp / "d.npz")
    with pytest.raises(InputError, match=r"d\.npz is not a readable"):
        load_data("d.npz")


# --- Batches, classes, noise ----------------------------------------------------------------------


def test_epoch_batches_cover_the_data_once_and_depend_on_seed_and_epoch_alone():
    batches = runs.epoch_batches(103, 10, seed=1, epoch=2)
    assert batches.shape == (10, 10) and len(set(batches.flatten().tolist())) == 100
    assert torch.equal(batches, runs.epoch_batches(103, 10, seed=1, epoch=2))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(batches, runs.epoch_batches(103, 10, *other))
    with pytest.raises(InputError, match=r"--batch-size 104 .* 1\.\.103"):
        runs.epoch_batches(103, 104, 0, 0)


NAMES = ["T-shirt/top", "Trouser", "Sneaker", "Ankle boot"]
EMNIST = [*"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
# Names that differ in case, in signs, in marks and symbols alone, with commas, and called all.
AWKWARD = [
    "Cat", "cat", "Shoes, Boots", "shoes", "1,000", "\N{ATHLETIC SHOE}", "\N{HANDBAG}",
    "cafe\u0301", "\u0e01\u0e34", "\u0e01\u0e35", "all", "a/b", "a b",
    "\N{GREEK SMALL LETTER ALPHA} 1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "names", "indices"),
    [
        ("Sneaker", NAMES, [2]),
        ("sNEAKER", NAMES, [2]),
        ("2", NAMES, [2]),
        ("t-shirt/top", NAMES, [0]),
        ("T-shirt-top", NAMES, [0]),
        ("ankle boot, 1,sneaker", NAMES, [3, 1, 2]),
        ("all", NAMES, [0, 1, 2, 3]),
        ("T-shirt", NAMES, [0]),  # a beginning
        ("ankle,Tr", NAMES, [3, 1]),
        ("3", ["3", "2", "1", "0"], [0]),  # a name, though an index too
        ("Cat,cat", AWKWARD, [0, 1]),
        ("Shoes, Boots", AWKWARD, [2]),
        ("shoes,boots", AWKWARD, [2]),
        ("shoes--boots,shoes", AWKWARD, [2, 3]),
        ("Shoes, Cat", AWKWARD, [3, 0]),
        ("shoes,Boots", ["Shoes,Boots", "shoes", "Boots"], [1, 2]),  # exact parts before folding
        ("1,000", AWKWARD, [4]),
        ("1,2", AWKWARD, [1, 2]),
        ("\N{HANDBAG}", AWKWARD, [6]),
        ("caf\u00e9", AWKWARD, [7]),
        ("CAFE\u0301", AWKWARD, [7]),
        ("\u0e01\u0e35", AWKWARD, [9]),
        ("ALL", AWKWARD, [*range(14)]),
        ("10", AWKWARD, [10]),  # the class called all
        ("a/b", AWKWARD, [11]),
        ("\N{GREEK CAPITAL LETTER ALPHA}", AWKWARD, [13]),
    ],
)
def test_parse_classes(text, names, indices):
    assert common.parse_classes(text, names) == indices


def test_every_class_of_emnist_is_found_by_its_name():
    assert [common.parse_classes(name, EMNIST) for name in EMNIST] == [[y] for y in range(62)]


@pytest.mark.parametrize("text", ["Sneakr", "", "4", "-1", "Sneaker,", "²", "1.0", "-", "01"])
def test_unknown_classes_are_refused_with_help(text):
    with pytest.raises(InputError, match=r"FILE has no class .* did you mean .*0\.\.3"):
        common.parse_classes(text, NAMES, "FILE")


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("CAT", AWKWARD, r"FILE: class 'CAT' is ambiguous, give an index: 0 \(Cat\), 1 \(cat\)$"),
        ("a-b", AWKWARD, r"give an index: 11 \(a/b\), 12 \(a b\)$"),
        ("S", ["Sandal", "Shirt", "Bag"], r"ambiguous, give an index: 0 \(Sandal\), 1 \(Shirt\)$"),
        ("caf\u00e9", ["caf\u00e9", "cafe\u0301"], r"ambiguous, give an index: 0 .*, 1 "),
        ("all,Cat", AWKWARD, "all means every class, and stands alone"),
        ("1,000", NAMES, "no class '000'"),
        ("10", ["100 g", "200 g"], "no class '10'"),  # no beginning: it would be an index
        ("\N{HIGH-HEELED SHOE}", AWKWARD, "no class"),
        ("Cta", AWKWARD, r"did you mean Cat, cat\? "),
        ("kat", ["cat", "ca\u0074", "dog"], r"did you mean cat\? "),
    ],
)
def test_what_is_not_one_class_is_refused(text, names, message):
    with pytest.raises(InputError, match=message):
        common.parse_classes(text, names, "FILE")


def test_a_class_called_all_is_said(capsys):
    common.note_on_all(NAMES)
    assert capsys.readouterr().out == ""
    common.note_on_all(AWKWARD)
    assert capsys.readouterr().out.startswith("class 10 is called all: --class 10 is that class")


def test_file_stems_are_safe_and_readable_and_differ():
    assert common.file_stems(NAMES) == ["t-shirt-top", "trouser", "sneaker", "ankle-boot"]
    names = [*AWKWARD, "../../etc/passwd", "C:x\\y\0", "", "x" * 300, "x" * 301, "cat_0"]
    stems = common.file_stems(names)
    assert stems[:2] == ["cat_0", "cat_1"] and stems[5] == "\N{ATHLETIC SHOE}"
    assert stems[8:10] == ["\u0e01\u0e34", "\u0e01\u0e35"] and stems[7] == "caf\u00e9"
    assert len({stem.casefold() for stem in stems}) == len(names)
    for stem in stems:
        assert stem and not set(stem) & set('/\\.:*?"<>|\0 ') and len(stem.encode()) < 220


def test_noise_of_an_image_does_not_depend_on_the_batch():
    shape = (1, 32, 32)
    together = common.next_noise(common.noise_streams(7, range(5)), shape)
    assert together.dtype == np.float32 and together.shape == (5, *shape)
    alone = common.noise_streams(7, [3])
    assert np.array_equal(common.next_noise(alone, shape)[0], together[3])
    assert not np.array_equal(common.next_noise(alone, shape)[0], together[3])  # the next noise
    other = common.next_noise(common.noise_streams(8, [3]), shape)[0]
    assert not np.array_equal(other, together[3])
    many = common.next_noise(common.noise_streams(0, range(200)), shape)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_program(first):
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt), runs.signals_caught() as caught:
            signal.raise_signal(first)
            assert caught == [first]
            signal.raise_signal(signal.SIGINT)
    finally:
        after = signal.signal(signal.SIGINT, was)
    assert caught == [first] and after is signal.default_int_handler


def test_a_log_out_is_one_signal():
    """A desktop or systemd may send SIGHUP at once after SIGTERM: the run is still saved."""
    with runs.signals_caught() as caught:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    assert caught == [signal.SIGTERM, signal.SIGHUP]


# --- Files ----------------------------------------------------------------------------------------


def test_written_whole_leaves_the_old_file_when_the_block_fails(in_tmp):
    file = in_tmp / "new" / "x.txt"
    with runs.written_whole(file) as scratch:
        scratch.write_text("first")
    with pytest.raises(RuntimeError), runs.written_whole(file) as scratch:
        scratch.write_text("half of the sec")
        raise RuntimeError
    assert file.read_text() == "first" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 8), (7, 3)])
def test_a_grid_is_that_of_torchvision(channels, count, columns):
    levels = torch.randint(0, 256, (count, channels, 32, 32), dtype=torch.uint8)
    expected = make_grid(levels, nrow=columns, padding=2)[:channels]
    picture = runs.image_grid(common.to_float(levels), columns)
    scale = picture.width // expected.shape[2]
    pixels = np.array(picture)[::scale, ::scale].reshape(*expected.shape[1:], channels)
    assert np.array_equal(pixels, expected.permute(1, 2, 0))


@pytest.mark.parametrize("channels", [1, 3])
def test_save_images(in_tmp, channels):
    levels = torch.randint(0, 256, (6, channels, 32, 32), dtype=torch.uint8)
    images, labels = common.to_float(levels), torch.tensor([2, 2, 2, 0, 0, 0])
    runs.save_images(images, labels, NAMES, runs.Path("grid.png"), 3, {"seed": 5})
    picture = Image.open("grid.png")
    scale = picture.width // (3 * 34 + 2)
    assert picture.size == (scale * (3 * 34 + 2), scale * (2 * 34 + 2))
    assert picture.mode == ("L" if channels == 1 else "RGB")
    # row 1, column 0: image 3 at (5, 9)
    pixel = np.array(picture)[scale * (34 + 2 + 5), scale * (2 + 9)]
    assert np.array_equal(np.atleast_1d(pixel), levels[3, :, 5, 9])
    assert picture.text == {"seed": "5", "class": f"{NAMES[2]}, {NAMES[0]}"}
    runs.save_images(images, labels, NAMES, runs.Path("all.npz"), 3, {})
    back = load_data("all.npz", channels=channels)
    assert torch.equal(back.images, levels)
    assert torch.equal(back.labels, labels)
    assert back.class_names == NAMES
    runs.save_images(images, labels, NAMES, runs.Path("folder"), 3, {"seed": 5})
    names = sorted(file.name for file in (in_tmp / "folder").iterdir())
    assert names[0] == "00000_sneaker.png" and names[5] == "00005_t-shirt-top.png"
    assert torch.equal(common.load_image(in_tmp / "folder" / names[4], channels)[0], levels[4])


def test_a_row_has_a_name_where_it_has_one_class():
    assert runs.names_of_rows([2, 2, 2, 0, 0, 0], NAMES, 3) == [NAMES[2], NAMES[0]]
    assert runs.names_of_rows([1, 1, 1], NAMES, 2) == [NAMES[1], NAMES[1]]
    assert runs.names_of_rows([1, 1, 2, 2], NAMES, 3) is None
    assert runs.names_of_rows([1], NAMES, 1) is None


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_names_are_whole_and_beside_their_rows(mode):
    grid = Image.new(mode, (50, 120), "black")
    long = "ddim, steps 20, guidance 1.6, guidance limit 0.6, solver dpm++"
    picture = runs.with_names(grid, ["", long, "two\nlines"])
    pixels = np.array(picture.convert("L"))
    margin = picture.width - 50
    assert picture.mode == mode and picture.height == 120 and (pixels[:, margin:] == 0).all()
    names = pixels[:, :margin]
    assert (names[:, :8] == 255).all() and (names[:, -8:] == 255).all()  # nothing is cut off
    empty, full, short = ((row < 128).any(axis=0) for row in np.split(names, 3))
    assert not empty.any() and short.any()
    assert full.nonzero()[0][0] < 14 < short.nonzero()[0][0]  # the longest fills the margin
    assert runs.with_names(grid, ["x" * 5000]).width < 2000


@pytest.mark.parametrize("module", [runs, infer_onnx])
def test_a_new_folder_is_named_with_a_slash(module, in_tmp):
    Path("there").mkdir()
    for text in ("x.png", "new/", "there", "a/b/"):
        assert module.output_path(text) == Path(text)
    for text in ("-", "new", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="has no ending: a new folder is"):
            module.output_path(text)


def test_outputs_that_cannot_be_written_are_refused_before_the_work(in_tmp):
    (in_tmp / "full").mkdir()
    (in_tmp / "full/x").touch()
    for name in ("y.png", "out.v2"):
        (in_tmp / name).mkdir()
    for name, message in (
        ("x.jpg", "must end in .png or .npz, or be a folder"),
        ("full", "holds files"),
        ("y.png", "is a folder: name another"),
        ("out.v2", "is a folder: name another"),
    ):
        with pytest.raises(InputError, match=message):
            runs.check_output(common.Path(name), [".png", ".npz", ""])
    for name in ("new.png", "new"):
        runs.check_output(common.Path(name), [".png", ".npz", ""])


# --- Embeddings and UNet --------------------------------------------------------------------------


def test_sinusoidal_embedding_against_its_formula():
    found = common.sinusoidal_embedding(torch.tensor([0, 3, 999]), 8)
    for row, t in zip(found, (0, 3, 999), strict=True):
        angles = [t / 10_000 ** (2 * i / 8) for i in range(4)]
        assert row.tolist() == pytest.approx(
            [*map(math.sin, angles), *map(math.cos, angles)], abs=1e-4
        )
    with pytest.raises(ValueError, match="odd"):
        common.sinusoidal_embedding(torch.tensor([0]), 7)


def randomised(network):
    """Every weight random: the zeros of the initialisation would hide most mistakes."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network


@pytest.mark.parametrize(
    ("channels", "size", "numbers"),
    [
        (1, 32, {}),
        (3, 32, {"patch": 1, "widths": (8, 16, 32), "depths": (1, 2, 1)}),
        (1, 32, {"patch": 4, "widths": (32,), "depths": (2,)}),
        (4, 8, {"patch": 1, "widths": (16, 32), "depths": (1, 1)}),
        (1, 8, {"patch": 1, "widths": (16,), "depths": (1,), "attention": False}),
        (1, 8, {"patch": 1, "widths": (16,), "depths": (1,)}),
    ],
)
def test_unet_shapes_and_start(channels, size, numbers):
    network = UNet(channels=channels, num_classes=5, **numbers)
    x_t = torch.randn(3, channels, size, size)
    t = torch.tensor([0, 5, 999])
    y = torch.tensor([0, 4, NULL_LABEL])
    assert network(x_t, t, y).abs().max() == 0  # the zero-initialised head
    output = randomised(network)(x_t, t, y)
    assert output.shape == x_t.shape and output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(("depth", "expected"), [(1, 1), (2, 1), (3, 2)])
def test_unet_attends_at_the_lowest_resolution_and_nowhere_else(depth, expected):
    for attention in (True, False):
        network = UNet(widths=(8, 16), depths=(2, depth), attention=attention)
        modules = network.named_modules()
        layers = [name for name, m in modules if isinstance(m, common.SelfAttention)]
        assert len(layers) == expected * attention
        assert all(name.startswith("bottom") for name in layers)


def test_unet_sees_time_and_class_and_treats_images_apart():
    network = randomised(UNet(**TINY_NETWORK)).eval()
    x_t = torch.randn(1, 1, 32, 32).repeat(12, 1, 1, 1)
    t, y = torch.tensor([500] * 11 + [501]), torch.tensor([*range(10), NULL_LABEL, 0])
    with torch.no_grad():
        outputs = network(x_t, t, y)
        distances = torch.cdist(outputs.flatten(1), outputs.flatten(1)) + torch.eye(12)
        # every class, "no class" and the other timestep give different outputs
        assert distances.min() > 1e-4
        assert torch.allclose(network(x_t[3:4], t[3:4], y[3:4]), outputs[3:4], atol=1e-5)


def test_attention_against_a_loop():
    layer = randomised(common.SelfAttention(64)).eval()
    x = torch.randn(2, 64, 4, 4)
    qkv = layer.qkv(layer.norm(x)).flatten(2)
    expected = torch.empty(2, 64, 16)
    for b in range(2):
        for head in range(2):
            q, k, v = (
                qkv[b, part * 64 + head * 32 : part * 64 + (head + 1) * 32] for part in range(3)
            )
            for i in range(16):
                products = torch.stack([q[:, i] @ k[:, j] / 32**0.5 for j in range(16)])
                weights = torch.softmax(products, dim=0)
                expected[b, head * 32 : (head + 1) * 32, i] = (weights * v).sum(dim=1)
    assert torch.allclose(layer(x), x + layer.out(expected.view(2, 64, 4, 4)), atol=1e-4)


@pytest.mark.parametrize(
    "numbers",
    [{"widths": (32,)}, {"widths": (32, 48)}, {"widths": (), "depths": ()}, {"emb_channels": 6}],
)
def test_bad_network_numbers_are_refused(numbers):
    with pytest.raises(InputError):
        UNet(**numbers)


# --- Muon and bfloat16 ----------------------------------------------------------------------------


def test_muon_turns_along_the_singular_vectors_of_a_gradient_and_leaves_the_rest_to_adamw():
    """Jordan et al. 2024: a weight matrix's first update is about U V^T of its gradient's SVD."""
    network, twin = (common.UNet(widths=(16, 32), depths=(1, 1), emb_channels=16) for _ in range(2))
    network.to(memory_format=torch.channels_last)
    twin.load_state_dict(network.state_dict())
    muon = runs.Muon(network.named_parameters(), 0.01, weight_decay=0.0, fused=False)
    adamw = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    torch.manual_seed(0)
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    muon.step()
    adamw.step()
    turned = 0
    for (name, p), q in zip(network.named_parameters(), twin.parameters(), strict=True):
        if p.ndim == 1 or name.split(".")[0] in ("stem", "head", "embedding"):
            assert torch.allclose(p, q, atol=1e-6), name
            continue
        u, _, vt = torch.linalg.svd(q.grad.flatten(1), full_matrices=False)
        update = (before[name] - p.detach()).flatten(1)
        scale = 0.01 * 0.2 * max(u.shape[0], vt.shape[1]) ** 0.5
        step = u.T @ update @ vt.T / scale
        assert step.diag().min() > 0.6 and step.diag().max() < 1.3, name
        assert (step - step.diag().diag()).abs().max() < 0.05, name
        turned += 1
    assert turned > 8
    muon.zero_grad()
    assert all(p.grad is None for p in network.parameters())


def test_muon_has_nesterov_momentum_and_decoupled_decay():
    """Written out for three steps: m <- 0.95 m + 0.05 g, and the step is along 0.05 g + 0.95 m."""
    matrix = torch.nn.Parameter(torch.randn(8, 12))
    expected, m = matrix.detach().clone(), torch.zeros(8, 12)
    other = torch.nn.Parameter(torch.ones(3), requires_grad=True)
    muon = runs.Muon([("down.weight", matrix), ("norm.weight", other)], 0.01, 0.1, False)
    for _ in range(3):
        matrix.grad = g = torch.randn(8, 12)
        other.grad = torch.ones(3)
        m = 0.95 * m + 0.05 * g
        muon.step()
        step = runs.orthogonal(0.05 * g + 0.95 * m)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 12**0.5 * step
    assert torch.allclose(matrix, expected, atol=1e-6)


@pytest.mark.parametrize("units", [(), ("amx_bf16",), ("avx512_bf16",)])
def test_bfloat16_is_the_default_where_the_cpu_computes_in_it(monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    for flag, expected in ((None, bool(units)), (True, True), (False, False)):
        with runs.autocast(torch.device("cpu"), flag):
            found = torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype
        assert found == (torch.bfloat16 if expected else torch.float32)
