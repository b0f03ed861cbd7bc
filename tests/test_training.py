"""What the train loops do with batches, labels and flags.

Seen by spies, or from runs with and without a flag.
"""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LOOPS, TINY_FLAGS, equal, lines_of

import common
import gan
import ldm
import runs
import vae

DIFFUSION = ["ddim", "ldm"]


def flags_of(name, data_dir, *flags):
    shared = ["--train", "--epochs", "1", "--warmup", "0", "--data-dir", data_dir]
    return [*shared, *TINY_FLAGS[name], *flags]


def class_of_bar(images):
    """Images of the small set in [-1, 1] -> their classes, told by the position of the bar."""
    return images[:, 0, 6:26, 4:].mean(dim=1).unfold(1, 4, 2).mean(dim=-1).argmax(dim=1)


def is_real(images):
    """Whether each image has the grey levels 0 to 255 only, unlike outputs of a network."""
    return (common.to_float(common.to_uint8(images)) == images).flatten(1).all(dim=1)


# --- Batches --------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_and_each_step_its_own_noise():
    def at(step, seed=5):
        args = SimpleNamespace(seed=seed, batch_size=20)
        return SimpleNamespace(
            args=args, num_images=60, steps_per_epoch=3, step=step, position=step
        )

    def noise(run):
        generator = torch.Generator()
        runs.Run.seed(run, generator)
        return torch.rand(1, generator=generator).item()

    batches = [runs.Run.batch(at(step)) for step in range(6)]
    epochs = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert all(sorted(epoch.tolist()) == [*range(60)] for epoch in epochs)
    assert not torch.equal(*epochs)
    assert len({noise(at(step, seed)) for step in range(4) for seed in (0, 1)}) == 8
    assert noise(at(3)) == noise(at(3))


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_noised_image_is_shown_with_its_own_label(name, in_tmp, data_dir, monkeypatch):
    script, forward, shown, labels = importlib.import_module(name), common.UNet.forward, [], []
    q_sample = script.q_sample

    def spy_image(x_0, *rest):
        shown.append(x_0)
        return q_sample(x_0, *rest)

    def spy_label(self, x_t, t, y):
        labels.append(y)
        return forward(self, x_t, t, y)

    monkeypatch.setattr(script, "q_sample", spy_image)
    monkeypatch.setattr(common.UNet, "forward", spy_label)
    # the grids show other labels
    monkeypatch.setattr(script, "sample", lambda **_: torch.zeros(80, 1, 32, 32))
    if name == "ldm":

        def numbered(self, images):
            """Latents whose values are the class of their image."""
            classes = class_of_bar(common.to_float(images)).float()
            return classes.view(-1, 1, 1, 1).expand(-1, 8, 8, 8)

        monkeypatch.setattr(ldm.LatentDiffusion, "to_latents", numbered)
    assert script.main(flags_of(name, data_dir, "--label-dropout", "0")) == 0
    shown = torch.cat(shown)
    if name == "ldm":
        _, expected = shown[:, 0, 0, 0].unique(return_inverse=True)
    else:
        expected = class_of_bar(shown)
    assert len(shown) >= 60 and torch.equal(expected, torch.cat(labels))


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_network_sees_the_noised_image_and_its_t_and_learns_its_v(
    name, in_tmp, data_dir, monkeypatch
):
    script, forward = importlib.import_module(name), common.UNet.forward
    q_sample, losses, draw_t = script.q_sample, script.image_losses, script.draw_t
    drawn, noised, shown, learned = [], [], [], []

    def spy_t(*given):
        drawn.append(draw_t(*given))
        return drawn[-1]

    def spy_noised(x_0, eps, alpha_bar_t):
        noised.append((x_0, eps, alpha_bar_t.flatten(), q_sample(x_0, eps, alpha_bar_t)))
        return noised[-1][-1]

    def spy_network(self, x_t, t, y):
        shown.append((x_t, t))
        return forward(self, x_t, t, y)

    def spy_losses(output, target, loss):
        learned.append(target)
        return losses(output, target, loss)

    for place, key, spy in (
        (script, "draw_t", spy_t), (script, "q_sample", spy_noised),
        (common.UNet, "forward", spy_network), (script, "image_losses", spy_losses),
        (script, "sample", lambda **_: torch.zeros(80, 1, 32, 32)),
    ):  # fmt: skip
        monkeypatch.setattr(place, key, spy)
    assert script.main(flags_of(name, data_dir, "--epochs", "2")) == 0
    learned = learned[::2]  # each step has the loss of the output 0, too
    steps = list(zip(drawn, noised, shown, learned, strict=True))
    assert len(steps) >= 4
    alpha_bars = script.make_alpha_bars("cosine", 1000).float()
    for t, (x_0, eps, alpha_bar_t, x_t), (seen, seen_t), target in steps:
        assert torch.equal(seen, x_t) and torch.equal(seen_t, t)
        assert torch.equal(alpha_bar_t, alpha_bars[t])
        signal, noise = (a.view(-1, 1, 1, 1).sqrt() for a in (alpha_bar_t, 1 - alpha_bar_t))
        assert torch.allclose(target, signal * eps - noise * x_0, atol=1e-5)


