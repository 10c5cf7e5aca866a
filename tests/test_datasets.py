"""Data sets in their makers' own forms: the same captions through every layout, splits, ids, and
what is left out. All scripts run on them."""

import csv
import io
import json
import random
import shutil
import tarfile

import pytest
from conftest import CLIP, commands
from PIL import Image

from antarctic.annotations import read_annotated
from antarctic.datasets import DataSet, read_coco, read_split, select, splits_of
from antarctic.errors import InputError
from antarctic.layouts import Entry

NAMES = [f"{1000 + 7 * i}_{i:x}.jpg" for i in range(6)]
CAPTIONS = {name: (f"a dog , and {i} cats", f'the "{i}" on naïve grass')
            for i, name in enumerate(NAMES)}
PARTS = ["train", "restval", "val", "test", "train", "val"]  # splits of NAMES


def draw(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(jpeg(NAMES.index(name)))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def coco_json(numbers=True, **more):
    images = [{"id": i if numbers else name, "file_name": name, **more}
              for i, name in enumerate(NAMES)]
    return {"images": images, "annotations": [
        {"id": i, "image_id": image["id"], "caption": text} for image in images
        for i, text in enumerate(CAPTIONS[image["file_name"]])]}


def karpathy_json(**more):
    return {"dataset": "flickr8k", "images": [
        {"filename": name, "imgid": i, "split": part, "sentids": [2 * i, 2 * i + 1], **more,
         "sentences": [{"raw": text, "tokens": text.split(), "imgid": i, "sentid": 2 * i + j}
                       for j, text in enumerate(CAPTIONS[name])]}
        for i, (name, part) in enumerate(zip(NAMES, PARTS))]}


def csv_text(header, rows, **options):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n", **options)
    writer.writerows([header, *rows])
    return buffer.getvalue()


def pairs():
    return [(name, j, text) for name in NAMES for j, text in enumerate(CAPTIONS[name])]


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(i=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (40 * i % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------- the makers' own forms

def coco(d):
    draw(d / "val2017")
    write(d / "annotations" / "captions_val2017.json", json.dumps(coco_json()))
    return {"split": "val2017"}


def karpathy_coco(d):
    draw(d / "val2014")
    data = karpathy_json(filepath="val2014")
    for image in data["images"]:
        image["cocoid"] = image["imgid"]
    write(d / "dataset_coco.json", json.dumps(data))


def karpathy_flickr30k(d):
    draw(d / "flickr30k-images")
    write(d / "dataset_flickr30k.json", json.dumps(karpathy_json()))


def karpathy_flickr8k(d):
    draw(d / "Flicker8k_Dataset")
    write(d / "dataset_flickr8k.json", json.dumps(karpathy_json()))


def flickr30k_token(d):
    draw(d / "flickr30k_images")
    write(d / "results_20130124.token",
          "".join(f"{name}#{j}\t{text}\n" for name, j, text in pairs()))


def flickr8k_token(d):
    draw(d / "Flickr8k_Dataset" / "Flicker8k_Dataset")
    write(d / "Flickr8k_text" / "Flickr8k.token.txt",
          "".join(f"{name}#{j}\t{text}\n" for name, j, text in pairs()))
    for part, list_name in (("train", "train"), ("val", "dev"), ("test", "test")):
        names = [name for name, own in zip(NAMES, PARTS) if own == part]
        write(d / "Flickr8k_text" / f"Flickr_8k.{list_name}Images.txt", "\n".join(names) + "\n")


def kaggle_results(d):
    """One line lacks its second bar, as line 19,999 of the file on Kaggle."""
    draw(d / "flickr30k_images")
    lines = [f"{name}| {j}| {text}" for name, j, text in pairs()]
    lines[3] = lines[3].replace("| 1| ", "| 1   ")
    write(d / "results.csv", "\n".join(["image_name| comment_number| comment", *lines]) + "\n")


def kaggle_captions(d):
    draw(d / "Images")
    write(d / "captions.txt", csv_text(["image", "caption"],
                                       [(name, text) for name, _, text in pairs()]))


def kaggle_unquoted(d):
    draw(d / "Images")
    write(d / "captions.txt", "image,caption\n" + "".join(f"{name},{text}\n"
                                                          for name, _, text in pairs()))


def flickr_annotations(d):
    draw(d / "flickr30k-images")
    write(d / "flickr_annotations_30k.csv", csv_text(
        ["raw", "sentids", "split", "filename", "img_id"],
        [(json.dumps(CAPTIONS[name]), f"[{2 * i}, {2 * i + 1}]", part.replace("rest", ""), name, i)
         for i, (name, part) in enumerate(zip(NAMES, PARTS))]))


def nocaps(d):
    draw(d / "images")
    write(d / "nocaps_val_4500_captions.json", json.dumps(coco_json(
        open_images_id="0a", coco_url="https://localhost/0a.jpg", domain="near-domain")))
    return {"split": "val"}


def text_pairs(d):
    draw(d / "deep" / "er", NAMES[:3])
    draw(d, NAMES[3:])
    for path in d.rglob("*.jpg"):
        suffix = ".caption" if path.parent == d else ".txt"
        path.with_suffix(suffix).write_text("\n\n".join(CAPTIONS[path.name]) + "\r\n")


def metadata_jsonl(d):
    draw(d)
    write(d / "metadata.jsonl", "".join(json.dumps(
        {"file_name": name, "captions": CAPTIONS[name], "width": 8}) + "\n" for name in NAMES))


def metadata_csv(d):
    draw(d)
    write(d / "metadata.csv", csv_text(["file_name", "size", "description"],
                                       [(name, 8, text) for name, _, text in pairs()]))


def metadata_of_splits(d):
    for part in ("train", "test"):
        names = NAMES[:4] if part == "train" else NAMES[4:]
        draw(d / part, names)
        write(d / part / "metadata.jsonl", "".join(
            json.dumps({"file_name": name, "text": text}) + "\n" for name in names
            for text in CAPTIONS[name]))
    return {"split": ("train", "test")}


def shards(d):
    """As img2dataset writes them, and WebDataset's ShardWriter; statistics lie beside them."""
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            captions = CAPTIONS[NAMES[i]]
            members += [(f"{i:09}.json", json.dumps({"captions": captions, "width": 8}).encode()),
                        (f"{i:09}.jpg", jpeg(i))]
        write_tar(d / f"{shard:05}.tar", members)
        write(d / f"{shard:05}_stats.json", "{}")


def shards_of_splits(d):
    for shard, part in enumerate(("train", "val")):
        write_tar(d / part / "000.tar", [
            member for i in range(3 * shard, 3 * shard + 3)
            for member in ((f"./{NAMES[i]}", jpeg(i)),
                           (f"./{NAMES[i]}".replace("jpg", "txt"),
                            "\n".join(CAPTIONS[NAMES[i]]).encode()))])
    return {"split": ("train", "val")}


LAYOUTS = [coco, karpathy_coco, karpathy_flickr30k, karpathy_flickr8k, flickr30k_token,
           flickr8k_token, kaggle_results, kaggle_captions, kaggle_unquoted, flickr_annotations,
           nocaps, text_pairs, metadata_jsonl, metadata_csv, metadata_of_splits, shards,
           shards_of_splits]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def everything(d, splits="all"):
    """The Pictures of all splits."""
    splits = [splits] if isinstance(splits, str) else splits
    return [picture for split in splits for picture in read_split(d, split)]


@every_layout
def test_the_same_captions_come_through_every_layout(tmp_path, capsys, layout):
    from antarctic.images import read_image
    made = layout(tmp_path) or {"split": "all"}
    pictures = everything(tmp_path, made["split"])
    assert sorted(picture.captions for picture in pictures) == sorted(CAPTIONS.values())
    assert len({picture.id for picture in pictures}) == len(NAMES)
    for picture in pictures:  # each with its own image, to which the colour belongs
        i = int(picture.captions[0].split()[-2])
        assert abs(read_image(picture.path).getpixel((4, 4))[0] - 40 * i % 256) < 12
    out, err = capsys.readouterr()
    assert not err and out.count("\n") == (0 if layout is coco else len(
        [made["split"]] if isinstance(made["split"], str) else made["split"]))


@every_layout
def test_captions_are_read_without_images(tmp_path, layout):
    made = layout(tmp_path) or {"split": "all"}
    if layout in (text_pairs, shards, shards_of_splits):  # the images are the list
        return
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    splits = [made["split"]] if isinstance(made["split"], str) else made["split"]
    pictures = [p for split in splits for p in read_split(tmp_path, split, need_images=False)]
    assert sorted(picture.captions for picture in pictures) == sorted(CAPTIONS.values())
    if layout is not coco:  # whose folder is enough, since each missing image is named later
        with pytest.raises(InputError, match=r"none of the .* images|no image folder"):
            everything(tmp_path, splits)


@pytest.mark.parametrize("layout, file", [
    (coco, "annotations/captions_val2017.json"), (karpathy_coco, "dataset_coco.json"),
    (flickr30k_token, "results_20130124.token"), (kaggle_captions, "captions.txt"),
    (nocaps, "nocaps_val_4500_captions.json"), (metadata_jsonl, "metadata.jsonl"),
    (shards, "{00000..00001}.tar"), (shards, "0000?.tar")])
def test_a_file_or_a_pattern_can_be_named_itself(tmp_path, layout, file):
    made = layout(tmp_path) or {"split": "all"}
    named, found = (everything(place, made["split"]) for place in (tmp_path / file, tmp_path))
    assert named == found


# ----------------------------------------------------------------------------------------- splits

@pytest.mark.parametrize("layout, numbers", [
    (karpathy_coco, {"train": 3, "restval": 1, "val": 2, "validation": 2, "test": 1, "all": 6}),
    (flickr8k_token, {"train": 2, "val": 2, "dev": 2, "test": 1, "all": 6}),
    (flickr_annotations, {"train": 2, "val": 3, "test": 1, "all": 6}),
    (metadata_of_splits, {"train": 4, "test": 2}),
    (shards_of_splits, {"train": 3, "val": 3}),
    (text_pairs, {"train": 5, "val": 1, "all": 6})])
def test_splits_are_those_of_the_layout(tmp_path, layout, numbers):
    layout(tmp_path)
    assert {split: len(read_split(tmp_path, split)) for split in numbers} == numbers
    for default in ("train2017", "val2017"):
        same = default.removesuffix("2017")
        if same in numbers:
            assert read_split(tmp_path, None, default) == read_split(tmp_path, same)
    with pytest.raises(InputError, match=f"no split tset in .*{'.*'.join(sorted(numbers)[:1])}"):
        read_split(tmp_path, "tset")


@pytest.mark.parametrize("names", [
    ("train/0.tar", "validation/0.tar"), ("train-0000.tar", "validation-0000.tar"),
    ("train.tar", "validation.tar"), ("cc3m-train-0000.tar", "cc3m-validation-0000.tar"),
    ("a_train_000000-of-000002.tar", "a_validation_000000-of-000001.tar")],
    ids=lambda names: names[0])
def test_shards_are_of_the_split_that_their_names_say(tmp_path, capsys, names):
    for part, name in enumerate(names):
        write_tar(tmp_path / name, [(f"{part}.jpg", jpeg()), (f"{part}.txt", b"a dog")])
    assert [p.id for split in ("train", "val") for p in read_split(tmp_path, split)] == ["0", "1"]
    assert "warning" not in capsys.readouterr().err
    write_tar(tmp_path / "my-test-set-0000.tar", [("2.jpg", jpeg()), ("2.txt", b"a cat")])
    assert len(read_split(tmp_path, "all")) == 3
    assert "names no split, though 2 other tar files do" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["", "images"])
def test_splits_of_coco_without_captions_are_read(tmp_path, folder):
    draw(tmp_path / folder / "test2017")
    images = {"images": coco_json()["images"], "categories": []}
    for split in ("test2017", "test-dev2017"):
        write(tmp_path / "annotations" / f"image_info_{split}.json", json.dumps(images))
        pictures = read_split(tmp_path, split)
        assert pictures == read_coco(tmp_path, split) and len(pictures) == 6
        assert all(p.path.is_file() and p.captions == () for p in pictures)
        with pytest.raises(InputError, match="no image of .* has a caption"):
            read_split(tmp_path, split, need_captions=True)


def test_nocaps_has_a_test_split_without_captions_and_domains(tmp_path):
    nocaps(tmp_path)
    images = {"images": coco_json()["images"]}
    write(tmp_path / "nocaps_test_image_info.json", json.dumps(images))
    assert [p.captions for p in read_split(tmp_path, "test")] == [()] * 6
    assert set(DataSet(tmp_path).take("val").domains.values()) == {"near-domain"}
    assert read_annotated(tmp_path / "nocaps_test_image_info.json")[0].domain is None


def test_validation_images_stay_where_they_are():
    """About every twentieth is for validation, one at least, whatever the order and the number."""
    entries = [Entry(f"{i}.jpg", f"{i}.jpg", ()) for i in range(2000)]
    assert splits_of(entries) == ["train", "val", "all"]
    val = {entry.id for entry in select(entries, "val")}
    assert 60 < len(val) < 140
    assert {e.id for e in select(entries, "train")} == {e.id for e in entries} - val
    mixed = random.Random(0).sample(entries, 2000)
    assert {entry.id for entry in select(mixed, "val")} == val
    assert {entry.id for entry in select(entries[:1000], "val")} <= val
    for few in (1, 2, 7):
        assert select(entries[:few], "val")


def test_the_first_layout_that_has_the_split_is_taken(tmp_path):
    coco(tmp_path)
    draw(tmp_path / "images")
    write(tmp_path / "dataset_coco.json", json.dumps(karpathy_json()))
    assert [p.path.parent.name for p in read_split(tmp_path, "val2017")] == ["val2017"] * 6
    assert len(read_split(tmp_path, "restval")) == 1
    with pytest.raises(InputError) as error:
        read_split(tmp_path, "test2015")
    assert "COCO's layout: val2017" in str(error.value)
    assert "dataset_coco.json: all, restval, test, train, val" in str(error.value)


@pytest.mark.parametrize("file", [None, "notes.txt", "a.png", "a.tar.gz", "captions.txt"])
def test_a_folder_that_holds_no_data_set_is_answered_with_what_is_read(tmp_path, file):
    if file:
        (tmp_path / file).write_text("nothing of the kind")
    with pytest.raises(InputError, match="these are read: COCO's"):
        read_split(tmp_path)


# ------------------------------------------------------------------------------ ids, order, absence

@pytest.mark.parametrize("layout, ids", [
    (karpathy_flickr8k, [0, 1, 2, 3, 4, 5]), (flickr_annotations, [0, 1, 2, 3, 4, 5]),
    (flickr30k_token, NAMES), (metadata_csv, NAMES),
    (metadata_of_splits, [*(f"train/{name}" for name in NAMES[:4]),
                          *(f"test/{name}" for name in NAMES[4:])]),
    (text_pairs, [*NAMES[3:], *(f"deep/er/{name}" for name in NAMES[:3])]),
    (shards, [f"{i:09}" for i in range(6)])])
def test_ids_are_the_layouts_own_or_paths(tmp_path, layout, ids):
    made = layout(tmp_path) or {"split": "all"}
    assert [picture.id for picture in everything(tmp_path, made["split"])] == ids


def test_numbers_are_in_order_and_others_as_in_the_file(tmp_path):
    draw(tmp_path)
    data = karpathy_json()
    data["images"].reverse()
    write(tmp_path / "dataset_flickr8k.json", json.dumps(data))
    assert [p.id for p in read_split(tmp_path, "all")] == [0, 1, 2, 3, 4, 5]
    (tmp_path / "dataset_flickr8k.json").unlink()
    lines = [json.dumps({"file_name": name, "text": "a"}) for name in reversed(NAMES)]
    write(tmp_path / "metadata.jsonl", "\n".join(lines))
    assert [p.id for p in read_split(tmp_path, "all")] == NAMES[::-1]


def test_lines_of_endless_lists_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    draw(tmp_path)
    lines = [json.dumps({"file_name": name, "text": "a", "more": [[]] * 300}) for name in NAMES]
    write(tmp_path / "metadata.jsonl", "\n".join(lines))
    assert len(read_split(tmp_path, "all")) == len(NAMES)
    monkeypatch.setattr("antarctic.bounded.MOST_CONTAINERS", 1000)
    with pytest.raises(InputError, match="metadata.jsonl has more than 1,000 lists and objects"):
        read_split(tmp_path, "all")


def test_keys_that_two_shards_share_are_told_apart(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", [("0.jpg", jpeg()), ("0.txt", b"a dog")])
    assert [p.id for p in read_split(tmp_path, "all")] == ["a/0", "b/0"]


def without_captions(layout, d):
    """Damages the captions of the first three images of a layout."""
    absent = [None, "", " \n"]
    if layout is coco:
        path = d / "annotations" / "captions_val2017.json"
        data = json.loads(path.read_text())
        for i, value in enumerate(absent):
            for annotation in data["annotations"][2 * i:2 * i + 2]:
                annotation["caption"] = value
        del data["annotations"][0]["caption"]
    elif layout is karpathy_coco:
        path = d / "dataset_coco.json"
        data = json.loads(path.read_text())
        for i, value in enumerate(absent):
            data["images"][i]["sentences"] = [{"raw": value}, {}]
    else:
        path = d / "metadata.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, value in enumerate(absent):
            lines[i]["captions"] = [value, value]
        path.write_text("\n".join(map(json.dumps, lines)))
        return
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("layout", [coco, karpathy_coco, metadata_jsonl],
                         ids=lambda layout: layout.__name__)
def test_captions_that_are_missing_empty_or_null_are_said_once_and_left_out(tmp_path, capsys,
                                                                            layout):
    split = (layout(tmp_path) or {"split": "all"})["split"]
    whole = read_split(tmp_path, split)
    without_captions(layout, tmp_path)
    capsys.readouterr()
    pictures = read_split(tmp_path, split)
    err = capsys.readouterr().err
    assert "3 images" in err and "missing, empty or null" in err and repr(whole[2].id) in err
    assert err.count("\n") == 1
    assert [p.captions for p in pictures] == [()] * 3 + [p.captions for p in whole[3:]]
    trained = read_split(tmp_path, split, need_captions=True)
    assert trained == pictures[3:]
    assert "3 images" in capsys.readouterr().err


def test_what_is_odd_in_a_shard_is_named_and_left_out(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [
        ("a.jpg", jpeg()), ("a.PNG", jpeg()), ("a.txt", b"a dog"), ("b.txt", b"a cat"),
        ("c.jpg", jpeg()), ("d.jpg", jpeg()), ("d.json", b'{"caption": null, "text": "a"}'),
        ("e.webp", jpeg()), ("e.cls", b"3"), ("__data__", b"?"), ("._f.jpg", b"")])
    pictures = read_split(tmp_path, "all")
    assert {p.id: p.captions for p in pictures} == {"a": ("a dog",), "c": (), "d": (), "e": ()}
    err = capsys.readouterr().err
    assert "a.PNG" in err and "0.tar/b" in err and "'d'" in err and err.count("\n") == 3


# ---------------------------------------------------------------------------------------- scripts

@pytest.fixture(scope="module")
def same_world(world, tmp_path_factory):
    """The small world in other layouts: {name: folder}."""
    folder = tmp_path_factory.mktemp("layouts")
    splits = {split: read_coco(world, split) for split in ("train2017", "val2017")}
    karpathy, made = [], folder / "karpathy"
    for split, pictures in splits.items():
        shutil.copytree(world / split, made / split)
        karpathy += [{"filepath": split, "filename": p.path.name, "cocoid": p.id, "imgid": i,
                      "split": split.removesuffix("2017"),
                      "sentences": [{"raw": text} for text in p.captions]}
                     for i, p in enumerate(pictures)]
        write_tar(folder / "shards" / split.removesuffix("2017") / "0.tar", [
            member for p in pictures for member in
            ((f"{p.id}.png", p.path.read_bytes()),
             (f"{p.id}.txt", "\n".join(p.captions).encode()))])
    write(made / "dataset_coco.json", json.dumps({"images": karpathy}))
    return {name: folder / name for name in ("karpathy", "shards")}


@pytest.fixture(scope="module")
def results(script, world, cache, checkpoint, tmp_path_factory):
    """results(folder of data, split) is what mining, training, captioning and scoring give."""
    arguments = commands(world, cache, checkpoint, compute_cache={"topk": 9}, trainer={
        "topk": 24, "epochs": 1, "lrate": None, "tmax": 1})

    def run(datadir, split):
        out = tmp_path_factory.mktemp("out")
        for step in ("compute_cache", "trainer", "sampler"):
            result = script(step, *arguments[step](out, datadir=datadir))
            assert result.code == 0, result.err
            assert ("read " in result.out) == (datadir != world)
        with pytest.MonkeyPatch.context() as patch:  # Java takes ten seconds
            patch.setenv("PATH", str(out))
            result = script("scorer", "--results", out / "captions.json", "--datadir", datadir,
                            "--split", split, "--train_captions", datadir, "--clip_model", CLIP)
        assert result.code == 0, result.err
        captions = json.loads((out / "captions.json").read_text())
        return {
            "cache": (out / "c.txt").read_text(), "curve": (out / "loss.csv").read_text(),
            "captions": sorted(record["caption"] for record in captions),
            "scores": json.loads((out / "scores.json").read_text())["scores"],
            "gallery": (out / "gallery.html").read_text().count("data:image/jpeg")}
    return run


def test_all_scripts_give_the_same_on_every_layout(world, results, same_world):
    """Mining, training, captioning and scoring, beside the same on COCO's layout."""
    expected = results(world, "val2017")
    for layout, datadir in same_world.items():
        made = results(datadir, "val")
        assert made["cache"] == expected["cache"] and made["captions"] == expected["captions"]
        assert made["gallery"] == expected["gallery"] > 0
        assert made["scores"] == pytest.approx(expected["scores"], abs=1e-6)
        assert {"CLIPScore", "RefCLIPScore", "CIDEr-D", "novel words"} <= set(made["scores"])
        if layout == "karpathy":  # others have texts as ids, and so another order
            assert made["curve"] == expected["curve"]
