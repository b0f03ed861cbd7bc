"""export.py and infer_onnx.py: equal pictures without torch, providers, exit codes of bad files."""

import contextlib
import ctypes
import errno
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from shlex import split

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from conftest import (
    ROOT, TINY_FLAGS, WRONG_VALUES, refused, save_sealed, with_card, without_exporting,
)  # fmt: skip
from packaging.requirements import Requirement
from PIL import Image

import common
import ddim
import explore
import export
import infer_onnx
import runs
import vae
from benchmarks import latency

SHIPPED = ROOT / "pretrained" / "ddim.onnx"
# A Python that can import nothing but what is in requirements-infer.txt, and runs some commands;
# a line of a star is between what they print.
WITHOUT_TORCH = """
import runpy, shlex, sys
blocked = "torch torchvision onnx onnxscript tqdm scipy sklearn common ddim vae"
for name in blocked.split():
    sys.modules[name] = None
for command in sys.argv[1:]:
    sys.argv = shlex.split(command)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    print("*")
"""


def infer(*commands, cwd):
    """infer_onnx.py, or another script that uses it, in a separate process without torch."""
    lines = [shlex.join([str(ROOT / script), *map(str, argv)]) for script, *argv in commands]
    command = [sys.executable, "-c", WITHOUT_TORCH, *lines]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def exported(exports):
    """The .onnx file of ddim.py's tiny run."""
    return exports("ddim")


@pytest.fixture(scope="module")
def loaded(exported):
    return infer_onnx.load_model(exported, "cpu")


def torch_network(name, run_dir):
    """The script, the checkpoint, and the network that it samples with."""
    script = importlib.import_module(name)
    checkpoint = runs.load_checkpoint(run_dir / f"{name}.pt", (name,))
    return script, checkpoint, script.ema_network(checkpoint, torch.device("cpu"))


# --- Export ---------------------------------------------------------------------------------------


def test_the_file_is_one_small_portable_graph(exported):
    # no separate file of weights
    assert {file.name for file in exported.parent.glob("*.onnx*")} == {"ddim.onnx"}
    proto = onnx.load(exported)
    onnx.checker.check_model(proto)
    assert [o.version for o in proto.opset_import if o.domain == ""] == [18]
    assert proto.ir_version == 8
    assert not proto.graph.value_info
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)
    content = exported.read_bytes()
    for trace in (ROOT, Path.home(), Path(sys.prefix), "site-packages", "ddim.py", "common.py"):
        assert str(trace).encode() not in content


def test_the_metadata_says_all(loaded, tiny_run):
    card = loaded.card
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    assert card["model"] == "ddim" and card["class_names"] == checkpoint["class_names"]
    assert card["image_shape"] == [1, 32, 32] and card["null_label"] == common.NULL_LABEL
    assert card["alpha_bars"] == ddim.make_alpha_bars("cosine", 1000).tolist()
    assert card["prediction"] == "v"
    assert card["training"]["step"] == 18
    assert card["steps"] == ddim.STEPS
    assert card["guidance"] == ddim.GUIDANCE
    assert card["guidance_interval"] == list(ddim.GUIDANCE_INTERVAL)
    assert card["solver"] == ddim.SOLVER and card["format"] == 5


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_network_outputs_equal_those_of_torch(loaded, tiny_run, batch):
    checkpoint = runs.load_checkpoint(tiny_run / "ddim.pt", ("ddim",))
    network = ddim.ema_network(checkpoint, torch.device("cpu"))
    x_t, t = torch.randn(batch, 1, 32, 32), torch.randint(0, 1000, (batch,))
    y = torch.arange(batch) % 11 - 1
    found = loaded.session.run(None, {"x_t": x_t.numpy(), "t": t.numpy(), "y": y.numpy()})[0]
    assert np.abs(found - network(x_t, t, y).numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("steps", "guidance", "interval", "eta", "solver"),
    [
        (20, 1.5, (0, 1), 0.0, "ddim"),
        (7, 1, (0, 1), 0.0, "dpm++"),
        (5, 0, (0, 0.5), 0.6, "ddim"),
        (4, 3.0, (0, 0.5), 1.0, "ddim"),
        (8, 2, (0.1, 0.6), 0.0, "dpm++"),
    ],
)
def test_pictures_equal_those_of_torch(loaded, tiny_run, steps, guidance, interval, eta, solver):
    checkpoint = runs.load_checkpoint(tiny_run / "ddim.pt", ("ddim",))
    network = ddim.ema_network(checkpoint, torch.device("cpu"))
    options = {
        "steps": steps, "guidance": guidance, "guidance_interval": interval, "eta": eta,
        "solver": solver, "seed": 5,
    }  # fmt: skip
    known = {"model": network, "config": checkpoint["config"], "labels": torch.arange(6)}
    expected = ddim.sample(**known, **options)
    for batch_size in (6, 4):
        found = infer_onnx.sample(loaded, list(range(6)), batch_size=batch_size, **options)
        assert np.abs(found.astype(int) - common.to_uint8(expected).numpy()).max() <= 1
    assert found.std() > 10  # not all black


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 5, "guidance": 2, "guidance_interval": (0, 1)}, 10),
        # t = 999, 747, 514, 303, 122; of dpm++ 999, 979, 870, 570, 157
        ({"steps": 5, "guidance": 2, "guidance_interval": (0, 0.5)}, 7),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0, 0.514)}, 7),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0, 0.515)}, 8),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0.303, 0.747)}, 7),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0.304, 0.748)}, 7),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0.3, 0.75)}, 8),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0.6, 0.7)}, 5),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0, 0)}, 5),
        ({"steps": 5, "guidance": 1}, 5),
        ({"steps": 5, "guidance": 0.5, "guidance_interval": (0, 0)}, 10),
        ({"steps": 20, "guidance": 1.6, "guidance_interval": (0, 0.8)}, 36),
        ({"steps": 3, "guidance": 0}, 3),
        (
            {"steps": 5, "guidance": 2, "guidance_interval": (0.157, 0.87), "solver": "dpm++"}, 7,
        ),
        (
            {"steps": 5, "guidance": 2, "guidance_interval": (0.158, 0.871), "solver": "dpm++"}, 7,
        ),
        ({"steps": 5, "guidance": 2, "guidance_interval": (0, 1), "solver": "dpm++"}, 10),
    ],
)  # fmt: skip
def test_evaluations_are_counted(loaded, monkeypatch, options, expected):
    rows, run_session = [], infer_onnx.run_session

    def counted(session, **feed):
        rows.append(len(feed["y"]))
        return run_session(session, **feed)

    monkeypatch.setattr(infer_onnx, "run_session", counted)
    options = {"solver": "ddim", **options}
    infer_onnx.sample(loaded, [4, 5], **options)
    assert sum(rows) == 2 * expected and infer_onnx.evaluations(loaded.card, **options) == expected


def test_a_file_of_format_4_is_sampled_as_it_was(exported, loaded, in_tmp):
    """Its interval is (0, guidance_limit) and its solver ddim."""

    def older(card):
        new = ("guidance_interval", "solver")
        kept = {key: value for key, value in card.items() if key not in new}
        return {**kept, "format": 4, "guidance_limit": 0.4}

    with_card(exported, "x.onnx", older)
    model = infer_onnx.load_model("x.onnx", "cpu")
    assert model.card["guidance_interval"] == [0, 0.4] and model.card["solver"] == "ddim"
    expected = infer_onnx.sample(loaded, [1, 2], guidance_interval=(0, 0.4), solver="ddim")
    assert np.array_equal(infer_onnx.sample(model, [1, 2]), expected)


def test_the_interval_and_the_solver_of_the_card_are_the_defaults(exported, loaded, in_tmp, capsys):
    changes = {"guidance_interval": [0.1, 0.5], "solver": "dpm++"}
    with_card(exported, "x.onnx", lambda card: {**card, **changes})
    model = infer_onnx.load_model("x.onnx", "cpu")
    expected = infer_onnx.sample(loaded, [1, 2], **changes)
    assert np.array_equal(infer_onnx.sample(model, [1, 2]), expected)
    count = infer_onnx.evaluations(loaded.card, **changes)
    assert infer_onnx.evaluations(model.card) == count < infer_onnx.evaluations(loaded.card)
    plain = infer_onnx.sample(loaded, [1, 2], guidance_interval=(0.1, 0.5), solver="ddim")
    assert not np.array_equal(plain, expected)
    infer_onnx.main(["--model", "x.onnx", "--class", "1,2", "--output", "x.npz"])
    assert np.array_equal(np.load("x.npz")["x"], expected)
    assert "guidance interval 0.1 0.5, solver dpm++" in capsys.readouterr().out
    error = refused(infer_onnx.main, ["--model", "x.onnx", "--eta", "1"], capsys)
    assert "--eta 1.0 is for --solver ddim" in error


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ldm"])
def test_guidance_flags_sample_the_same_with_torch_and_without(name, tiny_runs, exports, in_tmp):
    images = {}
    for interval in ("0 0.5", "0.5 1"):
        flags = ["--steps", "4", "--guidance", "40", "--guidance-interval", *interval.split()]
        at = ["--checkpoint", str(tiny_runs(name))]
        importlib.import_module(name).main([*at, *flags, "--output", "torch.npz"])
        infer_onnx.main(["--model", str(exports(name)), *flags, "--output", "onnx.npz"])
        a, b = (np.load(f"{place}.npz")["x"].astype(int) for place in ("torch", "onnx"))
        assert np.abs(a - b).max() <= 1
        images[interval] = a
        if name == "ddim":  # an interpolation of classes starts with a sample of the first
            between = ["--class", "0,1", "--num-samples", "2", "--output", "between.npz"]
            explore.main(["interpolate", name, *at, *flags, *between])
            assert np.abs(np.load("between.npz")["x"][0] - a[0]).max() <= 1
    assert np.abs(images["0 0.5"] - images["0.5 1"]).max() > 3


