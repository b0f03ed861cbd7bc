"""vae.py: its equations against independent oracles, its prior, its pictures."""

import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from shlex import split

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, lines_of, refused
from torch import distributions

import common
import vae


def test_kl_is_that_of_torchs_distributions():
    mu, logvar = torch.randn(5, 7), torch.randn(5, 7)
    oracle = distributions.kl_divergence(
        distributions.Normal(mu, (0.5 * logvar).exp()),
        distributions.Normal(torch.zeros(()), torch.ones(())),
    )
    assert torch.allclose(vae.kl_divergence(mu, logvar), oracle.sum(dim=1), atol=1e-5)
    assert vae.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_codes_have_the_mean_and_variance_asked_for():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 4.0]]).clamp(min=1).log()
    z = vae.reparameterise(mu, logvar, torch.randn(100_000, 2))
    assert torch.allclose(z.mean(dim=0), mu[0], atol=0.03)
    assert torch.allclose(z.std(dim=0), torch.tensor([1.0, 2.0]), atol=0.03)


@pytest.mark.parametrize("kind", ["l2", "l1", "sigma", "bce"])
def test_reconstruction_losses_are_negative_log_likelihoods(kind):
    """Of torch's distributions, up to a constant that neither logits nor scale change."""
    logits, x = torch.randn(4, 1, 6, 6), torch.rand(4, 1, 6, 6) * 2 - 1
    x_hat = logits.tanh()
    if kind == "sigma":
        sigma = (x - x_hat).square().mean().sqrt()
        oracle = -distributions.Normal(x_hat, sigma).log_prob(x) - 0.5 * np.log(2 * np.pi)
    elif kind == "l2":
        oracle = -distributions.Normal(x_hat, 1.0).log_prob(x) - 0.5 * np.log(2 * np.pi)
    elif kind == "l1":
        oracle = -distributions.Laplace(x_hat, 1.0).log_prob(x) - np.log(2)
    else:
        values, p = (x + 1) / 2, (x_hat + 1) / 2
        oracle = -(values * p.log() + (1 - values) * (1 - p).log())
    found = vae.reconstruction_loss(logits, x, kind)
    assert torch.allclose(found, oracle.flatten(1).sum(dim=1), rtol=1e-4, atol=1e-4)


def test_the_optimal_sigma_is_optimal():
    """Any other scale gives a larger loss, and the gradient is that at a constant scale."""
    logits, x = torch.randn(8, 1, 4, 4, requires_grad=True), torch.rand(8, 1, 4, 4) * 2 - 1
    found = vae.reconstruction_loss(logits, x, "sigma").sum()
    squares = (x - logits.tanh()).square()
    for factor in (0.9, 1.1):
        sigma = squares.mean().sqrt().detach() * factor
        assert found < (0.5 * squares / sigma**2 + sigma.log()).sum()
    held = 0.5 * squares / squares.mean().detach()
    gradients = [
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, held.sum())
    ]
    assert torch.allclose(*gradients) and gradients[0].abs().max() > 0


# --- Prior ----------------------------------------------------------------------------------------


def two_lumps(count=4000):
    """Codes of two classes: class 0 has two lumps, class 1 a slanted one."""
    rng = np.random.default_rng(0)
    lumps = rng.normal(0, 0.3, (count, 2)) + np.where(rng.random((count, 1)) < 0.25, 3.0, -1.0)
    slanted = rng.normal(0, 1, (count, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]]) + 5
    codes = torch.from_numpy(np.concatenate([lumps, slanted])).float()
    return codes, torch.arange(2).repeat_interleave(count)


def codes_of(prior, label, count=10_000, dim=2):
    arrays = prior and vae.by_class({key: value.numpy() for key, value in prior.items()})
    return vae.sample_codes(arrays, [label] * count, common.noise_streams(3, range(count)), dim)


