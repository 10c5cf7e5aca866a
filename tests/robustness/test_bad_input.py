"""Mistakes of a user: exit code 2 and one sentence on stderr that names the mistake, before any
long work.

Images are the exception: those that can be read are captioned, and the others are named.
"""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BART, CLIP, ROOT, TRAIN, VAL, commands
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from antarctic.errors import counted
from antarctic.images import read_image

SCRIPTS = ("compute_cache", "trainer", "sampler")
READERS = ("trainer", "sampler")  # of caches and images
READ_SPLITS = [("compute_cache", "train2017"), ("trainer", "train2017"), ("trainer", "val2017"),
               ("sampler", "val2017")]
every_script = pytest.mark.parametrize("name", SCRIPTS)
every_reader = pytest.mark.parametrize("name", READERS)


def one_sentence(result, *named):
    """The refusal is the one line on stderr that is no warning, and it holds the texts `named`."""
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert result.code == 2
    assert all(str(text) in lines[0] for text in named), lines[0]


@pytest.fixture
def command(script, world, cache, checkpoint, tmp_path):
    """command(name, option=value, ...) runs a script with arguments that work, and these changes,
    see conftest.commands."""
    arguments = commands(world, cache, checkpoint, trainer={"topk": 24, "epochs": 1, "lrate": None})

    def run(name, **changes):
        return script(name, *arguments[name](tmp_path / "out", **changes))
    return run


@pytest.fixture
def refuse(command, tmp_path):
    """refuse(name, text, ..., option=value, ...): the command is refused by a sentence that holds
    the texts, and leaves no file."""
    def refused(name, *named, **changes):
        result = command(name, **changes)
        one_sentence(result, *named)
        assert "encoding" not in result.err and "training" not in result.err
        assert not list((tmp_path / "out").glob("**/*"))
    return refused


# ----------------------------------------------------------------------------------------- the data

@pytest.fixture
def own_world(world, tmp_path):
    """A copy of the world that a test may damage."""
    return shutil.copytree(world, tmp_path / "world")


@every_script
def test_a_missing_data_folder_is_named(refuse, tmp_path, name):
    refuse(name, tmp_path / "nowhere", datadir=tmp_path / "nowhere")


@pytest.mark.parametrize("name, option", [*((name, "split") for name in SCRIPTS),
                                          ("trainer", "val_split")])
def test_an_unknown_split_is_answered_with_those_that_exist(refuse, world, name, option):
    refuse(name, "tset2017", world, "near, out, train2017, val2017", **{option: "tset2017"})


