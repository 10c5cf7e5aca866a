"""The table, lists of images, COCO files, safe writing, and the default cache and checkpoint."""

import argparse
import errno
import io
import json
import os
import re
import tracemalloc
from types import SimpleNamespace

import pytest
from PIL import Image

import utils
from antarctic import annotations, captions, chair, datasets, files, folders, texts
from antarctic.errors import InputError
from antarctic.gallery import write_gallery


def test_the_table_ends_in_a_bar():
    assert utils.linearize(["a dog", "grass", "frisbee"]) == "a dog | grass | frisbee | "


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_line_i_of_written_lines_is_text_i(tmp_path):
    files.write_lines(tmp_path / "preds.txt", ["a dog\non grass", "", "a cat\r\n"])
    assert (tmp_path / "preds.txt").read_bytes() == b"a dog on grass\n\na cat\n"


def test_images_of_folders_are_found_with_subfolders_and_each_once(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("2.PNG", "1.jpg", "b/3.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    pictures = folders.list_images([tmp_path / "b" / "3.webp", tmp_path])
    names = [str(picture.path.relative_to(tmp_path)) for picture in pictures]
    assert names == ["b/3.webp", "1.jpg", "2.PNG"]


def test_coco_captions_come_in_the_order_of_ids(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    data = {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 9, "caption": " A dog. \n"},
                        {"image_id": 2, "caption": "A cat."},
                        {"image_id": 9, "caption": "Grass"}],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(data))
    pictures = datasets.read_coco(tmp_path, "val2017")
    assert [(p.id, p.captions) for p in pictures] == [(2, ("A cat.",)), (9, ("A dog.", "Grass"))]
    with pytest.raises(InputError, match="there is val2017"):
        datasets.read_coco(tmp_path, "test2017")


def test_the_gallery_shows_a_users_text_as_text(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "i.png")
    evil = "<script>alert(1)</script> \"'&"
    record = {"image_id": evil, "file": str(tmp_path / "i.png"), "caption": evil, "score": 0.3,
              "table": [[evil, 0.3], ["dog", 0.2]], "candidates": [[evil, 0.3, -1.0]]}
    write_gallery(tmp_path / "gallery.html", evil, [(evil, evil, [record], [(evil,)])])
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<script") == 1  # the page's own
    assert page.count("&lt;script&gt;") == 10
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # self-contained


def test_patterns_folders_and_files_are_listed_once_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def listed(*paths):
        return [picture.path for picture in folders.list_images(paths)]

    a, b, c = (tmp_path / name for name in ("a.JPG", "b.png", "sub/c.webp"))
    assert listed(tmp_path) == [a, b, c]
    assert listed(f"{tmp_path}/*.png", tmp_path) == [b, a, c]
    assert listed(f"{tmp_path}/**/*.webp") == [c]
    with pytest.raises(InputError, match="only local files"):
        folders.list_images(["https://example.com/dog.jpg"])


# ----------------------------------------------------------------- the default cache and checkpoint

OURS, THEIRS = ["cache.txt", "cache.npy"], ["original/cache.txt", "original/cache.npy"]


@pytest.mark.parametrize("textfile, embfile, existing, expected", [
    (None, None, OURS + THEIRS, (["cache.txt"], ["cache.npy"])),
    (None, None, THEIRS, (["original/cache.txt"], ["original/cache.npy"])),
    (None, None, OURS[:1] + THEIRS, "without cache.npy"),
    (None, None, OURS[1:] + THEIRS, "without cache.txt"),
    (None, None, THEIRS[:1], "without original/cache.npy"),
    (None, None, [], "download.sh --original"),
    (["a.txt", "b/c.text"], None, ["a.npy", "b/c.npy"],
     (["a.txt", "b/c.text"], ["a.npy", "b/c.npy"])),
    (None, ["b/c.npy"], ["b/c.txt"] + OURS, (["b/c.txt"], ["b/c.npy"])),
    (["a.txt", "b.txt"], None, ["a.npy"] + OURS, "no b.npy; --embfile"),
    (None, ["a.npy"], OURS, "no a.txt; --textfile"),
    (["a.txt"], ["b.npy"], OURS, (["a.txt"], ["b.npy"])),  # existing_caches checks these
])
def test_the_named_cache_is_taken_else_ones_own_else_theirs(textfile, embfile, existing, expected):
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            utils.choose_cache(textfile, embfile, existing.__contains__)
    else:
        assert utils.choose_cache(textfile, embfile, existing.__contains__) == expected


@pytest.mark.parametrize("ckpt, existing, expected", [
    (None, [0, 1], 0), (None, [1], 1), ("none", [0, 1], None), ("./none", [0], "./none"),
    ("a", [0, 1], "a"), (None, [], InputError)])
def test_the_named_checkpoint_is_taken_else_ones_own_else_theirs(ckpt, existing, expected):
    """existing, expected: numbers stand for the paths in CHECKPOINTS."""
    exists = [utils.CHECKPOINTS[i] for i in existing].__contains__
    if expected is InputError:
        with pytest.raises(InputError, match="--ckpt none does without"):
            utils.choose_checkpoint(ckpt, exists)
        return
    if isinstance(expected, int):
        expected = utils.CHECKPOINTS[expected]
    assert utils.choose_checkpoint(ckpt, exists) == expected


def test_a_cache_that_a_kill_left_half_moved_is_found_and_left_as_it_is(tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.chdir(tmp_path)
    left = {"cache.txt", ".cache.npy.new", ".cache.npy.json.new"}
    for name in left:
        (tmp_path / name).write_text("")
    args = argparse.Namespace(textfile=None, embfile=None, index=None)
    utils.find_inputs(args)
    assert (args.textfile, args.embfile) == (["cache.txt"], ["cache.npy"])
    assert {path.name for path in tmp_path.iterdir()} == left
    assert "the cache cache.txt with cache.npy" in capsys.readouterr().out


RESULTS = [{"image_id": 7, "caption": "a dog"},
           {"image_id": "b", "caption": " two  cats\n", "score": 0.3}]


@pytest.mark.parametrize("name, text, text_file", [
    ("a.json", json.dumps(RESULTS), False), ("a.results", json.dumps(RESULTS), False),
    ("a.jsonl", "\n".join(map(json.dumps, RESULTS)), False), ("a.txt", "a dog\ntwo  cats", True)])
def test_captions_are_read_from_every_file_that_holds_them(tmp_path, name, text, text_file):
    (tmp_path / name).write_text(text)
    if text_file:
        found = captions.read_captions(tmp_path / name)
        assert found == [(None, "a dog"), (None, "two cats")]
    else:  # by the scorer also under a suffix of its own
        found = captions.read_captioned(tmp_path / name)
        assert found == {7: ("a dog", None), "b": ("two cats", None)}


def test_a_caption_that_is_missing_is_empty_and_a_null_reference_is_none(tmp_path):
    records = [{"image_id": 1, "caption": "a dog"}, {"image_id": 2},
               {"image_id": 3, "caption": None}]
    for name, text in (("a.json", json.dumps(records)),
                       ("a.jsonl", "\n".join(map(json.dumps, records)))):
        (tmp_path / name).write_text(text)
        assert captions.read_captions(tmp_path / name) == [(1, "a dog"), (2, ""), (3, "")]
    (tmp_path / "a.json").write_text(json.dumps(
        {"images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)],
         "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": None}]}))
    assert annotations.read_annotations(tmp_path / "a.json") == {1: ("1.png", ["a dog"]),
                                                              2: ("2.png", [])}


