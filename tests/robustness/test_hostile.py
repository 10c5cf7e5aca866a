"""Files made to do harm: each gives a correct result or one clear error, in 10 seconds and a GB of
memory."""

import contextlib
import html.parser
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BART, GPT, commands
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import model
from antarctic import cache as cache_module
from antarctic import (
    cache_files,
    checkpoints,
    errors,
    feature_files,
    features,
    openai_clip,
    pickles,
    texts,
)
from antarctic.annotations import read_annotations
from antarctic.captions import read_captioned, read_captions, read_texts
from antarctic.checkpoints import checkpoint_settings, load_checkpoint
from antarctic.datasets import read_coco
from antarctic.errors import InputError
from antarctic.folders import list_images
from antarctic.gallery import thumbnail, write_gallery
from antarctic.images import read_image
from antarctic.sealed import checksum, read_sealed, resume, seal
from model import Captioner

# Writing 5 to this file sets the process's peak of memory to its present size.
CLEAR = "/proc/self/clear_refs"


class Hang(BaseException):
    """Raised where a reader takes too long. It is no Exception, so that no reader catches it."""


def memory(field):
    """The memory of this process in MB: VmRSS is the present one, VmHWM the peak."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) >> 10


@contextlib.contextmanager
def bounded(seconds=10, megabytes=1024):
    """Bounds the body's processor time and, on Linux, the memory that it adds to the process.

    It may take three times as long by the clock, since it may wait or the machine may be busy.
    """
    def hang(*_):
        raise Hang(f"more than {3 * seconds} s")

    measured = os.access(CLEAR, os.W_OK)
    if measured:
        Path(CLEAR).write_text("5")
        before = memory("VmRSS")
    old = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
    start = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert time.process_time() - start < seconds
    if measured:
        assert memory("VmHWM") - before < megabytes


def test_what_hangs_or_grows_is_noticed():
    with pytest.raises(Hang), bounded(seconds=0.1):
        while True:
            pass
    if os.access(CLEAR, os.W_OK):
        with pytest.raises(AssertionError), bounded(megabytes=50):
            np.ones(100 << 20, np.uint8)


def refusal(read, *arguments):
    """The message with which a reader refuses, within the limits."""
    with bounded(), pytest.raises(InputError) as error:
        read(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


# --------------------------------------------------------------------------------------- the images

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *more, depth=8, colour=2, rows=0, row=b""):
    """A PNG that repeats a row, with more chunks before its pixels."""
    squeeze = zlib.compressobj(1)
    data = b"".join([squeeze.compress(row) for _ in range(rows)] + [squeeze.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    chunks = [header, *more, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def black(width, height, channels=1):
    return png(width, height, colour={1: 0, 3: 2, 4: 6}[channels], rows=height,
               row=bytes(1 + width * channels))


def gif(width, height, left=0):
    frame = b"," + struct.pack("<HHHHB", left, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b";"


def tiff(width, height, strip_rows=None):
    """A grey TIFF of one strip that holds a byte."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, strip_rows or height), (279, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 10) + b"\0\0" + struct.pack("<H", len(tags))
    return header + entries + bytes(4)


def webp(width, height):
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size
    packed_size = struct.pack("<I", (width - 1) | (height - 1) << 14)
    bits = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + packed_size + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(extended + bits)) + b"WEBP" + extended + bits


def bmp(width, height):
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def jpeg(width, height):
    size = struct.pack(">HH", height, width)
    return b"\xff\xd8\xff\xc0\0\x0b\x08" + size + b"\x01\x01\x11\0\xff\xd9"


def png_with(kind, data):
    """A small PNG with one more chunk."""
    return png(8, 8, chunk(kind, data), rows=8, row=bytes(25))


TEXT_CHUNK = zlib.compress(bytes(1 << 28))
GHOSTSCRIPT = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
               b"(/etc/passwd) (r) file\n%%EOF\n")
