"""Run the scripts on a CUDA machine and write down what happened.

    python benchmarks/gpu.py --output results/cuda

    train      every script with and without --bf16, several at once on the one card
    compile    the same with --compile
    resume     --deterministic twice, and once stopped by Ctrl-C and resumed: are the weights equal?
    torchrun   one process on nccl against none
    samples    the included checkpoints, sampled on the CPU and on the card
    onnx       infer_onnx.py with the included files: --check, and samples beside those of the CPU
    memory     of ddim.py, a batch that cannot fit: one line, exit code 2
    speed      one at a time: images/s, and of ddim.py the fraction of the matrix-product rate

Writes cuda.json and cuda.md as it goes; what they hold of other parts and scripts stays.  A
program that takes longer than --limit seconds is ended and counted as failed.  The VAE's prior has
one Gaussian per class here: the mixture is fitted on the CPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.report import write_text  # noqa: E402
from infer_onnx import file_path  # noqa: E402
from common import UNet  # noqa: E402

SCRIPTS = ("vae", "gan", "ddpm", "ddim", "ldm", "distill")
LARGE = ["--patch", "1", "--widths", "64,128,256", "--depths", "2,2,4"]
COMPILED = ["--bf16", "--compile"]
# Of part speed: script, batch size, steps, network, switches.
RUNS = (
    ("vae", 64, 400, [], ["--no-bf16"]), ("gan", 64, 400, [], ["--no-bf16"]),
    ("ldm", 64, 400, [], ["--no-bf16"]), ("distill", 32, 256, [], ["--no-bf16"]),
    ("ddim", 64, 400, [], ["--no-bf16"]), ("ddim", 64, 400, [], ["--bf16"]),
    ("ddim", 64, 400, [], COMPILED), ("ddim", 1024, 400, [], COMPILED),
    ("ddim", 512, 200, LARGE, ["--no-bf16"]), ("ddim", 512, 200, LARGE, ["--bf16"]),
    ("ddim", 512, 200, LARGE, COMPILED),
)  # fmt: skip
IMAGES = {"distill": 64 * 32}  # in an epoch; else those of Fashion-MNIST
PARTS = ("train", "compile", "resume", "torchrun", "samples", "onnx", "memory", "speed")


def start(name, *flags, launcher=(sys.executable,)):
    """Start a script in the work folder; its output goes to a file of its own."""
    output = Path(f"{time.monotonic_ns()}.out")
    command = [*launcher, str(ROOT / f"{name}.py"), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}  # of the CPU, for many programs at once
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    process.deadline = time.monotonic() + arguments.limit
    said = [str(flag) for flag in flags if flag not in ("--data-dir", arguments.data_dir)]
    process.command = " ".join([f"{name}.py", *said])
    process.output = output
    return process


def finish(process):
    """Wait; returns {"command", "exit code", and the end of the output if it is not 0}."""
    try:
        code = process.wait(max(process.deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    text = process.output.read_text().strip()
    said = {"command": process.command, "exit code": code}
    if code != 0:
        said["last line"] = text.splitlines()[-1].strip() if text else ""
    return said


def train(name, folder, *flags, steps=None, batch=None, **options):
    """Start a training of so many steps, or as long as the flags say."""
    fixed = ["--train", "--run-dir", folder]
    if name != "distill":
        fixed += ["--data-dir", arguments.data_dir]
    if name == "vae":
        fixed += ["--prior-components", "1"]
    if batch:
        fixed += ["--batch-size", batch]
    if steps:
        batch = batch or (32 if name == "distill" else 64)
        fixed += ["--epochs", round(steps * batch / IMAGES.get(name, 60_000), 4)]
    return start(name, *fixed, *flags, **options)


def lines_of(folder):
    """The lines of a run's log, but for one that is half written."""
    path = Path(folder, "log.jsonl")
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if "lr" in line]


def weights_of(name, folder):
    return torch.load(Path(folder, f"{name}.pt"), weights_only=True)["ema"]


def difference(name, a, b):
    """The largest difference of the averaged weights of two runs."""
    with contextlib.suppress(OSError, KeyError):
        first, second = weights_of(name, a), weights_of(name, b)
        return max((first[k].double() - second[k].double()).abs().max().item() for k in first)
    return None


