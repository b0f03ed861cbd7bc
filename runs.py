"""Everything about a run that is in no paper: flags, devices, checkpoints, a log, image files.

A train loop names ten things of a Run and can be understood without opening this file: steps,
progress, seed, batch, shard, mean, watch, log, save, end.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from common import (
    IMAGE_SIZES, NAMED_SETS, InputError, file_stems, load_data, note_on_all, parse_classes,
    subsample, to_float, to_uint8, with_mirrored, without_held_out,
)  # fmt: skip

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 2  # of the checkpoint file
# What runs had before there were these flags.
OLDER = {"image_size": 32, "noise_levels": "uniform"}
LOG_EVERY = 50  # steps
OF_CLASSES = ("list_classes", "checkpoint", "device")  # flags that go with --list-classes
YOUNG = 1000  # steps before which samples may be noise still
# Flags that may change when a run is resumed; each script adds to them.
RUN_FLAGS = (
    "data", "data_dir", "skip_broken", "batch_size", "epochs", "minutes", "save_every", "device",
    "deterministic",
)  # fmt: skip
# Commands of explore.py that were flags of these scripts once.
MOVED = {
    "interpolate": ("ddim", "vae", "gan"),
    "invert": ("ddim", "ldm"),
    "reconstruct": ("vae", "ldm"),
    "between": ("vae",),
    "map": ("vae", "ldm"),
    "walk": ("vae",),
    "filmstrip": ("ddpm", "ddim", "ldm"),
}

# --- Command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=raw, allow_abbrev=False, **options)

    def error(self, message):  # one line; argparse would print the usage before it
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: int or float in [low, high], or in (low, high] with above."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (above and value == low):
            noun = "whole number" if kind is int else "number"
            limits = f"above {low}" if above else f"from {low}"
            if high < math.inf:
                limits += f" to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {limits}")
        return value

    return parse


def path_text(text):
    """An argparse type: a path, with the ~ that a shell leaves in --output=~/x.png expanded."""
    if not text:  # as of a variable that is not set: the path of no name is this folder
        raise argparse.ArgumentTypeError("the name is empty")
    return os.path.expanduser(text)  # noqa: PTH111  Path's own fails without such a user


def file_path(text):
    """An argparse type: path_text as a Path."""
    return Path(path_text(text))


def whole_numbers(text):
    """An argparse type: '32,96' -> (32, 96), at most five: 32 pixels can be halved that often."""
    numbers = tuple(number(int, 1, 65536)(part) for part in text.split(","))
    if len(numbers) > 5:
        raise argparse.ArgumentTypeError(f"{text!r} is more than five numbers")
    return numbers


def colour(text):
    """An argparse type: a colour that pillow knows and that is not transparent itself."""
    try:
        opaque = len(ImageColor.getrgb(text)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour, as white or #ffffff are")
    return text


def output_path(text):
    """An argparse type: a name without an ending is a folder only if it exists or ends in /."""
    path = file_path(text)
    exists = os.path.exists(path)  # noqa: PTH110  Path's own raises for names that are too long
    if not path.suffix and not text.endswith(("/", os.sep)) and not exists:
        raise argparse.ArgumentTypeError(f"{text!r} has no ending: a new folder is {text}/")
    if path.suffix and text.endswith(("/", os.sep)) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder by its /, a file by its ending")
    return path


def run_parser(name, doc, batch_size=64, data=True):
    """A parser with the flags that all model scripts share; each script adds its own.

    data: with the flags of a data set.
    """
    parser = Parser(prog=f"{name}.py", description=doc)
    on_off = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument
    add("--train", action="store_true", help="train a model; without it, sample from one")
    add("--resume", action="store_true",
        help="resume training, the newest run or that of --run-dir; no other flag is needed. "
             "--epochs or --minutes set a new length, and the learning rate jumps to its place in "
             "the new schedule, up in a longer run; --lr scales the rest of the schedule")
    if data:
        add("--start", type=path_text, metavar="PATH",
            help="begin a new run with the averaged weights of a .pt file or a run's folder; for "
                 "other classes the class embedding is new")
    add("--run-dir", type=file_path,
        help="folder of the training run (runs/NAME, or runs/NAME-2, ... where that is taken)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="device to compute on; auto is CUDA or MPS where available, else the CPU (auto)")
    add("--deterministic", action=on_off, default=False,
        help="bit-identical training on CUDA too, where it is slower (off)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="seed of initial weights, data order and noise, 0 or more (0)")
    add("--batch-size", type=number(int, 1, 1_000_000), default=batch_size,
        help="images in a training step, or sampled at a time, 1 to 1,000,000 "
             f"({batch_size})")
    add = parser.add_argument_group("length of training, one of the two").add_argument
    add("--epochs", type=number(float, 0, 1e9, above=True),
        help="length in passes over the data, fractions allowed (20)")
    add("--minutes", type=number(float, 0, 1e9, above=True),
        help="length in minutes of training, summed over resumed sessions (none: --epochs 20)")
    add("--save-every", type=number(float, 0), default=3.0,
        help="minutes between checkpoints, 0 or more, each with a grid of samples (3)")
    if data:
        add = parser.add_argument_group("data").add_argument
        add("--data", type=path_text, default="fashion-mnist",
            help=f"{', '.join(NAMED_SETS)}; a folder of class folders, or of pictures alone, which "
                 "are one class; or an .npz of x and y")
        add("--data-dir", type=path_text,
            help="folder with the files of a named set (data/, Debian's folder, else a download)")
        add("--image-size", type=int, choices=IMAGE_SIZES, default=32,
            help="height and width of the images, of which the middle square is resized; 28x28 "
                 "gets a frame first (32)")
        add("--channels", type=int, choices=(1, 3), default=1,
            help="channels of the images, 1 for grey or 3 for colour (1)")
        add("--background", type=colour, default="white",
            help="colour behind transparent pictures, a name or #rrggbb (white)")
        add("--flip", action=on_off, default=False,
            help="train on each image and on its mirror image: an epoch has both (off)")
        add("--skip-broken", action=on_off, default=False,
            help="leave out pictures that cannot be read, and say how many (off)")
        add("--hold-out", action="store_true",
            help="leave every sixth image out: evaluate.py --hold-out compares with those, so that "
                 "recipes are not chosen by the test images (off)")
    add = parser.add_argument_group("what to sample").add_argument
    add("--class", dest="class_", metavar="NAME", default="all",
        help="class names, unique prefixes or indices, separated by commas, or all (all)")
    add("--list-classes", action="store_true",
        help="print the model's classes and their indices, and stop (off)")
    add("--num-samples", type=number(int, 1, 1_000_000), default=1,
        help="number of images of each class, 1 to 1,000,000 (1)")
    add("--checkpoint", type=file_path,
        help="a .pt file or a run's folder to sample from (newest run, for ddim and ddpm that of "
             "either script, else the included weights)")
    add("--output", type=output_path,
        help="a .png grid, an .npz of arrays, or a folder for PNGs, as in out/ (NAME_CLASS.png, of "
             "several classes NAME_samples.png)")
    add("--names", action=on_off, default=True,
        help="class names beside the rows of a .png grid (on)")
    # fmt: on
    return parser


def optimisation_flags(parser, lr, clipped=True):
    """Add the flags of the optimiser and of the EMA; returns the group's add_argument.

    clipped: with --weight-decay, --grad-clip and --compile, which a GAN has no use for.
    """
    on_off = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=number(float, 0, above=True), default=lr,
        help=f"learning rate after the warm-up, above 0 ({lr:g})")
    add("--warmup", type=number(int, 0), default=200,
        help="steps of linear warm-up of the learning rate, 0 or more (200)")
    add("--ema-length", type=number(float, 0, 0.5, above=True), default=0.08,
        help="mean age of the averaged weights, a fraction of the run, above 0 to 0.5 (0.08)")
    add("--bf16", action=on_off,
        help="bfloat16 autocast (on for CPUs with AMX or AVX512-BF16, else off)")
    if clipped:
        add("--weight-decay", type=number(float, 0), default=0.01,
            help="decoupled weight decay, 0 or more (0.01)")
        add("--grad-clip", type=number(float, 0, above=True), default=1.0,
            help="largest norm of the gradient, above 0 (1)")
        add("--compile", action=on_off, default=False, help="torch.compile the network (off)")
    # fmt: on
    return add


def typed_flags(parser, argv):
    """The names of the flags that are typed, whatever their values."""
    unset = object()
    nothing = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    typed = parser.parse_args(argv, nothing)
    return [key for key, value in vars(typed).items() if value is not unset]


def as_flags(keys):
    """['class_', 'batch_size'] -> '--class, --batch-size'."""
    return ", ".join("--" + key.strip("_").replace("_", "-") for key in keys)


def parse_run(parser, argv, names, fixed, free):
    """The flags, and with --resume the checkpoint, whose flags count where none are given.

    names: stems of the checkpoint files that can be resumed;  fixed, free: flags of the training
    that a resumed run cannot or can change.  Returns (args, checkpoint or None); args.typed has the
    names of the flags that are typed.  Raises InputError for flags that do not go together, or
    would be ignored.
    """
    argv = sys.argv[1:] if argv is None else argv
    script = Path(parser.prog).stem
    for flag in (text.split("=")[0] for text in argv):
        command = flag.removeprefix("--")
        if flag.startswith("--") and script in MOVED.get(command, ()):
            raise InputError(f"{flag} is now: python explore.py {command} {script}")
    args = parser.parse_args(argv)
    if args.output and args.output.suffix.lower() == ".gif":
        raise InputError(f"a .gif is now: python explore.py gif {script} --output {args.output}")
    training = args.train or args.resume
    if args.train and args.resume:
        raise InputError("--train begins a run, --resume continues one: give one of them")
    if args.epochs and args.minutes:
        raise InputError("give --epochs or --minutes, not both")
    if args.checkpoint and training:
        raise InputError(
            "--checkpoint is to sample from; to train on, give --resume --run-dir FOLDER"
        )
    if args.resume and getattr(args, "start", None):
        raise InputError("--start begins a new run, --resume continues one: give one of them")
    shared = {"train", "resume", "seed", "batch_size", "device"}
    to_train = {*fixed, *free, "run_dir"}
    typed = [key for key in typed_flags(parser, argv) if key not in shared]
    of_training = as_flags(key for key in typed if key in to_train)
    of_sampling = as_flags(key for key in typed if key not in to_train)
    if training and of_sampling:
        raise InputError(f"{of_sampling}: to sample from a model, not to train one")
    if of_training and not training:
        raise InputError(f"{of_training}: to train a model, with --train or --resume")
    others = [key for key in typed_flags(parser, argv) if key not in OF_CLASSES]
    if args.list_classes and others:
        raise InputError(f"--list-classes makes no images: leave out {as_flags(others)}")
    if not training and "LOCAL_RANK" in os.environ:
        raise InputError("torchrun is for --train and --resume: sample with python")
    if not args.resume:
        if not args.minutes:
            args.epochs = args.epochs or 20.0
        args.typed = typed
        return args, None
    path = find_checkpoint(names, args.run_dir)
    checkpoint = load_checkpoint(path, names)
    config = checkpoint["config"]
    if "optimizer" not in checkpoint:
        raise InputError(f"{path} has weights to sample with, but no training state to resume")
    defaults = {**OLDER, **config}
    new_length = bool(args.epochs or args.minutes)
    if new_length:  # it takes the place of the old one
        defaults |= {"epochs": None, "minutes": None}
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)  # again: what is typed wins over the checkpoint
    args.typed = typed
    args.new_length = new_length
    args.resumed_from = path
    args.run_dir = path.parent
    for key in fixed:
        before = parser.get_default(key)  # the run's; of a flag newer than the run, its default
        given = getattr(args, key)
        if as_typed(given) != as_typed(before):  # a typed pair is a list, a default one a tuple
            raise InputError(f"{as_flags([key])} is {before} and cannot change in a resumed run")
    return args, checkpoint


class Console:
    """A stream to print to that does not end the program.

    Characters that the console cannot show are escaped; what is written after the reader has gone
    (`| head`) is dropped.
    """

    def __init__(self, stream):
        self.stream = stream or Path(os.devnull).open("w")  # noqa: SIM115  None: it was closed
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._attempt(self.stream.write, text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, act, *args):
        try:
            act(*args)
        except OSError as error:  # the rest, and what Python flushes at its exit, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise


@contextmanager
def careful_output():
    """Print to a Console; all of it is written when the block ends."""
    out, err = Console(sys.stdout), Console(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


@contextmanager
def errors_in_one_line(parser):
    """End the program with one line: exit code 2 for wrong input, 130 for Ctrl-C."""
    try:
        with careful_output():
            yield
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (MemoryError, RuntimeError) as error:
        if is_lost_process(error):
            parser.exit(
                2, f"{parser.prog}: error: another process has ended: see the output of torchrun\n"
            )
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = "train without it; a run that has begun: --resume --no-compile"
            parser.exit(2, f"{parser.prog}: error: --compile failed ({reason}): {hint}\n")
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        # On a CPU, in cuBLAS, and where another program holds the card, these are RuntimeErrors.
        texts = ("allocate memory", "out of memory", "ALLOC_FAILED")
        if not out_of_memory and not any(text in str(error) for text in texts):
            raise
        hint = "lower --batch-size, with --resume too, or --num-samples; what was saved is kept"
        parser.exit(2, f"{parser.prog}: error: out of memory: {hint}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # or its threads may abort the process at exit


# --- Devices, processes, optimisation -------------------------------------------------------------


def pick_device(name):
    """'auto' -> the best device available; InputError if the one asked for is not."""
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True,
    }  # fmt: skip
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise InputError(f"--device {name} is not available on this machine: use --device auto")
    torch.set_flush_denormal(True)  # CPUs are many times slower on denormal numbers
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; on a CPU it costs a third of the speed
    return torch.device(name)


def training_device(args):
    """The device to train on; in a process that torchrun started, also joins the other processes.

    Each process takes its shard of every batch.  Rank 0 alone prints, logs and saves.
    Raises InputError.
    """
    device = pick_device(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "mps":
        raise InputError("torchrun is for CPUs and CUDA: use --device cpu")
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        if index >= count:
            raise InputError(f"more processes than GPUs: --nproc-per-node must be at most {count}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    world = dist.get_world_size()
    if args.batch_size % world:
        raise InputError(
            f"--batch-size {args.batch_size} is not a multiple of the {world} processes"
        )
    if dist.get_rank():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for as long as the process lives
    return device


def is_lost_process(error):
    """Whether a RuntimeError says that another process has ended; gloo has no type of its own."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def parallel(model):
    """The model as it is trained: with several processes, their gradients are averaged.

    Weights stay equal in all of them, and so do the averages that each process keeps.
    """
    return DistributedDataParallel(model) if dist.is_initialized() else model


