"""Members of tar files, beside tarfile and webdataset: what is read, and what is left out."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_datasets import jpeg, write_tar

from antarctic import tars
from antarctic.datasets import read_split
from antarctic.errors import InputError
from antarctic.images import file_status, read_bytes, read_image
from antarctic.shards import KEY, expand

NAMES = ["a.jpg", "./b.jpg", "d//e.txt", "d/" + "x" * 95 + ".jpg", "é 🐕.txt", "y" * 250 + ".txt",
         "empty.txt", "block.bin", "noext", "a.b/c.d.jpg"]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def contents():
    rng = random.Random(0)
    sizes = {"empty.txt": 0, "block.bin": 512}
    return {name: rng.randbytes(sizes.get(name, rng.randrange(1, 3000))) for name in NAMES}


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, kind):
    path = tmp_path / "a.tar"
    members = {name: data for name, data in contents().items()
               if kind != "ustar" or len(name) < 200}
    write_tar(path, members.items(), format=FORMATS[kind])
    index = tars.index_of(path)
    with tarfile.open(path) as tar:
        expected = {os.path.normpath(member.name): tar.extractfile(member).read() for member in tar}
    assert list(index.members) == list(expected) and not index.problems
    for name, data in expected.items():
        assert read_bytes(path / name) == data == members.get(name, data)
        assert file_status(path / name)[0] == len(data)
        assert tars.is_file(path / name)


def special(kind, **more):
    info = tarfile.TarInfo("special")
    info.type = kind
    for name, value in more.items():
        setattr(info, name, value)
    return info


def test_what_is_no_plain_file_is_left_out_by_name(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for info in (special(tarfile.SYMTYPE, linkname="/etc/passwd"),
                     special(tarfile.LNKTYPE, linkname="a.jpg"), special(tarfile.FIFOTYPE),
                     special(tarfile.CHRTYPE, devmajor=1, devminor=5), special(tarfile.DIRTYPE)):
            tar.addfile(info)
        for name in ("../out.jpg", "/etc/out.jpg", "d/../../out.jpg"):
            tar.addfile(tarfile.TarInfo(name))
        for _ in range(2):
            info = tarfile.TarInfo("a.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"one"))
    index = tars.index_of(path)
    assert list(index.members) == ["a.jpg"]
    [problem] = index.problems
    assert "8, such as 'special' (it is a link, a device or the like)" in problem
    for name in ("special", "../out.jpg", "/etc/out.jpg", "b.jpg", "a.jpg/b"):
        with pytest.raises(OSError):
            read_bytes(f"{path}/{name}")
        with pytest.raises(OSError):
            file_status(f"{path}/{name}")
        assert not tars.is_file(f"{path}/{name}")


def test_a_gnu_sparse_file_is_left_out_and_what_follows_is_read(tmp_path):
    """Its data are in the file's order, and its headers may have extensions."""
    path = tmp_path / "a.tar"
    write_tar(path, [("s", b"x" * 600), ("b.txt", b"a dog")], format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[482] = 1  # one more block of headers
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    data[512:512] = bytes(512)
    path.write_bytes(data)
    index = tars.index_of(path)
    assert list(index.members) == ["b.txt"] and "sparse" in index.problems[0]
    assert read_bytes(path / "b.txt") == b"a dog"


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.95])
def test_of_a_cut_tar_the_whole_members_are_read(tmp_path, place):
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{i}.txt", b"x" * 700) for i in range(9)])
    whole = tars.index_of(path).members
    length = int(place * 9 * 1536)
    path.write_bytes(path.read_bytes()[:length])
    index = tars.index_of(path)
    assert index.members == {name: (offset, size) for name, (offset, size) in whole.items()
                             if offset + size <= length}
    assert len(index.problems) == 1 and "cut off" in index.problems[0]


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"no tar file " * 100, b"\x1f\x8b" * 999])
def test_what_is_no_tar_is_refused(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no uncompressed tar file"):
        tars.index_of(path)
    with pytest.raises(OSError):
        read_bytes(path / "a.jpg")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_by_a_sentence(tmp_path, mode):
    for name in ("a.tar", f"a.tar.{mode}"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
        with pytest.raises(InputError, match="compressed"):
            read_split(tmp_path / name, "all")


def test_a_changed_tar_is_read_again_and_few_are_kept(tmp_path):
    for i in range(9):
        write_tar(tmp_path / f"{i}.tar", [("a.jpg", jpeg(i))])
        before = file_status(tmp_path / f"{i}.tar" / "a.jpg")
    assert tars.make_index.cache_info().currsize == tars.KEPT_INDEXES
    write_tar(tmp_path / "8.tar", [("b.txt", b"a dog"), ("a.jpg", jpeg(2))])
    assert file_status(tmp_path / "8.tar" / "a.jpg") != before
    assert read_image(tmp_path / "8.tar" / "a.jpg").getpixel((4, 4))[0] == pytest.approx(80, abs=9)


def test_a_folder_may_be_called_like_a_tar(tmp_path):
    place = tmp_path / "x.tar" / "y.tar"
    place.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "a.png")
    assert read_image(place / "a.png").size == (8, 8)
    write_tar(place / "z.tar", [("q.tar/a.png", (place / "a.png").read_bytes())])
    assert read_image(str(place / "z.tar" / "q.tar" / "a.png")).size == (8, 8)
    assert file_status(place / "a.png")[0] == (place / "a.png").stat().st_size


@pytest.mark.parametrize("name, key, suffix", [
    ("000.jpg", "000", "jpg"), ("d/000.seg.png", "d/000", "seg.png"), ("a.b/c.jpg", "a.b/c", "jpg"),
    ("noext", None, None), (".hidden.jpg", None, None), ("a.", "a", "")])
def test_keys_are_webdatasets(name, key, suffix):
    match = KEY.fullmatch(name)
    assert (match and match.groups()) == (key and (key, suffix))
    tariterators = pytest.importorskip("webdataset.tariterators")
    assert tariterators.base_plus_ext(name) == (key, suffix)


def test_shards_of_webdatasets_writer_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"file:{tmp_path}/%05d.tar", maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"{i:06}", "jpg": jpeg(i), "txt": f"a dog and {i} cats"})
    pattern = f"{tmp_path}/{{00000..00002}}.tar"
    pictures = read_split(pattern, "all")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [(p.id, p.captions) for p in pictures] == [
        (sample["__key__"], (sample["txt"].decode(),)) for sample in samples]
    for picture, sample in zip(pictures, samples):
        assert read_bytes(picture.path) == sample["jpg"]


@pytest.mark.parametrize("pattern, names", [
    ("a.tar", ["a.tar"]), ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
    ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
    ("{a}{1..2}-{0..1}", ["{a}1-0", "{a}1-1", "{a}2-0", "{a}2-1"])])
def test_ranges_in_braces_stand_for_numbers(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize("pattern", ["{2..1}.tar", "{0..999999999}.tar", "{0..999}{0..999}.tar"])
def test_ranges_that_make_no_sense_are_refused(pattern):
    with pytest.raises(InputError, match="100,000 tar files"):
        expand(pattern)


def test_a_shard_that_is_missing_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg())])
    with pytest.raises(InputError, match="1.tar"):
        read_split(f"{tmp_path}/{{0..1}}.tar", "all")
    assert Path(read_split(f"{tmp_path}/{{0..0}}.tar", "all")[0].path) == tmp_path / "0.tar/a.jpg"
