"""DDPM: denoising diffusion probabilistic models, class-conditional, in one file (with common.py).

Jonathan Ho, Ajay Jain, Pieter Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239).

    q_sample    x_t   = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps                        DDPM eq. (4)
    loss        E || target - model(x_t, t, y) ||^2,  target = eps or v                              DDPM eq. (14)
    x_0_hat     (x_t - sqrt(1 - alpha_bar_t) * eps_hat) / sqrt(alpha_bar_t)                          DDPM eq. (15)
    posterior   mean = sqrt(alpha_bar_prev) * beta_t / (1 - alpha_bar_t) * x_0_hat
                       + sqrt(alpha_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * x_t
                variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t                         DDPM eq. (7)
    ddpm_sample x_prev = mean + sqrt(variance) * noise,  no noise on the last step                   DDPM algorithm 2

    python ddpm.py --train --epochs 50             train on Fashion-MNIST
    python ddpm.py --class Sneaker                 draw a Sneaker with the newest weights

Differs from the paper: class labels with classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) at low t, a
cosine schedule and skipped steps (Nichol & Dhariwal 2021, arXiv:2102.09672; here uneven), v-prediction (Salimans & Ho
2022, arXiv:2202.00512), stratified t, an EMA over a share of the run (Karras et al. 2024, arXiv:2312.02696), Muon with
an annealed rate, gradient clipping, x_0_hat limited to [-1, 1] (--no-clip), and a smaller network.
"""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common import (
    IMAGE_SIZE,
    LOG_EVERY,
    NULL_LABEL,
    RUN_FLAGS,
    InputError,
    Muon,
    Run,
    UNet,
    autocast,
    draw_noise,
)
from common import (
    errors_in_one_line,
    find_checkpoint,
    load_checkpoint,
    load_run_data,
    noise_streams,
    number,
    parallel,
)
from common import (
    parse_classes,
    parse_run,
    pick_device,
    run_parser,
    sampled_file,
    save_images,
    save_sampled,
    to_float,
)
from common import training_device, whole_numbers

NAME = "ddpm"
SAMPLES_FROM = (
    "ddpm",
    "ddim",
)  # checkpoints of these scripts hold the same network, trained in the same way
GRID_STEPS = 50  # of the grids drawn while training
GUIDANCE, GUIDANCE_LIMIT = 1.6, 0.8  # where they are not asked for; the limit is a share of T

# --- Method -----------------------------------------------------------------------------------------------------


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


def posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_prev, variance="small"):
    """Mean and variance of q(x_prev | x_t, x_0 = x_0_hat).

    DDPM eq. (7) for the mean; the variance is that of the same equation (small), or beta_t (large), section 3.2.  With
    skipped steps beta_t = 1 - alpha_bar_t / alpha_bar_prev, Nichol & Dhariwal section 4.
    x_0_hat, x_t: (B, C, H, W);  alpha_bar_t < alpha_bar_prev <= 1: numbers.  Returns (like x_t, a number).
    """
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    mean = alpha_bar_prev**0.5 * beta_t / (1 - alpha_bar_t) * x_0_hat
    mean = mean + alpha_t**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * x_t
    return mean, beta_t if variance == "large" else (1 - alpha_bar_prev) / (
        1 - alpha_bar_t
    ) * beta_t


def ddpm_sample(
    denoise, x_T, alpha_bars, pairs, prediction, variance="small", clip=True, draw=None, trace=None
):
    """Walk from noise to images: DDPM algorithm 2.

    denoise: (x_t, t) -> network output;  x_T: (B, C, H, W) ~ N(0, 1);  pairs: from time_pairs;  draw: () -> noise like
    x_T, called on every step but the last;  trace: a list that gets (t, x_t, x_0_hat) of every step and (-1, x_0, x_0).
    Returns x_0 like x_T, in [-1, 1] with clip.
    """
    x_t = x_T
    for t, t_prev in pairs:
        alpha_bar_t = alpha_bars[t].item()
        alpha_bar_prev = alpha_bars[t_prev].item() if t_prev >= 0 else 1.0
        x_0_hat, _ = implied(denoise(x_t, t), x_t, prediction, alpha_bar_t, clip)
        if trace is not None:
            trace.append((t, x_t, x_0_hat))
        mean, sigma_squared = posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_prev, variance)
        x_t = mean + sigma_squared**0.5 * draw() if t_prev >= 0 else mean
    if trace is not None:
        trace.append((-1, x_t, x_t))
    return x_t


