"""evaluate.py with people's own data: what it reads, how it parts them, whole runs."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refused, with_card, write_idx
from PIL import Image, ImageDraw
from test_evaluate import WITHOUT_TORCH

import common
import ddim
import evaluate
import export
import infer_onnx
from benchmarks import extractor, real, report

RNG = np.random.default_rng(0)
COUNTS = {"circle": 75, "square": 45, "stripes": 30}  # of one size, or of few and many


def drawn(kind, size, rng):
    """A picture of a shape at a random place, in a random dark colour, on a light one."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(200, 256, 3).tolist()))
    ink = tuple(rng.integers(0, 90, 3).tolist())
    pen = ImageDraw.Draw(picture)
    left, top = rng.integers(size // 8, size // 3, 2).tolist()
    box = (left, top, left + size // 2, top + size // 2)
    if kind == "stripes":
        for y in range(top % 8, size, 8):
            pen.rectangle((0, y, size, y + 3), ink)
    else:
        {"circle": pen.ellipse, "square": pen.rectangle}[kind](box, ink)
    return picture


def draw_shapes(folder, counts=COUNTS, size=40, seed=0):
    rng = np.random.default_rng(seed)
    for kind, count in counts.items():
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            drawn(kind, size, rng).save(folder / kind / f"{i:03d}.png")


def as_set(images, labels):
    """Images and labels, in whatever order: a Counter."""
    return Counter((np.asarray(x).tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


# --- Reading --------------------------------------------------------------------------------------


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def smooth(width, height, mode="RGB"):
    """A picture of soft blots, which a decoder at a smaller size changes little."""
    return Image.fromarray(noise(5, 6, 4), "RGBA").resize((width, height), 3).convert(mode)


def mixed(folder):
    """A folder of what people have: each kind that common.py has a rule for."""
    for name in ("b", "a/deep", "a/.hidden", "__MACOSX", "a/empty"):
        (folder / name).mkdir(parents=True)
    for mode in ("RGBA", "LA", "RGB", "L", "P", "1", "CMYK"):
        smooth(64, 64, mode).save(folder / f"b/{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    smooth(64, 64).quantize(16).save(folder / "b/hole.png", transparency=3)
    for orientation in (3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        smooth(90, 60).save(folder / f"a/{orientation}.jpg", exif=exif, quality=95)
    for i, (width, height) in enumerate([(33, 32), (31, 70), (28, 28), (64, 64), (32, 32), (9, 5)]):
        Image.fromarray(noise(height, width, 3)).save(folder / f"a/deep/{i}.png")
    Image.new("RGB", (28, 28), (9, 200, 30)).save(folder / "a/frame.png")
    smooth(1000, 700).save(folder / "a/photo.jpg", quality=95)
    smooth(20, 20).save(folder / "a/.hidden/x.png")
    smooth(20, 20).save(folder / "__MACOSX/x.png")
    (folder / "a/notes.txt").write_text("no picture")
    (folder / "b/broken.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize(("channels", "size", "background"), [(3, 64, "#ff8000"), (1, 32, "white")])
def test_a_folder_is_read_as_for_training(in_tmp, channels, size, background):
    """The same pictures, classes, order and notes; resized ones may be a grey level apart."""
    mixed(in_tmp / "all")
    flags = {"background": background, "skip_broken": True, "image_size": size}
    theirs = common.load_data("all", channels=channels, **flags)
    name, names, (images, labels), test, notes = real.load(
        in_tmp / "all", (channels, size, size), background, True
    )
    assert (name, names, notes, test) == ("all", theirs.class_names, theirs.notes, None)
    assert labels.tolist() == theirs.labels.tolist() and len(labels) == 18
    apart = np.abs(images.astype(int) - theirs.images.numpy()).max(axis=(1, 2, 3))
    assert images.dtype == np.uint8 and apart.max() <= 1, apart
    with pytest.raises(infer_onnx.InputError, match=r"broken\.png .*--skip-broken"):
        real.load(in_tmp / "all", (channels, size, size), background, False)


def test_an_npz_of_x_and_y_has_no_test_images(in_tmp):
    """Those of another name are not read in training either."""
    y = np.arange(6)
    np.savez("x.npz", x=noise(6, 32, 32), y=y, x_test=noise(6, 32, 32), y_test=y)
    assert real.load(in_tmp / "x.npz", (1, 32, 32), "white", False)[3] is None


@pytest.mark.parametrize("shape", [(30, 28, 28), (30, 40, 50, 3), (30, 3, 32, 32)])
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64)])
def test_an_npz_is_read_as_for_training(in_tmp, shape, channels, size):
    y = np.arange(30) % 4
    np.savez("x.npz", x_train=noise(*shape), y_train=y, x_test=noise(*shape)[:9], y_test=y[:9])
    both = real.load(in_tmp / "x.npz", (channels, size, size), "white", False)[2:4]
    for train, (images, labels) in zip((True, False), both, strict=True):
        theirs = common.load_data("x.npz", channels=channels, train=train, image_size=size)
        assert labels.tolist() == theirs.labels.tolist()
        assert np.abs(images.astype(int) - theirs.images.numpy()).max() <= 1


def test_every_sixth_image_is_what_training_leaves_out(in_tmp):
    draw_shapes(in_tmp / "shapes", size=32)
    data = common.load_data("shapes", channels=3)
    kept = common.without_held_out(data)
    found = evaluate.load_real("shapes", None, (3, 32, 32))
    train, test = found.parts()
    assert as_set(*train) == as_set(kept.images, kept.labels)
    assert as_set(*test) == as_set(data.images, data.labels) - as_set(*train)
    assert len(test[1]) == 25 and found.class_names == ["circle", "square", "stripes"]
    for held_out, part in zip(found.parts(hold_out=True), (train, test), strict=True):
        assert as_set(*held_out) == as_set(*part)  # there are no other test images


def test_a_folder_of_test_images_is_used(in_tmp):
    draw_shapes(in_tmp / "set/train", size=32)
    draw_shapes(in_tmp / "set/val", {"square": 24}, size=32, seed=1)
    found = evaluate.load_real("set/train", None, (3, 32, 32))
    train, test = found.parts()
    assert len(train[1]) == 150 and test[1].tolist() == [1] * 24 and found.name[:4] == "set "
    data = common.load_data("set/train", channels=3, train=False)
    assert as_set(*test) == as_set(data.images, data.labels)
    kept = common.without_held_out(common.load_data("set/train", channels=3))
    train, held_out = found.parts(hold_out=True)
    assert as_set(*train) == as_set(kept.images, kept.labels) and len(held_out[1]) == 25


def test_any_first_part_has_the_classes_of_the_whole():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    order = evaluate.in_order(np.arange(1000), labels, in_turn=False)
    assert sorted(order[0].tolist()) == list(range(1000))
    assert np.array_equal(order[1], labels[order[0]])
    for n in (10, 137, 500, 990):
        counts = np.bincount(order[1][:n], minlength=3)
        assert np.abs(counts - n * np.array([0.6, 0.3, 0.1])).max() <= 1
    assert evaluate.in_order(labels, labels, in_turn=True)[1][:303].tolist() == [0, 1, 2] * 100 + [
        0, 1, 0,
    ]  # fmt: skip


def test_a_set_at_another_size_is_that_of_training(in_tmp, data_dir):
    found = evaluate.load_real("kmnist", data_dir, (1, 64, 64))
    for train, (images, labels) in zip((True, False), found.parts(), strict=True):
        theirs = common.load_data("kmnist", data_dir, train=train, image_size=64)
        order = np.lexsort((theirs.images.sum((1, 2, 3)), theirs.labels))
        mine = np.lexsort((images.sum(axis=(1, 2, 3), dtype=int), labels))
        assert np.array_equal(labels[mine], theirs.labels[order])
        assert np.abs(images[mine].astype(int) - theirs.images[order].numpy()).mean() < 1


# --- Scores ---------------------------------------------------------------------------------------


def test_coarse_pixels_are_the_same_at_any_size_and_of_equal_channels():
    grey = noise(20, 1, 32, 32)
    expected = evaluate.coarse_pixels(grey)
    large = evaluate.coarse_pixels(grey.repeat(4, axis=2).repeat(4, axis=3))
    colour = evaluate.coarse_pixels(grey.repeat(3, axis=1))
    assert np.allclose(large, expected, atol=1e-6) and expected.shape == (20, 196)
    assert np.allclose(colour, np.tile(expected, 3) / 3**0.5, atol=1e-6)
    red = grey.repeat(3, axis=1)
    red[:, 1:] = 0  # a difference in colour alone counts
    assert (np.linalg.norm(evaluate.coarse_pixels(red) - colour, axis=1) > 0.3).all()


def test_a_single_class_is_learned_by_quarter_turns():
    images, labels = evaluate.task(noise(3, 1, 32, 32), np.zeros(3, int), 1)
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    once = images[3:6]
    assert np.array_equal(once[:, :, 0], images[:3, :, :, -1])  # the last column becomes row 0
    assert np.array_equal(images[6:9], images[:3, :, ::-1, ::-1])
    assert evaluate.task(images, labels, 4)[0] is images


def test_the_range_is_that_of_the_real_images():
    for low, high, limits in ((100, 130, (90, 140)), (0, 40, (0, 45)), (64, 64, (0, 255))):
        images = np.full((2, 1, 32, 32), low, np.uint8)
        images[1] = high
        evaluate.check_images(images, (1, 32, 32), limits)
    for level, limits in ((63, (0, 255)), (65, (0, 255)), (200, (0, 100))):
        with pytest.raises(infer_onnx.InputError, match=f"{level}..{level}.*{limits[1]}"):
            evaluate.check_images(np.full((2, 3, 64, 64), level, np.uint8), (3, 64, 64), limits)


# --- Whole runs -----------------------------------------------------------------------------------

FLAGS = "--threads 1 --no-timing --extractors judges"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shapes in colour, a tiny ddim of 64x64 trained on them, and extractors."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_shapes(folder / "shapes")
        flags = split("--data shapes --channels 3 --image-size 64")
        tiny = [*TINY[2:], *split("--depths 1,1 --num-timesteps 20 --epochs 1 --run-dir runs/ddim")]
        assert ddim.main(["--train", *tiny, *flags, "--hold-out"]) == 0
        assert export.main(["ddim", "--checkpoint", "runs/ddim"]) == 0
        assert extractor.main([*flags, "--epochs", "2", "--output", "judges"]) == 0
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def test_no_folder_of_this_machine_is_in_what_is_given_away(there):
    """The data set is a folder, whose path the run keeps."""
    config = torch.load("runs/ddim/ddim.pt", weights_only=True)["config"]
    assert config["data"] == str(there / "shapes")
    flags = ["--checkpoint", "runs/ddim", "--output", "given/x.onnx", "--weights", "given/x.pt"]
    Path("given").mkdir()
    assert export.main(["ddim", *flags]) == 0
    card = infer_onnx.load_model(Path("given/x.onnx"), "cpu").card
    kept = torch.load("given/x.pt", weights_only=True)["config"]
    assert card["training"]["data"] == kept["data"] == "./shapes" and kept["data_dir"] is None
    for file in ("runs/ddim/ddim.onnx", "given/x.onnx", "given/x.pt"):
        assert str(there).encode() not in Path(file).read_bytes()


def test_own_data_in_colour_are_scored_without_torch(there):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "evaluate.py"), "ddim"]
    command += split(f"--data shapes --steps 2 --output scores {FLAGS}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout  # it was trained with --hold-out
    said = "125 training images, 25 test images (every sixth, as training with --hold-out leaves"
    assert said in done.stdout
    results = json.loads(Path("scores/results.json").read_text())
    protocol, (row,), floor = results["protocol"], results["rows"], results["floor"]
    assert (protocol["reference"], protocol["train"], protocol["hold_out"]) == (25, 125, True)
    assert row["n"] == floor["n"] == 25 and floor["seeds"] == 5  # as many as there are to test
    assert row["scores"]["ffid"]["mean"] > 3 * floor["scores"]["ffid"]["mean"]
    assert len(row["scores"]["histogram"]) == len(row["scores"]["accuracy_by_class"]) == 3
    text = " ".join(Path("scores/table.md").read_text().split())
    assert "so have both extractors" not in text  # these were trained on the others
    assert "25 held-out training images of shapes" in text and "means of 4 x 4" in text
    assert "classes as often as the training images" in text and "25 (!)" in text
    assert (
        results["extractors"][0]["least_accuracy"] == (1 + 12 / 25) / 2
    )  # of the test images 12 are circles
    assert ("below 74 %, too weak" in text) == any(
        card["accuracy"] < 0.74 for card in results["extractors"]
    )
    for kind in ("samples", "nearest"):
        [file] = Path("scores").glob(f"{kind}_ddim-*.png")
        with Image.open(file) as picture:
            assert picture.mode == "RGB" and picture.width > 300
    # Samples have the classes as often as the training images: 5 to 3 to 2.
    [cached] = Path("scores/cache").iterdir()
    train, _ = evaluate.load_real("shapes", None, (3, 64, 64)).parts()
    model = infer_onnx.load_model("runs/ddim/ddim.onnx", "cpu", 1)
    labels = train[1][:25].tolist()
    assert np.abs(np.bincount(labels) - [12.5, 7.5, 5]).max() <= 1
    again = infer_onnx.sample(model, labels, seed=0, steps=2, batch_size=25)
    assert np.abs(np.load(cached)["x"].astype(int) - again).max() <= 1


def test_the_training_images_as_samples_score_as_the_floor(there):
    """Each real image beside itself: a distance of 0, all copies."""
    args = evaluate.build_parser().parse_args(split(f"ddim --data shapes {FLAGS}"))
    args.extractors = Path("judges")
    found = evaluate.load_real("shapes", None, (3, 64, 64))
    sessions, cards = zip(*evaluate.load_extractors(args, found, (3, 64, 64), "white"), strict=True)
    train, test = found.parts()
    reference = evaluate.make_reference([*sessions], train[0], test[0], 3)
    same = evaluate.score_images(reference, *test)
    assert same["ffid"] == pytest.approx(0, abs=1e-5) and same["recall"] == 1
    assert same["label_accuracy"] == pytest.approx(cards[0]["accuracy"])
    copies = evaluate.copy_scores(reference, train[0])
    assert copies == {"copy_ratio": pytest.approx(0, abs=1e-3), "copies": None}  # of 5 images: None


def test_real_images_are_exported_as_they_are_compared(there, tmp_path, capsys):
    out = tmp_path / "real"
    flags = split("ddim --data shapes --export-real")
    assert evaluate.main([*flags, f"{out}/"]) == 0
    assert f"wrote {out}: 25 real images" in capsys.readouterr().out
    images, labels = evaluate.load_real("shapes", None, (3, 64, 64)).parts()[1]
    files = sorted(out.iterdir())
    names = ["circle", "square", "stripes"]
    assert [f.name for f in files] == [f"{i:05d}_{names[y]}.png" for i, y in enumerate(labels)]
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(np.array(Image.open(file)).transpose(2, 0, 1), image)
    error = refused(evaluate.main, [*flags, str(out)], capsys, alone=False)
    assert "is a folder that holds files" in error
    error = refused(
        evaluate.main,
        [*flags, "new/", "--steps", "4", "--seeds", "2", "--tsne"],
        capsys,
        alone=False,
    )
    assert "leave out --seeds, --steps, --tsne" in error


def test_pictures_without_classes_are_scored(place, in_tmp, monkeypatch, capsys):
    (in_tmp / "flat").mkdir()
    for i in range(150):
        drawn("circle", 64, RNG).save(in_tmp / f"flat/{i}.png")

    def of_images(card):
        training = card["training"] | {"hold_out": False}
        return card | {"class_names": ["images"], "training": training}

    with_card(place / "runs/ddim/ddim.onnx", "ddim.onnx", of_images)
    monkeypatch.setattr(extractor, "SEEDS", {1: 0})  # one of the two is enough
    flags = split("--data flat --channels 3 --image-size 64 --epochs 1 --output judges")
    assert extractor.main(flags) == 0
    capsys.readouterr()
    argv = split(f"--data flat --steps 2 --guidance 0 --output scores {FLAGS}")
    assert evaluate.main(["ddim.onnx", *argv]) == 0
    out = capsys.readouterr().out
    assert "warning: ddim.onnx was not trained with --hold-out" in out
    results = json.loads(Path("scores/results.json").read_text())
    [row] = results["rows"]
    assert row["scores"]["histogram"] == [1.0] and "label_accuracy" not in row["scores"]
    assert "label_accuracy" not in results["floor"]["scores"]
    assert report.main(["scores"]) == 0 and not Path("scores/classes.png").exists()

    def begun(card):
        return card | {"training": card["training"] | {"hold_out": True, "start": "old.pt"}}

    def stop(*_, **__):
        raise KeyboardInterrupt

    with_card("ddim.onnx", "begun.onnx", begun)
    monkeypatch.setattr(infer_onnx, "sample", stop)
    with pytest.raises(SystemExit, match="130"):
        evaluate.main(["begun.onnx", *argv])
    said = "note: begun.onnx began with old.pt, which may have seen it"
    assert said in capsys.readouterr().out


def test_other_data_and_models_are_refused_in_a_line(there, in_tmp, monkeypatch, capsys):
    monkeypatch.chdir(there)
    shapes = ["runs/ddim/ddim.onnx", "--data", "shapes"]
    for argv, message in (
        (["--data", "shapes"], "--data shapes needs the models to score, as in: evaluate.py ddim"),
        ([*shapes, "--extractors", "x"], "benchmarks/extractor.py --data shapes --channels 3 "
         "--image-size 64 --output x trains it"),
        (["gan", *shapes[1:]], "no extractor"),
    ):  # fmt: skip
        error = refused(
            evaluate.main, [*argv, "--output", str(in_tmp / "out")], capsys, alone=False
        )
        assert message in error
    other = in_tmp / "other/shapes"
    draw_shapes(other, seed=1)
    flags = ["--extractors", "judges", "--output", str(in_tmp / "out")]
    error = refused(evaluate.main, [shapes[0], "--data", str(other), *flags], capsys, alone=False)
    assert "is an extractor of shapes " in error and ", not of shapes " in error
    (other / "circle").rename(other / "disc")
    error = refused(evaluate.main, [shapes[0], "--data", str(other), *flags], capsys, alone=False)
    assert "is an extractor of shapes" in error
    few = in_tmp / "few"
    draw_shapes(few, {"circle": 100})
    error = refused(evaluate.main, [shapes[0], "--data", str(few), *flags], capsys, alone=False)
    assert "84 images to train and 16 to test: scores need 20 to test" in error
    for part in ("train", "test"):  # every sixth of the first is held out
        draw_shapes(few / part, {"circle": 30})
    error = refused(
        evaluate.main,
        [shapes[0], "--data", str(few / "train"), "--hold-out", *flags],
        capsys,
        alone=False,
    )
    assert "25 images to train and 5 to test: scores need 20 to test" in error
    for file in (few / "train").glob("*/*"):
        if int(file.stem) >= 5:
            file.unlink()
    error = refused(
        evaluate.main, [shapes[0], "--data", str(few / "train"), *flags], capsys, alone=False
    )
    assert "5 images to train and 30 to test" in error
    assert not (in_tmp / "out").exists()


def test_a_model_of_other_classes_is_named_with_them(there):
    args = evaluate.build_parser().parse_args(["ddim", "--data", "shapes"])
    names = ["circle", "square", "stripes"]
    assert evaluate.find_settings(args, names, (3, 64, 64), "white")[0].model
    for change, message in (
        ((["a", "b"], (3, 64, 64), "white"), "3x64x64 of 3 classes .circle, square, stripes."),
        ((names, (1, 64, 64), "white"), "does not generate grey images of 64x64 "),
        ((names, (3, 64, 64), "black"), "background white"),
    ):
        with pytest.raises(infer_onnx.InputError, match=message):
            evaluate.find_settings(args, *change)


def test_a_name_of_a_set_and_of_a_folder_is_ambiguous(in_tmp):
    (in_tmp / "kmnist").mkdir()
    with pytest.raises(infer_onnx.InputError, match=r"\./kmnist for the folder, set:kmnist for"):
        evaluate.named_set("kmnist", None)
    assert evaluate.named_set("./kmnist", None) is None
    assert evaluate.named_set("set:kmnist", None) == evaluate.named_set("kmnist", "x") == "kmnist"
    write_idx(in_tmp / "data/KMNIST/raw")
    assert len(evaluate.load_real("set:kmnist", None).parts()[0][1]) == 60


def test_an_extractor_has_the_size_and_the_classes_asked_for():
    for which, shape, classes in ((1, (3, 128, 128), 7), (2, (1, 64, 64), 2)):
        model = extractor.Extractor(which, shape, classes).eval()
        features, logits = model(torch.zeros(2, shape[0], shape[1] - 4, shape[2] - 4))
        assert features.shape == (2, 128) and logits.shape == (2, classes)
        assert len(model.body) - len(extractor.Extractor(which).body) == {128: 2, 64: 1}[shape[1]]