NO_IDS = "NaN", "-Infinity", "1e999", "1.5", "true", "[7]", "{}"
THING = '{"image_id": %s, "caption": "a dog", "category_id": 1}'


@pytest.mark.parametrize("value", NO_IDS)
@pytest.mark.parametrize("name, form", [("a.jsonl", "%s\n\n%s\n"), ("a.json", "[%s, %s]")])
def test_a_caption_of_what_is_no_image_id_is_named_with_its_record(tmp_path, name, form, value):
    (tmp_path / name).write_text(form % (THING % 7, THING % value))
    for read in (captions.read_captions, captions.read_captioned):
        with pytest.raises(InputError, match=f"the image_id of record 2 in .*{name} is .*, which"):
            read(tmp_path / name)


@pytest.mark.parametrize("value", NO_IDS)
def test_annotations_of_what_is_no_image_id_are_named(tmp_path, value):
    path, image = tmp_path / "a.json", '{"id": %s, "file_name": "a.png"}'
    whole = ('{"images": [%s, %s], "annotations": [%s, %s], '
             '"categories": [{"id": 1, "name": "dog"}]}')
    path.write_text(whole % (image % 7, image % 8, THING % 7, THING % value))
    with pytest.raises(InputError, match="a.json is not .*annotation 2: .* is no image id"):
        annotations.read_annotations(path)
    path.write_text(whole % (image % 7, image % value, THING % 7, THING % 7))
    with pytest.raises(InputError, match="a.json is not .*image 2: .* is no image id"):
        annotations.read_annotations(path)
    with pytest.raises(InputError, match="a.json is not a COCO instances file"):
        chair.read_instances(path, [SimpleNamespace(id=7)])