@torch.no_grad()
def sample(
    *, model, config, labels, steps, guidance, guidance_limit=GUIDANCE_LIMIT, variance="small", clip=True, seed=0,
    batch_size=100, trace=None,
):  # fmt: skip
    """Draw one image for each label: (N, C, 32, 32) in [-1, 1] on the CPU.  Image i depends on (seed, i), not on N.

    config: the checkpoint's;  labels: int64 (N,);  guidance_limit: a share of T;
    trace: as in ddpm_sample, for N <= batch_size.
    """
    device = next(model.parameters()).device
    alpha_bars = make_alpha_bars(config["schedule"], config["num_timesteps"])
    pairs = time_pairs(config["num_timesteps"], steps)
    images, until = [], guidance_limit * config["num_timesteps"]
    parts = torch.arange(len(labels)).split(batch_size)
    for part in tqdm(parts, unit="batch", disable=len(parts) == 1):
        streams = noise_streams(seed, part.tolist())

        def draw(streams=streams):
            return torch.from_numpy(
                draw_noise(streams, (config["channels"], IMAGE_SIZE, IMAGE_SIZE))
            ).to(device)

        denoise = guided(model, labels[part].to(device), guidance, until)
        x_0 = ddpm_sample(
            denoise, draw(), alpha_bars, pairs, config["prediction"], variance, clip, draw, trace
        )
        images.append(x_0.cpu())
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
    """Train, or go on from a checkpoint of this script, until --epochs or --minutes are over. Returns the exit code."""
    device = training_device(args)
    torch.manual_seed(args.seed)  # for the initial weights
    data = load_run_data(args, checkpoint)
    images, labels = data.images.to(device), data.labels.to(device)
    if IMAGE_SIZE % (args.patch * 2 ** (len(args.widths) - 1)):
        raise InputError(
            f"--patch {args.patch} and {len(args.widths)} --widths do not divide {IMAGE_SIZE} pixels"
        )
    network = {
        k: getattr(args, k)
        for k in ("channels", "widths", "depths", "patch", "attention", "emb_channels")
    }
    network["num_classes"] = len(data.class_names)
    model = UNet(**network).to(device, memory_format=torch.channels_last)
    forward = parallel(torch.compile(model) if args.compile else model)
    kind = {"muon": Muon, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer]
    optimizer = kind(
        model.named_parameters(),
        args.lr,
        weight_decay=args.weight_decay,
        fused=device.type != "mps",
    )
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()
    by_tenth = torch.zeros(
        2, 10, device=device
    )  # sums by tenth of t: the loss, and that of the output 0
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["step"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        by_tenth.copy_(torch.tensor(checkpoint["by_tenth"]))
    run = Run(NAME, args, len(images), checkpoint)
    config = {k: getattr(args, k) for k in FIXED + FREE}
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
            "config": config, "network": network, "class_names": data.class_names, "weights": model.state_dict(),
            "ema": ema_model.module.state_dict(), "optimizer": optimizer.state_dict(), "by_tenth": by_tenth.tolist(),
        })  # fmt: skip

    print(
        f"run {run.folder} on {device}, {sum(p.numel() for p in model.parameters()):,} parameters",
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
            eps = torch.randn(len(batch), *images.shape[1:], generator=generator, device=device)
            dropped = (
                torch.rand(len(batch), generator=generator, device=device) < args.label_dropout
            )
            batch, t, eps, dropped = run.own(batch, t, eps, dropped)
            x_0, y = to_float(images[batch]), torch.where(dropped, NULL_LABEL, labels[batch])

            alpha_bar_t = alpha_bars[t].view(-1, 1, 1, 1)
            x_t = q_sample(x_0, eps, alpha_bar_t)
            target = target_of(args.prediction, x_0, eps, alpha_bar_t)
            with autocast(device, args.bf16):
                output = forward(x_t, t, y)
            losses = image_losses(output.float(), target, args.loss)
            loss = losses.mean()

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
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
    "data", "channels", "widths", "depths", "patch", "attention", "emb_channels", "num_timesteps", "schedule",
    "prediction", "loss", "label_dropout", "optimizer", "weight_decay", "batch_size", "ema_length", "seed",
)  # fmt: skip
FREE = (*RUN_FLAGS, "lr", "warmup", "grad_clip", "bf16", "compile")


