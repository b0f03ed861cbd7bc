"""Turn a trained checkpoint into one .onnx file that infer_onnx.py draws with, without torch.

    python export.py ddim                                        the newest run of ddim.py -> its folder
    python export.py all                                         the same for every script that has a run
    python export.py ddim --checkpoint runs/ddim-2 --output sneakers.onnx

The file holds the averaged (EMA) weights (rounded to float16 with --weights, which writes those too) and, in its
metadata, everything needed to use them. A VAE's encoder and an LDM's decoder go into a second file beside it. Before a
file gets its name it is compared with torch: the network's outputs, and the pictures that sampling ends in. If they
differ by more than rounding, no file is written and the exit code is 5.
"""

import argparse
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
import torch

import infer_onnx
from common import (
    IMAGE_SIZE,
    NULL_LABEL,
    InputError,
    draw_noise,
    find_checkpoint,
    load_checkpoint,
    noise_streams,
)
from common import to_uint8, written_whole
from infer_onnx import METADATA_FORMAT, METADATA_KEY

STEPS = {
    "ddim": 20,
    "ddpm": 250,
    "ldm": 20,
}  # what each is drawn with where nobody asks for another number
NAMES = ("vae", "gan", "ddpm", "ddim", "ldm")
OPSET, IR_VERSION = (
    18,
    8,
)  # load in every onnxruntime since 1.17; later opsets lack kernels for GroupNorm there
MAX_DIFFERENCE = 1e-4  # of network outputs; rounding alone stays near 1e-6
MAX_GREY_LEVELS = 1  # of uint8 images at the end of a trajectory


class ParityError(Exception):
    """The exported graph does not do what the network does."""


class Images(torch.nn.Module):
    """A VAE's decoder as a graph from codes to images."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z, classes):
        return self.decoder(z, classes).tanh()


class Means(torch.nn.Module):
    """A VAE's encoder as a graph from images to the means of their codes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, classes):
        return self.encoder(x, classes)[0]


def graphs_of(name, network, config, num_classes):
    """What to export: {"": (module, {input: a value of batch 2}, output), and perhaps a part by its name: ...}."""
    image, classes = (
        (config["channels"], IMAGE_SIZE, IMAGE_SIZE),
        torch.eye(num_classes)[:1].repeat(2, 1),
    )
    t_and_y = {
        "t": torch.zeros(2, dtype=torch.int64),
        "y": torch.zeros(2, dtype=torch.int64),
    }  # not one tensor twice
    if name == "gan":
        return {
            "": (network, {"z": torch.zeros(2, network.latent_dim), "classes": classes}, "image")
        }
    if name == "vae":
        return {
            "": (
                Images(network.decoder),
                {"z": torch.zeros(2, network.latent_dim), "classes": classes},
                "image",
            ),
            "encoder": (
                Means(network.encoder),
                {"x": torch.zeros(2, *image), "classes": classes},
                "mu",
            ),
        }
    if name != "ldm":
        return {"": (network, {"x_t": torch.zeros(2, *image), **t_and_y}, "output")}
    latent = torch.zeros(2, config["latent_channels"], 8, 8)
    return {
        "": (network.denoiser, {"x_t": latent, **t_and_y}, "output"),
        "decoder": (network.autoencoder.decoder, {"z": latent}, "image"),
    }


def export_graph(module, inputs, *outputs):
    """The graph of a module as an onnx.ModelProto with a dynamic batch and no trace of this machine."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):  # the exporter's own progress report
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, tuple(inputs.values()), f=None, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=[*inputs], output_names=[*outputs], dynamic_shapes=({0: "batch"},) * len(inputs),
        )  # fmt: skip
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    del proto.metadata_props[:]
    tidy(proto.graph)
    return proto


def tidy(graph):
    """Delete what names the exporting machine's files (doc strings, metadata) or may be stale (value_info)."""
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