XBM = b"#define a_width 99999\n#define a_height 99999\nstatic char a_bits[] = {\n0x00};\n"
HOSTILE = {  # {name: function that makes its bytes}
    "inflates.png": lambda: png(1000, 1000, rows=1000, row=bytes(1 << 19)),
    "fifty_thousand_claimed.png": lambda: png(50_000, 50_000),
    "gigapixels.png": lambda: png((1 << 31) - 1, (1 << 31) - 1),
    "just_under_pillows_limit.png": lambda: png(9_400, 9_400),
    "gigapixels.gif": lambda: gif(65535, 65535),
    "gigapixels.tif": lambda: tiff(1 << 20, 1 << 20),
    "no_rows_of_their_own.tif": lambda: tiff(1000, 1000, (1 << 32) - 1),
    "gigapixels.webp": lambda: webp(16383, 16383),
    "gigapixels.bmp": lambda: bmp((1 << 31) - 1, -(1 << 31)),
    "gigapixels.jpg": lambda: jpeg(65535, 65535),
    "long.png": lambda: black(60_000, 1, 3),
    "high.png": lambda: black(1, 60_000, 3),
    "postscript.jpg": lambda: GHOSTSCRIPT,
    "page.png": lambda: b"<html><script>alert(1)</script></html>",
    "picture.gif": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "xbm.bmp": lambda: XBM,
    "text_bomb.png": lambda: png_with(b"zTXt", b"a\0\0" + TEXT_CHUNK),
    "unicode_text_bomb.png": lambda: png_with(b"iTXt", b"a\0\1\0\0\0" + TEXT_CHUNK),
    "profile_bomb.png": lambda: png_with(b"iCCP", b"a\0\0" + TEXT_CHUNK),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_refused_by_its_header(tmp_path, monkeypatch, name):
    """Bombs may also be read at the size of their header: Pillow skips chunks that unpack to more
    than a MB."""
    monkeypatch.setenv("PATH", "")  # a reader that looks for Ghostscript does not find it
    (tmp_path / name).write_bytes(HOSTILE[name]())
    with bounded(megabytes=300):
        try:
            assert read_image(tmp_path / name).width < 2000
            assert "bomb" in name or "inflates" in name
        except OSError as error:
            reasons = ("damaged", "too large", "identify")
            assert "gigapixels" not in name or any(reason in str(error) for reason in reasons)


@pytest.mark.parametrize("name", ["long.png", "high.png"])
def test_an_image_like_a_thread_says_so(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name]())
    with pytest.raises(OSError, match="too long for its width: (60000 x 1|1 x 60000) pixels"):
        read_image(tmp_path / name)


def test_a_real_image_of_fifty_thousand_by_fifty_thousand_is_refused_at_once(tmp_path):
    content = png(50_000, 50_000, depth=1, colour=0, rows=50_000, row=bytes(1 + 6250))
    (tmp_path / "huge.png").write_bytes(content)
    with bounded(seconds=1, megabytes=20):
        with pytest.raises(OSError, match="too large: more than 64 million pixels"):
            read_image(tmp_path / "huge.png")


def test_the_largest_image_is_read_in_a_gigabyte(tmp_path):
    (tmp_path / "large.png").write_bytes(black(8000, 8000, 4))  # transparent: it needs all steps
    with bounded():
        assert read_image(tmp_path / "large.png").size == (8000, 8000)


