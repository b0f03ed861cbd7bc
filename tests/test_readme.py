"""The documentation: commands parse, code runs, links resolve, numbers are those of results/."""

import hashlib
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT

import ddim
import ddpm
import evaluate
import explore
import export
import gan
import infer_onnx
import ldm
import runs
import vae
from benchmarks import extractor, report

PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "results/README.md", "tests/README.md", "web/README.md")
}
README = PAGES["README.md"]
RESULTS = PAGES["results/README.md"]
PARSERS = {
    f"{module.__name__}.py": module
    for module in (vae, gan, ddpm, ddim, ldm, explore, export, infer_onnx, evaluate)
}
PARSERS |= {"benchmarks/extractor.py": extractor, "benchmarks/report.py": report}


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Every call of a script in code blocks and in code within sentences, as "SCRIPT FLAG ..."."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    call = r"(?:python|uv run|torchrun [-\w ]*?\d) ((?:\w+/)?\w+\.py[^&#]*)"
    return [found.strip() for line in lines for found in re.findall(call, line)]


COMMANDS = [line for text in PAGES.values() for line in commands(text)]


def test_there_are_commands():
    assert {line.split()[0] for line in commands(README)} >= {
        "ddim.py", "explore.py", "export.py", "infer_onnx.py", "evaluate.py",
    }  # fmt: skip
    assert {line.split()[0] for line in COMMANDS} >= set(PARSERS)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    script, *argv = shlex.split(line)
    assert script == "NAME.py" or (ROOT / script).is_file()
    if script in PARSERS:
        PARSERS[script].build_parser().parse_args(argv)


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_code_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    images = names["images"]
    limits = (-1, 1) if isinstance(images, torch.Tensor) else (0, 255)
    assert images.shape == (3, 1, 32, 32) and str(images.dtype) in ("torch.float32", "uint8")
    assert (images.min(), images.max()) == limits


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


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_240 and len(tables(README)) <= 6


def test_the_scores_of_the_readme_are_those_of_the_results():
    expected = report.overview(results_of("."), results_of("ddpm"))
    assert expected.strip() + "\n" in tables(README), f"README.md needs this table:\n{expected}"


# Folders of results/, and how many tables of their table.md results/README.md repeats.
FOLDERS = [
    (".", 3), ("ddpm", 1), ("ten_steps", 1), ("steps", 1), ("ldm_steps", 1), ("guidance", 1),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "quoted"), FOLDERS)
def test_the_scores_are_those_of_the_table(folder, quoted):
    """The tables are those of table.md, word for word, and the models those in pretrained/."""
    results = results_of(folder)
    text = (ROOT / "results" / folder / "table.md").read_text()
    assert report.table(results) == text
    for row in results["rows"]:
        shipped = (ROOT / "pretrained" / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(shipped).hexdigest(), row["title"]
    assert len(tables(text)) == 3 and set(tables(text)[:quoted]) <= set(tables(RESULTS))
    if folder == ".":
        [order] = re.findall(r"^The extractors disagree .*$", text, re.MULTILINE)
        assert order in RESULTS.splitlines()


@pytest.mark.parametrize("module", [vae, gan, ddim, ldm])
def test_the_shipped_models_are_runs_of_the_defaults_as_its_table_says(module):
    name = module.NAME
    config = torch.load(ROOT / f"pretrained/{name}.pt", weights_only=True)["config"]
    kept = {*module.FIXED, *module.FREE} - {*runs.RUN_FLAGS, "bf16", "compile", "autoencoder"}
    defaults = vars(module.build_parser().parse_args([]))
    assert {key: config[key] for key in kept} == {key: defaults[key] for key in kept}
    minutes, epochs = re.search(
        rf"`python {name}\.py --train --minutes (\d+)` \| ([\d.]+) \|", RESULTS
    ).groups()
    log = (ROOT / f"pretrained/{name}.log.jsonl").read_text().splitlines()
    assert float(minutes) == config["minutes"] and epochs == f"{json.loads(log[-1])['epoch']:.1f}"
