# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "onnxruntime-gpu>=1.19; sys_platform == 'linux' and platform_machine == 'x86_64'",
#     "onnxruntime-gpu>=1.19; sys_platform == 'win32' and platform_machine == 'AMD64'",
#     "onnxruntime>=1.19; sys_platform == 'linux' and platform_machine != 'x86_64'",
#     "onnxruntime>=1.19; sys_platform == 'win32' and platform_machine != 'AMD64'",
#     "onnxruntime>=1.19; sys_platform != 'linux' and sys_platform != 'win32'",
# ]
# ///
"""Sample from an exported model with numpy, pillow and onnxruntime, without torch.

    python infer_onnx.py --class Sneaker                 one Sneaker
    python infer_onnx.py --class all --num-samples 10    ten images of each class
    python infer_onnx.py --model vae --class Bag         gan, ddpm, ldm, distill, distill2, a file
    python infer_onnx.py --info                          what the model file says about itself
    python infer_onnx.py --list-classes                  the names of its classes and their indices

The model is the newest runs/*/NAME.onnx (written by export.py), else pretrained/NAME.onnx, else
NAME.onnx. The file contains everything that is needed to use it. The same seed gives the same image
as in torch, whatever the batch size.

A class is named exactly, by its index, without regard to case and punctuation, or by a prefix
that no other class has; a name that fits several classes is refused, with their indices.

Exit codes: 0 done, 2 wrong flags, 3 model file cannot be used, 4 provider not available,
5 run failed, 130 Ctrl-C.
"""

import argparse
import base64
import ctypes
import difflib
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import numpy as np

# Without this, onnxruntime 1.29 and later write a device id below ~/.cache and report to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

METADATA_KEY = "model_card"  # of the .onnx metadata entry whose JSON says how to use the model
METADATA_FORMAT = 5
SEAL_KEY = "sha256"  # of the last metadata entry, which has the sum of all before it
# Protobuf: field 14 (metadata) of 74 bytes, whose key is "sha256" and whose value has 64 bytes.
SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"
CARD_KEYS = ("model", "kind", "class_names", "image_shape", "probe", "parts")
# Options of `sample` whose defaults are in the card.
DIFFUSION_OPTIONS = ("steps", "guidance", "guidance_interval")
KIND_KEYS = {
    "diffusion": ("null_label", "alpha_bars", "prediction", "guidance_fixed", *DIFFUSION_OPTIONS),
    "codes": ("latent_dim", "prior"),  # decodes a latent code: VAE and GAN
}
KIND_KEYS["sampler"] = KIND_KEYS["diffusion"]  # all of it in one graph: export.py --sampler
SOLVERS = ("ddim", "dpm++")
# Flags that only some models take.
MODEL_FLAGS = {
    "ddim": (*DIFFUSION_OPTIONS, "solver", "eta"),
    "ddpm": (*DIFFUSION_OPTIONS, "variance"),
    "ldm": (*DIFFUSION_OPTIONS, "solver", "eta"),
    "distill": ("steps",),  # and only those that it was trained for
    "vae": ("truncation", "prior", "interpolate", "reconstruct", "between"),
    "gan": ("truncation", "interpolate"),
}
REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
YOUNG = 1000  # steps before which samples may be noise still
SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


class InputError(ValueError):
    """Wrong input from the user; the message is one line: what is wrong, what would be right."""


class ModelError(Exception):
    """The model file cannot be used."""


class ProviderError(Exception):
    """The requested execution provider is not available."""


class RunError(Exception):
    """The model ran and failed."""


# --- Model ----------------------------------------------------------------------------------------


def find_model(name):
    """The path of a model.

    A path as it is, else the newest runs/*/NAME.onnx, else pretrained/NAME.onnx, else NAME.onnx.
    Raises ModelError if there is none of these.
    """
    if name.lower().endswith(".onnx") or "/" in name or os.sep in name or Path(name).is_file():
        return Path(name)
    files = Path("runs").glob(f"*/{glob.escape(name)}.onnx")
    runs = sorted(files, key=lambda path: path.stat().st_mtime)
    folders = (Path(__file__).resolve().parent / "pretrained", Path("pretrained"), Path())
    for path in [*reversed(runs), *(folder / f"{name}.onnx" for folder in folders)]:
        if path.is_file():
            return path
    places = "runs/, pretrained/ or this folder"
    raise ModelError(f"no model {name!r} in {places}: run export.py, or name a file")


@dataclass
class Model:
    """A model file, read and checked, and its parts: a VAE's encoder or an LDM's decoder."""

    session: "ort.InferenceSession"  # as text: onnxruntime may be incomplete, see check_runtime
    parts: dict  # name -> session
    card: dict  # the metadata that says how to use the model
    sha256: str
    sealed: bool  # whether the file ends with the checksum of its content
    trouble: str | None  # why CUDA is not used

    @property
    def provider(self):
        return self.session.get_providers()[0]

    @property
    def where(self):
        """The provider in use, and the reason if that is not CUDA."""
        return f"{self.provider}; not on CUDA: {self.trouble}" if self.trouble else self.provider


def load_model(path, provider="auto", threads=0, tf32=True):
    """Read and check a model file and the files of its parts beside it. Returns a Model.

    provider: auto (CUDA where it works, else CPU), cuda (else ProviderError) or cpu;
    threads: of the CPU, 0 for one per core;  tf32: whether CUDA may use TF32.  Raises ModelError.
    """
    if provider not in ("auto", "cuda", "cpu"):
        raise InputError(f"provider {provider!r} is not one of auto, cuda, cpu")
    path = Path(path)
    trouble = None if provider == "cpu" else cuda_trouble()
    contents = {"": read_model(path)}
    is_sealed = has_seal(contents[""])
    try:
        sessions = {"": open_session(path, contents[""], threads)}
    except ModelError as error:
        if is_sealed:
            raise
        raise damaged(path) from error
    if not is_sealed and SEAL_KEY in sessions[""].get_modelmeta().custom_metadata_map:
        raise damaged(path)
    card = read_card(sessions[""], path)
    for name, part in card["parts"].items():
        part_path = path.with_name(Path(part["file"]).name)
        contents[name] = read_model(part_path)
        if hashlib.sha256(contents[name]).hexdigest() != part["sha256"]:
            remedy = "export both again, or seal them together with export.py seal"
            raise ModelError(f"{part_path} is not the {name} of {path}: {remedy}")
        sessions[name] = open_session(part_path, contents[name], threads)
    if provider != "cpu" and not trouble:
        try:
            on_cuda = {k: open_session(path, v, threads, CUDA, tf32) for k, v in contents.items()}
            if on_cuda[""].get_providers()[0] == CUDA:  # onnxruntime may fall back to the CPU
                sessions = on_cuda
            else:
                trouble = "onnxruntime could not load its CUDA provider"
        except ModelError as error:  # the CPU loaded the same file: CUDA is at fault
            trouble = f"CUDA did not start: {one_line(error.__cause__)}"
    if provider == "cuda" and trouble:
        raise ProviderError(f"no CUDA: {trouble}")
    sha256 = hashlib.sha256(contents[""]).hexdigest()
    return Model(sessions.pop(""), sessions, card, sha256, is_sealed, trouble)


