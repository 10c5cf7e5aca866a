"""Data sets made to read other files, to hang or to fill the memory: refused by a sentence, or
read without what is wrong in them."""

import errno
import io
import json
import os
import tarfile

import pytest
from PIL import Image
from test_hostile import LONG, bounded, refusal

from antarctic import reads, tars
from antarctic.captions import read_captioned, read_texts
from antarctic.datasets import read_split
from antarctic.folders import list_images, read_paths
from antarctic.images import read_image
from antarctic.texts import read_words

# ---------------------------------------------------------------------------------------- data sets

def karpathy(name="a.png", caption="a dog"):
    return json.dumps({"images": [{"filename": name, "imgid": 1, "split": "test",
                                   "sentences": [{"raw": caption}]}]})


def as_json(**record):
    return json.dumps(record) + "\n"


# {file: (file name, caption) to its content}
DATA_SETS = {
    "dataset_flickr8k.json": karpathy,
    "nocaps_all_.json": lambda name="a.png", caption="a dog": json.dumps(
        {"images": [{"id": 1, "file_name": name}],
         "annotations": [{"image_id": 1, "caption": caption}]}),
    "results_20130124.token": lambda name="a.png", caption="a dog": f"{name}#0\t{caption}\n",
    "results.csv": lambda name="a.png", caption="a dog":
        f"image_name| comment_number| comment\n{name}| 0| {caption}\n",
    "captions.txt": lambda name="a.png", caption="a dog": f"image,caption\n{name},{caption}\n",
    "flickr_annotations_30k.csv": lambda name="a.png", caption="a dog":
        f'raw,sentids,split,filename,img_id\n"[""{caption}""]",[1],all,{name},1\n',
    "metadata.csv": lambda name="a.png", caption="a dog": f"file_name,text\n{name},{caption}\n",
    "metadata.jsonl": lambda name="a.png", caption="a dog": as_json(file_name=name, text=caption),
}
every_data_set = pytest.mark.parametrize("file", DATA_SETS)


def read_all(folder):
    return read_split(folder, "all")


def data_set(folder, file, **values):
    """Writes a data set of one image, which is black, with some of its values changed."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / file).write_text(DATA_SETS[file](**values), encoding="utf-8")
    return folder


@every_data_set
def test_a_plain_data_set_is_read(tmp_path, file):
    [picture] = read_all(data_set(tmp_path, file))
    assert picture.captions == ("a dog",) and picture.path == tmp_path / "a.png"


@every_data_set
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "..",
                                  "//etc/passwd", "sub/../a.png"])
def test_no_file_name_of_a_data_set_leads_out_of_its_folder(tmp_path, file, name):
    message = refusal(read_all, data_set(tmp_path, file, name=name))
    assert "is no path inside the folder of images" in message and name in message


@pytest.mark.parametrize("place", ["a.png", "images", "sub"])
@every_data_set
def test_no_link_of_a_data_set_leads_out_of_its_folder(tmp_path, capsys, file, place):
    """Neither that of an image, nor that of a folder of images."""
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "a.png")
    folder = tmp_path / "data"
    folder.mkdir()
    data_set(folder, file, name="sub/a.png" if place == "sub" else "a.png")
    (folder / "a.png").unlink()
    (folder / place).symlink_to(outside / "a.png" if place == "a.png" else outside)
    assert "is in" in refusal(read_all, folder)
    err = capsys.readouterr().err
    if place != "images" or "metadata" not in file:  # whose names are relative to their own folder
        assert "lead out" in err and str(folder / place) in err


def test_cocos_image_folder_may_be_a_link_and_its_files_may_not_lead_out(tmp_path, capsys):
    """People link whole image folders, which are large."""
    images = tmp_path / "elsewhere" / "val2017"
    images.mkdir(parents=True)
    for name in ("a.png", "../secret.png"):
        Image.new("RGB", (8, 8)).save(images / name)
    (images / "b.png").symlink_to("../secret.png")
    (images / "c.png").symlink_to("a.png")
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").symlink_to(images)
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("abc")],
        "annotations": []}))
    assert [picture.id for picture in read_split(folder)] == [0, 2]
    assert "val2017/b.png" in capsys.readouterr().err


@every_data_set
def test_a_data_set_of_links_into_a_store_says_what_to_do(tmp_path, capsys, file):
    """As git-annex, DVC and the hub's cache keep files: all images are links out of the folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    data_set(folder, file)
    (folder / "a.png").rename(tmp_path / "blob")
    (folder / "a.png").symlink_to("../blob")
    refusal(read_all, folder)
    assert "cp -rL" in capsys.readouterr().err


# -------------------------------------------------------------------------------- unreadable inputs

def fail(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), path)


