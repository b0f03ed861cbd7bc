"""Pictures that are not plain sampling: from image to image, into the noise and back, maps.

    python explore.py interpolate ddim --class Sneaker,Sandal   from one class to another
    python explore.py interpolate gan --class Bag --output bag.gif   from one bag to another
    python explore.py invert ddim 3 --output 3.gif              test image 3 to its noise, and back
    python explore.py reconstruct vae 0 1 2                     images, and decoded from their codes
    python explore.py between vae 0 shoe.png --class Sneaker    from one image to another
    python explore.py map vae --method tsne                     codes of real images in the plane
    python explore.py map ldm --class Sneaker,Bag,Trouser       with the paths from noise to samples
    python explore.py walk vae --class Bag --checkpoint runs/vae-2   trained with --latent-dim 2
    python explore.py filmstrip ddpm --class Sneaker,Bag        steps from noise to image
    python explore.py gif ddim --class all                      the same, as an animation

IMAGE is the index of a test image, or a file, whose class --class names.  A command takes the
newest run of its model, else the shipped weights; `python explore.py COMMAND --help` has the rest.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (
    IMAGE_SIZE, InputError, load_data, load_image, next_noise, noise_streams, parse_classes,
    subsample, to_float, to_uint8,
)  # fmt: skip
from runs import (
    Parser, check_output, errors_in_one_line, find_checkpoint, image_grid, load_checkpoint, number,
    pick_device, save_images, save_picture, written_whole,
)  # fmt: skip

INVERT_STEPS = 100  # default; the error of an inversion falls with the number of steps
MAP_IMAGES = 5000  # at most so many real images on a map
DIFFUSION = ("ddpm", "ddim", "ldm")

# --- Method ---------------------------------------------------------------------------------------


def slerp(a, b, weight):
    """Spherical interpolation of two noises, DDIM section 5.3 and appendix D.5.

    It keeps the length of noise, which a straight line loses in the middle.

    a, b: (1, C, H, W);  weight: (B, 1, 1, 1) in [0, 1].  Returns (B, C, H, W).
    """
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


def lerp_with_length(a, b, weight):
    """Codes on the straight line from a to b, scaled to lengths between theirs.

    a, b: (D,) ~ N(0, 1);  weight: (B, 1) in [0, 1].  Returns (B, D).
    """
    z = torch.lerp(a, b, weight)
    return z / z.norm(dim=1, keepdim=True) * torch.lerp(a.norm(), b.norm(), weight)


def blended(denoise_a, denoise_b, weight):
    """denoise(x_t, t) on the straight line from denoise_a to denoise_b, weight: (B, 1, 1, 1)."""
    return lambda x_t, t: torch.lerp(denoise_a(x_t, t), denoise_b(x_t, t), weight)


def ddim_invert(script, denoise, x_0, alpha_bars, pairs, prediction, trace=None):
    """Walk from images to the noise that ddim_sample(eta=0) takes back to them.

    DDIM eq. (13) and section 5.4, read the other way: the noise found at x_prev stands in for the
    one at x_t, so that the way back misses by a little, less with more steps.

    script: ddim or ldm;  the rest and trace as in ddim_sample, but x_T is not in the trace.
    Returns x_T, like x_0.
    """
    x_prev = x_0
    for t, t_prev in reversed(pairs):
        at = max(t_prev, 0)  # the network knows no t = -1; a clean image passes for t = 0
        output = denoise(x_prev, at)
        alpha_bar = alpha_bars[at].item()
        x_0_hat, eps_hat = script.predict_x_0_and_eps(output, x_prev, prediction, alpha_bar)
        if trace is not None:
            trace.append((t_prev, x_prev, x_0_hat))
        x_prev = script.q_sample(x_0_hat, eps_hat, alpha_bars[t].item())
    return x_prev


def in_the_plane(codes, method, others=None):
    """Codes (N, D), and others (M, D) after them, as points (N + M, 2) of a map.

    method: pca, the two principal directions of the codes, or tsne (van der Maaten & Hinton 2008),
    fitted to all of them together.  Codes of two numbers are points already.
    Raises InputError where scikit-learn is missing.
    """
    every = codes if others is None else torch.cat([codes, others])
    if codes.shape[1] == 2:
        return every
    if method == "pca":
        mean = codes.mean(dim=0)
        directions = torch.linalg.svd(codes - mean, full_matrices=False).Vh[:2]
        return (every - mean) @ directions.T
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        hint = "pip install scikit-learn, or take --method pca"
        raise InputError(f"t-SNE needs scikit-learn: {hint}") from error
    tsne = TSNE(init="pca", random_state=0, perplexity=min(30, (len(every) - 1) / 3))
    return torch.from_numpy(tsne.fit_transform(every.numpy()))


# --- Pictures -------------------------------------------------------------------------------------


def trajectory_frames(trace, columns):
    """One picture a step: the grid of x_t above the grid of x_0_hat.

    trace: a list of (t, x_t, x_0_hat), of (B, C, H, W) in [-1, 1].  Returns a list of PIL pictures.
    """
    _, x_T, _ = trace[0]
    blank = -torch.ones_like(x_T[:1])
    blanks = blank.expand(-len(x_T) % columns, -1, -1, -1)  # to fill the last row of x_t
    return [image_grid(torch.cat([x_t, blanks, x_0_hat]), columns) for _, x_t, x_0_hat in trace]


def filmstrip(trace):
    """One picture of at most 11 steps, first and last included: for each image x_t above x_0_hat.

    trace: as in trajectory_frames.  Returns a PIL picture.
    """
    last = len(trace) - 1
    moments = [trace[i] for i in sorted({round(k * last / 10) for k in range(11)})]
    columns = [torch.stack([x_t, x_0_hat], dim=1) for _, x_t, x_0_hat in moments]
    cells = torch.stack(columns, dim=2)  # (B, 2, moments, C, H, W)
    return image_grid(cells.flatten(0, 2), len(moments))


def save_gif(frames, path, milliseconds=80):
    """Write a list of PIL pictures as an endless GIF that rests on its last frame for a second."""
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    first, *rest = frames
    with written_whole(path) as scratch:
        first.save(scratch, "gif", save_all=True, append_images=rest, duration=durations, loop=0)


def new_axes():
    """Axes of a matplotlib figure of 1050 x 900 pixels; InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a map needs matplotlib: pip install matplotlib") from error
    return Figure((10.5, 9), dpi=100, layout="constrained").add_subplot()


