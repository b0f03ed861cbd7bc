# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=1.26",
#     "pillow>=10",
#     "onnxruntime-gpu>=1.17; sys_platform != 'darwin'",
#     "onnxruntime>=1.17; sys_platform == 'darwin'",
# ]
# ///
"""Draw images with an exported model: numpy, pillow and onnxruntime, no torch.

    python infer_onnx.py --class Sneaker                         one Sneaker
    python infer_onnx.py --class all --num-samples 10            ten of each class
    python infer_onnx.py --model vae --class Bag                 another model: vae, gan, ddpm, ddim, ldm, or a file
    python infer_onnx.py --info                                  what the model file says of itself

The model is the newest of runs/*/NAME.onnx (your own, made by export.py), else pretrained/NAME.onnx. The file says all
that is needed to use it. The same seed gives the same image as in torch, whatever the batch size.

Exit codes: 0 done, 2 wrong flags, 3 wrong model file, 4 provider not to be had, 5 the run failed, 130 Ctrl-C.
"""

import argparse
import base64
import contextlib
import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

METADATA_KEY = "model_card"  # where the .onnx file holds the JSON that says how to use it
METADATA_FORMAT = 4
SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"  # protobuf: field 14, metadata, of 74 bytes: the key, and a value of 64 bytes
CARD_KEYS = ("model", "kind", "class_names", "image_shape", "probe", "parts")
KIND_KEYS = {
    "diffusion": (
        "null_label",
        "alpha_bars",
        "prediction",
        "steps",
        "guidance",
        "guidance_limit",
        "guidance_fixed",
    ),
    "codes": ("latent_dim", "prior"),  # an image for a code: VAE and GAN
}
SOLVERS = ("ddim", "dpm++")
# The flags that a model has a use for, besides those that all share.
MODEL_FLAGS = {
    "ddim": ("steps", "guidance", "guidance_limit", "solver", "eta"),
    "ddpm": ("steps", "guidance", "guidance_limit", "variance"),
    "ldm": ("steps", "guidance", "guidance_limit", "solver", "eta"),
    "vae": ("truncation", "prior", "interpolate", "reconstruct", "between"),
    "gan": ("truncation", "interpolate"),
}


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what would be right."""


class ModelError(Exception):
    """The model file cannot be used."""


class ProviderError(Exception):
    """The provider asked for is not to be had."""


class RunError(Exception):
    """The model ran and failed."""


# --- Model ------------------------------------------------------------------------------------------------------


def find_model(name):
    """A path as it is; a name as the newest runs/*/NAME.onnx, else pretrained/NAME.onnx or NAME.onnx.

    Raises ModelError if there is none of these.
    """
    if name.endswith(".onnx") or "/" in name or os.sep in name or Path(name).is_file():
        return Path(name)
    runs = sorted(
        Path("runs").glob(f"*/{name}.onnx"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    shipped = [
        folder / f"{name}.onnx"
        for folder in (Path(__file__).parent / "pretrained", Path("pretrained"), Path())
    ]
    for path in [*runs, *shipped]:
        if path.is_file():
            return path
    raise ModelError(
        f"no model {name!r} in runs/ or pretrained/: name a file with --model, or make one with export.py"
    )


@dataclass
class Model:
    """A model file, read and checked, with the parts that it names: an encoder (VAE) or a decoder (LDM)."""

    session: ort.InferenceSession
    parts: dict  # name -> session
    card: dict  # what the file says of itself
    sha256: str
    trouble: str | None  # why CUDA is not used

    @property
    def where(self):
        """The provider it runs on, and why that is not CUDA."""
        return self.session.get_providers()[0] + (
            f"; not on CUDA: {self.trouble}" if self.trouble else ""
        )


