"""Recipes by trial: train variants of the scripts for the same time and score their samples.

    python benchmarks/trials.py              all trials not done yet, then results/trials.md
    python benchmarks/trials.py ddim steps   those of ddim.py, and spacings of the sampling steps
    python benchmarks/trials.py --table      only write the table of the trials so far

A trial is a script with the flags of BASE and then those of the trial, trained for --minutes on one
core; as many trials run at once as there are cores.  Few minutes favour what learns fast: a verdict
holds for runs of this length.  Runs and samples stay in runs/trials/, so that a stopped trial
resumes; the scores of all trials are kept in results/trials.json.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import infer_onnx
from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
RUNS, KEPT, TABLE = ROOT / "runs/trials", ROOT / "results/trials.json", ROOT / "results/trials.md"

# The flags that all trials of a script have in common; the others are at their defaults.
BASE = {
    "ddim": "--optimizer adamw --lr 3e-3 --batch-size 128"
    " --widths 32,96 --depths 1,3 --patch 2 --prediction v",
    "ldm": "--optimizer adamw --lr 3e-3 --batch-size 64"
    " --latent-channels 8 --kl-weight 1e-2 --stage-1-share 0.2",
    "gan": "--loss relativistic --gamma 1 --penalty-every 4 --lr 1e-3 --batch-size 64"
    " --widths 32,64,128",
    "vae": "--latent-dim 32 --widths 32,64,96 --emb-channels 128 --kl-weight 1"
    " --prior-components 10 --lr 2e-3 --batch-size 128",
}
MUON = "--optimizer muon --batch-size 64 --lr 1e-2"
RARE = "--penalty-every 8"
WIDE = "--latent-dim 64"
# The changes that became defaults of the scripts.
TAKEN = {
    "ddim": "--optimizer muon --batch-size 64 --lr 5e-3",
    "ldm": "--optimizer muon",
    "gan": f"{RARE} --loss nonsaturating",
    "vae": f"{WIDE} --kl-weight 0.3",
}
TRIALS = {
    "ddim": [
        "", "--optimizer muon", "--optimizer muon --batch-size 64", TAKEN["ddim"], MUON,
        "--optimizer muon --batch-size 64 --lr 2e-2", f"{MUON} --batch-size 32",
        f"{MUON} --no-attention", f"{MUON} --depths 1,4", f"{MUON} --depths 1,2",
        f"{MUON} --patch 4 --widths 96 --depths 4",
        f"{MUON} --patch 1 --widths 16,32,96 --depths 1,1,3",
        f"{MUON} --prediction eps", f"{MUON} --schedule linear", f"{MUON} --widths 48,96",
        f"{MUON} --ema-length 0.04",
        *(f"{TAKEN['ddim']} {flags}" for flags in (
            "--no-attention", "--depths 1,2", "--widths 48,96", "--no-attention --widths 48,96",
        )),
    ],
    "ldm": [
        "", "--optimizer muon", "--latent-channels 4", "--kl-weight 1e-3", "--stage-1-share 0.4",
        "--depths 5",
        *(f"{TAKEN['ldm']} {flags}" for flags in (
            "--latent-channels 4", "--lr 5e-3", "--kl-weight 3e-2", "--kl-weight 1e-1",
        )),
    ],
    "gan": [
        "", "--loss nonsaturating", "--gamma 0.3", RARE, "--widths 48,96,128", TAKEN["gan"],
        f"{RARE} --gamma 0.3", "--penalty-every 16",
    ],
    "vae": [
        "", WIDE, TAKEN["vae"], f"{WIDE} --reconstruction l1", f"{WIDE} --prior-components 0",
        "--latent-dim 128", f"{WIDE} --kl-weight 0.1", f"{WIDE} --prior-components 30",
        "--latent-dim 128 --kl-weight 0.3 --prior-components 5",
    ],
}  # fmt: skip
# How samples are made for the scores.
DRAWN = dict.fromkeys(("gan", "vae"), "--num-samples 10000")
DRAWN["ddim"] = (
    "--num-samples 2000 --solver dpm++ --steps 10 --guidance 1.25 --guidance-interval 0:1"
)
DRAWN["ldm"] = "--num-samples 2000 --solver dpm++ --steps 10 --guidance 1.5 --guidance-interval 0:1"
EXPONENTS = (1.0, 1.3, 2.0)  # of the spacing of steps
WALKS = (("ddim", 20), ("dpm++", 10))  # solver, steps
SCORES = ("ffid", "ffid2", "precision", "recall", "density", "coverage", "label_accuracy")


def plan(minutes):
    """All trials with the keys of results/trials.json; two are the same if all of these agree."""
    trials = [
        {"name": name, "flags": flags, "base": BASE[name], "minutes": minutes, "drawn": DRAWN[name]}
        for name in TRIALS
        for flags in TRIALS[name]
    ]
    model = hashlib.sha256((ROOT / "pretrained/ddim.onnx").read_bytes()).hexdigest()
    return trials + [
        {"name": "steps", "flags": f"{solver} {steps} {exponent}", "model": model}
        for solver, steps in WALKS
        for exponent in EXPONENTS
    ]


def key(trial):
    return tuple(trial.get(part) for part in ("name", "flags", "base", "minutes", "drawn", "model"))


def read_kept():
    """All trials so far by their keys."""
    return {key(trial): trial for trial in json.loads(KEPT.read_text())} if KEPT.is_file() else {}


def keep(trial):
    """Add a trial to those in the file, where another process may have added some; returns all."""
    kept = {**read_kept(), key(trial): trial}
    with infer_onnx.written_whole(KEPT) as scratch:
        scratch.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    return kept


def pairs(flags):
    """The set of "--flag value" in a string of flags."""
    return set(re.findall(r"--\S+(?: [^-]\S*)?", flags))


def run_trial(trial, cores):
    """Train, export and evaluate on one core; returns the trial with its figures."""
    core, name, flags = cores.get(), trial["name"], trial["flags"].split()
    recipe = f"{trial['base']} {trial['flags']} {trial['minutes']:g}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    place = RUNS / "-".join([name, digest, *(flag.lstrip("-").replace(",", ".") for flag in flags)])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}

    def command(*words):
        with (RUNS / f"{place.name}.out").open("a") as log:
            subprocess.run(
                [sys.executable, *map(str, words)], cwd=ROOT, env=environment,
                stdout=log, stderr=log, check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )  # fmt: skip

    try:
        onnx = place / f"{name}.onnx"
        if not onnx.is_file():
            start = ["--train", *trial["base"].split(), *flags]
            if any(place.glob("*.pt")):
                start = ["--resume"]
            command(f"{name}.py", *start, "--run-dir", place, "--minutes", trial["minutes"])
            command("export.py", name, "--checkpoint", place)
        scoring = ["--seeds", 2, "--no-timing", "--threads", 1, "--output", place / "results"]
        command("evaluate.py", onnx, *trial["drawn"].split(), *scoring)
    finally:
        cores.put(core)
    results = json.loads((place / "results/results.json").read_text())
    row, floor = results["rows"][0], results["floor"]["scores"]["ffid"]["mean"]
    log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    return trial | {
        "epochs": log[-1]["epoch"], "processor": results["machine"]["processor"],
        "n": row["n"], "floor": floor, "spread": row["scores"]["ffid"]["spread"],
        "scores": {score: row["scores"][score]["mean"] for score in SCORES},
    }  # fmt: skip


def try_spacing(trial, count=1000):
    """F-FID of the shipped ddim with steps at t + 1 = T * (i / steps)^exponent, seed 0."""
    solver, steps, exponent = trial["flags"].split()
    steps, exponent = int(steps), float(exponent)

    def time_pairs(num_timesteps, steps):
        ends = [(i, num_timesteps * (i / steps) ** exponent) for i in range(steps, 0, -1)]
        times = [max(round(end), i) - 1 for i, end in ends]
        return list(zip(times, [*times[1:], -1], strict=True))

    infer_onnx.time_pairs = time_pairs
    model = infer_onnx.load_model(ROOT / "pretrained/ddim.onnx")
    test = evaluate.load_split("fashion-mnist", None, train=False)
    extractor = ROOT / "pretrained/extractor.onnx"
    session, real, _ = evaluate.load_extractor(extractor, "fashion-mnist", test, 0)
    labels = evaluate.balanced_labels(0, count)
    images = infer_onnx.sample(model, labels, steps=steps, solver=solver)
    fake = evaluate.extract(session, images)[0]
    ffid = evaluate.frechet_distance(*evaluate.moments(real), *evaluate.moments(fake))
    return trial | {"n": count, "ffid": ffid}


def spacing_table(trials):
    """The F-FID of each spacing of the steps, as Markdown."""
    spaced = {trial["flags"]: trial for trial in trials}
    rows = []
    for solver, steps in WALKS:
        cells = [f"{solver}, {steps} steps"]
        for exponent in EXPONENTS:
            trial = spaced.get(f"{solver} {steps} {exponent}")
            cells.append(f"{trial['ffid']:.3f}" if trial else "–")
        rows.append(cells)
    text = "## Spacing of the steps\n\n"
    text += "F-FID of the shipped ddim with steps at t + 1 = T (i / steps)^exponent; "
    text += f"N = {trials[0]['n']:,}, seed 0: compare within this table only.\n\n"
    head = ["", *(f"exponent {exponent:g}" for exponent in EXPONENTS)]
    return text + report.as_table(head, rows)


def script_table(trials):
    """The trials of one script and length as Markdown, each beside that without its last change."""
    first = trials[0]
    everywhere = (
        ", DPM-Solver++ in 10 steps, guided everywhere" if "solver" in first["drawn"] else ""
    )
    text = f"## {first['name']}.py\n\n`{first['base']}`, "
    text += f"{first['minutes']:g} minutes on one core of {first['processor']}; "
    text += f"N = {first['n']:,}, two sampling seeds{everywhere}; "
    text += f"floor F-FID {first['floor']:.4f}.\n\n"
    head = ["change", "verdict", "/ without", "epochs", "F-FID", "/ floor"]
    head += [score.replace("_", " ") for score in SCORES[1:]]
    rows = []
    found = {}  # flags: F-FID and its spread
    for trial in trials:
        flags, ffid, spread = trial["flags"], trial["scores"]["ffid"], trial["spread"]
        without = max((other for other in found if flags.startswith(other)), key=len, default=None)
        verdict = ratio = ""
        if without is not None:
            before, spread_before = found[without]
            better = ffid < 0.95 * before and ffid + spread < before - spread_before
            taken = pairs(flags) <= pairs(TAKEN[trial["name"]])
            verdict = "taken" if taken else "better" if better else "no gain"
            ratio = f"{ffid / before:.2f}"
        cells = [f"`{flags}`" if flags else "none", verdict, ratio, f"{trial['epochs']:.1f}"]
        cells += [f"{ffid:.3f} ± {spread:.3f}", f"{ffid / trial['floor']:.0f}"]
        rows.append(cells + [f"{trial['scores'][score]:.3f}" for score in SCORES[1:]])
        found[flags] = ffid, spread
    return text + report.as_table(head, rows)


LEGEND = (
    "/ without: F-FID over that of the longest row above that the change starts with.  "
    "taken: by the script's\n"
    "defaults; no gain: not 5 % better, or not by both spreads; better: but another row is "
    "better still, or\n"
    "longer runs are not, or were not made.  Compare within a table: the machine was faster "
    "in some.\n"
)


def table(trials):
    """The figures of all trials as Markdown."""
    text = "# Recipes by trial\n\n"
    groups = {}
    for trial in trials:
        groups.setdefault((trial["name"], trial.get("minutes")), []).append(trial)
    steps = groups.pop(("steps", None), [])
    if steps:
        text += spacing_table(steps)
    return text + "".join(map(script_table, groups.values())) + LEGEND


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("names", nargs="*", metavar="NAME",
        help="trials to run: ddim, ldm, gan, vae or steps (all)")
    add("--minutes", type=float, default=5, help="minutes that each trial trains (5)")
    add("--flags", nargs="+",
        help="only the trials with these flags, those of each in quotes (all)")
    add("--table", action="store_true", help="only write the table of the trials so far (off)")
    # fmt: on
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    trials = plan(args.minutes)
    kept = read_kept()
    wanted = [t for t in trials if key(t) not in kept and t["name"] in (args.names or t["name"])]
    wanted = [] if args.table else [t for t in wanted if t["flags"] in (args.flags or [t["flags"]])]
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        trained = [trial for trial in wanted if trial["name"] != "steps"]
        jobs = [pool.submit(run_trial, trial, cores) for trial in trained]
        try:
            for job in as_completed(jobs):
                kept = keep(job.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for trial in wanted:
        if trial["name"] == "steps":
            kept = keep(try_spacing(trial))
    lengths = sorted({trial.get("minutes", args.minutes) for trial in kept.values()})
    shown = dict.fromkeys(key(trial) for minutes in lengths for trial in plan(minutes))
    text = table([kept[known] for known in shown if known in kept])
    TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
