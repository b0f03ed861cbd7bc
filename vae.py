"""VAE: variational autoencoder, class-conditional, convolutional, in one file (with common.py).

Diederik Kingma, Max Welling, "Auto-Encoding Variational Bayes", 2013 (arXiv:1312.6114).

    Encoder              q(z | x, y) = N(mu, exp(logvar))                                   eq. (9)
    reparameterise       z = mu + exp(logvar / 2) * eps,  eps ~ N(0, 1)                    eq. (10)
    kl_divergence        1/2 * sum(mu^2 + exp(logvar) - 1 - logvar)                      appendix B
    reconstruction_loss  -log p(x | z, y), where x_hat = tanh(Decoder(z, y))
    train                loss = reconstruction_loss + kl_weight * kl_divergence, each summed over
                         an image and averaged over the batch                               eq. (3)

    python vae.py --train --epochs 50      train on Fashion-MNIST
    python vae.py --train --minutes 1      see it run
    python vae.py --class Sneaker          sample a Sneaker with the newest weights

Differs from the paper: class labels for encoder and decoder (Kingma et al. 2014, arXiv:1406.5298),
residual convolutions, a Gaussian p(x | z) whose scale adapts (sigma-VAE, Rybkin et al. 2020,
arXiv:2006.13202), a KL weight that grows from 0 (Bowman et al. 2015, arXiv:1511.06349) and stays
below 1 (Alemi et al. 2018, arXiv:1711.00464), AdamW with an annealed rate, gradient clipping, an
EMA over a fraction of the run (Karras et al. 2024, arXiv:2312.02696), and a prior fitted after the
training: for each class a Gaussian mixture over the codes of its images, which are less normal than
the KL asks for (Ghosh et al. 2019, arXiv:1903.12436).
"""

import itertools
import math
import sys
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from common import (
    InputError, ResidualBlock, check_options, group_norm, label_indices, next_noise,
    noise_streams, subsample, to_float,
)  # fmt: skip

NAME = "vae"
SAMPLES_FROM = ("vae",)  # the scripts whose checkpoints this one samples from
# Default, by image size.
WIDTHS = {32: (32, 64, 80), 64: (32, 32, 64, 80), 128: (32, 32, 32, 64, 80)}

