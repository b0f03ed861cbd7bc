"""Recipes by trial: train variants of the scripts for the same time and score their samples.

    python benchmarks/trials.py              all trials not done yet, then results/trials.md
    python benchmarks/trials.py ddim steps   those of ddim.py, and spacings of the sampling steps
    python benchmarks/trials.py distill      students of the included ddim
    python benchmarks/trials.py spread       the others three times, with other training seeds
    python benchmarks/trials.py --table      only write the table of the trials so far

A trial is a script with its defaults and the flags of the trial, trained for --minutes on one core
with --hold-out, and scored on what was held out; as many trials run at once as there are cores.
Only students learn from a model that has seen the held-out images, the included ddim.
Few minutes favour what learns fast: a verdict holds for runs of this length.  Two runs that differ
in the seed of training alone differ, too: `spread` measures by how much, and a verdict has to lie
beyond that.  Runs and samples stay in runs/trials/, so that a stopped trial resumes; the scores of
all trials are kept in results/trials.json.  A trial is known by its flags: after a default of a
script has changed, name the old one in the flags of these rows, and delete runs/trials/.
"""

import hashlib
import json
import os
import queue
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import infer_onnx
from benchmarks import SCORES, only_table, report, run_pinned

ROOT = Path(__file__).resolve().parent.parent
RUNS, KEPT, TABLE = ROOT / "runs/trials", ROOT / "results/trials.json", ROOT / "results/trials.md"

SEEDS = (0, 1, 2)  # of training, of runs for the spread
SEED_FLAGS = ("", *(f"--seed {seed}" for seed in SEEDS[1:]))
# The changes that became defaults of the scripts.
TAKEN = {
    "ddim": "--optimizer muon --batch-size 64 --lr 5e-3",
    "ldm": "--optimizer muon",
    "gan": "--penalty-every 8 --loss nonsaturating",
    "vae": "--latent-dim 64 --kl-weight 0.3",
    "distill": "--feature-weight 1.5",
}
# Changes to the defaults.  results/trials.json has older ones, of other defaults.
TRIALS = {
    "ddim": ["", "--no-attention", "--no-attention --widths 48,96"],
    "ldm": ["", "--latent-channels 4"],
    "gan": ["", "--gamma 0.3"],
    "vae": ["", "--latent-dim 128 --prior-components 5"],
    "distill": [
        *SEED_FLAGS, "--steps 1", "--steps 2", "--steps 8", "--feature-weight 0", "--loss huber",
        "--teacher-steps 20", "--passes 1", "--passes 16",
    ],
}  # fmt: skip
TAUGHT = "--teacher pretrained/ddim.pt"
EPOCHS = {"ddim": 6, "ldm": 7, "gan": 4, "vae": 9}  # of the runs for the spread: ten minutes
UNIFORM, LOGNORMAL = "--noise-levels uniform", "--noise-levels lognormal"
SEEDED = {  # changes tried with the seeds
    "ddim": [UNIFORM, f"{UNIFORM} --prediction eps", "--ema-length 0.04", "--ema-length 0.16"],
    "ldm": [LOGNORMAL, f"{LOGNORMAL} --latent-channels 4"],
    "gan": ["--loss hinge", "--gamma 0.1", "--gamma 0.01", "--gamma 3"],
    "vae": ["--latent-dim 128 --prior-components 5"],
}
# How samples are made for the scores.  Guidance is named, so that rows can be compared when the
# defaults of the scripts change.
DRAWN = dict.fromkeys(("gan", "vae"), "--hold-out --num-samples 10000")
WALK = "--hold-out --num-samples 5000 --solver dpm++ --steps 15 --guidance"
DRAWN |= {"ddim": f"{WALK} 2.2 --guidance-interval 0.25:0.7"}
DRAWN |= {"ldm": f"{WALK} 2.5 --guidance-interval 0.25:0.8"}
DRAWN |= {"distill": "--hold-out --num-samples 5000"}
SPACINGS = ("1", "1.3", "2", "dpm_pairs")  # of steps: exponents, or that function
SPACED = "--hold-out --num-samples 2500"  # where they are tried
WALKS = (("ddim", 20), ("dpm++", 15))  # solver, steps


