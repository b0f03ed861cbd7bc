"""Pictures that are not plain sampling: from image to image, into the noise and back, maps.

    python explore.py interpolate ddim --class Sneaker,Sandal   from one class to another
    python explore.py interpolate gan --class Bag --output bag.gif   from one bag to another
    python explore.py invert ddim 3 --output 3.gif              test image 3 to its noise, and back
    python explore.py inpaint ddim 3 --hole 0,16,32,32          its lower half, filled in anew
    python explore.py edit ldm 3 --class Dress --strength 0.6   a Dress made from it
    python explore.py reconstruct vae 0 1 2                     images, and decoded from their codes
    python explore.py between vae 0 shoe.png --class Sneaker    from one image to another
    python explore.py map vae --method tsne                     codes of real images in the plane
    python explore.py map ldm --class Sneaker,Bag,Trouser       with the paths from noise to samples
    python explore.py walk vae --class Bag --checkpoint runs/vae-2   trained with --latent-dim 2
    python explore.py filmstrip ddpm --class Sneaker,Bag        steps from noise to image
    python explore.py gif ddim --class all                      the same, as an animation
    python explore.py log runs/ddim runs/ddim-2                 losses and speed of trainings

IMAGE is the index of a test image, or a file, whose class --class names.  A command takes the
newest run of its model, else the included weights; `python explore.py COMMAND --help` lists the
models of a command, `python explore.py COMMAND MODEL --help` the flags of both.
"""

import argparse
import inspect
import json
import math
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ddim
import ddpm
import distill
import gan
import ldm
import vae
from common import (
    IMAGE_SIZES, InputError, load_data, load_image, next_noise, noise_streams, parse_classes,
    subsample, to_float, to_uint8,
)  # fmt: skip
from runs import (
    Parser, as_typed, check_finite, check_output, errors_in_one_line, file_path, find_checkpoint,
    grid_columns, image_grid, load_checkpoint, names_of_rows, number, output_path, path_text,
    pick_device, save_images, save_png, written_whole,
)  # fmt: skip

# What several scripts have is the same in each (a test holds this): here it is taken from ddim.py
# for ldm.py too, and from vae.py for gan.py.
SCRIPTS = {
    "ddpm": ddpm, "ddim": ddim, "ldm": ldm, "distill": distill, "vae": vae, "gan": gan,
}  # fmt: skip
DIFFUSION = ("ddpm", "ddim", "ldm", "distill")
CHANGES = ("inpaint", "edit")  # commands that make samples of an image
INVERT_STEPS = 100  # default; the error of an inversion falls with the number of steps
MAP_IMAGES = 5000  # at most so many real images on a map, as its help says
LOSSES = ("loss", "loss_g", "loss_d", "reconstruction", "kl")  # in a log: some, by the script

# --- Method ---------------------------------------------------------------------------------------


def slerp(a, b, weight):
    """Spherical interpolation of two noises, DDIM section 5.3 and appendix D.5.

    It keeps the length of noise, which a straight line loses in the middle.

    a, b: (1, C, H, W);  weight: (B, 1, 1, 1) in [0, 1].  Returns (B, C, H, W).
    """
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.acos(cosine.clamp(max=1 - 1e-6))  # of equal noises, too
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


def lerp_with_length(a, b, weight):
    """Codes on the straight line from a to b, scaled to lengths between theirs.

    a, b: (D,) ~ N(0, 1);  weight: (B, 1) in [0, 1].  Returns (B, D).
    """
    z = torch.lerp(a, b, weight)
    return z / z.norm(dim=1, keepdim=True) * torch.lerp(a.norm(), b.norm(), weight)


def blend(denoise_a, denoise_b, weight):
    """denoise(x_t, t) on the straight line from denoise_a to denoise_b, weight: (B, 1, 1, 1)."""
    return lambda x_t, t: torch.lerp(denoise_a(x_t, t), denoise_b(x_t, t), weight)


def ddim_invert(denoise, x_0, alpha_bars, pairs, prediction, trace=None):
    """Walk from images to the noise that ddim_sample(eta=0) takes back to them.

    DDIM eq. (13) and section 5.4, read the other way: the noise found at x_prev stands in for the
    one at x_t, so that the way back misses by a little, less with more steps.

    The arguments and trace are as in ddim_sample, but x_T is not in the trace.
    Returns x_T, like x_0.
    """
    x_prev = x_0
    for t, t_prev in reversed(pairs):
        t_input = max(t_prev, 0)  # the network knows no t = -1; a clean image passes for t = 0
        alpha_bar = alpha_bars[t_input].item()
        output = denoise(x_prev, t_input)
        x_0_hat, eps_hat = ddim.predict_x_0_and_eps(output, x_prev, prediction, alpha_bar)
        if trace is not None:
            trace.append((t_prev, x_prev, x_0_hat))
        x_prev = ddim.q_sample(x_0_hat, eps_hat, alpha_bars[t].item())
    return x_prev


