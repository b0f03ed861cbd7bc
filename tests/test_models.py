"""What all five scripts have in common: they train, resume, sample, and refuse bad input."""

import importlib
import shutil
import signal
from shlex import split

import numpy as np
import pytest
import torch
from conftest import LOOPS, TINY_FLAGS, equal, refused, state
from PIL import Image

import runs


@pytest.fixture(params=[*TINY_FLAGS])
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("name", LOOPS)
def test_interrupted_and_resumed_is_the_same_as_unbroken_bit_for_bit(
    name, script, in_tmp, data_dir, monkeypatch
):
    monkeypatch.setattr(script, "LOG_EVERY", 2)
    flags = ["--train", "--epochs", "4", "--data-dir", data_dir, *TINY_FLAGS[name]]
    assert script.main([*flags, "--run-dir", "whole"]) == 0
    update, calls = script.AveragedModel.update_parameters, []

    def interrupt(self, model):
        update(self, model)
        calls.append(1)
        if len(calls) in (2, 7):  # of the LDM: once in each stage
            signal.raise_signal(signal.SIGINT if len(calls) == 2 else signal.SIGTERM)

    monkeypatch.setattr(script.AveragedModel, "update_parameters", interrupt)
    assert script.main([*flags, "--run-dir", "broken"]) == 130
    assert script.main(["--resume", "--run-dir", "broken"]) == 130
    assert script.main(["--resume", "--run-dir", "broken"]) == 0
    assert len(calls) == (13 if name == "ldm" else 12)  # a fifth and the rest, both rounded up
    whole, broken = state(in_tmp / "whole"), state(in_tmp / "broken")
    assert whole.keys() == broken.keys() and len(whole) >= 3
    for key in whole:
        assert equal(whole[key], broken[key]), key


def test_a_run_leaves_what_is_needed_to_sample(
    name, script, tiny_runs, in_tmp, monkeypatch, capsys
):
    monkeypatch.setattr(script, "STEPS", 5, raising=False)  # the default
    run_dir = tiny_runs(name)
    checkpoint = torch.load(run_dir / f"{name}.pt", weights_only=True)
    assert checkpoint["model"] == name and len(checkpoint["class_names"]) == 10
    # of 18 steps; of the LDM's, a fifth trains the autoencoder
    assert checkpoint["step"] == {"ldm": 15}.get(name, 18)
    before = sorted(run_dir.rglob("*"))
    flags = ["--checkpoint", str(run_dir), "--class", "o,su", "--num-samples", "3"]
    for output in ("x.png", "x.npz", "folder/"):
        assert script.main([*flags, "--output", output]) == 0
    arrays = np.load("x.npz")
    assert arrays["x"].shape == (6, 1, 32, 32) and arrays["y"].tolist() == [0, 0, 0, 2, 2, 2]
    assert arrays["x"].std() > 5
    with Image.open("x.png") as picture:
        about = {"model": name, "seed": "0", "class": "o, su", "Software": f"{name}.py"}
        assert about.items() <= picture.text.items()
        if name in ("ddpm", "ddim", "ldm"):
            assert picture.text["steps"] == str(script.STEPS)
            assert picture.text["guidance"] == str(script.GUIDANCE)
            assert f"steps {script.STEPS}, guidance {script.GUIDANCE}, " in capsys.readouterr().out
    with Image.open("folder/00005_su.png") as picture:
        assert np.array_equal(np.array(picture), arrays["x"][5, 0])
    assert script.main([*flags, "--no-names", "--output", "plain.png"]) == 0
    with Image.open("x.png") as named, Image.open("plain.png") as plain:
        margin = named.width - plain.width
        assert margin > 20 and np.array_equal(np.array(named)[:, margin:], np.array(plain))
    # Names stand beside the grids of the run, too.
    with Image.open(max((run_dir / "samples").glob("step_*.png"))) as grid:
        assert grid.height == 3 * (10 * 34 + 2)
        assert grid.width > 3 * (8 * 34 + 2)
    assert sorted(run_dir.rglob("*")) == before


def test_an_image_depends_on_seed_and_index_alone(name, script, tiny_runs, in_tmp, monkeypatch):
    monkeypatch.setattr(script, "STEPS", 5, raising=False)

    def sampled(*flags):
        argv = split("--class o --num-samples 7 --output x.npz")
        assert script.main([*argv, "--checkpoint", str(tiny_runs(name)), *flags]) == 0
        return np.load("x.npz")["x"].astype(int)

    whole = sampled()
    assert np.abs(whole - sampled("--batch-size", "3")).max() <= 1
    assert np.abs(whole[:4] - sampled("--num-samples", "4")).max() <= 1
    assert np.abs(whole - sampled("--seed", "1")).max() > 1
    assert len({image.tobytes() for image in whole}) == 7


