"""ddpm.py: the posterior and the ancestral sampler.

The rest is that of ddim.py, which test_consistency.py checks.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, refused
from test_ddim import Oracle

import ddim
import ddpm
import runs


@pytest.mark.parametrize("t", [1, 500, 999])
def test_posterior_against_bayes(t):
    """q(x_prev | x_t, x_0) is proportional to q(x_t | x_prev) q(x_prev | x_0), both Gaussian."""
    alpha_bars = ddpm.make_alpha_bars("linear", 1000)
    ab, ab_prev = alpha_bars[t].item(), alpha_bars[t - 1].item()
    x_0, x_t, alpha = 0.7, -0.4, ab / ab_prev
    precision = alpha / (1 - alpha) + 1 / (1 - ab_prev)
    mean = (alpha**0.5 * x_t / (1 - alpha) + ab_prev**0.5 * x_0 / (1 - ab_prev)) / precision
    x_0, x_t = torch.tensor(x_0).double(), torch.tensor(x_t).double()
    found, small = ddpm.posterior(x_0, x_t, ab, ab_prev, "small")
    assert found.item() == pytest.approx(mean, rel=1e-6)
    assert small == pytest.approx(1 / precision, rel=1e-6)
    _, large = ddpm.posterior(x_0, x_t, ab, ab_prev, "large")
    assert large == pytest.approx(1 - alpha)


def test_a_respaced_step_undoes_several_noisings():
    """Noising from s to t with beta = 1 - ab_t / ab_s and stepping back keeps q(x_s | x_0)."""
    alpha_bars = ddpm.make_alpha_bars("cosine", 1000)
    ab_t, ab_s = alpha_bars[800].item(), alpha_bars[600].item()
    x_0, eps, noise = 0.5 * torch.ones(200_000).double(), *torch.randn(2, 200_000).double()
    mean, square = ddpm.posterior(x_0, ab_t**0.5 * x_0 + (1 - ab_t) ** 0.5 * eps, ab_t, ab_s)
    x_s = mean + square**0.5 * noise
    assert x_s.mean().item() == pytest.approx(ab_s**0.5 * 0.5, abs=0.01)
    assert x_s.var().item() == pytest.approx(1 - ab_s, rel=0.02)


WALKS = [*itertools.product((1, 2, 7, 50), ("eps", "v"), ("small", "large")),
         (1000, "v", "small"), (1000, "eps", "large")]  # fmt: skip


@pytest.mark.parametrize(("steps", "prediction", "variance"), WALKS)
def test_sampler_finds_the_image_that_the_network_knows(steps, prediction, variance):
    x_0 = (torch.rand(2, 1, 4, 4) * 2 - 1).double()
    oracle, calls, trace = Oracle(x_0, "cosine", prediction), [], []

    def noise():
        calls.append(1)
        return torch.randn(x_0.shape).double()

    pairs = ddpm.time_pairs(1000, steps)
    walk = oracle, noise(), oracle.alpha_bars, pairs, prediction
    found = ddpm.ddpm_sample(*walk, variance, True, noise, trace)
    assert torch.allclose(found, x_0, atol=1e-4)
    assert oracle.times == [t for t, _ in pairs] and len(trace) == steps + 1
    assert len(calls) == steps  # the start, and every step but the last


@pytest.mark.parametrize("steps", [5, 100])
def test_the_same_as_ddim_with_eta_1(tiny_run, steps):
    """With eta = 1 DDIM's step has DDPM's posterior: from the same noise, the same image."""
    checkpoint = runs.load_checkpoint(tiny_run / "ddim.pt", ("ddim",))
    options = {
        "model": ddim.ema_network(checkpoint, torch.device("cpu")),
        "config": {**checkpoint["config"], "num_timesteps": 100},
        "labels": torch.arange(3), "steps": steps, "seed": 2,
        "guidance": 1.5, "guidance_interval": (0, 0.8),
    }  # fmt: skip
    with_noise = ddim.sample(**options, solver="ddim", eta=1.0)
    assert (ddpm.sample(**options) - with_noise).abs().max() < 1e-3


def test_each_samples_the_checkpoints_of_the_other(tiny_run, in_tmp, data_dir):
    assert ddpm.main(["--checkpoint", str(tiny_run), "--steps", "3", "--output", "a.npz"]) == 0
    assert ddpm.main(["--train", "--epochs", "0.5", "--data-dir", data_dir, *TINY]) == 0
    assert ddim.main(["--checkpoint", "runs/ddpm", "--steps", "3", "--output", "b.npz"]) == 0
    assert np.load("a.npz")["x"].shape == np.load("b.npz")["x"].shape == (10, 1, 32, 32)
    first = torch.load("runs/ddpm/ddpm.pt", weights_only=True)
    second = torch.load(tiny_run / "ddim.pt", weights_only=True)
    assert first.keys() == second.keys() and first["config"].keys() == second["config"].keys()
    assert first["network"] == second["network"]


def test_each_samples_from_the_newest_run_of_both(in_tmp, data_dir, capsys):
    for script in (ddim, ddpm, ddim):
        assert script.main(["--train", "--epochs", "0.1", "--data-dir", data_dir, *TINY]) == 0
        newest = max(Path("runs").glob("*/*.pt"), key=lambda path: path.stat().st_mtime)
        assert newest.stem == script.NAME
        for sampler in (ddpm, ddim):
            capsys.readouterr()
            assert sampler.main(["--class", "o", "--steps", "2"]) == 0
            assert f"(weights: {newest})" in capsys.readouterr().out


def test_it_takes_no_eta(tiny_run, capsys):
    assert "unrecognized" in refused(ddpm.main, ["--checkpoint", tiny_run, "--eta", "1"], capsys)
