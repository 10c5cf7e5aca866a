"""Captions beside the images, for training: nobody's own work is touched, and readers of the field
take what is written."""

import csv
import errno
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_sampler import photos, run_sampler, sample

from antarctic.errors import InputError
from antarctic.exports import (
    Exports,
    check_shards,
    metadata_path,
    suffix_of,
    write_metadata,
    write_shards,
)
from antarctic.folders import Picture
from antarctic.images import read_image
from antarctic.results import write_captions
from model import rescore

# --------------------------------------------------------------------------------------- sidecars


def test_an_image_that_has_a_text_is_left_alone_and_the_others_are_captioned(
        script, world, cache, checkpoint, tmp_path, monkeypatch):
    folder = photos(world, tmp_path / "photos")
    (folder / "1.txt").write_text("by hand")
    flags = ("--images", folder, "--ckpt", checkpoint, "--sidecar")
    records = sample(script, cache, tmp_path / "r", *flags)
    assert [Path(r["file"]).name for r in records] == ["0.png", "2.png", "3.png"]
    texts = {r["file"]: Path(r["file"]).with_suffix(".txt").read_text() for r in records}
    assert texts == {r["file"]: r["caption"] + "\n" for r in records}
    run = run_sampler(script, cache, tmp_path / "r", *flags)  # the same command once more
    assert run.code == 0 and "left 1 image alone that has a .txt file" in run.err, run.err

    (folder / "2.txt").write_text("mended by hand")
    shutil.copy(sorted((world / "near").glob("*.png"))[5], folder / "4.png")
    encoded = []
    monkeypatch.setattr("model.rescore", lambda *how: encoded.append(len(how[2])) or rescore(*how))
    run = run_sampler(script, cache, tmp_path / "r", *flags)
    assert run.code == 0 and encoded == [1]  # the new one alone
    assert f"left {folder / '2.txt'} as it is: it exists" in run.err
    assert [(folder / f"{i}.txt").read_text() for i in (1, 2)] == ["by hand", "mended by hand"]
    captions = (tmp_path / "r" / "preds.txt").read_text().splitlines(keepends=True)
    assert len(captions) == 4 and (folder / "4.txt").read_text() == captions[3]

    run = run_sampler(script, cache, tmp_path / "r", *flags, "--overwrite")
    assert run.code == 0 and "left" not in run.err
    captions = (tmp_path / "r" / "preds.txt").read_text().splitlines(keepends=True)
    assert [(folder / f"{i}.txt").read_text() for i in range(5)] == captions


def test_a_folder_of_texts_alone_leaves_earlier_results_as_they_are(script, world, cache,
                                                                   checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 2)
    sample(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint)
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    for i in range(2):
        (folder / f"{i}.caption").touch()
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar", "--sidecar_suffix", ".caption", "--topk", "6")
    assert run.code == 0 and "left 2 images alone that have a .caption file" in run.err, run.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


@pytest.mark.parametrize("change", ["folder", "pair"])
def test_photos_that_moved_with_their_texts_stay_in_the_results(script, world, cache, checkpoint,
                                                               tmp_path, monkeypatch, change):
    folder = photos(world, tmp_path / "photos")
    (folder / "1.txt").write_text("by hand")
    command = ("--ckpt", checkpoint, "--sidecar", "--metadata", "--shards", tmp_path / "shards")
    first = sample(script, cache, tmp_path / "r", "--images", folder, *command)
    if change == "folder":
        folder = folder.rename(tmp_path / "moved")
    else:
        for suffix in (".png", ".txt"):
            (folder / "0").with_suffix(suffix).rename((folder / "00").with_suffix(suffix))
    for path in folder.iterdir():
        os.utime(path, (1, 1))  # as a copy has it
    monkeypatch.setattr("model.rescore", None)  # nothing is captioned
    again = sample(script, cache, tmp_path / "r", "--images", folder, *command)
    assert [r["caption"] for r in again] == [r["caption"] for r in first]
    assert [Path(r["file"]) for r in again] == [
        path for path in sorted(folder.glob("*.png")) if path.name != "1.png"]
    assert json.loads((tmp_path / "shards" / "sizes.json").read_text()) == {"000000.tar": 3}


def test_a_text_that_another_run_or_a_person_wrote_stays(script, world, cache, checkpoint, tmp_path,
                                                        monkeypatch):
    folder = photos(world, tmp_path / "photos")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "details-0.jsonl.part").touch()  # of another run that was stopped
    (folder / "0.txt").write_text("by hand")
    typed = iter(["", "typed meanwhile", ""])

    def slow_rescore(*how):
        if text := next(typed):
            (folder / "2.txt").write_text(text)
        return rescore(*how)
    monkeypatch.setattr("model.rescore", slow_rescore)
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar", "--batch_size", "1")
    assert run.code == 0, run.err
    texts = [(folder / f"{i}.txt").read_text() for i in range(4)]
    captions = (tmp_path / "r" / "preds.txt").read_text().splitlines(keepends=True)
    assert texts == ["by hand", captions[0], "typed meanwhile", captions[2]]
    assert run.err.count("as it is: it exists") == 1


