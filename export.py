"""Turn a trained checkpoint into one .onnx file that infer_onnx.py draws with, without torch.

    python export.py ddim                                        the newest run of ddim.py -> its folder
    python export.py ddim --checkpoint runs/ddim-2 --output sneakers.onnx

The file holds the averaged (EMA) weights and, in its metadata, everything needed to use them. Before it gets its name
it is compared with torch: the network's outputs, and the pictures that a whole trajectory ends in. If they differ by
more than rounding, no file is written and the exit code is 5.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch

import infer_onnx
from common import IMAGE_SIZE, NULL_LABEL, InputError, draw_noise, find_checkpoint, load_checkpoint, noise_streams
from common import to_uint8, written_whole
from infer_onnx import METADATA_FORMAT, METADATA_KEY

STEPS = {"ddim": 20, "ddpm": 250}  # what each model is drawn with where nobody asks for another number
OPSET, IR_VERSION = 18, 8  # load in every onnxruntime since 1.17; later opsets lack kernels for GroupNorm there
MAX_DIFFERENCE = 1e-4  # of network outputs; rounding alone stays near 1e-6
MAX_GREY_LEVELS = 1  # of uint8 images at the end of a trajectory


class ParityError(Exception):
    """The exported graph does not do what the network does."""


def export_denoiser(network, image_shape):
    """The graph of network(x_t, t, y) as an onnx.ModelProto with a dynamic batch and no trace of this machine."""
    example = torch.zeros(2, *image_shape), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter's own progress report
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network, example, f=None, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["x_t", "t", "y"], output_names=["output"], dynamic_shapes=({0: "batch"},) * 3,
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


def model_card(script, checkpoint, network):
    """What infer_onnx.py must know, as plain JSON types."""
    config = checkpoint["config"]
    image_shape = [config["channels"], IMAGE_SIZE, IMAGE_SIZE]
    training = {k: config[k] for k in (*script.FIXED, "lr", "epochs", "minutes")}
    training["data"] = Path(config["data"]).name  # a name, or the last part of a path: no folder of this machine
    probe = {"seed": 0, "t": config["num_timesteps"] // 2, "y": 0}
    x_t = torch.from_numpy(draw_noise(noise_streams(probe["seed"], [0]), image_shape))
    output = network(x_t, torch.tensor([probe["t"]]), torch.tensor([probe["y"]]))
    return {
        "format": METADATA_FORMAT,
        "kind": "diffusion",
        "model": script.NAME,
        "class_names": checkpoint["class_names"],
        "null_label": NULL_LABEL,
        "image_shape": image_shape,
        "value_range": [-1, 1],
        "prediction": config["prediction"],
        "steps": min(STEPS[script.NAME], config["num_timesteps"]),
        "guidance": script.default_guidance(config),
        "guidance_fixed": config["label_dropout"] in (0, 1),  # no class was ever dropped, or every one
        "parameters": sum(p.numel() for p in network.parameters()),
        "training": {**{k: checkpoint[k] for k in ("step", "images", "seconds", "torch")}, **training},
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__},
        "probe": {**probe, "output": output.flatten()[:16].tolist()},
        "alpha_bars": script.make_alpha_bars(config["schedule"], config["num_timesteps"]).tolist(),
    }


def compare(script, checkpoint, network, path):
    """Largest difference of network outputs, and of uint8 images after 20 steps. Raises ParityError."""
    session, card, _, _ = infer_onnx.load_model(path, "cpu")
    last, classes = len(card["alpha_bars"]) - 1, len(card["class_names"])
    worst = 0.0
    for batch in (1, 2, 7):
        x_t = draw_noise(noise_streams(batch, range(batch)), card["image_shape"])
        for t in (0, last // 20, last // 2, last):
            times = np.full(batch, t, np.int64)
            y = np.arange(batch, dtype=np.int64) % (classes + 1) + NULL_LABEL  # the null class too
            found = session.run(None, {"x_t": x_t, "t": times, "y": y})[0]
            expected = network(*(torch.from_numpy(a) for a in (x_t, times, y))).numpy()
            difference = np.abs(found - expected).max()
            worst = max(worst, difference if np.isfinite(difference) else np.inf)
    if not worst <= MAX_DIFFERENCE:
        raise ParityError(f"the network's outputs differ by {worst:.1e} from torch's, limit {MAX_DIFFERENCE:.0e}")

    labels = torch.arange(classes)[:10]
    settings = {"steps": min(20, last + 1), "guidance": card["guidance"], "seed": 1}
    expected = script.sample(model=network, config=checkpoint["config"], labels=labels, **settings)
    expected = to_uint8(expected).numpy().astype(int)
    levels = np.abs(infer_onnx.sample(session, card, labels.tolist(), **settings) - expected).max()
    if levels > MAX_GREY_LEVELS:
        raise ParityError(f"images differ by {levels} grey levels from torch's, limit {MAX_GREY_LEVELS}")
    return worst, levels


@torch.no_grad()
def export(name, checkpoint_path, output, weights):
    """Export one model; returns the path of the .onnx file."""
    script = importlib.import_module(name)
    path = find_checkpoint((name,), checkpoint_path, script.SAMPLES_FROM)
    if weights and weights.exists() and weights.samefile(path):
        raise InputError(f"--weights {weights} is the checkpoint itself, and would lose what a run goes on with")
    checkpoint = load_checkpoint(path, script.SAMPLES_FROM)
    network = script.ema_network(checkpoint, torch.device("cpu"))
    card = model_card(script, checkpoint, network)
    proto = export_denoiser(network, card["image_shape"])
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(card)})
    shipped = (
        path.resolve().parent == Path(__file__).resolve().parent / "pretrained"
    )  # stays as it is unless it is named
    output = output or (Path() if shipped else path.parent) / f"{name}.onnx"
    with written_whole(output) as scratch:  # takes its name only if the comparison passes
        onnx.save(proto, scratch)
        worst, levels = compare(script, checkpoint, network, scratch)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB) from {path}")
    print(f"network outputs within {worst:.1e} of torch's; images within {levels} grey level(s)")
    if weights:
        kept = {k: v for k, v in checkpoint.items() if k not in ("weights", "optimizer", "by_tenth")}
        kept["config"] = {**kept["config"], "data": Path(kept["config"]["data"]).name, "data_dir": None}
        with written_whole(weights) as scratch:
            torch.save(kept, scratch)
        print(f"wrote {weights} ({weights.stat().st_size / 1e6:.2f} MB), the averaged weights alone")
    return output


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = infer_onnx.Parser(prog="export.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("name", choices=[*STEPS], help="the script that trained the model")
    parser.add_argument(
        "--checkpoint", type=Path, help="a .pt file or a run's folder (the newest run, else the shipped)"
    )
    parser.add_argument("--output", type=Path, help="the .onnx file to write (NAME.onnx beside a run's checkpoint)")
    parser.add_argument(
        "--weights", type=Path, help="also write a small .pt to sample from and to share, EMA weights only"
    )
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.output and args.output.suffix != ".onnx":
            raise InputError(f"--output {args.output}: the name must end in .onnx, or infer_onnx.py will not find it")
        output = export(args.name, args.checkpoint, args.output, args.weights)
        print(f"Draw without torch:\n  python infer_onnx.py --class all --model {shlex.quote(output.as_posix())}")
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (ParityError, infer_onnx.ModelError, infer_onnx.RunError) as error:
        parser.exit(5, f"{parser.prog}: error: {error}; no file was written\n")
    except OSError as error:
        parser.exit(5, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
