"""Their own pictures: what people have is read as it looks, or refused in a line."""

import hashlib
import importlib
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import (
    LOOPS, ROOT, TINY, TINY_FLAGS, equal, idx_bytes, log_of, refused, state, with_card,
)  # fmt: skip
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets

import common
import ddim
import evaluate
import explore
import infer_onnx
from common import InputError, load_data, load_image

RNG = np.random.default_rng(0)


def picture(path, level=0, mode="L", **options):
    """A 32x32 picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (32, 32), level).save(path, **options)


def noise(path, size=(32, 32), **options):
    """A picture of random colours, another one at each call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path, **options)


def pets(root, count=6):
    for name in ("cat", "dog"):
        for i in range(count):
            noise(root / name / f"{i}.png")


def read(path, channels, background="white"):
    """An image as load_image and as infer_onnx.read_pixels see it, which must agree: uint8."""
    found = load_image(path, channels, background)[0]
    other = infer_onnx.read_pixels(path, [channels, 32, 32], background)
    assert np.abs(found.int().numpy() - other).max() <= 1
    return found


# --- Transparency, orientation, formats -----------------------------------------------------------


def disc(mode, path):
    """A black disc in the middle of a picture whose rest is transparent, over hidden black."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill=(0, 0, 0, 255))
    if mode == "P":
        alpha = image.getchannel("A").point(lambda a: 1 if a else 0)
        palette = Image.frombytes("P", image.size, alpha.tobytes())
        palette.putpalette([0] * 6)
        palette.save(path, transparency=0)
    elif mode == "RGB":
        colour = Image.new("RGB", image.size, (0, 0, 1))
        colour.paste(0, mask=image.getchannel("A"))
        colour.save(path, transparency=(0, 0, 1))
    else:
        image.convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_shows_the_background(in_tmp, mode, channels):
    disc(mode, "disc.png")
    for background, behind in (("white", (255, 255, 255)), ("#ff8000", (255, 128, 0))):
        image = read("disc.png", channels, background)
        luma = [round(0.299 * behind[0] + 0.587 * behind[1] + 0.114 * behind[2])]
        assert image[:, 0, 0].tolist() == (list(behind) if channels == 3 else luma)
        assert image[:, 16, 16].tolist() == [0] * channels


def test_half_transparent_pixels_are_mixed_and_opaque_pictures_stay(in_tmp):
    Image.new("RGBA", (32, 32), (0, 0, 0, 128)).save("half.png")
    assert read("half.png", 1).unique().tolist() == [127]
    levels = np.arange(1024).reshape(32, 32).astype(np.uint8)
    Image.fromarray(levels).save("grey.png")
    assert np.array_equal(load_image("grey.png", 1)[0, 0], levels)
    assert np.array_equal(load_image("grey.png", 3)[0, 2], levels)


# EXIF 2.3, tag 0x0112: the sides of the picture at which row 0 and column 0 of the file are seen.
SIDES = ("TL", "TR", "BR", "BL", "LT", "RT", "RB", "LB")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_read_as_its_camera_was_held(in_tmp, orientation):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:32, :32] = 255  # row 0, column 0
    pixels[:32, 32:] = 128  # row 0, last column
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save("photo.jpg", exif=exif)
    found = read("photo.jpg", 1)[0].float()
    row, column = SIDES[orientation - 1]
    opposite = dict(zip("TBLR", "BTRL", strict=True))
    levels = {frozenset(row + column): 255, frozenset(row + opposite[column]): 128}
    halves = {"T": slice(0, 13), "B": slice(19, 32), "L": slice(0, 13), "R": slice(19, 32)}
    for v in "TB":
        for h in "LR":
            mean = found[halves[v], halves[h]].mean()
            assert abs(mean - levels.get(frozenset(v + h), 0)) < 10


def test_a_large_photo_is_decoded_small_and_looks_the_same(in_tmp):
    small = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    photo = small.resize((800, 600), Image.Resampling.BICUBIC)
    photo.save("photo.jpg", quality=95)
    photo.save("photo.png")
    sizes = []
    transpose = ImageOps.exif_transpose

    def spy(image):
        sizes.append(image.size)
        return transpose(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageOps, "exif_transpose", spy)
        found, exact = (load_image(f"photo.{ending}", 3).float() for ending in ("jpg", "png"))
    assert sizes == [(200, 150), (800, 600)]
    assert (found - exact).abs().mean() < 2 and (found - exact).abs().max() < 12


# --- Folders --------------------------------------------------------------------------------------


def test_names_of_systems_and_editors_are_no_data(in_tmp):
    pets(in_tmp / "pets", 2)
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/x.png", "cat/._x.png", "cat/.cache/x.png"):
        noise(in_tmp / "pets" / name)
    for name in ("cat/Thumbs.db", "cat/about.txt", "dog/b.txt", "dog/LICENSE", "README.md"):
        (in_tmp / "pets" / name).write_text("no picture")
    data = load_data("pets")
    assert data.class_names == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1, 1]
    (note,) = data.notes
    for part in ("4 hidden", "1 .db", "2 .txt", "1 without an ending", "1 beside the class"):
        assert part in note
    assert "classes: cat 2, dog 2" in str(data)


def test_every_file_that_pillow_opens_is_taken(in_tmp):
    endings = ["gif", "jfif", "jpe", "avif", "webp", "PNG", "bmp", "tif", "ppm"]
    for i, ending in enumerate(endings):
        noise(in_tmp / f"all/cat/{i}.{ending}", format="JPEG" if ending[0] == "j" else None)
    shutil.copy("all/cat/5.PNG", "all/cat/without")
    data = load_data("all", channels=3)
    assert len(data.images) == len(endings) + 1 and data.notes == []
    assert torch.equal(data.images[5], data.images[-1])


@pytest.mark.parametrize(
    ("links", "labels"),
    [
        ({"cat": "../cat"}, [0, 1]),
        ({"cat": ".."}, [0, 1]),
        ({"cat": "../../.."}, [0, 1]),
        ({"cat": "../dog", "dog": "../cat"}, [0, 0, 1, 1]),  # each has the other's, once
    ],
)
def test_links_that_lead_back_are_not_followed(in_tmp, links, labels):
    for name in ("cat", "dog"):
        noise(in_tmp / f"here/pets/{name}/0.png")
    for name, target in links.items():
        (in_tmp / f"here/pets/{name}/link").symlink_to(target)
    data = load_data("here/pets")
    assert data.labels.tolist() == labels and "links that lead back" in data.notes[0]


def test_a_link_to_pictures_elsewhere_is_followed(in_tmp):
    noise(in_tmp / "elsewhere/deeper/0.png")
    (in_tmp / "pets").mkdir()
    (in_tmp / "pets/cat").symlink_to("../elsewhere")
    assert load_data("pets").class_names == ["cat"]


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("TRAIN", "val"), ("Training", "Testing"), ("train", "valid")],
)
def test_parts_of_a_data_set_are_no_classes(in_tmp, train, test):
    for level, part in enumerate((train, test)):
        for name in ("cat", "dog")[level:]:
            picture(in_tmp / "set" / part / name / "0.png", level)
    (in_tmp / "set" / train / ".DS_Store").touch()
    with pytest.raises(InputError, match=f"no classes.* --data set/{train}$"):
        load_data("set")
    assert load_data(f"set/{train}").labels.tolist() == [0, 1]
    data = load_data(f"set/{train}", train=False)
    assert data.labels.tolist() == [1] and data.images.unique().tolist() == [1]
    picture(in_tmp / "set" / test / "eel/0.png")
    with pytest.raises(InputError, match="has the class eel, which set/"):
        load_data(f"set/{train}", train=False)


def test_a_folder_test_without_labels_is_passed_over(in_tmp):
    for part, value in (("train", 0), ("val", 1)):
        picture(in_tmp / f"set/{part}/cat/0.png", value)
    picture(in_tmp / "set/test/7.png", 2)
    assert load_data("set/train", train=False).images.unique().tolist() == [1]


def test_a_link_to_nowhere_is_refused_by_name(in_tmp):
    noise(in_tmp / "alone/0.png")
    (in_tmp / "alone/1.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"alone/1\.png"):
        load_data("alone")


def test_classes_of_which_no_image_is_held_out_are_named():
    images = torch.zeros(60, 1, 32, 32, dtype=torch.uint8)
    data = common.ImageData(images, torch.arange(60) % 3, ["ant", "bee", "cow"], "in turn", [])
    kept = common.without_held_out(data)
    assert len(kept.labels) == 50
    assert kept.notes == ["warning: no image is held out of ant, bee"]
    whole = replace(data, labels=torch.arange(60) % 5 % 3)
    assert common.without_held_out(whole).notes == []


def test_classes_that_are_called_test_hold_pictures(in_tmp):
    for name in ("quiz", "test"):
        noise(in_tmp / f"papers/{name}/2020/0.png")
        noise(in_tmp / f"papers/{name}/0.png")
    assert load_data("papers").class_names == ["quiz", "test"]


@pytest.mark.parametrize("content", [b"", b"GIF89a", None])
def test_one_broken_picture_is_named_or_left_out(in_tmp, content):
    pets(in_tmp / "pets")
    path = in_tmp / "pets/dog/3.png"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(InputError, match=r"dog/3\.png is not a readable image .*--skip-broken"):
        load_data("pets")
    data = load_data("pets", skip_broken=True)
    assert data.labels.tolist() == [0] * 6 + [1] * 5 and data.notes == [
        "files skipped: 1 unreadable"
    ]


def test_flags_that_data_have_no_use_for_are_refused(in_tmp, data_dir):
    """By the reader of the training and by that of the scores, in the same words."""
    pets(in_tmp / "pets")
    np.savez("x.npz", x=np.zeros((40, 32, 32), np.uint8), y=np.arange(40) % 2)
    for name, flags, message in (
        ("pets", {"data_dir": data_dir}, "--data-dir is for named sets, and pets is none"),
        ("x.npz", {"data_dir": data_dir}, "--data-dir is for named sets, and x.npz is none"),
        ("x.npz", {"skip_broken": True}, "--skip-broken is for folders, and x.npz is none"),
        ("kmnist", {"skip_broken": True}, "--skip-broken is for folders, and kmnist is none"),
    ):
        flags = {"data_dir": None, **flags}
        for load, kind in (load_data, InputError), (evaluate.load_real, infer_onnx.InputError):
            with pytest.raises(kind, match=f"{message}: leave it out"):
                load(name, **flags)


def test_classes_without_images_and_constant_pictures_are_said(in_tmp):
    pets(in_tmp / "pets", 4)
    (in_tmp / "pets/eel").mkdir()
    for i in range(3):
        picture(in_tmp / f"pets/dog/blank{i}.png", (9, 0, i), "RGB")
    said = str(load_data("pets", channels=3))
    assert "classes: cat 4, dog 7, eel 0" in said and "warning: no images of eel" in said
    assert "warning: 3 of 11 images are constant" in said
    np.savez("x.npz", x=np.zeros((40, 32, 32), np.uint8), y=np.arange(40) * 2)
    said = str(load_data("x.npz"))
    assert "no images of 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 and 29 more" in said
    assert "classes: 0 1, 1 0, 2 1, 3 0, 4 1, 5 0, 6 1, 7 0, 8 1, 9 0, ..." in said


def test_a_bar_is_shown_while_pictures_are_read(in_tmp, monkeypatch, capsys):
    pets(in_tmp / "pets")
    slow = common.tqdm
    monkeypatch.setattr(common, "tqdm", lambda *a, **k: slow(*a, **{**k, "delay": 0}))
    load_data("pets")
    assert "reading pets" in capsys.readouterr().err


# --- Names and arrays -----------------------------------------------------------------------------


def test_a_folder_with_the_name_of_a_set_is_ambiguous(in_tmp, data_dir):
    pets(in_tmp / "kmnist")
    with pytest.raises(InputError, match=r"\./kmnist for the folder, set:kmnist for the set"):
        load_data("kmnist")
    assert load_data("./kmnist").class_names == ["cat", "dog"]
    shutil.copytree(data_dir, "data/KMNIST/raw")
    for name, folder in (("set:kmnist", None), ("kmnist", data_dir), ("set:kmnist", data_dir)):
        assert len(load_data(name, folder).images) == 60


def test_files_of_another_set_are_refused(fashion, in_tmp):
    """That of KMNIST has no published sums: its name would be all that counts."""
    folder = fashion(in_tmp / "elsewhere")
    with pytest.raises(InputError, match="is of fashion-mnist, not of kmnist: name the folder of"):
        load_data("kmnist", folder)


X, Y = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8), np.array([0, 2, 1, 2], np.uint8)


def test_class_names_of_bytes_are_text(in_tmp):
    names = np.array([b"cat", "h\u00e9".encode(), b"\xff"])
    np.savez("x.npz", x=X, y=Y % 3, class_names=names)
    assert load_data("x.npz").class_names == ["cat", "h\u00e9", r"\xff"]


@pytest.mark.parametrize("keys", common.NPZ_KEYS[1:])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_npz_files_of_keras_and_medmnist(in_tmp, keys, shape):
    values = (X, Y.reshape(shape), X[:1] // 2, np.full((1, *shape[1:]), 3))
    arrays = dict(zip(keys, values, strict=True))
    np.savez("x.npz", val_images=X, **arrays)
    train, test = load_data("x.npz"), load_data("x.npz", train=False)
    assert train.class_names == test.class_names == ["0", "1", "2", "3"]
    assert train.labels.tolist() == Y.tolist() and test.labels.tolist() == [3]
    assert np.array_equal(train.images[:, 0, 2:-2, 2:-2], X)
    assert np.array_equal(test.images[:, 0, 2:-2, 2:-2], X[:1] // 2)
    assert f"images: {keys[0]}, labels: {keys[1]}" in str(train)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": X}, r"holds data uint8 \(4, 28, 28\): it needs the arrays x and y, or x_train"),
        ({"x": X, "labels": Y}, r"labels uint8 \(4,\), x uint8.*: it needs|x uint8.*labels uint8"),
        ({"x": X, "class_names": np.array(["a"])}, "class_names <U1.*it needs"),
        ({"x": X, "y": Y, "x_train": X, "y_train": Y}, "it needs the arrays"),
        (
            {"x_train": X / 255, "y_train": Y},
            r"x_train float64 \(4, 28, 28\).*x_train must be uint8",
        ),
        ({"train_images": X, "train_labels": np.zeros((4, 14), int)}, r"\(4, 14\).* must be 4 int"),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y - 1.0},
            "y_train must be 4 integers",
        ),
        ({"x": X, "y": Y, "y_test": Y, "x_test": np.array([{}])}, None),
        ({}, "holds no arrays"),
    ],
)
def test_other_npz_files_are_refused_with_what_they_hold(in_tmp, arrays, message):
    np.savez("x.npz", **arrays)
    if message is None:  # arrays that nobody asks for do not matter
        assert len(load_data("x.npz").images) == 4
        return
    with pytest.raises(InputError, match=message) as error:
        load_data("x.npz")
    assert "\n" not in str(error.value)


# --- Named sets -----------------------------------------------------------------------------------


def write_cifar10(root, monkeypatch):
    """Small files of CIFAR-10's format, whose sums torchvision then finds in its lists."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = split("airplane automobile bird cat deer dog frog horse ship truck")
    images = RNG.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    labels = [i % 10 for i in range(30)]
    sums = {}
    for name, rows in (("data_batch_1", slice(20)), ("test_batch", slice(20, 30))):
        rows = {"data": images[rows].reshape(-1, 3072), "labels": labels[rows]}
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    return images, labels


