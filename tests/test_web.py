"""The page in web/: its sampler in node, then the page itself in headless Chromium.

Both need `npm install --prefix web`; the pictures are compared with those of infer_onnx.py.
"""

import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import threading
from urllib.parse import urlencode

import numpy as np
import onnx
import pytest
import torch
from chromium import Chromium, find_chromium
from conftest import ROOT, WRONG_VALUES, save_sealed
from onnx import TensorProto, helper
from PIL import Image
from test_common import AWKWARD

import export
import infer_onnx
import vae

NAMES = ["ddim", "distill", "distill2", "ddpm", "ldm", "gan", "vae"]
SNEAKER = 7
LEVELS = 1  # grey levels by which a browser and onnxruntime may differ
RUNTIME = ROOT / "web/node_modules/onnxruntime-web"

needs_runtime = pytest.mark.skipif(
    not RUNTIME.is_dir(), reason="onnxruntime-web is missing: npm install --prefix web"
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="neither Chromium nor Chrome is installed"
)


def shipped(name):
    return ROOT / f"pretrained/{name}.onnx"


@functools.cache
def model_of(path):
    return infer_onnx.load_model(path, "cpu", 1)


def expected(path, labels=(SNEAKER,), **options):
    return infer_onnx.sample(model_of(path), list(labels), **options)


def difference(found, pictures):
    """How many pixels differ, and by how many grey levels at most."""
    levels = np.abs(found.astype(int) - pictures.astype(int))
    return np.count_nonzero(levels), levels.max()


# --- The sampler in node --------------------------------------------------------------------------


