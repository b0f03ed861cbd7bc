"""GAN: generative adversarial network, class-conditional, in one file (with common.py).

Ian Goodfellow et al., "Generative Adversarial Networks", 2014 (arXiv:1406.2661).

    discriminator_loss and generator_loss, where softplus(h) = log(1 + exp(h)):
    minmax         loss_d = softplus(-real) + softplus(fake),  loss_g = -softplus(fake)     eq. (1)
    nonsaturating  the same loss_d,  loss_g = softplus(-fake)                             section 3
    relativistic   loss_d = softplus(fake - real),  loss_g = softplus(real - fake)
    hinge          loss_d = relu(1 - real) + relu(1 + fake),  loss_g = -fake, with spectral norm
    gradient_penalty, weighted by gamma / 2:
    R1             E || gradient of the logit with respect to a real image ||^2, with nonsaturating
    R1 + R2        the same for real images and for fake ones, with relativistic

    python gan.py --train --epochs 50      train on Fashion-MNIST
    python gan.py --train --minutes 1      see it run
    python gan.py --class Sneaker          sample a Sneaker with the newest weights

Differs from the paper: class labels in the generator and in a projection discriminator (Miyato &
Koyama 2018, arXiv:1802.05637), residual convolutions, no dropout, the R1 penalty (Mescheder et al.
2018, arXiv:1801.04406), lazily, every n-th step only (Karras et al. 2019, arXiv:1912.04958; theirs
is an extra Adam step with adjusted settings, ours a term of that step's loss), Adam without
momentum, an annealed learning rate, and an EMA of the generator over a fraction of the run (Karras
et al. 2024, arXiv:2312.02696).  Losses of later papers: hinge (Miyato et al. 2018,
arXiv:1802.05957), relativistic (Jolicoeur-Martineau 2018, arXiv:1807.00734; with both penalties:
Huang et al. 2024, arXiv:2501.05441).
"""

import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from common import (
    InputError, ResidualBlock, check_options, group_norm, label_indices, next_noise,
    noise_streams, to_float,
)  # fmt: skip

NAME = "gan"
SAMPLES_FROM = ("gan",)  # the scripts whose checkpoints this one samples from
LOSSES = ("relativistic", "nonsaturating", "hinge", "minmax")
# Default of both networks, by image size.
WIDTHS = {32: (32, 64, 128), 64: (32, 32, 64, 128), 128: (32, 32, 32, 64, 128)}
PENALISED = ("relativistic", "nonsaturating")  # the losses that have a gradient penalty

# --- Model ----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """(z, classes) -> images (B, channels, H, W) in [-1, 1].

    z: (B, latent_dim) ~ N(0, 1);  classes: (B, num_classes), one-hot rows, or rows of weights that
    mix classes.
    widths: channels at half the size (2x2 pixels are channels until the end), a quarter, ..., at
    most five;  image_size: H = W, divisible by 2^len(widths).
    """

    def __init__(self, channels, num_classes, latent_dim, widths, emb_channels, image_size=32):
        super().__init__()
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.class_names = [str(y) for y in range(num_classes)]  # until ema_network knows them
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
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2).tanh()


class PlainBlock(nn.Module):
    """x + f(x) without a norm, then a stride-2 convolution to out_channels, none where it is None.

    f starts small, unless conv2 is spectrally normalised, which undoes any scale.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2.weight.data.mul_(0.1)
        self.down = nn.Identity()
        if out_channels:
            self.down = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x):
        h = self.conv1(F.leaky_relu(x, 0.2))
        return self.down(x + self.conv2(F.leaky_relu(h, 0.2)))


class Discriminator(nn.Module):
    """(x, classes) -> logits (B,): how real x is, as an image of its class.

    Projection discriminator, Miyato & Koyama figure 1 (d): logit = <out, h(x)> + <row of the class,
    h(x)>.  Here the latter is divided by sqrt(128), the square root of h's size; not where it is
    spectrally normalised: the class would hardly count.

    x: (B, channels, H, W) in [-1, 1];  classes, widths, image_size: as in Generator;
    spectral: with every layer spectrally normalised (Miyato et al. 2018).
    """

    def __init__(self, channels, num_classes, widths, spectral, image_size=32):
        super().__init__()
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        pairs = itertools.pairwise([*widths, None])
        self.blocks = nn.Sequential(*(PlainBlock(a, b) for a, b in pairs))
        bottom = image_size // 2 ** len(widths)
        self.features = nn.Linear(widths[-1] * bottom**2, 128)
        self.out = nn.Linear(128, 1)
        self.label = nn.Linear(num_classes, 128, bias=False)
        self.scale = 1.0 if spectral else 128**0.5
        if spectral:
            for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
                spectral_norm(layer)

    def forward(self, x, classes):
        h = self.blocks(self.stem(F.pixel_unshuffle(x, 2)))
        h = F.leaky_relu(self.features(F.leaky_relu(h, 0.2).flatten(1)), 0.2)
        projection = (self.label(classes) * h).sum(dim=1)
        return self.out(h)[:, 0] + projection / self.scale