def test_a_whole_number_may_be_written_as_a_float(tmp_path):
    (tmp_path / "a.json").write_text('[{"image_id": 7.0, "caption": "a dog"}]')
    assert [*map(type, captions.read_captioned(tmp_path / "a.json"))] == [int]
    (tmp_path / "b.json").write_text(
        '{"images": [{"id": 7, "file_name": "a"}], "annotations": [{"image_id": 7.0, '
        '"caption": "a dog"}]}')
    assert annotations.read_annotations(tmp_path / "b.json") == {7: ("a", ["a dog"])}


@pytest.mark.parametrize("separator", [b"\n", b"\0", b"\r\n"])
def test_paths_are_read_from_a_list(tmp_path, monkeypatch, separator):
    names = [b"a b.png", b"\xff.png", "ä.png".encode(), b"a b.png"]
    if separator == b"\0":
        names.append(b"line\nbreak.png")
    content = separator.join([*names, b""])
    (tmp_path / "list").write_bytes(content)
    expected = [os.fsdecode(name) for name in names]
    assert folders.read_paths(str(tmp_path / "list")) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert folders.read_paths("-") == expected
    for empty in (b"", separator):
        (tmp_path / "list").write_bytes(empty)
        with pytest.raises(InputError, match=f"no path in {tmp_path / 'list'}"):
            folders.read_paths(str(tmp_path / "list"))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(empty)))
        with pytest.raises(InputError, match="no path in standard input"):
            folders.read_paths("-")


def test_one_image_by_many_ways_is_one_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("a.png")
    (tmp_path / "d").mkdir()
    ways = ["a.png", "a.png", "./a.png", "d/../a.png", str(tmp_path / "a.png"), "*.png", "."]
    assert [picture.id for picture in folders.list_images(ways)] == ["a.png"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_is_created_whole_where_there_are_no_links(tmp_path, monkeypatch, number):
    def no_links(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "link", no_links)
    files.create(tmp_path / "a.txt", "a dog\n")
    assert (tmp_path / "a.txt").read_text() == "a dog\n"
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "a.txt", "a cat\n")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync, calls = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(1) or (
        full(file) if len(calls) == 2 else fsync(file)))
    with pytest.raises(OSError, match="No space"):
        files.create(tmp_path / "b.txt", "a dog\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_of_a_record_only_what_is_used_is_kept(tmp_path):
    path, many = tmp_path / "details.jsonl", [[]] * 10_000
    record = {"image_id": 1, "caption": "a dog", "file": "1.png", "candidates": many}
    tracemalloc.start()
    path.write_text(f"{json.dumps(record)}\n" * 50)
    assert captions.read_captions(path) == [(1, "a dog")] * 50
    for name in ("caption", "image_id"):  # is refused at the first record
        path.write_text(f"{json.dumps(record | {name: many})}\n" * 50)
        with pytest.raises(InputError):
            captions.read_captions(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20  # all lists take 32 MB more


@pytest.mark.parametrize("read", [
    lambda path: captions.read_captions(path), lambda path: captions.read_texts(path, "file"),
    lambda path: texts.read_lines(path, "file")], ids=range(3))
def test_a_text_of_too_many_lines_is_refused_before_it_is_split(tmp_path, monkeypatch, read):
    monkeypatch.setattr(texts, "MOST_LINES", 10)
    (tmp_path / "a.txt").write_text("a\n" * 10)
    assert len(read(tmp_path / "a.txt")) in (10, 11)
    (tmp_path / "a.txt").write_text("a\n" * 12)
    with pytest.raises(InputError, match="a.txt has more than 10 lines"):
        read(tmp_path / "a.txt")