def node(command, **request):
    """The answer of tests/web.mjs to a request."""
    request = json.dumps({"command": command, **request}, default=str)
    done = subprocess.run(
        ["node", ROOT / "tests/web.mjs"], input=request, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@needs_runtime
@needs_node
@pytest.mark.parametrize(
    ("name", "solver"), [("ddim", "ddim"), ("ddim", "dpm++"), ("ldm", "ddim"), ("gan", None)]
)
def test_the_sampler_in_words_gives_the_same_pictures(name, solver):
    """words.mjs was written from the text in web/README.md alone; with it the text must change."""
    labels = [SNEAKER, 8]
    words = ROOT / "tests/words.mjs"
    command = ["node", words, shipped(name), solver or "", "5", *map(str, labels)]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pictures = expected(shipped(name), labels, seed=5, solver=solver)
    found = np.frombuffer(done.stdout, np.uint8).reshape(pictures.shape)
    count, levels = difference(found, pictures)
    assert levels <= LEVELS and count <= 5


def node_pictures(path, labels, cases):
    """Pictures for each of the options, uint8 (N, C, H, W), and what node says of each."""
    cases = [{**case, "seed": str(case.get("seed", 0))} for case in cases]
    answers = node("sample", path=path, labels=labels, cases=cases)
    assert isinstance(answers, list), answers
    shape = (len(labels), *model_of(path).card["image_shape"])
    pixels = [base64.b64decode(answer["pixels"]) for answer in answers]
    return [np.frombuffer(part, np.uint8).reshape(shape) for part in pixels], answers


@needs_node
@needs_runtime
def test_noise_is_numpys():
    """Bit for bit, but for numbers beyond 3.65: NumPy takes their log1pf from the C library."""
    keys = [(seed, image) for seed in (0, 1, 2**40 + 5, 2**63 - 1) for image in (0, 1, 999_999)]
    answers = node("noise", keys=[[str(seed), image] for seed, image in keys], count=100_000)
    for key, (normal, uniform) in zip(keys, answers, strict=True):
        stream = np.random.Generator(np.random.Philox(key=key))
        noise = stream.standard_normal(100_000, dtype=np.float32)
        found = np.frombuffer(base64.b64decode(normal), np.float32)
        differ = found != noise
        assert np.all(np.abs(noise[differ]) > 3.65) and differ.sum() <= 2
        assert np.abs(found - noise).max() < 1e-6
        assert stream.random() == uniform  # both are at the same place of the stream


@needs_node
@needs_runtime
def test_the_steps_are_those_of_infer_onnx():
    cases = [(1000, steps) for steps in (1, 2, 3, 10, 20, 50, 250, 999, 1000)] + [(7, 7), (10, 3)]
    found = [
        [[tuple(pair) for pair in pairs] for pairs in both] for both in node("pairs", cases=cases)
    ]
    expected = [[infer_onnx.time_pairs(*case), infer_onnx.dpm_pairs(*case)] for case in cases]
    assert found == expected


@needs_node
@needs_runtime
def test_classes_are_those_of_infer_onnx():
    """The same text names the same class, or none; a list of names is for infer_onnx.py alone."""
    texts = [
        *AWKWARD, "CAT", "shoes,boots", "shoes--boots", "CAFE\u0301", "caf\u00e9", "a-b", "s",
        "sho", "3", "13", "14", "01", "", "-", ",", "ALL", "\N{HANDBAG}\ufe0f", "STRASSE",
    ]  # fmt: skip
    names = [*AWKWARD, "stra\u00dfe", "x" * 60, "x" * 61, ""]
    found, stems, named = node("classes", texts=texts, names=names)
    for text, answer in zip(texts, found, strict=True):
        try:
            expected = infer_onnx.class_index(text, names)
        except infer_onnx.InputError as error:
            kind = next(k for k in ("ambiguous", "no class", "all means") if k in str(error))
            assert kind in answer, (text, answer)
        else:
            assert answer == expected, (text, answer)
    assert stems == infer_onnx.file_stems(names)
    assert [infer_onnx.parse_classes(text, names) for text in named] == [
        [y] for y in range(len(names))
    ]
    shown = [name for name, text in zip(names, named, strict=True) if text != name]
    assert shown == ["all"]


def test_the_page_offers_all_included_models():
    [listed] = re.findall(r"const SHIPPED = (\[.*?\]);", (ROOT / "web/index.html").read_text())
    models = {path.stem for path in (ROOT / "pretrained").glob("*.onnx")}
    parts = {"ldm_decoder", "vae_encoder", "extractor", "extractor2"}
    assert {*json.loads(listed)} == models - parts


@needs_node
@needs_runtime
def test_cards_are_read_from_the_files():
    paths = [shipped(name) for name in NAMES]
    assert node("cards", paths=paths) == [model_of(path).card for path in paths]


SETTINGS = {
    "ddim": [
        {}, {"guidance": 0}, {"guidance": 0.5}, {"guidance": 1}, {"seed": 2**62 + 3},
        {"guidance": 3, "guidance_interval": [0.25, 0.6]}, {"solver": "ddim", "steps": 8},
        {"steps": 1},
    ],
    "distill": [{}, {"steps": 4, "seed": 9}],
    "distill2": [{}],
    "ddpm": [{"steps": 20}, {"steps": 10, "guidance": 3, "seed": 5}],
    "ldm": [{}, {"solver": "ddim", "steps": 10, "seed": 9}],
    "gan": [{}, {"seed": 2**62 + 3}],
    "vae": [{}, {"seed": 2**62 + 3}, {"seed": 1}],
}  # fmt: skip


@needs_node
@needs_runtime
@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_infer_onnx(name):
    """At most 0.1 % of the pixels differ, by one level.  IMAGES: how many, for web/README.md."""
    labels = [*range(SNEAKER, 10), *range(SNEAKER)][: int(os.environ.get("IMAGES", "4"))]
    found, answers = node_pictures(shipped(name), labels, SETTINGS[name])
    for options, images, answer in zip(SETTINGS[name], found, answers, strict=True):
        count, levels = difference(images, expected(shipped(name), labels, **options))
        print(f"{name} {options}: {count} of {images.size} pixels differ, by {levels}")
        assert levels <= LEVELS and count <= images.size / 1000, options
        card = model_of(shipped(name)).card
        assert answer["evaluations"] == infer_onnx.evaluations(card, **options)
        assert answer["steps"] == (options.get("steps", card["steps"]) if "steps" in card else 0)


def with_card(name, folder, **changes):
    """A copy of a shipped model whose card has other values; None leaves a key out."""
    proto = onnx.load(shipped(name))
    kept = [entry for entry in proto.metadata_props if entry.key == infer_onnx.METADATA_KEY]
    card = json.loads(kept[0].value) | changes
    card = {key: value for key, value in card.items() if changes.get(key, 0) is not None}
    del proto.metadata_props[:]
    proto.metadata_props.add(key=infer_onnx.METADATA_KEY, value=json.dumps(card))
    path = folder / f"{name}.onnx"
    save_sealed(proto, path)
    return path


@needs_node
@needs_runtime
def test_the_interval_and_the_solver_of_the_card_are_the_defaults(tmp_path):
    changes = {"format": 5, "guidance_interval": [0.1, 0.5], "solver": "dpm++"}
    path = with_card("ddim", tmp_path, **changes)
    [images], [answer] = node_pictures(path, [SNEAKER], [{"steps": 8}])
    assert difference(images, expected(path, steps=8))[1] <= LEVELS
    assert answer["evaluations"] == infer_onnx.evaluations(model_of(path).card, steps=8)
    newer = with_card("ddim", tmp_path, **changes | {"solver": "euler"})
    answer = node("sample", path=newer, labels=[SNEAKER], cases=[{}])
    assert answer["error"].endswith("ddim.onnx: unknown solver euler")


# What export.py writes for a student of distill.py.
STUDENT = {
    "format": 5, "model": "distill", "steps": 4, "steps_fixed": True, "guidance": 1.0,
    "guidance_fixed": True, "guidance_interval": [0, 0.8], "solver": None,
}  # fmt: skip


@needs_node
@needs_runtime
def test_predictions_of_eps(tmp_path):
    """No shipped network predicts eps: one that is read so draws nonsense, the same nonsense."""
    path = with_card("ddim", tmp_path, prediction="eps")
    cases = [{"steps": 5}, {"steps": 5, "solver": "dpm++"}]
    found, _ = node_pictures(path, [SNEAKER], cases)
    for options, images in zip(cases, found, strict=True):
        assert difference(images, expected(path, **options))[1] <= LEVELS


@needs_node
@needs_runtime
def test_a_prior_of_mixtures_and_single_gaussians(tmp_path):
    """Where classes of few images have one Gaussian each, and others several."""
    torch.manual_seed(0)
    latent_dim = model_of(shipped("vae")).card["latent_dim"]
    codes = torch.randn(100, latent_dim)
    prior = vae.fit_prior(codes, torch.arange(100) // 60, 10, 3, seed=0)
    assert "counts" in prior
    shutil.copy(shipped("vae_encoder"), tmp_path)
    path = with_card("vae", tmp_path, prior={k: export.packed(v) for k, v in prior.items()})
    labels = [0, 1, 2, 9] * 3
    found, _ = node_pictures(path, labels, [{}])
    assert difference(found[0], expected(path, labels))[1] <= LEVELS


@needs_node
@needs_runtime
def test_image_i_has_the_noise_of_first_plus_i():
    answers = node_pictures(shipped("gan"), [0, 1, 2], [{}, {"first": 4}])[0]
    for found, first in zip(answers, (0, 4), strict=True):
        assert difference(found, expected(shipped("gan"), [0, 1, 2], first=first))[1] <= LEVELS
    assert difference(*answers)[1] > LEVELS


@needs_node
@needs_runtime
def test_settings_out_of_range():
    refused = {
        "steps 0 is not a whole number from 1 to 1000": {"steps": 0},
        "steps 1001 is not a whole number from 1 to 1000": {"steps": 1001},
        "guidance -1 is not a number from 0 to 1000": {"guidance": -1},
        "guidance interval 0 1.5: right is 0 <= LOW <= HIGH <= 1": {"guidance_interval": [0, 1.5]},
        "guidance interval 0.8 0.2: right is 0 <= LOW <= HIGH <= 1": {
            "guidance_interval": [0.8, 0.2]
        },
        "solver euler is not ddim or dpm++": {"solver": "euler"},
        f"seed {2**63} is not a whole number from 0 to {2**63 - 1}": {"seed": str(2**63)},
        "first -1 is not a whole number from 0": {"first": -1},
        "first 0.5 is not a whole number from 0": {"first": 0.5},
    }
    cases = list(refused.values())
    answers = node("sample", path=shipped("ddim"), labels=[SNEAKER], cases=cases)
    assert answers == [{"error": message, "kind": "InputError"} for message in refused]
    foreign = {
        "distill": ["guidance", "guidance_interval", "solver"], "ddpm": ["solver"],
        "ddim": ["eta", "variance"], "gan": ["truncation", "steps"], "vae": ["prior", "guidance"],
    }  # fmt: skip
    for name, keys in foreign.items():
        answers = node("sample", path=shipped(name), labels=[0], cases=[{key: 1} for key in keys])
        expected = [f"{key} is not for {name} models here: leave it out" for key in keys]
        assert [answer["error"] for answer in answers] == expected
    for labels in ([], [10], [-1], [0.5]):
        [answer] = node("sample", path=shipped("gan"), labels=labels, cases=[{}])
        assert answer["kind"] == "InputError" and "must be one or more of 0..9" in answer["error"]


@needs_node
@needs_runtime
def test_files_that_cannot_be_used(tmp_path):
    def error_of(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        answer = node("sample", path=path, labels=[SNEAKER], cases=[{}])
        assert answer["kind"] == "ModelError" and "\n" not in answer["error"]
        return answer["error"]

    whole = shipped("gan").read_bytes()
    flipped = bytearray(whole)
    flipped[1_000_000] ^= 1
    for content in (b"", whole[:1000], whole[:-1], bytes(flipped), b"\0" * 5000):
        assert "is damaged" in error_of("gan.onnx", content)
    for keep in (True, False):  # a file that another tool has changed, with the old seal or none
        proto = onnx.load_from_string(whole)
        proto.graph.name = "slim"
        props = [(e.key, e.value) for e in proto.metadata_props if keep or e.key == "model_card"]
        onnx.helper.set_model_props(proto, dict(props))
        if keep:
            assert "if you changed it" in error_of("gan.onnx", proto.SerializeToString())
        else:
            onnx.save(proto, tmp_path / "gan.onnx")
            [drawn] = node("sample", path=tmp_path / "gan.onnx", labels=[SNEAKER], cases=[{}])
            assert drawn["evaluations"] == 1
    assert "Git LFS pointer" in error_of("a.onnx", b"version https://git-lfs.github.com/spec/v1")
    assert "is a checkpoint" in error_of("a.pt", b"PK\3\4")
    for content in (b"", b"\x72\xff\xff\xff\x7f"):
        message = error_of("a.onnx", infer_onnx.sealed(content))
        assert "is not an ONNX model that onnxruntime can load" in message
    proto = onnx.load_from_string(whole)
    for value, message in [(None, "not one that export.py wrote"), ("{", "has broken metadata")]:
        del proto.metadata_props[:]
        if value:
            proto.metadata_props.add(key=infer_onnx.METADATA_KEY, value=value)
        content = proto.SerializeToString()
        assert message in error_of("a.onnx", content)
        assert message in error_of("a.onnx", infer_onnx.sealed(content))
    part = shipped("ldm_decoder").read_bytes()
    assert "is a part of" in error_of("ldm_decoder.onnx", part)
    graph = with_card("ddim", tmp_path, kind="sampler").read_bytes()
    assert "is a sampler as one graph" in error_of("ddim_sampler.onnx", graph)
    newer = with_card("gan", tmp_path, format=99).read_bytes()
    assert "metadata format 99" in error_of("gan.onnx", newer)
    unknown = with_card("gan", tmp_path, model="flow").read_bytes()
    assert "model flow" in error_of("gan.onnx", unknown)
    (tmp_path / "ldm_decoder.onnx").write_bytes(shipped("vae_encoder").read_bytes())
    ldm = shipped("ldm").read_bytes()
    assert "is not the decoder of" in error_of("ldm.onnx", ldm)


@needs_node
@needs_runtime
def test_random_corruption_of_the_metadata(tmp_path):
    """With a matching checksum, as in test_fuzz.py: a file is refused in one line, or it draws."""
    content = shipped("gan").read_bytes()[: -len(infer_onnx.SEAL) - 64]
    start = content.rindex(infer_onnx.METADATA_KEY.encode()) - 10
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.onnx" for i in range(40)]
    for path in paths:
        damaged = bytearray(content)
        for at in rng.integers(start, start + 600, 3):  # what comes after it are numbers alone
            damaged[at] = rng.integers(32, 127)
        path.write_bytes(infer_onnx.sealed(bytes(damaged)))
    answers = node("cards", paths=paths)
    read = [path for path, answer in zip(paths, answers, strict=True) if "error" not in answer]
    assert 0 < len(read) < len(paths)
    for answer in answers:
        assert answer.get("kind") in ("codes", "ModelError") and "\n" not in answer.get("error", "")
    for path in read[:3]:
        answer = node("sample", path=path, labels=[0], cases=[{}])
        assert isinstance(answer, list) or "\n" not in answer["error"]


@needs_node
@needs_runtime
def test_values_that_export_never_writes_are_refused(tmp_path):
    said, paths = [], []
    for i, (name, key, values) in enumerate(WRONG_VALUES):
        for j, value in enumerate(value for value in values if value is not None):
            (tmp_path / f"{i}-{j}").mkdir()
            paths.append(with_card(name, tmp_path / f"{i}-{j}", **{key: value}))
            said.append(f"{name}.onnx: cannot use the {key} in its metadata")
    assert [answer["error"] for answer in node("cards", paths=paths)] == said


@needs_node
@needs_runtime
def test_code_of_the_readme():
    blocks = re.findall(r"```js\n(.*?)```", (ROOT / "web/README.md").read_text(), re.DOTALL)
    code, program = blocks  # .ci/run runs the second, which needs onnxruntime-node
    assert program.count("\n") <= 25
    code += "\nconsole.log(images.join());"
    command = ["node", "--input-type=module", "--eval", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    found = np.array(done.stdout.split(","), np.uint8).reshape(2, 1, 32, 32)
    assert difference(found, expected(shipped("ldm"), [7, 7], steps=10, seed=5))[1] <= LEVELS


# --- The page in Chromium -------------------------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def serve():
    """A function: the address of the page on a server of a folder."""
    servers = []

    def start(folder):
        handler = functools.partial(QuietHandler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/web/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(serve):
    return serve(ROOT)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser):
    browser.messages.clear()
    browser.resize(1280, 900)
    return browser


def settle(page):
    """Wait until the page has drawn, or says why not: its state."""
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 200))")  # a typed value waits 150
    state = "document.body && document.body.dataset.state"
    page.wait(f"['done', 'error'].includes({state})", 120)
    return page.evaluate(state)


def open_page(page, address, **settings):
    page.open(f"{address}#{urlencode(settings)}")
    page.wait("document.body && document.body.dataset.state")
    return settle(page)


def text(page, name):
    return page.evaluate(f"document.getElementById('{name}').textContent")


def canvas(page, name="picture"):
    """The pixels of a canvas: uint8 (H, W, 4)."""
    numbers = page.evaluate(
        f"""(() => {{
          const canvas = document.getElementById('{name}');
          const {{width, height}} = canvas;
          const {{data}} = canvas.getContext('2d').getImageData(0, 0, width, height);
          return [height, width, ...data];
        }})()"""
    )
    return np.array(numbers[2:], np.uint8).reshape(*numbers[:2], 4)


def assert_draws(page, path, label=SNEAKER, **options):
    assert text(page, "error") == ""
    found = canvas(page)
    image = expected(path, [label], **options)[0].transpose(1, 2, 0)
    height, width, _ = image.shape
    assert found.shape == (height, width, 4) and np.all(found[:, :, 3] == 255)
    count, levels = difference(found[:, :, :3], np.broadcast_to(image, (height, width, 3)))
    print(f"{count} values of the canvas differ, by {levels}")
    assert levels <= LEVELS


@needs_chromium
@needs_runtime
@pytest.mark.parametrize("name", NAMES)
def test_the_page_draws_a_sneaker(page, address, name):
    options = {"steps": 22} if name == "ddpm" else {}
    assert open_page(page, address, model=name, **options) == "done"
    assert_draws(page, shipped(name), **options)
    assert page.errors() == []
    card = model_of(shipped(name)).card | options
    is_shown = not page.evaluate("document.getElementById('steps-shown').hidden")
    assert is_shown == ("steps" in card)
    if is_shown:
        shown = page.evaluate("document.querySelectorAll('#strip button[title]').length")
        assert shown == min(card["steps"], 20) + 1
    assert page.evaluate("document.querySelectorAll('#class input').length") == 10
    # The command that it shows is one that infer_onnx.py takes for this model.
    args = infer_onnx.build_parser().parse_args(text(page, "command").split()[2:])
    options = infer_onnx.sampling_options(args, card)
    assert (args.model, args.class_, args.seed) == (f"pretrained/{name}.onnx", "sneaker", 0)
    assert options.get("steps") == card.get("steps")


@needs_chromium
@needs_runtime
def test_a_link_is_a_picture(page, address):
    options = {"seed": 2**62 + 3, "steps": 8, "guidance": 3}
    settings = {"model": "ddim", "class": "t-shirt-top", **options, "solver": "dpm++"}
    options["guidance_interval"] = [0.125, 0.5]
    ends = {"guidance_low": 0.125, "guidance_high": 0.5}
    assert open_page(page, address, **settings, **ends) == "done"
    assert_draws(page, shipped("ddim"), 0, **options, solver="dpm++")
    command = text(page, "command")
    flags = command.removeprefix("python infer_onnx.py ").split()
    args = infer_onnx.build_parser().parse_args(flags)
    card = model_of(shipped("ddim")).card
    assert infer_onnx.sampling_options(args, card) == {
        "steps": 8, "guidance": 3, "guidance_interval": [0.125, 0.5], "solver": "dpm++",
    }  # fmt: skip
    assert (args.seed, args.class_) == (2**62 + 3, "t-shirt-top")
    link = page.evaluate("location.hash")
    page.open(address + link)
    page.wait("document.body && document.body.dataset.state === 'done'")
    assert_draws(page, shipped("ddim"), 0, **options, solver="dpm++")
    assert open_page(page, address, **settings, guidance_limit=0.5) == "done"  # an older link
    assert "--guidance-interval 0 0.5" in text(page, "command")
    said = "guidance 0 ignores the class"
    assert said not in text(page, "report")
    assert open_page(page, address, model="ddim", steps=2, guidance=0) == "done"
    assert "--guidance 0" in text(page, "command")
    assert "--guidance-interval" not in text(page, "command")  # which is for one above 1
    assert said in text(page, "report")
    said = "guidance 3 counts as 1"
    assert said not in text(page, "report")
    ends = {"guidance_low": 0.25, "guidance_high": 0.25}
    assert open_page(page, address, model="ddim", steps=2, guidance=3, **ends) == "done"
    assert said in text(page, "report")


@needs_chromium
@needs_runtime
def test_keyboard_and_controls(page, address):
    open_page(page, address, model="gan")
    page.press("n")
    assert settle(page) == "done"
    assert_draws(page, shipped("gan"), seed=1)
    page.evaluate("document.querySelector('#class input:checked').focus()")
    page.press("ArrowRight")
    assert settle(page) == "done"
    assert_draws(page, shipped("gan"), SNEAKER + 1, seed=1)
    # Many changes at once: the last one counts.
    for seed in (4, 5, 6):
        page.evaluate(f"location.hash = 'model=ddim&class=Bag&seed={seed}&steps=10'")
    assert settle(page) == "done"
    assert_draws(page, shipped("ddim"), 8, seed=6, steps=10)
    # A link takes the defaults for what it leaves out, not what the page had.
    page.evaluate("location.hash = 'model=ddim&class=Bag&seed=6&steps=10&solver=ddim'")
    assert settle(page) == "done"
    assert_draws(page, shipped("ddim"), 8, seed=6, steps=10, solver="ddim")
    page.evaluate("location.hash = 'model=ddim&solver=dpm++'")  # + stands for a space
    assert settle(page) == "done"
    assert_draws(page, shipped("ddim"), solver="dpm++")
    # Of two values typed within an instant none is lost.
    page.evaluate("seed.value = 3; seed.oninput(); steps.value = 9; steps.oninput()")
    assert settle(page) == "done"
    assert_draws(page, shipped("ddim"), seed=3, steps=9)
    for text_of_link in ("7", "ANKLE"):  # an index, a beginning
        page.evaluate(f"location.hash = 'model=gan&class={text_of_link}&seed=0'")
        assert settle(page) == "done"
        assert_draws(page, shipped("gan"), 7 if text_of_link == "7" else 9)
    page.evaluate("location.hash = 'model=ddim&class=Bag&seed=6&steps=10'")
    assert settle(page) == "done"
    # The slider shows any step, x_t and x_0; at the end the noise that it started from.
    model = model_of(shipped("ddim"))
    x_T = infer_onnx.next_noise(infer_onnx.noise_streams(6, [0]), (1, 32, 32))
    pairs, guidance, times = infer_onnx.walk_of(model.card, 10)
    y = np.array([8])
    denoise = infer_onnx.denoiser(model.session, y, guidance, model.card["null_label"], *times)
    alpha_bars, trace = np.array(model.card["alpha_bars"]), []
    infer_onnx.dpm_sample(denoise, x_T, alpha_bars, pairs, model.card["prediction"], trace=trace)

    def assert_shows(name, image):
        grey = canvas(page, name)[:, :, 0]
        assert difference(grey, infer_onnx.as_bytes(image)[0, 0])[1] <= LEVELS

    assert_shows("x_t", x_T)
    for k in (0, 4):
        page.evaluate(f"shown.value = {k}; shown.oninput()")
        t, x_t, x_0_hat = trace[k]
        assert text(page, "x_t-caption") == f"x_t: step {k + 1}, t = {t}"
        assert_shows("x_t", x_t)
        assert_shows("picture", x_0_hat)
    small = "[...document.querySelectorAll('#strip button')][2].children"
    page.evaluate(f"for (const [i, part] of [...{small}].entries()) part.id = `small-${{i}}`")
    for i in (0, 1):
        assert_shows(f"small-{i}", trace[2][1 + i])


@needs_chromium
@needs_runtime
def test_the_png_is_that_of_infer_onnx(page, address):
    open_page(page, address, model="gan", seed=3)
    page.evaluate("HTMLAnchorElement.prototype.click = function () { window.saved = this }")
    page.evaluate("document.getElementById('download').click()")
    assert page.evaluate("saved.download") == "gan_sneaker.png"
    content = base64.b64decode(page.evaluate("saved.href").removeprefix("data:image/png;base64,"))
    found = np.array(Image.open(io.BytesIO(content)).convert("L"))
    picture = infer_onnx.to_picture(expected(shipped("gan"), seed=3), 1)
    assert difference(found, np.array(picture))[1] <= LEVELS


@needs_chromium
@needs_runtime
def test_the_picture_outlives_wrong_input(page, address):
    """Beside an error stands the last picture, with its own class, and it can be saved.

    A drawing that the error stopped can be looked at up to there.
    """
    open_page(page, address, model="ddim", steps=2)
    page.evaluate("seed.value = 'x'; seed.oninput()")
    assert settle(page) == "error"
    page.evaluate("document.querySelector('#class input[value=\"8\"]').click()")
    assert settle(page) == "error"
    assert text(page, "error").startswith("seed x is not")
    page.evaluate("shown.value = 2; shown.oninput()")
    assert text(page, "picture-caption") == "Sneaker"
    page.evaluate("HTMLAnchorElement.prototype.click = function () { window.saved = this }")
    page.evaluate("document.getElementById('download').click()")
    assert page.evaluate("saved.download") == "sneaker.png"
    page.evaluate("location.hash = 'model=ddim&class=Bag&seed=1&steps=900'")
    page.wait("document.querySelectorAll('#strip button[title]').length > 1")
    page.evaluate("seed.value = 'x'; seed.oninput()")
    assert settle(page) == "error" and text(page, "same") and not text(page, "report")
    last = int(page.evaluate("shown.max"))
    assert 40 < last < 900
    page.evaluate(f"shown.value = {last}; shown.oninput()")
    assert f"step {last + 1}, t = " in text(page, "x_t-caption")


@needs_chromium
@needs_runtime
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "flow"}, "no model flow: ddim, distill, distill2, ddpm, ldm, gan, vae"),
        ({"model": "file"}, "no model file: open the file of this link again"),
        ({"class": "S"}, "class S is ambiguous, give an index: 5 (Sandal), 6 (Shirt), 7 (Sneaker)"),
        ({"class": "Hat"}, "no class Hat: choose one of T-shirt/top, Trouser"),
        ({"seed": "-1"}, "seed -1 is not a whole number from 0"),
        ({"steps": "ten"}, "steps is empty or not a number"),
        ({"solver": "euler"}, "solver euler is not ddim or dpm++"),
        ({"model": "ddpm", "solver": "ddim"}, "solver is not for ddpm models here: leave it out"),
        ({"model": "distill", "guidance_low": "0"}, "guidance_interval is not for distill models"),
        ({"model": "gan", "clas": "Bag"}, "the link's clas: right are model, class, seed, solver"),
        ({"model": "ddim", "eta": "1"}, "the link's eta: right are"),
    ],
)
def test_wrong_links(page, address, settings, message):
    """In a new page, and in one that has drawn another model."""
    assert open_page(page, address, **settings) == "error"
    assert text(page, "error").startswith(message)
    for link in ("model=gan&class=Sneaker&seed=0", urlencode(settings)):
        page.evaluate(f"location.hash = '{link}'")
        state = settle(page)
        assert page.evaluate("document.getElementById('error').hidden") == (state == "done")
    assert state == "error" and text(page, "error").startswith(message)
    if settings.get("model") in ("flow", "file"):  # no model is chosen, so that any can be
        assert page.evaluate("document.querySelectorAll('#model input:checked').length") == 0