ANNOTATIONS = {
    "no JSON": lambda text: "image,caption\n",
    "empty": lambda text: "",
    "cut": lambda text: text[:len(text) // 2],
    "no UTF-8": lambda text: text.encode("utf-16"),
    "a list": lambda text: "[1, 2]",
    "no object": lambda text: "7",
    "another shape": lambda text: '{"questions": []}',
    "boxes in place of captions": lambda text: text.replace('"caption"', '"bbox"'),
    "captions that are no text":
        lambda text: text.replace('"caption": "', '"caption": 5, "not": "'),
    "ids of two kinds":
        lambda text: text.replace('"images": [{"id": ', '"images": [{"id": "a", "was": '),
    "no images": lambda text: json.dumps(json.loads(text) | {"images": []}),
}


@pytest.mark.parametrize("name, split", READ_SPLITS)
@pytest.mark.parametrize("damage", ANNOTATIONS.values(), ids=ANNOTATIONS)
def test_an_annotation_file_that_is_not_cocos_is_named(refuse, own_world, damage, name, split):
    path = own_world / "annotations" / f"captions_{split}.json"
    damaged = damage(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    refuse(name, path, datadir=own_world)


@pytest.mark.parametrize("name, split", READ_SPLITS[:3])
def test_a_split_without_captions_is_named(refuse, own_world, name, split):
    path = own_world / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    refuse(name, split, datadir=own_world)


@pytest.mark.parametrize("name, split", READ_SPLITS[1:])
def test_a_missing_image_folder_is_named(refuse, own_world, name, split):
    shutil.rmtree(own_world / split)
    refuse(name, own_world / split, datadir=own_world)


def test_mining_needs_no_images(command, own_world):
    shutil.rmtree(own_world / "train2017")
    assert command("compute_cache", datadir=own_world, topk=2).code == 0


# ---------------------------------------------------------------------------------------- the cache

@pytest.fixture
def own_cache(cache, tmp_path):
    """A copy of the cache that a test may damage: the paths of its text, of its embeddings (rows)
    and of their description (side)."""
    own = SimpleNamespace(text=tmp_path / "own.txt", rows=tmp_path / "own.npy",
                          side=tmp_path / "own.npy.json")
    shutil.copy(cache.textfile, own.text)
    shutil.copy(cache.embfile, own.rows)
    shutil.copy(f"{cache.embfile}.json", own.side)
    return own


def change_rows(change):
    def damage(cache):
        np.save(cache.rows, change(np.load(cache.rows)))
    return damage


def describe(**changes):
    def damage(cache):
        cache.side.write_text(json.dumps(json.loads(cache.side.read_text()) | changes))
    return damage


def with_nan(rows):
    rows[3, 5] = np.nan
    return rows


def save_an_archive(cache):
    rows = np.load(cache.rows)
    with open(cache.rows, "wb") as file:
        np.savez(file, rows)


def empty(cache):
    cache.text.write_text("")
    np.save(cache.rows, np.load(cache.rows)[:0])


def of_another_width(cache):
    cache.side.unlink()
    np.save(cache.rows, np.load(cache.rows)[:, :7])


CACHES = {  # {damage: (function that does it, files that the sentence names)}
    "longer text": (lambda c: c.text.write_text(c.text.read_text() + "penguin\n"), "text rows"),
    "fewer rows": (change_rows(lambda rows: rows[:-1]), "text rows"),
    "another CLIP model": (describe(clip_model="other@0123456789ab"), "rows"),
    "edited text": (lambda c: c.text.write_text("z" + c.text.read_text()[1:]), "text"),
    "a description that is no JSON": (lambda c: c.side.write_text("{"), "side"),
    "a description of something else": (lambda c: c.side.write_text("[]"), "side"),
    "text that is no UTF-8": (lambda c: c.text.write_bytes(b"caf\xe9\n"), "text"),
    "empty": (empty, "text"),
    "no text": (lambda c: c.text.unlink(), "text"),
    "no rows": (lambda c: c.rows.unlink(), "rows"),
    "text for rows": (lambda c: c.rows.write_text("a dog\n"), "rows"),
    "nothing for rows": (lambda c: c.rows.write_bytes(b""), "rows"),
    "rows cut": (lambda c: c.rows.write_bytes(c.rows.read_bytes()[:-10]), "rows"),
    "a pickle": (lambda c: c.rows.write_bytes(pickle.dumps([[1.0]])), "rows"),
    "an archive": (save_an_archive, "rows"),
    "a broken archive": (lambda c: c.rows.write_bytes(b"PK\x03\x04 and no more"), "rows"),
    "an array of objects": (change_rows(lambda rows: rows.astype(object)), "rows"),
    "one dimension": (change_rows(lambda rows: rows[:, 0]), "rows"),
    "words": (change_rows(lambda rows: rows.astype(str)), "rows"),
    "not a number": (change_rows(with_nan), "rows"),
    "another width, undescribed": (of_another_width, "rows"),
}


@every_reader
@pytest.mark.parametrize("damage, named", CACHES.values(), ids=CACHES)
def test_a_cache_that_cannot_be_used_is_named(refuse, own_cache, damage, named, name):
    damage(own_cache)
    refuse(name, *(getattr(own_cache, file) for file in named.split()), textfile=own_cache.text,
           embfile=own_cache.rows)


@every_reader
def test_the_cache_of_another_clip_names_both(refuse, own_cache, name):
    made_with = json.loads(own_cache.side.read_text())["clip_model"]
    describe(clip_model="other@0123456789ab")(own_cache)
    refuse(name, "other@0123456789ab", made_with, textfile=own_cache.text, embfile=own_cache.rows)


@every_reader
def test_caches_go_in_pairs(refuse, cache, own_cache, name):
    refuse(name, "2 --textfile", "1 --embfile", textfile=[cache.textfile, own_cache.text])
    refuse(name, "1 --textfile", "2 --embfile", embfile=[cache.embfile, own_cache.rows])


@every_reader
def test_caches_of_two_widths_do_not_mix(refuse, cache, own_cache, name):
    of_another_width(own_cache)
    refuse(name, own_cache.rows, textfile=[cache.textfile, own_cache.text],
           embfile=[cache.embfile, own_cache.rows])


# --------------------------------------------------------------------------------------- the models

@every_script
def test_a_model_that_does_not_exist_is_named(refuse, tmp_path, name):
    for option in ("clip_model", "lm")[:1 + (name in READERS)]:
        for missing in ("nobody/nothing", "no such model", tmp_path / "nowhere"):
            refuse(name, missing, **{option: missing})


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


MODELS = {  # {damage: function that does it to a model's folder}
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": cut_weights,
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "damaged tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "damaged config": lambda folder: (folder / "config.json").write_text("{"),
    "config of another size":
        lambda folder: change_json(folder / "config.json", d_model=64, projection_dim=64),
    "unknown architecture": lambda folder: change_json(folder / "config.json", model_type="nosuch"),
}


@pytest.mark.parametrize("name, option", [*((name, "clip_model") for name in SCRIPTS),
                                          *((name, "lm") for name in READERS)])
@pytest.mark.parametrize("damage", MODELS.values(), ids=MODELS)
def test_a_folder_without_a_whole_model_is_named(refuse, tmp_path, name, option, damage):
    folder = shutil.copytree({"clip_model": CLIP, "lm": BART}[option], tmp_path / "model")
    damage(folder)
    refuse(name, folder, **{option: folder})


@every_script
def test_a_clip_that_does_not_say_how_it_sees_images_is_named(refuse, tmp_path, name):
    folder = shutil.copytree(CLIP, tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    refuse(name, folder, clip_model=folder)


@every_reader
def test_models_of_the_wrong_kind_are_named(refuse, name):
    refuse(name, BART, clip_model=BART)
    refuse(name, CLIP, lm=CLIP)


def test_a_process_says_no_more_than_the_sentence(tmp_path):
    arguments = commands(None, None, None)["compute_cache"](
        tmp_path, entries=__file__, clip_model="nobody/nothing")
    result = subprocess.run([sys.executable, ROOT / "compute_cache.py", *arguments],
                            capture_output=True, text=True)
    one_sentence(SimpleNamespace(code=result.returncode, err=result.stderr), "nobody/nothing")


def rename_a_tensor(path):
    """Leaves one tensor of a checkpoint, by another name."""
    save_file({"x": load_file(path).popitem()[1]}, path, safe_open(path, "pt").metadata())


def change_settings(**changes):
    def damage(path):
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata()["antarctic_captions"])
        save_file(load_file(path), path, {"antarctic_captions": json.dumps(settings | changes)})
    return damage


CHECKPOINTS = {  # {damage: function that does it}
    "missing": lambda path: path.unlink(),
    "no safetensors": lambda path: path.write_text("no checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "of something else": lambda path: save_file(load_file(path), path),
    "settings of another shape":
        lambda path: save_file(load_file(path), path, {"antarctic_captions": "[]"}),
    "settings that lack some":
        lambda path: save_file(load_file(path), path, {"antarctic_captions": "{}"}),
    "another language model": change_settings(lm="other@0123456789ab"),
    "other tensors": rename_a_tensor,
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_named(refuse, checkpoint, tmp_path, damage):
    path = tmp_path / "own.safetensors"
    shutil.copy(checkpoint, path)
    damage(path)
    refuse("sampler", path, ckpt=path)


def test_the_checkpoint_of_another_language_model_names_both(refuse, checkpoint, tmp_path):
    path = tmp_path / "own.safetensors"
    shutil.copy(checkpoint, path)
    change_settings(lm="other@0123456789ab")(path)
    refuse("sampler", "other@0123456789ab", "bart@", ckpt=path)


# ------------------------------------------------------------------------------------- the settings

SETTINGS = [
    *((name, option, value) for name in SCRIPTS for option in ("topk", "batch_size")
      for value in (0, -1)),
    ("compute_cache", "ncaptions", -1),
    *(("trainer", option, 0) for option in ("epochs", "tmax", "maxlen_enc", "maxlen_dec")),
    ("trainer", "maxlen_enc", 100_000),
    ("trainer", "lrate", -1.0),
    ("trainer", "lrate", "nan"),
    ("trainer", "warmup", -1),
    *(("sampler", option, 0) for option in ("num_beams", "num_return_sequences")),
    *(("sampler", "temperature", value) for value in ("0.0", "-1.0", "nan", "inf")),
    *(("sampler", "top_p", value) for value in ("0.0", "1.5", "nan")),
    ("sampler", "gallery", -1),
    ("sampler", "lm_weight", "nan"),
    ("sampler", "repeat_weight", "inf"),
    ("sampler", "insert_cost", "nan"),
    *((name, "device", "toaster") for name in SCRIPTS),
]


@pytest.mark.parametrize("name, option, value", SETTINGS)
def test_a_setting_that_cannot_work_is_named(refuse, name, option, value):
    refuse(name, option, value, **{option: value})


def test_beam_search_returns_no_more_candidates_than_beams(refuse, command):
    refuse("sampler", 4, 5, "--do_sample", num_beams=4, num_return_sequences=5)
    assert command("sampler", num_beams=4, num_return_sequences=5, do_sample=True).code == 0


@pytest.mark.parametrize("option", ["only", "ban"])
def test_a_word_list_that_cannot_be_used_is_named(refuse, tmp_path, option):
    words = tmp_path / "words.txt"
    refuse("sampler", words, **{option: words})
    words.write_text("\n")
    refuse("sampler", words, **{option: words})
    words.write_bytes(b"\xff\xfe")
    refuse("sampler", words, **{option: words})


def test_only_names_what_no_cache_holds(refuse, tmp_path):
    (tmp_path / "words.txt").write_text("hippogriff\n")
    refuse("sampler", "hippogriff", only=tmp_path / "words.txt")


# -------------------------------------------------------------------------------------- the folders

@pytest.fixture
def blocked(tmp_path):
    """A folder that not even root can make, because its parent is a file."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "folder"


def test_an_output_folder_that_cannot_be_written_is_named(refuse, blocked):
    refuse("compute_cache", blocked, textfile=blocked / "c.txt")
    refuse("compute_cache", blocked, embfile=blocked / "c.npy")
    refuse("trainer", blocked, savedir=blocked)
    refuse("sampler", blocked, savedir=blocked)
    refuse("sampler", blocked, features=blocked)


@pytest.mark.parametrize("option", ["textfile", "embfile"])
def test_a_folder_in_the_place_of_an_output_file_is_named(refuse, tmp_path, option):
    refuse("compute_cache", tmp_path, **{option: tmp_path})


def test_the_two_files_of_a_cache_are_two(refuse, tmp_path):
    refuse("compute_cache", tmp_path / "out" / "same", textfile=tmp_path / "out" / "same",
           embfile=tmp_path / "out" / "same")


# -------------------------------------------------------------------------------------- the sources

def test_compute_cache_has_one_source(refuse, tmp_path):
    sources = "--datadir", "--corpus", "--entries"
    refuse("compute_cache", *sources, datadir=None)
    refuse("compute_cache", *sources, corpus=__file__)
    refuse("compute_cache", *sources, entries=__file__)
    refuse("compute_cache", *sources, datadir=None, corpus=__file__, entries=__file__)


def test_sampler_has_one_source(refuse, world):
    refuse("sampler", "--datadir", "--images", datadir=None)
    refuse("sampler", "--datadir", "--images", images=world / "near")


@pytest.mark.parametrize("option", ["corpus", "entries"])
@pytest.mark.parametrize("content", [
    b"", b"\n \n\n", b"caf\xe9\n", "a dog\n".encode("utf-16"), None],
    ids=["empty", "blank", "latin-1", "utf-16", "missing"])
def test_a_text_without_usable_lines_is_named(refuse, tmp_path, option, content):
    path = tmp_path / "lines.txt"
    if content is not None:
        path.write_bytes(content)
    refuse("compute_cache", path, datadir=None, **{option: path})


def test_a_missing_image_is_named(refuse, world, tmp_path):
    refuse("sampler", tmp_path / "no.png", datadir=None,
           images=[world / "near", tmp_path / "no.png"])


def test_a_folder_without_images_is_named(refuse, world, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    refuse("sampler", tmp_path / "texts", datadir=None, images=[world / "near", tmp_path / "texts"])


# --------------------------------------------------------------------------------------- the images

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def picture(mode, *pixels, width=None):
    """An image of a few pixels, one row unless a width is given."""
    width = width or len(pixels)
    image = Image.new(mode, (width, len(pixels) // width))
    for i, pixel in enumerate(pixels):
        image.putpixel((i % width, i // width), pixel)
    return image


def palette(*colours):
    image = picture("P", *range(len(colours)))
    image.putpalette([value for colour in colours for value in colour])
    return image


def sixteen_bits(*values, dtype=np.uint16):
    return Image.fromarray(np.array([values], dtype=dtype))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def solid(mode, colour):
    return Image.new(mode, (32, 24), colour)


IMAGES = {  # {file name: (image, options of save(), rows of RGB pixels that are read)}
    "rgb.png": (picture("RGB", RED, BLUE), {}, [[RED, BLUE]]),
    "one.png": (picture("RGB", GREEN), {}, [[GREEN]]),
    "flat.png": (picture("RGB", *[RED, BLUE] * 60), {}, [[RED, BLUE] * 60]),
    "three_rows.png": (picture("RGB", *[RED] * 120, width=40), {}, [[RED] * 40] * 3),
    "thin.png": (picture("RGB", *[RED, BLUE] * 60, width=1), {}, [[RED], [BLUE]] * 60),
    "clear.png": (picture("RGBA", (255, 0, 0, 0), (0, 0, 255, 255), (0, 0, 0, 51)), {},
                  [[WHITE, BLUE, (204, 204, 204)]]),
    "clear_grey.png": (picture("LA", (0, 0), (9, 255)), {}, [[WHITE, (9, 9, 9)]]),
    "clear.webp": (picture("RGBA", (0, 0, 0, 0), (0, 0, 255, 255)), {"lossless": True},
                   [[WHITE, BLUE]]),
    "palette.png": (palette(RED, GREEN, BLUE), {}, [[RED, GREEN, BLUE]]),
    "clear_palette.png": (palette(RED, GREEN, BLUE), {"transparency": 1}, [[RED, WHITE, BLUE]]),
    "clear_palette_by_bytes.png": (palette(RED, BLACK), {"transparency": b"\0\x33"},
                                   [[WHITE, (204, 204, 204)]]),
    "clear_colour.png": (picture("RGB", RED, BLUE), {"transparency": RED}, [[WHITE, BLUE]]),
    "clear_shade.png": (picture("L", 0, 9), {"transparency": 0}, [[WHITE, (9, 9, 9)]]),
    "grey.png": (picture("L", 0, 100, 255), {}, [[BLACK, (100,) * 3, WHITE]]),
    "bits.png": (picture("1", 0, 1), {}, [[BLACK, WHITE]]),
    "grey16.png": (sixteen_bits(0, 0x6400, 0xFFFF), {}, [[BLACK, (100,) * 3, WHITE]]),
    "grey16.tif": (sixteen_bits(0, 0x6400, 0xFFFF), {}, [[BLACK, (100,) * 3, WHITE]]),
    "grey16_big_endian.tif": (sixteen_bits(0, 0x6400, 0xFFFF, dtype=">u2"), {},
                              [[BLACK, (100,) * 3, WHITE]]),
    "clear_grey16.png": (sixteen_bits(0, 0x6400, 0xFFFF), {"transparency": 0},
                         [[WHITE, (100,) * 3, WHITE]]),
    "grey.jpg": (solid("L", 100), {}, [[(100,) * 3] * 32] * 24),
    "cmyk.tif": (picture("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), {}, [[(0, 255, 255), BLACK]]),
    "cmyk.jpg": (solid("CMYK", (255, 0, 0, 0)), {"quality": 100}, [[(0, 255, 255)] * 32] * 24),
    "upside_down.png": (picture("RGB", RED, BLUE), turned(3), [[BLUE, RED]]),
    "turned_right.png": (picture("RGB", RED, BLUE), turned(6), [[RED], [BLUE]]),
    "turned_left.png": (picture("RGB", RED, BLUE), turned(8), [[BLUE], [RED]]),
    "turned_palette.png": (palette(RED, GREEN), turned(6) | {"transparency": 1}, [[RED], [WHITE]]),
    "turned.jpg": (solid("RGB", RED), turned(6), [[(254, 0, 0)] * 24] * 32),
    "moving.gif": (palette(RED, BLUE), {"save_all": True, "append_images": [palette(GREEN, BLACK)]},
                   [[RED, BLUE]]),
    "moving.png": (picture("RGB", RED), {"save_all": True, "append_images": [picture("RGB", BLUE)]},
                   [[RED]]),
    "clear.gif": (palette(RED, BLUE), {"transparency": 0}, [[WHITE, BLUE]]),
    "plain.bmp": (picture("RGB", RED, BLUE), {}, [[RED, BLUE]]),
}


def save(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        image, options, _ = IMAGES[name]
        image.save(folder / name, **options)
    return folder


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_read_upright_on_white_in_rgb(tmp_path, name):
    image, expected = read_image(save(tmp_path, name) / name), np.array(IMAGES[name][2])
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - expected).max()
    assert difference <= (1 if name.endswith(".jpg") else 0)


def test_images_of_every_kind_are_captioned(command, tmp_path):
    folder = save(tmp_path / "photos", *IMAGES)
    result = command("sampler", datadir=None, images=folder, num_beams=1, num_return_sequences=1)
    assert result.code == 0 and "skipped" not in result.err, result.err
    captions = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert captioned(tmp_path / "out") == sorted(str(folder / name) for name in IMAGES)
    assert all(caption["caption"] for caption in captions)


@pytest.mark.parametrize("name", IMAGES)
def test_a_damaged_image_raises_oserror_alone(tmp_path, name):
    """An image that is cut anywhere, or has a few other bytes, is read or raises OSError."""
    data = (save(tmp_path, name) / name).read_bytes()
    rng, path = random.Random(name), tmp_path / f"damaged_{name}"
    damaged = [data[:length] for length in range(0, len(data), max(1, len(data) // 60))]
    for _ in range(120):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        try:
            assert read_image(path).mode == "RGB"
        except OSError:
            pass


def png_of_size(width, height):
    """A PNG whose header says this size, without pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + crc
    return content


def spoil(folder):
    """Adds images that cannot be read. Returns their names."""
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-900])
    (folder / "text.jpg").write_text("this is no picture\n")
    (folder / "nothing.png").write_bytes(b"")
    (folder / "too_large.png").write_bytes(png_of_size(60_000, 60_000))
    return ["cut.jpg", "nothing.png", "text.jpg", "too_large.png"]


def captioned(out):
    """The image ids of captions.json, in its order."""
    return [caption["image_id"] for caption in json.loads((out / "captions.json").read_text())]


def skipped(result, folder):
    """The names of the images that a run reports as skipped, in its order; it also counts them."""
    prefix = f"skipped {folder}{os.sep}"
    names = [line.removeprefix(prefix).split(": ")[0] for line in result.err.splitlines()
             if line.startswith(prefix)]
    were = "was" if len(names) == 1 else "were"
    assert f"{counted(len(names), 'image')} could not be read and {were} skipped" in result.err
    return names


def test_bad_images_are_named_counted_and_skipped(command, tmp_path, monkeypatch):
    folder = save(tmp_path / "photos", "rgb.png", "grey.jpg")
    bad = spoil(folder)
    for _ in range(2):
        result = command("sampler", datadir=None, images=folder)
        assert result.code == 0
        assert skipped(result, folder) == bad
        assert result.err.splitlines()[-1].startswith(f"{len(bad)} images")  # the report comes last
        monkeypatch.setattr("model.Clip.encode_images", None)  # the good ones are known then
        assert captioned(tmp_path / "out") == [str(folder / "grey.jpg"), str(folder / "rgb.png")]
        assert len((tmp_path / "out" / "preds.txt").read_text().splitlines()) == 2
        assert "captioned 2 images" in result.out


def test_captions_and_references_stay_in_step_around_bad_images(command, own_world, tmp_path):
    first, second = sorted((own_world / "val2017").iterdir())[:2]
    first.write_text("no picture")
    second.unlink()
    result = command("sampler", datadir=own_world)
    assert result.code == 0
    assert skipped(result, own_world / "val2017") == [first.name, second.name]
    data = json.loads((own_world / "annotations" / "captions_val2017.json").read_text())
    references = {a["image_id"]: a["caption"] for a in reversed(data["annotations"])}  # first ones
    kept = [image["id"] for image in data["images"][2:]]
    assert captioned(tmp_path / "out") == kept
    lines = (tmp_path / "out" / "ref0.txt").read_text().splitlines()
    assert lines == [references[image_id] for image_id in kept]
    assert len((tmp_path / "out" / "preds.txt").read_text().splitlines()) == len(kept) == VAL - 2


def test_training_goes_on_without_bad_images(command, own_world, tmp_path):
    bad = sorted((own_world / "train2017").iterdir())[0]
    bad.write_text("no picture")
    result = command("trainer", datadir=own_world, tmax=1, max_bad=0.03)  # of 48 images
    assert result.code == 0
    assert skipped(result, own_world / "train2017") == [bad.name]
    assert (tmp_path / "out" / "best.safetensors").is_file()


@pytest.mark.parametrize("split, images", [("train2017", TRAIN), ("val2017", VAL)])
def test_training_stops_above_a_share_of_bad_images(command, own_world, tmp_path, split, images):
    bad = sorted((own_world / split).iterdir())[:2]
    bad[0].write_text("no picture")
    bad[1].unlink()
    result = command("trainer", datadir=own_world, tmax=1, max_bad=1.9 / images)
    assert result.code == 2 and "--max_bad" in result.err.splitlines()[-1]
    assert f"2 of {images} " in result.err and str(bad[0]) in result.err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*st.safetensors"))
    assert command("trainer", datadir=own_world, tmax=1, max_bad=2 / images).code == 0


def test_nothing_but_bad_images_is_an_error(command, tmp_path):
    (tmp_path / "photos").mkdir()
    bad = spoil(tmp_path / "photos")
    result = command("sampler", datadir=None, images=tmp_path / "photos")
    assert result.code == 2
    assert skipped(result, tmp_path / "photos") == bad
    assert result.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "captions.json").exists()


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_a_split_of_nothing_but_bad_images_is_an_error(command, own_world, tmp_path, split):
    for path in (own_world / split).iterdir():
        path.write_text("no picture")
    result = command("trainer", datadir=own_world)
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ") and split in last
    assert not (tmp_path / "out" / "last.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are no UTF-8")
def test_an_image_whose_name_is_no_utf8_is_captioned(command, tmp_path):
    folder = save(tmp_path / "photos", "rgb.png")
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "rgb.png").rename(folder / name)
    result = command("sampler", datadir=None, images=folder)
    assert result.code == 0
    assert captioned(tmp_path / "out") == [str(folder / name)]
