"""Photos as cameras, phones, scanners and programs write them: the pixels that a viewer shows, or a
name in the list of skipped files."""

import contextlib
import errno
import hashlib
import io
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pillow_heif as heif
import pytest
import torch
from conftest import CLIP, commands
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from antarctic import feature_files, features, images, reads
from antarctic.errors import InputError
from antarctic.folders import IMAGE_SUFFIXES, Picture, list_images
from antarctic.images import read_image
from model import Clip


def shades():
    """A picture whose upper left corner is red and whose right half is blue, 32 x 16."""
    image = Image.new("RGB", (32, 16), "white")
    image.paste("red", (0, 0, 16, 8))
    image.paste("blue", (16, 0, 32, 16))
    return image


def difference(image, expected):
    assert image.mode == "RGB" and image.size == expected.size
    return np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max()


# --------------------------------------------------------------------------------------------- EXIF

ORIENTATION = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
ODD = {  # {name: an entry of EXIF's first directory}
    "negative width": struct.pack("<HHIi", 0x0100, 9, 1, -5),
    "width of a float": struct.pack("<HHIf", 0x0100, 11, 1, 3.5),
    "width of a text": struct.pack("<HHI4s", 0x0100, 2, 4, b"abc"),
    "negative short": struct.pack("<HHIhh", 0x0101, 8, 1, -5, 0),
    "unknown type": struct.pack("<HHII", 0x010E, 99, 1, 7),
    "no values": struct.pack("<HHII", 0x010E, 2, 0, 0),
    "text outside": struct.pack("<HHII", 0x010F, 2, 100, 1 << 30),
    "endless text": struct.pack("<HHII", 0x010F, 2, (1 << 32) - 1, 8),
    "resolution outside": struct.pack("<HHII", 0x011A, 5, 1, 1 << 30),
    "resolution of a text": struct.pack("<HHI4s", 0x011A, 2, 4, b"abc"),
    "EXIF's directory outside": struct.pack("<HHII", 0x8769, 4, 1, (1 << 32) - 1),
    "EXIF's directory of a text": struct.pack("<HHI4s", 0x8769, 2, 4, b"abc"),
    "EXIF's directory before the file": struct.pack("<HHIi", 0x8769, 9, 1, -1),
    "EXIF's directory of the first": struct.pack("<HHII", 0x8769, 4, 1, 8),
    "place of a float": struct.pack("<HHIf", 0x8825, 11, 1, 1.5),
}


def exif_of(*entries):
    entries = sorted(entries, key=lambda entry: struct.unpack("<H", entry[:2]))
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4))


def turned(path, expected=None):
    expected = expected or shades().transpose(Image.Transpose.ROTATE_270)
    return difference(read_image(path), expected) <= 90  # JPEG's, at the edges of colours


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "mpo"])
@pytest.mark.parametrize("name", ODD)
def test_a_photo_is_turned_by_its_orientation_whatever_else_its_exif_holds(tmp_path, name, suffix):
    options = {"exif": exif_of(ODD[name], ORIENTATION), "quality": 95, "lossless": True}
    if suffix == "mpo":
        options |= {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    shades().save(tmp_path / f"a.{suffix}", **options)
    assert turned(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [
    b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0XX*\0\x08\0\0\0", exif_of(ORIENTATION)[:20],
    b"Exif\0\0II*\0\xff\xff\xff\xff", exif_of(ORIENTATION[:8] + struct.pack("<I", 99)),
    exif_of(struct.pack("<HHI4s", 0x0112, 2, 4, b"six")), exif_of(*ODD.values())],
    ids=["empty", "cut head", "no order", "cut entry", "outside", "99", "text", "odd"])
def test_an_exif_that_says_no_turn_or_nothing_that_can_be_read_turns_nothing(tmp_path, exif,
                                                                             suffix):
    shades().save(tmp_path / f"a.{suffix}", exif=exif, quality=95, lossless=True)
    assert turned(tmp_path / f"a.{suffix}", shades())


def test_xmp_turns_where_exif_is_silent(tmp_path):
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    shades().save(tmp_path / "a.png", pnginfo=text)
    assert turned(tmp_path / "a.png")


@pytest.mark.parametrize("mp", [b"", b"MM\0*", b"II*\0" + b"\xff" * 40, exif_of(*ODD.values())[6:]])
def test_a_photo_with_a_broken_table_of_other_pictures_is_read(tmp_path, mp):
    buffer = io.BytesIO()
    shades().save(buffer, "JPEG", quality=95, exif=exif_of(ORIENTATION))
    segment = b"\xff\xe2" + struct.pack(">H", 6 + len(mp)) + b"MPF\0" + mp
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:2] + segment + buffer.getvalue()[2:])
    assert turned(tmp_path / "a.jpg")