@needs_chromium
@needs_runtime
def test_a_link_says_each_thing_once_and_after_a_hash(page, address):
    for link in ("#model=gan&seed=1&seed=2", "?class=Bag#model=gan"):
        page.open(address + link)
        page.wait("document.body && document.body.dataset.state === 'error'")
        assert "right are model, class" in text(page, "error")
    page.press("n")  # whatever is chosen then is drawn
    assert settle(page) == "done"
    assert_draws(page, shipped("gan"), seed=1)
    page.open(f"{address}?utm_source=x#model=gan")  # of others, and not for the page
    assert settle(page) == "done"


@needs_chromium
@needs_runtime
def test_the_steps_of_a_student_can_be_put_right(page, address):
    assert open_page(page, address, model="distill", steps=8) == "error"
    assert text(page, "error") == "this model supports no other number of steps than 4"
    page.evaluate("steps.value = 4; steps.oninput()")
    assert settle(page) == "done"
    assert_draws(page, shipped("distill"))
    assert page.evaluate("steps.disabled")


def tiny_colour_model(path):
    """A network for `gan`: colour images of 64x64, other classes, random weights."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4 + 2, 3 * 64 * 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Concat", ["z", "classes"], ["input"], axis=1),
            helper.make_node("MatMul", ["input", "weights"], ["flat"]),
            helper.make_node("Tanh", ["flat"], ["bounded"]),
            helper.make_node("Reshape", ["bounded", "shape"], ["image"]),
        ],
        "tiny",
        [
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("classes", TensorProto.FLOAT, ["batch", 2]),
        ],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [
            onnx.numpy_helper.from_array(weights, "weights"),
            onnx.numpy_helper.from_array(np.array([-1, 3, 64, 64]), "shape"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    card = {
        "format": infer_onnx.METADATA_FORMAT, "kind": "codes", "model": "gan",
        "class_names": ["red & <b>blue</b>", "ÄÖ"], "image_shape": [3, 64, 64], "parts": {},
        "probe": {}, "latent_dim": 4, "prior": None,
    }  # fmt: skip
    proto.metadata_props.add(key=infer_onnx.METADATA_KEY, value=json.dumps(card))
    save_sealed(proto, path)


def choose_files(page, *paths):
    """Choose files by the page's file picker."""
    page.evaluate("document.body.dataset.state = 'drawing'")
    picker = page.call("Runtime.evaluate", expression="document.getElementById('files')")
    handle = picker["result"]["objectId"]
    page.call("DOM.setFileInputFiles", files=[str(path) for path in paths], objectId=handle)
    return settle(page)