def model_card(script, checkpoint, network, graphs, parts):
    """What infer_onnx.py must know, as plain JSON types. parts: of further files, {name: {"file", "sha256"}}."""
    config, name = checkpoint["config"], script.NAME
    training = {k: config[k] for k in (*script.FIXED, "lr", "epochs", "minutes")}
    training["data"] = Path(
        config["data"]
    ).name  # a name, or the last part of a path: no folder of this machine
    training["seconds"] = checkpoint["seconds"] + checkpoint.get("stage_1_seconds", 0)
    card = {
        "format": METADATA_FORMAT,
        "kind": "codes" if name in ("vae", "gan") else "diffusion",
        "model": name,
        "class_names": checkpoint["class_names"],
        "image_shape": [config["channels"], IMAGE_SIZE, IMAGE_SIZE],
        "value_range": [-1, 1],
        "parameters": sum(p.numel() for module, *_ in graphs.values() for p in module.parameters()),
        "training": {**{k: checkpoint[k] for k in ("step", "images", "torch")}, **training},
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__},
        "parts": parts,
    }
    noise, module = noise_streams(0, [0]), graphs[""][0]
    if card["kind"] == "codes":
        prior = checkpoint.get("prior")
        card |= {
            "latent_dim": network.latent_dim,
            "prior": prior and {k: packed(v) for k, v in prior.items()},
        }
        z = torch.from_numpy(draw_noise(noise, [network.latent_dim]))
        probe, output = {"seed": 0, "y": 0}, module(z, torch.eye(network.num_classes)[:1])
    else:
        card |= {
            "null_label": NULL_LABEL,
            "prediction": config["prediction"],
            "steps": min(STEPS[name], config["num_timesteps"]),
            "guidance": script.default_guidance(config),
            "guidance_limit": script.GUIDANCE_LIMIT,
            "guidance_fixed": config["label_dropout"]
            in (0, 1),  # no class was ever dropped, or every one
            "alpha_bars": script.make_alpha_bars(
                config["schedule"], config["num_timesteps"]
            ).tolist(),
        }
        if name == "ldm":
            card["latent_shape"] = [config["latent_channels"], 8, 8]
            card |= {
                key: getattr(network, key).flatten().tolist()
                for key in ("latent_mean", "latent_std")
            }
        probe = {"seed": 0, "t": config["num_timesteps"] // 2, "y": 0}
        x_t = torch.from_numpy(draw_noise(noise, card.get("latent_shape", card["image_shape"])))
        output = module(x_t, torch.tensor([probe["t"]]), torch.tensor([probe["y"]]))
    probe["output"] = rounded(output)
    for part, about in parts.items():
        module, inputs, _ = graphs[part]
        shapes = {name: tuple(value.shape[1:]) for name, value in inputs.items()}
        given = infer_onnx.part_inputs(shapes, probe, len(card["class_names"]))
        about["output"] = rounded(module(*(torch.from_numpy(given[name]) for name in inputs)))
    return {**card, "probe": probe}


def rounded(tensor):
    return [round(value, 6) for value in tensor.flatten().tolist()]


def packed(tensor):
    """A tensor in JSON, as infer_onnx.fitted_prior reads it: bytes in little endian."""
    array = tensor.numpy()
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"shape": list(array.shape), array.dtype.name: base64.b64encode(data).decode()}


def random_inputs(inputs, batch, card):
    """Noise, times and classes for a graph: {input: array} for a batch, of the shapes of `inputs`."""
    classes = len(card["class_names"])
    times = np.linspace(0, len(card.get("alpha_bars", [0])) - 1, batch).astype(np.int64)
    own = {
        "t": times,
        "y": np.arange(batch, dtype=np.int64) % (classes + 1) + NULL_LABEL,  # the null class too
        "classes": np.eye(classes, dtype=np.float32)[np.arange(batch) % classes],
    }
    streams = noise_streams(batch, range(batch))
    return {
        k: own[k] if k in own else draw_noise(streams, tuple(v.shape[1:]))
        for k, v in inputs.items()
    }


def compare(script, checkpoint, network, graphs, path):
    """Largest difference of the graphs' outputs, and of uint8 images of the first ten classes. Raises ParityError."""
    model = infer_onnx.load_model(path, "cpu")
    card, worst = model.card, 0.0
    for part, (module, inputs, _) in graphs.items():
        for batch in (1, 2, 7):
            feed = random_inputs(inputs, batch, card)
            found = (model.parts[part] if part else model.session).run(None, feed)[0]
            expected = module(*(torch.from_numpy(value) for value in feed.values())).numpy()
            difference = np.abs(found - expected).max()
            worst = max(worst, difference if np.isfinite(difference) else np.inf)
    if not worst <= MAX_DIFFERENCE:
        raise ParityError(
            f"the network's outputs differ by {worst:.1e} from torch's, limit {MAX_DIFFERENCE:.0e}"
        )

    labels = torch.arange(len(card["class_names"]))[:10]
    settings = {"seed": 1}
    if card["kind"] == "diffusion":
        settings |= {"steps": min(20, len(card["alpha_bars"])), "guidance": card["guidance"]}
    known = {"config": checkpoint["config"]} if card["kind"] == "diffusion" else {}
    if "prior" in checkpoint:
        known["prior"] = checkpoint["prior"]
    expected = (
        to_uint8(script.sample(model=network, labels=labels, **known, **settings))
        .numpy()
        .astype(int)
    )
    levels = np.abs(infer_onnx.sample(model, labels.tolist(), **settings) - expected).max()
    if levels > MAX_GREY_LEVELS:
        raise ParityError(
            f"images differ by {levels} grey levels from torch's, limit {MAX_GREY_LEVELS}"
        )
    return worst, levels