def test_a_batch_of_large_images_is_encoded_in_a_gigabyte(tmp_path):
    """A batch ends at a number of pixels, even where it should have more images."""
    class CountingClip:
        dim, batches, prepare = 2, [], staticmethod(lambda image: image.size)

        def encode_images(self, images):
            self.batches.append(len(images))
            return torch.ones(len(images), 2)

    clip, paths = CountingClip(), [tmp_path / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_bytes(black(4000, 3000) + bytes([i]))
    with bounded(megabytes=400):
        digests, vectors, bad = features.encode_files(clip, paths, 64, tqdm(disable=True))
    assert len(set(digests)) == len(vectors) == 10 and not bad and clip.batches == [3, 3, 3, 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16"])
def test_strips_are_read_as_the_whole_image(tmp_path, mode, orientation):
    """An image higher than a strip, turned and transparent, equals the one that Pillow's own
    operations give in one piece."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 170, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 256)
    else:
        image = Image.fromarray(noise).convert("RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise[:, :, 3]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"transparency": 7} if mode in ("P", "I;16") else {}
    image.save(tmp_path / "a.png", exif=exif, **options)
    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270",
             "TRANSVERSE", "ROTATE_90")
    with Image.open(tmp_path / "a.png") as plain:
        if mode == "I;16":
            shades = np.asarray(plain)
            plain = Image.fromarray(np.where(shades == 7, 255, shades >> 8).astype(np.uint8))
        else:
            white = Image.new("RGBA", plain.size, "white")
            plain = Image.alpha_composite(white, plain.convert("RGBA"))
        plain = plain.convert("RGB")
    if orientation > 1:
        plain = plain.transpose(Image.Transpose[turns[orientation - 2]])
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(plain))


# -------------------------------------------------------------------------------- files and folders

@pytest.fixture
def photos(tmp_path):
    """A folder with one image, next to a folder with a secret one."""
    for name in ("photos", "elsewhere"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "elsewhere" / "secret.png")
    return tmp_path / "photos"


def names(paths):
    return [picture.path.name for picture in list_images(paths)]


def test_links_out_of_a_folder_are_not_followed_but_told(photos, capsys):
    (photos / "inside.png").symlink_to("a.png")
    assert names([photos]) == ["a.png", "inside.png"] and not capsys.readouterr().err
    (photos / "out.png").symlink_to(photos.parent / "elsewhere" / "secret.png")
    (photos / "relative.png").symlink_to("../elsewhere/secret.png")
    (photos / "folder").symlink_to("../elsewhere")
    assert names([photos]) == ["a.png", "inside.png"]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: 3 links, such as {photos / 'folder'}, lead out of the folder {photos}")
    # A user who names a link means it.
    assert names([photos / "out.png"]) == names([photos / "o*.png"]) == ["out.png"]
    assert names([photos / "folder"]) == ["secret.png"]
    (photos / "a.png").unlink()
    (photos / "inside.png").unlink()
    assert "lead out of the folder" in refusal(list_images, [photos])


def test_a_folder_that_is_itself_a_link_is_walked(photos):
    (photos.parent / "link").symlink_to(photos)
    assert names([photos.parent / "link"]) == ["a.png"]


def test_links_in_circles_end(photos):
    """Two links lead to the folder itself: a walk that followed them would take 2 ** 40 ways."""
    (photos / "one").symlink_to(".")
    (photos / "two").symlink_to(".")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "gone.png").symlink_to("nothing.png")
    with bounded(seconds=2):
        assert names([photos]) == ["a.png", "gone.png", "loop.png"]
        assert names([photos / "**" / "*.png"]) == ["a.png", "gone.png", "loop.png"]
    for name in ("gone.png", "loop.png"):
        with pytest.raises(OSError):
            read_image(photos / name)


@pytest.mark.parametrize("special", ["pipe", "socket", "zeros", "folder"])
def test_what_is_no_file_is_skipped_and_keeps_nobody_waiting(photos, special, monkeypatch):
    path = photos / "special.png"
    if special == "pipe":
        os.mkfifo(path)
    elif special == "socket":
        monkeypatch.chdir(photos)  # the path of a socket must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif special == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with bounded(seconds=2):
        # Of the others, one leads out of the folder and one is a folder.
        assert ("special.png" in names([photos])) == (special in ("pipe", "socket"))
        with pytest.raises(OSError, match="no regular file"):
            read_image(path)
        if special != "folder":
            assert names([path]) == ["special.png"]
            message = refusal(read_captions, path)
            assert message == f"there is no captions file at {path}: it is no regular file"


def test_a_file_that_says_it_has_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "a.webp", "wb") as file:
        file.write(webp(16, 16))
        file.truncate(1 << 40)
    with bounded(megabytes=20), pytest.raises(OSError, match="too large"):
        read_image(tmp_path / "a.webp")


# -------------------------------------------------------------------------------------- annotations

def annotations(folder, images=({"id": 1, "file_name": "a.png"},),
                captions=({"image_id": 1, "caption": "a dog"},)):
    """Writes an annotation file. Returns its path."""
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


@pytest.mark.parametrize("name", [
    "../../etc/passwd", "/etc/passwd", "a/../../b.png", "..", "//etc/passwd", "a\0.png",
    "sub/../a.png", "\x1b[2J/../a.png"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused_by_name(tmp_path, name):
    """A caption file with such a name was made to expose a file of this computer, so the whole file
    is refused."""
    path = annotations(tmp_path, [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": name}])
    message = refusal(read_annotations, path)
    assert message == refusal(read_coco, tmp_path, "val2017", False)
    assert "is no path inside the folder of images" in message
    assert errors.escape_control(repr(name)) in message


def test_an_ordinary_file_name_may_hold_dots_and_folders(tmp_path):
    ordinary = ["a..b.png", "sub/c.png", "...", "<b>.png"]
    path = annotations(tmp_path, [{"id": i, "file_name": name} for i, name in enumerate(ordinary)])
    assert [name for name, _ in read_annotations(path).values()] == ordinary


@pytest.mark.parametrize("images, named", [
    ([{"id": 7, "file_name": "a.png"}] * 2, "lists the image 7 twice"),
    ([{"id": "7\n", "file_name": "a.png"}] * 2, "lists the image '7\\n' twice"),
    ([{"id": float("nan"), "file_name": "a.png"}], "nan is no image id"),
    ([{"id": float("inf"), "file_name": "a.png"}], "inf is no image id"),
    ([{"id": True, "file_name": "a.png"}], "True is no image id"),
    ([{"id": [1], "file_name": "a.png"}], "is no image id"),
    ([{"id": 1, "file_name": 5}], "not a COCO caption file"),
    ([{"id": 1, "file_name": None}], "not a COCO caption file"),
    ([{"id": 1, "file_name": "\ud800.png"}], "not a COCO caption file"),
    ([{"id": "\udc80", "file_name": "a.png"}], "not a COCO caption file"),
    ([7], "not a COCO caption file"), ({"id": 1}, "not a COCO caption file"),
], ids=str)
def test_an_image_that_makes_no_sense_is_named(tmp_path, images, named):
    assert named in refusal(read_annotations, annotations(tmp_path, images))


def test_what_nobody_asks_for_may_be_anything(tmp_path):
    images = [{"id": 10 ** 4000, "file_name": "a.png", "width": float("nan"), "height": -1},
              {"id": -1, "file_name": "b.png"}]
    captions = [{"image_id": -1, "caption": "a \ud800 dog\x00", "id": float("inf")},
                {"image_id": None, "caption": "of nothing"}]
    path = annotations(tmp_path, images, captions)
    assert read_annotations(path) == {10 ** 4000: ("a.png", []), -1: ("b.png", ["a ? dog\0"])}


DEEP = "[" * 100_000 + "]" * 100_000
JSON_READERS = {
    "annotations": read_annotations,
    "results": read_captioned,
    "stories": read_captions,
    "description": lambda path: cache_files.cache_description(path.with_suffix("")),
}


@pytest.mark.parametrize("read", JSON_READERS.values(), ids=JSON_READERS)
@pytest.mark.parametrize("text", [
    DEEP, '{"images": ' + DEEP + ', "annotations": []}', '{"a":' * 100_000, "9" * 5000, "NaN",
    "-Infinity", "null", "[null]", "[[]]", '"' + "a" * 100_000 + '"', "[" + "9" * 5000 + "]",
    '[{"image_id": [], "caption": "a"}]', '{"clip_model": 1}', "\0" * 1000, "\ufeff"],
    ids=lambda text: f"{text[:12]}... {len(text)}")
def test_json_that_is_something_else_is_refused(tmp_path, read, text):
    path = tmp_path / "a.npy.json"
    path.write_text(text, encoding="utf-8")
    assert str(path) in refusal(read, path)


# -------------------------------------------------------------------------------------------- texts

LONG = "a" * 10_000_000
TEXT_READERS = {
    "list of words": lambda path: texts.read_lines(path, "list of words"),
    "predictions": lambda path: read_texts(path, "captions file"),
    "captions": read_captions,
    "cache": lambda path: cache_module.read_one_cache(path, path, "clip"),
}


@pytest.mark.parametrize("read", TEXT_READERS.values(), ids=TEXT_READERS)
def test_a_line_of_ten_megabytes_is_refused(tmp_path, read):
    """A tokenizer takes 17 seconds and 2 GB for such a line."""
    path = tmp_path / "a.txt"
    path.write_text(f"a dog\n{LONG}\n")
    message = refusal(read, path)
    assert "10,000,000 characters" in message and "10,000 are read at most" in message
    assert len(message) < 300


def test_a_caption_of_ten_megabytes_is_refused(tmp_path):
    path = annotations(tmp_path, captions=[{"image_id": 1, "caption": LONG}])
    assert "10,000,000 characters" in refusal(read_annotations, path)
    path.write_text(json.dumps([{"image_id": 1, "caption": LONG}]))
    for read in (read_captioned, read_captions):
        assert "10,000,000 characters" in refusal(read, path)


def test_a_corpus_may_be_one_line(script, tmp_path):
    """Some corpora are one line. A token of more than 100 characters is not a word."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a red dog " * 100_000 + LONG)
    arguments = commands(None, None, None)["compute_cache"](tmp_path, corpus=corpus)
    with bounded():
        result = script("compute_cache", *arguments)
    assert result.code == 0
    assert (tmp_path / "c.txt").read_text().split("\n")[:3] == ["a", "dog", "red"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_i_of_a_cache_is_row_i_whatever_is_in_it(tmp_path, capsys, end, mark):
    entries = ["a\rb", "c\x00d", "e\u2028f", "g\x85h", "i\x0b\x0c\x1c\x1d\x1e\u2029j", "",
               "\u202ekl\u202c", "\x1b[31mm\x07", "n"]
    (tmp_path / "c.txt").write_bytes((mark + "".join(entry + end for entry in entries)).encode())
    np.save(tmp_path / "c.npy", np.eye(len(entries), dtype=np.float32))
    read, rows = cache_module.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip")
    assert read == entries and torch.equal(rows[:], torch.eye(len(entries)))


# ------------------------------------------------------------------------------- arrays and tensors

def npy(header, version=(1, 0), size=64):
    """An .npy file with any header, and `size` zero bytes of data."""
    header = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + bytes(size)


def described(shape, descr="<f4"):
    """An .npy file whose header says this shape and type."""
    return npy(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n")


ARRAYS = {
    "10^18 rows": described("(1000000000000000000, 8)"),
    "10^30 rows": described(f"({10 ** 30}, 8)"),
    "no columns": described(f"({10 ** 19}, 0)"),
    "negative rows": described("(-2, 8)"),
    "negative columns": described("(2, -8)"),
    "both": described("(-2, -8)"),
    "columns that overflow": described(f"({1 << 62}, 4)"),
    "a truth": described("(True, 99)"),
    "one number": described("()"),
    "no tuple": described("8"),
    "three sides": described("(1, 2, 2)"),
    "text": described("(2, 8)", "<U4"),
    "objects": described("(2, 8)", "|O"),
    "nothing wide": described("(2, 8)", "|V0"),
    "a record": described("(2, 8)", [("a", "<f4")]),
    "no type": described("(2, 8)", "<zz"),
    "complex": described("(2, 4)", "<c8"),
    "brackets": npy("(" * 9000),
    "braces": npy("{" * 60_000),
    "minus": npy("-" * 9000 + "1"),
    "a program": npy("__import__('os')"),
    "a string without end": npy("'''"),
    "bytes": npy(bytes(range(256))),
    "a version to come": npy("{}", (9, 9)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_lies_is_refused(tmp_path, name):
    text, array = tmp_path / "c.txt", tmp_path / "c.npy"
    text.write_text("a\nb\n")
    array.write_bytes(ARRAYS[name])
    assert str(array) in refusal(cache_module.read_cache, [text], [array], "clip")


def test_an_array_whose_header_has_four_gigabytes_is_refused(tmp_path):
    with open(tmp_path / "c.npy", "wb") as file:
        file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0))
        file.truncate(5 << 30)
    with bounded(seconds=1, megabytes=20):
        with pytest.raises(InputError, match="not a .npy file of numbers"):
            cache_module.Rows(tmp_path / "c.npy")


SETTINGS = {"lm": "a", "topk": 1, "maxlen_enc": 8, "maxlen_dec": 8}  # of a checkpoint


def safetensors(header, length=None, data=bytes(64)):
    """A safetensors file with any header, which may say another length of itself."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape=(4,), begin=0, end=16, dtype="F32"):
    """The header of a checkpoint with one tensor."""
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]},
            "__metadata__": {"antarctic_captions": json.dumps(SETTINGS)}}


SAFETENSORS = {
    "longer than the file": safetensors(tensor(), 1 << 40),
    "longest": safetensors(tensor(), (1 << 64) - 1),
    "no header": safetensors({}, 0),
    "a number too far": safetensors(tensor((5,), 0, 20), data=bytes(16)),
    "behind the end": safetensors(tensor(begin=1 << 40, end=(1 << 40) + 16)),
    "from behind": safetensors(tensor(begin=16, end=0)),
    "negative": safetensors(tensor((-4,), 0, -16)),
    "sizes that overflow": safetensors(tensor((1 << 33, 1 << 33))),
    "no list": safetensors(tensor(7)),
    "no type": safetensors(tensor(dtype="X9")),
    "deep": safetensors(b'{"a":' * 100_000),
    "deep settings": safetensors({"__metadata__": {"antarctic_captions": DEEP}}),
    "huge number": safetensors({"__metadata__": {"antarctic_captions": "9" * 5000}}),
    "a list": safetensors([]),
    "no text": safetensors({"__metadata__": {"antarctic_captions": 5}}),
    "half": safetensors(tensor())[:60],
}


@pytest.fixture(scope="module")
def captioner():
    return Captioner(BART)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, captioner, name):
    (tmp_path / "a.safetensors").write_bytes(SAFETENSORS[name])
    assert "a.safetensors" in refusal(load_checkpoint, tmp_path / "a.safetensors", captioner)
    with bounded():
        assert list(feature_files.whole_rows(tmp_path / "a.safetensors", 4)) == []


@pytest.mark.parametrize("changes", [
    {"topk": "many"}, {"topk": 0}, {"topk": -1}, {"topk": 1.5}, {"topk": float("nan")},
    {"topk": 10 ** 30}, {"topk": True}, {"topk": None}, {"maxlen_enc": [1]}, {"maxlen_dec": {}},
    {"lm": 5}, {"lm": None}], ids=str)
def test_settings_of_a_checkpoint_are_what_they_should_be(tmp_path, changes):
    path, tensors = tmp_path / "a.safetensors", {"x": torch.zeros(1)}
    save_file(tensors, path, {"antarctic_captions": json.dumps(SETTINGS)})
    assert checkpoint_settings(path) == SETTINGS
    save_file(tensors, path, {"antarctic_captions": json.dumps(SETTINGS | changes)})
    assert "is not a checkpoint" in refusal(checkpoint_settings, path)


@pytest.mark.parametrize("change, reason", [
    (lambda tensors: tensors.popitem(), "does not fit"),
    (lambda tensors: tensors.clear(), "does not fit"),
    (lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "not finite"),
    (lambda tensors: next(iter(tensors.values()))[:1].fill_(float("inf")), "not finite"),
], ids=["one less", "none", "nan", "infinite"])
def test_a_checkpoint_changes_all_layernorms_to_numbers_or_none(
        tmp_path, captioner, change, reason):
    layernorms = captioner.train_only(checkpoints.is_layernorm)
    before = {name: parameter.detach().clone() for name, parameter in layernorms.items()}
    tensors = {name: parameter + 1 for name, parameter in before.items()}
    change(tensors)
    path, settings = tmp_path / "a.safetensors", SETTINGS | {"lm": captioner.identity}
    save_file(tensors, path, {"antarctic_captions": json.dumps(settings)})
    assert reason in refusal(load_checkpoint, path, captioner)
    after = captioner.train_only(checkpoints.is_layernorm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in after.items())


FEATURES = {  # {damage: function of features and keys to the tensors that are saved}
    "others": lambda f, keys: {"other": f},
    "no keys": lambda f, keys: {"features": f},
    "fewer": lambda f, keys: {"features": f[:1], "keys": keys},
    "narrower": lambda f, keys: {"features": f[:, :3].contiguous(), "keys": keys},
    "half": lambda f, keys: {"features": f.half(), "keys": keys},
    "nan": lambda f, keys: {"features": f * float("nan"), "keys": keys},
    "swapped": lambda f, keys: {"features": f.flip(0), "keys": keys},
    "a bit": lambda f, keys: {"features": f * (1 - 2 ** -23), "keys": keys},
    "zeros": lambda f, keys: {"features": f, "keys": keys * 0},
    "short keys": lambda f, keys: {"features": f, "keys": keys[:, 1:].contiguous()},
    "long keys": lambda f, keys: {"features": f, "keys": keys.long()},
    "a number": lambda f, keys: {"features": f, "keys": keys[0, 0]},
    "numbers": lambda f, keys: {"features": f[:, 0].contiguous(), "keys": keys},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_were_changed_are_computed_again(tmp_path, name):
    path, rows = tmp_path / "features.safetensors", torch.eye(4)[:2]
    keys = [(16 * "a", 32 * b"a"), (None, 32 * b"b")]
    feature_files.write_features(path, rows, keys)
    (status, digest, vector), other = list(feature_files.whole_rows(path, 4))
    assert (status, digest) == keys[0] and other[1] == keys[1][1]
    assert torch.equal(torch.stack([*map(torch.tensor, (vector, other[2]))]), rows)
    assert list(feature_files.whole_rows(path, 5)) == []  # of another CLIP
    save_file(FEATURES[name](rows, load_file(path)["keys"]), path)
    assert list(feature_files.whole_rows(path, 4)) == []


# --------------------------------------------------------------------------------- pickles and zips

class Canary:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def write_pickle(path, canary):
    path.write_bytes(pickle.dumps(canary))


def save_npy(path, canary):
    np.save(path, np.array([[canary]], dtype=object))


def save_npz(path, canary):
    np.savez(path, np.array([canary], dtype=object))


def save_torch(path, canary):
    torch.save({"x": canary}, path)


def save_old_torch(path, canary):
    torch.save(canary, path, _use_new_zipfile_serialization=False)


def save_lightning(path, canary):
    torch.save({"state_dict": {}, "x": canary}, path)


def save_state(path, canary):
    torch.save({"trained": canary}, path)


def save_model_folder(path, canary):
    shutil.copy(f"{BART}/config.json", path.parent)
    torch.save(canary, path)


def load_state(path):
    checkpoints.load_state(path, {}, torch.optim.AdamW([torch.zeros(1)]))


PICKLES = {  # {kind of file: (name, function that writes an object into it, reader)}
    "npy of objects": ("c.npy", save_npy, cache_module.Rows),
    "npz of objects": ("c.npz", save_npz, cache_module.Rows),
    "pickle called npy": ("c.npy", write_pickle, cache_module.Rows),
    "pickle called safetensors": ("a.safetensors", write_pickle, checkpoint_settings),
    "pickle called ckpt": ("a.ckpt", write_pickle, checkpoint_settings),
    "old pt": ("a.pt", save_old_torch, openai_clip.read_openai_clip),
    "pt": ("a.pt", save_torch, openai_clip.read_openai_clip),
    "ckpt": ("a.ckpt", save_lightning, checkpoint_settings),
    "CLIP's .pt": ("a.pt", save_torch, lambda path: model.Clip(str(path))),
    "state of the trainer": ("state-1.pt", save_state, load_state),
    "weights in a folder":
        ("pytorch_model.bin", save_model_folder, lambda path: Captioner(str(path.parent))),
}


@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_is_ever_executed(tmp_path, name):
    marker = tmp_path / "marker"
    file, write, read = PICKLES[name]
    write(tmp_path / file, Canary(marker))
    refusal(read, tmp_path / file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Canary(marker)))
    assert marker.exists()


def test_features_that_are_a_pickle_are_computed_again(tmp_path):
    path, marker = tmp_path / "features.safetensors", tmp_path / "marker"
    write_pickle(path, Canary(marker))
    assert list(feature_files.whole_rows(path, 4)) == [] and not marker.exists()


def archive(path, pickled=b"}.", compression=zipfile.ZIP_STORED, **storages):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in storages.items():
            file.writestr(f"archive/data/{name}", data)


STAND_IN = b"cpathlib\nPath\nq\x00"
BOMBS = {  # pickles that would take a long time or much memory, or end the process
    "tuples in tuples as a key": b"}N" + b"\x85" * 300_000 + b"Ns.",
    "pairs in pairs as a key": b"}N" + b"N\x86" * 300_000 + b"Ns.",
    "tensors in tensors as a key":
        b"}" + b"ctorch._utils\n_rebuild_tensor_v2\nq\x00(" * 1000 + b".",
    "16 MB of lists": b"]" * (1 << 24),
    "2 MB of lists": b"]" * ((1 << 21) - 1),
    "2 MB of objects": STAND_IN + b"h\x00)R" * (1 << 18) + b".",
    "a number of megabytes": b"\x8b" + struct.pack("<i", 1 << 20) + b"\xff" * (1 << 20) + b".",
    "a text of 10^18": b"\x8d" + struct.pack("<Q", 10 ** 18) + b"a.",
    "a far memo": b"Nr\xff\xff\xff\x7f.",
    "a decimal number": b"I" + b"9" * 1_000_000 + b"\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_bomb_is_refused(tmp_path, name):
    """Hashing deeply nested tuples overflows the stack of Python 3.11, which ends the process."""
    archive(tmp_path / "a.ckpt", BOMBS[name])
    assert "a.ckpt" in refusal(checkpoint_settings, tmp_path / "a.ckpt")


def test_tuples_in_a_checkpoint_are_read_all_the_same(tmp_path):
    tuples = ((1, 2), (3,), (), (4, 5, 6), (7, 8, 9, 10))
    torch.save({"state_dict": {}, "x": tuples}, tmp_path / "a.ckpt")
    with pickles.torch_file(tmp_path / "a.ckpt") as (content, _):
        assert content["x"] == [[1, 2], [3], [], [4, 5, 6], [7, 8, 9, 10]]
    assert checkpoint_settings(tmp_path / "a.ckpt")["topk"] == 10


def test_a_zip_bomb_is_refused(tmp_path):
    archive(tmp_path / "a.ckpt", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    assert os.path.getsize(tmp_path / "a.ckpt") < 1 << 20
    with bounded(megabytes=50):
        assert "a.ckpt" in refusal(checkpoint_settings, tmp_path / "a.ckpt")


def test_one_storage_is_not_ten_thousand_tensors(tmp_path):
    """16 MB would become 160 GB."""
    names = ["visual.conv1.weight", "text_projection", *map(str, range(9990))]
    torch.save(dict.fromkeys(names, torch.zeros(4 << 20)), tmp_path / "a.pt")
    assert "a.pt" in refusal(openai_clip.read_openai_clip, tmp_path / "a.pt")


# -------------------------------------------------------------------------------------- the gallery

class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] == ["bdi"]:
            self.texts.append(data)


EVIL = [
    "<script>alert(1)</script>",
    "</bdi></span></div><img src=x onerror=alert(1)>",
    "\" onload=\"alert(1)\" x=\"",
    "' onclick='alert(1)",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "<!--",
    "-->",
    "]]>",
    "</title></style><svg onload=alert(1)>",
    "<style>*{}",
    "&lt;b&gt;&#60;i&#62;&amp",
    "<iframe srcdoc='<script>1</script>'>",
    "`${alert(1)}`",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh>",
    "%s%d{0}{record}",
    "\u202egnp.exe",
    "\u2067right\u2066left",
    "\x1b[2Jgone",
    "a\x00b\x08c\rd\x85e\u2028f",
    "data:text/html,<script>1</script>",
    "<plaintext>",
    "<xmp>",
    "<\x00script>",
    "\ud800",
    "<bdi>",
    "</bdi>",
]


def page_of(path, texts):
    """The page of a gallery that has an image with each of the texts, as HTML."""
    cards = [{"image_id": text, "file": str(path), "caption": text, "score": 0.3,
              "table": [[text, 0.3], [text[::-1], 0.2]], "candidates": [[text, 0.3, -1.0]]}
             for text in texts]
    references = [(text,) for text in texts]
    page = path.with_name("gallery.html")
    write_gallery(page, texts[0], [(texts[0], texts[0], cards, references)])
    return page.read_bytes().decode()


def without_texts(elements):
    """The elements without what depends on texts: an image's alternative text, and the class that
    marks entries whose words are in the caption."""
    def plain(name, value):
        return value.replace(" used", "") if name == "class" else value

    return [(tag, {name: plain(name, value) for name, value in attributes.items() if name != "alt"})
            for tag, attributes in elements]


def test_nothing_of_a_users_text_becomes_an_element_or_an_attribute(tmp_path):
    """The page has the elements and attributes of one with plain words, and shows every text
    unchanged."""
    path = tmp_path / "<img src=x onerror=alert(1)> \" onload='1'.png"
    Image.new("RGB", (8, 8), "red").save(path)
    plain = Page(page_of(path, [f"w{i} and" for i in range(len(EVIL))]))
    evil = Page(page_of(path, EVIL))
    assert without_texts(evil.elements) == without_texts(plain.elements)
    alts = [attributes["alt"] for tag, attributes in evil.elements if tag == "img"]
    assert alts == [text.replace("\ud800", "\\ud800") for text in EVIL]
    jpeg = "data:image/jpeg;base64,"
    for _, attributes in evil.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"href", "srcdoc", "action"} & set(attributes)
        assert attributes.get("src", jpeg).startswith(jpeg)
    texts = iter(evil.texts)
    for text in EVIL:
        assert text.replace("\ud800", "\\ud800") in texts


def test_a_policy_forbids_scripts_even_so(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    elements = Page(page_of(tmp_path / "a.png", EVIL)).elements
    policy, = (attributes["content"] for _, attributes in elements
               if attributes.get("http-equiv") == "Content-Security-Policy")
    name = r"'sha256-[\w+/]{43}='"
    assert re.fullmatch(f"default-src 'none'; img-src data:; style-src {name}; script-src {name}; "
                        "base-uri 'none'; form-action 'none'", policy)


def test_an_image_that_has_gone_leaves_its_place_empty(tmp_path):
    assert thumbnail(tmp_path / "gone.png") is None
    page = Page(page_of(tmp_path / "gone.png", ["a dog"]))
    assert page.texts.count("a dog") == 7
    image, = (attributes for tag, attributes in page.elements if tag == "img")
    assert image == {"src": "data:,", "alt": "a dog"}


# ------------------------------------------------------------------------------------- the terminal

def test_no_escape_sequence_of_a_file_reaches_the_terminal(script, cache, checkpoint, photos):
    """The names and texts would clear the screen, change its title or reverse the line."""
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m"
    controls = "\x1b\x07\x9b\u202e"
    sample = commands(None, cache, checkpoint, sampler={"images": photos})["sampler"]
    (photos / f"{evil}.png").write_text("no picture")
    result = script("sampler", *sample(photos.parent / "out"))
    assert result.code == 0 and "skipped" in result.err and "owned" in result.err
    assert set(result.err + result.out).isdisjoint(controls)

    captions = photos / "results.json"
    captions.write_text(json.dumps([{"image_id": 1, "caption": f"a {evil} dog"}]))
    result = script("stories", "--captions", captions, "--lm", GPT, "--max_tokens", 2)
    assert result.code == 0 and "owned" in result.out
    assert set(result.out).isdisjoint(controls)

    textfile, embfile = photos / f"{evil}.txt", photos / f"{evil}.npy"
    textfile.write_text("dog\n")
    embfile.write_text("no numbers")
    result = script("sampler", *sample(photos.parent / "out2", textfile=textfile, embfile=embfile,
                                       ckpt="none"))
    assert result.code == 2 and "owned" in result.err
    assert set(result.err).isdisjoint(controls)


# -------------------------------------------------------------------------------------- the results

RECORD = {"image_id": "a.png", "file": "a.png", "caption": "a dog", "score": 0.3,
          "table": [["dog", 0.3]], "candidates": [["a dog", 0.3, -1.0]]}


@pytest.mark.parametrize("change", [
    {"image_id": "b.png"}, {"file": "/etc/passwd"}, {"caption": 5}, {"caption": None},
    {"score": "0.3"}, {"score": None}, {"score": 10 ** 400}, {"table": None}, {"table": [["dog"]]},
    {"table": [[0.3, "dog"]]}, {"table": {"dog": 0.3}}, {"table": [5]}, {"table": []},
    {"table": {}}, {"candidates": [["a dog", 0.3]]}, {"candidates": [["a dog", "b", "c"]]},
    {"candidates": 5}, {"candidates": [[["a"], 0.3, 0.3]]}], ids=str)
def test_a_stopped_runs_record_that_was_changed_is_written_again(tmp_path, change):
    part = tmp_path / "details-1.jsonl.part"
    second = seal(RECORD | {"image_id": "b.png", "file": "b.png"})
    changed = seal(RECORD)[:17] + seal(RECORD | change)[17:]  # with the checksum of RECORD
    for first, records in ((seal(RECORD), 2), (changed, 0)):
        part.write_bytes(first + second)
        assert resume(part) == records == len(part.read_bytes().splitlines())
        assert len(list(read_sealed(part))) == records


@pytest.mark.parametrize("line", [
    b"\0" * 100, b"", b"\xff\xfe", b"{}", b"[]", b"7", b"NaN", DEEP.encode(),
    json.dumps(RECORD).encode(), seal(RECORD)[:-2],
    seal(RECORD).decode().encode("utf-8-sig")[:-1],
    checksum(DEEP.encode()) + b" " + DEEP.encode()], ids=len)
def test_what_a_crash_left_behind_the_records_is_cut_off(tmp_path, line):
    part = tmp_path / "details-1.jsonl.part"
    part.write_bytes(seal(RECORD) + line + b"\n")
    assert resume(part) == 1 and part.read_bytes() == seal(RECORD)


@pytest.mark.parametrize("text", [
    '[{"image_id": 1, "caption": 5}]', '[{"image_id": 1}]', "[5]", '[["a", "b"]]',
    '{"image_id": 1}', "5", '"text"'])
def test_results_of_wrong_types_are_refused(tmp_path, text):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(text)
    for read, name in ((read_captioned, "a.json"), (read_captions, "a.json"),
                       (read_captions, "a.jsonl")):
        if text != '[["a", "b"]]' or name == "a.json":
            assert name in refusal(read, tmp_path / name)
