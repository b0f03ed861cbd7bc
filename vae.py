"""VAE: variational autoencoder, class-conditional and convolutional, in one file (with common.py).

Diederik Kingma, Max Welling, "Auto-Encoding Variational Bayes", 2013 (arXiv:1312.6114).

    encoder     q(z | x, y) = N(mu, exp(logvar))                                                     eq. (9)
    z           mu + exp(logvar / 2) * eps,  eps ~ N(0, 1)                                           eq. (10)
    kl          1/2 * sum(mu^2 + exp(logvar) - 1 - logvar)                                           appendix B
    loss        E[ -log p(x | z, y) + kl_weight * kl ],  both summed over an image, averaged over the batch

    python vae.py --train --epochs 50              train on Fashion-MNIST
    python vae.py --class Sneaker                  draw a Sneaker with the newest weights

Differs from the paper: class labels for encoder and decoder (Kingma et al. 2014, arXiv:1406.5298), residual
convolutions, a Gaussian p(x | z) whose scale is learned (sigma-VAE, Rybkin et al. 2020, arXiv:2006.13202), a KL weight
that grows from 0 and stays below 1 (Alemi et al. 2018, arXiv:1711.00464), AdamW with an annealed learning rate,
gradient clipping, an EMA whose length is a share of the run (Karras et al. 2024, arXiv:2312.02696), and a prior fitted
after the training: for each class a Gaussian mixture over the codes of its images, which are not as normal as the KL
asks for (Ghosh et al. 2019, arXiv:1903.12436).
"""

import argparse
import itertools
import math
import sys
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common import (
    IMAGE_SIZE,
    LOG_EVERY,
    RUN_FLAGS,
    InputError,
    ResidualBlock,
    Run,
    at_most_one,
    autocast,
    check_frames,
)
from common import (
    draw_noise,
    errors_in_one_line,
    find_checkpoint,
    given_images,
    grey_level_error,
    group_norm,
)
from common import (
    in_the_plane,
    load_checkpoint,
    load_data,
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
    save_map,
    save_sampled,
)
from common import spread, to_float, to_uint8, training_device, whole_numbers


NAME = "vae"
SAMPLES_FROM = ("vae",)  # the scripts whose checkpoints this one draws from

# --- Model ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """(x, classes) -> (mu, logvar) of q(z | x, y).

    x: (B, channels, 32, 32) in [-1, 1];  classes: (B, num_classes), one-hot rows, or shares of several classes;
    mu, logvar: (B, latent_dim).  widths: channels at 16x16 (2x2 pixels become channels first), 8x8, ..., at most five.
    """

    def __init__(self, channels, num_classes, latent_dim, widths, emb_channels):
        super().__init__()
        self.label = nn.Linear(num_classes, emb_channels, bias=False)
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, width, emb_channels) for width in widths)
        steps = itertools.pairwise(widths)
        self.down = nn.ModuleList(
            [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in steps] + [nn.Identity()]
        )
        self.norm = group_norm(widths[-1])
        self.head = nn.Linear(widths[-1] * (IMAGE_SIZE // 2 ** len(widths)) ** 2, 2 * latent_dim)

    def forward(self, x, classes):
        emb = F.silu(self.label(classes))
        h = self.stem(F.pixel_unshuffle(x, 2))
        for block, down in zip(self.blocks, self.down, strict=True):
            h = down(block(h, emb))
        mu, logvar = self.head(F.silu(self.norm(h)).flatten(1)).chunk(2, dim=1)
        return mu, logvar.clamp(-20, 10)  # exp() of more would overflow in a bad step


class Decoder(nn.Module):
    """(z, classes) -> logits (B, channels, 32, 32), whose tanh is the image. Arguments as in Encoder."""

    def __init__(self, channels, num_classes, latent_dim, widths, emb_channels):
        super().__init__()
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
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)


class VAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self, **network):
        super().__init__()
        self.latent_dim, self.num_classes = network["latent_dim"], network["num_classes"]
        self.encoder, self.decoder = Encoder(**network), Decoder(**network)

    def forward(self, x, classes, eps):
        mu, logvar = self.encoder(x, classes)
        return self.decoder(reparameterise(mu, logvar, eps), classes), mu, logvar


# --- Method -----------------------------------------------------------------------------------------------------


def reparameterise(mu, logvar, eps):
    """z = mu + sigma * eps, Kingma & Welling eq. (10): a sample of q(z | x) that lets gradients through; one shape."""
    return mu + torch.exp(0.5 * logvar) * eps


def kl_divergence(mu, logvar):
    """KL(q(z | x) || N(0, 1)) of each image in nats, Kingma & Welling appendix B: mu, logvar (B, D) -> (B,)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)


