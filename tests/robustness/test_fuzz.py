"""Mutated real files: a reader gives a correct result or raises InputError (for images OSError).

It never takes more than 10 seconds or a GB. The mutations are the same in every run. FUZZ=5000
makes so many of each kind.
"""

import contextlib
import copy
import io
import json
import math
import os
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from conftest import BART, CLIP, GPT
from PIL import Image
from test_hostile import DEEP, bounded

import model
import utils
from antarctic import (
    annotations,
    captions,
    causal_lm,
    chair,
    checkpoints,
    datasets,
    feature_files,
    images,
    openai_clip,
)
from antarctic import cache as cache_module
from antarctic.cache_changes import write_cache
from antarctic.errors import InputError
from antarctic.files import file_sha256
from antarctic.folders import Picture
from antarctic.model_files import load_tokenizer
from antarctic.openai_clip import load_openai_clip
from antarctic.pairs import Scored
from antarctic.records import Records
from antarctic.results import write_results
from antarctic.sealed import DIGITS, seal
from antarctic.texts import LONGEST_TEXT, read_lines

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ", "20"))
fuzz = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
                suppress_health_check=list(HealthCheck))
# Loading a model takes a second, so the suite draws few of these.
model_fuzz = settings(fuzz, max_examples=max(1, EXAMPLES // 20))
COUNTS = Counter()  # {(kind of file, outcome): files}, printed where FUZZ is set


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    if "FUZZ" in os.environ:
        for (name, outcome), n in sorted(COUNTS.items()):
            print(f"{n:7} {name:24} {outcome}")
        print(f"{sum(COUNTS.values()):7} mutated files")


# ---------------------------------------------------------------------------------------- mutations

# A place is an offset from the beginning or the end of the file, or a share of its length.
PLACES = st.integers(0, 400) | st.integers(-100, -1) | st.floats(0, 1)
BYTES = st.binary(min_size=1, max_size=9) | st.sampled_from([
    b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f", bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\n", b"\r", b"(" * 300,
    b"[" * 9000, b"9" * 5000, b"NaN", b"-", b"1e999", b"\xe2\x80\xa8", b"\x1b[2J", b"\xed\xa0\x80"])
BYTE_EDIT = st.one_of(
    st.tuples(st.just("set"), PLACES, BYTES),
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("insert"), PLACES, BYTES),
    st.tuples(st.just("cut"), PLACES),
    st.tuples(st.just("remove"), PLACES, st.integers(1, 300)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 300)),
    st.tuples(st.just("swap"), PLACES, PLACES, st.integers(1, 300)))
BYTE_EDITS = st.lists(BYTE_EDIT, min_size=1, max_size=5)


def mutate(data, edits):
    """Bytes after some edits, each (kind, place, ...)."""
    def locate(place):
        return int(place * len(data)) if isinstance(place, float) else place % (len(data) or 1)

    for kind, place, *values in edits:
        at = locate(place)
        before, after = data[:at], data[at:]
        if kind == "set":
            data = before + values[0] + after[len(values[0]):]
        elif kind == "flip":
            data = before + bytes(byte ^ 1 << values[0] for byte in after[:1]) + after[1:]
        elif kind == "insert":
            data = before + values[0] + after
        elif kind == "cut":
            data = before
        elif kind == "remove":
            data = before + after[values[0]:]
        elif kind == "repeat":
            data = before + after[:values[0]] * 3 + after[values[0]:]
        else:
            low, high = sorted((at, locate(values[0])))
            n = min(values[1], high - low)
            one, other = data[low:low + n], data[high:high + n]
            data = data[:low] + other + data[low + n:high] + one + data[high + n:]
    return data