def test_a_vae_encodes_and_decodes_an_image_with_its_own_label(in_tmp, data_dir, monkeypatch):
    encode, decode, seen = vae.Encoder.forward, vae.Decoder.forward, []

    def spy_encoder(self, x, classes):
        seen.append((class_of_bar(x), classes.argmax(dim=1)))
        return encode(self, x, classes)

    def spy_decoder(self, z, classes):
        if torch.is_grad_enabled():  # in training, of the images that were just encoded
            seen.append((seen[-1][0], classes.argmax(dim=1)))
        return decode(self, z, classes)

    monkeypatch.setattr(vae.Encoder, "forward", spy_encoder)
    monkeypatch.setattr(vae.Decoder, "forward", spy_decoder)
    assert vae.main(flags_of("vae", data_dir)) == 0
    assert len(seen) >= 6 and all(torch.equal(true, given) for true, given in seen)


@pytest.mark.parametrize("loss", gan.LOSSES)
def test_a_gan_judges_real_images_as_real_and_penalises_where_it_says(
    loss, in_tmp, data_dir, monkeypatch
):
    forward = gan.Discriminator.forward
    discriminator_loss, generator_loss = gan.discriminator_loss, gan.generator_loss
    penalty = gan.gradient_penalty
    judged, penalised, steps, told = [], [], [], []

    def spy(self, x, classes):
        judged.append((x.detach(), classes.argmax(dim=1), forward(self, x, classes)))
        return judged[-1][2]

    def spy_loss(real, fake, kind):
        x, y, logits = judged[-1]
        true = is_real(x)
        assert torch.equal(real, logits[true].float())
        assert torch.equal(fake, logits[~true].float())
        assert kind == loss
        assert torch.equal(class_of_bar(x[true]), y[true]) and torch.equal(y[true], y[~true])
        steps.append(y[true])
        told.append({"real_logits": real.mean(), "fake_logits": fake.mean()})
        told[-1]["loss_d"] = discriminator_loss(real, fake, kind)
        return told[-1]["loss_d"]

    def spy_generator(real, fake, kind):
        shown = judged[-2:] if loss == "relativistic" else judged[-1:]
        assert kind == loss
        for (x, y, logits), given, true in zip(shown, (fake, real), (False, True), strict=False):
            assert torch.equal(given, logits.float()) and torch.equal(y, steps[-1])
            assert (is_real(x) == true).all()
        told[-1]["loss_g"] = generator_loss(real, fake, kind)
        return told[-1]["loss_g"]

    def spy_penalty(discriminator, x, classes):
        penalised.append(is_real(x).all().item())
        return penalty(discriminator, x, classes)

    monkeypatch.setattr(gan.Discriminator, "forward", spy)
    monkeypatch.setattr(gan, "discriminator_loss", spy_loss)
    monkeypatch.setattr(gan, "generator_loss", spy_generator)
    monkeypatch.setattr(gan, "LOG_EVERY", 1)
    monkeypatch.setattr(gan, "gradient_penalty", spy_penalty)
    penalties = ["--penalty-every", "2"] if loss in gan.PENALISED else []
    assert gan.main(flags_of("gan", data_dir, "--loss", loss, *penalties)) == 0
    assert [len(y) for y in steps] == [20, 20, 20]
    once = {"nonsaturating": [True], "relativistic": [True, False]}.get(loss, [])
    assert penalised == 2 * once  # R1 of real images, R2 of fake ones, at steps 0 and 2
    every = lines_of("runs/gan/log.jsonl")
    assert [len(line["diversity"]) for line in every if "diversity" in line] == [10, 10]
    lines = [line for line in every if "loss_g" in line]
    assert len(lines) == 3 and (lines[0]["penalty"] > 0) == (loss in gan.PENALISED)
    for line, values in zip(lines, told, strict=True):
        assert [line[key] for key in values] == pytest.approx([v.item() for v in values.values()])
    checkpoint = torch.load("runs/gan/gan.pt", weights_only=True)
    assert checkpoint["optimizer"]["state"] and checkpoint["optimizer_d"]["state"]