WAYS = [
    ("ddim", ["--solver", "dpm++"]), ("ddim", ["--eta", "1"]), ("ddpm", ["--variance", "large"]),
    ("ldm", ["--solver", "dpm++"]), ("ldm", ["--eta", "1"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flags"), WAYS)
def test_sampler_flags_sample_the_same_with_torch_and_without(
    name, flags, tiny_runs, exports, in_tmp
):
    images = {}
    plainly = [] if name == "ddpm" else ["--solver", "ddim"]  # whatever the default
    for extra in ([], flags):
        argv = ["--steps", "4", "--guidance", "40", "--class", "0,1,2", *plainly, *extra]
        at = ["--checkpoint", str(tiny_runs(name))]
        importlib.import_module(name).main([*at, *argv, "--output", "torch.npz"])
        infer_onnx.main(["--model", str(exports(name)), *argv, "--output", "onnx.npz"])
        a, b = (np.load(f"{place}.npz")["x"].astype(int) for place in ("torch", "onnx"))
        assert np.abs(a - b).max() <= 1
        images[len(extra)] = a
    plain, flagged = images.values()
    assert np.abs(plain - flagged).max() > 1


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_no_clip_reaches_the_sampler(name, tiny_runs, in_tmp, monkeypatch):
    script, run_dir, seen = importlib.import_module(name), str(tiny_runs(name)), []

    def spy(**options):
        seen.append(options["clip"])
        return torch.zeros(1, 1, 32, 32)

    monkeypatch.setattr(script, "sample", spy)
    for flags in ([], ["--no-clip"]):
        script.main(["--checkpoint", run_dir, "--class", "0", *flags, "--output", "x.png"])
    assert seen == [True, False]


def test_a_model_of_another_kind_is_sampled_without_torch(in_tmp, data_dir):
    """In colour, predicting noise, with few steps, a linear schedule and no label dropout."""
    kind = "--channels 3 --prediction eps --schedule linear --num-timesteps 10 --label-dropout 0"
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ddim"], *kind.split()]
    assert ddim.main(flags) == export.main(["ddim"]) == 0
    card = infer_onnx.load_model("runs/ddim/ddim.onnx", "cpu").card
    # of its ten timesteps the last five are noise alone: a walk that predicts eps leaves them out
    assert card["steps"] == infer_onnx.steps_limit(card) == 5
    assert card["guidance"] == 1 and card["guidance_fixed"]
    assert card["image_shape"] == [3, 32, 32]
    assert card["prediction"] == "eps"
    assert export.main(["ddim", "--sampler"]) == 0
    paths = ("runs/ddim/ddim.onnx", "runs/ddim/ddim_sampler.onnx")
    models = [infer_onnx.load_model(path, "cpu") for path in paths]
    a, b = (infer_onnx.sample(model, [0, 1], solver="dpm++").astype(int) for model in models)
    assert np.abs(a - b).max() <= 1
    assert len(card["alpha_bars"]) == 10
    for way in ("folder/", "grid.png"):
        assert ddim.main(["--class", "0,1", "--output", f"torch/{way}"]) == 0
        infer_onnx.main(["--class", "0,1", "--output", f"onnx/{way}"])
    files = sorted(path.relative_to("torch") for path in Path("torch").rglob("*.png"))
    assert len(files) == 3
    assert files == sorted(path.relative_to("onnx") for path in Path("onnx").rglob("*.png"))
    for file in files:
        paths = (Path("torch", file), Path("onnx", file))
        a, b = (np.array(Image.open(path)).astype(int) for path in paths)
        assert a.shape == b.shape and a.shape[2] == 3 and np.abs(a - b).max() <= 1


@pytest.fixture(scope="module")
def samplers(tiny_runs, exports, tmp_path_factory):
    """A function: the sampler of a script's tiny run as one graph, which export.py has verified."""
    folder = tmp_path_factory.mktemp("samplers")  # not beside the files of tiny_runs

    def sampler_of(name):
        made = folder / f"{name}.onnx"
        if not made.is_file():
            at = ["--checkpoint", str(tiny_runs(name)), "--output", str(made)]
            with pytest.MonkeyPatch.context() as patch:
                without_exporting(patch, exports(name))
                assert export.main([name, "--sampler", *at]) == 0
        return made

    return sampler_of


@pytest.mark.parametrize("name", ["ddim", "ldm"])
def test_the_sampler_as_one_graph_gives_the_same_images(name, exports, samplers):
    whole, network = (infer_onnx.load_model(f(name), "cpu") for f in (samplers, exports))
    assert whole.parts == {} and whole.card["kind"] == "sampler"
    cases = [
        {"steps": 9, "guidance": 2.0, "guidance_interval": (0.514, 0.75), "solver": "ddim"},
        {"steps": 4, "guidance": 0.0, "solver": "dpm++"},
        {"steps": 9, "guidance": 0.5, "solver": "dpm++", "first": 2**40},
        {},
    ]
    if name == "ddim":
        cases.append({"steps": infer_onnx.steps_limit(whole.card), "guidance": 1.0})
    for options in cases:
        labels = [3, 0, 9][: 1 if options.get("steps", 0) > 9 else 3]
        a, b = (infer_onnx.sample(m, labels, batch_size=2, **options) for m in (whole, network))
        assert np.abs(a.astype(int) - b).max() <= 1 and a.std() > 5
    assert infer_onnx.evaluations(whole.card) == infer_onnx.evaluations(network.card)
    compared = {options["solver"] for options in export.sampler_settings(whole.card)}
    assert compared == {*infer_onnx.SOLVERS}


@pytest.mark.parametrize("name", ["ddim", "ldm"])
def test_the_sampler_as_one_graph_is_portable(name, samplers):
    """One small file of plain operators, which the reference implementation runs too."""
    proto = onnx.load(samplers(name))
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", export.OPSET)]
    assert proto.ir_version == export.IR_VERSION and not proto.functions
    [loop] = [node for node in proto.graph.node if node.op_type == "Loop"]
    assert loop.input[1] and not any(node.op_type == "If" for node in loop.attribute[0].g.node)
    content = samplers(name).read_bytes()
    for trace in (ROOT, Path.home(), Path(sys.prefix), "site-packages", "export.py"):
        assert str(trace).encode() not in content
    model = infer_onnx.load_model(samplers(name), "cpu")
    shape = model.card.get("latent_shape") or model.card["image_shape"]
    noise = infer_onnx.next_noise(infer_onnx.noise_streams(0, [0, 1]), shape)
    feed = {
        "noise": noise, "labels": np.array([7, 2]), "steps": np.array(3),
        "guidance": np.array(2, np.float32), "guidance_interval": np.float32([0, 0.5]),
        "second_order": np.array(True),
    }  # fmt: skip
    [found] = onnx.reference.ReferenceEvaluator(proto).run(None, feed)
    options = {"steps": 3, "guidance": 2, "guidance_interval": (0, 0.5), "solver": "dpm++"}
    expected = infer_onnx.sample(model, [7, 2], **options)
    assert np.abs(found.astype(int) - expected).max() <= 1
    for steps in (0, -1, 1001):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            model.session.run(None, {**feed, "steps": np.array(steps)})


def test_the_sampler_as_one_graph_on_the_command_line(samplers, in_tmp, capsys):
    model = ["--model", str(samplers("ddim"))]
    assert infer_onnx.main([*model, "--check"]) == 0
    assert "an image within 0 grey" in capsys.readouterr().out
    assert infer_onnx.main([*model, "--class", "su", "--output", "x.png"]) == 0
    assert Image.open("x.png").text["model"] == "ddim"
    error = refused(infer_onnx.main, [*model, "--solver", "ddim", "--eta", "0.5"], capsys)
    assert "--eta is not for a sampler" in error
    proto = onnx.load(samplers("ddim"))
    card = json.loads(proto.metadata_props[0].value)
    card["probe"]["output"][5] += 40
    onnx.helper.set_model_props(proto, {infer_onnx.METADATA_KEY: json.dumps(card)})
    save_sealed(proto, "x.onnx")
    error = refused(infer_onnx.main, ["--model", "x.onnx", "--check"], capsys, code=5)
    assert "differs by 40 grey levels" in error


def test_a_sampler_that_differs_from_torch_in_one_setting_is_not_written(
    tiny_run, exported, in_tmp, monkeypatch, capsys
):
    """All settings are compared: the last one, too."""
    without_exporting(monkeypatch, exported)
    last = export.sampler_settings(infer_onnx.load_model(exported, "cpu").card)[-1]
    draw = infer_onnx.sample

    def sample(model, labels, **setting):
        images = draw(model, labels, **setting)
        return images ^ 2 if setting == last else images  # two grey levels away

    monkeypatch.setattr(infer_onnx, "sample", sample)
    with pytest.raises(SystemExit) as stop:
        export.main(["ddim", "--sampler", "--checkpoint", str(tiny_run), "--output", "x.onnx"])
    assert stop.value.code == 5 and list(in_tmp.iterdir()) == []
    assert "grey levels from torch's" in capsys.readouterr().err


def test_a_sampler_whose_samples_are_not_finite_is_not_written(
    tiny_run, exported, in_tmp, monkeypatch, capsys
):
    without_exporting(monkeypatch, exported)
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    checkpoint["ema"]["head.bias"][:] = torch.nan
    torch.save(checkpoint, "broken.pt")
    argv = ["ddim", "--sampler", "--checkpoint", "broken.pt", "--output", "x.onnx"]
    error = refused(export.main, argv, capsys, code=5, alone=False)
    assert "not finite" in error and not Path("x.onnx").exists()


@pytest.mark.parametrize("flag", ["--list-classes", "--info", "--card", "--check"])
def test_what_makes_no_images_takes_no_output(flag, in_tmp, capsys):
    given = ["--output", "x.png", "--class", "Bag", "--steps", "4", "--no-names"]
    error = refused(infer_onnx.main, [flag, *given], capsys)
    assert f"{flag} makes no images: leave out --class, --steps, --output, --no-names" in error


def test_a_model_s_name_is_no_pattern(exported, in_tmp, capsys):
    """In runs/ the newest file of this very name is found."""
    for name in ("ddim[1]", "ddim1"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, f"{name}.onnx").write_bytes(exported.read_bytes())
    assert infer_onnx.find_model("ddim[1]") == Path("runs/ddim[1]/ddim[1].onnx")
    for newest, oldest in (("a", "b"), ("b", "a")):
        for time, name in enumerate((oldest, newest)):
            Path("runs", name).mkdir(exist_ok=True)
            shutil.copy(exported, f"runs/{name}/ddim.onnx")
            os.utime(f"runs/{name}/ddim.onnx", (time, time))
        assert infer_onnx.find_model("ddim") == Path(f"runs/{newest}/ddim.onnx")
    for name in ("dd*1", "ddim?", "**"):
        argv = ["--model", name, "--list-classes"]
        assert f"no model {name!r}" in refused(infer_onnx.main, argv, capsys, code=3)


OPTIONS = {
    "ddpm": [
        {"steps": 12, "guidance": 1.5, "guidance_interval": (0.1, 0.4)},
        {"steps": 6, "guidance": 1, "variance": "large"},
    ],
    "ldm": [
        {"steps": 8, "guidance": 2, "guidance_interval": (0.1, 0.4), "solver": "dpm++"},
        {"steps": 5, "guidance": 0, "eta": 1, "solver": "ddim"},
    ],
    "gan": [{}, {"truncation": 0.5}],
    "vae": [{}, {"truncation": 0.5}],
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, option) for name in OPTIONS for option in OPTIONS[name]]
)
def test_pictures_of_the_other_models_equal_those_of_torch(tiny_runs, exports, name, options):
    script, checkpoint, network = torch_network(name, tiny_runs(name))
    known = {"config": checkpoint["config"]} if "steps" in options else {}
    if name == "vae":
        known["prior"] = checkpoint["prior"]
    labels = torch.arange(10).repeat(2)
    images = script.sample(model=network, labels=labels, seed=5, **known, **options)
    expected = common.to_uint8(images).numpy()
    model = infer_onnx.load_model(exports(name), "cpu")
    for batch_size in (20, 7):
        found = infer_onnx.sample(model, labels.tolist(), seed=5, batch_size=batch_size, **options)
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert found.std() > 5  # not all black


@pytest.mark.parametrize("name", ["vae", "gan"])
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (["interpolate", "--vary", "noise"], ["--interpolate", "noise"]),
        (["interpolate", "--vary", "class"], ["--interpolate", "class"]),
        ([], ["--truncation", "0.4"]),
    ],
)
def test_interpolation_and_truncation_equal_those_of_torch(
    tiny_runs, exports, in_tmp, name, command, flags
):
    asked = ["--class", "o,su", "--num-samples", "4", "--seed", "3"]
    at = ["--checkpoint", str(tiny_runs(name)), "--output", "torch.npz"]
    if command:
        assert explore.main([command[0], name, *command[1:], *asked, *at]) == 0
    else:
        assert importlib.import_module(name).main([*flags, *asked, *at]) == 0
    argv = ["--model", str(exports(name)), *flags, *asked, "--output", "onnx.npz"]
    assert infer_onnx.main(argv) == 0
    expected, found = np.load("torch.npz"), np.load("onnx.npz")
    assert np.array_equal(expected["y"], found["y"])
    assert np.abs(expected["x"].astype(int) - found["x"]).max() <= 1


