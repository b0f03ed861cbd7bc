"""DDIM: denoising diffusion implicit models, class-conditional, in one file (with common.py).

Jiaming Song, Chenlin Meng, Stefano Ermon, "Denoising Diffusion Implicit Models", 2020
(arXiv:2010.02502).  Training is that of DDPM (Ho et al. 2020, arXiv:2006.11239); what is new is the
sampler, which skips steps: here unevenly and from t = T-1 (Lin et al. 2023, arXiv:2305.08891).
The default sampler, though, is DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095); --solver ddim is
the paper's.  The DDIM paper writes alpha_bar as plain alpha.

    predict_x_0_and_eps  x_0_hat = (x_t - sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_bar_t)  DDIM (9)
    ddim_step            x_prev = sqrt(alpha_bar_prev) * x_0_hat
                         + sqrt(1 - alpha_bar_prev - sigma_t^2) * eps_hat + sigma_t * noise     (12)
    q_sample             x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps        DDPM (4)
    image_losses         || target - model(x_t, t, y) ||^2,  target = eps or v             DDPM (14)

    python ddim.py --train --epochs 50     train on Fashion-MNIST
    python ddim.py --train --minutes 1     see it run
    python ddim.py --class Sneaker         sample a Sneaker with the newest weights

Differs from the paper: class labels with classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598) at some t, a cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672),
v-prediction (Salimans & Ho 2022, arXiv:2202.00512), stratified log-normal noise levels (Karras et
al. 2022, arXiv:2206.00364), an EMA over a fraction of the run (Karras et al. 2024,
arXiv:2312.02696), Muon (Jordan et al. 2024, in runs.py) with an annealed rate, gradient clipping,
x_0_hat clipped to [-1, 1] (unless --no-clip), and a smaller network.
"""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from common import (
    NULL_LABEL, InputError, UNet, check_options, label_indices, next_noise,
    noise_streams, to_float,
)  # fmt: skip

NAME = "ddim"
SAMPLES_FROM = ("ddim", "ddpm")  # both scripts train the same network in the same way
STEPS = 15  # default number of sampling steps
SOLVER = "dpm++"  # default
GRID_STEPS = 20  # of the grids of samples written while training
SAMPLER_FLAGS = ("guidance_interval", "eta", "clip", "solver")  # passed on to sample()
GUIDANCE = 2.2  # default
GUIDANCE_INTERVAL = (0.25, 0.7)  # default, fractions of T
WIDTHS = {32: (32, 96), 64: (32, 64, 96), 128: (32, 32, 64, 96)}  # default, by image size

# --- Method ---------------------------------------------------------------------------------------


def make_alpha_bars(schedule, num_timesteps, image_size=32):
    """The table alpha_bar_t = prod_{s <= t} (1 - beta_s): float64 (T,), falling.

    Index 0 is the paper's t = 1.  Larger images show through more noise: for those, log SNR =
    log(alpha_bar / (1 - alpha_bar)) is shifted by 2 log(32 / image_size), as Hoogeboom et al. 2023
    (arXiv:2301.11093) do.

    linear     beta from 1e-4 to 0.02, DDPM section 4
    quadratic  sqrt(beta) linear in t, beta from and to the same values
    cosine     alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2), s = 0.008,
               Nichol & Dhariwal eq. (17)
    The betas of linear and quadratic, made for T = 1000, are scaled by 1000 / T for other T.  No
    beta is above 0.999.
    """
    if schedule == "cosine":
        u = (torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps + 0.008) / 1.008
        f = torch.cos(u * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        power = {"linear": 1.0, "quadratic": 2.0}[schedule]
        first = 1e-4 ** (1 / power)
        last = 0.02 ** (1 / power)
        betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64) ** power
        betas = betas * 1000 / num_timesteps
    alpha_bars = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)
    if image_size == 32:
        return alpha_bars
    return torch.sigmoid(torch.logit(alpha_bars) + 2 * math.log(32 / image_size))


