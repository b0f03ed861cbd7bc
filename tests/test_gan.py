"""gan.py: its losses and penalties against independent oracles, its discriminator, its pictures."""

import math

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
    """Written out for each number, with D = sigmoid(logit)."""
    pairs = list(zip(REAL.tolist(), FAKE.tolist(), strict=True))
    # -log D(x) - log(1 - D(G(z)))
    minmax_d = mean([-log_sigmoid(r) - log_sigmoid(-f) for r, f in pairs])
    for loss in ("minmax", "nonsaturating"):
        assert gan.discriminator_loss(REAL, FAKE, loss).item() == pytest.approx(minmax_d, rel=1e-5)
    minmax_g = mean([log_sigmoid(-f) for _, f in pairs])  # log(1 - D(G(z)))
    assert gan.generator_loss(None, FAKE, "minmax").item() == pytest.approx(minmax_g, rel=1e-5)
    nonsaturating = mean([-log_sigmoid(f) for _, f in pairs])  # -log D(G(z))
    found = gan.generator_loss(None, FAKE, "nonsaturating").item()
    assert found == pytest.approx(nonsaturating, rel=1e-5)
    hinge = mean([max(0, 1 - r) + max(0, 1 + f) for r, f in pairs])
    assert gan.discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(hinge, rel=1e-5)
    found = gan.generator_loss(None, FAKE, "hinge").item()
    assert found == pytest.approx(-mean(FAKE.tolist()), rel=1e-5)
    relative_d, relative_g = (mean([-log_sigmoid(s * (r - f)) for r, f in pairs]) for s in (1, -1))
    found = gan.discriminator_loss(REAL, FAKE, "relativistic").item()
    assert found == pytest.approx(relative_d, rel=1e-5)
    found = gan.generator_loss(REAL, FAKE, "relativistic").item()
    assert found == pytest.approx(relative_g, rel=1e-5)


@pytest.mark.parametrize("loss", gan.LOSSES)
def test_discriminator_and_generator_pull_apart(loss):
    """The two losses move the fake logit in opposite directions; loss_d moves the real one up."""
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
    squares = x.square().flatten(1).sum(dim=1)
    expected = (torch.tensor([1.0, 9.0, 9.0, 1.0]) * squares).mean()
    found = gan.gradient_penalty(Quadratic(), x, classes).item()
    assert found == pytest.approx(expected.item(), rel=1e-5)


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
    """Miyato & Koyama eq. (4): between two classes the logit changes by <h, row - row>."""
    discriminator = gan.Discriminator(1, 3, widths, spectral=False)
    x, seen = torch.randn(5, 1, 32, 32), []
    discriminator.out.register_forward_hook(lambda module, given, _: seen.append(given[0]))
    logits = [discriminator(x, gan.one_hot(torch.full((5,), y), 3)) for y in (0, 2)]
    rows = discriminator.label.weight.T
    expected = seen[0] @ (rows[2] - rows[0]) / 128**0.5
    assert torch.allclose(logits[1] - logits[0], expected, atol=1e-6)


def test_there_is_no_batch_norm_and_an_image_does_not_depend_on_its_batch():
    model = gan.Generator(1, 3, 4, (8, 16), 16)
    discriminator = gan.Discriminator(1, 3, (4, 8), spectral=False)
    batch_norm = nn.modules.batchnorm._BatchNorm
    for network in (model, discriminator):
        assert not any(isinstance(module, batch_norm) for module in network.modules())
    z, classes = torch.randn(6, 4), gan.one_hot(torch.arange(6) % 3, 3)
    images = model(z, classes)
    assert torch.allclose(images[2:3], model(z[2:3], classes[2:3]), atol=1e-6)
    assert images.shape == (6, 1, 32, 32) and images.abs().max() <= 1


def test_with_spectral_norm_the_class_counts_as_much_as_the_image():
    """Miyato & Koyama eq. (4): the two terms of the logit, each of a layer of spectral norm 1."""
    discriminator = gan.Discriminator(1, 10, (8, 16), spectral=True).eval()
    for _ in range(20):
        discriminator.train()(torch.randn(4, 1, 32, 32), torch.eye(10)[:4])
    discriminator.eval()
    x = torch.randn(200, 1, 32, 32)
    by_class = torch.stack([discriminator(x, torch.eye(10)[[y] * 200]) for y in range(10)])
    features = []
    hook = discriminator.out.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    discriminator(x, torch.eye(10)[[0] * 200])
    hook.remove()
    weight = discriminator.label.weight
    expected = (features[0] @ weight).T
    found = by_class - discriminator.out(features[0])[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_hinge_bounds_the_discriminator_spectrally():
    discriminator = gan.Discriminator(1, 2, (4, 8), spectral=True)
    for _ in range(30):
        # in training mode each call is a step of the power iteration
        discriminator(torch.randn(2, 1, 32, 32), torch.eye(2))
    first = discriminator.blocks[0].conv1
    outer = [getattr(discriminator, name) for name in ("stem", "features", "label", "out")]
    for layer in (first, *outer):
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("loss", "penalties"), [("nonsaturating", 1), ("relativistic", 2)])
def test_lazy_penalties_weigh_as_much_as_they_are_rare(
    in_tmp, data_dir, monkeypatch, loss, penalties
):
    """R1, or R1 and R2, at every third step, with three times the weight."""
    penalty, calls = gan.gradient_penalty, []

    def spy(discriminator, x, classes):
        calls.append(torch.zeros((), requires_grad=True))
        return penalty(discriminator, x, classes) + calls[-1]

    monkeypatch.setattr(gan, "gradient_penalty", spy)
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, *TINY_FLAGS["gan"], "--loss", loss]
    assert gan.main([*flags, "--penalty-every", "3"]) == 0
    assert len(calls) == penalties * 2  # at steps 0 and 3
    assert all(call.grad == 3 * 0.5 for call in calls)  # gamma / 2, and for three steps
    # Adam takes no step more for a penalty, so that nothing of it need be corrected.
    moments = torch.load("runs/gan/gan.pt", weights_only=True)["optimizer_d"]["state"]
    assert {state["step"].item() for state in moments.values()} == {6}
    calls.clear()
    assert gan.main([*flags, "--gamma", "0"]) == 0
    assert not calls


def test_truncation_lessens_variety(tiny_runs, in_tmp):
    at = ["--checkpoint", str(tiny_runs("gan")), "--class", "o", "--num-samples", "30"]
    assert gan.main([*at, "--output", "free.npz"]) == 0
    assert gan.main([*at, "--truncation", "0.3", "--output", "cut.npz"]) == 0
    free, cut = (np.load(f"{name}.npz")["x"].astype(float) for name in ("free", "cut"))
    assert cut.std(axis=0).mean() < 0.7 * free.std(axis=0).mean()
