"""A folder that grows: what is captioned stays, whatever the order, the batches or the place."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from conftest import BART, CLIP
from test_sampler import photos, run_sampler, sample

from antarctic.errors import InputError
from antarctic.feature_files import Store
from antarctic.features import image_features
from antarctic.folders import Picture
from antarctic.records import Records
from antarctic.results import write_results
from antarctic.sealed import seal
from model import Caption, Clip, rescore

SAMPLES = "--do_sample", "--num_return_sequences", "8", "--top_p", "0.9"


@pytest.fixture
def counted(monkeypatch):
    """How many images each batch captions, and how many each batch of CLIP encodes."""
    captioned, encoded, encode = [], [], Clip.encode_images
    monkeypatch.setattr("model.rescore",
                        lambda *how: captioned.append(len(how[2])) or rescore(*how))
    monkeypatch.setattr(Clip, "encode_images",
                        lambda self, images: encoded.append(len(images)) or encode(self, images))

    def take():
        taken = sum(captioned), sum(encoded)
        captioned.clear()
        encoded.clear()
        return taken
    return take


def by_name(records):
    """What each image got, without its id and path."""
    return {Path(r["file"]).name: {name: r[name] for name in r.keys() - {"image_id", "file"}}
            for r in records}


def assert_alike(some, others):
    """Compares records, or parts of them. A sum of float32 depends on the batch by 3e-7, so that a
    number's last digit may be another one, and the seal with it."""
    if isinstance(some, dict):
        some, others = ({**each, "seal": None} for each in (some, others))
        assert some.keys() == others.keys()
        assert_alike(list(some.values()), list(others.values()))
    elif isinstance(some, list):
        assert len(some) == len(others)
        for pair in zip(some, others):
            assert_alike(*pair)
    elif isinstance(some, float):
        assert some == pytest.approx(others, abs=1.1e-5)
    else:
        assert some == others


@pytest.mark.parametrize("flags", [(), SAMPLES], ids=["beam", "samples"])
def test_a_photo_more_is_captioned_alone(script, world, cache, checkpoint, tmp_path, counted,
                                         flags):
    folder, flags = photos(world, tmp_path / "photos"), ("--ckpt", checkpoint, *flags)
    first = sample(script, cache, tmp_path / "r", "--images", folder, *flags)
    assert counted() == (4, 4)
    shutil.copy(sorted((world / "near").glob("*.png"))[5], folder / "1b.png")
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, *flags)
    assert run.code == 0 and "captioned 5 images, 4 of them in earlier runs" in run.out
    assert run.out.count(str(folder)) == 1 and f"{folder / '1b.png'}: " in run.out  # the new one
    assert counted() == (1, 1)
    grown = [json.loads(line) for line in (tmp_path / "r" / "details.jsonl").open()]
    assert [Path(r["file"]).name for r in grown] == ["0.png", "1.png", "1b.png", "2.png", "3.png"]
    assert by_name(first).items() <= by_name(grown).items()
    anew = sample(script, cache, tmp_path / "new", "--images", folder, *flags)
    assert_alike(grown, anew)


@pytest.mark.parametrize("flags", [(), SAMPLES], ids=["beam", "samples"])
def test_another_batch_size_order_or_place_keeps_the_captions(script, world, cache, checkpoint,
                                                              tmp_path, counted, flags):
    folder, flags = photos(world, tmp_path / "photos"), ("--ckpt", checkpoint, *flags)
    first = sample(script, cache, tmp_path / "r", "--images", folder, *flags)
    counted()
    again = sample(script, cache, tmp_path / "r", "--images", folder, "--batch_size", "3", *flags)
    assert again == first and counted() == (0, 0)
    paths = sorted(folder.iterdir(), reverse=True)
    again = sample(script, cache, tmp_path / "r", "--images", *paths, *flags)
    assert again == first[::-1] and counted() == (0, 0)

    moved = folder.rename(tmp_path / "elsewhere")
    for path in moved.iterdir():
        os.utime(path, (1, 1))  # as a copy has it
    (moved / "0.png").rename(moved / "z.png")
    again = sample(script, cache, tmp_path / "r", "--images", moved, *flags)
    assert counted() == (0, 0)
    assert list(by_name(again).values()) == list(by_name(first[1:] + first[:1]).values())
    assert [r["file"] for r in again] == [str(path) for path in sorted(moved.iterdir())]
    fresh = sample(script, cache, tmp_path / "fresh", "--images", moved, *flags)
    assert fresh == again  # the captions that a first run there gives