def test_reconstruction_and_interpolation_of_images_equal_those_of_torch(
    tiny_runs, exports, in_tmp, capsys
):
    config = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)["config"]
    images = common.load_data("kmnist", config["data_dir"], train=False).images
    for i, crop in enumerate((slice(None), slice(2, 30))):  # 32x32 as it is, 28x28 to be padded
        Image.fromarray(images[i, 0, crop, crop].numpy()).save(f"{i}.png")
    for flags in (
        ["--reconstruct", "0.png", "1.png"],
        ["--between", "0.png", "1.png", "--num-samples", "5"],
    ):
        flags = [*flags, "--class", "su"]
        command = [flags[0].removeprefix("--"), "vae", *flags[1:]]
        at = ["--checkpoint", str(tiny_runs("vae")), "--output", "torch.npz"]
        assert explore.main([*command, *at]) == 0
        argv = ["--model", str(exports("vae")), *flags, "--output", "onnx.npz"]
        assert infer_onnx.main(argv) == 0
        found = np.load("onnx.npz")["x"]
        assert np.abs(np.load("torch.npz")["x"].astype(int) - found).max() <= 1
        said = capsys.readouterr().out
        assert "seed" not in said and " s, model " in said  # it would change nothing
    assert len(found) == 5


def test_images_of_no_class_are_called_so(exports, in_tmp, capsys):
    flags = ["--model", str(exports("ldm")), "--steps", "2", "--class", "o,su", "--output", "x.png"]
    for guidance in ("0", "1"):
        assert infer_onnx.main([*flags, "--guidance", guidance]) == 0
        said = "guidance 0 ignores the class"
        assert (said in capsys.readouterr().out) == (guidance == "0")
    for ends in ("0 1", "0.25 0.25"):
        argv = ["--guidance", "2", "--guidance-interval", *ends.split()]
        assert infer_onnx.main([*flags, *argv]) == 0
        said = "guidance 2 counts as 1: no step lies in --guidance-interval"
        assert (said in capsys.readouterr().out) == (ends != "0 1")


def test_a_session_has_the_threads_that_were_asked_for(exports):
    for threads in (1, 2):
        model = infer_onnx.load_model(exports("ldm"), "cpu", threads)
        for session in (model.session, *model.parts.values()):
            assert session.get_session_options().intra_op_num_threads == threads


