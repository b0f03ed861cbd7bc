"""evaluate.py, benchmarks/report.py and benchmarks/extractor.py.

Every score against cases worked out by hand, bad samples that must score worse, whole runs without
torch.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, idx_bytes, refused, save_sealed, small_set, with_card, write_idx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageFilter

import evaluate
import infer_onnx
from benchmarks import extractor, report

CLASSES = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
# A Python in which nothing can be imported but what evaluate.py needs to score.
WITHOUT = ["torch", "torchvision", "onnx", "onnxscript", "scipy", "sklearn", "tqdm", "matplotlib"]
WITHOUT_TORCH = f"""
import runpy, sys
for name in {[*WITHOUT, "common", "export"]}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_extractor(path, seed, accuracy=1.0, data="kmnist"):
    """An extractor of conftest.small_set: 16 random projections, a logit for each class's bar."""
    rng = np.random.default_rng(seed)
    bars = np.zeros((28, 28, 10), np.float32)
    for y in range(10):
        bars[4:24, 2 * y + 2 : 2 * y + 6, y] = 1
    weights = {"p": rng.normal(size=(784, 16)).astype(np.float32) / 28, "b": bars.reshape(784, 10)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "p"], ["features"]),
        helper.make_node("MatMul", ["flat", "b"], ["logits"]),
    ]
    shapes = {"x": ["batch", 1, 28, 28], "features": ["batch", 16], "logits": ["batch", 10]}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes, "extractor", [values["x"]], [values["features"], values["logits"]], initializers
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    card = {
        "format": 1,
        "data": data,
        "accuracy": accuracy,
        "architecture": "bars",
        "class_names": CLASSES,
    }
    helper.set_model_props(proto, {evaluate.CARD_KEY: json.dumps(card)})
    save_sealed(proto, path)


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    """A folder with two extractors of the small set."""
    folder = tmp_path_factory.mktemp("extractors")
    write_extractor(folder / "extractor_kmnist.onnx", 0)
    write_extractor(folder / "extractor2_kmnist.onnx", 1)
    return folder


@pytest.fixture(scope="module")
def sets(extractors):
    """400 training images, 400 test images, 400 more: (images, labels) each; and the Reference."""
    train, test, more = (
        (evaluate.framed(x[:, None]), y.astype(np.int64))
        for x, y in (small_set(40, seed) for seed in range(3))
    )
    files = [extractors / f"extractor{number}_kmnist.onnx" for number in ("", 2)]
    sessions = [evaluate.load_extractor(file, "kmnist", test, 1)[0] for file in files]
    return train, test, more, evaluate.make_reference(sessions, train[0], test[0])


# --- Scores against known answers -----------------------------------------------------------------


def test_frechet_distance_is_the_closed_formula():
    # Of commuting covariances: |mean_a - mean_b|^2 + sum (sqrt(a) - sqrt(b))^2.
    a, b = np.diag([4.0, 9.0, 0.0]), np.diag([1.0, 16.0, 25.0])
    distance = evaluate.frechet_distance(np.zeros(3), a, np.array([3.0, 0, 4]), b)
    assert distance == pytest.approx(25 + 1 + 1 + 25)
    # Of others: by the eigenvalues of the plain product.
    rng = np.random.default_rng(0)
    a, b = (x @ x.T for x in rng.normal(size=(2, 6, 6)))
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert evaluate.frechet_distance(np.ones(6), a, np.ones(6), b) == pytest.approx(expected)
    assert evaluate.frechet_distance(np.ones(6), a, np.ones(6), a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_sampled_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20_000, 2)), rng.normal(size=(20_000, 2)) * [2, 3] + [1, 0]
    distance = evaluate.frechet_distance(*evaluate.moments(a), *evaluate.moments(b))
    assert distance == pytest.approx(1 + 1 + 4, rel=0.03)


def test_manifold_scores_of_points_on_a_line():
    lines = ([0, 1, 2, 10, 30], [0.5, 5, 40, 41, 100, 101])
    real, fake = (np.array([[x, 0] for x in xs], np.float32) for xs in lines)
    radii = evaluate.neighbour_radii(real, 1)
    assert radii.tolist() == [1, 1, 1, 64, 400]  # squared
    # Of the fakes, 0.5 is in the balls of 0 and 1, 5 in that of 10, 40 and 41 in that of 30, the
    # others in none: all reals but 2 have one. The balls of 0.5 and 5 reach 4.5 and hold 0, 1 and
    # 2; no other holds a real.
    scores = evaluate.manifold_scores(real, radii, fake, 1)
    assert scores == pytest.approx(
        {"precision": 4 / 6, "recall": 3 / 5, "density": 5 / 6, "coverage": 4 / 5}
    )


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 70, 5)).astype(np.float32)
    squares = ((real[:, None] - fake[None]) ** 2).sum(axis=2)
    assert np.allclose(evaluate.squared_distances(real, fake), squares, atol=1e-4)
    whole = evaluate.manifold_scores(real, evaluate.neighbour_radii(real), fake)
    monkeypatch.setattr(
        evaluate, "in_blocks", lambda rows: [slice(i, min(i + 9, rows)) for i in range(0, rows, 9)]
    )
    assert evaluate.manifold_scores(real, evaluate.neighbour_radii(real), fake) == whole
    found, indices = evaluate.nearest(real, fake)
    assert np.array_equal(indices, squares.argmin(axis=1))
    assert np.allclose(found, squares.min(axis=1), atol=1e-4)


def test_class_scores_by_hand():
    even = evaluate.class_scores(np.arange(20) % 10, np.arange(20) % 10)
    assert even.pop("accuracy_by_class") == [1.0] * 10
    assert even == {"label_accuracy": 1.0, "histogram": [0.1] * 10}
    two = evaluate.class_scores(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2]))
    assert two["label_accuracy"] == 0.5 and two["histogram"][:3] == [0.5, 0.5, 0]
    assert two["accuracy_by_class"] == [1.0, 0.5, 0.0] + [None] * 7  # of what was not requested
    again = evaluate.class_scores(np.array([1, 0, 1, 2]), np.array([0, 1, 1, 2]))
    assert evaluate.summary([two, again])["accuracy_by_class"] == [0.5, 0.5, 0.5] + [None] * 7
    one = evaluate.class_scores(np.array([3, 3]), None)
    assert one["label_accuracy"] is None and one["histogram"][3] == 1