VALUES = st.sampled_from([
    None, True, False, 0, -1, 1, 7, 1.5, float("nan"), float("inf"), -0.0, 1 << 31, 1 << 63,
    1 << 64, 10 ** 30, -10 ** 4000, "", "a", "7", "../../etc/passwd", "/etc/passwd", "a\0b",
    "\ud800", "\udcff", "\x1b[2J", "\u202e", "\u2028", "<script>", "F64", "BF16", "a" * 20_000,
    [], {}, [[]], [1, 2], {"a": 1}, ["a", "b"], [0, 8], [8, 0], [1 << 40, 1 << 41], [1] * 40,
    {"id": 1}, {"caption": "a"}, "DEEP"])
VALUES |= st.integers() | st.text(max_size=5)
KINDS = st.sampled_from(["replace", "replace", "delete", "repeat", "rename", "copy"])
NUMBERS = st.integers(0, 1 << 30)
JSON_EDITS = st.lists(st.tuples(KINDS, NUMBERS, NUMBERS, VALUES), min_size=1, max_size=4)


def keys_of(value):
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()


def json_places(data):
    """(container, key) of every value inside some JSON."""
    places, open_values = [], [data]
    while open_values:
        container = open_values.pop()
        for key in keys_of(container):
            places.append((container, key))
            open_values.append(container[key])
    return places


def mutate_json(data, edits):
    """The bytes of some JSON after edits: (kind, number of a value, of another, a new value)."""
    box = [copy.deepcopy(data)]
    for kind, number, other, value in edits:
        places = json_places(box)
        container, key = places[number % len(places)]
        source, source_key = places[other % len(places)]
        if kind == "replace":
            container[key] = copy.deepcopy(value)
        elif kind == "copy":
            container[key] = copy.deepcopy(source[source_key])
        elif kind == "delete" and container is not box:
            del container[key]
        elif kind == "repeat" and isinstance(container, list) and container is not box:
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == "rename" and isinstance(container, dict):
            container[str(value)] = container.pop(key)
    return json.dumps(box[0]).replace('"DEEP"', DEEP).encode()


def outcome(name, path, content, read, error=InputError):
    """Writes bytes to a path, reads them within the limits, and counts the outcome."""
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


ENTRIES = ["a dog", "grass", "naïve café", "", "\u202eodd\x00", "penguin", "two red cats",
           "x" * 100]
DIM = 8


def made_cache(folder):
    """Writes a cache. Returns {name: bytes} of its three files."""
    noise = torch.randn(len(ENTRIES), DIM, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(noise, dim=1).numpy()
    write_cache(folder / "c.txt", folder / "c.npy", ENTRIES, rows, "clip@1", "")
    return {name: (folder / name).read_bytes() for name in ("c.txt", "c.npy", "c.npy.json")}


def read_cache(folder):
    """Reads the cache and searches it. Entries, vectors and results must be well-formed."""
    entries, rows = cache_module.read_cache([folder / "c.txt"], [folder / "c.npy"], "clip@1", DIM)
    values = rows[:]
    assert len(entries) == len(rows) == len(values)
    assert values.shape[1] == DIM and values.dtype == torch.float32 and values.isfinite().all()
    assert all(isinstance(entry, str) and "\n" not in entry for entry in entries)
    query = torch.ones(1, DIM)
    scores, indices = cache_module.search(query, rows, 3)
    assert indices.max() < len(entries)
    assert torch.equal((query @ values.T)[0, indices[0]], scores[0])


@pytest.mark.parametrize("name", ["c.txt", "c.npy", "c.npy.json"])
@pytest.mark.parametrize("checked", [True, False], ids=["described", "undescribed"])
def test_a_cache_of_mutated_bytes(folder, name, checked):
    files = made_cache(folder)

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        content = mutate(files[name], edits)
        for other, data in files.items():
            (folder / other).write_bytes(data)
        if not checked and name != "c.npy.json":
            (folder / "c.npy.json").unlink()
        elif name == "c.txt":  # described with the right digest, so that the other checks are tried
            (folder / name).write_bytes(content)
            description = json.loads(files["c.npy.json"])
            description["text_sha256"] = file_sha256(folder / name)
            (folder / "c.npy.json").write_text(json.dumps(description))
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


SIDES = st.integers(-9, 99)
SIDES |= st.sampled_from([1 << 31, 1 << 62, 1 << 64, 10 ** 18, -10 ** 30, True])
DTYPES = ["<f4", ">f4", "<f2", "<f8", "<f16", "|O", "<U3", "|V0", "<c8", "|b1", "<i4", "<M8[s]"]


@fuzz
@given(st.lists(SIDES, max_size=4), st.sampled_from(DTYPES), st.booleans(), st.binary(max_size=600))
def test_a_cache_whose_array_has_any_header(folder, shape, descr, fortran, data):
    made_cache(folder)
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {tuple(shape)}}}\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data
    outcome("cache header", folder / "c.npy", content, lambda _: read_cache(folder))


