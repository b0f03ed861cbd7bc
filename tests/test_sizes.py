"""--image-size: the shifted schedule, networks and files of 64x64, how pictures get that size."""

import importlib
import math
import os
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, refused
from PIL import Image
from test_web import needs_node, needs_runtime, node_pictures

import common
import ddim
import distill
import explore
import export
import gan
import infer_onnx
import ldm
import vae
from common import UNet, load_data, load_image

# --- The schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "shift"), [(64, -2 * math.log(2)), (128, -4 * math.log(2))])
def test_the_cosine_schedule_is_shifted_as_in_the_paper(image_size, shift):
    """log SNR = -2 log tan(pi u / 2) + 2 log(32 / d); Nichol & Dhariwal's s = 0.008 and f(0)."""
    found = ddim.make_alpha_bars("cosine", 1000, image_size)
    u = (np.arange(1, 1000) / 1000 + 0.008) / 1.008  # the last beta is limited to 0.999
    alpha_bars = np.cos(u * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    log_snr = np.log(alpha_bars) - np.log1p(-alpha_bars) + shift
    assert np.allclose(found[:-1], 1 / (1 + np.exp(-log_snr)), rtol=1e-9, atol=0)
    assert (found.diff() < 0).all() and 0 < found[-1] < 1e-9


@pytest.mark.parametrize("schedule", ["linear", "quadratic", "cosine"])
def test_the_other_schedules_are_shifted_alike_and_32_is_not(schedule):
    plain = ddim.make_alpha_bars(schedule, 100)
    assert torch.equal(plain, ddim.make_alpha_bars(schedule, 100, 32))
    snr, shifted = (a / (1 - a) for a in (plain, ddim.make_alpha_bars(schedule, 100, 128)))
    assert torch.allclose(shifted, snr / 16, rtol=1e-9)
    config = {"schedule": schedule, "num_timesteps": 100}  # of an older run
    assert torch.equal(ddim.schedule_of(config), plain)


# --- Networks and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", common.IMAGE_SIZES)
def test_the_default_widths_end_in_the_same_grid(image_size):
    seen = []

    def spy(module, given, output):
        seen.append(given[0].shape[-1])

    x, i = torch.zeros(1, 3, image_size, image_size), torch.zeros(1, dtype=torch.int64)
    classes = torch.eye(2)[:1]
    for script, shape in ((ddim, x.shape), (ldm, (1, 8, image_size // 4, image_size // 4))):
        widths = script.WIDTHS[image_size]
        depths = (1,) * len(widths)
        model = UNet(shape[1], 2, widths, depths, 2 if script is ddim else 1)
        model.bottom[0].register_forward_hook(spy)
        assert model(torch.zeros(shape), i, i).shape == shape
    encoder = vae.Encoder(3, 2, 4, vae.WIDTHS[image_size], 16, image_size)
    encoder.blocks[-1].register_forward_hook(spy)
    encoder(x, classes)
    discriminator = gan.Discriminator(3, 2, gan.WIDTHS[image_size], False, image_size)
    discriminator.blocks[-1].register_forward_hook(spy)
    assert discriminator(x, classes).shape == (1,)
    assert seen == [8, 8, 4, 4]
    for generator in (vae.Decoder, gan.Generator):
        model = generator(3, 2, 4, vae.WIDTHS[image_size], 16, image_size)
        assert model(torch.zeros(1, 4), classes).shape == x.shape


@pytest.fixture(scope="module")
def large_runs(tmp_path_factory, data_dir):
    """A function: the folder of a finished run of a script at 64x64, made at the first call."""
    made = {}

    def run_of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            flags = [*split("--train --epochs 1 --image-size 64"), *TINY_FLAGS[name]]
            flags += {"ddim": ["--patch", "4"], "ldm": ["--no-attention"]}.get(name, [])
            flags += ["--data-dir", data_dir, "--run-dir", str(made[name])]
            assert importlib.import_module(name).main(flags) == 0
        return made[name]

    return run_of


@pytest.mark.parametrize("name", ["ddim", "vae", "gan", "ldm"])
def test_64_pixels_from_training_to_a_picture_without_torch(name, large_runs, in_tmp, capsys):
    script, run_dir = importlib.import_module(name), str(large_runs(name))
    assert script.main(["--resume", "--epochs", "1.4", "--run-dir", run_dir]) == 0
    flags = ["--class", "o,su", "--num-samples", "2"]
    flags += ["--steps", "5"] if name in ("ddim", "ldm") else []
    assert script.main(["--checkpoint", run_dir, *flags, "--output", "torch.npz"]) == 0
    assert export.main([name, "--checkpoint", run_dir]) == 0
    path = f"{run_dir}/{name}.onnx"
    assert infer_onnx.main(["--model", path, *flags, "--output", "onnx.npz"]) == 0
    a, b = (np.load(f"{way}.npz")["x"].astype(int) for way in ("torch", "onnx"))
    assert a.shape == b.shape == (4, 1, 64, 64) and a.std() > 5 and np.abs(a - b).max() <= 1
    assert infer_onnx.main(["--model", path, "--class", "o"]) == 0
    with Image.open("o.png" if name == "ddim" else f"{name}_o.png") as picture:
        assert picture.size == (8 * 64, 8 * 64)
    card = infer_onnx.load_model(path, "cpu").card
    assert card["image_shape"] == [1, 64, 64] and card["training"]["image_size"] == 64
    if name == "ldm":
        assert card["latent_shape"] == [8, 16, 16]
    if name in ("ddim", "ldm"):
        assert card["alpha_bars"] == ddim.make_alpha_bars("cosine", 1000, 64).tolist()
    error = refused(script.main, ["--resume", "--image-size", "32", "--run-dir", run_dir], capsys)
    assert "--image-size is 64 and cannot change" in error


@needs_node
@needs_runtime
@pytest.mark.parametrize("name", ["ddim", "ldm"])
def test_the_page_samples_64_pixels(name, large_runs, in_tmp):
    path = exported(name, large_runs)
    [pictures], _ = node_pictures(path, [2], [{"steps": 3}])
    expected = infer_onnx.sample(infer_onnx.load_model(path, "cpu"), [2], steps=3)
    assert pictures.shape == (1, 1, 64, 64)
    assert np.abs(pictures.astype(int) - expected).max() <= 1


def exported(name, large_runs):
    """The .onnx file of a run, written unless another test has done so."""
    path = large_runs(name) / f"{name}.onnx"
    if not path.exists():
        assert export.main([name, "--checkpoint", str(path.parent)]) == 0
    return path


def test_a_vae_reads_pictures_of_its_size(large_runs, in_tmp):
    run_dir = str(large_runs("vae"))
    Image.radial_gradient("L").save("given.png")
    path = str(exported("vae", large_runs))
    command = ["--model", path, "--class", "o", "--reconstruct", "given.png"]
    assert infer_onnx.main([*command, "--output", "onnx.npz"]) == 0
    command = ["reconstruct", "vae", "given.png", "--class", "o", "--checkpoint", run_dir]
    assert explore.main([*command, "--output", "torch.npz"]) == 0
    a, b = (np.load(f"{way}.npz")["x"].astype(int) for way in ("torch", "onnx"))
    assert a.shape == b.shape == (2, 1, 64, 64) and np.abs(a - b).max() <= 2


@pytest.mark.parametrize("name", ["ddim", "ldm"])
def test_inpainting_fills_the_lower_half_of_64_pixels(name, large_runs, in_tmp, capsys):
    command = ["inpaint", name, "0", "--checkpoint", str(large_runs(name)), "--steps", "2"]
    assert explore.main([*command, "--output", "x.npz"]) == 0
    given, _, filled, *_ = np.load("x.npz")["x"]
    assert given.shape == (1, 64, 64) and np.array_equal(given[:, :32], filled[:, :32])
    assert not np.array_equal(given[:, 32:], filled[:, 32:])
    error = refused(explore.main, [*command, "--hole", "0,0,68,8"], capsys)
    assert "the images have 64x64 pixels" in error


def test_a_student_has_the_size_and_the_schedule_of_its_teacher(large_runs, in_tmp, monkeypatch):
    monkeypatch.setattr(distill, "WALKS", 1)
    monkeypatch.setattr(distill, "TEACHER_STEPS", 4)
    flags = split("--train --epochs 1 --batch-size 2 --steps 2 --run-dir student --teacher")
    assert distill.main([*flags, str(large_runs("ddim"))]) == 0
    config = torch.load("student/distill.pt", weights_only=True)["config"]
    assert export.image_shape(config) == [1, 64, 64]
    card = export.diffusion_card(distill, config, None)
    assert card["alpha_bars"] == ddim.make_alpha_bars("cosine", 1000, 64).tolist()


def test_a_run_that_knows_no_size_has_32(tiny_run, in_tmp, capsys):
    """As checkpoints are that were written before there was --image-size."""
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    del checkpoint["config"]["image_size"]
    Path("old").mkdir()
    torch.save(checkpoint, "old/ddim.pt")
    assert ddim.main(["--resume", "--epochs", "7", "--run-dir", "old"]) == 0
    assert torch.load("old/ddim.pt", weights_only=True)["config"]["image_size"] == 32
    error = refused(ddim.main, ["--resume", "--image-size", "64", "--run-dir", "old"], capsys)
    assert "--image-size is 32 and cannot change" in error


# --- Pictures -------------------------------------------------------------------------------------


def read(path, channels, image_size):
    """A picture as load_image and as infer_onnx.read_pixels see it, which must agree: uint8."""
    found = load_image(path, channels, image_size=image_size)[0].numpy()
    other = infer_onnx.read_pixels(path, [channels, image_size, image_size])
    assert found.shape == other.shape == (channels, image_size, image_size)
    assert np.abs(found.astype(int) - other).max() <= 1
    return found


@pytest.mark.parametrize("image_size", common.IMAGE_SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_wide_or_high_picture_gives_its_middle_square(in_tmp, image_size, turned):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, :30], pixels[:, 70:] = (255, 0, 0), (0, 0, 255)  # cut off
    pixels[:20, 30:70], pixels[20:, 30:70] = (0, 255, 0), (9, 9, 9)
    pixels = pixels.transpose(1, 0, 2).copy() if turned else pixels
    Image.fromarray(pixels).save("x.png")
    np.savez("x.npz", x=pixels[None])
    found = read("x.png", 3, image_size)
    found = found.transpose(0, 2, 1) if turned else found
    assert (found[0] <= 9).all() and (found[2] <= 9).all()  # neither red nor blue
    assert (found[1, : image_size // 2 - 2] == 255).all()
    assert (found[:, image_size // 2 + 2 :] == 9).all()
    images = load_data("x.npz", channels=3, image_size=image_size).images[0].numpy()
    assert np.array_equal(images.transpose(0, 2, 1) if turned else images, found)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
def test_28_pixels_get_a_frame_in_the_colour_of_their_corners(in_tmp, colour):
    pixels = np.full((28, 28, 3), colour, np.uint8)
    pixels[4:24, 4:24] = 77
    pixels[10:, 0] = 5  # what touches an edge does not count
    pixels[27, 0] = colour
    Image.fromarray(pixels).save("x.png")
    framed = np.full((32, 32, 3), colour, np.uint8)
    framed[2:30, 2:30] = pixels
    assert np.array_equal(read("x.png", 3, 32), framed.transpose(2, 0, 1))
    twice = read("x.png", 3, 64)
    assert (twice[:, :3] == np.array(colour)[:, None, None]).all()
    assert (twice[:, 14:50, 14:50] == 77).all()


def test_28_pixels_whose_corners_differ_get_a_black_frame(in_tmp):
    pixels = np.full((3, 28, 28), 255, np.uint8)
    pixels[1, 0, 0] = 254  # of the second image alone
    np.savez("x.npz", x=pixels)
    images = load_data("x.npz").images[:, 0]
    assert images.shape == (3, 32, 32) and (images[[0, 2]] == 255).all()
    assert (images[1, 0] == 0).all() and (images[1, 2:30, 31] == 0).all()
    Image.fromarray(pixels[1]).save("x.png")
    assert np.array_equal(read("x.png", 1, 32)[0], images[1])


def test_data_that_do_not_fit_into_memory_are_refused_before_they_are_read(in_tmp, monkeypatch):
    Path("pets").mkdir()
    for i in range(10):
        Path(f"pets/{i}.png").write_bytes(b"never opened")
    np.savez("x.npz", x=np.zeros((10, 40, 40, 3), np.uint8))
    monkeypatch.setattr(
        os, "sysconf", lambda key: {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 983}[key]
    )
    for name in ("pets", "x.npz"):
        message = "10 images of 3x128x128 need 0.0 GB while they are read"
        with pytest.raises(common.InputError, match=message):
            load_data(name, channels=3, image_size=128)  # 2 * 10 * 3 * 128^2 = 983,040 bytes
    monkeypatch.setattr(
        os, "sysconf", lambda key: {"SC_PAGE_SIZE": 96, "SC_PHYS_PAGES": 10240}[key]
    )
    data = load_data("x.npz", channels=3, image_size=128)
    assert str(data).splitlines()[0].endswith("values 0..0, 0 MB")