def q_sample(x_0, eps, alpha_bar_t):
    """Noise clean images to step t in one go.

    DDPM eq. (4): x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps

    x_0: (B, C, H, W) float, images in [-1, 1] or latents;  eps: like x_0, ~ N(0, 1);
    alpha_bar_t: (B, 1, 1, 1).  Returns like x_0, unbounded.
    """
    return alpha_bar_t**0.5 * x_0 + (1 - alpha_bar_t) ** 0.5 * eps


def target_of(prediction, x_0, eps, alpha_bar_t):
    """What the network learns to output, eps or v.

    v = sqrt(alpha_bar_t) * eps - sqrt(1 - alpha_bar_t) * x_0, Salimans & Ho 2022, section 4.
    Shapes as in q_sample.
    """
    if prediction == "eps":
        return eps
    return alpha_bar_t**0.5 * eps - (1 - alpha_bar_t) ** 0.5 * x_0


def predict_x_0_and_eps(output, x_t, prediction, alpha_bar_t, clip=False):
    """x_0_hat and eps_hat, the image and the noise that a network output stands for.

    eps   x_0_hat = (x_t - sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_bar_t)   DDPM (15)
    v     x_0_hat = sqrt(alpha_bar_t) * x_t - sqrt(1 - alpha_bar_t) * v       Salimans & Ho
    With clip, x_0_hat is limited to [-1, 1] and eps_hat is derived again: both still make up x_t.

    output, x_t: (B, C, H, W);  alpha_bar_t: a number in (0, 1), or (B, 1, 1, 1).
    """
    signal_t = alpha_bar_t**0.5
    noise_t = (1 - alpha_bar_t) ** 0.5
    if prediction == "eps":
        x_0_hat = (x_t - noise_t * output) / signal_t
        eps_hat = output
    else:
        x_0_hat = signal_t * x_t - noise_t * output
        eps_hat = signal_t * output + noise_t * x_t
    if clip:
        x_0_hat = x_0_hat.clip(-1, 1)
        eps_hat = (x_t - signal_t * x_0_hat) / noise_t
    return x_0_hat, eps_hat


def image_losses(output, target, loss):
    """The l2, l1 or huber (delta = 1) loss of each image, averaged over its values: (B,)."""
    function = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[loss]
    return function(output, target, reduction="none").flatten(1).mean(dim=1)


def draw_t(batch_size, num_timesteps, noise_levels, generator):
    """The timestep of each image of a batch: int64 (B,) in 0 ... T-1.

    uniform    all t equally likely, DDPM algorithm 1
    lognormal  t / T = 2 / pi * atan(sigma), ln sigma ~ N(-0.5, 1.2^2): fewer t of much noise and
               of next to none.  Karras et al. 2022 (arXiv:2206.00364), table 1, N(-1.2, 1.2^2) for
               data of std 0.5, which is this for std 1: that of latents; images have about 0.7.
               In the cosine schedule of 32 pixels sigma^2 is nearly (1 - alpha_bar_t) /
               alpha_bar_t; in others it is not.
    Stratified: one t from each of B equally likely ranges, less variance than B independent t.
    """
    u = torch.rand(batch_size, generator=generator, device=generator.device)
    u = (torch.arange(batch_size, device=generator.device) + u) / batch_size
    if noise_levels == "lognormal":
        normal = 2**0.5 * torch.erfinv(2 * u - 1)
        u = torch.atan(torch.exp(1.2 * normal - 0.5)) * 2 / math.pi
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)


# --- Sampling -------------------------------------------------------------------------------------


def walk_length(alpha_bars, prediction):
    """How many timesteps, from t = 0, a walk (sampling) covers: T, or fewer where eps is predicted.

    x_0_hat divides by sqrt(alpha_bar_t).  At the end of the cosine schedule, alpha_bar = 2.4e-9, an
    error of eps_hat would be amplified 20,000 times, so there a walk starts at the largest t whose
    alpha_bar is above 3e-5, where x_t is nearly pure noise.

    alpha_bars: (T,), falling.
    """
    if prediction == "eps":
        return int((alpha_bars > 3e-5).sum())
    return len(alpha_bars)


