"""Captions beside the images, for training: nobody's own work is touched, and readers of the field
take what is written."""

import contextlib
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
from antarctic.exports import Exports, metadata_path, write_metadata
from antarctic.files import file_sha256
from antarctic.folders import Picture
from antarctic.images import read_image
from antarctic.leftovers import temporary_path
from antarctic.results import write_captions
from antarctic.runtime import cleanup
from antarctic.shards import check_shards, suffix_of, write_shards
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
    assert json.loads((tmp_path / "shards" / "sizes.json").read_text()) == {
        "captions-000000.tar": 3}


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


def test_what_stands_in_a_texts_place_is_not_read_and_no_image_is_replaced(tmp_path):
    """--overwrite replaces a text; a pipe would be waited for, and a photo would be lost."""
    rows = rows_of(tmp_path, "abcde")
    paths = [Path(row["file"]) for row in rows]
    texts = [path.with_suffix(".txt") for path in paths]
    os.mkfifo(texts[0])
    texts[1].mkdir()
    texts[2].write_bytes(paths[3].read_bytes())  # an image that is not listed
    target = tmp_path / "elsewhere"
    target.write_text("by hand")
    texts[3].symlink_to(target)
    texts[4].symlink_to(tmp_path / "nowhere")
    photo = texts[2].read_bytes()
    for overwrite in (False, True):
        export = exports(sidecar=True, overwrite=overwrite)
        export.begin([Picture(str(path), path) for path in paths])
        left, _ = export.finish(rows)
        assert target.read_text() == "by hand" and texts[2].read_bytes() == photo
        assert left.keys() == set(texts if not overwrite else texts[1:3])
    assert [texts[i].read_text() for i in (0, 3, 4)] == ["a\n", "d\n", "e\n"]
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("suffix", ["", "txt", ".", "./../x", ".a/b", ".a\0", ".png.", "..", ".a ",
                                    ".jpg", ".HEIC", ".tar"])
def test_a_suffix_that_is_none_is_refused(script, cache, tmp_path, suffix):
    run = run_sampler(script, cache, tmp_path, "--images", tmp_path, "--sidecar",
                      "--sidecar_suffix", suffix)
    assert run.code == 2 and "--sidecar_suffix must be" in run.err


# ------------------------------------------------------------------------- prefix, metadata and CSV

@pytest.fixture(autouse=True)
def release():
    """What a run releases at its end."""
    yield cleanup
    cleanup.close()


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
        rows.append({"image_id": str(path), "file": str(path), "caption": caption, "score": 0.25,
                     "sha256": file_sha256(path)})
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
    with tarfile.open(tmp_path / "shards" / "captions-000000.tar") as tar:
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


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"], ids=repr)
def test_lines_of_metadata_are_those_of_json_and_stay_byte_for_byte(tmp_path, end):
    """U+2028, say, ends no line of JSON; a name may hold it."""
    rows = rows_of(tmp_path, "ab")
    for row, name in zip(rows, ("a\u2028b\x85.jpeg", "a\nb\udcff.jpeg")):
        row["file"] = str(Path(row["file"]).rename(tmp_path / name))
    path, mine = tmp_path / "metadata.jsonl", '{"file_name": "./c.jpeg", "text": "c\u2029d"}'
    path.write_text(mine + end, newline="", encoding="utf-8")
    assert write_metadata(path, rows, exports().text_of, False) == {}
    lines = path.read_bytes().decode().split("\n")
    assert "\n".join(lines).startswith(mine + end) and [*map(json.loads, filter(str.strip, lines))][
        1:] == [{"file_name": Path(row["file"]).name, "text": row["caption"]} for row in rows]
    os.utime(path, (1, 1))
    rows.append({"file": str(tmp_path / "c.jpeg"), "caption": "c\u2029d"})
    remark, = write_metadata(path, rows, exports().text_of, False).values()
    assert remark.startswith("1 of its lines")  # c.jpeg is no line more
    assert path.stat().st_mtime == 1  # nothing was to be written


def test_metadata_that_is_a_link_a_pipe_or_a_folder_is_left_alone(tmp_path):
    rows, secret = rows_of(tmp_path / "a", "a"), tmp_path / "secret"
    secret.write_text('{"file_name": "x", "key": "secret"}\n')
    path = tmp_path / "a" / "metadata.jsonl"
    for make in (lambda: path.symlink_to(secret), lambda: path.symlink_to("nowhere"),
                 lambda: os.mkfifo(path), path.mkdir):
        make()
        before = os.lstat(path)
        assert list(write_metadata(path, rows, exports().text_of, True)) == [path]
        assert os.lstat(path) == before
        path.rmdir() if path.is_dir() else path.unlink()
    assert secret.read_text() == '{"file_name": "x", "key": "secret"}\n'


