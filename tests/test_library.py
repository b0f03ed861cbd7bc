"""sample() of the scripts and of infer_onnx.py: the same arguments, defaults, checks and words."""

import functools
import importlib

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import ddpm
import infer_onnx

NAMES = ["vae", "gan", "ddpm", "ddim", "ldm", "distill"]
SNEAKER, BAG = 7, 8
FEW = {"steps": 3}  # of the diffusion models


@functools.cache
def samplers(name):
    """sample() of a script and of infer_onnx.py, with the shipped model; both give uint8 arrays."""
    script = importlib.import_module(name)
    stem = "ddim" if name == "ddpm" else name
    checkpoint = torch.load(ROOT / f"pretrained/{stem}.pt", weights_only=True)
    network = script.ema_network(checkpoint, torch.device("cpu"))
    model = infer_onnx.load_model(ROOT / f"pretrained/{name}.onnx", "cpu", 1)

    def with_torch(labels, **options):
        return common.to_uint8(script.sample(network, labels, **options)).numpy()

    return with_torch, functools.partial(infer_onnx.sample, model)


def few(name):
    return FEW if name in ("ddpm", "ddim", "ldm") else {}


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_names_or_indices_in_a_list_array_or_tensor(name):
    for sample in samplers(name):
        expected = sample([SNEAKER, BAG], **few(name))
        for labels in (
            ["Sneaker", "bag"],
            ["Sneaker", np.int64(BAG)],
            (torch.tensor(SNEAKER), "B"),
            np.array([SNEAKER, BAG], np.uint8),
            np.array(["Sneaker", "Bag"]),
            torch.tensor([SNEAKER, BAG]),
            range(SNEAKER, BAG + 1),
        ):
            assert np.array_equal(sample(labels, **few(name)), expected), labels


def test_options_may_be_numbers_of_numpy():
    for sample in samplers("ddim"):
        plain = sample([BAG], steps=2, guidance=2.0, solver="ddim", eta=0.5)
        numbers = {"guidance": np.float64(2), "eta": np.float64(0.5), "steps": np.int64(2)}
        assert np.array_equal(sample([BAG], solver="ddim", **numbers), plain)


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_the_same(name, monkeypatch):
    if name == "ddpm":  # test_consistency.py compares the numbers of steps; these take less time
        monkeypatch.setattr(ddpm, "STEPS", 20)
        monkeypatch.setitem(samplers(name)[1].args[0].card, "steps", 20)
    images = [sample([SNEAKER]).astype(int) for sample in samplers(name)]
    assert np.abs(images[0] - images[1]).max() <= 1


