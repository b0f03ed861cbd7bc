"""GAN: generative adversarial network, class-conditional and convolutional, in one file (with common.py).

Ian Goodfellow et al., "Generative Adversarial Networks", 2014 (arXiv:1406.2661).  With softplus(h) = log(1 + exp(h)):

    minmax         loss_d = softplus(-real) + softplus(fake),  loss_g = -softplus(fake)               eq. (1)
    nonsaturating  the same loss_d,  loss_g = softplus(-fake)                                         section 3
    relativistic   loss_d = softplus(fake - real),  loss_g = softplus(real - fake)
    hinge          loss_d = relu(1 - real) + relu(1 + fake),  loss_g = -fake,  spectrally normalised
    R1             gamma / 2 * E || gradient of the logit with respect to a real image ||^2, with nonsaturating
    R1 + R2        the same at real and at fake images, with relativistic

    python gan.py --train --epochs 50              train on Fashion-MNIST
    python gan.py --class Sneaker                  draw a Sneaker with the newest weights

Differs from the paper: class labels in a projection discriminator (Miyato & Koyama 2018, arXiv:1802.05637), residual
convolutions, no batch norm, the R1 penalty (Mescheder et al. 2018, arXiv:1801.04406), on every n-th step alone (Karras
et al. 2019, arXiv:1912.04958), no momentum, an annealed learning rate, and an EMA of the generator whose length is a
share of the run (Karras et al. 2024, arXiv:2312.02696).  The losses of later papers: hinge (Miyato et al. 2018,
arXiv:1802.05957), relativistic (Jolicoeur-Martineau 2018, arXiv:1807.00734; with both penalties: Huang et al. 2024,
arXiv:2501.05441).
"""

import argparse
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common import (
    IMAGE_SIZE,
    LOG_EVERY,
    RUN_FLAGS,
    ResidualBlock,
    Run,
    autocast,
    check_frames,
    draw_noise,
)
from common import (
    errors_in_one_line,
    find_checkpoint,
    group_norm,
    load_checkpoint,
    load_run_data,
    noise_streams,
)
from common import (
    number,
    parallel,
    parse_classes,
    parse_run,
    pick_device,
    run_parser,
    sampled_file,
    save_images,
)
from common import save_sampled, to_float, training_device, whole_numbers

NAME = "gan"
SAMPLES_FROM = ("gan",)  # the scripts whose checkpoints this one draws from
LOSSES = ("relativistic", "nonsaturating", "hinge", "minmax")

# --- Model ------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """(z, classes) -> images (B, channels, 32, 32) in [-1, 1].

    z: (B, latent_dim) ~ N(0, 1);  classes: (B, num_classes), one-hot rows, or shares of several classes;
    widths: channels at 16x16 (2x2 pixels are channels until the end), 8x8, ..., at most five.
    """

    def __init__(self, channels, num_classes, latent_dim, widths, emb_channels):
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.bottom = IMAGE_SIZE // 2 ** len(widths)
        self.latent = nn.Sequential(
            nn.Linear(latent_dim, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label = nn.Linear(num_classes, emb_channels, bias=False)
        self.start = nn.Linear(latent_dim + emb_channels, widths[-1] * self.bottom**2)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, width, emb_channels) for width in reversed(widths)
        )
        steps = itertools.pairwise(reversed(widths))
        self.up = nn.ModuleList([nn.Identity()] + [nn.Conv2d(a, 4 * b, 1) for a, b in steps])
        self.norm = group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)

    def forward(self, z, classes):
        emb = F.silu(self.latent(z) + self.label(classes))
        h = self.start(torch.cat([z, emb], dim=1)).unflatten(1, (-1, self.bottom, self.bottom))
        for i, (block, up) in enumerate(zip(self.blocks, self.up, strict=True)):
            h = block(F.pixel_shuffle(up(h), 2) if i else h, emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2).tanh()


class PlainBlock(nn.Module):
    """x + f(x) without a norm, then half the size and out_channels, unless these are None.

    f starts small, unless conv2 is spectrally normalised, which undoes any scale.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2.weight.data.mul_(0.1)
        self.down = (
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
            if out_channels
            else nn.Identity()
        )

    def forward(self, x):
        h = self.conv1(F.leaky_relu(x, 0.2))
        return self.down(x + self.conv2(F.leaky_relu(h, 0.2)))