def test_a_stop_keeps_the_sidecars_that_are_written(script, world, cache, checkpoint, tmp_path,
                                                   monkeypatch):
    folder = photos(world, tmp_path / "photos")
    calls = []

    def stops(*how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rescore(*how)
    monkeypatch.setattr("model.rescore", stops)
    command = ("--images", folder, "--ckpt", checkpoint, "--sidecar", "--batch_size", "1")
    assert run_sampler(script, cache, tmp_path / "r", *command).code == 130
    assert sorted(path.name for path in folder.glob("*.txt")) == ["0.txt", "1.txt"]
    run = run_sampler(script, cache, tmp_path / "r", *command)
    assert run.code == 0 and len(calls) == 5 and "left" not in run.err
    assert len(list(folder.glob("*.txt"))) == 4


def test_a_folder_that_is_read_only_is_told_of_and_costs_the_sidecars_alone(
        script, world, cache, checkpoint, tmp_path, monkeypatch):
    folder = photos(world, tmp_path / "photos")

    def refused(path, text):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr("antarctic.exports.create", refused)
    monkeypatch.setattr("antarctic.exports.os.access", lambda path, mode: False)
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    assert run.code == 0 and run.err.count("as it is: Permission denied") == 4
    assert run.err.index(f"1 folder, such as {folder}, cannot be written") < run.err.index("encod")
    assert len((tmp_path / "r" / "preds.txt").read_text().splitlines()) == 4


def test_no_image_becomes_a_caption(script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 2)
    shutil.copy(folder / "0.png", folder / "0.txt")  # a PNG by content
    flags = ("--images", *sorted(folder.iterdir()), "--ckpt", checkpoint, "--sidecar")
    for _ in range(2):
        run = run_sampler(script, cache, tmp_path / "r", *flags)
        assert run.code == 0 and "its text would be the image" in run.err
        assert (folder / "0.txt").read_bytes() == (folder / "0.png").read_bytes()
        assert len((tmp_path / "r" / "preds.txt").read_text().splitlines()) == 3
        assert (folder / "1.txt").read_text()


def test_images_that_share_a_text_are_captioned_and_named(script, world, cache, checkpoint,
                                                         tmp_path):
    """A phone writes IMG_1.HEIC and IMG_1.JPG."""
    folder = photos(world, tmp_path / "photos", 2)
    shutil.copy(folder / "1.png", folder / "0.tif")
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    captions = (tmp_path / "r" / "preds.txt").read_text().splitlines(keepends=True)
    assert run.code == 0 and len(captions) == 3
    assert f"left {folder / '0.tif'}" in run.err and "which is that of 0.png" in run.err
    assert (folder / "0.txt").read_text() == captions[0]


def test_the_shell_may_name_the_texts_too(script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 2)
    for _ in range(2):
        run = run_sampler(script, cache, tmp_path / "r", "--images", *sorted(folder.iterdir()),
                          "--ckpt", checkpoint, "--sidecar")
        assert run.code == 0 and len(list(folder.glob("*.txt"))) == 2, run.err
        assert len((tmp_path / "r" / "preds.txt").read_text().splitlines()) == 2


def test_a_name_as_long_as_can_be_has_a_sidecar(script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 1)
    path = (folder / "0.png").rename(folder / ("x" * 251 + ".png"))
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    assert run.code == 0 and path.with_suffix(".txt").is_file(), run.err
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar", "--overwrite", "--do_sample", "--top_p", "0.5")
    assert run.code == 0 and len(list(folder.iterdir())) == 2, run.err


@pytest.mark.parametrize("suffix", ["", "txt", ".", "./../x", ".a/b", ".a\0", ".png.", "..", ".a ",
                                    ".jpg", ".HEIC", ".tar"])
def test_a_suffix_that_is_none_is_refused(script, cache, tmp_path, suffix):
    run = run_sampler(script, cache, tmp_path, "--images", tmp_path, "--sidecar",
                      "--sidecar_suffix", suffix)
    assert run.code == 2 and "--sidecar_suffix must be" in run.err


# ------------------------------------------------------------------------- prefix, metadata and CSV

def exports(**changes):
    """Exports of a run with these flags."""
    flags = {"images": None, "sidecar": False, "sidecar_suffix": ".txt", "metadata": False,
             "shards": None, "caption_prefix": "", "caption_suffix": "", "overwrite": False}
    return Exports(SimpleNamespace(**flags | changes))


def rows_of(folder, captions):
    """Rows of results: photos of a folder, which are made, with captions."""
    rows = []
    for i, caption in enumerate(captions):
        path = folder / f"{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (i, 0, 0)).save(path)
        rows.append({"image_id": str(path), "file": str(path), "caption": caption, "score": 0.25})
    return rows


def test_trigger_words_stand_in_all_that_is_for_training_and_not_in_the_results(
        script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 2)
    records = sample(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                     "--sidecar", "--sidecar_suffix", ".caption", "--metadata", "--shards",
                     tmp_path / "shards", "--caption_prefix", "ohwx dog, ", "--caption_suffix",
                     ", a photo")
    texts = [f"ohwx dog, {record['caption']}, a photo" for record in records]
    assert [(folder / f"{i}.caption").read_text() for i in range(2)] == [f"{t}\n" for t in texts]
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    with tarfile.open(tmp_path / "shards" / "000000.tar") as tar:
        assert [tar.extractfile(f"{i:09}.txt").read().decode() for i in range(2)] == texts
    assert (tmp_path / "r" / "preds.txt").read_text().splitlines() == [
        record["caption"] for record in records]
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar", "--metadata", "--shards", tmp_path / "shards")
    assert run.out.splitlines()[-1] == (
        f"for training: 2 .txt files, 1 shard in {tmp_path / 'shards'}")
    assert f"left {folder / 'metadata.jsonl'} as it is: 2 of its lines have another" in run.err


def test_metadata_grows_and_the_lines_that_are_there_stay(tmp_path):
    rows = rows_of(tmp_path / "a", ["a dog", "", "a cat"]) + rows_of(tmp_path / "b", ["a fox"])
    path = tmp_path / "metadata.jsonl"
    mine = '{"text":  "by hand", "file_name": "a/0.jpeg", "license": "mine"}\n'
    path.write_text(mine)
    for _ in range(2):
        left = write_metadata(path, rows, exports().text_of, False)
        assert list(left) == [path] and left[path].startswith("1 of its lines")
        assert path.read_text() == mine + (
            '{"file_name": "a/2.jpeg", "text": "a cat"}\n{"file_name": "b/0.jpeg", '
            '"text": "a fox"}\n')
    assert not write_metadata(path, rows, exports(caption_suffix=".").text_of, True)
    names = [json.loads(line) for line in path.read_text().splitlines()]
    assert names[0] == {"file_name": "a/0.jpeg", "text": "a dog.", "license": "mine"}
    assert [row["text"] for row in names] == ["a dog.", "a cat.", "a fox."]


def test_metadata_of_a_folder_stays_at_its_place_when_the_folder_grows(tmp_path):
    cat, dog = (Picture(name, tmp_path / name / "0.jpg") for name in ("cats", "dogs"))
    for path in (cat, dog):
        path.path.parent.mkdir()
    for pictures in ([cat], [cat, dog]):
        assert metadata_path(pictures, [str(tmp_path)]) == tmp_path / "metadata.jsonl"
    for named in (None, [str(cat.path)], [str(tmp_path / "*" / "0.jpg")]):
        assert metadata_path([cat], named) == tmp_path / "cats" / "metadata.jsonl"
        assert metadata_path([cat, dog], named) == tmp_path / "metadata.jsonl"


def test_metadata_of_images_in_a_tar_file_is_refused_before_the_work(tmp_path):
    write_shards(tmp_path / "s", rows_of(tmp_path / "a", ["a dog"]), exports().text_of)
    inside = tmp_path / "s" / "000000.tar" / "000000000.jpg"
    with pytest.raises(InputError, match="images in a tar file.*--shards"):
        exports(metadata=True).check([Picture("0", inside)])


def test_lines_and_files_that_load_dataset_stumbles_over_are_told_of(tmp_path, capsys):
    rows, path = rows_of(tmp_path / "a" / "b", ["a dog", "a cat"]), tmp_path / "metadata.jsonl"
    assert not write_metadata(path, rows, exports().text_of, False)
    assert not capsys.readouterr().err
    before = path.read_text()
    Path(rows[0]["file"]).rename(tmp_path / "a" / "b" / "renamed.jpeg")
    assert not write_metadata(path, rows[1:], exports().text_of, False)
    assert path.read_text() == before
    assert "has 1 line of images that are not there, such as a/b/0.jpeg" in capsys.readouterr().err
    for other in (tmp_path / "a" / "b" / "metadata.jsonl", tmp_path / "metadata.csv"):
        other.touch()
        assert not write_metadata(path, rows[1:], exports().text_of, False)
        assert f"{other} describes images of {path}, too" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"{", b"[]", b"5\n", b"\xff\xfe", b'{"text": "a"}',
                                     b'{"file_name": ["a"]}', b"[" * 100_000], ids=len)