def load_model(path, provider="auto", threads=0, tf32=True):
    """Read and check a model file and its parts beside it. Returns a Model.

    provider: auto (CUDA if it can run, else CPU), cuda (or ProviderError) or cpu.  Raises ModelError.
    """
    path = Path(path)
    trouble = None if provider == "cpu" else cuda_trouble()
    content = read_model(path)
    session = open_session(path, content, threads)
    card = read_card(session, path)
    contents = {"": content}
    for name, part in card["parts"].items():
        beside = path.with_name(Path(part["file"]).name)
        contents[name] = read_model(beside)
        if hashlib.sha256(contents[name]).hexdigest() != part["sha256"]:
            raise ModelError(f"{beside} is not the {name} of {path}: export both again")
    sessions = {name: open_session(path, contents[name], threads) for name in card["parts"]} | {
        "": session
    }
    if provider != "cpu" and trouble is None:
        try:
            on_cuda = {
                name: open_session(path, content, threads, tf32)
                for name, content in contents.items()
            }
            if on_cuda[""].get_providers()[0] == "CUDAExecutionProvider":  # not a matter of course
                sessions = on_cuda
            else:
                trouble = "onnxruntime could not load its CUDA provider"
        except (
            ModelError
        ) as error:  # the model is sound, so this is CUDA's: memory, a busy device, ...
            trouble = f"CUDA did not start: {one_line(error.__cause__)}"
    if provider == "cuda" and trouble:
        raise ProviderError(f"no CUDA: {trouble}")
    session = sessions.pop("")
    return Model(session, sessions, card, hashlib.sha256(content).hexdigest(), trouble)


def read_model(path):
    """The bytes of a model file; ModelError where they cannot be ONNX."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the model itself: run git lfs pull")
    if content.startswith(b"PK"):
        raise ModelError(
            f"{path} is a checkpoint or another archive, not ONNX: export it with export.py"
        )
    if content != sealed(content[: -len(SEAL) - 64]):
        raise ModelError(
            f"{path} is damaged, or not a file that export.py wrote: export it again, or fetch it again"
        )
    return content


def sealed(content):
    """The bytes of an ONNX model with their SHA-256 after them, which is one more entry of the metadata.

    onnxruntime sees no damage to the weights: a single bit would silently draw other pictures.
    """
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


def open_session(path, content, threads, tf32=None):
    """A session of onnxruntime, on the CPU; on CUDA if tf32 says how."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an error is ours to report, in one line
    options.intra_op_num_threads = threads
    cuda = (
        "CUDAExecutionProvider",
        {"use_tf32": str(int(bool(tf32))), "cudnn_conv_algo_search": "HEURISTIC"},
    )
    providers = ["CPUExecutionProvider"] if tf32 is None else [cuda, "CPUExecutionProvider"]
    try:
        return ort.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own kinds, one for every way to be broken
        raise ModelError(
            f"{path} is not an ONNX model that onnxruntime can load: {one_line(error)}"
        ) from error


def read_card(session, path):
    """The JSON in the model's metadata. Raises ModelError if there is none, or a newer or a broken one."""
    try:
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            raise ModelError(f"{path} is an ONNX model, but not one that export.py wrote")
        card = json.loads(text)
        version = card["format"]
        missing = [
            key for key in (*CARD_KEYS, *KIND_KEYS.get(card.get("kind"), ())) if key not in card
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} has broken metadata: {one_line(error)}") from error
    if version != METADATA_FORMAT:
        raise ModelError(
            f"{path} has metadata format {version}, this infer_onnx.py reads {METADATA_FORMAT}: "
            + (
                "update infer_onnx.py"
                if isinstance(version, int) and version > METADATA_FORMAT
                else "export it again"
            )
        )
    if missing:
        raise ModelError(f"{path}: no {missing[0]} in its metadata")
    if card["kind"] not in KIND_KEYS or card["model"] not in MODEL_FLAGS:
        raise ModelError(f"{path}: unknown kind {card['kind']!r} or model {card['model']!r}")
    return card