def test_spread_is_that_of_the_seeds():
    scores = evaluate.summary(
        [{"ffid": 1.0, "histogram": [0, 1], "cas": 0.5}, {"ffid": 3.0, "histogram": [1, 0]}]
    )
    assert scores["ffid"] == {"mean": 2.0, "spread": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert scores["histogram"] == [0.5, 0.5] and scores["cas"]["spread"] is None


# --- Scores that must move ------------------------------------------------------------------------


def test_a_set_against_itself_is_perfect(sets):
    _, (images, labels), _, reference = sets
    scores = evaluate.score_images(reference, images, labels)
    assert [scores["ffid"], scores["ffid2"]] == pytest.approx([0, 0], abs=1e-6)
    assert all(scores[name] == 1 for name in ("precision", "recall", "coverage", "label_accuracy"))
    # Rounding puts some neighbours on either side of an edge.
    assert scores["density"] == pytest.approx(1, abs=0.01)


def test_scores_do_not_depend_on_the_order_of_samples(sets):
    _, _, (images, labels), reference = sets
    order = np.random.default_rng(0).permutation(len(images))
    first, second = (
        evaluate.score_images(reference, images[i], labels[i])
        for i in (np.arange(len(images)), order)
    )
    for name in first:
        assert first[name] == pytest.approx(second[name], abs=1e-5), name


def blurred(images, radius=1.5):
    blur = ImageFilter.GaussianBlur(radius)
    pictures = [Image.fromarray(image[0]).filter(blur) for image in images]
    return np.stack([np.array(picture)[None] for picture in pictures])


def noisy(images):
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("spoil", "worse"),
    [
        (blurred, {"precision", "density", "recall", "coverage"}),
        (noisy, {"precision", "density", "coverage"}),
        (
            lambda images: images[:1].repeat(len(images), axis=0),
            {"recall", "coverage", "label_accuracy"},
        ),
    ],
    ids=["blur", "noise", "collapse"],
)
def test_spoiled_samples_score_worse(sets, spoil, worse):
    _, _, (images, labels), reference = sets
    good = evaluate.score_images(reference, images, labels)
    bad = evaluate.score_images(reference, spoil(images), labels)
    assert good["ffid"] != good["ffid2"]
    assert bad["ffid"] > 10 * good["ffid"] and bad["ffid2"] > 10 * good["ffid2"]
    assert worse <= {
        name
        for name in good
        if name not in ("ffid", "ffid2", "histogram", "accuracy_by_class")
        and bad[name] < 0.9 * good[name]
    }


def test_shuffled_labels_are_seen(sets):
    _, _, (images, labels), reference = sets
    assert evaluate.score_images(reference, images, labels)["label_accuracy"] == 1
    shuffled = np.random.default_rng(0).permutation(labels)
    assert evaluate.score_images(reference, images, shuffled)["label_accuracy"] < 0.2


PLANTED = {
    "same": lambda images: images,
    "shifted": lambda images: np.roll(images, (1, -1), axis=(2, 3)),
    "mirrored": lambda images: images[..., ::-1],
    "blurred": lambda images: blurred(images, 0.7),
    "brighter": lambda images: (images * 1.2).clip(0, 255).astype(np.uint8),
}


