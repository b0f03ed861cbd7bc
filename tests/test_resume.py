"""However a run is interrupted, it resumes to the unbroken one, bit for bit."""

import importlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import LOOPS, ROOT, TINY_FLAGS, equal, forked, refused, state

import ddim
import runs

# 12 steps, 3 in an epoch
FLAGS = {name: ["--train", "--epochs", "4", *TINY_FLAGS[name]] for name in LOOPS}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """As in faulty.py, a line of the log at every second step."""
    for name in LOOPS:
        monkeypatch.setattr(importlib.import_module(name), "LOG_EVERY", 2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data_dir):
    """A function: what a script leaves after its twelve steps without a fault."""
    made = {}

    def state_of(name):
        if name not in made:
            run_dir = tmp_path_factory.mktemp(name) / "whole"
            flags = ["--data-dir", data_dir, "--run-dir", str(run_dir)]
            assert importlib.import_module(name).main([*FLAGS[name], *flags]) == 0
            made[name] = state(run_dir)
        return made[name]

    return state_of


# What recovers is in runs.py: for a script of two networks, and one of two stages.
RECOVERED = ["gan", "ldm"]
FAULTS = [("gan", fault) for fault in ("kill:8", "half:6", "full:8")]
FAULTS += [("ldm", fault) for fault in ("kill:8", "kill:2", "full:2")]  # in the first stage, too


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_killed_run_resumes_to_the_state_of_the_unbroken_one(
    name, fault, unbroken, in_tmp, data_dir
):
    done = forked(fault, name, *FLAGS[name], "--data-dir", data_dir, "--run-dir", "broken")
    assert done.returncode == (2 if fault.startswith("full") else -signal.SIGKILL), done.stderr
    if done.returncode == 2:
        error = done.stderr.splitlines()[-1]
        assert f"{name}.py: error: cannot write" in error
        assert error.endswith("--resume --run-dir broken")
        assert "Traceback" not in done.stderr and not list((in_tmp / "broken").rglob("*.tmp"))
    newest = max((in_tmp / "broken").glob("*.pt"), key=lambda path: path.stat().st_mtime)
    kept = torch.load(newest, weights_only=True)
    assert kept["step"] < 12
    assert importlib.import_module(name).main(["--resume", "--run-dir", "broken"]) == 0
    whole, broken = unbroken(name), state(in_tmp / "broken")
    assert whole.keys() == broken.keys()
    for key in whole:
        assert equal(whole[key], broken[key]), key
    assert not list((in_tmp / "broken").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("before", "code", "step"), [([], 130, 7), (["nohup"], 0, 12)], ids=["terminal", "nohup"]
)
def test_a_closed_terminal_saves_as_sigterm_does_but_under_nohup(
    before, code, step, in_tmp, data_dir
):
    command = [*before, sys.executable, str(ROOT / "tests/faulty.py"), "hup:7", "gan"]
    command += [*FLAGS["gan"], "--data-dir", data_dir, "--run-dir", "run"]
    was = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, too
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    signal.signal(signal.SIGHUP, was)
    assert done.returncode == code, done.stderr
    assert torch.load("run/gan.pt", weights_only=True)["step"] == step


