"""Code and flags that several scripts share are equal; imports and banners follow the rules."""

import ast
import builtins
import functools
import importlib
import inspect
import itertools
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS

import common
import evaluate
import infer_onnx
from benchmarks import real

MODELS = ["vae", "gan", "ddpm", "ddim", "ldm"]
SCRIPTS = [*MODELS, "distill"]  # distill.py imports ddim.py, whose walk it learns
SOURCES = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
BANNERS = ["Model", "Method", "Sampling", "Training", "Run state", "Command line"]
# The interface of every script: the same name, each with the behaviour of its own model.
INTERFACE = {
    "main", "train", "sample", "draw", "build_parser", "sampling_flags", "ema_network",
}  # fmt: skip
WITHOUT_TORCH = {"numpy", "onnxruntime", "PIL", *sys.stdlib_module_names}
# Flags whose default may differ from script to script.
OWN_DEFAULTS = {
    "steps", "guidance", "guidance_interval", "batch_size", "lr", "model", "widths", "depths",
    "latent_dim", "kl_weight", "emb_channels", "noise_levels",
}  # fmt: skip


@functools.cache
def definitions(source):
    """name -> text of every function and class at the top level, decorators included."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@functools.cache
def imports(source):
    """Modules that a file imports, anywhere in it."""
    return {*imported(source)}


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_same_name_means_same_text():
    pairs = list(itertools.combinations(SOURCES, 2))
    assert len(pairs) > 50
    for a, b in pairs:
        first, second = definitions(SOURCES[a]), definitions(SOURCES[b])
        for name in first.keys() & second.keys() - INTERFACE:
            assert first[name] == second[name], f"{name} differs between {a}.py and {b}.py"


def test_ddpm_and_ddim_differ_in_the_sampler_alone():
    """`diff ddpm.py ddim.py` is the lesson: the docstring, the sampler and its flags."""
    first, second = definitions(SOURCES["ddpm"]), definitions(SOURCES["ddim"])
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differing == {"sample", "sampling_flags"}
    assert first.keys() - second.keys() == {"posterior", "ddpm_sample"}
    command = ["diff", ROOT / "ddpm.py", ROOT / "ddim.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert len(re.findall(r"^\d", done.stdout, re.MULTILINE)) <= 12, done.stdout


def test_infer_onnx_shares_the_samplers():
    assert (infer_onnx.RANGES, infer_onnx.CHOICES) == (common.RANGES, common.CHOICES)
    scripts = {name for script in ("ddim", "ddpm") for name in definitions(SOURCES[script])}
    shared = definitions(SOURCES["infer_onnx"]).keys() & scripts
    assert shared >= {
        "time_pairs", "predict_x_0_and_eps", "ddim_step", "ddim_sample", "dpm_pairs",
        "dpm_extrapolate", "dpm_sample", "posterior", "ddpm_sample",
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_banners_are_in_order(name):
    found = [
        line.split("---")[1].strip()
        for line in SOURCES[name].splitlines()
        if line.startswith("# --- ")
    ]
    assert found == [banner for banner in BANNERS if banner in found] and "Training" in found
    assert all(len(line) == 100 for line in SOURCES[name].splitlines() if line.startswith("# --- "))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_no_other_script(name):
    allowed = {"common", "runs", *["ddim"] * (name == "distill")}
    assert not imports(SOURCES[name]) & ({*SOURCES} - allowed)


def test_who_imports_whom():
    assert imports(core("distill")) & {*SOURCES} == {"common", "ddim"}
    assert not imports(SOURCES["common"]) & {*SOURCES}
    assert imports(SOURCES["runs"]) & {*SOURCES} == {"common"}
    assert imports(SOURCES["infer_onnx"]) <= WITHOUT_TORCH
    # which turns its telemetry off
    assert [name for name in SOURCES if "onnxruntime" in imports(SOURCES[name])] == ["infer_onnx"]


def core(name):
    """A model script above its train loop: what somebody with another trainer copies."""
    return SOURCES[name].split("# --- Training")[0]


@pytest.mark.parametrize("name", MODELS)
def test_above_the_training_a_script_needs_common_alone(name):
    assert imports(core(name)) & {*SOURCES} == {"common"}
    tree = ast.parse(core(name))
    known = {*dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert read <= known, read - known


def test_scripts_cut_there_sample_from_the_shipped_weights(in_tmp):
    """With common.py and nothing else."""
    for name in MODELS:
        (in_tmp / f"{name}.py").write_text(core(name))
    shutil.copy(ROOT / "common.py", in_tmp)
    code = f"""