def save_heif(image, path, **options):
    heif.from_pillow(image).save(path, quality=-1, chroma=444, **options)


@pytest.mark.parametrize("suffix, save", [("avif", Image.Image.save), ("heic", save_heif)])
def test_containers_that_say_their_turn_are_turned_once(tmp_path, suffix, save):
    """Their EXIF has no say, and may be odd."""
    path = tmp_path / f"a.{suffix}"
    exif = exif_of(struct.pack("<HHII", 0x0100, 4, 1, 0x01020304), ORIENTATION)
    if suffix == "heic":
        image = heif.from_pillow(shades())
        image.info["exif"] = exif
        image.save(path, quality=-1, chroma=444)
    else:
        shades().save(path, exif=exif, quality=100, subsampling="4:4:4")
    assert turned(path)
    content = path.read_bytes()
    entry = struct.pack("<HHII", 0x0100, 4, 1, 0x01020304)
    assert content.count(entry) == 1
    for odd in ODD.values():
        path.write_bytes(content.replace(entry, odd))
        assert turned(path)


# --------------------------------------------------------------------------------------------- TIFF

def tiff(pixels, bits, order="<", white=1, kind=1, packed=None, squeeze=False, tags=()):
    """A TIFF of grey numbers (H, W).

    kind: SampleFormat. white: PhotometricInterpretation. packed: its bytes, where they are not
    those of pixels. tags: more (tag, type, value), one number each.
    """
    height, width = pixels.shape
    data = packed or pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if squeeze else data
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 8 if squeeze else 1),
               (262, 3, white), (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)),
               (339, 3, kind), *tags]
    codes = {3: "H2x", 4: "I", 9: "i", 11: "f", 8: "h2x"}
    directory = b"".join(
        struct.pack(order + "HHI", tag, code, 1) + struct.pack(order + codes[code], value)
        for tag, code, value in sorted(entries))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data))
    return head + data + struct.pack(order + "H", len(entries)) + directory + bytes(4)


def grey(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, -1)


def twelve_bits(values):
    bits = "".join(f"{value:012b}" for value in values.ravel())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


LEVELS = np.array([[0, 1, 100, 173], [254, 255, 127, 128]], np.uint8)
RANGE = {  # {name: (numbers, bits, kind, tags for the range)}
    "int8": (LEVELS.astype(int) - 128, np.int8, 8, 2, [(340, 8, -128), (341, 8, 127)]),
    "int16": (LEVELS.astype(int) * 2 - 200, np.int16, 16, 2, [(340, 8, -200), (341, 8, 310)]),
    "int32": (LEVELS.astype(int) * 999 - 7, np.int32, 32, 2, [(340, 9, -7), (341, 9, 254738)]),
    "float": (LEVELS / 255, np.float32, 32, 3, [(340, 11, 0.0), (341, 11, 1.0)]),
    "wide float": (LEVELS * 10.0, np.float32, 32, 3, [(340, 11, 0.0), (341, 11, 2550.0)]),
}


