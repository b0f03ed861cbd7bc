"""What the code of a VAE, or of latent diffusion, loses: scores of images decoded from their codes.

    python benchmarks/reconstructions.py --output results/reconstructions     the included vae, ldm
    python benchmarks/reconstructions.py runs/ldm --output runs/reconstructions    of these runs

10,000 training images, encoded and decoded, are scored in place of samples, beside the images
themselves.  Samples of a model are rarely better than its own reconstructions: where both score
alike, a better prior or diffusion model is of little use.  A run of ldm.py can be scored as soon as
its autoencoder is saved.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import infer_onnx  # noqa: E402
import ldm  # noqa: E402
import vae  # noqa: E402
from benchmarks import SCORES, report  # noqa: E402
from common import InputError, to_float, to_uint8  # noqa: E402
from runs import find_checkpoint, load_checkpoint  # noqa: E402

COUNT = 10_000
NAMES = ("vae", "ldm", "autoencoder")  # of checkpoints


def load(path):
    """A checkpoint of what is scored here, Fashion-MNIST, grey and in 32x32. Raises InputError."""
    checkpoint = load_checkpoint(path, NAMES)
    config = checkpoint["config"]
    given = config["data"].removeprefix("set:"), config["channels"], config.get("image_size", 32)
    if given != ("fashion-mnist", 1, 32):
        found = "{}, {} channels, {} pixels".format(*given)
        raise InputError(f"{path} is of {found}: right is fashion-mnist, 1, 32")
    return checkpoint


@torch.no_grad()
def reconstructions(checkpoint, images, labels):
    """What the model is, and uint8 images as its decoder makes them of the means of their codes."""
    if checkpoint["model"] == "vae":
        model = vae.ema_network(checkpoint, torch.device("cpu"))
        mu, _ = vae.encode(model, images, labels)
        decoded = vae.decode(model, mu, vae.one_hot(labels, model.num_classes))
        return f"vae, {checkpoint['network']['latent_dim']} numbers", to_uint8(decoded)
    if checkpoint["model"] == "ldm":
        model = ldm.ema_network(checkpoint, torch.device("cpu")).autoencoder
    else:
        model = ldm.Autoencoder(**checkpoint["network"]).eval()
        model.load_state_dict(checkpoint["ema"])
    channels, height, width = ldm.latent_shape(checkpoint["config"])
    decoded = [model.decoder(model.encode(to_float(x))[0]) for x in images.split(100)]
    return f"ldm, {channels} x {height} x {width} numbers", to_uint8(torch.cat(decoded))


def table(rows):
    """All scores as Markdown."""
    text = "# Training images, decoded from their codes\n\n"
    text += (
        f"Of `python benchmarks/reconstructions.py`: {COUNT:,} training images, scored beside the "
    )
    text += "test images.\nGrey levels: mean difference from the image, of 255.\n\n"
    head = ["model", "grey levels", *(report.HEADINGS[name] for name in SCORES)]
    lines = []
    for row in rows:
        cells = [f"{row['scores'][score]:.3f}" for score in SCORES[1:]]
        ffid = f"{row['scores']['ffid']:.4f}"
        lines.append([row["title"], f"{row['grey_levels']:.2f}", ffid, *cells])
    return text + report.as_table(head, lines)


def build_parser():
    parser = infer_onnx.Parser(prog="reconstructions.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("models", type=infer_onnx.file_path, nargs="*", metavar="PATH",
        help=".pt files or folders of runs of vae.py and ldm.py (the included ones)")
    add("--output", type=infer_onnx.file_path, required=True,
        help="folder of reconstructions.json and reconstructions.md")
    add("--data-dir", type=infer_onnx.file_path,
        help="folder of Fashion-MNIST (data/, else Debian's folder)")
    # fmt: on
    return parser


def run(args):
    """Score the reconstructions of each model, and write the scores."""
    try:
        paths = [find_checkpoint(NAMES, path) for path in args.models]
        paths = paths or [ROOT / f"pretrained/{name}.pt" for name in ("vae", "ldm")]
        checkpoints = [load(path) for path in paths]
    except InputError as error:  # run_command knows that of infer_onnx.py
        raise infer_onnx.InputError(str(error)) from error
    args.output.mkdir(parents=True, exist_ok=True)
    data = evaluate.load_real("set:fashion-mnist", args.data_dir)
    (images, labels), test = data.parts()
    files = [ROOT / f"pretrained/extractor{i}.onnx" for i in ("", "2")]
    sessions = [evaluate.load_extractor(file, "fashion-mnist", test, 0)[0] for file in files]
    reference = evaluate.make_reference(sessions, None, test[0])
    images, labels = images[:COUNT], labels[:COUNT]
    given, y = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long()
    rows = []
    for path, checkpoint in zip([None, *paths], [None, *checkpoints], strict=True):
        title, decoded = "real images", given
        if path:
            title, decoded = reconstructions(checkpoint, given, y)
        scores = evaluate.score_images(reference, decoded.numpy(), labels)
        grey_levels = (decoded.int() - given.int()).abs().float().mean().item()
        row = {"title": title, "grey_levels": grey_levels}
        row["scores"] = {score: scores[score] for score in SCORES}
        if path:
            row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(row)
        print(f"{title}: F-FID {scores['ffid']:.4f}", flush=True)
    with infer_onnx.written_whole(args.output / "reconstructions.json") as scratch:
        scratch.write_text(json.dumps(rows, indent=1) + "\n")
    report.write_text(table(rows), args.output / "reconstructions.md")


def main(argv=None):
    return infer_onnx.run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
