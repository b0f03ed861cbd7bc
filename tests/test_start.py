"""--start: a new run from a checkpoint's averaged weights, on other data and classes."""

import importlib
import signal
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import LOOPS, ROOT, TINY_FLAGS, equal, refused

import export
from common import load_data

# A run of one step, whose first checkpoint has the weights that it began with.
FLAGS = split("--train --epochs 0.1 --data other.npz --run-dir new")


@pytest.fixture
def others(in_tmp):
    """Twenty images of three classes that are not those of the tiny runs."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    np.savez("other.npz", x=pixels, y=np.arange(20) % 3, class_names=["cat", "dog", "eel"])


@pytest.fixture(params=LOOPS)
def name(request):
    return request.param


def began_with(name, flags, monkeypatch, network=None):
    """The weights, EMA and other parts of a run's first checkpoint, before any step."""
    script = importlib.import_module(name)
    saved = {}
    save = script.Run.save

    def spy(run, content, *args, **options):
        if run.step == 0:
            parts = {"weights", "ema", "discriminator"} & content.keys()
            copies = {key: {k: w.clone() for k, w in content[key].items()} for key in parts}
            saved.setdefault(run.stem, copies)
        save(run, content, *args, **options)

    monkeypatch.setattr(script.Run, "save", spy)
    network = TINY_FLAGS[name][2:] if network is None else network
    assert script.main([*flags, *network]) == 0
    return saved


def is_of_classes(key):
    return key.endswith("label.weight")


def test_a_run_begins_with_the_averaged_weights_but_for_the_classes(
    name, tiny_runs, others, monkeypatch, capsys
):
    path = tiny_runs(name) / f"{name}.pt"
    start = torch.load(path, weights_only=True)
    saved = began_with(name, [*FLAGS, "--start", str(path)], monkeypatch)
    said = capsys.readouterr().out
    step = start["step"]
    assert f"started from {path}, step {step}, with a new class table" in said
    found = saved[name]["ema"]
    assert found.keys() == start["ema"].keys()
    tables = [key for key in found if is_of_classes(key)]
    assert len(tables) == (2 if name == "vae" else 1)
    for key, weight in found.items():
        if key in tables:
            assert weight.shape != start["ema"][key].shape
        elif key not in ("latent_mean", "latent_std") and not key.startswith("autoencoder."):
            assert torch.equal(weight, start["ema"][key]), key
    if name == "gan":
        for key, weight in saved[name]["discriminator"].items():
            assert is_of_classes(key) or torch.equal(weight, start["discriminator"][key]), key
    if name == "ldm":  # stage 1 begins with its autoencoder, which stage 2 takes from stage 1
        for key, weight in saved["autoencoder"]["weights"].items():
            assert torch.equal(weight, start["ema"][f"autoencoder.{key}"]), key
    trained = torch.load(f"new/{name}.pt", weights_only=True)
    if name == "ldm":  # its latents are standardised anew, for these images
        images = load_data("other.npz").images
        network = importlib.import_module(name).ema_network(trained, torch.device("cpu"))
        std, mean = torch.std_mean(network.to_latents(images), dim=(0, 2, 3))
        assert torch.allclose(std, torch.ones(8), atol=1e-3)
        assert torch.allclose(mean, torch.zeros(8), atol=1e-3)
    assert trained["class_names"] == ["cat", "dog", "eel"]
    assert trained["config"]["start"] == str(path)


def test_the_same_classes_keep_their_table(tiny_runs, in_tmp, data_dir, monkeypatch, capsys):
    folder = tiny_runs("ddpm")  # ddim.py starts from runs of ddpm.py too
    flags = [*split("--train --epochs 0.1 --run-dir new --data kmnist --data-dir"), data_dir]
    saved = began_with("ddim", [*flags, "--start", str(folder)], monkeypatch)
    start = torch.load(folder / "ddpm.pt", weights_only=True)
    assert equal(saved["ddim"]["weights"], start["ema"])
    assert "with its class table" in capsys.readouterr().out


def test_other_classes_have_a_table_of_their_own_also_if_they_are_as_many(
    tiny_runs, in_tmp, monkeypatch, capsys
):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    np.savez("other.npz", x=pixels, y=np.arange(20) % 10, class_names=[*"abcdefghij"])
    saved = began_with("ddim", [*FLAGS, "--start", str(tiny_runs("ddim"))], monkeypatch)
    start = torch.load(tiny_runs("ddim") / "ddim.pt", weights_only=True)["ema"]
    same = {key for key, weight in saved["ddim"]["ema"].items() if torch.equal(weight, start[key])}
    assert {*start} - same == {"embedding.label.weight"}
    assert "with a new class table" in capsys.readouterr().out