def time_pairs(num_timesteps, steps):
    """[(t, t_prev), ..., (t, -1)]: exactly `steps` pairs from t = T-1 down, closer near the image.

    t + 1 = T * (i / steps)^1.3 for i = steps ... 1, but at least i, so that all differ.  DDIM's
    appendix D.2 has the exponents 1 and 2; benchmarks/trials.py compares them.
    Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps {steps} is not in 1..{num_timesteps}")
    times = [max(int(num_timesteps * (i / steps) ** 1.3 + 0.5), i) - 1 for i in range(steps, 0, -1)]
    return list(zip(times, [*times[1:], -1], strict=True))


def guided_times(interval, num_timesteps):
    """The timesteps start <= t < stop at which guidance above 1 acts.

    Kynkäänniemi et al. 2024 (arXiv:2404.07724): at high t it costs variety, at low t it is hardly
    needed.  A step that is not guided takes one network evaluation, not two.

    interval: (low, high), fractions of T.  Raises InputError unless 0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"guidance interval {low} {high}: right is 0 <= LOW <= HIGH <= 1")
    return low * num_timesteps, high * num_timesteps


def guided(model, y, guidance, start=0, stop=math.inf):
    """denoise(x_t, t) -> output_u + guidance * (output_c - output_u), classifier-free guidance.

    Ho & Salimans 2022 eq. (6), whose w is guidance - 1: 0 is unconditional, 1 plain conditional;
    both take one pass.  Eq. (6) holds for v too, an affine function of eps at a given x_t.
    Guidance above 1 acts at start <= t < stop; at other t it counts as 1.

    y: int64 (B,);  start, stop: from guided_times.
    """
    null = torch.full_like(y, NULL_LABEL)

    def denoise(x_t, t):
        times = torch.full_like(y, t)
        if guidance == 0:
            return model(x_t, times, null)
        if guidance == 1 or (guidance > 1 and not start <= t < stop):
            return model(x_t, times, y)
        both = model(torch.cat([x_t, x_t]), times.repeat(2), torch.cat([null, y]))
        output_u, output_c = both.chunk(2)
        return output_u + guidance * (output_c - output_u)

    return denoise


def ddim_step(x_0_hat, eps_hat, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    """One reverse step, DDIM eq. (12), with sigma_t of eq. (16).

    eta: 0 is deterministic, 1 as noisy as DDPM;  noise: like x_0_hat, used where eta > 0;
    x_0_hat, eps_hat: (B, C, H, W);  alpha_bar_t < alpha_bar_prev <= 1: numbers.
    """
    beta_t = 1 - alpha_bar_t / alpha_bar_prev
    sigma_t = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t) ** 0.5
    direction = max(1 - alpha_bar_prev - sigma_t**2, 0.0) ** 0.5
    x_prev = alpha_bar_prev**0.5 * x_0_hat + direction * eps_hat
    return x_prev + sigma_t * noise if sigma_t > 0 else x_prev


