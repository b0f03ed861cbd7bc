"""Every flag of every command with values outside its range: exit code 2 and one line."""

import argparse
import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, refused

COMMANDS = [*TINY_FLAGS, "distill", "export", "infer_onnx", "evaluate"]
BENCHMARKS = [
    "clients", "extractor", "libraries", "reconstructions", "report", "settings", "start",
]  # fmt: skip
PATHS = {"data", "data_dir", "folders", "models", "node", "output"}  # of benchmarks
REQUIRED = {"export": ["ddim"]}  # arguments without which nothing is parsed
WRONG = {  # values for the argparse types that are no plain number
    "whole_numbers": ("", "x", "0", "-1", "1.5", "8,", "1,2,3,4,5,6", "65537", "8 16"),
    "path_text": ("",),
    "file_path": ("",),
    "output_path": ("", "x", "x" * 300),
    "colour": ("", "x", "#fff8"),
    "": (),  # text and switches
    "shard": ("", "1", "0/3", "4/3", "-1/3", "1/0", "1/x", "x/2", "1/2/3", "1.5/2"),
}
SYMBOLS = ("", "x", "nan", "inf", "-inf", "1e999", "½")


def actions(command):
    parser = importlib.import_module(command).build_parser()
    return parser, [
        action for action in parser._actions if action.option_strings and action.dest != "help"
    ]


def range_of(parse):
    """kind, low, high, above of a type that `number` made."""
    return inspect.getclosurevars(parse).nonlocals


def wrong_values(action):
    """Values that a flag must refuse, as text."""
    if action.choices:
        return ["", "nonsense", *(f"{choice}x" for choice in action.choices)]
    name = getattr(action.type, "__qualname__", "")
    if name.startswith("several"):  # numbers with commas
        inner = range_of(action.type)["parse"]
        inner_is_number = getattr(inner, "__qualname__", "").startswith("number")
        return ["", "1,", "1,x", ",", *(wrong_numbers(inner) if inner_is_number else ["nonsense"])]
    if name.startswith("number"):
        return wrong_numbers(action.type)
    return WRONG[name]


def wrong_numbers(parse):
    limits = range_of(parse)
    kind, low, high = limits["kind"], limits["low"], limits["high"]
    values = [*SYMBOLS, str(low - 1)]
    values += ["1.5", "1e3"] if kind is int else [str(low - 1e-6)]
    values += [str(low)] if limits["above"] else []
    return values + ([] if high == math.inf else [str(high + 1), str(high * 10 + 10)])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export"])
def test_a_value_out_of_range_is_refused_in_a_line(command, capsys):
    parser, flags = actions(command)
    cases = [(action.option_strings[0], wrong_values(action)) for action in flags]
    assert sum(len(values) for _, values in cases) > 40
    for flag, values in cases:
        for value in values:
            refuse(command, parser, [f"{flag}={value}"], capsys, flag)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_takes_no_path_without_a_name(name):
    parser = importlib.import_module(f"benchmarks.{name}").build_parser()
    paths = [action for action in parser._actions if action.dest in PATHS]
    assert paths and Path not in [action.type for action in parser._actions]
    for action in paths:
        with pytest.raises(argparse.ArgumentTypeError, match="the name is empty"):
            action.type("")


def refuse(command, parser, argv, capsys, said):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([*REQUIRED.get(command, []), *argv])
        pytest.fail(f"{command}.py accepts {argv}")
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1, argv
    assert output.err.startswith(f"{command}.py: error: ") and said in output.err, argv


@pytest.mark.parametrize("command", COMMANDS)
def test_the_ends_of_every_range_are_accepted_and_values_are_needed(command, capsys):
    parser, flags = actions(command)
    for action in flags:
        flag = action.option_strings[0]
        if action.nargs != 0:
            refuse(command, parser, [flag], capsys, flag)
        if getattr(action.type, "__qualname__", "").startswith("number"):
            limits = range_of(action.type)
            ends = [limits["low"] + (1e-9 if limits["above"] else 0), limits["high"]]
            for value in ends if ends[1] < math.inf else ends[:1]:
                pair = isinstance(action.nargs, int)  # two ends of an interval
                argv = [flag, *[str(value)] * action.nargs] if pair else [f"{flag}={value}"]
                args = parser.parse_args([*REQUIRED.get(command, []), *argv])
                assert getattr(args, action.dest) == ([value] * action.nargs if pair else value)
    refuse(command, parser, ["--no-such-flag"], capsys, "--no-such-flag")