def read_model(path):
    """The bytes of a model file, sealed or without a seal. Raises ModelError for a wrong seal."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the model itself: run git lfs pull")
    if content.startswith(b"PK"):
        raise ModelError(f"{path} is a checkpoint or an archive: export it with export.py")
    tail = content[-len(SEAL) - 74 :]  # where a seal begins that has become a little longer
    if not has_seal(content) and (SEAL[3:10] in tail or re.search(rb"[0-9a-f]{64}\Z", tail)):
        raise damaged(path)
    return content


def damaged(path):
    return ModelError(
        f"{path} is damaged, or not a file that export.py wrote: export it again "
        "(if you changed it: python export.py seal FILE)"
    )


def has_seal(content):
    """Whether the bytes of a file end with the right seal."""
    return content == sealed(content[: -len(SEAL) - 64])


def sealed(content):
    """The bytes of an ONNX model, followed by one more metadata entry: their SHA-256.

    onnxruntime does not detect corrupted weights: one wrong bit would change the images silently.
    """
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


def open_session(path, content, threads, provider=CPU, tf32=True):
    """An onnxruntime session for the bytes of a model. Raises ModelError naming the path."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are reported by this script, in one line
    options.intra_op_num_threads = threads
    cuda_options = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
    providers = [(CUDA, cuda_options), CPU] if provider == CUDA else [CPU]
    try:
        return ort.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise ModelError(
            f"{path} is not an ONNX model that onnxruntime can load: {one_line(error)}"
        ) from error


def read_card(session, path):
    """The model card, JSON in the metadata. Raises ModelError if it is absent, broken or newer."""
    try:
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            whole = path.with_name(f"{path.stem.rpartition('_')[0]}.onnx")
            if whole.is_file():  # the decoder of ldm.onnx or the encoder of vae.onnx
                raise ModelError(f"{path} is a part of {whole}: give that file")
            raise ModelError(f"{path} is an ONNX model, but not one that export.py wrote")
        card = json.loads(text)
        version = card["format"]
        has_solver = "solver" in MODEL_FLAGS.get(card.get("model"), ())
        if version == 4 and "guidance_limit" in card:  # the interval was (0, limit) then
            card["guidance_interval"] = [0, card.pop("guidance_limit")]
            if has_solver:
                card["solver"] = "ddim"
        keys = (*CARD_KEYS, *KIND_KEYS.get(card.get("kind"), ()), *["solver"] * has_solver)
        missing = [key for key in keys if key not in card]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} has broken metadata: {one_line(error)}") from error
    if version not in (4, METADATA_FORMAT):
        newer = isinstance(version, int) and version > METADATA_FORMAT
        remedy = "update infer_onnx.py" if newer else "export it again"
        reads = f"this infer_onnx.py reads 4 and {METADATA_FORMAT}"
        raise ModelError(f"{path} has metadata format {version}, {reads}: {remedy}")
    if missing:
        raise ModelError(f"{path}: no {missing[0]} in its metadata")
    if card["kind"] not in KIND_KEYS or card["model"] not in MODEL_FLAGS:
        raise ModelError(f"{path}: unknown kind {card['kind']!r} or model {card['model']!r}")
    if has_solver and card["solver"] not in SOLVERS:
        raise ModelError(f"{path}: unknown solver {card['solver']!r}")
    for key, right in values_of(card).items():
        if not right:
            raise ModelError(f"{path}: cannot use the {key} in its metadata")
    return card


def values_of(card):
    """Whether the values of a card that has all its keys are such as export.py writes: {key: bool}.

    Others would be sampled wrongly, or end in an error that says nothing.
    """

    def all_of(values, *types):
        return isinstance(values, list) and all(isinstance(value, types) for value in values)

    def is_count(value, most):
        return isinstance(value, int) and 1 <= value <= most

    parts = card["parts"] if isinstance(card["parts"], dict) else {"": None}
    of_model = {} if card["kind"] == "sampler" else {"ldm": {"decoder"}, "vae": {"encoder"}}
    needed = of_model.get(card["model"], set())
    right = {
        "class_names": all_of(card["class_names"], str) and len(card["class_names"]) > 0,
        "image_shape": all_of(card["image_shape"], int) and len(card["image_shape"]) == 3,
        "value_range": card.get("value_range", [-1, 1]) == [-1, 1],
        "parts": all_of([*parts.values()], dict) and needed <= parts.keys()
        and all_of([part.get("file") for part in parts.values()], str),
        "training": isinstance(card.get("training", {}), dict),
    }  # fmt: skip
    if card["kind"] == "codes":
        right["latent_dim"] = is_count(card["latent_dim"], 10**6)
        right["prior"] = right["latent_dim"] and right["class_names"] and is_prior(card)
        return right
    right["prediction"] = card["prediction"] in ("eps", "v")
    numbers = (1, *card["alpha_bars"], 0) if all_of(card["alpha_bars"], int, float) else (0, 0)
    falls = all(a > b for a, b in itertools.pairwise(numbers))
    right["alpha_bars"] = falls and len(numbers) > 2
    interval = card["guidance_interval"]
    is_pair = all_of(interval, int, float) and len(interval) == 2
    right["guidance_interval"] = is_pair and 0 <= interval[0] <= interval[1] <= 1
    right["steps"] = is_count(card["steps"], len(numbers) - 2)
    right["guidance"] = isinstance(card["guidance"], int | float) and 0 <= card["guidance"] <= 1000
    right["null_label"] = isinstance(card["null_label"], int)
    if card["model"] == "ldm" and card["kind"] == "diffusion":
        shape = card.get("latent_shape")
        right["latent_shape"] = all_of(shape, int) and len(shape) == 3
        channels = shape[0] if right["latent_shape"] else None
        for key in ("latent_mean", "latent_std"):
            right[key] = all_of(card.get(key), int, float) and len(card[key]) == channels
    return right