def repaint(
    denoise, x_0, known, alpha_bars, pairs, prediction, noise, eta=1.0, clip=True, repeats=1
):
    """Sample what is not known of an image: RePaint, Lugmayr et al. 2022 (arXiv:2201.09865).

    Equation (8): after each step the known part is that of the image, noised to this step.
    Algorithm 1: a step is taken `repeats` times, noised back to t in between, so that parts fit.

    x_0: (1, C, H, W), or as many as noise() has;  known: bool (H, W);  noise: () -> (B, C, H, W);
    the rest: as in ddim_sample.  Returns (B, C, H, W).
    """
    x_t = x_prev = noise()
    for t, t_prev in pairs:
        alpha_bar_t = alpha_bars[t].item()
        alpha_bar_prev = alpha_bars[t_prev].item() if t_prev >= 0 else 1.0
        for i in range(repeats if t_prev >= 0 else 1):
            if i > 0:  # back to t, DDPM eq. (2)
                x_t = ddim.q_sample(x_prev, noise(), alpha_bar_t / alpha_bar_prev)
            output = denoise(x_t, t)
            hats = ddim.predict_x_0_and_eps(output, x_t, prediction, alpha_bar_t, clip)
            x_prev = ddim.ddim_step(*hats, alpha_bar_t, alpha_bar_prev, eta, noise())
            x_prev = torch.where(known, ddim.q_sample(x_0, noise(), alpha_bar_prev), x_prev)
        x_t = x_prev
    return x_t


def project(codes, method, others=None):
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


def filmstrip(trace, rows=None):
    """One picture of at most 11 steps, first and last included: for each image x_t above x_0_hat.

    trace: as in trajectory_frames;  rows: names beside the rows.  Returns a PIL picture.
    """
    last = len(trace) - 1
    moments = [trace[i] for i in sorted({round(k * last / 10) for k in range(11)})]
    columns = [torch.stack([x_t, x_0_hat], dim=1) for _, x_t, x_0_hat in moments]
    cells = torch.stack(columns, dim=2)  # (B, 2, moments, C, H, W)
    return image_grid(cells.flatten(0, 2), len(moments), rows)


def save_gif(frames, path):
    """Write a list of PIL pictures as an endless GIF that rests on its last frame for a second."""
    durations = [80] * (len(frames) - 1) + [1000]  # milliseconds
    first, *rest = frames
    with written_whole(path) as scratch:
        first.save(scratch, "gif", save_all=True, append_images=rest, duration=durations, loop=0)


def new_figure(width, height, what):
    """A matplotlib figure, its sides in 100 pixels; InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{what} needs matplotlib: pip install matplotlib") from error
    return Figure((width, height), dpi=100, layout="constrained")


def save_map(axes, points, labels, class_names, path, lines=()):
    """Write dots coloured by class, and lines from a small marker at the start to a large one.

    axes: of new_figure;  points: (N, 2);  labels: int64 (N,);  lines: [((S, 2), label), ...].
    """
    from matplotlib import colormaps

    few = len(class_names) <= 10
    colours = colormaps["tab10" if few else "gist_rainbow"]
    for y in labels.unique().tolist():
        colour = colours(y if few else y / len(class_names))
        name = legend_text(class_names[y]) if y < 40 else None  # more would not fit into the legend
        axes.scatter(*points[labels == y].T, 5, color=[colour], linewidths=0, label=name)
    for line, y in lines:
        colour = colours(y if few else y / len(class_names))
        axes.plot(*line.T, color="black", linewidth=3.5)
        axes.plot(*line.T, color=colour, linewidth=2)
        for end, size in ((line[0], 6), (line[-1], 13)):
            axes.plot(*end, "o", color=colour, markersize=size, markeredgecolor="black")
    axes.figure.legend(loc="outside right upper", markerscale=4, frameon=False)
    with written_whole(path) as scratch:
        axes.figure.savefig(scratch, format="png")


def legend_text(name):
    """A name as matplotlib shows it as it is: it hides those after a _, and sets $...$ as maths."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")


def read_log(path):
    """The lines of a log that have a loss, a list of dicts, each with `images`, trained on so far.

    path: a .jsonl file, or the folder of a run.  `images` are missing where neither the log has
    them nor the checkpoint beside it, as it is beside pretrained/*.log.jsonl.  Raises InputError.
    """
    if path.is_dir():  # a run of ldm.py that is in stage 1 has only the other
        logs = [path / "log.jsonl", path / "autoencoder_log.jsonl"]
        path = next((log for log in logs if log.is_file()), logs[0])
    try:
        texts = path.read_text().splitlines()
        lines = [json.loads(text) for text in texts[:-1]]
        with suppress(ValueError if lines else ()):  # a full disk leaves half a line at the end
            lines += [json.loads(text) for text in texts[-1:]]
        lines = [line for line in lines if line.keys() & {*LOSSES} and "step" in line]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the log of a training ({error})") from error
    if len(lines) < 2:
        raise InputError(f"{path} has fewer than two lines with a loss: nothing to draw yet")
    drawn = {"step", "seconds"} | (lines[0].keys() & {*LOSSES, "lr", "images"})
    for line in lines:
        if wrong := [key for key in sorted(drawn) if not isinstance(line.get(key), int | float)]:
            at = f"its line of step {line['step']} has no number {wrong[0]!r}"
            raise InputError(f"{path} is not the log of one training: {at}")
    checkpoint = Path(str(path).removesuffix(".log.jsonl") + ".pt")
    if "images" not in lines[0] and checkpoint.is_file():
        whole = load_checkpoint(checkpoint, SCRIPTS)
        lines = [{"images": whole["images"] * x["step"] / whole["step"], **x} for x in lines]
    return lines