def test_latency_tells_medians_per_evaluation_and_images_per_second(
    exports, monkeypatch, capsys, in_tmp
):
    """With a clock of a tenth of a second an evaluation, whatever the batch."""
    now, run = [0.0], infer_onnx.run_session

    def timed(session, **feed):
        now[0] += 0.1
        return run(session, **feed)

    monkeypatch.setattr(infer_onnx, "run_session", timed)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    assert latency.main(["--model", str(exports("ddim")), "--steps", "2", "--guidance", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]  # after the export
    rows = np.array(rows, float)
    batches = np.array([1, 4, 16, 64])
    assert np.allclose(rows[:, 0], batches) and np.allclose(rows[:, 1], 100)
    assert np.allclose(rows[:, 2], 100 / batches, atol=0.01)
    assert np.allclose(rows[:, 3], batches / 0.2)  # two evaluations for each image


@pytest.mark.parametrize("name", ["vae", "gan", "ddpm", "ddim", "ldm"])
def test_every_model_is_sampled_checked_and_timed_without_torch(exports, tmp_path, name):
    at = ["infer_onnx.py", "--model", exports(name)]
    flags = split("--class su --num-samples 2 --output x.png")
    steps = ["--steps", "2"] if name in ("ddpm", "ddim", "ldm") else []
    timed = ["benchmarks/latency.py", *at[1:], *steps]
    done = infer([*at, *flags], [*at, "--check"], timed, [*at, "--info"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, checked, timed, info, _ = re.split(r"^\*\n", done.stdout, flags=re.MULTILINE)
    assert Image.open(tmp_path / "x.png").text["model"] == name
    assert f"check passed: {name}'s outputs" in checked
    assert len(timed.splitlines()) == 6
    info = json.loads(info)
    assert info["model"] == name and info["training"]["step"] > 0 and len(info["sha256"]) == 64
    assert len(info["class_names"]) == 10 and info["parameters"] > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(("name", "part"), [("vae", "encoder"), ("ldm", "decoder")])
def test_a_part_says_whose_it_is(name, part):
    shipped = ROOT / "pretrained"
    with pytest.raises(infer_onnx.ModelError, match=f"is a part of .*/{name}.onnx: give that file"):
        infer_onnx.load_model(shipped / f"{name}_{part}.onnx", "cpu")


@pytest.mark.parametrize(("name", "part"), [("vae", "encoder"), ("ldm", "decoder")])
def test_the_check_is_of_the_second_file_too(exports, capsys, name, part):
    model = infer_onnx.load_model(exports(name), "cpu")
    infer_onnx.check(model)
    assert capsys.readouterr().out.count("check passed: ") == 2
    model.card["parts"][part]["output"][3] += 0.01
    with pytest.raises(infer_onnx.RunError, match=f"{part}'s outputs differ by 1.0e-02"):
        infer_onnx.check(model)
    assert capsys.readouterr().out == ""  # nothing has passed before all has
    del model.card["parts"][part]["output"]  # as in files of an earlier export.py
    with pytest.raises(infer_onnx.RunError, match=f"{part} has no reference output"):
        infer_onnx.check(model)


def test_the_card_counts_the_parameters_that_are_exported(exports):
    for name in ("vae", "ldm"):
        files = [exports(name), *exports(name).parent.glob(f"{name}_*.onnx")]
        arrays = [array for file in files for array in onnx.load(file).graph.initializer]
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        count = sum(math.prod(array.dims) for array in arrays if array.data_type in floats)
        said = json.loads(onnx.load(exports(name)).metadata_props[0].value)["parameters"]
        assert len(files) == 2
        assert 0 <= count - said < 0.05 * said


def test_the_card_holds_the_fitted_prior(tiny_runs, exports):
    prior = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)["prior"]
    found = infer_onnx.fitted_prior(infer_onnx.load_model(exports("vae"), "cpu").card)
    assert found.keys() == prior.keys()
    assert all(np.array_equal(found[key], prior[key].numpy()) for key in prior)
    model = infer_onnx.load_model(exports("vae"), "cpu")
    fitted = infer_onnx.sample(model, [0] * 5)
    assert not np.array_equal(fitted, infer_onnx.sample(model, [0] * 5, prior="normal"))


def test_a_prior_of_mixtures_and_single_gaussians(tiny_runs, exports, in_tmp, monkeypatch):
    without_exporting(monkeypatch, exports("vae"))
    checkpoint = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)
    codes = torch.randn(100, checkpoint["network"]["latent_dim"])
    prior = vae.fit_prior(codes, torch.arange(100) // 60, 10, 3, seed=0)
    assert prior["counts"].tolist() == [3, 3] + [1] * 8
    torch.save({**checkpoint, "prior": prior}, "vae.pt")
    assert export.main(["vae", "--checkpoint", "vae.pt", "--output", "vae.onnx"]) == 0
    labels = [0, 1, 2, 9] * 5
    network = vae.ema_network(checkpoint, torch.device("cpu"))
    images = vae.sample(model=network, prior=prior, labels=torch.tensor(labels))
    found = infer_onnx.sample(infer_onnx.load_model("vae.onnx", "cpu"), labels)
    assert np.abs(found.astype(int) - common.to_uint8(images).numpy()).max() <= 1


def test_a_vae_without_a_fitted_prior(tiny_runs, exports, in_tmp, capsys):
    """It interpolates on straight lines between codes, not on a GAN's arcs of constant norm."""
    checkpoint = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)
    torch.save({**checkpoint, "prior": None}, "vae.pt")
    with_card(exports("vae"), "vae.onnx", lambda card: {**card, "prior": None})
    Path("vae_encoder.onnx").write_bytes(exports("vae").with_name("vae_encoder.onnx").read_bytes())
    at = ["--checkpoint", "vae.pt", "--num-samples", "4", "--output", "torch.npz"]
    for way in ([], ["--interpolate", "noise"]):
        flags = ["--num-samples", "4", *way]
        vary = ["interpolate", "vae", "--vary", "noise"]
        assert (explore.main([*vary, *at]) if way else vae.main(at)) == 0
        assert infer_onnx.main(["--model", "vae.onnx", *flags, "--output", "onnx.npz"]) == 0
        assert np.abs(np.load("torch.npz")["x"].astype(int) - np.load("onnx.npz")["x"]).max() <= 1
    capsys.readouterr()
    assert vae.main([*at[:2], "--output", "torch.png"]) == 0
    assert "prior normal" in capsys.readouterr().out
    assert explore.main([*vary, *at[:2], "--output", "torch.png"]) == 0
    assert "prior normal" in capsys.readouterr().out
    fitted = ["--prior", "fitted"]
    for main, argv in ((vae.main, at[:2]), (infer_onnx.main, ["--model", "vae.onnx"])):
        assert "--prior fitted: this model was" in refused(
            main, [*argv, *fitted], capsys, alone=False
        )
    with pytest.raises(infer_onnx.InputError, match="--prior fitted: this model was exported"):
        infer_onnx.sample(infer_onnx.load_model("vae.onnx"), [0], prior="fitted")


def test_samples_of_a_range_of_indices_are_those_of_the_whole(exports):
    """Image i is image first + i of all, so that several machines can share the sampling."""
    for name, options in (("gan", {}), ("ldm", {"steps": 3}), ("ddpm", {"steps": 3})):
        model = infer_onnx.load_model(exports(name), "cpu")
        labels = [i % 10 for i in range(9)]
        whole = infer_onnx.sample(model, labels, seed=2, **options).astype(int)
        part = infer_onnx.sample(model, labels[4:7], seed=2, first=4, **options)
        assert np.abs(whole[4:7] - part).max() <= 1
    with pytest.raises(infer_onnx.InputError, match=f"first {2**63} is not a whole number"):
        infer_onnx.sample(model, labels, first=2**63)


@pytest.mark.parametrize(("name", "part"), [("vae", "encoder"), ("ldm", "decoder")])
def test_a_part_that_is_missing_or_of_another_export_exits_with_3(
    exports, in_tmp, capsys, name, part
):
    content = exports(name).with_name(f"{name}_{part}.onnx").read_bytes()
    Path("x.onnx").write_bytes(exports(name).read_bytes())
    error = refused(infer_onnx.main, ["--model", "x.onnx"], capsys, code=3)
    assert f"{name}_{part}.onnx cannot be read" in error
    Path(f"{name}_{part}.onnx").write_bytes(infer_onnx.sealed(content))
    error = refused(infer_onnx.main, ["--model", "x.onnx"], capsys, code=3)
    assert f"is not the {part} of x.onnx: export both again" in error
    Path(f"{name}_{part}.onnx").write_bytes(content)
    assert infer_onnx.main(["--model", "x.onnx"]) == 0


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("vae", ["--steps", "5"]),
        ("gan", ["--guidance", "2"]),
        ("vae", ["--guidance-interval", "0", "1"]),
        ("gan", ["--reconstruct", "x.png"]),
        ("gan", ["--prior", "normal"]),
        ("ddpm", ["--eta", "0"]),
        ("ddpm", ["--solver", "dpm++"]),
        ("vae", ["--solver", "ddim"]),
        ("ldm", ["--variance", "small"]),
        ("ldm", ["--truncation", "0.5"]),
        ("ddpm", ["--interpolate", "noise"]),
    ],
)
def test_a_flag_that_a_model_has_no_use_for_exits_with_2(exports, in_tmp, capsys, name, flags):
    error = refused(infer_onnx.main, ["--model", exports(name), *flags], capsys)
    assert f"{flags[0]} is not for {name} models: leave it out" in error
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--interpolate", "noise"], "need --num-samples 2"),
        (["--interpolate", "class", "--num-samples", "3"], "give two"),
        (["--interpolate", "class", "--num-samples", "3", "--class", "o,o"], "give two"),
        (["--interpolate", "class", "--num-samples", "3", "--class", "o,ki,ki"], "give two"),
        (["--reconstruct", "a.png", "--interpolate", "noise"], "not allowed with"),
        (["--reconstruct", "a.png"], "need one --class"),
        (["--reconstruct", "a.png", "--class", "o", "--prior", "normal"], "--prior are of noise"),
        (["--reconstruct", "a.png", "--class", "o", "--seed", "5"], "--seed, --truncation and"),
        (
            ["--between", "a.png", "a.png", "--class", "o", "--num-samples", "2", "--seed", "5"],
            "--seed",
        ),
        (["--reconstruct", "a.png", "--class", "o", "--num-samples", "2"], "leave out --num"),
        (
            ["--reconstruct", "a.png", "--class", "o", "--output", "./a.png"],
            "a.png is one of the input images",
        ),
        (["--reconstruct", "a.png", "--class", "o"], "a.png is not a readable image"),
    ],
)
def test_bad_flags_of_a_vae_exit_with_2(exports, in_tmp, capsys, flags, message):
    error = refused(infer_onnx.main, ["--model", exports("vae"), *flags], capsys)
    assert message in error and list(in_tmp.iterdir()) == []


def test_a_checkpoint_of_another_script_is_not_exported(tiny_run, in_tmp):
    torch.save({**torch.load(tiny_run / "ddim.pt", weights_only=True), "model": "vae"}, "vae.pt")
    with pytest.raises(SystemExit, match="2"):
        export.main(["ddpm", "--checkpoint", "vae.pt"])