def test_cifar10_is_read_and_verified(in_tmp, monkeypatch):
    images, labels = write_cifar10(in_tmp / "data", monkeypatch)
    data = load_data("cifar10", channels=3)
    assert np.array_equal(data.images, images[:20]) and data.labels.tolist() == labels[:20]
    assert data.class_names[3] == "cat" and "cifar10 (data/cifar-10-batches-py)" in str(data)
    test = load_data("set:cifar10", "data", channels=3, train=False)
    assert np.array_equal(test.images, images[20:]) and test.labels.tolist() == labels[20:]
    luma = images[:20].transpose(0, 2, 3, 1) @ [0.299, 0.587, 0.114]
    assert np.abs(load_data("cifar10").images[:, 0].numpy() - luma).max() < 1.1
    with (in_tmp / "data/cifar-10-batches-py/test_batch").open("ab") as file:
        file.write(b".")
    with pytest.raises(InputError, match="does not hold the published files of cifar10"):
        load_data("cifar10")


@pytest.mark.parametrize(("name", "first", "count"), [("balanced", 0, 47), ("letters", 1, 26)])
def test_emnist_stands_upright_and_has_its_classes(in_tmp, name, first, count):
    """The files of EMNIST hold each image mirrored at its diagonal; letters count from 1."""
    folder = in_tmp / "data/EMNIST/raw"
    folder.mkdir(parents=True)
    upright = RNG.integers(0, 256, (count, 28, 28))
    labels = np.arange(count) + first
    for part in ("train", "test"):
        stem = folder / f"emnist-{name}-{part}"
        stem.with_name(f"{stem.name}-images-idx3-ubyte").write_bytes(
            idx_bytes(upright.transpose(0, 2, 1))
        )
        stem.with_name(f"{stem.name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    data = load_data(f"emnist-{name}")
    assert np.array_equal(data.images[:, 0, 2:-2, 2:-2], upright)
    assert data.labels.tolist() == [*range(count)] and len(data.class_names) == count
    known = {"balanced": ["0", "9", "A", "Z", "a", "t"], "letters": ["a", "z"]}[name]
    assert [y for y in data.class_names if y in known] == known
    stem.with_name(f"{stem.name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels + count))
    with pytest.raises(InputError, match="do not go with its images or classes"):
        load_data(f"emnist-{name}", train=False)


def test_a_set_of_torchvision_that_is_not_there_is_downloaded_whole(in_tmp, monkeypatch):
    class Fake(datasets.CIFAR10):
        def download(self):
            write_cifar10(common.Path(self.root), monkeypatch)

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    with pytest.raises(InputError, match="elsewhere/cifar-10-batches-py does not hold"):
        load_data("cifar10", "elsewhere")
    assert len(load_data("cifar10").images) == 20
    assert [file.name for file in (in_tmp / "data").iterdir()] == ["cifar-10-batches-py"]


def test_a_download_keeps_what_is_there(in_tmp):
    class Fake:
        def __init__(self, root, download):
            write(common.Path(root, "X/raw/new"))

    def write(path):
        path.parent.mkdir(parents=True)
        path.write_text("")

    write(in_tmp / "data/X/raw/mine")
    common._download(Fake, common.Path("data"), "X/raw")
    assert sorted(path.name for path in (in_tmp / "data/X/raw").iterdir()) == ["mine", "new"]
    assert [path.name for path in (in_tmp / "data").iterdir()] == ["X"]


# --- Runs -----------------------------------------------------------------------------------------

OWN = [*split("--train --epochs 2 --warmup 0 --channels 3"), *TINY, "--batch-size", "4"]


def resume(name, *flags):
    return importlib.import_module(name).main(["--resume", "--run-dir", "run", *flags])


def not_resumed(capsys, *flags):
    return refused(ddim.main, ["--resume", "--run-dir", "run", *flags], capsys)


@pytest.fixture
def own_run(in_tmp):
    """A run of ddim.py on the folder pets, in the folder run."""
    pets(in_tmp / "pets")
    assert ddim.main([*OWN, "--data", "pets/", "--run-dir", "run"]) == 0
    return in_tmp


def test_data_may_move_between_sessions(own_run, monkeypatch, capsys):
    whole = (own_run / "run/ddim.pt").read_bytes()
    (own_run / "other").mkdir()
    monkeypatch.chdir(own_run / "other")  # the data stay where they are
    shutil.copytree("../run", "run")
    assert resume("ddim", "--epochs", "3") == 0
    expected = state(own_run / "other/run")["ddim.pt"]
    monkeypatch.chdir(own_run)
    (own_run / "pets").rename("animals")
    assert "pets, is not there: say where it is with --data" in not_resumed(capsys)
    for place in ("animals", "./animals/", str(own_run / "animals")):
        (own_run / "run/ddim.pt").write_bytes(whole)
        assert resume("ddim", "--data", place, "--epochs", "3") == 0
        assert equal(state(own_run / "run")["ddim.pt"], expected), place


def test_other_data_are_refused_in_a_line(own_run, capsys):
    before = (own_run / "run/ddim.pt").read_bytes()
    pixel = (own_run / "pets/cat/0.png").read_bytes()
    noise(own_run / "pets/cat/0.png")
    assert "other images or labels" in not_resumed(capsys, "--epochs", "3")
    (own_run / "pets/cat/0.png").write_bytes(pixel)
    noise(own_run / "pets/dog/new.png")
    assert "pets has 13 images, not 12" in not_resumed(capsys, "--epochs", "3")
    (own_run / "pets/dog/new.png").unlink()
    (own_run / "pets/cat").rename("pets/eel")
    error = not_resumed(capsys, "--epochs", "3")
    assert "other classes (eel is new, cat is missing)" in error
    assert (own_run / "run/ddim.pt").read_bytes() == before


def test_a_run_from_before_the_sums_and_newer_flags_resumes(own_run, capsys):
    checkpoint = torch.load("run/ddim.pt", weights_only=True)
    for key in ("data", "position"):
        del checkpoint[key]
    for key in ("background", "skip_broken", "flip", "hold_out", "noise_levels"):
        del checkpoint["config"][key]
    checkpoint["config"]["data"] = "pets"
    torch.save(checkpoint, "run/ddim.pt")
    error = not_resumed(capsys, "--noise-levels", "lognormal")
    assert "--noise-levels is uniform and cannot change" in error
    assert resume("ddim", "--epochs", "3") == 0
    assert "its class names alone were compared" in capsys.readouterr().out
    checkpoint = torch.load("run/ddim.pt", weights_only=True)
    assert checkpoint["position"] == 9 and checkpoint["config"]["noise_levels"] == "uniform"


def test_what_a_picture_stands_on_stays_as_it_was(own_run, capsys):
    error = not_resumed(capsys, "--background", "black")
    assert "--background is white and cannot change" in error
    assert "not a colour" in refused(ddim.main, ["--train", "--background", "#fff8"], capsys)


def test_explore_reads_the_data_where_they_are_now(own_run):
    """Of --data given to it, whatever the training had: a folder, then an .npz."""
    checkpoint = torch.load("run/ddim.pt", weights_only=True)
    checkpoint["config"] |= {"data": "mnist", "data_dir": "elsewhere", "skip_broken": True}
    torch.save(checkpoint, "run/ddim.pt")
    (own_run / "pets").rename("animals")
    data = load_data("animals", channels=3)
    np.savez("animals.npz", x=data.images, y=data.labels, class_names=data.class_names)
    flags = split("invert ddim 3 --checkpoint run --steps 2 --output x.png")
    for place in ("animals", "animals.npz"):
        assert explore.main([*flags, "--data", place]) == 0


def shown_images(monkeypatch):
    """The images that ddim.py trains on from now on: a list of (B, C, 32, 32) in [-1, 1]."""
    shown = []
    q_sample = ddim.q_sample

    def spy(x_0, *rest):
        shown.append(x_0)
        return q_sample(x_0, *rest)

    monkeypatch.setattr(ddim, "q_sample", spy)
    return shown


def bytes_of(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_flip_shows_every_image_and_its_mirror_image_in_an_epoch(in_tmp, monkeypatch, capsys):
    pets(in_tmp / "pets")
    shown = shown_images(monkeypatch)
    flags = ["--data", "pets", "--run-dir", "run", "--epochs", "1", "--flip"]
    assert ddim.main([*OWN, *flags]) == 0
    images = load_data("pets", channels=3).images
    expected = [*images, *(image.flip(2) for image in images)]
    assert bytes_of(common.to_uint8(torch.cat(shown))) == bytes_of(expected)
    assert "pets, each image also mirrored: 24 images" in capsys.readouterr().out
    assert resume("ddim", "--epochs", "2") == 0
    assert "--flip is True and cannot change" in not_resumed(capsys, "--no-flip")


def test_flags_of_the_data_reach_the_training(in_tmp, monkeypatch):
    """Of 13 pictures, one of them transparent, two are held out; the others are also mirrored."""
    pets(in_tmp / "pets")
    Image.new("RGBA", (32, 32)).save("pets/dog/6.png")
    Path("pets/dog/7.png").write_bytes(b"")  # broken
    shown = shown_images(monkeypatch)
    flags = split("--data pets --run-dir run --epochs 1 --batch-size 11 --background black")
    assert ddim.main([*OWN, *flags, "--hold-out", "--flip", "--skip-broken"]) == 0
    every = load_data("pets", channels=3, background="black", skip_broken=True).images
    kept = [image for i, image in enumerate(every) if i % 6 != 5]
    expected = [*kept, *(image.flip(2) for image in kept)]
    assert len(expected) == 22 and not kept[-1].any()
    assert bytes_of(common.to_uint8(torch.cat(shown))) == bytes_of(expected)


@pytest.mark.parametrize("name", ["ddim", "ldm", "vae", "gan"])
def test_pictures_without_classes_are_one_class_without_guidance(name, in_tmp, capsys):
    for i in range(6):
        noise(in_tmp / f"flat/{i}.png")
    script = importlib.import_module(name)
    flags = ["--train", "--epochs", "2", *TINY_FLAGS[name], "--data", "flat", "--batch-size", "4"]
    assert script.main([*flags, "--run-dir", "run"]) == 0
    assert "6 images of 1x32x32, 1 class of" in (said := capsys.readouterr().out)
    draw = [*split("--checkpoint run --class images --output"), "x.png"]
    assert script.main(draw) == 0
    if name in ("ddim", "ldm"):
        assert "guidance is off" in said
        error = refused(script.main, [*draw, "--guidance", "2"], capsys)
        assert "leaves only --guidance 1" in error
    assert resume(name, "--epochs", "3") == 0


def test_a_picture_that_is_given_has_the_background_of_the_training(tiny_runs, in_tmp):
    """Transparent ones, given to a model that was trained on black: files, and a test image."""
    Image.new("RGBA", (32, 32)).save("clear.png")
    shipped = ROOT / "pretrained"
    black = {"background": "black"}
    with_card(
        shipped / "vae.onnx", "vae.onnx", lambda card: card | {"training": card["training"] | black}
    )
    shutil.copy(shipped / "vae_encoder.onnx", in_tmp)
    flags = split("--class 0 --output x.npz")
    assert infer_onnx.main(["--model", "vae.onnx", "--reconstruct", "clear.png", *flags]) == 0
    assert np.load("x.npz")["x"][0].max() == 0

    checkpoint = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)
    checkpoint["config"] |= {"background": "black", "data_dir": None}
    checkpoint["class_names"].sort()  # as those of a folder
    torch.save(checkpoint, "vae.pt")
    for name in checkpoint["class_names"]:
        Path("set", name).mkdir(parents=True)
        shutil.copy("clear.png", f"set/{name}/0.png")
    flags += split("--checkpoint vae.pt --data set")
    assert explore.main(["reconstruct", "vae", "clear.png", "0", *flags]) == 0
    assert np.load("x.npz")["x"][:2].max() == 0


def test_a_constant_image_that_is_given_is_said(in_tmp, tiny_runs, capsys):
    picture(in_tmp / "blank.png", 7)
    noise(in_tmp / "noise.png")
    images = [str(in_tmp / f"{name}.png") for name in ("blank", "noise")]
    explore.main(
        [
            "reconstruct",
            "vae",
            *images,
            *split("--class 0 --output x.png --checkpoint"),
            str(tiny_runs("vae")),
        ]
    )
    said = [capsys.readouterr().out]
    model = str(ROOT / "pretrained/vae.onnx")
    infer_onnx.main(
        ["--model", model, "--reconstruct", *images, *split("--class 0 --output y.png")]
    )
    said.append(capsys.readouterr().out)
    for text in said:
        assert text.count("is constant") == 1 and "blank.png is constant, of one colour" in text


def test_arrays_without_labels_are_one_class(in_tmp):
    for keys in common.NPZ_KEYS:
        np.savez("x.npz", **{keys[0]: X})
        data = load_data("x.npz")
        assert data.class_names == ["images"] and data.labels.tolist() == [0] * 4


# --- Batches of another size ----------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_a_run_resumes_with_batches_of_another_size(name, in_tmp, data_dir):
    flags = ["--train", "--epochs", "4", *TINY_FLAGS[name], "--data-dir", data_dir]
    flags += ["--stage-1-share", "0.25"] if name == "ldm" else []
    assert importlib.import_module(name).main([*flags, "--run-dir", "run"]) == 0
    before = torch.load(f"run/{name}.pt", weights_only=True)
    assert resume(name, "--epochs", "8", "--batch-size", "10") == 0
    after = torch.load(f"run/{name}.pt", weights_only=True)
    epochs = 6 if name == "ldm" else 8  # a quarter is that of stage 1
    assert after["step"] - before["step"] == 6 * (epochs - before["step"] / 3)
    assert after["position"] == 6 * epochs and after["images"] == 60 * epochs
    assert after["config"]["batch_size"] == 10


def test_each_image_is_shown_once_an_epoch_whatever_the_batches(in_tmp, data_dir, monkeypatch):
    """Two steps of an epoch of three in batches of 20, then on from there in batches of 4."""
    monkeypatch.setattr(ddim, "LOG_EVERY", 1)
    flags = ["--train", "--warmup", "0", *TINY, "--data-dir", data_dir, "--run-dir", "run"]
    assert ddim.main([*flags, "--epochs", "0.66"]) == 0
    shown = shown_images(monkeypatch)
    assert resume("ddim", "--epochs", "3", "--batch-size", "4") == 0
    assert [len(images) for images in shown] == [4] * 35
    images = load_data("kmnist", data_dir).images
    for first in (5, 20):
        epoch = common.to_uint8(torch.cat(shown[first : first + 15]))
        assert bytes_of(epoch) == bytes_of(images)
    lines = log_of(in_tmp / "run/log.jsonl")
    epochs = [*(i / 3 for i in (1, 2)), *(i / 15 for i in range(11, 46))]
    assert np.allclose([line["epoch"] for line in lines], epochs)
    assert [line["step"] for line in lines] == [*range(1, 38)]
    rate = 5e-3 * 0.5 * (1 + np.cos(np.pi * (np.array(epochs[2:]) - 1 / 15) / 3))
    assert np.allclose([line["lr"] for line in lines[2:]], rate)


def test_the_loss_in_the_log_is_a_mean_over_batches_of_both_sizes(in_tmp, data_dir, monkeypatch):
    monkeypatch.setattr(ddim, "LOG_EVERY", 4)
    losses = ddim.image_losses
    monkeypatch.setattr(ddim, "image_losses", lambda *a: losses(*a) * 0 + 1)
    flags = ["--train", *TINY, "--data-dir", data_dir, "--run-dir", "run", "--epochs", "2"]
    assert ddim.main(flags) == 0
    assert resume("ddim", "--epochs", "3", "--batch-size", "60") == 0
    assert resume("ddim", "--epochs", "4", "--batch-size", "20") == 0
    lines = log_of(in_tmp / "run/log.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx([1, 1])


@pytest.mark.parametrize("name", ["vae", "gan", "ddim", "ldm", "autoencoder"])
def test_the_average_of_the_weights_counts_in_batches_of_the_present_size(name, in_tmp, data_dir):
    """After 3 steps of 20 images, which are 15 of 4, the next weighs 1 - (1 - 1/16)^(1/l - 1)."""
    script = "ldm" if name == "autoencoder" else name
    flags = ["--train", *TINY_FLAGS[script], "--data-dir", data_dir, "--run-dir", "run"]
    flags += ["--stage", "1"] if name == "autoencoder" else []
    if name == "ldm":
        both = importlib.import_module("ldm")
        assert both.main([*flags, "--stage", "1", "--epochs", "1", "--run-dir", "first"]) == 0
        flags += ["--autoencoder", "first"]
    assert importlib.import_module(script).main([*flags, "--warmup", "0", "--epochs", "1"]) == 0
    before = torch.load(f"run/{name}.pt", weights_only=True)
    assert resume(script, "--epochs", "1.06", "--batch-size", "4") == 0
    after = torch.load(f"run/{name}.pt", weights_only=True)
    assert after["step"] == 4 and after["position"] == 16
    decay = (1 - 1 / 16) ** (1 / 0.08 - 1)
    part = {"ldm": "denoiser.", "gan": ""}.get(name, "")
    for key, weight in after["weights"].items():
        expected = decay * before["ema"][part + key] + (1 - decay) * weight
        assert torch.allclose(after["ema"][part + key], expected, atol=1e-5), key
