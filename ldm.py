"""LDM: latent diffusion, class-conditional, in one file (with common.py).

Robin Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021 (arXiv:2112.10752).
Stage 1 trains an autoencoder, stage 2 a diffusion model on its latents, with the method of DDIM.

    stage 1     loss = E[ |x - decode(z)| + kl_weight * kl ],  z ~ q(z | x) = N(mu, exp(logvar))     section 3.1
    latents     z_0 = (mu - latent_mean) / latent_std,  per channel, measured on the training set    cf. appendix G
    stage 2     q_sample, target and loss of DDPM with z_0 in the place of x_0                       eq. (3)
    sampling    ddim_step of DDIM on z_t;  image = decode(z_0 * latent_std + latent_mean)            DDIM eq. (12)

    python ldm.py --train --epochs 50              train both stages on Fashion-MNIST
    python ldm.py --class Sneaker                  draw a Sneaker with the newest weights

Differs from the paper: no perceptual and no adversarial loss, classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598) at low t, a cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672), v-prediction (Salimans & Ho
2022, arXiv:2202.00512), stratified t, an EMA over a share of the run (Karras et al. 2024, arXiv:2312.02696), Muon with
an annealed rate, gradient clipping, latents standardised by channel, no cross-attention, and a smaller network.
"""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common import (
    LOG_EVERY,
    NULL_LABEL,
    RUN_FLAGS,
    InputError,
    Muon,
    Run,
    UNet,
    at_most_one,
    autocast,
    draw_noise,
)
from common import (
    errors_in_one_line,
    find_checkpoint,
    given_images,
    grey_level_error,
    group_norm,
    in_the_plane,
)
from common import (
    load_checkpoint,
    load_data,
    load_run_data,
    noise_streams,
    number,
    parallel,
    parse_classes,
    parse_run,
)
from common import (
    pick_device,
    run_parser,
    sampled_file,
    save_images,
    save_map,
    save_sampled,
    spread,
    to_float,
)
from common import to_uint8, training_device, whole_numbers, zero_init

NAME = "ldm"
SAMPLES_FROM = ("ldm",)  # the scripts whose checkpoints this one draws from
GRID_STEPS = 20  # of the grids drawn while training
GUIDANCE, GUIDANCE_LIMIT = 2.5, 0.8  # where they are not asked for; the limit is a share of T