def part_train(compiled=()):
    """Each script with and without bfloat16, all at once on the card."""
    rows = []
    started = []
    for name in arguments.scripts:
        if name == "gan" and compiled:
            continue  # it has no --compile
        for precision in ("--no-bf16", "--bf16"):
            flags = [precision, *compiled]
            folder = "".join([f"train_{name}", *flags])
            started.append((folder, train(name, folder, *flags, steps=arguments.steps)))
    for folder, process in started:
        row = finish(process)
        if lines := lines_of(folder):
            loss = next(k for k in ("loss", "loss_g", "reconstruction") if k in lines[0])
            first, last = lines[0], lines[-1]
            row |= {"steps": last["step"], "first loss": first[loss], "last loss": last[loss]}
        rows.append(row)
    return rows


def part_compile():
    return part_train(["--compile"])


def part_resume():
    """Three runs of each script with --deterministic; the third is stopped and resumed."""
    rows, started = [], {}
    for name in arguments.scripts:
        for run in "abc":
            flags = ["--deterministic", "--save-every", "100"]
            started[name, run] = train(name, f"{name}_{run}", *flags, steps=480)
    waiting = set(arguments.scripts)
    while waiting:
        time.sleep(0.2)
        for name in sorted(waiting):
            process, lines = started[name, "c"], lines_of(f"{name}_c")
            late = time.monotonic() > process.deadline
            ended = process.poll() is not None
            if late or ended or (lines and lines[-1]["step"] >= 100):
                if not ended:
                    process.send_signal(signal.SIGINT)
                waiting.discard(name)
    stopped = {name: finish(started[name, "c"])["exit code"] for name in arguments.scripts}
    again = {name: start(name, "--resume", "--run-dir", f"{name}_c") for name in arguments.scripts}
    for name in arguments.scripts:
        done = [finish(started[name, "a"]), finish(started[name, "b"]), finish(again[name])]
        rows.append({
            "script": name, "exit codes": [row["exit code"] for row in done],
            "stopped with": stopped[name],
            "twice, largest difference": difference(name, f"{name}_a", f"{name}_b"),
            "resumed, largest difference": difference(name, f"{name}_a", f"{name}_c"),
            "last lines": [row["last line"] for row in done if "last line" in row],
        })  # fmt: skip
    return rows


def part_torchrun():
    rows, started = [], {}
    for name in arguments.scripts:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", "1"]
        started[name] = (
            train(name, f"{name}_one", "--deterministic", steps=192, launcher=launcher),
            train(name, f"{name}_none", "--deterministic", steps=192),
        )
    for name, processes in started.items():
        done = [finish(process) for process in processes]
        rows.append({
            "script": name, "exit codes": [row["exit code"] for row in done],
            "largest difference": difference(name, f"{name}_one", f"{name}_none"),
            "last lines": [row["last line"] for row in done if "last line" in row],
        })  # fmt: skip
    return rows


def compared(name, started):
    """The row of a script's two samplings, which write {name}_cpu.npz and {name}_cuda.npz."""
    done = [finish(process) for process in started]
    row = {"script": name, "exit codes": [r["exit code"] for r in done]}
    if not any(row["exit codes"]):
        a, b = (np.load(f"{name}_{d}.npz")["x"].astype(int) for d in ("cpu", "cuda"))
        levels = np.abs(a - b)
        row |= {
            "images": len(a), "largest difference in grey levels": int(levels.max()),
            "mean": float(levels.mean()), "fraction above 1": float((levels > 1).mean()),
        }  # fmt: skip
    return row | {"last lines": [r["last line"] for r in done if "last line" in r]}


def part_samples():
    started = {}
    for name in arguments.scripts:
        pt = ROOT / "pretrained" / f"{'ddim' if name == 'ddpm' else name}.pt"
        flags = ["--num-samples", 4, "--checkpoint", pt]
        started[name] = [
            start(name, *flags, "--device", device, "--output", f"{name}_{device}.npz")
            for device in ("cpu", "cuda")
        ]
    return [compared(name, processes) for name, processes in started.items()]


def part_onnx():
    """Needs onnxruntime-gpu.  The files' own checks allow a difference of 0.01 on CUDA (TF32)."""
    started = {}
    for name in arguments.scripts:
        file = ["--model", ROOT / "pretrained" / f"{name}.onnx"]
        started[name] = [
            start("infer_onnx", *file, "--num-samples", 4, "--provider", provider,
                  "--output", f"{name}_{provider}.npz")
            for provider in ("cpu", "cuda")
        ]  # fmt: skip
        started[name] += [start("infer_onnx", *file, "--check", "--provider", "cuda")]
        started[name] += [start("infer_onnx", *file, "--check", "--provider", "cuda", "--no-tf32")]
    for name, (cpu, cuda, *checks) in started.items():
        row = compared(name, [cpu, cuda])
        for said, process in zip(("check", "check without TF32"), checks, strict=True):
            row[f"{said}, exit code"] = finish(process)["exit code"]
            row[said] = process.output.read_text().strip().splitlines()
        yield row