def test_metadata_lies_where_it_lay_whichever_images_can_be_read_or_have_a_text(tmp_path):
    pictures = [Picture(row["file"], Path(row["file"])) for folder in "ab"
                for row in rows_of(tmp_path / folder, "a")]
    export = exports(metadata=True)
    export.check(pictures)
    export.begin(pictures[:1])
    assert export.metadata == tmp_path / "metadata.jsonl"


def test_images_in_tar_files_have_no_line_of_metadata(tmp_path):
    rows = rows_of(tmp_path, "ab")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(rows[0]["file"], "0.jpeg")
    inside = tmp_path / "0.tar" / "0.jpeg"
    export = exports(metadata=True)
    with pytest.raises(InputError, match="lie in tar files"):
        export.check([Picture("0", inside)])
    export.check([Picture("0", inside), Picture(rows[1]["file"], Path(rows[1]["file"]))])
    rows[0]["file"] = str(inside)
    assert export.finish(rows)[0] == {
        tmp_path / "metadata.jsonl": "1 image in tar files cannot be named in it"}
    assert (tmp_path / "metadata.jsonl").read_text() == '{"file_name": "1.jpeg", "text": "b"}\n'


def test_a_prefix_that_is_no_text_becomes_one(tmp_path):
    rows = rows_of(tmp_path, "a")
    export = exports(sidecar=True, metadata=True, shards=tmp_path / "s", caption_prefix="\udcff ")
    pictures = [Picture(row["file"], Path(row["file"])) for row in rows]
    for _ in range(2):
        export.check(pictures)
        export.begin(pictures)
        assert export.finish(rows)[0] == {}
    assert (tmp_path / "0.txt").read_text() == "? a\n"


def test_metadata_of_a_folder_stays_at_its_place_when_the_folder_grows(tmp_path):
    cat, dog = (Picture(name, tmp_path / name / "0.jpg") for name in ("cats", "dogs"))
    for path in (cat, dog):
        path.path.parent.mkdir()
    for pictures in ([cat], [cat, dog]):
        assert metadata_path(pictures, [str(tmp_path)]) == tmp_path / "metadata.jsonl"
    for named in (None, [str(cat.path)], [str(tmp_path / "*" / "0.jpg")]):
        assert metadata_path([cat], named) == tmp_path / "cats" / "metadata.jsonl"
        assert metadata_path([cat, dog], named) == tmp_path / "metadata.jsonl"


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
    monkeypatch.setattr("antarctic.shards.SHARD_IMAGES", 3)
    rows = rows_of(tmp_path / "a", ["ein Bär", "", *"bcdefg"])
    folder = tmp_path / "shards"
    check_shards(folder, [])
    assert write_shards(folder, rows, exports(caption_prefix="x ").text_of) == {}
    assert json.loads((folder / "sizes.json").read_text()) == {
        "captions-000000.tar": 3, "captions-000001.tar": 3, "captions-000002.tar": 1}
    samples = list(webdataset.WebDataset([str(folder / f"captions-{i:06}.tar") for i in range(3)],
                                         shardshuffle=False))
    captioned = [row for row in rows if row["caption"]]
    assert [sample["__key__"] for sample in samples] == [f"{i:09}" for i in range(7)]
    for row, each in zip(captioned, samples):
        assert each["jpg"] == Path(row["file"]).read_bytes()
        assert each["txt"].decode() == f"x {row['caption']}" and json.loads(each["json"]) == row

    before = shards_of(folder)
    check_shards(folder, [])  # they are this project's, and are replaced
    write_shards(folder, rows, exports(caption_prefix="x ").text_of)
    assert shards_of(folder) == before
    write_shards(folder, rows[:4], exports().text_of)
    assert list(shards_of(folder)) == ["captions-000000.tar", "sizes.json"]


def test_a_shard_is_bounded_in_bytes_too_and_an_image_that_has_gone_is_named(tmp_path, monkeypatch):
    rows = rows_of(tmp_path / "a", "abcd")
    monkeypatch.setattr("antarctic.shards.SHARD_BYTES", 2 * Path(rows[0]["file"]).stat().st_size)
    gone = Path(rows[2]["file"])
    gone.unlink()
    assert write_shards(tmp_path / "s", rows, exports().text_of) == {
        gone: "No such file or directory"}
    sizes = json.loads((tmp_path / "s" / "sizes.json").read_text())
    assert sum(sizes.values()) == 3 and len(sizes) == 2
    for name, n in sizes.items():
        with tarfile.open(tmp_path / "s" / name) as tar:
            assert len(tar.getnames()) == 3 * n