# ------------------------------------------------------------------------------------ JSON and text

def read_annotations(path):
    pictures = datasets.read_coco(path.parents[1], "val2017", need_images=False)
    by_id = {picture.id: (picture.path, picture.captions) for picture in pictures}
    for listing in (annotations.read_annotations(path), by_id):
        for image_id, (name, texts) in listing.items():
            assert type(image_id) in (int, str) and ".." not in Path(name).parts
            assert all(caption.encode() and len(caption) <= LONGEST_TEXT
                       for caption in texts if caption)
            utils.seed_of(0, image_id)
            os.fsencode(path.parent / name)


def read_data(path):
    """Reads a file of any layout in its folder. Pictures must be well-formed, and inside it."""
    root = str(path.parent)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pictures = datasets.read_split(path.parent, "all", need_images=False)
    assert len({picture.id for picture in pictures}) == len(pictures)
    for picture in pictures:
        assert type(picture.id) in (int, str)
        json.dumps(picture.id).encode()
        assert os.path.normpath(picture.path).startswith(f"{root}{os.sep}")
        os.fsencode(picture.path)
        assert all(text.encode() and len(text) <= LONGEST_TEXT for text in picture.captions)
        if path.suffix == ".tar":
            try:
                images.read_bytes(picture.path)
            except OSError:
                pass


def read_results(path):
    assert all(isinstance(caption, str) for caption, _ in captions.read_captioned(path).values())


def read_captions(path):
    for image, caption in captions.read_captions(path):
        caption.encode()
        json.dumps(image)


def read_records(path):
    """What is left of details.jsonl or its part goes into the results, as it was."""
    records = Records(path.parent, "0")
    done = [row for row, picture in enumerate(PICTURES) if picture.key in records.places]
    assert records.missing(PICTURES) == [row for row in range(len(PICTURES)) if row not in done]
    if path.suffix == ".part":
        assert done == list(range(len(done))) and len(done) % 2 == 0  # whole batches
    if done:
        write_results(path.parent, records, [PICTURES[row] for row in done], 9, as_csv=True)
        lines = (path.parent / "details.jsonl").read_bytes().splitlines()
        assert list(map(json.loads, lines)) == [{**RECORDS[row], "cover": 1, "used": ["dog"]}
                                                for row in done]


PICTURES = [Picture(f"{name}.png", Path(f"{name}.png"), (), name * 64) for name in "abcdef"]
CAPTION = model.Caption("a dog", 0.3, [["dog", 0.3]], [["a dog", 0.3, -1.0]])
RECORDS = [Records(Path("none"), "0").record_of(picture, CAPTION) for picture in PICTURES]
COCO = {
    "info": {"year": 2017},
    "images": [{"id": i, "file_name": f"{i}.png", "width": 9} for i in range(5)],
    "annotations": [{"id": i, "image_id": i % 5, "caption": f"a dog and {i} cats"}
                    for i in range(12)]}
RESULTS = [{"image_id": i, "caption": f"a dog and {i} cats"} for i in range(5)]
TEXT = "a dog\nnaïve café\n\n two  cats \r\n".encode()
KARPATHY = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": f"{i}.jpg", "cocoid": i + 7, "imgid": i, "split": split,
     "sentids": [i], "sentences": [{"raw": f"a dog and {i} cats", "tokens": ["a", "dog"]}] * 2}
    for i, split in enumerate(["train", "restval", "val", "test"])]}
