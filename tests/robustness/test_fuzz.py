"""Mutated real files: whatever a byte or a value becomes, a reader gives a correct result or
InputError (of an image OSError).

It never takes more than 10 seconds, nor a GB. The mutations are the same in every run; FUZZ=5000
asks for so many of each kind.
"""

import copy
import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BART, CLIP
from PIL import Image
from test_hostile import DEEP, RECORD, bounded

import model
import utils
from antarctic import cache as cache_module
from antarctic import checkpoints, datasets, features, files, images
from antarctic.datasets import Picture
from antarctic.errors import InputError
from antarctic.files import file_sha256
from antarctic.openai_clip import load_openai_clip
from antarctic.results import write_results
from antarctic.sealed import DIGITS, read_sealed, resume, seal

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ", "20"))
fuzz = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
                suppress_health_check=list(HealthCheck))
COUNTS = Counter()  # outcomes: printed where FUZZ is set


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    if "FUZZ" in os.environ:
        for (name, outcome), n in sorted(COUNTS.items()):
            print(f"{n:7} {name:24} {outcome}")
        print(f"{sum(COUNTS.values()):7} mutated files")


# ---------------------------------------------------------------------------------------- mutations

PLACES = st.integers(0, 400) | st.integers(-100, -1) | st.floats(
    0, 1)  # from the beginning, from the end, a share of the file
