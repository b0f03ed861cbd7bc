"""Turn a trained checkpoint into an .onnx file that infer_onnx.py samples from, without torch.

    python export.py ddim        the newest run of ddim.py, exported into its folder
    python export.py all         the same for every script that has a run
    python export.py ddim --checkpoint runs/ddim-2 --output sneakers.onnx
    python export.py ddim --sampler        the whole sampler as one graph: from noise to pixels
    python export.py seal sneakers.onnx    a new checksum, after another tool has changed the file

The file holds the averaged (EMA) weights and, in its metadata, everything needed to use them.  With
--weights they are rounded to float16, which makes it half as large, and written as a small .pt file
too.  A VAE's encoder and an LDM's decoder go into a second file beside it.  Before a file gets its
name it is compared with torch: the outputs of the network, and the images at the end of sampling.
If they differ by more than rounding, no file is written and the exit code is 5.
"""

import base64
import contextlib
import hashlib
import importlib
import io
import json
import logging
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxscript
import torch
from google.protobuf.message import DecodeError
from onnxscript import BOOL, DOUBLE, FLOAT, INT64, UINT8
from onnxscript import opset18 as op

import infer_onnx
import ldm
from common import NAMED_SETS, NULL_LABEL, InputError, next_noise, noise_streams, to_uint8
from infer_onnx import METADATA_FORMAT, METADATA_KEY
from runs import find_checkpoint, load_checkpoint, written_whole

NAMES = ("vae", "gan", "ddpm", "ddim", "ldm", "distill")
SAMPLERS = ("ddim", "ldm", "distill")  # for --sampler: they walk by ddim_sample or dpm_sample
# Every onnxruntime since 1.17 loads these; for later opsets it lacks kernels of GroupNorm.
OPSET = 18
IR_VERSION = 8
MAX_DIFFERENCE = 1e-4  # of network outputs; rounding alone stays near 1e-6
MAX_GREY_LEVELS = 1  # of uint8 images at the end of sampling
COMPARE_STEPS = 20  # sampling steps of that comparison, at most
# What a checkpoint holds to resume its run, and --weights leaves out.
TRAINING_STATE = (
    "weights", "optimizer", "by_tenth", "sums", "discriminator", "optimizer_d", "penalty", "data",
    "position", "teacher", "fitted", "walker",  # the last: of older runs
)  # fmt: skip


class ParityError(Exception):
    """The exported graph does not do what the network does."""


# --- Graphs ---------------------------------------------------------------------------------------


class Followed(torch.nn.Module):
    """A part of a VAE as a graph, followed by a function of its outputs."""

    def __init__(self, part, function):
        super().__init__()
        self.part = part
        self.function = function

    def forward(self, x, classes):
        return self.function(self.part(x, classes))


def image_shape(config):
    """[C, H, W]; a config without image_size is of 32x32."""
    image_size = config.get("image_size", 32)
    return [config["channels"], image_size, image_size]


def graphs_of(name, network, config, num_classes):
    """What to export: {part: (module, {input: an example of batch 2}, name of the output)}.

    The part "" is the model itself; a VAE has "encoder" besides, an LDM "decoder".
    """
    x = torch.zeros(2, *image_shape(config))
    if name in ("vae", "gan"):
        z = torch.zeros(2, network.latent_dim)
        classes = torch.eye(num_classes)[:1].repeat(2, 1)
        if name == "gan":
            return {"": (network, {"z": z, "classes": classes}, "image")}
        means = Followed(network.encoder, lambda mu_and_logvar: mu_and_logvar[0])
        return {
            "": (Followed(network.decoder, torch.tanh), {"z": z, "classes": classes}, "image"),
            "encoder": (means, {"x": x, "classes": classes}, "mu"),
        }
    t = torch.zeros(2, dtype=torch.int64)
    y = torch.zeros(2, dtype=torch.int64)  # not t again: the exporter would make them one input
    if name != "ldm":
        return {"": (network, {"x_t": x, "t": t, "y": y}, "output")}
    z_t = torch.zeros(2, *ldm.latent_shape(config))
    return {
        "": (network.denoiser, {"x_t": z_t, "t": t, "y": y}, "output"),
        "decoder": (network.autoencoder.decoder, {"z": z_t}, "image"),
    }


