"""Training that is broken says so, and training that is not says nothing."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LOOPS, ROOT, TINY_FLAGS, lines_of, refused

import common
import ddim
import runs

# --- Data -----------------------------------------------------------------------------------------


def pictures(count=20, low=0, high=255, seed=0):
    """Grey pictures of noise, no two alike, that reach both values."""
    rng = np.random.default_rng(seed)
    x = rng.integers(low, high + 1, (count, 1, 32, 32), dtype=np.uint8)
    x[0, 0, 0, :2] = low, high
    return torch.from_numpy(x)


def warnings_of(images, labels=None, names=("a", "b")):
    labels = torch.arange(len(images)) % 2 if labels is None else torch.tensor(labels)
    return common.ImageData(images, labels, list(names), "some.npz").warnings


def test_data_in_order_have_no_warning(data_dir):
    assert warnings_of(pictures()) == []
    assert warnings_of(pictures(high=32)) == []
    assert warnings_of(pictures(2 * 18)[[*range(36), 0, 1, 2, 3]]) == []  # 4 copies of 40
    assert warnings_of(pictures().repeat(1, 3, 1, 1)) == []
    said = str(common.load_data("kmnist", data_dir))
    assert "warning" not in said and said.count("\n") == 1


def constant(images, count):
    images[:count] = 10 * torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return images


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (constant(pictures(), 3), None, "ab", "3 of 20 images are constant"),
        (constant(pictures().repeat(1, 3, 1, 1), 2), None, "ab", "2 of 20 images are constant"),
        (constant(pictures(), 20), None, "ab", "20 of 20 images are constant"),
        (pictures(high=1), None, "ab", "all values are 0 or 1 of 255: were they 0.0 to 1.0?"),
        (pictures(low=40, high=71), None, "ab", "all values are 40 to 71, of 0 to 255"),
        (pictures(), [2] * 20, "abc", "no images of a, b"),
        (pictures(), [12] * 20, "abcdefghijklm", "no images of a, b, c, d, e, f, g, h, i, j and 2"),
        (pictures(), [0] * 20, "a", "all images are of one class, a"),
        (pictures()[[*range(17), 0, 0, 1]], None, "ab", "3 of 20 images are exact copies"),
    ],
)
def test_data_that_look_wrong_are_said_to(images, labels, names, message):
    [found] = warnings_of(images, labels, names)
    assert found.startswith(message)


# --- What a line of the log tells -----------------------------------------------------------------


TENTHS = [1.0, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.8, 0.9, 1.0]
# A line, an early step, at which it tells of nothing, a later one, and what it tells of there.
LINES = [
    ({"loss_by_tenth_of_t": TENTHS}, 100, 5000, None),
    ({"loss_by_tenth_of_t": [*TENTHS[:9], None]}, 100, 5000, None),
    ({"loss_by_tenth_of_t": [None] * 10}, 100, 5000, None),
    ({"loss_by_tenth_of_t": [1.0] * 10}, 450, 500, "nothing is learned"),
    ({"loss_by_tenth_of_t": [*[1.2] * 9, 1.1]}, 50, 100, "1.10 times that of an output of 0"),
    ({"loss_by_tenth_of_t": [*[1.2] * 9, 0.9]}, 100, 5000, None),
    ({"ema_moved": 0.049}, 0, 10, "(4.9% of their size): train for longer"),
    ({"ema_moved": 0.0}, 0, 5000, "(0.0% of their size)"),
    ({"ema_moved": 0.05}, 1, 5000, None),
    ({"ema_moved": None}, 1, 5000, None),  # not known in a resumed run
    ({"flat": 0.6}, 0, 1, "60% of the generated images are nearly of one colour"),
    ({"flat": 0.5}, 1, 5000, None),
    ({"flat": None}, 1, 5000, None),  # real images are flat
    ({"diversity": {"a": 0.41, "b": None}}, 1, 5000, None),
    ({"diversity": {"a": 0.39, "b": 0.5}}, 499, 500, "far less than real ones in a (0.39)"),
    ({"diversity": {"a": 0.0, "b": 0.04}}, 0, 1, "in a (0.00), b (0.04): lower --lr"),
    ({"diversity": {"a": 0.0}, "flat": 1.0}, 0, 1, "100% of the generated images"),
    ({"reconstruction": 3.0, "kl": 1.0}, 1, 5000, None),
]


@pytest.mark.parametrize(("line", "early", "later", "message"), LINES)
def test_a_line_tells_of_a_fault_and_not_too_early(line, early, later, message):
    assert runs.faults(line, early) == {}
    found = [*runs.faults(line, later).values()]
    assert len(found) == (message is not None) and all(message in text for text in found)


LOGS = [*ROOT.glob("pretrained/*.jsonl")]


@pytest.mark.parametrize("path", LOGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_logs_of_the_included_runs_tell_of_no_fault(path):
    lines = lines_of(path)
    assert len(lines) > 10
    assert not [line for line in lines if runs.faults(line, line["step"])]


def test_flat_images_are_those_that_vary_less_than_a_tenth_of_real_ones():
    checks = torch.tensor([0, 255], dtype=torch.uint8).repeat(8, 1, 32, 16)
    data = common.ImageData(checks, torch.zeros(8, dtype=torch.int64), ["a"], "")
    checks = common.to_float(checks)
    grey = torch.linspace(-1, 1, 8).view(8, 1, 1, 1).expand(8, 1, 32, 32)
    assert runs.flat_fraction(checks, data) == runs.flat_fraction(0.11 * checks, data) == 0
    assert runs.flat_fraction(0.09 * checks, data) == runs.flat_fraction(grey, data) == 1
    assert runs.flat_fraction(torch.cat([checks[:6], grey[:2]]), data) == 0.25
    data.images.fill_(7)
    assert runs.flat_fraction(grey, data) is None
    coloured = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(4, 3, 32, 32)
    data.images = pictures().repeat(1, 3, 1, 1)
    assert runs.flat_fraction(coloured, data) == 1  # of one colour, though its channels differ


def test_how_far_weights_have_moved_leaves_out_those_that_are_fixed():
    first = {"a": torch.tensor([3.0, 4.0]), "fixed": torch.tensor([100.0])}
    last = {"a": torch.tensor([3.0, 4.5]), "fixed": torch.tensor([100.0])}
    assert runs.distance_moved(first, last) == pytest.approx(0.1)  # 0.5 of 5
    assert runs.distance_moved(first, first) == 0


def test_diversity_is_one_for_real_images_and_falls_with_collapse():
    reals = torch.rand(40, 1, 8, 8)
    assert runs.diversity(reals[:20], reals[20:]) == pytest.approx(1, abs=0.05)
    assert runs.diversity(reals[:1].expand(20, -1, -1, -1), reals) == pytest.approx(0, abs=1e-3)
    half = 0.5 * reals[:20] + 0.5 * reals[:1]
    assert runs.diversity(half, reals) == pytest.approx(0.5, abs=0.1)


def test_diversity_is_that_of_each_class(data_dir):
    data = common.load_data("kmnist", data_dir)
    grid = common.to_float(data.images[data.labels == 0][:4])
    grid = torch.cat([grid, grid[:1].expand(4, -1, -1, -1)])
    found = runs.class_diversity(grid, torch.tensor([0] * 4 + [1] * 4), data)
    assert found == {"o": pytest.approx(1, abs=0.2), "ki": pytest.approx(0, abs=1e-3)}
    alone = runs.class_diversity(grid[:4], torch.tensor([0, 0, 0, 1]), data)
    assert alone.keys() == {"o"}  # one image has no distance to another


def test_a_log_has_seven_digits_of_each_number():
    line = {"step": 12345678, "loss": 0.123456789, "tenths": [1 / 3, None], "by": {"a": 2e-9 / 3}}
    rounded = {"step": 12345678, "loss": 0.1234568, "tenths": [0.3333333, None]}
    assert runs.rounded(line) == {**rounded, "by": {"a": 6.666667e-10}}


# --- Runs -----------------------------------------------------------------------------------------


def flags_of(name, data_dir, *flags):
    return ["--train", "--data-dir", data_dir, *TINY_FLAGS[name], "--run-dir", "run", *flags]


def test_a_link_to_nowhere_in_the_place_of_runs_is_one_line(in_tmp, data_dir, capsys):
    Path("runs").symlink_to("nowhere")
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    assert "runs" in refused(ddim.main, flags, capsys, alone=False)


def test_a_folder_that_has_a_log_alone_holds_no_run(in_tmp, data_dir):
    """As of a process that was killed before it saved: it could not be resumed."""
    Path("run").mkdir()
    Path("run/log.jsonl").write_text('{"step": 777, "loss": 1.0}\n')
    script = importlib.import_module("gan")
    assert script.main(flags_of("gan", data_dir, "--epochs", "1")) == 0
    assert 777 not in [line["step"] for line in lines_of("run/log.jsonl")]
    assert lines_of("run/log.jsonl.old") == [{"step": 777, "loss": 1.0}]


@pytest.mark.parametrize("name", LOOPS)
def test_each_script_says_once_that_its_samples_have_collapsed(
    name, in_tmp, data_dir, monkeypatch, capsys
):
    """Samples that are one picture, then one grey, however well the weights are trained."""
    script = importlib.import_module(name)
    one = pictures(1).float().div(127.5).sub(1)
    monkeypatch.setattr(script, "sample", lambda labels, **_: one.expand(len(labels), 1, 32, 32))
    monkeypatch.setattr(runs, "distance_moved", lambda first, last: 1.0)
    flags = ["--epochs", "1", "--save-every", "0"]
    if name == "ldm":
        flags = ["--epochs", "4", *flags[2:]]
    assert script.main(flags_of(name, data_dir, *flags)) == 0
    said = capsys.readouterr().out
    assert said.count("warning: step 1: collapse: generated images vary far less") == 1
    assert said.count("collapse") == 1 and "one colour" not in said
    judged = [line for line in lines_of("run/log.jsonl") if "diversity" in line]
    assert [line["flat"] for line in judged] == [0] * len(judged) and len(judged) >= 4
    assert all(value < 0.01 for line in judged for value in line["diversity"].values())
    assert "warnings" not in judged[0]  # untrained
    assert all("o (0.00)" in line["warnings"][0] for line in judged[1:])

    monkeypatch.setattr(script, "sample", lambda labels, **_: torch.zeros(len(labels), 1, 32, 32))
    assert script.main([*flags_of(name, data_dir, *flags), "--run-dir", "grey"]) == 0
    said = capsys.readouterr().out
    assert said.count("warning: step 1: 100% of the generated images are nearly of one") == 1
    assert "collapse" not in said
    assert lines_of("grey/log.jsonl")[-1]["flat"] == 1


def test_a_learning_rate_that_is_too_high_or_too_low_is_said_while_training(
    in_tmp, data_dir, capsys
):
    for lr, epochs, message in (
        ("10", "60", "times that of an output of 0, in every tenth of t: lower --lr"),
        ("1e-9", "2", "averaged weights, which have hardly moved yet (0.0%"),
        ("1e-2", "34", None),
    ):
        flags = flags_of("ddim", data_dir, "--epochs", epochs, "--lr", lr)
        assert ddim.main([*flags, "--run-dir", lr]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "warning: step" in line]
        logged = [text for line in lines_of(f"{lr}/log.jsonl") for text in line.get("warnings", ())]
        if message:
            assert len(said) == 1 and message in said[0]
            assert any(message in text for text in logged)
        else:
            assert said == logged == []


def test_a_broken_autoencoder_is_said(in_tmp, data_dir, capsys):
    ldm = importlib.import_module("ldm")
    flags = ["--stage", "1", "--epochs", "3", "--lr", "10", "--warmup", "0"]
    assert ldm.main(flags_of("ldm", data_dir, *flags)) == 0
    assert "100% of the generated images are nearly of one colour" in capsys.readouterr().out
    assert lines_of("run/autoencoder_log.jsonl")[-1]["flat"] == 1


@pytest.mark.parametrize("name", ["vae", "ddim"])
def test_faults_of_the_data_are_said_and_logged_once(name, in_tmp, capsys):
    x = constant(pictures(40), 10)[:, 0].numpy()
    np.savez("one.npz", x=x, y=np.zeros(40, dtype=int))
    script = importlib.import_module(name)
    flags = ["--data", "one.npz", "--epochs", "1", "--save-every", "0"]
    argv = ["--train", *TINY_FLAGS[name], *flags, "--run-dir", "run"]
    assert script.main(argv) == 0
    said = capsys.readouterr().out
    logged = [line["warnings"] for line in lines_of("run/log.jsonl") if "warnings" in line]
    for text in ("10 of 40 images are constant", "all images are of one class, 0"):
        assert said.count(text) == 1
        assert sum(text in line for lines in logged for line in lines) == 1


def test_a_resumed_run_does_not_know_where_its_weights_began(in_tmp, data_dir):
    assert ddim.main(flags_of("ddim", data_dir, "--epochs", "1")) == 0
    assert ddim.main(["--resume", "--run-dir", "run", "--epochs", "2"]) == 0
    moved = [line["ema_moved"] for line in lines_of("run/log.jsonl") if "ema_moved" in line]
    assert moved[0] == 0 and 0 < moved[1] < 0.05 and moved[2] is None
