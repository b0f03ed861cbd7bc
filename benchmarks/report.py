"""Show results.json, which evaluate.py writes: a table in Markdown and diagrams.

    python benchmarks/report.py                  write results/table.md and the diagrams there anew
    python benchmarks/report.py runs/steps       those of another folder
    python benchmarks/report.py --pages          the tables in README.md and results/README.md

Nothing is sampled or scored. Diagrams need matplotlib.
"""

import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import FEW, FLOOR_PARTS, QUERIES
from infer_onnx import (
    Parser, file_path, fold, one_line, to_picture, with_names, written_whole,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
DIAGRAMS = ("quality_latency.png", "steps.png", "classes.png")  # of plot_results
MOST = 20  # classes in a table, a diagram or a picture; others are left out
# Columns of the table: (name of the score, heading, format).
SCORES = (
    ("ffid", "F-FID", ".3g"),
    ("ffid_infinity", "F-FID, N → ∞", ".3g"),
    ("ffid2", "F-FID, second extractor", ".3g"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("density", "density", ".3f"),
    ("coverage", "coverage", ".3f"),
    ("label_accuracy", "label accuracy", ".3f"),
    ("copy_ratio", "copy ratio", ".3f"),
    ("copies", "copies", ".3f"),
    ("cas", "CAS", ".3f"),
)
HEADINGS = {name: heading for name, heading, _ in SCORES}

# --- Table ----------------------------------------------------------------------------------------


def score_cells(row, floor):
    """Title, N, seeds, F-FID less the floor's; each score, and its spread over several seeds."""
    cells = []
    for name, _, digits in SCORES:
        score = row["scores"].get(name)
        spread = f" ± {score['spread']:{digits}}" if score and score["spread"] else ""
        cells.append(f"{score['mean']:{digits}}{spread}" if score else "–")
    count = f"{row['n']:,}{' (!)' if row['marked'] else ''}"
    excess = row["scores"]["ffid"]["mean"] - floor["scores"]["ffid"]["mean"]
    return [row["title"], count, str(row["seeds"]), f"{excess:.3g}" if excess else "–", *cells]


def cost_cells(row):
    """Title of a row, and what the model costs."""
    times = row["latency"]
    best = f"{times['batch'][times['best']]:.2f} ({times['best']})" if times else "–"
    one = f"{times['batch']['1']:.2f}" if times else "–"
    parameters = f"{row['parameters']:,}"
    megabytes = f"{row['bytes'] / 1e6:.2f}"
    minutes = f"{row['training_minutes']:.0f}"
    return [row["title"], str(row["evaluations"]), one, best, parameters, megabytes, minutes]


def as_table(head, lines):
    """A Markdown table of cells that are text already."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n\n"


def overview(*several):
    """README's table: the first floor and the rows of several results.json; times at batch 1.

    A model that an earlier file has is left out of a later one; one with a single row has no
    settings beside its name.
    """
    head = ["model", "F-FID", "recall", "label accuracy", "network evaluations", "ms / image"]
    rows = [several[0]["floor"]]
    for results in several:
        earlier = {row["file"] for row in rows[1:]}
        rows += [row for row in results["rows"] if row["file"] not in earlier]
    counts = Counter(row.get("model") for row in rows)
    lines = []
    for row in rows:
        ffid, recall, accuracy = (
            row["scores"][name]["mean"] for name in ("ffid", "recall", "label_accuracy")
        )
        name = row["title"] if row is rows[0] or counts[row["model"]] > 1 else row["model"]
        cells = [name, f"{ffid:.3g}", f"{recall:.3f}", f"{accuracy:.3f}"]
        if row is rows[0]:
            cells += ["–", "–", "–"]
        else:
            one = f"{row['latency']['batch']['1']:.1f}" if row["latency"] else "–"
            cells += [str(row["evaluations"]), one, f"{row['training_minutes']:.0f}"]
        lines.append(cells)
    return as_table([*head, "training minutes"], lines)


def disagreements(rows):
    """Pairs of rows whose order by F-FID the second extractor reverses: "BETTER before WORSE"."""
    pairs = []
    for pair in itertools.combinations(rows, 2):
        better, worse = sorted(pair, key=lambda row: row["scores"]["ffid"]["mean"])
        gain, gain2 = (
            worse["scores"][name]["mean"] - better["scores"][name]["mean"]
            for name in ("ffid", "ffid2")
        )
        if gain > 0 > gain2:
            pairs.append(f"{better['title']} before {worse['title']}")
    return pairs


def scores_of(results):
    """The scores of each row beside the floor, and what the two extractors disagree on."""
    floor, rows = results["floor"], results["rows"]
    head = ["model", "N", "seeds", "excess F-FID", *(heading for _, heading, _ in SCORES)]
    text = as_table(head, [score_cells(row, floor) for row in (floor, *rows)])
    if len(results["extractors"]) > 1 and len(rows) > 1:
        pairs = disagreements(rows)
        listed = f": by the first, {'; '.join(pairs)}" if pairs else ""
        count = f"{len(pairs)} of {math.comb(len(rows), 2)} pairs"
        text += f"The extractors disagree on the order of {count}{listed}.\n\n"
    return text


def classes_of(results):
    """Label accuracy of each class, where classes were requested."""
    lines = []
    for row in results["rows"]:
        by_class = row["scores"].get("accuracy_by_class", ())
        if 0 < len(by_class) <= MOST:
            cells = ["–" if accuracy is None else f"{accuracy:.2f}" for accuracy in by_class]
            lines.append([row["title"], *cells])
    return as_table(["model", *results["extractors"][0]["class_names"]], lines) if lines else ""


def cost_of(results):
    """What each model costs."""
    head = ["model", "network evaluations", "ms / image, batch 1"]
    head += ["ms / image, best batch (its size)", "parameters", "MB", "training minutes"]
    return as_table(head, [cost_cells(row) for row in results["rows"]])


def table(results):
    """What results.json holds, as Markdown."""
    protocol, machine = results["protocol"], results["machine"]
    hold_out = protocol.get("hold_out")  # older results have none
    real = "held-out training" if hold_out else "test"
    text = f"# Samples against {protocol['reference']:,} {real} images of {protocol['data']}\n\n"
    text += scores_of(results)
    if by_class := classes_of(results):
        text += f"Label accuracy by class:\n\n{by_class}"
    text += cost_of(results)
    cores, threads = machine["cores"], machine["threads"] or machine["cores"]
    text += f"On {machine['processor']}, {cores} cores, {threads} thread{'s' * (threads > 1)}, "
    text += f"{machine['provider']}, onnxruntime {machine['onnxruntime']}"
    if any(row.get("latency") for row in results["rows"]):
        text += "; times: medians, which move with the machine's load"
    text += ".\n\n"
    for which, card in enumerate(results["extractors"], 1):
        least = card.get("least_accuracy", 0.93)
        is_weak = card["accuracy"] < least
        weak = f" (!) below {100 * least:.0f} %, too weak to judge" if is_weak else ""
        text += f"- Extractor {which}: {card['file']}, {card['architecture']}; test accuracy "
        text += f"{card['accuracy']:.2%}{weak}; SHA-256 `{card['sha256']}`.\n"
    if hold_out and protocol.get("has_test", True):
        text += HELD_OUT
    if not protocol.get("balanced", True):
        text += OWN_DATA
    means = "{0} x {0}".format(protocol.get("block", 2))
    limits = {"few": FEW, "most": QUERIES, "parts": FLOOR_PARTS}
    return text + NOTES.format(real=real, means=means, **limits, **protocol)


PARTS = {"scores": scores_of, "cost": cost_of, "overview": overview}


def filled(page, root):
    """The text of a page, with what stands between its marks written anew.

    A mark is <!-- PART of FOLDER ... -->, the name of a part and the folders of results.json from
    `root`; it holds up to the next <!-- end -->.
    """

    def part(mark):
        folders = mark["folders"].split()
        results = [json.loads((root / folder / "results.json").read_text()) for folder in folders]
        return f"{mark['start']}\n{PARTS[mark['part']](*results)}<!-- end -->"

    start = r"(?P<start><!-- (?P<part>\w+) of (?P<folders>[\w/ ]+) -->)"
    return re.sub(rf"{start}\n.*?<!-- end -->", part, page, flags=re.DOTALL)


HELD_OUT = """\
- To choose by: real images are every sixth training image, so that the test images have no say in
  the choice. Models that were not trained with --hold-out have seen them, and so have both
  extractors: compare within this table only.
"""
OWN_DATA = """\
- Samples have classes as often as the training images. Where the data have no test images, every
  sixth image is held out, as training with --hold-out and that of the extractors leave it out.
- An extractor knows a small training set by heart: these images, of which the floor is made, are
  then further from the test images than they were, and a good model's scores may be better.
"""
NOTES = """\
- F-FID: Frechet distance in the first extractor's features of {data}; not comparable with a
  published FID. It falls as N grows, and so does its floor; excess F-FID is what lies between.
  N → ∞: the extrapolation of Chong & Forsyth 2020 (arXiv:1911.07023), from parts of the samples; of
  real images it leaves what the {reference:,} {real} images still lack.
- ±: standard deviation over the sampling seeds of one trained model, of which another training seed
  gives another (results/trials.md has the spread over those, of fashion-mnist). For real images:
  over disjoint parts of the training images, at most {parts}.
- (!): fewer than {few:,} samples, or not as many as the {reference:,} {real} images. With fewer
  samples both F-FIDs grow, coverage falls, and the others move a little: compare within this table
  only, and with its floor.
- real images: the floor, as many training images scored in place of samples. Its label accuracy is
  that of test images, its copy ratio and copies those of {real} images, since the extractor was
  trained on the training images, and each of them is its own nearest neighbour.
- Precision, recall, density, coverage: k = {k}, all against all.
- Label accuracy: fraction of samples that the extractor classifies as the requested class.
- Copy ratio: median over up to {most:,} samples, or {queries:,} real images, of the distance to the
  nearest of {train:,} training images over that to the nearest of {others:,} {real} images, in
  means of {means} pixels whose brightness and contrast are made equal; of a sample, its mirror
  image, and both moved by a pixel to any side, the nearest counts. Copies: fraction of them with a
  ratio that only 1 % of real images fall below, those apart that are training images, too. A copy
  ratio far below that of real images, or copies far above 0.01, show that training images are
  reproduced, also if they are moved by a pixel, mirrored, brighter, or a little blurred; stronger
  changes stay unseen. –: too few {real} images to tell.
- Network evaluations: per image. A guided step takes two; steps are guided at t in the guidance
  interval, fractions of T, which is the model's unless the row names another. A row of ddim or ldm
  that names no solver is of DDIM.
- CAS (Ravuri & Vinyals 2019, arXiv:1905.10887): accuracy on the {real} images of a classifier
  trained on {train:,} samples; for real images, of the same classifier trained on the training
  images.
"""

# --- Pictures of samples --------------------------------------------------------------------------


def write_picture(picture, path):
    """Write a PNG, whole or not at all.  picture: of Pillow or matplotlib."""
    save = picture.save if isinstance(picture, Image.Image) else picture.savefig
    with written_whole(path) as scratch:
        save(scratch, format="png")


def write_text(text, path):
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")


def stem_of(title):
    """A title as part of a file's name; of a long one a sum of it, and its end."""
    folded = fold(title)
    if len(folded.encode()) > 150:
        return f"{hashlib.sha256(title.encode()).hexdigest()[:8]}_{folded[-40:]}"
    return folded


def write_samples(folder, title, images, neighbours, class_names, labels):
    """Two pictures of samples: ten of each class, and each above the nearest training image.

    images: uint8 (N, C, H, W);  neighbours: uint8 (M, C, H, W), the nearest training images of the
    first M, a multiple of ten;  labels: (N,).
    """
    rows = []
    for y in range(min(len(class_names), MOST)):
        ten = images[labels == y][:10]  # of a rare class there are fewer
        rows += [ten, np.full((10 - len(ten), *images.shape[1:]), 255, np.uint8)]
    grid = to_picture(np.concatenate(rows), 10)
    write_picture(with_names(grid, class_names[:MOST]), folder / f"samples_{stem_of(title)}.png")
    both = images[: len(neighbours)], neighbours
    inner = [array[:, :, 2:-2, 2:-2] for array in both]
    shape = inner[0].shape[1:]
    tiles = np.stack([array.reshape(-1, 10, *shape) for array in inner], axis=1).reshape(-1, *shape)
    grid = with_names(to_picture(tiles, 10), ["sample", "nearest real"] * (len(tiles) // 20))
    write_picture(grid, folder / f"nearest_{stem_of(title)}.png")


def write_side_by_side(path, rows):
    """Ten samples of each setting in a row: rows {name: uint8 (10, C, H, W)}."""
    grid = to_picture(np.concatenate([*rows.values()]), 10)
    write_picture(with_names(grid, [*rows]), path)


# --- Diagrams -------------------------------------------------------------------------------------


def new_diagram(title, x_label="", y_label=""):
    """A matplotlib figure of 1030 x 560 pixels and its axes, made without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure((10.3, 5.6), dpi=100, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label, axisbelow=True)
    axes.grid(color="#eeeeee")
    return figure, axes


def legend_text(name):
    """A name as matplotlib shows it as it is: it hides those after a _, and sets $...$ as maths."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")


def write_diagram(figure, path):
    figure.legend(loc="outside right upper")
    write_picture(figure, path)


def plot_curves(path, x_label, curves, floor):
    """F-FID over a quantity, both logarithmic: curves {name: [(x, F-FID, text beside it), ...]}."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = new_diagram("quality of samples", x_label, "F-FID (lower is better)")
    axes.set(xscale="log", yscale="log", xmargin=0.1, ymargin=0.1)
    for name, points in curves.items():
        xs, ys, texts = zip(*sorted(points), strict=True)
        [line] = axes.plot(xs, ys, "o-", label=legend_text(name))
        for x, y, text in zip(xs, ys, texts, strict=True):
            above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(text, (x, y), color=line.get_color(), **above)
    axes.axhline(floor, color="grey", label="real images")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    write_diagram(figure, path)


def plot_classes(path, rows, class_names, balanced=True):
    """Fraction of each class in the samples, as the extractor sees them; rows {name: fractions}."""
    figure, axes = new_diagram("classes of the samples", y_label="fraction of samples")
    width = 0.84 / len(rows)
    for i, (name, fractions) in enumerate(rows.items()):
        places = np.arange(len(class_names)) + (i + 0.5) * width - 0.42
        axes.bar(places, fractions, width, label=legend_text(name))
    if balanced:
        axes.axhline(1 / len(class_names), color="black", linewidth=1, label="balanced")
    ticks = range(len(class_names))
    axes.set_xticks(
        ticks, [*map(legend_text, class_names)], rotation=30, ha="right", rotation_mode="anchor"
    )
    write_diagram(figure, path)


def plot_map(path, title, real, samples, labels, class_names):
    """Points in the plane: real, grey, and samples, by class.  Both (N, 2);  labels: (N,)."""
    figure, axes = new_diagram(legend_text(title))
    axes.scatter(*real.T, s=14, color="#cccccc", label="real images")
    for y, name in enumerate(class_names[:MOST]):
        colour = f"C{y % 10}" if y % 10 != 7 else "black"  # C7 is grey
        axes.scatter(*samples[labels == y].T, s=14, color=colour, label=legend_text(name))
    write_diagram(figure, path)


def write_tsne(folder, title, real, samples, class_names, labels):
    """A map of features, fitted to real and samples together.  A picture, not a score.

    labels: of the samples, as in write_samples.
    """
    from sklearn.manifold import TSNE

    both = np.concatenate([real, samples])
    perplexity = min(30, len(both) / 4)
    points = TSNE(random_state=0, perplexity=perplexity).fit_transform(both)
    heading = f"t-SNE of {len(real):,} real images and {len(samples):,} samples: {title}"
    path = folder / f"tsne_{stem_of(title)}.png"
    plot_map(path, heading, points[: len(real)], points[len(real) :], labels, class_names)


def plot_results(results, folder):
    """The diagrams of results.json: F-FID against latency and steps; classes of the samples.

    Old ones that these results have no figures for are removed.
    """
    by_time = {}
    by_steps = {}
    for row in results["rows"]:
        name = row["title"].replace(f", steps {row['steps']}", "")
        ffid = row["scores"]["ffid"]["mean"]
        if times := row["latency"]:
            text = ""
            if count := row["steps"]:
                text = f"{count} step{'s' * (count != 1)}"
            by_time.setdefault(name, []).append((times["batch"][times["best"]], ffid, text))
        if row["steps"]:
            by_steps.setdefault(name, []).append((row["steps"], ffid, ""))
    floor = results["floor"]["scores"]["ffid"]["mean"]
    balanced = results["protocol"].get("balanced", True)
    shown = results["rows"] if balanced else [results["floor"], *results["rows"]]
    histograms = {row["title"]: row["scores"]["histogram"] for row in shown}
    class_names = results["extractors"][0]["class_names"]
    if 1 < len(class_names) <= MOST:
        plot_classes(folder / "classes.png", histograms, class_names, balanced)
    else:
        (folder / "classes.png").unlink(missing_ok=True)
    if by_time:
        x_label = "ms per image, at the best batch size"
        plot_curves(folder / "quality_latency.png", x_label, by_time, floor)
    else:
        (folder / "quality_latency.png").unlink(missing_ok=True)
    if any(len(points) > 1 for points in by_steps.values()):
        plot_curves(folder / "steps.png", "number of sampling steps", by_steps, floor)
    else:
        (folder / "steps.png").unlink(missing_ok=True)


# --- Command line ---------------------------------------------------------------------------------


def build_parser():
    parser = Parser(prog="report.py", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("folders", nargs="*", type=file_path, default=[Path("results")], metavar="FOLDER",
        help="folders that hold a results.json each (results)")
    add("--pages", action="store_true",
        help="only write the tables in README.md and results/README.md anew (off)")
    # fmt: on
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.pages and args.folders != parser.get_default("folders"):
        parser.error("--pages is of the folders that the pages name: leave out the others")
    pages = (ROOT / "README.md", ROOT / "results/README.md") if args.pages else ()
    folders = () if args.pages else args.folders
    try:
        for page in pages:
            write_text(filled(page.read_text(encoding="utf-8"), ROOT), page)
            print(f"wrote {page}")
        for folder in folders:
            file = folder / "results.json"
            try:
                results = json.loads(file.read_text())
                text = table(results)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is not of evaluate.py ({one_line(error)})") from error
            write_text(text, folder / "table.md")
            plot_results(results, folder)
            print(f"wrote {folder}: table.md and diagrams")
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = one_line(error)
        if isinstance(error, ImportError):
            message += ": pip install matplotlib"
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