def export_graph(module, inputs, *outputs):
    """A module as an onnx.ModelProto with a dynamic batch size, without a trace of this machine."""
    exporter_is_quiet = contextlib.redirect_stdout(io.StringIO())  # it reports its progress
    with warnings.catch_warnings(), exporter_is_quiet:
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, tuple(inputs.values()), f=None, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=[*inputs], output_names=[*outputs],
            dynamic_shapes=({0: "batch"},) * len(inputs),
        )  # fmt: skip
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    del proto.metadata_props[:]
    tidy(proto.graph)
    store_as_float16(proto.graph)
    return proto


def tidy(graph):
    """Delete doc strings and metadata, which name this machine's files, and stale value_info."""
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for item in (*graph.input, *graph.output, *graph.initializer, *graph.node):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                tidy(attribute.g)


def store_as_float16(graph):
    """Store each weight as float16, followed by a Cast to float32, where that loses nothing.

    The file is then half as large.  Runtimes cast when they load it: outputs and speed stay as
    they are.
    """
    casts = []
    for tensor in graph.initializer:
        weight = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):  # infinite, and so not equal, where it is too large
            half = weight.astype(np.float16)
        # For a few numbers the Cast would take more space than it saves.
        if weight.dtype == np.float32 and weight.size >= 64 and (half == weight).all():
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.half"))
            cast = onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
            casts.append(cast)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


# --- The sampler as one graph ---------------------------------------------------------------------
# What ddim_sample and dpm_sample of infer_onnx.py do, from noise to bytes, in ONNX: a Loop over the
# steps. onnxscript translates these functions; names are those of infer_onnx.py. There is no If:
# with one before the network, OpenVINO 2026.4 gives wrong images in its first run of each shape.

local = onnxscript.values.Opset("local", 1)  # functions that differ from model to model


def constant(value):
    return onnx.numpy_helper.from_array(np.array(value))


# Types of tensors, for inputs and for Cast.
IMAGES, LABELS, PIXELS = FLOAT["B", "C", "H", "W"], INT64["B"], UINT8["B", "channels", "h", "w"]
INTERVAL, TABLE, CHANNELS = FLOAT[2], DOUBLE["T + 1"], FLOAT["C", 1, 1]
F32, F64, I64, U8 = FLOAT.dtype, DOUBLE.dtype, INT64.dtype, UINT8.dtype


