"""Properties that hold for any input, and files corrupted at random.

These are refused with one line, or read as they were.
"""

import io
import itertools
import unicodedata
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import idx_bytes, small_set, write_idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import ddim
import evaluate
import infer_onnx
import runs
from common import InputError

FILES = 200  # corrupted ones of each kind
shared = {"deadline": None, "derandomize": True, "database": None}
many = settings(max_examples=FILES, suppress_health_check=list(HealthCheck), **shared)
few = settings(max_examples=200, **shared)


@st.composite
def corruptions(draw):
    """A function that corrupts bytes: some are changed, cut off, removed, inserted or doubled."""
    places = st.integers(0, 2**32)
    kind = draw(st.sampled_from(("change", "header", "cut", "out", "in", "double")))
    at, length = draw(places), draw(st.integers(1, 64))
    patch = draw(st.binary(min_size=1, max_size=8))

    def corrupt(content):
        start = at % max(len(content), 1)
        if kind == "header":
            start %= 128
        if kind in ("change", "header"):
            return content[:start] + patch + content[start + len(patch) :]
        if kind == "cut":
            return content[:start]
        if kind == "out":
            return content[:start] + content[start + length :]
        added = patch if kind == "in" else content[start : start + length]
        return content[:start] + added + content[start:]

    return corrupt


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def small_model(exports):
    """The bytes of a small exported model."""
    return exports("gan").read_bytes()


@many
@given(corrupt=corruptions())
def test_corrupted_onnx_is_refused(corrupt, small_model, folder):
    path, content = folder / "x.onnx", corrupt(small_model)
    path.write_bytes(content)
    try:
        infer_onnx.load_model(path, "cpu", 1)
    except infer_onnx.ModelError as error:
        assert "\n" not in str(error)
    else:
        assert content in (small_model, small_model[: -len(infer_onnx.SEAL) - 64])


@many
@given(corrupt=corruptions())
def test_corrupted_metadata_is_refused_or_harmless(corrupt, small_model, folder):
    """A model card that somebody edited, with a matching checksum."""
    start = small_model.index(b'{"format"')
    stop = small_model.index(b'"probe"', start)
    card = corrupt(small_model[start:stop])[: stop - start].ljust(stop - start)
    path = folder / "x.onnx"
    content = small_model[:start] + card + small_model[stop : -len(infer_onnx.SEAL) - 64]
    path.write_bytes(infer_onnx.sealed(content))
    try:
        model = infer_onnx.load_model(path, "cpu", 1)
        images = infer_onnx.sample(model, [0])
    except (infer_onnx.ModelError, infer_onnx.RunError) as error:
        assert "\n" not in str(error)
    else:
        assert images.dtype == np.uint8 and images.shape == (1, 1, 32, 32)


@many
@given(corrupt=corruptions())
def test_corrupted_checkpoints_are_refused_or_whole(corrupt, tiny_runs, folder):
    path, whole = folder / "x.pt", tiny_runs("gan") / "gan.pt"
    path.write_bytes(corrupt(whole.read_bytes()))
    try:
        checkpoint = runs.load_checkpoint(path, ("gan",))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        known = runs.load_checkpoint(whole, ("gan",))
        for key, value in checkpoint["ema"].items():
            assert torch.equal(value, known["ema"][key])
        assert checkpoint["network"] == known["network"] and checkpoint["config"] == known["config"]


@pytest.mark.parametrize("compress", [False, True])
@many
@given(corrupt=corruptions(), which=st.sampled_from(common.IDX_FILES[:2]))
def test_corrupted_idx_files_are_refused_or_in_range(corrupt, which, compress, folder):
    """Of a data set without published checksums; with them, any difference is refused."""
    place = folder / f"idx{compress}"
    if not place.is_dir():
        write_idx(place, compress)
    path = place / (which + ".gz" * compress)
    whole = path.read_bytes()
    path.write_bytes(corrupt(whole))
    try:
        read_idx(place)
    finally:
        path.write_bytes(whole)


def read_idx(place):
    """Both readers refuse the set in a line, or give images and labels in range."""
    try:
        data = common.load_data("kmnist", str(place))
        assert data.images.shape[1:] == (1, 32, 32) and data.images.dtype == torch.uint8
        assert len(data.labels) == len(data.images) > 0
        assert 0 <= data.labels.min() <= data.labels.max() < 10
    except InputError as error:
        assert "\n" not in str(error)
    try:
        images, labels = evaluate.load_real("kmnist", str(place)).parts()[0]
        assert images.shape[1:] == (1, 32, 32) and images.dtype == np.uint8
        assert len(labels) == len(images) > 0 and 0 <= labels.min() <= labels.max() < 10
    except infer_onnx.InputError as error:
        assert "\n" not in str(error)


