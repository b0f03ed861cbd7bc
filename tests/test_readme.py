"""The documentation: commands parse, code runs, links resolve, numbers are those of results/."""

import ast
import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import ddim
import ddpm
import distill
import evaluate
import explore
import export
import gan
import infer_onnx
import ldm
import runs
import vae
from benchmarks import (
    libraries, peers, reconstructions, report, settings, speed, start, trials,
)  # fmt: skip

PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "results/README.md", "tests/README.md", "web/README.md")
}
README = PAGES["README.md"]
RESULTS = PAGES["results/README.md"]
MODULES = (vae, gan, ddpm, ddim, ldm, distill, explore, export, infer_onnx, evaluate)
PARSERS = {f"{module.__name__}.py": module for module in MODULES}
PARSERS |= {  # a benchmark without build_parser runs when it is imported, or has no flags to parse
    f"benchmarks/{path.name}": importlib.import_module(f"benchmarks.{path.stem}")
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "\ndef build_parser(" in path.read_text()
}


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Every call of a script in code blocks and in code within sentences, as "SCRIPT FLAG ..."."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    call = r"(?:python|uv run|torchrun [-\w ]*?\d) ((?:\w+/)?\w+\.py[^&#]*)"
    return [found.strip() for line in lines for found in re.findall(call, line)]


def docstring_commands(path):
    """The same of the lines of a script's docstring that are a command, maybe with a remark."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.findall(r"^ +python ((?:\w+/)?\w+\.py.*?)(?:  .*)?$", text, re.MULTILINE)


COMMANDS = [line for text in PAGES.values() for line in commands(text)]
DOCSTRINGS = [
    line
    for folder in (ROOT, ROOT / "benchmarks")
    for path in sorted(folder.glob("*.py"))
    for line in docstring_commands(path)
]


def test_there_are_commands():
    assert {line.split()[0] for line in commands(README)} >= {
        "ddim.py", "explore.py", "export.py", "infer_onnx.py", "evaluate.py",
    }  # fmt: skip
    assert {line.split()[0] for line in COMMANDS} >= {f"{m.__name__}.py" for m in MODULES}
    assert {line.split()[0] for line in DOCSTRINGS} >= set(PARSERS)


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS + DOCSTRINGS))
def test_commands_parse(line):
    script, *argv = shlex.split(line)
    assert script == "NAME.py" or (ROOT / script).is_file()
    if script in PARSERS:
        PARSERS[script].build_parser().parse_args(argv)


def test_code_runs_and_saves_the_same_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    pictures = []
    for code in blocks(README, "python"):
        names = {}
        exec(code, names)
        images = names["images"]
        limits = (-1, 1) if isinstance(images, torch.Tensor) else (0, 255)
        assert images.shape == (3, 1, 32, 32) and str(images.dtype) in ("torch.float32", "uint8")
        assert (images.min(), images.max()) == limits
        with Image.open("sneakers.png") as picture:
            pictures.append(np.array(picture).astype(int))
        Path("sneakers.png").unlink()
    first, second = pictures
    assert first.shape == second.shape and np.abs(first - second).max() <= 1


def anchors(text):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def results_of(folder):
    return json.loads((ROOT / "results" / folder / "results.json").read_text())


def one_line(text):
    return " ".join(text.split())


def test_the_readme_is_short():
    """The owner's limit."""
    assert len(README.encode()) <= 10_240 and len(tables(README)) <= 6


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_the_tables_are_those_of_the_results(name):
    assert report.filled(PAGES[name], ROOT) == PAGES[name], "python benchmarks/report.py --pages"
    marks = re.findall(r"<!-- (\w+) of (.+?) -->", PAGES[name])
    assert [part for part, _ in marks] == {
        "README.md": ["overview"],
        "results/README.md": ["scores", "cost", "scores", "scores", "cost", "scores", "cost"],
    }[name]
    assert PAGES[name].count("<!-- end -->") == len(marks) + PAGES[name].count("<!-- start -->")


FOLDERS = sorted({path.parent.name for path in (ROOT / "results").glob("**/results.json")})


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_scores_are_those_of_the_table(folder):
    """table.md is of results.json, a page repeats it, and the models are those of this copy."""
    folder = "." if folder == "results" else folder
    results = results_of(folder)
    assert report.table(results) == (ROOT / "results" / folder / "table.md").read_text()
    for row in results["rows"]:
        folder_of = "results/few_steps" if row["file"] == "distill1.onnx" else "pretrained"
        shipped = ROOT / folder_of / row["file"]
        assert row["sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest(), row["title"]
        files = [shipped, *shipped.parent.glob(f"{shipped.stem}_*.onnx")]
        assert row["bytes"] == sum(file.stat().st_size for file in files), row["title"]
    mark = f"<!-- scores of results/{folder} -->".replace("/. ", " ")
    assert mark in RESULTS


def test_other_figures_of_the_scores_are_those_of_the_results():
    evaluations = {
        row["model"]: row["evaluations"]
        for folder in (".", "ddpm")
        for row in results_of(folder)["rows"]
    }
    [ddpm_row] = results_of("ddpm")["rows"]
    total = ddpm_row["n"] * evaluations["ddpm"]
    assert f"A seed takes {total / 1e6:.1f} million evaluations" in one_line(RESULTS)


def test_the_students_beside_ddim_in_20_steps():
    """The aims of a student: a fraction of the time, and not much more of the F-FID."""
    rows = {row["model"]: row for row in results_of("ddim20")["rows"]}
    ddim20 = rows["ddim"]
    assert ddim20["evaluations"] == 36
    for name, most in (("distill", 1.15), ("distill2", 1.8)):
        student = rows[name]
        ffid = student["scores"]["ffid"]["mean"] / ddim20["scores"]["ffid"]["mean"]
        assert ffid <= most
        mine, theirs = (row["latency"] for row in (student, ddim20))
        single = theirs["batch"]["1"] / mine["batch"]["1"]
        best = theirs["batch"][theirs["best"]] / mine["batch"][mine["best"]]
        assert min(single, best) > 7
        said = f"`{name}`: {ffid:.2f} times its F-FID, {single:.1f} times as fast one image at a "
        assert f"{said}time, {best:.1f} times at the best batch sizes" in one_line(RESULTS)


def test_the_onnx_files_are_as_the_table_says():
    assert f"Opset {export.OPSET}, IR version {export.IR_VERSION}, " in README
    network = ({"x_t": "float32", "t": "int64", "y": "int64"}, "output")
    codes = ({"z": "float32", "classes": "float32"}, "image")
    expected = {
        **dict.fromkeys(("ddpm", "ddim", "distill", "distill2", "ldm"), network),
        "vae": codes, "gan": codes, "ldm_decoder": ({"z": "float32"}, "image"),
        "vae_encoder": ({"x": "float32", "classes": "float32"}, "mu"),
    }  # fmt: skip
    for stem, (inputs, output) in expected.items():
        proto = onnx.load(ROOT / f"pretrained/{stem}.onnx")
        assert [o.version for o in proto.opset_import] == [export.OPSET]
        assert proto.ir_version == export.IR_VERSION
        ends = [*proto.graph.input, *proto.graph.output]
        types = [onnx.TensorProto.DataType.Name(end.type.tensor_type.elem_type) for end in ends]
        found = {end.name: kind for end, kind in zip(ends, types, strict=True)}
        kinds = {"float32": "FLOAT", "int64": "INT64"}
        assert found == {**{k: kinds[v] for k, v in inputs.items()}, output: "FLOAT"}, stem
        assert {end.type.tensor_type.shape.dim[0].dim_param for end in ends} == {"batch"}


def log_of(path):
    return [json.loads(line) for line in (ROOT / path).read_text().splitlines()]


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_the_diversities_are_those_of_the_logs(name):
    lines = log_of(f"pretrained/{name}.log.jsonl")
    found = [line["diversity"] for line in lines if "diversity" in line][-1]
    low, high = min(found, key=found.get), max(found, key=found.get)
    text = f"{found[low]:.2f} ({low}) to {found[high]:.2f} ({high}) for the {name.upper()}"
    assert text in one_line(RESULTS)


def test_what_a_log_holds_is_said():
    """results/README.md names the keys that the logs have, and how often a line is written."""
    [text] = re.findall(r"^Training writes a log.*?\n\n", RESULTS, re.MULTILINE | re.DOTALL)
    listed = "step, epoch, seconds, images, loss"
    assert f"a line every {runs.LOG_EVERY} steps: {listed}" in one_line(text)
    keys = {"step", "epoch", "seconds", "lr"}
    for name in ("vae", "gan", "ddim", "ldm"):
        lines = log_of(f"pretrained/{name}.log.jsonl")
        regular = [line for line in lines if "lr" in line]
        assert all(line.keys() >= keys for line in regular)
        assert {line["step"] % runs.LOG_EVERY for line in regular} == {0}
        assert any("loss_by_tenth_of_t" in line for line in lines) == (name in ("ddim", "ldm"))
        assert all(any(key in line for line in lines) for key in ("diversity", "images"))


def test_the_included_models_are_ahead_of_those_before():
    [said] = re.findall(r"weights that were included before it .*?\n\n", RESULTS, re.DOTALL)
    before = re.findall(r"`(\w+)` ([\d.]+), ([\d.]+), ([\d.]+)[;.]", one_line(said))
    assert [name for name, *_ in before] == ["vae", "gan", "ddim", "ldm"]
    rows = {row["title"].split(",")[0]: row["scores"] for row in results_of(".")["rows"]}
    for name, *figures in before:
        ffid, coverage, accuracy = map(float, figures)
        now = {score: rows[name][score]["mean"] for score in ("ffid", "coverage", "label_accuracy")}
        assert now["ffid"] < ffid
        assert now["coverage"] > coverage and now["label_accuracy"] > accuracy


def test_the_included_files_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "pretrained").iterdir()) < 30_000_000


def test_the_gpu_section_says_what_the_report_says():
    report_of = json.loads((ROOT / "results/cuda/cuda.json").read_text())
    machine, parts = report_of["machine"], report_of["parts"]
    [section] = re.findall(r"^## GPU\n(.*?)^## ", RESULTS, re.MULTILINE | re.DOTALL)
    section = one_line(section)
    torch_version = machine["torch"].split("+")[0]
    python = ".".join(machine["Python"].split(".")[:2])
    assert (
        f"on one {machine['card']} (torch {torch_version}, CUDA {machine['CUDA']}, "
        f"Python {python}, {machine['cores']} cores)"
    ) in section
    short = ".".join(torch_version.split(".")[:2])
    assert f"on one {machine['card']} with torch {short}, " in one_line(README)
    assert "the last, speed, was cut off twice and has no figures" in section
    assert set(parts) == {"train", "compile", "resume", "torchrun", "samples", "onnx", "memory"}

    scripts = {"vae", "gan", "ddpm", "ddim", "ldm", "distill"}
    assert {row["command"].split(".py")[0] for row in parts["train"]} == scripts
    assert {row["command"].split(".py")[0] for row in parts["compile"]} == scripts - {"gan"}
    for row in parts["train"] + parts["compile"]:
        assert row["exit code"] == 0 and row["last loss"] < row["first loss"]
    rows = [r for r in parts["train"] + parts["compile"] if r["command"].startswith("distill")]
    losses = [row["last loss"] for row in rows]
    assert len(losses) == 4 and max(losses) < 1.01 * min(losses)

    assert "same weights, bit for bit, as without torchrun" in section
    assert "two runs end in the same weights, bit for bit" in section
    assert "40 of each: the CPU and the card (with TF32) differ by at most one grey" in section
    for part in ("resume", "torchrun", "samples", "onnx"):
        assert {row["script"] for row in parts[part]} == scripts
        assert all(set(row["exit codes"]) == {0} for row in parts[part])
    for row in parts["resume"]:
        assert row["stopped with"] == 130
        assert row["twice, largest difference"] == row["resumed, largest difference"] == 0
    assert all(row["largest difference"] == 0 for row in parts["torchrun"])
    for row in parts["samples"]:
        assert row["images"] == 40 and row["largest difference in grey levels"] <= 1
    worst = {}
    for row in parts["onnx"]:
        most = 3 if row["script"] == "gan" else 1
        assert row["images"] == 40 and row["largest difference in grey levels"] == most
        assert round(row["fraction above 1"], 4) == (0.0002 if row["script"] == "gan" else 0)
        for check in ("check", "check without TF32"):
            assert row[f"{check}, exit code"] == 0
            assert row[check][0] == "running on CUDAExecutionProvider" and len(row[check]) > 1
            found = [float(re.search(r"within (\S+)", line)[1]) for line in row[check][1:]]
            worst[check] = max(worst.get(check, 0), *found)
    differences = f"{worst['check']:.1e} with TF32 and {worst['check without TF32']:.1e} with"
    assert f"`--check` passes, with differences up to {differences} `--no-tf32`" in section
    assert "by up to 3 grey levels, in 0.02 % of the pixels by more than one, all others" in section
    assert "ends with one line and exit code 2" in section
    assert [row["exit code"] for row in parts["memory"]] == [2]


@pytest.mark.parametrize("size", common.IMAGE_SIZES)
def test_the_size_of_the_network_is_said(size):
    """Its parameters, and millions of multiply-accumulates for an image."""
    network = speed.default_network(size)
    count = sum(p.numel() for p in network.parameters())
    assert f"| {size} | {count:,} | {speed.macs_of(network, size) / 1e6:.1f} |" in RESULTS


def test_the_settings_are_those_of_the_table():
    """Neither fewer samples nor older weights stand in it."""
    folder = ROOT / "results/settings"
    rows = json.loads((folder / "settings.json").read_text())
    assert settings.table(settings.comparable(rows)) == (folder / "settings.md").read_text()
    quick = {**rows[-1], "n": 1000}
    assert settings.comparable([*rows, quick]) == settings.comparable(rows)
    of_ddim = [row for row in rows if row["name"] == "ddim"]
    newer = {**of_ddim[-1], "weights": "0"}
    others = [row for row in settings.comparable(rows) if row["name"] != "ddim"]
    assert settings.comparable([*rows, newer]) == [*others, newer]


def test_what_a_code_loses_is_as_the_page_says():
    folder = ROOT / "results/reconstructions"
    rows = json.loads((folder / "reconstructions.json").read_text())
    assert reconstructions.table(rows) == (folder / "reconstructions.md").read_text()
    samples = {row["model"]: row["scores"]["ffid"]["mean"] for row in results_of(".")["rows"]}
    for name, row in zip(("vae", "ldm"), rows[1:], strict=True):
        shipped = (ROOT / f"pretrained/{name}.pt").read_bytes()
        assert row["sha256"] == hashlib.sha256(shipped).hexdigest()
        ratio = row["scores"]["ffid"] / samples[name]
        assert 0.9 < ratio < 1 if name == "vae" else ratio < 0.5  # hardly, and twice, as near


def test_codes_of_other_data_are_not_compared(tmp_path, capsys):
    checkpoint = torch.load(ROOT / "pretrained/vae.pt", weights_only=True)
    checkpoint["config"]["data"] = "kmnist"
    torch.save(checkpoint, tmp_path / "vae.pt")
    output = tmp_path / "scores"
    with pytest.raises(SystemExit, match="2"):
        reconstructions.main([str(tmp_path / "vae.pt"), "--output", str(output)])
    found = f"{tmp_path / 'vae.pt'} is of kmnist, 1 channels, 32 pixels"
    assert f"error: {found}: right is fashion-mnist, 1, 32" in capsys.readouterr().err
    assert not output.exists()


def test_few_pictures_were_learned_as_the_page_says():
    section = one_line(RESULTS.split("<!-- start -->")[1].split("<!-- end -->")[0])
    for row in json.loads((ROOT / "results/start/start.json").read_text())["rows"]:
        ffid, copies = f"{row['scores']['ffid']:.2f}", f"{100 * row['scores']['copies']:.0f} %"
        if row["images"]:
            passes = f"{row['minutes']} minutes, {row['images'] / start.PICTURES:,.0f} passes"
            assert f"{passes}: F-FID {ffid}, {copies} of the samples are copies" in section
        else:
            assert f"Real images: {ffid}, {copies}" in section


def test_the_tables_of_trials_are_those_of_their_figures():
    text = trials.TABLE.read_text()
    assert trials.table(json.loads(trials.KEPT.read_text())) == text
    verdicts = [re.findall(r" \| (better|worse|open) \| ", part) for part in text.split("\n## ")]
    heads = [part.split(".py")[0] for part in text.split("\n## ")]
    every = [verdict for found in verdicts for verdict in found]
    said = f"leaves {every.count('open')} of the {len(every)} verdicts there open, all of `gan`"
    assert said in one_line(RESULTS)
    of_gan = [
        v for head, found in zip(heads, verdicts, strict=True) for v in found if head == "gan"
    ]
    assert of_gan and {*of_gan} == {"open"}
    folder = ROOT / "results/start"
    found = start.table(json.loads((folder / "start.json").read_text()))
    assert found == (folder / "start.md").read_text()


def test_what_is_said_of_other_libraries_is_in_their_table():
    folder = ROOT / "results/libraries"
    rows = json.loads((folder / "libraries.json").read_text())
    assert peers.table(rows) == (folder / "libraries.md").read_text()
    said = one_line(RESULTS.split("## Beside other libraries")[1].split("\n## ")[0])
    for row in rows:
        ours, theirs = row["sides"]["this repository"], row["sides"][row["library"]]
        ffids = [side["scores"]["ffid"] for side in (ours, theirs)]
        text = f"{row['library']}: F-FID {ffids[1]:.2f}, {ffids[1] / ffids[0]:.1f} times the "
        text += f"{ffids[0]:.3f} of `ddim.py`, in {theirs['evaluations']} evaluations of the "
        text += f"network against {ours['evaluations']}. In this time it saw "
        assert text + f"{ours['images'] / theirs['images']:.1f} times fewer images" in said
        assert row["minutes"] == 20 and row["num_samples"] == 10_000
    is_missing = len({row["library"] for row in rows}) < len(libraries.LIBRARIES)
    assert ("has not been scored yet" in said) == is_missing


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [
        (0.71, (1.0, 0.1), "better"), (0.72, (1.0, 0.1), "open"), (1.28, (1.0, 0.1), "open"),
        (1.29, (1.0, 0.1), "worse"), (0.1, None, "open"),
    ],
)  # fmt: skip
def test_a_verdict_is_beyond_twice_what_the_ratio_of_two_seeds_varies(ratio, spread, verdict):
    assert trials.verdict_of(ratio, spread) == verdict  # 2 sqrt(2) 0.1 = 0.283