@onnxscript.script()
def sampler(
    noise: IMAGES, labels: LABELS, steps: INT64, guidance: FLOAT, guidance_interval: INTERVAL,
    second_order: BOOL, alpha_bars: TABLE, num_timesteps: FLOAT, null_label: INT64,
    mean: CHANNELS, std: CHANNELS,
) -> PIXELS:  # fmt: skip
    """uint8 images of noise and labels; second_order: by dpm_sample, else by ddim_sample.

    alpha_bars: 1 (that of t = -1), then those of a walk.  As in NumPy, its coefficients are
    computed in float64 and rounded once: a number beside an array is op.Cast(..., to=F32).
    """
    half = op.Constant(value=constant(0.5))
    one = op.Constant(value=constant(1.0))
    null = op.Expand(null_label, op.Shape(labels))
    start, stop = op.Split(guidance_interval * num_timesteps, num_outputs=2)
    B = op.Shape(labels)
    T = op.Size(alpha_bars) - 1
    # Fails for steps below 1, as alpha_bar_t does for steps above T.
    first = op.Gather(alpha_bars, T + 1 - steps)
    count = steps * op.Cast(op.Ceil(first), to=I64)
    x_t = noise
    x_0_last = noise
    lambda_last = half
    for i in range(count):
        # time_pairs or dpm_pairs: t and t_prev, to which one is added, since -1 is the last
        at = local.end_of_step(steps - i, steps, T, second_order)
        at_prev = local.end_of_step(steps - i - 1, steps, T, second_order)
        alpha_bar_t = op.Gather(alpha_bars, at)
        alpha_bar_prev = op.Gather(alpha_bars, at_prev)

        # is_guided and denoise: a batch with no class, then with one, or one of the two
        t = op.Cast(at - 1, to=F32)
        has_effect = op.Not(op.Or(guidance == 0.0, guidance == 1.0))
        is_inside = op.And(start <= t, t < stop)
        is_guided = op.And(has_effect, op.Or(guidance < 1.0, is_inside))
        rows_from = op.Where(op.Or(is_guided, guidance == 0.0), B * 0, B)
        rows_to = op.Where(op.Or(is_guided, op.Not(guidance == 0.0)), B * 2, B)
        x = op.Slice(op.Concat(x_t, x_t, axis=0), rows_from, rows_to)
        y = op.Slice(op.Concat(null, labels, axis=0), rows_from, rows_to)
        outputs = local.network(x, op.Expand(at - 1, op.Shape(y)), y)
        output_u = op.Slice(outputs, B * 0, B)  # these two are the same without guidance
        output_c = op.Slice(outputs, op.Neg(B), op.Shape(y))
        output = output_u + guidance * (output_c - output_u)

        # predict_x_0_and_eps
        signal_t = op.Cast(op.Sqrt(alpha_bar_t), to=F32)
        noise_t = op.Cast(op.Sqrt(one - alpha_bar_t), to=F32)
        x_0_hat, eps_hat = local.predict(output, x_t, signal_t, noise_t)

        # dpm_extrapolate, but in the first step and the last
        lambda_t = op.Log(alpha_bar_t / (one - alpha_bar_t)) * half
        lambda_prev = op.Log(alpha_bar_prev / (one - alpha_bar_prev)) * half
        ratio = op.Cast((lambda_prev - lambda_t) / (lambda_t - lambda_last) * half, to=F32)
        is_second = op.And(second_order, op.And(i > 0, at_prev > 0))
        D = op.Where(is_second, x_0_hat + ratio * (x_0_hat - x_0_last), x_0_hat)
        D_eps = op.Where(is_second, (x_t - signal_t * D) / noise_t, eps_hat)
        x_0_last = op.Identity(x_0_hat)
        lambda_last = op.Identity(lambda_t)

        # ddim_step
        signal_prev = op.Cast(op.Sqrt(alpha_bar_prev), to=F32)
        noise_prev = op.Cast(op.Sqrt(one - alpha_bar_prev), to=F32)
        x_t = signal_prev * D + noise_prev * D_eps
    decoded = local.decode(x_t * std + mean)
    images = op.Cast(op.Round((op.Clip(decoded, -1.0, 1.0) + 1.0) * 127.5), to=U8)
    return images


@onnxscript.script(local, default_opset=op)
def end_of_step(n, steps, T, second_order):
    """t + 1 where n steps are left: as in time_pairs, or with second_order as in dpm_pairs."""
    half = op.Constant(value=constant(0.5))
    exponent = op.Constant(value=constant(1.3))
    fraction = op.Cast(n, to=F64) / op.Cast(steps, to=F64)
    at = op.Cast(op.Cast(T, to=F64) * fraction**exponent + half, to=I64)
    noise = 3 * n * n
    signal = (steps - n) * (steps - n)
    at_dpm = op.Min((2 * T * noise + noise + signal) / (2 * (noise + signal)), T - steps + n)
    return op.Max(op.Where(second_order, at_dpm, at), n)


@onnxscript.script(local, default_opset=op)
def predict_v(output, x_t, signal_t, noise_t):
    x_0_hat = signal_t * x_t - noise_t * output
    eps_hat = signal_t * output + noise_t * x_t
    return x_0_hat, eps_hat


@onnxscript.script(local, default_opset=op)
def predict_eps(output, x_t, signal_t, noise_t):
    x_0_hat = (x_t - noise_t * output) / signal_t
    eps_hat = op.Identity(output)
    return x_0_hat, eps_hat


@onnxscript.script(local, default_opset=op)
def predict_clipped(output, x_t, signal_t, noise_t):
    unlimited, _ = local.predict_unlimited(output, x_t, signal_t, noise_t)
    x_0_hat = op.Clip(unlimited, -1.0, 1.0)
    eps_hat = (x_t - signal_t * x_0_hat) / noise_t
    return x_0_hat, eps_hat


@onnxscript.script(local, default_opset=op)
def identity(x):
    return op.Identity(x)


def named(function, name):
    """An onnxscript function as an onnx.FunctionProto of another name."""
    proto = function.to_function_proto()
    proto.name = name
    return proto


def as_function(graph, name):
    """A graph as an onnx.FunctionProto; its weights become Constant nodes.

    Within the body of the Loop those are a fourth faster than initializers outside of it.
    """
    weights = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer]
    inputs, outputs = ([value.name for value in part] for part in (graph.input, graph.output))
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    nodes = [*weights, *graph.node]
    return onnx.helper.make_function(local.domain, name, inputs, outputs, nodes, opsets)


