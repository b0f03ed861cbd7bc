"""Faults from outside: each gives one clear line, with nothing lost and no partial file."""

import importlib
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from shlex import split

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, forked, refused, without_exporting

import ddim
import evaluate
import export
import infer_onnx
import runs

# Without bytecode: a limit on the size of files would truncate it too.
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


# --- Checkpoints ----------------------------------------------------------------------------------


class Code:
    """Pickles to a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def changed(path, **changes):
    checkpoint = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in {**checkpoint, **changes}.items() if v is not None}, path)


def flip_a_weight(path):
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


FAULTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(b"random bytes"),
    "a zip's first bytes": lambda path: path.write_bytes(b"PK"),
    "a flipped bit": flip_a_weight,
    "code instead": lambda path: path.write_bytes(pickle.dumps(Code())),
    "code inside": lambda path: torch.save({"format": 1, "model": "ddim", "config": Code()}, path),
    "a newer format": lambda path: changed(path, format=runs.FORMAT + 1),
    "another script": lambda path: changed(path, model="vqgan"),
    "no network": lambda path: changed(path, network=None),
    "no weights": lambda path: changed(path, ema=None),
    "a list": lambda path: torch.save([1, 2], path),
}


SAID = {  # of the others: that the file is no checkpoint
    "a newer format": f"has checkpoint format {runs.FORMAT + 1}",
    "another script": "is a checkpoint of vqgan",
    "no network": "it lacks network",
    "no weights": "it lacks ema",
}
# One function reads them for all scripts: each fault once, and one in each script.
CASES = [(name, "no network") for name in ("vae", "gan", "ldm")]
CASES += [("ddim", fault) for fault in FAULTS]


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_checkpoint_that_cannot_be_used_is_named_and_left_as_it_is(
    name, fault, tiny_runs, in_tmp, capsys
):
    # other tests leave .onnx files there
    shutil.copytree(tiny_runs(name), "run", ignore=shutil.ignore_patterns("*.onnx"))
    path = Path("run", f"{name}.pt")
    FAULTS[fault](path)
    before = path.read_bytes()
    script = importlib.import_module(name)
    for main, argv in (
        (script.main, ["--checkpoint", "run", "--output", "x.png"]),
        (script.main, ["--resume", "--run-dir", "run", "--epochs", "9"]),
        (export.main, [name, "--checkpoint", "run"]),
    ):
        error = refused(main, argv, capsys, alone=False)
        assert f"{name}.pt" in error and SAID.get(fault, "is not a checkpoint of") in error
    assert path.read_bytes() == before and {p.name for p in in_tmp.iterdir()} == {"run"}
    assert not list(Path("run").glob("*.onnx"))


# --- Folders and disks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("gan", "/proc/run"), ("gan", "file/run"), ("ldm", "file/run")]
)
def test_a_folder_that_cannot_be_written_to(name, folder, in_tmp, data_dir, capsys):
    (in_tmp / "file").write_text("")
    script = importlib.import_module(name)
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS[name]]
    flags += ["--run-dir", folder]
    assert folder in refused(script.main, flags, capsys)


def test_outputs_that_cannot_be_written(tiny_runs, exports, in_tmp, monkeypatch, capsys):
    (in_tmp / "file").write_text("")
    checkpoint = ["--checkpoint", str(tiny_runs("gan"))]
    for output, message in (
        ("/proc/x.png", "cannot be written"), ("file/x.png", "cannot be written"),
        ("file/folder/", "cannot be written"), ("file", "is a file, not a folder for images"),
    ):  # fmt: skip
        argv = [*checkpoint, "--output", output]
        error = refused(importlib.import_module("gan").main, argv, capsys)
        assert f"--output {output.rstrip('/')}" in error and message in error
    without_exporting(monkeypatch, exports("gan"))
    argv = ["gan", *checkpoint, "--output"]
    assert "/proc/" in refused(export.main, [*argv, "/proc/x.onnx"], capsys, code=5)
    assert export.main([*argv, "x.onnx"]) == 0
    error = refused(export.main, [*argv, "x.onnx", "--weights", "x.onnx"], capsys)
    assert "--weights x.onnx: the name must end in .pt" in error
    monkeypatch.setattr(export, "compare", lambda *_: (0.0, 0))  # the graph has other weights
    argv += ["x.onnx", "--weights", "/proc/x.pt"]
    assert "/proc/" in refused(export.main, argv, capsys, code=5)
    error = refused(infer_onnx.main, ["--model", "x.onnx", "--output", "/proc/x.png"], capsys)
    assert "/proc/x.png cannot be written" in error
    assert {p.name for p in in_tmp.iterdir()} == {"file", "x.onnx"}


@pytest.mark.parametrize("command", ["export", "infer_onnx", "gan"])
def test_a_full_disk_leaves_the_old_file(command, tiny_runs, exports, in_tmp):
    run_dir = tiny_runs("gan")
    flags, old, exit_code = {
        "export": (["gan", "--checkpoint", run_dir], "x.onnx", 5),
        "infer_onnx": (["--model", exports("gan"), "--num-samples", "9"], "x.npz", 5),
        "gan": (["--checkpoint", run_dir, "--num-samples", "9"], "x.png", 2),
    }[command]
    Path(old).write_bytes(b"old")
    done = forked("small", command, *flags, "--output", old)
    assert done.returncode == exit_code and "Traceback" not in done.stderr, done.stderr
    assert "error: " in done.stderr.splitlines()[-1]
    assert Path(old).read_bytes() == b"old"
    assert {p.name for p in in_tmp.iterdir()} == {old}


# --- Other runs -----------------------------------------------------------------------------------


def test_a_second_run_is_refused_the_folder_or_takes_another(in_tmp, data_dir, capsys):
    flags = ["--train", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    command = [sys.executable, str(ROOT / "ddim.py"), *flags]
    command += ["--epochs", "100000", "--save-every", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as first:
        try:
            assert "run runs/ddim on cpu" in [first.stdout.readline() for _ in range(3)][2]
            while not Path("runs/ddim/ddim.pt").exists():
                assert first.poll() is None
            ddim = importlib.import_module("ddim")
            error = refused(ddim.main, ["--resume", "--run-dir", "runs/ddim"], capsys)
            assert "runs/ddim is in use by a running training process" in error
            error = refused(ddim.main, [*flags, "--run-dir", "runs/ddim"], capsys)
            assert "runs/ddim holds a run" in error
            assert ddim.main([*flags, "--epochs", "1"]) == 0
            assert Path("runs/ddim-2/ddim.pt").is_file()
        finally:
            first.kill()
    # the lock ended with its process
    assert ddim.main(["--resume", "--run-dir", "runs/ddim", "--epochs", "1"]) == 0


def test_a_file_system_without_locks_is_trained_on(in_tmp, data_dir, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["gan"]]
    assert importlib.import_module("gan").main(flags) == 0 and Path("runs/gan/gan.pt").is_file()


def test_three_runs_that_start_at_once_take_three_folders(in_tmp, data_dir):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["gan"]]
    done = forked("none", "gan", *flags, ranks=3, together=False)
    assert done.returncode == [0, 0, 0], done.stderr
    assert {p.parent.name for p in Path("runs").glob("*/gan.pt")} == {"gan", "gan-2", "gan-3"}


# --- Memory ---------------------------------------------------------------------------------------


def compile_error(text):
    """An error as torch.compile raises where there is no compiler: torch 2.14 says what it is."""
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    return kind(text)


@pytest.mark.parametrize(
    ("error", "said", "resumes"),
    [
        (None, "lower --batch-size, with --resume too", ["--batch-size", "10"]),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "lower --batch-size", ["--batch-size", "10"]),
        (RuntimeError("CUDA error: out of memory"), "lower --batch-size", ["--batch-size", "10"]),
        (
            compile_error("no C++\nmore"),
            "--compile failed (no C++): train without",
            ["--no-compile"],
        ),
        (compile_error(""), "--compile failed (InductorError): train without it", ["--no-compile"]),
    ],
)
def test_what_a_machine_has_too_little_of_ends_a_run_in_one_line(
    error, said, resumes, in_tmp, data_dir, capsys, monkeypatch
):
    flags = ["--train", "--epochs", "2", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    flags += ["--run-dir", "run"]

    def fails(self, *args, **options):
        if error:
            raise error
        torch.empty(2**50)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", fails)
        assert said in refused(ddim.main, flags, capsys, alone=False)
    assert ddim.main(["--resume", "--run-dir", "run", *resumes]) == 0


def test_a_batch_that_does_not_fit_into_memory(in_tmp, data_dir):
    code = """
import resource, ddim
resource.setrlimit(resource.RLIMIT_DATA, (1_000_000_000, 1_000_000_000))
ddim.main()
"""
    flags = split("--train --data kmnist --batch-size 60 --widths 2048,2048 --emb-channels 16")
    command = [sys.executable, "-c", code, *flags, "--data-dir", data_dir]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2, done.stderr
    assert "lower --batch-size" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    not Path(evaluate.IDX_SETS["fashion-mnist"][1]).is_dir(), reason="needs the real data set"
)
def test_evaluate_says_what_it_cannot_write(in_tmp, capsys):
    (in_tmp / "file").write_text("")
    flags = ["gan", "--num-samples", "20", "--output", "file"]
    assert "file" in refused(evaluate.main, flags, capsys, code=5)
