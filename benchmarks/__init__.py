"""What the figures of results/ were measured with; each file says how it is run."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from infer_onnx import InputError

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
SCORES = ("ffid", "ffid2", "precision", "recall", "density", "coverage", "label_accuracy")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def only_table(parser, args):
    """Whether --table is given; ends with an error beside flags of work, which it does not do."""
    useful = ("table", "output", "data_dir", "what")
    given = [key for key, value in vars(args).items() if value not in (parser.get_default(key), [])]
    if args.table and (others := [key for key in given if key not in useful]):
        what = "NAME" if others[0] == "names" else f"--{others[0].replace('_', '-')}"
        text = f"--table only writes the table anew: leave out {what}"
        parser.exit(2, f"{parser.prog}: error: {text}\n")
    return args.table


def pinned(core):
    """Options of subprocess for a program with one thread on one core, in the repository.

    It is stopped when this process ends, however that is.
    """
    prctl = ctypes.CDLL(None).prctl

    def begin():
        os.sched_setaffinity(0, {core})
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return {
        "cwd": Path(__file__).resolve().parent.parent,
        "env": {**os.environ, **dict.fromkeys(THREADS, "1"), "CUDA_VISIBLE_DEVICES": ""},
        "preexec_fn": begin,
    }


def run_pinned(words, core, log):
    """Run a Python program as `pinned` says; what it prints is added to the file `log`.

    words: its file and flags.  Raises InputError with its last line if it fails.
    """
    with log.open("a") as file:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, stdout=file, stderr=file, **pinned(core))
    if done.returncode:
        last = " ".join(log.read_text().strip().splitlines()[-1:])
        raise InputError(f"a command failed, all it said is in {log}: {last}")
