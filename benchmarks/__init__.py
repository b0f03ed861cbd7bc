"""What the figures of results/ were measured with; each file says how it is run."""

import os
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def pinned(core):
    """Options of subprocess for a program with one thread on one core, in the repository."""
    return {
        "cwd": Path(__file__).resolve().parent.parent,
        "env": {**os.environ, **dict.fromkeys(THREADS, "1"), "CUDA_VISIBLE_DEVICES": ""},
        "preexec_fn": lambda: os.sched_setaffinity(0, {core}),
    }