def cuda_trouble():
    """Why the CUDA provider cannot run here, in words; None if nothing speaks against it.

    onnxruntime does not say: it lists the provider on any machine, and a session falls back to the CPU in silence.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime is a build without CUDA (onnxruntime-gpu has it, on Linux and Windows)"
    windows = os.name == "nt"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    count, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    driver.cuDriverGetVersion(ctypes.byref(version))
    needed = int(str(getattr(ort, "cuda_version", "") or "12").split(".")[0])
    if version.value // 1000 < needed:
        return f"the NVIDIA driver is for CUDA {version.value // 1000}, onnxruntime needs CUDA {needed}"
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; so do we
            ort.preload_dlls()
    libraries = [
        ("cublasLt", needed),
        ("cudart", needed),
        ("cudnn", 9),
        *([] if windows else [("curand", 10)]),
    ]
    for library, number in libraries:
        file = f"{library}64_{number}.dll" if windows else f"lib{library}.so.{number}"
        try:
            ctypes.CDLL(file)
        except OSError:
            return f'{file} is not installed (pip install "onnxruntime-gpu[cuda,cudnn]" brings it)'
    return None


def one_line(error):
    """The first line of an error's text, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- Sampling ---------------------------------------------------------------------------------------------------
# The equations are those of ddim.py and ddpm.py word for word: they take arrays of either kind.


def time_pairs(num_timesteps, steps):
    """[(t, t_prev), ..., (t, -1)]: exactly `steps` pairs from t = T-1 down, closer together near the image.

    t + 1 = T * (i / steps)^1.3 for i = steps ... 1, or the lowest still free: DDIM's appendix D.2 has the exponents 1
    and 2; benchmarks/trials.py compares them.  Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps {steps} is not in 1..{num_timesteps}")
    times = [max(int(num_timesteps * (i / steps) ** 1.3 + 0.5), i) - 1 for i in range(steps, 0, -1)]
    return list(zip(times, [*times[1:], -1], strict=True))


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


def fitted_prior(card):
    """The mixture of each class in a card, as arrays for draw_codes; None is N(0, 1)."""
    if card["prior"] is None:
        return None
    arrays = {}
    for key, part in card["prior"].items():
        dtype, form = ("float16", "<f2") if key == "scales" else ("float32", "<f4")
        arrays[key] = np.frombuffer(base64.b64decode(part[dtype]), form).reshape(part["shape"])
    return arrays


def run_session(session, **feed):
    """The first output of a session for named inputs; RunError if it fails."""
    try:
        return session.run(None, feed)[0]
    except Exception as error:  # onnxruntime's own kinds; memory is the usual one
        raise RunError(
            f"onnxruntime failed, a smaller --batch-size may help: {one_line(error)}"
        ) from error


def denoiser(session, y, guidance, null_label, until=math.inf):
    """denoise(x_t, t) -> network output, with classifier-free guidance as in ddim.py's `guided`. y: int64 (B,)."""
    null = np.full_like(y, null_label)

    def run(x_t, t, labels):
        return run_session(session, x_t=x_t, t=np.full(len(labels), t, np.int64), y=labels)

    def denoise(x_t, t):
        if guidance in (0, 1) or (guidance > 1 and t >= until):
            return run(x_t, t, y if guidance else null)
        output_u, output_c = np.split(
            run(np.concatenate([x_t, x_t]), t, np.concatenate([null, y])), 2
        )
        return output_u + guidance * (output_c - output_u)

    return denoise


def as_bytes(images):
    """Images in [-1, 1] -> uint8 0..255; RunError if they are no finite numbers."""
    if not np.isfinite(images).all():
        raise RunError("the network gave numbers that are not finite")
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def in_batches(model, draw, count, batch_size):
    """uint8 images, `count` of them, of draw(indices); on CUDA in batches of one size, since cuDNN tunes for each."""
    on_cuda, images = model.session.get_providers()[0] == "CUDAExecutionProvider", []
    for first in range(0, count, batch_size):
        indices = list(range(first, min(first + batch_size, count)))
        size = len(indices)
        if on_cuda and first > 0:
            indices += indices[-1:] * (batch_size - size)
        images.append(as_bytes(draw(indices)[:size]))
        if count > batch_size and sys.stderr.isatty():
            print(f"\r{first + size} of {count} images", end="", file=sys.stderr, flush=True)
    if count > batch_size and sys.stderr.isatty():
        print(file=sys.stderr)
    return np.concatenate(images)


