"""explore.py: equations against oracles, each command on tiny runs, bad input in one line."""

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS, refused
from PIL import Image, ImageSequence

import common
import ddim
import explore
import runs
import vae
from common import InputError

COMMANDS = {
    "interpolate": ["ddim", "vae", "gan"],
    "invert": ["ddim", "ldm"],
    "inpaint": ["ddim", "ldm"],
    "edit": ["ddim", "ldm"],
    "reconstruct": ["vae", "ldm"],
    "between": ["vae"],
    "map": ["vae", "ldm"],
    "walk": ["vae"],
    "filmstrip": ["ddpm", "ddim", "ldm"],
    "gif": ["ddpm", "ddim", "ldm", "vae", "gan"],
}
OF_STUDENTS = ("filmstrip", "gif")  # of distill, too, which is tested in test_distill.py
CELL = 34  # pixels of an image in a grid, with its edge


@pytest.fixture
def draw(tiny_runs, in_tmp):
    """A function: run a command on the tiny run of a model, in three steps if it takes steps."""

    def run(command, name, *flags, steps=3):
        where = ["--checkpoint", str(tiny_runs(name))]
        if name in explore.DIFFUSION and command != "reconstruct":
            where += ["--steps", str(steps)]
        if command not in ("map", "walk", "gif"):
            where.append("--no-names")
        assert explore.main([command, name, *flags, *where]) == 0

    return run


@pytest.fixture
def frames_of(monkeypatch):
    """{name of a .gif: how many frames explore.py gives it}; pillow merges those that are equal."""
    counts = {}
    save_gif = explore.save_gif

    def spy(frames, path):
        counts[Path(path).name] = len(frames)
        save_gif(frames, path)

    monkeypatch.setattr(explore, "save_gif", spy)
    return counts


def script_images(name, *flags):
    """What a model script samples with these flags: int (N, C, 32, 32)."""
    assert importlib.import_module(name).main([*flags, "--output", "plain.npz"]) == 0
    return np.load("plain.npz")["x"].astype(int)


def images(path):
    return np.load(path)["x"].astype(int)