def shapes(count, seed):
    """uint8 (count, 1, 32, 32): smooth shapes of some grey levels on black."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 3), np.uint8)
    pictures = [Image.fromarray(x).resize((20, 20), Image.Resampling.BICUBIC) for x in coarse]
    return blurred(np.pad(np.stack(pictures)[:, None], ((0, 0), (0, 0), (6, 6), (6, 6))), 1)


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
def test_planted_copies_are_found_also_if_they_are_few(sets, plant):
    train, held_out, others, new = (shapes(count, seed) for seed, count in enumerate([300] * 4))
    seen = {"train": evaluate.coarse_pixels(train), "others": evaluate.coarse_pixels(others)}
    limit = np.quantile(evaluate.copy_ratios(held_out, *seen.values()), 0.01)
    reference = replace(sets[-1], **seen, limit=limit)
    found = evaluate.copy_scores(reference, new)
    assert found["copy_ratio"] > 0.8 and found["copies"] < 0.05
    assert evaluate.copy_scores(reference, plant(train))["copies"] > 0.9
    few = evaluate.copy_scores(reference, np.concatenate([plant(train[:30]), new[30:]]))
    assert few["copy_ratio"] > 0.8 and 0.08 <= few["copies"] < 0.15


def test_duplicates_in_the_data_hide_no_copies(sets, extractors, capsys):
    """Two of 120 held-out images are training images as well: they set no limit."""
    train, test = shapes(300, 0), shapes(600, 1)
    sessions = sets[-1].sessions
    test[[3, 70]] = train[[5, 8]]
    reference = evaluate.make_reference(sessions, train, test)
    assert "2 of 120 test images are also training images" in capsys.readouterr().out
    assert reference.limit > evaluate.DUPLICATE
    assert evaluate.copy_scores(reference, blurred(train, 0.7))["copies"] > 0.9
    few = evaluate.make_reference(sessions, train, test[:400])
    assert few.limit is None and evaluate.copy_scores(few, train)["copies"] is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda images: (images / 255).astype(np.uint8),  # 0..1 for 0..255
        lambda images: (images // 4).astype(np.uint8),
        lambda images: (images // 2 + 128).astype(np.uint8),  # -1..1 mapped twice
        lambda images: np.zeros_like(images),
        lambda images: images.astype(np.float32),
        lambda images: images[:, 0],
        lambda images: images[:, :, 2:30, 2:30],
    ],
)
def test_a_wrong_range_or_shape_is_refused(sets, spoil):
    _, _, (images, labels), reference = sets
    with pytest.raises(infer_onnx.InputError, match="images"):
        evaluate.score_images(reference, spoil(images), labels)


def test_the_floor_is_of_all_disjoint_parts_of_the_training_images(sets):
    train, test, _, reference = sets
    images, labels = evaluate.in_order(*train, in_turn=True)
    args = evaluate.build_parser().parse_args(["--num-samples", "130", "--seeds", "1"])
    floor = evaluate.score_floor(reference, (images, labels), test, 0.87, args)
    assert floor["n"] == 130 and floor["seeds"] == 3
    scores = floor["scores"]
    assert scores["label_accuracy"]["values"] == [0.87] * 3
    assert scores["copy_ratio"]["mean"] > 0.8 and "copies" not in scores  # of 80 images: too few
    parts = [images[first : first + 130] for first in (0, 130, 260)]
    ffids = [evaluate.score_images(reference, part, None)["ffid"] for part in parts]
    assert scores["ffid"]["values"] == ffids and scores["ffid"]["mean"] == np.mean(ffids)

    # As in MNIST, where some classes run out: what is left of the others is not like the samples.
    rare = labels < 5
    kept = np.flatnonzero(~rare | (np.cumsum(rare) <= 130))
    found = evaluate.score_floor(reference, (images[kept], labels[kept]), test, 0.87, args)
    assert found["seeds"] == 2 and found["scores"]["ffid"]["values"] == ffids[:2]


def test_ffid_is_extrapolated_and_the_floor_limited_from_their_numbers_on(sets, monkeypatch):
    train, test, (images, _), reference = sets
    monkeypatch.setattr(evaluate, "LEAST_PART", len(images) // evaluate.SPLITS)
    monkeypatch.setattr(evaluate, "FLOOR_PARTS", 2)
    found = evaluate.score_images(reference, images, None)
    features = [evaluate.extract(reference.sessions[0], x)[0] for x in (test[0], images)]
    expected = evaluate.ffid_at_infinity(evaluate.moments(features[0]), features[1])
    assert found["ffid_infinity"] == pytest.approx(expected) != found["ffid"]
    assert "ffid_infinity" not in evaluate.score_images(reference, images[1:], None)
    args = evaluate.build_parser().parse_args(["--num-samples", "100", "--seeds", "1"])
    train = evaluate.in_order(*train, in_turn=True)
    assert evaluate.score_floor(reference, train, test, 0.87, args)["seeds"] == 2


def test_the_extrapolated_ffid_is_nearer_the_truth():
    """Of Gaussians, whose distance is known: 0.5 where a mean is moved; means of 20 draws."""
    rng = np.random.default_rng(0)
    real = np.zeros(16), np.eye(16)
    both = []
    for _ in range(20):
        samples = rng.normal(size=(1000, 16))
        samples[:, 0] += 0.5**0.5
        ffid = evaluate.frechet_distance(*real, *evaluate.moments(samples))
        both.append((ffid, evaluate.ffid_at_infinity(real, samples)))
    biased, better = np.mean(both, axis=0) - 0.5
    assert biased > 0.05 and abs(better) < biased / 5


# --- Data and extractors --------------------------------------------------------------------------


def test_data_is_found_padded_and_balanced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums = write_idx(tmp_path / "data/KMNIST/raw", compress=True)
    monkeypatch.setitem(evaluate.IDX_SETS, "kmnist", ("KMNIST", None, sums))
    images, labels = evaluate.load_real("kmnist", None).parts()[0]
    assert images.shape == (60, 1, 32, 32) and images[:, :, 2:30, 2:30].sum() == images.sum()
    assert all(sorted(part) == list(range(10)) for part in labels.reshape(6, 10).tolist())
    expected = {(image.tobytes(), label) for image, label in zip(*small_set(), strict=True)}
    assert {
        (i[0, 2:30, 2:30].tobytes(), y) for i, y in zip(images, labels, strict=True)
    } == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole"),
        (idx_bytes(small_set()[0])[:-1], "not a whole"),
        (idx_bytes(np.ones((60, 9, 9))), "28x28"),
    ],
)
def test_broken_data_is_one_line(tmp_path, content, message):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(infer_onnx.InputError, match=message):
        evaluate.load_real("kmnist", str(tmp_path))


def test_files_of_another_named_set_are_refused(tmp_path, monkeypatch):
    sums = write_idx(tmp_path)
    monkeypatch.setitem(evaluate.IDX_SETS, "mnist", ("MNIST", None, sums))
    with pytest.raises(infer_onnx.InputError, match="is of mnist: right is --data mnist"):
        evaluate.load_real("kmnist", str(tmp_path))


def test_data_of_another_sum_or_none_is_refused(tmp_path):
    download = "python ddim.py --train --data mnist downloads them to data/"
    with pytest.raises(infer_onnx.InputError, match=f"--data-dir; {download}"):
        evaluate.load_real("mnist", str(tmp_path))
    write_idx(tmp_path)
    with pytest.raises(infer_onnx.InputError, match="SHA-256"):
        evaluate.load_real("fashion-mnist", str(tmp_path))


def test_an_extractor_sees_the_middle_in_its_range():
    seen = []

    class Session:
        def run(self, names, feed):
            seen.append(feed["x"])
            return feed["x"], feed["x"]

    images = np.zeros((300, 1, 32, 32), np.uint8)
    images[:, :, 2:30, 2:30] = 255
    images[7, 0, 2, 3] = 51
    x = evaluate.extract(Session(), images)[0]
    assert len(seen) == 2 and x.shape == (300, 1, 28, 28) and x.dtype == np.float32
    assert x[7, 0, 0, 1] == pytest.approx(-0.6) and (x == 1).sum() == x.size - 1


def test_an_extractor_that_is_not_what_it_says_is_refused(sets, tmp_path):
    _, test, _, _ = sets
    write_extractor(tmp_path / "a.onnx", 0, accuracy=0.93)
    write_extractor(tmp_path / "b.onnx", 0, data="mnist")
    (tmp_path / "c.onnx").write_bytes((ROOT / "pretrained/ddim.onnx").read_bytes())
    (tmp_path / "e.onnx").write_bytes((tmp_path / "a.onnx").read_bytes()[:-1])
    with pytest.raises(infer_onnx.ModelError, match=r"e\.onnx is damaged.* trains it again"):
        evaluate.load_extractor(tmp_path / "e.onnx", "kmnist", test, 1)
    for name, message in (
        ("a", "says 0.93"),
        ("b", "of mnist"),
        ("c", "not an extractor"),
        ("d", "benchmarks/extractor.py --data kmnist"),
    ):
        with pytest.raises(infer_onnx.InputError, match=message):
            evaluate.load_extractor(tmp_path / f"{name}.onnx", "kmnist", test, 1)


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def workplace(exports, extractors, data_dir, in_tmp, monkeypatch):
    """A current folder that has the tiny models in runs/; returns flags of a short run there."""
    (in_tmp / "runs/tiny").mkdir(parents=True)
    for name in ("ddim", "gan"):
        shutil.copy(exports(name), "runs/tiny")
    monkeypatch.setattr(evaluate, "CHUNK", 20)
    monkeypatch.setattr(evaluate, "BATCH", 10)
    shared = ["--data", "kmnist", "--data-dir", data_dir, "--extractors", str(extractors)]
    return [*shared, "--threads", "1", "--num-samples", "60", "--no-timing"]


def test_models_take_turns_where_their_times_are_measured(monkeypatch):
    """Medians of seconds that are worked out by hand, for images of a clock that moves as told."""
    clock, drawn = [0.0], []
    seconds = {"a": [9, 1, 5, 2], "b": [9, 4, 30, 6]}  # the first of each warms up

    def sample(model, labels, **options):
        drawn.append((model, len(labels)))
        clock[0] += seconds[model][sum(name == model for name, _ in drawn) - 1]

    monkeypatch.setattr(infer_onnx, "sample", sample)
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(evaluate, "TIMED_BATCHES", (2,))
    monkeypatch.setattr(evaluate, "TIMED_REPEATS", 3)
    monkeypatch.setattr(evaluate, "TIMED_SECONDS", 100)
    settings = [evaluate.Setting(name, Path(name), name, {}) for name in seconds]
    found = evaluate.latencies(settings)
    assert drawn == [("a", 2), ("b", 2)] * 4
    assert found == [{"batch": {"2": 1000.0}, "best": "2"}, {"batch": {"2": 3000.0}, "best": "2"}]


def test_a_run_without_torch_leaves_results_table_and_pictures(workplace, exports, in_tmp):
    """Without tqdm and matplotlib, too; report.py adds the diagrams that are missing."""
    (in_tmp / "results").mkdir()
    (in_tmp / "results/steps.png").write_bytes(b"of an earlier run")
    for file in (exports("vae"), exports("vae").with_name("vae_encoder.onnx")):
        shutil.copy(file, "runs/tiny")
    flags = [flag for flag in workplace if flag != "--no-timing"]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "evaluate.py"), "ddim", "gan"]
    command += ["vae", "--steps", "3,5", "--seeds", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    later = "pip install matplotlib, then python benchmarks/report.py results"
    assert f"old diagrams removed: {later}" in done.stdout.splitlines()
    assert not any((in_tmp / f"results/{name}").exists() for name in report.DIAGRAMS)
    results = json.loads((in_tmp / "results/results.json").read_text())
    assert [(r["model"], r["steps"], r["evaluations"]) for r in results["rows"]] == [
        ("ddim", 3, 4), ("ddim", 5, 6),  # t = 999, 922, 428; 999, 979, 870, 570, 157
        ("gan", None, 1), ("vae", None, 1),
    ]  # fmt: skip
    for row in results["rows"]:
        assert len(row["scores"]["ffid"]["values"]) == 2 and row["scores"]["ffid"]["spread"] > 0
        path = in_tmp / "runs/tiny" / row["file"]
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        files = [path, *path.parent.glob(f"{path.stem}_*.onnx")]
        assert len(files) == (2 if row["model"] == "vae" else 1)
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        card = infer_onnx.load_model(path, "cpu").card
        assert row["training_minutes"] == card["training"]["seconds"] / 60 > 0
        assert row["parameters"] == card["parameters"] > 0
        assert set(row["latency"]["batch"]) >= {"1", "100"}
    lowest = min(row["scores"]["ffid"]["mean"] for row in results["rows"])
    assert results["floor"]["scores"]["ffid"]["mean"] < lowest
    text = (in_tmp / "results/table.md").read_text()
    assert text == report.table(results) and "60 (!)" in text
    assert results["extractors"][1]["sha256"] in text
    for name in ("side_by_side", "samples_gan", "nearest_gan"):
        assert Image.open(in_tmp / f"results/{name}.png").width > 100
    assert len(list((in_tmp / "results").glob("samples_ddim*.png"))) == 2
    (in_tmp / "results/table.md").unlink()
    assert report.main([]) == 0
    assert (in_tmp / "results/table.md").read_text() == text
    for name in report.DIAGRAMS:
        assert Image.open(in_tmp / f"results/{name}").size == (1030, 560)


def test_a_copy_without_benchmarks_scores_and_says_what_is_missing(workplace, in_tmp):
    for file in ("evaluate.py", "infer_onnx.py"):
        shutil.copy(ROOT / file, in_tmp)

    def run(*flags):
        command = [sys.executable, "-c", WITHOUT_TORCH, str(in_tmp / "evaluate.py"), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert "--num-samples" in run("--help").stdout
    done = run("gan", *workplace)
    assert done.returncode == 0, done.stderr
    said = "wrote results/results.json; table and pictures need the folder benchmarks/: "
    assert done.stdout.splitlines()[-1].startswith(said)
    assert {path.name for path in (in_tmp / "results").iterdir()} == {"cache", "results.json"}
    assert json.loads((in_tmp / "results/results.json").read_text())["rows"][0]["model"] == "gan"


def test_without_matplotlib_only_diagrams_of_the_same_scores_stay(
    workplace, in_tmp, monkeypatch, capsys
):
    def diagrams():
        return [name for name in report.DIAGRAMS if (in_tmp / "results" / name).exists()]

    evaluate.main(["ddim", *workplace, "--steps", "3,5"])
    assert diagrams() == ["steps.png", "classes.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for steps, said, left in (("3,5", "no new diagrams", 2), ("3", "old diagrams removed", 0)):
        evaluate.main(["ddim", *workplace, "--steps", steps])
        assert f"{said}: pip install matplotlib, then" in capsys.readouterr().out
        assert len(diagrams()) == left


def test_a_report_of_nothing_is_one_line(in_tmp, capsys, monkeypatch):
    Path("broken").mkdir()
    Path("broken/results.json").write_text('{"rows": [')
    results = json.loads((ROOT / "results/results.json").read_text())
    for name, text in (("list", "[]"), ("other", "{}")):
        Path(name).mkdir()
        Path(name, "results.json").write_text(text)
    Path("whole").mkdir()
    Path("whole/results.json").write_text(json.dumps(results))
    Path("whole/steps.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for folder, message in (
        ("none", "results.json"),
        ("broken", "Expecting value"),
        ("list", "list/results.json is not of evaluate.py"),
        ("other", "other/results.json is not of evaluate.py"),
        ("--pages whole", "leave out the others"),
        ("whole", "pip install matplotlib"),
    ):
        assert message in refused(report.main, folder.split(), capsys)
    assert Path("whole/steps.png").exists()


@pytest.fixture
def curves(in_tmp, monkeypatch):
    """A function of results: {file: {name of a line: [(x, F-FID), ...]}} that report.py plots."""
    plotted = {}
    write_diagram = report.write_diagram

    def look(figure, path):
        axes = figure.axes[0]
        assert path.name == "classes.png" or axes.get_xscale() == axes.get_yscale() == "log"
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        plotted[path.name] = lines
        write_diagram(figure, path)

    def plot(results):
        plotted.clear()
        report.plot_results(results, in_tmp)
        return dict(plotted)

    monkeypatch.setattr(report, "write_diagram", look)
    return plot


def test_diagrams_show_the_scores(curves):
    """A curve for each model and solver, a point for each row."""
    results = json.loads((ROOT / "results/results.json").read_text())
    [row] = [row for row in results["rows"] if row["model"] == "ddim"]
    results["rows"] = []
    for i, solver in enumerate(("", ", solver dpm++")):
        for steps in (5, 10, 20):
            scores = {**row["scores"], "ffid": {"mean": i + 1 / steps}}
            title = f"ddim, steps {steps}, guidance 1.6{solver}"
            changes = {"title": title, "steps": steps, "latency": None, "scores": scores}
            results["rows"].append(row | changes)
    plotted = curves(results)
    assert set(plotted) == {"steps.png", "classes.png"}  # there are no times
    scores = [(row["steps"], row["scores"]["ffid"]["mean"]) for row in results["rows"]]
    lines = plotted["steps.png"]
    assert {y for _, y in lines.pop("real images")} == {results["floor"]["scores"]["ffid"]["mean"]}
    assert set(lines) == {"ddim, guidance 1.6", "ddim, guidance 1.6, solver dpm++"}
    assert sorted(map(tuple, itertools.chain(*lines.values()))) == sorted(scores)
    results = json.loads((ROOT / "results/results.json").read_text())
    times = [row["latency"]["batch"][row["latency"]["best"]] for row in results["rows"]]
    lines = curves(results)["quality_latency.png"]
    del lines["real images"]
    assert sorted(x for points in lines.values() for x, _ in points) == sorted(times)


def test_a_curve_over_steps_needs_two_of_them(curves, in_tmp):
    (in_tmp / "steps.png").write_bytes(b"of other scores")
    plotted = curves(json.loads((ROOT / "results/results.json").read_text()))
    assert set(plotted) == {"quality_latency.png", "classes.png"}
    assert not (in_tmp / "steps.png").exists()


def test_a_page_gets_its_tables(in_tmp):
    several = [
        json.loads((ROOT / f"results{part}/results.json").read_text()) for part in ("", "/ddpm")
    ]
    page = (
        "one\n<!-- scores of results -->\nold\n<!-- end -->\ntwo\n"
        "<!-- overview of results results/ddpm -->\n<!-- end -->\n<!-- other -->\n"
    )
    scores, overview = report.scores_of(several[0]), report.overview(*several)
    assert report.overview(several[0], *several) == overview  # each model once
    later = json.loads(json.dumps(several[0]))
    later["rows"] = later["rows"][1:2]
    later["rows"][0]["latency"]["batch"]["1"] = 87.65  # of another run: no times to compare
    assert report.overview(*several, later) == overview
    assert report.filled(page, ROOT) == (
        f"one\n<!-- scores of results -->\n{scores}<!-- end -->\ntwo\n"
        f"<!-- overview of results results/ddpm -->\n{overview}<!-- end -->\n<!-- other -->\n"
    )


def test_benchmarks_only_explain_themselves_with_help(in_tmp):
    """None measures anything when it is imported or asked for --help."""
    code = """