def test_all_exports_every_script_that_has_a_run(in_tmp, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main(["all"])
    assert "there is no run in runs/" in capsys.readouterr().err
    for name in ("gan", "ddim"):
        (in_tmp / "runs" / name).mkdir(parents=True)
        (in_tmp / "runs" / name / f"{name}.pt").write_bytes(b"")
    seen = []
    monkeypatch.setattr(export, "export", lambda name, *_: seen.append(name) or Path("x.onnx"))
    assert export.main(["all"]) == 0 and seen == ["gan", "ddim"]
    with pytest.raises(SystemExit, match="2"):
        export.main(["all", "--output", "x.onnx"])


def test_labels_out_of_range_never_reach_the_network(loaded):
    for labels in ([0, -1], [0, 10], [99], []):
        with pytest.raises(ValueError, match="labels"):
            infer_onnx.sample(loaded, labels, steps=1, guidance=1)


def test_small_weights_sample_like_the_checkpoint_and_their_own_graph(tiny_run, in_tmp):
    flags = ["--checkpoint", str(tiny_run), "--output", "small.onnx", "--weights", "small.pt"]
    assert export.main(["ddim", *flags]) == 0
    assert Path("small.pt").stat().st_size < 0.3 * (tiny_run / "ddim.pt").stat().st_size
    for path in (Path("small.pt"), tiny_run / "ddim.pt"):
        flags = ["--steps", "2", "--output", f"{path.stem}.npz"]
        assert ddim.main(["--checkpoint", str(path), *flags]) == 0
    flags = ["--class", "all", "--steps", "2", "--output", "onnx.npz"]
    assert infer_onnx.main(["--model", "small.onnx", *flags]) == 0
    names = ("small", "ddim", "onnx")
    small, whole, graph = (np.load(f"{name}.npz")["x"].astype(int) for name in names)
    assert np.abs(small - graph).max() <= 1 and np.abs(small - whole).max() <= 3
    weights = torch.load("small.pt", weights_only=True)["ema"]
    assert all(value.dtype == torch.float16 for value in weights.values())


@pytest.mark.parametrize("name", ["gan", "ldm"])
def test_weights_are_stored_as_float16_only_where_that_is_exact(name, tiny_runs, in_tmp):
    """Both files give the same numbers as with the weights that torch's graph has, in float32."""
    flags = ["--checkpoint", str(tiny_runs(name)), "--output", "small.onnx", "--weights", "w.pt"]
    assert export.main([name, *flags]) == 0
    for file in in_tmp.glob("small*.onnx"):
        proto = onnx.load(file)
        casts = {node.input[0]: node for node in proto.graph.node if node.op_type == "Cast"}
        half_bytes = 0
        for tensor in proto.graph.initializer:
            value = onnx.numpy_helper.to_array(tensor)
            assert value.dtype != np.float32 or value.size < 64, tensor.name
            if value.dtype == np.float16:
                half_bytes += value.nbytes
                cast = casts[tensor.name]  # undone: the weight again in float32, under its name
                value = value.astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, cast.output[0]))
                proto.graph.node.remove(cast)
        save_sealed(proto, "whole.onnx")
        assert file.stat().st_size < Path("whole.onnx").stat().st_size - 0.8 * half_bytes
        small, whole = (
            infer_onnx.open_session(path, infer_onnx.read_model(Path(path)), 1)
            for path in (file, "whole.onnx")
        )
        feed = {
            value.name: torch.randint(0, 9, (3,)).numpy()
            if value.type == "tensor(int64)"
            else torch.randn(3, *value.shape[1:]).numpy()
            for value in small.get_inputs()
        }
        assert np.array_equal(small.run(None, feed)[0], whole.run(None, feed)[0])


def test_weights_that_float16_would_change_stay_float32():
    """Also those that it cannot hold, and small tensors, which it would not make smaller."""
    exact = np.linspace(-2, 2, 65, dtype=np.float32)
    values = {
        "exact": exact, "inexact": exact / 3, "large": exact * 60_000, "few": exact[:9],
        "nan": np.where(exact == 0, np.float32(np.nan), exact), "int": np.arange(65),
    }  # fmt: skip
    nodes = [onnx.helper.make_node("Identity", ["exact"], ["y"])]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
    export.store_as_float16(graph)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert found.keys() == {"exact.half", *values} - {"exact"}
    assert found.pop("exact.half").dtype == np.float16
    assert all(np.array_equal(value, values[k], value.dtype != int) for k, value in found.items())
    assert [(node.op_type, *node.output) for node in graph.node] == [
        ("Cast", "exact"), ("Identity", "y"),
    ]  # fmt: skip


def broken_weights(proto):
    """One weight of the graph changed by a little."""
    weights = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[0] += 0.05
    weights.raw_data = values.tobytes()


def test_a_graph_that_differs_is_not_kept(exported, tiny_run, in_tmp, monkeypatch, capsys):
    proto = onnx.load(exported)
    broken_weights(proto)
    monkeypatch.setattr(export, "export_graph", lambda *_: proto)
    with pytest.raises(SystemExit, match="5"):
        export.main(["ddim", "--checkpoint", str(tiny_run), "--output", "x.onnx"])
    message = "ddim: the network's outputs differ by .*no x.onnx was written"
    assert re.search(message, capsys.readouterr().err)
    assert list(in_tmp.iterdir()) == []


def test_two_files_are_both_new_or_both_old(tiny_runs, exports, in_tmp, monkeypatch, capsys):
    """The disk fills up between them."""
    without_exporting(monkeypatch, exports("ldm"))
    write = Path.write_bytes
    for name in ("x.onnx", "x_decoder.onnx"):
        Path(name).write_bytes(b"old")

    def on_a_full_disk(path, content):
        if path.name.startswith(".x.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", on_a_full_disk)
    argv = ["ldm", "--checkpoint", tiny_runs("ldm"), "--output", "x.onnx"]
    assert "No space left" in refused(export.main, argv, capsys, code=5, alone=False)
    left = {path.name: path.read_bytes() for path in in_tmp.iterdir()}
    assert left == {"x.onnx": b"old", "x_decoder.onnx": b"old"}


def test_a_sampler_that_differs_is_not_trusted(exported, tiny_run, in_tmp, monkeypatch, capsys):
    sample = infer_onnx.sample
    # two grey levels off
    monkeypatch.setattr(infer_onnx, "sample", lambda *a, **k: sample(*a, **k) ^ 2)
    without_exporting(monkeypatch, exported)
    argv = ["ddim", "--checkpoint", tiny_run, "--output", "x.onnx"]
    error = refused(export.main, argv, capsys, code=5, alone=False)
    assert re.search("images differ by .*onnx was written", error)
    assert list(in_tmp.iterdir()) == []


def test_without_a_run_the_shipped_model_is_exported_here_and_stays_as_it_is(in_tmp, monkeypatch):
    before = SHIPPED.read_bytes()
    without_exporting(monkeypatch, SHIPPED)
    for flags in ([], ["--checkpoint", str(SHIPPED.with_suffix(".pt"))]):
        assert export.main(["ddim", *flags]) == 0
        assert (in_tmp / "ddim.onnx").is_file() and SHIPPED.read_bytes() == before
        (in_tmp / "ddim.onnx").unlink()


def test_a_run_is_not_replaced_by_its_weights(tiny_run, capsys):
    before = (tiny_run / "ddim.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        export.main(["ddim", "--checkpoint", str(tiny_run), "--weights", str(tiny_run / "ddim.pt")])
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert (tiny_run / "ddim.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ddim", "--output", "x.bin"], "must end in .onnx"),
        (["ddim", "--checkpoint", "nowhere.pt"], "there is no nowhere.pt"),
        (["diffusion"], "invalid choice: 'diffusion'"),
        ([], "required: name"),
    ],
)
def test_export_refuses_bad_input(in_tmp, capsys, flags, message):
    assert message in refused(export.main, flags, capsys)


# --- Without torch --------------------------------------------------------------------------------


