"""ldm.py: its two stages, its latents, and its sampler with a denoiser that knows the answer."""

import os
import re
import shutil
import signal
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, lines_of, refused

import common
import ldm


@pytest.fixture(scope="module")
def loaded(tiny_runs):
    checkpoint = ldm.load_checkpoint(tiny_runs("ldm") / "ldm.pt", ("ldm",))
    return checkpoint, ldm.ema_network(checkpoint, torch.device("cpu"))


def training_images(checkpoint):
    return common.load_data("kmnist", checkpoint["config"]["data_dir"]).images


@pytest.mark.parametrize(("channels", "latents", "attention"), [(1, 4, True), (3, 1, False)])
def test_shapes(channels, latents, attention):
    model = ldm.Autoencoder(channels, latents, (8, 16), attention)
    x, eps = torch.rand(2, channels, 32, 32) * 2 - 1, torch.randn(2, latents, 8, 8)
    back, mu, logvar = model(x, eps)
    assert back.shape == x.shape and mu.shape == logvar.shape == eps.shape and back.abs().max() <= 1
    weighed = sum("weigh." in name for name in model.state_dict())
    assert (weighed > 0) == attention


def test_channel_attention_weighs_channels_by_their_means():
    block = ldm.ConvBlock(8, True)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(2, 8, 4, 4)
    plain = ldm.ConvBlock(8, False)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "weigh." not in k})
    h, weighed = plain(x) - x, block(x) - x
    weights = weighed / h
    # one weight for each channel
    assert torch.allclose(weights, weights[:, :, :1, :1].expand_as(weights), atol=1e-3)
    assert (weights > 0).all() and (weights < 1).all() and weights.std() > 0.001


def test_latents_of_the_training_set_have_mean_0_and_std_1(loaded):
    checkpoint, model = loaded
    z_0 = model.to_latents(training_images(checkpoint))
    assert z_0.shape == (60, 8, 8, 8)
    assert torch.allclose(z_0.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-3)
    assert torch.allclose(z_0.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3)
    assert model.latent_std.flatten().tolist() != [1.0] * 8  # measured, not the initial values


def test_to_latents_and_to_images_undo_each_other_s_scale(loaded):
    """What lies between them is the autoencoder alone."""
    checkpoint, model = loaded
    x = common.to_float(training_images(checkpoint)[:8])
    direct = model.autoencoder.decoder(model.autoencoder.encode(x)[0])
    assert torch.allclose(model.to_images(model.to_latents(x)), direct, atol=1e-5)
    assert torch.equal(model.to_latents(common.to_uint8(x)), model.to_latents(x))


class Oracle(torch.nn.Module):
    """A denoiser that knows z_0: its v is exact at every t."""

    def __init__(self, z_0, alpha_bars):
        super().__init__()
        self.z_0, self.alpha_bars, self.calls = z_0, alpha_bars, []

    def forward(self, z_t, t, y):
        a = self.alpha_bars[t].float().view(-1, 1, 1, 1)
        eps = (z_t - a**0.5 * self.z_0) / (1 - a) ** 0.5
        self.calls.append((int(t[0]), eps))
        return a**0.5 * eps - (1 - a) ** 0.5 * self.z_0


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_sampling_ends_in_the_decoded_latents_of_an_oracle(loaded, steps):
    checkpoint, model = loaded
    # beyond [-1, 1]: latents are not clipped
    z_0 = model.to_latents(training_images(checkpoint)[:3]) * 3
    oracle = Oracle(z_0, ldm.make_alpha_bars("cosine", 1000))
    expected, denoiser = model.to_images(z_0), model.denoiser
    model.denoiser, trace = oracle, []
    try:
        options = {"labels": torch.zeros(3, dtype=torch.int64), "steps": steps, "guidance": 1}
        found = ldm.sample(model=model, config=checkpoint["config"], trace=trace, **options)
    finally:
        model.denoiser = denoiser
    assert torch.allclose(found, expected, atol=2e-3)
    assert [t for t, _ in oracle.calls] == [t for t, _, _ in trace[:-1]] and len(trace) == steps + 1
    noises = torch.stack([eps for _, eps in oracle.calls])
    # one deterministic path: every step implies the same noise
    assert torch.allclose(noises, noises[:1].expand_as(noises), atol=1e-3)