@needs_chromium
@needs_runtime
def test_a_student_has_no_guidance_to_set(page, address, tmp_path):
    open_page(page, address, model="gan")
    assert choose_files(page, with_card("ddim", tmp_path, **STUDENT)) == "done"
    shown = "['steps', 'guidance', 'guidance_low', 'guidance_high', 'solver'].map((id) => "
    shown += "document.getElementById(id).offsetParent !== null)"
    assert page.evaluate(shown) == [True, False, False, False, False]
    assert page.evaluate("document.getElementById('steps').disabled") is True


@needs_chromium
@needs_runtime
def test_your_own_files(page, address, tmp_path):
    open_page(page, address, model="gan")
    ldm, decoder = shipped("ldm"), shipped("ldm_decoder")
    assert choose_files(page, ldm) == "error"
    message = "ldm.onnx needs ldm_decoder.onnx too: choose both files at once"
    assert text(page, "error") == message
    for files in ([decoder, ldm], [shipped("vae_encoder"), shipped("vae")], [shipped("vae")]):
        assert choose_files(page, *files) == "done"
        assert_draws(page, files[-1])
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(shipped("gan").read_bytes()[:-5])
    assert choose_files(page, damaged) == "error"
    assert "damaged.onnx is damaged" in text(page, "error")
    colours = tmp_path / "my colours.onnx"
    tiny_colour_model(colours)
    assert choose_files(page, colours) == "done"
    assert_draws(page, colours, 0)  # it has no Sneaker: the first of its classes
    names = page.evaluate("[...document.querySelectorAll('#class span')].map(s => s.textContent)")
    assert names == ["red & <b>blue</b>", "ÄÖ"]
    assert text(page, "command").startswith("python infer_onnx.py --model 'my colours.onnx'")
    assert "checksum" not in text(page, "report") and "early" not in text(page, "report")
    proto = onnx.load(with_card("gan", tmp_path, training={"step": 10}))
    card = {entry.key: entry.value for entry in proto.metadata_props}[infer_onnx.METADATA_KEY]
    onnx.helper.set_model_props(proto, {infer_onnx.METADATA_KEY: card})
    plain = tmp_path / "gan.onnx"
    onnx.save(proto, plain)  # as other tools write it, without a seal
    assert choose_files(page, plain) == "done"
    said = text(page, "report")
    assert "the file has no checksum: corruption would go unnoticed" in said
    assert "the model is of step 10, early in its training" in said
    page.evaluate("document.querySelector('#model input[value=gan]').click()")
    assert settle(page) == "done"
    assert_draws(page, shipped("gan"), 0)