def plan(minutes):
    """All trials with the keys of results/trials.json; two are the same if all of these agree."""
    trials = []
    model = hashlib.sha256((ROOT / "pretrained/ddim.onnx").read_bytes()).hexdigest()
    for name in TRIALS:
        drawn = {"name": name, "drawn": DRAWN[name]}
        if name == "distill":
            students = {**drawn, "base": TAUGHT, "minutes": minutes, "model": model}
            trials += [{**students, "flags": flags} for flags in TRIALS[name]]
            continue
        base = "--hold-out"
        trials += [
            {**drawn, "base": base, "flags": flags, "minutes": minutes} for flags in TRIALS[name]
        ]
        base = f"--hold-out --epochs {EPOCHS[name]}"
        trials += [
            {**drawn, "base": base, "flags": f"{flags} --seed {seed}".strip()}
            for flags in ("", *SEEDED.get(name, ()))
            for seed in SEEDS
        ]
    return trials + [
        {"name": "steps", "flags": f"{solver} {steps} {way}", "drawn": SPACED, "model": model}
        for solver, steps in WALKS
        for way in SPACINGS
    ]


def is_of(trial, name):
    """Whether a name on the command line means this trial."""
    if name == "spread":
        return trial["name"] != "steps" and "minutes" not in trial
    return trial["name"] == name


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
    recipe = f"{trial['base']} {trial['flags']}"
    if "minutes" in trial:
        recipe += f" --minutes {trial['minutes']:g}"
    digest = hashlib.sha256((recipe + trial.get("model", "")).encode()).hexdigest()[:8]
    place = RUNS / "-".join([name, digest, *(flag.lstrip("-").replace(",", ".") for flag in flags)])

    def command(*words):
        run_pinned(words, core, RUNS / f"{place.name}.out")

    try:
        onnx = place / f"{name}.onnx"
        if not onnx.is_file():
            start = ["--train", *recipe.split()]
            if any(place.glob("*.pt")):
                start = ["--resume"]
            command(f"{name}.py", *start, "--run-dir", place)
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


def try_spacing(trial):
    """F-FID of the included ddim with steps at t + 1 = T * (i / steps)^exponent, or of dpm_pairs.

    Its samples, of seed 0, are compared with held-out images, which its training has seen.
    """
    solver, steps, way = trial["flags"].split()
    count = int(SPACED.split()[-1])

    def powers(num_timesteps, steps):
        ends = [(i, num_timesteps * (i / steps) ** float(way)) for i in range(steps, 0, -1)]
        times = [max(int(end + 0.5), i) - 1 for i, end in ends]
        return list(zip(times, [*times[1:], -1], strict=True))

    pairs_of = infer_onnx.dpm_pairs if way == "dpm_pairs" else powers
    model = infer_onnx.load_model(ROOT / "pretrained/ddim.onnx")
    data = evaluate.load_real("set:fashion-mnist", None)
    _, held_out = data.parts(hold_out=True)
    _, test = data.parts()
    extractor = ROOT / "pretrained/extractor.onnx"
    session, _ = evaluate.load_extractor(extractor, "fashion-mnist", test, 0)
    real = evaluate.extract(session, held_out[0])[0]
    labels = evaluate.balanced_labels(0, count)
    with mock.patch.multiple(infer_onnx, time_pairs=pairs_of, dpm_pairs=pairs_of):
        images = infer_onnx.sample(model, labels, steps=int(steps), solver=solver)
    fake = evaluate.extract(session, images)[0]
    ffid = evaluate.frechet_distance(*evaluate.moments(real), *evaluate.moments(fake))
    return trial | {"n": count, "ffid": ffid}


def spacing_table(trials):
    """The F-FID of each spacing of the steps, as Markdown."""
    trials = [trial for trial in trials if trial["model"] == trials[-1]["model"]]
    spaced = {trial["flags"]: trial for trial in trials if trial.get("drawn") == SPACED}
    rows = []
    for solver, steps in WALKS:
        cells = [f"{solver}, {steps} steps"]
        for way in SPACINGS:
            trial = spaced.get(f"{solver} {steps} {way}")
            cells.append(f"{trial['ffid']:.3f}" if trial else "–")
        rows.append(cells)
    text = "## Spacing of the steps\n\n"
    text += "F-FID of the included ddim with steps at t + 1 = T (i / steps)^exponent, or of "
    text += f"`dpm_pairs`; `{SPACED}`, seed 0: compare within this table only.\n\n"
    head = ["", *("dpm_pairs" if "_" in way else f"exponent {way}" for way in SPACINGS)]
    return text + report.as_table(head, rows)