def test_a_photo_that_is_there_twice_is_captioned_once_and_named_twice(script, world, cache,
                                                                       checkpoint, tmp_path,
                                                                       counted):
    folder = photos(world, tmp_path / "photos", 2)
    shutil.copy(folder / "0.png", folder / "copy.png")
    records = sample(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                     *SAMPLES)
    assert counted() == (2, 2) and len(records) == 3
    names = by_name(records)
    assert names["0.png"] == names["copy.png"] != names["1.png"]


def test_images_of_a_data_set_are_known_by_their_ids_too(tmp_path):
    """Their ids seed their samples, so equal files have samples of their own."""
    one, other = (Picture(i, tmp_path / f"{i}.png", (), "a" * 64) for i in (1, 2))
    file = Picture(str(tmp_path / "1.png"), tmp_path / "1.png", (), "a" * 64)
    assert len({one.key, other.key, file.key}) == 3
    assert (one.seed, other.seed, file.seed) == (1, 2, "a" * 64)
    moved = file._replace(id="b.png", path=Path("b.png"))
    assert moved.key == file.key != file._replace(sha256="b" * 64).key


def test_other_settings_or_a_changed_photo_are_captioned_anew(script, world, cache, checkpoint,
                                                              tmp_path, counted):
    folder, flags = photos(world, tmp_path / "photos", 2), ("--ckpt", checkpoint)
    images = "--images", folder
    sample(script, cache, tmp_path / "r", *images, *flags)
    counted()
    sample(script, cache, tmp_path / "r", *images, *flags, "--num_beams", "4")
    assert counted() == (2, 0)
    shutil.copy(sorted((world / "near").glob("*.png"))[5], folder / "0.png")
    records = sample(script, cache, tmp_path / "r", *images, *flags, "--num_beams", "4")
    assert counted() == (1, 1)
    anew = sample(script, cache, tmp_path / "new", *images, *flags, "--num_beams", "4")
    assert_alike(records, anew)


@pytest.mark.parametrize("model, file, encoded", [
    ("bart", "tokenizer.json", 0), ("bart", "config.json", 0), ("clip", "tokenizer_config.json", 0),
    ("clip", "preprocessor_config.json", 2), ("clip", "config.json", 2)])
def test_a_model_with_another_small_file_captions_anew(script, world, cache, checkpoint, tmp_path,
                                                       counted, model, file, encoded):
    """The weights alone name a model in caches and checkpoints, which stay valid."""
    models = {name: Path(shutil.copytree(path, tmp_path / name))
              for name, path in (("clip", CLIP), ("bart", BART))}
    flags = ("--images", photos(world, tmp_path / "photos", 2), "--ckpt", checkpoint,
             "--clip_model", models["clip"], "--lm", models["bart"])
    first = sample(script, cache, tmp_path / "r", *flags)
    counted()
    assert sample(script, cache, tmp_path / "r", *flags) == first and counted() == (0, 0)
    path = models[model] / file
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")  # the same settings
    again = sample(script, cache, tmp_path / "r", *flags)
    assert counted() == (2, encoded)
    assert [r["caption"] for r in again] == [r["caption"] for r in first]
    assert [r["seal"] for r in again] != [r["seal"] for r in first]


@pytest.mark.parametrize("change", [
    lambda line: line.replace(b'"caption": "', b'"caption": "mine '),
    lambda line: line.replace(b'"score": 0.', b'"score": 0.9'),
    lambda line: line[:40], lambda line: b"\n", lambda line: b"{}\n", lambda line: b"[]\n",
    lambda line: b"[" * 100_000 + b"\n", lambda line: b"\xff\n", lambda line: b'{"seal": []}\n'],
    ids=range(9))