RANGE = "a list of 0..9 or of class names"
WRONG_LABELS = [
    ([], f"labels [] are not {RANGE}"),
    (torch.tensor([], dtype=torch.int64), f"are not {RANGE}"),
    ("Sneaker", f"labels 'Sneaker' are not {RANGE}"),
    (7, f"labels 7 are not {RANGE}"),
    (None, f"labels None are not {RANGE}"),
    (np.array(7), f"are not {RANGE}"),
    ([0, 17], f"labels are not {RANGE}: 17 is none"),
    (np.array([-1]), f"labels are not {RANGE}: -1 is none"),
    (torch.tensor([1.0]), f"labels are not {RANGE}: 1.0 is none"),
    ([[1, 2]], f"labels are not {RANGE}: [1, 2] is none"),
    ([True], f"labels are not {RANGE}: True is none"),
    (["Hat"], "the model has no class 'Hat'"),
    (["S"], "class 'S' is ambiguous, give an index: 5 (Sandal), 6 (Shirt), 7 (Sneaker)"),
    (["all"], "all means every class"),
]
NUMBERS = [
    ({"seed": -1}, "seed -1 is not a whole number from 0 to 9223372036854775807"),
    ({"seed": 2**63}, f"seed {2**63} is not a whole number from 0"),
    ({"seed": 0.0}, "seed 0.0 is not a whole number"),
    ({"batch_size": 0}, "batch_size 0 is not a whole number from 1"),
]
WALKS = [
    ({"guidance": -1}, "guidance -1 is not a number from 0"),
    ({"guidance": float("nan")}, "guidance nan is not a number from 0"),
    ({"guidance": float("inf")}, "guidance inf is not a number from 0 to 1000"),
    ({"guidance": 1001}, "guidance 1001 is not a number from 0 to 1000"),
    ({"guidance": "2"}, "guidance '2' is not a number from 0"),
    ({"steps": 0}, "steps 0 is not a whole number from 1"),
    ({"steps": 2.5}, "steps 2.5 is not a whole number from 1"),
    ({"steps": True}, "steps True is not a whole number from 1"),
    ({"steps": 1001}, "--steps 1001 is more than the 1000 timesteps of a walk"),
    ({"guidance_interval": 0.8}, "guidance_interval 0.8 is not a pair (low, high)"),
    ({"guidance_interval": (0, 2)}, "guidance_interval 2 is not a number from 0 to 1"),
    ({"guidance_interval": (0.8, 0.2)}, "guidance interval 0.8 0.2"),
]
SOLVERS = [
    ({"eta": 2}, "eta 2 is not a number from 0 to 1"),
    ({"solver": "euler"}, "solver 'euler' is not one of ddim, dpm++"),
    ({"solver": "dpm++", "eta": 0.5}, "--eta 0.5 is for --solver ddim: dpm++ is deterministic"),
]
CODES = [
    ({"truncation": 0}, "truncation 0 is not a number from 0.1"),
    ({"truncation": "1"}, "truncation '1' is not a number from 0.1"),
]
WRONG_OPTIONS = {
    "vae": [*NUMBERS, *CODES, ({"prior": "flat"}, "prior 'flat' is not one of fitted, normal")],
    "gan": [*NUMBERS, *CODES],
    "ddpm": [*NUMBERS, *WALKS, ({"variance": 1}, "variance 1 is not one of small, large")],
    "ddim": [*NUMBERS, *WALKS, *SOLVERS],
    "ldm": [*NUMBERS, *WALKS, *SOLVERS],
    "distill": NUMBERS,
}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_in_the_same_words(name):
    for sample in samplers(name):
        for labels, message in WRONG_LABELS:
            with pytest.raises(ValueError) as error:
                sample(labels)
            assert message in str(error.value), labels
        for options, message in WRONG_OPTIONS[name]:
            with pytest.raises(ValueError) as error:
                sample([0], **options)
            assert message in str(error.value), options


OPTIONS = {
    "steps": 3, "guidance": 2.0, "guidance_interval": (0, 1), "solver": "ddim", "eta": 0.0,
    "variance": "small", "truncation": 1.0, "prior": "normal",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_another_model_is_not_ignored(name):
    with_torch, without_torch = samplers(name)
    for option in OPTIONS.keys() - {*infer_onnx.MODEL_FLAGS[name]}:
        with pytest.raises(TypeError, match=option):
            with_torch([0], **{option: OPTIONS[option]})
        flag = "--" + option.replace("_", "-")
        with pytest.raises(ValueError, match=f"{flag} is not for {name} models: leave it out"):
            without_torch([0], **{option: OPTIONS[option]})


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ldm"])
@pytest.mark.parametrize(("dropout", "only"), [(0, 1.0), (1, 0.0)])
def test_a_guidance_that_was_not_trained_is_no_default(name, dropout, only):
    script = importlib.import_module(name)
    stem = "ddim" if name == "ddpm" else name
    checkpoint = torch.load(ROOT / f"pretrained/{stem}.pt", weights_only=True)
    checkpoint["config"]["label_dropout"] = dropout
    network = script.ema_network(checkpoint, torch.device("cpu"))
    expected = script.sample(network, [0], steps=2, guidance=only)
    assert torch.equal(script.sample(network, [0], steps=2), expected)
    with pytest.raises(common.InputError, match=f"leaves only --guidance {only}"):
        script.sample(network, [0], steps=2, guidance=2.0)