BYTES = st.binary(min_size=1, max_size=9) | st.sampled_from([
    b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\n", b"\r", b"(" * 300, b"[" * 9000,
    b"9" * 5000, b"NaN", b"-", b"1e999", b"\xe2\x80\xa8", b"\x1b[2J", b"\xed\xa0\x80"
])
BYTE_EDITS = st.lists(
    st.one_of(st.tuples(st.just("set"), PLACES, BYTES),
              st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
              st.tuples(st.just("insert"), PLACES, BYTES), st.tuples(st.just("cut"), PLACES),
              st.tuples(st.just("remove"), PLACES, st.integers(1, 300)),
              st.tuples(st.just("repeat"), PLACES, st.integers(1, 300)),
              st.tuples(st.just("swap"), PLACES, PLACES, st.integers(1, 300))), min_size=1,
    max_size=5)


def mutate(data, edits):
    """The bytes after some edits: (what, where, ...)."""
    def locate(place):
        return int(place * len(data)) if isinstance(place, float) else place % (len(data) or 1)

    for what, place, *more in edits:
        at = locate(place)
        if what == "set":
            data = data[:at] + more[0] + data[at + len(more[0]):]
        elif what == "flip":
            data = data[:at] + bytes(byte ^ 1 << more[0]
                                     for byte in data[at:at + 1]) + data[at + 1:]
        elif what == "insert":
            data = data[:at] + more[0] + data[at:]
        elif what == "cut":
            data = data[:at]
        elif what == "remove":
            data = data[:at] + data[at + more[0]:]
        elif what == "repeat":
            data = data[:at] + data[at:at + more[0]] * 3 + data[at + more[0]:]
        else:
            low, high = sorted((at, locate(more[0])))
            n = min(more[1], high - low)
            data = data[:low] + data[high:high + n] + data[low + n:high] + data[low:low +
                                                                                n] + data[high + n:]
    return data


VALUES = st.sampled_from([
    None, True, False, 0, -1, 1, 7, 1.5,
    float("nan"),
    float("inf"), -0.0, 1 << 31, 1 << 63, 1 << 64, 10**30, -10**4000, "", "a", "7",
    "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\udcff", "\x1b[2J", "\u202e", "\u2028",
    "<script>", "F64", "BF16", "a" * 20_000, [], {}, [[]], [1, 2], {"a": 1}, ["a", "b"], [0, 8],
    [8, 0], [1 << 40, 1 << 41], [1] * 40, {"id": 1}, {"caption": "a"}, "DEEP"
])
VALUES |= st.integers() | st.text(max_size=5)
JSON_EDITS = st.lists(
    st.tuples(st.sampled_from(["replace", "replace", "delete", "repeat", "rename", "copy"]),
              st.integers(0, 1 << 30), st.integers(0, 1 << 30), VALUES), min_size=1, max_size=4)


def places(data):
    """(container, key) of every value inside some JSON."""
    found, waiting = [], [data]
    while waiting:
        one = waiting.pop()
        for key in one if isinstance(one,
                                     dict) else range(len(one)) if isinstance(one, list) else ():
            found.append((one, key))
            waiting.append(one[key])
    return found


def mutate_json(data, edits):
    """The bytes of some JSON after edits: (what, which value, which other, a new value)."""
    box = [copy.deepcopy(data)]
    for what, which, other, value in edits:
        there = places(box)
        (container, key), (source, at) = there[which % len(there)], there[other % len(there)]
        if what == "replace":
            container[key] = copy.deepcopy(value)
        elif what == "copy":
            container[key] = copy.deepcopy(source[at])
        elif what == "delete" and container is not box:
            del container[key]
        elif what == "repeat" and isinstance(container, list) and container is not box:
            container.insert(key, copy.deepcopy(container[key]))
        elif what == "rename" and isinstance(container, dict):
            container[str(value)] = container.pop(key)
    return json.dumps(box[0]).replace('"DEEP"', DEEP).encode()


def outcome(name, path, content, read, error=InputError):
    """Writes the bytes, reads them within the limits, and counts what came of it."""
    path.write_bytes(content)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
            COUNTS[name, "read"] += 1
        except error as refused:
            assert error is OSError or str(refused).isprintable() and str(refused)
            COUNTS[name, "refused"] += 1


# ---------------------------------------------------------------------------------------- the cache

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


ENTRIES = [
    "a dog", "grass", "naïve café", "", "\u202eodd\x00", "penguin", "two red cats", "x" * 100
]
DIM = 8


def made_cache(folder):
    """{name: bytes} of the three files of a cache."""
    rows = torch.nn.functional.normalize(
        torch.randn(len(ENTRIES), DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    cache_module.write_cache(folder / "c.txt", folder / "c.npy", ENTRIES, rows.numpy(), "clip@1",
                             "")
    return {name: (folder / name).read_bytes() for name in ("c.txt", "c.npy", "c.npy.json")}


def read_cache(folder):
    entries, rows = cache_module.read_cache([folder / "c.txt"], [folder / "c.npy"], "clip@1", DIM)
    values = rows[:]
    assert len(entries) == len(rows) == len(
        values) and values.shape[1] == DIM and values.dtype == torch.float32
    assert values.isfinite().all() and all(
        isinstance(entry, str) and "\n" not in entry for entry in entries)
    scores, indices = cache_module.search(torch.ones(1, DIM), rows, 3)
    assert indices.max() < len(entries) and torch.equal(
        (torch.ones(1, DIM) @ values.T)[0, indices[0]], scores[0])


@pytest.mark.parametrize("name", ["c.txt", "c.npy", "c.npy.json"])
@pytest.mark.parametrize("checked", [True, False], ids=["described", "undescribed"])
def test_a_cache_of_mutated_bytes(folder, name, checked):
    files = made_cache(folder)

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        content = mutate(files[name], edits)
        told = json.loads(files["c.npy.json"])
        for other, data in files.items():
            (folder / other).write_bytes(data)
        if not checked and name != "c.npy.json":
            (folder / "c.npy.json").unlink()
        elif name == "c.txt":  # as if that were its text, so that more than the digest is tried
            (folder / name).write_bytes(content)
            (folder / "c.npy.json").write_text(
                json.dumps(told | {"text_sha256": file_sha256(folder / name)}))
        outcome(f"cache {name}", folder / name, content, lambda _: read_cache(folder))
    run()


def test_a_cache_with_a_description_of_mutated_values(folder):
    files = made_cache(folder)

    @fuzz
    @given(JSON_EDITS)
    def run(edits):
        for other, data in files.items():
            (folder / other).write_bytes(data)
        content = mutate_json(json.loads(files["c.npy.json"]), edits)
        outcome("cache values", folder / "c.npy.json", content, lambda _: read_cache(folder))
    run()


SIDES = st.integers(-9, 99) | st.sampled_from([1 << 31, 1 << 62, 1 << 64, 10**18, -10**30, True])
DTYPES = ["<f4", ">f4", "<f2", "<f8", "<f16", "|O", "<U3", "|V0", "<c8", "|b1", "<i4", "<M8[s]"]


@fuzz
@given(st.lists(SIDES, max_size=4), st.sampled_from(DTYPES), st.booleans(), st.binary(max_size=600))
def test_a_cache_whose_array_has_any_header(folder, shape, descr, fortran, data):
    made_cache(folder)
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {tuple(shape)}}}\n".encode(
    )
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data
    outcome("cache header", folder / "c.npy", content, lambda _: read_cache(folder))


# ------------------------------------------------------------------------------------ JSON and text

def read_annotations(path):
    listed = {
        picture.id: picture[1:]
        for picture in datasets.read_coco(path.parents[1], "val2017", need_images=False)
    }
    for pictures in (datasets.read_annotations(path), listed):
        for image, (place, captions) in pictures.items():
            assert type(image) in (int, str) and ".." not in Path(place).parts
            assert all(caption.encode() and len(caption) <= files.LONGEST_TEXT
                       for caption in captions if caption)
            utils.seed_of(0, image)
            os.fsencode(path.parent / place)


def read_results(path):
    assert all(isinstance(caption, str) for caption in datasets.read_results(path).values())


def read_captions(path):
    for image, caption in datasets.read_captions(path):
        caption.encode()
        json.dumps(image)


def read_records(path):
    pictures = [Picture(record["image_id"], Path(record["file"])) for record in RECORDS]
    done = resume(path, 2)
    kept = list(read_sealed(path))
    assert kept == RECORDS[:done] and done % 2 == 0
    if kept:
        write_results(path.parent, path, pictures[:done], 9, as_csv=True)


RECORDS = [RECORD | {"image_id": f"{name}.png", "file": f"{name}.png"} for name in "abcdef"]
COCO = {
    "info": {"year": 2017},
    "images": [{"id": i, "file_name": f"{i}.png", "width": 9} for i in range(5)], "annotations": [
        {"id": i, "image_id": i % 5, "caption": f"a dog and {i} cats"} for i in range(12)
    ]
}
RESULTS = [{"image_id": i, "caption": f"a dog and {i} cats"} for i in range(5)]
TEXT = "a dog\nnaïve café\n\n two  cats \r\n".encode()
DOCUMENTS = {  # name: (file, its values or None, a line each: True, or how it is written; reader)
    "annotations": ("annotations/captions_val2017.json", COCO, False, read_annotations),
    "results of the scorer": ("captions.json", RESULTS, False, read_results),
    "captions.json of stories": ("captions.json", RESULTS, False, read_captions),
    "details.jsonl of stories": ("details.jsonl", RECORDS, True, read_captions),
    "details.jsonl.part": ("details-0.jsonl.part", RECORDS, seal, read_records),
    "captions.txt": ("captions.txt", None, True, read_captions),
    "preds.txt": ("preds.txt", None, True, lambda path: datasets.read_texts(path, "captions file")),
    "words.txt": ("words.txt", None, True, lambda path: [line.encode() for line in files.read_lines(path, "list of words")]),
}


def document(values, by_line):
    if values is None:
        return TEXT
    if by_line is seal:
        return b"".join(map(seal, values))
    return b"".join(json.dumps(record).encode() + b"\n"
                    for record in values) if by_line else json.dumps(values).encode()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_of_mutated_bytes(tmp_path, name):
    file, values, by_line, read = DOCUMENTS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        outcome(name, tmp_path / file, mutate(document(values, by_line), edits), read)
    run()


@pytest.mark.parametrize("name", [name for name, (_, values, _, _) in DOCUMENTS.items() if values])
def test_a_document_of_mutated_values(tmp_path, name):
    file, values, by_line, read = DOCUMENTS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)

    @fuzz
    @given(JSON_EDITS, st.integers(0, 5))
    def run(edits, line):
        if by_line:
            lines = document(values, by_line).splitlines(keepends=True)
            digits = lines[line][:DIGITS +
                                 1] if by_line is seal else b""  # the seal of what was written
            lines[line] = digits + mutate_json(values[line], edits) + b"\n"
            content = b"".join(lines)
        else:
            content = mutate_json(values, edits)
        outcome(f"{name}, values", tmp_path / file, content, read)
    run()


