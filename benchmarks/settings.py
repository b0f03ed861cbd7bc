"""Choose how to sample: the scores of many settings of the included models, by held-out images.

    python benchmarks/settings.py --output results/settings        all of them: for a GPU
    python benchmarks/settings.py ddim --output results/settings   of these models
    python benchmarks/settings.py ddim --only "dpm++ 15 2.0 0.25:0.8" --output results/settings
    python benchmarks/settings.py --table --output results/settings    only write the table

ddim.py, ddpm.py and ldm.py draw 10,000 samples for each setting and seed, on the GPU if there is
one; evaluate.py scores them beside every sixth training image.  The included models were trained on
these, too: they serve to choose a setting, not to judge a model.  A stopped run resumes.
"""

import hashlib
import importlib
import itertools
import json
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import infer_onnx  # noqa: E402
from benchmarks import SCORES, only_table, report  # noqa: E402
from common import InputError, to_uint8  # noqa: E402
from runs import load_checkpoint, pick_device  # noqa: E402

CHECKPOINTS = {"ddim": "ddim", "ddpm": "ddim", "ldm": "ldm"}  # script: file in pretrained/
WALKS = {"ddim": (10, 15, 20, 30, 50), "dpm++": (8, 10, 12, 15, 20, 30)}  # solver: steps
GUIDANCES = {
    "ddim": (1.3, 1.6, 2.0, 2.2, 2.5), "ddpm": (1.3, 1.6, 2.0), "ldm": (1.5, 2.0, 2.5, 3.0),
}  # fmt: skip
INTERVALS = ([0, 1], [0, 0.8], [0, 0.7], [0.25, 0.8], [0.25, 0.7])
GUIDED = {"solver": "dpm++", "steps": 15}  # where guidance is tried; ddpm: in 250 steps
OLDER = {"ddim": 1.6, "ddpm": 1.6, "ldm": 2.5}  # guidance where walks are tried, below 0.8 T
GPU_BATCH = 2500


def plan(name):
    """The settings of a script, as arguments of its sample()."""
    if name == "ddpm":  # an hour each on two cores
        pairs = itertools.product(GUIDANCES[name], ([0, 0.8], [0.25, 0.8]))
        return [{"steps": 250, "guidance": w, "guidance_interval": pair} for w, pair in pairs]
    walks = [{"solver": solver, "steps": n} for solver, steps in WALKS.items() for n in steps]
    pairs = itertools.product(GUIDANCES[name], INTERVALS)
    return walks + [{**GUIDED, "guidance": w, "guidance_interval": pair} for w, pair in pairs]


def checkpoint_of(name):
    return ROOT / "pretrained" / f"{CHECKPOINTS[name]}.pt"


def full(name, setting, count):
    """A setting as it is kept: with the guidance that walks are tried with, and its weights."""
    weights = hashlib.sha256(checkpoint_of(name).read_bytes()).hexdigest()
    row = {"name": name, "guidance": OLDER[name], "guidance_interval": [0, 0.8], **setting}
    if setting.get("solver") == "dpm++":  # older rows took the steps of time_pairs
        row["pairs"] = "dpm_pairs"
    return row | {"weights": weights, "n": count}


def evaluations(row):
    """Network evaluations of an image: two for each step that is guided."""
    length = 1000  # timesteps of a walk of the included models
    start, stop = infer_onnx.guided_times(row["guidance_interval"], length)
    pairs = getattr(infer_onnx, row.get("pairs", "time_pairs"))(length, row["steps"])
    return sum(1 + infer_onnx.is_guided(row["guidance"], t, start, stop) for t, _ in pairs)


def solver_of(row):
    """The solver of a row, with its steps where they are not those of today."""
    solver = row.get("solver", "")
    return f"{solver} in time_pairs" if solver == "dpm++" and "pairs" not in row else solver


def words(row):
    """A setting as --only has it: solver, steps, guidance, its interval."""
    low, high = row["guidance_interval"]
    return f"{row.get('solver', '')} {row['steps']} {row['guidance']} {low:g}:{high:g}".strip()