import contextlib, io, runpy, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    if path.stem not in ("__init__", "peers", "real"):  # these are imported only
        sys.argv[1:] = ["--help"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(path), run_name="imported")
            assert said.getvalue() == "", path
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as stop:
                assert stop.code == 0
        assert said.getvalue().startswith("usage: ") and "--help" in said.getvalue(), path
"""
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(in_tmp.iterdir()) == []


def test_diagrams_leave_pyplot_alone(in_tmp):
    code = """
import json, sys
from pathlib import Path
from benchmarks import report
report.plot_results(json.loads(Path(sys.argv[1]).read_text()), Path())
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    file = str(ROOT / "results/results.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, file], check=True, env=environment)


def test_samples_are_those_of_infer_onnx(workplace, in_tmp):
    evaluate.main(["ddim", *workplace, "--steps", "2"])
    cached = np.concatenate([np.load(file)["x"] for file in (in_tmp / "results/cache").iterdir()])
    model = infer_onnx.load_model(in_tmp / "runs/tiny/ddim.onnx", "cpu", 1)
    whole = infer_onnx.sample(model, list(range(10)) * 6, seed=0, steps=2, batch_size=10)
    assert {x.tobytes() for x in cached} == {x.tobytes() for x in whole} and len(cached) == 60


def test_a_run_shows_the_nearest_training_images(workplace, in_tmp, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "write_samples", lambda *given: shown.append(given[2:4]))
    assert evaluate.main(["gan", *workplace]) == 0
    ((samples, copied),) = shown
    (train, _), _ = evaluate.load_real(*workplace[1:4:2]).parts()
    indices = evaluate.nearest_moved(samples[:20], evaluate.coarse_pixels(train))[1]
    assert np.array_equal(copied, train[indices]) and len({*indices.tolist()}) > 5


def test_pictures_of_guidance_0_name_no_class(workplace, in_tmp, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "write_samples", lambda *given: shown.append(given[4:]))
    flags = ["ddim", *workplace, "--steps", "2", "--guidance", "0,1"]
    assert evaluate.main(flags) == 0
    (names, labels), (all_names, all_labels) = shown
    assert names == ["any class"] and labels.tolist() == [0] * len(labels)
    assert all_names == CLASSES and {*all_labels.tolist()} == {*range(10)}


def test_cached_samples_are_reused(workplace, in_tmp, monkeypatch, capsys):
    assert evaluate.main(["ddim", "gan", *workplace, "--steps", "2"]) == 0
    first = (in_tmp / "results/results.json").read_text()
    # the cache goes by the hash of a model, not by its name
    (in_tmp / "runs/tiny/ddim.onnx").rename(in_tmp / "runs/tiny/renamed.onnx")
    sample = infer_onnx.sample
    monkeypatch.setattr(infer_onnx, "sample", None)
    assert evaluate.main(["runs/tiny/renamed.onnx", "gan", *workplace, "--steps", "2"]) == 0
    again = json.loads((in_tmp / "results/results.json").read_text())
    assert [r["scores"] for r in again["rows"]] == [r["scores"] for r in json.loads(first)["rows"]]
    calls = []

    def spy(*args, **options):
        calls.append((options["seed"], options["first"]))
        return sample(*args, **options)

    monkeypatch.setattr(infer_onnx, "sample", spy)
    evaluate.main(["runs/tiny/renamed.onnx", *workplace, "--steps", "3"])
    assert calls == [(0, first) for first in range(0, 60, 10)]
    evaluate.main(["runs/tiny/renamed.onnx", *workplace, "--steps", "3", "--seeds", "2"])
    assert calls[6:] == [(1, first) for first in range(0, 60, 10)]
    next((in_tmp / "results/cache").iterdir()).write_bytes(b"PK broken")
    evaluate.main(["runs/tiny/renamed.onnx", "gan", *workplace, "--steps", "2,3", "--seeds", "2"])
    # seed 1 of the two settings that had only seed 0, and the corrupted file
    assert len(calls) == 12 + 6 + 6 + 2


def test_the_cache_knows_all_that_samples_depend_on(workplace, in_tmp, monkeypatch):
    model = infer_onnx.load_model(in_tmp / "runs/tiny/ddim.onnx", "cpu", 1)
    cuda = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])
    given = {
        "model": model, "options": {"steps": 2, "guidance": 1.5}, "seed": 0, "first": 0, "stop": 20,
    }  # fmt: skip
    changes = [
        {"model": replace(model, sha256="0")},
        {"model": replace(model, session=cuda)},
        {"options": {"steps": 3, "guidance": 1.5}},
        {"options": {"steps": 2, "guidance": 1.6}},
        {"options": {"steps": 2, "guidance": 1.5, "guidance_interval": (0, 0.5)}},
        {"options": {"steps": 2, "guidance": 1.5, "guidance_interval": (0.1, 0.5)}},
        {"options": {"steps": 2, "guidance": 1.5, "solver": "dpm++"}},
        {"seed": 1},
        {"first": 10},
        {"stop": 19},
    ]

    def file_of(model, options, seed, first, stop, name="ddim"):
        setting = evaluate.Setting(name, Path(name), model, options)
        return evaluate.chunk_file(in_tmp, setting, seed, first, stop)

    files = [file_of(**given), *(file_of(**{**given, **change}) for change in changes)]
    monkeypatch.setattr(evaluate, "CACHE_VERSION", evaluate.CACHE_VERSION + 1)
    files.append(file_of(**given))
    assert len(set(files)) == len(changes) + 2
    swapped = {"guidance": 1.5, "steps": 2}
    assert file_of(**{**given, "options": swapped}, name="renamed") == files[-1]