def pixels(path):
    """A grid without its enlargement: int (H, W)."""
    picture = np.array(Image.open(path).convert("L"))
    scale = next(k for k in range(8, 0, -1) if (picture.shape[1] // k - 2) % CELL == 0
                 and picture.shape[1] % k == 0)  # fmt: skip
    return picture[::scale, ::scale].astype(int)


def cell(picture, row, column):
    """An image of a grid: (32, 32)."""
    return picture[row * CELL + 2 : (row + 1) * CELL, column * CELL + 2 : (column + 1) * CELL]


def gif_frames(path):
    with Image.open(path) as picture:
        return [np.array(frame.convert("L")) for frame in ImageSequence.Iterator(picture)]


def close(a, b):
    """Within a grey level, by which batches of other sizes may differ."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


# --- Method ---------------------------------------------------------------------------------------


def test_slerp_keeps_ends_and_length():
    a, b = torch.randn(2, 1, 1, 32, 32)
    weight = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    path = explore.slerp(a, b, weight)
    assert torch.allclose(path[:1], a, atol=1e-5) and torch.allclose(path[-1:], b, atol=1e-5)
    assert path.flatten(1).norm(dim=1).min() > 0.95 * min(a.norm(), b.norm())
    middle = (a + b) / (a + b).norm()
    assert torch.cosine_similarity(path[2].flatten(), middle.flatten(), dim=0) > 0.99


def test_slerp_of_equal_noises_is_that_noise():
    a = torch.randn(1, 1, 32, 32)
    path = explore.slerp(a, a, torch.linspace(0, 1, 5).view(-1, 1, 1, 1))
    assert torch.allclose(path, a.expand(5, 1, 32, 32), atol=1e-5)


def test_slerp_turns_by_equal_angles():
    a = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    b = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
    path = explore.slerp(a, b, torch.tensor([1 / 3]).view(-1, 1, 1, 1)).flatten()
    assert torch.allclose(path, 2 * torch.tensor([3**0.5 / 2, 0.5]))  # 30 degrees of 90


def test_codes_keep_their_length_on_the_way():
    a, b = torch.randn(2, 64)
    weight = torch.linspace(0, 1, 9)[:, None]
    z = explore.lerp_with_length(a, b, weight)
    assert torch.allclose(z[0], a, atol=1e-5) and torch.allclose(z[-1], b, atol=1e-5)
    expected = torch.lerp(a.norm(), b.norm(), weight[:, 0])
    assert torch.allclose(z.norm(dim=1), expected, rtol=1e-5)
    straight = torch.lerp(a, b, weight)
    assert torch.cosine_similarity(z, straight).min() > 1 - 1e-6


def test_blend_of_denoisers_by_hand():
    weight = torch.tensor([0, 0.25, 1]).view(-1, 1, 1, 1)
    denoise = explore.blend(lambda x, t: x + 2, lambda x, t: x + t, weight)
    assert denoise(torch.zeros(3, 1, 2, 2), 6)[:, 0, 0, 0].tolist() == [2, 3, 6]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_inversion_finds_the_noise_that_the_network_knows(prediction):
    """With a network that knows x_0 and eps, each step lands on DDPM eq. (4)."""
    alpha_bars = ddim.make_alpha_bars("cosine", 100)
    x_0 = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 2 - 1
    eps = torch.randn_like(x_0)
    calls = []

    def denoise(x_t, t):
        calls.append(t)
        return ddim.target_of(prediction, x_0, eps, alpha_bars[t])

    start = ddim.q_sample(x_0, eps, alpha_bars[0])  # a clean image passes for t = 0
    pairs = ddim.time_pairs(100, 7)
    trace = []
    x_T = explore.ddim_invert(denoise, start, alpha_bars, pairs, prediction, trace)
    assert torch.allclose(x_T, ddim.q_sample(x_0, eps, alpha_bars[99]), atol=1e-6)
    assert calls == [0, *(t for t, _ in reversed(pairs[1:]))]
    assert [t for t, _, _ in trace] == [-1, *calls[1:]]
    for (_, x_t, x_0_hat), t in zip(trace, calls, strict=True):
        assert torch.allclose(x_t, ddim.q_sample(x_0, eps, alpha_bars[t]), atol=1e-6)
        assert torch.allclose(x_0_hat, x_0, atol=1e-6)


def test_inversion_and_sampling_undo_each_other_with_many_steps():
    """Of Gaussian data the best eps_hat is known: x_t * sqrt(1 - alpha_bar_t) / var(x_t)."""
    alpha_bars = ddim.make_alpha_bars("cosine", 1000)
    x_0 = torch.randn(3, 1, 4, 4, dtype=torch.float64) * 0.3

    def denoise(x_t, t):
        a = alpha_bars[t]
        return x_t * (1 - a) ** 0.5 / (a * 0.3**2 + 1 - a)

    errors = []
    for steps in (10, 100, 1000):
        walk = alpha_bars, ddim.time_pairs(1000, steps), "eps"
        x_T = explore.ddim_invert(denoise, x_0, *walk)
        errors.append((ddim.ddim_sample(denoise, x_T, *walk, clip=False) - x_0).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def exact_denoiser(alpha_bars, covariance):
    """eps_hat of data ~ N(0, covariance), each image (1, 1, D): the best that there is.

    x_t ~ N(0, S) with S = alpha_bar * covariance + (1 - alpha_bar) * I, and eps and x_t have the
    covariance sqrt(1 - alpha_bar) * I: E[eps | x_t] = sqrt(1 - alpha_bar) * S^-1 x_t.
    """
    identity = torch.eye(len(covariance), dtype=torch.float64)

    def denoise(x_t, t):
        a = alpha_bars[t]
        return (1 - a) ** 0.5 * x_t @ torch.linalg.inv(a * covariance + (1 - a) * identity)

    return denoise


def gaussian_noise(count, pixels):
    generator = torch.Generator().manual_seed(0)
    shape = (count, 1, 1, pixels)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def test_repaint_samples_the_unknown_given_the_known():
    """Of Gaussian data it is known: mean C_uk C_kk^-1 x_k, variance C_uu - C_uk C_kk^-1 C_ku.

    Taking each step once is only near it, as the paper says; repeats come closer.
    """
    covariance = torch.tensor([[1.0, 0.8, 0.3], [0.8, 1.0, 0.5], [0.3, 0.5, 1.0]]).double()
    known = torch.tensor([[True, False, True]])
    x_0 = torch.tensor([1.5, 0.0, -0.5]).double().view(1, 1, 1, 3)
    k, u = [0, 2], [1]
    solved = torch.linalg.solve(covariance[k][:, k], covariance[k][:, u])
    mean = (solved[:, 0] * x_0.flatten()[k]).sum()
    variance = (covariance[u][:, u] - covariance[u][:, k] @ solved).squeeze()

    alpha_bars = ddim.make_alpha_bars("cosine", 1000)
    walk = alpha_bars, ddim.time_pairs(1000, 120), "eps"
    denoise = exact_denoiser(alpha_bars, covariance)
    errors = []
    for repeats in (1, 12):
        noise = gaussian_noise(2000, 3)
        x = explore.repaint(denoise, x_0, known, *walk, noise, clip=False, repeats=repeats)
        assert torch.equal(x[..., k].unique(dim=0), x_0[..., k])
        filled = x[..., 1]
        errors.append((filled.mean() - mean).abs().item())
    assert errors[1] < 0.04 < errors[0], errors
    assert filled.var().item() == pytest.approx(variance.item(), rel=0.1)


def test_an_edit_ends_where_the_exact_flow_does(tiny_run, in_tmp, monkeypatch):
    """SDEdit, of data ~ N(0, s^2): the flow scales x_t to their deviation, s over that of x_t."""
    s = 0.4
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    alpha_bars = ddim.make_alpha_bars("cosine", checkpoint["config"]["num_timesteps"])

    def guided(model, y, guidance, *times):
        def denoise(x_t, t):
            a = alpha_bars[t].item()
            eps = (1 - a) ** 0.5 * x_t / (a * s**2 + 1 - a)
            x_0_hat = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
            return a**0.5 * eps - (1 - a) ** 0.5 * x_0_hat

        return denoise

    monkeypatch.setattr(ddim, "guided", guided)
    Image.new("L", (32, 32), 191).save("grey.png")
    flags = ["--class", "o", "--steps", "1000", "--no-clip", "--checkpoint", str(tiny_run)]
    argv = ["edit", "ddim", "grey.png", "--strength", "0.5", "--num-samples", "3", *flags]
    assert explore.main([*argv, "--output", "x.npz"]) == 0
    found = common.to_float(torch.from_numpy(np.load("x.npz")["x"]))
    a = alpha_bars[499].item()
    eps = common.next_noise(common.noise_streams(0, range(3)), (1, 32, 32))
    x_t = a**0.5 * (191 / 127.5 - 1) + (1 - a) ** 0.5 * torch.from_numpy(eps)
    expected = x_t * s / (a * s**2 + 1 - a) ** 0.5
    assert (found[1] - x_t[0].clamp(-1, 1)).abs().max() < 0.01
    assert (found[2:] - expected.clamp(-1, 1)).abs().max() < 0.02


def test_pca_finds_the_plane_that_codes_lie_in():
    plane, _ = torch.linalg.qr(torch.randn(9, 2))
    flat = torch.randn(200, 2) * torch.tensor([3.0, 1.0])
    codes = flat @ plane.T + 5
    points = explore.project(codes, "pca", others=torch.full((1, 9), 5.0))
    assert points.shape == (201, 2)
    assert torch.allclose(torch.pdist(points[:200]), torch.pdist(flat), atol=1e-3)
    assert torch.allclose(points[200].norm(), flat.mean(dim=0).norm(), atol=1e-3)  # the same map
    variances = points[:200].var(dim=0)
    assert variances[0] > variances[1]


def test_two_numbers_are_their_own_map():
    codes = torch.randn(5, 2)
    assert torch.equal(explore.project(codes, "pca", codes), torch.cat([codes, codes]))


def test_tsne_keeps_lumps_apart(monkeypatch):
    codes = torch.cat([torch.randn(40, 6), torch.randn(40, 6) + 30])
    points = explore.project(codes, "tsne")
    near = torch.cdist(points[:40], points[:40]).mean()
    far = torch.cdist(points[:40], points[40:]).mean()
    assert points.shape == (80, 2) and far > 2 * near
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        explore.project(codes, "tsne")


# --- Pictures -------------------------------------------------------------------------------------


def steps_of(levels):
    """A trace of two grey images whose x_t is `level` and x_0_hat minus that, at each step."""
    grey = torch.ones(2, 1, 32, 32)
    return [(len(levels) - 1 - i, grey * level, grey * -level) for i, level in enumerate(levels)]


def test_a_filmstrip_has_x_t_above_x_0_hat_and_at_most_11_steps():
    levels = torch.linspace(-0.9, 0.9, 31)
    strip = np.array(explore.filmstrip(steps_of(levels.tolist())))
    scale = strip.shape[1] // (11 * CELL + 2)
    strip = strip[::scale, ::scale]
    assert strip.shape == (4 * CELL + 2, 11 * CELL + 2)
    for column in range(11):
        level = levels[3 * column]
        for row in range(4):
            sign = -1 if row % 2 else 1
            assert (cell(strip, row, column) == common.to_uint8(sign * level).item()).all()


def test_frames_have_the_grid_of_x_t_above_that_of_x_0_hat():
    trace = [(t, x.repeat(2, 1, 1, 1)[:3], y.repeat(2, 1, 1, 1)[:3])
             for t, x, y in steps_of([0.5, -0.2])]  # fmt: skip
    frames = explore.trajectory_frames(trace, columns=2)
    assert len(frames) == 2
    for frame, level in zip(frames, (0.5, -0.2), strict=True):
        scale = frame.width // (2 * CELL + 2)
        picture = np.array(frame)[::scale, ::scale]
        assert picture.shape == (4 * CELL + 2, 2 * CELL + 2)
        x_t, x_0_hat = (common.to_uint8(torch.tensor(v)).item() for v in (level, -level))
        found = [[int(cell(picture, i, j)[5, 5]) for j in range(2)] for i in range(4)]
        assert found == [[x_t, x_t], [x_t, 0], [x_0_hat, x_0_hat], [x_0_hat, 0]]


def test_a_gif_shows_its_frames_in_order_and_rests_on_the_last(tmp_path):
    explore.save_gif(
        [Image.new("L", (8, 8), level) for level in (10, 120, 250)], tmp_path / "x.gif"
    )
    assert [frame[0, 0] for frame in gif_frames(tmp_path / "x.gif")] == [10, 120, 250]
    with Image.open(tmp_path / "x.gif") as gif:
        found = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0 and found == [80, 80, 1000]
    assert [path.name for path in tmp_path.iterdir()] == ["x.gif"]


def colours_of(path):
    picture = np.array(Image.open(path).convert("RGB")).astype(int)
    return picture, {tuple(colour) for colour in picture.reshape(-1, 3)}


def test_a_map_has_dots_by_class_and_a_line_for_each_walk(tmp_path):
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 2])
    walks = [(torch.tensor([[0.0, 0.5], [0.5, 0.6], [1.0, 0.5]]), 1)]
    names = ["a", "b", "c", "unseen"]
    for name, given in (("plain", []), ("walks", walks)):
        axes = explore.new_figure(10.5, 9, "a map").add_subplot()
        explore.save_map(axes, points, labels, names, tmp_path / f"{name}.png", given)
    plain, colours = colours_of(tmp_path / "plain.png")
    with_walk, _ = colours_of(tmp_path / "walks.png")
    assert plain.shape == with_walk.shape == (900, 1050, 3)
    for tab10 in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):
        assert tab10 in colours
    assert (214, 39, 40) not in colours  # a class without a point
    left = np.arange(1050) < 970  # of the legend
    places = [
        [axis.mean() for axis in np.nonzero((plain == colour).all(axis=2) & left)]
        for colour in ((31, 119, 180), (255, 127, 14))
    ]
    assert places[0][0] > places[1][0] and places[0][1] < places[1][1]  # the y axis points up
    changed = (plain != with_walk).any(axis=2)
    assert changed.sum() > 2000
    columns = np.nonzero(changed.any(axis=0))[0]
    first, last = changed[:, columns[0] : columns[0] + 8], changed[:, columns[-1] - 8 : columns[-1]]
    ends = [end.any(axis=1).sum() for end in (first, last)]
    assert ends[1] > 1.4 * ends[0]  # a small marker, and a large one at the end


def test_names_are_in_the_legend_whatever_they_begin_with(tmp_path):
    axes = explore.new_figure(10.5, 9, "a map").add_subplot()
    names = ["_cat", "$x$", "$_$", "dog"]
    explore.save_map(axes, torch.randn(4, 2), torch.arange(4), names, tmp_path / "x.png")
    [legend] = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [" _cat", r"\$x\$", r"\$_\$", "dog"]


def test_a_map_of_many_classes_has_a_legend_of_40(tmp_path):
    names = [f"class {i}" for i in range(100)]
    axes = explore.new_figure(10.5, 9, "a map").add_subplot()
    explore.save_map(axes, torch.randn(100, 2), torch.arange(100), names, tmp_path / "x.png")
    [legend] = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names[:40]
    assert len(colours_of(tmp_path / "x.png")[1]) > 50


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS["interpolate"])
def test_an_interpolation_goes_from_one_plain_sample_to_another(name, draw, tiny_runs):
    draw("interpolate", name, "--class", "o,ki", "--vary", "noise", "--num-samples", "4",
         "--output", "noise.npz")  # fmt: skip
    draw("interpolate", name, "--class", "o,ki", "--num-samples", "4", "--output", "class.npz")
    flags = ["--checkpoint", str(tiny_runs(name)), "--class", "o", "--num-samples", "2"]
    flags += ["--steps", "3"] if name == "ddim" else []
    plain = script_images(name, *flags)
    noise, classes = images("noise.npz"), images("class.npz")
    assert len(noise) == 8 and len(classes) == 4
    assert np.load("noise.npz")["y"].tolist() == [0] * 4 + [1] * 4
    assert np.load("class.npz")["y"].tolist() == [0] * 2 + [1] * 2  # of the nearer end
    for found, expected in (
        (noise[0], plain[0]), (noise[3], plain[1]), (classes[0], plain[0]), (classes[3], noise[4])
    ):  # fmt: skip
        assert close(found, expected)
    assert np.abs(noise[1] - noise[0]).max() > 1 and np.abs(classes[0] - classes[3]).max() > 1


@pytest.mark.parametrize("name", COMMANDS["interpolate"])
def test_interpolations_as_pictures(name, draw):
    draw("interpolate", name, "--class", "o,ki")
    assert pixels(f"{name}_interpolate.png").shape == (CELL + 2, 10 * CELL + 2)  # ten frames
    draw("interpolate", name, "--class", "o,ki,su", "--num-samples", "4", "--output", "x.png")
    draw("interpolate", name, "--class", "o,ki,su", "--num-samples", "4", "--output", "x.npz")
    picture, array = pixels("x.png"), images("x.npz")
    assert picture.shape == (3 * CELL + 2, 4 * CELL + 2)  # three classes: noises in each
    assert np.array_equal(cell(picture, 2, 1), array[9, 0])
    flags = ["--class", "o,ki,su", "--num-samples", "4"]
    draw("interpolate", name, *flags, "--output", "x.gif")
    draw("interpolate", name, *flags, "--output", "folder/", "--batch-size", "3")
    frames = gif_frames("x.gif")
    assert len(frames) == 4 and len(list(Path("folder").iterdir())) == 12
    scale = frames[0].shape[1] // (3 * CELL + 2)
    last = frames[-1][::scale, ::scale].astype(int)
    assert np.abs(cell(last, 0, 2) - array[11, 0]).max() <= 8  # a GIF has a palette
    with Image.open("folder/00011_su.png") as picture:
        assert close(np.array(picture).astype(int), array[11, 0])


def test_many_frames_begin_in_a_new_row_of_the_grid():
    frames = torch.arange(1.0, 51).view(50, 1, 1, 1).expand(-1, 1, 2, 2)
    found = explore.filled_up(frames, 25, 10)[:, 0, 0, 0].tolist()
    assert found == [*range(1, 26), *[-1] * 5, *range(26, 51), *[-1] * 5]
    labels = torch.tensor([3] * 25 + [8] * 25)
    assert explore.filled_up(labels, 25, 10).tolist() == [3] * 30 + [8] * 30


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_mixing_later_keeps_the_ends_and_changes_the_middle(draw, solver):
    found = {}
    for at in ("1", "0.5", "0.001"):
        for pair in ("o", "o,ki"):
            draw("interpolate", "ddim", "--class", pair, "--num-samples", "5", "--mix-at", at,
                 "--solver", solver, "--output", "x.npz", steps=8)  # fmt: skip
            found[at, pair] = images("x.npz")
    for pair in ("o", "o,ki"):
        whole, half, late = (found[at, pair] for at in ("1", "0.5", "0.001"))
        assert close(whole[[0, 4]], half[[0, 4]]) and close(whole[[0, 4]], late[[0, 4]])
        assert np.abs(whole[2] - half[2]).max() > 1 and np.abs(half[2] - late[2]).max() > 1


def test_rows_of_no_class_have_no_names(tiny_runs, in_tmp, capsys):
    flags = ["--checkpoint", str(tiny_runs("ddim")), "--steps", "3"]
    widths = []
    for guidance in ("0", "1"):
        argv = ["filmstrip", "ddim", *flags, "--guidance", guidance, "--output", "x.png"]
        assert explore.main(argv) == 0
        said = "guidance 0 ignores the class: the images are of any"
        assert (said in capsys.readouterr().out) == (guidance == "0")
        with Image.open("x.png") as picture:
            widths.append(picture.width)
    assert widths[0] < widths[1]


def test_names_stand_beside_the_rows(tiny_runs, in_tmp):
    for command, name, *argv in (
        ("interpolate", "gan", "--class", "o,ki"), ("reconstruct", "vae", "3"),
        ("filmstrip", "ddim", "--class", "o", "--steps", "2"),
    ):  # fmt: skip
        flags = [*argv, "--checkpoint", str(tiny_runs(name))]
        assert explore.main([command, name, *flags, "--output", "names.png"]) == 0
        assert explore.main([command, name, *flags, "--output", "plain.png", "--no-names"]) == 0
        with Image.open("names.png") as names, Image.open("plain.png") as plain:
            margin = names.width - plain.width
            assert 20 < margin < 200 and names.height == plain.height
            whole = np.array(names.convert("L"))
            assert np.array_equal(whole[:, margin:], np.array(plain.convert("L")))
            assert whole[:, 0].min() == 255 and (whole[:, :margin] < 128).any()
            assert names.text["command"] == command and names.text["Software"] == "explore.py"


OTHER_SOLVER = {"ddim": "dpm++", "dpm++": "ddim"}[ddim.SOLVER]  # than the default


def test_flags_of_sampling_change_an_interpolation(draw):
    found = set()
    for flags in (
        [], ["--guidance", "4"], ["--guidance", "4", "--guidance-interval", "0", "0.3"],
        ["--solver", OTHER_SOLVER], ["--no-clip"], ["--seed", "5"], ["--steps", "3"],
    ):  # fmt: skip
        steps = int(flags[1]) if "--steps" in flags else 5
        flags = [] if "--steps" in flags else flags
        draw("interpolate", "ddim", "--class", "o,ki", "--output", "x.npz", *flags, steps=steps)
        found.add(images("x.npz").tobytes())
    for flags in ([], ["--truncation", "0.3"], ["--prior", "normal"]):
        draw("interpolate", "vae", "--class", "o", "--output", "x.npz", *flags)
        found.add(images("x.npz").tobytes())
    assert len(found) == 10


def error_of(capsys):
    return float(capsys.readouterr().out.split("error ")[1].split()[0])


@pytest.mark.parametrize("name", COMMANDS["invert"])
def test_inversion_comes_back_to_the_image_with_many_steps(name, draw, capsys, data_dir):
    draw("invert", name, "3", "--output", "way.gif")
    assert len(gif_frames("way.gif")) == 7  # 3 steps there, 3 back, and the end
    few = error_of(capsys)
    draw("invert", name, "3", steps=200)
    many = error_of(capsys)
    picture = pixels(f"{name}_invert.png")
    assert picture.shape == (CELL + 2, 3 * CELL + 2)
    given = common.load_data("kmnist", data_dir, train=False).images[3, 0].numpy()
    assert np.array_equal(cell(picture, 0, 0), given)
    assert np.abs(cell(picture, 0, 2) - given).mean() == pytest.approx(many, abs=0.01)
    if name == "ddim":
        assert many < 12 and many < few
    else:  # it comes back to what the autoencoder makes of the image
        draw("reconstruct", "ldm", "3", "--output", "x.npz")
        exact = error_of(capsys)
        assert abs(many - exact) < 0.5 and abs(many - exact) <= abs(few - exact)
    Image.new("L", (28, 28), 90).save("grey.png")
    flags = ["--class", "o", "--output", "x.png", "--guidance", "1.2"]
    draw("invert", name, "3", "grey.png", *flags)  # a row each
    picture = pixels("x.png")
    assert picture.shape == (2 * CELL + 2, 3 * CELL + 2)
    assert np.array_equal(cell(picture, 0, 0), given) and cell(picture, 1, 0)[16, 16] == 90
    errors = [np.abs(cell(picture, row, 2) - cell(picture, row, 0)).mean() for row in (0, 1)]
    out = capsys.readouterr().out
    assert f"error {np.mean(errors):.2f} of" in out and f"worst image {max(errors):.2f}" in out


def test_inversion_takes_100_steps_without_much_guidance(tiny_run, in_tmp, capsys, monkeypatch):
    seen = []
    guided = ddim.guided
    monkeypatch.setattr(ddim, "guided", lambda *a: seen.append(a[2]) or guided(*a))
    assert explore.main(["invert", "ddim", "3", "--checkpoint", str(tiny_run)]) == 0
    assert seen == [1.0] and "100 steps each way" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS["inpaint"])
def test_an_inpainting_keeps_what_is_known_and_fills_in_the_rest(name, draw, data_dir):
    given = common.load_data("kmnist", data_dir, train=False)
    draw("inpaint", name, "3", "--hole", "8,4,32,20", "--num-samples", "3", "--output", "x.npz")
    draw("inpaint", name, "3", "--hole", "8,4,32,20", "--num-samples", "3", "--class", "ki",
         "--output", "ki.npz")  # fmt: skip
    known = np.ones((32, 32), bool)
    known[4:20, 8:32] = False
    found = images("x.npz")[:, 0]
    image = given.images[3, 0].numpy()
    assert len(found) == 5 and np.array_equal(found[0], image)
    assert (found[:, known] == image[known]).all()
    assert (found[1, ~known] == 128).all()
    assert len(np.unique(found[2:], axis=0)) == 3  # samples differ
    y = given.labels[3].item()
    assert np.load("x.npz")["y"].tolist() == [y] * 5
    assert np.load("ki.npz")["y"].tolist() == [y, y, 1, 1, 1]
    assert (images("ki.npz")[2:, 0] != found[2:]).any()
    draw("inpaint", name, "3", "--repeats", "2", "--eta", "0.5")
    assert pixels(f"{name}_inpaint.png").shape == (CELL + 2, 10 * CELL + 2)


@pytest.mark.parametrize("name", COMMANDS["edit"])
def test_an_edit_is_the_image_at_little_strength_and_a_plain_sample_at_full(
    name, draw, tiny_runs, capsys
):
    draw("edit", name, "3", "--strength", "0.001", "--class", "o", "--output", "little.npz")
    draw("edit", name, "3", "--strength", "1", "--class", "o", "--output", "full.npz")
    flags = ["--class", "o", "--num-samples", "8", "--steps", "3"]
    plain = script_images(name, *flags, "--checkpoint", str(tiny_runs(name)))
    said = capsys.readouterr().out
    assert said.count("steps 1,") == 1  # of the 1000 timesteps one is left, below the interval
    assert said.count("(counts as 1: no step is guided)") == 1
    little, full = images("little.npz"), images("full.npz")
    assert len(little) == len(full) == 10 and set(np.load("full.npz")["y"][2:]) == {0}
    if name == "ddim":
        assert np.abs(little[2:] - little[0]).mean() < 12
    assert np.abs(full[2:] - plain).mean() < 3  # at t = T-1 hardly anything of the image is left
    assert np.abs(little[2:] - plain).mean() > 3


@pytest.mark.parametrize("name", COMMANDS["reconstruct"])
def test_reconstructions_stand_below_the_images(name, draw, capsys, data_dir):
    draw("reconstruct", name, "0", "3", "5")
    error = error_of(capsys)
    picture = pixels(f"{name}_reconstruct.png")
    assert picture.shape == (2 * CELL + 2, 3 * CELL + 2)
    data = common.load_data("kmnist", data_dir, train=False)
    differences = []
    for column, index in enumerate((0, 3, 5)):
        given = data.images[index, 0].numpy().astype(int)
        assert np.array_equal(cell(picture, 0, column), given)
        differences.append(np.abs(cell(picture, 1, column) - given).mean())
    assert np.mean(differences) == pytest.approx(error, abs=0.01)
    draw("reconstruct", name, "0", "--output", "one.png")
    assert np.array_equal(pixels("one.png"), picture[:, : CELL + 2])
    draw("reconstruct", name, "0", "3", "--output", "x.npz")
    x = np.load("x.npz")
    assert x["y"].tolist() == data.labels[[0, 3]].repeat(2).tolist()
    Image.fromarray(x["x"][0, 0]).save("given.png")
    own = data.class_names[data.labels[0]]
    draw("reconstruct", name, "given.png", "--class", own, "--output", "file.npz")
    assert close(images("file.npz")[1], x["x"][2].astype(int))


def test_the_way_between_two_images_starts_and_ends_at_their_reconstructions(draw, frames_of):
    draw("between", "vae", "0", "3")
    assert pixels("vae_between.png").shape == (CELL + 2, 10 * CELL + 2)
    draw("between", "vae", "0", "3", "--num-samples", "5", "--output", "way.npz")
    draw("reconstruct", "vae", "0", "3", "--output", "ends.npz")
    way = images("way.npz")
    y_a, *_, y_b = labels = np.load("way.npz")["y"].tolist()
    assert y_a != y_b and labels == [y_a] * 2 + [y_b] * 3  # of the nearer image
    assert len(way) == 5 and close(way[[0, -1]], images("ends.npz")[2:])
    assert np.abs(way[2] - way[0]).max() > 1 and np.abs(way[2] - way[4]).max() > 1
    draw("between", "vae", "0", "3", "--num-samples", "5", "--output", "way.gif")
    assert frames_of == {"way.gif": 5} and 2 <= len(gif_frames("way.gif")) <= 5


def test_frames_between_two_classes_are_called_so_in_each_row(
    tiny_runs, in_tmp, data_dir, monkeypatch
):
    """Also where there are more frames than columns."""
    data = common.load_data("kmnist", data_dir, train=False)
    y_a, y_b = data.labels[[0, 3]].tolist()
    assert y_a != y_b
    seen = []
    monkeypatch.setattr(explore, "save_images", lambda *given: seen.append(given[-1]))
    names = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)["class_names"]
    for command in (
        f"interpolate vae --class {y_a},{y_b} --num-samples 30",
        f"interpolate vae --class {y_b} --vary noise", "between vae 0 3", "between vae 0 0",
    ):  # fmt: skip
        assert explore.main([*command.split(), "--checkpoint", str(tiny_runs("vae"))]) == 0
    both = f"{names[y_a]} to {names[y_b]}"
    assert seen == [[both] * 3, [names[y_b]], [both], [names[y_a]]]


def test_a_map_has_the_codes_of_evenly_spaced_images(tiny_runs, in_tmp, data_dir, monkeypatch):
    """With their labels; here every third of 60 images."""
    monkeypatch.setattr(explore, "MAP_IMAGES", 20)
    shown = []
    monkeypatch.setattr(explore, "save_map", lambda _, *given: shown.append(given))
    assert (
        explore.main(["map", "vae", "--checkpoint", str(tiny_runs("vae")), "--method", "pca"]) == 0
    )
    ((points, labels, names, *_),) = shown
    data = common.load_data("kmnist", data_dir, train=False)
    checkpoint = torch.load(tiny_runs("vae") / "vae.pt", weights_only=True)
    model = vae.ema_network(checkpoint, torch.device("cpu"))
    codes = vae.encode(model, data.images[::3], data.labels[::3])[0]
    assert len(labels) == 20 and torch.equal(labels, data.labels[::3])
    assert np.allclose(points, explore.project(codes, "pca"), atol=1e-4)
    assert names == data.class_names


@pytest.mark.parametrize(("name", "method"), [("vae", "pca"), ("ldm", "tsne")])
def test_a_map_has_a_colour_for_each_class(name, method, draw, monkeypatch):
    project, save_map, used, walked = explore.project, explore.save_map, [], []

    def spy(codes, method, **others):
        used.append(method)
        return project(codes, method, **others)

    def spy_map(axes, points, labels, names, path, walks):
        walks = [*walks]
        walked.extend(y for _, y in walks)
        save_map(axes, points, labels, names, path, walks)

    monkeypatch.setattr(explore, "project", spy)
    monkeypatch.setattr(explore, "save_map", spy_map)
    classes = ["--class", "o,ki"] if name == "ldm" else []
    draw("map", name, "--method", method, *classes)
    assert {*used} == {method}
    picture, colours = colours_of(f"{name}_map.png")
    assert picture.shape == (900, 1050, 3)
    from matplotlib import colormaps

    for y in range(10):
        assert tuple(round(255 * v) for v in colormaps["tab10"](y)[:3]) in colours
    assert walked == ([0, 1] if name == "ldm" else [])


@pytest.mark.parametrize("latent_dim", ["1", "2"])
def test_a_walk_is_for_two_latent_numbers_and_a_map_for_two_or_more(
    latent_dim, in_tmp, data_dir, capsys
):
    import vae

    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["vae"]]
    assert vae.main([*flags, "--latent-dim", latent_dim]) == 0
    if latent_dim == "1":
        message = "walk needs a VAE with --latent-dim 2; this one has 1"
        assert message in refused(explore.main, ["walk", "vae", "--class", "o"], capsys)
        message = "map needs a VAE with --latent-dim 2 or more; this one has 1"
        assert message in refused(explore.main, ["map", "vae"], capsys)
        return
    message = "walk needs a single --class"
    assert message in refused(explore.main, ["walk", "vae", "--class", "o,ki"], capsys)
    assert explore.main(["walk", "vae", "--class", "o"]) == 0
    assert pixels("vae_walk.png").shape == (16 * CELL + 2, 16 * CELL + 2)
    assert explore.main(["walk", "vae", "--class", "o", "--num-samples", "5",
                         "--output", "walk.npz"]) == 0  # fmt: skip
    found = images("walk.npz")
    checkpoint = torch.load("runs/vae/vae.pt", weights_only=True)
    model = vae.ema_network(checkpoint, torch.device("cpu"))
    corner = torch.tensor([[-2.5, 2.5], [2.5, 2.5], [0, 0]])  # above left, above right, the middle
    expected = vae.decode(model, corner, vae.one_hot(torch.zeros(3, dtype=torch.int64), 10))
    expected = common.to_uint8(expected).numpy().astype(int)
    assert len(found) == 25 and close(found[[0, 4, 12]], expected)
    assert explore.main(["map", "vae"]) == 0 and Path("vae_map.png").is_file()


@pytest.mark.parametrize("name", COMMANDS["filmstrip"])
def test_a_filmstrip_ends_in_the_images_of_plain_sampling(name, draw, tiny_runs):
    flags = ["--class", "o,ki", "--num-samples", "2"]
    draw("filmstrip", name, *flags)
    strip = pixels(f"{name}_filmstrip.png")
    assert strip.shape == (8 * CELL + 2, 4 * CELL + 2)  # 4 images, 2 rows; 3 steps and the end
    flags += ["--checkpoint", str(tiny_runs(name)), "--steps", "3"]
    for i, image in enumerate(script_images(name, *flags)):
        assert close(cell(strip, 2 * i, 3), image[0]) and close(cell(strip, 2 * i + 1, 3), image[0])
    assert cell(strip, 0, 0).std() > cell(strip, 1, 0).std()  # noise above what it is taken for


@pytest.mark.parametrize("name", COMMANDS["gif"])
def test_a_gif_shows_the_steps_or_one_sample_after_the_other(name, draw, tiny_runs):
    draw("gif", name, "--class", "o,ki", "--num-samples", "3")
    frames = gif_frames(f"{name}_gif.gif")
    flags = ["--checkpoint", str(tiny_runs(name)), "--class", "o,ki", "--num-samples", "3"]
    flags += ["--steps", "3"] if name in explore.DIFFUSION else []
    plain = script_images(name, *flags)
    columns, rows = (3, 4) if name in explore.DIFFUSION else (2, 1)
    scale = frames[-1].shape[1] // (columns * CELL + 2)
    last = frames[-1][::scale, ::scale].astype(int)
    assert last.shape == (rows * CELL + 2, columns * CELL + 2)
    if name in explore.DIFFUSION:
        assert len(frames) == 4  # three steps and the end
        expected = plain[4, 0]  # x_t in two rows, x_0_hat in two, and at the end both are the image
        assert np.abs(cell(last, 1, 1) - expected).max() <= 8
        assert np.abs(cell(last, 3, 1) - expected).max() <= 8
    else:
        assert len(frames) == 3  # the third sample of each class
        assert np.abs(cell(last, 0, 1) - plain[5, 0]).max() <= 8


def test_samplers_flags_reach_the_walk(draw):
    found = set()
    for name, flags in (
        ("ddpm", []), ("ddpm", ["--variance", "large"]), ("ddim", []),
        ("ddim", ["--solver", "ddim", "--eta", "0.7"]),
        ("ddim", ["--solver", OTHER_SOLVER]), ("ldm", []),
        ("ldm", ["--solver", "ddim", "--eta", "1"]),
        ("ldm", ["--guidance", "5"]),
    ):  # fmt: skip
        draw("filmstrip", name, "--class", "o", "--output", "x.png", *flags)
        found.add(pixels("x.png").tobytes())
    assert len(found) == 8


def test_a_gif_of_a_gan_has_ten_samples(draw, frames_of):
    draw("gif", "gan", "--class", "o")
    assert frames_of == {"gan_gif.gif": 10} and len(gif_frames("gan_gif.gif")) > 2


# --- Command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "arguments are required: COMMAND"),
        ("draw ddim", "invalid choice: 'draw'"),
        ("interpolate ldm", "invalid choice: 'ldm'"),
        ("interpolate ddim --class o --vary class", "--vary class needs two classes"),
        ("interpolate ddim --class o,ki,su --vary class", "--vary class needs two classes"),
        ("interpolate ddim --class o,ki --num-samples 1", "'1' is not a whole number from 2"),
        ("interpolate ddim --class nothing", "no class 'nothing'"),
        ("interpolate ddim --eta 0.5", "interpolate is deterministic: --eta must be 0, not 0.5"),
        ("interpolate ddim --steps 1001", "--steps 1001 is more than the 1000 timesteps"),
        ("interpolate ddim --mix-at 0", "'0' is not a number above 0 to 1"),
        ("interpolate vae --mix-at 0.5", "unrecognized arguments: --mix-at"),
        ("interpolate ddim --output -", "'-' has no ending: a new folder is -/"),
        ("interpolate ddim --truncation 1", "unrecognized arguments: --truncation"),
        ("interpolate ddim --output x.jpg", "must end in .png or .npz or .gif, or be a folder"),
        ("interpolate", "arguments are required: MODEL"),
        ("interpolate vae --steps 3", "unrecognized arguments: --steps"),
        ("interpolate vae --data-dir .", "unrecognized arguments: --data-dir"),
        ("interpolate gan --prior normal", "unrecognized arguments: --prior"),
        ("interpolate gan --truncation 0", "from 0.1"),
        ("invert ddim", "the following arguments are required: IMAGE"),
        ("invert ddim 60", "there is no test image 60: indices are 0 to 59"),
        ("invert ddim nowhere.png --class o", "nowhere.png is not a readable image"),
        ("invert ddim nowhere.png", "nowhere.png needs a single --class"),
        ("invert ddim 3 --eta 1", "invert is deterministic: --eta must be 0, not 1.0"),
        ("invert ldm 3 --eta 1", "invert is deterministic"),
        ("invert ddim 3 --seed 1", "unrecognized arguments: --seed"),
        ("invert ddim ./given.png --class o --output given.png", "is one of the input images"),
        ("invert ldm 0 --no-clip", "unrecognized arguments: --no-clip"),
        ("invert ddim 3 --class o", "--class is for image files"),
        ("inpaint ddim 3 --hole 0,0,0,32", "'0,0,0,32' is not LEFT,TOP,RIGHT,BOTTOM of a box"),
        ("inpaint ddim 3 --hole 0,0,32,33", "the images have 32x32 pixels"),
        ("inpaint ldm 3 --hole 0,0,32,10", "must be multiples of 4, the pixels of a latent"),
        ("inpaint ddim 3 --solver dpm++", "invalid choice: 'dpm++'"),
        ("inpaint ddim 3 --class o,ki", "inpaint needs a single --class"),
        ("edit ddim 3 --eta 0.5", "edit is deterministic: --eta must be 0, not 0.5"),
        ("edit ddim 3 --class all", "edit needs a single --class"),
        ("edit ddim ./given.png", "needs a single --class, that of the samples"),
        ("edit ddim 3 --strength 0", "'0' is not a number above 0 to 1"),
        ("edit ddim 3 --num-samples 19", "from 1 to 18"),
        ("reconstruct vae 99", "there is no test image 99: indices are 0 to 59"),
        ("reconstruct vae nowhere.png --class o", "nowhere.png is not a readable image"),
        ("reconstruct vae nowhere.png", "needs a single --class"),
        ("reconstruct vae given.png --class o --data x", "--data and --data-dir are for indices"),
        ("edit ddim given.png --data-dir x", "--data and --data-dir are for indices"),
        (f"reconstruct vae {' '.join(map(str, range(21)))}", "21 images are too many: at most 20"),
        ("between vae 1", "the following arguments are required: IMAGE"),
        ("between vae 0 given.png --class o --output given.png", "is one of the input images"),
        ("between vae 0 1 --num-samples 1", "from 2"),
        ("map vae --method umap", "invalid choice: 'umap'"),
        ("map vae --output x.gif", "must end in .png"),
        ("map vae --steps 3", "unrecognized arguments: --steps"),
        ("map vae --class o", "unrecognized arguments: --class"),
        ("walk vae", "the following arguments are required: --class"),
        ("walk vae --class o", "walk needs a VAE with --latent-dim 2; this one has 4"),
        ("walk vae --class o --num-samples 21", "from 2 to 20"),
        ("filmstrip ddim --output x.npz", "must end in .png"),
        ("filmstrip ddim --variance large", "unrecognized arguments: --variance"),
        ("filmstrip ddpm --eta 1", "unrecognized arguments: --eta"),
        ("filmstrip ddim --eta 0.5 --solver dpm++", "--eta 0.5 is for --solver ddim"),
        ("filmstrip ldm --eta 0.5 --solver dpm++", "--eta 0.5 is for --solver ddim"),
        ("interpolate ddim --guidance-interval 0.8 0.2", "right is 0 <= LOW <= HIGH <= 1"),
        ("invert ddim 0 --guidance-interval 0 0.7", "is for a guidance above 1"),
        ("gif ddim --output x.png", "must end in .gif"),
        ("gif gan --steps 5", "unrecognized arguments: --steps"),
        ("gif ddim --checkpoint nowhere.pt", "there is no nowhere.pt"),
        ("gif ddim --device cuda", "--device cuda is not available on this machine"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, message, tiny_runs, in_tmp, capsys):
    argv = argv.split()
    if "given.png" in " ".join(argv):
        Image.new("L", (28, 28), 90).save("given.png")
    before = {path: path.read_bytes() for path in in_tmp.iterdir()}
    if len(argv) > 1 and argv[1] in COMMANDS.get(argv[0], ()) and "--checkpoint" not in argv:
        argv += ["--checkpoint", str(tiny_runs(argv[1]))]
    assert message in refused(explore.main, argv, capsys)
    assert {path: path.read_bytes() for path in in_tmp.iterdir()} == before


def test_a_map_without_matplotlib_says_what_to_install(tiny_runs, in_tmp, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused(explore.main, ["map", "vae", "--checkpoint", str(tiny_runs("vae"))], capsys)
    assert "a map needs matplotlib: pip install matplotlib" in error


@pytest.mark.parametrize("command", ["interpolate", "filmstrip", "gif", "invert"])
def test_images_that_are_not_finite_are_refused(command, tiny_run, in_tmp, capsys):
    checkpoint = torch.load(tiny_run / "ddim.pt", weights_only=True)
    checkpoint["ema"]["head.bias"][:] = torch.nan
    torch.save(checkpoint, "broken.pt")
    image = ["3"] if command == "invert" else ["--class", "o"]
    flags = ["--checkpoint", "broken.pt", "--steps", "2"]
    assert "not finite" in refused(explore.main, [command, "ddim", *image, *flags], capsys)
    assert [path.name for path in in_tmp.iterdir()] == ["broken.pt"]


@pytest.fixture
def lines_of(monkeypatch):
    """A function: the curves that `explore.py log` draws of some logs, by the title of the axes."""
    found = {}

    def look(figure, *_, **__):
        for axes in figure.axes:
            found[axes.get_title()] = [line.get_xydata().tolist() for line in axes.get_lines()]

    def curves(*logs):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", look)
        monkeypatch.setattr(explore, "written_whole", lambda path: contextlib.nullcontext())
        assert explore.main(["log", *map(str, logs)]) == 0
        return [found[key] for key in found]

    return curves


def test_a_log_is_drawn_as_curves(in_tmp, lines_of):
    """Two runs by hand: one without classes of t, one whose batches became larger."""
    Path("a").mkdir()
    Path("a/log.jsonl").write_text(
        '{"step": 0, "seconds": 0, "diversity": {}}\n'
        '{"step": 50, "seconds": 10.0, "images": 500, "loss_g": 2.0, "loss_d": 1.0, "lr": 0.5}\n'
        '{"step": 100, "seconds": 15.0, "images": 1500, "loss_g": 3.0, "loss_d": 4.0, "lr": 0.1}\n'
    )
    tenths = [[1, *[0.5] * 9], [3, *[None] * 9]]
    steps = [{"step": i, "seconds": i, "loss": i, "loss_by_tenth_of_t": t}
             for i, t in enumerate(tenths, 1)]  # fmt: skip
    Path("b.jsonl").write_text("\n".join(map(json.dumps, steps)))
    losses, by_tenth, rates, speeds = lines_of("a", "b.jsonl")
    assert losses == [[[50, 2], [100, 3]], [[50, 1], [100, 4]], [[1, 1], [2, 2]]]
    early, _, late = by_tenth
    assert [y for _, y in early] == tenths[0] and [y for _, y in late] == [2, *[0.5] * 9]
    assert [x for x, _ in late] == pytest.approx([0.05 + i / 10 for i in range(10)])
    assert rates == [[[50, 0.5], [100, 0.1]]]
    with Path("a/log.jsonl").open("a") as log:  # as a full disk leaves it
        log.write('{"step": 150, "los')
    assert lines_of("a", "b.jsonl")[0] == losses
    assert speeds == [[[100, 200]]]  # 1000 images in 5 seconds


def test_the_included_logs_have_all_their_curves(lines_of, in_tmp):
    """Images/s, too, of an older log by those that the checkpoint beside counts: batches of 64."""
    file = ROOT / "pretrained/ddim.log.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if '"lr"' in line]
    older = [{key: value for key, value in line.items() if key != "images"} for line in lines]
    Path("ddim.log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in older))
    Path("ddim.pt").symlink_to(ROOT / "pretrained/ddim.pt")
    before, last = lines[-2:]
    speed = 64 * (last["step"] - before["step"]) / (last["seconds"] - before["seconds"])
    for log in (file, Path("ddim.log.jsonl")):
        curves = lines_of(log)
        assert [len(lines) for lines in curves] == [1, 3, 1, 1]
        assert curves[3][0][-1] == pytest.approx([last["step"], speed])


def test_a_run_can_be_drawn(tiny_run, in_tmp, capsys):
    text = (tiny_run / "log.jsonl").read_text()
    line = '{"step": 18, "images": 360, "seconds": 99, "loss": 1}\n'
    assert json.loads(text.splitlines()[-1])["images"] == 360  # 18 steps of 20
    Path("log.jsonl").write_text(text + line + line.replace("99", "100"))
    assert explore.main(["log", "."]) == 0
    assert "wrote log.png" in capsys.readouterr().out
    assert Image.open("log.png").size == (1400, 900)


def test_a_log_that_cannot_be_drawn_is_one_line(tiny_run, in_tmp, capsys, monkeypatch):
    Path("x.jsonl").write_text("no log")
    Path("new.jsonl").write_text('{"step": 0}\n{"step": 50, "loss": 1}\n')
    Path("other.jsonl").write_text('{"loss": 1}\n{"loss": 2}\n')
    line = '{"step": 1, "seconds": 1, "loss": 1}\n'
    Path("no_time.jsonl").write_text('{"step": 1, "loss": 1}\n' * 2)
    Path("text.jsonl").write_text(line + line.replace('"loss": 1', '"loss": "a"'))
    Path("mixed.jsonl").write_text(line + line.replace("loss", "kl"))
    for argv, message in (
        (["nowhere"], "nowhere is not the log of a training"),
        (["x.jsonl"], "x.jsonl is not the log of a training"),
        (["new.jsonl"], "new.jsonl has fewer than two lines with a loss"),
        (["other.jsonl"], "other.jsonl has fewer than two lines with a loss"),
        (["no_time.jsonl"], "its line of step 1 has no number 'seconds'"),
        (["text.jsonl"], "its line of step 1 has no number 'loss'"),
        (["mixed.jsonl"], "its line of step 1 has no number 'loss'"),
        (["new.jsonl", "--output", "x.gif"], "must end in .png"),
    ):
        assert message in refused(explore.main, ["log", *argv], capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    file = str(ROOT / "pretrained/gan.log.jsonl")
    error = refused(explore.main, ["log", file], capsys)
    assert "log needs matplotlib: pip install matplotlib" in error
    assert not Path("log.png").exists()


def test_without_dropped_labels_guidance_is_fixed(in_tmp, data_dir, capsys):
    flags = ["--train", "--epochs", "1", "--data-dir", data_dir, *TINY_FLAGS["ddim"]]
    assert ddim.main([*flags, "--label-dropout", "1", "--num-timesteps", "30"]) == 0
    assert explore.main(["invert", "ddim", "3"]) == 0  # unconditional, in 30 steps
    assert "30 steps each way" in capsys.readouterr().out
    message = "the label dropout of the training leaves only --guidance 0.0"
    assert message in refused(explore.main, ["invert", "ddim", "3", "--guidance", "1"], capsys)


def test_help_has_an_example_of_each_command_that_parses(capsys):
    with contextlib.suppress(SystemExit):
        explore.main(["--help"])
    text = capsys.readouterr().out
    examples = [line.split("  ")[0].split() for line in map(str.strip, text.splitlines())
                if line.startswith("python explore.py") and "COMMAND" not in line]  # fmt: skip
    parsed = [explore.build_parser().parse_args(example[2:]) for example in examples]
    assert {args.command for args in parsed} == {*COMMANDS, "log"}
    assert {
        command: [name for name in names if name != "distill"]
        for command, (_, names, _) in explore.COMMANDS.items()
    } == COMMANDS
    students = [
        command for command, (_, names, _) in explore.COMMANDS.items() if "distill" in names
    ]
    assert tuple(students) == OF_STUDENTS
    for command in COMMANDS:
        text = help_of(capsys, command)
        assert f"usage: explore.py {command}" in text and f"python explore.py {command} " in text
        assert all(name in text for name in COMMANDS[command])
    assert "ddim may jump between two neighbouring frames" in help_of(capsys, "interpolate")


def help_of(capsys, *argv):
    """A help text as one line."""
    with pytest.raises(SystemExit) as stop:
        explore.main([*argv, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def flags_of(parser):
    """{flag: (choices, help, default)} of a parser."""
    actions = [action for action in parser._actions if action.dest != "help"]
    return {flag: (action.choices, action.help, action.default)
            for action in actions for flag in action.option_strings}  # fmt: skip


def sampling_flags_of(name):
    parser = runs.Parser()
    importlib.import_module(name).sampling_flags(parser)
    return flags_of(parser)


SAMPLED = {"interpolate", "invert", "inpaint", "edit", "filmstrip", "gif"}  # and map, of ldm
CHANGED = {
    "invert": {"--steps", "--guidance", "--solver", "--eta"}, "inpaint": {"--eta", "--solver"},
    "interpolate": {"--eta"}, "edit": {"--eta"},
}  # fmt: skip
PAIRS = [(command, name) for command, names in COMMANDS.items() for name in names]
PAIRS += [(command, "distill") for command in OF_STUDENTS]


@pytest.mark.parametrize(("command", "name"), PAIRS)
def test_a_model_has_the_flags_of_its_script_with_its_defaults(command, name):
    parser = runs.Parser(conflict_handler="resolve" if command in CHANGED else "error")
    explore.add_flags(parser, command, name)
    found = flags_of(parser)
    every = {flag for model in COMMANDS["gif"] for flag in sampling_flags_of(model)}
    sampled = command in SAMPLED or (command, name) == ("map", "ldm")
    expected = sampling_flags_of(name) if sampled and name != "distill" else {}  # it has one walk
    assert found.keys() & every == expected.keys()
    changed = {flag for flag in expected if found[flag] != expected[flag]}
    assert changed == CHANGED.get(command, set()) & expected.keys()
    assert ("--seed" in found) == (sampled and command != "invert")
    reads = command in ("invert", "inpaint", "edit", "reconstruct", "between", "map")
    assert ("--data-dir" in found) == reads
    assert ("--class" in found) == ((command, name) != ("map", "vae"))
    if command in ("invert", "inpaint", "edit", "reconstruct", "between", "walk"):
        found.pop("--class")  # without a default: an image may have a class of its own
    for flag, (_, text, default) in found.items():
        if isinstance(default, int | float | str | Path) and not isinstance(default, bool):
            said = text.rsplit("(", 1)[1].rstrip(")")
            assert said == str(default) or float(said) == default, flag


def test_the_help_of_a_model_has_its_true_defaults(capsys):
    text = help_of(capsys, "invert", "ddim")
    assert "the network predicts eps (100)" in text and "misses the image (1)" in text
    assert "(15)" not in text and "else 2)" not in text
    assert "(15)" in help_of(capsys, "interpolate", "ddim")
    assert "(250)" in help_of(capsys, "filmstrip", "ddpm")
    assert "above 1 guided (1 or 0 where" in help_of(capsys, "gif", "ldm")
    assert "always, else 2.5)" in help_of(capsys, "gif", "ldm")
    assert "samples of each class, 1 to 10,000 (10)" in help_of(capsys, "gif", "gan")
    assert "samples of each class, 1 to 10,000 (1)" in help_of(capsys, "gif", "ddim")


@pytest.mark.parametrize("argv", ["map vae", "map ldm", "invert ddim 3", "reconstruct vae 3"])
def test_a_data_set_with_other_classes_is_refused(argv, tiny_runs, in_tmp, capsys):
    name = argv.split()[1]
    checkpoint = torch.load(tiny_runs(name) / f"{name}.pt", weights_only=True)
    checkpoint["class_names"][3] = "another"
    torch.save(checkpoint, "other.pt")
    error = refused(explore.main, [*argv.split(), "--checkpoint", "other.pt"], capsys)
    assert "the data set no longer has the classes of the training" in error


def test_matplotlib_and_scikit_learn_are_imported_only_for_a_map(tiny_run, in_tmp):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import explore
explore.main(["gif", "ddim", "--checkpoint", {str(tiny_run)!r}, "--steps", "3", "--class", "o"])
found = {{"matplotlib", "sklearn"}} & {{*sys.modules}}
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=in_tmp)
    assert done.returncode == 0 and done.stdout.startswith("wrote ddim_gif.gif"), done.stderr


def test_the_shipped_weights_serve_without_a_run(in_tmp):
    assert explore.main(["interpolate", "ddim", "--class", "Sneaker,Bag", "--steps", "4",
                         "--num-samples", "3", "--output", "x.npz"]) == 0  # fmt: skip
    x = images("x.npz")
    assert x.shape == (3, 1, 32, 32) and x[0, 0].max() > 150 and x[0, 0, :4].max() < 30