def test_a_mixture_is_found_again():
    codes, labels = two_lumps()
    prior = vae.fit_prior(codes, labels, 2, 2, seed=0)
    assert sorted(prior["weights"][0].tolist()) == pytest.approx([0.25, 0.75], abs=0.03)
    assert sorted(prior["means"][0, :, 0].tolist()) == pytest.approx([-1, 3], abs=0.05)
    found = codes_of(prior, 0)
    assert (found[:, 0] > 1).mean() == pytest.approx(0.25, abs=0.03)
    assert not ((found[:, 0] > 0.5) & (found[:, 0] < 1.5)).any()  # nothing between the lumps
    for label in (0, 1):
        given, found = codes[labels == label].numpy(), codes_of(prior, label)
        assert np.allclose(found.mean(axis=0), given.mean(axis=0), atol=0.06)
        assert np.allclose(np.cov(found.T), np.cov(given.T), atol=0.12)


def test_one_gaussian_needs_no_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    codes, labels = two_lumps()
    prior = vae.fit_prior(codes, labels, 3, 1, seed=0)
    found = codes_of(prior, 1)
    assert np.allclose(np.cov(found.T), np.cov(codes[labels == 1].numpy().T), atol=0.1)
    assert np.allclose(np.cov(codes_of(prior, 2).T), np.eye(2), atol=0.05)  # a class without images


def test_a_class_of_few_images_stores_one_gaussian():
    """A thousand classes of two images, and a mixture beside them."""
    codes, labels = two_lumps(1000)
    few = torch.arange(1000) // 2
    prior = vae.fit_prior(codes[1000:], few, 500, 15, seed=0)
    assert prior["weights"].shape == (500, 1) and prior["scales"].shape == (500, 1, 3)
    mixed = vae.fit_prior(codes, torch.cat([labels[:1000], few + 1]), 502, 2, seed=0)
    assert mixed["counts"].tolist() == [2] + [1] * 501 and mixed["means"].shape == (503, 2)
    found = codes_of(mixed, 0)
    assert (found[:, 0] > 1).mean() == pytest.approx(0.25, abs=0.05)
    assert np.allclose(codes_of(mixed, 250), codes_of(prior, 249))
    assert np.allclose(np.cov(codes_of(mixed, 501).T), np.eye(2), atol=0.05)
    arrays = vae.by_class({key: value.numpy() for key, value in mixed.items()})
    stream = SimpleNamespace(
        standard_normal=lambda shape, dtype: np.zeros(shape, dtype),
        random=lambda: 1 - 2**-30,  # 1 in float32: beyond the end of all weights
    )
    for label, own in ((0, mixed["means"][1]), (1, mixed["means"][2])):
        assert np.allclose(vae.sample_codes(arrays, [label], [stream], 2), own)