def save_map(axes, points, labels, class_names, path, walks=()):
    """Write dots coloured by class, and lines from a small marker at the start to a large one.

    axes: from new_axes;  points: (N, 2);  labels: int64 (N,);  walks: [((S, 2), label), ...].
    """
    from matplotlib import colormaps

    few = len(class_names) <= 10
    colours = colormaps["tab10" if few else "gist_rainbow"]
    for y in labels.unique().tolist():
        colour = colours(y if few else y / len(class_names))
        name = class_names[y] if y < 40 else None  # more would not fit into the legend
        axes.scatter(*points[labels == y].T, 5, color=[colour], linewidths=0, label=name)
    for walk, y in walks:
        colour = colours(y if few else y / len(class_names))
        axes.plot(*walk.T, color="black", linewidth=3.5)
        axes.plot(*walk.T, color=colour, linewidth=2)
        for end, size in ((walk[0], 6), (walk[-1], 13)):
            axes.plot(*end, "o", color=colour, markersize=size, markeredgecolor="black")
    axes.figure.legend(loc="outside right upper", markerscale=4, frameon=False)
    with written_whole(path) as scratch:
        axes.figure.savefig(scratch, format="png")


# --- Models and images ----------------------------------------------------------------------------


def check_finite(images):
    if not images.isfinite().all():
        raise InputError("the images are not finite: the weights are corrupted, or diverged")