@needs_chromium
@needs_runtime
def test_a_link_of_ones_own_file_keeps_its_settings(page, address):
    options = {"seed": 3, "steps": 4, "guidance": 3, "solver": "ddim"}
    assert open_page(page, address, model="file", **{"class": "Bag"}, **options) == "error"
    assert choose_files(page, shipped("gan"), shipped("vae")) == "error"
    assert text(page, "error") == "these are several models: open one"
    assert choose_files(page, shipped("ddim")) == "done"
    assert_draws(page, shipped("ddim"), 8, **options)
    assert choose_files(page, shipped("ddim")) == "done"  # chosen anew: with its defaults
    assert_draws(page, shipped("ddim"), 8, seed=3)


@needs_chromium
@needs_runtime
def test_settings_of_another_model_are_dropped(page, address):
    """Those set while it was loading; those of a link are refused until its model is chosen."""
    open_page(page, address, model="ddim", steps=2)
    page.evaluate("document.querySelector('#model input[value=vae]').click()")
    page.evaluate("steps.value = 5; steps.oninput()")
    assert settle(page) == "done"
    assert_draws(page, shipped("vae"))
    assert open_page(page, address, model="gan", steps=8) == "error"
    page.evaluate("document.querySelector('#model input[value=gan]').click()")
    assert settle(page) == "done"
    assert_draws(page, shipped("gan"))