class Discriminator(nn.Module):
    """(x, classes) -> logits (B,): how real x is, as an image of its class.

    Projection discriminator, Miyato & Koyama eq. (4): logit = <out, h(x)> + <row of the class, h(x)>, the latter here
    divided by the square root of h's length.  widths: channels at 16x16, 8x8, ....  With spectral, every layer is
    spectrally normalised (Miyato et al. 2018, arXiv:1802.05957).
    """

    def __init__(self, channels, num_classes, widths, spectral):
        super().__init__()
        bottom = IMAGE_SIZE // 2 ** len(widths)
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(
            *(PlainBlock(a, b) for a, b in itertools.pairwise([*widths, None]))
        )
        self.features = nn.Linear(widths[-1] * bottom**2, 128)
        self.out = nn.Linear(128, 1)
        self.label = nn.Linear(num_classes, 128, bias=False)
        for layer in (
            [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)] if spectral else []
        ):
            spectral_norm(layer)

    def forward(self, x, classes):
        h = self.blocks(self.stem(F.pixel_unshuffle(x, 2)))
        h = F.leaky_relu(self.features(F.leaky_relu(h, 0.2).flatten(1)), 0.2)
        return self.out(h)[:, 0] + (self.label(classes) * h).sum(dim=1) / h.shape[1] ** 0.5