def print_error(x, back, text=""):
    """Print how far two sets of images (N, C, H, W) in [-1, 1] are apart."""
    check_finite(back)
    error = (to_uint8(back).float() - to_uint8(x).float()).abs().mean()
    print(f"{text}mean absolute error {error:.2f} of 255 grey levels")


class Trained:
    """A model with its averaged weights, and how the flags say to use it.  Raises InputError."""

    def __init__(self, args):
        self.args = args
        self.script = importlib.import_module(args.name)
        stems = self.script.SAMPLES_FROM
        self.path = find_checkpoint((args.name,), args.checkpoint, stems)
        checkpoint = load_checkpoint(self.path, stems)
        self.config = checkpoint["config"]
        self.names = checkpoint["class_names"]
        self.classes = parse_classes(args.class_, self.names)
        self.latent = args.name == "ldm"
        self.options = given_flags(args)
        if args.name in DIFFUSION:
            steps = INVERT_STEPS if args.command == "invert" else self.script.STEPS
            guidance = self.script.default_guidance(self.config)
            if args.command == "invert":
                guidance = min(guidance, 1.0)  # a guided walk does not find its way back
            self.options.setdefault("steps", min(steps, self.config["num_timesteps"]))
            self.options.setdefault("guidance", guidance)
            self.script.check_sampling(self.config, self.options["steps"], self.options["guidance"])
        elif args.name == "vae":
            normal = self.options.get("prior") == "normal"
            self.options["prior"] = None if normal else checkpoint["prior"]
        self.device = pick_device(args.device)
        self.network = self.script.ema_network(checkpoint, self.device)

    def sample(self, trace=None):
        """--num-samples images of each class: (N, C, 32, 32), and their labels int64 (N,).

        trace: as in ddim_sample, of a diffusion model.
        """
        labels = torch.tensor(self.classes).repeat_interleave(self.args.num_samples)
        options = {"seed": self.args.seed, "batch_size": self.args.batch_size, **self.options}
        if self.args.name in DIFFUSION:
            options |= {"config": self.config, "trace": trace, "batch_size": len(labels)}
        images = self.script.sample(model=self.network, labels=labels, **options)
        check_finite(images)
        return images, labels

    def schedule(self):
        """alpha_bars, pairs and prediction, for a walk that `sample` does not take."""
        T = self.config["num_timesteps"]
        alpha_bars = self.script.make_alpha_bars(self.config["schedule"], T)
        pairs = self.script.time_pairs(T, self.options["steps"])
        return alpha_bars, pairs, self.config["prediction"]

    def denoiser(self, y):
        """denoise(x_t, t) of classes y, int64 (B,)."""
        network = self.network.denoiser if self.latent else self.network
        limit = self.options.get("guidance_limit", self.script.GUIDANCE_LIMIT)
        until = limit * self.config["num_timesteps"]
        return self.script.guided(network, y.to(self.device), self.options["guidance"], until)

    def solve(self, denoise, x_T, trace=None):
        """Walk from noise to images, or latents, without noise in the steps."""
        dpm = self.options.get("solver") == "dpm++"
        sampler = self.script.dpm_sample if dpm else self.script.ddim_sample
        clip = self.options.get("clip", not self.latent)  # latents have no bounds
        return sampler(denoise, x_T.to(self.device), *self.schedule(), clip=clip, trace=trace)

    def encode(self, images, labels):
        """The codes (N, D), or latents (N, C, 8, 8), of uint8 images (N, C, 32, 32)."""
        if self.latent:
            return self.network.to_latents(images).cpu()
        return self.script.encode(self.network, images, labels)[0]

    def decode(self, z, classes):
        """Images on the CPU of codes or latents; classes: int64 (N,), or fractions (N, classes)."""
        if self.latent:
            return self.network.to_images(z.to(self.device)).cpu()
        if classes.ndim == 1:
            classes = self.script.one_hot(classes, len(self.names))
        decode = self.script.generate if self.args.name == "gan" else self.script.decode
        return decode(self.network, z, classes, self.args.batch_size)

    def frames(self, trace):
        """A trace in images on the CPU."""
        decode = self.network.to_images if self.latent else torch.Tensor.cpu
        return [(t, decode(x_t).cpu(), decode(x_0_hat).cpu()) for t, x_t, x_0_hat in trace]

    def test_data(self):
        """The test images of the data set of the training; folders and .npz files have one set."""
        folder = self.args.data_dir or self.config["data_dir"]
        return load_data(self.config["data"], folder, self.config["channels"], train=False)

    def given_images(self):
        """The images of the command line: uint8 (N, C, 32, 32), and their labels int64 (N,)."""
        if len(self.args.images) > 20:
            raise InputError(f"{len(self.args.images)} images are too many: at most 20")
        images = []
        labels = []
        data = None
        for name in self.args.images:
            if name.isdecimal():
                data = data or self.test_data()
                last = len(data.images) - 1
                if int(name) > last:
                    raise InputError(f"there is no image {name}: they are 0 to {last}")
                images.append(data.images[int(name)][None])
                labels.append(data.labels[int(name)].item())
            else:
                if len(self.classes) > 1:
                    raise InputError(f"{name} needs one --class, that of the image")
                images.append(load_image(name, self.config["channels"]))
                labels.append(self.classes[0])
        return torch.cat(images), torch.tensor(labels)

    def save(self, images, labels, count):
        """Write images (N, C, H, W), `count` a row, as runs.py does, or the columns as a .gif."""
        if self.args.output.suffix != ".gif":
            return save_images(images, labels, self.names, self.args.output, count)
        check_finite(images)
        columns = images.unflatten(0, (-1, count)).unbind(1)
        save_gif([image_grid(column, min(10, len(column))) for column in columns], self.args.output)