def test_a_corrupted_cache_file_is_ignored(in_tmp):
    for content in ({"y": np.zeros(3)}, {"x": np.zeros((3, 1, 32, 32), np.uint8)}):
        np.savez("wrong.npz", **content)
        assert evaluate.read_chunk(in_tmp / "wrong.npz", 20) is None
    assert evaluate.read_chunk(in_tmp / "none.npz", 20) is None


def test_without_a_class_there_is_no_label_accuracy(workplace, in_tmp):
    evaluate.main(["ddim", *workplace, "--steps", "1", "--guidance", "0,1"])
    rows = json.loads((in_tmp / "results/results.json").read_text())["rows"]
    assert ["label_accuracy" in row["scores"] for row in rows] == [False, True]


def test_pictures_of_long_names_have_short_ones_of_their_own():
    plain = "ddim, steps 15, guidance 2"
    assert report.stem_of(plain) == infer_onnx.fold(plain)
    stems = [report.stem_of(f"{place * 200}/{plain}") for place in ("a", "b", "\u7301")]
    assert len(set(stems)) == 3 and all(len(stem.encode()) < 100 for stem in stems)
    assert all("steps-15" in stem for stem in stems)


def test_tables_are_utf_8_in_any_locale(in_tmp):
    code = "from benchmarks import report; from pathlib import Path; "
    code += "report.write_text(chr(0x221e), Path('table.md'))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "POSIX"}
    env |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert Path("table.md").read_text(encoding="utf-8") == "\u221e"


