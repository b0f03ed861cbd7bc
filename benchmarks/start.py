"""What --start saves: ddim.py on 500 pictures of a class that its first run did not see.

    python benchmarks/start.py --output results/start    half an hour on two cores

Nine classes of Fashion-MNIST are learned first, for 20 minutes on one core.  Then 500 pictures of
the tenth, ankle boots, are learned for 5 minutes, from these weights (--start) and from nothing,
and for 30 minutes from nothing.  1,000 samples of each are compared with the 1,000 test images of
the class, beside as many other training images of it.  Nothing was chosen by these.  Runs stay in
runs/start/, and a stopped one resumes: delete it to begin anew after a change of ddim.py.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import infer_onnx  # noqa: E402
from benchmarks import report, run_pinned  # noqa: E402

RUNS = ROOT / "runs/start"
TENTH = 9  # ankle boots
PICTURES = 500
SAMPLES = 1000
LINES = (  # name, minutes, run that it starts from; one core each
    (("nine classes", 20, None), ("started", 5, "nine classes"), ("from nothing", 5, None)),
    (("from nothing", 30, None),),
)
SCORES = ("ffid", "ffid2", "precision", "recall", "coverage", "copy_ratio", "copies")


def file_of(name, minutes):
    return f"{name.replace(' ', '-')}-{minutes}"


def train_line(line, core):
    """Train the runs of a line after each other on one core, and draw samples of each."""
    minutes_of = {name: minutes for name, minutes, _ in line}

    def ddim(*words):
        run_pinned(["ddim.py", *words], core, RUNS / f"core{core}.out")

    for name, minutes, start in line:
        run = RUNS / file_of(name, minutes)
        data = RUNS / ("nine.npz" if name == "nine classes" else "tenth.npz")
        samples = RUNS / f"{run.name}.npz"
        if samples.is_file():
            continue
        if any(run.glob("*.pt")):
            ddim("--resume", "--run-dir", run)
        else:
            flags = ["--minutes", minutes, "--data", data, "--run-dir", run]
            if start:
                flags += ["--start", RUNS / file_of(start, minutes_of[start])]
            ddim("--train", *flags)
        if data.name == "tenth.npz":
            ddim("--checkpoint", run, "--num-samples", SAMPLES, "--output", samples)


def write_data(images, labels, names):
    """The two .npz files: all of the nine classes, and the first pictures of the tenth."""
    others = labels != TENTH
    arrays = {"x": images[others], "y": labels[others], "class_names": names[:TENTH]}
    np.savez(RUNS / "nine.npz", **arrays)
    boots = images[~others]
    arrays = {"x": boots[:PICTURES], "y": np.zeros(PICTURES, int), "class_names": names[TENTH:]}
    np.savez(RUNS / "tenth.npz", **arrays)
    return boots


def table(results):
    text = "# A run that starts from other weights\n\n"
    text += "`python benchmarks/start.py --output results/start`, each on a core of an "
    text += f"{results['processor']}; one run\neach, N = {SAMPLES:,}.  Copies are of the "
    text += f"{PICTURES} pictures.\n\n"
    head = ["run", "minutes", "images seen", *(report.HEADINGS[name] for name in SCORES)]
    rows = []
    for row in results["rows"]:
        figures = [f"{row['scores'][name]:.3f}" for name in SCORES]
        images = f"{row['images']:,}" if row["images"] else ""
        rows.append([row["name"], str(row["minutes"] or ""), images, *figures])
    return text + report.as_table(head, rows)


def build_parser():
    parser = infer_onnx.Parser(prog="start.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--output", type=infer_onnx.file_path, required=True,
        help="folder of start.json and start.md")
    add("--data-dir", type=infer_onnx.file_path,
        help="folder of Fashion-MNIST (data/, else Debian's folder)")
    # fmt: on
    return parser


def run(args):
    """Train both lines, score them, and write both files."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(LINES):
        raise infer_onnx.InputError("it needs two cores, one for each line of runs")
    args.output.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)

    (images, labels), test = evaluate.load_real("set:fashion-mnist", args.data_dir).parts()
    extractors = [ROOT / f"pretrained/extractor{i}.onnx" for i in ("", "2")]
    loaded = [evaluate.load_extractor(file, "fashion-mnist", test, 0) for file in extractors]
    boots = write_data(images, labels, np.array(loaded[0][1]["class_names"]))
    of_class = test[0][test[1] == TENTH]
    sessions = [session for session, _ in loaded]
    reference = evaluate.make_reference(sessions, boots[:PICTURES], of_class)

    with ThreadPoolExecutor(len(LINES)) as pool:
        jobs = [pool.submit(train_line, *job) for job in zip(LINES, cores, strict=False)]
        for job in jobs:
            job.result()

    def scored(name, minutes, images, seen):
        wanted = np.full(len(images), TENTH)
        scores = evaluate.score_images(reference, images, wanted)
        scores |= evaluate.copy_scores(reference, images)
        kept = {name: scores[name] for name in SCORES}
        return {"name": name, "minutes": minutes, "images": seen, "scores": kept}

    rows = [scored("real images", None, boots[PICTURES : PICTURES + SAMPLES], None)]
    for name, minutes, _ in (run for line in LINES for run in line):
        samples = RUNS / f"{file_of(name, minutes)}.npz"
        if samples.is_file():
            log = RUNS / file_of(name, minutes) / "log.jsonl"
            seen = json.loads(log.read_text().splitlines()[-1])["images"]
            rows.append(scored(name, minutes, np.load(samples)["x"], seen))
    results = {"processor": evaluate.processor(), "rows": rows}
    report.write_text(json.dumps(results, indent=1) + "\n", args.output / "start.json")
    report.write_text(table(results), args.output / "start.md")
    print(table(results))


def main(argv=None):
    return infer_onnx.run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