import importlib, torch
for name in {MODELS}:
    script, stem = importlib.import_module(name), "ddim" if name == "ddpm" else name
    checkpoint = torch.load(f"{ROOT}/pretrained/{{stem}}.pt", weights_only=True)
    known = {{key: checkpoint[key] for key in ("config", "prior") if key in checkpoint}}
    known = {{"prior": known["prior"]}} if "prior" in known else known
    known = {{}} if name == "gan" else known
    model = script.ema_network(checkpoint, torch.device("cpu"))
    options = {{"steps": 3}} if "config" in known else {{}}
    images = script.sample(model=model, labels=torch.tensor([7, 7]), **known, **options)
    assert images.shape == (2, 1, 32, 32) and images.std() > 0.3, (name, images.std())
"""
    assert run_code(code, in_tmp) == ""


def run_code(code, folder, *argv):
    """What Python prints that runs this code in a folder: it must end well."""
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_train_loop_needs_ten_things_of_its_run(name):
    """Those that runs.py names at its top."""
    ten = {*re.findall(r"\w+", SOURCES["runs"].split("opening this file: ")[1].split(".")[0])}
    assert len(ten) == 10
    loops = []
    for node in ast.parse(SOURCES[name]).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("train"):
            used = {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "run"
            }
            loops += [used] if "steps" in used else []
    assert len(loops) == (2 if name == "ldm" else 1)
    assert all(used <= ten for used in loops), loops


def test_no_line_of_javascript_is_wider_than_100_columns():
    """Ruff sees to those of Python."""
    for path in (ROOT / "web/sampler.js", ROOT / "web/index.html", *ROOT.glob("tests/*.mjs")):
        assert max(map(len, path.read_text().splitlines())) <= 100, path


def test_evaluate_and_report_import_torch_and_matplotlib_only_where_they_need_them():
    inside = {
        "write_tsne": {"sklearn"},
        "new_diagram": {"matplotlib"},
        "plot_curves": {"matplotlib"},
    }
    shared = WITHOUT_TORCH | {"infer_onnx", "evaluate", "benchmarks", "tqdm"}
    report = (ROOT / "benchmarks/report.py").read_text()
    for node in [*ast.parse(SOURCES["evaluate"]).body, *ast.parse(report).body]:
        allowed = shared | inside.get(getattr(node, "name", ""), set())
        assert imports(ast.unparse(node)) <= allowed
    # explore.py needs no onnxruntime, which report.py imports: both have it.
    both = definitions(report)["legend_text"], definitions(SOURCES["explore"])["legend_text"]
    assert both[0] == both[1]


def test_evaluate_reads_the_same_data_as_common():
    assert common.IDX_SETS == evaluate.IDX_SETS and evaluate.IDX_FILES == common.IDX_FILES
    for name in ("NPZ_KEYS", "UNLABELLED", "TRAINS", "TESTS"):
        assert getattr(real, name) == getattr(common, name)
    ours, theirs = (
        definitions((ROOT / file).read_text()) for file in ("benchmarks/real.py", "common.py")
    )
    shared = ours.keys() & theirs.keys() - {"load_image"}  # which is infer_onnx.py's here
    assert len(shared) == 10
    for name in shared:
        assert ours[name] == theirs[name], f"{name} differs between real.py and common.py"
    assert imports((ROOT / "benchmarks/real.py").read_text()) <= WITHOUT_TORCH | {
        "infer_onnx", "tqdm",
    }  # fmt: skip


def test_importing_a_script_runs_nothing(in_tmp):
    # What takes long to import is imported where it is used.
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {[*SOURCES]}:
    importlib.import_module(name)
    assert not sys.modules.keys() & {{"torchvision", "sklearn", "matplotlib"}}, name
"""
    assert run_code(code, in_tmp) == "" and list(in_tmp.iterdir()) == []


def described_type(parse):
    """The name of an argparse type, with the range that it has."""
    name = str(getattr(parse, "__qualname__", parse))
    if "<locals>" in name:  # a function that runs.number or runs.several returned
        limits = inspect.getclosurevars(parse).nonlocals
        parts = ("kind", "low", "high", "above", "parse")
        name += str([described_type(limits[key]) for key in parts if key in limits])
    return name


def flags(name):
    """dest -> (flags, type, choices, help, default) of a script's parser."""
    parser = __import__(name).build_parser()
    described = {}
    for action in parser._actions:
        kind = described_type(action.type)
        shown = (action.choices, action.help, action.default)
        described[action.dest] = (action.option_strings, kind, *shown)
    return described