METADATA = [{"file_name": f"d/{i}.jpg", "captions": ["a dog", f"{i} cats"], "width": 8}
            for i in range(6)]
ROWS = [(f"{i}.jpg", j, f'a "dog" and {i} cats , on grass') for i in range(4) for j in range(2)]
TABLES = {
    "results_20130124.token": "".join(f"{name}#{j}\t{text}\n" for name, j, text in ROWS),
    "results.csv": "image_name| comment_number| comment\n" + "".join(
        f"{name}| {j}| {text}\n" for name, j, text in ROWS),
    "captions.txt": "image,caption\n" + "".join(
        f'{name},"a ""dog"" , {j}"\n' for name, j, _ in ROWS),
    "flickr_annotations_30k.csv": "raw,sentids,split,filename,img_id\n" + "".join(
        f'"[""a dog"", ""{i} cats""]","[{i}]",train,{i}.jpg,{i}\n' for i in range(4)),
    "metadata.csv": "file_name,size,description\n" + "".join(
        f"{name},{j},{text}\n" for name, j, text in ROWS)}
INSTANCES = {
    "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
    "annotations": [{"id": i, "image_id": i % 3, "category_id": i % 2, "bbox": [0, 0, 2.5, 2]}
                    for i in range(5)],
    "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "hair drier"}]}


def read_instances(path):
    rows = [Scored(i, "a puppy and a hair dryer", ["a dog"]) for i in range(3)]
    with contextlib.redirect_stderr(io.StringIO()):
        instances = chair.read_instances(path, rows)
    objects = chair.named_and_present(rows, instances)
    chair.chair_scores(chair.object_counts(*zip(*objects.values())))


def read_predictions(path):
    return captions.read_texts(path, "captions file")


def read_words(path):
    return [line.encode() for line in read_lines(path, "list of words")]


# {name: (file; its values, or a text, or None for TEXT; whether there is a line for each, or seal;
# reader)}
DOCUMENTS = {
    "annotations": ("annotations/captions_val2017.json", COCO, False, read_annotations),
    "instances of the scorer": ("instances.json", INSTANCES, False, read_instances),
    "results of the scorer": ("captions.json", RESULTS, False, read_results),
    "captions.json of stories": ("captions.json", RESULTS, False, read_captions),
    "details.jsonl of stories": ("details.jsonl", RECORDS, True, read_captions),
    "details.jsonl": ("details.jsonl", RECORDS, True, read_records),
    "details.jsonl.part": ("details-0.jsonl.part",
                           [[record, 1 - i % 2] for i, record in enumerate(RECORDS)], seal,
                           read_records),
    "captions.txt": ("captions.txt", None, True, read_captions),
    "preds.txt": ("preds.txt", None, True, read_predictions),
    "words.txt": ("words.txt", None, True, read_words),
    "Karpathy's JSON": ("dataset_coco.json", KARPATHY, False, read_data),
    "COCO's JSON as nocaps'": ("nocaps_all_.json", COCO, False, read_data),
    "metadata.jsonl": ("metadata.jsonl", METADATA, True, read_data),
    **{name: (name, text, False, read_data) for name, text in TABLES.items()},
}


def document(values, by_line):
    """The bytes of a document, see DOCUMENTS."""
    if values is None:
        return TEXT
    if isinstance(values, str):
        return values.encode()
    if by_line is seal:
        return b"".join(map(seal, values))
    if by_line:
        return b"".join(json.dumps(record).encode() + b"\n" for record in values)
    return json.dumps(values).encode()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_of_mutated_bytes(tmp_path, name):
    file, values, by_line, read = DOCUMENTS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        outcome(name, tmp_path / file, mutate(document(values, by_line), edits), read)
    run()


VALUED = [name for name, (_, values, _, _) in DOCUMENTS.items() if isinstance(values, (list, dict))]


@pytest.mark.parametrize("name", VALUED)
def test_a_document_of_mutated_values(tmp_path, name):
    file, values, by_line, read = DOCUMENTS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)

    @fuzz
    @given(JSON_EDITS, st.integers(0, 5))
    def run(edits, line):
        if by_line:
            lines = document(values, by_line).splitlines(keepends=True)
            checksum = lines[line][:DIGITS + 1] if by_line is seal else b""  # of the true record
            lines[line] = checksum + mutate_json(values[line], edits) + b"\n"
            content = b"".join(lines)
        else:
            content = mutate_json(values, edits)
        outcome(f"{name}, values", tmp_path / file, content, read)
    run()