def fix_inputs(graph, **values):
    """Make inputs of a graph constant: {name: value}."""
    for name, value in values.items():
        [given] = [one for one in graph.input if one.name == name]
        graph.input.remove(given)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))


def sampler_graph(network, decoder, card):
    """The whole sampler as an onnx.ModelProto.

    network, decoder: exported graphs, the second None but for an LDM;  card: from model_card.
    """
    proto = sampler.to_model_proto()
    alpha_bars = card["alpha_bars"][: infer_onnx.steps_limit(card)]
    fix_inputs(
        proto.graph, alpha_bars=[1.0, *alpha_bars], num_timesteps=len(card["alpha_bars"]),
        null_label=card["null_label"],
        mean=np.reshape(card.get("latent_mean", 0.0), (-1, 1, 1)),
        std=np.reshape(card.get("latent_std", 1.0), (-1, 1, 1)),
    )  # fmt: skip
    if card["steps_fixed"]:  # a few-step model, which knows one walk
        fix_inputs(
            proto.graph, steps=card["steps"], guidance=card["guidance"],
            guidance_interval=card["guidance_interval"], second_order=False,
        )  # fmt: skip
    predict = predict_v if card["prediction"] == "v" else predict_eps
    proto.functions.extend([
        as_function(network, "network"),
        end_of_step.to_function_proto(),
        named(predict, "predict" if decoder else "predict_unlimited"),
        as_function(decoder, "decode") if decoder else named(identity, "decode"),
    ])  # fmt: skip
    if decoder is None:  # latents are not limited
        proto.functions.append(named(predict_clipped, "predict"))
    # onnxscript leaves out the condition of a Loop: the reference implementation would run no step.
    for node in proto.graph.node:
        if node.op_type == "Loop":
            node.input[1] = "always"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    proto = onnx.inliner.inline_local_functions(proto)  # which some runtimes cannot read
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    proto.ir_version = IR_VERSION
    drop_casts(proto.graph)
    tidy(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def drop_casts(graph):
    """Replace the CastLike of constants, whose types are right, and which make runtimes warn."""
    for node in graph.node:
        if node.op_type == "CastLike":
            node.op_type = "Identity"
            del node.input[1]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                drop_casts(attribute.g)


# --- Model card -----------------------------------------------------------------------------------


def model_card(script, checkpoint, network, graphs, parts):
    """What infer_onnx.py must know, as plain JSON types.

    parts: the further files, {part: {"file": its name, "sha256": its sum}}.
    """
    config = checkpoint["config"]
    is_codes = script.NAME in ("vae", "gan")
    training = {key: checkpoint[key] for key in ("step", "images", "torch")}
    of_teacher = ("hold_out", "background")  # which a student has from it
    keys = (*script.FIXED, *of_teacher, "batch_size", "lr", "epochs", "minutes")
    training |= {key: config[key] for key in keys if key in config}  # an older run lacks newer ones
    training |= names_of_files(config)
    training["seconds"] = checkpoint["seconds"] + checkpoint.get("stage_1_seconds", 0)
    card = {
        "format": METADATA_FORMAT,
        "kind": "codes" if is_codes else "diffusion",
        "model": script.NAME,
        "class_names": checkpoint["class_names"],
        "image_shape": image_shape(config),
        "value_range": [-1, 1],
        "parameters": sum(p.numel() for module, *_ in graphs.values() for p in module.parameters()),
        "training": training,
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__},
        "parts": parts,
    }
    probe = {"seed": 0, "y": 0}
    if is_codes:
        prior = checkpoint.get("prior")
        card["latent_dim"] = network.latent_dim
        card["prior"] = prior and {key: packed(value) for key, value in prior.items()}
    else:
        card |= diffusion_card(script, config, network)
        probe = {"seed": 0, "t": config["num_timesteps"] // 2, "y": 0}
    # Outputs for known inputs, by which infer_onnx.py --check tests another machine.
    card["probe"] = probe
    num_classes = len(card["class_names"])
    for part, (module, inputs, _) in graphs.items():
        holder = parts[part] if part else probe
        holder["output"] = probe_output(module, inputs, probe, num_classes)
    return card


def data_name(data):
    """The name of a data set, or of a path its last part, as ./pets: no folder of this machine."""
    name = data.removeprefix("set:")
    return name if name in NAMED_SETS else f"./{Path(data).name}"


def names_of_files(config):
    """The data of a training, the file of --start or of a teacher: all without their folders."""
    files = {key: Path(config[key]).name for key in ("teacher", "start") if config.get(key)}
    return {"data": data_name(config["data"]), **files}


def diffusion_card(script, config, network):
    """What the card of a diffusion model holds besides: how to sample from it."""
    student = script.NAME == "distill"  # knows one walk, of which guidance is a part
    card = {
        "null_label": NULL_LABEL,
        "prediction": config["prediction"],
        "steps": config["steps"] if student else min(script.STEPS, script.max_steps(config)),
        "steps_fixed": student,
        "guidance": 1.0 if student else script.default_guidance(config),
        "guidance_interval": script.GUIDANCE_INTERVAL,
        # With labels dropped never or always, one value of the guidance is all that was learned.
        "guidance_fixed": student or config["label_dropout"] in (0, 1),
        "alpha_bars": script.schedule_of(config).tolist(),
    }
    if script.NAME not in ("ddpm", "distill"):  # which have one sampler
        card["solver"] = script.SOLVER
    if script.NAME == "ldm":
        card["latent_shape"] = [*ldm.latent_shape(config)]
        card["latent_mean"] = network.latent_mean.flatten().tolist()
        card["latent_std"] = network.latent_std.flatten().tolist()
    return card


def probe_output(module, inputs, probe, num_classes):
    """A module's output for the inputs of a probe, as a list of numbers with six decimals."""
    shapes = {name: tuple(value.shape[1:]) for name, value in inputs.items()}
    arrays = infer_onnx.part_inputs(shapes, probe, num_classes)
    output = module(*(torch.from_numpy(arrays[name]) for name in inputs))
    return [round(value, 6) for value in output.flatten().tolist()]


def packed(tensor):
    """A tensor in JSON, as infer_onnx.fitted_prior reads it: bytes in little endian."""
    array = tensor.numpy()
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"shape": list(array.shape), array.dtype.name: base64.b64encode(data).decode()}