# -------------------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def captioner():
    return model.Captioner(BART)


def load_checkpoint(captioner):
    def read(path):
        settings = checkpoints.load_checkpoint(path, captioner)
        assert all(
            type(settings[name]) is int and settings[name] > 0
            for name in ("topk", "maxlen_enc", "maxlen_dec"))
        assert all(parameter.isfinite().all() for parameter in captioner.model.parameters())
    return read


def openai_weights(vocabulary):
    """A small CLIP's, by OpenAI's names."""
    def tower(prefix):
        shapes = {
            "ln_1.weight": (64, ), "ln_1.bias": (64, ), "ln_2.weight": (64, ), "ln_2.bias": (64, ),
            "attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192, ),
            "attn.out_proj.weight": (64, 64), "attn.out_proj.bias": (64, ),
            "mlp.c_fc.weight": (256, 64), "mlp.c_fc.bias": (256, ), "mlp.c_proj.weight": (64, 256),
            "mlp.c_proj.bias": (64, )
        }
        return {f"{prefix}transformer.resblocks.0.{name}": shape for name, shape in shapes.items()}

    shapes = tower("") | tower("visual.") | {
        "visual.class_embedding": (64, ), "visual.positional_embedding": (5, 64),
        "visual.conv1.weight": (64, 3, 16, 16), "visual.ln_pre.weight": (64, ),
        "visual.ln_pre.bias": (64, ), "visual.ln_post.weight": (64, ),
        "visual.ln_post.bias": (64, ), "visual.proj": (64, 32), "logit_scale": (),
        "token_embedding.weight": (vocabulary, 64), "positional_embedding": (77, 64),
        "ln_final.weight": (64, ), "ln_final.bias": (64, ), "text_projection": (64, 32)
    }
    return {name: torch.zeros(shape).half() for name, shape in shapes.items()}


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def state_of():
    """(trained, optimizer, progress) of a small training."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {"a": weight}, optimizer, (1.5, 3, [1.0, 2.0], [(1, 2.0, None, 0.1)])


@pytest.fixture(scope="module")
def torch_files(captioner, checkpoint, tmp_path_factory):
    """{name: (file, bytes, reader)} of all that holds tensors."""
    folder = tmp_path_factory.mktemp("made")
    weights = {
        f"model.{name}": weight.detach() for name, weight in captioner.model.named_parameters()
        if checkpoints.is_layernorm(name)
    }
    lightning = {
        "epoch": 5, "state_dict": weights, "hyper_parameters": {"topk": 24, "note": (1, "a")}
    }
    tokenizer = model.load_tokenizer(CLIP, "tokenizer")
    trained, optimizer, progress = state_of()
    checkpoints.save_state(folder / "state-0.pt", trained, optimizer, progress)
    features.write_features(folder / "features.safetensors", torch.eye(8)[:5], {2: "damaged"})

    def read_features(path):
        found = features.read_features(path, 6, 8)
        if found is None:
            raise InputError("computed again")
        assert found[0].shape == (6 - len(found[1]), 8) and set(found[1]) <= set(range(6))

    def read_openai(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "load_tokenizer", lambda *_: tokenizer)
            load_openai_clip(path)

    def read_state(path):
        trained, optimizer, _ = state_of()
        checkpoints.load_state(path, trained, optimizer)

    return {
        "safetensors": ("a.safetensors", checkpoint.read_bytes(), load_checkpoint(captioner)),
        "features": ("features-0.safetensors", (folder / "features.safetensors").read_bytes(),
                     read_features),
        "Lightning .ckpt": ("a.ckpt", saved(lightning), load_checkpoint(captioner)),
        "OpenAI .pt": ("a.pt", saved(openai_weights(len(tokenizer))), read_openai),
        "trainer's state": ("state-0.pt", (folder / "state-0.pt").read_bytes(), read_state),
    }


FILES = ["safetensors", "features", "Lightning .ckpt", "OpenAI .pt", "trainer's state"]


@pytest.mark.parametrize("name", FILES)
def test_tensors_of_mutated_bytes(tmp_path, torch_files, name):
    file, content, read = torch_files[name]

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        outcome(name, tmp_path / file, mutate(content, edits), read)
    run()


@pytest.mark.parametrize("name", FILES[:2])
def test_tensors_with_a_header_of_mutated_values(tmp_path, torch_files, name):
    file, content, read = torch_files[name]
    length, = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + length]), content[8 + length:]

    @fuzz
    @given(JSON_EDITS, JSON_EDITS, st.booleans())
    def run(edits, inner, both):
        changed = copy.deepcopy(header)
        for key, text in changed["__metadata__"].items():
            if both:  # the settings, which are JSON in a text of the header
                changed["__metadata__"][key] = mutate_json(json.loads(text), inner).decode()
        made = json.dumps(changed).encode() if both else mutate_json(changed, edits)
        outcome(f"{name}, values", tmp_path / file,
                struct.pack("<Q", len(made)) + made + data, read)
    run()


@pytest.mark.parametrize("name", FILES[2:])
def test_a_zip_with_a_mutated_pickle(tmp_path, torch_files, name):
    """In an archive that is whole, with the right sums."""
    file, content, read = torch_files[name]
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, data in members.items():
                archive.writestr(member,
                                 mutate(data, edits) if member.endswith("/data.pkl") else data)
        outcome(f"{name}, pickle", tmp_path / file, buffer.getvalue(), read)
    run()


# ------------------------------------------------------------------------------------------- images

def encoded(format, mode="RGB", **options):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode) if mode != "I;16" else Image.fromarray(
        noise[:, :, 0].astype(np.uint16) * 257)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, format, **({} if format in ("BMP", "GIF") else {"exif": exif}), **options)
    return buffer.getvalue()


IMAGES = {
    "rgb.png": encoded("PNG"),
    "palette.png": encoded("PNG", "P", transparency=3),
    "grey16.png": encoded("PNG", "I;16"),
    "bits.png": encoded("PNG", "1"),
    "rgba.png": encoded("PNG", "RGBA"),
    "rgb.jpg": encoded("JPEG"),
    "steps.jpg": encoded("JPEG", progressive=True),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "two.jpg": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "lossy.webp": encoded("WEBP"),
    "lossless.webp": encoded("WEBP", "RGBA", lossless=True),
    "rgb.bmp": encoded("BMP"),
    "palette.gif": encoded("GIF", "P", transparency=3, save_all=True,
                           append_images=[Image.new("P", (60, 40))]),
    "plain.tif": encoded("TIFF"),
    "lzw.tif": encoded("TIFF", compression="tiff_lzw"),
    "jpeg.tif": encoded("TIFF", compression="jpeg"),
    "deflate.tif": encoded("TIFF", "RGBA", compression="tiff_deflate"),
    "fax.tif": encoded("TIFF", "1", compression="group4"),
}


def with_right_sums(data):
    """A PNG whose chunks have the sums of what they hold, so that a mutated one is read further."""
    found, at = [data[:8]], 8
    while at + 12 <= len(data):
        length, = struct.unpack(">I", data[at:at + 4])
        body = data[at + 4:at + 8 + length]
        found += [data[at:at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(found)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_mutated_bytes(tmp_path, name):
    def read(path):
        image = images.read_image(path)
        assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height

    @fuzz
    @given(BYTE_EDITS, st.booleans())
    def run(edits, repaired):
        content = mutate(IMAGES[name], edits)
        if repaired and name.endswith(".png"):
            content = with_right_sums(content)
        outcome(f"image {name}", tmp_path / name, content, read, OSError)
    run()