# ---------------------------------------------------------------------------------------- tar files

def tar_bytes(format):
    """A tar file of three samples, one of them with a name that is longer than a header's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for key in ("0", "d/1", "x" * 90 if format == tarfile.USTAR_FORMAT else "é" * 90):
            for suffix, data in (("jpg", b"\xff\xd8\xff" * 200), ("txt", b"a dog\ntwo cats"),
                                 ("json", b'{"caption": "a dog", "width": 8}')):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue().rstrip(b"\0") + bytes(1024)


TARS = {"ustar": tar_bytes(tarfile.USTAR_FORMAT), "gnu": tar_bytes(tarfile.GNU_FORMAT),
        "pax": tar_bytes(tarfile.PAX_FORMAT)}


def with_right_header_sums(data):
    """A mutated tar whose blocks that look like headers have the right checksums."""
    blocks = [data[at:at + 512] for at in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[i] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


# What decides: names, sizes, types, lengths of pax records.
FIELDS = st.tuples(st.integers(0, 40), st.sampled_from([0, 100, 124, 125, 135, 156, 345, 482]),
                   BYTES | st.sampled_from([b"L", b"x", b"g", b"S", b"2", b"5", b"K", b"../",
                                            b"/etc/", b"77777777777", b"99999 path=", b"-1"]))


@pytest.mark.parametrize("name", TARS)
def test_a_tar_file_of_mutated_bytes(tmp_path, name):
    @fuzz
    @given(st.lists(BYTE_EDIT, max_size=3), st.lists(FIELDS, max_size=4), st.booleans())
    def run(edits, fields, repaired):
        content = mutate(TARS[name], edits)
        content = mutate(content, [("set", 512 * block + at, value) for block, at, value in fields])
        if repaired:
            content = with_right_header_sums(content)
        outcome(f"tar {name}", tmp_path / "0.tar", content, read_data)
    run()


# -------------------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def captioner():
    return model.Captioner(BART)


def load_checkpoint(captioner):
    def read(path):
        settings = checkpoints.load_checkpoint(path, captioner)
        for name in ("topk", "maxlen_enc", "maxlen_dec"):
            assert type(settings[name]) is int and settings[name] > 0
        assert all(parameter.isfinite().all() for parameter in captioner.model.parameters())
    return read


def openai_weights(vocabulary):
    """Zeros in the shapes of a small CLIP, by OpenAI's names."""
    def tower(prefix):
        shapes = {
            "ln_1.weight": (64,), "ln_1.bias": (64,), "ln_2.weight": (64,), "ln_2.bias": (64,),
            "attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192,),
            "attn.out_proj.weight": (64, 64), "attn.out_proj.bias": (64,),
            "mlp.c_fc.weight": (256, 64), "mlp.c_fc.bias": (256,),
            "mlp.c_proj.weight": (64, 256), "mlp.c_proj.bias": (64,)}
        return {f"{prefix}transformer.resblocks.0.{name}": shape for name, shape in shapes.items()}

    shapes = tower("") | tower("visual.") | {
        "visual.class_embedding": (64,), "visual.positional_embedding": (5, 64),
        "visual.conv1.weight": (64, 3, 16, 16), "visual.ln_pre.weight": (64,),
        "visual.ln_pre.bias": (64,), "visual.ln_post.weight": (64,), "visual.ln_post.bias": (64,),
        "visual.proj": (64, 32), "logit_scale": (), "token_embedding.weight": (vocabulary, 64),
        "positional_embedding": (77, 64), "ln_final.weight": (64,), "ln_final.bias": (64,),
        "text_projection": (64, 32)}
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
    """{name: (file, bytes, reader)} of all files with tensors."""
    folder = tmp_path_factory.mktemp("tensors")
    weights = {f"model.{name}": weight.detach()
               for name, weight in captioner.model.named_parameters()
               if checkpoints.is_layernorm(name)}
    lightning = {"epoch": 5, "state_dict": weights,
                 "hyper_parameters": {"topk": 24, "note": (1, "a")}}
    tokenizer = load_tokenizer(CLIP, "tokenizer")
    trained, optimizer, progress = state_of()
    checkpoints.save_state(folder / "state-0.pt", trained, optimizer, progress)
    keys = [(f"{i:016}", bytes([i] * 32)) for i in range(5)]
    feature_files.write_features(folder / "features.safetensors", torch.eye(8)[:5], keys)

    def read_features(path):
        rows = list(feature_files.whole_rows(path, 8))
        for status, digest, vector in rows:  # those that are whole
            row = digest[0]
            assert (status, digest) == keys[row] and vector.tolist() == torch.eye(8)[row].tolist()
        if len(rows) < 5:  # the others are computed again
            raise InputError("computed again")

    def read_openai(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openai_clip, "load_tokenizer", lambda *_: tokenizer)
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
    def run(edits, inner, only_settings):
        changed = copy.deepcopy(header)
        for key, text in changed.get("__metadata__", {}).items():
            if only_settings:  # they are JSON in a text of the header
                changed["__metadata__"][key] = mutate_json(json.loads(text), inner).decode()
        mutated = json.dumps(changed).encode() if only_settings else mutate_json(changed, edits)
        mutated = struct.pack("<Q", len(mutated)) + mutated + data
        outcome(f"{name}, values", tmp_path / file, mutated, read)
    run()