# --- Model ------------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """x + f(x), two normalised 3x3 convolutions; attention weighs f's channels (Hu et al. 2017, arXiv:1709.01507)."""

    def __init__(self, channels, attention):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        layers = [
            nn.Linear(channels, channels // 4),
            nn.SiLU(),
            nn.Linear(channels // 4, channels),
            nn.Sigmoid(),
        ]
        self.weigh = nn.Sequential(*layers) if attention else None

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return x + (h * self.weigh(h.mean(dim=(2, 3)))[:, :, None, None] if self.weigh else h)


class Autoencoder(nn.Module):
    """Images (B, channels, 32, 32) in [-1, 1] <-> latents (B, latent_channels, 8, 8).

    widths: channels at 16x16 (2x2 pixels become channels first) and at 8x8;  attention: over channels, as in ConvBlock.
    """

    def __init__(self, channels, latent_channels, widths, attention):
        super().__init__()
        (fine, coarse), c = widths, channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * c, fine, 3, padding=1), ConvBlock(fine, attention),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1), ConvBlock(coarse, attention), ConvBlock(coarse, attention),
            group_norm(coarse), nn.SiLU(), nn.Conv2d(coarse, 2 * latent_channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, coarse, 3, padding=1),
            ConvBlock(coarse, attention), ConvBlock(coarse, attention), nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2), ConvBlock(fine, attention), ConvBlock(fine, attention),
            group_norm(fine), nn.SiLU(), nn.Conv2d(fine, 4 * c, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x, eps):
        mu, logvar = self.encode(x)
        return self.decoder(reparameterise(mu, logvar, eps)), mu, logvar

    def encode(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar.clamp(-20, 10)  # exp() of more would overflow in a bad step


class LatentDiffusion(nn.Module):
    """A UNet on the latents of an autoencoder, and how the latents are standardised, per channel."""

    def __init__(self, network, autoencoder):
        super().__init__()
        self.denoiser, self.autoencoder = (
            UNet(**network),
            Autoencoder(**autoencoder).requires_grad_(False),
        )
        for name, start in (("latent_mean", 0.0), ("latent_std", 1.0)):
            self.register_buffer(name, torch.full((1, autoencoder["latent_channels"], 1, 1), start))

    @torch.no_grad()
    def to_latents(self, images, batch_size=500):
        """Images (N, C, 32, 32), uint8 or in [-1, 1] -> standardised latents z_0 (N, latent_channels, 8, 8)."""
        parts = images.to(self.latent_mean.device).split(batch_size)
        parts = [
            self.autoencoder.encode(to_float(x) if x.dtype == torch.uint8 else x)[0] for x in parts
        ]
        return (torch.cat(parts) - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def to_images(self, z_0):
        """Standardised latents -> images (N, C, 32, 32) in [-1, 1]."""
        return self.autoencoder.decoder(z_0 * self.latent_std + self.latent_mean)


# --- Method -----------------------------------------------------------------------------------------------------


def reparameterise(mu, logvar, eps):
    """z = mu + sigma * eps, Kingma & Welling eq. (10): a sample of q(z | x) that lets gradients through; one shape."""
    return mu + torch.exp(0.5 * logvar) * eps


def kl_divergence(mu, logvar):
    """KL(q(z | x) || N(0, 1)) of each image in nats, Kingma & Welling appendix B: mu, logvar (B, D) -> (B,)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)


def make_alpha_bars(schedule, num_timesteps):
    """The table alpha_bar_t = prod_{s <= t} (1 - beta_s): float64 (T,), falling; index 0 is the paper's t = 1.

    linear     beta from 1e-4 to 0.02, DDPM section 4
    quadratic  sqrt(beta) linear between the roots of the same ends
    cosine     alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2), s = 0.008, beta <= 0.999,
               Nichol & Dhariwal eq. (17)
    The ends of linear and quadratic are meant for T = 1000; times 1000 / T they let a smaller T end in noise too.
    """
    if schedule == "cosine":
        u = (torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps + 0.008) / 1.008
        f = torch.cos(u * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        power = {"linear": 1.0, "quadratic": 2.0}[schedule]
        first, last = (1e-4) ** (1 / power), 0.02 ** (1 / power)
        betas = (
            torch.linspace(first, last, num_timesteps, dtype=torch.float64) ** power
            * 1000
            / num_timesteps
        )
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def q_sample(x_0, eps, alpha_bar_t):
    """Noise clean images to step t in one go.

    DDPM eq. (4): x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps

    x_0: (B, C, H, W) float in [-1, 1];  eps: like x_0, ~ N(0, 1);  alpha_bar_t: (B, 1, 1, 1).  Returns like x_0.
    """
    return alpha_bar_t**0.5 * x_0 + (1 - alpha_bar_t) ** 0.5 * eps


def target_of(prediction, x_0, eps, alpha_bar_t):
    """What the network learns to output: eps, or v = sqrt(alpha_bar_t) * eps - sqrt(1 - alpha_bar_t) * x_0.

    v is from Salimans & Ho 2022, section 4.  Shapes as in q_sample.
    """
    return eps if prediction == "eps" else alpha_bar_t**0.5 * eps - (1 - alpha_bar_t) ** 0.5 * x_0


def implied(output, x_t, prediction, alpha_bar_t, clip=False):
    """x_0_hat and eps_hat, the image and the noise that a network output stands for.

    eps: DDPM eq. (15), DDIM eq. (9);  v: x_0_hat = sqrt(alpha_bar_t) * x_t - sqrt(1 - alpha_bar_t) * v.  With clip,
    x_0_hat is limited to [-1, 1] and eps_hat is derived again, so that both still make up x_t.
    output, x_t: (B, C, H, W);  alpha_bar_t: a number in (0, 1), or (B, 1, 1, 1).
    """
    signal_t, noise_t = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    if prediction == "eps":
        x_0_hat, eps_hat = (x_t - noise_t * output) / signal_t, output
    else:
        x_0_hat, eps_hat = signal_t * x_t - noise_t * output, signal_t * output + noise_t * x_t
    if clip:
        x_0_hat = x_0_hat.clip(-1, 1)
        eps_hat = (x_t - signal_t * x_0_hat) / noise_t
    return x_0_hat, eps_hat


def image_losses(output, target, loss):
    """The l2, l1 or huber (delta = 1) loss of each image: (B,), averaged over its values."""
    function = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[loss]
    return function(output, target, reduction="none").flatten(1).mean(dim=1)


def stratified_t(batch_size, num_timesteps, generator):
    """One t from each of B equal slices of 0 ... T-1: uniform like DDPM's, with less variance. int64 (B,)."""
    u = torch.rand(batch_size, generator=generator, device=generator.device)
    slices = torch.arange(batch_size, device=generator.device)
    return ((slices + u) / batch_size * num_timesteps).long().clamp(max=num_timesteps - 1)


# --- Sampling ---------------------------------------------------------------------------------------------------


def time_pairs(num_timesteps, steps):
    """[(t, t_prev), ..., (t, -1)]: exactly `steps` pairs from t = T-1 down, closer together near the image.

    t + 1 = T * (i / steps)^1.3 for i = steps ... 1, or the lowest still free: DDIM's appendix D.2 has the exponents 1
    and 2; benchmarks/trials.py compares them.  Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps {steps} is not in 1..{num_timesteps}")
    times = [max(int(num_timesteps * (i / steps) ** 1.3 + 0.5), i) - 1 for i in range(steps, 0, -1)]
    return list(zip(times, [*times[1:], -1], strict=True))


def guided(model, y, guidance, until=math.inf):
    """denoise(x_t, t) -> output_u + guidance * (output_c - output_u), classifier-free guidance.

    Ho & Salimans 2022 eq. (6), whose w is ours - 1: 0 is unconditional, 1 plain conditional; both take one pass.  It
    holds for v as for eps, since either is an affine function of the other at a given x_t.  Above 1 it acts only at
    t < until: in more noise it costs variety (Kynkäänniemi et al. 2024, arXiv:2404.07724).  y: int64 (B,).
    """

    def denoise(x_t, t):
        times, null = torch.full_like(y, t), torch.full_like(y, NULL_LABEL)
        if guidance in (0, 1) or (guidance > 1 and t >= until):
            return model(x_t, times, y if guidance else null)
        output_u, output_c = model(
            torch.cat([x_t, x_t]), times.repeat(2), torch.cat([null, y])
        ).chunk(2)
        return output_u + guidance * (output_c - output_u)

    return denoise


def ddim_step(x_0_hat, eps_hat, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    """One reverse step, DDIM eq. (12), with sigma_t of eq. (16): eta = 0 is deterministic, 1 is DDPM-like.

    x_0_hat, eps_hat: (B, C, H, W);  alpha_bar_t < alpha_bar_prev <= 1: numbers;  noise: like x_0_hat where eta > 0.
    """
    sigma_t = (
        eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)) ** 0.5
    )
    x_prev = (
        alpha_bar_prev**0.5 * x_0_hat + max(1 - alpha_bar_prev - sigma_t**2, 0.0) ** 0.5 * eps_hat
    )
    return x_prev + sigma_t * noise if sigma_t > 0 else x_prev


def dpm_extrapolate(x_t, x_0_hat, alpha_bar_t, alpha_bar_prev, x_0_last, alpha_bar_last):
    """What ddim_step takes in place of x_0_hat and eps_hat to be of second order: DPM-Solver++(2M).

    Lu et al. 2022 (arXiv:2211.01095) algorithm 2: D = x_0_hat + h / (2 h_last) * (x_0_hat - x_0_last), where h and
    h_last are this step and the one before in lambda = log(alpha_bar / (1 - alpha_bar)) / 2.  Its x_prev is that of
    DDIM eq. (12) with D and the noise that makes up x_t with it.  All alpha_bar below 1: numbers.
    """
    last, now, then = (
        math.log(a / (1 - a)) / 2 for a in (alpha_bar_last, alpha_bar_t, alpha_bar_prev)
    )
    D = x_0_hat + (then - now) / (now - last) / 2 * (x_0_hat - x_0_last)
    return D, (x_t - alpha_bar_t**0.5 * D) / (1 - alpha_bar_t) ** 0.5


def ddim_sample(
    denoise,
    x_T,
    alpha_bars,
    pairs,
    prediction,
    eta=0.0,
    clip=True,
    draw=None,
    trace=None,
    solver="ddim",
):
    """Walk from noise to images.

    denoise: (x_t, t) -> network output;  x_T: (B, C, H, W) ~ N(0, 1);  pairs: from time_pairs;  draw: () -> noise like
    x_T, called once a step if eta > 0;  trace: a list that gets (t, x_t, x_0_hat) of every step and (-1, x_0, x_0);
    solver: ddim, or dpm++ with eta = 0, else ValueError.  Returns x_0 like x_T, in [-1, 1] with clip.
    """
    if solver != "ddim" and (solver != "dpm++" or eta > 0):
        raise ValueError(f"solver {solver!r} with eta {eta}: it must be ddim, or dpm++ with eta 0")
    x_t, last = x_T, None
    for t, t_prev in pairs:
        alpha_bar_t = alpha_bars[t].item()
        alpha_bar_prev = alpha_bars[t_prev].item() if t_prev >= 0 else 1.0
        x_0_hat, eps_hat = implied(denoise(x_t, t), x_t, prediction, alpha_bar_t, clip)
        if trace is not None:
            trace.append((t, x_t, x_0_hat))
        now = x_0_hat, alpha_bar_t
        if solver == "dpm++" and last and t_prev >= 0:  # the first step and the last are DDIM's
            x_0_hat, eps_hat = dpm_extrapolate(x_t, *now, alpha_bar_prev, *last)
        last = now
        x_t = ddim_step(
            x_0_hat, eps_hat, alpha_bar_t, alpha_bar_prev, eta, draw() if eta > 0 else None
        )
    if trace is not None:
        trace.append((-1, x_t, x_t))
    return x_t


def ddim_invert(denoise, x_0, alpha_bars, pairs, prediction, trace=None):
    """Walk from images to the noise that ddim_sample(eta=0) takes back to them: DDIM eq. (13), read the other way.

    The noise found at x_prev stands in for the one at x_t, so the way back misses by a little that falls with the
    number of steps.  Arguments and trace as in ddim_sample, but x_T is not in it.  Returns x_T.
    """
    x_prev = x_0
    for t, t_prev in reversed(pairs):
        at = max(t_prev, 0)  # the network knows no t = -1; a clean image passes for t = 0
        x_0_hat, eps_hat = implied(denoise(x_prev, at), x_prev, prediction, alpha_bars[at].item())
        if trace is not None:
            trace.append((t_prev, x_prev, x_0_hat))
        x_prev = q_sample(x_0_hat, eps_hat, alpha_bars[t].item())
    return x_prev


@torch.no_grad()
def sample(
    *, model, config, labels, steps, guidance, guidance_limit=GUIDANCE_LIMIT, eta=0.0, solver="ddim", seed=0,
    batch_size=100, trace=None,
):  # fmt: skip
    """Draw one image for each label: (N, C, 32, 32) in [-1, 1] on the CPU.  Image i depends on (seed, i), not on N.

    config: the checkpoint's;  labels: int64 (N,);  guidance_limit: a share of T;  trace: ddim_sample's, one batch's.
    """
    device = next(model.parameters()).device
    alpha_bars = make_alpha_bars(config["schedule"], config["num_timesteps"])
    pairs = time_pairs(config["num_timesteps"], steps)
    images, until = [], guidance_limit * config["num_timesteps"]
    parts = torch.arange(len(labels)).split(batch_size)
    for part in tqdm(parts, unit="batch", disable=len(parts) == 1):
        streams = noise_streams(seed, part.tolist())

        def draw(streams=streams):
            return torch.from_numpy(draw_noise(streams, (config["latent_channels"], 8, 8))).to(
                device
            )

        denoise = guided(model.denoiser, labels[part].to(device), guidance, until)
        z_0 = ddim_sample(
            denoise,
            draw(),
            alpha_bars,
            pairs,
            config["prediction"],
            eta,
            False,
            draw,
            trace,
            solver,
        )
        images.append(model.to_images(z_0).cpu())
    return torch.cat(images)


# --- Training ---------------------------------------------------------------------------------------------------


def learning_rate(args, step, progress):
    """--lr after a linear warm-up, annealed to zero along half a cosine as progress goes from 0 to 1."""
    return (
        args.lr
        * min(1.0, (step + 1) / (args.warmup + 1))
        * 0.5
        * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


def power_ema(length):
    """Average weights over the last `length` of the run so far: w_n <- d * w_n-1 + (1 - d) * w.

    d = (1 - 1/n)^(1/length - 1), the power function EMA of Karras et al. 2024 (gamma = 1/length - 2): the mean age of
    what is averaged is length * n steps.  It starts as a copy and needs neither a warm-up nor the length of the run.
    """

    def average(ema_weights, weights, num_averaged):
        decay = (1 - 1 / (num_averaged.item() + 1)) ** (1 / length - 1)
        get_ema_multi_avg_fn(decay)(ema_weights, weights, num_averaged)

    return average


def train(args, checkpoint=None):
    """Train the stages asked for, or go on from a checkpoint of this script. Returns the exit code."""
    device = training_device(args)
    if len(args.autoencoder_widths) != 2 or min(args.autoencoder_widths) < 4:
        raise InputError(
            f"--autoencoder-widths {args.autoencoder_widths} must be two numbers from 4"
        )
    if len(args.widths) > 4:
        raise InputError(
            f"--widths {args.widths} are more than 4: latents of 8x8 can be halved three times"
        )
    UNet(
        args.latent_channels, 1, args.widths, args.depths, 1, args.attention, args.emb_channels
    )  # refuse it now
    data, folder = load_run_data(args, checkpoint), args.run_dir if checkpoint else None
    share = {"1": 1.0, "2": 0.0}.get(args.stage, 0.0 if args.autoencoder else args.stage_1_share)
    if checkpoint and (share == 0 if checkpoint["model"] == "autoencoder" else share == 1):
        raise InputError(
            f"--stage or --autoencoder leaves out the stage that {args.run_dir} is in: resume without it"
        )
    if share > 0 and (not checkpoint or checkpoint["model"] == "autoencoder"):
        folder, code = train_autoencoder(args, data, device, checkpoint, share)
        if code or share == 1:
            return code
        checkpoint = None
    return train_denoiser(args, data, device, checkpoint, folder, 1 - share)


def train_autoencoder(args, data, device, checkpoint, share):
    """Stage 1, the autoencoder. Returns the run's folder and the exit code."""
    torch.manual_seed(args.seed)  # for the initial weights
    images = data.images.to(device)
    network = {
        "channels": args.channels,
        "latent_channels": args.latent_channels,
        "widths": args.autoencoder_widths,
    }
    network["attention"] = args.channel_attention
    model, fused = (
        Autoencoder(**network).to(device, memory_format=torch.channels_last),
        device.type != "mps",
    )
    forward = parallel(torch.compile(model) if args.compile else model)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, weight_decay=args.weight_decay, fused=fused
    )
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()
    sums = torch.zeros(
        2, device=device
    )  # of reconstruction loss and KL since the last line of the log
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["step"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        sums.copy_(torch.tensor(checkpoint["sums"]))
    run = Run(NAME, args, len(images), checkpoint, part="autoencoder", share=share)
    config = {k: getattr(args, k) for k in FIXED + FREE}

    @run.by_the_first
    @torch.no_grad()
    def save():
        x = to_float(images[:400])
        back = ema_model.module.decoder(ema_model.module.encode(x)[0])
        run.check_finite(reconstructions=back.abs().max().item())
        run.log(
            {
                "grey_level_error": (to_uint8(back).float() - images[:400].float())
                .abs()
                .mean()
                .item()
            }
        )
        save_images(
            torch.stack([x, back], dim=1)[:40].flatten(0, 1).cpu(),
            [],
            data.class_names,
            run.picture(),
            10,
        )
        run.save({
            "config": config, "network": network, "class_names": data.class_names, "weights": model.state_dict(),
            "ema": ema_model.module.state_dict(), "optimizer": optimizer.state_dict(), "sums": sums.tolist(),
        })  # fmt: skip

    print(
        f"stage 1 in {run.folder} on {device}, {sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )
    generator = torch.Generator(device)
    with run.under_way() as bar:
        if not checkpoint:
            save()  # from now on there is a run to go on with
        while (done := run.agree()) < 1 and not run.stopped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, run.step, done)
            run.seed(generator)
            eps = torch.randn(
                args.batch_size, args.latent_channels, 8, 8, generator=generator, device=device
            )
            batch, eps = run.own(run.batch().to(device), eps)
            x = to_float(images[batch])
            with autocast(device, args.bf16):
                x_hat, mu, logvar = forward(x, eps)
            reconstruction = (x - x_hat.float()).abs().flatten(1).sum(dim=1).mean()
            kl = kl_divergence(mu.float().flatten(1), logvar.float().flatten(1)).mean()
            loss = reconstruction + args.kl_weight * kl

            optimizer.zero_grad(set_to_none=True)
            (loss / x[0].numel()).backward()  # of the size that --grad-clip is meant for
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            run.check_finite(loss=loss.item(), gradient=grad_norm.item())
            optimizer.step()
            if run.rank == 0:
                ema_model.update_parameters(model)
            run.step += 1
            sums += run.mean(torch.stack([reconstruction.detach(), kl.detach()]))
            run.show(bar, f"loss {loss.item():.2f}, KL {kl.item():.0f}")
            if run.step % LOG_EVERY == 0:
                reconstruction, kl = (sums / LOG_EVERY).tolist()
                run.log({"reconstruction": reconstruction, "kl": kl, "grad_norm": grad_norm.item()})
                sums.zero_()
            if run.save_due():
                save()
        save()
    return run.folder, run.end()


def train_denoiser(args, data, device, checkpoint, folder, share):
    """Stage 2, the diffusion model on the autoencoder's latents. Returns the exit code."""
    torch.manual_seed(args.seed)  # for the initial weights
    if not checkpoint:
        path = find_checkpoint(("autoencoder",), args.autoencoder or folder)
        stage_1 = load_checkpoint(path, ("autoencoder",))
        print(f"the autoencoder is {path}")
        args.kl_weight = stage_1["config"][
            "kl_weight"
        ]  # of another run, perhaps, as the shapes below
    autoencoder = checkpoint["autoencoder"] if checkpoint else stage_1["network"]
    earlier = checkpoint["stage_1_seconds"] if checkpoint else stage_1["seconds"]
    if autoencoder["channels"] != args.channels:
        raise InputError(
            f"the autoencoder is for --channels {autoencoder['channels']}, not {args.channels}"
        )
    network = {k: getattr(args, k) for k in ("widths", "depths", "attention", "emb_channels")}
    network |= {
        "channels": autoencoder["latent_channels"],
        "patch": 1,
        "num_classes": len(data.class_names),
    }
    model = LatentDiffusion(network, autoencoder).to(device, memory_format=torch.channels_last)
    if checkpoint:
        model.load_state_dict(checkpoint["ema"])  # with the autoencoder, latent_mean and latent_std
        model.denoiser.load_state_dict(checkpoint["weights"])
    else:
        model.autoencoder.load_state_dict(stage_1["ema"])
    latents, labels = model.to_latents(data.images), data.labels.to(device)  # once, for all epochs
    if not checkpoint:
        model.latent_std, model.latent_mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
        latents = (latents - model.latent_mean) / model.latent_std
    forward = parallel(torch.compile(model.denoiser) if args.compile else model.denoiser)
    kind = {"muon": Muon, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer]
    parameters, decay, fused = (
        list(model.denoiser.parameters()),
        args.weight_decay,
        device.type != "mps",
    )
    optimizer = kind(model.denoiser.named_parameters(), args.lr, weight_decay=decay, fused=fused)
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()
    by_tenth = torch.zeros(
        2, 10, device=device
    )  # sums by tenth of t: the loss, and that of the output 0
    if checkpoint:
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["step"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        by_tenth.copy_(torch.tensor(checkpoint["by_tenth"]))
    run = Run(NAME, args, len(latents), checkpoint, folder=folder, share=share)
    config = {k: getattr(args, k) for k in FIXED + FREE}
    for key, flag in (
        ("latent_channels",) * 2,
        ("widths", "autoencoder_widths"),
        ("attention", "channel_attention"),
    ):
        config[flag] = autoencoder[key]
    grid_labels = torch.arange(min(10, len(data.class_names))).repeat_interleave(8)

    @run.by_the_first
    def save():
        steps, guidance = min(GRID_STEPS, args.num_timesteps), default_guidance(config)
        grid = sample(
            model=ema_model.module,
            config=config,
            labels=grid_labels,
            steps=steps,
            guidance=guidance,
        )
        run.check_finite(samples=grid.abs().max().item())
        save_images(grid, grid_labels.tolist(), data.class_names, run.picture(), columns=8)
        run.save({
            "config": config, "network": network, "autoencoder": autoencoder, "class_names": data.class_names,
            "weights": model.denoiser.state_dict(), "ema": ema_model.module.state_dict(),
            "optimizer": optimizer.state_dict(), "by_tenth": by_tenth.tolist(), "stage_1_seconds": earlier,
        })  # fmt: skip

    print(
        f"stage 2 in {run.folder} on {device}, {sum(p.numel() for p in parameters):,} parameters",
        flush=True,
    )
    alpha_bars = make_alpha_bars(args.schedule, args.num_timesteps).float().to(device)
    generator = torch.Generator(device)
    with run.under_way() as bar:
        if not checkpoint:
            save()  # from now on there is a run to go on with
        while (done := run.agree()) < 1 and not run.stopped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, run.step, done)
            run.seed(generator)
            batch = run.batch().to(device)
            t = stratified_t(len(batch), args.num_timesteps, generator)
            eps = torch.randn(len(batch), *latents.shape[1:], generator=generator, device=device)
            dropped = (
                torch.rand(len(batch), generator=generator, device=device) < args.label_dropout
            )
            batch, t, eps, dropped = run.own(batch, t, eps, dropped)
            z_0, y = latents[batch], torch.where(dropped, NULL_LABEL, labels[batch])

            alpha_bar_t = alpha_bars[t].view(-1, 1, 1, 1)
            z_t = q_sample(z_0, eps, alpha_bar_t)
            target = target_of(args.prediction, z_0, eps, alpha_bar_t)
            with autocast(device, args.bf16):
                output = forward(z_t, t, y)
            losses = image_losses(output.float(), target, args.loss)
            loss = losses.mean()

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
            run.check_finite(loss=loss.item(), gradient=grad_norm.item())
            optimizer.step()
            if run.rank == 0:
                ema_model.update_parameters(model)
            run.step += 1

            nothing = image_losses(torch.zeros_like(target), target, args.loss)
            both, tenths = torch.stack([losses.detach(), nothing]), t * 10 // args.num_timesteps
            by_tenth += run.total(torch.zeros_like(by_tenth).index_add_(1, tenths, both))
            run.show(bar, f"loss {loss.item():.4f}")
            if (
                run.step % LOG_EVERY == 0
            ):  # by tenth of t: over the loss of the output 0, so near 1 nothing is learned
                run.log({
                    "loss": by_tenth[0].sum().item() / LOG_EVERY / args.batch_size,
                    "loss_by_tenth_of_t": [a / b if b else None for a, b in by_tenth.T.tolist()],
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
                })  # fmt: skip
                by_tenth.zero_()
            if run.save_due():
                save()
        save()
    return run.end()


# --- Run state --------------------------------------------------------------------------------------------------

# The flags that make a run what it is, and those that may change when it goes on.
FIXED = (
    "data", "channels", "latent_channels", "autoencoder_widths", "channel_attention", "kl_weight", "widths", "depths",
    "attention", "emb_channels", "num_timesteps", "schedule", "prediction", "loss", "label_dropout", "optimizer",
    "weight_decay", "batch_size", "ema_length", "seed",
)  # fmt: skip
FREE = (
    *RUN_FLAGS,
    "lr",
    "warmup",
    "grad_clip",
    "bf16",
    "compile",
    "stage",
    "stage_1_share",
    "autoencoder",
)


def ema_network(checkpoint, device):
    """Autoencoder and denoiser with the averaged weights of a checkpoint, ready to sample."""
    model = LatentDiffusion(checkpoint["network"], checkpoint["autoencoder"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# --- Command line -----------------------------------------------------------------------------------------------


def default_guidance(config):
    """GUIDANCE where the network knows both classes and "no class", else the only one that it knows."""
    return {0.0: 1.0, 1.0: 0.0}.get(config["label_dropout"], GUIDANCE)


def check_sampling(config, steps, guidance):
    """Raise InputError for what the training does not allow."""
    if config["label_dropout"] in (0, 1) and guidance != default_guidance(config):
        raise InputError(
            f"the label dropout of the training leaves only --guidance {default_guidance(config)}"
        )
    if steps > config["num_timesteps"]:
        raise InputError(
            f"--steps {steps} is more than the {config['num_timesteps']} of the training"
        )


def build_parser():
    on_off = argparse.BooleanOptionalAction
    parser = run_parser(NAME, __doc__)
    add = parser.add_argument_group("stages and autoencoder").add_argument
    add(
        "--stage",
        choices=("1", "2", "both"),
        default="both",
        help="1 autoencoder, 2 diffusion on its latents (both)",
    )
    add(
        "--stage-1-share",
        type=number(float, 0.01, 0.99),
        default=0.2,
        help="of the length, if both (0.2)",
    )
    add(
        "--autoencoder",
        metavar="PATH",
        help="of stage 2, instead of a stage 1 (with --stage 2: the newest)",
    )
    add(
        "--latent-channels",
        type=number(int, 1, 256),
        default=8,
        help="of the latents, which are 8x8 (8)",
    )
    add(
        "--autoencoder-widths",
        type=whole_numbers,
        default=(32, 64),
        help="channels at 16x16 and at 8x8 (32,64)",
    )
    add("--channel-attention", action=on_off, default=True, help="in encoder and decoder (on)")
    add(
        "--kl-weight",
        type=number(float, 0),
        default=1e-2,
        help="of KL; small, keeps latents in bounds (0.01)",
    )
    add = parser.add_argument_group("network").add_argument
    add(
        "--widths",
        type=whole_numbers,
        default=(96,),
        help="channels by resolution, finest first (96)",
    )
    add("--depths", type=whole_numbers, default=(3,), help="residual blocks at each resolution (3)")
    add(
        "--attention",
        action=on_off,
        default=True,
        help="self-attention at the lowest resolution (on)",
    )
    add(
        "--emb-channels",
        type=number(int, 4),
        default=128,
        help="size of the time and class embedding (128)",
    )
    add = parser.add_argument_group("method").add_argument
    add("--num-timesteps", type=number(int, 2, 100_000), default=1000, help="T (1000)")
    add(
        "--schedule",
        choices=("linear", "quadratic", "cosine"),
        default="cosine",
        help="of alpha_bar (cosine)",
    )
    add("--prediction", choices=("eps", "v"), default="v", help="what the network outputs (v)")
    add(
        "--loss",
        choices=("l2", "l1", "huber"),
        default="l2",
        help="distance of output and target (l2)",
    )
    add(
        "--label-dropout",
        type=number(float, 0, 1),
        default=0.1,
        help="share of labels hidden, for guidance (0.1)",
    )
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--optimizer",
        choices=("muon", "adamw", "adam"),
        default="muon",
        help="muon: with AdamW for the rest (muon)",
    )
    add(
        "--lr",
        type=number(float, 0, above=True),
        default=3e-3,
        help="learning rate after the warm-up (0.003)",
    )
    add(
        "--weight-decay",
        type=number(float, 0),
        default=0.01,
        help="pull of the weights towards 0 (0.01)",
    )
    add(
        "--warmup",
        type=number(int, 0),
        default=200,
        help="steps up to the full learning rate (200)",
    )
    add(
        "--grad-clip",
        type=number(float, 0, above=True),
        default=1.0,
        help="largest norm of the gradient (1)",
    )
    add(
        "--ema-length",
        type=number(float, 0, 0.5, above=True),
        default=0.08,
        help="mean age / run length (0.08)",
    )
    add(
        "--bf16",
        action=on_off,
        help="bfloat16 autocast (on for CPUs with AMX or AVX512-BF16, else off)",
    )
    add("--compile", action=on_off, default=False, help="torch.compile the network (off)")
    add = parser.add_argument_group("sampling").add_argument
    add("--guidance", type=number(float, 0), help="0 no class, 1 plain class, above 1 guided (2.5)")
    add(
        "--guidance-limit",
        type=number(float, 0, 1),
        default=GUIDANCE_LIMIT,
        help="guide below this share of T (0.8)",
    )
    add("--steps", type=number(int, 1), help="steps of the sampler, at most T (20)")
    add(
        "--solver",
        choices=("ddim", "dpm++"),
        default="ddim",
        help="dpm++ is of second order, for few steps (ddim)",
    )
    add(
        "--eta",
        type=number(float, 0, 1),
        default=0.0,
        help="0 deterministic ... 1 as noisy as DDPM (0)",
    )
    add(
        "--filmstrip",
        action="store_true",
        help="a .png of the trajectory: x_t above the x_0 it implies",
    )
    add(
        "--map",
        choices=("pca", "tsne"),
        help="real codes in the plane; ldm adds the samples' paths",
    )
    add(
        "--reconstruct",
        metavar="IMAGE",
        nargs="+",
        help="test images' indices or files (with --class), and decoded",
    )
    add(
        "--invert",
        metavar="IMAGE",
        help="image -> noise -> image: a file (with --class), or a test image's index",
    )
    return parser


def draw(args):
    """Sample from a checkpoint and write what was asked for."""
    path = find_checkpoint((NAME,), args.checkpoint, SAMPLES_FROM)
    checkpoint = load_checkpoint(path, SAMPLES_FROM)
    config, names = checkpoint["config"], checkpoint["class_names"]
    guidance = default_guidance(config) if args.guidance is None else args.guidance
    if args.invert and args.guidance is None:
        guidance = min(guidance, 1.0)  # guided outputs do not find their way back
    steps = min(20, config["num_timesteps"]) if args.steps is None else args.steps
    classes, count = parse_classes(args.class_, names), args.num_samples
    at_most_one(args, "filmstrip", "map", "reconstruct", "invert")
    endings = [".png"] if args.filmstrip or args.map else [".png", ".npz", ".gif", ""]
    output = sampled_file(
        args.output, NAME, classes, names, endings, given=args.reconstruct or [args.invert]
    )
    check_sampling(config, steps, guidance)
    if args.eta > 0 and (args.invert or args.solver == "dpm++"):
        raise InputError("--invert and --solver dpm++ need the deterministic sampler, --eta 0")
    model, labels = (
        ema_network(checkpoint, pick_device(args.device)),
        torch.tensor(classes).repeat_interleave(count),
    )
    trace = [] if args.filmstrip or args.map or args.invert or output.suffix == ".gif" else None
    if args.reconstruct or args.invert:
        x, labels = given_images(
            args.reconstruct or [args.invert], args.class_, config, names, args.data_dir
        )
        z_0 = model.to_latents(x)
        if args.invert:
            T = config["num_timesteps"]
            denoise = guided(
                model.denoiser, labels.to(z_0.device), guidance, args.guidance_limit * T
            )
            way = make_alpha_bars(config["schedule"], T), time_pairs(T, steps), config["prediction"]
            z_0 = ddim_sample(
                denoise,
                ddim_invert(denoise, z_0, *way, trace),
                *way,
                0,
                False,
                None,
                trace,
                args.solver,
            )
        back = model.to_images(z_0).cpu()
        print(grey_level_error(x, back))
        images, labels, count = torch.cat([x, back]), labels.repeat(2), len(x)
    else:
        images = sample(
            model=model, config=config, labels=labels, steps=steps, guidance=guidance, eta=args.eta, solver=args.solver,
            seed=args.seed, batch_size=args.batch_size if trace is None else len(labels), trace=trace,
            guidance_limit=args.guidance_limit,
        )  # fmt: skip
    if args.map:
        data = load_data(config["data"], args.data_dir or config["data_dir"], config["channels"])
        latents = model.to_latents(spread(data.images, 5000)).flatten(1).cpu()
        walks = (
            torch.stack([z_t for _, z_t, _ in trace], dim=1).flatten(2).cpu()
        )  # (N, moments, numbers)
        points = in_the_plane(latents, args.map, walks.flatten(0, 1))
        paths = zip(
            points[len(latents) :].unflatten(0, walks.shape[:2]), labels.tolist(), strict=True
        )
        save_map(points[: len(latents)], spread(data.labels, 5000), names, output, list(paths))
    else:
        decoded = trace and [
            (t, model.to_images(z_t).cpu(), model.to_images(z_0).cpu()) for t, z_t, z_0 in trace
        ]
        save_sampled(images, labels, names, output, count, decoded, args.filmstrip)
    print(f"wrote {output} (weights: {path})")
    return 0


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args, checkpoint = parse_run(parser, argv, (NAME, "autoencoder"), FIXED)
        return train(args, checkpoint) if args.train or args.resume else draw(args)


if __name__ == "__main__":
    sys.exit(main())