@pytest.mark.parametrize("sizes", [{}, {"000000.tar": 9}, {"../victim.tar": 1}], ids=str)
def test_shards_of_others_are_never_replaced(tmp_path, sizes):
    """A data set of somebody else has 000000.tar and sizes.json, too."""
    rows, folder, victim = rows_of(tmp_path / "a", "ab"), tmp_path / "s", tmp_path / "victim.tar"
    folder.mkdir()
    for path in (folder / "000000.tar", victim):
        path.write_text("mine")
    (folder / "sizes.json").write_text(json.dumps(sizes))
    with pytest.raises(InputError, match="holds shards of something else, such as 000000.tar"):
        check_shards(folder, [])
    write_shards(folder, rows, exports().text_of)
    assert [path.read_text() for path in (folder / "000000.tar", victim)] == ["mine"] * 2


def test_shards_are_not_written_over_the_images_that_they_are_made_of(tmp_path):
    write_shards(tmp_path / "s", rows_of(tmp_path / "a", "ab"), exports().text_of)
    (tmp_path / "link").symlink_to("s")
    inside = tmp_path / "s" / "captions-000000.tar" / "000000001.jpg"
    with pytest.raises(InputError, match="holds the images that are captioned"):
        check_shards(tmp_path / "link", [Picture("1", inside)])
    check_shards(tmp_path / "other", [Picture("1", inside)])


def test_a_kill_between_any_two_writes_of_shards_leaves_a_folder_that_the_next_run_takes(
        tmp_path, monkeypatch):
    monkeypatch.setattr("antarctic.shards.SHARD_IMAGES", 2)
    many, few = rows_of(tmp_path / "a", "abcdef"), rows_of(tmp_path / "b", "gh")
    write_shards(tmp_path / "whole", few, exports().text_of)

    class Killed(BaseException):
        pass

    def dying(real, calls):
        def call(*how, **more):
            if next(calls, None) is None:
                raise Killed
            return real(*how, **more)
        return call
    for stop in range(9):
        folder, calls = tmp_path / str(stop), iter(range(stop))
        write_shards(folder, many, exports().text_of)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("replace", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name), calls))
            write_shards(folder, few, exports().text_of)
        check_shards(folder, [])
        write_shards(folder, few, exports().text_of)
        assert {name: data for name, data in shards_of(folder).items() if name[0] != "."} == (
            shards_of(tmp_path / "whole"))


def test_two_runs_never_mix_their_shards_and_a_killed_ones_half_shard_goes(tmp_path, release,
                                                                           monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 999_999_999)
        half = temporary_path(tmp_path / "captions-000000.tar")
    half.touch()
    (tmp_path / ".shards.lock").write_text("process 999999999 on here")
    exports(shards=tmp_path)
    assert not half.exists()
    with pytest.raises(InputError, match="another run is writing"):
        exports(shards=tmp_path)
    release.close()
    assert not list(tmp_path.iterdir())


def test_a_shard_holds_what_was_captioned_or_nothing(tmp_path):
    rows, secret = rows_of(tmp_path / "a", "abc"), tmp_path / "secret"
    secret.write_text("secret")
    paths = [Path(row["file"]) for row in rows]
    paths[0].write_bytes(paths[2].read_bytes())
    paths[1].unlink()
    paths[1].symlink_to(secret)
    assert write_shards(tmp_path / "s", rows, exports().text_of) == dict.fromkeys(
        paths[:2], "it has changed since it was captioned")
    assert json.loads((tmp_path / "s" / "sizes.json").read_text()) == {"captions-000000.tar": 1}


@pytest.mark.parametrize("name, suffix", [("a.JPG", "jpg"), ("a.jpeg", "jpg"), ("a.jfif", "jpg"),
                                          ("a.PNG", "png"), ("a", "jpg"), ("a.b.webp", "webp"),
                                          ("a.txt", "jpg"), ("a.json", "jpg"), ("a.x\ny", "jpg"),
                                          ("a.pyd", "jpg")])
def test_a_shard_calls_images_as_readers_do(name, suffix):
    assert suffix_of(Path(name)) == suffix


def test_what_a_shard_holds_is_read_as_the_photo(tmp_path):
    rows = rows_of(tmp_path / "a", ["a dog"])
    write_shards(tmp_path / "s", rows, exports().text_of)
    with tarfile.open(tmp_path / "s" / "captions-000000.tar") as tar:
        image = tar.extractfile("000000000.jpg").read()
    assert read_image(image).tobytes() == read_image(rows[0]["file"]).tobytes()