ODD = {  # {what stands in the place of a file: function that puts it there}
    "a folder": lambda path: path.mkdir(), "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a process's memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}
READERS = [read_split, read_paths, read_words, read_captioned,
           lambda path: read_texts(path, "references file")]


@pytest.fixture
def unreadable(monkeypatch):
    """unreadable(path): each attempt to open this file fails, as on a broken disk."""
    paths, real, real_os = set(), open, os.open

    def opened(path, *more, **named):
        return fail(path) if not isinstance(path, int) and str(path) in paths else \
            real(path, *more, **named)

    def os_opened(path, *more, **named):
        return fail(path) if str(path) in paths else real_os(path, *more, **named)

    monkeypatch.setattr(reads, "PAUSES", ())
    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("os.open", os_opened)
    return lambda path: paths.add(str(path))


@pytest.mark.parametrize("kind", ODD)
@every_data_set
def test_what_is_no_file_in_a_data_set_is_named(tmp_path, monkeypatch, file, kind):
    monkeypatch.setattr(reads, "PAUSES", ())
    data_set(tmp_path, file)
    (tmp_path / file).unlink()
    ODD[kind](tmp_path / file)
    assert str(tmp_path) in refusal(read_all, tmp_path)
    if kind != "a folder":
        assert str(tmp_path / file) in refusal(read_all, tmp_path / file)


@every_data_set
def test_a_data_set_that_the_disk_does_not_give_is_named(tmp_path, unreadable, file):
    data_set(tmp_path, file)
    unreadable(tmp_path / file)
    for place in (tmp_path, tmp_path / file):
        message = refusal(read_all, place)
        assert str(tmp_path / file) in message and os.strerror(errno.EIO) in message


def test_a_tar_that_the_disk_does_not_give_is_named(tmp_path, unreadable):
    tar_of(tmp_path / "a.tar", ("a.jpg", b"x"), ("a.txt", b"a dog"))
    unreadable(tmp_path / "a.tar")
    assert str(tmp_path / "a.tar") in refusal(read_all, tmp_path)
    with pytest.raises(OSError) as caught:  # not "there is no such image", nor "it is damaged"
        read_image(tmp_path / "a.tar" / "a.jpg")
    assert reads.passes(caught.value)


@pytest.mark.parametrize("kind", [*ODD, "an error of the disk", "a name too long"])
@pytest.mark.parametrize("read", READERS, ids=range(len(READERS)))
def test_an_input_that_cannot_be_read_is_named(tmp_path, unreadable, read, kind):
    path = tmp_path / ("list" if kind != "a name too long" else 300 * "a")
    if kind in ODD:
        ODD[kind](path)
    elif kind == "an error of the disk":
        path.write_text("a\n")
        unreadable(path)
    assert str(path) in refusal(read, path)


def test_a_folder_that_cannot_be_listed_is_named_and_others_in_it_are_told_of(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    closed, scandir, listdir = set(), os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda p: fail(p) if str(p) in closed else scandir(p))
    monkeypatch.setattr(os, "listdir", lambda p: fail(p) if str(p) in closed else listdir(p))
    monkeypatch.setattr(reads, "PAUSES", ())
    closed.add(str(tmp_path / "sub"))
    [picture] = list_images([tmp_path])
    assert picture.path == tmp_path / "a.png"
    assert f"1 folder, such as {tmp_path / 'sub'}, cannot be read" in capsys.readouterr().err
    closed.add(str(tmp_path))
    for read in (lambda path: list_images([path]), read_split):
        assert f"{tmp_path}" in refusal(read, tmp_path)


@every_data_set
def test_links_within_a_data_set_are_followed(tmp_path, file):
    data_set(tmp_path, file)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    (tmp_path / "a.png").symlink_to("b.png")
    assert len(read_all(tmp_path)) == 1


@every_data_set
def test_a_data_set_with_a_caption_of_ten_megabytes_is_refused(tmp_path, file):
    message = refusal(read_all, data_set(tmp_path, file, caption=LONG))
    assert "10,000,000 characters" in message or "field larger than field limit" in message
    assert len(message) < 300


@every_data_set
@pytest.mark.parametrize("content", [
    b"\0" * 1000, b"\xff\xfe" * 500, b"[" * 100_000, b'{"images": ' + b"[" * 100_000,
    b'{"images": [{"sentences": 7}]}', b'{"images": {"a": 1}}', b"[null]", b"7", b'{"images": []}',
    b"image,caption\n", b"file_name,a,b\n1.png,two,three\n", b'file_name,text\n"a' + b"b" * 200_000,
    b"a.png#0\ta dog\nno name and no number\n", b"image_name| comment_number| comment\na\n",
    b'{"file_name": 7, "text": "a"}\n', b'{"file_name": "a.png", "text": {"a": 1}}\n',
    b'{"file_name": "\\ud800.png", "text": "a"}\n', b'{"file_name": ""}\n'],
    ids=lambda content: f"{content[:16]}... {len(content)}")
def test_a_data_set_that_is_something_else_is_refused(tmp_path, file, content):
    data_set(tmp_path, file)
    (tmp_path / file).write_bytes(content)
    assert str(tmp_path) in refusal(read_all, tmp_path)
    assert str(tmp_path) in refusal(read_all, tmp_path / file)


@pytest.mark.parametrize("file", ["dataset_flickr8k.json", "nocaps_all_.json"])
def test_an_image_that_a_data_set_lists_twice_is_named(tmp_path, file):
    data_set(tmp_path, file)
    data = json.loads((tmp_path / file).read_text())
    data["images"] *= 2
    (tmp_path / file).write_text(json.dumps(data))
    assert "lists the image 1 twice" in refusal(read_all, tmp_path)


def test_no_text_beside_an_image_is_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("a secret")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "a.txt").symlink_to("../secret.txt")
    (folder / "b.txt").write_text("a dog")
    assert {p.id: p.captions for p in read_all(folder)} == {"a.png": (), "b.png": ("a dog",)}
    (folder / "b.txt").write_text(LONG)
    assert "10,000,000 characters" in refusal(read_all, folder)
    (folder / "b.txt").write_bytes(b"\xff\xfea")
    assert "is not UTF-8" in refusal(read_all, folder)


