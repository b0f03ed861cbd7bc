"""benchmarks/libraries.py train and benchmarks/peers.py, without the libraries where they miss."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import ROOT, refused

import common
import infer_onnx
import runs
from benchmarks import libraries, peers

TWO_CORES = pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="needs two cores"
)


class Peer:
    """A library of a network with one weight, which learns the images' mean; records its use."""

    def __init__(self, recipe):
        self.network = torch.nn.Linear(1, 1)
        self.seen, self.averages = set(), 0
        Peer.last = self

    def loss(self, x_0, y, precision):
        self.seen |= {
            (image.numpy().tobytes(), label.item()) for image, label in zip(x_0, y, strict=True)
        }
        with precision:
            return (self.network(torch.ones(1, 1)) - x_0.mean()).square().mean()

    def average(self):
        self.averages += 1

    def averaged(self):
        return self.network.state_dict()


@TWO_CORES
def test_a_program_on_a_core_of_its_own_ends_with_the_benchmark():
    code = """
import subprocess, time
from benchmarks import pinned
print(subprocess.Popen(["sleep", "60"], **pinned(0)).pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as benchmark:
        program = Path("/proc", benchmark.stdout.readline().strip(), "stat")
        assert program.read_text().split()[2] != "Z"
        benchmark.kill()
        end = time.monotonic() + 10
        while program.exists() and program.read_text().split()[2] != "Z":
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_library_trains_on_what_is_not_held_out(fashion, tmp_path, monkeypatch):
    """Its minutes, images, rate and average: for ddim.py, other tests hold the same."""
    folder = fashion(tmp_path / "fashion")
    monkeypatch.setitem(peers.PEERS, "diffusers", Peer)
    rates, learning_rate = [], runs.learning_rate

    def recorded(*args):
        rates.append(learning_rate(*args))
        return rates[-1]

    monkeypatch.setattr(runs, "learning_rate", recorded)
    recipe = peers.RECIPES["diffusers"] | {"batch_size": 10}
    job = {"library": "diffusers", "recipe": recipe, "minutes": 0.02}
    start = time.monotonic()
    peers.train(job | {"folder": str(tmp_path), "data_dir": str(folder)})
    assert 1.2 <= time.monotonic() - start < 30

    data = common.load_data("fashion-mnist", str(folder))
    pairs = zip(common.to_float(data.images), data.labels.tolist(), strict=True)
    every = [(image.numpy().tobytes(), label) for image, label in pairs]
    assert Peer.last.seen == {pair for i, pair in enumerate(every) if i % 6 != 5}
    saved = torch.load(tmp_path / "library.pt", weights_only=True)
    assert saved["about"]["images"] == 10 * len(rates) == 10 * Peer.last.averages
    assert saved["about"]["parameters"] == 2 and saved["about"]["seconds"] >= 1.2
    assert max(rates) <= 1e-3 and rates[-1] < 0.01 * max(rates)


def test_a_pair_has_the_same_minutes_and_data(tmp_path):
    run = {"library": "diffusers", "recipe": peers.RECIPES["diffusers"], "minutes": 7.5}
    ours, library = peers.train_commands(run, tmp_path, "/data")
    assert ours[2:6] == ["--train", "--hold-out", "--minutes", "7.5"]
    assert ours[-2:] == ["--data-dir", "/data"]
    what, job = json.loads(library[-1])
    assert what == "train" and job["minutes"] == 7.5 and job["data_dir"] == "/data"
    # ddim.py has the defaults of anybody: nothing else is typed that changes what it learns.
    assert [word for word in ours if word.startswith("--")] == [
        "--train", "--hold-out", "--minutes", "--run-dir", "--save-every", "--data-dir",
    ]  # fmt: skip


@TWO_CORES
def test_commands_run_at_once_on_a_core_each(tmp_path):
    code = """