def is_prior(card):
    """Whether a card's prior, if it has one, gives each class its Gaussians."""
    dim, num_classes = card["latent_dim"], len(card["class_names"])
    sizes = {"means": dim, "scales": dim * (dim + 1) // 2}
    try:
        prior = fitted_prior(card)
        if prior is None:
            return True
        counts = [len(means) for means in prior["means"]]
        enough = 0 < min(counts) <= max(counts) <= prior["weights"].shape[1]
        found = [part.shape for key in sizes for part in prior[key]]
        wanted = [(count, size) for size in sizes.values() for count in counts]
        return enough and len(prior["weights"]) == num_classes == len(counts) and found == wanted
    except (AttributeError, LookupError, TypeError, ValueError):
        return False


# --- Denoise --------------------------------------------------------------------------------------


def run_session(session, **feed):
    """The first output of a session for named inputs. Raises RunError if it fails."""
    try:
        return session.run(None, feed)[0]
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        reason = one_line(error)
        raise RunError(f"onnxruntime failed, smaller batches may help: {reason}") from error


def denoiser(session, y, guidance, null_label, start, stop):
    """denoise(x_t, t) -> network output, with classifier-free guidance (Ho & Salimans 2022).

    output = output_u + guidance * (output_c - output_u), where u is without a class and c is with
    class y, int64 (B,);  start, stop: from guided_times; at other t, guidance above 1 counts as 1.
    """
    null = np.full_like(y, null_label)

    def network(x_t, t, labels):
        return run_session(session, x_t=x_t, t=np.full(len(labels), t, np.int64), y=labels)

    def denoise(x_t, t):
        if not is_guided(guidance, t, start, stop):
            return network(x_t, t, null if guidance == 0 else y)
        outputs = network(np.concatenate([x_t, x_t]), t, np.concatenate([null, y]))
        output_u, output_c = np.split(outputs, 2)
        return output_u + guidance * (output_c - output_u)

    return denoise


def is_guided(guidance, t, start, stop):
    """Whether step t needs the network both with a class and without it."""
    return guidance not in (0, 1) and (guidance < 1 or start <= t < stop)


# --- Walk -----------------------------------------------------------------------------------------
# The same functions as in ddim.py and ddpm.py: they work on NumPy arrays and on torch tensors.


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


def posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_prev, variance="small"):
    """Mean and variance of q(x_prev | x_t, x_0 = x_0_hat).

    DDPM eq. (7) for the mean; the variance is that of the same equation (small), or beta_t (large),
    section 3.2.  With skipped steps beta_t = 1 - alpha_bar_t / alpha_bar_prev, Nichol & Dhariwal
    section 4.

    x_0_hat, x_t: (B, C, H, W);  alpha_bar_t < alpha_bar_prev <= 1: numbers.
    Returns (like x_t, a number).
    """
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    mean = alpha_bar_prev**0.5 * beta_t / (1 - alpha_bar_t) * x_0_hat
    mean = mean + alpha_t**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * x_t
    if variance == "large":
        return mean, beta_t
    return mean, (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t


def ddpm_sample(
    denoise, x_T, alpha_bars, pairs, prediction, variance="small", clip=True, noise=None, trace=None
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
        x_0_hat, _ = predict_x_0_and_eps(denoise(x_t, t), x_t, prediction, alpha_bar_t, clip)
        # DDPM algorithm 2: noise enters every step but the last
        mean, sigma_squared = posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_prev, variance)
        x_prev = mean + sigma_squared**0.5 * noise() if t_prev >= 0 else mean
        if trace is not None:
            trace.append((t, x_t, x_0_hat))
        x_t = x_prev
    if trace is not None:
        trace.append((-1, x_t, x_t))
    return x_t


# --- Sample and picture ---------------------------------------------------------------------------


def sample(
    model, labels, *, steps=None, guidance=None, guidance_interval=None, solver=None, eta=None,
    variance=None, truncation=None, prior=None, seed=0, first=0, batch_size=100,
):  # fmt: skip
    """Sample one image for each label: uint8 (N, C, H, W); image i has noise (seed, first + i).

    model: from load_model;  labels: a list, array or tensor of class names or indices;
    steps, guidance, guidance_interval: of diffusion models, default from the card;  solver, eta: of
    ddim and ldm, the solver's default from the card, eta's 0;  variance: of ddpm (small);
    truncation: of vae and gan (off);  prior: of vae (fitted).  Raises InputError for other values
    and for options of other models, RunError if the network fails or its output is not finite,
    which a sampler in one graph hides: it returns bytes.
    """
    card = model.card
    given = {
        "steps": steps, "guidance": guidance, "guidance_interval": guidance_interval,
        "solver": solver, "eta": eta, "variance": variance, "truncation": truncation,
        "prior": prior,
    }  # fmt: skip
    check_use(card, given)
    check_options(**given, seed=seed, first=first, batch_size=batch_size)
    guidance = None if guidance is None else float(guidance)
    eta = float(eta or 0)
    labels = label_indices(labels, card["class_names"])
    if card["kind"] == "codes":
        mixture = None if prior == "normal" else fitted_prior(card)
        streams = noise_streams(seed, range(first, first + len(labels)))
        codes = sample_codes(mixture, labels, streams, card["latent_dim"], truncation)
        return decode_codes(
            model, codes, class_weights(labels, len(card["class_names"])), batch_size
        )
    solver = solver or card.get("solver", "ddim")  # ddpm and distill have none
    check_walk(card, steps, guidance, solver, eta)
    alpha_bars = np.array(card["alpha_bars"], np.float64)
    pairs, guidance, times = walk_of(card, steps, guidance, guidance_interval, solver)
    y = np.array(labels, np.int64)
    latent_shape = card.get("latent_shape")  # of an LDM
    shape = latent_shape or card["image_shape"]

    def streams_of(indices):
        return noise_streams(seed, [first + i for i in indices])

    if card["kind"] == "sampler":
        # Fractions of T between two times, so that float32 cannot move a time across them.
        interval = [(math.ceil(t) - 0.5) / len(alpha_bars) for t in times]
        settings = {
            "steps": np.array(len(pairs), np.int64), "guidance": np.array(guidance, np.float32),
            "guidance_interval": np.array(interval, np.float32),
            "second_order": np.array(solver == "dpm++"),
        }  # fmt: skip
        inputs = {entry.name for entry in model.session.get_inputs()}
        settings = {key: value for key, value in settings.items() if key in inputs}

        def whole(indices):
            noise = next_noise(streams_of(indices), shape)
            return run_session(model.session, noise=noise, labels=y[indices], **settings)

        return in_batches(model, whole, len(labels), batch_size)
    clip = not latent_shape

    def walk(indices):
        streams = streams_of(indices)

        def noise():
            return next_noise(streams, shape)

        denoise = denoiser(model.session, y[indices], guidance, card["null_label"], *times)
        arguments = (denoise, noise(), alpha_bars, pairs, card["prediction"])
        if card["model"] == "ddpm":
            x_0 = ddpm_sample(*arguments, variance=variance or "small", clip=clip, noise=noise)
        elif solver == "dpm++":
            x_0 = dpm_sample(*arguments, clip=clip)
        else:
            x_0 = ddim_sample(*arguments, eta=eta, clip=clip, noise=noise)
        if not latent_shape:
            return x_0
        mean = np.array(card["latent_mean"], np.float32).reshape(-1, 1, 1)
        std = np.array(card["latent_std"], np.float32).reshape(-1, 1, 1)
        return run_session(model.parts["decoder"], z=x_0 * std + mean)

    return in_batches(model, walk, len(labels), batch_size)


def walk_of(card, steps=None, guidance=None, guidance_interval=None, solver=None):
    """(pairs, guidance, times) of a diffusion model's walk; None is the model's default.

    pairs: from time_pairs or dpm_pairs;  times: (start, stop) from guided_times.
    """
    steps = card["steps"] if steps is None else steps
    guidance = card["guidance"] if guidance is None else guidance
    interval = card["guidance_interval"] if guidance_interval is None else guidance_interval
    solver = solver or card.get("solver", "ddim")  # ddpm and distill have none
    pairs_of = dpm_pairs if solver == "dpm++" else time_pairs
    times = guided_times(interval, len(card["alpha_bars"]))
    return pairs_of(steps_limit(card), steps), guidance, times


def check_use(card, options):
    """Raise InputError for a given option of `sample` that this model or its file does not have."""
    for_some = set().union(*MODEL_FLAGS.values())
    for key, value in options.items():
        if value is not None and key in for_some and key not in MODEL_FLAGS[card["model"]]:
            name = key.replace("_", "-")
            raise InputError(f"--{name} is not for {card['model']} models: leave it out")
    if options.get("prior") == "fitted" and card["prior"] is None:
        raise InputError("--prior fitted: this model was exported without one: leave it out")


def check_walk(card, steps, guidance, solver, eta):
    """Raise InputError for what the training of a diffusion model or its solver rules out."""
    if solver == "dpm++" and eta:
        raise InputError(f"--eta {eta} is for --solver ddim: dpm++ is deterministic")
    if card["kind"] == "sampler" and eta:
        raise InputError("--eta is not for a sampler as one graph: leave it out")
    only = float(card["guidance"])
    if card["guidance_fixed"] and guidance not in (None, only):
        raise InputError(f"the label dropout of the training leaves only --guidance {only}")
    if card.get("steps_fixed") and steps not in (None, card["steps"]):
        raise InputError(f"this model was trained for --steps {card['steps']} only")
    limit = steps_limit(card)
    if steps is not None and steps > limit:
        raise InputError(f"--steps {steps} is more than the {limit} timesteps of a walk")


def steps_limit(card):
    """The largest number of sampling steps of a diffusion model."""
    return walk_length(np.array(card["alpha_bars"]), card["prediction"])


def evaluations(card, *, steps=None, guidance=None, guidance_interval=None, solver=None, **_):
    """Network evaluations per image, with options as in `sample`: a guided step takes two."""
    if card["kind"] == "codes":
        return 1
    pairs, guidance, times = walk_of(card, steps, guidance, guidance_interval, solver)
    return sum(2 if is_guided(guidance, t, *times) else 1 for t, _ in pairs)


def fitted_prior(card):
    """The Gaussian mixtures in a card as arrays for sample_codes; None stands for N(0, 1)."""
    if card["prior"] is None:
        return None
    arrays = {}
    types = {"scales": "float16", "counts": "int64"}
    for key, part in card["prior"].items():
        dtype = types.get(key, "float32")
        stored = np.dtype(dtype).newbyteorder("<")
        arrays[key] = np.frombuffer(base64.b64decode(part[dtype]), stored).reshape(part["shape"])
    return by_class(arrays)


def decode_codes(model, codes, classes, batch_size):
    """uint8 images of codes float32 (N, D) of a VAE or GAN; classes: from class_weights."""

    def decode(indices):
        return run_session(model.session, z=codes[indices], classes=classes[indices])

    return in_batches(model, decode, len(codes), batch_size)


def class_weights(labels, num_classes):
    """Class input of VAE and GAN: float32 (N, num_classes), 1 for the label and 0 elsewhere."""
    return np.eye(num_classes, dtype=np.float32)[labels]


def in_batches(model, images_of, count, batch_size):
    """uint8 images 0 ... count - 1, batch by batch from images_of(indices): uint8, or in [-1, 1].

    On CUDA the last batch is filled up, since cuDNN tunes itself anew for every batch size.
    """
    images = []
    for batch in batches_of(range(count), batch_size):
        indices = list(batch)
        size = len(indices)
        if model.provider == CUDA and indices[0] > 0:
            indices += indices[-1:] * (batch_size - size)
        images_now = images_of(indices)[:size]
        images.append(images_now if images_now.dtype == np.uint8 else as_bytes(images_now))
    return np.concatenate(images)


def batches_of(numbers, batch_size):
    """Yield a range batch by batch; if there are several, say on stderr how many are done.

    On a terminal that is one line, which changes; elsewhere whole lines, one every few seconds.
    """
    count = len(numbers)
    last = time.monotonic()
    for start in range(0, count, batch_size):
        batch = numbers[start : start + batch_size]
        yield batch
        done = start + len(batch)
        if count > batch_size and sys.stderr.isatty():
            end = "" if done < count else "\n"
            print(f"\r{done} of {count} images", end=end, file=sys.stderr, flush=True)
        elif count > batch_size and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            print(f"{done} of {count} images", file=sys.stderr, flush=True)
            last = time.monotonic()


def as_bytes(images):
    """Images in [-1, 1] -> uint8 0..255. Clips; raises RunError if they are not finite."""
    if not np.isfinite(images).all():
        raise RunError("the output of the network is not finite")
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


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


def write_images(images, labels, class_names, path, columns, texts, rows=None):
    """Write uint8 images to a .png (a grid), an .npz (x, y, class_names) or a folder of PNGs.

    texts: {key: value} for the metadata of every PNG;  rows: names beside the rows of the grid, as
    in with_names.
    """
    if path.suffix.lower() == ".npz":
        arrays = {"x": images, "y": np.array(labels), "class_names": np.array(class_names)}
        with written_whole(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, **arrays)
    elif path.suffix.lower() == ".png":
        names = ", ".join(class_names[y] for y in dict.fromkeys(labels))
        picture = to_picture(images, columns)
        picture = with_names(picture, rows) if rows else picture
        save_png(picture, path, {**texts, "class": names})
    else:
        folder = PictureFolder(path, labels, class_names, texts)
        for i, image in enumerate(images):
            folder.save(i, image)


class PictureFolder:
    """A folder for the images of one command, of whose shards several may be writing to it.

    labels: of all images;  texts: {key: value} for the metadata of every PNG.
    """

    def __init__(self, path, labels, class_names, texts):
        self.path = path
        self.labels = labels
        self.class_names = class_names
        self.texts = {key: str(value) for key, value in texts.items()}
        self.stems = file_stems(class_names)

    def file(self, i):
        return self.path / f"{i:05d}_{self.stems[self.labels[i]]}.png"

    def save(self, i, image):
        """Write image i, uint8 (C, H, W)."""
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        texts = {**self.texts, "class": self.class_names[self.labels[i]], "image": i}
        save_png(picture, self.file(i), texts)

    def check(self, numbers):
        """Raise InputError unless all that the folder holds are images of the same command.

        numbers: those of this shard, whose settings are compared, and with them those of one more.
        """
        others = False
        for file in sorted(self.path.iterdir()):
            name = file.name
            if name in (".DS_Store", "Thumbs.db", "desktop.ini"):  # of who looks at the folder
                continue
            # A leading dot: being written now, or left behind by a process that was killed.
            if name.startswith("."):
                name = name[1:].rpartition(".")[0].rpartition(".")[0]
            number = name.split("_")[0]
            i = int(number) if number.isascii() and number.isdecimal() else len(self.labels)
            if i >= len(self.labels) or name != self.file(i).name:
                raise InputError(
                    f"--output {self.path} holds {file.name}, no image of this command: "
                    "name another folder"
                )
            if name != file.name or (others and i not in numbers):
                continue
            others = others or i not in numbers
            try:
                with Image.open(file) as picture:
                    found = getattr(picture, "text", {})
            except (OSError, ValueError, SyntaxError) as error:
                raise InputError(f"{file} is not a readable image: delete it") from error
            for key in (*self.texts, *found):
                if key not in ("class", "image") and found.get(key) != self.texts.get(key):
                    differs = f"{key} {found.get(key)}, not {self.texts.get(key)}"
                    raise InputError(f"{file} has {differs}: name another folder")

    def fill(self, numbers, batch_size, images_of):
        """Write each batch as soon as it is sampled; returns how many images were there before.

        images_of: (range) -> uint8 images; it is called with whole batches, so that a command that
        was stopped and run again gives the same images as one that was not.
        """
        found = 0
        try:
            for batch in batches_of(numbers, batch_size):
                missing = [i for i in batch if not self.file(i).exists()]
                found += len(batch) - len(missing)
                if missing:
                    images = images_of(batch)
                    for i in missing:
                        self.save(i, images[i - batch[0]])
        except KeyboardInterrupt:
            print(f"{self.path} keeps what is written: the same command does the rest")
            raise
        return found


def save_png(picture, path, texts):
    """Write a PIL picture as PNG, with {key: value} texts in its metadata."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())
    with written_whole(path) as scratch:
        picture.save(scratch, format="png", pnginfo=info)


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


# --- Noise, codes and classes ---------------------------------------------------------------------
# The same functions as in the model scripts and the files that they share.


def noise_streams(seed, indices):
    """One NumPy generator per image, keyed by (seed, image index).

    Image i starts from the same noise whatever the batch, the device or the runtime (torch or
    ONNX Runtime).
    """
    keys = [np.array([seed, i], np.uint64) for i in indices]  # a list of large ones turns to floats
    return [np.random.Generator(np.random.Philox(key=key)) for key in keys]


def next_noise(streams, shape):
    """The next standard normal array of every stream: float32 (len(streams), *shape)."""
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


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


def fold(name):
    """'T-shirt/top' -> 't-shirt-top': what spellings of a name share, and safe in a file name.

    Letters, digits and, beyond ASCII, marks and symbols stay, in lower case and NFC.
    """
    text = unicodedata.normalize("NFC", name.upper().lower())  # upper() makes SS of a sharp s
    joiners = "\u200c\u200d"  # within words of some scripts, and within emoji
    return "".join(
        c
        if c.isalnum() or c in joiners or (c > "\x7f" and unicodedata.category(c)[0] in "MS")
        else "-"
        for c in text
    )


def file_stems(class_names):
    """Each class as a part of a file name: short, and different even where case is ignored."""
    stems = [fold(name)[:50] for name in class_names]
    count = Counter(stems)
    return [
        stem if stem and count[stem] == 1 else f"{stem or 'class'}_{y}"
        for y, stem in enumerate(stems)
    ]


def same_classes(text, class_names, exact):
    """The indices of the classes that a text names: exactly (NFC), or folded."""

    def form(name):
        if exact:
            return unicodedata.normalize("NFC", name)
        # A comma matches only a comma: fold would make it a dash.
        return [fold(part.strip()) for part in name.split(",")] if "," in text else fold(name)

    return [y for y, name in enumerate(class_names) if form(name) == form(text)]


def is_index(text, class_names):
    """Whether a text is an index of a class: 0 ... number of classes - 1."""
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    return is_number and str(int(text)) == text and int(text) < len(class_names)


def class_index(text, class_names, where="the model"):
    """The index of the class that a text names.

    Tried in this order: the exact name (NFC), an index, the folded name, a beginning of one folded
    name.  where: the file that has the classes, for errors.  Raises InputError, which lists the
    indices of an ambiguous name, or suggests similar names.
    """
    stems = [fold(name) for name in class_names]
    stem = fold(text)
    last = len(class_names) - 1
    if stem == "all":
        raise InputError("all means every class, and stands alone: name such a class by its index")
    found = same_classes(text, class_names, exact=True)
    if not found and is_index(text, class_names):
        return int(text)
    found = found or same_classes(text, class_names, exact=False)
    if not found and stem.strip("-") and not stem.isdecimal():
        found = [y for y, other in enumerate(stems) if other.startswith(stem)]
    if len(found) == 1:
        return found[0]
    if found:
        indices = ", ".join(f"{y} ({class_names[y]})" for y in found[:10])
        more = ", ..." if len(found) > 10 else ""
        raise InputError(f"{where}: class {text!r} is ambiguous, give an index: {indices}{more}")
    similar = difflib.get_close_matches(stem, dict.fromkeys(stems), n=3) or stems
    names = [class_names[y] for y, other in enumerate(stems) if other in similar]
    suggested = ", ".join([*dict.fromkeys(unicodedata.normalize("NFC", n) for n in names)][:10])
    raise InputError(
        f"{where} has no class {text!r}: did you mean {suggested}? (or 0..{last}, or all)"
    )


def parse_classes(text, class_names, where="the model"):
    """'Sneaker', 'sneaker,bag', '7', 'T-shirt' or 'all' -> list of class indices.

    The whole text may be a name with commas in it, else commas separate names: an exact match of
    the whole comes first, then exact ones of all parts, then folded ones in the same order.  Parts
    are as in class_index.  Raises InputError.
    """
    if text.strip().lower() == "all":
        return list(range(len(class_names)))
    parts = [part.strip() for part in text.split(",")]
    known = [same_classes(p, class_names, exact=True) or is_index(p, class_names) for p in parts]
    is_name = same_classes(text, class_names, exact=True) or (
        not all(known) and same_classes(text, class_names, exact=False)
    )
    return [class_index(part, class_names, where) for part in ([text] if is_name else parts)]


def note_on_all(class_names):
    """Say how to ask for a class that is called all."""
    for y, name in enumerate(class_names):
        if name.strip().lower() == "all":
            print(f"class {y} is called {name}: --class {y} is that class, --class all every class")


# Options of `sample`: a kind of number and its range, or the choices.
RANGES = {
    "steps": (Integral, 1, math.inf),
    "guidance": (Real, 0, 1000),
    "guidance_interval": (Real, 0, 1),  # each of the two
    "eta": (Real, 0, 1),
    "truncation": (Real, 0.1, math.inf),
    "seed": (Integral, 0, 2**63 - 1),
    "first": (Integral, 0, 2**63 - 1),
    "batch_size": (Integral, 1, math.inf),
}
CHOICES = {
    "solver": SOLVERS, "variance": ("small", "large"), "prior": ("fitted", "normal"),
}  # fmt: skip
OPTIONAL = (  # None is the default, or none
    "steps", "guidance", "guidance_interval", "solver", "eta", "variance", "truncation", "prior",
)  # fmt: skip


def check_options(**options):
    """Raise InputError for an option of `sample` that is not one of its values."""
    for name, value in options.items():
        if value is None and name in OPTIONAL:
            continue
        if name in CHOICES:
            if value not in CHOICES[name]:
                raise InputError(f"{name} {value!r} is not one of {', '.join(CHOICES[name])}")
            continue
        kind, low, high = RANGES[name]
        is_pair = name == "guidance_interval"
        if is_pair and (not isinstance(value, list | tuple) or len(value) != 2):
            raise InputError(f"{name} {value!r} is not a pair (low, high)")
        for number in value if is_pair else [value]:
            is_number = isinstance(number, kind) and not isinstance(number, bool)
            if not is_number or not low <= number <= high or number == math.inf:
                noun = "whole number" if kind is Integral else "number"
                limits = f"from {low} to {high}" if high < math.inf else f"from {low}"
                raise InputError(f"{name} {number!r} is not a {noun} {limits}")


def label_indices(labels, class_names):
    """The labels of `sample` as a list of indices into class_names.

    labels: a list, array or tensor of indices or names.  Raises InputError.
    """
    given = labels.tolist() if hasattr(labels, "tolist") else labels
    right = f"a list of 0..{len(class_names) - 1} or of class names"
    if not isinstance(given, list | tuple | range) or not len(given):
        raise InputError(f"labels {labels!r} are not {right}")
    given = [y.tolist() if hasattr(y, "tolist") else y for y in given]
    names = {y: class_index(y, class_names) for y in given if isinstance(y, str)}
    found = [names[y] if isinstance(y, str) else y for y in given]
    for y in found:
        # Without this check CUDA would read beyond the table of class embeddings.
        if type(y) is not int or not 0 <= y < len(class_names):
            raise InputError(f"labels are not {right}: {y!r} is none")
    return found


# --- Diagnosis ------------------------------------------------------------------------------------


def check_runtime():
    """Raise ProviderError where the other one of the two packages of onnxruntime was uninstalled.

    Both have their files in one folder: an installation overwrites, and a removal deletes, files
    that the other one needs.
    """
    if not hasattr(ort, "InferenceSession"):
        raise ProviderError(f"onnxruntime is incomplete: {REINSTALL}")


def is_installed(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def cuda_trouble():
    """The reason why the CUDA provider cannot run on this machine; None if there is none.

    onnxruntime lists the provider on any machine, and falls back to the CPU silently.
    """
    if CUDA not in ort.get_available_providers():
        if is_installed("onnxruntime") and is_installed("onnxruntime-gpu"):
            return f"onnxruntime and onnxruntime-gpu overwrite each other: {REINSTALL}"
        return "this is onnxruntime without CUDA (onnxruntime-gpu has it, on Linux and Windows)"
    windows = os.name == "nt"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    supported = version.value // 1000
    needed = int(str(getattr(ort, "cuda_version", "") or "12").split(".")[0])
    if supported < needed:
        return f"the NVIDIA driver is for CUDA {supported}, onnxruntime needs CUDA {needed}"
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what is missing, as we do below
            ort.preload_dlls()
    libraries = {"cublasLt": needed, "cudart": needed, "cudnn": 9}
    if not windows:
        libraries["curand"] = 10
    for library, major in libraries.items():
        file = f"{library}64_{major}.dll" if windows else f"lib{library}.so.{major}"
        try:
            ctypes.CDLL(file)
        except OSError:
            return f"{file} is not installed: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return None


def part_inputs(shapes, probe, num_classes, count=1):
    """Inputs {name: array} to check a network with: noise, and the class and timestep of the probe.

    shapes: {name: shape without the batch};  probe: {"seed", "y", and "t" of diffusion models}.
    """
    inputs = {}
    for name, shape in shapes.items():
        if name in ("t", "y"):
            inputs[name] = np.full(count, probe[name], np.int64)
        elif name == "classes":
            inputs[name] = class_weights([probe["y"]] * count, num_classes)
        else:
            inputs[name] = next_noise(noise_streams(probe["seed"], range(count)), shape)
    return inputs


def check(model):
    """Compare the outputs of the network and its parts with those at export. Raises RunError."""
    card = model.card
    if card["kind"] == "sampler":
        return check_sampler(model)
    networks = {card["model"]: (model.session, card["probe"])}
    networks |= {name: (model.parts[name], part) for name, part in card["parts"].items()}
    limit = 1e-4 if model.provider == CPU else 1e-2  # CUDA: TF32
    differences = {}
    for name, (session, exported) in networks.items():
        if "output" not in exported:
            raise RunError(f"{name} has no reference output in its metadata: export it again")
        shapes = {given.name: given.shape[1:] for given in session.get_inputs()}
        if not all(isinstance(side, int) for shape in shapes.values() for side in shape):
            raise RunError(f"{name} has inputs of any size: it cannot be compared with the export")
        inputs = part_inputs(shapes, card["probe"], len(card["class_names"]))
        expected = np.array(exported["output"], np.float32)
        found = run_session(session, **inputs).ravel()
        if found.shape != expected.shape:
            raise RunError(f"the check failed: {name} has more or fewer outputs than its export")
        difference = np.abs(found - expected).max()
        if not difference <= limit:
            differ = f"{name}'s outputs differ by {difference:.1e} from the export's"
            raise RunError(f"the check failed: {differ}, limit {limit:.0e}")
        differences[name] = difference
    for name, difference in differences.items():
        print(f"check passed: {name}'s outputs within {difference:.1e} of those at the export")


def check_sampler(model):
    """Compare an image of a sampler with that at its export. Raises RunError."""
    probe = model.card["probe"]
    expected = np.array(probe["output"])
    found = sample(model, [probe["y"]], seed=probe["seed"]).ravel().astype(int)
    difference = np.abs(found - expected).max()
    limit = 1 if model.provider == CPU else 3  # CUDA: TF32
    if difference > limit:
        differ = f"an image differs by {difference} grey levels from the export's"
        raise RunError(f"the check failed: {differ}, limit {limit}")
    print(f"check passed: an image within {difference} grey level(s) of that at the export")


# --- Images of a VAE or GAN -----------------------------------------------------------------------


def upright(picture, background):
    """A PIL picture as RGB, turned as its EXIF orientation says, without transparency.

    background: the colour that shows where the picture is transparent; the colours that a file
    keeps there are mostly black.  Raises ValueError for more than 8 bits a channel, which pillow
    would clip to white silently.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a channel")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(behind, picture.convert("RGBA"))
    return picture.convert("RGB")


def read_pixels(path, image_shape, background="white"):
    """An image file as uint8 (C, H, W): see to_pixels. Raises InputError.

    background: the colour behind a transparent picture.
    """
    try:
        with Image.open(path) as picture:
            # A large JPEG is decoded at an eighth to a half of its size, which is much faster.
            picture.draft(None, (4 * image_shape[1], 4 * image_shape[1]))
            return to_pixels(upright(picture, background), image_shape)
    except Exception as error:  # pillow's readers fail in many ways
        raise InputError(f"{path} is not a readable image ({one_line(error)})") from error


def to_pixels(picture, image_shape):
    """A PIL picture, RGB or L, as uint8 (C, H, W): the middle square, resized.

    28x28 is framed to 32x32 first, in the colour of its corners; in black where they differ.

    image_shape: (C, H, W), H = W.
    """
    picture = picture.convert("L" if image_shape[0] == 1 else "RGB")
    if picture.size == (28, 28):
        corners = {picture.getpixel((x, y)) for x in (0, 27) for y in (0, 27)}
        picture = ImageOps.expand(picture, 2, corners.pop() if len(corners) == 1 else 0)
    side = min(picture.size)
    size = image_shape[1:]
    if picture.size != (side, side) or side != size[0]:
        left, top = (round((edge - side) / 2) for edge in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return np.array(picture).reshape(*size, -1).transpose(2, 0, 1)


def decode_between(model, ends, labels, count, batch_size):
    """`count` uint8 images on the line from one code to another, and from one class to another.

    ends: codes float32 (2, D);  labels: two classes.
    """
    weight = np.linspace(0, 1, count, dtype=np.float32)[:, None]

    def line(a, b):
        return a + weight * (b - a)

    codes = line(*ends)
    if model.card["model"] == "gan":  # its codes are noise, which a straight line would shorten
        lengths = line(*(np.linalg.norm(z) for z in ends))
        codes = codes / np.linalg.norm(codes, axis=1, keepdims=True) * lengths
    classes = line(*class_weights(labels, len(model.card["class_names"])))
    return decode_codes(model, codes.astype(np.float32), classes, batch_size)


def images_of_flags(model, args, classes, options):
    """What the flags ask for: uint8 images, their labels, and the columns of their grid.

    options: of `sample`.
    """
    card, count, size = model.card, args.num_samples, args.batch_size
    if paths := args.reconstruct or args.between:
        background = card.get("training", {}).get("background", "white")
        pixels = np.stack([read_pixels(path, card["image_shape"], background) for path in paths])
        for path, image in zip(paths, pixels, strict=True):
            if (image == image[:, :1, :1]).all():
                print(f"warning: {path} is constant, of one colour")
        x = pixels.astype(np.float32) / 127.5 - 1
        weights = class_weights(classes * len(x), len(card["class_names"]))
        batches = [slice(i, i + size) for i in range(0, len(x), size)]
        encoder = model.parts["encoder"]
        codes = [run_session(encoder, x=x[batch], classes=weights[batch]) for batch in batches]
        codes = np.concatenate(codes)
        if args.between:
            images = decode_between(model, codes, classes * 2, count, size)
            return images, classes * count, count
        images = np.concatenate([pixels, decode_codes(model, codes, weights, size)])
        return images, classes * len(images), len(x)
    if args.interpolate:
        prior = None if args.prior == "normal" else fitted_prior(card)
        to_class = args.interpolate == "class"  # with the same noise, else two noises of each class
        pairs = [classes] if to_class else [[y, y] for y in classes]
        images = []
        for pair in pairs:
            streams = noise_streams(args.seed, [0, 0] if to_class else [0, 1])
            ends = sample_codes(prior, pair, streams, card["latent_dim"], args.truncation)
            images.append(decode_between(model, ends, pair, count, size))
        labels = [pair[2 * k >= count] for pair in pairs for k in range(count)]  # the nearer end's
        return np.concatenate(images), labels, count
    labels = [y for y in classes for _ in range(count)]
    images = sample(model, labels, seed=args.seed, batch_size=size, **options)
    return images, labels, count if 1 < count <= 20 else min(10, len(labels))


def rows_of_flags(args, class_names, classes, labels, columns):
    """The names beside the rows of the grid, as in with_names; None without names."""
    if not args.names:
        return None
    if args.reconstruct:
        return ["given", "decoded"]
    if args.interpolate == "class":
        return [" to ".join(class_names[y] for y in classes)]
    return names_of_rows(labels, class_names, columns)


def default_output(args, name, class_names, classes):
    """A file name for each kind of picture, so that one command does not replace another's.

    name: of the model's file, without .onnx.
    """
    stem = file_stems(class_names)[classes[0]] if len(classes) == 1 else "samples"
    for kind in ("interpolate", "reconstruct", "between"):
        if getattr(args, kind):
            stem = kind
    return Path(f"{stem}.png" if name == "ddim" else f"{name}_{stem}.png")


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


def shard(text):
    """An argparse type: '2/4', the second of four parts, -> (2, 4)."""
    part, _, parts = text.partition("/")
    parts = number(int, 1, 100_000)(parts)
    return number(int, 1, parts)(part), parts


def output_path(text):
    """An argparse type: a name without an ending is a folder only if it exists or ends in /."""
    path = file_path(text)
    exists = os.path.exists(path)  # noqa: PTH110  Path's own raises for names that are too long
    if not path.suffix and not text.endswith(("/", os.sep)) and not exists:
        raise argparse.ArgumentTypeError(f"{text!r} has no ending: a new folder is {text}/")
    if path.suffix and text.endswith(("/", os.sep)) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder by its /, a file by its ending")
    return path


# fmt: off
def add_model_flags(parser):
    """Add the flags that choose a model, where it runs and how it samples."""
    add = parser.add_argument
    add("--model", type=path_text, default="ddim",
        help="an .onnx file, or a name to look for in runs/, pretrained/ and this folder (ddim)")
    add("--provider", choices=("auto", "cuda", "cpu"), default="auto",
        help="where to run: auto is CUDA if it works, else CPU; cuda is CUDA or an error (auto)")
    add("--threads", type=number(int, 0, 1024), default=0,
        help="threads on the CPU, 0 to 1024; 0 is one per core (0)")
    add("--no-tf32", dest="tf32", action="store_false",
        help="on CUDA, multiply in full float32, which is slower (default: TF32)")
    # Where no value is given, the defaults of the sampling flags are those of the model.
    add("--steps", type=number(int, 1),
        help="number of sampling steps, 1 to the number of training timesteps, or to some fewer "
             "where the network predicts eps; diffusion models only (the model's default)")
    add("--guidance", type=number(float, 0, 1000),
        help="guidance weight, 0 to 1000: 0 ignores the class, 1 is conditional, above 1 guided; "
             "ddpm, ddim and ldm only (the model's default)")
    add("--guidance-interval", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
        help="guidance above 1 acts only at LOW T <= t < HIGH T, T the training timesteps; "
             "ddpm, ddim and ldm only (the model's default)")
    add("--solver", choices=SOLVERS,
        help="sampler: ddim, or dpm++, of second order, for few steps; "
             "ddim and ldm only (the model's default)")
    add("--eta", type=number(float, 0, 1),
        help="noise added in each step of --solver ddim, from 0, deterministic, to 1, as in DDPM; "
             "ddim and ldm only (0)")
    add("--variance", choices=CHOICES["variance"],
        help="variance of the noise: small is the posterior's, large is beta_t; "
             "ddpm only (small)")
    add("--truncation", type=number(float, 0.1),
        help="resample noise beyond +- this many standard deviations, from 0.1; "
             "vae and gan only (off)")
    add("--prior", choices=CHOICES["prior"],
        help="sample codes from the mixture fitted to each class, or from N(0, 1); "
             "vae only (fitted)")


def build_parser():
    parser = Parser(prog="infer_onnx.py", description=__doc__)
    add = parser.add_argument
    add("--class", dest="class_", metavar="NAME", default="all",
        help="class names, unique prefixes or indices, separated by commas, or all (all)")
    add("--list-classes", action="store_true",
        help="print the model's classes and their indices, and stop (off)")
    add("--num-samples", type=number(int, 1, 1_000_000), default=1,
        help="number of images of each class, or of frames between two, 1 to 1,000,000 (1)")
    add_model_flags(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--interpolate", choices=("noise", "class"),
        help="frames, --num-samples of them, between two noises of each class, or between "
             "two classes; vae and gan only")
    group.add_argument("--reconstruct", type=path_text, metavar="FILE", nargs="+",
        help="these images, all of one --class, above the images decoded from their codes; "
             "vae only")
    group.add_argument("--between", type=path_text, metavar="FILE", nargs=2,
        help="frames, --num-samples of them, between two images of one --class; vae only")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="seed of the noise, 0 or more (0)")
    add("--batch-size", type=number(int, 1, 1_000_000), default=100,
        help="images per batch, 1 to 1,000,000 (100)")
    add("--output", type=output_path,
        help="a .png (grid), an .npz, or a folder for PNGs, as in out/ (sneaker.png, of several "
             "classes samples.png; of other models than ddim vae_sneaker.png, vae_between.png)")
    add("--names", action=argparse.BooleanOptionalAction, default=True,
        help="class names beside the rows of a .png grid (on)")
    add("--shard", type=shard, metavar="I/N",
        help="only the I-th of N parts of the images, to share work between machines (all)")
    add("--info", action="store_true", help="print what the model file says about itself (off)")
    add("--card", action="store_true", help="print the whole model card, JSON, and no more (off)")
    add("--check", action="store_true",
        help="compare the outputs of the network on this machine with those at its export (off)")
    return parser
# fmt: on


def sampling_options(args, card):
    """The options of `sample` from the flags, with the model's defaults. Raises InputError."""
    check_use(card, vars(args))
    flags = ("eta", "variance", "truncation", "prior")
    options = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    if card["kind"] == "codes":
        return options
    for key in (*DIFFUSION_OPTIONS, "solver"):
        if key in MODEL_FLAGS[card["model"]]:
            options[key] = card[key] if getattr(args, key) is None else getattr(args, key)
    if args.guidance_interval and options["guidance"] <= 1:
        raise InputError("--guidance-interval is for a guidance above 1: leave it out")
    interval = options.get("guidance_interval", card["guidance_interval"])
    guided_times(interval, len(card["alpha_bars"]))  # or InputError
    check_walk(card, options["steps"], options.get("guidance"), options.get("solver"), args.eta)
    return options


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


def check_combination(args, classes):
    """Raise InputError for flags that do not go together with each other or with the classes."""
    if args.interpolate == "class" and not len(classes) == 2 == len({*classes}):
        raise InputError("--interpolate class is between two classes: give two, as --class 7,8")
    if (args.interpolate or args.between) and args.num_samples < 2:
        raise InputError("frames between two images need --num-samples 2 or more")
    if (args.reconstruct or args.between) and len(classes) != 1:
        raise InputError("--reconstruct and --between need one --class, that of the images")
    of_noise = args.seed or args.truncation or args.prior
    if (args.reconstruct or args.between) and of_noise:
        raise InputError("--seed, --truncation and --prior are of noise: these codes are of images")
    if args.reconstruct and args.num_samples > 1:
        raise InputError("--reconstruct decodes each image once: leave out --num-samples")


def numbers_of_shard(args, count):
    """The numbers of the images of the --shard, of `count` images: a range. Raises InputError."""
    part, parts = args.shard or (1, 1)
    numbers = range(count * (part - 1) // parts, count * part // parts)
    if args.shard and (args.interpolate or args.reconstruct or args.between):
        raise InputError("--shard is for plain samples: leave it out")
    if args.shard and (not numbers or not args.output or args.output.suffix):
        raise InputError("--shard needs an --output that is a folder, and as many images as parts")
    return numbers


def refuse_flags_of_images(args, question, others):
    """Raise InputError if flags besides `others` were given with a question about the model."""
    defaults = vars(build_parser().parse_args([]))
    given = [key for key in defaults if key not in others and getattr(args, key) != defaults[key]]
    flags = [f"--{key.strip('_').replace('_', '-')}" for key in given]
    if flags:
        flags = ", ".join("--no-names" if flag == "--names" else flag for flag in flags)
        raise InputError(f"{question} makes no images: leave out {flags}")


def run(args):
    questions = ("list_classes", "info", "card", "check")
    asked = [f"--{name.replace('_', '-')}" for name in questions if getattr(args, name)]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are two questions: ask one at a time")
    if asked:
        refuse_flags_of_images(args, asked[0], (*questions, "model", "provider", "threads", "tf32"))
    path = find_model(args.model)
    model = load_model(path, args.provider, args.threads, args.tf32)
    card = model.card
    if not model.sealed:  # as other tools write it
        note = "corruption would go unnoticed; to add one: python export.py seal FILE"
        print(f"note: {path} has no checksum: {note}", file=sys.stderr)
    if args.card:
        print(json.dumps(card))
        return
    if args.info:
        brief = {key: "..." for key in ("alpha_bars", "probe", "prior") if key in card}
        brief["parts"] = {k: {**part, "output": "..."} for k, part in card["parts"].items()}
        about = {"file": str(path), "sha256": model.sha256, **card, **brief}
        print(json.dumps(about, indent=1))
        return
    names = card["class_names"]
    if args.list_classes:
        print("\n".join(f"{y:3d}  {name}" for y, name in enumerate(names)))
        return
    options = sampling_options(args, card)
    print(f"running on {model.where}")
    if args.check:
        return check(model)
    classes = parse_classes(args.class_, names, path)
    check_combination(args, classes)
    numbers = numbers_of_shard(args, len(classes) * args.num_samples)
    output = args.output or default_output(args, path.stem, names, classes)
    given = args.reconstruct or args.between or ()
    settings = {**options, **({} if given else {"seed": args.seed})}
    if "guidance_interval" in options:  # as it is typed
        settings["guidance_interval"] = "{:g} {:g}".format(*options["guidance_interval"])
    texts = {"model": card["model"], "model_sha256": model.sha256, **settings}
    texts["Software"] = "infer_onnx.py"
    folder = None  # to which images are written as they are sampled
    if not (output.suffix or given or args.interpolate):
        labels = [y for y in classes for _ in range(args.num_samples)]
        folder = PictureFolder(output, labels, names, texts)
    if folder and output.is_dir() and any(output.iterdir()):
        folder.check(numbers)
    else:
        check_output(output, [".png", ".npz", ""], given)
    note_on_all(names)
    training = card.get("training", {})
    step = training.get("step", YOUNG)
    if step < YOUNG:
        print(f"{path} is of step {step}, early in its training")
    has_class = options.get("guidance", training.get("guidance")) != 0  # that of a student
    if not has_class:
        print("guidance 0 ignores the class: the images are of any")
    if options.get("guidance", 0) > 1 and evaluations(card, **options) == options["steps"]:
        print(f"guidance {options['guidance']:g} counts as 1: no step lies in --guidance-interval")
    start = time.perf_counter()
    count, found = len(numbers), 0
    if folder:
        size = args.batch_size

        def images_of(batch):
            part = [labels[i] for i in batch]
            where = {"seed": args.seed, "first": batch[0], "batch_size": size}
            return sample(model, part, **where, **options)

        found = folder.fill(numbers, size, images_of)
        folder.check(numbers)  # a shard with other settings may have begun at the same time
        seconds = time.perf_counter() - start
    else:
        images, labels, columns = images_of_flags(model, args, classes, options)
        seconds = time.perf_counter() - start
        rows = rows_of_flags(args, names, classes, labels, columns) if has_class else None
        write_images(images, labels, names, output, columns, texts, rows)
        count = len(images)
    there = f" ({found} were there)" if found else ""
    said = [f"{count} image{'s' * (count != 1)}{there} in {seconds:.2f} s"]
    said += [f"{key.replace('_', ' ')} {value}" for key, value in settings.items()]
    print(f"wrote {output}: {', '.join(said)}, model {path}")


def one_line(error):
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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


EXIT_CODES = {
    InputError: 2,
    ImportError: 2,  # of a package that only some flags need
    ModelError: 3,
    ProviderError: 4,
    RunError: 5,
    MemoryError: 5,
    OSError: 5,
}


def run_command(parser, command, argv=None, stopped="stopped"):
    """Call command(flags); an error ends the program with one line and its exit code.

    stopped: what to say after Ctrl-C.
    """
    with careful_output():
        args = parser.parse_args(argv)
        try:
            check_runtime()
            ort.set_default_logger_severity(4)
            command(args)
            sys.stdout.flush()  # or an error: a disk may be full
        except tuple(EXIT_CODES) as error:
            code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
            parser.exit(code, f"{parser.prog}: error: {one_line(error)}\n")
        except KeyboardInterrupt:
            parser.exit(130, f"{parser.prog}: {stopped}\n")
    return 0


def main(argv=None):
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