def seeded_runs(trials):
    """{(script, samples, flags): its runs that differ in the seed of training alone, by the seed}.

    Runs whose samples were drawn alike follow each other.
    """
    runs = {(t["name"], t["drawn"], t["flags"]): t for t in trials if is_of(t, "spread")}
    found = {}
    for name, drawn in dict.fromkeys(which[:2] for which in runs):
        for flags in ("", *SEEDED.get(name, ())):
            names = {seed: (name, drawn, f"{flags} --seed {seed}".strip()) for seed in SEEDS}
            group = {seed: runs[which] for seed, which in names.items() if which in runs}
            if group:
                found[name, drawn, flags] = group
    return found


def spread_of(trials):
    """(mean F-FID of trials, its standard deviation over that mean), or None: one is missing.

    trials: those that differ in the seed of training alone, one for each of SEEDS.
    """
    if len(trials) < len(SEEDS):
        return None
    ffids = [trial["scores"]["ffid"] for trial in trials]
    mean, spread = np.mean(ffids), np.std(ffids, ddof=1)
    return float(mean), float(spread / mean)


def training_spreads(trials):
    """{(script, flags): spread_of its runs with other seeds, as they were sampled first}."""
    found = {}
    for (name, _, flags), runs in seeded_runs(trials).items():
        if spread := spread_of(runs.values()):
            found.setdefault((name, flags), spread)
    return found


def spread_table(trials):
    """F-FID of runs that differ in the seed of training alone, and the spreads, as Markdown."""
    text = "## Spread over training seeds\n\n"
    text += "Runs that differ in `--seed` alone.  Over sampling seeds: two of each run; "
    text += "this and the columns\nbehind it are means of the runs.\n\n"
    head = ["script", "training", "samples", *(f"F-FID, seed {seed}" for seed in SEEDS)]
    head += ["mean", "spread over training seeds", "over sampling seeds"]
    behind = ("ffid2", "recall", "label_accuracy")
    head += [report.HEADINGS[score] for score in behind]
    rows = []
    for (name, drawn, flags), runs in seeded_runs(trials).items():
        base = f"{runs[min(runs)]['base']} {flags}".strip()
        cells = [f"{name}.py", f"`{base}`", f"`{drawn}`"]
        cells += [f"{runs[s]['scores']['ffid']:.3f}" if s in runs else "–" for s in SEEDS]
        spread = spread_of(runs.values())
        cells += [f"{spread[0]:.3f}", f"{spread[1]:.1%}"] if spread else ["–", "–"]
        sampling = np.mean([run["spread"] / run["scores"]["ffid"] for run in runs.values()])
        means = [np.mean([run["scores"][score] for run in runs.values()]) for score in behind]
        rows.append([*cells, f"{sampling:.1%}", *(f"{mean:.3f}" for mean in means)])
    return text + report.as_table(head, rows)


def script_table(trials, spreads):
    """The trials of one script and length as Markdown, each beside that without its last change.

    spreads: of training_spreads.
    """
    first = trials[0]
    held_out = "--hold-out" in first["drawn"]
    of_then = (first["name"], UNIFORM)
    defaults = UNIFORM if not held_out and of_then in spreads else ""  # of the time of these trials
    seeded = [trial for trial in trials if trial["flags"] in SEED_FLAGS]
    known = spread_of(seeded) or spreads.get((first["name"], defaults))
    text = f"## {first['name']}.py{'' if held_out else ', earlier'}\n\n`{first['base']}`, "
    text += f"{first['minutes']:g} minutes on one core of {first['processor']}; "
    text += f"`{first['drawn']}`, two sampling seeds; floor F-FID {first['floor']:.4f}.\n\n"
    head = ["change", "default", "verdict", "/ without", "epochs", "F-FID", "excess"]
    head += [report.HEADINGS[score] for score in SCORES[1:]]
    rows = []
    ffids = {trial["flags"]: trial["scores"]["ffid"] for trial in trials}
    for trial in trials:
        flags, ffid, spread = trial["flags"], trial["scores"]["ffid"], trial["spread"]
        shorter = [other for other in ffids if f"{flags} ".startswith(f"{other} ".lstrip())]
        shorter.remove(flags)
        without = max(shorter, key=len, default=None)
        verdict = ratio = taken = ""
        if without is not None:
            ratio = ffid / ffids[without]
            taken = "yes" if pairs(flags) <= pairs(TAKEN[trial["name"]]) else ""
            verdict = "" if trial in seeded else verdict_of(ratio, known)
            ratio = f"{ratio:.2f}"
        cells = [f"`{flags}`" if flags else "none", taken, verdict, ratio]
        cells += [f"{trial['epochs']:.1f}", f"{ffid:.3f} ± {spread:.3f}"]
        cells += [f"{ffid - trial['floor']:.3f}"]
        rows.append(cells + [f"{trial['scores'][score]:.3f}" for score in SCORES[1:]])
    return text + report.as_table(head, rows)