def draw_log(logs, path):
    """Four diagrams: losses, loss by tenth of t, learning rate, images/s.

    logs: {name: lines of read_log};  path: of the .png.  What a log does not have is left out.
    """
    figure = new_figure(14, 9, "log")
    losses, tenths, rates, speeds = figure.subplots(2, 2).flat
    losses.set(title="loss", xlabel="step", xscale="log")
    text = "loss by tenth of t, over that of output 0: early (pale), half-way, at the end"
    tenths.set(title=text, xlabel="t / T", yscale="log")
    rates.set(title="learning rate", xlabel="step")
    speeds.set(title="images/s", xlabel="step")
    keys = [key for key in LOSSES if any(key in lines[0] for lines in logs.values())]
    smallest = min(line.get(key, 1) for lines in logs.values() for line in lines for key in keys)
    losses.set_yscale("log" if smallest > 0 else "symlog")
    for i, (name, lines) in enumerate(logs.items()):
        colour = {"color": f"C{i % 10}", "linewidth": 1}
        steps = [line["step"] for line in lines]
        for key, style in zip(LOSSES, ("-", "-", "--", "-", "--"), strict=True):
            if key in lines[0]:
                text = legend_text(name if key == "loss" else f"{name}: {key}")
                losses.plot(steps, [line[key] for line in lines], style, label=text, **colour)
        by_tenth = [line["loss_by_tenth_of_t"] for line in lines if "loss_by_tenth_of_t" in line]
        for part, alpha in ((10, 0.3), (2, 0.6), (1, 1)) if by_tenth else ():
            at = len(by_tenth) // part
            recent = by_tenth[max(at - 10, 0) : max(at, 1)]  # the mean of ten lines
            means = np.ma.masked_invalid(np.array(recent, float)).mean(axis=0)  # None: of no image
            tenths.plot(np.arange(10) / 10 + 0.05, means, "o-", alpha=alpha, **colour)
        if "lr" in lines[0]:
            rates.plot(steps, [line["lr"] for line in lines], **colour)
        if "images" in lines[0]:
            passed = np.diff([(line["images"], line["seconds"]) for line in lines], axis=0)
            speeds.plot(steps[1:], passed[:, 0] / passed[:, 1], **colour)
    speeds.set_ylim(bottom=0)
    losses.legend()
    with written_whole(path) as scratch:
        figure.savefig(scratch, format="png")


# --- Models and images ----------------------------------------------------------------------------


def print_error(x, back):
    """Print how far two sets of images (N, C, H, W) in [-1, 1] are apart."""
    check_finite(back)
    errors = (to_uint8(back).float() - to_uint8(x).float()).abs().flatten(1).mean(1)
    text = f"mean absolute error {errors.mean():.2f} of 255 grey levels"
    if len(errors) > 1:
        text += f", of the worst image {errors.max():.2f}"
    print(text)


def sampler_options(args, script, config):
    """What the flags and the training say of a walk, {argument of sample(): value}.

    script: of a diffusion model;  config: the checkpoint's.  Raises InputError.
    """
    if args.command in ("interpolate", "invert", "edit") and args.eta > 0:
        raise InputError(f"{args.command} is deterministic: --eta must be 0, not {args.eta}")
    steps = script.STEPS
    guidance = script.default_guidance(config)
    if args.command == "invert":
        steps = INVERT_STEPS
        guidance = min(guidance, 1.0)  # a guided walk does not find its way back
    steps = min(steps, script.max_steps(config)) if args.steps is None else args.steps
    guidance = guidance if args.guidance is None else args.guidance
    script.check_sampling(config, steps, guidance)
    options = {key: getattr(args, key) for key in script.SAMPLER_FLAGS}
    if guidance <= 1 and tuple(args.guidance_interval) != script.GUIDANCE_INTERVAL:
        raise InputError("--guidance-interval is for a guidance above 1: leave it out")
    return {"steps": steps, "guidance": guidance, **options}