# --- Method ---------------------------------------------------------------------------------------


def discriminator_loss(real_logits, fake_logits, loss):
    """What the discriminator minimises, as at the top of this file: logits (B,) -> a number.

    hinge is Miyato et al. 2018 eq. (16).
    """
    if loss == "relativistic":
        return F.softplus(fake_logits - real_logits).mean()
    if loss == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(real_logits, fake_logits, loss):
    """What the generator minimises, as at the top of this file: logits (B,) -> a number.

    hinge is Miyato et al. 2018 eq. (17).  Only relativistic has a use for real_logits.
    """
    if loss == "relativistic":
        return F.softplus(real_logits - fake_logits).mean()
    if loss == "hinge":
        return -fake_logits.mean()
    if loss == "minmax":
        return -F.softplus(fake_logits).mean()
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator, x, classes):
    """E || d logit / d x ||^2, of real images x (R1) or of fake ones (R2): a number.

    Mescheder et al. 2018 eq. (9) and (10), without gamma / 2.

    x: (B, C, H, W);  classes: (B, num_classes).
    """
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(x, classes).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


# --- Sampling -------------------------------------------------------------------------------------


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


def one_hot(labels, num_classes):
    """int64 (B,) -> float (B, num_classes)."""
    return F.one_hot(labels, num_classes).float()


@torch.no_grad()
def generate(model, z, classes, batch_size=100):
    """Images (N, C, H, W) in [-1, 1] of codes (N, D), on the CPU.

    classes: (N, num_classes), as in Generator.
    """
    device = next(model.parameters()).device
    pairs = zip(z.split(batch_size), classes.split(batch_size), strict=True)
    return torch.cat([model(z.to(device), c.to(device)).cpu() for z, c in pairs])


def sample(model, labels, *, truncation=None, seed=0, batch_size=100):
    """Sample one image per label: (N, C, H, W) in [-1, 1] on the CPU.

    Image i depends on (seed, i), not on N.  model: from ema_network;  labels: a list, array or
    tensor of class names or indices;  truncation: as in code_noise.  Raises InputError.
    """
    check_options(truncation=truncation, seed=seed, batch_size=batch_size)
    labels = torch.tensor(label_indices(labels, model.class_names))
    streams = noise_streams(seed, range(len(labels)))
    z = code_noise(streams, model.latent_dim, truncation)
    return generate(model, torch.from_numpy(z), one_hot(labels, model.num_classes), batch_size)


def ema_network(checkpoint, device):
    """The generator with the averaged weights of a checkpoint, ready to sample."""
    model = Generator(**checkpoint["network"])
    model.load_state_dict(checkpoint["ema"])
    model.class_names = checkpoint["class_names"]
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# --- Training -------------------------------------------------------------------------------------
# From here on runs.py helps; cut above this line to use the model with a trainer of your own.

from runs import (  # noqa: E402
    LOG_EVERY, RUN_FLAGS, Run, as_flags, autocast, errors_in_one_line, learning_rate,
    load_run_data, number, open_checkpoint, optimisation_flags, parallel, parse_run, pick_device,
    power_ema, read_start, run_parser, save_samples, training_device, whole_numbers,
)  # fmt: skip