def dpm_pairs(num_timesteps, steps):
    """Pairs like those of time_pairs, but closer near noise, too: for dpm_sample.

    t + 1 = T * 3 i^2 / (3 i^2 + (steps - i)^2) for i = steps ... 1, shifted so that all differ;
    in the cosine schedule nearer to even in log SNR, as DPM-Solver is (Lu et al. 2022,
    arXiv:2206.00927).  Brightness shows through much noise, so it is decided near T: there, 15
    steps of time_pairs are so few that a tenth to a quarter of its spread is lost.  Raises
    ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps {steps} is not in 1..{num_timesteps}")
    times = []
    for i in range(steps, 0, -1):
        noise, signal = 3 * i**2, (steps - i) ** 2
        rounded = (2 * num_timesteps * noise + noise + signal) // (2 * (noise + signal))
        times.append(max(min(rounded, num_timesteps - steps + i), i) - 1)
    return list(zip(times, [*times[1:], -1], strict=True))


def dpm_extrapolate(x_t, x_0_hat, alpha_bar_t, alpha_bar_prev, x_0_last, alpha_bar_last):
    """D and its noise: with them for x_0_hat and eps_hat, ddim_step is a step of second order.

    Lu et al. 2022 (arXiv:2211.01095) algorithm 2: D = x_0_hat + h / (2 h_last) * (x_0_hat -
    x_0_last), where h and h_last are this step and the one before, measured in lambda =
    log(alpha_bar / (1 - alpha_bar)) / 2.  The noise is such that x_t = sqrt(alpha_bar_t) * D +
    sqrt(1 - alpha_bar_t) * noise.

    x_t, x_0_hat, x_0_last: (B, C, H, W);  all alpha_bar: numbers in (0, 1).
    """
    lambda_last = math.log(alpha_bar_last / (1 - alpha_bar_last)) / 2
    lambda_t = math.log(alpha_bar_t / (1 - alpha_bar_t)) / 2
    lambda_prev = math.log(alpha_bar_prev / (1 - alpha_bar_prev)) / 2
    D = x_0_hat + (lambda_prev - lambda_t) / (lambda_t - lambda_last) / 2 * (x_0_hat - x_0_last)
    return D, (x_t - alpha_bar_t**0.5 * D) / (1 - alpha_bar_t) ** 0.5


def dpm_sample(denoise, x_T, alpha_bars, pairs, prediction, clip=True, trace=None, last=None):
    """Walk from noise to images by DPM-Solver++(2M), Lu et al. 2022 algorithm 2: for few steps.

    The first step is DDIM's, and so is one to x_0.  pairs: from dpm_pairs;  last: x_0_hat and
    alpha_bar of a step before these, if there was one;  rest as in ddim_sample.
    """
    x_t = x_T
    for t, t_prev in pairs:
        alpha_bar_t = alpha_bars[t].item()
        alpha_bar_prev = alpha_bars[t_prev].item() if t_prev >= 0 else 1.0
        x_0_hat, eps_hat = predict_x_0_and_eps(denoise(x_t, t), x_t, prediction, alpha_bar_t, clip)
        D, D_eps = x_0_hat, eps_hat
        if last is not None and t_prev >= 0:
            D, D_eps = dpm_extrapolate(x_t, x_0_hat, alpha_bar_t, alpha_bar_prev, *last)
        last = x_0_hat, alpha_bar_t
        x_prev = ddim_step(D, D_eps, alpha_bar_t, alpha_bar_prev)
        if trace is not None:
            trace.append((t, x_t, x_0_hat))
        x_t = x_prev
    if trace is not None:
        trace.append((-1, x_t, x_t))
    return x_t


def ddim_sample(
    denoise, x_T, alpha_bars, pairs, prediction, eta=0.0, clip=True, noise=None, trace=None
):
    """Walk from noise to images.

    denoise: (x_t, t) -> network output;  x_T: (B, C, H, W) ~ N(0, 1);  pairs: from time_pairs;
    alpha_bars: (T,);  prediction: eps or v;  noise: () -> N(0, 1) like x_T, where steps add it;
    trace: a list that gets (t, x_t, x_0_hat) of every step, and (-1, x_0, x_0) at the end.
    Returns x_0, like x_T, in [-1, 1] with clip.
    """
    x_t = x_T
    for t, t_prev in pairs:
        alpha_bar_t = alpha_bars[t].item()
        alpha_bar_prev = alpha_bars[t_prev].item() if t_prev >= 0 else 1.0
        x_0_hat, eps_hat = predict_x_0_and_eps(denoise(x_t, t), x_t, prediction, alpha_bar_t, clip)
        # DDIM eq. (12): noise enters where eta > 0
        step_noise = noise() if eta > 0 else None
        x_prev = ddim_step(x_0_hat, eps_hat, alpha_bar_t, alpha_bar_prev, eta, step_noise)
        if trace is not None:
            trace.append((t, x_t, x_0_hat))
        x_t = x_prev
    if trace is not None:
        trace.append((-1, x_t, x_t))
    return x_t


@torch.no_grad()
def sample(
    model, labels, *, config=None, steps=None, guidance=None, guidance_interval=GUIDANCE_INTERVAL,
    eta=0.0, clip=True, solver=SOLVER, seed=0, batch_size=100, trace=None,
):  # fmt: skip
    """Sample one image per label: (N, C, H, W) on the CPU, in [-1, 1] with clip.

    Image i depends on (seed, i), not on N.  model: from ema_network;  labels: a list, array or
    tensor of class names or indices;  config: None is model.config; for another network a dict of
    the flags schedule, num_timesteps, prediction, label_dropout, channels, image_size;
    steps, guidance: None is the default of --help;  guidance_interval: as in guided_times;
    trace: a list, for N <= batch_size;  the rest: as in the functions above.  Raises InputError.
    """
    check_options(steps=steps, guidance=guidance, guidance_interval=guidance_interval)
    check_options(seed=seed, batch_size=batch_size)
    config = config or model.config
    guidance = default_guidance(config) if guidance is None else guidance
    steps = min(STEPS, max_steps(config)) if steps is None else steps
    check_sampling(config, steps, guidance)
    check_options(eta=eta, solver=solver)
    if solver == "dpm++" and eta > 0:
        raise InputError(f"--eta {eta} is for --solver ddim: {solver} is deterministic")
    pairs_of = time_pairs if solver == "ddim" else dpm_pairs
    pairs = pairs_of(max_steps(config), steps)
    labels = torch.tensor(label_indices(labels, model.class_names))
    device = next(model.parameters()).device
    image_size = config.get("image_size", 32)
    shape = (config["channels"], image_size, image_size)
    alpha_bars = schedule_of(config)
    prediction = config["prediction"]
    interval = guided_times(guidance_interval, config["num_timesteps"])
    if guidance > 1 and not any(interval[0] <= t < interval[1] for t, _ in pairs):
        print(f"guidance {guidance:g} counts as 1: no step lies in --guidance-interval")
    images = []
    parts = torch.arange(len(labels)).split(batch_size)
    for part in tqdm(parts, unit="batch", disable=len(parts) == 1):
        streams = noise_streams(seed, part.tolist())

        def noise(streams=streams):
            return torch.from_numpy(next_noise(streams, shape)).to(device)

        denoise = guided(model, labels[part].to(device), guidance, *interval)
        x_T = noise()
        if solver == "ddim":
            x_0 = ddim_sample(denoise, x_T, alpha_bars, pairs, prediction, eta, clip, noise, trace)
        else:
            x_0 = dpm_sample(denoise, x_T, alpha_bars, pairs, prediction, clip, trace)
        images.append(x_0.cpu())
    return torch.cat(images)


def schedule_of(config):
    """alpha_bars, float64 (T,), of a checkpoint's config; one without image_size is of 32x32."""
    image_size = config.get("image_size", 32)
    return make_alpha_bars(config["schedule"], config["num_timesteps"], image_size)