def reconstruction_loss(logits, x, kind, mean=lambda number: number):
    """-log p(x | z) of each image, summed over its values, less what is constant: (B,).

    l2 and l1     Gaussian and Laplace of scale 1: (x - x_hat)^2 / 2 and |x - x_hat|, x_hat = tanh(logits)
    sigma         Gaussian of the scale that the batch asks for (optimal sigma-VAE, section 3.3): sigma^2 is its mean
                  (x - x_hat)^2, and the loss (x - x_hat)^2 / (2 sigma^2) + log sigma
    bce           Bernoulli with the mean (x_hat + 1) / 2 for values (x + 1) / 2
    mean: over all parts of the batch, of a number of this part.
    """
    if kind == "bce":  # (tanh(h) + 1) / 2 = sigmoid(2h)
        losses = F.binary_cross_entropy_with_logits(2 * logits, (x + 1) / 2, reduction="none")
    elif kind == "l1":
        losses = (x - logits.tanh()).abs()
    elif kind == "l2":
        losses = 0.5 * (x - logits.tanh()) ** 2
    else:
        squares = (x - logits.tanh()) ** 2
        sigma_squared = mean(
            squares.mean().detach()
        )  # the minimum, so that no gradient flows through it
        losses = 0.5 * squares / sigma_squared + 0.5 * sigma_squared.log()
    return losses.flatten(1).sum(dim=1)


def fit_prior(codes, labels, num_classes, components, seed):
    """A Gaussian mixture over the codes of each class, by scikit-learn's EM; a single Gaussian needs none.

    codes: (N, D);  labels: (N,);  components: K; a class of fewer than 2 K images gets one Gaussian K times.
    Returns {"weights": (classes, K), "means": (classes, K, D), "scales": (classes, K, D (D + 1) / 2)}; float32,
    but the scales, which are many, float16: each is the lower triangle of the Cholesky factor of a covariance, row by
    row.  A class without images gets N(0, 1).
    """
    dim = codes.shape[1]
    weights, means = (
        np.full((num_classes, components), 1 / components),
        np.zeros((num_classes, components, dim)),
    )
    covariances = np.tile(np.eye(dim), (num_classes, components, 1, 1))
    for y in range(num_classes):
        own = codes[labels == y].numpy().astype(np.float64)
        if components > 1 and len(own) >= 2 * components:
            from sklearn.mixture import GaussianMixture  # optional, and only here

            fitted = GaussianMixture(components, reg_covar=1e-4, random_state=seed % 2**32).fit(own)
            weights[y], means[y], covariances[y] = (
                fitted.weights_,
                fitted.means_,
                fitted.covariances_,
            )
        elif len(own):
            means[y] = own.mean(axis=0)
            covariances[y] = np.cov(own.T, bias=True).reshape(dim, dim) + 1e-4 * np.eye(dim)
    scales = np.linalg.cholesky(covariances)[:, :, *np.tril_indices(dim)]
    arrays = {
        "weights": np.float32(weights),
        "means": np.float32(means),
        "scales": np.float16(scales),
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


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


@torch.no_grad()
def decode(model, z, classes, batch_size=100):
    """Images (N, C, 32, 32) in [-1, 1] of codes (N, D), on the CPU. classes: (N, num_classes), as the decoder takes."""
    device = next(model.parameters()).device
    pairs = zip(z.split(batch_size), classes.split(batch_size), strict=True)
    return torch.cat([model.decoder(z.to(device), c.to(device)).tanh().cpu() for z, c in pairs])


@torch.no_grad()
def encode(model, images, labels, batch_size=500):
    """mu and logvar of uint8 images (N, C, 32, 32): float32 (N, D) each, on the CPU."""
    device = next(model.parameters()).device
    classes = one_hot(labels, model.num_classes)
    pairs = zip(images.split(batch_size), classes.split(batch_size), strict=True)
    parts = [model.encoder(to_float(x.to(device)), c.to(device)) for x, c in pairs]
    return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))