# What does not go together, or is not there: (commands, flags, a part of the line).
SCRIPTS = tuple(TINY_FLAGS)
DIFFUSION = ("ddpm", "ddim", "ldm")
COMBINATIONS = [
    (SCRIPTS, ["--class", "Snaeker"], ".pt has no class 'Snaeker'"),
    (SCRIPTS, ["--train", "--list-classes"], "--list-classes: to sample from a model"),
    (SCRIPTS, ["--class", "o,"], "no class ''"),
    (SCRIPTS, ["--class", "10"], "no class '10'"),
    (SCRIPTS, ["--output", "x.jpg"], "must end in"),
    (SCRIPTS, ["--checkpoint", "nowhere.pt"], "there is no nowhere.pt"),
    (SCRIPTS, ["--epochs", "3"], "--epochs: to train a model, with --train or --resume"),
    (SCRIPTS, ["--train", "--class", "0"], "--class: to sample from a model, not to train"),
    (SCRIPTS, ["--train", "--epochs", "1", "--minutes", "1"], "not both"),
    (SCRIPTS, ["--train", "--data", "nowhere"], "no data set 'nowhere'"),
    (SCRIPTS, ["--train", "--data", "mnist", "--data-dir", "nowhere"], "nowhere is not a folder"),
    (SCRIPTS, ["--train", "--batch-size", "61"], "--batch-size 61 is not in 1..60"),
    (SCRIPTS, ["--train", "--background", "red"], "--background is for folders"),
    (SCRIPTS, ["--train", "--checkpoint", "x"], "--checkpoint is to sample from"),
    (SCRIPTS, ["--train", "--resume"], "--train begins a run, --resume continues one"),
    (SCRIPTS, ["--resume", "--run-dir", "nowhere"], "there is no nowhere"),
    (SCRIPTS, ["--resume"], "train first"),
    (DIFFUSION, ["--steps", "1001"], "--steps 1001 is more than the 1000"),
    (DIFFUSION, ["--train", "--widths", "16,16,16,16,16"], "--widths"),
    (
        ("ddpm", "ddim"),
        ["--train", "--widths", "16", "--depths", "1,2"],
        "must have the same length",
    ),
    (("ddpm", "ddim", "ldm"), ["--train", "--widths", "48", "--depths", "1"], "a multiple of 32"),
    (DIFFUSION, ["--train", "--emb-channels", "18"], "a multiple of 4"),
    (("vae", "gan"), ["--train", "--widths", "8,8,8,8,7"], "the last must be even"),
    (SCRIPTS, ["--output", "x.gif"], "python explore.py gif "),
    (("ddim", "vae", "gan"), ["--interpolate=noise"], "python explore.py interpolate "),
    (DIFFUSION, ["--filmstrip"], "python explore.py filmstrip "),
    (("ldm",), ["--train", "--autoencoder-widths", "8"], "must be two numbers"),
    (("ldm",), ["--train", "--stage", "2", "--autoencoder", "nowhere"], "there is no nowhere"),
    (("ldm",), ["--train", "--stage", "1", "--autoencoder", "nowhere"], "or --stage 1"),
    (
        ("gan",),
        ["--train", "--loss", "hinge", "--gamma", "1", "--penalty-every", "2"],
        "--gamma, --penalty-every has no effect: --loss hinge --gamma 1 is without a penalty",
    ),
    (
        ("gan",),
        ["--train", "--gamma", "0", "--penalty-every", "2"],
        "--penalty-every has no effect",
    ),
    (("ldm",), ["--train", "--stage", "1", "--stage-1-share", "0.3"], "training of both stages"),
    (("ldm",), ["--train", "--autoencoder", "x", "--stage-1-share", "0.3"], "of both stages"),
    (("ldm",), ["--train", "--autoencoder", "x", "--stage", "both"], "or --stage both"),
]
COMBINED = [(name, flags, message) for names, flags, message in COMBINATIONS for name in names]


@pytest.mark.parametrize(("name", "flags", "message"), COMBINED)
def test_what_does_not_go_together_is_refused_in_a_line(
    name, flags, message, tiny_runs, in_tmp, data_dir, capsys
):
    if "--train" in flags:
        flags = [*TINY_FLAGS[name], "--data-dir", data_dir, *flags]
    elif "--resume" not in flags:
        flags = ["--checkpoint", str(tiny_runs(name)), *flags]
    error = refused(importlib.import_module(name).main, flags, capsys)
    assert error.startswith(f"{name}.py: error: ") and message in error
    assert not list(in_tmp.glob("*.p*")) and not list(in_tmp.rglob("*.pt"))


@pytest.mark.parametrize("name", DIFFUSION)
def test_steps_and_guidance_are_those_that_the_help_says(name, tiny_runs, in_tmp, monkeypatch):
    script, run_dir, seen = importlib.import_module(name), str(tiny_runs(name)), []
    monkeypatch.setattr(
        script, "sample", lambda **given: seen.append(given) or torch.zeros(1, 1, 32, 32)
    )
    assert script.main(["--checkpoint", run_dir, "--class", "0", "--output", "x.png"]) == 0
    said = {action.dest: action.help for action in script.build_parser()._actions}
    assert said["guidance"].endswith(f"always, else {seen[0]['guidance']:g})")
    assert said["steps"].endswith(f"({seen[0]['steps']})") and seen[0]["steps"] == script.STEPS