def test_what_is_said_of_students_is_in_the_trials():
    rows = {
        t["flags"]: t["scores"]["ffid"]
        for t in json.loads(trials.KEPT.read_text())
        if t["name"] == "distill"
    }
    section = one_line(
        RESULTS.split("Students that learned for six minutes")[1].split("That Huber")[0]
    )
    for flags in {*rows} - {*trials.SEED_FLAGS}:
        assert re.search(f"`{flags}`: {rows[flags] / rows['']:.2f} times", section)
    ffids = [rows[flags] for flags in trials.SEED_FLAGS]
    assert f"differs by {100 * np.std(ffids, ddof=1) / np.mean(ffids):.0f} %" in section
    assert rows["--loss huber"] < min(ffids) <= rows["--passes 16"]


def test_a_trial_is_compared_with_the_one_without_its_last_change():
    """By the spread of the table's own seeds; these have no verdict."""
    ffids = {
        "": 1.0, "--seed 1": 1.1, "--seed 2": 0.9, "--passes 1": 2.0, "--passes 16": 1.2,
        "--passes 16 --loss huber": 0.6,
    }  # fmt: skip
    about = {"name": "distill", "base": "", "minutes": 1, "processor": "", "floor": 0, "epochs": 1}
    about |= {"drawn": "--hold-out", "spread": 0}
    scores = dict.fromkeys(trials.SCORES, 0)
    rows = [about | {"flags": k, "scores": scores | {"ffid": v}} for k, v in ffids.items()]
    lines = trials.script_table(rows, {}).splitlines()[-len(ffids) - 1 :]
    cells = [line.split(" | ")[2:4] for line in lines if line]
    assert cells == [
        ["", ""], ["", "1.10"], ["", "0.90"], ["worse", "2.00"], ["open", "1.20"],
        ["better", "0.50"],
    ]  # fmt: skip