class Trained:
    """A model with its averaged weights, and how the flags say to use it.  Raises InputError."""

    def __init__(self, args):
        self.args = args
        self.script = SCRIPTS[args.name]
        stems = self.script.SAMPLES_FROM
        self.path = find_checkpoint(stems, args.checkpoint, stems)
        checkpoint = load_checkpoint(self.path, stems)
        self.config = checkpoint["config"]
        self.image_size = self.config.get("image_size", 32)
        self.background = self.config.get("background", "white")  # of an older run, none
        self.names = checkpoint["class_names"]
        self.classes = parse_classes(args.class_ or "all", self.names, self.path)
        self.latent = args.name == "ldm"
        if "hole" in args and args.hole is None:
            args.hole = (0, self.image_size // 2, self.image_size, self.image_size)
        self.options = {}  # of sample()
        if "steps" in args:
            self.options = sampler_options(args, self.script, self.config)
        flags = ("hole", "repeats", "strength", "mix_at", "truncation", "prior", "seed")
        shown = {key: getattr(args, key) for key in flags if getattr(args, key, None) is not None}
        self.settings = {key: as_typed(value) for key, value in {**self.options, **shown}.items()}
        if "truncation" in args:
            self.options["truncation"] = args.truncation
        if "prior" in args:
            self.options["prior"] = checkpoint["prior"] if args.prior == "fitted" else None
            if checkpoint["prior"] is None and args.prior == "fitted":
                print(f"{self.path} has no fitted prior: codes are samples of N(0, 1)")
                self.settings["prior"] = "normal"
        guidance = self.options.get("guidance", self.config.get("guidance"))  # that of a student
        if guidance == 0 and args.command not in ("invert", "reconstruct"):
            print("guidance 0 ignores the class: the images are of any")
            args.names = False
        self.device = pick_device(args.device)
        self.network = self.script.ema_network(checkpoint, self.device)

    def sample(self, trace=None):
        """--num-samples images of each class: (N, C, H, W), and their labels int64 (N,).

        trace: as in ddim_sample, of a diffusion model.
        """
        labels = torch.tensor(self.classes).repeat_interleave(self.args.num_samples)
        options = {"seed": self.args.seed, **self.options}
        if self.args.name in DIFFUSION:
            options |= {"config": self.config, "trace": trace, "batch_size": len(labels)}
        else:
            options["batch_size"] = self.args.batch_size
        images = self.script.sample(model=self.network, labels=labels, **options)
        check_finite(images)
        return images, labels

    def noise(self, indices, shape):
        """A function that returns the next noise of these images: float32 (N, *shape)."""
        streams = noise_streams(self.args.seed, indices)
        return lambda: torch.from_numpy(next_noise(streams, shape)).to(self.device)

    def schedule(self, strength=1.0):
        """alpha_bars, pairs and prediction, for a walk that `sample` does not take.

        strength: the fraction of the timesteps that it covers, with as many steps as there can be.
        """
        alpha_bars = ddim.schedule_of(self.config)
        prediction = self.config["prediction"]
        length = ddim.walk_length(alpha_bars, prediction)
        length = max(round(strength * length), 1)
        # From a part of the way on, the short steps of dpm_pairs near noise have no use.
        is_dpm = self.options["solver"] == "dpm++" and strength == 1
        pairs_of = ddim.dpm_pairs if is_dpm else ddim.time_pairs
        pairs = pairs_of(length, min(self.options["steps"], length))
        self.settings["steps"] = len(pairs)  # a part of the way may have fewer than asked for
        guidance, start, stop = self.options["guidance"], *self.guided_times()
        if guidance > 1 and not any(start <= t < stop for t, _ in pairs):
            self.settings["guidance"] = f"{guidance:g} (counts as 1: no step is guided)"
        return alpha_bars, pairs, prediction

    def denoiser(self, y):
        """denoise(x_t, t) of classes y, int64 (B,)."""
        network = self.network.denoiser if self.latent else self.network
        times = self.guided_times()
        return ddim.guided(network, y.to(self.device), self.options["guidance"], *times)

    def guided_times(self):
        """(start, stop) of the timesteps at which guidance above 1 acts."""
        return ddim.guided_times(self.options["guidance_interval"], self.config["num_timesteps"])

    def solve(self, denoise, x_t, trace=None, schedule=None, last=None):
        """Walk from noise to images, or latents, without noise in the steps.

        last: as in dpm_sample, which ddim_sample has no use for.
        """
        sampler = ddim.ddim_sample
        if self.options["solver"] == "dpm++":
            sampler = partial(ddim.dpm_sample, last=last)
        clip = self.options.get("clip", False)  # latents have no bounds
        schedule = schedule or self.schedule()
        return sampler(denoise, x_t.to(self.device), *schedule, clip=clip, trace=trace)

    def encode(self, images, labels):
        """The codes (N, D), or latents (N, C, h, w), of uint8 images (N, C, H, W)."""
        if self.latent:
            return self.network.to_latents(images).cpu()
        mu, _ = vae.encode(self.network, images, labels)
        return mu

    def start_of(self, images, labels):
        """Where a walk from uint8 images begins: the images in [-1, 1], or their latents."""
        start = self.encode(images, labels) if self.latent else to_float(images)
        return start.to(self.device)

    def one_hot(self, labels):
        """int64 (N,) -> float (N, num_classes)."""
        return vae.one_hot(labels, len(self.names))

    def decode(self, z, classes):
        """Images on the CPU of codes, or of latents; classes: (N, num_classes), as in Decoder."""
        if self.latent:
            return self.network.to_images(z.to(self.device)).cpu()
        decode = gan.generate if self.args.name == "gan" else vae.decode
        return decode(self.network, z, classes, self.args.batch_size)

    def decode_trace(self, trace):
        """A trace in images on the CPU."""
        if self.latent:
            to_images = self.network.to_images
            trace = [(t, to_images(z_t), to_images(z_0_hat)) for t, z_t, z_0_hat in trace]
        return [(t, x_t.cpu(), x_0_hat.cpu()) for t, x_t, x_0_hat in trace]

    def test_data(self):
        """The test images of the data set of the training, or all images if it has no others."""
        name, folder = self.args.data, self.args.data_dir
        if not name:  # that of the training, with its folder
            name, folder = self.config["data"], folder or self.config["data_dir"]
        skip_broken = self.config.get("skip_broken", False) and Path(name).is_dir()
        data = load_data(
            name, folder, self.config["channels"], train=False, background=self.background,
            skip_broken=skip_broken, image_size=self.image_size,
        )  # fmt: skip
        if data.class_names != self.names:
            wanted = "name that one with --data"
            raise InputError(f"the data set no longer has the classes of the training: {wanted}")
        return data

    def given_images(self):
        """The images of the command line: uint8 (N, C, H, W), and their labels int64 (N,)."""
        if len(self.args.images) > 20:
            raise InputError(f"{len(self.args.images)} images are too many: at most 20")
        indices = [name.isdecimal() for name in self.args.images]
        if not any(indices) and (self.args.data or self.args.data_dir):
            raise InputError("--data and --data-dir are for indices of test images: leave them out")
        given = self.args.class_ is not None and self.args.command not in CHANGES
        if given and all(indices):
            raise InputError("--class is for image files: a test image has a class of its own")
        images = []
        labels = []
        data = None
        for name in self.args.images:
            if name.isdecimal():
                data = data or self.test_data()
                last = len(data.images) - 1
                if int(name) > last:
                    raise InputError(f"there is no test image {name}: indices are 0 to {last}")
                images.append(data.images[int(name)][None])
                labels.append(data.labels[int(name)].item())
            else:
                if len(self.classes) > 1:
                    whose = "the samples" if self.args.command in CHANGES else "the image"
                    raise InputError(f"{name} needs a single --class, that of {whose}")
                options = (self.config["channels"], self.background, self.image_size)
                image = load_image(name, *options)
                if (image == image[:, :, :1, :1]).all():
                    print(f"warning: {name} is constant, of one colour")
                images.append(image)
                labels.append(self.classes[0])
        return torch.cat(images), torch.tensor(labels)

    def target(self, labels):
        """The class of samples made from an image: --class, else the image's; int64 (1,)."""
        if self.args.class_ is None:
            return labels
        if len(self.classes) > 1:
            raise InputError(f"{self.args.command} needs a single --class")
        return torch.tensor(self.classes)

    def save(self, images, labels, count, rows=None):
        """Write images (N, C, H, W), `count` a row, as runs.py does, or the columns as a .gif.

        rows: names beside the rows (those of their classes).
        """
        if self.args.output.suffix.lower() == ".gif":
            check_finite(images)
            columns = images.unflatten(0, (-1, count)).unbind(1)
            frames = [image_grid(column, min(10, len(column))) for column in columns]
            save_gif(frames, self.args.output)
        else:
            columns = grid_columns(count, len(images))
            if rows and len(rows) > 1:  # a row of one image, too
                columns = min(columns, count)
            if len(images) > count > columns and self.args.output.suffix.lower() == ".png":
                images, labels = (filled_up(part, count, columns) for part in (images, labels))
            if not getattr(self.args, "names", False):
                rows = None
            elif rows and len(rows) == 1:  # of all images, in however many rows
                rows = rows * math.ceil(len(images) / columns)
            elif rows is None or columns != count:
                rows = names_of_rows(labels.tolist(), self.names, columns)
            save_images(images, labels, self.names, self.args.output, columns, self.texts(), rows)

    def save_changes(self, images, labels, y):
        """Write an image, what is left of it, and samples of class y that were made from it."""
        labels = torch.cat([labels, labels, y])
        names = [" to ".join(dict.fromkeys(self.names[i] for i in labels.tolist()))]
        self.save(torch.cat(images), labels, len(labels), names)

    def texts(self):
        """What a PNG says of how it was made."""
        about = {"model": self.args.name, "command": self.args.command, **self.settings}
        return {**about, "Software": "explore.py"}


def filled_up(rows, count, columns):
    """Rows of `count` images or labels, each followed by as many black or equal ones as it takes.

    So each begins in a new row of a grid of so many columns.
    """
    parts = []
    for row in rows.split(count):
        fill = row[-1:].expand(-count % columns, *row.shape[1:])
        parts += [row, fill if row.ndim == 1 else torch.full_like(fill, -1)]
    return torch.cat(parts)


# --- Commands -------------------------------------------------------------------------------------
# Each writes its picture to args.output, and its docstring is its --help; model: Trained.


def interpolate(args, model):
    """Frames from one class to another, or from one noise to another in each class.

    ddim may jump between two neighbouring frames, where its deterministic flow separates two modes.
    With --mix-at below 1 each end walks by itself to this fraction of T, where it has its outlines;
    there the two are mixed, as in DDPM section 4.3, so that frames change more evenly.
    """
    has_two = len(model.classes) == 2 == len({*model.classes})
    vary = args.vary or ("class" if has_two else "noise")
    if vary == "class":
        if not has_two:
            raise InputError("--vary class needs two classes, as in --class Sneaker,Bag")
        rows = [(*model.classes, 0, 0)]
    else:
        rows = [(y, y, 0, 1) for y in model.classes]
    frames = noise_frames if args.name == "ddim" else code_frames
    weights = torch.linspace(0, 1, args.num_samples).split(args.batch_size)
    images = torch.cat([frames(model, *row, weight) for row in rows for weight in weights])
    count = args.num_samples  # a frame is of the class that is nearer
    labels = [y_b if 2 * k >= count else y_a for y_a, y_b, _, _ in rows for k in range(count)]
    names = [" to ".join(model.names[y] for y in model.classes)] if vary == "class" else None
    model.save(images, torch.tensor(labels), count, names)


def noise_frames(model, y_a, y_b, i, j, weight):
    """Images of ddim from class y_a and noise i to class y_b and noise j; weight: (B,)."""
    weight = weight.view(-1, 1, 1, 1).to(model.device)
    shape = (model.config["channels"], model.image_size, model.image_size)
    ends = model.noise([i, j], shape)().split(1)

    # Each end by itself down to --mix-at, which is no step where that is 1.
    alpha_bars, pairs, prediction = model.schedule()
    middle = model.args.mix_at * model.config["num_timesteps"]
    early = [pair for pair in pairs[:-1] if pair[0] >= middle]
    late = pairs[len(early) :]
    classes = torch.tensor([[y_a], [y_b]])
    traces = [[], []]
    ends = [
        model.solve(model.denoiser(y), x_T, trace, schedule=(alpha_bars, early, prediction))
        for y, x_T, trace in zip(classes, ends, traces, strict=True)
    ]

    # DPM-Solver++ goes on from its last step, whose x_0_hat is mixed as well.
    x_t = slerp(*ends, weight)
    last = None
    if early:
        (t, _, x_0_a), (_, _, x_0_b) = (trace[-2] for trace in traces)
        last = torch.lerp(x_0_a, x_0_b, weight), alpha_bars[t].item()
    denoise = model.denoiser(torch.full((len(x_t),), y_a))
    if y_a != y_b:
        denoise = blend(denoise, model.denoiser(torch.full((len(x_t),), y_b)), weight)
    return model.solve(denoise, x_t, schedule=(alpha_bars, late, prediction), last=last).cpu()


def code_frames(model, y_a, y_b, i, j, weight):
    """Images of vae or gan, as in noise_frames."""
    weight = weight[:, None]
    prior = model.options.get("prior")
    if prior is not None:
        prior = vae.by_class({key: value.numpy() for key, value in prior.items()})
    streams = noise_streams(model.args.seed, [i, j])
    truncation = model.options["truncation"]
    codes = vae.sample_codes(prior, [y_a, y_b], streams, model.network.latent_dim, truncation)
    z_a, z_b = torch.from_numpy(codes)
    # A GAN's codes have about one length, which a straight line loses; a VAE's lie around the mean
    # of their class.
    mix = lerp_with_length if model.args.name == "gan" and i != j else torch.lerp
    class_a, class_b = model.one_hot(torch.tensor([y_a, y_b]))
    return model.decode(mix(z_a, z_b, weight), torch.lerp(class_a, class_b, weight))


def invert(args, model):
    """Images to the noise that leads to them, and back: the three side by side, a row for each.

    A .gif has all steps.  Prints how far what comes back is from what was given.  ldm: the noise is
    one of latents, shown decoded.
    """
    images, labels = model.given_images()
    x_0 = to_float(images)
    denoise = model.denoiser(labels)
    trace = []
    x_T = ddim_invert(denoise, model.start_of(images, labels), *model.schedule(), trace)
    steps = len(trace)
    model.solve(denoise, x_T, trace)
    (_, noise, _), (_, back, _) = model.decode_trace([trace[steps], trace[-1]])
    print(f"{steps} steps each way")
    print_error(x_0, back)
    if args.output.suffix.lower() == ".gif":
        save_gif(trajectory_frames(model.decode_trace(trace), 1), args.output)
    else:
        rows = torch.stack([x_0, noise, back], dim=1).flatten(0, 1)
        model.save(rows, labels.repeat_interleave(3), 3)


def inpaint(args, model):
    """A part of an image filled in anew: the image, what is known of it, and the samples.

    ldm: the known latents are those of the image, its known pixels are put back in the end.
    """
    images, labels = model.given_images()
    x_0 = to_float(images)
    start = model.start_of(images, labels)
    size = model.image_size
    left, top, right, bottom = args.hole
    if max(args.hole) > size:
        raise InputError(f"--hole {args.hole}: the images have {size}x{size} pixels")
    scale = size // start.shape[-1]
    if any(edge % scale for edge in args.hole):
        raise InputError(f"--hole {args.hole} must be multiples of {scale}, the pixels of a latent")
    known = torch.ones(size, size, dtype=torch.bool)
    known[top:bottom, left:right] = False

    y = model.target(labels).expand(args.num_samples)
    noise = model.noise(range(len(y)), start.shape[1:])
    mask = known[::scale, ::scale].to(model.device)
    options = {"eta": args.eta, "clip": model.options.get("clip", False), "repeats": args.repeats}
    filled = repaint(model.denoiser(y), start, mask, *model.schedule(), noise, **options)
    filled = model.decode(filled, None) if model.latent else filled.cpu()
    shown = [x_0, torch.where(known, x_0, 0), torch.where(known, x_0, filled)]
    model.save_changes(shown, labels, y)


def edit(args, model):
    """SDEdit, an image noised and denoised again: the image, the noised image, and the samples.

    Meng et al. 2021 (arXiv:2108.01073), here with deterministic steps.  More --strength is more
    noise, and leaves less of the image.
    """
    images, labels = model.given_images()
    x_0 = to_float(images)
    start = model.start_of(images, labels)
    y = model.target(labels).expand(args.num_samples)
    alpha_bars, pairs, prediction = model.schedule(args.strength)
    eps = model.noise(range(len(y)), start.shape[1:])()
    x_t = ddim.q_sample(start, eps, alpha_bars[pairs[0][0]].item())
    trace = []
    model.solve(model.denoiser(y), x_t, trace, schedule=(alpha_bars, pairs, prediction))
    (_, noised, _), (_, samples, _) = model.decode_trace([trace[0], trace[-1]])
    model.save_changes([x_0, noised[:1], samples], labels, y)


def reconstruct(args, model):
    """Images, and below them what the decoder makes of their codes.

    Prints how far they are apart.
    """
    images, labels = model.given_images()
    x = to_float(images)
    back = model.decode(model.encode(images, labels), model.one_hot(labels))
    print_error(x, back)
    model.save(torch.cat([x, back]), labels.repeat(2), len(x), ["given", "decoded"])


def between(args, model):
    """Frames from one image to another, on a straight line between their codes and classes."""
    images, labels = model.given_images()
    weight = torch.linspace(0, 1, args.num_samples)[:, None]
    z_a, z_b = model.encode(images, labels)
    class_a, class_b = model.one_hot(labels)
    frames = model.decode(torch.lerp(z_a, z_b, weight), torch.lerp(class_a, class_b, weight))
    names = [" to ".join(dict.fromkeys(model.names[y] for y in labels))]
    labels = labels[(weight[:, 0] >= 0.5).long()]  # of the image that is nearer
    model.save(frames, labels, len(frames), names)


def draw_map(args, model):
    """The codes of up to 5000 test images as dots in the plane, coloured by class.

    Of training images, where the data have no others.
    ldm: also the paths of samples from noise (small marker) to image (large marker).
    """
    if args.name == "vae" and model.config["latent_dim"] < 2:
        raise InputError("map needs a VAE with --latent-dim 2 or more; this one has 1")
    axes = new_figure(10.5, 9, "a map").add_subplot()
    data = model.test_data()
    labels = subsample(data.labels, MAP_IMAGES)
    codes = model.encode(subsample(data.images, MAP_IMAGES), labels).flatten(1)
    check_finite(codes)
    method = f" by {args.method}"
    if codes.shape[1] == 2:
        print(f"codes of two numbers are points already: drawn as they are, not by {args.method}")
        method = ""
    axes.set_title(f"{'latents' if model.latent else 'codes'} of images{method} ({args.name})")
    lines = []
    if model.latent:
        trace = []
        _, classes = model.sample(trace)
        paths = torch.stack([z_t.cpu() for _, z_t, _ in trace], dim=1).flatten(2)
        points = project(codes, args.method, others=paths.flatten(0, 1))
        ends = points[len(codes) :].unflatten(0, paths.shape[:2])  # (samples, moments, 2)
        lines = zip(ends, classes.tolist(), strict=True)
    else:
        points = project(codes, args.method)
    save_map(axes, points[: len(codes)], labels, model.names, args.output, lines)


def walk(args, model):
    """The images of a grid of codes from -2.5 to 2.5, of a VAE trained with --latent-dim 2."""
    dim = model.config["latent_dim"]
    if dim != 2:
        raise InputError(f"walk needs a VAE with --latent-dim 2; this one has {dim}")
    if len(model.classes) != 1:
        raise InputError("walk needs a single --class")
    axis = torch.linspace(-2.5, 2.5, args.num_samples)
    z = torch.cartesian_prod(-axis, axis).flip(1)  # rows from above, the first number to the right
    labels = torch.tensor(model.classes).expand(len(z))
    model.save(model.decode(z, model.one_hot(labels)), labels, args.num_samples)


def draw_filmstrip(args, model):
    """Up to 11 steps from noise to image, from left to right.

    A sample has a row of x_t above a row of x_0_hat, the image that the network predicts from it.
    """
    trace = []
    _, labels = model.sample(trace)
    names = [f"{model.names[y]}, {what}" for y in labels for what in ("x_t", "x_0_hat")]
    picture = filmstrip(model.decode_trace(trace), names if args.names else None)
    save_png(picture, args.output, model.texts())


def gif(args, model):
    """An animation: the steps from noise to image, or of vae and gan one sample after the other.

    A step has x_t above x_0_hat, the image that the network predicts from it.
    """
    trace = []
    images, labels = model.sample(trace)
    if args.name in DIFFUSION:
        columns = grid_columns(args.num_samples, len(images))
        save_gif(trajectory_frames(model.decode_trace(trace), columns), args.output)
    else:
        model.save(images, labels, args.num_samples)


# --- Command line ---------------------------------------------------------------------------------

# The function of each command, its models, and suffixes of its output, "" for a folder.
SUFFIXES = (".png", ".npz", ".gif", "")
COMMANDS = {
    "interpolate": (interpolate, ("ddim", "vae", "gan"), SUFFIXES),
    "invert": (invert, ("ddim", "ldm"), SUFFIXES),
    "inpaint": (inpaint, ("ddim", "ldm"), SUFFIXES),
    "edit": (edit, ("ddim", "ldm"), SUFFIXES),
    "reconstruct": (reconstruct, ("vae", "ldm"), SUFFIXES),
    "between": (between, ("vae",), SUFFIXES),
    "map": (draw_map, ("vae", "ldm"), (".png",)),
    "walk": (walk, ("vae",), SUFFIXES),
    "filmstrip": (draw_filmstrip, DIFFUSION, (".png",)),
    "gif": (gif, (*DIFFUSION, "vae", "gan"), (".gif",)),
}


def box(text):
    """An argparse type: '0,16,32,32' -> (0, 16, 32, 32): left < right, top < bottom, in pixels."""
    edges = [number(int, 0, max(IMAGE_SIZES))(part) for part in text.split(",")]
    if len(edges) != 4 or edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM of a box")
    return tuple(edges)


def add_flags(parser, command, name):
    """Add the flags that have an effect on the command with the model `name`."""
    script = SCRIPTS[name]
    changes = command in CHANGES
    reads_images = changes or command in ("invert", "reconstruct", "between")
    samples = command in ("interpolate", "filmstrip", "gif") or (command, name) == ("map", "ldm")
    parser.set_defaults(images=(), class_=None if reads_images else "all")
    add = parser.add_argument
    # fmt: off
    if reads_images:
        count = {"inpaint": 1, "edit": 1, "between": 2}.get(command, "+")
        add("images", type=path_text, metavar="IMAGE", nargs=count,
            help="index of a test image, from 0 (where the data have no test images, of any), or "
                 "an image file")
        add("--class", dest="class_", metavar="NAME",
            help="class of the samples (that of the test image)" if changes else
                 "class of each IMAGE that is a file (an index has its own)")
    elif command == "walk":
        add("--class", dest="class_", metavar="NAME", required=True, help="class of the images")
    elif samples:
        add("--class", dest="class_", metavar="NAME",
            help="class names, unique prefixes or indices, separated by commas, or all (all)")
    if command == "interpolate":
        add("--vary", choices=("noise", "class"),
            help="what changes from frame to frame (class if two are given, else noise)")
    if (command, name) == ("interpolate", "ddim"):
        add("--mix-at", type=number(float, 0, 1, above=True), default=1.0,
            help="fraction of T at which the two ends are mixed, above 0 to 1; at 1 "
                 "their noise is mixed (1)")
    if command == "inpaint":
        add("--hole", type=box, metavar="LEFT,TOP,RIGHT,BOTTOM",
            help="what is filled in, in pixels from 0 to the image's size (its lower half)")
        add("--repeats", type=number(int, 1, 100), default=5,
            help="times that each step is taken, 1 to 100; more, and the parts fit better (5)")
    if command == "edit":
        add("--strength", type=number(float, 0, 1, above=True), default=0.6,
            help="fraction of the walk's length that the image is noised to, above 0 to 1 (0.6)")
    if command == "map":
        add("--method", choices=("pca", "tsne"), default="pca",
            help="projection: two principal directions, or t-SNE, which takes a minute (pca)")
    if command in ("interpolate", "between"):
        add("--num-samples", type=number(int, 2, 1_000_000), default=10,
            help="frames of each row, 2 to 1,000,000; above 20 they fill several of a .png (10)")
    elif command == "walk":
        add("--num-samples", type=number(int, 2, 20), default=16,
            help="images on each side of the grid, 2 to 20 (16)")
    elif changes:
        add("--num-samples", type=number(int, 1, 18), default=8, help="samples, 1 to 18 (8)")
    elif samples:
        count = 10 if name in ("vae", "gan") else 1
        add("--num-samples", type=number(int, 1, 10_000), default=count,
            help=f"samples of each class, 1 to 10,000 ({count})")
    add("--checkpoint", type=file_path,
        help="a .pt file or a run's folder (newest run, for ddim and ddpm that of either "
             "script, else the included weights)")
    _, _, suffixes = COMMANDS[command]
    kinds = {".npz": ".npz of arrays", "": "a folder of PNGs, as in out/"}
    listed = ", ".join(kinds.get(suffix, suffix) for suffix in suffixes)
    output = Path(f"{name}_{command}{suffixes[0]}")
    text = f"the file to write: {listed} ({output})"
    add("--output", type=output_path, default=output, help=text)
    if command not in ("map", "walk", "gif"):
        add("--names", action=argparse.BooleanOptionalAction, default=True,
            help="class names beside the rows of a .png grid (on)")
    if reads_images or command == "map":
        add("--data", type=path_text,
            help="the data of the training, where they have moved (where they were)")
        add("--data-dir", type=path_text,
            help="folder with the files of the named data set (that of the training; data/, "
                 "Debian's folder, else a download)")
    if samples or changes:
        add("--seed", type=number(int, 0, 2**63 - 1), default=0,
            help="seed of the noise, 0 or more (0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="device to compute on; auto is CUDA or MPS where available, else the CPU (auto)")
    if command == "interpolate" or (name in ("vae", "gan") and command != "map"):
        add("--batch-size", type=number(int, 1, 1_000_000), default=64,
            help="images computed at a time, 1 to 1,000,000 (64)")
    if name != "distill" and (samples or changes or command == "invert"):  # it has one walk
        script.sampling_flags(parser)
    parser.conflict_handler = "resolve"  # these take the place of flags with other defaults
    add = parser.add_argument_group(f"{command} by default").add_argument
    if command == "inpaint":
        add("--eta", type=number(float, 0, 1), default=1.0,
            help="noise added in each step, from 0 to 1, as in DDPM (1)")
        add("--solver", choices=("ddim",), default="ddim",
            help="sampler: ddim, since dpm++ adds no noise (ddim)")
    if command in ("interpolate", "invert", "edit") and name in DIFFUSION:
        add("--eta", type=number(float, 0, 1), default=0.0,
            help="noise added in each step: must be 0, the walk is deterministic (0)")
    if command == "invert":
        add("--steps", type=number(int, 1),
            help="number of steps each way, 1 to the number of training timesteps, or to some "
                 f"fewer where the network predicts eps ({INVERT_STEPS})")
        add("--guidance", type=number(float, 0, 1000),
            help="guidance weight, 0 to 1000: 0 ignores the class, 1 is conditional; above 1 the "
                 "way back misses the image (1)")
        add("--solver", choices=("ddim", "dpm++"), default="ddim",
            help="sampler of the way back: ddim, whose steps are inverted, or dpm++ (ddim)")
    # fmt: on


def build_parser():
    parser = Parser(prog="explore.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (draw, names, _) in COMMANDS.items():
        text = inspect.getdoc(draw)
        examples = [line for line in __doc__.splitlines() if f"explore.py {command} " in line]
        description = "\n".join([text, "", *examples])
        sub = commands.add_parser(command, help=text.splitlines()[0], description=description)
        which = f"{', '.join(names)}: the script that trained the model; MODEL --help has its flags"
        models = sub.add_subparsers(dest="name", metavar="MODEL", required=True, help=which)
        for name in names:
            add_flags(models.add_parser(name, description=description), command, name)
    text = "Losses, loss by tenth of t, learning rate and images/s of trainings, from their logs."
    description = f"{text}\n\n    python explore.py log runs/ddim runs/ddim-2"
    add = commands.add_parser("log", help=text, description=description).add_argument  # no model
    # fmt: off
    add("logs", type=file_path, nargs="+", metavar="RUN",
        help="folder of a run, or a log, such as pretrained/ddim.log.jsonl")
    add("--output", type=output_path, default=Path("log.png"), help="the .png to write (log.png)")
    # fmt: on
    return parser


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args = parser.parse_args(argv)
        if args.command == "log":
            check_output(args.output, [".png"], args.logs)
            draw_log({path.as_posix(): read_log(path) for path in args.logs}, args.output)
            print(f"wrote {args.output}")
            return 0
        draw, _, suffixes = COMMANDS[args.command]
        files = [name for name in args.images if not name.isdecimal()]  # else test images
        check_output(args.output, suffixes, files)
        model = Trained(args)
        draw(args, model)
        said = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in model.settings.items())
        print(f"wrote {args.output}{': ' if said else ''}{said} (weights: {model.path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