# --- Flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("vae", "--kl-warmup 0", [3, 3, 3]), ("vae", "--kl-warmup 1", [0, 1, 2]),
        ("ldm", "--stage 1", [3, 3, 3]),
    ],
)  # fmt: skip
def test_the_terms_of_a_vae_have_their_weights(
    name, flags, expected, in_tmp, data_dir, monkeypatch
):
    """In each of three steps: the KL's is that asked for, also while it grows from 0."""
    script = importlib.import_module(name)
    leaves = {"kl_divergence": [], "reconstruction_loss": []}

    def spy_on(term, function):
        def spy(*given):
            leaves[term].append(torch.zeros((), requires_grad=True))
            return function(*given) + leaves[term][-1]

        monkeypatch.setattr(script, term, spy)

    for term in leaves if name == "vae" else ["kl_divergence"]:  # stage 1 of ldm: the next test
        spy_on(term, getattr(script, term))
    assert script.main(flags_of(name, data_dir, "--kl-weight", "3", *flags.split())) == 0
    weights, of_reconstruction = (
        [leaf.grad.item() * 32 * 32 for leaf in part if leaf.grad is not None]
        for part in leaves.values()
    )
    assert weights == pytest.approx(expected)
    assert of_reconstruction == pytest.approx([1, 1, 1] if name == "vae" else [])


def test_the_autoencoder_minimises_distance_and_kl(in_tmp, data_dir, monkeypatch):
    """The loss of stage 1, against sums over an image: |x - x_hat| and KL(q(z | x) || N(0, 1))."""
    forward, watch, seen, losses = ldm.Autoencoder.forward, ldm.Run.watch, [], []

    def spy(self, x, eps):
        seen.append((x, *forward(self, x, eps)))
        return seen[-1][1:]

    def spy_watch(run, **values):
        losses.extend([values["loss"]] if "loss" in values else [])
        watch(run, **values)

    monkeypatch.setattr(ldm, "LOG_EVERY", 1)
    monkeypatch.setattr(ldm.Autoencoder, "forward", spy)
    monkeypatch.setattr(ldm.Run, "watch", spy_watch)
    flags = ["--stage", "1", "--kl-weight", "3", "--no-bf16"]
    assert ldm.main(flags_of("ldm", data_dir, *flags)) == 0
    lines = [line for line in lines_of("runs/ldm/autoencoder_log.jsonl") if "kl" in line]
    assert len(losses) == 3
    for (x, x_hat, mu, logvar), loss, line in zip(seen, losses, lines, strict=True):
        distance = (x - x_hat).abs().sum().item() / len(x)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum().item() / len(x)
        assert loss == pytest.approx(distance + 3 * kl, rel=1e-4)
        assert (line["reconstruction"], line["kl"]) == pytest.approx((distance, kl), rel=1e-4)


