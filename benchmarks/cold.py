"""What a cold `python infer_onnx.py --class Sneaker` costs: wall time and peak memory.

It draws with the included ddim.

    python benchmarks/cold.py

It is measured over whole processes, beside a process that only imports torch, where that is
installed.  The commands take turns, six times each; the first round warms the disk cache and is not
counted.  Not for Windows, which has no module `resource`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# Runs argv[1:] and prints its wall time and peak memory.  A separate process for each run, because
# the peak is over all children.
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes or KiB, in MiB

ROUNDS = 6


def main():
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(prog="cold.py", description=__doc__, formatter_class=raw).parse_args()
    root = Path(__file__).resolve().parent.parent
    flags = ["--class", "Sneaker", "--model", str(root / "pretrained/ddim.onnx")]
    commands = {"infer_onnx.py --class Sneaker": [str(root / "infer_onnx.py"), *flags]}
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0:
        commands["import torch, and nothing else"] = ["-c", "import torch"]
    results = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, argv in commands.items():
                measure = [sys.executable, "-c", MEASURE, sys.executable, *argv]
                done = subprocess.run(
                    measure, cwd=folder, check=True, capture_output=True, text=True
                )
                results[name].append([float(x) for x in done.stdout.split()])
    for name, runs in results.items():
        seconds, memory = (statistics.median(column) for column in zip(*runs[1:], strict=True))
        print(f"{name:36s} {seconds:5.2f} s, {memory / UNIT:4.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