# --- Comparison with torch ------------------------------------------------------------------------


def random_inputs(inputs, batch, card):
    """Noise, timesteps and classes for a graph: {input: array} of `batch` rows.

    inputs: examples, whose shapes count.
    """
    num_classes = len(card["class_names"])
    rows = np.arange(batch, dtype=np.int64)  # NumPy 1 on Windows has int32
    last = len(card.get("alpha_bars", [0])) - 1
    known = {
        "t": np.linspace(0, last, batch).astype(np.int64),
        "y": rows % (num_classes + 1) + NULL_LABEL,  # "no class" too
        "classes": np.eye(num_classes, dtype=np.float32)[rows % num_classes],
    }
    streams = noise_streams(batch, range(batch))
    return {
        name: known[name] if name in known else next_noise(streams, tuple(value.shape[1:]))
        for name, value in inputs.items()
    }


def compare(script, checkpoint, network, graphs, path):
    """Compare the file with torch.

    Returns the largest difference of the graphs' outputs, and that of uint8 images of the first ten
    classes.  Raises ParityError if one is too large.
    """
    model = infer_onnx.load_model(path, "cpu")
    card = model.card
    worst = 0.0
    for part, (module, inputs, _) in graphs.items():
        session = model.parts[part] if part else model.session
        for batch in (1, 2, 7):
            feed = random_inputs(inputs, batch, card)
            found = session.run(None, feed)[0]
            expected = module(*(torch.from_numpy(value) for value in feed.values())).numpy()
            difference = np.abs(found - expected).max()
            worst = max(worst, difference if np.isfinite(difference) else np.inf)
    if worst > MAX_DIFFERENCE:
        limit = f"limit {MAX_DIFFERENCE:.0e}"
        raise ParityError(f"the network's outputs differ by {worst:.1e} from torch's, {limit}")

    labels = torch.arange(len(card["class_names"]))[:10]
    settings = {"seed": 1}  # of both
    known = {}  # to torch alone; the file has it in its card
    if card["kind"] == "diffusion":
        known["config"] = checkpoint["config"]
        if not card["steps_fixed"]:
            settings["steps"] = min(COMPARE_STEPS, script.max_steps(checkpoint["config"]))
            settings["guidance"] = card["guidance"]
    if "prior" in checkpoint:
        known["prior"] = checkpoint["prior"]
    images = script.sample(model=network, labels=labels, **known, **settings)
    expected = to_uint8(images).numpy().astype(int)
    levels = np.abs(infer_onnx.sample(model, labels.tolist(), **settings) - expected).max()
    if levels > MAX_GREY_LEVELS:
        limit = f"limit {MAX_GREY_LEVELS}"
        raise ParityError(f"images differ by {levels} grey levels from torch's, {limit}")
    return worst, levels