def sample(
    model, labels, *, steps=None, guidance=None, guidance_limit=None, solver="ddim", eta=0.0, variance="small",
    truncation=None, prior="fitted", seed=0, first=0, batch_size=100,
):  # fmt: skip
    """Draw one image for each label: uint8 (N, C, 32, 32). Image i depends on (seed, first + i), not on the batch.

    model: from load_model;  labels: list of int, classes of its card;  steps, guidance, guidance_limit: of diffusion
    models, else the card's;  solver, eta: for ddim and ldm;  variance: for ddpm;  truncation: for vae and gan;
    prior: for vae.
    Raises ValueError for other labels or solvers, RunError if the network fails or gives no finite numbers.
    """
    card = model.card
    if not labels or not all(
        0 <= y < len(card["class_names"]) for y in labels
    ):  # CUDA would read past the table
        raise ValueError(
            f"labels {labels} must be one or more of 0..{len(card['class_names']) - 1}"
        )
    if card["kind"] == "codes":
        mixture = fitted_prior(card) if prior == "fitted" else None
        streams = noise_streams(seed, range(first, first + len(labels)))
        codes = draw_codes(mixture, labels, streams, card["latent_dim"], truncation)
        return decode_codes(
            model, codes, class_weights(labels, len(card["class_names"])), batch_size
        )
    guidance = card["guidance"] if guidance is None else guidance
    alpha_bars = np.array(card["alpha_bars"], np.float64)
    until = len(alpha_bars) * (card["guidance_limit"] if guidance_limit is None else guidance_limit)
    pairs = time_pairs(len(alpha_bars), card["steps"] if steps is None else steps)
    latent = card.get("latent_shape")
    walk, options = ddim_sample, {"eta": eta, "solver": solver}
    if card["model"] == "ddpm":
        walk, options = ddpm_sample, {"variance": variance}

    def drawn(indices):
        streams = noise_streams(seed, [first + i for i in indices])

        def draw():
            return draw_noise(streams, latent or card["image_shape"])

        y = np.array([labels[i] for i in indices], np.int64)
        denoise = denoiser(model.session, y, guidance, card["null_label"], until)
        x_0 = walk(
            denoise,
            draw(),
            alpha_bars,
            pairs,
            card["prediction"],
            clip=not latent,
            draw=draw,
            **options,
        )
        if not latent:
            return x_0
        mean, std = (
            np.array(card[key], np.float32).reshape(-1, 1, 1)
            for key in ("latent_mean", "latent_std")
        )
        return run_session(model.parts["decoder"], z=x_0 * std + mean)

    return in_batches(model, drawn, len(labels), batch_size)


def class_weights(labels, num_classes):
    """What a decoder takes for classes: float32 (N, num_classes), 1 for the label."""
    return np.eye(num_classes, dtype=np.float32)[labels]


def decode_codes(model, codes, classes, batch_size=100):
    """uint8 images of codes float32 (N, D) and class weights float32 (N, classes)."""
    return in_batches(
        model,
        lambda i: run_session(model.session, z=codes[i], classes=classes[i]),
        len(codes),
        batch_size,
    )


def on_the_way(model, ends, labels, count, keep_length, batch_size):
    """uint8 images on the way from one code to another and from one class to another, `count` of them.

    ends: codes float32 (2, D);  labels: two classes;  keep_length: lengthen codes as a straight line shortens noise.
    """
    weight = np.linspace(0, 1, count, dtype=np.float32)[:, None]
    classes = class_weights(labels, len(model.card["class_names"]))
    codes, lengths = line(*ends, weight), [np.linalg.norm(z) for z in ends]
    if keep_length:
        codes = codes / np.linalg.norm(codes, axis=1, keepdims=True) * line(*lengths, weight)
    return decode_codes(model, codes.astype(np.float32), line(*classes, weight), batch_size)


def line(a, b, weight):
    return a + weight * (b - a)


# --- Noise and classes, as in common.py -------------------------------------------------------------------------


def noise_streams(seed, indices):
    """One NumPy generator per image, keyed by (seed, image index).

    Image i starts from the same noise whatever the batch, the device or the runtime (torch or ONNX Runtime).
    """
    return [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]