@pytest.mark.parametrize("name", FILES[2:])
def test_a_zip_with_a_mutated_pickle(tmp_path, torch_files, name):
    """The archive is whole, with the right checksums."""
    file, content, read = torch_files[name]
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}

    @fuzz
    @given(BYTE_EDITS)
    def run(edits):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, data in members.items():
                if member.endswith("/data.pkl"):
                    data = mutate(data, edits)
                archive.writestr(member, data)
        outcome(f"{name}, pickle", tmp_path / file, buffer.getvalue(), read)
    run()


# ---------------------------------------------------------------------------------- model folders

def read_clip(folder):
    clip = model.Clip(str(folder))
    vectors = clip.encode_texts(["a dog", "two red cats"])
    assert vectors.shape == (2, clip.dim) and vectors.isfinite().all()


def read_bart(folder):
    captioner = model.Captioner(str(folder))
    table, = captioner.tokenize(["a dog | grass | "], 16)
    captions, = captioner.beam([table], 2, 2)
    assert all(isinstance(text, str) for text, _ in captions)
    assert all(math.isfinite(likelihood) for _, likelihood in captions)


def read_story_model(folder):
    config, tokenizer, tokens, room = causal_lm.encode(str(folder), ["Once upon a time"])
    lm = causal_lm.load_lm(str(folder), causal_lm.end_tokens(tokenizer, False), "cpu",
                           torch.float32, config)
    [(new, ended)] = causal_lm.sample(lm, tokens, [0], min(3, room[0]))
    assert isinstance(causal_lm.to_text(tokenizer, "Once upon a time", tokens[0], new, ended), str)


FOLDERS = {"CLIP": (CLIP, read_clip), "BART": (BART, read_bart), "GPT": (GPT, read_story_model)}