# --- Commands -------------------------------------------------------------------------------------
# Each writes its picture to args.output; model: Trained.


def interpolate(args, model):
    classes = model.classes
    vary = args.vary or ("class" if len(classes) == 2 else "noise")
    if vary == "class" and len(classes) != 2:
        raise InputError("--vary class needs two classes, as in --class Sneaker,Bag")
    # A row of frames goes from class y_a to y_b and from noise i to j.
    rows = [(*classes, 0, 0)] if vary == "class" else [(y, y, 0, 1) for y in classes]
    frames = noise_frames if args.name == "ddim" else code_frames
    parts = torch.linspace(0, 1, args.num_samples).split(args.batch_size)
    images = torch.cat([frames(model, *row, weight) for row in rows for weight in parts])
    labels = torch.tensor([y for y, *_ in rows]).repeat_interleave(args.num_samples)
    model.save(images, labels, args.num_samples)


def noise_frames(model, y_a, y_b, i, j, weight):
    """Images of ddim from class y_a and noise i to class y_b and noise j; weight: (B,)."""
    weight = weight.view(-1, 1, 1, 1)
    shape = (model.config["channels"], IMAGE_SIZE, IMAGE_SIZE)
    ends = torch.from_numpy(next_noise(noise_streams(model.args.seed, [i, j]), shape))
    x_T = slerp(*ends.split(1), weight) if i != j else ends[:1].repeat(len(weight), 1, 1, 1)
    denoise = model.denoiser(torch.full((len(x_T),), y_a))
    if y_a != y_b:
        denoise_b = model.denoiser(torch.full((len(x_T),), y_b))
        denoise = blended(denoise, denoise_b, weight.to(model.device))
    return model.solve(denoise, x_T).cpu()