def test_shared_flags_mean_the_same():
    described = {name: flags(name) for name in SCRIPTS}
    for a, b in itertools.combinations(SCRIPTS, 2):
        first, second = described[a], described[b]
        shared = first.keys() & second.keys()
        assert len(shared) > 15
        if "gan" in (a, b):
            shared -= {"loss"}  # a GAN's has other choices
        if "distill" in (a, b):
            shared -= {"steps"}  # at most 16
        for dest in shared:
            n = 3 if dest in OWN_DEFAULTS else 5
            assert first[dest][:n] == second[dest][:n], (a, b, dest)


@pytest.mark.parametrize("name", SCRIPTS)
def test_infer_onnx_flags_are_those_of_the_scripts(name):
    first, second = flags("infer_onnx"), flags(name)
    own = {"output", "help"} | ({"steps"} if name == "distill" else set())
    for dest in first.keys() & second.keys() - own:
        assert first[dest][:3] == second[dest][:3], dest


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_explains_itself_and_says_its_true_default(name):
    for dest, (_, _, _, text, default) in flags(name).items():
        assert text, dest
        if isinstance(default, bool):
            said = "(on)" if default else "(off)"
            assert text.endswith(said) or dest in ("train", "resume"), dest
        elif isinstance(default, int | float | str) and dest not in ("help", "data"):
            said = text.rsplit("(", 1)[1].rstrip(")")
            assert said == str(default) or float(said) == default, dest
        elif isinstance(default, tuple):
            said = " ".join(map(str, default))  # of a flag with two values; else they have commas
            assert text.endswith((f"({said})", f"({said.replace(' ', ',')})")), dest


def test_a_script_works_with_common_and_runs(tmp_path, data_dir):
    """In a folder of its own, as its two commands: one process runs all, most of it is imports."""
    commands = []
    for name in MODELS:
        (tmp_path / name).mkdir()
        for file in (f"{name}.py", "common.py", "runs.py"):
            shutil.copy(ROOT / file, tmp_path / name)
        train = ["--train", "--epochs", "0.3", "--data-dir", data_dir, *TINY_FLAGS[name]]
        if name in ("ddpm", "ddim", "ldm"):
            train += ["--num-timesteps", "5"]  # so that sampling takes as few
        commands += [(name, train), (name, ["--class", "ki"])]
    code = f"""
import os, runpy, sys
for name, argv in {commands}:
    os.chdir(f"{tmp_path}/{{name}}")  # which is where Python looks for modules
    sys.argv = [f"{{name}}.py", *argv]
    try:
        runpy.run_path(f"{{name}}.py", run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, name
"""
    said = run_code(code, tmp_path)
    for name in MODELS:
        assert f"wrote {name}_ki.png" in said and (tmp_path / name / f"{name}_ki.png").exists()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ldm"])
def test_what_is_sampled_without_asking_is_the_same_everywhere(name):
    """The defaults of a script, of its sample(), of the shipped card and of infer_onnx.py."""
    script = importlib.import_module(name)
    flags = vars(script.build_parser().parse_args([]))
    defaults, without_torch = (
        {key: value.default for key, value in inspect.signature(function).parameters.items()}
        for function in (script.sample, infer_onnx.sample)
    )
    card = infer_onnx.load_model(ROOT / f"pretrained/{name}.onnx", "cpu").card
    config = {"label_dropout": 0.1}
    assert card["steps"] == script.STEPS and card["guidance"] == script.default_guidance(config)
    interval = defaults["guidance_interval"]
    assert tuple(card["guidance_interval"]) == interval == flags["guidance_interval"]
    assert interval == script.GUIDANCE_INTERVAL
    for key in ("steps", "guidance"):  # they are the script's constants, as the training allows
        assert flags[key] is defaults[key] is None
    if name == "ddpm":
        assert "solver" not in {*card, *defaults, *flags} and not hasattr(script, "SOLVER")
    else:
        assert card["solver"] == defaults["solver"] == flags["solver"] == script.SOLVER
    for key in (*infer_onnx.DIFFUSION_OPTIONS, "solver"):
        assert without_torch[key] is None  # they are the card's
    args = evaluate.build_parser().parse_args([name])
    [options] = evaluate.setting_options(args, name, card)
    assert options == {"steps": card["steps"], "guidance": card["guidance"]}  # and the card's
    for key in ("seed", "eta", "variance"):
        found = {place[key] for place in (flags, defaults) if key in place}
        assert len(found) <= 1, (key, found)
        assert without_torch[key] in (*found, None)  # None: as is compared in test_library.py