def test_what_is_said_of_noise_levels_is_in_the_trials():
    seeded = trials.seeded_runs(json.loads(trials.KEPT.read_text()))

    def scores(name, flags, score):
        """The scores of a script's runs with flags, as these were sampled first."""
        first = next(runs for (n, _, f), runs in seeded.items() if (n, f) == (name, flags))
        return [run["scores"][score] for run in first.values()]

    uniform = trials.UNIFORM
    for score in ("ffid", "ffid2"):
        assert max(scores("ddim", "", score)) < min(scores("ddim", uniform, score))
    assert min(scores("ddim", "", "recall")) > max(scores("ddim", uniform, "recall"))
    fall = np.mean(scores("ddim", uniform, "label_accuracy"))
    fall -= np.mean(scores("ddim", "", "label_accuracy"))
    assert 0 < fall < 0.01
    ffids = [scores("ldm", flags, "ffid") for flags in ("", trials.LOGNORMAL)]
    assert abs(np.subtract(*map(np.mean, ffids))) < np.std(ffids[0], ddof=1)
    few_channels = scores("ldm", f"{trials.LOGNORMAL} --latent-channels 4", "ffid")
    assert len(few_channels) == 2 and max(few_channels) < min(map(min, ffids))
    changed = scores("vae", "--latent-dim 128 --prior-components 5", "ffid")
    assert len(changed) == 3 and max(changed) < min(scores("vae", "", "ffid"))
    drawn = trials.DRAWN["ddim"]
    for seed, run in seeded["ddim", drawn, "--ema-length 0.04"].items():
        ratio = run["scores"]["ffid"] / seeded["ddim", drawn, ""][seed]["scores"]["ffid"]
        assert ratio == pytest.approx(1, abs=0.02)
    page = one_line(RESULTS)
    assert "the default of `ddim` and `ddpm` is `--noise-levels lognormal`" in page
    spreads = trials.training_spreads(json.loads(trials.KEPT.read_text()))
    found = [spreads[name, ""][1] for name in ("vae", "ddim", "ldm", "gan")]
    low, high, gans = (round(100 * x) for x in (min(found[:3]), max(found[:3]), found[3]))
    assert f"{low} to {high} % for `vae`, `ddim` and `ldm`, and of {gans} % for" in page