def train(args, checkpoint=None):
    """Train, or resume from a checkpoint, until --epochs or --minutes are over.

    Returns the exit code.
    """
    device = training_device(args)
    unused = []
    if args.loss not in PENALISED:
        unused = ["gamma", "penalty_every"]
    elif args.gamma == 0:
        unused = ["penalty_every"]
    if unused := [key for key in unused if key in args.typed]:
        why = f"--loss {args.loss} --gamma {args.gamma:g} is without a penalty: leave it out"
        raise InputError(f"{as_flags(unused)} has no effect: {why}")
    torch.manual_seed(args.seed)  # for the initial weights
    data = load_run_data(args, checkpoint)
    images = data.images.to(device)
    labels = data.labels.to(device)
    num_classes = len(data.class_names)
    args.widths = args.widths or WIDTHS[args.image_size]
    if args.image_size == 2 ** len(args.widths) and args.widths[-1] % 2:
        raise InputError("--widths: the last must be even where the image has become one pixel")

    # The generator, the average of its weights that samples come from, and its opponent.
    keys = ("channels", "latent_dim", "widths", "emb_channels", "image_size")
    network = {key: getattr(args, key) for key in keys}
    network["num_classes"] = num_classes
    model = Generator(**network).to(device, memory_format=torch.channels_last)
    spectral = args.loss == "hinge"
    args.widths_d = args.widths_d or WIDTHS[args.image_size]
    discriminator = Discriminator(
        args.channels, num_classes, args.widths_d, spectral, args.image_size
    )
    discriminator.to(device, memory_format=torch.channels_last)
    if args.start and not checkpoint:
        # Of other classes, start has no class table: the new one stays.
        start = read_start(args, SAMPLES_FROM, FITTING, data.class_names)
        model.load_state_dict({**model.state_dict(), **start["ema"]})
        if "discriminator" not in start:  # as in the included weights
            print("the discriminator is new: the file of --start has none")
        weights = {**discriminator.state_dict(), **start.get("discriminator", {})}
        discriminator.load_state_dict(weights)
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()

    # Momentum would follow where the opponent was, not where it is.
    options = {"lr": args.lr, "betas": (0.0, 0.99), "fused": device.type != "mps"}
    optimizer_g = torch.optim.Adam(model.parameters(), **options)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **options)
    sums = torch.zeros(4, device=device)  # losses and logits since the last line logged
    last_penalty = torch.zeros((), device=device)
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        discriminator.load_state_dict(checkpoint["discriminator"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["position"])
        optimizer_g.load_state_dict(checkpoint["optimizer"])
        optimizer_d.load_state_dict(checkpoint["optimizer_d"])
        sums.copy_(torch.tensor(checkpoint["sums"]))
        last_penalty.fill_(checkpoint["penalty"])
    forward_g = parallel(model)
    forward_d = parallel(discriminator)
    precision = autocast(device, args.bf16)
    run = Run(NAME, args, data, checkpoint)
    config = {key: getattr(args, key) for key in FIXED + FREE}
    grid_labels = torch.arange(min(10, num_classes)).repeat_interleave(8)
    judged_labels = torch.arange(min(10, num_classes)).repeat_interleave(100)

    def save():
        grid = sample(model=ema_model.module, labels=grid_labels)
        state = {
            "config": config, "network": network, "class_names": data.class_names,
            "data": data.fingerprint, "weights": model.state_dict(),
            "discriminator": discriminator.state_dict(),
            "ema": ema_model.module.state_dict(), "optimizer": optimizer_g.state_dict(),
            "optimizer_d": optimizer_d.state_dict(), "sums": sums.tolist(),
            "penalty": last_penalty.item(),
        }  # fmt: skip
        judged = sample(model=ema_model.module, labels=judged_labels)
        run.save(state, grid, grid_labels, (judged, judged_labels))

    size_g = sum(p.numel() for p in model.parameters())
    size_d = sum(p.numel() for p in discriminator.parameters())
    sizes = f"{size_g:,} parameters, discriminator {size_d:,}"
    print(f"run {run} on {device}, {sizes}", flush=True)
    penalised = args.gamma > 0 and args.loss in PENALISED
    generator = torch.Generator(device)
    with run:
        for step in run.steps(save):
            # The rate ends at 0 just when the run does, whether that is by epochs or by minutes.
            for group in optimizer_g.param_groups + optimizer_d.param_groups:
                group["lr"] = learning_rate(args, step, run.progress)

            # Whatever is random depends on (seed, step) alone: a resumed run repeats it exactly.
            run.seed(generator)
            batch = run.batch().to(device)
            shape = (2, len(batch), args.latent_dim)
            z_d, z_g = torch.randn(shape, generator=generator, device=device)
            batch, z_d, z_g = run.shard(batch, z_d, z_g)
            x = to_float(images[batch])
            classes = one_hot(labels[batch], num_classes)

            # Goodfellow et al. algorithm 1 with k = 1: first the discriminator learns to tell real
            # images from fake ones, in one pass.
            with precision:
                with torch.no_grad():
                    fake = model(z_d, classes)
                both = forward_d(torch.cat([x, fake]), classes.repeat(2, 1))
            real_logits, fake_logits = both.float().chunk(2)
            loss_d = discriminator_loss(real_logits, fake_logits, args.loss)

            # The penalty keeps its slopes flat; being costly, it comes rarely and weighs more.
            loss = loss_d
            if penalised and step % args.penalty_every == 0:
                penalty = gradient_penalty(discriminator, x, classes)  # R1
                if args.loss == "relativistic":
                    penalty = penalty + gradient_penalty(discriminator, fake.float(), classes)  # R2
                loss = loss_d + args.gamma / 2 * args.penalty_every * penalty
                last_penalty = run.mean(penalty.detach())
            optimizer_d.zero_grad(set_to_none=True)
            loss.backward()
            optimizer_d.step()

            # Then the generator learns to be taken for real, from new noise. The discriminator
            # stays as it is: it needs no gradients.
            discriminator.requires_grad_(False)
            real_logits_g = None
            with precision:
                fake_logits_g = discriminator(forward_g(z_g, classes), classes).float()
                if args.loss == "relativistic":  # its real logits have changed with its step
                    with torch.no_grad():
                        real_logits_g = discriminator(x, classes).float()
            loss_g = generator_loss(real_logits_g, fake_logits_g, args.loss)
            optimizer_g.zero_grad(set_to_none=True)
            loss_g.backward()
            optimizer_g.step()
            discriminator.requires_grad_(True)

            # A loss that is not finite ends the run before it reaches the average.
            run.watch(loss_g=loss_g.item(), loss_d=loss_d.item(), penalty=last_penalty.item())
            ema_model.update_parameters(model)

            # Real logits far above fake ones tell that the discriminator wins.
            logged = torch.stack([loss_g, loss_d, real_logits.mean(), fake_logits.mean()])
            sums += run.mean(logged.detach())
            if (step + 1) % LOG_EVERY == 0:
                means = (sums / LOG_EVERY).tolist()
                run.log({
                    "loss_g": means[0], "loss_d": means[1], "real_logits": means[2],
                    "fake_logits": means[3], "penalty": last_penalty.item(),
                    "lr": optimizer_g.param_groups[0]["lr"],
                })  # fmt: skip
                sums.zero_()
    return run.end()


# --- Run state ------------------------------------------------------------------------------------

# The flags that make a run what it is, and those that may change when it is resumed.
FIXED = (
    "start", "hold_out", "flip", "background", "image_size", "channels", "latent_dim", "widths",
    "widths_d", "emb_channels", "loss", "gamma", "penalty_every", "ema_length", "seed",
)  # fmt: skip
FREE = (*RUN_FLAGS, "lr", "warmup", "bf16")
# The flags that must be as in the run of --start.
FITTING = ("image_size", "channels", "latent_dim", "widths", "widths_d", "emb_channels", "loss")

# --- Command line ---------------------------------------------------------------------------------


def sampling_flags(parser):
    """Add the flags of sampling, which explore.py has too."""
    # fmt: off
    add = parser.add_argument_group("sampling").add_argument
    add("--truncation", type=number(float, 0.1),
        help="resample noise beyond +- this many standard deviations, from 0.1 (off)")
    # fmt: on


def build_parser():
    parser = run_parser(NAME, __doc__)
    # fmt: off
    add = parser.add_argument_group("network").add_argument
    add("--latent-dim", type=number(int, 1, 4096), default=64,
        help="size of a latent code, 1 to 4096 (64)")
    add("--widths", type=whole_numbers,
        help="channels at each resolution, finest first (32,64,128, for 64 pixels 32,32,64,128, "
             "for 128 32,32,32,64,128)")
    add("--widths-d", type=whole_numbers,
        help="channels of the discriminator at each resolution, finest first (the default of "
             "--widths, whatever that is set to)")
    add("--emb-channels", type=number(int, 4), default=128,
        help="size of the code and class embedding, 4 or more (128)")
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="nonsaturating",
        help="what both networks minimise, see the top of this help (nonsaturating)")
    add("--gamma", type=number(float, 0), default=1.0,
        help="twice the weight of R1 (nonsaturating) or R1 + R2 (relativistic), 0 or more (1)")
    add("--penalty-every", type=number(int, 1), default=8,
        help="steps from one penalty to the next, each weighted by this number, 1 or more (8)")
    optimisation_flags(parser, lr=1e-3, clipped=False)
    # fmt: on
    sampling_flags(parser)
    return parser


def draw(args):
    """Sample from a checkpoint and write the images."""
    opened = open_checkpoint(args, NAME, SAMPLES_FROM)
    _, checkpoint, classes, _ = opened
    labels = torch.tensor(classes).repeat_interleave(args.num_samples)
    model = ema_network(checkpoint, pick_device(args.device))
    options = {"truncation": args.truncation, "seed": args.seed}
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