# --- Model ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """(x, classes) -> (mu, logvar) of q(z | x, y).

    x: (B, channels, H, W) in [-1, 1];  classes: (B, num_classes), one-hot rows, or rows of
    weights that mix classes;  mu, logvar: (B, latent_dim).
    widths: channels at half the size (2x2 pixels become channels first), a quarter, ..., at most
    five;  image_size: H = W, divisible by 2^len(widths).
    """

    def __init__(self, channels, num_classes, latent_dim, widths, emb_channels, image_size=32):
        super().__init__()
        self.label = nn.Linear(num_classes, emb_channels, bias=False)
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, width, emb_channels) for width in widths)
        pairs = itertools.pairwise(widths)
        down = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs]
        self.down = nn.ModuleList([*down, nn.Identity()])
        self.norm = group_norm(widths[-1])
        bottom = image_size // 2 ** len(widths)
        self.head = nn.Linear(widths[-1] * bottom**2, 2 * latent_dim)

    def forward(self, x, classes):
        emb = F.silu(self.label(classes))
        h = self.stem(F.pixel_unshuffle(x, 2))
        for block, down in zip(self.blocks, self.down, strict=True):
            h = down(block(h, emb))
        mu, logvar = self.head(F.silu(self.norm(h)).flatten(1)).chunk(2, dim=1)
        return mu, logvar.clamp(-20, 10)  # exp() stays finite in a bad step


class Decoder(nn.Module):
    """(z, classes) -> logits (B, channels, H, W), whose tanh is the image.

    z: (B, latent_dim);  the rest as in Encoder.
    """

    def __init__(self, channels, num_classes, latent_dim, widths, emb_channels, image_size=32):
        super().__init__()
        self.bottom = image_size // 2 ** len(widths)
        upwards = widths[::-1]
        self.latent = nn.Sequential(
            nn.Linear(latent_dim, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label = nn.Linear(num_classes, emb_channels, bias=False)
        self.start = nn.Linear(latent_dim + emb_channels, widths[-1] * self.bottom**2)
        self.blocks = nn.ModuleList(ResidualBlock(width, width, emb_channels) for width in upwards)
        up = [nn.Conv2d(a, 4 * b, 1) for a, b in itertools.pairwise(upwards)]
        self.up = nn.ModuleList([nn.Identity(), *up])
        self.norm = group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)

    def forward(self, z, classes):
        emb = F.silu(self.latent(z) + self.label(classes))
        h = self.start(torch.cat([z, emb], dim=1)).unflatten(1, (-1, self.bottom, self.bottom))
        for i, (block, up) in enumerate(zip(self.blocks, self.up, strict=True)):
            if i > 0:
                h = F.pixel_shuffle(up(h), 2)
            h = block(h, emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)


class VAE(nn.Module):
    """Encoder and decoder: (x, classes, eps) -> (logits, mu, logvar), eps (B, latent_dim)."""

    def __init__(self, **network):
        super().__init__()
        self.latent_dim = network["latent_dim"]
        self.num_classes = network["num_classes"]
        self.class_names = [str(y) for y in range(self.num_classes)]  # until ema_network knows them
        self.prior = None  # or from fit_prior; None is N(0, 1)
        self.encoder = Encoder(**network)
        self.decoder = Decoder(**network)

    def forward(self, x, classes, eps):
        mu, logvar = self.encoder(x, classes)
        return self.decoder(reparameterise(mu, logvar, eps), classes), mu, logvar


# --- Method ---------------------------------------------------------------------------------------


def reparameterise(mu, logvar, eps):
    """A sample z = mu + sigma * eps of q(z | x) that lets gradients through.

    Kingma & Welling eq. (10).  mu, logvar, eps: of one shape;  eps ~ N(0, 1).
    """
    return mu + torch.exp(0.5 * logvar) * eps


def kl_divergence(mu, logvar):
    """KL(q(z | x) || N(0, 1)) of each image in nats: mu, logvar (B, D) -> (B,).

    Kingma & Welling, appendix B.
    """
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)


def optimal_sigma_squared(logits, x):
    """The sigma^2 that makes a batch most likely: its mean (x - x_hat)^2, without a gradient.

    At least that of half a grey level, 1 / 255: constant images would make it 0.
    Optimal sigma-VAE, Rybkin et al. 2020.  Where sigma is optimal, the gradient of the loss with
    respect to it is 0.
    """
    return (x - logits.detach().tanh()).square().mean().clamp(min=255**-2)


def reconstruction_loss(logits, x, kind, sigma_squared=None):
    """-log p(x | z) of each image, summed over its values, up to a constant: (B,).

    l2     Gaussian of scale 1: (x - x_hat)^2 / 2, where x_hat = tanh(logits)
    l1     Laplace of scale 1: |x - x_hat|
    sigma  Gaussian of scale sigma: (x - x_hat)^2 / (2 sigma^2) + log sigma
    bce    Bernoulli with the mean (x_hat + 1) / 2, for values (x + 1) / 2: a likelihood where these
           are 0 or 1 alone (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845)
    logits, x: (B, C, H, W), x in [-1, 1];  sigma_squared: a tensor of one number, or None: that of
    this batch.
    """
    if kind == "bce":  # (tanh(h) + 1) / 2 = sigmoid(2h)
        losses = F.binary_cross_entropy_with_logits(2 * logits, (x + 1) / 2, reduction="none")
    elif kind == "l1":
        losses = (x - logits.tanh()).abs()
    elif kind == "l2":
        losses = 0.5 * (x - logits.tanh()) ** 2
    else:
        if sigma_squared is None:
            sigma_squared = optimal_sigma_squared(logits, x)
        losses = 0.5 * (x - logits.tanh()) ** 2 / sigma_squared + 0.5 * sigma_squared.log()
    return losses.flatten(1).sum(dim=1)


def fit_prior(codes, labels, num_classes, components, seed):
    """A Gaussian mixture over the codes of each class, by scikit-learn's EM.

    codes: (N, D);  labels: (N,);  components: K (K = 1 needs no scikit-learn);  seed: that of EM's
    start.  A class of fewer than 2 K images gets one Gaussian, a class without images N(0, 1).
    Returns {"weights": (classes, K), "means": (classes, K, D), "scales": (classes, K, D (D + 1) /
    2)}, float32, but the scales float16, to save space: each is the lower triangle, row by row, of
    the Cholesky factor of a covariance.  If all classes get one Gaussian, K is 1 here; if only
    some do, see by_class.
    """
    dim = codes.shape[1]
    weights = np.zeros((num_classes, components))
    weights[:, 0] = 1
    means = [np.zeros((1, dim))] * num_classes
    covariances = [np.eye(dim)[None]] * num_classes
    for y in tqdm(range(num_classes), "fitting the prior", unit="class", disable=components < 2):
        members = codes[labels == y].numpy().astype(np.float64)
        if components > 1 and len(members) >= 2 * components:
            from sklearn.mixture import GaussianMixture  # optional, and only here

            seed %= 2**32  # scikit-learn takes no larger ones
            mixture = GaussianMixture(components, reg_covar=1e-4, random_state=seed)
            mixture.fit(members)
            weights[y] = mixture.weights_
            means[y] = mixture.means_
            covariances[y] = mixture.covariances_
        elif len(members):
            means[y] = members.mean(axis=0, keepdims=True)
            covariance = np.cov(members.T, bias=True).reshape(1, dim, dim)
            covariances[y] = covariance + 1e-4 * np.eye(dim)
    counts = np.array([len(rows) for rows in means])
    rows, columns = np.tril_indices(dim)
    scales = np.concatenate([np.linalg.cholesky(c)[:, rows, columns] for c in covariances])
    prior = {
        "weights": torch.from_numpy(np.float32(weights)),
        "means": torch.from_numpy(np.float32(np.concatenate(means))),
        "scales": torch.from_numpy(np.float16(scales)),  # torch would round twice
    }
    most = counts.max()
    if most == counts.min():
        stacked = {key: prior[key].unflatten(0, (-1, most)) for key in ("means", "scales")}
        return {"weights": prior["weights"][:, :most].clone(), **stacked}
    return {**prior, "counts": torch.from_numpy(counts)}


# --- Sampling -------------------------------------------------------------------------------------


def by_class(arrays):
    """The arrays of a fitted prior as sample_codes reads them: [y][k] is Gaussian k of class y.

    Where classes have different numbers of Gaussians, means and scales hold those of all classes
    in a row, and counts (classes,) says how many are whose.
    """
    if "counts" in arrays:
        starts = np.cumsum(arrays["counts"])[:-1]
        rows = {key: np.split(arrays[key], starts) for key in ("means", "scales")}
        return {"weights": arrays["weights"], **rows}
    return arrays


def code_noise(streams, latent_dim, truncation=None):
    """Noise ~ N(0, 1) of one latent code per stream: float32 (N, D).

    streams: from noise_streams;  truncation: noise beyond +-truncation is sampled again (BigGAN,
    Brock et al. 2018, section 3.1).
    """
    codes = next_noise(streams, (latent_dim,))
    limit = truncation or math.inf
    while (beyond := np.abs(codes) > limit).any():
        rows = np.flatnonzero(beyond.any(axis=1))  # other streams stay: images are independent
        again = next_noise([streams[i] for i in rows], (latent_dim,))
        codes[rows] = np.where(beyond[rows], again, codes[rows])
    return codes


def sample_codes(prior, labels, streams, latent_dim, truncation=None):
    """One latent code per label: float32 (N, D).

    prior: None for N(0, 1), else a Gaussian mixture for each class y: component k has probability
    weights[y, k] and gives means[y, k] + L @ noise, scales[y, k] being the lower triangle of L row
    by row;  labels: list of int;  streams, truncation: as in code_noise.
    """
    codes = code_noise(streams, latent_dim, truncation)
    if prior is None:
        return codes
    L = np.zeros((latent_dim, latent_dim), np.float32)
    lower = np.tril_indices(latent_dim)
    for i, (y, stream) in enumerate(zip(labels, streams, strict=True)):
        thresholds = np.cumsum(prior["weights"][y][: len(prior["means"][y])])[:-1]
        k = int((stream.random() >= thresholds).sum())
        L[lower] = prior["scales"][y][k]
        codes[i] = prior["means"][y][k] + L @ codes[i]
    return codes


def one_hot(labels, num_classes):
    """int64 (B,) -> float (B, num_classes)."""
    return F.one_hot(labels, num_classes).float()


@torch.no_grad()
def encode(model, images, labels, batch_size=500):
    """mu and logvar, float32 (N, D) each on the CPU, of images and their labels.

    images: uint8 (N, C, H, W);  labels: int64 (N,).
    """
    device = next(model.parameters()).device
    classes = one_hot(labels, model.num_classes)
    pairs = zip(images.split(batch_size), classes.split(batch_size), strict=True)
    parts = [model.encoder(to_float(x.to(device)), c.to(device)) for x, c in pairs]
    mu, logvar = zip(*parts, strict=True)
    return torch.cat(mu).cpu(), torch.cat(logvar).cpu()


@torch.no_grad()
def decode(model, z, classes, batch_size=100):
    """Images (N, C, H, W) in [-1, 1] of codes (N, D), on the CPU.

    classes: (N, num_classes), as in Encoder.
    """
    device = next(model.parameters()).device
    pairs = zip(z.split(batch_size), classes.split(batch_size), strict=True)
    return torch.cat([model.decoder(z.to(device), c.to(device)).tanh().cpu() for z, c in pairs])


def sample(model, labels, *, prior="fitted", truncation=None, seed=0, batch_size=100):
    """Sample one image per label: (N, C, H, W) in [-1, 1] on the CPU.

    Image i depends on (seed, i), not on N.  model: from ema_network;  labels: a list, array or
    tensor of class names or indices;  prior: "fitted" (model.prior), "normal" or None (N(0, 1)), or
    a result of fit_prior;  truncation: as in code_noise.  Raises InputError.
    """
    if isinstance(prior, str):
        check_options(prior=prior)
        prior = model.prior if prior == "fitted" else None
    check_options(truncation=truncation, seed=seed, batch_size=batch_size)
    labels = torch.tensor(label_indices(labels, model.class_names))
    arrays = prior and by_class({key: value.numpy() for key, value in prior.items()})
    streams = noise_streams(seed, range(len(labels)))
    z = sample_codes(arrays, labels.tolist(), streams, model.latent_dim, truncation)
    return decode(model, torch.from_numpy(z), one_hot(labels, model.num_classes), batch_size)


def ema_network(checkpoint, device):
    """The network with the averaged weights of a checkpoint, ready to sample."""
    model = VAE(**checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    model.class_names = checkpoint["class_names"]
    model.prior = checkpoint["prior"]
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# --- Training -------------------------------------------------------------------------------------
# From here on runs.py helps; cut above this line to use the model with a trainer of your own.

from runs import (  # noqa: E402
    LOG_EVERY, RUN_FLAGS, Run, autocast, errors_in_one_line, learning_rate,
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
    num_classes = len(data.class_names)
    args.widths = args.widths or WIDTHS[args.image_size]
    if args.image_size == 2 ** len(args.widths) and args.widths[-1] % 2:
        raise InputError("--widths: the last must be even where the image has become one pixel")

    # The network, its optimiser, and the average of its weights that samples come from.
    keys = ("channels", "latent_dim", "widths", "emb_channels", "image_size")
    network = {key: getattr(args, key) for key in keys}
    network["num_classes"] = num_classes
    model = VAE(**network).to(device, memory_format=torch.channels_last)
    if args.start and not checkpoint:
        # Of other classes, start has no class table: the new one stays.
        start = read_start(args, SAMPLES_FROM, FITTING, data.class_names)
        model.load_state_dict({**model.state_dict(), **start["ema"]})
    forward = parallel(torch.compile(model) if args.compile else model)
    fused = device.type != "mps"
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay, fused=fused)
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()
    sums = torch.zeros(2, device=device)  # reconstruction loss and KL since the last line logged
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["position"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        sums.copy_(torch.tensor(checkpoint["sums"]))
    precision = autocast(device, args.bf16)
    run = Run(NAME, args, data, checkpoint)
    config = {key: getattr(args, key) for key in FIXED + FREE}
    grid_labels = torch.arange(min(10, num_classes)).repeat_interleave(8)
    judged_labels = torch.arange(min(10, num_classes)).repeat_interleave(100)
    components = args.prior_components
    if components > 1 and find_spec("sklearn") is None:
        print("scikit-learn is not installed: the prior will be one Gaussian per class, no mixture")
        components = 1
    quick = min(components, 1)  # while training, one Gaussian will do
    fitted = checkpoint and checkpoint.get("fitted")  # (images, Gaussians for a class) of the prior

    def save(count=2000, components=quick):
        nonlocal fitted
        fitted = (count, components)
        # The prior is fitted to codes of `count` of the images, as the averaged weights see them.
        cpu_generator = torch.Generator()
        run.seed(cpu_generator)
        some_labels = subsample(data.labels, count)
        mu, logvar = encode(ema_model.module, subsample(data.images, count), some_labels)
        run.watch(mu=mu.abs().max().item(), logvar=logvar.abs().max().item())
        codes = reparameterise(mu, logvar, torch.randn(mu.shape, generator=cpu_generator))
        prior = None
        if components:
            prior = fit_prior(codes, some_labels, num_classes, components, args.seed)
        grid = sample(model=ema_model.module, prior=prior, labels=grid_labels)
        state = {
            "config": config, "network": network, "class_names": data.class_names,
            "data": data.fingerprint, "weights": model.state_dict(),
            "ema": ema_model.module.state_dict(), "optimizer": optimizer.state_dict(),
            "sums": sums.tolist(), "prior": prior, "fitted": fitted,
        }  # fmt: skip
        judged = sample(model=ema_model.module, prior=prior, labels=judged_labels)
        # Active units: Burda et al. 2015 (arXiv:1509.00519), section 5.2.
        active_units = (mu.var(dim=0) > 0.01).sum().item()
        run.save(state, grid, grid_labels, (judged, judged_labels), active_units=active_units)

    def finish():
        if components and fitted != (len(images), components):  # else nothing is new
            fitting = f"fitting the prior, {components} Gaussians for a class"
            tqdm.write(f"saved; {fitting} (Ctrl-C skips it, --resume does it later)")
            few = (data.labels.bincount(minlength=num_classes) < 2 * components).sum()
            if components > 1 and few:
                tqdm.write(
                    f"{few} of {num_classes} classes have fewer than {2 * components} images: "
                    "those get one Gaussian"
                )
            save(len(images), components)

    size = sum(p.numel() for p in model.parameters())
    print(f"run {run} on {device}, {size:,} parameters", flush=True)
    generator = torch.Generator(device)
    with run:
        for step in run.steps(save, finish):
            # The rate ends at 0 just when the run does, whether that is by epochs or by minutes.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step, run.progress)

            # Whatever is random depends on (seed, step) alone: a resumed run repeats it exactly.
            run.seed(generator)
            batch = run.batch().to(device)
            eps = torch.randn(len(batch), args.latent_dim, generator=generator, device=device)
            batch, eps = run.shard(batch, eps)
            x = to_float(images[batch])
            classes = one_hot(labels[batch], num_classes)

            # One z of each image's distribution is enough, Kingma & Welling section 2.3.
            with precision:
                logits, mu, logvar = forward(x, classes, eps)
            logits = logits.float()

            # sigma^2 is that of the whole batch, of which this process sees its shard.
            sigma_squared = None
            if args.reconstruction == "sigma":
                sigma_squared = run.mean(optimal_sigma_squared(logits, x))
            losses = reconstruction_loss(logits, x, args.reconstruction, sigma_squared)
            reconstruction = losses.mean()
            kl = kl_divergence(mu.float(), logvar.float()).mean()

            # The KL weight grows from 0, or the decoder would learn to do without z.
            kl_weight = args.kl_weight
            if run.progress < args.kl_warmup:
                kl_weight *= run.progress / args.kl_warmup
            loss = reconstruction + kl_weight * kl

            # Clipping bounds what one bad batch can do; a loss that is not finite ends the run.
            optimizer.zero_grad(set_to_none=True)
            (loss / x[0].numel()).backward()  # per value: the size that --grad-clip is meant for
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            run.watch(loss=loss.item(), kl=kl.item(), gradient=grad_norm.item())
            optimizer.step()
            ema_model.update_parameters(model)

            # Log the two terms of the loss apart: what the image costs, and what the code does.
            sums += run.mean(torch.stack([reconstruction, kl]).detach())
            if (step + 1) % LOG_EVERY == 0:
                means = (sums / LOG_EVERY).tolist()
                run.log({
                    "reconstruction": means[0], "kl": means[1], "kl_weight": kl_weight,
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
                })  # fmt: skip
                sums.zero_()
    return run.end()


# --- Run state ------------------------------------------------------------------------------------

# The flags that make a run what it is, and those that may change when it is resumed.
FIXED = (
    "start", "hold_out", "flip", "background", "image_size", "channels", "latent_dim", "widths",
    "emb_channels", "reconstruction", "kl_weight", "weight_decay", "ema_length", "seed",
)  # fmt: skip
FREE = (
    *RUN_FLAGS, "lr", "warmup", "kl_warmup", "grad_clip", "prior_components", "bf16", "compile",
)  # fmt: skip
# The flags that must be as in the run of --start.
FITTING = ("image_size", "channels", "latent_dim", "widths", "emb_channels")

# --- Command line ---------------------------------------------------------------------------------


def sampling_flags(parser):
    """Add the flags of sampling, which explore.py has too."""
    # fmt: off
    add = parser.add_argument_group("sampling").add_argument
    add("--prior", choices=("fitted", "normal"), default="fitted",
        help="sample codes from the mixture fitted to each class, or from N(0, 1) (fitted)")
    add("--truncation", type=number(float, 0.1),
        help="resample noise beyond +- this many standard deviations, from 0.1 (off)")
    # fmt: on


def build_parser():
    parser = run_parser(NAME, __doc__, batch_size=128)
    # fmt: off
    add = parser.add_argument_group("network").add_argument
    add("--latent-dim", type=number(int, 1, 4096), default=64,
        help="size of a latent code, 1 to 4096; explore.py walk needs 2 (64)")
    add("--widths", type=whole_numbers,
        help="channels at each resolution, finest first (32,64,80, for 64 pixels 32,32,64,80, for "
             "128 32,32,32,64,80)")
    add("--emb-channels", type=number(int, 4), default=64,
        help="size of the code and class embedding, 4 or more (64)")
    add = parser.add_argument_group("method").add_argument
    add("--reconstruction", choices=("sigma", "l2", "l1", "bce"), default="sigma",
        help="distribution p(x | z) of the loss; the scale of sigma adapts to the batch (sigma)")
    add("--kl-weight", type=number(float, 0), default=0.3,
        help="weight of the KL divergence after its warm-up, 0 or more (0.3)")
    add("--kl-warmup", type=number(float, 0, 1), default=0.1,
        help="fraction of the run in which the KL weight grows from 0, 0 to 1 (0.1)")
    add("--prior-components", type=number(int, 0, 1000), default=15,
        help="Gaussians fitted per class after the time of training, one where a class has fewer "
             "than twice as many images; 0 leaves N(0, 1) (15)")
    optimisation_flags(parser, lr=2e-3)
    # fmt: on
    sampling_flags(parser)
    return parser


def draw(args):
    """Sample from a checkpoint and write the images."""
    opened = open_checkpoint(args, NAME, SAMPLES_FROM)
    _, checkpoint, classes, _ = opened
    labels = torch.tensor(classes).repeat_interleave(args.num_samples)
    if not checkpoint["prior"] and args.prior == "fitted":
        if "prior" in args.typed:
            raise InputError("--prior fitted: this model was trained without one: leave it out")
        args.prior = "normal"
    model = ema_network(checkpoint, pick_device(args.device))
    options = {"truncation": args.truncation, "prior": args.prior, "seed": args.seed}
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
