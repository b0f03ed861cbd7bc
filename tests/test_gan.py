"""gan.py: its losses and penalties against independent oracles, its discriminator, its pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS
from torch import nn

import gan

REAL, FAKE = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.1, 0.7, -3.0])


def log_sigmoid(h):
    return -math.log(1 + math.exp(-h))


def mean(values):
    return sum(values) / len(values)


def test_losses_are_those_of_the_papers():
    """Written out with D = sigmoid(logit), number by number."""
    pairs = list(zip(REAL.tolist(), FAKE.tolist(), strict=True))
    minmax_d = mean(
        [-log_sigmoid(r) - log_sigmoid(-f) for r, f in pairs]
    )  # -log D(x) - log(1 - D(G(z)))
    for loss in ("minmax", "nonsaturating"):
        assert gan.discriminator_loss(REAL, FAKE, loss).item() == pytest.approx(minmax_d, rel=1e-5)
    minmax_g = mean([log_sigmoid(-f) for _, f in pairs])  # log(1 - D(G(z)))
    assert gan.generator_loss(None, FAKE, "minmax").item() == pytest.approx(minmax_g, rel=1e-5)
    saturating_not = mean([-log_sigmoid(f) for _, f in pairs])  # -log D(G(z))
    assert gan.generator_loss(None, FAKE, "nonsaturating").item() == pytest.approx(
        saturating_not, rel=1e-5
    )
    hinge = mean([max(0, 1 - r) + max(0, 1 + f) for r, f in pairs])
    assert gan.discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(hinge, rel=1e-5)
    assert gan.generator_loss(None, FAKE, "hinge").item() == pytest.approx(
        -mean(FAKE.tolist()), rel=1e-5
    )
    relative_d, relative_g = (mean([-log_sigmoid(s * (r - f)) for r, f in pairs]) for s in (1, -1))
    assert gan.discriminator_loss(REAL, FAKE, "relativistic").item() == pytest.approx(
        relative_d, rel=1e-5
    )
    assert gan.generator_loss(REAL, FAKE, "relativistic").item() == pytest.approx(
        relative_g, rel=1e-5
    )


@pytest.mark.parametrize("loss", gan.LOSSES)
def test_discriminator_and_generator_pull_apart(loss):
    """A step down either loss moves the fake logit the other way, and the real one up for the discriminator."""
    real, fake = torch.tensor([0.2], requires_grad=True), torch.tensor([-0.1], requires_grad=True)
    gan.discriminator_loss(real, fake, loss).backward()
    assert real.grad < 0 < fake.grad
    fake.grad = None
    gan.generator_loss(real, fake, loss).backward()
    assert fake.grad < 0


class Quadratic(nn.Module):
    """logit = weight[class] * sum(x^2) / 2, whose gradient is weight[class] * x."""

    def forward(self, x, classes):
        return classes @ torch.tensor([1.0, 3.0]) * x.square().flatten(1).sum(dim=1) / 2


def test_gradient_penalty_of_a_known_discriminator():
    x, classes = torch.randn(4, 1, 5, 5), gan.one_hot(torch.tensor([0, 1, 1, 0]), 2)
    expected = (
        sum(w**2 * image.square().sum() for w, image in zip((1, 3, 3, 1), x, strict=True)) / 4
    )
    assert gan.gradient_penalty(Quadratic(), x, classes).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_the_penalty_has_a_gradient_for_the_discriminator():
    """Against a finite difference of one weight."""
    torch.set_default_dtype(torch.float64)
    try:
        discriminator = gan.Discriminator(1, 2, (4, 8), spectral=False)
        x, classes = torch.randn(3, 1, 32, 32), gan.one_hot(torch.tensor([0, 1, 1]), 2).double()
        weight = discriminator.stem.weight
        gan.gradient_penalty(discriminator, x, classes).backward()
        found, values = weight.grad[0, 0, 1, 1].item(), []
        for shift in (1e-5, -2e-5):
            weight.data[0, 0, 1, 1] += shift
            values.append(gan.gradient_penalty(discriminator, x, classes).item())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3)


@pytest.mark.parametrize("widths", [(4, 8), (8, 8), (8,)])
def test_the_discriminator_projects_on_the_class(widths):
    """Miyato & Koyama eq. (4): between two classes the logit changes by <h, the rows' difference>."""
    discriminator = gan.Discriminator(1, 3, widths, spectral=False)
    x, seen = torch.randn(5, 1, 32, 32), []
    discriminator.out.register_forward_hook(lambda module, given, _: seen.append(given[0]))
    logits = [discriminator(x, gan.one_hot(torch.full((5,), y), 3)) for y in (0, 2)]
    rows = discriminator.label.weight.T
    assert torch.allclose(
        logits[1] - logits[0], seen[0] @ (rows[2] - rows[0]) / 128**0.5, atol=1e-6
    )