def test_pictures_have_a_row_for_each_class(sets, in_tmp):
    values = np.arange(100, dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(values, (100, 1, 32, 32)).copy()
    neighbours = sets[0][0][:20]
    report.write_samples(in_tmp, "gan", images, neighbours, CLASSES, np.arange(100) % 10)
    picture = np.array(Image.open("samples_gan.png"))
    scale = picture.shape[0] // 342
    picture = picture[:, -342 * scale :]  # right of the names
    middles = picture[18 * scale :: 34 * scale, 18 * scale :: 34 * scale]
    assert middles.tolist() == values.reshape(10, 10).T.tolist()
    # below each sample is its neighbour
    pairs = np.array(Image.open("nearest_gan.png"))
    scale = pairs.shape[0] // 122
    names, pairs = np.split(pairs, [-302 * scale], axis=1)
    dark = [(row < 128).any(axis=0).sum() for row in np.array_split(names, 4)]
    assert dark[0] == dark[2] < dark[1] == dark[3]  # "sample" is shorter than "nearest real"
    # each tile with the gap after it
    tiles = pairs[2 * scale :: scale, 2 * scale :: scale].reshape(4, 30, 10, 30)
    tiles = tiles[:, :28, :, :28].swapaxes(1, 2)
    assert np.array_equal(tiles[1::2].reshape(20, 28, 28), neighbours[:, 0, 2:30, 2:30])
    assert (tiles[::2].reshape(20, 28, 28) == np.arange(20)[:, None, None]).all()


def test_the_nearest_is_the_nearest_of_all_that_is_moved(sets):
    (train, _), _, (images, _), reference = sets
    squares, indices = evaluate.nearest_moved(images[:5], reference.train)
    for image, square, index in zip(images[:5], squares, indices, strict=True):
        apart = []
        for mirrored in (image[0], np.fliplr(image[0])):
            for down, right in itertools.product((1, 2, 3), repeat=2):  # crops of what is moved
                cut = mirrored[down : down + 28, right : right + 28]
                x = cut.reshape(14, 2, 14, 2).mean(axis=(1, 3)).ravel()
                x = (x - x.mean()) / np.linalg.norm(x - x.mean())
                apart.append(((reference.train - x) ** 2).sum(axis=1))
        assert index == np.min(apart, axis=0).argmin()
        assert square == pytest.approx(np.min(apart), abs=1e-4)
    moved = np.roll(train[:5, ..., ::-1], (1, -1), axis=(2, 3))
    assert evaluate.nearest_moved(moved, reference.train)[1].tolist() == [*range(5)]


def test_a_stopped_evaluation_resumes(workplace, in_tmp, monkeypatch, capsys):
    sample, calls = infer_onnx.sample, []

    def stop_at_the_fourth(*args, **options):
        calls.append(options["first"] // 10)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr(infer_onnx, "sample", stop_at_the_fourth)
    with pytest.raises(SystemExit, match="130"):
        evaluate.main(["gan", *workplace])
    assert "the same command resumes" in capsys.readouterr().err
    assert len(list((in_tmp / "results/cache").iterdir())) == 1
    assert evaluate.main(["gan", *workplace]) == 0
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5]
    monkeypatch.setattr(infer_onnx, "sample", sample)
    evaluate.main(["gan", *workplace, "--output", "whole"])
    stopped, whole = (
        json.loads((in_tmp / name / "results.json").read_text()) for name in ("results", "whole")
    )
    assert stopped == whole


def test_shards_merge_into_the_run_of_one_process(workplace, in_tmp, monkeypatch, capsys):
    flags = ["ddim", "gan", *workplace, "--steps", "2,3", "--seeds", "2"]
    for done, part in enumerate(("1/4", "4/4", "2/4", "3/4")):
        evaluate.main([*flags, "--output", "shards", "--shard", part])
        assert not (in_tmp / "shards/results.json").exists()
        files = len(list((in_tmp / "shards/cache").iterdir()))
        assert files == [5, 9, 14, 18][done]  # three settings, two seeds, three files of 20 images
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "read_chunk", None)  # no file is opened again
        evaluate.main([*flags, "--output", "shards", "--shard", "1/4"])
    evaluate.main([*flags, "--output", "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(infer_onnx, "sample", None)  # nothing is left to sample
        evaluate.main([*flags, "--output", "shards"])
    shards, whole = (
        json.loads((in_tmp / name / "results.json").read_text()) for name in ("shards", "whole")
    )
    assert shards == whole


def test_more_shards_than_files_are_refused(workplace, in_tmp, capsys):
    error = refused(evaluate.main, ["gan", *workplace, "--shard", "4/4"], capsys, alone=False)
    assert "--shard 4/4: there are 3 files of samples, and as many shards at most" in error


def test_settings_follow_the_flags(workplace, capsys):
    flags = ["ddim", "ddim", "--steps", "5,2000,1000", "--guidance", "0,1,2"]
    args = evaluate.build_parser().parse_args(flags)
    settings = evaluate.find_settings(args, CLASSES)
    assert [(s.options["guidance"], s.options["steps"], s.evaluations()) for s in settings] == [
        (0, 5, 5), (0, 1000, 1000), (1, 5, 5), (1, 1000, 1000), (2, 5, 6), (2, 1000, 1450),
    ]  # fmt: skip
    flags = ["ddim", "--steps", "5", "--guidance", "2", "--guidance-interval"]
    flags.append("0:1,0.1:0.7")  # t = 999, 979, 870, 570, 157
    args = evaluate.build_parser().parse_args(flags)
    settings = evaluate.find_settings(args, CLASSES)
    found = [(s.options["guidance_interval"], s.evaluations()) for s in settings]
    assert found == [((0, 1), 10), ((0.1, 0.7), 7)]
    title = "ddim, steps 5, guidance 2, guidance interval 0.1:0.7, solver dpm++"
    assert settings[1].title() == title
    flags = ["ddim", "--guidance", "0,1,1.6", "--guidance-interval", "0.25:0.7,0:1"]
    args = evaluate.build_parser().parse_args(flags)
    options = [s.options for s in evaluate.find_settings(args, CLASSES)]
    found = [(o["guidance"], o.get("guidance_interval")) for o in options]
    assert found == [(0, None), (1, None), (1.6, None), (1.6, (0, 1))]
    said = capsys.readouterr().out
    assert "--steps 2000 is more than the 1000" in said and "interval is ignored" not in said
    flags = ["ddim", "--guidance", "0,1", "--guidance-interval", "0.25:0.7"]
    evaluate.find_settings(evaluate.build_parser().parse_args(flags), CLASSES)
    said = capsys.readouterr().out
    assert "ddim: no guidance is above 1: --guidance-interval is ignored" in said
    flags = ["ddim", "--steps", "2", "--guidance", "1,2,3"]  # t = 999, 749: below is the interval
    [setting] = evaluate.find_settings(evaluate.build_parser().parse_args(flags), CLASSES)
    assert setting.options == {"steps": 2, "guidance": 1}
    said = capsys.readouterr().out
    assert all(f"guidance {weight} counts as 1: none is guided" in said for weight in (2, 3))
    args = evaluate.build_parser().parse_args(["gan", "--steps", "5"])
    assert evaluate.find_settings(args, CLASSES)[0].options == {}
    bare = {"parameters"}
    with_card(
        "runs/tiny/gan.onnx", "bare.onnx", lambda card: {k: card[k] for k in card.keys() - bare}
    )
    args = evaluate.build_parser().parse_args(["bare.onnx"])
    with pytest.raises(infer_onnx.ModelError, match=r"bare\.onnx: no parameters in its metadata"):
        evaluate.find_settings(args, CLASSES)
    assert "gan samples in one evaluation: --steps, " in capsys.readouterr().out
    for name, changes, flag, said in (
        ("ddpm", {}, "--solver=ddim", "ddpm has only one sampler: --solver is ignored"),
        ("ddim", {"guidance_fixed": True}, "--guidance=9", "ddim supports only guidance 2.2"),
    ):
        card = infer_onnx.load_model(ROOT / f"pretrained/{name}.onnx", "cpu").card | changes
        args = evaluate.build_parser().parse_args([name, flag])
        [options] = evaluate.setting_options(args, name, card)
        assert options == {"steps": card["steps"], "guidance": card["guidance"]}
        assert said in capsys.readouterr().out
    every = evaluate.find_settings(evaluate.build_parser().parse_args([]), CLASSES)
    assert [s.name for s in every] == ["gan", "ddim"] and every[0].options == {}


@pytest.mark.parametrize("usual", infer_onnx.SOLVERS)
def test_a_title_names_every_solver_but_ddim(in_tmp, usual):
    """Whatever the card's default, so that titles of tables of then and now mean the same."""
    card = infer_onnx.load_model(ROOT / "pretrained/ddim.onnx", "cpu").card | {"solver": usual}
    titles = {}
    for flags in ([], ["--solver", "ddim,dpm++"]):
        args = evaluate.build_parser().parse_args(["ddim", *flags])
        model = SimpleNamespace(card=card)
        for options in evaluate.setting_options(args, "ddim", card):
            setting = evaluate.Setting("ddim", Path("ddim.onnx"), model, options)
            titles.setdefault(setting.title(), []).append(options.get("solver"))
    start = f"ddim, steps {card['steps']}, guidance {card['guidance']:g}"
    other = "ddim" if usual == "dpm++" else "dpm++"
    named = {"ddim": start, "dpm++": f"{start}, solver dpm++"}
    assert titles == {named[usual]: [None, None], named[other]: [other]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-interval", "0.8"], "'0.8' is not LOW:HIGH with 0 <= LOW <= HIGH <= 1"),
        (["--guidance-interval", "0:1,0.8:0.2"], "'0.8:0.2' is not LOW:HIGH"),
        (["--guidance-interval", "0:x"], "'0:x' is not LOW:HIGH"),
    ],
)
def test_intervals_that_are_none_are_refused_in_one_line(flags, message, capsys):
    assert message in refused(evaluate.build_parser().parse_args, ["ddim", *flags], capsys)


def test_few_or_unequal_samples_are_marked(sets):
    reference = sets[3]
    assert evaluate.marked(400, reference)  # as many as the reference, but few
    reference.features[0], kept = np.zeros((10_000, 1)), reference.features[0]
    assert not evaluate.marked(10_000, reference) and evaluate.marked(5_000, reference)
    reference.features[0] = kept


def test_disagreeing_extractors_are_reported():
    rows = [
        {"title": name, "scores": {"ffid": {"mean": a}, "ffid2": {"mean": b}}}
        for name, a, b in (("vae", 9, 8), ("gan", 3, 1), ("ddim", 2, 5))
    ]
    assert report.disagreements(rows) == ["ddim before gan"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-samples", "25"], "multiple of 10"),
        (["--steps", "10,x"], "whole number"),
        (["--data", "cifar"], "no data set 'cifar': give one of fashion-mnist, mnist, kmnist, a"),
        (["vqgan"], "no model 'vqgan'"),
        (["--data", "mnist"], "SHA-256"),
        (["--extractors", "nowhere"], "benchmarks/extractor.py"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(workplace, in_tmp, capsys, argv, message):
    error = refused(evaluate.main, [*workplace, *argv], capsys, alone=False)
    assert message in error and not (in_tmp / "results").exists()


def test_real_images_are_written_for_one_model(in_tmp, capsys):
    error = refused(evaluate.main, ["gan", "ddim", "--export-real", "x/"], capsys)
    assert "writes images as one model has them" in error and list(in_tmp.iterdir()) == []


def test_cas_needs_a_class(workplace, in_tmp, capsys):
    argv = ["ddim", *workplace, "--steps", "2", "--guidance", "0", "--cas"]
    assert "guidance 0 ignores classes" in refused(evaluate.main, argv, capsys, alone=False)
    assert not (in_tmp / "results").exists()


def test_a_student_that_learned_without_a_class_has_no_label_accuracy(exports):
    model = infer_onnx.load_model(exports("ddim"), "cpu", 1)
    for training, options, answer in (
        ({}, {"guidance": 0}, True), ({}, {"guidance": 1}, False), ({}, {}, False),
        ({"guidance": 0.0}, {"steps": 4}, True), ({"guidance": 2.0}, {"steps": 4}, False),
    ):  # fmt: skip
        card = {**model.card, "training": {**model.card["training"], **training}}
        setting = SimpleNamespace(model=SimpleNamespace(card=card), options=options)
        assert evaluate.is_without_class(setting) is answer


def test_missing_packages_are_reported_before_the_work(workplace, in_tmp, capsys, monkeypatch):
    for flag, module in (
        ("--tsne", "sklearn.manifold"), ("--tsne", "matplotlib.figure"), ("--cas", "torch"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.delitem(sys.modules, "benchmarks.extractor")
            error = refused(evaluate.main, [*workplace, flag], capsys, alone=False)
            assert f"{flag} needs " in error and module in error
            assert not (in_tmp / "results").exists()


def test_a_model_of_other_classes_or_a_wrong_range_is_refused(
    workplace, in_tmp, capsys, monkeypatch
):
    with_card(
        "runs/tiny/gan.onnx", "other.onnx", lambda card: card | {"class_names": CLASSES[::-1]}
    )
    error = refused(evaluate.main, ["other.onnx", *workplace], capsys, alone=False)
    assert "classes of kmnist" in error
    monkeypatch.setattr(
        infer_onnx, "sample", lambda _, labels, **__: np.zeros((len(labels), 1, 32, 32), np.uint8)
    )
    error = refused(evaluate.main, ["gan", *workplace], capsys, alone=False)
    assert "gan: images have the values 0..0: a wrong range" in error
    assert not (in_tmp / "results/results.json").exists()


def test_extractors_are_trained_and_used(workplace, in_tmp, monkeypatch, capsys):
    data_dir = workplace[workplace.index("--data-dir") + 1]
    flags = ["--data", "kmnist", "--data-dir", data_dir, "--epochs", "3"]
    for folder in ("made", "again"):
        assert extractor.main([*flags, "--output", folder]) == 0
    out = capsys.readouterr().out
    for name in ("extractor_kmnist", "extractor2_kmnist"):
        content = (in_tmp / f"made/{name}.onnx").read_bytes()
        assert hashlib.sha256(content).hexdigest() in out and len(content) < 2e6
        assert str(in_tmp).encode() not in content
        assert content == (in_tmp / f"again/{name}.onnx").read_bytes()
    train, _ = evaluate.load_real("kmnist", data_dir).parts()
    train_classifier, labels = extractor.train_classifier, []

    def spy(pairs, *rest):
        labels.append(pairs[1].tolist())
        return train_classifier(pairs, *rest)

    monkeypatch.setattr(extractor, "train_classifier", spy)
    flags = [*workplace, "--extractors", "made", "--num-samples", "40"]
    ffid = []
    for others in ([], ["--cas", "--tsne"]):
        assert evaluate.main(["gan", *flags, *others]) == 0
        results = json.loads((in_tmp / "results/results.json").read_text())
        ffid.append(results["rows"][0]["scores"]["ffid"]["mean"])
    # Real images, and as many samples; the other scores are of --num-samples all the same.
    assert labels == [train[1].tolist(), evaluate.balanced_labels(0, 60)] and ffid[0] == ffid[1]
    assert results["extractors"][0]["class_names"] == CLASSES
    assert "cas" in results["rows"][0]["scores"] and "cas" in results["floor"]["scores"]
    assert Image.open("results/tsne_gan.png").size == (1030, 560)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "mnist", "--data-dir", "nowhere"], "no train-images"),
        (["--data", "cifar"], "no data set 'cifar'"),
        *((["--epochs", value], "argument --epochs") for value in ("0", "1001", "1.5", "x", "")),
    ],
)
def test_an_extractor_that_cannot_be_trained_is_one_line(in_tmp, capsys, argv, message):
    assert refused(extractor.main, argv, capsys).startswith(f"extractor.py: error: {message}")