# ------------------------------------------------------------------------------------- tar files

def tar_of(path, *members, **options):
    """Writes a tar file of members: (name, bytes or a size without data)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = data if isinstance(data, int) else len(data)
            tar.addfile(info, None if isinstance(data, int) else io.BytesIO(data))


def tar_header(name="a.jpg", size=0, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


TAR_BOMBS = {  # {name: (beginning of the file, its size)}
    "a name of 4 TB": (tar_header(size=1 << 42, kind=b"L"), 1 << 43),
    "attributes of 4 TB": (tar_header(size=1 << 42, kind=b"x"), 1 << 43),
    "attributes of all of 4 TB": (tar_header(size=1 << 42, kind=b"g"), 1 << 43),
    "a member of 8 EB": (tar_header(size=1 << 62), 1 << 20),
    "long names without end": (tar_header(size=512, kind=b"L") * 100_000, None),
    "attributes that lie": (tar_header(size=512, kind=b"x") + b"9" * 512 + tar_header(), None),
    "attributes of size -1": (tar_header(size=19, kind=b"x") + b"11 size=-1\n".ljust(512, b"\0")
                              + tar_header(), None),
    "a caption of 4 GB": (tar_header("a.jpg", 0) + tar_header("a.txt", 1 << 32), 1 << 33),
    "deep JSON": (tar_header("a.jpg", 0) + tar_header("a.json", 1 << 19)
                  + (b"[" * (1 << 19)) + bytes(1024), None),
    "a caption that is no text": (tar_header("a.jpg", 0) + tar_header("a.json", 16)
                                  + b'{"caption": [7]}'.ljust(512, b"\0"), None),
    "a caption that is not UTF-8": (tar_header("a.jpg", 0) + tar_header("a.txt", 512)
                                    + b"\xff" * 512, None),
}


@pytest.mark.parametrize("name", TAR_BOMBS)
def test_a_tar_bomb_is_refused(tmp_path, name):
    content, size = TAR_BOMBS[name]
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(content)
        file.truncate(size or len(content))
    assert str(tmp_path / "a.tar") in refusal(read_all, tmp_path)


def test_a_tar_of_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MOST_MEMBERS", 50)
    tar_of(tmp_path / "a.tar", *((f"{i}.jpg", b"") for i in range(51)))
    assert "more than 50 members" in refusal(read_all, tmp_path)
    monkeypatch.setattr(tars, "MOST_MEMBERS", 99)
    monkeypatch.setattr(tars, "MOST_HEADERS", 50)
    assert "more than 50 headers" in refusal(read_all, tmp_path)


def test_a_member_that_says_it_has_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(tar_header(size=1 << 40))
        file.truncate(1 << 41)
    with bounded(megabytes=20):
        [picture] = read_all(tmp_path)
        with pytest.raises(OSError, match="too large"):
            read_image(picture.path)


def test_shards_that_are_links_out_of_the_folder_are_not_followed(tmp_path, capsys):
    tar_of(tmp_path / "secret.tar", ("a.jpg", b""), ("a.txt", b"a secret"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.tar").symlink_to("../secret.tar")
    refusal(read_all, folder)
    assert "lead out" in capsys.readouterr().err
    tar_of(folder / "1.tar", ("b.jpg", b""), ("b.txt", b"a dog"))
    assert [picture.id for picture in read_all(folder)] == ["b"]


def test_no_path_of_a_member_reaches_the_file_system(tmp_path):
    """A path through a tar file that does not hold it is missing, whatever lies beside the tar."""
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    tar_of(tmp_path / "a.tar", ("a.jpg", b"x"))
    for name in ("../b.png", "sub/../../b.png", "b.png"):
        with pytest.raises(OSError):
            read_image(f"{tmp_path}/a.tar/{name}")