def verdict_of(ratio, spread):
    """Better, worse or open: whether a ratio of two runs lies beyond what other seeds do to it.

    spread: (mean, relative standard deviation of one run), or None if it was not measured.  The
    ratio of two such runs varies sqrt(2) times as much, and the limit is twice that.
    """
    if spread is None:
        return "open"
    limit = 2 * 2**0.5 * spread[1]
    return "better" if ratio < 1 - limit else "worse" if ratio > 1 + limit else "open"


LEGEND = """\
floor: F-FID of real images; excess: F-FID less the floor.  / without: F-FID over that of the
longest row that the change starts with.  default: what the scripts do today.  better, worse: by
more than 2 sqrt(2) times the spread over training seeds, for distill that of the table's own rows;
open: within that, one run of each cannot tell, or the spread was not measured.  ±: over sampling
seeds.  Earlier trials trained on all images and were chosen by the test images.  A student of
distill learns from the included ddim, which has seen the held-out images.  Compare within a table:
the machine was faster in some.  Samples in 10 steps took those of time_pairs, before dpm_pairs.
"""


def table(trials):
    """The figures of all trials as Markdown."""
    text = "# Recipes by trial\n\n"
    spreads = training_spreads(trials)
    groups = {}  # of trials for so many minutes
    for trial in trials:
        if "minutes" in trial:
            which = (*map(trial.get, ("name", "minutes", "model")), "--hold-out" in trial["drawn"])
            groups.setdefault(which, []).append(trial)
    steps = [trial for trial in trials if is_of(trial, "steps")]
    if steps:
        text += spacing_table(steps)
    if spreads:
        text += spread_table([trial for trial in trials if is_of(trial, "spread")])
    return text + "".join(script_table(group, spreads) for group in groups.values()) + LEGEND


def build_parser():
    parser = infer_onnx.Parser(prog="trials.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("names", nargs="*", metavar="NAME",
        help="trials to run: ddim, ldm, gan, vae, distill, steps or spread (all)")
    add("--minutes", type=infer_onnx.number(float, 0, above=True), default=25,
        help="minutes that each trial trains (25)")
    add("--flags", nargs="+",
        help="only the trials with these flags, those of each in quotes (all)")
    add("--table", action="store_true", help="only write the table of the trials so far (off)")
    # fmt: on
    return parser


def run(args):
    """Do the trials that are asked for and not done yet, and write the table of all."""
    only_table(build_parser(), args)
    RUNS.mkdir(parents=True, exist_ok=True)
    trials = plan(args.minutes)
    kept = read_kept()
    names = args.names or [*TRIALS, "steps"]
    flags = args.flags or [trial["flags"] for trial in trials]
    for name in {*names} - {*TRIALS, "steps", "spread"}:
        right = ", ".join([*TRIALS, "steps", "spread"])
        raise infer_onnx.InputError(f"no trials {name!r}: right is one of {right}")
    for given in {*flags} - {trial["flags"] for trial in trials}:
        raise infer_onnx.InputError(f"--flags {given!r} are those of no trial")
    wanted = [t for t in trials if key(t) not in kept and any(is_of(t, name) for name in names)]
    wanted = [] if args.table else [trial for trial in wanted if trial["flags"] in flags]
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
    text = table([*kept.values()])
    report.write_text(text, TABLE)
    print(text)


def main(argv=None):
    return infer_onnx.run_command(build_parser(), run, argv, "stopped; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