def max_steps(config):
    """The largest number of sampling steps: one for each timestep of a walk."""
    alpha_bars = schedule_of(config)
    return walk_length(alpha_bars, config["prediction"])


def default_guidance(config):
    """The default: GUIDANCE, but 1 if training never dropped a label and 0 if it always did."""
    if config["label_dropout"] == 0:
        return 1.0
    if config["label_dropout"] == 1:
        return 0.0
    return GUIDANCE


def check_sampling(config, steps, guidance):
    """Raise InputError for a guidance or number of steps that the training does not allow."""
    only = default_guidance(config)
    if config["label_dropout"] in (0, 1) and guidance != only:
        raise InputError(f"the label dropout of the training leaves only --guidance {only}")
    if steps > max_steps(config):
        raise InputError(
            f"--steps {steps} is more than the {max_steps(config)} timesteps of a walk"
        )


def ema_network(checkpoint, device):
    """The network with the averaged weights of a checkpoint, ready to sample."""
    model = UNet(**checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    model.config = checkpoint["config"]
    model.class_names = checkpoint["class_names"]
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# --- Training -------------------------------------------------------------------------------------
# From here on runs.py helps; cut above this line to use the model with a trainer of your own.

from runs import (  # noqa: E402
    LOG_EVERY, RUN_FLAGS, Muon, Run, autocast, errors_in_one_line, learning_rate,
    load_run_data, number, open_checkpoint, optimisation_flags, parallel, parse_run, pick_device,
    power_ema, read_start, run_parser, save_samples, training_device, whole_numbers,
)  # fmt: skip


def train(args, checkpoint=None):
    """Train, or resume from a checkpoint, until --epochs or --minutes are over.

    Returns the exit code.
    """
    device = training_device(args)
    torch.manual_seed(args.seed)  # for the initial weights
    data = load_run_data(args, checkpoint)
    images = data.images.to(device)
    labels = data.labels.to(device)
    args.widths = args.widths or WIDTHS[args.image_size]
    args.depths = args.depths or (1,) * (len(args.widths) - 1) + (3,)
    if args.image_size % (args.patch * 2 ** (len(args.widths) - 1)):
        raise InputError(
            f"--patch {args.patch} and {len(args.widths)} --widths do not divide "
            f"{args.image_size} pixels"
        )

    # The network, its optimiser, and the average of its weights that samples come from.
    keys = ("channels", "widths", "depths", "patch", "attention", "emb_channels")
    network = {key: getattr(args, key) for key in keys}
    network["num_classes"] = len(data.class_names)
    model = UNet(**network).to(device, memory_format=torch.channels_last)
    if args.start and not checkpoint:
        # Of other classes, start has no class table: the new one stays.
        start = read_start(args, SAMPLES_FROM, FITTING, data.class_names)
        model.load_state_dict({**model.state_dict(), **start["ema"]})
    alpha_bars = schedule_of(vars(args)).float().to(device)
    forward = parallel(torch.compile(model) if args.compile else model)
    optimizer_class = {"muon": Muon, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[
        args.optimizer
    ]
    fused = device.type != "mps"
    named = model.named_parameters()
    optimizer = optimizer_class(named, args.lr, weight_decay=args.weight_decay, fused=fused)
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()
    by_tenth = torch.zeros(2, 10, device=device)  # by tenth of t: the loss, and that of output 0
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["position"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        by_tenth.copy_(torch.tensor(checkpoint["by_tenth"]))
    precision = autocast(device, args.bf16)
    run = Run(NAME, args, data, checkpoint)
    config = {key: getattr(args, key) for key in FIXED + FREE}
    grid_labels = torch.arange(min(10, len(data.class_names))).repeat_interleave(8)

    def save():
        grid = sample(
            model=ema_model.module, config=config, labels=grid_labels,
            steps=min(GRID_STEPS, max_steps(config)),
        )  # fmt: skip
        state = {
            "config": config, "network": network, "class_names": data.class_names,
            "data": data.fingerprint, "weights": model.state_dict(),
            "ema": ema_model.module.state_dict(), "optimizer": optimizer.state_dict(),
            "by_tenth": by_tenth.tolist(),
        }  # fmt: skip
        run.save(state, grid, grid_labels)

    size = sum(p.numel() for p in model.parameters())
    print(f"run {run} on {device}, {size:,} parameters", flush=True)
    generator = torch.Generator(device)
    with run:
        for step in run.steps(save):
            # The rate ends at 0 just when the run does, whether that is by epochs or by minutes.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step, run.progress)

            # Whatever is random depends on (seed, step) alone: a resumed run repeats it exactly.
            # It is drawn for the whole batch, of which each process takes its part.
            run.seed(generator)
            batch = run.batch().to(device)
            t = draw_t(len(batch), args.num_timesteps, args.noise_levels, generator)
            eps = torch.randn(len(batch), *images.shape[1:], generator=generator, device=device)
            dropped = torch.rand(len(batch), generator=generator, device=device)
            batch, t, eps, dropped = run.shard(batch, t, eps, dropped)

            # Some labels are hidden, so that one network learns both terms of the guidance.
            x_0 = to_float(images[batch])
            y = torch.where(dropped < args.label_dropout, NULL_LABEL, labels[batch])

            # DDPM algorithm 1: noise the images, and learn to tell the noise (or v) from them.
            alpha_bar_t = alpha_bars[t].view(-1, 1, 1, 1)
            x_t = q_sample(x_0, eps, alpha_bar_t)
            target = target_of(args.prediction, x_0, eps, alpha_bar_t)
            with precision:
                output = forward(x_t, t, y)
            losses = image_losses(output.float(), target, args.loss)
            loss = losses.mean()

            # Clipping bounds what one bad batch can do; a loss that is not finite ends the run.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            run.watch(loss=loss.item(), gradient=grad_norm.item())
            optimizer.step()
            ema_model.update_parameters(model)

            # Where in t does it learn?  A ratio near 1 means no better than the output 0.
            losses_of_zero = image_losses(torch.zeros_like(target), target, args.loss)
            both = torch.stack([losses.detach(), losses_of_zero])
            tenths = t * 10 // args.num_timesteps
            sums = torch.zeros_like(by_tenth).index_add_(1, tenths, both)
            by_tenth += run.mean(sums / len(t))
            if (step + 1) % LOG_EVERY == 0:
                ratios = [a / b if b else None for a, b in by_tenth.T.tolist()]
                run.log({
                    "loss": by_tenth[0].sum().item() / LOG_EVERY,
                    "loss_by_tenth_of_t": ratios,
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
                })  # fmt: skip
                by_tenth.zero_()
    return run.end()


# --- Run state ------------------------------------------------------------------------------------

# The flags that make a run what it is, and those that may change when it is resumed.
FIXED = (
    "start", "hold_out", "flip", "background", "image_size", "channels", "widths", "depths",
    "patch", "attention", "emb_channels", "num_timesteps", "schedule", "prediction",
    "noise_levels", "loss", "label_dropout", "optimizer", "weight_decay", "ema_length", "seed",
)  # fmt: skip
FREE = (*RUN_FLAGS, "lr", "warmup", "grad_clip", "bf16", "compile")
# The flags that must be as in the run of --start.
FITTING = (
    "image_size", "channels", "widths", "depths", "patch", "attention", "emb_channels",
    "num_timesteps", "schedule", "prediction",
)  # fmt: skip

# --- Command line ---------------------------------------------------------------------------------


def sampling_flags(parser):
    """Add the flags of a walk, which explore.py has too."""
    # fmt: off
    add = parser.add_argument_group("sampling").add_argument
    add("--guidance", type=number(float, 0, 1000),
        help="guidance weight, 0 to 1000: 0 ignores the class, 1 is conditional, above 1 guided "
             f"(1 or 0 where labels were dropped never or always, else {GUIDANCE:g})")
    low, high = GUIDANCE_INTERVAL
    add("--guidance-interval", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
        default=GUIDANCE_INTERVAL,
        help="guidance above 1 acts only at LOW T <= t < HIGH T, T the training timesteps "
             f"({low} {high})")
    add("--steps", type=number(int, 1),
        help="number of sampling steps, 1 to the number of training timesteps, or to some fewer "
             f"where the network predicts eps ({STEPS})")
    add("--solver", choices=("ddim", "dpm++"), default=SOLVER,
        help=f"sampler: ddim, or dpm++, of second order, for few steps ({SOLVER})")
    add("--eta", type=number(float, 0, 1), default=0.0,
        help="noise added in each step of --solver ddim, from 0, deterministic, to 1, as in DDPM "
             "(0)")
    add("--clip", action=argparse.BooleanOptionalAction, default=True,
        help="limit x_0_hat to [-1, 1] (on)")
    # fmt: on


def build_parser():
    on_off = argparse.BooleanOptionalAction
    parser = run_parser(NAME, __doc__)
    # fmt: off
    network = "network; on a GPU try --patch 1 --widths 64,128,256 --depths 2,2,4"
    add = parser.add_argument_group(network).add_argument
    add("--widths", type=whole_numbers,
        help="channels at each resolution, finest first (32,96, for 64 pixels 32,64,96, for 128 "
             "32,32,64,96)")
    add("--depths", type=whole_numbers,
        help="residual blocks at each resolution (1 at each, 3 at the last)")
    add("--patch", type=int, choices=(1, 2, 4), default=2,
        help="side of the squares of pixels that become channels at the input (2)")
    add("--attention", action=on_off, default=True,
        help="self-attention at the lowest resolution (on)")
    add("--emb-channels", type=number(int, 4), default=128,
        help="size of the time and class embedding, a multiple of 4 (128)")
    add = parser.add_argument_group("method").add_argument
    add("--num-timesteps", type=number(int, 2, 10_000), default=1000,
        help="number of timesteps T in training, 2 to 10,000 (1000)")
    add("--schedule", choices=("linear", "quadratic", "cosine"), default="cosine",
        help="noise schedule (cosine)")
    add("--prediction", choices=("eps", "v"), default="v",
        help="what the network predicts, the noise or v (v)")
    add("--noise-levels", choices=("uniform", "lognormal"), default="lognormal",
        help="which timesteps are trained: all alike, or fewer at both ends (lognormal)")
    add("--loss", choices=("l2", "l1", "huber"), default="l2",
        help="distance between prediction and target (l2)")
    add("--label-dropout", type=number(float, 0, 1), default=0.1,
        help="fraction of labels dropped in training, for guidance, 0 to 1 (0.1)")
    add = optimisation_flags(parser, lr=5e-3)
    add("--optimizer", choices=("muon", "adamw", "adam"), default="muon",
        help="optimiser; muon uses AdamW for first and last layer, embedding, vectors; adam adds "
             "--weight-decay to the gradient, not decoupled (muon)")
    # fmt: on
    sampling_flags(parser)
    return parser


def draw(args):
    """Sample from a checkpoint and write the images."""
    opened = open_checkpoint(args, NAME, SAMPLES_FROM)
    _, checkpoint, classes, _ = opened
    config = checkpoint["config"]
    guidance = default_guidance(config) if args.guidance is None else args.guidance
    if guidance <= 1 and "guidance_interval" in args.typed:
        raise InputError("--guidance-interval is for a guidance above 1: leave it out")
    steps = min(STEPS, max_steps(config)) if args.steps is None else args.steps
    labels = torch.tensor(classes).repeat_interleave(args.num_samples)
    model = ema_network(checkpoint, pick_device(args.device))
    options = {key: getattr(args, key) for key in (*SAMPLER_FLAGS, "seed")}
    options = {"steps": steps, "guidance": guidance, **options}
    images = sample(model=model, labels=labels, batch_size=args.batch_size, **options)
    save_samples(args, NAME, opened, images, labels, options)
    return 0


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args, checkpoint = parse_run(parser, argv, (NAME,), FIXED, FREE)
        return train(args, checkpoint) if args.train or args.resume else draw(args)


if __name__ == "__main__":
    sys.exit(main())