def code_frames(model, y_a, y_b, i, j, weight):
    """Images of vae or gan, as in noise_frames."""
    prior = model.options.get("prior")
    arrays = prior and {key: value.numpy() for key, value in prior.items()}
    streams = noise_streams(model.args.seed, [i, j])
    truncation = model.options.get("truncation")
    latent_dim = model.network.latent_dim
    codes = model.script.sample_codes(arrays, [y_a, y_b], streams, latent_dim, truncation)
    # The codes of a GAN are of one length, about; those of a VAE's class lie around their mean.
    mix = lerp_with_length if model.args.name == "gan" and i != j else torch.lerp
    z = mix(*torch.from_numpy(codes), weight[:, None])
    classes = model.script.one_hot(torch.tensor([y_a, y_b]), len(model.names))
    return model.decode(z, torch.lerp(*classes, weight[:, None]))


def invert(args, model):
    images, labels = model.given_images()
    x_0 = to_float(images)
    start = model.encode(images, labels) if model.latent else x_0
    denoise = model.denoiser(labels)
    trace = []
    x_T = ddim_invert(model.script, denoise, start.to(model.device), *model.schedule(), trace)
    steps = len(trace)
    model.solve(denoise, x_T, trace)
    trace = model.frames(trace)
    back = trace[-1][1]
    print_error(x_0, back, f"{model.names[labels[0]]}, {steps} steps each way: ")
    if args.output.suffix == ".gif":
        return save_gif(trajectory_frames(trace, 1), args.output)
    model.save(torch.cat([x_0, trace[steps][1], back]), labels.repeat(3), 3)


def reconstruct(args, model):
    images, labels = model.given_images()
    x = to_float(images)
    back = model.decode(model.encode(images, labels), labels)
    print_error(x, back)
    model.save(torch.cat([x, back]), labels.repeat(2), len(x))


def between(args, model):
    images, labels = model.given_images()
    weight = torch.linspace(0, 1, args.num_samples)[:, None]
    z = torch.lerp(*model.encode(images, labels), weight)
    classes = torch.lerp(*model.script.one_hot(labels, len(model.names)), weight)
    model.save(model.decode(z, classes), labels[:1].expand(len(z)), len(z))


def draw_map(args, model):
    if args.name == "vae" and model.config["latent_dim"] < 2:
        raise InputError("map is for a VAE of --latent-dim 2 and more, here it is 1")
    axes = new_axes()
    data = model.test_data()
    labels = subsample(data.labels, MAP_IMAGES)
    codes = model.encode(subsample(data.images, MAP_IMAGES), labels).flatten(1)
    check_finite(codes)
    method = "" if codes.shape[1] == 2 else f" by {args.method}"
    axes.set_title(f"{'latents' if model.latent else 'codes'} of test images{method} ({args.name})")
    walks = []
    if args.name == "vae":
        points = in_the_plane(codes, args.method)
    else:
        trace = []
        _, ends = model.sample(trace)
        z_t = torch.stack([z_t.cpu() for _, z_t, _ in trace], dim=1).flatten(2)
        points = in_the_plane(codes, args.method, z_t.flatten(0, 1))  # of (samples * moments, D)
        walks = zip(points[len(codes) :].unflatten(0, z_t.shape[:2]), ends.tolist(), strict=True)
    save_map(axes, points[: len(codes)], labels, model.names, args.output, walks)


def walk(args, model):
    if model.config["latent_dim"] != 2:
        dim = model.config["latent_dim"]
        raise InputError(f"walk is for a VAE trained with --latent-dim 2, here it is {dim}")
    if len(model.classes) != 1:
        raise InputError("walk is for one --class")
    axis = torch.linspace(-2.5, 2.5, args.num_samples)
    z = torch.cartesian_prod(-axis, axis).flip(1)  # rows from above, the first number to the right
    labels = torch.tensor(model.classes).expand(len(z))
    model.save(model.decode(z, labels), labels, args.num_samples)


def draw_filmstrip(args, model):
    trace = []
    model.sample(trace)
    save_picture(filmstrip(model.frames(trace)), args.output)


def gif(args, model):
    count = args.num_samples = args.num_samples or (1 if args.name in DIFFUSION else 10)
    trace = []
    images, labels = model.sample(trace)
    if not trace:
        return model.save(images, labels, count)
    columns = count if 1 < count <= 20 else min(10, len(images))
    save_gif(trajectory_frames(model.frames(trace), columns), args.output)