CHANGES = [  # of the stages of an LDM one by one
    *((name, flags) for name in ("ddim", "ldm --stage 2") for flags in (
        "--prediction eps", "--loss l1", "--loss huber", "--schedule linear", "--optimizer adamw",
        "--optimizer adam", "--weight-decay 0.5", "--ema-length 0.4", "--grad-clip 1e-3",
        "--lr 1e-4", "--seed 1", "--num-timesteps 50",
    )),
    ("ddim", "--noise-levels uniform"), ("ddim", "--patch 4"), ("ddim", "--no-attention"),
    ("ddim", "--bf16"), ("ldm --stage 2", "--no-attention"),
    ("ldm --stage 1", "--no-channel-attention"), ("vae", "--bf16"), ("gan", "--bf16"),
    ("ldm --stage 1", "--bf16"), ("ldm --stage 2", "--bf16"),
    ("ldm --stage 2", "--noise-levels lognormal"), ("ldm --stage 2", "--label-dropout 1"),
    *(("ldm --stage 1", flags) for flags in (
        "--kl-weight 5", "--latent-channels 3", "--weight-decay 0.5", "--ema-length 0.4",
        "--grad-clip 1e-3", "--lr 1e-4", "--seed 1",
    )),
    *(("vae", flags) for flags in (
        "--reconstruction l1", "--reconstruction l2", "--reconstruction bce", "--kl-weight 3",
        "--weight-decay 0.5", "--ema-length 0.4", "--grad-clip 1e-3", "--lr 1e-4", "--seed 1",
    )),
    *(("gan", flags) for flags in (
        "--loss minmax", "--loss hinge", "--loss relativistic", "--gamma 9", "--penalty-every 2",
        "--ema-length 0.4", "--lr 1e-4", "--seed 1",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def averaged(data_dir, tiny_runs, tmp_path_factory):
    """A function: the averaged weights of a script after an epoch with these flags.

    They are trained at the first call; stage 2 of an LDM with the autoencoder of its tiny run.
    """
    made = {}

    def weights_of(command, flags=""):
        if (command, flags) not in made:
            name, *stage = command.split()
            run_dir = tmp_path_factory.mktemp("run") / "run"
            argv = flags_of(name, data_dir, *stage, "--no-bf16", *flags.split())
            argv += ["--run-dir", str(run_dir)]
            if command == "ldm":
                argv += ["--epochs", "2"]
            elif command == "ldm --stage 2":
                argv += ["--autoencoder", str(tiny_runs("ldm"))]
            assert importlib.import_module(name).main(argv) == 0
            [path] = run_dir.glob("autoencoder.pt" if command == "ldm --stage 1" else f"{name}.pt")
            made[command, flags] = torch.load(path, weights_only=True)["ema"]
        return made[command, flags]

    return weights_of


@pytest.mark.parametrize(("command", "flags"), CHANGES)
def test_a_flag_changes_what_is_learned(command, flags, averaged):
    assert not equal(averaged(command), averaged(command, flags))


def test_the_discriminator_has_widths_of_its_own(tiny_runs, in_tmp, data_dir):
    assert gan.main(flags_of("gan", data_dir, "--widths-d", "12,20,24")) == 0
    runs = [torch.load(path / "gan.pt", weights_only=True) for path in (
        tiny_runs("gan"), Path("runs/gan")
    )]  # fmt: skip
    generators = [{key: w.shape for key, w in run["weights"].items()} for run in runs]
    assert generators[0] == generators[1]
    channels = {weight.shape[0] for weight in runs[1]["discriminator"].values() if weight.dim()}
    assert {12, 20, 24} <= channels


@pytest.mark.parametrize("name", ["vae", "ddim", "ldm"])
def test_compile_compiles_what_is_trained(name, in_tmp, data_dir, monkeypatch):
    """Each step calls the compiled network, those of both stages of an LDM."""
    calls = []

    def compiled(model):
        return lambda *given: calls.append(1) or model(*given)

    monkeypatch.setattr(torch, "compile", compiled)
    assert importlib.import_module(name).main(flags_of(name, data_dir, "--compile")) == 0
    assert len(calls) == {"ldm": 4}.get(name, 3)


@pytest.mark.parametrize("name", TINY_FLAGS)
def test_every_rate_ends_where_half_a_cosine_does(name, tiny_runs):
    """Of each optimiser and stage: of step n - 1 of n, after the warm-up."""
    for path in tiny_runs(name).glob("*.pt"):
        run = torch.load(path, weights_only=True)
        steps, peak = run["step"], run["config"]["lr"]
        expected = peak * 0.5 * (1 + math.cos(math.pi * (steps - 1) / steps))
        optimisers = [run[key] for key in ("optimizer", "optimizer_d") if key in run]
        assert len(optimisers) == (2 if name == "gan" else 1)
        groups = [group for optimiser in optimisers for group in optimiser["param_groups"]]
        assert [group["lr"] for group in groups] == pytest.approx([expected] * len(groups))
        assert name != "gan" or {tuple(group["betas"]) for group in groups} == {(0.0, 0.99)}


def test_a_warm_up_that_is_longer_than_the_run_is_said(in_tmp, data_dir, capsys):
    for warmup in (2, 3):
        assert gan.main([*flags_of("gan", data_dir), "--warmup", str(warmup)]) == 0
        said = "warning: --warmup 3 takes all 3 steps of this training"
        assert (said in capsys.readouterr().out) == (warmup == 3)


@pytest.mark.parametrize("name", LOOPS)
def test_the_log_has_means_of_its_steps(name, in_tmp, data_dir, monkeypatch):
    script, key = importlib.import_module(name), {"vae": "kl", "gan": "loss_g"}.get(name, "loss")
    logs = []
    for every in (1, 2):
        monkeypatch.setattr(script, "LOG_EVERY", every)
        epochs = "4" if name == "ldm" else "2"
        flags = ["--run-dir", str(every), "--epochs", epochs]
        assert script.main(flags_of(name, data_dir, *flags)) == 0
        lines = lines_of(f"{every}/log.jsonl")
        logs.append({line["step"]: line[key] for line in lines if key in line})
    steps = [step for step in logs[1] if step - 1 in logs[0]]
    assert len(steps) >= 3
    for step in steps:
        assert logs[1][step] == pytest.approx((logs[0][step - 1] + logs[0][step]) / 2, rel=1e-4)


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_log_tells_the_loss_of_the_right_tenth_of_t(name, in_tmp, data_dir, monkeypatch):
    """Where all images have t = 250 of 1000, that is the third."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "LOG_EVERY", 3)
    monkeypatch.setattr(script, "draw_t", lambda n, *_: torch.full((n,), 250))
    assert script.main(flags_of(name, data_dir)) == 0
    lines = lines_of(f"runs/{name}/log.jsonl")
    [ratios] = [line["loss_by_tenth_of_t"] for line in lines if "loss_by_tenth_of_t" in line]
    assert [i for i, ratio in enumerate(ratios) if ratio is not None] == [2]


# --- Clock ----------------------------------------------------------------------------------------


def test_the_bar_is_whole_lines_where_there_is_no_terminal(in_tmp, data_dir, capsys, monkeypatch):
    options = runs.bar_options() | {"file": runs.WholeLines(sys.stderr), "mininterval": 0}
    monkeypatch.setattr(runs, "bar_options", lambda: options)
    assert gan.main(flags_of("gan", data_dir)) == 0
    lines = capsys.readouterr().err.split("\n")
    bars = [line for line in lines if "%" in line]
    assert len(bars) > 3 and not any("\r" in line for line in bars)
    assert bars[0].startswith("0.0% |") and bars[-1].startswith("100.0% |")
    assert bars[-1].endswith("images/s")


def test_the_stages_share_the_minutes(clock, in_tmp, data_dir):
    argv = ["--train", "--minutes", "0.19", "--data-dir", data_dir, *TINY_FLAGS["ldm"]]
    argv += ["--stage-1-share", "0.25"]
    # 11.4 seconds, a quarter of them for stage 1
    assert ldm.main([*argv, "--run-dir", "run"]) == 0
    files = [f"run/{stem}.pt" for stem in ("autoencoder", "ldm")]
    assert [torch.load(file, weights_only=True)["step"] for file in files] == [6, 18]


@pytest.mark.parametrize("name", ["vae", "gan", "ddim"])
def test_grids_are_saved_as_often_as_asked_for(name, clock, in_tmp, data_dir):
    argv = ["--train", "--minutes", "0.2", "--save-every", "0.05", "--data-dir", data_dir]
    argv += [*TINY_FLAGS[name], "--run-dir", "run"]
    assert importlib.import_module(name).main(argv) == 0
    steps = [int(path.stem[5:]) for path in sorted(Path("run/samples").iterdir())]
    assert steps == [0, 6, 12, 18, 24]
    judged = [line["step"] for line in lines_of("run/log.jsonl") if "diversity" in line]
    assert judged == [*steps, *[24] * (name == "vae")]  # again with its prior; the others once