def test_the_shipped_model_samples_a_sneaker_without_torch(tmp_path):
    done = infer(["infer_onnx.py", "--class", "Sneaker"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote sneaker.png" in done.stdout and "running on " in done.stdout and done.stderr == ""
    picture = Image.open(tmp_path / "sneaker.png")
    assert picture.text["class"] == "Sneaker"
    assert picture.text["seed"] == "0"
    assert picture.text["steps"] == str(ddim.STEPS)
    assert picture.text["model_sha256"] == infer_onnx.load_model(SHIPPED, "cpu").sha256
    pixels = np.array(picture)[::8, ::8].astype(int)  # 32x32
    rows = pixels[4:28, 4:28].mean(axis=1)
    assert rows[-14:].mean() > 2 * rows[:6].mean()  # a shoe: dark above, bright below


def test_an_exported_run_is_preferred_to_the_shipped_model(exported, in_tmp, capsys):
    Path("runs/ddim").mkdir(parents=True)
    shutil.copy(exported, "runs/ddim")
    assert infer_onnx.main(split("--class su --steps 2 --output x.png")) == 0
    assert f"model {Path('runs/ddim/ddim.onnx')}" in capsys.readouterr().out


def test_the_classes_and_the_age_of_a_model_are_said(exported, tiny_run, in_tmp, capsys):
    for main, flags in (
        (infer_onnx.main, ["--model", str(exported)]),
        (ddim.main, ["--checkpoint", str(tiny_run)]),
    ):
        with contextlib.suppress(SystemExit):
            main([*flags, "--list-classes"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["  0  o", "  1  ki"] and len(lines) == 10 and not any(in_tmp.iterdir())
        main([*flags, "--class", "ki", "--steps", "1", "--output", "x.png"])
        said = capsys.readouterr().out
        assert re.search(r" is of step \d+, early in its training$", said, re.MULTILINE)
        Path("x.png").unlink()


def test_each_kind_of_picture_has_a_name_of_its_own(in_tmp):
    Image.new("L", (32, 32), 90).save("given.png")
    vae = ["--model", "vae", "--class", "Bag"]
    for argv, name in (
        (["--class", "Bag", "--steps", "2"], "bag.png"),
        (["--class", "Bag,Coat", "--steps", "2"], "samples.png"),
        (["--model", "ldm", "--class", "Bag", "--steps", "2"], "ldm_bag.png"),
        (["--model", "distill", "--class", "Bag"], "distill_bag.png"),
        (["--model", "distill2", "--class", "Bag"], "distill2_bag.png"),
        (["--model", "gan", "--class", "Bag,Coat"], "gan_samples.png"),
        (["--model", "gan", "--interpolate", "noise", "--num-samples", "2"], "gan_interpolate.png"),
        ([*vae, "--reconstruct", "given.png"], "vae_reconstruct.png"),
        ([*vae, "--between", "given.png", "given.png", "--num-samples", "2"], "vae_between.png"),
    ):
        before = {*in_tmp.iterdir()}
        assert infer_onnx.main(argv) == 0
        assert {path.name for path in {*in_tmp.iterdir()} - before} == {name}


def test_names_stand_beside_the_rows(in_tmp):
    at = ["--model", "gan", "--class", "Trouser,Bag", "--num-samples", "3"]
    for flags, count in (([], 2), (["--interpolate", "class"], 1), (["--class", "Bag"], 1)):
        argv = [*at, *flags]
        assert infer_onnx.main([*argv, "--output", "names.png"]) == 0
        assert infer_onnx.main([*argv, "--output", "plain.png", "--no-names"]) == 0
        with Image.open("names.png") as names, Image.open("plain.png") as plain:
            margin = names.width - plain.width
            whole = np.array(names)
            assert margin > 20 and np.array_equal(whole[:, margin:], np.array(plain))
            rows = np.array_split((whole[:, :margin] < 128).sum(axis=1), count)
            assert all(row.sum() > 20 for row in rows)
    # rows of several classes, and a single image, have none
    for classes, count in (("all", 1), ("Bag", 1)):
        argv = ["--model", "gan", "--class", classes, "--num-samples", str(count)]
        assert infer_onnx.main([*argv, "--output", "names.png"]) == 0
        assert infer_onnx.main([*argv, "--output", "plain.png", "--no-names"]) == 0
        assert Path("names.png").read_bytes() == Path("plain.png").read_bytes()


def test_outputs(exported, in_tmp):
    flags = "--steps 2 --class o,ki --num-samples 3 --seed 4"
    at = ["--model", str(exported), "--no-names", *flags.split()]
    for output in ("x.png", "x.npz", "folder/"):
        assert infer_onnx.main([*at, "--output", output]) == 0
    arrays = np.load("x.npz")
    assert arrays["x"].shape == (6, 1, 32, 32) and arrays["y"].tolist() == [0, 0, 0, 1, 1, 1]
    files = sorted(Path("folder").iterdir())
    assert len(files) == 6 and files[3].name == "00003_ki.png"
    with Image.open(files[3]) as picture:
        assert picture.text["class"] == "ki"
        assert picture.text["image"] == "3"
        assert picture.text["seed"] == "4"
        assert np.array_equal(np.array(picture), arrays["x"][3, 0])
    with Image.open("x.png") as picture:
        scale = picture.width // (3 * 34 + 2)
        tiles = np.array(picture)[scale * 36 :: scale, scale * 2 :: scale]
        assert np.array_equal(tiles[:32, :32], arrays["x"][3, 0])


# --- Exit codes -----------------------------------------------------------------------------------


def make_bad_file(kind, exported, tiny_run, path):
    content = exported.read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind == "side-car weights missing":
        options = {"save_as_external_data": True, "location": "x.data", "size_threshold": 0}
        onnx.save(onnx.load(exported), path, **options)
        (path.parent / "x.data").unlink()
        path.write_bytes(infer_onnx.sealed(path.read_bytes()))
    elif kind == "another model":
        proto = onnx.load(exported)
        del proto.metadata_props[:]
        onnx.save(proto, path)
    elif kind == "changed by a tool":
        proto = onnx.load(exported)
        proto.graph.name = "slim"
        onnx.save(proto, path)
    elif kind == "checksum moved by a tool":
        proto = onnx.load(exported)
        onnx.helper.set_model_props(
            proto, {entry.key: entry.value for entry in reversed(proto.metadata_props)}
        )
        onnx.save(proto, path)
    elif kind == "no card":
        proto = onnx.load(exported)
        del proto.metadata_props[:]
        save_sealed(proto, path)
    elif kind == "newer metadata":
        with_card(exported, path, lambda card: {**card, "format": 99})
    elif kind == "unknown solver":
        with_card(exported, path, lambda card: {**card, "solver": "euler"})
    elif kind == "older metadata":
        with_card(exported, path, lambda card: {**card, "format": 2})
    elif kind == "broken metadata":
        with_card(exported, path, lambda card: "{")
    elif kind == "unknown kind":
        with_card(exported, path, lambda card: {**card, "kind": "flow"})
    elif kind != "missing":
        contents = {
            "empty": b"",
            "checksum cut": content[:-5],
            "truncated": content[: len(content) // 2],
            "a flipped bit": bytes([*content[:90_000], content[90_000] ^ 1, *content[90_001:]]),
            "sealed nonsense": infer_onnx.sealed(b"nonsense"),
            "random": np.random.default_rng(0).bytes(5000),
            "a checkpoint": (tiny_run / "ddim.pt").read_bytes(),
            "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        }
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot be read"),
        ("directory", "cannot be read"),
        ("empty", "damaged"),
        ("truncated", "damaged"),
        ("checksum cut", "damaged"),
        ("changed by a tool", "if you changed it: python export.py seal FILE"),
        ("checksum moved by a tool", "damaged"),
        ("a flipped bit", "damaged"),
        ("random", "damaged"),
        ("sealed nonsense", "not an ONNX model"),
        ("no card", "not one that export.py wrote"),
        ("a checkpoint", "export it with export.py"),
        ("a Git LFS pointer", "git lfs pull"),
        ("another model", "not one that export.py wrote"),
        ("newer metadata", "format 99, this infer_onnx.py reads 4 and 5: update infer_onnx.py"),
        ("older metadata", "format 2, this infer_onnx.py reads 4 and 5: export it again"),
        ("broken metadata", "broken metadata"),
        ("unknown kind", "unknown kind 'flow'"),
        ("unknown solver", "unknown solver 'euler'"),
        ("side-car weights missing", "not an ONNX model that onnxruntime can load"),
    ],
)
def test_bad_model_files_exit_with_3(exported, tiny_run, in_tmp, capsys, kind, message):
    make_bad_file(kind, exported, tiny_run, in_tmp / "x.onnx")
    before = sorted(in_tmp.iterdir())
    error = refused(infer_onnx.main, ["--model", "x.onnx"], capsys, code=3)
    assert "x.onnx" in error and message in error and sorted(in_tmp.iterdir()) == before


def test_a_bad_model_file_exits_with_3_without_torch(in_tmp):
    Path("x.onnx").write_bytes(b"")
    done = infer(["infer_onnx.py", "--model", "x.onnx"], cwd=in_tmp)
    assert (done.returncode, done.stdout) == (3, "") and "x.onnx is damaged" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "key", ["format", "solver", *infer_onnx.CARD_KEYS, *infer_onnx.KIND_KEYS["diffusion"]]
)
def test_a_card_without_a_part_exits_with_3(exported, in_tmp, capsys, key):
    with_card(exported, "x.onnx", lambda card: {k: v for k, v in card.items() if k != key})
    error = refused(infer_onnx.main, ["--model", "x.onnx"], capsys, code=3)
    assert key in error


@pytest.mark.parametrize(("name", "key", "values"), WRONG_VALUES)
def test_values_that_export_never_writes_exit_with_3(exports, in_tmp, capsys, name, key, values):
    """They would be drawn as something else, or end in a traceback."""
    for value in values:
        with_card(exports(name), "x.onnx", lambda card, new=value: {**card, key: new})
        error = refused(infer_onnx.main, ["--model", "x.onnx"], capsys, code=3)
        assert f"x.onnx: cannot use the {key} in its metadata" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--info", "--check"], "--info and --check are two questions"),
        (["--class", "Sneakr"], "ddim.onnx has no class 'Sneakr'"),
        (["--class", "99"], "no class '99'"),
        (["--class", "-1"], "no class '-1'"),
        (["--steps", "1001"], "more than the 1000"),
        (["--solver", "dpm++", "--eta", "1"], "--eta 1.0 is for --solver ddim"),
        (["--guidance-interval", "0.8", "0.2"], "right is 0 <= LOW <= HIGH <= 1"),
        (["--guidance-interval", "0.8"], "expected 2 arguments"),
        (["--guidance", "1", "--guidance-interval", "0", "0.8"], "is for a guidance above 1"),
        (["--variance", "small"], "--variance is not for ddim"),
        (["--output", "x.jpg"], "must end in .png or .npz, or be a folder"),
        (["--output", f"{'x' * 250}.png"], "--output xxx"),  # that of its scratch file is too long
        (["--output", "/dev/null"], "/dev/null is no file: name another"),
    ],
)
def test_bad_flags_exit_with_2(exported, in_tmp, capsys, flags, message):
    error = refused(infer_onnx.main, ["--model", exported, *flags], capsys)
    assert message in error and list(in_tmp.iterdir()) == []


def test_fixed_guidance_is_refused(exported, in_tmp, capsys):
    with_card(exported, "x.onnx", lambda card: {**card, "guidance": 1.0, "guidance_fixed": True})
    error = refused(infer_onnx.main, ["--model", "x.onnx", "--guidance", "2"], capsys)
    assert "leaves only --guidance 1.0" in error


def test_unknown_model_names_exit_with_3(in_tmp, capsys):
    refused(infer_onnx.main, ["--model", "vqgan"], capsys, code=3)


def test_failed_check_and_bad_numbers_exit_with_5(exported, in_tmp, capsys):

    def change(card):
        return {**card, "probe": {**card["probe"], "output": [9.0] * 16}}

    with_card(exported, "x.onnx", change)
    error = refused(infer_onnx.main, ["--model", "x.onnx", "--check"], capsys, code=5)
    assert "check failed" in error
    proto = onnx.load(exported)
    for tensor in proto.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype.kind == "f":
            tensor.raw_data = np.full_like(value, np.nan).tobytes()
    save_sealed(proto, "nan.onnx")
    error = refused(infer_onnx.main, ["--model", "nan.onnx", "--output", "x.png"], capsys, code=5)
    assert "not finite" in error and not Path("x.png").exists()


def test_memory_and_disk_faults_exit_with_5(exported, in_tmp, capsys, monkeypatch):
    (in_tmp / "file").write_text("")  # found before the sampling: exit code 2
    error = refused(
        infer_onnx.main, ["--model", exported, "--steps", "1", "--output", "file/x.png"], capsys
    )
    assert "file/x.png cannot be written" in error
    for fault in (MemoryError("cannot allocate"), OSError(errno.ENOSPC, "No space left on device")):

        def fail(*_, fault=fault, **__):
            raise fault

        monkeypatch.setattr(infer_onnx, "next_noise", fail)
        refused(infer_onnx.main, ["--model", exported], capsys, code=5)


def test_ctrl_c_exits_with_130(exported, in_tmp, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer_onnx, "next_noise", stop)
    with pytest.raises(SystemExit, match="130"):
        infer_onnx.main(["--model", str(exported)])


# --- Providers ------------------------------------------------------------------------------------


class Driver:
    """An NVIDIA driver with given answers."""

    def __init__(self, init=0, devices=1, version=13000):
        self.init, self.devices, self.version = init, devices, version

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, count):
        count._obj.value = self.devices
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0


