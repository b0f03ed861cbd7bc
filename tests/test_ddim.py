"""ddim.py: equations against independent oracles, samplers with a network that knows the answer.

Also whole runs, resuming, and bad input.
"""

import itertools
import json
import math
import signal
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_NETWORK, refused
from PIL import Image

import common
import ddim
import ddpm
import infer_onnx
import ldm
import runs
from common import NULL_LABEL, InputError, UNet

SCHEDULES = ("linear", "quadratic", "cosine")

# --- Method ---------------------------------------------------------------------------------------


def test_linear_and_quadratic_schedules_against_a_loop():
    for schedule, beta in (
        ("linear", lambda i: 1e-4 + (0.02 - 1e-4) * i / 999),
        ("quadratic", lambda i: (0.01 + (math.sqrt(0.02) - 0.01) * i / 999) ** 2),
    ):
        alpha_bars, product = ddim.make_alpha_bars(schedule, 1000), 1.0
        for i in range(1000):
            product *= 1 - beta(i)
            assert alpha_bars[i].item() == pytest.approx(product, rel=1e-9)


def test_cosine_schedule_against_its_closed_form():
    alpha_bars = ddim.make_alpha_bars("cosine", 1000)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    # the product of the betas telescopes to f(t) / f(0) until they are clipped
    for i in (0, 1, 10, 499, 900, 990):
        assert alpha_bars[i].item() == pytest.approx(f(i + 1) / f(0), rel=1e-9)
    assert (1 - alpha_bars[1:] / alpha_bars[:-1]).max() <= 0.999 + 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_schedules_fall_from_image_to_noise(schedule, num_timesteps):
    alpha_bars = ddim.make_alpha_bars(schedule, num_timesteps)
    assert alpha_bars.dtype == torch.float64 and alpha_bars.shape == (num_timesteps,)
    assert (alpha_bars[1:] < alpha_bars[:-1]).all()
    assert alpha_bars[0] > 0.99
    assert 0 < alpha_bars[-1] < 2e-3


def test_q_sample_keeps_the_variance_of_unit_data():
    x_0, eps = torch.randn(2, 20_000, 1, 1, 1)
    for alpha_bar_t in (0.01, 0.5, 0.99):
        x_t = ddim.q_sample(x_0, eps, torch.full((20_000, 1, 1, 1), alpha_bar_t))
        assert x_t.var().item() == pytest.approx(1, abs=0.03)
        assert (x_t * x_0).mean().item() == pytest.approx(alpha_bar_t**0.5, abs=0.03)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("clip", [False, True])
