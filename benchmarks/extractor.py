"""Train the two extractors whose features evaluate.py compares images in.

    python benchmarks/extractor.py --output runs/judges          those of Fashion-MNIST
    python benchmarks/extractor.py --data mnist                  those of MNIST, for evaluate.py
    python benchmarks/extractor.py --data pets --channels 3      of a folder, for models in colour

An extractor is a small classifier of the training images; of images without classes, it tells by
how many quarters they are turned.  It is never used as a loss, as a discriminator or to choose a
checkpoint.  The second has another architecture and seed.  On one machine, with as many threads,
the files come out the same.  What is read as test images is in evaluate.py's --help.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import evaluate
import export
import infer_onnx
import runs

EPOCHS = {1: 6, 2: 9}  # the second needs more passes to reach 93 %
LEAST_STEPS = 500  # of small data sets, which need more passes
SEEDS = {1: 2, 2: 1}
ARCHITECTURES = {
    1: "plain, 32-32-64-64-128-128 channels, max pooling",
    2: "residual, 32-64-64-128 channels, strides",
}


def conv(width_in, width_out, stride=1):
    layer = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width_out), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, width_in, width_out, stride):
        super().__init__()
        first = conv(width_in, width_out, stride)
        self.inner = nn.Sequential(first, *conv(width_out, width_out)[:2])
        projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
        self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, x):
        return F.relu(self.inner(x) + self.shortcut(x))


class Extractor(nn.Module):
    """x float32 (B, C, H - 4, W - 4) in [-1, 1] -> features (B, 128), logits (B, classes).

    image_shape: (C, H, W);  larger images than 32x32 are halved first, by convolutions.
    """

    def __init__(self, which, image_shape=(1, 32, 32), classes=10):
        super().__init__()
        channels, size, _ = image_shape
        blocks = []
        while size > 32:
            blocks.append(conv(channels, 32, 2))
            channels, size = 32, size // 2
        blocks.append(conv(channels, 32))
        if which == 2:
            blocks += [Residual(32, 64, 2), Residual(64, 64, 1), Residual(64, 128, 2)]
        else:
            blocks += [conv(32, 32), nn.MaxPool2d(2)]
            blocks += [conv(32, 64), conv(64, 64), nn.MaxPool2d(2)]
            blocks += [conv(64, 128), conv(128, 128)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def train_classifier(train, test, classes, which, epochs):
    """Train an Extractor; returns it and its accuracy on the test images.

    train, test: (uint8 images (N, C, H, W), labels int64 (N,)), arrays;  which: 1 or 2.
    """
    seed = SEEDS[which]
    torch.manual_seed(seed)
    shape = train[0].shape[1:]
    model = Extractor(which, shape, 4 if classes == 1 else classes)
    model = model.to(memory_format=torch.channels_last)
    images, labels = map(torch.from_numpy, evaluate.task(*train, classes))
    test_images, test_labels = map(torch.from_numpy, evaluate.task(*test, classes))
    batch_size = min(128, len(images))
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    options = {"total": steps, "unit": "step", "desc": f"extractor {which}"}
    with tqdm(**options, **runs.bar_options()) as bar:
        for epoch in range(epochs):
            for batch in runs.epoch_batches(len(images), batch_size, seed, epoch):
                # 28x28 of 32x32: shifts by up to 2 pixels.
                top, left = torch.randint(0, 5, (2,)).tolist()
                side = shape[-1] - 4
                x = common.to_float(images[batch, :, top : top + side, left : left + side])
                loss = F.cross_entropy(model(x)[1], labels[batch], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()
    model.eval().requires_grad_(False)
    parts = test_images[:, :, 2:-2, 2:-2].split(250)
    predicted = torch.cat([model(common.to_float(part))[1].argmax(dim=1) for part in parts])
    return model, (predicted == test_labels).float().mean().item()


def write_extractor(path, model, shape, card):
    """Write an Extractor as ONNX; card: what the file says of itself."""
    x = torch.zeros(2, shape[0], shape[1] - 4, shape[2] - 4)
    proto = export.export_graph(model, {"x": x}, "features", "logits")
    onnx.helper.set_model_props(proto, {evaluate.CARD_KEY: json.dumps(card)})
    if path.is_file():
        print(f"replacing {path}, which was there")
    with infer_onnx.written_whole(path) as scratch:
        scratch.write_bytes(infer_onnx.sealed(proto.SerializeToString()))


def train_both(args):
    """Train the two extractors of a data set, and load them as evaluate.py will."""
    shape = (args.channels, args.image_size, args.image_size)
    if args.background != "white" and not Path(args.data).is_dir():
        text = f"--background is for folders, and {args.data} is none: leave it out"
        raise infer_onnx.InputError(text)
    real = evaluate.load_real(args.data, args.data_dir, shape, args.background, args.skip_broken)
    train, test = real.parts()
    try:
        class_names = real.class_names or (
            common.load_data(args.data, args.data_dir, train=False).class_names
        )
    except common.InputError as error:
        raise infer_onnx.InputError(str(error)) from error
    classes = len(class_names)
    _, labels = evaluate.task(*test, classes)
    for which in SEEDS:
        passes = math.ceil(LEAST_STEPS / (len(train[1]) // 128 or 1))
        epochs = args.epochs or max(EPOCHS[which], passes)
        model, accuracy = train_classifier(train, test, classes, which, epochs)
        path = evaluate.extractor_file(args.output, real.name, which, shape)
        card = {
            "format": evaluate.CARD_FORMAT,
            "data": real.name,
            "accuracy": accuracy,
            "architecture": ARCHITECTURES[which],
            "seed": SEEDS[which],
            "epochs": epochs,
            "parameters": sum(p.numel() for p in model.parameters()),
            "class_names": class_names,
            "torch": str(torch.__version__),
        }
        if not real.in_turn:  # half-way from always the most frequent class to no mistake
            card["least_accuracy"] = (1 + np.bincount(labels).max() / len(labels)) / 2
        write_extractor(path, model, shape, card)
        card = evaluate.load_extractor(path, real.name, test, threads=0)[1]
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB): ", end="")
        print(f"test accuracy {card['accuracy']:.2%}, SHA-256 {card['sha256']}", flush=True)


def build_parser():
    parser = infer_onnx.Parser(prog="extractor.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", type=infer_onnx.path_text, default="fashion-mnist",
        help=f"data set to classify: {', '.join(evaluate.IDX_SETS)}, a folder or .npz as for "
             "training (fashion-mnist)")
    add("--channels", type=int, choices=(1, 3), default=1,
        help="1 for grey, 3 for colour, as in the training of the models (1)")
    add("--image-size", type=int, choices=common.IMAGE_SIZES, default=32,
        help="height and width in pixels, as in the training of the models (32)")
    add("--background", type=runs.colour, default="white",
        help="colour behind transparent pictures, as in the training of the models (white)")
    add("--skip-broken", action="store_true",
        help="leave out pictures of a folder that cannot be read (off: they are refused)")
    add("--data-dir", type=infer_onnx.path_text, metavar="FOLDER",
        help="folder of its IDX files; nothing is downloaded (data/, else Debian's folder)")
    add("--epochs", type=infer_onnx.number(int, 1, 1000),
        help=f"passes over the training images, 1 to 1000 ({EPOCHS[1]}, then {EPOCHS[2]}; more "
             "where images are few)")
    add("--output", type=infer_onnx.file_path,
        default=Path(evaluate.__file__).parent / "pretrained",
        metavar="FOLDER", help="folder for the two files (pretrained/, where they ship)")
    # fmt: on
    return parser


def main(argv=None):
    return infer_onnx.run_command(build_parser(), train_both, argv)


if __name__ == "__main__":
    sys.exit(main())