def sampler_settings(card):
    """Eight settings, options of `sample`, that together take every branch of the graph.

    A few-step model has one setting, its own.
    """
    if card["steps_fixed"]:
        return [{"seed": 1}]
    limit = infer_onnx.steps_limit(card)
    few, many = min(7, limit), min(COMPARE_STEPS, limit)
    settings = [
        {"steps": many, "solver": "ddim"},
        {"steps": 1},
        {"steps": few, "solver": "dpm++"},
        {"steps": few, "guidance": 0.0, "solver": "ddim"},
        {"steps": few, "guidance": 0.5, "solver": "ddim"},
        {"steps": few, "guidance": 1.0, "solver": "dpm++"},
        {"steps": many, "guidance": 3.0, "guidance_interval": (0.2, 0.7), "solver": "ddim"},
        {"steps": few, "guidance": 3.0, "guidance_interval": (0, 1), "solver": "dpm++"},
    ]
    defaults = {key: card[key] for key in ("guidance", "guidance_interval", "solver")}
    if card["guidance_fixed"]:
        settings = [{**setting, "guidance": card["guidance"]} for setting in settings]
    return [{**defaults, **setting, "seed": seed} for seed, setting in enumerate(settings, 2**62)]


def compare_sampler(script, checkpoint, network, path):
    """Compare the sampler with torch's in all sampler_settings.

    Returns the largest difference of uint8 images of the first ten classes.  Raises ParityError if
    it is too large.
    """
    model = infer_onnx.load_model(path, "cpu")
    labels = torch.arange(len(model.card["class_names"]))[:10]
    worst = 0
    for setting in sampler_settings(model.card):
        known = {"model": network, "config": checkpoint["config"], "labels": labels}
        expected = to_uint8(script.sample(**known, **setting)).numpy().astype(int)
        found = infer_onnx.sample(model, labels.tolist(), **setting)
        worst = max(worst, np.abs(found - expected).max())
        if worst > MAX_GREY_LEVELS:
            limit = f"limit {MAX_GREY_LEVELS}"
            raise ParityError(
                f"{setting}: images differ by {worst} grey levels from torch's, {limit}"
            )
    return worst


# --- Export ---------------------------------------------------------------------------------------


@torch.no_grad()
def export(name, checkpoint_path, output, weights, whole_sampler=False):
    """Export one model, or its sampler as one graph; returns the path of the .onnx file."""
    if whole_sampler and name not in SAMPLERS:
        raise InputError(f"--sampler is for {', '.join(SAMPLERS)}, not for {name}")
    script = importlib.import_module(name)
    path = find_checkpoint((name,), checkpoint_path, script.SAMPLES_FROM)
    if weights and weights.exists() and weights.samefile(path):
        loss = "would lose what is needed to resume"
        raise InputError(f"--weights {weights} is the checkpoint itself, and {loss}")
    if weights and weights.suffix.lower() != ".pt":
        raise InputError(f"--weights {weights}: the name must end in .pt")
    checkpoint = load_checkpoint(path, script.SAMPLES_FROM)
    if weights:  # half as large; the graph gets the same rounded weights
        checkpoint["ema"] = {
            key: value.half() if value.is_floating_point() else value
            for key, value in checkpoint["ema"].items()
        }
    if output is None:
        shipped = path.resolve().parent == Path(__file__).resolve().parent / "pretrained"
        folder = Path() if shipped else path.parent  # shipped files stay as they are
        output = folder / (f"{name}_sampler.onnx" if whole_sampler else f"{name}.onnx")

    network = script.ema_network(checkpoint, torch.device("cpu"))
    graphs = graphs_of(name, network, checkpoint["config"], len(checkpoint["class_names"]))
    parts = [part for part in graphs if part and not whole_sampler]
    files = {part: output.with_name(f"{output.stem}_{part}.onnx") for part in parts}
    files[""] = output
    if whole_sampler:
        contents = sampler_contents(script, checkpoint, network, graphs)
    else:
        contents = file_contents(script, checkpoint, network, graphs, files)
    with tempfile.TemporaryDirectory() as scratch:  # without a name until the comparison is passed
        for part, content in contents.items():
            Path(scratch, files[part].name).write_bytes(content)
        place = Path(scratch, output.name)
        if whole_sampler:
            levels = compare_sampler(script, checkpoint, network, place)
            compared = f"images within {levels} grey level(s) of torch's in all settings"
        else:
            worst, levels = compare(script, checkpoint, network, graphs, place)
            compared = (
                f"network outputs within {worst:.1e} of torch's; images within {levels} "
                "grey level(s)"
            )
    write_files({files[part]: content for part, content in contents.items()})
    for file in files.values():
        megabytes = file.stat().st_size / 1e6
        print(f"wrote {file} ({megabytes:.2f} MB) from {path}")
    print(compared)
    if weights:
        write_weights(checkpoint, weights)
    return output