def written(tmp_path, content, name="a.tif"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits, dtype", [(8, np.uint8), (16, np.uint16), (32, np.uint32)])
def test_grey_of_any_depth_is_the_grey_of_8_bits(tmp_path, bits, dtype, order, white, squeeze):
    pixels = LEVELS.astype(dtype) * (((1 << bits) - 1) // 255)
    path = written(tmp_path, tiff(pixels, bits, order, white, squeeze=squeeze))
    if (bits, order) == (32, ">"):  # Pillow does not read these
        with pytest.raises(OSError, match="32 bits"):
            read_image(path)
        return
    assert np.array_equal(read_image(path), grey(LEVELS if white else 255 - LEVELS))


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("squeeze", [False, True])
def test_12_bits_go_over_their_range(tmp_path, white, squeeze):
    pixels = LEVELS.astype(np.uint16) * 16 + LEVELS // 16
    content = tiff(pixels, 12, white=white, packed=twelve_bits(pixels), squeeze=squeeze)
    image = read_image(written(tmp_path, content))
    assert np.array_equal(image, grey(LEVELS if white else 255 - LEVELS))


def test_16_bits_are_read_alike_in_every_format(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (9, 9)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), grey(pixels >> 8))
    for order in "<>":
        path = written(tmp_path, tiff(pixels, 16, order))
        assert np.array_equal(read_image(path), grey(pixels >> 8))


@pytest.mark.parametrize("name", RANGE)
def test_signed_and_floating_numbers_need_a_range(tmp_path, name):
    values, dtype, bits, kind, tags = RANGE[name]
    pixels = values.astype(dtype)
    path = written(tmp_path, tiff(pixels, bits, kind=kind, tags=tags))
    assert np.array_equal(read_image(path), grey(LEVELS))
    path = written(tmp_path, tiff(pixels, bits, kind=kind))
    with pytest.raises(OSError, match="do not say which are black and white"):
        read_image(path)
    if dtype == np.float32:
        for wrong in (np.nan, -1, 1e9, np.inf):
            pixels[0, 0] = wrong
            with pytest.raises(OSError, match="values outside its range"):
                read_image(written(tmp_path, tiff(pixels, bits, kind=kind, tags=tags)))


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (np.nan, 1.0), (0.0, np.inf)])
def test_a_range_that_is_none_is_refused(tmp_path, low, high):
    content = tiff(LEVELS / np.float32(255), 32, kind=3, tags=[(340, 11, low), (341, 11, high)])
    with pytest.raises(OSError, match="do not say which are black and white"):
        read_image(written(tmp_path, content))


@pytest.mark.parametrize("tag", [(270, 4, 0), (305, 11, 1.5), (282, 9, -5), (34665, 4, 1 << 31),
                                 (34665, 9, -1), (34853, 11, 1.5), (700, 4, 7)])
@pytest.mark.parametrize("squeeze", [False, True])
def test_a_tiff_is_turned_whatever_else_it_holds(tmp_path, tag, squeeze):
    content = tiff(LEVELS, 8, squeeze=squeeze, tags=[(274, 3, 6), tag])
    expected = Image.fromarray(LEVELS).transpose(Image.Transpose.ROTATE_270).convert("RGB")
    assert difference(read_image(written(tmp_path, content)), expected) == 0


@pytest.mark.parametrize("suffix", [".dng", ".nef", ".tif"])
def test_a_cameras_raw_file_is_not_read_as_its_preview(tmp_path, suffix):
    tags = [(50706, 4, 0x0401)] if suffix == ".dng" else [(254, 4, 1), (330, 4, 8)]
    with pytest.raises(OSError, match="raw file"):
        read_image(written(tmp_path, tiff(LEVELS, 8, tags=tags), f"a{suffix}"))


def test_a_palette_of_8_bits_is_read_as_one_of_16(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    expected = [[(255, 0, 0), (0, 255, 0), (10, 20, 30)]]
    path = written(tmp_path, buffer.getvalue())
    assert np.array_equal(read_image(path), expected)
    # Pillow writes the high bytes alone: 255 as 0xFF00.
    wide = np.array([255, 0, 10] + [0] * 253, "<u2") * 256
    at = buffer.getvalue().index(wide[:3].tobytes())
    content = bytearray(buffer.getvalue())
    colours = np.frombuffer(bytes(content[at:at + 3 * 512]), "<u2") // 256
    content[at:at + 3 * 512] = colours.astype("<u2").tobytes()
    assert np.array_equal(read_image(written(tmp_path, bytes(content))), expected)


def test_other_spaces_of_colour_are_read(tmp_path):
    image = shades()
    lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"),
                                    ImageCms.createProfile("LAB"), outputMode="LAB")
    lab.save(tmp_path / "lab.tif")
    assert difference(read_image(tmp_path / "lab.tif"), lab.convert("RGB")) == 0
    for mode, options in {"YCbCr": {}, "CMYK": {"compression": "tiff_lzw"}}.items():
        image.convert(mode).save(tmp_path / f"{mode}.tif", **options)
        assert difference(read_image(tmp_path / f"{mode}.tif"), image) <= 2
    image.convert("YCbCr").save(tmp_path / "a.tif", compression="jpeg", quality=95)
    assert difference(read_image(tmp_path / "a.tif"), image) <= 90