@needs_chromium
@needs_runtime
def test_files_that_are_dropped(page, address):
    open_page(page, address, model="gan")
    page.evaluate(
        """(async () => {
          const dropped = new DataTransfer();
          for (const name of ["ldm_decoder.onnx", "ldm.onnx"]) {
            const response = await fetch("../pretrained/" + name);
            dropped.items.add(new File([await response.arrayBuffer()], name));
          }
          document.body.dataset.state = "drawing";
          document.body.dispatchEvent(
            new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
        })()"""
    )
    assert settle(page) == "done"
    assert_draws(page, shipped("ldm"))


@needs_chromium
@needs_runtime
def test_a_phone_needs_no_scrolling_to_the_side(page, address):
    page.resize(360, 740, 2, mobile=True)
    open_page(page, address)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_chromium
def test_a_page_without_server_or_runtime(page, serve, tmp_path):
    page.open((ROOT / "web/index.html").as_uri())
    page.wait("document.readyState === 'complete'")
    assert text(page, "error").startswith("This page needs a server: run python -m http.server")
    (tmp_path / "web").mkdir()
    shutil.copy(ROOT / "web/index.html", tmp_path / "web")
    page.open(serve(tmp_path))
    page.wait("document.readyState === 'complete'")
    assert text(page, "error").startswith("sampler.js must lie beside this page")
    shutil.copy(ROOT / "web/sampler.js", tmp_path / "web")
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    alone = serve(tmp_path)
    assert open_page(page, alone) == "error"
    assert text(page, "error").endswith("run npm install --prefix web, then reload this page")
    (tmp_path / "web/node_modules").symlink_to(ROOT / "web/node_modules")
    (tmp_path / "pretrained").unlink()
    if RUNTIME.is_dir():
        assert open_page(page, alone) == "error"
        message = (
            r"pretrained/ddim\.onnx cannot be loaded \(404 .*\): serve the repository's folder"
        )
        assert re.fullmatch(message, text(page, "error"))
