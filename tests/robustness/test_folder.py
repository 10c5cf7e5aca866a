"""A folder of a thousand photos of all kinds, as people have them: captioned, edited, grown, killed
twice, captioned again. Every text that a person wrote stays, and every image is captioned or named.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from conftest import BART, CLIP, flags
from forks import finish, start
from PIL import Image

from antarctic.folders import IMAGE_SUFFIXES

PHOTOS = 1000
HAND = "written by hand\n"
NAMES = ["IMG_{}", "Ferien am Meer {}", "写真 {}", "a [b]* {}", "{}.final", "-{}", "it's {}", "é{}"]


def drawn(rng):
    """A small picture of its own."""
    colours = np.array([[rng.randrange(256) for _ in range(3)] for _ in range(6)], np.uint8)
    return Image.fromarray(colours.reshape(2, 3, 3)).resize((48, 32), Image.Resampling.BICUBIC)


def oriented(n):
    exif = Image.Exif()
    exif[0x0112] = n % 8 + 1
    return exif


KINDS = {  # {suffix: function that writes a picture as a file of that kind}
    ".jpg": lambda image, path, n: image.save(path, quality=90, exif=oriented(n)),
    ".JPEG": lambda image, path, n: image.save(path, progressive=True),
    ".jfif": lambda image, path, n: image.convert("L").save(path, "JPEG"),
    ".png": lambda image, path, n: image.convert("RGBA" if n % 2 else "P").save(path),
    ".webp": lambda image, path, n: image.save(path, lossless=bool(n % 2), exif=oriented(n)),
    ".gif": lambda image, path, n: image.save(path, save_all=True, append_images=[image] * 2),
    ".bmp": lambda image, path, n: image.save(path),
    ".tif": lambda image, path, n: image.save(path, compression="tiff_lzw"),
    ".tiff": lambda image, path, n: Image.fromarray(
        np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path),
    ".mpo": lambda image, path, n: image.save(path, "MPO", save_all=True, append_images=[image]),
    ".avif": lambda image, path, n: image.save(path, speed=10),
    ".heic": lambda image, path, n: pillow_heif.from_pillow(image).save(path),
}
BAD = {  # {name: content} of files that look like images, and are none that can be read
    "empty.jpg": b"", "text.png": b"no image", "raw.dng": b"II*\0" + bytes(99),
    "page.svg": b"<svg/>", "zeros.heic": bytes(500), "layers.psd": b"8BPS" + bytes(99),
    "html.jpg": b"<html>", "a.jp2": b"x"}
ASIDE = (".hidden.jpg", "@eaDir/thumb.jpg", "__MACOSX/._a.jpg", ".ipynb_checkpoints/a.png")


def make_folder(folder, count, rng):
    """Writes photos of all kinds into folders and subfolders. Returns their paths, among which are
    duplicates and photos that share the name of their text."""
    made, kinds = [], list(KINDS)
    for n in range(count):
        suffix = kinds[n % len(kinds)]
        place = folder / ("", "2019", "2020/Mai & Juni")[n % 3]
        place.mkdir(parents=True, exist_ok=True)
        path = place / (NAMES[n % len(NAMES)].format(n) + suffix)
        KINDS[suffix](drawn(rng), path, n)
        made.append(path)
    for path in made[:20]:  # copies, as phones and people make them
        copy = path.with_name(f"{path.stem} (1){path.suffix}")
        made.append(Path(shutil.copy(path, copy)))
    return made


def without_texts(folder):
    """{path: bytes} of all files but the texts, and what a killed run had begun to write."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".txt", ".tmp")}


def texts_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.txt")}


@pytest.fixture
def world_of_photos(tmp_path):
    rng, folder = random.Random(0), tmp_path / "photos"
    made = make_folder(folder, PHOTOS, rng)
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    half = folder / "half.jpg"
    half.write_bytes(made[0].read_bytes()[:400])
    for name in ASIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(made[0], folder / name)
    (folder / "notes.txt").write_text(HAND)  # of no photo
    (folder / "film.mp4").write_bytes(b"film")
    hand = rng.sample(made, 50)
    for path in hand:
        path.with_suffix(".txt").write_text(HAND)
    return folder, made, [folder / name for name in (*BAD, "half.jpg")]


def kill_when(process, ready):
    """Kills a process as soon as ready() holds, or leaves it if it has ended. Returns whether it
    was killed."""
    while process.exitcode is None and not ready():
        time.sleep(0.005)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_a_thousand_photos_are_captioned_edited_grown_and_killed(cache, checkpoint, tmp_path,
                                                                  world_of_photos):
    folder, made, bad = world_of_photos
    results, log = tmp_path / "results", tmp_path / "log"
    command = flags({
        "images": folder, "textfile": cache.textfile, "embfile": cache.embfile, "clip_model": CLIP,
        "lm": BART, "ckpt": checkpoint, "savedir": results, "sidecar": True, "num_beams": 1,
        "num_return_sequences": 1, "gallery": 3, "metadata": True})
    images, hand = without_texts(folder), texts_of(folder)

    def size_of(pattern):
        return sum(path.stat().st_size for path in results.glob(pattern))

    process = start(log, "sampler", *command)
    assert kill_when(process, lambda: size_of("features-*.part"))  # while images are encoded
    assert texts_of(folder) == hand
    process = start(log, "sampler", *command)
    assert kill_when(process, lambda: len(texts_of(folder)) > 300)  # while they are captioned
    kept = texts_of(folder)
    assert hand.items() <= kept.items()

    typed = sorted(kept.keys() - hand.keys())[::40]
    for path in typed:  # a person mends some, and photographs more, while nothing runs
        path.write_text(HAND)
    made += make_folder(folder / "2021", 30, random.Random(1))
    images, kept = images | without_texts(folder), texts_of(folder)
    log.unlink()
    finish(log, "sampler", *command)
    (folder / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")

    assert without_texts(folder) == images  # no photo was touched
    texts = texts_of(folder)
    assert kept.items() <= texts.items()
    records = [json.loads(line) for line in (results / "details.jsonl").open()]
    files = [record["file"] for record in records]
    assert len(files) == len(set(files)) and set(map(Path, files)) <= set(made)
    captions = {Path(r["file"]): (r["caption"] + "\n").encode() for r in records}
    report = log.read_text()
    for path in made:
        text = texts[path.with_suffix(".txt")]
        if path.with_suffix(".txt") in hand:
            assert path not in captions and text == HAND.encode()
        elif path.with_suffix(".txt") in typed:
            assert path in captions and text == HAND.encode()
        else:
            assert text == captions[path]
    assert f"left {len(hand) - 1} images alone" in report
    assert report.count("as it is: it exists") == min(len(typed), 20)
    for path in bad:  # each is named
        assert f"skipped {path}: " in report
    assert f"{len(bad)} images could not be read" in report
    assert f"{len(ASIDE)} hidden images" in report
    assert f"captioned {len(records):,} images, " in report
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").open()]
    assert [row["file_name"] for row in rows] == [
        Path(file).relative_to(folder).as_posix() for file in files]
    assert not [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]
    assert {path.suffix for path in made} | {Path(name).suffix for name in BAD} <= (
        IMAGE_SUFFIXES | {".JPEG"})

    before = (results / "details.jsonl").read_bytes()
    finish(log, "sampler", *command)  # once more: nothing is to be done
    assert "captioning: 100%" in log.read_text() and texts_of(folder) == texts
    assert (results / "details.jsonl").read_bytes() == before