def file_contents(script, checkpoint, network, graphs, files):
    """The bytes of each file: {part: bytes}, the model itself ("") last.

    files: {part: its path}.
    """
    protos = {part: export_graph(*graph) for part, graph in graphs.items()}
    contents = {}
    parts = {}
    for part, proto in protos.items():
        if part:
            contents[part] = infer_onnx.sealed(proto.SerializeToString())
            sha256 = hashlib.sha256(contents[part]).hexdigest()
            parts[part] = {"file": files[part].name, "sha256": sha256}
    # The model is last, since its card has the sums of the others.
    card = model_card(script, checkpoint, network, graphs, parts)
    onnx.helper.set_model_props(protos[""], {METADATA_KEY: json.dumps(card)})
    contents[""] = infer_onnx.sealed(protos[""].SerializeToString())
    return contents


def sampler_contents(script, checkpoint, network, graphs):
    """The bytes of the sampler as one graph: {"": bytes}."""
    protos = {part: export_graph(*graph).graph for part, graph in graphs.items()}
    card = model_card(script, checkpoint, network, graphs, {part: {} for part in graphs if part})
    options = {"model": network, "config": checkpoint["config"], "labels": torch.tensor([0])}
    if not card["steps_fixed"]:
        options |= {key: card[key] for key in ("steps", "guidance", "guidance_interval", "solver")}
    image = script.sample(**options)
    if not image.isfinite().all():
        raise ParityError("the sample of the checkpoint has values that are not finite")
    image = to_uint8(image)
    probe = {"seed": 0, "y": 0, "output": image.flatten().tolist()}
    card |= {"kind": "sampler", "parts": {}, "probe": probe}
    proto = sampler_graph(protos[""], protos.get("decoder"), card)
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(card)})
    return {"": infer_onnx.sealed(proto.SerializeToString())}


def write_files(contents):
    """Write {path: bytes}; no file gets its name before all are written."""
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(written_whole(path)).write_bytes(content)


def write_weights(checkpoint, path):
    """Write what is needed to sample as a small .pt file, without a folder of this machine."""
    kept = {key: value for key, value in checkpoint.items() if key not in TRAINING_STATE}
    config = kept["config"]
    kept["config"] = {**config, **names_of_files(config), "data_dir": None}
    if "autoencoder" in kept["config"]:
        kept["config"]["autoencoder"] = None
    try:
        with written_whole(path) as scratch:
            torch.save(kept, scratch)
    except RuntimeError as error:  # torch's type for a full disk
        raise OSError(f"{path}: {infer_onnx.one_line(error)}") from error
    megabytes = path.stat().st_size / 1e6
    print(f"wrote {path} ({megabytes:.2f} MB), the averaged weights alone, in float16")