def part_memory():
    flags = ["--minutes", "1", "--batch-size", "60000", *LARGE]
    return [finish(train("ddim", "memory", *flags))] if "ddim" in arguments.scripts else []


def rate(function, operations):
    """Operations a second of a function on the card: the best of ten."""
    times = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return operations / min(times[3:])


def forward_operations(network):
    """Floating-point operations of one evaluation of ddim.py's network for one image."""
    options = {"patch": 1, "widths": (64, 128, 256), "depths": (2, 2, 4)} if network else {}
    x, t = torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(**options)(x, t, t)
    return counter.get_total_flops()


def part_speed():
    torch.set_float32_matmul_precision("high")  # TF32, as the scripts do
    products = {}
    for name, dtype in (("TF32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
        products[name] = rate(lambda a=a, b=b: a @ b, 2 * 8192**3)
    del a, b
    torch.cuda.empty_cache()
    yield {f"8192^3 {name} product, TFLOP/s": r / 1e12 for name, r in products.items()}
    for name, batch, steps, network, switches in RUNS:
        if name not in arguments.scripts:
            continue
        folder = "_".join(["speed", name, str(batch), *network, *switches])
        flags = ["--save-every", "100", *network, *switches]
        row = finish(train(name, folder, *flags, steps=steps, batch=batch))
        lines = lines_of(folder)
        if len(lines) > 2:
            first, last = lines[len(lines) // 3], lines[-1]
            speed = batch * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
            row["images/s"] = speed
            if name == "ddim":
                operations = 3 * forward_operations(network) * speed
                row |= {
                    "TFLOP/s": operations / 1e12,
                    "fraction of the TF32 product": operations / products["TF32"],
                    "fraction of the bfloat16 product": operations / products["bfloat16"],
                }
        yield row


def others(rows):
    """The rows that are of no script of this run."""
    run = {"", *arguments.scripts, *(f"{name}.py" for name in arguments.scripts)}
    return [
        row for row in rows
        if row.get("script", row.get("command", "").partition(" ")[0]) not in run
    ]  # fmt: skip


def as_text(report):
    machine = ", ".join(f"{key}: {value}" for key, value in report["machine"].items())
    lines = ["# The scripts on CUDA", "", machine]
    for part, rows in report["parts"].items():
        about = next(line for line in __doc__.splitlines() if line.startswith(f"    {part} "))
        lines += ["", f"## {' '.join(about.split())}", ""]
        for row in rows:
            figures = []
            for key, value in row.items():
                if isinstance(value, float):
                    value = f"{value:.6g}"
                if value != []:
                    figures.append(f"{key}: {value}")
            lines.append(f"- {', '.join(figures)}")
    return "\n".join(lines) + "\n"


def build_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("--output", type=file_path, required=True, help="folder of the report")
    add("--data-dir", type=file_path, default=ROOT / "data", help="folder of Fashion-MNIST (data/)")
    add("--steps", type=int, default=300, help="training steps in parts train and compile (300)")
    add("--limit", type=float, default=300, help="seconds that a program may take (300)")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    add("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="scripts to run (all)")
    # fmt: on
    return parser


def main():
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # several programs compile at once
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    machine = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(),
        "Python": sys.version.split()[0], "cores": os.cpu_count(),
    }  # fmt: skip
    file = output / "cuda.json"
    report = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    if report.setdefault("machine", machine) != machine:
        parser.error(f"{file} is of another machine or other versions: name another --output")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for part in arguments.only:
            begun = time.monotonic()
            rows = report["parts"][part] = others(report["parts"].get(part, []))
            for row in globals()[f"part_{part}"]():
                rows.append(row)
                write_text(json.dumps(report, indent=1) + "\n", file)
                write_text(as_text(report), output / "cuda.md")
            print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    print(as_text(report))


if __name__ == "__main__":
    parser = build_parser()
    arguments = parser.parse_args()  # every part reads them, in another folder
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    arguments.data_dir = arguments.data_dir.resolve()
    main()