def draw_noise(streams, shape):
    """The next standard normal array of every stream: float32 (len(streams), *shape)."""
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def check_output(path, endings, given=()):
    """Refuse an output that could not be written, before the work is done.

    endings: of its name; "" is a folder;  given: names of images, or None, which it may not replace.
    """
    if path.suffix not in endings:
        names = " or ".join(ending for ending in endings if ending)
        raise InputError(
            f"--output {path}: the name must end in {names}" + ", or be a folder" * ("" in endings)
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise InputError(f"--output {path} is a folder that holds files: name another")
    if path.is_file() and not path.suffix:
        raise InputError(
            f"--output {path} is a file, where a folder for pictures would go: name another"
        )
    if path.resolve() in [Path(name).resolve() for name in given if name]:
        raise InputError(f"{path} is an image that is given: name another --output")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"--output {path} cannot be written: {error.strerror}") from error


def file_stem(class_name):
    """'T-shirt/top' -> 't-shirt-top': safe in a file name, and one that parse_classes understands."""
    return "".join(c if c.isalnum() else "-" for c in class_name.lower())


def parse_classes(text, class_names):
    """'Sneaker', 'sneaker,bag', '7' or 'all' -> list of class indices. Raises InputError naming close matches."""
    if text.strip().lower() == "all":
        return list(range(len(class_names)))
    lower = [file_stem(name) for name in class_names]
    indices = []
    for part in (p.strip() for p in text.split(",")):
        if file_stem(part) in lower:
            indices.append(lower.index(file_stem(part)))
        elif part.isascii() and part.isdecimal() and len(part) < 6 and int(part) < len(class_names):
            indices.append(int(part))
        else:
            close = difflib.get_close_matches(file_stem(part), lower, n=3) or lower[:10]
            names = ", ".join(class_names[lower.index(c)] for c in close)
            raise InputError(
                f"no class {part!r}: did you mean {names}? (or 0..{len(class_names) - 1}, or all)"
            )
    return indices