@pytest.mark.parametrize("module", [vae, gan, ddim, ldm])
def test_the_shipped_models_are_runs_of_the_commands_of_its_table(module):
    """Flags that the command leaves out are the defaults."""
    name = module.NAME
    command, epochs = re.search(rf"\| `{name}`.* \| `python (.+)` \| ([\d.]+) \|", RESULTS).groups()
    args = vars(module.build_parser().parse_args(command.split()[1:]))
    widths = module.WIDTHS[32]
    depths = (1,) * (len(widths) - 1) + (3,)
    args |= {"widths": widths, "widths_d": widths, "depths": depths}
    kept = {*module.FIXED, *module.FREE} - {*runs.RUN_FLAGS, "bf16", "compile", "autoencoder"}
    config = torch.load(ROOT / f"pretrained/{name}.pt", weights_only=True)["config"]
    older = {**args, **runs.OLDER}  # than the newest flags
    assert {key: config.get(key, older[key]) for key in kept} == {key: args[key] for key in kept}
    assert config["minutes"] == args["minutes"]
    assert epochs == f"{log_of(f'pretrained/{name}.log.jsonl')[-1]['epoch']:.1f}"


@pytest.mark.parametrize("name", ["distill", "distill2"])
def test_the_shipped_students_are_runs_of_the_commands_of_its_table(name):
    """Their cards and logs; flags that the command leaves out are the defaults."""
    command, epochs = re.search(rf"\| `{name}` \| `python (.+)` \| ([\d.]+) \|", RESULTS).groups()
    args = vars(distill.build_parser().parse_args(command.split()[1:]))
    args["teacher_steps"] = args["teacher_steps"] or distill.TEACHER_STEPS
    training = infer_onnx.load_model(ROOT / f"pretrained/{name}.onnx", "cpu").card["training"]
    kept = {*distill.FIXED, "lr"} - {"teacher", "guidance", "guidance_interval"}
    assert {key: training[key] for key in kept} == {key: args[key] for key in kept}
    assert training["guidance"] == ddim.GUIDANCE
    assert training["minutes"] == args["minutes"]
    assert epochs == f"{log_of(f'pretrained/{name}.log.jsonl')[-1]['epoch']:.1f}"
