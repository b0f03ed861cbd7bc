"""A small data set in real IDX files, tiny networks, fixed threads: what the tests share."""

import gzip
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import socket
import struct
import sys
import threading
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import numpy as np
import onnx
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
import ddpm  # noqa: E402
import export  # noqa: E402
import infer_onnx  # noqa: E402
import ldm  # noqa: E402
import runs  # noqa: E402
from faulty import in_fork  # noqa: E402

# Sampling steps of the grids that a run saves, twice or more, and of the images that are compared
# after an export: here most runs and samples are of a few steps themselves.
ddim.GRID_STEPS = ddpm.GRID_STEPS = ldm.GRID_STEPS = 2
export.COMPARE_STEPS = 5

# Flags of a network and a run so small that a step takes milliseconds; kmnist has no published
# checksums, so that any files will do.
TINY = split("--data kmnist --widths 8,16 --depths 1,2 --emb-channels 16 --batch-size 20")
# The same for each script.
SHARED = "--data kmnist --emb-channels 16 --batch-size 20"
LDM = "--widths 16 --depths 1 --autoencoder-widths 8,16"
TINY_FLAGS = {
    "ddim": TINY,
    "ddpm": TINY,
    "vae": split(f"{SHARED} --widths 8,16 --latent-dim 4 --prior-components 2"),
    "gan": split(f"{SHARED} --widths 8,16 --widths-d 8,16 --latent-dim 4"),
    "ldm": split(f"{SHARED} {LDM}"),
}
# Scripts with a train loop of their own: ddpm.py's is ddim.py's (test_consistency.py).
LOOPS = ["vae", "gan", "ddim", "ldm"]
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


def lines_of(path):
    """The lines of a log, list of dicts."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def log_of(path):
    """The lines of a log on the training; each save adds one on its samples."""
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in lines_of(path)
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


def without_exporting(monkeypatch, file):
    """Give export.py the graphs of a file and its parts: to make them takes seconds."""
    protos = [onnx.load(path) for path in (file, *file.parent.glob(f"{file.stem}_*.onnx"))]
    graphs = {tuple(given.name for given in proto.graph.input): proto for proto in protos}
    monkeypatch.setattr(export, "export_graph", lambda _, inputs, *__: graphs[(*inputs,)])


def save_sealed(proto, path):
    """Write an ONNX model with its checksum, as export.py does."""
    Path(path).write_bytes(infer_onnx.sealed(proto.SerializeToString()))


# Of model cards: (model, key, values of it that export.py never writes).
WRONG_VALUES = [
    ("ddim", "prediction", ["x_0", None]),
    ("ddim", "value_range", [[0, 1]]),
    ("ddim", "alpha_bars", [[0.1, 0.9], [0.9, 0.0], [1.0, 0.5], [], ["a"], None, 0.5]),
    ("ddim", "guidance_interval", [None, [0], [0, "a"], 0.8, [0.8, 0.2], [0, 7]]),
    ("ddim", "class_names", [[], None, "Sneaker", [1, 2]]),
    ("ddim", "image_shape", [[32, 32], None]),
    ("ddim", "parts", [None, [1], {"a": None}, {"a": {}}]),
    ("ddim", "null_label", [None, "10", [10]]),
    ("ddim", "steps", [0, 1001, 1.5, "2", None]),
    ("ddim", "guidance", [-1, "2", None]),
    ("gan", "latent_dim", [None, 0, "64", [64]]),
    ("gan", "prior", [0, "normal"]),
    ("gan", "training", ["long", 3]),
    ("vae", "prior", [{}, {"weights": None}, {"weights": {"float32": "AAAA", "shape": [1]}}]),
    ("vae", "parts", [{}, 3]),
    ("ldm", "parts", [{}]),
    ("ldm", "latent_shape", [None, [8], 8]),
    ("ldm", "latent_mean", [None, [0.0], "0"]),
    ("ldm", "latent_std", [None, [1.0]]),
]


def with_card(exported, path, change):
    """A copy of the exported model whose card went through `change`."""
    proto = onnx.load(exported)
    card = change(json.loads(proto.metadata_props[0].value))
    text = card if isinstance(card, str) else json.dumps(card)
    onnx.helper.set_model_props(proto, {infer_onnx.METADATA_KEY: text})
    save_sealed(proto, path)


def refused(main, argv, capsys, code=2, alone=True):
    """The error of a main that must end with this exit code, and say no more than one line.

    alone: False where other lines, such as those of a bar, may stand before it.
    """
    capsys.readouterr()  # drop the output of fixtures
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    said = capsys.readouterr().err
    error = said.splitlines()[-1]
    assert stop.value.code == code and re.match(r"\w+\.py( \w+)*: error: ", error), said
    assert "Traceback" not in said and (said.count("\n") == 1 or not alone), said
    return error


# --- Other processes ------------------------------------------------------------------------------

# They fork from one that has imported what scripts do, which would take each of them seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed", "torchvision.datasets", "sklearn.mixture"]
)


def forked(fault, name, *flags, ranks=1, together=True):
    """A script with a fault injected (faulty.py), in processes that one fork server starts.

    ranks: more than one are processes as torchrun starts them, or (together=False) as many runs.
    Returns returncode, stdout and stderr, as subprocess.run does; of several ranks, lists of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(ranks):
        said, errors = (FORKS.Pipe(duplex=False) for _ in range(2))
        is_rank = ranks > 1 and together
        given = {**world, "RANK": rank, "LOCAL_RANK": rank} if is_rank else {}
        args = [fault, name, *map(str, flags)], given, said[1], errors[1]
        process = FORKS.Process(target=in_fork, args=args, daemon=True)
        process.start()
        late = threading.Timer(120, process.kill)
        late.start()
        for _, end in (said, errors):
            end.close()
        started.append((process, late, said[0], errors[0]))
    done = SimpleNamespace(returncode=[], stdout=[], stderr=[])
    for process, late, *readers in started:
        for texts, reader in zip((done.stdout, done.stderr), readers, strict=True):
            with os.fdopen(os.dup(reader.fileno())) as stream:
                texts.append(stream.read())
        process.join()
        late.cancel()
        done.returncode.append(process.exitcode)
    if ranks == 1:
        done = SimpleNamespace(**{key: value for key, [value] in vars(done).items()})
    return done


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves half a second a step of a run."""
    now = [1e6]
    show = runs.Run._show

    def tick(self):
        now[0] += 0.5
        show(self)

    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.Run, "_show", tick)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder)
    return str(folder)


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


@pytest.fixture(scope="session")
def tiny_run(tiny_runs):
    """The folder of a finished run of ddim.py with the tiny network, six epochs of three steps."""
    return tiny_runs("ddim")


@pytest.fixture(scope="session")
def exports(tiny_runs):
    """A function: the .onnx file of a script's tiny run, in its folder.

    It is exported at the first call.
    """

    def export_of(name):
        made = tiny_runs(name) / f"{name}.onnx"
        if not made.is_file():
            assert export.main([name, "--checkpoint", str(tiny_runs(name))]) == 0
        return made

    return export_of


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