@torch.no_grad()
def export(name, checkpoint_path, output, weights):
    """Export one model; returns the path of the .onnx file."""
    script = importlib.import_module(name)
    path = find_checkpoint((name,), checkpoint_path, script.SAMPLES_FROM)
    if weights and weights.exists() and weights.samefile(path):
        raise InputError(
            f"--weights {weights} is the checkpoint itself, and would lose what a run goes on with"
        )
    if weights and weights.suffix != ".pt":
        raise InputError(f"--weights {weights}: the name must end in .pt")
    checkpoint = load_checkpoint(path, script.SAMPLES_FROM)
    if weights:  # half as large; the graph gets the same rounded weights
        checkpoint["ema"] = {
            k: v.half() if v.is_floating_point() else v for k, v in checkpoint["ema"].items()
        }
    network = script.ema_network(checkpoint, torch.device("cpu"))
    graphs = graphs_of(name, network, checkpoint["config"], len(checkpoint["class_names"]))
    shipped = path.resolve().parent == Path(__file__).resolve().parent / "pretrained"
    output = (
        output or (Path() if shipped else path.parent) / f"{name}.onnx"
    )  # shipped files stay as they are
    protos = {part: export_graph(*graph) for part, graph in graphs.items()}
    files = {
        part: output.with_name(f"{output.stem}_{part}.onnx") if part else output for part in graphs
    }
    contents = {
        part: infer_onnx.sealed(proto.SerializeToString()) for part, proto in protos.items() if part
    }
    parts = {
        k: {"file": files[k].name, "sha256": hashlib.sha256(v).hexdigest()}
        for k, v in contents.items()
    }
    card = model_card(script, checkpoint, network, graphs, parts)
    onnx.helper.set_model_props(protos[""], {METADATA_KEY: json.dumps(card)})
    contents[""] = infer_onnx.sealed(
        protos[""].SerializeToString()
    )  # after the others: it holds their sums
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # they take their names only if the comparison passes
        for part, content in contents.items():
            Path(scratch, files[part].name).write_bytes(content)
        worst, levels = compare(script, checkpoint, network, graphs, Path(scratch, output.name))
    with contextlib.ExitStack() as stack:  # none takes its name before all are written
        for part, content in contents.items():
            stack.enter_context(written_whole(files[part])).write_bytes(content)
    for file in files.values():
        print(f"wrote {file} ({file.stat().st_size / 1e6:.2f} MB) from {path}")
    print(f"network outputs within {worst:.1e} of torch's; images within {levels} grey level(s)")
    if weights:
        dropped = (
            "weights",
            "optimizer",
            "by_tenth",
            "sums",
            "discriminator",
            "optimizer_d",
            "penalty",
        )
        kept = {k: v for k, v in checkpoint.items() if k not in dropped}
        kept["config"] = {
            **kept["config"],
            "data": Path(kept["config"]["data"]).name,
            "data_dir": None,
        }
        if "autoencoder" in kept["config"]:
            kept["config"]["autoencoder"] = None
        try:
            with written_whole(weights) as scratch:
                torch.save(kept, scratch)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{weights}: {infer_onnx.one_line(error)}") from error
        print(
            f"wrote {weights} ({weights.stat().st_size / 1e6:.2f} MB), the averaged weights alone, in float16"
        )
    return output


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = infer_onnx.Parser(
        prog="export.py", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("name", choices=[*NAMES, "all"], help="the script that trained the model")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a .pt file or a run's folder (the newest run, else the shipped)",
    )
    parser.add_argument(
        "--output", type=Path, help="the .onnx file to write (NAME.onnx beside a run's checkpoint)"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="also write a small .pt to sample from and to share: EMA weights only, in float16",
    )
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.output and args.output.suffix != ".onnx":
            raise InputError(
                f"--output {args.output}: the name must end in .onnx, or infer_onnx.py will not find it"
            )
        names = [args.name]
        if args.name == "all":
            if args.checkpoint or args.output or args.weights:
                raise InputError(
                    "all takes the newest run of each script: no --checkpoint, --output or --weights"
                )
            names = [name for name in NAMES if any(Path("runs").glob(f"*/{name}.pt"))]
            if not names:
                raise InputError(
                    "there is no run in runs/: train first, for example with python ddim.py --train"
                )
        for name in names:
            output = export(name, args.checkpoint, args.output, args.weights)
            print(
                f"Draw without torch:\n  python infer_onnx.py --class all --model {shlex.quote(output.as_posix())}"
            )
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (ParityError, infer_onnx.ModelError, infer_onnx.RunError) as error:
        parser.exit(
            5,
            f"{parser.prog}: error: {name}: {error}; no {args.output or name + '.onnx'} was written\n",
        )
    except OSError as error:
        parser.exit(5, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