def key(row):
    return json.dumps({part: row[part] for part in row if part not in ("scores", "device")})


def make_reference(args):
    """What samples are compared with, and the F-FID of real images beside it."""
    data = evaluate.load_real("set:fashion-mnist", args.data_dir)
    train, real = data.parts(hold_out=True)
    test = data.parts()[1]
    files = [ROOT / f"pretrained/extractor{i}.onnx" for i in ("", "2")]
    sessions = [evaluate.load_extractor(file, "fashion-mnist", test, 1)[0] for file in files]
    return evaluate.make_reference(sessions, None, real[0]), train[0]


def draw(row, device):
    """uint8 images (n, 1, 32, 32), the classes in turn, as those that evaluate.py scores."""
    name = row["name"]
    options = {part: row[part] for part in row if part not in ("name", "weights", "n", "pairs")}
    script = importlib.import_module(name)
    try:
        checkpoint = load_checkpoint(checkpoint_of(name), (CHECKPOINTS[name],))
    except InputError as error:
        raise infer_onnx.InputError(str(error)) from error
    model = script.ema_network(checkpoint, device)
    labels = evaluate.balanced_labels(0, row["n"])
    options["batch_size"] = 200 if device.type == "cpu" else GPU_BATCH
    return to_uint8(script.sample(model, labels, **options)).numpy()


def comparable(rows):
    """The rows that can stand in one table: of the newest weights, and of the most samples."""
    most = max(row["n"] for row in rows)
    rows = [row for row in rows if row["n"] == most]
    newest = {row["name"]: row.get("weights") for row in rows}
    return [row for row in rows if row.get("weights") == newest[row["name"]]]


def place(group):
    """Where the rows of a setting stand in the table: real images first."""
    first = group[0]
    solver, steps = first.get("solver", ""), first.get("steps", 0)
    guidance = (first.get("guidance", 0), first.get("guidance_interval", []))
    return (first["name"] != "real images", first["name"], solver, *guidance, steps)


def table(rows):
    """All scores as Markdown: means over the seeds."""
    groups = {}
    for row in rows:
        named = {k: v for k, v in row.items() if k != "seed"}
        groups.setdefault(key(named), []).append(row)
    text = "# How to sample, chosen by held-out images\n\n"
    counts = Counter(row["device"] for row in rows)
    devices = " and ".join(f"{device} ({count} samplings)" for device, count in counts.items())
    text += "Some or all settings (`--only`) of `python benchmarks/settings.py --output "
    text += f"results/settings`, on\n{devices}.\n"
    text += f"N = {rows[-1]['n']:,}; ±: over sampling seeds.  The reference is every "
    text += "sixth training image, which the\nmodels have seen: they are the included ones.\n\n"
    head = ["model", "solver", "steps", "guidance", "interval", "evaluations", "seeds"]
    head += [report.HEADINGS[name] for name in SCORES]
    cells = []
    for group in sorted(groups.values(), key=place):
        first = group[0]
        means = {}
        for name in SCORES:  # real images are of no requested class
            values = [row["scores"][name] for row in group if row["scores"][name] is not None]
            means[name] = f"{np.mean(values):.3f}" if values else "–"
        spread = np.std([row["scores"]["ffid"] for row in group], ddof=1) if group[1:] else None
        low, high = first.get("guidance_interval", ("", ""))
        line = [first["name"], solver_of(first), first.get("steps", "")]
        line += [first.get("guidance", ""), f"{low}:{high}".strip(":")]
        line += [evaluations(first) if "steps" in first else "", len(group)]
        ffid = np.mean([row["scores"]["ffid"] for row in group])
        line += [f"{ffid:.4f}" + (f" ± {spread:.4f}" if spread else "")]
        cells.append([str(cell) for cell in line] + [means[name] for name in SCORES[1:]])
    return text + report.as_table(head, cells)