def test_stages_alone_and_another_run_s_autoencoder(in_tmp, data_dir, monkeypatch):
    monkeypatch.setattr(ldm, "LOG_EVERY", 2)
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    assert ldm.main([*flags, "--stage", "1", "--kl-weight", "0.02", "--run-dir", "first"]) == 0
    assert not Path("first/ldm.pt").exists()
    lines = lines_of("first/autoencoder_log.jsonl")
    assert [line["step"] for line in lines if "kl" in line] == [2, 4, 6]
    errors = [line["grey_level_error"] for line in lines if "grey_level_error" in line]
    assert len(errors) == 2 and 0 < errors[1] < errors[0]
    others = ["--autoencoder", "first/autoencoder.pt", "--run-dir", "second"]
    assert ldm.main([*flags, "--stage", "2", *others]) == 0
    assert not Path("second/autoencoder.pt").exists()
    # --autoencoder also takes a folder, and implies --stage 2
    assert ldm.main([*flags, "--autoencoder", "first", "--run-dir", "third"]) == 0
    files = ("first/autoencoder.pt", "second/ldm.pt", "third/ldm.pt")
    first, second, third = (torch.load(file, weights_only=True) for file in files)
    assert second["step"] == third["step"] == 6
    for key, value in first["ema"].items():
        assert torch.equal(value, second["ema"][f"autoencoder.{key}"])
    assert torch.equal(second["ema"]["latent_std"], third["ema"]["latent_std"])
    assert second["config"]["kl_weight"] == first["config"]["kl_weight"] == 0.02