def seal(path):
    """Replace the checksum of a file that another tool has changed, and those of its parts.

    What a tool writes is sealed as it is; the outputs are only compared with those at the export.
    """
    protos = {"": read_proto(path)}
    cards = [entry for entry in protos[""].metadata_props if entry.key == METADATA_KEY]
    whole = path.with_name(f"{path.stem.rpartition('_')[0]}.onnx")
    if not cards and whole.is_file():  # the decoder of ldm.onnx or the encoder of vae.onnx
        raise InputError(f"{path} is a part of {whole}: seal that file, and this one with it")
    if not cards:
        raise InputError(f"{path} has no model card: it is not a model that export.py wrote")
    try:
        card = json.loads(cards[0].value)
        parts = card["parts"].items()
        files = {name: path.with_name(Path(part["file"]).name) for name, part in parts}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} has a broken card: {infer_onnx.one_line(error)}") from error
    contents = {}
    for name, file in files.items():
        contents[file] = infer_onnx.sealed(read_proto(file).SerializeToString())
        card["parts"][name]["sha256"] = hashlib.sha256(contents[file]).hexdigest()
    cards[0].value = json.dumps(card)
    contents[path] = infer_onnx.sealed(protos[""].SerializeToString())
    write_files(contents)
    print(f"sealed {' and '.join(map(str, contents))}")
    try:
        infer_onnx.check(infer_onnx.load_model(path, "cpu"))
    except (infer_onnx.ModelError, infer_onnx.InputError, infer_onnx.RunError) as error:
        print(f"note: {error}")


def read_proto(path):
    """An ONNX file without its seal, wherever a tool has put it. Raises InputError."""
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file") from error
    kept = [entry for entry in proto.metadata_props if entry.key != infer_onnx.SEAL_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    return proto


# --- Command line ---------------------------------------------------------------------------------


def build_parser():
    parser = infer_onnx.Parser(prog="export.py", description=__doc__)
    # fmt: off
    add = parser.add_argument
    add("name", choices=[*NAMES, "all", "seal"],
        help="script that trained the model, or all; or seal, to write the checksum of FILE anew")
    add("file", metavar="FILE", type=infer_onnx.file_path, nargs="?",
        help="with seal: an .onnx file of export.py that another tool has changed")
    add("--checkpoint", type=infer_onnx.file_path,
        help="a .pt file or a run's folder to export (newest run of NAME.py, else the included "
             "weights)")
    add("--output", type=infer_onnx.file_path,
        help="the .onnx file to write (NAME.onnx in the run's folder; of included weights, here)")
    add("--sampler", action="store_true",
        help=f"write the whole sampler as one graph, NAME_sampler.onnx; {', '.join(SAMPLERS)} only "
             "(off)")
    add("--weights", type=infer_onnx.file_path,
        help="also write a small .pt file to sample from: EMA weights alone, in float16")
    # fmt: on
    return parser


def main(argv=None):
    parser = build_parser()
    with infer_onnx.careful_output():
        args = parser.parse_args(argv)
        try:
            if args.output and args.output.suffix.lower() != ".onnx":
                hint = "the name must end in .onnx, or infer_onnx.py will not find it"
                raise InputError(f"--output {args.output}: {hint}")
            if (args.name == "seal") != bool(args.file):
                raise InputError(
                    "FILE goes with seal, and seal with FILE: python export.py seal FILE"
                )
            takes = {"seal": "FILE", "all": "the newest run of each script"}.get(args.name)
            if takes and (args.checkpoint or args.output or args.sampler or args.weights):
                flags = "--checkpoint, --output, --sampler or --weights"
                raise InputError(f"{args.name} takes {takes}: no {flags}")
            names = [args.name]
            if args.name == "seal":
                seal(args.file)
                names = []
            elif args.name == "all":
                names = [name for name in NAMES if any(Path("runs").glob(f"*/{name}.pt"))]
                if not names:
                    example = "python ddim.py --train"
                    raise InputError(
                        f"there is no run in runs/: train first, for example with {example}"
                    )
            for name in names:
                output = export(name, args.checkpoint, args.output, args.weights, args.sampler)
                model = shlex.quote(output.as_posix())
                print(f"Sample without torch:\n  python infer_onnx.py --class all --model {model}")
            sys.stdout.flush()  # or an error: a disk may be full
        except InputError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        except (ParityError, infer_onnx.ModelError, infer_onnx.RunError) as error:
            file = args.output or f"{name}{'_sampler' if args.sampler else ''}.onnx"
            parser.exit(5, f"{parser.prog}: error: {name}: {error}; no {file} was written\n")
        except OSError as error:
            parser.exit(5, f"{parser.prog}: error: {error}\n")
        except KeyboardInterrupt:
            parser.exit(130, f"{parser.prog}: stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