def model_files(source):
    """{name: bytes} of a model folder, in all the forms in which its parts may come."""
    files = {path.name: path.read_bytes() for path in Path(source).iterdir()}
    vocabulary = json.loads(files["tokenizer.json"])["model"]
    files["vocab.json"] = json.dumps(vocabulary["vocab"]).encode()
    merges = [" ".join(merge) if isinstance(merge, list) else merge
              for merge in vocabulary["merges"]]
    files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode()
    settings = json.loads(files["tokenizer_config.json"])
    special = {key: value for key, value in settings.items() if key.endswith("_token")}
    files["special_tokens_map.json"] = json.dumps(special).encode()
    names = json.loads(files["model.safetensors"][8:8 + struct.unpack(
        "<Q", files["model.safetensors"][:8])[0]])
    shard = "model-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": {name: shard for name in names if name[0] != "_"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def lay_out(folder, files, name):
    """Writes a model folder in the form in which the file `name` is read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for other, data in files.items():
        if name == "model.safetensors.index.json" and other == "model.safetensors":
            other = "model-00001-of-00001.safetensors"
        elif name in ("vocab.json", "merges.txt") and other == "tokenizer.json":
            continue
        (folder / other).write_bytes(data)


SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "vocab.json", "merges.txt", "generation_config.json", "preprocessor_config.json",
         "model.safetensors.index.json")
MODEL_PARTS = [(kind, name) for kind in FOLDERS for name in (*SMALL, "model.safetensors")
               if (name != "preprocessor_config.json" or kind == "CLIP")
               and (name != "generation_config.json" or kind != "CLIP")]
# Numbers, keys and names that a config may hold; the values above seldom hit them.
CONFIG_EDITS = st.lists(st.tuples(st.just("replace"), NUMBERS, NUMBERS, VALUES | st.sampled_from(
    [10 ** 8, 10 ** 9, 1 << 20, 3, 64, 1100, "gpt2", "bart", "clip", "llama", "relu", "float16"])),
    min_size=1, max_size=2)


@pytest.mark.parametrize("kind, name", MODEL_PARTS, ids=lambda value: value)
def test_a_model_folder_with_a_mutated_file(tmp_path, kind, name):
    source, read = FOLDERS[kind]
    files, folder = model_files(source), tmp_path / "model"

    @model_fuzz
    @given(BYTE_EDITS, JSON_EDITS | CONFIG_EDITS, st.integers(0, 7))
    def run(edits, values, by_value):  # mutated bytes are seldom JSON
        content = files[name]
        if name == "model.safetensors":
            length, = struct.unpack("<Q", content[:8])
            header = content[8:8 + length]
            header = mutate_json(json.loads(header), values) if by_value else mutate(header, edits)
            content = struct.pack("<Q", len(header)) + header + content[8 + length:]
        elif by_value and name.endswith(".json"):
            content = mutate_json(json.loads(content), values)
        else:
            content = mutate(content, edits)
        lay_out(folder, files, name)
        outcome(f"{kind}'s {name}", folder / name, content, lambda _: read(folder))
    run()


# ------------------------------------------------------------------------------------------- images

def encoded(format, mode="RGB", **options):
    """The bytes of an image of noise, with an EXIF orientation where the format has one."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(noise).convert(mode)
    if format not in ("BMP", "GIF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    buffer = io.BytesIO()
    if format == "HEIF":
        pillow_heif.from_pillow(image).save(buffer)
    else:
        image.save(buffer, format, **options)
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
    "grey16.tif": encoded("TIFF", "I;16", compression="tiff_lzw"),
    "a.avif": encoded("AVIF"),
    "a.heic": encoded("HEIF"),
}


def with_right_sums(data):
    """A mutated PNG with right checksums of its chunks, so that a reader gets further."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length, = struct.unpack(">I", data[at:at + 4])
        body = data[at + 4:at + 8 + length]
        parts += [data[at:at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(parts)


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