def test_flags_of_the_second_stage_are_named_in_the_first(in_tmp, data_dir, capsys):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    assert ldm.main([*flags, "--stage", "1", "--loss", "l1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"--widths.*--loss: of stage 2, which --resume --stage both trains", said)


def test_the_second_stage_takes_the_newest_autoencoder(in_tmp, data_dir, capsys):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    for _ in range(2):
        assert ldm.main([*flags, "--stage", "1"]) == 0
    os.utime("runs/ldm/autoencoder.pt", (1, 1))
    assert ldm.main([*flags, "--stage", "2"]) == 0
    said = capsys.readouterr().out
    assert "the autoencoder is runs/ldm-2/autoencoder.pt" in said
    assert Path("runs/ldm-3/ldm.pt").is_file()
    # beside a first stage, its autoencoder
    assert ldm.main([*flags, "--stage", "2", "--run-dir", "runs/ldm"]) == 0
    assert "the autoencoder is runs/ldm/autoencoder.pt" in capsys.readouterr().out


def test_the_second_stage_follows_a_first_that_is_longer_than_its_share(in_tmp, data_dir, capsys):
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    assert ldm.main([*flags, "--stage", "1"]) == 0
    shorter = ["--resume", "--stage", "1", "--epochs", "1"]
    assert "is already at 2.00 epochs" in refused(ldm.main, shorter, capsys, alone=False)
    assert ldm.main(["--resume", "--stage", "both", "--epochs", "4"]) == 0
    files = [f"runs/ldm/{name}.pt" for name in ("autoencoder", "ldm")]
    assert [torch.load(file, weights_only=True)["step"] for file in files] == [6, 10]


@pytest.mark.parametrize("flags", ["--stage 2", "--autoencoder nowhere.pt", "--stage-1-share .5"])
def test_a_second_stage_keeps_its_autoencoder(tiny_runs, tmp_path, capsys, flags):
    folder = shutil.copytree(tiny_runs("ldm"), tmp_path / "ldm")
    resume = ["--resume", "--run-dir", folder, "--epochs", "9", *flags.split()]
    error = refused(ldm.main, resume, capsys, alone=False)
    assert flags.split()[0] in error and "come too late" in error
    kept = torch.load(folder / "ldm.pt", weights_only=True)
    assert kept["step"] == 15


def test_stage_1_shows_and_judges_images_of_all_classes(in_tmp, monkeypatch):
    """A folder is sorted by class: here black images stand before noisy ones."""
    noisy = np.random.default_rng(0).integers(0, 256, (500, 32, 32), dtype=np.uint8)
    np.savez("x.npz", x=np.concatenate([noisy * 0, noisy]), y=np.arange(1000) // 500)
    saved = []
    monkeypatch.setattr(ldm.Run, "save", lambda run, state, *given, **_: saved.append(given))
    flags = split("--train --stage 1 --epochs 0.05 --data x.npz --batch-size 20")
    assert ldm.main([*flags, *TINY_FLAGS["ldm"][2:]]) == 0
    assert len(saved) == 2
    for grid, labels, (judged, judged_labels) in saved:
        assert labels.bincount().tolist() == [38, 38] and len(grid) == 76  # every ninth of 334
        varied = grid[::2].flatten(1).std(dim=1) > 0  # the real images
        assert torch.equal(varied, labels[::2] == 1)
        assert judged_labels.bincount().tolist() == [167, 167] and len(judged) == 334


@pytest.mark.parametrize("flags", (["--stage", "2"], ["--stage", "both", "--autoencoder", "x"]))
def test_a_run_is_not_resumed_in_another_stage(in_tmp, data_dir, capsys, flags):
    train = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    assert ldm.main([*train, "--stage", "1"]) == 0
    error = refused(ldm.main, ["--resume", *flags], capsys, alone=False)
    assert "leaves out the stage that runs/ldm is in" in error


def test_a_folder_that_holds_the_second_stage_alone_is_refused(in_tmp, data_dir, capsys):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    Path("run").mkdir()
    Path("run/ldm.pt").touch()
    error = refused(ldm.main, [*flags, "--run-dir", "run"], capsys, alone=False)
    assert "run holds a run" in error
    assert [path.name for path in Path("run").iterdir()] == ["ldm.pt"]


def test_ctrl_c_while_the_first_stage_is_saved_ends_the_run(in_tmp, data_dir, monkeypatch, capsys):
    save, calls = ldm.Run.save, []

    def interrupted(run, *given, **options):
        save(run, *given, **options)
        calls.append(run.part)
        if len(calls) == 2:  # at the start and at the end
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ldm.Run, "save", interrupted)
    assert ldm.main(["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]) == 130
    assert calls == ["autoencoder"] * 2 and "--resume --run-dir runs/ldm" in capsys.readouterr().out
    assert ldm.main(["--resume"]) == 0 and Path("runs/ldm/ldm.pt").is_file()


def test_a_finished_first_stage_cannot_be_resumed(tiny_runs, tmp_path, capsys):
    folder = shutil.copytree(tiny_runs("ldm"), tmp_path / "ldm")
    flags = ["--resume", "--run-dir", folder, "--stage", "1", "--epochs", "9"]
    assert "leaves out the stage" in refused(ldm.main, flags, capsys, alone=False)


def test_both_stages_share_the_epochs(tiny_runs):
    files = [tiny_runs("ldm") / f"{name}.pt" for name in ("autoencoder", "ldm")]
    stages = [torch.load(file, weights_only=True) for file in files]
    # of 18 steps, a fifth and the rest, both rounded up
    assert [checkpoint["step"] for checkpoint in stages] == [4, 15]


def test_latents_of_64_numbers_without_channel_attention(in_tmp, data_dir):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    assert ldm.main([*flags, "--latent-channels", "1", "--no-channel-attention"]) == 0
    checkpoint = ldm.load_checkpoint("runs/ldm/ldm.pt", ("ldm",))
    model = ldm.ema_network(checkpoint, torch.device("cpu"))
    assert model.to_latents(torch.zeros(2, 1, 32, 32)).shape == (2, 1, 8, 8)
    assert ldm.main(["--class", "o", "--steps", "3"]) == 0 and Path("ldm_o.png").is_file()


@pytest.mark.parametrize(
    ("flag", "was", "now"),
    [
        ("channels", 1, 3), ("image-size", 32, 64), ("latent-channels", 8, 4),
        ("autoencoder-widths", (8, 16), "8,8"), ("kl-weight", 0.01, 5.0),
    ],
)  # fmt: skip
def test_an_autoencoder_that_is_not_of_the_flags_is_refused(
    tiny_runs, in_tmp, data_dir, capsys, flag, was, now
):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    flags += [f"--{flag}", str(now)]
    flags += ["--autoencoder", tiny_runs("ldm") / "autoencoder.pt"]
    now = (8, 8) if now == "8,8" else now
    message = f"the autoencoder was trained with --{flag} {was}, not {now}"
    assert message in refused(ldm.main, flags, capsys, alone=False)
    assert not (in_tmp / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--invert", "0"], "python explore.py invert ldm"),
        (
            ["--train", "--widths", "8,8,8,8,8", "--depths", "1,1,1,1,1", "--stage", "2"],
            "latents are 8x8",
        ),
    ],
)
def test_bad_input_is_one_line(tiny_runs, in_tmp, data_dir, capsys, flags, message):
    run_dir = str(tiny_runs("ldm"))
    if "latents" in message:
        flags = [*flags, "--autoencoder", f"{run_dir}/autoencoder.pt"]
    if "--train" in flags:
        flags = [*flags, "--data", "kmnist", "--data-dir", data_dir]
    else:
        flags = ["--checkpoint", run_dir, *flags]
    assert message in refused(ldm.main, flags, capsys) and list(in_tmp.iterdir()) == []