def test_predict_x_0_and_eps_undoes_q_sample(prediction, clip):
    x_0, eps = torch.rand(5, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4)
    alpha_bar_t = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999]).view(-1, 1, 1, 1)
    x_t = ddim.q_sample(x_0, eps, alpha_bar_t)
    target = ddim.target_of(prediction, x_0, eps, alpha_bar_t)
    x_0_hat, eps_hat = ddim.predict_x_0_and_eps(target, x_t, prediction, alpha_bar_t, clip)
    assert torch.allclose(x_0_hat, x_0, atol=2e-4) and torch.allclose(eps_hat, eps, atol=2e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_after_a_clip_image_and_noise_still_make_up_x_t(prediction):
    x_t, output = 3 * torch.randn(2, 5, 1, 4, 4)
    x_0_hat, eps_hat = ddim.predict_x_0_and_eps(output, x_t, prediction, 0.3, clip=True)
    assert x_0_hat.abs().max() == 1
    assert torch.allclose(0.3**0.5 * x_0_hat + 0.7**0.5 * eps_hat, x_t, atol=1e-5)


def test_image_losses_by_hand():
    output = torch.tensor([[0.0, 0.0], [1.0, 4.0]]).view(2, 1, 1, 2)
    target = torch.zeros(2, 1, 1, 2)
    for loss, expected in (("l2", (1 + 16) / 2), ("l1", (1 + 4) / 2), ("huber", (0.5 + 3.5) / 2)):
        assert ddim.image_losses(output, target, loss).tolist() == [0, expected]


@pytest.mark.parametrize(("batch_size", "num_timesteps"), [(10, 1000), (128, 1000), (7, 3), (1, 1)])
def test_uniform_t_has_one_in_every_slice(batch_size, num_timesteps):
    generator = torch.Generator().manual_seed(0)
    args = batch_size, num_timesteps, "uniform", generator
    t = torch.stack([ddim.draw_t(*args) for _ in range(300)])
    assert t.min() >= 0 and t.max() <= num_timesteps - 1 and t.dtype == torch.int64
    slices = torch.arange(batch_size)
    assert (t >= slices * num_timesteps // batch_size).all()
    assert (t <= ((slices + 1) * num_timesteps / batch_size).ceil()).all()
    mean = (num_timesteps - 1) / 2
    assert t.double().mean().item() == pytest.approx(mean, abs=0.02 * num_timesteps)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_lognormal_t_has_the_noise_levels_of_edm(batch_size):
    """tan(pi / 2 * t / T) and the schedule's sigma, against NumPy's log-normal numbers."""
    generator = torch.Generator().manual_seed(0)
    args = batch_size, 4000, "lognormal", generator
    draws = [ddim.draw_t(*args) for _ in range(40_000 // batch_size)]
    t = torch.cat(draws)
    assert t.min() >= 0 and t.max() <= 3999 and t.dtype == torch.int64
    alpha_bar_t = ddim.make_alpha_bars("cosine", 4000)[t]
    of_schedule = ((1 - alpha_bar_t) / alpha_bar_t).log().numpy() / 2
    of_t = np.log(np.tan(np.pi / 2 * (t.numpy() + 0.5) / 4000))  # the middle of each t
    expected = np.random.default_rng(0).normal(-1.2 - np.log(0.5), 1.2, 1_000_000)
    for part in (5, 25, 50, 75, 95):  # s = 0.008 of the schedule adds up to 0.15 where t is small
        right, low = np.percentile(expected, part), part == 5
        assert np.percentile(of_t, part) == pytest.approx(right, abs=0.05 if low else 0.02), part
        found = np.percentile(of_schedule, part)
        assert found == pytest.approx(right, abs=0.18 if low else 0.08), part
    means = torch.stack(draws).double().mean(dim=1)
    if batch_size > 1:  # independent ones would vary sqrt(B) / 2 times this bound
        assert means.std() < 2 * t.double().std() / batch_size


# --- Sampling -------------------------------------------------------------------------------------


def test_time_pairs_by_hand():
    """How they fall for any T and steps is in test_fuzz.py."""
    assert ddim.time_pairs(1000, 4) == [(999, 687), (687, 405), (405, 164), (164, -1)]
    # 1000 * 27 / 28 = 964.3, 1000 * 12 / 16 = 750, 1000 * 3 / 12 = 250
    assert ddim.dpm_pairs(1000, 4) == [(999, 963), (963, 749), (749, 249), (249, -1)]
    for pairs_of, steps in itertools.product((ddim.time_pairs, ddim.dpm_pairs), (0, -1)):
        with pytest.raises(ValueError, match=f"steps {steps}"):
            pairs_of(1000, steps)


@pytest.mark.parametrize(("spread", "lost"), [(0.1, 0.11), (0.2, 0.27)])
def test_the_walk_keeps_the_spread_of_what_is_settled_near_noise(spread, lost):
    """Of brightness ~ N(0, spread^2), whose best prediction is known, 15 steps keep 99 %.

    In the steps of time_pairs 11 to 27 % is lost.  The brightness is the mean of 1,024
    pixels; 32 times it has noise of variance 1.
    """
    alpha_bars = ddim.make_alpha_bars("cosine", 1000)
    variance = (32 * spread) ** 2

    def denoise(x_t, t):
        alpha_bar_t = alpha_bars[t].item()
        share = variance / (alpha_bar_t * variance + 1 - alpha_bar_t)
        x_0_hat = alpha_bar_t**0.5 * share * x_t
        return (alpha_bar_t**0.5 * x_t - x_0_hat) / (1 - alpha_bar_t) ** 0.5

    def kept(pairs):
        x_T = torch.ones(1).double()
        return ddim.dpm_sample(denoise, x_T, alpha_bars, pairs, "v", False).item() / variance**0.5

    assert kept(ddim.dpm_pairs(1000, 15)) == pytest.approx(1, abs=0.01)
    assert kept(ddim.time_pairs(1000, 15)) == pytest.approx(1 - lost, abs=0.005)


class Oracle:
    """A network that knows x_0: its output is exact, and it records what it was called with."""

    def __init__(self, x_0, schedule, prediction):
        self.x_0, self.prediction = x_0, prediction
        self.alpha_bars = ddim.make_alpha_bars(schedule, 1000)
        self.times, self.noises = [], []

    def __call__(self, x_t, t):
        alpha_bar_t = self.alpha_bars[t].item()
        eps = (x_t - alpha_bar_t**0.5 * self.x_0) / (1 - alpha_bar_t) ** 0.5
        self.times.append(t)
        self.noises.append(eps)
        return ddim.target_of(self.prediction, self.x_0, eps, alpha_bar_t)


WALKS = [*itertools.product((1, 2, 7, 20), ("eps", "v"), SCHEDULES, (0.0, 1.0)),
         (1000, "v", "cosine", 0.0), (1000, "eps", "linear", 1.0)]  # fmt: skip


@pytest.mark.parametrize(("steps", "prediction", "schedule", "eta"), WALKS)
def test_sampler_finds_the_image_that_the_network_knows(steps, prediction, schedule, eta):
    x_0, x_T = (torch.rand(2, 1, 4, 4) * 2 - 1).double(), torch.randn(2, 1, 4, 4).double()
    oracle, trace = Oracle(x_0, schedule, prediction), []
    pairs = ddim.time_pairs(1000, steps)

    def noise():
        return torch.randn(x_T.shape).double()

    walk = oracle, x_T, oracle.alpha_bars, pairs, prediction
    found = ddim.ddim_sample(*walk, eta, True, noise, trace)
    assert torch.allclose(found, x_0, atol=1e-4)
    assert oracle.times == [t for t, _ in pairs]  # exactly `steps` calls, at these times
    if eta == 0:  # a wrong t_prev would show here: on the true path the noise never changes
        assert all(torch.allclose(noise, oracle.noises[0], atol=1e-4) for noise in oracle.noises)
    assert [t for t, _, _ in trace] == [*oracle.times, -1] and trace[-1][1] is found
    assert all(torch.allclose(x_0_hat, x_0, atol=1e-4) for _, _, x_0_hat in trace)


def gaussian_flow(prediction, m=0.4, s=0.1):
    """(denoise, alpha_bars) of the optimal network for x_0 ~ N(m, s^2): the flow is m + s * x_T."""
    alpha_bars = ddim.make_alpha_bars("cosine", 1000)

    def denoise(x_t, t):
        a = alpha_bars[t].item()
        variance = a * s**2 + 1 - a
        eps_hat = (1 - a) ** 0.5 * (x_t - a**0.5 * m) / variance
        x_0_hat = m + a**0.5 * s**2 * (x_t - a**0.5 * m) / variance
        return ddim.target_of(prediction, x_0_hat, eps_hat, a)

    return denoise, alpha_bars


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_sampler_turns_noise_into_a_gaussian_of_the_right_mean_and_width(prediction):
    denoise, alpha_bars = gaussian_flow(prediction)
    x_T = torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    pairs = ddim.time_pairs(1000, 1000)
    found = ddim.ddim_sample(denoise, x_T, alpha_bars, pairs, prediction, clip=False)
    assert torch.allclose(found, 0.4 + 0.1 * x_T, atol=5e-3)


class Erring(torch.nn.Module):
    """The optimal network for images ~ N(0.4, 0.1^2), whose output is off by 1 %, at random."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.alpha_bars = ddim.make_alpha_bars(schedule, 1000)
        self.prediction = prediction
        self.on_cpu = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, y):
        a = self.alpha_bars[t].view(-1, 1, 1, 1)
        away = (x_t - a**0.5 * 0.4) / (a * 0.01 + 1 - a)
        eps_hat = (1 - a) ** 0.5 * away
        x_0_hat = 0.4 + a**0.5 * 0.01 * away
        output = ddim.target_of(self.prediction, x_0_hat, eps_hat, a)
        return output + 0.01 * torch.randn(x_t.shape, dtype=output.dtype)

    denoiser = property(lambda self: self)
    class_names = ("0",)

    def to_images(self, z_0):
        return z_0


SAMPLERS = {
    "ddim": (ddim, {"clip": False, "solver": "ddim"}),
    "ddim, eta 1": (ddim, {"clip": False, "solver": "ddim", "eta": 1.0}),
    "dpm++": (ddim, {"clip": False, "solver": "dpm++"}),
    "ddpm": (ddpm, {"clip": False}),
    "ddpm, large": (ddpm, {"clip": False, "variance": "large"}),
    "ldm": (ldm, {"solver": "ddim"}),
    "ldm, dpm++": (ldm, {"solver": "dpm++"}),
}


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_errs_by_one_percent_is_sampled_from(sampler, schedule, prediction):
    """Without clipping, a walk from alpha_bar = 2e-9 turns an error of 1 % in eps into 200."""
    script, options = SAMPLERS[sampler]
    config = {"schedule": schedule, "num_timesteps": 1000, "prediction": prediction}
    config |= {"channels": 1, "latent_channels": 4, "label_dropout": 0.1}
    model = Erring(schedule, prediction)
    labels = torch.zeros(40, dtype=torch.int64)
    images = script.sample(
        model=model, config=config, labels=labels, steps=20, guidance=1.0, **options
    )
    assert images.mean().item() == pytest.approx(0.4, abs=0.01)
    assert 0.05 < images.std().item() < 0.13


def test_a_walk_starts_where_an_error_of_eps_stays_small():
    """The largest t whose alpha_bar is above 3e-5; the published linear schedule ends above it."""
    cosine = ddim.make_alpha_bars("cosine", 1000)
    length = ddim.walk_length(cosine, "eps")
    assert 990 < length < 1000 and cosine[length - 1] > 3e-5 >= cosine[length]
    assert ddim.walk_length(cosine, "v") == 1000
    assert ddim.walk_length(ddim.make_alpha_bars("linear", 1000), "eps") == 1000
    assert infer_onnx.walk_length(cosine.numpy(), "eps") == length


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dpm_solver_finds_the_image_that_the_network_knows(prediction):
    x_0, x_T = (torch.rand(2, 1, 4, 4) * 2 - 1).double(), torch.randn(2, 1, 4, 4).double()
    for steps in (1, 2, 3, 20):
        oracle = Oracle(x_0, "cosine", prediction)
        pairs = ddim.time_pairs(1000, steps)
        found = ddim.dpm_sample(oracle, x_T, oracle.alpha_bars, pairs, prediction)
        assert torch.allclose(found, x_0, atol=1e-4) and oracle.times == [t for t, _ in pairs]


@pytest.mark.parametrize("script", [ddim, ldm])
@pytest.mark.parametrize(("solver", "eta"), [("dpmpp", 0.0), ("DDIM", 0.0), ("dpm++", 0.5)])
def test_a_solver_that_does_not_exist_or_fit_is_refused(script, solver, eta):
    path = ROOT / f"pretrained/{script.NAME}.pt"
    config = torch.load(path, weights_only=True)["config"]
    with pytest.raises(InputError, match=r"is not one of ddim, dpm|is for --solver ddim"):
        script.sample(model=None, config=config, labels=None, solver=solver, eta=eta)


def test_dpm_solver_is_of_second_order():
    """Half the step size leaves a quarter of the error; of DDIM's, a half.

    Measured on the known flow of a Gaussian away from its ends, where x_t = sqrt(a) m + sqrt(v) * x
    with v = a s^2 + 1 - a.
    """
    m, s, x = 0.4, 0.5, torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    denoise, alpha_bars = gaussian_flow("v", m, s)
    start, end = (
        a**0.5 * m + (a * s**2 + 1 - a) ** 0.5 * x
        for a in (alpha_bars[700].item(), alpha_bars[200].item())
    )
    errors = {}
    for solver, walk in (("ddim", ddim.ddim_sample), ("dpm++", ddim.dpm_sample)):
        for step in (20, 10):
            pairs = [(t, t - step) for t in range(700, 200, -step)]
            found = walk(denoise, start, alpha_bars, pairs, "v", clip=False)
            errors[solver, step] = (found - end).abs().max().item()
    assert 1.8 < errors["ddim", 20] / errors["ddim", 10] < 2.2
    assert 3.5 < errors["dpm++", 20] / errors["dpm++", 10] < 4.6
    assert errors["dpm++", 20] < errors["ddim", 10] / 2


def test_dpm_step_is_the_update_of_the_paper():
    """Lu et al. 2022, algorithm 2: x = sigma / sigma_t * x_t - alpha * (exp(-h) - 1) * D."""
    x_t, x_0_hat, x_0_last = torch.randn(3, 2, 1, 3, 3).double()
    for last, now, then in ((0.01, 0.2, 0.5), (0.3, 0.35, 0.9), (1e-6, 0.98, 0.999)):
        lambdas = [math.log(ab**0.5 / (1 - ab) ** 0.5) for ab in (last, now, then)]
        h = lambdas[2] - lambdas[1]
        r = (lambdas[1] - lambdas[0]) / h
        D_paper = (1 + 1 / (2 * r)) * x_0_hat - 1 / (2 * r) * x_0_last
        expected = ((1 - then) / (1 - now)) ** 0.5 * x_t - then**0.5 * (math.exp(-h) - 1) * D_paper
        D, D_eps = ddim.dpm_extrapolate(x_t, x_0_hat, now, then, x_0_last, last)
        found = ddim.ddim_step(D, D_eps, now, then)
        assert torch.allclose(found, expected, atol=1e-9)


def test_a_full_step_with_eta_1_is_the_ddpm_posterior():
    """DDPM eq. (7).

    mean = sqrt(ab_prev) beta / (1 - ab) x_0 + sqrt(alpha) (1 - ab_prev) / (1 - ab) x_t
    """
    alpha_bars = ddim.make_alpha_bars("linear", 1000)
    x_0, eps, noise = torch.randn(3, 4, 1, 2, 2).double()
    for t in (1, 2, 500, 999):
        ab, ab_prev = alpha_bars[t].item(), alpha_bars[t - 1].item()
        alpha = ab / ab_prev
        x_t = ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps
        mean = ab_prev**0.5 * (1 - alpha) / (1 - ab) * x_0
        mean = mean + alpha**0.5 * (1 - ab_prev) / (1 - ab) * x_t
        variance = (1 - ab_prev) / (1 - ab) * (1 - alpha)
        found = ddim.ddim_step(x_0, eps, ab, ab_prev, 1.0, noise)
        assert torch.allclose(found, mean + variance**0.5 * noise, atol=1e-9)
        noisy = ddim.ddim_step(x_0, eps, ab, ab_prev, 0.3, noise)
        plain = ddim.ddim_step(x_0, eps, ab, ab_prev, 0.3, 0 * noise)
        assert torch.allclose(noisy - plain, 0.3 * variance**0.5 * noise, atol=1e-9)  # eq. (16)
        expected = ab_prev**0.5 * x_0 + (1 - ab_prev - 0.3**2 * variance) ** 0.5 * eps
        assert torch.allclose(plain, expected, atol=1e-9)


def test_last_step_adds_no_noise():
    x_0, eps = torch.randn(2, 4, 1, 2, 2)
    assert torch.equal(ddim.ddim_step(x_0, eps, 0.99, 1.0, 1.0, torch.full_like(x_0, 1e6)), x_0)


class Recorder:
    """A network whose output tells its label: 10 for none, else the label."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, y):
        self.calls.append((len(x_t), t.tolist(), y.tolist()))
        return torch.where(y == NULL_LABEL, 10, y).view(-1, 1, 1, 1).expand(x_t.shape).float()


@pytest.mark.parametrize(
    ("guidance", "expected"), [(0, [10, 10]), (1, [2, 3]), (1.5, [-2, -0.5]), (0.5, [6, 6.5])]
)
def test_guidance_by_hand(guidance, expected):
    model, y = Recorder(), torch.tensor([2, 3])
    output = ddim.guided(model, y, guidance)(torch.zeros(2, 1, 2, 2), 7)
    assert output[:, 0, 0, 0].tolist() == expected
    passes = 1 if guidance in (0, 1) else 2  # 0 and 1 cost one pass
    assert [(n, t) for n, t, _ in model.calls] == [(2 * passes, [7] * 2 * passes)]


@pytest.mark.parametrize(
    ("guidance", "expected", "passes"), [(0, 10, 1), (1, 2, 1), (1.5, 2, 1), (0.5, 6, 2)]
)
def test_outside_its_interval_guidance_above_1_is_off(guidance, expected, passes):
    model = Recorder()
    times = ddim.guided_times((0.25, 0.625), 8)
    denoise = ddim.guided(model, torch.tensor([2]), guidance, *times)
    for t in (0, 1, 5, 7):
        assert denoise(torch.zeros(1, 1, 2, 2), t)[0, 0, 0, 0] == expected
        assert len(model.calls[-1][1]) == passes
    for t in (2, 3, 4):
        assert denoise(torch.zeros(1, 1, 2, 2), t)[0, 0, 0, 0] == 10 + guidance * (2 - 10)


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 0.5), (0, 1.5), (math.nan, 1)])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(InputError, match="right is 0 <= LOW <= HIGH <= 1"):
        ddim.guided_times(interval, 1000)


CONFIG = {
    "schedule": "cosine", "num_timesteps": 100, "prediction": "v", "channels": 1,
    "label_dropout": 0.1,
}  # fmt: skip


def small_network():
    network = UNet(**TINY_NETWORK)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_image_i_is_the_same_in_any_batch(eta):
    options = {"model": small_network(), "config": CONFIG, "eta": eta}
    options |= {"steps": 5, "guidance": 2.0, "seed": 3, "solver": "ddim"}
    labels = torch.arange(5)
    images = ddim.sample(labels=labels, **options)
    assert images.shape == (5, 1, 32, 32) and images.abs().max() <= 1 and not images.requires_grad
    for batch_size in (1, 2):
        again = ddim.sample(labels=labels, batch_size=batch_size, **options)
        assert (common.to_uint8(again).int() - common.to_uint8(images).int()).abs().max() <= 1
    assert not torch.equal(ddim.sample(labels=labels, **{**options, "seed": 4}), images)


# --- Training -------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_ends_at_zero():
    args = ddim.build_parser().parse_args(["--lr", "0.01", "--warmup", "9"])
    assert ddim.learning_rate(args, 0, 0.0) == pytest.approx(0.001)
    assert ddim.learning_rate(args, 9, 0.0) == pytest.approx(0.01)
    assert ddim.learning_rate(args, 500, 0.5) == pytest.approx(0.005)
    assert ddim.learning_rate(args, 900, 1.0) == ddim.learning_rate(args, 900, 1.1) == 0


@pytest.mark.parametrize("length", [0.05, 0.1, 0.5])
def test_power_ema_averages_over_its_fraction_of_the_run(length):
    """With w = n at step n, the average must lag by length * n: the mean of the weights n^gamma."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = ddim.AveragedModel(model, multi_avg_fn=ddim.power_ema(length))
    for n in range(1, 2001):
        model.weight.data.fill_(n)
        ema.update_parameters(model)
        if n == 1:
            assert ema.module.weight.item() == 1
    assert (2000 - ema.module.weight.item()) / 2000 == pytest.approx(length, rel=0.03)


def read_log(run_dir):
    """The lines of a log on the training; each save adds one on its samples."""
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "lr" in line]


def test_a_run_leaves_a_checkpoint_a_log_and_grids(in_tmp, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(ddim, "LOG_EVERY", 2)
    flags = ["--train", "--epochs", "1.5", "--data-dir", data_dir, "--save-every", "0", *TINY]
    assert ddim.main(flags) == 0
    run_dir = in_tmp / "runs" / "ddim"
    checkpoint = torch.load(run_dir / "ddim.pt", weights_only=True)
    assert checkpoint["step"] == 5
    assert checkpoint["images"] == 100
    assert len(checkpoint["class_names"]) == 10
    log = read_log(run_dir)
    assert [line["step"] for line in log] == [2, 4] and len(log[0]["loss_by_tenth_of_t"]) == 10
    assert 0.5 < log[0]["loss"] < 2 and all(0.5 < x < 1.5 for x in log[0]["loss_by_tenth_of_t"])
    assert sorted(f.name for f in (run_dir / "samples").iterdir())[-1] == "step_0000005.png"
    assert "python ddim.py --checkpoint runs/ddim" in capsys.readouterr().out
    # a second run gets another folder, and samples come from the newest run
    assert ddim.main(["--train", "--epochs", "0.1", "--data-dir", data_dir, *TINY]) == 0
    assert runs.find_checkpoint(("ddim",)).parent == Path("runs/ddim-2")
    assert ddim.main(["--class", "0", "--steps", "2"]) == 0
    assert Image.open("ddim_o.png").size == (8 * 32, 8 * 32)


def test_training_learns(tiny_run):
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    assert checkpoint["step"] == 18
    data = common.load_data("kmnist", checkpoint["config"]["data_dir"])
    network = ddim.ema_network(checkpoint, torch.device("cpu"))
    x_0, eps, t = common.to_float(data.images), torch.randn(60, 1, 32, 32), torch.arange(60) * 16
    alpha_bar_t = ddim.make_alpha_bars("cosine", 1000)[t].float().view(-1, 1, 1, 1)
    target = ddim.target_of("v", x_0, eps, alpha_bar_t)
    with torch.no_grad():
        output = network(ddim.q_sample(x_0, eps, alpha_bar_t), t, data.labels)
    assert (output - target).square().mean() < 0.8 * target.square().mean()


def test_a_run_that_diverged_resumes_with_a_lower_learning_rate(
    in_tmp, data_dir, monkeypatch, capsys
):
    handler = signal.getsignal(signal.SIGINT)
    flags = split("--train --epochs 3 --save-every 0 --warmup 0")
    flags += ["--data-dir", data_dir, *TINY]
    error = refused(ddim.main, [*flags, "--lr", "1e30"], capsys, alone=False)
    assert "stopped; what runs/ddim holds is kept" in error
    kept = torch.load("runs/ddim/ddim.pt", weights_only=True)
    weights = [*kept["ema"].values(), *kept["weights"].values()]
    assert all(p.isfinite().all() for p in weights)
    assert kept["step"] < 9 and ddim.main(["--resume", "--lr", "1e-5"]) == 0
    assert torch.load("runs/ddim/ddim.pt", weights_only=True)["step"] == 9
    assert signal.getsignal(signal.SIGINT) is handler  # restored, after the failure too


def test_labels_are_hidden_at_the_rate_asked_for(in_tmp, data_dir, monkeypatch):
    forward, seen = UNet.forward, []

    def spy(self, x_t, t, y):
        seen.append(y)
        return forward(self, x_t, t, y)

    monkeypatch.setattr(UNet, "forward", spy)
    # the grids' calls are not the training's
    monkeypatch.setattr(ddim, "sample", lambda **_: torch.zeros(80, 1, 32, 32))
    flags = ["--train", "--epochs", "5", "--data-dir", data_dir, *TINY]
    for rate in ("0", "0.5", "1"):
        seen.clear()
        assert ddim.main([*flags, "--label-dropout", rate]) == 0
        hidden = (torch.cat(seen) == NULL_LABEL).float().mean().item()
        assert len(seen) == 15
        assert hidden == pytest.approx(float(rate), abs=0 if rate in "01" else 0.12)


def test_sampling_uses_the_averaged_weights(tiny_run):
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    network = ddim.ema_network(checkpoint, torch.device("cpu"))
    ema, weights = checkpoint["ema"]["head.weight"], checkpoint["weights"]["head.weight"]
    assert torch.equal(network.head.weight, ema) and not torch.equal(ema, weights)


def test_gradients_are_clipped(in_tmp, data_dir):
    """With gradients clipped to 1e-12 Adam's epsilon dominates, and the weights hardly move."""
    flags = split("--train --epochs 1 --warmup 0 --weight-decay 0")
    flags += ["--data-dir", data_dir, *TINY]
    moved = []
    for i, clip in enumerate(("1e-12", "1")):
        assert ddim.main([*flags, "--grad-clip", clip, "--run-dir", f"{i}"]) == 0
        weights = torch.load(f"{i}/ddim.pt", weights_only=True)["weights"]
        moved.append(weights["head.weight"].abs().max())
    assert moved[0] < 0.01 * moved[1]


def test_minutes_end_on_time_with_a_learning_rate_of_zero(in_tmp, data_dir, monkeypatch, clock):
    """Of 12 seconds, in 24 steps: the last begins half a second before they are over."""
    monkeypatch.setattr(ddim, "LOG_EVERY", 1)
    flags = ["--train", "--minutes", "0.2", "--warmup", "0", "--data-dir", data_dir, *TINY]
    assert ddim.main(flags) == 0
    last = read_log(in_tmp / "runs/ddim")[-1]
    assert last["step"] == 24 and last["seconds"] == pytest.approx(11.5)
    rate = 5e-3 * 0.5 * (1 + math.cos(math.pi * 23 / 24))
    assert last["lr"] == pytest.approx(rate) and rate < 0.005 * 5e-3
    assert torch.load("runs/ddim/ddim.pt", weights_only=True)["seconds"] == pytest.approx(12)


def test_the_command_printed_at_the_end_works_for_few_timesteps(in_tmp, data_dir, capsys):
    flags = [*split("--train --epochs 0.1 --num-timesteps 5"), "--data-dir", data_dir, *TINY]
    assert ddim.main([*flags, "--run-dir", "my runs/a"]) == 0
    _, *argv = split(capsys.readouterr().out.split("  python ")[1])
    assert "my runs/a" in argv and ddim.main(argv) == 0


def test_other_methods_train_and_sample(in_tmp, data_dir):
    flags = split("--prediction eps --loss huber --optimizer adam --schedule linear")
    flags += split("--num-timesteps 30 --channels 3 --bf16")
    assert ddim.main(["--train", "--epochs", "0.5", "--data-dir", data_dir, *flags, *TINY]) == 0
    flags = ["--class", "o,ki", "--steps", "20", "--solver", "ddim", "--eta", "1"]
    assert ddim.main([*flags, "--output", "x.npz"]) == 0
    assert np.load("x.npz")["x"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    in_tmp, data_dir, monkeypatch, capsys, what
):
    losses, calls = ddim.image_losses, []

    def failing(output, target, loss):
        calls.append(1)
        result = losses(output, target, loss)
        if len(calls) < 7:  # two calls a step: the fourth step fails
            return result
        if what == "loss":
            return result * math.nan
        return result + (output * 0).abs().sqrt().flatten(1).sum(1)

    monkeypatch.setattr(ddim, "image_losses", failing)
    flags = ["--train", "--epochs", "3", "--data-dir", data_dir, "--save-every", "0", *TINY]
    assert "step 3: loss" in refused(ddim.main, flags, capsys, alone=False)
    checkpoint = torch.load("runs/ddim/ddim.pt", weights_only=True)
    assert checkpoint["step"] == 3
    assert all(p.isfinite().all() for p in checkpoint["weights"].values())


# --- Checkpoints and flags ------------------------------------------------------------------------


def test_checkpoints_of_ddpm_are_sampled_and_others_refused(tiny_run, in_tmp, capsys):
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    torch.save({**checkpoint, "model": "ddpm"}, "ddpm.pt")
    assert ddim.main(["--checkpoint", "ddpm.pt", "--steps", "1"]) == 0
    nan = {key: value * math.nan for key, value in checkpoint["ema"].items()}
    torch.save({**checkpoint, "ema": nan}, "nan.pt")
    torch.save({k: v for k, v in checkpoint.items() if k != "optimizer"}, "weights.pt")
    for flags, message in (
        ("--resume --run-dir ddpm.pt", "is a checkpoint of ddpm, not of ddim"),
        ("--checkpoint nan.pt --steps 1 --no-clip", "not finite"),
        ("--resume --run-dir weights.pt", "no training state to resume"),
    ):
        assert message in refused(ddim.main, flags.split(), capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "--epochs", "0"], "--epochs: '0' is not a number above 0"),
        (["--train", "--widths", "32,a"], "'a' is not a whole number from 1"),
        (["--train", "--ema-length", "0.6"], "above 0 to 0.5"),
        (["--train", "--run-dir", "RUN"], "holds a run"),
        (["--resume", "--checkpoint", "RUN"], "--resume --run-dir FOLDER"),
        (["--train", "--checkpoint", "RUN"], "--checkpoint is to sample from"),
        (["--run-dir", "RUN"], "--run-dir: to train a model, with --train or --resume"),
        (["--lr", "1", "--widths", "8,8"], "--widths, --lr: to train a model"),
        (
            ["--train", "--widths", "8,8,8,8,8", "--depths", "1,1,1,1,1", "--patch", "4"],
            "do not divide 32 pixels",
        ),
        (["--train", "--run-dir", "FILE"], "FILE"),
        (["--train", "--data", "x" * 300], "x" * 300),
        (
            ["--resume", "--run-dir", "RUN", "--widths", "8"],
            "--widths is (8, 16) and cannot change",
        ),
        (["--eta", "1.5"], "from 0 to 1"),
        (["--num-samples", "1" + "0" * 400], "from 1 to 1000000"),
        (["--output", "FILE/x.png", "--steps", "1"], "FILE"),
        (["--invert=3"], "python explore.py invert ddim"),
        (["--solver", "dpm++", "--eta", "1"], "--eta 1.0 is for --solver ddim"),
        (["--guidance-interval", "0.8", "0.2"], "right is 0 <= LOW <= HIGH <= 1"),
    ],
)
def test_bad_input_gets_one_line(tiny_run, in_tmp, data_dir, capsys, flags, message):
    flags = [str(tiny_run) if flag == "RUN" else flag for flag in flags]
    if "--train" in flags:
        flags = [*TINY, "--data-dir", data_dir, *flags]
    elif "--resume" not in flags:
        flags = ["--checkpoint", str(tiny_run), *flags]
    (in_tmp / "FILE").write_text("in the way")
    assert message in refused(ddim.main, flags, capsys)
    # no partial file
    assert [file.name for file in in_tmp.rglob("*") if file.is_file()] == ["FILE"]


def test_a_device_that_is_not_available_is_refused(tiny_run, capsys):
    flags = ["--checkpoint", tiny_run, "--device", "cuda"]
    assert "--device cuda" in refused(ddim.main, flags, capsys)


def test_training_data_of_other_classes_is_refused_on_resume(tiny_run, in_tmp):
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    checkpoint["class_names"] = ["cat", "dog"]
    flags = [*TINY, "--data-dir", checkpoint["config"]["data_dir"], "--epochs", "1"]
    args = ddim.build_parser().parse_args(flags)
    with pytest.raises(InputError, match="classes"):
        ddim.train(args, checkpoint)
