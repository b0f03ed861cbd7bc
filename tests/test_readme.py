"""The README: its commands parse, its code runs, its links lead somewhere."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

import common
import ddim
import ddpm
import evaluate
import export
import gan
import infer_onnx
import ldm
import vae

README = (ROOT / "README.md").read_text()
PARSERS = {
    f"{module.__name__}.py": module
    for module in (vae, gan, ddpm, ddim, ldm, export, infer_onnx, evaluate)
}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
COMMANDS += [
    " ".join(code.split())
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
]
PYTHON = [
    part
    for line in COMMANDS
    for part in re.findall(r"(?:python|uv run|torchrun [-\w ]*?\d) (\w+\.py[^&#]*)", line)
]


def test_there_are_commands():
    assert len(PYTHON) > 20 and {line.split()[0] for line in PYTHON} >= set(PARSERS)


@pytest.mark.parametrize("line", PYTHON)
def test_commands_parse(line):
    script, *argv = shlex.split(line)
    if script in PARSERS and argv != ["--help"]:
        PARSERS[script].build_parser().parse_args(argv)


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_code_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    images = names["images"]
    assert images.shape == (3, 1, 32, 32) and str(images.dtype) in ("torch.float32", "uint8")
    assert (images.min(), images.max()) == (
        (-1, 1) if str(images.dtype) == "torch.float32" else (0, 255)
    )


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


FOLDERS = [
    (".", 3),
    ("ddpm", 1),
    ("ten_steps", 1),
    ("steps", 1),
    ("ldm_steps", 1),
    ("guidance", 0),
]  # of results/


@pytest.mark.parametrize(("folder", "quoted"), FOLDERS)
def test_the_scores_are_those_of_the_table(folder, quoted):
    """The first tables of each table.md, whole and word for word: no figure is typed, and the models are shipped."""
    folder = ROOT / "results" / folder
    results, text = (
        json.loads((folder / "results.json").read_text()),
        (folder / "table.md").read_text(),
    )
    assert evaluate.table(results) == text
    for row in results["rows"]:
        shipped = (ROOT / "pretrained" / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(shipped).hexdigest(), (
            f"{row['title']}: not the model that ships"
        )
    assert len(tables(text)) == 3 and all(
        table in tables(README) for table in tables(text)[:quoted]
    )


@pytest.mark.parametrize("module", [vae, gan, ddim, ldm])
def test_the_shipped_models_are_runs_of_the_defaults_as_its_table_says(module):
    name = module.NAME
    config = torch.load(ROOT / f"pretrained/{name}.pt", weights_only=True)["config"]
    own = {*module.FIXED, *module.FREE} - {*common.RUN_FLAGS, "bf16", "compile", "autoencoder"}
    defaults = vars(module.build_parser().parse_args([]))
    assert {key: config[key] for key in own} == {key: defaults[key] for key in own}
    minutes, epochs = re.search(
        rf"`python {name}\.py --train --minutes (\d+)` \| ([\d.]+) \|", README
    ).groups()
    log = (ROOT / f"pretrained/{name}.log.jsonl").read_text().splitlines()
    assert float(minutes) == config["minutes"] and epochs == f"{json.loads(log[-1])['epoch']:.1f}"


def test_the_table_of_tests_counts_what_pytest_collects():
    """tests/README.md: every test it names is there, with as many cases as it says."""
    rows = re.findall(r"`(test_\w+\.py::\w+)` \| (\d+) \|", (ROOT / "tests/README.md").read_text())
    files = sorted({f"tests/{test.split('::')[0]}" for test, _ in rows})
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    collected = Counter(re.findall(r"^tests/(test_\w+\.py::\w+)", done.stdout, re.MULTILINE))
    assert len(rows) > 30 and {test: int(cases) for test, cases in rows} == {
        test: collected[test] for test, _ in rows
    }
