"""Recipes by trial: train variants of the scripts for the same time, one change each, and score their samples.

    python benchmarks/trials.py                   all trials below that are not done yet, then results/trials.md
    python benchmarks/trials.py gan vae           those of these scripts
    python benchmarks/trials.py --table           only write the table of what is done

A trial is its script with the flags of BASE and its own after them, trained for --minutes on one core; as many run at
once as there are cores.  "@COMMIT" takes the script as it was.  Runs and samples stay in runs/trials/, so that what was
stopped goes on; the figures of all trials are kept in results/trials.json.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate

ROOT = Path(__file__).resolve().parent.parent
RUNS, KEPT, TABLE = ROOT / "runs/trials", ROOT / "results/trials.json", ROOT / "results/trials.md"

# What the trials of a script have in common, spelled out, so that they stay what they were when its defaults move.
BASE = {
    "ddim": "--widths 32,96 --depths 1,3 --patch 2 --prediction v --schedule cosine --lr 3e-3 --batch-size 128",
    "ldm": "--latent-channels 4 --kl-weight 1e-3 --stage-1-share 0.25 --widths 96 --depths 3 --lr 3e-3",
    "gan": "--loss relativistic --gamma 1 --penalty-every 4 --lr 1e-3 --batch-size 64 --widths 32,64,128 --no-bf16",
    "vae": "--latent-dim 32 --widths 32,64,96 --emb-channels 128 --prior-components 10 --lr 2e-3 --no-bf16",
}
TRIALS = {
    "ddim": [
        "", "--no-bf16", "--patch 4 --widths 96 --depths 4", "--patch 1 --widths 16,32,96 --depths 1,1,3",
        "--widths 32,128", "--widths 48,96", "--depths 1,2", "--depths 1,4", "--no-attention", "--prediction eps",
        "--schedule linear", "--loss huber", "--lr 2e-3", "--lr 4.5e-3", "--batch-size 64", "--batch-size 256",
        "--ema-length 0.04", "--optimizer adam",
    ],
    "ldm": [
        "", "--latent-channels 8", "--kl-weight 1e-2", "--latent-channels 8 --kl-weight 1e-2", "--stage-1-share 0.4",
        "--depths 5", "--no-channel-attention",
    ],
    "gan": ["", "@da27eb0", "--bf16", "--loss nonsaturating", "--gamma 0.3", "--penalty-every 8", "--widths 48,96,128"],
    "vae": ["", "--latent-dim 64", "--bf16", "--kl-weight 0.3", "--reconstruction l1"],
}  # fmt: skip
SAMPLES = {"ddim": 2000, "ldm": 2000, "gan": 10_000, "vae": 10_000}
SCORES = ("ffid", "ffid2", "precision", "recall", "density", "coverage", "label_accuracy")


def folder(name, flags):
    return RUNS / "-".join([name, *flags.replace("--", "").replace("@", "").replace(",", ".").split()])


def run_trial(name, flags, minutes, cores):
    """Train, export and evaluate on one core; returns what results/trials.json holds of it."""
    core = cores.get()
    place = folder(name, flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(*words):
        with (RUNS / f"{place.name}.out").open("a") as log:
            subprocess.run(
                [sys.executable, *map(str, words)], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )  # fmt: skip

    try:
        onnx = place / f"{name}.onnx"
        if not onnx.is_file():
            script, spelled = ROOT / f"{name}.py", BASE[name].split()
            if flags.startswith("@"):
                script = place.with_suffix(".py")
                script.write_bytes(subprocess.check_output(["git", "show", f"{flags[1:]}:{name}.py"], cwd=ROOT))
            else:
                spelled += flags.split()
            start = ["--resume", "--run-dir", place] if place.is_dir() else ["--train", "--run-dir", place, *spelled]
            command(script, *start, "--minutes", minutes)
            command("export.py", name, "--checkpoint", place)
        command(
            "evaluate.py", onnx, "--num-samples", SAMPLES[name], "--seeds", 2, "--no-timing", "--threads", 1,
            "--output", place / "results",
        )  # fmt: skip
    finally:
        cores.put(core)
    results = json.loads((place / "results/results.json").read_text())
    row, floor = results["rows"][0], results["floor"]["scores"]["ffid"]["mean"]
    log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    return {
        "name": name, "base": BASE[name], "flags": flags, "minutes": minutes, "epochs": log[-1]["epoch"],
        "processor": results["machine"]["processor"], "n": row["n"], "floor": floor,
        "scores": {score: row["scores"][score]["mean"] for score in SCORES}, "spread": row["scores"]["ffid"]["spread"],
    }  # fmt: skip


def table(trials):
    """The figures of all trials as Markdown, those of a script beside its first."""
    text = "# Recipes by trial\n\n"
    head = ["change", "epochs", "F-FID", "/ floor", "/ first row", *(score.replace("_", " ") for score in SCORES[1:])]
    for name in BASE:
        own = [trial for trial in trials if trial["name"] == name]
        if not own:
            continue
        first = own[0]
        text += f"## {name}.py\n\n`{first['base']}`, {first['minutes']:g} minutes on one core of {first['processor']}; "
        text += f"N = {first['n']:,}, two sampling seeds; floor F-FID {first['floor']:.4f}.\n\n"
        lines = []
        for trial in own:
            scores, change = trial["scores"], f"`{trial['flags']}`" if trial["flags"] else "none"
            ffid = scores["ffid"]
            cells = [change, f"{trial['epochs']:.1f}", f"{ffid:.3f} ± {trial['spread']:.3f}"]
            cells += [f"{ffid / trial['floor']:.0f}", f"{ffid / first['scores']['ffid']:.2f}"]
            lines.append(cells + [f"{scores[score]:.3f}" for score in SCORES[1:]])
        text += evaluate.as_table(head, lines)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts (all)")
    parser.add_argument("--minutes", type=float, default=15, help="of training, for each trial (15)")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    trials = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    done = {(trial["name"], trial["flags"]) for trial in trials}
    wanted = [(name, flags) for name in args.names or TRIALS for flags in TRIALS[name]]
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    with ThreadPoolExecutor(cores.qsize()) as pool:
        jobs = [
            pool.submit(run_trial, *trial, args.minutes, cores)
            for trial in wanted
            if trial not in done and not args.table
        ]
        for job in jobs:
            trials.append(job.result())
            KEPT.write_text(json.dumps(trials, indent=1) + "\n")
    order = [(name, flags) for name in TRIALS for flags in TRIALS[name]]
    trials.sort(key=lambda trial: order.index((trial["name"], trial["flags"])))
    TABLE.write_text(table(trials))
    print(table(trials))


if __name__ == "__main__":
    sys.exit(main())