def autocast(device, bf16):
    """The context of a forward pass; weights, losses and the optimiser stay float32.

    bf16: whether it is in bfloat16; None: on CPUs that compute in it (AMX or AVX512-BF16), since
    others emulate it slowly.
    """
    if bf16 is None and device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.8 has none
        bf16 = has.get("amx_bf16") or has.get("avx512_bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16))


def learning_rate(args, step, progress):
    """--lr after a linear warm-up, annealed to 0 along half a cosine as progress goes to 1."""
    warmup = min(1.0, (step + 1) / (args.warmup + 1))
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def power_ema(length):
    """EMA of weights, of mean age `length` times the run so far: w_n <- d * w_n-1 + (1 - d) * w.

    d = (1 - 1/n)^(1/length - 1), the power function EMA of Karras et al. 2024 (arXiv:2312.02696;
    gamma = 1/length - 2), whose own EMA length, sigma_rel, is a standard deviation, not a mean.  It
    starts as a copy and needs neither a warm-up nor the length of the run.
    """

    def average(ema_weights, weights, num_averaged):
        decay = (1 - 1 / (num_averaged.item() + 1)) ** (1 / length - 1)
        get_ema_multi_avg_fn(decay)(ema_weights, weights, num_averaged)

    return average


class Muon(torch.optim.AdamW):
    """Muon for the weights between a network's first and last layer, AdamW for all else.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): the momentum of a weight matrix
    is made orthogonal, so that it learns in all directions alike; scaled as by Liu et al. 2025
    (arXiv:2502.16982), so that a learning rate for AdamW suits both.  A convolution's weight is the
    matrix (out, in * kh * kw).  torch's own Muon takes matrices alone, always in bfloat16, which is
    slow on CPUs that emulate it.

    named_parameters: those of a UNet;  the rest as in AdamW.
    """

    def __init__(self, named_parameters, lr, weight_decay, fused):
        rest = dict(named_parameters)
        outer = ("stem", "head", "embedding")
        inner = [k for k, p in rest.items() if p.ndim > 1 and not k.startswith(outer)]
        groups = [{"params": [rest.pop(name) for name in inner]}, {"params": [*rest.values()]}]
        super().__init__(groups, lr, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr = group["lr"]
        for weight in group["params"]:
            if weight not in self.state:  # AdamW looks for a step where it finds a state
                self.state[weight] = {"momentum": torch.zeros_like(weight), "step": torch.zeros(())}
            momentum = self.state[weight]["momentum"].lerp_(weight.grad, 0.05)
            update = orthogonal(weight.grad.lerp(momentum, 0.95).flatten(1))  # as in Nesterov's
            weight.mul_(1 - lr * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-lr * 0.2 * max(update.shape) ** 0.5)
            weight.grad = None  # so that AdamW skips it
        super().step()


def orthogonal(matrix):
    """Approximately U V^T of a matrix U S V^T: five Newton-Schulz steps, Jordan et al. 2024."""
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)  # enough on a GPU
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return (x if wide else x.T).to(matrix.dtype)


# --- Checkpoints ----------------------------------------------------------------------------------


def find_checkpoint(names, asked=None, shipped=()):
    """The file asked for, or the one in that folder; else the newest run's, else a shipped one.

    names, shipped: stems of the files.  Raises InputError if there is none.
    """
    if asked and Path(asked).is_dir():
        places = [Path(asked) / f"{name}.pt" for name in dict.fromkeys([*names, *shipped])]
    elif asked:
        places = [Path(asked)]
    else:
        places = [path for name in names for path in Path("runs").glob(f"*/{name}.pt")]
        places.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        places += [Path(__file__).resolve().parent / f"pretrained/{name}.pt" for name in shipped]
    for path in places:
        if path.is_file():
            return path
    wanted = " or ".join(map(str, places)) or f"runs/*/{names[0]}.pt"
    raise InputError(f"there is no {wanted}: train first, with --train")


def load_checkpoint(path, names):
    """Read a checkpoint of one of the scripts `names`; InputError says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not detect corrupted weights
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        name = checkpoint["model"]
        version = checkpoint["format"]
    except Exception as error:  # readers of foreign or broken files fail in many ways
        wanted = " or ".join(names)
        raise InputError(
            f"{path} is not a checkpoint of {wanted}, or is incomplete or corrupted"
        ) from error
    if name not in names:
        raise InputError(f"{path} is a checkpoint of {name}, not of {' or '.join(names)}")
    if version != FORMAT:
        raise InputError(f"{path} has checkpoint format {version}; these scripts read {FORMAT}")
    if missing := {"config", "network", "class_names", "ema", "step", "seconds"} - set(checkpoint):
        missing = ", ".join(sorted(missing))
        raise InputError(f"{path} is an incomplete checkpoint: it lacks {missing}")
    return checkpoint


def read_start(args, names, fitting, class_names):
    """The checkpoint of --start; for other classes, without the weights of its class table.

    names: stems of the file;  fitting: flags that must be as in its run.  Raises InputError.
    """
    path = find_checkpoint(names, args.start)
    start = load_checkpoint(path, names)
    for key in fitting:
        before = {**OLDER, **start["config"]}.get(key)
        if before != getattr(args, key):
            raise InputError(
                f"--start: {as_flags([key])} is {before} in {path}, and {getattr(args, key)} here: "
                "it must be the same"
            )
    table = "its class table"
    if class_names != start["class_names"]:
        for part in {"ema", "discriminator"} & start.keys():
            weights = start[part].items()
            start[part] = {name: w for name, w in weights if "label" not in name.split(".")}
        table = "a new class table, since it was of other classes"
    print(f"started from {path}, step {start['step']}, with {table}")
    note_on_held_out(args, start, path)
    return start


def note_on_held_out(args, checkpoint, path):
    """Say that a run with --hold-out begins with weights of one without it."""
    if args.hold_out and not checkpoint["config"].get("hold_out"):
        print(f"warning: {path} was trained without --hold-out: it may know what is held out here")


def load_run_data(args, checkpoint=None):
    """The training data that the flags name, ImageData; a resumed run must have the same as before.

    Sets the flags that depend on the data.  Raises InputError.
    """
    named = args.data.removeprefix("set:") in NAMED_SETS
    if checkpoint and not named and not Path(args.data).exists():
        raise InputError(f"the run's data, {args.data}, is not there: say where it is with --data")
    if "background" in getattr(args, "typed", ()) and (named or Path(args.data).is_file()):
        raise InputError(f"--background is for folders, and {args.data} is none: leave it out")
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    in_turn = named and dist.is_initialized()  # one process of each machine may have to download
    if in_turn and not first_here:
        dist.barrier()
    keys = ("channels", "background", "skip_broken", "image_size")
    data = load_data(args.data, args.data_dir, **{key: getattr(args, key) for key in keys})
    if in_turn and first_here:
        dist.barrier()
    if args.hold_out:
        data = without_held_out(data)
    if args.flip:
        data = with_mirrored(data)
    print(data)
    note_on_all(data.class_names)
    if not named:  # so that the run can be resumed from another folder
        args.data = str(Path(args.data).absolute())
    if args.data_dir:
        args.data_dir = str(Path(args.data_dir).absolute())
    if checkpoint:
        check_same_data(data, checkpoint)
        adopt_batch_size(args, len(data.labels), checkpoint)
    elif len(data.class_names) == 1 and 0 < getattr(args, "label_dropout", 0) < 1:
        args.label_dropout = 0.0
        print("one class: its label is never dropped, and guidance is off")
    return data


def check_same_data(data, checkpoint):
    """Raise InputError unless a resumed run has the data that it began with, wherever they are."""
    names, before = data.class_names, checkpoint["class_names"]
    known = checkpoint.get("data", data.fingerprint)
    count = data.fingerprint["images"]
    differs = None
    if names != before:
        changes = [f"{name} is new" for name in names if name not in before]
        changes += [f"{name} is missing" for name in before if name not in names]
        differs = f"other classes ({', '.join(changes[:5]) or 'in another order'})"
    elif count != known["images"]:
        differs = f"{count:,} images, not {known['images']:,}"
    elif data.fingerprint != known:
        differs = "other images or labels (their SHA-256 differs)"
    if differs:
        raise InputError(
            f"{data.source} has {differs}: a run resumes with the data that it began with, --data "
            "says where they are"
        )
    if "data" not in checkpoint:
        print("the run was saved without a sum of its data: its class names alone were compared")


def adopt_batch_size(args, num_images, checkpoint):
    """Let a resumed run take its place in the epoch in batches of another size.

    Its step counts the batches taken; its position is what they amount to in the present size.
    """
    before = checkpoint["config"]["batch_size"]
    checkpoint.setdefault("position", checkpoint["step"])
    if args.batch_size == before:
        return
    now = len(epoch_batches(num_images, args.batch_size, args.seed, 0))  # or InputError
    then = num_images // before
    epoch = checkpoint["position"] / then
    checkpoint["position"] = -(-checkpoint["position"] * now // then)  # rounded up
    print(f"--batch-size {args.batch_size} from epoch {epoch:.2f} on; before, it was {before}")


# --- Run ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def epoch_batches(n, batch_size, seed, epoch):
    """The indices of each batch of an epoch: int64 (n // batch_size, batch_size).

    A pure function of its arguments.  Where batch_size does not divide n, the images left over are
    not in this epoch.  Raises InputError.
    """
    if not 1 <= batch_size <= n:
        raise InputError(f"--batch-size {batch_size} is not in 1..{n}, the number of images")
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
    return torch.from_numpy(order[: n - n % batch_size].reshape(-1, batch_size))


def signal_numbers():
    """The signals that end a run; none outside the main thread, where Python sets no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [signal.SIGINT, signal.SIGTERM]
    # A closed terminal, which Windows has no signal for and which nohup asks to ignore.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def call_until_signal(function):
    """Call a function that the first of these signals ends at once; returns whether one did."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    for number in signal_numbers():
        signal.signal(number, interrupt)  # signals_caught gives the handlers back
    try:
        function()
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def signals_caught():
    """Yield a list that collects signals.

    The same one twice ends the program, and so does SIGINT after any; a SIGTERM after a SIGINT does
    not: torchrun sends both.
    """
    caught = []

    def catch(number, frame):
        caught.append(number)
        for each in (number, signal.SIGINT):  # of a log-out, SIGHUP may follow SIGTERM at once
            signal.signal(each, handlers[each])

    handlers = {number: signal.signal(number, catch) for number in signal_numbers()}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def new_folder(name):
    """Make runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that does not exist."""
    Path("runs").mkdir(exist_ok=True)  # an error if it is a file, or a link to nowhere
    for i in itertools.count(1):
        folder = Path("runs", name if i == 1 else f"{name}-{i}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


class Run:
    """A training run: its folder, step and clock; the training itself is the script's.

        run = Run(name, args, data, checkpoint)
        with run:                         # the folder is locked, errors say how to resume
            for step in run.steps(save):  # until the length asked for is over, or a signal comes
                ...
        return run.end()

    name: of the script;  args: its flags;  data: ImageData;  checkpoint: to resume;
    part: what is trained, if not all of it;  folder: that of an earlier part;  fraction: of
    --epochs or --minutes that this part takes;  walks: of a student, whose data are images of its
    teacher: the number of teacher walks in an epoch.  `progress`: the fraction of this part that is
    over, 0 to 1.
    """

    def __init__(
        self, name, args, data, checkpoint=None, part="", folder=None, fraction=1.0, walks=None
    ):
        self.name = name
        self.part = part
        self.args = args
        self.data = data
        self.walks = walks
        self.num_images = walks or len(data.images)
        self.fraction = fraction
        self.stem = part or name
        self.log_file = f"{part}_log.jsonl" if part else "log.jsonl"
        self.steps_per_epoch = len(epoch_batches(self.num_images, args.batch_size, args.seed, 0))
        self.resumed = checkpoint is not None
        self.step = self.first_step = checkpoint["step"] if checkpoint else 0
        self.earlier_images = checkpoint["images"] if checkpoint else 0
        # Not 0 where earlier steps had batches of another size.
        self.offset = checkpoint["position"] - self.step if checkpoint else 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.signals = []
        self.stopped = False  # by a signal
        self.in_step = False  # between the start of a step and its end
        self.text = ""  # shown beside the bar
        self.warned = set()  # kinds of warnings that were printed
        self.first_ema = None  # the averaged weights at step 0
        if folder is None:
            folder = args.run_dir if checkpoint else self._new_folder(args.run_dir)
        self.folder = folder
        self.start = self.last_save = time.monotonic()
        # A finished run that is resumed without new flags is not written again; a copy of it is.
        is_whole = checkpoint and args.resumed_from == folder / f"{self.stem}.pt"
        self.saved_step = self.step if is_whole and {*args.typed} <= {"run_dir"} else None
        earlier = checkpoint["seconds"] if checkpoint else 0
        self.clock = self.start - earlier  # as if it had never been interrupted
        self.progress = 0.0
        ends = not part or fraction == 1  # after stage 1 of both comes stage 2
        if checkpoint and ends and getattr(args, "new_length", False) and self.fraction_done() >= 1:
            done = f"{self._epoch():.2f} epochs and {earlier / 60:.1f} minutes"
            raise InputError(f"{self.folder} is already at {done}: give a greater length")

    def __str__(self):
        return str(self.folder)

    @property
    def position(self):
        """The batches of the present size that make up the run so far."""
        return self.step + self.offset

    def _new_folder(self, asked):
        """The folder asked for, made where it is missing; if none is, a new runs/NAME, ....

        Raises InputError where it holds a run.
        """
        folders = [asked]
        if self.rank == 0 and asked:
            held = {path.stem for path in asked.glob("*.pt")}  # of any script: logs would mix
            if held - (set() if self.part else {"autoencoder"}):  # whose stage 2 goes beside it
                raise InputError(f"{asked} holds a run: --resume it, or name another --run-dir")
            asked.mkdir(parents=True, exist_ok=True)
        elif self.rank == 0:
            folders = [new_folder(self.name)]
        if self.world > 1:
            dist.broadcast_object_list(folders)
        return folders[0]

    def __enter__(self):
        self._guard = self._guarded()
        self._guard.__enter__()
        return self

    def __exit__(self, *error):
        return self._guard.__exit__(*error)

    @contextmanager
    def _guarded(self):
        """The folder belongs to this process, signals are caught, the bar is shown.

        Raises InputError where the folder is another process's, where files cannot be written, and
        where other processes have ended.
        """
        options = {
            "total": 1.0, "initial": min(self.fraction_done(), 1.0), "disable": self.rank > 0,
            "bar_format": "{percentage:5.1f}% |{bar}| {elapsed}<{remaining}{postfix}",
            **bar_options(),
        }  # fmt: skip
        resume = self._resume_command()
        kept = f"what {self.folder} holds is kept. Resume with:  {resume}"
        try:
            locked, signals = self._locked_folder(), signals_caught()
            with locked, signals as self.signals, tqdm(**options) as self.bar:
                yield
        except OSError as error:
            raise InputError(f"cannot write ({error}); {kept}") from error
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise InputError(
                f"another process has ended: see the output of torchrun; {kept}"
            ) from error

    @contextmanager
    def _locked_folder(self):
        """Keep other runs out of the folder, where the system can; drop log lines after `step`.

        A run that was killed has logged more than it has saved, perhaps half a line.
        """
        if self.rank:
            yield
            return
        with (self.folder / ".lock").open("w") as file:
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            except BlockingIOError as error:
                raise InputError(
                    f"{self.folder} is in use by a running training process: stop that, or wait"
                ) from error
            except OSError:
                pass  # a file system without locks
            if self.resumed:  # read before the folder was this process's
                path = self.args.resumed_from
                if load_checkpoint(path, (self.stem,))["step"] != self.step:
                    raise InputError(
                        f"{path} was saved anew just now, by another run: resume again"
                    )
            for left in self.folder.glob(f".{self.stem}.pt.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            path = self.folder / self.log_file
            if path.exists() and not self.resumed:  # of a run that saved nothing, or was moved away
                path.replace(path.with_name(f"{path.name}.old"))
            if path.exists():
                lines = [line for line in path.read_text().splitlines() if self._is_logged(line)]
                with written_whole(path) as scratch:
                    scratch.write_text("".join(f"{line}\n" for line in lines))
            yield

    def _is_logged(self, line):
        try:
            return json.loads(line)["step"] <= self.step
        except (ValueError, TypeError, KeyError):
            return False

    def steps(self, save, finish=None):
        """Yield the index of each step, until the length asked for is over or a signal comes.

        save: called by rank 0 when a new run begins, every --save-every minutes, and at the end;
        finish: called by rank 0 after that, unless a signal stopped the run; one ends it, too.
        """
        if self.rank == 0 and not self.resumed:
            if self.data.warnings:
                self.log({"warnings": self.data.warnings})
            if self.args.epochs and self.args.warmup >= self._length():
                whole = f"--warmup {self.args.warmup} takes all {self._length()} steps"
                tqdm.write(f"warning: {whole} of this training: the rate stays below --lr")
            save()  # from now on there is a run to resume
            self.start = time.monotonic()  # of the images/s
        elif self.rank == 0 and "warmup" in self.args.typed and self.step > self.args.warmup:
            tqdm.write(f"--warmup {self.args.warmup} changes nothing: it ended before this step")
        while not self._is_over():
            self.in_step = True
            yield self.step
            self.in_step = False
            self.step += 1
            self._show()
            if self._save_due():
                save()
        if self.rank == 0:
            if self.saved_step != self.step:  # --save-every may have been over just now
                save()
            if finish and not self.stopped:
                self.stopped = bool(self.signals) or call_until_signal(finish)

    def _is_over(self):
        """Whether the run ends here, agreed by all processes, whose clocks and signals differ."""
        self.progress = self.fraction_done()
        self.stopped = bool(self.signals)
        if self.world > 1:  # a signal after this counts in the next step
            both = torch.tensor([self.progress, self.stopped], dtype=torch.float64)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            self.progress = both[0].item()
            self.stopped = bool(both[1])
        return self.stopped or self.progress >= 1

    def _length(self):
        """The steps of this part of a run of --epochs."""
        return math.ceil(round(self.args.epochs * self.fraction * self.steps_per_epoch, 6))

    def fraction_done(self):
        """The fraction of --epochs or --minutes that is over, from 0 on."""
        if self.args.epochs:
            return self.position / max(self._length(), 1)
        return self._seconds() / 60 / (self.args.minutes * self.fraction)

    def _seconds(self):
        return time.monotonic() - self.clock

    def _epoch(self):
        return (self.position + self.in_step) / self.steps_per_epoch

    def seed(self, generator):
        """Make what a step samples depend on (seed, step) alone, so that no generator is saved."""
        sequence = np.random.SeedSequence([self.args.seed, self.step])
        generator.manual_seed(int(sequence.generate_state(1)[0]))

    def batch(self):
        """The indices of this step's images: int64 (B,), a function of (seed, position) alone."""
        epoch, i = divmod(self.position, self.steps_per_epoch)
        return epoch_batches(self.num_images, self.args.batch_size, self.args.seed, epoch)[i]

    def shard(self, *batch):
        """This process's rows of each tensor of a batch; without torchrun, all of them."""
        return [part[self.rank :: self.world] for part in batch]

    def mean(self, values):
        """The mean of a tensor over the processes, each of which has that of its shard."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values / self.world

    def watch(self, **values):
        """Show numbers beside the bar. Raises InputError unless all are finite."""
        self.text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not all(map(math.isfinite, values.values())):
            raise InputError(
                f"step {self.step}: {self.text}: not finite, stopped; what {self.folder} holds is "
                f"kept. Resume with a lower --lr than {self.args.lr}, and look at the data"
            )

    def _show(self):
        images = (self.step - self.first_step) * self.args.batch_size
        speed = images / max(time.monotonic() - self.start, 1e-3)  # some clocks tick in 16 ms
        text = f"epoch {int(self._epoch())}, {self.text}, {speed:.0f} images/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(min(self.fraction_done(), 1.0) - self.bar.n)

    def log(self, line):
        """Add a line, a dict of numbers, to log.jsonl, with `warnings` where it tells of a fault.

        Each kind of warning is printed once.
        """
        if self.rank:
            return
        step = self.step + self.in_step
        found = faults(line, step)
        for kind, text in found.items():
            if kind not in self.warned:
                tqdm.write(f"warning: step {step}: {text}")
        self.warned |= found.keys()
        if found:
            line = {**line, "warnings": [*found.values()]}
        self.folder.mkdir(parents=True, exist_ok=True)  # it may have been deleted meanwhile
        at = {"step": step, "epoch": self._epoch(), "seconds": self._seconds()}
        at["images"] = self._images(step)
        with (self.folder / self.log_file).open("a") as file:
            file.write(json.dumps(rounded({**at, **line}), allow_nan=False) + "\n")

    def _images(self, step):
        """The images trained on up to this step, those of earlier sessions included."""
        return self.earlier_images + (step - self.first_step) * self.args.batch_size

    def _save_due(self):
        waited = time.monotonic() - self.last_save
        return self.rank == 0 and waited >= 60 * self.args.save_every

    def save(self, content, grid, labels, judged=None, columns=8, **figures):
        """Write the checkpoint, `content` and where the run stands, and a grid of images.

        grid: (N, C, H, W) in [-1, 1];  labels: its classes, int64 (N,);  judged: (images, labels)
        whose diversity and flatness are logged, else the grid's;  figures: numbers that are logged
        with them.  Raises InputError unless finite.
        """
        self.watch(samples=grid.abs().max().item())
        if self.step > self.first_step or not self.resumed:  # else the log has this line
            self._judge(content["ema"], *(judged or (grid, labels)), figures)
        rows = names_of_rows(labels.tolist(), content["class_names"], columns)
        name = f"{self.part or 'step'}_{self.step:07d}.png"
        save_png(image_grid(grid, columns, rows), self.folder / "samples" / name, {})
        state = {
            "format": FORMAT, "model": self.stem, "step": self.step, "seconds": self._seconds(),
            "images": self._images(self.step), "position": self.position,
            "torch": str(torch.__version__),
        }  # fmt: skip
        path = self.folder / f"{self.stem}.pt"
        try:
            with written_whole(path) as scratch:
                torch.save({**state, **content}, scratch)
        except RuntimeError as error:  # torch's type for a full disk
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
        self.last_save = time.monotonic()
        self.saved_step = self.step

    def _judge(self, ema, images, labels, figures):
        """Log whether training works: what the images and the averaged weights tell of it."""
        images = images.clamp(-1, 1)  # as they are shown
        ema = {key: w.cpu().clone() for key, w in ema.items() if w.is_floating_point()}
        if self.step == 0 and not self.walks:  # a student may stay near its teacher
            self.first_ema = ema
        self.log({
            **figures,
            "diversity": class_diversity(images, labels, self.data),
            "flat": flat_fraction(images, self.data),
            "ema_moved": self.first_ema and distance_moved(self.first_ema, ema),
        })  # fmt: skip

    def end(self):
        """Say how the run ended and what comes next; returns the exit code."""
        if self.world > 1:
            dist.barrier()  # until rank 0 has saved
        if self.part:
            self._is_over()  # or a signal during that would be lost, and the next part begin
        minutes = self._seconds() / 60
        print(f"{self.step} steps, {self._epoch():.2f} epochs, {minutes:.1f} minutes")
        if self.resumed and self.step == self.first_step and not (self.stopped or self.part):
            print("it was at its end: only a greater --epochs or --minutes trains on")
        if self.stopped:
            resume = self._resume_command()
            print(f"Stopped and saved. Resume with:\n  {resume}", flush=True)
            return 130
        if not self.part:
            where = shlex.quote(self.folder.as_posix())
            flags = f"--checkpoint {where} --class all --num-samples 10"
            print(f"Draw samples with:\n  python {self.name}.py {flags}")
        return 0

    def _resume_command(self):
        """The command that resumes this run, started in the same way."""
        start = "python"
        if self.world > 1:
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            others = " ..." if here < self.world else ""  # the user's other machines
            start = f"torchrun --nproc-per-node {here}{others}"
        return f"{start} {self.name}.py --resume --run-dir {shlex.quote(self.folder.as_posix())}"


class WholeLines:
    """A stream for a progress bar where there is no terminal: each state is a line of its own."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if text := text.strip():
            self.stream.write(f"{text}\n")

    def flush(self):
        self.stream.flush()


def bar_options():
    """Options of a tqdm bar: it moves on a terminal; elsewhere a line comes every 30 seconds."""
    if sys.stderr.isatty():
        return {"mininterval": 0.5}
    return {"mininterval": 30, "file": WholeLines(sys.stderr)}


def rounded(value):
    """A line of the log with seven digits of each number, as in float32, also in its lists."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


# --- Signs of a fault -----------------------------------------------------------------------------

# Steps: before that, samples need not vary as real images do, nor the loss have fallen.
JUDGED_FROM = 500


def faults(line, step):
    """What a line of the log tells of: {kind: what is wrong, and what would be right}.

    Empty where all is well, or it is too early to tell.
    """
    found = {}
    # None: a tenth of t that no image had.
    ratios = [ratio for ratio in line.get("loss_by_tenth_of_t", ()) if ratio is not None]
    best = min(ratios, default=0)
    if step >= 100 and best > 1.05:
        found["loss"] = (
            f"the loss is at least {best:.2f} times that of an output of 0, in every tenth of t: "
            "lower --lr"
        )
    elif step >= JUDGED_FROM and best > 0.95:
        found["loss"] = (
            "the loss is that of an output of 0, in every tenth of t: nothing is learned. Try the "
            "default --lr, and look at the data"
        )
    if step and (moved := line.get("ema_moved")) is not None and moved < 0.05:
        found["young"] = (
            f"the grid shows averaged weights, which have hardly moved yet ({moved:.1%} of their "
            "size): train for longer, or raise --lr"
        )
    diversities = line.get("diversity", {}).items()
    least = 0.4 if step >= JUDGED_FROM else 0.05
    low = [f"{name} ({v:.2f})" for name, v in diversities if v is not None and v < least]
    if step and (flat := line.get("flat")) and flat > 0.5:
        found["flat"] = f"{flat:.0%} of the generated images are nearly of one colour: lower --lr"
    elif step and low:
        found["collapse"] = (
            f"collapse: generated images vary far less than real ones in {', '.join(low)}: lower "
            "--lr"
        )
    return found


def distance_moved(first, last):
    """|last - first| / |first| over all weights that have moved; both {name: tensor}."""
    squares = [
        ((last[k] - w).double().square().sum().item(), w.double().square().sum().item())
        for k, w in first.items()
    ]
    moved = sum(square for square, _ in squares)
    size = sum(size for square, size in squares if square > 0)
    return math.sqrt(moved / size) if size else 0.0


def flat_fraction(images, data):
    """The fraction of images whose pixels vary less than a tenth as much as those of real images.

    images: (N, C, H, W) in [-1, 1];  data: ImageData.  None where real images are flat.
    """

    def spread(images):  # of the pixels of each image
        return images.flatten(2).std(dim=2).mean(dim=1)

    real = spread(to_float(subsample(data.images, 1000))).mean().item()
    return (spread(images) < 0.1 * real).float().mean().item() if real else None


def class_diversity(grid, labels, data):
    """{class name: diversity} of a grid of samples, against the first 100 images of each class.

    grid: (N, C, H, W) in [-1, 1];  labels: (N,);  data: ImageData.
    """
    found = {}
    for y in labels.unique().tolist():
        first = (data.labels == y).nonzero()[:100, 0]
        reals, samples = to_float(data.images[first]), grid[labels == y]
        if min(len(reals), len(samples)) > 1:  # one image has no distance to another
            found[data.class_names[y]] = diversity(samples, reals)
    return found


def diversity(samples, reals):
    """Mean distance of two samples over that of two real images: 1 is as varied, 0 collapsed.

    samples: (N, C, H, W), reals: (M, C, H, W), of one class.  None where all reals are equal.
    """
    real = torch.pdist(reals.flatten(1)).mean().item()
    return torch.pdist(samples.flatten(1)).mean().item() / real if real else None


# --- Image files ----------------------------------------------------------------------------------


@contextmanager
def written_whole(path):
    """Yield a temporary path beside `path`, which replaces `path` only if the block succeeds."""
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def check_output(path, suffixes, given=(), flag="--output"):
    """Raise InputError for an output that could not be written, before the work is done.

    suffixes: those it may have, "" for a folder;  given: input images, which it may not replace.
    """
    if path.is_dir() and path.suffix:
        raise InputError(f"{flag} {path} is a folder: name another")
    if path.suffix.lower() not in suffixes:
        names = [suffix for suffix in suffixes if suffix]
        wanted = [f"end in {' or '.join(names)}"] if names else []
        wanted += ["be a folder"] if "" in suffixes else []
        raise InputError(f"{flag} {path}: the name must {', or '.join(wanted)}")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{flag} {path} is a folder that holds files: name another")
    if path.is_file() and not path.suffix:
        raise InputError(f"{flag} {path} is a file, not a folder for images: name another")
    if path.resolve() in [Path(name).resolve() for name in given]:
        raise InputError(f"{path} is one of the input images: name another {flag}")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{flag} {path} is no file: name another")
    place = path.absolute()
    above = [place, *place.parents] if path.is_dir() else place.parents
    existing = next(folder for folder in above if folder.exists())
    try:  # its name, too: the file is written under a longer one
        tempfile.NamedTemporaryFile(dir=existing, prefix=f".{path.name}.").close()
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written: {error.strerror}") from error


def open_checkpoint(args, name, samples_from):
    """What --checkpoint, --class and --output ask for: (path, checkpoint, classes, output).

    classes: indices;  output: --output, or NAME_CLASS.png.  With --list-classes, prints them and
    ends the program.  Raises InputError where a file is not there or cannot be written.
    """
    path = find_checkpoint(samples_from, args.checkpoint, samples_from)
    checkpoint = load_checkpoint(path, samples_from)
    names = checkpoint["class_names"]
    if args.list_classes:
        print("\n".join(f"{y:3d}  {name}" for y, name in enumerate(names)))
        sys.exit()
    classes = parse_classes(args.class_, names, path)
    what = file_stems(names)[classes[0]] if len(classes) == 1 else "samples"
    output = args.output or Path(f"{name}_{what}.png")
    check_output(output, [".png", ".npz", ""])
    note_on_all(names)
    if checkpoint["step"] < YOUNG:
        print(f"{path} is of step {checkpoint['step']}, early in its training")
    return path, checkpoint, classes, output


def check_finite(images):
    """Raise InputError unless all values are finite."""
    if not images.isfinite().all():
        raise InputError("the samples are not finite: the weights are corrupted, or diverged")


def grid_columns(count, total):
    """The columns of a grid of `count` images of each class: a row for each class where it fits."""
    return count if 1 < count <= 20 else min(10, total)


def names_of_rows(labels, class_names, columns):
    """The class of each row of a grid; None for a single image, or where a row has several classes.

    labels: list of int, of the images row by row.
    """
    rows = [{*labels[i : i + columns]} for i in range(0, len(labels), columns)]
    if len(labels) == 1 or any(len(row) > 1 for row in rows):
        return None
    return [class_names[y] for (y,) in rows]


def with_names(picture, names):
    """A PIL picture of len(names) rows of one height, with the name of each at its left, on white.

    A name is cut after 80 characters.
    """
    height = picture.height / len(names)
    font = ImageFont.load_default(max(12, min(24, height / 4)))
    lines = [" ".join(name.split())[:80] for name in names]
    width = math.ceil(max(font.getlength(line) for line in lines)) + 20
    whole = Image.new(picture.mode, (width + picture.width, picture.height), "white")
    whole.paste(picture, (width, 0))
    draw = ImageDraw.Draw(whole)
    for i, line in enumerate(lines):
        draw.text((width - 10, (i + 0.5) * height), line, "black", font, anchor="rm")
    return whole


def image_grid(images, columns, rows=None):
    """float (N, C, H, W) in [-1, 1] -> a PIL picture, row by row, up to 8 times the size.

    rows: names beside the rows, as in with_names.
    """
    picture = to_picture(to_uint8(images).numpy(), columns)
    return with_names(picture, rows) if rows else picture


def to_picture(images, columns):
    """uint8 (N, C, H, W) -> one PIL picture: a grid like torchvision's, enlarged up to 8 times."""
    n, c, h, w = images.shape
    gap = 2 if n > 1 else 0
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    grid = np.zeros((rows * (h + gap) + gap, columns * (w + gap) + gap, c), np.uint8)
    for i, image in enumerate(images):
        top = i // columns * (h + gap) + gap
        left = i % columns * (w + gap) + gap
        grid[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    picture = Image.fromarray(grid[:, :, 0] if c == 1 else grid)
    scale = max(1, min(8, 1000 // picture.width))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_png(picture, path, texts):
    """Write a PIL picture as PNG, with {key: value} texts in its metadata."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())
    with written_whole(path) as scratch:
        picture.save(scratch, format="png", pnginfo=info)


def save_images(images, labels, class_names, path, columns, texts, rows=None):
    """Write images (N, C, H, W) in [-1, 1]: a grid, arrays or single PNGs.

    labels: int64 (N,);  path: .png, .npz (x uint8, y, class_names), or else a folder;
    columns: of the grid;  texts: {key: value} for the metadata of every PNG;  rows: names beside
    the rows of the grid, as in with_names.  Raises InputError if the images are not finite.
    """
    check_finite(images)
    if path.suffix.lower() == ".png":
        names = ", ".join(class_names[y] for y in dict.fromkeys(labels.tolist()))
        save_png(image_grid(images, columns, rows), path, {**texts, "class": names})
    elif path.suffix.lower() == ".npz":
        pixels = to_uint8(images).numpy()
        arrays = {"x": pixels, "y": labels.numpy(), "class_names": np.array(class_names)}
        with written_whole(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, **arrays)
    else:
        stems = file_stems(class_names)
        for i, (image, label) in enumerate(zip(to_uint8(images), labels, strict=True)):
            file = path / f"{i:05d}_{stems[label]}.png"
            about = {**texts, "class": class_names[label], "image": i}
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            save_png(Image.fromarray(pixels.numpy()), file, about)


def as_typed(value):
    """The value of a flag as in the command: (0, 0.8) is 0 0.8, and (0, 16, 32, 32) 0,16,32,32."""
    if isinstance(value, list | tuple):
        return (" " if len(value) == 2 else ",").join(f"{part:g}" for part in value)
    return value


def save_samples(args, name, opened, images, labels, options):
    """Write the images that the flags ask for, and say where, how they were made and from what.

    name: of the script;  opened: from open_checkpoint;  images, labels: as in save_images;
    options: of the script's sample(), also written into each PNG.
    """
    path, checkpoint, _, output = opened
    options = {key: as_typed(value) for key, value in options.items() if value is not None}
    texts = {"model": name, **options, "Software": f"{name}.py"}
    columns = grid_columns(args.num_samples, len(images))
    names = checkpoint["class_names"]
    rows = names_of_rows(labels.tolist(), names, columns) if args.names else None
    if options.get("guidance", checkpoint["config"].get("guidance")) == 0:  # that of a student
        print("guidance 0 ignores the class: the images are of any")
        rows = None
    save_images(images, labels, names, output, columns, texts, rows)
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items())
    print(f"wrote {output}: {settings} (weights: {path})")