def sample(*, model, prior, labels, truncation=None, seed=0, batch_size=100):
    """Draw one image for each label: (N, C, 32, 32) in [-1, 1] on the CPU.  Image i depends on (seed, i), not on N.

    prior: the checkpoint's, or None for N(0, 1);  labels: int64 (N,);  truncation: as in draw_codes.
    """
    arrays = prior and {key: value.numpy() for key, value in prior.items()}
    streams = noise_streams(seed, range(len(labels)))
    z = torch.from_numpy(draw_codes(arrays, labels.tolist(), streams, model.latent_dim, truncation))
    return decode(model, z, one_hot(labels, model.num_classes), batch_size)


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
    network = {k: getattr(args, k) for k in ("channels", "latent_dim", "widths", "emb_channels")}
    network["num_classes"] = num_classes = len(data.class_names)
    model = VAE(**network).to(device, memory_format=torch.channels_last)
    forward = parallel(torch.compile(model) if args.compile else model)
    fused = device.type != "mps"
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
    run = Run(NAME, args, len(images), checkpoint)
    config = {k: getattr(args, k) for k in FIXED + FREE}
    if args.prior_components > 1 and find_spec("sklearn") is None:
        print(
            "scikit-learn is not installed: the prior will be one Gaussian for each class, not a mixture"
        )
        args.prior_components = 1
    quick = min(args.prior_components, 1)  # while training, one Gaussian will do
    grid_labels = torch.arange(min(10, num_classes)).repeat_interleave(8)

    @run.by_the_first
    def save(count=2000, components=quick):
        """Save with the mixture that `count` of the images ask for."""
        run.seed(cpu_generator := torch.Generator())
        some = spread(data.labels, count)
        mu, logvar = encode(ema_model.module, spread(data.images, count), some)
        run.check_finite(mu=mu.abs().max().item(), logvar=logvar.abs().max().item())
        codes = reparameterise(mu, logvar, torch.randn(mu.shape, generator=cpu_generator))
        prior = fit_prior(codes, some, num_classes, components, args.seed) if components else None
        grid = sample(model=ema_model.module, prior=prior, labels=grid_labels)
        save_images(grid, grid_labels.tolist(), data.class_names, run.picture(), columns=8)
        run.log({
            "active_units": (mu.var(dim=0) > 0.01).sum().item(),  # Burda et al. 2015 (arXiv:1509.00519), section 5.2
            "diversity": class_diversity(grid, grid_labels, data, warn=run.step > 0),
        })  # fmt: skip
        run.save({
            "config": config, "network": network, "class_names": data.class_names, "weights": model.state_dict(),
            "ema": ema_model.module.state_dict(), "optimizer": optimizer.state_dict(), "sums": sums.tolist(),
            "prior": prior,
        })  # fmt: skip

    print(
        f"run {run.folder} on {device}, {sum(p.numel() for p in model.parameters()):,} parameters",
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
            batch = run.batch().to(device)
            eps = torch.randn(len(batch), args.latent_dim, generator=generator, device=device)
            batch, eps = run.own(batch, eps)
            x, classes = to_float(images[batch]), one_hot(labels[batch], num_classes)

            with autocast(device, args.bf16):
                logits, mu, logvar = forward(x, classes, eps)
            reconstruction = reconstruction_loss(
                logits.float(), x, args.reconstruction, run.mean
            ).mean()
            kl = kl_divergence(mu.float(), logvar.float()).mean()
            kl_weight = args.kl_weight * (
                min(1.0, done / args.kl_warmup) if args.kl_warmup else 1.0
            )
            loss = reconstruction + kl_weight * kl

            optimizer.zero_grad(set_to_none=True)
            (loss / x[0].numel()).backward()  # of the size that --grad-clip is meant for
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            run.check_finite(loss=loss.item(), gradient=grad_norm.item())
            optimizer.step()
            if run.rank == 0:
                ema_model.update_parameters(model)
            run.step += 1
            sums += run.mean(torch.stack([reconstruction.detach(), kl.detach()]))
            run.show(bar, f"loss {loss.item():.1f}, KL {kl.item():.1f}")
            if run.step % LOG_EVERY == 0:
                reconstruction, kl = (sums / LOG_EVERY).tolist()
                run.log({
                    "reconstruction": reconstruction, "kl": kl, "kl_weight": kl_weight,
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
                })  # fmt: skip
                sums.zero_()
            if run.save_due():
                save()
        save()
        if not run.stopped and args.prior_components:
            tqdm.write(
                f"saved; fitting the prior, {args.prior_components} Gaussians for a class (Ctrl-C twice: skip)"
            )
            save(len(images), args.prior_components)
    return run.end()


# --- Run state --------------------------------------------------------------------------------------------------

# The flags that make a run what it is, and those that may change when it goes on.
FIXED = (
    "data", "channels", "latent_dim", "widths", "emb_channels", "reconstruction", "kl_weight", "weight_decay",
    "batch_size", "ema_length", "seed",
)  # fmt: skip
FREE = (*RUN_FLAGS, "lr", "warmup", "kl_warmup", "grad_clip", "prior_components", "bf16", "compile")


def ema_network(checkpoint, device):
    """The network with the averaged weights of a checkpoint, ready to sample."""
    model = VAE(**checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# --- Command line -----------------------------------------------------------------------------------------------


def build_parser():
    on_off = argparse.BooleanOptionalAction
    parser = run_parser(NAME, __doc__, batch_size=128)
    add = parser.add_argument_group("network").add_argument
    add(
        "--latent-dim",
        type=number(int, 1, 4096),
        default=64,
        help="numbers in a latent code; 2 can be mapped (64)",
    )
    add(
        "--widths",
        type=whole_numbers,
        default=(32, 64, 80),
        help="channels by resolution, finest first (32,64,80)",
    )
    add(
        "--emb-channels",
        type=number(int, 4),
        default=64,
        help="size of the code and class embedding (64)",
    )
    add = parser.add_argument_group("method").add_argument
    add(
        "--reconstruction",
        choices=("sigma", "l2", "l1", "bce"),
        default="sigma",
        help="p(x | z); sigma adapts (sigma)",
    )
    add(
        "--kl-weight",
        type=number(float, 0),
        default=0.3,
        help="of the KL divergence, after its warm-up (0.3)",
    )
    add(
        "--kl-warmup",
        type=number(float, 0, 1),
        default=0.1,
        help="share of the run in which it grows from 0 (0.1)",
    )
    add(
        "--prior-components",
        type=number(int, 0, 1000),
        default=15,
        help="per class; 0 is N(0, 1) (15)",
    )
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--lr",
        type=number(float, 0, above=True),
        default=2e-3,
        help="learning rate after the warm-up (0.002)",
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
    add(
        "--prior",
        choices=("fitted", "normal"),
        default="fitted",
        help="where codes are drawn from (fitted)",
    )
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
    add(
        "--reconstruct",
        metavar="IMAGE",
        nargs="+",
        help="test images' indices or files (with --class), and decoded",
    )
    add(
        "--between",
        metavar="IMAGE",
        nargs=2,
        help="from one image to the other, in --num-samples frames",
    )
    add(
        "--map",
        choices=("pca", "tsne"),
        help="real codes in the plane; ldm adds the samples' paths",
    )
    add(
        "--walk",
        action="store_true",
        help="of 2 latent numbers: the images on a grid over the plane, of one class",
    )
    return parser


def draw(args):
    """Sample from a checkpoint and write what was asked for."""
    path = find_checkpoint((NAME,), args.checkpoint, SAMPLES_FROM)
    checkpoint = load_checkpoint(path, SAMPLES_FROM)
    config, names = checkpoint["config"], checkpoint["class_names"]
    classes, count = parse_classes(args.class_, names), args.num_samples
    at_most_one(args, "interpolate", "reconstruct", "between", "map", "walk")
    endings, given = (
        [".png"] if args.map else [".png", ".npz", ".gif", ""],
        args.reconstruct or args.between or (),
    )
    output = sampled_file(args.output, NAME, classes, names, endings, given)
    check_frames("noise" if args.between else args.interpolate, classes, count)
    if args.walk and (config["latent_dim"] != 2 or len(classes) != 1 or count > 20):
        raise InputError(
            f"--walk is for --latent-dim 2 (here {config['latent_dim']}), one --class, at most 20 a side"
        )
    if args.map and config["latent_dim"] < 2:
        raise InputError("--map is for --latent-dim 2 and more (here 1)")
    model = ema_network(checkpoint, pick_device(args.device))
    prior = checkpoint["prior"] if args.prior == "fitted" else None
    labels = torch.tensor(classes).repeat_interleave(count)
    if args.map:
        data = load_data(
            config["data"], args.data_dir or config["data_dir"], config["channels"], train=False
        )
        some = spread(data.labels, 5000)
        mu, _ = encode(model, spread(data.images, 5000), some)
        save_map(in_the_plane(mu, args.map), some, names, output)
    elif args.walk:
        axis = torch.linspace(-2.5, 2.5, count if count > 1 else 16)
        z = torch.cartesian_prod(-axis, axis).flip(
            1
        )  # row by row from above, the first number to the right
        labels, count = labels[:1].expand(len(z)), len(axis)
        save_sampled(
            decode(model, z, one_hot(labels, len(names)), args.batch_size),
            labels,
            names,
            output,
            count,
        )
    elif args.reconstruct or args.between:
        x, labels = given_images(
            args.reconstruct or args.between, args.class_, config, names, args.data_dir
        )
        mu, _ = encode(model, to_uint8(x), labels)
        hot = one_hot(labels, len(names))
        if args.reconstruct:
            back = decode(model, mu, hot, args.batch_size)
            print(grey_level_error(x, back))
            save_sampled(torch.cat([x, back]), labels.repeat(2), names, output, len(x))
        else:
            weight = torch.linspace(0, 1, count)[:, None]
            z, hot = (torch.lerp(part[:1], part[1:], weight) for part in (mu, hot))
            images = decode(model, z, hot, args.batch_size)
            save_sampled(images, labels[:1].expand(count), names, output, count)
    elif args.interpolate:
        ends = classes if args.interpolate == "class" else [y for y in classes for _ in range(2)]
        streams = noise_streams(
            args.seed, [0, 0] if args.interpolate == "class" else [0, 1] * len(classes)
        )
        arrays = prior and {key: value.numpy() for key, value in prior.items()}
        z = torch.from_numpy(draw_codes(arrays, ends, streams, model.latent_dim, args.truncation))
        hot, weight = one_hot(torch.tensor(ends), len(names)), torch.linspace(0, 1, count)[:, None]
        z, hot = (
            torch.cat([torch.lerp(a, b, weight) for a, b in part.split(2)]) for part in (z, hot)
        )
        images = decode(model, z, hot, args.batch_size)
        save_sampled(images, torch.tensor(ends[::2]).repeat_interleave(count), names, output, count)
    else:
        images = sample(
            model=model, prior=prior, labels=labels, truncation=args.truncation, seed=args.seed,
            batch_size=args.batch_size,
        )  # fmt: skip
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