def test_without_scikit_learn_training_says_so_and_fits_one_gaussian(
    in_tmp, data_dir, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert vae.main(["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["vae"]]) == 0
    assert "scikit-learn is not installed" in capsys.readouterr().out
    prior = torch.load("runs/vae/vae.pt", weights_only=True)["prior"]
    assert prior["weights"].shape == (10, 1)


def test_the_prior_of_sorted_pictures_knows_all_classes(in_tmp):
    """2,000 images would be of the first of three classes alone."""
    y = np.arange(6300) // 2100
    np.savez("sorted.npz", x=np.random.default_rng(0).integers(0, 256, (6300, 8, 8), np.uint8), y=y)
    flags = [*TINY_FLAGS["vae"], *split("--data sorted.npz --epochs 0.01 --prior-components 1")]
    assert vae.main(["--train", *flags]) == 0
    prior = torch.load("runs/vae/vae.pt", weights_only=True)["prior"]
    assert (prior["means"] != 0).any(dim=2).all()


def test_truncated_noise_is_in_range_and_does_not_depend_on_the_batch():
    streams = lambda indices: common.noise_streams(0, indices)  # noqa: E731
    codes = vae.sample_codes(None, [0] * 500, streams(range(500)), 8, truncation=0.7)
    assert np.abs(codes).max() <= 0.7 and codes.std() == pytest.approx(0.39, abs=0.03)
    part = vae.sample_codes(None, [0] * 2, streams([7, 8]), 8, truncation=0.7)
    assert np.array_equal(codes[7:9], part)
    prior = {"weights": np.full((1, 9), 1 / 9), "means": np.arange(9.0)[None, :, None] * np.ones(8)}
    prior["scales"] = np.zeros((1, 9, 36))  # so that a code tells its component
    chosen = vae.sample_codes(prior, [0] * 500, streams(range(500)), 8, truncation=0.7)
    part = vae.sample_codes(prior, [0] * 2, streams([7, 8]), 8, truncation=0.7)
    assert np.array_equal(chosen[7:9], part)
    assert len(np.unique(chosen)) == 9
    free = vae.sample_codes(None, [0] * 500, streams(range(500)), 8)
    inside = np.abs(free).max(axis=1) <= 0.7
    assert np.array_equal(codes[inside], free[inside])


def test_the_run_ends_with_the_mixture_asked_for(tiny_runs, tmp_path, in_tmp):
    checkpoint = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)
    assert checkpoint["prior"]["weights"].shape == (10, 2)
    assert checkpoint["prior"]["scales"].shape == (10, 2, 10)
    flags = ["--checkpoint", str(tiny_runs("vae")), *split("--class o --num-samples 5 --output")]
    assert vae.main([*flags, "fitted.npz"]) == 0
    assert vae.main([*flags, "normal.npz", "--prior", "normal"]) == 0
    assert not np.array_equal(np.load("fitted.npz")["x"], np.load("normal.npz")["x"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_mixture_is_fitted_keeps_what_was_saved(
    number, in_tmp, data_dir, monkeypatch, capsys
):
    fit_prior = vae.fit_prior

    def interrupted(codes, labels, num_classes, components, seed):
        if components > 1:
            signal.raise_signal(number)
        return fit_prior(codes, labels, num_classes, components, seed)

    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["vae"]]
    with monkeypatch.context() as patch:
        patch.setattr(vae, "fit_prior", interrupted)
        assert vae.main(flags) == 130
    said = capsys.readouterr().out
    assert "Resume with:\n  python vae.py --resume --run-dir runs/vae" in said
    saved = torch.load("runs/vae/vae.pt", weights_only=True)
    assert saved["step"] == 3 and saved["prior"]["weights"].shape == (10, 1)
    assert vae.main(["--resume"]) == 0
    fitted = torch.load("runs/vae/vae.pt", weights_only=True)
    assert fitted["step"] == 3 and fitted["prior"]["weights"].shape == (10, 2)


def test_a_signal_while_the_last_checkpoint_is_written_skips_the_mixture(
    in_tmp, data_dir, monkeypatch
):
    fit_prior, calls = vae.fit_prior, []

    def interrupted(codes, labels, num_classes, components, seed):
        calls.append(components)
        if len(calls) == 2:  # of the first and the last checkpoint
            signal.raise_signal(signal.SIGINT)
        return fit_prior(codes, labels, num_classes, components, seed)

    monkeypatch.setattr(vae, "fit_prior", interrupted)
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["vae"]]
    assert vae.main(flags) == 130
    assert calls == [1, 1]


def test_an_exact_or_a_wild_network_leaves_the_losses_finite():
    x = torch.ones(1, 1, 2, 2)
    exact = torch.full_like(x, 20.0)  # whose tanh is 1
    assert vae.reconstruction_loss(exact, x, "sigma").isfinite().all()
    network = {"channels": 1, "num_classes": 2, "latent_dim": 3, "widths": (8, 8)}
    encoder = vae.Encoder(**network, emb_channels=8)
    for value, limit in ((1e3, 10), (-1e3, -20)):
        torch.nn.init.constant_(encoder.head.bias, value)
        mu, logvar = encoder(torch.zeros(1, 1, 32, 32), torch.eye(2)[:1])
        assert (logvar == limit).all() and (mu != limit).all()
        assert vae.kl_divergence(torch.zeros(1, 3), logvar).isfinite().all()


def test_a_prior_is_fitted_once_or_after_ctrl_c_or_for_another_number_of_gaussians(
    tiny_runs, in_tmp, monkeypatch
):
    shutil.copytree(tiny_runs("vae"), "run")
    files = [Path("run/log.jsonl"), Path("run/vae.pt")]
    resume, fit_prior, fits = ["--resume", "--run-dir", "run"], vae.fit_prior, []

    def interrupted(codes, labels, num_classes, components, seed):
        fits.append(components)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit_prior(codes, labels, num_classes, components, seed)

    monkeypatch.setattr(vae, "fit_prior", interrupted)
    before = [path.read_bytes() for path in files]
    assert vae.main(resume) == 0 and fits == []
    assert [path.read_bytes() for path in files] == before
    assert vae.main([*resume, "--prior-components", "3"]) == 130 and fits == [1, 3]
    assert vae.main(resume) == 0 and vae.main(resume) == 0 and fits == [1, 3, 3]
    shape = torch.load("run/vae.pt", weights_only=True)["prior"]["means"].shape
    assert shape[1] == 3
    assert vae.main(["--resume", "--run-dir", "run", "--prior-components", "0"]) == 0
    kept = torch.load("run/vae.pt", weights_only=True)
    assert kept["prior"] is None and kept["config"]["prior_components"] == 0


# --- Log ------------------------------------------------------------------------------------------


def test_the_log_tells_reconstruction_kl_and_active_units(in_tmp, data_dir, monkeypatch):
    """Means over three steps, and how many units of the averaged weights vary with the image."""
    told = {"reconstruction": [], "kl": []}

    def spied(key, function):
        def spy(*given):
            found = function(*given)
            told[key].append(found.mean().item())
            return found

        return spy

    for key, name in (("reconstruction", "reconstruction_loss"), ("kl", "kl_divergence")):
        monkeypatch.setattr(vae, name, spied(key, getattr(vae, name)))
    monkeypatch.setattr(vae, "LOG_EVERY", 3)
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, *TINY_FLAGS["vae"]]
    assert vae.main([*flags, "--kl-warmup", "1"]) == 0
    lines = lines_of("runs/vae/log.jsonl")
    steps = [line for line in lines if "kl" in line]
    assert [line["step"] for line in steps] == [3, 6]
    assert [line["kl_weight"] for line in steps] == pytest.approx([0.1, 0.25])
    for key, values in told.items():
        means = np.reshape(values, (2, 3)).mean(axis=1)
        assert [line[key] for line in steps] == pytest.approx(means, rel=1e-5), key
    ends = [line for line in lines if "active_units" in line]
    assert len(ends) == 3
    data = common.load_data("kmnist", data_dir)
    model = vae.ema_network(torch.load("runs/vae/vae.pt", weights_only=True), torch.device("cpu"))
    mu, _ = vae.encode(model, data.images, data.labels)
    active = (mu.var(dim=0) > 0.01).sum().item()
    assert ends[-1]["active_units"] == active != 4 - active


# --- Pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reconstruct", "0"], "python explore.py reconstruct vae"),
        (["--between", "0", "1"], "python explore.py between vae"),
        (["--map", "pca"], "python explore.py map vae"),
        (["--walk"], "python explore.py walk vae"),
    ],
)
def test_bad_input_is_one_line(tiny_runs, in_tmp, capsys, flags, message):
    flags = ["--checkpoint", tiny_runs("vae"), *flags]
    assert message in refused(vae.main, flags, capsys) and list(in_tmp.iterdir()) == []