def test_a_line_that_was_changed_is_captioned_anew(script, world, cache, checkpoint, tmp_path,
                                                   counted, change):
    folder, flags = photos(world, tmp_path / "photos", 3), ("--ckpt", checkpoint)
    records = sample(script, cache, tmp_path / "r", "--images", folder, *flags)
    counted()
    path = tmp_path / "r" / "details.jsonl"
    first, line, last = path.read_bytes().splitlines(keepends=True)
    assert change(line) != line
    path.write_bytes(first + change(line) + last)
    again = sample(script, cache, tmp_path / "r", "--images", folder, *flags)
    assert_alike(again, records)
    captioned, encoded = counted()
    assert encoded == 0 and captioned in (1, 2)  # a line without its end takes the next one along


def test_a_features_file_grows_with_the_folder(world, tmp_path, counted):
    clip, folder = Clip(CLIP), photos(world, tmp_path / "photos", 4)
    paths = sorted(folder.iterdir())
    pictures = [Picture(str(path), path) for path in paths]
    expected, *_ = image_features(clip, pictures, tmp_path, shard=1)
    counted()
    (tmp_path / "f").mkdir()
    for known in (pictures[:2], pictures[1:3], pictures):
        features, good, _ = image_features(clip, known, tmp_path / "f", shard=1)
        assert [p.path for p in good] == [p.path for p in known]
    assert (features - expected).abs().max() == 0 and counted() == (0, 4)
    assert len(list((tmp_path / "f").iterdir())) == 1  # the last file holds what the others held


def test_an_image_that_is_not_to_be_read_is_taken_where_it_is_known(world, tmp_path, counted):
    clip, folder = Clip(CLIP), photos(world, tmp_path / "photos", 3)
    pictures = [Picture(str(path), path) for path in sorted(folder.iterdir())]
    unread = {picture.path for picture in pictures[:2]}
    for known in ([2], [1, 2]):
        image_features(clip, [pictures[row] for row in known], tmp_path)
        counted()
        features, good, bad = image_features(clip, pictures, tmp_path, unread=unread)
        assert [p.path for p in good] == [pictures[row].path for row in known]
        assert len(features) == len(known) and not bad and counted() == (0, 0)


# ------------------------------------------------------------------------------ the part, by itself

CAPTION = Caption("a dog", 0.3, [("dog", 0.3)], [("a dog", 0.3, -1.0)])
PICTURES = [Picture(f"{name}.png", Path(f"{name}.png"), (), name * 64) for name in "abcdef"]


def filled(folder, *batches):
    """Records of a folder with these batches of PICTURES."""
    records = Records(folder, "0" * 16)
    for batch in batches:
        rows = PICTURES[batch]
        assert records.append(rows, [CAPTION] * len(rows))[0]["file"] == str(rows[0].path)
    return records


def test_whole_batches_stay_at_every_length(tmp_path):
    part = filled(tmp_path, slice(0, 2), slice(2, 5)).part
    whole = part.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for size in range(len(whole) + 1):
        part.write_bytes(whole[:size])
        left = Records(tmp_path, "0" * 16)
        done = 0 if size < ends[2] else 2 if size < ends[5] else 5
        assert left.missing(PICTURES) == list(range(done, 6))
        assert part.read_bytes() == whole[:ends[done]]


def test_a_part_goes_on_where_it_was_cut_off(tmp_path):
    part = filled(tmp_path, slice(0, 2), slice(2, 6)).part
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])
    filled(tmp_path, slice(2, 6))
    assert part.read_bytes() == whole
    records = Records(tmp_path, "0" * 16)
    rows, _ = write_results(tmp_path, records, PICTURES[::-1])
    assert [row["image_id"] for row in rows] == [p.id for p in PICTURES[::-1]]
    assert not part.exists() and Records(tmp_path, "0" * 16).missing(PICTURES) == []
    assert Records(tmp_path, "1").missing(PICTURES) == list(range(6))  # other settings


