"""Run a script in this process with a fault injected.

    python tests/faulty.py FAULT NAME FLAGS...            also under torchrun
    forked(FAULT, NAME, *FLAGS)                           of conftest.py: without an import

FAULT: none, KIND:STEP or KIND:STEP:RANK; steps are counted over all stages, the default rank is 0:
    kill    SIGKILL after the step, before it is saved
    term    SIGTERM after the step
    hup     SIGHUP after the step, as from a terminal that is closed
    half    SIGKILL while the checkpoint that follows the step is written
    full    after the step no file can grow beyond 20,000 bytes, as on a full disk
    small   from the start no file can grow beyond 1,000 bytes
    gone    the run's folder is deleted after the step
    ahead   after the step its clock is put ahead by an hour
    wait    SIGTERM to a process that waits for rank 0, which sleeps
Checkpoint and log are written after every second step, samples take two steps, and the indices
that each step took of the data are written to seen_RANK.jsonl.
"""

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runs

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP}


def in_fork(argv, environment, *streams):
    """main() in a process that was forked for it; streams: where stdout and stderr go."""
    os.environ.update({key: str(value) for key, value in environment.items()})
    sys.dont_write_bytecode = True  # a full disk would truncate it too
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(streams[number - 1].fileno(), number)
        streams[number - 1].close()
        setattr(sys, name, os.fdopen(number, "w", closefd=False))  # the server's was no pipe
    main(argv)


def main(argv):
    fault, name, *argv = argv
    kind, at, rank = ([*fault.split(":"), "0", "0"])[:3]
    here, steps = rank == os.environ.get("RANK", "0"), []
    script = importlib.import_module(name)
    script.LOG_EVERY, script.GRID_STEPS = 2, 2
    script.WALKS = 3  # of distill.py: batches in an epoch
    show = runs.Run._show
    shard = runs.Run.shard
    save = torch.save
    if kind == "small":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    def show_and_fail(self):
        show(self)
        steps.append(self.step)
        if len(steps) != int(at):
            return
        if kind == "wait" and self.rank == 0:
            time.sleep(3)
        elif here and kind == "wait":
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        elif here and kind == "ahead":
            clock = time.monotonic
            time.monotonic = lambda: clock() + 3600
        elif here and kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif here and kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif here and kind == "gone":
            shutil.rmtree(self.folder)

    def shard_and_note(self, *batch):
        taken = shard(self, *batch)
        with Path(f"seen_{self.rank}.jsonl").open("a") as file:
            line = [self.stem, self.step, taken[0].tolist(), self.batch().tolist()]
            file.write(json.dumps(line) + "\n")
        return taken

    def save_half(content, path):
        save(content, path)
        if here and len(steps) == int(at) and kind == "half":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    runs.Run._show = show_and_fail
    runs.Run.shard = shard_and_note
    torch.save = save_half
    runs.Run._save_due = lambda self: self.rank == 0 and len(steps) % 2 == 0
    sys.exit(script.main(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