def ema_network(checkpoint, device):
    """The network with the averaged weights of a checkpoint, ready to sample."""
    model = UNet(**checkpoint["network"])
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
    add = parser.add_argument_group(
        "network; on a GPU try --patch 1 --widths 64,128,256 --depths 2,2,4"
    ).add_argument
    add(
        "--widths",
        type=whole_numbers,
        default=(32, 96),
        help="channels by resolution, finest first (32,96)",
    )
    add(
        "--depths",
        type=whole_numbers,
        default=(1, 3),
        help="residual blocks at each resolution (1,3)",
    )
    add(
        "--patch",
        type=int,
        choices=(1, 2, 4),
        default=2,
        help="pixels a side folded into channels at the start (2)",
    )
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
        default=5e-3,
        help="learning rate after the warm-up (0.005)",
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
    add("--guidance", type=number(float, 0), help="0 no class, 1 plain class, above 1 guided (1.6)")
    add(
        "--guidance-limit",
        type=number(float, 0, 1),
        default=GUIDANCE_LIMIT,
        help="guide below this share of T (0.8)",
    )
    add("--steps", type=number(int, 1), help="steps of the sampler, at most T (T)")
    add(
        "--variance",
        choices=("small", "large"),
        default="small",
        help="of the noise: posterior's, or beta_t (small)",
    )
    add("--clip", action=on_off, default=True, help="limit x_0_hat to [-1, 1] (on)")
    add(
        "--filmstrip",
        action="store_true",
        help="a .png of the trajectory: x_t above the x_0 it implies",
    )
    return parser


def draw(args):
    """Sample from a checkpoint and write what was asked for."""
    path = find_checkpoint((NAME,), args.checkpoint, SAMPLES_FROM)
    checkpoint = load_checkpoint(path, SAMPLES_FROM)
    config, names = checkpoint["config"], checkpoint["class_names"]
    guidance = default_guidance(config) if args.guidance is None else args.guidance
    steps = config["num_timesteps"] if args.steps is None else args.steps
    classes, count = parse_classes(args.class_, names), args.num_samples
    endings = [".png"] if args.filmstrip else [".png", ".npz", ".gif", ""]
    output = sampled_file(args.output, NAME, classes, names, endings)
    check_sampling(config, steps, guidance)
    model = ema_network(checkpoint, pick_device(args.device))
    labels = torch.tensor(classes).repeat_interleave(count)
    trace = [] if args.filmstrip or output.suffix == ".gif" else None
    images = sample(
        model=model, config=config, labels=labels, steps=steps, guidance=guidance, guidance_limit=args.guidance_limit,
        variance=args.variance, clip=args.clip, seed=args.seed,
        batch_size=args.batch_size if trace is None else len(labels), trace=trace,
    )  # fmt: skip
    save_sampled(images, labels, names, output, count, trace, args.filmstrip)
    print(f"wrote {output} (weights: {path})")
    return 0


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args, checkpoint = parse_run(parser, argv, (NAME,), FIXED)
        return train(args, checkpoint) if args.train or args.resume else draw(args)


if __name__ == "__main__":
    sys.exit(main())