@many
@given(corrupt=corruptions(), compress=st.booleans())
def test_corrupted_npz_is_refused_or_whole(corrupt, compress, folder):
    images, labels = small_set()
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, x=images, y=labels)
    path = folder / "x.npz"
    path.write_bytes(corrupt(buffer.getvalue()))
    try:
        data = common.load_data(str(path))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert torch.equal(data.images[:, 0, 2:30, 2:30], torch.from_numpy(images))
        assert torch.equal(data.labels, torch.from_numpy(labels.astype(np.int64)))
    evaluate.read_chunk(path, 60)  # None where the images must be sampled again


@many
@given(corrupt=corruptions())
def test_corrupted_pictures_are_refused_or_pictures(corrupt, folder):
    buffer = io.BytesIO()
    Image.fromarray(small_set()[0][0]).save(buffer, format="png")
    path = folder / "x.png"
    path.write_bytes(corrupt(buffer.getvalue()))
    for read, shape in ((common.load_image, (1, 1, 32, 32)), (infer_onnx.read_pixels, (1, 32, 32))):
        try:
            image = read(path, 1 if read is common.load_image else [1, 32, 32])
        except (InputError, infer_onnx.InputError) as error:
            assert "\n" not in str(error)
        else:
            assert image.shape == shape


def test_objects_in_an_npz_are_never_loaded(folder):
    np.savez(folder / "x.npz", x=np.array([{}], dtype=object), y=np.array([0]))
    with pytest.raises(InputError, match="not a readable"):
        common.load_data(str(folder / "x.npz"))


def test_sizes_in_a_header_take_no_memory(folder):
    """An IDX file that claims 2^32 images, and one that claims 2^96."""
    write_idx(folder / "large")
    for sizes in ((2**32 - 1, 28, 28), (2**32 - 1, 2**32 - 1, 2**32 - 1)):
        content = struct.pack(">HBB3I", 0, 8, 3, *sizes) + bytes(100)
        (folder / "large/train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(InputError):
            common.load_data("kmnist", str(folder / "large"))
        with pytest.raises(infer_onnx.InputError):
            evaluate.load_real("kmnist", str(folder / "large"))
    header = b"\0\0\x08\x03" + struct.pack(">3I", 1, 2, 3)
    assert idx_bytes(np.zeros((1, 2, 3))) == header + bytes(6)


# --- Properties -----------------------------------------------------------------------------------


@few
@given(st.lists(st.floats(-4, 4, width=32, allow_subnormal=False), min_size=1, max_size=50))
def test_the_range_pair_rounds_to_the_nearest_of_256_levels(values):
    x = torch.tensor(values)
    back = common.to_float(common.to_uint8(x))
    assert (back - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(common.to_uint8(back), common.to_uint8(x))
    assert np.array_equal(infer_onnx.as_bytes(x.numpy()), common.to_uint8(x).numpy())


@pytest.mark.parametrize("pairs_of", [ddim.time_pairs, ddim.dpm_pairs])
@few
@given(st.integers(1, 3000), st.data())
def test_pairs_are_a_chain_of_falling_steps_to_the_image(pairs_of, num_timesteps, data):
    steps = data.draw(st.integers(1, num_timesteps))
    pairs = pairs_of(num_timesteps, steps)
    assert len(pairs) == steps and pairs[0][0] == num_timesteps - 1 and pairs[-1][1] == -1
    assert all(t > t_prev for t, t_prev in pairs)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pairs))
    if pairs_of == ddim.time_pairs:
        lengths = [t - t_prev for t, t_prev in pairs]
        assert all(later <= length + 1 for length, later in itertools.pairwise(lengths))
    with pytest.raises(ValueError, match="steps"):
        pairs_of(num_timesteps, num_timesteps + 1)


NAMES = st.lists(st.text(max_size=8), min_size=1, max_size=12)


@few
@given(st.text(max_size=40), NAMES)
def test_any_text_names_classes_or_is_refused(text, names):
    for parse, refusal in (
        (common.parse_classes, InputError),
        (infer_onnx.parse_classes, infer_onnx.InputError),
    ):
        try:
            found = parse(text, names)
        except refusal:
            continue
        assert found and all(0 <= y < len(names) for y in found)
    assert common.parse_classes("ALL", names) == [*range(len(names))]


@few
@given(NAMES, st.data())
def test_a_name_draws_its_class_or_says_that_another_has_it_too(names, data):
    y = data.draw(st.integers(0, len(names) - 1))
    same = [unicodedata.normalize("NFC", name) for name in names]
    if common.fold(names[y].strip()) == "all":
        return
    if same.count(same[y]) == 1:
        assert common.parse_classes(names[y], names) == [y]
    else:
        with pytest.raises(InputError, match="ambiguous"):
            common.parse_classes(names[y], names)
    if str(y) not in same:
        assert common.parse_classes(str(y), names) == [y]


@few
@given(NAMES)
def test_file_names_of_classes_differ_and_stay_in_their_folder(names):
    stems = common.file_stems(names)
    assert len({stem.casefold() for stem in stems}) == len(names)
    for stem in stems:
        path = Path("out", f"00000_{stem}.png")
        assert path.parent == Path("out") and path.resolve().parent == Path("out").resolve()
        assert "\0" not in path.name and path.name.encode()