@pytest.mark.parametrize(
    ("driver", "missing", "message"),
    [
        (None, None, "there is no NVIDIA driver"),
        (Driver(init=100), None, "finds no GPU"),
        (Driver(devices=0), None, "finds no GPU"),
        (Driver(version=11040), None, "is for CUDA 11, onnxruntime needs CUDA 13"),
        (Driver(), "cudnn", "libcudnn.so.9 is not installed"),
        (Driver(), "cublasLt", "libcublasLt.so.13 is not installed"),
        (Driver(), None, None),
    ],
)
def test_why_not_cuda(monkeypatch, driver, missing, message):
    def load(name):
        if (name == "libcuda.so.1" and driver is None) or (missing and missing in name):
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(infer_onnx.os, "name", "posix")
    monkeypatch.setattr(infer_onnx.ort, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(infer_onnx.ort, "preload_dlls", lambda: print("noise"), raising=False)
    providers = ["CUDAExecutionProvider"]
    monkeypatch.setattr(infer_onnx.ort, "get_available_providers", lambda: providers)
    trouble = infer_onnx.cuda_trouble()
    assert trouble is None if message is None else message in trouble
    providers[:] = ["CPUExecutionProvider"]
    assert "without CUDA" in infer_onnx.cuda_trouble()


def test_cuda_asked_for_and_not_there_exits_with_4(exported, in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(infer_onnx, "cuda_trouble", lambda: "the cable is out")
    error = refused(infer_onnx.main, ["--model", exported, "--provider", "cuda"], capsys, code=4)
    assert "no CUDA: the cable is out" in error and list(in_tmp.iterdir()) == []
    infer_onnx.main(["--model", str(exported), "--steps", "1"])
    said = "running on CPUExecutionProvider; not on CUDA: the cable is out"
    assert said in capsys.readouterr().out
    with pytest.raises(infer_onnx.InputError, match="'CUDA' is not one of auto, cuda, cpu"):
        infer_onnx.load_model(exported, "CUDA")


class CudaSession:
    """An onnxruntime session that computes on the CPU and reports the provider it is told to."""

    says, fails, made, batches = "CUDAExecutionProvider", None, [], []

    def __init__(self, content, options, providers, enable_fallback):
        assert enable_fallback == 0
        self.made.append(providers)
        self.cuda = providers[0] != "CPUExecutionProvider"
        if self.cuda and self.fails:
            raise RuntimeError(self.fails)
        self.inner = SESSION(content, options, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return [self.says] if self.cuda else ["CPUExecutionProvider"]

    def get_modelmeta(self):
        return self.inner.get_modelmeta()

    def run(self, names, feed):
        self.batches.append(len(feed["y"]))
        return self.inner.run(names, feed)


SESSION = infer_onnx.ort.InferenceSession


@pytest.fixture
def cuda(monkeypatch):
    """A machine on which CUDA seems to be available."""
    fake = type("Fake", (CudaSession,), {"made": [], "batches": []})
    monkeypatch.setattr(infer_onnx, "cuda_trouble", lambda: None)
    monkeypatch.setattr(infer_onnx.ort, "InferenceSession", fake)
    return fake


@pytest.mark.parametrize(("flags", "tf32"), [([], "1"), (["--no-tf32"], "0")])
def test_cuda_is_used_where_it_works(exported, in_tmp, capsys, cuda, flags, tf32):
    sampling = "--class o --num-samples 5 --batch-size 2 --guidance 1 --steps 1"
    flags = [*flags, *sampling.split()]
    assert infer_onnx.main(["--model", str(exported), *flags, "--output", "cuda.npz"]) == 0
    assert "running on CUDAExecutionProvider\n" in capsys.readouterr().out
    (name, options), last = cuda.made[-1]
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == tf32
    assert last == "CPUExecutionProvider"
    assert cuda.batches == [2, 2, 2]  # the last batch is padded, so that all have one shape
    infer_onnx.main(["--model", str(exported), *flags, "--provider", "cpu", "--output", "cpu.npz"])
    assert np.array_equal(np.load("cuda.npz")["x"], np.load("cpu.npz")["x"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"says": "CPUExecutionProvider"}, "could not load its CUDA"),
        ({"fails": "out of memory"}, "out of memory"),
    ],
)
def test_cuda_that_does_not_start_is_reported(exported, in_tmp, capsys, cuda, changes, reason):
    for key, value in changes.items():
        setattr(cuda, key, value)
    assert infer_onnx.main(["--model", str(exported), "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "running on CPUExecutionProvider; not on CUDA: " in out and reason in out
    error = refused(infer_onnx.main, ["--model", exported, "--provider", "cuda"], capsys, code=4)
    assert reason in error
    Path("x.onnx").write_bytes(b"broken")
    refused(
        infer_onnx.main, ["--model", "x.onnx"], capsys, code=3
    )  # a broken file is not CUDA's fault


# --- Files that other tools have changed ----------------------------------------------------------


def changed_by_a_tool(path, keep_seal):
    """Rewrite a file as tools do: all is kept but the name of the graph, and maybe the checksum."""
    proto = onnx.load(path)
    proto.graph.name = "slim"
    kept = [e for e in proto.metadata_props if keep_seal or e.key != infer_onnx.SEAL_KEY]
    onnx.helper.set_model_props(proto, {entry.key: entry.value for entry in kept})
    onnx.save(proto, path)


def test_a_file_without_a_checksum_is_drawn_and_said(exported, in_tmp, capsys):
    shutil.copy(exported, "x.onnx")
    changed_by_a_tool("x.onnx", keep_seal=False)
    argv = ["--model", "x.onnx", "--class", "su", "--steps", "1"]
    assert infer_onnx.main([*argv, "--output", "x.png"]) == 0
    assert capsys.readouterr().err.startswith("note: x.onnx has no checksum: ")
    assert infer_onnx.main(["--model", str(exported), *argv[2:], "--output", "y.png"]) == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(Image.open("x.png"), Image.open("y.png"))


@pytest.mark.parametrize("name", ["gan", "vae", "ldm"])
@pytest.mark.parametrize("keep_seal", [False, True])
def test_a_changed_file_can_be_sealed_with_its_part(exports, in_tmp, capsys, name, keep_seal):
    files = [Path(path.name) for path in sorted(exports(name).parent.glob("*.onnx"))]
    for file in files:
        shutil.copy(exports(name).parent / file, file)
        changed_by_a_tool(file, keep_seal)
    whole = Path(f"{name}.onnx")
    if keep_seal or len(files) == 2:
        refused(infer_onnx.main, ["--model", whole], capsys, code=3)
    for part in set(files) - {whole}:
        error = refused(export.main, ["seal", part], capsys)
        assert f"{part} is a part of {whole}: seal that file, and this one with it" in error
    assert export.main(["seal", str(whole)]) == 0
    assert "check passed" in capsys.readouterr().out
    for file in files:
        proto = onnx.load(file)
        onnx.checker.check_model(proto)
        assert [e.key for e in proto.metadata_props].count(infer_onnx.SEAL_KEY) == 1
    content = whole.read_bytes()
    assert infer_onnx.main(["--model", str(whole), "--check"]) == 0
    assert capsys.readouterr().err == ""
    assert export.main(["seal", str(whole)]) == 0 and whole.read_bytes() == content


def test_a_check_of_some_of_the_outputs_is_none(exported, in_tmp, capsys):
    def shortened(card):
        return {**card, "probe": {**card["probe"], "output": card["probe"]["output"][:1]}}

    with_card(exported, "x.onnx", shortened)
    error = refused(infer_onnx.main, ["--model", "x.onnx", "--check"], capsys, code=5)
    assert "ddim has more or fewer outputs than its export" in error


def test_weights_changed_on_purpose_are_sealed_and_said(exported, in_tmp, capsys):
    proto = onnx.load(exported)
    broken_weights(proto)
    onnx.save(proto, "x.onnx")
    assert export.main(["seal", "x.onnx"]) == 0
    assert "note: the check failed: ddim's outputs differ" in capsys.readouterr().out
    assert infer_onnx.main(["--model", "x.onnx", "--steps", "1", "--output", "x.png"]) == 0
    proto = onnx.load(exported)
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side_{axis}"
    onnx.save(proto, "any.onnx")
    assert export.main(["seal", "any.onnx"]) == 0
    assert "note: ddim has inputs of any size" in capsys.readouterr().out
    with_card(exported, "new.onnx", lambda card: card | {"format": 99})
    assert export.main(["seal", "new.onnx"]) == 0
    assert "note: new.onnx has metadata format 99" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["seal"], "seal with FILE"),
        (["ddim", "x.onnx"], "FILE goes with seal"),
        (["seal", "x.onnx", "--sampler"], "seal takes FILE"),
        (["ddpm", "--sampler"], "--sampler is for ddim, ldm, distill, not for ddpm"),
        (["seal", "x.onnx", "--weights", "x.pt"], "seal takes FILE"),
        (["seal", "none.onnx"], "none.onnx cannot be read"),
        (["seal", "x.onnx"], "x.onnx is not an ONNX file"),
        (["seal", "bare.onnx"], "bare.onnx has no model card"),
        (["seal", "odd.onnx"], "odd.onnx has a broken card"),
    ],
)
def test_what_cannot_be_sealed_exits_with_2(in_tmp, capsys, flags, message):
    Path("x.onnx").write_bytes(b"nonsense")
    proto = onnx.ModelProto(ir_version=8)
    onnx.save(proto, "bare.onnx")
    onnx.helper.set_model_props(proto, {infer_onnx.METADATA_KEY: "[]"})
    onnx.save(proto, "odd.onnx")
    before = {path.name: path.read_bytes() for path in in_tmp.iterdir()}
    assert message in refused(export.main, flags, capsys)
    assert {path.name: path.read_bytes() for path in in_tmp.iterdir()} == before