def test_records_that_another_program_changed_are_never_taken_for_all(tmp_path):
    records = filled(tmp_path, slice(0, 3))
    lines = records.part.read_bytes().splitlines(keepends=True)
    record, left = json.loads(lines[2].split(b" ", 1)[1])
    records.part.write_bytes(b"".join(lines[:2]) + seal([record | {"caption": "a cat"}, left]))
    with pytest.raises(InputError, match="2 of 3 records were read"):
        write_results(tmp_path, records, PICTURES[:3])
    assert sorted(tmp_path.iterdir()) == [records.part]


@pytest.mark.parametrize("line", [b"\0" * 100 + b"\n", b"\n", seal(7), seal([]), seal([{}, 0]),
                                  seal([{"seal": "0"}, 0]), seal([[], 0]), seal({"a": 1, "b": 2})],
                         ids=range(8))
def test_what_is_no_record_is_cut_off(tmp_path, line):
    part = filled(tmp_path, slice(0, 2)).part
    whole = part.read_bytes()
    part.write_bytes(whole + line)
    assert Records(tmp_path, "0" * 16).missing(PICTURES) == [2, 3, 4, 5]
    assert part.read_bytes() == whole


@pytest.mark.parametrize("change", [
    {"caption": 5}, {"caption": None}, {"score": "0.3"}, {"score": math.nan}, {"score": True},
    {"table": 7}, {"table": [["dog"]]}, {"table": [["dog", math.inf]]}, {"table": [[1, 0.3]]},
    {"candidates": [["a dog", 0.3]]}, {"candidates": [["a dog", 0.3, None]]},
    {"candidates": {"a": 1}}, {"candidates": {}}, {"table": {}}, {"table": ""}], ids=str)
def test_a_seal_makes_no_record_of_other_values(tmp_path, change):
    """Who knows the settings can seal whatever they like."""
    records = filled(tmp_path, slice(0, 2))
    record = records.record_of(PICTURES[2], CAPTION) | change
    record["seal"] = records.seal_of(record)
    whole = records.part.read_bytes()
    records.part.write_bytes(whole + seal([record, 0]))
    records.details.write_text(json.dumps(record) + "\n")
    assert Records(tmp_path, "0" * 16).missing(PICTURES) == [2, 3, 4, 5]
    assert records.part.read_bytes() == whole


def test_lines_without_an_end_are_no_records(tmp_path, monkeypatch):
    records = filled(tmp_path, slice(0, 2))
    whole = records.part.read_bytes()
    shutil.copy(records.part, tmp_path / "details.jsonl")
    for path in (records.part, records.details):
        os.truncate(path, 1 << 40)  # sparse
    for _ in range(2):
        assert Records(tmp_path, "0" * 16).missing(PICTURES) == [2, 3, 4, 5]
        assert records.part.read_bytes() == whole
    monkeypatch.setattr("antarctic.bounded.MOST_CONTAINERS", 1000)
    record = records.record_of(PICTURES[2], CAPTION) | {"more": [[]] * 1000}
    records.part.write_bytes(whole + seal([record, 0]))
    records.details.write_text(json.dumps(record) + "\n")
    assert Records(tmp_path, "0" * 16).missing(PICTURES) == [2, 3, 4, 5]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("mine"), os.mkfifo, Path.mkdir,
                                  lambda path: path.symlink_to("nowhere")], ids=range(4))
def test_what_is_no_file_in_the_place_of_one_is_neither_read_nor_written(tmp_path, make):
    (tmp_path / "mine").write_text("by hand")
    make(tmp_path / f"details-{'0' * 16}.jsonl.part")
    with pytest.raises(InputError, match="remove it"):
        Records(tmp_path, "0" * 16)
    assert (tmp_path / "mine").read_text() == "by hand" and not (tmp_path / "nowhere").exists()
    make(tmp_path / "features-0-0.part")
    assert Store(tmp_path, "0", [None], 4).missing() == ([0], set(), True)