# --- Command line ---------------------------------------------------------------------------------

# The flags of sampling: which models have them, and what argparse needs.  None is "not given".
# fmt: off
SAMPLING = {
    "steps": (DIFFUSION, {"type": number(int, 1),
        "help": "number of sampling steps, 1 to T (20; ddpm 250; invert 100)"}),
    "guidance": (DIFFUSION, {"type": number(float, 0),
        "help": "strength of the class: 0 none, 1 plain conditional, above 1 guided (1.6; ldm 2.5; "
                "invert 1)"}),
    "guidance-limit": (DIFFUSION, {"type": number(float, 0, 1),
        "help": "guide only at timesteps below this fraction of T, 0 to 1 (0.8)"}),
    "solver": (("ddim", "ldm"), {"choices": ("ddim", "dpm++"),
        "help": "sampler; dpm++ is of second order, for few steps (ddim)"}),
    "eta": (("ddim", "ldm"), {"type": number(float, 0, 1),
        "help": "noise in each step, 0 deterministic to 1 as in DDPM (0)"}),
    "variance": (("ddpm",), {"choices": ("small", "large"),
        "help": "variance of the noise, the posterior's or beta_t (small)"}),
    "clip": (("ddpm", "ddim"), {"action": argparse.BooleanOptionalAction,
        "help": "limit x_0_hat to [-1, 1] (on)"}),
    "prior": (("vae",), {"choices": ("fitted", "normal"),
        "help": "distribution of codes, fitted to each class or N(0, 1) (fitted)"}),
    "truncation": (("vae", "gan"), {"type": number(float, 0.1),
        "help": "resample noise beyond +- this many standard deviations, from 0.1 (off)"}),
}
# fmt: on


