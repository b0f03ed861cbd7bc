"""The same seed gives the same picture.

For any batch size and number of threads or processes, in torch and in ONNX Runtime.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image

import common
import ddim
import ddpm
import distill
import gan
import infer_onnx
import ldm
import runs
import vae

NAMES = ["vae", "gan", "ddpm", "ddim", "ldm", "distill", "distill2"]
SNEAKER = 7
LEVELS = 1  # grey levels by which processors, threads and runtimes may differ
NOISE = {  # SHA-256 of the first noise of (seed, image), float32 (1, 32, 32) in little endian
    (0, 0): "31527326babc552f9a3299fef218545c8ba84a174149a1016f9e1fc9d7f32fe6",
    (0, 7): "7cd99186c743141a24041d6aa0bcbcaf76ca9c3241bcb0cbf03860487caaf4ce",
    (0, 2**63 + 1): "51809e8a8ec4d40f13dd18ba4f2de7144a0b1c3b144b0a0af53d2b866105f2c6",
    (2**63 - 1, 999_999): "7edf3a1c155b95079acdd9ebb7216f3e4d753b09542730139f9430f47f73ee4a",
}


def levels(a, b):
    """The largest difference of two arrays of bytes."""
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize("key", NOISE)
def test_the_noise_is_the_same_on_every_machine(key):
    for module in (common, infer_onnx):
        noise = module.next_noise(module.noise_streams(key[0], [key[1]]), (1, 32, 32))
        assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == NOISE[key]


def shipped(name):
    return infer_onnx.load_model(ROOT / f"pretrained/{name}.onnx", "cpu", 1)


def options(name):
    return {"steps": 20} if name == "ddpm" else {}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_samples_its_golden_picture(name):
    """Made by: python infer_onnx.py --model NAME --class Sneaker --output tests/golden/NAME.png.

    That of ddpm was made with --steps 20.
    """
    golden = np.array(Image.open(ROOT / f"tests/golden/{name}.png"))[::8, ::8]
    found = infer_onnx.sample(shipped(name), [SNEAKER], **options(name))[0, 0]
    assert golden.shape == (32, 32) and levels(golden, found) <= LEVELS


@pytest.mark.parametrize("name", NAMES)
def test_neither_batch_nor_threads_change_a_picture(name):
    labels = [SNEAKER, 0, 8, 1, 5]
    whole = infer_onnx.sample(shipped(name), labels, **options(name))
    two_threads = infer_onnx.load_model(ROOT / f"pretrained/{name}.onnx", "cpu", 2)
    assert levels(whole, infer_onnx.sample(two_threads, labels, **options(name))) <= LEVELS
    in_twos = infer_onnx.sample(shipped(name), labels, batch_size=2, **options(name))
    assert levels(whole, in_twos) <= LEVELS
    assert levels(whole[0], whole[1]) > 50  # empty pictures would pass all of this


@pytest.mark.parametrize("script", [ddim, ddpm])
def test_torch_samples_the_golden_picture_with_any_number_of_threads(script):
    checkpoint = runs.load_checkpoint(ROOT / "pretrained/ddim.pt", ("ddim",))
    network = script.ema_network(checkpoint, torch.device("cpu"))
    golden = np.array(Image.open(ROOT / f"tests/golden/{script.NAME}.png"))[::8, ::8]
    for threads, labels in ((1, [SNEAKER]), (2, [SNEAKER, 0, 8]), (3, [SNEAKER] * 2)):
        torch.set_num_threads(threads)
        images = script.sample(
            model=network, config=checkpoint["config"], labels=torch.tensor(labels),
            **options(script.NAME),
        )  # fmt: skip
        assert levels(common.to_uint8(images)[0, 0].numpy(), golden) <= LEVELS


@pytest.mark.parametrize(
    ("script", "stem"), [(vae, "vae"), (gan, "gan"), (ldm, "ldm"), (distill, "distill2")]
)
def test_shipped_weights_sample_the_golden_picture(script, stem):
    checkpoint = runs.load_checkpoint(ROOT / f"pretrained/{stem}.pt", (script.NAME,))
    known = {
        "vae": {"prior": checkpoint.get("prior")},
        "ldm": {"config": checkpoint["config"]},
    }.get(script.NAME, {})
    network = script.ema_network(checkpoint, torch.device("cpu"))
    images = script.sample(model=network, labels=torch.tensor([SNEAKER]), **known)
    golden = np.array(Image.open(ROOT / f"tests/golden/{stem}.png"))[::8, ::8]
    assert levels(common.to_uint8(images)[0, 0].numpy(), golden) <= LEVELS


@pytest.mark.parametrize(
    "picture", ["pretrained/ddim.png", *(f"tests/golden/{n}.png" for n in NAMES)]
)
def test_pictures_are_of_the_shipped_models(picture):
    with Image.open(ROOT / picture) as image:
        said = image.text
    model = ROOT / f"pretrained/{Path(picture).stem}.onnx"
    assert said["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert said["seed"] == "0"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_passes_its_own_check(name):
    infer_onnx.check(shipped(name))


def test_shards_sample_what_one_process_does(in_tmp, capsys):
    asked = ["--model", "gan", "--num-samples", "3", "--threads", "1"]

    def run(*flags):
        assert infer_onnx.main([*asked, *flags]) == 0
        return capsys.readouterr().out

    run("--output", "whole/")
    Path("parts").mkdir()
    Path("parts/.00003_trouser.png.1.tmp").touch()  # of a shard that is writing, or was killed
    for part, count in (("1/4", 7), ("3/4", 14), ("4/4", 22), ("2/4", 30)):
        run("--shard", part, "--output", "parts")
        assert len(list(Path("parts").glob("[!.]*"))) == count
    names = [path.name for path in sorted(Path("whole").iterdir())]
    assert names == [path.name for path in sorted(Path("parts").glob("[!.]*"))] and len(names) == 30
    for name in names:
        paths = (Path("whole", name), Path("parts", name))
        assert levels(*(np.array(Image.open(path)) for path in paths)) <= LEVELS
    assert "10 images (10 were there)" in run("--shard", "2/3", "--output", "parts")
    Path("other").mkdir()
    Path("other/file").write_text("")
    for flags, message in (
        (["--output", "x.npz"], "--shard needs an --output"), ([], "--shard needs an --output"),
        (["--output", "x/", "--interpolate", "noise"], "--shard is for plain samples"),
        (["--class", "Bag", "--output", "x/"], "as many images as parts"),  # three, of four
        (["--output", "other"], "other holds file, no image"),
    ):  # fmt: skip
        argv = [*asked, "--shard", "1/4", *flags]
        assert message in refused(infer_onnx.main, argv, capsys)
    assert len(list(Path("other").iterdir())) == 1


def test_a_stopped_folder_is_filled_by_the_same_command_alone(in_tmp, monkeypatch, capsys):
    """Images are written as they are sampled, and are those of the command that was not stopped."""
    flags = ["--model", "gan", "--num-samples", "3", "--threads", "1", "--batch-size", "4"]
    assert infer_onnx.main([*flags, "--output", "whole/"]) == 0
    save = infer_onnx.save_png

    def save_ten(*given):
        if len(list(Path("parts").glob("*"))) == 10:
            raise KeyboardInterrupt
        save(*given)

    monkeypatch.setattr(infer_onnx, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(infer_onnx, "save_png", save_ten)
    with pytest.raises(SystemExit) as stop:
        infer_onnx.main([*flags, "--shard", "1/2", "--output", "parts/"])
    said = capsys.readouterr()
    assert stop.value.code == 130 and len(list(Path("parts").iterdir())) == 10
    assert said.out.endswith("parts keeps what is written: the same command does the rest\n")
    assert said.err.splitlines()[:2] == ["4 of 15 images", "8 of 15 images"]  # whole lines
    monkeypatch.setattr(infer_onnx, "save_png", save)
    Path("parts/00002_t-shirt-top.png").unlink()
    kept = Path("parts/00001_t-shirt-top.png").stat().st_mtime_ns
    for part, there in (("1/2", "15 images (9 were there)"), ("2/2", "15 images in")):
        assert infer_onnx.main([*flags, "--shard", part, "--output", "parts/"]) == 0
        assert there in capsys.readouterr().out
    assert Path("parts/00001_t-shirt-top.png").stat().st_mtime_ns == kept
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("parts").iterdir()) and len(names) == 30
    for name in names:
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()

    # Nothing else may join: other settings, classes or numbers of images, or another file.
    whole = [*flags, "--output", "whole/"]
    harmless = Path("whole/.00003_trouser.png.7.tmp"), Path("whole/.DS_Store")
    for file in harmless:  # of a process that was killed, and of a Mac that shows the folder
        file.touch()
    assert infer_onnx.main(whole) == 0
    for file in harmless:
        file.unlink()
    for others, message in (
        (["--seed", "1"], "00000_t-shirt-top.png has seed 0, not 1: name another folder"),
        (["--truncation", "2"], "has truncation None, not 2.0"),
        (["--model", "vae"], "has model gan, not vae: name another folder"),
        (["--num-samples", "4"], "00003_trouser.png, no image of this command"),
        (["--class", "0,1"], "00006_pullover.png, no image of this command"),
    ):
        for more in ([], ["--shard", "2/3"]):
            assert message in refused(infer_onnx.main, [*whole, *others, *more], capsys)
    assert infer_onnx.main([*flags, "--truncation", "2", "--output", "narrow/"]) == 0
    error = refused(infer_onnx.main, [*flags, "--output", "narrow/"], capsys)
    assert "has truncation 2.0, not None" in error
    for name in ("notes.txt", "00031_bag.png"):
        Path("whole", name).touch()
        error = refused(infer_onnx.main, whole, capsys)
        assert f"holds {name}, no image of this command" in error
        Path("whole", name).unlink()
    Path("whole", names[0]).write_bytes(b"")
    error = refused(infer_onnx.main, whole, capsys)
    assert "00000_t-shirt-top.png is not a readable image" in error