# --- Method -----------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits, fake_logits, loss):
    """What the discriminator minimises, as at the top of this file: logits (B,) -> a number.

    hinge: max(0, 1 - real) + max(0, 1 + fake), Miyato et al. 2018 eq. (16).
    """
    if loss == "relativistic":
        return F.softplus(fake_logits - real_logits).mean()
    if loss == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(real_logits, fake_logits, loss):
    """What the generator minimises, as at the top of this file: logits (B,) -> a number.

    hinge: -fake, Miyato et al. 2018 eq. (17).  Only relativistic has a use for real_logits.
    """
    if loss == "relativistic":
        return F.softplus(real_logits - fake_logits).mean()
    if loss == "hinge":
        return -fake_logits.mean()
    return -F.softplus(fake_logits).mean() if loss == "minmax" else F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator, x, classes):
    """E || d logit / d x ||^2 at real images x (R1) or fake ones (R2), Mescheder et al. 2018 eq. (9) and (10)."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(x, classes).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


def class_diversity(grid, labels, data, warn):
    """The diversity of each class in a grid of samples, against its first 100 real images; low ones said in words."""
    found = {}
    for y in labels.unique().tolist():
        reals = to_float(data.images[data.labels == y][:100])
        if len(reals) > 1:
            found[data.class_names[y]] = diversity(grid[labels == y], reals)
    collapsed = [f"{name} ({value:.2f})" for name, value in found.items() if value < 0.4]
    if collapsed and warn:
        tqdm.write(
            f"collapse: samples are nearly the same picture, compared with real ones, of {', '.join(collapsed)}"
        )
    return found


def diversity(samples, reals):
    """Mean distance of two different samples over that of two different real images: 1 is as varied, 0 collapsed.

    samples: (N, C, H, W), reals: (M, C, H, W), of one class.
    """
    return (torch.pdist(samples.flatten(1)).mean() / torch.pdist(reals.flatten(1)).mean()).item()


# --- Sampling ---------------------------------------------------------------------------------------------------


def draw_codes(prior, labels, streams, latent_dim, truncation=None):
    """One latent code for each image: float32 (N, D).

    prior: None for N(0, 1), else of each class y a mixture: component k with the probability weights[y, k], then
    means[y, k] + L @ noise, scales[y, k] being the lower triangle of L, row by row;  labels: list of int;  streams: as
    draw_noise takes them;  truncation: redraw noise beyond +- so much (BigGAN, Brock et al. 2018, section 3.1).
    """
    codes = draw_noise(streams, (latent_dim,))
    while truncation and (beyond := np.abs(codes) > truncation).any():
        rows = np.flatnonzero(beyond.any(axis=1))  # or the others' streams would go on with them
        again = draw_noise([streams[i] for i in rows], (latent_dim,))
        codes[rows] = np.where(beyond[rows], again, codes[rows])
    if prior is not None:
        factor, lower = np.zeros((latent_dim, latent_dim), np.float32), np.tril_indices(latent_dim)
        for i, (y, stream) in enumerate(zip(labels, streams, strict=True)):
            k = int((stream.random() >= np.cumsum(prior["weights"][y])[:-1]).sum())
            factor[lower] = prior["scales"][y][k]
            codes[i] = prior["means"][y][k] + factor @ codes[i]
    return codes


def one_hot(labels, num_classes):
    """int64 (B,) -> float (B, num_classes)."""
    return F.one_hot(labels, num_classes).float()


def between(a, b, weight):
    """On the straight line from noise a to b (1, D), but as long as noise is: weight (B, 1) -> (B, D)."""
    z = torch.lerp(a, b, weight)
    return z / z.norm(dim=1, keepdim=True) * torch.lerp(a.norm(), b.norm(), weight)


@torch.no_grad()
def generate(model, z, classes, batch_size=100):
    """Images (N, C, 32, 32) in [-1, 1] of codes (N, D), on the CPU. classes: (N, num_classes), as in Generator."""
    device = next(model.parameters()).device
    pairs = zip(z.split(batch_size), classes.split(batch_size), strict=True)
    return torch.cat([model(z.to(device), c.to(device)).cpu() for z, c in pairs])


def sample(*, model, labels, truncation=None, seed=0, batch_size=100):
    """Draw one image for each label: (N, C, 32, 32) in [-1, 1] on the CPU.  Image i depends on (seed, i), not on N.

    labels: int64 (N,);  truncation: as in draw_codes.
    """
    streams = noise_streams(seed, range(len(labels)))
    z = torch.from_numpy(draw_codes(None, labels.tolist(), streams, model.latent_dim, truncation))
    return generate(model, z, one_hot(labels, model.num_classes), batch_size)


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
    num_classes = len(data.class_names)
    network = {k: getattr(args, k) for k in ("channels", "latent_dim", "widths", "emb_channels")}
    network["num_classes"] = num_classes
    generator = Generator(**network).to(device, memory_format=torch.channels_last)
    discriminator = Discriminator(args.channels, num_classes, args.widths_d, args.loss == "hinge")
    discriminator.to(device, memory_format=torch.channels_last)
    fused = device.type != "mps"
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.0, 0.99), fused=fused)
    optimizer_d = torch.optim.Adam(
        discriminator.parameters(), args.lr, betas=(0.0, 0.99), fused=fused
    )
    ema_model = AveragedModel(generator, multi_avg_fn=power_ema(args.ema_length)).eval()
    sums = torch.zeros(
        4, device=device
    )  # of loss_g, loss_d, real and fake logits since the last line of the log
    penalty = torch.zeros((), device=device)  # the last one
    if checkpoint:
        generator.load_state_dict(checkpoint["weights"])
        discriminator.load_state_dict(checkpoint["discriminator"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["step"])
        optimizer_g.load_state_dict(checkpoint["optimizer"])
        optimizer_d.load_state_dict(checkpoint["optimizer_d"])
        sums.copy_(torch.tensor(checkpoint["sums"]))
        penalty.fill_(checkpoint["penalty"])
    forward_g, forward_d = parallel(generator), parallel(discriminator)
    run = Run(NAME, args, len(images), checkpoint)
    config = {k: getattr(args, k) for k in FIXED + FREE}
    grid_labels = torch.arange(min(10, num_classes)).repeat_interleave(8)

    @run.by_the_first
    def save():
        grid = sample(model=ema_model.module, labels=grid_labels)
        run.check_finite(samples=grid.abs().max().item())
        save_images(grid, grid_labels.tolist(), data.class_names, run.picture(), columns=8)
        run.log({"diversity": class_diversity(grid, grid_labels, data, warn=run.step > 0)})
        run.save({
            "config": config, "network": network, "class_names": data.class_names, "weights": generator.state_dict(),
            "discriminator": discriminator.state_dict(), "ema": ema_model.module.state_dict(),
            "optimizer": optimizer_g.state_dict(), "optimizer_d": optimizer_d.state_dict(), "sums": sums.tolist(),
            "penalty": penalty.item(),
        })  # fmt: skip

    sizes = [
        f"{sum(p.numel() for p in model.parameters()):,}" for model in (generator, discriminator)
    ]
    print(
        f"run {run.folder} on {device}, {sizes[0]} parameters, discriminator {sizes[1]}", flush=True
    )
    dice = torch.Generator(device)
    with run.under_way() as bar:
        if not checkpoint:
            save()  # from now on there is a run to go on with
        while (done := run.agree()) < 1 and not run.stopped:
            for group in optimizer_g.param_groups + optimizer_d.param_groups:
                group["lr"] = learning_rate(args, run.step, done)
            run.seed(dice)
            batch = run.batch().to(device)
            z_d, z_g = torch.randn(2, len(batch), args.latent_dim, generator=dice, device=device)
            batch, z_d, z_g = run.own(batch, z_d, z_g)
            x, classes = to_float(images[batch]), one_hot(labels[batch], num_classes)

            with autocast(device, args.bf16):
                with torch.no_grad():
                    fake = generator(z_d, classes)
                real_and_fake = forward_d(torch.cat([x, fake]), classes.repeat(2, 1))
            real_logits, fake_logits = real_and_fake.float().chunk(2)
            loss_d = discriminator_loss(real_logits, fake_logits, args.loss)
            loss = loss_d
            if (
                args.gamma
                and run.step % args.penalty_every == 0
                and args.loss in ("relativistic", "nonsaturating")
            ):
                penalty = gradient_penalty(discriminator, x, classes)  # R1
                if args.loss == "relativistic":
                    penalty = penalty + gradient_penalty(discriminator, fake.float(), classes)  # R2
                loss = loss_d + args.gamma / 2 * args.penalty_every * penalty
                penalty = run.mean(penalty.detach())
            optimizer_d.zero_grad(set_to_none=True)
            loss.backward()
            optimizer_d.step()

            discriminator.requires_grad_(False)
            with autocast(device, args.bf16):
                fake_logits_g = discriminator(forward_g(z_g, classes), classes).float()
                with torch.no_grad():
                    real_logits_g = (
                        discriminator(x, classes).float() if args.loss == "relativistic" else None
                    )
            loss_g = generator_loss(real_logits_g, fake_logits_g, args.loss)
            optimizer_g.zero_grad(set_to_none=True)
            loss_g.backward()
            optimizer_g.step()
            discriminator.requires_grad_(True)
            run.check_finite(loss_g=loss_g.item(), loss_d=loss.item())
            if run.rank == 0:
                ema_model.update_parameters(generator)
            run.step += 1

            sums += run.mean(
                torch.stack([loss_g, loss_d, real_logits.mean(), fake_logits.mean()]).detach()
            )
            run.show(bar, f"G {loss_g.item():.3f}, D {loss_d.item():.3f}")
            if run.step % LOG_EVERY == 0:
                names = ("loss_g", "loss_d", "real_logits", "fake_logits")
                means = dict(zip(names, (sums / LOG_EVERY).tolist(), strict=True))
                run.log(
                    {**means, "penalty": penalty.item(), "lr": optimizer_g.param_groups[0]["lr"]}
                )
                sums.zero_()
            if run.save_due():
                save()
        save()
    return run.end()


# --- Run state --------------------------------------------------------------------------------------------------

# The flags that make a run what it is, and those that may change when it goes on.
FIXED = (
    "data", "channels", "latent_dim", "widths", "widths_d", "emb_channels", "loss", "gamma", "penalty_every",
    "batch_size", "ema_length", "seed",
)  # fmt: skip
FREE = (*RUN_FLAGS, "lr", "warmup", "bf16")


def ema_network(checkpoint, device):
    """The generator with the averaged weights of a checkpoint, ready to sample."""
    model = Generator(**checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# --- Command line -----------------------------------------------------------------------------------------------


def build_parser():
    on_off = argparse.BooleanOptionalAction
    parser = run_parser(NAME, __doc__)
    add = parser.add_argument_group("network").add_argument
    add("--latent-dim", type=number(int, 1, 4096), default=64, help="numbers in a latent code (64)")
    add(
        "--widths",
        type=whole_numbers,
        default=(32, 64, 128),
        help="channels by resolution, finest first (32,64,128)",
    )
    add(
        "--widths-d",
        type=whole_numbers,
        default=(32, 64, 128),
        help="the same of the discriminator (32,64,128)",
    )
    add(
        "--emb-channels",
        type=number(int, 4),
        default=128,
        help="size of the code and class embedding (128)",
    )
    add = parser.add_argument_group("method").add_argument
    add(
        "--loss",
        choices=LOSSES,
        default="nonsaturating",
        help="see the top of this help (nonsaturating)",
    )
    add(
        "--gamma",
        type=number(float, 0),
        default=1.0,
        help="weight of R1 (nonsaturating), R1 + R2 (relativistic) (1)",
    )
    add(
        "--penalty-every",
        type=number(int, 1),
        default=8,
        help="steps between penalties, which then count as many (8)",
    )
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--lr",
        type=number(float, 0, above=True),
        default=1e-3,
        help="learning rate after the warm-up (0.001)",
    )
    add(
        "--warmup",
        type=number(int, 0),
        default=200,
        help="steps up to the full learning rate (200)",
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
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--truncation",
        type=number(float, 0.1),
        help="redraw noise beyond +- this: less variety, fewer failures",
    )
    add(
        "--interpolate",
        choices=("noise", "class"),
        help="between two noises of a class, or two classes of a noise",
    )
    return parser


def draw(args):
    """Sample from a checkpoint and write what was asked for."""
    path = find_checkpoint((NAME,), args.checkpoint, SAMPLES_FROM)
    checkpoint = load_checkpoint(path, SAMPLES_FROM)
    names = checkpoint["class_names"]
    classes, count = parse_classes(args.class_, names), args.num_samples
    output = sampled_file(args.output, NAME, classes, names, [".png", ".npz", ".gif", ""])
    check_frames(args.interpolate, classes, count)
    model = ema_network(checkpoint, pick_device(args.device))
    labels = torch.tensor(classes).repeat_interleave(count)
    if args.interpolate:
        weight, streams = torch.linspace(0, 1, count)[:, None], noise_streams(args.seed, [0, 1])
        a, b = torch.from_numpy(
            draw_codes(None, [0, 0], streams, model.latent_dim, args.truncation)
        ).split(1)
        if args.interpolate == "noise":
            z, hot = between(a, b, weight).repeat(len(classes), 1), one_hot(labels, len(names))
        else:
            first, last = one_hot(torch.tensor(classes), len(names)).split(1)
            z, hot, labels = a.expand(count, -1), torch.lerp(first, last, weight), labels[:count]
        images = generate(model, z, hot, args.batch_size)
    else:
        images = sample(
            model=model,
            labels=labels,
            truncation=args.truncation,
            seed=args.seed,
            batch_size=args.batch_size,
        )
    save_sampled(images, labels, names, output, count)
    print(f"wrote {output} (weights: {path})")
    return 0


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args, checkpoint = parse_run(parser, argv, (NAME,), FIXED)
        return train(args, checkpoint) if args.train or args.resume else draw(args)


if __name__ == "__main__":
    sys.exit(main())
