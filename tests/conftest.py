"""A small data set in real IDX files, tiny networks, fixed threads: what the tests share."""

import gzip
import hashlib
import importlib
import json
import os
import struct
import sys
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Threads of the processes that tests start; tiny networks gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests compare bits, messages and two processes as they are on a CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import common  # noqa: E402
import ddim  # noqa: E402
import infer_onnx  # noqa: E402

# Flags of a network and a run so small that a step takes milliseconds; kmnist has no published
# checksums, so that any files will do.
TINY = split("--data kmnist --widths 8,16 --depths 1,2 --emb-channels 16 --batch-size 20")
# The same for each script.
SHARED = "--data kmnist --emb-channels 16 --batch-size 20"
LDM = "--widths 16 --depths 1 --autoencoder-widths 8,16 --stage-1-share 0.25"
TINY_FLAGS = {
    "ddim": TINY,
    "ddpm": TINY,
    "vae": split(f"{SHARED} --widths 8,16 --latent-dim 4 --prior-components 2"),
    "gan": split(f"{SHARED} --widths 8,16 --widths-d 8,16 --latent-dim 4"),
    "ldm": split(f"{SHARED} {LDM}"),
}
TINY_NETWORK = {"widths": (8, 16), "depths": (1, 2), "emb_channels": 16}


def idx_bytes(array):
    """An IDX file of unsigned bytes: magic 0x08 and the number of dimensions, sizes, values."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_set(per_class=6, seed=0):
    """Ten classes of 28x28 pictures: a bright bar whose position tells the class, some noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(10).repeat(per_class)
    rng.shuffle(labels)
    images = rng.integers(0, 20, (len(labels), 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[4:24, 2 * label + 2 : 2 * label + 6] = 255
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_idx(folder, compress=False, per_class=6):
    """The four files of an IDX set; returns the SHA-256 of each, decompressed."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = []
    for part, seed in (("train", 0), ("t10k", 1)):
        for kind, array in zip(
            ("images-idx3", "labels-idx1"), small_set(per_class, seed), strict=True
        ):
            content = idx_bytes(array)
            sums.append(hashlib.sha256(content).hexdigest())
            file = folder / f"{part}-{kind}-ubyte"
            if compress:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(content))
            else:
                file.write_bytes(content)
    return tuple(sums)


def equal(a, b):
    """Whether two checkpoints, or parts of them, hold the same values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# What may depend on where a run was interrupted.
PASSING = ("seconds", "stage_1_seconds", "config")


def log_of(path):
    """The lines of a log on the training; each save adds one on its samples."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in lines
        if "grad_norm" in line or "lr" in line
    ]


def state(run_dir):
    """What a run leaves: the content of its checkpoints, its logs, its last grid."""
    found = {}
    for path in sorted(run_dir.glob("*.pt")):
        checkpoint = torch.load(path, weights_only=True)
        found[path.name] = {k: v for k, v in checkpoint.items() if k not in PASSING}
    for path in sorted(run_dir.glob("*log.jsonl")):
        found[path.name] = log_of(path)
    found["grid"] = max((run_dir / "samples").glob("step*")).read_bytes()
    return found


def save_sealed(proto, path):
    """Write an ONNX model with its checksum, as export.py does."""
    Path(path).write_bytes(infer_onnx.sealed(proto.SerializeToString()))


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, data_dir):
    """The folder of a finished run of ddim.py with the tiny network, six epochs of three steps."""
    run_dir = tmp_path_factory.mktemp("tiny") / "run"
    flags = [*split("--train --epochs 6 --warmup 2"), *TINY]
    assert ddim.main([*flags, "--data-dir", data_dir, "--run-dir", str(run_dir)]) == 0
    return run_dir


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory, data_dir):
    """A function: the folder of a finished run of a script with its tiny network.

    The run is made at the first call.
    """
    made = {}

    def run_of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            flags = [*split("--train --epochs 6 --warmup 2"), *TINY_FLAGS[name]]
            flags += ["--data-dir", data_dir, "--run-dir", str(made[name])]
            assert importlib.import_module(name).main(flags) == 0
        return made[name]

    return run_of


@pytest.fixture
def fashion(in_tmp, monkeypatch):
    """A function that writes small files as fashion-mnist to a folder, with matching checksums."""

    def set_up(folder, **options):
        sums = write_idx(folder, **options)
        dataset_class = common.IDX_SETS["fashion-mnist"][0]
        entry = (dataset_class, str(in_tmp / "debian"), sums)
        monkeypatch.setitem(common.IDX_SETS, "fashion-mnist", entry)
        return folder

    return set_up