def test_a_resumed_run_needs_neither_the_flag_nor_the_file(tiny_runs, others, in_tmp, capsys):
    ddim = importlib.import_module("ddim")
    Path("start.pt").write_bytes((tiny_runs("ddim") / "ddim.pt").read_bytes())
    assert ddim.main([*FLAGS, "--start", "start.pt", *TINY_FLAGS["ddim"][2:]]) == 0
    Path("start.pt").unlink()
    assert ddim.main(["--resume", "--epochs", "2", "--run-dir", "new"]) == 0
    assert "started from" not in capsys.readouterr().out.split("run new on")[1]
    config = torch.load("new/ddim.pt", weights_only=True)["config"]
    assert export.names_of_files(config)["start"] == "start.pt"  # in the card


def test_a_first_stage_is_resumed_without_the_file_that_the_second_begins_with(
    tiny_runs, others, in_tmp, monkeypatch
):
    ldm = importlib.import_module("ldm")
    Path("start.pt").write_bytes((tiny_runs("ldm") / "ldm.pt").read_bytes())
    start = torch.load("start.pt", weights_only=True)["ema"]
    save = ldm.Run.save

    def interrupted(run, *given, **options):
        save(run, *given, **options)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ldm.Run, "save", interrupted)
        assert ldm.main([*FLAGS, "--start", "start.pt", *TINY_FLAGS["ldm"][2:]]) == 130
    Path("start.pt").unlink()
    saved = began_with("ldm", ["--resume", "--run-dir", "new"], monkeypatch, network=[])
    weights = saved["ldm"]["weights"]
    assert "autoencoder" not in saved and len(weights) > 10
    for key, weight in weights.items():
        assert is_of_classes(key) or torch.equal(weight, start[f"denoiser.{key}"]), key


def test_weights_that_may_know_the_held_out_images_are_named(tiny_runs, in_tmp, data_dir, capsys):
    data = [*split("--train --epochs 0.1 --data kmnist --data-dir"), data_dir]
    autoencoder = ["--autoencoder", tiny_runs("ldm") / "autoencoder.pt"]
    for name, flags in (("ddim", ["--start", tiny_runs("ddim")]), ("ldm", autoencoder)):
        flags = [*map(str, flags), *data, *TINY_FLAGS[name][2:]]
        script = importlib.import_module(name)
        assert script.main([*flags, "--hold-out"]) == 0
        said = ".pt was trained without --hold-out: it may know what is held out here"
        assert said in capsys.readouterr().out
        assert script.main(flags) == 0
        assert said not in capsys.readouterr().out


WRONG = [
    ("ddim", "--channels 3", "--channels is 1 in"),
    ("ddim", "--image-size 64", "--image-size is 32 in"),
    ("ddim", "--widths 8,32", "--widths is (8, 16) in"),
    ("ddim", "--prediction eps", "--prediction is v in"),
    ("ddim", "--schedule linear", "--schedule is cosine in"),
    ("ldm", "--num-timesteps 500", "--num-timesteps is 1000 in"),
    ("vae", "--latent-dim 5", "--latent-dim is 4 in"),
    ("gan", "--loss hinge", "--loss is nonsaturating in"),
    ("ldm", "--latent-channels 4", "--latent-channels is 8 in"),
    ("ldm", "--stage 2", "leave out --stage 2"),
    ("ddim", "--start nowhere.pt", "there is no nowhere.pt"),
]


@pytest.mark.parametrize(("name", "flags", "message"), WRONG)
def test_what_does_not_fit_is_one_line(name, flags, message, tiny_runs, others, in_tmp, capsys):
    argv = [*FLAGS, "--start", str(tiny_runs(name)), *TINY_FLAGS[name][2:], *split(flags)]
    error = refused(importlib.import_module(name).main, argv, capsys)
    assert message in error and not Path("new").exists()


def test_start_and_resume_are_two_things(name, tiny_runs, in_tmp, capsys):
    folder = str(tiny_runs(name))
    for flags, message in (
        (["--resume", "--run-dir", folder], "--start begins a new run"),
        ([], "--start: to train a model"),
    ):
        flags = [*flags, "--start", folder]
        assert message in refused(importlib.import_module(name).main, flags, capsys)


def test_the_included_weights_can_be_started_from(in_tmp, monkeypatch, capsys):
    """Also those of the GAN, which have no discriminator, and none that knows --image-size."""
    rng = np.random.default_rng(0)
    np.savez("x.npz", x=rng.integers(0, 256, (8, 28, 28), dtype=np.uint8))
    flags = split("--train --epochs 0.1 --batch-size 8 --data x.npz --start")
    gan = importlib.import_module("gan")
    assert gan.main([*flags, str(ROOT / "pretrained/gan.pt")]) == 0
    assert "the discriminator is new" in capsys.readouterr().out
    start = torch.load(ROOT / "pretrained/ddim.pt", weights_only=True)
    saved = began_with("ddim", [*flags, str(ROOT / "pretrained/ddim.pt")], monkeypatch, [])
    found = saved["ddim"]["weights"]  # float32 of its float16
    assert all(
        is_of_classes(k) or torch.equal(w, start["ema"][k].float()) for k, w in found.items()
    )