@pytest.mark.parametrize("name", LOOPS)
def test_trains_on_a_folder_of_pictures_in_colour(name, script, in_tmp):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (in_tmp / "pets" / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(in_tmp / "pets" / label / f"{i}.png")
    flags = [*TINY_FLAGS[name], "--data", "pets", "--batch-size", "4"]
    flags += ["--epochs", "2", "--channels", "3"]
    assert script.main(["--train", *flags]) == 0
    assert script.main(["--class", "Dog", "--num-samples", "2", "--output", "dog.npz"]) == 0
    assert np.load("dog.npz")["x"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", LOOPS)
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    name, script, in_tmp, data_dir, capsys
):
    flags = split("--train --epochs 6 --save-every 0 --warmup 0 --lr 1e30")
    flags += ["--data-dir", data_dir, *TINY_FLAGS[name]]
    error = refused(script.main, flags, capsys, alone=False)
    assert f"not finite, stopped; what runs/{name} holds is kept" in error
    kept = [*(in_tmp / "runs" / name).glob("*.pt")]
    assert kept
    for path in kept:
        weights = torch.load(path, weights_only=True)["weights"]
        assert all(value.isfinite().all() for value in weights.values())


def test_a_flag_that_would_be_ignored_is_refused(name, script, tiny_runs, in_tmp, capsys):
    where = ["--checkpoint", tiny_runs(name)]
    cases = [
        (["--list-classes", "--class", "Snaeker"], "leave out --class"),
        (["--list-classes", "--seed", "3"], "leave out --seed"),
        (["--output", "x.png/"], "'x.png/' is a folder by its /, a file by its ending"),
    ]
    if name in ("ddpm", "ddim", "ldm"):
        flags = ["--guidance", "1", "--guidance-interval", "0", "0.8"]
        cases.append((flags, "--guidance-interval is for a guidance above 1"))
    for flags, message in cases:
        assert message in refused(script.main, [*flags, *where], capsys)


def test_a_run_that_is_over_says_so_when_it_is_resumed(name, script, tiny_runs, in_tmp, capsys):
    shutil.copytree(tiny_runs(name), "run")
    assert script.main(["--resume", "--run-dir", "run"]) == 0
    assert "it was at its end: only a greater --epochs or --minutes" in capsys.readouterr().out
    assert script.main(["--resume", "--run-dir", "run", "--warmup", "1"]) == 0
    assert "--warmup 1 changes nothing: it ended before this step" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ldm"])
def test_images_of_no_class_are_called_so(name, script, tiny_runs, in_tmp, capsys):
    flags = ["--checkpoint", str(tiny_runs(name)), "--steps", "2", "--num-samples", "2"]
    pictures = []
    for guidance in ("0", "1"):
        said = "guidance 0 ignores the class"
        assert script.main([*flags, "--guidance", guidance, "--output", "x.png"]) == 0
        assert (said in capsys.readouterr().out) == (guidance == "0")
        with Image.open("x.png") as picture:
            pictures.append(picture.width)
    assert pictures[0] < pictures[1]  # without the names of the classes beside its rows
    for ends in ("0 1", "0.25 0.25"):
        argv = [*flags, "--guidance", "2", "--guidance-interval", *ends.split()]
        assert script.main([*argv, "--output", "x.png"]) == 0
        said = "guidance 2 counts as 1: no step lies in --guidance-interval"
        assert (said in capsys.readouterr().out) == (ends != "0 1")


def test_ctrl_c_while_sampling_is_one_line(name, script, tiny_runs, in_tmp, monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "sample", interrupted)
    argv = ["--checkpoint", tiny_runs(name), "--output", "x.png"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([*map(str, argv)])
    assert stop.value.code == 130 and capsys.readouterr().err == f"{name}.py: stopped\n"
    assert list(in_tmp.iterdir()) == []


def test_what_is_of_another_script_is_refused(name, script, tiny_runs, data_dir, in_tmp, capsys):
    other = "gan" if name == "vae" else "vae"
    error = refused(script.main, ["--checkpoint", tiny_runs(other) / f"{other}.pt"], capsys)
    assert f"is a checkpoint of {other}, not of {name}" in error
    shutil.copytree(tiny_runs(other), "run")  # its log and its grids would be mixed with others
    flags = ["--train", *TINY_FLAGS[name], "--data-dir", data_dir, "--run-dir", "run"]
    error = refused(script.main, flags, capsys, alone=False)
    assert "run holds a run: --resume it, or name another --run-dir" in error


def test_fixed_flags_cannot_change_on_resume(name, script, tiny_runs, capsys):
    for flag, value in (("--channels", "3"), ("--emb-channels", "20"), ("--seed", "4")):
        flags = ["--resume", "--run-dir", tiny_runs(name), flag, value]
        error = refused(script.main, flags, capsys)
        assert f"{flag} is " in error and "and cannot change in a resumed run" in error


# Besides RUN_FLAGS: any other flag would make a resumed run learn something else.
FREE = {"bf16", "lr", "warmup"}
MAY_CHANGE = {
    "vae": FREE | {"compile", "grad_clip", "kl_warmup", "prior_components"},
    "gan": FREE,
    "ddpm": FREE | {"compile", "grad_clip"},
    "ddim": FREE | {"compile", "grad_clip"},
    "ldm": FREE | {"compile", "grad_clip", "stage", "stage_1_share", "autoencoder"},
}


def test_what_may_change_on_resume_changes_nothing_that_is_learned(name, script):
    assert {*script.FREE} - {*runs.RUN_FLAGS} == MAY_CHANGE[name]


def test_every_flag_is_kept_in_the_checkpoint(name, script, tiny_runs):
    """A checkpoint holds the flags of its training, and none of the flags of sampling."""
    config = torch.load(tiny_runs(name) / f"{name}.pt", weights_only=True)["config"]
    flags = {flag.dest for flag in script.build_parser()._actions}
    action = {"help", "train", "resume", "run_dir", "class_", "list_classes", "num_samples"}
    action |= {"checkpoint", "output"}
    sampling = {"guidance", "guidance_interval", "steps", "solver", "eta", "variance", "clip"}
    sampling |= {"guidance_limit", "prior", "truncation", "names"}
    assert {*config} == flags - action - sampling
    assert config["data"] == "kmnist" and runs.FORMAT == 2