def test_a_folder_that_is_deleted_meanwhile_is_made_again(unbroken, in_tmp, data_dir):
    done = forked("gone:8", "ddim", *FLAGS["ddim"], "--data-dir", data_dir, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    found, whole = state(in_tmp / "run"), unbroken("ddim")
    assert all(equal(whole[key], found[key]) for key in ("ddim.pt", "grid"))


@pytest.mark.parametrize("name", RECOVERED)
def test_deterministic_changes_nothing_on_a_cpu(name, unbroken, in_tmp, data_dir, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    flags = [*FLAGS[name], "--data-dir", data_dir, "--run-dir", "run"]
    try:
        assert importlib.import_module(name).main([*flags, "--deterministic"]) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(equal(value, state(in_tmp / "run")[key]) for key, value in unbroken(name).items())


def test_what_another_run_saves_while_this_one_resumes_is_kept(
    in_tmp, data_dir, monkeypatch, capsys
):
    """A run that is told to stop may save between the reading of its checkpoint and its end."""
    assert ddim.main([*FLAGS["ddim"], "--data-dir", data_dir, "--run-dir", "run"]) == 0
    old, load = Path("run/ddim.pt").read_bytes(), ddim.load_run_data
    longer = split("--resume --run-dir run --epochs 20")
    assert ddim.main(longer) == 0
    new, log = Path("run/ddim.pt").read_bytes(), Path("run/log.jsonl").read_text()
    Path("run/ddim.pt").write_bytes(old)

    def saves_meanwhile(*given):
        Path("run/ddim.pt").write_bytes(new)
        return load(*given)

    monkeypatch.setattr(ddim, "load_run_data", saves_meanwhile)
    error = refused(ddim.main, longer, capsys, alone=False)
    assert "run/ddim.pt was saved anew just now, by another run: resume again" in error
    assert Path("run/ddim.pt").read_bytes() == new and Path("run/log.jsonl").read_text() == log


def test_a_copy_of_a_checkpoint_is_resumed_by_its_name(in_tmp, data_dir):
    """A run goes back to where it was when it was copied."""
    assert ddim.main([*FLAGS["ddim"], "--data-dir", data_dir, "--run-dir", "run"]) == 0
    Path("run/ddim.pt").rename("run/best.pt")
    for _ in range(2):
        assert ddim.main(split("--resume --run-dir run/best.pt --epochs 5")) == 0
        assert torch.load("run/ddim.pt", weights_only=True)["step"] == 15


def test_the_log_may_end_anywhere(in_tmp, data_dir, monkeypatch):
    monkeypatch.setattr(ddim, "LOG_EVERY", 1)
    assert ddim.main([*FLAGS["ddim"], "--data-dir", data_dir, "--run-dir", "run"]) == 0
    log = in_tmp / "run/log.jsonl"
    whole = log.read_text()
    broken = ['{"step": 3, "diversity": {"a": 1}', '{"step"', '{"step": "x"}']
    for half in [*broken, "}", "{}", "[1]", "12", "\0\0"]:
        log.write_text(whole + half)
        assert ddim.main(["--resume", "--run-dir", "run"]) == 0
        assert log.read_text() == whole, half


def lr_at(path):
    lines = map(json.loads, path.read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]


def test_more_epochs_than_first_asked_for_follow_the_longer_schedule(
    in_tmp, data_dir, monkeypatch, capsys
):
    monkeypatch.setattr(ddim, "LOG_EVERY", 1)
    flags = ["--data-dir", data_dir, "--warmup", "0"]
    assert ddim.main([*FLAGS["ddim"], *flags, "--run-dir", "longer"]) == 0
    assert ddim.main(["--resume", "--run-dir", "longer", "--epochs", "8"]) == 0
    first, last = np.split(np.array(lr_at(in_tmp / "longer/log.jsonl")), 2)
    rate = 5e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(24) / np.array([12] * 12 + [24] * 12)))
    assert np.allclose([*first, *last], rate)
    before = (in_tmp / "longer/ddim.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        ddim.main(["--resume", "--run-dir", "longer", "--epochs", "2"])
    assert "longer is already at 8.00 epochs" in capsys.readouterr().err
    assert (in_tmp / "longer/ddim.pt").read_bytes() == before
    assert len(lr_at(in_tmp / "longer/log.jsonl")) == 24


def test_training_outside_the_main_thread_needs_no_signals(in_tmp, data_dir):
    codes = []
    flags = [*FLAGS["ddim"], "--data-dir", data_dir, "--run-dir", "run"]
    thread = threading.Thread(target=lambda: codes.append(ddim.main(flags)))
    thread.start()
    thread.join()
    assert codes == [0] and (in_tmp / "run/ddim.pt").exists()


def test_minutes_resume_where_they_were(in_tmp, data_dir, monkeypatch):
    """With a clock of half a second a step: 24 steps in 12 s, stopped at 4.5 s for a day."""
    now, seen = [1e6], []
    step = runs.Run._show

    def tick(self):
        now[0] += 0.5
        seen.append(self.fraction_done())
        if len(seen) == 9:
            signal.raise_signal(signal.SIGINT)
        step(self)

    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    # a wall clock that is set back does not matter
    monkeypatch.setattr(runs.time, "time", lambda: 0.0)
    monkeypatch.setattr(runs.Run, "_show", tick)
    flags = ["--train", "--minutes", "0.2", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    assert ddim.main([*flags, "--run-dir", "run"]) == 130
    now[0] += 24 * 3600
    assert ddim.main(["--resume", "--run-dir", "run"]) == 0
    assert np.allclose(seen, np.arange(1, 25) / 24)
