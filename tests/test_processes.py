"""Several processes, as torchrun starts them, train what one does."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS

import ddim

STEPS = 21
# In float32: in bfloat16 a half batch rounds otherwise than a whole one.
FLAGS = {
    name: ["--train", "--epochs", "7", "--warmup", "2", "--no-bf16", *TINY_FLAGS[name]]
    for name in TINY_FLAGS
}
FLAGS["gan"] += [
    "--lr",
    "1e-4",
]  # Adam without momentum takes full steps where a gradient is rounding alone


def torchrun(*command, processes=2, timeout=180):
    """Start processes as torchrun does, on a free port of this machine."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return subprocess.run(
        [*start, *map(str, command)], capture_output=True, text=True, timeout=timeout
    )


def losses(run_dir):
    """{(file, step): the losses, logits and gradients in a line of the log}."""
    found = {}
    for path in sorted(Path(run_dir).glob("*log.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            names = ("loss", "recon", "kl", "grad_norm", "real_", "fake_")
            kept = {k: v for k, v in line.items() if k.startswith(names)}
            if kept and "loss_by_tenth_of_t" in kept:
                kept["loss_by_tenth_of_t"] = [v or 0.0 for v in kept["loss_by_tenth_of_t"]]
            if kept:
                found[path.name, line["step"]] = np.hstack([kept[k] for k in sorted(kept)])
    return found


@pytest.mark.parametrize("name", [*TINY_FLAGS])
def test_two_processes_train_what_one_does_and_take_over_from_each_other(
    name, in_tmp, data_dir, monkeypatch
):
    script, faulty = importlib.import_module(name), ROOT / "tests/faulty.py"
    monkeypatch.setattr(script, "LOG_EVERY", 2)  # and the hand-overs are after odd steps
    monkeypatch.setattr(script, "GRID_STEPS", 2, raising=False)
    flags = [*FLAGS[name], "--data-dir", data_dir]
    assert script.main([*flags, "--run-dir", "one"]) == 0

    done = torchrun(
        faulty, "term:7:1", name, *flags, "--run-dir", "two"
    )  # a signal to the second process alone
    assert "exitcode  : 130" in done.stderr and done.stderr.count("Traceback") == 1, (
        done.stderr
    )  # torchrun's own
    assert f"torchrun --nproc-per-node 2 {name}.py --resume --run-dir two" in done.stdout
    stop = iter(range(7))
    over = script.Run._is_over
    with monkeypatch.context() as patch:  # one process goes on, for six steps
        patch.setattr(
            script.Run,
            "_is_over",
            lambda self: (next(stop) == 6 and self.signals.append(2)) or over(self),
        )
        assert script.main(["--resume", "--run-dir", "two"]) == 130
    done = torchrun(faulty, "none", name, "--resume", "--run-dir", "two")  # and two end it
    assert done.returncode == 0, done.stderr
    one, two = losses("one"), losses("two")
    assert one.keys() == two.keys() and len(one) >= STEPS // 2 - 1
    for key, values in one.items():
        assert np.allclose(values, two[key], rtol=1e-5, atol=1e-5), (key, values, two[key])
    seen = [
        [json.loads(line) for line in Path(f"seen_{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert len(seen[0]) == len(seen[1]) == {"ldm": STEPS + 1}.get(name, STEPS) - 6
    for (*at, own, batch), (*at_other, other, _) in zip(*seen, strict=True):
        assert at == at_other and sorted(own + other) == sorted(batch) and len(own) == len(other)
    for part in ("weights", "ema"):
        ends = [
            torch.load(f"{run}/{name}.pt", weights_only=True)[part].values()
            for run in ("one", "two")
        ]
        a, b = (torch.cat([value.flatten().float() for value in values]) for values in ends)
        assert (
            (a - b).norm() < 1e-2 * a.norm()
        )  # not less: Adam takes full steps where a gradient is rounding alone
    assert len(list(Path("two/samples").glob("*"))) >= 3 and not list(Path("two").rglob("*.tmp"))


def test_a_signal_to_a_process_that_waits_stops_all_after_the_same_step(in_tmp, data_dir):
    flags = [
        "ddim",
        "--train",
        "--epochs",
        "1000",
        "--data-dir",
        data_dir,
        *TINY_FLAGS["ddim"],
        "--run-dir",
        "run",
    ]
    done = torchrun(ROOT / "tests/faulty.py", "wait:9:1", *flags)
    assert (
        done.stdout.count("Stopped and saved") == 1 and done.stderr.count("exitcode  : 130") >= 1
    ), done.stderr
    assert 9 < torch.load("run/ddim.pt", weights_only=True)["step"] < 1000
    seen = [Path(f"seen_{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert seen[0] == seen[1] == torch.load("run/ddim.pt", weights_only=True)["step"]


def test_an_error_of_the_first_process_is_its_line_and_no_traceback_of_the_others(in_tmp):
    done = torchrun(ROOT / "ddim.py", "--train", "--data", "nowhere")
    assert done.returncode == 1 and "ddim.py: error: no data set 'nowhere'" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr  # torchrun's own


def test_the_line_of_the_readme_and_a_batch_that_cannot_be_shared(in_tmp, data_dir):
    command = [
        "torchrun",
        "--nproc-per-node",
        "2",
        str(ROOT / "ddim.py"),
        *FLAGS["ddim"],
        "--data-dir",
        data_dir,
    ]
    env = {
        "PATH": str(Path(sys.executable).parent),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run runs/ddim on cpu") == 1 and Path("runs/ddim/ddim.pt").is_file()
    done = torchrun(ROOT / "ddim.py", *FLAGS["ddim"], "--data-dir", data_dir, "--batch-size", "21")
    assert "--batch-size 21 is no multiple of the 2 processes" in done.stderr
    done = torchrun(ROOT / "ddim.py", "--class", "ki")
    assert "torchrun is for --train and --resume" in done.stderr and not list(Path().glob("*.png"))


def test_a_dead_process_ends_the_others_with_a_message(in_tmp, data_dir):
    start = time.monotonic()
    flags = [
        "ddim",
        "--train",
        "--epochs",
        "1000",
        "--data-dir",
        data_dir,
        *TINY_FLAGS["ddim"],
        "--run-dir",
        "run",
    ]
    done = torchrun(ROOT / "tests/faulty.py", "kill:9:1", *flags)
    assert done.returncode == 1 and time.monotonic() - start < 60
    assert "Signal 9 (SIGKILL)" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ddim.py: error: ")]
    assert len(said) == 1 and "--resume --run-dir run" in said[0]
    assert ddim.main(["--resume", "--run-dir", "run", "--epochs", "4"]) == 0