def test_what_is_no_metadata_stays_as_it_is(tmp_path, content):
    rows, path = rows_of(tmp_path, ["a dog"]), tmp_path / "metadata.jsonl"
    path.write_bytes(content)
    for overwrite in (False, True):
        assert list(write_metadata(path, rows, exports().text_of, overwrite)) == [path]
        assert path.read_bytes() == content


def test_a_spreadsheet_shows_texts_and_computes_none(tmp_path):
    rows = rows_of(tmp_path, ["ein Bär", '=HYPERLINK("http://a")', "-1", "a, \"b\"", "+a", "@a"])
    write_captions(tmp_path, rows, True)
    content = (tmp_path / "captions.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfimage_id,file,caption,score\r\n")
    table = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert [row["caption"] for row in table] == [
        "ein Bär", '\'=HYPERLINK("http://a")', "'-1", 'a, "b"', "'+a", "'@a"]
    assert [float(row["score"]) for row in table] == [0.25] * 6


# ----------------------------------------------------------------------------------------- shards

def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_webdataset_reads_the_shards_and_each_image_once(tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr("antarctic.exports.SHARD_IMAGES", 3)
    rows = rows_of(tmp_path / "a", ["ein Bär", "", *"bcdefg"])
    folder = tmp_path / "shards"
    check_shards(folder)
    assert write_shards(folder, rows, exports(caption_prefix="x ").text_of) == {}
    assert json.loads((folder / "sizes.json").read_text()) == {
        "000000.tar": 3, "000001.tar": 3, "000002.tar": 1}
    samples = list(webdataset.WebDataset([str(folder / f"{i:06}.tar") for i in range(3)],
                                         shardshuffle=False))
    captioned = [row for row in rows if row["caption"]]
    assert [sample["__key__"] for sample in samples] == [f"{i:09}" for i in range(7)]
    for row, each in zip(captioned, samples):
        assert each["jpg"] == Path(row["file"]).read_bytes()
        assert each["txt"].decode() == f"x {row['caption']}" and json.loads(each["json"]) == row

    before = shards_of(folder)
    check_shards(folder)  # they are this project's, and are replaced
    write_shards(folder, rows, exports(caption_prefix="x ").text_of)
    assert shards_of(folder) == before
    write_shards(folder, rows[:4], exports().text_of)
    assert list(shards_of(folder)) == ["000000.tar", "sizes.json"]


def test_a_shard_is_bounded_in_bytes_too_and_an_image_that_has_gone_is_named(tmp_path, monkeypatch):
    rows = rows_of(tmp_path / "a", "abcd")
    monkeypatch.setattr("antarctic.exports.SHARD_BYTES", 2 * Path(rows[0]["file"]).stat().st_size)
    gone = Path(rows[2]["file"])
    gone.unlink()
    assert write_shards(tmp_path / "s", rows, exports().text_of) == {
        gone: "No such file or directory"}
    sizes = json.loads((tmp_path / "s" / "sizes.json").read_text())
    assert sum(sizes.values()) == 3 and len(sizes) == 2
    for name, n in sizes.items():
        with tarfile.open(tmp_path / "s" / name) as tar:
            assert len(tar.getnames()) == 3 * n


def test_shards_of_others_are_never_replaced(tmp_path):
    rows, folder = rows_of(tmp_path / "a", "ab"), tmp_path / "s"
    folder.mkdir()
    (folder / "000000.tar").write_text("mine")
    with pytest.raises(InputError, match="holds shards of something else, such as 000000.tar"):
        check_shards(folder)
    (folder / "000000.tar").unlink()
    victim = tmp_path / "victim.tar"
    victim.touch()
    (folder / "sizes.json").write_text(json.dumps({"../victim.tar": 1, "victim.tar": 2}))
    (folder / "victim.tar").touch()
    write_shards(folder, rows, exports().text_of)
    assert victim.exists() and (folder / "victim.tar").exists()


@pytest.mark.parametrize("name, suffix", [("a.JPG", "jpg"), ("a.jpeg", "jpg"), ("a.jfif", "jpg"),
                                          ("a.PNG", "png"), ("a", "jpg"), ("a.b.webp", "webp")])
def test_a_shard_calls_images_as_readers_do(name, suffix):
    assert suffix_of(Path(name)) == suffix


def test_what_a_shard_holds_is_read_as_the_photo(tmp_path):
    rows = rows_of(tmp_path / "a", ["a dog"])
    write_shards(tmp_path / "s", rows, exports().text_of)
    with tarfile.open(tmp_path / "s" / "000000.tar") as tar:
        image = tar.extractfile("000000000.jpg").read()
    assert read_image(io.BytesIO(image)).tobytes() == read_image(rows[0]["file"]).tobytes()