def write_diagram(rows, path):
    """F-FID against the number of network evaluations: both solvers."""
    curves = {}
    for row in rows:
        name = row["name"]
        walk = {"guidance": OLDER.get(name), "guidance_interval": [0, 0.8], "seed": 0}
        if "solver" in row and walk.items() <= row.items():
            point = (evaluations(row), row["scores"]["ffid"], f"{row['steps']} steps")
            curves.setdefault(f"{name}, {solver_of(row)}", []).append(point)
    floor = np.mean([row["scores"]["ffid"] for row in rows if row["name"] == "real images"])
    report.plot_curves(path, "network evaluations per image", curves, floor)


def write(rows, folder):
    rows = comparable(rows)
    report.write_text(table(rows), folder / "settings.md")
    write_diagram(rows, folder / "settings.png")


def build_parser():
    parser = infer_onnx.Parser(prog="settings.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("names", nargs="*", metavar="NAME", help="ddim, ddpm or ldm (all)")
    add("--output", type=infer_onnx.file_path, required=True,
        help="folder of settings.json and settings.md")
    add("--num-samples", type=infer_onnx.number(int, 100, 50_000), default=10_000,
        help="samples of each setting and seed, 100 to 50,000 (10000); rows of fewer than others "
             "are in no table")
    add("--only", nargs="+", metavar="SETTING",
        help="only these, each in quotes: solver, steps, guidance, LOW:HIGH (all)")
    add("--seeds", type=infer_onnx.number(int, 1), default=3,
        help="sampling seeds of each setting (3)")
    add("--data-dir", type=infer_onnx.file_path,
        help="folder of Fashion-MNIST (data/, else Debian's folder)")
    add("--table", action="store_true", help="only write the table of settings.json (off)")
    # fmt: on
    return parser


def run(args):
    """Draw and score what is not done yet, and write the table and the diagram."""
    count = args.num_samples
    names = args.names or CHECKPOINTS
    for name in set(names) - set(CHECKPOINTS):
        raise infer_onnx.InputError(f"no settings of {name!r}: right is {', '.join(CHECKPOINTS)}")
    rows = [full(name, setting, count) for name in names for setting in plan(name)]
    for setting in set(args.only or ()) - {words(row) for row in rows}:
        right = ", ".join(map(words, rows))
        raise infer_onnx.InputError(f"--only {setting!r}: right is one of {right}")
    wanted = {key(row): row for row in rows if words(row) in (args.only or [words(row)])}
    file = args.output / "settings.json"
    kept = {key(row): row for row in json.loads(file.read_text())} if file.is_file() else {}
    if only_table(build_parser(), args):
        if not kept:
            raise infer_onnx.InputError(f"--table: there is no {file}")
        write([*kept.values()], args.output)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto")
    reference, train = make_reference(args)
    what = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    about = {"device": f"{what}, torch {torch.__version__}"}

    lock = threading.Lock()

    def score(row, images):
        labels = None
        if row["name"] != "real images":
            labels = np.array(evaluate.balanced_labels(0, len(images)))
        scores = evaluate.score_images(reference, images, labels)
        print(f"{scores['ffid']:.4f} {scores['ffid2']:.4f} {key(row)}", flush=True)
        with lock, infer_onnx.written_whole(file) as scratch:
            kept[key(row)] = row | about | {"scores": {name: scores.get(name) for name in SCORES}}
            scratch.write_text(json.dumps([*kept.values()], indent=1) + "\n")

    # The device draws while other cores score what it has drawn.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        jobs = []
        for part in range(min(len(train) // count, 5)):
            row = {"name": "real images", "seed": part, "n": count}
            images = train[part * count : (part + 1) * count]
            if key(row) not in kept:
                jobs.append(pool.submit(score, row, images))
        for seed in range(args.seeds):
            for setting in wanted.values():
                row = setting | {"seed": seed}
                if key(row) in kept:
                    continue
                jobs.append(pool.submit(score, row, draw(row, device)))
                for job in jobs:
                    if job.done():
                        job.result()  # or its error, before hours of drawing
        for job in jobs:
            job.result()
    write([*kept.values()], args.output)


def main(argv=None):
    return infer_onnx.run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