def given_flags(args):
    """The flags of SAMPLING that are given, {name: value}; InputError if the model has no such."""
    given = {}
    for flag, (models, _) in SAMPLING.items():
        name = flag.replace("-", "_")
        value = getattr(args, name, None)
        if value is not None:
            given[name] = value
            if args.name not in models:
                raise InputError(f"{args.name} has no --{flag}, only {' and '.join(models)}")
    return given


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="explore.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, draw, models, text, suffixes=(".png", ".npz", ".gif", ""), sampling=()):
        """Add a command; returns its add_argument."""
        first, *_ = text.split(". ")
        sub = commands.add_parser(name, help=first, description=text, allow_abbrev=False)
        sub.set_defaults(draw=draw, suffixes=suffixes, images=(), class_="all")
        add = sub.add_argument
        # fmt: off
        add("name", choices=models, help="the script that trained the model")
        add("--checkpoint", type=Path,
            help="a .pt file or a run's folder (newest run, else the shipped weights)")
        kinds = {"": "a folder of PNGs", ".npz": ".npz of arrays"}
        add("--output", type=Path,
            help=f"the file to write: {', '.join(kinds.get(s, s) for s in suffixes)} "
                 f"(MODEL_{name}{suffixes[0]})")
        add("--seed", type=number(int, 0, 2**63 - 1), default=0,
            help="seed of the noise, 0 or more (0)")
        add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
            help="device to compute on; auto is CUDA or MPS where available, else the CPU (auto)")
        add("--batch-size", type=number(int, 1), default=64,
            help="images computed at a time, 1 or more; all at once where steps are shown (64)")
        add("--data-dir",
            help="folder with the files of the named data set (that of the training; data/, "
                 "Debian's folder, else a download)")
        # fmt: on
        group = sub.add_argument_group("sampling") if sampling else None
        for flag in sampling:
            known, options = SAMPLING[flag]
            only = [model for model in models if model in known]
            which = "" if only == list(models) else f"; {' and '.join(only)} only"
            group.add_argument(f"--{flag}", **options | {"help": options["help"] + which})
        return add

    def classes(add, text="class names or indices, separated by commas, or all (all)", **options):
        add("--class", dest="class_", metavar="NAME", help=text, **options)

    frames = {"type": number(int, 2, 1_000_000), "default": 10}
    count = {"type": number(int, 1, 10_000)}
    walk_flags = ("steps", "guidance", "guidance-limit", "solver")
    file_class = "class of each IMAGE that is a file (an index has its own)"
    image = {"metavar": "IMAGE", "help": "index of a test image, from 0, or an image file"}

    # fmt: off
    add = command("interpolate", interpolate, ("ddim", "vae", "gan"),
        "Frames from one class to another, or from one noise to another in each class. ddim can "
        "jump between two frames: its flow, which is deterministic, parts there between two modes.",
        sampling=(*walk_flags, "clip", "prior", "truncation"))
    classes(add)
    add("--vary", choices=("noise", "class"),
        help="what changes from frame to frame (class if two are given, else noise)")
    add("--num-samples", **frames, help="frames of each row, 2 or more (10)")

    add = command("invert", invert, ("ddim", "ldm"),
        "An image to the noise that leads to it, and back: the three side by side, or a .gif of "
        "the whole way. Prints how far the image that comes back is from the given one. ldm: the "
        "noise is one of latents, shown decoded.",
        sampling=(*walk_flags, "clip"))
    add("images", nargs=1, **image)
    classes(add, file_class)

    add = command("reconstruct", reconstruct, ("vae", "ldm"),
        "Images, and below them what the decoder makes of their codes. Prints how far they are "
        "apart.")
    add("images", nargs="+", **image)
    classes(add, file_class)

    add = command("between", between, ("vae",),
        "Frames from one image to another, on a straight line between their codes and classes.")
    add("images", nargs=2, **image)
    classes(add, file_class)
    add("--num-samples", **frames, help="number of frames, 2 or more (10)")

    add = command("map", draw_map, ("vae", "ldm"),
        f"The codes of up to {MAP_IMAGES} test images as dots in the plane, coloured by class; "
        "ldm: also the paths of samples from noise (small marker) to image (large marker).",
        (".png",), (*walk_flags, "eta"))
    add("--method", choices=("pca", "tsne"), default="pca",
        help="projection: two principal directions, or t-SNE, which takes a minute (pca)")
    classes(add, "ldm: classes of the samples, separated by commas, or all (all)")
    add("--num-samples", **count, default=1, help="ldm: paths of each class, 1 to 10000 (1)")

    add = command("walk", walk, ("vae",),
        "The images of a grid of codes from -2.5 to 2.5, of a VAE trained with --latent-dim 2.")
    classes(add, "class of the images", required=True)
    add("--num-samples", type=number(int, 2, 20), default=16,
        help="images on each side of the grid, 2 to 20 (16)")

    flags = [flag for flag, (models, _) in SAMPLING.items() if set(models) & {*DIFFUSION}]
    add = command("filmstrip", draw_filmstrip, DIFFUSION,
        "Up to 11 steps from noise to image, from left to right: for each sample a row of x_t "
        "above a row of x_0_hat, the image that the network predicts from it.", (".png",), flags)
    classes(add)
    add("--num-samples", **count, default=1, help="samples of each class, 1 to 10000 (1)")

    add = command("gif", gif, (*DIFFUSION, "vae", "gan"),
        "An animation: of diffusion models the steps from noise to image, x_t above x_0_hat; of "
        "vae and gan one sample of each class after the other.", (".gif",), [*SAMPLING])
    classes(add)
    add("--num-samples", **count,
        help="samples of each class, 1 to 10000; vae, gan: frames (1; vae, gan 10)")
    # fmt: on
    return parser


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args = parser.parse_args(argv)
        args.output = args.output or Path(f"{args.name}_{args.command}{args.suffixes[0]}")
        check_output(args.output, args.suffixes, args.images)
        model = Trained(args)
        args.draw(args, model)
        print(f"wrote {args.output} (weights: {model.path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