# ------------------------------------------------------------------------------------ transparency

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(row, width, depth, colour, transparent, height=1):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height)
    return b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", header), chunk(b"tRNS", transparent), chunk(b"IDAT", pixels),
        chunk(b"IEND", b"")])


@pytest.mark.parametrize("row, width, depth, colour, transparent, expected", [
    (b"\x40", 2, 1, 0, b"\0\0", [255, 255]), (b"\x40", 2, 1, 0, b"\0\1", [0, 255]),
    (b"\x1b", 4, 2, 0, b"\0\1", [0, 255, 170, 255]),
    (b"\x0b", 2, 4, 0, b"\0\x0b", [0, 255]),
    (b"\x0b\x0c", 2, 8, 0, b"\0\x0b", [255, 12]),
    (b"\x12\x34\x12\x35", 2, 16, 0, b"\x12\x34", [255, 0x12]),
], ids=["black of 1 bit", "white of 1 bit", "2 bits", "4 bits", "8 bits", "16 bits"])
def test_a_transparent_shade_of_any_depth_is_white(tmp_path, row, width, depth, colour,
                                                   transparent, expected):
    path = written(tmp_path, png(row, width, depth, colour, transparent), "a.png")
    assert np.array_equal(read_image(path), grey([expected]))


def test_a_transparent_colour_of_16_bits_is_white(tmp_path):
    row = struct.pack(">6H", 0x1234, 0xABCD, 0xFF00, 0x5678, 0xABCD, 0xFF00)
    path = written(tmp_path, png(row, 2, 16, 2, row[:6]), "a.png")
    assert np.array_equal(read_image(path), [[(255, 255, 255), (0x56, 0xAB, 0xFF)]])


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA", "1", "L", "CMYK", "HSV", "LAB"])
def test_a_picture_in_memory_of_any_mode_is_encoded_as_its_file(mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    if mode in ("LA", "La", "PA"):
        image = image.convert("LA" if mode == "La" else mode)
    rgb = images.to_rgb(image.convert(mode) if mode.endswith(("A", "a")) else
                        image.convert("RGB").convert(mode))
    expected = {"LA": (165,) * 3, "La": (165,) * 3, "RGBA": (255, 127, 127),
                "RGBa": (255, 127, 127), "PA": (255, 127, 127)}
    assert rgb.mode == "RGB"
    if mode in expected:
        assert difference(rgb, Image.new("RGB", (4, 4), expected[mode])) <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_in_memory_of_no_range_is_refused(mode):
    with pytest.raises(OSError, match="do not say which are black and white"):
        images.to_rgb(Image.new(mode, (4, 4), 300))


# ------------------------------------------------------------------------------------------ folders

def test_photos_of_every_suffix_are_read_or_named(script, cache, checkpoint, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.JPG", "b.jfif", "c.jpe"):
        shades().save(photos / name, "JPEG")
    shades().save(photos / "d.AVIF", "AVIF")
    save_heif(shades(), photos / "e.heic")
    shades().save(photos / "misnamed.psd", "WEBP")
    shades().save(photos / "f.jp2", "JPEG2000")
    shades().save(photos / "g.eps", "EPS")
    (photos / "h.CR2").write_bytes(b"II*\0\x10\0\0\0CR\2\0" + bytes(99))
    (photos / "i.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (photos / "notes.txt").write_text("no image")
    result = script("sampler", "--images", photos, "--clip_model", CLIP, "--ckpt", checkpoint,
                    "--textfile", cache.textfile, "--embfile", cache.embfile, "--lm",
                    CLIP.replace("clip", "bart"), "--savedir", tmp_path / "out", "--num_beams", 1,
                    "--num_return_sequences", 1)
    assert result.code == 0, result.err
    captions = json.loads((tmp_path / "out" / "captions.json").read_text())
    names = [caption["image_id"].rpartition("/")[2] for caption in captions]
    assert names == ["a.JPG", "b.jfif", "c.jpe", "d.AVIF", "e.heic", "misnamed.psd"]
    for name in ("f.jp2", "g.eps", "h.CR2", "i.svg"):
        assert f"skipped {photos / name}: " in result.err
    assert "4 images could not be read and were skipped" in result.err


def test_heic_without_its_package_is_skipped_by_the_packages_name(tmp_path, monkeypatch):
    clip, path = Clip(CLIP), tmp_path / "a.heic"
    save_heif(shades(), path)
    with monkeypatch.context() as without:
        for module in (images, features):
            without.setattr(module, "reads_heif", lambda: False)
        _, good, bad = features.image_features(clip, [Picture("a", path)], tmp_path)
        assert not good and "pillow-heif" in bad[0][1]
    # It is encoded once the package is there: the refusal is not kept.
    assert features.image_features(clip, [Picture("a", path)], tmp_path)[2] == []


def test_hidden_images_and_thumbnails_are_passed_over_and_counted(tmp_path, capsys):
    hidden = [".ipynb_checkpoints/a.png", "@eaDir/a.jpg/thumb.jpg", "__MACOSX/._a.png", "._a.jpg",
              ".Trash-1000/files/b.jpg", "sub/.thumbnails/c.JPG", "$RECYCLE.BIN/d.gif"]
    for name in [*hidden, "a.png", "sub/b.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def listed(*paths):
        names = [str(p.path.relative_to(tmp_path)) for p in list_images(paths)]
        return names, capsys.readouterr().err

    names, err = listed(tmp_path)
    assert names == ["a.png", "sub/b.jpg"]
    assert err.count("\n") == 1 and err.startswith(f"warning: {len(hidden)} hidden images")
    names, err = listed(tmp_path / "*.png", tmp_path / "*.jpg", tmp_path / "sub")
    assert names == ["a.png", "sub/b.jpg"] and err.startswith("warning: 2 hidden images")
    for name in hidden:  # what a user names is read
        assert listed(tmp_path / name) == ([name], "")
    assert listed(tmp_path / ".ipynb_checkpoints") == ([hidden[0]], "")
    assert listed(tmp_path / "__MACOSX" / "._*") == ([hidden[2]], "")
    (tmp_path / "a.png").unlink()
    (tmp_path / "sub" / "b.jpg").unlink()
    with pytest.raises(InputError, match="7 hidden ones"):
        list_images([tmp_path])
    with pytest.raises(InputError, match="only hidden images"):
        list_images([tmp_path / "*.jpg"])


def test_suffixes_are_lower_case():
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


# ------------------------------------------------------------------- larger and truncated images

def cut(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("L", "png"), ("P", "png"),
    ("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("RGB", "steps.jpg")])
def test_a_truncated_image_is_read_as_far_as_it_goes(tmp_path, mode, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(64)
    else:
        image = image.convert(mode)
    path = tmp_path / f"a.{suffix}"
    image.save(path, progressive=True) if "steps" in suffix else image.save(path)
    whole = np.asarray(read_image(path), dtype=int)
    assert np.array_equal(read_image(path, truncated=True), whole)
    cut(path, 0.5)
    with pytest.raises(OSError):
        read_image(path)
    half = np.asarray(read_image(path, truncated=True), dtype=int)
    if "steps" not in suffix:
        assert np.array_equal(half[:8], whole[:8])
        assert np.abs(half[-8:] - 128).max() <= (64 if mode in ("P", "CMYK") else 1)
        assert (half[-8:] == half[-1, -1]).all()
    with pytest.raises(OSError):
        read_image(path)  # Pillow is as strict as before


@pytest.mark.parametrize("format", ["WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_other_formats_are_read_whole_or_not_at_all(tmp_path, format):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "a", format)
    assert read_image(tmp_path / "a", truncated=True).size == (64, 64)
    with pytest.raises(OSError):
        read_image(cut(tmp_path / "a", 0.5), truncated=True)


def test_the_limit_of_pixels_can_be_set(tmp_path):
    Image.new("1", (10_000, 9_500)).save(tmp_path / "a.png")  # more than Pillow's own limit
    Image.new("1", (10_000, 9_500)).save(tmp_path / "a.tif", compression="group4")
    limit = Image.MAX_IMAGE_PIXELS
    for name in ("a.png", "a.tif"):
        with pytest.raises(OSError, match="more than 64 million pixels"):
            read_image(tmp_path / name)
        assert read_image(tmp_path / name, max_pixels=95_000_000).size == (10_000, 9_500)
        with pytest.raises(OSError, match="more than 94.9 million pixels"):
            read_image(tmp_path / name, max_pixels=94_900_000)
    assert Image.MAX_IMAGE_PIXELS == limit
    with pytest.raises(OSError, match="more than 0.0001 million"):
        read_image(tmp_path / "a.png", max_pixels=100)


def test_features_are_kept_apart_by_what_is_read(tmp_path):
    clip, path = Clip(CLIP), tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).save(path)
    pictures = [Picture("a", cut(path, 0.7))]
    assert len(features.image_features(clip, pictures, tmp_path)[2]) == 1
    assert features.image_features(clip, pictures, tmp_path, truncated=True)[2] == []
    assert len(features.image_features(clip, pictures, tmp_path, max_pixels=9)[2]) == 1
    assert len(features.image_features(clip, pictures, tmp_path)[2]) == 1  # still


# ------------------------------------------------------------------------- whatever a library does

@pytest.mark.parametrize("error", [
    struct.error("odd"), AttributeError("odd"), RuntimeError("odd"), AssertionError(), LookupError,
    NotImplementedError, RecursionError, ZeroDivisionError, UnicodeDecodeError("a", b"", 0, 0, "b"),
    ImageCms.PyCMSError("odd"), zlib.error("odd")], ids=lambda error: type(error).__name__)
def test_no_error_of_a_library_ends_a_run(tmp_path, monkeypatch, error):
    shades().save(tmp_path / "a.png")
    path = [tmp_path / "a.png"]

    def fail(file):
        raise error

    clip = type("Clip", (), {"dim": 4})
    monkeypatch.setattr(images, "to_rgb", fail)
    *_, bad = features.encode_files(clip, path, 4, tqdm(disable=True))
    reason, may_pass = bad[0]
    assert reason.startswith("the image is damaged: ") and reason.strip()[-1] != ":"
    assert not may_pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_no_fault_of_the_image_is_not_laid_on_it(tmp_path, monkeypatch, error):
    shades().save(tmp_path / "a.png")

    def fail(file):
        raise error

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(error):
        read_image(tmp_path / "a.png")


# ------------------------------------------------------------------------- errors of the disk

@pytest.fixture
def broken(monkeypatch):
    """broken({name: error number}, times) lets so many readings of files of these names fail: every
    second one as the file is opened, the others in its middle. Pauses are none."""
    def put(errors, times=1000):
        left = dict.fromkeys(errors, times)

        @contextlib.contextmanager
        def opened(path):
            name = os.path.basename(path)
            with open_regular(path) as file:
                broken, error = left.get(name, 0), errors.get(name, 0)
                left[name] = broken - 1

                def read(size):
                    if broken > 0:
                        raise OSError(error, os.strerror(error))
                    return file.read(size)

                if broken > 0 and broken % 2:
                    raise OSError(error, os.strerror(error))
                yield SimpleNamespace(fileno=file.fileno, read=read)

        monkeypatch.setattr(reads, "open_regular", opened)

    open_regular = reads.open_regular
    monkeypatch.setattr(reads, "PAUSES", (0, 0, 0))
    return put


PASSING = [errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE,
           errno.ENOMEM, errno.ETIMEDOUT, errno.ENETDOWN]


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_a_passing_read_error_is_tried_again(tmp_path, broken, number):
    shades().save(tmp_path / "a.png")
    before = read_image(tmp_path / "a.png").tobytes()
    broken({"a.png": number}, times=3)
    assert read_image(tmp_path / "a.png").tobytes() == before
    broken({"a.png": number})
    with pytest.raises(OSError) as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.errno == number and reads.passes(caught.value)
    assert images.is_image(tmp_path / "a.png")  # it may be one: nothing is written over it


def test_what_the_bytes_prove_does_not_pass(tmp_path):
    shades().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png", "gone.png", ".", "gone/a.png", "text.png/a.png", 300 * "a"):
        with pytest.raises(OSError) as caught:
            read_image(tmp_path / name)
        assert not reads.passes(caught.value), name


def test_pauses_end_with_the_patience_of_the_run(monkeypatch):
    slept, calls = [], []
    monkeypatch.setattr(reads.time, "sleep", slept.append)
    monkeypatch.setattr(reads.Patience, "left", 5.0)

    def fail():
        calls.append(0)
        raise OSError(errno.EIO, "")

    for _ in range(100):
        with pytest.raises(OSError):
            reads.persistent(fail)
    assert sum(slept) <= 5 and len(calls) == 100 + len(slept)


def test_an_image_that_cannot_be_read_now_is_left_out_named_and_captioned_later(
        command, broken, tmp_path):
    """Its run ends with an error, and the next run's results are those of a run without a fault."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(photos / f"{i}.png")
    (photos / "3.png").write_text("no picture")
    assert command("sampler", datadir=None, images=photos, savedir=tmp_path / "whole").code == 0
    broken({"1.png": errno.EACCES})
    result = command("sampler", datadir=None, images=photos)
    last = result.err.splitlines()[-1]
    assert result.code == 2 and last.startswith("error: 1 image, such as ")
    assert str(photos / "1.png") in last and os.strerror(errno.EACCES) in last
    assert f"skipped {photos / '3.png'}: " in result.err  # damaged, and told of apart
    assert "skipped" not in last and f"skipped {photos / '1.png'}" not in result.err
    out = tmp_path / "out"
    assert len((out / "preds.txt").read_text().splitlines()) == 2
    broken({})
    assert command("sampler", datadir=None, images=photos).code == 0
    for name in ("preds.txt", "captions.json", "details.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_no_training_leaves_out_an_image_that_cannot_be_read_now(
        command, broken, world, tmp_path, split):
    path = sorted((world / split).iterdir())[1]
    broken({path.name: errno.EIO})
    result = command("trainer", max_bad=1, tmax=2)
    assert result.code == 2 and str(path) in result.err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*st.safetensors"))
    broken({path.name: errno.EIO}, times=2)
    assert command("trainer", tmax=2).code == 0
    assert command("trainer", tmax=2, savedir=tmp_path / "whole").code == 0
    for name in ("best.safetensors", "loss.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "whole" / name).read_bytes()


def test_an_image_that_needs_too_much_memory_ends_the_run_by_name(tmp_path, monkeypatch):
    shades().save(tmp_path / "a.png")

    def fail(file):
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(InputError, match=r"not enough memory .*a\.png"):
        features.encode_files(None, [tmp_path / "a.png"], 4, tqdm(disable=True))


@pytest.fixture
def command(script, world, cache, checkpoint, tmp_path):
    """command(name, option=value, ...) runs a script in the small world, see conftest.commands."""
    arguments = commands(world, cache, checkpoint, trainer={"topk": 24, "epochs": 1})
    return lambda name, **options: script(name, *arguments[name](tmp_path / "out", **options))


def test_an_image_that_changes_while_it_is_read_is_known_by_what_was_read(tmp_path, monkeypatch):
    """The digest that a vector is kept under is that of the picture that was encoded."""
    path = tmp_path / "a.png"
    shades().save(path)
    first = path.read_bytes()
    seen = []

    def read(content, **reading):
        path.write_bytes(b"another image")  # before it is decoded
        seen.append(content)
        return read_image(content, **reading)

    class CountingClip:
        prepare = staticmethod(np.asarray)

        def encode_images(self, images):
            return torch.ones(len(images), 2)

    monkeypatch.setattr(features, "read_image", read)
    [digest], vectors, bad = features.encode_files(CountingClip(), [path], 4, tqdm(disable=True))
    assert seen == [first] and not bad
    assert digest == hashlib.sha256(first).digest() and list(vectors) == [digest]


@pytest.mark.parametrize("damage", ["a bit", "cut"])
def test_damaged_vectors_are_told_of_and_made_again(tmp_path, capsys, damage):
    folder = tmp_path / "vectors"
    folder.mkdir()
    keys = [(f"{i:016x}", bytes([i]) * 32) for i in range(5)]
    path = folder / "features-0-a.safetensors"
    feature_files.write_features(path, torch.eye(8)[:5], keys)
    statuses = [status for status, _ in keys]
    assert feature_files.Store(folder, "0", statuses, 8).missing()[0] == []
    content = bytearray(path.read_bytes())
    content[content.index(torch.eye(8)[0].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content if damage == "a bit" else content[:-300])
    capsys.readouterr()
    store = feature_files.Store(folder, "0", statuses, 8)
    rows, known, _ = store.missing()
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and str(path) in err
    assert {"a bit": "1 image vector in", "cut": "cut off"}[damage] in err
    assert rows == {"a bit": [0], "cut": [0, 1, 2, 3, 4]}[damage]
    assert all(torch.tensor(store.vectors[row]).equal(torch.eye(8)[row])
               for row in set(range(5)) - set(rows))
    assert known == {keys[row][1] for row in set(range(5)) - set(rows)}
