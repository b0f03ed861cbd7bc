"""distill.py: targets against closed forms, one evaluation a step, runs that resume, export."""

import itertools
import importlib
import json
import math
import shutil
import weakref
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch
from conftest import equal, forked, lines_of, refused, state, without_exporting
from PIL import Image
from test_ddim import Erring
from test_processes import losses

import ddim
import distill
import evaluate
import explore
import export
import infer_onnx
from common import NULL_LABEL, UNet

# Twelve steps, three in an epoch, each walk used twice.
FLAGS = split("--train --epochs 4 --warmup 2 --batch-size 4 --passes 2")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Three batches in an epoch, as in faulty.py."""
    monkeypatch.setattr(distill, "WALKS", 3)
    monkeypatch.setattr(distill, "LOG_EVERY", 2)


@pytest.fixture(scope="module")
def student(tiny_run, tmp_path_factory):
    """The folder of a finished run that learned from the tiny run of ddim.py."""
    folder = tmp_path_factory.mktemp("distill") / "run"
    torch.set_num_threads(1)  # as the processes that are compared with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "WALKS", 3)
        patch.setattr(distill, "LOG_EVERY", 2)
        assert distill.main([*FLAGS, "--teacher", str(tiny_run), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(student):
    assert export.main(["distill", "--checkpoint", str(student)]) == 0
    return student / "distill.onnx"


def schedule(prediction="v", steps=4):
    alpha_bars = ddim.make_alpha_bars("cosine", 1000)
    return alpha_bars, ddim.time_pairs(ddim.walk_length(alpha_bars, prediction), steps)


def alpha_bar_of(alpha_bars, t):
    return alpha_bars[t].item() if t >= 0 else 1.0


# --- Method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "eps"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_ddim_step_with_the_implied_output_lands_on_the_next_state(prediction, steps):
    alpha_bars, pairs = schedule(prediction, steps)
    for t, s in pairs:
        x_t, x_s = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
        alpha_bar_t, alpha_bar_s = alpha_bar_of(alpha_bars, t), alpha_bar_of(alpha_bars, s)
        output = distill.implied_output(x_t, x_s, prediction, alpha_bar_t, alpha_bar_s)
        both = ddim.predict_x_0_and_eps(output, x_t, prediction, alpha_bar_t)
        landed = ddim.ddim_step(*both, alpha_bar_t, alpha_bar_s)
        assert (landed - x_s).abs().max() < 1e-10, (t, s)


def test_a_teacher_of_as_many_ddim_steps_without_guidance_has_nothing_to_teach(monkeypatch):
    """Its own network has loss 0; with guidance, or in a finer walk, it has not."""
    alpha_bars, pairs = schedule()

    def network(x_t, t, y):
        alpha_bar_t = alpha_bars[t].view(-1, 1, 1, 1)
        x_0_hat = torch.tanh((y + 1).view(-1, 1, 1, 1) * x_t)  # never clipped
        return (alpha_bar_t**0.5 * x_t - x_0_hat) / (1 - alpha_bar_t) ** 0.5

    def loss(guidance=1.0, fine=pairs):
        denoise = ddim.guided(network, y, guidance)
        arguments = (alpha_bars, "v", pairs)
        states = distill.teacher_walk(denoise, x_T, *arguments, fine)
        found = distill.step_losses(network, states, y, *arguments, "l2")
        assert found.shape == (4, 5)
        return found.max()

    x_T, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.arange(5)
    assert loss() > 1e-3  # DPM-Solver++ is of second order
    monkeypatch.setattr(distill, "dpm_sample", ddim.ddim_sample)
    assert loss() < 1e-10
    assert loss(guidance=2.0) > 1e-3
    assert loss(fine=ddim.time_pairs(1000, 12)) > 1e-3


def test_the_targets_are_those_of_the_exact_flow_as_the_steps_of_the_teacher_grow():
    """For data ~ N(0, s^2) the flow is x_s = x_t * sqrt(variance_s / variance_t)."""
    alpha_bars, pairs = schedule()
    s2 = 0.2**2

    def variance(alpha_bar):
        return alpha_bar * s2 + 1 - alpha_bar

    def denoise(x_t, t):  # the best v for such data
        alpha_bar_t = alpha_bars[t].item()
        x_0_hat = alpha_bar_t**0.5 * s2 / variance(alpha_bar_t) * x_t
        return (alpha_bar_t**0.5 * x_t - x_0_hat) / (1 - alpha_bar_t) ** 0.5

    x_T = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    errors = []
    for steps in (24, 48, 96, 192):
        fine = distill.teacher_pairs(1000, steps, pairs)
        states = distill.teacher_walk(denoise, x_T, alpha_bars, "v", pairs, fine)
        worst = 0.0
        for (t, s), x_t, x_s in zip(pairs, states[:-1], states[1:], strict=True):
            alpha_bar_t, alpha_bar_s = alpha_bar_of(alpha_bars, t), alpha_bar_of(alpha_bars, s)
            exact = x_t * (variance(alpha_bar_s) / variance(alpha_bar_t)) ** 0.5
            outputs = (
                distill.implied_output(x_t, end, "v", alpha_bar_t, alpha_bar_s)
                for end in (x_s, exact)
            )
            worst = max(worst, (next(outputs) - next(outputs)).abs().max().item())
        errors.append(worst)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.00625
    # The very last step is a DDIM step: it is of first order in its length.
    assert errors[0] / errors[2] > 3


@pytest.mark.parametrize("length", [10, 996, 1000])
@pytest.mark.parametrize("teacher_steps", [1, 10, 15])
def test_the_teacher_passes_the_times_of_the_student(length, teacher_steps):
    """In place of the nearest of its own times."""
    own = {t for t, _ in ddim.dpm_pairs(length, min(teacher_steps, length))}
    for steps in [1, 2, 3, 4, 8, 10, *([100, length] if length > 10 else ())]:
        pairs = ddim.time_pairs(length, steps)
        fine = distill.teacher_pairs(length, len(own), pairs)
        assert fine[0][0] == length - 1 and fine[-1][1] == -1
        assert all(t > s for t, s in fine)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(fine))
        times, students = {t for t, _ in fine}, {t for t, _ in pairs}
        assert students <= times <= students | own
        assert max(len(own), steps) <= len(fine) < len(own) + steps
        for t in own - times:  # the nearest to a time of the student
            assert any(abs(t - s) == min(abs(other - s) for other in own) for s in students)
    # That of one step begins where every walk does.
    [pair] = ddim.time_pairs(length, 1)
    assert distill.teacher_pairs(length, len(own), [pair]) == ddim.dpm_pairs(length, len(own))


def test_a_step_of_the_student_starts_where_the_one_before_has_ended():
    alpha_bars, pairs = schedule()
    states = torch.randn(5, 2, 1, 4, 4).unbind()
    seen = []

    def model(x_t, t, y):
        seen.append((x_t, t.tolist(), y.tolist()))
        return torch.zeros_like(x_t)

    y = torch.tensor([3, 1])
    losses = distill.step_losses(model, states, y, alpha_bars, "v", pairs, "l2")
    assert [(t, labels) for _, t, labels in seen] == [([t, t], [3, 1]) for t, _ in pairs]
    x = states[0]
    for (t, s), (x_t, *_), x_s, loss in zip(pairs, seen, states[1:], losses, strict=True):
        assert torch.equal(x_t, x)
        alpha_bar_t, alpha_bar_s = alpha_bar_of(alpha_bars, t), alpha_bar_of(alpha_bars, s)
        target = distill.implied_output(x, x_s, "v", alpha_bar_t, alpha_bar_s)
        assert torch.allclose(loss, target.square().flatten(1).mean(dim=1))  # the output is 0
        both = ddim.predict_x_0_and_eps(torch.zeros_like(x_t), x_t, "v", alpha_bar_t, True)
        x = ddim.ddim_step(*both, alpha_bar_t, alpha_bar_s)


def test_no_gradient_passes_from_a_step_to_those_before_it():
    alpha_bars, pairs = schedule()
    states = torch.randn(5, 2, 1, 4, 4).unbind()
    weights = torch.ones(1000, requires_grad=True)

    def model(x_t, t, y):
        return weights[t].view(-1, 1, 1, 1) * x_t

    losses = distill.step_losses(model, states, torch.tensor([3, 1]), alpha_bars, "v", pairs, "l2")
    for (t, _), loss in zip(pairs, losses, strict=True):
        [gradient] = torch.autograd.grad(loss.sum(), weights, retain_graph=True)
        assert gradient.nonzero().flatten().tolist() == [t]


def small_teacher():
    """A UNet of random weights, its head too."""
    torch.manual_seed(0)
    network = UNet(widths=(8, 16), depths=(1, 1), emb_channels=16).eval().requires_grad_(False)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


def blocks_by_hand(teacher, x_t, t, y):
    """What the residual blocks of small_teacher make of x_t, called one after the other."""
    emb = teacher.embedding(torch.full_like(y, t), y)
    fine = teacher.down[0][0](teacher.stem(torch.nn.functional.pixel_unshuffle(x_t, 2)), emb)
    coarse = teacher.bottom[0](teacher.down[0][1](fine), emb)
    up = torch.nn.functional.pixel_shuffle(teacher.up[0][0](teacher.bottom[1](coarse)), 2)
    return fine, coarse, teacher.up[0][1](torch.cat([up, fine], dim=1), emb)


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_last_step_is_compared_in_the_features_too(prediction):
    """Of alpha times the image, at a time of little noise; the other steps are not."""
    alpha_bars, pairs = schedule(prediction, steps=2)
    teacher, y = small_teacher(), torch.tensor([1, 5, 9])
    states, begun = torch.randn(3, 3, 1, 32, 32).clamp(-1, 1).unbind(), []

    def model(x_t, t, y):
        begun.append(x_t)
        return 0.3 * x_t

    def losses(*options):
        return distill.step_losses(model, states, y, alpha_bars, prediction, pairs, "l2", *options)

    plain, weighted = losses(), losses(teacher, 0.5)
    assert torch.equal(plain[0], weighted[0])
    x_t, x_0 = begun[-1], states[-1]
    alpha_bar_t = alpha_bars[pairs[1][0]].item()
    x_0_hat, _ = ddim.predict_x_0_and_eps(0.3 * x_t, x_t, prediction, alpha_bar_t)
    alpha = alpha_bars[60].item() ** 0.5
    expected = []
    both = (blocks_by_hand(teacher, alpha * x, 60, y) for x in (x_0, x_0_hat))
    for maps in zip(*both, strict=True):
        a, b = (h / h.square().sum(dim=1, keepdim=True).sqrt() for h in maps)
        expected.append((a - b).square().sum(dim=1).mean(dim=(1, 2)))
    expected = sum(expected) / 3
    assert torch.allclose(weighted[1] - plain[1], 0.5 * expected, atol=1e-5)
    assert expected.min() > 0.01
    assert distill.feature_losses(teacher, x_0, x_0, y, alpha_bars).abs().max() < 1e-6
    assert not any(block._forward_hooks for block in teacher.modules())


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_are_shown_where_there_is_as_little_noise_in_each_size(size):
    """The t that the teacher is told."""
    alpha_bars, told = ddim.make_alpha_bars("cosine", 1000, size), []
    teacher, y = small_teacher(), torch.tensor([1, 5])
    teacher.register_forward_pre_hook(lambda module, given: told.append(given[1].tolist()))
    x_0, x_0_hat = torch.randn(2, 2, 1, 32, 32)
    x_0_hat.requires_grad_()
    distill.feature_losses(teacher, x_0, x_0_hat, y, alpha_bars).sum().backward()
    t = {32: 60, 64: 26, 128: 10}[size]
    assert told == [[t, t], [t, t]]
    assert alpha_bars[t].item() == pytest.approx(0.9885, abs=0.001)
    assert x_0_hat.grad.abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_image_takes_one_evaluation_a_step_with_its_class(steps):
    calls = []

    class Network(torch.nn.Linear):
        class_names = tuple("abcdefghij")

        def forward(self, x_t, t, y):
            calls.append((t.tolist(), y.tolist()))
            return torch.zeros_like(x_t)

    config = {"channels": 1, "schedule": "cosine", "num_timesteps": 1000, "prediction": "v"}
    labels = torch.tensor([4, 7])
    model = Network(1, 1)
    images = distill.sample(model=model, config={**config, "steps": steps}, labels=labels)
    assert images.shape == (2, 1, 32, 32) and images.abs().max() <= 1
    assert calls == [([t, t], [4, 7]) for t, _ in ddim.time_pairs(1000, steps)]
    assert NULL_LABEL not in calls[0][1]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_student_that_errs_by_one_percent_is_sampled_from(prediction):
    """Its walk is DDIM's without guidance: on Gaussian data it ends in the data's distribution."""
    config = {"channels": 1, "schedule": "cosine", "num_timesteps": 1000}
    config |= {"prediction": prediction, "steps": 20}
    labels = torch.zeros(40, dtype=torch.int64)
    images = distill.sample(model=Erring("cosine", prediction), config=config, labels=labels)
    assert images.mean().item() == pytest.approx(0.4, abs=0.01)
    assert 0.05 < images.std().item() < 0.13


def test_a_student_learns_its_teacher(tiny_run, in_tmp):
    """One with a random head; the step that begins at noise is soon learned."""
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    network = UNet(**checkpoint["network"])
    torch.nn.init.normal_(network.head.weight, std=0.02)
    torch.save({**checkpoint, "ema": network.state_dict()}, "teacher.pt")
    flags = split("--train --epochs 32 --warmup 5 --lr 1e-2 --batch-size 8 --guidance 3")
    assert distill.main([*flags, "--teacher", "teacher.pt"]) == 0
    every = lines_of("runs/distill/log.jsonl")
    found = [line["loss_by_step"] for line in every if "loss" in line]
    assert len(found[0]) == 4
    assert np.mean([steps[0] for steps in found[-3:]]) < 0.4 * found[0][0], found
    assert np.isfinite(found).all()


# --- Runs -----------------------------------------------------------------------------------------


def test_each_walk_of_a_run_has_its_own_noise(tiny_run, in_tmp, monkeypatch):
    """A student of the same few noises learns those by heart."""
    seen = []
    walk = distill.teacher_walk

    def spy(denoise, x_T, *rest):
        seen.extend(x_T.flatten(1))
        return walk(denoise, x_T, *rest)

    monkeypatch.setattr(distill, "teacher_walk", spy)
    assert distill.main([*FLAGS, "--teacher", str(tiny_run)]) == 0
    grid = 8 * 10  # whose images the log compares with the student's
    assert len(seen) == grid + 2 * 3 * 4  # twelve steps, each walk used twice; batches of four
    assert len({tuple(x.tolist()) for x in seen}) == len(seen)


def test_teacher_and_student_have_the_same_classes_and_the_flags(tiny_run, in_tmp, monkeypatch):
    """Two sets of three batches, each walked once and learned from twice, compiled."""
    asked, learned, calls = [], [], []
    guided, losses = distill.guided, distill.step_losses

    def spy_guided(model, y, *options):
        asked.append((y.tolist(), options))
        return guided(model, y, *options)

    def spy_losses(model, states, y, *options):
        learned.append((y.tolist(), options[-3], options[-1]))
        return losses(model, states, y, *options)

    monkeypatch.setattr(distill, "guided", spy_guided)
    monkeypatch.setattr(distill, "step_losses", spy_losses)
    monkeypatch.setattr(torch, "compile", lambda m: lambda *given: calls.append(1) or m(*given))
    flags = split("--feature-weight .7 --loss l1 --guidance 3 --compile")
    flags += split("--guidance-interval 0.2 0.6")
    assert distill.main([*FLAGS, *flags, "--teacher", str(tiny_run)]) == 0
    assert [options for _, options in asked] == [(3.0, 200.0, 600.0)] * 7  # the first: the grid
    assert {(loss, weight) for _, loss, weight in learned} == {("l1", 0.7)}
    assert len(calls) == 12 * 4  # steps of the run, and of the student's walk
    batches = [y for y, _ in asked[1:]]
    assert [y for y, *_ in learned] == [*batches[:3] * 2, *batches[3:] * 2]
    assert {y for batch in batches for y in batch} == {*range(10)}


@pytest.mark.parametrize("flag", ["--weight-decay 0.5", "--ema-length 0.4", "--grad-clip 1e-3"])
def test_a_flag_changes_what_is_learned(flag, student, tiny_run, in_tmp):
    assert distill.main([*FLAGS, *flag.split(), "--teacher", str(tiny_run)]) == 0
    weights = [torch.load(path / "distill.pt", weights_only=True)["ema"] for path in (
        student, in_tmp / "runs/distill"
    )]  # fmt: skip
    assert not equal(*weights)


def test_walks_that_are_learned_from_are_forgotten(tiny_run, in_tmp, monkeypatch):
    """Else memory grows for hours: of two sets of three, at most one is held at a time."""
    walk, made, held = distill.teacher_walk, [], []

    def spy(*given):
        states = walk(*given)
        made.append(weakref.ref(states[-1]))
        held.append(sum(ref() is not None for ref in made[1:]))  # the first is of the grid
        return states

    monkeypatch.setattr(distill, "teacher_walk", spy)
    assert distill.main([*FLAGS, "--teacher", str(tiny_run)]) == 0
    assert len(held) == 7 and max(held) <= 4  # the one that takes the place of the oldest


def test_a_teacher_of_fewer_steps_takes_those_of_the_student(tiny_run, in_tmp, capsys):
    flags = ["--steps", "3", "--teacher-steps", "2", "--teacher", str(tiny_run)]
    assert distill.main([*FLAGS, *flags]) == 0
    said = capsys.readouterr().out
    assert f"3 steps, guidance {ddim.GUIDANCE:g}\n" in said and "counts as 1" not in said
    flags += ["--guidance-interval", "0.001", "0.002"]
    assert distill.main([*FLAGS, *flags]) == 0
    assert "counts as 1: no step lies in --guidance-interval" in capsys.readouterr().out


def test_a_run_is_that_of_its_flags_and_its_teacher(student, tiny_run):
    """Its checkpoint and its log."""
    checkpoint = torch.load(student / "distill.pt", weights_only=True)
    taught = torch.load(tiny_run / "ddim.pt", weights_only=True)
    config = checkpoint["config"]
    parser = distill.build_parser()
    of_training = {*distill.FIXED, *distill.FREE}
    assert {*config} == of_training | {*distill.TAUGHT}
    assert of_training < {action.dest for action in parser._actions}
    assert {key: config[key] for key in distill.TAUGHT} == {
        key: taught["config"][key] for key in distill.TAUGHT
    }
    assert config["teacher_steps"] == 15 and config["guidance"] == ddim.GUIDANCE
    assert checkpoint["step"] == 12 and checkpoint["network"] == taught["network"]
    assert all(torch.equal(a, taught["ema"][k]) for k, a in checkpoint["teacher"]["ema"].items())
    changed = [not torch.equal(a, taught["ema"][k]) for k, a in checkpoint["ema"].items()]
    assert any(changed)
    rate = config["lr"] * 0.5 * (1 + math.cos(math.pi * 11 / 12))  # of the last of 12 steps
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups))
    lines = lines_of(student / "log.jsonl")
    moved = [line["ema_moved"] for line in lines if "diversity" in line]
    assert len(moved) >= 2 and {*moved} == {None}  # it may stay near its teacher
    assert len(list((student / "samples").glob("*.png"))) >= 2


def test_the_default_interval_may_be_typed_on_resume(student, in_tmp):
    shutil.copytree(student, "run")
    interval = [str(part) for part in distill.GUIDANCE_INTERVAL]
    argv = ["--resume", "--run-dir", "run", "--epochs", "5", "--guidance-interval", *interval]
    assert distill.main(argv) == 0


@pytest.mark.parametrize("fault", ["term:7", "full:6"])
def test_a_run_that_ends_at_any_step_resumes_bit_for_bit(fault, student, tiny_run, in_tmp):
    """Also when the file of its teacher is no longer there."""
    teacher = in_tmp / "teacher.pt"
    teacher.write_bytes((tiny_run / "ddim.pt").read_bytes())
    done = forked(fault, "distill", *FLAGS, "--teacher", str(teacher), "--run-dir", "broken")
    kind = fault.split(":")[0]
    expected = {"term": 130, "full": 2}[kind]
    assert done.returncode == expected and "Traceback" not in done.stderr, done.stderr
    if kind == "term":
        said = "python distill.py --resume --run-dir broken"
        assert done.stdout.splitlines()[-1].strip() == said
    teacher.unlink()
    assert torch.load("broken/distill.pt", weights_only=True)["step"] < 12
    assert distill.main(["--resume", "--run-dir", "broken"]) == 0
    whole, broken = state(student), state(in_tmp / "broken")
    assert whole.keys() == broken.keys()
    for key in whole:
        assert equal(whole[key], broken[key]), key


def test_two_processes_train_what_one_does(tiny_run, in_tmp):
    flags = [*FLAGS, "--no-bf16", "--teacher", str(tiny_run)]
    assert distill.main([*flags, "--run-dir", "one"]) == 0
    done = forked("none", "distill", *flags, "--run-dir", "two", ranks=2)
    assert done.returncode == [0, 0], done.stderr
    one, two = losses("one"), losses("two")
    assert one.keys() == two.keys() and len(one) == 6
    for key, values in one.items():
        assert np.allclose(values, two[key], rtol=1e-4, atol=1e-5), (key, values, two[key])
    seen = [
        [json.loads(line)[2] for line in Path(f"seen_{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert len(seen[0]) == 6  # two sets of batches, each walked once
    assert sorted(itertools.chain(*seen[0], *seen[1])) == [*range(24)]


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_any_size_colour_and_script_can_teach(name, in_tmp):
    rng = np.random.default_rng(0)
    np.savez("set.npz", x=rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8), y=[0, 1] * 6)
    script = importlib.import_module(name)
    flags = split("--train --epochs 1 --data set.npz --channels 3 --widths 8 --depths 1")
    flags += split("--patch 2 --emb-channels 16 --batch-size 4 --num-timesteps 50 --prediction eps")
    assert script.main(flags) == 0
    assert distill.main([*FLAGS, "--steps", "2"]) == 0  # the newest run is the teacher
    assert distill.main(split("--class 1 --num-samples 3 --output x.npz")) == 0
    assert np.load("x.npz")["x"].shape == (3, 3, 32, 32)
    config = torch.load("runs/distill/distill.pt", weights_only=True)["config"]
    assert config["teacher"] == f"runs/{name}/{name}.pt" and config["num_timesteps"] == 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train --teacher nowhere", "there is no nowhere"),
        ("--train --teacher-steps 1004", "--teacher-steps 1004 is more than the 1000 timesteps"),
        ("--train --guidance-interval .8 .2", "right is 0 <= LOW <= HIGH <= 1"),
        ("--train --guidance 1 --guidance-interval 0 .5", "is for a guidance above 1"),
        ("--train --guidance 0", "features are of one: --feature-weight 0"),
        ("--train --data mnist", "unrecognized arguments: --data mnist"),
        ("--train --steps 0", "from 1 to 16"),
        ("--steps 8", "--steps: to train a model, with --train or --resume"),
        ("--class Sneakr", "no class 'Sneakr'"),
        ("--output x.jpg", "must end in"),
        ("--resume --run-dir nowhere", "there is no nowhere"),
        ("--resume --run-dir {student} --steps 2", "--steps is 4 and cannot change"),
    ],
)
def test_bad_input_is_refused_in_a_line(flags, message, student, tiny_run, in_tmp, capsys):
    flags = flags.format(student=student).split()
    if "--train" in flags and "--teacher" not in flags:
        flags += ["--teacher", str(tiny_run)]
    elif "--resume" not in flags and "--train" not in flags:
        flags += ["--checkpoint", str(student)]
    error = refused(distill.main, flags, capsys)
    assert error.startswith("distill.py: error: ") and message in error
    assert not list(in_tmp.iterdir())


def test_without_a_run_the_included_weights_teach(in_tmp):
    args = distill.build_parser().parse_args(["--train"])
    args.typed = []
    distill.read_teacher(args)
    assert Path(args.teacher).samefile(Path(distill.__file__).with_name("pretrained") / "ddim.pt")


def test_only_what_the_teacher_has_learned_can_be_distilled(tiny_run, in_tmp, capsys):
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    config = {**checkpoint["config"], "label_dropout": 0}
    torch.save({**checkpoint, "config": config}, "teacher.pt")
    flags = [*FLAGS, "--teacher", "teacher.pt", "--guidance", "2"]
    assert "leaves only --guidance 1.0" in refused(distill.main, flags, capsys)
    assert distill.main([*FLAGS, "--teacher", "teacher.pt"]) == 0
    found = torch.load("runs/distill/distill.pt", weights_only=True)["config"]
    assert found["guidance"] == 1.0


# --- Export and use -------------------------------------------------------------------------------


def test_the_file_samples_as_the_checkpoint_does_in_its_steps_only(
    exported, student, in_tmp, capsys
):
    flags = split("--class o,su --num-samples 3 --seed 5")
    assert distill.main(["--checkpoint", str(student), *flags, "--output", "torch.npz"]) == 0
    argv = ["--model", str(exported), *flags]
    assert infer_onnx.main([*argv, "--output", "onnx.npz"]) == 0
    assert infer_onnx.main([*argv, "--steps", "4", "--output", "four.npz"]) == 0
    a, b, c = (np.load(f"{name}.npz")["x"].astype(int) for name in ("torch", "onnx", "four"))
    assert np.abs(a - b).max() <= 1 and np.array_equal(b, c)
    assert infer_onnx.main(["--model", str(exported), "--check"]) == 0
    for flag, message in {
        "--steps 8": "this model was trained for --steps 4 only",
        "--guidance 2": "--guidance is not for distill models: leave it out",
        "--guidance-interval 0 1": "--guidance-interval is not for distill models",
        "--solver dpm++": "--solver is not for distill models",
        "--eta 1": "--eta is not for distill models",
    }.items():
        assert message in refused(infer_onnx.main, [*argv, *flag.split()], capsys)


def test_the_card_says_what_was_distilled_and_names_no_folder(exported, student, tiny_run):
    model = infer_onnx.load_model(exported, "cpu")
    card = model.card
    assert card["model"] == "distill" and card["steps"] == 4
    assert card["steps_fixed"] is card["guidance_fixed"] is True
    assert (
        card["training"]["guidance"] == ddim.GUIDANCE and card["training"]["teacher"] == "ddim.pt"
    )
    assert str(tiny_run).encode() not in exported.read_bytes()
    # evaluate.py reads the real images as the teacher's training did, and knows what it left out.
    assert card["training"]["background"] == "white" and card["training"]["hold_out"] is False
    assert infer_onnx.evaluations(card) == 4
    for options in ({"steps": 8}, {"guidance": 2.0}):
        with pytest.raises(infer_onnx.InputError, match=r"trained for|not for distill"):
            infer_onnx.sample(model, [0], **options)


def test_the_sampler_as_one_graph_draws_what_the_student_does(
    exported, student, in_tmp, monkeypatch, capsys
):
    without_exporting(monkeypatch, exported)
    flags = ["--checkpoint", str(student), "--output", "one.onnx"]
    assert export.main(["distill", "--sampler", *flags]) == 0
    one, parts = (infer_onnx.load_model(path, "cpu") for path in ("one.onnx", exported))
    assert [given.name for given in one.session.get_inputs()] == ["noise", "labels"]
    pair = [infer_onnx.sample(model, [3, 8], seed=5).astype(int) for model in (one, parts)]
    assert np.abs(pair[0] - pair[1]).max() <= 1
    error = refused(infer_onnx.main, ["--model", "one.onnx", "--steps", "8"], capsys)
    assert "this model was trained for --steps 4 only" in error


def test_small_weights_have_no_teacher_in_them(exported, student, in_tmp, monkeypatch):
    without_exporting(monkeypatch, exported)
    monkeypatch.setattr(export, "compare", lambda *_: (0.0, 0))  # the graph has other weights
    flags = ["--checkpoint", str(student), "--output", "x.onnx", "--weights", "x.pt"]
    assert export.main(["distill", *flags]) == 0
    kept = torch.load("x.pt", weights_only=True)
    assert not {"teacher", "weights", "optimizer"} & kept.keys()
    assert kept["config"]["teacher"] == "ddim.pt"
    assert distill.main(["--checkpoint", "x.pt", "--class", "0", "--output", "x.png"]) == 0
    assert Path("x.pt").stat().st_size < 0.2 * (student / "distill.pt").stat().st_size


def test_evaluate_scores_it_in_its_steps_only(exported, capsys):
    card = infer_onnx.load_model(exported, "cpu").card
    parser = evaluate.build_parser()
    assert evaluate.setting_options(parser.parse_args([]), "distill", card) == [{"steps": 4}]
    assert capsys.readouterr().out == ""
    args = parser.parse_args(split("--steps 2,4 --guidance 1,2"))
    assert evaluate.setting_options(args, "distill", card) == [{"steps": 4}]
    assert "distill samples in 4 steps only: --steps" in capsys.readouterr().out


def test_explore_shows_its_steps(student, in_tmp):
    where = ["--checkpoint", str(student)]
    assert explore.main(["filmstrip", "distill", "--class", "o,su", *where]) == 0
    with Image.open("distill_filmstrip.png") as picture:
        assert picture.width > picture.height  # five moments of two samples, two rows each
    assert explore.main(["gif", "distill", "--class", "o", *where]) == 0
    with Image.open("distill_gif.gif") as picture:
        assert picture.n_frames == 5
