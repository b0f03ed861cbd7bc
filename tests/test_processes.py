"""Several processes train what one process does: started by torchrun, or as torchrun does."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LOOPS, ROOT, TINY_FLAGS, forked

import ddim
import gan

STEPS = 21
# In float32: in bfloat16 the rounding of a shard differs from that of a whole batch.
FLAGS = {
    name: ["--train", "--epochs", "7", "--warmup", "2", "--no-bf16", *TINY_FLAGS[name]]
    for name in LOOPS
}
# Adam without momentum takes full steps where a gradient is nothing but rounding errors.
FLAGS["gan"] += ["--lr", "1e-4"]


def torchrun(*command, processes=2, timeout=180):
    """Start processes on a free port of this machine."""
    start = [Path(sys.executable).with_name("torchrun"), "--standalone"]
    argv = [*map(str, [*start, "--nproc-per-node", processes, *command])]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)


def losses(run_dir):
    """{(file, step): the losses, logits and gradients in a line of the log}."""
    found = {}
    for path in sorted(Path(run_dir).glob("*log.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            names = ("loss", "recon", "kl", "grad_norm", "real_", "fake_", "penalty")
            kept = {k: v for k, v in line.items() if k.startswith(names)}
            if kept and "loss_by_tenth_of_t" in kept:
                kept["loss_by_tenth_of_t"] = [v or 0.0 for v in kept["loss_by_tenth_of_t"]]
            if kept:
                found[path.name, line["step"]] = np.hstack([kept[k] for k in sorted(kept)])
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_train_what_one_does_and_resume_each_other(
    name, in_tmp, data_dir, monkeypatch
):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "LOG_EVERY", 2)  # while the interruptions are after odd steps
    flags = [*FLAGS[name], "--data-dir", data_dir]
    assert script.main([*flags, "--run-dir", "one"]) == 0

    # SIGTERM to rank 1 alone
    done = forked("term:7:1", name, *flags, "--run-dir", "two", ranks=2)
    assert done.returncode == [130, 130], done.stderr
    assert f"torchrun --nproc-per-node 2 {name}.py --resume --run-dir two" in done.stdout[0]
    assert done.stdout[1] == "" and not any("Traceback" in error for error in done.stderr)
    # one process resumes, for six steps
    counter = iter(range(7))
    is_over = script.Run._is_over

    def over_after_six(self):
        if next(counter) == 6:
            self.signals.append(2)
        return is_over(self)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "_is_over", over_after_six)
        assert script.main(["--resume", "--run-dir", "two"]) == 130
    # and two processes finish the run
    done = forked("none", name, "--resume", "--run-dir", "two", ranks=2)
    assert done.returncode == [0, 0], done.stderr
    one, two = losses("one"), losses("two")
    assert one.keys() == two.keys() and len(one) >= STEPS // 2 - 1
    for key, values in one.items():
        assert np.allclose(values, two[key], rtol=1e-5, atol=1e-5), (key, values, two[key])
    texts = [Path(f"seen_{rank}.jsonl").read_text() for rank in (0, 1)]
    seen = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert len(seen[0]) == len(seen[1]) == {"ldm": STEPS + 1}.get(name, STEPS) - 6
    for (*at_0, shard_0, batch), (*at_1, shard_1, _) in zip(*seen, strict=True):
        assert at_0 == at_1 and len(shard_0) == len(shard_1)
        assert sorted(shard_0 + shard_1) == sorted(batch)
    ends = [torch.load(f"{run}/{name}.pt", weights_only=True) for run in ("one", "two")]
    for part in ("weights", "ema"):
        weights = [[value.flatten().float() for value in end[part].values()] for end in ends]
        a, b = map(torch.cat, weights)
        # not less: Adam takes full steps where a gradient is nothing but rounding errors
        assert (a - b).norm() < 1e-2 * a.norm()
    assert len(list(Path("two/samples").glob("*"))) >= 3 and not list(Path("two").rglob("*.tmp"))


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_two_processes_train_the_other_losses_of_a_gan(loss, in_tmp, data_dir, monkeypatch):
    """Spectral normalisation has buffers; the relativistic loss has two penalties."""
    monkeypatch.setattr(gan, "LOG_EVERY", 2)
    flags = [*FLAGS["gan"], "--epochs", "2", "--loss", loss, "--data-dir", data_dir]
    assert gan.main([*flags, "--run-dir", "one"]) == 0
    done = forked("none", "gan", *flags, "--run-dir", "two", ranks=2)
    assert done.returncode == [0, 0], done.stderr
    one, two = losses("one"), losses("two")
    assert one.keys() == two.keys() and len(one) == 3
    # Not closer: a shift of all logits, which the relativistic loss does not see, is rounding.
    for key, values in one.items():
        assert np.allclose(values, two[key], rtol=1e-4, atol=1e-3), (key, values, two[key])


def test_processes_whose_clocks_differ_end_after_the_same_step(in_tmp, data_dir):
    flags = ["--train", "--minutes", "30", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    done = forked("ahead:5:1", "ddim", *flags, "--run-dir", "run", ranks=2)
    assert done.returncode == [0, 0], done.stderr
    seen = [Path(f"seen_{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert seen[0] == seen[1] == torch.load("run/ddim.pt", weights_only=True)["step"] == 5


def test_a_signal_to_a_process_that_waits_stops_all_after_the_same_step(in_tmp, data_dir):
    flags = ["--train", "--epochs", "1000", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    done = forked("wait:9:1", "ddim", *flags, "--run-dir", "run", ranks=2)
    assert done.returncode == [130, 130], done.stderr
    assert [text.count("Stopped and saved") for text in done.stdout] == [1, 0]
    assert 9 < torch.load("run/ddim.pt", weights_only=True)["step"] < 1000
    seen = [Path(f"seen_{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert seen[0] == seen[1] == torch.load("run/ddim.pt", weights_only=True)["step"]


def test_an_error_in_rank_0_is_one_line_without_tracebacks_of_the_others(in_tmp):
    done = torchrun(ROOT / "ddim.py", "--train", "--data", "nowhere")
    assert done.returncode == 1 and "ddim.py: error: no data set 'nowhere'" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr  # that of torchrun


def test_what_several_processes_cannot_do_is_refused(in_tmp, data_dir):
    for flags, message in (
        ([*FLAGS["ddim"], "--data-dir", data_dir, "--batch-size", "21"],
         "--batch-size 21 is not a multiple of the 2 processes"),
        (["--class", "ki"], "torchrun is for --train and --resume"),
    ):  # fmt: skip
        done = forked("none", "ddim", *flags, ranks=2)
        assert done.returncode == [2, 2] and all(message in error for error in done.stderr)
        assert not list(in_tmp.iterdir())


def test_a_killed_process_ends_the_others_with_a_message(in_tmp, data_dir):
    start = time.monotonic()
    flags = ["--train", "--epochs", "1000", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    done = torchrun(ROOT / "tests/faulty.py", "kill:9:1", "ddim", *flags, "--run-dir", "run")
    assert done.returncode == 1 and time.monotonic() - start < 60
    assert "Signal 9 (SIGKILL)" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ddim.py: error: ")]
    assert len(said) == 1 and "--resume --run-dir run" in said[0]
    assert ddim.main(["--resume", "--run-dir", "run", "--epochs", "4"]) == 0