def test_there_is_no_batch_norm_and_an_image_does_not_depend_on_its_batch():
    generator, discriminator = (
        gan.Generator(1, 3, 4, (8, 16), 16),
        gan.Discriminator(1, 3, (4, 8), spectral=False),
    )
    for network in (generator, discriminator):
        assert not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()
        )
    z, classes = torch.randn(6, 4), gan.one_hot(torch.arange(6) % 3, 3)
    images = generator(z, classes)
    assert torch.allclose(images[2:3], generator(z[2:3], classes[2:3]), atol=1e-6)
    assert images.shape == (6, 1, 32, 32) and images.abs().max() <= 1


def test_hinge_bounds_the_discriminator_spectrally():
    discriminator = gan.Discriminator(1, 2, (4, 8), spectral=True)
    for _ in range(30):
        discriminator(
            torch.randn(2, 1, 32, 32), torch.eye(2)
        )  # the power iteration goes on in training mode
    for layer in (discriminator.features, discriminator.stem, discriminator.blocks[0].conv1):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(
            1, abs=0.05
        )


@pytest.mark.parametrize("loss", gan.LOSSES)
def test_every_loss_trains_and_logs(in_tmp, data_dir, monkeypatch, loss):
    monkeypatch.setattr(gan, "LOG_EVERY", 2)
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, "--loss", loss, *TINY_FLAGS["gan"]]
    assert gan.main([*flags, "--penalty-every", "3"]) == 0
    lines = [json.loads(line) for line in Path("runs/gan/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss_g" in line]
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert {"loss_g", "loss_d", "real_logits", "fake_logits", "penalty"} <= {*steps[0]}
    assert (steps[0]["penalty"] > 0) == (loss in ("relativistic", "nonsaturating"))
    assert [len(line["diversity"]) for line in lines if "diversity" in line] == [10, 10]
    checkpoint = torch.load("runs/gan/gan.pt", weights_only=True)
    assert checkpoint["optimizer"]["state"] and checkpoint["optimizer_d"]["state"]


@pytest.mark.parametrize(("loss", "penalties"), [("nonsaturating", 1), ("relativistic", 2)])
def test_lazy_penalties_weigh_as_much_as_they_are_rare(
    in_tmp, data_dir, monkeypatch, loss, penalties
):
    """R1, or R1 and R2, of every third step, three times as heavy."""
    penalty, calls = gan.gradient_penalty, []

    def spy(discriminator, x, classes):
        calls.append(torch.zeros((), requires_grad=True))
        return penalty(discriminator, x, classes) + calls[-1]

    monkeypatch.setattr(gan, "gradient_penalty", spy)
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, *TINY_FLAGS["gan"], "--loss", loss]
    assert gan.main([*flags, "--penalty-every", "3"]) == 0
    assert len(calls) == penalties * 2  # at steps 0 and 3
    assert all(call.grad == 3 * 0.5 for call in calls)  # gamma / 2, and for three steps
    calls.clear()
    assert gan.main([*flags, "--gamma", "0"]) == 0
    assert not calls


def test_truncation_lessens_variety(tiny_runs, in_tmp):
    at = ["--checkpoint", str(tiny_runs("gan")), "--class", "o", "--num-samples", "30"]
    assert (
        gan.main([*at, "--output", "free.npz"])
        == gan.main([*at, "--truncation", "0.3", "--output", "cut.npz"])
        == 0
    )
    free, cut = (
        np.load(f"{name}.npz")["x"].astype(float).std(axis=0).mean() for name in ("free", "cut")
    )
    assert cut < 0.7 * free