import os, time
start = time.monotonic()
time.sleep(0.5)
print(*os.sched_getaffinity(0), os.environ["OMP_NUM_THREADS"], start, time.monotonic(), flush=True)
"""
    cores = sorted(os.sched_getaffinity(0))[:2]
    peers.run_at_once([[sys.executable, "-c", code] for _ in cores], cores, tmp_path / "log.txt")
    lines = sorted(line.split() for line in (tmp_path / "log.txt").read_text().splitlines())
    assert [line[:2] for line in lines] == [[str(core), "1"] for core in cores]
    starts, ends = np.array([line[2:] for line in lines], float).T
    assert starts.max() < ends.min()  # not one after the other


@TWO_CORES
def test_a_command_that_fails_stops_the_others(tmp_path):
    log = tmp_path / "log.txt"
    commands = [["sleep", "60"], [sys.executable, "-c", "raise SystemExit('no such thing')"]]
    start = time.monotonic()
    with pytest.raises(infer_onnx.RunError, match=r"exit code 1, see .*log\.txt: no such thing"):
        peers.run_at_once(commands, sorted(os.sched_getaffinity(0))[:2], log)
    assert time.monotonic() - start < 30


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Trainings and samples by a function: an image has its guidance as its grey level."""
    calls = []

    def run_at_once(commands, cores, log):
        for command in commands:
            calls.append(command[1:])
            if command[-2] == "--job":
                what, job = json.loads(command[-1])
                if what == "draw":
                    level = int(10 * job["guidance"]) if job["library"] else 100
                    images = np.full((job["count"], 1, 32, 32), level, np.uint8)
                    about = {"parameters": 5, "seconds": 60.0, "images": 640, "evaluations": 30}
                    about["guidance"] = job["guidance"]
                    np.savez(job["file"], images=images, about=json.dumps(about))

    def score(reference, images, labels):
        assert labels[:12].tolist() == [*range(10), 0, 1] and len(labels) == len(images)
        return dict.fromkeys(peers.SCORES, images.mean() / 50)

    monkeypatch.setattr(peers, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(peers, "run_at_once", run_at_once)
    monkeypatch.setattr(peers.evaluate, "score_images", score)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(peers, "make_judges", lambda _: (lambda x: abs(x.mean() - 16), None))
    done = type("Done", (), {"returncode": 0})
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(peers.os, "sched_getaffinity", lambda _: {0, 1})
    return calls


TRAIN = "train --library diffusers --minutes 2 --num-samples 1200"


def train(tmp_path, *flags):
    output = ["--output", str(tmp_path / "results")]
    return libraries.main([*split(TRAIN), *flags, *output])


def test_rows_are_kept_and_not_done_again(stubs, tmp_path):
    assert train(tmp_path) == 0
    (row,) = json.loads((tmp_path / "results/libraries.json").read_text())
    # 1.5 gives the grey level nearest to 16, and so the lowest distance to what is held out.
    assert row["sides"]["diffusers"]["guidance"] == 1.5
    assert [weight for weight, _ in row["guidance_tried"]] == [1.0, 1.5, 4.0]
    assert row["ratio"] == pytest.approx({"ffid": 0.15, "ffid2": 0.15})
    jobs = [json.loads(words[-1]) for words in stubs if words[-2] == "--job"]
    seeds = [job["seed"] for what, job in jobs if what == "draw"]
    assert seeds == [0, 0, 0, *[1000, 1001, 1002] * 2]  # the choice has other images
    counts = [job["count"] for what, job in jobs if what == "draw"]
    assert counts == [500, 500, 500, *[500, 500, 200] * 2]

    before = len(stubs)
    assert train(tmp_path) == 0 and len(stubs) == before
    assert train(tmp_path, "--lr", "3e-4") == 0 and len(stubs) == 2 * before
    rows = json.loads((tmp_path / "results/libraries.json").read_text())
    assert [row["recipe"]["lr"] for row in rows] == [1e-3, 3e-4]
    table = (tmp_path / "results/libraries.md").read_text()
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [line[0] for line in cells[2:]] == ["| this repository", "| diffusers"] * 2
    assert {len(line) for line in cells} == {len(cells[0])}
    assert cells[3][1] == "width 32, batch size 64, lr 0.001, steps 15, guidance 1.5"
    assert cells[3][cells[0].index("F-FID") :][:2] == ["0.300", "0.15"]


def test_a_stopped_run_resumes(stubs, tmp_path):
    """What is trained and drawn is used; without both trainings, both start anew."""
    train(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    (tmp_path / "results/libraries.json").unlink()
    (folder / "diffusers-1.5-1001-500.npz").unlink()
    stubs.clear()
    train(tmp_path)
    ((what, job),) = (json.loads(words[-1]) for words in stubs)
    assert (what, job["seed"], job["guidance"]) == ("draw", 1001, 1.5)

    (tmp_path / "results/libraries.json").unlink()
    (folder / "trained").unlink()
    stubs.clear()
    train(tmp_path)
    assert len(stubs) == 2 + 3 + 6 and stubs[0][0].endswith("ddim.py")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes", "0"], "--minutes 0.0: right is 0.05 or more"),
        (["--batch-size", "0"], "--batch-size 0: right is 1 or more"),
        (["--lr", "nan"], "--lr nan: right is 1e-06 or more"),
        (["--rounds", "5"], "--rounds has no meaning for train"),
        (["--table"], "has no rows yet"),
        (["--table", "--lr", "3e-4"], "--table only writes the table anew: leave out --lr"),
    ],
)
def test_bad_flags_end_in_one_line(flags, said, tmp_path, capsys):
    argv = ["train", *flags, "--output", tmp_path / "results"]
    assert said in refused(libraries.main, argv, capsys)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_a_library_does_what_is_asked_of_it(library):
    pytest.importorskip(library.replace("-", "_"))
    peers.check({"library": library, "recipe": peers.RECIPES[library]})