# --- Output -----------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path):
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds, delete it if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def to_picture(images, columns):
    """uint8 (N, C, H, W) -> one PIL picture like torchvision's grid, `columns` wide, up to 8 times the size."""
    n, c, h, w = images.shape
    gap = 2 if n > 1 else 0
    grid = np.zeros((-(-n // columns) * (h + gap) + gap, columns * (w + gap) + gap, c), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        grid[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    picture = Image.fromarray(grid[:, :, 0] if c == 1 else grid)
    scale = max(1, min(8, 1000 // picture.width))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save(images, labels, class_names, path, columns, texts, first=0):
    """Write uint8 images to a .png (grid), an .npz (x, y) or a folder of PNGs, numbered from `first` on.

    texts: {key: value}, go into every PNG.
    """
    if path.suffix == ".npz":
        with written_whole(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(
                file, x=images, y=np.array(labels), class_names=np.array(class_names)
            )
        return
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, str(value))
    if path.suffix == ".png":
        info.add_text("class", ", ".join(class_names[y] for y in dict.fromkeys(labels)))
        with written_whole(path) as scratch:
            to_picture(images, columns).save(scratch, format="png", pnginfo=info)
        return
    for i, (image, label) in enumerate(zip(images, labels, strict=True), first):
        own = PngInfo()
        for key, value in (*texts.items(), ("class", class_names[label]), ("image", i)):
            own.add_text(key, str(value))
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        with written_whole(path / f"{i:05d}_{file_stem(class_names[label])}.png") as scratch:
            picture.save(scratch, format="png", pnginfo=own)


# --- Command line -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line; argparse would print the usage before it
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: int or float in [low, high], or in (low, high] with above."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            limits = f"{'above' if above else 'from'} {low}" + (
                f" to {high}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' * (kind is int)}number {limits}"
            )
        return value

    return parse


def shard(text):
    """An argparse type: '2/4', the second of four parts, -> (2, 4)."""
    part, _, parts = text.partition("/")
    parts = number(int, 1, 100_000)(parts)
    return number(int, 1, parts)(part), parts


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="infer_onnx.py", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--class",
        dest="class_",
        metavar="NAME",
        default="all",
        help="name or index, several with commas, or all (all)",
    )
    add(
        "--num-samples",
        type=number(int, 1, 1_000_000),
        default=1,
        help="images of each class, or frames (1)",
    )
    add(
        "--steps", type=number(int, 1), help="steps of the sampler, at most T (the model's default)"
    )
    add(
        "--guidance",
        type=number(float, 0),
        help="0 no class, 1 plain class, above 1 guided (the model's default)",
    )
    add(
        "--guidance-limit",
        type=number(float, 0, 1),
        help="guide at t below this share of T (the model's default)",
    )
    add(
        "--solver",
        choices=SOLVERS,
        help="of ddim and ldm: dpm++ is of second order, for few steps (ddim)",
    )
    add(
        "--eta",
        type=number(float, 0, 1),
        help="of ddim and ldm: 0 deterministic ... 1 as noisy as DDPM (0)",
    )
    add(
        "--variance", choices=("small", "large"), help="of ddpm: the posterior's, or beta_t (small)"
    )
    add(
        "--truncation",
        type=number(float, 0.1),
        help="of vae and gan: redraw noise beyond +- this (not)",
    )
    add("--prior", choices=("fitted", "normal"), help="of vae: where codes are drawn from (fitted)")
    add(
        "--interpolate",
        choices=("noise", "class"),
        help="of vae and gan: between two noises of a class, or two classes",
    )
    add(
        "--reconstruct",
        metavar="FILE",
        nargs="+",
        help="of vae: images (with --class), and as decoded from their codes",
    )
    add(
        "--between",
        metavar="FILE",
        nargs=2,
        help="of vae: from one image to the other, in --num-samples frames",
    )
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the noise (0)")
    add("--batch-size", type=number(int, 1), default=100, help="images at a time (100)")
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="the I-th of N parts of the images, for several machines",
    )
    add(
        "--model",
        default="ddim",
        help="an .onnx file, or a name to look for in runs/ and pretrained/ (ddim)",
    )
    add("--output", type=Path, help="a .png grid, an .npz, or a folder for PNGs (CLASS.png)")
    add(
        "--provider",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cuda is that or an error (auto)",
    )
    add("--threads", type=number(int, 0, 1024), default=0, help="on the CPU; 0 is one per core (0)")
    add(
        "--no-tf32",
        dest="tf32",
        action="store_false",
        help="on CUDA: full float32 products, slower",
    )
    add("--info", action="store_true", help="print what the model file says of itself")
    add(
        "--check",
        action="store_true",
        help="compare the network here with what it gave where it was exported",
    )
    add(
        "--benchmark",
        action="store_true",
        help="time network evaluations and images at several batch sizes",
    )
    return parser


def read_image(path, image_shape):
    """An image file as float32 (C, 32, 32) in [-1, 1]; 28x28 is padded, other sizes are resized."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(
                ("I", "F")
            ):  # pillow would clip these to white without a word
                raise ValueError("more than 8 bits a channel")
            picture = picture.convert("L" if image_shape[0] == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image ({one_line(error)})") from error
    if picture.size == (28, 28):
        picture = ImageOps.expand(picture, 2)
    elif picture.size != (32, 32):
        picture = picture.resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.array(picture).reshape(32, 32, -1).transpose(2, 0, 1)
    return pixels.astype(np.float32) / 127.5 - 1


def evaluation(model, count):
    """A function that evaluates the network once, for `count` images: noise and class of the card's probe."""
    card = model.card
    probe, classes = card["probe"], len(card["class_names"])
    if card["kind"] == "codes":
        z = draw_noise(noise_streams(probe["seed"], range(count)), [card["latent_dim"]])
        return lambda: run_session(
            model.session, z=z, classes=class_weights([probe["y"]] * count, classes)
        )
    x_t = draw_noise(
        noise_streams(probe["seed"], range(count)), card.get("latent_shape", card["image_shape"])
    )
    denoise = denoiser(model.session, np.full(count, probe["y"], np.int64), 1, card["null_label"])
    return lambda: denoise(x_t, probe["t"])


def part_inputs(shapes, probe, classes):
    """What a part is checked with: noise of the shapes {input: shape}, and the class of the card's probe."""
    inputs = {
        name: draw_noise(noise_streams(probe["seed"], [0]), shape) for name, shape in shapes.items()
    }
    return inputs | {
        name: class_weights([probe["y"]], classes) for name in inputs.keys() & {"classes"}
    }


def check(model):
    """Run the network, and its parts, on the card's probe; RunError if an output is not what it was at the export."""
    card = model.card
    outputs = {card["model"]: (evaluation(model, 1)(), card["probe"]["output"])}
    for name, session in model.parts.items():
        if "output" not in card["parts"][name]:
            raise RunError(f"the {name} was exported before it could be checked: export it again")
        shapes = {given.name: given.shape[1:] for given in session.get_inputs()}
        inputs = part_inputs(shapes, card["probe"], len(card["class_names"]))
        outputs[name] = run_session(session, **inputs), card["parts"][name]["output"]
    limit = (
        1e-4 if model.session.get_providers()[0] == "CPUExecutionProvider" else 1e-2
    )  # CUDA: TF32
    for name, (found, expected) in outputs.items():
        difference = float(
            np.abs(found.ravel()[: len(expected)] - np.array(expected, np.float32)).max()
        )
        if not difference <= limit:
            raise RunError(
                f"the check failed: {name}'s outputs differ by {difference:.1e} from the export's, limit {limit:.0e}"
            )
        print(f"check passed: {name}'s outputs within {difference:.1e} of those at the export")


def evaluations(card, *, steps=None, guidance=None, guidance_limit=None, **_):
    """Evaluations of the network for an image, with options as sample takes them: a guided step takes two."""
    if card["kind"] == "codes":
        return 1
    guidance = card["guidance"] if guidance is None else guidance
    until = len(card["alpha_bars"]) * (
        card["guidance_limit"] if guidance_limit is None else guidance_limit
    )
    pairs = time_pairs(len(card["alpha_bars"]), card["steps"] if steps is None else steps)
    return len(pairs) + sum(
        guidance not in (0, 1) and (guidance < 1 or t < until) for t, _ in pairs
    )


def benchmark(model, options):
    """Print, at several batch sizes, the median time of a network evaluation and the images drawn in a second."""
    passes = evaluations(model.card, **options)
    print(
        f"batch  ms per evaluation  ms per evaluation and image  images/s drawn ({passes} evaluations each)"
    )
    for batch in (1, 4, 16, 64):
        evaluate, times = evaluation(model, batch), []
        for _ in range(12):
            start = time.perf_counter()
            evaluate()
            times.append(time.perf_counter() - start)
        median = sorted(times[2:])[5]  # the first two warm up
        start = time.perf_counter()
        sample(model, [model.card["probe"]["y"]] * batch, batch_size=batch, **options)
        drawn = batch / (time.perf_counter() - start)
        print(f"{batch:5d}  {median * 1e3:17.2f}  {median * 1e3 / batch:27.2f}  {drawn:14.1f}")


def draw_images(model, args, classes, options, first, stop):
    """What the flags ask for: (uint8 images, their labels, columns of the grid).  first, stop: of the samples."""
    card, count = model.card, args.num_samples
    if args.reconstruct or args.between:
        if len(classes) != 1:
            raise InputError("--reconstruct and --between need one --class, that of the images")
        x = np.stack(
            [read_image(path, card["image_shape"]) for path in args.reconstruct or args.between]
        )
        weights = class_weights(classes * len(x), len(card["class_names"]))
        rows = [slice(i, i + args.batch_size) for i in range(0, len(x), args.batch_size)]
        codes = np.concatenate(
            [run_session(model.parts["encoder"], x=x[i], classes=weights[i]) for i in rows]
        )
        if args.between:
            return (
                on_the_way(model, codes, classes * 2, count, False, args.batch_size),
                classes * count,
                count,
            )
        images = np.concatenate([as_bytes(x), decode_codes(model, codes, weights, args.batch_size)])
        return images, classes * len(images), len(x)
    if args.interpolate:
        same = args.interpolate == "noise"
        pairs, images = [[y, y] for y in classes] if same else [classes], []
        mixture = fitted_prior(card) if options.get("prior", "fitted") == "fitted" else None
        for pair in pairs:
            streams = noise_streams(args.seed, [0, 1] if same else [0, 0])
            codes = draw_codes(mixture, pair, streams, card["latent_dim"], args.truncation)
            images.append(
                on_the_way(model, codes, pair, count, card["model"] == "gan", args.batch_size)
            )
        return np.concatenate(images), [pair[0] for pair in pairs for _ in range(count)], count
    labels = [y for y in classes for _ in range(count)][first:stop]
    images = sample(
        model, labels, seed=args.seed, first=first, batch_size=args.batch_size, **options
    )
    return images, labels, count if 1 < count <= 20 else min(10, len(labels))


def run(args):
    path = find_model(args.model)
    model = load_model(path, args.provider, args.threads, args.tf32)
    card, name = model.card, model.card["model"]
    names = card["class_names"]
    if args.info:
        short = {
            k: v if k not in ("alpha_bars", "probe", "prior") else "..." for k, v in card.items()
        }
        short["parts"] = {name: {**part, "output": "..."} for name, part in card["parts"].items()}
        print(json.dumps({"file": str(path), "sha256": model.sha256, **short}, indent=1))
        return
    for flag in dict.fromkeys(flag for flags in MODEL_FLAGS.values() for flag in flags):
        if flag not in MODEL_FLAGS[name] and getattr(args, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')} is not for {name} models: leave it out")
    options = {
        flag: getattr(args, flag) for flag in ("solver", "eta", "variance", "truncation", "prior")
    }
    options = {flag: value for flag, value in options.items() if value is not None}
    if args.solver == "dpm++" and args.eta:
        raise InputError("--solver dpm++ needs the deterministic sampler, --eta 0")
    if card["kind"] == "diffusion":
        own = ("steps", "guidance", "guidance_limit")
        options |= {k: card[k] if getattr(args, k) is None else getattr(args, k) for k in own}
        if options["steps"] > len(card["alpha_bars"]):
            raise InputError(
                f"--steps {options['steps']} is more than the {len(card['alpha_bars'])} of the training"
            )
        if card["guidance_fixed"] and options["guidance"] != card["guidance"]:
            raise InputError(f"this model knows no other --guidance than {card['guidance']}")
    print(f"running on {model.where}")
    if args.check:
        return check(model)
    if args.benchmark:
        return benchmark(model, options)
    classes = parse_classes(args.class_, names)
    special = [flag for flag in ("interpolate", "reconstruct", "between") if getattr(args, flag)]
    if len(special) > 1:
        raise InputError(f"--{special[0]} and --{special[1]} are one at a time")
    if args.interpolate == "class" and len(classes) != 2:
        raise InputError(
            "--interpolate class goes from one class to another: give two, as in --class Sneaker,Bag"
        )
    if (args.interpolate or args.between) and args.num_samples < 2:
        raise InputError("frames from one picture to another need --num-samples 2 or more")
    (part, parts), count = args.shard or (1, 1), len(classes) * args.num_samples
    first, stop = count * (part - 1) // parts, count * part // parts
    if args.shard and (special or first == stop or not args.output or args.output.suffix):
        raise InputError("--shard needs an --output that is a folder, and as many images as parts")
    what = file_stem(names[classes[0]]) if len(classes) == 1 else "samples"
    output = args.output or Path(f"{what}.png")
    if not (
        args.shard
        and output.is_dir()
        and all(path.name.lstrip(".")[:5].isdecimal() for path in output.iterdir())
    ):
        check_output(
            output, [".png", ".npz", ""], args.reconstruct or args.between or ()
        )  # shards share a folder
    start = time.perf_counter()
    images, labels, columns = draw_images(model, args, classes, options, first, stop)
    seconds = time.perf_counter() - start
    texts = {
        "model": name,
        "model_sha256": model.sha256,
        **options,
        "seed": args.seed,
        "Software": "infer_onnx.py",
    }
    save(images, labels, names, output, columns, texts, first)
    said = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in {**options, "seed": args.seed}.items()
    )
    print(f"wrote {output}: {len(images)} images in {seconds:.2f} s, {said}, model {path}")


def main(argv=None):
    ort.set_default_logger_severity(4)
    parser = build_parser()
    args = parser.parse_args(argv)
    codes = {
        InputError: 2,
        ModelError: 3,
        ProviderError: 4,
        RunError: 5,
        MemoryError: 5,
        OSError: 5,
    }
    try:
        run(args)
    except tuple(codes) as error:
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        parser.exit(code, f"{parser.prog}: error: {one_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