def test_the_card_is_printed_whole_and_alone(exported, capsys):
    assert infer_onnx.main(["--model", str(exported), "--card"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == infer_onnx.load_model(exported, "cpu").card
    assert printed.err == ""


# --- Around ---------------------------------------------------------------------------------------


def test_inline_metadata_equals_the_requirements():
    text = (ROOT / "infer_onnx.py").read_text()
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///\n", text, re.MULTILINE).group(1)
    inline = tomllib.loads(re.sub("^# ", "", block, flags=re.MULTILINE))
    required = [line for line in (ROOT / "requirements-infer.txt").read_text().splitlines() if line]
    assert [line.replace("'", '"') for line in inline["dependencies"]] == required
    assert inline["requires-python"] == ">=3.11"


@pytest.mark.parametrize(
    ("system", "processor", "package"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
        ("freebsd14", "amd64", "onnxruntime"),
    ],
)
def test_one_package_of_onnxruntime_is_required_everywhere(system, processor, package):
    """The one for GPUs where its wheels are, the plain one elsewhere."""
    machine = {"sys_platform": system, "platform_machine": processor}
    lines = (ROOT / "requirements-infer.txt").read_text().splitlines()
    required = [Requirement(line) for line in lines]
    names = [r.name for r in required if r.marker is None or r.marker.evaluate(machine)]
    assert names == ["numpy", "pillow", package]


def test_onnxruntime_leaves_no_file_in_the_home_folder(tmp_path):
    """Telemetry is off: since 1.29 it leaves a device id, but not where a variable says CI."""
    code = f"import infer_onnx; infer_onnx.load_model({str(SHIPPED)!r}, 'cpu')"
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_two_packages_of_onnxruntime_are_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(infer_onnx.ort, "get_available_providers", lambda: [infer_onnx.CPU])
    monkeypatch.setattr(infer_onnx, "is_installed", lambda package: True)
    assert "overwrite each other: pip uninstall" in infer_onnx.cuda_trouble()
    monkeypatch.setattr(infer_onnx, "is_installed", lambda package: package == "onnxruntime")
    assert "this is onnxruntime without CUDA" in infer_onnx.cuda_trouble()
    # One of the two was uninstalled: a folder is left, which Python imports as an empty package.
    empty = "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')"
    command = [sys.executable, "-c", f"{empty}\n{WITHOUT_TORCH}", str(ROOT / "infer_onnx.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    error = f"infer_onnx.py: error: onnxruntime is incomplete: {infer_onnx.REINSTALL}\n"
    assert (done.returncode, done.stderr, done.stdout) == (4, error, "")


def test_a_symbolic_link_to_the_script_finds_the_shipped_models(tmp_path):
    (tmp_path / "draw.py").symlink_to(ROOT / "infer_onnx.py")
    command = [sys.executable, "draw.py", "--class", "Sneaker"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "sneaker.png").exists()


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    """As with `| head -1`: no traceback, and what was asked for is done."""
    for flags in (["--info", "--model", "vae"], ["--class", "Sneaker"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, str(ROOT / "infer_onnx.py"), *flags]
        with os.fdopen(writer) as stdout:
            done = subprocess.run(
                command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, timeout=120
            )
        assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "sneaker.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["infer_onnx.py --list-classes", "export.py seal gan.onnx"])
def test_a_full_disk_behind_the_output_is_one_line(command, in_tmp):
    shutil.copy(ROOT / "pretrained/gan.onnx", "gan.onnx")
    name, *flags = split(command)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / name), *flags], stdout=full, stderr=subprocess.PIPE,
            text=True, timeout=120, env=environment,
        )  # fmt: skip
    assert done.returncode == 5 and done.stderr.count("\n") == 1 and "No space" in done.stderr


class NarrowConsole(io.TextIOWrapper):
    """Standard output of a console that knows ASCII alone, whose reader has gone."""

    def __init__(self):
        reader, writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(writer, "wb"), encoding="ascii", write_through=True)


def test_any_console_and_any_class_name_will_do(in_tmp, monkeypatch, data_dir):
    """Training, sampling, export, and sampling from that; ~ and .PNG in names of files."""
    monkeypatch.setenv("HOME", str(in_tmp))
    monkeypatch.setattr(sys, "stdout", NarrowConsole())
    images = common.load_data("kmnist", data_dir).images
    for name in (b"caf\xe9", "\u9774".encode()):  # the first is not UTF-8
        folder = Path("pictures", os.fsdecode(name))
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(images[i, 0].numpy()).save(folder / f"{i}.png")
    flags = ["--train", "--epochs", "1", *TINY_FLAGS["ddim"], "--data=~/pictures"]
    assert ddim.main(flags) == 0
    assert ddim.main(["--checkpoint=~/runs/ddim", "--steps", "1", "--output=~/\udce9.PNG"]) == 0
    assert export.main(["ddim", "--output=~/x.ONNX"]) == 0
    monkeypatch.setattr(sys, "stdout", NarrowConsole())  # runs.py has changed the first
    assert infer_onnx.main(["--model=~/x.ONNX", "--info"]) == 0
    asked = ["--model=~/x.ONNX", "--steps", "1"]
    assert infer_onnx.main([*asked, "--output=~/\u9774.PNG"]) == 0
    assert infer_onnx.main([*asked, "--class", "\u9774", "--output", "~other/y.png"]) == 0
    with Image.open("\u9774.PNG") as picture:
        assert picture.text["class"] == "caf\\udce9, \u9774"
        a, b = (np.array(p).astype(int) for p in (picture, Image.open("\udce9.PNG")))
        assert np.abs(a - b).max() <= 1
    assert Path("~other/y.png").exists()


@pytest.mark.parametrize("name", ["vae", "gan", "ddpm", "ddim", "ldm"])
def test_help_texts_are_the_words_of_the_scripts(name):
    """But for the models that have a flag and the default, which is that of the model."""
    parsers = [importlib.import_module(module).build_parser() for module in (name, "infer_onnx")]
    script, without_torch = ({a.dest: a.help for a in parser._actions} for parser in parsers)
    flags = script.keys() & infer_onnx.MODEL_FLAGS[name]
    for dest in flags:
        words = script[dest].rsplit(" (", 1)[0]
        assert without_torch[dest].startswith(f"{words}; "), dest
    assert len(flags) >= {"vae": 2, "gan": 1}.get(name, 4)


@pytest.mark.parametrize("file", ["ddim.onnx", "ddim.pt"])
def test_shipped_files_are_small(file):
    assert (ROOT / "pretrained" / file).stat().st_size <= 5e6
